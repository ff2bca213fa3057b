"""The machine's own peak, measured in the same run: float32 and int8 GEMM (multiply-adds) and memory copy.

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
    """Best of the rounds. `gemm_gflops` and `gemm_int8_gops` (uint8 by int8 into int32, ONNX Runtime's kernel; None without the package onnx) count a
    multiply-add as two; `copy_gbytes` counts the bytes read plus the bytes written, a second."""

    threads: int
    gemm_gflops: float
    gemm_gflops_median: float
    copy_gbytes: float
    copy_gbytes_median: float
    gemm_int8_gops: float | None = None
    gemm_int8_gops_median: float | None = None

    def as_dict(self) -> dict[str, float | None]:
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
    makers = [_int8_product(size) for _ in range(threads)]
    bytes_ = _rounds([maker for maker in makers if maker is not None], seconds) if all(makers) else None
    flops, moved = 2 * size**3 * threads / 1e9, 2 * megabytes * 2**20 * threads / 1e9
    return Peak(
        threads=threads,
        gemm_gflops=flops / min(gemms),
        gemm_gflops_median=flops / float(np.median(gemms)),
        copy_gbytes=moved / min(copies),
        copy_gbytes_median=moved / float(np.median(copies)),
        gemm_int8_gops=flops / min(bytes_) if bytes_ else None,
        gemm_int8_gops_median=flops / float(np.median(bytes_)) if bytes_ else None,
    )


def _int8_product(size: int) -> Callable[[], object] | None:
    """A matrix product of bytes on one thread, weights known beforehand as a quantised model's are."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return None
    rng = np.random.default_rng(0)
    weights = numpy_helper.from_array(rng.integers(-127, 128, (size, size)).astype(np.int8), "weights")
    entry, end = helper.make_tensor_value_info("x", TensorProto.UINT8, [size, size]), helper.make_tensor_value_info("y", TensorProto.INT32, [size, size])
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["x", "weights"], ["y"])], "product", [entry], [end], [weights])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"x": rng.integers(0, 256, (size, size)).astype(np.uint8)}
    return lambda: session.run(None, feeds)


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
