"""Running stages as processes of their own: skipped when done, repeated when their inputs changed, timed, and their memory watched.

A stage is done when `OUT/stages/NAME.json` says so for the same commands and the same inputs. The stages resume
themselves; this file decides only whether to call them.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from runtime.errors import ClipError
from runtime.files import write_json


class StageError(ClipError):
    """A stage ended with an error of its own, which it has printed."""


class Stages:
    """The stages of one run folder."""

    def __init__(self, out: Path, say: Callable[[str], None]) -> None:
        self.out, self.say = out, say
        self.folder = out / "stages"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.crowded = False
        """True while several stages run at once: then none may draw a bar of its own."""
        self.stopping = threading.Event()
        """Set when chains are interrupted: their children are told, and no further stage begins."""

    def chains(self, *chains: Callable[[], None]) -> None:
        """Run functions that call `run` at the same time, each in a thread of its own, and wait for all.

        Raises:
            The first error of any of them, after the others have ended.
        """
        errors: list[BaseException] = []

        def guarded(chain: Callable[[], None]) -> None:
            try:
                chain()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=guarded, args=(chain,)) for chain in chains]
        self.crowded = True
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            self.stopping.set()  # a terminal interrupts the children too, a lone kill does not
            for thread in threads:  # they save their state and end
                thread.join()
            raise
        finally:
            self.crowded = False
            self.stopping.clear()
        if errors:
            raise errors[0]

    def run(self, name: str, commands: Sequence[Sequence[str]], *, inputs: Sequence[Path] = (), outputs: Sequence[Path] = ()) -> float:
        """Run `commands` side by side unless the stage is done. Returns the seconds that it took, now or then.

        Args:
            commands: argument lists after `python -m`.
            inputs: files whose content the stage depends on.
            outputs: files that must exist for the stage to count as done.

        Raises:
            StageError: a command failed; the others of the stage are ended first.
        """
        if self.stopping.is_set():
            raise KeyboardInterrupt
        receipt = self.folder / f"{name}.json"
        digest = self._digest(commands, inputs)
        found = self._read(receipt)
        if found.get("digest") == digest and all(path.exists() for path in outputs):
            self.say(f"{name}: done before, in {found['seconds']:.0f} s")
            return float(found["seconds"])
        self.say(f"{name} …")
        started = time.monotonic()
        spent = float(found["spent"]) if found.get("unfinished") == digest else 0.0
        try:
            run_side_by_side(commands, self.out / "logs" / name, crowded=self.crowded, stopping=self.stopping)
        except BaseException:
            write_json(receipt, {"unfinished": digest, "spent": spent + time.monotonic() - started})
            raise
        seconds = round(spent + time.monotonic() - started, 1)
        write_json(receipt, {"digest": digest, "seconds": seconds, "commands": [list(command) for command in commands]})
        self.say(f"{name}: {seconds:.0f} s")
        return seconds

    def seconds(self) -> dict[str, float]:
        """Seconds of every finished stage."""
        found = {path.stem: self._read(path) for path in sorted(self.folder.glob("*.json"))}
        return {name: float(facts["seconds"]) for name, facts in found.items() if "seconds" in facts}

    def _digest(self, commands: Sequence[Sequence[str]], inputs: Sequence[Path]) -> str:
        known = hashlib.sha256(json.dumps([list(command) for command in commands]).encode())
        for path in inputs:
            known.update(path.read_bytes() if path.is_file() else b"absent")
        return known.hexdigest()

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}


def _die_with_parent() -> None:
    """Ask Linux to end this child when its parent is killed, so that a rerun never meets a survivor on the same files."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def run_side_by_side(commands: Sequence[Sequence[str]], log: Path, crowded: bool = False, stopping: threading.Event | None = None) -> None:
    """Run `python -m …` commands at once and wait for all. One alone draws its own progress bar; several write lines. When `stopping` is set the
    children are interrupted.

    Raises:
        StageError: one failed.
        KeyboardInterrupt: interrupted; the children were given time to save their state.
    """
    alone = len(commands) == 1 and not crowded
    log.parent.mkdir(parents=True, exist_ok=True)
    # One thread a process: stages fill the cores with processes, and two thread pools on one core wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    children = []
    for number, command in enumerate(commands):
        stream = open(log.with_name(f"{log.name}.{number}.log"), "w", encoding="utf-8")  # noqa: SIM115 (closed with the child)
        children.append((subprocess.Popen(
            [sys.executable, "-m", *command], stdout=stream, stderr=None if alone else subprocess.PIPE, text=True,
            env=environment, preexec_fn=_die_with_parent
        ), stream))  # fmt: skip
    readers = [threading.Thread(target=_echo, args=(child,), daemon=True) for child, _ in children if child.stderr is not None]
    for reader in readers:
        reader.start()
    try:
        failed = _wait([child for child, _ in children], stopping or threading.Event())
    except KeyboardInterrupt:
        for child, _ in children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(20)
        raise
    finally:
        for child, stream in children:
            if child.poll() is None:
                child.kill()
                child.wait()
            stream.close()
        for reader in readers:
            reader.join(5)
        for child, _ in children:
            if child.stderr is not None:
                child.stderr.close()
    if failed is not None:
        if failed.returncode in (130, -signal.SIGINT):
            raise KeyboardInterrupt
        words = failed.args if isinstance(failed.args, list) else [str(failed.args)]
        raise StageError(f"'{' '.join(map(str, words[2:5]))} …' ended with exit code {failed.returncode}; its message stands above, run the same command again to continue")


def _wait(children: list[subprocess.Popen[str]], stopping: threading.Event) -> subprocess.Popen[str] | None:
    """The first child that fails, after ending the others; None when all succeed. Raises KeyboardInterrupt, with the children told, when `stopping` is set."""
    waiting = list(children)
    while waiting:
        time.sleep(0.05)
        if stopping.is_set():
            for child in waiting:
                child.send_signal(signal.SIGINT)
            raise KeyboardInterrupt
        for child in list(waiting):
            if child.poll() is None:
                continue
            waiting.remove(child)
            if child.returncode:
                for other in waiting:
                    other.terminate()
                return child
    return None


def _echo(child: subprocess.Popen[str]) -> None:
    assert child.stderr is not None
    for line in child.stderr:
        sys.stderr.write(line)
        sys.stderr.flush()


class MemoryWatch:
    """Largest sum of resident memory over this process and its children, sampled each second, in bytes.

    Shared pages count once per process, so the figure is an upper bound.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(1.0):
            total = 0
            for process in (me, *me.children(recursive=True)):
                with suppress(psutil.Error):
                    total += process.memory_info().rss
            self.peak = max(self.peak, total)


def tree_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
