"""The suites about training run on a tiny world and say what they promise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.suites import adaptation
from benchmarks.suites.adaptation import AdaptationConfig, run_adaptation
from benchmarks.suites.stages import StageError
from benchmarks.suites.training import TrainingSuite, run_training
from runtime.evaluation import Gallery
from tests.distill.world import make_pairs, make_store


def test_the_loop_is_set_against_its_passes(tmp_path: Path) -> None:
    make_pairs(tmp_path / "pairs/train")
    make_store(tmp_path / "store", tmp_path / "pairs/train")
    figures = run_training(TrainingSuite(run=str(tmp_path), rounds=2, steps=3))
    assert figures["loop_ratio_low"] <= figures["loop_ratio"] <= figures["loop_ratio_high"]
    assert 0.2 < figures["loop_ratio"] < 1.5
    assert sum(figures["time_share"].values()) == pytest.approx(1, abs=0.02)
    assert figures["loop_samples_per_second"] > 0


def test_adaptation_needs_a_finished_demo(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="has no trained student"):
        run_adaptation(AdaptationConfig(run=str(tmp_path), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_the_tables_of_an_adaptation() -> None:
    figures = {"domain_pairs": 10, "domain_queries": 9, "language_pictures": 7}
    figures |= {f"{arm}_{float(share):g}_{name}": 0.25 for arm in ("tuned_alone", "tuned_held") for share in adaptation.SHARES for name in ("domain", "general")}
    figures |= {f"{language}_{when}_{key}": 0.125 for language in ("en", "de") for when in ("before", "after") for key in ("trained", "held_out", "zero_shot")}
    said = adaptation.as_text(json.loads(json.dumps(figures)))
    assert said.splitlines()[2].count("0.250 / 0.250") == 5
    assert [line[:2] for line in said.splitlines()[-2:]] == ["en", "de"]
    assert "the 7 pictures" in said


def test_languages_are_asked_about_the_same_pictures() -> None:
    rows = list(range(4))
    gallery = Gallery(
        embeddings=np.eye(4, dtype=np.float32), rows=rows, keys=list("abcd"), texts=list("wxyz"), groups=["1", "2", "2", "3"], meta=[{"n": row} for row in rows], skipped=[]
    )
    found = adaptation._only(gallery, {"2", "3", "4"})
    assert (found.keys, found.texts, found.groups, found.rows, found.meta) == (list("bcd"), list("xyz"), ["2", "2", "3"], [1, 2, 3], [{"n": 1}, {"n": 2}, {"n": 3}])
    assert (found.embeddings == np.eye(4)[1:]).all()
