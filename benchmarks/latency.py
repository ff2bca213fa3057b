"""`mclip bench`: latency by phase and artefact, cold start, memory, the machine's own peak; on this machine, on others, and of two bundles side by side."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.errors import DeviceError
from runtime.manifest import read_manifest

from .bench_compare import compare_steps
from .bench_steps import STARTS, Bench, BenchConfig, Key, steps
from .devices import DeviceSettings, measure_on
from .environment import environment
from .inputs import draw_inputs
from .modes import MODES, ModePlan
from .phases import TOWERS, Subject
from .ratios import Ratio, gate
from .results import Line, append_results, identity, newest, read_results

logger = logging.getLogger(__name__)
Progress = Callable[[str, float], None]


def bench(config: BenchConfig, progress: Progress | None = None, on_lines: Callable[[list[Line]], None] | None = None) -> dict[str, Any]:
    """Measure what is not in `config.out` yet and return the summary (also what `--json` prints).

    Args:
        progress: called with a title and the share done (0 to 1).
        on_lines: called with the lines of each step, after they are in the file.

    Raises:
        BundleError: a bundle is unusable. ParityError: its golden inputs fail here. ResultsError: the results file is not ours.
        DeviceError: a measuring process failed, or torch was imported below the runtime.
    """
    facts = environment(config.threads)  # before anything runs, for the load average
    before = read_results([config.out]) if config.out.exists() else []
    inputs = draw_inputs(seed=0)
    first = Bench(config, Subject(config.bundle, config.threads, inputs), facts)
    if config.other is not None:
        all_steps = list(compare_steps(first, Bench(config, Subject(config.other, config.threads, inputs), facts)))
    else:
        all_steps = list(steps(first))
    if config.phases:
        names = {key[1] for step in all_steps for key in step.keys}
        if not set(config.phases) <= names:
            raise DeviceError(f"--phases names {', '.join(sorted(set(config.phases) - names))}; known here are {', '.join(sorted(names))}")
        all_steps = [step for step in all_steps if any(key[1] in config.phases for key in step.keys)]
    known = set().union(*map(_covered, before))
    wanted = {step.title: {_identity(key, first) for key in step.keys} for step in all_steps}
    todo = [step for step in all_steps if not wanted[step.title] <= known]
    measured = 0
    for index, step in enumerate(todo):
        report = (lambda share, step=step, index=index: progress(step.title, (index + share) / len(todo))) if progress else (lambda share: None)
        report(0.0)
        rows = step.work(report)
        append_results(config.out, rows)
        measured += len(rows)
        if on_lines is not None:
            on_lines(rows)
    if progress:
        progress("done", 1.0)
    everything = set().union(*wanted.values())
    rows = [row for row in newest(read_results([config.out])) if _covered(row) & everything]
    return _summary(config, rows, measured, len(all_steps) - len(todo))


def _covered(row: Line) -> set[tuple[str, ...]]:
    """The measurements that a line stands for: its own, or what it says cannot be measured."""
    kinds = (row["kind"], "latency", "load") if row["kind"] == "not_measured" else (row["kind"],)
    return {identity({**row, "kind": kind}) for kind in kinds}


def _identity(key: Key, bench: Bench) -> tuple[str, ...]:
    kind, phase, artefact, mode = key
    settings = bench.settings(**({"mode": mode} if mode else {}), **({"batch": bench.config.batch} if mode == "offline" else {}))
    bundle = bench.subject.label
    if ">" in artefact:
        settings["reference_sha256"], _, other = artefact.partition(">")
        bundle, artefact = {"name": "", "sha256": other}, ""
    return identity(bench.line(kind, phase, artefact, settings=settings, samples=[1]) | {"bundle": bundle})


def _summary(config: BenchConfig, rows: list[Line], measured: int, skipped: int) -> dict[str, Any]:
    """One object: milliseconds by phase and artefact, verdicts, cold start in seconds, memory in megabytes."""
    found: dict[str, Any] = {"out": config.out.name, "lines_measured": measured, "steps_skipped": skipped, "threads": config.threads}
    for row in rows:
        name = row["phase"] if not row["artefact"] else f"{row['phase']}.{row['artefact']}"
        if row["kind"] == "latency":
            name += f" ({row['settings']['mode']})" if row["settings"].get("mode") else ""
            found.setdefault("latency_ms", {})[name] = {p: round(row["summary"][p] / 1e6, 4) for p in ("p50", "p90", "p99")} | {"n": row["summary"]["n"]}
            if row["summary"].get("p90_bound"):
                found["latency_ms"][name]["p90_bound"] = round(row["summary"]["p90_bound"] / 1e6, 4)
            if not row["summary"].get("valid", True):
                found.setdefault("not_valid", {})[name] = row["summary"]["reason"]
        elif row["kind"] == "load":
            found.setdefault("load_ms", {})[name] = round(row["summary"]["p50"] / 1e6, 3)
        elif row["kind"] == "cold_start":
            found[f"{row['phase']}_seconds"] = round(row["summary"]["p50"] / 1e9, 4)
        elif row["kind"] == "memory":
            found.setdefault("peak_memory_megabytes", {})[name] = round(max(row["samples"]) / 1e6, 1)
        elif row["kind"] == "peak":
            found["machine_peak"] = {key: round(value, 2) for key, value in row["figures"].items()}
        elif row["kind"] == "comparison":
            kept = ("candidate", "reference", "value", "low", "high", "level", "margin", "n", "block", "verdict", "resolved", "sentence")
            found.setdefault("comparisons", []).append({"phase": row["phase"], **{key: row["figures"][key] for key in kept}})
        elif row["kind"] == "not_measured":
            found.setdefault("not_measured", {})[name] = row["figures"]["reason"]
    return found


@contextmanager
def _bar() -> Iterator[Callable[[str, float], None] | None]:
    """A progress bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    except ImportError:  # the base install measures without a bar
        yield None
        return

    columns = (TextColumn("{task.description:28}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("bench", total=1.0)
        yield lambda title, share: shown.update(task, description=title, completed=share)


def _print(found: dict[str, Any]) -> None:
    write = sys.stdout.write
    for name, figures in found.get("latency_ms", {}).items():
        write(f"{name:44} p50 {figures['p50']:9.3f} ms   p90 {figures['p90']:9.3f}   p99 {figures['p99']:9.3f}   n {figures['n']}\n")
    for tower in TOWERS:
        if f"cold_start_{tower}_seconds" in found:
            write(f"{'cold start to first ' + tower + ' embedding':44} {found[f'cold_start_{tower}_seconds']:.3f} s, no torch\n")
    for name, size in found.get("peak_memory_megabytes", {}).items():
        write(f"{'peak memory, ' + name:44} {size:.0f} MB\n")
    for row in found.get("comparisons", []):
        write(f"{row['sentence']}\n")
    for name, milliseconds in found.get("load_ms", {}).items():
        write(f"{name:44} p50 {milliseconds:9.3f} ms\n")
    for name, reason in found.get("not_valid", {}).items():
        write(f"do not quote {name}: {reason}\n")
    if "gate" in found:
        write(f"gate {found['gate']['verdict']}: {found['gate']['sentence']}\n")
    for name, reason in found.get("not_measured", {}).items():
        write(f"not measured: {name}: {reason}\n")
    write(f"{found['lines_measured']} lines measured, {found['steps_skipped']} steps were there already: {found['out']}\n")


def gated(found: dict[str, Any], most: float) -> int:
    """Add the verdict of a regression gate over all comparisons of a summary, and return the exit code: 1 when one fails."""
    verdicts = []
    for row in found.get("comparisons", []):
        verdict, why = gate(Ratio(**{name: row[name] for name in Ratio.__dataclass_fields__ if name in row}), most)
        row["gate"] = verdict
        verdicts.append((verdict, f"{row['phase'].replace('_', ' ')}: {why}"))
    worst = next((name for name in ("fail", "undecided") if any(verdict == name for verdict, _ in verdicts)), "pass")
    said = [why for verdict, why in verdicts if verdict == worst]
    found["gate"] = {"most": most, "verdict": worst, "sentence": "; ".join(said) if worst != "pass" else f"all of {len(verdicts)} comparisons are below {most:g}"}
    return 1 if worst == "fail" else 0


def parser() -> argparse.ArgumentParser:
    """The command line; a device with the base install can measure itself, so it needs no extra."""
    made = argparse.ArgumentParser(prog="mclip bench", description="Measure a bundle on this machine or on a device, or compare two bundles side by side.")
    add = made.add_argument
    add("bundles", nargs="+", type=Path, metavar="BUNDLE", help="one bundle; with --compare the reference and the candidate")
    add("--compare", action="store_true", help="compare two bundles, interleaved, phase by phase")
    add("--gate", type=float, metavar="RATIO", help="with --compare: exit code 1 when a phase is called slower and takes more than RATIO times the reference (1.05)")
    add("--out", type=Path, default=Path("results.jsonl"), help="results file; phases that it has already are not measured again (results.jsonl)")
    add("--threads", type=int, default=1, help="threads of one run of a tower (1)")
    add("--seconds", type=float, default=5.0, help="time of each group of interleaved phases; at least 50 rounds, at most 2,000 (5)")
    add("--starts", type=int, default=STARTS, help=f"fresh processes that each cold start and load is measured in ({STARTS})")
    add("--seed", type=int, default=0, help="of the order within rounds and of the bootstrap (0)")
    add("--phases", default="", help="comma-separated: only these phases, such as image_tower,text_tower; all when left out")
    add("--modes", default="single", help=f"comma-separated: {', '.join(MODES)}, of the artefacts that the SDK would choose; single alone when left out")
    add("--batch", type=int, default=8, help="inputs at a time in offline mode (8)")
    add("--sustained", type=float, default=ModePlan().sustained, help="seconds of a sustained run (60)")
    add("--rest", type=float, default=ModePlan().rest, help="idle seconds before a burst (2)")
    add("--period", type=float, default=ModePlan().period, help="seconds from query to query, duty-cycled (1)")
    add("--queries", type=int, default=ModePlan().queries, help="duty-cycled queries (64)")
    where = "local, ssh:HOST, adb:SERIAL, plan:FOLDER, mac, ios:UDID, browser"
    add("--device", action="append", default=[], metavar="KIND[:NAME]", help=f"where to measure, may be given more than once: {where}")
    add("--label", default="", help="with --device: its name in results; host names and serial numbers are never written there")
    add("--cores", default="", help="with --device local or ssh: cores that the measurement is pinned to, such as 0,1")
    add("--priority", type=int, help="with --device local or ssh: priority of the measurement, -20 (first) to 19 (last)")
    add("--device-timeout", type=float, default=600.0, help="with --device: seconds without news after which it counts as hanging (600)")
    add("--ssh-config", type=Path, help="with --device ssh: another file than ~/.ssh/config (ports, keys, jumps)")
    add("--remote-python", default="python3", help="with --device ssh: the Python there (python3)")
    add("--runner", type=Path, help="with --device adb: benchmark_model or onnxruntime_perf_test, built for the device")
    add("--json", action="store_true", help="print one JSON object")
    add("--stream", action="store_true", help=argparse.SUPPRESS)  # a device's side of `--device`: lines to standard output as they are measured
    return made


def main(argv: list[str]) -> int:
    """Command line of `mclip bench`."""
    made = parser()
    options = made.parse_args(argv)
    if len(options.bundles) != (2 if options.compare else 1):
        made.error(f"{len(options.bundles)} bundles were given; expected one, or two with --compare")
    if options.gate is not None and not options.compare:
        made.error("--gate judges a comparison; give two bundles and --compare")
    config = BenchConfig(
        bundle=options.bundles[0], other=options.bundles[1] if options.compare else None, out=options.out, threads=options.threads, seconds=options.seconds,
        seed=options.seed, starts=options.starts, modes=tuple(filter(None, options.modes.split(","))), phases=tuple(filter(None, options.phases.split(","))), batch=options.batch,
        mode_plan=ModePlan(rest=options.rest, sustained=options.sustained, period=options.period, queries=options.queries),
    )  # fmt: skip
    if options.device:
        if options.compare:
            made.error("--compare measures on this machine; measure both bundles with --device, then: mclip compare A.jsonl B.jsonl")
        return _on_devices(options, config)
    with _bar() as progress:
        found = bench(config, progress, _stream if options.stream else None)
    code = gated(found, options.gate) if options.gate is not None else 0
    if options.json:
        sys.stdout.write(json.dumps(found) + "\n")
    elif not options.stream:
        _print(found)
    return code


def _on_devices(options: argparse.Namespace, config: BenchConfig) -> int:
    """Measure on each device in turn. A device that fails does not keep the next from being measured; the exit code is then 1."""
    passed = [f"--{name}={getattr(options, name)}" for name in ("threads", "seconds", "starts", "seed", "modes", "batch", "sustained", "rest", "period", "queries", "phases")]
    try:
        cores = tuple(int(core) for core in options.cores.split(",") if core)
    except ValueError:
        raise DeviceError(f"--cores is '{options.cores}', expected numbers with commas between, such as 0,1") from None
    settings = DeviceSettings(
        arguments=tuple(passed), threads=config.threads, seconds=config.seconds, label=options.label, cores=cores, priority=options.priority, timeout=options.device_timeout,
        ssh_config=options.ssh_config, remote_python=options.remote_python, runner=options.runner,
    )  # fmt: skip
    read_manifest(config.bundle)  # an unusable bundle is said before any device is touched
    made = []
    with _bar() as progress:
        for index, spec in enumerate(options.device):
            count = [0]

            def on_line(row: Line, index: int = index, spec: str = spec, count: list[int] = count) -> None:
                count[0] += 1
                if progress:
                    progress(f"{spec}: {row['phase'].replace('_', ' ')}", (index + 1 - 1 / (1 + count[0] / 10)) / len(options.device))

            try:
                made.append(measure_on(spec, config.bundle, config.out, settings, on_line))
            except DeviceError as error:
                made.append({"device": spec, "lines": 0, "error": str(error)})
    if options.json:
        sys.stdout.write(json.dumps({"out": config.out.name, "devices": made}) + "\n")
    for found in made:
        if not options.json:
            sys.stdout.write(f"{found['device']}: {found['lines']} lines measured: {config.out.name}\n")
            if found.get("note"):
                sys.stdout.write(f"{found['note']}\n")
        if found["error"]:
            sys.stderr.write(f"error: {found['error']}\n")
    return 1 if any(found["error"] for found in made) else 0


def _stream(rows: list[Line]) -> None:
    for row in rows:
        sys.stdout.write(json.dumps(row, separators=(",", ":")) + "\n")
    sys.stdout.flush()
