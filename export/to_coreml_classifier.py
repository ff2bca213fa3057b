"""Core ML image classifiers: a picture in, the names of classes out, whose texts are embedded once, here.

Apps that need no text tower (a fixed list of classes) ship one package that Vision takes as it is, and Xcode previews: drop a picture on it. Previews exist for
classifiers and a few other kinds of models, and for no package that gives embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import export.to_coreml
from export.draft import Draft, Job
from export.mil_interpreter import MilProgram, import_coremltools
from export.towers import OUTPUT_NAMES, Encoder
from runtime.errors import ParityError, RecipeError

PRECISIONS = ("fp32", "fp16")  # coremltools 9.0 cannot write a classifier whose weights it compressed ("Unknown map from SSA type list")
EXTRA = export.to_coreml.EXTRA
PROBABILITIES, LABEL = "probabilities", "label"
LABEL_PROBABILITIES = f"{LABEL}_probs"  # coremltools names it so
MOST_DRIFT = {"fp32": 1e-3, "fp16": 0.05}
"""Largest difference of a probability; half precision has steps of 0.03 in a logit of 30."""
ROWS = 16
_PREVIEW = {"com.apple.coreml.model.preview.type": "imageClassifier"}
_ROOM = "mobileclip::room_for_label"


@dataclass(frozen=True, kw_only=True)
class Classes:
    """What a classifier tells apart.

    Attributes:
        names: of the classes.
        vectors: (K, D) float32, unit norm: each class's text embedding.
        templates: the prompts that the vectors are means over.
    """

    names: tuple[str, ...]
    vectors: np.ndarray
    templates: tuple[str, ...]


def require() -> None:
    """Raises MissingExtraError where coremltools is not installed."""
    export.to_coreml.require()


def drafts(job: Job, precisions: Sequence[str]) -> Iterator[Draft]:
    """The image tower with the classes of `job.convert["classes"]`, one package a precision.

    Raises:
        ParityError: a package does not give the probabilities that its own embedding has.
    """
    if job.tower == "text":
        return
    classes: Classes | None = job.convert.get("classes")
    if classes is None:
        raise RecipeError("coreml-classifier needs --classnames, a file with the name of a class on each line")
    scale = float(job.model.logit_scale.detach().exp())
    for draft in export.to_coreml.packages(job, precisions, "coreml-classifier", picture=True, head=lambda encoder: _with_classes(encoder, classes, scale)):
        drift = check_probabilities(MilProgram.open(job.folder / draft.path), job, classes, scale, draft)
        draft.facts |= {"classes": list(classes.names), "templates": list(classes.templates), "probability_drift": round(drift, 6)}
        yield draft


class WithClasses(nn.Module):
    """An image encoder that gives class probabilities (1, K) beside the embedding (1, D)."""

    def __init__(self, encoder: nn.Module, vectors: np.ndarray, scale: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("vectors", torch.from_numpy(np.ascontiguousarray(vectors.T)).float() * scale)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.encoder(x)
        return (embedding @ self.vectors).softmax(-1), embedding


def _with_classes(encoder: Encoder, classes: Classes, scale: float) -> tuple[nn.Module, list[str], dict[str, Any]]:
    """The head of `to_coreml.convert`."""
    ct = import_coremltools("exporting a Core ML classifier")
    _register_room()
    pipeline = ct.PassPipeline.DEFAULT
    pipeline.append_pass(_ROOM)
    config = ct.ClassifierConfig(list(classes.names), predicted_feature_name=LABEL, predicted_probabilities_output=PROBABILITIES)
    return WithClasses(encoder, classes.vectors, scale), [PROBABILITIES, encoder.output_name], {"classifier_config": config, "pass_pipeline": pipeline, "preview": _PREVIEW}


def _register_room() -> None:
    """A pass that makes coremltools' list of output types as long as the outputs will be: it puts a label and a dictionary in the place of the probabilities,
    and then takes the types by place (9.0 ends in an IndexError where there is a further output)."""
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY, register_pass

    if _ROOM in PASS_REGISTRY.passes:
        return

    @register_pass(namespace=_ROOM.split("::")[0])
    class room_for_label(AbstractGraphPass):  # noqa: N801  (the class's name is the pass's)
        def apply(self, program: Any) -> None:
            function = program.functions["main"]
            function.output_types = [*function.output_types, function.output_types[-1]]


def check_probabilities(program: MilProgram, job: Job, classes: Classes, scale: float, draft: Draft) -> float:
    """Largest difference between the probabilities that a package gives for calibration pictures and those that its embeddings have with the class vectors.

    Raises:
        ParityError: it is too large, or the label is not the class of the greatest probability.
    """
    worst = 0.0
    for row in export.to_coreml.as_picture(job.rows[:ROWS], job.preprocessing):
        found = program(**{program.inputs[0]: row[None]})
        logits = scale * found[OUTPUT_NAMES["image"]].astype(np.float64)[0] @ classes.vectors.T
        expected = np.exp(logits - logits.max())
        expected /= expected.sum()
        given: Any = found[LABEL_PROBABILITIES]
        worst = max(worst, max(abs(given[name] - float(value)) for name, value in zip(classes.names, expected, strict=True)))
        if str(found[LABEL]) != max(given, key=given.get):
            raise ParityError(f"{draft.path}: the label is '{found[LABEL]}' where '{max(given, key=given.get)}' has the greatest probability; report the versions")
    most = MOST_DRIFT[draft.precision]
    if not worst <= most:
        raise ParityError(f"{draft.path}: a probability is off by {worst:.4f}, more than {most:g}, the most for {draft.precision}; leave this precision out")
    return worst


def read_classes(classnames: Path, templates: Path | None, encoder: Any) -> Classes:
    """Class names and prompt templates from files, one a line, and their vectors.

    Args:
        encoder: anything with `encode_text`, the checkpoint's.

    Raises:
        PairsError: a file that cannot be read or is empty, or a template without {}.
        RecipeError: fewer than two classes, or one twice.
    """
    from distill.evaluation_sets import read_lines, read_templates
    from runtime.evaluation import TEMPLATES, class_vector

    names = read_lines(classnames)
    twice = sorted({name for name in names if names.count(name) > 1})
    if len(names) < 2 or twice:
        found = f"'{twice[0]}' twice" if twice else f"only '{names[0]}'"
        raise RecipeError(f"--classnames '{classnames}' has {found}; expected at least two different names, one a line")
    prompts = tuple(TEMPLATES if templates is None else read_templates(templates))
    vectors = np.stack([class_vector(encoder, name, prompts) for name in names]).astype(np.float32)
    return Classes(names=tuple(names), vectors=vectors, templates=prompts)
