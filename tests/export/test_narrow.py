"""Structured pruning of whole towers: what matters is kept, every family is cut along its wiring, and the clock decides."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import export.narrow
from export.compress import CompressConfig, compress
from export.importance import METHODS, importance
from export.narrow import HEAD_DIM, candidates, measure_times, narrow
from mobileclip.checkpoint import load_checkpoint
from mobileclip.inherit import inherit
from mobileclip.model import ImageTextModel, count_parameters
from mobileclip.presets import preset
from runtime.errors import RecipeError
from tests.export.conftest import calibrated


@pytest.mark.parametrize("method", METHODS)
def test_a_channel_that_does_nothing_is_worth_nothing(method, pocket, samples):
    """Hidden units whose outgoing weights are zero."""
    model = calibrated(preset("pocket_s"))
    mlp = model.text.blocks[0].mlp
    with torch.no_grad():
        mlp.fc2.weight[:, 40:80] = 0
    found = importance(model, samples, method)
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert all(value.shape == parameter.shape and (value >= 0).all() for (_, parameter), value in zip(model.named_parameters(), found.values(), strict=True))
    worth = found["text.blocks.0.mlp.fc2.weight"].sum(0)
    assert (worth[40:80] == 0).all()
    assert (worth[:40] > 0).float().mean() > 0.9


def test_fisher_finds_units_that_no_picture_moves_where_norms_do_not(samples):
    """Large weights behind a unit that is always off: squared weights want it, the loss does not notice it."""
    model = calibrated(preset("pocket_s"))
    mlp = model.text.blocks[1].mlp
    with torch.no_grad():
        mlp.fc1.bias[:32] = -50.0
        mlp.fc2.weight[:, :32] *= 20
    share = {}
    for method in METHODS:
        worth = importance(model, samples, method)["text.blocks.1.mlp.fc2.weight"].sum(0)
        share[method] = float(worth[:32].sum() / worth.sum())
    assert share["fisher"] < 1e-3
    assert share["activation"] < 1e-3
    assert share["norm"] > 0.5


def test_importance_is_the_same_twice_and_leaves_the_model_alone(pocket, samples):
    before = {name: value.clone() for name, value in pocket.state_dict().items()}
    first, second = (importance(pocket, samples, "fisher", seed=3) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(before[name], value) for name, value in pocket.state_dict().items())


def test_channels_follow_the_importance_that_is_given():
    """Only half of the text stream matters: a model of that width keeps just it."""
    source = ImageTextModel(preset("pocket_s"))
    worth = {name: torch.zeros(parameter.shape, dtype=torch.float64) for name, parameter in source.named_parameters()}
    for name in worth:
        if name.startswith("text.blocks") and name.endswith("fc1.weight"):
            worth[name][:, 16:80] = 1.0
    text = dataclasses.replace(source.config.text, width=64, heads=2, mlp_ratio=source.config.text.mlp_ratio * 2)
    made, report = inherit(ImageTextModel(dataclasses.replace(source.config, text=text)), source, importance=worth)
    assert report.text.channels["text.width"].startswith("16-79")
    assert torch.equal(made.text.ln_final.weight, source.text.ln_final.weight[16:80])
    assert report.kept["text"] == pytest.approx(1.0)


def test_a_model_of_the_source_s_own_shape_keeps_everything(pocket, samples):
    made, report = inherit(ImageTextModel(pocket.config), pocket, importance=importance(pocket, samples, "norm"))
    assert report.kept == pytest.approx({"image": 1.0, "text": 1.0}, abs=0.02)
    assert torch.equal(made.image.trunk.fc.weight, pocket.image.trunk.fc.weight)


@pytest.mark.parametrize("name", ["pocket_s", "pocket_l", "mobileclip2_s0", "mobileclip_s0"])
def test_candidates_are_models_that_inherit_from_their_source(name):
    source = ImageTextModel(preset(name))
    for tower in ("image", "text"):
        found = candidates(source, tower)
        assert found[0].config == source.config
        assert len(found) >= 8
        sizes = [count_parameters(ImageTextModel(one.config))[tower] for one in (found[0], found[-1])]
        assert sizes[1] < 0.7 * sizes[0]
        model, report = inherit(ImageTextModel(found[-1].config), source)
        taken = getattr(report, tower)
        assert taken.parameters_inherited > 0.95 * taken.parameters, (taken.notes, found[-1].change)
        assert 0 < report.kept[tower] < 1


def test_attention_keeps_whole_heads():
    for name in ("pocket_l", "mobileclip2_s0"):
        for one in candidates(ImageTextModel(preset(name)), "image"):
            args = one.config.image.backbone_args
            assert list(args.get("dims", args.get("embed_dims", [HEAD_DIM])))[-1] % HEAD_DIM == 0
        for one in candidates(ImageTextModel(preset(name)), "text"):
            assert one.config.text.width % one.config.text.heads == 0


def test_image_trunks_of_other_families_are_named():
    with pytest.raises(RecipeError, match="vit_base_mci_224.* is of a family that structured pruning does not know"):
        candidates(ImageTextModel(preset("mobileclip_b")), "image")


def test_times_are_measured_once(pocket, tmp_path, monkeypatch):
    found = [candidates(pocket, "text")[n] for n in (0, -1)]
    times = measure_times(found, tmp_path / "times.json")
    assert times[1] < 0.8
    monkeypatch.setattr(export.narrow, "interleaved", None)
    assert measure_times(found, tmp_path / "times.json") == times
    assert len(json.loads((tmp_path / "times.json").read_text())) == 2


@pytest.fixture
def clock(monkeypatch):
    """Times by parameters: what is chosen must not hang on this machine's load."""

    def measured(found, cache, say=lambda line: None):
        sizes = [count_parameters(ImageTextModel(one.config))[one.tower] for one in found]
        return [size / sizes[0] for size in sizes]

    monkeypatch.setattr(export.narrow, "measure_times", measured)
    monkeypatch.setattr(export.narrow, "_shares", lambda image, text: {"image": 0.4, "text": 0.6})


def test_the_best_within_the_share_is_taken(pocket, samples, tmp_path, clock):
    made, report = narrow(pocket, 0.6, samples, cache=tmp_path / "times.json")
    assert 0.3 < report.time_share <= 0.6
    assert report.parameters_after == count_parameters(made)["total"] < report.parameters_before
    assert {row["tower"] for row in report.tried} == {"image", "text"}
    tokens = torch.from_numpy(samples.tokens[:4])
    assert np.isfinite(made.encode_text(tokens).detach().numpy()).all()
    wider = narrow(pocket, 0.9, samples, cache=tmp_path / "times.json")[1]
    assert wider.kept["image"] * wider.kept["text"] >= report.kept["image"] * report.kept["text"]


def test_shares_that_cannot_be(pocket, samples, tmp_path, clock):
    with pytest.raises(RecipeError, match=r"no narrower form takes 0\.01 of the time of 'pocket_s'; the fastest takes 0\.\d+ \(image: "):
        narrow(pocket, 0.01, samples, cache=tmp_path / "times.json")
    with pytest.raises(RecipeError, match="expected above 0 and below 1"):
        narrow(pocket, 1.5, samples, cache=tmp_path / "times.json")
    with pytest.raises(RecipeError, match="expected at least 32"):
        narrow(pocket, 0.5, samples.head(10), cache=tmp_path / "times.json")
    with pytest.raises(RecipeError, match="importance is 'feeling'"):
        narrow(pocket, 0.5, samples, cache=tmp_path / "times.json", method="feeling")
    folded = ImageTextModel(dataclasses.replace(pocket.config, ffn_widths={"text.blocks.0.mlp": 64}))
    with pytest.raises(RecipeError, match="is pruned in its feed-forward layers already"):
        narrow(folded, 0.5, samples, cache=tmp_path / "times.json")


def test_the_command_writes_an_ordinary_checkpoint(pocket_checkpoint, pairs_folder, tmp_path, clock):
    config = CompressConfig(checkpoint=pocket_checkpoint, out=tmp_path / "small", calibrate=pairs_folder, calibration=40, prune_latency=0.6)
    lines: list[str] = []
    report = compress(config, lines.append)
    model = load_checkpoint(config.out)
    assert count_parameters(model)["total"] == report["prune"]["parameters_after"] < report["before"]["parameters"]["total"]
    assert model.config.ffn_widths == {}
    assert any(line.startswith("narrowed (image: ") for line in lines)
    with pytest.raises(RecipeError, match="give one of them"):
        compress(dataclasses.replace(config, ratio=0.5))
