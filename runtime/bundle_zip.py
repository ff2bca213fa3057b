"""A bundle as one file: packed to the same bytes each time, unpacked once into the cache, nothing written outside it.

The entries are the files of the folder, uncompressed (weights hardly shrink), the manifest first. A reader trusts no number of the archive: the manifest says
which files there are and how large they may be, and each has its hash.
"""

from __future__ import annotations

import shutil
import stat
import struct
import zipfile
import zlib
from pathlib import Path

from runtime.bundle_files import MANIFEST, walk_files
from runtime.errors import BundleError
from runtime.files import cache_root, file_sha256, whole_folder
from runtime.manifest import MOST_BYTES, parse_manifest

_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that the format knows
_MAX_ENTRIES = 10_000
_MAX_GROWTH = 100  # times the archive's own size: more than any weights shrink
_CHUNK = 1 << 20


def pack(folder: Path) -> Path:
    """Write a finished bundle folder to the file FOLDER.zip beside it, and return its path."""
    place = folder.with_name(folder.name + ".zip")
    with zipfile.ZipFile(place, "w", zipfile.ZIP_STORED) as archive:
        for name in (MANIFEST, *sorted(walk_files(folder))):
            entry = zipfile.ZipInfo(name, _DATE)
            entry.create_system, entry.external_attr = 3, (stat.S_IFREG | 0o644) << 16
            with (folder / name).open("rb") as source, archive.open(entry, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, _CHUNK)
    return place


def is_zip(path: Path) -> bool:
    """Whether a file is a bundle in one file, as far as its first entry tells."""
    try:
        with zipfile.ZipFile(path) as archive:
            return MANIFEST in archive.namelist()
    except (OSError, zipfile.BadZipFile, ValueError, IndexError, OverflowError, struct.error, NotImplementedError):
        return False


def folder_of(bundle: Path) -> Path:
    """The folder of a bundle: itself, or where the bundle of this one file is (or already was) unpacked in the cache.

    Raises:
        BundleError: the file is no bundle, or holds something else than its manifest says.
    """
    if not bundle.is_file():
        return bundle
    try:
        place = cache_root() / "bundles" / file_sha256(bundle)
        if not (place / MANIFEST).is_file():
            with zipfile.ZipFile(bundle) as archive, whole_folder(place) as part:
                _unpack(archive, part, bundle)
        return place
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, IndexError, OverflowError, struct.error, zlib.error) as error:
        raise BundleError(f"{bundle} is no bundle: it cannot be read as a zip archive ({str(error)[:120]}); give a bundle folder or a .zip made by mclip export") from None
    except OSError as error:
        raise BundleError(f"{bundle} cannot be unpacked ({error.strerror or error}); set MOBILECLIP_CACHE to a folder with room, or unpack it yourself") from error


def _unpack(archive: zipfile.ZipFile, part: Path, bundle: Path) -> None:
    files = [entry for entry in archive.infolist() if not entry.filename.endswith("/")]  # is_dir() of Python 3.11 stumbles over a name of no letters
    entries = {entry.filename: entry for entry in files}
    if len(archive.infolist()) > _MAX_ENTRIES or len(entries) < len(files):
        raise BundleError(f"{bundle} has {len(archive.infolist())} entries, or two of one name; expected each file of a bundle once")
    if MANIFEST not in entries:
        raise BundleError(f"{bundle} is no bundle: it holds no {MANIFEST} at its top; give a .zip made by mclip export")
    for entry in entries.values():
        if entry.flag_bits & 1 or stat.S_ISLNK(entry.external_attr >> 16) or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BundleError(f"{bundle}: the entry '{entry.filename[:80]}' is a link or encrypted, or of a rare compression; a bundle has plain files only")
    with archive.open(MANIFEST) as file:
        raw = file.read(MOST_BYTES + 1)
    manifest = parse_manifest(raw, bundle / MANIFEST)
    sizes = {name: facts.bytes for name, facts in manifest.files.items()}
    different = sorted(set(sizes) ^ (set(entries) - {MANIFEST}))
    if different:
        raise BundleError(f"{bundle}: '{different[0][:80]}' is in the archive or in its manifest, not in both ({len(different)} such in all); export the bundle again")
    if sum(sizes.values()) > _MAX_GROWTH * bundle.stat().st_size:
        raise BundleError(f"{bundle} would unpack to {sum(sizes.values()):,} bytes from {bundle.stat().st_size:,}; weights do not shrink so far, so it is refused")
    part.mkdir(parents=True)
    (part / MANIFEST).write_bytes(raw)
    for name, size in sizes.items():
        path = part / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(entries[name]) as source, path.open("xb") as target:
            left = size
            while chunk := source.read(min(_CHUNK, left + 1)):
                left -= len(chunk)
                if left < 0:
                    raise BundleError(f"{bundle}: '{name[:80]}' is larger than its manifest says ({size} bytes); export the bundle again")
                target.write(chunk)
        if file_sha256(path) != manifest.files[name].sha256:
            raise BundleError(f"{bundle}: '{name[:80]}' was changed: its sha256 is not the manifest's; fetch or export the bundle again")
