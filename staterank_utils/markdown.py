"""Registered claims and verdicts as Markdown tables, and in a sentence's words."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from staterank_utils.claims import CLAIMS, SECOND


def registered_table() -> str:
    """The claims of the first registration as a Markdown table.

    Example:
        >>> table = registered_table().splitlines()
        >>> table[0], len(table) - 2 == len(CLAIMS)
        ('|  | claim | measure | holds | holds in part |', True)
    """
    rows = [(f"**{key}**", c.statement, c.measure, c.holds, c.partly) for key, c in CLAIMS.items()]
    return markdown_table(("", "claim", "measure", "holds", "holds in part"), rows)


def second_table() -> str:
    """The claims of the second registration as a Markdown table.

    Example:
        >>> table = second_table().splitlines()
        >>> table[0], len(table) - 2 == len(SECOND)
        ('|  | claim | measure | holds | holds in part | else |', True)
    """
    fields = ("statement", "measure", "holds", "partly", "otherwise")
    rows = [(f"**{key}**", *(claim.text(field) for field in fields)) for key, claim in SECOND.items()]
    return markdown_table(("", "claim", "measure", "holds", "holds in part", "else"), rows)


def verdict_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Stored rows as a Markdown table: claim, measure, threshold, paper, model, measured with interval, verdict.

    Args:
        rows: as `judge` gives them.

    Raises:
        KeyError: a row about a claim that is not registered.

    Example:
        >>> from staterank_utils.claims import judge
        >>> from staterank_utils.strata import Estimate
        >>> print(verdict_table([judge("C2", "hybrid", {"rho": Estimate(0.95, 0.92, 0.97)})]).splitlines()[-1][-58:])
        | > 0.90 | hybrid | rho 0.950 [0.920, 0.970] | **holds** |
    """
    cells = []
    for row in rows:
        statement, measure, holds, paper = _printed(row["claim"])
        cells.append((f"**{row['claim']}** {statement}", measure, holds, paper, *_outcome(row)))
    return markdown_table(("claim", "measure", "holds if", "paper", "model", "measured", "verdict"), cells)


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
    return row["model"], measured, f"**{row['verdict']}**{row['note']}"


def _printed(key: str) -> tuple[str, str, str, str]:
    """Statement, measure, rule and the paper's figure of a claim of either registration."""
    if key in CLAIMS:
        claim = CLAIMS[key]
        return claim.statement, claim.measure, claim.holds, claim.paper
    second = SECOND[key]
    return second.text("statement"), second.text("measure"), second.text("holds"), "–"


def overview_table(folders: Mapping[str, Path], models: Sequence[str] | Mapping[str, str]) -> str:
    """The book's claims table: one row per claim, one column per model, from the stored results of every notebook.

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
    if number["point"] == number["low"] == number["high"]:
        return f"{number['point']:.3f}"
    return f"{number['point']:.3f} [{number['low']:.3f}, {number['high']:.3f}]"


def by_model(rows: Iterable[Mapping[str, Any]], key: str) -> str:
    """The verdicts on one claim in a sentence's words; empty where no row is about it.

    Args:
        rows: as `judge` gives them, one per claim and model.
        key: of the claim.

    Example:
        >>> from staterank_utils.claims import judge
        >>> from staterank_utils.strata import Estimate
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
        >>> from staterank_utils.claims import judge
        >>> from staterank_utils.strata import Estimate
        >>> row = judge("C2", "hybrid", {"rho": Estimate(0.95, 0.92, 0.97)})
        >>> beside_stored([row], [], "C2"), beside_stored([row], [row], "C2")
        ('holds (hybrid) in this run', 'holds (hybrid) in this run, and holds (hybrid) in the stored full one')
    """
    here, there = f"{by_model(rows, key)} in this run", by_model(stored, key)
    return f"{here}, and {there} in the stored full one" if there else here


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
