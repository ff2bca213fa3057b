"""How a tower becomes int8: what `mclip compress` found, precision.json keeps, and `mclip export` obeys."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from export.bias_correction import correct_biases
from export.equalize import equalize
from export.fused_attention import fuse_attention
from export.positions import scale_positions
from export.qdq import insert_qdq, layers, tensors
from export.quantize import quantize_blocks, quantize_dynamic
from export.ranges import RANGE_METHODS, tensor_ranges
from export.to_onnx import strip
from runtime.errors import ParityError, RecipeError

FORMS = ("static", "dynamic", "grouped")
CORRECTION_ROWS = 32
QUANTISED = ("QuantizeLinear", "DequantizeLinear", "MatMulInteger", "ConvInteger", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "MatMulNBits")


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Recipe:
    """Everything that decides a tower's int8 graph beside the checkpoint and the calibration rows."""

    form: str
    """"static": ranges measured beforehand, Q/DQ pairs; for towers of convolutions. "dynamic": ranges taken at run time, matrix products alone, attention as one
    node; ONNX Runtime only. "grouped": int8 weights, ranges taken at run time for groups of each token's values; OpenVINO only, nothing to choose."""
    float_layers: tuple[str, ...] = ()
    """Layers of the ONNX graph that compute in floats. The weights of products among them are kept in int8 all the same."""
    ranges: str = "mse"
    """Static: how ranges are chosen, one of `RANGE_METHODS`."""
    alpha: float | None = None
    """Equalisation of what enters matrix products; None: none."""
    positions: bool = False
    """Dynamic: rows of tokens that are always large are scaled on their own (`scale_positions`)."""
    corrected: bool = False
    """Static: biases make up for the mean error of each channel."""

    def __post_init__(self) -> None:
        if self.form not in FORMS or self.ranges not in RANGE_METHODS or not (self.alpha is None or 0 <= self.alpha <= 1):
            raise RecipeError(
                f"an int8 recipe has form '{self.form}', ranges '{self.ranges}' and alpha {self.alpha}; expected one of {', '.join(FORMS)}, "
                f"one of {', '.join(RANGE_METHODS)}, and none or a number from 0 to 1"
            )

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Int8Recipe:
        """Raises RecipeError for what is no recipe."""
        try:
            return cls(**{**found, "float_layers": tuple(str(name) for name in found.get("float_layers", ()))})
        except (TypeError, ValueError, AttributeError) as error:
            raise RecipeError(f"an int8 recipe cannot be read ({error})") from None


def refuse_quantised(model: onnx.ModelProto) -> None:
    """Raises ParityError for a graph that has 8-bit or 4-bit operations already."""
    found = next((node for node in model.graph.node if node.op_type in QUANTISED), None)
    if found is not None:
        raise ParityError(f"the graph is quantised already ({found.op_type} '{found.name}'); quantise the float32 one that it was made from")


def make_int8(model: onnx.ModelProto, rows: np.ndarray, recipe: Int8Recipe, *, symmetric: bool = False) -> onnx.ModelProto:
    """The int8 graph of a float32 one.

    Args:
        model: left alone.
        rows: (N, …) calibration inputs.
        symmetric: static only: the form that NVIDIA's parser takes (`insert_qdq`).

    Raises:
        ParityError: the recipe names layers that the graph does not have, or leaves nothing to quantise, or is of a form that ONNX cannot say.
    """
    refuse_quantised(model)
    if recipe.form == "grouped":
        raise ParityError("an int8 recipe of the form 'grouped' is OpenVINO's own; an ONNX graph is made from a static or a dynamic one")
    known = layers(model)
    missing = [name for name in recipe.float_layers if name not in known]
    if missing:
        raise ParityError(f"precision.json leaves the layer {missing[0]} float, but this graph has none of that name; run mclip compress again with these versions")
    if recipe.positions:
        model, _ = scale_positions(model, rows)
    if recipe.alpha is not None:
        model, _ = equalize(model, rows, alpha=recipe.alpha)  # those that compute in floats too: their weights are stored in int8
    if recipe.form == "dynamic" and not symmetric:
        return quantize_blocks(quantize_dynamic(fuse_attention(model)[0], leave=recipe.float_layers))
    chosen = [name for name in known if name not in recipe.float_layers]
    if not chosen:
        raise ParityError("the int8 recipe leaves every layer float; there is nothing to quantise")
    ranges = tensor_ranges(model, tensors(model), rows, (recipe.ranges,))[recipe.ranges]
    if recipe.corrected:
        model = correct_biases(model, ranges, chosen, rows[:CORRECTION_ROWS])
    products = {node.name for node in model.graph.node if node.op_type != "Conv"}
    stored = [] if symmetric else [name for name in recipe.float_layers if name in products]
    quantised = insert_qdq(model, ranges, chosen, stored=stored, symmetric=symmetric)
    strip(quantised)
    return quantised
