"""How near the training loop is to its arithmetic: samples a second of the whole loop over those of forward and backward passes alone.

    python -m benchmarks.suites.training --run out/demo --out out/bench-training        (make bench-training)

Both sides in turns in one process: a stretch of real steps (loader, losses, gradient, optimiser, average, metrics), then as many forward and backward
passes on one batch that stays in memory. The loop's own clock says what is neither waiting for data, nor the passes, nor the optimiser.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.suites.demo import Layout
from distill.compute import Compute
from distill.dataset import ReinforcedPairs
from distill.loader import load
from distill.objective import basis_of
from distill.recipes import load_recipe
from distill.schedule import Plan
from distill.store import open_store
from distill.train_config import TrainConfig
from distill.training_metrics import Clock, Divergence, metrics_line, total_of
from distill.training_state import start
from distill.training_step import Guide, follow, training_step, update
from mobileclip.checkpoint import build_tokenizer, open_tokenizer, preprocess_config
from mobileclip.models import create_model
from runtime.files import write_json
from runtime.pairs import open_pairs

SAMPLES = 320_000


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSuite:
    run: str = "out/demo"
    """A demo run: its pairs and store are read."""
    out: str = "out/bench-training"
    recipe: str = "reinforced"
    model: str = "pocket_s"
    threads: int = 1
    prefetch_threads: int = 1
    rounds: int = 9
    steps: int = 40
    """Of a round and a side."""


def run_training(config: TrainingSuite) -> dict[str, Any]:
    """Flat figures: `loop_ratio` (median of the rounds, with the smallest and largest), `other_share`, and the loop's samples a second."""
    torch.set_num_threads(config.threads)
    place, recipe = Layout(Path(config.run)), load_recipe(config.recipe)
    store = open_store(place.store)
    torch.manual_seed(0)
    model = create_model(TrainConfig(model=config.model).resolved_model())
    followed = follow(store, recipe)
    with tempfile.TemporaryDirectory() as folder:
        build_tokenizer(model.config.text.vocab_size, Path(folder) / "tokenizer.json")
        tokenizer = open_tokenizer(folder, model.config)
        data = ReinforcedPairs(open_pairs(place.train), store, preprocess_config(model.config), tokenizer, seed=0, caption_mix=recipe.caption_mix, teachers=followed.numbers)
    # As long as a run of 320 thousand samples: what is written every half percent is to weigh as it does there.
    total = max(SAMPLES // recipe.batch_size, config.rounds * config.steps + 20)
    plan = Plan(text_steps=0, steps=total, batch_size=recipe.batch_size)
    run = start(model, recipe)
    basis = basis_of(store, data.rows, followed.numbers, model.config.embed_dim) if recipe.feature else None
    guide = Guide(followed=followed, basis=basis, compute=Compute())
    still = data.batch(0, recipe.batch_size)
    rates: dict[str, list[float]] = {"loop": [], "passes": []}
    others: list[dict[str, float]] = []
    with closing(load(data, plan.requests(0), config.prefetch_threads)) as batches:
        for round_number in range(-1, config.rounds):  # the first is not counted: caches and allocators settle
            steps = 20 if round_number < 0 else config.steps
            clock, marks, divergence = Clock(), dict[str, float](), Divergence()
            for _ in range(steps):
                with clock.measure("data"):
                    batch = next(batches)
                terms = training_step(run, plan, recipe, batch, guide, clock=clock)
                with clock.measure("optimizer"):
                    update(run, plan, recipe)
                run.step += 1
                divergence.note(total_of({name: float(value) for name, value in terms.items()}, recipe), "pairs", run.step)
                if run.step % max(1, total // 200) == 0:
                    metrics_line(run, plan, recipe, terms, clock, marks)
            loop, shares = clock.elapsed(), clock.shares()
            began = time.perf_counter()
            for _ in range(steps):
                training_step(run, plan, recipe, still, guide)
            passes = time.perf_counter() - began
            if round_number >= 0:
                rates["loop"].append(steps * recipe.batch_size / loop)
                rates["passes"].append(steps * recipe.batch_size / passes)
                others.append(shares)
    ratios = [one / other for one, other in zip(rates["loop"], rates["passes"], strict=True)]
    return {
        "recipe": config.recipe, "model": config.model, "threads": config.threads, "prefetch_threads": config.prefetch_threads, "batch_size": recipe.batch_size,
        "torch": torch.__version__, "loop_ratio": round(statistics.median(ratios), 3), "loop_ratio_low": round(min(ratios), 3), "loop_ratio_high": round(max(ratios), 3),
        "other_share": round(statistics.median(share["other"] for share in others), 4), "loop_samples_per_second": round(statistics.median(rates["loop"]), 1),
        "passes_samples_per_second": round(statistics.median(rates["passes"]), 1),
        "time_share": {part: round(statistics.median(one[part] for one in others), 3) for part in others[0]},
    }  # fmt: skip


def main() -> int:
    config = tyro.cli(TrainingSuite, prog="python -m benchmarks.suites.training", description=__doc__)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    figures = run_training(config)
    write_json(Path(config.out) / "summary.json", figures)
    for name, value in figures.items():
        sys.stdout.write(f"{name:28} {value}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
