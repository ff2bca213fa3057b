"""The text tower with other ways to find the end token, for runtimes and compilers that know no ArgMax or no gather by computed places.

Two files a precision: `onehot` multiplies by a mask of where the largest id is; `input` takes the place as a second input, `end` int32 (batch,), which a tokenizer
knows anyway.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper
from torch import Tensor

import export.to_onnx
from export.draft import Draft, Job
from export.quantize import quantize_tower
from export.to_onnx import OnnxEncoder, export_onnx, operation_counts, strip, write_onnx
from export.towers import Encoder
from runtime.errors import ParityError

PRECISIONS = ("fp32", "int8")
EXTRA = "export"
END = "end"


def require() -> None:
    """Raises MissingExtraError where the ONNX exporter is not installed."""
    export.to_onnx.require()


def drafts(job: Job, precisions: Sequence[str]) -> Iterator[Draft]:
    """The text tower of models that pool at the end token; nothing for others, and nothing for pictures."""
    import onnxruntime

    if job.tower != "text" or job.model.config.text.pool != "eot":
        return
    onehot = job.made["onnx-eot"] = job.made.get("onnx-eot") or export_onnx(onehot_encoder(job), job.rows)
    if "ArgMax" in operation_counts(onehot):
        raise ParityError("the text tower's graph still has an ArgMax with the one-hot pool; report the model's configuration")
    for precision in precisions:
        graphs = {
            "onehot": onehot if precision == "fp32" else quantize_tower(onehot, job.rows),
            "input": end_as_input(job.onnx if precision == "fp32" else job.onnx_int8),
        }
        for variant, graph in graphs.items():
            path = f"onnx-eot/text.{precision}.{variant}.onnx"
            file = write_onnx(graph, job.folder / path)
            yield Draft(
                tower="text", target="onnx-eot", precision=precision, path=path, run=OnnxEncoder(file) if variant == "onehot" else EndEncoder(file), batch="dynamic",
                variant=variant, how=f"onnxruntime {onnxruntime.__version__}",
                facts={"inputs": ["tokens"] if variant == "onehot" else ["tokens", f"{END}: int32 (batch,), the place of the end token"]},
            )  # fmt: skip


def onehot_encoder(job: Job) -> Encoder:
    """The text tower whose pool sums rows times a mask: no ArgMax, no gather. The end token has the largest id and comes once a row."""
    tower = copy.deepcopy(job.model.text)

    def pool(x_BTW: Tensor, tokens: Tensor) -> Tensor:
        here = (tokens == tokens.amax(dim=1, keepdim=True)).to(x_BTW.dtype)
        return (x_BTW * here[:, :, None]).sum(dim=1)

    tower.pool = pool
    return Encoder(tower, "text")


def end_as_input(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with its ArgMax replaced by a second input.

    Raises:
        ParityError: the graph has not exactly one ArgMax.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    found = [node for node in graph.node if node.op_type == "ArgMax"]
    if len(found) != 1:
        raise ParityError(f"the text tower's graph has {len(found)} ArgMax operations, expected one: where the end token is sought; report the model's configuration")
    place = list(graph.node).index(found[0])
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param or "batch"
    graph.input.append(helper.make_tensor_value_info(END, TensorProto.INT32, [batch]))
    keeps = next((attribute.i for attribute in found[0].attribute if attribute.name == "keepdims"), 1)
    output = found[0].output[0]
    graph.node.remove(found[0])
    whole = helper.make_node("Cast", [END], [output if not keeps else f"{END}_int64"], name="end_cast", to=TensorProto.INT64)
    graph.node.insert(place, whole)
    if keeps:
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([1], np.int64), f"{END}_axis"))
        graph.node.insert(place + 1, helper.make_node("Unsqueeze", [f"{END}_int64", f"{END}_axis"], [output], name="end_column"))
    _drop_unread(graph)
    strip(changed)
    onnx.checker.check_model(changed)
    return changed


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Remove, in place, operations whose results nobody reads (what prepared the tokens for the ArgMax)."""
    while True:
        read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
        idle = [node for node in graph.node if not set(node.output) & read]
        if not idle:
            return
        for node in idle:
            graph.node.remove(node)


class EndEncoder(OnnxEncoder):
    """A graph that is told where the end token is: callable, tokens (N, T) -> (N, D) float32."""

    def __call__(self, inputs: np.ndarray, batch: int = 16) -> np.ndarray:
        ends = inputs.argmax(axis=1).astype(np.int32)
        names = [entry.name for entry in self.session.get_inputs()]
        parts = []
        for start in range(0, len(inputs), batch):
            given = {"tokens": inputs[start : start + batch], END: ends[start : start + batch]}
            parts.append(self.session.run(None, {name: given[name] for name in names})[0])
        return np.concatenate(parts)
