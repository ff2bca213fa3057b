"""A pocket-size checkpoint with calibrated statistics and a pairs folder of structured pictures, made once a session."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch import nn

from export.bundle import ExportConfig, export_bundle
from export.draft import Job
from export.towers import Samples, Tower, read_samples
from export.verify import Reference, reference_of
from mobileclip.checkpoint import open_tokenizer, preprocess_config, save_checkpoint
from mobileclip.config import ImageConfig, ModelConfig, TextConfig
from mobileclip.folding import structured_images
from mobileclip.model import ImageTextModel
from mobileclip.presets import preset
from runtime.pairs import open_pairs, write_shard

torch.set_num_threads(1)

WORDS = ["red", "blue", "green", "tall", "small", "round", "old", "new", "quiet", "loud", "cat", "dog", "house", "boat", "tree", "star", "heart", "clock", "flag", "fish"]


def calibrated(config: ModelConfig, seed: int = 0) -> ImageTextModel:
    """A random model whose embeddings differ between pictures: fresh batch norm statistics would make them all equal."""
    torch.manual_seed(seed)
    model = ImageTextModel(config)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    with torch.no_grad():
        model.image(structured_images(48, config.image.image_size, seed=5))
        plain = not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.image.modules())
        for tower, factor in ((model.text, 1.5), (model.image, 4.0 if plain else 1.0)):  # larger than at initialisation, so that inputs differ
            for parameter in tower.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(factor)
    return model.eval()


def pictures(count: int, size: int, seed: int = 1) -> list[Image.Image]:
    values = (structured_images(count, size, seed=seed) * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(value) for value in values]


def captions(count: int, seed: int = 2) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(2, 6))) for _ in range(count)]


def write_pairs(folder: Path, count: int = 48, size: int = 80) -> Path:
    folder.mkdir(parents=True)
    members = []
    for n, (picture, caption) in enumerate(zip(pictures(count, size), captions(count), strict=True)):
        data = io.BytesIO()
        picture.save(data, "PNG")
        members.append((f"p{n:04d}", {"png": data.getvalue(), "txt": caption.encode()}))
    write_shard(folder / "00000.tar", members)
    return folder


@pytest.fixture(scope="session")
def pocket() -> ImageTextModel:
    return calibrated(preset("pocket_s"))


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that all test processes of this run share."""
    root = tmp_path_factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


def once(shared: Path, name: str, make) -> Path:
    """Make a folder in one process; the others wait for it."""
    with FileLock(shared / f"{name}.lock"):
        if not (shared / f"{name}.done").exists():
            make(shared / name)
            (shared / f"{name}.done").touch()
    return shared / name


@pytest.fixture(scope="session")
def pocket_checkpoint(pocket, shared) -> Path:
    return once(shared, "pocket", lambda folder: save_checkpoint(pocket, folder))


@pytest.fixture(scope="session")
def pairs_folder(shared) -> Path:
    return once(shared, "pairs", write_pairs)


@pytest.fixture(scope="session")
def pocket_bundle(pocket_checkpoint, pairs_folder, shared) -> Path:
    """The pocket model exported to everything, as `mclip export` does it."""

    def make(folder: Path) -> None:
        export_bundle(ExportConfig(checkpoint=pocket_checkpoint, bundle=folder, pairs=pairs_folder, target="onnx,coreml,tensorrt", samples=32, calibration=12, golden=4))

    return once(shared, "bundle", make)


@pytest.fixture(scope="session")
def samples(pocket, pocket_checkpoint, pairs_folder) -> Samples:
    found, skipped = read_samples(open_pairs(pairs_folder), range(32), preprocess_config(pocket.config), open_tokenizer(pocket_checkpoint, pocket.config))
    assert not skipped
    return found


@pytest.fixture(scope="session")
def reference(pocket, samples) -> Reference:
    return reference_of(pocket, samples)


def job_of(model: nn.Module, tower: Tower, samples: Samples, folder: Path, **convert: object) -> Job:
    """What a converter is given, the samples for its calibration rows too."""
    return Job(model=model, tower=tower, calibration=samples, folder=folder, convert=convert)


def rows_of(tower: Tower, rows: np.ndarray) -> Samples:
    """Samples that have one tower's inputs alone."""
    nothing = np.zeros((len(rows), 0), np.float32)
    return Samples(keys=(), captions=(), **({"pixels": rows, "tokens": nothing} if tower == "image" else {"pixels": nothing, "tokens": rows}))


class Odd(nn.Module):
    """A tower whose submodule `odd` runs one operation, for those that no converter knows."""

    class Operation(nn.Module):
        def __init__(self, operation: Callable[[torch.Tensor], torch.Tensor]) -> None:
            super().__init__()
            self.operation = operation

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.operation(x)

    def __init__(self, operation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.odd = Odd.Operation(operation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.odd(x)


def qr_model() -> nn.Module:
    """Its image tower is an `Odd` of linalg_qr."""
    model = nn.Module()
    model.image = Odd(lambda x: torch.linalg.qr(x.flatten(2))[1].flatten(1))
    return model


def teacher_like() -> ImageTextModel:
    """The sample teacher's form at 64 px, random: EfficientNet-lite, and a BERT with a padding mask and mean pooling."""
    return calibrated(
        ModelConfig(
            name="teacher",
            embed_dim=32,
            image=ImageConfig(backbone="tf_efficientnet_lite0", image_size=64, projection="mlp", projection_hidden=16),
            text=TextConfig(context_length=20, vocab_size=8192, width=64, heads=4, layers=2, mask="pad", pool="mean", norm="post", embedding_norm=True, projection="mlp"),
        )
    )
