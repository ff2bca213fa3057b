"""The sections that explain: how it was measured, on what, how long it took, and what was not measured."""

from __future__ import annotations

from typing import Any

from . import markup
from .gather import Material

TIMES = (
    "Candidates that are compared run in one process, interleaved, in an order drawn anew in every round, on the same inputs and threads.",
    "Warm-up rounds are thrown away; every later sample is kept in nanoseconds, and none is dropped as an outlier.",
    "A ratio is one of medians; its 99 % interval comes from a bootstrap over blocks of neighbouring pairs, because neighbouring samples resemble each other.",
    "A difference is called only when that whole interval lies outside ±1 %. Otherwise the answer is “no difference”, or “not resolved” when the interval is wide.",
    "Cold start is a fresh process with warm disk: import, open the bundle, first embedding; torch must not be among its modules.",
    "Peak memory is the high-water mark of a process that ran only that phase.",
    "Drift is the median of the last third of the samples over that of the first third.",
    "Times hold for this machine. Ratios travel better than milliseconds.",
)


RECALL = ("Recall intervals are 95 % bootstrap intervals over the queries.",)
EFFICIENCY = (
    "All students have the same architecture and see the same number of samples; captions that the text tower reads alone count as samples.",
    "Learning rate and batch were chosen for plain and for reinforced students with the same number of trials on the validation style.",
    "Every budget is a training of its own with its whole schedule. Intervals are over seeds and concepts drawn anew together.",
    "A difference counts only when its interval leaves zero out; an A/A pair and planted harm show whether that rule can be trusted.",
)


def method(material: Material) -> str:
    """How it was measured, and the machine: the rules of what this page shows."""
    timed = any(row["kind"] == "latency" for row in material.lines)
    rules = [*(TIMES if timed else ()), *(RECALL if material.lines or material.tables else ()), *(EFFICIENCY if material.efficiency else ())]
    if not rules:
        return ""
    return "".join(["<h3>Rules</h3>", markup.listing([markup.text(rule) for rule in rules]), "<h3>The machine</h3>", *map(_machine, _environments(material))])


def _environments(material: Material) -> list[dict[str, Any]]:
    """Distinct machines; the load average alone does not make another one."""
    found: dict[str, dict[str, Any]] = {}
    for row in material.lines:
        if row.get("environment"):
            key = repr({name: value for name, value in row["environment"].items() if name != "load_average"})
            found.setdefault(key, row["environment"])
    return list(found.values())


def _machine(environment: dict[str, Any]) -> str:
    processor, system = environment.get("processor") or {}, environment.get("system") or {}
    cores = f"{processor.get('physical_cores') or '?'} physical, {processor.get('logical_cores') or '?'} logical, {processor.get('usable_cores') or '?'} usable"
    if processor.get("quota_cores"):
        cores += f", quota {processor['quota_cores']}"
    memory = environment.get("memory_bytes")
    rows = [
        ("processor", markup.text(processor.get("model") or "unknown") + (" (virtual machine)" if processor.get("virtual") else "")),
        ("cores", markup.text(cores)),
        ("instruction sets", markup.text(", ".join(processor.get("features") or []) or "unknown")),
        ("clock governor", markup.text(processor.get("governor") or "not readable")),
        ("memory", f"{memory / 2**30:.1f} GiB" if memory else "unknown"),
        (
            "system",
            markup.text(
                " ".join(
                    str(part) for part in (system.get("distribution") or system.get("name"), system.get("machine"), "kernel", system.get("release")) if part
                )
            ),
        ),
        ("Python", markup.text(environment.get("python", ""))),
        ("threads told to use", markup.text(environment.get("threads") or "default")),
        ("load average at start", markup.text(", ".join(map(str, environment.get("load_average") or [])) or "not readable")),
        ("packages", markup.text(", ".join(f"{name} {version}" for name, version in (environment.get("packages") or {}).items()))),
    ]
    return f'<div class="panel">{markup.facts(rows)}</div>'


def timings(material: Material) -> str:
    """Seconds of each stage as bars."""
    stages = {name: float(value) for name, value in (material.tables.get("timings") or {}).items() if isinstance(value, int | float)}
    if not stages:
        return ""
    longest, total = max(stages.values()) or 1.0, sum(stages.values())
    bars = "".join(
        f'<span>{markup.text(name)}</span><span class="bar" style="width:{max(0.5, 100 * value / longest):.1f}%"></span><span>{markup.seconds(value)}</span>'
        for name, value in stages.items()
    )
    return f'<p>All stages together: {markup.seconds(total)}.</p><div class="panel bars">{bars}</div>'


def unmeasured(material: Material) -> str:
    """What this page does not know."""
    items = []
    for row in material.lines:
        if row["kind"] == "not_measured":
            what = " ".join(part for part in (row["artefact"], row["phase"].replace("_", " ")) if part)
            items.append(f"<b>{markup.text(what)}</b>: {markup.text(row['figures'].get('reason', 'no reason recorded'))}")
    measured = {(row["artefact"]) for row in material.lines if row["kind"] in ("latency", "not_measured")}
    for manifest in material.manifests.values():
        for artefact in manifest.get("artefacts", []):
            if artefact.get("status") == "proven" and artefact.get("id") not in measured:
                items.append(f"<b>{markup.text(artefact['id'])} latency</b>: {markup.text(_why(artefact.get('target', '')))}")
    items += [markup.text(sentence) for sentence in material.missing]
    if material.lines or material.manifests:
        items.append("Energy, heat over minutes, and phones: nothing here says how these models run on a device in a pocket.")
    return markup.listing(list(dict.fromkeys(items))) if items else ""


def _why(target: str) -> str:
    if target == "coreml":
        return "Core ML runs on Apple devices only; the numerics were proven with an interpreter, the speed was not measured."
    if target == "tensorrt":
        return "TensorRT needs an NVIDIA device; the file was parsed and built ahead of time, the speed was not measured."
    return "it was proven, but no results line of it was given."
