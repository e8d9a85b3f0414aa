"""States after many tokens, on a GPU: what a kernel passes over, made again beside it.

A kernel tells the state at the end of its call alone, and a call takes as long as some two hundred tokens of the recurrence. Where states are wanted
more often, the recurrence itself is run over the same keys, values, decays and write strengths, token by token, each program holding some columns of
a state in registers: the states after every token of a segment cost one pass over its tokens. The sums are in float32, so a state made
here is nearer to the exact one than that of a kernel, which rounds within a chunk to the dtype of its inputs, or of float32 to TF32. So it is also run
where the weights are float32, whatever the positions.
"""

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
SPARSE = 256  # tokens per position from which on calls of the kernel that end there are faster
DELTA_RULES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")  # fmt: skip


def serves(name: str, arguments: dict[str, Any], positions: Sequence[int]) -> bool:
    """Whether the states of a call of a kernel can be made here, and are better made here.

    Args:
        name: of the kernel, in its modeling module.
        arguments: of the call, by name.
        positions: at which states are wanted, numbers of tokens.

    Example:
        >>> serves("torch_chunk_gated_delta_rule", {"key": torch.ones(1, 2, 1, 4)}, [1, 2])  # on a CPU
        False
    """
    return (
        name in DELTA_RULES
        and arguments["key"].is_cuda
        and (arguments["value"].dtype == torch.float32 or positions[-1] < SPARSE * len(positions))
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
        last = torch.empty_like(state)
        # Triton launches on the current GPU, which need not be that of the tensors.
        with torch.cuda.device(key.device) if key.is_cuda else nullcontext():
            _kernels().states[(n_batch * n_heads, -(-d_v // COLUMNS))](
                *tokens, state, _slots(wanted, key.device), kept, last, stop - start, len(wanted), key.shape[2], n_heads, d_k, d_v,
                TILE_K=max(16, 1 << (d_k - 1).bit_length()), TILE_V=COLUMNS, BY_CHANNEL=g.ndim == 4, NORMALIZE=normalize,
                AHEAD=AHEAD, num_warps=1,
            )  # fmt: skip
        yield kept
        state, start = last, stop


@lru_cache(maxsize=4)
def _slots(wanted: tuple[int, ...], device: torch.device) -> Int[Tensor, " token"]:
    """Which of the wanted states is the one after a token, or -1; kept, since every layer asks for the same."""
    slots = torch.full(wanted[-1:], -1, dtype=torch.int32)
    slots[torch.tensor(wanted) - 1] = torch.arange(len(wanted), dtype=torch.int32)
    # From pinned memory, since a copy from any other waits for all that the GPU has to do.
    return slots.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else slots


@cache
def _kernels() -> Any:
    from staterank_utils import recurrence_kernel  # triton is there only where torch was built for a GPU

    return recurrence_kernel
