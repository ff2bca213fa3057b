"""Published augmentation parameters give the pixels that torchvision gave the teachers; other sizes give the same view."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torchvision.transforms import InterpolationMode, RandAugment
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import _apply_op

from distill import augment
from distill.augment import OPERATIONS, Parameters
from distill.datacompdr_samples import DamagedSampleError
from distill.datacompdr_views import DoesNotFitError, header_of, pack_operation, pack_views, seen_size
from distill.views import view

from .test_augment import parameters

SIZE = 224
SPACE = RandAugment()._augmentation_space(31, (SIZE, SIZE))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Shapes with hard edges on noise: every misplaced pixel shows."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y = rng.integers(0, width), rng.integers(0, height)
        draw.rectangle((x, y, x + width // 5, y + height // 6), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    return image


def drawn_by_torchvision(image: Image.Image, box: list[int], operations: list[tuple[int, float]], size: int = SIZE) -> np.ndarray:
    """What `reapply` of apple/ml-mobileclip's training/dr/transforms.py does: the crop, then torchvision's operations with its defaults."""
    out = F.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC)
    for index, magnitude in operations:
        out = _apply_op(out, OPERATIONS[index], magnitude, interpolation=InterpolationMode.NEAREST, fill=None)
    return np.asarray(out)


def drawn_by_us(image: Image.Image, box: list[int], operations: list[tuple[int, float]], size: int = SIZE) -> np.ndarray:
    packed = pack_views(np.array([box]), [operations], (image.height, image.width))[0]
    return np.asarray(augment.apply(image, packed, size))


def magnitudes_of(name: str) -> list[float]:
    values, signed = SPACE[name]
    values = [float(value) for value in values.reshape(-1)]
    return values + [-value for value in values] if signed else values


@pytest.mark.parametrize("box", [[0, 0, 512, 512], [13, 40, 301, 288], [100, 7, 64, 90]])
def test_the_loader_draws_a_published_view_within_a_grey_level_or_two(box: list[int]) -> None:
    smooth = picture(512, 512).resize((64, 64)).resize((512, 512), Image.Resampling.BICUBIC)
    encoded = io.BytesIO()
    smooth.save(encoded, "PNG")
    packed = pack_views(np.array([box]), [[]], (512, 512))[0]
    exact, quick = (np.asarray(pixels, np.int16) for pixels in (augment.apply(smooth, packed, SIZE), view(encoded.getvalue(), packed, SIZE)))
    assert np.abs(exact - quick).max() <= 3
    assert 0 < np.abs(exact - quick).mean() < 0.2  # not nothing: it is the other filter


def test_the_operations_are_torchvisions_in_its_order() -> None:
    assert tuple(SPACE) == OPERATIONS


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_at_every_magnitude_equals_torchvision(name: str) -> None:
    image, box = picture(427, 370), [14, 31, 300, 377]
    # a factor is kept to 1/32767, so a product that lies between two grey levels may be rounded to the other; all else is equal
    tolerance = 1 if name in ("Brightness", "Color", "Contrast", "Sharpness") else 0
    for magnitude in magnitudes_of(name)[::3]:
        operation = [(OPERATIONS.index(name), magnitude), (0, 0.0)]
        ours, theirs = drawn_by_us(image, box, operation), drawn_by_torchvision(image, box, operation)
        assert np.abs(ours.astype(int) - theirs).max() <= tolerance, magnitude


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_magnitude_that_was_published_is_exact(name: str) -> None:
    """DataCompDR drew every operation at bin 9 of 31, with either sign."""
    values, signed = SPACE[name]
    magnitude = float(values[9]) if values.ndim else 0.0
    image, box = picture(612, 800, seed=4), [100, 3, 500, 600]
    for value in (magnitude, -magnitude) if signed else (magnitude,):
        operations = [(OPERATIONS.index(name), value), (5, -9.0)]
        assert np.array_equal(drawn_by_us(image, box, operations), drawn_by_torchvision(image, box, operations))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.integers(1, 900), st.integers(1, 900), st.data())
def test_any_crop_of_any_picture_equals_torchvision(width: int, height: int, data: st.DataObject) -> None:
    tall, wide = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    box = [data.draw(st.integers(0, height - tall)), data.draw(st.integers(0, width - wide)), tall, wide]
    image = picture(width, height)
    assert np.array_equal(drawn_by_us(image, box, [], 64), drawn_by_torchvision(image, box, [], 64))


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([(427, 370), (224, 224), (97, 640)]))
def test_the_views_that_datacompdr_drew_are_replayed_to_the_pixel(seed: int, size: tuple[int, int]) -> None:
    rng, image = np.random.default_rng(seed), picture(*size)
    tall, wide = int(rng.integers(1, size[1] + 1)), int(rng.integers(1, size[0] + 1))
    box = [int(rng.integers(0, size[1] - tall + 1)), int(rng.integers(0, size[0] - wide + 1)), tall, wide]
    operations = []
    for index in rng.integers(0, 14, 2).tolist():
        values, signed = SPACE[OPERATIONS[index]]
        operations.append((index, (float(values[9]) if values.ndim else 0.0) * (-1 if signed and rng.random() < 0.5 else 1)))
    assert np.array_equal(drawn_by_us(image, box, operations), drawn_by_torchvision(image, box, operations)), operations


@pytest.mark.parametrize("size", [64, 96, 256])
def test_at_another_size_the_view_shows_the_same(size: int) -> None:
    image = picture(500, 400).resize((60, 48), Image.Resampling.BOX).resize((500, 400), Image.Resampling.BICUBIC)  # no detail near the pixel scale
    box = [20, 40, 300, 360]
    for operations in ([(1, 0.09), (3, 30.45)], [(2, -0.09), (5, 9.0)], [(4, -30.45), (6, 0.27)]):
        direct = Image.fromarray(drawn_by_us(image, box, operations, size)).resize((32, 32), Image.Resampling.BOX)
        reference = Image.fromarray(drawn_by_torchvision(image, box, operations)).resize((32, 32), Image.Resampling.BOX)
        assert np.abs(np.asarray(direct, np.float32) - np.asarray(reference, np.float32)).mean() < 5


def test_a_jpeg_is_replayed_within_a_grey_level_unless_it_is_decoded_at_reduced_scale() -> None:
    out = io.BytesIO()
    picture(1300, 1000).save(out, "JPEG", quality=95)
    image = Image.open(io.BytesIO(out.getvalue())).convert("RGB")
    for box, bound in (([10, 20, 300, 310], 0.2), ([0, 0, 1000, 1300], 12)):
        packed = pack_views(np.array([box]), [[(5, 9.0), (9, 0.27)]], (1000, 1300))[0]
        ours, theirs = view(out.getvalue(), packed, SIZE), drawn_by_torchvision(image, box, [(5, 9.0), (9, 0.27)])
        close = np.abs(ours.astype(int) - theirs).mean()
        assert 0 < close < bound


def test_a_shear_about_the_centre_would_not_do() -> None:
    """Negative control: our own replay of the same magnitudes is another picture."""
    image, box = picture(427, 370), [0, 0, 370, 427]
    packed = bytearray(pack_views(np.array([box]), [[(1, 0.09), (0, 0.0)]], (370, 427))[0].tobytes())
    packed[0] &= ~64
    ours, theirs = np.asarray(augment.apply(image, bytes(packed), SIZE)), drawn_by_torchvision(image, box, [(1, 0.09)])
    assert np.abs(ours.astype(int) - theirs).mean() > 20


@settings(max_examples=150, derandomize=True, deadline=None)
@given(parameters(), st.sampled_from([(1, 1), (1, 40), (61, 97), (200, 3)]), st.sampled_from([1, 7, 32]))
def test_every_storable_view_can_be_drawn_as_torchvision_does(value: Parameters, source: tuple[int, int], size: int) -> None:
    packed = augment.pack(dataclasses.replace(value, torchvision=True))
    assert augment.unpack(packed) == dataclasses.replace(value, torchvision=True)
    drawn = augment.apply(picture(*source), packed, size)
    assert (drawn.size, drawn.mode) == ((size, size), "RGB")


def test_solarize_keeps_a_fractional_threshold() -> None:
    assert pack_operation(OPERATIONS.index("Solarize"), 178.5) == (11, 179)
    assert pack_operation(OPERATIONS.index("Solarize"), 178.0) == (11, 178)
    assert pack_operation(OPERATIONS.index("TranslateX"), -30.45) == pack_operation(OPERATIONS.index("TranslateX"), -30.0)


@pytest.mark.parametrize(("index", "magnitude"), [(14, 0.0), (-1, 0.0), (5, 200.0), (1, float("nan")), (10, 0.0), (10, 9.0), (11, 257.0), (3, 400.0), (6, 1.5)])
def test_operations_that_cannot_have_been_drawn_are_refused(index: int, magnitude: float) -> None:
    with pytest.raises(DamagedSampleError, match=r"paug\.json"):
        pack_operation(index, magnitude)


def test_a_box_that_leaves_the_picture_does_not_fit() -> None:
    with pytest.raises(DoesNotFitError, match="101 x 50 px"):
        pack_views(np.array([[0, 1, 50, 100]]), [[]], (50, 100))
    with pytest.raises(DamagedSampleError, match="3 operations"):
        pack_views(np.array([[0, 0, 50, 100]]), [[(0, 0.0)] * 3], (50, 100))


def test_a_picture_that_was_scaled_evenly_takes_the_published_boxes() -> None:
    assert seen_size({}, (370, 427)) == (370, 427)
    assert seen_size({"original_height": 1201, "original_width": 1600}, (384, 512)) == (1201, 1600)
    assert seen_size({"original_height": 10, "original_width": "x"}, (384, 512)) == (384, 512)
    with pytest.raises(DoesNotFitError, match="no even scaling"):
        seen_size({"original_height": 1600, "original_width": 1600}, (384, 512))


def test_headers_are_read_without_pixels() -> None:
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    picture(40, 30).save(out, "JPEG", exif=exif)
    assert header_of(out.getvalue()) == ((30, 40), True)
    assert header_of(out.getvalue()[:-100]) == ((30, 40), True)
    for kind in ("PNG", "WEBP", "JPEG"):
        plain = io.BytesIO()
        picture(40, 30).save(plain, kind)
        assert header_of(plain.getvalue()) == ((30, 40), False)
