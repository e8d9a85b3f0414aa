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


def _load_keys(
    keys, batch, token, is_there, key_head, n_tokens, n_keys, d_k, rows, scale, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Some channels of the keys of a chunk, (token, channel), as the rule takes them; 0 for tokens that are not there."""
    at = ((batch * n_tokens + token) * n_keys + key_head)[:, None] * d_k + rows[None, :]
    key = tl.load(keys + at, mask=is_there[:, None] & (rows < d_k)[None, :], other=0.0)
    k = key.to(tl.float32)
    if NORMALIZE:
        k = (k * scale[:, None]).to(key.dtype).to(tl.float32)
    return k


def _chunk_parts(
    keys, values, decays, strengths, chunks, reading, written, ending, left, n_tokens, n_chunks, n_keys, n_heads, d_k, d_v,
    CHUNK: tl.constexpr, TILE: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """What a chunk of one head does to a state, whatever that is: S becomes left S + ending^T (written - reading S).

    Source: the WY form of a chunk, as in `kernels.torch_chunk_gated_delta_rule`. Inputs as in `_states`; chunks (chunk, 3): first token, the one behind
    the last, and a slot. reading and ending (batch, head, chunk, CHUNK, d_k), written (batch, head, chunk, CHUNK, d_v), left (batch, head, chunk).
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch = row // n_heads
    head = row % n_heads
    key_head = head // (n_heads // n_keys)
    place = tl.arange(0, CHUNK)
    token = tl.load(chunks + 3 * chunk) + place
    is_there = token < tl.load(chunks + 3 * chunk + 1)
    at = (batch * n_tokens + token) * n_heads + head
    b = tl.load(strengths + at, mask=is_there, other=0.0).to(tl.float32)
    # float64, or a weak decay is lost behind a strong one in the sum; the bound keeps -inf, a decay to nothing, a number.
    g = tl.load(decays + at, mask=is_there, other=0.0).to(tl.float64)
    g = tl.maximum(g, -1e4, propagate_nan=tl.PropagateNan.ALL)
    c = tl.cumsum(g, 0)
    total = tl.sum(g, 0)
    of_tile = tl.arange(0, TILE)
    scale = tl.zeros([CHUNK], tl.float32)
    if NORMALIZE:
        for start in range(0, d_k, TILE):
            k = _keys(keys, batch, token, is_there, key_head, n_tokens, n_keys, d_k, start + of_tile, scale, False)
            scale += tl.sum(k * k, 1)
        scale = 1 / tl.sqrt(scale + 1e-6)
    products = tl.zeros([CHUNK, CHUNK], tl.float32)
    for start in range(0, d_k, TILE):
        k = _keys(keys, batch, token, is_there, key_head, n_tokens, n_keys, d_k, start + of_tile, scale, NORMALIZE)
        products += tl.dot(k, tl.trans(k), input_precision="tf32x3")
    is_before = place[:, None] > place[None, :]
    decay = tl.exp(tl.where(is_before, c[:, None] - c[None, :], -1e4).to(tl.float32))
    # Row by row the inverse of I + system, whose rows above are done; the diagonal comes at the end.
    inverse = tl.where(is_before, -b[:, None] * decay * products, 0.0)
    for i in range(1, CHUNK):
        is_own = (place == i)[:, None]
        own = tl.sum(tl.where(is_own, inverse, 0.0), 0)
        own += tl.sum(own[:, None] * inverse, 0)
        inverse = tl.where(is_own, own[None, :], inverse)
    inverse += tl.where(place[:, None] == place[None, :], 1.0, 0.0)
    of_chunk = (row * n_chunks + chunk) * CHUNK + place
    for start in range(0, d_v, TILE):
        columns = start + of_tile
        is_value = is_there[:, None] & (columns < d_v)[None, :]
        value = tl.load(values + at[:, None] * d_v + columns[None, :], mask=is_value, other=0.0).to(tl.float32)
        u = tl.dot(inverse, b[:, None] * value, input_precision="tf32x3")
        tl.store(written + of_chunk[:, None] * d_v + columns[None, :], u, mask=(columns < d_v)[None, :])
    from_start, to_end = tl.exp(c.to(tl.float32)), tl.exp((total - c).to(tl.float32))
    for start in range(0, d_k, TILE):
        rows = start + of_tile
        k = _keys(keys, batch, token, is_there, key_head, n_tokens, n_keys, d_k, rows, scale, NORMALIZE)
        w = tl.dot(inverse, (b * from_start)[:, None] * k, input_precision="tf32x3")
        at_key = of_chunk[:, None] * d_k + rows[None, :]
        tl.store(reading + at_key, w, mask=(rows < d_k)[None, :])
        tl.store(ending + at_key, k * to_end[:, None], mask=(rows < d_k)[None, :])
    tl.store(left + row * n_chunks + chunk, tl.exp(total.to(tl.float32)))


def _through_chunks(
    reading, written, ending, left, chunks, first, kept, last, n_chunks, n_kept, n_heads, d_k, d_v,
    CHUNK: tl.constexpr, TILE_K: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    """The states of one head after chunks, one after the other, with some columns in registers; as `_chunk_parts` and `_states` name them."""
    row = tl.program_id(0).to(tl.int64)
    rows, place = tl.arange(0, TILE_K), tl.arange(0, CHUNK)
    columns = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    is_row, is_column = rows < d_k, columns < d_v
    inside = is_row[:, None] & is_column[None, :]
    of_state = rows[:, None] * d_v + columns[None, :]
    state = tl.load(first + row * d_k * d_v + of_state, mask=inside, other=0.0)
    for chunk in range(n_chunks):
        of_chunk = (row * n_chunks + chunk) * CHUNK + place
        w = tl.load(reading + of_chunk[:, None] * d_k + rows[None, :], mask=is_row[None, :], other=0.0)
        u = tl.load(written + of_chunk[:, None] * d_v + columns[None, :], mask=is_column[None, :], other=0.0)
        k = tl.load(ending + of_chunk[None, :] * d_k + rows[:, None], mask=is_row[:, None], other=0.0)
        u -= tl.dot(w, state, input_precision="tf32x3")
        state = state * tl.load(left + row * n_chunks + chunk) + tl.dot(k, u, input_precision="tf32x3")
        slot = tl.load(chunks + 3 * chunk + 2)
        if slot >= 0:
            at = ((row // n_heads * n_kept + slot) * n_heads + row % n_heads) * d_k * d_v
            tl.store(kept + at + of_state, state, mask=inside)
    tl.store(last + row * d_k * d_v + of_state, state, mask=inside)


# Unwrapped, since a test run puts type checks around every function, and those do not compile.
_token = triton.jit(inspect.unwrap(_load_token))
_keys = triton.jit(inspect.unwrap(_load_keys))
states = triton.jit(inspect.unwrap(_states))
chunk_parts = triton.jit(inspect.unwrap(_chunk_parts))
through_chunks = triton.jit(inspect.unwrap(_through_chunks))
