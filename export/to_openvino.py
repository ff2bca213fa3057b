"""Encoders to OpenVINO IR: a folder of `model.xml` (the graph) and `model.bin` (the weights), the same bytes each time.

The conversion starts from the float32 ONNX and not from the torch module: both give the same numbers and the same weights, but the ONNX is there already,
carries the names and sizes that users call the tower by, and spares a second trace. OpenVINO computes in the precision that its device prefers (bfloat16 on
CPUs that have it, float16 on GPUs), whatever the file stores; the encoder here asks for float32, so that its figures are about the file.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from export.converters import require_packages
from export.draft import Draft, Job
from export.to_onnx import quiet, serialize
from runtime.errors import BundleError, MissingExtraError, ParityError
from runtime.files import whole_folder

PRECISIONS = ("fp32", "fp16", "int8")
EXTRA = "openvino"
FLOAT_CONVOLUTIONS = 3  # from the input on: one scale cannot serve their channels
GROUP = 128  # values of one token that share a scale when matrix products quantise what enters them

_TELEMETRY = "openvino_telemetry"


@contextlib.contextmanager
def nothing_said() -> Iterator[None]:
    """Silence log lines, progress bars and warnings of openvino and nncf."""
    with quiet("nncf", "root"), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def import_openvino(purpose: str, *, quantiser: bool = False) -> Any:
    """The module `openvino`, or with `quantiser` the module `nncf`, loaded without its usage statistics.

    openvino and nncf report every conversion to Intel and leave an identifier in the home folder, unless `openvino_telemetry` cannot be imported. It is
    hidden while they load; a process that loaded them before keeps what it has.

    Raises:
        MissingExtraError: not installed.
    """
    name = "nncf" if quantiser else "openvino"
    hidden = _TELEMETRY not in sys.modules
    try:
        if hidden:
            sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
        with nothing_said():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise MissingExtraError(name, EXTRA, purpose) from None
    finally:
        if hidden:
            del sys.modules[_TELEMETRY]


def require() -> None:
    """Raises MissingExtraError where openvino or its quantiser nncf is not installed."""
    require_packages({name: name for name in ("openvino", "nncf")}, EXTRA, "exporting to OpenVINO")


def drafts(job: Job, precisions: Sequence[str]) -> Iterator[Draft]:
    """One folder a precision, dynamic batch: float32, weights stored in float16, and int8 as of `quantize`.

    Raises:
        MissingExtraError: openvino, or for int8 nncf, is not installed.
        ParityError: an operation is not translated, or there is nothing to quantise.
    """
    version = import_openvino("exporting to OpenVINO").__version__.split("-")[0]
    for precision in precisions:
        if precision == "int8" and job.recipe is not None and job.recipe.form == "static":
            model = convert(job, job.onnx_int8)
        else:
            model = quantize(convert(job), job) if precision == "int8" else convert(job)
        path = f"openvino/{job.tower}.{precision}"
        run = OpenVinoEncoder(save(model, job.folder / path, half=precision == "fp16"))
        yield Draft(
            tower=job.tower, target="openvino", precision=precision, path=path, run=run, batch="dynamic", timed=True,
            how=f"openvino {version} on the CPU, one thread, asked to compute floats in float32", facts={**_facts(model, precision), "version": version},
        )  # fmt: skip


def convert(job: Job, graph: onnx.ModelProto | None = None) -> Any:
    """One tower as an `openvino.Model`: pixels (N, 3, H, W) float32 or tokens (N, T) int32 to embeddings (N, D) float32, unit norm.

    Args:
        graph: an int8 one with Q/DQ pairs, which OpenVINO runs in int8 as they stand; the float32 one when left out.

    Raises:
        ParityError: OpenVINO does not translate an operation; the message names it and the weights next to it.
    """
    ov = import_openvino("exporting to OpenVINO")
    try:
        with nothing_said():
            model = ov.convert_model(io.BytesIO(serialize(job.onnx if graph is None else graph)))
    except Exception as error:
        operation = _refused(job.onnx, str(error))
        raise ParityError(f"OpenVINO does not translate {operation} of the {job.tower} tower: {_sentence(error)}") from error
    _name(model, job)
    return model


def quantize(model: Any, job: Job) -> Any:
    """A model in int8, in the way that suits its tower. One with convolutions gets int8 weights and activations, the ranges taken from the calibration rows;
    one without (text) is left to `compress_weights`: static ranges cost it more of its retrieval and were no faster.

    TRANSFORMER keeps what leads into softmax and norms float (without it the L2 norm is quantised too); MIXED gives asymmetric ranges to activations with
    both signs (GELU's).

    Args:
        model: float32, as of `convert`; it may be changed.

    Raises:
        MissingExtraError: nncf is not installed.
        ParityError: nothing came out in int8.
    """
    nncf = import_openvino("quantising for OpenVINO", quantiser=True)
    convolutions = [operation.get_friendly_name() for operation in model.get_ordered_ops() if operation.get_type_name() in ("Convolution", "GroupConvolution")]
    rows = [job.rows[n : n + 1] for n in range(len(job.rows))]
    with nothing_said():
        if convolutions:
            quantised = nncf.quantize(
                model,
                nncf.Dataset(rows),
                model_type=nncf.ModelType.TRANSFORMER,
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(rows),
                ignored_scope=nncf.IgnoredScope(names=convolutions[:FLOAT_CONVOLUTIONS]),
            )
        else:
            quantised = compress_weights(model)
    if not _int8_weights(quantised):
        raise ParityError(f"nncf found nothing to quantise in the {job.tower} tower")
    _name(quantised, job)
    return quantised


def compress_weights(model: Any) -> Any:
    """Weights in int8, one asymmetric scale a row; needs no data. What enters a product becomes int8 while it runs, `GROUP` values of a token on a scale of
    their own, so a token that is always large spoils no other (a scale for the whole tensor, as ONNX Runtime's dynamic int8 has, does). The file carries the
    group size, which the session follows.

    Args:
        model: float32; it may be changed.

    Raises:
        MissingExtraError: nncf is not installed.
    """
    nncf = import_openvino("quantising for OpenVINO", quantiser=True)
    with nothing_said():
        quantised = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    quantised.set_rt_info(str(GROUP), ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    return quantised


def _int8_weights(model: Any) -> int:
    """How many constants of more than one value are stored in int8."""
    found = [operation for operation in model.get_ops() if operation.get_type_name() == "Constant"]
    return sum(item.get_element_type().to_string() in ("i8", "u8") and math.prod(item.get_output_shape(0)) > 1 for item in found)


def _name(model: Any, job: Job) -> None:
    """Names that depend on the graph alone: what does not come from the ONNX carries a counter of the process."""
    own = {name for node in job.onnx.graph.node for name in (node.name, *node.output)} | {item.name for item in (*job.onnx.graph.input, *job.onnx.graph.initializer)}
    model.set_friendly_name(job.tower)
    for index, operation in enumerate(model.get_ordered_ops()):
        if operation.get_friendly_name() not in own:
            operation.set_friendly_name(f"{operation.get_type_name()}_{index}")
    for section in ("conversion_parameters", "nncf"):  # switches of the tools, paths among them
        if section in model.get_rt_info():
            del model.get_rt_info()[section]


def _refused(graph: onnx.ModelProto, message: str) -> str:
    """Which operation the message speaks of, and the nearest weights before it: their names tell the module."""
    weights = {item.name for item in graph.graph.initializer if "." in item.name}
    producers = {name: node for node in graph.graph.node for name in node.output}
    for node in graph.graph.node:
        if node.op_type not in message.replace(".", " ").replace(":", " ").replace(",", " ").split():
            continue
        seen, names = set(), list(node.input)
        while names:
            name = names.pop(0)
            if name in weights:
                return f"the operation {node.op_type} (after the weights {name})"
            if name in producers and name not in seen:
                seen.add(name)
                names.extend(producers[name].input)
        return f"the operation {node.op_type} (no weights before it)"
    return "an operation"


def _sentence(error: Exception) -> str:
    """The last line of a message whose first ones are places in OpenVINO's source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else type(error).__name__


def _facts(model: Any, precision: str) -> dict[str, Any]:
    operations = Counter(operation.get_type_name() for operation in model.get_ops())
    facts: dict[str, Any] = {"operations": sum(operations.values()) - operations["Constant"], "inference_precision": "the device's own; asked for float32 here"}
    if precision == "int8":
        facts["int8_weights"], facts["quantised_activations"] = _int8_weights(model), operations["FakeQuantize"]
    return facts


def save(model: Any, folder: str | os.PathLike[str], *, half: bool = False) -> Path:
    """Write model.xml and model.bin into a folder under a temporary name, then rename it.

    Args:
        half: store float weights as float16.
    """
    ov = import_openvino("exporting to OpenVINO")
    folder = Path(folder)
    with whole_folder(folder) as temporary, nothing_said():
        temporary.mkdir()
        ov.save_model(model, temporary / "model.xml", compress_to_fp16=half)
    return folder


class OpenVinoEncoder:
    """A folder with IR on the CPU: callable, (N, …) -> (N, D) float32.

    Args:
        folder: holds model.xml and model.bin.
        threads: of one inference.
        precision: that floats are computed in: "f32", "bf16" or "f16" where the CPU has it.

    Raises:
        MissingExtraError: openvino is not installed.
        BundleError: the folder holds no model that OpenVINO reads.
    """

    def __init__(self, folder: str | os.PathLike[str], *, threads: int = 1, precision: str = "f32") -> None:
        ov = import_openvino("running OpenVINO models")
        try:
            model = ov.Core().read_model(Path(folder) / "model.xml")
        except RuntimeError as error:
            raise BundleError(f"{Path(folder).name}: OpenVINO reads no model.xml with model.bin there ({_sentence(error)}); export it again") from error
        hints = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
        self.request = ov.Core().compile_model(model, "CPU", hints).create_infer_request()

    def __call__(self, inputs: np.ndarray, batch: int = 16) -> np.ndarray:
        return np.concatenate([self.request.infer([inputs[i : i + batch]])[0].copy() for i in range(0, len(inputs), batch)])
