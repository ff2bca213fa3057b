"""Random access by uid into published reinforcement shards: each tar is walked once, nothing is held in memory.

    WORK/shard-ID.npy    per tar: one record a sample, in the order of the tar: digest of the uid, offset and size of each member
    WORK/uids-ID/B.npy   all samples, split by the first bits of the digest, sorted by digest: which tar, which record; B.high.npy
                         holds the first halves of the digests alone, for the binary search

ID names what the file was made from, so a run that was stopped finds its own files again. A bucket holds about a million samples,
which bounds the memory of sorting; looking up is a binary search in a memory map.
"""

from __future__ import annotations

import functools
import hashlib
import json
import mmap
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from distill.datacompdr_samples import MEMBERS
from runtime.errors import PairsError, StoreError
from runtime.files import write_json
from runtime.tar_index import tar_members

_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("spans", "<i8", (len(MEMBERS), 2))])
_PLACE = np.dtype([("high", "<u8"), ("low", "<u8"), ("shard", "<u4"), ("row", "<u4")])
BUCKET = 1 << 20
"""Samples that are sorted at once."""
_OPEN_SHARDS = 64


def find_shards(folder: str | os.PathLike[str]) -> list[Path]:
    """Every *.tar below a folder, sorted by its relative path. Raises StoreError when there is none."""
    root = Path(folder)
    found = sorted((path for path in root.rglob("*.tar") if path.is_file() and not path.name.startswith(".")), key=lambda path: path.relative_to(root).as_posix())
    if not found:
        raise StoreError(f"'{folder}' holds no *.tar shard of DataCompDR; download some of apple/DataCompDR-12M there first")
    return found


def digests(uids: Sequence[str]) -> np.ndarray:
    """(n, 2) uint64: the first 16 bytes of each uid's sha256."""
    joined = b"".join(hashlib.sha256(uid.encode("utf-8", "surrogatepass")).digest()[:16] for uid in uids)
    return np.frombuffer(joined, "<u8").reshape(-1, 2)


def index_shard(path: Path, work: Path) -> Path:
    """Walk one tar and write its shard-ID.npy; one that is there is kept. A tar that ends early is indexed as far as it goes.

    Returns:
        The file. Beside it lies a .json with "cut", a sentence or "".
    """
    facts = path.stat()
    identity = hashlib.sha256(f"{path.absolute()}\n{facts.st_size}\n{facts.st_mtime_ns}".encode()).hexdigest()[:24]
    out = work / f"shard-{identity}.npy"
    if out.is_file() and out.with_suffix(".json").is_file():
        return out
    samples: dict[str, np.ndarray] = {}
    cut = ""
    try:
        for uid, kind, offset, size in _walk(path):
            spans = samples.setdefault(uid, np.full((len(MEMBERS), 2), -1, np.int64))
            if spans[kind, 0] < 0:
                spans[kind] = offset, size
    except PairsError as error:
        cut = str(error)
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror or error}); check that it is a readable file") from None
    records = np.zeros(len(samples), _RECORD)
    if samples:
        records["high"], records["low"] = digests(list(samples)).T
        records["spans"] = np.stack(list(samples.values()))
    write_json(out.with_suffix(".json"), {"cut": cut})
    save_array(out, records)
    return out


def _walk(path: Path) -> Iterator[tuple[str, int, int, int]]:
    """uid, number in MEMBERS, offset and size of every member that an import reads."""
    kinds = {extension: number for number, extension in enumerate(MEMBERS)}
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise PairsError(f"{path} is empty (0 bytes), expected a tar shard; fetch it again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            for name, offset, size, link in tar_members(view, path):
                uid, _, extension = name.rpartition("/")[2].partition(".")
                kind = kinds.get(extension.lower())
                if uid and kind is not None and link is None:
                    yield uid, kind, offset, size


def cut_shards(indices: Sequence[Path]) -> list[str]:
    """One sentence for every walked tar that ends early."""
    told = [json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["cut"] for path in indices]
    return [cut for cut in told if cut]


def save_array(path: Path, array: np.ndarray) -> None:
    """An .npy that is there whole or not at all."""
    half = path.with_name(f".{path.name}.{os.getpid()}.part")
    with half.open("wb") as file:
        np.save(file, array)
    os.replace(half, path)


class Reinforcements:
    """Published samples, found by uid. Pickles (a worker opens the files again).

    Samples are numbered from 0 in the order of the sorted digests; a uid that comes twice is found at its first place.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        self._shards, self._indices = [Path(path) for path in facts["shards"]], [Path(path) for path in facts["indices"]]
        self.different: int = facts["different"]
        """How many different uids there are."""
        self._shift = 64 - int(facts["bits"])
        self._starts = np.cumsum([0, *facts["sizes"]])
        self._buckets: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._open: OrderedDict[int, tuple[BinaryIO, np.ndarray]] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[Callable[[Path], Reinforcements], tuple[Path]]:
        return open_reinforcements, (self._folder,)

    def close(self) -> None:
        """Let go of the tars; they are opened again when they are asked for."""
        while self._open:
            self._open.popitem()[1][0].close()

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()

    def find(self, uids: Sequence[str]) -> np.ndarray:
        """Number of each uid's sample, int64 (n,); -1 where there is none."""
        wanted = digests(uids)
        out = np.full(len(wanted), -1, np.int64)
        buckets = wanted[:, 0] >> np.uint64(self._shift) if self._shift < 64 else np.zeros(len(wanted), np.uint64)
        for bucket in np.unique(buckets).tolist():
            places, highs = self._bucket(int(bucket))
            where = np.flatnonzero(buckets == bucket)
            at = np.searchsorted(highs, wanted[where, 0])
            for query, place in zip(where.tolist(), at.tolist(), strict=True):
                high, low = wanted[query]
                while place < len(highs) and highs[place] == high:  # more than once: a uid that comes twice
                    if places["low"][place] == low:
                        out[query] = self._starts[bucket] + place
                        break
                    place += 1
        return out

    def place(self, number: int) -> tuple[int, int]:
        """(shard, record) of a sample: reading in this order goes through the tars from front to back."""
        bucket = int(np.searchsorted(self._starts, number, side="right")) - 1
        found = self._bucket(bucket)[0][number - self._starts[bucket]]
        return int(found["shard"]), int(found["row"])

    def members(self, number: int) -> dict[str, bytes]:
        """Extension to content of a sample's members. Raises StoreError when the tar changed since it was walked."""
        shard, row = self.place(number)
        file, records = self._shard(shard)
        out = {}
        for extension, (offset, size) in zip(MEMBERS, records["spans"][row].tolist(), strict=True):
            if offset >= 0:
                out[extension] = os.pread(file.fileno(), size, offset)
                if len(out[extension]) != size:
                    raise StoreError(f"{self._shards[shard]} changed while it was imported; run the same command again")
        return out

    def _bucket(self, bucket: int) -> tuple[np.ndarray, np.ndarray]:
        if bucket not in self._buckets:
            self._buckets[bucket] = np.load(self._folder / f"{bucket}.npy", mmap_mode="r"), np.load(self._folder / f"{bucket}.high.npy", mmap_mode="r")
            while len(self._buckets) > _OPEN_SHARDS:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(bucket)
        return self._buckets[bucket]

    def _shard(self, shard: int) -> tuple[BinaryIO, np.ndarray]:
        if shard not in self._open:
            self._open[shard] = self._shards[shard].open("rb"), np.load(self._indices[shard], mmap_mode="r")
            while len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)[1][0].close()
        self._open.move_to_end(shard)
        return self._open[shard]


@functools.lru_cache(maxsize=1)
def open_reinforcements(folder: Path) -> Reinforcements:
    """What `join_indices` wrote; the last one stays open in this process."""
    return Reinforcements(folder)


def join_indices(shards: Sequence[Path], indices: Sequence[Path], work: Path) -> tuple[Reinforcements, str]:
    """Sort the samples of all tars by digest, in bounded memory.

    Returns:
        The samples, and a fingerprint of the tars: sha256 over each one's uids and the offsets and sizes of their members. (What the
        members hold is proven when they are read: zip and gzip carry checksums.)
    """
    fingerprint = hashlib.sha256()
    total = 0
    for path in indices:
        records = np.load(path, mmap_mode="r")
        fingerprint.update(hashlib.sha256(records.tobytes()).digest())
        total += len(records)
    folder = work / f"uids-{fingerprint.hexdigest()[:24]}"
    if not folder.is_dir():
        bits = max(0, (max(1, total) - 1) // BUCKET).bit_length()
        half = work / "half-uids"
        shutil.rmtree(half, ignore_errors=True)  # of a run that was killed
        half.mkdir()
        _split(indices, half, bits)
        sizes, different = [], 0
        for bucket in range(1 << bits):
            places = np.fromfile(half / f"{bucket}.raw", _PLACE) if (half / f"{bucket}.raw").is_file() else np.zeros(0, _PLACE)
            places = places[np.lexsort((places["row"], places["shard"], places["low"], places["high"]))]
            repeated = (places["high"][1:] == places["high"][:-1]) & (places["low"][1:] == places["low"][:-1])
            sizes.append(len(places))
            different += len(places) - int(repeated.sum())
            np.save(half / f"{bucket}.npy", places)
            np.save(half / f"{bucket}.high.npy", np.ascontiguousarray(places["high"]))
            (half / f"{bucket}.raw").unlink(missing_ok=True)
        where = {"shards": [str(path.absolute()) for path in shards], "indices": [str(path.absolute()) for path in indices]}
        write_json(half / "facts.json", {"bits": bits, "sizes": sizes, "different": different, **where})
        os.replace(half, folder)
    return open_reinforcements(folder), fingerprint.hexdigest()


def _split(indices: Sequence[Path], folder: Path, bits: int) -> None:
    """Append every sample to the file of its bucket, a million at a time."""
    for gathered in _batches(indices):
        buckets = gathered["high"] >> np.uint64(64 - bits) if bits else np.zeros(len(gathered), np.uint64)
        order = np.argsort(buckets, kind="stable")
        edges = np.searchsorted(buckets[order], np.arange((1 << bits) + 1, dtype=np.uint64))
        for bucket in range(1 << bits):
            piece = gathered[order[edges[bucket] : edges[bucket + 1]]]
            if len(piece):
                with (folder / f"{bucket}.raw").open("ab") as file:
                    piece.tofile(file)


def _batches(indices: Sequence[Path]) -> Iterator[np.ndarray]:
    waiting: list[np.ndarray] = []
    for number, path in enumerate(indices):
        records = np.load(path, mmap_mode="r")
        places = np.zeros(len(records), _PLACE)
        places["high"], places["low"], places["shard"], places["row"] = records["high"], records["low"], number, np.arange(len(records))
        waiting.append(places)
        if sum(map(len, waiting)) >= BUCKET or number == len(indices) - 1:
            yield np.concatenate(waiting)
            waiting = []
