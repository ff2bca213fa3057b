"""Four-bit text weights: a grid that is ONNX Runtime's, rounding that is done once, and training that gets some of the loss back."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from export.bundle import ExportConfig, export_bundle
from export.compress import CompressConfig, compress
from export.four_bit import LEVELS, finetune_four_bit, gridded, on_grid
from export.quantize import quantize_four_bit
from export.to_onnx import OnnxEncoder, export_onnx, serialize
from export.towers import Encoder, embed, image_encoder, text_encoder
from export.verify import centred_cosines
from mobileclip.checkpoint import load_checkpoint
from runtime.errors import ParityError, RecipeError
from runtime.manifest import read_manifest


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 200), st.floats(0.001, 100))
@settings(deadline=None, max_examples=40)
def test_the_grid_has_sixteen_values_a_block_with_zero_among_them(seed, rows, inside, size):
    weight = torch.randn(rows, inside, generator=torch.Generator().manual_seed(seed)) * size
    found = on_grid(weight, 64)
    assert found.shape == weight.shape
    for start in range(0, inside, 64):
        part, original = found[:, start : start + 64], weight[:, start : start + 64]
        assert max(len(np.unique(row.numpy())) for row in part) <= LEVELS + 1
        step = (original.amax(1).clamp(min=0) - original.amin(1).clamp(max=0)) / LEVELS
        assert ((part - original).abs() <= step[:, None] * 1.01 + 1e-6).all()
    torch.testing.assert_close(on_grid(found, 64), found, rtol=1e-4, atol=1e-5 * size)  # once rounded, for good


def test_the_grid_is_onnx_runtime_s():
    """The same layer, rounded here in floats, and by its quantiser in the file."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(128, 64, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).mean(1)

    torch.manual_seed(0)
    layer = Layer().eval()
    rows = np.random.default_rng(0).normal(size=(16, 4, 128)).astype(np.float32)
    quantised = OnnxEncoder(serialize(quantize_four_bit(export_onnx(Encoder(layer, "image"), rows))))(rows)
    with torch.no_grad():
        exact = nn.functional.normalize(layer(torch.from_numpy(rows))).numpy()
        layer.linear.weight.copy_(on_grid(layer.linear.weight))
        rounded = nn.functional.normalize(layer(torch.from_numpy(rows))).numpy()
    assert np.abs(quantised - rounded).max() < 0.2 * np.abs(rounded - exact).max()


def test_training_gets_some_of_the_loss_back_and_ends_on_the_grid(pocket, samples):
    pictures, tokens = embed(image_encoder(pocket), samples.pixels), np.concatenate([samples.tokens] * 3)
    before = {name: value.clone() for name, value in pocket.state_dict().items()}
    trained, report = finetune_four_bit(pocket, tokens, pictures, steps=30, batch=16, learning_rate=3e-4)
    assert report.trained_mean > report.rounded_mean
    assert all(torch.equal(before[name], value) for name, value in pocket.state_dict().items())
    assert set(trained.state_dict()) == set(before)
    for layer in gridded(trained):
        torch.testing.assert_close(on_grid(layer.weight), layer.weight, rtol=1e-4, atol=1e-6)
    assert torch.equal(trained.image.trunk.fc.weight, pocket.image.trunk.fc.weight)
    again, _ = finetune_four_bit(pocket, tokens, pictures, steps=30, batch=16, learning_rate=3e-4)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in trained.state_dict().items())
    graph = export_onnx(text_encoder(trained), samples.tokens)
    quantised = quantize_four_bit(graph)
    assert quantised.ByteSize() < 0.2 * graph.ByteSize()
    assert centred_cosines(OnnxEncoder(serialize(quantised))(samples.tokens), embed(text_encoder(trained), samples.tokens)).min() > 0.95


def test_no_steps_round_alone(pocket, samples):
    rounded, report = finetune_four_bit(pocket, np.concatenate([samples.tokens] * 3), embed(image_encoder(pocket), samples.pixels), steps=0)
    assert report.trained_p1 == report.rounded_p1 < 1
    torch.testing.assert_close(rounded.text.blocks[0].mlp.fc1.weight, on_grid(pocket.text.blocks[0].mlp.fc1.weight))


def test_towers_of_convolutions_are_refused(pocket_bundle):
    with pytest.raises(ParityError, match="less than half of this tower's weights are such; take int8"):
        quantize_four_bit(onnx.load(pocket_bundle / "onnx/image.fp32.onnx"))


def test_bad_input(pocket, samples):
    pictures = embed(image_encoder(pocket), samples.pixels)
    with pytest.raises(RecipeError, match="given 8 texts and 32 pictures"):
        finetune_four_bit(pocket, samples.tokens[:8], pictures)
    with pytest.raises(RecipeError, match="steps is -1"):
        finetune_four_bit(pocket, np.concatenate([samples.tokens] * 3), pictures, steps=-1)


def test_the_command_and_what_is_exported(pocket_checkpoint, pairs_folder, tmp_path):
    config = CompressConfig(checkpoint=pocket_checkpoint, out=tmp_path / "small", calibrate=pairs_folder, calibration=48, four_bit_steps=2)
    with pytest.raises(RecipeError, match="given 4\\d texts"):
        compress(config)
    assert not (config.out / "receipt.json").exists()
    with pytest.raises(RecipeError, match="prune first"):
        compress(dataclasses.replace(config, ratio=0.25))


def test_int4_is_exported_and_judged_by_what_it_loses(pocket, pocket_checkpoint, pairs_folder, tmp_path):
    bundle = tmp_path / "bundle"
    export_bundle(ExportConfig(checkpoint=pocket_checkpoint, bundle=bundle, pairs=pairs_folder, target="onnx", precision="fp32,int4", samples=32, calibration=12, golden=4))
    found = {artefact.tower: artefact for artefact in read_manifest(bundle).artefacts if artefact.precision == "int4"}
    assert found["image"].status == "refused"
    assert "take int8" in str(found["image"].reason)
    assert found["text"].status in ("unproven", "refused")  # a model of random weights finds nothing that could be lost
    assert load_checkpoint(pocket_checkpoint).config == pocket.config
