"""The measurement core: how two pieces of code are timed and when one is called faster.

Rules (one place, used by every speed claim of the project):

* the candidates run in one process, interleaved, in random order within each round, on the same inputs;
* warm-up rounds are thrown away; every later sample is kept, in nanoseconds, and none is dropped as an outlier;
* a ratio of medians is quoted with a 99 % interval; a difference is *called* only when the whole interval lies outside ±1 %.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ClipError

Nanoseconds = NDArray[np.int64]
Timed = Callable[[int], object]
"""A timed function takes the round number, so that all candidates of a round can use the same input."""


class MeasureError(ClipError):
    """A measurement was asked for that cannot be made or judged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """When a measurement ends.

    It ends as soon as `max_samples` rounds are kept, or `min_samples` rounds are kept and `seconds` have passed, or, for slow functions,
    `max_seconds` have passed and at least `few_samples` rounds are kept.
    """

    warmup: int = 5
    min_samples: int = 50
    max_samples: int = 2000
    few_samples: int = 10
    seconds: float = 5.0
    max_seconds: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.min_samples < 1 or self.few_samples < 1:
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

    `mad` is the median absolute deviation from the median (not scaled). `drift` is the median of the last third over the median of the first
    third: far from 1 it says that the machine throttled, or was busy, while measuring.
    """

    n: int
    p50: float
    p90: float
    p99: float
    mean: float
    mad: float
    minimum: float
    maximum: float
    drift: float

    def as_dict(self) -> dict[str, float]:
        """Plain numbers for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """Median time of the candidate over median time of the reference: below 1 the candidate is faster.

    `verdict` is "faster", "slower" or "no difference" (of the candidate). "No difference" has two causes, told apart by `resolved`: True when
    the whole interval lies within the margin (they are equal for every purpose), False when the samples are too few or too noisy to tell.
    """

    value: float
    low: float
    high: float
    level: float
    margin: float
    verdict: str
    resolved: bool
    n: int
    block: int

    def as_dict(self) -> dict[str, float | str | bool]:
        """Plain values for JSON."""
        return asdict(self)

    def sentence(self, candidate: str = "the candidate", reference: str = "the reference") -> str:
        """One line for a person."""
        figures = f"ratio {self.value:.3f}, {self.level:.0%} interval {self.low:.3f} to {self.high:.3f}, {self.n} pairs"
        if self.verdict != "no difference":
            return f"{candidate} is {self.verdict} than {reference} ({figures})"
        why = "equal within" if self.resolved else "not resolved at"
        return f"no difference between {candidate} and {reference}: {why} ±{self.margin:.0%} ({figures})"


def measure(function: Timed, plan: Plan) -> Nanoseconds:
    """Time one function alone: int64 nanoseconds, in order."""
    return interleave({"only": function}, plan)["only"]


def interleave(functions: Mapping[str, Timed], plan: Plan, on_round: Callable[[int, float], None] | None = None) -> dict[str, Nanoseconds]:
    """Time all functions in rounds; sample i of every function comes from round i.

    Within a round the order is drawn anew (seeded), so that neither "first" nor "after the other one" becomes an advantage, and slow changes of
    the machine (clock, heat, neighbours) hit all of them alike. The garbage collector runs between rounds, never inside one.
    Raises MeasureError without functions; exceptions of a function pass through.
    """
    if not functions:
        raise MeasureError("nothing to measure: no function was given")
    names = list(functions)
    calls = [functions[name] for name in names]
    rng = np.random.default_rng(plan.seed)
    kept: list[list[int]] = [[] for _ in names]
    clock = time.perf_counter_ns
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for warm in range(plan.warmup):
            for call in calls:
                call(warm)
        started = time.perf_counter()
        turn = 0
        while not plan.done(turn, time.perf_counter() - started):
            for index in rng.permutation(len(calls)):
                call = calls[index]
                before = clock()
                call(turn)
                kept[index].append(clock() - before)
            turn += 1
            if turn % 256 == 0:
                gc.collect()
            if on_round is not None:
                on_round(turn, time.perf_counter() - started)
    finally:
        if collecting:
            gc.enable()
    return {name: np.asarray(values, dtype=np.int64) for name, values in zip(names, kept, strict=True)}


def summarise(samples: Nanoseconds) -> Summary:
    """The figures of one phase. Raises MeasureError for no samples or a sample that is not positive and finite."""
    values = _checked(samples)
    third = max(1, len(values) // 3)
    median = float(np.median(values))
    p50, p90, p99 = (float(x) for x in np.percentile(values, [50, 90, 99]))
    return Summary(
        n=len(values),
        p50=p50,
        p90=p90,
        p99=p99,
        mean=float(values.mean()),
        mad=float(np.median(np.abs(values - median))),
        minimum=float(values.min()),
        maximum=float(values.max()),
        drift=float(np.median(values[-third:]) / np.median(values[:third])),
    )


def compare(reference: Nanoseconds, candidate: Nanoseconds, *, level: float = 0.99, margin: float = 0.01, resamples: int = 4000, seed: int = 0) -> Ratio:
    """Ratio of medians (candidate over reference) of interleaved samples, with a bootstrap interval and the verdict.

    Why pairs and blocks are resampled, not single samples: a slow second hits both members of a pair, so drawing them apart would count that
    shared noise twice; and neighbouring pairs resemble each other (clock changes, heat, other tenants last longer than one sample), so drawing
    single pairs would pretend to more independent evidence than there is and give intervals that are too narrow. Circular blocks of consecutive
    pairs keep both. Their length follows the autocorrelation that is found (`block_length`). With few blocks the plain percentile interval is too
    narrow (a spread estimated from twelve things is itself uncertain), so it is widened around the estimate by Student's t over the normal
    quantile for that number of blocks; in the simulations of the tests this restores most of the nominal coverage.

    Raises MeasureError for unequal lengths or fewer than 10 pairs.
    """
    first, second = _checked(reference), _checked(candidate)
    if len(first) != len(second):
        raise MeasureError(f"interleaved samples come in pairs; found {len(first)} of the reference and {len(second)} of the candidate")
    n = len(first)
    if n < 10:
        raise MeasureError(f"a ratio needs at least 10 pairs, found {n}; measure for longer")
    if not 0.5 < level < 1:
        raise MeasureError(f"the level of an interval lies between 0.5 and 1, found {level}")
    block = block_length(first, second)
    rng = np.random.default_rng(seed)
    blocks = math.ceil(n / block)
    ratios = np.empty(resamples)
    step = max(1, 2_000_000 // n)  # bounds the memory of one batch of resamples to about 50 MB
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        starts = rng.integers(0, n, size=(count, blocks, 1))
        rows = ((starts + np.arange(block)) % n).reshape(count, -1)[:, :n]
        ratios[start : start + count] = np.median(second[rows], axis=1) / np.median(first[rows], axis=1)
    tail = (1 - level) / 2
    low, high = (float(x) for x in np.quantile(ratios, [tail, 1 - tail]))
    value = float(np.median(second) / np.median(first))
    widen = _student_over_normal(1 - tail, max(1, n // block - 1))
    low, high = min(value, value * (low / value) ** widen), max(value, value * (high / value) ** widen)
    verdict = judge(low, high, margin)
    resolved = verdict != "no difference" or (low >= 1 - margin and high <= 1 + margin)
    return Ratio(value=value, low=low, high=high, level=level, margin=margin, verdict=verdict, resolved=resolved, n=n, block=block)


def judge(low: float, high: float, margin: float = 0.01) -> str:
    """The rule itself: a difference is called when the whole interval of the ratio lies outside ±margin."""
    if high < 1 - margin:
        return "faster"
    if low > 1 + margin:
        return "slower"
    return "no difference"


def block_length(first: Nanoseconds, second: Nanoseconds) -> int:
    """Length of the blocks for the circular bootstrap of a ratio of medians (Politis and White 2004, as corrected in 2009).

    A median moves by the *sign* of each sample's deviation, not by its size, so the dependence that matters is that of the signs: one wild
    sample of 100 ms does not decide the length. At least n^(1/3), at most n/5.
    """
    series = np.sign(second - np.median(second)) - np.sign(first - np.median(first))
    n = len(series)
    floor, ceiling = max(1, round(n ** (1 / 3))), max(1, n // 5)
    series = series - series.mean()
    variance = float(series @ series) / n
    if variance == 0:
        return min(floor, ceiling)
    lags = min(n - 1, int(math.ceil(math.sqrt(n))) + 5)
    covariance = np.array([float(series[: n - lag] @ series[lag:]) / n for lag in range(lags + 1)])
    correlation = covariance / variance
    run = max(5, int(math.ceil(math.sqrt(math.log10(n)))))
    quiet = 2 * math.sqrt(math.log10(n) / n)
    last = lags
    for lag in range(1, lags + 1):
        if np.all(np.abs(correlation[lag : lag + run]) < quiet):
            last = lag - 1
            break
    width = min(2 * max(last, 1), lags)
    index = np.arange(1, width + 1)
    window = np.where(index / width <= 0.5, 1.0, 2 * (1 - index / width))  # the flat-top kernel
    spectrum = covariance[0] + 2 * float(window @ covariance[1 : width + 1])
    slope = 2 * float((window * index) @ covariance[1 : width + 1])
    if spectrum <= 0 or last == 0:
        return min(floor, ceiling)
    optimal = (2 * slope**2 / (4 / 3 * spectrum**2)) ** (1 / 3) * n ** (1 / 3)
    return int(min(max(floor, math.ceil(optimal)), ceiling))


@dataclass(frozen=True, kw_only=True, slots=True)
class AaReport:
    """What the verdict says of a function against itself; every called difference is false."""

    runs: int
    false_positives: int
    rate: float
    widest: float
    ratios: tuple[Ratio, ...]


def aa_test(function: Timed, plan: Plan, runs: int = 20) -> AaReport:
    """Measure a function against itself `runs` times and count how often a difference is called.

    `widest` is the largest |ratio - 1| seen: differences below it are not to be believed on this machine today.
    """
    if runs < 1:
        raise MeasureError(f"an A/A test needs at least one run, found {runs}")
    ratios = []
    for run in range(runs):
        now = Plan(**{**asdict(plan), "seed": plan.seed + run})
        samples = interleave({"a": function, "b": function}, now)
        ratios.append(compare(samples["a"], samples["b"], seed=now.seed))
    return aa_report(ratios)


def aa_report(ratios: list[Ratio]) -> AaReport:
    """Count the verdicts of A/A comparisons."""
    wrong = sum(ratio.verdict != "no difference" for ratio in ratios)
    widest = max(abs(ratio.value - 1) for ratio in ratios)
    return AaReport(runs=len(ratios), false_positives=wrong, rate=wrong / len(ratios), widest=widest, ratios=tuple(ratios))


def _student_over_normal(probability: float, freedom: int) -> float:
    """Student's t quantile over the normal one, by the Cornish-Fisher expansion (within 2 % from 4 degrees of freedom on, as `compare` uses it)."""
    z = statistics.NormalDist().inv_cdf(probability)
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2) + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return t / z


def _checked(samples: Nanoseconds) -> NDArray[np.float64]:
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise MeasureError(f"samples are a list of times; found the shape {values.shape}")
    if not np.all(np.isfinite(values)) or values.min() <= 0:
        raise MeasureError(f"every sample must be a positive time in nanoseconds; found {values.min()} to {values.max()}")
    return values
