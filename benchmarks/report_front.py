"""The report's section on compression: what every way to make a tower smaller or faster costs, and which of them nothing beats."""

from __future__ import annotations

from typing import Any

from . import charts, markup
from .gather import Material

TITLES = {"image": "Image tower", "text": "Text tower", "joint": "Both towers"}
WORTH = 0.85
SLOWEST, LEAST = 1.3, 0.6  # what the charts show
SHORT = {"layers float": "float", "searched, ": "searched ", "one call, ": "1 call "}


def front(material: Material) -> str:
    """A chart and a table a tower, and the best pairs; nothing where no front was measured."""
    points = material.front.get("points", [])
    if not points:
        return ""
    lead = (
        f"<p>Each point is a graph that was built, embedded {material.front['n']:,} pairs and was timed in turns with all others, on {material.front['threads']} thread of "
        f"{markup.text(material.front['processor'])}; time and size are shares of float32 under ONNX Runtime. Coloured is what no other point beats in time, size and "
        "overlap at once; the area of a point goes with its bytes.</p>"
    )
    drawn = "".join(_chart([point for point in points if point["tower"] == tower], tower) for tower in TITLES)
    tables = "".join(_table([point for point in points if point["tower"] == tower], tower) for tower in TITLES)
    return f'{lead}<div class="two">{drawn}</div>{tables}'


def _name(point: dict[str, Any]) -> str:
    if point["tower"] == "joint":
        return " + ".join(f"{name} ({runtime})" for name, runtime in (point["image"], point["text"]))
    return f"{point['name']}, {point['runtime']}"


def _label(point: dict[str, Any]) -> str:
    if point["tower"] == "joint":
        return ""
    name = _name(point)
    for long, short in SHORT.items():
        name = name.replace(long, short)
    return name


def _chart(points: list[dict[str, Any]], tower: str) -> str:
    rows = [{"name": _label(point), "x": point["latency_ratio"], "value": point["overlap10"], "bytes": point["bytes_ratio"], "front": point["front"]} for point in points]
    drawn = [row for row in rows if row["x"] <= SLOWEST and row["value"] >= LEAST]
    if not drawn:
        return ""
    note = f"({len(drawn)} points; {len(rows) - len(drawn)} that are slower than {SLOWEST:g} or below {LEAST:g} stand in the table alone)"
    return markup.chart(charts.front(drawn, "time beside float32", "top-10 overlap", f"{TITLES[tower]}: overlap over time"), TITLES[tower], note)


def _table(points: list[dict[str, Any]], tower: str) -> str:
    shown = [point for point in points if point["front"] and point["overlap10"] >= WORTH] if tower == "joint" else points
    rows = [
        [
            markup.text(_name(point)) + (" " + markup.badge("front", "good") if point["front"] else ""), f"{point['latency_ratio']:.2f}",
            f"{point['latency_low']:.2f} to {point['latency_high']:.2f}", f"{point['bytes_ratio']:.2f}", f"{point['centred_p1']:.4f}", f"{point['overlap10']:.3f}",
            f"{-100 * point['recall1_loss']:+.2f}", f"{-100 * point['recall1_loss_high']:+.2f} to {-100 * point['recall1_loss_low']:+.2f}", f"{-100 * point['rare_loss']:+.2f}",
        ]
        for point in sorted(shown, key=lambda point: point["latency_ratio"])
    ]  # fmt: skip
    heads = ["form, runtime", "time", "95 % interval", "bytes", "centred cosine p1", "top-10 overlap", "recall@1, points", "95 % interval", "rare words, points"]
    what = f"pairs that nothing beats, of an overlap of at least {WORTH:g}" if tower == "joint" else "everything that was tried"
    return markup.table(f"{TITLES[tower]}: {what}", heads, rows) if rows else ""
