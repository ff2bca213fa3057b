"""DataCompDR's augmentation parameters as ours.

The published views were drawn by torchvision on PIL pictures: RandomResizedCrop (a box in whole pixels of the picture, cut out, then
resized bicubic to 224), then RandAugment's two operations with its defaults: nearest pixel, black where the picture ends, shears about
the upper left corner. Sources: apple/ml-mobileclip, training/dr/transforms.py and configs/datacompdr12m.json; torchvision,
transforms/autoaugment.py, `_apply_op`. What each magnitude means there, and what is stored:

    ShearX, ShearY           a tangent (they pass atan of it)            the tangent
    TranslateX, TranslateY   pixels of the 224 px view, cut to whole     a fraction of the view
    Rotate                   degrees counter-clockwise                   degrees
    Brightness to Sharpness  factor - 1                                  factor - 1
    Posterize                bits, cut to whole                          bits
    Solarize                 threshold t: values >= t are inverted       the smallest whole number >= t, which inverts the same values
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from distill.augment import FULL_SCALE, OPERATIONS, PACKED_BYTES, Parameters, pack
from distill.datacompdr_samples import DamagedSampleError, Operation
from runtime.errors import ImageError, StoreError
from runtime.preprocess import open_encoded

VIEW = 224
"""Size that the published translations count in."""
MAX_PIXELS = 100_000_000
_UNIT, _FULL = 65535, 32767


class DoesNotFitError(StoreError):
    """The published boxes do not lie in the picture that one has."""


def pack_views(boxes: np.ndarray, operations: Sequence[Sequence[Operation]], size: tuple[int, int], most: int | None = None) -> np.ndarray:
    """uint8 (A, 16) for `distill.augment.apply`.

    Args:
        boxes: (A, 4) top, left, height, width in pixels of a picture of `size` (height, width).
        most: pack the first so many views only; the boxes of all of them must fit.

    Raises:
        DoesNotFitError: a box leaves the picture.
        DamagedSampleError: an operation or magnitude that torchvision's RandAugment does not have.
    """
    height, width = size
    if (boxes[:, 0] + boxes[:, 2]).max() > height or (boxes[:, 1] + boxes[:, 3]).max() > width:
        reach = f"{(boxes[:, 1] + boxes[:, 3]).max()} x {(boxes[:, 0] + boxes[:, 2]).max()}"
        raise DoesNotFitError(f"the published boxes reach {reach} px (width x height), the picture has {width} x {height}")
    out = np.empty((len(boxes[:most]), PACKED_BYTES), np.uint8)
    for n, (box, applied) in enumerate(zip(boxes[:most].tolist(), operations[:most], strict=True)):
        if len(applied) > 2:
            raise DamagedSampleError(f"view {n} of its .paug.json has {len(applied)} operations, expected at most 2")
        top, tall = _fractions(box[0], box[2], height)
        left, wide = _fractions(box[1], box[3], width)
        first, second = [pack_operation(*operation) for operation in applied] + [(0, 0)] * (2 - len(applied))
        packed = pack(Parameters(top=top, left=left, height=tall, width=wide, flip=False, first=first, second=second, torchvision=True))
        out[n] = np.frombuffer(packed, np.uint8)
    return out


def _fractions(start: int, length: int, whole: int) -> tuple[int, int]:
    """Start and length in 1/65535 of the whole. Rounding back gives the pixels again, for pictures below 32768 pixels."""
    units = max(1, round(length / whole * _UNIT))
    return min(round(start / whole * _UNIT), _UNIT - units), units


@functools.lru_cache(maxsize=4096)
def pack_operation(index: int, magnitude: float) -> tuple[int, int]:
    """(index, torchvision's magnitude) -> (index, stored integer). Raises DamagedSampleError when RandAugment cannot have drawn it."""
    if not 0 <= index < len(OPERATIONS) or not math.isfinite(magnitude):
        raise DamagedSampleError(f"its .paug.json has operation {index} with magnitude {magnitude}, expected 0 to {len(OPERATIONS) - 1} and a number")
    name = OPERATIONS[index]
    if name in ("Identity", "AutoContrast", "Equalize"):
        return index, 0
    if name in ("Posterize", "Solarize"):
        low, high, value = (1, 8, int(magnitude)) if name == "Posterize" else (0, 256, math.ceil(magnitude))
    else:
        low, high = -_FULL, _FULL
        value = round((int(magnitude) / VIEW if name.startswith("Translate") else magnitude) / FULL_SCALE[name] * _FULL)
    if not low <= value <= high:
        raise DamagedSampleError(f"its .paug.json has {name} with magnitude {magnitude:g}, which is out of range")
    return index, value


def header_of(data: bytes) -> tuple[tuple[int, int], bool]:
    """(height, width) of an encoded picture as it lies there, and whether its EXIF tag turns it. Pixels are not decoded.

    Raises:
        ImageError: no picture, or more than 100 megapixels.
    """
    try:
        with open_encoded(io.BytesIO(data)) as picture:
            width, height = picture.size
            # the base class's reader looks at what was met so far; PNG's own would decode the pixels first
            turned = Image.Image.getexif(picture).get(0x0112, 1) not in (0, 1)
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged bytes
        raise ImageError(f"the picture ({len(data)} bytes) does not open ({type(error).__name__})") from None
    if width * height > MAX_PIXELS:
        raise ImageError(f"the picture has {width} x {height} pixels, more than {MAX_PIXELS // 1_000_000} million")
    return (height, width), turned


def seen_size(meta: Mapping[str, Any], found: tuple[int, int]) -> tuple[int, int]:
    """(height, width) that the published boxes count in: that of the picture as it was downloaded.

    img2dataset tells it as original_height and original_width when it stored a smaller picture; without them it is the picture's own.
    Our boxes are fractions, so a picture that was scaled evenly needs nothing else.

    Raises:
        DoesNotFitError: the stored picture is no even scaling of the downloaded one (cropped, padded or squeezed).
    """
    height, width = meta.get("original_height"), meta.get("original_width")
    if type(height) is not int or type(width) is not int or not 0 < min(height, width) <= max(height, width) < 1 << 20:
        return found
    factor = max(found) / max(height, width)
    if abs(height * factor - found[0]) > 1 or abs(width * factor - found[1]) > 1:
        raise DoesNotFitError(f"the picture was {width} x {height} px and is {found[1]} x {found[0]} px now, which is no even scaling")
    return height, width
