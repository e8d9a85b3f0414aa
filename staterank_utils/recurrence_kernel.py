"""The Triton kernels of `staterank_utils.recurrence`; importing it needs triton."""

import inspect

import triton
import triton.language as tl


def _load_token(
    keys, values, decays, strengths, slots, batch, token, head, key_head, n_tokens, n_keys, n_heads, d_k, d_v,
    rows, columns, BY_CHANNEL: tl.constexpr,
):  # fmt: skip
    """What `_states` needs of one token; beyond the last, what leaves a state as it is."""
    is_there = token < n_tokens
    at = (batch * n_tokens + token) * n_heads + head
    of_key = ((batch * n_tokens + token) * n_keys + key_head) * d_k + rows
    key = tl.load(keys + of_key, mask=is_there & (rows < d_k), other=0.0)
    value = tl.load(values + at * d_v + columns, mask=is_there & (columns < d_v), other=0.0)
    if BY_CHANNEL:
        decay = tl.load(decays + at * d_k + rows, mask=is_there & (rows < d_k), other=0.0)
    else:
        decay = tl.load(decays + at + tl.arange(0, 1), mask=is_there, other=0.0)
    strength = tl.load(strengths + at + tl.arange(0, 1), mask=is_there, other=0.0)
    return key, value, decay, strength, tl.load(slots + token, mask=is_there, other=-1)


def _states(
    keys, values, decays, strengths, first, slots, kept, last, n_tokens, n_kept, n_keys, n_heads, d_k, d_v,
    TILE_K: tl.constexpr, TILE_V: tl.constexpr, BY_CHANNEL: tl.constexpr, NORMALIZE: tl.constexpr, AHEAD: tl.constexpr,
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
    inside = (rows < d_k)[:, None] & (columns < d_v)[None, :]
    of_state = rows[:, None] * d_v + columns[None, :]
    state = tl.load(first + (batch * n_heads + head) * d_k * d_v + of_state, mask=inside, other=0.0)
    # Memory is slower than a token is read, so what some tokens need is on its way while those before them are.
    coming = ()
    for i in tl.static_range(AHEAD):
        coming += (_token(keys, values, decays, strengths, slots, batch, i, head, key_head, n_tokens, n_keys, n_heads, d_k, d_v, rows, columns, BY_CHANNEL),)  # fmt: skip
    for start in range(0, n_tokens, AHEAD):
        here = coming
        coming = ()
        for i in tl.static_range(AHEAD):
            coming += (_token(keys, values, decays, strengths, slots, batch, start + AHEAD + i, head, key_head, n_tokens, n_keys, n_heads, d_k, d_v, rows, columns, BY_CHANNEL),)  # fmt: skip
        # Together, so that their latencies overlap; the steps below depend on each other.
        ready = ()
        for i in tl.static_range(AHEAD):
            key, value, decay, strength, slot = here[i]
            k = key.to(tl.float32)
            if NORMALIZE:
                # Rounded to the dtype of the keys, as what the model's own kernel works with.
                k = (k * (1 / tl.sqrt(tl.sum(k * k, 0) + 1e-6))).to(key.dtype).to(tl.float32)
            ready += ((k, value.to(tl.float32), tl.exp(decay.to(tl.float32)), strength.to(tl.float32), slot),)
        for i in tl.static_range(AHEAD):
            k, v, a, b, slot = ready[i]
            state *= a[:, None]
            state += k[:, None] * (b * (v - tl.sum(state * k[:, None], 0)))[None, :]
            if slot >= 0:
                tl.store(kept + ((batch * n_kept + slot) * n_heads + head) * d_k * d_v + of_state, state, mask=inside)
    tl.store(last + (batch * n_heads + head) * d_k * d_v + of_state, state, mask=inside)


# Unwrapped, since a test run puts type checks around every function, and those do not compile.
_token = triton.jit(inspect.unwrap(_load_token))
states = triton.jit(inspect.unwrap(_states))
