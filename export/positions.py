"""Tokens that are always large, scaled on their own: text transformers park attention on their first token, and its activations are many times the others'.

One int8 scale a tensor then leaves the other tokens a few of its steps. Prefix registers move such outliers into tokens that are added for them; here the token is
there already, always in the same place, so its row is divided by a constant before a product and the row of the result is multiplied by it: exact, without training,
at the price of one multiplication behind the product (the one before it is shared with `export.equalize`). On the sample's text tower the first token is 3 to 6 times
as large as the median one in what enters the feed-forward layers; scaled, a fifth of what int8 loses comes back, for a fifteenth of its time.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.graph import Graph
from export.qdq import weight_axis
from export.ranges import channel_maxima

LEAST = 2.0  # times the median position: smaller ones are left alone


def scale_positions(model: onnx.ModelProto, rows: np.ndarray) -> tuple[onnx.ModelProto, int]:
    """A copy whose products see positions of like size.

    Args:
        model: float32; left alone.
        rows: (N, T) calibration inputs, whose maxima by position decide.

    Returns:
        The copy, and how many products have a position that is `LEAST` times the median one; 0 where nothing was changed.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = Graph(made)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in made.graph.node:
        if node.op_type == "MatMul" and weight_axis(graph, node) is not None:
            readers.setdefault(node.input[0], []).append(node)
    tokens = rows.shape[1] if rows.ndim == 2 else 0
    three = [name for name, value in _ranks(model).items() if name in readers and value == 3]
    found = channel_maxima(model, sorted(three), rows, axis=1) if tokens > 1 else {}
    done = 0
    for name, most in found.items():
        if len(most) != tokens:
            continue
        factor = most / max(float(np.median(most)), 1e-12)
        factor = np.where(factor >= LEAST, factor, 1.0).astype(np.float32)[:, None]  # (T, 1)
        if (factor == 1).all():
            continue
        down = f"{name}_positions"
        made.graph.initializer.extend([numpy_helper.from_array(1 / factor, f"{down}_down"), numpy_helper.from_array(factor, f"{down}_up")])
        place = min(list(made.graph.node).index(node) for node in readers[name])
        made.graph.node.insert(place, helper.make_node("Mul", [name, f"{down}_down"], [down], name=down))
        for node in readers[name]:
            raw, out = f"{node.output[0]}_raw", node.output[0]
            node.input[0], node.output[0] = down, raw
            made.graph.node.insert(list(made.graph.node).index(node) + 1, helper.make_node("Mul", [raw, f"{down}_up"], [out], name=f"{raw}_up"))
            done += 1
    return made, done


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    """Name of a value to its number of dimensions, where shape inference knows it."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {item.name: len(item.type.tensor_type.shape.dim) for item in (*inferred.value_info, *inferred.input) if item.type.tensor_type.HasField("shape")}
