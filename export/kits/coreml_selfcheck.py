"""Run a bundle's Core ML packages on this Mac and compare them with the checkpoint's golden embeddings.

    pip install coremltools numpy safetensors
    python3 coreml/selfcheck.py [BUNDLE] [--units ALL|CPU_ONLY|CPU_AND_GPU|CPU_AND_NE]

Exit code 1 when a package is not what the checkpoint computes.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import coremltools as ct
import numpy as np
from safetensors.numpy import load_file

LEAST = {"fp32": 0.99999, "fp16": 0.999}


def main():
    parser = argparse.ArgumentParser(description="Run a bundle's Core ML packages here and compare them with the golden embeddings.")
    parser.add_argument("bundle", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--units", default="ALL", choices=[unit.name for unit in ct.ComputeUnit])
    args = parser.parse_args()
    if platform.system() != "Darwin":
        sys.exit("error: Core ML predicts on macOS only; run this on a Mac (elsewhere, mclip verify shows what was proven without one)")
    manifest = json.loads((args.bundle / "manifest.json").read_text(encoding="utf-8"))
    golden = load_file(args.bundle / manifest["golden"]["vectors"])
    failed = False
    for artefact in manifest["artefacts"]:
        if artefact["target"] not in ("coreml", "coreml-image", "coreml-classifier") or artefact["path"] is None:
            continue
        tower, spec = artefact["tower"], manifest[artefact["tower"]]
        inputs, wanted = golden["pixels" if tower == "image" else "tokens"], golden[tower + "_embedding"]
        model = ct.models.MLModel(str(args.bundle / artefact["path"]), compute_units=ct.ComputeUnit[args.units])
        found, seconds = [], []
        for row in inputs:
            start = time.perf_counter()
            found.append(np.asarray(model.predict({spec["input"]: given(artefact, spec, row)})[spec["output"]]).reshape(-1))
            seconds.append(time.perf_counter() - start)
        found = np.stack(found).astype(np.float64)
        cosines = (found * wanted).sum(1) / np.maximum(np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1), 1e-12)
        least = artefact.get("threshold") or LEAST.get(artefact["precision"], 0.9)
        good = bool(np.isfinite(found).all() and cosines.min() >= least)
        failed |= not good and artefact["status"] == "proven"
        print(
            f"{'ok  ' if good else 'FAIL'}  {artefact['id']:<28}  least cosine {cosines.min():.6f} "
            f"(expected {least:g}; the interpreter said {artefact['parity']['cosine_min']:.6f}), "
            f"median {1e3 * sorted(seconds)[len(seconds) // 2]:.2f} ms on {args.units}"
        )
    return 1 if failed else 0


def given(artefact, spec, row):
    """A golden row as the package takes it: a tensor, or a picture whose scale and shift are inside."""
    if artefact["target"] == "coreml":
        return row[None]
    from PIL import Image

    pixels = (row * np.asarray(spec["std"])[:, None, None] + np.asarray(spec["mean"])[:, None, None]) * 255
    return Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


if __name__ == "__main__":
    sys.exit(main())
