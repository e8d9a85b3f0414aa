from contextlib import nullcontext

import numpy as np
import pytest
import torch

from staterank_utils.ablation import HIGH, LOW, MEAN, RANK, Ablation
from staterank_utils.evaluation import Task, answer_nats, evaluate, exact, recall_task
from staterank_utils.strata import Estimate
from staterank_utils.surgery import ablate_heads, ablate_softmax_heads, all_heads
from staterank_utils.tasks import Turn

TASKS = {
    "recall": recall_task(4),
    "impossible": Task(
        "what nobody knows", lambda rng, _: Turn("a", f" {rng.random()}\n"), exact, first_error_decides=True
    ),
}


@pytest.fixture(scope="module")
def study(hybrid, tokenizer) -> Ablation:
    return Ablation(hybrid, tokenizer, TASKS, n_prompts=3, n_graded=1, calibration=(1, 64))


def test_scores_are_those_of_an_ablated_evaluation_and_remembered(study: Ablation, hybrid, tokenizer) -> None:
    heads = study.arm(LOW, 12)
    with ablate_heads(hybrid, heads):
        expected = evaluate(TASKS["recall"], hybrid, tokenizer, n_instances=3)
    assert study.score("recall", heads).tolist() == expected.tolist()
    assert study.score("recall", heads[::-1]) is study.score("recall", heads)


def test_arms_are_ends_of_a_measure(study: Ablation) -> None:
    rank = dict(zip(study.heads, study.values(RANK), strict=True))
    low, high = study.arm(LOW, 5), study.arm(HIGH, 5)
    assert max(rank[head] for head in low) <= min(rank[head] for head in rank if head not in low)
    assert min(rank[head] for head in high) >= max(rank[head] for head in rank if head not in high)
    assert len({layer for layer, _ in study.arm(LOW, 1, per_layer=True)}) == 6
    assert study.high.tolist() == [rank[head] >= 32 for head in study.heads]


def test_only_mastered_tasks_count(study: Ablation) -> None:
    assert study.mastered == ["recall"]


@pytest.mark.parametrize(
    ("low", "high", "judged", "breaking"),
    [
        ([1, 1, 1, 1, 1, 0.6, 0], [1, 1, 1, 1, 0, 0, 0], 19, 12),
        ([1, 1, 0.4, 0, 0, 0, 0], [1, 1, 1, 0.5, 0.4, 0, 0], 6, 5),
        ([0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 1], 1, 1),
        ([1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1], 19, 24),
    ],
    ids=["the paper's share", "the largest below it", "none keeps half", "only the largest breaks"],
)
def test_the_share_to_judge_at(study: Ablation, monkeypatch, low, high, judged: int, breaking: int) -> None:
    scores = {0: 1.0}
    ends = [dict(zip(study.counts, values, strict=True)) for values in (low, high)]

    def score(task, heads=()):
        heads = list(heads)
        return np.array([ends[heads == study.arm(HIGH, len(heads))][len(heads)] if heads else scores[0]])

    monkeypatch.setattr(study, "score", score)
    monkeypatch.setattr(study, "scores_on", lambda tasks, heads, n_prompts: score("recall", heads)[None])
    assert study.judged_count("recall") == judged
    assert study.breaking_count(study.tasks["recall"], n_prompts=study.n_prompts) == breaking


def test_draws_differ_and_arms_have_every_measure(study: Ablation) -> None:
    assert study.draws("recall", 12, 2).shape == (2, 3)
    assert len(study.arms("recall", 2)) == 2 * len(study.measures) + 2


def test_added_losses_are_of_the_ablated_model(study: Ablation, hybrid, tokenizer) -> None:
    def loss() -> float:
        return answer_nats(TASKS["recall"], hybrid, tokenizer, n_instances=1, seed=1).mean()

    intact = loss()
    with ablate_heads(hybrid, [(0, 4)]):
        expected = loss() - intact
    assert study.added_loss(ablate_heads(hybrid, [(0, 4)]))[MEAN].point == pytest.approx(expected, rel=1e-5)
    with ablate_softmax_heads(hybrid, [(3, head) for head in range(4)]):
        expected = loss() - intact
    parts = study.by_part()
    assert parts["softmax"][3]["recall"].point == pytest.approx(expected, rel=1e-5)
    assert list(parts["linear"]) == [0, 1, 2, 4, 5, 6]
    assert len(parts["softmax heads"]) == 8


def test_states_cut_to_full_rank_lose_nothing_and_rotated_ones_something(study: Ablation) -> None:
    added = study.rank_used(HIGH, (0, 63, 64), every=16)
    assert list(added) == ["rank 0", "rank 63", "rotated"]
    assert abs(added["rank 63"][MEAN].point) < 1e-2
    assert added["rotated"][MEAN].point > added["rank 63"][MEAN].point


def test_perplexity_rises_when_a_layer_goes(study: Ablation) -> None:
    [intact], [without] = (
        study.perplexities(heads, ["code"], n_tokens=64) for heads in ([], [(0, head) for head in range(8)])
    )
    assert 1 < intact.point < without.point
    assert intact.low == intact.high, "one prompt has no spread"


def test_depth_table_has_a_row_a_depth(study: Ablation) -> None:
    table = study.depth_table([], (0.0, 1.0), (96,), n_prompts=2)
    assert table.tolist() == [[[1.0, 1.0]], [[1.0, 1.0]]]


def test_redundancy_is_a_ratio_over_the_tasks_that_count(study: Ablation) -> None:
    heads = study.arm(HIGH, 19)
    assert study.redundancy().point == pytest.approx(study.score("recall", heads).mean() / study.score("recall").mean())
    assert len(all_heads(study.model)) == 48
    assert isinstance(study.prompts("code", 1, 8), torch.Tensor)


def test_heads_that_are_removed_score_as_heads_that_are_silenced(study: Ablation) -> None:
    heads = [head for head in study.heads if head[0] == 0] + study.arm(LOW, 6)
    for chosen in (heads[:8], sorted(set(heads))):  # a whole layer, and heads of several
        assert study.score("recall", chosen, kind="removed").tolist() == study.score("recall", chosen).tolist()
    assert len(study.heads) == 48, "the model itself keeps its heads"


def test_a_smaller_model_is_scored_on_the_same_prompts(study: Ablation) -> None:
    heads = study.arm(LOW, 6)
    scores = study.scores_of(study.pruned(heads))
    assert list(scores) == study.mastered
    assert scores["recall"].tolist() == study.score("recall", heads).tolist()
    assert study.over_intact(scores) == study.retained(heads)
    assert study.pruned(heads[::-1]) is study.pruned(heads)


def test_a_sweep_can_be_made_on_other_prompts(study: Ablation, monkeypatch) -> None:
    monkeypatch.setattr(study, "heads", study.heads[:2])
    here, there = study.sweep(), study.sweep(seed=1001)
    assert list(here) == list(there) == study.heads
    assert here != there
    assert here[study.heads[1]] == study.added_loss(ablate_heads(study.model, [study.heads[1]]))


def test_the_interval_of_an_added_loss_is_over_prompts_each_against_itself(study: Ablation, monkeypatch) -> None:
    losses = [[np.array([1.0, 5.0]), np.array([2.0])], [np.array([2.0, 5.0]), np.array([2.5])]]
    monkeypatch.setattr(study, "losses", lambda read=None, seed=1: losses.pop(0))
    monkeypatch.setattr(study, "_intact_losses", {})
    monkeypatch.setattr(Ablation, "mastered", ["recall", "copying"])
    assert study.added_loss(nullcontext()) == {
        MEAN: Estimate(0.5, 0.25, 0.75),
        "recall": Estimate(0.5, 0.0, 1.0),
        "copying": Estimate(0.5, 0.5, 0.5),
    }


def test_what_heads_retain_is_set_against_as_many_random_ones(study: Ablation, monkeypatch) -> None:
    chosen = study.arm(LOW, 3)
    scores = {(): [1.0, 1.0, 0.5], tuple(sorted(chosen)): [1.0, 0.5, 0.5]}
    monkeypatch.setattr(study, "score", lambda task, heads=(), **_: np.array(scores[tuple(sorted(heads))]))
    monkeypatch.setattr(study, "draws", lambda task, count, n: np.array([[0.5] * 3, [0.5, 1.0, 0.5]]))
    found = study.against_draws(chosen, 2)
    assert found["score / intact"].point == pytest.approx(0.8)
    assert found["over the best random draw"].point == pytest.approx(0.0)
    assert found["over the mean random draw"].point == pytest.approx(0.8 - 0.7)
