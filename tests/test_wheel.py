"""The base install, for real: the wheel in a fresh environment outside the checkout. Needs a package index: `make test-wheel`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.runtime import toy

ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = 190_000_000

pytestmark = [pytest.mark.slow, pytest.mark.network]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)], check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"mobileclip", "distill", "export", "runtime", "benchmarks"}
    venv.create(folder / "env", with_pip=True)
    subprocess.run([str(folder / "env/bin/python"), "-m", "pip", "install", "--quiet", str(wheel)], check=True, timeout=600, cwd=folder)
    return folder / "env"


def run(environment: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MCLIP"))}
    return subprocess.run([str(environment / "bin" / words[0]), *words[1:]], capture_output=True, text=True, cwd=cwd, env=clean, timeout=120)


def test_the_base_install_is_small_and_has_no_torch(installed):
    (packages,) = (installed / "lib").glob("python*/site-packages")
    found = {path.name.split("-")[0].lower() for path in packages.iterdir()}
    assert not found & {"torch", "torchvision", "timm", "open_clip", "tyro", "transformers"}
    skipped = ("pip", "setuptools", "_distutils_hack", "pkg_resources", "distutils")
    size = sum(path.stat().st_size for path in packages.rglob("*") if path.is_file() and not path.relative_to(packages).parts[0].startswith(skipped) and path.suffix != ".pyc")
    assert size <= MOST_BYTES, f"{size:,} bytes"


def test_the_sdk_works_from_the_wheel(installed, tmp_path):
    toy.build(tmp_path / "bundle")
    done = run(installed, "mclip", "embed", "--bundle", "bundle", "a red heart", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    helped = run(installed, "mclip", "--help", cwd=tmp_path)
    assert helped.returncode == 0
    refused = run(installed, "mclip", "train", "--pairs", "x", "--store", "y", "--out", "z", cwd=tmp_path)
    assert refused.returncode == 1
    assert "pip install 'mobileclip-edge[train]'" in refused.stderr
    assert "Traceback" not in refused.stderr
