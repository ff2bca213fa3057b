"""Preprocessing against torchvision's and timm's transforms, and pictures of every awkward kind."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from runtime.errors import CheckpointError, ImageError
from runtime.preprocess import PreprocessConfig, load_image, preprocess, resize_and_crop, to_rgb

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [(64, 64), (65, 64), (64, 97), (33, 200), (201, 31), (1, 7), (7, 1), (640, 481), (1, 1), (63, 63)]


def picture(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A smooth gradient with noise: structure and fine detail."""
    generator = np.random.default_rng(seed + width * 1000 + height)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 / max(width - 1, 1), y * 255 / max(height - 1, 1), (x + y) * 3 % 256, (x * y) % 256], -1)
    noisy = base[..., :channels] + generator.normal(0, 20, (height, width, channels))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def reference(image: Image.Image, config: PreprocessConfig) -> np.ndarray:
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    pipeline = transforms.Compose(
        [
            transforms.Resize(int(config.image_size // config.crop_pct), InterpolationMode(config.interpolation), antialias=True),
            transforms.CenterCrop(config.image_size),
            transforms.ToTensor(),
            transforms.Normalize(config.mean, config.std),
        ]
    )
    return pipeline(image).numpy()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("normal", [((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), (CLIP_MEAN, CLIP_STD)], ids=["unit", "clip"])
def test_bit_equal_to_torchvision(size: tuple[int, int], interpolation: str, normal: tuple) -> None:
    config = PreprocessConfig(image_size=64, mean=normal[0], std=normal[1], interpolation=interpolation)
    image = Image.fromarray(picture(*size))
    np.testing.assert_array_equal(preprocess([image], config)[0], reference(image, config))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    width=st.integers(1, 150),
    height=st.integers(1, 150),
    size=st.integers(1, 70),
    crop_pct=st.sampled_from([1.0, 0.95, 0.9, 0.875, 0.5]),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
)
def test_bit_equal_to_torchvision_at_any_size(width: int, height: int, size: int, crop_pct: float, interpolation: str) -> None:
    config = PreprocessConfig(image_size=size, mean=CLIP_MEAN, std=CLIP_STD, interpolation=interpolation, crop_pct=crop_pct)
    image = Image.fromarray(picture(width, height))
    import math

    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    pipeline = transforms.Compose(
        [
            transforms.Resize(math.floor(size / crop_pct), InterpolationMode(interpolation)),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    np.testing.assert_array_equal(preprocess(image, config)[0], pipeline(image).numpy())


@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("size", [(300, 200), (90, 231)], ids=str)
def test_crop_share_equals_timm(size: tuple[int, int], crop_pct: float) -> None:
    from timm.data import create_transform

    config = PreprocessConfig(image_size=112, mean=CLIP_MEAN, std=CLIP_STD, interpolation="bicubic", crop_pct=crop_pct)
    image = Image.fromarray(picture(*size))
    transform = create_transform(112, is_training=False, interpolation="bicubic", mean=CLIP_MEAN, std=CLIP_STD, crop_pct=crop_pct)
    np.testing.assert_array_equal(preprocess(image, config)[0], transform(image).numpy())


def test_equal_to_open_clip_on_opaque_pictures() -> None:
    from open_clip import image_transform

    transform = image_transform(64, is_train=False, mean=CLIP_MEAN, std=CLIP_STD)
    config = PreprocessConfig(image_size=64, mean=CLIP_MEAN, std=CLIP_STD, interpolation="bicubic")
    for image in (Image.fromarray(picture(123, 77)), Image.fromarray(picture(123, 77)).convert("L")):
        np.testing.assert_array_equal(preprocess(image, config)[0], transform(image).numpy())


CONFIG = PreprocessConfig(image_size=32)


def test_transparency_is_composed_on_white(tmp_path: Path) -> None:
    pixels = picture(40, 40, 4)
    pixels[:20, :, 3] = 0
    pixels[20:, :, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    seen = np.asarray(load_image(tmp_path / "a.png"))
    assert (seen[:20] == 255).all()
    np.testing.assert_array_equal(seen[20:], pixels[20:, :, :3])
    half = np.full((4, 4, 4), (0, 0, 0, 128), np.uint8)
    assert abs(int(np.asarray(load_image(half))[0, 0, 0]) - 127) <= 1


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    image = Image.fromarray(picture(40, 30)).convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))
    index = image.getpixel((0, 0))
    image.save(tmp_path / "p.png", transparency=index)
    seen = load_image(tmp_path / "p.png")
    assert seen.mode == "RGB"
    assert seen.getpixel((0, 0)) == (255, 255, 255)
    np.testing.assert_array_equal(preprocess([tmp_path / "p.png"], CONFIG), preprocess([seen], CONFIG))


def test_grey_one_bit_and_cmyk() -> None:
    grey = Image.fromarray(picture(40, 30)).convert("L")
    out = preprocess(grey, CONFIG)[0]
    np.testing.assert_array_equal(out[0], out[1])
    assert set(np.unique(np.asarray(to_rgb(grey.convert("1"))))) <= {0, 255}
    cmyk = Image.fromarray(picture(40, 30)).convert("CMYK")
    np.testing.assert_array_equal(np.asarray(to_rgb(cmyk)), np.asarray(cmyk.convert("RGB")))


def test_sixteen_bit_grey_keeps_its_upper_byte(tmp_path: Path) -> None:
    values = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "wide.png")
    seen = np.asarray(load_image(tmp_path / "wide.png"))
    np.testing.assert_array_equal(seen[..., 0], (values >> 8).astype(np.uint8))


def test_files_are_turned_upright_and_pictures_taken_as_they_are(tmp_path: Path) -> None:
    pixels = picture(48, 32)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "turned.png")), np.rot90(pixels, -1))
    with Image.open(tmp_path / "turned.png") as opened:
        np.testing.assert_array_equal(np.asarray(load_image(opened)), pixels)


def test_files_decode_as_the_pairs_reader_decodes_them(tmp_path: Path) -> None:
    from runtime.pairs import decode_image

    image = Image.fromarray(picture(48, 32))
    exif = Image.Exif()
    exif[0x0112] = 8
    image.save(tmp_path / "a.jpg", exif=exif)
    image.convert("L").save(tmp_path / "b.png")
    image.convert("P").save(tmp_path / "c.png", transparency=3)
    Image.fromarray(picture(30, 30, 4)).save(tmp_path / "d.png")
    Image.fromarray(picture(30, 30, 4)).save(tmp_path / "e.webp", lossless=True)
    Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30) * 70).save(tmp_path / "f.png")
    Image.fromarray(picture(30, 30, 4)).convert("LA").save(tmp_path / "g.png")
    image.save(tmp_path / "h.png", transparency=tuple(int(v) for v in np.asarray(image)[0, 0]))
    for path in sorted(tmp_path.iterdir()):
        np.testing.assert_array_equal(np.asarray(load_image(path)), np.asarray(decode_image(path.read_bytes())), err_msg=path.name)
        np.testing.assert_array_equal(np.asarray(load_image(path.read_bytes())), np.asarray(load_image(path)), err_msg=path.name)


def test_paths_arrays_and_pictures_are_the_same(tmp_path: Path) -> None:
    pixels = picture(50, 41)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    batch = preprocess([tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels), pixels], CONFIG)
    assert batch.shape == (4, 3, 32, 32)
    assert batch.dtype == np.float32
    assert batch.flags.c_contiguous
    assert (batch == batch[0]).all()
    np.testing.assert_array_equal(preprocess(tmp_path / "a.png", CONFIG), batch[:1])
    np.testing.assert_array_equal(preprocess(np.stack([pixels, pixels]), CONFIG), batch[:2])
    assert preprocess([], CONFIG).shape == (0, 3, 32, 32)


def test_non_contiguous_array() -> None:
    pixels = picture(50, 41)
    np.testing.assert_array_equal(preprocess(pixels[:, ::-1], CONFIG), preprocess(np.ascontiguousarray(pixels[:, ::-1]), CONFIG))


def test_unusable_pictures(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such picture"):
        preprocess([tmp_path / "none.png"], CONFIG)
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ImageError, match=r"text\.png: does not decode"):
        preprocess([tmp_path / "text.png"], CONFIG)
    buffer = io.BytesIO()
    Image.fromarray(picture(200, 200)).save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[:2000])
    with pytest.raises(ImageError, match=r"cut\.jpg: does not decode"):
        preprocess([tmp_path / "cut.jpg"], CONFIG)
    with pytest.raises(ImageError, match="expected uint8"):
        preprocess([np.zeros((8, 8, 3), np.float32)], CONFIG)
    with pytest.raises(ImageError, match="expected uint8"):
        preprocess([np.zeros((8, 8, 2), np.uint8)], CONFIG)
    with pytest.raises(ImageError, match="crop it first"):
        preprocess([Image.new("RGB", (100_000, 1))], CONFIG)


def test_too_many_pixels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (200, 200)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    with pytest.raises(ImageError, match=r"large\.png: does not decode"):
        load_image(tmp_path / "large.png")


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 0},
        {"std": (1.0, 0.0, 1.0)},
        {"mean": (0.0, float("nan"), 0.0)},
        {"mean": (0.0, 0.0)},
        {"interpolation": "nearest"},
        {"crop_pct": 0.0},
        {"crop_pct": 1.5},
    ],
    ids=str,
)
def test_senseless_settings(change: dict) -> None:
    with pytest.raises(CheckpointError):
        PreprocessConfig(**{"image_size": 32, **change})


def wave(width: int, height: int) -> Image.Image:
    """A smooth picture: what a fraction of its size keeps."""
    y, x = np.mgrid[0:height, 0:width] / 97.0
    return Image.fromarray(np.stack([127 + 100 * np.sin(x), 127 + 100 * np.cos(y), 127 + 100 * np.sin(x + y)], axis=-1).astype(np.uint8))


def encoded(picture: Image.Image, form: str = "JPEG", **settings: object) -> bytes:
    data = io.BytesIO()
    picture.save(data, form, **settings)
    return data.getvalue()


@pytest.mark.parametrize(
    ("size", "expected"), [((3000, 2000), (750, 500)), ((2000, 3000), (500, 750)), ((880, 600), (880, 600)), ((1024, 1024), (512, 512)), ((890, 890), (890, 890))]
)
def test_a_large_jpeg_keeps_at_least_what_is_asked_for(size: tuple[int, int], expected: tuple[int, int]) -> None:
    data = encoded(wave(*size), quality=95)
    assert load_image(data, 448).size == expected
    assert load_image(data).size == size
    assert load_image(encoded(wave(*size), "PNG"), 448).size == size


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_decoding_at_a_fraction_changes_little(mode: str) -> None:
    config = PreprocessConfig(image_size=96, interpolation="bicubic")
    data = encoded(wave(1600, 1200).convert(mode), quality=95)
    whole, part = preprocess([data], config, oversampling=float("inf")), preprocess([data], config)
    assert load_image(data, 4 * 96).size == (800, 600)
    assert 0 < np.abs(whole - part).mean() < 0.01


def test_the_turn_of_a_photograph_survives_the_fraction() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(wave(1600, 800), exif=exif.tobytes())
    assert load_image(data).size == (800, 1600)
    assert load_image(data, 100).size == (100, 200)
    config = PreprocessConfig(image_size=50)
    assert np.abs(preprocess([data], config) - preprocess([data], config, oversampling=float("inf"))).mean() < 0.02


def test_threads_give_the_same_in_the_same_order() -> None:
    config = PreprocessConfig(image_size=32)
    pictures = [encoded(wave(40 + 3 * n, 64 + n), "PNG") for n in range(17)]
    alone = preprocess(pictures, config)
    for threads in (2, 5, 64, None):
        np.testing.assert_array_equal(preprocess(pictures, config, threads=threads), alone)
    with pytest.raises(ImageError, match="does not decode"):
        preprocess([*pictures, b"none", *pictures], config, threads=4)
    assert preprocess([], config, threads=4).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_the_part_that_is_kept_is_computed_alone_to_one_level(turned: bool, crop_pct: float) -> None:
    grain = np.random.default_rng(3).normal(0, 8, (750, 1000, 3))
    image = Image.fromarray(np.clip(np.asarray(wave(1000, 750)) + grain, 0, 255).astype(np.uint8))
    image = image.transpose(Image.Transpose.ROTATE_90) if turned else image
    config = PreprocessConfig(image_size=224, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bicubic", crop_pct=crop_pct)
    whole, part = (np.asarray(resize_and_crop(image, config, whole=kind)).astype(int) for kind in (True, False))
    assert whole.shape == part.shape == (224, 224, 3)
    assert np.abs(whole - part).max() <= 1
    assert (whole != part).mean() < 2e-3
