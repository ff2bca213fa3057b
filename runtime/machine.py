"""What this machine found out about a bundle, kept between runs: which files were hashed, which artefacts compute the right thing here, and how fast.

One small JSON file a bundle in the cache folder. Whatever is wrong with it (damaged, of another machine or version, not writable) it counts as empty, and what it
held is found out again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.bundle_files import MANIFEST, artefact_files, verify_file
from runtime.choice import Findings
from runtime.errors import ClipError
from runtime.files import cache_root, write_json

if TYPE_CHECKING:
    from runtime.backends import Tower
    from runtime.manifest import Artefact, Manifest

SCHEMA = 1
MOST = 5
"""Artefacts of a tower that are tried, the fastest by the manifest first."""
SECONDS = 0.4
"""That each is timed for, at most."""
RUNS = 15
GOLDEN = 4
MOST_BYTES = 1_000_000
MOST_BUNDLES = 256

Open = Callable[["Artefact"], "Tower"]
Run = Callable[["Tower", "Artefact", np.ndarray], np.ndarray]


class Notes:
    """What is known about one bundle on this machine.

    Args:
        folder: the bundle.
        kept: False: nothing is read from the disk or written there.
    """

    def __init__(self, folder: Path, *, kept: bool = True) -> None:
        self.folder = folder
        self.kept = kept
        try:
            manifest = (folder / MANIFEST).read_bytes()
        except OSError:
            manifest = b""
        name = hashlib.sha256(os.fsencode(folder.resolve()) + b"\0" + manifest).hexdigest()[:24]
        self.path = cache_root() / "bundles" / f"{name}.json"
        self._known = _read(self.path if kept else Path(os.devnull))

    def verify(self, manifest: Manifest, artefact: Artefact) -> None:
        """Hash the files of an artefact, unless they were hashed before and have the same size, time and inode since.

        Raises:
            BundleError: missing or changed.
        """
        for name in artefact_files(artefact, manifest.files):
            self.verify_file(manifest, name)

    def verify_file(self, manifest: Manifest, name: str) -> None:
        """The same for one file. Raises BundleError."""
        path, known = self.folder / name, self._known["files"]
        stamp = _stamp(path)
        if stamp is not None and stamp[0] == manifest.files[name].bytes and known.get(name) == stamp:
            return
        verify_file(path, manifest.files[name])
        if stamp is not None:
            known[name] = stamp
            self.write()

    def findings(self, key: str) -> Findings | None:
        """What was found out under this key by the same packages on the same machine; None: nothing yet."""
        entry = self._known["towers"].get(key)
        if not isinstance(entry, dict) or entry.get("machine") != machine():
            return None
        return Findings(milliseconds=dict(entry["milliseconds"]), failed=dict(entry["failed"]))

    def keep(self, key: str, found: Findings) -> None:
        """Remember findings."""
        self._known["towers"][key] = {"machine": machine(), "milliseconds": dict(found.milliseconds), "failed": dict(found.failed)}
        self.write()

    def write(self) -> None:
        """To the disk; silently not where the cache folder cannot be written."""
        if not self.kept:
            return
        with contextlib.suppress(OSError):
            if not self.path.exists():
                _forget_oldest(self.path.parent)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self._known)


def try_out(manifest: Manifest, folder: Path, field: list[Artefact], open_it: Open, run: Run, *, timed: bool = True) -> Findings:
    """Run each artefact on golden inputs of the bundle: does it compute here what the checkpoint did, and how long does one input take?

    One is open at a time, so that memory holds no more than the largest. An artefact that fails is warned about and left out.

    Args:
        field: artefacts of one tower; the fastest few by the manifest are tried.
        timed: False: only look at what they compute.
    """
    from runtime.selfcheck import compared, read_golden, shortfall

    golden = read_golden(folder, manifest)
    image = field[0].tower == "image"
    inputs, wanted = (golden.pixels, golden.image_embedding) if image else (golden.tokens, golden.text_embedding)
    milliseconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    for artefact in sorted(field, key=lambda a: (a.p50_ms, a.id)):
        if len(milliseconds) >= MOST:
            break
        try:
            tower = open_it(artefact)
            found = run(tower, artefact, inputs[:GOLDEN])
            figures = compared(found, wanted[:GOLDEN])
            problem = shortfall(figures["cosine_min"], figures["norm_error"], artefact.cosine_threshold)
        except ClipError as error:
            problem = str(error)
        if problem is not None:
            failed[artefact.id] = f"failed the golden check on this machine: {problem}"
            warnings.warn(f"{artefact.id} of the bundle '{manifest.name}' is not used here: {problem}", RuntimeWarning, stacklevel=4)
            continue
        if timed:
            milliseconds[artefact.id] = round(_median(functools.partial(run, tower, artefact, inputs[:1])), 4)
    return Findings(milliseconds=milliseconds, failed=failed)


def _median(run: Callable[[], Any]) -> float:
    """Milliseconds."""
    run()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < RUNS and (len(times) < 3 or time.perf_counter() - start < SECONDS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return float(np.median(times)) * 1e3


def machine() -> str:
    """The processor, how many of it, and the versions of what runs models here."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", "rb") as file:
        lines = file.read(4096).decode("ascii", "replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{platform.machine()} {model}, {os.cpu_count()} processors, {', '.join(f'{name} {_version(name)}' for name in ('onnxruntime', 'openvino', 'ai-edge-litert'))}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _stamp(path: Path) -> list[int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def _forget_oldest(folder: Path) -> None:
    """Room for one more: bundles come and go, and each leaves a file."""
    files = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
    for path in files[: max(0, len(files) - MOST_BUNDLES + 1)]:
        path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    empty: dict[str, Any] = {"schema": SCHEMA, "files": {}, "towers": {}}
    try:
        if path.stat().st_size > MOST_BYTES:
            return empty
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return empty
    sound = isinstance(found, dict) and found.get("schema") == SCHEMA and isinstance(found.get("files"), dict) and isinstance(found.get("towers"), dict)
    if not sound or not all(_is_entry(entry) for entry in found["towers"].values()):
        return empty
    return dict(found)


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("milliseconds"), dict) or not isinstance(entry.get("failed"), dict):
        return False
    return all(type(value) in (int, float) for value in entry["milliseconds"].values()) and all(isinstance(value, str) for value in entry["failed"].values())
