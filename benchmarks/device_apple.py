"""Apple's devices: this Mac's Core ML by the script of plans, and a folder with a small app for an iPhone, whose results are imported. Not run on hardware."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import DeviceError
from runtime.files import file_sha256, whole_folder, write_json
from runtime.manifest import read_manifest
from runtime.selfcheck import read_golden

from .bench_steps import SETTLE
from .device_plan import import_plan, write_plan
from .devices import DeviceSettings, Stream, lines_of
from .importers import Found, lines_of_tool
from .results import Line, ResultsError

KITS = Path(__file__).parent / "kits"
RESULTS = "ios.jsonl"


class MacDevice:
    """This Mac: the plan is written to a temporary folder and run there at once, Core ML artefacts with coremltools."""

    def __init__(self, settings: DeviceSettings) -> None:
        if sys.platform != "darwin":
            raise DeviceError("--device mac measures the Mac that it runs on; from here, carry a folder to one: --device plan:FOLDER")
        self._settings, self._work = settings, Path(tempfile.mkdtemp(prefix="mclip-mac-"))
        self._bundle = Path()
        self.facts: dict[str, Any] = {"kind": "mac", "label": settings.label}
        self.note: str | None = None

    def push(self, bundle: Path, known: Sequence[Line]) -> None:
        """Write the plan."""
        self._bundle = bundle
        write_plan(bundle, self._work / "plan", self._settings)

    def run(self) -> Iterator[Line]:
        """Measure."""
        yield from lines_of(Stream([sys.executable, str(self._work / "plan" / "measure.py"), "--stream"], self._settings.timeout), "mac", self.facts)

    def pull(self) -> list[Line]:
        """What the file has."""
        return import_plan(self._work / "plan", self._bundle) if (self._work / "plan" / "results.jsonl").is_file() else []

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._work, ignore_errors=True)


class IosDevice:
    """Writes the folder the first time, imports from it once the app has run. The device's number is nowhere in it."""

    def __init__(self, settings: DeviceSettings, folder: Path = Path("ios-benchmark")) -> None:
        self._folder, self._settings, self._bundle = folder, settings, Path()
        self.facts: dict[str, Any] = {"kind": "ios", "label": settings.label}
        self.note: str | None = None

    def push(self, bundle: Path, known: Sequence[Line]) -> None:
        """Write the folder, unless it is there."""
        self._bundle = bundle
        if not (self._folder / "plan.json").is_file():
            write_ios(bundle, self._folder, self._settings)

    def run(self) -> Iterator[Line]:
        """What came back; nothing at first."""
        if not (self._folder / RESULTS).is_file():
            command = "sh ios.sh UDID IDENTITY BUNDLE_ID PROFILE"
            self.note = f"the app is in {self._folder.name}: on a Mac with Xcode run '{command}' there, then give this command again (not run on hardware)"
            return
        yield from import_ios(self._folder, self._bundle)

    def pull(self) -> list[Line]:
        """Everything came by `run`."""
        return []

    def close(self) -> None:
        """The folder stays."""


def write_ios(bundle: Path, folder: Path, settings: DeviceSettings) -> None:
    """The app's source, its script, the Core ML packages and the golden inputs as JSON. Raises DeviceError without a proven Core ML artefact."""
    manifest = read_manifest(bundle)
    artefacts = [a for a in manifest.artefacts if a.target == "coreml" and a.status == "proven" and a.path]
    if not artefacts:
        raise DeviceError(f"bundle '{manifest.name}' has no proven Core ML artefact; export one with --target coreml")
    golden = read_golden(bundle, manifest)
    with whole_folder(folder) as part:
        (part / "towers").mkdir(parents=True)
        steps = []
        for artefact in artefacts:
            file = f"towers/{artefact.id}.mlpackage"
            shutil.copytree(bundle / str(artefact.path), part / file)
            spec = manifest.image if artefact.tower == "image" else manifest.text
            steps.append({"artefact": artefact.id, "tower": artefact.tower, "file": file, "input": spec.input, "output": spec.output, "cosine_min": artefact.cosine_threshold})
        for tower, rows, wanted in (("image", golden.pixels, golden.image_embedding), ("text", golden.tokens, golden.text_embedding)):
            flat = rows[:4].reshape(min(4, len(rows)), -1)
            write_json(part / f"inputs-{tower}.json", {"shape": [1, *rows.shape[1:]], "rows": flat.tolist(), "expected": np.asarray(wanted[:4], float).tolist()})
        timing = {"warmup": 5, "settle": SETTLE // 5, "min_samples": 64, "max_samples": 2000, "seconds": settings.seconds}
        write_json(part / "plan.json", {"bundle": file_sha256(bundle / "manifest.json"), "steps": steps, **timing})
        for name in ("Benchmark.swift", "ios.sh"):
            shutil.copyfile(KITS / name, part / name)


def import_ios(folder: Path, bundle: Path) -> list[Line]:
    """Lines of what the app wrote. A last line cut in half is passed over. Raises DeviceError for another bundle, ResultsError for what the app did not write."""
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    if plan.get("bundle") != file_sha256(bundle / "manifest.json"):
        raise DeviceError(f"the app in {folder.name} was written for another bundle; name that one")
    towers = {step["artefact"]: step["tower"] for step in plan["steps"]}
    made: list[Line] = []
    texts = (folder / RESULTS).read_text(encoding="utf-8", errors="replace").splitlines()
    for number, text in enumerate(texts, 1):
        try:
            row = json.loads(text)
            if row.get("error"):
                continue
            samples = [int(value) for value in row["samples"]]
            found = Found(tool="Core ML, all units", nanoseconds=samples, memory=int(row.get("peak_bytes") or 0) or None, figures={"golden_cosine_min": float(row["cosine_min"])})
            found.loads = {"load_cold": int(row["compile_ns"]) + int(row["load_ns"]), "load_warm": int(row["load_ns"])}
            found.figures |= {name: {"thermal_status": row.get(f"thermal_{name}")} for name in ("before", "after")}
            tower = towers[row["artefact"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(texts):
                break
            raise ResultsError(f"line {number} of {folder.name}/{RESULTS} is not what the app writes ({type(error).__name__}); fetch the file again") from error
        rows = lines_of_tool(found, tower=tower, artefact=row["artefact"], bundle=bundle)
        for line in rows:
            line["environment"] = {"processor": {"model": None}, "system": {"name": "iOS", "release": row.get("system")}}
        made += rows
    return made


def open_mac(name: str, settings: DeviceSettings) -> MacDevice:
    """This Mac."""
    return MacDevice(settings)


def open_ios(name: str, settings: DeviceSettings) -> IosDevice:
    """The folder `ios-benchmark` here; `name` is the device's number for the script and is written nowhere."""
    return IosDevice(settings)

