"""Bringing an index up to date with folders: read, hash and decode in threads while the encoder runs, kept in whole steps.

What is written is a new segment (aside, then renamed) and one transaction; a kill at any moment leaves the index as it was after the last
step, and the next run goes on from there.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from runtime.backends import available_threads
from runtime.errors import SearchError
from runtime.index_files import put_content, put_file, put_segment
from runtime.index_models import identity, said, same_model
from runtime.index_scan import Found, Picture, read_picture, walk
from runtime.index_segments import remove_strangers
from runtime.index_writing import merge, named, new_segment, settle, writing

if TYPE_CHECKING:
    from runtime.index import Index

COMMIT_ROWS, COMMIT_SECONDS = 1024, 10.0
"""A step is kept after so many new pictures or so long: what a kill can cost."""
AHEAD_BYTES = 128 << 20
"""Decoded pictures that wait for the encoder, together."""
_RACY_NS = 2_000_000_000
"""A file changed this shortly before it was read may have changed again within the clock's tick."""


@dataclass(kw_only=True)
class Report:
    """What `add` found and did, in files.

    Attributes:
        added: new contents, embedded. known: new paths whose content had a vector (of which `moved` from a path that is gone).
        unchanged: neither size nor time changed. updated: known paths with other content, among `added` and `known`.
        deleted: gone from the folders. vanished: gone while indexing.
        failed: path and reason of each file that is no usable picture; they are remembered, and tried again when they change.
        unreadable: path and reason of each folder that cannot be listed; what the index knows below it is kept.
        seconds: of the whole run. images_per_s: pictures embedded a second, reading and decoding included.
    """

    added: int = 0
    known: int = 0
    moved: int = 0
    unchanged: int = 0
    updated: int = 0
    deleted: int = 0
    vanished: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    images_per_s: float = 0.0


def add(index: Index, roots: Sequence[bytes], *, progress: Callable[[int, int, float], None] | None, threads: int | None, batch: int) -> Report:
    """Bring `index` up to date with `roots` (absolute). Files that are gone are forgotten, moved ones keep their vectors.

    Args:
        progress: called with (files done, files to do, pictures embedded a second).
        threads: that read and decode; None = as many as processors.
        batch: pictures of one run of the encoder.

    Raises:
        SearchError: a root is not there, another process writes, or the index belongs to another model.
    """
    clip = index.clip
    if clip is None:
        raise SearchError(f"{index.folder} was opened without a model; give Index.open one to add pictures with")
    if not same_model(index.settings["model"], identity(clip.manifest)):
        raise SearchError(f"{index.folder} was made by {said(index.settings['model'])}; only that model can add to it, an adapter serves queries alone")
    for root in roots:
        if not os.path.exists(root):
            raise SearchError(f"{os.fsdecode(root)} does not exist; give a folder of pictures, or a picture (to forget a folder that is gone, remove it)")
    with writing(index):
        return _Adding(index, progress).run(roots, threads or available_threads(), batch)


class _Adding:
    """One run of `add`: what waits for the encoder, and what waits to be kept."""

    def __init__(self, index: Index, progress: Callable[[int, int, float], None] | None) -> None:
        assert index.clip is not None
        self.index, self.clip = index, index.clip
        self.progress = progress or (lambda done, total, rate: None)
        self.report = Report()
        self.known = index.files.known()
        self.waiting: list[Picture] = []
        self.vectors: list[np.ndarray] = []
        self.hashes: list[bytes] = []
        self.rows: list[Picture] = []
        self.kept = time.monotonic()
        self.before: dict[bytes, tuple[int, int, int, int | None, int]] = {}
        self.fresh: list[int] = []

    def run(self, roots: Sequence[bytes], threads: int, batch: int) -> Report:
        started = time.monotonic()
        remove_strangers(self.index.vectors.folder, named(self.index))
        todo, missing = self._look(roots)
        try:
            self._read(todo, threads, batch, started)
        finally:
            # Interrupted or not: what the encoder has done is kept.
            self._keep()
        self._forget(missing)
        settle(self.index)
        self.report.seconds = time.monotonic() - started
        return self.report

    def _look(self, roots: Sequence[bytes]) -> tuple[list[Found], list[bytes]]:
        """Files to read, and paths that the index knows and the folders do not show."""
        unreadable: list[tuple[bytes, str]] = []
        todo: dict[bytes, Found] = {}
        seen: set[bytes] = set()
        for root in roots:
            self.before.update(self.index.files.below(root))
            for found in walk(root, unreadable):
                if found.path in seen:
                    continue
                seen.add(found.path)
                row = self.before.get(found.path)
                same = row is not None and row[:2] == (found.bytes, found.mtime_ns) and found.mtime_ns < row[2] - _RACY_NS
                if same and row is not None and (row[3] is not None or row[4]):
                    self.report.unchanged += 1
                else:
                    todo[found.path] = found
        self.report.unreadable = [(os.fsdecode(path), reason) for path, reason in unreadable]
        return list(todo.values()), [path for path in self.before if path not in seen]

    def _read(self, todo: Sequence[Found], threads: int, batch: int, started: float) -> None:
        config = self.clip.preprocess_config
        picture_bytes = 12 * config.image_size**2
        ahead = max(2 * threads, min(4 * batch, AHEAD_BYTES // picture_bytes))
        pending: deque[Future[Picture]] = deque()
        files = iter(todo)
        done = 0
        pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        try:
            while True:
                while len(pending) < ahead and (file := next(files, None)) is not None:
                    pending.append(pool.submit(read_picture, file, config, self.known))
                if not pending:
                    break
                self._take(pending.popleft().result())
                done += 1
                if len(self.waiting) >= batch:
                    self._encode()
                if len(self.hashes) >= COMMIT_ROWS or time.monotonic() - self.kept > COMMIT_SECONDS:
                    self._encode()
                    self._keep()
                self.report.images_per_s = self.report.added / max(time.monotonic() - started, 1e-9)
                self.progress(done, len(todo), self.report.images_per_s)
            self._encode()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _take(self, picture: Picture) -> None:
        report, path = self.report, picture.file.path
        if picture.gone:
            report.vanished += 1
            return
        if picture.reason:
            report.failed.append((os.fsdecode(path), picture.reason))
        elif path in self.before:
            report.updated += 1
        if picture.pixels is not None and picture.hash not in self.known:
            self.known.add(picture.hash)
            self.waiting.append(picture)
            return
        if not picture.reason:
            report.known += 1
        self.rows.append(_without_pixels(picture) if picture.pixels is not None else picture)

    def _encode(self) -> None:
        if self.waiting:
            batch, self.waiting = self.waiting, []
            self.vectors.append(self.clip.encode_pixels(np.stack([picture.pixels for picture in batch if picture.pixels is not None])))
            self.hashes += [picture.hash for picture in batch]
            self.rows += [_without_pixels(picture) for picture in batch]
            self.report.added += len(batch)

    def _keep(self) -> None:
        """One step: a segment of the new vectors, then its rows and those of all files read, in one transaction."""
        vectors, hashes, rows = self.vectors, self.hashes, self.rows
        self.vectors, self.hashes, self.rows, self.kept = [], [], [], time.monotonic()
        if not rows:
            return
        files = self.index.files
        if hashes:
            number, facts = new_segment(self.index, np.concatenate(vectors))
        with files.change() as db:
            if hashes:
                put_segment(db, number, len(hashes), facts)
                for row, digest in enumerate(hashes):
                    put_content(db, digest, number, row)
            now = time.time_ns()
            for picture in rows:
                content = db.execute("SELECT id FROM contents WHERE hash=?", (picture.hash,)).fetchone() if picture.hash and not picture.reason else None
                if content is None and not picture.reason:
                    continue  # its content was still with the encoder when the run was interrupted: read again by the next
                file = picture.file
                values = (file.path, file.bytes, file.mtime_ns, now, picture.taken, int(picture.exif))
                put_file(db, (*values, content[0] if content else None, picture.reason or None, int(picture.final)))
                if content and picture.known:
                    self.fresh.append(content[0])
        self.index.refresh(force=True)
        if hashes:
            merge(self.index)

    def _forget(self, missing: Sequence[bytes]) -> None:
        """Drop the rows of files that are gone for certain; what merely cannot be looked at stays."""
        gone = []
        for path in missing:
            try:
                os.lstat(path)
                if not os.path.exists(path):  # a link to nowhere
                    gone.append(path)
            except (FileNotFoundError, NotADirectoryError):
                gone.append(path)
            except OSError:
                pass
        with self.index.files.change() as db:
            db.executemany("DELETE FROM files WHERE path=?", [(path,) for path in gone])
        self.report.deleted = len(gone)
        old = {self.before[path][3] for path in gone}
        self.report.moved = sum(content in old for content in self.fresh)


def _without_pixels(picture: Picture) -> Picture:
    return Picture(file=picture.file, hash=picture.hash, taken=picture.taken, exif=picture.exif)
