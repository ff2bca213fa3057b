"""The report's section on learning efficiency: recall against samples seen, the ratio of samples, and what each addition is worth."""

from __future__ import annotations

from typing import Any

from . import charts, markup
from .gather import Material

CURVES = ("plain", "reinforced", "clean", "plain_25", "reinforced_25", "reinforced_0")
WORLDS = {"web50": "half of the captions wrong", "web25": "a quarter wrong", "web0": "clean captions", "apart": "teachers pretrained apart"}
QUERIES = {"held_out": "held-out concepts", "trained": "trained concepts"}


def efficiency(material: Material) -> str:
    """Curves, ratios, steps and the whole table; nothing where the experiment was not run."""
    found = material.efficiency
    if not found.get("arms"):
        return ""
    parts = [_headline(found), '<div class="two">', *(_curves(found, split) for split in QUERIES), "</div>", _ratios(found), _steps(found), _table(found)]
    return "".join(parts)


def _headline(found: dict[str, Any]) -> str:
    if "samples_ratio_plain_over_reinforced" not in found:
        return ""
    best = found["ratios"]["web50"]["trained"]["of_means"]
    return (
        f"<p>Plain training is best ({best['plain_best']:.3f}) after {best['plain_samples']:,} samples; the reinforced student is as good after "
        f"{best['other_samples']:,}. Over {found['seeds']} seeds the ratio is {found['samples_ratio_plain_over_reinforced']:g} in the median, "
        f"{found['samples_ratio_low']:g} to {found['samples_ratio_high']:g}. Same student from random weights, same pictures, each budget a training of its own; "
        "a caption that the text tower reads alone counts as a sample.</p>"
    )


def _curves(found: dict[str, Any], split: str) -> str:
    rows = []
    for arm in CURVES:
        points = [row for row in found["arms"] if row["arm"] == arm]
        if len(points) >= 2:
            for row in points:
                seeds = row[f"recall5_{split}_seeds"]
                rows.append({"samples": row["samples"], "value": row[f"recall5_{split}"], "series": row["title"], "low": min(seeds), "high": max(seeds)})
    if not rows:
        return ""
    drawn = charts.curves(rows, "recall@5, unseen style", f"Recall at 5 on {QUERIES[split]} over samples seen", zero=True, logarithmic=True)
    return markup.chart(drawn, f"Recall@5, {QUERIES[split]}", "(unseen drawing style; mean, smallest and largest seed)")


def _ratios(found: dict[str, Any]) -> str:
    rows = []
    for world, splits in found["ratios"].items():
        for split, row in splits.items():
            bounds = sorted({one["bound"] for one in row["seeds"]} - {""})
            rows.append([
                markup.text(f"{WORLDS[world]}, {QUERIES[split]}"), f"{row['median']:.2f}", f"{row['low']:.2f} to {row['high']:.2f}", f"{row['of_means']['ratio']:.2f}",
                f"{row['interval'][0]:.2f} to {row['interval'][1]:.2f}", f"{row['of_means']['plain_best']:.3f} at {row['of_means']['plain_samples']:,}",
                markup.text(", ".join(bounds) or "–"),
            ])  # fmt: skip
    heads = ["queries", "median of seeds", "range of seeds", "of mean curves", "90 % interval", "plain's best", "bounds among seeds"]
    return markup.table("Samples at which plain is best over samples at which reinforced is as good", heads, rows) if rows else ""


def _steps(found: dict[str, Any]) -> str:
    steps: list[dict[str, Any]] = list(found["steps"])
    if "same_twice" in found:
        steps.append({**found["same_twice"], "title": "the same training, other seeds", "against": "itself"})
    rows = [
        [markup.text(row["title"]), markup.text(row["against"].replace("_", " ")), f"{row['samples']:,}", f"{row['difference']:+.3f}", f"{row['low']:+.3f} to {row['high']:+.3f}",
         markup.text(row["verdict"])]
        for row in steps
    ]  # fmt: skip
    heads = ["step", "against", "samples", "recall@5", "95 % interval", "verdict"]
    return markup.table("What each step is worth, on trained concepts in the unseen style", heads, rows, textual=(1, 5)) if rows else ""


def _table(found: dict[str, Any]) -> str:
    rows = [
        [markup.text(row["title"]), f"{row['samples']:,}", f"{row['text_only_samples']:,}", str(row["seeds"]), f"{row['recall5_held_out']:.3f}", f"{row['recall5_trained']:.3f}",
         f"{row['setting'][0]}, {row['setting'][1]:g}"]
        for row in found["arms"]
    ]  # fmt: skip
    return markup.table("Every arm", ["arm", "samples", "of them texts alone", "seeds", "held out", "trained", "batch size, learning rate"], rows)
