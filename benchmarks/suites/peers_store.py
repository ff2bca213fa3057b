"""Bytes a sample and microseconds a row: our store beside DataCompDR as it is published, the same vectors in one run.

    python -m benchmarks.suites.peers_store          prints the figures, and those of importing published shards

The published loader (apple/ml-mobileclip, training/open_clip_v2.patch, `preprocess_dr`) opens a sample's .npz or .pth.gz, takes one row of
image_emb and one of text_emb, and one view's parameters; all vectors are unpacked for that. Vectors are random directions (their
mantissas do not compress, as trained ones' do not), 2 x 768 values, float32; parameters are as DataCompDR draws them.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distill.captions import Caption
from distill.datacompdr import ImportConfig, import_datacompdr
from distill.datacompdr_views import pack_views
from distill.store import Store, open_store
from distill.store_codecs import unit
from distill.store_writing import PartRows, write_index, write_part
from runtime.pairs import write_shard

DIM, TEACHERS = 768, 2
SIZE = (480, 640)
OPERATIONS = ((0, 0.0), (1, 0.09), (2, -0.09), (3, 30.45), (4, -30.45), (5, 9.0), (6, 0.27), (7, -0.27), (8, 0.27), (9, 0.27), (10, 7.0), (11, 178.5), (12, 0.0), (13, 0.0))
CAPTION = "a photograph of two people on bicycles in front of an old house"


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """n samples: image (n, A, 1536) and text (n, C, 1536) float32, boxes (n, A, 4), operations n x A x 2 of (index, magnitude)."""

    image: np.ndarray
    text: np.ndarray
    boxes: np.ndarray
    operations: list[list[list[tuple[int, float]]]]

    def __len__(self) -> int:
        return len(self.image)

    def uid(self, n: int) -> str:
        return hashlib.md5(str(n).encode(), usedforsecurity=False).hexdigest()


def make_samples(count: int, views: int, captions: int, seed: int = 0) -> Samples:
    """Samples of `views` views and `captions` captions, the pair's own among them."""
    rng = np.random.default_rng(seed)

    def directions(*shape: int) -> np.ndarray:
        return np.concatenate([unit(rng.standard_normal((*shape, DIM), np.float32)) for _ in range(TEACHERS)], axis=-1)

    tall, wide = (rng.integers(side // 4, side + 1, (count, views)) for side in SIZE)
    boxes = np.stack([(rng.random((count, views)) * (SIZE[0] - tall + 1)).astype(int), (rng.random((count, views)) * (SIZE[1] - wide + 1)).astype(int), tall, wide], axis=-1)
    operations = [[[OPERATIONS[n] for n in rng.integers(0, len(OPERATIONS), 2)] for _ in range(views)] for _ in range(count)]
    return Samples(image=directions(count, views), text=directions(count, captions), boxes=boxes, operations=operations)


# ---------------------------------------------------------------- ours


def write_store(folder: Path, samples: Samples, dtype: str) -> Store:
    """A store of one part with these samples."""
    folder.mkdir(parents=True)
    count, views, captions = *samples.image.shape[:2], samples.text.shape[1]
    split = [slice(t * DIM, (t + 1) * DIM) for t in range(TEACHERS)]
    rows = PartRows(
        keys=[f"{n:09d}" for n in range(count)], pair_rows=list(range(count)), image_embeddings=[samples.image[..., part] for part in split],
        augmentations=np.stack([pack_views(boxes, drawn, SIZE) for boxes, drawn in zip(samples.boxes, samples.operations, strict=True)]),
        captions=[[Caption(text=CAPTION), *(Caption(text=CAPTION, type="synthetic", source="captioner") for _ in range(captions - 1))] for _ in range(count)],
        text_embeddings=[samples.text[..., part] for part in split], columns={"similarity": np.zeros(count, np.float32)},
    )  # fmt: skip
    tables = {"sources": ["pairs", "captioner"], "languages": ["en"]}
    entry = write_part(folder / "00000.0000.safetensors", rows, dtype=dtype, tables=tables, metadata={"format": "mclip-store", "shard": "00000", "part": "0"})
    write_index(folder, {
        "rows": count, "dtype": dtype, "teachers": [{"name": f"t{t}", "dim": DIM, "logit_scale": 100.0, "licence": "none"} for t in range(TEACHERS)],
        "layers": [{"number": 0, "kind": "rows", "views": [0, views], "teachers": list(range(TEACHERS))}], "augmentations": views, "parts": [entry], **tables,
        "columns": {"similarity": {"version": 1, "dtype": "float32", "about": "none"}}, "shards": {"00000": "0" * 64},
    })  # fmt: skip
    return open_store(folder)


def store_bytes(folder: Path) -> int:
    """Bytes of a store: its parts with everything in them, and its index."""
    return sum(path.stat().st_size for path in folder.iterdir() if not path.name.startswith("."))


# ---------------------------------------------------------------- published


def as_npz(samples: Samples, n: int) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, image_emb=samples.image[n], text_emb=samples.text[n])
    return out.getvalue()


def as_bf16_gzip(samples: Samples, n: int) -> bytes:
    import torch

    out = io.BytesIO()
    torch.save({"image_emb": torch.from_numpy(samples.image[n]).bfloat16(), "text_emb": torch.from_numpy(samples.text[n]).bfloat16()}, out)
    return gzip.compress(out.getvalue(), mtime=0)


def parameters_json(samples: Samples, n: int) -> bytes:
    """paug.json as on the hub: the list is a string."""
    views = [[box, [list(operation) for operation in drawn]] for box, drawn in zip(samples.boxes[n].tolist(), samples.operations[n], strict=True)]
    return json.dumps({"param_aug": json.dumps(views)}).encode()


def read_npz(vectors: bytes, parameters: bytes, aug: int) -> tuple[Any, ...]:
    """What `preprocess_dr` takes of a sample: one view's vector and parameters, one caption's vector."""
    with np.load(io.BytesIO(vectors)) as found:
        return found["image_emb"][aug], found["text_emb"][0], json.loads(json.loads(parameters)["param_aug"])[aug]


def read_npz_image_only(vectors: bytes, parameters: bytes, aug: int) -> tuple[Any, ...]:
    """`read_npz` without the caption: no more than our row holds."""
    with np.load(io.BytesIO(vectors)) as found:
        return found["image_emb"][aug], json.loads(json.loads(parameters)["param_aug"])[aug]


def read_bf16_gzip(vectors: bytes, parameters: bytes, aug: int) -> tuple[Any, ...]:
    import torch

    found = torch.load(io.BytesIO(gzip.decompress(vectors)), weights_only=True)
    return found["image_emb"][aug].float(), found["text_emb"][0].float(), json.loads(json.loads(parameters)["param_aug"])[aug]


# ---------------------------------------------------------------- figures


def format_figures(rows: int = 512, peers: int = 64, rounds: int = 25) -> dict[str, Any]:
    """Bytes a sample at 30 + 6 and 5 + 5, microseconds to read a row at 30 + 6, both sides interleaved.

    Args:
        rows: samples of the stores; peers: of the published files; rounds: of timing, see `interleaved`.
    """
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        stores: dict[str, Store] = {}
        for (views, captions), suffix in (((5, 5), "_5_5"), ((30, 6), "")):
            samples = make_samples(rows, views, captions)
            for dtype in ("int8", "int4"):
                stores[dtype + suffix] = write_store(Path(scratch) / f"{dtype}{suffix}", samples, dtype)
                figures[f"bytes_per_sample_{dtype}{suffix}"] = round(store_bytes(Path(scratch) / f"{dtype}{suffix}") / rows, 1)
            published = {name: [made(samples, n) for n in range(peers)] for name, made in (("npz", as_npz), ("bf16_gzip", as_bf16_gzip))}
            figures |= {f"bytes_per_sample_{name}{suffix}": round(sum(map(len, files)) / peers, 1) for name, files in published.items()}
        parameters = [parameters_json(samples, n) for n in range(peers)]
        rng = np.random.default_rng(1)

        def ours(read: Callable[[int, int], Any]) -> Iterator[Callable[[], Any]]:
            while True:
                row, aug = int(rng.integers(rows)), int(rng.integers(views))
                yield lambda row=row, aug=aug: read(row, aug)

        def theirs(read: Callable[[bytes, bytes, int], Any], files: list[bytes]) -> Iterator[Callable[[], Any]]:
            while True:
                n, aug = int(rng.integers(peers)), int(rng.integers(views))
                yield lambda n=n, aug=aug: read(files[n], parameters[n], aug)

        timed = interleaved({
            "row_read_microseconds": (ours(stores["int8"].read_view), 100),
            "row_read_dequantised_microseconds": (ours(stores["int8"].read_view_float), 100),
            "row_read_microseconds_int4": (ours(stores["int4"].read_view), 100),
            "row_read_dequantised_microseconds_int4": (ours(stores["int4"].read_view_float), 100),
            "row_read_microseconds_npz": (theirs(read_npz, published["npz"]), 4),
            "row_read_microseconds_npz_image_only": (theirs(read_npz_image_only, published["npz"]), 4),
            "row_read_microseconds_bf16_gzip": (theirs(read_bf16_gzip, published["bf16_gzip"]), 4),
        }, rounds)  # fmt: skip
    return figures | timed


def interleaved(readers: dict[str, tuple[Iterator[Callable[[], Any]], int]], rounds: int) -> dict[str, float]:
    """Median and 90th percentile of single calls, in microseconds. Each round runs every reader's so many calls; the first is discarded."""
    taken: dict[str, list[int]] = {name: [] for name in readers}
    for number in range(rounds + 1):
        for name, (calls, count) in readers.items():
            for _, call in zip(range(count), calls, strict=False):
                started = time.perf_counter_ns()
                call()
                stopped = time.perf_counter_ns()
                if number:
                    taken[name].append(stopped - started)
    out = {}
    for name, found in taken.items():
        out[name] = round(float(np.median(found)) / 1000, 2)
        out[f"{name}_p90"] = round(float(np.percentile(found, 90)) / 1000, 2)
    return out


def import_figures(count: int = 2000, kinds: tuple[str, ...] = ("npz", "bf16_gzip")) -> dict[str, Any]:
    """Processor milliseconds a sample and samples a second of `mclip import-datacompdr` in one process at 30 + 6, and bytes a sample before (whole tars) and after."""
    figures: dict[str, Any] = {}
    for kind in kinds:
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch)
            before = _write_published(root, make_samples(count, 30, 6), kind)
            started = time.process_time()
            index = import_datacompdr(ImportConfig(shards=str(root / "published"), pairs=str(root / "pairs"), store=str(root / "store"), workers=0))
            figures |= {
                f"import_cpu_milliseconds_{kind}": round(1000 * (time.process_time() - started) / count, 3),
                f"import_samples_per_second_{kind}": index["figures"]["samples_per_second"], f"import_bytes_before_{kind}": round(before / count, 1),
                f"import_bytes_after_{kind}": round(store_bytes(root / "store") / count, 1),
            }  # fmt: skip
    return figures


def _write_published(root: Path, samples: Samples, kind: str) -> int:
    """Published shards and pairs under `root`; bytes of the published tars."""
    picture = io.BytesIO()
    Image.effect_noise(SIZE[::-1], 50).convert("RGB").save(picture, "JPEG", quality=60)
    digest = hashlib.sha256(picture.getvalue()).hexdigest()
    extension, made = {"npz": ("npz", as_npz), "bf16_gzip": ("pth.gz", as_bf16_gzip)}[kind]
    for folder in ("published", "pairs"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for start in range(0, len(samples), 1000):
        chunk = range(start, min(start + 1000, len(samples)))
        write_shard(root / "published" / f"{start // 1000:08d}.tar", ((samples.uid(n), {
            "url.txt": b"https://example.org/picture.jpg", "syn.json": json.dumps({"syn_text": [CAPTION] * (samples.text.shape[1] - 1)}).encode(),
            "paug.json": parameters_json(samples, n), extension: made(samples, n), "json": json.dumps({"uid": samples.uid(n), "sha256": digest}).encode(),
        }) for n in chunk))  # fmt: skip
        facts = {"sha256": digest, "original_height": SIZE[0], "original_width": SIZE[1]}
        write_shard(root / "pairs" / f"{start // 1000:05d}.tar", ((f"{n:09d}", {
            "jpg": picture.getvalue(), "txt": CAPTION.encode(), "json": json.dumps({"uid": samples.uid(n), **facts}).encode(),
        }) for n in chunk))  # fmt: skip
    return sum(path.stat().st_size for path in (root / "published").iterdir())


def main() -> int:
    for name, value in (format_figures() | import_figures()).items():
        sys.stdout.write(f"{name:48} {value}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
