"""Drawing icons: an SVG body to a JPEG on a plain background, in a pool of worker processes."""

from __future__ import annotations

import hashlib
import io
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from PIL import Image

from runtime.errors import MissingExtraError, SampleError

JPEG_QUALITY = 92
WORKERS = 2
_CHUNK = 32

# Light and mid tones: the drawings have black outlines and white parts, and both must show.
BACKGROUNDS = (
    "#ffffff", "#f5f5f5", "#e6e6e6", "#cfcfcf", "#b8c0c8", "#fdf1dc", "#f8e0c0", "#f4cfcf", "#f9dbe8", "#e8d5f2",
    "#d5d8f5", "#cfe3f8", "#bfe6ee", "#c9efdf", "#d4efc8", "#e9f2bd", "#fdf3ae", "#ffd9a8", "#e9c9b1", "#a9c7e8",
    "#a5d6b0", "#d9a9c4", "#c9bfa5", "#9fb3a8",
)  # fmt: skip

# What to add on each side, as a share of the drawing's own box, so that it fills 80 to 90 % of the picture.
MARGINS = {"noto": 0.07, "fluent-emoji-flat": 0.06, "openmoji": -0.02, "emojione": 0.07, "twemoji": 0.09}


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One picture to draw."""

    key: str
    svg: str
    background: str
    size: int


def background_of(key: str) -> str:
    """The plain background of a picture: a hash of its key, the same in every run."""
    return BACKGROUNDS[hashlib.sha256(f"background:{key}".encode()).digest()[0] % len(BACKGROUNDS)]


def svg_of(icons: Mapping[str, Any], name: str, margin: float) -> str:
    """A complete square SVG of an icon of an Iconify set, its aliases' flips and turns applied.

    Args:
        icons: the set's ``icons.json``.
        name: icon or alias.
        margin: share of the larger side to add around it.
    """
    horizontal, vertical, turns = False, False, 0
    while name not in icons["icons"]:
        alias = icons["aliases"][name]
        horizontal ^= bool(alias.get("hFlip"))
        vertical ^= bool(alias.get("vFlip"))
        turns += int(alias.get("rotate", 0))
        name = alias["parent"]
    icon = icons["icons"][name]
    left, top, width, height = (
        float(icon.get(field, icons.get(field, default))) for field, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    x, y = left + width / 2, top + height / 2
    body = icon["body"]
    if horizontal or vertical or turns % 4:
        flip = f"scale({-1 if horizontal else 1} {-1 if vertical else 1})"
        body = f'<g transform="translate({x} {y}) rotate({90 * (turns % 4)}) {flip} translate({-x} {-y})">{body}</g>'
    side = max(width, height) * (1 + 2 * margin)
    box = f"{x - side / 2:g} {y - side / 2:g} {side:g} {side:g}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">{body}</svg>'


def draw(job: Job) -> bytes:
    """One picture as JPEG bytes. Raises SampleError when the renderer refuses the drawing."""
    import resvg_py

    try:
        png = resvg_py.svg_to_bytes(svg_string=job.svg, width=job.size, height=job.size, background=job.background, skip_system_fonts=True)
    except ValueError as error:
        raise SampleError(f"the drawing of {job.key} cannot be rendered ({error}); is resvg-py at least 0.2?") from error
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return out.getvalue()


def draw_batches(batches: Sequence[Sequence[Job]], advance: Callable[[int], None] | None = None, workers: int = WORKERS) -> Iterator[list[bytes]]:
    """Draw batches (shards) of pictures in worker processes; yields each batch's JPEGs in the order of its jobs.

    All work is queued at once, so the workers go on while the caller writes a shard. ``advance`` is called with the
    number of pictures that were newly drawn. Closing the generator stops the workers.
    """
    workers = max(1, min(workers, os.cpu_count() or 1, math.ceil(sum(map(len, batches)) / _CHUNK)))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("forkserver"), initializer=_start_worker)
    try:
        queued = [[pool.submit(_draw_all, batch[at : at + _CHUNK]) for at in range(0, len(batch), _CHUNK)] for batch in batches]
        while queued:
            drawn: list[bytes] = []
            for part in queued.pop(0):  # lets go of a batch's bytes as soon as it was handed over
                drawn += part.result()
                if advance is not None:
                    advance(len(part.result()))
            yield drawn
    except BrokenProcessPool as error:
        raise SampleError("a drawing process died (killed, or out of memory); run the same command again to continue") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def check_renderer() -> str:
    """The renderer's version. Raises MissingExtraError when it is not installed."""
    try:
        import resvg_py
    except ImportError as error:
        raise MissingExtraError("resvg-py", "sample", "drawing the sample") from error
    return str(resvg_py.__version__)


def _draw_all(jobs: Sequence[Job]) -> list[bytes]:
    return [draw(job) for job in jobs]


def _start_worker() -> None:
    """Leave ctrl-C to the parent, and end with it: after kill -9 nobody else would tell an idle worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
