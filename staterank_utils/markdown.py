"""Registered claims and verdicts as Markdown tables, and in a sentence's words."""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from staterank_utils.claims import (
    CLAIMS,
    FAILS,
    HOLDS,
    NOT_MEASURED,
    NOT_TESTABLE,
    ORDER,
    PARTLY,
    SECOND,
    THIRD,
    SecondClaim,
    has_few_seeds,
)


def registered_table() -> str:
    """The claims of the first registration as a Markdown table.

    Example:
        >>> table = registered_table().splitlines()
        >>> table[0], len(table) - 2 == len(CLAIMS)
        ('|  | claim | measure | holds | holds in part |', True)
    """
    rows = [(f"**{key}**", c.statement, c.measure, c.holds, c.partly) for key, c in CLAIMS.items()]
    return markdown_table(("", "claim", "measure", "holds", "holds in part"), rows)


def rules_table(registered: Mapping[str, SecondClaim]) -> str:
    """The claims of the second or third registration as a Markdown table.

    Example:
        >>> table = rules_table(SECOND).splitlines()
        >>> table[0], len(table) - 2 == len(SECOND)
        ('|  | claim | measure | holds | holds in part | else |', True)
    """
    fields = ("statement", "measure", "holds", "partly", "otherwise")
    rows = [(f"**{key}**", *(claim.text(field) for field in fields)) for key, claim in registered.items()]
    return markdown_table(("", "claim", "measure", "holds", "holds in part", "else"), rows)


def verdict_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Stored rows as a Markdown table: claim, model, verdict, measured with interval, threshold, paper. The page of claims has the measures.

    Args:
        rows: as `judge` gives them.

    Raises:
        KeyError: a row about a claim that is not registered.

    Example:
        >>> from staterank_utils.claims import judge
        >>> from staterank_utils.strata import Estimate
        >>> print(verdict_table([judge("C2", "hybrid", {"rho": Estimate(0.95, 0.92, 0.97)})]).splitlines()[-1][-65:])
        hybrid | **holds** | rho 0.950 [0.920, 0.970] | > 0.90 | > 0.90 |
    """
    cells = []
    for row in rows:
        statement, _, holds, paper = _printed(row["claim"])
        model, measured, verdict = _outcome(row)
        cells.append((f"**{row['claim']}** {statement}", model, verdict, measured, holds, paper))
    return markdown_table(("claim", "model", "verdict", "measured", "holds if", "paper, second-hand"), cells)


def brief_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Stored rows as a Markdown table of what came out; each claim's statement stands in its first row alone.

    Args:
        rows: as `judge` gives them, those of one claim together.

    Raises:
        KeyError: a row about a claim that is not registered.

    Example:
        >>> from staterank_utils.claims import judge
        >>> from staterank_utils.strata import Estimate
        >>> rows = [judge("C2", model, {"rho": Estimate(0.95, 0.92, 0.97)}) for model in ("hybrid", "pure")]
        >>> print(brief_table(rows).splitlines()[-1])
        |  | pure | rho 0.950 [0.920, 0.970] | **holds** |
    """
    cells, last = [], None
    for row in rows:
        statement, *_ = _printed(row["claim"])
        cells.append(("" if row["claim"] == last else f"**{row['claim']}** {statement}", *_outcome(row)))
        last = row["claim"]
    return markdown_table(("claim", "model", "measured", "verdict"), cells)


def _outcome(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Model, numbers and verdict of a row."""
    measured = "; ".join(f"{number['label']} {_interval(number)}" for number in row["criteria"])
    return row["model"], measured, f"**{_verdict(row)}**{row['note']}"


# Where registered words say more than their rule asks, what the rule asks stands beside them.
STATED = {
    "C4c": "judged by where the curves cross",
    "C5a": "judged at a smaller share alone where this one ruins the model",
}
WEAKER = {"explained by layers": "not shown (registered word: explained by layers)"}


def _verdict(row: Mapping[str, Any]) -> str:
    return WEAKER.get(row["verdict"], row["verdict"])


def _printed(key: str) -> tuple[str, str, str, str]:
    """Statement, measure, rule and the paper's figure of a claim of any registration."""
    if key in CLAIMS:
        claim = CLAIMS[key]
        return claim.statement, claim.measure, claim.holds, claim.paper
    second = (SECOND | THIRD)[key]
    statement = second.text("statement") + (f" ({STATED[key]})" if key in STATED else "")
    return statement, second.text("measure"), second.text("holds"), "–"


def overview_table(folder: Path, models: Sequence[str] | Mapping[str, str]) -> str:
    """One row per claim, one column per model, from the results of every notebook.

    Claims of the first registration are always there, of the others those that were judged on one of the models.

    Args:
        folder: where results lie, `NOTEBOOK.json`.
        models: column heads, in order; or column head -> model, as results name it. A claim without a result shows as not tested.

    Example:
        >>> table = overview_table(Path("nowhere"), ["hybrid"])
        >>> table.splitlines()[0], table.count("not tested") == len(CLAIMS)
        ('| claim | measured: holds if | paper | hybrid |', True)
    """
    columns = models if isinstance(models, Mapping) else {model: model for model in models}
    cells: dict[tuple[str, str], str] = {}
    for file in folder.glob("[0-9]*.json"):
        for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
            numbers = (f"{number['label']} {_interval(number)}" for number in row["criteria"])
            cells[row["claim"], row["model"]] = "<br>".join([f"**{_verdict(row)}**{row['note']}", *numbers])
    rows = []
    for key in ORDER:
        of_models = [cells.get((key, model)) for model in columns.values()]
        if key in CLAIMS or any(of_models):
            statement, measure, holds, paper = _printed(key)
            rows.append(
                (f"**{key}** {statement}", f"{measure}: {holds}", paper, *(cell or "not tested" for cell in of_models))
            )
    return markdown_table(("claim", "measured: holds if", "paper", *columns), rows)


def number(criterion: Mapping[str, Any]) -> str:
    """A number that a verdict rests on, with its label.

    Args:
        criterion: of a row of `claims.judge`.

    Example:
        >>> number({"label": "rho", "point": 0.914}), number({"label": "rho", "point": None})
        ('rho 0.91', 'rho undefined')
    """
    point = criterion["point"]
    return f"{criterion['label']} {'undefined' if point is None else format(point, 'z.2f')}"


def three_digits(label: str, number: float) -> str:
    """A number with three digits; a p-value under half of the last one as smaller than it.

    Args:
        label: what it is, as rows and `groups.evidence` name it.
        number: its value.

    Example:
        >>> three_digits("dip p", 0.0001), three_digits("Sarle", 0.7454)
        ('< 0.001', '0.745')
    """
    return "< 0.001" if label == "dip p" and number < 0.0005 else f"{number:z.3f}"


def _interval(number: Mapping[str, Any]) -> str:
    if number["point"] is None:
        return "undefined"
    if number["label"] == "violations":
        return f"{number['point']:.0f}"
    point, low, high = (three_digits(number["label"], number[end]) for end in ("point", "low", "high"))
    return point if number["point"] == number["low"] == number["high"] else f"{point} [{low}, {high}]"


def by_model(rows: Iterable[Mapping[str, Any]], key: str) -> str:
    """The verdicts on one claim in a sentence's words, models of one verdict together; empty where no row is about it.

    Args:
        rows: as `judge` gives them, one per claim and model.
        key: of the claim.

    Example:
        >>> from staterank_utils.claims import judge
        >>> from staterank_utils.strata import Estimate
        >>> rho = {"hybrid": Estimate(0.95, 0.92, 0.97), "pure": Estimate(0.6, 0.5, 0.7), "wide": Estimate(0.6, 0.5, 0.7)}
        >>> by_model([judge("C2", model, {"rho": estimate}) for model, estimate in rho.items()], "C2")
        'holds (hybrid); does not hold (pure, wide)'
    """
    models: dict[str, list[str]] = {}
    for row in rows:
        if row["claim"] == key:
            models.setdefault(row["verdict"], []).append(row["model"])
    return "; ".join(f"{verdict} ({', '.join(names)})" for verdict, names in models.items())


def in_two(answer: str) -> tuple[str, str]:
    """The first sentence of an answer, and the rest.

    Args:
        answer: of a chapter.

    Example:
        >>> in_two("It does. By 2.5 nats."), in_two("It does.")
        (('It does.', 'By 2.5 nats.'), ('It does.', ''))
    """
    first, stop, rest = answer.partition(". ")
    return first + stop.strip(), rest


def yes_or_no(rows: Iterable[Mapping[str, Any]], key: str) -> str:
    """The verdicts on one claim as answers to a question, models of one answer together.

    Args:
        rows: as `judge` gives them, one per claim and model.
        key: of the claim.

    Example:
        >>> from staterank_utils.claims import judge
        >>> from staterank_utils.strata import Estimate
        >>> yes_or_no([judge("C2", model, {"rho": Estimate(0.95, 0.92, 0.97)}) for model in ("hybrid", "pure")], "C2")
        'yes (hybrid, pure)'
    """
    words = {
        HOLDS: "yes",
        PARTLY: "in part",
        FAILS: "no",
        "explained by layers": "not shown, the layers may explain it",
    }
    return by_model([{**row, "verdict": words.get(row["verdict"], row["verdict"])} for row in rows], key)


MARKS = {"holds": "✓", "partly": "◐", "fails": "✗", "open": "–"}  # so that colour alone says nothing


def verdict_class(verdict: str) -> str:
    """The class of style sheets that a verdict has.

    Args:
        verdict: in the words of `claims`, also with more behind a colon.

    Example:
        >>> verdict_class("does not hold: inverted"), verdict_class("explained by layers"), verdict_class("not measured")
        ('fails', 'fails', 'open')
    """
    kinds = {HOLDS: "holds", PARTLY: "partly", NOT_TESTABLE: "open", NOT_MEASURED: "open"}
    return kinds.get(verdict, "fails")


def badges(rows: Iterable[Mapping[str, Any]], keys: Sequence[str], link: str = "#verdicts") -> str:
    """The verdicts on some claims as coloured marks with words, links in HTML, one per claim and verdict, with what they rest on.

    A verdict of fewer than three training seeds, where its claim speaks of seeds, is grey.

    Args:
        rows: as `judge` gives them, one per claim and model.
        keys: of the claims, in this order.
        link: where they lead.

    Example:
        >>> from staterank_utils.claims import judge
        >>> from staterank_utils.strata import Estimate
        >>> badges([judge("C2", model, {"rho": Estimate(0.95, 0.92, 0.97)}) for model in ("hybrid", "pure")], ["C2"])
        '<a class="verdict holds" href="#verdicts">✓ C2, the order is kept over time: <b>holds</b> (hybrid, pure)</a>'
    """
    models: dict[tuple[str, str, str, str], list[str]] = {}
    for key in keys:
        for row in (row for row in rows if row["claim"] == key):
            rests_on = row["note"] if row["note"].endswith((" seed", " seeds", " doses count")) else ""
            kind = "open" if has_few_seeds(row) else verdict_class(row["verdict"])
            models.setdefault((key, kind, _verdict(row), rests_on), []).append(row["model"])
    parts = []
    for (key, kind, verdict, rests_on), names in models.items():
        statement = _printed(key)[0]
        words = f"{MARKS[kind]} {key}, {escape(statement)}: <b>{escape(verdict)}</b>{escape(rests_on)} ({escape(', '.join(names))})"
        parts.append(f'<a class="verdict {kind}" href="{escape(link)}">{words}</a>')
    return " ".join(parts)


def per_model(numbers: Mapping[str, Mapping[str, str]]) -> str:
    """Quantities as a Markdown table, one row each, with a column per model.

    Args:
        numbers: model -> quantity -> its number there, in words; a model that lacks one gets a dash.

    Example:
        >>> print(per_model({"hybrid": {"heads": "144", "d": "64"}, "pure": {"heads": "192"}}))
        |  | hybrid | pure |
        | --- | --- | --- |
        | heads | 144 | 192 |
        | d | 64 | – |
        >>> per_model({})
        'Not measured on these models.'
    """
    quantities = dict.fromkeys(quantity for of in numbers.values() for quantity in of)
    if not quantities:
        return "Not measured on these models."
    rows = [(quantity, *(of.get(quantity, "–") for of in numbers.values())) for quantity in quantities]
    return markdown_table(("", *numbers), rows)


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
