"""Encoders for the NPU of Snapdragon chips: ONNX with Q/DQ pairs throughout, batch 1, that ONNX Runtime's QNN provider takes as one piece.

"int8" (A8W8) has 8-bit activations, except where 8 bits are known to be too few (residual sums, attention scores, the final norm):
those have 16. "a16w8" has 16-bit activations throughout. Weights are int8, one scale per output channel.

The package onnxruntime-qnn brings an emulated Hexagon for x86, by which small towers are judged here (large ones by their Q/DQ pairs as
written, with one row emulated beside), and a compiler, which proves that the file becomes one context for each generation of the chip.
The contexts are dropped: they belong to one generation and one version of Qualcomm's library, and two compilations of the same file
differ in hundreds of bytes. A phone compiles the file when it first loads it. Qualcomm's libraries are proprietary; nothing of them gets
into the file, which ONNX Runtime's own quantiser writes.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.converters import require_packages, silent
from export.draft import Draft, Job
from export.quantize import RowReader
from export.to_onnx import operation_counts, quiet, serialize, strip, with_batch_1, write_onnx
from runtime.errors import ParityError

PRECISIONS = ("int8", "a16w8")
EXTRA = "qnn"
HTP_ARCHS = ("68", "73", "75", "79", "81")  # Snapdragon 888, 8 Gen 2 and X Elite, 8 Gen 3, 8 Elite, 8 Elite Gen 5
EMULATED_PRODUCTS = 2e8  # a pocket tower has tens of millions, 0.1 s a row; MobileCLIP2-S0's towers have 2.4e9 and 3.0e9, 7 to 45 s a row
EMULATED_ROWS = 64
MASKED = -64.0  # enough before a softmax; the towers' own -1e4 would leave 16-bit scores a step of 0.15 and 8-bit ones a step of 39

_PROVIDER = "QNNExecutionProvider"
_QUANTISERS = {"QuantizeLinear", "DequantizeLinear"}


def require() -> None:
    """Raises MissingExtraError where the QNN provider is not installed."""
    require_packages({"onnxruntime_qnn": "onnxruntime-qnn"}, EXTRA, "exporting for Snapdragon NPUs")


def drafts(job: Job, precisions: Sequence[str]) -> Iterator[Draft]:
    """`qnn/<tower>.<precision>.onnx`: tokens int32 (1, T) or pixels float32 (1, 3, H, W) -> embeddings float32 (1, D).

    Facts: `partitions` and `npu_operations` on the NPU, `cpu_operations` beside it (Q/DQ at the border), `context_bytes` for each
    chip generation that the file compiles for, `not_compiled` for the others; where the tower is too large for the emulator to judge it,
    `emulated_cosine` between the two on one row.

    Raises:
        MissingExtraError: onnxruntime-qnn is not installed.
        ParityError: no calibration rows, or the graph does not end in an L2 norm.
    """
    require()
    for precision in precisions:
        job.say(f"quantising the {job.tower} tower for Snapdragon NPUs, {precision}")
        path = f"qnn/{job.tower}.{precision}.onnx"
        model = quantize_npu(job.onnx, job.rows, precision)
        file = write_onnx(model, job.folder / path)
        encoder = judge = NpuEncoder(file)
        facts = {**encoder.facts, **compile_contexts(file)}
        if encoder.emulated and products(model) > EMULATED_PRODUCTS:
            judge = NpuEncoder(file, emulate=False)
            facts["emulated_cosine"] = _cosine(encoder(job.rows[:1]), judge(job.rows[:1]))
        yield Draft(
            tower=job.tower, target="qnn", precision=precision, path=path, run=judge, how=judge.how,
            most_rows=EMULATED_ROWS if judge.emulated else None, facts=facts,
        )  # fmt: skip


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return round(float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b))), 5)


def quantize_npu(model: onnx.ModelProto, calibration: np.ndarray, precision: str) -> onnx.ModelProto:
    """Q/DQ pairs around every operation, so that none is left to the CPU; ranges are the least and largest values over the calibration rows.

    Args:
        model: float32, dynamic batch, ending in the L2 norm of `towers.Encoder`. Not changed.
        calibration: (N, …) inputs of the model.
        precision: one of `PRECISIONS`.

    Raises:
        ParityError: no calibration rows, or the graph does not end in an L2 norm.
    """
    from onnxruntime.quantization import QuantType, quantize
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

    if len(calibration) == 0:
        raise ParityError("quantising for an NPU needs calibration inputs and got none; give pairs with pictures")
    fixed = with_batch_1(model)
    _merge_norm(fixed)
    _soften_masks(fixed)
    prepared = _optimised(fixed)
    with tempfile.TemporaryDirectory() as folder, quiet("root"):
        config = get_qnn_qdq_config(
            prepared,
            RowReader(model.graph.input[0].name, calibration),
            activation_type=QuantType.QUInt8 if precision == "int8" else QuantType.QUInt16,
            weight_type=QuantType.QInt8,
            per_channel=True,
            init_overrides=_overrides(prepared),
        )
        config.extra_options["UseQDQContribOps"] = False  # plain ONNX instead: 16-bit pairs came with opset 21, to which the quantiser goes by itself
        target = Path(folder) / "quantised.onnx"
        quantize(prepared, target, config)
        quantised = onnx.load(target)
    strip(quantised)
    _keep_imports(quantised)
    return quantised


def _merge_norm(model: onnx.ModelProto) -> None:
    """The L2 norm at the end as one LpNormalization, in place: integers hold no squares."""
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    divide = makers[graph.output[0].name]
    bound = makers.get(divide.input[-1])
    length = makers.get(bound.input[0]) if bound is not None else None
    if length is None or [divide.op_type, bound.op_type, length.op_type] != ["Div", "Clip", "ReduceL2"] or length.input[0] != divide.input[0]:
        raise ParityError(f"the graph ends in {divide.op_type} instead of the L2 norm (ReduceL2, Clip, Div) that every encoder ends in")
    for node in (divide, bound, length):
        graph.node.remove(node)
    graph.node.append(helper.make_node("LpNormalization", [divide.input[0]], [graph.output[0].name], name="unit_norm", axis=-1, p=2))


def _soften_masks(model: onnx.ModelProto) -> None:
    """Constants of attention masks to what a softmax needs, in place."""
    from mobileclip import text_tower

    for item in model.graph.initializer:
        if item.data_type == onnx.TensorProto.FLOAT:
            values = numpy_helper.to_array(item)
            if values.size and values.min() <= text_tower.MASKED:
                item.CopyFrom(numpy_helper.from_array(np.where(values <= text_tower.MASKED, np.float32(MASKED), values), item.name))


def _optimised(model: onnx.ModelProto) -> onnx.ModelProto:
    """After ONNX Runtime's basic optimisations (batch norm into convolutions, products with bias to Gemm), still plain ONNX."""
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        ort.InferenceSession(serialize(model), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


def _keep_imports(model: onnx.ModelProto) -> None:
    """Drop the operator sets that the optimiser lists and no operation is from, in place."""
    used = {node.domain for node in model.graph.node}
    kept = [item for item in model.opset_import if item.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _overrides(model: onnx.ModelProto) -> dict[str, list[dict[str, Any]]]:
    """By tensor, where the precision's defaults do not do."""
    from onnxruntime.quantization import QuantType

    found: dict[str, list[dict[str, Any]]] = {}
    for node in model.graph.node:
        if node.op_type == "LayerNormalization":  # with the signed scale that is the default, the NPU refuses it and the text tower splits
            found[node.input[1]] = [{"quant_type": QuantType.QUInt8, "symmetric": False}]
        elif node.op_type == "Add":
            found[node.output[0]] = [{"quant_type": QuantType.QUInt16}]
        elif node.op_type == "LpNormalization":  # its whole range, whatever the calibration rows reached
            found[node.input[0]] = [{"quant_type": QuantType.QUInt16}]
            found[node.output[0]] = [{"quant_type": QuantType.QUInt16, "scale": np.array(1 / 32768, np.float32), "zero_point": np.array(32768, np.uint16)}]
    return found


def products(model: onnx.ModelProto) -> int:
    """Multiplications of one forward pass in convolutions and matrix products; every shape has to be fixed."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    shapes = {value.name: [item.dim_value for item in value.type.tensor_type.shape.dim] for value in (*graph.input, *graph.value_info, *graph.output)}
    shapes |= {item.name: list(item.dims) for item in graph.initializer}
    total = 0
    for node in graph.node:
        if node.op_type == "Conv":
            total += math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])
        elif node.op_type in ("Gemm", "MatMul"):  # rows times columns times what both share, whichever operand is transposed
            first, result = shapes[node.input[0]], shapes[node.output[0]]
            total += math.prod(result) * (math.prod(first[-2:]) // result[-2])
    return total


class NpuEncoder:
    """A Q/DQ file under the QNN provider: callable, (N, …) -> (N, D) float32, one row at a time.

    Where the provider cannot run, or is not to, ONNX Runtime's CPU evaluates the Q/DQ pairs as they are written, in floats (its own
    int8 kernels round and saturate otherwise than an NPU does).

    Attributes:
        how: what evaluates, one clause.
        emulated: whether that is the emulator.
        facts: partitions and operations on the NPU and beside it; empty on the CPU.
    """

    def __init__(self, path: str | os.PathLike[str], *, emulate: bool = True) -> None:
        import onnxruntime as ort

        self.facts: dict[str, Any] = {}
        self.emulated, reason = False, ""
        if emulate:
            try:
                with silent():
                    self.session = _npu_session(path, {"session.record_ep_graph_assignment_info": "1"}, {})
                self.emulated = _device().device.type == ort.OrtHardwareDeviceType.CPU
                self.facts = _assignment(self.session)
                self.how = f"onnxruntime {ort.__version__} with onnxruntime-qnn {_version()}, {'emulated' if self.emulated else 'real'} HTP"
            except Exception as error:  # noqa: BLE001  a library of the maker's, which fails with whatever it likes
                self.emulated, reason = False, f" (no HTP here: {type(error).__name__})"
        if not self.facts:
            options = ort.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = 1
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            self.session = ort.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
            self.how = f"onnxruntime {ort.__version__} on the CPU, Q/DQ as written{reason}"
        self.input_name = self.session.get_inputs()[0].name

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        return np.concatenate([self.session.run(None, {self.input_name: inputs[i : i + 1]})[0] for i in range(len(inputs))])


def compile_contexts(path: str | os.PathLike[str], archs: Sequence[str] | None = None) -> dict[str, Any]:
    """Compile ahead of time for chip generations, on any machine, and drop the results.

    Returns:
        `context_bytes`: {"v75": size, …}; `not_compiled`: {"v68": "2 contexts instead of one" or the kind of error, …} where there are any.
    """
    sizes: dict[str, int] = {}
    failed: dict[str, str] = {}
    for arch in HTP_ARCHS if archs is None else archs:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "context.onnx"
            try:
                with silent():
                    _npu_session(path, {"ep.context_enable": "1", "ep.context_file_path": str(target), "ep.context_embed_mode": "1"}, {"htp_arch": arch})
                contexts = operation_counts(onnx.load(target))["EPContext"]
            except Exception as error:  # noqa: BLE001
                failed[f"v{arch}"] = type(error).__name__
                continue
            if contexts == 1:
                sizes[f"v{arch}"] = target.stat().st_size
            else:
                failed[f"v{arch}"] = f"{contexts} contexts instead of one"
    return {"context_bytes": sizes, **({"not_compiled": failed} if failed else {})}


def _version() -> str:
    import onnxruntime_qnn

    return onnxruntime_qnn.__version__


def _device() -> Any:
    """The device that the provider offers: an NPU where there is one, else the CPU that emulates it."""
    import onnxruntime as ort
    import onnxruntime_qnn

    if all(device.ep_name != _PROVIDER for device in ort.get_ep_devices()):
        ort.register_execution_provider_library(_PROVIDER, onnxruntime_qnn.get_library_path())
    kinds = [ort.OrtHardwareDeviceType.NPU, ort.OrtHardwareDeviceType.CPU]
    found = [device for device in ort.get_ep_devices() if device.ep_name == _PROVIDER and device.device.type in kinds]
    return min(found, key=lambda device: kinds.index(device.device.type))


def _npu_session(path: str | os.PathLike[str], entries: dict[str, str], settings: dict[str, str]) -> Any:
    import onnxruntime as ort
    import onnxruntime_qnn

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    options.add_provider_for_devices([_device()], {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), **settings})
    return ort.InferenceSession(os.fspath(path), options)


def _assignment(session: Any) -> dict[str, Any]:
    """Where the operations of a session lie; Q/DQ pairs are counted on the CPU only."""
    parts = session.get_provider_graph_assignment_info()
    counts = {npu: Counter(node.op_type for part in parts if (part.ep_name == _PROVIDER) is npu for node in part.get_nodes()) for npu in (True, False)}
    return {
        "partitions": sum(part.ep_name == _PROVIDER for part in parts),
        "npu_operations": sum(count for name, count in counts[True].items() if name not in _QUANTISERS),
        "cpu_operations": dict(sorted(counts[False].items())),
    }
