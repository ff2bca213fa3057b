"""A browser as a device: what is said where there is none, what is fetched for it; the whole way in a real Chromium where there is one."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import json
import os
import stat
import tarfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks import onnxruntime_web
from benchmarks.browser import find_chromium, write_rows
from benchmarks.device_browser import open_browser
from benchmarks.devices import DeviceSettings
from benchmarks.latency import main
from benchmarks.measure import Elapsed, Plan, take
from benchmarks.onnxruntime_web import FILES, ort_folder, pinned
from benchmarks.results import read_results
from runtime.errors import DeviceError

HAVE = find_chromium() is not None and importlib.util.find_spec("playwright") is not None


def archive(path: Path, names: tuple[str, ...]) -> Path:
    """An npm archive with these files."""
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            info = tarfile.TarInfo(f"package/dist/{name}")
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    return path


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An npm that gives out whatever lies in `given.tgz`, and a checkout without the packages."""
    (tmp_path / "bin").mkdir()
    npm = tmp_path / "bin/npm"
    npm.write_text(f'#!/bin/sh\nfor last; do :; done\n[ -f {tmp_path}/given.tgz ] || {{ echo "E404" >&2; exit 1; }}\ncp {tmp_path}/given.tgz "$last/onnxruntime-web.tgz"\n')
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "web").mkdir()
    (tmp_path / "web/package-lock.json").write_bytes((onnxruntime_web.WEB / "package-lock.json").read_bytes())
    monkeypatch.setattr(onnxruntime_web, "WEB", tmp_path / "web")
    return tmp_path


def pin(registry: Path) -> None:
    """Make the lock ask for what npm gives."""
    lock = json.loads((registry / "web/package-lock.json").read_text())
    digest = base64.b64encode(hashlib.sha512((registry / "given.tgz").read_bytes()).digest()).decode()
    lock["packages"]["node_modules/onnxruntime-web"]["integrity"] = f"sha512-{digest}"
    (registry / "web/package-lock.json").write_text(json.dumps(lock))


def test_the_runtime_comes_from_npm_once_and_only_as_it_is_pinned(registry: Path) -> None:
    cache = registry / "cache"
    with pytest.raises(DeviceError, match="could not fetch .*E404"):
        ort_folder(cache)
    archive(registry / "given.tgz", FILES)
    with pytest.raises(DeviceError, match="not the package that is pinned"):
        ort_folder(cache)
    assert not cache.exists()
    pin(registry)
    folder = ort_folder(cache)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    (registry / "given.tgz").unlink()
    assert ort_folder(cache) == folder  # without npm
    assert pinned()[0] in folder.name


def test_an_archive_without_the_files_is_refused(registry: Path) -> None:
    archive(registry / "given.tgz", FILES[:1])
    pin(registry)
    with pytest.raises(DeviceError, match=f"no usable {FILES[1]}"):
        ort_folder(registry / "cache")
    assert not any((registry / "cache").iterdir())


def test_settings_that_do_not_reach_a_browser_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ({"cores": (0,)}, {"priority": 3}):
        with pytest.raises(DeviceError, match="do not reach a browser"):
            open_browser("", DeviceSettings(**wrong))  # type: ignore[arg-type]


def test_rows_are_written_as_the_page_reads_them(tmp_path: Path) -> None:
    rows = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert write_rows(tmp_path, "text", rows) == {"rows": "text.bin", "type": "int32", "shape": [3]}
    assert np.array_equal(np.fromfile(tmp_path / "text.bin", "<i4"), rows.ravel())


def test_a_function_that_times_itself_is_believed() -> None:
    taken = take({"own": lambda turn: Elapsed(1_000_000 + turn), "ours": lambda turn: turn}, Plan(warmup=1, min_samples=5, max_samples=5, few_samples=1, seconds=0))
    assert taken.samples["own"].tolist() == [1_000_000, 1_000_001, 1_000_002, 1_000_003, 1_000_004]
    assert taken.samples["ours"].max() < 1_000_000


@pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed")
def test_a_browser_that_does_not_start_is_a_sentence(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if not (onnxruntime_web.WEB / "node_modules").is_dir():
        monkeypatch.setenv("MOBILECLIP_CACHE", str(tmp_path))
        folder = tmp_path / f"onnxruntime-web-{pinned()[0]}"
        folder.mkdir()
        for name in FILES:
            (folder / name).write_bytes(b"abc")
    for program, match in (("/nonexistent/chromium", "does not start"), ("/bin/false", "does not start")):
        monkeypatch.setenv("CHROMIUM", program)
        assert main([str(toy_bundle), "--device", "browser", "--out", str(tmp_path / "r.jsonl"), "--seconds", "0.05"]) == 1
        said = capsys.readouterr().err
        assert match in said
        assert said.count("\n") == 1
        assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.skipif(not HAVE, reason="chromium or playwright is not installed")
def test_a_bundle_in_chromium(toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.jsonl"
    command = [str(toy_bundle), "--device", "browser", "--label", "a laptop", "--seconds", "0.2", "--out", str(out)]
    assert main(command) == 0, capsys.readouterr().err
    rows = read_results([out])
    assert {row["phase"] for row in rows if row["kind"] == "latency"} == {"decode", "preprocess", "tokenise", "image_tower", "text_tower"}
    for row in rows:
        assert row["device"] == {"kind": "browser", "label": "a laptop"}
        assert row["environment"]["browser"]["isolated"]
        if row["kind"] == "latency" and row["artefact"]:
            assert row["figures"]["golden_cosine_min"] > 0.99
        if row["kind"] == "memory":
            assert row["samples"][0] > 20_000_000
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"][0]["lines"] == 0  # all there
