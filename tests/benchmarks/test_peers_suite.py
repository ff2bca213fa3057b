"""The peer table's verdict: who counts as a peer of equal accuracy, and which number is quoted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.suites.peers import OURS, PeersConfig, _best, _cosines


def table(tower: str, threads: int, rows: dict[str, tuple[float, float]], batch: int = 1) -> dict[str, Any]:
    ours = rows[OURS][0]
    made = [
        {"peer": name, "p50_ms": taken, "centred_min": parity, "ours_over_it": None if name == OURS else {"value": ours / taken, "low": 0, "high": 0}}
        for name, (taken, parity) in rows.items()
    ]
    return {"tower": tower, "threads": threads, "batch": batch, "rows": made}


def test_the_fastest_of_equal_accuracy_on_the_worse_number_of_threads() -> None:
    one = table("image", 1, {OURS: (10, 0.99999), "quick but wrong": (4, 0.99), "slow": (30, 1.0), "near": (9, 0.99995)})
    two = table("image", 2, {OURS: (6, 0.99999), "slow": (12, 1.0), "near": (5, 0.99995)})
    batch = table("image", 1, {OURS: (99, 1.0), "slow": (1, 1.0)}, batch=8)
    found = _best([one, two, batch], "image")
    assert found is not None
    assert (found["peer"], found["threads"]) == ("near", 2)
    assert found["value"] == pytest.approx(6 / 5)
    assert _best([one], "image")["value"] == pytest.approx(10 / 9)  # type: ignore[index]
    assert _best([one, two], "text") is None
    assert _best([table("image", 1, {OURS: (10, 1.0), "wrong": (1, 0.5)})], "image") is None


def test_a_less_accurate_form_of_ours_competes_with_its_equals() -> None:
    """When ours runs in int8, a peer in bfloat16 that is nearer to the truth counts."""
    found = _best([table("text", 1, {OURS: (5, 0.98), "bf16": (4, 0.999), "fp32": (20, 1.0)})], "text")
    assert found is not None
    assert found["peer"] == "bf16"


def test_cosines_do_not_care_for_length() -> None:
    rows = np.random.default_rng(0).random((4, 8)).astype(np.float32)
    assert _cosines(rows, rows * 3) == pytest.approx(1)
    assert PeersConfig().batches == (1, 8)
