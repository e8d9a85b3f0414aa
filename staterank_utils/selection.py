"""Which heads to take out: measures of every head, and arms of an experiment that are matched in number.

A head is named (layer, head) as in `surgery`; a measure is a mapping from every head of a model to a number.
"""

import random
from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from staterank_utils.spectra import Spectrum, singular_values
from staterank_utils.surgery import Head
from staterank_utils.tracing import trace_states

SHARES = (1 / 48, 2 / 48, 0.05, 0.10, 0.125, 0.25, 0.389, 0.50)  # registered
PAPER_SHARE = 0.389

Measure = dict[Head, float]


def measure_heads(model: PreTrainedModel, prompts: Int[Tensor, "prompt token"]) -> dict[str, Measure]:
    """Effective rank, nuclear norm, mean log-decay and mean write strength of every head, means over prompts.

    Args:
        model: from `load_model`.
        prompts: calibration prompts of equal length; rank and norm are those at their last token.

    Returns:
        name -> measure: "effective rank" (0..d), "nuclear norm" (unit of the state), "log-decay" (natural logarithm, at most
        0), "write strength" (0..1).

    Raises:
        ValueError: as in `trace_states`.

    Example:
        >>> import torch
        >>> from staterank_utils import load_model
        >>> measures = measure_heads(load_model("hybrid"), torch.arange(64).reshape(1, 64))
        >>> list(measures), len(measures["effective rank"])
        (['effective rank', 'nuclear norm', 'log-decay', 'write strength'], 48)
    """
    trace = trace_states(model, prompts, positions=[prompts.shape[1]], reduce=singular_values)
    spectrum = Spectrum(trace.values[:, :, 0])
    tables = {
        "effective rank": spectrum.effective_rank().double(),
        "nuclear norm": spectrum.nuclear_norm(),
        "log-decay": trace.log_decay,
        "write strength": trace.write_strength,
    }
    return {
        name: {
            (layer, head): value
            for layer, row in zip(trace.layers, table.mean(1).tolist(), strict=True)
            for head, value in enumerate(row)
        }
        for name, table in tables.items()
    }


def head_counts(n_heads: int, shares: Sequence[float] = SHARES) -> list[int]:
    """Numbers of heads for shares, rounded, at least 1, each once, increasing.

    Args:
        n_heads: of the model.
        shares: of its heads; the registered ones by default.

    Raises:
        ValueError: a share outside (0, 1).

    Example:
        >>> head_counts(48)
        [1, 2, 5, 6, 12, 19, 24]
    """
    if not all(0 < share < 1 for share in shares):
        raise ValueError(f"a share of heads lies in (0, 1), got {list(shares)}")
    return sorted({max(1, round(share * n_heads)) for share in shares})


def extreme_heads(measure: Measure, n: int, *, largest: bool, per_layer: bool = False) -> list[Head]:
    """The `n` heads with the smallest or the largest value; of equal ones the first.

    Args:
        measure: head -> number.
        n: how many; with `per_layer`, how many in every layer.
        largest: which end.
        per_layer: the same number in every layer.

    Raises:
        ValueError: more heads than there are, or fewer than 0.

    Example:
        >>> extreme_heads({(0, 0): 3.0, (0, 1): 1.0, (1, 0): 2.0}, 2, largest=False)
        [(0, 1), (1, 0)]
    """
    return [
        head
        for group in _groups(list(measure), n, per_layer)
        for head in sorted(group, key=lambda head: -measure[head] if largest else measure[head])[:n]
    ]


def random_heads(heads: Sequence[Head], n: int, *, seed: int, per_layer: bool = False) -> list[Head]:
    """`n` heads drawn without replacement, or `n` in every layer.

    Args:
        heads: to draw from.
        n: how many; with `per_layer`, how many in every layer.
        seed: of the draw.
        per_layer: the same number in every layer.

    Raises:
        ValueError: more heads than there are, or fewer than 0.

    Example:
        >>> len(set(random_heads([(0, 0), (0, 1), (1, 0), (1, 1)], 1, seed=0, per_layer=True)))
        2
    """
    rng = random.Random(f"heads {seed}")
    return [head for group in _groups(heads, n, per_layer) for head in rng.sample(group, n)]


def _groups(heads: Sequence[Head], n: int, per_layer: bool) -> list[list[Head]]:
    """All heads as one group, or one group a layer; each has at least `n`."""
    layers: dict[int, list[Head]] = {}
    for head in heads:
        layers.setdefault(head[0], []).append(head)
    groups = list(layers.values()) if per_layer else [list(heads)]
    if n < 0 or any(n > len(group) for group in groups):
        raise ValueError(f"cannot choose {n} of {min(map(len, groups))} heads{' a layer' if per_layer else ''}")
    return groups
