"""Where the tasks of `mclip reinforce` run: in this process, in a local pool of processes, or on a Ray cluster.

A task is a function of a module and its arguments; its answer does not depend on where it ran. An engine has one method that matters:

    engine.submit(function, *arguments) -> concurrent.futures.Future

`run(engine, function, tasks)` keeps a few tasks a worker waiting, so that a billion tasks are never held at once, and yields answers as
they come.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context
from typing import Any, Literal, Protocol, TypeVar

from runtime.errors import StoreError

EngineName = Literal["local", "ray"]
Task = TypeVar("Task")
Answer = TypeVar("Answer")
_WAITING = 2
"""Tasks a worker that are submitted and not finished."""


class Engine(Protocol):
    """Runs functions elsewhere. `start` was called once in every worker before its first function."""

    name: str
    workers: int

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Run function(*arguments) on some worker."""

    def close(self, now: bool) -> None:
        """Release the workers; with `now`, without waiting for what they do."""


@contextmanager
def open_engine(name: EngineName, workers: int, start: Callable[..., None], *arguments: Any) -> Iterator[Engine]:
    """An engine whose workers each call start(*arguments) once; no worker is started before the first task.

    workers 0: everything runs in this process, one task after the other. An error or an interrupt stops the workers at once.

    Raises:
        StoreError: the cluster cannot be reached, or a worker died and could not be replaced.
        MissingExtraError: Ray is not installed.
    """
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # inherited by the workers, before they import torch
        os.environ[variable] = "1"
    engine: Engine
    if name == "ray":
        from distill.ray_engine import RayEngine

        engine = RayEngine(workers, start, arguments)
    else:
        engine = LocalEngine(workers, start, arguments) if workers else InlineEngine(start, arguments)
    try:
        yield engine
    except BrokenProcessPool:
        raise StoreError("a worker process died, most likely for want of memory; run the same command again (it continues), with fewer --workers") from None
    except BaseException:
        engine.close(now=True)
        raise
    finally:
        engine.close(now=False)


def run(engine: Engine, function: Callable[[Task], Answer], tasks: Iterable[Task]) -> Iterator[tuple[Task, Answer]]:
    """Every task with its answer, in the order in which they are done. Tasks are drawn from the iterable as workers become free."""
    waiting: dict[Future[Answer], Task] = {}
    more = iter(tasks)
    while True:
        while len(waiting) < _WAITING * max(engine.workers, 1):
            task = next(more, None)
            if task is None:
                break
            waiting[engine.submit(function, task)] = task
        if not waiting:
            return
        done, _ = wait(waiting, return_when=FIRST_COMPLETED)
        for future in sorted(done, key=lambda future: list(waiting).index(future)):
            yield waiting.pop(future), future.result()


class InlineEngine:
    """No workers: a task is done when it is submitted."""

    name, workers = "local", 0

    def __init__(self, start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self._start: tuple[Callable[..., None], tuple[Any, ...]] | None = (start, arguments)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            if self._start is not None:
                start, given = self._start
                self._start = None
                start(*given)
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self, now: bool) -> None:
        """Nothing to release."""


class LocalEngine:
    """A pool of processes, started by forkserver. They leave when this process dies, however it dies."""

    name = "local"

    def __init__(self, workers: int, start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self.workers, self._start, self._arguments = workers, start, arguments
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        if self._pool is None:
            context = get_context("forkserver")
            given = (context.Value("i", 0), self._start, self._arguments)
            self._pool = ProcessPoolExecutor(self.workers, mp_context=context, initializer=_start_process, initargs=given)
        return self._pool.submit(function, *arguments)

    def close(self, now: bool) -> None:
        if self._pool is None:
            return
        if now:
            processes = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)


WORKER_NUMBER = 0
"""Number of this process among the workers of a local pool: which of several GPUs it takes."""


def _start_process(counter: Any, start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    global WORKER_NUMBER
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    with counter.get_lock():
        WORKER_NUMBER, counter.value = counter.value, counter.value + 1
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()
    start(*arguments)


def _leave_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)  # the parent was killed: nobody waits for the answer
