"""This machine as a device: a process of its own, with pinned cores, chosen threads and priority."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .devices import DeviceSettings, Stream, lines_of
from .results import Line, append_results


class LocalDevice:
    """Measures in a child; the bundle stays where it is."""

    def __init__(self, settings: DeviceSettings) -> None:
        self._settings = settings
        self._work = Path(tempfile.mkdtemp(prefix="mclip-local-"))
        self._bundle: Path | None = None
        self.note: str | None = None
        self.facts: dict[str, Any] = {"kind": "local", "label": settings.label}
        if settings.cores:
            self.facts["cores"] = list(settings.cores)
        if settings.priority is not None:
            self.facts["priority"] = settings.priority

    def push(self, bundle: Path, known: Sequence[Line]) -> None:
        """Nothing to copy."""
        self._bundle = bundle
        if known:
            append_results(self._work / "results.jsonl", known)

    def run(self) -> Iterator[Line]:
        """Lines of the child as they come."""
        where = (["--cores", ",".join(map(str, self._settings.cores))] if self._settings.cores else []) + (
            ["--priority", str(self._settings.priority)] if self._settings.priority is not None else []
        )
        command = [sys.executable, "-m", "benchmarks.device_run", *where, str(self._bundle), "--out", str(self._work / "results.jsonl"), *self._settings.arguments]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]))
        yield from lines_of(Stream(command, self._settings.timeout, environment), "local", self.facts)

    def pull(self) -> list[Line]:
        """Everything came by `run`."""
        return []

    def close(self) -> None:
        """Remove the child's own results file."""
        shutil.rmtree(self._work, ignore_errors=True)


def open_local(name: str, settings: DeviceSettings) -> LocalDevice:
    """Open this machine."""
    return LocalDevice(settings)
