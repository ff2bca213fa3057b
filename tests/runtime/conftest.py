from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.runtime import toy


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy bundle that tests only read."""
    folder = tmp_path_factory.mktemp("toy") / "bundle"
    toy.build(folder)
    return folder


@pytest.fixture
def own_bundle(toy_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(toy_bundle, tmp_path / "bundle"))
