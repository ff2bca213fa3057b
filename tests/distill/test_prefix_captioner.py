"""The prefix captioner: cached writing equals the whole forward; it learns from pairs of which half are wrong; runs go on where they stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.captioners import CaptionerOptions, Draft, open_captioner
from distill.captioning import CaptionConfig, caption
from distill.captions import open_captions
from distill.ensemble import open_teacher
from distill.nucleus import Sampling, uniforms
from distill.prefix_captioner import DecoderConfig, PrefixDecoder, Writer
from distill.prefix_training import CaptionerConfig, main, train_captioner
from distill.prefix_writing import PrefixCaptioner
from distill.self_retrieval import self_retrieval
from runtime.errors import CheckpointError, ClipError, PairsError, RecipeError, TrainingError
from runtime.files import file_sha256
from runtime.pairs import open_pairs, write_shard
from tests.distill.world import COLOURS, SHAPES, draw, make_pairs

SEEING = "tests.distill.tiny_teachers:seeing"
RED = "tests.distill.tiny_teachers:red"


def test_writing_with_kept_keys_and_values_equals_the_whole_forward() -> None:
    torch.manual_seed(0)
    model = PrefixDecoder(DecoderConfig(dims=(5, 3), vocab_size=20, width=16, heads=2, layers=2, prefix=3, context_length=8)).eval()
    condition, tokens = torch.randn(4, 8), torch.randint(0, 20, (8, 6))
    with torch.inference_mode():
        expected = model(condition.repeat_interleave(2, 0), tokens)
        writer, rows = Writer(model, condition, 2), torch.arange(8)
        for position in range(6):
            if position == 3:
                rows = torch.tensor([1, 4, 5])  # the others ended
            found = writer(tokens[rows, position], rows)
            torch.testing.assert_close(found, expected[rows, position], rtol=1e-4, atol=1e-5)


def test_impossible_sizes_are_refused() -> None:
    for bad in ({"dims": ()}, {"dims": (4,), "width": 15, "heads": 2}, {"dims": (4,), "context_length": 2}, {"dims": (4,), "layers": 0}):
        with pytest.raises(CheckpointError, match="a captioner cannot have the sizes"):
            DecoderConfig(**bad)  # type: ignore[arg-type]


def noisy_pairs(folder: Path, copies: int = 8) -> Path:
    """Every second caption belongs to another picture."""
    rng = np.random.default_rng(1)
    folder.mkdir()
    names = [(c, s) for c in COLOURS for s in SHAPES]
    samples = []
    for copy in range(copies):
        for n, (colour, shape) in enumerate(names):
            told = names[int(rng.integers(len(names)))] if (n + copy) % 2 else (colour, shape)
            samples.append((f"t{copy}-{n:02}", {"png": draw(colour, shape, rng), "txt": f"a {told[0]} {told[1]}".encode()}))
    write_shard(folder / "00000.tar", samples)
    return folder


SMALL: dict[str, Any] = {
    "steps": 120, "batch_size": 48, "width": 32, "heads": 2, "layers": 1, "prefix": 2, "context_length": 24, "vocab_size": 514, "noise": 0.5, "learning_rate": 5e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("prefix")
    pairs = noisy_pairs(folder / "pairs")
    return pairs, train_captioner(CaptionerConfig(pairs=str(pairs), out=str(folder / "captioner"), teacher=(SEEING, RED), **SMALL))


def test_wrong_captions_average_out_on_held_out_pictures(trained: tuple[Path, Path], tmp_path: Path) -> None:
    _, captioner = trained
    held_out = make_pairs(tmp_path / "held-out", copies=2, seed=9)
    caption(CaptionConfig(pairs=str(held_out), out=str(tmp_path / "c"), captioner=f"prefix:{captioner}", captions_per_image=3, batch=8))
    figures = self_retrieval(open_pairs(held_out), open_captions(tmp_path / "c"), [open_teacher(SEEING)])
    assert figures["pictures"] == 24
    # Half of the captions that were read are wrong; two pictures of each kind share the first rank, and ties count against us at rank 1.
    assert figures["label_share"] > 0.7
    assert figures["self_retrieval_recall5"] > 0.7
    assert figures["random_label_recall5"] < 0.35
    assert figures["own_label_recall5"] == 1.0
    made = open_captions(tmp_path / "c")
    assert made.facts["captioner"] == "prefix"
    assert "MIT" in made.facts["licence"]
    assert made.facts["captioner_sha256"] == file_sha256(captioner / "model.safetensors")


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill import prefix_training

    pairs = make_pairs(tmp_path / "pairs", copies=1)
    small = {**SMALL, "steps": 12, "dropout": 0.1, "save_seconds": 0.0}
    whole = train_captioner(CaptionerConfig(pairs=str(pairs), out=str(tmp_path / "whole"), teacher=(SEEING,), **small))
    step, calls = prefix_training._step, []

    def stopped(*arguments: Any) -> float:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(prefix_training, "_step", stopped)
    config = CaptionerConfig(pairs=str(pairs), out=str(tmp_path / "parts"), teacher=(SEEING,), **small)
    with pytest.raises(KeyboardInterrupt):
        train_captioner(config)
    assert not (tmp_path / "parts" / "receipt.json").exists()
    with pytest.raises(CheckpointError, match=r"is no prefix captioner: its config\.json cannot be used"):
        PrefixCaptioner(tmp_path / "parts", Sampling(max_tokens=9), 1)
    with pytest.raises(TrainingError, match="holds an unfinished run with other settings"):
        train_captioner(CaptionerConfig(pairs=str(pairs), out=str(tmp_path / "parts"), teacher=(SEEING,), **{**small, "noise": 0.7}))
    train_captioner(config)
    assert len(calls) == 8 + 12 - 7
    assert (tmp_path / "parts" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not (tmp_path / "parts" / "state.safetensors").exists()
    assert train_captioner(config) == tmp_path / "parts"
    with pytest.raises(TrainingError, match="made with other settings or data"):
        train_captioner(CaptionerConfig(pairs=str(pairs), out=str(tmp_path / "parts"), teacher=(SEEING,), **{**small, "seed": 1}))


def test_candidates_are_chosen_by_the_teachers(trained: tuple[Path, Path]) -> None:
    _, folder = trained
    vector = np.concatenate([open_teacher(spec).encode_text(["a red disc"])[0] for spec in (SEEING, RED)])
    captioner = PrefixCaptioner(folder, Sampling(max_tokens=9, temperature=1.5), 8)
    candidates = ["a blue stripe", "a red disc", "", "a red square", "a red disc", "a green disc"]
    assert captioner.select(vector, candidates, 2)[0] == "a red disc"
    assert len(captioner.select(vector, candidates, 9)) == 4
    pairs = open_pairs(trained[0])
    from distill.captioners import Request

    def mean_similarity(best_of: int) -> float:
        captioner = open_captioner(f"prefix:{folder}", CaptionerOptions(sampling=Sampling(max_tokens=9, temperature=1.5, top_p=1.0), best_of=best_of))
        randoms = {row: np.stack([uniforms(0, pairs.keys[row], n, 9) for n in range(best_of)]) for row in range(12)}
        asked = [Request(key=pairs.keys[row], picture=pairs.image(row), text=None, count=1, uniforms=randoms[row]) for row in randoms]
        made: Sequence[list[Draft]] = captioner.caption(asked)
        assert {drafts[0].note for drafts in made} == ({""} if best_of == 1 else {f"best of {best_of}"})
        inner: Any = captioner
        pictures = [np.concatenate([teacher.encode_image([request.picture])[0] for teacher in inner.teachers]) for request in asked if request.picture is not None]
        return float(np.mean([inner._text_vector(drafts[0].text) @ picture for drafts, picture in zip(made, pictures, strict=True)]))

    assert mean_similarity(8) > mean_similarity(1)


def test_captions_from_stored_vectors_read_no_picture(trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill.augment import AugmentSpec
    from distill.reinforce import ReinforceConfig, reinforce
    from runtime.pairs import Pairs

    _, captioner = trained
    mild = AugmentSpec(scale=(0.9, 1.0), operations=0)
    held_out = make_pairs(tmp_path / "held-out", copies=1, seed=9)
    broken = ("s9-00", {"png": b"no picture", "txt": b"a blue disc"})
    write_shard(held_out / "00001.tar", [broken])
    reinforce(ReinforceConfig(pairs=str(held_out), store=str(tmp_path / "store"), teachers=(RED, SEEING), augmentations=1, workers=0, templates=(), augment=mild))
    asked = {"pairs": str(held_out), "captioner": f"prefix:{captioner}", "captions_per_image": 2, "store": str(tmp_path / "store")}
    for read in ("image", "image_bytes"):
        monkeypatch.setattr(Pairs, read, lambda self, row: pytest.fail("a picture was read"))
    receipt = caption(CaptionConfig(**asked, out=str(tmp_path / "c")))  # type: ignore[arg-type]
    assert (receipt["counts"]["samples"], receipt["counts"]["skipped"]) == (12, 1)
    assert receipt["shards"]["00001"]["skipped"][0]["reason"] == "sample 's9-00' is not in the store"
    monkeypatch.undo()
    made = open_captions(tmp_path / "c")
    pairs = open_pairs(held_out)
    right = [made.get(key)[0].text == pairs.caption(row) for row, key in enumerate(pairs.keys) if key in made]
    assert len(right) == 12
    assert np.mean(right) > 0.6
    reinforce(ReinforceConfig(pairs=str(held_out), store=str(tmp_path / "other"), teachers=(RED,), augmentations=1, workers=0, templates=()))
    with pytest.raises(RecipeError, match="has no vectors of the captioner's teacher seeing; it has red"):
        caption(CaptionConfig(**{**asked, "store": str(tmp_path / "other")}, out=str(tmp_path / "d")))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="--store goes with prefix:CHECKPOINT alone"):
        caption(CaptionConfig(**{**asked, "captioner": "tests.distill.tiny_captioners:colours"}, out=str(tmp_path / "e")))  # type: ignore[arg-type]


def test_what_does_not_fit_is_named(trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    pairs, folder = trained
    with pytest.raises(RecipeError, match="--max-tokens is 24, but captioner .* writes at most 23"):
        PrefixCaptioner(folder, Sampling(max_tokens=24), 1)
    monkeypatch.setenv("SEEING_SHA256", "other")
    with pytest.raises(CheckpointError, match="is not the one that captioner .* was trained with"):
        PrefixCaptioner(folder, Sampling(max_tokens=9), 1)
    monkeypatch.undo()
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        PrefixCaptioner(copy, Sampling(max_tokens=9), 1)
    config = json.loads((copy / "config.json").read_text())
    for change in ({"kind": "other"}, {"decoder": {"dims": [4], "width": 15}}, {"teachers": [{"spec": "x"}]}, {"scale": None}):
        (copy / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=r"is no prefix captioner: its config\.json cannot be used|cannot have the sizes"):
            PrefixCaptioner(copy, Sampling(max_tokens=9), 1)
    with pytest.raises(RecipeError, match="needs a teacher"):
        CaptionerConfig(pairs=str(pairs), out="x", teacher=())
    with pytest.raises(RecipeError, match="steps 0"):
        CaptionerConfig(pairs=str(pairs), out="x", teacher=(RED,), steps=0)


def test_pairs_without_captions_teach_nothing(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    write_shard(tmp_path / "p" / "0.tar", [("a", {"png": draw("red", "disc", np.random.default_rng(0))}), ("b", {"png": b"x", "txt": b"\xff"}), ("c", {"png": b"x", "txt": b" "})])
    with pytest.raises(PairsError, match="none of the 3 pairs of .* has a usable caption"):
        train_captioner(CaptionerConfig(pairs=str(tmp_path / "p"), out=str(tmp_path / "c"), teacher=(RED,)))
    with pytest.raises(ClipError, match="teacher 'nobody'"):
        train_captioner(CaptionerConfig(pairs=str(tmp_path / "p"), out=str(tmp_path / "c"), teacher=("nobody",)))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = make_pairs(tmp_path / "pairs", copies=1)
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in {**SMALL, "steps": 3}.items()]
    assert main([str(pairs), str(tmp_path / "c"), "--teacher", RED, *arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["captions"] == 12
    assert told["parameters"] > 10_000
