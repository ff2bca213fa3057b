"""Teachers by name, and embedding with several of them. No torch here: a teacher may be any callable.

A teacher is named by one string:

    path/to/checkpoint            a checkpoint folder of ours
    open_clip:NAME[/PRETRAINED]   an open_clip model; without PRETRAINED its weights are random (tests, timing)
    module:function               a callable without arguments that returns any object with the attributes of `Teacher`

Shapes: B = batch, S = the teacher's image size, D = its dimension.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from distill.store import TeacherFacts
from distill.store_writing import unit
from runtime.errors import RecipeError, StoreError


@runtime_checkable
class Teacher(Protocol):
    """What reinforcement needs. Both functions return float32 (B, D) of unit norm."""

    facts: TeacherFacts
    image_size: int

    def encode_image(self, images: np.ndarray | Sequence[Image.Image]) -> np.ndarray:
        """images: uint8 (B, S, S, 3) views of exactly the teacher's size, or pictures of any size (resized and cropped)."""

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """texts: any strings."""


@runtime_checkable
class SharedText(Protocol):
    """A teacher whose text tower is a trunk and a projection. Equal `text_trunk` means equal features, computed once."""

    text_trunk: str

    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """(B, width) float32."""

    def project_text(self, features: np.ndarray) -> np.ndarray:
        """(B, width) -> (B, D) float32, unit norm."""


def encode_texts(teachers: Sequence[Teacher], texts: Sequence[str]) -> list[np.ndarray]:
    """Embeddings of texts by every teacher, list of (B, D). Teachers that share a text trunk share its features."""
    shared: dict[str, np.ndarray] = {}
    out = []
    for teacher in teachers:
        if isinstance(teacher, SharedText):
            if teacher.text_trunk not in shared:
                shared[teacher.text_trunk] = teacher.text_features(texts)
            out.append(teacher.project_text(shared[teacher.text_trunk]))
        else:
            out.append(check_output(teacher, teacher.encode_text(texts), len(texts), "texts"))
    return out


def encode_views(teachers: Sequence[Teacher], views: dict[int, np.ndarray]) -> list[np.ndarray]:
    """Embeddings of views by every teacher, list of (B, D). views: per image size a uint8 (B, S, S, 3) array of the same views."""
    return [check_output(teacher, teacher.encode_image(views[teacher.image_size]), len(views[teacher.image_size]), "views") for teacher in teachers]


def check_output(teacher: Teacher, values: Any, count: int, what: str) -> np.ndarray:
    """float32 (count, D), finite, unit norm. Raises StoreError for anything else that a foreign teacher returns."""
    values = np.asarray(values, np.float32)
    if values.shape != (count, teacher.facts.dim) or not np.isfinite(values).all():
        raise StoreError(
            f"teacher '{teacher.facts.name}' returned {values.shape} for {count} {what}, finite: {bool(np.isfinite(values).all())}; expected finite ({count}, {teacher.facts.dim})"
        )
    return unit(values)


def open_teacher(spec: str) -> Teacher:
    """A teacher by its string (see the top of this module).

    Raises:
        RecipeError: the string fits none of the three forms, or the callable does not return a teacher.
        CheckpointError: a checkpoint or an open_clip name that cannot be loaded.
    """
    if spec.startswith("open_clip:"):
        name, _, pretrained = spec.removeprefix("open_clip:").partition("/")
        from distill.teachers import open_open_clip

        return open_open_clip(name, pretrained or None)
    if Path(spec).is_dir():
        from distill.teachers import open_checkpoint

        return open_checkpoint(Path(spec))
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", spec):
        return _callable(spec)
    raise RecipeError(f"teacher '{spec}' is no checkpoint folder, no open_clip:NAME[/PRETRAINED] and no module:function; give one of the three")


def _callable(spec: str) -> Teacher:
    module_name, _, function_name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"teacher '{spec}' cannot be imported ({error}); expected module:function on the Python path") from error
    teacher = function()
    if not isinstance(teacher, Teacher) or not isinstance(teacher.facts, TeacherFacts):
        raise RecipeError(f"teacher '{spec}' returned {type(teacher).__name__}, which lacks facts (TeacherFacts), image_size, encode_image or encode_text")
    return teacher
