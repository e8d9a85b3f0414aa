"""Figures that take axes: the caller decides size and place, these draw one thing and name its axes.

Low heads are dashed and orange, high heads solid and blue, so that the groups can be told apart in grey and by colour-blind
readers; bounds are black and written on the line.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.category import StrCategoryLocator
from matplotlib.collections import FillBetweenPolyCollection, QuadMesh
from matplotlib.colors import to_rgb
from matplotlib.container import BarContainer
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator
from numpy.typing import NDArray

from staterank_utils.memory import predicted_rank
from staterank_utils.strata import GAP, LOW_UNDER, Estimate, is_high, turning
from staterank_utils.tracing import StateTrace

BLUE, ORANGE, GREEN, _, PURPLE, *_ = sns.color_palette("colorblind")
HIGH_LOOK = {"color": BLUE, "linestyle": "-", "marker": "o"}
LOW_LOOK = {"color": ORANGE, "linestyle": "--", "marker": "s"}
RANDOM_LOOK = {"color": "0.6", "linestyle": ":", "marker": ""}
ORDER_LOOKS: Mapping[str, Mapping[str, Any]] = {
    "low rank": LOW_LOOK,
    "high rank": HIGH_LOOK,
    "joint": {"color": GREEN, "marker": "^", "linestyle": "-."},
    "large norm": {"color": PURPLE, "marker": "v", "linestyle": ":"},
}


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


def panel_grid(
    n_rows: int, n_columns: int, *, width: float, row_height: float, sharey: bool = True
) -> tuple[Figure, NDArray[Any]]:
    """Panels in rows and columns.

    Args:
        n_rows, n_columns: at least one each.
        width, row_height: of the whole figure and of a row, in inches.
        sharey: whether all panels have one vertical axis.

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
        n_rows, n_columns, figsize=(width, n_rows * row_height), sharey=sharey, squeeze=False, layout="constrained"
    )


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


def figure_data(figure: Figure) -> list[dict[str, Any]]:
    """The numbers that a figure shows, one row per point.

    Args:
        figure: with lines, bands, histograms or heat maps; other things in it are left out.

    Returns:
        Rows of "panel" (its title, or its number and what it is drawn against), "series" (its label), "x", "y", and for a band, of the
        series of its colour, "low" and "high".

    Example:
        >>> figure = Figure()
        >>> plot_with_band(figure.subplots(), [1.0], [Estimate(0.5, 0.4, 0.7)], label="recall")
        >>> figure_data(figure)[0], figure_data(figure)[1]["high"]
        ({'panel': '1', 'series': 'recall', 'x': 1.0, 'y': 0.5}, 0.7)
    """
    return [
        {"panel": ax.get_title() or f"{number} {ax.get_xlabel()}".strip(), **row}
        for number, ax in enumerate(figure.axes, 1)
        for row in (*_of_lines(ax), *_of_bands(ax), *_of_bars(ax), *_of_heat_maps(ax))
    ]


def _of_lines(ax: Axes) -> Iterator[dict[str, Any]]:
    names = _categories(ax)
    for line in ax.lines:
        points = np.asarray(line.get_xydata()).tolist()
        if line.get_transform() == ax.get_yaxis_transform():  # across the panel
            yield {"series": _series(line), "x": "all", "y": points[0][1]}
        elif line.get_transform() == ax.get_xaxis_transform():
            yield {"series": _series(line), "x": points[0][0], "y": "all"}
        else:
            for x, y in points:
                yield {"series": _series(line), "x": names.get(round(x), x) if names else x, "y": y}


def _series(line: Line2D) -> str:
    label = str(line.get_label())
    return "" if label.startswith("_") else label


def _categories(ax: Axes) -> dict[int, str]:
    """Place on the horizontal axis -> name; empty where it is one of numbers."""
    names, places = [text.get_text() for text in ax.get_xticklabels()], list(ax.get_xticks())
    named = isinstance(ax.xaxis.get_major_locator(), FixedLocator | StrCategoryLocator)
    return dict(enumerate(names)) if named and places == [*range(len(names))] else {}


def _of_bands(ax: Axes) -> Iterator[dict[str, Any]]:
    series = {to_rgb(line.get_color()): name for line in reversed(ax.lines) if (name := _series(line))}
    names = _categories(ax)
    for band in ax.collections:
        if isinstance(band, FillBetweenPolyCollection):
            of = series.get(to_rgb(np.asarray(band.get_facecolor())[0]), "band")
            for path in band.get_paths():  # none where its numbers are undefined, and several with gaps in between
                corners = np.asarray(path.vertices)
                for x in np.unique(corners[:, 0]).tolist():
                    edge = corners[corners[:, 0] == x, 1]
                    yield {
                        "series": of,
                        "x": names.get(round(x), x) if names else x,
                        "low": float(edge.min()),
                        "high": float(edge.max()),
                    }


def _of_bars(ax: Axes) -> Iterator[dict[str, Any]]:
    for bars in ax.containers:
        if isinstance(bars, BarContainer):
            for bar in bars.patches:
                yield {"series": str(bars.get_label()), "x": bar.get_x() + bar.get_width() / 2, "y": bar.get_height()}


def _of_heat_maps(ax: Axes) -> Iterator[dict[str, Any]]:
    for mesh in ax.collections:
        if isinstance(mesh, QuadMesh):
            columns, lines = (
                [text.get_text() for text in labels] for labels in (ax.get_xticklabels(), ax.get_yticklabels())
            )
            values: NDArray[np.float64] = np.ma.filled(np.ma.asarray(mesh.get_array()), np.nan).reshape(
                len(lines), len(columns)
            )
            for (i, j), value in np.ndenumerate(values):
                if np.isfinite(value):
                    yield {"series": lines[i], "x": columns[j], "y": float(value)}


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
            ax.plot(positions, head, markersize=2.5, linewidth=1, alpha=0.85, **(HIGH_LOOK if high else LOW_LOOK))
        ax.plot(positions, bound, color="black", linewidth=1, linestyle=":")
        in_tokens(ax)
        ax.set_title(f"layer {layer}", fontsize="medium")
        ax.set_ylim(0, 1.12 * d)
    axes[0].annotate(
        "min(t, d)", (positions[-1], d), (0, 2), textcoords="offset points", ha="right", va="bottom", fontsize="x-small"
    )


def plot_half_lives(ax: Axes, half_lives: Mapping[str, NDArray], *, window: Sequence[float]) -> None:
    """Histograms of half-lives on a logarithmic axis: the first group filled, the others as outlines.

    Args:
        ax: where to draw.
        half_lives: label -> tokens over heads; heads without decay are infinite, are left out and counted in a note.
        window: its two ends, in tokens, shaded.

    Example:
        >>> ax = Figure().subplots()
        >>> plot_half_lives(ax, {"trained": np.array([0.5, 2.0, 80.0, np.inf])}, window=(0.9, 3.8))
        >>> ax.get_xscale(), [text.get_text() for text in ax.texts]
        ('log', ['trained: 1 without decay'])
    """
    finite = {label: values[np.isfinite(values)] for label, values in half_lives.items()}
    for label, values in half_lives.items():
        if missing := len(values) - len(finite[label]):
            ax.annotate(
                f"{label}: {missing} without decay", (0.5, 0.9), xycoords="axes fraction", ha="center", fontsize="small"
            )
    everyone = np.concatenate([*finite.values()])
    if len(everyone):
        bins = np.geomspace(everyone.min() * 0.99, everyone.max() * 1.01, 32).tolist()
        filled: dict[str, Any] = {"color": BLUE, "alpha": 0.75}
        for label, values in finite.items():
            ax.hist(values, bins, label=label, **filled)
            filled = {"color": "black", "histtype": "step", "linestyle": "--"}
        ax.set_ylim(top=1.35 * ax.get_ylim()[1])  # room for the legend
        ax.legend(frameon=False, fontsize="small", loc="upper right")
    ax.axvspan(*window, color="0.88", zorder=0)
    ax.set(xscale="log", xlabel="half-life, tokens", ylabel="heads")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")


LIVE_EVERY = 6  # of the heads of this run that are drawn over a stored one


def plot_rank_distribution(ax: Axes, groups: Mapping[str, NDArray], *, live: NDArray | None = None) -> None:
    """Relative effective rank r/d of all heads, sorted, one curve per group, with the gap (0.2, 0.8) shaded.

    Args:
        ax: where to draw.
        groups: label -> r/d over heads, 0..1; at most 4 groups.
        live: r/d that this run found, every sixth head as an open mark; None where the groups are this run.

    Example:
        >>> ax = Figure().subplots()
        >>> plot_rank_distribution(ax, {"prose": np.array([0.9, 0.1])}, live=np.array([0.8, 0.1]))
        >>> ax.lines[0].get_xydata().tolist(), ax.get_legend_handles_labels()[1]
        ([[0.25, 0.1], [0.75, 0.9]], ['prose', 'this run'])
    """

    def sorted_over_heads(values: NDArray) -> tuple[NDArray, NDArray]:
        return (np.arange(len(values)) + 0.5) / len(values), np.sort(values)

    looks = (
        {"color": BLUE},
        {"color": "black", "linestyle": "--"},
        {"color": ORANGE, "linestyle": ":"},
        {"color": "0.5"},
    )
    for (label, values), look in zip(groups.items(), looks, strict=False):
        ax.plot(*sorted_over_heads(values), label=label, linewidth=2, **look)
    if live is not None:
        x, y = sorted_over_heads(live)
        ax.plot(
            x[::LIVE_EVERY], y[::LIVE_EVERY], "o", color=BLUE, markerfacecolor="none", markersize=4, label="this run"
        )
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


def plot_bound(ax: Axes, rank: NDArray, bound: NDArray) -> None:
    """Measured ranks as dots under the line of their bounds, heads sorted by bound.

    Args:
        ax: where to draw.
        rank, bound: one number per head.

    Example:
        >>> ax = Figure().subplots()
        >>> plot_bound(ax, np.array([3, 1]), np.array([4, 2]))
        >>> [line.get_ydata().tolist() for line in ax.lines]
        [[2, 4], [1, 3]]
    """
    order = np.lexsort((rank, bound))
    ax.plot(np.arange(len(bound)), bound[order], color="black", linewidth=1.5, drawstyle="steps-mid", label="bound")
    ax.plot(np.arange(len(rank)), rank[order], "o", color=BLUE, markersize=3, label="measured")
    ax.set(xlabel="heads, sorted by bound", ylabel="effective rank r", ylim=(0, None))
    ax.legend(frameon=False, fontsize="small", loc="lower right")


def plot_scaled(ax: Axes, half_life: NDArray, relative: NDArray, *, d: int) -> None:
    """Relative rank against half-life after decays were scaled, with the law as a line.

    Args:
        ax: where to draw.
        half_life, relative: (factor, head), factors increasing: the first half of them make half-lives longer, drawn as dots.
        d: largest possible rank.

    Example:
        >>> ax = Figure().subplots()
        >>> plot_scaled(ax, np.array([[8.0], [0.5]]), np.array([[1.0], [0.1]]), d=64)
        >>> [line.get_label() for line in ax.lines]
        ['longer', 'shorter', 'law']
    """
    middle = len(half_life) // 2
    for rows, style, label in ((slice(middle), HIGH_LOOK, "longer"), (slice(middle, None), LOW_LOOK, "shorter")):
        ax.plot(
            half_life[rows].ravel(), relative[rows].ravel(), linestyle="none", marker=style["marker"], color=style["color"],
            markersize=3, alpha=0.5, label=label,
        )  # fmt: skip
    grid = np.geomspace(half_life.min(), half_life.max(), 200)
    by_law = predicted_rank(torch.from_numpy(-np.log(2) / grid), d=d).numpy() / d
    ax.plot(grid, by_law, color="black", linewidth=1.5, label="law")
    ax.set(xscale="log", xlabel="half-life after scaling, tokens", ylabel="effective rank r / d")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    ax.legend(frameon=False, fontsize="small")


def plot_theorems(left: Axes, right: Axes, positions: Sequence[int], rank: NDArray, norm: NDArray, *, d: int) -> None:
    """Ranks under min(t, d), and the cosine of neighbouring norm vectors over the bound of the paper's Theorem 4.4.

    Args:
        left, right: where to draw.
        positions: t, neighbouring tokens.
        rank, norm: (position, head).
        d: largest possible rank.

    Example:
        >>> left, right = Figure().subplots(1, 2)
        >>> plot_theorems(left, right, [1, 2], np.ones((2, 2)), np.array([[1.0, 2.0], [1.5, 2.0]]), d=64)
        >>> len(left.lines), [line.get_label() for line in right.lines]
        (3, ['cosine', 'bound'])
    """
    left.plot(positions, rank, color="0.6", linewidth=0.6)
    left.plot(positions, np.minimum(positions, d), color="black", linestyle=":", label="min(t, d)")
    left.set(xlabel="tokens read, t", ylabel="effective rank r")
    t, cosines, bounds, _ = turning(norm[None], positions).T
    right.plot(t, cosines, color=BLUE, label="cosine")
    right.plot(t, bounds, color="black", linestyle=":", label="bound")
    right.set(xlabel="tokens read, t", ylabel="cos(n(t), n(t-1))")
    right.legend(frameon=False, fontsize="small")


def plot_thresholds(ax: Axes, curves: Mapping[float, NDArray], *, registered: float) -> None:
    """Sorted r/d over heads, one grey line per threshold, the smaller the darker; the registered one is thick.

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


def plot_by_domain(
    ax: Axes, values: Mapping[str, NDArray], high: NDArray[np.bool_], *, live: Mapping[str, NDArray] | None = None
) -> None:
    """One column of heads per kind of input, r/d upwards; marks are by the label given, high ones on the left and low ones on the right.

    A line at half of d parts the labels.

    Args:
        ax: where to draw.
        values: kind of input -> r/d over heads, 0..1.
        high: labels of the same heads.
        live: the same that this run found, every sixth head as an open mark; None where the values are this run.

    Example:
        >>> ax = Figure().subplots()
        >>> plot_by_domain(ax, {"prose": np.array([0.1, 0.9]), "code": np.array([0.2, 0.8])}, np.array([False, True]))
        >>> [label.get_text() for label in ax.get_xticklabels()], [line.get_ydata().item() for line in ax.lines[:4]]
        (['prose', 'code'], [0.9, 0.1, 0.8, 0.2])
    """
    spread = np.random.default_rng(0).uniform(0.04, 0.36, len(high)) * np.where(high, -1, 1)
    for column, relative in enumerate(values.values()):
        plot_head_pairs(ax, column + spread, relative, high, xlabel="", ylabel="effective rank r / d")
    looks: dict[str, Any] = {"color": "black", "markerfacecolor": "none", "markersize": 6, "linestyle": "none"}
    for column, relative in enumerate(live.values() if live else ()):
        ax.plot((column + spread)[::LIVE_EVERY], relative[::LIVE_EVERY], "o", label="this run", **looks)
    ax.axhline(LOW_UNDER, color="0.6", linewidth=1)
    ax.set_xticks(range(len(values)), list(values), rotation=20)
    handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))  # one per label
    named = {"high": "high on prose", "low": "low on prose", "this run": "this run"}
    ax.legend(
        [*handles.values()],
        [named[label] for label in handles],
        frameon=False,
        fontsize="small",
        loc="center left",
        bbox_to_anchor=(1, 0.5),
    )


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
        x, y: one number per head, of y also an estimate.
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
    for group, style, label in ((high, HIGH_LOOK, "high"), (~high, LOW_LOOK, "low")):
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
        rank, norm: one number per head, 0..1.
        removed: of the same heads.

    Example:
        >>> ax, x = Figure().subplots(), np.array([0.1, 0.5, 1.0])
        >>> plot_selection(ax, x, x, x > 0.7)
        >>> [(line.get_label(), line.get_marker(), len(line.get_xdata())) for line in ax.lines]
        [('removed', 'x', 1), ('kept', 'o', 2)]
    """
    for group, marker, colour, label in ((removed, "x", HIGH_LOOK["color"], "removed"), (~removed, "o", "0.4", "kept")):
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
        matrix.round(2) + 0.0, mask=hidden, ax=ax, vmin=-0.2, vmax=1, cmap="cividis", annot=True, fmt=".2f", annot_kws={"fontsize": "x-small"},
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


def plot_methods(
    ax: Axes,
    methods: Mapping[str, Mapping[float, Estimate]],
    *,
    again: Mapping[str, Mapping[float, float]] | None = None,
) -> None:
    """What each method costs: a dot per share of the state that is removed, with its interval.

    Args:
        ax: where to draw.
        methods: label -> share, 0..1 -> estimate; the same shares for each, at most four.
        again: label -> share -> the same measured again: open marks.

    Raises:
        ValueError: more shares than can be told apart.

    Example:
        >>> ax = Figure().subplots()
        >>> plot_methods(ax, {"joint": {0.389: Estimate(1.0, 0.9, 1.1)}, "random": {0.389: Estimate(0.5, 0.4, 0.6)}})
        >>> ax.lines[0].get_xdata(orig=True).tolist(), ax.lines[-1].get_label()
        (['joint', 'random'], '95 % interval')
    """
    shares, markers = list(next(iter(methods.values()))), ("o", "s", "^", "D")
    if len(shares) > len(markers):
        raise ValueError(
            f"{len(shares)} shares cannot be told apart: at most {len(markers)}, draw the others elsewhere"
        )
    for share, marker in zip(shares, markers, strict=False):
        points = [of[share].point for of in methods.values()]
        ax.plot(list(methods), points, marker, markersize=7, label=f"{share:.1%} of the state removed")
    for method, of in methods.items():
        for estimate in of.values():
            if estimate.low < estimate.high:
                ends = [estimate.low, estimate.high]
                ax.plot([method, method], ends, color="0.4", linewidth=1.5, zorder=0, label="95 % interval")
    for method, repeated in (again or {}).items():
        ax.plot([method] * len(repeated), [*repeated.values()], "o", ms=12, mfc="none", color="0.2", label="this run")
    ax.update_datalim([(0.0, 0.0)])  # and not a limit, which would cut what panels beside this one have higher
    ax.margins(x=0.15)
    ax.autoscale_view()


CACHE_LOOKS: Mapping[str, Mapping[str, Any]] = {
    "the last pairs": HIGH_LOOK,
    "the largest values": LOW_LOOK,
    "half of each": {"color": GREEN, "linestyle": "-.", "marker": "^"},
}


def plot_caches(
    ax: Axes,
    curves: Mapping[str, Mapping[float, Estimate]],
    *,
    other: Mapping[str, float],
    again: Mapping[float, Estimate] | None = None,
) -> None:
    """Added nats against the part of a state's bytes that a cache of pairs takes, one curve per way to fill it.

    Args:
        ax: where to draw.
        curves: key of `CACHE_LOOKS` -> part, 0..1 -> estimate.
        other: name of another method -> its added nats, a horizontal line.
        again: of the first curve, measured again: open marks.

    Example:
        >>> ax = Figure().subplots()
        >>> curve = {0.0: Estimate(0.3, 0.2, 0.4), 0.5: Estimate(0.1, 0.0, 0.2)}
        >>> plot_caches(ax, {"the last pairs": curve}, other={"key channels": 0.2})
        >>> [line.get_label() for line in ax.lines]
        ['the last pairs', 'key channels']
    """
    for label, curve in curves.items():
        plot_with_band(ax, [*curve], [*curve.values()], label=label, **CACHE_LOOKS[label])
    for (label, added), dashes in zip(other.items(), ((0, (6, 2)), (0, (1, 1)), (0, (4, 1, 1, 1))), strict=False):
        ax.axhline(added, color="0.3", linestyle=dashes, linewidth=1.2, label=label)
    if again:
        points = [estimate.point for estimate in again.values()]
        ax.plot([*again], points, "o", markersize=10, markerfacecolor="none", color=BLUE, label="this run")
    marks = sorted({part for curve in curves.values() for part in curve})
    ax.set_xticks(marks, ["none" if not part else f"1/{1 / part:g}" for part in marks])
    ax.set_xlabel("cache, part of a state's bytes")
    ax.set_ylim(bottom=0)


def plot_added(
    ax: Axes,
    curves: Mapping[str, Mapping[float, Estimate]],
    *,
    ruin: float,
    again: Mapping[str, Mapping[float, Estimate]] | None = None,
) -> None:
    """Added nats against the share of heads removed, one curve per order; random draws as a grey band.

    Args:
        ax: where to draw.
        curves: order of `ORDER_LOOKS`, or "random" -> added nats by share of heads, 0..1.
        ruin: added nats at which the model is no better than a unigram model, the dotted line.
        again: the same from another run, as open marks.

    Example:
        >>> ax, flat = Figure().subplots(), Estimate(0.5, 0.4, 0.6)
        >>> plot_added(ax, {"random": {0.25: flat}, "low rank": {0.25: flat}}, ruin=2.0, again={"low rank": {0.25: flat}})
        >>> [line.get_xdata().tolist() for line in ax.lines[1:]], len(ax.collections)
        ([[0.0, 25.0], [0.0, 25.0], [25.0]], 2)
    """
    nothing = Estimate(0.0, 0.0, 0.0)
    ax.axhline(ruin, color="black", linewidth=1, linestyle=":")
    for order, by_share in curves.items():
        x = [0.0, *(100 * share for share in by_share)]
        looks = {"linewidth": 1.5, "markersize": 4, **ORDER_LOOKS.get(order, RANDOM_LOOK)}
        label = order if order in ORDER_LOOKS else "random, mean and range"
        plot_with_band(ax, x, [nothing, *by_share.values()], label=label, **looks)
    for order, by_share in (again or {}).items():
        looks = {
            **ORDER_LOOKS.get(order, RANDOM_LOOK),
            "linestyle": "none",
            "marker": ORDER_LOOKS.get(order, {}).get("marker", "D"),
        }
        x, y = [100 * share for share in by_share], [estimate.point for estimate in by_share.values()]
        ax.plot(x, y, markersize=8, markerfacecolor="none", markeredgewidth=1.5, **looks)
    ax.set(xlabel="heads removed, %", xlim=(0, 52))


def plot_within(ax: Axes, areas: NDArray, own: float) -> None:
    """Where the D of rank lies among those of random orders within layers (C4b).

    Args:
        ax: where to draw.
        areas: D of every random order, both signs.
        own: D of rank on the same windows, the dashed line.

    Example:
        >>> ax = Figure().subplots()
        >>> plot_within(ax, np.array([-0.1, 0.1, 0.2]), -0.05)
        >>> ax.lines[-1].get_xdata()
        [-0.05, -0.05]
    """
    ax.hist(areas, bins=20, color="0.75")
    ax.axvline(own, color=LOW_LOOK["color"], linestyle="--", linewidth=2)
    ax.set(xlabel="D, nats per token × share of heads", ylabel="random orders")


def plot_undone(ax: Axes, keeps: Sequence[float], groups: Mapping[str, NDArray], *, enough: float) -> None:
    """How much of the damage of removing a group is undone by keeping a part of it (C7).

    Args:
        ax: where to draw.
        keeps: shares of the group that are kept, increasing from 0.
        groups: label -> added nats, (share kept, draw); a label that begins with "high" looks like high heads.
        enough: the registered share, the dotted line.

    Example:
        >>> ax = Figure().subplots()
        >>> plot_undone(ax, [0.0, 0.5], {"high": np.array([[2.0, 2.0], [0.5, 0.7]])}, enough=0.8)
        >>> ax.lines[-1].get_ydata().round(2).tolist()
        [0.0, 0.7]
    """
    ax.axhline(enough, color="black", linewidth=1, linestyle=":")
    for label, added in groups.items():
        undone = 1 - added / added[0].mean()
        looks = {"markersize": 4, **(HIGH_LOOK if label.startswith("high") else RANDOM_LOOK)}
        low, high = undone.min(1), undone.max(1)
        estimates = [Estimate(*map(float, row)) for row in zip(undone.mean(1), low, high, strict=True)]
        plot_with_band(ax, [100.0 * keep for keep in keeps], estimates, label=label, **looks)
    ax.set(xlabel="of the group kept, %", ylabel="share of the damage undone", ylim=(-0.1, 1.05))


def plot_all_added(
    curves: Mapping[str, Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any] | None]]],
    *,
    ruins: Mapping[str, float],
    width: float,
    row_height: float = 3.2,
    top: float = 1.1,
) -> None:
    """`plot_added` for every model, in rows, and scheme, in columns.

    Args:
        curves: model -> scheme -> curves and, from another run, the same again or None.
        ruins: model -> added nats at which it is no better than a unigram model.
        width, row_height: of the figure and of a row, in inches.
        top: where the panels end, as a multiple of the largest ruin; curves are cut there, unless no ruin is over 0.

    Example:
        >>> plt.switch_backend("Agg")
        >>> flat = {"low rank": {0.25: Estimate(0.5, 0.4, 0.6)}}
        >>> plot_all_added({"hybrid": {"over the model": (flat, None)}}, ruins={"hybrid": 2.0}, width=5.0)
        >>> plt.gca().get_title(), round(float(plt.gca().get_ylim()[1]), 1)
        ('hybrid: over the model', 2.2)
        >>> plot_all_added({"worse than unigrams": {"over the model": (flat, None)}}, ruins={"worse than unigrams": -2.0}, width=5.0)
        >>> [round(float(y), 1) for y in plt.gca().get_ylim()]  # not cut, and the right way up
        [-2.1, 0.7]
        >>> plt.close("all")
    """
    n_schemes = len(next(iter(curves.values())))
    figure, axes = panel_grid(len(curves), n_schemes, width=width, row_height=row_height)
    for (name, by_scheme), row in zip(curves.items(), axes, strict=True):
        for ax, (scheme, (shown, again)) in zip(row, by_scheme.items(), strict=True):
            plot_added(ax, shown, ruin=ruins[name], again=again)
            ax.set_title(f"{name}: {scheme}", fontsize="small")
        row[0].set_ylabel("added nats per token")
    if (limit := top * max(ruins.values())) > 0:  # else every model is worse than a unigram model as it is
        axes[0, 0].set_ylim(0, limit)
    legend_above(figure)


def plot_caps(left: Axes, right: Axes, recalls: Mapping[str, Any], *, gap: int, live: Mapping[str, Any]) -> None:
    """Gain from repeated text, and mean relative rank, against the longest half-life that is left.

    Args:
        left, right: where to draw.
        recalls: model -> a `studies.recall.Recall`; the first is drawn in blue with dots, the second in orange with squares.
        gap: length of a copy, in tokens.
        live: the same from another run, as open marks.

    Example:
        >>> from staterank_utils.studies.recall import Recall
        >>> gains = {"intact": np.full((1, 2), 2.0), "cap 16": np.full((1, 2), 0.5)}
        >>> recall = Recall((512,), gains, {}, {"intact": np.full((1, 3), 64.0), "cap 16": np.full((1, 3), 32.0)}, {}, {}, 64)
        >>> left, right = Figure().subplots(1, 2)
        >>> plot_caps(left, right, {"hybrid": recall}, gap=512, live={})
        >>> [float(y) for y in right.lines[0].get_ydata()], [label.get_text() for label in right.get_xticklabels()]
        ([0.5, 1.0], ['16', 'none'])
    """

    def caps(recall: Any) -> list[str]:
        return sorted(recall.cap_rank, key=lambda label: float(label.removeprefix("cap ").replace("intact", "inf")))

    everyone = max((caps(recall) for recall in recalls.values()), key=len)
    for (name, recall), look in zip(recalls.items(), (HIGH_LOOK, LOW_LOOK, RANDOM_LOOK), strict=False):
        x = [float(everyone.index(label)) for label in caps(recall)]
        plot_with_band(left, x, [recall.gain(label, gap) for label in caps(recall)], label=name, **look)
        right.plot(x, [recall.cap_rank[label].mean() / recall.d for label in caps(recall)], label=name, **look)
        if name in live:
            again = live[name]
            x = [everyone.index(label) for label in caps(again)]
            open_marks = {**look, "linestyle": "none", "markerfacecolor": "none", "markersize": 9}
            left.plot(x, [again.gain(label, gap).point for label in caps(again)], **open_marks)
            right.plot(x, [again.cap_rank[label].mean() / again.d for label in caps(again)], **open_marks)
    for ax in (left, right):
        ax.set_xticks(
            range(len(everyone)), [label.removeprefix("cap ").replace("intact", "none") for label in everyone]
        )
        ax.set(xlabel="cap on half-lives, tokens")
    left.axhline(0, color="0.6", linewidth=1)
    left.set(ylabel="gain, nats per token")
    right.set(ylabel="mean effective rank r / d", ylim=(0, 1))
    left.legend(frameon=False, fontsize="small")


def plot_recall_without(
    left: Axes, right: Axes, found: Any, *, live: Mapping[float, Mapping[str, NDArray | None]] | None = None
) -> None:
    """Gain without some heads against their share, and against what their loss costs on text that is read once.

    Args:
        left, right: where to draw.
        found: a `studies.recall.RecallWithout`.
        live: percent of heads -> order -> gains of another run, as open marks on the left.

    Example:
        >>> from staterank_utils.studies.recall import RecallWithout
        >>> one = {order: np.array([0.5]) for order in ("low rank", "high rank", "random")}
        >>> left, right = Figure().subplots(1, 2)
        >>> plot_recall_without(left, right, RecallWithout("hybrid", (0.25,), 1.0, one, np.array([[0.4, 0.6]]), one))
        >>> [line.get_label() for line in left.lines[2:]], len(right.lines)
        (['random, mean and range', 'low rank', 'high rank'], 5)
    """
    for ax in (left, right):
        ax.axhline(found.intact, color="black", linewidth=1, linestyle=":")
        ax.axhline(0, color="0.8", linewidth=1, zorder=0)
    percent = [0.0, *(100 * share for share in found.shares)]
    means = {"random": found.random.mean(1), **found.gain}
    for order, gains in means.items():
        looks = {"markersize": 5, **ORDER_LOOKS.get(order, {**RANDOM_LOOK, "marker": "D"})}
        label = order if order in ORDER_LOOKS else "random, mean and range"
        left.plot(percent, [found.intact, *gains], label=label, **looks)
        right.plot([0.0, *found.added[order]], [found.intact, *gains], label=label, **looks)
    low, high = ([found.intact, *edge] for edge in (found.random.min(1), found.random.max(1)))
    left.fill_between(percent, low, high, color="0.6", alpha=0.25, linewidth=0)
    for share, of_orders in (live or {}).items():
        for order, gains in of_orders.items():
            if gains is not None:
                open_marks = {**ORDER_LOOKS[order], "linestyle": "none", "markerfacecolor": "none", "markersize": 10}
                left.plot([share], [gains.mean()], **open_marks)
    left.set(xlabel="heads of every layer removed, %", ylabel="gain, nats per token")
    right.set(xlabel="added nats on text read once", ylabel="gain, nats per token")
