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
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.channel_text import ChannelText
from export.converters import place
from export.draft import Draft, Job
from export.golden import read_arrays
from export.mil_interpreter import MilProgram, import_coremltools
from export.to_onnx import HALF_MAX, plain_attention, quiet
from export.towers import OUTPUT_NAMES, TOWERS, Encoder
from export.verify import FLOATS, cosines
from runtime.errors import ParityError, RecipeError
from runtime.files import whole_folder
from runtime.manifest import Artefact, Manifest
from runtime.preprocess import PreprocessConfig

PRECISIONS = ("fp32", "fp16", "mixed", "palette8", "palette6", "palette4", "int8", "w8a8", "sparse")
EXTRA = "coreml"
IOS = 17
CALIBRATION_ROWS = 32
FLOAT_ROWS, LOSSY_ROWS = 32, 128  # the interpreter is slower than a compiled runtime
KEPT_SINGLE = ("layer_norm", "softmax", "reduce_l2_norm", "reduce_mean", "reduce_sum", "real_div", "sqrt", "rsqrt")
"""Operations that "mixed" leaves in float32: where sums and small differences lose most in float16."""
FEATURES = "feature_map"
Head = Callable[[Encoder], tuple[nn.Module, list[str], dict[str, Any]]]
"""What follows an encoder of pictures: the module that holds both, the names of its outputs, further arguments of coremltools' `convert` ("preview": metadata)."""
LEAST_WEIGHTS = 2048  # smaller tensors are not worth the loss

_NAMESPACE = uuid.UUID("6f0f6a52-6f39-5c0e-9a5b-2d1f0f5a7c11")  # fixed, so that identifiers depend on the item alone


def require() -> None:
    """Raises MissingExtraError where coremltools is not installed."""
    import_coremltools("exporting to Core ML")


def drafts(job: Job, precisions: Sequence[str]) -> Iterator[Draft]:
    """One package a precision, batch 1: float32, float16, float16 with some operations in float32, float16 whose weights are stored in fewer bits.

    Raises:
        ParityError: a constant lies outside float16's range, or an operation is not translated.
    """
    yield from packages(job, precisions, "coreml")


def packages(job: Job, precisions: Sequence[str], target: str, *, picture: bool = False, head: Head | None = None) -> Iterator[Draft]:
    """Drafts of `convert`'s packages. picture, head: as there."""
    for precision in precisions:
        if precision in ("fp32", "mixed"):
            converted = convert(job, precision, picture=picture, head=head)
        else:
            float16 = job.made[target] = job.made.get(target) or convert(job, picture=picture, head=head)
            if precision == "fp16":
                converted = float16
            else:
                converted = quantize_activations(float16, job, picture=picture) if precision == "w8a8" else compress(float16, precision)
        path = f"{target}/{job.tower}.{precision}.mlpackage"
        program = MilProgram.open(save(converted, job.folder / path, half=precision != "fp32"))
        run = functools.partial(evaluate, program, output=OUTPUT_NAMES[job.tower])
        batches = _batches(job, picture)
        check_batches(program, batches[1:], job.rows, OUTPUT_NAMES[job.tower], path)
        yield Draft(
            tower=job.tower, target=target, precision=precision, path=path,
            run=(lambda rows, run=run: run(as_picture(rows, job.preprocessing))) if picture else run,
            how="MIL interpreter on the CPU, results rounded to the program's types; not run on an Apple device",
            most_rows=FLOAT_ROWS if precision in FLOATS else LOSSY_ROWS,
            facts={
                "deployment_target": f"iOS{job.convert.get('ios', IOS)}",
                "operations": sum(program.operation_counts().values()),
                **({} if precision in FLOATS else {"weights": check_compressed(program, precision, path)}),
                **({"input": "image: an RGB picture of the model's size; resize and crop before, as section 4 of the format says"} if picture else {}),
                **({"batches": batches} if len(batches) > 1 else {}),
                **({"outputs": program.outputs} if len(program.outputs) > 1 else {}),
            },
        )  # fmt: skip


def finish(bundle: Path, manifest: Manifest, model: Any, settings: dict[str, Any]) -> tuple[Artefact, ...]:
    """Write what shows on a Mac that the packages compute there what they computed here, and the packages of two functions where they are wanted."""
    for name in ("selfcheck.py", "selfcheck.swift"):
        shutil.copyfile(Path(__file__).parent / "kits" / f"coreml_{name}", bundle / "coreml" / name)
    if not settings.get("multifunction"):
        return ()
    packages = {(a.tower, a.precision): a for a in manifest.artefacts if a.target == "coreml" and a.path}
    both = [precision for tower, precision in packages if tower == "image" and ("text", precision) in packages]
    return tuple(artefact for precision in both for artefact in join(bundle, {tower: packages[tower, precision] for tower in TOWERS}))


def join(bundle: Path, packages: Mapping[str, Artefact]) -> list[Artefact]:
    """Both towers of one precision as a package of two functions, "image" and "text" (iOS 18), and its artefacts.

    Raises:
        ParityError: a function does not give bit by bit what the tower's own package gives on the golden inputs.
    """
    ct = import_coremltools("joining Core ML packages")
    precision = packages["image"].precision
    path = f"coreml/both.{precision}.mlpackage"
    descriptor = ct.utils.MultiFunctionDescriptor()
    for tower, artefact in packages.items():
        descriptor.add_function(str(bundle / str(artefact.path)), src_function_name="main", target_function_name=tower)
    descriptor.default_function_name = "image"
    with quiet("coremltools"), contextlib.redirect_stderr(io.StringIO()), whole_folder(bundle / path, ".mlpackage") as part:
        ct.utils.save_multifunction(descriptor, str(part))
        make_reproducible(part)
    golden = read_arrays(bundle)
    made = []
    for tower, artefact in packages.items():
        rows = golden["pixels" if tower == "image" else "tokens"]
        own, joined = MilProgram.open(bundle / str(artefact.path)), MilProgram.open(bundle / path, function=tower)
        if not np.array_equal(evaluate(own, rows, OUTPUT_NAMES[tower]), evaluate(joined, rows, OUTPUT_NAMES[tower])):
            raise ParityError(f"{path}: its function '{tower}' does not compute what {artefact.path} computes; leave --multifunction out and report the versions")
        facts = {**(artefact.facts or {}), "deployment_target": "iOS18", "function": tower, "same_as": artefact.id}
        made.append(replace(artefact, id=f"{artefact.id}-function", path=path, facts=facts))
    return made


def convert(job: Job, precision: str = "fp16", *, picture: bool = False, head: Head | None = None) -> Any:
    """One tower as a coremltools model in memory: pixels (1, 3, H, W) float32 or tokens (1, T) int32 to the embedding (1, D) float32, unit norm.

    Args:
        precision: "fp32", "fp16", or "mixed": float16 but for the operations of `KEPT_SINGLE`.
        picture: the image tower takes an RGB picture of 8 bits a channel, and scales and shifts it itself.
        head: what follows the encoder.
    """
    ct = import_coremltools("exporting to Core ML")
    encoder = job.encoder(rescale=True)
    if job.tower == "text" and job.convert.get("text_layout") == "channels":
        encoder = Encoder(ChannelText(encoder.tower), "text", rescale=True)
    names, module = [encoder.output_name], encoder
    row = torch.from_numpy(np.ascontiguousarray(job.rows[:1]))
    if job.tower == "image" and job.convert.get("features"):
        module, names = WithFeatures(encoder), [encoder.output_name, FEATURES]
    entries: dict[str, Any] = {}
    if head is not None:
        module, names, entries = head(encoder)
    preview = entries.pop("preview", {})
    batches = _batches(job, picture)
    if len(batches) > 1:
        shapes = ct.EnumeratedShapes(shapes=[(size, *row.shape[1:]) for size in batches], default=tuple(row.shape))
        entries["inputs"] = [ct.TensorType(name=encoder.input_name, shape=shapes, dtype=np.float32 if job.tower == "image" else np.int32)]
        row = row.repeat(2, *(1 for _ in row.shape[1:]))  # torch takes one row for a fixed number
    if picture:
        module = FromPicture(module, job.preprocessing)
        entries["inputs"] = [ct.ImageType(name=encoder.input_name, shape=tuple(row.shape), color_layout=ct.colorlayout.RGB)]
    single = ct.transform.FP16ComputePrecision(op_selector=lambda operation: operation.op_type not in KEPT_SINGLE)
    with plain_attention(), quiet("coremltools", "torch.export"), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        shapes = ({0: torch.export.Dim("batch", min=1, max=65536)},) if len(batches) > 1 else None
        program = torch.export.export(module, (row,), dynamic_shapes=shapes).run_decompositions({})
        _simplify(program)
        try:
            converted = ct.convert(
                program,
                convert_to="mlprogram",
                **entries,
                outputs=[ct.TensorType(name=name, dtype=np.float32) for name in names],
                minimum_deployment_target=getattr(ct.target, f"iOS{job.convert.get('ios', IOS)}"),
                compute_precision={"fp32": ct.precision.FLOAT32, "fp16": ct.precision.FLOAT16, "mixed": single}[precision],
                skip_model_load=True,
            )
        except NotImplementedError as error:
            raise ParityError(f"coremltools does not translate an operation of the {job.tower} tower ({error}); {place(program, str(error))}") from error
        specification = converted.get_spec()
        given = specification.description.input[0].name
        if given != encoder.input_name:
            ct.utils.rename_feature(specification, given, encoder.input_name, rename_outputs=False)
        _describe(specification.description, job)
        specification.description.metadata.userDefined.update(preview)
        return ct.models.MLModel(specification, weights_dir=converted.weights_dir, skip_model_load=True)


def _batches(job: Job, picture: bool) -> list[int]:
    """Sizes of batches that a package takes, 1 first; Core ML takes pictures one by one."""
    return [1] if picture else sorted({1, *job.convert.get("batches", ())})


def check_batches(program: MilProgram, batches: Sequence[int], rows: np.ndarray, output: str, name: str) -> None:
    """Raise ParityError unless a package computes the same for a row in each of its batch sizes as for the row alone."""
    for size in batches:
        together = np.concatenate([rows] * (size // len(rows) + 1))[:size]
        alone, found = evaluate(program, together[:3], output), program(**{program.inputs[0]: together})[output][:3]
        worst = float(cosines(alone, found).min())
        if not worst >= 0.9999:
            raise ParityError(f"{name}: in a batch of {size} a row's embedding has a cosine of {worst:.6f} to that of the row alone; leave --batches out")


class FromPicture(nn.Module):
    """An encoder of pixels as one of bytes 0 to 255 (1, 3, H, W)."""

    def __init__(self, encoder: nn.Module, config: PreprocessConfig) -> None:
        super().__init__()
        self.encoder = encoder
        mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (config.mean, config.std))
        self.register_buffer("scale", (1 / (255 * std)).float())
        self.register_buffer("shift", (mean / std).float())

    def forward(self, x: Tensor) -> Any:
        return self.encoder(x * self.scale - self.shift)


class WithFeatures(nn.Module):
    """An image encoder that also gives its backbone's last feature map, before pooling: (1, C, h, w), or (1, tokens, C) of a vision transformer."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder, self.tower = encoder, encoder.tower

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.tower.trunk.forward_features(x)
        return self.encoder.normalise(self.tower.projection(self.tower.trunk.forward_head(features))), features


def as_picture(pixels: np.ndarray, config: PreprocessConfig) -> np.ndarray:
    """Normalised pixels (N, 3, S, S) back to the bytes 0 to 255 that they were, as float32, which is how a Core ML program sees a picture."""
    mean, std = (np.asarray(values, np.float64).reshape(1, 3, 1, 1) for values in (config.mean, config.std))
    return np.rint((pixels * std + mean) * 255).clip(0, 255).astype(np.float32)


def _describe(description: Any, job: Job) -> None:
    """What Xcode shows of a package; no date, which coremltools would add."""
    description.metadata.ClearField("userDefined")
    config = getattr(job.model, "config", None)
    if config is None:
        return
    made = "a picture" if job.tower == "image" else f"{config.text.context_length} tokens"
    description.metadata.shortDescription = f"{config.name}, {job.tower} tower: {made} to an embedding of {config.embed_dim} numbers, unit norm. Scores are dot products."
    description.metadata.license = config.licence
    description.metadata.author = ", ".join(config.sources)
    description.input[0].shortDescription = (
        f"RGB picture, {config.image.image_size} x {config.image.image_size}" if job.tower == "image" else "token ids of tokenizer.json, padded to the full length"
    )
    for output in description.output:
        output.shortDescription = {OUTPUT_NAMES[job.tower]: "embedding of unit norm", "label": "the most probable class"}.get(output.name, "")


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
            weights = cto.get_weights_metadata(model, weight_threshold=LEAST_WEIGHTS)
            # Left as they are: coremltools takes the width of a range in float16, where it overflows.
            wide = {name: None for name, weight in weights.items() if np.abs(np.asarray(weight.val, np.float32)).max() > HALF_MAX / 2}
            config = cto.OptimizationConfig(
                global_config=cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=LEAST_WEIGHTS), op_name_configs=wide
            )
            return cto.linear_quantize_weights(model, config)
        config = cto.OptimizationConfig(global_config=cto.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=LEAST_WEIGHTS))
        return cto.prune_weights(model, config)


def quantize_activations(model: Any, job: Job, *, picture: bool = False) -> Any:
    """A copy of a float16 model with int8 weights and, between quantize and dequantize pairs, int8 activations ("w8a8", iOS 17).

    coremltools takes the activations' ranges from predictions, for which it needs a Mac (and keeps those of the last sample alone); here they are the
    interpreter's, over all calibration rows.

    Raises:
        RecipeError: for iOS 16, which has no such operations.
    """
    import coremltools.optimize.coreml as cto
    from coremltools.optimize.coreml import _post_training_quantization as passes

    if job.convert.get("ios", IOS) < 17:
        raise RecipeError("w8a8 needs --ios 17 or later: Core ML quantises activations since iOS 17; leave w8a8 out for older systems")
    rows = as_picture(job.rows, job.preprocessing) if picture else job.rows
    with tempfile.TemporaryDirectory() as folder:
        program = MilProgram.open(save(model, Path(folder) / "float.mlpackage", half=False))
        ranges = {name: {"rmin": low, "rmax": high} for name, (low, high) in program.ranges(rows[:CALIBRATION_ROWS]).items() if name not in program.outputs}
    # The pass would quantise sums of token places too, and fails on them.
    integers = dict.fromkeys(program.integer_operations())
    for group in program.joined_by("concat"):  # parts and whole share a scale
        known = [ranges[name] for name in group if name in ranges]
        for entry in known:
            entry.update(rmin=min(e["rmin"] for e in known), rmax=max(e["rmax"] for e in known))
    plain = cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=LEAST_WEIGHTS)
    weights, activations = cto.OptimizationConfig(global_config=plain), cto.OptimizationConfig(global_config=plain, op_name_configs=integers)
    own = passes._get_activation_calibration_stats
    passes._get_activation_calibration_stats = lambda *arguments: ranges
    try:
        with quiet("coremltools"), contextlib.redirect_stderr(io.StringIO()):
            return cto.linear_quantize_weights(cto.linear_quantize_activations(model, activations, []), weights)
    finally:
        passes._get_activation_calibration_stats = own


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
        added = specification.description.metadata.userDefined
        for key in [key for key in added if not key.startswith("com.apple.")]:  # a date, and versions that the manifest has
            del added[key]
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


def evaluate(program: MilProgram, inputs: np.ndarray, output: str | None = None) -> np.ndarray:
    """Run a package of batch 1 over the rows of `inputs` (N, …) -> (N, D) float32. output: by name, where there are several."""
    name, output = program.inputs[0], output or program.outputs[0]
    return np.concatenate([program(**{name: inputs[i : i + 1]})[output] for i in range(len(inputs))])
