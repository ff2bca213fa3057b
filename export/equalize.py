"""Move outliers of activations into weights, so that one int8 scale serves a whole tensor (SmoothQuant, Xiao et al. 2023, section 4.1).

What enters a matrix product is divided by a factor per channel, and the rows of its weights are multiplied by it: the product stays the same to float32's
rounding. Where a layer norm alone feeds the products, the division goes into its gain and offset and costs nothing; elsewhere a multiplication per channel is
inserted, and whether its time pays is for the caller to measure.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.graph import Graph
from export.ranges import channel_maxima

LEAST = 1e-3
MOST = 1e4  # of a factor: beyond it float32's rounding of the product begins to show


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What was moved. `peak_before` and `peak_after`: largest over median channel maximum, the worst tensor; 1 means that all channels need the same scale."""

    folded: tuple[str, ...]
    """Products whose factors went into the layer norm before them."""
    multiplied: tuple[str, ...]
    """Products that got a multiplication per channel."""
    peak_before: float
    peak_after: float

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def equalize(model: onnx.ModelProto, rows: np.ndarray, *, alpha: float) -> tuple[onnx.ModelProto, Report]:
    """Equalise the inputs of all products with constant weights (MatMul, Gemm).

    Args:
        model: float32; left alone.
        rows: (N, …) inputs that channel maxima are taken over.
        alpha: how much of the difficulty goes to the weights: 0 gives none of it, 1 makes the activations' channels alike.

    Returns:
        The changed copy, and what was done.

    Example:
        >>> smooth, report = equalize(model, rows, alpha=0.6)        # doctest: +SKIP
        >>> int8 = quantize_dynamic(smooth)                          # doctest: +SKIP
    """
    assert 0 <= alpha <= 1
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = Graph(changed)
    groups: dict[str, list[onnx.NodeProto]] = {}
    for node in changed.graph.node:
        if node.op_type in ("MatMul", "Gemm") and _weights(graph, node) is not None:
            groups.setdefault(node.input[0], []).append(node)
    maxima = channel_maxima(model, sorted(groups), rows, axis=-1)
    folded: list[str] = []
    multiplied: list[str] = []
    before = after = 1.0
    for name, nodes in groups.items():
        most = maxima[name]
        peak = _peak(most)
        before, norm = max(before, peak), graph.producer(name)
        absorbs = norm is not None and norm.op_type == "LayerNormalization" and norm.output[0] == name and len(graph.readers(name)) == len(nodes)
        matrices = [weights for node in nodes if (weights := _weights(graph, node)) is not None]
        largest = np.max([np.abs(weights).max(axis=1) for weights in matrices], axis=0)
        factor = _factors(most, largest, alpha)
        for node in nodes:
            _scale_rows(graph, node, factor)
        if absorbs:
            assert norm is not None
            for index in range(1, len(norm.input)):
                graph.replace_constant(norm, index, graph.constant(norm.input[index]) / factor)
            folded += [node.name for node in nodes]
        elif norm is not None and norm.op_type == "Mul" and len(graph.readers(name)) == len(nodes) and (constant := graph.constant(norm.input[1])) is not None:
            graph.replace_constant(norm, 1, (constant / factor).astype(np.float32))  # (T, 1) of export.positions becomes (T, C)
            multiplied += [node.name for node in nodes]
        else:
            _divide(graph, name, nodes, factor)
            multiplied += [node.name for node in nodes]
        after = max(after, _peak(most / factor))
    return changed, Report(folded=tuple(folded), multiplied=tuple(multiplied), peak_before=before, peak_after=after)


def _peak(maxima: np.ndarray) -> float:
    alive = maxima[maxima > 0]
    return float(alive.max() / np.median(alive)) if len(alive) else 1.0


def _factors(activations: np.ndarray, weights: np.ndarray, alpha: float) -> np.ndarray:
    """(C,) max|x|^alpha / max|w|^(1 - alpha), scaled to a geometric mean of 1; 1 where all weights are zero.

    A channel that no calibration row moved counts as one that moves `LEAST` as far as the farthest. Its weights may be anything, training did not see them
    either, and one of them a hundred times as large as the rest sets the scale for all: a projector of the sample's teacher lost a quarter of its signal so.
    """
    activations = np.maximum(activations, LEAST * activations.max(initial=0.0))
    alive = (activations > 0) & (weights > 0)
    if not alive.any():
        return np.ones_like(activations)
    logs = np.zeros(len(activations))
    logs[alive] = alpha * np.log(activations[alive].astype(np.float64)) - (1 - alpha) * np.log(weights[alive].astype(np.float64))
    logs[alive] -= logs[alive].mean()
    return np.exp(np.clip(logs, -np.log(MOST), np.log(MOST))).astype(np.float32)


def _transposed(node: onnx.NodeProto) -> bool:
    return any(attribute.name == "transB" and attribute.i for attribute in node.attribute)


def _weights(graph: Graph, node: onnx.NodeProto) -> np.ndarray | None:
    """(in, out) constant weights of a product; None where they are computed, are no matrix, or the input is transposed."""
    array = graph.constant(node.input[1])
    if array is None or array.ndim != 2 or any(attribute.name == "transA" and attribute.i for attribute in node.attribute):
        return None
    return array.T if _transposed(node) else array


def _scale_rows(graph: Graph, node: onnx.NodeProto, factor: np.ndarray) -> None:
    weights = _weights(graph, node)
    assert weights is not None
    scaled = weights * factor[:, None]
    graph.replace_constant(node, 1, np.ascontiguousarray(scaled.T if _transposed(node) else scaled))


def _divide(graph: Graph, name: str, nodes: list[onnx.NodeProto], factor: np.ndarray) -> None:
    """Insert name / factor before the products that read it."""
    new, constant = f"{name}_equalised", f"{name}_factors"
    graph.model.graph.initializer.append(numpy_helper.from_array((1 / factor).astype(np.float32), constant))
    place = min(list(graph.model.graph.node).index(node) for node in nodes)
    graph.model.graph.node.insert(place, helper.make_node("Mul", [name, constant], [new], name=f"{nodes[0].name}_equalise"))
    for node in nodes:
        node.input[0] = new
