"""The rows of a photo index: which file has which content, which content has which vector. SQLite in WAL mode.

Every row carries a checksum of its own, compared when the row is read: SQLite itself would not notice a changed byte in a path.
Format: docs/index-format.md (normative).
"""

from __future__ import annotations

import functools
import json
import os
import re
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from runtime.errors import SearchError

SCHEMA = 1
_TABLES = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value BLOB NOT NULL, crc INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE segments(id INTEGER PRIMARY KEY AUTOINCREMENT, rows INTEGER NOT NULL, files TEXT NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE contents(id INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE, segment INTEGER NOT NULL, row INTEGER NOT NULL, crc INTEGER NOT NULL,
                      files INTEGER NOT NULL);
CREATE UNIQUE INDEX contents_place ON contents(segment, row);
CREATE TABLE files(path BLOB PRIMARY KEY, bytes INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, seen_ns INTEGER NOT NULL, taken TEXT NOT NULL,
                   exif INTEGER NOT NULL, content INTEGER, reason TEXT, final INTEGER NOT NULL, crc INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX files_content ON files(content);
CREATE TRIGGER file_comes AFTER INSERT ON files WHEN new.content IS NOT NULL BEGIN UPDATE contents SET files = files + 1 WHERE id = new.content; END;
CREATE TRIGGER file_goes AFTER DELETE ON files WHEN old.content IS NOT NULL BEGIN UPDATE contents SET files = files - 1 WHERE id = old.content; END;
"""
_COLUMNS = "path, bytes, mtime_ns, seen_ns, taken, exif, content, reason, final, crc"
_LOOKUP = 500  # variables of one statement


def row_crc(*values: Any) -> int:
    """CRC-32 of a row: its values as bytes (numbers decimal, NULL empty, texts UTF-8), each followed by 0x1F."""
    parts = [
        value if type(value) is bytes else b"" if value is None else b"%d" % value if type(value) is int else str(value).encode("utf-8", "surrogateescape")
        for value in values
    ]
    return zlib.crc32(b"\x1f".join(parts) + b"\x1f")


def _layout(db: sqlite3.Connection) -> list[tuple[str, ...]]:
    return sorted(db.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%'").fetchall())


@functools.cache
def _own_layout() -> list[tuple[str, ...]]:
    """What an index is made of. A stranger's file may hold a view that never ends in a table's place, or triggers of its own."""
    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript(_TABLES)
        return _layout(db)


class Files:
    """An open `index.sqlite`. Methods may be called from any thread."""

    def __init__(self, path: Path, *, create: bool = False, write: bool = False) -> None:
        self.path = path
        self._lock = threading.RLock()
        with self._said():
            if create:
                self.db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30)
                self.db.execute("PRAGMA journal_mode=WAL")
            else:
                self.db = self._open(write)
            self.db.execute("PRAGMA trusted_schema=OFF")
            self.db.execute("PRAGMA synchronous=NORMAL")
            self.db.execute("PRAGMA recursive_triggers=ON")  # a replaced row counts as one that goes and one that comes
            if create:
                self.db.executescript(f"BEGIN;{_TABLES}PRAGMA user_version={SCHEMA};COMMIT;")
            schema = self.db.execute("PRAGMA user_version").fetchone()[0]
            own = schema != SCHEMA or _layout(self.db) == _own_layout()
        if not own:
            self.close()
            raise damaged(path, "it has other tables, views or triggers than an index has")
        if schema != SCHEMA:
            self.close()
            raise SearchError(f"{path} has schema {schema}, this version reads schema {SCHEMA}; upgrade, or make the index again with 'mclip index'")

    def _open(self, write: bool) -> sqlite3.Connection:
        """Read and write where the folder allows it (WAL readers keep a shared file there); from a read-only medium as an immutable file."""
        uri = self.path.resolve().as_uri()
        may_write = os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK)
        if write and not may_write:
            raise SearchError(f"{self.path} cannot be written; check its permissions, or make an index elsewhere with --out")
        return sqlite3.connect(uri + ("?mode=rw" if may_write else "?mode=ro&immutable=1"), uri=True, check_same_thread=False, isolation_level=None, timeout=30)

    @contextmanager
    def _said(self) -> Iterator[None]:
        """SQLite's errors as one sentence."""
        with self._lock:
            try:
                yield
            except sqlite3.OperationalError as error:
                if "locked" in str(error) or "busy" in str(error):
                    raise SearchError(f"{self.path} is being written by another process that does not let go ({error}); try again when it is done") from error
                raise SearchError(f"{self.path} cannot be used ({error}); check the disk, or make the index again with 'mclip index'") from error
            except (sqlite3.DatabaseError, UnicodeDecodeError, OverflowError) as error:
                raise damaged(self.path, str(error)) from error

    @contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it or nothing."""
        with self._said():
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield self.db
                self.db.execute("COMMIT")
            finally:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """What is read inside belongs to one moment, whatever other processes write meanwhile."""
        with self._said():
            self.db.execute("BEGIN")
            try:
                yield
            finally:
                if self.db.in_transaction:
                    self.db.execute("COMMIT")

    def rows(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        with self._said():
            return self.db.execute(statement, values).fetchall()

    def version(self) -> int:
        """A number that changes when another connection has written."""
        return int(self.rows("PRAGMA data_version")[0][0])

    def close(self) -> None:
        """Close the connection; the last one to close leaves a single file."""
        with self._lock:
            self.db.close()

    # ------------------------------------------------------------ settings

    def meta(self, key: str) -> Any:
        """A setting, or None."""
        found = self.rows("SELECT value, crc FROM meta WHERE key=?", (key,))
        if not found:
            return None
        value, crc = found[0]
        if row_crc(key, value) != crc:
            raise damaged(self.path, f"the setting '{key}' does not match its checksum")
        return value if key.startswith("blob.") else json.loads(value)

    def set_meta(self, key: str, value: Any) -> None:
        """Keep a setting: JSON, or bytes where the key starts with "blob."."""
        data = value if key.startswith("blob.") else json.dumps(value, sort_keys=True).encode()
        with self.change() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES(?,?,?)", (key, data, row_crc(key, data)))

    # ------------------------------------------------------------ segments and contents

    def segments(self) -> dict[int, tuple[int, dict[str, dict[str, Any]]]]:
        """Segment number -> (rows, facts of its files by kind)."""
        found = {}
        for number, rows, files, crc in self.rows("SELECT id, rows, files, crc FROM segments ORDER BY id"):
            if row_crc(number, rows, files) != crc:
                raise damaged(self.path, f"the entry of segment {number} does not match its checksum")
            try:
                facts = json.loads(files)
                sound = type(rows) is int and isinstance(facts, dict) and all(isinstance(one, dict) and type(one.get("bytes")) is int for one in facts.values())
            except (ValueError, TypeError, RecursionError):
                sound = False
            if not sound:
                raise damaged(self.path, f"the entry of segment {number} is none that this program writes")
            found[number] = (rows, facts)
        return found

    def next_segment(self) -> int:
        """The number of the next segment: never one that was used before."""
        found = self.rows("SELECT seq FROM sqlite_sequence WHERE name='segments'")
        return (found[0][0] if found else 0) + 1

    def known(self, among: Sequence[bytes] | None = None) -> set[bytes]:
        """Hashes of all contents that have a vector, or of those among some."""
        if among is None:
            return {row[0] for row in self.rows("SELECT hash FROM contents")}
        found: set[bytes] = set()
        for start in range(0, len(among), _LOOKUP):
            part = among[start : start + _LOOKUP]
            found |= {row[0] for row in self.rows(f"SELECT hash FROM contents WHERE hash IN ({','.join('?' * len(part))})", part)}
        return found

    def found(self, segment: int, rows: Sequence[int], where: str = "", values: Sequence[Any] = ()) -> dict[int, list[tuple[bytes, str]]]:
        """Row of a segment -> [(path, taken)] of its files in order of path; `where` (from `condition`) narrows the files, not the check of their number."""
        columns = ", ".join(f"files.{name.strip()}" for name in _COLUMNS.split(","))
        statement = f"SELECT contents.id, contents.hash, row, contents.crc, contents.files, {where or 1}, {columns} FROM contents LEFT JOIN files ON files.content = contents.id"
        paths: dict[int, list[tuple[bytes, str]]] = {}
        left: dict[int, int] = {}
        for number, hash, row, crc, files, passes, *file in self._many(f"{statement} WHERE segment=? AND row IN ", rows, (*values, segment)):
            if row not in left:
                if row_crc(number, hash, segment, row) != crc:
                    raise damaged(self.path, f"content {number} does not match its checksum")
                left[row], paths[row] = files, []
            if file[0] is not None:
                self._check_file(file[:-1], file[-1])
                left[row] -= 1
                if passes:
                    paths[row].append((file[0], file[4]))
        if len(left) != len(set(rows)) or any(left.values()):
            raise damaged(self.path, f"rows of segment {segment} lack their files")
        for entry in paths.values():
            entry.sort()
        return paths

    def check_contents(self, segment: int, rows: Sequence[int]) -> None:
        """Compare the contents of rows of a segment with their checksums. Raises SearchError."""
        found = 0
        for number, hash, row, crc in self._many("SELECT id, hash, row, crc FROM contents WHERE segment=? AND row IN ", rows, (segment,)):
            found += 1
            if row_crc(number, hash, segment, row) != crc:
                raise damaged(self.path, f"content {number} does not match its checksum")
        if found != len(rows):
            raise damaged(self.path, f"{len(rows) - found} rows of segment {segment} have no content")

    # ------------------------------------------------------------ files

    def files_of(self, contents: dict[int, int]) -> dict[int, list[bytes]]:
        """Content -> paths of its files, for contents with how many files each must have."""
        paths: dict[int, list[bytes]] = {number: [] for number in contents}
        for *row, crc in self._many(f"SELECT {_COLUMNS} FROM files WHERE content IN ", list(contents)):
            self._check_file(row, crc)
            paths[row[6]].append(row[0])
        if any(len(paths[number]) != count for number, count in contents.items()):
            raise damaged(self.path, "contents lack their files")
        return paths

    def check_files(self, paths: Sequence[bytes]) -> None:
        """Compare rows with their checksums. Raises SearchError."""
        for *row, crc in self._many(f"SELECT {_COLUMNS} FROM files WHERE path IN ", paths):
            self._check_file(row, crc)

    def _check_file(self, row: Sequence[Any], crc: int) -> None:
        if row_crc(*row) != crc:
            raise damaged(self.path, f"the entry of {os.fsdecode(row[0])!r} does not match its checksum")

    def below(self, root: bytes) -> dict[bytes, tuple[int, int, int, int | None, int]]:
        """Path -> (bytes, mtime_ns, seen_ns, content, final) of the files at or below a folder."""
        where, values = condition(folder=root)
        return {row[0]: row[1:] for row in self.rows(f"SELECT path, bytes, mtime_ns, seen_ns, content, final FROM files WHERE {where}", values)}

    def _many(self, statement: str, values: Sequence[Any], before: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        for start in range(0, len(values), _LOOKUP):
            part = values[start : start + _LOOKUP]
            yield from self.rows(f"{statement}({','.join('?' * len(part))})", (*before, *part))


def put_file(db: sqlite3.Connection, values: Iterable[Any]) -> None:
    """Write a row of `files`: path, bytes, mtime_ns, seen_ns, taken, exif, content, reason, final."""
    row = tuple(values)
    db.execute("INSERT OR REPLACE INTO files VALUES(?,?,?,?,?,?,?,?,?,?)", (*row, row_crc(*row)))


def put_content(db: sqlite3.Connection, hash: bytes, segment: int, row: int, number: int | None = None, files: int = 0) -> int:
    """Write a row of `contents`; number: an existing one whose vector has moved, with the files that it has. Returns the number."""
    if number is None:
        number = (db.execute("SELECT max(id) FROM contents").fetchone()[0] or 0) + 1
    db.execute("INSERT OR REPLACE INTO contents VALUES(?,?,?,?,?,?)", (number, hash, segment, row, row_crc(number, hash, segment, row), files))
    return int(number)


def put_segment(db: sqlite3.Connection, number: int, rows: int, files: dict[str, dict[str, Any]]) -> None:
    """Write a row of `segments`."""
    text = json.dumps(files, sort_keys=True)
    db.execute("INSERT OR REPLACE INTO segments VALUES(?,?,?,?)", (number, rows, text, row_crc(number, rows, text)))


def condition(folder: bytes | None = None, since: str | None = None, until: str | None = None) -> tuple[str, list[Any]]:
    """SQL condition on `files` and its values: at or below a folder, taken from the begin of one date to the end of another.

    Dates are "YYYY", "YYYY-MM", "YYYY-MM-DD" or with "THH:MM" or "THH:MM:SS". Raises SearchError for others.
    """
    for date in (since, until):
        if date is not None and not re.fullmatch(r"\d{4}(-\d\d(-\d\d(T\d\d:\d\d(:\d\d)?)?)?)?", date):
            raise SearchError(f"'{date}' is no date; expected for example 2024, 2024-05, 2024-05-31 or 2024-05-31T18:00")
    parts: list[str] = []
    values: list[Any] = []
    if folder is not None:
        inside = folder.rstrip(b"/") + b"/"
        parts.append("(path = ? OR (path >= ? AND path < ?))")
        values += [folder, inside, inside[:-1] + b"0"]  # "0" follows "/"
    if since is not None:
        parts.append("taken >= ?")
        values.append(since)
    if until is not None:
        parts.append("taken < ?")
        values.append(until + "~")  # after every moment that begins like this
    return " AND ".join(parts), values


def damaged(path: Path, what: str) -> SearchError:
    """The error of everything that a changed byte can cause."""
    return SearchError(f"{path} is damaged ({what}); nothing of it is used: remove the index and make it again with 'mclip index', the pictures themselves are not touched")
