"""The page of the ladder: tables and figures made from the stored results of every model that was trained and measured."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from staterank_utils import plotting, strata
from staterank_utils.claims import (
    CLAIMS,
    ENOUGH_SEEDS,
    FAILS,
    HOLDS,
    NOT_MEASURED,
    NOT_TESTABLE,
    PARTLY,
    SECOND,
    THIRD,
    has_few_seeds,
)
from staterank_utils.markdown import brief_table, markdown_table
from staterank_utils.models import EMBEDDED
from staterank_utils.results import STORED, whole_or_not, write_table
from staterank_utils.selection import PAPER_SHARE
from staterank_utils.strata import Estimate
from staterank_utils.studies import ladder
from staterank_utils.studies.by_task import mastered
from staterank_utils.studies.groups import Row, half_lives_from, shares
from staterank_utils.studies.ladder import Measured, by_design, ladder_claims
from staterank_utils.studies.removal import HIGH, JOINT, LAYERS, LOW, MODEL, PROTECTED, RANDOM, SCHEMES
from staterank_utils.tasks import NATURAL_DOMAINS
from training.recipes import LINEAR, RECIPES

CANDIDATES = ("tasks10", "text", "wide")  # in this order; the first pair that holds C1 and C3 is embedded
SHORT = {HOLDS: "holds", PARTLY: "in part", FAILS: "no", NOT_TESTABLE: "–", NOT_MEASURED: "–"}
DOSE = 0.25
DESIGNED = {
    "hybrid-softmaxfirst": " (softmax layers first)",
    "hybrid-default": " (gates of the class, where few heads are full)",
}
FIGURES = {MODEL: "ladder-model", LAYERS: "ladder-layers", PROTECTED: "ladder-protected"}
# What the lines of the trajectories are: the data that hybrids of the same size learnt from, and how their gates began.
PATHS: Mapping[str, Mapping[str, Any]] = {
    "text": {"color": plotting.BLUE, "linestyle": "-", "marker": "o"},
    "tasks63": {"color": plotting.ORANGE, "linestyle": "--", "marker": "s"},
    "narrow": {"color": plotting.GREEN, "linestyle": "-.", "marker": "^"},
    "default": {"color": plotting.PURPLE, "linestyle": ":", "marker": "v"},
}


@cache
def stored_models() -> dict[str, tuple[Measured, dict[str, Any]]]:
    """Every stored model, in the order of the recipes."""
    stored = ladder.stored_models()
    return {name: stored[name] for name in RECIPES if name in stored}


def first_pair() -> dict[str, dict[str, Any]]:
    """Verdicts of the pair that was embedded before the ladder, by model."""
    rows = json.loads((STORED / "first_pair.json").read_text(encoding="utf-8"))["rows"]
    return {f"{name}-9m": {"rows": [row for row in rows if row["model"] == name]} for name in EMBEDDED}


@cache
def over_models() -> list[Row]:
    """The rows that several stored models decide."""
    return ladder_claims(_measured())


def _measured() -> dict[str, Measured]:
    return {name: measured for name, (measured, _) in stored_models().items()}


def designs() -> dict[str, list[Measured]]:
    """Stored models that differ in the seed alone: KIND-DATA -> one per seed."""
    return {"-".join(design): list(seeds.values()) for design, seeds in by_design(_measured()).items()}


@contextmanager
def kept_figure(
    pictures: Path, numbers: Path, name: str, n_rows: int, n_columns: int, *, height: float
) -> Iterator[NDArray[Any]]:
    """Panels to draw in, kept at the end of the block as PICTURES/NAME.png, and what they show as NUMBERS/NAME.csv."""
    with plt.rc_context():
        plotting.use_style()
        figure, axes = plotting.panel_grid(n_rows, n_columns, width=9.5, row_height=height)
        yield axes
        plotting.legend_above(figure)
        with whole_or_not(pictures / f"{name}.png") as whole:
            figure.savefig(whole, format="png")
        rows = plotting.figure_data(figure)
        plt.close(figure)
    write_table(numbers / f"{name}.csv", rows)


def ladder_figures(pictures: Path, numbers: Path) -> None:
    """Draw the figures of the page, and write the numbers behind each as CSV.

    Args:
        pictures, numbers: folders that exist.
    """
    by_name, kept = designs(), partial(kept_figure, pictures, numbers)
    n_rows, n_columns = plotting.panel_rows(len(by_name))
    for scheme, name in FIGURES.items():
        with kept(name, n_rows, n_columns, height=2.3) as axes:
            for ax in axes.flat[len(by_name) :]:
                ax.set_axis_off()
            for ax, (design, seeds) in zip(axes.flat, by_name.items(), strict=False):
                _doses(ax, seeds, scheme)
                ax.set_title(design, fontsize="small")
            for ax in axes[:, 0]:
                ax.set_ylabel("added nats")
    with kept("ladder-shares", 1, 2, height=3.4) as axes:
        for ax, (label, statistic) in zip(
            axes.flat, {"share outside (0.2, 0.8)": strata.share_outside, "two-group share": strata.two_group_share}.items(), strict=True
        ):  # fmt: skip
            for data, looks in PATHS.items():
                for seed, measured in enumerate(by_name.get(f"hybrid-{data}", ())):
                    path, d = measured.trajectory, measured.groups["end"].d
                    values = [statistic(rank / d) for rank in path.rank]
                    ax.plot(path.steps, values, label=data if not seed else None, markersize=4, **looks)
            ax.set_xscale("symlog", linthresh=20)
            ax.set(title=label, xlabel="training step", ylim=(0, 1))
    with kept("ladder-half-lives", 1, len(PATHS), height=3.0) as axes:
        for ax, data in zip(axes.flat, PATHS, strict=True):
            for measured in by_name.get(f"hybrid-{data}", ())[:1]:
                path = measured.trajectory
                quantiles = np.quantile(half_lives_from(path.log_decay), [0.1, 0.5, 0.9], axis=1)
                ax.plot(path.steps, quantiles[1], label="median head", color=plotting.BLUE, marker="o", markersize=4)
                ax.fill_between(
                    path.steps,
                    quantiles[0],
                    quantiles[2],
                    label="10 % to 90 % of heads",
                    color=plotting.BLUE,
                    alpha=0.2,
                    linewidth=0,
                )
            ax.set_xscale("symlog", linthresh=20)
            ax.set(title=data, xlabel="training step", yscale="log")
        axes[0, 0].set_ylabel("half-life, tokens")


def _doses(ax: Axes, seeds: Iterable[Measured], scheme: str) -> None:
    """Added nats by dose, one line per seed and order; random draws as their mean."""
    for number, measured in enumerate(seeds):
        removal = measured.removal
        for order in (RANDOM, LOW, HIGH):
            curve = removal.curve(scheme, order)
            looks = {"linewidth": 1.2, "markersize": 2.5, **plotting.ORDER_LOOKS.get(order, plotting.RANDOM_LOOK)}
            label = {RANDOM: "random heads", LOW: "lowest ranks", HIGH: "highest ranks"}[order]
            ax.plot(
                [0.0, *(100 * share for share in curve)], [0.0, *(estimate.point for estimate in curve.values())],
                label=None if number else label, **looks,
            )  # fmt: skip
    ax.set(xlim=(0, 40), ylim=(-0.1, 3.0), xlabel="heads removed, %")


def _what_decides() -> str:
    """What the first layer and the gates do to the asymmetry, in sentences."""
    by_name = designs()
    groups = {LOW: "the lowest ranks", HIGH: "the highest", RANDOM: "random heads"}

    def costs(models: Iterable[Measured], scheme: str) -> dict[str, list[float]]:
        return {group: [of.removal.cost(scheme, order, DOSE) for of in models] for order, group in groups.items()}

    said = {
        "hybrid-text": "Layer 0 linear, gates broad",
        "hybrid-softmaxfirst": "Layer 0 softmax, gates broad",
        "hybrid-narrow": f"Layer 0 linear, all gates at first with a half-life of {SECOND['C1d'].numbers['half_life']} tokens",
        "hybrid-default": "Layer 0 linear, gates as the class of Qwen3-Next sets them, half-lives mostly under a token",
        "hybrid-deltanet": "Layer 0 linear, nothing decays",
    }
    lines = []
    for design, what in said.items():
        seeds = by_name[design]
        means = ", ".join(f"{np.mean(cost):.2f} without {group}" for group, cost in costs(seeds, LAYERS).items())
        beyond = [of.removal.beyond_random() for of in seeds]
        lines.append(
            f"- *{what}* (`{design}`, {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}): nats per token, {means}; the D of rank, without "
            f"its sign, is larger than that of {_range(beyond, '.0%')} of random orders within layers."
        )
    linear_first = [
        of
        for name, of in _measured().items()
        if name.startswith("hybrid")
        and (RECIPES[name].gates, RECIPES[name].rule) == ("broad", "gated delta")
        and RECIPES[name].layer_types[0] == LINEAR
    ]
    ranges = ", ".join(
        f"{_range(cost, '.2f')} without {group}" for group, cost in costs(linear_first, PROTECTED).items()
    )
    lines.append(
        f"- *Layer 0 linear but protected, gates broad* ({len(linear_first)} hybrids, a quarter of all heads from the other layers): {ranges}."
    )
    return "\n".join(lines)


def _of_direction() -> str:
    """What the seeds say that were trained after C12 and C13 were registered, in sentences."""
    rows = {row["claim"]: row for row in over_models() if row["claim"] in ("C12", "C13")}
    said = {
        "C12": "high-rank heads are spare where layer 0 is a softmax layer",
        "C13": "they are the costly ones with the gates of the class",
    }
    parts = [
        f"{what} ({key}): **{rows[key]['verdict']}**{rows[key]['note']}" for key, what in said.items() if key in rows
    ]
    within = [
        f"`{row['model']}` **{row['verdict']}**{row['note']}"
        for data in (THIRD[key].numbers["design"] for key in said)
        for row in over_models()
        if row["claim"] == "C4b" and row["model"] == f"hybrid-{data}"
    ]
    return (
        f"By the seeds that were trained after these claims were registered: {'; '.join(parts)}. That rank has an effect within layers, on all "
        f"seeds (C4b): {', '.join(within)}."
    )


def _by_needs(rows: Iterable[Mapping[str, Any]]) -> dict[str | None, list[str]]:
    """Designs by which heads they need, by their rows of C4b: those of the "low" or of the "high" ranks, or None."""
    groups: dict[str | None, list[str]] = {"low": [], "high": [], None: []}
    for row in rows:
        if row["claim"] == "C4b":
            signs = {np.sign(of.removal.area(LAYERS)) for of in designs()[row["model"]]}
            holds = row["verdict"] == HOLDS and len(signs) == 1
            groups[("low" if signs == {-1.0} else "high") if holds else None].append(row["model"])
    return groups


def _beyond_layers(*, enough: int = 1) -> str:
    """Where C4b holds, and in which direction, in a sentence.

    Args:
        enough: training seeds that a design must have to be named.
    """
    groups, n_seeds = _by_needs(over_models()), {name: len(of) for name, of in designs().items()}
    said = {"in the paper's direction": groups["low"], "in the other": groups["high"]}
    parts = []
    for where, names in said.items():
        counted = [
            f"`{name}` ({n} {'seed' if n == 1 else 'seeds'})" for name in names if (n := n_seeds[name]) >= enough
        ]
        parts.append(f"{where}: {', '.join(counted) or 'none'}")
    return "; ".join(parts)


def _joint_protected() -> str:
    """On how many models the paper's score beats every random draw where layer 0 is protected, in a sentence."""
    better: dict[str, list[bool]] = {}
    for name, of in _measured().items():
        share = of.removal.nearest(PROTECTED, JOINT, PAPER_SHARE)
        draws = of.removal.draws(PROTECTED, share).mean(1)
        better.setdefault(name.split("-")[0], []).append(
            bool(of.removal.added(PROTECTED, JOINT, share).mean() < draws.min())
        )
    counts = " and ".join(f"{sum(beats)} of {len(beats)} {kind} models" for kind, beats in better.items())
    return (
        f"With layer 0 protected and {PAPER_SHARE:.1%} of all heads removed, the paper's score costs less than every random draw in {counts} "
        "(exploratory; models that share a design are no independent draws)."
    )


def _random_groups() -> str:
    """On how many models random groups fail C7 as well, in a sentence."""
    enough = [of.removal.restoring_share(RANDOM) for of in _measured().values() if of.removal.groups["high"].size]
    limit = SECOND["C7"].numbers["holds"]
    return f"Groups of as many random heads do not stand in for each other either, by the rule of C7, in {sum(share > limit for share in enough)} of {len(enough)} models."


def needed() -> dict[str, list[str]]:
    """Which heads a design needs, by C4b, and the designs: of those with enough seeds alone."""
    groups = _by_needs(row for row in over_models() if not has_few_seeds(row))
    said = {
        "those of lowest rank": groups["low"],
        "those of highest rank": groups["high"],
        "and no effect of rank beyond the choice of layers was shown": groups[None],
    }
    return {what: [f"`{name}`{DESIGNED.get(name, '')}" for name in names] for what, names in said.items()}


def _without_decay() -> str:
    """What becomes of rank where nothing decays, in sentences."""
    by_name = designs()
    gated, still = by_name["hybrid-text"], by_name["hybrid-deltanet"]
    ranks = np.concatenate([of.groups["end"].relative("prose").mean(0) for of in still])
    losses = [np.mean([of.training[ladder.HELD_OUT] for of in seeds]) for seeds in (gated, still)]
    taken = [np.mean([of.recall.taken().point for of in seeds]) for seeds in (gated, still)]
    others = [shares(of.groups["end"])["two groups"] for of in by_name["hybrid-default"]]
    [row] = [row for row in over_models() if row["claim"] == "C10"]
    return (
        f"In the hybrid in which nothing decays, {np.mean(ranks > 0.8):.0%} of {ranks.size} heads have a rank over 0.8 d, and the lowest has "
        f"{ranks.min():.2f} d: the law says full, and full they are. There are no groups, and held-out text costs {losses[1]:.3f} bits per byte "
        f"in place of {losses[0]:.3f}. That the groups need decay (C10): **{row['verdict']}**{row['note']}. The cap on half-lives takes "
        f"{taken[1]:.0%} of its gain from copies, and {taken[0]:.0%} of that of `hybrid-text`. C10 compares rules that were trained alike; `hybrid-default`, whose gates "
        f"began otherwise, has two-group shares of {_range(others, '.2f')}."
    )


def _by_channel() -> str:
    """What becomes of rank where every key channel has a decay of its own, in sentences."""
    (of,) = designs()["hybrid-kda"]
    low = strata.GAP[0]
    end, initial = (of.groups[variant].relative("prose").mean(0) for variant in ("end", "initial"))
    predicted = of.groups["end"].predicted("prose") / of.groups["end"].d
    [beyond] = [row for row in over_models() if (row["claim"], row["model"]) == ("C4b", "hybrid-kda")]
    return (
        f"In the hybrid of Kimi Delta Attention, {np.sum(end < low)} of {end.size} heads have a rank under {low} d, and the lowest has {end.min():.2f} d; "
        f"before training they are {np.sum(initial < low)} and {initial.min():.2f} d. So its two-group share is {shares(of.groups['end'])['two groups']:.2f}, where "
        f"C10 expects at least {SECOND['C10'].numbers['decay']} under every rule with decay. The law, which takes the mean decay of a head's "
        f"channels, puts {np.sum(predicted < low)} heads under {low} d. It orders the heads well (Spearman {strata.spearman(predicted, end):.2f}) and misses how "
        f"high their ranks are (R² {strata.explained(predicted, end):.1f}; a negative R² is worse than to predict the mean). Held-out text costs "
        f"{of.training[ladder.HELD_OUT]:.3f} bits per byte, and the cap on half-lives takes {of.recall.taken().point:.0%} of the gain from copies. The heads of lowest "
        f"rank are the costly ones here, too, beyond their layers (C4b: **{beyond['verdict']}**{beyond['note']}), though none of them has a low rank."
    )


def _only_added() -> str:
    """What becomes of rank where states decay and nothing is erased, in sentences."""
    low, high = strata.GAP

    def low_and_high(ranks: NDArray[Any]) -> str:
        return f"{np.sum(ranks < low)} and {np.sum(ranks > high)}"

    of, base = (designs()[name][0] for name in ("hybrid-nodelta", "hybrid-text"))
    end, initial = (
        [each.groups[variant].relative("prose").mean(0) for each in (of, base)] for variant in ("end", "initial")
    )
    by_law = of.groups["end"].predicted("prose") / of.groups["end"].d
    losses = [each.training[ladder.HELD_OUT] for each in (of, base)]
    costs = {
        (scheme, order): of.removal.added(scheme, order, DOSE).mean() for scheme in (MODEL, PROTECTED) for order in (LOW, HIGH)
    }  # fmt: skip
    [arm] = [arm for arm in of.removal.arms if (arm.scheme, arm.order, arm.share) == (MODEL, HIGH, DOSE)]
    layers = [of.removal.heads[head][0] for head in arm.heads]
    return (
        f"Of its {by_law.size} heads, {low_and_high(end[0])} have a rank under {low} d and over {high} d; in `{base.name}`, with the delta rule, "
        f"{low_and_high(end[1])}. Before training they were {low_and_high(initial[0])}, and {low_and_high(initial[1])}. The two-group share is "
        f"{shares(of.groups['end'])['two groups']:.2f}, where C10 expects at least {SECOND['C10'].numbers['decay']}. By their decay alone (the law) "
        f"{low_and_high(by_law)} heads would be there. So few heads learnt to forget fast, and many that forget slowly have a lower rank than the law says. "
        f"It orders the heads well (Spearman {strata.spearman(by_law, end[0]):.2f}) and misses how high their ranks are (R² {strata.explained(by_law, end[0]):.2f}). "
        f"Held-out text costs {losses[0]:.3f} bits per byte, and {losses[1]:.3f} with the delta rule.\n\n"
        f"Over the model, the quarter of highest rank is the costly one ({costs[MODEL, HIGH]:.2f} nats; the lowest cost {costs[MODEL, LOW]:.2f}): {layers.count(0)} of "
        f"its {len(layers)} heads are in layer 0. With that layer protected both cost about the same ({costs[PROTECTED, HIGH]:.2f} and {costs[PROTECTED, LOW]:.2f})."
    )


def _inherited() -> str:
    """What became of gates that all began alike, in a sentence."""
    by_name = designs()
    broad, narrow = (
        np.mean([shares(of.groups["end"])["two groups"] for of in by_name[f"hybrid-{data}"]])
        for data in ("text", "narrow")
    )
    start = max(strata.two_group_share(of.trajectory.rank[0] / of.groups["end"].d) for of in by_name["hybrid-narrow"])
    [row] = [row for row in over_models() if row["claim"] == "C1d"]
    return (
        f"Two-group share of hybrids whose gates all begin alike: {start:.2f} before training, {narrow:.2f} after it; with "
        f"broad gates {broad:.2f} after it. That the groups are inherited from the gates (C1d): **{row['verdict']}**{row['note']}."
    )


def _capped() -> str:
    """What the cap takes from the recall of hybrids, by how their gates began, in a sentence."""
    taken: dict[str, list[float]] = {}
    for name, measured in _measured().items():
        if name.startswith("hybrid") and RECIPES[name].rule == "gated delta":
            taken.setdefault(RECIPES[name].gates, []).append(measured.recall.taken().point)
    named = {"open": "nothing decays"}
    each = [
        f"{_range(shares, '.0%')} ({named.get(gates, f'{gates} gates')}, {len(shares)})"
        for gates, shares in taken.items()
    ]
    return (
        f"Of the gain of hybrids of the gated delta rule the cap takes, by how their gates began and over how many models: {'; '.join(each)}. The pure models have too small a "
        "gain to compare, so C6 is not testable."
    )


def _repeats(data: Mapping[str, Mapping[str, Any]]) -> str:
    """Models that were trained twice from the same seed, on two kinds of GPU: what came out differently."""
    rows, said = [], []
    for file in sorted((ladder.LADDER / "repeats").glob("*.json")):
        other = json.loads(file.read_text(encoding="utf-8"))
        first, second = ({row["claim"]: row for row in content["rows"]} for content in (data[file.stem], other))
        both = [claim for claim in first if claim in second]
        differ = [claim for claim in both if first[claim]["verdict"] != second[claim]["verdict"]]
        devices = " and ".join(content["training"]["device"] for content in (data[file.stem], other))
        bits = ", ".join(f"{content['training'][ladder.HELD_OUT]:.4f}" for content in (data[file.stem], other))
        said.append(f"`{file.stem}` ({devices}; bits per byte {bits}): {len(differ)} of {len(both)} verdicts differ.")
        rows += [(f"`{file.stem}`", claim, *map(_found, (first[claim], second[claim]))) for claim in differ]
    table = markdown_table(("model", "claim", "in these tables", "the other training"), rows) if rows else ""
    return "\n".join([" ".join(said), "", table])


def _found(row: Mapping[str, Any]) -> str:
    """A verdict with its numbers."""
    numbers = ", ".join(
        f"{number['label']} {number['point']:.3g} [{number['low']:.3g}, {number['high']:.3g}]"
        for number in row["criteria"]
    )
    return f"{_short(row['verdict'])}: {numbers}"


def ladder_tables() -> dict[str, str]:
    """The generated parts of the page, by name."""
    models = stored_models()
    data = {name: content for name, (_, content) in models.items()}
    missing = [name for name in RECIPES if name not in models]
    return {
        "ladder_models": f"{len(models)} of {len(RECIPES)} models are trained and measured."
        + (f" Not yet: {_named(missing)}." if missing else ""),
        "ladder_first": _by_model(data | first_pair(), CLAIMS),
        "ladder_second": _by_model(data, SECOND),
        "ladder_over": brief_table(over_models()),
        "ladder_decides": _what_decides(),
        "ladder_direction": _of_direction(),
        "ladder_mastering": _mastering(),
        "ladder_tasks": _of_tasks(),
        "ladder_beyond": _beyond_layers(),
        "home_beyond": _beyond_layers(enough=ENOUGH_SEEDS),
        "ladder_protected": _joint_protected(),
        "ladder_random_groups": _random_groups(),
        "ladder_still": _without_decay(),
        "ladder_channels": _by_channel(),
        "ladder_added": _only_added(),
        "ladder_inherited": _inherited(),
        "ladder_numbers": _numbers(data),
        "ladder_causal": _causal(data),
        "ladder_removal": _removal(data),
        "ladder_signs": _signs(),
        "ladder_secondary": _secondary(data),
        "ladder_recall": _recall(data),
        "ladder_pair": _pair(data),
        "ladder_repeats": _repeats(data),
        "ladder_capped": _capped(),
    }


def _of_tasks() -> str:
    """What training on tasks does to the two groups of hybrids, beside what C1e looks at, in sentences."""
    by_name = designs()
    of_data = {data: [shares(of.groups["end"]) for of in by_name[f"hybrid-{data}"]] for data in ("text", "tasks63")}
    outside, two = (
        {data: np.mean([each[key] for each in of]) for data, of in of_data.items()} for key in ("outside", "two groups")
    )
    others = [
        f"{after['outside']:.2f} and {after['two groups']:.2f} in `{of.name}`"
        for design in ("hybrid-tasks10", "hybrid-tasks25", "hybrid-tasks63light", "hybrid-long", "pure-long")
        for of in by_name[design]
        for after in [shares(of.groups["end"])]
    ]
    return (
        f"C1e judges the share outside: {outside['text']:.2f} in hybrids trained on text, {outside['tasks63']:.2f} in those trained with tasks (means over "
        f"seeds). Their two-group shares are {two['text']:.2f} and {two['tasks63']:.2f}. Of fewer tasks, lighter answers or more steps there is one seed each: "
        f"{', '.join(others)}."
    )


def _mastering() -> str:
    """On which models the claims about tasks could be tested, in sentences."""
    able = [of for of in _measured().values() if of.by_task or len(mastered(of.recall.scores)) > 1]
    tested, untested = ([of.name for of in able if bool(of.by_task) is done] for done in (True, False))
    return (
        "C4, C4a and C5 are about tasks: a model that masters fewer than two cannot be tested. The pair of 9 million parameters was tested, in the last two rows, and of the "
        f"ladder {_named(tested)}, of one seed each. These master at least two and were not tested, since their weights were not kept: {_named(untested)}."
        f"\n\n{_scores(tested)}\n\nScores that C4 compares. Where the range over random draws holds both numbers, the draw matters more than the order."
    )


def _named(models: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in models) or "none"


def _scores(models: Iterable[str]) -> str:
    """Scores on tasks without heads of the lowest rank, of the highest, and at random, of models that were tested."""
    head = (
        "model",
        "task",
        "heads removed",
        "all heads",
        "without lowest ranks",
        "without highest",
        "without random heads",
    )
    rows = []
    for name in models:
        of = _measured()[name].by_task
        assert of, f"{name} has no scores on tasks"
        for task, n in of.heads.items():
            scores = (of.intact[task], of.low[task], of.high[task])
            draws = of.draws[task].mean(1)
            rows.append(
                (
                    f"`{name}`",
                    task,
                    f"{n}",
                    *(f"{x.mean():.2f}" for x in scores),
                    f"{draws.min():.2f} to {draws.max():.2f} ({len(draws)} draws)",
                )
            )
    return markdown_table(head, rows)


def _by_model(data: Mapping[str, Mapping[str, Any]], registered: Iterable[str]) -> str:
    """One row per model, one column per claim that a single model decides."""
    verdicts = {name: {row["claim"]: row["verdict"] for row in content["rows"]} for name, content in data.items()}
    keys = [key for key in registered if any(key in of_model for of_model in verdicts.values())]
    rows = [(f"`{name}`", *(_short(of_model.get(key)) for key in keys)) for name, of_model in verdicts.items()]
    return markdown_table(("model", *keys), rows)


def _short(verdict: str | None) -> str:
    """The verdict in a word; an inverted one is said so."""
    if verdict is None:
        return "–"
    word, _, how = verdict.partition(": ")
    return ", ".join(filter(None, (SHORT[word], how)))


def _pair(data: Mapping[str, Mapping[str, Any]]) -> str:
    """Which pair is embedded, by the rule that was fixed before any was trained."""
    rows: list[tuple[str, ...]] = []
    chosen = ""
    for candidate in CANDIDATES:
        names = [f"{kind}-{candidate}-0" for kind in ("hybrid", "pure")]
        if not set(names) <= set(data):
            return f"{markdown_table(('candidate', 'C1', 'C3'), rows)}\n\nThe pair `{candidate}` decides; it is not measured yet."
        held = True
        for name in names:
            verdicts = {row["claim"]: row["verdict"] for row in data[name]["rows"]}
            rows.append((f"`{name}`", *(_short(verdicts[key]) for key in ("C1", "C3"))))
            held = held and verdicts["C1"] == verdicts["C3"] == HOLDS
        if held:
            chosen = f"The pair `{candidate}` is the first that holds both, so it is embedded."
            break
    else:
        chosen = "No pair holds both, so the text pair is embedded as it is."
    return f"{markdown_table(('candidate', 'C1', 'C3'), rows)}\n\n{chosen}"


def _interval(numbers: list[Any]) -> str:
    return "–" if None in numbers else f"{Estimate(*numbers):.2f}"


def _numbers(data: Mapping[str, Mapping[str, Any]]) -> str:
    head = ("model", "bits per byte", "share outside", "two groups", "the same by the law", "before training")
    rows = []
    for name, content in data.items():
        numbers = content["numbers"]
        end, initial = (numbers["shares"][variant] for variant in ("end", "initial"))
        rows.append(
            (
                f"`{name}`",
                f"{content['training'][ladder.HELD_OUT]:.3f}",
                _interval(numbers["over heads"]["share outside"]),
                _interval(numbers["over heads"]["two-group share"]),
                f"{end['outside by law']:.2f}, {end['two groups by law']:.2f}",
                f"{initial['outside']:.2f}, {initial['two groups']:.2f}",
            )
        )
    return markdown_table(head, rows)


def _removal(data: Mapping[str, Mapping[str, Any]]) -> str:
    head = ("model", "scheme", "low", "high", "random", "D", "arms cross at")
    rows = []
    for name, content in data.items():
        for scheme in SCHEMES:
            arms = {
                row["order"]: row["added"] for row in content["arms"] if (row["scheme"], row["share"]) == (scheme, DOSE)
            }
            crossing = content["numbers"]["crossing"][scheme]
            rows.append(
                (
                    f"`{name}`", scheme, *(_interval(arms[order]) for order in (LOW, HIGH, RANDOM)),
                    _interval(content["numbers"]["D"][scheme]), "–" if crossing is None else f"{crossing:.0%}",
                )
            )  # fmt: skip
    return markdown_table(head, rows)


def _signs() -> str:
    """In how many models low-rank heads cost more, per scheme and kind."""
    rows = []
    for scheme in SCHEMES:
        cells = []
        for kind in ("hybrid", "pure"):
            areas = [of.removal.area_interval(scheme) for name, of in _measured().items() if name.startswith(kind)]
            cells += [
                f"{sum(area.point < 0 for area in areas)} of {len(areas)}",
                f"{sum(area.high < 0 for area in areas)}",
            ]
        rows.append((scheme, *cells))
    return markdown_table(
        ("models in which D is negative", "hybrid", "with its interval", "pure", "with its interval"), rows
    )


def _recall(data: Mapping[str, Mapping[str, Any]]) -> str:
    copy, cap = SECOND["C6"].numbers["copy"], f"cap {SECOND['C6'].numbers['cap']}"
    head = (
        "model",
        f"gain at {copy} tokens",
        "gain under the cap",
        "nats added by the cap",
        "mean r/d",
        "under the cap",
        "kappa",
    )
    rows = []
    for name, content in data.items():
        numbers = content["numbers"]
        rank = numbers["mean r/d under cap"]
        rows.append(
            (
                f"`{name}`", f"{numbers['gain']['intact'][str(copy)]:.2f}", f"{numbers['gain'][cap][str(copy)]:.2f}",
                f"{numbers['added under cap'][cap]:.2f}", f"{rank['intact']:.2f}", f"{rank[cap]:.2f}",
                _or_dash(numbers["kappa under cap"][cap]),
            )
        )  # fmt: skip
    return markdown_table(head, rows)


def _causal(data: Mapping[str, Mapping[str, Any]]) -> str:
    """C0c for each factor alone."""
    factors = list(next(iter(data.values()))["numbers"]["C0c by factor"]) if data else []
    rows = [
        (f"`{name}`", *(_or_dash(content["numbers"]["C0c by factor"].get(factor)) for factor in factors))
        for name, content in data.items()
    ]
    return markdown_table(("model", *(f"x {factor}" for factor in factors)), rows)


def _secondary(data: Mapping[str, Mapping[str, Any]]) -> str:
    """Added nats on the four domains of the first registration."""
    rows = []
    for name, content in data.items():
        losses = content["numbers"]["secondary"]
        for scheme in SCHEMES:
            for order in (LOW, HIGH):
                without = losses[f"{order}, {DOSE:.1%}, {scheme}"]
                added = [x - intact for x, intact in zip(without, losses["intact"], strict=True)]
                rows.append((f"`{name}`", scheme, order, *map(_or_dash, added)))
    return markdown_table(("model", "scheme", "removed", *NATURAL_DOMAINS), rows)


def _or_dash(number: float | None) -> str:
    return "–" if number is None else strata.without_minus(f"{number:.2f}")


def _range(values: Iterable[float], spec: str) -> str:
    """The smallest and the largest of some numbers, one of them where both read the same."""
    given = list(values)
    return " to ".join(dict.fromkeys(strata.without_minus(format(each, spec)) for each in (min(given), max(given))))
