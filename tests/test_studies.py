"""The studies' measures against slow oracles."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import save_tiny, tiny_qwen3_next

from staterank_utils import claims
from staterank_utils.architectures import linear_layers
from staterank_utils.memory import half_life_at, predicted_rank
from staterank_utils.models import load_model, load_tokenizer
from staterank_utils.strata import cohen_kappa
from staterank_utils.studies import groups, repeated
from staterank_utils.studies.by_task import ByTask, measure_by_task
from staterank_utils.studies.groups import Groups, Law, Turning, law_claims, law_fit, measure_law, shares
from staterank_utils.studies.recall import Recall, induction_gains
from staterank_utils.studies.removal import (
    BINS,
    FEW,
    LOW,
    MODEL,
    Removal,
    _binned,
    measure_removal,
    one_model_claims,
    random_orders,
)
from staterank_utils.studies.repeated import RepeatedGroups, RepeatedRecall, stored_on, write_chapter
from staterank_utils.studies.setup import setup
from staterank_utils.studies.texts import CALIBRATION_TEXTS, LOSS_TEXTS, Texts, draw_texts, unigram_nats
from staterank_utils.tasks import text_tokens

HEADS = tuple((layer, head) for layer in (0, 1) for head in range(4))


def test_the_windows_of_a_text_do_not_overlap(tokenizer) -> None:
    texts = draw_texts(tokenizer, n_windows=3, window=48, n_copies=2, copy=64, n_calibration=2)
    assert [len(x) for x in (texts.windows, texts.copies, texts.calibration, texts.secondary)] == [6, 4, 4, 12]
    code = text_tokens("code", tokenizer)
    parts = [*texts.windows[3:], *texts.copies[2:], *texts.calibration[2:]]
    places = []
    for part in parts:
        [start] = [start for start in range(0, len(code), 64) if torch.equal(code[start : start + len(part)], part)]
        places.append(start)
    assert len(set(places)) == len(parts)
    assert (LOSS_TEXTS, CALIBRATION_TEXTS) == (("books", "code"), ("prose", "code"))


def test_a_text_that_is_too_short_is_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match="the text 'books' has .* tokens, too few for 5016 windows of 1024"):
        draw_texts(tokenizer, n_windows=5000, n_copies=16)


def test_the_unigram_model_is_fitted_on_the_rest_of_the_text() -> None:
    ids = torch.randint(0, 7, (90,), generator=torch.Generator().manual_seed(0))
    windows = torch.stack([ids[10:20], ids[50:60]])
    counts = Counter(ids.tolist())
    counts.subtract(windows.flatten().tolist())
    expected = [-math.log((counts[token] + 1) / (70 + 7)) for row in windows.tolist() for token in row[1:]]
    assert unigram_nats(windows, ids, 7) == pytest.approx(np.mean(expected))


def test_the_gain_is_the_loss_on_the_first_minus_on_the_second_copy() -> None:
    model = tiny_qwen3_next(["linear_attention", "full_attention"])
    copies = torch.randint(2, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    nothing = torch.empty(0, 12, dtype=torch.long)
    gains = induction_gains(model, Texts(nothing, nothing, copies, nothing, {}), [5, 12])
    for row, gap in enumerate((5, 12)):
        for column, copy in enumerate(copies):
            said = copy[:gap].repeat(2)[None]
            with torch.no_grad():
                log_p = model(said, use_cache=False).logits[0].double().log_softmax(-1)
            nats = [-log_p[t - 1, said[0, t]].item() for t in range(1, 2 * gap)]
            first, second = nats[: gap - 1], nats[gap:]
            assert len(first) == len(second) == gap - 1
            assert gains[row, column] == pytest.approx(np.mean(first) - np.mean(second), abs=1e-5)
    with pytest.raises(ValueError, match=r"gaps lie in 2..12"):
        induction_gains(model, Texts(nothing, nothing, copies, nothing, {}), [13])


def test_losses_are_binned_by_the_position_of_the_token_that_is_predicted() -> None:
    positions = np.arange(1, 1024.0)
    found = _binned(np.stack([positions, positions, 2 * positions, 2 * positions]))
    expected = [positions[(positions >= low) & (positions < (high or 9999))].mean() for low, high in BINS.values()]
    assert found.shape == (2, 3)
    assert found[0].tolist() == expected
    assert found[1].tolist() == [2 * x for x in expected]


def test_what_a_cap_takes_is_a_share_of_the_mean_gain() -> None:
    gains = {"intact": np.array([[2.0, 4.0, 1.0, 1.0]]), "cap 16": np.array([[1.0, 2.0, 1.0, 0.0]])}
    ranks = {"intact": np.array([[1.0, 60.0, 60.0, 5.0]]), "cap 16": np.array([[1.0, 60.0, 30.0, 5.0]])}
    recall = Recall((512,), gains, {}, ranks, {}, {}, 64)
    assert recall.gain().point == 2.0
    assert recall.taken().point == 0.5
    assert recall.taken().low < 0.5 < recall.taken().high
    assert recall.kappa() == cohen_kappa([False, True, True, False], [False, True, False, False])


def groups_of(rank: np.ndarray, decay: np.ndarray) -> Groups:
    return Groups(HEADS, 64, 256, {"prose": rank}, {"prose": decay}, rank, rank, rank)


def test_the_law_that_is_fulfilled_has_no_error() -> None:
    decay = -np.array([[0.01, 0.2, 0.4, 1.0, 3.0, 5.0, 9.0, 20.0]] * 2)
    made = groups_of(predicted_rank(torch.from_numpy(decay), d=64).numpy(), decay)
    assert [estimate.point for estimate in law_fit(made).values()] == [1.0, 1.0, 1.0]
    found = shares(made)
    assert found["outside"] == found["outside by law"]
    assert found["two groups"] == found["two groups by law"]


def test_changes_of_rank_are_compared_where_some_are_predicted() -> None:
    decay = -np.array([[0.01, 0.2, 0.4, 1.0, 3.0, 5.0, 9.0, 20.0]])
    base = predicted_rank(torch.from_numpy(decay), d=64).numpy()
    scaled = np.stack([predicted_rank(torch.from_numpy(decay * factor), d=64).numpy() for factor in (0.5, 2.0)])
    law = Law(0, 8, 0.0, (0.5, 2.0), base, decay, scaled, 64)
    assert law.agreement().point == pytest.approx(1.0)
    assert list(law.by_factor()) == ["0.5", "2"]
    assert law.n_still == 2  # the head that is full before and after
    still = Law(0, 8, 0.0, (2.0,), base, 0 * decay, base[None], 64)
    assert np.isnan(still.agreement().point)


def test_an_architecture_without_decay_has_a_bound_and_no_factors(
    monkeypatch: pytest.MonkeyPatch, hybrid, tokenizer
) -> None:
    layers = linear_layers(hybrid)
    for layer in layers:
        layer.change_decay = None
    monkeypatch.setattr(groups, "linear_layers", lambda model: layers)
    law = measure_law(hybrid, tokenizer, n_prompts=1, n_tokens=128)
    assert (law.factors, law.scaled_rank.shape, law.bound_violations) == ((), (0, 1, 144), 0)
    assert np.isnan(law.agreement().point)


def test_random_orders_are_nested_and_told_apart_by_their_name() -> None:
    orders = random_orders(16, 3, name="a")
    assert sorted(orders[0]) == list(range(16))
    assert (random_orders(16, 5, name="a")[:3] == orders).all()  # more draws begin with the same
    assert not (random_orders(16, 3, name="b") == orders).all()


# ---------------------------------------------------------------- by task, and smaller states


@pytest.fixture(scope="module")
def by_task(hybrid, tokenizer, own_words) -> ByTask:
    tasks = {"own words": own_words, "again": replace(own_words, description="its own words again")}
    return measure_by_task(hybrid, tokenizer, tasks, name="m", n_prompts=4, n_draws=2, calibration=(1, 64))


def test_tasks_that_are_mastered_are_judged(by_task: ByTask) -> None:
    assert list(by_task.heads) == ["own words", "again"]
    rows = {row["claim"]: row for row in by_task.claims()}
    assert list(rows) == ["C4", "C4a", "C5"]
    assert rows["C4"]["verdict"] != claims.NOT_TESTABLE
    first = rows["C4"]["criteria"][0]
    assert first["label"] == f"own words ({by_task.heads['own words']} heads)"
    assert first["point"] == pytest.approx(by_task.high["own words"].mean() - by_task.low["own words"].mean())
    assert rows["C5"]["criteria"][0]["point"] == pytest.approx(by_task.joint["score / intact"].point)
    assert by_task.draws["again"].shape == (2, 4)


def test_one_task_is_too_few_for_a_pruned_model(by_task: ByTask) -> None:
    one = replace(by_task, heads={"again": 3}, joint={})
    verdicts = {row["claim"]: (row["verdict"], row["note"]) for row in one.claims()}
    assert verdicts["C5"] == (claims.NOT_TESTABLE, ": it masters 1 of 2 tasks")


def test_what_is_not_measured_is_not_judged(made_few: Removal) -> None:
    rows = one_model_claims(made_few, "m", ["C4b", "C4c", "C5a", "C5b", "C7"])
    assert {row["verdict"] for row in rows} == {claims.NOT_MEASURED}


def test_a_dose_takes_whole_heads(made_few: Removal) -> None:
    assert made_few.shares(MODEL) == [0.125, 0.25]
    assert made_few.actual(MODEL, 0.125) == 18 / 144
    assert made_few.near(MODEL, LOW, 0.2) == made_few.curve(MODEL, LOW)[0.25]
    assert sum(made_few.from_layer(layer, MODEL, LOW, 0.25) for layer in range(12)) == 36


@pytest.fixture(scope="module")
def made_few(hybrid, tokenizer) -> Removal:
    texts = draw_texts(tokenizer, n_windows=1, window=64, n_copies=1, copy=32, n_calibration=1)
    return measure_removal(hybrid, texts, name="m", sizes=FEW)


def test_a_measurement_is_repeated_on_the_same_heads(made_few: Removal, hybrid, tokenizer) -> None:
    texts = draw_texts(tokenizer, n_windows=1, window=64, n_copies=1, copy=32, n_calibration=1)
    again = measure_removal(hybrid, texts, name="m", sizes=replace(FEW, shares=(0.25,)), ordered=made_few)
    n_arms, difference = again.repeated(made_few)
    assert n_arms == 12
    assert difference < 1e-4
    other = replace(made_few, nats=made_few.nats + 1.0)
    assert again.repeated(other)[1] == pytest.approx(1.0, abs=1e-4)


def test_a_model_of_which_nothing_is_stored_is_measured_whole(
    made_few: Removal, monkeypatch, hybrid, tokenizer
) -> None:
    monkeypatch.setattr(repeated, "measure_removal", lambda *_, **__: made_few)
    found = repeated.repeat_removal("OWNER/NAME", hybrid, draw_texts(tokenizer, n_windows=1, window=64), sizes=FEW)
    assert found.shown is found.live
    assert found.curves(MODEL, [LOW])[1] is None
    assert found.source("x") == "x was measured by this run, 1 window of each text."


def of_two_heads(decays: list[float]) -> Groups:
    """The second head is low on prose and high on code."""
    rank = {"prose": np.array([[8.0, 1.0]]), "code": np.array([[8.0, 8.0]])}
    one = np.ones((1, 2))
    return Groups(((0, 0), (0, 1)), 8, 256, rank, {"prose": np.array([decays]), "code": -one}, one, one, one)


def test_heads_that_move_and_half_lives() -> None:
    groups = of_two_heads([-math.log(2), 0.0])
    assert (groups.moved(["code"]), groups.moved(["prose"]), groups.moved(["code", "prose"])) == (1, 0, 1)
    assert groups.half_life().tolist() == [1.0, math.inf]


def test_half_lives_beside_the_gap_are_counted_also_without_decay() -> None:
    lives = np.array([0.5, 1.0, 2.0, 100.0, np.inf])
    one = np.ones((1, 5))
    found = Groups(
        tuple((0, head) for head in range(5)),
        64,
        256,
        {"prose": one},
        {"prose": -np.log(2) / lives[None]},
        one,
        one,
        one,
    )
    around = found.around_gap()
    assert around["spread"] == pytest.approx((0.5, np.inf))
    assert around["window"] == pytest.approx([half_life_at(0.2 * 64), half_life_at(0.8 * 64)])
    assert around["sides"] == pytest.approx((1 / 5, 2 / 5))


def test_heads_of_one_rank_have_no_variance_to_explain_and_a_small_state_no_short_half_life() -> None:
    heads = tuple((0, head) for head in range(4))
    full, decay = np.full((2, 4), 4.0), np.full((2, 4), -1e-3)
    found = Groups(heads, 4, 256, {"prose": full}, {"prose": decay}, full, full, decay)
    [row] = law_claims("tiny", found, Law(0, 8, 0.0, (), full, decay, np.empty((0, 2, 4)), 4), keys=["C0a"])
    assert row["verdict"] == claims.NOT_TESTABLE
    assert "all heads have the same rank" in row["note"]
    assert found.around_gap()["window"] == pytest.approx((0.0, half_life_at(0.8 * 4)))  # 0.2 d is under 1


def test_labels_are_compared_over_all_kinds_of_input() -> None:
    shown = of_two_heads([-1.0, -1.0])
    live = replace(shown, rank={**shown.rank, "code": np.array([[8.0, 1.0]])})
    turning = Turning(1, 0, 1, 0)
    again = repeated.RepeatedGroups({"end": shown}, None, turning, live, False, None)
    assert again.same_labels() == 0.75  # both of prose, one of code
    assert again.initial is None
    assert again.numbers()["r/d, code"] == pytest.approx((1 + 1 / 8) / 2)


def test_ranks_of_which_nothing_is_stored_are_measured_with_their_controls(tmp_path) -> None:
    name = str(save_tiny(tmp_path, ["linear_attention"] * 2))
    model, tokenizer = load_model(name), load_tokenizer(name)
    found = repeated.repeat_groups(name, model, tokenizer, n_prompts=2, n_tokens=160, domains=["prose"])
    assert found.made is None
    assert list(found.shown) == ["end", "initial", "shuffled"]
    assert found.initial is None  # its weights before training are not known
    assert found.source("x") == "x was measured by this run on 2 prompts of 160 tokens of each kind of input (prose)."
    file = tmp_path / "a.json"
    repeated.write_chapter(file, parameters={}, rows=[], found={name: found})
    assert json.loads(file.read_text())["stored"] == {}


# ---------------------------------------------------------------- set-up of a notebook


def test_parameters_become_a_run() -> None:
    given = {
        "model": " hybrid ,pure", "profile": "full", "seed": 3, "n_prompts": 0, "results_folder": "there", "device": "cpu", "dtype": "bfloat16",
    }  # fmt: skip
    run = setup(given, "page", n_prompts=(2, 16))
    assert (run.models, run.quick, run.seed, run.sizes) == (
        ("hybrid", "pure"), False, 3, {"n_prompts": 16, "seed": 3},
    )  # fmt: skip
    assert run.file == Path("there/page.json")
    assert run.where == {"revision": None, "device": "cpu"}
    assert run.load("pure")[0].dtype == torch.bfloat16
    assert setup({"model": "pure"}, "page").dtype is None


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"model": " , "}, "names no model"),
        ({"model": "pure", "n_prompts": -1}, "'n_prompts' must be at least 1"),
        ({"model": "pure", "dtype": "half"}, "'dtype' takes float32 or bfloat16"),
        ({"model": "pure", "n_promts": 1}, "did you mean 'n_prompts'"),
    ],
)
def test_parameters_that_say_nothing_are_refused(given: dict, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        setup(given, "page", n_prompts=(2, 16))


def test_the_numbers_behind_a_figure_are_kept_beside_the_result(tmp_path: Path) -> None:
    run = setup({"model": "pure", "results_folder": str(tmp_path)}, "page")
    plt.switch_backend("Agg")
    plt.plot([1, 2], [3, 4], label="a")
    run.keep("fig-a")
    plt.close()
    assert (tmp_path / "fig-a.csv").read_text().splitlines() == ["panel,series,x,y", "1,a,1.0,3.0", "1,a,2.0,4.0"]
    with pytest.raises(ValueError, match="shows no numbers"):
        run.keep("fig-b")
    plt.fill_between([1.0, 2.0], [np.nan, np.nan], [np.nan, np.nan])
    run.keep("fig-c")  # of what is undefined there is nothing to keep
    plt.close()
    assert [file.name for file in tmp_path.iterdir()] == ["fig-a.csv"]


def test_a_live_run_that_is_another_stops_the_build(tmp_path: Path) -> None:
    measured, content = stored_on("hybrid")
    end = measured.groups["end"]
    other = replace(end, rank={key: end.d - table for key, table in end.rank.items()})
    repeated = RepeatedGroups(measured.groups, measured.laws["end"], measured.turning, end, True, content["provenance"])
    assert repeated.held() == (24, 24)
    write_chapter(tmp_path / "a.json", parameters={}, rows=[], found={"hybrid": repeated})
    with pytest.raises(ValueError, match="agrees with what is stored"):
        write_chapter(tmp_path / "b.json", parameters={}, rows=[], found={"hybrid": replace(repeated, live=other)})
    assert not (tmp_path / "b.json").exists()


def test_recall_that_is_another_stops_the_build() -> None:
    measured, content = stored_on("hybrid")
    recall = measured.recall
    live = replace(recall, gains={"intact": recall.gains["intact"] + 1})
    with pytest.raises(ValueError, match="gains of hybrid differ by 1"):
        RepeatedRecall(recall, live, "0", content["provenance"], measured.removal).check("hybrid")
