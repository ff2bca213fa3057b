"""The sections that show: headline tiles, sample pictures, training curves, retrieval examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import charts, markup
from .gather import Material, Picture

NOISE = {"swapped": "another picture’s caption", "generic": "a bare tag"}

HEADLINES = {
    "recall5_student": "recall@5 of the reinforced student, unseen drawing style",
    "recall5_plain": "recall@5 of the same student without reinforcement",
    "recall5_teacher": "recall@5 of its teachers together",
    "recall5_student_held_out": "recall@5 of the student, concepts held out of training",
    "recall5_plain_held_out": "recall@5 of the plain student, concepts held out of training",
    "cold_start_seconds": "cold start: import, load, first embedding",
    "bundle_megabytes": "size of both towers on the device",
    "image_ms": "image tower, median",
    "text_ms": "text tower, median",
}
SPLITS = {"held_out": "held out of training", "trained": "trained concept"}


def tiles(headline: dict[str, Any]) -> str:
    """The headline figures. Values are numbers, texts, or objects with value, low and high; the unit follows from the end of the name."""
    cells = []
    for name, value in headline.items():
        label = HEADLINES.get(name) or name.replace("_", " ")
        interval = ""
        if isinstance(value, dict):
            if value.get("low") is not None and value.get("high") is not None:
                interval = f'<span class="interval">{value["low"]:.2f} to {value["high"]:.2f}</span>'
            value = value.get("value")
        cells.append(f'<li><span class="figure">{_figure(name, value)}</span>{interval}<span class="name">{markup.text(label)}</span></li>')
    return f'<ul class="tiles">{"".join(cells)}</ul>' if cells else ""


def _figure(name: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return markup.text(markup.DASH if value is None else {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value)
    for ending, unit in (("_seconds", " s"), ("_ms", " ms"), ("_megabytes", " MB"), ("_mb", " MB"), ("_gib", " GiB"), ("_ratio", "×"), ("_minutes", " min")):
        if name.endswith(ending):
            return markup.number(value) + unit
    if name.startswith("recall") or "cosine" in name:
        return f"{value:.2f}" if name.startswith("recall") else markup.cosine(value)
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
    rates = {name: _rate(rows) for name, rows in material.curves.items()}
    if validation:
        drawn = charts.curves(validation, "recall@5, validation style", "Validation recall at 5 over the samples seen, a line for each training", zero=True)
        parts.append(markup.chart(drawn, "Validation recall@5", "(a third drawing style, never reported on)"))
    for name, rows in material.curves.items():
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
        drawn = charts.curves(
            points, "loss", f"Training loss of {name} over the samples seen; it ends at {last['loss']:.3f} after {last['samples']:,.0f} samples"
        )
        parts.append(markup.chart(drawn, name, f"({note})"))
    intro = "<p>Each student saw the same pairs equally often. Their losses have different terms, so compare shapes, not heights; the recall tables below are what compares them.</p>"
    return intro + f'<div class="two">{"".join(parts)}</div>' if parts else ""


def _validation(row: dict[str, Any]) -> float | None:
    found = row.get("validation")
    value = found.get("recall@5") if isinstance(found, dict) else None
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
    cells = []
    for example in material.tables.get("examples", []):
        target = material.pictures.get(example.get("target_key", ""))
        query = str(example.get("query", ""))
        split = SPLITS.get(str(example.get("split", "")), str(example.get("split", "")))
        right = next((place for place, result in enumerate(example.get("results", []), 1) if result.get("right")), None)
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
        f'A solid green frame (✓) is right, a dashed red one (✗) is wrong.</p><div class="examples">{"".join(cells)}</div>'
    )
