"""Everything the demo page needs in one folder: `python runtime/web/collect.py OUT BUNDLE PAIRS`. Needs nothing but Python and what `npm ci` fetched."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ORT = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
SAMPLES = 60


def collect(out: Path, bundle: Path, pairs: Path) -> None:
    """Write the page beside `out`, then put it in its place.

    Raises:
        SystemExit: something that goes in is missing.
    """
    for wanted, how in ((bundle / "manifest.json", "make demo"), (pairs / "test", "make demo"), (HERE / "node_modules/onnxruntime-web/dist", "make web")):
        if not wanted.exists():
            raise SystemExit(f"{wanted} is missing; run '{how}' first")
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(HERE / "demo", part)
    for name in ("src", "types"):
        if (HERE / name).is_dir():
            shutil.copytree(HERE / name, part / name)
    (part / "ort").mkdir()
    for name in ORT:
        shutil.copyfile(HERE / "node_modules/onnxruntime-web/dist" / name, part / "ort" / name)
    copy_bundle(bundle, part / "bundle")
    copy_samples(pairs, part / "samples")
    # What is kept for use offline: all but the larger runtime, which only WebGPU asks for.
    files = sorted(str(p.relative_to(part)) for p in part.rglob("*") if p.is_file() and "asyncify" not in p.name and "types" not in p.parts and p.name != "service-worker.js")
    digest = hashlib.sha256()
    for name in files:
        digest.update(name.encode() + hashlib.sha256((part / name).read_bytes()).digest())
    worker = part / "service-worker.js"
    worker.write_text(worker.read_text().replace('"VERSION"', json.dumps(digest.hexdigest()[:16])).replace('["FILES"]', json.dumps(["./", *files])))
    kept = {name: out / name for name in ("summary.json", "screenshots") if (out / name).exists()}
    for name, path in kept.items():
        shutil.move(path, part / name)
    if out.exists():
        shutil.rmtree(out)
    part.rename(out)


def copy_bundle(bundle: Path, to: Path) -> None:
    """The manifest and the files that a browser may open: tokenizer, golden inputs, proven ONNX graphs of any batch."""
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    graphs = [a["path"] for a in manifest["artefacts"] if a["target"] == "onnx" and a["status"] == "proven" and a["batch"] == "dynamic"]
    names = ["manifest.json", *(n for n in manifest["files"] if n in graphs or n in ("tokenizer.json", "THIRD_PARTY.md") or n.startswith("golden/"))]
    for name in names:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle / name, to / name)


def copy_samples(pairs: Path, to: Path) -> None:
    """Pictures from all over the test pairs, their captions, and the credits."""
    to.mkdir()
    found: list[tuple[str, bytes, str]] = []
    for path in sorted((pairs / "test").glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {m.name: m for m in tar if m.isfile()}
            for name, member in members.items():
                stem, ext = os.path.splitext(name)
                if ext in (".jpg", ".png", ".webp") and f"{stem}.txt" in members and "/" not in name:
                    picture, caption = tar.extractfile(member), tar.extractfile(members[f"{stem}.txt"])
                    if picture and caption:
                        found.append((name, picture.read(), caption.read().decode()))
    step = max(1, len(found) // SAMPLES)
    chosen = found[step // 2 :: step][:SAMPLES]
    for name, data, _ in chosen:
        (to / name).write_bytes(data)
    (to / "samples.json").write_text(json.dumps([{"file": name, "caption": caption} for name, _, caption in chosen], ensure_ascii=False, indent=1) + "\n")
    shutil.copyfile(pairs / "CREDITS.md", to / "CREDITS.md")


if __name__ == "__main__":
    collect(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
