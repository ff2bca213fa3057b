"""Search for int8 forms of a tower: which layers stay float, how ranges are chosen, what is equalised; judged by retrieval, timed where it will run.

Losses of single layers add up (their sum came within 5 % of the loss of all together on the towers it was tried on), so layers are measured one by one, put in order
of what they cost, and left float from the most expensive on, a ladder of graphs. Every rung that is shown was built, compared and timed; nothing is interpolated.
What was found out is kept in a file, so a search that was interrupted goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from export.int8_recipe import Int8Recipe, make_int8, refuse_quantised
from export.latency_gate import Ratio, interleaved, ratio
from export.positions import scale_positions
from export.qdq import insert_qdq, layers, tensors
from export.quality import Limits, Quality, judge, rare_rows, sudden_drop
from export.quantize import quantize_dynamic
from export.ranges import RANGE_METHODS, tensor_ranges
from export.to_onnx import OnnxEncoder, serialize
from export.to_openvino import GROUP, OpenVinoEncoder, compress_weights, import_openvino, save
from export.towers import Samples, Tower
from export.verify import Reference, centred_cosines
from runtime.errors import MissingExtraError, ParityError
from runtime.files import write_json

ALPHAS = (None, 0.5, 0.6, 0.7, 0.8)
RUNGS = (0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 27, 36, 48)
MORE_RUNGS = 1  # beyond the first that is good enough: it may be the faster one
EXPLAINED = 0.75  # of the loss lies with the layers that are float while ranges are chosen
SETTLE = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One graph on one runtime, measured."""

    tower: Tower
    runtime: str
    recipe: Int8Recipe
    quality: Quality
    ratio: Ratio
    """Time beside float32 ONNX Runtime."""
    bytes_ratio: float
    problem: str | None
    """Which limit it misses."""

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "ratio": self.ratio.as_dict(), "recipe": self.recipe.as_dict()}


@dataclass(kw_only=True)
class Search:
    """One tower's search.

    Attributes:
        model: the float32 ONNX of dynamic batch.
        rows: calibration inputs; ranges come from them.
        probe: further inputs, which layers are compared on.
        judge, reference: pairs that rungs are judged on, and the checkpoint's embeddings of them.
        limits: what counts as good enough.
        notes: file that what was measured is kept in.
        say: takes one line of progress.
    """

    tower: Tower
    model: onnx.ModelProto
    rows: np.ndarray
    probe: np.ndarray
    judge: Samples
    reference: Reference
    limits: Limits
    notes: Path
    say: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        inputs = hashlib.sha256(serialize(self.model) + self.rows.tobytes() + self.probe.tobytes() + self.judge.inputs(self.tower).tobytes()).hexdigest()
        self._world = inputs[:16]
        self._known: dict[str, Any] = _read_notes(self.notes)
        self._layers = layers(self.model)
        self._rare = rare_rows(self.judge.captions)
        self._graphs: dict[Int8Recipe, bytes] = {}
        self._convolutions = any(node.op_type == "Conv" for node in self.model.graph.node)
        refuse_quantised(self.model)
        if not self._layers:
            raise ParityError(f"the {self.tower} tower has no convolution and no matrix product with constant weights; there is nothing to quantise")

    def run(self) -> list[Point]:
        """All rungs on all runtimes that are here, the order of the ladder.

        Raises:
            ParityError: the tower has nothing to quantise.
        """
        recipe = Int8Recipe(form="static" if self._convolutions else "dynamic")
        recipe = dataclasses.replace(recipe, alpha=self._best_alpha(recipe))
        order = self._order(recipe)
        if self._convolutions:
            recipe = dataclasses.replace(recipe, ranges=self._best_ranges(recipe, order), corrected=True)
        variants = [recipe]
        if not self._convolutions and scale_positions(self.model, self.rows)[1]:
            variants.append(dataclasses.replace(recipe, positions=True))
        rungs: list[tuple[Int8Recipe, Quality]] = []
        good = 0
        # All variants with nothing float; with layers float the last one, which loses least.
        for count, variant in [(0, one) for one in variants] + [(rung, variants[-1]) for rung in RUNGS if 0 < rung < len(order)]:
            rung = dataclasses.replace(variant, float_layers=tuple(sorted(name for _, name in order[:count])))
            quality = Quality(**self._once("quality", rung.as_dict(), lambda rung=rung: dataclasses.asdict(self._judge(self.graph(rung)))))
            rungs.append((rung, quality))
            problem = quality.misses(self.limits)
            self.say(
                f"{self.tower}: {_layers(rung)} of {len(order)} layers float: centred p1 {quality.centred_p1:.4f}, top-10 overlap {quality.overlap10:.4f}, "
                f"recall@1 {-100 * quality.recall1_loss:+.2f} points{'' if problem is None else f' ({problem})'}"
            )
            good += problem is None
            if good > MORE_RUNGS:
                break
        ladder = [(found, quality) for found, quality in reversed(rungs) if found.positions == variants[-1].positions]
        losses = [1 - quality.centred_mean for _, quality in ladder]
        place = sudden_drop(losses)
        if place is not None:
            kept = len(ladder[place - 1][0].float_layers)
            self.say(f"{self.tower}: a sudden drop below {kept} layers float: 1 - centred cosine goes from {losses[place - 1]:.4f} to {losses[place]:.4f}")
        return self._timed(rungs)

    def _once(self, kind: str, settings: dict[str, Any], measure_it: Callable[[], Any]) -> Any:
        key = hashlib.sha256(json.dumps([self._world, kind, settings], sort_keys=True).encode()).hexdigest()[:24]
        if key not in self._known:
            self._known[key] = measure_it()
            write_json(self.notes, self._known)
        return self._known[key]

    @functools.cached_property
    def _exact(self) -> np.ndarray:
        return OnnxEncoder(serialize(self.model))(self.probe)

    def _loss(self, made: onnx.ModelProto) -> float:
        """Mean centred cosine that is missing, over the probe; a shift of all embeddings is left out where biases will make up for it."""
        found = OnnxEncoder(serialize(made))(self.probe)
        if self._convolutions:
            found = found - found.mean(axis=0) + self._exact.mean(axis=0)
        return float(1 - centred_cosines(found, self._exact).mean())

    def _made(self, recipe: Int8Recipe) -> onnx.ModelProto:
        return make_int8(self.model, self.rows, recipe)

    def _products(self) -> tuple[str, ...]:
        return tuple(node.name for node in self.model.graph.node if node.op_type != "Conv" and node.name in self._layers)

    def _best_alpha(self, recipe: Int8Recipe) -> float | None:
        """The equalisation with the least loss when only matrix products are int8."""
        products = self._products()
        if not products:
            return None
        rest = tuple(name for name in self._layers if name not in products)
        losses = {}
        for alpha in ALPHAS:
            tried = dataclasses.replace(recipe, alpha=alpha, float_layers=rest)
            losses[alpha] = self._once("loss", tried.as_dict(), lambda tried=tried: self._loss(self._made(tried)))
        best = min(losses, key=lambda alpha: losses[alpha])
        self.say(f"{self.tower}: equalisation {'none' if best is None else best}, loss of the products {losses[best]:.5f}, without {losses[None]:.5f}")
        return best

    def _order(self, recipe: Int8Recipe) -> list[tuple[float, str]]:
        """Layers by the loss that each causes alone, the worst first."""
        return sorted(((self._alone(recipe, name), name) for name in self._layers), reverse=True)

    def _alone(self, recipe: Int8Recipe, name: str) -> float:
        only = dataclasses.replace(recipe, float_layers=tuple(sorted(set(self._layers) - {name})))

        def measured() -> float:
            model, ranges = self._equalised(recipe.alpha), self._ranges(recipe.alpha)
            made = insert_qdq(model, ranges[recipe.ranges], [name]) if recipe.form == "static" else quantize_dynamic(model, leave=only.float_layers)
            return self._loss(made)

        return self._once("alone", only.as_dict(), measured)

    def _equalised(self, alpha: float | None) -> onnx.ModelProto:
        from export.equalize import equalize

        if not hasattr(self, "_smooth"):
            self._smooth = self.model if alpha is None else equalize(self.model, self.rows, alpha=alpha)[0]
        return self._smooth

    def _ranges(self, alpha: float | None) -> dict[str, dict[str, tuple[float, float]]]:
        if not hasattr(self, "_found_ranges"):
            model = self._equalised(alpha)
            self._found_ranges = tensor_ranges(model, tensors(model), self.rows, RANGE_METHODS) if self._convolutions else {}
        return self._found_ranges

    def _best_ranges(self, recipe: Int8Recipe, order: list[tuple[float, str]]) -> str:
        """The way to choose ranges with the least loss, the few worst layers float."""
        total, first, summed = sum(loss for loss, _ in order), 0, 0.0
        while first < len(order) - 1 and summed < EXPLAINED * total:
            summed += order[first][0]
            first += 1
        losses = {}
        for method in RANGE_METHODS:
            tried = dataclasses.replace(recipe, ranges=method, float_layers=tuple(sorted(name for _, name in order[:first])))
            losses[method] = self._once("loss", tried.as_dict(), lambda tried=tried: self._loss(self._made(tried)))
        best = min(losses, key=lambda method: losses[method])
        self.say(f"{self.tower}: ranges by {best}; " + ", ".join(f"{method} {loss:.4f}" for method, loss in losses.items()))
        return best

    def graph(self, recipe: Int8Recipe) -> bytes:
        """The graph of a rung, made once."""
        if recipe not in self._graphs:
            self._graphs[recipe] = serialize(self._made(recipe))
        return self._graphs[recipe]

    def _judge(self, made: bytes) -> Quality:
        return self._quality(OnnxEncoder(made)(self.judge.inputs(self.tower)))

    def _quality(self, embeddings: np.ndarray) -> Quality:
        return judge(self.reference, **{self.tower: embeddings}, rare=self._rare)  # type: ignore[arg-type]

    def _timed(self, rungs: Sequence[tuple[Int8Recipe, Quality]]) -> list[Point]:
        row, base = self.judge.inputs(self.tower)[:1], serialize(self.model)
        with tempfile.TemporaryDirectory() as folder:
            encoders: dict[tuple[int, str], Any] = {}
            sizes = []
            for place, (recipe, _) in enumerate(rungs):
                data = self.graph(recipe)
                sizes.append(len(data))
                encoders[place, "onnx"] = OnnxEncoder(data)
                if self._convolutions:
                    encoders |= {(place, name): encoder for name, encoder in openvino_encoders(data, Path(folder) / str(place)).items()}
            grouped = None if self._convolutions else grouped_encoder(base, Path(folder) / "grouped")
            if grouped is not None:
                encoders[len(rungs), "openvino"], size = grouped
                sizes.append(size)
                quality = self._quality(encoders[len(rungs), "openvino"](self.judge.inputs(self.tower)))
                self.say(
                    f"{self.tower}: int8 weights, a scale for each {GROUP} values of a token, on OpenVINO: centred p1 {quality.centred_p1:.4f}, "
                    f"top-10 overlap {quality.overlap10:.4f}"
                )
                rungs = [*rungs, (Int8Recipe(form="grouped"), quality)]
            exact = OnnxEncoder(base)
            runs = {"float32": lambda: exact(row), **{f"{place}/{name}": functools.partial(encoder, row) for (place, name), encoder in encoders.items()}}
            times = interleaved(runs, settle=SETTLE, budget_seconds=90)
            points = []
            for (place, name), encoder in encoders.items():
                recipe, quality = rungs[place]
                if name != "onnx" and recipe.form != "grouped":
                    quality = self._quality(encoder(self.judge.inputs(self.tower)))
                against = ratio(times[f"{place}/{name}"], times["float32"])
                problem = quality.misses(self.limits)
                if problem is None and not against.faster:
                    problem = f"not faster than float32: {against.median:.2f} of its time [{against.low:.2f}, {against.high:.2f}]"
                if problem is None and self.limits.latency is not None and against.median > self.limits.latency:
                    problem = f"{against.median:.2f} of float32's time, more than {self.limits.latency:g}"
                points.append(
                    Point(tower=self.tower, runtime=name, recipe=recipe, quality=quality, ratio=against, bytes_ratio=sizes[place] / len(base), problem=problem)
                )
        return points


def best(points: Sequence[Point]) -> Point | None:
    """The fastest point that misses no limit."""
    good = [point for point in points if point.problem is None]
    return min(good, key=lambda point: point.ratio.median) if good else None


def table(points: Sequence[Point]) -> str:
    """One line a point for a terminal."""
    lines = [f"{'tower':6} {'runtime':13} {'float layers':>12} {'time':>6} {'bytes':>6} {'centred p1':>10} {'top 10':>7} {'recall@1':>9}  verdict"]
    chosen = {id(found) for tower in {point.tower for point in points} if (found := best([point for point in points if point.tower == tower]))}
    for point in points:
        verdict = "chosen" if id(point) in chosen else point.problem or "good, slower"
        lines.append(
            f"{point.tower:6} {point.runtime:13} {_layers(point.recipe):>12} {point.ratio.median:>6.2f} {point.bytes_ratio:>6.2f} {point.quality.centred_p1:>10.4f} "
            f"{point.quality.overlap10:>7.3f} {-100 * point.quality.recall1_loss:>+9.2f}  {verdict}"
        )
    return "\n".join(lines)


def _layers(recipe: Int8Recipe) -> str:
    return "grouped" if recipe.form == "grouped" else f"{len(recipe.float_layers)}{' +pos' if recipe.positions else ''}"


def _read_notes(path: Path) -> dict[str, Any]:
    """What an earlier search found out; nothing where the file is missing or damaged, since all of it can be measured again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def grouped_encoder(data: bytes, folder: Path) -> tuple[Any, int] | None:
    """A float32 graph with `compress_weights`, under OpenVINO on one thread, and its bytes; None where OpenVINO or nncf is not installed."""
    try:
        ov = import_openvino("timing int8 graphs")
        saved = save(compress_weights(ov.convert_model(io.BytesIO(data))), folder)
    except MissingExtraError:
        return None
    return OpenVinoEncoder(saved), sum(path.stat().st_size for path in Path(saved).iterdir())


def openvino_encoders(data: bytes, folder: Path) -> dict[str, Any]:
    """The graph under OpenVINO on one thread, floats in float32 and, where the processor has it, in bfloat16; empty where OpenVINO is not installed."""
    try:
        ov = import_openvino("timing int8 graphs")
    except MissingExtraError:
        return {}
    saved = save(ov.convert_model(io.BytesIO(data)), folder)
    found = {"openvino": OpenVinoEncoder(saved)}
    if "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        found["openvino bf16"] = OpenVinoEncoder(saved, precision="bf16")
    return found
