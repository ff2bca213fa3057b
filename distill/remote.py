"""Pairs and stores that lie elsewhere: `s3://`, `gs://`, `hf://`, `file://` … through fsspec, fetched whole into a local cache.

    pairs = local_pairs("s3://bucket/pairs")      # a path without :// is opened as it is
    store = local_store("s3://bucket/store")

The cache is `$MOBILECLIP_CACHE/shards`, else `~/.cache/mobileclip-edge/shards`, at most `$MOBILECLIP_CACHE_GB` (100) large: what was not
used for longest is dropped first. Its files are named by address and state of their source, so a changed source is another file; one
process fetches a file, others wait for it. A file that was dropped while it was still needed is fetched again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import ClipError, MissingExtraError, PairsError, StoreError
from runtime.files import cache_root
from runtime.pairs import Pairs, index_shards, open_pairs, shard_paths

if TYPE_CHECKING:
    from distill.store import Store

_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
_MTIME = 1_000_000_000  # of every cached file: what a Pairs remembers of a shard stays true when it is fetched again


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPlace:
    """Where one shard lies. url: a path, or an address; state: changes when the content does (modification time, ETag …)."""

    name: str
    url: str
    bytes: int
    state: str


def is_remote(path: str) -> bool:
    """Whether this is an address (`scheme://…`) rather than a path."""
    return re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


def list_shards(pairs: str) -> list[ShardPlace]:
    """The shards of a pairs folder, here or elsewhere, by name; none is opened.

    Raises:
        PairsError: no such folder, no shard in it, or a compressed one.
    """
    if not is_remote(pairs):
        paths = shard_paths(Path(pairs))
        facts = [path.stat() for path in paths]
        return [
            ShardPlace(name=path.name.removesuffix(".tar"), url=str(path), bytes=fact.st_size, state=str(fact.st_mtime_ns)) for path, fact in zip(paths, facts, strict=True)
        ]
    fs, root = filesystem(pairs, PairsError)
    try:
        entries = sorted((entry for entry in fs.ls(root, detail=True) if entry["type"] == "file"), key=lambda entry: entry["name"])
    except (OSError, ValueError) as error:
        raise PairsError(f"the pairs '{pairs}' cannot be listed ({error}); check the address and your access") from error
    places = []
    for entry in entries:
        name = entry["name"].rpartition("/")[2]
        if name.lower().endswith(_COMPRESSED):
            raise PairsError(f"'{pairs}/{name}' is compressed, and only uncompressed shards are random access; unpack it to a .tar first")
        if name.endswith(".tar") and not name.startswith("."):
            state = str(fs.ukey(entry["name"]))
            places.append(ShardPlace(name=name.removesuffix(".tar"), url=fs.unstrip_protocol(entry["name"]), bytes=int(entry["size"]), state=state))
    if not places:
        raise PairsError(f"'{pairs}' holds no *.tar shard; expected shards as img2dataset or 'mclip sample' make them")
    return places


def fetch_shard(place: ShardPlace) -> Path:
    """The shard on this disk: where it is, or its copy in the cache. Raises PairsError."""
    return cached(place.url, place.state, place.bytes, PairsError) if is_remote(place.url) else Path(place.url)


class _Fetch:
    """Brings shard n to this disk; survives pickling."""

    def __init__(self, places: list[ShardPlace]) -> None:
        self.places = places

    def __call__(self, number: int) -> Path:
        return fetch_shard(self.places[number])


def local_pairs(pairs: str | os.PathLike[str], *, strict: bool = True) -> Pairs:
    """`runtime.pairs.open_pairs` for a path or an address. Of an address, each shard is fetched to be indexed, and again if the cache
    dropped it before its samples are read. Raises PairsError."""
    pairs = os.fspath(pairs)
    if not is_remote(pairs):
        return open_pairs(pairs, strict=strict)
    return open_shards(list_shards(pairs), pairs, strict=strict)


def open_shards(places: list[ShardPlace], folder: str, *, strict: bool) -> Pairs:
    """Some shards of a pairs folder as pairs of their own; rows are numbered from 0. Raises PairsError."""
    fetch = _Fetch(places) if any(is_remote(place.url) for place in places) else None
    return index_shards(Path(folder), [Path(place.url) for place in places], strict=strict, fetch=fetch, names=[place.name for place in places])


def local_store(store: str | os.PathLike[str], verify: bool = False) -> Store:
    """`distill.store.open_store` for a path or an address; of an address, the index and every part are fetched into the cache, where
    they stay until another store of that address replaces them. Raises StoreError."""
    from distill.store import open_store
    from distill.store_writing import INDEX

    store = os.fspath(store)
    if not is_remote(store):
        return open_store(store, verify=verify)
    fs, root = filesystem(store, StoreError)
    folder = staging_folder(store)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        index = fs.cat_file(f"{root}/{INDEX}")
        with lock(folder / ".lock"):
            fresh = not (folder / INDEX).is_file() or (folder / INDEX).read_bytes() != index
            if fresh:
                _fetch_parts(fs, root, folder, index)
    except FileNotFoundError as error:
        raise StoreError(f"'{store}' is not a finished store: '{error}' is not there; run mclip reinforce (again, it continues)") from None
    except OSError as error:
        raise StoreError(f"the store '{store}' cannot be fetched ({error}); check the address, your access and the disk") from error
    return open_store(folder, verify=verify)


def _fetch_parts(fs: Any, root: str, folder: Path, index: bytes) -> None:
    import json

    from distill.store_writing import INDEX
    from runtime.files import file_sha256, write_whole

    (folder / INDEX).unlink(missing_ok=True)
    for entry in json.loads(index)["parts"]:
        path = folder / Path(entry["path"]).name
        if path.is_file() and path.stat().st_size == entry["bytes"] and file_sha256(path) == entry["sha256"]:
            continue
        half = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            fs.get_file(f"{root}/{entry['path']}", str(half))
            os.replace(half, path)
        finally:
            half.unlink(missing_ok=True)
    write_whole(folder / INDEX, index)


# ---------------------------------------------------------------- fsspec


def filesystem(url: str, error: type[ClipError]) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path in it. Raises `error` for an unknown or uninstalled scheme."""
    try:
        import fsspec
    except ImportError:
        raise MissingExtraError("fsspec", "remote", f"reading '{url}'") from None
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as problem:
        raise error(f"'{url}' cannot be opened ({problem}); check the scheme, or install the package that fsspec names") from None
    return fs, root.rstrip("/")


def upload(path: Path, url: str) -> None:
    """Put a file under an address, whole or not at all. Raises StoreError."""
    fs, target = filesystem(url, StoreError)
    try:
        fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        if "file" in fs.protocol:  # object stores show an upload when it is complete, a disk shows it as it grows
            half = f"{target.rpartition('/')[0]}/.{target.rpartition('/')[2]}.{os.getpid()}.part"
            fs.put_file(str(path), half)
            os.replace(half, target)
        else:
            fs.put_file(str(path), target)
    except OSError as error:
        raise StoreError(f"'{url}' cannot be written ({error}); check your access, then run the same command again: it continues") from error


# ---------------------------------------------------------------- the cache


def cache_limit() -> int:
    """Bytes that the shards of the cache may take. Raises PairsError when the environment says no number."""
    given = os.environ.get("MOBILECLIP_CACHE_GB", "100")
    try:
        return int(float(given) * 1e9)
    except ValueError:
        raise PairsError(f"MOBILECLIP_CACHE_GB is '{given}', expected a number of gigabytes") from None


def staging_folder(store: str) -> Path:
    """Where the parts of a store that lies elsewhere are made, and where it is read from."""
    return cache_root() / "stores" / hashlib.sha256(store.rstrip("/").encode()).hexdigest()[:20]


def cached(url: str, state: str, size: int, error: type[ClipError]) -> Path:
    """A copy of what lies under an address, `size` bytes in that `state`, fetched at most once at a time over all processes."""
    folder = cache_root() / "shards"
    path = folder / f"{hashlib.sha256(f'{url} {state}'.encode()).hexdigest()[:40]}.tar"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(path.with_suffix(".lock")):
            if not path.is_file() or path.stat().st_size != size:
                _make_room(folder, size, url)
                _fetch(url, path, size, error)
            os.utime(path, ns=(_now(), _MTIME))  # the access time says what was used last
    except OSError as problem:
        raise error(f"'{url}' cannot be fetched into the cache '{folder}' ({problem}); check the address, your access and the disk") from problem
    return path


def _now() -> int:
    import time

    return time.time_ns()


def _fetch(url: str, path: Path, size: int, error: type[ClipError]) -> None:
    fs, source = filesystem(url, error)
    half = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        fs.get_file(source, str(half))
        if half.stat().st_size != size:
            raise error(f"'{url}' gave {half.stat().st_size} bytes, expected {size}; it changed or the transfer broke: run again")
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


def _make_room(folder: Path, size: int, url: str) -> None:
    """Drop what was not used for longest until `size` more bytes fit. Files that are being fetched are left alone."""
    limit = cache_limit()
    if size > limit:
        raise PairsError(f"'{url}' has {size} bytes, more than the cache of {limit} bytes takes; set MOBILECLIP_CACHE_GB to at least {size / 1e9:.1f}")
    files = []
    for path in folder.glob("*.tar"):
        try:
            facts = path.stat()
        except FileNotFoundError:
            continue
        files.append((facts.st_atime_ns, facts.st_size, path))
    total = sum(size for _, size, _ in files) + size
    for _, length, path in sorted(files):
        if total <= limit:
            break
        with lock(path.with_suffix(".lock"), wait=False) as mine:
            if mine:
                path.unlink(missing_ok=True)
                total -= length


@contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold an advisory lock; yields whether it was to be had (always, when waiting)."""
    with open(path, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
