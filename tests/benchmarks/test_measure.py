"""The measurement core against distributions whose truth is known, and against the clock."""

from __future__ import annotations

import gc
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.measure import MeasureError, Plan, interleave, measure, summarise
from benchmarks.ratios import aa_report, aa_test, block_length, compare, compare_unpaired, gate, judge


def autoregressive(rng: np.random.Generator, n: int, rho: float) -> np.ndarray:
    """A unit-variance series in which each value resembles the one before."""
    noise = rng.standard_normal(n)
    series = np.empty(n)
    series[0] = noise[0]
    for i in range(1, n):
        series[i] = rho * series[i - 1] + np.sqrt(1 - rho**2) * noise[i]
    return series


def simulated_pair(rng: np.random.Generator, n: int, ratio: float, shared: float, own: float) -> tuple[np.ndarray, np.ndarray]:
    """Times as a laptop gives them: a slow wander shared by both (`shared`), own noise that lingers (`own`), and 5 % spikes of 1x to 5x."""
    wander = np.exp(0.05 * autoregressive(rng, n, shared))

    def one(scale: float) -> np.ndarray:
        spikes = np.where(rng.random(n) < 0.05, 1 + rng.exponential(1, n), 1)
        return (5e6 * scale * wander * np.exp(0.03 * autoregressive(rng, n, own)) * spikes).astype(np.int64)

    return one(1.0), one(ratio)


@pytest.mark.parametrize(("shared", "own"), [(0.0, 0.0), (0.95, 0.0), (0.5, 0.5)])
def test_interval_covers_the_truth_about_as_often_as_it_says(shared: float, own: float) -> None:
    rng = np.random.default_rng(7)
    runs, covered = 150, 0
    for run in range(runs):
        first, second = simulated_pair(rng, 150, 1.03, shared, own)
        ratio = compare(first, second, resamples=800, seed=run)
        covered += ratio.low <= 1.03 <= ratio.high
    # nominal is 0.99; 150 runs cannot tell 0.99 from 0.965, but they can tell it from the 0.92 of naive single samples
    assert covered / runs >= 0.965


def test_pretending_independence_would_be_too_narrow() -> None:
    """The reason for blocks, shown: with lingering noise, resampling single pairs covers far less than its nominal 99 %."""
    rng = np.random.default_rng(3)
    naive = honest = 0
    for run in range(80):
        first, second = ((5e6 * np.exp(0.04 * autoregressive(rng, 200, 0.8))).astype(np.int64) for _ in "ab")
        ratio = compare(first, second, resamples=600, seed=run)
        honest += ratio.low <= 1 <= ratio.high
        rows = rng.integers(0, 200, size=(600, 200))
        low, high = np.quantile(np.median((second / first)[rows], axis=1), [0.005, 0.995])
        naive += low <= 1 <= high
    assert naive <= 0.85 * 80
    assert honest >= 0.92 * 80


def test_nothing_is_called_between_equals() -> None:
    rng = np.random.default_rng(11)
    ratios = []
    for run in range(200):
        first, second = simulated_pair(rng, 120, 1.0, 0.9, 0.3)
        ratios.append(compare(first, second, resamples=500, seed=run))
    report = aa_report(ratios)
    assert report.runs == 200
    assert report.rate <= 0.01
    assert 0 < report.widest < 0.05


def test_five_percent_are_found_in_both_directions() -> None:
    rng = np.random.default_rng(5)
    for run in range(20):
        first, second = simulated_pair(rng, 400, 1.05, 0.9, 0.0)
        slower, faster = compare(first, second, seed=run), compare(second, first, seed=run)
        assert (slower.verdict, faster.verdict) == ("slower", "faster")
        assert slower.resolved
        assert faster.resolved
        assert slower.value == pytest.approx(1.05, abs=0.015)


def test_shared_noise_cancels_in_pairs() -> None:
    """A machine that wanders by 20 % still resolves 3 %, because both members of a pair wander together."""
    rng = np.random.default_rng(2)
    wander = np.exp(0.2 * autoregressive(rng, 600, 0.999))
    first, second = ((5e6 * scale * wander * np.exp(0.005 * rng.standard_normal(600))).astype(np.int64) for scale in (1.0, 1.03))
    assert summarise(first).mad / summarise(first).p50 > 0.02
    assert compare(first, second).verdict == "slower"


def test_no_difference_says_whether_it_is_resolved() -> None:
    rng = np.random.default_rng(0)
    tight = [(1e6 * (1 + 0.002 * rng.standard_normal(300))).astype(np.int64) for _ in "ab"]
    wide = [(1e6 * (1 + 0.2 * rng.random(20))).astype(np.int64) for _ in "ab"]
    assert (compare(*tight).verdict, compare(*tight).resolved) == ("no difference", True)
    assert (compare(*wide).verdict, compare(*wide).resolved) == ("no difference", False)
    assert "equal within ±1%" in compare(*tight).sentence("int8", "fp32")
    assert "not resolved at ±1%" in compare(*wide).sentence()


def test_two_percent_with_a_wide_interval_is_not_called() -> None:
    assert judge(0.985, 1.055) == "no difference"
    assert judge(1.005, 1.055) == "no difference"  # above 1, but not above 1 %
    assert judge(1.011, 1.055) == "slower"
    assert judge(0.90, 0.989) == "faster"


def test_block_length_follows_the_dependence() -> None:
    rng = np.random.default_rng(4)
    independent = block_length(rng.random(400))
    dependent = block_length(autoregressive(rng, 400, 0.95))
    assert independent <= 12
    assert dependent > 2 * independent
    assert block_length(np.full(50, 5.0)) >= 1


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 10**9), min_size=10, max_size=60), st.integers(1, 5))
def test_the_interval_holds_the_ratio_and_scales(times: list[int], factor: int) -> None:
    first = np.array(times)
    ratio = compare(first, first * factor, resamples=200)
    assert ratio.value == pytest.approx(factor)
    assert ratio.low <= ratio.value <= ratio.high


def test_same_seed_same_interval() -> None:
    rng = np.random.default_rng(9)
    first, second = simulated_pair(rng, 100, 1.0, 0.5, 0.5)
    assert compare(first, second, seed=1) == compare(first, second, seed=1)
    assert compare(first, second, seed=1) != compare(first, second, seed=2)


def test_summary_of_known_numbers() -> None:
    summary = summarise(np.arange(1, 102) * 1000)
    assert (summary.n, summary.p50, summary.p90, summary.minimum, summary.maximum) == (101, 51_000, 91_000, 1000, 101_000)
    assert summary.mad == 25_000
    assert summary.drift > 4  # it grows all the way
    assert summary.as_dict()["p99"] == 100_000


def test_rounds_are_interleaved_in_changing_order_on_the_same_input() -> None:
    seen: list[tuple[str, int]] = []
    plan = Plan(warmup=2, min_samples=64, max_samples=64, few_samples=10, seconds=0.0)
    samples = interleave({"a": lambda i: seen.append(("a", i)), "b": lambda i: seen.append(("b", i))}, plan)
    assert {name: len(values) for name, values in samples.items()} == {"a": 64, "b": 64}
    assert samples["a"].dtype == np.int64
    kept = seen[4:]
    rounds = [kept[i : i + 2] for i in range(0, 128, 2)]
    assert all({name for name, _ in pair} == {"a", "b"} and pair[0][1] == pair[1][1] == i for i, pair in enumerate(rounds))
    firsts = [pair[0][0] for pair in rounds]
    assert 16 < firsts.count("a") < 48
    again: list[tuple[str, int]] = []
    interleave({"a": lambda i: again.append(("a", i)), "b": lambda i: again.append(("b", i))}, plan)
    assert again == seen  # the order is seeded


def test_a_real_difference_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter_ns", time.thread_time_ns)  # real work on a clock that neighbours on the core do not stretch

    def spin(milliseconds: float) -> None:
        end = time.thread_time() + milliseconds / 1000
        while time.thread_time() < end:
            pass

    plan = Plan(warmup=1, min_samples=40, max_samples=40, seconds=0.0)
    samples = interleave({"short": lambda i: spin(1.0), "long": lambda i: spin(2.0)}, plan)
    ratio = compare(samples["short"], samples["long"])
    assert ratio.verdict == "slower"
    assert ratio.value == pytest.approx(2.0, rel=0.2)


def test_a_function_against_itself() -> None:
    work = np.random.default_rng(0).random(20_000)
    report = aa_test(lambda i: np.sort(work), Plan(warmup=2, min_samples=30, max_samples=30, seconds=0.0), runs=5)
    assert report.runs == 5
    assert len(report.ratios) == 5
    assert report.rate == report.false_positives / 5


def test_plans_end_by_samples_then_seconds_then_patience() -> None:
    plan = Plan(min_samples=50, max_samples=200, few_samples=10, seconds=5, max_seconds=20)
    assert not plan.done(49, 19.0)
    assert not plan.done(50, 4.9)
    assert plan.done(50, 5.0)
    assert plan.done(200, 0.1)
    assert plan.done(10, 20.0)
    assert not plan.done(9, 20.0)


def test_garbage_collection_is_off_while_timing_and_back_on_after_a_failure() -> None:
    states: list[bool] = []
    measure(lambda i: states.append(gc.isenabled()), Plan(warmup=0, min_samples=10, max_samples=10, seconds=0))
    assert not any(states)
    assert gc.isenabled()

    def broken(i: int) -> None:
        raise RuntimeError("inference failed")

    with pytest.raises(RuntimeError, match="inference failed"):
        measure(broken, Plan())
    assert gc.isenabled()


@pytest.mark.parametrize(
    "settings_",
    [
        {"warmup": -1},
        {"min_samples": 0},
        {"max_samples": 10},
        {"seconds": float("nan")},
        {"seconds": 9.0, "max_seconds": 1.0},
        {"few_samples": 60},
    ],
)
def test_impossible_plans_are_refused(settings_: dict[str, float]) -> None:
    with pytest.raises(MeasureError):
        Plan(**settings_)  # type: ignore[arg-type]


def test_bad_samples_are_refused() -> None:
    good = np.full(20, 1000)
    with pytest.raises(MeasureError, match="in pairs"):
        compare(good, good[:-1])
    with pytest.raises(MeasureError, match="at least 10 pairs"):
        compare(good[:9], good[:9])
    with pytest.raises(MeasureError, match="positive"):
        summarise(np.array([1, 0, 3]))
    with pytest.raises(MeasureError, match="list of times"):
        summarise(np.array([]))
    with pytest.raises(MeasureError, match="level"):
        compare(good, good, level=99)
    with pytest.raises(MeasureError, match="nothing to measure"):
        interleave({}, Plan())
    with pytest.raises(MeasureError, match="at least one run"):
        aa_test(lambda i: None, Plan(), runs=0)


def test_unpaired_runs_widen_by_what_differs_between_them() -> None:
    """Runs that each sit 3 % higher or lower than the next: three of them a side know that, one does not, and both are honest about what they speak of."""
    rng = np.random.default_rng(8)
    called = {1: 0, 5: 0}
    for trial in range(60):
        runs = [[(5e6 * np.exp(0.02 * rng.standard_normal() + 0.01 * rng.standard_normal(200))).astype(np.int64) for _ in range(5)] for _ in "ab"]
        for count in called:
            ratio = compare_unpaired(runs[0][:count], runs[1][:count], resamples=500, seed=trial)
            assert not ratio.paired
            assert "unpaired" in ratio.sentence()
            called[count] += ratio.verdict != "no difference"
    assert called[5] <= 3
    assert called[1] > 20


def test_unpaired_finds_a_large_difference_and_its_size() -> None:
    rng = np.random.default_rng(4)
    first, second = ([(scale * 5e6 * np.exp(0.03 * autoregressive(rng, 300, 0.5))).astype(np.int64) for _ in range(4)] for scale in (1.0, 1.1))
    ratio = compare_unpaired(first, second)
    assert ratio.verdict == "slower"
    assert ratio.value == pytest.approx(1.1, abs=0.01)
    assert ratio.low < 1.1 < ratio.high
    assert compare_unpaired(first[:1], second[:1]).verdict == "slower"
    with pytest.raises(MeasureError, match="at least 10 samples"):
        compare_unpaired([first[0][:9]], second)


def test_the_gate_passes_fails_or_says_that_it_cannot_tell() -> None:
    rng = np.random.default_rng(6)

    def ratio_of(scale: float, noise: float, n: int) -> object:
        pair = [(5e6 * factor * np.exp(noise * rng.standard_normal(n))).astype(np.int64) for factor in (1.0, scale)]
        return compare(*pair)

    assert gate(ratio_of(1.0, 0.01, 400), 1.05)[0] == "pass"
    assert gate(ratio_of(1.03, 0.01, 400), 1.05)[0] == "pass"  # slower, but within what is let through
    assert gate(ratio_of(1.10, 0.01, 400), 1.05)[0] == "fail"
    verdict, why = gate(ratio_of(1.05, 0.3, 40), 1.05)
    assert verdict == "undecided"
    assert "measure for longer" in why
    with pytest.raises(MeasureError, match="--gate"):
        gate(ratio_of(1.0, 0.01, 20), 0.5)


def test_a_clock_that_stands_still_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter_ns", lambda: 5)
    with pytest.raises(MeasureError, match="the clock"):
        interleave({"f": lambda i: None}, Plan(warmup=0, min_samples=10, max_samples=10, seconds=0))


def test_what_differs_between_openings_is_not_called() -> None:
    """Each opening puts one side a few percent ahead or behind, as the place of weights in memory does."""
    rng = np.random.default_rng(12)
    covered = known = found = 0
    for trial in range(100):
        parts: list[list[np.ndarray]] = [[], []]
        for _ in range(12):
            for part in parts:
                part.append(5e6 * np.exp(0.015 * rng.standard_normal() + 0.01 * rng.standard_normal(40)))
        first, second = (np.concatenate(part).astype(np.int64) for part in parts)
        pairs, openings = (compare(first, second, groups=groups, resamples=300, seed=trial) for groups in (None, [40] * 12))
        assert openings.low <= pairs.low <= pairs.high <= openings.high
        covered += openings.low <= 1 <= openings.high
        known += openings.verdict != "no difference"
        found += compare(first, (second * 1.1).astype(np.int64), groups=[40] * 12, resamples=300, seed=trial).verdict == "slower"
    assert covered >= 96
    assert known <= 1
    assert found >= 95
    with pytest.raises(MeasureError, match="openings"):
        compare(first, second, groups=[40] * 5)
