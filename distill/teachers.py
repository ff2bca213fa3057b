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

from distill.frozen_tower import MICRO_BATCH, frozen
from distill.store import TeacherFacts
from distill.store_writing import unit
from runtime.errors import CheckpointError, MissingExtraError, StoreError
from runtime.preprocess import PreprocessConfig, normalise, preprocess

_ANSWERS: dict[tuple[str, str], np.ndarray] = {}
KEPT_ANSWERS = 64
"""Calls of `text_features` that are remembered; evaluation asks for 256 texts at once."""


class TorchTeacher:
    """A pair of torch towers with their preprocessing; evaluated in micro-batches, without gradients, convolutions folded."""

    def __init__(
        self, facts: TeacherFacts, config: PreprocessConfig, image: Callable[[Tensor], Tensor], text: nn.Module, project: nn.Module,
        tokenize: Callable[[Sequence[str]], np.ndarray], trim: Callable[[Tensor], Tensor],
    ) -> None:  # fmt: skip
        self.facts, self.config, self.image_size = facts, config, config.image_size
        self._image, self._text, self._project, self._tokenize, self._trim = image, text, project, tokenize, trim
        self.text_trunk = f"{state_hash(text)}:{getattr(text, 'config', '')}:{facts.preprocessing.get('tokenizer', '')}"
        """Equal for two teachers whose text towers differ in their projection only: their features are computed once."""

    @torch.inference_mode()
    def encode_image(self, images: np.ndarray | Sequence[Image.Image]) -> np.ndarray:
        exact = isinstance(images, np.ndarray) and images.ndim == 4
        pixels = normalise(images, self.config) if exact else preprocess(images, self.config)
        if pixels.shape[-1] != self.image_size:
            raise StoreError(f"teacher '{self.facts.name}' takes views of {self.image_size} px, was given {pixels.shape[-1]} px")
        out = [
            self._image(torch.from_numpy(pixels[start : start + MICRO_BATCH])).numpy()
            for start in range(0, len(pixels), MICRO_BATCH)
        ]
        return unit(np.concatenate(out)) if out else np.zeros((0, self.facts.dim), np.float32)

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
        tokens = torch.from_numpy(self._tokenize(texts))
        order = sorted(range(len(texts)), key=lambda n: (int((tokens[n] != tokens[n, -1]).sum()), n))
        out: np.ndarray | None = None
        for start in range(0, len(order), MICRO_BATCH):
            chunk = order[start : start + MICRO_BATCH]
            features = self._text(self._trim(tokens[chunk])).numpy()
            out = np.empty((len(texts), features.shape[1]), np.float32) if out is None else out
            out[chunk] = features
        assert out is not None
        return out

    @torch.inference_mode()
    def project_text(self, features: np.ndarray) -> np.ndarray:
        """Features of `text_features` -> float32 (B, D), unit norm."""
        return unit(self._project(torch.from_numpy(features)).numpy()) if len(features) else np.zeros((0, self.facts.dim), np.float32)

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        return self.project_text(self.text_features(texts))


def open_checkpoint(folder: Path) -> TorchTeacher:
    """A checkpoint folder of ours, its hashes checked. Raises CheckpointError."""
    from mobileclip.checkpoint import load_checkpoint, open_tokenizer, preprocess_config, verify_receipt

    receipt = verify_receipt(folder)
    model = load_checkpoint(folder, verify=False)
    config = model.config
    image = preprocess_config(config)
    text = config.text
    trimmable = text.mask != "none"  # unmasked towers see their padding: they must run at the full context

    def trim(tokens: Tensor) -> Tensor:
        return tokens[:, : int(model.text.valid_tokens(tokens).sum(1).max())] if trimmable else tokens

    project = model.text.projection
    model.text.projection = nn.Identity()
    facts = TeacherFacts(
        name=folder.name, dim=config.embed_dim, logit_scale=float(model.logit_scale.detach().exp()), licence=config.licence, source=f"checkpoint {config.name}",
        sha256=receipt["files"]["model.safetensors"]["sha256"], micro_batch=MICRO_BATCH,
        preprocessing={**_preprocessing(image), "context_length": text.context_length, "tokenizer": receipt["files"]["tokenizer.json"]["sha256"]},
    )  # fmt: skip
    return TorchTeacher(facts, image, frozen(model.image, image.image_size), model.text, project, open_tokenizer(folder, config), trim)


class _OpenClipText(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens.long())


def open_open_clip(name: str, pretrained: str | None) -> TorchTeacher:
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
    facts = open_clip.get_model_preprocess_cfg(model)
    size = facts["size"] if isinstance(facts["size"], int) else facts["size"][0]
    image = PreprocessConfig(image_size=size, mean=tuple(facts["mean"]), std=tuple(facts["std"]), interpolation=facts["interpolation"])
    tokenizer = open_clip.get_tokenizer(name)
    with torch.inference_mode():
        dim = int(model.encode_text(tokenizer(["x"])).shape[1])
    digest = state_hash(model)
    known = TeacherFacts(
        name=f"{name}/{pretrained}" if pretrained else name, dim=dim, logit_scale=float(model.logit_scale.detach().exp()), sha256=digest, micro_batch=MICRO_BATCH,
        licence="as published with the weights" if pretrained else "none (random weights)", source=f"open_clip {open_clip.__version__}",
        preprocessing={**_preprocessing(image), "context_length": int(getattr(model, "context_length", 77)), "tokenizer": name},
    )  # fmt: skip
    image_tower = frozen(model.visual, size) if isinstance(getattr(model, "visual", None), nn.Module) else model.encode_image
    return TorchTeacher(
        known, image, image_tower, _OpenClipText(model), nn.Identity(), lambda texts: tokenizer(list(texts)).numpy(), lambda tokens: tokens
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
