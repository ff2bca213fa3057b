"""Teachers made of torch towers: checkpoint folders of ours and open_clip models. `distill.ensemble.open_teacher` calls these.

Shapes: B = batch, S = the teacher's image size, D = its dimension.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from distill import engines
from distill.ensemble import MICRO_BATCH, in_micro_batches
from distill.frozen_tower import GPU_MICRO_BATCH, Tower, autocast, frozen
from distill.store import TeacherFacts
from distill.store_writing import unit
from runtime.errors import CheckpointError, MissingExtraError, RecipeError, StoreError
from runtime.preprocess import PreprocessConfig, normalise, preprocess

_ANSWERS: dict[tuple[str, str], np.ndarray] = {}
TEXT_WIDTHS = (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256)
"""Tokens at which a text is cut when it is no longer; the shapes a tower meets are these and its context."""
KEPT_ANSWERS = 64
"""Calls of `text_features` that are remembered; evaluation asks for 256 texts at once."""


class TorchTeacher:
    """A pair of torch towers with their preprocessing; evaluated in whole micro-batches, without gradients, convolutions folded."""

    def __init__(
        self, facts: TeacherFacts, config: PreprocessConfig, image: Tower, text: nn.Module, project: nn.Module, tokenize: Callable[[Sequence[str]], np.ndarray],
        lengths: Callable[[Tensor], Tensor] | None, device: str = "cpu",
    ) -> None:  # fmt: skip
        """lengths: tokens (B, T) -> (B,), what of each text the tower reads; None where it reads its padding too."""
        self.facts, self.config, self.image_size = facts, config, config.image_size
        self.text_trunk = f"{state_hash(text)}:{getattr(text, 'config', '')}:{facts.preprocessing.get('tokenizer', '')}:{device}"
        """Equal for two teachers whose text towers differ in their projection only: their features are computed once."""
        self._image, self._tokenize, self._lengths = image, tokenize, lengths
        self._text: Tower = text if device == "cpu" else autocast(text, device)
        self._project: Tower = project if device == "cpu" else autocast(project, device)

    @torch.inference_mode()
    def encode_image(self, images: np.ndarray | Sequence[Image.Image]) -> np.ndarray:
        exact = isinstance(images, np.ndarray) and images.ndim == 4
        pixels = normalise(images, self.config) if exact else preprocess(images, self.config)
        if pixels.shape[-1] != self.image_size:
            raise StoreError(f"teacher '{self.facts.name}' takes views of {self.image_size} px, was given {pixels.shape[-1]} px")
        return unit(in_micro_batches(lambda rows: self._image(torch.from_numpy(rows)).numpy(), pixels, self.facts.micro_batch, self.facts, "views"))

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """Features before the projection, float32 (B, width).

        The last few answers are kept: evaluation asks teachers of one text trunk, and their ensemble, for the same texts.
        """
        if not texts:
            return np.zeros((0, self.facts.dim), np.float32)
        asked = (self.text_trunk, hashlib.sha256(repr(list(texts)).encode()).hexdigest())
        if asked not in _ANSWERS:
            while len(_ANSWERS) >= KEPT_ANSWERS:
                _ANSWERS.pop(next(iter(_ANSWERS)))
            _ANSWERS[asked] = self._text_features(texts)
        return _ANSWERS[asked].copy()

    def _text_features(self, texts: Sequence[str]) -> np.ndarray:
        """Texts of one width beside each other, each width a fixed shape: what a text gives does not depend on the others."""
        tokens = torch.from_numpy(self._tokenize(texts))
        context, size = tokens.shape[1], self.facts.micro_batch
        lengths = torch.full((len(texts),), context) if self._lengths is None else self._lengths(tokens)
        widths = np.array([next((width for width in TEXT_WIDTHS if length <= width < context), context) for length in lengths.tolist()])
        out: np.ndarray | None = None
        for width in np.unique(widths):
            rows = np.flatnonzero(widths == width)
            for start in range(0, len(rows), size):
                chunk = rows[start : start + size]
                filled = np.concatenate([chunk, np.repeat(chunk[-1:], size - len(chunk))])
                features = self._text(tokens[torch.from_numpy(filled), : int(width)]).numpy()
                out = np.empty((len(texts), features.shape[1]), np.float32) if out is None else out
                out[chunk] = features[: len(chunk)]
        assert out is not None
        return out

    @torch.inference_mode()
    def project_text(self, features: np.ndarray) -> np.ndarray:
        """Features of `text_features` -> float32 (B, D), unit norm."""
        return unit(in_micro_batches(lambda rows: self._project(torch.from_numpy(rows)).numpy(), features, self.facts.micro_batch, self.facts, "texts"))

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        return self.project_text(self.text_features(texts))


def choose_device(device: str) -> str:
    """"auto" -> this worker's GPU or "cpu"; anything else as it is. Raises RecipeError for a GPU that is not there."""
    if device == "cpu":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return f"cuda:{engines.WORKER_NUMBER % count}" if count else "cpu"
    if not count:
        raise RecipeError(f"device '{device}' was asked for, but torch sees no GPU here; use --device cpu or auto")
    return f"cuda:{engines.WORKER_NUMBER % count}" if device == "cuda" else device


def _rows(device: str) -> int:
    return MICRO_BATCH if device == "cpu" else GPU_MICRO_BATCH


def _numerics(device: str) -> dict[str, str]:
    """What the store says of how a teacher was computed."""
    return {"precision": "float32" if device == "cpu" else "bfloat16"}


def open_checkpoint(folder: Path, device: str = "cpu") -> TorchTeacher:
    """A checkpoint folder of ours, its hashes checked. Raises CheckpointError."""
    from mobileclip.checkpoint import load_checkpoint, open_tokenizer, preprocess_config, verify_receipt

    device = choose_device(device)
    receipt = verify_receipt(folder)
    model = load_checkpoint(folder, verify=False)
    config = model.config
    image = preprocess_config(config)
    text = config.text

    def lengths(tokens: Tensor) -> Tensor:
        return model.text.valid_tokens(tokens).sum(1)

    project = model.text.projection
    model.text.projection = nn.Identity()
    facts = TeacherFacts(
        name=folder.name, dim=config.embed_dim, logit_scale=float(model.logit_scale.detach().exp()), licence=config.licence, source=f"checkpoint {config.name}",
        sha256=receipt["files"]["model.safetensors"]["sha256"], micro_batch=_rows(device),
        preprocessing={**_preprocessing(image), **_numerics(device), "context_length": text.context_length, "tokenizer": receipt["files"]["tokenizer.json"]["sha256"]},
    )  # fmt: skip
    reads_padding = text.mask == "none"  # such a tower must run at the full context
    return TorchTeacher(
        facts, image, frozen(model.image, image.image_size, device), model.text, project, open_tokenizer(folder, config), None if reads_padding else lengths, device
    )


class _OpenClipText(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens.long())


def open_open_clip(name: str, pretrained: str | None, device: str = "cpu") -> TorchTeacher:
    """An open_clip model; with `pretrained` None its weights are random, the same every time. Raises CheckpointError."""
    try:
        import open_clip
    except ImportError:
        raise MissingExtraError("open_clip_torch", "teachers", f"teacher 'open_clip:{name}'") from None
    if name not in open_clip.list_models() and not name.startswith(("hf-hub:", "local-dir:")):
        raise CheckpointError(f"open_clip {open_clip.__version__} has no model '{name}'; see open_clip.list_models()")
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, _, _ = open_clip.create_model_and_transforms(name, pretrained=pretrained)
    except (RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(f"open_clip cannot load '{name}' with weights '{pretrained}' ({error}); check the tag, the path and the network") from error
    model.eval()
    device = choose_device(device)
    facts = open_clip.get_model_preprocess_cfg(model)
    size = facts["size"] if isinstance(facts["size"], int) else facts["size"][0]
    image = PreprocessConfig(image_size=size, mean=tuple(facts["mean"]), std=tuple(facts["std"]), interpolation=facts["interpolation"])
    tokenizer = open_clip.get_tokenizer(name)
    with torch.inference_mode():
        dim = int(model.encode_text(tokenizer(["x"])).shape[1])
    digest = state_hash(model)
    known = TeacherFacts(
        name=f"{name}/{pretrained}" if pretrained else name, dim=dim, logit_scale=float(model.logit_scale.detach().exp()), sha256=digest, micro_batch=_rows(device),
        licence="as published with the weights" if pretrained else "none (random weights)", source=f"open_clip {open_clip.__version__}",
        preprocessing={**_preprocessing(image), **_numerics(device), "context_length": int(getattr(model, "context_length", 77)), "tokenizer": name},
    )  # fmt: skip
    image_tower = frozen(model.visual, size, device) if isinstance(getattr(model, "visual", None), nn.Module) else model.encode_image
    return TorchTeacher(
        known, image, image_tower, _OpenClipText(model), nn.Identity(), lambda texts: tokenizer(list(texts)).numpy(), None, device
    )


def _preprocessing(config: PreprocessConfig) -> dict[str, Any]:
    return {
        "image_size": config.image_size, "mean": list(config.mean), "std": list(config.std), "interpolation": config.interpolation, "crop_pct": config.crop_pct,
    }  # fmt: skip


def state_hash(module: nn.Module) -> str:
    """sha256 over names and bytes of a module's state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        with contextlib.suppress(TypeError):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
