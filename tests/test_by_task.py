"""Scores on tasks without some heads, and what claims C4, C4a and C5 take from them."""

import numpy as np
import pytest

from staterank_utils.evaluation import Task, evaluate, exact
from staterank_utils.studies.by_task import HIGH, LOW, RANK, TaskScores
from staterank_utils.surgery import ablate_heads
from staterank_utils.tasks import Turn

IMPOSSIBLE = Task("what nobody knows", lambda rng, _: Turn("a", f" {rng.random()}\n"), exact, first_error_decides=True)


@pytest.fixture(scope="module")
def tasks(own_words) -> dict[str, Task]:
    return {"own words": own_words, "impossible": IMPOSSIBLE}


@pytest.fixture(scope="module")
def study(hybrid, tokenizer, tasks) -> TaskScores:
    return TaskScores(hybrid, tokenizer, tasks, n_prompts=3, calibration=(1, 64))


def test_scores_are_those_of_an_ablated_evaluation_and_remembered(study: TaskScores, hybrid, tokenizer, tasks) -> None:
    heads = study.arm(LOW, 12)
    with ablate_heads(hybrid, heads):
        expected = evaluate(tasks["own words"], hybrid, tokenizer, n_instances=3)
    assert study.score("own words", heads).tolist() == expected.tolist()
    assert study.score("own words", heads[::-1]) is study.score("own words", heads)


def test_arms_are_ends_of_a_measure(study: TaskScores) -> None:
    rank = study.measures[RANK]
    low, high = study.arm(LOW, 5), study.arm(HIGH, 5)
    assert max(rank[head] for head in low) <= min(rank[head] for head in rank if head not in low)
    assert min(rank[head] for head in high) >= max(rank[head] for head in rank if head not in high)


def test_only_mastered_tasks_count(study: TaskScores) -> None:
    assert study.mastered == ["own words"]


@pytest.mark.parametrize(
    ("low", "high", "judged"),
    [
        ([1, 1, 1, 1, 1, 1, 0.6, 0], [1, 1, 1, 1, 1, 0, 0, 0], 56),
        ([1, 1, 1, 0.4, 0, 0, 0, 0], [1, 1, 1, 1, 0.5, 0.4, 0, 0], 18),
        ([0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 1], 3),
        ([1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1], 56),
    ],
    ids=["the paper's share", "the largest below it", "none keeps half", "only the largest breaks"],
)
def test_the_share_to_judge_at(study: TaskScores, monkeypatch, low, high, judged: int) -> None:
    scores = {0: 1.0}
    ends = [dict(zip(study.counts, values, strict=True)) for values in (low, high)]

    def score(task, heads=()):
        heads = list(heads)
        return np.array([ends[heads == study.arm(HIGH, len(heads))][len(heads)] if heads else scores[0]])

    monkeypatch.setattr(study, "score", score)
    assert study.judged_count("own words") == judged


def test_redundancy_is_a_ratio_over_the_tasks_that_count(study: TaskScores) -> None:
    heads = study.arm(HIGH, 56)
    assert study.redundancy().point == pytest.approx(
        study.score("own words", heads).mean() / study.score("own words").mean()
    )
    assert len(heads) == study.paper_count


def test_heads_that_are_removed_score_as_heads_that_are_silenced(study: TaskScores) -> None:
    heads = [head for head in study.heads if head[0] == 0] + study.arm(LOW, 6)
    for chosen in (heads[:16], sorted(set(heads))):  # a whole layer, and heads of several
        assert study.score("own words", chosen, removed=True).tolist() == study.score("own words", chosen).tolist()
    assert len(study.heads) == 144, "the model itself keeps its heads"


def test_the_last_pruned_model_is_kept(study: TaskScores) -> None:
    heads = study.arm(LOW, 6)
    assert study.pruned(heads[::-1]) is study.pruned(heads)


def test_what_heads_retain_is_set_against_as_many_random_ones(study: TaskScores, monkeypatch) -> None:
    chosen = study.arm(LOW, 3)
    scores = {(): [1.0, 1.0, 0.5], tuple(sorted(chosen)): [1.0, 0.5, 0.5]}
    monkeypatch.setattr(study, "score", lambda task, heads=(), **_: np.array(scores[tuple(sorted(heads))]))
    monkeypatch.setattr(study, "draws", lambda task, count, n: np.array([[0.5] * 3, [0.5, 1.0, 0.5]]))
    found = study.against_draws(chosen, 2)
    assert found["score / intact"].point == pytest.approx(0.8)
    assert found["over the best random draw"].point == pytest.approx(0.0)
    assert found["over the mean random draw"].point == pytest.approx(0.8 - 0.7)
