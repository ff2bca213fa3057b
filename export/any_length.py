"""Text graphs that take rows of any number of tokens: a query of eight words is computed as eight, not as the padding around it.

torch's exporter writes the length down in three kinds of places, and so do the graphs that are quantised from its own: constants added to every row (positions, causal
masks), shapes that tensors are brought to, and the input itself. Here each of them learns the length from the tokens. Only towers with a mask compute the same for a row
without its padding (`mobileclip.text_tower`); whether this graph does is tried on it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.to_onnx import OnnxEncoder, serialize
from runtime.text_lengths import by_length, token_counts

DIMENSION = "tokens_in_row"
CLOSE = 1e-4
"""Largest difference of a value of an embedding between a row cut short and the whole one, for graphs that round nothing."""
MASKED = ("Add", "Mul", "Where", "Attention", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")
SHAPED = ("Reshape", "Expand", "Concat", "ConstantOfShape")


def free_length(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """A copy of a text graph, int tokens (batch, T), that takes (batch, n) for 1 <= n <= T; None where the length is written down in some other way, or T is also
    another dimension's size, so that the two cannot be told apart."""
    length = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    if length < 2:
        return None
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    graph.input[0].type.tensor_type.shape.dim[1].dim_param = DIMENSION
    nodes = [helper.make_node("Shape", [graph.input[0].name], ["row_length"], name="row_length", start=1, end=2)]
    for item in [item for item in graph.initializer if length in item.dims]:
        users = [node for node in graph.node if item.name in node.input]
        if not users or any(node.op_type not in MASKED for node in users):
            continue
        axes = [axis for axis, size in enumerate(item.dims) if size == length]
        cut, names = f"{item.name}_cut", [f"{item.name}_{kind}" for kind in ("starts", "ends", "axes")]
        graph.initializer.append(numpy_helper.from_array(np.zeros(len(axes), np.int64), names[0]))
        graph.initializer.append(numpy_helper.from_array(np.array(axes, np.int64), names[2]))
        if len(axes) == 1:
            names[1] = "row_length"
        else:
            nodes.append(helper.make_node("Concat", ["row_length"] * len(axes), [names[1]], name=names[1], axis=0))
        nodes.append(helper.make_node("Slice", [item.name, *names], [cut], name=cut))
        for node in users:
            _replace(node, item.name, cut)
    for item in [item for item in graph.initializer if item.data_type == onnx.TensorProto.INT64 and len(item.dims) == 1]:
        values = numpy_helper.to_array(item).tolist()
        users = [node for node in graph.node if node.op_type in SHAPED and item.name in node.input]
        if length not in values or not users:
            continue
        place = values.index(length)
        pieces = [name for name in (_piece(graph, item.name, "before", values[:place]), "row_length", _piece(graph, item.name, "after", values[place + 1 :])) if name]
        shape = "row_length"
        if len(pieces) > 1:
            shape = f"{item.name}_of_row"
            nodes.append(helper.make_node("Concat", pieces, [shape], name=shape, axis=0))
        for node in users:
            _replace(node, item.name, shape)
    used = {name for node in graph.node for name in node.input} | {name for node in nodes for name in node.input}
    for item in [item for item in graph.initializer if item.name not in used]:
        graph.initializer.remove(item)
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
    del graph.value_info[:]
    return made


def freed(model: onnx.ModelProto, rows: np.ndarray, pad_id: int, *, exact: bool) -> onnx.ModelProto | None:
    """`free_length`, when the graph gives for rows without their padding what the original gives for the whole ones; None otherwise.

    Args:
        rows: (N, T) int32 tokens.
        exact: the values are compared; False for graphs that round activations by what else is in the tensor: those only have to run, and are judged as they run.
    """
    made = free_length(model)
    if made is None:
        return None
    short = rows[token_counts(rows, pad_id) < rows.shape[1]]
    if not len(short):
        return None
    try:
        encoder = OnnxEncoder(serialize(made))
        whole = OnnxEncoder(serialize(model))(short)
        found = by_length(short, pad_id, encoder, whole.shape[1])
        again = encoder(short)
    except Exception:  # ONNX Runtime's exceptions share no base class of their own
        return None
    good = not exact or max(float(np.abs(found - whole).max()), float(np.abs(again - whole).max())) <= CLOSE
    return made if good else None


class ShortRows:
    """An encoder of a graph that takes any length, run as the SDK runs it; `whole` is the encoder itself, which computes the padding too."""

    def __init__(self, whole: Callable[[np.ndarray], np.ndarray], pad_id: int, embed_dim: int) -> None:
        self.whole, self.pad_id, self.embed_dim = whole, pad_id, embed_dim

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return by_length(rows, self.pad_id, self.whole, self.embed_dim)


def _piece(graph: onnx.GraphProto, name: str, which: str, values: list[int]) -> str | None:
    if not values:
        return None
    graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), f"{name}_{which}"))
    return f"{name}_{which}"


def _replace(node: onnx.NodeProto, old: str, new: str) -> None:
    for place, name in enumerate(node.input):
        if name == old:
            node.input[place] = new
