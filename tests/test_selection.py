import re

import pytest
import torch

from staterank_utils.pruning import prune_heads
from staterank_utils.selection import extreme_heads, head_counts, measure_heads, random_heads, select_heads
from staterank_utils.spectra import effective_rank
from staterank_utils.surgery import all_heads
from staterank_utils.tracing import trace_states

MEASURE = {(0, 0): 3.0, (0, 1): 1.0, (2, 0): 2.0, (2, 1): 1.0}


def test_measures_are_those_of_a_trace(tiny_model) -> None:
    prompts = torch.randint(0, 64, (2, 30), generator=torch.Generator().manual_seed(0))
    measures = measure_heads(tiny_model, prompts)
    trace = trace_states(tiny_model, prompts, positions=[30], reduce=effective_rank)
    assert all(list(measure) == all_heads(tiny_model) for measure in measures.values())
    expected = trace.values[:, :, 0].double().mean(1)
    for (layer, head), rank in measures["effective rank"].items():
        assert rank == expected[trace.layers.index(layer), head]
    assert max(measures["log-decay"].values()) <= 0
    assert list(measures["write strength"].values()) == trace.write_strength.mean(1).flatten().tolist()


def test_extremes_of_all_heads_and_of_every_layer() -> None:
    assert extreme_heads(MEASURE, 2, largest=False) == [(0, 1), (2, 1)]
    assert extreme_heads(MEASURE, 2, largest=True) == [(0, 0), (2, 0)]
    assert extreme_heads(MEASURE, 1, largest=False, per_layer=True) == [(0, 1), (2, 1)]
    assert extreme_heads(MEASURE, 0, largest=True) == []


def test_draws_follow_from_their_seed_and_differ() -> None:
    heads = [(layer, head) for layer in range(4) for head in range(8)]
    draws = [tuple(random_heads(heads, 5, seed=seed)) for seed in range(20)]
    assert draws[3] == tuple(random_heads(heads, 5, seed=3))
    assert len(set(draws)) == 20
    assert all(len(set(draw)) == 5 for draw in draws)
    layers = [layer for layer, _ in random_heads(heads, 3, seed=0, per_layer=True)]
    assert [layers.count(layer) for layer in range(4)] == [3] * 4


def test_scores_of_another_model_are_refused(hybrid) -> None:
    own = dict.fromkeys(all_heads(hybrid), 0.5)
    assert sum(map(len, select_heads(own, model=hybrid).values())) == 56
    pure = dict.fromkeys([(layer, head) for layer in range(12) for head in range(16)], 0.5)
    with pytest.raises(ValueError, match="scores of another model: of 192 heads, 144 of them among the 144"):
        select_heads(pure, model=hybrid)
    with pytest.raises(ValueError, match="scores of another model: of 4 heads"):
        select_heads(MEASURE, model=hybrid)


def test_scores_of_a_model_go_on_after_some_of_its_heads_went(hybrid) -> None:
    scores = {head: float(i) for i, head in enumerate(all_heads(hybrid))}
    pruned = prune_heads(hybrid, {0: [3], 10: [15]})
    with pytest.raises(
        ValueError, match="of the model before 2 heads were removed: give those of the heads that are left"
    ):
        select_heads(scores, model=pruned)
    left = {head: scores[head] for head in all_heads(pruned)}
    assert select_heads(left, share=2 / 142, model=pruned) == {10: [13, 14]}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: extreme_heads(MEASURE, 5, largest=True), "cannot choose 5 of 4 heads"),
        (lambda: extreme_heads(MEASURE, 3, largest=True, per_layer=True), "cannot choose 3 of 2 heads per layer"),
        (lambda: random_heads(list(MEASURE), -1, seed=0), "cannot choose -1"),
        (lambda: head_counts(48, [0.5, 1.0]), "a share of heads lies in (0, 1), got [0.5, 1.0]"),
    ],
)
def test_impossible_choices_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
