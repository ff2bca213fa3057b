"""Files that a reader sees whole or not at all, and their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_whole(path: str | os.PathLike[str], data: bytes, *, part: Path | None = None) -> Path:
    """Write `data` to `part` (a hidden name beside `path`), flush it to the disk and rename it: the old file stays until the new one is complete."""
    path = Path(path)
    part = part or path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str], suffix: str = ".part") -> Iterator[Path]:
    """A folder to be: what is written under the name given (a hidden one beside `path`) takes the place of `path` when the block ends well, and goes otherwise.

    Args:
        suffix: of the name given, for writers that look at it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{os.getpid()}{suffix}")
    try:
        yield part
        if path.exists():
            shutil.rmtree(path)
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def cache_root() -> Path:
    """Where what can be fetched or unpacked again is kept: `$MOBILECLIP_CACHE`, else `~/.cache/mobileclip-edge`."""
    root = os.environ.get("MOBILECLIP_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "mobileclip-edge"


def write_json(path: str | os.PathLike[str], data: Any) -> Path:
    """`write_whole` for a value that JSON can hold."""
    return write_whole(path, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())


def file_sha256(path: str | os.PathLike[str]) -> str:
    """sha256 of a file's content, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
