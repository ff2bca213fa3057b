"""`mclip convert`: files in, folders out, loaded by their owners' own loaders; and what is refused."""

from __future__ import annotations

import dataclasses
import json
import resource
import signal

import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mobileclip.checkpoint import load_checkpoint, save_checkpoint
from mobileclip.cli import main
from mobileclip.conversion import convert
from mobileclip.convert import layout_shapes, to_ours
from mobileclip.foreign_configs import open_clip_config
from mobileclip.presets import FAMILY, PRESETS
from runtime.errors import CheckpointError
from runtime.files import file_sha256
from tests.mobileclip.apple_state import apple_state
from tests.mobileclip.test_convert import OPEN_CLIP_NAMES, same

WHOLE = dict(FAMILY)
SMALL = {"vocabulary": 600, "layers": 1}


@pytest.fixture(scope="module", autouse=True)
def small():
    """MobileCLIP2-S0 with a small text tower in the table of presets: most of a file's bytes are texts, and nothing here is about them."""
    config = FAMILY["mobileclip2_s0"]
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=600, layers=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILY, config.name, config)
        patch.setitem(PRESETS, config.name, config)
        yield


@pytest.fixture(scope="module")
def apple(small, tmp_path_factory):
    """Apple's file of that model, random values."""
    path = tmp_path_factory.mktemp("downloads") / "mobileclip2_s0.pt"
    torch.save(apple_state("mobileclip2_s0", **SMALL), path)
    return path


@pytest.fixture(scope="module")
def ours(apple, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "ours"
    convert(apple, folder, to="ours")
    return folder


def read(folder) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def test_apple_to_ours_to_apple(apple, ours, tmp_path, capsys):
    state = torch.load(apple, weights_only=True)
    model = load_checkpoint(ours)
    same(dict(model.state_dict()), to_ours(state, "apple", FAMILY["mobileclip2_s0"]))
    assert model.config.sources == (f"mobileclip2_s0.pt in Apple's layout, sha256 {file_sha256(apple)}",)
    assert json.loads((ours / "receipt.json").read_text())["conversion"]["source"]["layout"] == "apple"
    assert main(["convert", str(ours), str(tmp_path / "back"), "--to", "apple"]) == 0
    assert capsys.readouterr().out == (
        f"model.safetensors is mobileclip2_s0 in our own layout; wrote 801 tensors, 15.2 M parameters, in Apple's layout to {tmp_path / 'back'}; "
        "licence of the weights: Apple ML Research Model Terms of Use (research only, derivatives included)\n"
    )
    same(torch.load(tmp_path / "back" / "mobileclip2_s0.pt", weights_only=True), state)
    receipt = json.loads((tmp_path / "back" / "receipt.json").read_text())
    facts = receipt["files"]["mobileclip2_s0.pt"]
    assert facts == {"sha256": file_sha256(tmp_path / "back" / "mobileclip2_s0.pt"), "bytes": (tmp_path / "back" / "mobileclip2_s0.pt").stat().st_size}
    assert (receipt["kind"], receipt["layout"], receipt["model"], receipt["source"]["layout"]) == ("weights", "apple", "mobileclip2_s0", "ours")
    assert main(["inspect", str(tmp_path / "back")]) == 0


def test_open_clip_loads_the_result_and_it_comes_back(apple, ours, tmp_path):
    report = convert(apple, tmp_path / "there", to="open_clip")
    assert report["architecture"] == ["mobileclip2_s0"]
    peer, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'there'}")
    same(dict(peer.state_dict()), read(tmp_path / "there"))
    assert open_clip.get_tokenizer(f"local-dir:{tmp_path / 'there'}").context_length == 77
    white = transform(Image.new("RGB", (300, 200), (255, 255, 255)))
    assert white.shape == (3, 256, 256)
    assert torch.all(white == 1)  # mean 0, std 1
    assert "bilinear" in str(transform.transforms[0].interpolation).lower()
    convert(tmp_path / "there", tmp_path / "ours", to="ours")
    same(read(tmp_path / "ours"), read(ours))
    convert(tmp_path / "there" / "open_clip_model.safetensors", tmp_path / "again", to="open_clip")
    same(read(tmp_path / "again"), read(tmp_path / "there"))


def test_timm_loads_the_image_tower_and_it_comes_back_with_a_text_tower(ours, tmp_path, capsys):
    assert main(["convert", str(ours), str(tmp_path / "timm"), "--to", "timm", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["left_out"] == "the text tower and logit_scale (18 tensors)"
    peer = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    same(dict(peer.state_dict()), read(tmp_path / "timm"))
    data = timm.data.resolve_model_data_config(peer)
    assert (list(data["mean"]), list(data["std"]), data["interpolation"], data["crop_pct"]) == ([0, 0, 0], [1, 1, 1], "bilinear", 1.0)
    with pytest.raises(CheckpointError, match=r"an image tower alone \(mobileclip_s0 or mobileclip2_s0\).*--text-from SOURCE, or convert to timm"):
        convert(tmp_path / "timm", tmp_path / "whole", to="apple")
    convert(tmp_path / "timm", tmp_path / "whole", to="ours", text_from=ours)
    same(read(tmp_path / "whole"), read(ours))
    assert convert(tmp_path / "timm", tmp_path / "timm2", to="timm")["model"] == "mobileclip2_s0"
    same(read(tmp_path / "timm2"), read(tmp_path / "timm"))
    with pytest.raises(CheckpointError, match="has no text tower for"):
        convert(tmp_path / "timm", tmp_path / "x", to="ours", text_from=tmp_path / "timm2")
    with pytest.raises(CheckpointError, match="is in our own layout"):
        convert(ours, tmp_path / "x", to="apple", text_from=ours)


def test_the_model_is_told_by_name_where_the_architecture_is_shared(apple, tmp_path, monkeypatch):
    """Weights of B are too large for here; what is asked is which name comes out."""
    from mobileclip import conversion
    from mobileclip.layouts import Found

    found = Found(layout="apple", names=("mobileclip2_s0", "mobileclip_b_lt"), folded=False)
    monkeypatch.setattr(conversion, "recognise", lambda *_, **__: found)
    assert conversion.read_source(apple).config.name == "mobileclip2_s0"
    assert conversion.read_source(apple, name="mobileclip_blt").config.name == "mobileclip_b_lt"
    renamed = tmp_path / "MobileCLIP-B-LT" / "model.pt"
    renamed.parent.mkdir()
    renamed.symlink_to(apple)
    assert conversion.read_source(renamed).config.name == "mobileclip_b_lt"
    monkeypatch.setattr("mobileclip.hub.resolve", lambda place: apple.rename(apple.with_name("model.pt")) if str(place).startswith("hf-hub:") else apple)
    try:
        assert conversion.read_source("hf-hub:apple/MobileCLIP-B-LT-OpenCLIP").config.name == "mobileclip_b_lt"
    finally:
        apple.with_name("model.pt").rename(apple)
    with pytest.raises(CheckpointError, match="is mobileclip2_s0 or mobileclip_b_lt, not 'mobileclip_s2'; leave the name out"):
        conversion.read_source(apple, name="mobileclip_s2")


@pytest.mark.parametrize("name", OPEN_CLIP_NAMES)
def test_open_clips_own_configs_say_the_same(name):
    config = WHOLE[name]
    theirs = open_clip.get_model_config(OPEN_CLIP_NAMES[name])
    theirs["vision_cfg"]["timm_drop_path"] = 0.0
    mine = open_clip_config(config)
    assert mine["model_cfg"] == theirs
    tags = open_clip.pretrained._PRETRAINED[OPEN_CLIP_NAMES[name]]
    for tag in tags.values():
        if name != "mobileclip2_l_14" and "L-14" in str(tag):
            continue
        prepared = {key: list(tag[key]) if isinstance(tag[key], tuple) else tag[key] for key in ("mean", "std", "interpolation", "resize_mode")}
        assert {**mine["preprocess_cfg"], **prepared} == mine["preprocess_cfg"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobileclip_s3", "mobileclip_l_14", "mobileclip_s4"])
def test_models_that_open_clip_has_no_entry_for_are_loaded_by_their_config(name, tmp_path):
    assert not [known for known in open_clip.list_models() if known.lower().replace("-", "_") == name]
    config = FAMILY[name]
    state = {key: torch.rand(shape) * 0.01 for key, shape in layout_shapes(config, "open_clip").items()}
    (tmp_path / "in").mkdir()
    torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}, "epoch": 3}, tmp_path / "in" / f"{name}.pt")
    assert convert(tmp_path / "in" / f"{name}.pt", tmp_path / "out", to="open_clip")["model"] == name
    same(read(tmp_path / "out"), state)
    del state
    peer, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    assert peer.visual.preprocess_cfg["interpolation"] == config.image.interpolation
    assert peer.visual.preprocess_cfg["mean"] == list(config.image.mean)
    white = transform(Image.new("RGB", (300, 200), (255, 255, 255)))
    assert white.shape == (3, config.image.image_size, config.image.image_size)
    assert white[0, 0, 0] == pytest.approx((1 - config.image.mean[0]) / config.image.std[0])
    assert peer.text.attn_mask is None


# What is refused.


def test_one_error_lists_all_that_is_wrong_and_nothing_is_written(apple, tmp_path, capsys):
    state = torch.load(apple, weights_only=True)
    del state["text_encoder.final_layer_norm.bias"]
    state["extra.weight"] = torch.zeros(2)
    state["text_encoder.projection_layer"] = torch.zeros(512, 7)
    torch.save(state, tmp_path / "bad.pt")
    assert main(["convert", str(tmp_path / "bad.pt"), str(tmp_path / "out"), "--to", "ours"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: '{tmp_path / 'bad.pt'}': 3 of 801 tensors do not fit the model: missing text_encoder.final_layer_norm.bias (512,)")
    assert "shape of text_encoder.projection_layer is (512, 7), expected (512, 512)" in said
    assert "unexpected extra.weight (2,)" in said
    assert not (tmp_path / "out").exists()


def test_another_model_is_refused(tmp_path, capsys):
    save_file({"visual.conv1.weight": torch.zeros(2), "transformer.resblocks.0.ln_1.weight": torch.zeros(2)}, tmp_path / "clip.safetensors")
    assert main(["convert", str(tmp_path / "clip.safetensors"), str(tmp_path / "out"), "--to", "ours"]) == 1
    assert "is no MobileCLIP: it has 2 tensors such as" in capsys.readouterr().err


def test_another_variant_than_named_is_refused(apple, ours, tmp_path):
    with pytest.raises(CheckpointError, match=r"mobileclip2_s0\.pt' is mobileclip2_s0, not 'mobileclip_s1'"):
        convert(apple, tmp_path / "out", to="ours", name="mobileclip_s1")
    with pytest.raises(CheckpointError, match="is 'mobileclip2_s0' by its config.json, not 'mobileclip_b'"):
        convert(ours, tmp_path / "out", to="apple", name="mobileclip_b")
    with pytest.raises(CheckpointError, match="unknown model 'gpt'"):
        convert(apple, tmp_path / "out", to="ours", name="gpt")
    with pytest.raises(CheckpointError, match="unknown layout 'onnx'"):
        convert(apple, tmp_path / "out", to="onnx")


def test_values_that_are_not_finite_are_refused_unless_allowed(apple, tmp_path):
    state = torch.load(apple, weights_only=True)
    state["logit_scale"] = torch.tensor(float("nan"))
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(CheckpointError, match="not finite in 1 of 801 tensors"):
        convert(tmp_path / "nan.pt", tmp_path / "out", to="open_clip")
    convert(tmp_path / "nan.pt", tmp_path / "out", to="open_clip", allow_nonfinite=True)
    assert read(tmp_path / "out")["logit_scale"].isnan()


def test_a_result_replaces_an_earlier_one_and_nothing_else(apple, ours, tmp_path):
    out = tmp_path / "out"
    convert(apple, out, to="timm")
    (out / "notes.txt").write_text("mine")
    convert(apple, out, to="apple")
    assert sorted(path.name for path in out.iterdir()) == ["mobileclip2_s0.pt", "notes.txt", "receipt.json"]
    convert(apple, out, to="ours")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", "notes.txt", "receipt.json", "tokenizer.json"]
    with pytest.raises(CheckpointError, match="is the folder that .* lies in"):
        convert(out, out, to="apple")
    busy = tmp_path / "busy"
    busy.mkdir()
    (busy / "receipt.json").write_text('{"kind": "checkpoint", "files": {}}')
    with pytest.raises(CheckpointError, match="holds receipt.json and is no result of 'mclip convert'"):
        convert(apple, busy, to="ours")
    with pytest.raises(CheckpointError, match="is a file"):
        convert(apple, busy / "receipt.json", to="ours")


@pytest.mark.parametrize("to", ["ours", "apple", "timm"])
def test_a_full_disk_is_one_sentence_and_leaves_the_earlier_result(apple, ours, tmp_path, to):
    convert(apple, tmp_path, to="open_clip")
    there = {path.name for path in tmp_path.iterdir()}
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot be written .*make room there"):
            convert(ours, tmp_path, to=to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert there <= {path.name for path in tmp_path.iterdir()}
    assert main(["inspect", str(tmp_path)]) == 0


def test_damage_done_to_our_checkpoint_is_found(ours, tmp_path):
    for name in ("config.json", "model.safetensors", "receipt.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((ours / name).read_bytes())
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        convert(tmp_path, tmp_path / "out", to="apple")


def test_students_stay_ours_and_keep_their_tokenizer(tmp_path):
    import mobileclip

    torch.manual_seed(0)
    student = mobileclip.create_model("pocket_s")
    student.config = dataclasses.replace(student.config, name="mine", licence="CC0")
    save_checkpoint(student, tmp_path / "student")
    report = convert(tmp_path / "student", tmp_path / "copy", to="ours")
    assert (report["model"], report["licence"]) == ("mine", "CC0")
    same(read(tmp_path / "copy"), read(tmp_path / "student"))
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == (tmp_path / "student" / "tokenizer.json").read_bytes()
    for to in ("apple", "open_clip", "timm"):
        with pytest.raises(CheckpointError, match="its image tower 'pocket' is not one of MobileCLIP's"):
            convert(tmp_path / "student", tmp_path / to, to=to)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "weights.safetensors").write_bytes((tmp_path / "student" / "model.safetensors").read_bytes())
    assert convert(tmp_path / "bare", tmp_path / "named", to="ours")["model"] == "pocket_s"
    assert load_checkpoint(tmp_path / "named").config.text == PRESETS["pocket_s"].text


def test_folded_weights_go_to_apple_alone(tmp_path):
    state = apple_state("mobileclip2_s0", folded=True, **SMALL)
    torch.save(state, tmp_path / "mobileclip2_s0.pt")
    report = convert(tmp_path / "mobileclip2_s0.pt", tmp_path / "ours", to="ours")
    assert report["folded"]
    assert load_checkpoint(tmp_path / "ours").config.folded
    convert(tmp_path / "ours", tmp_path / "apple", to="apple")
    same(torch.load(tmp_path / "apple" / "mobileclip2_s0.pt", weights_only=True), state)
    for to in ("open_clip", "timm"):
        with pytest.raises(CheckpointError, match="has folded branches"):
            convert(tmp_path / "ours", tmp_path / to, to=to)
