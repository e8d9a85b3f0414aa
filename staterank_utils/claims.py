"""The registered claims, and how a measurement becomes a verdict.

`CLAIMS` was fixed on 2026-11-23, before any embedded model was trained; the book prints it. A threshold is never moved after
a look. Other measures may be added and are then marked exploratory.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from staterank_utils.strata import Estimate

HOLDS, PARTLY, FAILS = "holds", "holds in part", "does not hold"
NOT_TESTABLE = "not testable on this model"


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
    if key not in CLAIMS:
        raise KeyError(f"there is no claim {key!r}: expected one of {', '.join(CLAIMS)}")
    return {"claim": key, "model": model, "criteria": [], "verdict": NOT_TESTABLE, "note": f": {why}"}


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


def by_model(rows: Iterable[Mapping[str, Any]], key: str) -> str:
    """The verdicts on one claim in a sentence's words; empty where no row is about it.

    Args:
        rows: as `judge` gives them, one a claim and model.
        key: of the claim.

    Example:
        >>> rho = {"hybrid": Estimate(0.95, 0.92, 0.97), "pure": Estimate(0.6, 0.5, 0.7)}
        >>> by_model([judge("C2", model, {"rho": estimate}) for model, estimate in rho.items()], "C2")
        'holds (hybrid); does not hold (pure)'
    """
    return "; ".join(f"{row['verdict']} ({row['model']})" for row in rows if row["claim"] == key)


def beside_stored(rows: Iterable[Mapping[str, Any]], stored: Iterable[Mapping[str, Any]], key: str) -> str:
    """`by_model` of a run, and of the stored full-profile run where there is one.

    Args:
        rows, stored: as in `by_model`.
        key: of the claim.

    Example:
        >>> row = judge("C2", "hybrid", {"rho": Estimate(0.95, 0.92, 0.97)})
        >>> beside_stored([row], [], "C2"), beside_stored([row], [row], "C2")
        ('holds (hybrid) in this run', 'holds (hybrid) in this run, and holds (hybrid) in the stored full one')
    """
    here, there = f"{by_model(rows, key)} in this run", by_model(stored, key)
    return f"{here}, and {there} in the stored full one" if there else here


def registered_table() -> str:
    """The registered claims as a Markdown table.

    Example:
        >>> table = registered_table().splitlines()
        >>> table[0], len(table) - 2 == len(CLAIMS)
        ('|  | claim | measure | holds | holds in part |', True)
    """
    rows = [(f"**{key}**", c.statement, c.measure, c.holds, c.partly) for key, c in CLAIMS.items()]
    return markdown_table(("", "claim", "measure", "holds", "holds in part"), rows)


def verdict_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Stored rows as a Markdown table: claim, measure, threshold, paper, model, measured with interval, verdict.

    Args:
        rows: as `judge` gives them.

    Raises:
        KeyError: a row about a claim that is not registered.

    Example:
        >>> print(verdict_table([judge("C2", "hybrid", {"rho": Estimate(0.95, 0.92, 0.97)})]).splitlines()[-1][-58:])
        | > 0.90 | hybrid | rho 0.950 [0.920, 0.970] | **holds** |
    """
    cells = []
    for row in rows:
        claim = CLAIMS[row["claim"]]
        measured = "; ".join(f"{number['label']} {_interval(number)}" for number in row["criteria"])
        cells.append(
            (
                f"**{row['claim']}** {claim.statement}",
                claim.measure,
                claim.holds,
                claim.paper,
                row["model"],
                measured,
                f"**{row['verdict']}**{row['note']}",
            )
        )
    return markdown_table(("claim", "measure", "holds if", "paper", "model", "measured", "verdict"), cells)


def overview_table(folders: Mapping[str, Path], models: Sequence[str] | Mapping[str, str]) -> str:
    """The book's claims table: one row a claim, one column a model, from the stored results of every notebook.

    Args:
        folders: where results lie, `NOTEBOOK.json`, by what they are called, the most telling first. The first that has a
            verdict shows it with its numbers, the others below it with the verdict alone.
        models: column heads, in order; or column head -> model, as results name it. A claim without a result shows as not yet tested.

    Example:
        >>> table = overview_table({}, ["hybrid"])
        >>> table.splitlines()[0], table.count("not yet tested") == len(CLAIMS)
        ('| claim | holds if | paper | hybrid |', True)
    """
    columns = models if isinstance(models, Mapping) else {model: model for model in models}
    cells: dict[tuple[str, str], list[str]] = {}
    for label, folder in folders.items():
        for notebook in sorted({claim.notebook for claim in CLAIMS.values()}):
            file = folder / f"{notebook}.json"
            for row in json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else ():
                lines = cells.setdefault((row["claim"], row["model"]), [])
                if lines:
                    lines.append(f"{label}: {row['verdict']}")
                else:
                    numbers = (f"{n['label']} {_interval(n)}" for n in row["criteria"])
                    lines += [f"**{row['verdict']}** ({label})", *numbers]
    rows = [
        (
            f"**{key}** {claim.statement}",
            claim.holds,
            claim.paper,
            *("<br>".join(cells.get((key, model), ["not yet tested"])) for model in columns.values()),
        )
        for key, claim in CLAIMS.items()
    ]
    return markdown_table(("claim", "holds if", "paper", *columns), rows)


def _interval(number: Mapping[str, Any]) -> str:
    if number["point"] is None:
        return "undefined"
    if number["label"] == "violations":
        return f"{number['point']:.0f}"
    return f"{number['point']:.3f} [{number['low']:.3f}, {number['high']:.3f}]"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a vertical bar inside a cell is escaped, a line break becomes a space.

    Args:
        head: of the columns.
        rows: as many cells each.

    Example:
        >>> print(markdown_table(("model", "r"), [("hybrid", "12")]))
        | model | r |
        | --- | --- |
        | hybrid | 12 |
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def table_rows(table: str) -> list[tuple[str, ...]]:
    """The rows of a table that `markdown_table` made, without its head.

    Args:
        table: the Markdown; an empty one has no rows.

    Example:
        >>> table_rows(markdown_table(("model", "r"), [("hybrid", "12"), ("a|b", "3")]))
        [('hybrid', '12'), ('a|b', '3')]
    """
    cells = (line[2:-2].split(" | ") for line in table.splitlines()[2:])
    return [tuple(cell.replace("\\|", "|") for cell in row) for row in cells]
