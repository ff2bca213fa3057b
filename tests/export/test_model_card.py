"""MODELCARD.md and THIRD_PARTY.md, and the refusal to call a bundle fit for sale that is not known to be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from export.bundle import ExportConfig, export_bundle
from export.licences import Work, require_commercial, works
from export.model_card import read_evaluation
from mobileclip.presets import preset
from runtime.errors import RecipeError

EVALUATION = {
    "model": "x",
    "text_to_image": {
        "held_out": {"n": 109, **{f"recall@{k}": {"value": k / 20, "low": k / 40, "high": k / 15} for k in (1, 5, 10)}, "median_rank": 9},
        "flag": {"n": 24, "recall@1": {"value": 0.125, "low": 0.0, "high": 0.25}},
    },
}


@pytest.mark.parametrize(
    ("licence", "standing"),
    [
        ("MIT (weights trained here)", "open"),
        ("Apache-2.0", "open"),
        ("CC-BY-4.0", "open"),
        ("CC BY-SA 4.0", "open"),
        ("CC0", "open"),
        ("CC-BY-NC-4.0", "closed"),
        ("Apple ML Research Model Terms of Use (research only, derivatives included)", "closed"),
        ("free for non-commercial use, code MIT", "closed"),
        ("unknown", "unknown"),
        ("", "unknown"),
        ("see the web page", "unknown"),
        ("COMMITMENT", "unknown"),
        ("mitigated terms", "unknown"),
        ("GPLv3 or later", "open"),
        ("CC-BY-ND-4.0", "closed"),
    ],
)
def test_standing_is_read_from_the_words(licence, standing):
    assert Work(what="weights", name="w", licence=licence).standing == standing


def test_apples_weights_may_not_be_sold(tmp_path):
    found = works({}, preset("mobileclip2_s0"), tmp_path, ("golden: CC0-1.0",))
    assert [work.standing for work in found if work.what == "weights"] == ["closed"]
    with pytest.raises(RecipeError, match=r"--commercial: 1 of the works .* weights \(mobileclip2_s0\): Apple ML Research"):
        require_commercial(found)


def test_what_nobody_stated_is_unknown_and_can_be_stated(tmp_path):
    receipt = {"stage": "train", "store_licences": ["teacher weights: Apache-2.0"]}
    config = preset("pocket_s")
    unknown = [work.what for work in works(receipt, config, tmp_path, ()) if work.standing != "open"]
    assert unknown == ["training data", "golden"]
    stated = works(receipt, config, tmp_path, ("training data: CC-BY-4.0", "golden: CC0-1.0", "icons: MIT", "all rights cleared, MIT"))
    assert {work.what: work.licence for work in stated}["icons"] == "MIT"
    assert {work.what: work.licence for work in stated}["other"] == "all rights cleared, MIT"
    require_commercial(stated)


def test_authors_of_a_sample_are_named(tmp_path):
    packages = [{"name": "@iconify-json/noto", "version": "1.2.9", "licence": "Apache-2.0", "source": "https://example.org/noto"}, {"name": "drawn", "licence": "CC-BY-NC-4.0"}]
    (tmp_path / "sample.json").write_text(json.dumps({"packages": packages}))
    found = works({"stage": "train"}, preset("pocket_s"), tmp_path / "validation", ())
    assert [(work.what, work.name, work.standing) for work in found if work.what != "tokenizer"][1:] == [
        ("training data", "pictures and captions", "closed"), ("golden", "@iconify-json/noto 1.2.9", "open"), ("golden", "drawn", "closed"),
    ]  # fmt: skip


@pytest.fixture
def settings(pocket_checkpoint, pairs_folder, tmp_path, monkeypatch) -> ExportConfig:
    monkeypatch.setattr("export.artefacts.Maker.make", lambda self, tower: [])
    return ExportConfig(checkpoint=pocket_checkpoint, bundle=tmp_path / "bundle", pairs=pairs_folder, samples=12, calibration=8, golden=2)


def test_the_card_says_what_was_given_and_what_was_not(settings, tmp_path):
    export_bundle(settings)
    card = (settings.bundle / "MODELCARD.md").read_text()
    assert "Not stated by who made this bundle" in card
    assert "No evaluation was given" in card
    (tmp_path / "test.json").write_text(json.dumps(EVALUATION))
    told = dataclasses.replace(
        settings, bundle=tmp_path / "told", evaluation=(tmp_path / "test.json",), intended_use="Finding emoji by words.", known_failure=("Clocks are not told apart.",)
    )
    export_bundle(told)
    card = (told.bundle / "MODELCARD.md").read_text()
    assert "| test | text to image | held_out | 109 | 0.050 [0.025, 0.067] | 0.250 [0.125, 0.333] | 0.500 [0.250, 0.667] |" in card
    assert "| test | text to image | flag | 24 | 0.125 [0.000, 0.250] |  |  |" in card
    assert "Finding emoji by words." in card
    assert "- Clocks are not told apart." in card
    assert str(tmp_path) not in card
    assert "| golden | pictures and texts of golden/ | unknown |  | unknown |" in (told.bundle / "THIRD_PARTY.md").read_text()


def test_an_unknown_licence_blocks_a_commercial_bundle_before_any_work(settings):
    with pytest.raises(RecipeError, match=r"golden \(pictures and texts of golden/\): unknown; say what you know with --licence 'golden: LICENCE'"):
        export_bundle(dataclasses.replace(settings, commercial=True))
    assert not settings.bundle.exists()
    export_bundle(dataclasses.replace(settings, commercial=True, licence=("golden: CC0-1.0",)))
    assert (settings.bundle / "manifest.json").is_file()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"text_to_image": {"n": 3}}'])
def test_an_evaluation_without_figures_is_refused(tmp_path: Path, text: str):
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(RecipeError, match=r"--evaluation .*e\.json: .* give what mclip eval --json printed"):
        read_evaluation(tmp_path / "e.json")
