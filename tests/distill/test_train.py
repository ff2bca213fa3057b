"""Training: learns, continues exactly after any interruption, refuses what does not fit."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from distill import train as train_module
from distill import training_step as step_module
from distill.dataset import ReinforcedPairs
from distill.interruption import IMPATIENT, stop_asked
from distill.keep_list import write_keep_list
from distill.objective import encode_texts
from distill.recipes import RECIPES, Recipe, load_recipe
from distill.schedule import learning_rate
from distill.store import open_store
from distill.train import TrainConfig, train
from distill.training_state import Average
from distill.training_step import Followed, follow
from mobileclip import create_model
from mobileclip.checkpoint import build_tokenizer, load_checkpoint, open_tokenizer
from mobileclip.presets import PRESETS
from runtime.errors import CheckpointError, RecipeError, StoreError, TrainingError
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
    assert set(dataset(world, caption_mix={"raw": 1.0}).batch(0, n).captions) == {0}
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


@pytest.mark.parametrize(("number", "stop_at"), [(signal.SIGINT, 1), (signal.SIGTERM, 5)])
def test_a_signal_in_the_middle_of_a_step_stops_after_it_and_the_run_goes_on_to_the_same_weights(world, straight, tmp_path, monkeypatch, number, stop_at):
    real, calls = Average.update, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == stop_at:
            os.kill(os.getpid(), number)  # the weights have moved, the average has not
        return real(*args)

    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # the shell may have told us to ignore it
    try:
        monkeypatch.setattr(Average, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config(world, tmp_path / "out"))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, former)
    assert len(calls) == stop_at
    with safe_open(tmp_path / "out" / "state.safetensors", framework="pt") as state:
        assert state.metadata()["step"] == str(stop_at)
    train(config(world, tmp_path / "out"))
    assert same(straight, load_file(tmp_path / "out" / "model.safetensors"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_a_second_ctrl_c_stops_at_once():
    def stubborn() -> None:
        with stop_asked() as asked:
            for number in (signal.SIGTERM, signal.SIGINT):  # as a launcher does
                os.kill(os.getpid(), number)
                while not asked():
                    time.sleep(0.001)
            time.sleep(IMPATIENT + 0.1)
            os.kill(os.getpid(), signal.SIGTERM)
            passed.append(1)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    passed: list[int] = []
    former, terminated = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt):
            stubborn()
        assert passed
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == (signal.default_int_handler, terminated)
    finally:
        signal.signal(signal.SIGINT, former)


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
    monkeypatch.setattr(train_module, "stop_asked", lambda: contextlib.nullcontext(lambda: True))
    with pytest.raises(KeyboardInterrupt):
        train(config(world, tmp_path / "half"))
    monkeypatch.undo()
    with pytest.raises(TrainingError, match="unfinished run with other settings"):
        train(config(world, tmp_path / "half", seed=5))


def test_a_loss_that_is_not_finite_stops_and_names_the_batch(world, tmp_path, monkeypatch):
    real = step_module.pair_terms
    calls = []

    def poisoned(*args):
        calls.append(1)
        terms = real(*args)
        return {name: value * float("nan") for name, value in terms.items()} if len(calls) == 3 else terms

    monkeypatch.setattr(step_module, "pair_terms", poisoned)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 4; .* The batch holds s\d"):
        train(config(world, tmp_path / "out", save_seconds=0.0))
    monkeypatch.setattr(step_module, "pair_terms", real)
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
     ('{"learning_rate": "x"}', "wrong type"), ('{"caption_mix": {"invented": 1}}', "names the type invented; known are raw"), ('{"caption_mix": {"raw": -1}}', "raw -1"),
     ('{"caption_mix": {"raw": "a"}}', "raw a"), ('{"caption_mix": ["raw"]}', "expected an object of types and shares"), ('{"teachers": "t0"}', "different names"),
     ('{"teachers": ["t0", "t0"]}', "different names"), ('{"logit_scales": [0]}', "above 0"), ('{"teachers": ["t0"], "logit_scales": [1, 2]}', "one number per teacher"),
     ('{"max_augmentations": -1}', "at least 0"), ('{"shuffle_shards": -2}', "at least 0"), ('{"teachers": 3}', "wrong type")],
)  # fmt: skip
def test_bad_recipe_files(tmp_path, text, message):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(tmp_path / "r.json"))


def test_unknown_recipe_names_the_known_ones():
    with pytest.raises(RecipeError, match="known are plain, reinforced, recovery"):
        load_recipe("reinforce")


def test_a_varied_student_trains_and_continues_only_its_own_run(world, tmp_path):
    changes = {"backbone": "mobilenetv4_conv_small_035", "image_size": 48, "mask": "pad", "vocab_size": 2048, "embedding_dim": 32, "samples": 64}
    out = train(config(world, tmp_path / "out", **changes))
    made = load_checkpoint(out)
    assert made.config.name == "pocket_s+mobilenetv4_conv_small_035+48px+pad+2048tokens+32wide"
    assert (made.config.image.image_size, made.config.text.mask) == (48, "pad")
    assert made.text.token_embedding.weight.shape == (2048, 32)
    assert open_tokenizer(out)(["a red disc"]).max() == 2047
    weights = load_file(out / "model.safetensors")
    assert same(weights, load_file(train(config(world, tmp_path / "again", **changes)) / "model.safetensors"))
    for other in ({"image_size": 64}, {"mask": None}, {"vocab_size": 2056}, {"embedding_dim": None}, {"backbone": None}):
        with pytest.raises(TrainingError, match="trained with other settings"):
            train(config(world, out, **{**changes, **other}))


def test_a_tokenizer_of_another_vocabulary_is_written_again(world, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copy(world / "tokenizer.json", tmp_path / "out" / "tokenizer.json")  # what a run leaves that was killed before its first save
    out = train(config(world, tmp_path / "out", vocab_size=1024, samples=16))
    assert open_tokenizer(out)(["a red disc"]).max() == 1023


@pytest.fixture(scope="module")
def learned(world):
    """A student that knows the world, to inherit from."""
    return train(config(world, world / "learned", samples=800, learning_rate=3e-3))


@pytest.mark.parametrize("seed", [0, 1])
def test_an_inherited_student_is_ahead_of_random_weights(world, learned, tmp_path, monkeypatch, seed):
    base = PRESETS["pocket_s"]
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(
        base, name="tiny", image=dataclasses.replace(base.image, backbone_args={"dims": [16, 32, 96], "depths": [0, 1, 1], "mlp_ratio": 2.0}),
        text=dataclasses.replace(base.text, width=64, heads=2, layers=1, vocab_size=4096),
    ))  # fmt: skip
    losses = {}
    for name, source in (("random", None), ("inherited", str(learned))):
        out = train(config(world, tmp_path / name, model="tiny", inherit=source, samples=96, seed=seed))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["loss_terms"]["feature"] for line in lines if line["phase"] == "pairs"]
    assert losses["inherited"][0] < 0.6 * losses["random"][0]
    assert losses["inherited"][-1] < 0.5 * losses["random"][-1]
    receipt = json.loads((tmp_path / "inherited" / "receipt.json").read_text())
    report = receipt["inherited"]
    assert report["source"] == "pocket_s"
    assert report["text"]["parameters_inherited"] == report["text"]["parameters"]
    assert report["text"]["blocks"] == {"text.blocks.0": "text.blocks.0"}
    assert load_checkpoint(tmp_path / "inherited").config.sources == (f"weights inherited from pocket_s ({base.licence})",)
    assert "inherited" not in json.loads((tmp_path / "random" / "receipt.json").read_text())
    with pytest.raises(TrainingError, match="trained with other settings"):
        train(config(world, tmp_path / "inherited", model="tiny", samples=96, seed=seed))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"init": "x", "inherit": "y"}, RecipeError, "--init goes on from a finished model and does not go with --inherit"),
        ({"init": "x", "vocab_size": 4096, "mask": "pad"}, RecipeError, "does not go with --mask, --vocab-size"),
        ({"inherit": "no/such/folder"}, CheckpointError, "has no model.safetensors"),
        ({"init": "no/such/folder"}, CheckpointError, "is not a checkpoint"),
        ({"backbone": "no_such_net"}, CheckpointError, "unknown to timm"),
        ({"vocab_size": 100}, CheckpointError, "514"),
    ],
)
def test_variations_that_do_not_fit_write_nothing(world, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        train(config(world, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_the_command_line_knows_the_variations(world, tmp_path, capsys):
    from distill.train import main

    argv = ["--pairs", str(world / "pairs"), "--store", str(world / "store"), "--out", str(tmp_path / "out"), "--recipe", str(world / "recipe.json"), "--samples", "16"]
    assert main([*argv, "--image-size", "32", "--mask", "pad", "--vocab-size", "1024", "--embedding-dim", "16"]) == 0
    assert load_checkpoint(tmp_path / "out").config.name == "pocket_s+32px+pad+1024tokens+16wide"
    with pytest.raises(SystemExit):
        main([*argv, "--mask", "none"])
    capsys.readouterr()


def test_a_run_follows_some_teachers_with_other_scales(world, tmp_path):
    store, recipe = open_store(world / "store"), RECIPES["reinforced"]()
    assert follow(store, recipe) == Followed(numbers=(0, 1), logit_scales=(20.0, 20.0))
    assert follow(store, dataclasses.replace(recipe, teachers=("t1",))) == Followed(numbers=(1,), logit_scales=(20.0,))
    assert follow(store, dataclasses.replace(recipe, teachers=("t1", "t0"), logit_scales=(30, 7.5))) == Followed(numbers=(1, 0), logit_scales=(30.0, 7.5))
    assert follow(store, RECIPES["plain"]()) == Followed(numbers=(), logit_scales=())
    with pytest.raises(RecipeError, match="follows the teacher t9; the store has t0, t1"):
        train(config(world, tmp_path / "out", teachers=("t9",)))
    with pytest.raises(RecipeError, match=r"has 1 logit_scales for 2 teachers \(t0, t1\)"):
        train(config(world, tmp_path / "out", logit_scales=(5.0,)))
    assert not (tmp_path / "out").exists()


def losses_of(out: Path) -> list[dict[str, float]]:
    return [line["loss_terms"] for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if line["phase"] == "pairs"]


def test_every_setting_of_the_data_reaches_the_run_and_its_fingerprint(world, straight, tmp_path):
    keys = open_store(world / "store").keys
    write_keep_list(tmp_path / "keep.txt", keys[:40], {})
    write_keep_list(tmp_path / "keep2.txt", keys[:41], {})
    whole = losses_of(world / "straight")
    changes = {"caption_mix": {"raw": 1.0}, "teachers": ("t1",), "logit_scales": (35.0, 5.0), "max_augmentations": 1, "keep": str(tmp_path / "keep.txt")}
    for name, value in changes.items():
        out = train(config(world, tmp_path / name, samples=32, **{name: value}))
        assert losses_of(out)[0] != whole[0], name
        with pytest.raises(TrainingError, match="trained with other settings"):
            train(config(world, out, samples=32))
    figures = json.loads((tmp_path / "keep" / "receipt.json").read_text())["figures"]
    assert (figures["pairs"], figures["dropped"], figures["missing"], figures["unreadable_count"]) == (40, 8, 0, 0)
    with pytest.raises(TrainingError, match="trained with other settings"):
        train(config(world, tmp_path / "keep", samples=32, keep=str(tmp_path / "keep2.txt")))


@pytest.mark.parametrize("threads", [0, 3])
def test_threads_of_the_loader_change_no_weight(world, straight, tmp_path, threads):
    train(config(world, tmp_path / "out", prefetch_threads=threads))
    assert same(straight, load_file(tmp_path / "out" / "model.safetensors"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_the_command_line_knows_the_data_settings(world, tmp_path, capsys):
    argv = ["--pairs", str(world / "pairs"), "--store", str(world / "store"), "--out", str(tmp_path / "out"), "--recipe", str(world / "recipe.json"), "--samples", "16"]
    more = ["--caption-mix", "raw", "0.3", "template", "0.7", "--teachers", "t1", "t0", "--logit-scales", "10", "20.5", "--max-augmentations", "1", "--prefetch-threads", "2"]
    assert train_module.main([*argv, *more]) == 0
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())
    assert receipt["recipe"]["caption_mix"] == {"raw": 0.3, "template": 0.7}
    assert (receipt["recipe"]["teachers"], receipt["recipe"]["logit_scales"], receipt["recipe"]["max_augmentations"]) == (["t1", "t0"], [10.0, 20.5], 1)
    capsys.readouterr()


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
