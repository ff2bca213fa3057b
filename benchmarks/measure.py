"""The measurement core: how pieces of code are timed. When one of two is called faster is decided in `ratios`.

Rules (one place, used by every speed claim of the project):

* the candidates run in one process, interleaved, in random order within each round, on the same inputs;
* warm-up lasts until it has converged and is thrown away; every later sample is kept, in nanoseconds, and none is dropped as an outlier;
* what the samples cannot carry (too few, drifting, restless, dependent) makes them invalid, with the reason.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ClipError

from .sample_statistics import dependence, drift, early_stopping_bound, reasons

Nanoseconds = NDArray[np.int64]
Timed = Callable[[int], object]
"""A timed function takes the round number, so that all candidates of a round can use the same input."""


class Elapsed(int):
    """Nanoseconds by a clock nearer to the work than this process's (a page's own, say): a timed function that returns one is believed."""


class MeasureError(ClipError):
    """A measurement was asked for that cannot be made or judged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """When a measurement ends.

    It ends as soon as `max_samples` rounds are kept, or `min_samples` rounds are kept and `seconds` have passed, or, for slow functions,
    `max_seconds` have passed and at least `few_samples` rounds are kept. Before that, `warmup` rounds are thrown away, and up to `settle` more
    until two windows of five rounds have the same median within 2 % for every function. `own` untimed runs go before each timed one: with many
    candidates in one process, each then finds its own weights in the caches and its own threads awake, not its neighbours'.
    """

    warmup: int = 5
    settle: int = 0
    own: int = 0
    min_samples: int = 50
    max_samples: int = 2000
    few_samples: int = 10
    seconds: float = 5.0
    max_seconds: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.settle < 0 or self.own < 0 or self.min_samples < 1 or self.few_samples < 1:
            raise MeasureError(f"a plan needs warmup >= 0 and at least one sample; found {self}")
        if self.max_samples < self.min_samples or self.few_samples > self.min_samples:
            raise MeasureError(f"a plan needs few_samples <= min_samples <= max_samples; found {self.few_samples}, {self.min_samples}, {self.max_samples}")
        if not (math.isfinite(self.seconds) and self.seconds >= 0 and self.max_seconds >= self.seconds):
            raise MeasureError(f"a plan needs 0 <= seconds <= max_seconds; found {self.seconds} and {self.max_seconds}")

    def done(self, samples: int, elapsed: float) -> bool:
        """Whether `samples` kept rounds after `elapsed` seconds are enough."""
        if samples >= self.max_samples:
            return True
        if elapsed >= self.seconds and samples >= self.min_samples:
            return True
        return elapsed >= self.max_seconds and samples >= self.few_samples


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What a person reads of the samples; all times in nanoseconds.

    `std` is the sample standard deviation and `cv` that over the mean. `mad` is the median absolute deviation from the median (not scaled).
    `p90_bound` is MLPerf's early-stopping bound of the 90th percentile (99 % confidence; None below 64 samples). `drift` is the median of the
    last third over that of the first third and `drift_p` the significance of a trend: the machine throttled, or was busy, while measuring.
    `autocorrelation` is that of neighbouring samples (ranks) and `independent` the number of independent samples that these are worth.
    `valid` is False when `reason` says why the samples should not be quoted as a latency.
    """

    n: int
    p50: float
    p90: float
    p99: float
    mean: float
    std: float
    cv: float
    mad: float
    minimum: float
    maximum: float
    p90_bound: float | None
    drift: float
    drift_p: float
    autocorrelation: float
    independent: float
    valid: bool
    reason: str | None

    def as_dict(self) -> dict[str, float | bool | str | None]:
        """Plain numbers for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """What a measurement left. `cpu_ns` is processor time of this process, all its threads, over the kept rounds; `warmup` counts rounds thrown away."""

    samples: dict[str, Nanoseconds]
    cpu_ns: dict[str, int]
    first_ns: dict[str, int]
    warmup: int
    converged: bool
    suspended_seconds: float


def measure(function: Timed, plan: Plan) -> Nanoseconds:
    """Time one function alone: int64 nanoseconds, in order."""
    return interleave({"only": function}, plan)["only"]


def interleave(functions: Mapping[str, Timed], plan: Plan, on_round: Callable[[int, float], None] | None = None) -> dict[str, Nanoseconds]:
    """The samples of `take`."""
    return take(functions, plan, on_round).samples


def take(functions: Mapping[str, Timed], plan: Plan, on_round: Callable[[int, float], None] | None = None) -> Taken:
    """Time all functions in rounds; sample i of every function comes from round i.

    Within a round the order is drawn anew (seeded), so that neither "first" nor "after the other one" becomes an advantage, and slow changes of
    the machine (clock, heat, neighbours) hit all of them alike. The garbage collector runs between rounds, never inside one.
    Raises MeasureError without functions, or when the clock went back; exceptions of a function pass through.
    """
    if not functions:
        raise MeasureError("nothing to measure: no function was given")
    names = list(functions)
    calls = [functions[name] for name in names]
    rng = np.random.default_rng(plan.seed)
    kept: list[list[int]] = [[] for _ in names]
    used = [0] * len(names)
    clock, processor = time.perf_counter_ns, time.process_time_ns
    with quiet_collector():
        first, rounds, converged = _warm_up(calls, plan)
        asleep = _asleep()
        started = time.perf_counter()
        turn = 0
        while not plan.done(turn, time.perf_counter() - started):
            for index in rng.permutation(len(calls)):
                call = calls[index]
                for _ in range(plan.own):
                    call(turn)
                busy = processor()
                before = clock()
                result = call(turn)
                taken = clock() - before
                if isinstance(result, Elapsed):
                    taken = int(result)
                used[index] += processor() - busy
                kept[index].append(taken)
            turn += 1
            if turn % 256 == 0:
                gc.collect()
            if on_round is not None:
                on_round(turn, time.perf_counter() - started)
    samples = {name: np.asarray(values, dtype=np.int64) for name, values in zip(names, kept, strict=True)}
    if any(values.min() <= 0 for values in samples.values()):
        raise MeasureError("the clock stood still or went back while measuring; measure again")
    pairs = dict(zip(names, used, strict=True)), dict(zip(names, first, strict=True))
    return Taken(samples=samples, cpu_ns=pairs[0], first_ns=pairs[1], warmup=rounds, converged=converged, suspended_seconds=_asleep() - asleep)


@contextlib.contextmanager
def quiet_collector() -> Iterator[None]:
    """The garbage collector runs once and then stays off, until the block ends."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _warm_up(calls: Sequence[Timed], plan: Plan, window: int = 5, near: float = 0.02) -> tuple[list[int], int, bool]:
    """(first call of each in nanoseconds, rounds, whether all of them converged)."""
    seen: list[list[int]] = [[] for _ in calls]
    clock = time.perf_counter_ns
    started = time.perf_counter()
    turn, converged = 0, plan.settle == 0
    while turn < plan.warmup or (not converged and turn < plan.warmup + plan.settle and time.perf_counter() - started < max(plan.seconds, 1.0)):
        for index, call in enumerate(calls):
            before = clock()
            call(turn)
            seen[index].append(clock() - before)
        turn += 1
        if plan.settle and turn >= max(plan.warmup, 2 * window) and turn % window == 0:
            converged = all(abs(np.median(times[-window:]) / np.median(times[-2 * window : -window]) - 1) <= near for times in seen)
    return [times[0] if times else 0 for times in seen], turn, converged


def _asleep() -> float:
    """Seconds that this machine was suspended since it started; 0 where the system does not tell."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
    return 0.0


def summarise(samples: Nanoseconds, *, further: Sequence[str] = ()) -> Summary:
    """The figures of one phase. `further` are reasons against it that the samples do not show. Raises MeasureError for no samples or one that is not
    positive and finite."""
    values = checked(samples)
    median = float(np.median(values))
    p50, p90, p99 = (float(x) for x in np.percentile(values, [50, 90, 99]))
    share, trend = drift(values)
    lag, independent = dependence(values)
    bound = early_stopping_bound(values)
    against = [*further, *reasons(values, drift_share=share, drift_p=trend, independent=independent, bound=bound)]
    std = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return Summary(
        n=len(values),
        p50=p50,
        p90=p90,
        p99=p99,
        mean=float(values.mean()),
        std=std,
        cv=std / float(values.mean()),
        mad=float(np.median(np.abs(values - median))),
        minimum=float(values.min()),
        maximum=float(values.max()),
        p90_bound=bound,
        drift=share,
        drift_p=trend,
        autocorrelation=lag,
        independent=independent,
        valid=not against,
        reason="; ".join(against) or None,
    )


def checked(samples: Nanoseconds) -> NDArray[np.float64]:
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise MeasureError(f"samples are a list of times; found the shape {values.shape}")
    if not np.all(np.isfinite(values)) or values.min() <= 0:
        raise MeasureError(f"every sample must be a positive time in nanoseconds; found {values.min()} to {values.max()}")
    return values
