"""Retrieval metrics with their uncertainty: ranks, recall@k, bootstrap intervals, paired tests (numpy only)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Two cosines closer than this are a tie: it is the noise of float32 embeddings, so order within it means nothing.
TIE = 1e-6
_CHUNK = 512


def ranks(query: np.ndarray, gallery: np.ndarray, targets: Sequence[int] | Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
    """Rank of the best right gallery item of every query; 1 is first.

    Cosine similarity; neither side needs unit norm. Ties are counted pessimistically: wrong items that score the same
    as the right one (within 1e-6) stand before it, so a model that gives everything one embedding earns nothing.
    Where a query has several right items the best counts, and the others do not push it down.

    Args:
        query: (Q, D) float.
        gallery: (G, D) float.
        targets: for each query the row of its right item, or a list of rows.

    Returns:
        int64 (Q,), from 1 to G.

    Raises:
        ValueError: shapes that do not fit, no target, a target outside the gallery, or a value that is not finite.

    >>> eye = np.eye(3)
    >>> ranks(np.array([[1.0, 0.5, 0.0]]), eye, [1]).tolist()
    [2]
    >>> ranks(np.array([[1.0, 1.0, 1.0]]), eye, [0]).tolist()   # all tie: last
    [3]
    >>> ranks(np.array([[1.0, 0.5, 0.0]]), eye, [[1, 0]]).tolist()
    [1]
    """
    query, gallery = _unit(query, "query"), _unit(gallery, "gallery")
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(f"query {query.shape} and gallery {gallery.shape} differ in width")
    rows = [np.atleast_1d(np.asarray(target, np.int64)) for target in targets]
    if len(rows) != len(query):
        raise ValueError(f"{len(rows)} targets for {len(query)} queries")
    for n, right in enumerate(rows):
        if right.ndim != 1 or not right.size or right.min() < 0 or right.max() >= len(gallery):
            raise ValueError(f"target of query {n} is {right.tolist()}, expected rows from 0 to {len(gallery) - 1}")
    found = np.empty(len(query), np.int64)
    for start in range(0, len(query), _CHUNK):
        scores = query[start : start + _CHUNK] @ gallery.T
        for n, row in enumerate(scores, start):
            best = row[rows[n]].max()
            row[rows[n]] = -np.inf
            found[n] = 1 + np.count_nonzero(row >= best - TIE)
    return found


def _unit(values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 2:
        raise ValueError(f"{name} has shape {values.shape}, expected two dimensions")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} has values that are not finite")
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def recall_at_k(ranks: np.ndarray, k: int) -> float:
    """Share of queries whose rank is at most k.

    >>> recall_at_k(np.array([1, 2, 6, 5]), 5)
    0.75

    Raises:
        ValueError: no queries.
    """
    ranks = np.asarray(ranks)
    if not ranks.size:
        raise ValueError("recall of no queries is undefined")
    return float((ranks <= k).mean())


def bootstrap_interval(values: np.ndarray, level: float = 0.95, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """Percentile interval of the mean over resampled queries.

    Args:
        values: (N,) one value a query, e.g. `ranks <= k`.
        level: share of resampled means inside.
        seed: of the resampling; the same seed gives the same interval.

    >>> bootstrap_interval(np.ones(10))
    (1.0, 1.0)

    Raises:
        ValueError: no values, or a level outside (0, 1).
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"values have shape {values.shape}, expected one dimension and at least one value")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, expected between 0 and 1")
    means = _resampled_means(values, seed, draws)
    tail = (1 - level) / 2
    return float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail))


def _resampled_means(values: np.ndarray, seed: int, draws: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= 16:
        # Few distinct values (right or wrong): drawing how often each appears is the same distribution, and fast.
        return generator.multinomial(len(values), counts / len(values), size=draws) @ distinct / len(values)
    means = np.empty(draws)
    for n in range(draws):
        means[n] = values[generator.integers(0, len(values), len(values))].mean()
    return means


class PairedResult(NamedTuple):
    """What `paired_recall_test` finds: recall of a minus recall of b, its interval, exact McNemar p."""

    difference: float
    interval: tuple[float, float]
    p: float


def paired_recall_test(ranks_a: np.ndarray, ranks_b: np.ndarray, k: int, seed: int = 0, level: float = 0.95) -> PairedResult:
    """Is recall@k of a different from that of b, on the same queries?

    The interval is the paired bootstrap of the difference; p is the exact two-sided McNemar test on the queries that
    only one of them answers.

    Args:
        ranks_a, ranks_b: (Q,) ranks of the same queries in the same order.

    Returns:
        (difference a - b, (low, high), p).

    >>> paired_recall_test(np.array([1, 1, 1, 9]), np.array([9, 9, 1, 9]), k=5).difference
    0.5
    >>> paired_recall_test(np.array([1, 1, 1, 9]), np.array([9, 9, 1, 9]), k=5).p
    0.5

    Raises:
        ValueError: shapes differ, or no queries.
    """
    ranks_a, ranks_b = np.asarray(ranks_a), np.asarray(ranks_b)
    if ranks_a.shape != ranks_b.shape or ranks_a.ndim != 1 or not ranks_a.size:
        raise ValueError(f"ranks have shapes {ranks_a.shape} and {ranks_b.shape}, expected the same queries, at least one")
    difference = (ranks_a <= k).astype(np.float64) - (ranks_b <= k)
    interval = bootstrap_interval(difference, level, seed)
    return PairedResult(float(difference.mean()), interval, mcnemar_p(int((difference > 0).sum()), int((difference < 0).sum())))


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Exact two-sided McNemar p from the counts of queries that only a, and only b, answers.

    >>> mcnemar_p(0, 0), mcnemar_p(5, 5), mcnemar_p(6, 0)
    (1.0, 1.0, 0.03125)
    """
    n, fewer = only_a + only_b, min(only_a, only_b)
    if n <= 1000:
        tail = sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n
    else:
        tail = sum(math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2)) for i in range(fewer + 1))
    return min(1.0, 2 * tail)
