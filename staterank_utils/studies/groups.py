"""Ranks of every head on every kind of input, and how far decay alone predicts them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Num
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from staterank_utils import claims, strata
from staterank_utils.architectures import linear_layers, state_size
from staterank_utils.memory import check_memory_bound, half_life_at, predicted_rank, scale_decay
from staterank_utils.spectra import Spectrum, rank_and_norm, singular_values, stable_rank
from staterank_utils.strata import Estimate, bootstrap, cosine, is_high, mean_kappa, mean_spearman, spearman
from staterank_utils.surgery import Head, all_heads
from staterank_utils.tasks import ADVERSARIAL_DOMAINS, NATURAL_DOMAINS, domain_prompts
from staterank_utils.tracing import trace_states

EARLY = 128  # the registered early position
DOMAINS = (*NATURAL_DOMAINS, *ADVERSARIAL_DOMAINS)
STEPS = 33  # tokens of each window in which neighbouring norm vectors are compared
Row = dict[str, Any]


def rank_norm_stable(states: Tensor) -> Tensor:
    """Effective rank, nuclear norm and stable rank side by side, for one pass of `trace_states`.

    Example:
        >>> rank_norm_stable(torch.diag(torch.tensor([3.0, 3.0]))).tolist()
        [2.0, 6.0, 2.0]
    """
    if states.is_cuda:
        return torch.cat([rank_and_norm(states), stable_rank(states)[..., None]], -1)
    spectrum = Spectrum(singular_values(states))
    measures = (spectrum.effective_rank().double(), spectrum.nuclear_norm(), spectrum.stable_rank())
    return torch.stack(measures, -1)


@dataclass(frozen=True)
class HeadTrace:
    """Measures of every head on prompts.

    Attributes:
        rank, norm, stable: effective rank, nuclear norm and stable rank, (position, prompt, head), heads in the order of `all_heads`.
        log_decay, write_strength: means over tokens, (prompt, head).

    Example:
        >>> from staterank_utils import load_model
        >>> trace_heads(load_model("hybrid"), torch.arange(64).reshape(1, 64), positions=[32, 64]).rank.shape
        (2, 1, 144)
    """

    rank: NDArray[np.float64]
    norm: NDArray[np.float64]
    stable: NDArray[np.float64]
    log_decay: NDArray[np.float64]
    write_strength: NDArray[np.float64]


def trace_heads(model: PreTrainedModel, input_ids: Tensor, *, positions: Sequence[int]) -> HeadTrace:
    """Trace prompts and measure every state at the positions.

    On a GPU name at least two positions: then states of float32 weights are made in float32 throughout (`tracing`).

    Args:
        model: from `load_model`.
        input_ids, positions: as in `trace_states`.

    Example:
        >>> from staterank_utils import load_model
        >>> trace = trace_heads(load_model("hybrid"), torch.arange(64).reshape(1, 64), positions=[64])
        >>> trace.stable.shape, trace.log_decay.shape
        ((1, 1, 144), (1, 144))
    """
    trace = trace_states(model, input_ids, positions=positions, reduce=rank_norm_stable)
    rank, norm, stable = trace.values.double().permute(4, 2, 1, 0, 3).flatten(3).numpy()
    decay, write = (gate.transpose(0, 1).flatten(1).numpy() for gate in (trace.log_decay, trace.write_strength))
    return HeadTrace(rank, norm, stable, decay, write)


def half_lives_from(log_decay: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tokens after which a state has lost half of what it held, by its mean log-decay; infinite without decay.

    Args:
        log_decay: of any shape, at most 0.

    Example:
        >>> half_lives_from(np.log([0.5, 1.0]))
        array([ 1., inf])
    """
    with np.errstate(divide="ignore"):
        return np.log(2) / np.abs(log_decay)


@dataclass(frozen=True)
class Groups:
    """Ranks on every kind of input.

    Attributes:
        heads: (layer, head) of each head.
        d: largest possible rank.
        n_tokens: at which ranks are taken.
        rank, log_decay: domain -> (prompt, head).
        early_rank, early_norm, norm: on prose, at 128 tokens and at the end, (prompt, head); of a stored model, of its end alone.

    Example:
        >>> from staterank_utils import load_model, load_tokenizer
        >>> groups = measure_groups(load_model("hybrid"), load_tokenizer("hybrid"), n_prompts=2, n_tokens=256, domains=["prose"])
        >>> groups.rank["prose"].shape, bool(groups.relative("prose").max() <= 1)
        ((2, 144), True)
    """

    heads: tuple[Head, ...]
    d: int
    n_tokens: int
    rank: Mapping[str, NDArray[np.float64]]
    log_decay: Mapping[str, NDArray[np.float64]]
    early_rank: NDArray[np.float64]
    early_norm: NDArray[np.float64]
    norm: NDArray[np.float64]

    def relative(self, domain: str) -> NDArray[np.float64]:
        """r/d of a domain, (prompt, head)."""
        return self.rank[domain] / self.d

    def moved(self, domains: Sequence[str]) -> int:
        """How many heads have another label (high or low) on one of these kinds of input than on prose."""
        on_prose, *others = (is_high(self.rank[domain].mean(0), self.d) for domain in ("prose", *domains))
        return int(np.any([label != on_prose for label in others], 0).sum())

    def least_with_prose(self, domains: Sequence[str]) -> float:
        """The smallest Spearman of the heads' mean ranks on some kinds of input with those on prose; NaN where one is undefined."""
        return float(
            np.min([strata.spearman(self.rank[domain].mean(0), self.rank["prose"].mean(0)) for domain in domains])
        )

    def high_on(self, domain: str) -> int:
        """How many heads have a mean rank of half of d or more on a kind of input."""
        return int(is_high(self.rank[domain].mean(0), self.d).sum())

    def tied_on(self, domain: str) -> str:
        """How many heads share the most frequent mean rank on a kind of input, in words."""
        return f"{np.unique(self.rank[domain].mean(0), return_counts=True)[1].max()} of {len(self.heads)}"

    def decay_order(self, domains: Sequence[str]) -> float:
        """The smallest Spearman of the heads' mean log-decays over pairs of these kinds of input; NaN where nothing decays."""
        means = [self.log_decay[domain].mean(0) for domain in domains]
        return float(np.min([strata.spearman(one, other) for one, other in combinations(means, 2)]))

    def half_life(self, domain: str = "prose") -> NDArray[np.float64]:
        """Tokens after which a state has fallen to half, (head,), by the mean log-decay over prompts; infinite without decay."""
        return half_lives_from(self.log_decay[domain].mean(0))

    def filling(self, ranges: Sequence[tuple[float, float]] = ((4, 6), (10, 20), (40, 80))) -> dict[str, str]:
        """Median r/d on prose of the heads whose half-lives lie in some ranges of tokens: quantity -> number, in words."""
        lives, relative = self.half_life(), self.relative("prose").mean(0)
        inside = {(low, high): relative[(low <= lives) & (lives < high)] for low, high in ranges}
        return {
            f"median $r/d$ of heads with half-lives of {low:g} to {high:g} tokens": f"{np.median(x):.2f} ({x.size} heads)"
            if x.size
            else "no head"
            for (low, high), x in inside.items()
        }

    def under_the_law(self, low: float = 2, high: float = 20) -> str:
        """How many heads whose half-lives lie in a range of tokens have a rank on prose under that by the law, and their distances, in words."""
        inside = (low <= self.half_life()) & (self.half_life() < high)
        if not inside.any():
            return "no head"
        gaps = self.rank["prose"].mean(0)[inside] - self.predicted()[inside]
        return f"{(gaps < 0).sum()} of {len(gaps)}; mean difference {gaps.mean():+.1f}"

    def between(self) -> tuple[int, int]:
        """How many heads have a mean rank on prose between 0.2 d and 0.8 d, and how many of these a half-life at which the law says so."""
        low, high = self.around_gap()["window"]
        relative, lives = self.relative("prose").mean(0), self.half_life()
        there = (relative > strata.GAP[0]) & (relative < strata.GAP[1])
        return int(there.sum()), int((there & (lives >= low) & (lives <= high)).sum())

    def crossed(self, domains: Sequence[str]) -> int:
        """How many heads have a mean rank under 0.2 d on one of these kinds of input and over 0.8 d on another."""
        means = np.stack([self.relative(domain).mean(0) for domain in domains])
        return int(((means < strata.GAP[0]).any(0) & (means > strata.GAP[1]).any(0)).sum())

    def around_gap(self) -> dict[str, tuple[float, ...]]:
        """Where half-lives on prose lie, in tokens.

        Returns:
            "spread", the quantiles 0.05 and 0.95 of heads; "window", the half-lives at which the law gives ranks of 0.2 d and 0.8 d;
            "sides", the shares of heads below the window and above it.
        """
        lives, ends = self.half_life(), [share * self.d for share in strata.GAP]
        # Every rank by the law is over 1, at any half-life.
        window = tuple(half_life_at(rank) if rank > 1 else 0.0 for rank in ends)
        sides = (float((lives < window[0]).mean()), float((lives > window[1]).mean()))
        # A quantile between two heads without decay is infinite, and not the NaN that interpolation gives.
        low, high = (float(np.quantile(lives, at, method="closest_observation")) for at in (0.05, 0.95))
        return {"spread": (low, high), "window": window, "sides": sides}

    def predicted(self, domain: str = "prose") -> NDArray[np.float64]:
        """Ranks that the law predicts from log-decays alone, (head,); the mean over prompts and tokens decides."""
        return predicted_rank(torch.from_numpy(self.log_decay[domain].mean(0)), d=self.d).numpy()


def measure_groups(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    n_prompts: int = 16,
    n_tokens: int = 2048,
    domains: Sequence[str] = DOMAINS,
    seed: int = 0,
) -> Groups:
    """Trace prompts of every domain.

    Args:
        model, tokenizer: from `load_model` and `load_tokenizer`.
        n_prompts, n_tokens: of each domain; at most 16 for repeated symbols, over 128 tokens.
        domains: of `tasks.DOMAINS`, prose among them.
        seed: of the prompts.

    Raises:
        ValueError: prompts that are not longer than 128 tokens, no prose, or as in `domain_prompts`.

    Example:
        >>> from staterank_utils import load_model, load_tokenizer
        >>> measure_groups(load_model("hybrid"), load_tokenizer("hybrid"), n_prompts=1, n_tokens=128)
        Traceback (most recent call last):
            ...
        ValueError: ranks are compared between 128 tokens and the end: n_tokens must be over 128, got 128
    """
    if n_tokens <= EARLY:
        raise ValueError(
            f"ranks are compared between {EARLY} tokens and the end: n_tokens must be over {EARLY}, got {n_tokens}"
        )
    if "prose" not in domains:
        raise ValueError(f"the other domains are compared with prose, which is not among {', '.join(domains)}")
    traces = {}
    for domain in tqdm(domains, desc="domains", leave=False):
        prompts = domain_prompts(domain, tokenizer, n_prompts=n_prompts, n_tokens=n_tokens, seed=seed)
        traces[domain] = trace_heads(model, prompts, positions=[EARLY, n_tokens])
    prose = traces["prose"]
    return Groups(
        tuple(all_heads(model)),
        state_size(model),
        n_tokens,
        {domain: trace.rank[-1] for domain, trace in traces.items()},
        {domain: trace.log_decay for domain, trace in traces.items()},
        prose.rank[0],
        prose.norm[0],
        prose.norm[-1],
    )


def check_sizes(*, n_prompts: int, n_tokens: int, seed: int = 0) -> None:
    """Refuse prompts on which agreement over time and inputs cannot be measured.

    Args:
        n_prompts, n_tokens, seed: as in `measure_groups`.

    Raises:
        ValueError: fewer than 2 prompts, or prompts of less than twice the early position.

    Example:
        >>> check_sizes(n_prompts=1, n_tokens=512)
        Traceback (most recent call last):
            ...
        ValueError: n_prompts must be at least 2, got 1: the prompts of an input are halved for a control
    """
    if n_tokens < 2 * EARLY:
        raise ValueError(
            f"n_tokens must be at least {2 * EARLY}, got {n_tokens}: order is compared between {EARLY} and the end"
        )
    if n_prompts < 2:
        raise ValueError(
            f"n_prompts must be at least 2, got {n_prompts}: the prompts of an input are halved for a control"
        )


def spearman_by_prompt(early: Num[Tensor, "layer prompt head"], late: Num[Tensor, "layer prompt head"]) -> float:
    """Spearman over heads of what two positions give, prompt by prompt, and then the mean; NaN where one is undefined.

    Args:
        early, late: of the same heads, in any unit.

    Example:
        >>> early = torch.tensor([[[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]])
        >>> spearman_by_prompt(early, torch.tensor([[[2.0, 3.0, 4.0], [4.0, 3.0, 2.0]]])).__round__(6)
        0.0
    """
    pairs = ([of[:, prompt].flatten().double().numpy() for of in (early, late)] for prompt in range(early.shape[1]))
    return float(np.mean([strata.spearman(*pair) for pair in pairs]))


def agreements(variants: Mapping[str, Groups]) -> dict[str, tuple[float, float, float, float]]:
    """How well ranks agree between natural inputs, beside the best that could be expected and controls.

    Args:
        variants: "end", "initial" and "shuffled" -> ranks on all natural inputs.

    Returns:
        What is compared -> smallest and median Spearman, smallest and median kappa, over pairs of inputs.

    Example:
        >>> from staterank_utils import load_model, load_tokenizer
        >>> from staterank_utils.tasks import NATURAL_DOMAINS
        >>> model, tokenizer = load_model("hybrid"), load_tokenizer("hybrid")
        >>> groups = measure_groups(model, tokenizer, n_prompts=2, n_tokens=256, domains=NATURAL_DOMAINS)
        >>> len(agreements({"end": groups, "initial": groups, "shuffled": groups}))
        5
    """
    end = variants["end"]
    natural = [end.rank[domain] for domain in NATURAL_DOMAINS]
    half = len(natural[0]) // 2
    halves = [(table[:half], table[half : 2 * half]) for table in natural]
    compared: dict[str, Iterable[Any]] = {
        "trained, between inputs": combinations(natural, 2),
        "trained, between inputs, half the prompts": combinations([x for x, _ in halves], 2),
        "trained, same input, other prompts": halves,
    }
    for variant, label in (("initial", "before training"), ("shuffled", "shuffled")):
        tables = [variants[variant].rank[domain][:half] for domain in NATURAL_DOMAINS]
        compared[f"{label}, between inputs, half the prompts"] = combinations(tables, 2)

    def smallest_and_median(pairs: Iterable[Any]) -> tuple[float, float, float, float]:
        values = np.array([[f(a, b) for f in (mean_spearman, mean_kappa(end.d))] for a, b in pairs])
        (rho, kappa), (middle_rho, middle_kappa) = values.min(0), np.median(values, 0)
        return float(rho), float(middle_rho), float(kappa), float(middle_kappa)

    return {label: smallest_and_median(pairs) for label, pairs in compared.items()}


def settled(variants: Mapping[str, Groups], *, seed: int = 0) -> dict[str, tuple[float, float, float]]:
    """How similar the heads at the early position are to those at the end, beside untrained models and unrelated heads.

    Args:
        variants: "end", "initial" and "shuffled" -> ranks.
        seed: of the permutations.

    Returns:
        Weights -> Spearman of r, cosine of r, cosine of n.

    Example:
        >>> from staterank_utils import load_model, load_tokenizer
        >>> model, tokenizer = load_model("hybrid"), load_tokenizer("hybrid")
        >>> groups = measure_groups(model, tokenizer, n_prompts=2, n_tokens=256, domains=["prose"])
        >>> rows = settled({"end": groups, "initial": groups, "shuffled": groups})
        >>> [*rows], abs(rows["trained, permuted"][0]) < 0.1
        (['before training', 'shuffled', 'trained', 'trained, permuted'], True)
    """

    def pairs(groups: Groups) -> list[tuple[Any, Any, Any]]:
        rank = (groups.early_rank.mean(0), groups.rank["prose"].mean(0))
        norm = (groups.early_norm.mean(0), groups.norm.mean(0))
        return [(spearman, *rank), (cosine, *rank), (cosine, *norm)]

    def three(numbers: Iterable[float]) -> tuple[float, float, float]:
        first, second, third = numbers
        return first, second, third

    labels = {"initial": "before training", "shuffled": "shuffled", "end": "trained"}
    rows = {label: three(f(a, b) for f, a, b in pairs(variants[key])) for key, label in labels.items()}
    rows["trained, permuted"] = three(strata.unrelated(f, a, b, seed=seed) for f, a, b in pairs(variants["end"]))
    return rows


def first_claims(
    name: str,
    groups: Groups,
    *,
    initial: Groups | None,
    keys: Sequence[str] = ("C1", "C1c", "C2", "C2n", "C3", "C3a"),
) -> list[Row]:
    """Apply the rules of the first registration to ranks.

    Args:
        name: of the model.
        groups: on prose; for C3 on the natural domains, for C3a on the adversarial ones as well.
        initial: the model before training, on the same prose; None where its weights are not known.
        keys: of the claims, in this order.

    Example:
        >>> from staterank_utils.studies.ladder import load_measured
        >>> groups = load_measured("hybrid-text-0")[0].groups
        >>> [row["claim"] for row in first_claims("hybrid", groups["end"], initial=groups["initial"])]
        ['C1', 'C1c', 'C2', 'C2n', 'C3', 'C3a']
    """
    end = groups.rank["prose"]
    pair = np.stack([groups.early_rank, end], 1)
    norms = np.stack([groups.early_norm, groups.norm], 1)
    kappa = mean_kappa(groups.d)

    def over_time(similarity: Any, table: NDArray[np.float64]) -> Estimate:
        return bootstrap(lambda means: similarity(*means), table, of_means=True)

    def acquired() -> Row:
        if initial is None:
            return claims.not_testable("C1c", name, why="its weights before training are not known")
        n = min(len(end), len(initial.rank["prose"]))
        both = np.stack([initial.rank["prose"][:n], end[:n]], 1)
        return claims.judge("C1c", name, {"rho": over_time(spearman, both)})

    def over_inputs() -> Row:
        natural = [groups.rank[domain] for domain in NATURAL_DOMAINS]
        medians = [float(np.median(strata.off_diagonal(strata.pairwise(f, natural)))) for f in (mean_spearman, kappa)]
        smallest = {
            "min rho": strata.smallest_over_pairs(mean_spearman, natural),
            "min kappa": strata.smallest_over_pairs(kappa, natural),
        }
        return claims.judge("C3", name, smallest, medians=medians)

    def adversarial() -> Row:
        against_prose = {
            domain: bootstrap(mean_spearman, end, groups.rank[domain], n_resamples=500)
            for domain in ADVERSARIAL_DOMAINS
        }
        return claims.judge("C3a", name, against_prose)

    rows = {
        "C1": lambda: claims.judge("C1", name, strata.two_groups(groups.relative("prose"))),
        "C1c": acquired,
        "C2": lambda: claims.judge("C2", name, {"rho": over_time(spearman, pair)}),
        "C2n": lambda: claims.judge(
            "C2n", name, {"cosine of n": over_time(cosine, norms)}, note=f"; cosine of r {over_time(cosine, pair)}"
        ),
        "C3": over_inputs,
        "C3a": adversarial,
    }
    return [judged_if_defined(key, name, rows[key]) for key in keys]


def judged_if_defined(key: str, name: str, judge: Callable[[], Row]) -> Row:
    """The row of a claim, or why it cannot be tested where its measure is undefined on some draws of prompts.

    Args:
        key: of the claim.
        name: of the model.
        judge: makes the row.

    Example:
        >>> def undefined():
        ...     raise strata.UndefinedError("NaN on 3 of 500 draws")
        >>> judged_if_defined("C3", "tiny", undefined)["note"]
        ': NaN on 3 of 500 draws'
    """
    try:
        return judge()
    except strata.UndefinedError as error:
        return claims.not_testable(key, name, why=str(error))


@dataclass(frozen=True)
class Turning:
    """Ranks and norms at neighbouring tokens, held against two theorems of the paper.

    Attributes:
        n_states: states whose rank was held against min(t, d).
        rank_violations: how many exceed it.
        n_pairs: pairs of neighbouring tokens whose norm vectors were compared.
        turning_violations: how many turn farther than Theorem 4.4 allows.

    Example:
        >>> from staterank_utils import load_model, load_tokenizer
        >>> measure_turning(load_model("hybrid"), load_tokenizer("hybrid"), n_prompts=1, n_tokens=64).rank_violations
        0
    """

    n_states: int
    rank_violations: int
    n_pairs: int
    turning_violations: int

    def claims(self, name: str) -> list[Row]:
        """The rows of C1b and C2b."""
        counts = {"C1b": self.rank_violations, "C2b": self.turning_violations}
        return [claims.judge(key, name, {"violations": strata.exactly(float(n))}) for key, n in counts.items()]


def measure_turning(
    model: PreTrainedModel, tokenizer: Any, *, n_prompts: int = 2, n_tokens: int = 2048, seed: int = 0
) -> Turning:
    """Look at four windows of neighbouring tokens of prose.

    Args:
        model, tokenizer, n_prompts, n_tokens, seed: as in `measure_groups`.

    Example:
        >>> from staterank_utils import load_model, load_tokenizer
        >>> measure_turning(load_model("pure"), load_tokenizer("pure"), n_prompts=1, n_tokens=64).turning_violations
        0
    """
    starts = (1, EARLY, n_tokens // 2, n_tokens - STEPS + 1)
    positions = sorted({t for start in starts for t in range(start, start + STEPS) if 1 <= t <= n_tokens})
    prompts = domain_prompts("prose", tokenizer, n_prompts=n_prompts, n_tokens=n_tokens, seed=seed)
    trace = trace_heads(model, prompts, positions=positions)
    bound = np.minimum(positions, state_size(model))[:, None, None]
    turns = strata.turning(trace.norm.transpose(1, 0, 2), positions)
    return Turning(
        trace.rank.size, int((trace.rank > bound).sum()), len(turns), int((turns[:, 1] < turns[:, 2] - 1e-12).sum())
    )


# ---------------------------------------------------------------- the law


@dataclass(frozen=True)
class Law:
    """How far the memory law holds of a model.

    Attributes:
        bound_violations, bound_states: states whose rank exceeds the memory bound, of how many (C0).
        void: share of them that decay does not bound.
        factors: by which the decay of a layer's heads was multiplied.
        base_rank, base_decay: of the unscaled model, (prompt, head).
        scaled_rank: (factor, prompt, head).
        d: largest possible rank.

    Example:
        >>> from staterank_utils.studies.ladder import load_measured
        >>> law = load_measured("hybrid-text-0")[0].laws["end"]
        >>> law.bound_violations, law.scaled_rank.shape  # 6 factors, 4 prompts, 9 layers of 16 heads
        (0, (6, 4, 144))
    """

    bound_violations: int
    bound_states: int
    void: float
    factors: tuple[float, ...]
    base_rank: NDArray[np.float64]
    base_decay: NDArray[np.float64]
    scaled_rank: NDArray[np.float64]
    d: int

    def predicted_changes(self) -> NDArray[np.float64]:
        """(factor, head): change of rank by the law, from the mean log-decay of the unscaled head."""
        decay = torch.from_numpy(self.base_decay.mean(0))
        before = predicted_rank(decay, d=self.d)
        factors = torch.tensor(self.factors, dtype=torch.float64)[:, None]
        return (predicted_rank(factors * decay, d=self.d) - before).numpy()

    def agreement(self) -> Estimate:
        """Spearman of predicted and measured change over heads and factors whose predicted change is not 0 (C0c)."""
        predicted = self.predicted_changes()
        moves = predicted != 0
        if moves.sum() < 2:
            return strata.exactly(float("nan"))
        changes = (self.scaled_rank - self.base_rank).transpose(1, 0, 2)  # (prompt, factor, head)
        return bootstrap(lambda means: spearman(predicted[moves], means[moves]), changes, of_means=True)

    def by_factor(self) -> dict[str, float]:
        """The same for each factor alone, where the sign of the change cannot help; exploratory."""
        predicted, measured = self.predicted_changes(), (self.scaled_rank - self.base_rank).mean(1)
        return {
            f"{factor:g}": spearman(before[before != 0], found[before != 0])
            if (before != 0).sum() > 1
            else float("nan")
            for factor, before, found in zip(self.factors, predicted, measured, strict=True)
        }

    def numbers(self) -> dict[str, str]:
        """What scaling decays did to ranks: quantity -> number, in words."""
        predicted, measured = self.predicted_changes(), (self.scaled_rank - self.base_rank).mean(1)
        expected, found = (table[predicted != 0] for table in (predicted, measured))
        alone = {}
        if len(expected) > 1:
            slope, _ = np.polyfit(expected, found, 1)
            alone = {
                "Spearman of its direction alone (up or down) and measured change": f"{spearman(np.sign(expected), found):.2f}",
                "measured change per unit of predicted change, slope of a line": f"{slope:.2f}",
            }
        return {
            "Spearman of predicted and measured change, all factors": f"{self.agreement()}",
            **alone,
            "pairs of head and factor with no predicted change": self.still_in_words(),
            **{f"Spearman, log-decay times {factor}": f"{rho:.2f}" for factor, rho in self.by_factor().items()},
        }

    def scaled_half_life(self) -> NDArray[np.float64]:
        """(factor, head): half-life in tokens once the log-decay is multiplied."""
        return half_lives_from(np.array(self.factors)[:, None] * self.base_decay.mean(0))

    def scaled_relative(self) -> NDArray[np.float64]:
        """(factor, head): r/d then, mean over prompts."""
        return np.asarray(self.scaled_rank.mean(1) / self.d)

    def still_in_words(self) -> str:
        """How many pairs of head and factor the law predicts no change for, and how far their ranks moved."""
        still = self.predicted_changes() == 0
        moved = np.abs((self.scaled_rank - self.base_rank).mean(1))[still]
        moved_by = (
            f"; their ranks moved by {np.median(moved):.1f} in the median, {moved.max():.0f} at most"
            if moved.size
            else ""
        )
        return f"{still.sum()} of {still.size}{moved_by}"

    @property
    def n_still(self) -> int:
        """Pairs of head and factor whose predicted change is 0."""
        return int((self.predicted_changes() == 0).sum())


def measure_law(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    n_prompts: int = 4,
    n_tokens: int = 1024,
    bound_tokens: int | None = None,
    factors: Sequence[float] = tuple(map(float, claims.SECOND["C0c"].numbers["factors"])),
    seed: int = 0,
) -> Law:
    """Hold ranks against the memory bound, and scale the decay of one layer's heads after the other.

    Args:
        model, tokenizer, n_prompts, seed: as in `measure_groups`.
        n_tokens: of the prompts whose decay is scaled.
        bound_tokens: of those that are held against the bound; by default as many.
        factors: of log-decay; none for the bound alone.

    Returns:
        What was measured; no factors where the architecture has no decay.

    Example:
        >>> from staterank_utils import load_model, load_tokenizer
        >>> law = measure_law(load_model("pure"), load_tokenizer("pure"), n_prompts=1, n_tokens=192, factors=[4.0])
        >>> law.agreement().point > 0.5
        True
    """
    length = bound_tokens or n_tokens
    prompts = domain_prompts("prose", tokenizer, n_prompts=n_prompts, n_tokens=max(length, n_tokens), seed=seed)
    check = check_memory_bound(model, prompts[:, :length], positions=[min(EARLY, length // 2), length])
    prompts = prompts[:, :n_tokens]
    positions = [n_tokens // 2, n_tokens]
    base = trace_heads(model, prompts, positions=positions)
    heads = all_heads(model)
    scaled = np.repeat(base.rank[-1:], len(factors), axis=0)
    layers = sorted({layer for layer, _ in heads})
    if not all(layer.decay_can_change for layer in linear_layers(model)):
        layers, factors, scaled = [], (), scaled[:0]  # no decay that could be scaled
    for layer in tqdm(layers, desc="layers scaled", leave=False):
        of_layer = [index for index, (of, _) in enumerate(heads) if of == layer]
        for row, factor in enumerate(factors):
            with scale_decay(model, factor, [heads[index] for index in of_layer]):
                scaled[row][:, of_layer] = trace_heads(model, prompts, positions=positions).rank[-1][:, of_layer]
    return Law(
        check.n_violations,
        check.rank.numel(),
        float(check.void.double().mean()),
        tuple(factors),
        base.rank[-1],
        base.log_decay,
        scaled,
        state_size(model),
    )


def law_claims(name: str, groups: Groups, law: Law, *, keys: Sequence[str] = ("C0", "C0a", "C0c")) -> list[Row]:
    """Apply the rules of the second registration to the law.

    Args:
        name: of the model.
        groups, law: as measured.
        keys: of the claims, in this order.

    Example:
        >>> from staterank_utils.studies.ladder import load_measured
        >>> measured, _ = load_measured("hybrid-text-0")
        >>> [row["claim"] for row in law_claims("hybrid", measured.groups["end"], measured.laws["end"])]
        ['C0', 'C0a', 'C0c']
    """
    counted = f" of {law.bound_states:,} states, {law.void:.0%} of them not bounded by decay"
    decays = bool(groups.log_decay["prose"].max() < 0)
    violations = {"violations": strata.exactly(float(law.bound_violations))}
    rows: dict[str, Callable[[], Row]] = {
        "C0": lambda: claims.judge("C0", name, violations, note=counted),
        "C0a": lambda: _explained(name, groups),
        "C0c": lambda: _causal(name, law),
    }
    if not decays:
        why = "its layers have no decay"
        rows |= {key: partial(claims.not_testable, key, name, why=why) for key in ("C0a", "C0c")}
    return [judged_if_defined(key, name, rows[key]) for key in keys]


def _explained(name: str, groups: Groups) -> Row:
    fit = law_fit(groups)
    if math.isnan(fit["R^2"].point):
        return claims.not_testable("C0a", name, why="all heads have the same rank, so there is no variance to explain")
    return claims.judge("C0a", name, fit)


def _causal(name: str, law: Law) -> Row:
    if not law.factors:
        return claims.not_measured("C0c", name, why="decay was not scaled, which takes the full profile")
    if (law.predicted_changes() != 0).sum() < 2:
        return claims.not_testable("C0c", name, why="the law predicts no change of rank")
    return claims.judge("C0c", name, {"rho": law.agreement()}, note=f"; {law.n_still} pairs predicted to stay")


def law_fit(groups: Groups, domain: str = "prose", *, strict: bool = True) -> dict[str, Estimate]:
    """The registered measures of C0a, with intervals over prompts.

    Args:
        groups: as measured.
        domain: of the prompts.
        strict: as in `bootstrap`.

    Returns:
        "R^2", "labels" (share of low and high labels that the law gives) and "R^2 between" (heads with 0.1 d < r < 0.9 d alone).

    Example:
        >>> from staterank_utils import load_model, load_tokenizer
        >>> groups = measure_groups(load_model("hybrid"), load_tokenizer("hybrid"), n_prompts=2, n_tokens=256, domains=["prose"])
        >>> list(law_fit(groups))
        ['R^2', 'labels', 'R^2 between']
    """
    d = groups.d
    low, high = (claims.SECOND["C0a"].numbers[end] * d for end in ("low", "high"))
    between = (groups.rank[domain].mean(0) > low) & (groups.rank[domain].mean(0) < high)
    table = np.stack([groups.rank[domain], groups.log_decay[domain]], 1)  # (prompt, 2, head)

    def predicted(means: NDArray[np.float64]) -> NDArray[np.float64]:
        return predicted_rank(torch.from_numpy(means[1]), d=d).numpy()

    def fit(means: NDArray[np.float64], chosen: NDArray[np.bool_]) -> float:
        if chosen.sum() < 2:
            return float("nan")
        return strata.explained(predicted(means)[chosen], means[0][chosen])

    everyone = np.ones_like(between)
    return {
        "R^2": bootstrap(lambda means: fit(means, everyone), table, of_means=True, strict=strict),
        "labels": bootstrap(
            lambda means: float((is_high(predicted(means), d) == is_high(means[0], d)).mean()),
            table,
            of_means=True,
            strict=strict,
        ),
        "R^2 between": bootstrap(lambda means: fit(means, between), table, of_means=True, strict=strict),
    }


def decay_fit(groups: Groups, domain: str = "prose") -> Estimate:
    """R^2 of a straight line in the geometric mean decay of each head, the replication's predictor, with its interval over prompts.

    Args:
        groups: as measured.
        domain: of the prompts.

    Example:
        >>> from staterank_utils import load_model, load_tokenizer
        >>> groups = measure_groups(load_model("hybrid"), load_tokenizer("hybrid"), n_prompts=2, n_tokens=256, domains=["prose"])
        >>> decay_fit(groups).point > 0.5
        True
    """
    pair = np.stack([np.exp(groups.log_decay[domain]), groups.rank[domain]], 1)
    return bootstrap(lambda means: strata.r_squared(*means), pair, of_means=True, strict=False)


def fit_in_words(groups: Groups, fit: Mapping[str, Estimate]) -> dict[str, str]:
    """How well the law and a line in the decay explain ranks on prose: quantity -> number, in words.

    Args:
        groups: as measured.
        fit: from `law_fit`.

    Example:
        >>> from staterank_utils import load_model, load_tokenizer
        >>> groups = measure_groups(load_model("hybrid"), load_tokenizer("hybrid"), n_prompts=2, n_tokens=256, domains=["prose"])
        >>> len(fit_in_words(groups, law_fit(groups)))
        6
    """
    return {
        "$R^2$ over all heads": f"{fit['R^2']}",
        "$R^2$ over heads with $0.1\\,d < r < 0.9\\,d$ alone": f"{fit['R^2 between']}",
        "share of heads with the same label, high or low": f"{fit['labels']}",
        "heads with half-lives of 2 to 20 tokens whose rank is under that by the law": groups.under_the_law(),
        "$R^2$ of a line in the geometric mean decay, all heads": f"{decay_fit(groups)}",
        "$R^2$ of that line over heads with $0.1\\,d < r < 0.9\\,d$ alone": f"{_decay_fit_between(groups):.3f}",
    }


def _decay_fit_between(groups: Groups) -> float:
    """R^2 of the line in the geometric mean decay that is fitted on all heads, over those that C0a calls between."""
    decay, rank = np.exp(groups.log_decay["prose"].mean(0)), groups.rank["prose"].mean(0)
    low, high = (claims.SECOND["C0a"].numbers[end] * groups.d for end in ("low", "high"))
    between = (rank > low) & (rank < high)
    if between.sum() < 2:
        return float("nan")
    errors = (rank - np.polyval(np.polyfit(decay, rank, 1), decay))[between]
    return float(1 - (errors**2).sum() / ((rank[between] - rank[between].mean()) ** 2).sum())


def shares(groups: Groups, domain: str = "prose") -> dict[str, float]:
    """Share outside the gap and two-group share, as measured and by the law (C0b).

    Args:
        groups: as measured.
        domain: of the prompts.

    Returns:
        "outside", "two groups", "outside by law", "two groups by law".

    Example:
        >>> from staterank_utils import load_model, load_tokenizer
        >>> groups = measure_groups(load_model("hybrid"), load_tokenizer("hybrid"), n_prompts=2, n_tokens=256, domains=["prose"])
        >>> sorted(shares(groups))
        ['outside', 'outside by law', 'two groups', 'two groups by law']
    """
    measured, by_law = groups.relative(domain).mean(0), groups.predicted(domain) / groups.d
    return {
        "outside": strata.share_outside(measured),
        "two groups": strata.two_group_share(measured),
        "outside by law": strata.share_outside(by_law),
        "two groups by law": strata.two_group_share(by_law),
    }


def evidence(groups: Groups, domain: str = "prose") -> dict[str, float]:
    """What speaks for two groups, as measured and by the law, without intervals.

    Args:
        groups: as measured.
        domain: of the prompts.

    Returns:
        "Sarle", "dip p", "share outside", "two-group share", "outside by law", "two groups by law".

    Example:
        >>> from staterank_utils import load_model, load_tokenizer
        >>> groups = measure_groups(load_model("hybrid"), load_tokenizer("hybrid"), n_prompts=2, n_tokens=256, domains=["prose"])
        >>> [*evidence(groups)][2:4]
        ['share outside', 'two-group share']
    """
    relative, of = groups.relative(domain).mean(0), shares(groups, domain)
    return {
        "Sarle": strata.sarle_coefficient(relative),
        "dip p": strata.dip_p_value(relative),
        "share outside": of["outside"],
        "two-group share": of["two groups"],
        "outside by law": of["outside by law"],
        "two groups by law": of["two groups by law"],
    }
