"""Learning rate and batch of both students, chosen from one grid on the validation style.

    python -m benchmarks.suites.grid --run out/demo --out out/grid          (make grid)

Needs a demo run's pairs and store. Every cell trains from the same seed on the same number of samples; what counts is the
validation recall@5 on trained concepts of the averaged weights at the end. The test style is not read.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.suites.stages import Stages
from distill.train import TrainConfig
from runtime.files import write_json


@dataclass(frozen=True, kw_only=True, slots=True)
class GridConfig:
    """The grid."""

    run: str = "out/demo"
    """A demo run that has reached its store."""
    out: str = "out/grid"
    samples: int = 25_600
    """Per cell."""
    learning_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    batch_sizes: tuple[int, ...] = (64, 128)
    recipes: tuple[str, ...] = ("plain", "reinforced")
    seed: int = 0


def run_grid(config: GridConfig) -> dict[str, Any]:
    """Train every cell that is not trained, two at a time; returns {"cells": […], "best_RECIPE": …} and writes it to OUT/summary.json."""
    out = Path(config.out)
    stages = Stages(out, lambda line: sys.stdout.write(f"[grid] {line}\n"))
    cells = [(recipe, rate, batch) for recipe in config.recipes for batch in config.batch_sizes for rate in config.learning_rates]
    for first in range(0, len(cells), 2):
        two = cells[first : first + 2]
        stages.run(f"cells-{first:02}", [_command(config, out, cell) for cell in two], outputs=[_folder(out, cell) / "receipt.json" for cell in two])
    found = [{"recipe": cell[0], "learning_rate": cell[1], "batch_size": cell[2], **_last_validation(_folder(out, cell))} for cell in cells]
    summary: dict[str, Any] = {"samples": config.samples, "cells": found}
    for recipe in config.recipes:
        best = max((cell for cell in found if cell["recipe"] == recipe), key=lambda cell: cell["recall@5_trained"])
        summary |= {f"best_{recipe}_learning_rate": best["learning_rate"], f"best_{recipe}_batch_size": best["batch_size"], f"best_{recipe}_recall5": best["recall@5_trained"]}
    write_json(out / "summary.json", summary)
    return summary


def _folder(out: Path, cell: tuple[str, float, int]) -> Path:
    return out / f"{cell[0]}-{cell[1]:g}-{cell[2]}"


def _command(config: GridConfig, out: Path, cell: tuple[str, float, int]) -> list[str]:
    run = Path(config.run)
    settings = TrainConfig(pairs=str(run / "pairs/train"), store=str(run / "store"), out=str(_folder(out, cell)), recipe=cell[0])
    return [
        "mobileclip.cli", "train", "--pairs", settings.pairs, "--store", settings.store, "--out", settings.out, "--recipe", cell[0], "--samples", str(config.samples),
        "--learning-rate", str(cell[1]), "--batch-size", str(cell[2]), "--seed", str(config.seed), "--validation", str(run / "pairs/validation"), "--validations", "2",
    ]  # fmt: skip


def _last_validation(folder: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return next(line["validation"] for line in reversed(lines) if "validation" in line)


def main(argv: list[str]) -> int:
    import tyro

    summary = run_grid(tyro.cli(GridConfig, args=argv, prog="python -m benchmarks.suites.grid", description=__doc__))
    for cell in summary["cells"]:
        sys.stdout.write(f"{cell['recipe']:11} lr {cell['learning_rate']:<7g} batch {cell['batch_size']:<4} validation recall@5 {cell['recall@5_trained']:.3f}\n")
    sys.stdout.write(json.dumps({key: value for key, value in summary.items() if key != "cells"}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
