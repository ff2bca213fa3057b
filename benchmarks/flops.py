"""Multiply-adds of an ONNX graph's convolutions and matrix products, for one input: what the share of the machine's peak is of."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def gflop(path: Path) -> float | None:
    """Floating-point operations of one input in 10^9 (a multiply-add counts as two); None when it cannot be told.

    It cannot be told without the package onnx, or where shape inference leaves an operand open. Quantised products count like their float
    originals, so an int8 artefact may exceed 100 % of the float32 peak.
    """
    try:
        import onnx
    except ImportError:
        return None
    try:
        model = onnx.load(path, load_external_data=False)
        for value in model.graph.input:
            first = value.type.tensor_type.shape.dim[0]
            if first.dim_param:
                first.dim_value = 1
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
        return _count(inferred.graph) * 2 / 1e9
    except Exception as error:  # a graph that is too new or too odd for the package must not end a measurement
        logger.info("operations of %s not counted: %s", path.name, error)
        return None


def _count(graph: Any) -> int:
    shapes: dict[str, list[int]] = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        shapes[value.name] = [dim.dim_value if dim.HasField("dim_value") else 1 if not index else -1 for index, dim in enumerate(value.type.tensor_type.shape.dim)]
    total = 0
    for node in graph.node:
        if node.op_type in ("Conv", "ConvInteger", "QLinearConv"):
            weight = shapes[node.input[3 if node.op_type == "QLinearConv" else 1]]
            total += _product(shapes[node.output[0]]) * math.prod(weight[1:])
        elif node.op_type in ("MatMul", "MatMulInteger", "QLinearMatMul", "Gemm", "FusedMatMul", "MatMulNBits", "DynamicQuantizeMatMul"):
            inner = shapes[node.input[0]]
            transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
            total += _product(shapes[node.output[0]]) * inner[0 if transposed else -1]
    return total


def _product(shape: list[int]) -> int:
    if any(size < 0 for size in shape):
        raise ValueError(f"an open shape {shape}")
    return math.prod(shape)
