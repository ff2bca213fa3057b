"""RandAugment's fourteen operations on pictures in 8-bit RGB, equal to torchvision's (tests/distill/test_augment.py)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

FILL = (127, 127, 127)
"""What a shear, translation or rotation uncovers, and what an erased box is filled with."""

OPERATIONS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness", "Posterize",
    "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
"""The fourteen operations in DataCompDR's order; an index here is what is stored."""

FULL_SCALE = {
    "ShearX": 1.0, "ShearY": 1.0, "TranslateX": 1.0, "TranslateY": 1.0, "Rotate": 180.0, "Brightness": 1.0, "Color": 1.0, "Contrast": 1.0,
    "Sharpness": 1.0,
}  # fmt: skip
"""What i16 32767 means: shear as a tangent, translation as a fraction of the view, rotation in degrees, enhancement as factor - 1."""


def apply_operation(view: Image.Image, name: str, magnitude: float, torchvision: bool = False) -> Image.Image:
    """One operation of OPERATIONS on an RGB view, its magnitude in the units of FULL_SCALE (Posterize: bits, Solarize: threshold)."""
    return _APPLY_TORCHVISION.get(name, _APPLY[name])(view, magnitude) if torchvision else _APPLY[name](view, magnitude)


def _affine(view: Image.Image, matrix: tuple[float, float, float, float, float, float]) -> Image.Image:
    return view.transform(view.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=FILL)


def _smooth(view: Image.Image) -> Image.Image:
    """What `ImageEnhance.Sharpness` moves away from, in integers and a third of its time: 3 x 3 pixels in the mean, the middle one five times;
    the border as it is. Equal to Pillow's floats, since no sum of whole numbers over 13 lies near a half."""
    if min(view.size) < 3:
        return view
    pixels = np.asarray(view).reshape(view.height, view.width * 3)
    values = pixels.astype(np.uint16)
    rows = values[:-2] + values[1:-1]
    rows += values[2:]
    total = rows[:, :-6] + rows[:, 3:-3]
    total += rows[:, 6:]
    total += values[1:-1, 3:-3] << 2
    total <<= 1
    total += 13
    total //= 26
    out = pixels.copy()
    out[1:-1, 3:-3] = total
    return Image.fromarray(out.reshape(view.height, view.width, 3))


_APPLY: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "Identity": lambda view, m: view,
    # shears turn about the centre, so that their translation part scales with the view
    "ShearX": lambda view, m: _affine(view, (1, m, -m * view.height / 2, 0, 1, 0)),
    "ShearY": lambda view, m: _affine(view, (1, 0, 0, m, 1, -m * view.width / 2)),
    "TranslateX": lambda view, m: _affine(view, (1, 0, -m * view.width, 0, 1, 0)),
    "TranslateY": lambda view, m: _affine(view, (1, 0, 0, 0, 1, -m * view.height)),
    "Rotate": lambda view, m: view.rotate(m, Image.Resampling.BILINEAR, fillcolor=FILL),
    "Brightness": lambda view, m: ImageEnhance.Brightness(view).enhance(1 + m),
    "Color": lambda view, m: ImageEnhance.Color(view).enhance(1 + m),
    "Contrast": lambda view, m: ImageEnhance.Contrast(view).enhance(1 + m),
    "Sharpness": lambda view, m: Image.blend(_smooth(view), view, 1 + m),
    "Posterize": lambda view, m: ImageOps.posterize(view, int(m)),
    "Solarize": lambda view, m: ImageOps.solarize(view, int(m)),
    "AutoContrast": lambda view, m: ImageOps.autocontrast(view),
    "Equalize": lambda view, m: ImageOps.equalize(view),
}

_APPLY_TORCHVISION: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "ShearX": lambda view, m: view.transform(view.size, Image.Transform.AFFINE, (1, m, 0, 0, 1, 0)),
    "ShearY": lambda view, m: view.transform(view.size, Image.Transform.AFFINE, (1, 0, 0, m, 1, 0)),
    "TranslateX": lambda view, m: view.transform(view.size, Image.Transform.AFFINE, (1, 0, -m * view.width, 0, 1, 0)),
    "TranslateY": lambda view, m: view.transform(view.size, Image.Transform.AFFINE, (1, 0, 0, 0, 1, -m * view.height)),
    "Rotate": lambda view, m: view.rotate(m),
}
"""What torchvision draws otherwise: nearest pixel, black, shears about the upper left corner (transforms/autoaugment.py, `_apply_op`)."""
