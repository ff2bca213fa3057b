"""A quick answer to one question while a bundle is made: is this artefact faster than that one, here?

Candidates run strictly in turn, one input at a time on one thread, so that whatever else the machine does meets all of them
alike; the verdict is the median of paired ratios with a bootstrap interval. The full laboratory (warm-up rules, A/A tests,
percentiles, memory, devices) is `benchmarks`; figures quoted anywhere come from there.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LEVEL = 0.99
MARGIN = 0.01  # a difference is called when the interval lies beyond 1 %


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """Time of a candidate over time of the base: median of paired ratios, interval of that median."""

    median: float
    low: float
    high: float
    level: float = LEVEL

    @property
    def faster(self) -> bool:
        """The whole interval lies more than 1 % below 1."""
        return self.high < 1 - MARGIN

    def as_dict(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high, "level": self.level}


def interleaved(runs: Mapping[str, Callable[[], Any]], *, pairs: int = 40, warmup: int = 5, settle: int = 0, budget_seconds: float = 20.0) -> dict[str, np.ndarray]:
    """Run every candidate in turn, again and again, in an order that rotates.

    Args:
        pairs: rounds that are timed; at least 30 are done whatever they take, more only inside the budget.
        warmup: rounds that are thrown away.
        settle: runs of a candidate that go before each timed one, so that it finds its own weights in the caches and not its neighbours'.

    Returns:
        Seconds of each round by candidate, arrays of equal length.
    """
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for round_ in range(warmup + pairs):
        if round_ >= warmup + 30 and time.perf_counter() - started > budget_seconds:
            break
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            for _ in range(settle):
                runs[name]()
            begin = time.perf_counter()
            runs[name]()
            taken = time.perf_counter() - begin
            if round_ >= warmup:
                times[name].append(taken)
    return {name: np.array(values) for name, values in times.items()}


def ratio(candidate: np.ndarray, base: np.ndarray, *, seed: int = 0, draws: int = 2000) -> Ratio:
    """Median of `candidate / base`, round by round, with a bootstrap interval."""
    values = candidate / base
    rng = np.random.default_rng(seed)
    medians = np.median(values[rng.integers(0, len(values), (draws, len(values)))], axis=1)
    low, high = np.quantile(medians, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Ratio(median=float(np.median(values)), low=float(low), high=float(high))


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def figures(times: np.ndarray, against: Ratio | None) -> dict[str, Any]:
    """The manifest's `latency` entry of one artefact: milliseconds for one input on one thread."""
    import onnxruntime

    found: dict[str, Any] = {
        "p50_ms": float(np.median(times) * 1e3),
        "p90_ms": float(np.quantile(times, 0.9) * 1e3),
        "n": len(times),
        "batch": 1,
        "threads": 1,
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "cpu": processor(),
    }
    if against is not None:
        found["ratio_to_fp32"] = against.as_dict()
    return found
