"""``mclip sample stamps``: things, most of them photographed, with English captions; a zero-shot test, never for training.

Debian's ``tuxpaint-stamps-default`` holds cut-out pictures with a one-line caption each. Half of them, chosen by a hash of
the file name, are kept, so that another half stays unseen; letters, digits and other symbols are left out.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import PIL
import tyro
from PIL import Image

from distill.fetch import cache_folder
from distill.sample_write import Plan, PlannedShard, write_sample
from runtime.errors import SampleError
from runtime.pairs import decode_image

logger = logging.getLogger(__name__)

PACKAGE = "tuxpaint-stamps-default"
LEFT_OUT = ("symbols",)  # alphabets, digits, notes: no photographs
MARGIN = 0.05
_ROOT = "usr/share/tuxpaint/stamps/"
_MEMBER_LIMIT = 32 << 20
_FETCH_SECONDS = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class StampsConfig:
    """Pictures of things with English captions, from Debian's tuxpaint-stamps-default (GPL-2): a zero-shot test only."""

    pairs: Annotated[Path, tyro.conf.Positional]
    """Folder to write: *.tar, sample.json, CREDITS.md."""
    image_size: int = 256
    """Width and height of the pictures in pixels."""
    cache: Path | None = None
    """Where the Debian package is kept (default: ~/.cache/mobileclip-edge/sample, or $MOBILECLIP_CACHE/sample)."""
    json: bool = False
    """Print the receipt as one JSON object."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stamp:
    """One picture of the package: its path below the stamps folder, its PNG bytes and its English caption."""

    path: str
    png: bytes
    caption: str

    @property
    def key(self) -> str:
        """The sample's key: the path without its extension."""
        return self.path.removesuffix(".png").replace("/", "-").replace(".", "-")


def make_stamps(config: StampsConfig, advance: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Write the sample (or what is missing of it) and return its receipt. Raises SampleError where the package is not to be had."""
    if not 16 <= config.image_size <= 1024:
        raise SampleError(f"--image-size is {config.image_size}, expected 16 to 1024 pixels")
    package = fetch_stamps(config.cache)
    stamps = {stamp.key: stamp for stamp in read_stamps(package)}

    def draw(shards: Sequence[PlannedShard], count: Callable[[int], None]) -> Iterator[list[bytes]]:
        for shard in shards:
            pictures = []
            for key, _ in shard.samples:
                pictures.append(square(stamps[key], config.image_size))
                count(1)
            yield pictures

    return write_sample(config.pairs, _plan(config, package, sorted(stamps.values(), key=lambda stamp: stamp.key)), draw, advance)


def fetch_stamps(cache: Path | None = None) -> Path:
    """The package file, from the cache or by ``apt-get download`` (needs no root; apt checks the signature)."""
    folder = cache_folder(cache)
    found = sorted(folder.glob(f"{PACKAGE}_*.deb")) if folder.is_dir() else []
    if found:
        return found[-1]
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise SampleError(f"the stamps come from Debian's package {PACKAGE}, and this machine has no apt-get; make the sample on a Debian machine")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
            command = ["apt-get", "download", PACKAGE]
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=_FETCH_SECONDS, check=False)
            got = sorted(Path(scratch).glob(f"{PACKAGE}_*.deb"))
            if done.returncode or not got:
                said = " ".join(done.stderr.split())[-300:]
                raise SampleError(f"apt-get could not download {PACKAGE} ({said}); run 'apt-get update' as root once, then the same command again")
            os.replace(got[0], folder / got[0].name)
            return folder / got[0].name
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SampleError(f"{PACKAGE} could not be fetched into {folder} ({error}); check the network, or choose another --cache") from error


def is_kept(path: str) -> bool:
    """Whether a picture belongs to the sample: no symbol, and the sha256 of its file name starts with 0 to 7."""
    posix = PurePosixPath(path)
    return posix.parts[0] not in LEFT_OUT and hashlib.sha256(posix.name.encode()).hexdigest()[0] in "01234567"


def read_stamps(package: Path) -> list[Stamp]:
    """The kept pictures of the package that have a caption. Nothing is unpacked to disk."""
    pictures: dict[str, bytes] = {}
    captions: dict[str, str] = {}
    try:
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for info in archive:
                    path = info.name.removeprefix("./").removeprefix(_ROOT)
                    if not info.isreg() or info.size > _MEMBER_LIMIT or not path.endswith((".png", ".txt")):
                        continue
                    picture = path[:-4] + ".png"
                    if not is_kept(picture):
                        continue
                    file = archive.extractfile(info)
                    assert file is not None  # a regular file has bytes
                    if path.endswith(".png"):
                        pictures[picture] = file.read()
                    else:
                        captions[picture] = file.readline().decode("utf-8", "replace").strip()
    except (OSError, tarfile.TarError) as error:
        raise SampleError(f"{package} cannot be read ({error}); delete it and run the same command again") from error
    if process.returncode:
        raise SampleError(f"{package} cannot be unpacked by dpkg-deb (exit {process.returncode}); delete it and run the same command again")
    return [Stamp(path=path, png=png, caption=captions[path]) for path, png in sorted(pictures.items()) if captions.get(path)]


def square(stamp: Stamp, size: int) -> bytes:
    """The whole thing on a white square with a small margin, as PNG: a centre crop would cut long things."""
    try:
        picture = decode_image(stamp.png)
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged bytes
        raise SampleError(f"the stamp {stamp.path} does not decode ({error}); delete the cached package and run again") from error
    inner = max(1, round(size * (1 - 2 * MARGIN)))
    scale = inner / max(picture.size)
    fitted = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(fitted, ((size - fitted.width) // 2, (size - fitted.height) // 2))
    out = io.BytesIO()
    canvas.save(out, "PNG")
    return out.getvalue()


def _plan(config: StampsConfig, package: Path, stamps: Sequence[Stamp]) -> Plan:
    source = {
        "name": PACKAGE,
        "version": package.name.split("_")[1],
        "sha256": hashlib.sha256(package.read_bytes()).hexdigest(),
        "licence": "GPL-2",
        "author": "Bill Kendrick and the Tux Paint contributors",
        "source": "http://sourceforge.net/projects/tuxpaint",
        "used_for": "zero-shot tests only",
    }
    samples = tuple((stamp.key, {"txt": stamp.caption.encode(), "json": _facts(stamp)}) for stamp in stamps)
    kept = {"pairs": len(stamps), "styles": {"tuxpaint": len(stamps)}, "groups": dict(Counter(PurePosixPath(s.path).parts[0] for s in stamps))}
    keys = "\n".join(sorted(stamp.key for stamp in stamps))
    credit = f"# Credits\n\n{len(stamps)} pictures and captions of {PACKAGE} {source['version']}, {source['author']}, licence GPL-2, {source['source']}.\n"
    return Plan(
        kind="stamps",
        arguments={"image_size": config.image_size},
        facts={"splits": {"all": kept}, "gallery": {"count": len(stamps), "sha256": hashlib.sha256(keys.encode()).hexdigest()}},
        packages=[source],
        tools={"pillow": PIL.__version__},
        shards=[PlannedShard(name="stamps-00000.tar", samples=samples)],
        files={"CREDITS.md": credit.encode()},
        image_extension="png",
    )


def _facts(stamp: Stamp) -> bytes:
    group = PurePosixPath(stamp.path).parts[0]
    facts = {"concept": stamp.key, "style": "tuxpaint", "group": group, "label": stamp.caption, "tags": [], "licence": "GPL-2", "file": stamp.path}
    return json.dumps(facts, ensure_ascii=False, separators=(",", ":")).encode()
