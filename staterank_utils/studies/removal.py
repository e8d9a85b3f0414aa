"""What a model loses without some of its heads: added nats on held-out text, for every order, scheme and dose."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from staterank_utils import claims
from staterank_utils.architectures import state_size
from staterank_utils.budget import in_words, weight_bytes
from staterank_utils.evaluation import token_nats
from staterank_utils.results import STORED
from staterank_utils.selection import SHARES, saturation_scores
from staterank_utils.strata import Estimate, bootstrap, exactly, spearman, spread
from staterank_utils.studies.groups import HeadTrace, Row, trace_heads
from staterank_utils.studies.texts import LOSS_TEXTS, Texts, over_texts
from staterank_utils.surgery import Head, ablate_heads, all_heads
from staterank_utils.tasks import NATURAL_DOMAINS

SIXTEENTHS = tuple(Fraction(k, 16) for k in (1, 2, 4, 5, 6, 7, 8))  # the doses of every scheme
AREA = SIXTEENTHS[:4]  # over which D is taken
MODEL, LAYERS, PROTECTED = "over the model", "layer-matched", "layer 0 protected"
SCHEMES = (MODEL, LAYERS, PROTECTED)
RANDOM = "random"
LOW, HIGH, JOINT, INVERTED = "low rank", "high rank", "joint", "joint, norm inverted"
ORDERS = (LOW, HIGH, "slow decay", "fast decay", "large norm", "small norm", JOINT, INVERTED)
BINS = {
    "under 128": (0, 128),
    "128 to 512": (128, 512),
    "over 512": (512, None),
}  # positions of the token that is predicted
DAMAGE_FILE = STORED / "damage.json"  # of each head alone, written by training/damage.py
DRAWS_FILE = STORED / "draws.json"  # of more random heads, written by training/draws.py
POSITION_DOSES = (Fraction(1, 8), Fraction(1, 4), Fraction(3, 8))


@dataclass(frozen=True)
class Arm:
    """Heads that are removed together.

    Attributes:
        scheme: one of `SCHEMES`.
        order: name of an order of `orders`, or "random".
        share: of all linear heads, as it was asked for.
        draw: number of the random order; 0 for others.
        heads: indices into `all_heads`.

    Example:
        >>> Arm("over the model", "low rank", 0.25, 0, (0, 3)).label
        'low rank, 25.0%, over the model'
    """

    scheme: str
    order: str
    share: float
    draw: int
    heads: tuple[int, ...]

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.order}{f' {self.draw}' if self.order == RANDOM else ''}, {self.share:.1%}, {self.scheme}"


def orders(trace: HeadTrace, *, d: int) -> dict[str, NDArray[np.int64]]:
    """Every order in which heads can be removed, the first to go first, from measures on calibration prompts.

    Ties in effective rank are broken by the stable rank.

    Args:
        trace: of the calibration prompts; measures at its last position, means over prompts, count.
        d: largest possible rank.

    Returns:
        name -> indices of all heads.

    Example:
        >>> from staterank_utils import load_model
        >>> import torch
        >>> trace = trace_heads(load_model("hybrid"), torch.arange(64).reshape(1, 64), positions=[64])
        >>> list(orders(trace, d=64))
        ['low rank', 'high rank', 'slow decay', 'fast decay', 'large norm', 'small norm', 'joint', 'joint, norm inverted']
    """
    rank, norm, stable = (measure[-1].mean(0) for measure in (trace.rank, trace.norm, trace.stable))
    decay = trace.log_decay.mean(0)
    n_heads = len(rank)
    heads = [(0, index) for index in range(n_heads)]

    def saturation(norms: NDArray[np.float64]) -> NDArray[np.float64]:
        of_heads = saturation_scores(
            dict(zip(heads, rank.tolist(), strict=True)), dict(zip(heads, norms.tolist(), strict=True)), d=d
        )
        return np.array([of_heads[head] for head in heads])

    # The last key counts first.
    keys = (
        (stable, rank), (-stable, -rank), (-decay,), (decay,), (-norm,), (norm,),
        (-stable, -saturation(norm)), (-stable, -saturation(norm.max() - norm)),
    )  # fmt: skip
    return {name: np.lexsort(of_order) for name, of_order in zip(ORDERS, keys, strict=True)}


def chosen(
    order: Sequence[int] | NDArray[np.int64], heads: Sequence[Head], scheme: str, share: Fraction | float
) -> tuple[int, ...]:
    """The heads that an order takes at a dose.

    Args:
        order: indices of all heads, the first to go first.
        heads: (layer, head) of each.
        scheme: one of `SCHEMES`.
        share: of all heads; layer-matched, of every layer's, to the nearest whole number.

    Returns:
        Indices, sorted.

    Raises:
        ValueError: an unknown scheme, or more heads than there are.

    Example:
        >>> heads = [(0, 0), (0, 1), (1, 0), (1, 1)]
        >>> [chosen([0, 1, 2, 3], heads, scheme, 0.5) for scheme in SCHEMES]
        [(0, 1), (0, 2), (2, 3)]
    """
    layers: dict[int, list[int]] = {}
    for index in order:
        layers.setdefault(heads[index][0], []).append(int(index))
    if scheme == LAYERS:
        return tuple(
            sorted(index for of_layer in layers.values() for index in of_layer[: round(share * len(of_layer))])
        )
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}: choose from {', '.join(SCHEMES)}")
    allowed = [int(index) for index in order if scheme == MODEL or heads[index][0] != 0]
    n = round(float(share) * len(heads))
    if n > len(allowed):
        raise ValueError(f"{n} heads cannot be taken of {len(allowed)} ({scheme})")
    return tuple(sorted(allowed[:n]))


def doses(scheme: str) -> list[float]:
    """Shares of all heads, increasing: the sixteenths, and but for layer-matched those of the first registration too.

    Example:
        >>> len(doses("layer-matched")), [round(dose, 3) for dose in doses("over the model")][:4]
        (7, [0.021, 0.042, 0.05, 0.062])
    """
    more = () if scheme == LAYERS else SHARES
    return sorted({*map(float, SIXTEENTHS), *more})


def random_orders(n_heads: int, n_draws: int, *, name: str) -> NDArray[np.int64]:
    """Random orders of all heads, nested over doses, seeded by what they are for.

    Args:
        n_heads: of the model.
        n_draws: how many.
        name: of the model and scheme; the same name gives the same orders.

    Returns:
        (draw, head).

    Example:
        >>> random_orders(4, 2, name="a").shape, bool((random_orders(9, 1, name="a") == random_orders(9, 1, name="b")).all())
        ((2, 4), False)
    """
    rng = np.random.default_rng(list(name.encode()))
    return np.array([rng.permutation(n_heads) for _ in range(n_draws)], dtype=np.int64).reshape(n_draws, n_heads)


def all_arms(
    heads: Sequence[Head],
    by_name: Mapping[str, NDArray[np.int64]],
    *,
    name: str,
    n_draws: int,
    shares: Sequence[float] | None = None,
    schemes: Sequence[str] = SCHEMES,
) -> tuple[Arm, ...]:
    """Every order and random draw at every dose of every scheme, in the order in which they are measured.

    Args:
        heads: (layer, head) of each index.
        by_name: from `orders`.
        name: of the model, which seeds the random orders.
        n_draws: random orders per scheme.
        shares: the doses of every scheme; None: those of `doses`.
        schemes: of `SCHEMES`.

    Example:
        >>> heads = [(layer, head) for layer in (0, 1) for head in range(16)]
        >>> len(all_arms(heads, {"low rank": np.arange(32)}, name="a", n_draws=2))
        93
    """
    spared = sum(layer == 0 for layer, _ in heads)
    most = {PROTECTED: 1 - spared / len(heads)}  # layer 0 may hold more heads than a dose leaves
    by_scheme = {
        scheme: [share for share in (doses(scheme) if shares is None else shares) if share <= most.get(scheme, 1)]
        for scheme in schemes
    }
    arms = [
        Arm(scheme, order, share, 0, chosen(by_name[order], heads, scheme, share))
        for scheme in schemes
        for share in by_scheme[scheme]
        for order in by_name
    ]
    for scheme in schemes:
        drawn = random_orders(len(heads), n_draws, name=f"{name}, {scheme}")
        arms += [
            Arm(scheme, RANDOM, share, draw, chosen(order, heads, scheme, share))
            for share in by_scheme[scheme]
            for draw, order in enumerate(drawn)
        ]
    return tuple(arms)


def chance_arms(heads: Sequence[Head], *, name: str, spare: float | None, first: int, n_draws: int) -> tuple[Arm, ...]:
    """Random arms beyond those of every dose, at the two doses of C5a.

    Args:
        heads: (layer, head) of each index.
        name: of the model.
        spare: the second dose, `Removal.spare_share`.
        first, n_draws: number of the first draw that is missing, and how many there are to be in all.

    Example:
        >>> heads = [(0, head) for head in range(16)]
        >>> len(chance_arms(heads, name="a", spare=0.125, first=16, n_draws=40))
        48
    """
    drawn = random_orders(len(heads), n_draws, name=f"{name}, {MODEL}")
    shares = sorted({claims.SECOND["C5a"].numbers["share"], *([] if spare is None else [spare])})
    return tuple(
        Arm(MODEL, RANDOM, share, draw, chosen(drawn[draw], heads, MODEL, share))
        for share in shares
        for draw in range(first, n_draws)
    )


def further_draws(made: "Removal", *, name: str, n_draws: int) -> tuple[Arm, ...]:
    """The random arms that a measurement lacks to have as many draws at each of its doses.

    Args:
        made: by whose doses heads go.
        name: of the model that it was measured under, which seeds the random orders.
        n_draws: how many there are to be in all.

    Example:
        >>> from staterank_utils.studies.ladder import load_measured
        >>> made = load_measured("hybrid-text-0")[0].removal
        >>> len(further_draws(made, name="hybrid-text-0", n_draws=16))
        0
    """
    orders_of = {scheme: random_orders(len(made.heads), n_draws, name=f"{name}, {scheme}") for scheme in SCHEMES}
    return tuple(
        Arm(scheme, RANDOM, share, draw, chosen(orders_of[scheme][draw], made.heads, scheme, share))
        for scheme, drawn in orders_of.items()
        for share in made.shares(scheme, RANDOM)
        for draw in range(len(made.draws(scheme, share)), n_draws)
    )


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Sizes:
    """How much is measured; the defaults are those of the ladder, which the registered rules ask for.

    Example:
        >>> Sizes().n_draws, Sizes().n_chance, FEW.n_chance
        (16, 40, 0)
    """

    orders: tuple[str, ...] | None = None  # of `orders`; None: all
    shares: tuple[float, ...] | None = None  # doses of every scheme; None: those of `doses`
    n_draws: int = 16  # random orders per scheme
    n_chance: int = claims.SECOND["C5a"].numbers["draws"]
    n_within: int = claims.SECOND["C4b"].numbers["orders"]
    within_windows: int = claims.SECOND["C4b"].numbers["windows"]  # per text
    n_groups: int = claims.SECOND["C7"].numbers["draws"]
    secondary: bool = True  # the four domains of the first registration as well
    schemes: tuple[str, ...] = SCHEMES


FEW = Sizes((LOW, HIGH, JOINT), (0.125, 0.25), 1, n_chance=0, n_within=0, within_windows=0, n_groups=0, secondary=False)


@dataclass(frozen=True)
class Removal:
    """Losses on held-out text without heads, nats per token.

    Attributes:
        heads: (layer, head) of each index.
        d: largest possible rank.
        orders: name -> indices of heads.
        rank: of each head on the calibration prompts.
        unigram: text -> loss of a unigram model.
        intact: (window,), those of books first, then as many of code.
        arms: that were measured.
        nats: (arm, window).
        bins: label of an arm -> (text, bin of positions), means.
        within: (random order within layers, first or last k, dose of `AREA`, window): on the first windows of each text.
        groups: of C7: "high" and "random" -> (share kept: none, then the registered ones; draw), means over windows.
        secondary: label of an arm, or "intact" -> losses on the four domains of the first registration, (domain, window).

    Example:
        >>> from staterank_utils.studies.ladder import load_measured
        >>> removal = load_measured("hybrid-text-0")[0].removal
        >>> removal.n_windows, removal.draws("over the model", 0.25).shape  # 16 draws, 16 windows of each text
        (16, (16, 32))
    """

    heads: tuple[Head, ...]
    d: int
    orders: Mapping[str, NDArray[np.int64]]
    rank: NDArray[np.float64]
    unigram: Mapping[str, float]
    intact: NDArray[np.float64]
    arms: tuple[Arm, ...]
    nats: NDArray[np.float64]
    bins: Mapping[str, NDArray[np.float64]]
    within: NDArray[np.float64]
    within_windows: int
    groups: Mapping[str, NDArray[np.float64]]
    secondary: Mapping[str, NDArray[np.float64]]

    @property
    def n_windows(self) -> int:
        """Windows per text."""
        return len(self.intact) // len(LOSS_TEXTS)

    def added(self, scheme: str, order: str, share: float, draw: int = 0) -> NDArray[np.float64]:
        """Added nats of an arm, (window,).

        Raises:
            KeyError, IndexError: it was not measured; the latter where draws of this order were, but not so many.
        """
        return np.asarray(self.nats[self._rows[scheme, order, share][draw]] - self.intact)

    def draws(self, scheme: str, share: float) -> NDArray[np.float64]:
        """Added nats of all random arms at a dose, (draw, window)."""
        return np.asarray(self.nats[self._rows[scheme, RANDOM, share]] - self.intact)

    def with_arms(self, arms: Sequence[Arm], nats: NDArray[np.float64]) -> "Removal":
        """This measurement and more arms of the same model and windows.

        Args:
            arms: such as `further_draws` gives.
            nats: their losses, (arm, window).

        Raises:
            ValueError: losses of other numbers of arms or windows.
        """
        if nats.shape != (len(arms), len(self.intact)):
            raise ValueError(
                f"expected losses of {len(arms)} arms on {len(self.intact)} windows, got an array of {nats.shape}"
            )
        return replace(self, arms=(*self.arms, *arms), nats=np.concatenate([self.nats, nats]))

    @cached_property
    def _rows(self) -> dict[tuple[str, str, float], list[int]]:
        """(scheme, order, share) -> rows of `nats`, one per draw."""
        rows: dict[tuple[str, str, float], list[int]] = {}
        for row, arm in enumerate(self.arms):
            rows.setdefault((arm.scheme, arm.order, arm.share), []).append(row)
        return rows

    def curve(self, scheme: str, order: str) -> dict[float, Estimate]:
        """Added nats at every dose of an order, by the share of all heads that it takes; of random draws their mean and range."""
        shares = self.shares(scheme, order)
        return {self.actual(scheme, share, order): self._estimate(scheme, order, share) for share in shares}

    def _estimate(self, scheme: str, order: str, share: float) -> Estimate:
        if order == RANDOM:
            return spread(self.draws(scheme, share).mean(1))
        return over_texts(self.added(scheme, order, share))

    @property
    def ruin(self) -> float:
        """Added nats at which the model is no better than a unigram model."""
        return float(np.mean(list(self.unigram.values())) - self.intact.mean())

    def loss(self, scheme: str, order: str, share: float) -> float:
        """Mean loss without an arm's heads, nats per token; of random draws their mean."""
        return float(self.intact.mean()) + self.cost(scheme, order, share)

    def cost(self, scheme: str, order: str, share: float) -> float:
        """Mean added nats of an arm; of random draws their mean."""
        added = self.draws(scheme, share) if order == RANDOM else self.added(scheme, order, share)
        return float(added.mean())

    def dearer_draws(self, scheme: str, order: str, share: float) -> str:
        """How many random draws cost more than an arm at the dose nearest to a share, in words; "not measured" where there is no such arm."""
        if not self.shares(scheme, order):
            return "not measured"
        dose = self.nearest(scheme, order, share)
        draws = self.draws(scheme, dose).mean(1)
        return f"{int((draws > self.added(scheme, order, dose).mean()).sum())} of {len(draws)}"

    def counts(self, scheme: str, share: float, arms: tuple[str, str] = (LOW, HIGH)) -> bool:
        """Whether a dose counts: the mean loss of both arms is below that of unigram models."""
        unigram = float(np.mean(list(self.unigram.values())))
        return all(self.loss(scheme, order, share) < unigram for order in arms)

    def counted(self, scheme: str) -> list[float]:
        """The shares of `AREA` that were measured and count, over which D is taken."""
        measured = self.shares(scheme)
        return [share for share in map(float, AREA) if share in measured and self.counts(scheme, share)]

    def area(self, scheme: str, windows: NDArray[np.int64] | None = None) -> float:
        """D: area over shares from 1/16 to 5/16 of added nats without the highest ranks minus without the lowest."""
        where = np.arange(len(self.intact)) if windows is None else windows
        counted = self.counted(scheme)
        actual = [self.actual(scheme, share) for share in counted]
        return area_under([float(self.gaps(scheme, share)[where].mean()) for share in counted], actual)

    def area_interval(self, scheme: str) -> Estimate:
        """D with its interval over windows, drawn within each text."""
        counted = self.counted(scheme)
        if len(counted) < 2:
            return exactly(float("nan"))
        gaps = np.stack([self.gaps(scheme, share) for share in counted], 1)
        actual = [self.actual(scheme, share) for share in counted]
        return bootstrap(
            lambda *means: area_under(np.mean(means, 0), actual), *np.split(gaps, len(LOSS_TEXTS)), of_means=True
        )

    def gaps(self, scheme: str, share: float) -> NDArray[np.float64]:
        """Added nats without the highest ranks minus without the lowest, (window,)."""
        return self.added(scheme, HIGH, share) - self.added(scheme, LOW, share)

    def few_windows(self) -> NDArray[np.int64]:
        """The windows on which the random orders within layers were measured."""
        return np.concatenate([np.arange(self.within_windows) + i * self.n_windows for i in range(len(LOSS_TEXTS))])

    def random_areas(self) -> NDArray[np.float64]:
        """D of every random order within layers, both signs (C4b)."""
        counted = self.counted(LAYERS)
        columns = [i for i, share in enumerate(map(float, AREA)) if share in counted]
        gaps = (self.within[:, 0] - self.within[:, 1]).mean(-1)[:, columns]
        actual = [self.actual(LAYERS, share) for share in counted]
        areas = np.array([area_under(row, actual) for row in gaps])
        return np.concatenate([areas, -areas])

    def beyond_random(self) -> float:
        """Share of the random orders' D that is smaller in absolute value than that of rank, on the same windows (C4b).

        NaN where D is undefined, with fewer than two doses that count.
        """
        own = abs(self.area(LAYERS, self.few_windows()))
        return float("nan") if np.isnan(own) else float((np.abs(self.random_areas()) < own).mean())

    def shares(self, scheme: str, order: str = HIGH) -> list[float]:
        """The doses at which an order was measured, increasing."""
        return sorted(share for of, which, share in self._rows if (of, which) == (scheme, order))

    def actual(self, scheme: str, share: float, order: str = HIGH) -> float:
        """Share of all heads that a dose takes, in whole heads."""
        return len(self.arms[self._rows[scheme, order, share][0]].heads) / len(self.heads)

    def crossing(self, scheme: str) -> float | None:
        """Share of heads from which on the highest ranks cost more than the lowest (C4c); None where they never do."""
        shares = self.shares(scheme)
        actual = [self.actual(scheme, share) for share in shares]
        gaps = [float(self.gaps(scheme, share).mean()) for share in shares]
        if gaps[0] > 0:
            return actual[0]
        for i in range(1, len(shares)):
            if gaps[i] > 0:
                return actual[i - 1] + (actual[i] - actual[i - 1]) * -gaps[i - 1] / (gaps[i] - gaps[i - 1])
        return None

    def spare_share(self) -> float | None:
        """The largest dose over the model that counts and at which rank alone adds at most 0.1 nats (C5a).

        None where there is none, or where the lowest ranks, by which a dose counts, were not removed.
        """
        most, measured = claims.SECOND["C5a"].numbers["spare"], set(self.shares(MODEL, LOW))
        spare = [
            x
            for x in self.shares(MODEL)
            if x in measured and self.counts(MODEL, x) and float(self.added(MODEL, HIGH, x).mean()) <= most
        ]
        return max(spare, default=None)

    def leads_over_chance(self) -> dict[str, float]:
        """For the doses of C5a that count, added nats with the joint score minus those of the best random draw."""
        shares = {"": claims.SECOND["C5a"].numbers["share"], ", where rank alone is spare": self.spare_share()}
        return {
            f"{share:.1%}{role}": float(self.added(MODEL, JOINT, share).mean() - self.draws(MODEL, share).mean(1).min())
            for role, share in shares.items()
            if share is not None and self.counts(MODEL, share, (JOINT, RANDOM))
        }

    def alpha_gap(self) -> Estimate:
        """Added nats at 25 % with the joint score minus with rank alone, with its interval over windows (C5b)."""
        share = claims.SECOND["C5b"].numbers["share"]
        gap = self.added(MODEL, JOINT, share) - self.added(MODEL, HIGH, share)
        return over_texts(gap)

    def restoring_share(self, group: str) -> Fraction:
        """The smallest share of a group that undoes 80 % of the damage of removing all of it; 1 where none does (C7)."""
        means = self.groups[group].mean(1)
        keeps, undone = claims.SECOND["C7"].numbers["keeps"], claims.SECOND["C7"].numbers["undone"]
        enough = [keep for keep, added in zip(keeps, means[1:], strict=True) if 1 - added / means[0] >= undone]
        return min(enough, default=Fraction(1))

    def places(self, order: str) -> NDArray[np.int64]:
        """The place of each head in an order, 0 for the first to go, (head,)."""
        return np.argsort(self.orders[order])

    def costs(self, scheme: str, orders: Sequence[str]) -> list[dict[str, Any]]:
        """Mean added nats by order and number of heads removed, one row each: "order", "n", "added"; nothing removed costs nothing."""
        rows = []
        for order in orders:
            rows.append({"order": order, "n": 0, "added": 0.0})
            for share, added in self.curve(scheme, order).items():
                rows.append({"order": order, "n": round(share * len(self.heads)), "added": round(added.point, 4)})
        return rows

    def nearest(self, scheme: str, order: str, share: float) -> float:
        """The measured dose of an order whose share of all heads is nearest to `share`; NaN where none was measured."""
        doses = self.shares(scheme, order)
        return min(doses, key=lambda dose: abs(self.actual(scheme, dose, order) - share), default=float("nan"))

    def near(self, scheme: str, order: str, share: float) -> Estimate:
        """Added nats at the dose that is nearest to a share of all heads; NaN where no dose was measured."""
        dose = self.nearest(scheme, order, share)
        return exactly(dose) if np.isnan(dose) else self._estimate(scheme, order, dose)

    def points_in_words(self, scheme: str, orders: Sequence[str], share: float) -> str:
        """Added nats of several orders at the doses nearest to a share, without intervals: "number and number"."""
        return " and ".join(f"{exactly(self.near(scheme, order, share).point):.2f}" for order in orders)

    def ruin_in_words(self, scheme: str, order: str, share: float) -> str:
        """Whether the model still reads better than a unigram model at the dose nearest to a share."""
        if self.ruin < 0:
            return "worse than token frequencies, as with all heads"
        worse = "worse" if self.near(scheme, order, share).point > self.ruin else "better"
        return f"{worse} than token frequencies"

    def intact_in_words(self) -> str:
        """The loss with all heads and that of a unigram model, means over texts."""
        loss = float(self.intact.mean())
        return f"{loss:.2f} nats per token, beside {loss + self.ruin:.2f} of a unigram model"

    def redundancy(self, keep: float) -> dict[str, str]:
        """What C7 measured: quantity -> number, in words.

        Args:
            keep: the part of a group that is kept, one of the claim's.
        """
        row = [0.0, *map(float, claims.SECOND["C7"].numbers["keeps"])].index(keep)
        n = int((self.rank >= claims.SECOND["C7"].numbers["full"] * self.d).sum())
        groups = {group: added for group, added in self.groups.items() if added.size}
        return {
            "heads of full rank": f"{n} of {len(self.heads)}",
            **{
                f"added nats without all of them, {group} group": f"{added[0].mean():.2f}"
                for group, added in groups.items()
            },
            "added nats at which a model is no better than token frequencies": f"{self.ruin:.2f}",
            **{
                f"part of this damage undone by keeping {keep:.0%} of the {group} group": f"{1 - added[row].mean() / added[0].mean():.2f}"
                for group, added in groups.items()
            },
        }

    def from_layer(self, layer: int, scheme: str, order: str, share: float) -> int:
        """How many heads of a layer an arm takes, at the dose that is nearest to a share of all heads."""
        arm = self.arms[self._rows[scheme, order, self.nearest(scheme, order, share)][0]]
        return sum(self.heads[index][0] == layer for index in arm.heads)

    def repeated(self, stored: "Removal", text: str = LOSS_TEXTS[0]) -> tuple[int, float]:
        """How many arms were measured before on the same heads, and the largest difference of a loss, nats per token.

        Args:
            stored: an earlier measurement of the same model, on these windows and more of the same text.
            text: on which to compare; books are the same on every machine, code is that of its Python.
        """
        index = LOSS_TEXTS.index(text)
        here, there = (slice(index * of.n_windows, index * of.n_windows + self.n_windows) for of in (self, stored))
        known = {arm.heads: row for row, arm in enumerate(stored.arms)}
        pairs = [(row, known[arm.heads]) for row, arm in enumerate(self.arms) if arm.heads in known]
        differences = [np.abs(self.nats[mine, here] - stored.nats[theirs, there]).max() for mine, theirs in pairs]
        return len(pairs), float(max(differences, default=np.nan))

    def claims(self, name: str) -> list[Row]:
        """The rows of C5a and C7, which one model decides."""
        rows = [claims.judge_chance(name, self.leads_over_chance())]
        if self.groups["high"].size:
            rows.append(claims.judge_redundancy(name, self.restoring_share("high"), self.restoring_share(RANDOM)))
        else:
            rows.append(claims.not_testable("C7", name, why="it has fewer than 16 heads of full rank"))
        return rows


def one_model_claims(removal: Removal, name: str, keys: Sequence[str], *, seed: str = "?") -> list[Row]:
    """Apply the rules of the second registration that speak of seeds to one model, and those of C5a and C7.

    Args:
        removal: of the model.
        name: of the model.
        keys: of the claims, of C4b, C4c, C5a, C5b and C7.
        seed: of its training, as far as known.

    Returns:
        One row per key; what was not measured says so.

    Example:
        >>> from staterank_utils.studies.ladder import load_measured
        >>> removal = load_measured("hybrid-text-0")[0].removal
        >>> [(row["claim"], row["verdict"]) for row in one_model_claims(removal, "hybrid", ["C4b", "C4c"], seed="0")]
        [('C4b', 'explained by layers'), ('C4c', 'holds')]
    """
    share = claims.SECOND["C5b"].numbers["share"]
    whole = len(removal.shares(MODEL)) == len(doses(MODEL))

    def alpha() -> Row:
        if not removal.counts(MODEL, share, (JOINT, HIGH)):
            return claims.not_testable("C5b", name, why="without these heads it is worse than a unigram model")
        return claims.judge_alpha(name, {seed: removal.alpha_gap().point})

    def within() -> Row:
        if np.isnan(beyond := removal.beyond_random()):
            return claims.not_testable("C4b", name, why="fewer than two doses count")
        return claims.judge_within_layers(name, {seed: beyond})

    def layer_zero() -> Row:
        if not removal.shares(PROTECTED) or all(layer for layer, _ in removal.heads):
            return claims.not_testable("C4c", name, why="its first layer has no linear head, or all of them")
        return claims.judge_layer_zero(name, {seed: (removal.crossing(MODEL), removal.crossing(PROTECTED))})

    judged = {
        "C4b": (len(removal.within) > 0, within),
        "C4c": (whole, layer_zero),
        "C5a": (whole, lambda: removal.claims(name)[0]),
        "C5b": (whole, alpha),
        "C7": (bool(removal.groups) and whole, lambda: removal.claims(name)[1]),
    }
    return [
        judge() if measured else claims.not_measured(key, name, why="it takes the full profile")
        for key, (measured, judge) in ((key, judged[key]) for key in keys)
    ]


def costs_table(
    removals: Mapping[str, Removal], *, shares: Sequence[float], schemes: Sequence[str], orders: Sequence[str]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Added nats of several orders side by side, as head and rows of a table.

    Args:
        removals: name of the model -> its measurement.
        shares: of the heads; those that were not measured are left out.
        schemes: of `SCHEMES`.
        orders: one column each; behind random heads, whose mean and range are given, stands the number of their draws.

    Example:
        >>> from staterank_utils.studies.ladder import load_measured
        >>> removal = load_measured("hybrid-text-0")[0].removal
        >>> costs_table({"hybrid": removal}, shares=[0.25], schemes=[LAYERS], orders=[LOW])
        (('model', 'scheme', 'heads removed', 'low rank'), [('hybrid', 'layer-matched', '25.0%', '1.44 [1.36, 1.51]')])
    """
    rows = []
    for name, of in removals.items():
        for share in shares:
            for scheme in schemes:
                there = [order for order in orders if share in of.shares(scheme, order)]
                if not there:
                    continue
                numbers = (f"{of.near(scheme, order, share):.2f}" if order in there else "–" for order in orders)
                drawn = [f"{len(of.draws(scheme, share))}" if RANDOM in there else "–"] if RANDOM in orders else []
                rows.append((name, scheme, f"{of.actual(scheme, share, there[0]):.1%}", *numbers, *drawn))
    return ("model", "scheme", "heads removed", *orders, *(["draws"] if RANDOM in orders else [])), rows


def area_under(values: Sequence[float] | NDArray[np.float64], shares: Sequence[float]) -> float:
    """Area under values at increasing shares, by trapezoids; NaN where there are fewer than two.

    Example:
        >>> area_under([1.0, 1.0], [0.25, 0.5])
        0.25
    """
    return float(np.trapezoid(values, shares)) if len(shares) > 1 else float("nan")


def planned(model: PreTrainedModel, texts: Texts, sizes: Sizes) -> str:
    """What `measure_removal` is going to take, in words.

    Args:
        model, texts, sizes: as there.

    Example:
        >>> from staterank_utils import load_model, load_tokenizer
        >>> from staterank_utils.studies.texts import draw_texts
        >>> texts = draw_texts(load_tokenizer("hybrid"), n_windows=1, window=64)
        >>> planned(load_model("hybrid"), texts, FEW)
        'weights 68.8 MB; 24 removals, each read on 2 x 64 tokens'
    """
    heads = all_heads(model)
    names = ORDERS if sizes.orders is None else sizes.orders
    arms = all_arms(
        heads,
        dict.fromkeys(names, np.arange(len(heads))),
        name="",
        n_draws=sizes.n_draws,
        shares=sizes.shares,
        schemes=sizes.schemes,
    )
    n_windows, n_tokens = texts.windows.shape
    more = sizes.n_within * 2 * len(AREA) + sizes.n_groups * 2 * (1 + len(claims.SECOND["C7"].numbers["keeps"]))
    more += 2 * max(sizes.n_chance - sizes.n_draws, 0)
    return f"weights {in_words(weight_bytes(model))}; {len(arms) + more:,} removals, each read on {n_windows} x {n_tokens:,} tokens"


def measure_removal(
    model: PreTrainedModel, texts: Texts, *, name: str, sizes: Sizes = Sizes(), ordered: Removal | None = None
) -> Removal:
    """Measure every arm.

    Args:
        model: from `load_model`, in float32.
        texts: from `draw_texts`.
        name: of the model, which seeds the random orders.
        sizes: how many of them.
        ordered: an earlier measurement of the same model, whose orders and ranks are taken instead of measuring them anew.

    Returns:
        The losses, and all that the registered rules need.

    Raises:
        ValueError: a model without linear-attention heads.

    Example:
        >>> from staterank_utils import load_model, load_tokenizer
        >>> from staterank_utils.studies.texts import draw_texts
        >>> texts = draw_texts(load_tokenizer("hybrid"), n_windows=1, window=64, n_copies=1, copy=32, n_calibration=1)
        >>> removal = measure_removal(load_model("hybrid"), texts, name="hybrid", sizes=FEW)
        >>> len(removal.arms), removal.nats.shape  # 3 schemes, 2 doses, 3 orders and a random one; windows of books and of code
        (24, (24, 2))
    """
    heads = all_heads(model)
    d, length = state_size(model), texts.calibration.shape[1]
    if ordered is None:
        trace = trace_heads(model, texts.calibration, positions=[length // 2, length])
        by_name, rank = orders(trace, d=d), trace.rank[-1].mean(0)
    else:
        by_name, rank = dict(ordered.orders), ordered.rank
    measured = by_name if sizes.orders is None else {order: by_name[order] for order in sizes.orders}
    arms = all_arms(heads, measured, name=name, n_draws=sizes.n_draws, shares=sizes.shares, schemes=sizes.schemes)
    binned = {
        arm.label
        for arm in arms
        if arm.share in map(float, POSITION_DOSES)
        and (arm.order in (LOW, HIGH) or (arm.order == RANDOM and arm.draw < 4))
    }
    whole = token_nats(model, texts.windows)
    bins = {"intact": _binned(whole)}
    nats = []
    for arm in tqdm(arms, desc="arms", leave=False):
        losses = _without(model, heads, arm.heads, texts.windows)
        nats.append(losses.mean(1))
        if arm.label in binned:
            bins[arm.label] = _binned(losses)
    partial = Removal(
        tuple(heads), d, by_name, rank, dict(texts.unigram), whole.mean(1), arms, np.stack(nats), bins,
        np.empty(0), sizes.within_windows, {}, _secondary(model, heads, arms, texts) if sizes.secondary else {},
    )  # fmt: skip
    if sizes.n_chance <= sizes.n_draws:
        more: tuple[Arm, ...] = ()
    else:
        more = chance_arms(heads, name=name, spare=partial.spare_share(), first=sizes.n_draws, n_draws=sizes.n_chance)
    if more:
        partial = partial.with_arms(more, losses_without(model, more, texts.windows))
    return replace(
        partial,
        within=_within_layers(model, texts, partial, name, sizes),
        groups=_groups(model, texts, partial, name, sizes),
    )


def _secondary(
    model: PreTrainedModel, heads: Sequence[Head], arms: Sequence[Arm], texts: Texts
) -> dict[str, NDArray[np.float64]]:
    """Losses on the four domains of the first registration, intact and without the named arms, (domain, window)."""
    named = [arm for arm in arms if arm.order in (LOW, HIGH, JOINT)]
    found = {"intact": token_nats(model, texts.secondary).mean(1)}
    for arm in tqdm(named, desc="secondary domains", leave=False):
        found[arm.label] = _without(model, heads, arm.heads, texts.secondary).mean(1)
    return {label: losses.reshape(len(NATURAL_DOMAINS), -1) for label, losses in found.items()}


def damage_alone(model: PreTrainedModel, windows: Tensor) -> NDArray[np.float64]:
    """Added nats per token without one head at a time.

    Args:
        model: from `load_model`.
        windows: of text, (window, token).

    Returns:
        (head, window), heads in the order of `all_heads`.

    Example:
        >>> import torch
        >>> from staterank_utils import load_model
        >>> damage_alone(load_model("pure"), torch.arange(8).reshape(1, 8)).shape
        (192, 1)
    """
    heads = all_heads(model)
    intact = token_nats(model, windows).mean(1)
    indices = tqdm(range(len(heads)), desc="heads", leave=False)
    return np.stack([_without(model, heads, [index], windows).mean(1) - intact for index in indices])


def losses_without(model: PreTrainedModel, arms: Sequence[Arm], windows: Tensor) -> NDArray[np.float64]:
    """Loss without the heads of one arm at a time, nats per token, (arm, window).

    Args:
        model: from `load_model`.
        arms: what is removed.
        windows: of text, (window, token).

    Example:
        >>> import torch
        >>> from staterank_utils import load_model
        >>> losses_without(load_model("pure"), [Arm(MODEL, RANDOM, 1 / 96, 0, (0, 5))], torch.arange(8).reshape(1, 8)).shape
        (1, 1)
    """
    heads = all_heads(model)
    return np.stack(
        [_without(model, heads, arm.heads, windows).mean(1) for arm in tqdm(arms, desc="arms", leave=False)]
    )


def areas_beyond_first(
    model: PreTrainedModel,
    windows: Tensor,
    made: Removal,
    *,
    name: str,
    n_orders: int = claims.SECOND["C4b"].numbers["orders"],
) -> NDArray[np.float64]:
    """D layer-matched on the layers behind the first linear one, which keeps all its heads: of rank, and of random orders within layers (C4b without it).

    Shares are of the heads of these layers; the doses are those at which both arms of the stored removal count with the first layer in it.

    Args:
        model: from `load_model`.
        windows: of text, (window, token).
        made: of the same weights, by whose orders heads go.
        name: of the model, by which random orders are drawn; the one that `made` was measured under gives its orders.
        n_orders: random orders.

    Returns:
        (1 + order,): that of rank first; nats per token times share of heads.

    Example:
        >>> import torch
        >>> from staterank_utils import load_model
        >>> from staterank_utils.studies.ladder import load_measured
        >>> made = load_measured("pure-text-0")[0].removal
        >>> areas_beyond_first(load_model("pure"), torch.arange(8).reshape(1, 8), made, name="pure-text-0", n_orders=1).shape
        (2,)
    """
    first, doses_counted = made.heads[0][0], made.counted(LAYERS)

    def loss(order: NDArray[np.int64], dose: float) -> float:
        behind = [index for index in order.tolist() if made.heads[index][0] != first]
        return float(_without(model, made.heads, chosen(behind, made.heads, LAYERS, dose), windows).mean())

    drawn = random_orders(len(made.heads), n_orders, name=f"{name}, within layers")
    pairs = [(made.orders[HIGH], made.orders[LOW]), *((order, order[::-1]) for order in drawn)]
    return np.array(
        [
            area_under([loss(high, dose) - loss(low, dose) for dose in doses_counted], doses_counted)
            for high, low in tqdm(pairs, desc="orders within layers", leave=False)
        ]
    )


def damage_by_rank(
    heads: Sequence[Head], rank: NDArray[np.float64], damage: NDArray[np.float64]
) -> tuple[float, float, float]:
    """Spearman of rank and damage in the first linear layer and over the heads of all others, and the first layer's share of all damage.

    Args:
        heads: (layer, head) of each index.
        rank, damage: one number per head.

    Example:
        >>> damage_by_rank([(0, 0), (0, 1), (1, 0), (1, 1)], np.array([1.0, 2, 3, 4]), np.array([2.0, 4.0, 1.5, 0.5]))
        (1.0, -1.0, 0.75)
    """
    first = np.array([layer == heads[0][0] for layer, _ in heads])
    inside, beyond = (round(float(spearman(rank[part], damage[part])), 12) for part in (first, ~first))
    return inside, beyond, float(damage[first].sum() / damage.sum())


def _without(
    model: PreTrainedModel, heads: Sequence[Head], indices: Iterable[int], windows: Tensor
) -> NDArray[np.float64]:
    with ablate_heads(model, [heads[index] for index in indices]):
        return token_nats(model, windows)


def _binned(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """(text, bin of positions) of losses (window, token); the first loss is of the token at position 1."""
    return by_position(np.stack([part.mean(0) for part in np.split(losses, len(LOSS_TEXTS))]))


def by_position(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of losses (row, token) over the positions of `BINS`, (row, bin); NaN where a bin has no token.

    Args:
        losses: the first is of the token at position 1.

    Example:
        >>> by_position(np.array([[1.0, 3.0]]))
        array([[ 2., nan, nan]])
    """
    parts = [losses[:, max(0, low - 1) : None if high is None else high - 1] for low, high in BINS.values()]
    return np.stack([part.mean(1) if part.shape[1] else np.full(len(losses), np.nan) for part in parts], 1)


def _within_layers(model: PreTrainedModel, texts: Texts, made: Removal, name: str, sizes: Sizes) -> NDArray[np.float64]:
    windows = texts.windows[made.few_windows()]
    drawn = random_orders(len(made.heads), sizes.n_within, name=f"{name}, within layers")
    table = np.empty((len(drawn), 2, len(AREA), len(windows)))
    for row, order in enumerate(tqdm(drawn, desc="orders within layers", leave=False)):
        for end, of_end in enumerate((order, order[::-1])):
            for column, dose in enumerate(AREA):
                indices = chosen(of_end, made.heads, LAYERS, dose)
                table[row, end, column] = _without(model, made.heads, indices, windows).mean(1)
    return table


def _groups(
    model: PreTrainedModel, texts: Texts, made: Removal, name: str, sizes: Sizes
) -> dict[str, NDArray[np.float64]]:
    """Added nats without all of a group but a share of it, (share kept, draw)."""
    full, keeps = claims.SECOND["C7"].numbers["full"], claims.SECOND["C7"].numbers["keeps"]
    high = np.flatnonzero(made.rank >= full * made.d)
    if len(high) < 16 or not sizes.n_groups:
        return {"high": np.empty((0, 0)), RANDOM: np.empty((0, 0))}
    rng = np.random.default_rng(list(f"{name}, groups".encode()))

    def added(removed: NDArray[np.int64]) -> float:
        return float((_without(model, made.heads, removed.tolist(), texts.windows).mean(1) - made.intact).mean())

    tables = {}
    for group in ("high", RANDOM):
        table = np.empty((1 + len(keeps), sizes.n_groups))
        for draw in tqdm(range(sizes.n_groups), desc=f"groups, {group}", leave=False):
            members = rng.permutation(
                high if group == "high" else rng.choice(len(made.heads), len(high), replace=False)
            )
            # All of the high group is the same in every draw.
            table[0, draw] = table[0, 0] if group == "high" and draw else added(members)
            for row, keep in enumerate(keeps, 1):
                table[row, draw] = added(members[round(float(keep) * len(members)) :])
        tables[group] = table
    return tables


def summary(removal: Removal) -> list[dict[str, Any]]:
    """One row per arm that is not a random draw, and one per dose for those, with intervals.

    Args:
        removal: as measured.

    Returns:
        "scheme", "order", "share", "heads" (their number), "layer 0" (how many of them are there), "added" (mean over both texts, with
        its 95 % interval over windows; of random draws the mean with the range of draws), "books", "code", "counts".

    Example:
        >>> from staterank_utils.studies.ladder import load_measured
        >>> rows = summary(load_measured("hybrid-text-0")[0].removal)
        >>> len(rows), rows[0]["order"], rows[0]["heads"]  # 31 doses of 8 orders and of random draws
        (279, 'low rank', 3)
    """
    rows = []
    for arm, nats in zip(removal.arms, removal.nats, strict=True):
        if arm.order == RANDOM and arm.draw:
            continue
        if arm.order == RANDOM:
            drawn = removal.draws(arm.scheme, arm.share)
            added, by_text = spread(drawn.mean(1)), drawn.mean(0)
        else:
            by_text = nats - removal.intact
            added = over_texts(by_text)
        books, code = (float(part.mean()) for part in np.split(by_text, len(LOSS_TEXTS)))
        rows.append(
            {
                "scheme": arm.scheme, "order": arm.order, "share": arm.share, "heads": len(arm.heads),
                "layer 0": None if arm.order == RANDOM else sum(removal.heads[index][0] == 0 for index in arm.heads),
                "added": [round(x, 4) for x in (added.point, added.low, added.high)],
                "books": round(books, 4), "code": round(code, 4), "counts": removal.counts(arm.scheme, arm.share),
            }
        )  # fmt: skip
    return rows
