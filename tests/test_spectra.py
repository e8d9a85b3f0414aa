import pytest
import torch
from conftest import unchecked

from staterank_utils.spectra import Spectrum, effective_rank, entropy_rank, nuclear_norm, singular_values, stable_rank

SHAPES = [(16, 16), (64, 64), (8, 24), (24, 8), (128, 64)]
# Eigenvalues of a Gram matrix in float64 lose half the digits of a small singular value, about 1e-8 of the largest.
GRAM_TOLERANCE = 1e-7


def planted(sigma: torch.Tensor, d_k: int, d_v: int, seed: int = 0) -> torch.Tensor:
    """A float64 matrix with known singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(d_k, d_k, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(d_v, d_v, generator=generator, dtype=torch.float64))
    return left[:, : len(sigma)] @ torch.diag(sigma.double()) @ right[: len(sigma)]


@pytest.mark.parametrize(("d_k", "d_v"), SHAPES)
@pytest.mark.parametrize("rank", [0, 1, 3, 8])
def test_planted_rank_is_found(d_k: int, d_v: int, rank: int) -> None:
    state = planted(torch.logspace(0, -3, rank), d_k, d_v) if rank else torch.zeros(d_k, d_v, dtype=torch.float64)
    assert effective_rank(state).item() == rank
    assert effective_rank(state.float()).item() == rank


@pytest.mark.parametrize(("d_k", "d_v"), SHAPES)
def test_fast_path_agrees_with_float64_svd(d_k: int, d_v: int) -> None:
    for seed in range(5):
        state = planted(torch.logspace(0, -7, min(d_k, d_v)), d_k, d_v, seed).float()
        exact = torch.linalg.svdvals(state.double())
        assert (singular_values(state) - exact).abs().max() < GRAM_TOLERANCE * exact[0]


def test_threshold_is_strict_and_relative() -> None:
    state = torch.diag(torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64))
    assert effective_rank(state, rel_tol=0.5).item() == 1
    assert effective_rank(1e-30 * state, rel_tol=0.49).item() == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_dtype_is_widened(dtype: torch.dtype) -> None:
    state = torch.diag(torch.tensor([4.0, 2.0, 1.0])).to(dtype)
    assert singular_values(state).dtype == torch.float64
    torch.testing.assert_close(singular_values(state), torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_measures_do_not_see_scale_or_transposition(scale: float) -> None:
    state = torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(1))
    for measure in (effective_rank, stable_rank, entropy_rank):
        torch.testing.assert_close(measure(scale * state).double(), measure(state.mT).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(nuclear_norm(scale * state), scale * nuclear_norm(state), rtol=1e-5, atol=0)


def test_leading_axes_are_kept() -> None:
    assert effective_rank(torch.randn(2, 3, 5, 4, 4)).shape == (2, 3, 5)
    assert singular_values(torch.randn(2, 3, 6, 4)).shape == (2, 3, 4)


def test_a_zero_state_has_rank_zero_by_every_measure() -> None:
    zero = torch.zeros(4, 4)
    assert [measure(zero).item() for measure in (effective_rank, stable_rank, entropy_rank, nuclear_norm)] == [
        0,
        0,
        0,
        0,
    ]


def test_rank_one_by_every_measure() -> None:
    state = torch.outer(torch.arange(1.0, 9.0), torch.arange(2.0, 10.0))
    assert effective_rank(state).item() == 1
    assert stable_rank(state).item() == pytest.approx(1, abs=1e-9)
    assert entropy_rank(state).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("state", "word"),
    [
        (torch.full((2, 2), float("nan")), "NaN"),
        (torch.full((2, 2), float("inf")), "infinity"),
        (torch.ones(3), "matrix"),
        (torch.ones(2, 2, dtype=torch.int64), "int64"),
        (torch.ones(2, 2, dtype=torch.complex64), "complex64"),
    ],
    ids=["nan", "inf", "vector", "integer", "complex"],
)
def test_bad_states_are_refused(state: torch.Tensor, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        unchecked(singular_values)(state)


@pytest.mark.parametrize("rel_tol", [0.0, 1.0, -1e-4, 2.0])
def test_bad_thresholds_are_refused(rel_tol: float) -> None:
    with pytest.raises(ValueError, match="rel_tol"):
        Spectrum(torch.ones(2)).effective_rank(rel_tol=rel_tol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_threshold_below_the_resolution_of_the_state_is_refused(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    state = (torch.randn(32, 1, generator=generator) @ torch.randn(1, 32, generator=generator)).to(dtype)
    with pytest.raises(ValueError, match="below the resolution"):
        effective_rank(state)
    assert effective_rank(state, rel_tol=0.05).item() == 1


def test_a_state_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row and one column"):
        effective_rank(torch.zeros(3, 0))
