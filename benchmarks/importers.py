"""`mclip import-results`: what other tools measured, as lines of ours, so that one table and one report hold all of it.

    trtexec      the JSON of --exportTimes; the tool's log beside it tells the version and the flags (10.x and 11.x measure different things by default)
    litert       the text that benchmark_model prints, or the JSON of litert-benchmark --result_json
    perf-test    the CSV that onnxruntime_perf_test appends to its result file
    ai-hub       the JSON of a profile job of Qualcomm AI Hub (download_profile)

Raw samples are kept where the tool gives them. Where it gives a summary only, the line has the kind `latency_summary`, which no comparison is made of.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from runtime.files import file_sha256
from runtime.manifest import read_manifest

from .bench_steps import ACCURACY
from .measure import summarise
from .results import Line, ResultsError, append_results, line


@dataclass(kw_only=True, slots=True)
class Found:
    """One measurement of a tool. `nanoseconds` in order, empty where the tool kept none; then `summary` has p50, mean, … in nanoseconds."""

    tool: str
    nanoseconds: list[int] = field(default_factory=list)
    summary: dict[str, float] = field(default_factory=dict)
    loads: dict[str, int] = field(default_factory=dict)
    """Phase -> nanoseconds: load_cold, load_warm, first_inference."""
    memory: int | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    threads: int | None = None


def read_trtexec(text: str, name: str, log: str = "", version: str = "") -> Found:
    """Times of --exportTimes. `log` is what trtexec printed, `version` such as 10.3 when there is no log. Raises ResultsError."""
    rows = _json(text, name)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and "computeMs" in row for row in rows):
        raise ResultsError(f"{name} is no trace of trtexec --exportTimes (a list of objects with computeMs); write it again with that flag")
    header = re.search(r"\[TensorRT v(\d+)\]", log)
    if header:
        digits = header.group(1)  # 8601 is 8.6.1, 100300 is 10.3.0, 110400 is 11.4.0
        parts = (int(digits[:-4]), int(digits[-4:-2])) if len(digits) > 4 else (int(digits[0]), int(digits[1]))
        version = f"{parts[0]}.{parts[1]}"
    if not re.fullmatch(r"\d+\.\d+(\.\d+)*", version):
        raise ResultsError(
            f"{name} does not tell its version, and 10.x and 11.x measure different things (11.x leaves out the copies to and from the device); "
            "give --log FILE or --tool-version 10.3"
        )
    eleven = int(version.split(".")[0]) >= 11
    command = next((row for row in log.splitlines() if "RUNNING TensorRT.trtexec" in row or row.startswith("trtexec ")), "")
    copies = any(_ms(row.get("h2dMs", row.get("inMs", 0)), name) + _ms(row.get("d2hMs", row.get("outMs", 0)), name) > 0 for row in rows)
    flags = {
        "transfers": "--includeDataTransfers" in command if eleven else "--noDataTransfers" not in command,
        "spin_wait": "--noSpinWait" not in command if eleven else "--useSpinWait" in command,
        "cuda_graph": "--noCudaGraph" not in command if eleven else "--useCudaGraph" in command,
    }
    if copies != flags["transfers"] and (copies or command):
        flags["transfers"] = copies  # what was measured is what the trace holds
    samples = [_nanoseconds(_ms(row["latencyMs"], name) if "latencyMs" in row else _ms(row["computeMs"], name), 1e6, name) for row in rows]
    compute = np.array([_ms(row["computeMs"], name) for row in rows])
    scope = "with copies" if flags["transfers"] else "without copies"
    figures = {"compute_p50_ms": float(np.median(compute)), "trtexec": {"version": version, **flags}}
    return Found(tool=f"trtexec {version}, {scope}", nanoseconds=samples, figures=figures)


def read_litert(text: str, name: str, log: str = "", version: str = "") -> Found:
    """The text of benchmark_model, or the JSON of litert-benchmark. Both give summaries only. Raises ResultsError."""
    if text.lstrip().startswith("{"):
        found = _json(text, name)
        latency = found.get("latency") if isinstance(found, dict) else None
        if not isinstance(latency, dict) or "avg_ms" not in latency:
            raise ResultsError(f"{name} is no result of litert-benchmark (an object with latency.avg_ms); write it again with --result_json")
        names = {"p50": "median_ms", "mean": "avg_ms", "minimum": "min_ms", "maximum": "max_ms", "std": "std_ms", "p5": "p5_ms", "p95": "p95_ms"}
        summary = {ours: _ms(latency[theirs], name) * 1e6 for ours, theirs in names.items() if latency.get(theirs) is not None}
        loads = {"load_warm": _nanoseconds(latency.get("init_ms", 0), 1e6, name), "first_inference": _nanoseconds(latency.get("warmup_first_ms", 0), 1e6, name)}
        figures = {"accelerators": found.get("accelerators"), "fully_accelerated": found.get("fully_accelerated")}
        made = Found(tool="litert-benchmark", summary={**summary, "n": latency.get("num_runs", 0)}, loads=loads, figures=figures)
        made.threads = found.get("num_threads")
        return made
    timings = re.search(r"Inference timings in us: Init: ([\d.e+]+), First inference: ([\d.e+]+), Warmup \(avg\): ([\d.e+]+), Inference \(avg\): ([\d.e+]+)", text)
    counts = re.findall(r"count=(\d+)(?: first=([\d.e+]+))?(?: curr=([\d.e+]+))?(?: min=([\d.e+]+))?(?: max=([\d.e+]+))?(?: avg=([\d.e+]+))?(?: std=([\d.e+]+))?(.*)", text)
    if not timings or not counts:
        raise ResultsError(f"{name} is no output of LiteRT's benchmark_model (a line 'Inference timings in us: …'); keep what it prints, standard error included")
    last = counts[-1]
    names = {"minimum": last[3], "maximum": last[4], "mean": last[5] or timings.group(4), "std": last[6]}
    summary = {key: float(value) * 1e3 for key, value in names.items() if value}
    summary |= {ours: float(value) * 1e3 for theirs, ours in (("median", "p50"), ("p5", "p5"), ("p95", "p95")) for value in re.findall(rf"\b{theirs}=([\d.e+]+)", last[7])}
    loads = {"load_warm": _nanoseconds(float(timings.group(1)), 1e3, name), "first_inference": _nanoseconds(float(timings.group(2)), 1e3, name)}
    made = Found(tool="benchmark_model", summary={**summary, "n": int(last[0])}, loads=loads)
    if peak := re.search(r"(?:Overall peak memory footprint \(MB\) via periodic monitoring|overall)[:=]\s*([\d.]+)", text):
        made.memory = int(float(peak.group(1)) * 2**20)
    if threads := re.search(r"(?:Num threads|num_threads)[:=]\s*\[?(\d+)", text):
        made.threads = int(threads.group(1))
    delegated = re.findall(r"Replacing (\d+) out of (\d+) node\(s\) with delegate \(([^)]+)\)", text)
    made.figures["placement"] = {delegate: int(some) / int(all_) for some, all_, delegate in delegated if int(all_)}
    return made


def read_perf_test(text: str, name: str, log: str = "", version: str = "") -> Found:
    """Rows of onnxruntime_perf_test's result file: model, seconds, peak working set, processor use, run. Raises ResultsError."""
    samples, peaks, usage = [], [], []
    for row in csv.reader(text.splitlines()):
        if len(row) == 5 and row[4].strip().isdecimal():
            samples.append(_nanoseconds(row[1], 1e9, name))
            peaks.append(int(float(row[2])))
            usage.append(float(row[3]))
    if not samples:
        raise ResultsError(f"{name} is no result file of onnxruntime_perf_test (lines of model,seconds,bytes,percent,run); name the file that it was given last")
    made = Found(tool=f"onnxruntime_perf_test{' ' + version if version else ''}", nanoseconds=samples, memory=max(peaks) or None)
    made.figures["processor_percent"] = float(np.mean(usage))
    if creation := re.search(r"Session creation time cost: ([\d.e+-]+) s", log):
        made.loads["load_warm"] = _nanoseconds(creation.group(1), 1e9, name)
    if first := re.search(r"First inference time cost: ([\d.e+-]+) ms", log):
        made.loads["first_inference"] = _nanoseconds(first.group(1), 1e6, name)
    return made


def read_ai_hub(text: str, name: str, log: str = "", version: str = "") -> Found:
    """A profile of Qualcomm AI Hub: microseconds and bytes. Its one estimate is not a percentile; the samples are kept when they are there."""
    found = _json(text, name)
    summary = found.get("execution_summary") if isinstance(found, dict) else None
    if not isinstance(summary, dict) or "estimated_inference_time" not in summary:
        raise ResultsError(f"{name} is no profile of Qualcomm AI Hub (an object with execution_summary); save what download_profile returns")
    samples = [_nanoseconds(value, 1e3, name) for value in summary.get("all_inference_times") or []]
    made = Found(tool="Qualcomm AI Hub", nanoseconds=samples, summary={"estimate": float(summary["estimated_inference_time"]) * 1e3})
    for theirs, ours in (("first_load_time", "load_cold"), ("warm_load_time", "load_warm")):
        if summary.get(theirs):
            made.loads[ours] = _nanoseconds(summary[theirs], 1e3, name)
    if summary.get("estimated_inference_peak_memory"):
        made.memory = int(summary["estimated_inference_peak_memory"])
    made.figures["estimate_ms"] = float(summary["estimated_inference_time"]) / 1e3
    layers: dict[str, list[float]] = {}
    for row in found.get("execution_detail") or []:
        if isinstance(row, dict) and isinstance(row.get("compute_unit"), str):
            layers.setdefault(row["compute_unit"], []).append(float(row.get("execution_time") or 0))
    total = sum(sum(times) for times in layers.values())
    counts = sum(len(times) for times in layers.values())
    made.figures["layers"] = {unit: len(times) for unit, times in layers.items()}
    made.figures["placement"] = {unit: sum(times) / total if total else len(times) / counts for unit, times in layers.items()}
    return made


FORMATS: dict[str, Callable[[str, str, str, str], Found]] = {"trtexec": read_trtexec, "litert": read_litert, "perf-test": read_perf_test, "ai-hub": read_ai_hub}


def read_output(format: str, text: str, name: str, log: str = "", version: str = "") -> Found:
    """One of FORMATS read from a stranger's file: whatever is not as the tool writes it is a ResultsError that names the file."""
    try:
        found = FORMATS[format](text, name, log, version)
        plain = [*found.summary.values(), *([found.memory] if found.memory is not None else []), *([found.threads] if found.threads is not None else [])]
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in plain):
            raise ValueError("a figure that is no finite number")
        json.dumps(found.figures, allow_nan=False)
        return found
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        raise ResultsError(f"{name} holds something that {format} does not write ({said}); import the file as the tool left it") from error


def lines_of_tool(
    found: Found, *, tower: str, artefact: str | None = None, bundle: Path | None = None, device: dict[str, Any] | None = None, threads: int | None = None, batch: int = 1
) -> list[Line]:
    """Lines of one measurement. With a bundle, the artefact's identity and accuracy travel along. Raises ResultsError, BundleError."""
    label, figures = None, dict(found.figures)
    if bundle is not None:
        manifest = read_manifest(bundle, verify=False)
        label = {"name": manifest.name, "sha256": file_sha256(bundle / "manifest.json")}
        if artefact is not None:
            entry = manifest.artefact(artefact)
            figures |= {name: getattr(entry, name) for name in ("tower", "target", "precision", "bytes")}
            figures["accuracy"] = {name: entry.parity[name] for name in ACCURACY if entry.parity.get(name) is not None} if entry.parity else None
    settings: dict[str, Any] = {"threads": found.threads or threads, "batch": batch, "tool": found.tool}
    common: dict[str, Any] = {"bundle": label, "artefact": artefact, "settings": settings, "device": device}
    phase, rows = f"{tower}_tower", []
    if found.nanoseconds:
        samples = found.nanoseconds
        rows.append(line("latency", phase, samples=samples, summary=summarise(np.array(samples)).as_dict(), figures=figures, **common))
    else:
        rows.append(line("latency_summary", phase, summary=found.summary, figures=figures, **common))
    for name, taken in found.loads.items():
        if taken > 0:
            rows.append(line("load", name, samples=[taken], summary=summarise(np.array([taken])).as_dict(), figures={}, **common))
    if found.memory:
        rows.append(line("memory", phase, samples=[found.memory], summary={"maximum": found.memory}, **common))
    return rows


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ResultsError(f"{name} is not JSON ({error.msg} at line {error.lineno}); was it cut off?") from error
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{name} is no JSON that a tool writes ({type(error).__name__}: nested too deep, or a number of thousands of digits)") from error


def _ms(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ResultsError(f"{name} holds the time {value!r}, expected milliseconds of 0 or more; the clock may have jumped, measure again")
    return float(value)


def _nanoseconds(value: Any, factor: float, name: str) -> int:
    try:
        made = float(value) * factor
    except (TypeError, ValueError):
        made = math.nan
    if not math.isfinite(made) or made < 0:
        raise ResultsError(f"{name} holds the time {value!r}, expected a number of 0 or more; the clock may have jumped, measure again")
    return max(1, round(made)) if made else 0


def main(argv: list[str]) -> int:
    """Command line of `mclip import-results`."""
    parser = argparse.ArgumentParser(prog="mclip import-results", description="Add what another tool measured to a results file.")
    parser.add_argument("format", choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("file", type=Path, help="the tool's output")
    parser.add_argument("--tower", required=True, choices=("image", "text"), help="which tower was measured")
    parser.add_argument("--bundle", type=Path, help="the bundle that it came from: its identity and accuracy travel along")
    parser.add_argument("--artefact", help="id of the artefact in the bundle")
    parser.add_argument("--log", type=Path, help="what the tool printed: version and flags of trtexec, times of loading of onnxruntime_perf_test")
    parser.add_argument("--tool-version", default="", help="version of the tool, when there is no log")
    parser.add_argument("--label", default="", help="name of the device in results, such as 'Jetson Orin Nano, 15 W'")
    parser.add_argument("--threads", type=int, help="threads, where the output does not tell")
    parser.add_argument("--batch", type=int, default=1, help="inputs of one run (1)")
    parser.add_argument("--out", type=Path, default=Path("results.jsonl"), help="results file to add to (results.jsonl)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    if options.artefact and options.bundle is None:
        parser.error("--artefact is an id in a bundle; name that with --bundle")
    found = read_output(options.format, _text(options.file), options.file.name, _text(options.log) if options.log else "", options.tool_version)
    device = {"kind": "imported", "label": options.label or options.format}
    rows = lines_of_tool(found, tower=options.tower, artefact=options.artefact, bundle=options.bundle, device=device, threads=options.threads, batch=options.batch)
    append_results(options.out, rows)
    if options.json:
        sys.stdout.write(json.dumps({"out": options.out.name, "lines": len(rows), "tool": found.tool, "samples": len(found.nanoseconds), "figures": found.figures}) + "\n")
    else:
        kept = f"{len(found.nanoseconds):,} samples" if found.nanoseconds else "a summary without samples"
        sys.stdout.write(f"{found.tool}: {kept}, {len(rows)} lines added: {options.out.name}\n")
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ResultsError(f"{path.name} cannot be read ({type(error).__name__}); name the file that the tool wrote") from error
