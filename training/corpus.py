"""Texts to train on: any folder of public-domain books, and Python's standard library.

    python -m training.corpus BOOKS --tokenizer checkpoints/hybrid --out PREPARED

writes PREPARED/{books,code,held_out_books}.npy, token ids as uint16, documents ended by the end-of-text token, and PREPARED/corpus.json, which
names the tokenizer. BOOKS is a
folder of .txt, .md or .txt.xz files, at any depth; a file whose name holds "valid", or that held_out_books.txt beside this file lists as
AUTHOR/TITLE, is held out. Books in one file are separated by NUL.
"""

import argparse
import hashlib
import itertools
import json
import lzma
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from staterank_utils.results import whole_or_not, write_json
from staterank_utils.tasks import library_sources

PIECE = 50_000  # characters encoded as one; a document's pieces are joined again
BATCH = 64  # documents encoded side by side
HELD_OUT = frozenset(Path(__file__).with_name("held_out_books.txt").read_text(encoding="utf-8").splitlines())


def read_books(folder: Path, *, held_out: bool) -> Iterator[str]:
    """The books of a folder, one by one."""
    files = sorted(file for file in folder.rglob("*") if file.name.endswith((".txt", ".md", ".txt.xz")))
    files = [file for file in files if ("valid" in file.name or "/".join(file.parts[-2:]) in HELD_OUT) == held_out]
    if not files:
        raise FileNotFoundError(
            f"{folder} has no {'held-out ' if held_out else ''}text: expected .txt, .md or .txt.xz, 'valid' in the name of what is held out"
        )
    for file in files:
        with lzma.open(file, "rt", encoding="utf-8") if file.suffix == ".xz" else file.open(encoding="utf-8") as stream:
            yield from (book.strip() for book in stream.read().split("\0") if book.strip())


def encode(texts: Iterator[str], tokenizer: PreTrainedTokenizerFast, *, label: str) -> np.ndarray:
    """Token ids of documents, one after the other, each ended by the end-of-text token."""
    end = np.array([tokenizer.eos_token_id], dtype=np.uint16)
    ids: list[np.ndarray] = []
    with tqdm(desc=label, unit=" documents") as bar:
        while batch := list(itertools.islice(texts, BATCH)):
            starts = [[(text, start) for start in range(0, len(text), PIECE)] for text in batch]
            pieces = [text[start : start + PIECE] for text, start in itertools.chain.from_iterable(starts)]
            encoded = iter(tokenizer.backend_tokenizer.encode_batch_fast(pieces, add_special_tokens=False))
            for document in starts:
                ids += [
                    np.array(encoding.ids, dtype=np.uint16) for encoding in itertools.islice(encoded, len(document))
                ]
                ids.append(end)
            bar.update(len(batch))
    return np.concatenate(ids)


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of all that a tokenizer does."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def check_corpus(folder: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Refuse a corpus that another tokenizer made; return the number of tokens of each of its parts.

    Raises:
        FileNotFoundError: the folder does not hold a prepared corpus.
        ValueError: its ids are those of another tokenizer.
    """
    file = folder / "corpus.json"
    if not file.exists():
        raise FileNotFoundError(
            f"{folder} is not a prepared corpus, it has no corpus.json: make one with python -m training.corpus"
        )
    made = json.loads(file.read_text(encoding="utf-8"))
    if made["tokenizer"] != tokenizer_hash(tokenizer):
        raise ValueError(
            f"the corpus in {folder} was made with another tokenizer (SHA-256 {made['tokenizer'][:12]}, expected "
            f"{tokenizer_hash(tokenizer)[:12]}): prepare it again with --tokenizer of this model"
        )
    return {name: int(n) for name, n in made["tokens"].items()}


def write_corpus(folder: Path, parts: Mapping[str, np.ndarray], tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the parts of a corpus, and last what names their tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, ids in parts.items():
        with whole_or_not(folder / f"{name}.npy") as partial, partial.open("wb") as stream:
            np.save(stream, ids)
    tokens = {name: len(ids) for name, ids in parts.items()}
    write_json(folder / "corpus.json", {"tokenizer": tokenizer_hash(tokenizer), "tokens": tokens})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path)
    parser.add_argument("--tokenizer", required=True, help="folder of the tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    sources = {
        "books": read_books(arguments.books, held_out=False),
        "code": iter(library_sources(held_out=False)),
        "held_out_books": read_books(arguments.books, held_out=True),
    }
    parts = {name: encode(texts, tokenizer, label=name) for name, texts in sources.items()}
    write_corpus(arguments.out, parts, tokenizer)
    for name, ids in parts.items():
        print(f"{name}: {len(ids):,} tokens")


if __name__ == "__main__":
    main()
