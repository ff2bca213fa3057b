"""Stored, replayable augmentation: RandomResizedCrop, optional flip, two RandAugment operations and optional erasing in sixteen bytes.

The parameters do not know a resolution: the crop box is held in fractions of the source, translations and the erased box in fractions
of the view, so the same bytes give the same view at 64 px for the student and at 128 px for the teacher. Little-endian layouts; the
low half of byte 0 is the version in both.

    version 2 (written)                                          version 1 (still replayed)
    byte 0       version (2); bit 4: mirrored left to right;     byte 0       version (1)
                 bit 5: a box is erased; bit 6: drawn as         byte 1       bit 0: mirrored left to right
                 torchvision does
    bytes 1-8    crop top, left, height, width: u16, in          bytes 2-9    the crop, as in version 2
                 1/65535 of the source's height, width,
                 height, width
    byte 9       operations: A in the low half, B in the high    byte 10      operation A
    bytes 10-11  magnitude of A, i16                             bytes 11-12  its magnitude, i16
    bytes 12-13  magnitude of B, i16                             byte 13      operation B
    bytes 14-15  erased box, four bits each from the lowest:     bytes 14-15  its magnitude, i16
                 top, left, height - 1, width - 1, in 1/16 of
                 the view

A magnitude is i16/32767 of the operation's full scale (FULL_SCALE), for Posterize the bits kept, for Solarize the threshold. Full
scales belong to the version: the bytes alone decide the pixels, no spec is needed to replay them.

Bit 6 is for views that torchvision drew for the teachers elsewhere (DataCompDR): the box is cut out at whole pixels before it is
resized, shears are about the upper left corner, and geometry takes the nearest pixel and uncovers black (the defaults of its
RandAugment).
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from distill.image_operations import FILL, FULL_SCALE, OPERATIONS, apply_operation
from runtime.errors import RecipeError, StoreError

VERSION = 2
PACKED_BYTES = 16
_LAYOUT = struct.Struct("<BHHHHBhhH")
_LAYOUT_1 = struct.Struct("<BBHHHHBhBh")
_MIRRORED, _ERASED, _TORCHVISION = 16, 32, 64
UNIT = 65535
"""Crop boxes are held in 1/UNIT of the source."""
ERASE_UNIT = 16
"""Erased boxes are held in 1/ERASE_UNIT of the view."""
_FULL = 32767


def _gentle_weights() -> tuple[float, ...]:
    # Drawings are told apart by colour: what replaces hues (Posterize, Solarize, Equalize) is drawn ten times more rarely.
    rare = {"Posterize": 0.2, "Solarize": 0.1, "Equalize": 0.1, "AutoContrast": 0.5}
    return tuple(rare.get(name, 1.0) for name in OPERATIONS)


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentSpec:
    """How parameters are drawn. The defaults are gentle (drawings on plain ground); `photographs()` is DataCompDR's strength.

    scale: share of the area that the crop keeps; ratio: its aspect; operations: RandAugment operations a view, 0 to 2; weights: one
    relative frequency per operation of OPERATIONS; erase: probability of an erased box (Zhong et al. 2017), erase_scale and erase_ratio
    its share of the view and its aspect; the other fields are the largest magnitude of each operation.
    """

    scale: tuple[float, float] = (0.35, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    operations: int = 2
    flip: float = 0.0
    weights: tuple[float, ...] = field(default_factory=_gentle_weights)
    shear: float = 0.2
    translate: float = 0.12
    rotate: float = 20.0
    brightness: float = 0.4
    color: float = 0.4
    contrast: float = 0.4
    sharpness: float = 0.9
    posterize_bits: int = 4
    solarize_threshold: int = 160
    erase: float = 0.0
    erase_scale: tuple[float, float] = (0.02, 0.33)
    erase_ratio: tuple[float, float] = (0.3, 3.3)

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise RecipeError(f"augmentation scale {self.scale} is not usable; expected 0 < smallest <= largest <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise RecipeError(f"augmentation ratio {self.ratio} is not usable; expected 0 < smallest <= largest")
        if len(self.weights) != len(OPERATIONS) or min(self.weights) < 0 or sum(self.weights) <= 0:
            raise RecipeError(f"augmentation weights need {len(OPERATIONS)} numbers >= 0 with a positive sum, found {self.weights}")
        if not 0 <= self.operations <= 2 or not 0 <= self.flip <= 1:
            raise RecipeError(f"augmentation takes 0 to 2 operations and a flip probability, found {self.operations} and {self.flip}")
        if not 0 <= self.erase <= 1 or not 0 < self.erase_scale[0] <= self.erase_scale[1] <= 1 or not 0 < self.erase_ratio[0] <= self.erase_ratio[1]:
            raise RecipeError(
                f"augmentation erase is a probability, erase_scale and erase_ratio go from smallest to largest above 0, the scale at most 1; "
                f"found {self.erase}, {self.erase_scale} and {self.erase_ratio}"
            )
        if not 1 <= self.posterize_bits <= 8 or not 0 <= self.solarize_threshold <= 256:
            raise RecipeError(f"posterize_bits must be 1 to 8 and solarize_threshold 0 to 256, found {self.posterize_bits}, {self.solarize_threshold}")
        limits = {"shear": 1, "translate": 1, "rotate": 180, "brightness": 1, "color": 1, "contrast": 1, "sharpness": 1}
        for name, limit in limits.items():
            if not 0 <= getattr(self, name) <= limit:
                raise RecipeError(f"augmentation {name} must lie in 0..{limit}, found {getattr(self, name)}")


def photographs() -> AugmentSpec:
    """DataCompDR's strength: crops down to 8 % of the area, all fourteen operations alike."""
    return AugmentSpec(
        scale=(0.08, 1.0), weights=(1.0,) * len(OPERATIONS), shear=0.3, translate=0.45, rotate=30.0, brightness=0.9, color=0.9, contrast=0.9,
        sharpness=0.9, posterize_bits=4, solarize_threshold=0,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """One view, as integers, exactly what the sixteen bytes hold.

    Crop in 1/UNIT of the source; operations as (index, i16 magnitude); erase: top, left, height, width in 1/ERASE_UNIT of the view;
    torchvision: drawn as torchvision's RandomResizedCrop and RandAugment do.
    """

    top: int
    left: int
    height: int
    width: int
    flip: bool
    first: tuple[int, int]
    second: tuple[int, int]
    erase: tuple[int, int, int, int] | None = None
    torchvision: bool = False


def pack(parameters: Parameters) -> bytes:
    """Parameters -> 16 bytes of version 2. Raises StoreError when a field is out of range."""
    _check(parameters)
    p = parameters
    head = VERSION | (_MIRRORED if p.flip else 0) | (_ERASED if p.erase else 0) | (_TORCHVISION if p.torchvision else 0)
    top, left, height, width = p.erase or (0, 0, 1, 1)
    erased = top | left << 4 | height - 1 << 8 | width - 1 << 12
    (op_a, value_a), (op_b, value_b) = p.first, p.second
    return _LAYOUT.pack(head, p.top, p.left, p.height, p.width, op_a | op_b << 4, value_a, value_b, erased)


def unpack(packed: bytes | bytearray | memoryview | np.ndarray) -> Parameters:
    """16 bytes (or a uint8 array of 16) -> Parameters. Raises StoreError for another version, length or an impossible field."""
    packed = packed.tobytes() if isinstance(packed, np.ndarray) else bytes(packed)
    if len(packed) != PACKED_BYTES:
        raise StoreError(f"augmentation parameters have {len(packed)} bytes, expected {PACKED_BYTES}; the store is damaged, reinforce again")
    version = packed[0] & 15
    if version == 1:
        parameters = _unpack_1(packed)
    elif version == VERSION:
        parameters = _unpack_2(packed)
    else:
        raise StoreError(f"augmentation parameters of version {version}; this release replays versions 1 and {VERSION}: update it or reinforce again")
    _check(parameters)
    return parameters


def _unpack_2(packed: bytes) -> Parameters:
    head, top, left, height, width, operations, value_a, value_b, erased = _LAYOUT.unpack(packed)
    if head & 0x80 or (erased and not head & _ERASED):
        raise StoreError(f"augmentation parameters have flags {head >> 4} and an erased box {erased:#06x}; the store is damaged, reinforce again")
    box = (erased & 15, erased >> 4 & 15, (erased >> 8 & 15) + 1, (erased >> 12) + 1)
    return Parameters(
        top=top, left=left, height=height, width=width, flip=bool(head & _MIRRORED), first=(operations & 15, value_a), second=(operations >> 4, value_b),
        erase=box if head & _ERASED else None, torchvision=bool(head & _TORCHVISION),
    )  # fmt: skip


def _unpack_1(packed: bytes) -> Parameters:
    version, flags, top, left, height, width, op_a, value_a, op_b, value_b = _LAYOUT_1.unpack(packed)
    if version != 1 or flags > 1:
        raise StoreError(f"augmentation parameters of version 1 have flags {flags} and first byte {version}; the store is damaged, reinforce again")
    return Parameters(top=top, left=left, height=height, width=width, flip=bool(flags), first=(op_a, value_a), second=(op_b, value_b))


def _check(p: Parameters) -> None:
    box_ok = p.height > 0 and p.width > 0 and 0 <= p.top <= UNIT - p.height and 0 <= p.left <= UNIT - p.width
    if not box_ok:
        raise StoreError(f"augmentation crop (top {p.top}, left {p.left}, height {p.height}, width {p.width}) leaves the picture (0..{UNIT})")
    for index, value in (p.first, p.second):
        if not 0 <= index < len(OPERATIONS):
            raise StoreError(f"augmentation operation {index} is unknown; expected 0..{len(OPERATIONS) - 1}")
        low, high = {"Posterize": (1, 8), "Solarize": (0, 256)}.get(OPERATIONS[index], (-_FULL, _FULL))
        if not low <= value <= high:
            raise StoreError(f"augmentation magnitude {value} of {OPERATIONS[index]} lies outside {low}..{high}")
    if p.erase is not None:
        top, left, height, width = p.erase
        if height < 1 or width < 1 or not 0 <= top <= ERASE_UNIT - height or not 0 <= left <= ERASE_UNIT - width:
            raise StoreError(f"augmentation erased box (top {top}, left {left}, height {height}, width {width}) leaves the view (0..{ERASE_UNIT})")


def view_parameters(seed: int, key: str, view: int, spec: AugmentSpec, size: tuple[int, int]) -> bytes:
    """Parameters of one view: a function of seed, key, number and picture size (height, width) alone."""
    digest = hashlib.sha256(key.encode()).digest()
    return sample_parameters(np.random.default_rng([seed, view, *np.frombuffer(digest[:16], "<u4").tolist()]), spec, size)


def sample_parameters(rng: np.random.Generator, spec: AugmentSpec, size: tuple[int, int]) -> bytes:
    """Draw one view of a picture of `size` (height, width) pixels. Returns the 16 packed bytes; advances `rng`."""
    top, left, height, width = _sample_crop(rng, spec, size)
    flip = bool(rng.random() < spec.flip)
    weights = np.asarray(spec.weights, np.float64)
    chosen = np.searchsorted(np.cumsum(weights / weights.sum()), rng.random(2), side="right").clip(0, len(OPERATIONS) - 1)
    pairs = [_sample_magnitude(rng, spec, int(index) if position < spec.operations else 0) for position, index in enumerate(chosen)]
    erase = _sample_erase(rng, spec)
    return pack(Parameters(top=top, left=left, height=height, width=width, flip=flip, first=pairs[0], second=pairs[1], erase=erase))


def _sample_crop(rng: np.random.Generator, spec: AugmentSpec, size: tuple[int, int]) -> tuple[int, int, int, int]:
    source_height, source_width = size
    area, log_ratio = source_height * source_width, (math.log(spec.ratio[0]), math.log(spec.ratio[1]))
    for _ in range(10):
        target = area * rng.uniform(*spec.scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        width, height = math.sqrt(target * aspect), math.sqrt(target / aspect)
        if width <= source_width and height <= source_height:
            top, left = rng.uniform(0, source_height - height), rng.uniform(0, source_width - width)
            break
    else:  # the picture is too narrow for any of them: the largest central crop within the aspect bounds
        aspect = min(max(source_width / source_height, spec.ratio[0]), spec.ratio[1])
        width, height = min(source_width, source_height * aspect), min(source_height, source_width / aspect)
        top, left = (source_height - height) / 2, (source_width - width) / 2
    height_units, width_units = (max(1, round(v * UNIT)) for v in (height / source_height, width / source_width))
    return (
        min(round(top / source_height * UNIT), UNIT - height_units), min(round(left / source_width * UNIT), UNIT - width_units),
        height_units, width_units,
    )  # fmt: skip


def _sample_magnitude(rng: np.random.Generator, spec: AugmentSpec, index: int) -> tuple[int, int]:
    name, share = OPERATIONS[index], float(rng.uniform(-1, 1))  # always one draw, so that a view uses a fixed number of them
    if name in ("Identity", "AutoContrast", "Equalize"):
        return index, 0
    if name == "Posterize":
        return index, 8 - round(abs(share) * (8 - spec.posterize_bits))
    if name == "Solarize":
        return index, 256 - round(abs(share) * (256 - spec.solarize_threshold))
    largest = {
        "ShearX": spec.shear, "ShearY": spec.shear, "TranslateX": spec.translate, "TranslateY": spec.translate, "Rotate": spec.rotate,
        "Brightness": spec.brightness, "Color": spec.color, "Contrast": spec.contrast, "Sharpness": spec.sharpness,
    }[name]  # fmt: skip
    return index, round(share * largest / FULL_SCALE[name] * _FULL)


def _sample_erase(rng: np.random.Generator, spec: AugmentSpec) -> tuple[int, int, int, int] | None:
    if spec.erase == 0 or rng.random() >= spec.erase:
        return None
    area, log_ratio = rng.uniform(*spec.erase_scale), rng.uniform(math.log(spec.erase_ratio[0]), math.log(spec.erase_ratio[1]))
    height, width = (min(max(1, round(ERASE_UNIT * math.sqrt(area * math.exp(sign * log_ratio)))), ERASE_UNIT) for sign in (-1, 1))
    return int(rng.integers(0, ERASE_UNIT - height + 1)), int(rng.integers(0, ERASE_UNIT - width + 1)), height, width


def describe(packed: bytes | np.ndarray) -> dict[str, Any]:
    """The view in words and units: crop fractions, flip, per operation its name and magnitude, erased fractions or None."""
    p = unpack(packed)
    operations = [
        {"name": OPERATIONS[index], "magnitude": value * FULL_SCALE[OPERATIONS[index]] / _FULL if OPERATIONS[index] in FULL_SCALE else value}
        for index, value in (p.first, p.second)
    ]
    crop = {"top": p.top / UNIT, "left": p.left / UNIT, "height": p.height / UNIT, "width": p.width / UNIT}
    erase = None if p.erase is None else dict(zip(("top", "left", "height", "width"), (side / ERASE_UNIT for side in p.erase), strict=True))
    return {"version": bytes(packed[:1])[0] & 15, "crop": crop, "flip": p.flip, "operations": operations, "erase": erase}


def apply(image: Image.Image, packed: bytes | np.ndarray, size: int) -> Image.Image:
    """The view that the bytes stand for. image: RGB of any size; returns RGB (size, size). A pure function: equal inputs, equal pixels."""
    if image.mode != "RGB":
        image = image.convert("RGB")
    return draw(image, unpack(packed), size, (image.height, image.width))


def draw(
    image: Image.Image, p: Parameters, size: int, extent: tuple[float, float], origin: tuple[float, float] = (0.0, 0.0), quick: bool = False
) -> Image.Image:
    """The view of an RGB picture whose content is `extent` (height, width) pixels large and begins at `origin` (top, left): a picture
    that was decoded at reduced scale may be up to one pixel larger than its content. Crop and resize are one step; what the parameters
    leave out costs nothing.

    Args:
        quick: resize a crop of whole pixels with torch's vectorised bicubic filter, in a third of Pillow's time. One value in twelve differs from
            Pillow's by a grey level or two.
    """
    height, width = extent
    top, left = origin[0] + p.top / UNIT * height, origin[1] + p.left / UNIT * width
    box = (left, top, min(left + p.width / UNIT * width, image.width), min(top + p.height / UNIT * height, image.height))
    if p.torchvision:
        image, box = _cut(image, box)
    if quick and box == (0, 0, *image.size):
        view = _resized_by_torch(image, size)
    else:
        view = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if p.flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for index, value in (p.first, p.second):
        name = OPERATIONS[index]
        if name != "Identity":
            magnitude = value * FULL_SCALE[name] / _FULL if name in FULL_SCALE else value
            view = apply_operation(view, name, _drawn_magnitude(name, magnitude) if p.torchvision else magnitude, p.torchvision)
    if p.erase is not None:
        top, left, height, width = p.erase
        edges = (round(side * size / ERASE_UNIT) for side in (left, top, left + width, top + height))
        view.paste(FILL, tuple(edges))
    return view


def _cut(image: Image.Image, box: tuple[float, float, float, float]) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """The pixels that a box touches, and the box in them. Sides that are whole but for the rounding to 1/UNIT are whole."""
    left, top, right, bottom = (round(side) if abs(side - round(side)) < 0.1 else side for side in box)
    left, top = min(left, image.width - 0.1), min(top, image.height - 0.1)
    x, y = math.floor(left), math.floor(top)
    cut = image.crop((x, y, max(math.ceil(right), x + 1), max(math.ceil(bottom), y + 1)))
    return cut, (left - x, top - y, max(right - x, left - x + 0.1), max(bottom - y, top - y + 0.1))


def _resized_by_torch(image: Image.Image, size: int) -> Image.Image:
    import torch  # what only reads or writes parameters does without it
    import torch.nn.functional as F

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # channels last, as the vectorised filter wants them
    return Image.fromarray(F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)[0].permute(1, 2, 0).contiguous().numpy())


def _drawn_magnitude(name: str, magnitude: float) -> float:
    """torchvision draws whole degrees and hundredths: what is one but for the rounding to 16 bits is one, so that no tie falls the other way."""
    grid = {"Rotate": 1.0, "TranslateX": 0.0, "TranslateY": 0.0}.get(name, 0.01)
    if name not in FULL_SCALE or not grid:
        return magnitude
    near = round(magnitude / grid) * grid
    return near if abs(magnitude - near) <= 0.51 * FULL_SCALE[name] / _FULL else magnitude
