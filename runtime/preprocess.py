"""Pictures to model input: the one implementation that training, export and the device share (PIL + numpy).

Equal to torchvision's `Resize(shortest side)`, `CenterCrop`, `ToTensor`, `Normalize` on PIL images, and to timm's
evaluation transform where `crop_pct` is below 1. Decisions:

* Pictures become RGB before they are resized. Transparency is composed on white; 16-bit grey keeps its upper 8 bits.
* A file (path or encoded bytes) is turned upright by its EXIF orientation, as the pairs reader does, so that a phone's
  photograph looks the same in training and on the device. A PIL picture is taken as it is, as open_clip takes it: who
  opens files himself and wants them upright applies `PIL.ImageOps.exif_transpose`.
* A large JPEG file is decoded at a half, a quarter or an eighth of its size, as long as that leaves `oversampling` times the pixels that the resize asks
  for: what is left out would be averaged away. At four the embedding moves by less than 1e-4 in cosine, at two by more, and decoding is quicker
  (`make bench-runtime` prints both). A PIL picture is taken whole, and so is a file at infinity.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np

from runtime.errors import CheckpointError, ImageError

if TYPE_CHECKING:
    from PIL import Image

MOST_IMAGE_SIZE = 4096
USUAL = ("JPEG", "PNG", "GIF", "BMP", "PPM")
FORMATS = (*USUAL, "WEBP", "TIFF", "MPO", "AVIF", "HEIF", "JPEG2000")
"""What is read, where Pillow or a plugin of the application's reads it."""
INTERPOLATIONS = ("bilinear", "bicubic")
# A resized picture may have this many pixels before its crop: more comes only from absurd aspect ratios.
MAX_RESIZED_PIXELS = 64 * 1024 * 1024
OVERSAMPLING = 4.0

ImageSource: TypeAlias = Union[str, "os.PathLike[str]", bytes, "Image.Image", np.ndarray]


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessConfig:
    """How a picture becomes input.

    Attributes:
        image_size: height and width of the input, pixels.
        mean, std: per RGB channel, on the scale 0 to 1.
        interpolation: "bilinear" or "bicubic", both antialiased as PIL does it.
        crop_pct: the shortest side is resized to `floor(image_size / crop_pct)` before the central crop.

    Raises:
        CheckpointError: a value that makes no sense.
    """

    image_size: int
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    interpolation: str = "bilinear"
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(v) for v in self.mean))
        object.__setattr__(self, "std", tuple(float(v) for v in self.std))
        if not 1 <= self.image_size <= MOST_IMAGE_SIZE:
            raise CheckpointError(f"image_size is {self.image_size}, expected 1 to {MOST_IMAGE_SIZE}")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise CheckpointError(f"mean {self.mean} and std {self.std} must be three finite numbers each, std above 0")
        if self.interpolation not in INTERPOLATIONS:
            raise CheckpointError(f"unknown interpolation {self.interpolation!r}, expected one of {', '.join(INTERPOLATIONS)}")
        if not 0 < self.crop_pct <= 1:
            raise CheckpointError(f"crop_pct is {self.crop_pct}, expected above 0 and at most 1")


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as 8-bit RGB: alpha composed on white, 16-bit grey by its upper byte, palettes resolved."""
    from PIL import Image

    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        # 16-bit grey, whichever way Pillow holds it; its own conversion would clip at 255.
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        canvas.alpha_composite(image)
        return canvas.convert("RGB")
    return image.convert("RGB")


def open_encoded(source: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """Pillow's `Image.open` for the formats that photographs come in. Pillow knows forty more, and hands one of them (EPS) to another program. Raises as it does."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(source, formats=USUAL)
    except UnidentifiedImageError:
        Image.init()  # the rarer formats' modules are only now imported
        return Image.open(source, formats=[name for name in FORMATS if name in Image.OPEN])


def load_image(source: ImageSource, least: int | None = None) -> Image.Image:
    """A path, encoded bytes, PIL picture or uint8 array as an RGB picture.

    Args:
        source: arrays are (H, W, 3), (H, W, 4) or (H, W), uint8.
        least: pixels that the short side must keep; a larger JPEG may be decoded at a fraction of its size. None: whole.

    Raises:
        ImageError: missing, not a picture, cut short, too large to be meant, or an array of another kind.
    """
    return _decoded(source, least)[0]


def _decoded(source: ImageSource, least: int | None) -> tuple[Image.Image, bool]:
    """As `load_image`, and whether it was decoded at a fraction."""
    from PIL import Image, ImageOps

    if isinstance(source, Image.Image):
        try:
            return to_rgb(source), False
        except (OSError, ValueError, SyntaxError) as error:
            raise ImageError(f"a picture does not decode ({error}); give a complete one") from error
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[2] not in (3, 4)) or 0 in source.shape:
            raise ImageError(f"an array is {source.dtype} {source.shape}; expected uint8 (height, width, 3), 0 to 255, RGB")
        return to_rgb(Image.fromarray(np.ascontiguousarray(source))), False
    name = "the picture" if isinstance(source, bytes) else os.fspath(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise ImageError(f"{name}: there is no such picture; check the path")
    try:
        with warnings.catch_warnings():
            # Beyond Pillow's limit on pixels it warns, at twice the limit it raises: for us both are refusals.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with open_encoded(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                whole = image.size
                if least is not None:
                    image.draft(None, (least, least))
                image.load()
                return to_rgb(ImageOps.exif_transpose(image)), image.size != whole
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise ImageError(f"{name}: does not decode as a picture ({error}); replace or remove it") from error


def resize_and_crop(image: Image.Image, config: PreprocessConfig, whole: bool = True) -> Image.Image:
    """Shortest side to `image_size / crop_pct`, then the central square; RGB in, RGB (image_size, image_size) out.

    Args:
        whole: compute what the crop throws away too. Without it a quarter less is computed of a usual photograph, and a few pixels in ten thousand come out one level
            off: Pillow takes the corners of the part as 32-bit floats.
    """
    from PIL import Image

    target = math.floor(config.image_size / config.crop_pct)
    width, height = image.size
    short, long = min(width, height), max(width, height)
    long_target = int(target * long / short)
    if target * long_target > MAX_RESIZED_PIXELS:
        raise ImageError(f"a picture of {width} x {height} pixels would become {target} x {long_target} when its short side is resized; crop it first")
    size = (target, long_target) if width <= height else (long_target, target)
    left = round((size[0] - config.image_size) / 2.0)
    top = round((size[1] - config.image_size) / 2.0)
    box = (left, top, left + config.image_size, top + config.image_size)
    if image.size == size:
        return image.crop(box)
    method = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[config.interpolation]
    if whole:
        return image.resize(size, method).crop(box)
    across, down = width / size[0], height / size[1]
    part = (box[0] * across, box[1] * down, min(box[2] * across, width), min(box[3] * down, height))
    return image.resize((config.image_size, config.image_size), method, box=part)


def normalise(pixels: np.ndarray, config: PreprocessConfig, out: np.ndarray | None = None) -> np.ndarray:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W): `(x / 255 - mean) / std`, every step in float32 as torchvision. out: written to, if given."""
    planes = np.empty((len(pixels), 3, *pixels.shape[1:3]), np.float32) if out is None else out
    np.copyto(planes, np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    planes /= np.float32(255)
    if any(config.mean):
        planes -= np.array(config.mean, np.float32)[:, None, None]
    if config.std != (1.0, 1.0, 1.0):
        planes /= np.array(config.std, np.float32)[:, None, None]
    return planes


def preprocess(images: Sequence[ImageSource] | ImageSource, config: PreprocessConfig, *, threads: int | None = 1, oversampling: float = OVERSAMPLING) -> np.ndarray:
    """Pictures -> float32 (B, 3, image_size, image_size), ready for the image tower.

    Args:
        images: a list of paths, PIL pictures or uint8 (H, W, 3) arrays, or one of them. An empty list gives B = 0.
        threads: that decode and resize side by side; None = every processor that this process may use.
        oversampling: large JPEG files may be decoded at a fraction of their size that leaves so many times the pixels that are needed; infinity: never.

    Raises:
        ImageError: one of them does not decode; the message names it.
    """
    size = config.image_size
    sources = as_list(images)
    pixels = np.empty((len(sources), size, size, 3), np.uint8)
    least = math.ceil(oversampling * math.floor(size / config.crop_pct)) if math.isfinite(oversampling) else None

    def fill(n: int) -> None:
        image, reduced = _decoded(sources[n], least)
        pixels[n] = np.asarray(resize_and_crop(image, config, whole=not reduced))  # what was reduced is near to the whole, not equal to it

    side_by_side(fill, len(sources), threads)
    return normalise(pixels, config)


def side_by_side(work: Callable[[int], None], count: int, threads: int | None) -> None:
    """`work(0)` … `work(count - 1)`, on several threads where there is more than one thing to do; the first error is raised, the rest is left undone."""
    if threads is None:
        from runtime.backends import available_threads

        threads = available_threads()
    if min(threads, count) < 2:
        for n in range(count):
            work(n)
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(threads, count)) as pool:
        waiting = [pool.submit(work, n) for n in range(count)]
        try:
            for done in waiting:
                done.result()
        finally:
            for left in waiting:
                left.cancel()


def is_one(images: Any) -> bool:
    """Whether this is one picture: a path, encoded bytes, a PIL picture or an array of two or three dimensions."""
    if isinstance(images, np.ndarray):
        return images.ndim != 4
    return isinstance(images, (str, os.PathLike, bytes)) or hasattr(images, "resize")


def as_list(images: Any) -> list[Any]:
    """One picture or many as a list; a uint8 array of four dimensions counts as many."""
    return [images] if is_one(images) else list(images)
