"""The ladder and its variations: sizes, folding, exact texts, any backbone, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch

from mobileclip.checkpoint import load_checkpoint, open_tokenizer, save_checkpoint
from mobileclip.config import config_to_dict
from mobileclip.folding import reparameterize, structured_images
from mobileclip.model import ImageTextModel, count_parameters
from mobileclip.presets import PRESETS
from mobileclip.students import STUDENTS, student_config
from mobileclip.text_tower import TextTower
from runtime.errors import CheckpointError

from .structured import calibrate

NOMINAL = {"pocket_s": 1.75e6, "pocket_m": 4e6, "pocket_l": 5e6, "pocket_xl": 10e6, "pocket_xxl": 20e6}
FAMILIES = ["mobilenetv4_conv_small", "efficientnet_lite0", "vit_tiny_patch16_224", "convnext_atto", "repvit_m0_9", "fastvit_t8"]


@pytest.fixture(scope="module", params=STUDENTS)
def student(request) -> ImageTextModel:
    torch.manual_seed(0)
    model = ImageTextModel(STUDENTS[request.param])
    calibrate(model, structured_images(12, model.config.image.image_size))
    return model


def token_rows(config, texts: list[list[int]]) -> torch.Tensor:
    """Rows of the full context: SOT, the ids, EOT, padding with id 0 (which is also a token of its own)."""
    rows = torch.zeros(len(texts), config.context_length, dtype=torch.int32)
    for row, ids in zip(rows, texts, strict=True):
        row[: len(ids) + 2] = torch.tensor([config.vocab_size - 2, *ids, config.vocab_size - 1])
    return rows


def test_sizes_are_what_the_ladder_says(student):
    counts, name = count_parameters(student), student.config.name
    assert set(NOMINAL) == set(STUDENTS)
    assert counts["total"] == pytest.approx(NOMINAL[name], rel=0.1)
    assert counts["token_embedding"] <= 2.1e6  # more merges are paid for by a narrow table


def test_both_towers_grow_from_rung_to_rung():
    with torch.device("meta"):
        counts = [count_parameters(ImageTextModel(config)) for config in STUDENTS.values()]
    for part in ("total", "image", "text"):
        assert [count[part] for count in counts] == sorted(count[part] for count in counts)
    assert [config.image.image_size for config in STUDENTS.values()] == sorted(config.image.image_size for config in STUDENTS.values())


@pytest.mark.parametrize(("name", "parameters", "names"), [("pocket_s", 1723593, "3e56a3c2ee889807"), ("pocket_m", 4326321, "1e431ab259026c2f")])
def test_the_two_first_rungs_never_change(name, parameters, names):
    """Trained checkpoints depend on them: tensors and shapes are golden."""
    with torch.device("meta"):
        model = ImageTextModel(PRESETS[name])
    assert count_parameters(model)["total"] == parameters
    shapes = json.dumps({key: tuple(value.shape) for key, value in model.state_dict().items()}, sort_keys=True)
    assert hashlib.sha256(shapes.encode()).hexdigest()[:16] == names


def test_folding_keeps_the_function(student):
    _, report = reparameterize(student)
    assert report.max_abs <= 1e-5
    assert report.embedding_spread < 0.99
    assert report.parameters_after < report.parameters_before


def test_every_block_of_both_towers_can_be_pruned(student):
    from export.prune import feed_forwards

    args, text = student.config.image.backbone_args, student.config.text
    layers = [path for path, _ in feed_forwards(student)]
    assert sum(path.startswith("image.") for path in layers) == sum(args["depths"])
    assert sum(path.startswith("text.") for path in layers) == text.layers


def test_four_stages_are_pruned_and_fold():
    from export.prune import prune_ffn
    from export.towers import Samples

    torch.manual_seed(0)
    model = ImageTextModel(student_config("pocket_l", image_size=64))
    calibrate(model, structured_images(12, 64))
    pixels = structured_images(12, 64, seed=1).numpy()
    tokens = token_rows(model.config.text, [[n, n + 1, 7] for n in range(12)]).numpy()
    names = tuple(str(n) for n in range(12))
    pruned, report = prune_ffn(model, 0.25, Samples(keys=names, captions=names, pixels=pixels, tokens=tokens))
    assert all(new < old for old, new in report.widths.values())
    assert len(report.widths) == sum(model.config.image.backbone_args["depths"]) + model.config.text.layers
    assert report.image_cosine_mean > 0.9
    assert reparameterize(pruned)[1].max_abs <= 1e-5


def test_checkpoint_round_trip(student, tmp_path):
    loaded = load_checkpoint(save_checkpoint(student, tmp_path / "ckpt"))
    assert loaded.config == student.config
    assert all(torch.equal(a, b) for a, b in zip(student.state_dict().values(), loaded.state_dict().values(), strict=True))
    tokens = torch.from_numpy(open_tokenizer(tmp_path / "ckpt")(["a red heart", "two dogs!"]))
    assert tokens.shape == (2, student.config.text.context_length)
    assert tokens.max() == student.config.text.vocab_size - 1
    with torch.inference_mode():
        assert loaded.encode_text(tokens).shape == (2, student.config.embed_dim)


@pytest.mark.parametrize("mask", ["causal", "pad"])
@pytest.mark.parametrize("name", STUDENTS)
def test_texts_are_exact_at_any_length(name, mask):
    torch.manual_seed(0)
    config = dataclasses.replace(STUDENTS[name].text, mask=mask, vocab_size=600)
    tower = TextTower(config, 32).eval()
    tokens = token_rows(config, [[5], [0, 0, 3, 0], [9, 8, 7, 6, 5, 4, 3, 2]])
    with torch.inference_mode():
        whole = tower(tokens)
        for length in (10, 13, config.context_length):
            torch.testing.assert_close(tower(tokens[:, :length]), whole, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tower(tokens[:1, :3]), whole[:1], atol=1e-5, rtol=1e-5)
        assert (tower(tokens[1:, :10]) - tower(tokens[1:, :10].flip(0)).flip(0)).abs().max() < 1e-5
        assert (whole[0] - whole[1]).abs().max() > 1e-2


@pytest.mark.parametrize("backbone", FAMILIES)
def test_any_timm_backbone_trains(backbone):
    torch.manual_seed(0)
    config = student_config("pocket_s", backbone=backbone, image_size=64)
    assert config.name == f"pocket_s+{backbone}"
    assert config.image.projection == ("head" if backbone.startswith("fastvit") else "linear")
    assert (config.image.mean, config.image.std, config.text) == (PRESETS["pocket_s"].image.mean, PRESETS["pocket_s"].image.std, PRESETS["pocket_s"].text)
    model = ImageTextModel(config).train()
    image, text, scale = model(structured_images(3, 64), token_rows(config.text, [[5], [6, 7], [8, 9, 10]]))
    assert image.shape == text.shape == (3, 256)
    torch.nn.functional.cross_entropy(scale * image @ text.T, torch.arange(3)).backward()
    # A scaled residual branch starts next to nothing; it is the presence of gradients that proves the wiring.
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "fastvit_t8"])
def test_a_student_with_another_backbone_survives_the_disk(backbone, tmp_path):
    torch.manual_seed(0)
    model = ImageTextModel(student_config("pocket_s", backbone=backbone, image_size=48)).eval()
    assert model.config.image.backbone_args == ({"img_size": 48} if backbone.startswith("vit") else {})
    loaded = load_checkpoint(save_checkpoint(model, tmp_path / "ckpt"))
    pixels = structured_images(2, 48)
    with torch.inference_mode():
        assert torch.equal(loaded.encode_image(pixels), model.encode_image(pixels))


def test_a_size_that_the_backbone_fixes_follows_the_picture():
    config = student_config("mobileclip2_b", image_size=96)
    assert config.image.backbone_args == {"global_pool": "token", "img_size": 96}
    assert student_config(config, image_size=64).image.backbone_args == {"global_pool": "token", "img_size": 64}
    assert config.licence == PRESETS["pocket_s"].licence  # random weights are nobody else's


def test_truncated_vocabulary_and_narrow_table_in_one(tmp_path):
    torch.manual_seed(0)
    config = student_config("pocket_s", vocab_size=2048, embedding_dim=32, mask="pad", context_length=12, embed_dim=64)
    assert config.name == "pocket_s+pad+2048tokens+12long+32wide+64d"
    model = ImageTextModel(config).eval()
    before, after = count_parameters(ImageTextModel(PRESETS["pocket_s"])), count_parameters(model)
    assert after["token_embedding"] == 2048 * 32
    assert before["text"] - after["text"] == (8192 * 128 - 2048 * 32) - 32 * 128 + 8 * 128 + (256 - 64) * 128
    folder = save_checkpoint(model, tmp_path / "ckpt")
    tokens = open_tokenizer(folder)(["a photo of a thermometer", "é 漢 🙂"])
    assert tokens.shape == (2, 12)
    assert (tokens.max(axis=1) == 2047).all()
    assert len(np.unique(tokens[0])) > 6  # words of few merges fall into more pieces
    with torch.inference_mode():
        assert torch.equal(load_checkpoint(folder).encode_text(torch.from_numpy(tokens)), model.encode_text(torch.from_numpy(tokens)))


def test_what_does_not_differ_is_no_variation():
    base = PRESETS["pocket_l"]
    assert student_config("pocket_l") is base
    assert student_config(base, backbone="pocket", image_size=112, mask="causal", vocab_size=16384, context_length=32, embedding_dim=96, embed_dim=256) is base
    assert student_config("pocket_s", embedding_dim=128) is student_config("pocket_s", embedding_dim=0) is PRESETS["pocket_s"]
    assert student_config(base, embedding_dim=0).text.embedding_dim == 0
    assert student_config("pocket_s", backbone="pocket", image_size=72).image.backbone_args == PRESETS["pocket_s"].image.backbone_args


def test_variations_survive_json():
    from mobileclip.config import config_from_dict

    config = student_config("pocket_s", backbone="vit_tiny_patch16_224", image_size=32, vocab_size=514)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        ("pocket_q", {}, "unknown model 'pocket_q'"),
        ("pocket_s", {"backbone": "mobilenetv4_small"}, r"unknown to timm .*near it: mobilenetv4_conv_small"),
        ("pocket_s", {"backbone": "mobilenetv4_conv_small.e2400_r224_in1k"}, "names pretrained weights.*give 'mobilenetv4_conv_small'"),
        ("pocket_s", {"backbone": "fastvit"}, "no dimensions of its own"),
        ("pocket_s", {"backbone": "vit_small_patch32_224", "image_size": 16}, "does not take pictures of 16 x 16"),
        ("pocket_s", {"image_size": 8}, "image_size 8"),
        ("pocket_s", {"mask": "none"}, "expected 'causal' or 'pad'"),
        ("mobileclip_s0", {"mask": "causal"}, "mct text tower has no mask"),
        ("pocket_s", {"vocab_size": 513}, r"514 \(bytes only\) to 49408"),
        ("pocket_s", {"vocab_size": 49409}, "vocab_size is 49409"),
        ("pocket_s", {"context_length": 3}, "context_length 3"),
        ("pocket_s", {"embedding_dim": 127}, "gets smaller only with 1 to 126"),
        ("pocket_s", {"embedding_dim": -4}, "embedding_dim is -4"),
        ("pocket_s", {"vocab_size": 600, "embedding_dim": 120}, "a table of 600 tokens"),
        ("pocket_s", {"embed_dim": 0}, "at least 1"),
    ],
)
def test_refused_in_one_sentence(base, changes, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        student_config(base, **changes)
    assert "\n" not in str(caught.value)


def test_folded_pruned_and_foreign_bases_are_refused():
    base = PRESETS["pocket_s"]
    for changed, message in (
        (dataclasses.replace(base, folded=True), "has been folded"),
        (dataclasses.replace(base, ffn_widths={"text.blocks.0.mlp": 64}), "has been pruned"),
        (dataclasses.replace(base, text=dataclasses.replace(base.text, tokenizer="wordpiece")), "only CLIP's vocabulary"),
    ):
        with pytest.raises(CheckpointError, match=message):
            student_config(changed, vocab_size=4096)
