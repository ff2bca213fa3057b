"""The two baselines without a model, on a demo run: caption -> training pictures with that caption -> nearest test picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.baselines import lookup, thumbnail_baseline
from distill.frozen_tower import MICRO_BATCH, frozen
from mobileclip.checkpoint import load_checkpoint, preprocess_config
from runtime.evaluation import embed_gallery
from runtime.pairs import Pairs, open_pairs
from runtime.preprocess import preprocess


class FrozenFeatures:
    """A teacher's backbone before its projection, as the picture half of an encoder: (B, width) float32."""

    def __init__(self, checkpoint: Path) -> None:
        model = load_checkpoint(checkpoint)
        self.config = preprocess_config(model.config)
        self.trunk = frozen(model.image.trunk, self.config.image_size)

    @torch.inference_mode()
    def encode_image(self, images: Sequence[Any]) -> np.ndarray:
        pixels = torch.from_numpy(preprocess(list(images), self.config))
        parts = [self.trunk(pixels[n : n + MICRO_BATCH]).numpy() for n in range(0, len(pixels), MICRO_BATCH)]
        return np.concatenate(parts)

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        raise NotImplementedError("a baseline has no text tower")


def evaluate_baselines(out: Path) -> dict[str, dict[str, Any]]:
    """Both baselines on the web-like captions that students learn from, and on the clean ones that no student sees."""
    train, test = open_pairs(out / "pairs/train"), open_pairs(out / "pairs/test")
    noisy, clean = [train.caption(row) for row in range(len(train))], clean_captions(out, train)
    encoder = FrozenFeatures(out / "teachers/lite0")
    features = np.concatenate([encoder.encode_image([train.image(row) for row in range(start, min(start + 64, len(train)))]) for start in range(0, len(train), 64)])
    gallery = embed_gallery(encoder, test)
    return {
        "thumbnail lookup": thumbnail_baseline(train, test),
        "lite0 feature lookup": lookup(features, noisy, gallery),
        "thumbnail lookup, clean": thumbnail_baseline(train, test, captions=clean),
        "lite0 lookup, clean": lookup(features, clean, gallery),
    }


def clean_captions(out: Path, train: Pairs) -> list[str]:
    """The label of every training picture's concept, from the file beside the pairs that nothing that trains reads."""
    lines = (out / "pairs/captions/en.jsonl").read_text(encoding="utf-8").splitlines()
    labels = {facts["concept"]: facts["label"] for facts in map(json.loads, lines)}
    return [labels[train.meta(row)["concept"]] for row in range(len(train))]
