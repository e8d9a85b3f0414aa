"""One model, its heads removed in many ways: what every arm of the experiment is measured by, each number computed once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from staterank_utils.budget import in_words, weight_bytes
from staterank_utils.evaluation import Task, answer_nats, draw_instances, evaluate, needle_task, text_nats
from staterank_utils.layouts import state_size
from staterank_utils.pruning import prune_heads
from staterank_utils.selection import (
    PAPER_SHARE,
    Measure,
    extreme_heads,
    head_counts,
    measure_heads,
    random_heads,
)
from staterank_utils.strata import Estimate, bootstrap, is_high, mean_and_parts
from staterank_utils.surgery import (
    Head,
    ablate_heads,
    ablate_softmax_heads,
    all_heads,
    best_rank,
    forward_with_edits,
    mean_outputs,
    rotated,
    softmax_heads,
)
from staterank_utils.tasks import domain_prompts

CALIBRATION_DOMAINS = ("code", "arithmetic")  # evaluation prompts are technical prose and other stories
RANK = "effective rank"
MEASURES = (RANK, "nuclear norm", "log-decay", "write strength")  # of `measure_heads`
LOW, HIGH = False, True  # ends of a measure, for `arm`
MEAN = "mean over tasks"  # beside the tasks themselves, in what a removal adds to the loss

Damage = dict[str, Estimate]  # added loss on right answers, nats a token: MEAN first, then each task that counts


class Ablation:
    """The measurements of an ablation experiment on one model.

    Heads are ordered by measures on calibration prompts (held-out code and arithmetic stories of another seed), which share
    no text with the prompts that scores are taken on; windows of code for `perplexities` may overlap with them.

    Args:
        model, tokenizer: from `load_model` and `load_tokenizer`.
        tasks: name -> task.
        n_prompts: prompts a task, for scores.
        n_graded: prompts a task, for losses.
        seed: of prompts and draws.
        batch_size: prompts answered side by side.
        calibration: number of calibration prompts a domain and their tokens.

    Attributes:
        heads: every linear-attention head.
        d: largest possible rank of a state.
        counts: numbers of heads at the registered shares.

    Example:
        >>> from staterank_utils import load_model, load_tokenizer
        >>> from staterank_utils.evaluation import recall_task
        >>> hybrid = load_model("hybrid"), load_tokenizer("hybrid")
        >>> study = Ablation(*hybrid, {"recall": recall_task()}, n_prompts=2, n_graded=1, calibration=(1, 64))
        >>> study.score("recall").tolist(), study.counts
        ([1.0, 1.0], [1, 2, 5, 6, 12, 19, 24])
        >>> study.budget.partition("; an arm")[0]
        'weights 35.9 MB; calibration 2 x 64 tokens'
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        tasks: Mapping[str, Task],
        *,
        n_prompts: int,
        n_graded: int,
        seed: int = 0,
        batch_size: int = 16,
        calibration: tuple[int, int] = (4, 512),
    ):
        self.model, self.tokenizer, self.tasks = model, tokenizer, dict(tasks)
        self.n_prompts, self.n_graded, self.seed, self.batch_size = n_prompts, n_graded, seed, batch_size
        self.calibration = calibration
        self.heads = all_heads(model)
        self.counts = head_counts(len(self.heads))
        self.d = state_size(model)
        self._scores: dict[tuple[str, tuple[Head, ...], str], NDArray[np.float64]] = {}
        self._intact_losses: dict[int, list[NDArray[np.float64]]] = {}
        self._last_pruned: tuple[tuple[Head, ...], PreTrainedModel] | None = None

    def prompts(self, domain: str, n_prompts: int, n_tokens: int, *, seed: int = 0) -> Tensor:
        """Prompts of a domain; `seed` is added to the experiment's own."""
        return domain_prompts(domain, self.tokenizer, n_prompts=n_prompts, n_tokens=n_tokens, seed=self.seed + seed)

    @property
    def budget(self) -> str:
        """What it takes: the model's weights, and the tokens of calibration and of an arm, which is the scores without some heads."""
        n_domains, (n_prompts, n_tokens) = len(CALIBRATION_DOMAINS), self.calibration
        drawn = [
            instance
            for task in self.tasks.values()
            for instance in draw_instances(task, self.tokenizer, n_instances=self.n_prompts, seed=self.seed)
        ]
        read, written = (sum(len(side) for side in sides) for sides in zip(*drawn, strict=True))
        return (
            f"weights {in_words(weight_bytes(self.model))}; calibration {n_domains * n_prompts} x {n_tokens:,} tokens; "
            f"an arm: {len(drawn):,} prompts, {read:,} tokens read, {written:,} written"
        )

    # ---------------------------------------------------------------- heads

    @cached_property
    def calibration_prompts(self) -> Tensor:
        """What heads and channels are chosen on."""
        return torch.cat([self.prompts(domain, *self.calibration, seed=1000) for domain in CALIBRATION_DOMAINS])

    @cached_property
    def measures(self) -> dict[str, Measure]:
        """Effective rank, nuclear norm, log-decay and write strength of every head on the calibration prompts."""
        return measure_heads(self.model, self.calibration_prompts)

    def values(self, measure: str) -> NDArray[np.float64]:
        """A measure as a vector over `heads`."""
        return np.array([self.measures[measure][head] for head in self.heads])

    @property
    def high(self) -> NDArray[np.bool_]:
        """The label of every head: rank at least half of d on the calibration prompts."""
        return is_high(self.values(RANK), self.d)

    def arm(self, end: bool, n: int, *, measure: str = RANK, per_layer: bool = False) -> list[Head]:
        """The `n` heads at one end (`LOW` or `HIGH`) of a measure; with `per_layer`, `n` of every layer."""
        return extreme_heads(self.measures[measure], n, largest=end, per_layer=per_layer)

    def count(self, share: float) -> int:
        """A share of the heads as a number."""
        return head_counts(len(self.heads), [share])[0]

    # ---------------------------------------------------------------- scores

    def score(self, task: str, heads: Iterable[Head] = (), *, kind: str = "zero") -> NDArray[np.float64]:
        """Scores of a task without some heads, one a prompt; remembered.

        Args:
            task: name of one.
            heads: that are taken out.
            kind: of `ablate_heads`, or "removed" to cut them out with `prune_heads`.
        """
        key = (task, tuple(sorted(heads)), kind)
        if key not in self._scores:
            if kind == "removed":
                self._scores[key] = self._evaluate(task, self.pruned(key[1]))
            else:
                with ablate_heads(self.model, key[1], kind=kind, means=self._means if kind == "mean" else None):
                    self._scores[key] = self._evaluate(task, self.model)
        return self._scores[key]

    def scores_of(self, model: PreTrainedModel) -> dict[str, NDArray[np.float64]]:
        """Scores of another model, made from this one, on the tasks that count."""
        return {task: self._evaluate(task, model) for task in self.mastered}

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

    @cached_property
    def _means(self) -> dict[int, Tensor]:
        return mean_outputs(self.model, self.prompts("code", *self.calibration, seed=1001))

    @property
    def mastered(self) -> list[str]:
        """The tasks of which the intact model masters at least half: those that count."""
        return [task for task in self.tasks if self.score(task).mean() >= 0.5]

    def doses(self, task: str, end: bool, *, measure: str = RANK) -> list[NDArray[np.float64]]:
        """Scores with 0 heads and each of `counts` removed from one end of a measure."""
        return [self.score(task, self.arm(end, n, measure=measure)) for n in (0, *self.counts)]

    def judged_count(self, task: str) -> int:
        """Number of heads at which the two ends are compared (claim C4).

        The paper's share, 38.9 %, where one of the ends keeps half of the intact score there; else the largest registered
        share below it at which one does; else the smallest.
        """
        best = {n: max(float(self.score(task, self.arm(end, n)).mean()) for end in (LOW, HIGH)) for n in self.counts}
        return judged_dose(best, float(self.score(task).mean()), self.count(PAPER_SHARE))

    def breaking_count(self, task: Task, *, n_prompts: int) -> int:
        """The smallest registered number of heads at which one of the two ends loses half of the intact score; else the largest.

        Args:
            task: any, not only one of `tasks`.
            n_prompts: on which that is decided.
        """

        def mean(heads: Iterable[Head]) -> float:
            return float(self.scores_on([task], heads, n_prompts=n_prompts).mean())

        half = mean([]) / 2
        broken = (n for n in self.counts if min(mean(self.arm(end, n)) for end in (LOW, HIGH)) < half)
        return next(broken, self.counts[-1])

    def drawn(self, n: int, draw: int, *, per_layer: bool = False) -> list[Head]:
        """The `n` random heads of a draw."""
        return random_heads(self.heads, n, seed=1000 * self.seed + draw, per_layer=per_layer)

    def draws(self, task: str, n: int, n_draws: int, *, per_layer: bool = False) -> NDArray[np.float64]:
        """Scores without `n` random heads, (draw, prompt)."""
        chosen = [self.drawn(n, draw, per_layer=per_layer) for draw in range(n_draws)]
        bar = tqdm(chosen, desc=f"random heads, {task}", leave=False)
        return np.stack([self.score(task, heads) for heads in bar])

    def arms(self, task: str, n: int) -> dict[str, NDArray[np.float64]]:
        """Scores of both ends of every measure, and of the two ends of rank with mean outputs in the place of zeros."""
        ends = {"lowest": LOW, "highest": HIGH}
        by_measure = {
            f"{word} {measure}": self.score(task, self.arm(end, n, measure=measure))
            for measure in self.measures
            for word, end in ends.items()
        }
        with_means = {
            f"{word} rank, mean output": self.score(task, self.arm(end, n), kind="mean") for word, end in ends.items()
        }
        return by_measure | with_means

    def redundancy(self) -> Estimate:
        """`retained` without high-rank heads, at the paper's share (C4a)."""
        return self.retained(self.arm(HIGH, self.count(PAPER_SHARE)))

    def retained(self, heads: Iterable[Head], *, kind: str = "zero") -> Estimate:
        """Score without some heads over the intact score, mean over the tasks that count."""
        chosen = list(heads)
        return self.over_intact({task: self.score(task, chosen, kind=kind) for task in self.mastered})

    def over_intact(self, scores: Mapping[str, NDArray[np.float64]]) -> Estimate:
        """Scores on the tasks that count, over those of the intact model on the same prompts, mean over tasks."""
        tables = [np.stack([self.score(task), scores[task]], 1) for task in self.mastered]
        return bootstrap(lambda *drawn: float(_ratios(drawn)[0]), *tables)

    def against_draws(self, heads: Iterable[Head], n_draws: int, *, kind: str = "zero") -> dict[str, Estimate]:
        """`retained`, and how far it lies over the best and over the mean of draws of as many random heads (C5).

        The intervals of the last two are over prompts and draws.
        """
        chosen = list(heads)
        scores = [
            np.stack(
                [self.score(task), self.score(task, chosen, kind=kind), *self.draws(task, len(chosen), n_draws)], 1
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
            "score / intact": self.retained(chosen, kind=kind),
            "over the best random draw": over(np.max),
            "over the mean random draw": over(np.mean),
        }

    def depth_table(
        self, heads: Iterable[Head], depths: Sequence[float], lengths: Sequence[int], *, n_prompts: int
    ) -> NDArray[np.float64]:
        """Whether single needles are found, 0 or 1, (depth, length of the prompt, prompt)."""
        tasks = [needle_task(1, n, depth) for depth in depths for n in lengths]
        return self.scores_on(tasks, heads, n_prompts=n_prompts).reshape(len(depths), len(lengths), n_prompts)

    def scores_on(self, tasks: Sequence[Task], heads: Iterable[Head], *, n_prompts: int) -> NDArray[np.float64]:
        """Scores (task, prompt) on other tasks, such as one of different lengths, without some heads."""
        with ablate_heads(self.model, list(heads)):
            scores = [
                evaluate(task, self.model, self.tokenizer, n_instances=n_prompts, seed=self.seed, batch_size=self.batch_size)
                for task in tasks
            ]  # fmt: skip
        return np.stack(scores)

    # ---------------------------------------------------------------- losses

    def losses(self, read: Callable[[Tensor], Tensor] | None = None, *, seed: int = 1) -> list[NDArray[np.float64]]:
        """Losses on the tokens of right answers, nats a token: for each task that counts, one a prompt.

        Args:
            read: in the place of the model's own forward, as in `answer_nats`.
            seed: of the prompts, added to the experiment's own.
        """
        return [
            answer_nats(
                self.tasks[task], self.model, self.tokenizer,
                n_instances=self.n_graded, seed=self.seed + seed, batch_size=self.batch_size, read=read,
            )
            for task in self.mastered
        ]  # fmt: skip

    def added_loss(
        self, within: AbstractContextManager[None], read: Callable[[Tensor], Tensor] | None = None, *, seed: int = 1
    ) -> Damage:
        """What `losses` gain inside a block, such as that of `ablate_heads`: by task, mean over prompts, and under `MEAN` over tasks.

        The intervals are over prompts, each against itself with all heads. NaN where no task counts.
        """
        if seed not in self._intact_losses:
            self._intact_losses[seed] = self.losses(seed=seed)
        with within:
            groups = zip(self.mastered, self.losses(read, seed=seed), self._intact_losses[seed], strict=True)
        return mean_and_parts({task: without - intact for task, without, intact in groups}, together=MEAN)

    def sweep(self, *, seed: int = 1) -> dict[Head, Damage]:
        """Added loss of each head removed alone; with another seed, on other prompts of the same tasks."""
        bar = tqdm(self.heads, desc="single heads", leave=False)
        return {head: self.added_loss(ablate_heads(self.model, [head]), seed=seed) for head in bar}

    def by_part(self) -> dict[str, dict[Head | int, Damage]]:
        """Added loss of whole layers removed, "linear" and "softmax", and of single softmax heads."""
        parts: dict[str, dict[Head | int, Damage]] = {"linear": {}, "softmax": {}, "softmax heads": {}}
        softmax = softmax_heads(self.model)
        for kind, heads, ablate in (("linear", self.heads, ablate_heads), ("softmax", softmax, ablate_softmax_heads)):
            for layer in sorted({layer for layer, _ in heads}):
                group = [head for head in heads if head[0] == layer]
                parts[kind][layer] = self.added_loss(ablate(self.model, group))
        for head in softmax:
            parts["softmax heads"][head] = self.added_loss(ablate_softmax_heads(self.model, [head]))
        return parts

    def rank_used(self, wanted: bool, ranks: Sequence[int], *, every: int) -> dict[str, Damage]:
        """Added loss when the states of all high (or all low) heads are cut to a rank, and when they are rotated.

        Args:
            wanted: `HIGH` or `LOW` heads, by `high`.
            ranks: that are kept; those from d on are left out.
            every: tokens between two edits.

        Returns:
            "rank 4" and so on, then "rotated" -> added loss; 0 throughout where there is no head of that label.
        """
        heads = [head for head, label in zip(self.heads, self.high, strict=True) if label == wanted]
        edits = {f"rank {rank}": partial(best_rank, rank=rank) for rank in ranks if rank < self.d}
        edits["rotated"] = partial(rotated, seed=self.seed)
        added = {}
        for label, edit in tqdm(edits.items(), desc=f"edits every {every} tokens", leave=False):
            read = partial(forward_with_edits, self.model, heads=heads, edit=edit, every=every)
            added[label] = self.added_loss(nullcontext(), read)
        return added

    def perplexities(self, heads: Sequence[Head], domains: Sequence[str], *, n_tokens: int) -> list[Estimate]:
        """Perplexity of each domain without some heads, with intervals over prompts."""
        with ablate_heads(self.model, heads) if heads else nullcontext():
            texts = [self.prompts(domain, self.n_graded, n_tokens, seed=2) for domain in domains]
            return [bootstrap(perplexity, text_nats(self.model, text)) for text in texts]


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


def perplexity(nats: NDArray[np.float64]) -> float:
    """Perplexity of texts of equal length.

    Args:
        nats: mean loss of each, nats a token, as `text_nats` gives it.

    Example:
        >>> perplexity(np.log([2.0, 8.0]))
        4.0
    """
    return float(np.exp(nats.mean()))


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
    """Of tables (prompt, arm), one a task: mean score of every arm but the first over that of the first, mean over tasks."""
    means = np.stack([table.mean(0) for table in scores])
    return np.asarray((means[:, 1:] / means[:, :1]).mean(0))
