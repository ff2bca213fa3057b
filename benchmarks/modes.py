"""The ways a tower is used, each with its own number: a burst from rest, minutes on end, one query now and then, and batches of a whole gallery.

A mean over a warm loop describes none of the first three: clocks rise and fall, boards throttle, caches go cold between two queries.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .energy import Meter, open_meter
from .measure import MeasureError, Nanoseconds, Timed, quiet_collector

MODES = ("single", "offline", "burst", "sustained", "duty")
BURST = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class ModePlan:
    """How long each mode lasts."""

    rest: float = 2.0
    """Seconds of idleness before a burst."""
    sustained: float = 60.0
    """Seconds of a sustained run."""
    period: float = 1.0
    """Seconds from the start of one query to the start of the next, duty-cycled."""
    queries: int = 64
    """Duty-cycled queries; 64 are the fewest with a bound of p90."""

    def __post_init__(self) -> None:
        if not (0 <= self.rest <= 600 and 0 < self.sustained <= 36_000 and 0 < self.period <= 600 and self.queries >= 10):
            raise MeasureError(f"a mode needs 0 <= rest <= 600, 0 < sustained <= 36000 and 0 < period <= 600 seconds and at least 10 queries; found {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Samples of one mode in order, what they mean together, and the energy in joules when a meter ran."""

    samples: Nanoseconds
    figures: dict[str, Any]


def run_mode(mode: str, call: Timed, plan: ModePlan, *, tick: Callable[[float], None] = lambda share: None, meter: Meter | None = None) -> Run:
    """Burst, sustained or duty-cycled; single stream and offline are plain measurements (`measure.take`).

    Raises MeasureError for another mode.
    """
    if mode == "burst":
        return _burst(call, plan, tick)
    if mode == "sustained":
        return _sustained(call, plan, tick, open_meter() if meter is None else meter)
    if mode == "duty":
        return _duty(call, plan, tick)
    raise MeasureError(f"'{mode}' is not a mode of its own; known are {', '.join(MODES)}")


def _burst(call: Timed, plan: ModePlan, tick: Callable[[float], None]) -> Run:
    """The first 50 runs after a rest, none thrown away: what a person who opens the application meets."""
    call(0)  # opened and compiled, as the application would be
    time.sleep(plan.rest)
    samples = _timed(call, range(BURST))
    tick(1.0)
    early, late = (float(np.median(part)) for part in (samples[:5], samples[-25:]))
    return Run(samples=samples, figures={"rest_seconds": plan.rest, "first_ns": int(samples[0]), "first_over_later": float(samples[0]) / late, "early_over_later": early / late})


def _sustained(call: Timed, plan: ModePlan, tick: Callable[[float], None], meter: Meter) -> Run:
    """Back to back for a minute or longer; the first and the last tenth side by side tell of throttling."""
    kept: list[int] = []
    with quiet_collector():
        for turn in range(3):
            call(turn)
        before, processor = meter.read(), time.process_time()
        started = time.perf_counter()
        while (elapsed := time.perf_counter() - started) < plan.sustained or len(kept) < 10:
            kept.append(_once(call, len(kept)))
            if len(kept) % 256 == 0:
                gc.collect()
                tick(min(1.0, elapsed / plan.sustained))
        used = time.process_time() - processor
        joules = meter.since(before)
    samples = np.asarray(kept, np.int64)
    tenth = max(1, len(samples) // 10)
    first, last = float(np.median(samples[:tenth])), float(np.median(samples[-tenth:]))
    figures: dict[str, Any] = {
        "seconds": elapsed,
        "per_second": len(samples) / elapsed,
        "last_over_first_tenth": last / first,
        "cores_busy": used / elapsed,
        "energy": {"source": meter.name, "joules": joules, "joules_per_1000": None if joules is None else joules / len(samples) * 1000, "reason": meter.reason},
    }
    return Run(samples=samples, figures=figures)


def _duty(call: Timed, plan: ModePlan, tick: Callable[[float], None]) -> Run:
    """One query each period, asleep between: caches and clocks are what the rest of the machine left."""
    call(0)
    kept = []
    with quiet_collector():
        due = time.perf_counter() + plan.period
        for turn in range(plan.queries):
            time.sleep(max(0.0, due - time.perf_counter()))
            kept.append(_once(call, turn))
            due = max(due + plan.period, time.perf_counter())
            tick((turn + 1) / plan.queries)
    return Run(samples=np.asarray(kept, np.int64), figures={"period_seconds": plan.period})


def _timed(call: Timed, turns: Sequence[int]) -> Nanoseconds:
    with quiet_collector():
        return np.asarray([_once(call, turn) for turn in turns], np.int64)


def _once(call: Timed, turn: int) -> int:
    before = time.perf_counter_ns()
    call(turn)
    return time.perf_counter_ns() - before
