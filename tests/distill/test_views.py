"""Views of encoded pictures: pure, replayed exactly, decoded no larger than needed, and one sentence for what is no picture."""

from __future__ import annotations

import contextlib
import io
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageDraw, ImageFilter

from distill import augment, views
from distill.augment import Parameters
from runtime.errors import ImageError, StoreError
from runtime.pairs import decode_image

from .test_augment import parameters


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Gradients, shapes and noise: neither flat nor white noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    base = np.stack([120 + 90 * np.sin(3 * x + n) * np.cos(2 * y - n) for n in range(3)], axis=-1)
    image = Image.fromarray(base.astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(8):
        left, top = rng.uniform(0, 0.8, 2) * (width, height)
        pen.ellipse((left, top, left + width * rng.uniform(0.05, 0.3), top + height * rng.uniform(0.05, 0.3)), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    noisy = np.asarray(image.filter(ImageFilter.GaussianBlur(1)), np.float32) + rng.normal(0, 3, (height, width, 1))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {}) | options)
    return buffer.getvalue()


def turned(image: Image.Image, orientation: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encode(image, kind, exif=exif)


def box(top: float = 0.0, left: float = 0.0, height: float = 1.0, width: float = 1.0, **changes) -> bytes:
    """A crop in fractions, without operations."""
    edges = [round(top * 65535), round(left * 65535)]
    known = {"top": edges[0], "left": edges[1], "height": min(round(height * 65535), 65535 - edges[0]), "width": min(round(width * 65535), 65535 - edges[1])}
    return augment.pack(Parameters(**{**known, "flip": False, "first": (0, 0), "second": (0, 0), **changes}))


LARGE = photo(403, 297)  # no side is a multiple of 8
LARGE_JPEG = encode(LARGE)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(parameters(), st.sampled_from([16, 48, 64, 224]))
def test_a_view_is_pure_and_does_not_depend_on_views_drawn_before(value: Parameters, size: int) -> None:
    packed, data = augment.pack(value), LARGE_JPEG
    alone = views.view(data, packed, size)
    assert alone.shape == (size, size, 3)
    assert alone.dtype == np.uint8
    picture = views.open_picture(data)
    for other in (8, 300, 40):
        picture.view(packed, other)
    np.testing.assert_array_equal(picture.view(packed, size), alone)
    np.testing.assert_array_equal(views.view(data, packed, size), alone)


@pytest.mark.parametrize(("size", "scale"), [(200, 1), (119, 1), (118, 2), (60, 2), (59, 4), (30, 4), (29, 8), (4, 8)])
def test_the_scale_is_the_smallest_that_keeps_the_margin(size: int, scale: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert views.MARGIN == 1.25  # 297 / 1.25 / 2 = 118.8, / 4 = 59.4, / 8 = 29.7
    asked = []
    real = views.Picture._decode
    monkeypatch.setattr(views.Picture, "_decode", lambda self, scale: asked.append(scale) or real(self, scale))
    views.view(LARGE_JPEG, box(), size)
    assert asked == [scale]


def test_every_needed_scale_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    real = views.Picture._decode_jpeg
    monkeypatch.setattr(views.Picture, "_decode_jpeg", lambda self, scale: decoded.append(scale) or real(self, scale))
    picture = views.open_picture(LARGE_JPEG)
    for size in (64, 224, 32, 64, 224, 48):
        picture.view(box(0.1, 0.1, 0.85, 0.85), size)
    assert sorted(decoded) == [1, 2, 4]


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.integers(9, 90), st.integers(9, 90), st.sampled_from([2, 4, 8]))
def test_draft_gives_the_size_that_the_box_is_measured_in(width: int, height: int, scale: int) -> None:
    picture = views.open_picture(encode(photo(width, height)))
    if min(width, height) >= scale:
        assert picture._decode(scale).size == (-(-width // scale), -(-height // scale))


@pytest.mark.parametrize("size", [16, 32, 64, 110])
@pytest.mark.parametrize("crop", [(0, 0, 1, 1), (0.13, 0.21, 0.6, 0.7), (0.3, 0.4, 0.7, 0.6), (0, 0.35, 0.9, 0.65)])
def test_reduced_decoding_shows_the_same_place(size: int, crop: tuple[float, float, float, float]) -> None:
    """A box that were off by half a pixel of the reduced picture would differ by several grey levels at the shapes' edges."""
    reduced = views.view(LARGE_JPEG, box(*crop), size).astype(np.float32)
    full = np.asarray(augment.apply(decode_image(LARGE_JPEG), box(*crop), size), np.float32)
    assert np.abs(reduced - full).mean() < 1.5
    shifted = np.abs(np.roll(reduced, 1, axis=1) - full).mean()
    assert np.abs(reduced - full).mean() < 0.3 * shifted


@pytest.mark.parametrize("crop", [(0, 0, 1, 1), (0.13, 0.21, 0.6, 0.7)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_full_decoding_is_the_plain_replay(kind: str, crop: tuple[float, float, float, float]) -> None:
    data, packed = encode(LARGE, kind), box(*crop, first=(5, 3000), second=(6, -9000), flip=True)
    np.testing.assert_array_equal(views.view(data, packed, 224), np.asarray(augment.apply(decode_image(data), packed, 224)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [24, 32, 100, 224])
def test_the_box_lies_in_the_upright_picture(orientation: int, size: int) -> None:
    data, packed = turned(LARGE, orientation), box(0.05, 0.1, 0.8, 0.85)
    upright = decode_image(data)
    picture = views.open_picture(data)
    assert picture.size == (upright.height, upright.width)
    expected, found = np.asarray(augment.apply(upright, packed, size), np.float32), picture.view(packed, size).astype(np.float32)
    assert np.abs(found - expected).max() <= (0 if size == 224 else 60)
    assert np.abs(found - expected).mean() < 1.5


def cmyk() -> bytes:
    return encode(LARGE.convert("CMYK"))


def grey() -> bytes:
    return encode(LARGE.convert("L"))


def sixteen_bit() -> bytes:
    values = np.asarray(LARGE.convert("L"), np.uint16) * 257
    return encode(Image.fromarray(values), "PNG")


def transparent() -> bytes:
    layer = LARGE.convert("RGBA")
    layer.putalpha(Image.linear_gradient("L").resize(LARGE.size))
    return encode(layer, "PNG")


def palette() -> bytes:
    return encode(LARGE.convert("P"), "PNG", transparency=3)


def animated() -> bytes:
    return encode(LARGE, "WEBP", save_all=True, append_images=[LARGE.transpose(Image.Transpose.ROTATE_180)], lossless=True)


def animated_png() -> bytes:
    return encode(LARGE, "PNG", save_all=True, append_images=[photo(403, 297, seed=1)])


def turned_png() -> bytes:
    return turned(LARGE, 6, "PNG")


def two_pictures() -> bytes:
    return encode(LARGE, "MPO", save_all=True, append_images=[photo(403, 297, seed=1)])


def progressive() -> bytes:
    return encode(LARGE, progressive=True)


@pytest.mark.parametrize("make", [cmyk, grey, sixteen_bit, transparent, palette, animated, animated_png, turned_png, two_pictures, progressive])
def test_odd_pictures_are_decoded_as_everywhere(make: Callable[[], bytes]) -> None:
    data = make()
    expected = decode_image(data)
    picture = views.open_picture(data)
    assert picture.size == (expected.height, expected.width)
    np.testing.assert_array_equal(picture.view(box(), 250), np.asarray(augment.apply(expected, box(), 250)))
    small, reference = picture.view(box(), 32).astype(np.float32), np.asarray(augment.apply(expected, box(), 32), np.float32)
    assert np.abs(small - reference).mean() < 1.5


def bomb() -> bytes:
    """A PNG whose header claims 20,000 x 6,000 pixels."""
    data = bytearray(encode(Image.new("RGB", (1, 1)), "PNG"))
    data[16:24] = (20_000).to_bytes(4, "big") + (6_000).to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def huge() -> bytes:
    """Beyond Pillow's own limit as well."""
    data = bytearray(LARGE_JPEG)
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = b"\xff\xff\xff\xff"
    return bytes(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "does not decode"),
        (b"no picture", "does not decode"),
        (LARGE_JPEG[:4], "does not decode"),
        (LARGE_JPEG[: len(LARGE_JPEG) // 2], "does not decode"),
        (encode(LARGE, "PNG")[:900], "does not decode"),
        (bomb(), r"20000 x 6000 pixels, expected at most 100 megapixels"),
        (huge(), "does not decode"),
    ],
)
@pytest.mark.parametrize("size", [16, 200])
def test_what_is_no_picture_is_one_sentence(data: bytes, message: str, size: int) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        views.view(data, box(), size)
    assert "\n" not in str(caught.value)


def test_damaged_parameters_are_not_called_a_damaged_picture() -> None:
    with pytest.raises(StoreError, match="version 9"):
        views.view(LARGE_JPEG, b"\x09" + bytes(15), 32)


def test_a_damaged_orientation_is_told_or_ignored_but_never_another_error() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    block = bytearray(exif.tobytes())
    for place in range(len(block)):
        damaged = bytes(block[:place]) + bytes([block[place] ^ 0xFF]) + bytes(block[place + 1 :])
        with contextlib.suppress(ImageError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow tells of damaged EXIF
            assert views.view(encode(LARGE, exif=damaged), box(), 16).shape == (16, 16, 3)
