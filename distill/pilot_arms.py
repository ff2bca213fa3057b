"""One arm of a pilot: a setting, the recipe that it means, a training run a seed, and the student's ranks on the validation pairs.

Every arm reads one store: a setting only says what part of it is followed. Arms of one seed start from the same weights and see the same
pairs in the same order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distill.evaluate import TorchEncoder
from distill.recipes import Recipe
from distill.train import TrainConfig, train
from mobileclip.checkpoint import load_checkpoint, open_tokenizer
from runtime.errors import RecipeError
from runtime.evaluation import Gallery, embed_gallery, retrieval
from runtime.files import write_json
from runtime.pairs import Pairs
from runtime.preprocess import PreprocessConfig, load_image, normalise, resize_and_crop

RESULT = "result.json"
KEPT_PICTURES = 1 << 30
"""Bytes of validation pictures at the student's size that are kept in memory; beyond it they are decoded again for every run."""
_BATCH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """A setting. teachers: names in the store; logit_scales: one each; distillation: λ, the share of the loss weights that the teachers
    get (0: no teacher at all); augmentations: stored views used; captions: share per caption type, () for any stored caption alike."""

    teachers: tuple[str, ...]
    logit_scales: tuple[float, ...]
    distillation: float
    augmentations: int
    captions: tuple[tuple[str, float], ...] = ()

    @property
    def identity(self) -> str:
        """Name of its folder."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self)).encode()).hexdigest()[:12]

    def recipe(self, base: Recipe) -> Recipe:
        """The base recipe with this setting."""
        weighted = weigh(base, self.distillation)
        mix: dict[str, float] = dict(self.captions)
        return dataclasses.replace(
            weighted, teachers=self.teachers, logit_scales=self.logit_scales, max_augmentations=self.augmentations, caption_mix=mix
        )


def distillation_of(recipe: Recipe) -> float:
    """λ: the teachers' share of the recipe's loss weights, rounded to four digits.

    Raises:
        RecipeError: the recipe follows no teacher.
    """
    taught = recipe.affinity + recipe.feature
    if taught <= 0:
        raise RecipeError("the pilot's recipe follows no teacher (affinity and feature are 0); give one that does, such as --recipe reinforced")
    return round(taught / (recipe.contrastive + taught), 4)


def weigh(recipe: Recipe, distillation: float) -> Recipe:
    """The recipe with the teachers' share of the loss weights set to `distillation`, their sum and the proportions among the teachers' losses kept.

    This is λ of MobileCLIP's L = (1 - λ) L_contrastive + λ L_distillation, for a recipe whose distillation has two terms.
    """
    if distillation == distillation_of(recipe):
        return recipe
    total, taught = recipe.contrastive + recipe.affinity + recipe.feature, recipe.affinity + recipe.feature
    share = {name: round(total * distillation * getattr(recipe, name) / taught, 6) for name in ("affinity", "feature")}
    return dataclasses.replace(
        recipe, contrastive=round(total * (1 - distillation), 6), text_samples=recipe.text_samples if distillation else 0, **share
    )


@dataclass(kw_only=True, slots=True)
class Ground:
    """What all arms have in common, and the runs that are done."""

    out: Path
    base: Recipe
    validation: Pairs
    model: str
    samples: int
    first_seed: int
    threads: int
    keep_weights: bool
    _pictures: dict[PreprocessConfig, Gallery | None] = field(default_factory=dict)

    def folder(self, arm: Arm, number: int) -> Path:
        return self.out / "arms" / arm.identity / f"seed-{self.first_seed + number}"

    def result(self, arm: Arm, number: int) -> dict[str, Any] | None:
        """What run `number` (from 0) of an arm gave; None when it has not been made."""
        path = self.folder(arm, number) / RESULT
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def run(self, arm: Arm, number: int) -> dict[str, Any]:
        """Train and evaluate, or read what an earlier call found. A run that was interrupted goes on from its last saved state.

        Returns:
            JSON-ready {"seed", "ranks" ({direction: {split: [of each query]}}), "recalls", "gallery", "cosine", "train_seconds", "evaluate_seconds",
            "core_seconds" (processor time of both, of the last call)}.
        """
        if (found := self.result(arm, number)) is not None:
            return found
        folder = self.folder(arm, number)
        folder.mkdir(parents=True, exist_ok=True)
        recipe = folder.parent / "recipe.json"
        write_json(recipe, dataclasses.asdict(arm.recipe(self.base)))
        write_json(folder.parent / "arm.json", dataclasses.asdict(arm))
        began = time.process_time()
        train(TrainConfig(
            pairs=str(self.out / "pairs"), store=str(self.out / "store"), out=str(folder), recipe=str(recipe), model=self.model, samples=self.samples,
            seed=self.first_seed + number, threads=self.threads,
        ))  # fmt: skip
        started = time.monotonic()
        found = {"seed": self.first_seed + number, **self._evaluate(folder), "cosine": cosine(folder)}
        found["train_seconds"] = json.loads((folder / "receipt.json").read_text(encoding="utf-8"))["figures"]["seconds"]
        found["evaluate_seconds"] = round(time.monotonic() - started, 2)
        found["core_seconds"] = round(time.process_time() - began, 2)
        write_json(folder / RESULT, found)
        if not self.keep_weights:
            (folder / "model.safetensors").unlink()
        return found

    def _evaluate(self, folder: Path) -> dict[str, Any]:
        encoder = TorchEncoder(load_checkpoint(folder), open_tokenizer(folder))
        found = retrieval(encoder, self.validation, gallery=self._gallery(encoder))
        recalls = {
            direction: {split: {name: round(cell["value"], 6) for name, cell in row.items() if name.startswith("recall@")} for split, row in found[direction].items()}
            for direction in ("text_to_image", "image_to_text")
        }
        return {"ranks": found["ranks"], "recalls": recalls, "gallery": found["gallery"]}

    def _gallery(self, encoder: TorchEncoder) -> Gallery:
        if encoder.config not in self._pictures:
            fits = len(self.validation) * encoder.config.image_size**2 * 3 <= KEPT_PICTURES
            self._pictures[encoder.config] = embed_gallery(_Resized(encoder.config), self.validation) if fits else None
        made = self._pictures[encoder.config]
        if made is None:
            return embed_gallery(encoder, self.validation)
        parts = [encoder.encode_pixels(normalise(made.embeddings[n : n + _BATCH], encoder.config)) for n in range(0, len(made.embeddings), _BATCH)]
        return dataclasses.replace(made, embeddings=np.concatenate(parts))


class _Resized:
    """Pictures at the student's size, uint8 (B, S, S, 3), in the place of their embeddings: what every run would otherwise decode again."""

    def __init__(self, config: PreprocessConfig) -> None:
        self.config = config

    def encode_image(self, images: list[Any]) -> np.ndarray:
        return np.stack([np.asarray(resize_and_crop(load_image(image), self.config)) for image in images])

    def encode_text(self, texts: list[str]) -> np.ndarray:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """What decides: recall@k of one direction, over one split of the validation pairs."""

    direction: Literal["text_to_image", "image_to_text"]
    split: str
    k: int

    def hits(self, run: dict[str, Any]) -> np.ndarray:
        """(Q,) booleans of one run: which queries it answered."""
        return np.array(run["ranks"][self.direction][self.split]) <= self.k

    def chance(self, run: dict[str, Any]) -> float:
        """What a blind guess reaches, where each query has one right answer."""
        return min(1.0, self.k / int(run["gallery"]["count" if self.direction == "text_to_image" else "texts"]))


def cosine(folder: Path) -> float | None:
    """Cosine of the student's embeddings with those of its own teachers on the pairs it trained on, mean of the run's last tenth.

    None for a recipe without the feature loss, whose space is not the teachers'. It is reported and decides nothing: a teacher that says
    little is easy to follow.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    known = [1 - line["loss_terms"]["feature"] for line in lines if line["phase"] == "pairs" and "feature" in line["loss_terms"]]
    return round(float(np.mean(known[-max(1, len(known) // 10) :])), 4) if known else None
