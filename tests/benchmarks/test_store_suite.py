"""The parts of the store's benchmark that compute something: stores rewritten in another type, recall differences, sizes multiplied out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.suites.scale import ScaleConfig, as_text, sample_bytes
from benchmarks.suites.store_dtypes import rewrite
from benchmarks.suites.student_arms import arm_figures
from distill.store import open_store
from tests.distill.world import make_pairs, make_store


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    return make_store(folder / "store", make_pairs(folder / "pairs", copies=2))


def test_a_rewritten_store_holds_the_same_rows(stored: Path, tmp_path: Path) -> None:
    old, new = open_store(stored), open_store(rewrite(stored, tmp_path / "wide", "float32"), verify=True)
    assert new.dtype == "float32"
    assert (new.keys, new.pair_rows.tolist()) == (old.keys, old.pair_rows.tolist())
    rows, zeros = np.arange(len(old)), np.zeros(len(old), np.int64)
    for t in range(len(old.teachers)):
        np.testing.assert_allclose(new.image_embeddings(t, rows, zeros + 1), old.image_embeddings(t, rows, zeros + 1), atol=1e-6)
        np.testing.assert_allclose(new.text_embeddings(t, rows, zeros + 1), old.text_embeddings(t, rows, zeros + 1), atol=1e-6)
    np.testing.assert_array_equal(new.augmentation(rows, zeros), old.augmentation(rows, zeros))
    assert [new.caption(row, 1) for row in range(len(new))] == [old.caption(row, 1) for row in range(len(old))]


def test_a_store_is_rewritten_once(stored: Path, tmp_path: Path) -> None:
    first = rewrite(stored, tmp_path / "narrow", "int4")
    stamps = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    assert {path.name: path.stat().st_mtime_ns for path in rewrite(stored, first, "int4").iterdir()} == stamps
    cosine = (open_store(first).image_embeddings(0, np.arange(24), np.zeros(24, int)) * open_store(stored).image_embeddings(0, np.arange(24), np.zeros(24, int))).sum(1)
    assert 0.97 < cosine.min() < 0.99999


def test_the_difference_of_arms_is_paired() -> None:
    rng = np.random.default_rng(0)
    base = rng.random((3, 400)) < 0.3
    better = base | (rng.random((3, 400)) < 0.1)
    figures = arm_figures({"a": base, "b": better, "c": base}, "a", "recall5")
    assert figures["recall5_b_minus_a_low"] > 0.02
    assert figures["recall5_b_minus_a"] == pytest.approx((better.mean() - base.mean()), abs=1e-4)
    assert figures["recall5_c_minus_a"] == figures["recall5_c_minus_a_low"] == figures["recall5_c_minus_a_high"] == 0
    assert figures["recall5_a_seed1"] == pytest.approx(base[1].mean(), abs=1e-4)


@pytest.mark.parametrize(("views", "captions", "dtype", "largest"), [(30, 6, "int8", 56_500), (5, 5, "int8", 16_200), (30, 6, "int4", 30_500), (5, 5, "int4", 8_800)])
def test_a_sample_takes_no_more_bytes_than_promised(views: int, captions: int, dtype: str, largest: int) -> None:
    size = sample_bytes(views, captions, 768, 2, dtype, rows=256)
    floor = 2 * (views + captions) * (768 if dtype == "int8" else 384)
    assert floor < size <= largest


def test_the_table_names_what_is_assumed() -> None:
    config = ScaleConfig()
    row = {
        "pairs": 12, "views": 5, "captions": 5, "dtype": "int8", "bytes_per_sample": 1.0, "store_terabytes": 1.0, "network_terabytes": 1.0,
        "cpu_core_hours_drawing": 1, "gpu_hours A100 (bf16, dense)": 1, "gpu_hours H100 (bf16, dense)": 1,
    }  # fmt: skip
    text = as_text({
        "teachers": 2, "teacher": "T", "operations_per_view": 1e9, "operations_per_text": 1e9, "processor": "P", "teacher_view_seconds_one_core": 1.0,
        "decode_and_first_view_seconds": 0.01, "further_view_seconds": 0.01, "assumed_share_of_peak": config.share_of_peak,
        "assumed_picture_bytes": config.picture_bytes, "rows": [row],
    })  # fmt: skip
    assert "assumed: 40% of the GPU's stated peak, 70 kB a picture" in text
    assert "5+5" in text
