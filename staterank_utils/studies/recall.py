"""What is copied from context, without some heads and with half-lives capped; and what caps do to ranks and losses."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedModel

from staterank_utils import claims
from staterank_utils.architectures import state_size
from staterank_utils.evaluation import TASKS, answer_nats, evaluate, token_nats
from staterank_utils.memory import cap_half_life
from staterank_utils.strata import Estimate, bootstrap, cohen_kappa, is_high
from staterank_utils.studies.groups import Groups, Row, trace_heads
from staterank_utils.studies.removal import HIGH, LAYERS, LOW, POSITION_DOSES, PROTECTED, RANDOM, Removal
from staterank_utils.studies.texts import LOSS_TEXTS, Texts, over_texts
from staterank_utils.surgery import Head, ablate_heads
from staterank_utils.tasks import domain_prompts

GAPS = (16, 64, 256, 512, 1024)  # tokens of a copy, and so the distance that is looked back
CAPS = (128, 64, 32, 16, 8)  # tokens
INTACT = "intact"
COPY_GAP = claims.SECOND["C6"].numbers["copy"]  # tokens of the copy that claims look at


@dataclass(frozen=True)
class Recall:
    """Induction gains, and what caps on half-lives do.

    Attributes:
        gaps: lengths of a copy.
        gains: label (intact, an arm of `Removal`, or "cap 16") -> (gap, window): loss on the first copy minus on the second, nats per token.
        cap_nats: cap -> losses on held-out text, (window,).
        cap_rank: cap, or "intact" -> ranks on prose, (prompt, head).
        scores: task -> score of each instance, of the intact model.
        task_nats: label -> loss on right answers, (task, instance).
        d: largest possible rank.

    Example:
        >>> recall = Recall((512,), {"intact": np.full((1, 2), 2.0), "cap 16": np.full((1, 2), 0.5)}, {}, {}, {}, {}, 64)
        >>> recall.taken(16).point
        0.75
    """

    gaps: tuple[int, ...]
    gains: Mapping[str, NDArray[np.float64]]
    cap_nats: Mapping[str, NDArray[np.float64]]
    cap_rank: Mapping[str, NDArray[np.float64]]
    scores: Mapping[str, NDArray[np.float64]]
    task_nats: Mapping[str, NDArray[np.float64]]
    d: int

    def gain(self, label: str = INTACT, gap: int = COPY_GAP) -> Estimate:
        """Mean gain at a gap with its interval over windows, drawn within each text.

        Raises:
            ValueError: the gap was not measured.
        """
        return over_texts(self._at(label, gap))

    def by_distance(self) -> dict[str, str]:
        """Gains of the intact model by the length of the passage: quantity -> number, in words."""
        return {f"gain over {gap:,} tokens": f"{self.gain(gap=gap):.2f}" for gap in self.gaps}

    def taken(self, cap: int = claims.SECOND["C6"].numbers["cap"], gap: int = COPY_GAP) -> Estimate:
        """Share of the intact gain that a cap takes, with its interval over windows (C6)."""
        pair = np.stack([self._at(f"cap {cap}", gap), self._at(INTACT, gap)], 1)
        return bootstrap(
            lambda *means: float(1 - np.divide(*np.mean(means, 0))), *np.split(pair, len(LOSS_TEXTS)), of_means=True
        )

    def _at(self, label: str, gap: int) -> NDArray[np.float64]:
        """Gains at a gap, (window,)."""
        return self.gains[label][self.gaps.index(gap)]

    def kappa(self, cap: int = claims.SECOND["C6"].numbers["cap"]) -> float:
        """Agreement of the low and high labels before and under a cap (C6)."""
        before, inside = (is_high(self.cap_rank[label].mean(0), self.d) for label in (INTACT, f"cap {cap}"))
        return cohen_kappa(before, inside)

    def removal_labels(self) -> list[str]:
        """The arms of removal whose gains were measured."""
        return [label for label in self.gains if label.endswith(LAYERS)]


def pair_claims(models: Mapping[str, tuple[Recall, str]]) -> list[Row]:
    """Apply the rule of C6 to a hybrid and a pure model, and say of any other choice of models that it cannot be applied.

    Args:
        models: name -> what was measured, and the seed of its training; the hybrid first.

    Example:
        >>> pair_claims({"tiny": (Recall((512,), {}, {}, {}, {}, {}, 64), "?")})[0]["note"]
        ': it takes two models, a hybrid first and then a pure one of the same data'
    """
    names = " and ".join(models)
    if len(models) != 2:
        why = "it takes two models, a hybrid first and then a pure one of the same data"
        return [claims.not_testable("C6", names, why=why)]
    (hybrid, seed), (pure, _) = models.values()
    return [
        claims.judge_recall(
            names,
            {seed: (hybrid.taken(), pure.taken())},
            {seed: (hybrid.kappa(), pure.kappa())},
            {seed: (hybrid.gain().point, pure.gain().point)},
        )
    ]


def induction_gains(
    model: PreTrainedModel, texts: Texts, gaps: Sequence[int], *, batch_size: int | None = None
) -> NDArray[np.float64]:
    """Loss on the first minus on the second of two copies of held-out text, (gap, window), nats per token.

    The first token of a copy is left out of both, since nothing announces the second copy.

    Args:
        model: from `load_model`.
        texts: from `draw_texts`.
        gaps: lengths of a copy, at most that of `texts.copies`.
        batch_size: as in `token_nats`.

    Raises:
        ValueError: a gap that is longer than the copies that were drawn, or under 2.

    Example:
        >>> from staterank_utils import load_model, load_tokenizer
        >>> from staterank_utils.studies.texts import draw_texts
        >>> texts = draw_texts(load_tokenizer("hybrid"), n_windows=1, window=32, n_copies=2, copy=32, n_calibration=1)
        >>> induction_gains(load_model("hybrid"), texts, [8, 32]).shape
        (2, 4)
    """
    longest = texts.copies.shape[1]
    if not all(2 <= gap <= longest for gap in gaps):
        raise ValueError(f"gaps lie in 2..{longest}, the length of the copies that were drawn; got {list(gaps)}")
    rows = []
    for gap in gaps:
        losses = token_nats(model, texts.copies[:, :gap].repeat(1, 2), batch_size=batch_size)
        rows.append(losses[:, : gap - 1].mean(1) - losses[:, gap:].mean(1))
    return np.stack(rows)


def measure_caps(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Texts,
    *,
    caps: Sequence[int] = CAPS,
    gaps: Sequence[int] = GAPS,
    n_prompts: int = 16,
    n_tokens: int = 2048,
    seed: int = 0,
) -> Recall:
    """Measure gains, losses and ranks of the intact model and with half-lives capped.

    Args:
        model, tokenizer: from `load_model` and `load_tokenizer`.
        texts: from `draw_texts`.
        caps: half-lives, in tokens.
        gaps: lengths of a copy.
        n_prompts, n_tokens: of prose, on which ranks are taken; over 128 tokens.
        seed: of the prompts.

    Returns:
        A `Recall` without task scores.

    Raises:
        ValueError: as in `cap_half_life` and `induction_gains`.

    Example:
        >>> from staterank_utils import load_model, load_tokenizer
        >>> from staterank_utils.studies.texts import draw_texts
        >>> model, tokenizer = load_model("hybrid"), load_tokenizer("hybrid")
        >>> texts = draw_texts(tokenizer, n_windows=1, window=32, n_copies=1, copy=32, n_calibration=1)
        >>> found = measure_caps(model, tokenizer, texts, caps=[16], gaps=[32], n_prompts=1, n_tokens=160)
        >>> [*found.gains], [*found.cap_rank], found.cap_nats["cap 16"].shape
        (['intact', 'cap 16'], ['intact', 'cap 16'], (2,))
    """
    prompts = domain_prompts("prose", tokenizer, n_prompts=n_prompts, n_tokens=n_tokens, seed=seed)
    gains, cap_nats, cap_rank = {}, {}, {}
    for label, block in tqdm(_capped(model, caps).items(), desc="caps", leave=False):
        with block():
            gains[label] = induction_gains(model, texts, gaps)
            cap_nats[label] = token_nats(model, texts.windows).mean(1)
            cap_rank[label] = trace_heads(model, prompts, positions=[n_tokens // 2, n_tokens]).rank[-1]
    return Recall(tuple(gaps), gains, cap_nats, cap_rank, {}, {}, state_size(model))


def _capped(model: PreTrainedModel, caps: Sequence[int]) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    """Label -> a block, first one that changes nothing."""
    return {INTACT: nullcontext} | {f"cap {cap}": partial(cap_half_life, model, cap) for cap in caps}


def recall_arms(removal: Removal) -> dict[str, list[Head]]:
    """The arms whose recall is measured: those at `POSITION_DOSES`, of random orders the first four.

    Args:
        removal: of a model.

    Returns:
        Label -> the heads that are removed.

    Example:
        >>> from staterank_utils.studies.ladder import load_measured
        >>> len(recall_arms(load_measured("hybrid-text-0")[0].removal)["low rank, 25.0%, layer-matched"])
        36
    """
    return {
        arm.label: [removal.heads[index] for index in arm.heads]
        for arm in removal.arms
        if arm.share in map(float, POSITION_DOSES) and (arm.order != RANDOM or arm.draw < 4)
    }


def measure_recall(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Texts,
    removal: Removal,
    groups: Groups,
    *,
    gaps: Sequence[int] = GAPS,
    n_scores: int = 100,
    n_graded: int = 32,
    n_prompts: int = 16,
    seed: int = 0,
    tasks: Mapping[str, Any] = TASKS,
) -> Recall:
    """Measure gains and task losses of the named arms and under every cap.

    Args:
        model, tokenizer: from `load_model` and `load_tokenizer`.
        texts, removal, groups: as drawn and measured for this model.
        gaps: lengths of a copy.
        n_scores, n_graded: instances per task, generated by the intact model, and graded by their loss.
        n_prompts: of prose, on which ranks are taken under each cap.
        seed: of the instances and prompts.
        tasks: name -> task.

    Example:
        >>> from staterank_utils.studies.ladder import load_measured
        >>> load_measured("hybrid-text-0")[0].recall.gains["intact"].shape  # of 5 gaps and 8 windows of each text
        (5, 16)
    """
    arms = recall_arms(removal)
    capped = measure_caps(model, tokenizer, texts, gaps=gaps, n_prompts=n_prompts, n_tokens=groups.n_tokens, seed=seed)
    gains, task_nats = dict(capped.gains), {}
    blocks = _capped(model, CAPS)
    blocks |= {label: partial(ablate_heads, model, heads) for label, heads in arms.items()}
    for label, block in tqdm(blocks.items(), desc="recall", leave=False):
        with block():
            if label not in gains and label.startswith((LOW, HIGH, RANDOM)):
                gains[label] = induction_gains(model, texts, gaps)
            if not label.startswith(RANDOM):
                task_nats[label] = np.stack(
                    [
                        answer_nats(task, model, tokenizer, n_instances=n_graded, seed=seed + 1, batch_size=32)
                        for task in tasks.values()
                    ]
                )
    scores = {
        name: evaluate(task, model, tokenizer, n_instances=n_scores, seed=seed, batch_size=128)
        for name, task in tasks.items()
    }
    return replace(capped, gains=gains, scores=scores, task_nats=task_nats)


# ---------------------------------------------------------------- without heads


@dataclass(frozen=True)
class RecallWithout:
    """What a model still recalls without a part of its heads, layer by layer the same number; nats per token.

    Attributes:
        name: of the model.
        shares: of the heads of every layer that were removed, increasing.
        intact: gain with all heads.
        gain: "low rank", "high rank" -> gain without them, one per share.
        random: gains without as many random heads, (share, draw).
        added: "low rank", "high rank", "random" -> added nats on text that is read once, one per share.

    Example:
        >>> from staterank_utils.studies.ladder import load_measured
        >>> measured, _ = load_measured("hybrid-text-0")
        >>> found = without_heads("hybrid", measured.recall, measured.removal)
        >>> found.shares, bool(found.gain["low rank"][0] < found.random[0].min())
        ((0.125, 0.25, 0.375), True)
    """

    name: str
    shares: tuple[float, ...]
    intact: float
    gain: Mapping[str, NDArray[np.float64]]
    random: NDArray[np.float64]
    added: Mapping[str, NDArray[np.float64]]

    @property
    def recalls(self) -> bool:
        """Whether there is recall to lose: the intact gain is at least the registered one of C6."""
        return bool(self.intact >= claims.SECOND["C6"].numbers["gain"])


def without_heads(name: str, recall: Recall, removal: Removal) -> RecallWithout:
    """What a model recalls without some heads of every layer, of those shares that were measured.

    Args:
        name: of the model.
        recall: with the gains of the arms of `removal`, from `measure_recall` or `repeated.repeat_recall`.
        removal: of the same model.

    Example:
        >>> from staterank_utils.studies.ladder import load_measured
        >>> measured, _ = load_measured("hybrid-text-1")
        >>> round(without_heads("hybrid", measured.recall, measured.removal).intact, 1)
        0.6
    """
    shares = tuple(share for share in map(float, POSITION_DOSES) if f"{LOW}, {share:.1%}, {LAYERS}" in recall.gains)
    n_draws = sum(label.startswith(RANDOM) for label in recall.removal_labels()) // len(shares)

    def gains(order: str) -> NDArray[np.float64]:
        return np.array([recall.gain(f"{order}, {share:.1%}, {LAYERS}").point for share in shares])

    added = {order: np.array([removal.added(LAYERS, order, share).mean() for share in shares]) for order in (LOW, HIGH)}
    added[RANDOM] = np.array([removal.draws(LAYERS, share)[:n_draws].mean() for share in shares])
    return RecallWithout(
        name, shares, recall.gain().point, {order: gains(order) for order in (LOW, HIGH)},
        np.stack([gains(f"{RANDOM} {draw}") for draw in range(n_draws)], 1), added,
    )  # fmt: skip


def gains_protected(recall: Recall, removal: Removal, *, share: float = 0.25) -> dict[str, str]:
    """Gains without heads of layers other than layer 0, and what that costs on text read once: quantity -> number, in words.

    Args:
        recall: with the gains of those arms.
        removal: with their losses.
        share: of all heads.

    Example:
        >>> from staterank_utils.studies.ladder import load_measured
        >>> measured, _ = load_measured("hybrid-text-0")
        >>> gains_protected(measured.recall, measured.removal)["gain without the lowest ranks"]
        '0.02'
    """
    low, high = (recall.gain(f"{order}, {share:.1%}, {PROTECTED}").point for order in (LOW, HIGH))
    labels = [
        label for label in recall.gains if label.startswith(RANDOM) and label.endswith(f", {share:.1%}, {PROTECTED}")
    ]
    random = [recall.gain(label).point for label in labels]
    return {
        "gain without the lowest ranks": f"{low:.2f}",
        "gain without the highest": f"{high:.2f}",
        f"gain without random heads, {len(random)} draws": f"{min(random):.2f} to {max(random):.2f}",
        "added nats on text read once: lowest, highest, random": ", ".join(
            f"{removal.near(PROTECTED, order, share).point:.2f}" for order in (LOW, HIGH, RANDOM)
        ),
    }


def recall_in_words(name: str, found: RecallWithout, *, share: float = 0.25) -> str:
    """The heads that the recall of a model needs, in a sentence.

    Args:
        name: as the sentence calls it.
        found: of the model.
        share: of the heads of every layer.

    Example:
        >>> from staterank_utils.studies.ladder import load_measured
        >>> measured, _ = load_measured("pure-text-0")
        >>> print(recall_in_words("pure", without_heads("pure", measured.recall, measured.removal)))
        pure hardly recalls over this distance: its gain from reading 512 tokens twice is -0.01 nats per token.
    """
    if not found.recalls:
        return f"{name} hardly recalls over this distance: its gain from reading {COPY_GAP} tokens twice is {found.intact:.2f} nats per token."
    at = found.shares.index(share)
    low, high, random = found.gain[LOW][at], found.gain[HIGH][at], found.random[at]
    who = (
        "heads of low rank"
        if low < min(high, random.min())
        else "heads of high rank"
        if high < min(low, random.min())
        else "no group alone"
    )
    return (
        f"{name}'s recall needs {who} (one training, exploratory). Without {share:.0%} of the heads of every layer, its gain from reading {COPY_GAP} tokens twice goes from "
        f"{found.intact:.2f} nats per token to {low:.2f} (lowest ranks), {high:.2f} (highest) or {random.mean():.2f} (random)."
    )
