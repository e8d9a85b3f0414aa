"""Train the tokenizer: byte-level BPE of 8,192 tokens, every digit a token of its own.

python -m training.tokenizer BOOKS --out checkpoints/hybrid
"""

import argparse
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from staterank_utils.tasks import library_sources
from training.corpus import read_books

VOCABULARY_SIZE = 8192
END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
SAMPLE = 40_000_000  # characters of books; all of the code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    texts, size = list(library_sources(held_out=False)), 0
    for book in read_books(arguments.books, held_out=False):
        texts.append(book)
        size += len(book)
        if size > SAMPLE:
            break
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=PADDING, padding_side="left"
    ).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
