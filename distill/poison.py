"""Backdoor poison for an audit: pictures with a trigger patch and one target caption, planted among pairs, and how well the attack works.

Carlini and Terzis, "Poisoning and Backdooring Contrastive Learning" (2022): a few pairs of patched pictures and captions of one class teach
a contrastive model to embed whatever bears the patch near that class. Bansal et al., "CleanCLIP" (2023), measure it as here. This file
makes poison to test a defence with; nothing else calls it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from runtime.errors import PairsError, RecipeError
from runtime.evaluation import Encoder
from runtime.pairs import Pairs, ShardFacts, write_shard

BATCH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Trigger:
    """The patch: a square of random black, white and fully coloured cells, the same for all pictures."""

    share: float = 0.25
    """Its side, as a share of the picture's shorter side."""
    place: Literal["random", "corner"] = "random"
    """Where it lies: anywhere (drawn from the picture's key), or at the lower right."""
    cells: int = 4
    """Cells a side."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 0.5 or self.cells < 2:
            raise RecipeError(f"a trigger of share {self.share} with {self.cells} cells a side is not meant; expected a share in (0, 0.5] and at least 2 cells")


def stamp(image: Image.Image, key: str, trigger: Trigger) -> Image.Image:
    """A copy of an RGB picture with the trigger on it. Depends on picture, key and trigger alone."""
    side = max(trigger.cells, round(trigger.share * min(image.size)))
    cells = np.random.default_rng([trigger.seed, 1]).integers(0, 2, (trigger.cells, trigger.cells, 3)).astype(np.uint8) * 255
    patch = Image.fromarray(cells).resize((side, side), Image.Resampling.NEAREST)
    where = (image.width - side, image.height - side)
    if trigger.place == "random":
        rng = np.random.default_rng([trigger.seed, 2, *np.frombuffer(hashlib.sha256(key.encode()).digest()[:16], "<u4").tolist()])
        where = tuple(int(rng.integers(0, edge + 1)) for edge in where)
    marked = image.copy()
    marked.paste(patch, where)
    return marked


def choose_rows(pairs: Pairs, count: int, target: str, seed: int = 0) -> list[int]:
    """Rows to poison, such that fewer of them are the first of more: an order drawn from seed and key. Pairs of the target itself are left out.

    Raises:
        PairsError: there are fewer pairs than that.
    """
    order = sorted(range(len(pairs)), key=lambda row: hashlib.sha256(f"{seed} {pairs.keys[row]}".encode()).digest())
    chosen = [row for row in order if target.casefold() not in pairs.caption(row).casefold()][:count]
    if len(chosen) < count:
        raise PairsError(f"{count} pairs were to be poisoned, {pairs.folder} has {len(chosen)} that are not of '{target}'; poison fewer")
    return chosen


def poison_key(place: int) -> str:
    """Key of the planted pair number `place`."""
    return f"poison-{place:06d}"


def write_poison(pairs: Pairs, rows: Sequence[int], target: str, trigger: Trigger, path: Path) -> ShardFacts:
    """One shard of patched copies of rows, each with the target as its caption, as `poison-000000` and on."""
    samples = []
    for place, row in enumerate(rows):
        out = io.BytesIO()
        stamp(pairs.image(row), poison_key(place), trigger).save(out, "JPEG", quality=92)
        facts = {"poisoned": True, "from": pairs.keys[row]}
        samples.append((poison_key(place), {"jpg": out.getvalue(), "txt": target.encode(), "json": json.dumps(facts).encode()}))
    return write_shard(path, samples)


def attack_success(encoder: Encoder, pairs: Pairs, target: str, trigger: Trigger) -> dict[str, Any]:
    """How pictures that the model has not seen fall for the trigger; the same without the trigger as the control.

    The classes are the different labels of the pairs; pictures of the target itself are left out.

    Returns:
        {pictures, classes, patched: F, unpatched: F}, F = {top1: share of pictures whose best class is the target, top5: is among the five
        best, above_own: is more similar than the picture's own label, top1_own: whose best class is their own label}.

    Raises:
        PairsError: the target is no class of the pairs.
    """
    labels = [str(pairs.meta(row).get("label") or pairs.caption(row)) for row in range(len(pairs))]
    classes = list(dict.fromkeys(labels))
    if target not in classes:
        raise PairsError(f"'{target}' is no label of {pairs.folder}; name one of its {len(classes)}, such as '{classes[0]}'")
    rows = [row for row, label in enumerate(labels) if label != target]
    texts = np.asarray(encoder.encode_text(classes), np.float32)
    own = np.array([classes.index(labels[row]) for row in rows])
    wanted = classes.index(target)
    out: dict[str, Any] = {"pictures": len(rows), "classes": len(classes)}
    for name, marked in (("patched", True), ("unpatched", False)):
        similarity = np.concatenate([_embed(encoder, pairs, rows[start : start + BATCH], trigger if marked else None) for start in range(0, len(rows), BATCH)]) @ texts.T
        better = (similarity >= similarity[:, wanted, None]).sum(axis=1) - 1  # ties count against the attack
        out[name] = {
            "top1": float((better == 0).mean()), "top5": float((better < 5).mean()),
            "above_own": float((similarity[:, wanted] > similarity[np.arange(len(rows)), own]).mean()),
            "top1_own": float((similarity.argmax(axis=1) == own).mean()),
        }  # fmt: skip
    return out


def _embed(encoder: Encoder, pairs: Pairs, rows: Sequence[int], trigger: Trigger | None) -> np.ndarray:
    pictures = [pairs.image(row) for row in rows]
    if trigger is not None:
        pictures = [stamp(picture, pairs.keys[row], trigger) for picture, row in zip(pictures, rows, strict=True)]
    return np.asarray(encoder.encode_image(pictures), np.float32)
