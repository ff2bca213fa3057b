"""Does a comparison stay silent between equals, and does it find five percent? Asked of a real session on the machine as it is.

    python -m benchmarks.suites.compare_power --bundle out/demo/bundle --out out/bench-compare        (make bench-compare)

Each of the comparisons opens both sides anew several times, as `mclip bench A B --compare` does, and judges as it does. In the first hundred both sides are
the same file; in the second the candidate also waits, busily, a twentieth of the time that it has just taken. Samples of all are kept.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from benchmarks.bench_compare import OPENINGS, opened_anew
from benchmarks.environment import environment
from benchmarks.inputs import draw_inputs
from benchmarks.measure import Plan, Timed, measure
from benchmarks.phases import Subject
from benchmarks.ratios import Ratio, compare
from runtime.files import write_json, write_whole

ARMS = {"aa": 0.0, "planted": 0.05}


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerConfig:
    bundle: str = "out/demo/bundle"
    """The session is one of its towers."""
    out: str = "out/bench-compare"
    tower: Literal["image", "text"] = "image"
    milliseconds: float = 4.0
    """The batch is chosen so that a run takes about this long."""
    comparisons: int = 100
    """Of each kind."""
    pairs: int = 240
    """Of each comparison."""
    threads: int = 1
    seed: int = 0


def run_power(config: PowerConfig) -> dict[str, Any]:
    """Run the comparisons that are not done yet. Returns the figures (also in OUT/summary.json)."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    subject = Subject(Path(config.bundle), config.threads, draw_inputs(4))
    artefact = subject.runnable(config.tower)[0]
    batch = _batch(subject, artefact, config)
    opener = functools.partial(subject.tower, config.tower, artefact, batch)
    found: dict[str, list[Ratio]] = {arm: [] for arm in ARMS}
    started = time.perf_counter()
    # the two kinds take turns, so that a restless hour meets both
    for number in range(config.comparisons):
        for arm, share in ARMS.items():
            kept = out / f"{arm}-{number:03d}.npz"
            if not kept.is_file():
                samples, groups = opened_anew({"first": opener, "second": functools.partial(_planted, opener, share)}, _plan(config, number), OPENINGS)
                _save(kept, first=samples["first"], second=samples["second"], groups=np.array(groups))
            with np.load(kept) as arrays:
                found[arm].append(compare(arrays["first"], arrays["second"], groups=arrays["groups"].tolist(), seed=number))
        if (number + 1) % 10 == 0:
            _say(f"{number + 1} of {config.comparisons}: {figures(found)}, {time.perf_counter() - started:.0f} s")
    summary = figures(found) | {
        "comparisons": config.comparisons, "pairs": config.pairs, "openings": OPENINGS, "batch": batch, "artefact": artefact.id,
        "environment": environment(config.threads), "ratios": {arm: [asdict(ratio) for ratio in ratios] for arm, ratios in found.items()},
    }  # fmt: skip
    write_json(out / "summary.json", summary)
    return summary


def figures(found: dict[str, list[Ratio]]) -> dict[str, Any]:
    """How often nothing was called between equals, how often the planted slowdown was, and how wide and how far off the intervals are."""
    made: dict[str, Any] = {
        "aa_no_difference": sum(ratio.verdict == "no difference" for ratio in found["aa"]),
        "planted_5pct_called": sum(ratio.verdict == "slower" for ratio in found["planted"]),
    }
    for arm, share in ARMS.items():
        if found[arm]:
            made[f"{arm}_half_width_median"] = round(float(np.median([(ratio.high - ratio.low) / 2 / ratio.value for ratio in found[arm]])), 5)
            made[f"{arm}_off_worst"] = round(max(abs(ratio.value / (1 + share) - 1) for ratio in found[arm]), 5)
            made[f"{arm}_covered"] = sum(ratio.low <= 1 + share <= ratio.high for ratio in found[arm])
    return made


def _planted(opener: Callable[[], Timed], share: float) -> Timed:
    """The same session, and `share` of each run's own time spent in a loop after it."""
    call = opener()
    if not share:
        return call

    def slower(turn: int) -> object:
        before = time.perf_counter_ns()
        found = call(turn)
        end = time.perf_counter_ns()
        end += int((end - before) * share)
        while time.perf_counter_ns() < end:
            pass
        return found

    return slower


def _plan(config: PowerConfig, number: int) -> Plan:
    return Plan(warmup=3, min_samples=config.pairs, max_samples=config.pairs, few_samples=10, seconds=0.0, max_seconds=600.0, seed=config.seed + number)


def _batch(subject: Subject, artefact: Any, config: PowerConfig) -> int:
    """Power of two whose run takes at least three quarters of `milliseconds`."""
    batch = 1
    while batch < 256:
        samples = measure(subject.tower(config.tower, artefact, batch), Plan(warmup=3, min_samples=15, max_samples=15, seconds=0))
        if np.median(samples) >= 0.75e6 * config.milliseconds or artefact.batch != "dynamic":
            break
        batch *= 2
    return batch


def _save(path: Path, **arrays: np.ndarray) -> None:
    import io

    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_whole(path, buffer.getvalue())


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def main(argv: list[str] | None = None) -> int:
    """Command line of the suite."""
    found = run_power(tyro.cli(PowerConfig, args=argv))
    sys.stdout.write(json.dumps({name: value for name, value in found.items() if name not in ("ratios", "environment")}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
