"""A model to hand on: pruned by a rule, with what that costs, in a folder whose card says both."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import PreTrainedModel

from staterank_utils import __version__
from staterank_utils.architectures import linear_layers, state_size
from staterank_utils.budget import in_words
from staterank_utils.evaluation import token_nats
from staterank_utils.fla_cpu import is_fla
from staterank_utils.markdown import markdown_table
from staterank_utils.pruned import plain_model, removed_heads
from staterank_utils.pruning import prune_heads
from staterank_utils.results import check_writable, requirement, whole_or_not
from staterank_utils.selection import Measure, measure_heads, random_heads, saturation_scores, select_heads
from staterank_utils.strata import Estimate, bootstrap
from staterank_utils.studies.shrinking import Footprint, footprint
from staterank_utils.studies.texts import LOSS_TEXTS, draw_texts, over_texts
from staterank_utils.surgery import all_heads
from staterank_utils.tracing import check_even

Measures = Mapping[str, Measure]


def _random(measures: Measures, d: int) -> Measure:
    order = random_heads(list(measures["effective rank"]), len(measures["effective rank"]), seed=0)
    return {head: float(place) for place, head in enumerate(order)}


# Rule -> (measures of all heads, largest possible rank) -> scores; the highest go first.
RULES: Mapping[str, Callable[[Measures, int], Measure]] = {
    "rank": lambda measures, d: measures["effective rank"],
    "low-rank": lambda measures, d: {head: -rank for head, rank in measures["effective rank"].items()},
    "joint": lambda measures, d: saturation_scores(measures["effective rank"], measures["nuclear norm"], d=d),
    "norm": lambda measures, d: measures["nuclear norm"],
    "half-life": lambda measures, d: measures["log-decay"],
    "random": _random,
}
SAID = {
    "rank": "those of the highest effective rank",
    "low-rank": "those of the lowest effective rank",
    "joint": "those of the highest saturation, rank and nuclear norm together (arXiv:2602.02195, Eq. 14, alpha = 0.5)",
    "norm": "those of the largest nuclear norm",
    "half-life": "those of the longest half-life",
    "random": "at random (seed 0)",
}


@dataclass(frozen=True)
class Cost:
    """What removing heads costs.

    Attributes:
        rule: how heads were chosen, one of `RULES`.
        share: of all heads that was asked for.
        per_layer: whether every layer lost the same share.
        n_heads: before.
        removed: decoder layer -> heads.
        intact, without: nats per token, (window,), those of held-out books first and then as many of code.
        window: tokens of each.
        before, after: what the model and its cache hold.

    Example:
        >>> nothing = Footprint(4, 0, 0, 0, 8, 0)
        >>> Cost("rank", 0.5, False, 2, {0: [1]}, np.ones(2), np.full(2, 1.5), 64, nothing, nothing).added()["books"].point
        0.5
    """

    rule: str
    share: float
    per_layer: bool
    n_heads: int
    removed: Mapping[int, list[int]]
    intact: NDArray[np.float64]
    without: NDArray[np.float64]
    window: int
    before: Footprint
    after: Footprint

    def added(self) -> dict[str, Estimate]:
        """Nats per token that the removal adds on each text, and their mean over both, with 95 % intervals over windows."""
        added = self.without - self.intact
        parts = dict(zip(LOSS_TEXTS, np.split(added, len(LOSS_TEXTS)), strict=True))
        of_text = {name: bootstrap(float, part, of_means=True) for name, part in parts.items()}
        return of_text | {"mean": over_texts(added)}


def check_pruning(model: PreTrainedModel, *, rule: str, share: float, per_layer: bool = False) -> None:
    """Refuse what `prune_by_rule` cannot do, before anything is measured.

    Args:
        model: whole, or its outline without weights (`model_outline`).
        rule, share, per_layer: as there.

    Raises:
        ValueError: as there.

    Example:
        >>> from staterank_utils.models import model_outline
        >>> check_pruning(model_outline("hybrid"), rule="rank", share=1.5)
        Traceback (most recent call last):
            ...
        ValueError: the share of heads to remove lies between 0 and 1, got 1.5
    """
    layers = linear_layers(model)
    if rule not in RULES:
        raise ValueError(f"there is no rule {rule!r}: choose from {', '.join(RULES)}")
    if not 0 < share < 1:
        raise ValueError(f"the share of heads to remove lies between 0 and 1, got {share}")
    if not layers[0].weights:
        raise ValueError(
            f"heads of {layers[0].name} cannot be removed exactly, since {layers[0].kept_whole}: ablate them instead"
        )
    check_even(layers)
    n_heads, of = layers[0].n_heads, "the {} heads of a layer"
    if not per_layer:
        n_heads, of = n_heads * len(layers), "{} heads"
    if not 0 < round(share * n_heads) < n_heads:
        wrong, other = ("not one", "larger") if round(share * n_heads) == 0 else ("all", "smaller")
        raise ValueError(f"{share:.3g} of {of.format(n_heads)} rounds to {wrong}: ask for a {other} share")


def prune_by_rule(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    rule: str,
    share: float,
    per_layer: bool = False,
    n_windows: int = 4,
    window: int = 512,
    n_calibration: int = 4,
) -> tuple[PreTrainedModel, Cost]:
    """Remove a share of the heads by a rule, and measure what it costs on text.

    Heads are measured on technical prose and code; losses are taken on held-out books and on other code. The texts come with the package
    and are in English and Python: for another language, choose heads with `measure_heads` on texts of it.

    Args:
        model, tokenizer: from `load_model` and `load_tokenizer`.
        rule: one of `RULES`; each names the heads that go first.
        share: of all heads, in (0, 1), rounded to whole heads.
        per_layer: the same share of every layer.
        n_windows, window: windows per text and their tokens.
        n_calibration: prompts per text.

    Returns:
        The smaller model, and the cost.

    Raises:
        ValueError: an unknown rule, a share outside (0, 1) or that rounds to no head or to all, a model whose layers have different
            numbers of heads; or as in `prune_heads`.

    Example:
        >>> from staterank_utils import load_model, load_tokenizer
        >>> sizes = {"n_windows": 1, "window": 64, "n_calibration": 1}
        >>> pruned, cost = prune_by_rule(load_model("pure"), load_tokenizer("pure"), rule="rank", share=0.25, **sizes)
        >>> sum(map(len, cost.removed.values())), cost.after.recurrent / cost.before.recurrent
        (48, 0.75)
    """
    check_pruning(model, rule=rule, share=share, per_layer=per_layer)
    texts = draw_texts(tokenizer, n_windows=n_windows, window=window, n_copies=0, copy=1, n_calibration=n_calibration)
    scores = RULES[rule](measure_heads(model, texts.calibration), state_size(model))
    chosen = select_heads(scores, share=share, per_layer=per_layer, model=model)
    pruned = prune_heads(model, chosen)
    intact, without = (token_nats(each, texts.windows).mean(1) for each in (model, pruned))
    return pruned, Cost(
        rule, share, per_layer, len(all_heads(model)), chosen, intact, without, window, footprint(model), footprint(pruned)
    )  # fmt: skip


CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
{known}tags: [linear-attention, pruned, state-rank]
---

# {base} without {n_removed} of its {n_heads} linear-attention heads

{gone} of the heads were removed, {rule}{layers}. The recurrent state of a prompt takes {after:,} bytes in place of {before:,},
and the weights, in {dtype}, are {parameters:z.1%} fewer. Nothing was trained afterwards.{uneven}

The licence of {base} holds for these weights too.

## What it costs

Loss on passages of public-domain books and of Python code, which {base} may have been trained on, in nats per token, over {n_windows} windows of
{window} tokens per text, with 95 % intervals over windows:

{cost}

A model that was not trained on English books or Python code may lose more, or less, on what it was trained on.

## How to load it

{load}

## What was removed

{table}

Heads of {base}{revision} are named by the indices that they had before any was removed. {ordered}Made with staterank-utils {version} and transformers {transformers}.
"""
LOAD = """\
```python
{first}from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {folder}  # where this card lies, or the name of its repository on a hub
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

{note}"""


def model_card(
    base: str,
    cost: Cost,
    *,
    revision: str | None = None,
    licence: str | None = None,
    folder: str = ".",
    plain: bool = False,
    even: bool = True,
    dtype: str = "float32",
    of_fla: bool = False,
) -> str:
    """The card of a pruned model, as Markdown with the front matter of a model hub.

    Args:
        base: name of the whole model: OWNER/NAME of a hub, or of a folder.
        cost: of the removal.
        revision: commit or tag of the whole model.
        licence: of the whole model, by its name on a hub, where it is known.
        folder: where the model is loaded from.
        plain: whether it loads without this package.
        even: whether all layers keep as many heads.
        dtype: of the weights.
        of_fla: whether its class is one of flash-linear-attention.

    Example:
        >>> nothing = Footprint(4, 0, 0, 0, 8, 0)
        >>> cost = Cost("rank", 0.5, False, 2, {0: [1]}, np.ones(2), np.full(2, 1.5), 64, nothing, nothing)
        >>> model_card("OWNER/NAME", cost).splitlines()[7]
        '# OWNER/NAME without 1 of its 2 linear-attention heads'
    """
    means = {
        name: [float(part.mean()) for part in np.split(values, len(LOSS_TEXTS))]
        for name, values in (("intact", cost.intact), ("without", cost.without))
    }
    added = cost.added()
    rows: list[tuple[str, ...]] = [
        (text, f"{means['intact'][i]:.3f}", f"{means['without'][i]:.3f}", f"{added[text]:.3f}")
        for i, text in enumerate(LOSS_TEXTS)
    ]
    rows.append(("mean", *(f"{np.mean(of):.3f}" for of in means.values()), f"{added['mean']:.3f}"))
    n_removed = sum(map(len, cost.removed.values()))
    known = (f"license: {licence}\n" if licence else "") + (f"base_model: {base}\n" if base.count("/") == 1 else "")
    note = (
        "It is a model of a stock class and needs no other package. Without a GPU, flash-linear-attention must not be installed: transformers would call "
        "its kernels all the same, which need one."
    )
    if not plain:
        note = (
            f"`import staterank_utils` (`pip install '{requirement()}'`) makes the type of the model known; without it, transformers says that it "
            "does not know it. No code is loaded with the weights."
        )
    if of_fla:
        note += (
            " The package flash-linear-attention must be installed. With transformers 5.24 its models lose their cache in `generate` and make other tokens: "
            "pass `use_cache=False` there."
        )
    load = LOAD.format(
        first="" if plain else "import staterank_utils  # makes the model's type known\n",
        folder=repr(folder),
        note=note,
    )
    return CARD.format(
        base=base, known=known, n_removed=n_removed, n_heads=cost.n_heads, gone=f"{n_removed / cost.n_heads:.1%}", rule=SAID[cost.rule],
        layers=", the same share of every layer" if cost.per_layer else "", before=cost.before.recurrent, after=cost.after.recurrent,
        parameters=1 - cost.after.parameters / cost.before.parameters, n_windows=len(cost.intact) // len(LOSS_TEXTS), window=cost.window,
        cost=markdown_table(("text", "whole", "without the heads", "added"), rows), load=load,
        table=markdown_table(("layer", "heads"), [(f"{layer}", ", ".join(map(str, heads))) for layer, heads in cost.removed.items()]),
        revision=f" at revision {revision}" if revision else "", version=__version__, transformers=transformers.__version__, dtype=dtype,
        ordered="" if cost.rule == "random" else "They were ordered on technical prose and Python code. ",
        uneven="" if even else "\nLayers keep different numbers of heads, so staterank-utils cannot trace this model: trace the whole one.",
    )  # fmt: skip


def check_room(outline: PreTrainedModel, folder: Path, *, share: float, dtype: torch.dtype | None = None) -> int:
    """Refuse a disk that cannot hold a smaller model, before anything is measured.

    Args:
        outline: the whole model, with weights or without.
        folder: of the smaller one, which need not be there.
        share: of heads that go; a model without all of that share's weights would be the smallest.
        dtype: in which weights are written; None: that of the model.

    Returns:
        Bytes that the smaller model takes at least.

    Raises:
        PermissionError: the folder cannot be written.
        OSError: too little room.

    Example:
        >>> from staterank_utils import load_model
        >>> in_words(check_room(load_model("pure"), Path("smaller"), share=0.25))
        '58.8 MB'
    """
    item = (dtype or outline.dtype).itemsize
    needed = int((1 - share) * item * sum(parameter.numel() for parameter in outline.parameters()))
    if (free := shutil.disk_usage(check_writable(folder)).free) < needed:
        raise OSError(
            f"{folder} has room for {in_words(free)}, and the smaller model needs at least {in_words(needed)}: choose another disk"
        )
    return needed


def write_pruned(
    folder: Path | str,
    pruned: PreTrainedModel,
    tokenizer: Any,
    cost: Cost,
    *,
    base: str,
    revision: str | None = None,
    licence: str | None = None,
    plain: bool = False,
) -> None:
    """Write a pruned model, its tokenizer and its card into a folder, whole or not at all.

    Args:
        folder: that is not there yet; those above it are made.
        pruned, cost: from `prune_by_rule`.
        tokenizer: of the whole model.
        base, revision, licence: of the whole model, for the card.
        plain: write it as `plain_model` makes it, which loads without this package.

    Raises:
        FileExistsError: the folder is there.
        ValueError: a model that was not pruned; or with `plain`, as in `plain_model`.
        OSError: the file system's own error.

    Example:
        >>> import tempfile
        >>> from staterank_utils import load_model, load_tokenizer
        >>> sizes = {"n_windows": 1, "window": 64, "n_calibration": 1}
        >>> pruned, cost = prune_by_rule(load_model("pure"), load_tokenizer("pure"), rule="rank", share=0.25, **sizes)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_pruned(Path(folder, "smaller"), pruned, load_tokenizer("pure"), cost, base="pure")
        ...     (Path(folder, "smaller") / "README.md").exists()
        True
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: choose another folder, or remove it")
    if not removed_heads(pruned.config.get_text_config()):
        raise ValueError("no heads were removed from this model: prune it first (prune_by_rule)")
    model = plain_model(pruned) if plain else pruned
    if plain:  # it may have more key heads
        cost = replace(cost, after=footprint(model))
    even = len({layer.n_heads for layer in linear_layers(model)}) == 1
    card = model_card(
        base,
        cost,
        revision=revision,
        licence=licence,
        folder=folder.name,
        plain=plain,
        even=even,
        dtype=str(model.dtype).removeprefix("torch."),
        of_fla=is_fla(model),
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_or_not(folder) as partial:
        try:
            model.save_pretrained(partial)
        except SafetensorError as error:  # which is no OSError
            raise OSError(f"could not write the weights to {folder}: {error}") from error
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
