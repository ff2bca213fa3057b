"""Encoders to Core AI, the successor of Core ML from iOS and macOS 27: assets (.aimodel folders) of batch 1 and reproducible bytes.

Apple's own runtime evaluates the saved asset here. On Linux it is an interpreter made to be right, not fast: its times say nothing of a device.
fp16 and what is smaller compute in float16, with layer norms and the L2 norm in float32 between explicit casts.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from export.converters import first_line, load, origin, require_packages, silent
from export.draft import Draft, Job
from export.to_onnx import plain_attention, quiet
from export.verify import FLOATS
from runtime.errors import ParityError
from runtime.files import whole_folder, write_whole

PRECISIONS = ("fp32", "fp16", "palette6", "palette4", "int8")
EXTRA = "coreai"
PACKAGES = {"coreai_torch": "coreai-torch", "coreai": "coreai-core", "coreai_opt": "coreai-opt"}
FLOAT_ROWS, LOSSY_ROWS = 16, 64  # seconds a picture at full size
LEAST_WEIGHTS = 2048  # smaller tensors are not worth the loss
ALIGNMENT = 16  # bytes, of large constants, as coreai's own; readers refuse a file that asks for more than their buffer has
PURPOSE = "exporting to Core AI"


def require() -> None:
    """Raises MissingExtraError where the converter, the runtime or the compressor is not installed."""
    require_packages(PACKAGES, EXTRA, PURPOSE)


def drafts(job: Job, precisions: Sequence[str]) -> Iterator[Draft]:
    """One asset a precision: float32, float16, and float16 whose weights are stored in fewer bits.

    Raises:
        MissingExtraError: a package is not installed or does not load.
        ParityError: Core AI lacks an operation of the tower, or a weight was left uncompressed.
    """
    require()
    for precision in precisions:
        program = convert(job, half=precision != "fp32")  # anew each time: names taken in a program's context would show in the next one's
        facts: dict[str, Any] = {"minimum_os": 27}
        if precision not in FLOATS:
            program, facts["compressed_tensors"] = compress(program, precision)
        path = f"coreai/{job.tower}.{precision}.aimodel"
        asset = save(program, job.folder / path)
        products = "" if precision == "fp32" else ", half-precision matrix products taken in float32 and rounded"
        yield Draft(
            tower=job.tower, target="coreai", precision=precision, path=path, run=functools.partial(evaluate, asset),
            how=f"Core AI runtime (coreai-core {importlib.metadata.version('coreai-core')}) on the CPU{products}; not run on an Apple device",
            most_rows=FLOAT_ROWS if precision in FLOATS else LOSSY_ROWS, facts=facts | {"operations": operations(program)},
        )  # fmt: skip


def convert(job: Job, *, half: bool) -> Any:
    """One tower as a `coreai.authoring.AIProgram`: pixels (1, 3, H, W) float32 or tokens (1, T) int32 to (1, D) float32, unit norm.

    Args:
        half: as of `Job.half_encoder`.

    Raises:
        ParityError: Core AI lacks an operation; the message names it and, where that is known, the module that it comes from.
    """
    encoder = job.half_encoder() if half else job.encoder()
    row = torch.from_numpy(np.ascontiguousarray(job.rows[:1]))
    with plain_attention(), quiet("torch.export"), silent(), torch.no_grad():
        coreai_torch = load("coreai_torch", EXTRA, PURPOSE)
        exported = torch.export.export(encoder, (row,)).run_decompositions(coreai_torch.get_decomp_table())
        converter = coreai_torch.TorchConverter(mode=coreai_torch.TorchConverter.Mode.RELEASE)  # DEBUG would record stack traces with their paths
        try:
            with _steady_names():
                converter.add_exported_program(exported, input_names=[encoder.input_name], output_names=[encoder.output_name])
                return converter.to_coreai()
        except (ValueError, RuntimeError, NotImplementedError, KeyError, TypeError) as error:
            raise ParityError(f"Core AI does not translate the {job.tower} tower ({first_line(error)}); {origin(encoder, row, str(error))}") from error


def compress(program: Any, precision: str) -> tuple[Any, int]:
    """A copy of a float16 program with its weights in fewer bits (activations stay float16), and how many tensors were compressed.

    Args:
        precision: "palette6", "palette4": each weight an index into a table of 2^bits values found by k-means, one table a tensor;
            "int8": linear and symmetric, one scale an output channel.

    Raises:
        ParityError: nothing was compressed. coreai-opt only logs the weights that it cannot compress.
    """
    with quiet("coreai_opt"), silent():
        utils = load("coreai_opt.coreai_utils", EXTRA, "compressing for Core AI")
        if precision == "int8":
            small = utils.quantize_weights(program, dtype=utils.DType.INT8, weight_num_threshold=LEAST_WEIGHTS)
        else:
            with mock.patch("coreai_opt.coreai_utils._utils.palettize_utils._get_kmeans_lookup_table_and_weight", palette):
                small = utils.palettize_weights(
                    program, lut_dtype=None, n_bits=int(precision.removeprefix("palette")), weight_num_threshold=LEAST_WEIGHTS,
                    num_kmeans_workers=1, enable_fast_kmeans_mode=False,
                )  # fmt: skip
    made = "coreai.blockwise_shift_scale" if precision == "int8" else "coreai.lut_to_dense"
    count = sum(item.name == made for item in walk(small))
    if not count:
        raise ParityError(f"coreai-opt compressed no weight to {precision}; expected {made} operations in the program")
    return small, count


def palette(nbits: int, weight: np.ndarray, *_: Any, **__: Any) -> tuple[np.ndarray, np.ndarray]:
    """K-means in one dimension: any weight to (2^nbits,) table values in ascending order and (weights,) indices.

    Takes the place of coreai-opt's own, which compiles a C++ extension when first used and, where it cannot, leaves the weights alone.
    """
    values, inverse, counts = np.unique(weight.astype(np.float64).ravel(), return_inverse=True, return_counts=True)
    table = np.zeros(1 << nbits)
    size = min(len(values), len(table))
    # Start where many values lie close together, but less so than they lie (Panter and Dite 1951: density to the power of a third).
    if size < len(values):
        gaps = np.gradient(values)
        filled = np.cumsum(np.cbrt(counts / gaps) * gaps)
        centres = np.interp((np.arange(size) + 0.5) / size * filled[-1], filled, values)
    else:
        centres = values
    mass, moment = (np.concatenate([[0], np.cumsum(part)]) for part in (counts, counts * values))
    for _round in range(1000):
        borders = np.searchsorted(values, (centres[1:] + centres[:-1]) / 2)
        first, last = np.concatenate([[0], borders]), np.concatenate([borders, [len(values)]])
        inside = mass[last] - mass[first]
        moved = np.where(inside > 0, (moment[last] - moment[first]) / np.maximum(inside, 1), centres)
        if np.allclose(moved, centres, rtol=0, atol=1e-9):
            break
        centres = moved
    table[:size] = centres
    return table, np.searchsorted((centres[1:] + centres[:-1]) / 2, values)[inverse.ravel()]


def save(program: Any, path: Path) -> Path:
    """Write a program as an asset of reproducible bytes, under a temporary name first. The program's resources are renamed in place."""
    with whole_folder(path, ".aimodel") as temporary:
        with quiet("coreai"), silent():
            _name_resources(program)
            program.save_asset(temporary)
        metadata = json.loads((temporary / "metadata.json").read_text(encoding="utf-8"))
        metadata.pop("creationDate", None)
        write_whole(temporary / "metadata.json", (json.dumps(metadata, indent=2, sort_keys=True) + "\n").encode())
    return path


@contextlib.contextmanager
def _steady_names() -> Iterator[None]:
    """Give inner graphs the same names in every conversion: coreai appends random letters."""
    for name in ("func", "graph_builder"):
        load(f"coreai.authoring.{name}", EXTRA, PURPOSE)
    with mock.patch("coreai.authoring.func.choice", random.Random(0).choice), mock.patch("coreai.authoring.graph_builder.choice", random.Random(0).choice):
        yield


def walk(program: Any) -> list[Any]:
    """Every operation of a program, in its order."""
    from coreai._compiler.ir import WalkResult

    found: list[Any] = []

    def visit(operation: Any) -> Any:
        found.append(operation)
        return WalkResult.ADVANCE

    program._module._mlir_module.operation.walk(visit)
    return found


def operations(program: Any) -> int:
    """How many operations compute something."""
    return sum(item.name.startswith("coreai.") and item.name not in ("coreai.constant", "coreai.graph", "coreai.output", "coreai.invoke") for item in walk(program))


def _name_resources(program: Any) -> None:
    """Name large constants after their content, in place: coreai gives them random numbers."""
    from coreai._compiler._mlir_libs._coreaiIR import _bindings
    from coreai._compiler.ir import DenseResourceElementsAttr

    named: dict[str, Any] = {}
    for item in walk(program):
        value = item.attributes["value"] if item.name == "coreai.constant" else None
        if value is None or not DenseResourceElementsAttr.isinstance(value) or str(value).startswith("dense_resource<w_"):
            continue
        kind = item.result.type
        data = np.zeros((int(np.prod(kind.shape)) * kind.element_type.width + 7) // 8, np.uint8)
        _bindings.compiler.copy_constant_value_to_array(constant_op=item, destination=data)
        name = f"w_{hashlib.sha256(str(kind).encode() + data.tobytes()).hexdigest()[:16]}"
        if name not in named:
            named[name] = DenseResourceElementsAttr.get_from_buffer(data, name, kind, ALIGNMENT, context=item.context)
        item.attributes["value"] = named[name]


def evaluate(asset: Path, inputs: np.ndarray) -> np.ndarray:
    """Run a saved asset of batch 1 in Apple's runtime over the rows of `inputs` (N, …) -> (N, D) float32."""
    with tempfile.TemporaryDirectory() as folder, quiet("coreai"), silent():
        authoring = load("coreai.authoring", EXTRA, "running Core AI assets")
        program = authoring.AIModelAsset.load(asset).program
        widened = program.save_asset(Path(folder) / "widened.aimodel") if _widen_products(program) else authoring.AIModelAsset.load(asset)
        return asyncio.run(_run(widened, inputs))


def _widen_products(program: Any) -> int:
    """Take half-precision matrix products in float32 and round the results, in place; returns how many.

    The runtime on Linux multiplies half-precision matrices some 200 times more slowly than float32 ones (minutes a text).
    """
    from coreai._compiler.dialects import coreai
    from coreai._compiler.ir import F16Type, F32Type, InsertionPoint, RankedTensorType

    count = 0
    for item in walk(program):
        if not item.name.endswith("batch_matmul") or not F16Type.isinstance(item.result.type.element_type):
            continue
        with item.context, item.location, InsertionPoint(item):
            wide = F32Type.get()
            x, y = (coreai.CastOp(RankedTensorType.get(value.type.shape, wide), value).result for value in item.operands)
            product = item.clone()
            product.operands[0], product.operands[1] = x, y
            product.results[0].set_type(RankedTensorType.get(item.result.type.shape, wide))
            item.result.replace_all_uses_with(coreai.CastOp(item.result.type, product.results[0]).result)
        item.erase()
        count += 1
    return count


async def _run(asset: Any, inputs: np.ndarray) -> np.ndarray:
    from coreai.runtime import NDArray

    async with asset.executable() as model:
        function = model.load_function("main")
        (given,), (made,) = function.desc.input_names, function.desc.output_names
        return np.concatenate([(await function({given: NDArray(np.ascontiguousarray(inputs[i : i + 1]))}))[made].numpy().copy() for i in range(len(inputs))])
