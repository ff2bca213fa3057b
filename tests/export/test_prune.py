"""Feed-forward pruning: what is cut, what is kept, and that the rest of the pipeline takes the result."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from export.prune import feed_forwards, kept_width, prune_ffn
from export.to_onnx import OnnxEncoder, export_onnx, serialize
from export.towers import Encoder, embed, image_encoder, text_encoder
from mobileclip.checkpoint import load_checkpoint, save_checkpoint
from mobileclip.folding import reparameterize
from runtime.errors import RecipeError
from tests.export.conftest import teacher_like


@pytest.fixture(scope="module")
def pruned(pocket, samples):
    return prune_ffn(pocket, 0.25, samples)


@pytest.mark.parametrize(("hidden", "ratio", "kept"), [(512, 0.25, 384), (96, 0.25, 72), (100, 0.25, 72), (8, 0.9, 8), (6, 0.5, 6), (64, 0, 64), (20, 0.5, 8)])
def test_kept_widths_are_multiples_of_eight(hidden, ratio, kept):
    assert kept_width(hidden, ratio) == kept


def test_every_hidden_width_shrinks_and_nothing_else_does(pocket, pruned):
    model, report = pruned
    before, after = dict(pocket.named_parameters()), dict(model.named_parameters())
    assert set(before) == set(after)
    layers = [path for path, _ in feed_forwards(pocket)]
    assert {path.split(".")[0] for path in layers} == {"image", "text"}
    for name, parameter in before.items():
        path = name.rpartition(".")[0].rpartition(".")[0]
        inner = path in layers and (".fc1." in name or name.endswith("fc2.weight"))
        assert (after[name].shape != parameter.shape) == inner, name
    for path in layers:
        old, new = report.widths[path]
        assert new == model.get_submodule(path).fc1.weight.shape[0] == model.get_submodule(path).fc2.weight.shape[1]
        assert new == kept_width(old, 0.25) < old
    assert report.parameters_after < report.parameters_before


def test_the_given_model_is_left_alone(pocket, samples):
    before = copy.deepcopy(pocket.state_dict())
    prune_ffn(pocket, 0.5, samples)
    assert all(torch.equal(value, before[name]) for name, value in pocket.state_dict().items())
    assert pocket.config.ffn_widths == {}


def test_checkpoint_of_a_pruned_model_loads_and_folds(pruned, pocket_checkpoint, samples, tmp_path):
    model, _ = pruned
    save_checkpoint(model, tmp_path / "pruned", tokenizer=pocket_checkpoint / "tokenizer.json")
    again = load_checkpoint(tmp_path / "pruned")
    np.testing.assert_array_equal(embed(text_encoder(again), samples.tokens), embed(text_encoder(model), samples.tokens))
    folded, report = reparameterize(again)
    assert report.max_abs < 1e-4
    np.testing.assert_allclose(embed(image_encoder(folded), samples.pixels), embed(image_encoder(model), samples.pixels), atol=1e-4)


def test_a_folded_model_can_be_pruned_too(pocket, samples, pruned):
    folded, _ = reparameterize(pocket)
    model, report = prune_ffn(folded, 0.25, samples)
    assert report.widths == pruned[1].widths
    np.testing.assert_allclose(embed(image_encoder(model), samples.pixels), embed(image_encoder(pruned[0]), samples.pixels), atol=1e-3)


def test_units_without_effect_go_first_and_unharmed(pocket, samples):
    """A quarter of the units is cut off from fc2: pruning a quarter must find exactly those and change nothing."""
    model = copy.deepcopy(pocket)
    dead = {}
    for path, mlp in feed_forwards(model):
        hidden = mlp.fc1.weight.shape[0]
        gone = torch.randperm(hidden, generator=torch.Generator().manual_seed(hidden))[: hidden - kept_width(hidden, 0.25)]
        dead[path] = gone
        with torch.no_grad():
            mlp.fc2.weight[:, gone] = 0
    found, report = prune_ffn(model, 0.25, samples)
    for path, mlp in feed_forwards(found):
        kept = sorted(set(range(len(model.get_submodule(path).fc1.weight))) - set(dead[path].tolist()))
        torch.testing.assert_close(mlp.fc1.weight, model.get_submodule(path).fc1.weight[kept])
    np.testing.assert_allclose(embed(text_encoder(found), samples.tokens), embed(text_encoder(model), samples.tokens), atol=1e-5)
    np.testing.assert_allclose(embed(image_encoder(found), samples.pixels), embed(image_encoder(model), samples.pixels), atol=1e-5)
    assert report.text_cosine_mean == pytest.approx(1, abs=1e-5)


def test_refitting_beats_plain_removal_on_samples_it_did_not_see(pocket, samples, monkeypatch):
    _, refitted = prune_ffn(pocket, 0.5, samples)
    monkeypatch.setattr("export.prune._refit", lambda mlp, outgoing, covariance, mean, keep: None)
    _, plain = prune_ffn(pocket, 0.5, samples)
    assert refitted.text_cosine_mean > plain.text_cosine_mean
    assert refitted.image_cosine_mean > plain.image_cosine_mean - 1e-4


def test_pruned_tower_exports(pruned, samples):
    model, _ = pruned
    found = OnnxEncoder(serialize(export_onnx(text_encoder(model), samples.tokens)))(samples.tokens)
    np.testing.assert_allclose(found, embed(text_encoder(model), samples.tokens), atol=1e-5)


def test_a_tower_without_feed_forwards_is_left_alone(samples):
    """The sample teacher's form: an EfficientNet-lite and a BERT with mean pooling; only its text tower has such layers."""
    model = teacher_like()
    found, report = prune_ffn(model, 0.25, samples)
    assert set(report.widths) == {"text.blocks.0.mlp", "text.blocks.1.mlp"}
    assert report.image_cosine_mean == pytest.approx(1, abs=1e-5)
    exported = OnnxEncoder(serialize(export_onnx(Encoder(found.text, "text"), samples.tokens)))(samples.tokens)
    np.testing.assert_allclose(exported, embed(text_encoder(found), samples.tokens), atol=1e-5)


def test_bad_settings(pocket, samples):
    with pytest.raises(RecipeError, match=r"ratio is 1\.0, expected at least 0 and below 1"):
        prune_ffn(pocket, 1.0, samples)
    with pytest.raises(RecipeError, match="was given 4 calibration samples, expected at least 8"):
        prune_ffn(pocket, 0.25, samples.head(4))
