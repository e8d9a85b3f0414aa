"""What a smaller state frees and costs: whole heads by the saturation score, key channels, or both."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from staterank_utils.architectures import cache_bytes, state_size
from staterank_utils.channels import Channels, keep_channels, order_channels, why_not
from staterank_utils.evaluation import token_nats
from staterank_utils.models import CHECKPOINTS, EMBEDDED, make_cache, read_tokens
from staterank_utils.pruning import duplicated_bytes, prune_heads
from staterank_utils.results import STORED, plain, weights_hash, write_json
from staterank_utils.selection import PAPER_SHARE, Measure, head_pairs, measure_heads, saturation_scores, select_heads
from staterank_utils.strata import Estimate
from staterank_utils.studies.repeated import CLOSE, Repeated
from staterank_utils.studies.texts import LOSS_TEXTS, Texts, over_texts
from staterank_utils.surgery import Head, ablate_heads, all_heads

WHOLE, JOINT, RANK, CHANNELS, BOTH = "whole", "joint", "rank alone", "key channels", "both"
LONG = 32768  # tokens
FILE = STORED / "shrinking.json"


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
        channels: layer -> key head -> its key channels, those first that stay longest; empty where they cannot be cut.
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
    channels: Channels
    footprints: Mapping[str, Footprint]
    added: Mapping[str, Mapping[float, NDArray[np.float64]]]
    readings: Mapping[tuple[str, str, float], NDArray[np.float64]]
    difference: float
    logit: float
    refused: str | None

    def freed(self, method: str) -> float:
        """Share of the recurrent state's bytes that a method frees."""
        return 1 - self.footprints[method].recurrent / self.footprints[WHOLE].recurrent

    def costs(self) -> dict[str, dict[float, Estimate]]:
        """Method -> share -> added nats per token, with 95 % intervals over windows."""
        return {method: {share: over_texts(nats) for share, nats in of.items()} for method, of in self.added.items()}


def smaller_models(
    model: PreTrainedModel, rank: Measure, norm: Measure, channels: Channels
) -> dict[str, Callable[[float], PreTrainedModel]]:
    """The ways to make the state of a model smaller, each a function of the share that goes.

    Args:
        model: whole.
        rank, norm: of every head, by which heads are ordered.
        channels: from `ordered_channels`.

    Returns:
        method -> function; those that cut key channels are left out where there is no order of them.

    Example:
        >>> from staterank_utils import load_model
        >>> model, prompts = load_model("hybrid"), torch.arange(64).reshape(1, 64)
        >>> measures = measure_heads(model, prompts)
        >>> list(smaller_models(model, measures["effective rank"], measures["nuclear norm"], ordered_channels(model, prompts)))
        ['joint', 'rank alone', 'key channels', 'both']
    """

    def by_score(alpha: float) -> Callable[[float], PreTrainedModel]:
        scores = saturation_scores(rank, norm, d=state_size(model), alpha=alpha)
        return lambda share: prune_heads(model, select_heads(scores, share=share))

    made = {JOINT: by_score(0.5), RANK: by_score(1.0)}
    if not channels:
        return made

    def both(share: float) -> PreTrainedModel:
        part = 1 - (1 - share) ** 0.5
        return keep_channels(made[JOINT](part), channels, share=part)

    return made | {CHANNELS: lambda share: keep_channels(model, channels, share=share), BOTH: both}


def ordered_channels(model: PreTrainedModel, prompts: Int[Tensor, "prompt token"]) -> Channels:
    """The order in which key channels stay, by the keys of some prompts; empty where the model refuses it (`channels.why_not`).

    Args:
        model: whole.
        prompts: of calibration.

    Raises:
        ValueError: as in `order_channels`.

    Example:
        >>> from staterank_utils import load_model
        >>> len(ordered_channels(load_model("hybrid"), torch.arange(64).reshape(1, 64)))
        9
    """
    return {} if why_not(model) else order_channels(model, prompts)


def measure_shrinking(
    model: PreTrainedModel,
    texts: Texts,
    prompts: Int[Tensor, "prompt token"],
    *,
    shares: Sequence[float] = (0.125, 0.25, PAPER_SHARE),
    alphas: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    per_layer: Sequence[bool] = (False, True),
    ordered: Shrinking | None = None,
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
        ordered: of the same weights; its ranks, norms and channels then decide what goes, and no head is measured.

    Example:
        >>> from staterank_utils import domain_prompts, load_model, load_tokenizer
        >>> from staterank_utils.studies.texts import draw_texts
        >>> model, tokenizer = load_model("hybrid"), load_tokenizer("hybrid")
        >>> texts = draw_texts(tokenizer, n_windows=1, window=64, n_copies=1, copy=32, n_calibration=1)
        >>> prompts = domain_prompts("code", tokenizer, n_prompts=1, n_tokens=64, seed=0)
        >>> found = measure_shrinking(model, texts, prompts, shares=[0.25], alphas=[0.5], per_layer=[False])
        >>> list(found.added), round(found.freed("joint"), 3), found.difference < 1e-4
        (['joint', 'rank alone', 'key channels', 'both'], 0.389, True)
    """
    heads, d = tuple(all_heads(model)), state_size(model)
    if ordered:
        rank, norm = (dict(zip(heads, of.tolist(), strict=True)) for of in (ordered.rank, ordered.norm))
        channels = ordered.channels
    else:
        measures = measure_heads(model, prompts)
        rank, norm = dict(measures["effective rank"]), dict(measures["nuclear norm"])
        channels = ordered_channels(model, prompts)
    made = smaller_models(model, rank, norm, channels)

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
        channels, footprints, costs, readings, difference, float(masked.abs().max()), why_not(model),
    )  # fmt: skip


# ---------------------------------------------------------------- stored


def store_shrinking(found: Mapping[str, Shrinking], *, made: Mapping[str, Any], file: Path = FILE) -> None:
    """Write what was measured of some models, whole or not at all.

    Args:
        found: embedded name -> what was measured.
        made: provenance, which names the weights.
        file: a JSON file.

    Example:
        >>> FILE.name
        'shrinking.json'
    """
    models = {}
    for name, of in found.items():
        readings = [[*reading, nats] for reading, nats in of.readings.items()]
        models[name] = plain({**asdict(of), "readings": readings}, digits=9)
    write_json(file, {"provenance": dict(made), "models": models})


def load_shrinking(name: str, file: Path = FILE) -> tuple[Shrinking, dict[str, Any]] | None:
    """What is stored of an embedded model's very weights, and its provenance; None where nothing is.

    Args:
        name: of the model.
        file: from `store_shrinking`.

    Example:
        >>> load_shrinking("OWNER/NAME") is None
        True
    """
    if name not in EMBEDDED:
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["provenance"]["checkpoints"].get(name) != weights_hash(CHECKPOINTS / name):
        return None
    of = content["models"][name]
    parsed = {
        "heads": tuple(map(tuple, of["heads"])),
        "removed": tuple(map(tuple, of["removed"])),
        "rank": np.array(of["rank"]),
        "norm": np.array(of["norm"]),
        "channels": {
            int(layer): {int(key): order for key, order in keys.items()} for layer, keys in of["channels"].items()
        },
        "footprints": {method: Footprint(**sizes) for method, sizes in of["footprints"].items()},
        "added": {
            method: {float(share): np.array(nats) for share, nats in shares.items()}
            for method, shares in of["added"].items()
        },
        "readings": {(maximum, per, alpha): np.array(nats) for maximum, per, alpha, nats in of["readings"]},
    }
    made: dict[str, Any] = content["provenance"]
    return Shrinking(**{**of, **parsed}), made


class RepeatedShrinking(Repeated[Shrinking]):
    """The smaller states of a model, stored and measured again.

    Example:
        >>> RepeatedShrinking.__mro__[1].__name__
        'Repeated'
    """

    def difference(self) -> float:
        """The largest difference of added nats from the stored ones on the same windows of books, nats per token."""
        pairs = [
            (nats, self.shown.added[method][share])
            for method, of in self.live.added.items()
            for share, nats in of.items()
        ]
        pairs += [(nats, self.shown.readings[reading]) for reading, nats in self.live.readings.items()]
        n_windows = len(pairs[0][0]) // len(LOSS_TEXTS)
        return float(max(np.abs(live[:n_windows] - shown[:n_windows]).max() for live, shown in pairs))

    def again(self) -> dict[str, dict[float, float]] | None:
        """Method -> share -> added nats of this run; None where the shown ones are of this run."""
        costs = self.live.costs()
        return (
            {m: {share: of.point for share, of in shares.items()} for m, shares in costs.items()} if self.made else None
        )

    def source(self, name: str) -> str:
        """Where the shown numbers come from, in words."""
        shown, live = (len(next(iter(of.readings.values()))) // len(LOSS_TEXTS) for of in (self.shown, self.live))
        if self.made is None:
            return f"{name}: this run, windows per text: {live}."
        n_arms = sum(map(len, self.live.added.values())) + len(self.live.readings)
        return (
            f"{name}: stored on {self.made['date'][:10]} ({self.made['device']}, commit {self.made['commit'][:7]}), windows per text: {shown}. This run "
            f"repeated {n_arms} of the removals on {live}: no number on books differs by more than {self.difference():.0e} nats per token."
        )


def repeat_shrinking(
    name: str,
    model: PreTrainedModel,
    texts: Texts,
    prompts: Int[Tensor, "prompt token"],
    *,
    quick: bool,
    seed: int = 0,
) -> RepeatedShrinking:
    """Shrink a model beside what is stored of its weights: by every method at the paper's share alone in the quick profile.

    Heads and channels that go are then those of the stored run.

    Args:
        name: as it was given to `load_model`.
        model, texts, prompts: as in `measure_shrinking`.
        quick: at the paper's share alone, and of stored models one setting of the score.
        seed: of the texts; what is stored is of seed 0.

    Raises:
        ValueError: as in `measure_shrinking`, or numbers that are not the stored ones of the same windows and heads.

    Example:
        >>> import inspect
        >>> list(inspect.signature(repeat_shrinking).parameters)[:3]
        ['name', 'model', 'texts']
    """
    stored = None if seed else load_shrinking(name)
    few: dict[str, Any] = {"shares": (PAPER_SHARE,)} if quick else {}
    if stored is None:
        live = measure_shrinking(model, texts, prompts, **few)
        return RepeatedShrinking(live, live, "?", None)
    few |= {"alphas": (0.5,), "per_layer": (False,)} if quick else {}
    found = RepeatedShrinking(
        stored[0], measure_shrinking(model, texts, prompts, ordered=stored[0], **few), "?", stored[1]
    )
    if not (difference := found.difference()) <= CLOSE:
        raise ValueError(
            f"numbers of {name} with smaller states differ by {difference} nats per token from those stored, expected at most {CLOSE}"
        )
    return found
