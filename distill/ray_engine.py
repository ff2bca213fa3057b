"""`--engine ray`: workers as actors of a Ray cluster. Each loads the teachers once; a lost one is started again and its task repeated.

A running cluster is used (RAY_ADDRESS, or one that this machine belongs to); without one, Ray is started here with as many processors
as workers and stopped at the end. Pictures never pass through Ray's object store: a worker reads them from the shards itself, so pairs
and store must be reachable from every node under the same path or address.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from runtime.errors import ClipError, MissingExtraError, StoreError

logger = logging.getLogger(__name__)

RESTARTS = 4
"""How often a lost worker is replaced, and how often a task is repeated on the replacement."""
_OBJECT_STORE = 80 << 20  # bytes; Ray's smallest: tasks and answers are small


class Refused:
    """An error of ours on its way back as a value, so that it arrives as it was raised."""

    def __init__(self, error: ClipError) -> None:
        self.error = error


class Worker:
    """What lives in an actor's process."""

    def __init__(self, start: Callable[..., None], arguments: tuple[Any, ...], folder: str) -> None:
        # A cluster that was running before has a folder of its own: relative paths mean what they mean to the caller.
        if os.path.isdir(folder):
            os.chdir(folder)
        start(*arguments)

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        try:
            return function(*arguments)
        except ClipError as error:
            return Refused(error)


class RayEngine:
    """Actors of one cluster; a task goes to the one that has least to do."""

    name = "ray"

    def __init__(self, workers: int, start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        try:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            import ray
        except ImportError:
            raise MissingExtraError("ray", "ray", "--engine ray") from None
        self._ray, self.workers = ray, max(workers, 1)
        self._start, self._arguments = start, arguments
        self._actors: list[Any] = []
        self._load: list[int] = []
        self._lock = threading.Lock()
        self._ours = False

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        if not self._actors:
            self._connect()
            self._make_actors()
        with self._lock:
            place = self._load.index(min(self._load))
            self._load[place] += 1
        answer: Future[Any] = Future()
        answer.set_running_or_notify_cancel()
        self._actors[place].call.remote(function, arguments).future().add_done_callback(lambda done: self._finish(place, done, answer))
        return answer

    def _finish(self, place: int, done: Future[Any], answer: Future[Any]) -> None:
        with self._lock:
            self._load[place] -= 1
        error = done.exception()
        if error is None:
            value = done.result()
            if isinstance(value, Refused):
                answer.set_exception(value.error)
            else:
                answer.set_result(value)
        elif isinstance(error, self._ray.exceptions.RayActorError):
            answer.set_exception(StoreError(
                f"a Ray worker was lost {RESTARTS + 1} times, most likely for want of memory; run the same command again (it continues), with fewer --workers"
            ))  # fmt: skip
        else:
            answer.set_exception(getattr(error, "cause", None) or error)

    def _connect(self) -> None:
        ray = self._ray
        if ray.is_initialized():
            return
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        address = os.environ.get("RAY_ADDRESS")
        try:
            ray.init(address=address or "auto", **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            if address:
                raise StoreError(f"no Ray cluster answers at RAY_ADDRESS={address} ({' '.join(str(error).split())[:160]}); start it, or unset RAY_ADDRESS") from None
            ray.init(address="local", num_cpus=self.workers, include_dashboard=False, object_store_memory=_OBJECT_STORE, **quiet)
        self._ours = True

    def _make_actors(self) -> None:
        there = self._ray.cluster_resources()
        processors, graphics = int(there.get("CPU", 0)), int(there.get("GPU", 0))
        room = graphics or processors
        if self.workers > room:
            logger.warning("the Ray cluster has room for %d workers, %d were asked for", room, self.workers)
        self.workers = max(1, min(self.workers, room))
        wanted = {"num_cpus": 1 if processors >= self.workers else 0, "num_gpus": 1 if graphics else 0}
        actor = self._ray.remote(Worker).options(max_restarts=RESTARTS, max_task_retries=RESTARTS, **wanted)
        self._actors = [actor.remote(self._start, self._arguments, os.getcwd()) for _ in range(self.workers)]
        self._load = [0] * self.workers

    def close(self, now: bool) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        if self._ours and self._ray.is_initialized():
            self._ray.shutdown()
        self._ours = False
