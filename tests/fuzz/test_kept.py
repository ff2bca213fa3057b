"""Every kept input and every sound one through every target, without a fuzzer: a value or one sentence, in time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from runtime.errors import ClipError
from tests.fuzz.corpus import KEPT, read_kept
from tests.fuzz.mutation import of_json, of_lines, of_tar, of_tensors
from tests.fuzz.targets import TARGETS, well


@pytest.mark.parametrize("name", TARGETS)
def test_kept_inputs_end_in_a_value_or_one_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBILECLIP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "place").mkdir()
    reader, sound = TARGETS[name].prepare(tmp_path / "place")
    for data in sound:
        assert not isinstance(well(reader, data), ClipError), "a sound input is refused: nothing below the first check would be reached"
    for data in read_kept(name):
        started = time.monotonic()
        well(reader, data)
        assert time.monotonic() - started < 5


def test_a_corpus_is_kept_of_every_target() -> None:
    assert sorted(path.stem for path in KEPT.glob("*.zip")) == sorted(TARGETS)
    assert sum(path.stat().st_size for path in KEPT.iterdir()) < 300_000


@pytest.mark.parametrize("change", [of_json, of_lines, of_tensors, of_tar])
def test_changes_change_and_keep_to_the_size(change) -> None:
    data = {of_tensors: b"\x0d\0\0\0\0\0\0\0" + b'{"a": [1, 2]}' + b"rest"}.get(change, b'{"a": [1, {"b": "text"}], "c": 0.5}')
    found = {change(data, 64, seed, lambda given, size: given[: size // 2] + b"!") for seed in range(200)}
    assert len(found) > 5 or change is of_tar
    assert all(len(item) <= 64 for item in found)
