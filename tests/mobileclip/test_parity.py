"""Every variant against the package that it came from: open_clip and timm with copied weights, Apple's hybrid text tower by golden values."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import mobileclip
from mobileclip.catalogue import PARAMETERS, table
from mobileclip.checkpoint import build, load_state, preprocess_config
from mobileclip.config import ModelConfig, TextConfig
from mobileclip.convert import from_ours, layout_shapes, to_ours
from mobileclip.folding import fold, foldable, folded_copy, structured_images
from mobileclip.model import ImageTextModel, count_parameters
from mobileclip.presets import FAMILY, PRESETS, canonical_name
from mobileclip.text_tower import TextTower
from runtime.preprocess import preprocess

from .structured import calibrate, spread, stir

OPEN_CLIP = {
    "mobileclip2_s0": "MobileCLIP2-S0", "mobileclip_s1": "MobileCLIP-S1", "mobileclip_s2": "MobileCLIP-S2", "mobileclip_b": "MobileCLIP-B",
    "mobileclip2_s2": "MobileCLIP2-S2", "mobileclip2_b": "MobileCLIP2-B", "mobileclip2_s3": "MobileCLIP2-S3", "mobileclip2_s4": "MobileCLIP2-S4",
    "mobileclip2_l_14": "MobileCLIP2-L-14",
}  # fmt: skip
"""Every variant that open_clip has."""
TWINS = {"mobileclip_b_lt": "mobileclip_b", "mobileclip_s3": "mobileclip2_s3", "mobileclip_s4": "mobileclip2_s4", "mobileclip_l_14": "mobileclip2_l_14"}
"""Variants of the architecture of one that open_clip has."""
PUBLISHED = {
    "mobileclip_s0": (11.4, 42.4), "mobileclip_s1": (21.5, 63.4), "mobileclip_s2": (35.7, 63.4), "mobileclip_b": (86.3, 63.4), "mobileclip_b_lt": (86.3, 63.4),
    "mobileclip_s3": (125.1, 123.6), "mobileclip_l_14": (304.3, 123.6), "mobileclip_s4": (321.6, 123.6), "mobileclip2_s0": (11.4, 63.4),
    "mobileclip2_s2": (35.7, 63.4), "mobileclip2_b": (86.3, 63.4), "mobileclip2_s3": (125.1, 123.6), "mobileclip2_l_14": (304.3, 123.6),
    "mobileclip2_s4": (321.6, 123.6),
}  # fmt: skip
"""Millions of parameters, image and text, from Apple's table; MobileCLIP2-S0's text tower is 63.4, not the 42.4 printed there."""
TEXTS = ["a cat", "two dogs on a beach!", "", "x" * 400]
SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", ["mobileclip2_s0", *(pytest.param(name, marks=SLOW) for name in list(OPEN_CLIP)[1:])])
def test_open_clip_gives_the_same_embeddings(name):
    import open_clip

    torch.manual_seed(1)
    peer = open_clip.create_model(OPEN_CLIP[name]).eval()
    config = FAMILY[name]
    images = structured_images(4, config.image.image_size, seed=3)
    calibrate(peer, images)
    ours = build(config).eval()
    load_state(ours, to_ours(peer.state_dict(), "open_clip", config), where=name)
    tokens = open_clip.get_tokenizer(OPEN_CLIP[name])(TEXTS)
    with torch.inference_mode():
        theirs = peer.encode_image(images, normalize=True), peer.encode_text(tokens, normalize=True)
    for embeddings in theirs:
        # A random ViT-L has no BatchNorm to calibrate: its pictures lie close together, and still a thousand tolerances apart.
        assert spread(embeddings) < 0.995
        assert (embeddings[0] - embeddings[1]).abs().max() > 1e-2
    for model in (ours, folded_copy(ours)[0]):
        with torch.inference_mode():
            mine = model.encode_image(images), model.encode_text(tokens.int())
        for a, b in zip(theirs, mine, strict=True):
            assert (a - b).abs().max() <= 1e-5
    np.testing.assert_array_equal(mobileclip.get_tokenizer(name)(TEXTS).numpy(), tokens.numpy())


@pytest.mark.parametrize("backbone", ["fastvit_mci0", *(pytest.param(f"fastvit_mci{n}", marks=SLOW) for n in (1, 2)), pytest.param("vit_base_mci_224", marks=SLOW)])
def test_timm_gives_the_same_features(backbone):
    config = next(config for config in FAMILY.values() if config.image.backbone == backbone)
    torch.manual_seed(2)
    ours = ImageTextModel(config)
    stir(ours.image)
    peer = timm.create_model(backbone, num_classes=config.embed_dim, **config.image.backbone_args).eval()
    peer.load_state_dict(from_ours(ours.state_dict(), "timm", config), strict=True)
    images = structured_images(2, config.image.image_size)
    with torch.inference_mode():
        theirs = torch.nn.functional.normalize(peer(images), dim=-1)
        for model in (ours.eval(), folded_copy(ours)[0]):
            assert (model.encode_image(images) - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize(("name", "twin"), TWINS.items())
def test_variants_without_an_entry_share_the_architecture_of_one_that_has(name, twin):
    assert dataclasses.replace(FAMILY[name], name=twin) == FAMILY[twin]


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_settings_equal_open_clips(name):
    """Normalisation, interpolation, size, mask and pooling: the wrong one of these loads without an error."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    config, theirs = FAMILY[name], open_clip.get_model_config(OPEN_CLIP[name])
    tag = open_clip.list_pretrained_tags_by_model(OPEN_CLIP[name])[0]
    pixels = get_pretrained_cfg(OPEN_CLIP[name], tag)
    assert (config.image.mean, config.image.std, config.image.interpolation) == (tuple(pixels["mean"]), tuple(pixels["std"]), pixels["interpolation"])
    assert pixels["resize_mode"] == "shortest"
    assert config.image.image_size == theirs["vision_cfg"]["image_size"]
    assert config.image.backbone == theirs["vision_cfg"]["timm_model_name"]
    text = theirs["text_cfg"]
    assert (config.embed_dim, config.text.width, config.text.heads, config.text.layers) == (theirs["embed_dim"], text["width"], text["heads"], text["layers"])
    assert (config.text.context_length, config.text.vocab_size) == (text["context_length"], text["vocab_size"])
    assert config.text.mask == ("none" if text["no_causal_mask"] else "causal")


@pytest.mark.parametrize("name", OPEN_CLIP)
@pytest.mark.parametrize("size", [(300, 200), (90, 231), (640, 480)])
def test_pixels_equal_open_clips_transform(name, size):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = preprocess_config(FAMILY[name])
    theirs = image_transform_v2(
        PreprocessCfg(size=config.image_size, mean=config.mean, std=config.std, interpolation=config.interpolation, resize_mode="shortest"), is_train=False
    )
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    picture = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    assert np.array_equal(preprocess([picture], config)[0], theirs(picture).numpy())


@pytest.mark.parametrize("name", [name if name not in FAMILY or FAMILY[name].image.backbone == "fastvit_mci0" else pytest.param(name, marks=SLOW) for name in PRESETS])
def test_parameters_as_published(name):
    with torch.device("meta"):
        model = ImageTextModel(PRESETS[name]).eval()
        fold(model)
    counts = count_parameters(model)
    assert (counts["image"], counts["text"]) == PARAMETERS[name]
    for found, published in zip(PARAMETERS[name], PUBLISHED.get(name, ()), strict=name in PUBLISHED):
        assert float(f"{found / 1e6:.3g}") == float(f"{published:.3g}")


def test_the_table_in_the_docs_is_the_printed_one():
    text = (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8")
    assert table(markdown=True) in text
    assert len(table().splitlines()) == len(PRESETS) + 1
    assert PARAMETERS.keys() == PRESETS.keys()


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("mobileclip_s0", "mobileclip_s0"), ("MobileCLIP2-S0", "mobileclip2_s0"), ("apple/MobileCLIP2-S0", "mobileclip2_s0"), ("mobileclip_blt", "mobileclip_b_lt"),
        ("MobileCLIP-B(LT)", "mobileclip_b_lt"), ("apple/MobileCLIP-B-LT-OpenCLIP", "mobileclip_b_lt"), ("MobileCLIP2-L-14", "mobileclip2_l_14"),
        ("MobileCLIP-L/14", "mobileclip_l_14"), ("mobileclip2_l14", "mobileclip2_l_14"), ("timm/MobileCLIP2-S4-OpenCLIP", "mobileclip2_s4"), ("ViT-B-32", "ViT-B-32"),
        ("pocket_s", "pocket_s"), ("MobileCLIP2-S1", "MobileCLIP2-S1"),
    ],
)  # fmt: skip
def test_spellings(spelling, name):
    assert canonical_name(spelling) == name


# ---------------------------------------------------------------- v1 S0's hybrid text tower, which only Apple's package has

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/apple_mct.json").read_text(encoding="utf-8"))


def drawn(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The golden file's weights: a function of a tensor's name in Apple's layout."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
    values = rng.standard_normal(shape)
    if name.endswith("num_batches_tracked"):
        return torch.tensor(7)
    if name.endswith("running_var"):
        values = 0.5 + np.abs(values)
    elif "layer_scale" in name:
        values = 0.3 + 0.1 * values
    elif name.endswith(".weight") and len(shape) == 1:
        values = 1 + 0.1 * values
    elif len(shape) >= 2:
        values = values * (0.5 if "conv" in name else 1.5 / np.sqrt(np.prod(shape[1:])) if len(shape) > 2 or "layer" not in name else 0.5)
    else:
        values = 0.1 * values
    return torch.tensor(values, dtype=torch.float32)


@pytest.fixture(scope="module")
def small_mct() -> TextTower:
    facts = dict(GOLDEN["small"])
    embed_dim = facts.pop("embed_dim")
    text = TextConfig(mask="none", kind="mct", **facts)
    config = ModelConfig(name="small_mct", embed_dim=embed_dim, image=FAMILY["mobileclip_s0"].image, text=text)
    shapes = {name: shape for name, shape in layout_shapes(config, "apple").items() if name.startswith("text_encoder.")}
    others = {name: torch.zeros(shape) for name, shape in layout_shapes(config, "apple").items() if name not in shapes}
    state = to_ours({**others, **{name: drawn(name, shape) for name, shape in shapes.items()}}, "apple", config)
    tower = TextTower(text, embed_dim)
    load_state(tower, {name.removeprefix("text."): tensor for name, tensor in state.items() if name.startswith("text.")}, where="golden")
    return tower.eval()


def test_hybrid_text_tower_equals_apples(small_mct):
    tokens, features = torch.tensor(GOLDEN["tokens"], dtype=torch.int32), torch.tensor(GOLDEN["features"])
    unit = torch.nn.functional.normalize(features, dim=-1)
    assert spread(unit) < 0.9
    with torch.inference_mode():
        found = torch.nn.functional.normalize(small_mct(tokens), dim=-1)
    assert (found - unit).abs().max() <= 1e-5


def test_hybrid_text_tower_folds(small_mct):
    import copy

    folded = copy.deepcopy(small_mct)
    assert fold(folded) == {"TokenMixer": 2}
    tokens = torch.tensor(GOLDEN["tokens"], dtype=torch.int32)
    with torch.inference_mode():
        assert (folded(tokens) - small_mct(tokens)).abs().max() <= 1e-5 * small_mct(tokens).abs().max()
        assert not any("token_mixer.skip" in name for name in folded.state_dict())
    assert foldable(small_mct) == {"TokenMixer": 2}
    assert not foldable(torch.nn.Sequential())


def test_every_tensor_of_apples_hybrid_text_tower_has_its_place():
    shapes = layout_shapes(FAMILY["mobileclip_s0"], "apple")
    text = {name.removeprefix("text_encoder."): list(shape) for name, shape in shapes.items() if name.startswith("text_encoder.")}
    assert text == GOLDEN["shapes"]
