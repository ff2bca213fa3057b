"""Photograph-like pictures, reinforced as DataCompDR publishes it, and the published way of reading them.

One set of tar shards serves both sides: `KEY.jpg`, `KEY.txt`, `KEY.json` with `KEY.paug.json` (30 views' parameters), `KEY.syn.json` (5 captions)
and `KEY.npz` (30 + 6 vectors of 2 x 768, float32), as the publisher's join script leaves them. Our side reads pictures and captions from the
same shards and the rest from the store that `mclip import-datacompdr` makes of them, so both sides show the same views.

The published way follows apple/ml-mobileclip, training/open_clip_v2.patch (`preprocess_dr`, `get_wds_dataset`, with
--dataset-reinforcement-mix-synthetic, which shows one caption a sample as we do) and training/dr/transforms.py step by step, written anew on
webdataset and torchvision: pictures decoded to RGBA and converted, the whole npz decoded, the own and one synthetic caption tokenised.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from distill.augment import OPERATIONS
from distill.datacompdr import ImportConfig, import_datacompdr
from distill.store_writing import unit
from runtime.files import write_json
from runtime.pairs import write_shard

VIEWS, CAPTIONS, DIM = 30, 6, 1536
VIEW = 224
"""Size that the published translations count in."""
MIXED = 5 / 6
"""Share of the synthetic captions: all six alike, as on our side."""
PER_SHARD = 64
QUALITY = 85
"""Gives 71 kB a picture of 512 px; DataComp-12M has about 70 kB (0.9 TB in 12.8 M samples, MobileCLIP, section 4)."""
WORDS = ("a", "red", "small", "dog", "house", "near", "the", "lake", "with", "two", "old", "trees", "in", "winter", "light", "photo", "of", "street", "blue", "boat")


def photograph(rng: np.random.Generator, size: int = 512) -> Image.Image:
    """Slopes of light, noise with the 1/f spectrum of natural pictures, shapes with edges, a little grain; RGB (size, size)."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.rfftfreq(size), indexing="ij"))
    frequency[0, 0] = 1
    shape = (3, *frequency.shape)
    spectrum = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) / frequency ** rng.uniform(0.9, 1.3)
    texture = np.fft.irfft2(spectrum, (size, size))
    texture = 0.8 * texture[:1] + 0.3 * texture
    place = np.mgrid[0 : 1 : size * 1j, 0 : 1 : size * 1j]
    light = rng.uniform(70, 180, 3)[:, None, None] + np.tensordot(rng.uniform(-60, 60, (3, 2)), place, 1)
    image = Image.fromarray(np.clip(light + 32 * texture / texture.std(), 0, 255).astype(np.uint8).transpose(1, 2, 0).copy())
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(4, 9))):
        left, top, width, height = (float(v) for v in rng.uniform((0, 0, 0.04, 0.04), (1, 1, 0.35, 0.35)) * size)
        outline = (left, top, left + width, top + height)
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        if rng.random() < 0.5:
            pen.ellipse(outline, fill=colour)
        else:
            pen.rectangle(outline, fill=colour)
    for _ in range(6):
        pen.line([float(v) for v in rng.uniform(0, size, 4)], fill=tuple(int(v) for v in rng.integers(0, 256, 3)), width=int(rng.integers(1, 5)))
    grain = np.asarray(image.filter(ImageFilter.GaussianBlur(0.6)), np.float32) + rng.normal(0, 3, (size, size, 1))
    return Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8))


def make_data(folder: Path, samples: int = 256, pixels: int = 512, seed: int = 0) -> Path:
    """Write `folder`/published and import it to `folder`/store, unless the same is there already. Returns the folder."""
    settings = {"samples": samples, "pixels": pixels, "seed": seed, "version": 2}
    receipt = folder / "loader-data.json"
    if receipt.is_file() and json.loads(receipt.read_text(encoding="utf-8")) == settings:
        return folder
    shards = folder / "published"
    shards.mkdir(parents=True, exist_ok=True)
    for start in range(0, samples, PER_SHARD):
        write_shard(shards / f"{start // PER_SHARD:08}.tar", (_sample(np.random.default_rng([seed, n]), n, pixels) for n in range(start, min(start + PER_SHARD, samples))))
    import_datacompdr(ImportConfig(shards=str(shards), pairs=str(shards), store=str(folder / "store"), workers=1))
    write_json(receipt, settings)
    return folder


def _sample(rng: np.random.Generator, number: int, pixels: int) -> tuple[str, dict[str, bytes]]:
    picture, vectors, uid = io.BytesIO(), io.BytesIO(), hashlib.sha256(str(number).encode()).hexdigest()[:32]
    photograph(rng, pixels).save(picture, "JPEG", quality=QUALITY)
    # two teachers' vectors, each of unit norm, side by side
    halves = [np.concatenate([unit(rng.standard_normal((count, DIM // 2)).astype(np.float32)) for _ in range(2)], axis=1) for count in (VIEWS, CAPTIONS)]
    np.savez_compressed(vectors, image_emb=halves[0], text_emb=halves[1])
    views = [[_box(rng, pixels), [_operation(rng), _operation(rng)]] for _ in range(VIEWS)]
    texts = [" ".join(rng.choice(WORDS, int(rng.integers(6, 13)))) for _ in range(CAPTIONS)]
    facts = {"uid": uid, "sha256": hashlib.sha256(picture.getvalue()).hexdigest(), "original_width": pixels, "original_height": pixels}
    members = {
        "jpg": picture.getvalue(), "txt": texts[0].encode(), "json": json.dumps(facts).encode(), "npz": vectors.getvalue(),
        "syn.json": json.dumps({"syn_text": texts[1:]}).encode(), "paug.json": json.dumps({"param_aug": views}).encode(),
    }  # fmt: skip
    return uid, members


def _box(rng: np.random.Generator, pixels: int) -> list[int]:
    """torchvision's RandomResizedCrop with its default scale and ratio: top, left, height, width."""
    while True:
        area, aspect = pixels**2 * rng.uniform(0.08, 1.0), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if width <= pixels and height <= pixels:
            return [int(rng.integers(0, pixels - height + 1)), int(rng.integers(0, pixels - width + 1)), height, width]


def _operation(rng: np.random.Generator) -> list[float]:
    """torchvision's RandAugment with its defaults: magnitude 9 of 31 bins; index and magnitude."""
    index = int(rng.integers(len(OPERATIONS)))
    fixed = {"Posterize": 7.0, "Solarize": 178.5, "Identity": 0.0, "AutoContrast": 0.0, "Equalize": 0.0}
    signed = {"ShearX": 0.09, "ShearY": 0.09, "TranslateX": 30.45, "TranslateY": 30.45, "Rotate": 9.0}
    name = OPERATIONS[index]
    return [index, fixed[name] if name in fixed else signed.get(name, 0.27) * float(rng.choice([-1, 1]))]


def published_batches(
    folder: Path, size: int, batch: int, mean: tuple[float, float, float], std: tuple[float, float, float], *, seed: int = 0, workers: int = 0, shuffle: int = 128
) -> Iterator[tuple[Any, ...]]:
    """Endless (pixels (B, 3, S, S), tokens (B, 77), image vectors (B, 1536), text vectors (B, 1536)) tensors, as published.

    workers: processes of torch's DataLoader; 0: this one.
    """
    import open_clip
    import torch
    import webdataset as wds

    pipeline = wds.DataPipeline(
        wds.SimpleShardList([str(path) for path in sorted((folder / "published").glob("*.tar"))], seed=seed), wds.split_by_worker, wds.tarfile_to_samples(),
        wds.shuffle(shuffle, initial=shuffle // 2), wds.decode("pilrgba"), wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map(_Replay(size, mean, std, open_clip.get_tokenizer("ViT-B-16"), seed)), wds.to_tuple("image", "text", "image_emb", "text_emb"),
        wds.batched(batch, partial=False),
    ).repeat()  # fmt: skip
    return iter(pipeline if workers == 0 else torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=workers, persistent_workers=True))


class _Replay:
    """One decoded sample -> what a training step reads of it: one stored view, one caption, their two vectors."""

    def __init__(self, size: int, mean: tuple[float, float, float], std: tuple[float, float, float], tokenizer: Callable[[str], Any], seed: int) -> None:
        import torchvision.transforms as T

        self.size, self.tokenizer, self.rng = size, tokenizer, np.random.default_rng(seed)
        self.normalise = T.Compose([T.ToTensor(), T.Normalize(mean, std)])

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        import torch

        views = sample["paug.json"]["param_aug"]
        view = int(self.rng.integers(len(views)))
        synthetic = sample["syn.json"]["syn_text"]
        chosen = int(self.rng.integers(len(synthetic)))
        own_tokens, other_tokens = self.tokenizer(sample["text"])[0], self.tokenizer(synthetic[chosen])[0]
        vectors = sample["npz"]
        image_vectors, text_vectors = vectors["image_emb"], vectors["text_emb"]
        own_vector, other_vector = (torch.tensor(text_vectors[n]).type(torch.float32) for n in (0, 1 + chosen))
        mixed = self.rng.random() < MIXED
        return {
            "image": self.normalise(replay(sample["image"].convert("RGB"), views[view], self.size)), "text": other_tokens if mixed else own_tokens,
            "image_emb": torch.tensor(image_vectors[view]).type(torch.float32), "text_emb": other_vector if mixed else own_vector,
        }  # fmt: skip


def replay(image: Image.Image, parameters: list[Any], size: int) -> Image.Image:
    """One published view: torchvision's crop and operations on a PIL picture."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F
    from torchvision.transforms.autoaugment import _apply_op

    (top, left, height, width), operations = parameters
    image = F.resized_crop(image, top, left, height, width, [size, size], InterpolationMode.BICUBIC)
    for index, magnitude in operations:
        image = _apply_op(image, OPERATIONS[int(index)], magnitude, InterpolationMode.NEAREST, None)
    return image
