"""The Triton kernel of `staterank_utils.inertia`; importing it needs triton."""

import inspect

import triton
import triton.language as tl


def _eliminate(matrices, counts, inverses, pivots, size, stride, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Eliminate the leading block (size, size) of each symmetric matrix (stride, stride), float64, without pivoting.

    With B = L D L^T the block, L unit lower triangular: adds the number of positive pivots D to `counts`, and writes L^-1 and D. A
    program holds one block beside an identity in its registers, both padded to (TILE, TILE) with -1 on the diagonal, which adds no
    positive pivot.
    """
    which = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, TILE)[:, None]
    columns = tl.arange(0, TILE)[None, :]
    inside = (rows < size) & (columns < size)
    one = tl.where(rows == columns, 1.0, 0.0).to(tl.float64)
    at = matrices + which * stride * stride + rows * stride + columns
    rest = tl.where(inside, tl.load(at, mask=inside, other=0.0), -one)
    inverse = one
    count = 0
    found = tl.zeros([TILE], tl.float64)
    for step in range(TILE):
        row = tl.sum(tl.where(rows == step, rest, 0.0), 0)
        of_inverse = tl.sum(tl.where(rows == step, inverse, 0.0), 0)
        pivot = tl.sum(tl.where(tl.arange(0, TILE) == step, row, 0.0), 0)
        count += (pivot > 0).to(tl.int32)
        found = tl.where(tl.arange(0, TILE) == step, pivot, found)
        below = tl.where(tl.arange(0, TILE) > step, row / tl.where(pivot == 0, 1e-300, pivot), 0.0)
        rest -= below[:, None] * row[None, :]
        inverse -= below[:, None] * of_inverse[None, :]
    tl.store(counts + which, tl.load(counts + which) + count)
    tl.store(inverses + which * size * size + rows * size + columns, inverse, mask=inside)
    tl.store(pivots + which * size + tl.arange(0, TILE), found, mask=tl.arange(0, TILE) < size)


# Unwrapped, since a test run puts type checks around every function, and those do not compile.
eliminate = triton.jit(inspect.unwrap(_eliminate))
