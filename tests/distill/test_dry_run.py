"""`mclip train --dry-run` says what a run would be, and its one step is the trainer's own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.compute import Compute
from distill.dry_run import _per_sample, dry_run
from distill.objective import encode_texts
from distill.recipes import RECIPES
from distill.train import TrainConfig, main
from mobileclip.models import create_model
from mobileclip.students import student_config
from runtime.errors import RecipeError

from .world import make_pairs, make_store


def test_it_says_shapes_steps_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    facts = dry_run(TrainConfig(recipe="datacompdr_s", samples=245_760_000), world=32)
    assert (facts["steps"], facts["warmup_steps"], facts["batch_of_a_process"], facts["ghost_batches_of_a_process"]) == (30_000, 1000, 256, 1)
    assert facts["shapes"]["tokens"] == [512, 20]  # a real and a synthetic caption of every picture
    assert facts["shapes"]["teachers"] == [[8192, 768], [8192, 768]]
    total = facts["parameters"]["total"]
    assert facts["memory_bytes"]["optimizer"] == 8 * total == 2 * facts["memory_bytes"]["weights"]
    assert facts["memory_bytes"]["similarities"] == 4 * 8192**2 * 9
    assert main(["--dry-run", "--recipe", "plain", "--samples", "1280"]) == 0
    said = capsys.readouterr().out
    assert "10 steps of 128" in said
    assert "one step of 4 random samples on cpu in fp32: loss" in said


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_takes_a_step(name: str) -> None:
    facts = dry_run(TrainConfig(recipe=name, samples=819_200))
    assert facts["one_step"]["loss"] > 0


def test_counted_memory_is_what_autograd_keeps() -> None:
    """Of a tower whose bytes can be written down: linear layers keep their input, and nothing else that grows."""
    model = create_model(student_config("pocket_s")).train()
    kept = _per_sample(model, Compute(), "image")
    whole: dict[int, int] = {}
    pixels = torch.randn(16, 3, 64, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: whole.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) and t, lambda t: t):
        result = model.encode_image(pixels)
    assert kept * 16 == pytest.approx(sum(whole.values()) - sum(p.untyped_storage().nbytes() for p in model.image.parameters()), rel=0.15)
    assert result.shape == (16, 256)


def test_checkpointed_blocks_and_small_ghost_batches_need_less() -> None:
    def activations(**changes: object) -> float:
        return dry_run(dataclasses.replace(TrainConfig(recipe="plain", samples=1280), **changes))["memory_bytes"]["activations"]  # type: ignore[arg-type]

    whole = activations()
    assert activations(grad_checkpointing=True) < 0.7 * whole
    assert activations(ghost_batch=32) == pytest.approx(whole / 4)


def test_the_ring_holds_a_share(tmp_path: Path) -> None:
    facts = {exchange: dry_run(TrainConfig(recipe="datacompdr_s", samples=245_760, exchange=exchange), world=32)["memory_bytes"] for exchange in ("gather", "ring")}
    assert facts["ring"]["similarities"] * 32**2 == facts["gather"]["similarities"]


def test_a_store_says_what_its_teachers_are(tmp_path: Path) -> None:
    make_pairs(tmp_path / "pairs", copies=1)
    make_store(tmp_path / "store", tmp_path / "pairs")
    facts = dry_run(TrainConfig(recipe="reinforced", store=str(tmp_path / "store"), samples=640))
    assert facts["shapes"]["teachers"] == [[64, 16], [64, 24]]


def test_what_a_run_lacks_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="needs --store, --out; give the pairs"):
        main(["--pairs", str(tmp_path)])
    with pytest.raises(RecipeError, match="cannot be shared by 7 processes"):
        dry_run(TrainConfig(recipe="plain", samples=1280), world=7)


def test_a_tower_that_sees_its_padding_gets_it_whole(tmp_path: Path) -> None:
    config = student_config("pocket_s")
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, mask="none"))
    torch.manual_seed(0)
    model = create_model(config).eval()
    tokens = np.zeros((6, 20), np.int32)
    for row, length in enumerate((3, 9, 4, 20, 7, 5)):
        tokens[row, :length] = np.arange(1, length + 1)
        tokens[row, length - 1] = 8191
    with torch.no_grad():
        torch.testing.assert_close(encode_texts(model, tokens), model.encode_text(torch.from_numpy(tokens)))


def test_such_a_model_trains_on_from_its_checkpoint(tmp_path: Path) -> None:
    from distill.train import train
    from mobileclip.checkpoint import load_checkpoint, save_checkpoint

    make_pairs(tmp_path / "pairs")
    make_store(tmp_path / "store", tmp_path / "pairs")
    config = student_config("pocket_s")
    torch.manual_seed(0)
    save_checkpoint(create_model(dataclasses.replace(config, text=dataclasses.replace(config.text, mask="none"))), tmp_path / "start")
    (tmp_path / "r.json").write_text(json.dumps({**dataclasses.asdict(RECIPES["finetune"]()), "batch_size": 8, "learning_rate": 1e-3}))
    places = {name: str(tmp_path / name) for name in ("pairs", "store", "out")}
    out = train(TrainConfig(**places, init=str(tmp_path / "start"), recipe=str(tmp_path / "r.json"), samples=160))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert np.mean([line["loss"] for line in lines[-3:]]) < np.mean([line["loss"] for line in lines[:3]])
    assert load_checkpoint(out).config.text.mask == "none"
