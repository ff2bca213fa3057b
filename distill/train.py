"""Train a student from pairs and a store: no teacher is run, augmentations are replayed.

    mclip train --pairs PAIRS --store STORE --out CKPT --recipe reinforced

The state of a run is one file, written under a temporary name and renamed: weights, average, optimiser and the number of
samples seen. The order of samples is a function of that number, so a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from distill.compute import Compute, Precision, checkpoint_blocks, compile_towers, device_of
from distill.dataset import Batch, ReinforcedPairs
from distill.ghost_norm import ghost_batches
from distill.interruption import stop_asked
from distill.keep_list import read_keep_list
from distill.loader import load
from distill.objective import basis_of, typical_similarity
from distill.processes import Processes, join, leave, start_processes
from distill.progress import progress
from distill.recipes import Recipe, load_recipe
from distill.schedule import Plan, learning_rate
from distill.store import Store, open_store
from distill.training_state import STATE, Run, finished, restore, save, start
from distill.training_step import Followed, Guide, follow, training_step, update
from mobileclip.checkpoint import build_tokenizer, load_checkpoint, open_tokenizer, preprocess_config, read_config, save_checkpoint
from mobileclip.config import ModelConfig, config_to_dict
from mobileclip.inherit import inherit
from mobileclip.model import ImageTextModel
from mobileclip.models import create_model
from mobileclip.students import student_config
from runtime.errors import CheckpointError, RecipeError, TrainingError
from runtime.files import file_sha256
from runtime.pairs import open_pairs
from runtime.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

VARIATIONS = ("backbone", "image_size", "mask", "vocab_size", "embedding_dim", "embed_dim")
OVERRIDES = ("batch_size", "learning_rate", "caption_mix", "teachers", "logit_scales", "max_augmentations", "ghost_batch")
LATER = ("ghost_batch", "gate", "gate_sharpness", "matched_views", "nested_dims")
"""Settings of a recipe that came later: a run that leaves them alone is the run that it was before there were any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Settings of one run."""

    pairs: str
    """Folder of tar shards."""
    store: str
    """Their reinforcement, as `mclip reinforce` wrote it."""
    out: str
    """Checkpoint folder to write; it also holds metrics.jsonl and, while the run lasts, its state."""
    recipe: str = "reinforced"
    """A name in distill/recipes.py or a JSON file."""
    model: str = "pocket_s"
    """A preset. Not used with `init`."""
    backbone: str | None = None
    """Image backbone instead of the preset's: a name of timm.list_models()."""
    image_size: int | None = None
    """Side of the pictures in pixels, instead of the preset's."""
    mask: Literal["causal", "pad"] | None = None
    """What a token of the text tower sees, instead of the preset's: those before it, or all but padding."""
    vocab_size: int | None = None
    """Ids of the token table (the first merges of CLIP's vocabulary), instead of the preset's: 514 to 49408."""
    embedding_dim: int | None = None
    """Width of the token table, instead of the preset's; a narrow one is followed by a linear map. 0: the tower's own width."""
    embed_dim: int | None = None
    """Dimensions of the shared space, instead of the preset's."""
    init: str | None = None
    """A checkpoint folder to start from, instead of random weights. It says what the model is."""
    inherit: str | None = None
    """A checkpoint folder of a larger model whose layers and channels the student starts from, chosen by size (mobileclip/inherit.py)."""
    samples: int = 250_000
    """Pairs seen, the same one again counted again; captions read alone count as well."""
    seed: int = 0
    threads: int = 1
    """Torch threads. Small models gain more from a second process than from a second thread."""
    save_seconds: float = 30.0
    """At most this much work is lost to a kill."""
    validation: str | None = None
    """Pairs folder: retrieval on it is written to the metrics along the way. Nothing is chosen by it here."""
    validations: int = 5
    """How often, evenly over the run."""
    keep: str | None = None
    """Keep-list (mclip curate): only its keys are trained on."""
    prefetch_threads: int = 1
    """Threads that decode and replay pictures while the model computes; 0: none. The batches are the same for any number."""
    batch_size: int | None = None
    """Overrides the recipe."""
    learning_rate: float | None = None
    """Overrides the recipe."""
    caption_mix: dict[str, float] | None = None
    """Overrides the recipe: share of each type of caption, for instance `raw 0.3 synthetic 0.7`."""
    teachers: tuple[str, ...] | None = None
    """Overrides the recipe: names of the store's teachers to follow."""
    logit_scales: tuple[float, ...] | None = None
    """Overrides the recipe: one per followed teacher."""
    max_augmentations: int | None = None
    """Overrides the recipe: draw from the first so many stored views."""
    ghost_batch: int | None = None
    """Overrides the recipe: samples that go through the towers together."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: the GPU where there is one."""
    precision: Precision = "fp32"
    """bf16: the towers compute in bfloat16 (autocast); weights, losses and the average stay float32."""
    compile: bool = False
    """torch.compile the towers: minutes before the first step, faster ones after it."""
    grad_checkpointing: bool = False
    """Keep only what goes into each block of the towers and compute the rest again for the gradient: less memory, a third more time."""
    nproc: int = 1
    """Processes on this machine that share every batch; the result is that of one, to rounding. For several machines use torchrun."""

    def resolved_model(self) -> ModelConfig:
        """What is trained: the checkpoint's model, or the preset with its variations."""
        changes = {name: getattr(self, name) for name in VARIATIONS if getattr(self, name) is not None}
        if self.init is None:
            return student_config(self.model, **changes)
        if changes or self.inherit is not None:
            wrong = [f"--{name.replace('_', '-')}" for name in (*changes, *(["inherit"] if self.inherit is not None else []))]
            raise RecipeError(f"--init goes on from a finished model and does not go with {', '.join(wrong)}; for another student with its weights, use --inherit alone")
        return read_config(self.init)

    def resolved_recipe(self) -> Recipe:
        recipe = load_recipe(self.recipe)
        changes = {name: getattr(self, name) for name in OVERRIDES if getattr(self, name) is not None}
        return dataclasses.replace(recipe, **changes)


def train(config: TrainConfig) -> Path:
    """Run to the end, from where an earlier run of the same settings stopped. Returns the checkpoint folder.

    Raises:
        RecipeError, PairsError, StoreError, CheckpointError: the inputs do not fit (before anything is written).
        TrainingError: the folder holds a run with other settings, or the loss is no longer finite.
    """
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
    fingerprint = _fingerprint(config, recipe, store)
    if finished(out, fingerprint):
        logger.info("%s is complete", out)
        return out
    processes.wait()  # nobody writes before all have looked
    torch.manual_seed(config.seed)
    model, tokenizer_path, inherited = _make_model(config, out, processes)
    data = ReinforcedPairs(
        pairs, store, preprocess_config(model.config), _tokenizer(model.config, tokenizer_path), seed=config.seed, caption_mix=recipe.caption_mix,
        teachers=followed.numbers, max_augmentations=recipe.max_augmentations, shuffle_shards=recipe.shuffle_shards, keep=keep,
        rank=processes.rank, world=processes.world, matched_views=recipe.matched_views,
    )  # fmt: skip
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
    guide = _guide(recipe, data, followed, run.model.config.embed_dim, compute, processes)
    _loop(run, plan, recipe, config, data, guide, out, fingerprint, processes)
    unreadable = processes.total(data.unreadable_count)
    if processes.rank:
        processes.wait()
        return out
    figures = {
        "samples": plan.samples(plan.steps), "steps": plan.steps, "seconds": round(run.seconds, 1), "pairs": len(data), "missing": data.missing,
        "dropped": data.dropped, "unreadable_count": unreadable, "processes": processes.world, "unreadable": dict(sorted(data.unreadable.items())), **_time_figures(out),
    }  # fmt: skip
    run.average.logit_scale.data.copy_(run.model.logit_scale.data)
    save_checkpoint(
        run.average.eval(), out, tokenizer=tokenizer_path,
        extra={"stage": "train", "config": dataclasses.asdict(config), "recipe": dataclasses.asdict(recipe), "fingerprint": fingerprint, "figures": figures,
               **inherited, "store_licences": sorted({store.teachers[k].licence for k in followed.numbers})},
    )  # fmt: skip
    (out / STATE).unlink(missing_ok=True)
    processes.wait()
    return out


def _loop(
    run: Run, plan: Plan, recipe: Recipe, config: TrainConfig, data: ReinforcedPairs, guide: Guide, out: Path, fingerprint: str, processes: Processes
) -> None:
    """Steps until the plan is done; the state is saved every `save_seconds`, and on an interruption. The first process alone writes."""
    first = processes.rank == 0
    validate = _Validation(config, plan)
    clock = {"data": 0.0, "model": 0.0, "optimizer": 0.0}
    log_every = max(1, plan.steps // 200)
    saved = started = time.monotonic()
    before = run.seconds
    marks: dict[str, float] = {}
    with (
        open(out / "metrics.jsonl" if first else os.devnull, "a", encoding="utf-8") as metrics,
        progress(f"train {out.name}", plan.steps, run.step) if first else nullcontext(lambda *_: None) as advance,
        closing(load(data, plan.requests(run.step), config.prefetch_threads)) as batches,
        stop_asked() as asked,
    ):
        while run.step < plan.steps:
            terms = _step(run, plan, recipe, batches, data.store, guide, clock, processes, config.seed)
            run.step += 1
            run.seconds = before + time.monotonic() - started
            if first and (run.step % log_every == 0 or run.step == plan.steps):
                line = _metrics_line(run, plan, recipe, terms, clock, marks)
                line.update(validate.maybe(run))
                metrics.write(json.dumps(line) + "\n")
                metrics.flush()
                advance(run.step, f"loss {line['loss']:.3f}  {line['samples_per_second']:.0f} samples/s")
            stop = processes.any(asked())
            if first and (stop or time.monotonic() - saved > config.save_seconds):
                save(run, out, fingerprint)
                saved = time.monotonic()
            if stop:
                raise KeyboardInterrupt


def _guide(recipe: Recipe, data: ReinforcedPairs, followed: Followed, dim: int, compute: Compute, processes: Processes) -> Guide:
    basis = basis_of(data.store, data.rows, followed.numbers, dim).to(compute.device) if recipe.feature or recipe.text_samples else None
    if basis is not None:
        processes.agree([basis])
    typical = typical_similarity(data.store, data.rows, followed.numbers) if recipe.gate == "teacher" else 0.0
    return Guide(followed=followed, basis=basis, typical=typical, compute=compute)


def _step(
    run: Run, plan: Plan, recipe: Recipe, batches: Iterator[Batch], store: Store, guide: Guide, clock: dict[str, float], processes: Processes, seed: int
) -> dict[str, Tensor]:
    """One optimiser step; returns the loss terms, detached. The clock's "data" is the time that the step waited for its batch."""
    began = time.perf_counter()
    batch = next(batches)
    loaded = time.perf_counter()
    try:
        terms = training_step(run, plan, recipe, batch, guide, processes, seed)
    except TrainingError as error:
        keys = [store.keys[row] for row in batch.rows]
        raise TrainingError(
            f"{error}; the last saved state is intact. The batch holds {', '.join(keys[:4])} and {max(0, len(keys) - 4)} more. "
            f"Lower learning_rate (now {recipe.learning_rate})"
        ) from None
    modelled = time.perf_counter()
    update(run, plan, recipe)
    ended = time.perf_counter()
    for name, seconds in (("data", loaded - began), ("model", modelled - loaded), ("optimizer", ended - modelled)):
        clock[name] += seconds
    return terms


def _make_model(config: TrainConfig, out: Path, processes: Processes) -> tuple[ImageTextModel, Path, dict[str, Any]]:
    """The student, the path of its tokenizer.json, and what the receipt says about where its weights come from."""
    if config.init is not None:
        out.mkdir(parents=True, exist_ok=True)
        return load_checkpoint(config.init), Path(config.init) / "tokenizer.json", {}
    model, facts = create_model(config.resolved_model()), {}
    if config.inherit is not None:
        model, report = inherit(model, load_checkpoint(config.inherit))
        facts = {"inherited": report.as_dict()}
    out.mkdir(parents=True, exist_ok=True)
    path = out / "tokenizer.json"  # written again each time: one that is there may be of another vocabulary
    os.replace(build_tokenizer(model.config.text.vocab_size, out / f".tokenizer.{os.getpid()}.json"), path)
    return model, path, facts


def _tokenizer(config: ModelConfig, path: Path) -> Tokenizer:
    if config.text.mask == "none":
        raise RecipeError(
            f"model '{config.name}' lets padding take part in attention (mask 'none'); training cuts texts to the longest of a batch and needs "
            "mask 'causal' or 'pad'"
        )
    return open_tokenizer(path.parent, config)


def _fingerprint(config: TrainConfig, recipe: Recipe, store: Store) -> str:
    """Of everything that decides the weights; a folder continues only its own run."""
    usual = dataclasses.asdict(Recipe())
    decided = {name: value for name, value in dataclasses.asdict(recipe).items() if name not in LATER or value != usual[name]}
    facts = {
        "recipe": decided, "model": config_to_dict(config.resolved_model()), "samples": config.samples, "seed": config.seed,
        "store": {"parts": store.index.get("parts"), "seed": store.index.get("seed")}, "init": _weights_hash(config.init),
        "keep": None if config.keep is None else file_sha256(Path(config.keep)),
    }  # fmt: skip
    if config.inherit is not None:
        facts["inherit"] = _weights_hash(config.inherit)
    if config.precision != "fp32":
        facts["precision"] = config.precision
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _weights_hash(folder: str | None) -> str | None:
    if folder is None:
        return None
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise CheckpointError(f"'{folder}' is not a checkpoint: it has no model.safetensors; give a folder that mclip train or mclip convert has written")
    return file_sha256(path)


def _metrics_line(run: Run, plan: Plan, recipe: Recipe, terms: dict[str, Tensor], clock: dict[str, float], marks: dict[str, float]) -> dict[str, Any]:
    """One line of metrics.jsonl. `samples_per_second` counts pairs (captions in the text-only steps) since the line before."""
    values = {name: float(value) for name, value in terms.items()}
    text_only = run.step <= plan.text_steps
    items = (run.step - marks.get("step", 0)) * plan.batch_size * (2 if text_only else 1)
    elapsed = sum(clock.values()) - marks.get("clock", 0.0)
    marks.update(step=run.step, clock=sum(clock.values()))
    return {
        "step": run.step,
        "phase": "text" if text_only else "pairs",
        "samples": plan.samples(run.step),
        "loss": sum(getattr(recipe, name) * value for name, value in values.items()),
        "loss_terms": values,
        "lr": learning_rate(run.step - 1, plan.steps, recipe),
        "logit_scale": float(run.model.logit_scale.detach().exp()),
        "samples_per_second": round(items / max(elapsed, 1e-9), 1),
        "seconds": round(run.seconds, 2),
        "time_share": {name: round(seconds / max(sum(clock.values()), 1e-9), 3) for name, seconds in clock.items()},
    }


def _time_figures(out: Path) -> dict[str, Any]:
    """Where the time went, from the last line of the metrics, and the median rate on pairs."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [line["samples_per_second"] for line in lines if line["phase"] == "pairs"]
    return {"samples_per_second": float(np.median(rates)), "time_share": lines[-1]["time_share"]}


class _Validation:
    """Retrieval of the averaged weights on the validation pairs, a few times over the run. Its time counts for no step."""

    def __init__(self, config: TrainConfig, plan: Plan) -> None:
        self.config, self.plan, self.done = config, plan, 0
        self.encoder: Any = None

    def maybe(self, run: Run) -> dict[str, Any]:
        wanted = int(self.config.validations * run.step / self.plan.steps)
        if self.config.validation is None or wanted <= self.done:
            return {}
        self.done = wanted
        from distill.evaluate import quick_recall

        return {"validation": quick_recall(run.average, self.config.validation, Path(self.config.out))}


def check(config: TrainConfig, world: int) -> bool:
    """Open all that a run of `world` processes needs, so that what does not fit is said once and before any of them starts. True: it is done.

    Raises:
        RecipeError, PairsError, StoreError, CheckpointError, TrainingError: as `train`.
    """
    recipe = config.resolved_recipe()
    Plan.of(config.samples, recipe)
    ghost_batches(recipe.batch_size, recipe.ghost_batch, 0, world)
    if config.keep is not None:
        read_keep_list(config.keep)
    open_pairs(config.pairs)
    store = open_store(config.store)
    follow(store, recipe)
    return finished(Path(config.out), _fingerprint(config, recipe, store))


def main(argv: list[str]) -> int:
    """`mclip train`."""
    import tyro

    config = tyro.cli(TrainConfig, args=argv, prog="mclip train", description=__doc__)
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
        f"time went to {shares}\n"
    )
    return 0
