"""Pairs and stores for curation tests: pictures of random blobs, planted duplicates, a store with chosen embeddings."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from distill.augment import AugmentSpec, sample_parameters
from distill.captions import captions_of
from distill.store import PartRows, hash_shards, unit, write_index, write_part
from runtime.pairs import open_pairs, write_shard


def blobs(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A picture (width, height) with content that no other seed has."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def write_pairs(folder: Path, samples: Mapping[str, tuple[bytes, str | bytes | None]], shards: int = 2) -> Path:
    """key -> (encoded picture, caption or None), dealt out over shards in the given order."""
    folder.mkdir(parents=True)
    items = list(samples.items())
    for n in range(shards):
        made = []
        for key, (picture, text) in items[n::shards]:
            members = {} if text is None else {"txt": text if isinstance(text, bytes) else text.encode()}
            made.append((key, {"png": picture, **members}))
        write_shard(folder / f"{n:05}.tar", made)
    return folder


def write_store(folder: Path, pairs_folder: Path, vectors: Mapping[str, np.ndarray], similarity: Mapping[str, float] | None, *, views: int = 2, spread: float = 0.0) -> Path:
    """Float32 store of one teacher: picture vectors as given (views scattered about them by `spread`), captions along the first axis."""
    pairs, rng = open_pairs(pairs_folder), np.random.default_rng(3)
    folder.mkdir(parents=True)
    dim, entries = len(next(iter(vectors.values()))), []
    for shard in pairs.shards:
        rows = [row for row in range(shard.start, shard.stop) if pairs.keys[row] in vectors]
        keys = [pairs.keys[row] for row in rows]
        centre = unit(np.stack([vectors[key] for key in keys]).astype(np.float32))
        captions = [captions_of(pairs.caption(row) if pairs.has_caption(row) else "none", ("drawing",)) for row in rows]
        texts = np.zeros((len(rows), 2, dim), np.float32)
        texts[:, 0, 0], texts[:, 1, 1 % dim] = 1, 1
        made = PartRows(
            keys=keys, pair_rows=rows, captions=captions,
            augmentations=np.stack([[np.frombuffer(sample_parameters(rng, AugmentSpec(), (48, 48)), np.uint8) for _ in range(views)] for _ in rows]),
            image_embeddings=[unit(centre[:, None] + spread * rng.standard_normal((len(rows), views, dim)).astype(np.float32))], text_embeddings=[texts],
            columns={} if similarity is None else {"similarity": np.array([similarity[key] for key in keys], np.float32)},
        )  # fmt: skip
        tables = {"sources": ["pairs", "drawing"], "languages": ["en"]}
        path = folder / f"{shard.name}.{0:04}.safetensors"
        entries.append({"kind": "rows", "shard": shard.name, "part": 0, "input_sha256": "", **write_part(path, made, dtype="float32", tables=tables, metadata={"part": "0"})})
    columns = {} if similarity is None else {"similarity": {"version": 1, "dtype": "float32", "about": "test"}}
    write_index(folder, {
        "rows": sum(entry["rows"] for entry in entries), "dtype": "float32", "seed": 0, "teachers": [{"name": "t", "dim": dim, "logit_scale": 20.0, "licence": "test"}],
        "parts": entries, "columns": columns, "sources": ["pairs", "drawing"], "languages": ["en"], "shards": hash_shards(pairs),
    })  # fmt: skip
    return folder


def orders(keys: Sequence[str]) -> list[list[str]]:
    """The same keys in three orders."""
    return [list(keys), list(reversed(keys)), [keys[n] for n in np.random.default_rng(1).permutation(len(keys))]]
