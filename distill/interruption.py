"""Ctrl-C and SIGTERM as a question that a loop asks between two steps, so that what it saves is a whole step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

IMPATIENT = 1.0


@contextmanager
def stop_asked() -> Iterator[Callable[[], bool]]:
    """Inside, SIGINT and SIGTERM only make the yielded function say True; a SIGINT that comes IMPATIENT seconds later or more is a KeyboardInterrupt
    at once. (What comes sooner is a launcher, which hands on a Ctrl-C that its processes have seen themselves.)

    Signals that are ignored stay so, and in a thread other than the main one nothing changes (Python gives signals to the main thread alone).

    Example:
        >>> with stop_asked() as asked:
        ...     while not done and not asked():
        ...         step()
    """
    seen: list[float] = []

    def note(number: int, frame: FrameType | None) -> None:
        if seen and number == signal.SIGINT and time.monotonic() - seen[0] > IMPATIENT:
            raise KeyboardInterrupt
        seen.append(time.monotonic())

    handled = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                handled[number] = signal.signal(number, note)
    try:
        yield lambda: bool(seen)
    finally:
        for number, former in handled.items():
            signal.signal(number, former)
