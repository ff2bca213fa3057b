"""Make, compare, time and judge the artefacts of one tower.

Converters (`to_*.py`) write files and say how to run them; the judgement is here, the same for all. The float32 ONNX is the base: when it misses its
thresholds, the export stops. Any other artefact that does not compute what the checkpoint computes, or (in precisions that cost accuracy) loses too
much of its retrieval, or is not faster than its target's own float32 here, is refused: its figures stay in the manifest, its file does not.
"""

from __future__ import annotations

import functools
import importlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from export.draft import Draft, Job
from export.latency_gate import Ratio, figures, interleaved, ratio
from export.precision_file import Precisions
from export.towers import Samples, Tower
from export.verify import FLOATS, THRESHOLDS, Parity, Reference, Thresholds, at_chance, failure, measure
from runtime.errors import ParityError, RecipeError
from runtime.manifest import Artefact

TARGETS = {
    "onnx": "export.to_onnx",
    "onnx-pixels": "export.to_onnx_pixels",
    "onnx-eot": "export.to_onnx_eot",
    "ort": "export.to_ort",
    "coreml": "export.to_coreml",
    "coreml-image": "export.to_coreml_image",
    "coreml-classifier": "export.to_coreml_classifier",
    "coreai": "export.to_coreai",
    "tensorrt": "export.to_tensorrt",
    "openvino": "export.to_openvino",
    "litert": "export.to_litert",
    "executorch": "export.to_executorch",
    "qnn": "export.to_qnn",
    "hf": "export.to_hf",
}
"""Target to the module that converts to it."""


def converter(target: str) -> Any:
    """The target's module."""
    return importlib.import_module(TARGETS[target])


def allowed_pairs() -> dict[str, tuple[str, ...]]:
    """Target to the precisions that it is made in."""
    return {target: converter(target).PRECISIONS for target in TARGETS}


def parse_targets(target: str, precision: str) -> dict[str, tuple[str, ...]]:
    """Comma-separated lists to the precisions to make of each target; "all" is every target but `coreml-classifier`, which needs class names.

    The onnx target always has fp32 beside what is asked: others are compared with it.

    Raises:
        RecipeError: a name that nobody knows, or a target that has none of the precisions.
    """
    wanted = list(dict.fromkeys(name.strip() for name in target.split(",") if name.strip()))
    precisions = list(dict.fromkeys(name.strip() for name in precision.split(",") if name.strip()))
    pairs = allowed_pairs()
    targets = [name for name in pairs if name != "coreml-classifier" or name in wanted] if "all" in wanted else wanted
    known = list(dict.fromkeys(name for names in pairs.values() for name in names))
    for kind, names, expected in (("target", targets, list(pairs)), ("precision", precisions, known)):
        unknown = [name for name in names if name not in expected]
        if unknown or not names:
            raise RecipeError(f"unknown {kind} '{', '.join(unknown)}'; expected some of {', '.join(expected)}{', or all' if kind == 'target' else ''}")
    found = {}
    for name in targets:
        found[name] = tuple(one for one in pairs[name] if one in precisions or (name == "onnx" and one == "fp32"))
        if not found[name]:
            raise RecipeError(f"target {name} is made in {', '.join(pairs[name])}, but the precisions are {', '.join(precisions)}; add one or leave the target out")
    return found


@dataclass(kw_only=True)
class Maker:
    """Everything that making artefacts needs.

    A precision that costs accuracy and that a converter cannot make of this model is refused with what the converter said; a float precision that it cannot make
    ends the export.

    Attributes:
        model: the `ImageTextModel` to export, reparameterised.
        reference: the checkpoint's embeddings of `samples`.
        calibration: rows that ranges of activations are taken from; none of them in `samples` where there are enough pairs.
        folder: the bundle under construction.
        targets: target to precisions, as `parse_targets` gives them.
        say: takes one line of progress.
        precisions: what precision.json says.
        keep_failed: leave the files of what is refused, marked as failed.
    """

    model: Any
    samples: Samples
    reference: Reference
    calibration: Samples
    folder: Path
    targets: dict[str, tuple[str, ...]]
    say: Callable[[str], None]
    precisions: Precisions = field(default_factory=Precisions)
    thresholds: Mapping[str, Thresholds] = field(default_factory=lambda: THRESHOLDS)
    keep_failed: bool = False
    convert: dict[str, Any] = field(default_factory=dict)

    def make(self, tower: Tower) -> list[Artefact]:
        """All artefacts of a tower, in the order of the targets.

        Raises:
            ParityError: the float32 ONNX does not compute what the checkpoint computes.
            MissingExtraError: a target's converter is not installed.
        """
        job = Job(
            model=self.model, tower=tower, calibration=self.calibration, folder=self.folder, say=self.say, convert=self.convert,
            recipe=self.precisions.int8.get(tower),
        )  # fmt: skip
        untrained = at_chance(self.reference)
        drafts: list[tuple[Draft, Parity | None]] = []
        for target in self.targets:
            (self.folder / target).mkdir(exist_ok=True)
            for draft in self._drafts(job, target):
                parity = self._parity(draft)
                if parity is not None and draft.target == "onnx" and draft.precision == "fp32" and (problem := failure(draft.id, parity, "fp32", self.thresholds)):
                    raise ParityError(f"{problem}: the artefact does not compute what the checkpoint computes, and is not shipped")
                self.say(f"{draft.id}: {_sentence(parity)}, {draft.how}")
                if not draft.timed:
                    draft.run = None  # it holds all weights of a tower, and a dozen of them are made
                drafts.append((draft, parity))
        times = self._times(tower, [draft for draft, _ in drafts])
        return [self._judged(draft, parity, times, untrained) for draft, parity in drafts]

    def _drafts(self, job: Job, target: str) -> Iterator[Draft]:
        precisions = self._precisions(job.tower, target)
        if floats := tuple(precision for precision in precisions if precision in FLOATS):
            yield from converter(target).drafts(job, floats)
        for precision in precisions:
            if precision in FLOATS:
                continue
            try:
                made = list(converter(target).drafts(job, (precision,)))
            except ParityError as error:
                made = [Draft(tower=job.tower, target=target, precision=precision, path="", run=None, how="not made", problem=str(error))]
            yield from made
        reason = self.precisions.refused.get(job.tower, {}).get(target)
        if reason is not None and "int8" in self.targets[target] and "int8" not in precisions:
            yield Draft(tower=job.tower, target=target, precision="int8", path="", run=None, how="not made", problem=reason)

    def _precisions(self, tower: Tower, target: str) -> tuple[str, ...]:
        wanted = self.targets[target]
        allowed = self.precisions.allowed
        if allowed is None:
            return wanted
        return tuple(p for p in wanted if p in allowed[tower].get(target, wanted) or (target, p) == ("onnx", "fp32"))

    def _parity(self, draft: Draft) -> Parity | None:
        if draft.run is None:
            return None
        return measure(draft.tower, draft.run(self.samples.inputs(draft.tower)[: draft.most_rows]), self.reference)

    def _times(self, tower: Tower, drafts: list[Draft]) -> dict[str, np.ndarray]:
        row = self.samples.inputs(tower)[:1]
        timed = {draft.id: getattr(draft.run, "whole", draft.run) for draft in drafts if draft.timed and draft.run is not None}
        runs = {id: functools.partial(run, row) for id, run in timed.items()}
        return interleaved(runs) if runs else {}

    def _judged(self, draft: Draft, parity: Parity | None, times: dict[str, np.ndarray], untrained: str | None) -> Artefact:
        base = times.get(f"{draft.tower}-{draft.target}-fp32")
        own = times.get(draft.id)
        against = ratio(own, base) if own is not None and base is not None and own is not base else None
        lossy = draft.precision not in FLOATS
        problem = self._problem(draft, parity, against)
        status, reason = ("refused", problem) if problem else ("proven", None)
        if lossy and untrained and parity is not None and parity.cosine_min > -1:
            status, reason = "unproven", untrained
        if status == "refused":
            if self.keep_failed and draft.path:
                status = "failed"
            else:
                self._remove(draft)
        latency = None if own is None else {**figures(own, against), "runtime": draft.how}
        beside = f", {against.median:.2f} of fp32" if against else ""
        timed = f", {latency['p50_ms']:.2f} ms on one thread{beside}" if latency else ""
        self.say(f"{draft.id}: {status}{timed}{f' ({reason})' if reason else ''}")
        return Artefact(
            id=draft.id, tower=draft.tower, target=draft.target, precision=draft.precision, batch=draft.batch,
            path=None if status == "refused" else draft.path, status=status, reason=reason,
            parity=None if parity is None else {**parity.as_dict(), "how": draft.how}, latency=latency, facts=draft.facts or None,
            any_length=draft.any_length,
        )  # fmt: skip

    def _remove(self, draft: Draft) -> None:
        """The files of a draft, or what a converter left of one that it did not finish; the target's folder too where it is the last."""
        folder = self.folder / draft.target
        for path in [self.folder / draft.path] if draft.path else list(folder.glob(f"{draft.tower}.{draft.precision}*")):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        for path in ((self.folder / draft.path).parent, folder) if draft.path else (folder,):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()

    def _problem(self, draft: Draft, parity: Parity | None, against: Ratio | None) -> str | None:
        """Why an artefact is not worth shipping, with the figure; None when it is."""
        if draft.problem:
            return draft.problem
        if parity is None:
            return f"nothing here runs it: {draft.how}"
        problem = failure(draft.id, parity, draft.precision, self.thresholds)
        if problem:
            return problem
        if draft.precision not in FLOATS and against is not None and not against.faster:
            return (
                f"not faster than fp32 here: it takes {against.median:.2f} times as long "
                f"({against.level:.0%} interval {against.low:.2f} to {against.high:.2f}, expected below 0.99)"
            )
        return None


def _sentence(parity: Parity | None) -> str:
    if parity is None:
        return "not compared"
    shown = f"cosine min {parity.cosine_min:.6f}, centred p1 {parity.centred_p1:.4f}, same first picture {parity.rank_agreement:.3f}"
    return f"{shown}, recall@1 {parity.recall1_change:+.3f} [{parity.recall1_low:+.3f}, {parity.recall1_high:+.3f}] (n={parity.n})"
