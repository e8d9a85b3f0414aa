"""What is stored of a model's very weights, and a part of it measured again on the machine at hand."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from staterank_utils import strata
from staterank_utils.claims import HOLDS
from staterank_utils.models import CHECKPOINTS, EMBEDDED, load_model
from staterank_utils.results import embedded_folders, provenance, weights_hash, write_json
from staterank_utils.strata import is_high
from staterank_utils.studies.by_task import ByTask
from staterank_utils.studies.groups import (
    DOMAINS,
    Groups,
    Law,
    Row,
    Turning,
    measure_groups,
    measure_turning,
)
from staterank_utils.studies.ladder import LADDER, Measured, load_measured
from staterank_utils.studies.recall import Recall, induction_gains, measure_caps, recall_arms
from staterank_utils.studies.removal import (
    DAMAGE_FILE,
    DRAWS_FILE,
    HIGH,
    LAYERS,
    LOW,
    RANDOM,
    Removal,
    Sizes,
    further_draws,
    measure_removal,
)
from staterank_utils.studies.texts import LOSS_TEXTS, Texts, draw_texts
from staterank_utils.surgery import ablate_heads
from staterank_utils.tasks import NATURAL_DOMAINS

Study = TypeVar("Study")


def _where(made: Mapping[str, Any]) -> str:
    """Where and when a stored run was made, for a sentence."""
    return f"on {made['device']} ({made['date'][:10]}, commit {made['commit'][:7]})"


def _several(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


LOG_HALF_LIFE, DAMAGE = "log2 of half-life", "nats added without it"  # of each head, in the explorer
AGREE = 0.8  # share of live intervals that must hold the stored value, and of labels that must be the same
CLOSE = 0.05  # nats per token, by which losses on the same windows may differ
# What chapter 5 removes from a model of which nothing is stored.
QUARTER = Sizes((LOW, HIGH), (0.25,), 4, n_chance=0, n_within=0, within_windows=0, n_groups=0, secondary=False, schemes=(LAYERS,))  # fmt: skip


def stored_name(model: str) -> str | None:
    """The stored model that has a model's very weights, found by their SHA-256.

    Args:
        model: an embedded name or a folder; of a hub id nothing is stored.

    Example:
        >>> stored_name("hybrid"), stored_name("OWNER/NAME")
        ('hybrid-text-0', None)
    """
    folder = CHECKPOINTS / model if model in EMBEDDED else Path(model)
    if not folder.is_dir():
        return None
    weights = weights_hash(folder)
    for file in sorted(LADDER.glob("*.json")):
        if json.loads(file.read_text(encoding="utf-8"))["provenance"]["checkpoints"].get("model") == weights:
            return file.stem
    return None


def stored_on(model: str) -> tuple[Measured, dict[str, Any]] | None:
    """What is stored of a model's very weights; of the embedded ones with more random draws than the ladder has.

    Args:
        model: as in `stored_name`.

    Returns:
        As `load_measured`; None where no stored model has these weights.

    Example:
        >>> stored_on("hybrid")[0].removal.draws("layer-matched", 0.25).shape  # 40 draws, 16 windows of each text
        (40, 32)
        >>> stored_on("OWNER/NAME") is None
        True
    """
    name = stored_name(model)
    if name is None:
        return None
    measured, content = load_measured(name)
    more = _of_the_weights(DRAWS_FILE, content)
    if more:
        arms = further_draws(measured.removal, name=name, n_draws=more["n_draws"])
        measured = replace(measured, removal=measured.removal.with_arms(arms, np.array(more["nats"])))
    return measured, content


def measures_of(model: str) -> dict[str, NDArray[np.float64]]:
    """What is stored of each head of a model's weights, for the head explorer.

    Args:
        model: as in `stored_on`.

    Returns:
        `LOG_HALF_LIFE` -> over heads, of half-lives in tokens; `DAMAGE` -> added nats per token without each head alone, mean over windows. Empty
        where nothing is stored.

    Example:
        >>> [(name, of.shape) for name, of in measures_of("hybrid").items()], measures_of("OWNER/NAME")
        ([('log2 of half-life', (144,)), ('nats added without it', (144,))], {})
    """
    stored = stored_on(model)
    if stored is None:
        return {}
    found = {LOG_HALF_LIFE: np.log2(stored[0].groups["end"].half_life())}
    damage = _of_the_weights(DAMAGE_FILE, stored[1])
    return found | {DAMAGE: np.array(damage["added"])} if damage else found


def beyond_first(model: str) -> tuple[float, float] | None:
    """What is stored of C4b on the layers behind the first one.

    Args:
        model: as in `stored_on`.

    Returns:
        D of rank, layer-matched, and the share of the D of random orders within layers, both signs, that are smaller in size; None where nothing
        is stored.

    Example:
        >>> beyond_first("OWNER/NAME") is None, 0 <= beyond_first("hybrid")[1] <= 1
        (True, True)
    """
    stored = stored_on(model)
    damage = _of_the_weights(DAMAGE_FILE, stored[1]) if stored else None
    if damage is None:
        return None
    own, *random = damage["areas_beyond_first"]
    return own, float((np.abs(random) < abs(own)).mean())


def _of_the_weights(file: Path, content: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a file that holds quantities by embedded model has of the weights of a stored model, by the name of the quantity."""
    found = json.loads(file.read_text(encoding="utf-8"))
    made = found.pop("provenance")
    for name, weights in made["checkpoints"].items():
        if weights == content["provenance"]["checkpoints"]["model"]:
            return made["parameters"] | {quantity: of[name] for quantity, of in found.items()}
    return None


def losses_by_kind(model: str) -> dict[str, str]:
    """What is stored of a model's losses on the natural inputs, with all heads: kind -> nats per token; empty where nothing is stored.

    Args:
        model: as in `stored_on`.

    Example:
        >>> [*losses_by_kind("hybrid")], losses_by_kind("OWNER/NAME")
        (['loss on prose', 'loss on code', 'loss on arithmetic', 'loss on retrieval'], {})
    """
    stored = stored_on(model)
    if stored is None:
        return {}
    losses = stored[0].removal.secondary["intact"].mean(1)
    return {f"loss on {kind}": f"{nats:.2f}" for kind, nats in zip(NATURAL_DOMAINS, losses, strict=True)}


def task_scores(model: str) -> dict[str, NDArray[np.float64]]:
    """What is stored of a model's scores on the tasks, with all heads: task -> (prompt,); empty where nothing is stored.

    Args:
        model: as in `stored_on`.

    Example:
        >>> {task: len(scores) for task, scores in task_scores("hybrid").items()}
        {'needle': 100, 'arithmetic': 100, 'recall': 100, 'copying': 100}
    """
    stored = stored_on(model)
    return dict(stored[0].recall.scores) if stored else {}


def task_claims(model: str, live: ByTask) -> list[Row]:
    """The rows of C4, C4a and C5, from what is stored of a model's weights; from a live run where nothing is.

    Args:
        model: as in `stored_on`.
        live: scores of this run.

    Example:
        >>> from staterank_utils.studies.by_task import ByTask
        >>> none = ByTask("hybrid", {}, {}, {}, {}, {}, None, {})
        >>> [row["claim"] for row in task_claims("hybrid", none)], task_claims("OWNER/NAME", none) == none.claims()
        (['C4', 'C4a', 'C5'], True)
    """
    stored = stored_on(model)
    if stored is None:
        return live.claims()
    return [row | {"model": model} for row in stored[1]["rows"] if row["claim"] in ("C4", "C4a", "C5")]


def over_seeds(models: Iterable[str], key: str) -> str:
    """On how many stored trainings of each model, which differ in the seed alone, a claim holds whole, as a sentence after a space.

    Args:
        models: as in `stored_name`; those of which nothing is stored, or nothing on the claim, are left out.
        key: of the claim.

    Returns:
        Empty where no model is stored.

    Example:
        >>> over_seeds(["hybrid", "OWNER/NAME"], "C2"), over_seeds(["OWNER/NAME"], "C2")
        (' Training seeds on which it holds fully: 3 of 3 (hybrid).', '')
    """
    said = []
    for model in models:
        if name := stored_name(model):
            recipe, _, _ = name.rpartition("-")
            rows = [
                row
                for file in sorted(LADDER.glob(f"{recipe}-[0-9]*.json"))
                for row in json.loads(file.read_text(encoding="utf-8"))["rows"]
                if row["claim"] == key
            ]
            holding = sum(row["verdict"] == HOLDS for row in rows)
            said += [f"{holding} of {len(rows)} ({model})"] if rows else []
    return f" Training seeds on which it holds fully: {'; '.join(said)}." if said else ""


def damage_source() -> str:
    """Where and when the costs of single heads, and C4b behind the first layer, were measured, as a sentence.

    Example:
        >>> damage_source()[:52]
        'The costs of single heads, and D behind the first la'
    """
    made = json.loads(DAMAGE_FILE.read_text(encoding="utf-8"))["provenance"]
    return f"The costs of single heads, and D behind the first layer, are of a stored run {_where(made)}."


def draws_source(made: Mapping[str, Any]) -> str:
    """Where and when random draws were added to those of a ladder's run, as a sentence after a space; empty where none were.

    Args:
        made: provenance of the run.

    Example:
        >>> draws_source(stored_on("pure")[1]["provenance"])[:45], draws_source({"checkpoints": {"model": "another"}})
        (' Random draws beyond those of the ladder are ', '')
    """
    added = json.loads(DRAWS_FILE.read_text(encoding="utf-8"))["provenance"]
    if made["checkpoints"]["model"] not in added["checkpoints"].values():
        return ""
    return f" Random draws beyond those of the ladder are of a stored run {_where(added)}."


def write_chapter(
    file: Path,
    *,
    parameters: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    found: Mapping[str, "RepeatedGroups | RepeatedRemoval | RepeatedRecall"],
    answer: str = "",
) -> None:
    """Store what a chapter says: its verdicts, where the numbers behind them come from, and what its own run found.

    Args:
        file: a JSON file.
        parameters: of the notebook.
        rows: verdicts.
        found: name of the model -> what the chapter shows of it.
        answer: of the chapter to its question, in a sentence.

    Raises:
        ValueError: the run does not agree with what is stored of the same weights.
        OSError: the file system's own error; an old result is then as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_chapter(Path(folder, "a.json"), parameters={}, rows=[], found={})
        ...     list(json.loads(Path(folder, "a.json").read_text()))
        ['provenance', 'answer', 'rows', 'stored', 'live']
    """
    for name, repeated in found.items():
        if repeated.made:
            repeated.check(name)
    content = {
        "provenance": provenance(parameters=parameters, checkpoints=embedded_folders([*found])),
        "answer": answer,
        "rows": [*rows],
        "stored": {name: repeated.made for name, repeated in found.items() if repeated.made},
        "live": {name: repeated.numbers() for name, repeated in found.items()},
    }
    write_json(file, content)


# ---------------------------------------------------------------- ranks


@dataclass(frozen=True)
class RepeatedGroups:
    """The stored ranks of a model, and a part of them measured again; or the ranks of a model of which nothing is stored.

    Attributes:
        shown: variant -> the stored ranks, or what was measured now: "end", "initial" and "shuffled", stored also some training steps.
        law: stored of the end; None where nothing is stored.
        turning: of the shown end.
        live: what was measured now, of the end.
        known_start: whether "initial" holds the very weights that training began with.
        made: provenance of the stored run; None where nothing is stored.

    Example:
        >>> list(RepeatedGroups.__dataclass_fields__)[:4]
        ['shown', 'law', 'turning', 'live']
    """

    shown: Mapping[str, Groups]
    law: Law | None
    turning: Turning
    live: Groups
    known_start: bool
    made: Mapping[str, Any] | None

    @property
    def initial(self) -> Groups | None:
        """The model before training, where its weights are known."""
        return self.shown["initial"] if self.known_start else None

    def same_labels(self) -> float:
        """Share of labels (high or low, per head and kind of input) that the live run gives as the shown one does."""
        end, d = self.shown["end"], self.live.d
        labels = [[is_high(of.rank[key].mean(0), d) for of in (self.live, end)] for key in self.live.rank]
        return float(np.mean([live == shown for live, shown in labels]))

    def held(self) -> tuple[int, int]:
        """How many live intervals hold the stored value, of how many: mean r/d and both shares per kind of input, over heads."""
        end, held = self.shown["end"], []
        for key in self.live.rank:
            live, shown = (of.relative(key).mean(0) for of in (self.live, end))
            for statistic in (np.mean, strata.share_outside, strata.two_group_share):
                interval = strata.bootstrap(lambda heads, f=statistic: float(f(heads)), live)
                held.append(interval.low <= statistic(shown) <= interval.high)
        return int(sum(held)), len(held)

    def numbers(self) -> dict[str, float]:
        """What this run found in short, which later runs are compared with: mean r/d and log-decay per kind of input."""
        live = self.live
        return {f"r/d, {domain}": float(live.relative(domain).mean()) for domain in live.rank} | {
            f"log-decay, {domain}": float(live.log_decay[domain].mean()) for domain in live.log_decay
        }

    def check(self, name: str) -> None:
        """Refuse a live run that is not what is stored: of intervals and of labels, too few agree.

        Raises:
            ValueError: fewer than `AGREE` do.
        """
        n_held, n_intervals = self.held()
        if (least := min(n_held / n_intervals, self.same_labels())) < AGREE:
            raise ValueError(
                f"this run of {name} agrees with what is stored of its weights to {least:.0%}, expected {AGREE:.0%}: are these prompts shorter or fewer than the quick profile's?"
            )

    def source(self, name: str) -> str:
        """Where the shown numbers come from, in words."""
        n_prompts, kinds = len(self.live.rank["prose"]), ", ".join(self.live.rank)
        live = f"{n_prompts} prompts of {self.live.n_tokens:,} tokens"
        if self.made is None:
            return f"{name} was measured by this run on {live} of each kind of input ({kinds})."
        shown, (n_held, n_intervals) = self.shown["end"], self.held()
        return (
            f"{name} was measured on {len(shown.rank['prose'])} prompts of {shown.n_tokens:,} tokens of each kind {_where(self.made)}. "
            f"This run repeated {kinds} on {live}: of its intervals over heads (mean r/d, share outside and two-group share, per kind) {n_held} of "
            f"{n_intervals} hold the stored value, and {self.same_labels():.0%} of the labels, high or low, are the same."
        )


def repeat_groups(
    name: str,
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    n_prompts: int,
    n_tokens: int,
    domains: Sequence[str] = DOMAINS,
    seed: int = 0,
    revision: str | None = None,
    device: str | None = None,
) -> RepeatedGroups:
    """Measure the ranks of a model beside what is stored of its weights; its controls only where nothing is stored.

    Args:
        name, revision, device: as they were given to `load_model`, by which controls are loaded.
        model, tokenizer: from `load_model` and `load_tokenizer`.
        n_prompts, n_tokens, domains: of the run now, as in `measure_groups`.
        seed: of the prompts and of the controls; what is stored is of seed 0.

    Raises:
        ValueError: as in `measure_groups`.

    Example:
        >>> from staterank_utils import load_tokenizer
        >>> model, tokenizer = load_model("hybrid"), load_tokenizer("hybrid")
        >>> found = repeat_groups("hybrid", model, tokenizer, n_prompts=1, n_tokens=256, domains=["prose"])
        >>> len(found.shown["end"].rank["prose"]), len(found.live.rank["prose"]), found.same_labels() > 0.9
        (16, 1, True)
    """

    def measured_now(of: PreTrainedModel) -> Groups:
        return measure_groups(of, tokenizer, n_prompts=n_prompts, n_tokens=n_tokens, domains=domains, seed=seed)

    def control(weights: Literal["initial", "shuffled"]) -> Groups:
        return measured_now(
            load_model(name, weights=weights, seed=seed, revision=revision, device=device, dtype=model.dtype)
        )

    live = measured_now(model)
    stored = None if seed else stored_on(name)
    if stored is not None:
        measured, content = stored
        return RepeatedGroups(
            measured.groups, measured.laws["end"], measured.turning, live, "initial" in measured.groups, content["provenance"],
        )  # fmt: skip
    shown = {"end": live, "initial": control("initial"), "shuffled": control("shuffled")}
    known = hasattr(model.config, "initialization")
    turning = measure_turning(model, tokenizer, n_prompts=min(2, n_prompts), n_tokens=n_tokens, seed=seed)
    return RepeatedGroups(shown, None, turning, live, known, None)


# ---------------------------------------------------------------- removal


@dataclass(frozen=True)
class Repeated(Generic[Study]):
    """What is stored of a model, and a part of it measured again; or what was measured of a model of which nothing is stored.

    Attributes:
        shown: the stored one, or what was measured now.
        live: what was measured now.
        seed: of the training, "?" where it is not known.
        made: provenance of the stored one; None where nothing is stored.

    Example:
        >>> list(Repeated.__dataclass_fields__)
        ['shown', 'live', 'seed', 'made']
    """

    shown: Study
    live: Study
    seed: str
    made: Mapping[str, Any] | None


class RepeatedRemoval(Repeated[Removal]):
    """The removal of heads from a model, stored and measured again.

    Example:
        >>> removal = load_measured("hybrid-text-0")[0].removal
        >>> RepeatedRemoval(removal, removal, "0", None).source("hybrid")
        'hybrid was measured by this run, 16 windows of each text.'
    """

    def curves(self, scheme: str, orders: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Curves of the shown removal with those of random heads first, and of the live one, None where it is the shown one."""
        shown = {order: self.shown.curve(scheme, order) for order in (RANDOM, *orders)}
        return shown, {order: self.live.curve(scheme, order) for order in orders} if self.made else None

    def numbers(self) -> dict[str, float]:
        """What this run found in short, which later runs are compared with: the loss of every arm, nats per token."""
        return {"intact": float(self.live.intact.mean())} | {
            arm.label: float(nats.mean()) for arm, nats in zip(self.live.arms, self.live.nats, strict=True)
        }

    def check(self, name: str) -> None:
        """Refuse a live run whose losses are not those that are stored of the same windows and heads.

        Raises:
            ValueError: no arm was repeated, or a loss differs by more than `CLOSE`.
        """
        n_arms, difference = self.live.repeated(self.shown)
        if not difference <= CLOSE:
            raise ValueError(
                f"{n_arms} arms of {name} were repeated on stored windows; the largest difference of a loss is {difference} nats per token, expected at most {CLOSE}"
            )

    def source(self, name: str) -> str:
        """Where the shown numbers come from, in words."""
        if self.made is None:
            return f"{name} was measured by this run, {_several(self.live.n_windows, 'window')} of each text."
        n_arms, difference = self.live.repeated(self.shown)
        return (
            f"{name} was measured on {_several(self.shown.n_windows, 'window')} of each text {_where(self.made)}. "
            f"This run repeated {n_arms} arms on {self.live.n_windows} of them: no loss on books differs "
            f"by more than {difference:.0e} nats per token.{draws_source(self.made)}"
        )


def repeat_removal(name: str, model: PreTrainedModel, texts: Texts, *, sizes: Sizes, seed: int = 0) -> RepeatedRemoval:
    """Measure the removal of heads from a model, as far as `sizes` say, beside what is stored of its weights.

    Orders and random heads are then those of the stored removal.

    Args:
        name: as it was given to `load_model`.
        model, texts, sizes: as in `measure_removal`.
        seed: of the texts and of random heads; what is stored is of seed 0.

    Example:
        >>> from staterank_utils.studies.removal import FEW
        >>> from staterank_utils.studies.texts import draw_texts
        >>> from staterank_utils import load_tokenizer
        >>> model, tokenizer = load_model("pure"), load_tokenizer("pure")
        >>> texts = draw_texts(tokenizer, n_windows=1, n_calibration=2)  # windows of another length have other losses
        >>> from dataclasses import replace
        >>> few = replace(FEW, orders=("high rank",), shares=(0.25,))
        >>> n_arms, difference = (again := repeat_removal("pure", model, texts, sizes=few)).live.repeated(again.shown)
        >>> n_arms, difference < 1e-3
        (6, True)
    """
    stored = None if seed else stored_on(name)
    if stored is None:
        live = measure_removal(model, texts, name=f"{Path(name).name}, seed {seed}", sizes=sizes)
        return RepeatedRemoval(live, live, "?", None)
    measured, content = stored
    live = measure_removal(model, texts, name=measured.name, sizes=sizes, ordered=measured.removal)
    return RepeatedRemoval(measured.removal, live, f"{measured.training['seed']}", content["provenance"])


# ---------------------------------------------------------------- recall


@dataclass(frozen=True)
class RepeatedRecall(Repeated[Recall]):
    """The recall of a model, stored and measured again.

    Attributes:
        removal: losses without the heads that recall was measured without, stored or of this run.

    Example:
        >>> measured, _ = load_measured("hybrid-text-0")
        >>> RepeatedRecall(measured.recall, measured.recall, "0", None, measured.removal).source("hybrid")
        'hybrid was measured by this run, 8 passages of each text.'
    """

    removal: Removal

    def difference(self) -> float:
        """The largest difference of a gain from the stored one on the same copy of books, nats per token."""
        n_copies = next(iter(self.live.gains.values())).shape[1] // len(LOSS_TEXTS)
        where = [self.shown.gaps.index(gap) for gap in self.live.gaps]
        return float(
            max(
                np.abs(gains[:, :n_copies] - self.shown.gains[label][where, :n_copies]).max()
                for label, gains in self.live.gains.items()
            )
        )

    def numbers(self) -> dict[str, float]:
        """What this run found in short, which later runs are compared with: gains in nats per token, and mean r/d."""
        return {f"gain, {label}": float(gains.mean()) for label, gains in self.live.gains.items()} | {
            f"r/d, {label}": float(rank.mean() / self.live.d) for label, rank in self.live.cap_rank.items()
        }

    def check(self, name: str) -> None:
        """Refuse a live run whose gains are not those that are stored of the same copies.

        Raises:
            ValueError: a gain differs by more than `CLOSE`.
        """
        if not (difference := self.difference()) <= CLOSE:
            raise ValueError(
                f"gains of {name} differ by {difference} nats per token from those stored of the same copies, expected at most {CLOSE}"
            )

    def source(self, name: str) -> str:
        """Where the shown numbers come from, in words."""
        n_copies, live = (of.gains["intact"].shape[1] // len(LOSS_TEXTS) for of in (self.shown, self.live))
        if self.made is None:
            return f"{name} was measured by this run, {_several(live, 'passage')} of each text."
        return (
            f"{name} was measured on {_several(n_copies, 'passage')} of each text {_where(self.made)}. "
            f"This run repeated {len(self.live.gains)} arms on {live} of them: no gain on books differs by more "
            f"than {self.difference():.0e} nats per token."
        )


def repeat_recall(
    name: str,
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    n_copies: int,
    n_prompts: int,
    n_tokens: int,
    caps: Sequence[int],
    gaps: Sequence[int],
    seed: int = 0,
) -> RepeatedRecall:
    """Measure what caps on half-lives take from recall, and a quarter of the heads of every layer, beside what is stored of a model's weights.

    Of a model of which nothing is stored, random heads are removed as well, in four draws.

    Args:
        name: as it was given to `load_model`.
        model, tokenizer: from `load_model` and `load_tokenizer`.
        n_copies: of each text, at most 8.
        n_prompts, n_tokens, caps, gaps, seed: of the run now, as in `measure_caps`; what is stored is of seed 0.

    Raises:
        ValueError: as in `measure_caps`.

    Example:
        >>> from staterank_utils import load_tokenizer
        >>> model, tokenizer = load_model("hybrid"), load_tokenizer("hybrid")
        >>> found = repeat_recall("hybrid", model, tokenizer, n_copies=1, n_prompts=1, n_tokens=160, caps=[16], gaps=[64])
        >>> found.difference() < 1e-3, found.shown.gains["intact"].shape
        (True, (5, 16))
    """
    texts = draw_texts(tokenizer, seed=seed).few_copies(n_copies)
    texts = replace(texts, windows=texts.windows[:: len(texts.windows) // len(LOSS_TEXTS)])
    live = measure_caps(
        model, tokenizer, texts, caps=caps, gaps=gaps, n_prompts=n_prompts, n_tokens=n_tokens, seed=seed
    )
    stored = None if seed else stored_on(name)
    removal = stored[0].removal if stored else measure_removal(model, texts, name=name, sizes=QUARTER)
    quarter = [f"{order}, {share:.1%}, {LAYERS}" for order in (LOW, HIGH) for share in QUARTER.shares or ()]
    gains = dict(live.gains)
    for label, heads in recall_arms(removal).items():
        if label in quarter or not stored:
            with ablate_heads(model, heads):
                gains[label] = induction_gains(model, texts, gaps)
    live = replace(live, gains=gains)
    if stored is None:
        return RepeatedRecall(live, live, "?", None, removal)
    measured, content = stored
    return RepeatedRecall(measured.recall, live, f"{measured.training['seed']}", content["provenance"], removal)
