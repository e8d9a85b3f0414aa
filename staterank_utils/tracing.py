"""From a prompt to the states S(t) of every linear-attention head, at chosen tokens, in one pass."""

import itertools
import operator
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from staterank_utils.layouts import Layout, linear_layers
from staterank_utils.models import make_cache


@dataclass(frozen=True)
class StateTrace:
    """What `trace_states` saw.

    Attributes:
        values: (layer, batch, position, head, d_k, d_v), float32 states on the CPU; or, with `reduce`, what it made of the
            last two axes.
        positions: numbers of tokens read, t, one for each index of the position axis.
        layers: index in the model of each linear-attention layer.
        d_k, d_v: size of a state.
        log_decay: (layer, batch, head), natural logarithm of the decay a_t, mean over all tokens read, float64.
        write_strength: (layer, batch, head), b_t in [0, 1], mean over all tokens read, float64.
        logits: (batch, position, vocabulary) after each of the positions, if they were asked for.

    Example:
        >>> from staterank_utils import load_model
        >>> trace = trace_states(load_model("hybrid"), torch.arange(8).reshape(1, 8), positions=[4, 8])
        >>> trace.values.shape, trace.layers, trace.d
        (torch.Size([6, 1, 2, 8, 64, 64]), (0, 1, 2, 4, 5, 6), 64)
    """

    values: Tensor
    positions: tuple[int, ...]
    layers: tuple[int, ...]
    d_k: int
    d_v: int
    log_decay: Float[Tensor, "layer batch head"]
    write_strength: Float[Tensor, "layer batch head"]
    logits: Float[Tensor, "batch position vocabulary"] | None = None

    @property
    def d(self) -> int:
        """Largest rank that a state can have, min(d_k, d_v)."""
        return min(self.d_k, self.d_v)


def trace_states(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch token"],
    *,
    positions: Sequence[int],
    reduce: Callable[[Tensor], Tensor] | None = None,
    logits: bool = False,
    batch_size: int | None = None,
) -> StateTrace:
    """Read prompts once, up to the last position, and keep S(t) of every linear-attention head at each position.

    A prompt is read in segments that end at the positions, through the model's cache; every segment continues from the
    states that the one before it left. That is the same computation as one full pass, up to the order of float32 sums.

    Source: S(t) as in arXiv:2602.02195; which states a layer keeps, `staterank_utils.layouts`.

    Args:
        model: from `load_model`.
        input_ids: prompts of equal length, int64 or int32, on any device.
        positions: numbers of tokens t after which to look, increasing, in 1..token.
        reduce: applied at once to each layer's states (batch, head, d_k, d_v) at each position, so that no state is kept:
            `singular_values`, `effective_rank`, ... The memory needed is then the model's and one snapshot.
        logits: also keep the logits after each position.
        batch_size: prompts read side by side; by default one on a CPU, where a larger batch falls out of the cache and is
            slower, and all on a GPU.

    Returns:
        The trace, on the CPU.

    Raises:
        TypeError: ids that are not a tensor, or not of an integer dtype that a model reads.
        ValueError: no tokens, an id outside the vocabulary, positions that are out of order or beyond the prompt, a batch
            size under 1, or a model that `linear_layers` refuses.

    Example:
        >>> from staterank_utils import effective_rank, load_model
        >>> trace = trace_states(load_model("hybrid"), torch.arange(64).reshape(1, 64), positions=[1, 7, 64], reduce=effective_rank)
        >>> trace.values.shape  # (layer, batch, position, head)
        torch.Size([6, 1, 3, 8])
        >>> trace.values[:, :, 0].max().item()
        1
    """
    layers = linear_layers(model)
    positions = [operator.index(position) for position in positions]
    _check(model, input_ids, positions)
    if batch_size is None:
        batch_size = 1 if model.device.type == "cpu" else len(input_ids)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    batches = input_ids[:, : positions[-1]].split(batch_size)
    parts = [
        _trace_batch(model, layers, batch, positions, reduce, logits)
        for batch in tqdm(batches, desc="prompts", leave=False, disable=len(batches) == 1)
    ]
    values, gates, outputs = zip(*parts, strict=True)
    _, layer, layout = layers[0]
    log_decay, write_strength = torch.cat(gates, 2).unbind(1)
    return StateTrace(
        values=torch.cat(values, 1),
        positions=tuple(positions),
        layers=tuple(index for index, _, _ in layers),
        d_k=layout.d_k(layer),
        d_v=layout.d_v(layer),
        log_decay=log_decay,
        write_strength=write_strength,
        logits=torch.cat(outputs) if logits else None,
    )


@torch.inference_mode()
def _trace_batch(
    model: PreTrainedModel,
    layers: list[tuple[int, nn.Module, Layout]],
    input_ids: Tensor,
    positions: Sequence[int],
    reduce: Callable[[Tensor], Tensor] | None,
    logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values (layer, batch, position, head, ...), mean gates (layer, gate, batch, head) and logits of one batch."""
    input_ids = input_ids.to(model.device)
    order = torch.arange(positions[-1], device=model.device)[None]
    cache = make_cache(model)
    snapshots: list[list[Tensor]] = [[] for _ in layers]
    outputs: list[Tensor] = []
    with ExitStack() as stack:
        sums = [stack.enter_context(_GateSums(layer, layout)) for _, layer, layout in layers]
        for start, stop in zip((0, *positions[:-1]), positions, strict=True):
            hidden = model.base_model(
                input_ids=input_ids[:, start:stop],
                position_ids=order[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            if logits:
                outputs.append(model.get_output_embeddings()(hidden[:, -1]).float().cpu())
            for (index, layer, layout), kept in zip(layers, snapshots, strict=True):
                state = cache.layers[index].recurrent_states[0]
                expected = (len(input_ids), layout.n_heads(layer), layout.d_k(layer), layout.d_v(layer))
                if tuple(state.shape) != expected:
                    raise ValueError(
                        f"layer {index} keeps a state of shape {tuple(state.shape)}, its layout expects {expected}"
                    )
                # The cache hands out its live buffer, which the next segment overwrites.
                kept.append(reduce(state) if reduce else state.float().cpu().clone())
    gates = torch.stack([layer_sums.total for layer_sums in sums]) / positions[-1]
    return (
        torch.stack([torch.stack(kept, 1) for kept in snapshots]),
        gates,
        torch.stack(outputs, 1) if logits else torch.empty(0),
    )


class _GateSums:
    """While entered, adds up log-decay and write strength of a layer over the tokens it reads."""

    def __init__(self, layer: nn.Module, layout: Layout):
        self.layer, self.layout = layer, layout
        self.total: Tensor = torch.zeros(())

    def __enter__(self) -> "_GateSums":
        self._handle = self.layer.get_submodule(self.layout.gate_projection).register_forward_hook(self._add)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        gates = torch.stack(self.layout.gates(self.layer, output))  # (gate, batch, token, head)
        self.total = self.total + gates.double().sum(2).cpu()


def _check(model: PreTrainedModel, input_ids: object, positions: Sequence[int]) -> None:
    if not isinstance(input_ids, Tensor):
        raise TypeError(
            f"expected token ids as a tensor of shape (batch, token), got {type(input_ids).__name__}: make one with "
            "torch.tensor, or take a tokenizer's 'input_ids' with return_tensors='pt'"
        )
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"expected token ids of dtype int64 or int32, got {input_ids.dtype}: convert them with .long()")
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(
            f"expected prompts of shape (batch, token) with at least one token, got shape {tuple(input_ids.shape)}"
        )
    low, high, size = int(input_ids.min()), int(input_ids.max()), model.config.vocab_size
    if low < 0 or high >= size:
        raise ValueError(
            f"token id {low if low < 0 else high} is outside the model's vocabulary 0..{size - 1}: was the prompt made with another tokenizer?"
        )
    n_tokens = input_ids.shape[1]
    increasing = all(a < b for a, b in itertools.pairwise(positions))
    if not positions or not increasing or positions[0] < 1 or positions[-1] > n_tokens:
        raise ValueError(
            f"positions must increase and lie in 1..{n_tokens}, the prompt's length; got {list(positions)}"
        )
