"""Immutable files of records: written aside, flushed, renamed; read by row or by block, every record compared with its checksum.

A file is safetensors with one array, `records`, uint8 (n, record_bytes). Format: docs/index-format.md (normative).
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import SearchError
from runtime.index_coding import Coding, broken, sealed
from runtime.index_files import damaged

BLOCK = 4096
"""Records that are read, checked and scored at once."""


def write_records(path: Path, coding: Coding, n: int, parts: Iterable[np.ndarray]) -> dict[str, Any]:
    """Write `n` records that come in `parts` (uint8 (m, record_bytes), row numbers already in their checksums).

    Returns:
        What the index remembers of the file: `bytes`, `sha256`, and `head` (sha256 of the header alone).
    """
    metadata = {"format": "mclip-index", "dtype": coding.dtype, "dims": str(coding.dims)}
    entry = {"dtype": "U8", "shape": [n, coding.record_bytes], "data_offsets": [0, n * coding.record_bytes]}
    return write_tensors(path, {"__metadata__": metadata, "records": entry}, parts)


def write_tensors(path: Path, header: dict[str, Any], parts: Iterable[np.ndarray]) -> dict[str, Any]:
    """A safetensors file, streamed: the header as given, then the bytes of `parts`."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    head = struct.pack("<Q", len(text)) + text
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    digest, size = hashlib.sha256(head), len(head)
    try:
        with part.open("wb") as file:
            file.write(head)
            for data in parts:
                piece = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
                file.write(piece)
                digest.update(piece)
                size += len(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise SearchError(f"{path} cannot be written ({error.strerror or error}); what was indexed before is kept, free some space and run the same command again") from error
    finally:
        part.unlink(missing_ok=True)
    return {"bytes": size, "sha256": digest.hexdigest(), "head": hashlib.sha256(head).hexdigest()}


def read_head(path: Path, facts: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """(start of the data, header) of a file that the index knows by `facts`. Raises SearchError when it is not that file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != facts["bytes"]:
                raise damaged(path, f"{size} bytes, the index says {facts['bytes']}")
            first = file.read(8)
            (length,) = struct.unpack("<Q", first)
            if length > min(size - 8, 1 << 20):
                raise damaged(path, "its header does not fit")
            text = file.read(length)
    except OSError as error:
        raise damaged(path, f"it cannot be read: {error.strerror or error}") from error
    except struct.error as error:
        raise damaged(path, "it is cut short") from error
    if hashlib.sha256(first + text).hexdigest() != facts["head"]:
        raise damaged(path, "its header was changed")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, "its header is not JSON") from error
    return 8 + length, header


class Records:
    """An open file of records.

    Attributes:
        n: rows.
    """

    def __init__(self, path: Path, coding: Coding, facts: dict[str, Any]) -> None:
        self.path, self.coding = path, coding
        self._start, header = read_head(path, facts)
        try:
            self.n, width = header["records"]["shape"]
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(path, "its header names no records") from error
        if type(self.n) is not int or width != coding.record_bytes or not 0 <= self.n * coding.record_bytes <= facts["bytes"] - self._start:
            raise damaged(path, f"{str(self.n)[:40]} records of {str(width)[:40]} bytes, the index expects records of {coding.record_bytes} in {facts['bytes']} bytes")
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._lock = threading.Lock()
        self._checked = np.zeros(-(-self.n // BLOCK), bool)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def block(self, start: int, stop: int) -> np.ndarray:
        """Records `start` to `stop`, uint8. A block of BLOCK rows is compared with its checksums when it is first read."""
        size = self.coding.record_bytes
        found = np.frombuffer(self._read(start * size, (stop - start) * size), np.uint8).reshape(-1, size)
        if start % BLOCK or not self._checked[start // BLOCK] or stop - start > BLOCK:
            self._refuse(found, np.arange(start, stop))
            if start % BLOCK == 0 and stop == min(start + BLOCK, self.n):
                self._checked[start // BLOCK] = True
        return found

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Records of these rows, uint8, each compared with its checksum: read one by one, so that nothing else becomes resident."""
        size, start = self.coding.record_bytes, self._start
        if hasattr(os, "pread"):
            fd = self._fd
            data = b"".join([os.pread(fd, size, start + row * size) for row in rows.tolist()])
        else:
            data = b"".join([self._read(row * size, size) for row in rows.tolist()])
        if len(data) != len(rows) * size:
            raise damaged(self.path, "it is shorter than its header says")
        found = np.frombuffer(data, np.uint8).reshape(-1, size)
        self._refuse(found, rows)
        return found

    def scores(self, query: np.ndarray) -> np.ndarray:
        """Inner product of every row with float32 (dims,) -> float32 (n,)."""
        found = np.empty(self.n, np.float32)
        for start in range(0, self.n, BLOCK):
            stop = min(start + BLOCK, self.n)
            found[start:stop] = self.coding.scores(self.block(start, stop), query)
        return found

    def vectors(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` decoded, float32 (m, dims)."""
        return self.coding.decode(self.block(start, stop))

    def _read(self, offset: int, size: int) -> bytes:
        if hasattr(os, "pread"):
            data = os.pread(self._fd, size, self._start + offset)
        else:
            with self._lock:
                os.lseek(self._fd, self._start + offset, os.SEEK_SET)
                data = os.read(self._fd, size)
        if len(data) != size:
            raise damaged(self.path, "it is shorter than its header says")
        return data

    def _refuse(self, records: np.ndarray, rows: np.ndarray) -> None:
        wrong = broken(records, rows)
        if len(wrong):
            raise damaged(self.path, f"row {rows[wrong[0]]} does not match its checksum")


def resealed(records: np.ndarray, first: int) -> np.ndarray:
    """A copy of records for other row numbers."""
    return sealed(records.copy(), first)


def remove_strangers(folder: Path, known: set[str]) -> None:
    """Remove what an interrupted writer left: files that no segment names."""
    for path in folder.iterdir():
        if path.name not in known:
            path.unlink(missing_ok=True)
