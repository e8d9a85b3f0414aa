"""Replace recurrent states by small caches of pairs, after LoLA, or put such caches beside them."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from staterank_utils.architectures import linear_layers, state_size
from staterank_utils.evaluation import TASKS, answer_nats, token_nats
from staterank_utils.lola import cache_pairs, pairs_in_state, recall_errors
from staterank_utils.models import CHECKPOINTS, EMBEDDED
from staterank_utils.results import STORED, plain, weights_hash, write_json
from staterank_utils.selection import (
    PAPER_SHARE,
    head_pairs,
    measure_heads,
    random_heads,
    saturation_scores,
    select_heads,
)
from staterank_utils.strata import GAP, Estimate, bootstrap, spearman, without_minus
from staterank_utils.studies.groups import half_lives_from
from staterank_utils.studies.recall import induction_gains
from staterank_utils.studies.removal import BINS, by_position
from staterank_utils.studies.repeated import CLOSE, Repeated
from staterank_utils.studies.shrinking import CHANNELS, RANK, Shrinking, ordered_channels, smaller_models
from staterank_utils.studies.texts import LOSS_TEXTS, Texts, over_texts
from staterank_utils.surgery import Head, ablate_heads, all_heads, mean_outputs

FILE = STORED / "caching.json"
REMOVED, MEANS, BESIDE, RANDOM = "no cache", "their mean outputs", "beside the states", "random heads"
# Where there is no state, the error of a pair is the size of its value.
RECENT, LARGEST, WORST, MIXED = "the last pairs", "the largest values", "the pairs recalled worst", "half of each"
SPLITS = {RECENT: 1.0, LARGEST: 0.0, MIXED: 0.5}  # share of the cache that is a window
BESIDES = {RECENT: 1.0, WORST: 0.0, MIXED: 0.5}
FRACTIONS = (1 / 2, 1 / 4, 1 / 8)  # of the bytes that a state took
WHERE = ("all", *BINS)  # positions of the token that is predicted


@dataclass(frozen=True)
class Outcome:
    """What one model, or one with a change, scores.

    Attributes:
        nats: loss per token, (window, positions of `WHERE`), books first.
        gain: loss on the first minus on the second of two copies, (gap, passage), nats per token.
        tasks: task -> loss on the right answer, (instance,), nats per token.

    Example:
        >>> list(Outcome.__dataclass_fields__)
        ['nats', 'gain', 'tasks']
    """

    nats: NDArray[np.float64]
    gain: NDArray[np.float64]
    tasks: Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Caching:
    """What caches of pairs do to one model.

    Attributes:
        heads: (layer, head) of each index.
        d: largest possible rank.
        pairs: how many pairs take the bytes of a state.
        rank, half_life, error: of each head: effective rank, tokens, and `recall_errors`.
        removed: share -> the heads whose states go, those of the highest rank.
        gaps: lengths of the copies.
        intact: of the whole model.
        outcomes: share -> method -> what it gives. Heads lose their states and get nothing (`REMOVED`), their mean outputs (`MEANS`), or a
            cache (`cached` names it); or they keep them and get a cache (`BESIDE` stands before its name); or the method is another of the
            chapter's. `RANDOM` stands before what is done to as many random heads.

    Example:
        >>> list(Caching.__dataclass_fields__)[:3]
        ['heads', 'd', 'pairs']
    """

    heads: tuple[Head, ...]
    d: int
    pairs: int
    rank: NDArray[np.float64]
    half_life: NDArray[np.float64]
    error: NDArray[np.float64]
    removed: Mapping[float, tuple[Head, ...]]
    gaps: tuple[int, ...]
    intact: Outcome
    outcomes: Mapping[float, Mapping[str, Outcome]]

    def added(self, share: float, method: str, where: str = "all") -> Estimate:
        """Added nats per token, with its interval over windows.

        Args:
            share: of the heads.
            method: one of its `outcomes`.
            where: one of `WHERE`.
        """
        column = WHERE.index(where)
        return over_texts(self.outcomes[share][method].nats[:, column] - self.intact.nats[:, column])

    def freed(self, share: float, method: str) -> float:
        """Part of the bytes of all states that a method frees; under 0 where it takes more.

        Args:
            share: of the heads.
            method: one of its `outcomes`.
        """
        if method.startswith(BESIDE):
            return -share / 2
        parts = {cached(split, part): part for split in SPLITS for part in FRACTIONS}
        return share * (1 - parts.get(method.removeprefix(f"{RANDOM}: "), 0.0))

    def curve(self, share: float, split: str) -> dict[float, Estimate]:
        """Added nats by the part of a state's bytes that a cache takes; 0 is no cache.

        Args:
            share: of the heads.
            split: one of `SPLITS` that was measured.
        """
        parts = [part for part in sorted(FRACTIONS) if cached(split, part) in self.outcomes[share]]
        return {0.0: self.added(share, REMOVED)} | {part: self.added(share, cached(split, part)) for part in parts}

    def gain(self, share: float, method: str) -> Estimate:
        """Recall of text that is said twice, nats per token, mean over gaps."""
        return over_texts(self.outcomes[share][method].gain.mean(0))

    def answers(self, share: float, method: str, task: str) -> Estimate:
        """Added nats per token of the right answers of a task."""
        added = self.outcomes[share][method].tasks[task] - self.intact.tasks[task]
        return bootstrap(float, added, of_means=True)


def cached(split: str, fraction: float) -> str:
    """The name of a method: how a cache is split, and what part of a state's bytes it takes.

    Example:
        >>> cached(RECENT, 1 / 4)
        'the last pairs, 1/4'
    """
    return f"{split}, 1/{1 / fraction:g}"


def measure_caching(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Texts,
    prompts: Int[Tensor, "prompt token"],
    *,
    shares: Sequence[float] = (0.25, PAPER_SHARE),
    fractions: Sequence[float] = FRACTIONS,
    splits: Sequence[str] = tuple(SPLITS),
    others: bool = True,
    gaps: Sequence[int] = (64, 512),
    tasks: Sequence[str] = ("recall", "needle"),
    n_answers: int = 32,
    removed: Mapping[float, Sequence[Head]] | None = None,
) -> Caching:
    """Take the states of the highest-rank heads, put caches of pairs in their place, and measure what that leaves.

    Source: LoLA (arXiv:2505.23666) as `staterank_utils.lola` changes it for a delta rule. Heads are taken by rank alone (Eq. 14 with
    alpha 1), over the model.

    Args:
        model, tokenizer: for which `lola.why_not` is None.
        texts: on which losses and recall are taken.
        prompts: of calibration, by which heads are ordered.
        shares: of the heads.
        fractions: of the bytes of a state that a cache takes.
        splits: of the cache into a window and the pairs that are recalled worst.
        others: also mean outputs and the other methods of the chapter; and at the first share caches beside whole states, of half their bytes, and
            random heads.
        gaps: lengths of a copy, for recall; none: it is not measured.
        tasks: whose right answers are scored.
        n_answers: per task.
        removed: share -> heads that go, in the place of those by rank.

    Raises:
        ValueError: as in `cache_pairs`, `select_heads` and `induction_gains`.

    Example:
        >>> from staterank_utils import domain_prompts, load_model, load_tokenizer
        >>> from staterank_utils.studies.texts import draw_texts
        >>> model, tokenizer = load_model("hybrid"), load_tokenizer("hybrid")
        >>> texts = draw_texts(tokenizer, n_windows=1, window=64, n_copies=1, copy=32, n_calibration=1)
        >>> prompts = domain_prompts("code", tokenizer, n_prompts=1, n_tokens=64, seed=0)
        >>> few = {"shares": [0.25], "fractions": [1 / 8], "splits": [RECENT], "others": False, "gaps": [16], "tasks": ["recall"]}
        >>> found = measure_caching(model, tokenizer, texts, prompts, **few, n_answers=2)
        >>> found.pairs, list(found.outcomes[0.25]), len(found.removed[0.25])
        (32, ['no cache', 'the last pairs, 1/8'], 36)
    """
    heads, d, layer = tuple(all_heads(model)), state_size(model), linear_layers(model)[0]
    measures = measure_heads(model, prompts)
    rank, norm, decay = (measures[name] for name in ("effective rank", "nuclear norm", "log-decay"))

    highest = saturation_scores(rank, norm, d=d, alpha=1.0)
    gone = {
        share: tuple((removed or {}).get(share) or head_pairs(select_heads(highest, share=share))) for share in shares
    }
    smaller = smaller_models(model, rank, norm, ordered_channels(model, prompts)) if others else {}
    smaller.pop(RANK, None)  # which is `REMOVED`
    means = mean_outputs(model, prompts) if others else {}

    def outcome(of: PreTrainedModel) -> Outcome:
        losses = token_nats(of, texts.windows, batch_size=16)
        scored = {task: answer_nats(TASKS[task], of, tokenizer, n_instances=n_answers) for task in tasks}
        gain = induction_gains(of, texts, gaps, batch_size=16) if gaps else np.empty((0, len(texts.copies)))
        return Outcome(np.column_stack([losses.mean(1), by_position(losses)]), gain, scored)

    def cache(
        of: Sequence[Head], n_pairs: int, window: float, *, stateful: bool = False
    ) -> AbstractContextManager[None]:
        recent = round(n_pairs * window)
        return cache_pairs(model, of, window=recent, sparse=n_pairs - recent, stateful=stateful)

    sizes = {part: pairs_in_state(layer, part) for part in fractions}
    outcomes: dict[float, dict[str, Outcome]] = {}
    for share in tqdm(shares, desc="shares", leave=False):
        of = gone[share]
        blocks: dict[str, Callable[[], AbstractContextManager[None]]] = {REMOVED: partial(ablate_heads, model, of)}
        blocks |= {
            cached(split, part): partial(cache, of, sizes[part], SPLITS[split]) for part in sizes for split in splits
        }
        if others:
            blocks[MEANS] = partial(ablate_heads, model, of, kind="mean", means=means)
        if others and share == shares[0]:
            half, drawn = pairs_in_state(layer, 1 / 2), random_heads(heads, len(of), seed=0)
            blocks |= {
                f"{BESIDE}: {split}": partial(cache, of, half, part, stateful=True) for split, part in BESIDES.items()
            }
            blocks[f"{RANDOM}: {REMOVED}"] = partial(ablate_heads, model, drawn)
            blocks |= {f"{RANDOM}: {cached(RECENT, part)}": partial(cache, drawn, n, 1.0) for part, n in sizes.items()}
        found = outcomes[share] = {}
        for method, block in tqdm(blocks.items(), desc="caches", leave=False):
            with block():
                found[method] = outcome(model)
        for method, made in smaller.items():
            found[method] = outcome(made(share))
    intact = outcome(model)
    half_life = half_lives_from(np.array([decay[head] for head in heads]))
    error = recall_errors(model, prompts, n_pairs=d).numpy().astype(np.float64)
    return Caching(
        heads, d, pairs_in_state(layer), np.array([rank[head] for head in heads]), half_life, error, gone, tuple(gaps), intact, outcomes
    )  # fmt: skip


# ---------------------------------------------------------------- stored


def store_caching(found: Mapping[str, Caching], *, made: Mapping[str, Any], file: Path = FILE) -> None:
    """Write what was measured of some models, whole or not at all.

    Args:
        found: embedded name -> what was measured.
        made: provenance, which names the weights.
        file: a JSON file.

    Example:
        >>> FILE.name
        'caching.json'
    """
    write_json(
        file, {"provenance": dict(made), "models": plain({name: asdict(of) for name, of in found.items()}, digits=5)}
    )


def load_caching(name: str, file: Path = FILE) -> tuple[Caching, dict[str, Any]] | None:
    """What is stored of an embedded model's very weights, and its provenance; None where nothing is.

    Args:
        name: of the model.
        file: from `store_caching`.

    Example:
        >>> load_caching("OWNER/NAME") is None
        True
    """
    if name not in EMBEDDED:
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["provenance"]["checkpoints"].get(name) != weights_hash(CHECKPOINTS / name):
        return None
    of = content["models"][name]
    outcomes = {
        float(share): {method: _outcome(each) for method, each in methods.items()}
        for share, methods in of["outcomes"].items()
    }
    removed = {float(share): tuple(map(tuple, heads)) for share, heads in of["removed"].items()}
    rank, half_life, error = (np.array(of[each]) for each in ("rank", "half_life", "error"))
    heads: Any = tuple(map(tuple, of["heads"]))
    made: dict[str, Any] = content["provenance"]
    return Caching(
        heads,
        of["d"],
        of["pairs"],
        rank,
        half_life,
        error,
        removed,
        tuple(of["gaps"]),
        _outcome(of["intact"]),
        outcomes,
    ), made


def _outcome(of: Mapping[str, Any]) -> Outcome:
    nats, gain = (np.array(of[each], dtype=np.float64) for each in ("nats", "gain"))
    return Outcome(nats, gain, {task: np.array(each) for task, each in of["tasks"].items()})


class RepeatedCaching(Repeated[Caching]):
    """Caches of pairs in one model, stored and measured again.

    Example:
        >>> RepeatedCaching.__mro__[1].__name__
        'Repeated'
    """

    def difference(self) -> float:
        """The largest difference of a loss from the stored one on the same windows of books, nats per token."""
        n_windows = len(self.live.intact.nats) // len(LOSS_TEXTS)
        pairs = [(self.live.intact, self.shown.intact)]
        for share, methods in self.live.outcomes.items():
            pairs += [(of, self.shown.outcomes[share][method]) for method, of in methods.items()]
        losses = [(live.nats[:n_windows, 0], shown.nats[:n_windows, 0]) for live, shown in pairs]
        return float(max(np.abs(live - shown).max() for live, shown in losses))

    def source(self, name: str) -> str:
        """Where the shown numbers come from, in words."""
        n_shown, n_live = (len(of.intact.nats) // len(LOSS_TEXTS) for of in (self.shown, self.live))
        if self.made is None:
            return f"{name}: this run, windows per text: {n_live}."
        n_arms = sum(map(len, self.live.outcomes.values()))
        return (
            f"{name}: stored on {self.made['date'][:10]} ({self.made['device']}, commit {self.made['commit'][:7]}), windows per text: {n_shown}. This run "
            f"repeated {n_arms} of the methods on {n_live}: no loss on books differs by more than {self.difference():.0e} nats per token."
        )


def recall_by_rank(found: Caching) -> dict[str, str]:
    """Whether full states recall worse: quantity -> number, in words.

    Args:
        found: of one model.

    Example:
        >>> list(recall_by_rank(load_caching("hybrid")[0]))[:2]
        ['error, mean over heads with a rank over 0.8 d', 'error, mean over heads with a rank under 0.2 d']
    """
    low, high = (share * found.d for share in GAP)
    groups = {"over 0.8 d": found.error[found.rank > high], "under 0.2 d": found.error[found.rank < low]}
    return {
        f"error, mean over heads with a rank {where}": f"{errors.mean():.2f} ({len(errors)} heads)"
        if len(errors)
        else "no head"
        for where, errors in groups.items()
    } | {
        "Spearman of error and rank": _correlated(found.error, found.rank),
        "Spearman of error and half-life": _correlated(found.error, -1 / found.half_life),
    }


def _correlated(error: NDArray[np.float64], other: NDArray[np.float64]) -> str:
    rho = spearman(error, other)
    return "undefined" if np.isnan(rho) else f"{rho:.2f}"


def left_in_words(found: Mapping[str, Caching], share: float) -> str:
    """What the smallest cache of the last pairs leaves of the damage of removal, in a sentence per model.

    Args:
        found: name -> what was measured; models without this share are left out.
        share: of the heads.

    Example:
        >>> left_in_words({}, 0.25)
        ''
    """
    said = []
    for name, of in found.items():
        if share not in of.outcomes:
            continue
        without, *_ = curve = of.curve(share, RECENT)
        smallest = list(curve)[1]
        said.append(
            f"Removing these states costs {name} {curve[without].point:.2f} nats per token; with the last pairs kept, in 1/{1 / smallest:g} of the bytes, "
            f"{curve[smallest].point:.2f}."
        )
        method = f"{RECENT}, 1/{1 / smallest:g}"
        controls = [f"{RANDOM}: {each}" for each in (REMOVED, method)]
        if all(each in of.outcomes[share] for each in controls):
            bare, cached = (of.added(share, each).point for each in controls)
            said.append(f"As many random heads (one draw) cost {bare:.2f}, and with such a cache {cached:.2f}.")
    return " ".join(said)


def beside_in_words(found: Mapping[str, Caching], share: float) -> str:
    """What caches beside whole states add, in a sentence per model.

    Args:
        found: name -> what was measured; models without such caches are left out.
        share: of the heads.

    Example:
        >>> beside_in_words({}, 0.25)
        'Caches beside whole states were not measured.'
    """
    said = []
    for name, of in found.items():
        beside = {
            split: of.added(share, f"{BESIDE}: {split}")
            for split in BESIDES
            if f"{BESIDE}: {split}" in of.outcomes[share]
        }
        if beside:
            parts = ", ".join(
                f"{without_minus(format(added.point, '.2f'))} ({split})" for split, added in beside.items()
            )
            said.append(
                f"Beside the whole states of {name}, caches of half their bytes add in nats per token: {parts}."
            )
    return " ".join(said) or "Caches beside whole states were not measured."


def channels_in_words(stored: Caching | None, live: Shrinking, share: float) -> str:
    """What cutting key channels instead of heads adds, nats per token: as it is stored, else of this run, in words.

    Args:
        stored: beside the caches, if there is something.
        live: of this run.
        share: of the state.

    Example:
        >>> nothing = np.empty(0)
        >>> whole = Shrinking((), 64, nothing, nothing, (), {}, {}, {}, {}, 0.0, 0.0, "its keys are shared")
        >>> channels_in_words(None, whole, 0.389)
        'refused'
    """
    if stored and CHANNELS in stored.outcomes.get(share, {}):
        return f"{stored.added(share, CHANNELS).point:.2f}"
    return f"{over_texts(live.added[CHANNELS][share]).point:.2f}, this run" if CHANNELS in live.added else "refused"


def caching_table(of: Caching, share: float) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of a table of one model, a row per method: part of the bytes of all states that it frees, added nats at all positions and at the last
    ones, gain, and added nats of answers.

    Args:
        of: what was measured.
        share: of the heads.

    Example:
        >>> nothing = Outcome(np.zeros((6, 4)), np.zeros((1, 4)), {})
        >>> none = np.empty(0)
        >>> head, rows = caching_table(Caching((), 64, 32, none, none, none, {}, (64,), nothing, {0.25: {REMOVED: nothing}}), 0.25)
        >>> head, [row[:2] for row in rows]
        (('method', 'bytes freed', 'added nats', 'added nats, over 512', 'gain'), [('nothing removed', '0'), ('no cache', '25.0%')])
    """
    answers, last = list(of.intact.tasks), WHERE[-1]
    gain = ["gain"] if of.gaps else []
    columns = ("added nats", f"added nats, {last}", *gain, *(f"added nats, answers of {task}" for task in answers))
    head = ("method", "bytes freed", *columns)
    intact = [f"{over_texts(of.intact.gain.mean(0)):.2f}"] if of.gaps else []
    rows = [("nothing removed", "0", "0", "0", *intact, *("0" for _ in answers))]
    for method in of.outcomes[share]:
        numbers = [of.added(share, method), of.added(share, method, last)]
        numbers += [of.gain(share, method)] if of.gaps else []
        numbers += [of.answers(share, method, task) for task in answers]
        rows.append((method, f"{of.freed(share, method):.1%}", *(f"{number:.2f}" for number in numbers)))
    return head, rows


def repeat_caching(
    name: str,
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Texts,
    prompts: Int[Tensor, "prompt token"],
    *,
    quick: bool,
    seed: int = 0,
) -> RepeatedCaching:
    """Measure caches of pairs beside what is stored of a model's weights: a part of it in the quick profile.

    Args:
        name: as it was given to `load_model`.
        model, tokenizer, texts, prompts: as in `measure_caching`.
        quick: caches of the last pairs at one share, losses alone, and of stored models one size.
        seed: of the texts; what is stored is of seed 0.

    Raises:
        ValueError: as in `measure_caching`, or a loss that is not the stored one of the same windows and heads.

    Example:
        >>> import inspect
        >>> list(inspect.signature(repeat_caching).parameters)[:3]
        ['name', 'model', 'tokenizer']
    """
    stored = None if seed else load_caching(name)
    fractions = [
        part for part in FRACTIONS if part * pairs_in_state(linear_layers(model)[0]) >= 1
    ]  # of a pair at least
    few: dict[str, Any] = (
        {"shares": (0.25,), "splits": (RECENT,), "others": False, "gaps": (), "tasks": ()} if quick else {}
    )
    if quick and stored:
        fractions = [1 / 8]
    known = stored[0].removed if stored else None
    live = measure_caching(model, tokenizer, texts, prompts, fractions=fractions, removed=known, **few)
    if stored is None:
        return RepeatedCaching(live, live, "?", None)
    found = RepeatedCaching(stored[0], live, "?", stored[1])
    if not (difference := found.difference()) <= CLOSE:
        raise ValueError(
            f"losses of {name} with caches differ by {difference} nats per token from those stored, expected at most {CLOSE}"
        )
    return found
