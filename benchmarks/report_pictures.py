"""The sections that show: headline tiles, sample pictures, training curves, retrieval examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import charts, markup
from .gather import Material, Picture

SHOWN = 8
"""Retrieval examples that are not folded away."""
NOISE = {"swapped": "another picture’s caption", "generic": "a bare tag"}

HEADLINES = {
    "recall5_student_trained": "recall@5 of the reinforced student in a drawing style it never saw",
    "recall5_plain_trained": "recall@5 of the same student trained without reinforcement",
    "recall5_ensemble_trained": "recall@5 of its teachers together",
    "recall5_student_held_out": "recall@5 of the student on concepts held out of training",
    "recall5_plain_held_out": "recall@5 of the plain student on concepts held out of training",
    "search_hits_of_20": "of 20 everyday queries find their picture in the top five",
    "bundle_megabytes": "both towers, fp32, on the device",
    "image_tower_ms": "image tower, median, one thread",
    "cold_start_seconds": "from a fresh process to the first embedding",
}
"""Figures that become tiles, in this order; all others go into a folded table."""
SPLITS = {"held_out": "held out of training", "trained": "trained concept"}


def headline(material: Material) -> dict[str, Any]:
    """The run's headline, and what the results and bundles say where it is silent."""
    found = dict(material.tables.get("headline") or {})
    manifest = material.manifests.get("bundle")
    if manifest and "bundle_megabytes" not in found:
        sizes = {a["tower"]: a["bytes"] for a in manifest["artefacts"] if (a["target"], a["precision"], a["status"], a["batch"]) == ("onnx", "fp32", "proven", "dynamic")}
        if len(sizes) == 2:
            found["bundle_megabytes"] = sum(sizes.values()) / 1e6
    name = (manifest or {}).get("name")
    own = [row for row in material.lines if name is None or (row["bundle"] or {}).get("name") == name]
    here = [row for row in own if row["kind"] == "latency" and not row["settings"].get("mode") and not row.get("device")]
    towers = [row["summary"]["p50"] / 1e6 for row in here if row["phase"] == "image_tower"]
    if towers:
        found.setdefault("image_tower_ms", min(towers))
    starts = [row["summary"]["p50"] / 1e9 for row in own if row["kind"] == "cold_start"]
    if starts:
        found.setdefault("cold_start_seconds", max(starts))
    return found


def tiles(found: dict[str, Any]) -> str:
    """The headline figures as tiles. A value is a number, a text, or an object with value, low and high; `NAME_low` and `NAME_high` beside NAME
    are its interval, and the unit follows from the end of the name. Without any known name the first six become tiles.
    """
    parts = {name for name in found if name.endswith(("_low", "_high")) and name.rsplit("_", 1)[0] in found}
    known = [name for name in HEADLINES if name in found] or [name for name in found if name not in parts][:6]
    cells = []
    for name in known:
        value, low, high = _triple(found, name)
        interval = f'<span class="interval">95 %: {low:.2f} to {high:.2f}</span>' if low is not None and high is not None else ""
        label = HEADLINES.get(name) or name.replace("_", " ")
        cells.append(f'<li><span class="figure">{_figure(name, value)}</span>{interval}<span class="name">{markup.text(label)}</span></li>')
    return f'<ul class="tiles">{"".join(cells)}</ul>' if cells else ""


def figures(found: dict[str, Any]) -> str:
    """Every headline figure by its name in summary.json, folded away."""
    parts = {name for name in found if name.endswith(("_low", "_high")) and name.rsplit("_", 1)[0] in found}
    rows = []
    for name in found:
        if name not in parts:
            value, low, high = _triple(found, name)
            interval = f"{low:.3f} to {high:.3f}" if low is not None and high is not None else ""
            rows.append([f"<code>{markup.text(name)}</code>", _figure(name, value), interval])
    if not rows:
        return ""
    inner = markup.table("Figures of the run by name", ["Name", "value", "95 % interval"], rows)
    return f"<details><summary>All {len(rows)} figures by name</summary>{inner}</details>"


def _triple(found: dict[str, Any], name: str) -> tuple[Any, float | None, float | None]:
    value = found[name]
    if isinstance(value, dict):
        return value.get("value"), value.get("low"), value.get("high")
    return value, found.get(f"{name}_low"), found.get(f"{name}_high")


def _figure(name: str, value: object) -> str:
    if value is None:
        return markup.DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return markup.text(value if len(str(value)) <= 40 else f"{str(value)[:16]}…")
    for ending, unit in (("_seconds", " s"), ("_ms", " ms"), ("_megabytes", " MB"), ("_mb", " MB"), ("_gib", " GiB"), ("_ratio", "×"), ("_minutes", " min")):
        if name.endswith(ending):
            return markup.number(value) + unit
    if name.endswith("_p"):
        return f"{value:.2g}"
    if name.startswith("recall"):
        return f"{value:.2f}"
    if "cosine" in name:
        return markup.cosine(value)
    return f"{value:,}" if isinstance(value, int) else markup.number(value)


def samples(material: Material) -> str:
    """Training pictures with the captions the student was given, then test pictures in the style it never saw."""
    parts = []
    if material.train_samples:
        share = material.noise_share
        wrong = 1 - share.get("none", 1.0)
        if wrong > 0:
            kinds = ", ".join(f"{share[name]:.0%} {words}" for name, words in NOISE.items() if share.get(name))
            parts.append(
                f"<p>The training pairs are like pairs from a crawl: {wrong:.0%} of the captions are not the picture’s own ({kinds}). "
                "Nobody tells the training which ones. They are marked here for you.</p>"
            )
        parts.append("<h3>Training pictures and the captions they came with</h3>" + _gallery(material.train_samples))
    if material.test_samples:
        parts.append("<h3>Test pictures: a drawing style that no training picture has</h3>" + _gallery(material.test_samples))
    return "".join(parts)


def _gallery(pictures: Sequence[Picture]) -> str:
    cells = []
    for picture in pictures:
        noisy = picture.noise in NOISE
        alt = f"{picture.style} picture; its caption reads: {picture.caption}" + (f" ({NOISE[picture.noise]})" if noisy else "")
        marks = markup.badge({"swapped": "wrong caption", "generic": "bare tag"}[picture.noise], "warn") if noisy else ""
        marks += markup.badge("held out") if picture.held_out else ""
        cells.append(
            f'<li{" class=noisy" if noisy else ""}><span class="frame">{image(picture, alt)}</span>{markup.text(picture.caption)}'
            f"{'<br>' + marks if marks else ''}{'<br><span class=muted>' + markup.text(picture.style) + '</span>' if picture.style else ''}</li>"
        )
    return f'<ul class="gallery">{"".join(cells)}</ul>'


def image(picture: Picture | None, alt: str) -> str:
    """An inlined picture, or a sentence in its place."""
    if picture is None or not picture.uri:
        return '<span class="none muted">no picture</span>'
    return f'<img src="{picture.uri}" alt="{markup.text(alt)}" loading="lazy" decoding="async">'


def training(material: Material) -> str:
    """Loss of every training, its terms, and the validation recall where it was recorded."""
    parts = []
    validation = []
    for name, rows in material.curves.items():
        for row in rows:
            value = _validation(row)
            if value is not None:
                validation.append({"samples": row["samples"], "value": value, "series": name})
    pairs = {name: [row for row in rows if row.get("phase") != "text"] or rows for name, rows in material.curves.items()}
    rates = {name: _rate(rows) for name, rows in pairs.items()}
    if validation:
        drawn = charts.curves(validation, "recall@5, validation style", "Validation recall at 5 over the samples seen, a line for each training", zero=True)
        parts.append(markup.chart(drawn, "Validation recall@5", "(another drawing style, used for choices only)"))
    for name, rows in pairs.items():
        kept = _smooth(rows)
        terms = sorted({term for row in kept for term in (row.get("loss_terms") or {})})
        points = [{"samples": row["samples"], "value": row["loss"], "series": "loss"} for row in kept]
        if len(terms) > 1:
            points += [
                {"samples": row["samples"], "value": row["loss_terms"][term], "series": term.replace("_", " ")}
                for row in kept
                for term in terms
                if term in (row.get("loss_terms") or {})
            ]
        last = rows[-1]
        note = f"{last['samples']:,.0f} samples" + (f" at {rates[name]:,.0f} a second" if rates[name] else "")
        note += "; before it, the text tower alone on texts" if len(rows) < len(material.curves[name]) else ""
        drawn = charts.curves(
            points, "loss", f"Training loss of {name} over the samples seen; it ends at {last['loss']:.3f} after {last['samples']:,.0f} samples"
        )
        parts.append(markup.chart(drawn, name, f"({note})"))
    intro = "<p>Each student saw the same pairs equally often. Their losses have different terms, so compare shapes, not heights; the recall tables are what compares them.</p>"
    return intro + f'<div class="two">{"".join(parts)}</div>' if parts else ""


def _validation(row: dict[str, Any]) -> float | None:
    found = row.get("validation")
    names = ("recall@5_trained", "recall@5_all", "recall@5")
    value = next((found[name] for name in names if name in found), None) if isinstance(found, dict) else None
    value = value.get("value") if isinstance(value, dict) else value
    return float(value) if isinstance(value, int | float) else None


def _rate(rows: Sequence[dict[str, Any]]) -> float | None:
    rates = sorted(row["samples_per_second"] for row in rows if isinstance(row.get("samples_per_second"), int | float))
    return rates[len(rates) // 2] if rates else None


def _smooth(rows: Sequence[dict[str, Any]], points: int = 120) -> list[dict[str, Any]]:
    """Means of equal stretches, so that a long training draws as a line and not as a carpet."""
    if len(rows) <= points:
        return list(rows)
    made = []
    for index in range(points):
        part = rows[index * len(rows) // points : (index + 1) * len(rows) // points]
        names = {term for row in part for term in (row.get("loss_terms") or {})}
        terms = {}
        for name in names:
            values = [row["loss_terms"][name] for row in part if name in (row.get("loss_terms") or {})]
            terms[name] = sum(values) / len(values)
        made.append({"samples": part[-1]["samples"], "loss": sum(row["loss"] for row in part) / len(part), "loss_terms": terms})
    return made


def retrieval(material: Material) -> str:
    """Queries with the picture they mean and the five that were found."""
    cells, found_in = [], 0
    for example in material.tables.get("examples", []):
        target = material.pictures.get(example.get("target_key") or "")
        query = str(example.get("query", ""))
        split = SPLITS.get(str(example.get("split", "")), str(example.get("split", "")))
        right = next((place for place, result in enumerate(example.get("results", []), 1) if result.get("right")), None)
        found_in += right is not None
        verdict = markup.badge(f"found at place {right}", "good") if right else markup.badge("not among the five", "bad")
        hits = [f'<div class="hit target"><span class="frame">{image(target, f"the picture that is meant: {query}")}</span><b>meant</b></div>']
        for place, result in enumerate(example.get("results", [])[:5], 1):
            found = material.pictures.get(result.get("key", ""))
            caption = found.caption if found else str(result.get("key", ""))
            good = bool(result.get("right"))
            alt = f"place {place}, {'right' if good else 'wrong'}: {caption}"
            mark = "✓" if good else "✗"
            hits.append(
                f'<div class="hit {"right" if good else "wrong"}"><span class="frame">{image(found, alt)}</span>'
                f"<b>{mark} {place}</b> {markup.text(caption)} <span>{float(result.get('score', 0)):.2f}</span></div>"
            )
        cells.append(
            f'<article class="panel example"><p class="query">“{markup.text(query)}” {markup.badge(split)} {verdict}</p><div class="row">{"".join(hits)}</div></article>'
        )
    if not cells:
        return ""
    return (
        "<p>Each text was asked for among all test pictures. Left: the picture that is meant. Then the five nearest, with their cosine. "
        "A solid green frame (✓) is right, a dashed red one (✗) is wrong. "
        f'{found_in} of {len(cells)} find their picture among the five.</p><div class="examples">{"".join(cells[:SHOWN])}</div>'
        + (f'<details><summary>The other {len(cells) - SHOWN}</summary><div class="examples">{"".join(cells[SHOWN:])}</div></details>' if len(cells) > SHOWN else "")
    )
