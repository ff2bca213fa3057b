"""The kept corpus: one zip file for each target in tests/fuzz/kept, of inputs that once reached something new or broke something."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path

KEPT = Path(__file__).parent / "kept"
_DATE = (1980, 1, 1, 0, 0, 0)


def read_kept(name: str) -> list[bytes]:
    """The kept inputs of a target, in order of their names."""
    path = KEPT / f"{name}.zip"
    if not path.is_file():
        return []
    with zipfile.ZipFile(path) as archive:
        return [archive.read(entry) for entry in sorted(archive.namelist())]


def add_kept(name: str, inputs: Sequence[bytes], most: int) -> int:
    """Add inputs, small ones first, while the file stays below `most` bytes; what is kept stays. Returns the file's bytes."""
    kept = {hashlib.sha256(data).hexdigest()[:16]: data for data in read_kept(name)}
    new = {hashlib.sha256(data).hexdigest()[:16]: data for data in sorted(inputs, key=len)}
    size = _write(name, kept) if kept else 0
    for key, data in new.items():
        if key in kept:
            continue
        size = _write(name, {**kept, key: data})
        if size > most:
            return _write(name, kept) if kept else 0
        kept[key] = data
    return size


def _write(name: str, inputs: dict[str, bytes]) -> int:
    KEPT.mkdir(exist_ok=True)
    path = KEPT / f"{name}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key in sorted(inputs):
            archive.writestr(zipfile.ZipInfo(key, _DATE), inputs[key], zipfile.ZIP_DEFLATED)
    return path.stat().st_size
