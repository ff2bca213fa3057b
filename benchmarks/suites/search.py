"""Search in a million vectors, and indexing beside the encoder alone: `python -m benchmarks.suites.search --run out/demo --out out/bench-search`.

The gallery is drawn from a mixture fitted to the demo's real embeddings (benchmarks/suites/search_data.py), goes into an index through the
public API, and is searched by a fresh process, whose resident memory is what counts. Truth is a full scan in float32.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.suites.search_data import draw, embed, fit_mixture
from runtime.encoder import Clip, load
from runtime.files import write_json
from runtime.index import Index
from runtime.pairs import open_pairs

COUNT, DIMS, K = 1_000_000, 512, 10
QUERIES, WARM = 1000, 200
_STEP = 100_000
_MODEL = {"name": "mixture", "checkpoint": "mixture", "embed_dim": DIMS, "space": None}


def measure(
    run: Path, work: Path, *, count: int = COUNT, queries: int = QUERIES, dtype: str = "binary", rescore: str | None = "int8", shaped: Path | None = None
) -> dict[str, float]:
    """All figures: those of a gallery of `count` vectors and those of indexing.

    Args:
        run: a finished demo folder.
        work: an empty or missing folder, about 2.5 GB for a million.
        shaped: a bundle of MobileCLIP-S0's shape, for `indexing_ratio`.

    Returns:
        `search_1m_p50_ms`, `search_1m_p90_ms`, `search_1m_recall10` (queries from the pictures' mixture), the same with `text_` (from the
        captions'), `search_1m_disk_ratio` (everything but rescoring vectors, the rows of paths included, over float32),
        `search_1m_rescoring_ratio`, `search_1m_memory_ratio` (VmRSS of the searching process over float32), `search_1m_build_minutes`,
        and those of `measure_indexing`.
    """
    return {**measure_search(run, work, count=count, queries=queries, dtype=dtype, rescore=rescore), **measure_indexing(run, work, shaped=shaped)}


def measure_search(run: Path, work: Path, *, count: int = COUNT, queries: int = QUERIES, dtype: str = "binary", rescore: str | None = "int8") -> dict[str, float]:
    """The figures of searching; see `measure`."""
    work.mkdir(parents=True, exist_ok=True)
    images, texts = embed(run)
    mixtures = {"image": fit_mixture(images), "text": fit_mixture(texts, seed=1)}
    generator = np.random.default_rng(0)
    gallery = np.lib.format.open_memmap(work / "gallery.npy", "w+", np.float32, (count, DIMS))
    for start in range(0, count, _STEP):
        gallery[start : start + _STEP] = draw(mixtures["image"], min(_STEP, count - start), generator)
    asked = {kind: draw(mixture, queries, generator) for kind, mixture in mixtures.items()}
    truth = {kind: nearest(gallery, vectors) for kind, vectors in asked.items()}
    for kind in asked:
        np.savez(work / f"{kind}.npz", queries=asked[kind], truth=truth[kind])
    place = work / "million.idx"
    shutil.rmtree(place, ignore_errors=True)
    started = time.monotonic()
    with Index.create(place, _MODEL, dtype=dtype, rescore=rescore) as index:
        for start in range(0, count, _STEP):
            stop = min(start + _STEP, count)
            index.add_vectors([path_of(row) for row in range(start, stop)], gallery[start:stop])
        index.settle()
    minutes = (time.monotonic() - started) / 60
    with Index.open(place, create=False) as index:
        facts = index.facts()
    del gallery
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.suites.search", "--searcher", str(work)], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    found = json.loads(done.stdout)
    whole = 4 * DIMS * count
    return {
        **found,
        "search_1m_disk_ratio": (facts["vector_bytes"] + facts["list_bytes"] + facts["database_bytes"]) / whole,
        "search_1m_rescoring_ratio": facts["rescoring_bytes"] / whole,
        "search_1m_memory_ratio": found["search_1m_memory_bytes"] / whole,
        "search_1m_build_minutes": minutes,
        "search_1m_count": float(count),
    }


def path_of(row: int) -> str:
    """A path as cameras make them."""
    return f"/home/somebody/Pictures/{2000 + row // 50_000}/{row // 1000:04d}/IMG_{row:07d}.jpg"


def nearest(gallery: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Rows of the K highest inner products, exact, int64 (Q, K)."""
    best, rows = np.full((len(queries), K), -np.inf, np.float32), np.zeros((len(queries), K), np.int64)
    for start in range(0, len(gallery), 50_000):
        scores = queries @ gallery[start : start + 50_000].T
        top = np.argpartition(-scores, K, axis=1)[:, :K]
        scores = np.concatenate([best, np.take_along_axis(scores, top, axis=1)], axis=1)
        every = np.concatenate([rows, top + start], axis=1)
        order = np.argsort(-scores, axis=1)[:, :K]
        best, rows = np.take_along_axis(scores, order, axis=1), np.take_along_axis(every, order, axis=1)
    return rows


def searcher(work: Path) -> dict[str, float]:
    """What the searching process measures of itself: it has only the index open."""
    figures: dict[str, float] = {}
    with Index.open(work / "million.idx", create=False) as index:
        for kind, prefix in (("image", "search_1m_"), ("text", "search_1m_text_")):
            data = np.load(work / f"{kind}.npz")
            queries, truth = data["queries"], data["truth"]
            for query in queries[:WARM]:
                index.search_vector(query, k=K)
            times, recalls = [], []
            for query, right in zip(queries, truth, strict=True):
                started = time.perf_counter()
                hits = index.search_vector(query, k=K)
                times.append(1e3 * (time.perf_counter() - started))
                recalls.append(len({int(hit.path[-11:-4]) for hit in hits} & set(right.tolist())) / K)
            figures[f"{prefix}p50_ms"], figures[f"{prefix}p90_ms"] = (float(np.percentile(times, p)) for p in (50, 90))
            figures[f"{prefix}recall10"] = float(np.mean(recalls))
            figures[f"{prefix}memory_bytes"] = float(resident())
    return figures


def resident() -> int:
    """VmRSS of this process, bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("the system does not tell VmRSS")


def measure_indexing(run: Path, work: Path, pictures: int = 1914, rounds: int = 3, shaped: Path | None = None) -> dict[str, float]:
    """Indexing beside the encoder alone, in turns, medians of `rounds`.

    `indexing_ratio`: images/s of `Index.add` over images/s of the image tower alone in fp32, which gets pixels ready made, for a bundle of MobileCLIP-S0's shape
    (`shaped`; its weights are random, and time does not ask for them). `_lite0`, `_pocket`: the same with the sample teacher's EfficientNet-lite0 at 224 pixels and
    with the pocket student, which takes less time than decoding a picture does. `indexing_ratio_files…`: over `Clip.encode_image` of the files.
    """
    folder = work / "pictures"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pairs = open_pairs(run / "pairs" / "test")
    paths = [folder / f"{row:05d}.jpg" for row in range(min(pictures, len(pairs)))]
    for row, path in enumerate(paths):
        path.write_bytes(pairs.image_bytes(row))
    figures = {}
    cases = [(run / "teacher-bundle", "_lite0"), (run / "bundle", "_pocket"), *([(shaped, "")] if shaped else [])]
    for bundle, suffix in cases:
        clip = load(bundle, prefer="fp32")
        some = paths if suffix else paths[:512]
        if len(some) < len(paths):  # the larger tower takes its time
            for path in paths[len(some) :]:
                path.unlink()
        rates = np.median([_rates(clip, folder, some, work) for _ in range(rounds)], axis=0)
        figures[f"indexing_images_per_s{suffix}"] = float(rates[0])
        figures[f"indexing_ratio{suffix}"] = float(rates[0] / rates[1])
        figures[f"indexing_ratio_files{suffix}"] = float(rates[0] / rates[2])
    return figures


def _rates(clip: Clip, folder: Path, paths: list[Path], work: Path) -> list[float]:
    """Images/s: indexing, the tower alone, files through `encode_image`."""
    from runtime.preprocess import preprocess

    batches = [paths[start : start + 32] for start in range(0, len(paths), 32)]
    pixels = [preprocess(batch, clip.preprocess_config) for batch in batches[:8]]
    clip.encode_pixels(pixels[0])
    shutil.rmtree(work / "pictures.idx", ignore_errors=True)
    with Index.open(work / "pictures.idx", clip) as index:
        report = index.add(folder)
    started = time.perf_counter()
    for number in range(len(batches)):
        clip.encode_pixels(pixels[number % len(pixels)])
    tower = time.perf_counter() - started
    started = time.perf_counter()
    clip.encode_image(paths)
    files = time.perf_counter() - started
    return [len(paths) / report.seconds, 32 * len(batches) / tower, len(paths) / files]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("out/demo"), help="a finished demo")
    parser.add_argument("--out", type=Path, default=Path("out/bench-search"))
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--searcher", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.searcher:
        sys.stdout.write(json.dumps(searcher(args.searcher)) + "\n")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out) as work:
        figures = measure(args.run, Path(work), count=args.count)
    write_json(args.out / "summary.json", figures)
    for name, value in figures.items():
        sys.stdout.write(f"{name:<34}{value:.4f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
