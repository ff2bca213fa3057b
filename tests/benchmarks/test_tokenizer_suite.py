"""The benchmark of the tokenizer: where its lines come from, what it says when there are none, and one small run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.suites import tokenizer as suite

LISTED = """Package: one
Description: shows a clock
Description-md5: 0123

Package: two
Description-en: cats & dogs
 A longer text that is no line of its own.
Description:

Package: three
Description: shows a clock
"""


def listing(text: str) -> Any:
    return lambda command, **_: subprocess.CompletedProcess(command, 0, stdout=text.encode())


def missing(command: list[str], **_: Any) -> Any:
    raise FileNotFoundError(command[0])


def test_lines_of_the_package_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", listing(LISTED))
    assert suite.package_lines() == ["cats & dogs", "shows a clock"]


@pytest.mark.parametrize("run", [missing, listing("")])
def test_lines_of_the_installed_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Any) -> None:
    (tmp_path / "status").write_text(LISTED, encoding="utf-8")
    monkeypatch.setattr(suite, "STATUS", tmp_path / "status")
    monkeypatch.setattr(subprocess, "run", run)
    assert suite.package_lines() == ["cats & dogs", "shows a clock"]


def test_no_lines_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(suite, "STATUS", tmp_path / "status")
    monkeypatch.setattr(subprocess, "run", missing)
    assert suite.main(["--out", str(tmp_path / "out.json")]) == 1
    assert capsys.readouterr().err.startswith("found no Debian package descriptions")
    assert not (tmp_path / "out.json").exists()


@pytest.fixture
def few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "package_lines", lambda: [f"line number {n} shows a clock" for n in range(200)])
    monkeypatch.setattr(suite, "label_lines", lambda languages: {language: [f"{language} café {n}" for n in range(20)] for language in languages})


@pytest.mark.usefixtures("few_lines")
def test_too_few_lines_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["--out", str(tmp_path / "out.json")]) == 1
    assert "ask for fewer rounds" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("few_lines")
def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new/out.json"
    small = ["--batch", "8", "--cold-rounds", "10", "--warm-rounds", "10", "--shape-rounds", "10", "--warm-up", "40"]
    assert suite.main(["--out", str(out), "--languages", "en", "de", *small]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert set(found["results"]) == set(suite.TARGETS) == set(found["targets"])
    assert set(found["shapes, warm"]) == set(suite.SHAPES)
    assert found["counts"]["lines"] == 240
    assert found["counts"]["real lines, rows that differ"] == 0
    for result in [*found["results"].values(), *found["shapes, warm"].values()]:
        faster = result["times_faster"]
        assert 0 < faster["low"] <= faster["value"] <= faster["high"]
        assert result["ratio"]["n"] == 10
    assert {"tokenizers", "ftfy", "open_clip_torch", "regex"} <= set(found["environment"]["packages"])
    assert "times as fast" in capsys.readouterr().out
