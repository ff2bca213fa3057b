"""From an encoded picture to an augmented view. The reinforcement (for its teachers) and the training loader use nothing else, so
what a teacher saw and what the student sees at that size are equal to the pixel. Views of an imported DataCompDR are drawn by the published
steps with a quicker resize, within a grey level or two (`augment.apply` draws them exactly).

A JPEG holds its picture in blocks of 8 x 8 frequencies; libjpeg can leave out the upper ones and hand over the picture at 1/2, 1/4 or
1/8 of its size for a fraction of the time (Pillow's `draft`). A view is drawn from the smallest of these at which its crop still has
MARGIN times the view's pixels on both sides. The choice depends on picture, parameters and size alone, so a view is a pure function of
the three, whatever was drawn before.
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import ExifTags, Image

from distill.augment import UNIT, Parameters, draw, unpack
from runtime.errors import ImageError
from runtime.pairs import decode_image
from runtime.preprocess import open_encoded

MARGIN = 1.25
"""Pixels that the crop must keep for each pixel of the view. Measured on photograph-like pictures against decoding in full: at 1.25 the
views differ by 1.1 to 1.4 grey levels in the mean (43 dB), less than between a bicubic and a bilinear crop; at 1.0 by 1.6 to 2.2."""
SCALES = (8, 4, 2)
MAX_PIXELS = 100_000_000

_TURNS = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, False, True), 3: (Image.Transpose.ROTATE_180, True, True), 4: (Image.Transpose.FLIP_TOP_BOTTOM, True, False),
    5: (Image.Transpose.TRANSPOSE, False, False), 6: (Image.Transpose.ROTATE_270, False, True), 7: (Image.Transpose.TRANSVERSE, True, True),
    8: (Image.Transpose.ROTATE_90, True, False),
}  # fmt: skip
"""EXIF orientation to what turns the picture upright, and whether its upright top and left are a bottom or right side as it is stored."""


def view(data: bytes, packed: bytes | np.ndarray, size: int) -> np.ndarray:
    """The augmented view of one encoded picture, uint8 (size, size, 3) RGB. Equal arguments, equal pixels.

    Raises:
        ImageError: the picture does not decode, or has more than 100 megapixels.
        StoreError: the parameters are damaged.
    """
    return open_picture(data).view(packed, size)


def open_picture(data: bytes) -> Picture:
    """Read the header of an encoded picture; pixels are decoded when a view asks for them, and may turn out damaged only then.

    Raises:
        ImageError: not a picture, or more than 100 megapixels.
    """
    return Picture(data)


class Picture:
    """An encoded picture and the scales at which it has been decoded. Not for several threads at once.

    size: (height, width) in pixels, upright (EXIF orientation applied).
    """

    __slots__ = ("_data", "_decoded", "_jpeg", "_opened", "_turn", "size")

    def __init__(self, data: bytes) -> None:
        self._data, self._decoded = data, dict[int, Image.Image]()
        try:
            opened = open_encoded(io.BytesIO(data))
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise ImageError(f"the picture has {width} x {height} pixels, expected at most {MAX_PIXELS // 1_000_000} megapixels; scale it down or drop this sample")
            self._jpeg = opened.format in ("JPEG", "MPO")
            orientation = opened.getexif().get(ExifTags.Base.Orientation, 1)
        except ImageError:
            raise
        except Exception as error:  # Pillow's plugins raise nearly anything on damaged bytes
            raise _damaged(data, error) from error
        self._turn = _TURNS.get(orientation)
        self._opened: Image.Image | None = opened if self._jpeg else None
        self.size = (width, height) if orientation in (5, 6, 7, 8) else (height, width)

    def view(self, packed: bytes | np.ndarray, size: int) -> np.ndarray:
        """`view` for this picture; a scale that another view has needed is not decoded again.

        Raises:
            ImageError: the picture does not decode.
            StoreError: the parameters are damaged.
        """
        parameters = unpack(packed)
        scale = self._scale(parameters, size)
        image = self._decode(scale)
        height, width = self.size[0] / scale, self.size[1] / scale
        # A reduced picture is rounded up to whole pixels, at the stored bottom and right; the box is measured in what is truly the picture.
        origin = (0.0, 0.0) if self._turn is None else (self._turn[1] * (image.height - height), self._turn[2] * (image.width - width))
        # Views that we drew ourselves come back to the pixel. Those of others, whose decoder and filter are not known to the bit, may be quick.
        return np.asarray(draw(image, parameters, size, (height, width), origin, quick=parameters.torchvision))

    def _scale(self, parameters: Parameters, size: int) -> int:
        """1, 2, 4 or 8: by how much the decoded picture is smaller."""
        if not self._jpeg:
            return 1
        short = min(parameters.height * self.size[0], parameters.width * self.size[1])  # in 1/UNIT pixels
        return next((scale for scale in SCALES if short >= MARGIN * size * scale * UNIT), 1)

    def _decode(self, scale: int) -> Image.Image:
        if scale not in self._decoded:
            try:
                self._decoded[scale] = self._decode_jpeg(scale) if self._jpeg else decode_image(self._data)
            except Exception as error:
                raise _damaged(self._data, error) from error
        return self._decoded[scale]

    def _decode_jpeg(self, scale: int) -> Image.Image:
        opened, self._opened = self._opened or open_encoded(io.BytesIO(self._data)), None
        width, height = opened.size
        if scale > 1:
            opened.draft(None, (width // scale, height // scale))
            expected = (math.ceil(width / scale), math.ceil(height / scale))
            if opened.size != expected:  # draft chooses by its own rule; the box would be wrong
                raise ImageError(f"asked for 1/{scale} of {width} x {height}, the decoder gives {opened.size[0]} x {opened.size[1]}")
        opened.load()
        upright = opened if self._turn is None else opened.transpose(self._turn[0])
        return upright if upright.mode == "RGB" else upright.convert("RGB")


def _damaged(data: bytes, error: Exception) -> ImageError:
    found = " ".join(str(error).split())[:160] or type(error).__name__
    return ImageError(f"the picture ({len(data)} bytes) does not decode ({found}); replace or drop this sample")
