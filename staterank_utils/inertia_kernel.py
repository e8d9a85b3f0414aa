"""The Triton kernel of `staterank_utils.inertia`; importing it needs triton."""

import inspect

import triton
import triton.language as tl


def _count(matrices, counts, size, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Eliminate one symmetric matrix (size, size), float64, without pivoting, and count its positive pivots.

    A program holds the matrix in its registers, padded to (TILE, TILE) with -1 on the diagonal, which adds no positive pivot.
    """
    which = tl.program_id(0)
    rows = tl.arange(0, TILE)[:, None]
    columns = tl.arange(0, TILE)[None, :]
    inside = (rows < size) & (columns < size)
    padding = tl.where(rows == columns, -1.0, 0.0).to(tl.float64)
    at = matrices + which.to(tl.int64) * size * size + rows * size + columns
    rest = tl.where(inside, tl.load(at, mask=inside, other=0.0), padding)
    count = 0
    for step in range(size):
        row = tl.sum(tl.where(rows == step, rest, 0.0), 0)
        column = tl.sum(tl.where(columns == step, rest, 0.0), 1)
        pivot = tl.sum(tl.where(tl.arange(0, TILE) == step, row, 0.0), 0)
        count += (pivot > 0).to(tl.int32)
        scaled = row / tl.where(pivot == 0, 1e-300, pivot)
        rest -= column[:, None] * scaled[None, :]
    tl.store(counts + which, count)


# Unwrapped, since a test run puts type checks around every function, and those do not compile.
count_positive_pivots = triton.jit(inspect.unwrap(_count))
