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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps

from runtime.errors import ImageError, PairsError
from runtime.preprocess import open_encoded
from runtime.tar_index import BLOCK, CORRECT, IMAGE, KIND_NAMES, META, TEXT, Rejected, index_shard

MAX_PIXELS = 100_000_000
"""Pixels of the largest picture that is decoded: 300 MB as RGB."""
_OPEN_SHARDS = 64  # memory maps kept at once: bounds the file descriptors of a folder with thousands of shards


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
        rejected: what was left out, when the pairs were opened leniently.
    """

    def __init__(
        self, folder: Path, shards: list[Shard], keys: list[str], spans: np.ndarray, stamps: list[tuple[int, int]], rejected: Sequence[Rejected] = (),
        fetch: Callable[[int], Path] | None = None,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.shards = shards
        self.keys = keys
        self._spans = spans  # (rows, 3, 2) int64: offset and size of picture, caption and facts; offset -1 = absent
        self.rejected = list(rejected)
        self._fetch = fetch  # brings shard n to this disk and says where; None where the shards lie here for good
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
        return bool(self._spans[self._check(row), TEXT, 0] >= 0)

    def image_bytes(self, row: int) -> bytes:
        """The encoded picture as it lies in the shard."""
        return self._member(row, IMAGE)

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
            return self._member(row, TEXT).decode("utf-8").strip()
        except UnicodeDecodeError as error:
            found = f"byte {error.start} is 0x{error.object[error.start]:02x}"
            raise PairsError(f"{self._where(row)}: the caption is not UTF-8 ({found}); convert it to UTF-8") from error

    def meta(self, row: int) -> dict[str, Any]:
        """The facts of ``KEY.json`` ({} when the sample has none). Raises PairsError when it is not one JSON object."""
        if self._spans[self._check(row), META, 0] < 0:
            return {}
        try:
            facts = json.loads(self._member(row, META))
        except (ValueError, RecursionError) as error:
            raise PairsError(f"{self._where(row)}: the .json member is not valid JSON ({_short(error)}); {CORRECT}") from error
        if not isinstance(facts, dict):
            raise PairsError(f"{self._where(row)}: the .json member holds a {type(facts).__name__}, expected one object; {CORRECT}")
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
            raise PairsError(f"{self._where(row)}: the {KIND_NAMES[kind]} is missing; add it to the shard or drop the sample")
        return self._map(self._shard_index(row))[offset : offset + size]

    def _map(self, index: int) -> mmap.mmap:
        found = self._maps.get(index)
        if found is not None:
            self._maps.move_to_end(index)
            return found
        path = self.shards[index].path if self._fetch is None else self._fetch(index)
        try:
            with _open_again(path, self._fetch, index) as file:
                facts = os.fstat(file.fileno())
                if (facts.st_size, facts.st_mtime_ns) != self._stamps[index]:
                    raise PairsError(f"{path} changed after it was opened; open the pairs again")
                found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise PairsError(f"{path} cannot be read any more ({error.strerror or error}); open the pairs again") from error
        self._maps[index] = found
        while len(self._maps) > _OPEN_SHARDS:
            self._maps.popitem(last=False)  # closed when the last reader lets go of it
        return found


def open_pairs(folder: str | os.PathLike[str], *, strict: bool = True) -> Pairs:
    """Index every ``*.tar`` of a folder.

    With `strict` off, samples that cannot be used are left out and listed in ``rejected``; a key that comes again keeps its first place.

    Raises:
        PairsError: no such folder, no shard in it, a compressed or truncated shard; when `strict` also a member twice, a key in two
            shards, a sample without a picture, a link, a name that leaves the folder.
    """
    folder = Path(folder)
    return index_shards(folder, shard_paths(folder), strict=strict)


def index_shards(folder: Path, paths: Sequence[Path], *, strict: bool = True, fetch: Callable[[int], Path] | None = None, names: Sequence[str] = ()) -> Pairs:
    """``open_pairs`` for these shards. `fetch` brings shard n to this disk each time it is mapped; `names`: of the shards, if not those of the files."""
    shards: list[Shard] = []
    keys: list[str] = []
    spans: list[np.ndarray] = []
    stamps: list[tuple[int, int]] = []
    rejected: list[Rejected] = []
    home: dict[str, str] = {}
    for number, path in enumerate(paths):
        name = names[number] if names else path.name.removesuffix(".tar")
        samples, left_out, stamp = index_shard(path if fetch is None else fetch(number), strict, name)
        rejected += left_out
        for key in [key for key in samples if key in home]:
            if strict:
                where = f"{home[key]}.tar and {name}.tar of {folder}"
                raise PairsError(f"the key '{key}' is in two shards, {where}; keys must be unique in a pairs folder: rename or remove one")
            rejected.append(duplicate(key, name, home[key]))
            del samples[key]
        home |= dict.fromkeys(samples, name)
        shards.append(Shard(name=name, path=path, start=len(keys), stop=len(keys) + len(samples)))
        keys.extend(samples)
        spans.extend(samples.values())
        stamps.append(stamp)
    if not keys:
        raise PairsError(f"the shards of {folder} hold no samples; expected members like KEY.jpg and KEY.txt")
    return Pairs(folder, shards, keys, np.stack(spans), stamps, rejected, fetch)


def duplicate(key: str, shard: str, first: str) -> Rejected:
    """What is said of a key that stands in an earlier shard already."""
    return Rejected(key=key, shard=shard, reason=f"the key '{key}' is in {first}.tar already, and keys must be unique; this sample is left out")


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
    with open_encoded(io.BytesIO(data)) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise ImageError(f"{opened.width} x {opened.height} pixels, expected at most {MAX_PIXELS // 1_000_000} megapixels")
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


def shard_paths(folder: Path) -> list[Path]:
    """The shards of a folder by name. Raises PairsError when there is none, or a compressed one."""
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


def _open_again(path: Path, fetch: Callable[[int], Path] | None, index: int) -> IO[bytes]:
    """A shard's file; one that the cache dropped between fetching and opening is fetched once more."""
    try:
        return path.open("rb")
    except FileNotFoundError:
        if fetch is None:
            raise
        return fetch(index).open("rb")
