"""Charts with sliders, as Vega-Lite: a page shows them without a network, and a picture of them without JavaScript."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import altair as alt
import numpy as np
import vl_convert
from matplotlib.colors import to_hex
from numpy.typing import NDArray

from staterank_utils.plotting import BLUE, ORANGE, ORDER_LOOKS
from staterank_utils.surgery import Head

LIVE = "this run"
DIGITS = (1, 2, 3, 4, 5, 6)  # thresholds 10^-1 to 10^-6
COLOURS = {order: to_hex(looks["color"]) for order, looks in ORDER_LOOKS.items()}


def embed(chart: alt.TopLevelMixin, *, name: str, alt_text: str) -> str:
    """A chart as HTML: its picture, and its specification, from which the page's script makes the live chart.

    Args:
        chart: of Altair, with its data inside.
        name: of the figure, unique on the page.
        alt_text: for those who cannot see it.

    Returns:
        One element `figure`.

    Example:
        >>> chart = alt.Chart(alt.Data(values=[{"x": 1}])).mark_point().encode(x="x:Q")
        >>> html = embed(chart, name="dots", alt_text="one dot")
        >>> html[:57], 'alt="one dot"' in html
        ('<figure class="interactive" data-name="dots"><img src="da', True)
    """
    spec = {"description": alt_text, **chart.to_dict()}
    picture = base64.b64encode(vl_convert.vegalite_to_svg(spec).encode()).decode()
    inside = json.dumps(spec).replace("</", "<\\/")
    return (
        f'<figure class="interactive" data-name="{escape(name)}"><img src="data:image/svg+xml;base64,{picture}" alt="{escape(alt_text)}">'
        f'<div class="live" role="group" aria-label="{escape(alt_text)}"></div><script type="application/json">{inside}</script></figure>'
    )


def rows_of(chart: alt.TopLevelMixin) -> list[dict[str, Any]]:
    """The numbers inside a chart: the rows of all its data, empty ones left out.

    Args:
        chart: of Altair.

    Example:
        >>> rows_of(alt.Chart(alt.Data(values=[{"x": 1}, {}])).mark_point().encode(x="x:Q"))
        [{'x': 1}]
    """
    found: dict[str, dict[str, Any]] = {}

    def look(part: Any) -> None:
        if isinstance(part, dict):
            values = part.get("data", {}).get("values", []) if isinstance(part.get("data"), dict) else []
            found.update({json.dumps(row): row for row in values if row})
            for each in part.values():
                look(each)
        elif isinstance(part, list):
            for each in part:
                look(each)

    look(chart.to_dict())
    return [*found.values()]


def bundle() -> str:
    """Vega-Embed, Vega-Lite and Vega as one script that needs no network.

    Example:
        >>> "window.vegaEmbed=" in bundle()
        True
    """
    return f"(function(){{{vl_convert.javascript_bundle('window.vegaEmbed = vegaEmbed;')}}})();\n"


def law_chart(
    half_lives: Mapping[str, NDArray[np.float64]],
    ranks: Mapping[str, NDArray[np.float64]],
    *,
    d: int,
    stored: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
) -> alt.LayerChart:
    """Rank against half-life: the law as a line, every head as a point; sliders for the threshold, d and one half-life.

    Args:
        half_lives: model -> tokens over heads, of this run: open marks; heads without decay are left out.
        ranks: model -> (threshold, head), effective ranks at 10^-1 to 10^-6.
        d: largest possible rank of these models, where the slider of d begins.
        stored: model -> half-lives and ranks at 10^-4 of the stored run: filled marks, shown at that threshold; empty for none.

    Raises:
        ValueError: not as many thresholds as `DIGITS`, or not as many ranks as half-lives.

    Example:
        >>> chart = law_chart({"hybrid": np.array([2.0, 80.0])}, {"hybrid": np.full((6, 2), 3.0)}, d=64, stored={})
        >>> [param["name"] for param in chart.to_dict()["params"]]
        ['digits', 'd', 'log_half_life']
    """
    heads = []
    for name, table in ranks.items():
        if table.shape != (len(DIGITS), len(half_lives[name])):
            raise ValueError(
                f"expected ranks of {name} of shape {(len(DIGITS), len(half_lives[name]))}, got {table.shape}"
            )
        for half_life, of_head in zip(half_lives[name], table.T, strict=True):
            if np.isfinite(half_life):
                of_digits = {f"r{digits}": round(float(rank), 2) for digits, rank in zip(DIGITS, of_head, strict=True)}
                heads.append({"run": LIVE, "model": name, "half_life": float(f"{half_life:.4g}"), **of_digits})
    before = [
        {"run": "stored", "model": name, "half_life": float(f"{half_life:.4g}"), "r4": round(float(rank), 2)}
        for name, of_heads in stored.items()
        for half_life, rank in zip(*of_heads, strict=True)
        if np.isfinite(half_life)
    ]

    def slider(name: str, label: str, value: int, low: int, high: int, step: float | int) -> alt.Parameter:
        return alt.param(name=name, value=value, bind=alt.binding_range(min=low, max=high, step=step, name=f"{label} "))

    sliders = (
        slider("digits", "threshold ε, 10 to the minus", 4, 1, 6, 1),
        slider("d", "size of a state, d", d, 16, 2 * d, 16),
        slider("log_half_life", "example half-life, log₂ of tokens", 0, -4, 9, 0.25),
    )
    by_law = f"min(d, 1 + digits * {math.log(10):.12f} * datum.half_life / {math.log(2):.12f})"
    x = (
        alt.X("half_life:Q", title="half-life, tokens")
        .scale(type="log", domain=[0.03, 1000])
        .axis(format="~g", tickCount=5)
    )
    y = alt.Y("rank:Q", title="effective rank r").scale(domainMin=0, domainMax=alt.ExprRef(f"1.1 * max(d, {d})"))
    looks = {
        "x": x,
        "y": y,
        "color": alt.Color("model:N")
        .scale(range=[to_hex(colour) for colour in (BLUE, ORANGE)])
        .legend(orient="top", title=None),
        "shape": alt.Shape("model:N").legend(orient="top", title=None),
        "tooltip": [
            alt.Tooltip("run:N"),
            alt.Tooltip("model:N"),
            alt.Tooltip("half_life:Q", title="half-life, tokens", format=".3~g"),
            alt.Tooltip("rank:Q", title="effective rank", format=".1f"),
        ],
    }
    live = alt.Chart(alt.Data(values=heads)).transform_calculate(rank="datum['r' + digits]")
    known = alt.Chart(alt.Data(values=before)).transform_filter("digits == 4").transform_calculate(rank="datum.r4")
    points = [
        *([known.mark_point(size=30, opacity=0.5, filled=True).encode(**looks)] if before else []),
        live.mark_point(size=30, opacity=0.75).encode(**looks),
    ]
    curve = (
        alt.Chart(alt.sequence(-5, 10, 0.02, as_="log"))
        .transform_calculate(half_life="pow(2, datum.log)")
        .transform_calculate(rank=by_law)
        .mark_line(color="#888", strokeWidth=2)
        .encode(x=x, y=y)
    )
    one = (
        alt.Chart(alt.Data(values=[{}]))
        .transform_calculate(half_life="pow(2, log_half_life)")
        .transform_calculate(rank=by_law)
        .transform_calculate(
            text="'half-life ' + format(datum.half_life, '.3~g') + ' tokens: rank ' + format(datum.rank, '.1f') + ' of ' + d"
        )
    )
    mark = one.mark_point(
        shape="diamond", size=180, filled=True, color="black", stroke="white", strokeWidth=1.5, opacity=1
    ).encode(x=x, y=y)
    text = one.mark_text(fontSize=14, align="left", baseline="top", color="#d55e00").encode(
        x=alt.value(8), y=alt.value(4), text="text:N"
    )
    chart: Any = alt.layer(curve, *points, mark, text).add_params(*sliders)
    return chart.properties(width="container", height=300)


def heads_chart(
    heads: Sequence[Head],
    measures: Mapping[str, Sequence[float]],
    places: Mapping[str, Sequence[int]],
    added: Sequence[Mapping[str, Any]],
) -> alt.VConcatChart:
    """A grid of heads, layer by layer: colour by a measure, a slider that removes heads, what that costs, and the numbers of one head.

    Args:
        heads: (layer, head) of each.
        measures: label -> one number per head; the first is shown at the beginning.
        places: order of removal -> place of each head in it, 0 for the first to go.
        added: one row per order and dose: "order", "n" (heads removed), "added" (nats per token).

    Example:
        >>> rows = [{"order": "high rank", "n": 1, "added": 0.1}]
        >>> chart = heads_chart([(0, 0), (0, 1)], {"r / d": [0.1, 0.9]}, {"high rank": [1, 0]}, rows)
        >>> sorted(param["name"] for param in chart.to_dict()["params"])[-4:]
        ['n_removed', 'order', 'seen_head', 'seen_layer']
    """
    rows = [
        {"layer": layer, "head": head}
        | {label: float(f"{values[i]:.4g}") for label, values in measures.items()}
        | {f"place {order}": int(of[i]) for order, of in places.items()}
        for i, (layer, head) in enumerate(heads)
    ]
    labels, orders = [*measures], [*places]
    measure = alt.param(name="measure", value=labels[0], bind=alt.binding_select(options=labels, name="colour by "))
    order = alt.param(name="order", value=orders[0], bind=alt.binding_select(options=orders, name="first to go "))
    removed = alt.param(
        name="n_removed",
        value=len(heads) // 4,
        bind=alt.binding_range(min=0, max=len(heads) // 2, step=1, name="heads removed "),
    )
    layers = sorted({layer for layer, _ in heads})
    # One head to look at, by keys and by touch as well.
    seen_layer = alt.param(
        name="seen_layer", value=layers[0], bind=alt.binding_select(options=layers, name="look at layer ")
    )
    seen_head = alt.param(
        name="seen_head",
        value=0,
        bind=alt.binding_range(min=0, max=max(head for _, head in heads), step=1, name="head "),
    )
    base = (
        alt.Chart(alt.Data(values=rows))
        .transform_calculate(shown="datum[measure]", gone="datum['place ' + order] < n_removed")
        .encode(
            x=alt.X("head:O").axis(labelAngle=0),
            y=alt.Y("layer:O"),
            tooltip=["layer:O", "head:O", *(f"{label}:Q" for label in labels)],
        )
    )
    cells = base.mark_rect(stroke="white").encode(
        color=alt.Color("shown:Q").scale(scheme="cividis").legend(title=None, orient="right")
    )
    cross, gone = "M-1,-1L1,1M-1,1L1,-1", base.transform_filter("datum.gone")
    halo = gone.mark_point(shape=cross, size=60, strokeWidth=5, stroke="black", opacity=1)
    crosses = gone.mark_point(shape=cross, size=60, strokeWidth=2.5, stroke="white", opacity=1)
    seen = base.transform_filter("datum.layer == seen_layer && datum.head == seen_head")
    frame = seen.mark_rect(filled=False, stroke="#d55e00", strokeWidth=3)
    numbers = [f"'{label} ' + format(datum['{label}'], '.3~g')" for label in labels]
    pairs = [
        " + ', ' + ".join(numbers[i : i + 2]) for i in range(0, len(numbers), 2)
    ]  # as much as a phone shows in a line
    place = "'layer ' + datum.layer + ', head ' + datum.head + ': number ' + (1 + datum['place ' + order]) + ' to go'"
    told = seen.transform_calculate(told=" + '\\n' + ".join([place, *pairs])).mark_text(
        align="left", baseline="bottom", color="#d55e00", fontSize=12, lineBreak="\n", lineHeight=14
    )
    told = told.encode(x=alt.value(0), y=alt.value(-4 - 14 * len(pairs)), text="told:N")
    grid = alt.layer(cells, halo, crosses, frame, told).properties(width=480, height=22 * len(layers))
    x = alt.X("n:Q", title="heads removed").scale(domain=[0, len(heads) // 2])
    y = alt.Y("added:Q", title="added nats per token")
    shown = [*dict.fromkeys(str(row["order"]) for row in added)]
    looks = alt.Scale(domain=shown, range=[COLOURS.get(each, "#777") for each in shown])
    curves = (
        alt.Chart(alt.Data(values=[dict(row) for row in added]))
        .mark_line(point=True)
        .encode(
            x=x,
            y=y,
            color=alt.Color("order:N", scale=looks).legend(orient="top", title=None),
            strokeDash=alt.StrokeDash("order:N").legend(None),
            opacity=alt.condition("datum.order == order", alt.value(1), alt.value(0.5)),
            tooltip=[
                alt.Tooltip("order:N", title="first to go"),
                alt.Tooltip("n:Q", title="heads removed"),
                alt.Tooltip("added:Q", title="added nats per token", format=".2f"),
            ],
        )
    )
    rule = (
        alt.Chart(alt.Data(values=[{}]))
        .transform_calculate(n="n_removed")
        .mark_rule(color="#d55e00", strokeWidth=2)
        .encode(x=x)
    )
    below = alt.layer(curves, rule).properties(width=480, height=180)
    both: alt.VConcatChart = (
        alt.vconcat(grid, below)
        .resolve_scale(color="independent")
        .add_params(measure, order, removed, seen_layer, seen_head)
    )
    return both
