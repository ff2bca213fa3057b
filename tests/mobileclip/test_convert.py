"""Names and tensors of four layouts against their owners' own converters, there and back, and what is refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from functools import cache

import open_clip
import pytest
import timm
import torch
from open_clip.convert import convert_state_dict
from timm.models.fastvit import checkpoint_filter_fn

from mobileclip.convert import check_layout, from_ours, layout_shapes, to_ours
from mobileclip.layouts import Found, best_name, recognise, strip_prefix
from mobileclip.presets import FAMILY, PRESETS
from runtime.errors import CheckpointError
from tests.mobileclip.apple_state import VARIANTS, apple_shapes, apple_state

OPEN_CLIP_NAMES = {
    "mobileclip_s1": "MobileCLIP-S1", "mobileclip_s2": "MobileCLIP-S2", "mobileclip_b": "MobileCLIP-B", "mobileclip_b_lt": "MobileCLIP-B",
    "mobileclip2_s0": "MobileCLIP2-S0", "mobileclip2_s2": "MobileCLIP2-S2", "mobileclip2_b": "MobileCLIP2-B", "mobileclip2_s3": "MobileCLIP2-S3",
    "mobileclip2_s4": "MobileCLIP2-S4", "mobileclip2_l_14": "MobileCLIP2-L-14",
}  # fmt: skip
FAST = {"mobileclip2_s0", "mobileclip_s2"}
SLOW = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name != "mobileclip_s0"]


def same(a, b) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def shapes(state) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@cache
def on_meta(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return open_clip.create_model(name, device="meta")


# Names and shapes alone: every variant, no memory.


@pytest.mark.parametrize(
    ("name", "folded"), [*((name, False) for name in VARIANTS), ("mobileclip_s0", True), *(pytest.param(name, True, marks=pytest.mark.slow) for name in list(VARIANTS)[1:])]
)
def test_apples_names_and_shapes(name, folded):
    config = dataclasses.replace(FAMILY[name], folded=folded)
    assert layout_shapes(config, "apple") == apple_shapes(name, folded=folded)


@pytest.mark.parametrize("name", [name for name in OPEN_CLIP_NAMES if name not in ("mobileclip_b_lt", "mobileclip2_b", "mobileclip2_s2")])
def test_open_clips_names_and_shapes(name):
    peer = on_meta(OPEN_CLIP_NAMES[name])
    assert layout_shapes(FAMILY[name], "open_clip") == shapes(peer.state_dict())


@pytest.mark.parametrize("name", [name for name in FAMILY if name.startswith("mobileclip_") and name != "mobileclip_b_lt"])
def test_timms_names_and_shapes(name):
    config = FAMILY[name]
    with torch.device("meta"):
        peer = timm.create_model(config.image.backbone, num_classes=config.embed_dim)
    assert layout_shapes(config, "timm") == shapes(peer.state_dict())


@pytest.mark.parametrize("layout", ["ours", "apple", "open_clip", "timm"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_variant_is_recognised_in_every_layout_that_holds_it(name, layout):
    config = PRESETS[name]
    if name not in FAMILY and layout != "ours" or layout == "apple" and name not in VARIANTS or layout == "open_clip" and name == "mobileclip_s0":
        with pytest.raises(CheckpointError, match="cannot hold"):
            check_layout(layout, config)
        return
    found = recognise(layout_shapes(config, layout), "file.pt")
    assert (found.layout, name in found.names, found.folded) == (layout, True, False)
    assert best_name(found, [name]) == name
    for other in found.names:
        if layout == "timm":
            assert PRESETS[other].image == config.image
        else:
            assert dataclasses.replace(PRESETS[other], name=name) == config


# Tensors.


@pytest.mark.parametrize("name", SLOW)
def test_apple_to_ours_to_apple_and_as_open_clip_converts(name):
    apple, config = apple_state(name), FAMILY[name]
    ours = to_ours(apple, "apple", config)
    same(from_ours(ours, "apple", config), apple)
    theirs = from_ours(ours, "open_clip", config)
    same(theirs, convert_state_dict(on_meta(OPEN_CLIP_NAMES[name]), apple))
    same(to_ours(theirs, "open_clip", config), ours)
    back = from_ours(to_ours(theirs, "open_clip", config), "apple", config)
    same(convert_state_dict(on_meta(OPEN_CLIP_NAMES[name]), back), theirs)
    trunk = from_ours(ours, "timm", config)
    same(trunk, {key.removeprefix("visual.trunk."): tensor for key, tensor in theirs.items() if key.startswith("visual.trunk.")})


def test_apples_s0_with_its_convolutional_text_tower():
    apple, config = apple_state("mobileclip_s0"), FAMILY["mobileclip_s0"]
    ours = to_ours(apple, "apple", config)
    same(from_ours(ours, "apple", config), apple)
    with torch.device("meta"):
        trunk = timm.create_model("fastvit_mci0", num_classes=512)
    same(from_ours(ours, "timm", config), checkpoint_filter_fn(dict(apple), trunk))
    assert all(torch.equal(ours[f"image.trunk.{key}"], tensor) for key, tensor in checkpoint_filter_fn(dict(apple), trunk).items())
    for block in (0, 5):
        theirs, mine = f"text_encoder.transformer.{block}.", f"text.blocks.{block}."
        assert torch.equal(ours[mine + "token_mixer.skip.running_mean"], apple[theirs + "token_mixer.mixer.rbr_skip.running_mean"])
        assert torch.equal(ours[mine + "token_mixer.base.running_mean"], apple[theirs + "token_mixer.norm.rbr_skip.running_mean"])
        assert torch.equal(ours[mine + "token_mixer.gamma"], apple[theirs + "token_mixer.layer_scale"])
        assert torch.equal(ours[mine + "gamma"], apple[theirs + "layer_scale"])
    with pytest.raises(CheckpointError, match="no convolutional text tower"):
        from_ours(ours, "open_clip", config)


def test_folded_states_keep_their_names():
    apple = apple_state("mobileclip_s0", folded=True)
    found = recognise(shapes(apple), "folded.pt")
    assert found == Found(layout="apple", names=("mobileclip_s0",), folded=True)
    config = dataclasses.replace(FAMILY["mobileclip_s0"], folded=True)
    ours = to_ours(apple, "apple", config)
    assert "text.blocks.0.token_mixer.reparam_conv.bias" in ours
    assert "image.trunk.stages.1.downsample.proj.0.reparam_conv.weight" in ours
    same(from_ours(ours, "apple", config), apple)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILY if name not in VARIANTS])
def test_large_variants_to_open_clip_and_back(name):
    config = FAMILY[name]
    theirs = {key: torch.rand(shape) for key, shape in layout_shapes(config, "open_clip").items()}
    same(from_ours(to_ours(theirs, "open_clip", config), "open_clip", config), theirs)


# What is refused.


def test_one_error_lists_all_that_is_wrong():
    apple = apple_state("mobileclip2_s0")
    del apple["text_encoder.final_layer_norm.bias"], apple["image_encoder.model.network.1.proj.0.lkb_origin.conv.weight"]
    apple["surplus"] = torch.zeros(2)
    apple["image_encoder.model.network.9.0.layer_scale"] = torch.zeros(1)
    apple["text_encoder.projection_layer"] = torch.zeros(512, 7)
    assert recognise(shapes(apple), "x", loose=True).names == ("mobileclip2_s0",)
    with pytest.raises(CheckpointError) as error:
        to_ours(apple, "apple", FAMILY["mobileclip2_s0"], where="'x.pt'")
    for part in (
        "'x.pt': 5 of",
        "missing text_encoder.final_layer_norm.bias (512,)",
        "missing image_encoder.model.network.1.proj.0.lkb_origin.conv.weight (128, 1, 7, 7)",
        "unexpected surplus (2,)",
        "unexpected image_encoder.model.network.9.0.layer_scale (1,)",
        "shape of text_encoder.projection_layer is (512, 7), expected (512, 512)",
    ):
        assert part in str(error.value)


def test_a_bias_that_apple_has_no_place_for_is_not_dropped():
    config = FAMILY["mobileclip2_s0"]
    ours = to_ours(apple_state("mobileclip2_s0"), "apple", config)
    assert not ours["image.trunk.head.fc.bias"].any()
    ours["image.trunk.head.fc.bias"][3] = 1e-9
    with pytest.raises(CheckpointError, match=r"image\.trunk\.head\.fc\.bias is not zero \(1 of 512 values\), and Apple's layout has no tensor"):
        from_ours(ours, "apple", config)
    assert from_ours(ours, "open_clip", config)["visual.trunk.head.fc.bias"][3] == 1e-9


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("mobileclip_s0", "open_clip", "open_clip has no convolutional text tower"),
        ("mobileclip_s3", "apple", "no image tower 'fastvit_mci3', and Apple gives S3, S4 and L-14 away in open_clip's layout; convert to open_clip"),
        ("mobileclip2_s4", "apple", "'fastvit_mci4'"),
        ("mobileclip_l_14", "apple", "'vit_large_patch14_clip_224'"),
        ("pocket_s", "apple", "'pocket' is not one of MobileCLIP's"),
        ("pocket_s", "open_clip", "keep it in ours"),
        ("pocket_m", "timm", "keep it in ours"),
        ("pocket_m", "onnx", "unknown layout 'onnx'; known are ours, apple"),
    ],
)
def test_layouts_that_cannot_hold_a_model_say_why(name, layout, message):
    with pytest.raises(CheckpointError, match=message):
        from_ours({}, layout, PRESETS[name])
    with pytest.raises(CheckpointError, match=message):
        to_ours({}, layout, PRESETS[name])


@pytest.mark.parametrize(
    ("layout", "image", "text", "message"),
    [
        ("apple", {}, {"mask": "causal"}, r"mask causal \(Apple's has none beside this image tower\)"),
        ("open_clip", {}, {"mask": "pad"}, "mask pad"),
        ("open_clip", {}, {"norm": "post", "pool": "mean", "embedding_dim": 128}, "norm post, pool mean, embedding_dim 128"),
        ("timm", {"projection": "mlp"}, {}, "is not one of MobileCLIP's"),
        ("timm", {"backbone_args": {"dims": [1]}}, {}, "is not one of MobileCLIP's"),
    ],
)
def test_students_that_other_layouts_cannot_express(layout, image, text, message):
    base = FAMILY["mobileclip2_s0"]
    config = dataclasses.replace(base, image=dataclasses.replace(base.image, **image), text=dataclasses.replace(base.text, **text))
    with pytest.raises(CheckpointError, match=message):
        check_layout(layout, config)
    with pytest.raises(CheckpointError, match="1 of its feed-forward layers have been pruned"):
        check_layout(layout, dataclasses.replace(base, ffn_widths={"text.blocks.0.mlp": 8}))


# Recognition.


def test_recognition_needs_no_torch():
    code = "import sys, mobileclip.layouts, mobileclip.conversion, mobileclip.foreign_configs; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize("name", ["RN50", "ViT-B-32", "coca_ViT-B-32"])
def test_other_models_of_open_clip_are_no_mobileclip(name):
    with pytest.raises(CheckpointError, match=r"^'w\.pt' is no MobileCLIP: it has \d+ tensors such as .*image_encoder.*give the weights of a MobileCLIP"):
        recognise(shapes(on_meta(name).state_dict()), "'w.pt'")


def test_a_clip_with_another_tower_from_timm_is_no_variant():
    with pytest.raises(CheckpointError, match="looks like open_clip's layout but is no variant that is known: its image tower is network in stages 3x128"):
        recognise(shapes(on_meta("convnext_base").state_dict()), "'w.pt'")


@pytest.mark.parametrize(
    ("name", "message"),
    [("resnet18", "is no MobileCLIP: it has 122 tensors such as conv1.weight"), ("fastvit_t8", "looks like timm's layout but is no variant.*FastViT 2x48")],
)
def test_other_models_of_timm(name, message):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(CheckpointError, match=message):
        recognise(shapes(model.state_dict()), "'w.pt'")


def test_a_variant_that_nobody_has_named_is_told_apart():
    found = apple_shapes("mobileclip2_s0")
    found["text_encoder.positional_embedding.pos_embed.pos_embed"] = (1, 1, 248, 512)
    with pytest.raises(CheckpointError, match=r"looks like Apple's layout but is no variant that is known: its context length is 248 \(77 in mobileclip2_s0\)"):
        recognise(found, "x.pt")
    assert recognise(found, "x.pt", loose=True).names == ("mobileclip2_s0",)
    shallow = {name: shape for name, shape in apple_shapes("mobileclip_s1").items() if "network.4.19" not in name}
    with pytest.raises(CheckpointError, match=r"FastViT 4x64 \+ 12x128 \+ 19x256 \+ 4x512 with hidden 192 \+ 384 \+ 768 \+ 1536 \(FastViT 4x64 \+ 12x128 \+ 20x256"):
        recognise(shallow, "x.pt", loose=True)
    with pytest.raises(CheckpointError, match="no MobileCLIP: it has 0 tensors such as none"):
        recognise({}, "x.pt")


def test_ours_without_a_preset_has_no_name():
    pruned = layout_shapes(PRESETS["pocket_s"], "ours")
    assert recognise(pruned, "x").names == ("pocket_s",)
    pruned["text.blocks.0.mlp.fc1.weight"], pruned["text.blocks.0.mlp.fc1.bias"] = (300, 128), (300,)
    assert recognise(pruned, "x") == Found(layout="ours", names=(), folded=False)
    projected = layout_shapes(PRESETS["pocket_s"], "ours") | {"image.projection.weight": (256, 160)}
    assert recognise(projected, "x").names == ()
    with pytest.raises(CheckpointError, match="without a preset"):
        best_name(recognise(projected, "x"), ["pocket_s"])


B = Found(layout="apple", names=("mobileclip_b", "mobileclip_b_lt", "mobileclip2_b"), folded=False)
S0 = Found(layout="timm", names=("mobileclip_s0", "mobileclip2_s0"), folded=False)


@pytest.mark.parametrize(
    ("found", "hints", "name"),
    [
        (B, [], "mobileclip_b"),
        (B, ["mobileclip_blt.pt"], "mobileclip_b_lt"),
        (B, ["mobileclip_b.pt", "mobileclip2_b"], "mobileclip_b"),
        (B, ["open_clip_model.safetensors", "apple/MobileCLIP-B-LT-OpenCLIP"], "mobileclip_b_lt"),
        (B, ["models--timm--MobileCLIP2-B-OpenCLIP"], "mobileclip2_b"),
        (B, ["mobileclip2_b_epoch3.pt"], "mobileclip2_b"),
        (B, ["mobileclip_s2.pt"], "mobileclip_b"),
        (S0, ["model.safetensors", "apple_mclip2_dfndr2b"], "mobileclip2_s0"),
        (S0, ["fastvit_mci0.apple_mclip"], "mobileclip_s0"),
    ],
)
def test_names_are_told_by_file_and_folder(found, hints, name):
    assert best_name(found, hints) == name


def test_wrappers_prefixes_are_taken_off():
    assert strip_prefix({"module.a": 1, "module.b": 2}) == {"a": 1, "b": 2}
    assert strip_prefix({"module.a": 1, "b": 2}) == {"module.a": 1, "b": 2}
    wrapped = {f"module.{name}": shape for name, shape in apple_shapes("mobileclip_s1").items()}
    assert recognise(wrapped, "x").names == ("mobileclip_s1",)
