"""The verdict: silent about seeds of one training, outspoken about a harm, and the same from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.comparison import difference, models_of
from mobileclip import cli
from mobileclip.checkpoint import build_tokenizer, save_checkpoint
from mobileclip.models import create_model
from mobileclip.students import student_config
from runtime.errors import CheckpointError

from .world import make_pairs


def training(rng: np.random.Generator, ease: np.ndarray, seeds: int, recall: float, between: float = 0.02) -> np.ndarray:
    """(S, Q) booleans: queries differ in how hard they are, seeds in how good they came out."""
    level = np.log(recall / (1 - recall)) + between / (recall * (1 - recall)) * rng.standard_normal((seeds, 1))
    return rng.random((seeds, len(ease))) < 1 / (1 + np.exp(-(level + ease)))


@pytest.mark.parametrize(("seeds_a", "seeds_b"), [(3, 3), (5, 5), (3, 5)])
def test_two_sides_of_one_training_do_not_differ(seeds_a: int, seeds_b: int) -> None:
    rng, wrong = np.random.default_rng(0), 0
    for n in range(200):
        ease = 2 * rng.standard_normal(300)
        found = difference(training(rng, ease, seeds_a, 0.3), training(rng, ease, seeds_b, 0.3), seed=n, draws=1000)
        wrong += found["verdict"] != "no significant difference"
        assert found["low"] <= found["difference"] <= found["high"]
    assert wrong <= 12  # 5 % and what chance adds


def test_without_the_seeds_spread_it_would_claim_much() -> None:
    rng, wrong = np.random.default_rng(1), 0
    for n in range(100):
        ease = 2 * rng.standard_normal(1500)
        sides = [training(rng, ease, 3, 0.3).mean(axis=0, keepdims=True) for _ in range(2)]  # queries alone are resampled
        wrong += difference(*sides, seed=n, draws=500)["verdict"] != "no significant difference"
    assert wrong > 25


@pytest.mark.parametrize(("recall", "verdict"), [(0.15, "worse"), (0.5, "better")])
def test_a_planted_difference_is_called(recall: float, verdict: str) -> None:
    rng, called = np.random.default_rng(2), 0
    for n in range(40):
        ease = 2 * rng.standard_normal(1000)
        called += difference(training(rng, ease, 3, 0.3), training(rng, ease, 3, recall), seed=n, draws=1000)["verdict"] == verdict
    assert called >= 36


def began_alike(rng: np.random.Generator, ease: np.ndarray, seeds: int, recalls: tuple[float, float]) -> list[np.ndarray]:
    """Two trainings whose seeds came out better or worse together, as those do that share first weights and order."""
    shared = 0.05 * rng.standard_normal((seeds, 1)) / 0.21
    levels = [np.log(recall / (1 - recall)) + shared + 0.01 / 0.21 * rng.standard_normal((seeds, 1)) for recall in recalls]
    return [rng.random((seeds, len(ease))) < 1 / (1 + np.exp(-(level + ease))) for level in levels]


@pytest.mark.parametrize("seeds", [3, 5])
def test_pairs_of_seeds_that_do_not_differ(seeds: int) -> None:
    rng, wrong, alone = np.random.default_rng(4), 0, 0
    for n in range(100):
        ease = 2 * rng.standard_normal(200)
        wrong += difference(*began_alike(rng, ease, seeds, (0.3, 0.3)), seed=n, draws=400, paired=True)["verdict"] != "no significant difference"
        alone += difference(training(rng, ease, seeds, 0.3), training(rng, ease, seeds, 0.3), seed=n, draws=400, paired=True)["verdict"] != "no significant difference"
    assert wrong <= 8
    assert alone <= 8  # pairing what has nothing in common costs power, not honesty


def test_pairs_show_what_the_seeds_spread_hides() -> None:
    rng, paired, apart = np.random.default_rng(5), 0, 0
    for n in range(25):
        sides = began_alike(rng, 2 * rng.standard_normal(800), 5, (0.3, 0.23))
        paired += difference(*sides, seed=n, draws=400, paired=True)["verdict"] == "worse"
        apart += difference(*sides, seed=n, draws=400)["verdict"] == "worse"
    assert paired > 2 * apart
    assert paired >= 13
    with pytest.raises(ValueError, match="3 and 5 seeds cannot be paired"):
        difference(sides[0][:3], sides[1], paired=True)


def test_a_model_against_itself_has_no_difference_at_all() -> None:
    hits = np.random.default_rng(0).random((1, 50)) < 0.4
    assert difference(hits, hits) == {"difference": 0.0, "low": 0.0, "high": 0.0, "verdict": "no significant difference"}
    with pytest.raises(ValueError, match="the same queries"):
        difference(hits, hits[:, 1:])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_pairs(root / "pairs")
    config = student_config("pocket_s", image_size=32)
    for n in range(2):
        torch.manual_seed(n)
        folder = root / "seeds" / str(n)
        folder.mkdir(parents=True)
        save_checkpoint(create_model(config).eval(), folder, tokenizer=build_tokenizer(config.text.vocab_size, root / f"tokenizer-{n}.json"), extra={})
    return root


def test_the_command_line_compares_files_and_folders_of_seeds(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, several = str(models / "seeds/0"), str(models / "seeds")
    assert cli.main(["eval", "--compare", one, one, "--data", str(models / "pairs")]) == 0
    said = capsys.readouterr().out
    assert "(1 seed)" in said
    assert "B - A +0.000 [+0.000, +0.000]" in said
    assert "about these files" in said
    assert cli.main(["eval", "--compare", one, several, "--data", str(models / "pairs"), "--json", "--k", "1", "--splits", "all"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["seeds"], found["k"], list(found["splits"])) == ([1, 2], 1, ["all"])


def test_what_cannot_be_compared_is_one_sentence(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, pairs = str(models / "seeds/0"), str(models / "pairs")
    for arguments, message in (
        ([], "one model, or --compare A B, or --query"), ([one, "--compare", one, one], "one model, or --compare A B, or --query"),
        (["--compare", one, str(tmp_path)], "and holds none"), (["--compare", one, one, "--splits", "winter"], "no split winter"),
    ):  # fmt: skip
        assert cli.main(["eval", *arguments, "--data", pairs]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    shutil.copytree(models / "seeds/0", tmp_path / "half/0")
    (tmp_path / "half/0/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds none"):
        models_of(str(tmp_path / "half"))
