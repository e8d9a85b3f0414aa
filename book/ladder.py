"""The page of the ladder: tables made from the stored results of every model that was trained and measured."""

import json
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from staterank_utils.claims import CLAIMS, FAILS, HOLDS, NOT_MEASURED, NOT_TESTABLE, PARTLY, SECOND
from staterank_utils.markdown import brief_table, markdown_table
from staterank_utils.models import EMBEDDED
from staterank_utils.results import STORED
from staterank_utils.strata import Estimate
from staterank_utils.studies import ladder
from staterank_utils.studies.ladder import Measured, ladder_claims
from staterank_utils.studies.removal import HIGH, LOW, RANDOM, SCHEMES
from staterank_utils.tasks import NATURAL_DOMAINS
from training.recipes import RECIPES

CANDIDATES = ("tasks10", "text", "wide")  # in this order; the first pair that holds C1 and C3 is embedded
SHORT = {HOLDS: "holds", PARTLY: "in part", FAILS: "no", NOT_TESTABLE: "–", NOT_MEASURED: "–"}
DOSE = 0.25


@cache
def stored_models() -> dict[str, tuple[Measured, dict[str, Any]]]:
    """Every stored model, in the order of the recipes."""
    stored = ladder.stored_models()
    return {name: stored[name] for name in RECIPES if name in stored}


def first_pair() -> dict[str, dict[str, Any]]:
    """Verdicts of the pair that was embedded before the ladder, by model."""
    rows = json.loads((STORED / "first_pair.json").read_text(encoding="utf-8"))["rows"]
    return {f"{name}-9m": {"rows": [row for row in rows if row["model"] == name]} for name in EMBEDDED}


def ladder_tables() -> dict[str, str]:
    """The generated parts of the page, by name."""
    models = stored_models()
    data = {name: content for name, (_, content) in models.items()}
    missing = [name for name in RECIPES if name not in models]
    return {
        "ladder_models": f"{len(models)} of {len(RECIPES)} models are trained and measured."
        + (f" Not yet: {', '.join(f'`{name}`' for name in missing)}." if missing else ""),
        "ladder_first": _by_model(data | first_pair(), CLAIMS),
        "ladder_second": _by_model(data, SECOND),
        "ladder_over": brief_table(ladder_claims({name: measured for name, (measured, _) in models.items()})),
        "ladder_numbers": _numbers(data),
        "ladder_causal": _causal(data),
        "ladder_removal": _removal(data),
        "ladder_signs": _signs({name: measured for name, (measured, _) in models.items()}),
        "ladder_secondary": _secondary(data),
        "ladder_recall": _recall(data),
        "ladder_pair": _pair(data),
    }


def _by_model(data: Mapping[str, Mapping[str, Any]], registered: Iterable[str]) -> str:
    """One row per model, one column per claim that a single model decides."""
    verdicts = {name: {row["claim"]: row["verdict"] for row in content["rows"]} for name, content in data.items()}
    keys = [key for key in registered if any(key in of_model for of_model in verdicts.values())]
    rows = [(f"`{name}`", *(_short(of_model.get(key)) for key in keys)) for name, of_model in verdicts.items()]
    return markdown_table(("model", *keys), rows)


def _short(verdict: str | None) -> str:
    """The verdict in a word; an inverted one is said so."""
    if verdict is None:
        return "–"
    word, _, how = verdict.partition(": ")
    return ", ".join(filter(None, (SHORT[word], how)))


def _pair(data: Mapping[str, Mapping[str, Any]]) -> str:
    """Which pair is embedded, by the rule that was fixed before any was trained."""
    rows: list[tuple[str, ...]] = []
    chosen = ""
    for candidate in CANDIDATES:
        names = [f"{kind}-{candidate}-0" for kind in ("hybrid", "pure")]
        if not set(names) <= set(data):
            return f"{markdown_table(('candidate', 'C1', 'C3'), rows)}\n\nThe pair `{candidate}` decides; it is not measured yet."
        held = True
        for name in names:
            verdicts = {row["claim"]: row["verdict"] for row in data[name]["rows"]}
            rows.append((f"`{name}`", *(_short(verdicts[key]) for key in ("C1", "C3"))))
            held = held and verdicts["C1"] == verdicts["C3"] == HOLDS
        if held:
            chosen = f"The pair `{candidate}` is the first that holds both, so it is embedded."
            break
    else:
        chosen = "No pair holds both, so the text pair is embedded as it is."
    return f"{markdown_table(('candidate', 'C1', 'C3'), rows)}\n\n{chosen}"


def _interval(numbers: list[Any]) -> str:
    return "–" if None in numbers else f"{Estimate(*numbers):.2f}"


def _numbers(data: Mapping[str, Mapping[str, Any]]) -> str:
    head = ("model", "bits per byte", "share outside", "two groups", "the same by the law", "before training")
    rows = []
    for name, content in data.items():
        numbers = content["numbers"]
        end, initial = (numbers["shares"][variant] for variant in ("end", "initial"))
        rows.append(
            (
                f"`{name}`",
                f"{content['training']['bits_per_byte_held_out_books']:.3f}",
                _interval(numbers["over heads"]["share outside"]),
                _interval(numbers["over heads"]["two-group share"]),
                f"{end['outside by law']:.2f}, {end['two groups by law']:.2f}",
                f"{initial['outside']:.2f}, {initial['two groups']:.2f}",
            )
        )
    return markdown_table(head, rows)


def _removal(data: Mapping[str, Mapping[str, Any]]) -> str:
    head = ("model", "scheme", "low", "high", "random", "D", "arms cross at")
    rows = []
    for name, content in data.items():
        for scheme in SCHEMES:
            arms = {
                row["order"]: row["added"] for row in content["arms"] if (row["scheme"], row["share"]) == (scheme, DOSE)
            }
            crossing = content["numbers"]["crossing"][scheme]
            rows.append(
                (
                    f"`{name}`", scheme, *(_interval(arms[order]) for order in (LOW, HIGH, RANDOM)),
                    _interval(content["numbers"]["D"][scheme]), "–" if crossing is None else f"{crossing:.0%}",
                )
            )  # fmt: skip
    return markdown_table(head, rows)


def _signs(models: Mapping[str, Measured]) -> str:
    """In how many models low-rank heads cost more, per scheme and kind."""
    rows = []
    for scheme in SCHEMES:
        cells = []
        for kind in ("hybrid", "pure"):
            areas = [of.removal.area(scheme) for name, of in models.items() if name.startswith(kind)]
            cells.append(f"{sum(area < 0 for area in areas)} of {len(areas)}")
        rows.append((scheme, *cells))
    return markdown_table(("models in which D is negative", "hybrid", "pure"), rows)


def _recall(data: Mapping[str, Mapping[str, Any]]) -> str:
    copy, cap = SECOND["C6"].numbers["copy"], f"cap {SECOND['C6'].numbers['cap']}"
    head = (
        "model",
        f"gain at {copy} tokens",
        "gain under the cap",
        "nats added by the cap",
        "mean r/d",
        "under the cap",
        "kappa",
    )
    rows = []
    for name, content in data.items():
        numbers = content["numbers"]
        rank = numbers["mean r/d under cap"]
        rows.append(
            (
                f"`{name}`", f"{numbers['gain']['intact'][str(copy)]:.2f}", f"{numbers['gain'][cap][str(copy)]:.2f}",
                f"{numbers['added under cap'][cap]:.2f}", f"{rank['intact']:.2f}", f"{rank[cap]:.2f}",
                _or_dash(numbers["kappa under cap"][cap]),
            )
        )  # fmt: skip
    return markdown_table(head, rows)


def _causal(data: Mapping[str, Mapping[str, Any]]) -> str:
    """C0c for each factor alone."""
    factors = list(next(iter(data.values()))["numbers"]["C0c by factor"]) if data else []
    rows = [
        (f"`{name}`", *(_or_dash(content["numbers"]["C0c by factor"].get(factor)) for factor in factors))
        for name, content in data.items()
    ]
    return markdown_table(("model", *(f"x {factor}" for factor in factors)), rows)


def _secondary(data: Mapping[str, Mapping[str, Any]]) -> str:
    """Added nats on the four domains of the first registration."""
    rows = []
    for name, content in data.items():
        losses = content["numbers"]["secondary"]
        for scheme in SCHEMES if losses else ():
            for order in (LOW, HIGH):
                without = losses[f"{order}, {DOSE:.1%}, {scheme}"]
                added = [x - intact for x, intact in zip(without, losses["intact"], strict=True)]
                rows.append((f"`{name}`", scheme, order, *map(_or_dash, added)))
    if not rows:
        return "*These domains were added to the measuring program later; no stored model has them yet.*"
    without = [f"`{name}`" for name, content in data.items() if not content["numbers"]["secondary"]]
    said = f"\n\nNot measured on {', '.join(without)}, which came before these rows." if without else ""
    return markdown_table(("model", "scheme", "removed", *NATURAL_DOMAINS), rows) + said


def _or_dash(number: float | None) -> str:
    return "–" if number is None else f"{number:.2f}"
