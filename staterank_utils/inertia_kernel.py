"""The Triton kernel of `staterank_utils.inertia`; importing it needs triton."""

import inspect

import triton
import triton.language as tl


def _count(  # type: ignore[no-untyped-def]
    states, starts, factors, largest_of, bound_of, ranks_of, by_state, by_row, by_column, n_rows, d, edge, hair,
    TILE: tl.constexpr, STARTS: tl.constexpr, FACTORS: tl.constexpr, SQUARINGS: tl.constexpr, AT_ONCE: tl.constexpr,
    NARROW: tl.constexpr,
):  # fmt: skip
    """The largest eigenvalue of one state's Gram matrix, a bound on it, and how many eigenvalues are over shares of it; all in registers.

    As `inertia.largest_eigenvalue` and `inertia.positive_eigenvalues`, with the first squarings in three products of TF32 each, the rest in
    NARROW. A state is (n_rows, d) with d at most n_rows, at whatever strides; starts are (TILE, STARTS), factors (FACTORS) are the shares.
    """
    tiny: tl.constexpr = 2.2250738585072014e-308
    state = tl.program_id(0).to(tl.int64)
    rows, columns = tl.arange(0, TILE), tl.arange(0, TILE)
    diagonal = rows[:, None] == columns[None, :]
    at = states + state * by_state
    gram = tl.zeros([TILE, TILE], tl.float64)
    left = tl.load(at + rows * by_column, mask=rows < d, other=0.0)
    right = tl.load(at + columns * by_column, mask=columns < d, other=0.0)
    for row in range(1, n_rows + 1):
        # What a row needs is loaded while the one before it is worked on.
        following = at + tl.minimum(row, n_rows - 1) * by_row
        next_left = tl.load(following + rows * by_column, mask=rows < d, other=0.0)
        next_right = tl.load(following + columns * by_column, mask=columns < d, other=0.0)
        gram += left.to(tl.float64)[:, None] * right.to(tl.float64)[None, :]
        left, right = next_left, next_right
    # The power, over its trace now and then, and the logarithm of what it was divided by, as if at the first squaring.
    root = tl.sqrt(d.to(tl.float64))
    scale = root / tl.maximum(tl.sum(tl.sum(tl.where(diagonal, gram, 0.0), 1), 0), d * tiny)
    logarithm = -tl.log(scale)
    power = (gram * scale).to(tl.float32)
    for squaring in tl.static_range(SQUARINGS):
        if squaring < AT_ONCE:
            power = tl.dot(power, power, input_precision="tf32x3")
        else:
            if squaring % AT_ONCE == 0:
                trace = tl.sum(tl.sum(tl.where(diagonal, power, 0.0), 1), 0).to(tl.float64)
                again = root / tl.maximum(trace, d * 1.1754943508222875e-38)
                logarithm -= tl.log(again) / (1 << squaring)
                power *= again.to(tl.float32)
            narrow = power.to(NARROW)
            power = tl.dot(narrow, narrow)
    trace = tl.sum(tl.sum(tl.where(diagonal, power, 0.0), 1), 0).to(tl.float64)
    bound = tl.exp(tl.log(tl.maximum(trace, tiny)) / (1 << SQUARINGS) + logarithm + edge)
    # The vector that grew most, and two steps of Lanczos from it.
    places = tl.arange(0, STARTS)
    begun = tl.load(starts + rows[:, None] * STARTS + places[None, :])
    grown = tl.dot(power.to(NARROW), begun.to(NARROW))
    most = tl.argmax(tl.sum(grown * grown, 0), 0)
    first = tl.sum(tl.where(places[None, :] == most, grown, 0.0), 1).to(tl.float64)
    first /= tl.maximum(tl.sqrt(tl.sum(first * first, 0)), tiny)
    image = tl.sum(gram * first[None, :], 1)
    own = tl.sum(first * image, 0)
    rest = image - own * first
    beside = tl.sqrt(tl.sum(rest * rest, 0))
    second = rest / tl.maximum(beside, tiny)
    other = tl.sum(second * tl.sum(gram * second[None, :], 1), 0)
    half = (own - other) / 2
    largest = other + half + tl.sqrt(half * half + beside * beside)
    tl.store(largest_of + state, largest)
    tl.store(bound_of + state, bound)
    # Positive pivots of an elimination without exchanges.
    for factor in range(FACTORS):
        threshold = (1 + hair) * tl.load(factors + factor) * largest
        left_over = gram - tl.where(diagonal, threshold, 0.0)
        count = 0
        for step in range(d):
            column = tl.sum(tl.where(columns[None, :] == step, left_over, 0.0), 1)
            pivot = tl.sum(tl.where(rows == step, column, 0.0), 0)
            count += tl.where(pivot > 0, 1, 0)
            left_over -= column[:, None] * (column / pivot)[None, :]
        tl.store(ranks_of + state * FACTORS + factor, tl.where(largest > 0, count, 0).to(tl.int64))


# Unwrapped, since a test run puts type checks around every function, and those do not compile.
count = triton.jit(inspect.unwrap(_count))
