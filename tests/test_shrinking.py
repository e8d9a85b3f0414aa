"""Smaller states, stored and measured again; and C4b on the layers behind the first."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from staterank_utils import load_model
from staterank_utils.evaluation import token_nats
from staterank_utils.models import EMBEDDED
from staterank_utils.results import plain
from staterank_utils.selection import PAPER_SHARE
from staterank_utils.studies import removal, repeated, shrinking
from staterank_utils.studies.shrinking import load_shrinking, repeat_shrinking, store_shrinking
from staterank_utils.studies.texts import draw_texts
from staterank_utils.surgery import ablate_heads


@pytest.fixture(scope="module")
def pure():
    return load_model("pure")


@pytest.fixture(scope="module")
def texts(tokenizer):
    return draw_texts(tokenizer, n_windows=1, n_calibration=2)  # windows of the length that is stored


def test_what_is_stored_is_whole_and_says_what_was_freed() -> None:
    for name in EMBEDDED:
        found, made = load_shrinking(name)
        assert len(found.heads) == len(found.rank) == len(found.norm)
        assert made["parameters"]["n_prompts"] == 16
        methods = [shrinking.JOINT, shrinking.RANK, shrinking.CHANNELS, shrinking.BOTH]
        assert list(found.added) == methods
        assert all(list(of) == [0.125, 0.25, PAPER_SHARE] for of in found.added.values())
        assert all(abs(found.freed(method) - PAPER_SHARE) < 0.015 for method in methods)
        assert len(found.readings) == 20
        # Without the norm its maximum has no part, and the score is that of rank alone.
        of = {key: nats for key, nats in found.readings.items() if key[1:] == ("the model", 1.0)}
        np.testing.assert_allclose(of["model", "the model", 1.0], of["layer", "the model", 1.0], atol=1e-6)
        np.testing.assert_allclose(of["model", "the model", 1.0], found.added[shrinking.RANK][PAPER_SHARE], atol=5e-3)
        assert all(str(estimate) for costs in found.costs().values() for estimate in costs.values())


def test_stored_smaller_states_are_those_of_this_machine(pure, texts) -> None:
    found = repeat_shrinking("pure", pure, texts, texts.calibration, quick=True)
    assert found.difference() < 5e-3
    assert found.live.footprints == found.shown.footprints
    assert found.live.removed == found.shown.removed
    assert list(found.again()) == list(found.shown.added)
    assert "This run repeated 6 of the removals on 1" in found.source("pure")


def test_another_outcome_on_the_same_windows_is_refused(pure, texts, monkeypatch) -> None:
    stored, made = load_shrinking("pure")
    costs = {method: {share: nats + 1 for share, nats in of.items()} for method, of in stored.added.items()}
    monkeypatch.setattr(shrinking, "load_shrinking", lambda name: (replace(stored, added=costs), made))
    live = replace(stored, readings={})
    monkeypatch.setattr(shrinking, "measure_shrinking", lambda *args, **options: live)
    with pytest.raises(ValueError, match="numbers of pure with smaller states differ by 1"):
        repeat_shrinking("pure", pure, texts, texts.calibration, quick=True)


def test_what_is_stored_is_read_back_as_it_was(tmp_path: Path) -> None:
    found, made = load_shrinking("hybrid")
    store_shrinking({"hybrid": found}, made=made, file=tmp_path / "a.json")
    again, _ = load_shrinking("hybrid", tmp_path / "a.json")
    one, other = (
        plain({**asdict(of), "readings": [*map(list, of.readings.items())]}, digits=9) for of in (found, again)
    )
    assert one == other
    content = json.loads((tmp_path / "a.json").read_text())
    content["provenance"]["checkpoints"]["hybrid"] = "of other weights"
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert load_shrinking("hybrid", tmp_path / "a.json") is None


def test_a_folder_of_which_nothing_is_stored_is_measured(pure, tokenizer) -> None:
    few = draw_texts(tokenizer, n_windows=1, window=64, n_copies=0, copy=1, n_calibration=1)
    found = repeat_shrinking("elsewhere", pure, few, few.calibration, quick=True)
    assert found.made is None
    assert found.again() is None
    assert found.shown is found.live
    assert found.source("elsewhere") == "elsewhere: this run, windows per text: 1."


def test_behind_the_first_layer_its_heads_all_stay(pure, tokenizer) -> None:
    measured, _ = repeated.stored_on("pure")
    made, ids = measured.removal, torch.arange(40).reshape(1, 40)
    own, random = removal.areas_beyond_first(pure, ids, made, name=measured.name, n_orders=1)

    def area(high: np.ndarray, low: np.ndarray) -> float:
        """By hand: a share of every layer's sixteen heads but the first's."""
        gaps = []
        for share in (shares := made.counted(removal.LAYERS)):
            losses = []
            for order in (high, low):
                gone = []
                for layer in sorted({layer for layer, _ in made.heads})[1:]:
                    of_layer = [made.heads[index] for index in order if made.heads[index][0] == layer]
                    gone += of_layer[: round(share * 16)]
                with ablate_heads(pure, gone):
                    losses.append(token_nats(pure, ids).mean())
            gaps.append(losses[0] - losses[1])
        return float(np.trapezoid(gaps, shares))

    [order] = removal.random_orders(len(made.heads), 1, name=f"{measured.name}, within layers")
    assert own == pytest.approx(area(made.orders[removal.HIGH], made.orders[removal.LOW]), abs=1e-6)
    assert random == pytest.approx(area(order, order[::-1]), abs=1e-6)


def test_the_stored_share_of_random_orders_is_of_both_signs() -> None:
    for name in EMBEDDED:
        own, *drawn = json.loads(removal.DAMAGE_FILE.read_text())["areas_beyond_first"][name]
        assert len(drawn) == 60
        both = np.concatenate([drawn, np.negative(drawn)])
        assert repeated.beyond_first(name) == (own, pytest.approx((np.abs(both) < abs(own)).mean()))
    assert repeated.beyond_first("OWNER/NAME") is None
