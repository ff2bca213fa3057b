"""Chromium as a place to measure in: a folder served to a page that times onnxruntime-web and the browser package, driven through Playwright.

    python -m benchmarks.browser FOLDER        measures the plan in FOLDER and prints each line as it is finished (`mclip bench --device browser`)

The page is cross-origin isolated, so WebAssembly has threads and the clock its finest step. Times are taken inside the page: what it costs to ask for
them is in none. Every tower has a browser of its own, so that the peak memory of its renderer is that of one tower. WebGPU is not timed: where there is
no graphics processor Chromium computes it in software, and a figure of that would mislead.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import ClipError, DeviceError, MissingExtraError
from runtime.web_server import open_server

from .environment import environment
from .inputs import Inputs
from .measure import summarise
from .onnxruntime_web import FILES, WEB, ort_folder, pinned
from .results import Line, line

KITS = Path(__file__).parent / "kits"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
HOST = ("decode", "preprocess", "tokenise")


def find_chromium() -> str | None:
    """The browser's program; CHROMIUM names another."""
    named = os.environ.get("CHROMIUM")
    return named if named else next(filter(None, map(shutil.which, NAMES)), None)


def write_page(folder: Path) -> None:
    """The page, the runtime and the browser package into a folder that exists. Raises DeviceError, MissingExtraError: as `ort_folder`."""
    source = ort_folder()
    (folder / "ort").mkdir(exist_ok=True)
    for name in FILES:
        shutil.copyfile(source / name, folder / "ort" / name)
    shutil.copytree(WEB / "src", folder / "src", dirs_exist_ok=True)
    shutil.copyfile(KITS / "browser.html", folder / "index.html")
    shutil.copyfile(KITS / "browser.js", folder / "browser.js")


def write_rows(folder: Path, name: str, rows: np.ndarray) -> dict[str, Any]:
    """Rows as raw little-endian values, and what `bench.open` is told of them. float32 or int32 [N, …]."""
    kind = {"float32": "<f4", "int32": "<i4"}[str(rows.dtype)]
    (folder / f"{name}.bin").write_bytes(np.ascontiguousarray(rows).astype(kind).tobytes())
    return {"rows": f"{name}.bin", "type": str(rows.dtype), "shape": list(rows.shape[1:])}


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's Chromium launcher, with the program set: call it for a browser. Raises MissingExtraError, DeviceError: there is no browser."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError as error:
        raise MissingExtraError("playwright", "browser", "measuring in a browser") from error
    # only the superuser's browser goes without its sandbox: Chromium refuses to start otherwise, and the page is ours
    extra = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as driver:
        program = find_chromium() or (driver.chromium.executable_path if Path(driver.chromium.executable_path).exists() else None)
        if program is None:
            raise DeviceError("there is no Chromium; install one (apt-get install chromium, or: python -m playwright install chromium) or name it in CHROMIUM")

        def launch() -> Any:
            try:
                return driver.chromium.launch(executable_path=program, args=["--disable-gpu", *extra])
            except Error as error:
                raise DeviceError(f"Chromium ({program}) does not start: {_short(error)}") from error

        yield launch


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server of this folder, on this machine alone."""
    server = open_server(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)


def open_page(browser: Any, address: str) -> Any:
    """A fresh page that is ready to measure."""
    page = browser.new_context().new_page()
    page.goto(address)
    page.wait_for_function("() => document.documentElement.dataset.ready", timeout=60_000)
    return page


def ask(page: Any, function: str, *arguments: Any) -> Any:
    """Call one of `window.bench`. Raises DeviceError with what the page said."""
    from playwright.sync_api import Error

    try:
        return page.evaluate(f"(given) => window.bench.{function}(...given)", list(arguments))
    except Error as error:
        raise DeviceError(f"browser: {_short(error)}") from error


def measure_plan(folder: Path) -> Iterator[list[Line]]:
    """Measure what `device_browser` wrote: the browser package's own phases, then one tower after the other."""
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    arrays = dict(np.load(folder / "inputs.npz"))
    places = {tower: write_rows(folder, tower, arrays[tower]) for tower in ("image", "text")}
    with chromium() as launch, served(folder) as address:
        if plan["host"]:
            yield _host(launch, address, plan)
        for step in plan["steps"]:
            if step["target"] == "onnx":
                yield _tower(launch, address, plan, step, places[step["tower"]], arrays[step["tower"] + "_embedding"])


def _host(launch: Any, address: str, plan: dict[str, Any]) -> list[Line]:
    with _opened(launch, address) as (browser, page):
        ask(page, "host", plan["host"])
        facts, rows = _environment(browser, page, 1), []
        for phase in HOST:
            found = ask(page, "timed", phase, plan)
            rows.append(_latency(plan, phase, "", facts, found, {"threads": 1, "batch": 1, "input_sha256": plan["host_sha256"]}, {}))
        return rows


def _tower(launch: Any, address: str, plan: dict[str, Any], step: dict[str, Any], place: dict[str, Any], wanted: np.ndarray) -> list[Line]:
    """The lines of one tower: timed, loaded, and the renderer's memory. A wrong answer is not timed."""
    phase, settings = f"{step['tower']}_tower", {"threads": step["threads"], "batch": step["batch"], "input_sha256": plan["input_sha256"]}
    about = {"bundle": plan["bundle"], "artefact": step["artefact"], "settings": settings}
    if step["file"].endswith("/model.onnx"):
        return [line("not_measured", phase, **about, figures={"reason": "its weights lie in a second file, which the page does not hand over"})]
    with _opened(launch, address) as (browser, page):
        facts = _environment(browser, page, step["threads"])
        about["environment"] = facts
        try:
            opened = ask(page, "open", {"name": "tower", **place, **{name: step[name] for name in ("file", "input", "output", "batch", "threads")}})
            found = np.array(ask(page, "embeddings", "tower"), np.float32)
        except DeviceError as error:
            return [line("not_measured", phase, **about, figures={"reason": str(error)})]
        similarity = _cosine(found, wanted)
        if not similarity >= step["cosine_min"]:
            why = f"it gives wrong answers in the browser (cosine {similarity:.6f}, at least {step['cosine_min']})"
            return [line("not_measured", phase, **about, figures={"reason": why})]
        taken = ask(page, "timed", "tower", plan)
        rows = [_latency(plan, phase, step["artefact"], facts, taken, settings, {**step["figures"], "golden_cosine_min": similarity})]
        for kind, value in (("file_read", opened["file_read"]), ("load_warm", opened["load"])):
            rows.append(line("load", kind, **about, samples=[value], figures={"file_bytes": step["figures"].get("bytes")}))
        peak, now = _renderer_memory(browser)
        if peak:
            rows.append(line("memory", phase, **about, samples=[peak], summary={"maximum": peak}, figures={"resident_bytes": now, "process": "renderer"}))
        return rows


@contextlib.contextmanager
def _opened(launch: Any, address: str) -> Iterator[tuple[Any, Any]]:
    browser = launch()
    try:
        yield browser, open_page(browser, address)
    finally:
        browser.close()


def _latency(
    plan: dict[str, Any], phase: str, artefact: str, facts: dict[str, Any], taken: dict[str, Any], settings: dict[str, Any], figures: dict[str, Any]
) -> Line:
    further = [] if taken["converged"] else [f"warm-up had not converged after {taken['warmup']} rounds"]
    settings = {**settings, "warmup": taken["warmup"], "converged": taken["converged"], "seconds": plan["seconds"], "runs_per_sample": taken["repeats"]}
    summary = summarise(np.array(taken["samples"], np.int64), further=further).as_dict()
    return line(
        "latency", phase, bundle=plan["bundle"], artefact=artefact, settings=settings, samples=taken["samples"], summary=summary, environment=facts,
        figures={**figures, "first_ns": taken["first"]},
    )  # fmt: skip


def _environment(browser: Any, page: Any, threads: int) -> dict[str, Any]:
    facts = environment(threads)
    said = ask(page, "facts")
    facts["packages"] = {"chromium": browser.version, "onnxruntime-web": pinned()[0]}
    facts["browser"] = {"isolated": said["isolated"], "cores": said["cores"], "clock_step_ns": said["clock_step_ns"], "provider": "wasm"}
    return facts


def _renderer_memory(browser: Any) -> tuple[int | None, int | None]:
    """(peak, now) of the largest renderer in bytes, as the system counts them; None where it does not tell."""
    found = []
    for process in browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]:
        if process["type"] == "renderer":
            with contextlib.suppress(OSError, KeyError, ValueError):
                text = Path(f"/proc/{process['id']}/status").read_text(encoding="ascii")
                fields = dict(row.split(":", 1) for row in text.splitlines() if row.startswith("Vm"))
                found.append((int(fields["VmHWM"].split()[0]) * 1024, int(fields["VmRSS"].split()[0]) * 1024))
    return max(found, default=(None, None))


def _cosine(found: np.ndarray, wanted: np.ndarray) -> float:
    """The least over all rows; NaN where a row is not finite."""
    left, right = found.astype(np.float64), wanted.astype(np.float64)
    return float((np.einsum("nd,nd->n", left, right) / (np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1))).min())


def _short(error: Exception) -> str:
    """The first line of what Playwright says, without the name of its own function."""
    text = next((row.strip() for row in str(error).splitlines() if row.strip()), type(error).__name__)
    return text.split("Error: ", 1)[-1][:200]


def host_inputs(folder: Path, inputs: Inputs) -> list[str]:
    """Write the pictures; returns their names."""
    names = [f"picture-{number}.jpg" for number in range(len(inputs.jpegs))]
    for name, data in zip(names, inputs.jpegs, strict=True):
        (folder / name).write_bytes(data)
    return names


def main(argv: Sequence[str]) -> int:
    """Measure and print, as `benchmarks.device_run` does."""
    try:
        for rows in measure_plan(Path(argv[0])):
            for row in rows:
                sys.stdout.write(json.dumps(row, separators=(",", ":")) + "\n")
            sys.stdout.flush()
    except (ClipError, OSError) as error:
        sys.stdout.write(json.dumps({"error": " ".join(str(error).split())}) + "\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
