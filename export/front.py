"""The front of compression: every way to make a tower smaller or faster that this machine can run, measured in one run, for each tower and for both together.

Arms that lost stay in: what a user would do in one call, what only stores less, what only another runtime gives. Nothing is interpolated: each point is a graph
that was built, embedded the pairs that judge, and was timed in turns with all others.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from export.latency_gate import interleaved, processor, ratio
from export.quality import Quality, judge, rare_rows
from export.quantize import BLOCK_4, quantize_blocks
from export.search import SETTLE, Point, grouped_encoder, openvino_encoders
from export.to_onnx import OnnxEncoder, quiet, serialize
from export.to_openvino import OpenVinoEncoder, import_openvino, nothing_said, save
from export.towers import TOWERS, Samples, Tower
from export.verify import Reference
from runtime.errors import MissingExtraError

SCHEMA = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One form of one tower on one runtime."""

    name: str
    runtime: str
    run: Callable[[np.ndarray], np.ndarray]
    bytes: int


def arms_of(tower: Tower, model: onnx.ModelProto, rows: np.ndarray, half: onnx.ModelProto, searched: Mapping[str, bytes], folder: Path) -> list[Arm]:
    """All arms of a tower; the first is float32 under ONNX Runtime, which all are compared with.

    Args:
        model: float32, dynamic batch. half: the same computing in float16.
        rows: calibration inputs.
        searched: name to graph of the forms that the search built.
        folder: for files that runtimes want.
    """
    base, convolutions = serialize(model), any(node.op_type == "Conv" for node in model.graph.node)
    arms = [Arm(name="float32", runtime="onnx", run=OnnxEncoder(base), bytes=len(base))]
    stored = serialize(half)
    arms.append(Arm(name="float16", runtime="onnx", run=OnnxEncoder(stored, full=False), bytes=len(stored)))
    arms += [Arm(name="float32", runtime=name, run=run, bytes=len(base)) for name, run in openvino_encoders(base, folder / "float").items()]
    for name, make in ONE_CALL.items():
        made = make(model, rows)
        if made is not None:
            arms.append(Arm(name=name, runtime="onnx", run=OnnxEncoder(made), bytes=len(made)))
    arms += _nncf(model, rows, folder / "nncf")
    grouped = None if convolutions else grouped_encoder(base, folder / "grouped")
    if grouped is not None:
        arms.append(Arm(name="int8 weights, activations by groups", runtime="openvino", run=grouped[0], bytes=grouped[1]))
    blocks = serialize(quantize_blocks(model, bits=4, block=BLOCK_4, tables=True))
    if len(blocks) < 0.9 * len(base):
        arms.append(Arm(name="4-bit weights", runtime="onnx", run=OnnxEncoder(blocks), bytes=len(blocks)))
    for place, (name, data) in enumerate(searched.items()):
        arms.append(Arm(name=name, runtime="onnx", run=OnnxEncoder(data), bytes=len(data)))
        if convolutions:
            arms += [Arm(name=name, runtime=other, run=run, bytes=len(data)) for other, run in openvino_encoders(data, folder / f"searched{place}").items()]
    return arms


def one_call_dynamic(model: onnx.ModelProto, rows: np.ndarray) -> bytes | None:
    """What `onnxruntime.quantization.quantize_dynamic(source, target)` gives, no setting touched; None where ONNX Runtime cannot run it."""
    from onnxruntime.quantization import quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, quiet("root"):
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, source)
        quantize_dynamic(source, target)
        return _runs(target.read_bytes(), rows)


def one_call_static(model: onnx.ModelProto, rows: np.ndarray) -> bytes | None:
    """What `onnxruntime.quantization.quantize_static(source, target, reader)` gives, no setting touched; None where it fails or cannot be run."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(rows)

        def get_next(self) -> dict[str, np.ndarray] | None:
            row = next(self.left, None)
            return None if row is None else {model.graph.input[0].name: row[None]}

    with tempfile.TemporaryDirectory() as folder, quiet("root"):
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, source)
        try:
            quantize_static(source, target, Reader())
        except Exception:  # its calibration refuses some text towers; the arm is then not there
            return None
        return _runs(target.read_bytes(), rows)


ONE_CALL: dict[str, Callable[[onnx.ModelProto, np.ndarray], bytes | None]] = {"one call, dynamic": one_call_dynamic, "one call, static": one_call_static}


def _runs(data: bytes, rows: np.ndarray) -> bytes | None:
    try:
        OnnxEncoder(data)(rows[:1])
    except Exception:  # ONNX Runtime's exceptions share no base class of their own
        return None
    return data


def _nncf(model: onnx.ModelProto, rows: np.ndarray, folder: Path) -> list[Arm]:
    """OpenVINO's one call, `nncf.quantize(model, dataset)`."""
    import io

    try:
        ov, nncf = import_openvino("the front"), import_openvino("the front", quantiser=True)
    except MissingExtraError:
        return []
    with nothing_said():
        made = nncf.quantize(ov.convert_model(io.BytesIO(serialize(model))), nncf.Dataset([row[None] for row in rows]), subset_size=len(rows))
    saved = save(made, folder)
    size = sum(path.stat().st_size for path in Path(saved).iterdir())
    return [Arm(name="one call, nncf", runtime="openvino", run=OpenVinoEncoder(saved), bytes=size)]


def measure_front(arms: Mapping[Tower, Sequence[Arm]], judged: Samples, reference: Reference, *, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Time and judge every arm, and every pair of an image arm and a text arm.

    Returns:
        JSON-ready {"schema", "threads", "processor", "n", "points": [{"tower": "image" | "text" | "joint", "name", "runtime", "latency_ratio", "latency_low",
        "latency_high", "milliseconds", "bytes_ratio", "bytes", **Quality, "front": whether no other point of its tower is as good everywhere and better somewhere}]};
        a joint point has "image" and "text" in place of "runtime".
    """
    rare = rare_rows(judged.captions)
    points: list[dict[str, Any]] = []
    embedded: dict[Tower, list[np.ndarray]] = {}
    times: dict[Tower, dict[str, np.ndarray]] = {}
    for tower in TOWERS:
        rows = judged.inputs(tower)
        embedded[tower] = [arm.run(rows) for arm in arms[tower]]
        runs = {str(place): functools.partial(arm.run, rows[:1]) for place, arm in enumerate(arms[tower])}
        times[tower] = interleaved(runs, settle=SETTLE, budget_seconds=120)
        say(f"{tower}: {len(runs)} arms embedded {len(rows)} pairs and were timed")
        for place, arm in enumerate(arms[tower]):
            quality = judge(reference, **{tower: embedded[tower][place]}, rare=rare)  # type: ignore[arg-type]
            facts = _timed(times[tower][str(place)], times[tower]["0"])
            points.append({"tower": tower, "name": arm.name, "runtime": arm.runtime, **facts, **_sized(arm.bytes, arms[tower][0].bytes), **_figures(quality)})
    base = times["image"]["0"], times["text"]["0"]
    rounds = min(len(base[0]), len(base[1]))
    for first, image in enumerate(arms["image"]):
        for second, text in enumerate(arms["text"]):
            quality = judge(reference, image=embedded["image"][first], text=embedded["text"][second], rare=rare)
            both = times["image"][str(first)][:rounds] + times["text"][str(second)][:rounds]
            facts = _timed(both, base[0][:rounds] + base[1][:rounds])
            size = _sized(image.bytes + text.bytes, arms["image"][0].bytes + arms["text"][0].bytes)
            name = f"{image.name} ({image.runtime}) + {text.name} ({text.runtime})"
            points.append({"tower": "joint", "name": name, "image": [image.name, image.runtime], "text": [text.name, text.runtime], **facts, **size, **_figures(quality)})
    for tower_name in (*TOWERS, "joint"):
        own = [point for point in points if point["tower"] == tower_name]
        for point in own:
            point["front"] = not any(_dominates(other, point) for other in own)
    return {"schema": SCHEMA, "threads": 1, "processor": processor(), "n": len(judged), "points": points}


def _timed(times: np.ndarray, base: np.ndarray) -> dict[str, float]:
    found = ratio(times, base)
    return {"latency_ratio": found.median, "latency_low": found.low, "latency_high": found.high, "milliseconds": float(np.median(times) * 1e3)}


def _sized(size: int, base: int) -> dict[str, float]:
    return {"bytes": size, "bytes_ratio": size / base}


def _figures(quality: Quality) -> dict[str, Any]:
    return {name: getattr(quality, name) for name in Quality.__dataclass_fields__}


def _dominates(other: Mapping[str, Any], point: Mapping[str, Any]) -> bool:
    """As fast, as small and as near as the other, and better in one of them. Nearness is the top-10 overlap: recall@1 moves in steps of one query."""
    better = [other["latency_ratio"] - point["latency_ratio"], other["bytes_ratio"] - point["bytes_ratio"], point["overlap10"] - other["overlap10"]]
    return max(better) <= 0 and min(better) < 0


def names_of(points: Sequence[Point]) -> dict[str, Point]:
    """Points of a search under ONNX Runtime by the name that the front shows them under."""
    return {f"searched, {len(point.recipe.float_layers)} layers float{', positions' if point.recipe.positions else ''}": point for point in points if point.runtime == "onnx"}
