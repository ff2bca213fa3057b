"""How the pilot decides: paired differences of recall over the same queries and seeds, and the cheapest choice that is not behind.

Shapes: S = seeds, Q = queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS = 2000


def crossed_interval(values: np.ndarray, level: float = 0.95, seed: int = 0, draws: int = DRAWS) -> tuple[float, float]:
    """Percentile interval of the mean of (S, Q) values when both the seeds and the queries are samples of what there could have been.

    Queries and seeds are resampled independently (Owen 2007, "The pigeonhole bootstrap"). Resampling S seeds gives a variance that is
    (S - 1) / S of the right one, which with three seeds is a third too little: deviations between seeds are widened accordingly
    (Davison and Hinkley 1997, section 3.8). With one seed the interval speaks of the queries alone.

    >>> crossed_interval(np.ones((2, 5)))
    (1.0, 1.0)

    Raises:
        ValueError: no values, or a level outside (0, 1).
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"values have shape {values.shape}, expected seeds x queries, at least one of each")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, expected between 0 and 1")
    seeds, queries = values.shape
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    chunk = max(1, 4_000_000 // queries)  # bounds the memory of the drawn counts
    for start in range(0, draws, chunk):
        size = min(chunk, draws - start)
        counts = generator.multinomial(queries, np.full(queries, 1 / queries), size=size)
        per_seed = counts @ values.T / queries  # (size, S)
        centre = per_seed.mean(axis=1)
        if seeds > 1:
            picked = np.take_along_axis(per_seed, generator.integers(0, seeds, (size, seeds)), axis=1).mean(axis=1)
            centre = centre + (picked - centre) * (seeds / (seeds - 1)) ** 0.5
        means[start : start + size] = centre
    tail = (1 - level) / 2
    return float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail))


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One choice of a factor.

    name: what is chosen; cost: smaller is preferred, equal costs are settled by `kept` and then by recall; kept: the choice that stands
    when nothing speaks against it.
    """

    name: str
    cost: float = 0.0
    kept: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What was chosen and why. `rows`: per candidate its recall, its distance to the best, whether it is behind or open; JSON-ready."""

    chosen: str
    best: str
    reason: str
    level: float
    rows: list[dict[str, Any]]


def decide(candidates: Sequence[Candidate], hits: Mapping[str, np.ndarray], confidence: float = 0.95, tolerance: float = 0.05, seed: int = 0) -> Verdict:
    """The cheapest candidate that does not differ from the best one.

    The best is the candidate of highest mean recall. Every other is compared with it, query by query and seed by seed, on the seeds that
    both have; intervals are of `confidence` for all comparisons of the factor together (Bonferroni). A candidate is "behind" when the whole
    interval of best - candidate lies above zero, and "open" when it does not, but the loss that was seen is more than `tolerance` of the
    best's recall: an interval that holds zero because it is wide says nothing. All others do not differ; among them the order is cost, then
    the kept one, then recall. It is the one-standard-error rule (Breiman et al. 1984, section 3.4.3) with paired intervals in the place of
    the standard error, and a bound on what may be lost by it.

    Args:
        candidates: at least one.
        hits: name to (S, Q) booleans, whether the query was answered; the same queries in the same order, seeds from the first one on.
    """
    recall = {one.name: float(np.mean(hits[one.name])) for one in candidates}
    best = max(candidates, key=lambda one: (recall[one.name], -one.cost, one.kept))
    level = 1 - (1 - confidence) / max(1, len(candidates) - 1)
    rows: dict[str, dict[str, Any]] = {one.name: _against(hits[best.name], hits[one.name], level, seed) for one in candidates}
    for one in candidates:
        low, high = crossed_interval(hits[one.name], confidence, seed)
        rows[one.name] = {"name": one.name, "cost": one.cost, "recall": {"value": recall[one.name], "low": max(low, 0.0), "high": min(high, 1.0)}, **rows[one.name]}
        rows[one.name]["open"] = not rows[one.name]["behind"] and recall[best.name] - recall[one.name] > tolerance * recall[best.name]
    fit = [one for one in candidates if not rows[one.name]["behind"] and not rows[one.name]["open"]]
    chosen = min(fit, key=lambda one: (one.cost, not one.kept, -recall[one.name]))
    return Verdict(chosen=chosen.name, best=best.name, reason=_reason(chosen, best, candidates, rows), level=level, rows=list(rows.values()))


def behind(best: np.ndarray, other: np.ndarray, level: float, seed: int = 0) -> bool:
    """Whether `other` is shown to answer fewer queries than `best`."""
    return bool(_against(best, other, level, seed)["behind"])


def _against(best: np.ndarray, other: np.ndarray, level: float, seed: int) -> dict[str, Any]:
    common = min(len(best), len(other))
    difference = best[:common].astype(np.float64) - other[:common]
    low, high = crossed_interval(difference, level, seed)
    return {"behind_by": {"value": float(difference.mean()), "low": low, "high": high}, "seeds": len(other), "behind": low > 0}


def _reason(chosen: Candidate, best: Candidate, candidates: Sequence[Candidate], rows: Mapping[str, dict[str, Any]]) -> str:
    if len(rows) == 1:
        return "the only candidate"
    unclear = [one.name for one in candidates if rows[one.name]["open"] and one.cost <= chosen.cost]
    more = f"; open, for want of seeds or pairs: {', '.join(unclear)}" if unclear else ""
    if chosen.name != best.name:
        why = "the cheaper one is kept" if chosen.cost < best.cost else "what was set is kept"
        return f"no difference from the best ({best.name}) seen: behind by {_gap(rows[chosen.name])}; {why}{more}"
    if any(not row["behind"] and not row["open"] for name, row in rows.items() if name != best.name):
        return f"the highest recall, and none that does not differ from it is cheaper{more}"
    nearest = min((row for row in rows.values() if row["name"] != best.name), key=lambda row: row["behind_by"]["value"])
    return f"the highest recall; the nearest ({nearest['name']}) is behind by {_gap(nearest)}{more}"


def _gap(row: Mapping[str, Any]) -> str:
    gap = row["behind_by"]
    return f"{gap['value']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]"


def smallest_visible(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Half the width of the widest comparison: a smaller loss of recall would not have been seen. None without a comparison."""
    widths = [row["behind_by"]["high"] - row["behind_by"]["low"] for row in rows]
    return max(widths) / 2 if len(widths) > 1 else None
