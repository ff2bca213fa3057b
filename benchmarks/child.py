"""What must be measured in a process of its own: cold start, peak memory, the machine's peak. Prints one JSON object.

    python -m benchmarks.child cold-text BUNDLE --threads 1 --text "…"
    python -m benchmarks.child memory-image_tower BUNDLE --threads 1 --artefact image-onnx-fp32

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
        import numpy as np

        size, length = manifest.image.image_size, manifest.text.context_length
        tower = open_artefact(folder, manifest, manifest.artefact(options.artefact), options.threads)
        inputs = np.zeros((1, 3, size, size), np.float32) if phase == "image_tower" else np.ones((1, length), np.int32)
        for _ in range(ROUNDS):
            tower.run(inputs)
    return {"bytes": high_water_mark()}


def high_water_mark() -> int | None:
    """Peak resident memory of this process, bytes: VmHWM, which starts anew with the program (ru_maxrss would inherit the parent's)."""
    try:
        for row in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if row.startswith("VmHWM:"):
                return int(row.split()[1]) * 1024
    except OSError:
        pass
    return None


def main(argv: list[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.child")
    parser.add_argument("task", help="cold-text, cold-image, memory-PHASE or peak")
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
    else:
        from benchmarks.peak import measure_peak

        made = measure_peak(options.threads, options.seconds).as_dict()
    made["torch"] = "torch" in sys.modules
    sys.stdout.write(json.dumps(made) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
