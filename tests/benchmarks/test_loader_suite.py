"""The loader's suite on a handful of small pictures: both sides show the same views, resuming gives the same batches, figures are there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("webdataset", reason="the published way of reading needs the extra 'bench'")

from benchmarks.suites import loader as suite
from benchmarks.suites.loader_data import make_data, photograph, published_batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("loader-suite"), samples=8, pixels=96)


def test_pictures_are_neither_flat_nor_white_noise() -> None:
    pixels = np.asarray(photograph(np.random.default_rng(0), 128), np.float32)
    assert pixels.std() > 20
    neighbours = np.abs(np.diff(pixels, axis=1)).mean()
    assert 1 < neighbours < 0.3 * np.abs(pixels - pixels[:, ::-1]).mean()


def test_both_sides_show_the_same_views(folder: Path) -> None:
    assert suite.check_sides(folder, 48, samples=8) < 0.5  # too small for reduced decoding: what is left is the quicker resize


def test_both_sides_make_the_same_kind_of_batch(folder: Path) -> None:
    pixels, tokens, image_vectors, text_vectors = next(published_batches(folder, 48, 4, suite.CLIP_MEAN, suite.CLIP_STD, shuffle=8))
    batch = next(suite.endless(suite.ours(folder, 48), 4, 0))
    assert batch.pixels.shape == tuple(pixels.shape) == (4, 3, 48, 48)
    assert abs(float(pixels.mean()) - batch.pixels.mean()) < 1.5
    assert (tokens == 49407).sum() == (batch.tokens == 49407).sum() == 4
    assert image_vectors.shape == text_vectors.shape == (4, 1536)
    assert [array.shape for array in batch.teacher_images] == [(4, 768), (4, 768)]


def test_figures(folder: Path) -> None:
    ratio = suite.loader_ratio(folder, 48, threads=0, batch=2, rounds=10)
    assert 0 < ratio["loader_ratio_low_48px_0threads"] <= ratio["loader_ratio_48px_0threads"] <= ratio["loader_ratio_high_48px_0threads"]
    resumed = suite.resume_cost(folder, 48, batch=2)
    assert resumed["resume_batches_equal"] == 1.0
    assert resumed["resume_cost"] > -0.9
