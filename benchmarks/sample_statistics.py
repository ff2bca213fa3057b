"""What a list of times can and cannot say: the early-stopping bound of p90, dependence between samples, drift, and whether the whole is to be believed.

All of it follows from the samples alone, in the order of measuring, so that results can be judged again years later.
"""

from __future__ import annotations

import math
import statistics
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

PERCENTILE, CONFIDENCE = 0.9, 0.99
"""Of MLPerf Inference's single-stream scenario."""
DRIFT_P, DRIFT_SHARE = 0.001, 0.02
"""A drift is said when a trend of this significance moves the median by more than this share between the first and the last third."""
NOISE_SHARE = 0.25
"""Median absolute deviation over median, above which the machine was too restless for a latency."""
FEW_INDEPENDENT = 16


def tail(h: int, t: int, share: float) -> float:
    """P(X >= h) of X binomial over h + t queries, each under the bound with probability `share`; this is the incomplete beta function I_share(h, t + 1).

    Summed from its short end (t + 1 terms) in logarithms: exact to about 1e-12 up to millions of queries.
    """
    n = h + t
    logs = np.array([math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log1p(-share) + (n - k) * math.log(share) for k in range(t + 1)])
    top = float(logs.max())
    return min(1.0, math.exp(top) * float(np.exp(logs - top).sum()))


@lru_cache(maxsize=4096)
def least_under(t: int, percentile: float = PERCENTILE, tolerance: float = 0.0, confidence: float = CONFIDENCE) -> int:
    """Fewest queries under the bound that make up for `t` over it: the smallest h with P(Binomial(h + t, percentile - tolerance) >= h) <= 1 - confidence."""
    share = percentile - tolerance
    low, high = 1, 64
    while tail(high, t, share) > 1 - confidence:
        low, high = high, high * 2
    while low < high:
        middle = (low + high) // 2
        if tail(middle, t, share) <= 1 - confidence:
            high = middle
        else:
            low = middle + 1
    return low


def early_stopping_bound(samples: Values, percentile: float = PERCENTILE, tolerance: float = 0.0, confidence: float = CONFIDENCE) -> float | None:
    """MLPerf's early-stopping estimate: a latency that the percentile does not exceed, at this confidence. None when there are too few samples (64 for p90).

    Of n samples the largest t is found for which n - t under-latency ones are enough; the estimate is the t-th largest sample. It holds for
    samples that do not depend on each other; `dependence` tells how far these do.
    """
    n = len(samples)
    if n < least_under(1, percentile, tolerance, confidence) + 1:
        return None
    low, high = 1, n - 1
    while low < high:  # h(t) + t grows with t
        middle = (low + high + 1) // 2
        if least_under(middle, percentile, tolerance, confidence) + middle <= n:
            low = middle
        else:
            high = middle - 1
    return float(np.sort(np.asarray(samples, np.float64))[n - low])


def dependence(samples: Values) -> tuple[float, float]:
    """(autocorrelation at lag 1, number of independent samples that these are worth), of the ranks, so that one wild sample decides nothing.

    The sum of autocorrelations is cut where a pair of neighbouring ones is no longer positive (Geyer's initial sequence).
    """
    n = len(samples)
    ranks = _ranks(samples)
    ranks -= ranks.mean()
    variance = float(ranks @ ranks) / n
    if n < 4 or variance == 0:
        return 0.0, float(n)
    size = 1 << (2 * n - 1).bit_length()
    spectrum = np.fft.rfft(ranks, size)
    correlation = np.fft.irfft(spectrum * np.conj(spectrum), size)[: n // 2] / (n * variance)
    total = 0.0
    for lag in range(1, len(correlation) - 1, 2):
        pair = float(correlation[lag] + correlation[lag + 1])
        if pair <= 0:
            break
        total += pair
    return float(correlation[1]), float(min(n, n / (1 + 2 * total)))


def drift(samples: Values) -> tuple[float, float]:
    """(median of the last third over that of the first, p of a trend).

    The p is that of a Mann-Kendall test over medians of consecutive blocks, as long as the dependence between samples asks for (a machine that is
    restless at a scale of ten samples does not drift; one that throttles does). It is 1 where there are fewer than eight blocks.
    """
    n = len(samples)
    third = max(1, n // 3)
    share = float(np.median(samples[-third:]) / np.median(samples[:third]))
    # the trend itself makes samples dependent, so the length of a block comes from what is left without it
    order = np.arange(n) - (n - 1) / 2
    ranks = _ranks(samples)
    slope = float(order @ ranks) / max(1.0, float(order @ order))
    _, independent = dependence(ranks - slope * order)
    blocks = int(min(30, independent // 2, n // 3))
    if blocks < 8:
        return share, 1.0
    medians = np.array([np.median(part) for part in np.array_split(np.asarray(samples, np.float64), blocks)])
    score = int(np.sign(medians[None, :] - medians[:, None])[np.triu_indices(blocks, 1)].sum())
    spread = math.sqrt(blocks * (blocks - 1) * (2 * blocks + 5) / 18)
    z = max(0.0, abs(score) - 1) / spread
    return share, 2 * (1 - statistics.NormalDist().cdf(z))


def reasons(samples: Values, *, drift_share: float, drift_p: float, independent: float, bound: float | None) -> list[str]:
    """Why these samples should not be quoted as a latency; empty when they may be."""
    values = np.asarray(samples, np.float64)
    median = float(np.median(values))
    spread = float(np.median(np.abs(values - median))) / median
    found = []
    if bound is None:
        found.append(f"{len(values)} samples are too few for the bound of p90 (64)")
    if drift_p < DRIFT_P and abs(drift_share - 1) > DRIFT_SHARE:
        found.append(f"it drifts: the last third takes {drift_share:.2f} of the first ({'throttling or a neighbour' if drift_share > 1 else 'not yet warm'})")
    if spread > NOISE_SHARE:
        found.append(f"it is restless: half of the samples lie more than {spread:.0%} from the median")
    if len(values) >= FEW_INDEPENDENT and independent < FEW_INDEPENDENT:
        found.append(f"samples depend on each other: {len(values)} are worth {independent:.0f}")
    return found


def _ranks(samples: Values) -> Values:
    """Ranks with ties at their mean."""
    values = np.asarray(samples, np.float64)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[inverse]
