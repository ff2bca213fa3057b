"""ONNX files: whole operations, no traces, same bytes, and the checks that say so; int8 and strongly typed variants of them."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from export.any_length import free_length
from export.quantize import quantize_dynamic, quantize_static, quantize_tables
from export.to_onnx import OnnxEncoder, check_constants, check_whole, export_onnx, operation_counts, plain_attention, serialize, write_onnx
from export.to_tensorrt import audit_types, build_ahead
from export.towers import Encoder, fold_norms, image_encoder, text_encoder
from export.verify import measure
from mobileclip.folding import reparameterize
from runtime.errors import ParityError
from tests.export.conftest import teacher_like


class Masked(nn.Module):
    """A tower with a mask that float16 cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 8)
        self.register_buffer("mask", torch.full((8,), -3e38))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.maximum(self.linear(x.flatten(1)), self.mask)


@pytest.fixture(scope="module")
def text_model(pocket_bundle) -> onnx.ModelProto:
    return onnx.load(pocket_bundle / "onnx/text.fp32.onnx")


@pytest.fixture(scope="module")
def image_model(pocket_bundle) -> onnx.ModelProto:
    return onnx.load(pocket_bundle / "onnx/image.fp32.onnx")


def test_any_batch_gives_the_checkpoints_embeddings(pocket_bundle, samples, reference):
    for tower in ("image", "text"):
        encoder = OnnxEncoder(pocket_bundle / f"onnx/{tower}.fp32.onnx")
        for batch in (1, 3, 32):
            np.testing.assert_allclose(encoder(samples.inputs(tower), batch), reference.of(tower), atol=1e-5)


def test_files_hold_every_shape_and_nothing_that_computes_nothing(pocket_bundle):
    for path in sorted((pocket_bundle / "onnx").glob("*.onnx")):
        graph = onnx.load(path).graph
        shaped = {info.name: info.type.tensor_type for info in (*graph.value_info, *graph.output)}
        standard = [node for node in graph.node if node.domain in ("", "ai.onnx")]
        missing = [name for node in standard for name in node.output if name and not (name in shaped and shaped[name].HasField("shape"))]
        assert len(missing) <= 0.1 * len(graph.node), (path.name, missing)
        zeros = {item.name for item in graph.initializer if not numpy_helper.to_array(item).any()}
        assert [node.name for node in graph.node if node.op_type == "Add" and zeros & set(node.input)] == []
        if "static" in path.name:
            assert not {"Shape", "Range"} & {node.op_type for node in graph.node}, path.name


def test_second_export_gives_the_same_bytes(samples, pocket_bundle, pocket_checkpoint, tmp_path):
    from mobileclip.checkpoint import load_checkpoint
    from mobileclip.folding import reparameterize

    folded, _ = reparameterize(load_checkpoint(pocket_checkpoint))
    again = free_length(export_onnx(text_encoder(folded), samples.tokens))
    assert again is not None
    assert write_onnx(again, tmp_path / "again.onnx").read_bytes() == (pocket_bundle / "onnx/text.fp32.onnx").read_bytes()


def test_batch_1_is_the_graph_of_a_separate_export(pocket_checkpoint, samples, pocket_bundle):
    from mobileclip.checkpoint import load_checkpoint
    from mobileclip.folding import reparameterize

    folded, _ = reparameterize(load_checkpoint(pocket_checkpoint))
    separate = export_onnx(text_encoder(folded), samples.tokens, batch="1")
    derived = onnx.load(pocket_bundle / "onnx/text.fp32.static.onnx")
    assert operation_counts(derived) == operation_counts(separate)
    assert "Shape" not in operation_counts(derived)


def test_gelu_taken_apart_is_found(text_model, pocket, samples):
    damaged = onnx.ModelProto()
    damaged.CopyFrom(text_model)
    node = next(node for node in damaged.graph.node if node.op_type == "Gelu")
    node.op_type = "Erf"
    with pytest.raises(ParityError, match="runs 2 GELU modules, but its ONNX graph has 1 Gelu"):
        check_whole(damaged, text_encoder(pocket), torch.from_numpy(samples.tokens[:2]))


def test_mask_beyond_float16_is_found():
    with pytest.raises(ParityError, match=r"holds .*e\+38, beyond float16's 65504"):
        export_onnx(Encoder(Masked(), "image"), np.zeros((2, 3, 2, 2), np.float32))


def test_constants_within_float16_pass(text_model):
    check_constants(text_model)
    nan = helper.make_graph([], "g", [], [], [numpy_helper.from_array(np.array([np.nan], np.float32), "mask")])
    with pytest.raises(ParityError, match="the constant mask holds nan"):
        check_constants(helper.make_model(nan))


def test_attention_switch_is_put_back():
    before = torch.backends.mha.get_fastpath_enabled()
    seen = []

    def fail() -> None:
        with plain_attention():
            seen.append(torch.backends.mha.get_fastpath_enabled())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [False]
    assert torch.backends.mha.get_fastpath_enabled() is before


def test_writing_replaces_whole_files(text_model, tmp_path):
    path = write_onnx(text_model, tmp_path / "deep" / "a.onnx")
    assert path.read_bytes() == serialize(text_model)
    assert [found.name for found in path.parent.iterdir()] == ["a.onnx"]


# ----------------------------------------------------------------------------------------------------- int8


def test_dynamic_int8_is_small_close_and_reproducible(text_model, samples, reference):
    quantised = quantize_dynamic(text_model)
    data = serialize(quantised)
    assert data == serialize(quantize_dynamic(text_model))
    assert len(data) < 0.3 * len(serialize(text_model))
    assert operation_counts(quantised)["MatMulInteger"] >= 8
    parity = measure("text", OnnxEncoder(data)(samples.tokens), reference)
    assert 0.9 < parity.cosine_min < 0.99999


def test_token_table_has_one_scale_a_row():
    table = np.array([[1.0, -0.5], [0.001, 0.0005], [0.0, 0.0], *[[0.3, 0.3]] * 300], np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "tokens"], ["rows"])], "g",
        [helper.make_tensor_value_info("tokens", TensorProto.INT32, ["batch", 2])], [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", 2, 2])],
        [numpy_helper.from_array(table, "table")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert quantize_tables(model) == 1
    tokens = np.array([[0, 1], [2, 3]], np.int32)
    found = OnnxEncoder(serialize(model))(tokens)
    np.testing.assert_allclose(found, table[tokens], atol=0, rtol=0.01)  # relative: the tiny row keeps its digits
    assert not any(item.name == "table" for item in model.graph.initializer)


def test_table_that_is_also_multiplied_stays_float():
    table = numpy_helper.from_array(np.ones((300, 4), np.float32), "table")
    nodes = [helper.make_node("Gather", ["table", "tokens"], ["rows"]), helper.make_node("MatMul", ["table", "rows"], ["out"])]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], [table]))
    assert quantize_tables(model) == 0


def test_dynamic_int8_without_matrix_products_is_refused():
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
    )  # fmt: skip
    with pytest.raises(ParityError, match="found no matrix product"):
        quantize_dynamic(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def test_static_int8_takes_convolutions_and_needs_pictures(image_model, samples, reference):
    quantised = quantize_static(image_model, samples.pixels[:12])
    counts = operation_counts(quantised)
    assert counts["DequantizeLinear"] > counts["Conv"] > 0
    parity = measure("image", OnnxEncoder(serialize(quantised))(samples.pixels), reference)
    assert 0.5 < parity.cosine_mean < 0.99999
    kept = operation_counts(quantize_static(image_model, samples.pixels[:12], float_convolutions=3))
    assert kept["Conv"] == counts["Conv"]
    assert kept["DequantizeLinear"] < counts["DequantizeLinear"]
    with pytest.raises(ParityError, match="needs calibration inputs"):
        quantize_static(image_model, samples.pixels[:0])


# -------------------------------------------------------------------------------------------------- TensorRT


def test_strongly_typed_graph_computes_in_half_with_single_norms(pocket_bundle):
    model = onnx.load(pocket_bundle / "tensorrt/text.fp16.onnx")
    types = audit_types(model)
    assert types["FLOAT16"] > types["FLOAT"]
    inferred = onnx.shape_inference.infer_shapes(model)
    kinds = {info.name: info.type.tensor_type.elem_type for info in (*inferred.graph.value_info, *inferred.graph.output)}
    norms = [node for node in model.graph.node if node.op_type in ("LayerNormalization", "ReduceL2")]
    assert len(norms) >= 6
    assert {kinds[node.output[0]] for node in norms} == {TensorProto.FLOAT}
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT


def test_mixed_types_are_refused():
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["c"], name="sum")], "g",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [2]), helper.make_tensor_value_info("b", TensorProto.FLOAT16, [2])],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [2])],
    )  # fmt: skip
    with pytest.raises(ParityError, match=r"operation sum \(Add\) mixes the types \['FLOAT', 'FLOAT16'\]; put an explicit cast"):
        audit_types(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def test_nvidias_parser_says_no_in_its_own_words(text_model):
    """ONNX Runtime's dynamic int8 uses operations that TensorRT does not have: a real refusal, not a simulated one."""
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(ParityError, match="TensorRT's parser refuses the file: .+"):
        build_ahead(quantize_dynamic(text_model))


def test_half_tower_leaves_the_model_alone(pocket, samples):
    kept = next(pocket.image.parameters()).dtype
    half = image_encoder(pocket, half=True)
    with torch.no_grad():
        found = half(torch.from_numpy(samples.pixels[:2]))
    assert found.dtype == torch.float32
    assert next(pocket.image.parameters()).dtype == kept == torch.float32


@pytest.mark.parametrize("kind", ["pocket", "teacher"])
def test_batch_norms_are_folded_before_anything_is_rounded(kind, pocket, samples):
    """Running variances far from 1, as training leaves them: rounded by themselves they cost what a folded kernel does not."""
    tower = copy.deepcopy(reparameterize(pocket)[0] if kind == "pocket" else teacher_like()).image
    generator = torch.Generator().manual_seed(0)
    for norm in (module for module in tower.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_var.mul_(torch.rand(norm.num_features, generator=generator) * 0.5 + 0.75)
    rows = torch.from_numpy(samples.pixels[:4])
    with torch.no_grad():
        expected, folded = tower(rows), fold_norms(tower, rows[:2])
        assert torch.allclose(folded(rows), expected, atol=1e-4 * float(expected.abs().max()))
    before, left = ({name for name, module in one.named_modules() if isinstance(module, nn.BatchNorm2d)} for one in (tower, folded))
    assert len(before) > len(left)  # the original is left as it was
    # An attention block's norm reads what its residual reads too; the last one follows a sum.
    assert left == ({"trunk.stages.2.blocks.0.norm", "trunk.norm"} if kind == "pocket" else set())


def test_dynamic_int8_keeps_to_seven_bits(text_model):
    """So that sums of two products stay within 16 bits where a processor adds them there."""
    quantised = quantize_dynamic(text_model)
    read = {node.input[1] for node in quantised.graph.node if node.op_type == "MatMulInteger"}
    weights = [numpy_helper.to_array(item) for item in quantised.graph.initializer if item.name in read]
    assert len(weights) == len(read) > 4
    for weight in weights:
        assert weight.dtype == np.int8
        assert 32 < np.abs(weight.astype(np.int32)).max() <= 64
