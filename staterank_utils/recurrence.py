"""States on the way, on a GPU: what a kernel for many tokens passes over, made again beside it.

A chunked kernel keeps a state for every 64 tokens or so, rounded to the dtype of its inputs. Here the recurrence itself is run over the same keys,
values, decays and write strengths, each program holding some columns of a state in registers. Where states are wanted after many of the tokens, it goes
token by token, so that the states after every token of a segment cost one pass over its tokens. Where few are wanted it goes by
chunks, which end at the positions: what a chunk does to any state is made for all chunks at once. The sums are in float32, or as exact as
that, so that a state made here is nearer to the exact one than that of a kernel that works in bfloat16 within a chunk.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

COLUMNS = 16  # of a state that one program holds
AHEAD = 2  # tokens that are loaded while as many are read
CHUNK = 32  # tokens of a chunk at most
CHUNK_COLUMNS = 16  # of a state that one program holds through all chunks
STAGES, WARPS, PART_WARPS = 3, 4, 1  # the fastest on an H200
SPARSE = 16  # tokens per position from which on chunks are faster
WIDEST_KEYS = 128  # for which what a chunk needs fits beside a state
CHUNK_BYTES = 2**29  # of what chunks do to a state, that are made at once
DELTA_RULES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")  # fmt: skip


def serves(name: str, arguments: dict[str, Any]) -> bool:
    """Whether the states of a call of a kernel can be made here.

    Args:
        name: of the kernel, in its modeling module.
        arguments: of the call, by name.

    Example:
        >>> serves("torch_chunk_gated_delta_rule", {"key": torch.ones(1, 2, 1, 4)})  # on a CPU
        False
    """
    return (
        name in DELTA_RULES
        and arguments["key"].is_cuda
        and find_spec("triton") is not None
        and arguments.get("cu_seqlens") is None
        and not (torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments.values()))
    )


def states_after(
    key: Float[Tensor, "batch token key_head d_k"],
    value: Float[Tensor, "batch token head d_v"],
    g: Float[Tensor, "batch token head"] | Float[Tensor, "batch token head d_k"],
    beta: Float[Tensor, "batch token head"],
    *,
    positions: Sequence[int],
    initial_state: Float[Tensor, "batch head d_k d_v"] | None = None,
    normalize: bool = False,
    n_bytes: int = 2**28,
) -> Iterator[Float[Tensor, "batch position head d_k d_v"]]:
    """The states of the gated delta rule after some tokens, a few positions at a time.

    Source: as `reference.gated_delta_rule`, with one decay per head or per channel.

    Args:
        key, value, g, beta: as a chunked kernel takes them, on a GPU; g is the natural logarithm of the decay.
        positions: numbers of tokens, increasing, in 1..token.
        initial_state: the state before the first token, 0 by default.
        normalize: divide keys by their length.
        n_bytes: of states that are made before they are handed on, if there is more than one position.

    Returns:
        float32, in the order of the positions.

    Example:
        >>> list(states_after(*(torch.empty(1, 0, 1, 4),) * 2, *(torch.empty(1, 0, 1),) * 2, positions=[]))
        []
    """
    n_batch, _, n_heads, d_v = value.shape
    d_k = key.shape[-1]
    state = value.new_zeros(n_batch, n_heads, d_k, d_v, dtype=torch.float32) if initial_state is None else initial_state.float().contiguous()  # fmt: skip
    n_at_once = max(1, n_bytes // (4 * state.numel()))
    start = 0
    for first in range(0, len(positions), n_at_once):
        wanted = tuple(position - start for position in positions[first : first + n_at_once])
        stop = start + wanted[-1]
        tokens = [x[:, start:stop].contiguous() for x in (key, value, g, beta)]
        kept = state.new_empty(n_batch, len(wanted), n_heads, d_k, d_v)
        by_chunk = g.ndim == 3 and len(wanted) * SPARSE <= wanted[-1] and d_k <= WIDEST_KEYS
        # Triton launches on the current GPU, which need not be that of the tensors.
        with torch.cuda.device(key.device) if key.is_cuda else nullcontext():
            state = (_by_chunk if by_chunk else _by_token)(tokens, wanted, state, kept, normalize)
        yield kept
        start = stop


def _by_token(
    tokens: list[Tensor], wanted: tuple[int, ...], state: Tensor, kept: Tensor, normalize: bool
) -> Float[Tensor, "batch head d_k d_v"]:
    """Fill `kept` with the states after the wanted tokens, and return the last."""
    key, value, g, _ = tokens
    n_batch, n_tokens, n_heads, d_v = value.shape
    n_keys, d_k = key.shape[2:]
    last = torch.empty_like(state)
    _kernels().states[(n_batch * n_heads, -(-d_v // COLUMNS))](
        *tokens, state, _slots(wanted, key.device), kept, last, n_tokens, len(wanted), n_keys, n_heads, d_k, d_v,
        TILE_K=_tile(d_k), TILE_V=COLUMNS, BY_CHANNEL=g.ndim == 4, NORMALIZE=normalize,
        AHEAD=AHEAD, num_warps=1,
    )  # fmt: skip
    return last


def _by_chunk(
    tokens: list[Tensor], wanted: tuple[int, ...], state: Tensor, kept: Tensor, normalize: bool
) -> Float[Tensor, "batch head d_k d_v"]:
    """As `_by_token`, with one decay per head."""
    key, value, *_ = tokens
    n_batch, n_tokens, n_heads, d_v = value.shape
    n_keys, d_k = key.shape[2:]
    rows = n_batch * n_heads
    for chunks in _chunks(wanted, key.device).split(max(1, CHUNK_BYTES // (4 * rows * CHUNK * (2 * d_k + d_v)))):
        n = len(chunks)
        reading, ending = state.new_empty(2, rows, n, CHUNK, d_k)
        written, left, last = state.new_empty(rows, n, CHUNK, d_v), state.new_empty(rows, n), torch.empty_like(state)
        _kernels().chunk_parts[(rows, n)](
            *tokens, chunks, reading, written, ending, left, n_tokens, n, n_keys, n_heads, d_k, d_v,
            CHUNK=CHUNK, TILE=32, NORMALIZE=normalize, num_warps=PART_WARPS,
        )  # fmt: skip
        _kernels().through_chunks[(rows, -(-d_v // CHUNK_COLUMNS))](
            reading, written, ending, left, chunks, state, kept, last, n, len(wanted), n_heads, d_k, d_v,
            CHUNK=CHUNK, TILE_K=_tile(d_k), TILE_V=CHUNK_COLUMNS, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        state = last
    return state


@lru_cache(maxsize=4)
def _slots(wanted: tuple[int, ...], device: torch.device) -> Int[Tensor, " token"]:
    """Which of the wanted states is the one after a token, or -1; kept, since every layer asks for the same."""
    slots = torch.full(wanted[-1:], -1, dtype=torch.int32)
    slots[torch.tensor(wanted) - 1] = torch.arange(len(wanted), dtype=torch.int32)
    return _on(device, slots)


@lru_cache(maxsize=4)
def _chunks(wanted: tuple[int, ...], device: torch.device) -> Int[Tensor, "chunk 3"]:
    """First token of each chunk, the one behind its last, and which of the wanted states is the one behind it, or -1."""
    rows = []
    for slot, (start, stop) in enumerate(itertools.pairwise((0, *wanted))):
        starts = range(start, stop, CHUNK)
        rows += [(each, min(each + CHUNK, stop), slot if each == starts[-1] else -1) for each in starts]
    return _on(device, torch.tensor(rows, dtype=torch.int32))


def _tile(d_k: int) -> int:
    """Rows of a state that a program holds: a power of two, and at least what products take."""
    return max(16, 1 << (d_k - 1).bit_length())


def _on(device: torch.device, table: Tensor) -> Tensor:
    # From pinned memory, since a copy from any other waits for all that the GPU has to do.
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@cache
def _kernels() -> Any:
    from staterank_utils import recurrence_kernel  # triton is there only where torch was built for a GPU

    return recurrence_kernel
