"""int8 graphs of our own: where Q/DQ pairs go, which ranges they cover, what equalisation and bias correction do, and what a recipe may say."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from export.bias_correction import correct_biases
from export.equalize import equalize
from export.fused_attention import fuse_attention
from export.graph import Graph
from export.int8_recipe import Int8Recipe, make_int8
from export.positions import scale_positions
from export.precision_file import Precisions, read_precisions
from export.qdq import insert_qdq, layers, tensors
from export.quantize import quantize_static
from export.ranges import LEVELS, METHODS, RANGE_METHODS, channel_means, tensor_ranges
from export.to_onnx import OnnxEncoder, export_onnx, serialize
from export.towers import Encoder
from export.verify import centred_cosines
from mobileclip.config import TextConfig
from mobileclip.text_tower import TextTower
from runtime.errors import CheckpointError, ParityError, RecipeError


class Convolutions(nn.Module):
    """A mobile tower in small: a dense convolution, a depthwise one whose channels differ a hundredfold, a residual sum, a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 8)
        with torch.no_grad():
            self.depthwise.weight *= torch.logspace(-1, 1, 16).reshape(16, 1, 1, 1)
            self.pointwise.weight /= torch.logspace(-1, 1, 16).reshape(1, 16, 1, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        first = torch.relu(self.stem(pixels))
        return self.head((first + self.pointwise(torch.relu(self.depthwise(first)))).mean((2, 3)))


class Products(nn.Module):
    """Two products behind a layer norm with two outlying channels, and one behind a Gelu."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.left, self.right, self.out = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8)
        with torch.no_grad():
            self.norm.weight[[3, 17]] = 60.0
            self.left.weight[5] *= 50

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.out(nn.functional.gelu(self.left(x)) + self.right(x)).mean(1)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(24, 3, 16, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def convolutions(pixels) -> onnx.ModelProto:
    torch.manual_seed(0)
    return export_onnx(Encoder(Convolutions().eval(), "image"), pixels)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(24, 5, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def products(rows) -> onnx.ModelProto:
    torch.manual_seed(0)
    return export_onnx(Encoder(Products().eval(), "image"), rows)


def embed(model: onnx.ModelProto, rows: np.ndarray) -> np.ndarray:
    return OnnxEncoder(serialize(model))(rows)


def ranges_of(model: onnx.ModelProto, rows: np.ndarray, method: str = "minmax"):
    return tensor_ranges(model, tensors(model), rows, (method,))[method]


def counts(model: onnx.ModelProto) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in model.graph.node:
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def far(model: onnx.ModelProto, exact: onnx.ModelProto, rows: np.ndarray) -> float:
    return float(1 - centred_cosines(embed(model, rows), embed(exact, rows)).mean())


# ------------------------------------------------------------------------------------------- Q/DQ pairs


def test_a_chosen_layer_has_int8_weights_within_half_a_step(convolutions, pixels):
    name = layers(convolutions)[1]
    made = insert_qdq(convolutions, ranges_of(convolutions, pixels), [name])
    constants = {item.name: numpy_helper.to_array(item) for item in made.graph.initializer}
    (weights,) = [numpy_helper.to_array(item) for item in convolutions.graph.initializer if item.dims == [16, 1, 3, 3]]
    whole, scale = constants[f"{name}_weights_q"], constants[f"{name}_weights_scale"]
    assert whole.dtype == np.int8
    assert scale.shape == (16,)
    error = np.abs(whole * scale.reshape(-1, 1, 1, 1) - weights)
    assert (error <= scale.reshape(-1, 1, 1, 1) * 0.5001).all()
    assert np.abs(whole).reshape(16, -1).max(axis=1).min() == 127  # a scale per channel: each uses the whole range
    assert counts(made)["QuantizeLinear"] == 2  # its input, its output behind the activation
    onnx.checker.check_model(made, full_check=True)


def test_nothing_chosen_changes_nothing(convolutions, pixels):
    assert serialize(insert_qdq(convolutions, ranges_of(convolutions, pixels), [])) == serialize(convolutions)


@given(st.sets(st.integers(0, 3)))
@settings(deadline=None, max_examples=16)
def test_any_choice_of_layers_is_near_the_float_graph(convolutions, pixels, places):
    chosen = [layers(convolutions)[place] for place in sorted(places)]
    made = insert_qdq(convolutions, ranges_of(convolutions, pixels), chosen)
    onnx.checker.check_model(made, full_check=True)
    assert far(made, convolutions, pixels) < 0.04
    assert sum(item.data_type == TensorProto.INT8 and len(item.dims) in (2, 4) for item in made.graph.initializer) == len(chosen)


def test_residual_sums_and_norms_stay_float(convolutions, pixels):
    made = insert_qdq(convolutions, ranges_of(convolutions, pixels), layers(convolutions))
    makers = {name: node.op_type for node in made.graph.node for name in node.output}
    (add,) = [node for node in made.graph.node if node.op_type == "Add"]
    assert {makers[name] for name in add.input} == {"DequantizeLinear"}
    readers = [node.op_type for node in made.graph.node if add.output[0] in node.input]
    assert readers == ["ReduceMean"]  # its sum is not rounded before the mean


def test_a_float_layer_behind_an_int8_one_keeps_its_weights_under_onnx_runtime(convolutions, pixels):
    """ONNX Runtime would cut the float layer's weights to int8 with one scale for all channels (module docstring of export.qdq)."""
    stem, depthwise = layers(convolutions)[:2]
    made = insert_qdq(convolutions, ranges_of(convolutions, pixels), [stem])
    results = {}
    for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
        options = ort.SessionOptions()
        options.graph_optimization_level, options.intra_op_num_threads = level, 1
        session = ort.InferenceSession(serialize(made), options, providers=["CPUExecutionProvider"])
        results[level] = session.run(None, {session.get_inputs()[0].name: pixels})[0]
    plain, optimised = results.values()
    assert np.abs(plain - optimised).max() < 0.01
    assert depthwise not in [node.name for node in made.graph.node if "weights_dq" in " ".join(node.input)]


def test_symmetric_form_has_int8_zero_points_and_float_biases(convolutions, pixels):
    made = insert_qdq(convolutions, ranges_of(convolutions, pixels), layers(convolutions), symmetric=True)
    zeros = [numpy_helper.to_array(item) for item in made.graph.initializer if item.name.endswith("_zero")]
    assert {zero.dtype for zero in zeros} == {np.dtype(np.int8)}
    assert not any(zero.any() for zero in zeros)
    assert far(made, convolutions, pixels) < 0.04


def test_a_name_that_is_no_layer(convolutions, pixels):
    with pytest.raises(ParityError, match="'nothing' is no layer"):
        insert_qdq(convolutions, ranges_of(convolutions, pixels), ["nothing"])


def test_a_large_bias_does_not_overflow():
    """A channel of nearly zero weights with a bias of one: in steps of its own product the bias would need more than 32 bits."""
    weights, bias = np.full((2, 3, 1, 1), 1e-9, np.float32), np.array([1.0, 0.5], np.float32)
    weights[1] = 0.3
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w", "b"], ["y"], name="conv")], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 4, 4])], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, 4, 4])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(bias, "b")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    x = np.random.default_rng(0).normal(size=(1, 3, 4, 4)).astype(np.float32)
    made = insert_qdq(model, {"x": (float(x.min()), float(x.max())), "y": (-2.0, 2.0)}, ["conv"])
    session = ort.InferenceSession(serialize(made), providers=["CPUExecutionProvider"])
    assert np.abs(session.run(None, {"x": x})[0][0, 0] - 1.0).max() < 0.02


# ----------------------------------------------------------------------------------------------- ranges


def test_minmax_ranges_are_the_extremes_with_zero_inside(convolutions, pixels):
    found = ranges_of(convolutions, pixels)
    assert found[convolutions.graph.input[0].name] == pytest.approx((pixels.min(), pixels.max()))
    assert all(low <= 0 <= high for low, high in found.values())


def squared_error(values: np.ndarray, low: float, high: float) -> float:
    scale = (high - low) / LEVELS
    zero = np.rint(-low / scale)
    return float(np.square((np.clip(np.rint(values / scale) + zero, 0, LEVELS) - zero) * scale - values).mean())


@given(st.integers(0, 2**31), st.sampled_from(["normal", "heavy", "relu", "outlier"]))
@settings(deadline=None, max_examples=25)
def test_ranges_by_squared_error_are_never_worse_than_the_extremes(seed, kind):
    rng = np.random.default_rng(seed)
    values = {"normal": rng.normal(size=20_000), "heavy": rng.standard_t(2, size=20_000), "relu": np.maximum(rng.normal(size=20_000), 0)}.get(kind, rng.normal(size=20_000))
    if kind == "outlier":
        values[0] = 500.0
    low, high = min(0.0, values.min()), max(0.0, values.max())
    counts, _ = np.histogram(values, bins=2048, range=(low, high))
    for method, pick in METHODS.items():
        a, b = pick(counts, low, high)
        assert low - 1e-6 <= a <= 0 <= b <= high + 1e-6, method
    a, b = METHODS["mse"](counts, low, high)
    assert squared_error(values, a, b) <= 1.05 * squared_error(values, low, high)  # the histogram's width is the slack
    if kind == "outlier":
        assert METHODS["percentile"](counts, low, high)[1] < 10


def test_a_constant_tensor_and_no_rows(convolutions):
    flat = np.zeros((4, 3, 16, 16), np.float32)
    found = tensor_ranges(convolutions, [convolutions.graph.input[0].name], flat, RANGE_METHODS)
    assert {tuple(ranges.values()) for ranges in found.values()} == {((0.0, 0.0),)}
    assert np.isfinite(embed(insert_qdq(convolutions, ranges_of(convolutions, flat), layers(convolutions)), flat)).all()
    with pytest.raises(ParityError, match="need calibration inputs"):
        tensor_ranges(convolutions, tensors(convolutions), flat[:0], ("minmax",))


# ------------------------------------------------------------------------- equalisation, bias correction


def test_equalisation_changes_no_embedding_and_evens_out_channels(products, rows):
    smooth, report = equalize(products, rows, alpha=0.5)
    np.testing.assert_allclose(embed(smooth, rows), embed(products, rows), atol=1e-5)
    assert len(report.folded) == 2  # both readers of the layer norm, without a node more
    assert len(report.multiplied) == 1
    assert counts(smooth)["Mul"] == counts(products).get("Mul", 0) + 1
    assert report.peak_after < 0.5 * report.peak_before


def test_products_that_compute_in_floats_keep_equalised_int8_weights(products, rows):
    """Left out of int8 arithmetic, a product costs a quarter of its bytes and next to no accuracy."""
    names = layers(products)
    recipe = Int8Recipe(form="static", float_layers=tuple(names[1:]), ranges="mse", alpha=0.5)
    made = make_int8(products, rows, recipe)
    whole = [item for item in made.graph.initializer if item.data_type == TensorProto.INT8 and len(item.dims) == 2]
    assert len(whole) == len(names)
    assert far(made, products, rows) < 0.5 * far(make_int8(products, rows, dataclasses.replace(recipe, float_layers=())), products, rows)


def test_equalisation_makes_int8_better_where_channels_differ(products, rows):
    plain, smooth = (make_int8(products, rows, Int8Recipe(form="dynamic", alpha=alpha)) for alpha in (None, 0.5))
    assert far(smooth, products, rows) < 0.5 * far(plain, products, rows)


def test_a_channel_that_never_moves_does_not_set_the_scale(rows):
    """Its weights are a thousand times those of the others and multiply zeros."""

    class Dead(Products):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            keep = torch.ones(32)
            keep[7] = 0.0
            return self.out(torch.relu(x) * keep).mean(1)

    torch.manual_seed(0)
    tower = Dead().eval()
    with torch.no_grad():
        tower.out.weight[:, 7] = 1000 * tower.out.weight[:, 7]
    model = export_onnx(Encoder(tower, "image"), rows)
    lost = [far(make_int8(model, rows, Int8Recipe(form="dynamic", alpha=alpha)), model, rows) for alpha in (None, 0.5)]
    assert lost[0] > 0.1
    assert lost[1] < 0.001


def test_equalisation_where_a_norm_has_another_reader(rows):
    """The factor may not go into a layer norm whose output is also added elsewhere."""

    class Shared(Products):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(x)
            return self.out(self.left(x) + x).mean(1)

    torch.manual_seed(0)
    model = export_onnx(Encoder(Shared().eval(), "image"), rows)
    smooth, report = equalize(model, rows, alpha=0.5)
    np.testing.assert_allclose(embed(smooth, rows), embed(model, rows), atol=1e-5)
    assert report.folded == ()


def test_corrected_biases_restore_the_means(convolutions, pixels):
    ranges = {name: (0.5 * low, 0.5 * high) for name, (low, high) in ranges_of(convolutions, pixels).items()}  # clipping that shifts means
    chosen = layers(convolutions)[:3]
    corrected = correct_biases(convolutions, ranges, chosen, pixels)
    outputs = {node.name: node.output[0] for node in convolutions.graph.node if node.name in chosen}
    axes = dict.fromkeys(outputs.values(), 1)
    wanted = channel_means(convolutions, list(axes), pixels, axes)
    shifts = []
    for model in (convolutions, corrected):
        found = channel_means(insert_qdq(model, ranges, chosen), list(axes), pixels, axes)
        shifts.append(sum(np.abs(found[name] - wanted[name]).sum() for name in axes))
    assert shifts[1] < 0.1 * shifts[0]
    head = next(node for node in convolutions.graph.node if node.name == layers(convolutions)[3])
    assert (Graph(corrected).constant(head.input[2]) == Graph(convolutions).constant(head.input[2])).all()


def test_correction_of_nothing(convolutions, pixels):
    assert serialize(correct_biases(convolutions, ranges_of(convolutions, pixels), [], pixels)) == serialize(convolutions)


# -------------------------------------------------------------------------------------------------- positions


class Parked(nn.Module):
    """Token tower whose first token is thirty times as large as the others, as attention sinks are."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc1, self.fc2 = nn.Embedding(50, 32), nn.Linear(32, 64), nn.Linear(64, 16)
        self.sink = nn.Parameter(torch.ones(6, 1))
        with torch.no_grad():
            self.sink[0] = 30.0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(self.table(tokens) * self.sink)))[:, 1:].mean(1)


@pytest.fixture(scope="module")
def parked() -> tuple[onnx.ModelProto, np.ndarray]:
    torch.manual_seed(0)
    tokens = np.random.default_rng(0).integers(0, 50, size=(24, 6)).astype(np.int32)
    return export_onnx(Encoder(Parked().eval(), "text"), tokens), tokens


def test_scaled_positions_change_nothing_and_give_int8_its_steps_back(parked):
    model, tokens = parked
    scaled, count = scale_positions(model, tokens)
    assert count == 2
    np.testing.assert_allclose(embed(scaled, tokens), embed(model, tokens), atol=1e-6)
    plain, better = (make_int8(model, tokens, Int8Recipe(form="dynamic", positions=positions)) for positions in (False, True))
    assert far(better, model, tokens) < 0.2 * far(plain, model, tokens)


def test_positions_and_channels_share_their_multiplication(parked):
    model, tokens = parked
    scaled, _ = scale_positions(model, tokens)
    both, _ = equalize(scaled, tokens, alpha=0.5)
    np.testing.assert_allclose(embed(both, tokens), embed(model, tokens), atol=1e-5)
    assert counts(both)["Mul"] == counts(scaled)["Mul"]


def test_positions_of_like_size_are_left_alone(products, rows, convolutions, pixels):
    for model, inputs in ((products, rows), (convolutions, pixels)):
        scaled, count = scale_positions(model, inputs)
        assert count == 0
        assert serialize(scaled) == serialize(model)


# ----------------------------------------------------------------------------------------------- attention as one node


@pytest.mark.parametrize("mask", ["causal", "pad", "none"])
def test_fused_attention_computes_the_same(mask):
    torch.manual_seed(0)
    config = TextConfig(context_length=12, vocab_size=600, width=64, heads=4, layers=2, mask=mask)
    tower = TextTower(config, 32).eval()
    tokens = np.random.default_rng(0).integers(1, 598, size=(8, 12)).astype(np.int32)
    for row, length in enumerate(range(3, 11)):
        tokens[row, length] = 599
        tokens[row, length + 1 :] = 0
    model = export_onnx(Encoder(tower, "text"), tokens)
    fused, found = fuse_attention(model)
    assert found == 2
    assert (counts(fused)["Attention"], counts(fused).get("Softmax", 0)) == (2, 0)
    assert len(fused.graph.node) < 0.7 * len(model.graph.node)
    onnx.checker.check_model(fused, full_check=True)
    for batch in (1, 8):
        np.testing.assert_allclose(OnnxEncoder(serialize(fused))(tokens, batch), OnnxEncoder(serialize(model))(tokens, batch), atol=1e-5)


def test_attention_of_image_towers_too(pocket_bundle, samples):
    model = onnx.load(pocket_bundle / "onnx/image.fp32.onnx")
    fused, found = fuse_attention(model)
    assert found == counts(model)["Softmax"] >= 1
    np.testing.assert_allclose(embed(fused, samples.pixels), embed(model, samples.pixels), atol=1e-5)


def test_graphs_without_attention_are_left_alone(convolutions):
    fused, found = fuse_attention(convolutions)
    assert found == 0
    assert serialize(fused) == serialize(convolutions)


# ----------------------------------------------------------------------------------------------- recipes


def test_beats_the_one_call_quantiser_on_the_pocket_tower(pocket_bundle, samples):
    model = onnx.load(pocket_bundle / "onnx/image.fp32.onnx")
    rows, others = samples.pixels[:16], samples.pixels[16:]
    ours = make_int8(model, rows, Int8Recipe(form="static", ranges="mse", corrected=True))
    assert far(ours, model, others) < 0.7 * far(quantize_static(model, rows), model, others)


def test_a_recipe_says_which_layers_it_cannot_find(convolutions, pixels):
    with pytest.raises(ParityError, match="leaves the layer gone float, but this graph has none"):
        make_int8(convolutions, pixels, Int8Recipe(form="static", float_layers=("gone",)))
    with pytest.raises(ParityError, match="leaves every layer float"):
        make_int8(convolutions, pixels, Int8Recipe(form="static", float_layers=tuple(layers(convolutions))))


def test_the_form_of_another_runtime(products, rows):
    with pytest.raises(ParityError, match="'grouped' is OpenVINO's own"):
        make_int8(products, rows, Int8Recipe(form="grouped"))


def test_a_graph_that_is_quantised_already(convolutions, products, pixels, rows):
    for model, inputs, form in ((convolutions, pixels, "static"), (products, rows, "dynamic")):
        made = make_int8(model, inputs, Int8Recipe(form=form))
        with pytest.raises(ParityError, match="the graph is quantised already"):
            make_int8(made, inputs, Int8Recipe(form=form))


@pytest.mark.parametrize("wrong", [{"form": "guess"}, {"form": "static", "ranges": "eyes"}, {"form": "static", "alpha": 1.5}, {"form": "static", "alpha": -0.1}])
def test_recipes_that_make_no_sense(wrong):
    with pytest.raises(RecipeError, match="an int8 recipe has form"):
        Int8Recipe(**wrong)
    with pytest.raises(RecipeError):
        Int8Recipe.from_dict(wrong)


def test_a_recipe_survives_its_file(tmp_path):
    recipe = Int8Recipe(form="static", float_layers=("a", "b"), ranges="mse", alpha=0.5, corrected=True)
    towers = {tower: {"onnx": ["fp32"]} for tower in ("image", "text")}
    (tmp_path / "precision.json").write_text(json.dumps({"towers": towers, "int8": {"image": recipe.as_dict()}, "refused": {"text": {"onnx": "slower"}}}))
    assert read_precisions(tmp_path) == Precisions(allowed=towers, int8={"image": recipe}, refused={"text": {"onnx": "slower"}})


EMPTY = '"towers": {"image": {}, "text": {}}'


@pytest.mark.parametrize("text", ["{", "[]", '{"towers": {}}', f'{{{EMPTY}, "int8": {{"image": {{"form": "x"}}}}}}', f'{{{EMPTY}, "int8": []}}'])
def test_a_damaged_precision_file_is_one_sentence(tmp_path, text):
    (tmp_path / "precision.json").write_text(text)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_precisions(tmp_path)
