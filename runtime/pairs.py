"""Pairs: a folder of uncompressed WebDataset tar shards, read by random access with numpy and Pillow only.

A sample is every member of a shard whose name agrees up to the first dot of its file name (its *key*): one picture
(``KEY.jpg|jpeg|png|webp``), a caption (``KEY.txt``, UTF-8) and optional facts (``KEY.json``). Each shard's headers are
read once; afterwards a sample costs one slice of a memory map. Rows are numbered shard after shard (sorted by name),
inside a shard in the order of the tar, so a row number means the same everywhere: in the store, in training, on resume.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from runtime.errors import ImageError, PairsError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
BLOCK = 512
_OPEN_SHARDS = 64  # memory maps kept at once: bounds the file descriptors of a folder with thousands of shards
_IMAGE, _TEXT, _META = 0, 1, 2
_KIND = {**dict.fromkeys(IMAGE_EXTENSIONS, _IMAGE), "txt": _TEXT, "json": _META}
_KIND_NAMES = ("picture", "caption (.txt)", "facts file (.json)")
_CORRECT = "make the shard again"
_AGAIN = "make the shard again or fetch it once more"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One tar file of a pairs folder; its samples are the rows ``start <= row < stop``."""

    name: str
    path: Path
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardFacts:
    """What ``write_shard`` wrote: sha256 (hex) and length of the file, number of samples in it."""

    sha256: str
    bytes: int
    samples: int


class Pairs:
    """A pairs folder, opened by ``open_pairs``. Rows are random access; the object pickles (workers reopen the shards).

    Attributes:
        folder: where the shards lie.
        shards: the shards, sorted by name.
        keys: key of every row.
    """

    def __init__(self, folder: Path, shards: list[Shard], keys: list[str], spans: np.ndarray, stamps: list[tuple[int, int]]) -> None:
        self.folder = folder
        self.shards = shards
        self.keys = keys
        self._spans = spans  # (rows, 3, 2) int64: offset and size of picture, caption and facts; offset -1 = absent
        self._stamps = stamps  # per shard (bytes, mtime in ns) when it was indexed
        self._starts = np.array([shard.start for shard in shards], dtype=np.int64)
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": OrderedDict()}

    def __repr__(self) -> str:
        return f"Pairs({str(self.folder)!r}, {len(self)} pairs in {len(self.shards)} shards)"

    def shard_of(self, row: int) -> Shard:
        """The shard that holds a row."""
        return self.shards[self._shard_index(self._check(row))]

    def has_caption(self, row: int) -> bool:
        """Whether the sample has a ``.txt`` member (a picture alone is a valid sample)."""
        return bool(self._spans[self._check(row), _TEXT, 0] >= 0)

    def image_bytes(self, row: int) -> bytes:
        """The encoded picture as it lies in the shard."""
        return self._member(row, _IMAGE)

    def image(self, row: int) -> Image.Image:
        """The picture as RGB, turned upright, transparency composed on white. Raises ImageError when it does not decode."""
        data = self.image_bytes(row)
        try:
            return decode_image(data)
        except Exception as error:  # Pillow's plugins raise nearly anything on damaged bytes
            what = f"the picture ({len(data)} bytes) does not decode ({_short(error)})"
            raise ImageError(f"{self._where(row)}: {what}; replace or drop this sample") from error

    def caption(self, row: int) -> str:
        """The caption without surrounding white space. Raises PairsError when it is missing or not UTF-8."""
        try:
            return self._member(row, _TEXT).decode("utf-8").strip()
        except UnicodeDecodeError as error:
            found = f"byte {error.start} is 0x{error.object[error.start]:02x}"
            raise PairsError(f"{self._where(row)}: the caption is not UTF-8 ({found}); convert it to UTF-8") from error

    def meta(self, row: int) -> dict[str, Any]:
        """The facts of ``KEY.json`` ({} when the sample has none). Raises PairsError when it is not one JSON object."""
        if self._spans[self._check(row), _META, 0] < 0:
            return {}
        try:
            facts = json.loads(self._member(row, _META))
        except (ValueError, RecursionError) as error:
            raise PairsError(f"{self._where(row)}: the .json member is not valid JSON ({_short(error)}); {_CORRECT}") from error
        if not isinstance(facts, dict):
            raise PairsError(f"{self._where(row)}: the .json member holds a {type(facts).__name__}, expected one object; {_CORRECT}")
        return facts

    def _check(self, row: int) -> int:
        if not 0 <= row < len(self.keys):
            raise IndexError(f"row {row} of {len(self.keys)} pairs")
        return row

    def _shard_index(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def _where(self, row: int) -> str:
        return f"sample '{self.keys[row]}' of {self.shard_of(row).path}"

    def _member(self, row: int, kind: int) -> bytes:
        offset, size = self._spans[self._check(row), kind]
        if offset < 0:
            raise PairsError(f"{self._where(row)}: the {_KIND_NAMES[kind]} is missing; add it to the shard or drop the sample")
        return self._map(self._shard_index(row))[offset : offset + size]

    def _map(self, index: int) -> mmap.mmap:
        found = self._maps.get(index)
        if found is not None:
            self._maps.move_to_end(index)
            return found
        path = self.shards[index].path
        try:
            with path.open("rb") as file:
                facts = os.fstat(file.fileno())
                if (facts.st_size, facts.st_mtime_ns) != self._stamps[index]:
                    raise PairsError(f"{path} changed after it was opened; open the pairs again")
                found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise PairsError(f"{path} cannot be read any more ({error.strerror}); open the pairs again") from error
        self._maps[index] = found
        while len(self._maps) > _OPEN_SHARDS:
            self._maps.popitem(last=False)  # closed when the last reader lets go of it
        return found


def open_pairs(folder: str | os.PathLike[str]) -> Pairs:
    """Index every ``*.tar`` of a folder.

    Raises:
        PairsError: no such folder, no shard in it, a compressed or truncated shard, a member twice, a key in two shards,
            a sample without a picture.
    """
    folder = Path(folder)
    paths = _shard_paths(folder)
    shards: list[Shard] = []
    keys: list[str] = []
    spans: list[np.ndarray] = []
    stamps: list[tuple[int, int]] = []
    home: dict[str, Path] = {}
    for path in paths:
        samples, stamp = _index_shard(path)
        for key in samples:
            if key in home:
                where = f"{home[key].name} and {path.name} of {folder}"
                raise PairsError(f"the key '{key}' is in two shards, {where}; keys must be unique in a pairs folder: rename or remove one")
            home[key] = path
        shards.append(Shard(name=path.name.removesuffix(".tar"), path=path, start=len(keys), stop=len(keys) + len(samples)))
        keys.extend(samples)
        spans.extend(samples.values())
        stamps.append(stamp)
    if not keys:
        raise PairsError(f"the shards of {folder} hold no samples; expected members like KEY.jpg and KEY.txt")
    return Pairs(folder, shards, keys, np.stack(spans), stamps)


def write_shard(path: str | os.PathLike[str], samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> ShardFacts:
    """Write ``(key, {extension: bytes})`` samples as one shard. The same samples give the same bytes, in any order.

    The file appears under its name only when it is whole. Raises PairsError for a key that is empty, holds a dot, is not
    encodable or comes twice.
    """
    path = Path(path)
    gathered: dict[str, Mapping[str, bytes]] = {}
    for key, members in samples:
        if not key.rpartition("/")[2] or "." in key or "\0" in key:
            raise PairsError(f"the key {key!r} cannot name a sample: expected a file name without dots")
        if key in gathered:
            raise PairsError(f"the key '{key}' comes twice for {path}; keys must be unique")
        gathered[key] = members
    digest, length = hashlib.sha256(), 0
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            for chunk in _tar_chunks(gathered):
                digest.update(chunk)
                length += file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return ShardFacts(sha256=digest.hexdigest(), bytes=length, samples=len(gathered))


def decode_image(data: bytes) -> Image.Image:
    """Decode an encoded picture to RGB: EXIF orientation applied, transparency composed on white, 16 bit grey scaled to 8."""
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        upright = ImageOps.exif_transpose(opened)
    if upright.mode.startswith("I"):
        grey = np.asarray(upright).astype(np.int64)
        return Image.fromarray((np.clip(grey, 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    layer = upright.convert("RGBA")
    white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, layer).convert("RGB")


def _shard_paths(folder: Path) -> list[Path]:
    if not folder.exists():
        raise PairsError(f"the pairs folder {folder} does not exist; expected a folder of *.tar shards: make one with 'mclip sample emoji'")
    if not folder.is_dir():
        raise PairsError(f"{folder} is a file, expected a pairs folder of *.tar shards; give the folder that holds it")
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".") and entry.is_file())
    for name in names:
        if name.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")):
            raise PairsError(f"{folder / name} is compressed, and only uncompressed shards are random access; unpack it to a .tar first (for .tar.gz: gunzip)")
    paths = [folder / name for name in names if name.endswith(".tar")]
    if not paths:
        inner = sorted(entry.parent.name for entry in folder.glob("*/*.tar"))
        hint = f"; its folder '{inner[0]}' has some: give {folder / inner[0]}" if inner else "; make some with 'mclip sample emoji' or img2dataset"
        raise PairsError(f"the folder {folder} holds no *.tar shard{hint}")
    return paths


def _index_shard(path: Path) -> tuple[dict[str, np.ndarray], tuple[int, int]]:
    """Key -> (3, 2) int64 spans in the order of the tar, and the shard's (bytes, mtime)."""
    samples: dict[str, np.ndarray] = {}
    try:
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            if facts.st_size == 0:
                raise PairsError(f"{path} is empty (0 bytes), expected a tar shard; {_CORRECT}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                for name, offset, size in _tar_members(view, path):
                    folder, slash, base = name.removeprefix("./").rpartition("/")
                    stem, dot, extension = base.partition(".")
                    kind = _KIND.get(extension.lower())
                    if not stem or not dot or kind is None:
                        continue  # not part of a sample that we read
                    spans = samples.setdefault(folder + slash + stem, np.full((3, 2), -1, dtype=np.int64))
                    if spans[kind, 0] >= 0:
                        raise PairsError(f"sample '{folder + slash + stem}' of {path} has a second {_KIND_NAMES[kind]}; expected one; {_CORRECT}")
                    spans[kind] = offset, size
    except OSError as error:
        raise PairsError(f"{path} cannot be read ({error.strerror}); check that it is a readable file") from error
    for key, spans in samples.items():
        if spans[_IMAGE, 0] < 0:
            raise PairsError(f"sample '{key}' of {path} has no picture; expected {key}.jpg, .png or .webp; {_CORRECT}")
    return samples, (facts.st_size, facts.st_mtime_ns)


def _tar_members(view: mmap.mmap, path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every regular file. Our own walk: tarfile builds an object a member and forgives a cut."""
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
        start = position + BLOCK
        if size is None:
            raise PairsError(f"{path} is not a sound tar: the header at byte {position} has no valid size; {_CORRECT}")
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
                yield name, start, size
        elif kind not in b"gK":
            raise PairsError(f"{path} holds a link or special file at byte {start - BLOCK} (tar type {kind!r}), expected regular files; {_CORRECT}")


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
        raise PairsError(f"{path} holds a member whose name {name!r} is not UTF-8; {_CORRECT}") from error


def _pax_records(data: bytes, path: Path) -> dict[str, str]:
    records: dict[str, str] = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(data):
            raise PairsError(f"{path} is not a sound tar: an extended header cannot be read; {_CORRECT}")
        name, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if name in (b"path", b"size"):
            records[name.decode()] = _text(value, path)
        data = data[int(length) :]
    return records


def _tar_chunks(samples: Mapping[str, Mapping[str, bytes]]) -> Iterator[bytes]:
    for key in sorted(samples):
        for extension in sorted(samples[key]):
            data = samples[key][extension]
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size, info.mode, info.mtime = len(data), 0o644, 0
            try:
                yield info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")
            except UnicodeEncodeError as error:
                raise PairsError(f"the key {key!r} cannot be written as UTF-8; rename it") from error
            yield data
            yield b"\0" * (-len(data) % BLOCK)
    yield b"\0" * (2 * BLOCK)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
