"""The studies' measures against slow oracles."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_qwen3_next

from staterank_utils.layouts import linear_layers
from staterank_utils.memory import predicted_rank
from staterank_utils.strata import cohen_kappa
from staterank_utils.studies import groups
from staterank_utils.studies.groups import Groups, Law, law_fit, measure_law, shares
from staterank_utils.studies.recall import Recall, induction_gains
from staterank_utils.studies.removal import BINS, _binned, random_orders
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
    layers = [(index, layer, replace(layout, changed_decay=None)) for index, layer, layout in linear_layers(hybrid)]
    monkeypatch.setattr(groups, "linear_layers", lambda model: layers)
    law = measure_law(hybrid, tokenizer, n_prompts=1, n_tokens=128)
    assert (law.factors, law.scaled_rank.shape, law.bound_violations) == ((), (0, 1, 48), 0)
    assert np.isnan(law.agreement().point)


def test_random_orders_are_nested_and_told_apart_by_their_name() -> None:
    orders = random_orders(16, 3, name="a")
    assert sorted(orders[0]) == list(range(16))
    assert (random_orders(16, 5, name="a")[:3] == orders).all()  # more draws begin with the same
    assert not (random_orders(16, 3, name="b") == orders).all()
