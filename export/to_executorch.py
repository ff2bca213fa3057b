"""Encoders to ExecuTorch programs (.pte) for its XNNPACK backend on CPUs of phones: one file a tower, batch 1, the same bytes each time.

XNNPACK runs the stretches of the graph whose operations it has; the rest runs one operation at a time in ExecuTorch's portable kernels, with copies between.
So attention and the L2 norm are written here as products of matrices, which XNNPACK takes: torch's own attention brings a check for rows that are masked
everywhere (eq, any, where), and its norm a power and a sum. What still falls out is listed in the facts.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.metadata
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.converters import require_packages, silent
from export.draft import Draft, Job
from export.to_onnx import plain_attention, quiet
from export.towers import after_norm, fold_norms, replace, scale_and_shift
from runtime.errors import BundleError, MissingExtraError, ParityError
from runtime.files import write_whole

PRECISIONS = ("fp32", "int8")
EXTRA = "executorch"
FLOAT_CONVOLUTIONS = 3  # from the input on: one scale cannot serve their channels
ROWS = 64  # one at a time
LEAST_ROWS = 256  # of a table worth cutting to int8


class Delegable(nn.Module):
    """A tower and its L2 norm in operations that XNNPACK takes: pixels (1, 3, H, W) float32 or tokens (1, T) int32 to (1, D) float32, unit norm."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, x: Tensor) -> Tensor:
        features = self.tower(x)
        B, D = features.shape
        squares = torch.bmm(features.reshape(B, 1, D), features.reshape(B, D, 1)).reshape(B, 1)
        return features / torch.sqrt(squares.clamp_min(1e-24))


class Table(nn.Module):
    """A token table in int8 with a scale a row, as XNNPACK's quantiser leaves tables alone: tokens (B, T) int32 to (B, T, W) float32."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
        self.register_buffer("table", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, self.table).to(torch.float32) * nn.functional.embedding(tokens, self.scale)


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """softmax(Q K' / sqrt(d) + mask) V over the last two dimensions: (…, T, d), (…, S, d), (…, S, d) -> (…, T, d); a float mask and no dropout."""
    if is_causal or dropout_p or (attn_mask is not None and not attn_mask.is_floating_point()):
        raise ParityError("an attention of this tower asks for dropout, a boolean mask or torch's own causal mask; give it a float mask that is added")
    *lead, T, d = query.shape
    S = key.shape[-2]
    scores = torch.bmm((query * (scale or d**-0.5)).reshape(-1, T, d), key.reshape(-1, S, d).transpose(1, 2))
    if attn_mask is not None:
        scores = (scores.reshape(*lead, T, S) + attn_mask).reshape(-1, T, S)
    return torch.bmm(scores.softmax(-1), value.reshape(-1, S, value.shape[-1])).reshape(*lead, T, value.shape[-1])


def _export(module: nn.Module, row: Tensor) -> Any:
    """torch.export with `attention` for torch's own, and only then: XNNPACK's passes export torch's for themselves, once a process, to search for it."""
    fused = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        with plain_attention():
            return torch.export.export(module, (row,), strict=False)
    finally:
        nn.functional.scaled_dot_product_attention = fused


@contextlib.contextmanager
def _nothing_said() -> Iterator[None]:
    """`silent`, and the loggers of what ExecuTorch is made of."""
    with quiet("torch", "torch.export", "torch.utils._pytree", "torchao", "executorch", "root"), silent():
        yield


def require() -> None:
    """Raises MissingExtraError where executorch or its quantiser torchao is not installed."""
    require_packages({name: name for name in ("executorch", "torchao")}, EXTRA, "exporting to ExecuTorch")


def drafts(job: Job, precisions: Sequence[str]) -> Iterator[Draft]:
    """One program a precision, batch 1: float32, and int8 (image: ranges from the calibration rows; text: ranges taken at run time).

    Raises:
        MissingExtraError: executorch or torchao is not installed.
        ParityError: an operation is not translated, or the runtime has no kernel for it.
    """
    require()
    version = importlib.metadata.version("executorch")
    for precision in precisions:
        data, facts = convert(job, precision)
        path = f"executorch/{job.tower}.{precision}.pte"
        (job.folder / path).parent.mkdir(parents=True, exist_ok=True)
        run = ExecutorchEncoder(write_whole(job.folder / path, data))
        threads = "one thread" if run.threads == 1 else f"{run.threads or 'an unknown number of'} threads, which cannot be held to one: its time is not taken"
        yield Draft(
            tower=job.tower, target="executorch", precision=precision, path=path, run=run, timed=run.threads == 1, most_rows=ROWS,
            how=f"executorch {version} (XNNPACK) on the CPU, {threads}", facts={**facts, "version": version, "threads": run.threads},
        )  # fmt: skip


def convert(job: Job, precision: str) -> tuple[bytes, dict[str, Any]]:
    """One tower as a program's bytes, and the facts: delegates, operations left out of them by name, bytes.

    Raises:
        ParityError: torch.export or ExecuTorch lacks an operation; the message names it and, where the exported program remembers, its module.
    """
    with _nothing_said():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

    row = torch.from_numpy(np.ascontiguousarray(job.rows[:1]))
    module = Delegable(job.encoder().tower)
    program: Any = None
    try:
        with _nothing_said(), torch.no_grad():
            if precision == "int8":
                module = quantize(module, job.rows)
            program = _export(module, row)
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            left = _left_out(lowered.exported_program())
            written = lowered.to_executorch()
    except ParityError:
        raise
    except Exception as error:
        raise ParityError(f"ExecuTorch does not translate the {job.tower} tower: {_blame(error, program, module)}") from error
    plan = written.executorch_program.execution_plan[0]
    kernels = {f"{operator.name}.{operator.overload}" if operator.overload else operator.name for operator in plan.operators}
    if missing := sorted(kernels - _kernels()):
        raise ParityError(f"ExecuTorch's runtime has no kernel for the operation {missing[0]} of the {job.tower} tower")
    return bytes(written.buffer), {"delegates": len(plan.delegates), "left_out": sum(left.values()), "left_out_operations": dict(sorted(left.items()))}


def quantize(module: nn.Module, rows: np.ndarray) -> nn.Module:
    """int8 by torchao: convolutions and linear layers, one weight scale an output channel; sums, norms and softmax stay float. Tables by `Table`.

    A tower of convolutions takes the ranges of its activations from `rows`, one without takes them at run time.
    """
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    module = without_norms(module, rows)
    for name, table in list(module.named_modules()):
        if isinstance(table, nn.Embedding) and table.num_embeddings >= LEAST_ROWS:
            replace(module, name, Table(table.weight.detach()))
    graph = _export(module, torch.from_numpy(np.ascontiguousarray(rows[:1]))).module()
    convolutions = [node.name for node in graph.graph.nodes if node.target == torch.ops.aten.conv2d.default]
    floats = set(convolutions[:FLOAT_CONVOLUTIONS])
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=not convolutions)
    quantizer = XNNPACKQuantizer().set_filter_function(lambda node: node.name not in floats)
    for operation in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default):
        quantizer.set_operator_type(operation, config)
    prepared = prepare_pt2e(graph, quantizer)
    for n in range(len(rows) if convolutions else 1):
        prepared(torch.from_numpy(rows[n : n + 1]))
    return convert_pt2e(prepared)


def pointwise(norm: nn.BatchNorm2d) -> nn.Conv2d:
    """What a batch norm computes at inference, as a convolution of one weight a channel: int8 holds those exactly."""
    factor, shift = scale_and_shift(norm)
    made = nn.Conv2d(norm.num_features, norm.num_features, 1, groups=norm.num_features)
    assert made.bias is not None
    made.weight.data, made.bias.data = factor[:, None, None, None].float(), shift.float()
    return made


def without_norms(module: nn.Module, rows: np.ndarray) -> nn.Module:
    """A copy of a `Delegable` without batch norms: folded into their own convolutions, the others as of `pointwise`.

    torchao folds a norm into whichever convolution it reads, also where a residual reads that convolution too: pocket_s kept a mean cosine of 0.64.
    """
    module = copy.deepcopy(module).eval()
    if any(isinstance(one, nn.BatchNorm2d) for one in module.modules()):
        module.tower = fold_norms(module.tower, torch.from_numpy(rows[:2]))
    for name, norm in list(module.named_modules()):
        if isinstance(norm, nn.BatchNorm2d):
            replace(module, name, nn.Sequential(pointwise(norm), *after_norm(norm)))
    return module


def _left_out(program: Any) -> Counter[str]:
    """How often each operation outside the delegates occurs, by name ("aten.embedding.default")."""
    names = [str(getattr(node.target, "_name", node.target)) for node in program.graph_module.graph.nodes if node.op == "call_function"]
    return Counter(name.replace("::", ".") for name in names if "call_delegate" not in name and "getitem" not in name)


def _kernels() -> set[str]:
    """The operations that the runtime has kernels for, by name ("aten::embedding.out")."""
    return set(_runtime()._get_operator_names())


def _runtime() -> Any:
    try:
        with _nothing_said():
            return importlib.import_module("executorch.extension.pybindings.portable_lib")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "executorch":
            raise
        raise MissingExtraError("executorch", EXTRA, "running ExecuTorch programs") from None


def _blame(error: Exception, program: Any, module: nn.Module) -> str:
    """The first line of an error, with the operation that it speaks of and the module which that came from, or the module that was being exported."""
    message = str(error)
    said = next((line.strip().rstrip(".") for line in message.splitlines() if line.strip()), type(error).__name__)
    for node in [] if program is None else program.graph_module.graph.nodes:
        name = getattr(node.target, "_name", None) if node.op == "call_function" else None  # "aten::cumprod"
        if name and any(form in message for form in (name, name.replace("::", "."))):
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            where = stack[-1][0].removeprefix("L['self'].") if stack else ""
            return f"{said}; the operation {name} comes from " + (f"the module '{where}'" if where else "a module that the program does not remember")
    names = {id(child): name for name, child in module.named_modules() if name}
    running = [names.get(id(frame.f_locals.get("self"))) for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = [name for name in running if name]
    return f"{said}; it comes from the module '{found[-1]}'" if program is None and found else said


class ExecutorchEncoder:
    """A program under ExecuTorch's Python runtime: callable, (N, …) -> (N, D) float32, one row at a time.

    The thread pool belongs to the process: opening an encoder sets it to one thread for all of them, where the runtime has a way to.

    Args:
        path: a .pte file of batch 1.

    Raises:
        MissingExtraError: executorch is not installed.
        BundleError: the runtime does not load the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        runtime = _runtime()
        self.threads = _one_thread(runtime)
        try:
            with _nothing_said():
                self.program = runtime._load_for_executorch(os.fspath(path))
                self.program.method_names()  # loading alone reads nothing
        except RuntimeError as error:
            raise BundleError(f"{Path(path).name}: ExecuTorch does not load it ({str(error).splitlines()[0]}); export it again") from error

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(np.ascontiguousarray(inputs))
        return np.concatenate([self.program.forward((rows[n : n + 1],))[0].numpy() for n in range(len(rows))])


def _one_thread(runtime: Any) -> int | None:
    """Set the process's pool to one thread; how many it has then, None where nobody knows."""
    reset: Callable[[int], None] | None = getattr(runtime, "_unsafe_reset_threadpool", None)
    count: Callable[[], int] | None = getattr(runtime, "_threadpool_get_thread_count", None)
    if reset is None or count is None:
        return None
    with _nothing_said():
        if count() != 1:
            reset(1)
        return count()
