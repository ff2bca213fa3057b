"""Two results files side by side, unpaired: verdicts, caveats, what is not comparable, the gate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.comparison import compare_results, main
from benchmarks.measure import summarise
from benchmarks.results import Line, ResultsError, append_results, line, read_results

ENVIRONMENT = {
    "processor": {"model": "A", "governor": None, "usable_cores": 2},
    "system": {"release": "6"}, "python": "CPython 3.11", "packages": {"onnxruntime": "1.32.0"}, "load_average": [0.1, 0, 0],
}


def timed(scale: float, *, phase: str = "image_tower", name: str = "b", seed: int = 0, n: int = 300, noise: float = 0.02, **environment: Any) -> Line:
    rng = np.random.default_rng(seed)
    samples = (5e6 * scale * np.exp(noise * rng.standard_normal(n))).astype(np.int64)
    return line(
        "latency", phase, bundle={"name": name, "sha256": f"{seed:064x}"}, artefact="image-onnx-fp32", settings={"threads": 1, "batch": 1, "input_sha256": "x"},
        samples=samples.tolist(), summary=summarise(samples).as_dict(), environment={**ENVIRONMENT, **environment},
    )  # fmt: skip


def test_equal_slower_and_faster() -> None:
    rows = compare_results(
        [timed(1, seed=1), timed(1, phase="text_tower", seed=2), timed(1, phase="decode", seed=3)],
        [timed(1, seed=4), timed(1.1, phase="text_tower", seed=5), timed(0.8, phase="decode", seed=6)],
    )
    assert [(row["phase"], row["figures"]["verdict"]) for row in rows] == [("image_tower", "no difference"), ("text_tower", "slower"), ("decode", "faster")]
    for row in rows:
        assert row["figures"]["paired"] is False
        assert "unpaired" in row["figures"]["sentence"]
        assert row["figures"]["comparable"]
    assert "no significant difference" in rows[0]["figures"]["sentence"]


def test_several_runs_of_a_measurement_belong_together() -> None:
    before, after = ([timed(scale * shift, seed=10 * side + run) for run, shift in enumerate((1.0, 1.03, 0.97, 1.02))] for side, scale in enumerate((1.0, 1.01), 1))
    (row,) = compare_results(before, after)
    assert row["figures"]["runs"] == [4, 4]
    assert row["figures"]["verdict"] == "no difference"
    assert row["figures"]["high"] - row["figures"]["low"] > 0.05


def test_what_is_not_comparable_is_said() -> None:
    (row,) = compare_results([timed(1, seed=1)], [timed(2, seed=2, processor={"model": "B", "usable_cores": 2}, packages={"onnxruntime": "1.33.0"}, load_average=[3.0, 1, 1])])
    notes = " | ".join(row["figures"]["differences"])
    assert "not comparable: processor A and B" in notes
    assert "onnxruntime 1.32.0 and 1.33.0" in notes
    assert "busy before the second (load 3.0)" in notes
    assert not row["figures"]["comparable"]
    with pytest.raises(ResultsError, match="no measurement in common"):
        compare_results([timed(1)], [timed(1, phase="decode")])
    with pytest.raises(ResultsError, match="no measurement in common"):
        compare_results([timed(1)], [timed(1, n=9)])


def test_the_command_says_unpaired_and_gates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append_results(tmp_path / "a.jsonl", [timed(1, seed=1)])
    append_results(tmp_path / "b.jsonl", [timed(1.2, seed=2)])
    a, b, out = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), tmp_path / "c.jsonl"
    assert main([a, b, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "b (after) is slower than b (before)" in printed
    assert "unpaired: measured apart" in printed
    assert [row["kind"] for row in read_results([out])] == ["comparison"]
    assert main([a, b, "--gate", "1.05", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["gate"]["verdict"] == "fail"
    assert main([b, a, "--gate", "1.05"]) == 0
    assert main([a, b, "--gate", "1.5"]) == 0


def test_torn_mixed_and_missing_files_are_one_sentence(tmp_path: Path) -> None:
    whole = json.dumps(timed(1, seed=1))
    (tmp_path / "good.jsonl").write_text(whole + "\n", encoding="utf-8")
    for name, text, match in (
        ("torn.jsonl", whole + "\n" + whole[: len(whole) // 2], "line 2 of torn.jsonl is not JSON"),
        ("mixed.jsonl", whole + "\n" + whole.replace('"schema": 1', '"schema": 2') + "\n", "line 2 of mixed.jsonl has schema 2"),
        ("empty.jsonl", "", "no measurement in common"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(ResultsError, match=match):
            main([str(tmp_path / "good.jsonl"), str(tmp_path / name)])
    with pytest.raises(ResultsError, match="there is no results file"):
        main([str(tmp_path / "good.jsonl"), str(tmp_path / "nowhere.jsonl")])
