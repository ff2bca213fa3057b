"""How the towers are computed: kept activations, bfloat16 and compilation do not change what is computed, beyond rounding."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.compute import Compute, checkpoint_blocks, compile_towers
from distill.recipes import RECIPES
from distill.train import TrainConfig, train
from mobileclip.checkpoint import load_checkpoint
from mobileclip.model import ImageTextModel
from mobileclip.models import create_model
from mobileclip.students import student_config
from runtime.errors import RecipeError

from .world import make_pairs, make_store


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compute")
    make_pairs(root / "pairs")
    make_store(root / "store", root / "pairs")
    recipe = dataclasses.replace(RECIPES["reinforced"](), batch_size=8, text_samples=0)
    (root / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe)))
    train(settings(root, root / "plain"))
    return root


def settings(world: Path, out: Path, **changes: object) -> TrainConfig:
    base = TrainConfig(pairs=str(world / "pairs"), store=str(world / "store"), out=str(out), recipe=str(world / "recipe.json"), samples=160, prefetch_threads=0)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def losses(out: Path) -> np.ndarray:
    return np.array([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(out).state_dict()


def towers(backbone: str | None = None) -> ImageTextModel:
    torch.manual_seed(0)
    return create_model(student_config("pocket_s", backbone=backbone)).train()


def batch() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 8190, (4, 12)).astype(np.int32)
    tokens[:, 9] = 8191
    return generator.standard_normal((4, 3, 64, 64)).astype(np.float32), tokens


@pytest.mark.parametrize("backbone", [None, "mobilenetv4_conv_small", "vit_tiny_patch16_224", "convnext_atto", "fastvit_t8"])
def test_blocks_that_are_computed_twice_have_the_same_gradient(backbone: str | None) -> None:
    plain = towers(backbone)
    twice = copy.deepcopy(plain)
    assert checkpoint_blocks(twice) > 2
    pixels, tokens = batch()
    kept = []
    for model, compute in ((plain, Compute()), (twice, Compute(grad_checkpointing=True))):
        saved: list[int] = []
        torch.manual_seed(1)
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor, saved=saved: (saved.append(tensor.numel()), tensor)[1], lambda tensor: tensor)
        with compute.step(model), hooks:
            (compute.encode_image(model, pixels) * compute.encode_text(model, tokens)).sum().backward()
        kept.append(sum(saved))
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in twice.named_parameters():
        if gradients[name] is None:
            assert parameter.grad is None
            continue
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(twice.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")  # statistics moved once


def test_a_run_with_blocks_computed_twice_is_the_plain_run(world: Path, tmp_path: Path) -> None:
    train(settings(world, tmp_path / "out", grad_checkpointing=True))
    np.testing.assert_allclose(losses(tmp_path / "out"), losses(world / "plain"), rtol=2e-3)
    assert weights(tmp_path / "out").keys() == weights(world / "plain").keys()


def test_bfloat16_learns_what_float32_learns_and_its_weights_are_float32(world: Path, tmp_path: Path) -> None:
    out = train(settings(world, tmp_path / "out", precision="bf16", samples=640, learning_rate=3e-3))
    assert all(tensor.dtype == torch.float32 for tensor in weights(out).values() if tensor.is_floating_point())
    exact = train(settings(world, tmp_path / "exact", samples=640, learning_rate=3e-3))
    short, long = losses(out), losses(exact)
    assert 0 < abs(short[0] - long[0]) < 0.02 * long[0]
    assert long[-10:].mean() < 0.5 * long[0]
    assert short[-10:].mean() < 1.2 * long[-10:].mean()


def test_bfloat16_is_another_run(world: Path) -> None:
    from runtime.errors import TrainingError

    with pytest.raises(TrainingError, match="trained with other settings"):
        train(settings(world, world / "plain", precision="bf16"))


@pytest.mark.slow
def test_compiled_towers_compute_the_same(world: Path, tmp_path: Path) -> None:
    model = towers()
    compiled = copy.deepcopy(model)
    compile_towers(compiled)
    pixels, tokens = batch()
    compute = Compute()
    torch.testing.assert_close(compute.encode_image(compiled, pixels), compute.encode_image(model, pixels), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(compute.encode_text(compiled, tokens), compute.encode_text(model, tokens), rtol=1e-3, atol=1e-4)
    train(settings(world, tmp_path / "out", compile=True, samples=80))
    np.testing.assert_allclose(losses(tmp_path / "out")[:5], losses(train(settings(world, tmp_path / "eager", samples=80)))[:5], rtol=1e-2)
    assert list(weights(tmp_path / "out")) == list(weights(tmp_path / "eager"))


def test_a_trunk_without_blocks_is_refused() -> None:
    model = towers()
    model.image.trunk = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 128))
    with pytest.raises(RecipeError, match="no stages that could be checkpointed"):
        checkpoint_blocks(model)
