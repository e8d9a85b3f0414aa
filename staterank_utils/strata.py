"""From ranks to groups of heads: are there two, and do they last?

Statistics here take NumPy arrays (or anything that NumPy reads) over heads. `bootstrap` gives any of them an interval by
drawing the prompts anew, because prompts are what a measurement could have drawn differently.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import diptest
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

# NumPy's own ArrayLike is a protocol: a type checker at run time, as tests have one, takes longer over it than the statistics.
Numbers = NDArray[Any] | Sequence[Any] | Tensor
LOW_UNDER = 0.5  # a head is low under this share of d, high from it
GAP = (0.2, 0.8)  # "between the groups", in shares of d
DRAWN_TOGETHER = 2**21  # numbers that a bootstrap holds at once


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; a format goes for all three of its numbers, and powers of ten are written out.

    An interval without width, as of one window, is not written, nor is one that is not known, and a NaN is "undefined".

    Attributes:
        point: the statistic on all prompts.
        low, high: ends of the interval.

    Example:
        >>> print(Estimate(0.95, 0.9, 0.97))
        0.950 [0.900, 0.970]
        >>> f"{Estimate(0.95, 0.9, 0.97):.0%}", f"{Estimate(674.1, 243.2, 1850.0):.3g}"
        ('95% [90%, 97%]', '674 [243, 1,850]')
        >>> f"{Estimate(0.5, 0.5, 0.5):.2f}", f"{Estimate(math.nan, math.nan, math.nan):.2f}"
        ('0.50', 'undefined')
    """

    point: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        if math.isnan(self.point):
            return "undefined"
        texts = [without_minus(format(number, spec or ".3f")) for number in (self.point, self.low, self.high)]
        numbers = zip(texts, (self.point, self.low, self.high), strict=True)
        point, low, high = (f"{number:,.0f}" if "e+" in text else text for text, number in numbers)
        return point if self.low == self.high or math.isnan(self.low) else f"{point} [{low}, {high}]"

    def __str__(self) -> str:
        return format(self)


def without_minus(number: str) -> str:
    """A number in digits; one that is rounded to 0 has no sign.

    Example:
        >>> without_minus("-0.00"), without_minus("-0.01"), f"{Estimate(-0.001, -0.2, 0.0):.1f}"
        ('0.00', '-0.01', '0.0 [-0.2, 0.0]')
    """
    return number.removeprefix("-") if not number.strip("-0.") else number


class UndefinedError(ValueError):
    """A statistic is defined on the prompts as they are, and not on some draws of them.

    Example:
        >>> bootstrap(lambda x: x.mean() if np.ptp(x) else np.nan, np.array([1.0, 2.0]))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        staterank_utils.strata.UndefinedError: the statistic is 1.5 on the prompts but undefined on ... of 1000 draws of them: raise n_prompts
    """


def bootstrap(
    statistic: Callable[..., float],
    *groups: NDArray[np.float64],
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    of_means: bool = False,
    strict: bool = True,
) -> Estimate:
    """A statistic of prompts, with its percentile bootstrap interval.

    Args:
        statistic: takes as many arrays as there are groups, returns a number.
        groups: arrays with prompts along axis 0. Groups are drawn independently of each other; what was measured on the
            same prompts belongs into one group.
        n_resamples: how often all prompts are drawn anew, with replacement.
        level: of the interval.
        seed: of the draws.
        of_means: the statistic takes the mean of every group over its prompts, not the group: the same number, faster.
        strict: every draw must define the statistic, as a claim needs it; otherwise the number has no interval where one does not.

    Returns:
        The statistic on the prompts as they are, and the interval. With one prompt a group, the interval is the point.

    Raises:
        ValueError: a group has no prompts or holds a NaN or infinity.
        UndefinedError: a draw gives NaN where the prompts as they are do not, and `strict`.

    Example:
        >>> estimate = bootstrap(lambda x: x.mean(), np.array([1.0, 2.0, 3.0]))
        >>> estimate.point, estimate.low >= 1.0, estimate.high <= 3.0
        (2.0, True, True)
        >>> bootstrap(lambda x: 1.0 if x.any() else float("nan"), np.array([0.0, 1.0]), strict=False)
        Estimate(point=1.0, low=nan, high=nan)
    """
    groups = tuple(np.asarray(group, dtype=np.float64) for group in groups)
    if not groups or any(len(group) == 0 for group in groups):
        raise ValueError(f"need at least one prompt in every group, got {[len(group) for group in groups]}")
    for group in groups:
        _finite(group, "bootstrap")
    point = float(statistic(*(group.mean(0) if of_means else group for group in groups)))
    drawn = _drawn(groups, n_resamples, np.random.default_rng(seed), of_means=of_means)
    draws = np.array([statistic(*of_groups) for of_groups in drawn])
    if np.isnan(point):
        return Estimate(point, float("nan"), float("nan"))
    if np.isnan(draws).any() and not strict:
        return Estimate(point, float("nan"), float("nan"))
    if np.isnan(draws).any():
        raise UndefinedError(
            f"the statistic is {point:.3g} on the prompts but undefined on {np.isnan(draws).sum()} of {n_resamples} draws of them: raise n_prompts"
        )
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(point, float(low), float(high))


def _drawn(
    groups: Sequence[NDArray[np.float64]], n_resamples: int, rng: np.random.Generator, *, of_means: bool
) -> Iterator[tuple[NDArray[np.float64], ...]]:
    """The groups with their prompts drawn anew, or the means of these, once per resample; many are drawn together."""
    together = max(1, DRAWN_TOGETHER // max(1, sum(group.size for group in groups)))
    for start in range(0, n_resamples, together):
        picked = [
            [rng.integers(len(group), size=len(group)) for group in groups]
            for _ in range(min(together, n_resamples - start))
        ]
        drawn = (group[np.array(of)] for group, of in zip(groups, zip(*picked, strict=True), strict=True))
        yield from zip(*(of.mean(1) if of_means else of for of in drawn), strict=True)


def _finite(values: Numbers, what: str) -> NDArray[np.float64]:
    """Values as float64; refuses NaN and infinity, of which most statistics would make a number that means nothing."""
    x = np.asarray(values, dtype=np.float64)
    if not np.isfinite(x).all():
        x = np.atleast_1d(x)
        where = np.argwhere(~np.isfinite(x))
        first = tuple(where[0].tolist())
        raise ValueError(
            f"{what} needs finite numbers, but {len(where)} of {x.size} values are NaN or infinite, "
            f"the first {x[first]} at index {', '.join(map(str, first))}: leave them out, or mend what they come from"
        )
    return x


def paired_difference(first: Numbers, second: Numbers) -> Estimate:
    """Mean of first minus second, both measured on the same prompts, with its bootstrap interval over prompts.

    Args:
        first, second: one number per prompt, in the same order and unit.

    Raises:
        ValueError: not as many of one as of the other, none, or a NaN or infinity.

    Example:
        >>> paired_difference([1.0, 1.0, 0.0], [0.0, 1.0, 0.0]).point
        0.3333333333333333
    """
    x, y = (np.asarray(values, dtype=np.float64).ravel() for values in (first, second))
    if len(x) != len(y):
        raise ValueError(f"expected values on the same prompts, got {len(x)} and {len(y)}")
    return bootstrap(float, x - y, of_means=True)


def exactly(value: float) -> Estimate:
    """A number without uncertainty, such as a count.

    Args:
        value: the number.

    Returns:
        The number with an interval that is the number.

    Example:
        >>> exactly(3.0)
        Estimate(point=3.0, low=3.0, high=3.0)
    """
    return Estimate(float(value), float(value), float(value))


def spread(values: Numbers) -> Estimate:
    """The mean of values with their whole range, as for random draws, of which there are few.

    Args:
        values: one a draw, at least one.

    Raises:
        ValueError: no values, or a NaN or infinity.

    Example:
        >>> spread([0.25, 0.5, 0.75])
        Estimate(point=0.5, low=0.25, high=0.75)
    """
    numbers = _finite(values, "spread")
    if not numbers.size:
        raise ValueError("spread needs at least one value, got none")
    return Estimate(float(numbers.mean()), float(numbers.min()), float(numbers.max()))


# ---------------------------------------------------------------- two groups


def is_high(rank: Numbers, d: int) -> NDArray[np.bool_]:
    """Label heads: True from half of d on.

    Args:
        rank: effective ranks, any shape, 0..d.
        d: largest possible rank.

    Raises:
        ValueError: d is under 1, or a rank is NaN or lies outside 0..d.

    Example:
        >>> is_high([3, 32, 64], 64)
        array([False,  True,  True])
    """
    values = _finite(rank, "a label")
    if d < 1 or not ((values >= 0) & (values <= d)).all():
        raise ValueError(f"ranks must lie in 0..d with d >= 1; got d={d} and ranks {values.min()} to {values.max()}")
    return values >= LOW_UNDER * d


def sarle_coefficient(values: Numbers) -> float:
    """Sarle's bimodality coefficient: 5/9 for a uniform distribution, more for two groups, at most 1.

    Source: SAS/STAT User's Guide, CLUSTER procedure: (skewness^2 + 1) / (excess kurtosis + 3 (n-1)^2 / ((n-2)(n-3))), with
    the unbiased sample skewness and kurtosis.

    Args:
        values: at least 4 numbers.

    Returns:
        The coefficient; NaN where all values are equal, to rounding.

    Raises:
        ValueError: fewer than 4 values, or a NaN or infinity.

    Example:
        >>> sarle_coefficient([0.0, 1.0] * 24) > 5 / 9
        True
    """
    x = _finite(values, "Sarle's coefficient").ravel()
    n = len(x)
    if n < 4:
        raise ValueError(f"Sarle's coefficient needs at least 4 values, got {n}")
    # scipy's skew and kurtosis in numpy: on a few hundred heads their checks take ten times as long as the sums, and bootstraps draw 1,000 times
    second, third, fourth = (np.mean((x - x.mean()) ** power) for power in (2, 3, 4))
    if second <= (np.finfo(np.float64).resolution * x.mean()) ** 2:
        return float("nan")
    skewness = np.sqrt(n * (n - 1)) / (n - 2) * third / second**1.5
    kurtosis = ((n**2 - 1) * fourth / second**2 - 3 * (n - 1) ** 2) / ((n - 2) * (n - 3))
    return float((skewness**2 + 1) / (kurtosis + 3 * (n - 1) ** 2 / ((n - 2) * (n - 3))))


def dip_p_value(values: Numbers) -> float:
    """p value of Hartigan's dip test against one group (unimodality), from the tables of the diptest package.

    Source: Hartigan and Hartigan, Annals of Statistics 13(1), 1985.

    Args:
        values: at least 4 numbers.

    Raises:
        ValueError: fewer than 4 values, or a NaN or infinity.

    Example:
        >>> dip_p_value(np.r_[np.linspace(0, 0.1, 50), np.linspace(0.9, 1, 50)]) < 0.05
        True
    """
    x = _finite(values, "the dip test").ravel()
    if len(x) < 4:
        raise ValueError(f"the dip test needs at least 4 values, got {len(x)}")
    return float(diptest.diptest(x)[1])


def two_groups(values: Numbers) -> dict[str, Estimate]:
    """The registered evidence for two groups (claim C1): Sarle's coefficient, dip p value, share outside the gap.

    Args:
        values: relative ranks r/d, (prompt, head); the statistics are of the means over prompts.

    Returns:
        "Sarle", "dip p" and "share outside" -> the number with its interval, in this order.

    Raises:
        ValueError: no prompts, fewer than 4 heads, or a NaN or infinity.

    Example:
        >>> list(two_groups(np.tile([0.0, 1.0, 0.1, 0.9], (3, 10))))
        ['Sarle', 'dip p', 'share outside']
    """
    statistics = {"Sarle": sarle_coefficient, "dip p": dip_p_value, "share outside": share_outside}
    return {label: bootstrap(f, np.asarray(values), of_means=True) for label, f in statistics.items()}


def share_outside(values: Numbers, *, gap: tuple[float, float] = GAP) -> float:
    """Share of the values that are not strictly inside the gap.

    Args:
        values: relative ranks r/d, any shape.
        gap: its two ends, in shares of d.

    Raises:
        ValueError: a NaN or infinity.

    Example:
        >>> share_outside([0.0, 0.5, 1.0, 0.1])
        0.75
    """
    x = _finite(values, "the share outside the gap").ravel()
    return float(((x <= gap[0]) | (x >= gap[1])).mean())


def two_group_share(values: Numbers, *, gap: tuple[float, float] = GAP) -> float:
    """The smaller of the share of values under the gap and the share over it: 0 where there is one group alone, at most 0.5.

    Args:
        values: relative ranks r/d, any shape.
        gap: its two ends, in shares of d.

    Raises:
        ValueError: a NaN or infinity.

    Example:
        >>> two_group_share([0.0, 0.1, 0.5, 1.0]), two_group_share([1.0, 1.0])
        (0.25, 0.0)
    """
    x = _finite(values, "the two-group share").ravel()
    return float(min((x < gap[0]).mean(), (x > gap[1]).mean()))


def explained(predicted: Numbers, measured: Numbers) -> float:
    """R^2 of a prediction as it stands, 1 - SSE/SST, with nothing fitted; NaN where nothing varies.

    Args:
        predicted, measured: one number per head, at least 2 heads.

    Raises:
        ValueError: as in `spearman`.

    Example:
        >>> explained([1, 2, 3], [1, 2, 4]), explained([3, 3, 3], [1, 2, 3]) < 0
        (0.7857142857142857, True)
    """
    x, y = _pair(predicted, measured)
    total = float(((y - y.mean()) ** 2).sum())
    return 1 - float(((x - y) ** 2).sum()) / total if total > 0 else float("nan")


# ---------------------------------------------------------------- the same groups?


def _pair(a: Numbers, b: Numbers) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = (_finite(values, "a comparison of two vectors").ravel() for values in (a, b))
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(
            f"expected two vectors over the same heads, at least 2 of them; got lengths {len(x)} and {len(y)}"
        )
    return x, y


def spearman(a: Numbers, b: Numbers) -> float:
    """Spearman's rank correlation of two vectors over heads, ties at their mean rank; NaN where a vector is constant.

    Args:
        a, b: one number per head, at least 2 heads.

    Raises:
        ValueError: the vectors differ in length, have fewer than 2 values, or hold a NaN or infinity.

    Example:
        >>> spearman([1, 2, 3], [10, 20, 40])
        1.0
    """
    x, y = (_ranks(values) for values in _pair(a, b))
    x, y = x - x.mean(), y - y.mean()
    norm = np.sqrt((x @ x) * (y @ y))
    return float(np.clip(x @ y / norm, -1, 1)) if norm > 0 else float("nan")


def _ranks(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1, ties at their mean: those of scipy.stats.rankdata, ten times as fast on a few hundred heads."""
    ordered = np.sort(x)
    return (np.searchsorted(ordered, x, side="left") + np.searchsorted(ordered, x, side="right") + 1) / 2


def cosine(a: Numbers, b: Numbers) -> float:
    """Cosine of the angle between two vectors over heads; NaN where one is zero.

    Args:
        a, b: one number per head, at least 2 heads.

    Raises:
        ValueError: as in `spearman`.

    Example:
        >>> cosine([1, 0], [1, 0])
        1.0
    """
    x, y = _pair(a, b)
    norm = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / norm) if norm > 0 else float("nan")


def cohen_kappa(a: Numbers, b: Numbers) -> float:
    """Agreement of two labellings beyond chance: 1 for the same labels, 0 for what chance would give.

    Source: Cohen, Educational and Psychological Measurement 20(1), 1960.

    Args:
        a, b: labels over the same heads, True or False.

    Returns:
        The coefficient; NaN where both labellings put every head into one and the same group, which says nothing.

    Raises:
        ValueError: as in `spearman`.

    Example:
        >>> cohen_kappa([True, True, False, False], [True, False, False, False])
        0.5
    """
    x, y = _pair(a, b)
    by_chance = x.mean() * y.mean() + (1 - x.mean()) * (1 - y.mean())
    return float(((x == y).mean() - by_chance) / (1 - by_chance)) if by_chance < 1 else float("nan")


def r_squared(x: Numbers, y: Numbers) -> float:
    """Share of the variance of `y` that a straight line in `x` explains; NaN where one is constant.

    Args:
        x, y: one number per head, at least 2 heads.

    Raises:
        ValueError: as in `spearman`.

    Example:
        >>> round(r_squared([0, 1, 2], [1, 3, 5]), 6)
        1.0
    """
    a, b = _pair(x, y)
    a, b = a - a.mean(), b - b.mean()
    norm = (a @ a) * (b @ b)
    return float((a @ b) ** 2 / norm) if norm > 0 else float("nan")


def turning(vectors: Numbers, positions: Sequence[int]) -> NDArray[np.float64]:
    """How far a vector over heads turns at each token, beside what allows it.

    Args:
        vectors: n(t), (prompt, position, head).
        positions: t of each; only pairs of neighbouring tokens are used.

    Returns:
        Rows (t, cosine of n(t) and n(t-1), `turning_bound`, the bound of plane geometry sqrt(1 - r^2)), prompt by prompt.
        B is the largest step of a prompt among the pairs used, which is at most the paper's.

    Raises:
        ValueError: no two positions are neighbours.

    Example:
        >>> turning([[[1.0, 0.0], [1.0, 0.1]]], [4, 5])[:, :2].round(3).tolist()
        [[5.0, 0.995]]
    """
    pairs = [i for i in range(1, len(positions)) if positions[i] == positions[i - 1] + 1]
    if not pairs:
        raise ValueError(f"no two of the positions {list(positions)} are neighbours")
    rows = []
    for path in np.asarray(vectors, dtype=np.float64):
        largest = max(float(np.linalg.norm(path[i] - path[i - 1])) for i in pairs)
        for i in pairs:
            ratio = largest / float(np.linalg.norm(path[i - 1]))
            plane = np.sqrt(max(0.0, 1 - ratio**2))
            rows.append((positions[i], cosine(path[i], path[i - 1]), turning_bound(path[i - 1], largest), plane))
    return np.array(rows)


def turning_bound(before: Numbers, largest_step: float) -> float:
    """Lower bound on cos(n(t), n(t-1)) from the length of n(t-1) and the largest step B.

    Source: Theorem 4.4, Eq. 13 of arXiv:2602.02195, as reported by an independent reader: (1 - r) / (1 + r) with
    r = B / ||n(t-1)||.

    Args:
        before: n(t-1), over heads; not all zero.
        largest_step: B, in the same unit.

    Raises:
        ValueError: n(t-1) is zero or not finite, or B is negative or NaN.

    Example:
        >>> turning_bound([3.0, 4.0], 1.0)
        0.6666666666666667
    """
    length = float(np.linalg.norm(_finite(before, "the bound")))
    if length == 0 or not largest_step >= 0:
        raise ValueError(f"need a vector that is not zero and a step >= 0, got length {length} and step {largest_step}")
    r = largest_step / length
    return (1 - r) / (1 + r)


def unrelated(
    similarity: Callable[[Numbers, Numbers], float],
    a: Numbers,
    b: Numbers,
    *,
    n_draws: int = 1000,
    seed: int = 0,
) -> float:
    """Mean similarity when it is forgotten which head is which: the null of a permutation test.

    Args:
        similarity: such as `cosine` or `spearman`.
        a, b: vectors over the same heads; the first is put into random orders.
        n_draws: orders, at least 1.
        seed: of the orders.

    Raises:
        ValueError: no draws; otherwise as `similarity` raises.

    Example:
        >>> round(unrelated(cosine, [1.0, 1.0], [2.0, 0.0]), 6) == round(cosine([1.0, 1.0], [2.0, 0.0]), 6)
        True
    """
    if n_draws < 1:
        raise ValueError(f"n_draws must be at least 1, got {n_draws}")
    rng = np.random.default_rng(seed)
    return float(np.mean([similarity(rng.permutation(np.asarray(a)), b) for _ in range(n_draws)]))


# ---------------------------------------------------------------- over prompts and inputs


def _mean(table: Numbers) -> NDArray[np.float64]:
    """Over prompts, the first axis."""
    return np.asarray(np.asarray(table, dtype=np.float64).mean(0))


def mean_spearman(x: Numbers, y: Numbers) -> float:
    """`spearman` of two tables, each first averaged over its prompts.

    Args:
        x, y: (prompt, head), the same heads; the numbers of prompts may differ.

    Raises:
        ValueError: as in `spearman`.

    Example:
        >>> mean_spearman([[1, 2, 3], [1, 3, 4]], [[1, 5, 7]])
        1.0
    """
    return spearman(_mean(x), _mean(y))


def mean_kappa(d: int) -> Callable[[Numbers, Numbers], float]:
    """A function like `mean_spearman`, for `cohen_kappa` of the labels that `is_high` gives to mean ranks.

    Args:
        d: largest possible rank.

    Returns:
        (table, table) -> kappa; its tables are ranks (prompt, head), 0..d.

    Example:
        >>> mean_kappa(4)([[1, 4], [1, 4]], [[0, 3]])
        1.0
    """
    return lambda x, y: cohen_kappa(is_high(_mean(x), d), is_high(_mean(y), d))


def pairwise(statistic: Callable[[Numbers, Numbers], float], groups: Sequence[Numbers]) -> NDArray[np.float64]:
    """Matrix of a statistic over every pair of groups.

    Args:
        statistic: (group, group) -> number, such as `mean_spearman`.
        groups: tables (prompt, head), one per input.

    Returns:
        (group, group), float64; the diagonal compares a group with itself.

    Example:
        >>> pairwise(mean_spearman, [[[1, 2]], [[2, 1]]])
        array([[ 1., -1.],
               [-1.,  1.]])
    """
    return np.array([[statistic(a, b) for b in groups] for a in groups])


def off_diagonal(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values of a symmetric matrix over pairs of different groups, each pair once.

    Args:
        matrix: (group, group), such as `pairwise` gives.

    Returns:
        n (n - 1) / 2 values for n groups, row by row.

    Example:
        >>> off_diagonal(np.array([[1.0, 0.5], [0.5, 1.0]]))
        array([0.5])
    """
    return matrix[np.triu_indices(len(matrix), 1)]


def smallest_over_pairs(
    statistic: Callable[[Numbers, Numbers], float], groups: Sequence[NDArray[np.float64]], *, n_resamples: int = 500
) -> Estimate:
    """The least agreement between any two groups, with its interval; every group's prompts are drawn anew.

    The least of several noisy numbers lies below the least of their expectations, so the interval leans downwards.

    Args:
        statistic: such as `mean_spearman`.
        groups: tables (prompt, head), one per input.
        n_resamples: as in `bootstrap`.

    Raises:
        ValueError: as in `bootstrap`, or fewer than 2 groups.

    Example:
        >>> smallest_over_pairs(mean_spearman, [np.array([[1.0, 2, 3]]), np.array([[1.0, 3, 2]])]).point
        0.5
    """
    return bootstrap(
        lambda *drawn: float(np.min([statistic(a, b) for a, b in itertools.combinations(drawn, 2)])),
        *groups,
        n_resamples=n_resamples,
    )
