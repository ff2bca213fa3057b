"""Batches made ahead of the step that uses them, by threads: Pillow decodes and resamples without Python's lock.

The batches do not depend on the number of threads: what a batch holds is a function of its place in the order (distill/dataset.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from distill.dataset import Batch, ReinforcedPairs

SLICE = 16
"""Pictures that one thread draws at a time, so that several threads share a batch and the first one comes soon."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One batch: samples `first` to `first + size` of the endless order; without pictures only their texts."""

    first: int
    size: int
    pictures: bool = True


def load(data: ReinforcedPairs, requests: Iterable[Request], threads: int = 0, ahead: int = 2) -> Iterator[Batch]:
    """The requested batches, in order. With threads, up to `ahead` batches are made while the caller uses one; 0 makes each when it is asked for.

    An error is raised at its batch's turn. The threads end when the iterator is used up, closed or dropped.
    """
    if threads <= 0:
        for request in requests:
            yield data.batch(request.first, request.size, request.pictures)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
    waiting: deque[Future[Batch] | _Pending] = deque()
    try:
        for request in requests:
            waiting.append(_start(pool, data, request))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class _Pending:
    """A batch whose pixels are drawn slice by slice into one array."""

    slices: list[Future[None]]
    rest: Future[Batch]

    def result(self) -> Batch:
        for part in self.slices:
            part.result()
        return self.rest.result()


def _start(pool: ThreadPoolExecutor, data: ReinforcedPairs, request: Request) -> Future[Batch] | _Pending:
    if not request.pictures:
        return pool.submit(data.batch, request.first, request.size, False)
    try:
        samples = data.samples(request.first, request.size)
    except Exception as error:
        failed: Future[Batch] = Future()
        failed.set_exception(error)
        return failed
    pixels = data.empty_pixels(len(samples))
    slices = [pool.submit(data.fill, samples, start, start + SLICE, pixels) for start in range(0, len(samples), SLICE)]
    return _Pending(slices, pool.submit(data.finish, samples, pixels))
