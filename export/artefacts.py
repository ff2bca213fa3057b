"""Make, compare, time and judge the artefacts of one tower.

fp32 and fp16 artefacts that miss their thresholds stop the export: something is broken. An int8 artefact that is not faster
than fp32 here, or too far from the checkpoint, is refused: its figures stay in the manifest, its file does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from export.latency_gate import Ratio, figures, interleaved, ratio
from export.mil_interpreter import MilProgram
from export.quantize import quantize_dynamic, quantize_static
from export.to_coreml import evaluate, export_coreml
from export.to_onnx import Batch, OnnxEncoder, export_onnx, serialize, with_batch_1, write_onnx
from export.to_tensorrt import audit_types, build_ahead, export_tensorrt, installed
from export.towers import Samples, Tower, encoder_of
from export.verify import THRESHOLDS, Parity, Reference, check, failure, measure
from runtime.errors import ParityError
from runtime.manifest import Artefact

TARGETS = ("onnx", "coreml", "tensorrt")
PRECISIONS = ("fp32", "fp16", "int8")
STATIC_SAMPLES = 64  # the static variant differs in one dimension of its shapes
FLOAT_CONVOLUTIONS = (3, 6)  # tried in turn until the embeddings are near enough
SELECTION_MARGIN = 0.005  # few rows select, so they have to be a little better than the threshold
COREML_SAMPLES = 32  # the interpreter takes longer than a compiled runtime


@dataclass(kw_only=True)
class Maker:
    """Everything that making artefacts needs.

    Attributes:
        model: the `ImageTextModel` to export, reparameterised.
        reference: the checkpoint's embeddings of `samples`.
        calibration: rows that ranges of static int8 are taken from; none of them in `samples` where there are enough pairs.
        folder: the bundle under construction.
        allowed: from precision.json: tower to target to precisions; None allows all.
        say: takes one line of progress.
        builds: filled with what TensorRT said, by artefact id.
    """

    model: Any
    samples: Samples
    reference: Reference
    calibration: Samples
    folder: Path
    targets: tuple[str, ...]
    precisions: tuple[str, ...]
    say: Callable[[str], None]
    allowed: dict[str, dict[str, list[str]]] | None = None
    builds: dict[str, dict[str, Any]] = field(default_factory=dict)

    def make(self, tower: Tower) -> list[Artefact]:
        """All artefacts of a tower, in the order of the manifest.

        Raises:
            ParityError: a float artefact does not compute what the checkpoint computes.
            MissingExtraError: a target's converter is not installed.
        """
        found: list[Artefact] = []
        if "onnx" in self.targets:
            found += self._onnx(tower)
        if "coreml" in self.targets:
            found.append(self._coreml(tower))
        if "tensorrt" in self.targets:
            found.append(self._tensorrt(tower))
        return found

    # ------------------------------------------------------------------------------------------------ ONNX

    def _onnx(self, tower: Tower) -> list[Artefact]:
        inputs = self.samples.inputs(tower)
        sessions: dict[str, OnnxEncoder] = {}
        drafts: list[_Draft] = []
        exported = export_onnx(encoder_of(self.model, tower), inputs)
        for batch, model in (("dynamic", exported), ("1", with_batch_1(exported))):
            draft = _Draft(tower=tower, precision="fp32", batch=batch, model=model)
            write_onnx(draft.model, self.folder / draft.path)
            sessions[draft.id] = OnnxEncoder(self.folder / draft.path)
            draft.parity = self._parity(tower, sessions[draft.id], inputs if batch == "dynamic" else inputs[:STATIC_SAMPLES])
            check(draft.id, draft.parity, "fp32")
            self.say(f"{draft.id}: proven, {_sentence(draft.parity)}")
            drafts.append(draft)
        base = drafts[0]
        if "int8" in self._precisions(tower, "onnx"):
            drafts += self._int8(tower, base, sessions)
        row = inputs[:1]
        times = interleaved({id: lambda session=session: session(row) for id, session in sessions.items()})
        found = [self._timed(draft, base, times) for draft in drafts]
        for artefact in found:
            if artefact.precision == "int8" and artefact.status == "refused":
                (self.folder / "onnx" / f"{artefact.tower}.int8{'' if artefact.batch == 'dynamic' else '.static'}.onnx").unlink(missing_ok=True)
        return found

    def _int8(self, tower: Tower, base: _Draft, sessions: dict[str, OnnxEncoder]) -> list[_Draft]:
        """One int8 draft of dynamic batch, and its static variant when the first is near enough to the checkpoint."""
        inputs = self.samples.inputs(tower)
        draft = _Draft(tower=tower, precision="int8", batch="dynamic", model=self._quantised(tower, base, sessions[base.id]))
        write_onnx(draft.model, self.folder / draft.path)
        sessions[draft.id] = OnnxEncoder(self.folder / draft.path)
        draft.parity = self._parity(tower, sessions[draft.id], inputs)
        if failure(draft.id, draft.parity, "int8"):
            return [draft]
        static = _Draft(tower=tower, precision="int8", batch="1", model=with_batch_1(draft.model, fold=False))
        write_onnx(static.model, self.folder / static.path)
        sessions[static.id] = OnnxEncoder(self.folder / static.path)
        static.parity = self._parity(tower, sessions[static.id], inputs)
        return [draft, static]

    def _quantised(self, tower: Tower, base: _Draft, session: OnnxEncoder) -> onnx.ModelProto:
        """Matrix products (text) suit dynamic ranges; convolutions need ranges calibrated beforehand, and the first ones float.

        How many stay float is decided on calibration rows that gave no ranges, never on the samples that judge the artefact.
        """
        if not any(node.op_type == "Conv" for node in base.model.graph.node):
            return quantize_dynamic(base.model)
        rows = self.calibration.inputs(tower)
        held = max(1, len(rows) // 4)
        expected = session(rows[-held:])
        for count in FLOAT_CONVOLUTIONS:
            model = quantize_static(base.model, rows[:-held] if len(rows) > held else rows, float_convolutions=count)
            cosines = (OnnxEncoder(serialize(model))(rows[-held:]) * expected).sum(1)
            if cosines.mean() >= THRESHOLDS["int8"].cosine_mean + SELECTION_MARGIN and cosines.min() >= THRESHOLDS["int8"].cosine_min:
                break
        return model

    def _timed(self, draft: _Draft, base: _Draft, times: dict[str, np.ndarray]) -> Artefact:
        against = None if draft is base else ratio(times[draft.id], times[base.id])
        latency = figures(times[draft.id], against)
        problem = _refusal(draft, against) if draft.precision == "int8" else None
        if draft.precision == "int8":
            verdict = f"refused ({problem})" if problem else "proven"
            self.say(f"{draft.id}: {verdict}, {_sentence(draft.parity)}")
        beside = f", {against.median:.2f} of fp32" if against else ""
        self.say(f"{draft.id}: {latency['p50_ms']:.2f} ms on one thread{beside}, {len(serialize(draft.model)) / 1e6:.1f} MB")
        return Artefact(
            id=draft.id,
            tower=draft.tower,
            target="onnx",
            precision=draft.precision,
            batch=draft.batch,
            path=None if problem else draft.path,
            status="refused" if problem else "proven",
            reason=problem,
            parity=draft.parity.as_dict() if draft.parity else None,
            latency=latency,
        )

    # ----------------------------------------------------------------------------------------- other targets

    def _coreml(self, tower: Tower) -> Artefact:
        name = f"coreml/{tower}.fp16.mlpackage"
        (self.folder / "coreml").mkdir(exist_ok=True)
        inputs = self.samples.inputs(tower)
        package = export_coreml(self.model, tower, inputs, self.folder / name)
        program = MilProgram.open(package)
        parity = self._parity(tower, lambda rows: evaluate(program, rows), inputs[:COREML_SAMPLES])
        id = f"{tower}-coreml-fp16"
        check(id, parity, "fp16")
        self.say(f"{id}: proven in the interpreter, {_sentence(parity)}")
        return Artefact(
            id=id, tower=tower, target="coreml", precision="fp16", batch="1", path=name,
            parity={**parity.as_dict(), "how": "MIL interpreter on the CPU, float16 results; not run on an Apple device"},
        )  # fmt: skip

    def _tensorrt(self, tower: Tower) -> Artefact:
        precision = "fp16" if "fp16" in self._precisions(tower, "tensorrt") else "fp32"
        inputs = self.samples.inputs(tower)
        model = export_tensorrt(self.model, tower, inputs, precision)
        id, name = f"{tower}-tensorrt-{precision}", f"tensorrt/{tower}.{precision}.onnx"
        write_onnx(model, self.folder / name)
        encoder = OnnxEncoder(self.folder / name, full=precision == "fp32")
        parity = self._parity(tower, encoder, inputs[:STATIC_SAMPLES])
        check(id, parity, precision)
        if installed():
            try:
                self.builds[id] = build_ahead(model)
            except ParityError as error:
                raise ParityError(f"artefact {id}: {error}") from error
            built = f"parsed and built by tensorrt-rtx {self.builds[id]['version']} for {self.builds[id]['compute_capability']}"
        else:
            self.builds[id] = {"parsed": False, "built": False, "ran": False, "types": audit_types(model), "reason": "tensorrt-rtx-cu13 is not installed"}
            built = "neither parsed nor built: tensorrt-rtx-cu13 is not installed"
        self.say(f"{id}: proven under ONNX Runtime, {_sentence(parity)}; {built}")
        return Artefact(
            id=id, tower=tower, target="tensorrt", precision=precision, path=name,
            parity={**parity.as_dict(), "how": f"ONNX Runtime on the CPU; {built}; no engine was run"},
        )  # fmt: skip

    def _precisions(self, tower: Tower, target: str) -> list[str]:
        return [p for p in self.precisions if self.allowed is None or p in self.allowed[tower].get(target, [])]

    def _parity(self, tower: Tower, run: Callable[[np.ndarray], np.ndarray], rows: np.ndarray) -> Parity:
        return measure(tower, run(rows), self.reference)


@dataclass(kw_only=True)
class _Draft:
    """An ONNX artefact before it is judged."""

    tower: Tower
    precision: str
    batch: Batch
    model: onnx.ModelProto
    parity: Parity | None = None

    @property
    def id(self) -> str:
        return f"{self.tower}-onnx-{self.precision}" + ("" if self.batch == "dynamic" else "-static")

    @property
    def path(self) -> str:
        return f"onnx/{self.tower}.{self.precision}" + (".onnx" if self.batch == "dynamic" else ".static.onnx")


def _refusal(draft: _Draft, against: Ratio | None) -> str | None:
    """Why an int8 artefact is not worth shipping, with the figure; None when it is."""
    problem = failure(draft.id, draft.parity, "int8") if draft.parity else "it was not compared"
    if problem:
        return problem
    if against is not None and not against.faster:
        return (
            f"not faster than fp32 here: it takes {against.median:.2f} times as long "
            f"({against.level:.0%} interval {against.low:.2f} to {against.high:.2f}, expected below 0.99)"
        )
    return None


def _sentence(parity: Parity | None) -> str:
    if parity is None:
        return "not compared"
    shown = f"cosine min {parity.cosine_min:.6f} mean {parity.cosine_mean:.6f}, same first picture {parity.rank_agreement:.3f}"
    return f"{shown}, recall@1 {parity.recall1_change:+.3f} (n={parity.n})"
