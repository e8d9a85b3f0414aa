"""From a prompt to the states S(t) of every linear-attention head, at chosen tokens, in one pass."""

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from staterank_utils import recurrence
from staterank_utils.architectures import LinearLayer, linear_layers
from staterank_utils.budget import budget, in_words, machine_memory, out_of_memory
from staterank_utils.dispatch import Kernel, segment_size, suited_kernels
from staterank_utils.kernels import serves_kernel
from staterank_utils.models import check_ids, make_cache, output_logits, read_tokens, unwrapped
from staterank_utils.rebinding import eagerly
from staterank_utils.spectra import finite_at_the_end

MOST_WAITING = 2**28  # bytes of states that wait on a GPU to be reduced together: a few times what fills it
WAITING_ON_CPU = 2**25  # enough for all threads, and little memory
HELD_TOGETHER = 2**24  # bytes of a layer's states at positions that a kernel tells one by one


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
        write_strength: (layer, batch, head), b_t, mean over all tokens read, float64: as its
            `LinearLayer.gates` gives it, in [0, 1] for a delta rule.
        log_norms: (layer, batch, token, head), float64, the logarithm of the spectral norm of the transition A_t at every token, if
            asked for: the largest decay of a channel, or the norm of its matrix. `memory.rank_bound` takes it.
        logits: (batch, position, vocabulary) after each of the positions, if they were asked for.

    Example:
        >>> from staterank_utils import load_model
        >>> trace = trace_states(load_model("hybrid"), torch.arange(8).reshape(1, 8), positions=[4, 8])
        >>> trace.values.shape, trace.layers, trace.d
        (torch.Size([9, 1, 2, 16, 64, 64]), (0, 1, 2, 4, 5, 6, 8, 9, 10), 64)
    """

    values: Tensor
    positions: tuple[int, ...]
    layers: tuple[int, ...]
    d_k: int
    d_v: int
    log_decay: Float[Tensor, "layer batch head"]
    write_strength: Float[Tensor, "layer batch head"]
    logits: Float[Tensor, "batch position vocabulary"] | None = None
    log_norms: Float[Tensor, "layer batch token head"] | None = None

    @property
    def d(self) -> int:
        """Largest rank that a state can have, min(d_k, d_v)."""
        return min(self.d_k, self.d_v)


def trace_states(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch token"],
    *,
    positions: Sequence[int],
    reduce: "Callable[[Tensor], Tensor] | Reducer | None" = None,
    logits: bool = False,
    log_norms: bool = False,
    batch_size: int | None = None,
) -> StateTrace:
    """Read prompts once, up to the last position, and keep S(t) of every linear-attention head at each position.

    A prompt is read once, in segments of 2,048 tokens through the model's cache; where kernels that take little memory serve, of up to
    16,384 of all prompts together (`dispatch.segment_size`). Inside a segment only the kernels of the linear-attention layers stop at the positions, or tell the states on the way where they can. That is
    the same computation as one full pass, up to the order of float32 sums. Where an architecture has no such kernel, the segments
    themselves end at the positions. On a GPU the states of a delta rule are those of the model's own kernel, which rounds some products to the dtype of
    its inputs; at positions less than 256 tokens apart on average, or of float32 weights, they are made beside the kernel from what it is given, in
    float32 (`recurrence`).

    Source: S(t) as in arXiv:2602.02195; which states a layer keeps, `staterank_utils.architectures`.

    Args:
        model: from `load_model`.
        input_ids: prompts of equal length, int64 or int32, on any device.
        positions: numbers of tokens t after which to look, increasing, in 1..token.
        reduce: applied on the way to states (1, position, head, d_k, d_v), those of several prompts, positions and layers along the
            second axis, so that no state is kept: `singular_values`, `effective_rank`, ... It must take each state by itself; on a GPU it
            also runs in another thread. The memory needed is then the model's, one snapshot, and on a GPU at most 1 GB of states that wait. To keep
            more states than memory holds, `streaming.stream_states`.
        logits: also keep the logits after each position.
        log_norms: also keep the logarithm of the norm of every token's transition.
        batch_size: prompts read side by side; by default one on a CPU, where a larger batch falls out of the cache and is
            slower, and all on a GPU.

    Returns:
        The trace, on the CPU.

    Raises:
        TypeError: ids that are not a tensor, or not of an integer dtype that a model reads; a `reduce` that does not make a tensor.
        ValueError: inside torch.autocast, a model that drops its cache, no tokens, an id outside the vocabulary, positions that are out of order or beyond the prompt, a batch
            size under 1, a model that `linear_layers` refuses, or one whose layers were pruned to different numbers of heads.
        MemoryError: states that would be kept take more than the machine has.
        torch.OutOfMemoryError: with what to lower.

    Example:
        >>> from staterank_utils import effective_rank, load_model
        >>> trace = trace_states(load_model("hybrid"), torch.arange(64).reshape(1, 64), positions=[1, 7, 64], reduce=effective_rank)
        >>> trace.values.shape  # (layer, batch, position, head)
        torch.Size([9, 1, 3, 16])
        >>> trace.values[:, :, 0].max().item()
        1
    """
    model = unwrapped(model)
    layers = linear_layers(model)
    positions = whole_positions(positions)
    check_prompts(model, input_ids, positions)
    check_even(layers)
    if reduce is None:
        _check_memory(model, input_ids, positions)
    if batch_size is None:
        batch_size = 1 if model.device.type == "cpu" else len(input_ids)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    batches = input_ids[:, : positions[-1]].split(batch_size)
    side_by_side = min(batch_size, len(input_ids))
    advice = {
        "lower batch_size": side_by_side > 1,
        "reduce states at once (reduce=...)": reduce is None,
        "take fewer positions": len(positions) > 1,
        "take shorter prompts or a model of fewer bytes (dtype=torch.bfloat16)": True,
    }
    with out_of_memory(
        f"not enough memory for {positions[-1]:,} tokens of {side_by_side} prompts and {len(positions)} positions",
        advice=", or ".join(what for what, applies in advice.items() if applies),
    ):
        parts = [
            _trace_batch(model, layers, batch, positions, reduce, logits, log_norms)
            for batch in tqdm(batches, desc="prompts", leave=False, disable=len(batches) == 1 or None)
        ]
    values, gates, outputs, norms = zip(*parts, strict=True)
    log_decay, write_strength = torch.cat(gates, 2).unbind(1)
    return StateTrace(
        values=torch.cat(values, 1) if len(values) > 1 else values[0],
        positions=tuple(positions),
        layers=tuple(layer.index for layer in layers),
        d_k=layers[0].d_k,
        d_v=layers[0].d_v,
        log_decay=log_decay,
        write_strength=write_strength,
        logits=torch.cat(outputs) if logits else None,
        log_norms=torch.cat(norms, 1) if log_norms else None,
    )


@torch.inference_mode()
def _trace_batch(
    model: PreTrainedModel,
    layers: list[LinearLayer],
    input_ids: Tensor,
    positions: Sequence[int],
    reduce: "Callable[[Tensor], Tensor] | Reducer | None",
    logits: bool,
    log_norms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values (layer, batch, position, head, ...), mean gates (layer, gate, batch, head), logits and log-norms of one batch."""
    input_ids = input_ids.to(model.device)
    order = torch.arange(positions[-1], device=model.device)[None]
    cache = make_cache(model)
    outputs: list[Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(eagerly())
        stack.enter_context(suited_kernels(model))
        stack.enter_context(finite_at_the_end())
        readings = [stack.enter_context(_GateReading(layer, log_norms)) for layer in layers]
        devices = {parameter.device for layer in layers for parameter in layer.module.parameters()}
        reducer = stack.enter_context(reduce if isinstance(reduce, Reducer) else Reducer(reduce, devices=devices))
        taps = [_StateTap(layer, reducer=reducer, gates=gates) for layer, gates in zip(layers, readings, strict=True)]
        for layer, tap in zip(layers, taps, strict=True):
            stack.enter_context(layer.scans_through(tap.scan))
        for start, stop in itertools.pairwise(_borders(positions, layers, n_prompts=len(input_ids))):
            inside = [position - start for position in positions if start < position <= stop]
            for tap in taps:
                tap.positions = inside
            hidden = read_tokens(model, input_ids[:, start:stop], positions=order[:, start:stop], cache=cache)
            for tap in taps:
                if inside and not tap.layer.scans:
                    tap.keep(tap.layer.state(cache)[:, None].clone())
            if stop < positions[-1] and not layers[0].model_adapter.own_cache:  # a cache of its own is not dropped
                _check_kept(model, cache, stop, [layer.index for layer in layers])
            if logits and inside:
                chosen = hidden[:, [position - 1 for position in inside]]
                outputs.append(output_logits(model, chosen).float().cpu())
        reducer.finish()
    totals = [reading.total() for reading in readings]
    gates = torch.stack([total.to(totals[0].device) for total in totals]).cpu() / positions[-1]
    norms = torch.stack([reading.log_norms() for reading in readings]) if log_norms else torch.empty(0)
    return _stacked([tap.kept for tap in taps]), gates, torch.cat(outputs, 1) if logits else torch.empty(0), norms


def _check_kept(model: PreTrainedModel, cache: Any, n_tokens: int, layer_indices: Sequence[int]) -> None:
    """Refuse a model that drops the cache it is given; by its states, since a layer may step over one token without telling a cache."""
    if any(cache.layers[index].recurrent_states[0] is None for index in layer_indices):
        raise ValueError(
            f"{type(model).__name__} was given a cache and did not keep the states after {n_tokens} tokens in it, so what comes next "
            "would start from empty states: does something in the model set use_cache?"
        )


def _stacked(kept: list[list[Tensor]]) -> Num[Tensor, "layer batch position *made"]:
    """What every layer kept, some positions at a time, as one tensor on the CPU; the lists are emptied on the way, to hold nothing three times."""
    values = torch.empty(0)
    for row, parts in enumerate(kept):
        of_layer = torch.cat(parts, 1).cpu()
        parts.clear()
        with torch.inference_mode(False):  # an ordinary tensor, for whatever comes after
            if row == 0:
                values = torch.empty(len(kept), *of_layer.shape, dtype=of_layer.dtype)
            values[row] = of_layer
    return values


def _borders(positions: Sequence[int], layers: list[LinearLayer], *, n_prompts: int) -> list[int]:
    """Where segments begin and end."""
    wanted = positions[-1:] if all(layer.scans for layer in layers) else positions
    return sorted({*range(0, positions[-1], segment_size(layers, n_prompts=n_prompts)), *wanted})


class _StateTap:
    """Keeps what is made of a layer's states at the positions set, as the layer reads a segment through `scan`.

    Kernels that can tell the states on the way are called once a segment, others in pieces that end at the positions; all else in
    the layer sees the whole segment.
    """

    def __init__(self, layer: LinearLayer, *, reducer: "Reducer", gates: "_GateReading"):
        self.layer, self.reducer, self.gates = layer, reducer, gates
        self.positions: list[int] = []
        self.kept: list[Tensor] = []
        self._n_held_now = self._n_left = 0

    def scan(self, kernel: Callable[..., tuple[Tensor, Tensor]], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """A call of a kernel over (batch, token, head, ...), cut along the tokens."""
        names = ("query", "key", "value", "g", "beta")
        tokens = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
        if len(args) > len(names) or len(tokens) < len(names):
            raise ValueError(
                f"layer {self.layer.index} calls {kernel.__name__} with {len(args)} arguments by place and {', '.join(kwargs)} by name: a kernel in `scans` "
                f"is called with {', '.join(names)}, and all else by name"
            )
        rest = {name: value for name, value in kwargs.items() if name not in names}
        state, outputs = rest.pop("initial_state", None), []
        n_batch, n_tokens = tokens["query"].shape[:2]
        self.gates.add(tokens["g"], tokens["beta"])
        self._n_left = len(self.positions)
        with_states = kernel.states if isinstance(kernel, Kernel) else None
        if with_states and n_batch == 1 and serves_kernel(kernel.__name__, tokens | rest):
            normalize = rest.get("use_qk_l2norm_in_kernel", False)
            out, state = with_states(
                **tokens,
                positions=self.positions,
                keep=self._hold,
                initial_state=state,
                use_qk_l2norm_in_kernel=normalize,
            )
            return out, state
        known = isinstance(kernel, Kernel) and kernel.known
        if self.positions[:-1] and known and recurrence.serves(kernel.__name__, tokens | rest, self.positions):
            by_recurrence = recurrence.states_after(
                *(tokens[name] for name in names[1:]),
                positions=self.positions,
                initial_state=state,
                normalize=rest.get("use_qk_l2norm_in_kernel", False),
                n_bytes=self.reducer.n_bytes,
            )
            for states in by_recurrence:
                self.keep(states)
            return kernel(*args, **kwargs)
        ends = self.positions if n_tokens in self.positions else [*self.positions, n_tokens]
        for i, (start, end) in enumerate(itertools.pairwise([0, *ends])):
            query, key, value, g, beta = (tokens[name][:, start:end] for name in names)
            out, state = kernel(
                query, key, value, g=g, beta=beta, **rest | {"initial_state": state, "output_final_state": True}
            )
            outputs.append(out)
            if i < len(self.positions):
                self._hold(state)
        return torch.cat(outputs, 1), state

    def _hold(self, state: Float[Tensor, "batch head d_k d_v"]) -> None:
        """The state at the next position; kept when as many are at hand as may be, or none is left to come."""
        if not self._n_held_now:
            n_held = min(max(1, HELD_TOGETHER // state.nbytes), self._n_left)
            self._held = state.new_empty(len(state), n_held, *state.shape[1:])
        self._held[:, self._n_held_now] = state
        self._n_held_now, self._n_left = self._n_held_now + 1, self._n_left - 1
        if self._n_held_now == self._held.shape[1]:
            held, self._n_held_now = self._held, 0
            del self._held  # once reduced, nothing of it stays
            self.keep(held)

    def keep(self, states: Float[Tensor, "batch position head d_k d_v"]) -> None:
        """States at the next positions."""
        expected = self.layer.n_heads, self.layer.d_k, self.layer.d_v
        if tuple(states.shape[2:]) != expected:
            raise ValueError(
                f"layer {self.layer.index} keeps states of shape {tuple(states.shape[2:])}, its adapter expects {expected}"
            )
        _check_width(self.layer, states.dtype)
        self.reducer.add(self.layer.index, self.kept, states)


class Reducer:
    """Applies a trace's measure to many states at once, and keeps the results; on a GPU, in a second thread.

    On a GPU a measure makes its caller wait, so a thread of its own calls it once enough states are there, and the model runs on. What is left when the model is done is made by the caller. On a CPU the threads of a measure and those of
    the model's products are in each other's way, so the fewer changes between them the better. Used in a `with` block, at whose end
    nothing runs any more, whatever ended it.

    Args:
        reduce: as `trace_states` takes it; None keeps the states.
        devices: that the states are on; of GPUs among them the free memory is asked for.

    Example:
        >>> kept = []
        >>> with Reducer(lambda states: states.sum((-2, -1))) as reducer:
        ...     reducer.add(0, kept, torch.ones(1, 2, 3, 4, 4))
        ...     reducer.finish()
        >>> kept[0].shape
        torch.Size([1, 2, 3])
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor] | None, *, devices: Iterable[torch.device] = ()):
        self.reduce = reduce
        self.devices = {device for device in devices if device.type == "cuda"}
        self._waiting: list[tuple[list[Tensor], Tensor]] = []
        self._n_waiting = 0
        self._running: Future[None] | None = None

    def __enter__(self) -> "Reducer":
        # With as many threads of torch as the caller has, since a thread of spectra's own leaves new ones only one.
        n_threads = torch.get_num_threads()
        self._thread = ThreadPoolExecutor(1, "staterank-reduce", torch.set_num_threads, (n_threads,))
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()
        self._waiting, self._n_waiting, self._running = [], 0, None

    @functools.cached_property
    def n_bytes(self) -> int:
        """Of states that may wait on a GPU; asked for there alone, since the question alone takes memory of it."""
        return min([MOST_WAITING, *(torch.cuda.mem_get_info(device)[0] // 8 for device in self.devices)])

    def add(self, layer: int, kept: list[Tensor], states: Float[Tensor, "batch position head d_k d_v"]) -> None:
        """Append to `kept` what is made of the states of a layer, now or by the time that `finish` returns."""
        if self.reduce is None:
            kept.append(states.float().cpu())
            return
        self._waiting.append((kept, states))
        self._n_waiting += states.nbytes
        if self._n_waiting >= (self.n_bytes if states.is_cuda else WAITING_ON_CPU):
            self._hand_over()

    def finish(self) -> None:
        """Make what is left, and wait until all is made.

        Raises:
            Exception: what the measure of states raised.
        """
        self._hand_over(last=True)

    def _hand_over(self, *, last: bool = False) -> None:
        """Work on what waits; on a GPU let the thread do that, once it is done with what it was given before, if the model goes on meanwhile."""
        self._wait()
        waiting, self._waiting, self._n_waiting = self._waiting, [], 0
        # Work is queued where the model queued what it needs.
        streams = {
            states.device: torch.cuda.current_stream(states.device)
            for _, states in waiting
            if states.device.type == "cuda"
        }
        if last or not any(states.is_cuda for _, states in waiting):
            self._make_all(waiting, streams)
        else:
            self._running = self._thread.submit(copy_context().run, self._make_all, waiting, streams)

    def _wait(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()

    @torch.inference_mode()
    def _make_all(self, waiting: list[tuple[list[Tensor], Tensor]], streams: dict[torch.device, Any]) -> None:
        by_kind = itertools.groupby(waiting, lambda item: (item[1].device, item[1].shape[2:]))
        for (device, _), group in by_kind:
            lists, states = zip(*group, strict=True)
            with torch.cuda.stream(streams[device]) if device in streams else nullcontext():
                flat = [each.flatten(0, 1) for each in states]
                made = self._make((torch.cat(flat) if len(flat) > 1 else flat[0])[None])[0]
            parts = made.split([each.shape[0] * each.shape[1] for each in states])
            for kept, part, each in zip(lists, parts, states, strict=True):
                kept.append(part.unflatten(0, each.shape[:2]))

    def _make(self, states: Float[Tensor, "batch position head d_k d_v"]) -> Tensor:
        assert self.reduce is not None, "states that are kept do not wait"
        made = self.reduce(states)
        check_reduced(made, states, self.reduce)
        if made.untyped_storage().nbytes() > made.nbytes:
            made = made.clone()  # a view would keep all that it looks at
        # A number a state may stay on the GPU until the end, so that nothing waits for it; more of it would fill its memory.
        return made if made.nbytes <= states.nbytes // 256 else made.cpu()


class _GateReading:
    """Adds up log-decay and write strength of a layer over the tokens it reads, and keeps the norms of their transitions if asked to.

    A layer with `scans` gives both to its kernel, and so to `_StateTap.scan`. While entered, those of any other are found in what its
    projections put out.
    """

    def __init__(self, layer: LinearLayer, keep_norms: bool):
        self.layer, self.keep_norms = layer, keep_norms
        self._sums: list[Tensor] = []  # (gate, batch, head) of each segment
        self._norms: list[Tensor] = []  # (batch, token, head) of each segment
        self._seen: dict[str, Any] = {}

    def __enter__(self) -> "_GateReading":
        names = () if self.layer.scans else self.layer.gate_modules
        self._handles = [
            self.layer.module.get_submodule(name).register_forward_hook(functools.partial(self._look, name))
            for name in names
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def add(self, log_decay: Tensor, write_strength: Float[Tensor, "batch token head"], *outputs: Tensor) -> None:
        """Log-decay, with or without channels, and write strength of some tokens, and what the layer's projections put out for them."""
        over_channels = log_decay.mean(-1) if log_decay.ndim == 4 else log_decay
        self._sums.append(torch.stack([gate.sum(1, dtype=torch.float64) for gate in (over_channels, write_strength)]))
        if self.keep_norms:
            self._norms.append(self.layer.log_norm(log_decay, *outputs).double().cpu())

    def total(self) -> Float[Tensor, "gate batch head"]:
        """Both sums, on the layer's device."""
        return self._sums[0] if len(self._sums) == 1 else torch.stack(self._sums).sum(0)

    def log_norms(self) -> Float[Tensor, "batch token head"]:
        """Of every token, on the CPU."""
        return torch.cat(self._norms, 1)

    def _look(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._seen[name] = output
        names = self.layer.gate_modules
        if len(self._seen) == len(names):
            outputs = [self._seen[name] for name in names]
            self.add(*self.layer.gates(*outputs), *outputs)
            self._seen = {}


def _check_memory(model: PreTrainedModel, input_ids: Tensor, positions: Sequence[int]) -> None:
    needed, memory = budget(model, input_ids, positions=positions), machine_memory()
    # While a trace is put together, its states are there twice.
    if memory is not None and 2 * needed.total > memory:
        raise MemoryError(
            f"{needed}, twice while they are put together, and this machine has {in_words(memory)} of memory: reduce states at once (reduce=...), or keep them on disk "
            "(streaming.stream_states)"
        )


def check_even(layers: list[LinearLayer]) -> None:
    """Refuse a model whose layers have different numbers of heads, since a trace has one axis for all.

    Args:
        layers: from `linear_layers`.

    Raises:
        ValueError: they differ.

    Example:
        >>> from staterank_utils import load_model, prune_heads
        >>> check_even(linear_layers(prune_heads(load_model("hybrid"), {0: [1]})))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: a trace has one axis of heads for all layers, and these have different numbers of them: {0: 15, 1: 16, ...
    """
    counts = {layer.index: layer.n_heads for layer in layers}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"a trace has one axis of heads for all layers, and these have different numbers of them: {counts}. "
            "Take the whole model, from before it was pruned; `ablate_heads` makes it compute the same"
        )


def check_dtype(layers: list[LinearLayer], dtype: torch.dtype | None) -> None:
    """Refuse a dtype of the weights in which some layer would keep its states too, if it is too narrow for singular values.

    Args:
        layers: from `linear_layers`, of a model or of its outline.
        dtype: that the weights will have; None where that is not known yet.

    Raises:
        ValueError: it is too narrow.

    Example:
        >>> from staterank_utils import load_model
        >>> check_dtype(linear_layers(load_model("hybrid")), torch.bfloat16) is None  # its states are in float32 all the same
        True
    """
    for layer in layers:
        if layer.keeps_dtype and dtype is not None:
            _check_width(layer, dtype)


def _check_width(layer: LinearLayer, dtype: torch.dtype) -> None:
    if dtype.itemsize < 4:
        raise ValueError(
            f"layer {layer.index} keeps its states in {dtype}, whose rounding would drown small singular values: "
            "load the model with dtype=torch.float32"
        )


def check_reduced(made: object, states: Tensor, reduce: object) -> None:
    """Refuse what a measure of states made if it is not a number, or some, for each state.

    Args:
        made: by the measure.
        states: that it was given.
        reduce: the measure.

    Raises:
        TypeError: not one tensor.
        ValueError: other axes before what was made.

    Example:
        >>> check_reduced(torch.ones(6), torch.ones(1, 2, 3, 4, 4), "a measure")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: reduce must keep the axes (batch, position, head) of states, (1, 2, 3), got a tensor of shape (6,) from a measure: ...
    """
    if not isinstance(made, Tensor):
        raise TypeError(
            f"reduce must make one tensor of states, got {type(made).__name__} from {reduce}: "
            "put several side by side with torch.stack(..., -1)"
        )
    if made.shape[:3] != states.shape[:3]:
        raise ValueError(
            f"reduce must keep the axes (batch, position, head) of states, {tuple(states.shape[:3])}, got a tensor of shape "
            f"{tuple(made.shape)} from {reduce}: let it work on the last two axes alone"
        )


def whole_positions(positions: Iterable[Any]) -> list[int]:
    """Positions as whole numbers of Python.

    Args:
        positions: integers of any library.

    Raises:
        TypeError: one number, or what is not whole.

    Example:
        >>> whole_positions(torch.tensor([1, 8]))
        [1, 8]
    """
    try:
        return [operator.index(position) for position in positions]
    except TypeError:
        raise TypeError(f"positions are whole numbers of tokens, such as [32, 64], got {positions!r}") from None


def check_prompts(model: PreTrainedModel, input_ids: object, positions: Sequence[int]) -> None:
    """Refuse what `trace_states` cannot trace.

    Args:
        model, input_ids, positions: as there.

    Raises:
        TypeError, ValueError: as there.

    Example:
        >>> from staterank_utils import load_model
        >>> check_prompts(load_model("hybrid"), torch.ones(1, 4, dtype=torch.long), [5])
        Traceback (most recent call last):
            ...
        ValueError: positions must increase and lie in 1..4, the prompt's length; got [5]
    """
    check_ids(model, input_ids)
    assert isinstance(input_ids, Tensor)
    n_tokens = input_ids.shape[1]
    increasing = all(a < b for a, b in itertools.pairwise(positions))
    if not positions or not increasing or positions[0] < 1 or positions[-1] > n_tokens:
        raise ValueError(
            f"positions must increase and lie in 1..{n_tokens}, the prompt's length; got {list(positions)}"
        )
