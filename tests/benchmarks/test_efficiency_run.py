"""One student of the experiment: trained, asked, kept; and trained again when its settings are others."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.suites.efficiency_run import OneRun, run, settings_of
from distill.recipes import Recipe
from runtime.pairs import write_shard
from tests.distill.world import COLOURS, SHAPES, draw, make_pairs, make_store


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> OneRun:
    import numpy as np

    root = tmp_path_factory.mktemp("one")
    make_pairs(root / "pairs")
    make_store(root / "store", root / "pairs")
    generator = np.random.default_rng(3)
    (root / "test").mkdir()
    write_shard(root / "test/0.tar", [
        (f"q{n}", {"png": draw(colour, shape, generator), "json": json.dumps(
            {"concept": f"{colour}-{shape}", "label": f"a {colour} {shape}", "held_out": n % 4 == 0, "slice": "main"}).encode()})
        for n, (colour, shape) in enumerate((c, s) for c in COLOURS for s in SHAPES)
    ])  # fmt: skip
    (root / "recipe.json").write_text(json.dumps({"batch_size": 8, "contrastive": 1.0}))
    places = {"pairs": str(root / "pairs"), "store": str(root / "store"), "validation": str(root / "test"), "test": str(root / "test")}
    return OneRun(out=str(root / "out"), recipe=str(root / "recipe.json"), samples=64, seed=0, cuts=(64, 256), **places)


def test_a_result_is_kept_and_its_weights_are_not(one: OneRun) -> None:
    result = run(one)
    found = json.loads(result.read_text())
    assert len(found["test"]["trained"]) == 9
    assert len(found["test"]["held_out"]) == 3
    assert found["cuts"]["256"] == found["test"]
    assert set(found["cuts"]) == {"64", "256"}
    assert not (Path(one.out) / "checkpoint/model.safetensors").exists()
    before = result.stat().st_mtime_ns
    assert run(one).stat().st_mtime_ns == before


def test_other_settings_are_another_result(one: OneRun) -> None:
    run(one)
    other = dataclasses.replace(one, seed=1)
    assert json.loads(run(other).read_text())["settings"]["seed"] == 1
    assert json.loads(run(one).read_text())["settings"]["seed"] == 0


def test_usual_settings_are_not_part_of_what_decides(one: OneRun, tmp_path: Path) -> None:
    (tmp_path / "whole.json").write_text(json.dumps(dataclasses.asdict(Recipe(batch_size=8))))
    assert settings_of(dataclasses.replace(one, recipe=str(tmp_path / "whole.json"))) == settings_of(one)
