"""A browser as a device: Chromium on this machine, the towers on onnxruntime-web, the browser package's own decoding, preprocessing and tokenising."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from runtime.errors import DeviceError
from runtime.files import write_json
from runtime.manifest import read_manifest

from .browser import HOST, find_chromium, host_inputs, write_page
from .device_plan import write_plan
from .devices import DeviceSettings, Stream, lines_of
from .inputs import draw_inputs
from .results import Line


class BrowserDevice:
    """Measures in a child that drives the browser: when it hangs, both are ended."""

    def __init__(self, settings: DeviceSettings) -> None:
        self._settings = settings
        self._work = Path(tempfile.mkdtemp(prefix="mclip-browser-"))
        self.facts: dict[str, Any] = {"kind": "browser", "label": settings.label}
        self.note: str | None = None

    def push(self, bundle: Path, known: Sequence[Line]) -> None:
        """Write the plan, the inputs and the page."""
        folder = self._work / "page"
        manifest = read_manifest(bundle)
        plan = write_plan(bundle, folder, self._settings)
        inputs = draw_inputs(seed=0)
        done = {(row["artefact"], row["settings"].get("threads"), row["settings"].get("batch")) for row in known if row["kind"] in ("latency", "not_measured")}
        plan["steps"] = [step for step in plan["steps"] if (step["artefact"], step["threads"], step["batch"]) not in done]
        plan["host"] = None if {row["phase"] for row in known} >= set(HOST) else {
            "pictures": host_inputs(folder, inputs), "texts": list(inputs.texts), "image": dataclasses.asdict(manifest.image), "text": dataclasses.asdict(manifest.text)
        }  # fmt: skip
        plan["host_sha256"] = inputs.sha256
        shutil.copyfile(bundle / "tokenizer.json", folder / "tokenizer.json")
        write_json(folder / "plan.json", plan)
        write_page(folder)

    def run(self) -> Iterator[Line]:
        """Lines of the child as they come."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]))}
        yield from lines_of(Stream([sys.executable, "-m", "benchmarks.browser", str(self._work / "page")], self._settings.timeout, environment), "browser", self.facts)

    def pull(self) -> list[Line]:
        """Everything came by `run`."""
        return []

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._work, ignore_errors=True)


def open_browser(name: str, settings: DeviceSettings) -> BrowserDevice:
    """Chromium on this machine. Raises DeviceError when there is none."""
    if settings.cores or settings.priority is not None:
        raise DeviceError("--cores and --priority do not reach a browser's processes; leave them out with --device browser")
    if find_chromium() is None:
        from importlib.util import find_spec

        if find_spec("playwright") is None:
            raise DeviceError("there is no Chromium; install one (apt-get install chromium) or name it in CHROMIUM")
    return BrowserDevice(settings)
