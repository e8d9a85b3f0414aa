"""Rank and norm without singular values, held to a float64 SVD."""

import numpy as np
import pytest
import torch
from conftest import OnGpu
from torch import Tensor

from staterank_utils import domain_prompts, inertia, load_model, load_tokenizer, trace_states
from staterank_utils.spectra import (
    effective_rank,
    effective_rank_bounds,
    entropy_rank,
    finite_at_the_end,
    nuclear_norm,
    rank_and_norm,
    stable_rank,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOLERANCE = 1e-4


def with_values(sigma: Tensor, d_k: int, d_v: int, n: int = 8) -> Tensor:
    """States (n, d_k, d_v), float32, with given singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(n, d_k, d_k, dtype=torch.float64, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(n, d_v, d_v, dtype=torch.float64, generator=generator))
    d = min(d_k, d_v)
    return (left[..., :d] * sigma @ right[:, :d]).float()


def planted(d: int, rank: int) -> Tensor:
    return torch.cat([torch.linspace(1, 0.01, rank), torch.full((d - rank,), 1e-6)]).double()


def real_states() -> Tensor:
    model, tokenizer = load_model("hybrid", device="cpu"), load_tokenizer("hybrid")
    prompts = domain_prompts("prose", tokenizer, n_prompts=1, n_tokens=100, seed=0)
    return trace_states(model, prompts, positions=[1, 7, 100]).values.flatten(0, 3)


STATES = {
    "random": torch.randn(8, 32, 32, generator=torch.Generator().manual_seed(0)),
    "decaying": with_values(torch.logspace(0, -8, 64, dtype=torch.float64), 64, 64),
    "planted, wide": with_values(planted(16, 5), 16, 40),
    "planted, high": with_values(planted(48, 47), 100, 48),
    "planted, 128": with_values(planted(128, 70), 128, 128),
    "planted, 256": with_values(planted(256, 200), 256, 256, n=2),
    "flat, 256": with_values(torch.ones(256).double(), 256, 256, n=2),
    "beyond a tile": with_values(planted(160, 140), 160, 256, n=3),
    "largest repeated": with_values(torch.tensor([1.0] * 9 + [1e-2] * 4 + [0.0] * 3).double(), 16, 16),
    "rank 1": with_values(torch.tensor([5.0] + [0.0] * 31).double(), 32, 32),
    "zero": torch.zeros(3, 24, 24),
    "tiny and huge": torch.cat([1e-18 * torch.eye(16)[None], 1e18 * torch.eye(16)[None]]),
    "real": real_states(),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("states", STATES.values(), ids=STATES)
def test_ranks_are_those_of_an_svd_except_on_the_edge(states: Tensor, device: str) -> None:
    sigma = torch.linalg.svdvals(states.double())
    exact = (sigma > TOLERANCE * sigma[:, :1]).sum(-1)
    factors = (1 + inertia.EDGE, 1.0, 1 - inertia.EDGE)
    low, rank, high = (
        inertia.in_chunks(inertia.ranks, states.to(device), rel_tol=TOLERANCE, factors=factors).cpu().unbind(-1)
    )
    sure = low == high
    assert torch.equal(rank[sure], exact[sure])
    assert (low <= exact).all()
    assert (exact <= high).all()
    assert sure.float().mean() > 0.9
    if device == "cuda":
        assert torch.equal(effective_rank(states.to(device)).cpu(), rank)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("states", STATES.values(), ids=STATES)
def test_norms_and_stable_ranks_are_those_of_an_svd(states: Tensor, device: str) -> None:
    sigma = torch.linalg.svdvals(states.double())
    norms = inertia.in_chunks(inertia.nuclear_norms, states.to(device)).cpu()
    torch.testing.assert_close(norms, sigma.sum(-1), rtol=1e-5, atol=0)
    stable = inertia.in_chunks(inertia.stable_ranks, states.to(device)).cpu()
    expected = torch.where(sigma[:, 0] > 0, (sigma / sigma[:, :1]).square().sum(-1), 0.0)
    torch.testing.assert_close(stable, expected, rtol=2e-4, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_states_are_measured_chunk_by_chunk(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    states = STATES["decaying"].to(device)
    whole = inertia.in_chunks(inertia.ranks_and_norms, states, rel_tol=TOLERANCE)
    monkeypatch.setattr(inertia, "NUMBERS_AT_ONCE", 3 * states[0].numel())
    parts = inertia.in_chunks(inertia.ranks_and_norms, states, rel_tol=TOLERANCE)
    assert torch.equal(parts[:, 0], whole[:, 0])
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=0)


def test_an_interval_narrower_than_a_gpu_is_exact_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 0.001 on a GPU.* got 0.0001.*CPU"):
        effective_rank_bounds(torch.eye(3).as_subclass(OnGpu), within=1e-4)
    low, high = effective_rank_bounds(torch.diag(torch.tensor([1.0, 1.0005e-4])), within=1e-4)
    assert (low.item(), high.item()) == (2, 2)


def test_no_more_are_measured_together_than_half_of_the_free_memory_is_enough_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (11_000, 80_000))
    assert inertia._numbers_at_once(gpu) == 11_200 // (2 * inertia.BYTES_A_NUMBER)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**12, 10**12))
    assert inertia._numbers_at_once(gpu) == inertia._numbers_at_once(torch.device("cpu")) == inertia.NUMBERS_AT_ONCE


@pytest.mark.parametrize("device", DEVICES)
def test_the_public_measures_agree_on_every_device(device: str) -> None:
    states = STATES["real"][:24].view(2, 3, 4, 64, 64)
    here = states.to(device)
    results = rank_and_norm(here), *effective_rank_bounds(here), stable_rank(here), entropy_rank(here)
    assert all(result.device == here.device for result in results)
    both, low, high, stable, _ = (result.cpu() for result in results)
    assert torch.equal(both[..., 0].long(), effective_rank(states))
    torch.testing.assert_close(both[..., 1], nuclear_norm(states), rtol=1e-5, atol=0)
    torch.testing.assert_close(stable, stable_rank(states), rtol=2e-4, atol=0)
    assert (low <= both[..., 0]).all()
    assert (both[..., 0] <= high).all()


@pytest.mark.parametrize("device", DEVICES)
def test_bad_states_and_tolerances_are_refused(device: str) -> None:
    broken = torch.full((1, 4, 4), torch.nan, device=device)
    for measure in (effective_rank, nuclear_norm, stable_rank):
        with pytest.raises(ValueError, match="NaN or an infinity"):
            measure(broken)
        with pytest.raises(ValueError, match="NaN or an infinity"), finite_at_the_end():
            measure(broken)
    with pytest.raises(ValueError, match="NaN or an infinity"), finite_at_the_end():
        entropy_rank(broken)
    with pytest.raises(ValueError, match="rel_tol must be in"):
        effective_rank(torch.ones(4, 4, device=device), rel_tol=1.0)
    with pytest.raises(ValueError, match="within must be in"):
        effective_rank_bounds(torch.ones(4, 4, device=device), within=0.0)


def test_the_largest_eigenvalue_is_found_where_nothing_stands_out() -> None:
    values = torch.cat([torch.linspace(1, 1 + 2e-4, 64), torch.zeros(64)]).double()
    basis, _ = torch.linalg.qr(torch.randn(128, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    found, scales = inertia.largest_eigenvalue((basis * values @ basis.T)[None])
    assert -1e-4 < found.item() / (1 + 2e-4) - 1 <= 1e-12
    assert inertia.upper_bound(scales).item() > 1 + 2e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("d", [16, 64])
def test_the_largest_eigenvalue_is_found_in_whatever_direction_it_lies(d: int, device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    basis, _ = torch.linalg.qr(torch.randn(3000, d, d, dtype=torch.float64, generator=generator))
    values = torch.cat([torch.ones(1), 0.2 * torch.rand(d - 1, generator=generator)]).double()
    found, scales = inertia.largest_eigenvalue((basis * values @ basis.mT).to(device))
    assert (1 - found).abs().max() < 1e-5
    assert (inertia.upper_bound(scales) > 1).all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_value_equal_to_the_threshold_does_not_count_and_spoils_nothing(device: str) -> None:
    state = torch.diag(torch.tensor([TOLERANCE, 1.0, 0.5, 1e-6], dtype=torch.float64)).to(device)
    assert inertia.ranks(state[None], rel_tol=TOLERANCE).tolist() == [[2]]


def test_an_eigenvector_that_no_large_column_sees_is_found() -> None:
    """Two blocks of the Gram matrix: the largest eigenvalue is spread over one, the largest diagonal entry is in the other."""
    state = torch.zeros(1, 128, 128)
    state[0, 0, :127], state[0, 1, 127] = 127**-0.5, 1 - 1.1e-3
    sigma = torch.linalg.svdvals(state.double())
    torch.testing.assert_close(inertia.nuclear_norms(state), sigma.sum(-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(inertia.stable_ranks(state), (sigma / sigma[:, :1]).square().sum(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("width", [0.3, 0.1, 0.03, 0.01, 5e-3, 2e-3, 1e-3, 3e-4, 1e-4, 0.0])
@pytest.mark.parametrize("shape", ["even", "two", "edge", "root"])
@pytest.mark.parametrize("d", [16, 64, 128, 256])
def test_no_crowd_of_eigenvalues_moves_the_largest_by_more_than_is_said(width: float, shape: str, d: int) -> None:
    even = torch.linspace(0, 1, d).double()
    share = {"even": even, "two": torch.ones_like(even), "edge": even**2, "root": even**0.5}[shape].clone()
    share[0] = 0
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(4, d, d, dtype=torch.float64, generator=generator))
    basis = torch.cat([basis, torch.eye(d).double()[None]])
    found, scales = inertia.largest_eigenvalue(basis * (1 - width * share) @ basis.mT)
    assert (1 - found).max() < 1e-3
    assert (found <= 1 + 1e-12).all()
    bound = inertia.upper_bound(scales)
    assert (bound > 1).all()
    assert (bound < d ** (1 / 2**inertia.SQUARINGS) * (1 + 2 * inertia.EDGE)).all()


def test_the_polynomials_take_few_steps_and_never_leave_their_interval() -> None:
    steps, x = inertia.quintics(inertia.NORM_ERROR / 256, inertia.NORM_ERROR / 4), np.logspace(-9, 0, 400)
    for a, b, c in steps:
        x = a * x + b * x**3 + c * x**5
    assert len(steps) <= 15
    assert (x > 0).all()
    assert x.max() <= 1 + inertia.NORM_ERROR / 4
