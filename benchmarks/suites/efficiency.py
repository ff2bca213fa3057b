"""The learning-efficiency experiment: what each sample buys, with and without reinforcement.

    python -m benchmarks.suites.efficiency --run out/demo --out out/efficiency        (make efficiency)

The same student (pocket_s, from random weights), the same pictures, the same number of samples, several seeds. The pairs are web-like: half of the
captions belong to another picture or are a bare tag. Every budget is a training of its own with its own full schedule. Settings are chosen on one unseen
drawing style, results are read from another. What is done is kept; an interrupted command goes on (benchmarks/suites/efficiency_arms.py has the
arms, efficiency_worlds.py their data).
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.suites.demo import Layout
from benchmarks.suites.efficiency_arms import ARMS, FAMILIES, GRID, LADDER, Family
from benchmarks.suites.efficiency_report import as_text, figures_of, write_pages
from benchmarks.suites.efficiency_worlds import World, make_world
from benchmarks.suites.stages import Stages
from distill.recipes import Recipe
from runtime.files import write_json

K = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class EfficiencyConfig:
    """Settings of the experiment."""

    run: str = "out/demo"
    """A demo run: its pairs, teachers and store are used, and made where they are missing."""
    out: str = "out/efficiency"
    budgets: tuple[int, ...] = (20_000, 40_000, 80_000, 160_000, 320_000)
    seeds: int = 3
    headline_seeds: int = 5
    """Of `plain`, `reinforced` and the negative control, whose difference is small."""
    tuning: tuple[int, int] = (40_000, 160_000)
    """The settings found at the first serve budgets up to it, those found at the second all others."""
    tuning_seeds: tuple[int, int] = (2, 1)
    """Runs of every setting at each of the two: short runs are noisier."""
    ladder_samples: int = 80_000
    """Of the arms that add one thing at a time, and of the control."""
    oracle_samples: int = 160_000
    """Of plain training with a gate, on the right half, and on clean captions."""
    parts: tuple[str, ...] = ("headline", "ladder", "oracles", "noise", "apart", "harm", "nested")
    """Which questions are asked. `headline` is always there."""
    workers: int = 2
    """Students trained side by side, one thread each."""


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Job:
    """One student."""

    arm: str
    samples: int
    seed: int
    setting: tuple[int, float]

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.samples // 1000}k-b{self.setting[0]}-lr{self.setting[1]:g}-{self.seed}"


class Experiment:
    """The jobs of a run folder, and their results."""

    def __init__(self, config: EfficiencyConfig) -> None:
        self.config, self.out = config, Path(config.out)
        (self.out / "recipes").mkdir(parents=True, exist_ok=True)
        self.stages = Stages(self.out, lambda line: _say(f"[efficiency] {line}"))
        self.worlds: dict[str, World] = {}
        place = Layout(Path(config.run))
        self.validation, self.test = place.validation, place.test

    def world(self, name: str) -> World:
        if name not in self.worlds:
            self.worlds[name] = make_world(name, Path(self.config.run), self.out / "worlds", lambda line: _say(f"[{name}] {line}"))
        return self.worlds[name]

    def train(self, jobs: Iterable[Job]) -> None:
        """Train what is not trained, `workers` at a time, the longest first."""
        left = deque(sorted(dict.fromkeys(jobs), key=lambda job: (-job.samples, job.seed, job.arm)))
        for job in left:
            self.world(ARMS[job.arm].world)  # before anything else runs
        lock = threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    if not left:
                        return
                    job = left.popleft()
                self._train(job)

        self.stages.chains(*([work] * self.config.workers))

    def _train(self, job: Job) -> None:
        arm, world = ARMS[job.arm], self.world(ARMS[job.arm].world)
        store, folder = world.stores[arm.store], self.out / "runs" / job.name
        usual, wanted = dataclasses.asdict(Recipe()), dataclasses.asdict(arm.recipe(job.setting))
        unusual = {name: value for name, value in wanted.items() if value != usual[name]}  # stays the same file when recipes learn new words
        recipe = write_json(self.out / "recipes" / f"{job.arm}-b{job.setting[0]}-lr{job.setting[1]:g}.json", unusual)
        keep = world.keeps.get(arm.keep)
        self.stages.run(
            job.name,
            [["benchmarks.suites.efficiency_run", "--out", str(folder), "--pairs", str(world.pairs), "--store", str(store), "--recipe", str(recipe), "--samples", str(job.samples),
              "--seed", str(job.seed), "--validation", str(self.validation), "--test", str(self.test), *(["--keep", str(keep)] if keep else []),
              *(["--embed-dim", "512", "--cuts", "64", "128", "256", "512"] if job.arm == "nested" else [])]],
            inputs=[store / "index.json", recipe, *([keep] if keep else [])], outputs=[folder / "ranks.json"],
        )  # fmt: skip

    def hits(self, arm: str, samples: int, jobs: Sequence[Job], style: str = "test", split: str = "trained") -> np.ndarray:
        """(S, Q) booleans: whether the arm's students found the picture among the first K."""
        found = [json.loads((self.out / "runs" / job.name / "ranks.json").read_text(encoding="utf-8"))[style][split] for job in self.of(arm, samples, jobs)]
        return np.array(found) <= K

    def of(self, arm: str, samples: int, jobs: Sequence[Job]) -> list[Job]:
        """The arm's jobs of a budget, in order of seeds."""
        return sorted((job for job in jobs if job.arm == arm and job.samples == samples), key=lambda job: job.seed)

    def tune(self) -> dict[Family, dict[int, tuple[int, float]]]:
        """The best setting of each family at each tuning budget, by mean recall on the validation style. Seeds that no result uses."""
        asked = [(family, samples, setting) for samples in self.config.tuning for family in FAMILIES for setting in GRID]
        counts = dict(zip(self.config.tuning, self.config.tuning_seeds, strict=True))
        runs = {one: [Job(arm=one[0], samples=one[1], seed=100 + n, setting=one[2]) for n in range(counts[one[1]])] for one in asked}
        self.train(job for jobs in runs.values() for job in jobs)
        table = [{"family": family, "samples": samples, "batch_size": setting[0], "learning_rate": setting[1], "seeds": counts[samples],
                  "recall5_validation": round(float(self.hits(family, samples, runs[family, samples, setting], "validation").mean()), 4)}
                 for family, samples, setting in asked]  # fmt: skip
        write_json(self.out / "tuning.json", table)
        return chosen(table, self.config.tuning)


def chosen(table: Sequence[dict[str, Any]], tuning: tuple[int, int]) -> dict[Family, dict[int, tuple[int, float]]]:
    """Each family's best setting at each budget; where two are as good, the one that is better at the other budget."""
    found: dict[Family, dict[int, tuple[int, float]]] = {}
    for family in FAMILIES:
        recalls = {(row["samples"], row["batch_size"], row["learning_rate"]): row["recall5_validation"] for row in table if row["family"] == family}
        for samples, other in (tuning, tuning[::-1]):
            best = max(GRID, key=lambda setting: (recalls[samples, *setting], recalls[other, *setting]))  # noqa: B023
            found.setdefault(family, {})[samples] = best
    return found


def plan(config: EfficiencyConfig, tuned: dict[Family, dict[int, tuple[int, float]]]) -> dict[str, list[Job]]:
    """The jobs of every part, in the order in which they are run."""
    low, high = config.tuning

    def jobs(arms: Iterable[str], budgets: Iterable[int], seeds: Iterable[int]) -> list[Job]:
        return [
            Job(arm=arm, samples=samples, seed=seed, setting=tuned[ARMS[arm].family][low if samples <= low else high])
            for seed in seeds for arm in arms for samples in budgets
        ]  # fmt: skip

    some, small = range(config.seeds), config.budgets[:3]
    parts = {
        "headline": jobs(("plain", "reinforced"), config.budgets, some),
        "ladder": jobs((*LADDER, "unmatched"), (config.ladder_samples,), some),
        "oracles": jobs(("gated", "right_half", "clean", "plain"), (config.oracle_samples,), some),
        "more seeds": jobs(("plain", "reinforced"), config.budgets, range(config.seeds, config.headline_seeds))
        + (jobs(("unmatched",), (config.ladder_samples,), range(config.seeds, config.headline_seeds)) if "ladder" in config.parts else []),
        "nested": jobs(("nested",), (config.oracle_samples,), some),
        "noise": jobs(("clean", "plain_25"), (small[1], config.oracle_samples), some) + jobs(("reinforced_0", "reinforced_25"), small, some),
        "harm": jobs(("clean", "shuffled_10", "shuffled_50"), (config.tuning[0],), some) + jobs(("reinforced",), (config.tuning[0],), range(2 * config.seeds)),
        "apart": jobs(("plain_apart",), (small[1], config.oracle_samples), some) + jobs(("reinforced_apart",), small, some),
    }
    return {name: found for name, found in parts.items() if name in ("headline", "more seeds") or name in config.parts}


def run_efficiency(config: EfficiencyConfig) -> tuple[dict[str, Any], str]:
    """Run what is not done. Returns the figures (also in OUT/summary.json) and the table; OUT/report.html is written after every part."""
    experiment = Experiment(config)
    started = time.monotonic()
    experiment.world("web50")
    tuned = experiment.tune()
    done: list[Job] = []
    figures, table = {}, ""
    for name, jobs in plan(config, tuned).items():
        _say(f"[efficiency] {name}: {len(jobs)} students")
        experiment.train(jobs)
        done = list(dict.fromkeys([*done, *jobs]))
        figures = figures_of(experiment, done, tuned)
        table = as_text(figures)
        figures["minutes_this_time"] = round((time.monotonic() - started) / 60, 1)
        write_pages(experiment.out, figures, table)
    return figures, table


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    config = tyro.cli(EfficiencyConfig, prog="python -m benchmarks.suites.efficiency", description=__doc__)
    _, table = run_efficiency(config)
    _say(f"\n{table}\n\n{config.out}/report.html has the curves, {config.out}/summary.json every figure")
    return 0


if __name__ == "__main__":
    sys.exit(main())
