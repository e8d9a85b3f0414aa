"""What a smaller state frees and costs: whole heads by the saturation score, key channels, or both."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from staterank_utils.architectures import cache_bytes, state_size
from staterank_utils.channels import keep_channels, order_channels, why_not
from staterank_utils.evaluation import token_nats
from staterank_utils.models import make_cache, read_tokens
from staterank_utils.pruning import duplicated_bytes, prune_heads
from staterank_utils.selection import PAPER_SHARE, Measure, head_pairs, measure_heads, saturation_scores, select_heads
from staterank_utils.studies.texts import Texts
from staterank_utils.surgery import Head, ablate_heads, all_heads

WHOLE, JOINT, RANK, CHANNELS, BOTH = "whole", "joint", "rank alone", "key channels", "both"
LONG = 32768  # tokens


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model and of its cache behind a prompt.

    Attributes:
        recurrent, convolution: of the linear layers, at any length.
        softmax, softmax_long: keys and values at 1,024 and at 32,768 tokens.
        parameters: of the weights.
        duplicated: of these, copies of key heads that removal made.

    Example:
        >>> from staterank_utils import load_model
        >>> footprint(load_model("pure")).recurrent  # 192 heads of 64 x 64 in float32
        3145728
    """

    recurrent: int
    convolution: int
    softmax: int
    softmax_long: int
    parameters: int
    duplicated: int


def footprint(model: PreTrainedModel) -> Footprint:
    """Measure the tensors of a cache after 512 and after 1,024 tokens; keys and values grow by the same bytes per token.

    Args:
        model: whole or pruned.

    Example:
        >>> from staterank_utils import load_model
        >>> footprint(load_model("pure")).softmax
        0
    """
    cache, behind = make_cache(model), []
    with torch.inference_mode():
        for _ in range(2):
            read_tokens(model, torch.ones(1, 512, dtype=torch.long, device=model.device), cache=cache)
            behind.append(cache_bytes(cache))
    half, full = behind
    long = full["softmax"] + (full["softmax"] - half["softmax"]) * (LONG - 1024) // 512
    weights = sum(p.nbytes for p in model.parameters())
    return Footprint(full["recurrent"], full["convolution"], full["softmax"], long, weights, duplicated_bytes(model))


@dataclass(frozen=True)
class Shrinking:
    """Added nats and bytes of every method.

    Attributes:
        heads: (layer, head) of each index.
        d: largest possible rank.
        rank, norm: of each head on the calibration prompts, (head,).
        removed: the heads that the joint score removes at the paper's share.
        footprints: method -> bytes, at the paper's share; "whole" for the model as it is.
        added: method -> share -> added nats on held-out text, (window,), books first.
        readings: (maximum over, share of, alpha) -> added nats at the paper's share, (window,).
        difference, logit: largest difference between a logit of the removed and of the ablated model, and the largest logit.
        refused: why key channels cannot be cut from this model, or None.

    Example:
        >>> Shrinking.__dataclass_fields__["refused"].type
        str | None
    """

    heads: tuple[Head, ...]
    d: int
    rank: NDArray[np.float64]
    norm: NDArray[np.float64]
    removed: tuple[Head, ...]
    footprints: Mapping[str, Footprint]
    added: Mapping[str, Mapping[float, NDArray[np.float64]]]
    readings: Mapping[tuple[str, str, float], NDArray[np.float64]]
    difference: float
    logit: float
    refused: str | None

    def freed(self, method: str) -> float:
        """Share of the recurrent state's bytes that a method frees."""
        return 1 - self.footprints[method].recurrent / self.footprints[WHOLE].recurrent


def smaller_models(
    model: PreTrainedModel, prompts: Int[Tensor, "prompt token"], rank: Measure, norm: Measure
) -> dict[str, Callable[[float], PreTrainedModel]]:
    """The ways to make the state of a model smaller, each a function of the share that goes.

    Args:
        model: whole.
        prompts: of calibration, by whose keys channels are ordered.
        rank, norm: of every head, by which heads are ordered.

    Returns:
        method -> function; those that cut key channels are left out where the model refuses it (`channels.why_not`).

    Example:
        >>> from staterank_utils import load_model
        >>> model, prompts = load_model("hybrid"), torch.arange(64).reshape(1, 64)
        >>> measures = measure_heads(model, prompts)
        >>> list(smaller_models(model, prompts, measures["effective rank"], measures["nuclear norm"]))
        ['joint', 'rank alone', 'key channels', 'both']
    """

    def by_score(alpha: float) -> Callable[[float], PreTrainedModel]:
        scores = saturation_scores(rank, norm, d=state_size(model), alpha=alpha)
        return lambda share: prune_heads(model, select_heads(scores, share=share))

    made = {JOINT: by_score(0.5), RANK: by_score(1.0)}
    if why_not(model):
        return made
    channels = order_channels(model, prompts)

    def both(share: float) -> PreTrainedModel:
        part = 1 - (1 - share) ** 0.5
        return keep_channels(made[JOINT](part), channels, share=part)

    return made | {CHANNELS: lambda share: keep_channels(model, channels, share=share), BOTH: both}


def measure_shrinking(
    model: PreTrainedModel,
    texts: Texts,
    prompts: Int[Tensor, "prompt token"],
    *,
    shares: Sequence[float] = (0.125, 0.25, PAPER_SHARE),
    alphas: Sequence[float] = (0.0, 0.5, 1.0),
    per_layer: Sequence[bool] = (False,),
) -> Shrinking:
    """Shrink a model by every method and share, and measure what that frees and costs.

    Heads are removed by the saturation score (Eq. 14) with alpha 0.5 and the maximum over the model; by rank alone, alpha 1. Key channels
    are those that a rank-revealing QR decomposition of the keys keeps (Nazari and Rusch, arXiv:2602.04852). "Both" takes the same part
    from heads and from channels, so that the product of what stays is the same.

    Args:
        model: whole.
        texts: on which losses are taken.
        prompts: of calibration.
        shares: of the state, which are removed.
        alphas, per_layer: readings of Eq. 14 at the paper's share: its weight, and whether the share is of every layer.

    Example:
        >>> from staterank_utils import domain_prompts, load_model, load_tokenizer
        >>> from staterank_utils.studies.texts import draw_texts
        >>> model, tokenizer = load_model("hybrid"), load_tokenizer("hybrid")
        >>> texts = draw_texts(tokenizer, n_windows=1, window=64, n_copies=1, copy=32, n_calibration=1)
        >>> prompts = domain_prompts("code", tokenizer, n_prompts=1, n_tokens=64, seed=0)
        >>> found = measure_shrinking(model, texts, prompts, shares=[0.25], alphas=[0.5])
        >>> list(found.added), round(found.freed("joint"), 3), found.difference < 1e-4
        (['joint', 'rank alone', 'key channels', 'both'], 0.389, True)
    """
    heads, d = tuple(all_heads(model)), state_size(model)
    measures = measure_heads(model, prompts)
    rank, norm = measures["effective rank"], measures["nuclear norm"]
    refused = why_not(model)
    made = smaller_models(model, prompts, rank, norm)

    def removed(share: float, scores: Measure, **options: bool) -> dict[int, list[int]]:
        return select_heads(scores, share=share, **options)

    joint = saturation_scores(rank, norm, d=d)
    intact = token_nats(model, texts.windows).mean(1)

    def added(smaller: PreTrainedModel) -> NDArray[np.float64]:
        return np.asarray(token_nats(smaller, texts.windows).mean(1) - intact)

    gone, ids = removed(PAPER_SHARE, joint), prompts[:1].to(model.device)
    with torch.inference_mode(), ablate_heads(model, head_pairs(gone)):
        masked = model(ids, use_cache=False).logits
    footprints, costs, difference = {WHOLE: footprint(model)}, {}, 0.0
    for method, make in made.items():
        smaller = make(PAPER_SHARE)
        footprints[method] = footprint(smaller)
        costs[method] = {share: added(smaller if share == PAPER_SHARE else make(share)) for share in shares}
        if method == JOINT:
            with torch.inference_mode():
                difference = float((smaller(ids, use_cache=False).logits - masked).abs().max())
    readings: dict[tuple[str, str, float], NDArray[np.float64]] = {}
    maxima: tuple[Literal["model", "layer"], ...] = ("model", "layer")
    for maximum, layers, alpha in product(maxima, per_layer, alphas):
        scores = saturation_scores(rank, norm, d=d, alpha=alpha, maximum=maximum)
        with ablate_heads(model, head_pairs(removed(PAPER_SHARE, scores, per_layer=layers))):
            readings[maximum, "every layer" if layers else "the model", alpha] = added(model)
    return Shrinking(
        heads, d, np.array([rank[head] for head in heads]), np.array([norm[head] for head in heads]), tuple(head_pairs(gone)),
        footprints, costs, readings, difference, float(masked.abs().max()), refused,
    )  # fmt: skip
