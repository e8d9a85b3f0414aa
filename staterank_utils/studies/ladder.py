"""Everything that is measured on one model of the ladder, how it is stored, and the claims judged over all of them.

NAME.json holds what a reader of the file looks for: provenance, recipe, claims, one row per arm. NAME.npz.xz holds the numbers that they
were computed from, per head, prompt and window; `load_measured` makes the same objects of them again.
"""

import json
import lzma
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from staterank_utils import claims, strata
from staterank_utils.evaluation import TASKS
from staterank_utils.models import load_model, load_tokenizer
from staterank_utils.results import STORED, plain, whole_or_not, write_json
from staterank_utils.selection import PAPER_SHARE
from staterank_utils.strata import Estimate, bootstrap
from staterank_utils.studies.by_task import ByTask, mastered, measure_by_task, too_few
from staterank_utils.studies.groups import (
    Groups,
    Law,
    Row,
    Turning,
    first_claims,
    law_claims,
    measure_groups,
    measure_law,
    measure_turning,
    shares,
)
from staterank_utils.studies.recall import GAPS, Recall, RecallWithout, measure_recall, without_heads
from staterank_utils.studies.removal import (
    HIGH,
    JOINT,
    LAYERS,
    LOW,
    MODEL,
    PROTECTED,
    RANDOM,
    SCHEMES,
    Removal,
    Sizes,
    all_arms,
    chance_arms,
    chosen,
    measure_removal,
    summary,
)
from staterank_utils.studies.texts import LOSS_TEXTS, draw_texts
from staterank_utils.tasks import NATURAL_DOMAINS

LADDER = STORED / "ladder"
RULES = {
    "DeltaNet": "deltanet",
    "gated delta rule": "text",
    "sparse state expansion": "sse",
    "KDA": "kda",
    "decay without delta": "nodelta",
}  # update rule -> data or design of the hybrids that have it
WITHOUT_DECAY = "DeltaNet"
HELD_OUT = "bits_per_byte_held_out_books"  # of a training
VARIANTS = ("initial", "shuffled", "step-500", "step-2000")  # beside the end
BY_TASK = ("intact", "low", "high", "draws")  # the scores of a `ByTask`, each by task
NOT_MEASURED = "the ladder measures losses on text; chapters 3 and 4 score tasks on any model that masters them"


@dataclass(frozen=True)
class Scale:
    """How much is measured on one model; the defaults are those of the ladder.

    Example:
        >>> Scale().n_prompts, Scale().n_windows
        (16, 16)
    """

    n_prompts: int = 16
    n_tokens: int = 2048
    n_checkpoint_prompts: int = 4
    n_law_prompts: int = 4
    law_tokens: int = 1024
    n_windows: int = 16
    window: int = 1024
    n_copies: int = 8
    n_calibration: int = 16
    gaps: tuple[int, ...] = GAPS
    n_scores: int = 100
    n_graded: int = 32
    n_by_task: int = 200  # instances of a task, for a model that masters at least two
    n_task_draws: int = 8
    tasks: tuple[str, ...] = tuple(TASKS)
    removal: Sizes = Sizes()  # noqa: RUF009


@dataclass(frozen=True)
class Trajectory:
    """Heads on prose while the model was trained, means over the prompts of its record.

    Attributes:
        steps: at which they were looked at; the last is the end.
        rank, log_decay: (step, head).

    Example:
        >>> record = {"steps": {"0": {"prose": {"effective_rank": [[1.0, 2.0]], "log_decay": [[-1.0, -0.5]]}}}}
        >>> trajectory_of(record, n_steps=4).rank
        array([[1., 2.]])
    """

    steps: tuple[int, ...]
    rank: NDArray[np.float64]
    log_decay: NDArray[np.float64]


def trajectory_of(record: Mapping[str, Any], *, n_steps: int) -> Trajectory:
    """The record of a training as arrays.

    Args:
        record: of RUN/training.json.
        n_steps: at which the training ended.

    Example:
        >>> trajectory_of({"steps": {"end": {"prose": {"effective_rank": [[1.0]], "log_decay": [[-1.0]]}}}}, n_steps=4).steps
        (4,)
    """
    steps = record["steps"]
    rank, log_decay = (
        np.array([np.ravel(domains["prose"][measure]) for domains in steps.values()])
        for measure in ("effective_rank", "log_decay")
    )
    return Trajectory(tuple(n_steps if step == "end" else int(step) for step in steps), rank, log_decay)


@dataclass(frozen=True)
class Measured:
    """All that was measured on one model.

    Attributes:
        name: of the recipe.
        training: what its training says of itself, its losses among it, but for the record of heads.
        trajectory: that record.
        groups: variant ("end" and some of `VARIANTS`) -> ranks.
        laws: "end", and each step whose weights were kept -> how far the law holds.
        turning, removal, recall: of the model at its end.
        by_task: scores on tasks without heads, of a model that masters at least two; None where they were not taken.

    Example:
        >>> list(Measured.__dataclass_fields__)[:2]
        ['name', 'training']
    """

    name: str
    training: Mapping[str, Any]
    trajectory: Trajectory
    groups: Mapping[str, Groups]
    turning: Turning
    laws: Mapping[str, Law]
    removal: Removal
    recall: Recall
    by_task: ByTask | None = None

    def claims(self) -> list[Row]:
        """The rows that this model alone decides, in the order of the registrations."""
        end = self.groups["end"]
        rows = [
            *first_claims(self.name, end, initial=self.groups.get("initial")),
            *self.turning.claims(self.name),
            *law_claims(self.name, end, self.laws["end"]),
            *self.removal.claims(self.name),
            *(self._by_tasks(key) for key in ("C4", "C4a", "C5")),
        ]
        return sorted(rows, key=lambda row: claims.ORDER.index(row["claim"]))

    def _by_tasks(self, key: str) -> Row:
        """A claim that is judged by tasks: a model that masters fewer than two cannot be tested."""
        if self.by_task is not None:
            return next(row for row in self.by_task.claims() if row["claim"] == key)
        n_mastered, n_tasks = len(mastered(self.recall.scores)), len(self.recall.scores)
        if n_mastered < 2:
            return too_few(key, self.name, n_mastered=n_mastered, n_tasks=n_tasks)
        return claims.not_measured(key, self.name, why=NOT_MEASURED)

    def controls(self) -> dict[str, list[Row]]:
        """The claims about ranks on the other variants: before training, shuffled, and on the way."""
        rows = {}
        for variant, groups in self.groups.items():
            if variant != "end" and len(groups.early_rank):
                law = law_claims(self.name, groups, self.laws[variant]) if variant in self.laws else []
                rows[variant] = [*first_claims(self.name, groups, initial=self.groups.get("initial")), *law]
        return rows

    def numbers(self) -> dict[str, Any]:
        """What the table and the text of the ladder quote, beside the claims."""
        end = self.groups["end"].relative("prose").mean(0)
        by_heads = {
            "Sarle": _over_heads(strata.sarle_coefficient, end),
            "share outside": _over_heads(strata.share_outside, end),
            "two-group share": _over_heads(strata.two_group_share, end),
        }
        return {
            "over heads": {label: _listed(estimate) for label, estimate in by_heads.items()},
            "shares": {variant: shares(groups) for variant, groups in self.groups.items()},
            "unigram": dict(self.removal.unigram),
            "intact": {text: float(part.mean()) for text, part in zip(LOSS_TEXTS, np.split(self.removal.intact, len(LOSS_TEXTS)), strict=True)},
            "D": {scheme: _listed(self.removal.area_interval(scheme)) for scheme in SCHEMES},
            "D over": {scheme: self.removal.counted(scheme) for scheme in SCHEMES},
            "D beyond random orders within layers": self.removal.beyond_random(),
            "C0c by factor": self.laws["end"].by_factor(),
            "taken by the cap": _listed(self.recall.taken()),
            "secondary": {label: losses.mean(1).tolist() for label, losses in self.removal.secondary.items()},
            "crossing": {scheme: self.removal.crossing(scheme) for scheme in SCHEMES},
            "joint - rank alone": _listed(self.removal.alpha_gap()),
            "gain": {label: {str(gap): float(row.mean()) for gap, row in zip(self.recall.gaps, table, strict=True)} for label, table in self.recall.gains.items()},
            "added under cap": {label: float((nats - self.removal.intact).mean()) for label, nats in self.recall.cap_nats.items()},
            "mean r/d under cap": {label: float(rank.mean() / self.recall.d) for label, rank in self.recall.cap_rank.items()},
            "kappa under cap": {label: self.recall.kappa(int(label.split()[1])) for label in self.recall.cap_rank if label != "intact"},
            "task scores": {task: float(scores.mean()) for task, scores in self.recall.scores.items()},
            "task nats": {label: table.mean(1).tolist() for label, table in self.recall.task_nats.items()},
            "positions": {label: table.tolist() for label, table in self.removal.bins.items()},
        }  # fmt: skip


def _over_heads(statistic: Callable[..., float], heads: NDArray[np.float64]) -> Estimate:
    """A statistic of heads with its interval; without one where drawn heads may all be alike."""
    try:
        return bootstrap(statistic, heads)
    except strata.UndefinedError:
        return Estimate(statistic(heads), float("nan"), float("nan"))


def _listed(estimate: Estimate) -> list[float]:
    return [estimate.point, estimate.low, estimate.high]


def measure_model(
    folder: Path, *, name: str, training: Mapping[str, Any], scale: Scale = Scale(), device: str | None = None
) -> Measured:
    """Measure a trained model with everything that the ladder asks for.

    Args:
        folder: of a run: FOLDER/model, and FOLDER/step-500 and so on where they were kept.
        name: of the recipe.
        training: what RUN/training.json says.
        scale: how much.
        device: as in `load_model`.

    Raises:
        FileNotFoundError: the run has no model.

    Example:
        >>> measure_model(Path("nowhere"), name="x", training={})
        Traceback (most recent call last):
            ...
        FileNotFoundError: nowhere holds no finished run: expected the folder nowhere/model
    """
    if not (folder / "model").is_dir():
        raise FileNotFoundError(f"{folder} holds no finished run: expected the folder {folder / 'model'}")
    options: dict[str, Any] = {"device": device, "dtype": torch.float32}
    tokenizer = load_tokenizer(str(folder / "model"))
    model = load_model(str(folder / "model"), **options)
    texts = draw_texts(
        tokenizer, n_windows=scale.n_windows, window=scale.window, n_copies=scale.n_copies, copy=max(scale.gaps), n_calibration=scale.n_calibration
    )  # fmt: skip
    groups = {"end": measure_groups(model, tokenizer, n_prompts=scale.n_prompts, n_tokens=scale.n_tokens)}
    of_law: dict[str, Any] = {
        "n_prompts": scale.n_law_prompts,
        "n_tokens": scale.law_tokens,
        "bound_tokens": scale.n_tokens,
    }
    laws = {"end": measure_law(model, tokenizer, **of_law)}
    for variant in VARIANTS:
        kept = folder / variant
        if variant.startswith("step") and not kept.is_dir():
            continue
        # Controls are measured on the same prompts as the trained model.
        n_prompts = scale.n_checkpoint_prompts if variant.startswith("step") else scale.n_prompts
        weights: Any = "trained" if kept.is_dir() else variant
        other = load_model(str(kept if kept.is_dir() else folder / "model"), weights=weights, **options)
        groups[variant] = measure_groups(other, tokenizer, n_prompts=n_prompts, n_tokens=scale.n_tokens)
        if variant.startswith("step"):
            laws[variant] = measure_law(other, tokenizer, **of_law)
    turning = measure_turning(model, tokenizer, n_tokens=scale.n_tokens)
    removal = measure_removal(model, texts, name=name, sizes=scale.removal)
    tasks = {task: TASKS[task] for task in scale.tasks}
    recall = measure_recall(
        model, tokenizer, texts, removal, groups["end"], gaps=scale.gaps, n_scores=scale.n_scores, n_graded=scale.n_graded,
        n_prompts=scale.n_prompts, tasks=tasks,
    )  # fmt: skip
    by_task = None
    if len(mastered(recall.scores)) > 1:
        by_task = measure_by_task(
            model, tokenizer, tasks, name=name, n_prompts=scale.n_by_task, n_draws=scale.n_task_draws
        )
    about = {key: value for key, value in training.items() if key != "record"}
    trajectory = trajectory_of(training["record"], n_steps=training["steps"])
    return Measured(name, about, trajectory, groups, turning, laws, removal, recall, by_task)


# ---------------------------------------------------------------- stored


def store_measured(measured: Measured, folder: Path, *, made: Mapping[str, Any]) -> None:
    """Write NAME.npz.xz and NAME.json, each whole or not at all.

    Args:
        measured: of one model.
        folder: where to.
        made: provenance.

    Raises:
        OSError: the file system's own error.

    Example:
        >>> _, content = load_measured("hybrid-text-0")
        >>> list(content)[:4]
        ['provenance', 'name', 'training', 'rows']
    """
    arms = measured.removal.arms
    content: dict[str, Any] = {
        "provenance": dict(made),
        "name": measured.name,
        "training": dict(measured.training),
        "rows": measured.claims(),
        "controls": measured.controls(),
        "numbers": plain(measured.numbers()),
        "arms": summary(measured.removal),
        "sizes": {
            "n_draws": 1 + max(arm.draw for arm in arms if arm.scheme == PROTECTED),
            "n_chance": 1 + max(arm.draw for arm in arms),
            "spare": measured.removal.spare_share(),
            "within_windows": measured.removal.within_windows,
            "d": measured.removal.d,
            "n_tokens": measured.groups["end"].n_tokens,
            "gaps": list(measured.recall.gaps),
            "factors": {variant: list(law.factors) for variant, law in measured.laws.items()},
            "turning": vars(measured.turning),
            "bound": {
                variant: [law.bound_violations, law.bound_states, law.void] for variant, law in measured.laws.items()
            },
        },
    }
    if (tasks := measured.by_task) is not None:
        content["sizes"]["by_task"] = {
            "heads": dict(tasks.heads),
            "redundancy": None if tasks.redundancy is None else list(astuple(tasks.redundancy)),
            "joint": {label: list(astuple(estimate)) for label, estimate in tasks.joint.items()},
        }
    # Judged before anything is written.
    folder.mkdir(parents=True, exist_ok=True)
    # Compressed as a whole: hundreds of small arrays have much in common.
    with whole_or_not(folder / f"{measured.name}.npz.xz") as partial, lzma.open(partial, "wb") as stream:
        np.savez(stream, **_arrays(measured))  # type: ignore[arg-type]
    write_json(folder / f"{measured.name}.json", content)


def load_measured(name: str, folder: Path = LADDER) -> tuple[Measured, dict[str, Any]]:
    """Read a stored model of the ladder.

    Args:
        name: of the recipe.
        folder: that holds NAME.json and NAME.npz.xz.

    Returns:
        What was measured, and the content of the JSON.

    Raises:
        FileNotFoundError: there is no such result.

    Example:
        >>> load_measured("no such model")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        FileNotFoundError: ...
    """
    data = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    with lzma.open(folder / f"{name}.npz.xz") as stream, np.load(stream) as file:
        arrays = {key: file[key] for key in file.files}
    return _measured(data, arrays), data


def _arrays(measured: Measured) -> dict[str, NDArray[Any]]:
    """Everything per head, prompt and window, in the narrowest type that holds it."""
    removal, recall = measured.removal, measured.recall
    found: dict[str, NDArray[Any]] = {"heads": np.array(removal.heads, dtype=np.int16)}
    for variant, groups in measured.groups.items():
        for domain, table in groups.rank.items():
            found[f"groups/{variant}/rank/{domain}"] = table.astype(np.int16)
            if domain == "prose" or (variant == "end" and domain in NATURAL_DOMAINS):
                precision = np.float32 if domain == "prose" else np.float16
                found[f"groups/{variant}/log_decay/{domain}"] = groups.log_decay[domain].astype(precision)
        found[f"groups/{variant}/early/rank"] = groups.early_rank.astype(np.int16)
        for key in ("early_norm", "norm"):
            found[f"groups/{variant}/early/{key}"] = getattr(groups, key).astype(
                np.float32 if variant == "end" else np.float16
            )
    path = measured.trajectory
    found |= {"steps/at": np.array(path.steps), "steps/rank": path.rank.astype(np.float32)}
    found["steps/log_decay"] = path.log_decay.astype(np.float32)
    for variant, law in measured.laws.items():
        found[f"law/{variant}/base_rank"] = law.base_rank.astype(np.int16)
        found[f"law/{variant}/scaled_rank"] = law.scaled_rank.astype(np.int16)
        found[f"law/{variant}/base_decay"] = law.base_decay.astype(np.float32)
    for label, table in removal.secondary.items():
        found[f"secondary/{label}"] = table.astype(np.float32)
    for order, indices in removal.orders.items():
        found[f"orders/{order}"] = indices.astype(np.int16)
    for key in ("rank", "intact", "nats", "within"):
        found[f"removal/{key}"] = getattr(removal, key).astype(np.float32)
    for label, table in removal.bins.items():
        found[f"bins/{label}"] = table.astype(np.float32)
    for group, table in removal.groups.items():
        found[f"groups of heads/{group}"] = table.astype(np.float32)
    for kind in ("gains", "cap_nats", "scores", "task_nats"):
        for label, table in getattr(recall, kind).items():
            found[f"{kind}/{label}"] = table.astype(np.float32)
    if (tasks := measured.by_task) is not None:
        for kind in BY_TASK:
            for task, scores in getattr(tasks, kind).items():
                found[f"by_task/{kind}/{task}"] = scores.astype(np.float32)
    for label, table in recall.cap_rank.items():
        found[f"cap_rank/{label}"] = table.astype(np.int16)
    return found


def _measured(data: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Measured:
    def under(prefix: str) -> dict[str, NDArray[np.float64]]:
        return {
            key.removeprefix(prefix): value.astype(np.float64)
            for key, value in arrays.items()
            if key.startswith(prefix)
        }

    sizes, name = data["sizes"], data["name"]
    heads = tuple((int(layer), int(head)) for layer, head in arrays["heads"])
    variants = dict.fromkeys(key.split("/")[1] for key in arrays if key.startswith("groups/"))
    groups = {}
    for variant in variants:
        early = under(f"groups/{variant}/early/")
        groups[variant] = Groups(
            heads, sizes["d"], sizes["n_tokens"], under(f"groups/{variant}/rank/"), under(f"groups/{variant}/log_decay/"),
            early["rank"], early["early_norm"], early["norm"],
        )  # fmt: skip
    of_steps = under("steps/")
    trajectory = Trajectory(tuple(map(int, of_steps["at"])), of_steps["rank"], of_steps["log_decay"])
    orders = {key: value.astype(np.int64) for key, value in under("orders/").items()}
    # They follow from the orders of heads, the name and the sizes.
    arms = all_arms(heads, orders, name=name, n_draws=sizes["n_draws"])
    arms += chance_arms(heads, name=name, spare=sizes["spare"], first=sizes["n_draws"], n_draws=sizes["n_chance"])
    of_removal = under("removal/")
    removal = Removal(
        heads, sizes["d"], orders, of_removal["rank"], data["numbers"]["unigram"], of_removal["intact"], arms, of_removal["nats"],
        under("bins/"), of_removal["within"], sizes["within_windows"], under("groups of heads/"), under("secondary/"),
    )  # fmt: skip
    recall = Recall(
        tuple(sizes["gaps"]),
        under("gains/"),
        under("cap_nats/"),
        under("cap_rank/"),
        under("scores/"),
        under("task_nats/"),
        sizes["d"],
    )
    laws = {}
    for variant, (violations, n_states, void) in sizes["bound"].items():
        of_law, factors = under(f"law/{variant}/"), tuple(sizes["factors"][variant])
        laws[variant] = Law(
            violations,
            n_states,
            void,
            factors,
            of_law["base_rank"],
            of_law["base_decay"],
            of_law["scaled_rank"],
            sizes["d"],
        )
    turning = Turning(**sizes["turning"])
    by_task = None
    if told := sizes.get("by_task"):
        scores = {kind: under(f"by_task/{kind}/") for kind in BY_TASK}
        estimates = {label: Estimate(*numbers) for label, numbers in told["joint"].items()}
        redundancy = Estimate(*told["redundancy"]) if told["redundancy"] else None
        by_task = ByTask(name, heads=told["heads"], redundancy=redundancy, joint=estimates, **scores)
    return Measured(name, data["training"], trajectory, groups, turning, laws, removal, recall, by_task)


# ---------------------------------------------------------------- over models


def recall_without(models: Iterable[Measured]) -> list[RecallWithout]:
    """Recall of measured models without some heads of every layer.

    Args:
        models: from `load_measured`.

    Example:
        >>> round(recall_without([load_measured("hybrid-text-1")[0]])[0].intact, 1)
        0.6
    """
    return [without_heads(of.name, of.recall, of.removal) for of in models]


def pure_direction(models: Iterable[Measured]) -> str:
    """In how many pure models the lowest ranks cost more loss over the model, as the paper says, and at half of the heads, in words.

    Args:
        models: from `load_measured`.

    Example:
        >>> pure_direction([load_measured("pure-text-0")[0], load_measured("hybrid-text-0")[0]])
        'in 1 of 1 pure models of the ladder the lowest ranks cost more up to 5/16 of the heads, as the paper says; at half of the heads in 0'
    """
    pure = [of.removal for of in models if of.name.startswith("pure")]
    areas = [removal.area(MODEL) for removal in pure]
    half = [removal.added(MODEL, LOW, 0.5).mean() > removal.added(MODEL, HIGH, 0.5).mean() for removal in pure]
    return (
        f"in {sum(area < 0 for area in areas)} of {len(areas)} pure models of the ladder the lowest ranks cost more up to 5/16 of the heads, as the paper "
        f"says; at half of the heads in {sum(half)}"
    )


def recall_over_models(found: Iterable[RecallWithout], *, share: float = 0.25) -> str:
    """Which heads the models that recall do it with, in two sentences.

    Args:
        found: from `recall_without`.
        share: of the heads of every layer.

    Example:
        >>> recall_over_models(recall_without([load_measured("hybrid-text-0")[0]]))[:45]
        '1 of these models recalls: its kind is hybrid'
    """
    models = [of for of in found if of.recalls]
    kinds = " and ".join(sorted({of.name.split("-")[0] for of in models}))
    at = [of.shares.index(share) for of in models]
    below = sum(of.gain[LOW][i] < of.random[i].min() for of, i in zip(models, at, strict=True))
    above = sum(of.gain[HIGH][i] > of.random[i].mean() for of, i in zip(models, at, strict=True))
    who = (
        "1 of these models recalls: its kind is"
        if len(models) == 1
        else f"{len(models)} of these models recall: their kind is"
    )
    return (
        f"{who} {kinds}. Of these, {below} recall less without the lowest ranks than without any draw of random heads, and {above} more "
        "without the highest ranks than without random heads on average."
    )


def stored_rows() -> list[Row]:
    """The rows of every stored model, and of the pair that was embedded before, each judged alone.

    Example:
        >>> {row["model"] for row in stored_rows()} > {"hybrid-text-0", "pure-text-0", "hybrid", "pure"}
        True
    """
    files = (*sorted(LADDER.glob("*.json")), STORED / "first_pair.json")
    return [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]


def at_its_own_share(rows: Iterable[Mapping[str, Any]]) -> str:
    """On how many models C5a could be judged at the paper's share, and on how many the score beat chance there, in a sentence.

    Args:
        rows: of any claims.

    Example:
        >>> at_its_own_share([])
        "At its own 38.9% the paper's score could be judged on 0 models, and beat all random draws on 0."
    """
    leads = [
        number["point"]
        for row in rows
        if row["claim"] == "C5a"
        for number in row["criteria"]
        if number["label"] == f"{PAPER_SHARE:.1%}"
    ]
    return f"At its own {PAPER_SHARE:.1%} the paper's score could be judged on {len(leads)} models, and beat all random draws on {sum(x < 0 for x in leads)}."


def scores_after_pruning() -> str:
    """What C5 found on every model of which tasks are stored, in a sentence.

    Example:
        >>> scores_after_pruning()[:31]
        'Models of this book that master'
    """
    judged = [row for row in stored_rows() if row["claim"] == "C5" and row["criteria"]]
    left, _, over_mean = zip(*([number["point"] for number in row["criteria"]] for row in judged), strict=True)
    return (
        f"Models of this book that master tasks, one training seed each: {len(judged)}. On {sum(row['verdict'] == claims.HOLDS for row in judged)} of them C5 holds. Without "
        f"{PAPER_SHARE:.1%} of the heads, by this score over the model, they keep {min(left):.1%} to {max(left):.1%} of their scores on tasks; without as many random heads "
        f"they keep more on average in {sum(x < 0 for x in over_mean)}."
    )


def recalling_heads(found: Iterable[RecallWithout]) -> list[Row]:
    """The row of C11, from the hybrids on which it was not measured before it was registered; empty where there are none.

    Args:
        found: from `recall_without`.

    Example:
        >>> recalling_heads(recall_without([load_measured("hybrid-text-0")[0]]))
        []
    """
    share = claims.THIRD["C11"].numbers["share"]
    kept = {}
    for of in _later(found):
        at = of.shares.index(share)
        kept[of.name] = (of.intact, of.gain[LOW][at], of.gain[HIGH][at], list(of.random[at]))
    return [claims.judge_recalling_heads(kept)] if kept else []


def _later(found: Iterable[RecallWithout]) -> list[RecallWithout]:
    """The hybrids that C11 is about."""
    known = claims.THIRD["C11"].numbers["known"]
    return [of for of in found if of.name.startswith("hybrid") and of.name not in known]


def later_hybrids(found: Iterable[RecallWithout]) -> str:
    """What C11 says of hybrids that were measured after it was registered, in a sentence.

    Args:
        found: from `recall_without`.

    Example:
        >>> later_hybrids([])
        'No hybrid was measured since C11 was registered.'
    """
    later = _later(found)
    if not later:
        return "No hybrid was measured since C11 was registered."
    [row] = recalling_heads(later)
    share, least = (claims.THIRD["C11"].numbers[name] for name in ("share", "left"))
    alone = {of.name: recalling_heads([of])[0]["verdict"] for of in later if of.recalls}
    others = [name for name, verdict in alone.items() if verdict != claims.HOLDS]
    left = [of.gain[LOW][of.shares.index(share)] / of.intact for of in later if of.recalls]
    met = [of for of in later if alone.get(of.name) == claims.HOLDS]
    dearer = sum(of.added[LOW][at] > of.added[RANDOM][at] for of in met for at in [of.shares.index(share)])
    of_class = [verdict == claims.HOLDS for name, verdict in alone.items() if name.startswith("hybrid-default")]
    return (
        f"C11, on the {len(left)} hybrids measured since: {row['verdict']}{row['note']}. Without the lowest ranks, the share of the "
        f"gain that is left is {min(left):.0%} to {max(left):.0%}. The rule asks for less than {least:.0%} and than any random draw leaves, and for more without the "
        f"highest ranks than without random heads; it is not met in {', '.join(others) or 'none'}. With the gates that "
        f"the paper's model class begins with, it is met in {sum(of_class)} of {len(of_class)}. In {dearer} of the {len(met)} hybrids that meet it the lowest ranks "
        "also cost more on text that is read once than random heads on average, and there damage to everything is not excluded."
    )


def cap_by_design(found: Iterable[Measured]) -> str:
    """What the cap of C6 takes from the gains of hybrids, by what their decays are like, in words.

    Args:
        found: measured models; pure ones are passed over, and `hybrid-sse-0`, whose idle partitions the cap made decay when it was measured.

    Example:
        >>> cap_by_design([load_measured("hybrid-deltanet-0")[0]])
        '72% (1 without a decay)'
    """
    designs = {
        "hybrid-default": "with the gates of the class",
        "hybrid-deltanet": "without a decay",
        "hybrid": "others",
    }
    taken: dict[str, list[float]] = {}
    for of in found:
        design = next((what for start, what in designs.items() if of.name.startswith(start)), None)
        if design and of.name != "hybrid-sse-0":
            taken.setdefault(design, []).append(of.recall.taken().point)
    return ", ".join(
        f"{min(x):.0%}{f' to {max(x):.0%}' if len(x) > 1 else ''} ({len(x)} {design})" for design, x in taken.items()
    )


def memory_of_lowest(name: str, measured: Measured, *, share: float = 0.25) -> str:
    """How long the heads of lowest rank of every layer remember, in words.

    Args:
        name: as the words call it.
        measured: of the model.
        share: of the heads of every layer.

    Example:
        >>> memory_of_lowest("hybrid", load_measured("hybrid-text-0")[0])
        'the lowest quarter of hybrid has half-lives of at most 3.7 tokens, median 0.5'
    """
    removal = measured.removal
    lowest = list(chosen(removal.orders[LOW], removal.heads, LAYERS, share))
    half_lives = measured.groups["end"].half_life()[lowest]
    return f"the lowest quarter of {name} has half-lives of at most {half_lives.max():.1f} tokens, median {np.median(half_lives):.1f}"


def stored_models() -> dict[str, tuple[Measured, dict[str, Any]]]:
    """Every model of the ladder that is stored: its name -> as `load_measured`.

    Example:
        >>> next(iter(stored_models()))
        'hybrid-default-0'
    """
    return {file.stem: load_measured(file.stem) for file in sorted(LADDER.glob("*.json"))}


def by_design(models: Mapping[str, Measured]) -> dict[tuple[str, str], dict[str, Measured]]:
    """Models that differ in the seed alone, together.

    Args:
        models: name of the recipe, KIND-DATA-SEED -> what was measured.

    Returns:
        (kind, data) -> seed -> what was measured, in the order of `models`.

    Example:
        >>> measured, _ = load_measured("hybrid-text-0")
        >>> [(design, *seeds) for design, seeds in by_design({"hybrid-text-0": measured, "hybrid-text-1": measured}).items()]
        [(('hybrid', 'text'), '0', '1')]
    """
    found: dict[tuple[str, str], dict[str, Measured]] = {}
    for name, model in models.items():
        kind, data, seed = name.rsplit("-", 2)
        found.setdefault((kind, data), {})[seed] = model
    return found


def ladder_claims(models: Mapping[str, Measured]) -> list[Row]:
    """The rows that only several models decide: C0b, C1d, C1e, C4b, C4c, C5b, C6 and C10 to C13, hybrid and pure apart where the rule says so.

    Args:
        models: name of the recipe, KIND-DATA-SEED -> what was measured.

    Returns:
        One row per claim and group of models; claims whose models are missing are left out.

    Example:
        >>> ladder_claims({})
        []
    """
    if not models:
        return []
    of_shares = {name: shares(model.groups["end"]) for name, model in models.items()}
    by_kind = by_design(models)
    differences = {
        name: (each["outside by law"] - each["outside"], each["two groups by law"] - each["two groups"])
        for name, each in of_shares.items()
    }
    rows = [claims.judge_law(differences)]
    for kind in dict.fromkeys(kind for kind, _ in by_kind):
        of_data = {
            data: [of_shares[model.name] for model in by_kind[kind, data].values()]
            for data in ("text", "tasks63")
            if (kind, data) in by_kind
        }
        if len(of_data) == 2:
            outside, two = (
                [[each[key] for each in of_data[data]] for data in of_data] for key in ("outside", "two groups")
            )
            rows.append(claims.judge_tasks(kind, *outside, two_groups=(two[0], two[1])))
        broad, narrow, first = (by_kind.get((kind, data), {}) for data in ("text", "narrow", "softmaxfirst"))
        if both := sorted(set(broad) & set(narrow)):
            two_groups = {
                seed: of_shares[broad[seed].name]["two groups"] - of_shares[narrow[seed].name]["two groups"]
                for seed in both
            }
            bits = {seed: broad[seed].training[HELD_OUT] - narrow[seed].training[HELD_OUT] for seed in both}
            rows.append(claims.judge_gates(kind, two_groups, bits))
        if both := sorted(set(broad) & set(first)):
            replaced = {
                seed: (broad[seed].removal.crossing(MODEL), first[seed].removal.crossing(MODEL)) for seed in both
            }
            rows.append(claims.judge_layer_zero(f"{kind}, softmax as layer 0", replaced))
    of_rule = {rule: by_kind["hybrid", data] for rule, data in RULES.items() if ("hybrid", data) in by_kind}
    both = sorted(set.intersection(*map(set, of_rule.values()))) if len(of_rule) > 1 else []
    if both and WITHOUT_DECAY in of_rule:
        two_groups = {
            f"{rule}, seed {seed}": of_shares[seeds[seed].name]["two groups"]
            for rule, seeds in of_rule.items()
            for seed in both
        }
        without = [f"{WITHOUT_DECAY}, seed {seed}" for seed in both]
        row = claims.judge_need_of_decay(two_groups, without=without)
        rows.append(row | {"note": f"{row['note']}; rules with decay: {len(of_rule) - 1}"})
    share = claims.SECOND["C5b"].numbers["share"]
    for (kind, data), seeds in by_kind.items():
        label = f"{kind}-{data}"
        beyond = {seed: model.removal.beyond_random() for seed, model in seeds.items()}
        crossings = {
            seed: (model.removal.crossing(MODEL), model.removal.crossing(PROTECTED)) for seed, model in seeds.items()
        }
        gaps = {
            seed: model.removal.alpha_gap().point
            for seed, model in seeds.items()
            if model.removal.counts(MODEL, share, (JOINT, HIGH))
        }
        if undefined := sorted(seed for seed, share in beyond.items() if np.isnan(share)):
            why = f"fewer than two doses count in seed {', '.join(undefined)}"
            rows.append(claims.not_testable("C4b", label, why=why))
        else:
            rows.append(claims.judge_within_layers(label, beyond))
        rows.append(claims.judge_layer_zero(label, crossings))
        ruined = sorted(set(seeds) - set(gaps))
        if gaps:
            row = claims.judge_alpha(label, gaps)
            rows.append(row | {"note": row["note"] + (f"; seed {', '.join(ruined)} does not count" if ruined else "")})
        else:
            rows.append(claims.not_testable("C5b", label, why="the joint score is worse than a unigram model"))
    rows += recalling_heads(recall_without(models.values()))
    for key in ("C12", "C13"):
        design, dose = (claims.THIRD[key].numbers[name] for name in ("design", "share"))
        of_seed = {
            seed: (
                of.removal.area(LAYERS), of.removal.beyond_random(), of.removal.cost(LAYERS, HIGH, dose),
                of.removal.draws(LAYERS, dose).mean(1).tolist(),
            )
            for seed, of in by_kind.get(("hybrid", design), {}).items()
        }  # fmt: skip
        if of_seed:
            rows.append(claims.judge_direction(key, of_seed))
    testable = False
    for data in sorted({data for _, data in by_kind}, key=lambda data: (data != "text", data)):
        hybrid, pure = (by_kind.get((kind, data), {}) for kind in ("hybrid", "pure"))
        if both := sorted(set(hybrid) & set(pure)):
            recalls = {seed: (hybrid[seed].recall, pure[seed].recall) for seed in both}
            row = claims.judge_recall(
                data,
                {seed: (h.taken(), p.taken()) for seed, (h, p) in recalls.items()},
                {seed: (h.kappa(), p.kappa()) for seed, (h, p) in recalls.items()},
                {seed: (h.gain().point, p.gain().point) for seed, (h, p) in recalls.items()},
                note="; exploratory" if testable else "",
            )
            testable = testable or (data == "text" and row["verdict"] != claims.NOT_TESTABLE)
            rows.append(row)
    return sorted(rows, key=lambda row: claims.ORDER.index(row["claim"]))
