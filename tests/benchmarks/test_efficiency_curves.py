"""Reading curves: what is needed to reach a recall, and the ratio of two arms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.suites.efficiency_curves import ratio_over_seeds, reaches, samples_ratio

BUDGETS = [20, 40, 80, 160, 320]


def test_a_curve_that_is_ten_times_faster_has_the_ratio_ten() -> None:
    slow = {budget: 0.1 * np.log(budget) / np.log(320) for budget in BUDGETS}
    fast = {budget // 10: recall for budget, recall in slow.items()}
    found = samples_ratio(slow, fast)
    assert found["ratio"] == pytest.approx(10)
    assert found["bound"] == ""
    assert found["plain_samples"] == 320


def test_a_bound_is_called_a_bound() -> None:
    plain = dict(zip(BUDGETS, (0.01, 0.02, 0.05, 0.1, 0.09), strict=True))
    above = samples_ratio(plain, dict.fromkeys(BUDGETS, 0.2))
    assert (above["ratio"], above["bound"], above["plain_samples"]) == (8.0, "at least", 160)
    below = samples_ratio(plain, dict.fromkeys(BUDGETS, 0.0))
    assert (below["ratio"], below["bound"]) == (0.5, "less than")


def test_a_later_fall_does_not_undo_what_was_reached() -> None:
    assert reaches(BUDGETS, [0.1, 0.3, 0.2, 0.2, 0.5], 0.3).samples == pytest.approx(40)


@given(st.lists(st.floats(0, 1), min_size=5, max_size=5), st.floats(0.001, 1))
def test_what_is_reached_lies_within_the_budgets(recalls: list[float], wanted: float) -> None:
    found = reaches(BUDGETS, recalls, wanted)
    assert BUDGETS[0] <= found.samples <= BUDGETS[-1]
    assert (found.bound == "more than") == (max(recalls) < wanted)
    assert (found.bound == "at most") == (recalls[0] >= wanted)


@pytest.mark.parametrize(("budgets", "recalls"), [([], []), ([2, 1], [0.1, 0.2]), ([1, 2], [0.1])])
def test_what_is_no_curve_is_refused(budgets: list[int], recalls: list[float]) -> None:
    with pytest.raises(ValueError, match="expected rising numbers"):
        reaches(budgets, recalls, 0.1)


def test_the_same_arm_twice_has_the_ratio_one_within_the_interval() -> None:
    generator = np.random.default_rng(0)
    arms = [{budget: generator.random((3, 600)) < 0.05 * (1 + n) for n, budget in enumerate(BUDGETS)} for _ in range(2)]
    found = ratio_over_seeds(*arms, draws=300)
    assert found["interval"][0] <= 1 <= found["interval"][1]
    assert found["low"] <= found["median"] <= found["high"]
    assert len(found["seeds"]) == 3
