"""A folder to carry to a device that has none of our packages: towers, inputs, expected answers, a shell script and a Python script that needs numpy and
onnxruntime alone. What it measured there is imported from the same folder, checked against what was written into it.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import DeviceError
from runtime.files import file_sha256, whole_folder, write_whole
from runtime.manifest import Artefact, Manifest, read_manifest
from runtime.selfcheck import read_golden

from .bench_steps import ACCURACY, SETTLE
from .devices import DeviceSettings
from .results import SCHEMA, Line, ResultsError, check, version

RESULTS = "results.jsonl"
TARGETS = ("onnx", "coreml")
SCRIPT = """#!/bin/sh
# Measures the towers of this folder. Needs python3 with numpy and onnxruntime (pip install numpy onnxruntime).
cd "$(dirname "$0")" || exit 1
for python in "$MCLIP_PYTHON" python3 python; do
  if [ -n "$python" ] && "$python" -c 'import numpy, onnxruntime' 2>/dev/null; then
    export OMP_WAIT_POLICY=PASSIVE OPENBLAS_NUM_THREADS=1
    exec "$python" measure.py "$@"
  fi
done
echo "no python here has numpy and onnxruntime; install them with: python3 -m pip install numpy onnxruntime" >&2
exit 1
"""
NOTE = """Carry this folder to the device, run `sh run.sh` there, bring it back (results.jsonl is what matters), and give the same
command again that wrote it: mclip bench BUNDLE --device plan:FOLDER --out results.jsonl
"""


def write_plan(bundle: Path, folder: Path, settings: DeviceSettings, threads: Sequence[int] = (), batches: Sequence[int] = (1,)) -> dict[str, Any]:
    """Write the folder, whole or not at all, and return its plan. Raises DeviceError when it exists and is no plan, or nothing in the bundle is ONNX."""
    if folder.exists() and any(folder.iterdir()):
        raise DeviceError(f"the folder {folder.name} is not empty; name one that does not exist yet")
    manifest = read_manifest(bundle)
    golden = read_golden(bundle, manifest)
    artefacts = [artefact for artefact in manifest.artefacts if artefact.target in TARGETS and artefact.status == "proven" and artefact.path]
    if not artefacts:
        raise DeviceError(f"bundle '{manifest.name}' has no proven ONNX or Core ML artefact, and a plan measures nothing else; export one with --target onnx")
    arrays = {"image": golden.pixels, "text": golden.tokens, "image_embedding": golden.image_embedding, "text_embedding": golden.text_embedding}
    with whole_folder(folder) as part:
        part.mkdir(parents=True)
        (part / "towers").mkdir()
        files: dict[str, str] = {}
        for artefact in artefacts:
            source = bundle / str(artefact.path)
            if artefact.target == "coreml":
                files[artefact.id] = f"towers/{artefact.id}.mlpackage"
                shutil.copytree(source, part / files[artefact.id])
            elif source.is_dir():
                shutil.copytree(source, part / "towers" / artefact.id)
                files[artefact.id] = f"towers/{artefact.id}/model.onnx"
            else:
                shutil.copyfile(source, part / "towers" / f"{artefact.id}.onnx")
                files[artefact.id] = f"towers/{artefact.id}.onnx"
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        write_whole(part / "inputs.npz", buffer.getvalue())
        steps = [
            _step(manifest, artefact, files[artefact.id], _hash(part / files[artefact.id]), count, batch)
            for count in (threads or (settings.threads,)) for batch in batches for artefact in artefacts
            if artefact.batch == "dynamic" or artefact.batch == str(batch)
        ]  # fmt: skip
        plan: dict[str, Any] = {
            "schema": SCHEMA, "tool": version(), "bundle": {"name": manifest.name, "sha256": _identity(bundle)}, "warmup": 5, "settle": SETTLE, "min_samples": 50,
            "max_samples": 2000, "seconds": settings.seconds, "input_sha256": hashlib.sha256(golden.pixels.tobytes() + golden.tokens.tobytes()).hexdigest(), "steps": steps,
        }  # fmt: skip
        write_whole(part / "plan.json", (json.dumps(plan, indent=1) + "\n").encode())
        shutil.copyfile(Path(__file__).parent / "kits" / "measure.py", part / "measure.py")
        write_whole(part / "run.sh", SCRIPT.encode())
        (part / "run.sh").chmod(0o755)
        write_whole(part / "README.txt", NOTE.encode())
    return plan


def import_plan(folder: Path, bundle: Path) -> list[Line]:
    """Lines that came back, checked.

    A last line that was cut in half is passed over; anything else that is wrong is refused. Raises ResultsError, DeviceError for another bundle.
    """
    plan = _read(folder)
    if plan["bundle"]["sha256"] != _identity(bundle):
        raise DeviceError(f"the plan in {folder.name} was written for another bundle ({plan['bundle']['name']}, {plan['bundle']['sha256'][:8]}); name that one")
    known = {(step["artefact"], step["threads"], step["batch"]) for step in plan["steps"]}
    rows: list[Line] = []
    texts = (folder / RESULTS).read_text(encoding="utf-8", errors="replace").splitlines()
    for number, text in enumerate(texts, 1):
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            if number == len(texts):  # the device was switched off while it wrote
                break
            raise ResultsError(f"line {number} of {folder.name}/{RESULTS} is not JSON ({str(error)[:80]}); remove that line") from error
        row = check(row, f"line {number} of {folder.name}/{RESULTS}")
        if row["bundle"] != plan["bundle"] or (row["artefact"], row["settings"].get("threads"), row["settings"].get("batch")) not in known:
            raise ResultsError(f"line {number} of {folder.name}/{RESULTS} is of no step of its plan; bring back the results of this folder")
        rows.append(row)
    return rows


class PlanDevice:
    """Writes the folder the first time, imports from it once it came back with results."""

    def __init__(self, folder: Path, settings: DeviceSettings) -> None:
        self._folder, self._settings, self._bundle = folder, settings, Path()
        self.facts: dict[str, Any] = {"kind": "plan", "label": settings.label or folder.name}
        self.note: str | None = None

    def push(self, bundle: Path, known: Sequence[Line]) -> None:
        """Write the folder, unless it is there."""
        self._bundle = bundle
        if not (self._folder / "plan.json").is_file():
            write_plan(bundle, self._folder, self._settings)

    def run(self) -> Iterator[Line]:
        """What came back; nothing at first, when the plan has yet to be carried to the device."""
        if not (self._folder / RESULTS).is_file():
            self.note = f"the plan is in {self._folder.name}: carry that folder to the device, run 'sh run.sh' there, bring it back and give this command again"
            return
        yield from import_plan(self._folder, self._bundle)

    def pull(self) -> list[Line]:
        """Everything came by `run`."""
        return []

    def close(self) -> None:
        """The folder stays."""


def open_plan(name: str, settings: DeviceSettings) -> PlanDevice:
    """A plan in the folder `name`."""
    return PlanDevice(Path(name), settings)


def _hash(path: Path) -> str:
    """Of a file, or of the names and contents of a package's files."""
    if path.is_file():
        return file_sha256(path)
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(file.relative_to(path).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _step(manifest: Manifest, artefact: Artefact, file: str, digest: str, threads: int, batch: int) -> dict[str, Any]:
    spec = manifest.image if artefact.tower == "image" else manifest.text
    figures: dict[str, Any] = {name: getattr(artefact, name) for name in ("tower", "target", "precision", "batch", "bytes")}
    figures["accuracy"] = {name: artefact.parity[name] for name in ACCURACY if artefact.parity.get(name) is not None} if artefact.parity else None
    common = {"artefact": artefact.id, "tower": artefact.tower, "precision": artefact.precision, "file": file, "sha256": digest, "threads": threads, "batch": batch}
    return {**common, "target": artefact.target, "input": spec.input, "output": spec.output, "cosine_min": artefact.cosine_threshold, "figures": figures}


def _identity(bundle: Path) -> str:
    return file_sha256(bundle / "manifest.json")


def _read(folder: Path) -> dict[str, Any]:
    try:
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        wrong = plan.get("schema") != SCHEMA or not isinstance(plan["bundle"]["sha256"], str) or not isinstance(plan["steps"], list)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(f"{folder.name}/plan.json cannot be read ({type(error).__name__}); bring back the whole folder") from error
    if wrong:
        raise ResultsError(f"{folder.name}/plan.json has schema {plan.get('schema')!r}, this program reads {SCHEMA}; write the plan again")
    return dict(plan)
