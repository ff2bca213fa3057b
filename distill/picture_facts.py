"""What curation needs to know of every picture: read once, by several processes, a few hundred bytes a picture."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np

from distill.perceptual_hash import THUMBNAIL, colour_thumbnail, perceptual_hash
from distill.progress import progress
from runtime.errors import ImageError, PairsError
from runtime.pairs import Pairs

logger = logging.getLogger(__name__)

CHUNK = 256
"""Pictures a task of a worker."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureFacts:
    """N pictures, in the order of the rows asked for. Where `readable` is False, all but `file_sha256` and `file_bytes` are zero."""

    file_sha256: np.ndarray
    """(N,) 32 bytes each: of the encoded picture."""
    pixel_sha256: np.ndarray
    """(N,) 32 bytes each: of height, width and the decoded RGB pixels, upright."""
    hashes: np.ndarray
    """(N,) uint64, `perceptual_hash`."""
    thumbnails: np.ndarray
    """(N, 48) uint8, `colour_thumbnail`."""
    sizes: np.ndarray
    """(N, 2) int64: height, width."""
    file_bytes: np.ndarray
    """(N,) int64."""
    readable: np.ndarray
    """(N,) bool: decodes."""
    errors: dict[int, str]
    """Why not, by position."""

    def __len__(self) -> int:
        return len(self.readable)


def read_pictures(pairs: Pairs, rows: np.ndarray, workers: int = 1) -> PictureFacts:
    """Decode the pictures of rows (N,) and keep their facts. A picture that does not decode is counted, never fatal.

    Raises:
        PairsError: the shards changed under the reader, or a worker died.
    """
    chunks = [rows[start : start + CHUNK].tolist() for start in range(0, len(rows), CHUNK)]
    made = []
    with progress("pictures", len(rows)) as advance:
        for found in _in_turn(pairs, chunks, workers):
            made.append(found)
            advance(sum(len(part) for part in made), "")
    empty = [_facts(pairs, [])]
    errors, start = {}, 0
    for part in made:
        errors |= {start + place: why for place, why in part.errors.items()}
        start += len(part)
    if errors:
        logger.warning("%d pictures do not decode; the first: %s", len(errors), next(iter(errors.values())))
    arrays = {name: np.concatenate([getattr(part, name) for part in empty + made]) for name in PictureFacts.__dataclass_fields__ if name != "errors"}
    return PictureFacts(**arrays, errors=errors)


def _in_turn(pairs: Pairs, chunks: list[list[int]], workers: int) -> Iterator[PictureFacts]:
    if workers == 1 or len(chunks) < 2:
        yield from (_facts(pairs, chunk) for chunk in chunks)
        return
    pool = ProcessPoolExecutor(min(workers, len(chunks)), mp_context=get_context("forkserver"), initializer=_start, initargs=(pairs,))
    try:
        yield from pool.map(_work, chunks)
    except BrokenProcessPool:
        raise PairsError("a process that read pictures died, most likely for want of memory; run the command again with fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_STATE: dict[str, Pairs] = {}


def _start(pairs: Pairs) -> None:
    _STATE["pairs"] = pairs


def _work(rows: list[int]) -> PictureFacts:
    return _facts(_STATE["pairs"], rows)


def _facts(pairs: Pairs, rows: list[int]) -> PictureFacts:
    n = len(rows)
    facts = PictureFacts(
        file_sha256=np.zeros(n, "V32"), pixel_sha256=np.zeros(n, "V32"), hashes=np.zeros(n, np.uint64), thumbnails=np.zeros((n, 3 * THUMBNAIL**2), np.uint8),
        sizes=np.zeros((n, 2), np.int64), file_bytes=np.zeros(n, np.int64), readable=np.zeros(n, bool), errors={},
    )  # fmt: skip
    for place, row in enumerate(rows):
        data = pairs.image_bytes(row)
        facts.file_sha256[place], facts.file_bytes[place] = np.void(hashlib.sha256(data).digest()), len(data)
        try:
            image = pairs.image(row)
        except ImageError as error:
            facts.errors[place] = str(error)
            continue
        facts.readable[place] = True
        facts.sizes[place] = image.height, image.width
        pixels = b"%d %d " % (image.height, image.width) + image.tobytes()
        facts.pixel_sha256[place] = np.void(hashlib.sha256(pixels).digest())
        facts.hashes[place], facts.thumbnails[place] = perceptual_hash(image), colour_thumbnail(image)
    return facts
