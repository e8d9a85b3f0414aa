"""What a model loses on tasks without some of its heads: claims C4, C4a and C5 of the first registration."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedModel

from staterank_utils import claims
from staterank_utils.architectures import state_size
from staterank_utils.evaluation import (
    TASKS,
    Task,
    arithmetic_task,
    copying_task,
    evaluate,
    needle_task,
    recall_task,
)
from staterank_utils.pruning import prune_heads
from staterank_utils.selection import (
    PAPER_SHARE,
    Measure,
    extreme_heads,
    head_counts,
    head_pairs,
    measure_heads,
    random_heads,
    saturation_scores,
    select_heads,
)
from staterank_utils.strata import Estimate, bootstrap, paired_difference
from staterank_utils.studies.groups import Row
from staterank_utils.surgery import Head, ablate_heads, all_heads
from staterank_utils.tasks import domain_prompts

CALIBRATION_DOMAINS = ("code", "arithmetic")  # evaluation prompts are technical prose and other stories
RANK = "effective rank"
LOW, HIGH = False, True  # ends of rank, for `TaskScores.arm`


def tasks_of(profile: str) -> dict[str, Task]:
    """The four tasks, short in the quick profile.

    Args:
        profile: "quick" or "full".

    Raises:
        ValueError: another profile.

    Example:
        >>> tasks_of("quick")["needle"].description
        '3 needles in 192 tokens of unseen prose, all asked for, all right'
    """
    if profile not in ("quick", "full"):
        raise ValueError(f"there is no profile {profile!r}: choose from quick, full")
    if profile == "full":
        return dict(TASKS)
    return {
        "needle": needle_task(3, 192),
        "arithmetic": arithmetic_task(2, 4),
        "recall": recall_task(),
        "copying": copying_task(24, 48),
    }


def mastered(scores: Mapping[str, NDArray[np.float64]]) -> list[str]:
    """The tasks that count, by the first registration: those of which a model with all heads masters at least half.

    Args:
        scores: task -> scores with all heads, (prompt,).

    Example:
        >>> mastered({"recall": np.array([1.0, 0.0]), "needle": np.array([0.0, 0.0])})
        ['recall']
    """
    return [task for task, of_task in scores.items() if of_task.mean() >= 0.5]


def too_few(key: str, name: str, *, n_mastered: int, n_tasks: int) -> Row:
    """The row of a claim about tasks that a model cannot be tested on.

    Args:
        key: of the claim.
        name: of the model.
        n_mastered, n_tasks: tasks that count, of how many.

    Example:
        >>> too_few("C5", "tiny", n_mastered=1, n_tasks=4)["note"]
        ': it masters 1 of 4 tasks'
    """
    return claims.not_testable(key, name, why=f"it masters {n_mastered} of {n_tasks} tasks")


@dataclass(frozen=True)
class ByTask:
    """Scores with all heads, and without as many of the lowest rank, of the highest rank, and at random.

    Attributes:
        name: of the model.
        intact: task -> scores with all heads, (prompt,).
        heads: task -> number of heads removed, by the registered rule; of the tasks that count, the intact model masters half.
        low, high: task -> scores without that many heads of the lowest and highest rank, (prompt,).
        draws: task -> scores without as many random heads, (draw, prompt).
        redundancy: score over intact without the highest 38.9 %, mean over the tasks that count; None where none does.
        joint: score over intact with 38.9 % removed by the joint score, and its lead over random draws; empty under two tasks.

    Example:
        >>> ByTask("tiny", {"recall": np.zeros(2)}, {}, {}, {}, {}, None, {}).claims()[0]["verdict"]
        'not testable on this model'
    """

    name: str
    intact: Mapping[str, NDArray[np.float64]]
    heads: Mapping[str, int]
    low: Mapping[str, NDArray[np.float64]]
    high: Mapping[str, NDArray[np.float64]]
    draws: Mapping[str, NDArray[np.float64]]
    redundancy: Estimate | None
    joint: Mapping[str, Estimate]

    def claims(self) -> list[Row]:
        """The rows of C4, C4a and C5."""
        counts = {"n_mastered": len(self.heads), "n_tasks": len(self.intact)}
        if not self.heads or self.redundancy is None:
            return [too_few(key, self.name, **counts) for key in ("C4", "C4a", "C5")]
        difference, below = {}, {}
        for task, n in self.heads.items():
            label = f"{task} ({n} head{'s' if n > 1 else ''})"
            difference[label] = paired_difference(self.high[task], self.low[task])
            below[label] = over_draws(self.draws[task], self.low[task])
        return [
            claims.judge_asymmetry(self.name, difference, below),
            claims.judge("C4a", self.name, {"score / intact": self.redundancy}),
            claims.judge("C5", self.name, self.joint) if self.joint else too_few("C5", self.name, **counts),
        ]


def measure_by_task(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Mapping[str, Task],
    *,
    name: str,
    n_prompts: int,
    n_draws: int,
    **options: Any,
) -> ByTask:
    """Score every task with all heads; of those that the model masters, compare the arms of C4, C4a and C5.

    Args:
        model, tokenizer: from `load_model` and `load_tokenizer`.
        tasks: name -> task.
        name: of the model.
        n_prompts: per task.
        n_draws: random selections of as many heads.
        options: of `TaskScores`: seed, batch_size, calibration.

    Example:
        >>> from staterank_utils import load_model, load_tokenizer
        >>> from staterank_utils.evaluation import recall_task
        >>> hybrid = load_model("hybrid"), load_tokenizer("hybrid")
        >>> found = measure_by_task(*hybrid, {"recall": recall_task()}, name="hybrid", n_prompts=2, n_draws=2)
        >>> found.intact["recall"].tolist(), found.heads  # trained on text alone
        ([0.0, 0.0], {})
    """
    study = TaskScores(model, tokenizer, tasks, n_prompts=n_prompts, **options)
    intact = {task: study.score(task) for task in tasks}
    heads = {task: study.judged_count(task) for task in study.mastered}
    joint: Mapping[str, Estimate] = {}
    if len(heads) > 1:
        saturation = saturation_scores(study.measures[RANK], study.measures["nuclear norm"], d=study.d)
        gone = head_pairs(select_heads(saturation, share=PAPER_SHARE))
        joint = study.against_draws(gone, n_draws, removed=True)
    return ByTask(
        name,
        intact,
        heads,
        {task: study.score(task, study.arm(LOW, n)) for task, n in heads.items()},
        {task: study.score(task, study.arm(HIGH, n)) for task, n in heads.items()},
        {task: study.draws(task, n, n_draws) for task, n in heads.items()},
        study.redundancy() if heads else None,
        joint,
    )


class TaskScores:
    """Scores of a model on tasks without some of its heads, each computed once.

    Heads are ordered by measures on calibration prompts (held-out code and arithmetic stories of another seed), which share no text
    with the prompts that scores are taken on.

    Args:
        model, tokenizer: from `load_model` and `load_tokenizer`.
        tasks: name -> task.
        n_prompts: prompts per task.
        seed: of prompts and draws.
        batch_size: prompts answered side by side.
        calibration: number of calibration prompts per domain and their tokens.

    Attributes:
        heads: every linear-attention head.
        d: largest possible rank of a state.
        counts: numbers of heads at the registered shares.

    Example:
        >>> from staterank_utils import load_model, load_tokenizer
        >>> from staterank_utils.evaluation import recall_task
        >>> hybrid = load_model("hybrid"), load_tokenizer("hybrid")
        >>> scores = TaskScores(*hybrid, {"recall": recall_task()}, n_prompts=2, calibration=(1, 64))
        >>> scores.score("recall").tolist(), scores.counts
        ([0.0, 0.0], [3, 6, 7, 14, 18, 36, 56, 72])
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        tasks: Mapping[str, Task],
        *,
        n_prompts: int,
        seed: int = 0,
        batch_size: int = 16,
        calibration: tuple[int, int] = (4, 512),
    ):
        self.model, self.tokenizer, self.tasks = model, tokenizer, dict(tasks)
        self.n_prompts, self.seed, self.batch_size, self.calibration = n_prompts, seed, batch_size, calibration
        self.heads = all_heads(model)
        self.counts = head_counts(len(self.heads))
        self.d = state_size(model)
        self._scores: dict[tuple[str, tuple[Head, ...], bool], NDArray[np.float64]] = {}
        self._last_pruned: tuple[tuple[Head, ...], PreTrainedModel] | None = None

    @cached_property
    def measures(self) -> dict[str, Measure]:
        """Effective rank, nuclear norm, log-decay and write strength of every head on the calibration prompts."""
        n_prompts, n_tokens = self.calibration
        prompts = [
            domain_prompts(domain, self.tokenizer, n_prompts=n_prompts, n_tokens=n_tokens, seed=self.seed + 1000)
            for domain in CALIBRATION_DOMAINS
        ]
        return measure_heads(self.model, torch.cat(prompts))

    @property
    def paper_count(self) -> int:
        """The paper's 38.9 % of the heads as a number."""
        return head_counts(len(self.heads), [PAPER_SHARE])[0]

    def arm(self, end: bool, n: int) -> list[Head]:
        """The `n` heads of the lowest (`LOW`) or highest (`HIGH`) effective rank."""
        return extreme_heads(self.measures[RANK], n, largest=end)

    def score(self, task: str, heads: Iterable[Head] = (), *, removed: bool = False) -> NDArray[np.float64]:
        """Scores of a task without some heads, one per prompt; remembered.

        Args:
            task: name of one.
            heads: that are ablated.
            removed: cut them out with `prune_heads` instead.
        """
        key = (task, tuple(sorted(heads)), removed)
        if key not in self._scores:
            if removed:
                self._scores[key] = self._evaluate(task, self.pruned(key[1]))
            else:
                with ablate_heads(self.model, key[1]):
                    self._scores[key] = self._evaluate(task, self.model)
        return self._scores[key]

    def _evaluate(self, task: str, model: PreTrainedModel) -> NDArray[np.float64]:
        return evaluate(
            self.tasks[task], model, self.tokenizer, n_instances=self.n_prompts, seed=self.seed, batch_size=self.batch_size
        )  # fmt: skip

    def pruned(self, heads: Iterable[Head]) -> PreTrainedModel:
        """The model with some heads removed for good; the last one is kept at hand."""
        chosen = tuple(sorted(heads))
        if self._last_pruned is None or self._last_pruned[0] != chosen:
            of_layers = {layer: [head for index, head in chosen if index == layer] for layer, _ in chosen}
            self._last_pruned = chosen, prune_heads(self.model, of_layers)
        return self._last_pruned[1]

    @property
    def mastered(self) -> list[str]:
        """The tasks of which the intact model masters at least half: those that count."""
        return mastered({task: self.score(task) for task in self.tasks})

    def judged_count(self, task: str) -> int:
        """Number of heads at which the two ends are compared (claim C4).

        The paper's share, 38.9 %, where one of the ends keeps half of the intact score there; else the largest registered
        share below it at which one does; else the smallest.
        """
        best = {n: max(float(self.score(task, self.arm(end, n)).mean()) for end in (LOW, HIGH)) for n in self.counts}
        return judged_dose(best, float(self.score(task).mean()), self.paper_count)

    def draws(self, task: str, n: int, n_draws: int) -> NDArray[np.float64]:
        """Scores without `n` random heads, (draw, prompt)."""
        chosen = [random_heads(self.heads, n, seed=1000 * self.seed + draw) for draw in range(n_draws)]
        bar = tqdm(chosen, desc=f"random heads, {task}", leave=False)
        return np.stack([self.score(task, heads) for heads in bar])

    def redundancy(self) -> Estimate:
        """`retained` without high-rank heads, at the paper's share (C4a)."""
        return self.retained(self.arm(HIGH, self.paper_count))

    def retained(self, heads: Iterable[Head], *, removed: bool = False) -> Estimate:
        """Score without some heads over the intact score, mean over the tasks that count."""
        chosen = list(heads)
        return self.over_intact({task: self.score(task, chosen, removed=removed) for task in self.mastered})

    def over_intact(self, scores: Mapping[str, NDArray[np.float64]]) -> Estimate:
        """Scores on the tasks that count, over those of the intact model on the same prompts, mean over tasks."""
        tables = [np.stack([self.score(task), scores[task]], 1) for task in self.mastered]
        return bootstrap(lambda *drawn: float(_ratios(drawn)[0]), *tables)

    def against_draws(self, heads: Iterable[Head], n_draws: int, *, removed: bool = False) -> dict[str, Estimate]:
        """`retained`, and how far it lies over the best and over the mean of draws of as many random heads (C5).

        The intervals of the last two are over prompts and draws.
        """
        chosen = list(heads)
        scores = [
            np.stack(
                [self.score(task), self.score(task, chosen, removed=removed), *self.draws(task, len(chosen), n_draws)],
                1,
            )
            for task in self.mastered
        ]

        def over(rival: Callable[[NDArray[np.float64]], Any]) -> Estimate:
            def difference(*drawn: NDArray[np.float64]) -> float:
                *tables, picked = drawn
                own, *draws = _ratios(tables)
                return float(own - rival(np.array(draws)[picked.astype(int)]))

            return bootstrap(difference, *scores, np.arange(n_draws, dtype=np.float64))

        return {
            "score / intact": self.retained(chosen, removed=removed),
            "over the best random draw": over(np.max),
            "over the mean random draw": over(np.mean),
        }


def judged_dose(best: Mapping[int, float], intact: float, limit: int) -> int:
    """The largest number of heads up to a limit at which the better of some arms keeps half of the intact score; the smallest where none does.

    Args:
        best: number of heads -> the score of the better arm, in increasing order.
        intact: score with all heads.
        limit: the largest number that is looked at.

    Example:
        >>> judged_dose({1: 1.0, 5: 0.6, 19: 0.1}, 1.0, 19), judged_dose({1: 0.2, 5: 0.1}, 1.0, 19)
        (5, 1)
    """
    return max((n for n, score in best.items() if n <= limit and score >= intact / 2), default=min(best))


def over_draws(draws: NDArray[np.float64], scores: NDArray[np.float64]) -> Estimate:
    """Mean over random draws minus another arm's scores, with its interval over prompts and draws.

    Args:
        draws: (draw, prompt).
        scores: of the other arm, on the same prompts.

    Example:
        >>> over_draws(np.ones((8, 4)), np.zeros(4))
        Estimate(point=1.0, low=1.0, high=1.0)
    """
    table = np.concatenate([scores[None], draws]).T
    return bootstrap(
        lambda drawn, picked: float(drawn[:, 1 + picked.astype(int)].mean() - drawn[:, 0].mean()), table, np.arange(len(draws), dtype=np.float64)
    )  # fmt: skip


def _ratios(scores: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Of tables (prompt, arm), one per task: mean score of every arm but the first over that of the first, mean over tasks."""
    means = np.stack([table.mean(0) for table in scores])
    return np.asarray((means[:, 1:] / means[:, :1]).mean(0))
