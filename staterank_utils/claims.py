"""The registered claims, and how a measurement becomes a verdict.

`CLAIMS` was fixed on 2026-11-23, before any embedded model was trained, `SECOND` on 2026-11-27, before any model of the ladder was
trained, and `THIRD` on 2026-11-28, before any model that its claims judge was trained; the book prints all. A threshold is never moved after a look. Other measures may be added and are then marked
exploratory.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from staterank_utils.strata import Estimate, exactly, spread

HOLDS, PARTLY, FAILS = "holds", "holds in part", "does not hold"
NOT_TESTABLE, NOT_MEASURED = "not testable on this model", "not measured"
ENOUGH_SEEDS = 3  # for a verdict on training to be shown without their number


@dataclass(frozen=True)
class Claim:
    """A claim of arXiv:2602.02195 with its registered measure.

    Attributes:
        statement: the claim in a clause.
        measure: what is computed.
        holds, partly: thresholds for the two better verdicts.
        paper: the figure given for it, as reported by an independent reader unless it says otherwise.
        notebook: where it is tested.

    Example:
        >>> CLAIMS["C2"].holds, CLAIMS["C2"].notebook
        ('> 0.90', '02_input_invariance')
    """

    statement: str
    measure: str
    holds: str
    partly: str
    paper: str
    notebook: str


CLAIMS = {
    "C1": Claim(
        "heads fall into two groups",
        "r/d over all heads, prose: Sarle's coefficient > 5/9; Hartigan's dip p < 0.05; share of heads outside (0.2, 0.8) >= 2/3",
        "all three", "two of three", "one layer of Qwen3-Next drawn (Fig. 1)", "01_stratification",
    ),
    "C1b": Claim(
        "rank(S(t)) <= min(t, d)", "violations over every head, position and prompt", "0", "–", "Theorem 3.1", "01_stratification",
    ),
    "C1c": Claim(
        "the grouping is acquired in training", "Spearman between r at initialisation and at the end, same inputs",
        "< 0.5", "0.5 to 0.9", "said, no number known", "01_stratification",
    ),
    "C2": Claim("the order is kept over time", "Spearman of r between t = 128 and T", "> 0.90", "> 0.70", "> 0.90", "02_input_invariance"),
    "C2n": Claim(
        "so is the vector of nuclear norms", "cosine of n(t) between t = 128 and T; of r: reported with it (> 0.97)",
        "> 0.98", "> 0.90", "> 0.98; of r > 0.97", "02_input_invariance",
    ),
    "C2b": Claim("cos(n(t), n(t-1)) >= (1 - r_t)/(1 + r_t)", "violations", "0", "–", "Theorem 4.4", "02_input_invariance"),
    "C3": Claim(
        "the grouping does not depend on natural input",
        "smallest Spearman, and smallest kappa of the labels, over all pairs of prose, code, arithmetic, retrieval",
        "> 0.90 and > 0.80", "medians over pairs beyond both", "consistent, no number known", "02_input_invariance",
    ),
    "C3a": Claim(
        "nor on adversarial input",
        "Spearman with prose, each of: rare character repeated, common number repeated, random tokens, shuffled prose",
        "all > 0.90", "half of them", "consistent, no number known", "02_input_invariance",
    ),
    "C4": Claim(
        "removing low-rank heads hurts more than removing high-rank ones",
        "per task, same number of heads: score(high removed) - score(low removed), paired over prompts, at 38.9 % of heads, or, where "
        "no arm keeps half of the intact score there, at the largest share of the registered grid at which one does",
        "> 0 in most tasks, and low below the random arms", "> 0 in some, < 0 in none",
        "needle 93.8 → 46.9 (low removed), 90.6 (high removed)", "03_ablation_asymmetry",
    ),
    "C4a": Claim("high-rank heads are redundant", "score(high removed) / intact at 38.9 %", ">= 0.95", ">= 0.80", "0.97 (Instruct), 0.69 (Thinking)", "03_ablation_asymmetry"),
    "C5": Claim(
        "JRNP removes 38.9 % of the recurrent-state bytes and keeps accuracy",
        "mean over tasks of score / intact; bytes from the cache's tensors",
        ">= 0.95 and above every random draw", ">= 0.80, above the mean draw", "38.9 %; GSM8K 96.9 after pruning", "04_joint_rank_norm_pruning",
    ),
}  # fmt: skip

PREAMBLE = """\
Unit: a head of a linear-attention layer. *r* is its effective rank (ε = 10⁻⁴) at the last position, mean over prompts;
*d* = min(*d*ₖ, *d*ᵥ); a head is *low* under 0.5 *d* and *high* from 0.5 *d*. *T* = 2,048 tokens unless said; quick runs may use
fewer prompts and tokens, state so, and get the same thresholds. Intervals: 95 %, bootstrap over prompts (and over draws or seeds
where there are any). "Holds" needs the whole interval beyond the threshold; a point beyond it whose interval is not: "holds in
part"."""

CONTROLS = """\
Shares of heads for C4: 1/48, 2/48, 5, 10, 12.5, 25, 38.9, 50 %. Tasks for C4 and C5: those of which the intact model masters at
least half; fewer than two such tasks: "not testable on this model". C4 is "inverted" where the difference is under 0 in most
tasks, and shows "no asymmetry" where the intervals hold 0. α for C5: 0.5, model-wide maximum; the sweep is exploratory.

Beside the claims stand: C1 and C3 on the model at initialisation and with its weights shuffled within each tensor; C4 and C5
with at least 8 random draws, and arms by decay, nuclear norm and write strength; everything on both embedded models, and, where
several training seeds exist, on each."""


@dataclass(frozen=True)
class SecondClaim:
    """A claim of the second or third registration: its text, and the numbers that both print and judge it.

    Attributes:
        statement: the claim in a clause.
        measure: what is computed.
        holds, partly, otherwise: the rule, from the best verdict to the worst.
        numbers: every size and threshold that the text names, by the name that stands in it.

    Example:
        >>> SECOND["C0a"].text("holds"), SECOND["C0a"].numbers["middle"]
        ('0.80, 0.90 and 0.50', 0.5)
    """

    statement: str
    measure: str
    holds: str
    partly: str
    otherwise: str
    numbers: Mapping[str, Any]

    def text(self, field: str) -> str:
        """One of the fields as it is printed."""
        shown = {
            name: ", ".join(map(str, number)) if isinstance(number, tuple) else number
            for name, number in self.numbers.items()
        }
        template: str = getattr(self, field)
        return template.format(**shown)


def _fractions(*texts: str) -> tuple[Fraction, ...]:
    return tuple(map(Fraction, texts))


SECOND = {
    "C0": SecondClaim(
        "rank obeys the memory bound",
        "heads, positions, prompts at which the rank at {factor} eps exceeds the bound from the head's own decays and norms; float32 or better states",
        "{violations}", "–", FAILS, {"factor": 1.01, "violations": 0},
    ),
    "C0a": SecondClaim(
        "rank is memory length, clipped, with nothing fitted",
        "r against min(d, 1 + log(1/eps)/abs(mean log a)): R^2 over all heads, share of low/high labels it gives, and R^2 over heads with "
        "{low} d < r < {high} d alone (clipping inflates the first)",
        "{r_squared:.2f}, {labels:.2f} and {middle:.2f}", "first two", FAILS,
        {"low": 0.1, "high": 0.9, "r_squared": 0.80, "labels": 0.90, "middle": 0.50},
    ),
    "C0b": SecondClaim(
        "the groups are the spread of half-lives, clipped",
        "share outside, and two-group share, by the law and as measured, in each model",
        "both within {within:.2f} in >= {models:.0%} of models", "one of them", FAILS, {"within": 0.10, "models": 0.80},
    ),
    "C0c": SecondClaim(
        "causally: rank follows decay",
        "all heads of one layer at a time scaled (their inputs stay as they were), log a by {factors}: Spearman of predicted and measured "
        "change of r, over heads whose predicted change is not 0; the others counted apart",
        ">= {holds:.2f}", ">= {partly:.2f}", FAILS,
        {"factors": _fractions("1/8", "1/4", "1/2", "2", "4", "8"), "holds": 0.90, "partly": 0.70},
    ),
    "C1d": SecondClaim(
        "the groups are inherited from the gates' initialisation",
        "two-group share, class-broad gates minus narrow ones (all half-lives {half_life} tokens: predicted r = d/2 at d = 64), {seeds} "
        'seeds, held-out losses within {bits:.2f} bits per byte (else "not testable")',
        ">= {holds:.2f} in both", "> {partly} in both", f"{FAILS} (acquired)",
        {"half_life": 2.4, "seeds": 2, "bits": 0.02, "holds": 0.10, "partly": 0},
    ),
    "C1e": SecondClaim(
        "training on tasks unmakes the groups",
        "share outside, and two-group share, on prose: text minus 63 % tasks, at equal steps",
        "first >= {holds:.2f}, ranges over seeds disjoint", "first > {partly} in every pair of seeds", FAILS,
        {"holds": 0.10, "partly": 0},
    ),
    "C4b": SecondClaim(
        "rank matters beyond the choice of layers",
        "D layer-matched; against it, {orders} random orders within every layer, arms = first k and last k of the same order, nested over "
        "doses, both signs = {values} values of D, {windows} windows per text, the same windows for low and high; hybrid and pure judged apart",
        "abs(D) beyond {beyond:.1%} of theirs in every seed", "in most seeds", "explained by layers",
        {"orders": 60, "values": 120, "windows": 4, "beyond": 0.975},
    ),
    "C4c": SecondClaim(
        "the asymmetry is a matter of layer 0",
        "share at which the two arms cross, over the model, and with layer 0 protected or softmax in its place",
        "moves by >= {holds:.2f}, or vanishes", "by >= {partly:.2f}", FAILS, {"holds": 0.10, "partly": 0.05},
    ),
    "C6": SecondClaim(
        "long memory is spare where attention recalls",
        "gain = loss on the first minus on the second copy of {copy} held-out tokens (nats per token); half-lives capped at {cap} tokens; "
        "hybrid and pure of the same data; kappa of labels before and after. Intact gain < {gain:.1f}: not testable (then the pairs trained "
        "with tasks)",
        "cap takes < {hybrid:.0%} of the hybrid's gain and > {pure:.0%} of the pure's, both kappa >= {kappa:.1f}",
        "the pure's share > {times} x the hybrid's", FAILS,
        {"copy": 512, "cap": 16, "gain": 0.3, "hybrid": 0.10, "pure": 0.50, "kappa": 0.9, "times": 5},
    ),
    "C7": SecondClaim(
        "high-rank heads are redundant with each other",
        "of the heads with r >= {full} d, all but k removed, k = {keeps} of them, mean over {draws} draws: the smallest k that undoes "
        "{undone:.0%} of the damage of removing all; beside it groups of the same size at random",
        "k <= {holds}, random group's k larger", "k <= {partly}", FAILS,
        {"full": 0.9, "keeps": _fractions("1/16", "1/8", "1/4", "3/8", "1/2"), "draws": 16, "undone": 0.8,
         "holds": Fraction(1, 4), "partly": Fraction(1, 2)},
    ),
    "C5a": SecondClaim(
        "JRNP beats chance at its own share",
        "added nats at {share:.1%}, and at the largest share at which rank alone adds at most {spare} nats: joint below every one of "
        "{draws} random draws",
        "at both", "at one", FAILS, {"share": 0.389, "spare": 0.1, "draws": 40, "holds": 2, "partly": 1},
    ),
    "C5b": SecondClaim(
        "rank alone is the better half of the score",
        "added nats at {share:.0%}: joint (alpha {alpha}) minus rank alone (alpha 1)",
        "> {more}, every seed", "> {more}, most seeds", FAILS, {"share": 0.25, "alpha": 0.5, "more": 0},
    ),
    "C10": SecondClaim(
        "the groups need decay",
        "two-group share: DeltaNet (no decay) against the rules with decay, trained alike",
        "DeltaNet < {without:.2f}, all others >= {decay:.2f}", "DeltaNet lowest", FAILS, {"without": 0.05, "decay": 0.10},
    ),
}  # fmt: skip

SECOND_TERMS = """\
Unit, intervals and verdict words are those of the first registration. Where a claim speaks of seeds, each training seed is one
observation, and the range over seeds is given; a verdict from fewer than three seeds prints their number and stays off the home page.
Heads are ordered in float32; ties in effective rank are broken by the stable rank.

- *Share outside*: share of heads with r/d outside (0.2, 0.8). *Two-group share*: the smaller of the share with r < 0.2 d and the share
  with r > 0.8 d. A single full group scores 0 in it, and 1 in "outside". Both are always given.
- *Added nats*: loss without the heads minus loss with all, nats per token, mean over two texts: held-out books and held-out code (16
  windows of 1,024 tokens each, bootstrap over windows). The four domains of the first registration are given beside it and are
  secondary: three of them were not trained on, and their losses start near those of a unigram model.
- A *dose* is a share of all linear heads. It counts where both arms' mean loss over the two texts is below the mean loss of their
  unigram models (add-one, fitted on other text of the same kind). C4c's crossing and C7 are exempt from this.
- *Schemes*: over the model; *layer-matched*, k of every layer's 16 for k = 1, 2, 4, 5, 6, 7, 8; *layer 0 protected*, the lowest or
  highest of the other layers, shares still of all linear heads.
- *D*: area (trapezoid over the actual shares from the first dose to 5/16) of added nats without the highest ranks minus added nats
  without the lowest. D < 0 is the paper's direction."""

SECOND_READINGS = """\
What the text leaves open was read as follows, before any model of the ladder was trained:

- *Doses* over the model and with layer 0 protected: the sixteenths of the layer-matched scheme, so that D is an area over the same shares
  in all three, and beside them the shares of the first registration. The first dose is 1/16.
- *Calibration*: heads are ordered on 32 prompts of 1,024 tokens, 16 of technical prose and 16 of held-out code, that share no text
  with the windows on which losses are taken.
- *C0* looks at every head, at the last 64 tokens before t = 128 and at the end, on 4 prompts of prose.
- *C0c*: one prompt set (4 prompts of prose, 1,024 tokens); the predicted change is that of the law, from the mean log-decay of the
  unscaled head.
- *C4b*: the D of rank is taken on the same windows as those of the random orders, and absolute values are compared. *Most seeds* means
  more than half.
- *C4c*: the arms cross at the share where added nats without the highest ranks first exceed those without the lowest, linear between
  doses. Where they do not cross over the model, the claim is not testable.
- *C5a*, *C7*: "at most" and "undoes" are of points, means over windows and draws. The largest share is taken among the doses.
- *C7*: the random groups are drawn from all heads; a group that no k restores has k = 1.
- *C6*: capped at a half-life of 16 tokens means that no token decays a state by less than 2^(-1/16)."""

SECOND_LATER = """\
An audit of the code found more that the text leaves open. These readings were written on 2026-11-27 as well, but *after* the models
`hybrid-text-0` and `hybrid-text-1` had been measured:

- A dose counts by the two arms that a claim compares: lowest and highest ranks, for C5b joint score and rank alone, for C5a joint score
  and random draws. D is taken over the doses that count. A seed or dose that does not count is left out of a verdict.
- *C0c* pools all six factors, as the code did before any training. The correlation for each factor alone is lower and is given beside it,
  exploratory.
- *C4b* compares absolute values, so that both signs of a random order count as one. Signed values would allow more of them.
- *C4c*: an arm of highest ranks that costs more from the first dose on crosses at that dose. A seed whose arms do not cross over the model is
  left out, and said.
- *C6*: the first token of each copy is left out. One seed with a small intact gain makes a pair not testable. If the text pair is testable, pairs
  trained with tasks are exploratory.
- *C7*: r is that of the calibration prompts; with fewer than 16 heads of r >= 0.9 d it is not testable.
- C0b, C4c, C5a, C7 and C10 are judged by points, without intervals."""


THIRD = {
    "C11": SecondClaim(
        "a hybrid recalls with its heads of lowest rank",
        "gain as in C6 without {share:.0%} of the heads of every layer: those of lowest rank, of highest rank, and each of {draws} random "
        "draws; in every hybrid of the ladder on which this was not measured before. Intact gain < {gain:.1f}: left out",
        "without the lowest: below every random draw and < {left:.0%} of the intact gain; without the highest: above the mean random draw; in "
        "every model",
        "in most models", FAILS,
        {"share": 0.25, "draws": 4, "gain": 0.3, "left": 0.50,
         "known": ("hybrid-text-0", "hybrid-text-2", "hybrid-tasks63-0", "hybrid-tasks63-1", "hybrid-tasks10-0", "hybrid-wide-0")},
    ),
    "C12": SecondClaim(
        "heads of high rank are spare where layer 0 is a softmax layer",
        "softmaxfirst, seeds other than {seen}, layer-matched: D, against random orders within layers as in C4b; added nats at {share:.0%} without "
        "the highest ranks, against each random draw",
        "D < 0 and abs(D) beyond {beyond:.1%} of theirs, and below every draw, in every seed", "D < 0 in every seed", FAILS,
        {"design": "softmaxfirst", "seen": 0, "share": 0.25, "beyond": 0.975, "sign": -1},
    ),
    "C13": SecondClaim(
        "heads of high rank are the costly ones where gates begin as the class sets them",
        "default, seeds other than {seen}, layer-matched: D, against random orders within layers as in C4b; added nats at {share:.0%} without "
        "the highest ranks, against each random draw",
        "D > 0 and abs(D) beyond {beyond:.1%} of theirs, and above every draw, in every seed", "D > 0 in every seed", FAILS,
        {"design": "default", "seen": 0, "share": 0.25, "beyond": 0.975, "sign": 1},
    ),
}  # fmt: skip

ORDER = (*CLAIMS, *SECOND, *THIRD)  # of claims, wherever they are listed

THIRD_TERMS = """\
- *C11*, before any model of wave 5 was trained. What was known: in all six hybrids of waves 1 to 3 on which it was measured, the gain was lost
  without the lowest ranks and kept without the highest. That was seen first and so is exploratory. The rule is for models that came later.
  Beside it stands, as a rival explanation, what the same removals add to the loss on text that is read once: a model that is damaged more may
  recall less for that reason alone.
- *C12* and *C13*, after wave 5, before any second seed of its designs was trained. What was known: `hybrid-softmaxfirst-0` and
  `hybrid-default-0` do what these claims say. The seeds that were seen first are left out."""


@dataclass(frozen=True)
class Criterion:
    """A measured number against its threshold.

    Attributes:
        label: what was measured, short.
        estimate: the number with its interval.
        threshold: the registered threshold.
        above: whether the number must be above it (else below).
        closed: whether the threshold itself counts as beyond.

    Example:
        >>> rho = Criterion("rho", Estimate(0.95, 0.89, 0.97), 0.90)
        >>> rho.point_beyond, rho.interval_beyond
        (True, False)
    """

    label: str
    estimate: Estimate
    threshold: float
    above: bool = True
    closed: bool = False

    def _beyond(self, value: float) -> bool:
        if self.closed and value == self.threshold:
            return True
        return value > self.threshold if self.above else value < self.threshold

    @property
    def point_beyond(self) -> bool:
        """Whether the number itself lies beyond the threshold; a NaN does not."""
        return self._beyond(self.estimate.point)

    @property
    def interval_beyond(self) -> bool:
        """Whether the whole interval lies beyond the threshold; a NaN does not."""
        return self._beyond(self.estimate.low if self.above else self.estimate.high)


def verdict(criteria: Sequence[Criterion], *, partly: bool) -> str:
    """Judge a claim by the registered rule.

    Args:
        criteria: all of them must be met for "holds". A NaN meets none.
        partly: whether the claim's own condition for "holds in part" is met.

    Returns:
        "holds" where every interval lies beyond its threshold whole; "holds in part" where only every point does, or
        `partly`; else "does not hold".

    Raises:
        ValueError: there are no criteria.

    Example:
        >>> verdict([Criterion("rho", Estimate(0.95, 0.89, 0.97), 0.90)], partly=False)
        'holds in part'
    """
    if not criteria:
        raise ValueError("a verdict needs at least one criterion")
    if all(criterion.interval_beyond for criterion in criteria):
        return HOLDS
    return PARTLY if partly or all(criterion.point_beyond for criterion in criteria) else FAILS


def judge(
    key: str, model: str, measured: Mapping[str, Estimate], *, medians: Sequence[float] = (), note: str = ""
) -> dict[str, Any]:
    """Apply the registered rule of a claim to what was measured; the row that results store and tables show.

    Args:
        key: a claim that has a rule here (`RULES`).
        model: what was measured.
        measured: label -> number with its interval, in the order of the claim's measures.
        medians: for C3 alone, the medians over pairs of the two measures, in their order.
        note: shown behind the verdict.

    Returns:
        "claim", "model", "criteria" (label, point, low and high of each measure, 6 digits, None where undefined),
        "verdict" and "note".

    Raises:
        KeyError: the claim has no rule here.
        ValueError: not as many measures as the rule has thresholds, or not as many medians as it looks at.

    Example:
        >>> judge("C2", "hybrid", {"rho": Estimate(0.95, 0.92, 0.97)})["verdict"]
        'holds'
    """
    rule = RULES[key]
    estimates = list(measured.values())
    thresholds = rule.thresholds * len(estimates) if rule.each else rule.thresholds
    if len(estimates) != len(thresholds):
        raise ValueError(f"{key} judges {len(thresholds)} measures, got {len(estimates)}: {', '.join(measured)}")
    if len(medians) != rule.n_medians:
        hint = "one for each measure, over pairs of inputs" if rule.n_medians else "leave them out"
        raise ValueError(f"{key} is judged with {rule.n_medians} medians, got {list(medians)}: {hint}")
    criteria = [
        Criterion(label, e, t, above=up, closed=closed)
        for (label, e), (t, up, closed) in zip(measured.items(), thresholds, strict=True)
    ]
    judgement = verdict(criteria, partly=rule.partly(criteria, medians))
    numbers = [{"label": c.label, **_rounded(c.estimate)} for c in criteria]
    return {"claim": key, "model": model, "criteria": numbers, "verdict": judgement, "note": note}


def not_testable(key: str, model: str, *, why: str) -> dict[str, Any]:
    """The row of a claim that cannot be put to this model; `why` is shown behind the verdict.

    Raises:
        KeyError: there is no such claim.

    Example:
        >>> not_testable("C1c", "mine", why="its weights before training are not known")["verdict"]
        'not testable on this model'
    """
    if key not in ORDER:
        raise KeyError(f"there is no claim {key!r}: expected one of {', '.join(ORDER)}")
    return {"claim": key, "model": model, "criteria": [], "verdict": NOT_TESTABLE, "note": f": {why}"}


def not_measured(key: str, model: str, *, why: str) -> dict[str, Any]:
    """The row of a claim that was not put to this model, though it could be.

    Raises:
        KeyError: there is no such claim.

    Example:
        >>> not_measured("C4", "mine", why="no tasks")["verdict"]
        'not measured'
    """
    return not_testable(key, model, why=why) | {"verdict": NOT_MEASURED}


def judge_asymmetry(
    model: str, differences: Mapping[str, Estimate], below_random: Mapping[str, Estimate], *, note: str = ""
) -> dict[str, Any]:
    """Apply the registered rule of C4: does removing low-rank heads hurt more than removing high-rank ones?

    Args:
        model: what was measured.
        differences: task -> score(high removed) - score(low removed), paired over prompts, for every task that counts.
        below_random: for the same tasks, mean score(random removed) - score(low removed); both stand in the row.
        note: shown behind the verdict.

    Returns:
        The row that results store and tables show. An interval that lies above 0 whole counts as "> 0".

    Raises:
        ValueError: the two name different tasks.

    Example:
        >>> up, level = Estimate(0.5, 0.3, 0.7), Estimate(0.0, -0.1, 0.1)
        >>> judge_asymmetry("hybrid", {"needle": up, "recall": level}, {"needle": up, "recall": up})["verdict"]
        'holds in part'
    """
    if list(differences) != list(below_random):
        raise ValueError(f"expected the same tasks, got {list(differences)} and {list(below_random)}")
    above, under = (sum(sign * (e.low if sign > 0 else e.high) > 0 for e in differences.values()) for sign in (1, -1))
    n_tasks = len(differences)
    if n_tasks < 2:
        judgement = NOT_TESTABLE
    elif 2 * above > n_tasks and 2 * sum(e.low > 0 for e in below_random.values()) > n_tasks:
        judgement = HOLDS
    elif above and not under:
        judgement = PARTLY
    elif 2 * under > n_tasks:
        judgement = f"{FAILS}: inverted"
    elif above or under:
        judgement = f"{FAILS}: mixed"
    else:
        judgement = f"{FAILS}: no asymmetry"
    numbers = [{"label": task, **_rounded(e)} for task, e in differences.items()]
    numbers += [{"label": f"random - low, {task}", **_rounded(e)} for task, e in below_random.items()]
    return {"claim": "C4", "model": model, "criteria": numbers, "verdict": judgement, "note": note}


def _rounded(estimate: Estimate) -> dict[str, float | None]:
    """An estimate as JSON can hold it; what is undefined is null."""
    return {name: None if math.isnan(x) else round(x, 6) for name, x in asdict(estimate).items()}


@dataclass(frozen=True)
class Rule:
    """A registered rule: when a claim holds, and when it holds in part.

    Attributes:
        thresholds: (value, must be above, value itself counts), one for each measure.
        partly: (criteria, medians) -> whether the claim's own condition for "holds in part" is met.
        each: the one threshold is for every measure given.
        n_medians: how many medians `partly` looks at.

    Example:
        >>> RULES["C2"].thresholds, RULES["C2"].partly([Criterion("rho", Estimate(0.8, 0.6, 0.9), 0.90)], ())
        (((0.9, True, False),), True)
    """

    thresholds: tuple[tuple[float, bool, bool], ...]
    partly: Callable[[Sequence[Criterion], Sequence[float]], bool] = lambda criteria, medians: False
    each: bool = False
    n_medians: int = 0


def _met(criteria: Sequence[Criterion]) -> int:
    return sum(criterion.point_beyond for criterion in criteria)


RULES = {
    "C1": Rule(
        ((5 / 9, True, False), (0.05, False, False), (2 / 3, True, True)), lambda criteria, _: _met(criteria) >= 2
    ),
    "C1b": Rule(((0.0, False, True),)),
    "C1c": Rule(((0.5, False, False),), lambda criteria, _: criteria[0].estimate.point <= 0.9),
    "C2": Rule(((0.90, True, False),), lambda criteria, _: criteria[0].estimate.point > 0.70),
    "C2n": Rule(((0.98, True, False),), lambda criteria, _: criteria[0].estimate.point > 0.90),
    "C2b": Rule(((0.0, False, True),)),
    "C3": Rule(
        ((0.90, True, False), (0.80, True, False)),
        lambda _, medians: medians[0] > 0.90 and medians[1] > 0.80,
        n_medians=2,
    ),
    "C3a": Rule(((0.90, True, False),), lambda criteria, _: 2 * _met(criteria) >= len(criteria), each=True),
    "C4a": Rule(((0.95, True, True),), lambda criteria, _: criteria[0].estimate.point >= 0.80),
    # score / intact, its lead over the best random draw, its lead over the mean of them
    "C5": Rule(
        ((0.95, True, True), (0.0, True, False), (0.0, True, False)),
        lambda criteria, _: criteria[0].estimate.point >= 0.80 and criteria[2].point_beyond,
    ),
}


def _numbers(key: str, *names: str) -> tuple[Any, ...]:
    return tuple(SECOND[key].numbers[name] for name in names)


RULES |= {
    "C0": Rule(((float(SECOND["C0"].numbers["violations"]), False, True),)),
    "C0a": Rule(
        tuple((number, True, True) for number in _numbers("C0a", "r_squared", "labels", "middle")),
        lambda criteria, _: all(criterion.point_beyond for criterion in criteria[:2]),
    ),
    "C0c": Rule(
        ((SECOND["C0c"].numbers["holds"], True, True),),
        lambda criteria, _: criteria[0].estimate.point >= SECOND["C0c"].numbers["partly"],
    ),
}


def judge_law(differences: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """Apply the registered rule of C0b: do the groups follow from the half-lives?

    Args:
        differences: model -> (share outside, two-group share), each by the law minus as measured.

    Returns:
        A row as `judge` gives it: the shares of models in which both differences, the first and the second are small enough.

    Raises:
        ValueError: no models.

    Example:
        >>> judge_law({"a": (0.05, 0.02), "b": (0.01, 0.30)})["verdict"]
        'holds in part'
    """
    if not differences:
        raise ValueError("C0b is judged over models, got none")
    within, enough = _numbers("C0b", "within", "models")
    small = [[abs(difference) <= within for difference in pair] for pair in differences.values()]
    shares = {
        "both within": _share(map(all, small)),
        "outside within": _share(first for first, _ in small),
        "two groups within": _share(second for _, second in small),
    }
    both, *single = (share >= enough for share in shares.values())
    return _row("C0b", "the ladder", shares, HOLDS if both else PARTLY if any(single) else FAILS)


def judge_gates(model: str, differences: Mapping[str, float], bits: Mapping[str, float]) -> dict[str, Any]:
    """Apply the registered rule of C1d: are the groups inherited from the gates' initialisation?

    Args:
        model: what was measured.
        differences: seed -> two-group share with class-broad gates minus that with narrow ones.
        bits: seed -> difference of their held-out losses, bits per byte.

    Returns:
        A row as `judge` gives it.

    Example:
        >>> judge_gates("hybrid", {"0": 0.15, "1": 0.12}, {"0": 0.01, "1": -0.01})["verdict"]
        'holds'
    """
    holds, partly, close, seeds = _numbers("C1d", "holds", "partly", "bits", "seeds")
    if far := [seed for seed in bits if round(abs(bits[seed]), 6) > close]:
        return not_testable(
            "C1d", model, why=f"held-out losses of seed {', '.join(far)} differ by more than {close} bits per byte"
        )
    if len(differences) < seeds:
        return not_testable("C1d", model, why=f"it needs {seeds} seeds, got {len(differences)}")
    judgement = (
        HOLDS
        if min(differences.values()) >= holds
        else PARTLY
        if min(differences.values()) > partly
        else SECOND["C1d"].otherwise
    )
    return _row("C1d", model, _by_seed(differences), judgement, n_seeds=len(differences))


def judge_tasks(
    model: str,
    text: Sequence[float],
    tasks: Sequence[float],
    *,
    two_groups: tuple[Sequence[float], Sequence[float]] | None = None,
) -> dict[str, Any]:
    """Apply the registered rule of C1e: does training on tasks unmake the groups?

    Args:
        model: what was measured.
        text, tasks: share outside on prose, one number per seed, trained on text and on 63 % tasks.
        two_groups: the two-group shares of the same models, which stand beside it and decide nothing.

    Returns:
        A row as `judge` gives it: means over seeds with the range of seeds, and the difference of the means.

    Raises:
        ValueError: no seeds of one of the two.

    Example:
        >>> judge_tasks("hybrid", [0.80, 0.78], [0.60, 0.62])["verdict"]
        'holds'
    """
    if not text or not tasks:
        raise ValueError(f"C1e compares seeds, got {len(text)} trained on text and {len(tasks)} on tasks")
    holds, partly = _numbers("C1e", "holds", "partly")
    gap, difference = min(text) - max(tasks), spread(text).point - spread(tasks).point
    judgement = HOLDS if difference >= holds and gap > 0 else PARTLY if gap > partly else FAILS
    measured: dict[str, float | Estimate] = {"outside, text - tasks": difference}
    measured |= {"outside, text": spread(text), "outside, tasks": spread(tasks)}
    if two_groups:
        of_text, of_tasks = map(spread, two_groups)
        measured |= {"two groups, text - tasks": of_text.point - of_tasks.point}
        measured |= {"two groups, text": of_text, "two groups, tasks": of_tasks}
    return _row("C1e", model, measured, judgement, n_seeds=min(len(text), len(tasks)))


def judge_within_layers(model: str, beyond: Mapping[str, float]) -> dict[str, Any]:
    """Apply the registered rule of C4b: does rank matter beyond the choice of layers?

    Args:
        model: what was measured.
        beyond: seed -> share of the random orders' D that is smaller in absolute value than the D of rank.

    Returns:
        A row as `judge` gives it.

    Example:
        >>> judge_within_layers("hybrid", {"0": 1.0, "1": 0.9, "2": 0.99})["verdict"]
        'holds in part'
    """
    [threshold] = _numbers("C4b", "beyond")
    return _every_seed("C4b", model, beyond, {seed: share >= threshold for seed, share in beyond.items()})


def judge_alpha(model: str, differences: Mapping[str, float]) -> dict[str, Any]:
    """Apply the registered rule of C5b: is rank alone the better half of the saturation score?

    Args:
        model: what was measured.
        differences: seed -> added nats with the joint score minus with rank alone.

    Returns:
        A row as `judge` gives it.

    Example:
        >>> judge_alpha("hybrid", {"0": 0.4, "1": 0.2})["verdict"], judge_alpha("hybrid", {"0": 0.4})["note"]
        ('holds', '; 1 seed')
    """
    [more] = _numbers("C5b", "more")
    return _every_seed("C5b", model, differences, {seed: value > more for seed, value in differences.items()})


def judge_layer_zero(model: str, crossings: Mapping[str, tuple[float | None, float | None]]) -> dict[str, Any]:
    """Apply the registered rule of C4c: is the asymmetry a matter of layer 0?

    Args:
        model: what was measured.
        crossings: seed -> share of heads at which the arms cross, over the model and with layer 0 protected (or softmax in its
            place); None where they do not cross.

    Returns:
        A row as `judge` gives it; "holds" needs every seed. A crossing that vanishes moves by 1.

    Example:
        >>> judge_layer_zero("hybrid", {"0": (0.35, 0.47), "1": (0.36, None)})["verdict"]
        'holds'
    """
    moved = {
        seed: 1.0 if protected is None else abs(protected - whole)
        for seed, (whole, protected) in crossings.items()
        if whole is not None
    }
    if not moved:
        return not_testable("C4c", model, why="the two arms do not cross over the model")
    holds, partly = _numbers("C4c", "holds", "partly")
    judgement = HOLDS if min(moved.values()) >= holds else PARTLY if min(moved.values()) >= partly else FAILS
    row = _row("C4c", model, _by_seed(moved), judgement, n_seeds=len(moved))
    if left_out := sorted(set(crossings) - set(moved)):
        row["note"] += f"; no crossing in seed {', '.join(left_out)}"
    return row


def judge_chance(model: str, leads: Mapping[str, float]) -> dict[str, Any]:
    """Apply the registered rule of C5a: does Joint Rank-Norm Pruning beat chance at its own share?

    Args:
        model: what was measured.
        leads: dose -> added nats with the joint score minus those of the best random draw, for the registered doses that count.

    Returns:
        A row as `judge` gives it. Below every draw means under 0.

    Example:
        >>> judge_chance("hybrid", {"38.9%": 0.2, "25.0%": -0.1})["verdict"]
        'holds in part'
    """
    if not leads:
        return not_testable("C5a", model, why="without these heads it is worse than a unigram model, at both doses")
    holds, partly = _numbers("C5a", "holds", "partly")
    below = sum(lead < 0 for lead in leads.values())
    row = _row("C5a", model, leads, HOLDS if below >= holds else PARTLY if below >= partly else FAILS)
    return row | {"note": "" if len(leads) == holds else f"; {len(leads)} of {holds} doses count"}


def judge_recall(
    model: str,
    taken: Mapping[str, tuple[Estimate, Estimate]],
    kappa: Mapping[str, tuple[float, float]],
    gain: Mapping[str, tuple[float, float]],
    *,
    note: str = "",
) -> dict[str, Any]:
    """Apply the registered rule of C6: is long memory spare where attention recalls?

    Args:
        model: the pair that was measured.
        taken: seed -> share of the induction gain that the cap takes, (hybrid, pure).
        kappa: seed -> kappa of the labels before and after, (hybrid, pure).
        gain: seed -> intact gain, nats per token, (hybrid, pure).
        note: shown behind the verdict.

    Returns:
        A row as `judge` gives it; "holds" needs the intervals of every seed beyond the thresholds, "holds in part" only the points, or the
        claim's own condition in every seed.

    Example:
        >>> taken = {"0": (Estimate(0.02, 0.01, 0.03), Estimate(0.9, 0.8, 1.0))}
        >>> judge_recall("text", taken, {"0": (1.0, 0.95)}, {"0": (2.0, 1.0)})["verdict"]
        'holds'
    """
    least, hybrid, pure, agree, times = _numbers("C6", "gain", "hybrid", "pure", "kappa", "times")
    if small := [seed for seed in gain if not min(gain[seed]) >= least]:
        return not_testable(
            "C6",
            model,
            why=f"the smaller intact gain of the pair is under {least} nats per token in seed {', '.join(small)}",
        )
    same = all(k >= agree for pair in kappa.values() for k in pair)
    whole = all(h.high < hybrid and p.low > pure for h, p in taken.values())
    points = all(h.point < hybrid and p.point > pure for h, p in taken.values())
    ratio = all(p.point > times * h.point and p.point > 0 for h, p in taken.values())
    judgement = HOLDS if same and whole else PARTLY if (same and points) or ratio else FAILS
    numbers = {
        f"taken, {kind}, seed {seed}": pair[i]
        for seed, pair in taken.items()
        for i, kind in enumerate(("hybrid", "pure"))
    }
    row = _row("C6", model, numbers, judgement, n_seeds=len(taken))
    return row | {"note": row["note"] + note}


def judge_recalling_heads(kept: Mapping[str, tuple[float, float, float, Sequence[float]]]) -> dict[str, Any]:
    """Apply the registered rule of C11: does a hybrid recall with its heads of lowest rank?

    Args:
        kept: model -> induction gain of the intact model, without the lowest ranks, without the highest, and without each draw of random
            heads, nats per token.

    Returns:
        A row as `judge` gives it: per model, the gains without the lowest and without the highest ranks as shares of the intact one.

    Raises:
        ValueError: fewer random draws than were registered.

    Example:
        >>> judge_recalling_heads({"a": (0.8, 0.1, 0.8, [0.5, 0.4, 0.6, 0.5])})["verdict"]
        'holds'
    """
    least, left, draws = (THIRD["C11"].numbers[name] for name in ("gain", "left", "draws"))
    if few := [name for name, (*_, random) in kept.items() if len(random) < draws]:
        raise ValueError(f"C11 compares with {draws} random draws; {', '.join(few)} has fewer")
    testable = {name: gains for name, gains in kept.items() if gains[0] >= least}
    if not testable:
        return not_testable("C11", "later hybrids", why=f"no intact gain reaches {least} nats per token")
    met = {
        name: bool(low < min(random) and low < left * intact and high > sum(random) / len(random))
        for name, (intact, low, high, random) in testable.items()
    }
    judgement = _all_or_most(met.values(), THIRD["C11"].otherwise)
    numbers = {
        f"{name}, without {group}": gain / intact
        for name, (intact, low, high, _) in testable.items()
        for group, gain in (("lowest", low), ("highest", high))
    }
    row = _row("C11", "later hybrids", numbers, judgement)
    left_out = sorted(set(kept) - set(testable))
    return row | {"note": f"; hardly recalls and left out: {', '.join(left_out)}" if left_out else ""}


def judge_direction(key: str, seeds: Mapping[str, tuple[float, float, float, Sequence[float]]]) -> dict[str, Any]:
    """Apply the registered rule of C12 or C13: are heads of high rank spare, or the costly ones, within layers?

    Args:
        key: "C12" or "C13".
        seeds: seed -> D, share of the random orders' D that is smaller in absolute value, added nats without the highest ranks, and without
            each draw of random heads. Seeds that were seen before the claim was registered are left out.

    Returns:
        A row as `judge` gives it.

    Example:
        >>> judge_direction("C12", {"1": (-0.2, 1.0, 0.1, [0.4, 0.5])})["verdict"]
        'holds'
        >>> judge_direction("C12", {"0": (-0.2, 1.0, 0.1, [0.4, 0.5])})["verdict"]
        'not measured'
    """
    design, seen, beyond, sign = (THIRD[key].numbers[name] for name in ("design", "seen", "beyond", "sign"))
    later = {seed: found for seed, found in seeds.items() if seed != str(seen)}
    if not later:
        return not_measured(key, design, why="no seed was trained since it was registered")
    met = [
        sign * area > 0 and share >= beyond and sign * high > max(sign * draw for draw in random)
        for area, share, high, random in later.values()
    ]
    same = all(sign * area > 0 for area, *_ in later.values())
    numbers = {f"D, seed {seed}": area for seed, (area, *_) in later.items()}
    return _row(key, design, numbers, HOLDS if all(met) else PARTLY if same else FAILS, n_seeds=len(later))


def judge_redundancy(model: str, high: Fraction, random: Fraction) -> dict[str, Any]:
    """Apply the registered rule of C7: are high-rank heads redundant with each other?

    Args:
        model: what was measured.
        high, random: the smallest share of a group that undoes the damage of removing all of it, of high-rank heads and of random ones.

    Returns:
        A row as `judge` gives it.

    Example:
        >>> judge_redundancy("hybrid", Fraction(1, 8), Fraction(3, 8))["verdict"]
        'holds'
    """
    holds, partly = _numbers("C7", "holds", "partly")
    judgement = HOLDS if high <= holds and random > high else PARTLY if high <= partly else FAILS
    return _row("C7", model, {"k, high": float(high), "k, random": float(random)}, judgement)


def judge_need_of_decay(shares: Mapping[str, float], *, without: Sequence[str]) -> dict[str, Any]:
    """Apply the registered rule of C10: do the groups need decay?

    Args:
        shares: model, named by its update rule and seed -> two-group share.
        without: the models without decay, one per seed.

    Returns:
        A row as `judge` gives it.

    Raises:
        ValueError: no model without decay, or none with.

    Example:
        >>> judge_need_of_decay({"DeltaNet": 0.02, "KDA": 0.2, "gated": 0.3}, without=["DeltaNet"])["verdict"]
        'holds'
    """
    under, least = _numbers("C10", "without", "decay")
    alone, others = ([shares[name] for name in shares if (name in without) == is_alone] for is_alone in (True, False))
    if not alone or not others:
        raise ValueError(
            f"C10 compares models without decay, got {len(alone)}, with models that have it, got {len(others)}"
        )
    judgement = HOLDS if max(alone) < under and min(others) >= least else PARTLY if max(alone) < min(others) else FAILS
    return _row("C10", "hybrid, update rules", shares, judgement, n_seeds=len(alone))


def _every_seed(key: str, model: str, values: Mapping[str, float], met: Mapping[str, bool]) -> dict[str, Any]:
    judgement = _all_or_most(met.values(), SECOND[key].otherwise)
    return _row(key, model, _by_seed(values), judgement, n_seeds=len(met))


def _all_or_most(met: Collection[bool], otherwise: str) -> str:
    """The verdict of a rule that asks for every seed or model, and in part for most."""
    return HOLDS if all(met) else PARTLY if 2 * sum(met) > len(met) else otherwise


def has_few_seeds(row: Mapping[str, Any]) -> bool:
    """Whether a row speaks of training seeds and has too few of them for the home page.

    Example:
        >>> has_few_seeds(judge_alpha("hybrid", {"0": 0.4})), has_few_seeds(judge("C2", "hybrid", {"rho": Estimate(0.95, 0.92, 0.97)}))
        (True, False)
    """
    return row.get("n_seeds", ENOUGH_SEEDS) < ENOUGH_SEEDS


def _by_seed(values: Mapping[str, float]) -> dict[str, float]:
    return {f"seed {seed}": value for seed, value in values.items()}


def _share(met: Iterable[bool]) -> float:
    flags = list(met)
    return sum(flags) / len(flags)


def _row(
    key: str, model: str, numbers: Mapping[str, float | Estimate], judgement: str, *, n_seeds: int | None = None
) -> dict[str, Any]:
    """A row of numbers, those without an interval as points; fewer than three seeds are said, and any number is kept."""
    few = n_seeds is not None and n_seeds < ENOUGH_SEEDS
    note = f"; {n_seeds} seed{'s' if n_seeds != 1 else ''}" if few else ""
    criteria = [
        {"label": label, **_rounded(x if isinstance(x, Estimate) else exactly(float(x)))}
        for label, x in numbers.items()
    ]
    row = {"claim": key, "model": model, "criteria": criteria, "verdict": judgement, "note": note}
    return row if n_seeds is None else row | {"n_seeds": n_seeds}
