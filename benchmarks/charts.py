"""Charts of the report as inline SVG: drawn by Vega-Lite (altair, vl-convert), coloured by the page's own CSS variables.

Colours and text are written as `var(--…)` and `currentColor`, so one drawing serves light and dark. Every chart is at most 540 units wide and
scales with its column; the numbers behind it stand in a table of the page, so the drawing itself is one labelled image to a screen reader.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from runtime.errors import MissingExtraError

KINDS = ("baseline", "teacher", "student", "artefact")
"""Kinds of rows, in the order in which they take the colours --k1 … --k4."""

WIDTH, HEIGHT, LABEL = 380, 260, 11
"""Of the plotting area, and of the labels of points, in units of the drawing."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def recall_dots(rows: Sequence[dict[str, Any]], metric: str, title: str) -> str:
    """A dot with its 95 % interval a model. Rows: {"model", "kind", "value", "low", "high"}; a value of None draws "no answer"."""
    alt = _altair()
    values = [{**row, "text": "no answer" if row["value"] is None else f"{row['value']:.2f}"} for row in rows]
    top = max([row["high"] for row in rows if row["value"] is not None] or [0.1])
    known = [row for row in values if row["value"] is not None]
    order = [row["model"] for row in rows]
    scale = alt.Scale(domain=[0, min(1.0, top * 1.18)], nice=False)
    y = alt.Y("model:N", sort=order, title=None, axis=alt.Axis(labelLimit=190, ticks=False, domain=False, labelPadding=8, grid=False))
    color = _kind_color(alt)
    base = alt.Chart(alt.Data(values=known))
    layers = [
        alt.Chart(alt.Data(values=values)).mark_text(fill="none").encode(y=y),  # keeps rows without an answer on the axis
        base.mark_rule(strokeWidth=3, opacity=0.45).encode(
            x=alt.X("low:Q", scale=scale, title=metric, axis=alt.Axis(tickCount=5)), x2="high:Q", y=y, color=color
        ),
        base.mark_circle(size=110, opacity=1).encode(x=alt.X("value:Q", scale=scale, title=metric), y=y, color=color),
        base.mark_text(align="left", dx=7, fontSize=12, fill="currentColor").encode(x=alt.X("high:Q", scale=scale, title=metric), y=y, text="text:N"),
    ]
    silent = [row for row in values if row["value"] is None]
    if silent:
        mark = alt.Chart(alt.Data(values=silent)).mark_text(align="left", fontSize=12, fontStyle="italic", fill="var(--muted)", x=6)
        layers.append(mark.encode(y=y, text="text:N"))
    return _svg(alt.layer(*layers).properties(width=WIDTH - 60, height=alt.Step(30)), title)


def curves(rows: Sequence[dict[str, Any]], y_title: str, title: str, *, zero: bool = False, logarithmic: bool = False) -> str:
    """Lines over samples seen. Rows: {"samples", "value", "series"}; series take the colours in the order of appearance. Rows with "low" and "high"
    get a band."""
    alt = _altair()
    names = list(dict.fromkeys(row["series"] for row in rows))
    color = alt.Color(
        "series:N",
        scale=alt.Scale(domain=names, range=[f"var(--s{index % 6 + 1})" for index in range(len(names))]),
        legend=alt.Legend(orient="top", title=None, labelLimit=200, symbolType="stroke", symbolStrokeWidth=3, columns=3) if len(names) > 1 else None,
    )
    base = alt.Chart(alt.Data(values=list(rows)))
    scale = alt.Scale(type="log", nice=False) if logarithmic else alt.Scale()
    ticks: dict[str, Any] = {"values": sorted({row["samples"] for row in rows})} if logarithmic else {"tickCount": 5}
    x = alt.X("samples:Q", title="samples seen", scale=scale, axis=alt.Axis(format="~s", **ticks))
    y_scale = alt.Scale(zero=zero)
    chart = base.mark_line(strokeWidth=2, interpolate="linear" if logarithmic else "monotone", point=len(rows) <= 24).encode(
        x=x, y=alt.Y("value:Q", title=y_title, scale=y_scale, axis=alt.Axis(tickCount=5)), color=color
    )
    if rows and all("low" in row for row in rows):
        chart = base.mark_area(opacity=0.15).encode(x=x, y=alt.Y("low:Q", scale=y_scale, title=y_title), y2="high:Q", color=color) + chart
    return _svg(chart.properties(width=WIDTH, height=220), title)


def scatter(rows: Sequence[dict[str, Any]], x_title: str, y_title: str, title: str) -> str:
    """Accuracy against a cost. Rows: {"model", "kind", "x", "value", "low", "high"}; x is logarithmic when it spans more than 4 times."""
    alt = _altair()
    xs = [row["x"] for row in rows]
    logarithmic = max(xs) / min(xs) > 4
    x_domain = (min(xs) / 1.5, max(xs) * 1.5) if logarithmic else (0.0, max(xs) * 1.25)
    low, high = min(row["low"] for row in rows), max(row["high"] for row in rows)
    room = max(0.01, (high - low) * 0.15)
    y_domain = (max(0.0, low - room), min(1.0, high + room))
    scale = alt.Scale(type="log" if logarithmic else "linear", domain=x_domain, nice=False)
    y_scale = alt.Scale(domain=y_domain, nice=False, zero=False)
    x = alt.X("x:Q", title=x_title, scale=scale, axis=alt.Axis(tickCount=5, format="~g"))
    color = _kind_color(alt)

    def to_pixels(row: dict[str, Any]) -> tuple[float, float]:
        start, stop, at = (math.log(value) if logarithmic else value for value in (*x_domain, row["x"]))
        return WIDTH * (at - start) / (stop - start), HEIGHT * (y_domain[1] - row["value"]) / (y_domain[1] - y_domain[0])

    labels = place_labels([(*to_pixels(row), str(row["model"])) for row in rows], WIDTH, HEIGHT)
    base = alt.Chart(alt.Data(values=list(rows)))
    layers = [
        base.mark_rule(strokeWidth=2, opacity=0.35).encode(x=x, y=alt.Y("low:Q", scale=y_scale, title=y_title, axis=alt.Axis(tickCount=5)), y2="high:Q", color=color),
        base.mark_circle(size=110, opacity=0.9).encode(x=x, y=alt.Y("value:Q", scale=y_scale, title=y_title), color=color),
    ]
    for label in labels:
        point = alt.Chart(alt.Data(values=[label]))
        if label["leader"]:
            line = {"x": alt.value(label["point_x"]), "x2": alt.value(label["anchor_x"]), "y": alt.value(label["point_y"]), "y2": alt.value(label["y"])}
            layers.append(point.mark_rule(strokeWidth=1, stroke="var(--muted)", opacity=0.6).encode(**line))
        layers.append(point.mark_text(align="left", fontSize=LABEL, fill="currentColor").encode(x=alt.value(label["x"]), y=alt.value(label["y"]), text="text:N"))
    return _svg(alt.layer(*layers).properties(width=WIDTH, height=HEIGHT), title)


def front(rows: Sequence[dict[str, Any]], x_title: str, y_title: str, title: str) -> str:
    """Points of a trade-off, those on its front coloured and named. Rows: {"name", "x", "value", "bytes", "front"}; the area of a point goes with its bytes."""
    alt = _altair()
    x_domain, low = (0.0, max(row["x"] for row in rows) * 1.1), min(row["value"] for row in rows)
    y_domain = (max(0.0, low - 0.05), 1.02)
    x = alt.X("x:Q", title=x_title, scale=alt.Scale(domain=x_domain, nice=False), axis=alt.Axis(tickCount=6, format="~g"))
    y = alt.Y("value:Q", title=y_title, scale=alt.Scale(domain=y_domain, nice=False, zero=False), axis=alt.Axis(tickCount=5))
    size = alt.Size("bytes:Q", scale=alt.Scale(domain=[0, max(row["bytes"] for row in rows)], range=[10, 220]), legend=None)
    best = sorted((row for row in rows if row["front"]), key=lambda row: (row["x"], -row["value"]))
    layers = [
        alt.Chart(alt.Data(values=[row for row in rows if not row["front"]])).mark_circle(opacity=0.75, color="var(--k1)").encode(x=x, y=y, size=size),
        alt.Chart(alt.Data(values=best)).mark_circle(opacity=0.95, color="var(--k3)").encode(x=x, y=y, size=size),
    ]

    def to_pixels(row: dict[str, Any]) -> tuple[float, float]:
        return WIDTH * row["x"] / x_domain[1], HEIGHT * (y_domain[1] - row["value"]) / (y_domain[1] - y_domain[0])

    for label in place_labels([(*to_pixels(row), str(row["name"])) for row in best], WIDTH, HEIGHT):
        point = alt.Chart(alt.Data(values=[label]))
        if label["leader"]:
            line = {"x": alt.value(label["point_x"]), "x2": alt.value(label["anchor_x"]), "y": alt.value(label["point_y"]), "y2": alt.value(label["y"])}
            layers.append(point.mark_rule(strokeWidth=1, stroke="var(--muted)", opacity=0.6).encode(**line))
        layers.append(point.mark_text(align="left", fontSize=LABEL, fill="currentColor").encode(x=alt.value(label["x"]), y=alt.value(label["y"]), text="text:N"))
    return _svg(alt.layer(*layers).properties(width=WIDTH, height=HEIGHT), title)


def place_labels(points: Sequence[tuple[float, float, str]], width: float, height: float) -> list[dict[str, Any]]:
    """Where labels go so that none covers another label or a point: beside its point, else further up or down with a thin leader.

    Args:
        points: (x, y, text) in pixels, y downwards.

    Returns:
        {"text", "x" (left end), "y" (middle), "leader", "point_x", "point_y", "anchor_x"} in the order of the points.
    """
    tall = LABEL + 3.0
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in points]
    placed: list[dict[str, Any]] = []
    for x, y, text in points:
        wide = 0.56 * LABEL * len(text) + 2
        best: tuple[float, float, float, bool] | None = None
        for step in range(24):
            for sign in (-1, 1) if step else (1,):
                middle = y + sign * step * tall / 2
                for left in (x + 9, x - 9 - wide):
                    box = (left, middle - tall / 2, left + wide, middle + tall / 2)
                    inside = box[0] >= 0 and box[2] <= width + 24 and box[1] >= -4 and box[3] <= height + 2
                    cost = step + (0 if inside else 40) + 100 * sum(_overlap(box, other) for other in taken)
                    if best is None or cost < best[0]:
                        best = (cost, left, middle, step > 1)
        assert best is not None
        _, left, middle, leader = best
        taken.append((left, middle - tall / 2, left + wide, middle + tall / 2))
        anchor = left - 2 if left > x else left + wide + 1
        placed.append({"text": text, "x": left, "y": middle, "leader": leader, "point_x": x, "point_y": y, "anchor_x": anchor})
    return placed


def _overlap(first: tuple[float, float, float, float], second: tuple[float, float, float, float]) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


def latency_bars(rows: Sequence[dict[str, Any]], title: str) -> str:
    """Bars of p50 (full), p90 and p99 (paler). Rows: {"label", "p50", "p90", "p99"} in milliseconds."""
    alt = _altair()
    order = [row["label"] for row in rows]
    values = [{**row, "text": _milliseconds(row["p50"])} for row in rows]
    scale = alt.Scale(domain=[0, max(row["p99"] for row in rows) * 1.22], nice=False)
    y = alt.Y("label:N", sort=order, title=None, axis=alt.Axis(labelLimit=260, ticks=False, domain=False, labelPadding=8, grid=False))
    base = alt.Chart(alt.Data(values=values))
    layers = [
        base.mark_bar(height=16, cornerRadiusEnd=3, fill=f"var(--s1-{tint})").encode(
            x=alt.X(f"{column}:Q", scale=scale, title="milliseconds", axis=alt.Axis(tickCount=5)), y=y
        )
        for column, tint in (("p99", "pale"), ("p90", "mid"), ("p50", "full"))
    ]
    layers.append(
        base.mark_text(align="left", dx=6, fontSize=12, fill="currentColor").encode(x=alt.X("p99:Q", scale=scale, title="milliseconds"), y=y, text="text:N")
    )
    return _svg(alt.layer(*layers).properties(width=WIDTH - 120, height=alt.Step(28)), title)


def ratio_bars(rows: Sequence[dict[str, Any]], title: str) -> str:
    """Ratios with intervals around 1, the band of ±1 % behind them. Rows: {"label", "value", "low", "high", "verdict"}."""
    alt = _altair()
    low, high = min([0.97, *(row["low"] for row in rows)]), max([1.03, *(row["high"] for row in rows)])
    logarithmic = high / low > 3
    scale = alt.Scale(type="log" if logarithmic else "linear", domain=(low / 1.03, high * 1.03), nice=False, zero=False)
    y = alt.Y("label:N", sort=[row["label"] for row in rows], title=None, axis=alt.Axis(labelLimit=230, ticks=False, domain=False, labelPadding=8, grid=False))
    color = alt.Color("verdict:N", scale=alt.Scale(domain=["faster", "slower"], range=["var(--good)", "var(--bad)"]), legend=None)
    base = alt.Chart(alt.Data(values=list(rows)))
    x = alt.X("low:Q", scale=scale, title="time of the candidate over time of the reference", axis=alt.Axis(tickCount=5, format="~g"))
    layers = [
        alt.Chart(alt.Data(values=[{"from": 0.99, "to": 1.01}])).mark_rect(opacity=0.5, color="var(--grid)").encode(x=alt.X("from:Q", scale=scale), x2="to:Q"),
        base.mark_rule(strokeWidth=3, opacity=0.6).encode(x=x, x2="high:Q", y=y, color=color),
        base.mark_circle(size=80, opacity=1).encode(x=alt.X("value:Q", scale=scale), y=y, color=color),
    ]
    return _svg(alt.layer(*layers).properties(width=WIDTH - 90, height=alt.Step(26)), title)


def parity_points(rows: Sequence[dict[str, Any]], title: str) -> str:
    """Cosine against latency. Rows: {"name", "x" (ms), "value" (None: not measured, drawn hollow on the lower edge)}."""
    alt = _altair()
    xs, known = [row["x"] for row in rows], [row["value"] for row in rows if row["value"] is not None]
    logarithmic = max(xs) / min(xs) > 4
    x_domain = (min(xs) / 1.4, max(xs) * 1.4) if logarithmic else (0.0, max(xs) * 1.2)
    low = min([*known, 0.999])
    y_domain = (low - (1 - low) * 0.35, 1 + (1 - low) * 0.15)
    x = alt.X("x:Q", title="p50, milliseconds", scale=alt.Scale(type="log" if logarithmic else "linear", domain=x_domain, nice=False), axis=alt.Axis(tickCount=5, format="~g"))
    y = alt.Y("value:Q", title="least cosine", scale=alt.Scale(domain=y_domain, nice=False, zero=False), axis=alt.Axis(tickCount=5))
    placed = [{**row, "value": y_domain[0] if row["value"] is None else row["value"], "known": row["value"] is not None} for row in rows]
    layers = [
        alt.Chart(alt.Data(values=[row for row in placed if row["known"]])).mark_point(filled=True, size=95, opacity=0.9, color="var(--k3)").encode(x=x, y=y),
        alt.Chart(alt.Data(values=[row for row in placed if not row["known"]])).mark_point(filled=False, size=95, strokeWidth=2, color="var(--k1)").encode(x=x, y=y),
    ]

    def to_pixels(row: dict[str, Any]) -> tuple[float, float]:
        start, stop, at = (math.log(value) if logarithmic else value for value in (*x_domain, row["x"]))
        return WIDTH * (at - start) / (stop - start), HEIGHT * (y_domain[1] - row["value"]) / (y_domain[1] - y_domain[0])

    for label in place_labels([(*to_pixels(row), str(row["name"])) for row in placed], WIDTH, HEIGHT) if len(placed) <= 14 else []:
        point = alt.Chart(alt.Data(values=[label]))
        layers.append(point.mark_text(align="left", fontSize=LABEL, fill="currentColor").encode(x=alt.value(label["x"]), y=alt.value(label["y"]), text="text:N"))
    return _svg(alt.layer(*layers).properties(width=WIDTH, height=HEIGHT), title)


def sample_strip(samples: Sequence[int], title: str) -> str:
    """Every kept sample in the order of measuring (nanoseconds, drawn in ms, cut at p99.5), so that drift and outliers are seen."""
    alt = _altair()
    ordered = sorted(samples)
    ceiling = ordered[min(len(ordered) - 1, int(len(ordered) * 0.995))] / 1e6
    step = max(1, len(samples) // 400)
    values = [{"n": index, "ms": min(samples[index] / 1e6, ceiling)} for index in range(0, len(samples), step)]
    chart = alt.Chart(alt.Data(values=values)).mark_circle(size=9, opacity=0.6, fill="var(--s1)")
    chart = chart.encode(
        x=alt.X("n:Q", title="sample number", axis=alt.Axis(tickCount=5, grid=False)),
        y=alt.Y("ms:Q", title="ms", scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=3)),
    )
    return _svg(chart.properties(width=WIDTH, height=110), title)


def _milliseconds(value: float) -> str:
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _kind_color(alt: Any) -> Any:
    return alt.Color("kind:N", scale=alt.Scale(domain=list(KINDS), range=[f"var(--k{index})" for index in range(1, 5)]), legend=None)


def _svg(chart: Any, title: str) -> str:
    import vl_convert

    chart = chart.configure(background="transparent", font=FONT, aria=False, padding=4)
    chart = chart.configure_view(stroke=None)
    chart = chart.configure_axis(
        labelColor="currentColor",
        titleColor="var(--muted)",
        gridColor="var(--grid)",
        domainColor="var(--grid)",
        tickColor="var(--grid)",
        labelFontSize=12,
        titleFontSize=12,
        titleFontWeight="normal",
    ).configure_legend(labelColor="currentColor", labelFontSize=12, titleColor="var(--muted)")
    drawn = vl_convert.vegalite_to_svg(chart.to_dict())
    # identifiers must be unique in the page, or one drawing is clipped by the frame of another
    own = hashlib.sha256(drawn.encode()).hexdigest()[:8]
    drawn = re.sub(r'(\bid="|url\(#|xlink:href="#|\bhref="#)', rf"\g<1>g{own}-", drawn)
    # one labelled image; its size follows the column instead of the drawing
    drawn = re.sub(r'(<svg[^>]*?) width="[\d.]+" height="[\d.]+"', rf'\1 role="img" aria-label="{escape(title, quote=True)}"', drawn, count=1)
    return drawn


def _altair() -> Any:
    try:
        import altair
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(error.name or "altair", "bench", "The charts of the report") from error
    return altair
