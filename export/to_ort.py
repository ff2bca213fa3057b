"""ONNX Runtime's own format for phones: the optimised graph as a flat buffer, for builds of the runtime that read nothing else.

The optimisations are those that fit every processor ("basic" and "extended"), so that a file made on one machine runs on another.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx

import export.to_onnx
from export.draft import Draft, Job
from export.to_onnx import OnnxEncoder, serialize
from runtime.files import write_whole

PRECISIONS = ("fp32", "int8")
EXTRA = "export"


def require() -> None:
    """Raises MissingExtraError where the ONNX exporter is not installed."""
    export.to_onnx.require()


def drafts(job: Job, precisions: Sequence[str]) -> Iterator[Draft]:
    """One file a precision, dynamic batch, with the list of its operations beside it (a runtime may be built with those alone)."""
    import onnxruntime

    for precision in precisions:
        model = job.onnx if precision == "fp32" else job.onnx_int8
        path = f"ort/{job.tower}.{precision}.ort"
        data = ort_bytes(model)
        (job.folder / "ort").mkdir(exist_ok=True)
        write_whole(job.folder / path, data)
        yield Draft(
            tower=job.tower, target="ort", precision=precision, path=path, run=OnnxEncoder(data), batch="dynamic", timed=True,
            how=f"onnxruntime {onnxruntime.__version__}", facts={"operations": operations(data)},
        )  # fmt: skip


def ort_bytes(model: onnx.ModelProto) -> bytes:
    """The graph as ONNX Runtime saves it after its extended optimisations.

    Of the same length and content each time, but not the same bytes: the runtime writes one of its tables in the order of a hash map.
    """
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.ort"
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(path)
        options.add_session_config_entry("session.save_model_format", "ORT")
        options.intra_op_num_threads = 1
        ort.InferenceSession(serialize(model), options, providers=["CPUExecutionProvider"])
        return path.read_bytes()


def operations(data: bytes) -> list[str]:
    """What a file runs, in the form of ONNX Runtime's configuration for reduced builds: "domain;opset;operation,operation"."""
    from onnxruntime.tools.ort_format_model import OperatorTypeUsageManager, OrtFormatModelProcessor

    required: dict[str, dict[int, set[str]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.ort"
        path.write_bytes(data)
        OrtFormatModelProcessor(str(path), required, OperatorTypeUsageManager()).process()
    return [f"{domain};{opset};{','.join(sorted(names))}" for domain, opsets in sorted(required.items()) for opset, names in sorted(opsets.items())]
