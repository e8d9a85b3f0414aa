import json
from pathlib import Path

import pytest

from staterank_utils import claims
from staterank_utils.claims import CLAIMS, FAILS, HOLDS, PARTLY, Criterion, verdict
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
    assert all(f"**{key}**" in claims.registered_table() for key in CLAIMS)


def test_overview_shows_verdicts_and_what_is_not_yet_tested(tmp_path: Path) -> None:
    row = claims.claim_row("C2", "hybrid", [Criterion("rho", Estimate(0.95, 0.92, 0.97), 0.90)], HOLDS)
    (tmp_path / "02_input_invariance.json").write_text(json.dumps({"rows": [row]}))
    table = claims.overview_table([tmp_path], ["hybrid", "pure"]).splitlines()
    c2 = next(line for line in table if line.startswith("| **C2** "))
    assert "**holds**<br>rho 0.950 [0.920, 0.970]" in c2
    assert c2.count("not yet tested") == 1
    assert next(line for line in table if line.startswith("| **C5**")).count("not yet tested") == 2


def test_an_undefined_number_is_stored_as_null_and_shown_as_such() -> None:
    row = claims.claim_row("C3", "pure", [Criterion("min kappa", Estimate(NAN, NAN, NAN), 0.8)], FAILS)
    assert row["criteria"][0]["point"] is None
    assert "undefined" in claims.verdict_table([row])


def test_bars_in_cells_do_not_break_a_table() -> None:
    assert claims.markdown_table(("a",), [("x|y",)]).splitlines()[-1] == "| x\\|y |"
