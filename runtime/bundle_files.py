"""The files of a bundle against its manifest: every one hashed, none missing, none extra."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import BundleError
from runtime.files import file_sha256

if TYPE_CHECKING:
    from runtime.manifest import Artefact, FileFacts, Manifest

MANIFEST = "manifest.json"


def read_file(folder: str | os.PathLike[str], manifest: Manifest, name: str) -> bytes:
    """A file of the bundle, checked against the manifest while it is read.

    Raises:
        BundleError: not listed, missing or changed.
    """
    facts = manifest.files.get(name)
    if facts is None:
        raise BundleError(f"the manifest of {folder} lists no file '{name}'; export the bundle again")
    path = Path(folder) / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path} is listed in the manifest but cannot be read ({error.strerror or error}); fetch or export the bundle again") from error
    _compare(path, facts, len(data), lambda: hashlib.sha256(data).hexdigest())
    return data


def verify_artefact(folder: str | os.PathLike[str], manifest: Manifest, artefact: Artefact) -> None:
    """Check the file, or all files of the package, of one artefact.

    Raises:
        BundleError: missing or changed.
    """
    for name in artefact_files(artefact, manifest.files):
        verify_file(Path(folder) / name, manifest.files[name])


def artefact_files(artefact: Artefact, files: Iterable[str]) -> list[str]:
    """Which of the files are the artefact's: one file, or everything inside its package folder; none when refused."""
    return [name for name in files if name == artefact.path or name.startswith(f"{artefact.path}/")]


def verify_files(folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Check that the folder holds exactly the files of the manifest, byte for byte.

    Raises:
        BundleError: a file is missing, changed or not listed.
    """
    folder = Path(folder)
    found = set(walk_files(folder))
    missing = sorted(manifest.files.keys() - found)
    if missing:
        raise BundleError(f"{folder / missing[0]} is listed in the manifest but missing ({len(missing)} in all); fetch or export the bundle again")
    extra = sorted(found - manifest.files.keys())
    if extra:
        raise BundleError(f"{folder / extra[0]} is not listed in the manifest ({len(extra)} such in all); remove it or export the bundle again")
    for name, facts in manifest.files.items():
        verify_file(folder / name, facts)


def verify_file(path: Path, facts: FileFacts) -> None:
    """Check one file. Raises BundleError: missing or changed."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise BundleError(f"{path} is listed in the manifest but cannot be read ({error.strerror or error}); fetch or export the bundle again") from error
    _compare(path, facts, size, lambda: hash_file(path))


def _compare(path: Path, facts: FileFacts, size: int, sha256: Callable[[], str]) -> None:
    if size != facts.bytes:
        raise BundleError(f"{path} has {size} bytes, the manifest says {facts.bytes}; fetch or export the bundle again")
    digest = sha256()
    if digest != facts.sha256:
        raise BundleError(f"{path} was changed: its sha256 is {digest[:12]}…, the manifest says {facts.sha256[:12]}…; fetch or export the bundle again")


def walk_files(folder: Path) -> Iterator[str]:
    """Relative names of all files but the manifest. A link to a folder counts as a (never listed) file."""
    for top, folders, files in os.walk(folder):
        relative = Path(top).relative_to(folder)
        links = [name for name in folders if (Path(top) / name).is_symlink()]
        for name in files + links:
            inner = (relative / name).as_posix()
            if inner != MANIFEST:
                yield inner


def hash_file(path: Path) -> str:
    """`file_sha256` whose failure names the bundle's file."""
    try:
        return file_sha256(path)
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror or error}); remove it or export the bundle again") from error
