"""Encoders to Core ML: a float16 ML program for iOS 17 and later, written as a package of reproducible bytes.

The conversion goes through torch.export: coremltools' tracing route does not work with current numpy. Batch is fixed at 1,
because a flexible batch keeps a program off the Neural Engine. Prediction needs macOS; `mil_interpreter` evaluates the
saved package anywhere, and that is how parity is measured here.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.mil_interpreter import MilProgram, import_coremltools
from export.to_onnx import HALF_MAX, plain_attention, quiet
from export.towers import Tower, encoder_of
from runtime.errors import ParityError

_NAMESPACE = uuid.UUID("6f0f6a52-6f39-5c0e-9a5b-2d1f0f5a7c11")  # fixed, so that identifiers depend on the item alone


def export_coreml(model: Any, tower: Tower, example: np.ndarray, path: str | os.PathLike[str]) -> Path:
    """Convert one tower and write `path` (a folder ending in .mlpackage).

    Args:
        model: an `ImageTextModel`, reparameterised.
        example: at least one input row; only its shape and type matter.

    Raises:
        MissingExtraError: coremltools is not installed.
        ParityError: a constant lies outside float16's range.
    """
    path = Path(path)
    ct = import_coremltools("exporting to Core ML")
    encoder = encoder_of(model, tower, rescale=True)
    row = torch.from_numpy(np.ascontiguousarray(example[:1]))
    with plain_attention(), quiet("coremltools", "torch.export"), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        program = torch.export.export(encoder, (row,)).run_decompositions({})
        _simplify(program)
        converted = ct.convert(
            program,
            convert_to="mlprogram",
            outputs=[ct.TensorType(name=encoder.output_name, dtype=np.float32)],
            minimum_deployment_target=ct.target.iOS17,
            compute_precision=ct.precision.FLOAT16,
            skip_model_load=True,
        )
        specification = converted.get_spec()
        given = specification.description.input[0].name
        if given != encoder.input_name:
            ct.utils.rename_feature(specification, given, encoder.input_name, rename_outputs=False)
        metadata = specification.description.metadata
        metadata.ClearField("userDefined")  # holds the conversion date
        renamed = ct.models.MLModel(specification, weights_dir=converted.weights_dir, skip_model_load=True)
        temporary = path.with_name(f"{path.stem}.{os.getpid()}.mlpackage")
        renamed.save(str(temporary))
    try:
        make_reproducible(temporary)
        check_constants(MilProgram.open(temporary), path.name)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _simplify(program: Any) -> None:
    """Rewrite, in place, what coremltools does not take: aliases go; clamps on float tensors get two finite float bounds (it fills in infinities)."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if str(node.target) in ("aten.alias.default", "aten.detach.default"):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif str(node.target) in _CLAMPS and node.args[0].meta["val"].is_floating_point():
            low, high = (_bound(node, name) for name in ("min", "max"))
            node.target = torch.ops.aten.clamp.default
            node.args, node.kwargs = (node.args[0], -HALF_MAX if low is None else low, HALF_MAX if high is None else high), {}
    program.graph_module.recompile()


_CLAMPS = ("aten.clamp.default", "aten.clamp_min.default", "aten.clamp_max.default")


def _bound(node: Any, name: str) -> float | None:
    """The lower ("min") or upper ("max") bound of a clamp, None where it has none."""
    places = {"aten.clamp.default": {"min": 1, "max": 2}, "aten.clamp_min.default": {"min": 1}, "aten.clamp_max.default": {"max": 1}}[str(node.target)]
    place = places.get(name, len(node.args))
    value = node.kwargs.get(name, node.args[place] if place < len(node.args) else None)
    return None if value is None else float(value)


def make_reproducible(package: Path) -> None:
    """Rewrite what varies between two saves of the same program: random item identifiers, map order, the conversion date."""
    from coremltools.proto import Model_pb2

    manifest_path = package / "Manifest.json"
    manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    names = {old: str(uuid.uuid5(_NAMESPACE, entry["path"])).upper() for old, entry in manifest["itemInfoEntries"].items()}
    manifest["itemInfoEntries"] = {names[old]: entry for old, entry in sorted(manifest["itemInfoEntries"].items(), key=lambda kv: kv[1]["path"])}
    manifest["rootModelIdentifier"] = names[manifest["rootModelIdentifier"]]
    manifest_path.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for model_path in sorted(package.rglob("*.mlmodel")):
        specification = Model_pb2.Model()
        specification.ParseFromString(model_path.read_bytes())
        specification.description.metadata.ClearField("userDefined")
        for function in specification.mlProgram.functions.values():
            for block in function.block_specializations.values():
                for operation in block.operations:
                    if "source_location" in operation.attributes:
                        del operation.attributes["source_location"]
        if "buildInfo" in specification.mlProgram.attributes:
            del specification.mlProgram.attributes["buildInfo"]
        model_path.write_bytes(specification.SerializeToString(deterministic=True))


def check_constants(program: MilProgram, name: str) -> None:
    """Raise ParityError for a float constant that float16 cannot hold."""
    for constant, array in program.constants().items():
        if array.dtype.kind == "f" and array.size and not np.abs(array).max() <= HALF_MAX:
            raise ParityError(
                f"{name}: the constant {constant} holds {np.abs(array).max():g}, beyond float16's {HALF_MAX:g}; use a finite mask such as -1e4 in the model"
            )


def evaluate(program: MilProgram, inputs: np.ndarray) -> np.ndarray:
    """Run a package of batch 1 over the rows of `inputs` (N, …) -> (N, D) float32."""
    name, output = program.inputs[0], program.outputs[0]
    return np.concatenate([program(**{name: inputs[i : i + 1]})[output] for i in range(len(inputs))])
