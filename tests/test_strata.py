import numpy as np
import pytest
from scipy import stats

from staterank_utils import strata
from staterank_utils.strata import (
    bootstrap,
    cohen_kappa,
    cosine,
    is_high,
    sarle_coefficient,
    share_outside,
    spearman,
    turning_bound,
)

RNG = np.random.default_rng(0)


def test_spearman_agrees_with_scipy_with_and_without_ties() -> None:
    for values in (RNG.normal(size=(2, 40)), RNG.integers(0, 5, size=(2, 40))):
        assert spearman(*values) == pytest.approx(stats.spearmanr(*values).statistic, abs=1e-12)


def test_constant_vectors_have_no_order_and_no_line() -> None:
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))
    assert np.isnan(strata.r_squared([1, 1, 1], [1, 2, 3]))
    assert np.isnan(cosine([0, 0], [1, 2]))
    assert np.isnan(sarle_coefficient([2, 2, 2, 2, 2]))
    assert np.isnan(sarle_coefficient([64, 64, 64, 64 + 2e-14]))


@pytest.mark.parametrize("n", [4, 5, 144])
def test_sarle_agrees_with_scipy(n: int) -> None:
    values = RNG.gamma(2.0, size=n)
    skewness, kurtosis = stats.skew(values, bias=False), stats.kurtosis(values, bias=False)
    expected = (skewness**2 + 1) / (kurtosis + 3 * (n - 1) ** 2 / ((n - 2) * (n - 3)))
    assert sarle_coefficient(values) == pytest.approx(expected, rel=1e-10)


def test_sarle_separates_one_group_from_two() -> None:
    assert sarle_coefficient(RNG.normal(size=4000)) < 0.4
    assert sarle_coefficient(RNG.uniform(size=4000)) == pytest.approx(5 / 9, abs=0.03)
    assert sarle_coefficient(np.r_[np.zeros(200), np.ones(200)] + 0.01 * RNG.normal(size=400)) > 0.95


def test_dip_separates_one_group_from_two() -> None:
    assert strata.dip_p_value(RNG.normal(size=200)) > 0.05
    assert strata.dip_p_value(np.r_[RNG.normal(0, 1, 100), RNG.normal(9, 1, 100)]) < 0.01


def test_share_outside_counts_the_borders() -> None:
    assert share_outside([0.2, 0.8, 0.5, 0.21]) == 0.5


@pytest.mark.parametrize(
    ("a", "b", "kappa"),
    [([1, 1, 0, 0], [1, 1, 0, 0], 1.0), ([1, 1, 0, 0], [0, 0, 1, 1], -1.0), ([1, 0, 1, 0], [1, 1, 0, 0], 0.0)],
    ids=["same", "opposite", "chance"],
)
def test_kappa(a: list[int], b: list[int], kappa: float) -> None:
    assert cohen_kappa(a, b) == pytest.approx(kappa)


def test_kappa_of_one_group_says_nothing() -> None:
    assert np.isnan(cohen_kappa([True, True], [True, True]))
    assert cohen_kappa([True, True], [True, False]) == 0


def test_labels_start_at_half_of_d() -> None:
    assert is_high([31, 32], 64).tolist() == [False, True]
    with pytest.raises(ValueError, match="ranks must lie in"):
        is_high([65], 64)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(200):
        estimate = bootstrap(
            lambda x: float(x.mean()), np.random.default_rng(seed).normal(size=40), n_resamples=300, seed=seed
        )
        hits += estimate.low <= 0 <= estimate.high
    assert 0.88 <= hits / 200 <= 0.99


def test_bootstrap_draws_groups_independently() -> None:
    # Drawn together, a group less itself is 0 in every draw; drawn apart, the variances of the two means add up.
    values = np.random.default_rng(1).normal(size=30)
    one = bootstrap(lambda x: float(x.mean()), values)
    less_itself = bootstrap(lambda x, y: float(x.mean() - y.mean()), values, values)
    assert less_itself.point == 0
    width, expected = less_itself.high - less_itself.low, np.sqrt(2) * (one.high - one.low)
    assert width == pytest.approx(expected, rel=0.15)


def test_bootstrap_repeats_with_its_seed_alone() -> None:
    values = np.random.default_rng(2).normal(size=8)
    one, same, other = (bootstrap(lambda x: float(x.mean()), values, seed=seed) for seed in (3, 3, 4))
    assert one == same != other
    assert one.low < one.point < one.high


def test_bootstrap_refuses_no_prompts_and_passes_nan_on() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        bootstrap(lambda x: 0.0, np.empty((0, 3)))
    assert np.isnan(bootstrap(lambda x: float("nan"), np.ones((2, 3))).low)


def test_turning_bound_is_below_the_cosine_of_any_step_it_allows() -> None:
    for _ in range(500):
        before = RNG.uniform(0, 10, size=6)
        after = np.abs(before + RNG.normal(size=6) * RNG.uniform(0, 5))
        assert cosine(before, after) >= turning_bound(before, float(np.linalg.norm(after - before))) - 1e-12
    with pytest.raises(ValueError, match="not zero"):
        turning_bound([0, 0], 1.0)


@pytest.mark.parametrize("function", [spearman, cosine, cohen_kappa, strata.r_squared])
def test_vectors_over_different_heads_are_refused(function) -> None:
    with pytest.raises(ValueError, match="lengths 3 and 2"):
        function([1, 0, 1], [1, 0])


@pytest.mark.parametrize("function", [sarle_coefficient, strata.dip_p_value])
def test_too_few_heads_are_refused(function) -> None:
    with pytest.raises(ValueError, match="at least 4"):
        function([1.0, 2.0, 3.0])


NOT_FINITE = [0.1, 0.2, float("nan"), 0.4, float("inf")]


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (sarle_coefficient, (NOT_FINITE,)),
        (strata.dip_p_value, (NOT_FINITE,)),
        (share_outside, (NOT_FINITE,)),
        (is_high, (NOT_FINITE, 8)),
        (spearman, (NOT_FINITE, range(5))),
        (cosine, (range(5), NOT_FINITE)),
        (cohen_kappa, (NOT_FINITE, [1, 0, 1, 0, 1])),
        (strata.r_squared, (NOT_FINITE, range(5))),
        (bootstrap, (np.mean, np.array(NOT_FINITE))),
        (bootstrap, (lambda x, y: 0.0, np.ones(3), np.array(NOT_FINITE))),
        (turning_bound, (NOT_FINITE, 1.0)),
    ],
)
def test_numbers_that_are_not_finite_are_refused(function, arguments: tuple) -> None:
    with pytest.raises(ValueError, match="2 of 5 values are NaN or infinite, the first nan at index 2: leave them out"):
        function(*arguments)


def test_a_table_with_a_number_that_is_not_finite_is_refused_by_its_index() -> None:
    with pytest.raises(ValueError, match="1 of 8 values are NaN or infinite, the first nan at index 1, 2"):
        strata.two_groups(np.array([[0.1, 0.2, 0.8, 0.9], [0.1, 0.2, np.nan, 0.9]]))


def test_a_step_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="step nan"):
        turning_bound([3.0, 4.0], float("nan"))


def test_unrelated_heads_keep_their_sizes_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    a = rng.uniform(1, 2, 200)
    assert abs(strata.unrelated(strata.spearman, a, a)) < 0.02
    expected = a.mean() ** 2 / (a**2).mean()
    assert strata.unrelated(strata.cosine, a, a) == pytest.approx(expected, abs=1e-3)
    with pytest.raises(ValueError, match="n_draws must be at least 1, got 0"):
        strata.unrelated(strata.cosine, a, a, n_draws=0)


@pytest.mark.parametrize("together", [1, 1000, strata.DRAWN_TOGETHER])
def test_a_bootstrap_of_means_is_that_of_the_prompts(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    groups = rng.normal(size=(5, 7)), rng.normal(size=(4, 7)), rng.normal(size=5)
    expected = bootstrap(lambda a, b, c: spearman(a.mean(0), b.mean(0)) + c.mean(), *groups)
    monkeypatch.setattr(strata, "DRAWN_TOGETHER", together)
    assert bootstrap(lambda a, b, c: spearman(a, b) + c, *groups, of_means=True) == expected
