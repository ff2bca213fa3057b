"""When one of two measured things is called faster: the ratio of medians, its interval, the verdict, and the gate of a regression test.

Paired (both measured in the same rounds) where that was possible; two finished measurements are compared unpaired, which says less, and says so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from .measure import MeasureError, Nanoseconds, Plan, Timed, checked, interleave


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """Time of the candidate over time of the reference: below 1 the candidate is faster. Paired, the median over rounds of the ratio in each round;
    unpaired, the ratio of the two medians.

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
    paired: bool = True

    def as_dict(self) -> dict[str, float | str | bool]:
        """Plain values for JSON."""
        return asdict(self)

    def sentence(self, candidate: str = "the candidate", reference: str = "the reference") -> str:
        """One line for a person."""
        figures = f"ratio {self.value:.3f}, {self.level:.0%} interval {self.low:.3f} to {self.high:.3f}, {self.n} {'pairs' if self.paired else 'samples a side, unpaired'}"
        if self.verdict != "no difference":
            return f"{candidate} is {self.verdict} than {reference} ({figures})"
        why = "equal within" if self.resolved else "not resolved at"
        return f"no significant difference between {candidate} and {reference}: {why} ±{self.margin:.0%} ({figures})"


def compare(
    reference: Nanoseconds,
    candidate: Nanoseconds,
    *,
    groups: Sequence[int] | None = None,
    level: float = 0.99,
    margin: float = 0.01,
    resamples: int = 4000,
    seed: int = 0,
) -> Ratio:
    """Median over rounds of candidate over reference, with a bootstrap interval and the verdict.

    Why the ratio is taken round by round: both members of a round meet the same clock, heat and neighbours, and what they share cancels in their
    ratio before any median is taken. On recorded traces of a machine with twice as much work as cores this estimate is off by a third of what the
    ratio of the two medians is, and on a calm machine by as much. Why blocks are resampled, not single rounds: neighbouring rounds resemble each
    other, so drawing them one by one would pretend to more independent evidence than there is and give intervals that are too narrow. Circular
    blocks of consecutive rounds keep it, as long as the autocorrelation that is found asks for (`block_length`). With few blocks the plain
    percentile interval is too narrow (a spread estimated from twelve things is itself uncertain), so it is widened around the estimate by
    Student's t over the normal quantile for that number of blocks; in the simulations of the tests this restores most of the nominal coverage.

    Args:
        groups: number of pairs of each opening (both sides opened anew), in order. What differs between openings, such as where weights lie in
            memory, then widens the interval, by Student's t over the openings' own ratios, where that is more than the pairs alone say.

    Raises MeasureError for unequal lengths or fewer than 10 pairs.
    """
    first, second = checked(reference), checked(candidate)
    if len(first) != len(second):
        raise MeasureError(f"interleaved samples come in pairs; found {len(first)} of the reference and {len(second)} of the candidate")
    n = len(first)
    if n < 10:
        raise MeasureError(f"a ratio needs at least 10 pairs, found {n}; measure for longer")
    if not 0.5 < level < 1:
        raise MeasureError(f"the level of an interval lies between 0.5 and 1, found {level}")
    logs = np.log(second / first)
    block = block_length(logs)
    tail = (1 - level) / 2
    drawn = np.exp(_medians(logs, block, resamples, np.random.default_rng(seed)))
    low, high = (float(x) for x in np.quantile(drawn, [tail, 1 - tail]))
    value = math.exp(float(np.median(logs)))
    error = math.log(high / low) / 2 / statistics.NormalDist().inv_cdf(1 - tail)
    widen = _student_over_normal(1 - tail, max(1, n // block - 1))
    low, high = min(value, value * (low / value) ** widen), max(value, value * (high / value) ** widen)
    if groups is not None and len(groups) > 1:
        reach = math.exp(_between(logs, groups, 1 - tail, error))
        low, high = min(low, value / reach), max(high, value * reach)
    verdict = judge(low, high, margin)
    resolved = verdict != "no difference" or (low >= 1 - margin and high <= 1 + margin)
    return Ratio(value=value, low=low, high=high, level=level, margin=margin, verdict=verdict, resolved=resolved, n=n, block=block)


def _between(logs: np.ndarray, groups: Sequence[int], probability: float, error: float) -> float:
    """Half of the interval of the openings' trimmed mean log ratio (Yuen); 0 when they differ no more than their own rounds explain.

    A fifth at either end is trimmed: an opening that met a storm has a wild ratio, which the rounds' own interval knows of; what this one is for is
    what every opening has a little of. `error` is the standard error that the rounds give. Openings have to show half as much variance again: with
    a dozen of them chance alone does so one time in eight, and what goes unnoticed below that is less than the margin.
    """
    if sum(groups) != len(logs) or min(groups) < 1:
        raise MeasureError(f"the openings hold {sum(groups)} pairs, the samples {len(logs)}")
    own = np.sort([np.median(part) for part in np.split(logs, np.cumsum(groups)[:-1])])
    count = len(own)
    cut = count // 5
    spread = float(np.clip(own, own[cut], own[count - 1 - cut]).std(ddof=1)) / ((1 - 2 * cut / count) * math.sqrt(count))
    if spread**2 <= 1.5 * error**2:
        return 0.0
    return spread * _student_over_normal(probability, max(1, count - 2 * cut - 1)) * statistics.NormalDist().inv_cdf(probability)


def compare_unpaired(
    reference: Sequence[Nanoseconds], candidate: Sequence[Nanoseconds], *, level: float = 0.99, margin: float = 0.01, resamples: int = 4000, seed: int = 0
) -> Ratio:
    """Ratio of medians of two measurements that were made apart. `reference` and `candidate` are lists of runs of the same measurement.

    Nothing is shared, so each side is resampled by itself, in circular blocks. With three runs or more on both sides, runs are resampled first:
    what differs from one sitting to the next (clock, heat, where memory lies) then widens the interval. With fewer that part cannot be seen, and
    an interval of one run a side speaks of these two sittings only.

    Raises MeasureError for fewer than 10 samples in a run.
    """
    sides = [[checked(run) for run in runs] for runs in (reference, candidate)]
    shortest = min((len(run) for runs in sides for run in runs), default=0)
    if shortest < 10:
        raise MeasureError(f"a ratio needs at least 10 samples of each side, found {shortest}; measure for longer")
    rng = np.random.default_rng(seed)
    several = min(len(runs) for runs in sides) >= 3
    lengths = [[block_length(run) for run in runs] for runs in sides]
    drawn = np.empty((2, resamples))
    for side, runs in enumerate(sides):
        medians = np.stack([_medians(run, block, resamples, rng) for run, block in zip(runs, lengths[side], strict=True)])
        if several:
            picked = rng.integers(0, len(runs), (len(runs), resamples))
            medians = medians[picked, np.arange(resamples)]
        drawn[side] = np.exp(np.log(medians).mean(axis=0))
    base, other = (math.exp(float(np.mean([math.log(np.median(run)) for run in runs]))) for runs in sides)
    tail = (1 - level) / 2
    low, high = (float(x) for x in np.quantile(drawn[1] / drawn[0], [tail, 1 - tail]))
    value = other / base
    blocks = min(len(run) // block for runs, found in zip(sides, lengths, strict=True) for run, block in zip(runs, found, strict=True))
    freedom = min(len(runs) for runs in sides) - 1 if several else max(1, blocks - 1)
    widen = _student_over_normal(1 - tail, freedom)
    if several:  # a spread estimated from n runs by the bootstrap is too small by sqrt((n - 1) / n)
        widen *= math.sqrt((freedom + 1) / freedom)
    low, high = min(value, value * (low / value) ** widen), max(value, value * (high / value) ** widen)
    verdict = judge(low, high, margin)
    resolved = verdict != "no difference" or (low >= 1 - margin and high <= 1 + margin)
    count = min(sum(map(len, runs)) for runs in sides)
    block = max(max(found) for found in lengths)
    return Ratio(value=value, low=low, high=high, level=level, margin=margin, verdict=verdict, resolved=resolved, n=count, block=block, paired=False)


def _medians(values: np.ndarray, block: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Medians of circular block resamples of one series."""
    n = len(values)
    blocks, step = math.ceil(n / block), max(1, 2_000_000 // n)
    found = np.empty(resamples)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        rows = ((rng.integers(0, n, size=(count, blocks, 1)) + np.arange(block)) % n).reshape(count, -1)[:, :n]
        found[start : start + count] = np.median(values[rows], axis=1)
    return found


def gate(ratio: Ratio, most: float) -> tuple[str, str]:
    """The verdict of a regression test that lets a candidate take up to `most` times the reference: ("pass" | "fail" | "undecided", why).

    It fails only for a slowdown that is called (the whole interval beyond the margin) and whose estimate exceeds `most`; it passes when the whole
    interval lies below `most`. Between the two the noise decides nothing, and "undecided" says so: measure for longer, or on a quieter machine.
    """
    if not 1 <= most < 10:
        raise MeasureError(f"--gate is {most}, expected the largest ratio that passes, from 1 to 10, such as 1.05")
    span = f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
    if ratio.verdict == "slower" and ratio.value > most:
        return "fail", f"the ratio {span} is above {most:g}"
    if ratio.high <= most:
        return "pass", f"the ratio {span} is below {most:g}"
    return "undecided", f"the ratio {span} may lie on either side of {most:g}; measure for longer (--seconds)"


def judge(low: float, high: float, margin: float = 0.01) -> str:
    """The rule itself: a difference is called when the whole interval of the ratio lies outside ±margin."""
    if high < 1 - margin:
        return "faster"
    if low > 1 + margin:
        return "slower"
    return "no difference"


def block_length(values: np.ndarray) -> int:
    """Length of the blocks for the circular bootstrap of a median (Politis and White 2004, as corrected in 2009).

    A median moves by the *sign* of each sample's deviation, not by its size, so the dependence that matters is that of the signs: one wild
    sample of 100 ms does not decide the length. At least n^(1/3), at most n/5.
    """
    series = np.sign(values - np.median(values))
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
