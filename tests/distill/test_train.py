"""Training: learns, continues exactly after any interruption, refuses what does not fit."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distill import train as train_module
from distill.dataset import ReinforcedPairs
from distill.recipes import RECIPES, Recipe, load_recipe
from distill.store import open_store
from distill.train import Average, TrainConfig, encode_texts, learning_rate, train
from mobileclip import create_model
from mobileclip.checkpoint import build_tokenizer
from runtime.errors import RecipeError, StoreError, TrainingError
from runtime.pairs import open_pairs
from runtime.preprocess import PreprocessConfig
from runtime.tokenizer import Tokenizer

from .world import make_pairs, make_store

PIXELS = PreprocessConfig(image_size=64, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), interpolation="bilinear")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    make_pairs(root / "pairs")
    make_store(root / "store", root / "pairs")
    recipe = dataclasses.asdict(dataclasses.replace(RECIPES["reinforced"](), batch_size=8, text_samples=16))
    (root / "recipe.json").write_text(json.dumps(recipe))
    build_tokenizer(8192, root / "tokenizer.json")
    return root


def config(world: Path, out: Path, **changes) -> TrainConfig:
    base = TrainConfig(pairs=str(world / "pairs"), store=str(world / "store"), out=str(out), recipe=str(world / "recipe.json"), samples=160)
    return dataclasses.replace(base, **changes)


def dataset(world: Path, **changes) -> ReinforcedPairs:
    tokenizer = Tokenizer.open(world / "tokenizer.json", context_length=20, cleaning="clip", pad_id=0)
    return ReinforcedPairs(open_pairs(world / "pairs"), open_store(world / "store"), PIXELS, tokenizer, seed=changes.pop("seed", 0), **changes)


@pytest.fixture(scope="module")
def straight(world):
    out = world / "straight"
    train(config(world, out))
    return load_file(out / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_order_is_a_permutation_each_epoch_and_batches_cross_epochs(world):
    data = dataset(world)
    n = len(data)
    whole = data.batch(0, 2 * n)
    assert sorted(whole.rows[:n]) == sorted(whole.rows[n:]) == list(range(n))
    assert list(whole.rows[:n]) != list(whole.rows[n:])
    pieces = [data.batch(start, 10) for start in range(0, 2 * n - 9, 10)]
    np.testing.assert_array_equal(np.concatenate([piece.rows for piece in pieces]), whole.rows[: 10 * len(pieces)])
    np.testing.assert_array_equal(np.concatenate([piece.pixels for piece in pieces]), whole.pixels[: 10 * len(pieces)])
    assert set(whole.augs) == {0, 1}
    assert set(whole.captions) == {0, 1}
    assert set(dataset(world, caption_types=("raw",)).batch(0, n).captions) == {0}
    assert not np.array_equal(dataset(world, seed=1).batch(0, n).rows, whole.rows[:n])


def test_cached_views_are_the_replayed_ones(world):
    cached, uncached = dataset(world), dataset(world, cache_bytes=0)
    for _ in range(2):
        np.testing.assert_array_equal(cached.batch(0, 48).pixels, uncached.batch(0, 48).pixels)


def test_tokens_are_cut_after_the_longest_text(world):
    batch = dataset(world).batch(0, 16)
    assert batch.tokens.shape[1] < 20
    assert (batch.tokens == 8191).sum() == 16
    assert len(set(batch.same)) == len({tuple(row) for row in batch.tokens})


def test_a_store_of_other_pairs_is_refused(world, tmp_path):
    make_pairs(tmp_path / "pairs", copies=1)
    with pytest.raises(TrainingError, match=r"the store does not belong to these pairs: 36 of its 48 samples"):
        train(config(world, tmp_path / "out", pairs=str(tmp_path / "pairs")))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_the_reinforced_student_learns_the_world(world, tmp_path):
    out = train(config(world, tmp_path / "out", samples=1600, validation=str(world / "pairs"), validations=1, learning_rate=3e-3))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["phase"] == "pairs")
    assert lines[-1]["samples"] == 1600
    assert lines[-1]["loss_terms"]["feature"] < 0.5 * first["loss_terms"]["feature"]
    assert lines[-1]["validation"]["recall@1_all"] > 0.5  # by chance 4 of 48 pictures are right
    receipt = json.loads((out / "receipt.json").read_text())
    assert receipt["store_licences"] == ["test"]
    assert not (out / "state.safetensors").exists()


def test_same_settings_same_weights(world, straight, tmp_path):
    train(config(world, tmp_path / "again"))
    assert same(straight, load_file(tmp_path / "again" / "model.safetensors"))
    train(config(world, tmp_path / "other", seed=1))
    assert not same(straight, load_file(tmp_path / "other" / "model.safetensors"))


@pytest.mark.parametrize("stop_at", [1, 5])
def test_interrupted_runs_continue_to_the_same_weights(world, straight, tmp_path, monkeypatch, stop_at):
    real, calls = train_module._step, []

    def interrupted(*args):
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(train_module, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config(world, tmp_path / "out"))
    assert (tmp_path / "out" / "state.safetensors").exists()
    monkeypatch.setattr(train_module, "_step", real)
    train(config(world, tmp_path / "out"))
    assert same(straight, load_file(tmp_path / "out" / "model.safetensors"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_a_killed_process_continues_to_the_same_weights(world, straight, tmp_path):
    out = tmp_path / "out"
    code = (
        "import sys, time, json\nfrom distill import train as t\nreal = t._step\n"
        "def slow(*a):\n    time.sleep(0.3)\n    return real(*a)\nt._step = slow\n"
        "t.train(t.TrainConfig(**json.loads(sys.argv[1])))"
    )
    settings = json.dumps(dataclasses.asdict(config(world, out, save_seconds=0.0)))
    child = subprocess.Popen([sys.executable, "-c", code, settings], env={**os.environ, "MCLIP_PROGRESS": "0"})
    waited = time.monotonic() + 60
    while not (out / "state.safetensors").exists() and time.monotonic() < waited:
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (out / "receipt.json").exists()
    train(config(world, out, save_seconds=0.0))
    assert same(straight, load_file(out / "model.safetensors"))


def test_other_settings_do_not_overwrite_a_run(world, straight, tmp_path, monkeypatch):
    before = (world / "straight" / "model.safetensors").read_bytes()
    with pytest.raises(TrainingError, match="trained with other settings"):
        train(config(world, world / "straight", samples=168))
    assert (world / "straight" / "model.safetensors").read_bytes() == before
    real = train_module._step
    monkeypatch.setattr(train_module, "_step", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(config(world, tmp_path / "half"))
    monkeypatch.setattr(train_module, "_step", real)
    with pytest.raises(TrainingError, match="unfinished run with other settings"):
        train(config(world, tmp_path / "half", seed=5))


def test_a_loss_that_is_not_finite_stops_and_names_the_batch(world, tmp_path, monkeypatch):
    real = train_module.pair_losses
    calls = []

    def poisoned(*args):
        calls.append(1)
        terms = real(*args)
        return {name: value * float("nan") for name, value in terms.items()} if len(calls) == 3 else terms

    monkeypatch.setattr(train_module, "pair_losses", poisoned)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 4; .* The batch holds s\d"):
        train(config(world, tmp_path / "out", save_seconds=0.0))
    monkeypatch.setattr(train_module, "pair_losses", real)
    train(config(world, tmp_path / "out", save_seconds=0.0))


def test_damaged_state_and_missing_inputs_are_one_sentence(world, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "state.safetensors").write_bytes(b"not a state")
    with pytest.raises(TrainingError, match="cannot be read"):
        train(config(world, tmp_path / "out"))
    with pytest.raises(StoreError):
        train(config(world, tmp_path / "new", store=str(tmp_path / "no-store")))
    with pytest.raises(RecipeError, match="less than one batch"):
        train(config(world, tmp_path / "new", samples=3))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read"), ('{"lr": 1}', r"\['lr'\]"), ("[]", "no object"), ('{"batch_size": 1}', "batch_size 1"), ('{"contrastive": 0}', "must be above 0"),
     ('{"learning_rate": "x"}', "wrong type")],
)  # fmt: skip
def test_bad_recipe_files(tmp_path, text, message):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(tmp_path / "r.json"))


def test_unknown_recipe_names_the_known_ones():
    with pytest.raises(RecipeError, match="known are plain, reinforced, recovery"):
        load_recipe("reinforce")


def test_plain_reads_no_teacher():
    assert not RECIPES["plain"]().reinforced
    assert RECIPES["reinforced"]().reinforced


def test_texts_in_groups_of_like_length_are_the_same(world):
    torch.manual_seed(0)
    model, tokens = create_model("pocket_s"), dataset(world).batch(0, 23).tokens
    with torch.inference_mode():
        whole = model.encode_text(torch.from_numpy(tokens))
        for groups in (1, 3, 4, 40):
            assert (encode_texts(model, tokens, groups) - whole).abs().max() < 1e-6


def test_schedule():
    recipe = Recipe(learning_rate=1e-2, warmup=0.1)
    rates = [learning_rate(step, 100, recipe) for step in range(100)]
    assert rates[0] == pytest.approx(1e-3)
    assert max(rates) == pytest.approx(1e-2)
    assert rates[10] == pytest.approx(1e-2)
    assert rates[99] < 1e-5
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_average_is_a_running_mean_and_copies_counters():
    a, b = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    with torch.no_grad():
        b.weight.fill_(3)
        b.running_mean.fill_(10)
    b.num_batches_tracked += 7
    Average(a, b).update(0.75)
    assert a.weight.tolist() == [1.5, 1.5]
    assert a.running_mean.tolist() == [2.5, 2.5]
    assert a.num_batches_tracked == 7
