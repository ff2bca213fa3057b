"""int8 ONNX with ONNX Runtime's quantiser: dynamic for matrix products, static with Q/DQ pairs for convolutions.

Convolutions and linear layers become int8, with one weight scale per output channel; residual additions, norms and softmax
stay float. A token table is cut to int8 with one scale per row. Whether the result is worth shipping is not decided here:
`verify` and `latency_gate` measure it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.to_onnx import OnnxEncoder, quiet, serialize, strip
from export.verify import THRESHOLDS, centred_cosines
from runtime.errors import ParityError

FLOAT_CONVOLUTIONS = (3, 6)  # tried in turn until the embeddings are near enough
BLOCK = 128  # inputs that share a scale
BLOCK_4 = 64  # of 4-bit weights: 128 loses half as much again, 32 is larger than 0.16 of float32
SELECTION_MARGIN = 0.005  # few rows select, so they have to be a little better than the threshold


def quantize_tower(model: onnx.ModelProto, calibration: np.ndarray) -> onnx.ModelProto:
    """int8 in the way that suits a tower: matrix products (text) take dynamic ranges; convolutions need ranges calibrated beforehand, and the first
    ones float. How many stay float is decided on a quarter of the calibration rows that gave no ranges, never on what judges the artefact.

    Args:
        model: float32, dynamic batch.
        calibration: (N, …) inputs.
    """
    if not any(node.op_type == "Conv" for node in model.graph.node):
        return quantize_dynamic(model)
    held = max(1, len(calibration) // 4)
    least = THRESHOLDS["lossy"].centred_p1 or 0.0
    expected = OnnxEncoder(serialize(model))(calibration[-held:])
    for count in FLOAT_CONVOLUTIONS:
        quantised = quantize_static(model, calibration[:-held] if len(calibration) > held else calibration, float_convolutions=count)
        if centred_cosines(OnnxEncoder(serialize(quantised))(calibration[-held:]), expected).min() >= least + SELECTION_MARGIN:
            break
    return quantised


def quantize_dynamic(model: onnx.ModelProto, leave: Collection[str] = ()) -> onnx.ModelProto:
    """MatMul and Gemm to int8 weights per channel with activation ranges taken at run time; token tables to int8 per row.

    Weights take seven of the eight bits. Processors without VNNI add pairs of 8-bit products in 16 bits, which saturates: on such a one the demo's text
    tower kept a first percentile of centred cosines of 0.990 with eight bits and 0.999 with seven, at the same speed. Convolutions are left alone:
    ONNX Runtime's ConvInteger is several times slower than its float convolution.

    Args:
        leave: names of nodes that stay float.

    Raises:
        ParityError: there is nothing to quantise.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as quantise

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, source)
        with quiet("root"):
            quantise(source, target, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8, reduce_range=True, nodes_to_exclude=list(leave))
        quantised = onnx.load(target)
    if not any(node.op_type in ("MatMulInteger", "DynamicQuantizeMatMul") for node in quantised.graph.node):
        raise ParityError("dynamic int8 found no matrix product with constant weights to quantise; use static int8 for a tower of convolutions")
    quantize_tables(quantised)
    strip(quantised)
    return quantised


def quantize_blocks(model: onnx.ModelProto, *, bits: int = 8, block: int = BLOCK, tables: bool = False) -> onnx.ModelProto:
    """Weights of the remaining MatMul nodes in blocks of `block` inputs with a scale and a zero point each; activations in int8 per block, taken at run time.

    MatMulNBits of ONNX Runtime. On processors with VNNI such a product takes two thirds of float's time where a dynamic one (`quantize_dynamic`) takes a quarter,
    and loses a tenth as much.

    Args:
        bits: of the weights, 4 or 8.
        tables: token tables too (4 bits alone).

    Returns:
        A copy; unchanged where there is nothing left.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    made = onnx.ModelProto()
    made.CopyFrom(model)
    kinds = ("MatMul", "Gather") if tables else ("MatMul",)
    settings = DefaultWeightOnlyQuantConfig(
        block_size=block, is_symmetric=False, accuracy_level=4, bits=bits, op_types_to_quantize=kinds, quant_axes=(("MatMul", 0), ("Gather", 1))
    )
    with quiet("onnxruntime.quantization.matmul_nbits_quantizer", "root"):
        quantiser = MatMulNBitsQuantizer(made, algo_config=settings)
        quantiser.process()
    made = quantiser.model.model
    strip(made)
    return made


def quantize_four_bit(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights of matrix products and token tables in four bits, blocks of `BLOCK_4`.

    Raises:
        ParityError: less than half of the weights are such.
    """
    made = quantize_blocks(model, bits=4, block=BLOCK_4, tables=True)
    if made.ByteSize() > 0.5 * model.ByteSize():
        raise ParityError("four bits are for matrix products and token tables, and less than half of this tower's weights are such; take int8")
    return made


def quantize_tables(model: onnx.ModelProto, least_rows: int = 256) -> int:
    """Replace, in place, each float table that a Gather reads by rows with an int8 table and a scale per row; returns how many.

    A row's largest component becomes 127, so rare tokens with small rows keep their digits.
    """
    tables = {item.name: item for item in model.graph.initializer if item.data_type == TensorProto.FLOAT and len(item.dims) == 2 and item.dims[0] >= least_rows}
    readers = {name: [node for node in model.graph.node if name in node.input] for name in tables}
    done = 0
    for name, nodes in readers.items():
        if not nodes or any(node.op_type != "Gather" or node.input[0] != name or _axis(node) != 0 for node in nodes):
            continue
        table = numpy_helper.to_array(tables[name])
        scale = np.maximum(np.abs(table).max(axis=1, keepdims=True), 1e-12).astype(np.float32) / 127
        rounded = np.clip(np.rint(table / scale), -127, 127).astype(np.int8)
        model.graph.initializer.remove(tables[name])
        model.graph.initializer.extend([numpy_helper.from_array(rounded, f"{name}_int8"), numpy_helper.from_array(scale, f"{name}_scale")])
        for node in nodes:
            place = list(model.graph.node).index(node)
            index, out = node.input[1], node.output[0]
            model.graph.node.remove(node)
            replacement = [
                helper.make_node("Gather", [f"{name}_int8", index], [f"{out}_int8"], name=f"{out}_rows"),
                helper.make_node("Cast", [f"{out}_int8"], [f"{out}_float"], name=f"{out}_cast", to=TensorProto.FLOAT),
                helper.make_node("Gather", [f"{name}_scale", index], [f"{out}_scale"], name=f"{out}_scales"),
                helper.make_node("Mul", [f"{out}_float", f"{out}_scale"], [out], name=f"{out}_scaled"),
            ]
            for offset, new in enumerate(replacement):
                model.graph.node.insert(place + offset, new)
        done += 1
    return done


def _axis(node: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)


def _convolutions(path: Path) -> list[str]:
    """Names of a file's convolutions from the input on."""
    return [node.name for node in onnx.load(path).graph.node if node.op_type == "Conv"]


class RowReader:
    """Feeds calibration rows one at a time (ONNX Runtime's CalibrationDataReader, by duck type)."""

    def __init__(self, name: str, rows: np.ndarray) -> None:
        self.name, self.rows, self.place = name, rows, 0

    def get_next(self) -> dict[str, np.ndarray] | None:
        if self.place >= len(self.rows):
            return None
        self.place += 1
        return {self.name: self.rows[self.place - 1 : self.place]}

    def rewind(self) -> None:
        self.place = 0


def quantize_static(model: onnx.ModelProto, calibration: np.ndarray, *, float_convolutions: int = 0, symmetric: bool = False) -> onnx.ModelProto:
    """Convolutions and linear layers to int8 with Q/DQ pairs; ranges are the least and largest values over the calibration rows.

    Args:
        model: float32, batch dynamic or 1.
        calibration: (N, …) float32 inputs of the model; real pictures, not noise.
        float_convolutions: how many convolutions from the input on stay float. Channels of the first ones differ most in range,
            and one activation scale cannot serve them all: on an EfficientNet-lite0, three lift the mean cosine from 0.71 to 0.98.
        symmetric: int8 activations around zero and float biases, the form that NVIDIA's parser takes; slower in ONNX Runtime.

    Raises:
        ParityError: no calibration rows, or nothing to quantise.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantise
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if len(calibration) == 0:
        raise ParityError("static int8 needs calibration inputs and got none; give pairs with pictures")
    extra: dict[str, Any] = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False} if symmetric else {}
    with tempfile.TemporaryDirectory() as folder:
        source, prepared, target = (Path(folder) / f"{name}.onnx" for name in ("float", "prepared", "int8"))
        onnx.save(model, source)
        with quiet("root"):
            # Symbolic shape inference fails on the dynamo exporter's Expand; ONNX's own is enough here.
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            quantise(
                prepared,
                target,
                RowReader(model.graph.input[0].name, calibration),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "MatMul", "Gemm", "Clip", "Relu"],
                nodes_to_exclude=_convolutions(prepared)[:float_convolutions],
                per_channel=True,
                activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                extra_options=extra,
            )
        quantised = onnx.load(target)
    if not any(node.op_type == "DequantizeLinear" for node in quantised.graph.node):
        raise ParityError("static int8 found nothing to quantise in the graph")
    strip(quantised)
    return quantised
