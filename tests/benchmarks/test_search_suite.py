"""The benchmark of searching: its mixture is like what it was fitted to, its truth is exact, and it runs from end to end on a small count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.suites import search
from benchmarks.suites.search_data import draw, fit_mixture


def cloud(n: int, dims: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(6, dims))
    found = centres[generator.integers(6, size=n)] + generator.normal(size=(n, dims)) * np.linspace(1.5, 0.1, dims)
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def test_the_mixture_is_like_its_data() -> None:
    real = cloud(3000, 32, 1)
    made = draw(fit_mixture(real, clusters=6), 3000, np.random.default_rng(2))
    other = np.random.default_rng(3).normal(size=(3000, 32)).astype(np.float32)
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(made.mean(axis=0), real.mean(axis=0), atol=0.03)
    np.testing.assert_allclose(np.cov(made.T), np.cov(real.T), atol=0.01)

    def tenth(queries: np.ndarray, gallery: np.ndarray) -> float:
        return float(np.sort(queries[:200] @ gallery.T, axis=1)[:, -11].mean())

    assert abs(tenth(real, real) - tenth(made, made)) < 0.02
    assert abs(tenth(other, other) - tenth(real, real)) > 0.1  # what plain Gaussians would tell instead


def test_truth_is_exact() -> None:
    gallery, queries = cloud(60_000, 16, 1), cloud(5, 16, 2)
    found = search.nearest(gallery, queries)
    np.testing.assert_array_equal(found, np.argsort(-(queries @ gallery.T), axis=1, kind="stable")[:, : search.K])


def test_the_whole_of_it_on_a_small_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "embed", lambda run: (cloud(700, 512, 1), cloud(700, 512, 4)))
    found = search.measure_search(tmp_path, tmp_path / "work", count=3000, queries=60)
    assert set(found) >= {f"search_1m_{name}" for name in ("p50_ms", "recall10", "disk_ratio", "memory_ratio", "build_minutes", "text_recall10", "rescoring_ratio")}
    assert found["search_1m_recall10"] > 0.95
    assert 0.25 < found["search_1m_rescoring_ratio"] < 0.26
    assert 0 < found["search_1m_disk_ratio"] < 0.4
    assert found["search_1m_count"] == 3000
