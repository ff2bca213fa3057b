"""Which pictures lie under a folder, and what one of them is: its content hash, its date, its pixels.

Paths are bytes here (`os.fsencode`): a file name need not be text.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.errors import ImageError
from runtime.preprocess import PreprocessConfig, open_encoded, preprocess

if TYPE_CHECKING:
    import numpy as np

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
HASH_BYTES = 16
MOST_BYTES = 512 << 20
"""A file beyond this is no picture that anyone wants decoded."""
_DATE_TAGS = (36867, 36868)  # DateTimeOriginal, DateTimeDigitized: in the sub-directory 0x8769; 306, DateTime, in the main one


@dataclass(frozen=True, slots=True)
class Found:
    """A file as the folder lists it: absolute path, size in bytes, time of the last change in ns."""

    path: bytes
    bytes: int
    mtime_ns: int


def walk(root: bytes, unreadable: list[tuple[bytes, str]]) -> Iterator[Found]:
    """Every picture at or below `root`, folder by folder in order of name. Links are followed, each real folder is entered once.

    Args:
        root: absolute.
        unreadable: receives (path, reason) of folders and files that cannot be looked at.
    """
    if not os.path.isdir(root):
        found = _look(root, unreadable)
        if found:
            yield found
        return
    seen: set[tuple[int, int]] = set()
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            facts = os.stat(folder)
            if (facts.st_dev, facts.st_ino) in seen:
                continue
            seen.add((facts.st_dev, facts.st_ino))
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except FileNotFoundError:
            continue
        except OSError as error:
            unreadable.append((folder, error.strerror or str(error)))
            continue
        below = []
        for entry in listed:
            if _is_folder(entry):
                below.append(entry.path)
            elif os.fsdecode(os.path.splitext(entry.name)[1]).lower() in PICTURES:
                found = _look(entry.path, unreadable)
                if found:
                    yield found
        folders.extend(reversed(below))


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _look(path: bytes, unreadable: list[tuple[bytes, str]]) -> Found | None:
    try:
        facts = os.stat(path)
    except FileNotFoundError:  # gone meanwhile, or a link to nowhere
        return None
    except OSError as error:
        unreadable.append((path, error.strerror or str(error)))
        return None
    return Found(path, facts.st_size, facts.st_mtime_ns) if stat.S_ISREG(facts.st_mode) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """What reading one file gave. Exactly one of these holds: `pixels` (new), `known` (its content has a vector), `reason` (unusable), `gone`.

    Attributes:
        hash: first 16 bytes of the content's sha256.
        taken: when, "YYYY-MM-DDTHH:MM:SS" in the camera's (EXIF) or this machine's local time (the file's).
        pixels: float32 (3, H, W).
        final: the reason lies in the content, so that trying again is of no use while the file stays as it is.
    """

    file: Found
    hash: bytes = b""
    taken: str = ""
    exif: bool = False
    pixels: np.ndarray | None = None
    known: bool = False
    reason: str = ""
    final: bool = False
    gone: bool = False


def read_picture(file: Found, config: PreprocessConfig, known: set[bytes]) -> Picture:
    """Read, hash and, when the content is new, decode one file. Never raises for what a file may hold or do."""
    if file.bytes > MOST_BYTES:
        return Picture(file=file, reason=f"has {file.bytes} bytes, at most {MOST_BYTES} are read", final=True)
    try:
        with open(file.path, "rb") as stream:
            facts = os.fstat(stream.fileno())
            data = stream.read(MOST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return Picture(file=file, gone=True)
    except OSError as error:
        return Picture(file=file, reason=error.strerror or str(error))
    file = Found(file.path, facts.st_size, facts.st_mtime_ns)
    if len(data) != facts.st_size:
        return Picture(file=file, reason=f"changed while it was read ({len(data)} of {facts.st_size} bytes)")
    digest = hashlib.sha256(data).digest()[:HASH_BYTES]
    taken, exif = date_of(data, facts.st_mtime_ns)
    if digest in known:
        return Picture(file=file, hash=digest, taken=taken, exif=exif, known=True)
    try:
        return Picture(file=file, hash=digest, taken=taken, exif=exif, pixels=preprocess([data], config)[0])
    except ImageError as error:
        return Picture(file=file, hash=digest, taken=taken, reason=str(error), final=True)
    except Exception as error:  # decoders fail in ways that nobody lists; one picture must not end the others
        return Picture(file=file, hash=digest, taken=taken, reason=f"does not decode ({type(error).__name__}: {error})", final=True)


def date_of(data: bytes, mtime_ns: int) -> tuple[str, bool]:
    """When a picture was taken, and whether EXIF says so; else the file's time in local time."""
    try:
        with open_encoded(io.BytesIO(data)) as image:
            exif: Any = image.getexif()
            inner = exif.get_ifd(0x8769)
            for value in (*(inner.get(tag) for tag in _DATE_TAGS), exif.get(306)):
                text = value.strip(" \0") if isinstance(value, str) else ""
                if text:
                    return time.strftime("%Y-%m-%dT%H:%M:%S", time.strptime(text[:19], "%Y:%m:%d %H:%M:%S")), True
    except Exception:  # a broken EXIF block is no reason to lose the picture
        pass
    try:
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(mtime_ns / 1e9)), False
    except (ValueError, OverflowError, OSError):
        return "1970-01-01T00:00:00", False
