"""The home page and the top of the ladder: findings by models as tiles, and one sentence per chapter."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from staterank_utils.claims import ENOUGH_SEEDS, FAILS, HOLDS, NOT_MEASURED, NOT_TESTABLE, PARTLY, has_few_seeds
from staterank_utils.markdown import MARKS, in_two, verdict_class
from staterank_utils.studies.ladder import at_its_own_share

# What the home page shows: finding, notebook, the claim that decides it.
FINDINGS = (
    ("Rank is memory length, cut at d", "00_what_rank_measures", "C0a"),
    ("Heads fall into two groups", "01_stratification", "C1"),
    ("Their order is kept over time", "02_input_invariance", "C2"),
    ("Groups do not depend on natural input", "02_input_invariance", "C3"),
    ("Low-rank heads are needed more, by scores on tasks", "03_ablation_asymmetry", "C4"),
    ("38.9 % of the state can go, by scores on tasks", "04_joint_rank_norm_pruning", "C5"),
    ("Rank matters, either way, beyond the choice of layers", "03_ablation_asymmetry", "C4b"),
    ("A quarter of the high-rank heads stands in for all", "03_ablation_asymmetry", "C7"),
    ("Long memory is spare where attention recalls", "05_memory_and_recall", "C6"),
    ("A hybrid recalls with its heads of lowest rank", "05_memory_and_recall", "C11"),
    ("The paper's score (alpha = 0.5) prunes better than chance", "04_joint_rank_norm_pruning", "C5a"),
)
# Claims that are findings of the paper; the others are tests that the book added.
PAPERS = ("C1", "C2", "C3", "C4", "C5")
WORDS = {"holds": "yes", "partly": "in part", "fails": "no", "open": "open"}
ORDER = tuple(dict.fromkeys(notebook for _, notebook, _ in FINDINGS))  # of the chapters


def tile(row: Mapping[str, Any] | None, link: str, *, about: str, otherwise: str = NOT_MEASURED) -> str:
    """One verdict as a coloured cell with a mark and a word, a link.

    Args:
        row: as `claims.judge` gives it; None where nothing is known.
        link: where it leads.
        about: what it says, for those who cannot see the table.
        otherwise: why nothing is known.
    """
    kind = "open" if row is None else verdict_class(row["verdict"])
    mark, word = MARKS[kind], WORDS[kind]
    title = f"{about}: {row['verdict'] + row['note'] if row else otherwise}"
    return f'<td><a class="tile {kind}" href="{escape(link)}" title="{escape(title)}" aria-label="{escape(title)}"><b>{mark}</b> {word}</a></td>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table whose rows are made of ready cells."""
    columns = "".join(f"<th>{each}</th>" for each in head)
    lines = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return (
        f'<div class="tiles">\n<table>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table>\n</div>'
    )


def counted(verdicts: Sequence[str]) -> str:
    """How many verdicts of each kind, with their marks."""
    kinds = [verdict_class(verdict) for verdict in verdicts]
    return " ".join(f"{MARKS[kind]}&nbsp;{kinds.count(kind)}" for kind in MARKS if kind in kinds) or "not testable"


def verdicts_of(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], Mapping[str, Any] | None]:
    """(claim, model) -> row; None where it rests on fewer training seeds than the home page asks for."""
    return {(row["claim"], row["model"]): None if has_few_seeds(row) else row for row in rows}


def home_tiles(results: Path, models: Sequence[str], ladder: Mapping[str, Sequence[str]]) -> str:
    """Findings by models, and in the last column by how many of the ladder's.

    Args:
        results: folder with one JSON per notebook.
        models: names of the embedded models.
        ladder: claim -> verdicts over models or groups of models that could be tested.
    """
    known: dict[tuple[str, str], Mapping[str, Any] | None] = {}
    for notebook in ORDER:
        file = results / f"{notebook}.json"
        if file.exists():
            known |= verdicts_of(json.loads(file.read_text(encoding="utf-8"))["rows"])
    both = " and ".join(models)  # of claims that a pair decides
    rows = []
    for finding, notebook, key in FINDINGS:
        link = f"../notebooks/{notebook}.html"
        whose = "paper" if key in PAPERS else "ours"
        cells = [f'<th scope="row"><a href="{link}">{escape(finding)}</a></th>', f"<td>{whose}</td>"]
        for model in models:
            where = (key, model) if (key, model) in known else (key, both)
            why = f"fewer than {ENOUGH_SEEDS} training seeds" if where in known else NOT_MEASURED
            cells.append(tile(known.get(where), f"{link}#verdicts", about=f"{finding}, {model}", otherwise=why))
        cells.append(f'<td><a class="count" href="ladder.html">{counted(ladder.get(key, ()))}</a></td>')
        rows.append(cells)
    return table(("claim", "whose", *models, "ladder"), rows)


def ladder_verdicts(
    alone: Mapping[str, Sequence[Mapping[str, Any]]], over: Sequence[Mapping[str, Any]]
) -> dict[str, list[str]]:
    """Claim -> the verdicts that could be reached, over the models of the ladder, or over groups of them where several decide.

    Args:
        alone: model -> its rows.
        over: rows that several models decide.
    """
    found: dict[str, list[str]] = {}
    for row in [*(row for rows in alone.values() for row in rows), *over]:
        if row["verdict"] not in (NOT_TESTABLE, NOT_MEASURED) and not has_few_seeds(row):
            found.setdefault(row["claim"], []).append(row["verdict"])
    return found


def ladder_tiles(
    alone: Mapping[str, Sequence[Mapping[str, Any]]], *, link: Callable[[str, str], str] | None = None
) -> str:
    """Models by the findings that one model decides.

    Args:
        alone: model -> its rows.
        link: (model, notebook) -> where its tile leads; by default to the page of claims, and the findings to their chapters.
    """
    known = {(row["claim"], name): row for name, rows in alone.items() for row in rows}
    shown = [(finding, notebook, key) for finding, notebook, key in FINDINGS if any(key == claim for claim, _ in known)]
    findings = [
        f'<a href="../notebooks/{notebook}.html">{escape(finding)}</a>' if link is None else escape(finding)
        for finding, notebook, _ in shown
    ]
    rows = [
        [f'<th scope="row"><code>{escape(name)}</code></th>']
        + [
            tile(known.get((key, name)), link(name, notebook) if link else "claims.html", about=f"{finding}, {name}")
            for finding, notebook, key in shown
        ]
        for name in alone
    ]
    return table(("model", *findings), rows)


def ladder_answer(alone: Mapping[str, Sequence[Mapping[str, Any]]], needed: Mapping[str, Sequence[str]]) -> str:
    """When the findings hold: which heads each design needs, and how often the paper's score could be judged at its own share.

    Args:
        alone: model -> its rows.
        needed: what a design needs -> the designs that do, by a claim that judges seeds.
    """
    designs = [f"{what} in {' and '.join(names)}" for what, names in needed.items() if names]
    return f"**Which heads are needed in a model depends on its design: {', '.join(designs)}.** {at_its_own_share(row for rows in alone.values() for row in rows)}"


def retrained(name: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Which verdicts differ between two trainings of a model from the same seed, of the findings on the home page, in a sentence.

    Args:
        name: of the embedded model.
        first: what is stored of it.
        second: of the other training.
    """
    one, other = ({row["claim"]: row["verdict"] for row in content["rows"]} for content in (first, second))
    differ = [
        f"{finding} ({WORDS[verdict_class(other[key])]})"
        for finding, _, key in FINDINGS
        if key in one and key in other and one[key] != other[key]
    ]
    said = "; ".join(differ) or "none"
    return f"Trained again from the same seed on another kind of GPU, `{name}` gets another verdict on: {said}."


def answers(results: Path) -> str:
    """The question of every chapter and the first sentence of its answer, as a list.

    Args:
        results: folder with one JSON per notebook.
    """
    lines = []
    for notebook in ORDER:
        file = results / f"{notebook}.json"
        if file.exists():
            first, _ = in_two(json.loads(file.read_text(encoding="utf-8"))["answer"])
            lines.append(f"- {{doc}}`../notebooks/{notebook}` {first}")
    return "\n".join(lines) or "*No chapter was run.*"


def legend() -> str:
    """What the tiles mean, in the words of the rules."""
    words = {
        "holds": HOLDS,
        "partly": PARTLY,
        "fails": FAILS,
        "open": f"not testable on this model, not measured, or of fewer than {ENOUGH_SEEDS} training seeds where a claim speaks of seeds",
    }
    return ", ".join(f"{MARKS[kind]} {WORDS[kind]}: {word}" for kind, word in words.items()) + "."
