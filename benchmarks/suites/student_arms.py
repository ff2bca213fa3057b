"""Students that differ in one thing, several seeds each: trained as processes, two at a time, and compared query by query.

Shapes: S = seeds, Q = queries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.suites.stages import Stages
from distill.evaluate import open_encoder
from distill.pilot_decisions import crossed_interval
from runtime.evaluation import retrieval
from runtime.files import file_sha256, write_json
from runtime.pairs import open_pairs


@dataclass(frozen=True, kw_only=True, slots=True)
class Arms:
    """What all arms share. `judged`: pairs that nobody trained on; `split`: of whose queries."""

    out: Path
    pairs: Path
    judged: Path
    samples: int = 64_000
    seeds: tuple[int, ...] = (0, 1, 2)
    split: str = "trained"
    k: int = 5


def train_arms(arms: Arms, options: Mapping[str, Sequence[str]], stages: Stages) -> dict[str, np.ndarray]:
    """Train every arm with every seed (what is done is kept). `options`: arm to further arguments of `mclip train`, its --store among them.

    Returns:
        Arm to (S, Q) booleans: whether the query found its picture among the first k.
    """
    runs = [(arm, seed) for seed in arms.seeds for arm in options]
    for first in range(0, len(runs), 2):
        two = runs[first : first + 2]
        stages.run(
            f"train-{first:02}-" + "-".join(f"{arm}.{seed}" for arm, seed in two),
            [["mobileclip.cli", "train", "--pairs", str(arms.pairs), "--out", str(_folder(arms, *run)), "--samples", str(arms.samples), "--seed", str(run[1]), *options[run[0]]]
             for run in two],
            inputs=[Path(_option(options[arm], "--store")) / "index.json" for arm, _ in two], outputs=[_folder(arms, *run) / "receipt.json" for run in two],
        )  # fmt: skip
    return {arm: np.stack([np.array(_ranks(arms, arm, seed)) <= arms.k for seed in arms.seeds]) for arm in options}


def _option(arguments: Sequence[str], name: str) -> str:
    return arguments[list(arguments).index(name) + 1]


def _folder(arms: Arms, arm: str, seed: int) -> Path:
    return arms.out / "students" / f"{arm}-{seed}"


def _ranks(arms: Arms, arm: str, seed: int) -> list[int]:
    folder = _folder(arms, arm, seed)
    path, weights = folder / "ranks.json", file_sha256(folder / "model.safetensors")
    if path.is_file() and (found := json.loads(path.read_text(encoding="utf-8")))["weights"] == weights and arms.split in found["ranks"]:
        return found["ranks"][arms.split]
    ranks = retrieval(open_encoder(folder), open_pairs(arms.judged))["ranks"]["text_to_image"]
    write_json(path, {"weights": weights, "ranks": ranks})
    return ranks[arms.split]


def arm_figures(hits: Mapping[str, np.ndarray], reference: str, name: str) -> dict[str, float]:
    """Flat figures of every arm: mean recall and its spread over seeds; against the reference, the paired difference with its 95 % interval over
    seeds and queries.
    """
    figures: dict[str, float] = {}
    for arm, found in hits.items():
        figures[f"{name}_{arm}"] = round(float(found.mean()), 4)
        figures[f"{name}_{arm}_seed_std"] = round(float(found.mean(axis=1).std(ddof=1)), 4)
        figures |= {f"{name}_{arm}_seed{number}": round(float(row.mean()), 4) for number, row in enumerate(found)}
        if arm != reference:
            difference = found.astype(np.float64) - hits[reference]
            low, high = crossed_interval(difference)
            figures |= {
                f"{name}_{arm}_minus_{reference}": round(float(difference.mean()), 4),
                f"{name}_{arm}_minus_{reference}_low": round(low, 4),
                f"{name}_{arm}_minus_{reference}_high": round(high, 4),
            }
    return figures
