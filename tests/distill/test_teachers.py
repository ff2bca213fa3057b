"""Teachers: checkpoints and open_clip models give exactly their model's embeddings, quickly, in any batch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill import frozen_tower, teachers
from distill.ensemble import Teacher, check_output, encode_texts, encode_views, open_teacher
from distill.frozen_tower import fold_norms, frozen
from mobileclip.checkpoint import open_tokenizer, preprocess_config, save_checkpoint
from mobileclip.config import ImageConfig, ModelConfig, TextConfig
from mobileclip.model import ImageTextModel
from runtime.errors import CheckpointError, RecipeError, StoreError
from runtime.preprocess import preprocess
from tests.distill import tiny_teachers

SIZE = 48
TEXTS = ["a red heart", "cat", "a much longer text that does not fit into the twelve tokens of this tower at all", "", "猫 é", "cat"]


def tiny_config(mask: str, name: str = "tiny") -> ModelConfig:
    return ModelConfig(
        name=name, embed_dim=16, licence="MIT",
        image=ImageConfig(backbone="tf_efficientnet_lite0", image_size=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", projection="mlp", projection_hidden=8),
        text=TextConfig(context_length=12, vocab_size=600, width=32, heads=4, layers=2, mask=mask),
    )  # fmt: skip


def calibrated(config: ModelConfig, seed: int = 0) -> ImageTextModel:
    """Random weights whose BatchNorm statistics come from structured pictures, so that embeddings differ."""
    torch.manual_seed(seed)
    model = ImageTextModel(config).train()
    with torch.no_grad():
        for _ in range(12):
            model.encode_image(torch.from_numpy(preprocess(pictures(8), preprocess_config(config))))
    return model.eval()


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(count)
    return [Image.fromarray(rng.integers(0, 256, (3, 3 + n % 3, 3), dtype=np.uint8)).resize((50 + n, 60), Image.Resampling.BICUBIC) for n in range(count)]


@pytest.fixture(scope="module", params=["causal", "pad", "none"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageTextModel, Path]:
    model = calibrated(tiny_config(request.param))
    return model, save_checkpoint(model, tmp_path_factory.mktemp("teacher") / f"tiny-{request.param}")


def test_a_checkpoint_teacher_equals_its_model(checkpoint: tuple[ImageTextModel, Path]) -> None:
    model, folder = checkpoint
    teacher = open_teacher(str(folder))
    assert isinstance(teacher, Teacher)
    assert teacher.facts.name == folder.name
    assert teacher.facts.dim == 16
    assert teacher.facts.licence == "MIT"
    assert teacher.facts.logit_scale == pytest.approx(1 / 0.07, rel=1e-5)
    assert len(teacher.facts.sha256) == 64
    images = pictures(21)
    with torch.inference_mode():
        expected = model.encode_image(torch.from_numpy(preprocess(images, preprocess_config(model.config)))).numpy()
        tokens = torch.from_numpy(open_tokenizer(folder)(TEXTS))
        expected_text = model.encode_text(tokens).numpy()
    assert np.linalg.norm(expected - expected.mean(0), axis=1).min() > 0.05  # the embeddings do differ
    found = teacher.encode_image(images)
    assert found.dtype == np.float32
    assert (found * expected).sum(1).min() > 0.99999
    assert (teacher.encode_text(TEXTS) * expected_text).sum(1).min() > 0.99999


def test_views_of_the_exact_size_are_taken_as_they_are(checkpoint: tuple[ImageTextModel, Path]) -> None:
    teacher = open_teacher(str(checkpoint[1]))
    views = np.random.default_rng(0).integers(0, 256, (19, SIZE, SIZE, 3), dtype=np.uint8)
    whole = teacher.encode_image(views)
    assert np.abs(whole - teacher.encode_image([Image.fromarray(view) for view in views])).max() < 1e-6
    assert np.abs(whole - np.concatenate([teacher.encode_image(views[n : n + 1]) for n in range(19)])).max() < 1e-5
    with pytest.raises(StoreError, match="takes views of 48 px, was given 40 px"):
        teacher.encode_image(views[:, :40, :40])


def test_empty_lists_give_empty_embeddings(checkpoint: tuple[ImageTextModel, Path]) -> None:
    teacher = open_teacher(str(checkpoint[1]))
    assert teacher.encode_image(np.zeros((0, SIZE, SIZE, 3), np.uint8)).shape == (0, 16)
    assert teacher.encode_text([]).shape == (0, 16)


def test_teachers_with_one_text_trunk_share_its_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = calibrated(tiny_config("pad"))
    second = calibrated(tiny_config("pad", name="other"), seed=5)
    second.text.load_state_dict({**first.text.state_dict(), "projection.weight": second.text.projection.weight})
    stranger = calibrated(tiny_config("pad", name="stranger"), seed=6)
    teachers = [open_teacher(str(save_checkpoint(model, tmp_path / name))) for name, model in (("a", first), ("b", second), ("c", stranger))]
    calls: list[str] = []
    for teacher in teachers:
        original = teacher.text_features
        monkeypatch.setattr(teacher, "text_features", lambda texts, original=original, name=teacher.facts.name: calls.append(name) or original(texts))
    together = encode_texts(teachers, TEXTS)
    assert calls == ["a", "c"]
    for teacher, found in zip(teachers, together, strict=True):
        assert np.abs(teacher.encode_text(TEXTS) - found).max() < 1e-6
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_text_features_are_remembered_across_teachers_of_one_trunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = calibrated(tiny_config("pad")), calibrated(tiny_config("pad"), seed=5)
    second.text.load_state_dict({**first.text.state_dict(), "projection.weight": second.text.projection.weight})
    one, other = (open_teacher(str(save_checkpoint(model, tmp_path / name))) for name, model in (("a", first), ("b", second)))
    monkeypatch.setattr(teachers, "_ANSWERS", {})
    monkeypatch.setattr(teachers, "KEPT_ANSWERS", 2)
    mine = one.text_features(TEXTS)
    mine[:] = 0  # the caller's copy
    assert len(one.text_features(["a\0b"])) == 1
    assert len(one.text_features(["a", "b"])) == 2
    one.text_features(TEXTS)
    monkeypatch.setattr(other, "_text_features", lambda texts: 1 / 0)
    assert np.abs(other.text_features(TEXTS)).max() > 0
    one.text_features(TEXTS[:1])
    one.text_features(TEXTS[:2])
    with pytest.raises(ZeroDivisionError):
        other.text_features(TEXTS)


def test_frozen_towers_keep_the_output_or_stay_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = calibrated(tiny_config("pad")).image
    pixels = torch.from_numpy(preprocess(pictures(4), preprocess_config(tiny_config("pad"))))
    with torch.inference_mode():
        assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in fold_norms(model).modules())
        assert any(isinstance(part, torch.nn.BatchNorm2d) for part in model.modules())
        fast = frozen(model, SIZE)
        assert "_onnx" in fast.__qualname__
        assert torch.allclose(fast(pixels), model(pixels), rtol=1e-3, atol=1e-4)
        assert torch.equal(fast(pixels[:1]), fast(pixels[:1]))
        monkeypatch.setattr(frozen_tower, "_onnx", lambda module, noise: 1 / 0)
        slow = frozen(model, SIZE)
        assert "_torch" in slow.__qualname__
        assert torch.allclose(slow(pixels), model(pixels), rtol=1e-3, atol=1e-4)

    class Crossed(torch.nn.Module):
        """The norm stands behind the convolution but is called before it: folding would be wrong."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 3, 3), torch.nn.BatchNorm2d(3)
            self.norm.running_mean.fill_(0.7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.norm(x)).relu().mean((2, 3))

    crossed = Crossed().eval()
    noise = torch.rand(2, 3, 16, 16)
    with torch.inference_mode():
        assert not torch.allclose(fold_norms(crossed)(noise), crossed(noise))
        assert torch.allclose(frozen(crossed, 16)(noise), crossed(noise), atol=1e-5)


def test_an_open_clip_teacher_equals_open_clip() -> None:
    import open_clip

    teacher = open_teacher("open_clip:ViT-S-32-alt")
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms("ViT-S-32-alt", pretrained=None)
    model.eval()
    images = pictures(3)
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(model.encode_image(torch.stack([transform(image) for image in images])), dim=-1).numpy()
        expected_text = torch.nn.functional.normalize(model.encode_text(open_clip.get_tokenizer("ViT-S-32-alt")(TEXTS)), dim=-1).numpy()
    assert (teacher.encode_image(images) * expected).sum(1).min() > 0.99999
    assert (teacher.encode_text(TEXTS) * expected_text).sum(1).min() > 0.99999
    assert teacher.facts.dim == expected.shape[1]
    assert teacher.image_size == 224
    assert "random" in teacher.facts.licence


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("open_clip:ViT-Nothing", CheckpointError, "no model 'ViT-Nothing'"),
        ("open_clip:ViT-S-32-alt/no_such_tag", CheckpointError, "cannot load 'ViT-S-32-alt' with weights 'no_such_tag'"),
        ("somewhere/else", RecipeError, "give one of the three"),
        ("json:nothing", RecipeError, "cannot be imported"),
        ("os:getcwd", RecipeError, "returned str, which lacks facts"),
    ],
)
def test_names_that_lead_nowhere(spec: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        open_teacher(spec)


def test_a_folder_that_is_no_checkpoint_and_one_that_changed(checkpoint: tuple[ImageTextModel, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        open_teacher(str(tmp_path))
    model, _ = checkpoint
    folder = save_checkpoint(model, tmp_path / "changed")
    blob = bytearray((folder / "model.safetensors").read_bytes())
    blob[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(blob))
    with pytest.raises(CheckpointError, match="has changed"):
        open_teacher(str(folder))


def test_what_a_foreign_teacher_returns_is_checked() -> None:
    teacher = tiny_teachers.red()
    assert np.allclose(np.linalg.norm(check_output(teacher, 3 * np.ones((2, 8)), 2, "texts"), axis=1), 1)
    for wrong in (np.ones((2, 7)), np.ones((3, 8)), np.full((2, 8), np.inf)):
        with pytest.raises(StoreError, match="teacher 'red' returned"):
            check_output(teacher, wrong, 2, "texts")
    views = np.zeros((2, 32, 32, 3), np.uint8)
    assert encode_views([teacher], {32: views})[0].shape == (2, 8)
    facts = dataclasses.asdict(teacher.facts)
    for field, value in (("dim", 0), ("logit_scale", -1.0), ("logit_scale", float("nan")), ("name", "")):
        with pytest.raises(StoreError):
            type(teacher.facts)(**{**facts, field: value})


def test_what_a_text_or_view_gives_does_not_depend_on_the_others(checkpoint: tuple[ImageTextModel, Path]) -> None:
    """Bit for bit: alone, beside others, in another place of its micro-batch."""
    teacher = open_teacher(str(checkpoint[1]))
    texts = [*TEXTS[:5], *(f"{'word ' * (n % 11)}{n}" for n in range(9))]
    whole = encode_texts([teacher], texts)[0]
    order = np.random.default_rng(1).permutation(len(texts))
    assert (encode_texts([teacher], [texts[n] for n in order])[0] == whole[order]).all()
    assert (np.concatenate([encode_texts([teacher], [text])[0] for text in texts]) == whole).all()
    views = np.random.default_rng(0).integers(0, 256, (11, SIZE, SIZE, 3), dtype=np.uint8)
    seen = encode_views([teacher], {SIZE: views})[0]
    order = np.random.default_rng(2).permutation(11)
    assert (encode_views([teacher], {SIZE: views[order]})[0] == seen[order]).all()
    assert (np.concatenate([encode_views([teacher], {SIZE: views[n : n + 1]})[0] for n in range(11)]) == seen).all()


def test_every_call_of_a_teacher_has_its_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_teachers.red()
    calls: list[int] = []
    image, text = teacher.encode_image, teacher.encode_text
    monkeypatch.setattr(teacher, "encode_image", lambda rows: calls.append(len(rows)) or image(rows))
    monkeypatch.setattr(teacher, "encode_text", lambda rows: calls.append(len(rows)) or text(rows))
    views = np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), dtype=np.uint8)
    assert np.abs(encode_views([teacher], {32: views})[0] - image(views)).max() < 1e-6
    assert np.abs(encode_texts([teacher], ["a", "b"])[0] - text(["a", "b"])).max() < 1e-6
    assert calls == [8, 8, 8]
    teacher.facts = dataclasses.replace(teacher.facts, micro_batch=5)
    encode_views([teacher], {32: views})
    assert calls == [8, 8, 8, 5, 5, 5]
    assert encode_texts([teacher], [])[0].shape == (0, 8)


def test_rows_that_are_no_numbers_are_kept_apart_when_asked() -> None:
    teacher = tiny_teachers.moody()
    found = encode_texts([teacher], ["red", "magenta", "blue"], finite=False)[0]
    assert np.isnan(found[1]).all()
    assert np.allclose(np.linalg.norm(found[[0, 2]], axis=1), 1)
    with pytest.raises(StoreError, match="finite: False"):
        encode_texts([teacher], ["red", "magenta"])


def test_another_device_is_used_in_bfloat16_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way a GPU goes, on a device that every machine has; a GPU that is not there is refused."""
    from distill.teachers import choose_device

    folder = save_checkpoint(calibrated(tiny_config("pad")), tmp_path / "teacher")
    plain = open_teacher(str(folder))
    monkeypatch.setattr(teachers, "choose_device", lambda device: "cpu:0")
    there = open_teacher(str(folder), "cuda")
    assert (plain.facts.preprocessing["precision"], plain.facts.micro_batch) == ("float32", 8)
    assert (there.facts.preprocessing["precision"], there.facts.micro_batch) == ("bfloat16", 128)
    views = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)
    difference = np.abs(plain.encode_image(views) - there.encode_image(views)).max()
    assert 0 < difference < 0.1
    assert (plain.encode_text(TEXTS) * there.encode_text(TEXTS)).sum(1).min() > 0.99
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    with pytest.raises(RecipeError, match="torch sees no GPU here"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == choose_device("cuda") == "cuda:0"
    assert choose_device("cuda:1") == "cuda:1"
