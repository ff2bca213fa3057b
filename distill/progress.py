"""One progress line for every long job: a bar with ETA on a terminal, a sparse line elsewhere, silence when not wanted."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """Yields `advance(done, note)`. Set MCLIP_PROGRESS=0 for silence; without a terminal a line is written every 30 s.

    The bar goes to standard error, so that standard output stays a command's result.
    """
    if os.environ.get("MCLIP_PROGRESS") == "0":
        yield lambda done, note: None
    elif sys.stderr.isatty():
        with _bar(title, total, done) as advance:
            yield advance
    else:
        yield _lines(title, total)


@contextmanager
def _bar(title: str, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, completed=done, note="")
        yield lambda done, note: bar.update(task, completed=done, note=note)


def _lines(title: str, total: int, every: float = 30.0) -> Callable[[int, str], None]:
    started = last = time.monotonic()

    def advance(done: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < every and done < total:
            return
        last = now
        rest = (now - started) * (total - done) / max(done, 1)
        sys.stderr.write(f"{title}: {done} of {total}, about {rest:.0f} s left  {note}\n")
        sys.stderr.flush()

    return advance


def stamped_lines() -> Callable[[str], None]:
    """A printer of steps to standard error, each with the seconds since this call."""
    started = time.monotonic()

    def say(line: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - started:6.1f} s] {line}\n")
        sys.stderr.flush()

    return say
