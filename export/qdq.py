"""Q/DQ pairs around chosen layers of an ONNX graph: int8 where a layer is named, float everywhere else.

A chosen convolution reads an int8 input, has int8 weights with a scale per output channel and writes an int8 output, behind its activation where one follows: that
is what integer kernels want to see. A chosen product (MatMul, Gemm) writes floats. What another layer reads of the same tensors is decided by that layer, so
residual sums, norms and softmax stay float.

ONNX Runtime (1.20 and later) quantises the weights of a float convolution by itself, with one scale for all channels, where its input is dequantised: an
EfficientNet-lite0 with all but one depthwise convolution in int8 fell to a mean centred cosine of 0.6 by that, from 0.97. It leaves alone what is dequantised
with a scale per channel, so that is what a float layer reads here: a vector of equal scales, the same numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.graph import Graph
from export.ranges import LEVELS, Range
from runtime.errors import ParityError

LAYERS = ("Conv", "MatMul", "Gemm")
ACTIVATIONS = ("Relu", "Clip")
LARGEST_BIAS = 2.0**30  # an int32 bias is added to a sum of products, so it keeps clear of the end


def layers(model: onnx.ModelProto) -> list[str]:
    """Names of the layers that can be quantised, from the input on: convolutions and products with constant weights."""
    graph = Graph(model)
    return [node.name for node in model.graph.node if node.op_type in LAYERS and weight_axis(graph, node) is not None]


def weight_axis(graph: Graph, node: onnx.NodeProto) -> int | None:
    """The output channels' axis of a layer's weights; None for what is no layer of constant weights."""
    weights = graph.constant(node.input[1])
    if weights is None or weights.dtype != np.float32:
        return None
    if node.op_type == "Conv":
        return 0
    if weights.ndim != 2 or attribute(node, "transA", 0):
        return None
    return 0 if attribute(node, "transB", 0) else 1


def attribute(node: onnx.NodeProto, name: str, default: object) -> object:
    """A node's attribute, or what it is when left out."""
    return next((helper.get_attribute_value(found) for found in node.attribute if found.name == name), default)


def output_of(graph: Graph, node: onnx.NodeProto) -> str:
    """The tensor that a convolution's int8 output is: behind the activation that alone reads it, else its own."""
    readers = graph.readers(node.output[0])
    if len(readers) == 1 and readers[0].op_type in ACTIVATIONS and not graph.is_output(node.output[0]):
        return readers[0].output[0]
    return node.output[0]


def tensors(model: onnx.ModelProto) -> list[str]:
    """Names of all tensors that may get a Q/DQ pair: inputs and outputs of the layers."""
    graph = Graph(model)
    found: dict[str, None] = {}
    for node in model.graph.node:
        if node.op_type in LAYERS and weight_axis(graph, node) is not None:
            found[node.input[0]] = None
            if node.op_type == "Conv":
                found[output_of(graph, node)] = None
    return list(found)


def insert_qdq(
    model: onnx.ModelProto, ranges: Mapping[str, Range], chosen: Collection[str], *, stored: Collection[str] = (), symmetric: bool = False
) -> onnx.ModelProto:
    """A copy whose chosen layers compute in int8.

    Args:
        model: float32.
        ranges: of every tensor of `tensors`.
        chosen: names of layers.
        stored: names of further layers that compute in floats, but whose weights are kept in int8.
        symmetric: int8 activations around zero and float biases, the form that NVIDIA's parser takes; otherwise uint8 activations and int32 biases.

    Raises:
        ParityError: a name that is no layer.
    """
    unknown = (set(chosen) | set(stored)) - set(layers(model))
    if unknown:
        raise ParityError(f"'{sorted(unknown)[0]}' is no layer with constant weights of this graph; expected names as of export.qdq.layers")
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = Graph(made)
    scales: dict[str, np.float32] = {}
    constants: dict[str, np.ndarray] = {}

    def pair(name: str) -> list[onnx.NodeProto]:
        scale, zero = _scale(ranges[name], symmetric)
        scales[name] = scale
        constants[f"{name}_scale"], constants[f"{name}_zero"] = np.asarray(scale, np.float32), zero
        parameters = [f"{name}_scale", f"{name}_zero"]
        return [
            helper.make_node("QuantizeLinear", [name, *parameters], [f"{name}_q"], name=f"{name}_QuantizeLinear"),
            helper.make_node("DequantizeLinear", [f"{name}_q", *parameters], [f"{name}_dq"], name=f"{name}_DequantizeLinear"),
        ]

    picked = [node for node in made.graph.node if node.name in chosen]
    written = {output_of(graph, node) for node in picked if node.op_type == "Conv" and not graph.is_output(output_of(graph, node))}
    paired = {node.input[0] for node in picked} | written
    nodes: list[onnx.NodeProto] = []
    for value in made.graph.input:
        if value.name in paired:
            nodes += pair(value.name)
    for node in made.graph.node:
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        for index, name in enumerate(node.input):
            if name in written or (index == 0 and node.name in chosen):
                copied.input[index] = f"{name}_dq"
        if node.name not in chosen and node.op_type in LAYERS and node.input[0] in written and weight_axis(graph, node) is not None:
            nodes += _vector(graph, node, constants)
            copied.input[0] = f"{node.name}_dq"
        if node.name in chosen:
            nodes += _weights(graph, node, copied, constants, None if symmetric else scales[node.input[0]])
        elif node.name in stored:
            nodes += _weights(graph, node, copied, constants, None)
        nodes.append(copied)
        for name in node.output:
            if name in paired:
                nodes += pair(name)
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    made.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    _drop_unread(made)
    return made


def _vector(graph: Graph, node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> list[onnx.NodeProto]:
    """DequantizeLinear for a float layer's input with equal scales by channel."""
    weights, name = graph.constant(node.input[1]), node.input[0]
    assert weights is not None
    channels = weights.shape[1] * int(attribute(node, "group", 1)) if node.op_type == "Conv" else weights.shape[1 - weight_axis(graph, node)]  # type: ignore[call-overload, operator]
    scale, zero = constants[f"{name}_scale"], constants[f"{name}_zero"]
    constants[f"{node.name}_scale"], constants[f"{node.name}_zero"] = np.full(channels, scale, np.float32), np.full(channels, zero, zero.dtype)
    axis = 1 if node.op_type != "MatMul" else -1
    parameters = [f"{node.name}_scale", f"{node.name}_zero"]
    return [helper.make_node("DequantizeLinear", [f"{name}_q", *parameters], [f"{node.name}_dq"], name=f"{node.name}_DequantizeLinear", axis=axis)]


def _scale(found: Range, symmetric: bool) -> tuple[np.float32, np.ndarray]:
    low, high = min(found[0], 0.0), max(found[1], 0.0)
    if symmetric:
        return np.float32(max(-low, high, 1e-8) / 127), np.asarray(0, np.int8)
    scale = np.float32(max(high - low, 1e-8) / LEVELS)
    return scale, np.asarray(np.clip(np.rint(-low / scale), 0, LEVELS), np.uint8)


def _weights(
    graph: Graph, node: onnx.NodeProto, copied: onnx.NodeProto, constants: dict[str, np.ndarray], input_scale: np.float32 | None
) -> list[onnx.NodeProto]:
    """DequantizeLinear nodes for a layer's weights, and for its bias where the scale of the input is given; the layer is made to read them."""
    axis, weights = weight_axis(graph, node), graph.constant(node.input[1])
    assert axis is not None
    assert weights is not None
    others = tuple(other for other in range(weights.ndim) if other != axis)
    scale = np.maximum(np.abs(weights).max(axis=others), 1e-12).astype(np.float32) / np.float32(127)
    bias = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    integer_bias = bias is not None and input_scale is not None and bias.ndim == 1 and len(bias) == len(scale) and attribute(node, "beta", 1.0) == 1.0
    if integer_bias:
        assert bias is not None
        assert input_scale is not None
        scale = np.maximum(scale, np.abs(bias) / (input_scale * np.float32(LARGEST_BIAS))).astype(np.float32)
    shape = [-1 if other == axis else 1 for other in range(weights.ndim)]
    name = f"{node.name}_weights"
    constants[f"{name}_q"] = np.clip(np.rint(weights / scale.reshape(shape)), -127, 127).astype(np.int8)
    constants[f"{name}_scale"], constants[f"{name}_zero"] = scale, np.zeros(len(scale), np.int8)
    made = [helper.make_node("DequantizeLinear", [f"{name}_q", f"{name}_scale", f"{name}_zero"], [f"{name}_dq"], name=f"{name}_DequantizeLinear", axis=axis)]
    copied.input[1] = f"{name}_dq"
    if integer_bias:
        assert bias is not None
        assert input_scale is not None
        name = f"{node.name}_bias"
        constants[f"{name}_scale"] = input_scale * scale
        constants[f"{name}_q"] = np.rint(bias / constants[f"{name}_scale"].astype(np.float64)).astype(np.int32)
        constants[f"{name}_zero"] = np.zeros(len(scale), np.int32)
        made.append(helper.make_node("DequantizeLinear", [f"{name}_q", f"{name}_scale", f"{name}_zero"], [f"{name}_dq"], name=f"{name}_DequantizeLinear", axis=0))
        copied.input[2] = f"{name}_dq"
    return made


def _drop_unread(model: onnx.ModelProto) -> None:
    """Remove constants that nothing reads any more."""
    read = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    kept = [item for item in model.graph.initializer if item.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
