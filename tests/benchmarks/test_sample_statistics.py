"""What samples can carry: against MLPerf's own load generator, exact binomial sums, and series whose truth is known."""

from __future__ import annotations

import json
import time
from fractions import Fraction
from math import comb
from pathlib import Path

import numpy as np
import pytest

from benchmarks.measure import Plan, summarise, take
from benchmarks.sample_statistics import dependence, drift, early_stopping_bound, least_under, tail
from tests.benchmarks.test_measure import autoregressive

GOLDEN = Path(__file__).parent / "golden" / "loadgen.json"


def exact_tail(h: int, t: int, share: Fraction) -> Fraction:
    """P(X >= h), X binomial over h + t, in whole numbers."""
    n = h + t
    return sum((comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(h, n + 1)), Fraction(0))


@pytest.mark.parametrize(("h", "t"), [(1, 1), (63, 1), (62, 1), (90, 3), (300, 20), (1500, 130)])
@pytest.mark.parametrize("share", [Fraction(9, 10), Fraction(99, 100), Fraction(1, 2)])
def test_the_tail_is_the_binomial_one(h: int, t: int, share: Fraction) -> None:
    assert tail(h, t, float(share)) == pytest.approx(float(exact_tail(h, t, share)), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("t", [1, 2, 3, 7, 19, 60])
@pytest.mark.parametrize("share", [Fraction(9, 10), Fraction(1, 2)])
def test_the_fewest_queries_are_the_fewest(t: int, share: Fraction) -> None:
    h = least_under(t, float(share))
    assert exact_tail(h, t, share) <= Fraction(1, 100) < exact_tail(h - 1, t, share)


def test_it_starts_at_64_queries_as_published() -> None:
    assert least_under(1) + 1 == 64
    assert early_stopping_bound(np.arange(1, 64)) is None
    assert early_stopping_bound(np.arange(1, 65)) == 64


def test_the_same_as_the_load_generator_on_its_own_samples() -> None:
    found = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert early_stopping_bound(np.array(found["latencies_ns"])) == found["early_stopping_p90_ns"]


def test_the_bound_holds_as_often_as_it_says_and_tightens() -> None:
    rng = np.random.default_rng(0)
    truth = -np.log(0.1)  # 90th percentile of unit exponential times
    bounds = [early_stopping_bound(rng.exponential(1, 200)) for _ in range(1500)]
    below = np.mean([bound < truth for bound in bounds if bound is not None])
    assert 0.0005 < below <= 0.015  # 1 % by construction, a little less because counts are whole
    assert truth < np.median([early_stopping_bound(rng.exponential(1, 5000)) for _ in range(15)]) < truth * 1.08 < np.median(bounds)


def test_dependence_of_known_series() -> None:
    rng = np.random.default_rng(1)
    assert dependence(rng.random(3000))[1] > 2500
    for rho in (0.5, 0.9):
        lag, independent = dependence(autoregressive(rng, 20_000, rho))
        assert lag == pytest.approx(rho, abs=0.04)
        assert independent == pytest.approx(20_000 * (1 - rho) / (1 + rho), rel=0.25)
    assert dependence(np.full(50, 3.0)) == (0.0, 50.0)


def test_drift_is_found_and_restlessness_is_not_taken_for_it() -> None:
    rng = np.random.default_rng(2)
    calm = [drift(np.exp(0.05 * autoregressive(rng, 400, rho)))[1] for rho in (0.0, 0.3, 0.6) for _ in range(100)]
    assert sum(p < 0.001 for p in calm) <= 3
    slowing = [drift(np.exp(0.05 * autoregressive(rng, 400, 0.3) + np.linspace(0, 0.1, 400))) for _ in range(50)]
    assert sum(p < 0.001 for _, p in slowing) >= 48
    assert np.median([share for share, _ in slowing]) == pytest.approx(np.exp(0.1 * 2 / 3), rel=0.02)


def test_invalid_says_why() -> None:
    rng = np.random.default_rng(3)
    good = summarise((1e6 * np.exp(0.03 * rng.standard_normal(500))).astype(np.int64))
    assert (good.valid, good.reason) == (True, None)
    assert good.cv == pytest.approx(0.03, rel=0.15)
    assert good.p90 < good.p90_bound < good.p99  # type: ignore[operator]
    few = summarise(np.arange(1, 64) + 10_000)
    assert not few.valid
    assert "too few" in few.reason  # type: ignore[operator]
    throttled = summarise((1e6 * np.exp(0.02 * rng.standard_normal(600)) * np.linspace(1, 1.4, 600)).astype(np.int64))
    assert "drifts" in throttled.reason  # type: ignore[operator]
    assert "throttling" in throttled.reason  # type: ignore[operator]
    restless = summarise((1e6 * np.where(rng.random(500) < 0.5, 1.0, 2.0) * (1 + rng.random(500))).astype(np.int64))
    assert "restless" in restless.reason  # type: ignore[operator]
    wander = summarise((1e6 * np.exp(0.05 * autoregressive(rng, 400, 0.99))).astype(np.int64))
    assert "depend on each other" in wander.reason or "drifts" in wander.reason  # type: ignore[operator]
    assert summarise(np.arange(1, 200) + 10_000, further=["the machine slept"]).reason.startswith("the machine slept")  # type: ignore[union-attr]


def test_warm_up_goes_on_until_it_converges() -> None:
    calls = []

    def warming(turn: int) -> None:
        calls.append(turn)
        end = time.perf_counter() + 0.0008 + 0.006 * 0.85 ** len(calls)
        while time.perf_counter() < end:
            pass

    found = take({"f": warming}, Plan(warmup=2, settle=200, min_samples=20, max_samples=20, seconds=1.0, max_seconds=5.0))
    assert 15 <= found.warmup < 200  # at 10 rounds it still falls by half in five
    assert found.converged
    assert found.first_ns["f"] >= 5_000_000
    assert np.median(found.samples["f"]) < 2_000_000
    capped = take({"f": lambda turn: None}, Plan(warmup=3, settle=0, min_samples=10, max_samples=10, seconds=0))
    assert (capped.warmup, capped.converged, capped.suspended_seconds) == (3, True, pytest.approx(0, abs=0.01))


def test_processor_time_is_counted_apart_from_waiting() -> None:
    def spin(turn: int) -> None:
        end = time.thread_time() + 0.002
        while time.thread_time() < end:
            pass

    found = take({"spin": spin, "sleep": lambda turn: time.sleep(0.002)}, Plan(warmup=1, min_samples=30, max_samples=30, seconds=0))
    assert found.cpu_ns["spin"] / 30 == pytest.approx(2e6, rel=0.2)
    assert found.cpu_ns["sleep"] / 30 < 4e5


def test_the_profiler_takes_less_than_one_percent_of_five_milliseconds() -> None:
    """Both what a sample holds too much, and what passes between two samples; a low quantile, for neighbours on the core take the rest."""
    entered, left = [], []

    def inference(turn: int) -> None:
        entered.append(time.perf_counter_ns())
        while time.perf_counter_ns() < entered[-1] + 5_000_000:
            pass
        left.append(time.perf_counter_ns())

    samples = take({"f": inference}, Plan(warmup=5, min_samples=80, max_samples=80, seconds=0), on_round=lambda turn, elapsed: None).samples["f"]
    inside = np.array(left[5:]) - np.array(entered[5:])
    assert np.quantile(samples - inside, 0.2) <= 50_000
    assert np.quantile(np.array(entered[6:]) - np.array(left[5:-1]), 0.2) <= 50_000
