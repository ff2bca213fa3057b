"""The sections that count: accuracy, accuracy against cost, latency, parity."""

from __future__ import annotations

from typing import Any

from . import charts, markup
from .gather import Material
from .results import Line

SPLIT_TITLES = {
    "held_out": "Concepts held out of training, unseen drawing style",
    "trained": "Trained concepts, unseen drawing style",
    "stamps": "Photographs (zero-shot)",
    "keycap": "Keycaps",
    "clock": "Clocks",
    "flag": "Flags",
    "all": "All queries",
}
DIRECTIONS = {"text_to_image": "text → image", "image_to_text": "image → text"}
PHASES = {
    "decode": "decode JPEG",
    "preprocess": "resize, crop, normalise",
    "tokenise": "tokenise",
    "image_tower": "image tower",
    "text_tower": "text tower",
    "end_to_end_image": "JPEG to embedding",
    "end_to_end_text": "string to embedding",
    "cold_start_image": "cold start, first picture",
    "cold_start_text": "cold start, first text",
}
CHARTED = ("held_out", "trained")
OPEN = ("held_out", "trained", "stamps")
"""Splits whose tables are not folded away."""


def accuracy(material: Material) -> str:
    """Recall with intervals: a chart for the two main splits, then every split as a table; image→text folded away."""
    rows = material.tables.get("rows", [])
    if not rows:
        return ""
    splits = sorted({row["split"] for row in rows}, key=lambda split: list(SPLIT_TITLES).index(split) if split in SPLIT_TITLES else len(SPLIT_TITLES))
    drawn = []
    for split in [split for split in CHARTED if split in splits] or splits[:1]:
        chosen = [row for row in rows if row["split"] == split and row["direction"] == "text_to_image"]
        points = [{"model": row["model"], "kind": row["kind"], **_interval(row)} for row in chosen]
        title = SPLIT_TITLES.get(split, split)
        drawn.append(
            markup.chart(
                charts.recall_dots(points, "recall@5, text → image", f"Recall at 5, {title}; the table below has the numbers"),
                title,
                "recall@5 with 95 % interval",
            )
        )
    tables, folded = [], []
    shown = [split for split in splits if split in OPEN] or splits
    for split in splits:
        forward, backward = (_recall_table(rows, split, direction) for direction in DIRECTIONS)
        if split in shown:
            tables.append(forward + (f"<details><summary>The other direction, image → text</summary>{backward}</details>" if backward else ""))
        else:
            folded.append(forward + backward)
    if folded:
        tables.append(f"<details><summary>The other slices: keycaps, clocks, flags, everything</summary>{''.join(folded)}</details>")
    legend = '<p class="legend">' + "".join(f"<span>{markup.dot(kind)}{kind}</span>" for kind in charts.KINDS) + "</p>"
    intro = (
        "<p>A query is the label of a concept; it counts when a picture of that concept is among the first k of the whole gallery. "
        "The baselines have no model: they look a caption up among the training captions, so for a concept that was held out they have no answer "
        "(it counts as recall 0).</p>"
    )
    return f'{intro}{legend}<div class="two">{"".join(drawn)}</div>{"".join(tables)}{_zero_shot(material)}{_paired(material)}'


def _recall_table(rows: list[dict[str, Any]], split: str, direction: str) -> str:
    chosen = [row for row in rows if row["split"] == split and row["direction"] == direction]
    if not chosen:
        return ""
    body = [[markup.dot(row["kind"]) + markup.text(row["model"]), *(_cell(row, f"recall@{k}") for k in (1, 5, 10))] for row in chosen]
    first = chosen[0]
    counts = f"{first['n']:,} queries among {first['gallery']:,}" if first.get("n") and first.get("gallery") else ""
    title = f"{SPLIT_TITLES.get(split, split)}, {DIRECTIONS.get(direction, direction)}" + (f" ({counts})" if counts else "")
    return markup.table(title, ["Model", "recall@1", "recall@5", "recall@10"], body)


def _zero_shot(material: Material) -> str:
    rows = material.tables.get("zero_shot", [])
    if not rows:
        return ""
    return markup.table(
        "Zero-shot classification into emoji groups, by prompts",
        ["Model", "accuracy"],
        [[markup.text(row["model"]), markup.recall(row["accuracy"])] for row in rows],
    )


def _paired(material: Material) -> str:
    """Artefacts against fp32 on the same queries, from `accuracy_comparison` lines."""
    body = []
    for line in material.lines:
        if line["kind"] == "accuracy_comparison":
            for test in line["figures"]["tests"]:
                if test["k"] == 5 and test["direction"] == "text_to_image" and test["split"] in (*OPEN, "all"):
                    tone = {"better": "good", "worse": "bad"}.get(test["verdict"], "plain")
                    change = f'{test["difference"]:+.4f}<span class="interval">{test["low"]:+.4f} to {test["high"]:+.4f}</span>'
                    cells = [markup.badge(test["verdict"], tone), markup.text(line["figures"]["reference"]), SPLIT_TITLES.get(test["split"], test["split"])]
                    body.append([markup.text(line["figures"]["candidate"]), *cells, change, f"{test['p']:.2g}"])
    if not body:
        return ""
    heads = ["Candidate", "is", "against", "split", "recall@5 change", "p"]
    return markup.table("Paired tests on the same queries (95 % interval, exact McNemar p)", heads, body, textual=(1, 2, 3))


def _answers(row: dict[str, Any]) -> bool:
    """Whether a row has any answer: a lookup that knows none of the queries has recall 0, but what is to be read is that it is silent."""
    return row.get("answered") != 0 and bool(row.get("recall@5")) and row["recall@5"].get("value") is not None


def _cell(row: dict[str, Any], name: str) -> str:
    return markup.recall(row.get(name) if _answers(row) else None)


def _interval(row: dict[str, Any]) -> dict[str, Any]:
    """Value, low and high of recall@5; None where there is no answer."""
    if not _answers(row):
        return {"value": None, "low": None, "high": None}
    found = row["recall@5"]
    return {name: found["value"] if found.get(name) is None else found[name] for name in ("value", "low", "high")}


def cost(material: Material) -> str:
    """Recall@5 against the time of a picture and a text together, and against megabytes."""
    rows = [row for row in material.tables.get("rows", []) if row["direction"] == "text_to_image"]
    split = "trained" if any(row["split"] == "trained" for row in rows) else (rows[0]["split"] if rows else "")
    held = {row["model"]: row for row in rows if row["split"] == "held_out"}
    chosen = [row for row in rows if row["split"] == split and _answers(row)]
    timed, sized = [], []
    for row in chosen:
        point = {"model": row["model"], "kind": row["kind"], **_interval(row)}
        if row.get("image_ms") and row.get("text_ms"):
            timed.append({**point, "x": row["image_ms"] + row["text_ms"]})
        if row.get("megabytes"):
            sized.append({**point, "x": row["megabytes"]})
    parts = []
    if len(timed) > 1:
        drawn = charts.scatter(timed, "ms for one picture and one text", "recall@5", "Recall at 5 against latency; the table below has the numbers")
        parts.append(markup.chart(drawn, "Accuracy against latency", "up and left is better"))
    if len(sized) > 1:
        drawn = charts.scatter(sized, "megabytes, both towers", "recall@5", "Recall at 5 against size; the table below has the numbers")
        parts.append(markup.chart(drawn, "Accuracy against size", "up and left is better"))
    body = [
        [
            markup.dot(row["kind"]) + markup.text(row["model"]),
            _cell(held[row["model"]], "recall@5") if row["model"] in held else markup.DASH,
            _cell(row, "recall@5"),
            markup.cosine(row.get("parity_cosine_min")),
            markup.number(row.get("image_ms")),
            markup.number(row.get("text_ms")),
            markup.number(row.get("megabytes")),
        ]
        for row in chosen
    ]
    if not body:
        return ""
    heads = ["Model", "recall@5, held out", f"recall@5, {split.replace('_', ' ')}", "least cosine to checkpoint", "image, ms", "text, ms", "MB"]
    return f'<div class="two">{"".join(parts)}</div>' + markup.table("Accuracy, parity and cost of each (a dash: not measured here)", heads, body)


def latency(material: Material) -> str:
    """Phases with p50, p90, p99; cold start; memory; share of the machine's peak."""
    lines = [row for row in material.lines if row["kind"] == "latency" and not row["settings"].get("mode") and not row["settings"].get("tool") and not row.get("device")]
    if not lines:
        return ""
    parts = []
    for name in dict.fromkeys((row["bundle"] or {}).get("name", "?") for row in lines):
        own = [row for row in lines if (row["bundle"] or {}).get("name", "?") == name]
        parts.append(_phases(name, own, material))
    parts += [_memory(material), _peak(material)]
    threads = sorted({row["settings"].get("threads") for row in lines if row["settings"].get("threads")})
    counts = f"{' and '.join(map(str, threads)) or 'one'} thread{'' if threads in ([1], []) else 's'}"
    intro = f"<p>One picture or one text at a time, {counts}, warm. Every kept sample is in the results file.</p>"
    return intro + "".join(part for part in parts if part)


def _phases(name: str, lines: list[Line], material: Material) -> str:
    rows = [{"label": _label(row), **{p: row["summary"][p] / 1e6 for p in ("p50", "p90", "p99")}} for row in lines]
    drawn = [
        markup.chart(
            charts.latency_bars(rows, f"Latency of each phase of {name}; the table below has the numbers"),
            f"Where the time goes: {name}",
            "p50 (number and full bar), p90, p99 (paler)",
        )
    ]
    towers = [row for phase in ("image_tower", "text_tower") for row in [row for row in lines if row["phase"] == phase][:1]]
    if towers:
        strips = "".join(
            f"<h3>{markup.text(_label(row))}</h3>"
            + charts.sample_strip(row["samples"], f"Every sample of {_label(row)} in the order of measuring; drift {row['summary'].get('drift', 1):.2f}")
            for row in towers
        )
        drawn.append(f'<figure class="chart"><figcaption><b>Every sample, in order</b> flat is good: no throttling, no neighbour</figcaption>{strips}</figure>')
    body = []
    for row in lines:
        summary, figures = row["summary"], row["figures"]
        share = f"{figures['gemm_share']:.0%}" if figures.get("gemm_share") else markup.DASH
        cells = [markup.number(summary[p] / 1e6) for p in ("p50", "p90")]
        cells += [markup.DASH if summary.get("p90_bound") is None else markup.number(summary["p90_bound"] / 1e6)]
        cells += [markup.number(summary[p] / 1e6) for p in ("p99", "mean", "mad")]
        why = "" if summary.get("valid", True) else f'<span class="why">{markup.text(str(summary["reason"]))}</span>'
        body.append([markup.text(_label(row)) + why, *cells, f"{summary['n']:,}", f"{summary['drift']:.2f}", share])
    for row in material.lines:
        if row["kind"] == "cold_start" and (row["bundle"] or {}).get("name") == name:
            cells = [markup.number(row["summary"][p] / 1e6) for p in ("p50", "p90")] + [markup.DASH]
            cells += [markup.number(row["summary"][p] / 1e6) for p in ("p99", "mean", "mad")]
            body.append([markup.text(_label(row)), *cells, str(row["summary"]["n"]), markup.DASH, markup.DASH])
    heads = ["Phase", "p50, ms", "p90, ms", "p90 at most (99 %)", "p99, ms", "mean, ms", "MAD, ms", "samples", "drift", "of GEMM peak"]
    return f'<div class="two">{"".join(drawn)}</div>' + markup.table(f"Latency of {name}, milliseconds", heads, body)


def _label(row: Line) -> str:
    phase = PHASES.get(row["phase"], row["phase"].replace("_", " "))
    artefact = row["artefact"]
    if not artefact:
        return phase
    for tower in ("image-", "text-"):
        artefact = artefact.removeprefix(tower)
    return f"{phase}, {artefact.replace('-', ' ')}"


def _memory(material: Material) -> str:
    rows = [row for row in material.lines if row["kind"] == "memory"]
    if not rows:
        return ""
    body = [[markup.text(_label(row)), markup.text((row["bundle"] or {}).get("name", "")), markup.megabytes(max(row["samples"]))] for row in rows]
    return markup.table(
        "Peak memory of a process that ran only that phase (the interpreter and the runtime are in it)", ["Phase", "bundle", "MB"], body, textual=(1,)
    )


def _peak(material: Material) -> str:
    rows = [row["figures"] for row in material.lines if row["kind"] == "peak"]
    if not rows:
        return ""
    best = rows[-1]
    return (
        f"<p class='small muted'>The machine’s own peak in the same run: {markup.number(best['gemm_gflops'])} GFLOP/s (float32 matrix product) and "
        f"{markup.number(best['copy_gbytes'])} GB/s (copy, read plus write) on {best['threads']} thread(s).</p>"
    )


_TONES = {"proven": "good", "unproven": "warn"}


def parity(material: Material) -> str:
    """Each artefact against the checkpoint it was made from, the refused ones with their reason."""
    parts = []
    for name, manifest in material.manifests.items():
        body = []
        for artefact in manifest.get("artefacts", []):
            found = artefact.get("parity") or {}
            body.append(
                [
                    markup.text(artefact.get("id", "")) + (f'<span class="why">{markup.text(artefact["reason"])}</span>' if artefact.get("reason") else ""),
                    markup.badge(artefact.get("status", ""), _TONES.get(artefact.get("status", ""), "bad")),
                    *(markup.cosine(found.get(key)) for key in ("cosine_min", "cosine_p1", "cosine_mean")),
                    markup.DASH if found.get("max_abs") is None else f"{found['max_abs']:.1e}",
                    markup.number(found.get("rank_agreement"), 4),
                    markup.DASH if found.get("recall1_change") is None else f"{found['recall1_change']:+.4f}",
                    markup.megabytes(artefact.get("bytes")),
                ]
            )
        heads = ["Artefact", "verdict", "least cosine", "1st percentile", "mean", "largest difference", "rank agreement", "recall@1 change", "MB"]
        parts.append(markup.table(f"{manifest.get('name', name)}: exported artefacts against their checkpoint", heads, body, textual=(1,)))
    if not parts:
        return ""
    return (
        "<p>An exported file is only shipped when its embeddings agree with the checkpoint’s on pictures and texts it was not tuned on. "
        "Otherwise it is refused, and the reason is kept.</p>"
        + "".join(parts)
    )
