"""Shards as apple/DataCompDR publishes them, and the pictures that someone has downloaded for some of them, written by code.

The tars are made with tarfile, not with our own writer, and the vectors with numpy.savez, torch.save and gzip, as the published ones were.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from distill.store_writing import unit

DIMS = (8, 12)
TEACHERS = ("first:8:100:test", "second:12:70:test")
RANDAUGMENT = ((0, 0.0), (1, 0.09), (3, -30.45), (5, 9.0), (6, 0.26999998092651367), (10, 7.0), (11, 178.5), (13, 0.0))


@dataclass
class Sample:
    """One sample, both halves: what is published, and the picture as it was downloaded."""

    uid: str
    picture: bytes
    size: tuple[int, int]
    caption: str
    synthetic: list[str]
    boxes: list[list[int]]
    operations: list[list[list[float]]]
    image_emb: np.ndarray
    text_emb: np.ndarray
    sha256: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def make_samples(count: int, seed: int = 0, views: int = 4, synthetic: int = 5, dims: tuple[int, ...] = DIMS) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [_sample(rng, n, views, synthetic, dims) for n in range(count)]


def _sample(rng: np.random.Generator, number: int, views: int, synthetic: int, dims: tuple[int, ...]) -> Sample:
    height, width = (int(v) for v in rng.integers(60, 140, 2))
    picture = Image.new("RGB", (width, height), tuple(int(v) for v in rng.integers(0, 256, 3)))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((width // 5, height // 5, width // 2, height // 2), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=92)
    boxes = []
    for _ in range(views):
        tall, wide = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
        boxes.append([int(rng.integers(0, height - tall + 1)), int(rng.integers(0, width - wide + 1)), tall, wide])
    boxes[0] = [0, 0, height, width]
    operations = [[list(RANDAUGMENT[int(n)]) for n in rng.integers(0, len(RANDAUGMENT), 2)] for _ in range(views)]
    return Sample(
        uid=hashlib.md5(f"{number}".encode()).hexdigest(), picture=out.getvalue(), size=(height, width), caption=f"picture number {number}",
        synthetic=[f"a drawing of thing {number}, seen {n}" for n in range(synthetic)], boxes=boxes, operations=operations,
        image_emb=vectors(rng, views, dims), text_emb=vectors(rng, 1 + synthetic, dims), sha256=hashlib.sha256(out.getvalue()).hexdigest(),
    )  # fmt: skip


def vectors(rng: np.random.Generator, count: int, dims: tuple[int, ...]) -> np.ndarray:
    """(count, sum of dims) float32, each teacher's share of unit norm."""
    return np.concatenate([unit(rng.standard_normal((count, dim)).astype(np.float32)) for dim in dims], axis=1)


def npz(arrays: dict[str, np.ndarray]) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def pth_gz(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return gzip.compress(out.getvalue())


def published(sample: Sample, kind: str = "npz", parameters: str = "string", layout: str = "old") -> dict[str, bytes]:
    """Members of one sample. kind: npz or pth.gz; parameters: string (as on the hub) or list; layout: old (all texts in text_emb) or new."""
    given = [[box, [[int(op), magnitude] for op, magnitude in ops]] for box, ops in zip(sample.boxes, sample.operations, strict=True)]
    emb = {"image_emb": sample.image_emb, "text_emb": sample.text_emb}
    if layout == "new":
        emb |= {"text_emb": sample.text_emb[:1], "syn_text_emb": sample.text_emb[1:]}
    packed = npz(emb) if kind == "npz" else pth_gz({name: torch.tensor(value, dtype=torch.bfloat16) for name, value in emb.items()})
    return {
        "url.txt": b"https://example.org/picture.jpg", "syn.json": json.dumps({"syn_text": sample.synthetic}).encode(),
        "paug.json": json.dumps({"param_aug": json.dumps(given) if parameters == "string" else given}).encode(),
        kind: packed, "json": json.dumps({"uid": sample.uid, "sha256": sample.sha256, **sample.extra}).encode(),
    }  # fmt: skip


def write_tar(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write_published(folder: Path, samples: list[Sample], per_shard: int = 5, **how: str) -> Path:
    """Shards in the published order, named as on the hub."""
    for shard, start in enumerate(range(0, len(samples), per_shard)):
        write_tar(folder / f"{shard:08d}.tar", [(sample.uid, published(sample, **how)) for sample in samples[start : start + per_shard]])
    return folder


def downloaded(number: int, sample: Sample, **facts: Any) -> tuple[str, dict[str, bytes]]:
    """One sample as img2dataset writes it: the key counts, KEY.json names the uid, the hash and the size of the file that was fetched."""
    height, width = sample.size
    told = {
        "uid": sample.uid, "sha256": hashlib.sha256(sample.picture).hexdigest(), "key": f"{number:09d}", "status": "success", "original_width": width,
        "original_height": height, "caption": sample.caption, "width": width, "height": height, **facts,
    }  # fmt: skip
    return f"{number:09d}", {"jpg": sample.picture, "txt": sample.caption.encode(), "json": json.dumps(told).encode()}


def write_downloaded(folder: Path, samples: list[Sample], per_shard: int = 7) -> Path:
    for shard, start in enumerate(range(0, len(samples), per_shard)):
        write_tar(folder / f"{shard:05d}.tar", [downloaded(shard * 10000 + n, sample) for n, sample in enumerate(samples[start : start + per_shard])])
    return folder
