"""What a training run leaves while it lasts and when it fails: states, the best checkpoint, the batch that broke it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distill import train as train_module
from distill import training_step as step_module
from distill.recipes import RECIPES
from distill.train import TrainConfig, train
from distill.training_metrics import BEST, Clock, Divergence, limit_of, scalars
from distill.training_state import older_states
from mobileclip.checkpoint import load_checkpoint
from runtime.errors import MissingExtraError, RecipeError, TrainingError

from .world import make_pairs, make_store


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("states")
    make_pairs(root / "pairs")
    make_store(root / "store", root / "pairs")
    recipe = dataclasses.replace(RECIPES["reinforced"](), batch_size=8, text_samples=0)
    (root / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe)))
    train(settings(root, root / "straight"))
    return root


def settings(world: Path, out: Path, **changes: object) -> TrainConfig:
    base = TrainConfig(pairs=str(world / "pairs"), store=str(world / "store"), out=str(out), recipe=str(world / "recipe.json"), samples=96, prefetch_threads=0)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    asked: list[int] = []
    monkeypatch.setattr(train_module, "stop_asked", lambda: contextlib.nullcontext(lambda: asked.append(1) or len(asked) >= steps))


def test_the_last_states_are_kept_and_the_one_before_serves_a_damaged_one(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    out, config = tmp_path / "out", settings(world, tmp_path / "out", save_seconds=0.0, keep_states=3)
    stop_after(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    assert [path.name for path in older_states(out)] == ["state-0000000004.safetensors", "state-0000000005.safetensors"]
    state = out / "state.safetensors"
    state.write_bytes(state.read_bytes()[:5000])
    older_states(out)[-1].write_bytes(b"cut")
    train(config)
    assert "going on from the state of step 4" in caplog.text
    assert same(out, world / "straight")
    assert not state.exists()
    assert not older_states(out)
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_the_rate_after_going_on_counts_what_this_process_did(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            train(settings(world, tmp_path / "out"))
    train(settings(world, tmp_path / "out"))
    before, first = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()][7:9]
    assert (before["step"], first["step"]) == (8, 9)
    assert first["samples_per_second"] * (first["seconds"] - before["seconds"]) < 3 * 8  # one batch of eight, not nine


def test_without_another_state_a_damaged_one_is_one_sentence(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        train(settings(world, tmp_path / "out"))
    monkeypatch.undo()
    (tmp_path / "out/state.safetensors").write_bytes(b"cut")
    with pytest.raises(TrainingError, match="cannot be read"):
        train(settings(world, tmp_path / "out"))


def test_the_best_by_validation_is_a_checkpoint_of_its_own(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill import evaluate

    recalls = iter([0.2, 0.5, 0.4])
    seen: list[dict[str, torch.Tensor]] = []

    def judged(model: torch.nn.Module, pairs: str, folder: Path) -> dict[str, float]:
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"recall@5_all": next(recalls)}

    monkeypatch.setattr(evaluate, "quick_recall", judged)
    config = settings(world, tmp_path / "out", validation=str(world / "pairs"), validations=3)
    out = train(config)
    receipt = json.loads((out / "receipt.json").read_text())
    assert receipt["figures"]["best"] == {"step": 8, "samples": 64, "recall@5_all": 0.5}
    found = load_checkpoint(out / BEST).state_dict()
    assert all(torch.equal(found[name], seen[1][name]) for name in found)
    assert same(out, world / "straight")  # looking changes nothing


def test_a_run_that_goes_on_knows_its_best_and_does_not_look_twice(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill import evaluate

    looked: list[float] = []
    recalls = iter([0.5, 0.2, 0.3])

    def judged(*_: object) -> dict[str, float]:
        looked.append(next(recalls))
        return {"recall@5_all": looked[-1]}

    monkeypatch.setattr(evaluate, "quick_recall", judged)
    config = settings(world, tmp_path / "out", validation=str(world / "pairs"), validations=3)
    real = train_module.stop_asked
    stop_after(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.setattr(train_module, "stop_asked", real)
    out = train(config)
    assert len(looked) == 3
    assert json.loads((out / "receipt.json").read_text())["figures"]["best"]["recall@5_all"] == 0.5


def test_every_key_of_the_batch_that_broke_a_run_is_written_down(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = step_module.pair_terms, []

    def poisoned(*args: object) -> dict[str, torch.Tensor]:
        calls.append(1)
        terms = real(*args)
        return {name: value * float("inf") for name, value in terms.items()} if len(calls) == 3 else terms

    monkeypatch.setattr(step_module, "pair_terms", poisoned)
    with pytest.raises(TrainingError, match=r"and 4 more, all in offending_batch.json"):
        train(settings(world, tmp_path / "out"))
    found = json.loads((tmp_path / "out/offending_batch.json").read_text())
    assert found["step"] == 3
    assert len(found["keys"]) == len(found["views"]) == len(found["captions"]) == 8
    assert "the loss is inf" in found["error"]


def test_a_gradient_that_is_not_finite_changes_nothing(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = step_module.training_step

    def broken(run: object, *args: object) -> dict[str, torch.Tensor]:
        terms = real(run, *args)  # type: ignore[arg-type]
        run.model.logit_scale.grad = torch.tensor(float("nan"))  # type: ignore[attr-defined]
        return terms

    monkeypatch.setattr(train_module, "training_step", broken)
    with pytest.raises(TrainingError, match="the gradient's norm is nan at step 1; the last saved state is intact"):
        train(settings(world, tmp_path / "out"))
    monkeypatch.undo()
    assert same(train(settings(world, tmp_path / "out")), world / "straight")


def test_divergence_is_noticed_and_noise_is_not() -> None:
    generator = np.random.default_rng(0)
    calm, wild = Divergence(), Divergence()
    for step in range(1, 400):
        calm.note(4.0 + generator.standard_normal(), "pairs", step)
    told = ""
    try:
        for step in range(1, 400):
            wild.note(4.0 * 1.02**step, "pairs", step)
    except TrainingError as error:
        told = str(error)
    assert told.startswith("the loss diverges: over the 50 steps up to step ")
    calm.note(100.0, "text", 400)  # another phase has another loss


def test_a_full_disk_is_one_sentence_and_the_state_before_is_intact(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = settings(world, out, save_seconds=0.0)
    code = (
        "import json, sys\nfrom distill import training_state, train as t\nfrom distill.train_config import TrainConfig\nimport resource, signal\n"
        "real, calls = training_state.write_state, []\n"
        "def limited(*args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 4: signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "    return real(*args)\n"
        "training_state.write_state = limited\n"
        f"t.train(TrainConfig(**json.loads({json.dumps(json.dumps(dataclasses.asdict(config)))})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "MCLIP_PROGRESS": "0"}, timeout=300, check=False)
    assert done.returncode != 0
    assert "the state of step 4 cannot be written" in done.stderr, done.stderr[-2000:]
    assert not list(out.glob(".state*"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert same(train(config), world / "straight")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 49, "samples": 980}, TrainingError, "batch_size is 49, and there are only 48 pairs"),
        ({"learning_rate": 0.0}, RecipeError, "learning_rate 0"),
        ({"learning_rate": -1e-3}, RecipeError, "learning_rate -0.001"),
        ({"device": "tpu"}, RecipeError, "device 'tpu'"),
        ({"device": "mps"}, RecipeError, "not one that training was made for"),
        ({"device": "cuda:99"}, RecipeError, "is not there"),
        ({"init": "x", "backbone_weights": "y"}, RecipeError, "does not go with --backbone-weights"),
        ({"caption_mix": {"synthetic": 1.0}}, TrainingError, "has no caption of type synthetic"),
        ({"teachers": ("t9",)}, RecipeError, "follows the teacher t9; the store has t0, t1"),
    ],
)
def test_bad_settings_are_one_sentence_and_write_no_metrics(world: Path, tmp_path: Path, changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        train(settings(world, tmp_path / "out", **changes))
    assert not (tmp_path / "out/metrics.jsonl").exists()


def test_nested_dimensions_beyond_the_models_are_refused(world: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPES["reinforced"](), batch_size=8, text_samples=0, nested_dims=(64, 512))
    (tmp_path / "r.json").write_text(json.dumps(dataclasses.asdict(recipe)))
    with pytest.raises(RecipeError, match="nests 512 dimensions, and the model's embed_dim is 256"):
        train(settings(world, tmp_path / "out", recipe=str(tmp_path / "r.json")))
    out = train(settings(world, tmp_path / "wide", recipe=str(tmp_path / "r.json"), embed_dim=512, samples=24))
    assert load_checkpoint(out).config.embed_dim == 512


def test_scalars_of_a_line() -> None:
    line = {"step": 3, "phase": "pairs", "loss_terms": {"feature": 0.5}, "validation": {"recall@5_all": 0.25}, "flag": True}
    assert dict(scalars(line)) == {"step": 3.0, "loss_terms/feature": 0.5, "validation/recall@5_all": 0.25}


def test_tensorboard_is_an_extra(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match="tensorboard"):
        train(settings(world, tmp_path / "out", tensorboard=True, samples=16))


def test_tensorboard_reads_what_is_written(world: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = train(settings(world, tmp_path / "out", tensorboard=True, samples=32))
    events = accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = events.Scalars("loss")
    assert [event.step for event in found] == [line["samples"] for line in lines]
    np.testing.assert_allclose([event.value for event in found], [line["loss"] for line in lines], rtol=1e-6)


def test_a_clock_counts_every_second_once() -> None:
    clock = Clock()
    with clock.measure("backward"):
        time.sleep(0.02)
        with clock.measure("forward"):
            time.sleep(0.03)
    with clock.pause():
        time.sleep(0.05)
    assert clock.seconds["forward"] >= 0.03
    assert 0.02 <= clock.seconds["backward"] < clock.seconds["backward"] + clock.seconds["forward"] <= clock.elapsed() + 1e-6
    assert clock.left_out >= 0.05
    assert sum(clock.shares().values()) == pytest.approx(1, abs=0.01)
    assert limit_of(clock.shares()).startswith("the forward passes")


def test_a_finished_run_says_where_its_time_went(world: Path) -> None:
    figures = json.loads((world / "straight/receipt.json").read_text())["figures"]
    assert set(figures["time_share"]) == {"data", "forward", "backward", "optimizer", "other"}
    assert sum(figures["time_share"].values()) == pytest.approx(1, abs=0.02)
