"""What must be measured in a process of its own: cold start, peak memory, the machine's peak. Prints one JSON object.

    python -m benchmarks.child cold-text BUNDLE --threads 1 --text "…"
    python -m benchmarks.child memory-image_tower BUNDLE --threads 1 --artefact image-onnx-fp32
    python -m benchmarks.child load BUNDLE --threads 1 --artefact image-onnx-fp32

Nothing but the standard library is imported before the clock starts.
"""

import time

STARTED = time.perf_counter_ns()

import argparse  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

ROUNDS = 10


def cold(what: str, options: argparse.Namespace) -> dict[str, Any]:
    """Import the SDK, open the bundle, embed one thing; nanoseconds since the first line of this file, step by step."""
    import runtime

    load = runtime.load
    imported = time.perf_counter_ns()
    prefer = {what: options.artefact} if options.artefact else None
    clip = load(options.bundle, threads=options.threads, prefer=prefer)
    loaded = time.perf_counter_ns()
    found = clip.encode_text([options.text]) if what == "text" else clip.encode_image([options.image])
    ended = time.perf_counter_ns()
    return {
        "ns": ended - STARTED,
        "import_ns": imported - STARTED,
        "load_ns": loaded - imported,
        "first_ns": ended - loaded,
        "shape": list(found.shape),
        "artefact": clip.choice[what].id,
    }


def memory(phase: str, options: argparse.Namespace) -> dict[str, Any]:
    """High-water mark of resident memory after ten rounds of one phase alone."""
    import runtime
    from runtime.encoder import open_artefact

    folder = Path(options.bundle)
    manifest = runtime.read_manifest(folder, verify=False)
    if phase == "preprocess":
        from runtime.preprocess import preprocess

        config = manifest.image.preprocess_config()
        for _ in range(ROUNDS):
            preprocess([options.image], config)
    elif phase == "tokenise":
        tokenizer = runtime.Tokenizer.open(folder / "tokenizer.json", manifest.text.context_length, manifest.text.cleaning, manifest.text.pad_id)
        for _ in range(ROUNDS):
            tokenizer([options.text])
    else:
        tower = open_artefact(folder, manifest, manifest.artefact(options.artefact), options.threads)
        inputs = _inputs(manifest, "image" if phase == "image_tower" else "text")
        for _ in range(ROUNDS):
            tower.run(inputs)
    return {"bytes": high_water_mark(), "resident": high_water_mark("VmRSS")}


def high_water_mark(which: str = "VmHWM") -> int | None:
    """Peak resident memory of this process, bytes: VmHWM, which starts anew with the program (ru_maxrss would inherit the parent's). VmRSS is what it has now."""
    try:
        for row in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if row.startswith(f"{which}:"):
                return int(row.split()[1]) * 1024
    except OSError:
        pass
    return None


def load(options: argparse.Namespace) -> dict[str, Any]:
    """One artefact from the disk to its first embedding: its files read, opened with them out of the system's cache, the first run, opened again.

    `cold` says whether dropping the cache worked: whether opening read from the disk most of what the files hold.
    """
    import runtime
    from runtime.encoder import open_artefact

    folder = Path(options.bundle)
    manifest = runtime.read_manifest(folder, verify=False)
    artefact = manifest.artefact(options.artefact)
    place = folder / str(artefact.path)
    files = [path for path in ([place] if place.is_file() else sorted(place.rglob("*"))) if path.is_file()]
    inputs = _inputs(manifest, artefact.tower)
    _import_backend(artefact.target)
    size = sum(path.stat().st_size for path in files)
    before = time.perf_counter_ns()
    for path in files:
        path.read_bytes()
    read = time.perf_counter_ns() - before
    dropped = _drop(files)
    fetched = _disk_bytes()
    before = time.perf_counter_ns()
    tower = open_artefact(folder, manifest, artefact, options.threads)
    cold = time.perf_counter_ns() - before
    fetched = _disk_bytes() - fetched
    before = time.perf_counter_ns()
    tower.run(inputs)
    first = time.perf_counter_ns() - before
    before = time.perf_counter_ns()
    open_artefact(folder, manifest, artefact, options.threads)
    warm = time.perf_counter_ns() - before
    return {"file_read": read, "load_cold": cold, "first_inference": first, "load_warm": warm, "file_bytes": size, "cold": dropped and fetched >= size / 2}


def _import_backend(target: str) -> None:
    """The runtime's own import is part of a cold start, not of loading a file."""
    import contextlib
    import importlib

    if target == "openvino":  # as the SDK imports it: without the part that reports its use to its maker
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    with contextlib.suppress(ImportError):
        importlib.import_module({"onnx": "onnxruntime", "openvino": "openvino", "litert": "ai_edge_litert.interpreter"}.get(target, "onnxruntime"))


def _drop(files: list[Path]) -> bool:
    """Ask the system to forget the content of files; it does so for what is written to the disk already."""
    import os

    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        with path.open("rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _disk_bytes() -> int:
    """Bytes that this process has had fetched from the disk."""
    try:
        for row in Path("/proc/self/io").read_text(encoding="ascii").splitlines():
            if row.startswith("read_bytes:"):
                return int(row.split()[1])
    except OSError:
        pass
    return 0


def operations(options: argparse.Namespace) -> dict[str, Any]:
    """The profile of one ONNX artefact."""
    import runtime
    from benchmarks.op_profile import profile

    folder = Path(options.bundle)
    manifest = runtime.read_manifest(folder, verify=False)
    artefact = manifest.artefact(options.artefact)
    spec = manifest.image if artefact.tower == "image" else manifest.text
    feeds = {spec.input: _inputs(manifest, artefact.tower)}
    return profile(folder / str(artefact.path), feeds, options.threads, half=artefact.precision == "fp16")


def _inputs(manifest: Any, tower: str) -> Any:
    import numpy as np

    size, length = manifest.image.image_size, manifest.text.context_length
    return np.zeros((1, 3, size, size), np.float32) if tower == "image" else np.ones((1, length), np.int32)


def main(argv: list[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.child")
    parser.add_argument("task", help="cold-text, cold-image, memory-PHASE, load, operations or peak")
    parser.add_argument("bundle", nargs="?")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--artefact")
    parser.add_argument("--text", default="a red heart")
    parser.add_argument("--image")
    parser.add_argument("--seconds", type=float, default=0.7)
    options = parser.parse_args(argv)
    kind, _, what = options.task.partition("-")
    if kind == "cold":
        made = cold(what, options)
    elif kind == "memory":
        made = memory(what, options)
    elif kind == "load":
        made = load(options)
    elif kind == "operations":
        made = operations(options)
    else:
        from benchmarks.peak import measure_peak

        made = measure_peak(options.threads, options.seconds).as_dict()
    made["torch"] = "torch" in sys.modules
    sys.stdout.write(json.dumps(made) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
