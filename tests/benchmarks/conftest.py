"""Shared by the benchmark tests: a toy bundle that runs, and a demo run folder that was drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.fixture_run import write_run
from tests.runtime import toy


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real ONNX towers, small enough to time in a second; tests only read it."""
    folder = tmp_path_factory.mktemp("bench") / "bundle"
    toy.build(folder)
    return folder


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run; tests only read it."""
    return write_run(tmp_path_factory.mktemp("run") / "demo")
