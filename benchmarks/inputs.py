"""What is measured on: pictures and texts made by code, the same everywhere, so that two machines time the same work."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT = 640, 480
TEXTS = (
    "a red heart",
    "cat",
    "two people walking a dog along the beach at sunset",
    "a photo of a bicycle leaning against a brick wall",
    "soccer ball",
    "the quick brown fox jumps over the lazy dog while it rains over the old harbour town",
    "flag: Switzerland",
    "a plate of spaghetti with tomato sauce and basil, seen from above",
)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Encoded JPEGs (640 x 480, quality 88) and texts; a measured round takes item `round % len`."""

    jpegs: tuple[bytes, ...]
    texts: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of the decoded sizes and texts and the seedable content: JPEG bytes themselves vary with the encoder's version."""
        return hashlib.sha256("\n".join([f"{WIDTH}x{HEIGHT}x{len(self.jpegs)} v1", *self.texts]).encode()).hexdigest()


def draw_inputs(count: int = 8, seed: int = 0) -> Inputs:
    """`count` photo-like pictures: gradients, soft shapes and grain, so that the decoder has the work that a photograph gives it."""
    rng = np.random.default_rng(seed)
    jpegs = []
    for _ in range(count):
        corners = rng.integers(30, 226, (2, 2, 3)).astype(np.uint8)
        picture = Image.fromarray(corners).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        pen = ImageDraw.Draw(picture)
        for _ in range(24):
            x, y, radius = rng.integers(0, WIDTH), rng.integers(0, HEIGHT), rng.integers(12, 120)
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(int(value) for value in rng.integers(0, 256, 3)))
        picture = picture.filter(ImageFilter.GaussianBlur(1.5))
        grain = rng.normal(0, 6, (HEIGHT, WIDTH, 3))
        out = io.BytesIO()
        Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=88)
        jpegs.append(out.getvalue())
    return Inputs(jpegs=tuple(jpegs), texts=TEXTS)
