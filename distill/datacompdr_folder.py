"""The store folder of an import, and the processes that work on it: one writer, the settings it was begun with, what is done already."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import Any

from distill.progress import progress
from distill.store import open_store
from runtime.errors import StoreError
from runtime.files import write_json

logger = logging.getLogger(__name__)

SETTINGS = "settings.json"
INDEX = "index.json"
_IN_FLIGHT = 4
"""Tasks a worker that are handed out ahead: a billion of them are not held at once."""


@contextmanager
def locked_store(folder: Path) -> Iterator[None]:
    """Make the folder and be its only writer. Raises StoreError when another process is."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"store folder '{folder}' cannot be made ({error.strerror}); give another path") from None
    strangers = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
    if strangers and SETTINGS not in strangers:
        raise StoreError(f"'{folder}' is no store but holds {', '.join(sorted(strangers)[:3])}; give a new or an empty folder")
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StoreError(f"another process is writing the store '{folder}'; wait for it or stop it") from None
        for half in folder.glob(".*.safetensors.*"):  # of a worker that was killed while it wrote
            half.unlink()
        yield


def hash_settings(settings: dict[str, Any]) -> str:
    """sha256 of what decides the bytes of a store."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write settings.json into a fresh folder, or compare with the one that is there. Raises StoreError when they differ."""
    path = folder / SETTINGS
    if not path.is_file():
        write_json(path, settings)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        different = [name for name in settings if found.get(name) != settings[name]]
    except (ValueError, AttributeError) as error:
        raise StoreError(f"'{path}' cannot be read ({error}); remove the store '{folder}' and run again") from None
    if different:
        shown = ", ".join(f"{name} ({_short(found.get(name))} there, {_short(settings[name])} now)" for name in different)
        raise StoreError(f"store '{folder}' was begun with other {shown}; give another folder, or remove this one to start anew")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:8]}"


def finished(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The index of a store that is complete and unchanged; None when there is work to do."""
    if not (folder / INDEX).is_file():
        return None
    try:
        index = open_store(folder, verify=True).index
    except StoreError as error:
        logger.warning("the store is repaired: %s", error)
        return None
    return index if index.get("settings_sha256") == hash_settings(settings) else None


@contextmanager
def worker_pool(workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """Yields `run(title, function, argument lists, weights)`, which gives the results in order and shows progress.

    One worker is this process itself. An interrupt or error stops the others at once.
    """
    if workers == 1:
        yield lambda title, function, arguments, weights=None: _watched(title, (function(*given) for given in arguments), arguments, weights)
        return
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # inherited by the workers, before they import torch
        os.environ[name] = "1"
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("forkserver"), initializer=_start_worker)
    try:
        yield lambda title, function, arguments, weights=None: _watched(title, _in_order(pool, function, arguments, workers), arguments, weights)
    except BrokenProcessPool:
        raise StoreError("a worker process died, most likely for want of memory; run the same command again (it continues), with fewer --workers or --part-rows") from None
    except BaseException:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, function: Callable[..., Any], arguments: Iterable[Sequence[Any]], workers: int) -> Iterator[Any]:
    waiting: deque[Future[Any]] = deque()
    for given in arguments:
        waiting.append(pool.submit(function, *given))
        if len(waiting) >= _IN_FLIGHT * workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _watched(title: str, results: Iterator[Any], arguments: Any, weights: Sequence[int] | None) -> Iterator[Any]:
    sizes = weights if weights is not None else [1] * len(arguments)
    done = 0
    with progress(title, sum(sizes)) as advance:
        for result, size in zip(results, sizes, strict=True):
            done += size
            advance(done, "pairs" if weights is not None else "")
            yield result


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()


def _leave_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)  # the parent was killed: nobody waits for the answer
