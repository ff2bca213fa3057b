"""The timed phases of a bundle: functions of a round number, each with its name, its artefact and what it is compared with."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import runtime
from runtime.backends import missing
from runtime.encoder import open_artefact
from runtime.errors import DeviceError, ParityError
from runtime.manifest import Artefact
from runtime.preprocess import load_image, preprocess
from runtime.selfcheck import selfcheck

from .inputs import Inputs
from .measure import Timed

TOWERS = ("image", "text")
GALLERY = 10_000
"""Embeddings that the search phase looks through: a product and a partial sort, as `mclip search` does."""


@dataclass(slots=True)
class Subject:
    """A bundle that is measured."""

    folder: Path
    threads: int
    inputs: Inputs
    sha256: str = ""
    clip: runtime.Clip = field(init=False)

    def __post_init__(self) -> None:
        import hashlib

        hold_blas(self.threads)
        self.clip = runtime.load(self.folder, threads=self.threads, measure=False)
        self.sha256 = hashlib.sha256((self.folder / "manifest.json").read_bytes()).hexdigest()

    @property
    def label(self) -> dict[str, str]:
        """What results say of the bundle: its name and the hash of its manifest, which holds the hash of every file."""
        return {"name": self.clip.manifest.name, "sha256": self.sha256}

    def runnable(self, tower: str) -> list[Artefact]:
        """Proven artefacts of a tower that this machine can run, the dynamic fp32 one first (the reference of comparisons)."""
        found = [a for a in self.clip.manifest.artefacts if a.tower == tower and a.status == "proven" and not missing(a.target)]
        return sorted(found, key=lambda a: (a.precision != "fp32", a.batch != "dynamic", a.id))

    def check(self) -> dict[str, float]:
        """Run the golden inputs through every runnable artefact: a fast wrong answer is not worth timing.

        Returns: least cosine by artefact id. Raises ParityError when one misses its threshold, or preprocessing or tokenizer differ.
        """
        ids = [artefact.id for tower in TOWERS for artefact in self.runnable(tower)]
        result = selfcheck(self.folder, threads=self.threads, artefacts=ids)
        if not result["ok"]:
            bad = [entry["id"] for entry in result["artefacts"] if not entry["ok"]] or ["preprocessing or tokenizer"]
            raise ParityError(f"{self.clip.manifest.name} gives wrong answers here ({', '.join(bad)}), so it is not timed; run: mclip verify {self.folder}")
        return {entry["id"]: entry["cosine_min"] for entry in result["artefacts"] if entry.get("cosine_min") is not None}

    def host(self) -> dict[str, Timed]:
        """Phases without a tower."""
        jpegs, texts, config, tokenizer = self.inputs.jpegs, self.inputs.texts, self.clip.preprocess_config, self.clip.tokenizer
        pictures = [load_image(data) for data in jpegs]
        rng = np.random.default_rng(0)
        rows = rng.standard_normal((GALLERY, self.clip.embed_dim), dtype=np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        queries = rng.standard_normal((8, self.clip.embed_dim), dtype=np.float32)

        def search(turn: int) -> object:
            scores = rows @ queries[turn % 8]
            best = np.argpartition(-scores, 10)[:10]
            return best[np.argsort(-scores[best])]

        def normalise(turn: int) -> object:
            row = queries[turn % 8]
            return row / np.linalg.norm(row)

        return {
            "decode": lambda turn: load_image(jpegs[turn % len(jpegs)]),
            "preprocess": lambda turn: preprocess([pictures[turn % len(pictures)]], config),
            "tokenise": lambda turn: tokenizer([texts[turn % len(texts)]]),
            "normalise": normalise,
            "search": search,
        }

    def tower(self, tower: str, artefact: Artefact, batch: int = 1) -> Timed:
        """One artefact alone on prepared inputs, `batch` of them at a time."""
        opened = open_artefact(self.folder, self.clip.manifest, artefact, self.threads)
        if tower == "image":
            prepared = [np.ascontiguousarray(preprocess([data], self.clip.preprocess_config)) for data in self.inputs.jpegs]
        else:
            prepared = [np.ascontiguousarray(self.clip.tokenizer([text])) for text in self.inputs.texts]
        if batch > 1:
            prepared = [np.concatenate([prepared[(start + offset) % len(prepared)] for offset in range(batch)]) for start in range(len(prepared))]
        return lambda turn: opened.run(prepared[turn % len(prepared)])

    def end_to_end(self, tower: str, artefact: Artefact) -> Timed:
        """From JPEG bytes or a string to the embedding, through the SDK as an application calls it."""
        clip = runtime.load(self.folder, threads=self.threads, prefer={tower: artefact.id}, measure=False)
        clip.queries.entries = 0  # every turn is computed
        if tower == "image":
            jpegs = self.inputs.jpegs
            return lambda turn: clip.encode_image([jpegs[turn % len(jpegs)]])
        texts = self.inputs.texts
        return lambda turn: clip.encode_text([texts[turn % len(texts)]])

    def not_runnable(self) -> dict[str, str]:
        """Proven artefacts that this machine cannot time -> why."""
        why = {
            "coreml": "Core ML runs on Apple devices only; its numerics were proven when it was exported, its speed was not measured here",
            "tensorrt": "TensorRT needs an NVIDIA device; its speed was not measured here",
        }
        return {
            artefact.id: why.get(artefact.target, f"nothing on this machine runs the target {artefact.target}")
            for artefact in self.clip.manifest.artefacts
            if artefact.status == "proven" and missing(artefact.target)
        }


def hold_blas(threads: int) -> bool:
    """Hold numpy's own matrix products (the search phase) to as many threads; False where its library has no way to.

    numpy's wheels carry OpenBLAS, which takes every core unless it is told otherwise before numpy is imported, and that has happened here.
    """
    folder = Path(np.__file__).parents[1] / "numpy.libs"
    for path in sorted(folder.glob("*openblas*")) if folder.is_dir() else []:
        library = ctypes.CDLL(str(path))
        for name in ("scipy_openblas_set_num_threads64_", "scipy_openblas_set_num_threads", "openblas_set_num_threads"):
            if hasattr(library, name):
                getattr(library, name)(ctypes.c_int(threads))
                return True
    return False


def run_child(arguments: Sequence[str], inputs: Inputs | None = None, timeout: float = 300) -> dict[str, Any]:
    """Run `benchmarks.child` in a fresh interpreter and return what it printed.

    BLAS gets one thread (the peak is measured with one matrix product a thread). Raises DeviceError when it fails or torch was imported.
    """
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]))
    with tempfile.TemporaryDirectory() as scratch:
        extra = []
        if inputs is not None:
            picture = Path(scratch) / "input.jpg"
            picture.write_bytes(inputs.jpegs[0])
            extra = ["--image", str(picture), "--text", inputs.texts[0]]
        command = [sys.executable, "-m", "benchmarks.child", *arguments, *extra]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DeviceError(f"the measuring process '{arguments[0]}' ended with exit code {done.returncode}: {last}")
    made: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if made.pop("torch"):
        raise DeviceError(f"torch was imported during '{arguments[0]}'; the runtime must not need it, find the import with: python -X importtime")
    return made
