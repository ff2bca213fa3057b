"""What can run an artefact on this machine: a dict of targets, each a function that opens one tower, and the packages that it needs."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from runtime.errors import BundleError, DeviceError
from runtime.graph_check import check_graph


class Tower(Protocol):
    """An opened artefact. Threads may share it."""

    facts: dict[str, Any]

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """(B, …) in the artefact's input type -> float32 (B, embed_dim)."""
        ...


class OnnxTower:
    """One ONNX graph in ONNX Runtime on the CPU."""

    def __init__(self, path: Path, threads: int | None, input: str, output: str, precision: str = "fp32") -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.inter_op_num_threads = 1
        options.intra_op_num_threads = threads or available_threads()
        if precision == "fp16":  # text towers that compute in it do not load in ONNX Runtime 1.31 with its layout optimisations
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        file = path / "model.onnx" if path.is_dir() else path
        check_graph(file)
        try:
            self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
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


class OpenVinoTower:
    """A folder with OpenVINO IR on the CPU. Below fp32, floats are computed in what the processor is quickest in: bfloat16 where it has it."""

    def __init__(self, path: Path, threads: int | None, input: str, output: str, precision: str = "fp32") -> None:
        with _unseen("openvino_telemetry"):  # with it, openvino reports its use to its maker
            import openvino

        hints: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads or available_threads(), "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        if precision == "fp32":
            hints["INFERENCE_PRECISION_HINT"] = "f32"
        core = openvino.Core()
        try:
            compiled = core.compile_model(core.read_model(path / "model.xml"), "CPU", hints)
        except RuntimeError as error:
            raise BundleError(f"{path} is not a model that openvino {openvino.__version__} opens ({_first_line(error)})") from error
        names = {name for entry in (*compiled.inputs, *compiled.outputs) for name in entry.get_names()}
        if len(compiled.inputs) != 1 or not {input, output} <= names:
            raise BundleError(f"{path} has inputs and outputs {sorted(names)}; the manifest says '{input}' and '{output}'")
        self._request, self._output, self._lock, self._path = compiled.create_infer_request(), output, threading.Lock(), path
        floats = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self.facts: dict[str, Any] = {
            "runtime": f"openvino {openvino.__version__.split('-')[0]}",
            "provider": f"CPU, floats in {floats}",
            "threads": hints["INFERENCE_NUM_THREADS"],
        }

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """(B, …) -> float32 (B, embed_dim). Raises DeviceError when the run fails."""
        with self._lock:
            try:
                return np.array(self._request.infer([inputs])[self._output], np.float32)
            except RuntimeError as error:
                raise DeviceError(f"{self._path.name} failed on an input of {inputs.dtype} {inputs.shape} ({_first_line(error)})") from error


class LiteRtTower:
    """A .tflite graph of fixed batch in LiteRT on the CPU."""

    def __init__(self, path: Path, threads: int | None, input: str, output: str, precision: str = "fp32") -> None:
        from ai_edge_litert.interpreter import Interpreter

        try:
            self._interpreter = Interpreter(model_path=str(path), num_threads=threads or available_threads())
            self._interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            raise BundleError(f"{path} is not a graph that LiteRT opens ({_first_line(error)})") from error
        inputs, outputs = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        if len(inputs) != 1 or len(outputs) != 1:
            raise BundleError(f"{path} has {len(inputs)} inputs and {len(outputs)} outputs, expected one of each")
        self._in, self._out, self._lock, self._path = inputs[0], outputs[0], threading.Lock(), path
        self.facts: dict[str, Any] = {"runtime": "LiteRT", "provider": "CPU", "threads": threads or available_threads()}

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """(B, …), B the batch of the file -> float32 (B, embed_dim). Raises DeviceError when the run fails."""
        with self._lock:
            try:
                self._interpreter.set_tensor(self._in["index"], inputs.astype(self._in["dtype"], copy=False))
                self._interpreter.invoke()
            except (RuntimeError, ValueError) as error:
                raise DeviceError(f"{self._path.name} failed on an input of {inputs.dtype} {inputs.shape} ({_first_line(error)})") from error
            return np.array(self._interpreter.get_tensor(self._out["index"]), np.float32)


class CoreMlTower:
    """A Core ML package on a Mac, on whichever of CPU, GPU and Neural Engine the system chooses. Not run on hardware by this project."""

    def __init__(self, path: Path, threads: int | None, input: str, output: str, precision: str = "fp32") -> None:
        # only coremltools' converters need these, and importing them takes seconds; who has imported torch wants to convert, perhaps
        with _unseen(*(() if "torch" in sys.modules else ("torch", "transformers"))):
            import coremltools

        try:
            self._model = coremltools.models.MLModel(str(path), compute_units=coremltools.ComputeUnit.ALL)
            description = self._model.get_spec().description
        except Exception as error:  # the system's own errors come as plain exceptions
            raise BundleError(f"{path} is not a package that coremltools {coremltools.__version__} opens ({_first_line(error)})") from error
        names = [entry.name for entry in description.input], [entry.name for entry in description.output]
        if names[0] != [input] or output not in names[1]:
            raise BundleError(f"{path} has inputs {names[0]} and outputs {names[1]}; the manifest says '{input}' and '{output}'")
        self._input, self._output, self._lock, self._path = input, output, threading.Lock(), path
        self.facts: dict[str, Any] = {"runtime": f"coremltools {coremltools.__version__}", "provider": "Core ML, all compute units", "threads": None}

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """(1, …) -> float32 (1, embed_dim). Raises DeviceError when the run fails."""
        with self._lock:
            try:
                return np.array(self._model.predict({self._input: inputs})[self._output], np.float32)
            except Exception as error:
                raise DeviceError(f"{self._path.name} failed on an input of {inputs.dtype} {inputs.shape} ({_first_line(error)})") from error


BACKENDS: dict[str, Callable[..., Tower]] = {
    "onnx": OnnxTower,
    "openvino": OpenVinoTower,
    "litert": LiteRtTower,
    "coreml": CoreMlTower,
}
NEEDS = {"onnx": "onnxruntime", "openvino": "openvino", "litert": "ai_edge_litert", "coreml": "coremltools"}
"""Target to the module that runs it."""


@contextlib.contextmanager
def _unseen(*names: str) -> Iterator[None]:
    """Inside, importing these modules fails as if they were not installed."""
    hidden = {name: sys.modules.get(name) for name in names}
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name, module in hidden.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def return_memory() -> None:
    """Hand back to the system what the heap has free. Reading a graph or a vocabulary leaves holes of its own size, and glibc keeps them."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none, and keep less
        if trim is not None:
            trim(0)


def missing(target: str) -> str | None:
    """Why a target does not run here; None when it does. Looks for packages, and imports none."""
    if target not in BACKENDS:
        return f"target {target} does not run in this SDK"
    if target == "coreml" and sys.platform != "darwin":
        return "target coreml runs on Macs alone"
    if importlib.util.find_spec(NEEDS[target]) is None:
        return f"target {target} needs the package '{NEEDS[target]}', which is not installed"
    return None


def available_threads() -> int:
    """Processors that this process may use; `OMP_NUM_THREADS`, where set, lowers it."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(count, int(wanted)) if wanted.isdecimal() and int(wanted) else count


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
