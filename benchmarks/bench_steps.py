"""The steps of a measurement of one bundle: what each measures, in which process, and the lines it leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import DeviceError
from runtime.manifest import Artefact

from .flops import gflop
from .measure import Plan, Taken, Timed, summarise, take
from .modes import MODES, ModePlan, run_mode
from .phases import TOWERS, Subject, run_child
from .ratios import compare
from .results import Line, line

STARTS = 5
SETTLE = 100
"""Most rounds of warm-up beyond the first five."""
Report = Callable[[float], None]
Key = tuple[str, str, str, str]
"""(kind, phase, artefact, mode) of a line; mode is empty for single stream."""
ACCURACY = ("cosine_min", "cosine_p1", "cosine_mean", "rank_agreement", "recall1_change", "recall1_low", "recall1_high", "n")
"""What the gate of the export found, as far as the manifest tells."""


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
    phases: tuple[str, ...] = ()
    """Only these phases, such as image_tower; all when empty."""
    modes: tuple[str, ...] = ("single",)
    """single (one query after the other), offline (batches), burst, sustained, duty: of the artefacts that the SDK would choose."""
    batch: int = 8
    """Inputs at a time in offline mode."""
    mode_plan: ModePlan = field(default_factory=ModePlan)
    """How long the modes last."""
    device: dict[str, Any] | None = None
    """What results say of the device they come from; None is this machine as it is."""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise DeviceError(f"--threads is {self.threads}, expected at least 1")
        if self.starts < 1:
            raise DeviceError(f"--starts is {self.starts}, expected at least 1")
        if self.batch < 1:
            raise DeviceError(f"--batch is {self.batch}, expected at least 1")
        unknown = [mode for mode in self.modes if mode not in MODES]
        if unknown or not self.modes:
            raise DeviceError(f"--modes names {', '.join(unknown) or 'none'}; known are {', '.join(MODES)}")
        if not 0 < self.seconds <= 3600:
            raise DeviceError(f"--seconds is {self.seconds}, expected above 0 and at most 3600")

    @property
    def plan(self) -> Plan:
        """The stopping rule; a slow group may take four times `seconds` to reach 50 rounds."""
        return Plan(seconds=self.seconds, max_seconds=max(4 * self.seconds, 1.0), seed=self.seed, settle=SETTLE)


@dataclass(frozen=True, slots=True)
class Step:
    """Lines that are measured and appended together. `keys` are those of the lines that it writes."""

    title: str
    keys: tuple[Key, ...]
    work: Callable[[Report], list[Line]]


@dataclass(slots=True)
class Bench:
    """One bundle that is being measured. `peak` is the machine's, once it was measured."""

    config: BenchConfig
    subject: Subject
    facts: dict[str, Any]
    peak: dict[str, float] = field(default_factory=dict)

    def settings(self, **more: Any) -> dict[str, Any]:
        """What makes a line the measurement that it is."""
        return {"threads": self.config.threads, "batch": 1, "input_sha256": self.subject.inputs.sha256, "seed": self.config.seed, **more}

    def line(self, kind: str, phase: str, artefact: str = "", *, settings: dict[str, Any] | None = None, **more: Any) -> Line:
        """A line about this bundle."""
        common = {"bundle": self.subject.label, "environment": self.facts, "device": self.config.device}
        return line(kind, phase, artefact=artefact or None, settings=self.settings() if settings is None else settings, **common, **more)


def steps(bench: Bench) -> Iterator[Step]:
    """All steps in the order in which they are done."""
    yield Step("machine peak", (("peak", "machine", "", ""),), lambda report: [_peak(bench)])
    for phase, function in bench.subject.host().items():
        yield Step(phase, (("latency", phase, "", ""),), lambda report, phase=phase, function=function: _timed(bench, {(phase, ""): function}, report))
    for tower in TOWERS:
        artefacts = bench.subject.runnable(tower)
        for phase, make in ((f"{tower}_tower", bench.subject.tower), (f"end_to_end_{tower}", bench.subject.end_to_end)):
            if artefacts:
                yield _side_by_side(bench, phase, tower, artefacts, make)
    for tower in TOWERS:
        yield Step(f"cold start, {tower}", (("cold_start", f"cold_start_{tower}", "", ""),), lambda report, tower=tower: [_cold(bench, tower, report)])
    phases = [(f"{tower}_tower", artefact.id) for tower in TOWERS for artefact in bench.subject.runnable(tower)]
    for phase, artefact in [("preprocess", ""), ("tokenise", ""), *phases]:
        name = f"memory, {phase} {artefact}".rstrip()
        yield Step(name, (("memory", phase, artefact, ""),), lambda report, phase=phase, artefact=artefact: _memory(bench, phase, artefact))
    for tower in TOWERS:
        chosen = bench.subject.clip.choice[tower].id
        keys: list[Key] = [("load", phase, chosen, "") for phase in ("file_read", "load_cold", "load_warm", "first_inference")]
        yield Step(f"load {chosen}", tuple(keys), lambda report, chosen=chosen: _load(bench, chosen, report))
        if bench.subject.clip.manifest.artefact(chosen).target == "onnx":
            yield Step(f"operations of {chosen}", (("profile", f"{tower}_tower", chosen, ""),), lambda report, tower=tower, chosen=chosen: [_profile(bench, tower, chosen)])
        for mode in (mode for mode in bench.config.modes if mode != "single"):
            yield Step(f"{mode}, {tower}", (("latency", f"{tower}_tower", chosen, mode),), lambda report, tower=tower, mode=mode: _mode(bench, tower, mode, report))
    absent = bench.subject.not_runnable()
    if absent:
        rows = [bench.line("not_measured", "latency", name, figures={"reason": why}) for name, why in absent.items()]
        yield Step("not measured", tuple(("not_measured", "latency", name, "") for name in absent), lambda report: rows)


def _side_by_side(bench: Bench, phase: str, tower: str, artefacts: list[Artefact], make: Callable[[str, Artefact], Timed]) -> Step:
    """All artefacts of a tower in the same rounds, each against the first (dynamic fp32)."""
    keys: list[Key] = [("latency", phase, artefact.id, "") for artefact in artefacts] + [("comparison", phase, artefact.id, "") for artefact in artefacts[1:]]

    def work(report: Report) -> list[Line]:
        cosines = bench.subject.check()
        figures = {artefact.id: figures_of(bench, artefact, phase, cosines) for artefact in artefacts}
        rows = _timed(bench, {(phase, artefact.id): make(tower, artefact) for artefact in artefacts}, report, figures)
        return rows + _against_reference(bench, rows)

    return Step(phase.replace("_", " "), tuple(keys), work)


def _peak(bench: Bench) -> Line:
    bench.peak.update(run_child(["peak", "--threads", str(bench.config.threads)]))
    return bench.line("peak", "machine", figures=dict(bench.peak))


def _timed(bench: Bench, functions: dict[tuple[str, str], Timed], report: Report, figures: dict[str, dict[str, Any]] | None = None, **settings: Any) -> list[Line]:
    """Interleave the functions, keyed by (phase, artefact), and make a line of each."""
    plan = bench.config.plan
    names = {f"{phase}|{artefact}": (phase, artefact) for phase, artefact in functions}
    taken = take({"|".join(key): function for key, function in functions.items()}, plan, ticker(plan, report))
    rows = []
    for name, (phase, artefact) in names.items():
        others = [other for other in names if other != name]
        settled = bench.settings(warmup=taken.warmup, seconds=plan.seconds, interleaved_with=others, **settings)
        samples = taken.samples[name]
        more = {**(figures or {}).get(artefact, {}), **_beside(taken, name)}
        summary = summarise(samples, further=against(taken)).as_dict()
        rows.append(bench.line("latency", phase, artefact, settings=settled, samples=samples.tolist(), summary=summary, figures=more))
    for row in rows:
        _gemm_share(row)
    return rows


def _beside(taken: Taken, name: str) -> dict[str, Any]:
    """Processor time of a run, cores that were busy, and the first run of all, still cold."""
    samples = taken.samples[name]
    return {"cpu_ns": round(taken.cpu_ns[name] / len(samples)), "cores_busy": taken.cpu_ns[name] / int(samples.sum()), "first_ns": taken.first_ns[name]}


def against(taken: Taken) -> list[str]:
    """Reasons against a measurement that its samples do not show."""
    found = [] if taken.converged else [f"warm-up had not converged after {taken.warmup} rounds"]
    return found + ([f"the machine was suspended for {taken.suspended_seconds:.1f} s"] if taken.suspended_seconds > 0.05 else [])


def figures_of(bench: Bench, artefact: Artefact, phase: str, cosines: dict[str, float]) -> dict[str, Any]:
    """Facts beside a tower's times: bytes, accuracy, operations, and the machine's peak, measured anew when the file had it already."""
    figures: dict[str, Any] = {name: getattr(artefact, name) for name in ("tower", "target", "precision", "batch", "bytes")}
    figures["golden_cosine_min"] = cosines.get(artefact.id)
    figures["accuracy"] = {name: artefact.parity[name] for name in ACCURACY if artefact.parity.get(name) is not None} if artefact.parity else None
    if phase.endswith("_tower") and artefact.target == "onnx":
        if not bench.peak:
            bench.peak.update(run_child(["peak", "--threads", str(bench.config.threads)]))
        figures["gflop"] = gflop(bench.subject.folder / str(artefact.path))
        figures["peak_gemm_gflops"] = bench.peak["gemm_gflops"]
        if artefact.precision == "int8" and bench.peak.get("gemm_int8_gops"):
            figures["peak_gemm_int8_gops"] = bench.peak["gemm_int8_gops"]
    return figures


def _gemm_share(row: Line) -> None:
    """Share of the machine's peak of the precision that most of the operations have."""
    figures = row["figures"]
    peak = figures.get("peak_gemm_int8_gops") or figures.get("peak_gemm_gflops")
    if figures.get("gflop") and peak:
        figures["gemm_share"] = figures["gflop"] / (row["summary"]["p50"] / 1e9) / peak


def _against_reference(bench: Bench, rows: list[Line]) -> list[Line]:
    """Every other artefact against the first, from the same rounds."""
    made = []
    for row in rows[1:]:
        ratio = compare(np.array(rows[0]["samples"]), np.array(row["samples"]), seed=bench.config.seed)
        sentence = ratio.sentence(row["artefact"], rows[0]["artefact"])
        figures = {"candidate": row["artefact"], "reference": rows[0]["artefact"], **ratio.as_dict(), "sentence": sentence}
        made.append(bench.line("comparison", row["phase"], row["artefact"], figures=figures))
    return made


def _cold(bench: Bench, tower: str, report: Report) -> Line:
    """Fresh processes, the first one thrown away so that the disk is warm for all of them."""
    runs = []
    for index in range(bench.config.starts + 1):
        runs.append(run_child([f"cold-{tower}", str(bench.subject.folder), "--threads", str(bench.config.threads)], bench.subject.inputs))
        report((index + 1) / (bench.config.starts + 1))
    kept = runs[1:]
    samples = np.array([run["ns"] for run in kept], np.int64)
    figures = {"artefact": kept[0]["artefact"], "torch_imported": False, "first_process_ns": runs[0]["ns"]}
    figures |= {name: int(np.median([run[name] for run in kept])) for name in ("import_ns", "load_ns", "first_ns")}
    return bench.line("cold_start", f"cold_start_{tower}", settings=bench.settings(warmup=1), samples=samples.tolist(), summary=summarise(samples).as_dict(), figures=figures)


def _memory(bench: Bench, phase: str, artefact: str) -> list[Line]:
    more = ["--artefact", artefact] if artefact else []
    found = run_child([f"memory-{phase}", str(bench.subject.folder), "--threads", str(bench.config.threads), *more], bench.subject.inputs)
    if found["bytes"] is None:
        return [bench.line("not_measured", f"memory_{phase}", artefact, figures={"reason": "this system has no /proc, so peak memory cannot be read"})]
    return [bench.line("memory", phase, artefact, samples=[found["bytes"]], summary={"maximum": found["bytes"]}, figures={"resident_bytes": found.get("resident")})]


def _load(bench: Bench, artefact: str, report: Report) -> list[Line]:
    """File, load without and with the system's cache, first inference: one sample of each from every fresh process."""
    runs = []
    for index in range(bench.config.starts):
        runs.append(run_child(["load", str(bench.subject.folder), "--threads", str(bench.config.threads), "--artefact", artefact]))
        report((index + 1) / bench.config.starts)
    rows = []
    for phase in ("file_read", "load_cold", "load_warm", "first_inference"):
        if phase == "load_cold" and not all(run["cold"] for run in runs):
            why = "this system does not drop files from its cache for a program without privileges, so opening from the disk cannot be told from opening from memory"
            rows.append(bench.line("not_measured", phase, artefact, figures={"reason": why}))
            continue
        samples = np.array([run[phase] for run in runs], np.int64)
        figures = {"file_bytes": runs[0]["file_bytes"]}
        rows.append(bench.line("load", phase, artefact, samples=samples.tolist(), summary=summarise(samples).as_dict(), figures=figures))
    return rows


def _profile(bench: Bench, tower: str, artefact: str) -> Line:
    found = run_child(["operations", str(bench.subject.folder), "--threads", str(bench.config.threads), "--artefact", artefact])
    return bench.line("profile", f"{tower}_tower", artefact, figures=found)


def _mode(bench: Bench, tower: str, mode: str, report: Report) -> list[Line]:
    """One mode of the artefact that the SDK would choose."""
    cosines = bench.subject.check()
    artefact = bench.subject.clip.manifest.artefact(bench.subject.clip.choice[tower].id)
    phase, count = f"{tower}_tower", bench.config.batch
    figures = figures_of(bench, artefact, phase, cosines)
    if mode == "offline":
        if artefact.batch != "dynamic":
            why = f"{artefact.id} takes {artefact.batch} input{'s' if artefact.batch != '1' else ''} at a time, so a batch of {count} is nothing else than single stream"
            return [bench.line("not_measured", phase, artefact.id, settings=bench.settings(mode=mode, batch=count), figures={"reason": why})]
        figures.pop("gflop", None)  # of one input
        rows = _timed(bench, {(phase, artefact.id): bench.subject.tower(tower, artefact, count)}, report, {artefact.id: figures}, mode=mode)
        rows[0]["settings"]["batch"] = count
        rows[0]["figures"]["per_second"] = count / (rows[0]["summary"]["p50"] / 1e9)
        return rows
    run = run_mode(mode, bench.subject.tower(tower, artefact), bench.config.mode_plan, tick=report)
    settings = bench.settings(mode=mode, warmup=0)
    made = bench.line("latency", phase, artefact.id, settings=settings, samples=run.samples.tolist(), summary=summarise(run.samples).as_dict(), figures=figures | run.figures)
    return [made]


def ticker(plan: Plan, report: Report) -> Callable[[int, float], None]:
    """Tell the share of a measurement that is done, every eighth round."""

    def tick(turn: int, elapsed: float) -> None:
        if turn % 8 == 0:
            soonest = min(turn / plan.min_samples, elapsed / plan.seconds if plan.seconds else 1.0)
            report(min(1.0, max(turn / plan.max_samples, soonest)))

    return tick
