"""Which heads to take out: measures of every head, and arms of an experiment that are matched in number.

A head is named (layer, head) as in `surgery`; a measure is a mapping from every head of a model to a number.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from staterank_utils.architectures import state_size
from staterank_utils.models import check_ids, unwrapped
from staterank_utils.pruning import removed_heads
from staterank_utils.spectra import rank_and_norm
from staterank_utils.strata import share_outside
from staterank_utils.surgery import Head, all_heads
from staterank_utils.tracing import trace_states

SHARES = (1 / 48, 2 / 48, 0.05, 0.10, 0.125, 0.25, 0.389, 0.50)  # registered
PAPER_SHARE = 0.389

Measure = dict[Head, float]


def head_metrics(
    model: PreTrainedModel, input_ids: Int[Tensor, "prompt token"]
) -> dict[str, Float[Tensor, "layer head"]]:
    """Rank, norm, decay and write strength of every head, after the last token of some prompts.

    Args:
        model: any that `linear_layers` accepts.
        input_ids: prompts of equal length, on any device.

    Returns:
        "effective_rank", "nuclear_norm", "log_decay" (natural logarithm, mean over tokens) and "write_strength" -> means over prompts,
        float64.

    Raises:
        TypeError, ValueError: as in `trace_states`.

    Example:
        >>> import torch
        >>> from staterank_utils import load_model
        >>> metrics = head_metrics(load_model("hybrid"), torch.arange(64).reshape(1, 64))
        >>> list(metrics), metrics["effective_rank"].shape
        (['effective_rank', 'nuclear_norm', 'log_decay', 'write_strength'], torch.Size([9, 16]))
    """
    check_ids(unwrapped(model), input_ids)  # whose length is read before the trace checks them
    trace = trace_states(model, input_ids, positions=[input_ids.shape[1]], reduce=rank_and_norm)
    rank, norm = trace.values[:, :, 0].double().unbind(-1)
    tables = {
        "effective_rank": rank,
        "nuclear_norm": norm,
        "log_decay": trace.log_decay,
        "write_strength": trace.write_strength,
    }
    return {name: table.mean(1) for name, table in tables.items()}


def by_layer(metrics: Mapping[str, Float[Tensor, "layer head"]], d: int) -> list[dict[str, float]]:
    """What a table or a log says of a layer, from the numbers of its heads.

    Args:
        metrics: from `head_metrics`.
        d: largest rank that a state can have, from `state_size`.

    Returns:
        Per linear layer: "effective_rank" and "nuclear_norm", means over heads; "half_life", tokens, by the median of the heads' mean
        log-decays, infinite where that is 0; "share_outside", of the heads whose rank is not between 0.2 d and 0.8 d.

    Example:
        >>> import torch
        >>> from staterank_utils import load_model
        >>> metrics = head_metrics(load_model("hybrid"), torch.arange(64).reshape(1, 64))
        >>> list(by_layer(metrics, 64)[0])
        ['effective_rank', 'nuclear_norm', 'half_life', 'share_outside']
    """
    names = ("effective_rank", "nuclear_norm", "log_decay")
    layers = []
    for rank, norm, log_decay in zip(*(metrics[name].cpu() for name in names), strict=True):
        decay = log_decay.abs().quantile(0.5).item()
        layers.append(
            {
                "effective_rank": rank.mean().item(),
                "nuclear_norm": norm.mean().item(),
                "half_life": math.log(2) / decay if decay else math.inf,
                "share_outside": share_outside(rank.numpy() / d),
            }
        )
    return layers


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
        (['effective rank', 'nuclear norm', 'log-decay', 'write strength'], 144)
    """
    names = ("effective rank", "nuclear norm", "log-decay", "write strength")
    return {
        name: dict(zip(all_heads(model), table.flatten().tolist(), strict=True))
        for name, table in zip(names, head_metrics(model, prompts).values(), strict=True)
    }


def saturation_scores(
    ranks: Measure, norms: Measure, *, d: int, alpha: float = 0.5, maximum: Literal["model", "layer"] = "model"
) -> Measure:
    """How saturated each head is: s_h = alpha * rank_h / d + (1 - alpha) * norm_h / max_j norm_j.

    Source: arXiv:2602.02195, Eq. 14. The paper does not publish alpha, nor whether the maximum runs over a layer or the model;
    the registered reading is alpha = 0.5 and the model.

    Args:
        ranks: mean effective rank of each head, 0..d.
        norms: mean nuclear norm of each head, at least 0.
        d: largest possible rank, min(d_k, d_v).
        alpha: weight of the rank, 0..1.
        maximum: over which heads the largest norm is taken.

    Returns:
        head -> score, 0..1.

    Raises:
        ValueError: measures of different heads, a rank or norm out of its range, no norm over 0 to compare with, or alpha outside
            0..1.

    Example:
        >>> saturation_scores({(0, 0): 64.0, (1, 0): 16.0}, {(0, 0): 2.0, (1, 0): 1.0}, d=64)
        {(0, 0): 1.0, (1, 0): 0.375}
    """
    if not ranks or set(ranks) != set(norms):
        raise ValueError(
            f"ranks and norms must be of the same heads, got {len(ranks)} and {len(norms)} heads: measure one model"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in 0..1, got {alpha}")
    if maximum not in ("model", "layer"):
        raise ValueError(f"maximum must be 'model' or 'layer', got {maximum!r}")
    for head in ranks:
        if not 0 <= ranks[head] <= d or not 0 <= norms[head] < math.inf:
            raise ValueError(
                f"head {head} has rank {ranks[head]} and norm {norms[head]}: expected 0..{d} and a finite number of at least 0"
            )
    largest: dict[int, float] = {}
    for head, norm in norms.items():
        place = head[0] if maximum == "layer" else -1
        largest[place] = max(largest.get(place, 0.0), norm)
    if min(largest.values()) == 0:
        raise ValueError("all norms are 0: the states that were measured are empty")
    return {
        head: alpha * ranks[head] / d + (1 - alpha) * norms[head] / largest[head[0] if maximum == "layer" else -1]
        for head in ranks
    }


def measure_saturation(
    model: PreTrainedModel,
    prompts: Int[Tensor, "prompt token"],
    *,
    alpha: float = 0.5,
    maximum: Literal["model", "layer"] = "model",
) -> Measure:
    """`saturation_scores` of a model, measured on calibration prompts.

    Args:
        model: from `load_model`.
        prompts: calibration prompts of equal length.
        alpha, maximum: as in `saturation_scores`.

    Raises:
        ValueError: as in `measure_heads` and `saturation_scores`.

    Example:
        >>> import torch
        >>> from staterank_utils import load_model
        >>> scores = measure_saturation(load_model("hybrid"), torch.arange(64).reshape(1, 64))
        >>> len(scores), 0 <= min(scores.values()) <= max(scores.values()) <= 1
        (144, True)
    """
    measures = measure_heads(model, prompts)
    return saturation_scores(
        measures["effective rank"], measures["nuclear norm"], d=state_size(model), alpha=alpha, maximum=maximum
    )


def select_heads(
    scores: Measure, *, share: float = PAPER_SHARE, per_layer: bool = False, model: PreTrainedModel | None = None
) -> dict[int, list[int]]:
    """The heads with the highest scores, for `prune_heads`: Joint Rank-Norm Pruning where the scores are `saturation_scores`.

    All states of a model have the same size, so a share of heads is the same share of the recurrent state's bytes.

    Source: arXiv:2602.02195: heads of high rank are taken to be redundant, so the most saturated go first.

    Args:
        scores: head -> number; to take out the lowest, negate them.
        share: of all heads, or with `per_layer` of the heads of each layer, rounded to whole heads.
        per_layer: the same share in every layer.
        model: that is to be pruned, to make sure that the scores are of its heads.

    Returns:
        decoder layer -> heads, layers and heads in order; layers that lose none are left out.

    Raises:
        ValueError: no scores, one that is not finite, scores of other heads than the model has, or a share outside [0, 1).

    Example:
        >>> select_heads({(0, 0): 0.9, (0, 1): 0.1, (2, 0): 0.8, (2, 1): 0.2}, share=0.5)
        {0: [0], 2: [0]}
    """
    if not scores or not all(map(math.isfinite, scores.values())):
        raise ValueError(f"expected a finite score for every head, got {dict(list(scores.items())[:8])}")
    if model is not None and set(scores) != (own := set(all_heads(model))):
        gone = {(layer, head) for layer, of in removed_heads(model.config.get_text_config()).items() for head in of}
        of_the_whole = gone and set(scores) == own | gone
        raise ValueError(
            f"these are scores of the model before {len(gone)} heads were removed: give those of the heads that are left, "
            "{head: scores[head] for head in all_heads(model)}"
            if of_the_whole
            else f"these are scores of another model: of {len(scores)} heads, {len(own & set(scores))} of them among the {len(own)} that "
            "this model has; measure this one (measure_saturation)"
        )
    if not 0 <= share < 1:
        raise ValueError(f"the share of heads to remove lies in [0, 1), got {share}")
    layers = dict.fromkeys(layer for layer, _ in scores)
    groups = [[head for head in scores if head[0] == layer] for layer in layers] if per_layer else [list(scores)]
    chosen = sorted(
        head for group in groups for head in sorted(group, key=lambda head: -scores[head])[: round(share * len(group))]
    )
    return {
        layer: [head for index, head in chosen if index == layer]
        for layer in sorted(layers)
        if any(index == layer for index, _ in chosen)
    }


def head_pairs(of_layers: Mapping[int, Iterable[int]]) -> list[Head]:
    """Heads by layer, as `select_heads` gives them, as pairs, as `ablate_heads` takes them.

    Args:
        of_layers: decoder layer -> heads.

    Example:
        >>> head_pairs({0: [3], 2: [0, 1]})
        [(0, 3), (2, 0), (2, 1)]
    """
    return [(layer, head) for layer, heads in of_layers.items() for head in heads]


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
    """All heads as one group, or one group per layer; each has at least `n`."""
    layers: dict[int, list[Head]] = {}
    for head in heads:
        layers.setdefault(head[0], []).append(head)
    groups = list(layers.values()) if per_layer else [list(heads)]
    if n < 0 or any(n > len(group) for group in groups):
        raise ValueError(f"cannot choose {n} of {min(map(len, groups))} heads{' per layer' if per_layer else ''}")
    return groups
