"""What a converter is given and what it gives back: the contract of every `to_*.py`.

A converter module has

    PRECISIONS      the precisions that it makes, the order of the manifest
    EXTRA           the extra that installs what it needs
    require()       raises MissingExtraError where that is not installed
    drafts(job, precisions)     yields one `Draft` for every artefact that it wrote below `job.folder`
    finish(bundle, manifest, model, settings)   may be absent: writes what belongs to the target's artefacts together, after they were judged and golden/
                                was written; returns further artefacts, which it has shown to be the same as judged ones

and it judges nothing: `artefacts` compares every draft with the checkpoint, times those that this machine can run as a user would, and decides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch

from export.towers import Encoder, Samples, Tower, encoder_of, fold_norms
from runtime.preprocess import PreprocessConfig

if TYPE_CHECKING:
    from export.int8_recipe import Int8Recipe

Run = Callable[[np.ndarray], np.ndarray]
"""Inputs of any number of rows (N, …) to embeddings (N, embed_dim) float32, unit norm."""

@dataclass(frozen=True, kw_only=True)
class Job:
    """One tower to convert.

    Attributes:
        model: an `ImageTextModel`, reparameterised, in eval mode.
        calibration: rows that ranges of activations may be taken from; never those that judge the result.
        folder: the bundle under construction; a converter writes below `folder / target`.
        say: takes one line of progress.
        convert: the target's own settings from `ExportConfig`, for instance the Core ML deployment target.
        recipe: how int8 is made, where precision.json says so.
        made: what converters keep of one precision for the next.
    """

    model: Any
    tower: Tower
    calibration: Samples
    folder: Path
    say: Callable[[str], None] = lambda line: None
    convert: dict[str, Any] = field(default_factory=dict)
    recipe: Int8Recipe | None = None
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> np.ndarray:
        """(C, …) calibration inputs of this tower: pixels float32 (C, 3, H, W) or tokens int32 (C, T)."""
        return self.calibration.inputs(self.tower)

    @property
    def preprocessing(self) -> PreprocessConfig:
        """How pictures become this model's pixels."""
        from mobileclip.checkpoint import preprocess_config

        return preprocess_config(self.model.config)

    def encoder(self, **options: bool) -> Encoder:
        """The tower with its L2 norm as a module; options as of `towers.Encoder`."""
        return encoder_of(self.model, self.tower, **options)

    @functools.cached_property
    def onnx_int8(self) -> onnx.ModelProto:
        """The graph of `onnx` as of the recipe, or else of `quantize_tower`. Not to be changed in place."""
        from export.int8_recipe import make_int8
        from export.quantize import quantize_tower

        return quantize_tower(self.onnx, self.rows) if self.recipe is None else make_int8(self.onnx, self.rows, self.recipe)

    @functools.cached_property
    def onnx_int4(self) -> onnx.ModelProto:
        """The graph of `onnx` with weights in four bits. Raises ParityError where it has next to no weights of matrix products."""
        from export.quantize import quantize_four_bit

        return quantize_four_bit(self.onnx)

    def half_encoder(self) -> Encoder:
        """The tower in float16 between explicit casts, batch norms folded before anything is rounded, layer norms and the L2 norm in float32."""
        tower = self.encoder().tower
        if self.tower == "image":
            tower = fold_norms(tower, torch.from_numpy(self.rows[:2]))
        return Encoder(tower, self.tower, half=True)

    @functools.cached_property
    def onnx(self) -> onnx.ModelProto:
        """The float32 graph of dynamic batch, made once for all targets that start from ONNX. Not to be changed in place."""
        from export.to_onnx import export_onnx

        return export_onnx(self.encoder(), self.rows)

    @functools.cached_property
    def onnx_half(self) -> onnx.ModelProto:
        """The graph of `half_encoder`, dynamic batch. Not to be changed in place."""
        from export.to_onnx import check_squares, export_onnx

        model = export_onnx(self.half_encoder(), self.rows)
        check_squares(model)
        return model


@dataclass(kw_only=True)
class Draft:
    """An artefact before it is judged.

    Attributes:
        batch: "dynamic", or the fixed batch size as a string.
        path: file or package folder, relative to the bundle.
        run: evaluates what lies on disk, in the runtime that `how` names; None where nothing here can (then `how` says so).
        how: by what it was evaluated, one clause ("ONNX Runtime 1.31.1 on the CPU").
        variant: told apart in the id from another of the same precision ("static").
        timed: whether `run` is this artefact's own runtime at the user's settings, so that its time here means something.
        any_length: a text graph that takes rows of fewer tokens; `run` then gives it what rows hold, and `run.whole` the padding too.
        most_rows: evaluate no more rows than this (an interpreter is slow); None: all.
        facts: what the manifest keeps beside the parity: layers, partitions, sizes, what a build said.
        problem: why there is no file: what the converter said.
    """

    tower: Tower
    target: str
    precision: str
    path: str
    run: Run | None
    how: str
    batch: str = "1"
    variant: str = ""
    timed: bool = False
    any_length: bool = False
    most_rows: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None

    @property
    def id(self) -> str:
        return "-".join(part for part in (self.tower, self.target, self.precision, self.variant) if part)
