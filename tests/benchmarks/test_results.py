"""Results lines: schema, hostile files, atomic appending."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.results import ResultsError, append_results, check, identity, line, newest, read_results

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
ANYTHING = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=8)
BUNDLE = {"name": "b", "sha256": "0" * 64}


def latency(samples: list[int], /, **change: object) -> dict[str, object]:
    return {**line("latency", "image_tower", bundle=BUNDLE, artefact="a", settings={"threads": 1}, samples=samples), **change}


def test_lines_survive_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    append_results(path, [latency([1, 2, 3])])
    append_results(path, [latency([4]), line("peak", "machine", bundle=None, figures={"gemm_gflops": 9.5})])
    rows = read_results([path])
    assert [row["samples"] for row in rows] == [[1, 2, 3], [4], None]
    assert (rows[0]["schema"], rows[0]["unit"], rows[2]["unit"]) == (1, "ns", None)
    assert [row["samples"] for row in newest(rows)] == [[4], None]
    assert sorted(os.listdir(path.parent)) == ["results.jsonl"]


@settings(max_examples=25, derandomize=True, deadline=None)
@given(ANYTHING)
def test_anything_that_is_no_line_is_refused_as_such(found: object) -> None:
    with pytest.raises(ResultsError):
        check(found, "line 1")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 2}, "reads schema 1"),
        ({"kind": "speed"}, "expected one of"),
        ({"phase": ""}, "no phase"),
        ({"bundle": {"name": "b"}}, "name and sha256"),
        ({"summary": None}, "expected an object"),
        ({"samples": None}, "raw samples"),
        ({"samples": []}, "raw samples"),
        ({"samples": [1, 0]}, "raw samples"),
        ({"samples": [1, True]}, "raw samples"),
        ({"samples": [1.5]}, "raw samples"),
        ({"unit": "ms"}, "unit"),
    ],
)
def test_each_broken_member_is_named(tmp_path: Path, change: dict[str, object], words: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(latency([5])) + "\n" + json.dumps(latency([5], **change)) + "\n", encoding="utf-8")
    with pytest.raises(ResultsError, match=words) as error:
        read_results([path])
    assert "line 2 of r.jsonl" in str(error.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="no results file"):
        read_results([tmp_path / "none.jsonl"])
    (tmp_path / "torn.jsonl").write_text(json.dumps(latency([5])) + "\n" + '{"schema": 1, "ki', encoding="utf-8")
    with pytest.raises(ResultsError, match="line 2 of torn.jsonl is not JSON"):
        read_results([tmp_path / "torn.jsonl"])
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ResultsError, match="cannot be read as text"):
        read_results([tmp_path / "binary.jsonl"])
    (tmp_path / "empty.jsonl").write_text("\n\n", encoding="utf-8")
    assert read_results([tmp_path / "empty.jsonl"]) == []


def test_a_failed_append_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.jsonl"
    append_results(path, [latency([1])])
    before = path.read_bytes()
    with pytest.raises(ResultsError):
        append_results(path, [latency([2]), latency([3], kind="nonsense")])
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_results(path, [latency([2], figures={"bad": float("nan")})])

    def full(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        append_results(path, [latency([2])])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["r.jsonl"]


def test_a_missing_newline_at_the_end_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(latency([1])), encoding="utf-8")
    append_results(path, [latency([2])])
    assert len(read_results([path])) == 2


def test_identity_tells_machines_bundles_and_threads_apart() -> None:
    base = latency([1])
    machine = {"processor": {"model": "x"}, "packages": {"onnxruntime": "1"}}
    others = [
        latency([1], bundle={"name": "b", "sha256": "1" * 64}),
        latency([1], settings={"threads": 2}),
        latency([1], artefact="c"),
        latency([1], phase="text_tower"),
        latency([1], environment=machine),
        latency([1], environment={**machine, "packages": {"onnxruntime": "2"}}),
    ]
    assert len({identity(row) for row in [base, *others]}) == 7
    assert identity(latency([9], created="later", environment={"load_average": [3]})) == identity(base)
