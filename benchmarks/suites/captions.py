"""What the prefix captioner is worth on the sample: its captions find their own pictures, and a student that reads them retrieves better.

    python -m benchmarks.suites.captions --run out/demo --out out/bench-store/captions

The captioner is trained on the demo's web-like training pairs. Self-retrieval is asked of the test style, which neither it nor the teachers'
projectors read. Then students of two recipes, `plain` (the contrastive loss alone) and `reinforced` (the teachers' embeddings besides), each
in two arms that differ in the share of caption types alone and read one and the same store: `without` takes the pairs' own captions, `with`
every second time one of the captioner's. Same seeds, same number of samples.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.suites.demo import TEACHERS, Layout
from benchmarks.suites.stages import Stages
from benchmarks.suites.student_arms import Arms, arm_figures, train_arms
from distill.recipes import Recipe, plain, reinforced
from runtime.files import write_json

MIXES: dict[str, dict[str, float]] = {"without": {"raw": 1}, "with": {"raw": 1, "synthetic": 1}}
"""Shares of caption types. On the validation style, one seed, 64,000 samples, templates of the pair's caption beside it made every arm worse."""
STUDENTS: dict[str, Callable[[], Recipe]] = {"plain": plain, "reinforced": reinforced}


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionSuite:
    """Settings of the suite."""

    run: str = "out/demo"
    """A finished demo run, or one that has reached its store."""
    out: str = "out/bench-store/captions"
    samples: int = 64_000
    """Pairs that each student sees."""
    seeds: tuple[int, ...] = (0, 1, 2)
    captioner_steps: int = 800


def prefix_gain(run: Path, out: Path, samples: int = 64_000, seeds: tuple[int, ...] = (0, 1, 2), captioner_steps: int = 800) -> dict[str, Any]:
    """Flat figures: self-retrieval of held-out pictures, and the students' recall@5 of every arm, each seed. What is done is kept.

    Args:
        run: folder of a demo run (pairs/, teachers/, store/). It is only read.
        out: folder to fill.
    """
    out.mkdir(parents=True, exist_ok=True)
    place, stages = Layout(run), Stages(out, lambda line: _say(f"[captions] {line}"))
    teachers = [str(place.teacher(name)) for name in TEACHERS]
    captioner, captions = train_captioner(place, stages, captioner_steps), out / "train"
    stages.chains(lambda: captioned_store(place, stages), lambda: _judge(stages, place.test, out / "test", captioner, teachers))
    store = out / "store"
    hits = train_arms(Arms(out=out, pairs=place.train, judged=place.test, samples=samples, seeds=seeds), _options(out, store), stages)
    receipt = json.loads((captions / "receipt.json").read_text(encoding="utf-8"))
    seconds = stages.seconds()
    return {
        **json.loads((out / "self-retrieval.json").read_text(encoding="utf-8")), "captions_training_pictures": receipt["counts"]["captions"],
        "captioner_training_seconds": seconds["captioner"], "caption_seconds": seconds["caption-train"],
        **{name: value for student in STUDENTS for name, value in arm_figures({arm: hits[f"{student}_{arm}"] for arm in MIXES}, "without", f"recall5_{student}").items()},
        "student_samples": samples,
    }  # fmt: skip


def train_captioner(place: Layout, stages: Stages, steps: int = 800, threads: int = 2) -> Path:
    """A prefix captioner that has read the run's web-like training pairs, in the stages' folder."""
    captioner = stages.out / "captioner"
    receipts = [place.teacher(name) / "receipt.json" for name in TEACHERS] + [place.out / "pairs/sample.json"]
    teachers = [str(place.teacher(name)) for name in TEACHERS]
    stages.run(
        "captioner", [["mobileclip.cli", "train-captioner", str(place.train), str(captioner), "--teacher", *teachers, "--steps", str(steps), "--threads", str(threads)]],
        inputs=receipts, outputs=[captioner / "receipt.json"],
    )  # fmt: skip
    return captioner


def captioned_store(place: Layout, stages: Stages) -> Path:
    """The run's store with the captioner's captions of the training pictures as a further layer, in the stages' folder."""
    captions, store = stages.out / "train", stages.out / "store"
    _caption(stages, "caption-train", place.train, captions, stages.out / "captioner", ["--store", str(place.store)])
    _reinforce(stages, place, store, captions, [str(place.teacher(name)) for name in TEACHERS])
    return store


def _caption(stages: Stages, name: str, pairs: Path, out: Path, captioner: Path, more: Sequence[str] = ()) -> None:
    stages.run(
        name, [["mobileclip.cli", "caption", str(pairs), str(out), "--captioner", f"prefix:{captioner}", "--batch", "64", *more]],
        inputs=[captioner / "receipt.json"], outputs=[out / "receipt.json"],
    )  # fmt: skip


def _judge(stages: Stages, pairs: Path, captions: Path, captioner: Path, teachers: list[str]) -> None:
    _caption(stages, "caption-test", pairs, captions, captioner)
    figures = stages.out / "self-retrieval.json"
    stages.run(
        "self-retrieval", [["distill.self_retrieval", str(pairs), "--captions", str(captions), "--teachers", *teachers, "--out", str(figures)]],
        inputs=[captions / "receipt.json"], outputs=[figures],
    )  # fmt: skip


def _reinforce(stages: Stages, place: Layout, store: Path, captions: Path, teachers: list[str]) -> None:
    """A copy of the run's store, with the captions as a further layer."""
    if not store.is_dir():
        half = store.with_name(".store.part")
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(place.store, half)
        half.rename(store)
    stages.run(
        "add-captions", [["mobileclip.cli", "reinforce", str(place.train), str(store), "--teachers", *teachers, "--add-captions", str(captions), "--workers", "1"]],
        inputs=[captions / "receipt.json", place.store / "index.json"], outputs=[store / "index.json"],
    )  # fmt: skip


def _options(out: Path, store: Path) -> dict[str, list[str]]:
    """What `mclip train` is told in each arm."""
    found = {}
    for student, recipe in STUDENTS.items():
        for arm, mix in MIXES.items():
            path = write_json(out / f"recipe-{student}-{arm}.json", dataclasses.asdict(dataclasses.replace(recipe(), caption_mix=mix)))
            found[f"{student}_{arm}"] = ["--store", str(store), "--recipe", str(path)]
    return found


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    config = tyro.cli(CaptionSuite, prog="python -m benchmarks.suites.captions", description=__doc__)
    started = time.monotonic()
    figures = {**prefix_gain(Path(config.run), Path(config.out), config.samples, config.seeds, config.captioner_steps), "seconds": round(time.monotonic() - started, 1)}
    write_json(Path(config.out) / "summary.json", figures)
    for name, value in figures.items():
        _say(f"{name:48} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
