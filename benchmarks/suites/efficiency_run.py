"""One student of the learning-efficiency experiment: trained, asked for the queries of two unseen drawing styles, and its weights dropped.

    python -m benchmarks.suites.efficiency_run --out DIR --pairs P --store S --recipe R.json --samples N --seed 0 --validation V --test T

DIR/ranks.json is the result: the rank at which each query found its picture. A run that was interrupted goes on; a finished one does nothing.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from distill.evaluate import Cut, open_encoder
from distill.recipes import Recipe, load_recipe
from distill.train import TrainConfig, train
from runtime.evaluation import retrieval
from runtime.files import file_sha256, write_json
from runtime.pairs import open_pairs


@dataclass(frozen=True, kw_only=True, slots=True)
class OneRun:
    out: str
    pairs: str
    store: str
    recipe: str
    samples: int
    seed: int
    validation: str
    """Pairs of the style that settings are chosen by."""
    test: str
    """Pairs of the style that results are read from."""
    keep: str | None = None
    embed_dim: int | None = None
    cuts: tuple[int, ...] = ()
    """Lengths that the embeddings are cut to for further evaluations."""
    keep_weights: bool = False


def run(one: OneRun) -> Path:
    """Train and evaluate. Returns the path of ranks.json: {"test", "validation": {split: [rank of each query]}, "queries": {split: [text]} of the test,
    "seconds"}."""
    result, settings = Path(one.out) / "ranks.json", settings_of(one)
    if result.is_file() and json.loads(result.read_text(encoding="utf-8")).get("settings") == settings:
        return result
    if result.is_file():  # of other settings
        shutil.rmtree(Path(one.out) / "checkpoint", ignore_errors=True)
        result.unlink()
    checkpoint = train(
        TrainConfig(
            pairs=one.pairs, store=one.store, out=str(Path(one.out) / "checkpoint"), recipe=one.recipe, samples=one.samples, seed=one.seed, keep=one.keep,
            embed_dim=one.embed_dim, threads=1,
        )
    )  # fmt: skip
    encoder = open_encoder(checkpoint)
    found = {name: retrieval(encoder, open_pairs(folder)) for name, folder in (("validation", one.validation), ("test", one.test))}
    seconds = json.loads((checkpoint / "receipt.json").read_text(encoding="utf-8"))["figures"]["seconds"]
    ranks: dict[str, Any] = {name: value["ranks"]["text_to_image"] for name, value in found.items()}
    if one.cuts:
        ranks["cuts"] = {str(dim): retrieval(Cut(encoder, dim), open_pairs(one.test))["ranks"]["text_to_image"] for dim in one.cuts}
    write_json(result, {"settings": settings, **ranks, "queries": found["test"]["queries"]["text_to_image"], "seconds": seconds})
    if not one.keep_weights:
        (checkpoint / "model.safetensors").unlink()
    return result


def settings_of(one: OneRun) -> dict[str, Any]:
    """What decides a result: of the recipe what is not usual, so that a recipe which learns new words stays itself."""
    usual, recipe = dataclasses.asdict(Recipe()), dataclasses.asdict(load_recipe(one.recipe))
    return json.loads(json.dumps({
        "recipe": {name: value for name, value in recipe.items() if value != usual[name]}, "samples": one.samples, "seed": one.seed, "embed_dim": one.embed_dim,
        "store": file_sha256(Path(one.store) / "index.json"), "keep": file_sha256(Path(one.keep)) if one.keep else None, "cuts": list(one.cuts),
    }))  # fmt: skip


def main() -> int:
    torch.set_num_threads(1)
    result = run(tyro.cli(OneRun, prog="python -m benchmarks.suites.efficiency_run", description=__doc__))
    found = json.loads(result.read_text(encoding="utf-8"))
    recalls = {name: round(sum(rank <= 5 for rank in found[name]["trained"]) / len(found[name]["trained"]), 4) for name in ("validation", "test")}
    sys.stdout.write(f"{result.parent}: recall@5 {recalls}, trained in {found['seconds']:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
