"""The models against open_clip and timm, folding, checkpoints, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

import mobileclip
from mobileclip.checkpoint import build_tokenizer, load_checkpoint, open_tokenizer, save_checkpoint
from mobileclip.config import ImageConfig, ModelConfig, TextConfig, config_from_dict, config_to_dict
from mobileclip.folding import reparameterize, structured_images
from mobileclip.model import ImageTextModel
from mobileclip.presets import PRESETS
from runtime.errors import CheckpointError

from .structured import calibrate


@pytest.fixture(scope="module")
def pocket() -> ImageTextModel:
    torch.manual_seed(0)
    model = mobileclip.create_model("pocket_s")
    calibrate(model, structured_images(16, 64))
    return model


def test_pickles_that_run_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("owned",)

    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="weights_only=True"):
        mobileclip.create_model("pocket_s", tmp_path / "evil.pt")


def test_folding_keeps_the_function_and_removes_branches(pocket):
    folded, report = reparameterize(pocket)
    assert report.parameters_after < report.parameters_before
    assert report.embedding_spread < 0.95
    assert report.max_abs < 1e-5
    assert report.cosine_min > 0.999999
    assert folded.config.folded
    assert not pocket.config.folded
    assert not any(name.endswith("identity.weight") for name, _ in folded.named_parameters())


@pytest.mark.parametrize("length", [6, 9, 20])
def test_causal_tower_is_exact_at_any_length_that_holds_the_text(pocket, length):
    tokens = torch.zeros(2, 20, dtype=torch.int32)
    tokens[0, :4] = torch.tensor([8190, 5, 6, 8191])
    tokens[1, :6] = torch.tensor([8190, 1, 0, 3, 4, 8191])  # id 0 is a real token too
    with torch.inference_mode():
        assert (pocket.encode_text(tokens) - pocket.encode_text(tokens[:, :length])).abs().max() < 1e-6


def test_pad_mask_with_eot_pooling_keeps_the_token_of_id_zero():
    torch.manual_seed(0)
    base = PRESETS["pocket_s"]
    model = ImageTextModel(dataclasses.replace(base, text=dataclasses.replace(base.text, mask="pad"))).eval()
    tokens = torch.tensor([[8190, 0, 7, 8191, 0, 0]], dtype=torch.int32)
    other = torch.tensor([[8190, 9, 7, 8191, 0, 0]], dtype=torch.int32)
    with torch.inference_mode():
        assert (model.encode_text(tokens) - model.encode_text(tokens[:, :4])).abs().max() < 1e-6
        assert (model.encode_text(tokens) - model.encode_text(other)).abs().max() > 1e-4


def test_checkpoint_round_trip_folded_pruned_and_verified(pocket, tmp_path):
    from mobileclip.model import resize_ffn

    pruned = copy.deepcopy(pocket)
    resize_ffn(pruned, "text.blocks.0.mlp", 384)
    resize_ffn(pruned, "image.trunk.stages.2.blocks.0.mlp", 160)
    pruned.config = dataclasses.replace(pruned.config, ffn_widths={"text.blocks.0.mlp": 384, "image.trunk.stages.2.blocks.0.mlp": 160})
    folded, _ = reparameterize(pruned)
    for name, model in (("plain", pocket), ("pruned", pruned), ("folded", folded)):
        folder = save_checkpoint(model, tmp_path / name)
        loaded = load_checkpoint(folder)
        assert loaded.config == model.config
        pixels = structured_images(3, 64)
        with torch.inference_mode():
            assert torch.equal(model.eval().encode_image(pixels), loaded.encode_image(pixels))
    tokens = open_tokenizer(tmp_path / "plain")(["a red heart", "!"])
    assert tokens.shape == (2, 20)
    assert tokens.max() == 8191


def test_damage_is_found(pocket, tmp_path):
    folder = save_checkpoint(pocket, tmp_path / "ckpt")
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        load_checkpoint(folder)
    weights.write_bytes(good[: len(good) // 2])
    with pytest.raises(CheckpointError, match="is cut off"):
        load_checkpoint(folder, verify=False)
    weights.write_bytes(good)
    (folder / "receipt.json").unlink()
    with pytest.raises(CheckpointError, match="interrupted"):
        load_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_checkpoint(tmp_path)


def test_weights_of_another_model_leave_the_model_untouched(pocket, tmp_path):
    from mobileclip.checkpoint import load_state

    folder = save_checkpoint(pocket, tmp_path / "ckpt")
    state = load_file(folder / "model.safetensors")
    state["text.blocks.1.ln_2.weight"] = torch.zeros(7)
    before = copy.deepcopy(pocket.state_dict())
    with pytest.raises(CheckpointError, match="1 of"):
        load_state(pocket, state, where="x")
    assert all(torch.equal(before[key], value) for key, value in pocket.state_dict().items())


@pytest.mark.parametrize("name", PRESETS)
def test_config_survives_json(name):
    config = PRESETS[name]
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == dataclasses.replace(
        config, image=dataclasses.replace(config.image, backbone_args=json.loads(json.dumps(config.image.backbone_args)))
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [({"schema": 9}, "schema is 9"), ({"image": 3}, "must both be objects"), ({"extra": 1}, "unexpected keyword argument 'extra'"), ({"embed_dim": 0}, "at least 1")],
)
def test_config_refuses(change, message):
    with pytest.raises(CheckpointError, match=message):
        config_from_dict({**config_to_dict(PRESETS["pocket_s"]), **change})


def test_unknown_names_are_refused_in_one_sentence():
    with pytest.raises(CheckpointError, match="known presets are mobileclip_s0"):
        mobileclip.create_model("mobileclip9")
    bad = ModelConfig(name="x", embed_dim=8, image=ImageConfig(backbone="no_such_net", image_size=32), text=TextConfig(width=16, heads=2, layers=1))
    with pytest.raises(CheckpointError, match="unknown to timm"):
        ImageTextModel(bad)
    with pytest.raises(CheckpointError, match="refuses its arguments"):
        ImageTextModel(dataclasses.replace(bad, image=ImageConfig(backbone="pocket", backbone_args={"dimz": [1]}, image_size=32)))


def test_any_timm_backbone_can_be_a_student():
    config = PRESETS["pocket_s"]
    config = dataclasses.replace(config, image=ImageConfig(backbone="mobilenetv4_conv_small_035", image_size=64, projection="linear"))
    model = ImageTextModel(config).eval()
    with torch.inference_mode():
        assert model.encode_image(torch.rand(2, 3, 64, 64)).shape == (2, 256)


def test_create_model_and_transforms_agrees_with_the_config():
    from PIL import Image

    model, transform, same = mobileclip.create_model_and_transforms("pocket_s")
    assert transform is same
    pixels = transform(Image.new("RGB", (100, 70), (255, 0, 51)))
    assert pixels.shape == (3, 64, 64)
    assert torch.allclose(pixels[:, 0, 0], torch.tensor([1.0, 0.0, 0.2]), atol=1e-6)


def test_tokenizer_is_the_same_bytes_every_time(tmp_path):
    assert build_tokenizer(8192, tmp_path / "a.json").read_bytes() == build_tokenizer(8192, tmp_path / "b.json").read_bytes()
