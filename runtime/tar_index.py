"""Where the members of an uncompressed tar lie, found by one walk over its headers; nothing is ever unpacked.

Our own walk: tarfile builds an object a member and forgives a cut. A shard is read *strictly*, where the first sample that cannot be
used is an error, or *leniently*, where it is left out and told: one bad sample must not stop a run over a billion. A file that is no
sound tar (truncated, compressed, a wrong checksum) is an error in both.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.errors import PairsError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
BLOCK = 512
IMAGE, TEXT, META = 0, 1, 2
KIND_NAMES = ("picture", "caption (.txt)", "facts file (.json)")
CORRECT = "make the shard again"
_KIND = {**dict.fromkeys(IMAGE_EXTENSIONS, IMAGE), "txt": TEXT, "json": META}
_AGAIN = "make the shard again or fetch it once more"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """A sample, or a member of one, that is left out: its key (or the member's name), its shard, and one sentence."""

    key: str
    shard: str
    reason: str


def index_shard(path: Path, strict: bool = True, name: str = "") -> tuple[dict[str, np.ndarray], list[Rejected], tuple[int, int]]:
    """Index the shard at `path`, called `name` (by default as the file is).

    Returns key -> (3, 2) int64 (offset and size of picture, caption, facts; offset -1 = absent) in the order of the tar, what was left
    out, one entry a key (none when `strict`), and the shard's (bytes, mtime in ns).

    Raises:
        PairsError: the file is no sound tar; when `strict` also a link or special file, a member name that leaves the folder, a member
            twice, a sample without a picture.
    """
    name = name or path.name.removesuffix(".tar")
    samples: dict[str, np.ndarray] = {}
    rejected: dict[str, Rejected] = {}

    def refuse(key: str, problem: str, outcome: str) -> None:
        if strict:
            raise PairsError(f"{path}{problem}; {CORRECT}")
        rejected.setdefault(key, Rejected(key=key, shard=name, reason=f"{name}.tar{problem}; {outcome}"))

    try:
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            if facts.st_size == 0:
                raise PairsError(f"{path} is empty (0 bytes), expected a tar shard; {CORRECT}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                for member, offset, size, link in tar_members(view, path):
                    if link is not None:
                        refuse(member, f" holds a link or special file at byte {offset} (tar type {link!r}), expected regular files", "the member is left out")
                        continue
                    folder, slash, base = member.removeprefix("./").rpartition("/")
                    stem, dot, extension = base.partition(".")
                    kind = _KIND.get(extension.lower())
                    if not stem or not dot or kind is None:
                        continue  # not part of a sample that we read
                    if ".." in folder.split("/") or member.startswith("/"):
                        refuse(member, f" holds the member '{member}', whose name leaves the folder; expected names inside it", "the member is left out")
                        continue
                    key = folder + slash + stem
                    spans = samples.setdefault(key, np.full((3, 2), -1, dtype=np.int64))
                    if spans[kind, 0] >= 0:
                        refuse(key, f" holds a second {KIND_NAMES[kind]} for the sample '{key}', expected one", "the first is kept")
                        continue
                    spans[kind] = offset, size
    except OSError as error:
        raise PairsError(f"{path} cannot be read ({error.strerror or error}); check that it is a readable file") from error
    for key in [key for key, spans in samples.items() if spans[IMAGE, 0] < 0]:
        refuse(key, f" has no picture for the sample '{key}', expected {key}.jpg, .png or .webp", "the sample is left out")
        del samples[key]
    return samples, list(rejected.values()), (facts.st_size, facts.st_mtime_ns)


def tar_members(view: mmap.mmap, path: Path) -> Iterator[tuple[str, int, int, bytes | None]]:
    """Name, offset, size and None of every regular file; name, offset of its header, 0 and tar type of a link or special file."""
    if view[:2] == b"\x1f\x8b":
        raise PairsError(f"{path} is gzip data under the name of a tar, and only uncompressed shards are random access; unpack it first (gunzip)")
    position = 0
    long_name: str | None = None  # set by an extended header for the member that follows it
    long_size: int | None = None
    while (header := _header(view, position, path)) is not None:
        kind = header[156:157]
        size = _number(header[124:136])
        if long_size is not None and kind not in b"xgLK":
            size = long_size
        here, start = position, position + BLOCK
        if kind in b"123456":
            size = 0  # links and special files have no content, whatever the field says
        if size is None:
            raise PairsError(f"{path} is not a sound tar: the header at byte {position} has no valid size; {CORRECT}")
        if start + size > len(view):
            left = max(0, len(view) - start)
            raise PairsError(f"{path} is truncated: the member at byte {position} needs {size} bytes, {left} are left; {_AGAIN}")
        position = start + -(-size // BLOCK) * BLOCK
        if kind == b"L":
            long_name = _text(view[start : start + size].rstrip(b"\0"), path)
        elif kind == b"x":
            records = _pax_records(view[start : start + size], path)
            long_name = records.get("path", long_name)
            long_size = int(records["size"]) if records.get("size", "").isdecimal() else None
        elif kind in (b"0", b"\0", b"7", b"5"):
            name = long_name if long_name is not None else _header_name(header, path)
            long_name = long_size = None
            if kind != b"5" and not name.endswith("/"):
                yield name, start, size, None
        elif kind not in b"gK":
            name = long_name if long_name is not None else _header_name(header, path)
            long_name = long_size = None
            yield name, here, 0, kind


def _header(view: mmap.mmap, position: int, path: Path) -> bytes | None:
    """The header block at a position, its checksum proven; None at the end-of-archive mark."""
    header = view[position : position + BLOCK]
    if len(header) < BLOCK:
        raise PairsError(f"{path} is truncated: it ends at byte {len(view)} without an end-of-archive mark; {_AGAIN}")
    if not any(header):
        second = view[position + BLOCK : position + 2 * BLOCK]
        if len(second) < BLOCK or any(second):
            raise PairsError(f"{path} is truncated: half an end-of-archive mark at byte {position}; {_AGAIN}")
        return None
    if _number(header[148:156]) != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
        raise PairsError(f"{path} is not a sound tar: the header at byte {position} has a wrong checksum; {_AGAIN}")
    return header


def _number(field: bytes) -> int | None:
    """An octal or (GNU) base-256 number of a tar header; None when it is neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\0", 1)[0].strip()
    try:
        return int(text or b"0", 8) if b"_" not in text and not text.startswith((b"-", b"+")) else None
    except ValueError:
        return None


def _header_name(header: bytes, path: Path) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name, path)


def _text(name: bytes, path: Path) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PairsError(f"{path} holds a member whose name {name!r} is not UTF-8; {CORRECT}") from error


def _pax_records(data: bytes, path: Path) -> dict[str, str]:
    records: dict[str, str] = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(data):
            raise PairsError(f"{path} is not a sound tar: an extended header cannot be read; {CORRECT}")
        name, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if name in (b"path", b"size"):
            records[name.decode()] = _text(value, path)
        data = data[int(length) :]
    return records


