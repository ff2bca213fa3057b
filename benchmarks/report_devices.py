"""The report's sections on devices and comparisons: who ran what on which device, what loading and the modes of use cost, which differences are real."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import charts, markup
from .gather import Material
from .results import Line

MODES = {"offline": "offline batches", "burst": "burst after a rest", "sustained": "sustained", "duty": "one query a period"}
MOST_POINTS = 24


def comparisons(material: Material) -> str:
    """Paired and unpaired comparisons as bars around 1 and as a table; what is not comparable says so."""
    rows = [row for row in material.lines if row["kind"] == "comparison" and "value" in row["figures"]]
    if not rows:
        return ""
    drawn = [
        {"label": _label(row), **{name: row["figures"][name] for name in ("value", "low", "high")}, "verdict": _said(row["figures"])}
        for row in sorted(rows, key=lambda row: row["figures"]["value"])
    ]
    parts = []
    if len(drawn) <= MOST_POINTS:
        title = "Ratio of times with its 99 % interval, grey band ±1 %; the table below has the numbers"
        parts.append(markup.chart(charts.ratio_bars(drawn, title), "Which differences are real", "left of the band is faster; across it nothing is said"))
    body = []
    for row in rows:
        figures = row["figures"]
        tone = {"faster": "good", "slower": "bad"}.get(str(figures["verdict"]), "plain")
        ratio = f'{figures["value"]:.3f}<span class="interval">{figures["low"]:.3f} to {figures["high"]:.3f}</span>'
        how = "side by side" if figures.get("paired", True) else "measured apart"
        if figures.get("comparable") is False:
            how = markup.badge("not comparable", "bad")
        names = [markup.text(figures.get("candidate") or row["artefact"] or ""), markup.badge(_said(figures), tone), markup.text(figures.get("reference", ""))]
        body.append([*names, markup.text(_phase(row)), how, ratio, f"{figures['n']:,}"])
    heads = ["Candidate", "is", "against", "phase", "how", "time ratio", "pairs"]
    parts.append(markup.table("Comparisons: a difference is called when its whole 99 % interval lies beyond ±1 %", heads, body, textual=(1, 2, 3, 4)))
    notes = dict.fromkeys(note for row in rows for note in row["figures"].get("differences", []))
    if notes:
        parts.append("<h3>What differed besides</h3>" + markup.listing([markup.text(note) for note in notes]))
    return "".join(parts)


def devices(material: Material) -> str:
    """Tower latencies by device with accuracy, validity and identity; then modes, loads and operations."""
    rows = [row for row in material.lines if row["kind"] in ("latency", "latency_summary") and row["phase"].endswith("_tower")]
    away = [row for row in rows if row.get("device") or (row["settings"].get("tool") and not row["settings"].get("mode"))]
    parts = []
    if away:
        heads = ["Device and artefact", "runtime", "phase", "batch", "p50, ms", "p90, ms", "p90 at most, ms", "least cosine", "samples"]
        parts.append(markup.table("Towers by device and runtime", heads, [_device_row(row) for row in away], textual=(1, 2)))
        parts.append(_identities([row for row in away if row.get("device")]))
    parts += [_modes(rows), _loads(material), _operations(material), _doubtful(rows)]
    return "".join(part for part in parts if part)


def points(material: Material) -> str:
    """Accuracy against latency of every tower; a point whose accuracy was not measured is hollow and stands on the axis."""
    found = []
    for row in material.lines:
        settings = row["settings"]
        alone = not settings.get("mode") and settings.get("batch", 1) == 1 and settings.get("threads") in (None, 1)
        if row["kind"] in ("latency", "latency_summary") and row["phase"].endswith("_tower") and alone:
            middle = row["summary"].get("p50") or row["summary"].get("mean") or row["summary"].get("estimate")
            if middle:
                accuracy = accuracy_of(row)
                found.append({"name": _short(row), "x": middle / 1e6, "value": accuracy, "tower": row["phase"].removesuffix("_tower")})
    if len(found) < 2 or len(found) > 60:
        return ""
    drawn = []
    for tower in ("image", "text"):
        own = [row for row in found if row["tower"] == tower]
        if len(own) > 1:
            title = f"Least cosine to the checkpoint against latency of the {tower} tower; hollow: accuracy not measured"
            drawn.append(markup.chart(charts.parity_points(own, title), f"Accuracy against latency, {tower} tower", "up and left is better; hollow: accuracy not measured"))
    return f'<div class="two">{"".join(drawn)}</div>' if drawn else ""


def accuracy_of(row: Line) -> float | None:
    """Least cosine that travels with a line: to the checkpoint from the export's gate, else to the golden vectors in the same run; None when neither is known."""
    accuracy = row["figures"].get("accuracy") or {}
    value = accuracy.get("cosine_min", row["figures"].get("golden_cosine_min"))
    return float(value) if isinstance(value, int | float) else None


def _device_row(row: Line) -> list[str]:
    summary, device = row["summary"], row.get("device") or {"kind": "this machine"}
    name = markup.text(f"{device.get('label') or device['kind']}: {row['artefact'] or (row['bundle'] or {}).get('name', '')}")
    if not summary.get("valid", True):
        name += f'<span class="why">{markup.text(str(summary["reason"]))}</span>'
    tool = row["settings"].get("tool") or " ".join(f"onnxruntime {version}" for key, version in ((row["environment"] or {}).get("packages") or {}).items() if key == "onnxruntime")
    times = [markup.DASH if summary.get(key) is None else markup.number(summary[key] / 1e6) for key in ("p50", "p90", "p90_bound")]
    if row["kind"] == "latency_summary" and summary.get("p50") is None and summary.get("mean"):
        times[0] = f"{markup.number(summary['mean'] / 1e6)} (mean)"
    samples = f"{summary['n']:,}" if row["samples"] else "none kept"
    return [name, markup.text(tool), markup.text(_phase(row)), str(row["settings"].get("batch", 1)), *times, markup.cosine(accuracy_of(row)), samples]


def _identities(rows: Sequence[Line]) -> str:
    """What each device told of itself."""
    facts = {}
    for row in rows:
        device, environment = row["device"], row["environment"] or {}
        processor = environment.get("processor") or {}
        board = device.get("board") or row["figures"].get("before") or {}
        known = [
            processor.get("model"), board.get("model"), board.get("soc"), f"governor {processor['governor']}" if processor.get("governor") else "",
            f"power mode {board['power_mode']}" if board.get("power_mode") else "", f"cores {device['cores']}" if device.get("cores") else "",
            f"thermal status {board['thermal_status']}" if board.get("thermal_status") else "",
            ", ".join(f"{name} {value:.0f} °C" for name, value in list((board.get("temperatures_c") or {}).items())[:4]),
            f"battery {board['battery_percent']} %" if board.get("battery_percent") is not None else "",
        ]  # fmt: skip
        facts[f"{device['kind']} {device.get('label', '')}".strip()] = markup.text("; ".join(str(value) for value in dict.fromkeys(known) if value)) or markup.DASH
    return "" if not facts else f"<h3>What the devices told of themselves</h3>{markup.facts(list(facts.items()))}"


def _modes(rows: Sequence[Line]) -> str:
    body = []
    for row in rows:
        mode, figures = row["settings"].get("mode"), row["figures"]
        if mode not in MODES:
            continue
        said = {
            "offline": lambda f: f"{f['per_second']:.1f} a second in batches",
            "burst": lambda f: f"the first takes {f['first_over_later']:.2f} of the later ones",
            "sustained": lambda f: f"the last tenth takes {f['last_over_first_tenth']:.2f} of the first; {_energy(f['energy'])}",
            "duty": lambda f: f"every {f['period_seconds']:g} s",
        }[mode](figures)
        body.append([markup.text(_short(row)), MODES[mode], *(markup.number(row["summary"][key] / 1e6) for key in ("p50", "p90", "p99")), markup.text(said)])
    return markup.table("The same towers, used otherwise", ["Tower", "mode", "p50, ms", "p90, ms", "p99, ms", ""], body, textual=(1, 5)) if body else ""


def _energy(found: dict[str, Any]) -> str:
    return f"{found['joules_per_1000']:.1f} J per 1,000" if found.get("joules_per_1000") is not None else f"energy not measured: {found.get('reason')}"


def _loads(material: Material) -> str:
    titles = {"file_read": "file, from the cache", "load_cold": "load, cold", "load_warm": "load, warm", "first_inference": "first inference"}
    found: dict[str, dict[str, float]] = {}
    for row in material.lines:
        if row["kind"] == "load" and row["phase"] in titles:
            found.setdefault(_short(row), {})[row["phase"]] = row["summary"]["p50"] / 1e6
    body = [[markup.text(name), *(markup.number(phases.get(phase)) for phase in titles)] for name, phases in found.items()]
    return markup.table("From the disk to the first embedding, milliseconds", ["Tower", *titles.values()], body) if body else ""


def _operations(material: Material) -> str:
    parts = []
    for row in material.lines:
        if row["kind"] == "profile" and row["figures"].get("operations"):
            figures = row["figures"]
            body = [[markup.text(entry["op"]), str(entry["nodes"]), f"{entry['us']:.0f}", f"{entry['share']:.0%}"] for entry in figures["operations"][:10]]
            where = ", ".join(f"{unit.removesuffix('ExecutionProvider')} {share:.0%}" for unit, share in figures["placement"].items())
            title = f"Operations of {_short(row)} (by the runtime's own profiler, which slows it down); time on: {where}"
            parts.append(markup.table(title, ["Operation", "nodes", "µs a run", "share"], body))
    return f"<details><summary>Where the time goes inside the towers</summary>{''.join(parts)}</details>" if parts else ""


def _doubtful(rows: Sequence[Line]) -> str:
    found = [f"{_short(row)}: {row['summary']['reason']}" for row in rows if not row["summary"].get("valid", True)]
    if not found:
        return ""
    return "<h3>Not to be quoted, and why</h3>" + markup.listing([markup.text(text) for text in dict.fromkeys(found)])


def _said(figures: dict[str, Any]) -> str:
    verdict = str(figures["verdict"])
    return verdict if verdict != "no difference" else ("no significant difference" if figures.get("resolved") else "not resolved")


def _phase(row: Line) -> str:
    batch, threads = row["settings"].get("batch", 1), row["settings"].get("threads")
    more = [f"batch {batch}" if batch not in (1, None) else "", f"{threads} threads" if threads not in (1, None) else ""]
    return ", ".join([row["phase"].replace("_", " "), *filter(None, more)])


def _short(row: Line) -> str:
    device = row.get("device") or {}
    where = f"{device.get('label') or device.get('kind')}: " if device else ""
    return f"{where}{row['artefact'] or (row['bundle'] or {}).get('name', '?')}"


def _label(row: Line) -> str:
    figures = row["figures"]
    return f"{_phase(row)}: {figures.get('candidate') or row['artefact']} / {figures.get('reference', '')}"[:70]
