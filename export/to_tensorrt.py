"""Strongly typed ONNX for TensorRT, parsed and built ahead of time on the CPU by NVIDIA's own parser and builder.

TensorRT 11 takes every tensor's type from the ONNX file (10.x with --stronglyTyped does the same), so precision is decided
here: float16 inside with explicit casts, layer norms and the L2 norm in float32. `tensorrt_rtx` builds an engine for a named
compute capability without a GPU, which proves that the file parses and compiles. It does not prove that an engine runs or
what it computes; the numbers of the ONNX itself are checked by ONNX Runtime. Where there is a GPU, `tensorrt_engine` builds,
runs and times the real engine. Engines are not kept: they belong to one driver and one GPU and their bytes vary.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx

import export.to_onnx
from export import tensorrt_engine
from export.draft import Draft, Job
from export.golden import read_arrays
from export.int8_recipe import make_int8
from export.quantize import quantize_static
from export.to_onnx import STATIC_ROWS, OnnxEncoder, serialize, write_onnx
from export.towers import TOWERS
from runtime.errors import MissingExtraError, ParityError
from runtime.files import write_json
from runtime.manifest import COSINE_MIN, Artefact, Manifest

PRECISIONS = ("fp32", "fp16", "int8")
EXTRA = "tensorrt"
FLOAT_CONVOLUTIONS = 3  # from the input on: one scale cannot serve their channels
COMPUTE_CAPABILITY = "SM89"  # Ada; any that the builder names would do
MAX_BATCH = 8

_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}
_MIXED = {"Cast", "Resize", "QuantizeLinear", "DequantizeLinear", "Where", "Pow"}  # operations whose float inputs may differ by definition


def require() -> None:
    """Raises MissingExtraError where the ONNX exporter is not installed. NVIDIA's parser is not needed to write the files, only to try them."""
    export.to_onnx.require()


def drafts(job: Job, precisions: Sequence[str]) -> Iterator[Draft]:
    """Strongly typed ONNX of dynamic batch, parsed and built ahead of time where `tensorrt_rtx` is installed.

    Raises:
        ParityError: an operation mixes float types, or the parser or the builder refuses the file.
    """
    for precision in precisions:
        model = typed_onnx(job, precision)
        path = f"tensorrt/{job.tower}.{precision}.onnx"
        run = OnnxEncoder(write_onnx(model, job.folder / path), full=precision != "fp16")
        if installed():
            try:
                facts = build_ahead(model)
            except ParityError as error:
                raise ParityError(f"artefact {job.tower}-tensorrt-{precision}: {error}") from error
            built = f"parsed and built by tensorrt-rtx {facts['version']} for {facts['compute_capability']}"
        else:
            facts = {"parsed": False, "built": False, "ran": False, "types": audit_types(model), "reason": "tensorrt-rtx-cu13 is not installed"}
            built = "neither parsed nor built: tensorrt-rtx-cu13 is not installed"
        if tensorrt_engine.available():
            engine = tensorrt_engine.Engine(model, max_batch=MAX_BATCH)
            facts = {**facts, "ran": True, "engine_version": engine.version, "engine_bytes": engine.bytes, "device": engine.device}
            yield Draft(
                tower=job.tower, target="tensorrt", precision=precision, path=path, run=engine, batch="dynamic", facts=facts, timed=True,
                how=f"TensorRT {engine.version} on {engine.device}, times with the copies to and from it",
            )  # fmt: skip
            continue
        yield Draft(
            tower=job.tower, target="tensorrt", precision=precision, path=path, run=run, batch="dynamic", facts=facts,
            how=f"ONNX Runtime on the CPU; {built}; no engine was run", most_rows=None if precision == "int8" else STATIC_ROWS,
        )  # fmt: skip


def finish(bundle: Path, manifest: Manifest, model: Any, settings: dict[str, Any]) -> tuple[Artefact, ...]:
    """Write the kit that builds and checks engines on the device: scripts for TensorRT 10 and 11, golden inputs as trtexec reads them, what to expect."""
    folder, kits = bundle / "tensorrt", Path(__file__).parent / "kits"
    golden = read_arrays(bundle)
    specs = {"image": manifest.image, "text": manifest.text}
    size, rows = manifest.image.image_size, min(MAX_BATCH, len(golden["pixels"]))
    shapes = {"image": f"3x{size}x{size}", "text": str(manifest.text.context_length)}
    made = [artefact for artefact in manifest.artefacts if artefact.target == "tensorrt" and artefact.path]
    calls = [f"build {tower} {shlex.quote(specs[tower].input)} {shapes[tower]} {rows}" for tower in TOWERS if any(a.tower == tower for a in made)]
    fill = {
        "@PRECISIONS@": " ".join(dict.fromkeys(artefact.precision for artefact in made)),
        "@MAX_BATCH@": str(MAX_BATCH),
        "@CALLS@": "\n".join(calls),
    }
    for name, kit in (("build.sh", "tensorrt_build.sh"), ("check.py", "tensorrt_check.py"), ("README.md", "tensorrt_readme.md")):
        text = (kits / kit).read_text(encoding="utf-8")
        for mark, value in fill.items():
            text = text.replace(mark, value)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "golden").mkdir()
    (folder / "golden/image.bin").write_bytes(golden["pixels"][:rows].tobytes())
    (folder / "golden/text.bin").write_bytes(golden["tokens"][:rows].tobytes())
    expected = {
        "outputs": {tower: specs[tower].output for tower in TOWERS},
        "least": {name: COSINE_MIN[name] for name in ("fp32", "fp16")} | {"lossy": COSINE_MIN["int8"]},
        "embeddings": {tower: golden[f"{tower}_embedding"][:rows].astype(float).round(8).tolist() for tower in TOWERS},
    }
    write_json(folder / "golden/expected.json", expected)
    return ()


def typed_onnx(job: Job, precision: str) -> onnx.ModelProto:
    """The strongly typed ONNX of one tower, dynamic batch.

    Args:
        precision: "fp32"; "fp16", half inside with explicit casts; "int8", symmetric Q/DQ pairs around convolutions and matrix products, floats between.

    Raises:
        ParityError: an operation mixes float types (the strongly typed parser would refuse it).
    """
    if precision == "int8":
        if job.recipe is not None:
            model = make_int8(job.onnx, job.rows, job.recipe, symmetric=True)
        else:
            model = quantize_static(job.onnx, job.rows, float_convolutions=FLOAT_CONVOLUTIONS, symmetric=True)
    else:
        model = job.onnx_half if precision == "fp16" else job.onnx
    audit_types(model)
    return model


def audit_types(model: onnx.ModelProto) -> dict[str, int]:
    """Infer the type of every tensor and check that no operation mixes float types.

    Returns:
        How many tensors (initialisers, inputs and results) have each type, by ONNX's name.

    Raises:
        ParityError: types are mixed, unknown or of 64-bit floats.
    """
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    types: dict[str, int] = {item.name: item.data_type for item in inferred.graph.initializer}
    for info in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        types[info.name] = info.type.tensor_type.elem_type
    for node in inferred.graph.node:
        unknown = [name for name in (*node.input, *node.output) if name and name not in types]
        if unknown:
            raise ParityError(f"the type of {unknown[0]} (operation {node.op_type}) cannot be inferred; a strongly typed network needs every type")
        floats = {types[name] for name in node.input if name} & _FLOATS
        if onnx.TensorProto.DOUBLE in floats:
            raise ParityError(f"operation {node.name} ({node.op_type}) computes in 64-bit floats, which TensorRT does not know")
        if len(floats) > 1 and node.op_type not in _MIXED:
            names = sorted(onnx.TensorProto.DataType.Name(kind) for kind in floats)
            raise ParityError(f"operation {node.name} ({node.op_type}) mixes the types {names}; put an explicit cast before it")
    return dict(sorted(Counter(onnx.TensorProto.DataType.Name(kind) for kind in types.values()).items()))


def installed() -> bool:
    """Whether NVIDIA's parser and builder are here."""
    return importlib.util.find_spec("tensorrt_rtx") is not None


def build_ahead(model: onnx.ModelProto, *, compute_capability: str = COMPUTE_CAPABILITY, max_batch: int = MAX_BATCH) -> dict[str, Any]:
    """Parse and compile with `tensorrt_rtx` and report the facts; the engine is dropped.

    Raises:
        MissingExtraError: the package is not installed.
        ParityError: the parser or the builder refuses the file; its own words are quoted.
    """
    if not installed():
        raise MissingExtraError("tensorrt-rtx-cu13", "tensorrt", "building a TensorRT engine ahead of time")
    import tensorrt_rtx as trt

    messages: list[str] = []

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                messages.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    started = time.perf_counter()
    if not parser.parse(serialize(model)):
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)) or "; ".join(messages)
        raise ParityError(f"TensorRT's parser refuses the file: {errors}")
    parsed = time.perf_counter()
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, compute_capability), 0)
    entry = network.get_input(0)
    if entry.shape[0] == -1:
        rest = list(entry.shape)[1:]
        profile = builder.create_optimization_profile()
        profile.set_shape(entry.name, [1, *rest], [1, *rest], [max_batch, *rest])
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ParityError(f"TensorRT's builder could not compile the file for {compute_capability}: {'; '.join(messages) or 'it gave no reason'}")
    return {
        "package": "tensorrt-rtx-cu13",
        "version": importlib.metadata.version("tensorrt-rtx-cu13"),
        "parsed": True,
        "built": True,
        "ran": False,
        "compute_capability": compute_capability,
        "batch_profile": [1, 1, max_batch],
        "layers": int(network.num_layers),
        "engine_bytes": int(engine.nbytes),
        "parse_seconds": round(parsed - started, 3),
        "build_seconds": round(time.perf_counter() - parsed, 3),
        "types": audit_types(model),
    }
