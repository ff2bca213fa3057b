"""What changes an index, under its lock: new segments, merging them, forgetting files.

Files of segments come first, the transaction that names them after; old files go last. A kill between any two of these leaves a whole index.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.errors import SearchError
from runtime.index_coding import Coding, binary_frame
from runtime.index_files import condition, damaged, put_content, put_file, put_segment
from runtime.index_scan import HASH_BYTES
from runtime.index_segments import remove_strangers
from runtime.index_vectors import LISTS_FROM, to_merge

MANY = 32
"""Segments that `add_vectors` leaves before it merges the small ones; `settle` leaves fewer."""

if TYPE_CHECKING:
    from runtime.index import Index


@contextlib.contextmanager
def writing(index: Index) -> Iterator[None]:
    """Hold the index's lock; it goes with the process, however that ends. Raises SearchError when another process holds it."""
    path = index.folder / "lock"
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise SearchError(f"{index.folder} cannot be written ({error.strerror or error}); check its permissions") from error
    try:
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            else:
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(lock, 20, 1).decode("ascii", "replace").strip() if hasattr(os, "pread") else ""
            who = f"process {holder}" if holder.isdecimal() else "another process"
            raise SearchError(f"{index.folder} is being written by {who}; wait until it is done, searching works meanwhile") from error
        os.ftruncate(lock, 0)
        os.lseek(lock, 0, os.SEEK_SET)
        os.write(lock, b" %d\n" % os.getpid())  # the first byte is the one that Windows locks
        yield
    finally:
        os.close(lock)


def new_segment(index: Index, vectors: np.ndarray) -> tuple[int, dict[str, dict[str, Any]]]:
    """Write float32 (n, width) as the files of a new segment: its number and what the table is to say of them."""
    if index.settings["dtype"] == "binary" and index.vectors.main.centre is None:
        dims = index.settings["dims"]
        centre, rotation = binary_frame(Coding(dtype="float16", dims=dims).prefix(vectors))
        index.files.set_meta("blob.centre", centre.astype("<f4").tobytes())
        index.files.set_meta("blob.rotation", rotation.astype("<f4").tobytes())
        index.vectors.main = Coding(dtype="binary", dims=dims, centre=centre, rotation=rotation)
    number = index.files.next_segment()
    return number, index.vectors.write(number, vectors)


def merge(index: Index) -> None:
    """Make one segment of several small ones, as long as there are such."""
    while chosen := to_merge({number: rows for number, (rows, _) in index.files.segments().items()}):
        _replace(index, chosen)


def settle(index: Index) -> None:
    """Leave the index as searching likes it: few segments, little dead, lists on the large ones."""
    merge(index)
    live = dict(index.files.rows("SELECT segment, count(*) FROM contents WHERE files > 0 GROUP BY segment"))
    for number, (rows, _) in index.files.segments().items():
        if live.get(number, 0) < 0.75 * rows:
            _replace(index, [number])
    for number, (rows, files) in index.files.segments().items():
        if rows >= LISTS_FROM and "lists" not in files:
            facts = index.vectors.add_lists(number)
            with index.files.change() as db:
                put_segment(db, number, rows, {**files, "lists": facts})
            index.refresh(force=True)


def _replace(index: Index, chosen: Sequence[int]) -> None:
    """Copy the live rows of these segments into a new one, switch over in one transaction, remove the old files."""
    files = index.files
    marks = ",".join("?" * len(chosen))
    every = files.rows(f"SELECT segment, row, id, hash, files FROM contents WHERE segment IN ({marks}) ORDER BY segment, row", chosen)
    table = files.segments()
    if len(every) != sum(table[old][0] for old in chosen):
        raise damaged(files.path, f"{len(every)} contents for segments {', '.join(map(str, chosen))}")
    rows = [row for row in every if row[4]]
    number = files.next_segment()
    taken = [(old, np.array([row[1] for row in rows if row[0] == old], np.int64)) for old in sorted(chosen)]
    facts = index.vectors.merge(number, [(old, part) for old, part in taken if len(part)]) if rows else {}
    with files.change() as db:
        db.execute(f"DELETE FROM contents WHERE segment IN ({marks})", chosen)
        for place, (_, _, content, digest, count) in enumerate(rows):
            put_content(db, digest, number, place, content, count)
        db.execute(f"DELETE FROM segments WHERE id IN ({marks})", chosen)
        if rows:
            put_segment(db, number, len(rows), facts)
    index.refresh(force=True)
    for old in chosen:
        for kind in table[old][1]:
            index.vectors.path(old, kind).unlink(missing_ok=True)


def add_vectors(index: Index, paths: Sequence[bytes], vectors: np.ndarray, taken: str) -> None:
    """One segment of vectors that were made elsewhere; the bytes of a vector stand for the content of its file."""
    if vectors.shape != (len(paths), index.settings["width"]) or not np.isfinite(vectors).all():
        raise SearchError(f"vectors have shape {vectors.shape}, expected ({len(paths)}, {index.settings['width']}), all finite")
    vectors = np.ascontiguousarray(vectors, np.float32)
    with writing(index):
        remove_strangers(index.vectors.folder, named(index))
        hashes = [hashlib.sha256(row).digest()[:HASH_BYTES] for row in vectors]
        known = index.files.known(hashes)
        first = {digest: row for row, digest in reversed(list(enumerate(hashes))) if digest not in known}
        rows = sorted(first.values())
        now = time.time_ns()
        if rows:
            number, facts = new_segment(index, vectors[rows])
        with index.files.change() as db:
            if rows:
                put_segment(db, number, len(rows), facts)
                for place, row in enumerate(rows):
                    put_content(db, hashes[row], number, place)
            for path, digest in zip(paths, hashes, strict=True):
                content = db.execute("SELECT id FROM contents WHERE hash=?", (digest,)).fetchone()[0]
                put_file(db, (path, 0, 0, now, taken, 0, content, None, 0))
        index.refresh(force=True)
        if len(index.files.segments()) > MANY:  # each is an open file
            merge(index)


def named(index: Index) -> set[str]:
    """Names of all files that the table of segments knows."""
    return {f"{number:06d}.{kind}" for number, (_, files) in index.files.segments().items() for kind in files}


def remove(index: Index, path: bytes) -> int:
    """Forget all files at or below a path (absolute)."""
    with writing(index):
        where, values = condition(folder=path)
        with index.files.change() as db:
            count = db.execute(f"DELETE FROM files WHERE {where}", values).rowcount
        settle(index)
    return int(count)
