"""Recall against samples seen, and what one curve needs to reach what another reached.

Shapes: S = seeds, N = budgets, Q = queries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Reached:
    """How many samples a curve needs for a recall. bound: "" where it crosses the recall between two budgets; "at most" where its smallest budget
    is above it already; "more than" where none reaches it."""

    samples: float
    bound: str = ""


def reaches(budgets: Sequence[int], recalls: Sequence[float], wanted: float) -> Reached:
    """The smallest number of samples at which the curve has `wanted`, interpolated in the logarithm of the samples.

    The curve is what the best budget so far reached: who has more samples may use fewer.

    >>> reaches([10, 100, 1000], [0.1, 0.2, 0.3], 0.15).samples.__round__(2)
    31.62

    Raises:
        ValueError: no budget, or budgets that do not rise.
    """
    if not budgets or len(budgets) != len(recalls) or any(a >= b for a, b in zip(budgets, budgets[1:], strict=False)):
        raise ValueError(f"budgets are {list(budgets)} with {len(recalls)} recalls; expected rising numbers and one recall for each")
    best = np.maximum.accumulate(np.asarray(recalls, np.float64))
    if best[0] >= wanted:
        return Reached(samples=float(budgets[0]), bound="at most")
    above = np.flatnonzero(best >= wanted)
    if not len(above):
        return Reached(samples=float(budgets[-1]), bound="more than")
    n = int(above[0])
    share = (wanted - best[n - 1]) / (best[n] - best[n - 1])
    return Reached(samples=math.exp(math.log(budgets[n - 1]) + share * (math.log(budgets[n]) - math.log(budgets[n - 1]))))


def samples_ratio(plain: Mapping[int, float], other: Mapping[int, float]) -> dict[str, Any]:
    """Samples at which `plain` is best over samples at which `other` is as good. Both: budget to recall.

    Returns:
        {"ratio", "bound": "", "at least" or "less than", "plain_best", "plain_samples", "other_samples"}.
    """
    best = max(plain.values())
    needed = min(budget for budget, recall in plain.items() if recall == best)
    budgets = sorted(other)
    found = reaches(budgets, [other[budget] for budget in budgets], best)
    bound = {"": "", "at most": "at least", "more than": "less than"}[found.bound]
    return {"ratio": round(needed / found.samples, 2), "bound": bound, "plain_best": round(best, 4), "plain_samples": needed, "other_samples": round(found.samples)}


def ratio_over_seeds(plain: Mapping[int, np.ndarray], other: Mapping[int, np.ndarray], draws: int = 2000, seed: int = 0) -> dict[str, Any]:
    """`samples_ratio` of every seed with the seed of the same number, of the means, and its 90 % interval when queries and seeds are drawn again.

    Args:
        plain, other: budget to hits (S, Q), booleans of the same queries.

    Returns:
        {"median", "low", "high": smallest and largest of a seed, "seeds": [as `samples_ratio`], "of_means": as `samples_ratio`, "interval": [low, high]}.
    """
    count = min(len(hits) for hits in (*plain.values(), *other.values()))
    per_seed = [samples_ratio(*({budget: float(hits[n].mean()) for budget, hits in arm.items()} for arm in (plain, other))) for n in range(count)]
    ratios = [one["ratio"] for one in per_seed]
    generator = np.random.default_rng(seed)
    queries = next(iter(plain.values())).shape[1]
    drawn = []
    for _ in range(draws):
        weights = generator.multinomial(queries, np.full(queries, 1 / queries)) / queries
        means = [
            {budget: float((hits[generator.integers(0, len(hits), len(hits))] @ weights).mean()) for budget, hits in arm.items()} for arm in (plain, other)
        ]
        drawn.append(samples_ratio(*means)["ratio"])
    means = [{budget: float(hits.mean()) for budget, hits in arm.items()} for arm in (plain, other)]
    return {
        "median": round(float(np.median(ratios)), 2), "low": min(ratios), "high": max(ratios), "seeds": per_seed, "of_means": samples_ratio(*means),
        "interval": [round(float(value), 2) for value in np.quantile(drawn, (0.05, 0.95))],
    }  # fmt: skip
