"""Take heads out of a running model, and put them back.

Nothing here changes a weight: what a head puts out, writes or keeps is changed on its way, by hooks that the context manager
takes away again, so the model afterwards is the model before, bit for bit.

A head is named (layer, head): the index of the decoder layer and of the value head within it, both from zero, as they were
before any head was pruned.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from staterank_utils.architectures import SOFTMAX_PROJECTION, check_heads, linear_layers, softmax_layers
from staterank_utils.models import check_ids, make_cache, read_tokens, unwrapped
from staterank_utils.rebinding import eagerly
from staterank_utils.spectra import decompose

Head = tuple[int, int]
KINDS = ("zero", "mean", "frozen")


def all_heads(model: PreTrainedModel) -> list[Head]:
    """Every linear-attention head of a model, in order.

    Args:
        model: from `load_model`.

    Raises:
        ValueError: a model that `linear_layers` refuses.

    Example:
        >>> from staterank_utils import load_model
        >>> all_heads(load_model("hybrid"))[-2:]
        [(10, 14), (10, 15)]
    """
    return [(layer.index, head) for layer in linear_layers(model) for head in layer.heads]


@contextmanager
def ablate_heads(
    model: PreTrainedModel,
    heads: Iterable[Head],
    *,
    kind: str = "zero",
    means: Mapping[int, Float[Tensor, "head d_v"]] | None = None,
) -> Iterator[None]:
    """Run a model without some of its linear-attention heads, inside a `with` block.

    Source: the intervention of arXiv:2602.02195; which kind the paper used is not known.

    - "zero": what a head puts out, after its gated norm, is 0; before the norm, where one norm is over all heads of a layer.
      Its state goes on as before.
    - "mean": what it puts out is the same at every token, its mean over reference prompts (`mean_outputs`).
    - "frozen": it writes nothing (b_t = 0), so a state that starts at 0 stays 0. Where the norm behind a head is its own,
      as in gated delta layers, this gives the same logits as "zero". Enter the block before the prompt is read.

    Blocks nest; a head in two of them is ablated by both. They work around `forward`, `generate` and `trace_states`, with
    any batch and padding, and end with the block, also when it ends in an exception.

    Args:
        model: from `load_model`.
        heads: (layer, head) pairs; none is allowed and changes nothing.
        kind: "zero", "mean" or "frozen".
        means: for "mean" alone, layer -> (head, d_v).

    Raises:
        ValueError: a head that the model does not have or that is named twice, a layer without linear attention, an unknown
            kind, or means that are missing or not asked for.
        TypeError: a head that is not named by whole numbers.

    Example:
        >>> from staterank_utils import load_model
        >>> model, ids = load_model("hybrid"), torch.arange(32).reshape(1, 32)
        >>> before = model(ids).logits
        >>> with ablate_heads(model, [(0, 3), (5, 1)]):
        ...     without = model(ids).logits
        >>> torch.equal(model(ids).logits, before), torch.equal(without, before)
        (True, False)
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: choose from {', '.join(KINDS)}")
    if (kind == "mean") != (means is not None):
        raise ValueError(
            f"kind={kind!r} was given {'no ' if means is None else ''}means: 'mean' needs them, others do not"
        )
    by_layer = heads_by_layer(heads, all_heads(model), what="linear-attention")
    layers = {layer.index: layer for layer in linear_layers(model)}
    if means is not None and not set(by_layer) <= set(means):
        raise ValueError(
            f"means are missing for layers {sorted(set(by_layer) - set(means))}: make them with mean_outputs"
        )
    with ExitStack() as stack:
        for index, of_layer in by_layer.items():
            layer = layers[index]
            chosen = layer.places(of_layer)
            if kind == "frozen":
                handle = layer.stop_writes(chosen)
            else:
                if means is not None and len(means[index]) != layer.n_heads:
                    raise ValueError(
                        f"means of layer {index} are of {len(means[index])} heads, and it has {layer.n_heads}: make them of this "
                        "model with mean_outputs"
                    )
                put_out = means[index][chosen] if means is not None else torch.zeros(())
                handle = layer.output.register_forward_pre_hook(_replaced(layer.n_heads, chosen, put_out))
            stack.callback(handle.remove)
        stack.enter_context(noted(model, f"{kind}: {by_layer}{_digest_of(means)}"))
        yield


def _digest_of(means: Mapping[int, Tensor] | None) -> str:
    """What tells two tables of means apart, in a name."""
    if means is None:
        return ""
    total = hashlib.sha256()
    for layer, of_layer in sorted(means.items()):
        total.update(
            f"{layer} {tuple(of_layer.shape)};".encode()
            + of_layer.detach().float().cpu().contiguous().numpy().tobytes()
        )
    return f", means {total.hexdigest()[:12]}"


def ablations(model: PreTrainedModel) -> list[str]:
    """The ablations that a model is under, outermost first, as what is made of it says.

    Example:
        >>> from staterank_utils import load_model
        >>> model = load_model("hybrid")
        >>> with ablate_heads(model, [(0, 3)]):
        ...     ablations(model)
        ['zero: {0: [3]}']
    """
    return [note.text for note in _notes.get(linear_layers(model)[0].module, [])]


@contextmanager
def noted(model: PreTrainedModel, intervention: str) -> Iterator[None]:
    """A block in which `ablations` names an intervention, and the model is neither saved nor copied: its weights are not what it computes.

    Args:
        model: from `load_model`.
        intervention: as it is named.

    Raises:
        ValueError: when the model is saved inside the block.

    Example:
        >>> from staterank_utils import load_model
        >>> model = load_model("hybrid")
        >>> with noted(model, "zero: {0: [3]}"):
        ...     model.save_pretrained("folder")
        Traceback (most recent call last):
            ...
        ValueError: this model is under an intervention (zero: {0: [3]}) that changes no weight: leave its block before you save it
    """

    model = unwrapped(model)
    layer, note = linear_layers(model)[0].module, _Note(intervention)
    refused = {
        "save_pretrained": functools.partial(_refuse, model, "save it"),
        "__deepcopy__": functools.partial(_refuse, model, "copy it"),
    }
    with eagerly():
        notes = _notes.setdefault(layer, [])
        notes.append(note)
        for name, value in refused.items():
            vars(model).setdefault(name, value)
        try:
            yield
        finally:
            notes.remove(note)
            if not notes:
                for name in refused:
                    vars(model).pop(name, None)


@dataclass(eq=False)
class _Note:
    """One intervention; blocks may end in any order."""

    text: str


_notes: "WeakKeyDictionary[nn.Module, list[_Note]]" = (
    WeakKeyDictionary()
)  # first linear layer of a model -> what it is under


def _refuse(model: PreTrainedModel, action: str, *args: Any, **options: Any) -> None:
    check_no_intervention(model, action)


def check_no_intervention(model: PreTrainedModel, action: str) -> None:
    """Refuse what is about a model's weights while it computes something else.

    Args:
        model: from `load_model`.
        action: what is refused, for the message.

    Raises:
        ValueError: the model is under an intervention.

    Example:
        >>> from staterank_utils import load_model
        >>> check_no_intervention(load_model("hybrid"), "save it") is None
        True
    """
    if under := ablations(model):
        raise ValueError(
            f"this model is under an intervention ({'; '.join(under)}) that changes no weight: leave its block before you {action}"
        )


def softmax_heads(model: PreTrainedModel) -> list[Head]:
    """Every softmax-attention head of a hybrid model, in order; empty for a model that has none.

    Example:
        >>> from staterank_utils import load_model
        >>> softmax_heads(load_model("hybrid"))
        [(3, 0), (3, 1), (3, 2), (3, 3), (7, 0), (7, 1), (7, 2), (7, 3), (11, 0), (11, 1), (11, 2), (11, 3)]
    """
    return [(index, head) for index in softmax_layers(model) for head in range(_n_softmax_heads(model))]


@contextmanager
def ablate_softmax_heads(model: PreTrainedModel, heads: Iterable[Head]) -> Iterator[None]:
    """As `ablate_heads` with kind "zero", for heads of softmax layers, to see what those carry.

    Args:
        model: from `load_model`.
        heads: (layer, head) pairs of `softmax_heads`; none is allowed and changes nothing.

    Raises:
        ValueError: a head that the model does not have or that is named twice.

    Example:
        >>> from staterank_utils import load_model
        >>> model, ids = load_model("hybrid"), torch.arange(32).reshape(1, 32)
        >>> before = model(ids).logits
        >>> with ablate_softmax_heads(model, [(3, 0)]):
        ...     without = model(ids).logits
        >>> torch.equal(model(ids).logits, before), torch.equal(without, before)
        (True, False)
    """
    layers = softmax_layers(model)
    by_layer = heads_by_layer(heads, softmax_heads(model), what="softmax")
    with ExitStack() as stack:
        for index, chosen in by_layer.items():
            hook = _replaced(_n_softmax_heads(model), chosen, torch.zeros(()))
            stack.callback(layers[index].get_submodule(SOFTMAX_PROJECTION).register_forward_pre_hook(hook).remove)
        stack.enter_context(noted(model, f"softmax: {by_layer}"))
        yield


@torch.no_grad()
def mean_outputs(
    model: PreTrainedModel, input_ids: Int[Tensor, "batch token"], *, batch_size: int = 1
) -> dict[int, Float[Tensor, "head d_v"]]:
    """What each linear-attention head puts out on average over all tokens of reference prompts, for `ablate_heads`.

    Args:
        model: from `load_model`.
        input_ids: prompts of equal length.
        batch_size: prompts read side by side.

    Returns:
        layer -> (head, d_v), float32, on the model's device.

    Example:
        >>> from staterank_utils import load_model
        >>> mean_outputs(load_model("hybrid"), torch.arange(32).reshape(1, 32))[0].shape
        torch.Size([16, 64])
    """
    check_ids(model, input_ids)
    sums: dict[int, Tensor] = {}

    def add(index: int, n_heads: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            total = inputs[0].double().sum((0, 1)).unflatten(0, (n_heads, -1))
            sums[index] = sums.get(index, torch.zeros_like(total)) + total

        return hook

    with ExitStack() as stack:
        for layer in linear_layers(model):
            stack.callback(layer.output.register_forward_pre_hook(add(layer.index, layer.n_heads)).remove)
        for batch in input_ids.split(batch_size):
            read_tokens(model, batch.to(model.device))
    return {index: (total / input_ids.numel()).float() for index, total in sums.items()}


# ---------------------------------------------------------------- states


@torch.no_grad()
def forward_with_edits(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch token"],
    *,
    heads: Iterable[Head],
    edit: Callable[[Float[Tensor, "batch head d_k d_v"]], Float[Tensor, "batch head d_k d_v"]],
    every: int = 64,
) -> Float[Tensor, "batch token d_model"]:
    """Read prompts in segments and change the states of some heads at each border: is the rank that is there also used?

    Args:
        model: from `load_model`.
        input_ids: prompts of equal length.
        heads: (layer, head) pairs.
        edit: makes new states of old ones, such as `best_rank` or `rotated`.
        every: tokens between two edits, at least 1. The last segment is not followed by an edit.

    Returns:
        Hidden states before the output embedding, for every token.

    Raises:
        ValueError: as in `ablate_heads`, `every` under 1, or an edit that changes the shape.

    Example:
        >>> from staterank_utils import load_model
        >>> model, ids = load_model("hybrid"), torch.arange(96).reshape(1, 96)
        >>> forward_with_edits(model, ids, heads=[(0, 3)], edit=lambda state: best_rank(state, 1)).shape
        torch.Size([1, 96, 256])
    """
    check_ids(model, input_ids)
    if every < 1:
        raise ValueError(f"every must be at least 1 token, got {every}")
    by_layer = heads_by_layer(heads, all_heads(model), what="linear-attention")
    layers = {layer.index: layer for layer in linear_layers(model)}
    places = {index: layers[index].places(of_layer) for index, of_layer in by_layer.items()}
    input_ids = input_ids.to(model.device)
    order = torch.arange(input_ids.shape[1], device=model.device)[None]
    cache, hidden = make_cache(model), []
    for segment, positions in zip(input_ids.split(every, 1), order.split(every, 1), strict=True):
        hidden.append(read_tokens(model, segment, positions=positions, cache=cache))
        for index, chosen in places.items():
            state = layers[index].state(cache)
            edited = edit(state[:, chosen])
            if edited.shape != state[:, chosen].shape:
                raise ValueError(f"the edit made {tuple(edited.shape)} of states {tuple(state[:, chosen].shape)}")
            layers[index].set_state(cache, chosen, edited.to(state))
    return torch.cat(hidden, 1)


def best_rank(state: Float[Tensor, "*lead d_k d_v"], rank: int) -> Float[Tensor, "*lead d_k d_v"]:
    """The nearest states of a given rank: the largest singular values stay, the others become 0 (Eckart and Young, 1936).

    Args:
        state: any real floating dtype; computed in float64.
        rank: at least 0; from min(d_k, d_v) on, the state is returned as it is.

    Raises:
        ValueError: a negative rank.

    Example:
        >>> best_rank(torch.diag(torch.tensor([3.0, 1.0])), 1).round().tolist()
        [[3.0, 0.0], [0.0, 0.0]]
    """
    if rank < 0:
        raise ValueError(f"rank must be at least 0, got {rank}")
    if rank >= min(state.shape[-2:]):
        return state
    u, sigma, vh = decompose(state)
    return ((u[..., :rank] * sigma[..., None, :rank]) @ vh[..., :rank, :]).to(state)


def rotated(state: Float[Tensor, "*lead d_k d_v"], *, seed: int) -> Float[Tensor, "*lead d_k d_v"]:
    """States with the same singular values and random singular vectors: one rotation of keys and one of values for each head.

    Args:
        state: (..., head, d_k, d_v); all leading indices before the head share its rotations.
        seed: of the rotations.

    Example:
        >>> turned = rotated(torch.diag(torch.tensor([3.0, 1.0]))[None], seed=0)
        >>> torch.linalg.svdvals(turned)[0].round(decimals=4).tolist()
        [3.0, 1.0]
    """
    generator = torch.Generator().manual_seed(seed)
    n_heads, (d_k, d_v) = state.shape[-3], state.shape[-2:]
    left, right = (
        torch.linalg.qr(torch.randn(n_heads, d, d, generator=generator, dtype=torch.float64))[0].to(state.device)
        for d in (d_k, d_v)
    )
    return (left @ state.double() @ right).to(state)


# ---------------------------------------------------------------- inside


def heads_by_layer(heads: Iterable[Head], known: Iterable[Head], *, what: str) -> dict[int, list[int]]:
    """(layer, head) pairs as layer -> heads; refuses what is unknown or repeated.

    Args:
        heads: pairs.
        known: those that there are.
        what: kind of heads, for the messages.

    Raises:
        TypeError, ValueError: as in `architectures.check_heads`.

    Example:
        >>> heads_by_layer([(0, 3), (2, 1), (0, 1)], [(0, 1), (0, 3), (2, 1)], what="linear-attention")
        {0: [3, 1], 2: [1]}
    """
    grouped: list[dict[int, list[int]]] = []
    for pairs in (heads, known):
        grouped.append({})
        try:
            if isinstance(pairs, Mapping):
                raise TypeError
            for layer, head in pairs:
                grouped[-1].setdefault(layer, []).append(head)
        except (TypeError, ValueError):
            raise TypeError(f"expected (layer, head) pairs, such as [(0, 3), (5, 1)], got {pairs!r}") from None
    return check_heads(*grouped, what=what)


def _n_softmax_heads(model: PreTrainedModel) -> int:
    n_heads: int = model.config.get_text_config().num_attention_heads
    return n_heads


def _replaced(n_heads: int, heads: list[int], put_out: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], Any]:
    """A hook before an output projection that puts `put_out` in the place of what some heads put out."""
    kept = torch.ones(n_heads, 1, dtype=torch.bool)
    kept[heads] = False

    @functools.cache
    def on(device: torch.device, dtype: torch.dtype, width: int) -> tuple[Tensor, Tensor]:
        """Which numbers stay, and what stands in the place of the others; moved once, so that a graph can be captured."""
        replacement = torch.zeros(n_heads, width, dtype=dtype)
        replacement[heads] = put_out.to(replacement)
        return kept.expand(-1, width).flatten().to(device), replacement.flatten().to(device)

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        # One pass over the activations, whatever the number of heads.
        mask, replacement = on(x.device, x.dtype, x.shape[-1] // n_heads)
        return (torch.where(mask, x, replacement), *inputs[1:])

    return hook
