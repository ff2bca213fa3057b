"""`mclip demo`: from real pictures to a measured, proven bundle, each stage a process that can be interrupted and repeated.

    mclip demo --out out/demo          (make demo)
    mclip demo --out out/quick --quick (a slice of everything, a few minutes)

What it leaves: pairs/, teachers/, store/, ckpt/, bundle/, teacher-bundle/, results.jsonl, tables.json, summary.json,
report.html, and stages/ with what each stage took.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.suites.stages import MemoryWatch, StageError, Stages, tree_bytes
from runtime.files import write_json

TEACHERS = {"lite0": "tf_efficientnet_lite0", "lite1": "tf_efficientnet_lite1"}


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Settings of a demo run."""

    out: str = "out/demo"
    """Folder of the run."""
    quick: bool = False
    """A slice of the data and short training: everything runs, the figures mean little."""
    seed: int = 0

    @property
    def concepts(self) -> int | None:
        return 48 if self.quick else None

    @property
    def samples(self) -> int:
        return 1_600 if self.quick else 250_000

    @property
    def recover_samples(self) -> int:
        return 640 if self.quick else 20_000

    @property
    def augmentations(self) -> int:
        return 1 if self.quick else 5


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a run keeps what."""

    out: Path

    def __getattr__(self, name: str) -> Path:
        places = {
            "train": "pairs/train", "validation": "pairs/validation", "test": "pairs/test", "stamps": "stamps", "store": "store",
            "student": "ckpt/student", "plain": "ckpt/plain", "pruned": "ckpt/pruned", "bundle": "bundle", "teacher_bundle": "teacher-bundle",
            "results": "results.jsonl", "teacher_results": "teacher-results.jsonl", "report": "report.html",
            "tables": "tables.json", "summary": "summary.json",
        }  # fmt: skip
        if name not in places:
            raise AttributeError(name)
        return self.out / places[name]

    def teacher(self, name: str) -> Path:
        return self.out / "teachers" / name


def run_demo(config: DemoConfig) -> tuple[dict[str, Any], str]:
    """Run every stage that is not done. Returns the summary (also in OUT/summary.json) and the closing table.

    Raises:
        StageError: a stage failed.
    """
    out = Path(config.out)
    _claim(out, config)
    place = Layout(out)
    stages = Stages(out, lambda line: _say(f"[demo] {line}"))
    started = time.monotonic()
    with MemoryWatch() as memory:
        _make(config, place, stages)
        summary, table = _measure(config, place, stages)
    previous = json.loads(place.summary.read_text(encoding="utf-8")).get("peak_memory_gib", 0.0) if place.summary.exists() else 0.0
    summary.update(
        run_minutes=round((time.monotonic() - started) / 60, 2),
        peak_memory_gib=round(max(memory.peak / 2**30, previous), 2),
        disk_gb=round(tree_bytes(out) / 1e9, 3),
    )
    write_json(place.summary, summary)
    return summary, table


def _claim(out: Path, config: DemoConfig) -> None:
    """Make the folder, or check that it holds a run with the same settings."""
    facts = json.loads(json.dumps({name: value for name, value in dataclasses.asdict(config).items() if name != "out"}))
    path = out / "demo.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != facts:
        raise StageError(f"'{out}' holds a demo with other settings ({path.read_text(encoding='utf-8').strip()}); choose another --out or remove the folder")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, facts)


def _make(config: DemoConfig, place: Layout, stages: Stages) -> None:
    """Stages that make things: data, teachers, store, students, bundles."""
    photographs = threading.Thread(target=_stamps, args=(place, stages))
    if not config.quick:
        photographs.start()
    prepare(config, place, stages)
    if photographs.is_alive():
        photographs.join()
    # Two chains, one core each, of about the same length: the reinforced student is trained, loses a quarter of its feed-forward
    # widths, becomes a bundle and is evaluated, then the teachers are; meanwhile the plain student and the sample teacher at its
    # larger input go their ways. The exporter times int8 against fp32 in strict turns, so that the neighbour meets both alike.
    stages.chains(lambda: _student(config, place, stages), lambda: _rest(config, place, stages))


def prepare(config: DemoConfig, place: Layout, stages: Stages, web_noise: str = "0.5") -> None:
    """Sample data, two teachers, and the store of what they know: what every later stage, and other suites, start from.

    web_noise: share of the training pairs whose caption is wrong or a bare generic tag.
    """
    seed = ["--seed", str(config.seed)]
    slice_ = ["--concepts", str(config.concepts)] if config.concepts else []
    stages.run("sample", [["mobileclip.cli", "sample", "emoji", str(place.out / "pairs"), "--web-noise", web_noise, *slice_, *seed]], outputs=[place.out / "pairs/sample.json"])
    receipt = [place.out / "pairs/sample.json"]
    stages.run(
        "teachers",
        [
            ["distill.projectors", str(place.train), str(place.teacher(name)), "--backbone", backbone, "--image-size", "128", "--validation", str(place.validation), *seed]
            for name, backbone in TEACHERS.items()
        ],
        inputs=receipt, outputs=[place.teacher(name) / "receipt.json" for name in TEACHERS],
    )  # fmt: skip
    teacher_receipts = [place.teacher(name) / "receipt.json" for name in TEACHERS]
    stages.run(
        "reinforce",
        [["mobileclip.cli", "reinforce", str(place.train), str(place.store), "--teachers", *(str(place.teacher(name)) for name in TEACHERS),
          "--augmentations", str(config.augmentations), "--workers", "2", *seed]],
        inputs=[*receipt, *teacher_receipts], outputs=[place.store / "index.json"],
    )  # fmt: skip


def _train(recipe: str, out: Path, config: DemoConfig, place: Layout, stages: Stages) -> None:
    stages.run(
        f"train-{out.name}",
        [["mobileclip.cli", "train", "--pairs", str(place.train), "--store", str(place.store), "--validation", str(place.validation),
          "--samples", str(config.samples), "--seed", str(config.seed), "--out", str(out), "--recipe", recipe]],
        inputs=[place.store / "index.json"], outputs=[out / "receipt.json"],
    )  # fmt: skip


def _student(config: DemoConfig, place: Layout, stages: Stages) -> None:
    _train("reinforced", place.student, config, place, stages)
    stages.run(
        "compress",
        [["mobileclip.cli", "compress", str(place.student), str(place.pruned), "--calibrate", str(place.train), "--store", str(place.store),
          "--validation", str(place.validation), "--recover-samples", str(config.recover_samples), "--seed", str(config.seed)]],
        inputs=[place.store / "index.json", place.student / "receipt.json"], outputs=[place.pruned / "receipt.json"],
    )  # fmt: skip
    _export(place.pruned, place.bundle, "256", "onnx,coreml,tensorrt", config, place, stages)
    _evaluate("students", [place.bundle / "manifest.json", place.student / "receipt.json"], place, stages)
    _evaluate("teachers", [place.teacher(name) / "receipt.json" for name in TEACHERS], place, stages)


def _rest(config: DemoConfig, place: Layout, stages: Stages) -> None:
    _train("plain", place.plain, config, place, stages)
    _evaluate("plain", [place.plain / "receipt.json"], place, stages)
    if config.quick:
        _export(place.teacher("lite0"), place.teacher_bundle, "24", "onnx", config, place, stages)
    else:
        stages.run(
            "teacher-224",
            [["distill.projectors", str(place.train), str(place.teacher("lite0-224")), "--backbone", TEACHERS["lite0"], "--image-size", "224", "--limit", "2400",
              "--seed", str(config.seed)]],
            inputs=[place.out / "pairs/sample.json"], outputs=[place.teacher("lite0-224") / "receipt.json"],
        )  # fmt: skip
        _export(place.teacher("lite0-224"), place.teacher_bundle, "128", "onnx,coreml,tensorrt", config, place, stages)
    _evaluate("sample", [place.teacher_bundle / "manifest.json"], place, stages)
    stages.run("baselines", [["benchmarks.suites.figures", str(place.out), "baselines"]], inputs=[place.teacher("lite0") / "receipt.json"], outputs=[place.out / "evaluations"])


def _export(checkpoint: Path, bundle: Path, samples: str, targets: str, config: DemoConfig, place: Layout, stages: Stages) -> None:
    stages.run(
        f"export-{bundle.name}",
        [["mobileclip.cli", "export", str(checkpoint), str(bundle), "--pairs", str(place.validation), "--target", targets, "--precision",
          "fp32" if targets == "onnx" else "fp32,fp16,int8", "--samples", samples, "--seed", str(config.seed), "--force"]],
        inputs=[checkpoint / "receipt.json"], outputs=[bundle / "manifest.json"],
    )  # fmt: skip


def _evaluate(group: str, inputs: list[Path], place: Layout, stages: Stages) -> None:
    from benchmarks.suites import figures

    written = [figures.evaluation_path(place.out, name) for name in figures.GROUPS[group] if name not in figures.INT8]
    stages.run(f"evaluate-{group}", [["benchmarks.suites.figures", str(place.out), group]], inputs=inputs, outputs=written)


def _stamps(place: Layout, stages: Stages) -> None:
    """Photographs for zero-shot evaluation, where Debian's packages are to be had; the demo goes on without them.

    They wait mostly for a download, so they are fetched beside the stages that compute.
    """
    if shutil.which("apt-get") is None:
        _say("[demo] stamps: left out, apt-get is not on this machine")
        return
    try:
        stages.run("stamps", [["mobileclip.cli", "sample", "stamps", str(place.stamps)]])
    except StageError:
        _say("[demo] stamps: left out, the photographs could not be fetched (message above)")


def _measure(config: DemoConfig, place: Layout, stages: Stages) -> tuple[dict[str, Any], str]:
    """What runs alone on the machine, latency of the bundles; then the tables and the report."""
    from benchmarks.suites import figures

    benches = [("bench", place.bundle, place.results, "0.2" if config.quick else "1")]
    if not config.quick:
        benches.append(("bench-teacher", place.teacher_bundle, place.teacher_results, "0.5"))
    for name, bundle, results, seconds in benches:
        stages.run(
            name,
            [["mobileclip.cli", "bench", str(bundle), "--out", str(results), "--seconds", seconds, "--starts", "1" if config.quick else "5"]],
            inputs=[bundle / "manifest.json"], outputs=[results],
        )  # fmt: skip
    tables, summary = figures.tables(place, stages.seconds())
    write_json(place.tables, tables)
    stages.run(
        "report",
        [["mobileclip.cli", "report", *(str(results) for _, _, results, _ in benches), "--run", str(place.out), "-o", str(place.report)]],
        inputs=[place.tables, *(results for _, _, results, _ in benches)], outputs=[place.report],
    )  # fmt: skip
    return summary, figures.as_text(tables)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(argv: list[str]) -> int:
    """`mclip demo`."""
    import tyro

    from benchmarks.suites import figures

    config = tyro.cli(DemoConfig, args=argv, prog="mclip demo", description=__doc__)
    summary, table = run_demo(config)
    _say(json.dumps(summary, indent=1))
    _say(f"\n{table}\n")
    for name, bundle in figures.INT8.items():
        if not figures.int8_towers(config.out, bundle):
            _say(f"{name}: no row, because no int8 ONNX of either tower passed; {config.out / bundle}/manifest.json says what each lacks")
    _say(
        f"{summary['search_hits_of_20']} of the README's 20 queries find their picture among the first five; this run took {summary['run_minutes']:.1f} minutes "
        f"after installation, at most {summary['peak_memory_gib']:.1f} GiB of memory, {summary['disk_gb']:.1f} GB of disk"
    )
    _say(f"everything is under {config.out}; look at {config.out}/report.html")
    return 0
