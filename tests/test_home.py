"""Tiles and answers of the home page and of the ladder."""

import json
from pathlib import Path

from book import home
from staterank_utils.claims import FAILS, HOLDS, NOT_TESTABLE, PARTLY, judge_alpha


def row(claim: str, model: str, verdict: str, note: str = "") -> dict:
    return {"claim": claim, "model": model, "verdict": verdict, "note": note}


def test_a_tile_says_its_verdict_by_colour_mark_and_word() -> None:
    tiles = {
        verdict: home.tile(row("C1", "m", verdict, "; 1 of 2 doses count"), "x.html", about="C1")
        for verdict in (HOLDS, PARTLY, FAILS, NOT_TESTABLE)
    }
    assert len({cell.split('class="tile ')[1].split('"')[0] for cell in tiles.values()}) == 4
    assert "<b>✓</b> yes" in tiles[HOLDS]
    assert "<b>✗</b> no" in tiles[FAILS]
    assert 'title="C1: does not hold; 1 of 2 doses count"' in tiles[FAILS]
    assert home.tile(row("C4b", "m", "explained by layers"), "x.html", about="C4b").count("fails") == 1
    assert "not measured" in home.tile(None, "x.html", about="C1")


def test_home_shows_what_results_say_and_counts_the_ladder(tmp_path: Path) -> None:
    rows = [row("C1", "hybrid", HOLDS), row("C1", "pure", PARTLY)]
    (tmp_path / "01_stratification.json").write_text(json.dumps({"rows": rows, "answer": "Yes."}))
    (tmp_path / "05_memory_and_recall.json").write_text(
        json.dumps({"rows": [row("C6", "hybrid and pure", FAILS)], "answer": "No."})
    )
    lines = home.home_tiles(tmp_path, ["hybrid", "pure"], {"C1": [HOLDS, HOLDS, FAILS]}).splitlines()
    [groups] = [line for line in lines if "two groups" in line]
    assert groups.index("tile holds") < groups.index("tile partly") < groups.index("✓&nbsp;2 ✗&nbsp;1")
    [pair] = [line for line in lines if "Long memory" in line]
    assert pair.count("tile fails") == 2  # a pair decides for both
    assert home.answers(tmp_path).splitlines() == [
        "- {doc}`../notebooks/01_stratification` Yes.",
        "- {doc}`../notebooks/05_memory_and_recall` No.",
    ]


def test_verdicts_of_few_seeds_stay_off_the_home_page(tmp_path: Path) -> None:
    few, enough = (judge_alpha("hybrid", dict.fromkeys("012"[:n], 0.4)) | {"claim": "C4b"} for n in (1, 3))
    (tmp_path / "03_ablation_asymmetry.json").write_text(json.dumps({"rows": [few], "answer": "No."}))
    over = home.ladder_verdicts({}, [few, enough])
    assert over == {"C4b": [HOLDS]}
    [line] = [line for line in home.home_tiles(tmp_path, ["hybrid"], over).splitlines() if "choice of layers" in line]
    assert "tile open" in line
    assert "fewer than 3 training seeds" in line


def test_the_ladder_says_which_heads_are_needed_and_how_often_the_score_beats_chance() -> None:
    rows = {
        "a": [row("C1", "a", HOLDS), row("C2", "a", HOLDS), row("C7", "a", FAILS)],
        "b": [row("C1", "b", PARTLY), row("C5a", "b", FAILS) | {"criteria": [{"label": "38.9%", "point": -0.1}]}],
    }
    said = home.ladder_answer(rows, {"those of low rank": ["x"], "those of high rank": [], "and none": ["y", "z"]})
    assert "depends on its design: those of low rank in x, and none in y and z.**" in said
    assert said.endswith("could be judged on 1 models, and beat all random draws on 1.")


def test_every_finding_names_a_notebook_and_a_registered_claim() -> None:
    from staterank_utils.claims import ORDER

    notebooks = {file.stem for file in (Path(__file__).parents[1] / "notebooks").glob("*.py")}
    assert set(home.ORDER) == notebooks
    assert {notebook for _, notebook, _ in home.FINDINGS} <= notebooks
    assert {key for *_, key in home.FINDINGS} <= set(ORDER)


def test_verdicts_that_another_training_turns_are_named() -> None:
    first, second = (
        {"rows": [{"claim": "C1", "verdict": x}, {"claim": "C2", "verdict": HOLDS}]} for x in (HOLDS, FAILS)
    )
    assert home.retrained("m", first, second).endswith("`m` gets another verdict on: Heads fall into two groups (no).")
    assert home.retrained("m", first, first).endswith("another verdict on: none.")
