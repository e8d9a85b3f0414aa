"""What a training step reads: windows of books and code, and rows of generated tasks.

A step's batch follows from (seed, step) alone, so a resumed run reads the batches that it would have read.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from staterank_utils.tasks import WORDS, Turn, arithmetic, copying, needle, recall
from training.recipes import Recipe

FILLERS = {"books": 0.60, "code": 0.25, "words": 0.15}  # around needles, between a passage and its copy
PASSAGES = {"books": 0.25, "code": 0.40, "words": 0.05, "repeats": 0.30}  # to be copied


@dataclass(frozen=True)
class Sources:
    """Token ids of the prepared corpus (training.corpus), memory-mapped."""

    books: np.ndarray
    code: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> "Sources":
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("books", "code")))


class Mixture(Dataset[tuple[Tensor, Tensor]]):
    """Batch `step` of a recipe: token ids (rows, n_tokens + 1) and loss weights (rows, n_tokens)."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast, recipe: Recipe):
        self.sources = Sources.open(folder)
        self.tokenizer = tokenizer
        self.n_rows, self.n_tokens, self.seed = recipe.batch_rows, recipe.n_tokens, recipe.seed
        self.rows, self.tasks, self.answer_weight = dict(recipe.rows), dict(recipe.tasks), recipe.answer_weight

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        rng = random.Random(f"batch {self.seed} {step}")
        kinds = rng.choices(list(self.rows), weights=list(self.rows.values()), k=self.n_rows)
        rows = [
            self._tasks(rng) if kind == "tasks" else self._window(getattr(self.sources, kind), self.n_tokens + 1, rng)
            for kind in kinds
        ]
        ids = torch.stack([torch.from_numpy(row[0].astype(np.int64)) for row in rows])
        weights = torch.stack([torch.from_numpy(row[1][1:].astype(np.float32)) for row in rows])
        return ids, weights

    @staticmethod
    def _window(ids: np.ndarray, length: int, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
        start = rng.randrange(len(ids) - length)
        return np.asarray(ids[start : start + length]), np.ones(length)

    def _tasks(self, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < self.n_tokens + 1:
            texts = [text for turn in self._document(rng) for text in (turn.prompt, turn.answer)]
            for index, encoded in enumerate(
                self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            ):
                ids += encoded.ids
                weights += [self.answer_weight if index % 2 else 1.0] * len(encoded.ids)
            ids.append(self.tokenizer.eos_token_id)
            weights.append(1.0)
        length = self.n_tokens + 1
        return np.array(ids[:length]), np.array(weights[:length])

    def _document(self, rng: random.Random) -> list[Turn]:
        [kind] = rng.choices(list(self.tasks), weights=list(self.tasks.values()))
        if kind == "arithmetic":
            return [turn for _ in range(rng.randrange(1, 5)) for turn in arithmetic(rng, n_steps=rng.randrange(1, 8))]
        if kind == "recall":
            n_pairs = rng.randrange(4, 33)
            return recall(rng, n_pairs=n_pairs, n_asked=rng.randrange(1, n_pairs + 1))
        if kind == "needle":
            n_needles = rng.randrange(1, 9)
            return needle(
                rng,
                self._text(FILLERS, rng.randrange(100, 1700), rng),
                n_needles=n_needles,
                n_asked=rng.randrange(1, n_needles + 1),
            )
        gap = self._text(FILLERS, rng.randrange(16, 1024), rng) + "\n" if rng.random() < 0.3 else ""
        return copying(self._text(PASSAGES, rng.randrange(16, 200), rng) or "nothing", gap=gap)

    def _text(self, shares: dict[str, float], n_tokens: int, rng: random.Random) -> str:
        """About `n_tokens` tokens of one kind of text, drawn by the shares."""
        [kind] = rng.choices(list(shares), weights=list(shares.values()))
        if kind == "words":
            return " ".join(rng.choices(WORDS, k=n_tokens // 2))
        if kind == "repeats":
            # Like places follow each other: what comes next must be told by more than the last few tokens.
            source = self.sources.code if rng.random() < 0.5 else self.sources.books
            pieces = [self._window(source, rng.randrange(1, 9), rng)[0] for _ in range(rng.randrange(2, 9))]
            ids = np.concatenate(rng.choices(pieces, k=n_tokens))[:n_tokens]
        else:
            ids, _ = self._window(getattr(self.sources, kind), n_tokens, rng)
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
