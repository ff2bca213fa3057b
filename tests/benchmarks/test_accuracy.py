"""Retrieval of a bundle's artefacts and their paired tests."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.accuracy import AccuracyConfig, main, measure_accuracy, paired
from benchmarks.results import read_results
from runtime.errors import PairsError
from runtime.pairs import write_shard
from tests.runtime import toy


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    samples = []
    for n, name in enumerate(toy.COLOURS):
        out = io.BytesIO()
        toy.picture(name, n, (32, 32)).save(out, "PNG")
        samples.append((name, {"png": out.getvalue(), "txt": name.encode(), "json": json.dumps({"concept": name}).encode()}))
    (tmp_path / "pairs").mkdir()
    write_shard(tmp_path / "pairs" / "a.tar", samples)
    return tmp_path / "pairs"


def test_every_combination_against_fp32(toy_bundle: Path, colours: Path, tmp_path: Path) -> None:
    config = AccuracyConfig(bundle=toy_bundle, data=colours, out=tmp_path / "r.jsonl")
    rows = measure_accuracy(config)
    assert [(row["kind"], row["artefact"]) for row in rows] == [
        ("accuracy", "image-onnx-fp32+text-onnx-fp32"),
        ("accuracy", "image-onnx-fp32+text-onnx-int8"),
        ("accuracy_comparison", "image-onnx-fp32+text-onnx-int8"),
    ]
    assert rows[0]["figures"]["text_to_image"]["all"]["recall@1"]["value"] == 1.0
    test = next(t for t in rows[2]["figures"]["tests"] if t["k"] == 1 and t["direction"] == "text_to_image")
    assert (test["difference"], test["verdict"], test["kept"]) == (0.0, "no difference", 1.0)
    again = measure_accuracy(config)
    assert again == rows
    assert len(read_results([config.out])) == 3


def test_other_pairs_are_measured_anew(toy_bundle: Path, colours: Path, tmp_path: Path) -> None:
    config = AccuracyConfig(bundle=toy_bundle, data=colours, out=tmp_path / "r.jsonl")
    measure_accuracy(config)
    with (colours / "a.tar").open("rb") as file:
        data = file.read()
    # keys with their letters in another order: the checksums of the headers still hold
    (colours / "b.tar").write_bytes(data.replace(b"red.", b"dre.").replace(b"blue.", b"lube.").replace(b"green.", b"ergen.").replace(b"white.", b"hwite."))
    measure_accuracy(config)
    assert len(read_results([config.out])) == 6


def figures(ranks: list[int]) -> dict[str, object]:
    queries = {"all": [str(n) for n in range(len(ranks))]}
    return {"ranks": {d: {"all": ranks} for d in ("text_to_image", "image_to_text")}, "queries": {d: queries for d in ("text_to_image", "image_to_text")}}


def test_paired_verdicts() -> None:
    rng = np.random.default_rng(0)
    good = rng.integers(1, 8, 300)
    worse = np.where(rng.random(300) < 0.15, 50, good)
    found = {(t["k"], t["direction"]): t for t in paired(figures(good.tolist()), figures(worse.tolist()))}
    test = found[5, "text_to_image"]
    assert test["verdict"] == "worse"
    assert test["high"] < 0
    assert test["kept"] == pytest.approx((worse <= 5).mean() / (good <= 5).mean())
    back = {(t["k"], t["direction"]): t for t in paired(figures(worse.tolist()), figures(good.tolist()))}
    assert back[5, "text_to_image"]["verdict"] == "better"
    one = good.copy()
    one[int(np.argmin(good))] = 50
    assert {t["verdict"] for t in paired(figures(good.tolist()), figures(one.tolist()))} == {"no difference"}
    with pytest.raises(ValueError, match="different queries"):
        paired(figures([1, 2]), figures([1, 2, 3]))


def test_command_line(toy_bundle: Path, colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(toy_bundle), "--data", str(colours), "--out", str(tmp_path / "r.jsonl")]
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["text_to_image"]["image-onnx-fp32+text-onnx-fp32"]["all"]["n"] == 4
    assert main(arguments) == 0
    assert "no difference: +0.0000" in capsys.readouterr().out
    with pytest.raises(PairsError):
        main([str(toy_bundle), "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "r.jsonl")])
