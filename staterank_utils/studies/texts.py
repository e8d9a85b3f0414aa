"""The texts that a study reads: held-out books and code, cut into windows that do not overlap."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from staterank_utils.strata import Estimate, bootstrap
from staterank_utils.tasks import NATURAL_DOMAINS, domain_prompts, text_tokens

LOSS_TEXTS = ("books", "code")  # on which losses are taken
CALIBRATION_TEXTS = ("prose", "code")  # on which heads are ordered


@dataclass(frozen=True)
class Texts:
    """What a study reads; no two windows of a text overlap.

    Attributes:
        windows: (window, token), those of books first, then those of code.
        calibration: (prompt, token), on which heads are ordered.
        copies: (window, token), which are read twice in a row.
        secondary: (window, token), as many of each of the four natural domains, one domain after the other.
        unigram: text -> nats per token of its windows, by a unigram model.

    Example:
        >>> from staterank_utils import load_tokenizer
        >>> texts = draw_texts(load_tokenizer("hybrid"), n_windows=2, window=64, n_copies=1, copy=32, n_calibration=1)
        >>> texts.windows.shape, texts.copies.shape, sorted(texts.unigram)
        (torch.Size([4, 64]), torch.Size([2, 32]), ['books', 'code'])
    """

    windows: Int[Tensor, "window token"]
    calibration: Int[Tensor, "prompt token"]
    copies: Int[Tensor, "pair copy"]
    secondary: Int[Tensor, "window_of_domain token"]
    unigram: Mapping[str, float]

    def few_copies(self, n: int) -> "Texts":
        """The same texts with the first n copies of each alone."""
        return replace(self, copies=torch.cat([part[:n] for part in self.copies.chunk(len(LOSS_TEXTS))]))


def draw_texts(
    tokenizer: Any,
    *,
    n_windows: int = 16,
    window: int = 1024,
    n_copies: int = 8,
    copy: int = 1024,
    n_calibration: int = 16,
    seed: int = 0,
) -> Texts:
    """Draw the windows of each text; of the code, those for calibration too.

    Args:
        tokenizer: of the model that will read them.
        n_windows, window: for losses, windows per text and their tokens.
        n_copies, copy: for induction, windows per text and their tokens.
        n_calibration: prompts per text of `window` tokens.
        seed: of the places.

    Raises:
        ValueError: a text is too short.

    Example:
        >>> from staterank_utils import load_tokenizer
        >>> draw_texts(load_tokenizer("hybrid"), n_windows=1, window=64).calibration.shape
        torch.Size([32, 64])
    """
    windows, copies, unigram = [], [], {}
    calibration = {}
    for name in dict.fromkeys((*LOSS_TEXTS, *CALIBRATION_TEXTS)):
        ids = text_tokens(name, tokenizer)
        sizes = {
            "windows": (n_windows if name in LOSS_TEXTS else 0, window),
            "copies": (n_copies if name in LOSS_TEXTS else 0, copy),
            "calibration": (n_calibration if name in CALIBRATION_TEXTS else 0, window),
        }
        parts = _cut(ids, sizes, np.random.default_rng([seed, len(ids)]), name)
        if name in LOSS_TEXTS:
            windows.append(parts["windows"])
            copies.append(parts["copies"])
            unigram[name] = unigram_nats(parts["windows"], ids, len(tokenizer))
        if name in CALIBRATION_TEXTS:
            calibration[name] = parts["calibration"]
    of_domains = [
        domain_prompts(domain, tokenizer, n_prompts=n_windows, n_tokens=window, seed=seed + 2)
        for domain in NATURAL_DOMAINS
    ]
    return Texts(
        torch.cat(windows), torch.cat([calibration[name] for name in CALIBRATION_TEXTS]), torch.cat(copies),
        torch.cat(of_domains), unigram,
    )  # fmt: skip


def _cut(
    ids: Tensor, sizes: Mapping[str, tuple[int, int]], rng: np.random.Generator, name: str
) -> dict[str, Int[Tensor, "window token"]]:
    """Windows of several kinds, all at different places of a grid whose cells hold the longest of them."""
    cell = max(length for _, length in sizes.values())
    needed = sum(count for count, _ in sizes.values())
    if len(ids) // cell < needed:
        raise ValueError(
            f"the text {name!r} has {len(ids):,} tokens, too few for {needed} windows of {cell}: lower their number or length"
        )
    places = iter((rng.permutation(len(ids) // cell)[:needed] * cell).tolist())
    return {
        kind: torch.stack([ids[start : start + length] for start in [next(places) for _ in range(count)]])
        if count
        else ids.new_empty(0, length)
        for kind, (count, length) in sizes.items()
    }


def over_texts(values: NDArray[np.float64]) -> Estimate:
    """Mean over both texts with its 95 % interval; windows are drawn anew within each text.

    Args:
        values: (window,), those of books first, then as many of code.

    Example:
        >>> over_texts(np.array([1.0, 1.0, 3.0, 3.0]))
        Estimate(point=2.0, low=2.0, high=2.0)
    """
    return bootstrap(lambda *means: float(sum(means) / len(means)), *np.split(values, len(LOSS_TEXTS)), of_means=True)


def unigram_nats(windows: Int[Tensor, "window token"], ids: Int[Tensor, " all"], vocabulary: int) -> float:
    """Mean loss of an add-one unigram model on windows of a text, fitted on the rest of that text.

    Args:
        windows: of the text; their first tokens are given, not predicted.
        ids: the whole text.
        vocabulary: number of tokens that there are.

    Returns:
        Nats per token.

    Example:
        >>> unigram_nats(torch.tensor([[0, 1]]), torch.tensor([0, 1, 1, 1]), 2) == float(-np.log(3 / 4))  # 1 was seen twice, 0 never
        True
    """
    counts: NDArray[np.int64] = np.bincount(ids.numpy(), minlength=vocabulary)
    counts = counts - np.bincount(windows.flatten().numpy(), minlength=vocabulary)
    nats = -np.log((counts + 1) / (counts.sum() + vocabulary))
    return float(nats[windows[:, 1:].numpy()].mean())
