"""Devices behind one small interface: push a bundle, run a plan, pull what it left.

    local               this machine, in a process of its own: pinned cores, threads, priority
    ssh:HOST            a Linux machine or board, with the system's ssh (ports, keys and jumps belong into ssh's own configuration)
    adb:SERIAL          an Android device, with the vendors' benchmark programs
    plan:FOLDER         a folder to carry to a device without our package, and the results that come back in it
    mac, ios:UDID       such folders for Apple's devices; browser: a page in Chromium

Lines are kept as they arrive. A device that is unplugged, hangs or fills up ends its own measurement with a sentence, and what it finished stays.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from runtime.errors import DeviceError

from .measure import summarise
from .results import Line, append_results, check, read_results

KINDS: dict[str, str] = {
    "local": "benchmarks.device_local:open_local",
    "ssh": "benchmarks.device_ssh:open_ssh",
    "adb": "benchmarks.device_adb:open_adb",
    "plan": "benchmarks.device_plan:open_plan",
    "mac": "benchmarks.device_apple:open_mac",
    "ios": "benchmarks.device_apple:open_ios",
    "browser": "benchmarks.device_browser:open_browser",
}
NEEDS_NAME = ("ssh", "adb", "plan", "ios")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceSettings:
    """What a device is told. `arguments` are those of `mclip bench` that shape the measurement (threads, seconds, modes, …)."""

    arguments: tuple[str, ...] = ()
    threads: int = 1
    seconds: float = 5.0
    label: str = ""
    """Name of the device in results; host names, serial numbers and addresses are never written."""
    cores: tuple[int, ...] = ()
    priority: int | None = None
    timeout: float = 600.0
    """Seconds without any new line after which a device counts as hanging."""
    ssh_config: Path | None = None
    remote_python: str = "python3"
    runner: Path | None = None
    """adb: the program that measures (benchmark_model, onnxruntime_perf_test), built for the device."""

    def __post_init__(self) -> None:
        if not 1 <= self.timeout <= 86_400:
            raise DeviceError(f"--device-timeout is {self.timeout}, expected 1 to 86400 seconds")
        if self.cores and (min(self.cores) < 0 or len(set(self.cores)) < len(self.cores)):
            raise DeviceError(f"--cores names {list(self.cores)}, expected different numbers from 0")
        if self.priority is not None and not -20 <= self.priority <= 19:
            raise DeviceError(f"--priority is {self.priority}, expected -20 (first) to 19 (last)")


class Device(Protocol):
    """One device, opened. `facts` are what results say of it: kind, label, and what it tells of itself."""

    facts: dict[str, Any]
    note: str | None
    """What to do next, after `run`."""

    def push(self, bundle: Path, known: Sequence[Line]) -> None:
        """Put the bundle there. `known` are lines that the device need not measure again. Raises DeviceError: no space, no way in."""
        ...

    def run(self) -> Iterator[Line]:
        """Measure; lines come as they are finished. Raises DeviceError when it breaks off."""
        ...

    def pull(self) -> list[Line]:
        """Lines that lie finished on the device and did not come by `run`."""
        ...

    def close(self) -> None:
        """Leave nothing behind."""
        ...


def open_device(spec: str, settings: DeviceSettings) -> Device:
    """Open `KIND` or `KIND:NAME`. Raises DeviceError for an unknown kind, a name that is missing, or a device that does not answer."""
    kind, colon, name = spec.partition(":")
    if kind not in KINDS:
        raise DeviceError(f"--device {spec} is of no kind that is known; known are {', '.join(KINDS)}")
    if (kind in NEEDS_NAME) != bool(name):
        raise DeviceError(f"--device {spec} {'needs a name' if not name else 'takes no name'}; write {kind}{':NAME' if not name else ''}")
    module, function = KINDS[kind].split(":")
    if importlib.util.find_spec(module) is None:
        raise DeviceError(f"--device {kind} is not part of this version; known are {', '.join(KINDS)}")
    opener: Callable[[str, DeviceSettings], Device] = getattr(importlib.import_module(module), function)
    return opener(name, settings)


def measure_on(spec: str, bundle: Path, out: Path, settings: DeviceSettings, on_lines: Callable[[Line], None] = lambda row: None) -> dict[str, Any]:
    """Measure a bundle on a device into a results file.

    Returns:
        {"device", "lines" (new ones), "error" (a sentence, or None), "note" (what to do next, or None)}. Whatever finished before an error is in the file.
    """
    made: dict[str, Any] = {"device": spec, "lines": 0, "error": None, "note": None}
    seen: set[str] = set()

    def keep(row: Line) -> None:
        row = {**row, "device": {**device.facts, **(row.get("device") or {})}}
        if row.get("samples") and not row["summary"] and row["kind"] in ("latency", "load", "cold_start"):  # scripts that know no statistics
            further = [] if row["settings"].get("converged", True) else ["warm-up had not converged"]
            row["summary"] = summarise(np.array(row["samples"]), further=further).as_dict()
        check(row, f"a line of {spec}")
        text = json.dumps({name: row[name] for name in ("kind", "phase", "artefact", "settings", "samples", "figures")}, sort_keys=True)
        if text not in seen:
            seen.add(text)
            append_results(out, [row])
            made["lines"] += 1
            on_lines(row)

    device = open_device(spec, settings)
    known = [{**row, "device": None} for row in (read_results([out]) if out.exists() else []) if _same(row.get("device"), device.facts)]
    seen |= {json.dumps({name: row[name] for name in ("kind", "phase", "artefact", "settings", "samples", "figures")}, sort_keys=True) for row in known}
    try:
        device.push(bundle, known)
        for row in device.run():
            keep(row)
        made["note"] = device.note
    except DeviceError as error:
        made["error"] = str(error)
    finally:
        with contextlib.suppress(DeviceError):
            for row in device.pull():
                keep(row)
        with contextlib.suppress(DeviceError):
            device.close()
    return made


def _same(found: dict[str, Any] | None, facts: dict[str, Any]) -> bool:
    return found is not None and all(found.get(name) == facts.get(name) for name in ("kind", "label", "cores", "priority"))


@dataclass(slots=True)
class Stream:
    """A process whose lines are read as they come. `command` is a list, never a shell's text."""

    command: Sequence[str]
    timeout: float
    environment: dict[str, str] | None = None
    errors: list[str] = field(default_factory=list)
    code: int | None = None

    def lines(self) -> Iterator[str]:
        """Lines of standard output. Raises DeviceError after `timeout` seconds without one; the process is ended then."""
        process = subprocess.Popen(
            list(self.command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace",
            env=self.environment,
        )  # fmt: skip
        arrived: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            assert process.stdout is not None
            for text in process.stdout:
                arrived.put(text)
            arrived.put(None)

        def listen() -> None:
            assert process.stderr is not None
            for text in process.stderr:
                self.errors.append(text.rstrip())
                del self.errors[:-50]

        readers = [threading.Thread(target=target, daemon=True) for target in (read, listen)]
        for reader in readers:
            reader.start()
        last = time.monotonic()
        try:
            while True:
                try:
                    text = arrived.get(timeout=max(0.01, self.timeout - (time.monotonic() - last)))
                except queue.Empty:
                    raise DeviceError(f"the device sent nothing for {self.timeout:.0f} s and counts as hanging; look at it, or raise --device-timeout") from None
                if text is None:
                    break
                last = time.monotonic()
                yield text
        finally:
            if process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.5)
                process.kill()
            self.code = process.wait()
            for reader in readers:
                reader.join(timeout=2)
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    with contextlib.suppress(OSError, ValueError):
                        pipe.close()


def lines_of(stream: Stream, what: str, facts: dict[str, Any]) -> Iterator[Line]:
    """Result lines of a process that prints JSON, one a line; {"error": …} ends it, {"board": …} goes into `facts`. What is cut in half is passed over."""
    said = None
    for text in stream.lines():
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and isinstance(found.get("error"), str):
            said = found["error"]
        elif isinstance(found, dict) and "board" in found:
            facts["board"] = found["board"]
        elif isinstance(found, dict) and "kind" in found:
            yield check(found, f"a line of {what}")
    if said is not None:
        raise DeviceError(f"{what}: {said}")
    if stream.code:
        raise DeviceError(blame(what, stream.code, stream.errors))


SIGNS = (
    ("No space left", "there is no space left on it; make room or choose another folder with TMPDIR there"),
    ("Exec format error", "the program was built for another processor; bring one that was built for this device"),
    ("cannot execute binary", "the program was built for another processor; bring one that was built for this device"),
    ("not executable: 64-bit ELF", "the program was built for another processor; bring one that was built for this device"),
    ("Connection refused", "it refuses connections; is its ssh server running, and on that port?"),
    ("Permission denied (", "it lets nobody in; put your key there (ssh-copy-id) or name it in ssh's configuration"),
    ("Host key verification failed", "its host key is not known or has changed; connect once by hand with ssh and look at it"),
    ("Could not resolve hostname", "nobody knows that name; write it as ssh would take it"),
    ("Connection timed out", "it did not answer in time; is it on, and in this network?"),
    ("closed by remote host", "the connection broke off; was it unplugged or restarted?"),
    ("Broken pipe", "the connection broke off; was it unplugged or restarted?"),
    ("not responding", "the connection broke off; was it unplugged or restarted?"),
    ("Connection reset", "the connection broke off; was it unplugged or restarted?"),
    ("device offline", "it is connected but does not answer; plug it in again"),
    ("unauthorized", "it does not trust this computer yet; confirm the question on its screen"),
    ("no devices/emulators found", "none is connected; plug it in and allow USB debugging"),
)


def blame(what: str, code: int | None, errors: Sequence[str]) -> str:
    """One sentence for a command that failed on a device."""
    whole = "\n".join(errors)
    for sign, meaning in SIGNS:
        if sign in whole:
            return f"{what}: {meaning}"
    if code == 255 and not whole.strip():
        return f"{what}: the connection broke off; was it unplugged or restarted?"
    last = next((text.strip() for text in reversed(errors) if text.strip()), "no message")
    return f"{what}: the command there ended with exit code {code}: {last[:200]}"
