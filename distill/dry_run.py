"""`mclip train --dry-run`: what a run would be, before any data is there or any GPU is paid for.

    mclip train --dry-run --recipe datacompdr_s --model mobileclip_s2 --samples 245760000 --nproc 32 --precision bf16

It builds the model, says shapes, steps and memory of one process, and does one real step on random data: forward, losses, backward, optimiser. Memory
is counted, not guessed: the bytes that autograd keeps for a micro-batch of two sizes give what a sample costs.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from distill.compute import Compute, checkpoint_blocks, device_of
from distill.dataset import Batch
from distill.ghost_norm import ghost_batches
from distill.recipes import Recipe
from distill.schedule import Plan
from distill.store import open_store
from distill.train_config import TrainConfig
from distill.training_state import start
from distill.training_step import Followed, Guide, training_step, update
from mobileclip.model import ImageTextModel, count_parameters
from mobileclip.models import create_model
from runtime.errors import TrainingError

TEACHER_DIMS = (768, 768)
"""Of DataCompDR's two teachers, where no store says otherwise."""
FEW = 2
"""Samples of the smaller micro-batch that memory is counted on; the real step has twice as many."""


def dry_run(config: TrainConfig, world: int = 1) -> dict[str, Any]:
    """JSON-ready facts of the run that `config` describes, in `world` processes.

    Raises:
        RecipeError, CheckpointError, StoreError: what `train` would refuse. TrainingError: the step gave no finite loss.
    """
    recipe = config.resolved_recipe()
    plan = Plan.of(config.samples, recipe)
    pieces = ghost_batches(recipe.batch_size, recipe.ghost_batch, 0, world)
    dims, scales = TEACHER_DIMS, (100.0, 100.0)
    if config.store:
        store = open_store(config.store)
        dims, scales = tuple(facts.dim for facts in store.teachers), tuple(facts.logit_scale for facts in store.teachers)
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads)
    compute = Compute(device=device_of(config.device), precision=config.precision, grad_checkpointing=config.grad_checkpointing)
    model = create_model(config.resolved_model()).to(compute.device).train()
    if config.grad_checkpointing:
        checkpoint_blocks(model)
    piece = pieces[0][1].stop
    kept = {tower: _per_sample(model, compute, tower) for tower in ("image", "text")}
    loss, seconds = _one_step(model, recipe, compute, dims, scales)
    parameters = count_parameters(model)
    sets = plan.sets
    memory = {
        "weights": 4 * parameters["total"], "gradients": 4 * parameters["total"], "optimizer": 8 * parameters["total"], "average": 4 * parameters["total"],
        "activations": piece * (kept["image"] + sets * kept["text"]), **_of_the_whole_batch(recipe, model, dims, world, sets, config.exchange),
    }  # fmt: skip
    text = model.config.text
    return {
        "model": model.config.name, "parameters": parameters, "processes": world,
        "steps": plan.steps, "text_steps": plan.text_steps, "samples": plan.samples(plan.steps), "warmup_steps": max(1, round(recipe.warmup * plan.steps)),
        "batch_size": recipe.batch_size, "batch_of_a_process": recipe.batch_size // world, "ghost_batch": piece, "ghost_batches_of_a_process": len(pieces),
        "shapes": {
            "pixels": [piece, 3, model.config.image.image_size, model.config.image.image_size], "tokens": [sets * piece, text.context_length],
            "embeddings": [recipe.batch_size, model.config.embed_dim], "teachers": [[recipe.batch_size, dim] for dim in dims] if recipe.reinforced else [],
        },
        "memory_bytes": memory, "memory_gib": round(sum(memory.values()) / 2**30, 2),
        "activation_bytes_a_sample": {tower: round(value) for tower, value in kept.items()},
        "one_step": {"samples": 2 * FEW, "loss": round(loss, 4), "seconds": round(seconds, 2), "device": str(compute.device), "precision": config.precision},
    }  # fmt: skip


def _per_sample(model: ImageTextModel, compute: Compute, tower: str) -> float:
    """Bytes that autograd keeps for a sample: the slope between two sizes, so that what does not grow (weights) is left out."""
    kept = []
    for size in (FEW, 2 * FEW):
        pixels, tokens = _random(model, size)
        run: Callable[[], torch.Tensor] = (lambda x=pixels: compute.encode_image(model, x)) if tower == "image" else (lambda x=tokens: compute.encode_text(model, x))
        seen: dict[int, int] = {}

        def note(tensor: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with compute.step(model), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            result = run()
        kept.append(sum(seen.values()))
        del result
    return max(0.0, (kept[1] - kept[0]) / FEW)


def _of_the_whole_batch(recipe: Recipe, model: ImageTextModel, dims: tuple[int, ...], world: int, sets: int, exchange: str) -> dict[str, int]:
    """What the loss holds: embeddings of student and teachers, and matrices of similarities with their softmax and gradient."""
    rows = recipe.batch_size // world if exchange == "ring" and world > 1 else recipe.batch_size
    width = 2 * model.config.embed_dim + (sum(dims) if recipe.reinforced else 0)
    matrices = (1 + (len(dims) if recipe.affinity else 0)) * 3
    return {"embeddings": 4 * rows * (1 + sets) * width, "similarities": 4 * rows * rows * matrices}


def _random(model: ImageTextModel, size: int) -> tuple[np.ndarray, np.ndarray]:
    generator, image, text = np.random.default_rng(size), model.config.image, model.config.text
    pixels = generator.standard_normal((size, 3, image.image_size, image.image_size)).astype(np.float32)
    tokens = generator.integers(1, text.vocab_size - 2, (size, text.context_length)).astype(np.int32)
    tokens[:, -1] = text.vocab_size - 1  # the end of the text is the largest id: full length, the most that a text can cost
    return pixels, tokens


def _one_step(model: ImageTextModel, recipe: Recipe, compute: Compute, dims: tuple[int, ...], scales: tuple[float, ...]) -> tuple[float, float]:
    """(loss, seconds) of one step of 2 * FEW samples in ghost batches of FEW, as the recipe asks for it."""
    size, sets = 2 * FEW, max(1, len(recipe.caption_sets))
    small = dataclasses.replace(recipe, batch_size=size, ghost_batch=FEW if recipe.ghost_batch else 0, text_samples=0)
    pixels, _ = _random(model, size)
    _, tokens = _random(model, sets * size)
    generator = np.random.default_rng(0)

    def unit(rows: int) -> tuple[np.ndarray, ...]:
        found = [generator.standard_normal((rows, dim)).astype(np.float32) for dim in dims]
        return tuple(vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in found)

    images, texts = (unit(size), unit(sets * size)) if recipe.reinforced else ((), ())
    numbers = np.arange(size)
    batch = Batch(
        rows=numbers, augs=numbers, captions=np.zeros((size, sets), np.int64) if sets > 1 else np.zeros(size, np.int64), pixels=pixels, tokens=tokens,
        same=np.arange(sets * size), teacher_images=images, teacher_texts=texts, texts=np.arange(sets * size),
    )  # fmt: skip
    run = start(model, small)
    basis = torch.nn.functional.normalize(torch.randn(sum(dims), model.config.embed_dim), dim=0).to(compute.device) if recipe.feature or recipe.text_samples else None
    guide = Guide(followed=Followed(numbers=tuple(range(len(dims))), logit_scales=scales), basis=basis, typical=(0.2,) * len(dims), compute=compute)
    before = model.logit_scale.detach().clone()
    began = time.monotonic()
    plan = Plan(text_steps=0, steps=1, batch_size=size, sets=sets)
    terms = training_step(run, plan, small, batch, guide)
    update(run, plan, small)
    seconds = time.monotonic() - began
    loss = sum(getattr(small, name) * float(value) for name, value in terms.items())
    if not math.isfinite(loss) or not all(bool(torch.isfinite(p).all()) for p in model.parameters()) or bool(before == model.logit_scale.detach()):
        raise TrainingError(f"the step on random data gave the loss {loss} and did not move the model as it should; please report this with the recipe")
    return loss, seconds


def format_dry_run(facts: dict[str, Any]) -> str:
    """Lines for a person."""
    shapes, memory, step = facts["shapes"], facts["memory_bytes"], facts["one_step"]
    gib = "  ".join(f"{name} {value / 2**30:.2f}" for name, value in memory.items())
    lines = [
        f"{facts['model']}: {facts['parameters']['total']:,} parameters ({facts['parameters']['image']:,} image, {facts['parameters']['text']:,} text)",
        f"{facts['steps']:,} steps of {facts['batch_size']:,} ({facts['text_steps']:,} on texts alone), {facts['samples']:,} samples, warm-up {facts['warmup_steps']:,} steps",
        f"{facts['processes']} process{'es' * (facts['processes'] > 1)} of {facts['batch_of_a_process']:,} samples, "
        f"{facts['ghost_batches_of_a_process']} ghost batch{'es' * (facts['ghost_batches_of_a_process'] > 1)} of {facts['ghost_batch']:,} each",
        f"shapes: pixels {shapes['pixels']}, tokens {shapes['tokens']}, embeddings {shapes['embeddings']}, teachers {shapes['teachers']}",
        f"memory of one process, GiB: {gib}; together {facts['memory_gib']:.2f}, without the framework's own",
        f"one step of {step['samples']} random samples on {step['device']} in {step['precision']}: loss {step['loss']}, {step['seconds']} s",
    ]
    return "\n".join(lines) + "\n"
