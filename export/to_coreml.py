"""Encoders to Core ML: ML programs for iOS 16 to 18, written as packages of reproducible bytes.

The conversion goes through torch.export: coremltools' tracing route does not work with current numpy. Batch is fixed at 1,
because a flexible batch keeps a program off the Neural Engine. Prediction needs macOS; `mil_interpreter` evaluates the
saved package anywhere, and that is how parity is measured here.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.converters import place
from export.draft import Draft, Job
from export.mil_interpreter import MilProgram, import_coremltools
from export.to_onnx import HALF_MAX, plain_attention, quiet
from export.verify import FLOATS
from runtime.errors import ParityError
from runtime.files import whole_folder
from runtime.manifest import Manifest

PRECISIONS = ("fp32", "fp16", "palette8", "palette6", "palette4", "int8", "sparse")
EXTRA = "coreml"
IOS = 17
FLOAT_ROWS, LOSSY_ROWS = 32, 128  # the interpreter is slower than a compiled runtime
LEAST_WEIGHTS = 2048  # smaller tensors are not worth the loss

_NAMESPACE = uuid.UUID("6f0f6a52-6f39-5c0e-9a5b-2d1f0f5a7c11")  # fixed, so that identifiers depend on the item alone


def require() -> None:
    """Raises MissingExtraError where coremltools is not installed."""
    import_coremltools("exporting to Core ML")


def drafts(job: Job, precisions: Sequence[str]) -> Iterator[Draft]:
    """One package a precision, batch 1: float32, float16, and float16 whose weights are stored in fewer bits.

    Raises:
        ParityError: a constant lies outside float16's range, or an operation is not translated.
    """
    float16: Any = None
    for precision in precisions:
        if precision == "fp32":
            converted = convert(job, half=False)
        else:
            float16 = float16 or convert(job)
            converted = float16 if precision == "fp16" else compress(float16, precision)
        path = f"coreml/{job.tower}.{precision}.mlpackage"
        program = MilProgram.open(save(converted, job.folder / path, half=precision != "fp32"))
        yield Draft(
            tower=job.tower, target="coreml", precision=precision, path=path, run=functools.partial(evaluate, program),
            how="MIL interpreter on the CPU, results rounded to the program's types; not run on an Apple device",
            most_rows=FLOAT_ROWS if precision in FLOATS else LOSSY_ROWS,
            facts={
                "deployment_target": f"iOS{job.convert.get('ios', IOS)}",
                "operations": sum(program.operation_counts().values()),
                **({} if precision in FLOATS else {"weights": check_compressed(program, precision, path)}),
            },
        )  # fmt: skip


def finish(bundle: Path, manifest: Manifest, model: Any) -> None:
    """Write what shows on a Mac that the packages compute there what they computed here: a script for coremltools and a Swift program."""
    for name in ("selfcheck.py", "selfcheck.swift"):
        shutil.copyfile(Path(__file__).parent / "kits" / f"coreml_{name}", bundle / "coreml" / name)


def convert(job: Job, *, half: bool = True) -> Any:
    """One tower as a coremltools model in memory: pixels (1, 3, H, W) float32 or tokens (1, T) int32 to the embedding (1, D) float32, unit norm."""
    ct = import_coremltools("exporting to Core ML")
    encoder = job.encoder(rescale=True)
    row = torch.from_numpy(np.ascontiguousarray(job.rows[:1]))
    with plain_attention(), quiet("coremltools", "torch.export"), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        program = torch.export.export(encoder, (row,)).run_decompositions({})
        _simplify(program)
        try:
            converted = ct.convert(
                program,
                convert_to="mlprogram",
                outputs=[ct.TensorType(name=encoder.output_name, dtype=np.float32)],
                minimum_deployment_target=getattr(ct.target, f"iOS{job.convert.get('ios', IOS)}"),
                compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
                skip_model_load=True,
            )
        except NotImplementedError as error:
            raise ParityError(f"coremltools does not translate an operation of the {job.tower} tower ({error}); {place(program, str(error))}") from error
        specification = converted.get_spec()
        given = specification.description.input[0].name
        if given != encoder.input_name:
            ct.utils.rename_feature(specification, given, encoder.input_name, rename_outputs=False)
        specification.description.metadata.ClearField("userDefined")  # holds the conversion date
        return ct.models.MLModel(specification, weights_dir=converted.weights_dir, skip_model_load=True)


def compress(model: Any, precision: str) -> Any:
    """A copy of a float16 model with its weights in fewer bits (activations stay float16).

    Args:
        precision: "palette8", "palette6", "palette4": each weight an index into a table of 2^bits values found by k-means, one table a tensor;
            "int8": linear, one scale an output channel; "sparse": the smaller half of every weight zero and not stored.
    """
    import coremltools.optimize.coreml as cto

    config: Any
    with quiet("coremltools"), contextlib.redirect_stderr(io.StringIO()):
        if precision.startswith("palette"):
            config = cto.OptimizationConfig(global_config=cto.OpPalettizerConfig(mode="kmeans", nbits=int(precision.removeprefix("palette")), weight_threshold=LEAST_WEIGHTS))
            return cto.palettize_weights(model, config)
        if precision == "int8":
            config = cto.OptimizationConfig(global_config=cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=LEAST_WEIGHTS))
            return cto.linear_quantize_weights(model, config)
        config = cto.OptimizationConfig(global_config=cto.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=LEAST_WEIGHTS))
        return cto.prune_weights(model, config)


def save(model: Any, path: str | os.PathLike[str], *, half: bool = True) -> Path:
    """Write a model as a package of reproducible bytes, under a temporary name first.

    Raises:
        ParityError: half, and a constant lies outside float16's range.
    """
    path = Path(path)
    with whole_folder(path, ".mlpackage") as temporary:
        with quiet("coremltools"), contextlib.redirect_stderr(io.StringIO()):
            model.save(str(temporary))
        make_reproducible(temporary)
        if half:
            check_constants(MilProgram.open(temporary), path.name)
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


def check_compressed(program: MilProgram, precision: str, name: str) -> dict[str, float]:
    """What became of the weights, read back from disk.

    Returns:
        {"compressed": share of the weights that are stored in fewer bits, "zeros": share of those that are zero}

    Raises:
        ParityError: a tenth of the weights or more is stored as it was, or a sparse tensor is not half zeros. A compressor that left large tensors
            alone gives a package of good parity, which nobody would ask why it is so large (numpy 2.3's percentile overflowed on float16 that way).
    """
    total = compressed = zeros = 0
    for tensor, form, values in program.weights():
        if values.size < LEAST_WEIGHTS:
            continue
        total += values.size
        if form == "const":
            continue
        compressed += values.size
        empty = int((values == 0).sum())
        zeros += empty
        if precision == "sparse" and empty < 0.45 * values.size:
            raise ParityError(f"{name}: {empty / values.size:.0%} of the weight {tensor} are zero, expected half; coremltools did not prune it, so the package is not sparse")
    if total and compressed < 0.9 * total:
        raise ParityError(f"{name}: {compressed / total:.0%} of the weights are stored in {precision}, expected at least 90 %; coremltools left the rest as they were")
    return {"compressed": round(compressed / max(total, 1), 4), "zeros": round(zeros / max(compressed, 1), 4)}


def evaluate(program: MilProgram, inputs: np.ndarray) -> np.ndarray:
    """Run a package of batch 1 over the rows of `inputs` (N, …) -> (N, D) float32."""
    name, output = program.inputs[0], program.outputs[0]
    return np.concatenate([program(**{name: inputs[i : i + 1]})[output] for i in range(len(inputs))])
