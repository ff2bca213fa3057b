"""Where the time of one ONNX graph goes, operation by operation, as ONNX Runtime's own profiler tells it, and on which unit each ran.

Runs in a process of its own, apart from the timed rounds: writing the profile slows the graph down. Shares are to be read, not sums.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

ROUNDS = 20


def profile(path: Path, feeds: dict[str, np.ndarray], threads: int, *, half: bool = False) -> dict[str, Any]:
    """Profile a graph over 20 runs after 3 that are thrown away. See `read_profile` for what comes back."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as scratch:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.inter_op_num_threads, options.intra_op_num_threads = 1, threads
        if half:  # as the SDK opens it
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(scratch) / "profile")
        session = onnxruntime.InferenceSession(str(path / "model.onnx" if path.is_dir() else path), options, providers=["CPUExecutionProvider"])
        for _ in range(ROUNDS + 3):
            session.run(None, feeds)
        return read_profile(json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")), skip=3)


def read_profile(events: Iterable[dict[str, Any]], skip: int = 0) -> dict[str, Any]:
    """Sum ONNX Runtime's profile events.

    Args:
        skip: runs at the start that do not count.

    Returns:
        {"runs", "nodes", "operations": [{"op", "nodes", "us" (a run), "share"}] from the slowest, "slowest_nodes": [{"node", "op", "us", "share"}] (ten),
        "placement": provider -> share of the time, "outside_share": of the run that lies between operations}
    """
    runs: list[tuple[int, int]] = []
    kernels: list[dict[str, Any]] = []
    for event in events:
        if event.get("cat") == "Session" and event.get("name") == "model_run":
            runs.append((int(event["ts"]), int(event["dur"])))
        elif event.get("cat") == "Node" and str(event.get("name", "")).endswith("_kernel_time"):
            kernels.append(event)
    runs.sort()
    start = runs[skip - 1][0] + runs[skip - 1][1] if 0 < skip < len(runs) else -1
    counted = [run for run in runs if run[0] > start] or runs
    kernels = [event for event in kernels if int(event["ts"]) > start]
    turns = max(1, len(counted))
    by_op: dict[str, list[float]] = {}
    by_node: dict[tuple[str, str], float] = {}
    placement: dict[str, float] = {}
    for event in kernels:
        name, args, taken = event["name"].removesuffix("_kernel_time"), event.get("args", {}), float(event["dur"])
        op = str(args.get("op_name", "?"))
        by_op.setdefault(op, []).append(taken)
        by_node[name, op] = by_node.get((name, op), 0.0) + taken
        provider = str(args.get("provider", "?"))
        placement[provider] = placement.get(provider, 0.0) + taken
    total = sum(placement.values()) or 1.0
    nodes = {op: sum(1 for _, other in by_node if other == op) for op in by_op}
    operations = [{"op": op, "nodes": nodes[op], "us": sum(taken) / turns, "share": sum(taken) / total} for op, taken in by_op.items()]
    slowest = sorted(by_node.items(), key=lambda item: -item[1])[:10]
    whole = sum(taken for _, taken in counted)
    return {
        "runs": len(counted),
        "nodes": len(by_node),
        "operations": sorted(operations, key=lambda row: -row["us"]),
        "slowest_nodes": [{"node": name, "op": op, "us": taken / turns, "share": taken / total} for (name, op), taken in slowest],
        "placement": {provider: taken / total for provider, taken in placement.items()},
        "outside_share": max(0.0, 1 - total / whole) if whole else None,
    }
