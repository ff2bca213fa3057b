"""From encoded pictures to the teachers' embeddings of their views, in whole micro-batches; decoding may run ahead in threads.

Shapes: A = views of a picture, S = a teacher's image size, D = its dimension, n = pictures that could be embedded.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from distill import views
from distill.ensemble import Teacher, encode_views, micro_batch
from runtime.errors import ImageError

_AT_ONCE = 80
"""Views that lie in memory together, at least; rounded up to whole micro-batches."""
_MOST_COMMON = 1024


class Draw(Protocol):
    """(place, (height, width) upright) -> parameters of its views, uint8 (A, 16)."""

    def __call__(self, place: int, size: tuple[int, int]) -> np.ndarray: ...


@dataclass(kw_only=True, slots=True)
class Embedded:
    """places: those that could be embedded, in order; packed: their parameters (n, A, 16); vectors: per teacher (n, A, D) float32;
    failures: the others and why."""

    places: list[int]
    packed: np.ndarray
    vectors: list[np.ndarray]
    failures: dict[int, str]


def embed_views(teachers: Sequence[Teacher], pictures: Iterable[tuple[int, bytes]], draw: Draw, count: int, *, threads: int, seconds: Counter[str]) -> Embedded:
    """Embed `count` views of every picture by every teacher.

    A picture that does not decode, or for which a teacher gives anything that is not finite, is a failure of its own.

    Args:
        pictures: (place, encoded picture), in the order in which they are embedded.
        threads: how many decode ahead of the teachers; 0 decodes in between. The answer does not depend on it.
        seconds: processor seconds are added here, "views" and "teachers".
    """
    sizes = sorted({teacher.image_size for teacher in teachers})
    rows = _rows_at_once(teachers)
    places: list[int] = []
    packed: list[np.ndarray] = []
    failures: dict[int, str] = {}
    waiting: dict[int, list[np.ndarray]] = {size: [] for size in sizes}
    vectors: list[list[np.ndarray]] = [[] for _ in teachers]

    def flush(at_least: int) -> None:
        total = sum(len(made) for made in waiting[sizes[0]])
        taken = total if at_least == 1 else total // rows * rows
        if total < at_least or not taken:
            return
        clock = time.thread_time()
        whole = {size: np.concatenate(made) for size, made in waiting.items()}
        for t, found in enumerate(encode_views(teachers, {size: made[:taken] for size, made in whole.items()}, finite=False)):
            vectors[t].append(found)
        for size, made in whole.items():
            waiting[size] = [made[taken:].copy()] if taken < total else []
        seconds["teachers"] += time.thread_time() - clock

    for place, outcome in _in_order(pictures, draw, sizes, threads):
        if isinstance(outcome, str):
            failures[place] = outcome
            continue
        parameters, made, spent = outcome
        seconds["views"] += spent
        places.append(place)
        packed.append(parameters)
        for size in sizes:
            waiting[size].append(made[size])
        flush(rows)
    flush(1)
    images = [
        np.concatenate(found).reshape(len(places), count, -1) if found else np.zeros((0, count, teacher.facts.dim), np.float32)
        for teacher, found in zip(teachers, vectors, strict=True)
    ]
    return _drop_failures(teachers, places, packed, images, failures, count)


def _drop_failures(
    teachers: Sequence[Teacher], places: list[int], packed: list[np.ndarray], images: list[np.ndarray], failures: dict[int, str], count: int
) -> Embedded:
    whole = np.ones(len(places), bool)
    for teacher, found in zip(teachers, images, strict=True):
        bad = ~np.isfinite(found).all(axis=(1, 2))
        for n in np.flatnonzero(bad & whole):
            failures[places[n]] = f"teacher '{teacher.facts.name}' gave no finite embedding for a view of this picture"
        whole &= ~bad
    kept = np.flatnonzero(whole)
    parameters = np.stack(packed) if packed else np.zeros((0, count, 16), np.uint8)
    return Embedded(places=[places[n] for n in kept], packed=parameters[kept], vectors=[found[kept] for found in images], failures=failures)


def _rows_at_once(teachers: Sequence[Teacher]) -> int:
    """Views that are whole micro-batches for all teachers, or for the largest where they have no small common multiple."""
    sizes = [micro_batch(teacher) for teacher in teachers]
    common = math.lcm(*sizes)
    step = common if common <= _MOST_COMMON else max(sizes)
    return -(-_AT_ONCE // step) * step


_Made = tuple[np.ndarray, dict[int, np.ndarray], float]


def _make(data: bytes, place: int, draw: Draw, sizes: list[int]) -> _Made | str:
    """Parameters (A, 16), views per size (A, S, S, 3) and processor seconds; or why there are none."""
    clock = time.thread_time()
    try:
        picture = views.open_picture(data)
        parameters = draw(place, picture.size)
        made = {size: np.stack([picture.view(packed, size) for packed in parameters]) for size in sizes}
    except ImageError as error:
        return str(error)
    return parameters, made, time.thread_time() - clock


def _in_order(pictures: Iterable[tuple[int, bytes]], draw: Draw, sizes: list[int], threads: int) -> Iterator[tuple[int, _Made | str]]:
    """What `_make` gives, in the order of the pictures."""
    if not threads:
        for place, data in pictures:
            yield place, _make(data, place, draw, sizes)
        return
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(threads, "decode"))
        ahead: deque[tuple[int, Future[_Made | str]]] = deque()
        stack.callback(lambda: [future.cancel() for _, future in ahead])
        for place, data in pictures:
            ahead.append((place, pool.submit(_make, data, place, draw, sizes)))
            if len(ahead) > 2 * threads:
                first, future = ahead.popleft()
                yield first, future.result()
        while ahead:
            first, future = ahead.popleft()
            yield first, future.result()
