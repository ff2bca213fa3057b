"""The suite of comparisons on simulated machines: equals stay silent and five percent are called, at the rates that are promised; and one small real run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.bench_compare import MOST_OPENINGS, OPENINGS, narrow
from benchmarks.ratios import compare
from benchmarks.suites.compare_power import PowerConfig, figures, run_power
from tests.benchmarks.test_measure import autoregressive


def storms(rng: np.random.Generator, n: int) -> np.ndarray:
    """Factor of a machine that shares its cores: calm, with spells in which a run takes half as long again or twice."""
    busy = autoregressive(rng, n, 0.97) > 1.0
    return np.where(busy, rng.choice([1.0, 1.5, 2.0], size=n), 1.0)


def test_on_restless_machines_equals_are_silent_and_five_percent_are_called() -> None:
    rng = np.random.default_rng(17)
    found: dict[str, list] = {"aa": [], "planted": []}
    for trial in range(100):
        for arm, scale in (("aa", 1.0), ("planted", 1.05)):
            rounds = 20 * MOST_OPENINGS
            wander = np.exp(0.08 * autoregressive(rng, rounds, 0.98))
            layout = np.repeat(np.exp(0.004 * rng.standard_normal((MOST_OPENINGS, 2))), 20, axis=0)
            sides = [5e6 * wander * layout[:, side] * storms(rng, rounds) * np.exp(0.03 * rng.standard_normal(rounds)) for side in range(2)]
            first, second = (np.split(side.astype(np.int64), MOST_OPENINGS) for side in (sides[0], sides[1] * scale))
            openings = OPENINGS
            while openings < MOST_OPENINGS and not narrow(first[:openings], second[:openings]):  # as the command does
                openings += 3
            joined = [np.concatenate(side[:openings]) for side in (first, second)]
            found[arm].append(compare(*joined, groups=[20] * openings, resamples=500, seed=trial))
    made = figures(found)
    assert made["aa_no_difference"] >= 95
    assert made["planted_5pct_called"] >= 90
    assert made["aa_covered"] >= 95
    assert made["planted_covered"] >= 95


@pytest.mark.slow
def test_a_small_run_is_kept_and_goes_on(toy_bundle: Path, tmp_path: Path) -> None:
    config = PowerConfig(bundle=str(toy_bundle), out=str(tmp_path / "out"), milliseconds=0.05, comparisons=2, pairs=120)
    first = run_power(config)
    assert first["comparisons"] == 2
    assert len(first["ratios"]["aa"]) == len(first["ratios"]["planted"]) == 2
    assert 1.0 < np.median([ratio["value"] for ratio in first["ratios"]["planted"]]) < 1.15
    stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.npz")}
    assert run_power(config)["ratios"] == first["ratios"]
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.npz")} == stamps
