"""Train a student from pairs and a store: no teacher is run, augmentations are replayed.

    mclip train --pairs PAIRS --store STORE --out CKPT --recipe reinforced

The state of a run is one file, written under a temporary name and renamed: weights, average, optimiser and the number of
samples seen. The order of samples is a function of that number, so a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.basis_file import write_basis
from distill.compute import Compute, checkpoint_blocks, compile_towers, device_of
from distill.dataset import Batch, ReinforcedPairs
from distill.ghost_norm import ghost_batches
from distill.interruption import stop_asked
from distill.keep_list import read_keep_list
from distill.loader import load
from distill.objective import basis_of, typical_similarities
from distill.processes import Processes, join, leave, start_processes
from distill.progress import progress
from distill.recipes import Recipe
from distill.schedule import Plan
from distill.store import Store, open_store
from distill.train_config import TrainConfig, fingerprint_of
from distill.training_metrics import Clock, Divergence, Validation, limit_of, live_line, metrics_line, tensorboard, time_figures, total_of
from distill.training_state import Run, finished, remove_states, restore, save, start
from distill.training_step import Followed, Guide, follow, training_step, update
from mobileclip.backbone_weights import load_backbone
from mobileclip.checkpoint import build_tokenizer, load_checkpoint, open_tokenizer, preprocess_config, save_checkpoint
from mobileclip.inherit import inherit
from mobileclip.model import ImageTextModel
from mobileclip.models import create_model
from runtime.errors import TrainingError
from runtime.files import write_json
from runtime.pairs import open_pairs

logger = logging.getLogger(__name__)

OFFENDING = "offending_batch"


def train(config: TrainConfig) -> Path:
    """Run to the end, from where an earlier run of the same settings stopped. Returns the checkpoint folder.

    Raises:
        RecipeError, PairsError, StoreError, CheckpointError: the inputs do not fit (before anything is written).
        TrainingError: the folder holds a run with other settings, or the loss is no longer finite.
    """
    config.check_places()
    torch.set_num_threads(config.threads)
    processes = Processes.joined()
    recipe = config.resolved_recipe()
    plan = Plan.of(config.samples, recipe)
    compute = Compute(device=device_of(config.device), precision=config.precision, grad_checkpointing=config.grad_checkpointing)
    ghost_batches(recipe.batch_size, recipe.ghost_batch, processes.rank, processes.world)  # refuses what cannot be shared
    keep = read_keep_list(config.keep) if config.keep is not None else None
    pairs, store = open_pairs(config.pairs), open_store(config.store)
    followed = follow(store, recipe)
    out = Path(config.out)
    fingerprint = fingerprint_of(config, recipe, store)
    if finished(out, fingerprint):
        logger.info("%s is complete", out)
        return out
    processes.wait()  # nobody writes before all have looked
    torch.manual_seed(config.seed)
    model, tokenizer_path, inherited = _make_model(config, out, processes)
    data = ReinforcedPairs(
        pairs, store, preprocess_config(model.config), open_tokenizer(tokenizer_path.parent, model.config), seed=config.seed, caption_mix=recipe.caption_mix,
        caption_sets=recipe.caption_sets,
        teachers=followed.numbers, max_augmentations=recipe.max_augmentations, shuffle_shards=recipe.shuffle_shards, keep=keep,
        rank=processes.rank, world=processes.world, matched_views=recipe.matched_views,
        cut_texts=model.config.text.mask != "none",
    )  # fmt: skip
    if recipe.batch_size > len(data):
        raise TrainingError(f"the recipe's batch_size is {recipe.batch_size}, and there are only {len(data)} pairs; choose a batch_size of at most that, or train on more pairs")
    run = start(model.to(compute.device), recipe)
    if processes.rank == 0:
        restore(run, out, fingerprint)
        processes.wait()
    else:
        processes.wait()
        restore(run, out, fingerprint, metrics=False)
    processes.agree([*model.state_dict().values(), *run.average.state_dict().values()])
    if config.grad_checkpointing:
        checkpoint_blocks(run.model)
    if config.compile:
        compile_towers(run.model)
    guide = _guide(recipe, data, followed, run.model.config.embed_dim, compute, processes, config.exchange == "ring")
    best = _loop(run, plan, recipe, config, data, guide, out, fingerprint, processes)
    unreadable = processes.total(data.unreadable_count)
    if processes.rank:
        processes.wait()
        return out
    figures = {
        "samples": plan.samples(plan.steps), "steps": plan.steps, "seconds": round(run.seconds, 1), "pairs": len(data), "missing": data.missing,
        "dropped": data.dropped, "unreadable_count": unreadable, "processes": processes.world, "best": best,
        "unreadable": dict(sorted(data.unreadable.items())), **time_figures(out),
    }  # fmt: skip
    if guide.basis is not None:
        write_basis(out, guide.basis, [store.teachers[k].name for k in followed.numbers])
    run.average.logit_scale.data.copy_(run.model.logit_scale.data)
    if run.model.logit_bias is not None and run.average.logit_bias is not None:
        run.average.logit_bias.data.copy_(run.model.logit_bias.data)
    save_checkpoint(
        run.average.eval(), out, tokenizer=tokenizer_path,
        extra={"stage": "train", "config": dataclasses.asdict(config), "recipe": dataclasses.asdict(recipe), "fingerprint": fingerprint, "figures": figures,
               **inherited, "store_licences": sorted({store.teachers[k].licence for k in followed.numbers})},
    )  # fmt: skip
    remove_states(out)
    processes.wait()
    return out


def _loop(
    run: Run, plan: Plan, recipe: Recipe, config: TrainConfig, data: ReinforcedPairs, guide: Guide, out: Path, fingerprint: str, processes: Processes
) -> dict[str, Any] | None:
    """Steps until the plan is done; the state is saved every `save_seconds`, and on an interruption. The first process alone writes.

    Returns:
        What `Validation` found best, if it was asked.
    """
    first = processes.rank == 0
    validate = Validation(config.validation, config.validations, out, plan, run.step, fingerprint)
    clock = Clock()
    log_every = max(1, plan.steps // 200)
    saved = started = time.monotonic()
    before = run.seconds
    marks: dict[str, float] = {"step": run.step}
    divergence = Divergence()
    with (
        open(out / "metrics.jsonl" if first else os.devnull, "a", encoding="utf-8") as metrics,
        tensorboard(out / "tensorboard" if first and config.tensorboard else None) as board,
        progress(f"train {out.name}", plan.steps, run.step) if first else nullcontext(lambda *_: None) as advance,
        closing(load(data, plan.requests(run.step), config.prefetch_threads)) as batches,
        stop_asked() as asked,
    ):
        while run.step < plan.steps:
            terms = _step(run, plan, recipe, batches, data.store, guide, clock, processes, config.seed, out, divergence)
            run.step += 1
            run.seconds = before + time.monotonic() - started
            if first and (run.step % log_every == 0 or run.step == plan.steps):
                line = metrics_line(run, plan, recipe, terms, clock, marks)
                with clock.pause():
                    line.update(validate.maybe(run))
                metrics.write(json.dumps(line) + "\n")
                metrics.flush()
                board(line)
                advance(run.step, live_line(line))
            stop = processes.any(asked())
            if first and (stop or time.monotonic() - saved > config.save_seconds):
                save(run, out, fingerprint, config.keep_states)
                saved = time.monotonic()
            if stop:
                raise KeyboardInterrupt
    return validate.best


def _guide(recipe: Recipe, data: ReinforcedPairs, followed: Followed, dim: int, compute: Compute, processes: Processes, ring: bool) -> Guide:
    basis = basis_of(data.store, data.rows, followed.numbers, dim).to(compute.device) if recipe.feature or recipe.text_samples else None
    if basis is not None:
        processes.agree([basis])
    asked = recipe.gate == "teacher" or (recipe.form == "sigmoid" and recipe.affinity)
    typical = typical_similarities(data.store, data.rows, followed.numbers) if asked else ()
    return Guide(followed=followed, basis=basis, typical=typical, compute=compute, ring=ring)


def _step(
    run: Run, plan: Plan, recipe: Recipe, batches: Iterator[Batch], store: Store, guide: Guide, clock: Clock, processes: Processes, seed: int,
    out: Path, divergence: Divergence,
) -> dict[str, Tensor]:
    """One optimiser step; returns the loss terms, detached. The clock's "data" is the time that the step waited for its batch."""
    with clock.measure("data"):
        batch = next(batches)
    try:
        terms = training_step(run, plan, recipe, batch, guide, processes, seed, clock)
        with clock.measure("optimizer"):
            update(run, plan, recipe)
        divergence.note(total_of({name: float(value) for name, value in terms.items()}, recipe), "pairs" if batch.pixels.size else "text", run.step + 1)
    except TrainingError as error:
        raise TrainingError(_accused(error, batch, store, recipe, out, run.step, processes.rank)) from None
    return terms


def _accused(error: TrainingError, batch: Batch, store: Store, recipe: Recipe, out: Path, step: int, rank: int) -> str:
    """Write down which samples the step was made of, and say so."""
    keys = [store.keys[row] for row in batch.rows]
    path = out / (f"{OFFENDING}.{rank}.json" if rank else f"{OFFENDING}.json")
    write_json(path, {"error": str(error), "step": step + 1, "keys": keys, "views": batch.augs.tolist(), "captions": batch.captions.tolist()})
    return (
        f"{error}; the last saved state is intact. The batch holds {', '.join(keys[:4])} and {max(0, len(keys) - 4)} more, all in {path.name}. "
        f"Lower learning_rate (now {recipe.learning_rate})"
    )


def _make_model(config: TrainConfig, out: Path, processes: Processes) -> tuple[ImageTextModel, Path, dict[str, Any]]:
    """The student, the path of its tokenizer.json, and what the receipt says about where its weights come from."""
    if config.init is not None:
        out.mkdir(parents=True, exist_ok=True)
        return load_checkpoint(config.init), Path(config.init) / "tokenizer.json", {}
    model, facts = create_model(config.resolved_model()), {}
    if config.inherit is not None:
        model, report = inherit(model, load_checkpoint(config.inherit))
        facts = {"inherited": report.as_dict()}
    if config.backbone_weights is not None:
        facts |= {"backbone_weights": load_backbone(model, config.backbone_weights).as_dict()}
    out.mkdir(parents=True, exist_ok=True)
    path = out / "tokenizer.json"  # written again each time: one that is there may be of another vocabulary
    os.replace(build_tokenizer(model.config.text.vocab_size, out / f".tokenizer.{os.getpid()}.json"), path)
    return model, path, facts


def check(config: TrainConfig, world: int) -> bool:
    """Open all that a run of `world` processes needs, so that what does not fit is said once and before any of them starts. True: it is done.

    Raises:
        RecipeError, PairsError, StoreError, CheckpointError, TrainingError: as `train`.
    """
    config.check_places()
    recipe = config.resolved_recipe()
    Plan.of(config.samples, recipe)
    device_of(config.device)
    ghost_batches(recipe.batch_size, recipe.ghost_batch, 0, world)
    if config.keep is not None:
        read_keep_list(config.keep)
    open_pairs(config.pairs)
    store = open_store(config.store)
    follow(store, recipe)
    return finished(Path(config.out), fingerprint_of(config, recipe, store))


def main(argv: list[str]) -> int:
    """`mclip train`."""
    import tyro

    config = tyro.cli(TrainConfig, args=argv, prog="mclip train", description=__doc__)
    if config.dry_run:
        from distill.dry_run import dry_run, format_dry_run

        sys.stdout.write(format_dry_run(dry_run(config, config.nproc)))
        return 0
    if config.nproc > 1 and "RANK" not in os.environ:
        if check(config, config.nproc):
            sys.stdout.write(f"{config.out} is complete\n")
            return 0
        return start_processes(config.nproc, ["train", *argv])
    joined = join()
    try:
        out = train(config)
        rank = Processes.joined().rank
    finally:
        if joined:
            leave()
    if rank:
        return 0
    figures = json.loads((out / "receipt.json").read_text(encoding="utf-8"))["figures"]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in figures["time_share"].items())
    sys.stdout.write(
        f"{out}: {figures['samples']:,} samples in {figures['seconds']:.0f} s, median {figures['samples_per_second']:.0f} samples/s on {config.threads} thread(s); "
        f"time went to {shares}; its limit is {limit_of(figures['time_share'])}\n"
    )
    return 0
