"""`mclip bench`: latency by phase and artefact, cold start, peak memory, the machine's own peak; interleaved comparison of two bundles."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import DeviceError

from .environment import environment
from .flops import gflop
from .inputs import draw_inputs
from .measure import Plan, Timed, compare, interleave, summarise
from .phases import TOWERS, Subject, run_child
from .results import Line, append_results, identity, line, newest, read_results

logger = logging.getLogger(__name__)
STARTS = 5
Report = Callable[[float], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """Settings of `mclip bench`."""

    bundle: Path
    """The bundle to measure."""
    other: Path | None = None
    """A candidate that is compared with the first; None measures the first alone."""
    out: Path = Path("results.jsonl")
    """Results file (JSON lines). Phases that are in it already, for the same bundle and machine, are not measured again."""
    threads: int = 1
    """Threads of one run of a tower."""
    seconds: float = 5.0
    """How long each group of interleaved phases is measured; at least 50 rounds, at most 2,000 (and a minute per group for the slowest)."""
    seed: int = 0
    """Of the order within rounds and of the bootstrap."""
    starts: int = STARTS
    """Fresh processes that each cold start is measured in."""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise DeviceError(f"--threads is {self.threads}, expected at least 1")
        if self.starts < 1:
            raise DeviceError(f"--starts is {self.starts}, expected at least 1")
        if not 0 < self.seconds <= 3600:
            raise DeviceError(f"--seconds is {self.seconds}, expected above 0 and at most 3600")

    @property
    def plan(self) -> Plan:
        """The stopping rule; a slow group may take four times `seconds` to reach 50 rounds."""
        return Plan(seconds=self.seconds, max_seconds=max(4 * self.seconds, 1.0), seed=self.seed)


@dataclass(frozen=True, slots=True)
class Step:
    """Lines that are measured and appended together. `keys` are the (kind, phase, artefact) that it writes."""

    title: str
    keys: tuple[tuple[str, str, str], ...]
    work: Callable[[Report], list[Line]]


def bench(config: BenchConfig, progress: Callable[[str, float], None] | None = None) -> dict[str, Any]:
    """Measure what is not in `config.out` yet and return the summary (also what `--json` prints).

    Args:
        progress: called with a title and the share done (0 to 1).

    Raises:
        BundleError: a bundle is unusable. ParityError: its golden inputs fail here. ResultsError: the results file is not ours.
        DeviceError: a measuring process failed, or torch was imported below the runtime.
    """
    facts = environment(config.threads)  # before anything runs, for the load average
    before = read_results([config.out]) if config.out.exists() else []
    inputs = draw_inputs(seed=0)
    subject = Subject(config.bundle, config.threads, inputs)
    if config.other is not None:
        steps = list(_compare_steps(config, subject, Subject(config.other, config.threads, inputs), facts))
    else:
        steps = list(_steps(config, subject, facts))
    known = {identity(row) for row in before}
    wanted = {step.title: {_identity(key, subject, config, facts) for key in step.keys} for step in steps}
    todo = [step for step in steps if not wanted[step.title] <= known]
    measured = 0
    for index, step in enumerate(todo):
        report = (lambda share, step=step, index=index: progress(step.title, (index + share) / len(todo))) if progress else (lambda share: None)
        report(0.0)
        rows = step.work(report)
        append_results(config.out, rows)
        measured += len(rows)
    if progress:
        progress("done", 1.0)
    everything = set().union(*wanted.values())
    rows = [row for row in newest(read_results([config.out])) if identity(row) in everything]
    return _summary(config, rows, measured, len(steps) - len(todo))


def _steps(config: BenchConfig, subject: Subject, facts: dict[str, Any]) -> Iterator[Step]:
    common = {"bundle": subject.label, "environment": facts}
    settings = _settings(config, subject)
    peak: dict[str, float] = {}

    def machine(report: Report) -> list[Line]:
        peak.update(run_child(["peak", "--threads", str(config.threads)]))
        return [line("peak", "machine", bundle=subject.label, settings=settings, figures=dict(peak), environment=facts)]

    yield Step("machine peak", (("peak", "machine", ""),), machine)
    for phase, function in subject.host().items():

        def host(report: Report, phase: str = phase, function: Timed = function) -> list[Line]:
            return _timed(config, subject, {(phase, ""): function}, facts, report)

        yield Step(phase, (("latency", phase, ""),), host)
    for tower in TOWERS:
        artefacts = subject.runnable(tower)
        for phase, make in ((f"{tower}_tower", subject.tower), (f"end_to_end_{tower}", subject.end_to_end)):
            keys = [("latency", phase, artefact.id) for artefact in artefacts] + [("comparison", phase, artefact.id) for artefact in artefacts[1:]]

            def work(report: Report, phase: str = phase, make: Any = make, tower: str = tower, artefacts: Any = artefacts) -> list[Line]:
                cosines = subject.check()
                functions = {(phase, artefact.id): make(tower, artefact) for artefact in artefacts}
                figures = {artefact.id: _figures(config, subject, artefact, phase, cosines, peak) for artefact in artefacts}
                rows = _timed(config, subject, functions, facts, report, figures)
                return rows + _against_reference(config, subject, rows, facts)

            if artefacts:
                yield Step(phase.replace("_", " "), tuple(keys), work)
    for tower in TOWERS:

        def start(report: Report, tower: str = tower) -> list[Line]:
            return [_cold(config, subject, tower, facts, report)]

        yield Step(f"cold start, {tower}", (("cold_start", f"cold_start_{tower}", ""),), start)
    memory = [("preprocess", ""), ("tokenise", "")] + [(f"{tower}_tower", artefact.id) for tower in TOWERS for artefact in subject.runnable(tower)]
    for phase, artefact in memory:

        def high_water(report: Report, phase: str = phase, artefact: str = artefact) -> list[Line]:
            return _memory(config, subject, phase, artefact, facts)

        yield Step(f"memory, {phase} {artefact}".rstrip(), (("memory", phase, artefact),), high_water)
    absent = subject.not_runnable()
    if absent:
        rows = [line("not_measured", "latency", artefact=name, settings=settings, figures={"reason": why}, **common) for name, why in absent.items()]
        yield Step("not measured", tuple(("not_measured", "latency", name) for name in absent), lambda report: rows)


def _timed(
    config: BenchConfig,
    subject: Subject,
    functions: dict[tuple[str, str], Timed],
    facts: dict[str, Any],
    report: Report,
    figures: dict[str, dict[str, Any]] | None = None,
) -> list[Line]:
    """Interleave the functions, keyed by (phase, artefact), and make a line of each."""
    plan = config.plan
    names = {f"{phase}|{artefact}": (phase, artefact) for phase, artefact in functions}
    samples = interleave({"|".join(key): function for key, function in functions.items()}, plan, _ticker(plan, report))
    rows = []
    for name, (phase, artefact) in names.items():
        settings = {**_settings(config, subject), "warmup": plan.warmup, "seconds": plan.seconds, "interleaved_with": [other for other in names if other != name]}
        more = {"bundle": subject.label, "environment": facts, "figures": (figures or {}).get(artefact, {})}
        rows.append(line("latency", phase, artefact=artefact or None, settings=settings, samples=samples[name].tolist(), summary=summarise(samples[name]).as_dict(), **more))
    for row in rows:
        _gemm_share(row)
    return rows


def _figures(config: BenchConfig, subject: Subject, artefact: Any, phase: str, cosines: dict[str, float], peak: dict[str, float]) -> dict[str, Any]:
    """Facts beside a tower's times: bytes, golden cosine, operations, and the machine's peak, measured anew when the file had it already."""
    figures: dict[str, Any] = {name: getattr(artefact, name) for name in ("tower", "precision", "batch", "bytes")}
    figures["golden_cosine_min"] = cosines.get(artefact.id)
    if phase.endswith("_tower") and artefact.target == "onnx":
        if not peak:
            peak.update(run_child(["peak", "--threads", str(config.threads)]))
        figures["gflop"] = gflop(subject.folder / artefact.path)
        figures["peak_gemm_gflops"] = peak["gemm_gflops"]
    return figures


def _gemm_share(row: Line) -> None:
    figures = row["figures"]
    if figures.get("gflop") and figures.get("peak_gemm_gflops"):
        figures["gemm_share"] = figures["gflop"] / (row["summary"]["p50"] / 1e9) / figures["peak_gemm_gflops"]


def _against_reference(config: BenchConfig, subject: Subject, rows: list[Line], facts: dict[str, Any]) -> list[Line]:
    """Every other artefact against the first (dynamic fp32), from the same rounds."""
    made = []
    for row in rows[1:]:
        ratio = compare(np.array(rows[0]["samples"]), np.array(row["samples"]), seed=config.seed)
        sentence = ratio.sentence(row["artefact"], rows[0]["artefact"])
        figures = {"candidate": row["artefact"], "reference": rows[0]["artefact"], **ratio.as_dict(), "sentence": sentence}
        made.append(line("comparison", row["phase"], bundle=subject.label, artefact=row["artefact"], settings=_settings(config, subject), figures=figures, environment=facts))
    return made


def _cold(config: BenchConfig, subject: Subject, tower: str, facts: dict[str, Any], report: Report) -> Line:
    """Fresh processes, the first one thrown away so that the disk is warm for all of them."""
    runs = []
    for index in range(config.starts + 1):
        runs.append(run_child([f"cold-{tower}", str(subject.folder), "--threads", str(config.threads)], subject.inputs))
        report((index + 1) / (config.starts + 1))
    kept = runs[1:]
    samples = np.array([run["ns"] for run in kept], np.int64)
    figures = {"artefact": kept[0]["artefact"], "torch_imported": False, "first_process_ns": runs[0]["ns"]}
    figures |= {name: int(np.median([run[name] for run in kept])) for name in ("import_ns", "load_ns", "first_ns")}
    settings = {**_settings(config, subject), "warmup": 1}
    phase = f"cold_start_{tower}"
    return line("cold_start", phase, bundle=subject.label, settings=settings, samples=samples.tolist(), summary=summarise(samples).as_dict(), figures=figures, environment=facts)


def _memory(config: BenchConfig, subject: Subject, phase: str, artefact: str, facts: dict[str, Any]) -> list[Line]:
    more = ["--artefact", artefact] if artefact else []
    found = run_child([f"memory-{phase}", str(subject.folder), "--threads", str(config.threads), *more], subject.inputs)["bytes"]
    common = {"bundle": subject.label, "artefact": artefact or None, "settings": _settings(config, subject), "environment": facts}
    if found is None:
        return [line("not_measured", f"memory_{phase}", figures={"reason": "this system has no /proc, so peak memory cannot be read"}, **common)]
    return [line("memory", phase, samples=[found], summary={"maximum": found}, **common)]


def _compare_steps(config: BenchConfig, first: Subject, second: Subject, facts: dict[str, Any]) -> Iterator[Step]:
    """Phase by phase, both bundles with the artefacts that the SDK would choose here."""
    names = {first.clip.manifest.name, second.clip.manifest.name}
    labels = [f"{s.clip.manifest.name}" if len(names) == 2 else f"{s.clip.manifest.name} ({s.sha256[:8]})" for s in (first, second)]

    def functions(subject: Subject, phase: str) -> Timed:
        host = subject.host()
        if phase in host:
            return host[phase]
        tower = next(tower for tower in TOWERS if tower in phase)
        artefact = subject.clip.manifest.artefact(subject.clip.choice[tower].id)
        return subject.tower(tower, artefact) if phase.endswith("_tower") else subject.end_to_end(tower, artefact)

    for phase in ("preprocess", "tokenise", "image_tower", "text_tower", "end_to_end_image", "end_to_end_text"):

        def work(report: Report, phase: str = phase) -> list[Line]:
            if phase == "image_tower":
                first.check()
                second.check()
            plan = config.plan
            samples = interleave({"first": functions(first, phase), "second": functions(second, phase)}, plan, _ticker(plan, report))
            ratio = compare(samples["first"], samples["second"], seed=config.seed)
            medians = {"reference_p50_ns": float(np.median(samples["first"])), "candidate_p50_ns": float(np.median(samples["second"]))}
            figures = {"candidate": labels[1], "reference": labels[0], **ratio.as_dict(), "sentence": f"{phase.replace('_', ' ')}: {ratio.sentence(labels[1], labels[0])}"}
            pair = {"reference_samples": samples["first"].tolist(), "candidate_samples": samples["second"].tolist()}
            settings = {**_settings(config, first), "reference_sha256": first.sha256, "seconds": plan.seconds, "warmup": plan.warmup}
            return [line("comparison", phase, bundle=second.label, settings=settings, figures={**figures, **medians, **pair}, environment=facts)]

        yield Step(f"compare {phase.replace('_', ' ')}", (("comparison", phase, f"{first.sha256}>{second.sha256}"),), work)


def _identity(key: tuple[str, str, str], subject: Subject, config: BenchConfig, facts: dict[str, Any]) -> tuple[str, ...]:
    kind, phase, artefact = key
    settings = _settings(config, subject)
    bundle = subject.label
    if ">" in artefact:
        settings["reference_sha256"], _, other = artefact.partition(">")
        bundle, artefact = {"name": "", "sha256": other}, ""
    return identity({"kind": kind, "phase": phase, "artefact": artefact or None, "bundle": bundle, "settings": settings, "environment": facts})


def _settings(config: BenchConfig, subject: Subject) -> dict[str, Any]:
    return {"threads": config.threads, "batch": 1, "input_sha256": subject.inputs.sha256, "seed": config.seed}


def _ticker(plan: Plan, report: Report) -> Callable[[int, float], None]:
    def tick(turn: int, elapsed: float) -> None:
        if turn % 8 == 0:
            soonest = min(turn / plan.min_samples, elapsed / plan.seconds if plan.seconds else 1.0)
            report(min(1.0, max(turn / plan.max_samples, soonest)))

    return tick


def _summary(config: BenchConfig, rows: list[Line], measured: int, skipped: int) -> dict[str, Any]:
    """One object: milliseconds by phase and artefact, verdicts, cold start in seconds, memory in megabytes."""
    found: dict[str, Any] = {"out": config.out.name, "lines_measured": measured, "steps_skipped": skipped, "threads": config.threads}
    for row in rows:
        name = row["phase"] if not row["artefact"] else f"{row['phase']}.{row['artefact']}"
        if row["kind"] == "latency":
            found.setdefault("latency_ms", {})[name] = {p: round(row["summary"][p] / 1e6, 4) for p in ("p50", "p90", "p99")} | {"n": row["summary"]["n"]}
        elif row["kind"] == "cold_start":
            found[f"{row['phase']}_seconds"] = round(row["summary"]["p50"] / 1e9, 4)
        elif row["kind"] == "memory":
            found.setdefault("peak_memory_megabytes", {})[name] = round(max(row["samples"]) / 1e6, 1)
        elif row["kind"] == "peak":
            found["machine_peak"] = {key: round(value, 2) for key, value in row["figures"].items()}
        elif row["kind"] == "comparison":
            kept = ("candidate", "reference", "value", "low", "high", "verdict", "resolved", "sentence")
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
    for name, reason in found.get("not_measured", {}).items():
        write(f"not measured: {name}: {reason}\n")
    write(f"{found['lines_measured']} lines measured, {found['steps_skipped']} steps were there already: {found['out']}\n")


def main(argv: list[str]) -> int:
    """Command line of `mclip bench`: one bundle, or two with --compare. It needs no extra: a device with the base install can measure itself."""
    parser = argparse.ArgumentParser(prog="mclip bench", description="Measure a bundle on this machine, or compare two bundles side by side.")
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE", help="one bundle; with --compare the reference and the candidate")
    parser.add_argument("--compare", action="store_true", help="compare two bundles, interleaved, phase by phase")
    parser.add_argument("--out", type=Path, default=Path("results.jsonl"), help="results file; phases that it has already are not measured again (results.jsonl)")
    parser.add_argument("--threads", type=int, default=1, help="threads of one run of a tower (1)")
    parser.add_argument("--seconds", type=float, default=5.0, help="time of each group of interleaved phases; at least 50 rounds, at most 2,000 (5)")
    parser.add_argument("--starts", type=int, default=STARTS, help=f"fresh processes that each cold start is measured in ({STARTS})")
    parser.add_argument("--seed", type=int, default=0, help="of the order within rounds and of the bootstrap (0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    if len(options.bundles) != (2 if options.compare else 1):
        parser.error(f"{len(options.bundles)} bundles were given; expected one, or two with --compare")
    other = options.bundles[1] if options.compare else None
    config = BenchConfig(bundle=options.bundles[0], other=other, out=options.out, threads=options.threads, seconds=options.seconds, seed=options.seed, starts=options.starts)
    with _bar() as progress:
        found = bench(config, progress)
    if options.json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        _print(found)
    return 0
