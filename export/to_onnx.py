"""Encoders to ONNX: one file a tower, operations kept whole, nothing of the machine inside, the same bytes each time."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from export.converters import require_packages
from export.draft import Draft, Job
from export.towers import Encoder
from runtime.errors import ParityError
from runtime.files import whole_folder, write_whole

logger = logging.getLogger(__name__)

PRECISIONS = ("fp32", "fp16", "int8", "int4")
EXTRA = "export"
OPSET = 20  # the first with Gelu; LayerNormalization came with 17
HALF_MAX = 65504.0
MOST_BYTES = 2**31 - 2**20  # protobuf's limit, less some room
_FUSIONS = ("FusionConcatReshape", "FusionConvAdd", "FusionConvTransposeAdd", "FusionConvBN", "FusionConvTransposeBN", "FusionConvMul", "FusionConvTransposeMul",
            "FusionGemm", "FusionGemmMul", "FusionGemmAdd", "FusionPadConv", "FusionReduce")  # fmt: skip
LARGE = "model.onnx"  # inside the folder of a graph above it
STATIC_ROWS = 64  # the static variant differs from the other in one dimension of its shapes
Batch = Literal["dynamic", "1"]


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Switch torch's fused multi-head attention off, which exporters cannot translate, and back to what it was."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Silence the chatter of third-party converters: their warnings say nothing about our graph."""
    found = [logging.getLogger(name) for name in loggers]
    levels = [log.level for log in found]
    for log in found:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(found, levels, strict=True):
            log.setLevel(level)


def export_onnx(encoder: Encoder, example: np.ndarray, *, batch: Batch = "dynamic", opset: int = OPSET) -> onnx.ModelProto:
    """Export with torch's dynamo exporter.

    Args:
        encoder: the module, in eval mode.
        example: at least two input rows; their values do not matter.
        batch: "dynamic" leaves the first dimension open under the name "batch", "1" fixes it.

    Returns:
        A checked model of one graph with all weights inside, GELU and layer norm as single operations.

    Raises:
        ParityError: the exporter took GELU or layer norm apart (this breaks fp16 and int8 later), or left a constant that float16 cannot hold.
    """
    rows = torch.from_numpy(example[:1] if batch == "1" else np.concatenate([example[:1]] * 2))
    shapes = ({0: torch.export.Dim("batch", min=1, max=65536)},) if batch == "dynamic" else None
    with plain_attention(), quiet("torch.onnx", "onnxscript", "onnx_ir"), torch.no_grad():
        program = torch.onnx.export(
            encoder,
            (rows,),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=shapes,
            external_data=False,
            input_names=[encoder.input_name],
            output_names=[encoder.output_name],
            verbose=False,
        )
    if program is None:
        raise ParityError(f"torch returned no ONNX program for the {encoder.kind} tower")
    model = slim(program.model_proto)
    strip(model)
    onnx.checker.check_model(model)
    check_whole(model, encoder, rows)
    check_constants(model)
    return model


def with_batch_1(model: onnx.ModelProto, *, fold: bool = True) -> onnx.ModelProto:
    """A copy of a dynamic-batch model whose batch is 1, the same graph as a separate export of batch 1 gives, in a tenth of the time.

    Args:
        fold: compute shape arithmetic now. False for graphs with Q/DQ pairs, whose int8 weights folding would turn to float.
    """
    import onnxscript.optimizer

    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    if fold:
        with quiet("onnxscript", "onnx_ir"):
            fixed = onnxscript.optimizer.optimize(fixed)
    fixed = slim(fixed)
    strip(fixed)
    return fixed


def slim(model: onnx.ModelProto) -> onnx.ModelProto:
    """A graph without what computes nothing: additions of zero, shape arithmetic whose result is known, repeated constants (onnxslim). Nothing is fused: runtimes
    fuse better than a converter that does not know them. Models that protobuf cannot hold whole stay as they are."""
    if model.ByteSize() > MOST_BYTES:
        return model
    import onnxslim

    with quiet("onnxslim"):
        return onnxslim.slim(model, skip_fusion_patterns=list(_FUSIONS))


def strip(model: onnx.ModelProto) -> None:
    """Remove, in place, what tells of the machine and changes from run to run: source paths, class names, notes, recorded shapes."""
    model.producer_version = model.producer_version.split("+")[0]
    model.doc_string = ""
    del model.metadata_props[:]
    del model.graph.value_info[:]  # quantisers trip over stale shapes; readers infer their own
    for function in model.functions:
        function.doc_string = ""
        del function.metadata_props[:]
    for graph in _graphs(model.graph):
        graph.doc_string = ""
        for item in (graph, *graph.input, *graph.output, *graph.value_info, *graph.initializer, *graph.node):
            item.doc_string = ""
            del item.metadata_props[:]


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def operation_counts(model: onnx.ModelProto) -> Counter[str]:
    """How often each operation occurs in the graph."""
    return Counter(node.op_type for node in model.graph.node)


def _calls(encoder: nn.Module, rows: Tensor, kind: type[nn.Module]) -> int:
    """How often modules of a kind run in one forward pass."""
    count = 0

    def hook(*_: Any) -> None:
        nonlocal count
        count += 1

    handles = [module.register_forward_hook(hook) for module in encoder.modules() if isinstance(module, kind)]
    try:
        with torch.no_grad():
            encoder(rows)
    finally:
        for handle in handles:
            handle.remove()
    return count


def check_whole(model: onnx.ModelProto, encoder: Encoder, rows: Tensor) -> None:
    """Raise ParityError unless every GELU and layer norm of the module is one operation of the graph."""
    counts = operation_counts(model)
    for kind, operation in ((nn.GELU, "Gelu"), (nn.LayerNorm, "LayerNormalization")):
        called = _calls(encoder, rows, kind)
        if counts[operation] < called:
            raise ParityError(
                f"the {encoder.kind} tower runs {called} {kind.__name__} modules, but its ONNX graph has {counts[operation]} {operation} operations; "
                f"expected them whole: export with opset {OPSET} or later"
            )


def check_constants(model: onnx.ModelProto) -> None:
    """Raise ParityError for a floating constant outside float16's range (masks of -inf or -3e38 turn into NaN on fp16 targets)."""
    for initializer in model.graph.initializer:
        if initializer.data_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
            continue
        array = numpy_helper.to_array(initializer)
        if array.size and not np.abs(array).max() <= HALF_MAX:
            raise ParityError(
                f"the constant {initializer.name} holds {np.abs(array).max():g}, beyond float16's {HALF_MAX:g}; use a finite mask such as -1e4 in the model"
            )


def check_squares(model: onnx.ModelProto) -> None:
    """Raise ParityError where float16 values are squared: above 256 they overflow. ONNX Runtime's CPU computes such chains in float32 and would not show it."""
    inferred = onnx.shape_inference.infer_shapes(model)
    types = {item.name: item.data_type for item in inferred.graph.initializer}
    types |= {info.name: info.type.tensor_type.elem_type for info in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output)}
    for node in inferred.graph.node:
        squares = node.op_type in ("Pow", "ReduceL2", "ReduceSumSquare") or (node.op_type == "Mul" and node.input[0] == node.input[1])
        if squares and types.get(node.input[0]) == onnx.TensorProto.FLOAT16:
            raise ParityError(f"the operation {node.name} ({node.op_type}) squares float16 values, which overflow above 256; compute this norm in float32 (nn.LayerNorm is)")


def serialize(model: onnx.ModelProto) -> bytes:
    """The same bytes for the same model."""
    return model.SerializeToString(deterministic=True)


def write_onnx(model: onnx.ModelProto, path: str | os.PathLike[str], *, most_bytes: int = MOST_BYTES) -> Path:
    """Write under a temporary name, then rename. Shapes of all values are inferred and written too: compilers of some devices want them.

    Returns:
        The file; for graphs above `most_bytes` (protobuf takes 2 GB) a folder of the same name without ".onnx", with `model.onnx` and its weights in
        `model.onnx.data`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if model.ByteSize() <= most_bytes:
        return write_whole(path, serialize(onnx.shape_inference.infer_shapes(model, data_prop=True)))
    with whole_folder(path.with_suffix("")) as part:
        part.mkdir()
        copied = onnx.ModelProto()
        copied.CopyFrom(model)
        onnx.save(copied, part / LARGE, save_as_external_data=True, location=f"{LARGE}.data", size_threshold=1024)
    return path.with_suffix("")


class OnnxEncoder:
    """An ONNX file under ONNX Runtime on the CPU: callable, (N, …) -> (N, D) float32.

    Args:
        model: a path or serialised bytes.
        threads: of one operation; operations run one after the other.
        full: all graph optimisations. Half-precision text towers crash ONNX Runtime 1.31 with them, so those are checked with fewer.
    """

    def __init__(self, model: str | os.PathLike[str] | bytes, *, threads: int = 1, full: bool = True) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not full:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        source = model if isinstance(model, bytes) else os.fspath(Path(model) / LARGE if Path(model).is_dir() else model)
        self.session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        entry = self.session.get_inputs()[0]
        self.input_name = entry.name
        self.fixed = entry.shape[0] if isinstance(entry.shape[0], int) else None

    def __call__(self, inputs: np.ndarray, batch: int = 16) -> np.ndarray:
        step = self.fixed or batch
        return np.concatenate([self.session.run(None, {self.input_name: inputs[i : i + step]})[0] for i in range(0, len(inputs), step)])


def require() -> None:
    """Raises MissingExtraError where the exporter is not installed."""
    require_packages({"onnxscript": "onnxscript"}, EXTRA, "exporting to ONNX")


def drafts(job: Job, precisions: Sequence[str]) -> Iterator[Draft]:
    """fp32 and int8 with a dynamic batch and with batch 1, fp16 and int4 with a dynamic batch.

    fp16 halves the file. It is made for accelerators: ONNX Runtime's CPU has few half-precision kernels and casts between the rest. int4 keeps the weights of
    matrix products and the token table in four bits; it is made for small files.
    """
    for precision in precisions:
        if precision == "fp16":
            yield _draft(job, job.onnx_half, "fp16", "dynamic")
            continue
        if precision == "int4":
            yield _draft(job, job.onnx_int4, "int4", "dynamic")
            continue
        graph = job.onnx if precision == "fp32" else job.onnx_int8
        yield _draft(job, graph, precision, "dynamic")
        yield _draft(job, with_batch_1(graph, fold=precision == "fp32"), precision, "1")


def _draft(job: Job, model: onnx.ModelProto, precision: str, batch: Batch) -> Draft:
    import onnxruntime

    variant = "" if batch == "dynamic" else "static"
    path = f"onnx/{job.tower}.{precision}{'.static' if variant else ''}.onnx"
    half = precision == "fp16"
    shorter = None if job.tower == "image" or variant else _any_length(job, model, precision)
    written = write_onnx(shorter or model, job.folder / path)
    run: Any = OnnxEncoder(written, full=not half)
    if shorter is not None:
        from export.any_length import ShortRows

        run = ShortRows(run, job.model.config.text.pad_id, job.model.config.embed_dim)
    return Draft(
        tower=job.tower, target="onnx", precision=precision, path=written.relative_to(job.folder).as_posix(), run=run, batch=batch, variant=variant,
        timed=precision in ("fp32", "int8"), how=f"onnxruntime {onnxruntime.__version__}", most_rows=None if batch == "dynamic" else STATIC_ROWS,
        any_length=shorter is not None,
    )  # fmt: skip


def _any_length(job: Job, model: onnx.ModelProto, precision: str) -> onnx.ModelProto | None:
    """The graph for rows of any length, where the tower's mask allows it and the graph does it."""
    if job.model.config.text.mask == "none" or model.ByteSize() > MOST_BYTES:
        return None
    from export.any_length import freed  # starts from this module

    return freed(model, job.rows, job.model.config.text.pad_id, exact=precision == "fp32")
