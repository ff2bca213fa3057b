"""onnxruntime-web as a peer: the plain export of a tower in Chromium, timed inside the page, in the same rounds as all others."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.browser import ask, chromium, open_page, served, write_page, write_rows
from benchmarks.measure import Elapsed


class PageRun:
    """A tower in a page: called with rows it gives their embeddings; `timed` gives nanoseconds by the page's own clock for one of its rows."""

    def __init__(self, page: Any, about: dict[str, Any], rows: np.ndarray) -> None:
        self._page, self._about, self._rows = page, about, rows
        self._starts = {row.tobytes(): number for number, row in reversed(list(enumerate(rows)))}
        self._open: set[int] = set()

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        found = ask(self._page, "run", *self._place(inputs))
        return np.array(found["data"], np.float32).reshape(found["dims"])

    def timed(self, inputs: np.ndarray) -> Elapsed:
        """One run."""
        return Elapsed(ask(self._page, "once", *self._place(inputs)))

    def _place(self, inputs: np.ndarray) -> tuple[str, int]:
        batch = len(inputs)
        if batch not in self._open:
            ask(self._page, "open", {**self._about, "name": str(batch), "batch": batch})
            self._open.add(batch)
        return str(batch), self._starts[inputs[0].tobytes()]


@contextlib.contextmanager
def browser_peer() -> Iterator[Callable[[Path, np.ndarray], Callable[[int], PageRun]]]:
    """A browser and a served folder: gives a function of an ONNX file and the rows, which gives an opener of threads.

    Raises:
        DeviceError, MissingExtraError: there is no browser, or no onnxruntime-web.
    """
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        write_page(folder)
        browser = stack.enter_context(chromium())()
        stack.callback(browser.close)
        address = stack.enter_context(served(folder))

        def peer(graph: Path, rows: np.ndarray) -> Callable[[int], PageRun]:
            import onnx

            shutil.copyfile(graph, folder / graph.name)
            about = {"file": graph.name, "input": onnx.load(graph, load_external_data=False).graph.input[0].name, "output": None, **write_rows(folder, graph.stem, rows)}
            # threads are the page's, not the tower's: every number of them has a page of its own
            return lambda threads: PageRun(open_page(browser, address), {**about, "threads": threads}, rows)

        yield peer
