"""Named training recipes. A recipe is a function that returns the settings of a run; the command that runs it is its first line."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from distill.caption_sampling import check_mix, check_sets
from runtime.errors import RecipeError

Gate = Literal["none", "teacher", "own"]
Form = Literal["softmax", "sigmoid"]
GATES: tuple[str, ...] = get_args(Gate)
FORMS: tuple[str, ...] = get_args(Form)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a student learns. Loss weights multiply the losses of `distill.losses`; a weight of 0 leaves the loss uncomputed."""

    batch_size: int = 128
    learning_rate: float = 2e-3
    """Peak, reached after the warm-up, falling to zero along a cosine."""
    warmup: float = 0.05
    """Share of the steps."""
    weight_decay: float = 0.1
    """On matrices and kernels only."""
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0
    """Gradients are scaled down to at most this norm."""
    ema_decay: float = 0.998
    """Of the weights that are kept; ramps up from (1 + step) / (10 + step)."""
    contrastive: float = 1.0
    affinity: float = 0.0
    feature: float = 0.0
    caption_mix: dict[str, float] = field(default_factory=lambda: {"raw": 1.0})
    """Share of each type of stored captions, as weights; a sample that lacks a type divides its share among the others. Empty: any caption alike."""
    teachers: tuple[str, ...] = ()
    """Names of the store's teachers to follow; empty: all."""
    logit_scales: tuple[float, ...] = ()
    """Multiplicative, one per followed teacher, instead of the store's."""
    max_augmentations: int = 0
    """Draw from the first so many stored views of a picture; 0: from all."""
    shuffle_shards: int = 0
    """Shards whose samples are shuffled together, so that a reader touches so many at a time; 0: all."""
    text_samples: int = 0
    """Captions seen by the text tower alone, before the pairs: it learns the teachers' text embeddings (no pictures). They count as samples, and are at most a tenth of them."""
    ghost_batch: int = 0
    """Samples that go through the towers together: BatchNorm's statistics are theirs, and memory is needed for so many. The gradient is that of the
    whole batch (distill/accumulation.py). 0: all samples of a process together."""
    form: Form = "softmax"
    """Of the contrastive and the affinity loss: rows of the batch against each other, or each of its pairs alone with a bias (SigLIP). A student of
    random weights gets a bias for it; one that goes on from a checkpoint must have been trained so."""
    caption_sets: tuple[str, ...] = ()
    """Types of caption of which every picture of a batch shows one each, instead of one drawn by `caption_mix`: ("raw", "synthetic") makes MobileCLIP's
    real and synthetic batch of the same pictures. The loss is the mean over the sets."""
    multi_positive: bool = False
    """The contrastive loss takes all of a picture's captions as its matches at once, instead of set by set."""
    gate: Gate = "none"
    """Who says how much a pair counts in the contrastive loss: nobody, the teachers' stored embeddings (ALIP), or the student's own, which needs none."""
    gate_sharpness: float = 2.0
    """How fast the weight falls with the similarity below the typical one: exp(gate_sharpness * difference)."""
    matched_views: bool = True
    """False is a control, not a way to train: the teachers' embedding is that of another stored view of the picture than the student sees, as where a
    pipeline stores embeddings and lets the student draw an augmentation of its own."""
    nested_dims: tuple[int, ...] = ()
    """Lengths that the embeddings may be cut to afterwards: every loss is the mean over them (Matryoshka). Empty: the whole length alone."""

    def __post_init__(self) -> None:
        if self.batch_size < 2 or not 0 < self.learning_rate < 1 or not 0 <= self.warmup < 1 or not 0 <= self.ema_decay < 1:
            raise RecipeError(
                f"recipe has batch_size {self.batch_size}, learning_rate {self.learning_rate}, warmup {self.warmup}, ema_decay {self.ema_decay}; "
                "expected batch_size at least 2, learning_rate above 0, the last two at least 0, and all three below 1"
            )
        if min(self.contrastive, self.affinity, self.feature) < 0 or self.contrastive + self.affinity + self.feature == 0:
            raise RecipeError("a recipe's loss weights must not be negative, and one of contrastive, affinity and feature must be above 0")

        check_mix(self.caption_mix)
        if not all(isinstance(name, str) for name in self.teachers) or len(set(self.teachers)) != len(self.teachers) or isinstance(self.teachers, str):
            raise RecipeError(f"a recipe's teachers are different names, found {self.teachers!r}")
        if not all(isinstance(scale, (int, float)) and 0 < scale < math.inf for scale in self.logit_scales):
            raise RecipeError(f"a recipe's logit_scales are finite numbers above 0, found {self.logit_scales}")
        if self.teachers and self.logit_scales and len(self.teachers) != len(self.logit_scales):
            raise RecipeError(f"a recipe's logit_scales need one number per teacher, found {len(self.logit_scales)} for {', '.join(self.teachers)}")
        if self.max_augmentations < 0 or self.shuffle_shards < 0:
            raise RecipeError(f"a recipe's max_augmentations and shuffle_shards are at least 0, found {self.max_augmentations} and {self.shuffle_shards}")

        if self.ghost_batch and (self.ghost_batch < 2 or self.batch_size % self.ghost_batch):
            raise RecipeError(f"a recipe's ghost_batch of {self.ghost_batch} does not divide its batch_size of {self.batch_size}; choose a divisor of at least 2, or 0")

        if self.gate not in GATES or not 0 < self.gate_sharpness < math.inf:
            raise RecipeError(f"a recipe's gate is one of {', '.join(GATES)} and its gate_sharpness above 0, found '{self.gate}' and {self.gate_sharpness}")
        if self.form not in FORMS:
            raise RecipeError(f"a recipe's form is one of {', '.join(FORMS)}, found '{self.form}'")
        check_sets(self.caption_sets)
        if self.multi_positive and (len(self.caption_sets) < 2 or self.form != "softmax" or self.gate != "none"):
            raise RecipeError("a recipe's multi_positive needs at least two caption_sets, the softmax form and no gate")
        if not all(isinstance(dim, int) and dim >= 1 for dim in self.nested_dims) or sorted(set(self.nested_dims)) != list(self.nested_dims):
            raise RecipeError(f"a recipe's nested_dims are different lengths in rising order, found {self.nested_dims}")

    @property
    def reinforced(self) -> bool:
        """True when the recipe reads teachers' embeddings."""
        return self.affinity > 0 or self.feature > 0 or self.text_samples > 0 or self.gate == "teacher"


def plain() -> Recipe:
    """mclip train --pairs P --store S --out CKPT --recipe plain

    No knowledge but the pairs themselves: the contrastive loss on the pair's own caption, as CLIP is trained.
    """
    return Recipe(batch_size=128, learning_rate=1e-3)


def reinforced() -> Recipe:
    """mclip train --pairs P --store S --out CKPT --recipe reinforced

    The stored ensemble does the teaching: features first, affinities and contrast beside them, all stored captions.
    """
    return Recipe(batch_size=64, learning_rate=2e-3, contrastive=0.1, affinity=1.0, feature=8.0, caption_mix={}, text_samples=20_000)


def recovery() -> Recipe:
    """mclip compress CKPT OUT ... uses this after pruning: the reinforced losses, gently, without the text-only start."""
    return dataclasses.replace(reinforced(), learning_rate=1e-3, text_samples=0)


def narrowed() -> Recipe:
    """mclip compress CKPT OUT --prune-latency 0.5 uses this: as much is gone that the rest has to learn again, at the rate of a student from random weights.

    On the demo's student, halved, 250,000 samples at this rate gave a recall@5 of 0.203 on the validation style, and 0.187 at a quarter of it.
    """
    return dataclasses.replace(recovery(), learning_rate=2e-3)


def datacompdr_s() -> Recipe:
    """torchrun … -m mobileclip.cli train --pairs P --store S --out CKPT --recipe datacompdr_s --model mobileclip_s2 --samples 245760000 --precision bf16

    MobileCLIP's S models on DataCompDR-12M as published (30,000 steps of 8,192; lambda 1: affinity alone, over a real and a synthetic batch of the same
    pictures; ghost batches are the 256 samples of one of 32 GPUs). Their sum over the two batches is a mean here, which Adam does not see.
    """
    return Recipe(
        batch_size=8192, learning_rate=1e-3, warmup=1000 / 30_000, weight_decay=0.2, betas=(0.9, 0.95), ema_decay=0.9995, contrastive=0.0, affinity=1.0,
        caption_sets=("raw", "synthetic"), ghost_batch=256, shuffle_shards=64,
    )  # fmt: skip


def datacompdr_b() -> Recipe:
    """As `datacompdr_s`, with --model mobileclip_b: lambda 0.75, a quarter of the loss is contrastive."""
    return dataclasses.replace(datacompdr_s(), contrastive=0.25, affinity=0.75)


def finetune() -> Recipe:
    """mclip train --init CKPT --pairs DOMAIN --store DOMAIN-STORE --out TUNED --recipe finetune, where CKPT itself reinforced DOMAIN-STORE

    A finished model learns a domain and is held to what it knew: the affinities that it had itself on the domain's pairs. Then
    `mclip average CKPT TUNED OUT` (docs/guides/finetuning.md).
    """
    return Recipe(batch_size=64, learning_rate=2e-4, contrastive=1.0, affinity=1.0, caption_mix={"raw": 1.0}, ema_decay=0.99)


RECIPES: dict[str, Callable[[], Recipe]] = {
    "plain": plain, "reinforced": reinforced, "recovery": recovery, "narrowed": narrowed, "datacompdr_s": datacompdr_s, "datacompdr_b": datacompdr_b, "finetune": finetune
}  # fmt: skip


def load_recipe(name: str) -> Recipe:
    """A recipe by name, or from a JSON file with the fields of `Recipe` (those left out keep their defaults).

    Raises:
        RecipeError: no such name or file, or a field that a recipe does not have.
    """
    if name in RECIPES:
        return RECIPES[name]()
    path = Path(name)
    if path.suffix != ".json":
        raise RecipeError(f"unknown recipe '{name}'; known are {', '.join(RECIPES)}, or give the path of a .json file")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"recipe file '{name}' cannot be read: {error}") from None
    known = {field.name for field in dataclasses.fields(Recipe)}
    if not isinstance(data, dict) or set(data) - known:
        wrong = sorted(set(data) - known) if isinstance(data, dict) else "no object"
        raise RecipeError(f"recipe file '{name}' has {wrong}; a recipe is a JSON object with the fields {', '.join(sorted(known))}")
    try:
        return Recipe(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})
    except TypeError as error:
        raise RecipeError(f"recipe file '{name}' has a value of the wrong type: {error}") from None
