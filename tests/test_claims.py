import json
import re
from fractions import Fraction
from pathlib import Path

import pytest

from staterank_utils import claims, markdown
from staterank_utils.claims import CLAIMS, FAILS, HOLDS, PARTLY, SECOND, THIRD, Criterion, verdict
from staterank_utils.strata import Estimate

NAN = float("nan")


@pytest.mark.parametrize(
    ("estimate", "partly", "expected"),
    [
        (Estimate(0.95, 0.91, 0.97), False, HOLDS),
        (Estimate(0.95, 0.90, 0.97), False, PARTLY),
        (Estimate(0.85, 0.80, 0.95), True, PARTLY),
        (Estimate(0.85, 0.80, 0.95), False, FAILS),
        (Estimate(NAN, NAN, NAN), False, FAILS),
    ],
    ids=["whole interval", "interval touches", "claim's own condition", "short of it", "undefined"],
)
def test_the_registered_rule(estimate: Estimate, partly: bool, expected: str) -> None:
    assert verdict([Criterion("rho", estimate, 0.90)], partly=partly) == expected


def test_every_criterion_must_be_met() -> None:
    good, bad = Criterion("a", Estimate(1.0, 1.0, 1.0), 0.5), Criterion("b", Estimate(0.0, 0.0, 0.0), 0.5)
    assert verdict([good, bad], partly=False) == FAILS
    with pytest.raises(ValueError, match="at least one"):
        verdict([], partly=True)


def test_counts_of_zero_meet_a_closed_threshold_from_below() -> None:
    for count, expected in ((0.0, HOLDS), (1.0, FAILS)):
        criterion = Criterion("violations", Estimate(count, count, count), 0.0, above=False, closed=True)
        assert verdict([criterion], partly=False) == expected


def test_the_registered_list_is_complete() -> None:
    assert list(CLAIMS) == ["C1", "C1b", "C1c", "C2", "C2n", "C2b", "C3", "C3a", "C4", "C4a", "C5"]
    assert all(f"**{key}**" in markdown.registered_table() for key in CLAIMS)


UP, DOWN, LEVEL = Estimate(0.5, 0.3, 0.7), Estimate(-0.5, -0.7, -0.3), Estimate(0.0, -0.1, 0.1)


@pytest.mark.parametrize(
    ("differences", "below_random", "expected"),
    [
        ([UP, UP, LEVEL], [UP, UP, LEVEL], HOLDS),
        ([UP, UP, DOWN], [UP, UP, UP], HOLDS),
        ([UP, UP, LEVEL], [UP, LEVEL, LEVEL], PARTLY),
        ([UP, LEVEL, LEVEL], [UP, UP, UP], PARTLY),
        ([DOWN, DOWN, LEVEL], [LEVEL] * 3, f"{FAILS}: inverted"),
        ([DOWN, DOWN, UP], [LEVEL] * 3, f"{FAILS}: inverted"),
        ([DOWN, UP, LEVEL], [LEVEL] * 3, f"{FAILS}: mixed"),
        ([DOWN, LEVEL, LEVEL], [LEVEL] * 3, f"{FAILS}: mixed"),
        ([LEVEL] * 3, [UP] * 3, f"{FAILS}: no asymmetry"),
        ([UP], [UP], "not testable on this model"),
        ([], [], "not testable on this model"),
    ],
)
def test_the_registered_rule_of_asymmetry(differences, below_random, expected: str) -> None:
    tasks = [f"task {i}" for i in range(len(differences))]
    row = claims.judge_asymmetry("m", *(dict(zip(tasks, e, strict=True)) for e in (differences, below_random)))
    assert row["verdict"] == expected
    assert [number["label"] for number in row["criteria"]] == [*tasks, *(f"random - low, {task}" for task in tasks)]


def test_asymmetry_needs_the_same_tasks() -> None:
    with pytest.raises(ValueError, match="expected the same tasks"):
        claims.judge_asymmetry("m", {"a": UP, "b": UP}, {"a": UP})


def test_overview_shows_every_verdict_with_its_numbers_and_what_is_not_yet_tested(tmp_path: Path) -> None:
    row = claims.judge("C2", "hybrid", {"rho": Estimate(0.95, 0.92, 0.97)})
    second = claims.judge("C0a", "pure", {name: Estimate(0.95, 0.92, 0.97) for name in ("R^2", "labels", "middle")})
    (tmp_path / "00_what_rank_measures.json").write_text(json.dumps({"rows": [second]}))
    (tmp_path / "02_input_invariance.json").write_text(json.dumps({"rows": [row]}))
    table = markdown.overview_table(tmp_path, ["hybrid", "pure"]).splitlines()
    c2 = next(line for line in table if line.startswith("| **C2** "))
    assert "**holds**<br>rho 0.950 [0.920, 0.970]" in c2
    assert c2.count("not tested") == 1
    assert next(line for line in table if line.startswith("| **C5**")).count("not tested") == 2
    shown = [line.split("**")[1] for line in table[2:]]
    assert shown == [*claims.CLAIMS, "C0a"]


def test_an_undefined_number_is_stored_as_null_and_shown_as_such() -> None:
    row = claims.judge("C2", "pure", {"rho": Estimate(NAN, NAN, NAN)})
    assert row["verdict"] == FAILS
    assert row["criteria"][0]["point"] is None
    assert "undefined" in markdown.verdict_table([row])


def test_bars_in_cells_do_not_break_a_table() -> None:
    assert markdown.markdown_table(("a",), [("x|y",)]).splitlines()[-1] == "| x\\|y |"


def at(point: float, width: float = 0.0) -> Estimate:
    return Estimate(float(point), point - width, point + width)


@pytest.mark.parametrize(
    ("key", "measured", "medians", "expected"),
    [
        ("C1", [at(0.7), at(0.01), at(2 / 3)], (), HOLDS),
        ("C1", [at(0.7), at(0.2), at(0.7)], (), PARTLY),
        ("C1", [at(0.7, 0.2), at(0.01), at(0.7)], (), PARTLY),
        ("C1", [at(0.7), at(0.2), at(0.5)], (), FAILS),
        ("C1b", [at(0)], (), HOLDS),
        ("C1b", [at(1)], (), FAILS),
        ("C1c", [at(0.3)], (), HOLDS),
        ("C1c", [at(0.9)], (), PARTLY),
        ("C1c", [at(0.95)], (), FAILS),
        ("C2", [at(0.71)], (), PARTLY),
        ("C2", [at(0.70)], (), FAILS),
        ("C2n", [at(0.985)], (), HOLDS),
        ("C2n", [at(0.97)], (), PARTLY),
        ("C2n", [at(0.72)], (), FAILS),
        ("C3", [at(0.95), at(0.85)], (0.95, 0.9), HOLDS),
        ("C3", [at(0.85), at(0.85)], (0.95, 0.9), PARTLY),
        ("C3", [at(0.85), at(0.85)], (0.95, 0.8), FAILS),
        ("C3a", [at(0.95)] * 4, (), HOLDS),
        ("C3a", [at(0.95)] * 2 + [at(0.1)] * 2, (), PARTLY),
        ("C3a", [at(0.95)] + [at(0.1)] * 3, (), FAILS),
        ("C4a", [at(0.95)], (), HOLDS),
        ("C4a", [at(0.8)], (), PARTLY),
        ("C4a", [at(0.79)], (), FAILS),
        ("C5", [at(0.95), at(0.01), at(0.1)], (), HOLDS),
        ("C5", [at(0.99), at(0.0), at(0.1)], (), PARTLY),
        ("C5", [at(0.8), at(-0.1), at(0.01)], (), PARTLY),
        ("C5", [at(0.99), at(-0.1), at(0.0)], (), FAILS),
        ("C5", [at(0.79), at(0.1), at(0.1)], (), FAILS),
    ],
)
def test_each_claim_s_own_rule(key: str, measured: list[Estimate], medians: tuple[float, ...], expected: str) -> None:
    labelled = {str(index): estimate for index, estimate in enumerate(measured)}
    assert claims.judge(key, "m", labelled, medians=medians)["verdict"] == expected


def test_a_rule_refuses_too_many_measures() -> None:
    with pytest.raises(ValueError, match="C2 judges 1 measures, got 2"):
        claims.judge("C2", "m", {"a": at(1), "b": at(1)})


@pytest.mark.parametrize(
    ("key", "medians", "words"),
    [
        ("C3", (), "C3 is judged with 2 medians, got []: one for each measure"),
        ("C3", (0.95,), "C3 is judged with 2 medians, got [0.95]"),
        ("C2", (0.95, 0.9), "C2 is judged with 0 medians, got [0.95, 0.9]: leave them out"),
    ],
    ids=["none", "too few", "not asked for"],
)
def test_a_rule_refuses_the_wrong_number_of_medians(key: str, medians: tuple[float, ...], words: str) -> None:
    measured = {str(index): at(1) for index in range(len(claims.RULES[key].thresholds))}
    with pytest.raises(ValueError, match=re.escape(words)):
        claims.judge(key, "m", measured, medians=medians)


# ---------------------------------------------------------------- the second registration

# As registered on 2026-11-27: what the numbers that judge must print.
REGISTERED_RULES = {
    "C0": ("0", "–"),
    "C0a": ("0.80, 0.90 and 0.50", "first two"),
    "C0b": ("both within 0.10 in >= 80% of models", "one of them"),
    "C0c": (">= 0.90", ">= 0.70"),
    "C1d": (">= 0.10 in both", "> 0 in both"),
    "C1e": ("first >= 0.10, ranges over seeds disjoint", "first > 0 in every pair of seeds"),
    "C4b": ("abs(D) beyond 97.5% of theirs in every seed", "in most seeds"),
    "C4c": ("moves by >= 0.10, or vanishes", "by >= 0.05"),
    "C6": (
        "cap takes < 10% of the hybrid's gain and > 50% of the pure's, both kappa >= 0.9",
        "the pure's share > 5 x the hybrid's",
    ),
    "C7": ("k <= 1/4, random group's k larger", "k <= 1/2"),
    "C5a": ("at both", "at one"),
    "C5b": ("> 0, every seed", "> 0, most seeds"),
    "C10": ("DeltaNet < 0.05, all others >= 0.10", "DeltaNet lowest"),
}


def test_the_third_registration_prints_the_numbers_that_judge() -> None:
    claim = THIRD["C11"]
    assert claim.text("holds") == (
        "without the lowest: below every random draw and < 50% of the intact gain; without the highest: above the mean random draw; in every model"
    )
    assert "without 25% of the heads of every layer" in claim.text("measure")
    assert "each of 4 random draws" in claim.text("measure")


@pytest.mark.parametrize(
    ("low", "high", "random", "expected"),
    [
        (0.1, 0.8, 0.5, HOLDS),
        (0.45, 0.8, 0.5, FAILS),  # more than half is left
        (0.1, 0.8, 0.05, FAILS),  # a random draw takes more
        (0.1, 0.4, 0.5, FAILS),  # the highest ranks take more than random ones
    ],
)
def test_recalling_heads_are_judged_by_every_part_of_the_rule(low, high, random, expected) -> None:
    assert claims.judge_recalling_heads({"a": (0.8, low, high, [random] * 4)})["verdict"] == expected


@pytest.mark.parametrize(
    ("key", "area", "beyond", "high", "expected"),
    [
        ("C12", -0.2, 1.0, 0.1, HOLDS),
        ("C12", -0.2, 0.9, 0.1, PARTLY),  # random orders reach as far
        ("C12", -0.2, 1.0, 0.5, PARTLY),  # a random draw costs less
        ("C12", 0.2, 1.0, 0.1, FAILS),
        ("C13", 0.2, 1.0, 0.9, HOLDS),
        ("C13", 0.2, 1.0, 0.5, PARTLY),
        ("C13", -0.2, 1.0, 0.9, FAILS),
    ],
)
def test_the_direction_within_layers_is_judged_by_every_part(key, area, beyond, high, expected) -> None:
    row = claims.judge_direction(key, {"0": (9.0, 0.0, 9.0, [0.0]), "1": (area, beyond, high, [0.4, 0.6])})
    assert (row["verdict"], row["n_seeds"], row["note"]) == (expected, 1, "; 1 seed")
    assert [number["label"] for number in row["criteria"]] == ["D, seed 1"]


def test_models_that_hardly_recall_are_left_out_and_named() -> None:
    holding, without = (0.8, 0.1, 0.8, [0.5] * 4), (0.2, 0.1, 0.2, [0.2] * 4)
    row = claims.judge_recalling_heads({"a": holding, "b": without})
    assert (row["verdict"], row["note"]) == (HOLDS, "; hardly recalls and left out: b")
    assert claims.judge_recalling_heads({"b": without})["verdict"] == claims.NOT_TESTABLE
    failing = (0.8, 0.7, 0.8, [0.5] * 4)
    assert claims.judge_recalling_heads({"a": holding, "b": holding, "c": failing})["verdict"] == PARTLY
    with pytest.raises(ValueError, match="C11 compares with 4 random draws; a has fewer"):
        claims.judge_recalling_heads({"a": (0.8, 0.1, 0.8, [0.5])})


def test_the_second_registration_prints_the_numbers_that_judge() -> None:
    assert {key: (claim.text("holds"), claim.text("partly")) for key, claim in SECOND.items()} == REGISTERED_RULES
    assert "log a by 1/8, 1/4, 1/2, 2, 4, 8:" in SECOND["C0c"].text("measure")
    assert "k = 1/16, 1/8, 1/4, 3/8, 1/2 of them" in SECOND["C7"].text("measure")


@pytest.mark.parametrize(
    ("key", "measured", "expected"),
    [
        ("C0", [at(0)], HOLDS),
        ("C0", [at(1)], FAILS),
        ("C0a", [at(0.80), at(0.90), at(0.50)], HOLDS),
        ("C0a", [at(0.9), at(0.95), at(0.4)], PARTLY),
        ("C0a", [at(0.9), at(0.95), at(0.55, 0.1)], PARTLY),
        ("C0a", [at(0.79), at(0.95), at(0.9)], FAILS),
        ("C0c", [at(0.90)], HOLDS),
        ("C0c", [at(0.70)], PARTLY),
        ("C0c", [at(0.69)], FAILS),
    ],
)
def test_each_rule_of_one_model_in_the_second_registration(key: str, measured: list[Estimate], expected: str) -> None:
    labelled = {str(index): estimate for index, estimate in enumerate(measured)}
    assert claims.judge(key, "m", labelled)["verdict"] == expected


THREE = ("0", "1", "2")


def recall(hybrid: Estimate, pure: Estimate, kappa: tuple, gain: tuple = (0.3, 0.3)) -> dict:
    return claims.judge_recall("m", {"0": (hybrid, pure)}, {"0": kappa}, {"0": gain})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (claims.judge_law({str(i): (0.1, 0.1) for i in range(4)} | {"x": (0.5, 0.5)}), HOLDS),
        (claims.judge_law({str(i): (0.1, 0.2) for i in range(5)}), PARTLY),
        (claims.judge_law({str(i): (0.2, -0.1) for i in range(5)}), PARTLY),
        (claims.judge_law({"a": (0.1, 0.1), "b": (0.11, -0.11)}), FAILS),
        (claims.judge_gates("m", {"0": 0.10, "1": 0.3}, {"0": 0.02, "1": 0.0}), HOLDS),
        (claims.judge_gates("m", {"0": 0.09, "1": 0.3}, {"0": 0.0, "1": 0.0}), PARTLY),
        (claims.judge_gates("m", {"0": 0.0, "1": 0.3}, {"0": 0.0, "1": 0.0}), f"{FAILS} (acquired)"),
        (claims.judge_gates("m", {"0": 0.3, "1": 0.3}, {"0": -0.03, "1": 0.0}), claims.NOT_TESTABLE),
        (claims.judge_gates("m", {"0": 0.3}, {"0": 0.0}), claims.NOT_TESTABLE),
        (claims.judge_tasks("m", [0.8, 0.75, 0.9], [0.7, 0.6]), HOLDS),
        (claims.judge_tasks("m", [0.8, 0.75], [0.7, 0.7]), PARTLY),
        (claims.judge_tasks("m", [0.9, 0.7], [0.7, 0.5]), FAILS),
        (claims.judge_within_layers("m", dict.fromkeys(THREE, 0.975)), HOLDS),
        (claims.judge_within_layers("m", {"0": 0.97, "1": 1.0, "2": 1.0}), PARTLY),
        (claims.judge_within_layers("m", {"0": 0.97, "1": 1.0}), "explained by layers"),
        (claims.judge_alpha("m", {"0": 0.1, "1": 0.1, "2": 0.0}), PARTLY),
        (claims.judge_alpha("m", {"0": -0.1, "1": 0.1}), FAILS),
        (claims.judge_layer_zero("m", {"0": (0.35, 0.45), "1": (0.3, None)}), HOLDS),
        (claims.judge_layer_zero("m", {"0": (0.35, 0.29), "1": (0.3, None)}), PARTLY),
        (claims.judge_layer_zero("m", {"0": (0.35, 0.34)}), FAILS),
        (claims.judge_layer_zero("m", {"0": (None, 0.34)}), claims.NOT_TESTABLE),
        (claims.judge_chance("m", {"38.9 %": -0.1, "25 %": -0.2}), HOLDS),
        (claims.judge_chance("m", {"38.9 %": 0.1, "25 %": 0.0}), FAILS),
        (claims.judge_chance("m", {"25 %": -0.1}), PARTLY),
        (claims.judge_chance("m", {}), claims.NOT_TESTABLE),
        (recall(at(0.05), at(0.6), (0.9, 0.9)), HOLDS),
        (recall(at(0.05, 0.06), at(0.6), (0.9, 0.9)), PARTLY),
        (recall(at(0.05), at(0.6), (0.8, 0.9)), PARTLY),
        (recall(at(0.15), at(0.6), (0.9, 0.9)), FAILS),
        (recall(at(0.2), at(0.6), (0.95, NAN)), FAILS),
        (recall(at(0.1), at(0.5), (1.0, 1.0)), FAILS),
        (recall(at(0.0), at(0.9), (1.0, 1.0), gain=(1.0, 0.29)), claims.NOT_TESTABLE),
        (claims.judge_redundancy("m", Fraction(1, 4), Fraction(3, 8)), HOLDS),
        (claims.judge_redundancy("m", Fraction(1, 4), Fraction(1, 4)), PARTLY),
        (claims.judge_redundancy("m", Fraction(1, 1), Fraction(1, 1)), FAILS),
        (claims.judge_need_of_decay({"DeltaNet": 0.06, "KDA": 0.1}, without=["DeltaNet"]), PARTLY),
        (claims.judge_need_of_decay({"DeltaNet": 0.2, "KDA": 0.1}, without=["DeltaNet"]), FAILS),
    ],
)
def test_each_rule_over_models_and_seeds(row: dict, expected: str) -> None:
    assert row["verdict"] == expected


def test_the_need_of_decay_is_not_judged_without_both_sides() -> None:
    with pytest.raises(ValueError, match="got 1, with models that have it, got 0"):
        claims.judge_need_of_decay({"DeltaNet": 0.0}, without=["DeltaNet"])


def test_few_seeds_are_said() -> None:
    assert claims.judge_alpha("m", dict.fromkeys(THREE, 1.0))["note"] == ""
    assert claims.judge_alpha("m", {"0": 1.0})["note"] == "; 1 seed"
    assert claims.judge_tasks("m", [0.9] * 3, [0.1] * 2)["note"] == "; 2 seeds"
    assert (
        claims.judge_layer_zero("m", {"0": (None, None), "1": (0.3, 0.5)})["note"] == "; 1 seed; no crossing in seed 0"
    )
    assert claims.judge_chance("m", {"25 %": -0.1})["note"] == "; 1 of 2 doses count"


def test_both_shares_stand_beside_the_verdict_on_tasks() -> None:
    row = claims.judge_tasks("m", [0.8, 0.9], [0.6, 0.7], two_groups=([0.3, 0.3], [0.1, 0.2]))
    numbers = {number["label"]: (number["point"], number["low"], number["high"]) for number in row["criteria"]}
    assert numbers["outside, text"] == pytest.approx((0.85, 0.8, 0.9))
    assert numbers["two groups, text - tasks"][0] == pytest.approx(0.15)


def test_what_was_not_measured_is_not_called_untestable() -> None:
    assert claims.not_measured("C4", "m", why="no tasks")["verdict"] == "not measured"
