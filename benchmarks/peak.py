"""The machine's own peak, measured in the same run: float32 GEMM (multiply-adds) and memory copy.

A latency alone does not say whether the code or the machine is slow; the share of this peak that a tower reaches does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """Best of the rounds. `gemm_gflops` counts a multiply-add as two; `copy_gbytes` counts the bytes read plus the bytes written, a second."""

    threads: int
    gemm_gflops: float
    gemm_gflops_median: float
    copy_gbytes: float
    copy_gbytes_median: float

    def as_dict(self) -> dict[str, float]:
        """Plain numbers for JSON."""
        return asdict(self)


def measure_peak(threads: int = 1, seconds: float = 1.0, size: int = 768, megabytes: int = 64) -> Peak:
    """Peak of `threads` cores, about `seconds` for each of the two measures.

    Each thread multiplies its own matrices, so the BLAS library must itself run on one thread (`OPENBLAS_NUM_THREADS=1`, as `benchmarks.child`
    starts it). 64 MB a buffer lies beyond the caches of the processors that we know.
    """
    rng = np.random.default_rng(0)

    def gemm() -> Callable[[], object]:
        left, right = (rng.random((size, size), dtype=np.float32) for _ in range(2))
        out = np.empty_like(left)
        return lambda: np.matmul(left, right, out=out)

    def copy() -> Callable[[], object]:
        source = np.ones(megabytes * 2**20, dtype=np.uint8)
        target = np.zeros_like(source)
        return lambda: np.copyto(target, source)

    gemms = _rounds([gemm() for _ in range(threads)], seconds)
    copies = _rounds([copy() for _ in range(threads)], seconds)
    flops, moved = 2 * size**3 * threads / 1e9, 2 * megabytes * 2**20 * threads / 1e9
    return Peak(
        threads=threads,
        gemm_gflops=flops / min(gemms),
        gemm_gflops_median=flops / float(np.median(gemms)),
        copy_gbytes=moved / min(copies),
        copy_gbytes_median=moved / float(np.median(copies)),
    )


def _rounds(jobs: list[Callable[[], object]], seconds: float) -> list[float]:
    """Wall seconds of rounds in which every job runs once, all at the same time; the first round is warm-up."""
    kept: list[float] = []
    with ThreadPoolExecutor(len(jobs)) as pool:
        started = time.perf_counter()
        while len(kept) < 6 or time.perf_counter() - started < seconds:
            before = time.perf_counter()
            if len(jobs) == 1:
                jobs[0]()  # no thread hop for the common case
            else:
                list(pool.map(lambda job: job(), jobs))
            kept.append(time.perf_counter() - before)
    return kept[1:]
