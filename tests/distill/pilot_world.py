"""A tiny world for the pilot: pairs of coloured shapes, and three teachers: one that knows colours, one that knows nothing, one that knows one bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from distill.store import TeacherFacts
from distill.store_writing import unit
from runtime.pairs import write_shard

from .world import COLOURS, SHAPES, draw

NAMES = list(COLOURS)
TABLE = np.array([COLOURS[name] for name in NAMES], np.float32)


def make_split(folder: Path, prefix: str, copies: int, seed: int) -> Path:
    """`copies` shards of 12 pairs each, keys beginning with `prefix`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for copy in range(copies):
        samples = []
        for n, (colour, shape) in enumerate((c, s) for c in COLOURS for s in SHAPES):
            meta = {"concept": f"{colour}-{shape}", "held_out": shape == "stripe", "slice": "main"}
            text = f"a {colour} {shape}"
            samples.append((f"{prefix}{copy}-{n:02}", {"png": draw(colour, shape, rng), "txt": text.encode(), "json": json.dumps(meta).encode()}))
        write_shard(folder / f"{prefix}-{copy:05}.tar", samples)
    return folder


class FunctionTeacher:
    """Two functions as a teacher. The unit sphere around one direction, so that no vector is zero."""

    def __init__(self, name: str, dim: int, image: Callable[[np.ndarray], np.ndarray], text: Callable[[str], np.ndarray]) -> None:
        self.facts = TeacherFacts(name=name, dim=dim, logit_scale=10.0, licence="MIT", sha256=hashlib.sha256(name.encode()).hexdigest())
        self.image_size, self._image, self._text = 24, image, text

    def encode_image(self, images: np.ndarray | Sequence[Image.Image]) -> np.ndarray:
        small = [np.asarray(Image.fromarray(np.asarray(image)).resize((24, 24)), np.float32) for image in images]
        return unit(np.stack([self._image(view) for view in small]).astype(np.float32))

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        return unit(np.stack([self._text(text) for text in texts]).astype(np.float32))


def colours() -> FunctionTeacher:
    """How much of the view has each colour; which colour the text names."""

    def image(view: np.ndarray) -> np.ndarray:
        distance = ((view.reshape(-1, 1, 3) - TABLE) ** 2).sum(axis=2) / 60**2
        return np.exp(-distance).mean(axis=0) + 1e-3

    return FunctionTeacher("colours", 4, image, lambda text: np.array([name in text.split() for name in NAMES], np.float32) + 1e-3)


def noise() -> FunctionTeacher:
    """A random direction for every view and every text."""

    def drawn(data: bytes) -> np.ndarray:
        return np.random.default_rng(np.frombuffer(hashlib.sha256(data).digest(), "<u4").tolist()).standard_normal(8)

    return FunctionTeacher("noise", 8, lambda view: drawn(view.tobytes()), lambda text: drawn(text.encode()))


def warm() -> FunctionTeacher:
    """Tells red and yellow from green and blue and nothing else: one bit, easier to follow than four colours, and of less use."""
    told, side = colours(), np.array([1.0, -1.0, -1.0, 1.0])

    def bit(values: np.ndarray) -> np.ndarray:
        return np.array([np.tanh(50 * (values / values.sum()) @ side), 0.1], np.float32)

    return FunctionTeacher("warm", 2, lambda view: bit(told._image(view)), lambda text: bit(told._text(text)))
