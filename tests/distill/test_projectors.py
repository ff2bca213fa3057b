"""Sample teachers: packaged weights equal their packages, training survives wrong captions, the checkpoint is an ordinary one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distill.ensemble import open_teacher
from distill.projector_training import Features, Settings, calibrate, recall_at, train_projectors
from distill.projectors import (
    BACKBONES,
    TEXT_PACKAGE,
    ProjectorConfig,
    backbone_state,
    build_teacher,
    frozen_model,
    package_file,
    read_features,
    teacher_config,
    text_state,
)
from mobileclip.checkpoint import load_checkpoint
from runtime.errors import CheckpointError, MissingExtraError, PairsError
from runtime.files import file_sha256
from runtime.pairs import open_pairs, write_shard
from runtime.tokenizer import Tokenizer
from tests.distill.test_reinforce import picture

TEXTS = ["a red heart", "grinning face with big eyes", "x", "Flag: Côte d'Ivoire", "keycap: 10", "猫"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_image_features_equal_the_package(backbone: str) -> None:
    import timm
    from efficientnet_lite_pytorch import EfficientNet

    theirs = EfficientNet.from_name(backbone.removeprefix("tf_").replace("efficientnet_lite", "efficientnet-lite"))
    theirs.load_state_dict(torch.load(package_file(BACKBONES[backbone], "models/*.pth"), weights_only=True))
    ours = timm.create_model(backbone, num_classes=0)
    ours.load_state_dict(backbone_state(backbone))
    size = theirs.input_image_size if isinstance(theirs.input_image_size, int) else theirs.input_image_size[0]
    pixels = F.interpolate(torch.rand(3, 3, 9, 9, generator=torch.Generator().manual_seed(0)), size, mode="bicubic") * 2 - 1
    with torch.inference_mode():
        expected = theirs.eval().extract_features(pixels).mean((2, 3))
        found = ours.eval()(pixels)
    assert expected.std(0).mean() > 0.01  # three pictures, three answers
    assert (found - expected).abs().max() < 1e-4


def test_text_features_equal_transformers() -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = package_file(TEXT_PACKAGE, "model/config.json").parent
    theirs, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    model = frozen_model(teacher_config("tf_efficientnet_lite0", 64, 32, 16, 8))
    model.text.projection = torch.nn.Identity()
    ours = Tokenizer.open(folder / "tokenizer.json", context_length=24, cleaning="none", pad_id=0)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = theirs(**batch).last_hidden_state
        mask = batch["attention_mask"][:, :, None].float()
        expected = (hidden * mask).sum(1) / mask.sum(1)
        tokens = torch.from_numpy(ours(TEXTS))
        found, trimmed = model.text(tokens), model.text(tokens[:, : batch["input_ids"].shape[1]])
    assert torch.equal(tokens[:, : batch["input_ids"].shape[1]].long(), batch["input_ids"])
    assert (found - expected).abs().max() < 1e-4
    assert (trimmed - expected).abs().max() < 1e-4


def test_the_text_map_covers_every_tensor_but_the_projection() -> None:
    model = frozen_model(teacher_config("tf_efficientnet_lite0", 64, 32, 16, 8))
    wanted = {name for name in model.text.state_dict() if not name.startswith("projection.")}
    assert set(text_state()) == wanted


def test_packages_that_are_missing_or_unknown() -> None:
    with pytest.raises(CheckpointError, match="backbone 'resnet50' has no packaged weights"):
        backbone_state("resnet50")
    with pytest.raises(MissingExtraError, match=r"mobileclip-edge\[sample\]"):
        package_file("no_such_package_here", "*.pth")
    with pytest.raises(CheckpointError, match="has 0 files like"):
        package_file(TEXT_PACKAGE, "model/*.onnx")


# ---------------------------------------------------------------- training


def toy(noise: float, seed: int = 0, concepts: int = 60, each: int = 12) -> tuple[Features, Features, torch.Tensor]:
    """Concepts with a picture code and a text code; a share of the pairs gets another concept's caption or a generic one."""
    rng = torch.Generator().manual_seed(seed)
    pictures, texts = torch.randn(concepts, 40, generator=rng), torch.randn(concepts + 1, 24, generator=rng)
    concept = torch.arange(concepts).repeat_interleave(each)
    images = pictures[concept] + 0.8 * torch.randn(len(concept), 40, generator=rng)
    wrong = torch.rand(len(concept), generator=rng) < noise
    other = torch.where(torch.rand(len(concept), generator=rng) < 0.5, torch.randint(concepts, (len(concept),), generator=rng), torch.tensor(concepts))
    captions = torch.where(wrong, other, concept)
    unseen = Features(
        images=pictures + 0.8 * torch.randn(concepts, 40, generator=rng), texts=texts, caption_of=torch.arange(concepts), queries=torch.ones(concepts, dtype=torch.bool)
    )
    return Features(images=images, texts=texts, caption_of=captions, queries=torch.zeros(len(concept), dtype=torch.bool)), unseen, ~wrong


TOY = Settings(embed_dim=16, hidden=32, text_hidden=8, epochs=30, batch_size=128, learning_rate=1e-2, dropout=0.1)


def test_training_learns_and_repeats_exactly() -> None:
    known, unseen, _ = toy(noise=0.0)
    first, again = train_projectors(known, TOY), train_projectors(known, TOY)
    assert recall_at(first, unseen, 1) > 0.7
    assert torch.equal(first.image.fc1.weight, again.image.fc1.weight)
    assert torch.equal(first.text.fc2.weight, again.text.fc2.weight)


def test_selection_finds_the_right_captions_and_raises_recall() -> None:
    known, unseen, right = toy(noise=0.6)
    trusting = train_projectors(known, TOY)
    careful = train_projectors(known, Settings(**{**{f: getattr(TOY, f) for f in TOY.__dataclass_fields__}, "keep": 0.4}))
    assert trusting.trusted.all()
    assert float(right.float().mean()) < 0.45
    assert float(right[careful.trusted].float().mean()) > 0.75
    assert recall_at(careful, unseen, 1) > recall_at(trusting, unseen, 1)


def test_the_calibrated_scale_is_the_likeliest() -> None:
    known, unseen, _ = toy(noise=0.0)
    made = train_projectors(known, TOY)
    scores = made.encode_text(unseen.texts)[unseen.caption_of] @ made.encode_image(unseen.images).T
    loss = {scale: float(F.cross_entropy(scale * scores, torch.arange(len(scores)))) for scale in (5.0, calibrate(made, unseen), 60.0)}
    assert min(loss, key=loss.__getitem__) == calibrate(made, unseen)
    assert 5 < calibrate(made, unseen) < 60


def test_training_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    train_projectors(toy(0.0)[0], Settings(embed_dim=8, hidden=8, text_hidden=4, epochs=1))
    assert torch.equal(torch.rand(1), expected)


# ---------------------------------------------------------------- the stage


def make_pairs(folder: Path, count: int = 24) -> Path:
    folder.mkdir(parents=True)
    samples = [(f"p{n:02d}", {"png": picture(n) if n != 5 else b"broken", "txt": f"thing {n % 9}".encode(), "json": json.dumps({"label": "clean"}).encode()}) for n in range(count)]
    write_shard(folder / "a.tar", samples)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict]:
    folder = tmp_path_factory.mktemp("projectors")
    pairs = make_pairs(folder / "pairs")
    figures = build_teacher(ProjectorConfig(pairs=str(pairs), out=str(folder / "lite0"), validation=str(pairs), image_size=64, keep=(1.0, 0.6)))
    return pairs, folder / "lite0", figures


def test_the_checkpoint_is_an_ordinary_teacher(built: tuple[Path, Path, dict]) -> None:
    pairs, folder, figures = built
    assert figures["pairs"] == 23
    assert figures["skipped"] == 1
    assert set(figures["validation_recall5_by_keep"]) == {"1.0", "0.6"}
    assert figures["validation_recall5"] == max(figures["validation_recall5_by_keep"].values())
    model = load_checkpoint(folder)
    teacher = open_teacher(str(folder))
    assert teacher.facts.dim == 256
    assert teacher.image_size == 64
    assert "Apache" in teacher.facts.licence
    assert teacher.facts.logit_scale == pytest.approx(float(model.logit_scale.detach().exp()), rel=1e-6)
    images = [open_pairs(pairs).image(row) for row in range(5)]
    found = teacher.encode_image(images)
    assert found.shape == (5, 256)
    assert np.abs(found @ found.T - np.eye(5)).max() > 0.01


def test_standardisation_is_folded_into_the_checkpoint(built: tuple[Path, Path, dict], tmp_path: Path) -> None:
    """The stored model gives on raw features what the trained projectors gave on standardised ones."""
    from distill.projectors import place

    model = frozen_model(teacher_config("tf_efficientnet_lite0", 64, 16, 32, 8))
    known = read_features(model, open_pairs(built[0]), "features of the pairs")
    trained = train_projectors(known, Settings(embed_dim=16, hidden=32, text_hidden=8, epochs=3))
    place(trained, model)
    with torch.inference_mode():
        assert torch.allclose(F.normalize(model.image.projection(known.images), dim=1), trained.encode_image(known.images), atol=1e-4)
        assert torch.allclose(F.normalize(model.text.projection(known.texts), dim=1), trained.encode_text(known.texts), atol=1e-4)
    assert known.caption_of.shape == (23,)
    assert known.texts.shape[0] == 9
    few = read_features(model, open_pairs(built[0]), "features of the pairs", limit=5)
    assert len(few.images) + few.skipped == 5
    assert torch.allclose(few.images[0], known.images[0], atol=1e-5)
    assert len(few.texts) <= 5


def test_a_finished_teacher_is_left_alone_and_a_damaged_one_made_again(built: tuple[Path, Path, dict], tmp_path: Path) -> None:
    pairs, folder, figures = built
    config = ProjectorConfig(pairs=str(pairs), out=str(folder), validation=str(pairs), image_size=64, keep=(1.0, 0.6))
    before, digest = (folder / "model.safetensors").stat().st_mtime_ns, file_sha256(folder / "model.safetensors")
    assert build_teacher(config) == figures
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    (folder / "config.json").write_text("{}")
    assert build_teacher(config)["validation_recall5"] == figures["validation_recall5"]
    assert file_sha256(folder / "model.safetensors") == digest  # the same seed, the same bytes


def test_pairs_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(PairsError):
        build_teacher(ProjectorConfig(pairs=str(tmp_path / "nowhere"), out=str(tmp_path / "out")))
    (tmp_path / "pairs").mkdir()
    write_shard(tmp_path / "pairs" / "a.tar", [("x", {"png": b"no", "txt": b"caption"}), ("y", {"png": picture(1), "txt": b"\xff"})])
    with pytest.raises(PairsError, match="has 0 usable pairs of 2"):
        build_teacher(ProjectorConfig(pairs=str(tmp_path / "pairs"), out=str(tmp_path / "out")))
    assert not (tmp_path / "out" / "receipt.json").exists()
