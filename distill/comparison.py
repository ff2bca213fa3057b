"""Is model B better than model A? `mclip eval --compare A B --data PAIRS` says "better", "worse" or "no significant difference".

A side is a checkpoint, a bundle, or a folder that holds several of them: the same training with several seeds. With one model a side the answer is
about these two files; with several it is about the two ways of training, since another seed of the same training differs too.

Shapes: S = seeds, Q = queries.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.evaluate import open_encoder
from runtime.errors import CheckpointError, RecipeError
from runtime.evaluation import retrieval
from runtime.pairs import Pairs

_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t, two-sided 95 %, from 1 to 10 degrees of freedom; the normal's 1.96 stands for more."""


def models_of(side: str) -> list[Path]:
    """The models of a side, in order of name.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(side)
    if _is_model(folder):
        return [folder]
    found = sorted(inner for inner in folder.iterdir() if _is_model(inner)) if folder.is_dir() else []
    if not found:
        raise CheckpointError(f"'{side}' is neither a checkpoint (config.json) nor a bundle (manifest.json), and holds none; give one, or a folder of several seeds")
    return found


def _is_model(folder: Path) -> bool:
    return (folder / "manifest.json").is_file() or ((folder / "config.json").is_file() and (folder / "model.safetensors").is_file())


def compare_sides(
    sides: tuple[str, str], pairs: Pairs, *, k: int = 5, direction: str = "text_to_image", splits: Sequence[str] = (), seed: int = 0, threads: int | None = None
) -> dict[str, Any]:
    """Recall@k of both sides on the same queries, and the verdict for each split.

    Args:
        sides: A and B, as `models_of` reads them.
        splits: of `runtime.evaluation.split_rows`; empty: all that the pairs have.

    Returns:
        JSON-ready {"k", "direction", "seeds": [of A, of B], "splits": {split: `difference`'s figures, "a", "b": mean recalls, "n": queries}}.

    Raises:
        CheckpointError: a side is no model. RecipeError: a split that the pairs do not have.
    """
    ranks = []
    for side in sides:
        found = [retrieval(open_encoder(model, threads), pairs, ks=(k,), seed=seed)["ranks"][direction] for model in models_of(side)]
        ranks.append({split: np.array([one[split] for one in found]) for split in found[0]})
    if unknown := [split for split in splits if split not in ranks[0]]:
        raise RecipeError(f"the pairs have no split {', '.join(unknown)}; they have {', '.join(ranks[0])}")
    result = {}
    for split in splits or ranks[0]:
        a, b = (side[split] <= k for side in ranks)
        result[split] = {"n": a.shape[1], "a": round(float(a.mean()), 4), "b": round(float(b.mean()), 4), **difference(a, b, seed=seed)}
    return {"k": k, "direction": direction, "seeds": [len(next(iter(side.values()))) for side in ranks], "splits": result}


def difference(a: np.ndarray, b: np.ndarray, seed: int = 0, draws: int = 4000, paired: bool = False) -> dict[str, Any]:
    """B's recall minus A's, its 95 % interval, and the verdict for B.

    Queries are resampled together for both sides, the seeds of each side on their own (Owen 2007, "The pigeonhole bootstrap"): seed 0 of two
    trainings has nothing in common but a number. What the seeds add is widened by Student's t, since from three of them their spread is hardly known;
    on two sides of the same training the verdict is then "no significant difference" in at least 19 of 20 cases (tests/distill/test_comparison.py).

    Args:
        a, b: (S, Q) booleans of the same queries in the same order; S may differ.
        paired: row s of a and row s of b began alike (same first weights, same order of the data), so the seeds are drawn together and what they share
            drops out of the difference. Never for trainings that were paired by their results.

    Raises:
        ValueError: other queries, or none.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not a.size or not b.size:
        raise ValueError(f"hits have shapes {a.shape} and {b.shape}, expected seeds x queries of the same queries")
    if paired and len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} seeds cannot be paired")
    sides = ((1, b - a),) if paired else ((-1, a), (1, b))
    generator, queries = np.random.default_rng(seed), a.shape[1]
    counts = generator.multinomial(queries, np.full(queries, 1 / queries), size=draws)
    drawn = np.zeros(draws)
    for sign, side in sides:
        per_seed = counts @ side.T / queries  # (draws, S)
        centre = per_seed.mean(axis=1)
        drawn += sign * centre
        if (seeds := len(side)) > 1:
            picked = np.take_along_axis(per_seed, generator.integers(0, seeds, (draws, seeds)), axis=1).mean(axis=1)
            drawn += sign * (picked - centre) * (seeds / (seeds - 1)) ** 0.5 * _widening(seeds - 1)
    low, high = (float(x) for x in np.quantile(drawn, (0.025, 0.975)))
    verdict = "better" if low > 0 else "worse" if high < 0 else "no significant difference"
    return {"difference": round(float(b.mean() - a.mean()), 4), "low": round(low, 4), "high": round(high, 4), "verdict": verdict}


def _widening(freedom: int) -> float:
    normal = statistics.NormalDist().inv_cdf(0.975)
    return _T_975[freedom - 1] / normal if freedom <= len(_T_975) else 1.0


def format_comparison(result: dict[str, Any], sides: tuple[str, str]) -> str:
    """A few lines for a person."""
    seeds = [f"{count} seed{'s' * (count > 1)}" for count in result["seeds"]]
    lines = [f"A: {sides[0]} ({seeds[0]})   B: {sides[1]} ({seeds[1]})   recall@{result['k']}, {result['direction']}"]
    for split, row in result["splits"].items():
        lines.append(
            f"{split:9} n {row['n']:5}  A {row['a']:.3f}  B {row['b']:.3f}  B - A {row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]  B is {_said(row['verdict'])}"
        )
    if 1 in result["seeds"]:
        lines.append("One seed on a side: this is about these files, not about how they were trained.")
    return "\n".join(lines) + "\n"


def _said(verdict: str) -> str:
    return f"not significantly different ({verdict})" if verdict.startswith("no ") else verdict
