"""The settings of a training run, and what of them decides its weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distill.compute import Precision
from distill.recipes import Recipe, load_recipe
from distill.ring import check_ring
from distill.store import Store
from mobileclip.checkpoint import read_config
from mobileclip.config import ModelConfig, config_to_dict
from mobileclip.students import student_config
from runtime.errors import CheckpointError, RecipeError
from runtime.files import file_sha256

VARIATIONS = ("backbone", "image_size", "mask", "vocab_size", "embedding_dim", "embed_dim")
OVERRIDES = ("batch_size", "learning_rate", "caption_mix", "teachers", "logit_scales", "max_augmentations", "ghost_batch")
LATER = ("ghost_batch", "form", "caption_sets", "multi_positive", "gate", "gate_sharpness", "matched_views", "nested_dims")
"""Settings of a recipe that came later: a run that leaves them alone is the run that it was before there were any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Settings of one run."""

    pairs: str = ""
    """Folder of tar shards."""
    store: str = ""
    """Their reinforcement, as `mclip reinforce` wrote it."""
    out: str = ""
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
    backbone_weights: str | None = None
    """Pretrained weights of the image backbone to start from: `timm` (downloaded), `timm:TAG`, or the path of a file with timm's names."""
    samples: int = 250_000
    """Pairs seen, the same one again counted again; captions read alone count as well."""
    seed: int = 0
    threads: int = 1
    """Torch threads. Small models gain more from a second process than from a second thread."""
    save_seconds: float = 30.0
    """At most this much work is lost to a kill."""
    keep_states: int = 1
    """How many of the last saved states of an unfinished run are kept: the one before serves where the last one cannot be read."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, to OUT/tensorboard."""
    validation: str | None = None
    """Pairs folder: retrieval on it is written to the metrics along the way, and OUT/best holds the checkpoint that was best on it. OUT itself is the
    last one: choosing by validation is the caller's decision."""
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
    exchange: Literal["gather", "ring"] = "gather"
    """What several processes know of each other's embeddings: all at once, or a neighbour's share at a time, for very many processes."""
    dry_run: bool = False
    """Train nothing: say shapes, steps and memory, and do one step on random data. Needs neither pairs nor store nor out."""
    nproc: int = 1
    """Processes on this machine that share every batch; the result is that of one, to rounding. For several machines use torchrun."""

    def check_places(self) -> None:
        """Raises RecipeError where a place that a run needs is not named."""
        if missing := [f"--{name}" for name in ("pairs", "store", "out") if not getattr(self, name)]:
            raise RecipeError(f"mclip train needs {', '.join(missing)}; give the pairs, their store and a folder to write, or ask for a --dry-run")

    def resolved_model(self) -> ModelConfig:
        """What is trained: the checkpoint's model, or the preset with its variations."""
        changes = {name: getattr(self, name) for name in VARIATIONS if getattr(self, name) is not None}
        if self.init is None:
            return _of_form(student_config(self.model, **changes), load_recipe(self.recipe))
        starts = [name for name in ("inherit", "backbone_weights") if getattr(self, name) is not None]
        if changes or starts:
            wrong = [f"--{name.replace('_', '-')}" for name in (*changes, *starts)]
            raise RecipeError(f"--init goes on from a finished model and does not go with {', '.join(wrong)}; for another student with its weights, use --inherit alone")
        found, form = read_config(self.init), load_recipe(self.recipe).form
        if (found.logit_bias is not None) != (form == "sigmoid"):
            was = "softmax" if found.logit_bias is None else "sigmoid"
            raise RecipeError(f"'{self.init}' was trained with the {was} loss and the recipe's form is {form}; choose the same form, or begin anew with --inherit")
        return found

    def resolved_recipe(self) -> Recipe:
        recipe = load_recipe(self.recipe)
        changes = {name: getattr(self, name) for name in OVERRIDES if getattr(self, name) is not None}
        recipe, dim = dataclasses.replace(recipe, **changes), self.resolved_model().embed_dim
        if recipe.nested_dims and max(recipe.nested_dims) > dim:
            raise RecipeError(f"the recipe nests {max(recipe.nested_dims)} dimensions, and the model's embed_dim is {dim}; leave that length out, or give --embed-dim")
        if self.exchange == "ring":
            check_ring(recipe)
        return recipe


def _of_form(config: ModelConfig, recipe: Recipe) -> ModelConfig:
    """A sigmoid model begins as SigLIP's does: with so small a probability of a match that the many pairs that are none cost little."""
    return dataclasses.replace(config, logit_scale=10.0, logit_bias=-10.0) if recipe.form == "sigmoid" else config


def fingerprint_of(config: TrainConfig, recipe: Recipe, store: Store) -> str:
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
    if config.backbone_weights is not None:
        path = Path(config.backbone_weights)
        facts["backbone_weights"] = file_sha256(path) if path.is_file() else config.backbone_weights
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
