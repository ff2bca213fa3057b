"""Take the mean error that rounding leaves in each channel out of the biases (Nagel et al. 2019, section 4.2, measured on data).

Rounded weights and clipped activations shift a layer's output on average, and a shift adds up over layers where noise cancels. Depthwise convolutions shift most:
nine weights a channel have no law of large numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx

from export.graph import Graph
from export.qdq import insert_qdq
from export.ranges import Range, channel_means


def correct_biases(model: onnx.ModelProto, ranges: Mapping[str, Range], chosen: Collection[str], rows: np.ndarray) -> onnx.ModelProto:
    """A float copy whose chosen layers have biases that make up for what int8 does to their mean outputs.

    Args:
        model: float32.
        ranges: as `insert_qdq` takes them.
        chosen: names of layers that are to be int8; those without a bias of their own are left alone.
        rows: inputs that means are taken over.

    Layers are corrected one after the other from the input on, each behind the corrected ones before it. Several at once would each take out what comes from
    before them too: in groups of eight an EfficientNet-lite0 went from a centred cosine of 0.98 to 0.1.
    """
    corrected = onnx.ModelProto()
    corrected.CopyFrom(model)
    graph = Graph(corrected)
    layers = [node for node in corrected.graph.node if node.name in chosen and len(node.input) > 2 and graph.constant(node.input[2]) is not None]
    if not layers:
        return corrected
    axes = {node.output[0]: 1 if node.op_type == "Conv" else -1 for node in layers}
    wanted = channel_means(model, list(axes), rows, axes)
    for node in layers:
        (found,) = channel_means(insert_qdq(corrected, ranges, chosen), [node.output[0]], rows, axes).values()
        graph = Graph(corrected)
        bias = graph.constant(node.input[2])
        assert bias is not None
        graph.replace_constant(node, 2, bias + (wanted[node.output[0]] - found).astype(bias.dtype))
    return corrected
