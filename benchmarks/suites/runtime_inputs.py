"""What the SDK is timed on: photographs drawn by rule, and bundles of random weights in the shape of real towers."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from distill.sample_emoji import MARGINS, SPLITS, background_of, read_sources
from distill.sample_render import Job, draw, svg_of
from export.any_length import freed
from export.int8_recipe import Int8Recipe, make_int8
from export.to_onnx import OnnxEncoder, export_onnx, serialize
from export.to_openvino import import_openvino, nothing_said, save
from export.towers import TOWERS, Tower, encoder_of
from mobileclip.checkpoint import build_tokenizer, preprocess_config
from mobileclip.config import ModelConfig
from mobileclip.folding import reparameterize
from mobileclip.model import ImageTextModel
from runtime.manifest import Artefact, ImageSpec, Manifest, TextSpec, write_manifest
from runtime.preprocess import preprocess
from runtime.selfcheck import write_golden
from runtime.tokenizer import Tokenizer

TEXTS = ("a photo of a dog", "two red hearts", "the sea at night, from above", "a drawing of an old house with a blue door and a tree before it")
SIZE = (4000, 3000)


def photo(seed: int, size: tuple[int, int] = SIZE, detail: float = 1.0) -> Image.Image:
    """A picture with the spectrum of photographs (amplitude falls as one over frequency), some edges and sensor noise.

    Args:
        detail: of noise and fine structure; 0 gives a smooth picture.
    """
    rng = np.random.default_rng(seed)
    width, height = size
    canvas = np.zeros((height, width, 3), np.float32)
    cells = 4
    while cells < width // 2:
        layer = rng.normal(0, 1, (max(2, cells * height // width), cells, 3)).astype(np.float32)
        weight = (64.0 / cells) ** 0.5 * (detail if cells > 64 else 1.0)
        planes = [np.asarray(Image.fromarray(layer[..., n]).resize(size, Image.Resampling.BICUBIC)) for n in range(3)]
        canvas += weight * np.stack(planes, axis=-1)
        cells *= 4
    for _ in range(40):
        x, y, w, h = rng.integers(0, width), rng.integers(0, height), rng.integers(40, width // 3), rng.integers(40, height // 3)
        canvas[y : y + h, x : x + w] += rng.normal(0, 3, 3).astype(np.float32)
    canvas += detail * rng.normal(0, 1.0, canvas.shape).astype(np.float32)
    canvas = (canvas - canvas.mean()) / canvas.std()
    return Image.fromarray(np.clip(118 + 48 * canvas, 0, 255).astype(np.uint8))


def jpeg(picture: Image.Image, quality: int) -> bytes:
    """With 4:2:0 subsampling, as phones write it."""
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=quality, subsampling=2)
    return data.getvalue()


def large_drawings(count: int) -> list[bytes]:
    """Drawings of the sample's test style as JPEGs of 12 megapixels, on plain ground, spread over its concepts."""
    sources = read_sources()
    style, width, height = SPLITS["test"][0], *SIZE
    drawings = sources.drawings[style]
    names = list(drawings.names.items())
    files = []
    for n in range(count):
        key, name = names[n * len(names) // count]
        ground = background_of(key)
        square = draw(Job(key=key, svg=svg_of(drawings.icons, name, MARGINS[style]), background=ground, size=height))
        canvas = Image.new("RGB", SIZE, ground)
        canvas.paste(Image.open(io.BytesIO(square)), ((width - height) // 2, 0))
        files.append(jpeg(canvas, 90))
    return files


def settled(config: ModelConfig, pixels: torch.Tensor, seed: int = 0) -> ImageTextModel:
    """Random weights whose batch norms have seen `pixels`: fresh statistics would make all embeddings equal."""
    torch.manual_seed(seed)
    model = ImageTextModel(config)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # type: ignore[assignment]
    model.train()
    with torch.no_grad():
        model.image(pixels)
    return model.eval()


def _views(config: ModelConfig, count: int) -> np.ndarray:
    return preprocess([photo(seed, (320, 256), 0.5) for seed in range(count)], preprocess_config(config))


def random_bundle(config: ModelConfig, folder: Path) -> Path:
    """A bundle of random weights: fp32 and int8 of both towers for ONNX Runtime, and int8 of the image tower for OpenVINO.

    It is for times, sizes and starts. Every int8 artefact carries the least cosine that it reaches as its own threshold: weights that were never trained have nothing
    that rounding could spoil or keep. OpenVINO's int8 keeps bfloat16 between the int8 layers where the processor has it.
    """
    model = reparameterize(settled(config, torch.from_numpy(_views(config, 24))))[0]
    pixels, texts = _views(config, 12), [f"{text}, number {n}" for n in range(3) for text in TEXTS]
    folder.mkdir(parents=True)
    build_tokenizer(config.text.vocab_size, folder / "tokenizer.json")
    tokenizer = Tokenizer.open(folder / "tokenizer.json", config.text.context_length, config.text.cleaning, config.text.pad_id)
    tokens = tokenizer(texts)
    inputs: dict[Tower, np.ndarray] = {"image": pixels, "text": tokens}
    artefacts, embedded = [], {}
    for tower in TOWERS:
        rows = inputs[tower]
        graph = export_onnx(encoder_of(model, tower), rows)
        recipe = Int8Recipe(form="static", ranges="minmax") if tower == "image" else Int8Recipe(form="dynamic", alpha=0.5)
        made = {"fp32": graph, "int8": make_int8(graph, rows, recipe)}
        embedded[tower] = OnnxEncoder(serialize(graph))(rows)
        for precision, one in made.items():
            shorter = freed(one, rows, config.text.pad_id, exact=precision == "fp32") if tower == "text" and config.text.mask != "none" else None
            path = folder / "onnx" / f"{tower}.{precision}.onnx"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(serialize(shorter or one))
            artefacts.append(_artefact(tower, "onnx", precision, path, folder, OnnxEncoder(path)(rows), embedded[tower], any_length=shorter is not None))
        if tower == "image":
            with nothing_said():
                converted = import_openvino("timing").convert_model(io.BytesIO(serialize(made["int8"])))
            path = save(converted, folder / "openvino" / f"{tower}.int8")
            artefacts.append(dataclasses.replace(artefacts[-1], id=f"{tower}-openvino-int8", target="openvino", path=path.relative_to(folder).as_posix(), threshold=0.0))
    golden = write_golden(
        folder, images=[photo(seed, (320, 256), 0.5) for seed in range(12)], texts=texts, pixels=pixels, tokens=tokens,
        image_embedding=embedded["image"], text_embedding=embedded["text"],
    )  # fmt: skip
    form = preprocess_config(config)
    image = ImageSpec(image_size=form.image_size, mean=form.mean, std=form.std, interpolation=form.interpolation, crop_pct=form.crop_pct)
    text = TextSpec(
        context_length=config.text.context_length, vocab_size=config.text.vocab_size, pad_id=config.text.pad_id, mask=config.text.mask, cleaning=config.text.cleaning
    )
    name = f"{config.name}, random weights"
    write_manifest(folder, Manifest(name=name, embed_dim=config.embed_dim, image=image, text=text, logit_scale=100.0, artefacts=tuple(artefacts), golden=golden))
    return folder


def _artefact(tower: Tower, target: str, precision: str, path: Path, folder: Path, found: np.ndarray, exact: np.ndarray, *, any_length: bool) -> Artefact:
    cosine = float((found * exact).sum(axis=1).min())
    return Artefact(
        id=f"{tower}-{target}-{precision}", tower=tower, target=target, precision=precision, path=path.relative_to(folder).as_posix(), any_length=any_length,
        parity={"cosine_min": cosine, "n": len(exact)}, threshold=min(0.99999, cosine) - 1e-3,
    )  # fmt: skip


