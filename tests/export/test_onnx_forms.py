"""Other forms of the ONNX artefacts: from the picture's bytes on, other ways to the end token, ONNX Runtime's own format."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

import export.to_onnx
import export.to_onnx_eot
import export.to_onnx_pixels
import export.to_ort
from export.to_onnx import OnnxEncoder, operation_counts, serialize
from export.verify import failure, measure
from mobileclip.checkpoint import load_checkpoint, preprocess_config
from mobileclip.folding import reparameterize
from runtime.backends import OnnxTower
from runtime.errors import ParityError, RecipeError
from runtime.preprocess import PreprocessConfig, preprocess
from tests.export.conftest import job_of, pictures


@pytest.fixture(scope="module")
def folded(pocket_checkpoint):
    return reparameterize(load_checkpoint(pocket_checkpoint))[0]


@pytest.mark.parametrize("module", [export.to_onnx_pixels, export.to_onnx_eot, export.to_ort], ids=lambda module: module.__name__.split("_", 1)[1])
def test_drafts_are_what_the_checkpoint_computes(module, folded, samples, reference, tmp_path):
    towers = {"export.to_onnx_pixels": ("image",), "export.to_onnx_eot": ("text",)}.get(module.__name__, ("image", "text"))
    for tower in ("image", "text"):
        found = list(module.drafts(job_of(folded, tower, samples, tmp_path), ("fp32", "int8")))
        assert bool(found) == (tower in towers)
        assert len({draft.id for draft in found}) == len(found)
        for draft in found:
            assert (tmp_path / draft.path).is_file()
            parity = measure(tower, draft.run(samples.inputs(tower)), reference)
            if draft.precision == "fp32":
                assert failure(draft.id, parity, "fp32") is None
            else:
                assert parity.cosine_mean > 0.98


def identity(size: int) -> onnx.ModelProto:
    """A graph that gives its pixels back."""
    entry, out = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, size, size]) for name in ("image", "out"))
    graph = helper.make_graph([helper.make_node("Identity", ["image"], ["out"])], "g", [entry], [out])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_pixels_in_the_graph_are_those_of_the_runtime(interpolation, crop_pct):
    config = PreprocessConfig(image_size=48, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), interpolation=interpolation, crop_pct=crop_pct)
    encoder = OnnxEncoder(serialize(export.to_onnx_pixels.with_preprocessing(identity(48), config)))
    for seed, (width, height) in enumerate([(48, 48), (100, 60), (31, 77), (49, 48), (400, 90), (55, 55)]):
        (small,) = pictures(1, 24, seed=seed)
        picture = small.resize((width, height), Image.Resampling.BICUBIC)
        steps = np.abs(encoder(np.asarray(picture)[None]) - preprocess([picture], config)) * np.asarray(config.std).reshape(1, 3, 1, 1) * 255
        assert steps.max() <= 1.001
        assert (steps > 0.01).mean() < 0.2, (width, height)


def test_bytes_come_back_from_pixels(samples, pocket):
    config = preprocess_config(pocket.config)
    back = export.to_onnx_pixels.to_bytes(samples.pixels, config)
    np.testing.assert_allclose(preprocess([Image.fromarray(row) for row in back], config), samples.pixels, atol=1e-6)


def test_a_filter_that_onnx_has_not_is_refused():
    config = PreprocessConfig(image_size=48, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear")
    object.__setattr__(config, "interpolation", "lanczos")
    with pytest.raises(RecipeError, match="ONNX resizes bilinear and bicubic, the model needs lanczos"):
        export.to_onnx_pixels.with_preprocessing(identity(48), config)


def test_end_tokens_are_found_as_the_file_says(folded, samples, tmp_path):
    for draft in export.to_onnx_eot.drafts(job_of(folded, "text", samples, tmp_path), ("fp32",)):
        model = onnx.load(tmp_path / draft.path)
        assert "ArgMax" not in operation_counts(model)
        assert [entry.name for entry in model.graph.input] == (["tokens", "end"] if draft.variant == "input" else ["tokens"])
    with pytest.raises(ParityError, match="has 0 ArgMax operations, expected one"):
        export.to_onnx_eot.end_as_input(model)


def test_ort_files_name_their_operations_and_differ_in_order_alone(folded, samples, tmp_path):
    (draft,) = export.to_ort.drafts(job_of(folded, "text", samples, tmp_path), ("fp32",))
    first = (tmp_path / draft.path).read_bytes()
    assert any("LayerNormalization" in line for line in draft.facts["operations"])
    (again,) = export.to_ort.drafts(job_of(folded, "text", samples, tmp_path), ("fp32",))
    second = (tmp_path / again.path).read_bytes()
    assert abs(len(first) - len(second)) < 64  # padding between tables
    np.testing.assert_array_equal(OnnxEncoder(first)(samples.tokens), OnnxEncoder(second)(samples.tokens))


def test_a_graph_too_large_for_one_file_keeps_its_weights_beside_it(folded, samples, tmp_path, monkeypatch):
    job = job_of(folded, "text", samples, tmp_path)
    small = export.to_onnx.write_onnx(job.onnx, tmp_path / "small.onnx")
    large = export.to_onnx.write_onnx(job.onnx, tmp_path / "large.onnx", most_bytes=1000)
    assert (small.name, large.name) == ("small.onnx", "large")
    assert sorted(path.name for path in large.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert (large / "model.onnx").stat().st_size < 0.1 * small.stat().st_size
    np.testing.assert_allclose(OnnxEncoder(large)(samples.tokens), OnnxEncoder(small)(samples.tokens), atol=1e-6)
    tower = OnnxTower(large, 1, "tokens", "text_embedding")
    np.testing.assert_array_equal(tower.run(samples.tokens), OnnxEncoder(large)(samples.tokens, batch=len(samples.tokens)))
    assert job.onnx.graph.initializer[0].data_location == TensorProto.DEFAULT  # the graph in memory is as it was
