"""The quick timing while a bundle is made: order, pairing, verdict."""

from __future__ import annotations

import time

import numpy as np
import pytest

from export.latency_gate import Ratio, figures, interleaved, processor, ratio


def test_every_candidate_runs_equally_often_and_takes_turns():
    order: list[str] = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b"), "c": lambda: order.append("c")}, pairs=30, warmup=3)
    assert {name: len(values) for name, values in times.items()} == {"a": 30, "b": 30, "c": 30}
    rounds = ["".join(order[n : n + 3]) for n in range(0, len(order), 3)]
    assert len(rounds) == 33
    assert rounds[:4] == ["abc", "bca", "cab", "abc"]


def test_at_least_thirty_rounds_whatever_they_take():
    times = interleaved({"a": lambda: time.sleep(0.001)}, pairs=60, warmup=1, budget_seconds=0)
    assert len(times["a"]) == 30
    assert times["a"].min() >= 0.001


def test_ratio_survives_a_machine_that_slows_down():
    """Both sides get slower together; the paired ratio does not move."""
    rng = np.random.default_rng(0)
    load = np.linspace(1, 5, 60)
    base = load * (1 + 0.02 * rng.standard_normal(60))
    found = ratio(0.6 * load * (1 + 0.02 * rng.standard_normal(60)), base)
    assert found.median == pytest.approx(0.6, abs=0.02)
    assert found.low < found.median < found.high
    assert found.faster


def test_no_difference_is_not_called_faster():
    rng = np.random.default_rng(1)
    assert not ratio(1 + 0.05 * rng.standard_normal(40), 1 + 0.05 * rng.standard_normal(40)).faster
    assert not Ratio(median=0.992, low=0.985, high=0.995).faster  # below 1 for sure, but by less than 1 %
    assert ratio(np.full(40, 0.5), np.ones(40)) == Ratio(median=0.5, low=0.5, high=0.5)


def test_figures_are_milliseconds_and_name_the_machine():
    found = figures(np.array([0.001, 0.002, 0.003]), Ratio(median=0.5, low=0.4, high=0.6))
    assert found["p50_ms"] == pytest.approx(2)
    assert found["cpu"] == processor() != ""
    assert found["ratio_to_fp32"] == {"median": 0.5, "low": 0.4, "high": 0.6, "level": 0.99}
    assert "ratio_to_fp32" not in figures(np.array([0.001]), None)
