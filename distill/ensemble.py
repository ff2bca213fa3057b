"""Teachers by name, and embedding with several of them. No torch here: a teacher may be any callable.

Every call of a teacher has the same number of rows, its micro-batch, whose last rows are padding when there is less to embed: features
differ by 1e-5 between batch sizes, so a fixed size is what makes stored bytes repeatable. A text or view then has one embedding, beside
whatever others it stands.

A teacher is named by one string:

    path/to/checkpoint            a checkpoint folder of ours
    open_clip:NAME[/PRETRAINED]   an open_clip model; without PRETRAINED its weights are random (tests, timing)
    module:function               a callable that returns any object with the attributes of `Teacher`; a parameter `device` is handed on

Shapes: B = batch, S = the teacher's image size, D = its dimension.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from distill.store import TeacherFacts
from distill.store_writing import unit
from runtime.errors import RecipeError, StoreError


@runtime_checkable
class Teacher(Protocol):
    """What reinforcement needs. Both functions return float32 (B, D) of unit norm.

    `facts.micro_batch` rows are handed in at a time (MICRO_BATCH where it is 0). A row that is not finite is that sample's failure alone.
    """

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


def encode_texts(teachers: Sequence[Teacher], texts: Sequence[str], finite: bool = True) -> list[np.ndarray]:
    """Embeddings of texts by every teacher, list of (B, D). Teachers that share a text trunk share its features.

    finite: whether a row that is not finite is an error; else it comes back as it is.
    """
    shared: dict[str, np.ndarray] = {}
    out = []
    for teacher in teachers:
        if isinstance(teacher, SharedText):
            if teacher.text_trunk not in shared:
                shared[teacher.text_trunk] = teacher.text_features(texts)
            found = teacher.project_text(shared[teacher.text_trunk])
        else:
            found = in_micro_batches(lambda chunk, teacher=teacher: teacher.encode_text(chunk), list(texts), micro_batch(teacher), teacher.facts, "texts")  # type: ignore[misc]
        out.append(check_output(teacher, found, len(texts), "texts", finite))
    return out


def encode_views(teachers: Sequence[Teacher], views: dict[int, np.ndarray], finite: bool = True) -> list[np.ndarray]:
    """Embeddings of views by every teacher, list of (B, D). views: per image size a uint8 (B, S, S, 3) array of the same views.

    finite: as for `encode_texts`.
    """
    out = []
    for teacher in teachers:
        mine = views[teacher.image_size]
        found = in_micro_batches(lambda chunk, teacher=teacher: teacher.encode_image(chunk), mine, micro_batch(teacher), teacher.facts, "views")  # type: ignore[misc]
        out.append(check_output(teacher, found, len(mine), "views", finite))
    return out


MICRO_BATCH = 8
"""Rows a call, for teachers that do not say. On a CPU larger ones are no faster: EfficientNet-lite takes up to twice as long with 64."""


def micro_batch(teacher: Teacher) -> int:
    """Rows a call of this teacher."""
    return teacher.facts.micro_batch or MICRO_BATCH


def in_micro_batches(encode: Callable[[Any], Any], rows: Any, size: int, facts: TeacherFacts, what: str) -> np.ndarray:
    """encode(rows) in calls of exactly `size` rows; the last is filled up with copies of its last row. (B, D) float32."""
    out = []
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        count = len(chunk)
        if count < size:
            chunk = np.concatenate([chunk, np.repeat(chunk[-1:], size - count, axis=0)]) if isinstance(chunk, np.ndarray) else [*chunk, *[chunk[-1]] * (size - count)]
        found = np.asarray(encode(chunk), np.float32)
        if found.shape != (size, facts.dim):
            raise _misshapen(facts, found, size, what)
        out.append(found[:count])
    return np.concatenate(out) if out else np.zeros((0, facts.dim), np.float32)


def check_output(teacher: Teacher, values: Any, count: int, what: str, finite: bool = True) -> np.ndarray:
    """float32 (count, D), unit norm, and finite unless that is not asked. Raises StoreError for anything else that a foreign teacher returns."""
    values = np.asarray(values, np.float32)
    if values.shape != (count, teacher.facts.dim) or (finite and not np.isfinite(values).all()):
        raise _misshapen(teacher.facts, values, count, what)
    whole = np.isfinite(values).all(axis=1, keepdims=True)
    return np.where(whole, unit(np.where(whole, values, 0)), np.float32(np.nan))


def _misshapen(facts: TeacherFacts, values: np.ndarray, count: int, what: str) -> StoreError:
    found = f"teacher '{facts.name}' returned {values.shape} for {count} {what}, finite: {bool(np.isfinite(values).all())}"
    return StoreError(f"{found}; expected finite ({count}, {facts.dim})")


def probe(teacher: Teacher) -> None:
    """Ask a teacher for one plain picture and one plain text. Raises StoreError when the answer is not finite or of another shape."""
    grey = np.full((1, teacher.image_size, teacher.image_size, 3), 127, np.uint8)
    encode_views([teacher], {teacher.image_size: grey})
    encode_texts([teacher], ["a photo"])


def open_teacher(spec: str, device: str = "cpu") -> Teacher:
    """A teacher by its string (see the top of this module). device: "cpu", "cuda", "cuda:1" …, or "auto": the GPU where there is one.

    Raises:
        RecipeError: the string fits none of the three forms, or the callable does not return a teacher.
        CheckpointError: a checkpoint or an open_clip name that cannot be loaded.
    """
    if spec.startswith("open_clip:"):
        name, _, pretrained = spec.removeprefix("open_clip:").partition("/")
        from distill.teachers import open_open_clip

        return open_open_clip(name, pretrained or None, device)
    if Path(spec).is_dir():
        from distill.teachers import open_checkpoint

        return open_checkpoint(Path(spec), device)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", spec):
        return _callable(spec, device)
    raise RecipeError(f"teacher '{spec}' is no checkpoint folder, no open_clip:NAME[/PRETRAINED] and no module:function; give one of the three")


def _callable(spec: str, device: str) -> Teacher:
    module_name, _, function_name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"teacher '{spec}' cannot be imported ({error}); expected module:function on the Python path") from error
    takes_device = "device" in getattr(inspect.signature(function), "parameters", {}) if callable(function) else False
    teacher = function(device=device) if takes_device else function()
    if not isinstance(teacher, Teacher) or not isinstance(teacher.facts, TeacherFacts):
        raise RecipeError(f"teacher '{spec}' returned {type(teacher).__name__}, which lacks facts (TeacherFacts), image_size, encode_image or encode_text")
    return teacher
