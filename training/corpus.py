"""Texts to train on: any folder of public-domain books, and Python's standard library.

    python -m training.corpus BOOKS --tokenizer checkpoints/hybrid --out PREPARED

writes PREPARED/{books,code,held_out_books}.npy, token ids as uint16, documents ended by the end-of-text token. BOOKS is a
folder of .txt, .md or .txt.xz files, at any depth; a file whose name holds "valid", or that held_out_books.txt beside this file lists as
AUTHOR/TITLE, is held out. Books in one file are separated by NUL.
"""

import argparse
import itertools
import lzma
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path)
    parser.add_argument("--tokenizer", required=True, help="folder of the tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    arguments.out.mkdir(parents=True, exist_ok=True)
    sources = {
        "books": read_books(arguments.books, held_out=False),
        "code": iter(library_sources(held_out=False)),
        "held_out_books": read_books(arguments.books, held_out=True),
    }
    for name, texts in sources.items():
        partial = arguments.out / f"{name}.npy.partial"
        ids = encode(texts, tokenizer, label=name)
        with partial.open("wb") as stream:
            np.save(stream, ids)
        partial.rename(arguments.out / f"{name}.npy")
        print(f"{name}: {len(ids):,} tokens")


if __name__ == "__main__":
    main()
