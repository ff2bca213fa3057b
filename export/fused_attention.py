"""Attention as one node: ONNX's own Attention (opset 23) in place of the twenty that the exporter writes for a packed qkv projection.

Heads are then neither transposed nor copied. On the sample's text tower (24 tokens, 12 heads) that is a tenth of
the time that is left after the products became int8. Float graphs keep opset 20 and plain nodes, which every converter reads; this is for graphs that only
ONNX Runtime runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.graph import Graph

OPSET = 23
PACKED = [2, 0, 3, 1, 4]  # (B, T, 3, heads, D) to (3, B, heads, T, D)


@dataclass(frozen=True, slots=True)
class _Found:
    """One attention: from the packed projections to the mixed heads side by side."""

    packed: str  # (B, T, 3 * width)
    mask: str | None  # what is added to the logits
    mixed: str  # (B, T, width)
    tokens: int
    heads: int
    head_dim: int
    scale: float


def fuse_attention(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """A copy with each attention over a packed qkv projection as one node, at opset 23 where there is one.

    Returns:
        The copy, and how many were found. Attentions of another build are left as they are.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = Graph(made)
    attentions = [found for node in made.graph.node if node.op_type == "Softmax" and (found := _match(graph, node)) is not None]
    if not attentions:
        return made, 0
    whole: dict[str, str] = {}  # masks that say something for every query, made from those that say the same for all
    for number, found in enumerate(attentions):
        width = found.heads * found.head_dim
        sizes = f"attention_{number}_sizes"
        made.graph.initializer.append(numpy_helper.from_array(np.full(3, width, np.int64), sizes))
        parts = [f"attention_{number}_{part}" for part in "qkv"]
        nodes = [helper.make_node("Split", [found.packed, sizes], parts, name=f"attention_{number}_split", axis=-1)]
        inputs = list(parts)
        if found.mask is not None:
            if found.mask not in whole:
                whole[found.mask] = _for_every_query(made, nodes, graph, found)
            inputs.append(whole[found.mask])
        nodes.append(
            helper.make_node("Attention", inputs, [f"attention_{number}_mixed"], name=f"attention_{number}", q_num_heads=found.heads, kv_num_heads=found.heads, scale=found.scale)
        )
        # A reshape that does nothing but hide the batch's size: where ONNX Runtime (1.32) knows that a sum's two sides have one shape, it joins sum and layer norm
        # into a node that takes three times as long as the two.
        made.graph.initializer.append(numpy_helper.from_array(np.array([-1, found.tokens, width], np.int64), f"attention_{number}_shape"))
        nodes.append(helper.make_node("Reshape", [f"attention_{number}_mixed", f"attention_{number}_shape"], [found.mixed], name=f"attention_{number}_reshape"))
        producer = graph.producer(found.mixed)
        assert producer is not None
        place = list(made.graph.node).index(producer)
        made.graph.node.remove(producer)
        for node in reversed(nodes):
            made.graph.node.insert(place, node)
    _drop_dead(made)
    for opset in made.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = max(OPSET, opset.version)
    del made.graph.value_info[:]
    return made, len(attentions)


def _match(graph: Graph, softmax: onnx.NodeProto) -> _Found | None:
    """The attention around a softmax; None for any other build than the exporter's."""
    mixing = _only_reader(graph, softmax, "MatMul")
    turned = _only_reader(graph, mixing, "Transpose")
    joined = _only_reader(graph, turned, "Reshape")
    if mixing is None or turned is None or joined is None or mixing.input[0] != softmax.output[0] or _ints(turned, "perm") != [0, 2, 1, 3]:
        return None
    logits, mask = graph.producer(softmax.input[0]), None
    if logits is not None and logits.op_type == "Add":
        sides = [(logits.input[0], logits.input[1]), (logits.input[1], logits.input[0])]
        products = [(product, other) for name, other in sides if (product := graph.producer(name)) is not None and product.op_type == "MatMul"]
        if len(products) != 1:
            return None
        logits, mask = products[0]
    if logits is None or logits.op_type != "MatMul":
        return None
    reach = [_origin(graph, name) for name in (logits.input[0], logits.input[1], mixing.input[1])]
    found = [one for one in reach if one is not None]
    if len(found) != 3 or len({split.output[0] for split, _, _ in found}) != 1 or [index for _, index, _ in found] != [0, 1, 2]:
        return None
    split = found[0][0]
    shaped = graph.producer(split.input[0])
    target = graph.constant(shaped.input[1]) if shaped is not None and shaped.op_type == "Reshape" else None
    if shaped is None or target is None or len(target) != 5 or target[1] < 1 or target[2] != 3 or _ints(split, "perm") != PACKED:
        return None
    scale = math.prod(scale for _, _, scale in found)
    return _Found(packed=shaped.input[0], mask=mask, mixed=joined.output[0], tokens=int(target[1]), heads=int(target[3]), head_dim=int(target[4]), scale=scale)


def _origin(graph: Graph, name: str) -> tuple[onnx.NodeProto, int, float] | None:
    """Follow queries, keys or values back to the transpose of the packed projections: that node, which third, and the factor on the way."""
    scale, index = 1.0, None
    for _ in range(12):
        node = graph.producer(name)
        if node is None:
            return None
        if node.op_type == "Transpose" and _ints(node, "perm") == PACKED:
            return None if index is None else (node, index, scale)
        if node.op_type == "Mul":
            factor = graph.constant(node.input[1])
            if factor is None or factor.size != 1:
                return None
            scale *= float(factor.reshape(()))
        elif node.op_type in ("Slice", "Gather"):
            start = graph.constant(node.input[1])
            if start is None or start.size != 1:
                return None
            index = int(start.reshape(()))
        elif node.op_type not in ("Squeeze", "Reshape", "Transpose"):
            return None
        name = node.input[0]
    return None


def _for_every_query(model: onnx.ModelProto, nodes: list[onnx.NodeProto], graph: Graph, found: _Found) -> str:
    """ONNX Runtime wants a mask with a row for every query; one that is the same for all of them, (B, 1, 1, T), is spread by adding zeros."""
    assert found.mask is not None
    constant = graph.constant(found.mask)
    if constant is not None and constant.shape[-2:] == (found.tokens, found.tokens):
        return found.mask
    zeros, name = f"{found.mask}_rows", f"{found.mask}_for_every_query"
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((found.tokens, 1), np.float32), zeros))
    nodes.append(helper.make_node("Add", [found.mask, zeros], [name], name=name))
    return name


def _only_reader(graph: Graph, node: onnx.NodeProto | None, kind: str) -> onnx.NodeProto | None:
    if node is None or graph.is_output(node.output[0]):
        return None
    readers = graph.readers(node.output[0])
    return readers[0] if len(readers) == 1 and readers[0].op_type == kind else None


def _ints(node: onnx.NodeProto, name: str) -> list[int]:
    return next((list(found.ints) for found in node.attribute if found.name == name), [])


def _drop_dead(model: onnx.ModelProto) -> None:
    """Remove nodes whose outputs nobody reads, and constants likewise."""
    read = {value.name for value in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if any(name in read for name in node.output):
            kept.append(node)
            read.update(node.input)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    constants = [item for item in model.graph.initializer if item.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants)
