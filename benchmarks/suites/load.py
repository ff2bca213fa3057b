"""Does it stay as it began? Memory, open files and speed over a long job, for four jobs. `make load`.

    python -m benchmarks.suites.load --run out/demo --out out/load
    python -m benchmarks.suites.load --only calls --calls 5000

reinforce   200,000 pairs of 32 x 32 pixels, two views each, by a teacher of declared, constant cost (`constant_teacher`)
vectors     1,000,000 vectors of 512 dimensions into a photo index, settled, then searched
calls       100,000 calls of the SDK in one process, pictures and texts in turns, no text twice
folder      100,000 files (20,000 pictures, each five times) indexed while every hundredth vanishes or is cut

Every job is looked at in ten parts: resident memory of the process and its children, open files, things done a second. A job is flat when memory in
its last fifth is within 10 % + 20 MB of that in its second fifth, files within 3, and the last fifth is at most 20 % slower than the second.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tyro
from PIL import Image

import runtime
from benchmarks.suites.demo import Layout
from distill.progress import progress
from distill.store import TeacherFacts, open_store
from distill.store_codecs import unit
from runtime.files import write_json
from runtime.index import Index
from runtime.index_adding import Report
from runtime.pairs import write_shard

PARTS = 10
MODEL = {"name": "load", "checkpoint": "0" * 64, "embed_dim": 512}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadConfig:
    """How much of each."""

    run: Path = Path("out/demo")
    """A demo run: its bundle serves calls and folder."""
    out: Path = Path("out/load")
    """Folder for what is written (about 6 GB while it runs) and summary.json."""
    only: tuple[str, ...] = ("reinforce", "vectors", "calls", "folder")
    pairs: int = 200_000
    vectors: int = 1_000_000
    calls: int = 100_000
    files: int = 100_000
    workers: int = 2


class ConstantTeacher:
    """One thumbnail of 8 x 8 and one product of 192 x 64 a view, one histogram of bytes and one product of 256 x 64 a text, whatever they show."""

    image_size = 32

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.facts = TeacherFacts(name="constant", dim=64, logit_scale=10.0, licence="MIT", sha256="seed 0")
        self._image, self._text = rng.standard_normal((192, 64)).astype(np.float32), rng.standard_normal((256, 64)).astype(np.float32)

    def encode_image(self, images: Sequence[Any]) -> np.ndarray:
        """RGB views -> unit float32 (n, 64)."""
        small = [np.asarray(image, np.float32).reshape(8, 4, 8, 4, 3).mean((1, 3)).reshape(-1) for image in images]
        return unit((np.stack(small) / 255 - 0.5) @ self._image)

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> unit float32 (n, 64)."""
        return unit(np.stack([np.bincount(np.frombuffer(text.encode() or b" ", np.uint8), minlength=256) @ self._text for text in texts]).astype(np.float32))


def constant_teacher() -> ConstantTeacher:
    """What `--teachers benchmarks.suites.load:constant_teacher` names."""
    return ConstantTeacher()


class Watch:
    """Memory and open files of a process and its children, about five times a second, beside how much is done by then."""

    def __init__(self, done: Callable[[], int], process: int | None = None) -> None:
        self._done, self._process = done, psutil.Process(process)
        self.rows: list[tuple[float, int, int, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._stop.wait(0.2):
            try:
                family = [self._process, *self._process.children(recursive=True)]
                memory = sum(_own(one) for one in family)
                files = sum(one.num_fds() for one in family)
            except psutil.Error:
                continue
            self.rows.append((time.monotonic(), self._done(), memory, files))

    def __enter__(self) -> Watch:
        self._edges = [(time.monotonic(), 0)]
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._edges.append((time.monotonic(), self._done()))

    def summary(self, total: int) -> dict[str, Any]:
        """Tenths of the work: its speed, and medians of memory and files while it was done; whether they are flat."""
        at = np.array([self._edges[0], *(row[:2] for row in self.rows), self._edges[1]], np.float64)
        tenths = []
        for n in range(PARTS):
            low, high = total * n / PARTS, total * (n + 1) / PARTS
            nearest = sorted(self.rows, key=lambda row: abs(row[1] - (low + high) / 2))[:1]
            rows = [row for row in self.rows if low <= row[1] <= high] or nearest
            started, ended = (float(np.interp(edge, *_rising(at))) for edge in (low, high))
            memory, files = (int(np.median([row[place] for row in rows])) if rows else 0 for place in (2, 3))
            tenths.append({"per_second": round(total / PARTS / max(ended - started, 1e-9), 1), "megabytes": round(memory / 1e6, 1), "files": files})
        # the first tenth warms up: pools start, caches fill
        early, late = tenths[2:4], tenths[-2:]
        speed = sum(row["per_second"] for row in late) / sum(row["per_second"] for row in early)
        grown = max(row["megabytes"] for row in late) - max(row["megabytes"] for row in early)
        more = max(row["files"] for row in late) - max(row["files"] for row in early)
        flat = {"memory": grown <= 20 + 0.1 * max(row["megabytes"] for row in early), "files": more <= 3, "speed": speed >= 0.8}
        return {"tenths": tenths, "megabytes_more": round(grown, 1), "files_more": more, "speed_late_over_early": round(speed, 3), "flat": flat}


def _own(process: psutil.Process) -> int:
    """Resident bytes of a process but those of mapped files, which the system takes back when it likes."""
    found = process.memory_info()
    return int(found.rss - found.shared)


def _rising(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(things done, seconds), each count once, at the moment when it was first seen."""
    counts, first = np.unique(at[:, 1], return_index=True)
    return counts, at[first, 0]


def tiny_png(number: int) -> bytes:
    """A 32 x 32 picture of its own for every number below 2^24."""
    out = io.BytesIO()
    image = Image.new("RGB", (32, 32), (number & 255, number >> 8 & 255, number >> 16 & 255))
    image.putpixel((number % 32, number // 32 % 32), (255 - (number & 255), 128, 0))
    image.save(out, "PNG", compress_level=1)
    return out.getvalue()


def reinforce(config: LoadConfig, work: Path) -> dict[str, Any]:
    """`mclip reinforce` as a process of its own; what it has published tells how far it is."""
    pairs, store, shard = work / "pairs", work / "store", 10_000
    pairs.mkdir(parents=True)
    for start in range(0, config.pairs, shard):
        samples = ((f"{n:08d}", {"png": tiny_png(n), "txt": f"picture number {n}".encode()}) for n in range(start, min(start + shard, config.pairs)))
        write_shard(pairs / f"{start // shard:05d}.tar", samples)
    rows = 2048
    command = [sys.executable, "-m", "mobileclip.cli", "reinforce", str(pairs), str(store), "--teachers", "benchmarks.suites.load:constant_teacher"]
    command += ["--augmentations", "2", "--part-rows", str(rows), "--workers", str(config.workers)]

    def done() -> int:
        return sum(rows for path in store.glob("*.safetensors")) if store.is_dir() else 0

    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    with Watch(done, process.pid) as watch:
        _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(f"reinforce ended with {process.returncode}: {said.decode(errors='replace')[-400:]}")
    seconds, found = time.monotonic() - started, len(open_store(store))
    size = sum(path.stat().st_size for path in store.iterdir())
    figures = {"pairs": config.pairs, "stored": found, "seconds": round(seconds, 1), "pairs_per_second": round(found / seconds, 1), "bytes_a_pair": round(size / found, 1)}
    return {**figures, **watch.summary(found)}


def vectors(config: LoadConfig, work: Path) -> dict[str, Any]:
    """Vectors around 4,000 centres, ten thousand at a time; then a thousand searches, first and last hundred compared."""
    rng = np.random.default_rng(0)
    centres, count = rng.standard_normal((4000, 512), dtype=np.float32), 0
    started = time.monotonic()
    with Index.create(work / "v.idx", MODEL) as index, progress("vectors", config.vectors) as advance:
        with Watch(lambda: count) as watch:
            for start in range(0, config.vectors, 10_000):
                n = min(10_000, config.vectors - start)
                found = unit(centres[rng.integers(0, 4000, n)] + 0.7 * rng.standard_normal((n, 512), dtype=np.float32))
                index.add_vectors([f"/v/{start + k:07d}.jpg" for k in range(n)], found)
                count += n
                advance(count, "")
        added = time.monotonic() - started
        index.settle()
        settled = time.monotonic() - started - added
        memory, times = psutil.Process(), []
        before = _own(memory)
        for _ in range(1000):
            query = unit(centres[rng.integers(0, 4000, 1)] + 0.7 * rng.standard_normal((1, 512), dtype=np.float32))[0]
            began = time.perf_counter()
            index.search_vector(query, k=10)
            times.append(time.perf_counter() - began)
        spans = {"p50_ms": slice(None), "first_100_ms": slice(100), "last_100_ms": slice(-100, None)}
        searched = {name: round(1000 * float(np.median(times[span])), 2) for name, span in spans.items()}
        searched["megabytes_more"] = round((_own(memory) - before) / 1e6, 1)
    size = sum(path.stat().st_size for path in (work / "v.idx").rglob("*") if path.is_file())
    figures = {"vectors": config.vectors, "seconds_adding": round(added, 1), "seconds_settling": round(settled, 1), "bytes": size, "searches": searched}
    return {**figures, **watch.summary(config.vectors)}


def calls(config: LoadConfig, work: Path) -> dict[str, Any]:
    """One process, one bundle: a new text, then a new picture, and so on."""
    clip, count = runtime.load(Layout(config.run).bundle, threads=1), 0
    rng = np.random.default_rng(0)
    clip.encode_image(rng.integers(0, 255, (96, 128, 3), dtype=np.uint8))
    clip.encode_text(["warm"])
    started = time.monotonic()
    with progress("calls", config.calls) as advance, Watch(lambda: count) as watch:
        for n in range(config.calls):
            if n % 2:
                found = clip.encode_image(np.full((96, 128, 3), n % 251, np.uint8))
            else:
                found = clip.encode_text([f"a photograph of number {n}"])
            if found.shape != (1, clip.embed_dim):
                raise RuntimeError(f"call {n} gave {found.shape}")
            count += 1
            if not count % 100:
                advance(count, "")
    seconds = time.monotonic() - started
    return {"calls": config.calls, "seconds": round(seconds, 1), "calls_per_second": round(config.calls / seconds, 1), **watch.summary(config.calls)}


def folder(config: LoadConfig, work: Path) -> dict[str, Any]:
    """Files of which some vanish, and some are cut, while they are indexed; then once more, when nothing changes any longer."""
    photos, kinds = work / "photos", max(1, config.files // 5)
    for n in range(config.files):
        place = photos / f"{n // 1000:03d}"
        if n % 1000 == 0:
            place.mkdir(parents=True)
        (place / f"{n:06d}.png").write_bytes(tiny_png(n % kinds))
    clip, count, finished = runtime.load(Layout(config.run).bundle, threads=1), 0, threading.Event()

    def vandal() -> None:
        for n in range(0, config.files, 100):
            if finished.wait(0.02):
                return
            path = photos / f"{n // 1000:03d}" / f"{n:06d}.png"
            path.unlink() if n % 200 else path.write_bytes(path.read_bytes()[:40])

    def told(done: int, total: int, rate: float) -> None:
        nonlocal count
        count = done

    with Index.open(work / "f.idx", clip) as index:
        thread = threading.Thread(target=vandal, daemon=True)
        started = time.monotonic()
        with Watch(lambda: count) as watch:
            thread.start()
            first = index.add(photos, progress=told)
        seconds = time.monotonic() - started
        finished.set()
        thread.join()
        total = count
        second = index.add(photos)
        there = {str(path) for path in photos.rglob("*.png") if path.stat().st_size > 40}
        found = len(index)
    if found != len(there):
        raise RuntimeError(f"{found} files are in the index, {len(there)} sound ones in the folder")
    return {
        "files": config.files, "seconds": round(seconds, 1), "files_per_second": round(config.files / seconds, 1), "sound_at_the_end": len(there), "in_the_index": found,
        "first": _counts(first), "second": _counts(second), **watch.summary(total),
    }  # fmt: skip


def _counts(report: Report) -> dict[str, Any]:
    return {"added": report.added, "known": report.known, "unchanged": report.unchanged, "deleted": report.deleted, "vanished": report.vanished, "failed": len(report.failed)}


JOBS: dict[str, Callable[[LoadConfig, Path], dict[str, Any]]] = {"reinforce": reinforce, "vectors": vectors, "calls": calls, "folder": folder}


def run_load(config: LoadConfig) -> dict[str, Any]:
    """All chosen jobs. Returns {job: figures, "flat": bool}."""
    summary: dict[str, Any] = {}
    for name in config.only:
        work = config.out / name
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        summary[name] = JOBS[name](config, work)
        shutil.rmtree(work)
        sys.stdout.write(f"{name}\n{'tenth':>6} {'a second':>10} {'MB':>8} {'files':>6}\n")
        for n, row in enumerate(summary[name]["tenths"], 1):
            sys.stdout.write(f"{n:6} {row['per_second']:10,.1f} {row['megabytes']:8.1f} {row['files']:6}\n")
        sys.stdout.flush()
    summary["flat"] = all(all(found["flat"].values()) for found in summary.values())
    write_json(config.out / "summary.json", summary)
    return summary


def main(argv: list[str]) -> int:
    """Command line of the suite."""
    config = tyro.cli(LoadConfig, args=argv, description=__doc__)
    summary = run_load(config)
    brief = {name: {key: value for key, value in found.items() if key != "tenths"} for name, found in summary.items() if isinstance(found, dict)}
    sys.stdout.write(json.dumps({**brief, "flat": summary["flat"]}) + "\n")
    return 0 if summary["flat"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
