"""`mclip train` in several processes, as a person starts it: the result is that of one, a run goes on with another number, and what cannot be
shared is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from distill.recipes import RECIPES
from distill.train import TrainConfig, train
from runtime.errors import RecipeError

from .world import make_pairs, make_store


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("processes")
    make_pairs(root / "pairs")
    make_store(root / "store", root / "pairs")
    recipe = dataclasses.replace(RECIPES["reinforced"](), batch_size=12, text_samples=24, ghost_batch=2, learning_rate=1e-3)
    (root / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe)))
    train(settings(root, root / "alone"))
    return root


def settings(world: Path, out: Path, **changes: object) -> TrainConfig:
    base = TrainConfig(pairs=str(world / "pairs"), store=str(world / "store"), out=str(out), recipe=str(world / "recipe.json"), samples=192, prefetch_threads=0)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def start(world: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = ["--pairs", str(world / "pairs"), "--store", str(world / "store"), "--out", str(out), "--recipe", str(world / "recipe.json"), "--samples", "192"]
    environment = {**os.environ, "MCLIP_PROGRESS": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "mobileclip.cli", "train", *command, *more], env=environment, capture_output=True, text=True, timeout=300, check=False)


def losses(out: Path) -> np.ndarray:
    return np.array([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])


@pytest.mark.parametrize(("count", "exchange"), [(2, "gather"), (2, "ring"), pytest.param(3, "gather", marks=pytest.mark.slow), pytest.param(3, "ring", marks=pytest.mark.slow)])
def test_several_processes_write_what_one_writes(world: Path, tmp_path: Path, count: int, exchange: str) -> None:
    done = start(world, tmp_path / "shared", "--nproc", str(count), "--exchange", exchange)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("samples/s") == 1  # one process speaks
    alone, shared = losses(world / "alone"), losses(tmp_path / "shared")
    assert len(alone) == len(shared) > 10
    assert np.abs(alone - shared).max() < 2e-3 * alone.max()  # float32; in float64 it is 1e-10: test_accumulation.py
    assert np.abs(alone[:4] - shared[:4]).max() < 1e-5 * alone.max()
    assert json.loads((tmp_path / "shared" / "receipt.json").read_text())["figures"]["processes"] == count


def test_a_run_of_one_process_goes_on_in_two(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib

    asked = iter([False] * 5 + [True])
    monkeypatch.setattr("distill.train.stop_asked", lambda: contextlib.nullcontext(lambda: next(asked)))
    with pytest.raises(KeyboardInterrupt):
        train(settings(world, tmp_path / "out"))
    monkeypatch.undo()
    with safe_open(tmp_path / "out/state.safetensors", framework="pt") as state:
        assert state.metadata()["step"] == "6"
    done = start(world, tmp_path / "out", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    alone, continued = losses(world / "alone"), losses(tmp_path / "out")
    assert np.array_equal(alone[:6], continued[:6])
    assert len(alone) == len(continued)
    assert np.abs(alone - continued).max() < 2e-3 * alone.max()


def test_ghost_batches_of_the_whole_batch_are_the_plain_step(world: Path, tmp_path: Path) -> None:
    train(settings(world, tmp_path / "plain", ghost_batch=0))
    train(settings(world, tmp_path / "whole", ghost_batch=12))
    plain, whole = losses(tmp_path / "plain"), losses(tmp_path / "whole")
    assert np.abs(plain - whole).max() < 2e-3 * plain.max()
    names = load_file(tmp_path / "whole/model.safetensors")
    assert all(torch.isfinite(tensor.double()).all() for tensor in names.values())
    assert np.abs(plain - losses(world / "alone")).max() > 1e-3  # other statistics, another run


def test_what_cannot_be_shared_is_one_sentence(world: Path, tmp_path: Path) -> None:
    done = start(world, tmp_path / "out", "--nproc", "5")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: a batch of 12 cannot be shared by 5 processes; choose a batch_size that is a multiple of it\n"
    assert not (tmp_path / "out").exists()
    with pytest.raises(RecipeError, match="ghost_batch of 5 does not divide its batch_size of 12"):
        train(settings(world, tmp_path / "out", ghost_batch=5))
