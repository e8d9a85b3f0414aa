"""Figures that take axes: the caller decides size and place, these draw one thing and name its axes.

Low heads are dashed and orange, high heads solid and blue, so that the groups can be told apart in grey and by colour-blind
readers; bounds are black and written on the line.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray

from staterank_utils.strata import GAP, Estimate, is_high
from staterank_utils.tracing import StateTrace

BLUE, ORANGE, *_ = sns.color_palette("colorblind")
HIGH = {"color": BLUE, "linestyle": "-", "marker": "o"}
LOW = {"color": ORANGE, "linestyle": "--", "marker": "s"}
RANDOM = {"color": "0.6", "linestyle": ":", "marker": ""}


def use_style() -> None:
    """The look of all figures in the book: white, no top and right spines, readable at the width of a page.

    Example:
        >>> with plt.rc_context():
        ...     use_style()
        ...     plt.rcParams["axes.spines.top"], plt.rcParams["figure.dpi"]
        (False, 110.0)
    """
    sns.set_theme(style="ticks", context="notebook", palette="colorblind")
    plt.rcParams.update(
        {"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110, "savefig.bbox": "tight"}
    )


def model_panels(models: Sequence[str], *, width: float = 5.0, height: float = 3.6) -> dict[str, Axes]:
    """One titled panel per model, side by side on a shared vertical axis.

    Args:
        models: their names, the titles; at least one.
        width, height: of a panel, in inches.

    Returns:
        model -> its axes, in a new figure of pyplot.

    Example:
        >>> plt.switch_backend("Agg")
        >>> panels = model_panels(["hybrid", "pure"], width=4.0)
        >>> {name: ax.get_title() for name, ax in panels.items()}, float(panels["pure"].figure.get_figwidth())
        ({'hybrid': 'hybrid', 'pure': 'pure'}, 8.0)
        >>> plt.close()
    """
    _, axes = panel_grid(1, len(models), width=width * len(models), row_height=height)
    for ax, name in zip(axes.flat, models, strict=True):
        ax.set_title(name, fontsize="medium")
    return dict(zip(models, axes.flat, strict=True))


def panel_grid(n_rows: int, n_columns: int, *, width: float, row_height: float) -> tuple[Figure, NDArray[Any]]:
    """Panels in rows and columns on a shared vertical axis.

    Args:
        n_rows, n_columns: at least one each.
        width, row_height: of the whole figure and of a row, in inches.

    Returns:
        A new figure of pyplot, and its axes (row, column).

    Example:
        >>> plt.switch_backend("Agg")
        >>> figure, axes = panel_grid(2, 4, width=11.0, row_height=3.0)
        >>> axes.shape, figure.get_size_inches().tolist()
        ((2, 4), [11.0, 6.0])
        >>> plt.close()
    """
    return plt.subplots(
        n_rows, n_columns, figsize=(width, n_rows * row_height), sharey=True, squeeze=False, layout="constrained"
    )


def leave_empty(ax: Axes, title: str) -> None:
    """A panel of a grid with nothing to show but its title; the vertical axis stays, for the row that shares it.

    Args:
        ax: the panel.
        title: says why it is empty.

    Example:
        >>> ax = Figure().subplots()
        >>> leave_empty(ax, "pure: needle, not mastered")
        >>> ax.get_title(), ax.xaxis.get_visible(), ax.yaxis.get_visible()
        ('pure: needle, not mastered', False, True)
    """
    ax.set_title(title, fontsize="small")
    ax.xaxis.set_visible(False)
    ax.spines["bottom"].set_visible(False)


def legend_above(figure: Figure) -> None:
    """One legend above all panels of a figure in constrained layout: what any of them shows, each label once.

    Args:
        figure: in constrained layout, with its panels drawn.

    Example:
        >>> figure = Figure(layout="constrained")
        >>> left, right = figure.subplots(1, 2)
        >>> lines = left.plot([0, 1], label="high heads"), right.plot([0, 1], label="high heads"), right.plot([1, 0], label="low heads")
        >>> legend_above(figure)
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['high heads', 'low heads']
    """
    handles: dict[str, Artist] = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=4, frameon=False)


def panel_rows(n_panels: int) -> tuple[int, int]:
    """Rows and columns for small panels: four in a row, or three where that leaves no hole and four would.

    Args:
        n_panels: at least 1.

    Example:
        >>> panel_rows(6), panel_rows(8), panel_rows(5)
        ((2, 3), (2, 4), (2, 4))
    """
    n_columns = 3 if n_panels % 3 == 0 and n_panels % 4 else 4
    return -(-n_panels // n_columns), n_columns


def layer_panels(figure: SubFigure, n_panels: int) -> list[Axes]:
    """Small panels on shared axes, row by row, as many as asked for.

    Args:
        figure: where to draw.
        n_panels: at least 1; what is left of the last row stays empty.

    Example:
        >>> part = Figure().subfigures()
        >>> len(layer_panels(part, 5)), len(part.axes), [ax.axison for ax in part.axes[5:]]
        (5, 8, [False, False, False])
    """
    n_rows, n_columns = panel_rows(n_panels)
    grid = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
    for ax in grid.flat[n_panels:]:
        ax.set_axis_off()
    return list(grid.flat[:n_panels])


def in_tokens(ax: Axes) -> None:
    """A logarithmic horizontal axis whose ticks are plain numbers of tokens.

    Args:
        ax: whose axis it is.

    Example:
        >>> ax = Figure().subplots()
        >>> in_tokens(ax)
        >>> ax.get_xscale(), ax.xaxis.get_major_formatter()(2048.0)
        ('log', '2,048')
    """
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def plot_all_ranks(traces: Mapping[str, StateTrace], ranks: Mapping[str, NDArray]) -> None:
    """A figure with `plot_ranks_over_time` for every layer of every model.

    Args:
        traces: model -> its trace.
        ranks: model -> effective ranks (layer, position, head), 0..d; the models of `traces`.

    Raises:
        KeyError: a model without ranks.
        ValueError: ranks outside 0..d, or not as many layers as in the trace.

    Example:
        >>> import torch
        >>> plt.switch_backend("Agg")
        >>> ranks, zeros = torch.tensor([[[[1], [4]]], [[[1], [2]]]]), torch.zeros(2, 1, 1)  # 2 layers of 1 head
        >>> trace = StateTrace(ranks, (1, 8), layers=(0, 3), d_k=8, d_v=8, log_decay=zeros, write_strength=zeros)
        >>> plot_all_ranks({"hybrid": trace}, {"hybrid": ranks[:, 0].numpy()})
        >>> [(ax.get_title(), len(ax.lines)) for ax in plt.gcf().axes if ax.lines]
        [('layer 0', 2), ('layer 3', 2)]
        >>> plt.close()
    """
    n_rows = [panel_rows(len(trace.layers))[0] for trace in traces.values()]
    figure = plt.figure(figsize=(10, 1.9 * sum(n_rows) + 0.6 * len(n_rows)), layout="constrained")
    parts = figure.subfigures(len(n_rows), squeeze=False, height_ratios=n_rows)
    for part, (name, trace) in zip(parts.flat, traces.items(), strict=True):
        part.suptitle(f"{name}: {ranks[name][:, 0].size} heads, d = {trace.d}", fontsize="medium")
        part.supxlabel("tokens read, t", fontsize="small")
        part.supylabel("effective rank r", fontsize="small")
        axes = layer_panels(part, len(trace.layers))
        plot_ranks_over_time(axes, trace.positions, ranks[name], d=trace.d, layers=trace.layers)


def plot_ranks_over_time(
    axes: Sequence[Axes], positions: Sequence[int], ranks: NDArray, *, d: int, layers: Sequence[int]
) -> None:
    """Effective rank of every head against t, one panel per layer, with the bound min(t, d).

    Args:
        axes: one for each layer.
        positions: t, in tokens.
        ranks: (layer, position, head), 0..d.
        d: largest possible rank.
        layers: index in the model of each layer, for the titles.

    Raises:
        ValueError: ranks outside 0..d, or not as many axes, layers of ranks and indices of layers.

    Example:
        >>> ax = Figure().subplots()
        >>> plot_ranks_over_time([ax], [1, 4, 16], np.array([[[1, 1], [1, 4], [2, 8]]]), d=8, layers=[3])
        >>> [line.get_linestyle() for line in ax.lines], ax.get_title()  # a low head, a high one, the bound
        (['--', '-', ':'], 'layer 3')
    """
    bound = np.minimum(np.asarray(positions), d)
    for ax, layer_ranks, layer in zip(axes, ranks, layers, strict=True):
        for head, high in zip(layer_ranks.T, is_high(layer_ranks[-1], d), strict=True):
            ax.plot(positions, head, markersize=2.5, linewidth=1, alpha=0.85, **(HIGH if high else LOW))
        ax.plot(positions, bound, color="black", linewidth=1, linestyle=":")
        in_tokens(ax)
        ax.set_title(f"layer {layer}", fontsize="medium")
        ax.set_ylim(0, 1.12 * d)
    axes[0].annotate(
        "min(t, d)", (positions[-1], d), (0, 2), textcoords="offset points", ha="right", va="bottom", fontsize="x-small"
    )


def plot_rank_distribution(ax: Axes, groups: Mapping[str, NDArray]) -> None:
    """Relative effective rank r/d of all heads, sorted, one curve a group, with the gap (0.2, 0.8) shaded.

    Args:
        ax: where to draw.
        groups: label -> r/d over heads, 0..1; at most 4 groups.

    Example:
        >>> ax = Figure().subplots()
        >>> plot_rank_distribution(ax, {"prose": np.array([0.9, 0.1])})
        >>> ax.lines[0].get_xydata().tolist(), ax.get_legend_handles_labels()[1]
        ([[0.25, 0.1], [0.75, 0.9]], ['prose'])
    """
    styles = ("-", "--", ":", "-.")
    for (label, values), style in zip(groups.items(), styles, strict=False):
        ordered = np.sort(values)
        ax.plot((np.arange(len(ordered)) + 0.5) / len(ordered), ordered, style, label=label, linewidth=2)
    ax.axhspan(*GAP, color="0.9", zorder=0)
    ax.annotate(
        "between the groups",
        (0.02, GAP[1]),
        (0, -4),
        textcoords="offset points",
        va="top",
        fontsize="x-small",
        color="0.35",
    )
    ax.set(xlabel="share of heads, sorted", ylabel="effective rank r / d", xlim=(0, 1), ylim=(-0.02, 1.05))
    ax.legend(frameon=False, fontsize="small")


def plot_thresholds(ax: Axes, curves: Mapping[float, NDArray], *, registered: float) -> None:
    """Sorted r/d over heads, one grey line a threshold, the smaller the darker; the registered one is thick.

    Args:
        ax: where to draw.
        curves: relative threshold ε -> r/d over heads, 0..1.
        registered: the threshold whose line is thick.

    Example:
        >>> ax = Figure().subplots()
        >>> plot_thresholds(ax, {1e-3: np.array([0.2, 0.1]), 1e-4: np.array([0.9, 0.3])}, registered=1e-4)
        >>> [(line.get_label(), line.get_linewidth(), line.get_color()) for line in ax.lines]
        [('1e-03', 1.2, '0.75'), ('1e-04', 3.0, '0.0')]
    """
    for (threshold, values), grey in zip(curves.items(), np.linspace(0.75, 0, len(curves)), strict=True):
        width = 3 if threshold == registered else 1.2
        ax.plot(
            np.linspace(0, 1, len(values)), np.sort(values), color=str(grey), linewidth=width, label=f"{threshold:.0e}"
        )
    ax.set(xlabel="share of heads, sorted", ylabel="effective rank r / d")
    ax.legend(title="threshold ε", frameon=False, fontsize="small")


def plot_by_domain(ax: Axes, values: Mapping[str, NDArray], high: NDArray[np.bool_]) -> None:
    """One column of heads a kind of input, r/d upwards; marks are by the label given, columns spread for legibility.

    Args:
        ax: where to draw.
        values: kind of input -> r/d over heads, 0..1.
        high: labels of the same heads.

    Example:
        >>> ax = Figure().subplots()
        >>> plot_by_domain(ax, {"prose": np.array([0.1, 0.9]), "code": np.array([0.2, 0.8])}, np.array([False, True]))
        >>> [label.get_text() for label in ax.get_xticklabels()], [line.get_ydata().item() for line in ax.lines]
        (['prose', 'code'], [0.9, 0.1, 0.8, 0.2])
    """
    spread = np.random.default_rng(0).uniform(-0.25, 0.25, len(high))
    for column, relative in enumerate(values.values()):
        plot_head_pairs(ax, column + spread, relative, high, xlabel="", ylabel="effective rank r / d")
    ax.set_xticks(range(len(values)), list(values), rotation=20)
    ax.legend(
        ["high on prose", "low on prose"], frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5)
    )


def plot_turning(ax: Axes, rows: NDArray) -> None:
    """1 - cosine of neighbouring vectors, measured and allowed, against t on logarithmic axes.

    Args:
        ax: where to draw.
        rows: (t, cosine, bound, bound of plane geometry), from `strata.turning`.

    Example:
        >>> ax = Figure().subplots()
        >>> plot_turning(ax, np.array([[128.0, 0.75, 0.25, 0.5]]))
        >>> {line.get_label(): line.get_ydata().item() for line in ax.lines}
        {'allowed by Theorem 4.4': 0.75, 'allowed by plane geometry': 0.5, 'measured': 0.25}
    """
    t, measured, bound, plane = rows.T
    dots: dict[str, Any] = {"linestyle": "none", "markersize": 3}
    ax.plot(t, 1 - bound, **{**dots, "marker": "_", "color": "black", "markersize": 5}, label="allowed by Theorem 4.4")
    ax.plot(t, 1 - plane, **dots, marker=".", color="0.6", label="allowed by plane geometry")
    ax.plot(t, np.maximum(1 - measured, 1e-12), **dots, marker="o", color=BLUE, label="measured")
    ax.set(yscale="log", xlabel="token t", ylabel="1 - cos(n(t), n(t-1))")
    in_tokens(ax)
    ax.set_ylim(top=100)  # room for the legend
    ax.legend(frameon=False, fontsize="small", loc="upper right")


def plot_head_pairs(
    ax: Axes,
    x: NDArray,
    y: NDArray | Sequence[Estimate],
    high: NDArray[np.bool_],
    *,
    xlabel: str,
    ylabel: str,
) -> None:
    """Two quantities of the same heads, low ones as squares, high ones as dots, with the intervals of y where it has them.

    Args:
        ax: where to draw.
        x, y: one number a head, of y also an estimate.
        high: labels of the same heads.
        xlabel, ylabel: what the numbers are, with their units.

    Example:
        >>> ax = Figure().subplots()
        >>> x, high = np.arange(3), np.array([True, False, False])
        >>> plot_head_pairs(ax, x, x, high, xlabel="r / d", ylabel="nats")
        >>> [(line.get_label(), line.get_marker(), len(line.get_xdata())) for line in ax.lines], ax.get_xlabel()
        ([('high', 'o', 1), ('low', 's', 2)], 'r / d')
    """
    if not isinstance(y, np.ndarray):
        ax.vlines(x, [e.low for e in y], [e.high for e in y], color="0.6", linewidth=1, zorder=1)
        y = np.array([e.point for e in y])
    for group, style, label in ((high, HIGH, "high"), (~high, LOW, "low")):
        ax.plot(
            x[group],
            y[group],
            linestyle="none",
            marker=style["marker"],
            color=style["color"],
            markersize=5,
            alpha=0.8,
            label=label,
        )
    ax.set(xlabel=xlabel, ylabel=ylabel)


def plot_selection(ax: Axes, rank: NDArray, norm: NDArray, removed: NDArray[np.bool_]) -> None:
    """Heads by relative rank and relative norm: crosses are removed, circles stay.

    Args:
        ax: where to draw.
        rank, norm: one number a head, 0..1.
        removed: of the same heads.

    Example:
        >>> ax, x = Figure().subplots(), np.array([0.1, 0.5, 1.0])
        >>> plot_selection(ax, x, x, x > 0.7)
        >>> [(line.get_label(), line.get_marker(), len(line.get_xdata())) for line in ax.lines]
        [('removed', 'x', 1), ('kept', 'o', 2)]
    """
    for group, marker, colour, label in ((removed, "x", HIGH["color"], "removed"), (~removed, "o", "0.4", "kept")):
        ax.plot(
            rank[group],
            norm[group],
            linestyle="none",
            marker=marker,
            color=colour,
            markersize=6,
            markerfacecolor="none",
            label=label,
        )
    ax.set(xlabel="r / d", ylabel="norm / largest norm", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))


def plot_agreement(ax: Axes, matrix: NDArray, labels: Sequence[str], *, title: str) -> None:
    """Heat map of an agreement between every pair of inputs, numbers written in, lower triangle.

    Args:
        ax: where to draw.
        matrix: (input, input), symmetric, -1..1; a NaN leaves its cell empty.
        labels: names of the inputs.
        title: of the panel.

    Example:
        >>> ax = Figure().subplots()
        >>> plot_agreement(ax, np.array([[1.0, 0.5], [0.5, 1.0]]), ["prose", "code"], title="kappa")
        >>> [text.get_text() for text in ax.texts], [label.get_text() for label in ax.get_yticklabels()]
        (['1.00', '0.50', '1.00'], ['prose', 'code'])
    """
    hidden = np.triu(np.ones_like(matrix, dtype=bool), k=1)
    sns.heatmap(
        matrix, mask=hidden, ax=ax, vmin=-0.2, vmax=1, cmap="cividis", annot=True, fmt=".2f", annot_kws={"fontsize": "x-small"},
        square=True, cbar=False, xticklabels=labels, yticklabels=labels,
    )  # fmt: skip
    ax.set_title(title, fontsize="medium")
    ax.tick_params(axis="both", length=0, labelsize="small")
    plt.setp(ax.get_xticklabels(), rotation=45, ha="right")


def plot_with_band(
    ax: Axes, x: Sequence[float] | range, estimates: Sequence[Estimate], *, label: str, **style: Any
) -> None:
    """Points with their intervals as a band, against x.

    Args:
        ax: where to draw.
        x: where the points lie, increasing.
        estimates: one for each x.
        label: for the legend.
        style: for `Axes.plot`; the band takes the colour of the line.

    Example:
        >>> ax = Figure().subplots()
        >>> plot_with_band(ax, range(2), [Estimate(0.5, 0.4, 0.7), Estimate(0.6, 0.5, 0.9)], label="recall")
        >>> [band] = ax.collections
        >>> ax.lines[0].get_ydata().tolist(), band.get_datalim(ax.transData).intervaly.tolist()
        ([0.5, 0.6], [0.4, 0.9])
    """
    points, low, high = (np.array([getattr(e, name) for e in estimates]) for name in ("point", "low", "high"))
    [line] = ax.plot(x, points, label=label, **style)
    ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def plot_doses(ax: Axes, counts: Sequence[int], arms: Mapping[str, Sequence[Estimate]]) -> None:
    """Score against the number of heads removed, evenly spaced, one curve with its band an arm, in the looks of low and high heads.

    Args:
        ax: where to draw.
        counts: numbers of heads removed, from 0.
        arms: label -> score at each of the counts; labels that begin with "highest" look like high heads, "random" is grey.

    Example:
        >>> ax = Figure().subplots()
        >>> drop = [Estimate(1.0, 1.0, 1.0), Estimate(0.5, 0.4, 0.6)]
        >>> plot_doses(ax, [0, 19], {"lowest rank": drop, "highest rank": drop})
        >>> [line.get_linestyle() for line in ax.lines], [label.get_text() for label in ax.get_xticklabels()]
        (['--', '-'], ['0', '19'])
    """
    for label, estimates in arms.items():
        looks = {"lowest": LOW, "highest": HIGH, "random": RANDOM}
        [style] = [style for beginning, style in looks.items() if label.startswith(beginning)]
        plot_with_band(ax, range(len(counts)), estimates, label=label, **{"markersize": 4, "linewidth": 1.5} | style)
    ax.set(ylim=(-0.03, 1.05), xlabel="heads removed")
    ax.set_xticks(range(len(counts)), [str(count) for count in counts], fontsize="small")


def plot_methods(ax: Axes, shares: Sequence[float], methods: Mapping[str, Sequence[Estimate]]) -> None:
    """Something against the share of the state that is removed, one curve a method, told apart by mark and dash as well as colour.

    Args:
        ax: where to draw.
        shares: 0..1, increasing.
        methods: label -> estimates, one for each share, at most six methods; the band of the first alone is drawn.

    Raises:
        ValueError: more methods than can be told apart.

    Example:
        >>> ax, flat = Figure().subplots(), [Estimate(1.0, 0.9, 1.0), Estimate(0.5, 0.4, 0.6)]
        >>> _ = ax.axhline(1)  # what is drawn already does not matter
        >>> plot_methods(ax, [0.0, 0.389], {"joint": flat, "random": flat})
        >>> [line.get_marker() for line in ax.lines[1:]], len(ax.collections), ax.get_xlabel()
        (['o', 's'], 1, 'share of the state removed, %')
    """
    looks = list(zip(("o", "s", "^", "v", "D", "P"), ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1))), strict=True))
    if len(methods) > len(looks):
        raise ValueError(f"{len(methods)} curves cannot be told apart: at most {len(looks)}, draw the others elsewhere")
    for which, ((label, estimates), (marker, dash)) in enumerate(zip(methods.items(), looks, strict=False)):
        x = [100 * share for share in shares]
        [line] = ax.plot(x, [e.point for e in estimates], marker=marker, linestyle=dash, markersize=5, label=label)
        if which == 0:
            ax.fill_between(
                x,
                [e.low for e in estimates],
                [e.high for e in estimates],
                color=line.get_color(),
                alpha=0.2,
                linewidth=0,
            )
    ax.set(xlabel="share of the state removed, %")
    ax.set_xticks(
        [100 * share for share in shares], [f"{100 * share:.3g}" for share in shares], fontsize="small", rotation=45
    )


def plot_arms(ax: Axes, scores: Mapping[str, Estimate], *, draws: Sequence[float], intact: float) -> None:
    """Scores of the arms of an ablation as dots with intervals, one row an arm, beside random draws and the intact model.

    Args:
        ax: where to draw.
        scores: label -> score; labels that begin with "lowest" are squares, others dots.
        draws: mean score of each random draw, as grey ticks over the whole height.
        intact: score with all heads, as a dotted line.

    Example:
        >>> ax = Figure().subplots()
        >>> plot_arms(ax, {"lowest effective rank": Estimate(0.2, 0.1, 0.3)}, draws=[0.6, 0.7], intact=0.9)
        >>> [line.get_xdata()[0].item() for line in ax.lines[-2:]], len(ax.lines), ax.get_yticklabels()[0].get_text()
        ([0.1, 0.2], 5, 'lowest effective rank')
    """
    for x in draws:
        ax.axvline(x, color="0.75", linewidth=1, zorder=0)
    ax.axvline(intact, color="black", linewidth=1, linestyle=":", zorder=0)
    for row, (label, estimate) in enumerate(scores.items()):
        style = LOW if label.startswith("lowest") else HIGH
        ax.plot([estimate.low, estimate.high], [row, row], color=style["color"], linewidth=2)
        ax.plot(estimate.point, row, marker=style["marker"], color=style["color"], markersize=6)
    ax.set_yticks(range(len(scores)), list(scores), fontsize="small")
    ax.set(xlim=(-0.05, 1.05), ylim=(len(scores) - 0.5, -0.5))


def plot_parts(
    ax: Axes,
    linear: Mapping[int, Estimate],
    softmax: Mapping[int, Estimate],
    single: Mapping[tuple[int, int], Estimate],
) -> None:
    """Added loss by layer: bars with intervals for whole layers, hatched where they are softmax, and a mark for every single head.

    Args:
        ax: where to draw.
        linear, softmax: layer -> added loss without the layer, nats.
        single: (layer, head) -> added loss without the head, nats.

    Example:
        >>> ax = Figure().subplots()
        >>> added = [Estimate(x, x, x + 0.1) for x in (0.5, 2.0, 0.1, 0.2)]
        >>> plot_parts(ax, {0: added[0]}, {1: added[1]}, {(0, 0): added[2], (0, 1): added[3]})
        >>> [float(bar.get_height()) for bar in ax.patches], ax.lines[0].get_ydata().tolist(), ax.get_yscale()
        ([0.5, 2.0], [0.1, 0.2], 'symlog')
    """
    for layers, hatch, label in ((linear, "", "linear layer"), (softmax, "//", "softmax layer")):
        if layers:
            heights, low, high = ([getattr(e, name) for e in layers.values()] for name in ("point", "low", "high"))
            ax.bar(list(layers), heights, color="0.88", edgecolor="0.4", hatch=hatch, label=label)
            ax.vlines(list(layers), low, high, color="0.4", linewidth=2)
    points = [estimate.point for estimate in single.values()]
    ax.plot([layer for layer, _ in single], points, "_", color=BLUE, markersize=9, label="one head")
    ax.set_yscale("symlog", linthresh=0.01)
    ax.set_xlabel("layer")
    ax.set_xticks(sorted({*linear, *softmax}))


def plot_rank_used(ax: Axes, curves: Mapping[str, Mapping[str, Estimate]]) -> None:
    """Added loss against what is kept of the states, one curve for "high" heads and one for "low" ones.

    Args:
        ax: where to draw.
        curves: "high" and "low" -> what is kept -> added loss, nats, as `Ablation.rank_used` gives it.

    Raises:
        KeyError: one of the two groups is missing.

    Example:
        >>> ax = Figure().subplots()
        >>> half, two = Estimate(0.5, 0.4, 0.6), Estimate(2.0, 1.0, 3.0)
        >>> plot_rank_used(ax, {"high": {"rank 1": half, "rotated": two}, "low": {"rank 1": half, "rotated": half}})
        >>> {line.get_label(): line.get_ydata().tolist() for line in ax.lines}
        {'high heads': [0.5, 2.0], 'low heads': [0.5, 0.5]}
    """
    for group, style in (("high", HIGH), ("low", LOW)):
        labels, estimates = zip(*curves[group].items(), strict=True)
        plot_with_band(ax, range(len(labels)), estimates, label=f"{group} heads", **style)
        ax.set_xticks(range(len(labels)), labels, rotation=45, fontsize="x-small")
    ax.set_yscale("symlog", linthresh=0.01)
    ax.set(ylabel="added loss, nats", xlabel="what is kept of the state")
    ax.legend(frameon=False, fontsize="small")


def plot_depths(ax: Axes, table: NDArray, depths: Sequence[float], lengths: Sequence[int], *, title: str) -> None:
    """Heat map of retrieval: depth of the needle downwards, length of the prompt to the right, numbers written in.

    Args:
        ax: where to draw.
        table: share of needles found, (depth, length), 0..1, as `Ablation.depth_table` gives it.
        depths: shares of the prompt before the needle, 0..1.
        lengths: of the prompts, in tokens.
        title: of the panel.

    Example:
        >>> ax = Figure().subplots()
        >>> plot_depths(ax, np.array([[1.0, 0.25]]), [0.5], [256, 1024], title="intact")
        >>> [text.get_text() for text in ax.texts], [label.get_text() for label in ax.get_xticklabels()]
        (['1.00', '0.25'], ['256', '1,024'])
    """
    sns.heatmap(
        table, ax=ax, vmin=0, vmax=1, cmap="cividis", annot=True, fmt=".2f", annot_kws={"fontsize": "x-small"}, cbar=False,
        xticklabels=[f"{n:,}" for n in lengths], yticklabels=[f"{depth:.0%}" for depth in depths],
    )  # fmt: skip
    ax.set_title(title, fontsize="small")
    ax.tick_params(axis="both", length=0, labelsize="x-small", labelrotation=0)
