"""Faults of a process, put in place in the forked child before it runs a command. Each takes a random generator and what an undisturbed run was seen to do.

Real mechanisms where there are any: limits of the kernel for the size of files and for memory, a full file system, signals. Errors of single calls (fsync, rename,
open) are raised in place of the N-th call, N drawn among as many as the undisturbed run made.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Seen:
    """What an undisturbed run did: seconds, calls by name, bytes of its largest file, kilobytes of all."""

    seconds: float = 1.0
    calls: dict[str, int] = field(default_factory=dict)
    largest: int = 1
    pages: int = 1


Fault = Callable[[random.Random, Seen, Path], None]
COUNTED = ("fsync", "replace", "open to read", "open to write")


def _wrap(act: Callable[[str, int], None], below: Path) -> None:
    """Call `act(name, number)` before each counted call that concerns a file below a folder."""
    counts: dict[str, int] = dict.fromkeys(COUNTED, 0)
    lock = threading.Lock()
    inside = str(below.resolve()) + os.sep

    def step(name: str) -> None:
        with lock:
            counts[name] += 1
            number = counts[name]
        act(name, number)

    def concerns(path: object) -> bool:
        return isinstance(path, (str, bytes, os.PathLike)) and os.path.realpath(os.fsdecode(path)).startswith(inside)

    real_fsync, real_replace, real_rename, real_open = os.fsync, os.replace, os.rename, builtins.open

    def fsync(fd: Any) -> None:
        step("fsync")
        real_fsync(fd)

    def moved(real: Callable[..., None]) -> Callable[..., None]:
        def call(source: Any, target: Any, **more: Any) -> None:
            if concerns(target):
                step("replace")
            real(source, target, **more)

        return call

    def opened(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if concerns(file):
            step("open to write" if set(mode) & set("wax+") else "open to read")
        return real_open(file, mode, *rest, **more)

    os.fsync, os.replace, os.rename = fsync, moved(real_replace), moved(real_rename)
    builtins.open = io.open = opened  # type: ignore[assignment]


def count_calls(below: Path, into: dict[str, int]) -> None:
    """Count instead of disturbing."""

    def act(name: str, number: int) -> None:
        into[name] = number

    _wrap(act, below)


def failing(name: str, code: int) -> Fault:
    """One call of a kind fails; those before and after it do not."""

    def fault(rng: random.Random, seen: Seen, below: Path) -> None:
        chosen = rng.randint(1, max(1, seen.calls.get(name, 1)))

        def act(called: str, number: int) -> None:
            if called == name and number == chosen:
                raise OSError(code, os.strerror(code))

        _wrap(act, below)

    return fault


def short_files(rng: random.Random, seen: Seen, below: Path) -> None:
    """No file may grow beyond a random size: writes come back short, then fail (also those of SQLite and of compiled code)."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    size = rng.randint(0, max(1, seen.largest - 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def little_memory(rng: random.Random, seen: Seen, below: Path) -> None:
    """Little more address space than the process has."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limit = used + int(60 * rng.random() ** 3 * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def clock_jumps(rng: random.Random, seen: Seen, below: Path) -> None:
    """The clock of the day jumps by up to a month at every look, there and back."""
    real = time.time
    time.time = lambda: real() + rng.uniform(-30, 30) * 86_400
    time.time_ns = lambda: int(time.time() * 1e9)


def sent(number: signal.Signals) -> Fault:
    """A signal at a random moment, from outside; the process and what it started, as a system that goes down does."""

    def fault(rng: random.Random, seen: Seen, below: Path) -> None:
        delay = rng.uniform(0.0, 1.05) * seen.seconds
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            try:
                os.setpgid(0, 0)
                time.sleep(delay)
                os.killpg(parent, number)
            finally:
                os._exit(0)

    return fault


def none(rng: random.Random, seen: Seen, below: Path) -> None:
    """Nothing happens."""


FAULTS: dict[str, Fault] = {
    "kill -9": sent(signal.SIGKILL),
    "SIGTERM": sent(signal.SIGTERM),
    "SIGINT": sent(signal.SIGINT),
    "short writes, then EFBIG": short_files,
    "fsync fails (EIO)": failing("fsync", errno.EIO),
    "rename fails (EACCES)": failing("replace", errno.EACCES),
    "open to write fails (ENOSPC)": failing("open to write", errno.ENOSPC),
    "open to read fails (EIO)": failing("open to read", errno.EIO),
    "little memory": little_memory,
    "clock jumps": clock_jumps,
    "disk full": none,
}
"""By name. "disk full" is a small file system of its own that `harness` mounts."""
UNHEARD = ("kill -9", "little memory")
"""Where no sentence can be asked for: nobody is left to say it, or no memory to say it in."""

if sys.platform != "linux":
    for _name in ("little memory", "disk full"):
        FAULTS.pop(_name)
