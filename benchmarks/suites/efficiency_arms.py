"""The arms of the learning-efficiency experiment: what differs between students, and nothing else does.

All arms have the same architecture, number of samples, schedule shape and start from random weights. Batch size and learning rate are tuned for
two families, each on the same grid with the same number of runs: arms of the plain family are trained by the pairs alone, arms of the
reinforced family by the teachers' embeddings besides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from distill.recipes import Recipe, plain, reinforced

Family = Literal["plain", "reinforced"]
FAMILIES: dict[Family, Callable[[], Recipe]] = {"plain": plain, "reinforced": reinforced}
RAW, BOTH = {"raw": 1.0}, {"raw": 1.0, "synthetic": 1.0}
GRID: tuple[tuple[int, float], ...] = ((64, 1e-3), (64, 2e-3), (128, 1e-3), (128, 2e-3))
"""Batch sizes and learning rates that both families try, at each of the two tuning budgets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to train a student. world: the pairs and their store; store: which of the world's; keep: which keep-list."""

    title: str
    family: Family
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    world: str = "web50"
    store: Literal["strong", "weak"] = "strong"
    keep: Literal["", "right"] = ""

    def recipe(self, setting: tuple[int, float]) -> Recipe:
        """The recipe at a batch size and learning rate."""
        return dataclasses.replace(FAMILIES[self.family](), batch_size=setting[0], learning_rate=setting[1], **self.changes)


ONE_TEACHER = ("lite0",)

ARMS: dict[str, Arm] = {
    "plain": Arm(title="plain CLIP", family="plain", changes={"caption_mix": RAW}),
    "reinforced": Arm(title="reinforced", family="reinforced", changes={"caption_mix": BOTH}),
    # from plain to reinforced, one thing at a time
    "plain_weak": Arm(title="plain CLIP, weak augmentation", family="plain", changes={"caption_mix": RAW}, store="weak"),
    "captions": Arm(title="+ synthetic captions", family="plain", changes={"caption_mix": BOTH}, store="weak"),
    "distillation": Arm(title="+ distillation from one teacher", family="reinforced", changes={"caption_mix": BOTH, "teachers": ONE_TEACHER}, store="weak"),
    "augmentation": Arm(title="+ strong augmentation, matched", family="reinforced", changes={"caption_mix": BOTH, "teachers": ONE_TEACHER}),
    # + two teachers is "reinforced"
    "unmatched": Arm(title="control: augmentation not matched", family="reinforced", changes={"caption_mix": BOTH, "matched_views": False}),
    # what plain training can do without teachers, or with captions that it does not have
    "gated": Arm(title="plain with a noise gate of its own", family="plain", changes={"caption_mix": RAW, "gate": "own", "gate_sharpness": 4.0}),
    "right_half": Arm(title="plain on the right half only (an oracle's choice)", family="plain", changes={"caption_mix": RAW}, keep="right"),
    "clean": Arm(title="plain on clean captions (an oracle's captions)", family="plain", changes={"caption_mix": RAW}, world="web0"),
    # other shares of noise
    "reinforced_0": Arm(title="reinforced, no noise", family="reinforced", changes={"caption_mix": BOTH}, world="web0"),
    "plain_25": Arm(title="plain CLIP, a quarter wrong", family="plain", changes={"caption_mix": RAW}, world="web25"),
    "reinforced_25": Arm(title="reinforced, a quarter wrong", family="reinforced", changes={"caption_mix": BOTH}, world="web25"),
    # teachers of clean pretraining on other concepts and another style than the students' pairs
    "plain_apart": Arm(title="plain CLIP, half of the concepts, two styles", family="plain", changes={"caption_mix": RAW}, world="apart"),
    "reinforced_apart": Arm(title="reinforced by teachers of clean pretraining on disjoint concepts and styles", family="reinforced", changes={"caption_mix": RAW}, world="apart"),
    # planted harm, on clean captions otherwise
    "shuffled_10": Arm(title="plain, 10 % of clean captions shuffled", family="plain", changes={"caption_mix": RAW}, world="shuffled10"),
    "shuffled_50": Arm(title="plain, 50 % of clean captions shuffled", family="plain", changes={"caption_mix": RAW}, world="shuffled50"),
    "nested": Arm(title="reinforced, 512 dimensions, nested", family="reinforced", changes={"caption_mix": BOTH, "nested_dims": (64, 128, 256, 512)}),
}  # fmt: skip

LADDER = ("plain_weak", "captions", "distillation", "augmentation", "reinforced")
"""Each adds one thing to the one before it."""
