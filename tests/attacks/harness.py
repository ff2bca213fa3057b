"""Runs hostile cases, each judged: refused in one sentence (or gone on with, where that is right), in time, in little memory, nothing written outside its folder, nothing run.

Every case is a function of an empty folder: it writes its files there and returns what a victim would do with them. Only that is watched. A child process runs
many cases, after one round of warming up, so that imports count for nobody.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Victim = Callable[[], object]
Case = Callable[[Path], Victim]

SECONDS = 1.0
MEGABYTES = 200.0
HANGS = 20
"""Seconds after which a case is ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What became of a case. `problems` is empty where it is well."""

    format: str
    case: str
    said: str
    seconds: float
    megabytes: float
    problems: tuple[str, ...]


RUNS = (
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen", "socket.connect", "ctypes.dlopen", "webbrowser.open",
)  # fmt: skip
"""Events of an interpreter that runs or reaches something else."""


class GoesOn(str):
    """Returned by a victim that rightly goes on: what it made of the case."""


class _Hung(BaseException):
    pass


class _Watch:
    """What the interpreter tells of files, processes and connections while a case runs (an audit hook cannot be removed, so one is enough)."""

    def __init__(self) -> None:
        self.inside: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        if event == "open":
            path, mode, flags = (*arguments, None, None, None)[:3]
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (mode is None and isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if writes:
                self._outside(event, path)
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate", "os.chmod", "shutil.rmtree"):
            for path in arguments[: 2 if event in ("os.rename", "os.symlink", "os.link") else 1]:
                self._outside(event, path)
        elif event in RUNS and (event != "ctypes.dlopen" or arguments[0] is not None):
            self.seen.append(f"{event} {str(arguments)[:100]}")

    def _outside(self, event: str, path: object) -> None:
        if isinstance(path, int) or self.inside is None:
            return
        place = os.path.realpath(os.fsdecode(path))  # type: ignore[arg-type]
        if place != "/dev/null" and not place.startswith(f"{self.inside}{os.sep}") and place != str(self.inside):
            self.seen.append(f"{event} {place}")


def cli(*arguments: object) -> Victim:
    """`mclip` with these arguments, in this process."""

    def run() -> object:
        from mobileclip.cli import main
        from runtime.errors import ClipError

        out, errors = _stream(), _stream()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            try:
                code = main([str(argument) for argument in arguments])
            except SystemExit as error:
                code = int(error.code or 0)
        said, printed = (stream.buffer.getvalue().decode("utf-8", "replace").strip() for stream in (errors, out))  # type: ignore[attr-defined]
        if code in (1, 2):
            raise ClipError(said.splitlines()[-1] if code == 2 and said else said or printed.replace("\n", "; ")[:300])
        return GoesOn(printed[:200])

    return run


def _stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="surrogateescape", write_through=True)


def judge(format: str, name: str, case: Case, folder: Path, watch: _Watch) -> Verdict:
    """Prepare one case in `folder`, run it, and say what is wrong about it."""
    from runtime.errors import ClipError

    problems: list[str] = []
    home = folder / "inside"
    home.mkdir(parents=True)
    victim = case(home)
    gc.collect()
    place_before, cache_before = tempfile.tempdir, os.environ.get("MOBILECLIP_CACHE")
    os.environ["MOBILECLIP_CACHE"] = str(home / ".cache")
    tempfile.tempdir = str(home)
    before, files = _reset_peak(), _tree(folder, home)
    working = os.getcwd()
    os.chdir(home)
    started = time.perf_counter()
    watch.seen, watch.inside = [], home.resolve()
    said = ""
    signal.setitimer(signal.ITIMER_REAL, HANGS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = victim()
        if isinstance(found, GoesOn):
            said = f"goes on: {found}"
        else:
            problems.append(f"was accepted ({str(found)[:80]})")
    except ClipError as error:
        said = str(error)
        if "\n" in said or not said.strip():
            problems.append("says no single sentence")
        if "Traceback" in said:
            problems.append("shows a traceback")
        if any(not letter.isprintable() for letter in said.replace("\n", "")):
            problems.append("says letters that do not print")
    except _Hung:
        problems.append(f"hangs: {HANGS} s")
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        problems.append(f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {' '.join(str(error).split())[:120]}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        watch.inside = None
        os.chdir(working)
        tempfile.tempdir = place_before
        if cache_before is None:
            os.environ.pop("MOBILECLIP_CACHE")
        else:
            os.environ["MOBILECLIP_CACHE"] = cache_before
    seconds, megabytes = time.perf_counter() - started, (_peak() - before) / 1e6
    if seconds > SECONDS:
        problems.append(f"took {seconds:.1f} s")
    if megabytes > MEGABYTES:
        problems.append(f"took {megabytes:.0f} MB")
    problems += [f"did {event}" for event in watch.seen[:3]]
    new = sorted(_tree(folder, home) - files)
    problems += [f"left {new[0]} outside"] if new else []
    return Verdict(format=format, case=name, said=" ".join(said.split())[:240], seconds=round(seconds, 3), megabytes=round(max(megabytes, 0.0), 1), problems=tuple(problems))


def run_cases(cases: dict[str, dict[str, Case]], work: Path, chosen: set[str] | None = None) -> Iterator[Verdict]:
    """All cases of these formats (or the chosen ones, "format/name"), one after the other in this process."""

    def ended(*_: object) -> None:
        raise _Hung

    signal.signal(signal.SIGALRM, ended)
    watch = _Watch()
    for format, named in cases.items():
        for name, case in named.items():
            if chosen is None or f"{format}/{name}" in chosen:
                yield judge(format, name, case, work / format.replace(" ", "-") / f"{len(name)}-{abs(hash(name)) % 10**8}", watch)


def _tree(folder: Path, home: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.parent.rglob("*") if path.is_relative_to(folder) and not path.is_relative_to(home)} | {
        entry.name for entry in folder.parent.iterdir()
    }


def _reset_peak() -> int:
    """Forget the peak so far; bytes now."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        return next((int(row.split()[1]) * 1024 for row in file if row.startswith(name + ":")), 0)
    return 0


def main(argv: list[str]) -> int:
    """The child: run all cases, print each verdict as JSON."""
    import logging

    from tests.attacks.corpus import CASES, warm_up

    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="mclip-attacks-") as name:
        work = Path(name)
        warm_up(work / "warm")
        for verdict in run_cases(CASES, work, set(argv) or None):
            sys.stdout.write(json.dumps(asdict(verdict)) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    from tests.attacks import harness  # the module that the cases know, not the one that is called __main__

    sys.exit(harness.main(sys.argv[1:]))
