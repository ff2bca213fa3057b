"""What the store and its loader reach, with the published way beside them in the same run.

    python -m benchmarks.suites.store --run out/demo --out out/bench-store          (make bench-store)

Sections, each kept in OUT/sections/NAME.json, so that a run that was interrupted goes on (`--sections` runs some of them alone):

    format     bytes a sample and microseconds to read a row, against npz and gzipped bfloat16
    loader     samples a second against webdataset + PIL + npz; a resume in the middle of an epoch; a reinforced step over a plain one
    kills      kill -9 at random moments, 1, 2 and 4 workers, local and Ray: the same bytes
    dtypes     int4 against int8: affinity rows, and the student's recall over three seeds
    captions   the prefix captioner: self-retrieval of held-out pictures, and what its captions give the student
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.suites.demo import TEACHERS, DemoConfig, Layout, prepare
from benchmarks.suites.stages import Stages
from benchmarks.suites.student_arms import Arms
from distill.engines import EngineName
from runtime.errors import RecipeError
from runtime.files import write_json
from runtime.pairs import open_pairs, write_shard


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSuite:
    """Settings of the suite."""

    run: str = "out/demo"
    """A demo run; where it has not reached its store, its first three stages are run."""
    out: str = "out/bench-store"
    sections: tuple[str, ...] = ("format", "loader", "kills", "dtypes", "captions")
    samples: int = 64_000
    """Pairs that each student of `dtypes` sees."""
    seeds: tuple[int, ...] = (0, 1, 2)


TARGETS: dict[str, tuple[str, float]] = {
    "bytes_per_sample_int8": ("<=", 56_500), "bytes_per_sample_int8_5_5": ("<=", 16_200),
    "bytes_per_sample_int4": ("<=", 30_500), "bytes_per_sample_int4_5_5": ("<=", 8_800),
    "row_read_microseconds": ("<=", 10), "row_read_dequantised_microseconds": ("<=", 20),
    "loader_ratio": (">=", 2), "resume_cost": ("<=", 0.05), "step_ratio": ("<=", 1.05), "kills_identical": (">=", 1),
    "recall5_int4_minus_int8_high": (">=", 0), "recall5_plain_with_minus_without_low": (">=", 0),
}  # fmt: skip
"""Figures that have a bound. Of a difference it is one end of the 95 % interval: int4 is within noise of int8, captions raise the plain student's recall."""


def run_suite(config: StoreSuite) -> dict[str, Any]:
    """Run the sections that are not done. Returns the flat summary, also in OUT/summary.json."""
    out, place = Path(config.out), Layout(Path(config.run))
    sections: dict[str, Callable[[Stages], dict[str, Any]]] = {
        "format": lambda stages: _format(),
        "loader": lambda stages: _loader(config),
        "kills": lambda stages: _kills(config, place),
        "dtypes": lambda stages: _dtypes(config, place, stages),
        "captions": lambda stages: _captions(config, place),
    }
    if unknown := [name for name in config.sections if name not in sections]:
        raise RecipeError(f"there is no section {', '.join(unknown)}; sections are {', '.join(sections)}")
    stages = Stages(out, lambda line: _say(f"[bench-store] {line}"))
    if {"kills", "dtypes", "captions"} & set(config.sections):
        prepare(DemoConfig(out=config.run), place, Stages(place.out, lambda line: _say(f"[demo] {line}")))
    for name in config.sections:
        path = out / "sections" / f"{name}.json"
        if path.is_file():
            _say(f"[bench-store] {name}: done before")
            continue
        _say(f"[bench-store] {name} …")
        started = time.monotonic()
        figures = sections[name](stages)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**figures, f"{name}_section_seconds": round(time.monotonic() - started, 1)})
    summary: dict[str, Any] = {}
    for name in sections:
        if (path := out / "sections" / f"{name}.json").is_file():
            summary |= json.loads(path.read_text(encoding="utf-8"))
    write_json(out / "summary.json", summary)
    return summary


def _format() -> dict[str, Any]:
    from benchmarks.suites.peers_store import format_figures

    return format_figures()


def _loader(config: StoreSuite) -> dict[str, Any]:
    from benchmarks.suites.loader import LoaderBench, measure

    found = measure(LoaderBench(out=str(Path(config.out) / "loader")))
    # the headline is the least favourable of what was measured
    ratios = [value for name, value in found.items() if name.startswith("loader_ratio_") and name.split("_")[2].endswith("px")]
    steps = [value for name, value in found.items() if name.startswith("step_ratio_") and name.split("_")[2] not in ("low", "high")]
    return {"loader_ratio": min(ratios), "step_ratio": max(steps), **found}


KILL_RUNS: tuple[tuple[EngineName, int, int], ...] = (("local", 2, 20), ("local", 1, 0), ("local", 4, 0), ("ray", 1, 0), ("ray", 2, 3), ("ray", 4, 0))
"""Engine, workers, kills of each run; the first one's undisturbed store is what all are compared with."""
KILL_SHARDS, KILL_ROWS = 2, 128


def _kills(config: StoreSuite, place: Layout) -> dict[str, Any]:
    from benchmarks.suites.kills import KillsConfig, kill_runs

    out = Path(config.out) / "kills"
    pairs = _slice(place.train, out / "pairs")
    figures: dict[str, Any] = {"kill_pairs": KILL_SHARDS * KILL_ROWS, "kills_hit": 0, "kills_identical": True}
    reference = None
    for engine, workers, kills in KILL_RUNS:
        name = f"{engine}_{workers}"
        found = kill_runs(
            KillsConfig(pairs=str(pairs), out=str(out / name), teachers=tuple(str(place.teacher(one)) for one in TEACHERS), kills=kills, engine=engine, workers=workers),
            reference,
        )
        reference = reference or out / name / "whole"
        figures |= {f"kills_{name}": found["kills"], f"identical_{name}": found["equal"]}
        figures["kills_hit"] += found["kills"]
        figures["kills_identical"] &= found["equal"]
        _say(f"[bench-store] {name}: {found['kills']} kills, {found['parts']} parts, {'identical' if found['equal'] else 'DIFFERENT'}")
    return figures


def _slice(source: Path, target: Path) -> Path:
    """The first pairs of a folder, in shards of their own."""
    pairs = open_pairs(source)
    target.mkdir(parents=True, exist_ok=True)
    for shard in range(KILL_SHARDS):
        rows = range(shard * KILL_ROWS, (shard + 1) * KILL_ROWS)
        write_shard(target / f"{shard:05}.tar", [(pairs.keys[row], {"jpg": pairs.image_bytes(row), "txt": pairs.caption(row).encode()}) for row in rows])
    return target


def _dtypes(config: StoreSuite, place: Layout, stages: Stages) -> dict[str, Any]:
    from benchmarks.suites.store_dtypes import dtype_figures

    arms = Arms(out=Path(config.out), pairs=place.train, judged=place.validation, samples=config.samples, seeds=config.seeds)
    return dtype_figures(Path(config.out), place.train, place.validation, [place.teacher(name) for name in TEACHERS], arms, stages)


def _captions(config: StoreSuite, place: Layout) -> dict[str, Any]:
    from benchmarks.suites.captions import prefix_gain

    return prefix_gain(place.out, Path(config.out) / "captions")


def as_text(summary: dict[str, Any]) -> str:
    """One line a figure, with its bound and whether it is met."""
    lines = []
    for name, value in summary.items():
        line = f"{name:48} {value}"
        if name in TARGETS:
            sense, bound = TARGETS[name]
            met = value <= bound if sense == "<=" else value >= bound
            line = f"{line:62} {'met' if met else 'MISSED'}: {sense} {bound:g}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(argv: list[str]) -> int:
    import tyro

    summary = run_suite(tyro.cli(StoreSuite, args=argv, prog="python -m benchmarks.suites.store", description=__doc__))
    _say(as_text(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
