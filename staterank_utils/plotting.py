"""Figures that take axes: the caller decides size and place, these draw one thing and name its axes.

Low heads are dashed and orange, high heads solid and blue, so that the groups can be told apart in grey and by colour-blind
readers; bounds are black and written on the line.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from numpy.typing import NDArray

from staterank_utils.strata import GAP, Estimate, is_high

BLUE, ORANGE, *_ = sns.color_palette("colorblind")
HIGH = {"color": BLUE, "linestyle": "-", "marker": "o"}
LOW = {"color": ORANGE, "linestyle": "--", "marker": "s"}


def use_style() -> None:
    """The look of all figures in the book: white, no top and right spines, readable at the width of a page."""
    sns.set_theme(style="ticks", context="notebook", palette="colorblind")
    plt.rcParams.update(
        {"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110, "savefig.bbox": "tight"}
    )


def layer_panels(figure: SubFigure, n_panels: int, *, n_columns: int = 4) -> list[Axes]:
    """Small panels on shared axes, row by row, as many as asked for."""
    n_rows = -(-n_panels // n_columns)
    grid = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
    for ax in grid.flat[n_panels:]:
        ax.set_axis_off()
    return list(grid.flat[:n_panels])


def plot_ranks_over_time(
    axes: Sequence[Axes], positions: Sequence[int], ranks: NDArray, *, d: int, layers: Sequence[int]
) -> None:
    """Effective rank of every head against t, one panel a layer, with the bound min(t, d).

    Args:
        axes: one for each layer.
        positions: t, in tokens.
        ranks: (layer, position, head).
        d: largest possible rank.
        layers: index in the model of each layer, for the titles.
    """
    bound = np.minimum(np.asarray(positions), d)
    for ax, layer_ranks, layer in zip(axes, ranks, layers, strict=True):
        for head, high in zip(layer_ranks.T, is_high(layer_ranks[-1], d), strict=True):
            ax.plot(positions, head, markersize=2.5, linewidth=1, alpha=0.85, **(HIGH if high else LOW))
        ax.plot(positions, bound, color="black", linewidth=1, linestyle=":")
        ax.set_xscale("log", base=2)
        ax.set_title(f"layer {layer}", fontsize="medium")
        ax.set_ylim(0, 1.12 * d)
    axes[0].annotate(
        "min(t, d)", (positions[-1], d), (0, 2), textcoords="offset points", ha="right", va="bottom", fontsize="x-small"
    )


def plot_rank_distribution(ax: Axes, groups: Mapping[str, NDArray]) -> None:
    """Relative effective rank r/d of all heads, sorted, one curve a group, with the gap (0.2, 0.8) shaded.

    Args:
        ax: where to draw.
        groups: label -> r/d over heads.
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


def plot_head_pairs(ax: Axes, x: NDArray, y: NDArray, high: NDArray[np.bool_], *, xlabel: str, ylabel: str) -> None:
    """Two quantities of the same heads, low ones as squares, high ones as dots."""
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


def plot_agreement(ax: Axes, matrix: NDArray, labels: Sequence[str], *, title: str) -> None:
    """Heat map of an agreement between every pair of inputs, numbers written in, lower triangle."""
    hidden = np.triu(np.ones_like(matrix, dtype=bool), k=1)
    sns.heatmap(
        matrix, mask=hidden, ax=ax, vmin=-0.2, vmax=1, cmap="cividis", annot=True, fmt=".2f", annot_kws={"fontsize": "x-small"},
        square=True, cbar=False, xticklabels=labels, yticklabels=labels,
    )  # fmt: skip
    ax.set_title(title, fontsize="medium")
    ax.tick_params(axis="both", length=0, labelsize="small")
    plt.setp(ax.get_xticklabels(), rotation=45, ha="right")


def plot_with_band(ax: Axes, x: Sequence[float], estimates: Sequence[Estimate], *, label: str, **style: Any) -> None:
    """Points with their intervals as a band, against x."""
    points, low, high = (np.array([getattr(e, name) for e in estimates]) for name in ("point", "low", "high"))
    [line] = ax.plot(x, points, label=label, **style)
    ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
