"""The Triton kernel of `staterank_utils.recurrence`; importing it needs triton."""

import inspect

import triton
import triton.language as tl


def _states(  # type: ignore[no-untyped-def]
    keys, values, decays, strengths, first, slots, kept, last, n_tokens, n_kept, n_keys, n_heads, d_k, d_v,
    TILE_K: tl.constexpr, TILE_V: tl.constexpr, BY_CHANNEL: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """The gated delta rule of one head, token by token, with some columns of its state in registers.

    All tensors are contiguous: keys (batch, token, key head, d_k), values (batch, token, head, d_v), decays (batch, token,
    head) or, BY_CHANNEL, (batch, token, head, d_k), strengths (batch, token, head), first and last (batch, head, d_k, d_v), kept (batch,
    n_kept, head, d_k, d_v); slots (token): where in `kept` the state after a token goes, or -1.
    """
    batch = tl.program_id(0).to(tl.int64) // n_heads
    head = tl.program_id(0) % n_heads
    key_head = head // (n_heads // n_keys)
    rows = tl.arange(0, TILE_K)
    columns = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    in_rows = rows < d_k
    in_columns = columns < d_v
    inside = in_rows[:, None] & in_columns[None, :]
    of_state = rows[:, None] * d_v + columns[None, :]
    state = tl.load(first + (batch * n_heads + head) * d_k * d_v + of_state, mask=inside, other=0.0)
    for token in range(n_tokens):
        at = batch * n_tokens + token
        key = tl.load(keys + (at * n_keys + key_head) * d_k + rows, mask=in_rows, other=0.0)
        value = tl.load(values + (at * n_heads + head) * d_v + columns, mask=in_columns, other=0.0).to(tl.float32)
        strength = tl.load(strengths + at * n_heads + head).to(tl.float32)
        slot = tl.load(slots + token)
        k = key.to(tl.float32)
        if NORMALIZE:
            # Rounded to the dtype of the keys, as what the model's own kernel works with.
            k = (k / tl.sqrt(tl.sum(k * k, 0) + 1e-6)).to(key.dtype).to(tl.float32)
        if BY_CHANNEL:
            decay = tl.load(decays + (at * n_heads + head) * d_k + rows, mask=in_rows, other=0.0).to(tl.float32)
            state *= tl.exp(decay)[:, None]
        else:
            state *= tl.exp(tl.load(decays + at * n_heads + head).to(tl.float32))
        written = strength * (value - tl.sum(state * k[:, None], 0))
        state += k[:, None] * written[None, :]
        if slot >= 0:
            tl.store(kept + ((batch * n_kept + slot) * n_heads + head) * d_k * d_v + of_state, state, mask=inside)
    tl.store(last + (batch * n_heads + head) * d_k * d_v + of_state, state, mask=inside)


# Unwrapped, since a test run puts type checks around every function, and those do not compile.
states = triton.jit(inspect.unwrap(_states))
