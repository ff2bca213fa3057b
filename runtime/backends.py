"""What can run an artefact on this machine: a dict of targets, each a function that opens one tower."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from runtime.errors import BundleError, DeviceError


class Tower(Protocol):
    """An opened artefact."""

    facts: dict[str, Any]

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """(B, …) in the artefact's input type -> float32 (B, embed_dim)."""
        ...


class OnnxTower:
    """One ONNX graph in ONNX Runtime on the CPU; half: it computes in float16."""

    def __init__(self, path: Path, threads: int | None, input: str, output: str, *, half: bool = False) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.inter_op_num_threads = 1
        options.intra_op_num_threads = threads or available_threads()
        if half:  # text towers of this precision do not load in ONNX Runtime 1.31 with its layout optimisations
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        try:
            self._session = onnxruntime.InferenceSession(str(path / "model.onnx" if path.is_dir() else path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base class of their own
            raise BundleError(f"{path} is not an ONNX graph that onnxruntime {onnxruntime.__version__} opens ({_first_line(error)})") from error
        inputs = [node.name for node in self._session.get_inputs()]
        outputs = [node.name for node in self._session.get_outputs()]
        if inputs != [input] or output not in outputs:
            raise BundleError(f"{path} has inputs {inputs} and outputs {outputs}; the manifest says '{input}' and '{output}'")
        self._input, self._output, self._path = input, output, path
        self.facts: dict[str, Any] = {
            "runtime": f"onnxruntime {onnxruntime.__version__}",
            "provider": "CPUExecutionProvider",
            "threads": options.intra_op_num_threads,
        }

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """(B, …) -> float32 (B, embed_dim). Raises DeviceError when the run fails."""
        try:
            (result,) = self._session.run([self._output], {self._input: inputs})
        except Exception as error:
            raise DeviceError(f"{self._path.name} failed on an input of {inputs.dtype} {inputs.shape} ({_first_line(error)})") from error
        return np.asarray(result, np.float32)


BACKENDS: dict[str, Callable[..., Tower]] = {
    "onnx": OnnxTower,
}


def available_threads() -> int:
    """Processors that this process may use; `OMP_NUM_THREADS`, where set, lowers it."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(count, int(wanted)) if wanted.isdecimal() and int(wanted) else count


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
