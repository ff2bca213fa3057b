"""One fault at a time into one command, in a child forked from a process that has imported everything; then: is what was finished intact, and does the same
command, given again, end with what an undisturbed run ends with?
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.injection import FAULTS, UNHEARD, Fault, Seen, count_calls, none
from tests.faults.stages import STAGES, tree

HANGS = 60.0
COUNTS: dict[str, dict[str, int]] = {
    "reinforce": dict.fromkeys(FAULTS, 5),
    "train": {**dict.fromkeys(FAULTS, 3), "kill -9": 5},
    "compress": {**dict.fromkeys(FAULTS, 1), "kill -9": 3, "short writes, then EFBIG": 2, "disk full": 2},
    "export": {**dict.fromkeys(FAULTS, 1), "kill -9": 3, "short writes, then EFBIG": 2, "disk full": 2},
    "index": {**dict.fromkeys(FAULTS, 6), "kill -9": 10},
    "bench": {**dict.fromkeys(FAULTS, 2), "kill -9": 3},
}
"""Faults of each kind in each stage."""
QUICK: dict[str, dict[str, int]] = {"index": dict.fromkeys(FAULTS, 1), "bench": {"kill -9": 1, "short writes, then EFBIG": 1, "rename fails (EACCES)": 1}}
"""Some of them, for every run of the tests."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One injected fault. `how`: what became of the process; `problem`: None, or what was lost or said wrong."""

    stage: str
    fault: str
    number: int
    how: str
    problem: str | None


def run_child(argv: list[str], fault: Fault, rng: random.Random, seen: Seen, below: Path, count: dict[str, int] | None = None) -> tuple[int, str, float]:
    """Fork, put the fault in place, run `mclip`. Returns (exit code, or minus the signal; what it wrote to stderr; seconds). Hanging counts as -1000."""
    errors, end = os.pipe()  # a file would fall under the limits that are being tried
    fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, 2**20)
    counted = tempfile.TemporaryFile()  # noqa: SIM115  (a child and its parent share it)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.setpgid(0, 0)
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(null, 1)
            os.dup2(end, 2)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            from mobileclip.cli import main

            if count is not None:
                count_calls(below, count)
            fault(rng, seen, below)
            code = main(argv)
            if count is not None:
                os.write(counted.fileno(), json.dumps(count).encode())
        except SystemExit as error:
            code = int(error.code or 0)
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            import traceback

            with contextlib.suppress(BaseException):
                traceback.print_exc()
        finally:
            os._exit(code)
    os.close(end)
    status = 0
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - started > HANGS:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(errors)
            return -1000, "", HANGS
        time.sleep(0.002)
    seconds = time.monotonic() - started
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)  # workers, and the one that was to send a signal
    with os.fdopen(errors, "rb") as stream:
        said = stream.read().decode("utf-8", "replace")
    if count is not None:
        counted.seek(0)
        count.update(json.loads(counted.read() or b"{}"))
    return (-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)), said, seconds


def ask(work: Path, function: Any) -> tuple[Any, str | None]:
    """What a function gives, in a child of its own: the parent must stay as it is, and a reader may crash. (value, or None and what it said)."""
    place = work / f".answer-{time.monotonic_ns()}"
    child = os.fork()
    if child == 0:
        try:
            try:
                found = {"value": function()}
            except BaseException as error:
                found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            place.write_text(json.dumps(found))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    found = json.loads(place.read_text()) if place.is_file() else {"error": "the reader died"}
    place.unlink(missing_ok=True)
    return found.get("value"), found.get("error")


@contextlib.contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[bool]:
    """A file system of this size at `place`; False where mounting is not allowed (then the size of files is limited instead)."""
    place.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k,mode=700", "mclip-faults", str(place)], capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


def _pages(folder: Path) -> int:
    """Kilobytes that a folder takes in pages of four."""
    return sum(-(-path.stat().st_size // 4096) * 4 for path in folder.rglob("*") if path.is_file())


class Bench:
    """A stage's world, and what an undisturbed run gives."""

    def __init__(self, name: str, work: Path) -> None:
        self.name, self.stage, self.work = name, STAGES[name], work
        self.world = work / name / "world"
        self.world.mkdir(parents=True)
        self._in_child(self.stage.world, self.world)
        out = self._fresh(work / name / "plain")
        self.inputs = tree(self.world)
        self.seen = Seen()
        code, said, self.seen.seconds = run_child(self.stage.command(self.world, out), none, random.Random(0), self.seen, work, self.seen.calls)
        if code:
            raise RuntimeError(f"{name} does not run undisturbed (exit {code}): {said[-500:]}")
        # counting costs; the time of a run that is not looked at decides when signals come
        _, _, self.seen.seconds = run_child(self.stage.command(self.world, self._fresh(work / name / "timed")), none, random.Random(0), self.seen, work)
        sizes = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
        self.seen.largest, self.seen.pages = max(sizes), _pages(out)
        self.wanted, error = ask(work, lambda: self.stage.result(self.world, out))
        if error:
            raise RuntimeError(f"{name} gives no result undisturbed: {error}")

    def _in_child(self, function: Any, *arguments: Any) -> None:
        _, error = ask(self.work, lambda: function(*arguments))
        if error:
            raise RuntimeError(f"{self.name}: its world cannot be made: {error}")

    def _fresh(self, out: Path) -> Path:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        self._in_child(self.stage.before, self.world, out)
        return out

    def disturb(self, fault: str, number: int) -> Outcome:
        """Run once with a fault, look, run again without."""
        rng = random.Random(f"{self.name} {fault} {number}")
        place = self.work / self.name / "faulted"
        if fault != "disk full":
            return self._disturb(fault, number, rng, self._fresh(place), FAULTS[fault])
        shutil.rmtree(place, ignore_errors=True)
        kilobytes = _pages(self._fresh(self.work / self.name / "earlier")) + 8 + rng.randint(0, self.seen.pages)
        with small_disk(place, kilobytes) as mounted:
            if mounted:
                self._in_child(self.stage.before, self.world, place)
                return self._disturb(fault, number, rng, place, none)
        return self._disturb(fault, number, rng, self._fresh(place), FAULTS["short writes, then EFBIG"])

    def _disturb(self, fault: str, number: int, rng: random.Random, out: Path, how: Fault) -> Outcome:
        code, said, _ = run_child(self.stage.command(self.world, out), how, rng, self.seen, self.work)
        verdict = "not hit" if code == 0 else "hung" if code == -1000 else f"signal {-code}" if code < 0 else f"exit {code}"
        if fault == "disk full":  # room was made; a reader of SQLite's needs some too
            subprocess.run(["mount", "-o", "remount,size=2g", str(out)], capture_output=True, check=False)
        problem = self._said_wrong(fault, code, said) or self._lost(out)
        if problem is None:
            code, said, _ = run_child(self.stage.command(self.world, out), none, rng, self.seen, self.work)
            if code:
                problem = f"given again it ends with {code}: {' '.join(said.split())[-200:]}"
            else:
                found, error = ask(self.work, lambda: self.stage.result(self.world, out))
                problem = f"given again it is damaged: {error}" if error else None if found == self.wanted else "given again it ends with something else"
        return Outcome(stage=self.name, fault=fault, number=number, how=verdict, problem=problem)

    def _said_wrong(self, fault: str, code: int, said: str) -> str | None:
        if fault in UNHEARD or code == 0:  # a process that was starved of memory may wait for a worker that could not start: it is ended then, as by kill -9
            return None
        if code == -1000:
            return f"hangs: {HANGS:.0f} s"
        if code < 0 and fault not in ("SIGTERM", "SIGINT"):
            return f"died of signal {-code}"
        if "Traceback" in said:
            return f"a traceback: {said.strip().splitlines()[-1][:160]}"
        return None

    def _lost(self, out: Path) -> str | None:
        """What was finished before must be there; what looks finished must be right; inputs are as they were."""
        if tree(self.world) != self.inputs:
            return "its inputs were changed"
        _, error = ask(self.work, lambda: self.stage.kept(self.world, out))
        if error:
            return f"what was finished earlier is lost: {error}"
        found, _ = ask(self.work, lambda: self.stage.result(self.world, out))
        if found is not None and self.name in ("train", "compress", "reinforce") and found != self.wanted:
            return "something unfinished passes for a result"
        return None


MODULES: dict[str, tuple[str, ...]] = {
    "reinforce": ("torch", "distill.reinforce", "tests.distill.test_reinforce"),
    "train": ("torch", "distill.train", "tests.distill.world"),
    "compress": ("torch", "export.compress", "tests.export.conftest"),
    "export": ("torch", "export.bundle", "export.to_onnx", "onnxruntime", "tests.export.conftest"),
    "index": ("runtime.shell_index", "onnxruntime", "tests.runtime.toy"),
    "bench": ("benchmarks.latency", "onnxruntime", "tests.runtime.toy"),
}


def warm_up(stages: Iterable[str]) -> None:
    """Import what the stages import, and start none of its threads: a forked child has only the thread that forked."""
    import logging

    for module in ("mobileclip.cli", *dict.fromkeys(module for stage in stages for module in MODULES[stage])):
        __import__(module)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    logging.getLogger().handlers.clear()


def run_faults(work: Path, counts: dict[str, dict[str, int]]) -> Iterator[Outcome]:
    """All faults of these counts, by stage."""
    warm_up(counts)
    os.environ.update(MCLIP_PROGRESS="0", MOBILECLIP_CACHE=str(work / "cache"), OMP_NUM_THREADS="1", MOBILECLIP_MEASURE="0")
    for name, faults in counts.items():
        bench = Bench(name, work)
        for fault, times in faults.items():
            for number in range(times):
                yield bench.disturb(fault, number)
        shutil.rmtree(work / name, ignore_errors=True)


