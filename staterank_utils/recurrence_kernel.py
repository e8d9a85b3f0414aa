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
    # What a token needs is loaded while the one before it is computed; before the first stands one that does nothing.
    key = tl.zeros([TILE_K], keys.dtype.element_ty)
    value = tl.zeros([TILE_V], values.dtype.element_ty)
    decay = tl.zeros([TILE_K if BY_CHANNEL else 1], decays.dtype.element_ty)
    strength = tl.zeros([1], strengths.dtype.element_ty)
    slot = -1
    for token in range(n_tokens + 1):
        following = tl.minimum(token, n_tokens - 1)
        at = (batch * n_tokens + following) * n_heads + head
        next_key = tl.load(
            keys + ((batch * n_tokens + following) * n_keys + key_head) * d_k + rows, mask=in_rows, other=0.0
        )
        next_value = tl.load(values + at * d_v + columns, mask=in_columns, other=0.0)
        if BY_CHANNEL:
            next_decay = tl.load(decays + at * d_k + rows, mask=in_rows, other=0.0)
        else:
            next_decay = tl.load(decays + at + tl.arange(0, 1))
        next_strength = tl.load(strengths + at + tl.arange(0, 1))
        next_slot = tl.load(slots + following)
        k = key.to(tl.float32)
        if NORMALIZE:
            # Rounded to the dtype of the keys, as what the model's own kernel works with.
            k = (k / tl.sqrt(tl.sum(k * k, 0) + 1e-6)).to(key.dtype).to(tl.float32)
        state *= tl.exp(decay.to(tl.float32))[:, None]
        written = strength.to(tl.float32) * (value.to(tl.float32) - tl.sum(state * k[:, None], 0))
        state += k[:, None] * written[None, :]
        if slot >= 0:
            tl.store(kept + ((batch * n_kept + slot) * n_heads + head) * d_k * d_v + of_state, state, mask=inside)
        key, value, decay, strength, slot = next_key, next_value, next_decay, next_strength, next_slot
    tl.store(last + (batch * n_heads + head) * d_k * d_v + of_state, state, mask=inside)


# Unwrapped, since a test run puts type checks around every function, and those do not compile.
states = triton.jit(inspect.unwrap(_states))
