"""Teachers for tests: fixed random maps of thumbnails and letters, without torch; they start in milliseconds."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

from distill.store import TeacherFacts
from distill.store_writing import unit


class TinyTeacher:
    def __init__(self, name: str, dim: int, image_size: int, seed: int, delay: float = 0.0) -> None:
        rng = np.random.default_rng(seed)
        self.facts = TeacherFacts(name=name, dim=dim, logit_scale=10.0, licence="MIT", sha256=f"seed {seed}")
        self.image_size, self.delay = image_size, delay
        self._image, self._text = rng.standard_normal((48, dim)).astype(np.float32), rng.standard_normal((256, dim)).astype(np.float32)

    def encode_image(self, images: np.ndarray | Sequence[Image.Image]) -> np.ndarray:
        time.sleep(self.delay)
        small = [np.asarray(Image.fromarray(np.asarray(image)).resize((4, 4), Image.Resampling.BOX), np.float32).reshape(-1) for image in images]
        return unit((np.stack(small) / 255 - 0.5) @ self._image)

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        return unit(np.stack([np.bincount(np.frombuffer(text.encode() or b" ", np.uint8), minlength=256) @ self._text for text in texts]).astype(np.float32))


def red() -> TinyTeacher:
    return TinyTeacher("red", 8, 32, 1)


def blue() -> TinyTeacher:
    return TinyTeacher("blue", 12, 24, 2)


def slow() -> TinyTeacher:
    return TinyTeacher("red", 8, 32, 1, delay=float(os.environ.get("TINY_DELAY", "0")))


def broken() -> TinyTeacher:
    teacher = red()
    teacher.encode_image = lambda images: np.full((len(images), 8), np.nan, np.float32)  # type: ignore[method-assign]
    return teacher


def misshapen() -> TinyTeacher:
    teacher = red()
    teacher.encode_text = lambda texts: np.ones((len(texts), 7), np.float32)  # type: ignore[method-assign]
    return teacher


def not_a_teacher() -> str:
    return "no"


def green() -> TinyTeacher:
    return TinyTeacher("green", 16, 40, 3)


def moody() -> TinyTeacher:
    """Like red, but not a number for views that are mostly pure magenta, and for texts that say so."""
    teacher = TinyTeacher("moody", 8, 32, 1)
    image, text = teacher.encode_image, teacher.encode_text

    def encode_image(images: np.ndarray) -> np.ndarray:
        out = image(images)
        out[[bool((np.asarray(one) == (255, 0, 255)).all(axis=2).mean() > 0.5) for one in images]] = np.nan
        return out

    def encode_text(texts: Sequence[str]) -> np.ndarray:
        out = text(texts)
        out[["magenta" in one for one in texts]] = np.nan
        return out

    teacher.encode_image, teacher.encode_text = encode_image, encode_text  # type: ignore[method-assign]
    return teacher


def fickle() -> TinyTeacher:
    """Each row's embedding depends on how many rows there are and on its place, as floating point may: only a fixed micro-batch hides the first."""
    teacher = TinyTeacher("fickle", 8, 32, 1)
    image, text = teacher.encode_image, teacher.encode_text
    teacher.encode_image = lambda images: image(images) + np.float32(0.1 * len(images))  # type: ignore[method-assign]
    teacher.encode_text = lambda texts: text(texts) + np.float32(0.1 * len(texts))  # type: ignore[method-assign]
    return teacher


class Seeing:
    """Knows the colours and shapes of tests/distill/world.py: a direction a word, pictures a little off."""

    image_size = 48

    def __init__(self) -> None:
        self.facts = TeacherFacts(name="seeing", dim=24, logit_scale=20.0, licence="MIT", sha256=os.environ.get("SEEING_SHA256", "5ee"))
        self._words: dict[str, np.ndarray] = {}

    def _word(self, word: str) -> np.ndarray:
        if word not in self._words:
            self._words[word] = np.random.default_rng([*word.encode()]).standard_normal(24).astype(np.float32)
        return self._words[word]

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        return unit(np.stack([np.sum([self._word(word) * (0.2 if len(word) < 2 else 1.0) for word in text.split() or [""]], axis=0) for text in texts]))

    def encode_image(self, images: np.ndarray | Sequence[Image.Image]) -> np.ndarray:
        from tests.distill.world import COLOURS

        out = []
        for image in images:
            pixels = np.asarray(image, np.float32)
            distance = np.stack([np.abs(pixels - colour).sum(axis=2) for colour in COLOURS.values()])
            painted = np.argwhere(distance.min(axis=0) < 60)
            if not len(painted):
                out.append(self._word("picture"))
                continue
            colour = list(COLOURS)[int(np.bincount(distance.argmin(axis=0)[tuple(painted.T)], minlength=len(COLOURS)).argmax())]
            filled = len(painted) / np.prod(np.ptp(painted, axis=0) + 1)
            shape = "square" if filled > 0.95 else "disc" if filled > 0.7 else "stripe"
            out.append(self._word(colour) + self._word(shape) + self._word("picture") * 0.5)  # the modality gap
        return unit(np.stack(out))


def seeing() -> Seeing:
    return Seeing()
