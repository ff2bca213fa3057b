"""Encoders to LiteRT (TensorFlow Lite) for Android and other devices: one .tflite file a precision, batch 1, the same bytes each time.

The signature `serving_default` takes "image" (1, 3, H, W) float32 or "tokens" (1, T) int32 and gives "image_embedding" or "text_embedding"
(1, D) float32 of unit norm. Tokens stay int32 all the way: the end of a text is found in the graph by argmax, and LiteRT's takes no int64.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from export.converters import first_line, load, origin, require_packages, silent
from export.draft import Draft, Job
from export.to_onnx import plain_attention, quiet
from export.towers import Encoder
from runtime.errors import ParityError
from runtime.files import write_whole

PRECISIONS = ("fp32", "int8")
EXTRA = "litert"
PACKAGES = ("litert_torch", "ai_edge_litert", "ai_edge_quantizer")
SIGNATURE = "serving_default"


def require() -> None:
    """Raises MissingExtraError where the converter, the quantiser or the runtime is not installed."""
    require_packages({package: package.replace("_", "-") for package in PACKAGES}, EXTRA, "exporting to LiteRT")


def drafts(job: Job, precisions: Sequence[str]) -> Iterator[Draft]:
    """One file a precision, run with LiteRT's own interpreter.

    "int8" stores weights in 8 bits, one scale an output channel, and quantises activations while it runs; it needs no calibration.

    Raises:
        MissingExtraError: a package is not installed or does not load.
        ParityError: LiteRT lacks an operation of the tower.
    """
    require()
    for precision in precisions:
        single = job.made["litert"] = job.made.get("litert") or convert(job)
        path = f"litert/{job.tower}.{precision}.tflite"
        (job.folder / path).parent.mkdir(parents=True, exist_ok=True)
        run = LiteRtEncoder(write_whole(job.folder / path, single if precision == "fp32" else quantize(single)))
        yield Draft(
            tower=job.tower, target="litert", precision=precision, path=path, run=run, timed=True,
            how=f"ai-edge-litert {importlib.metadata.version('ai-edge-litert')} on the CPU", facts={"operations": run.operations},
        )  # fmt: skip


def convert(job: Job) -> bytes:
    """One tower as a float32 .tflite file of batch 1: (1, 3, H, W) float32 or (1, T) int32 to (1, D) float32, unit norm.

    Raises:
        ParityError: LiteRT lacks an operation; the message names it and, where that is known, the module that it comes from.
    """
    encoder = job.encoder()
    row = torch.from_numpy(np.ascontiguousarray(job.rows[:1]))
    named = _Image(encoder) if job.tower == "image" else _Text(encoder)
    with plain_attention(), quiet("torch.export", "jax", "absl"), silent(), torch.no_grad():
        litert_torch = load("litert_torch", EXTRA, "exporting to LiteRT")
        try:
            converted = litert_torch.convert(named.eval(), sample_kwargs={encoder.input_name: row})
            return bytes(converted.model_content())
        except Exception as error:  # litert-torch has no error type of its own: MLIR, torch and Python ones come through
            raise ParityError(f"LiteRT does not translate the {job.tower} tower ({first_line(error)}); {origin(encoder, row, str(error))}") from error


def quantize(model: bytes) -> bytes:
    """The dynamic int8 form of a float32 file: int8 weights, float32 inputs, outputs and whatever has no int8 kernel."""
    with quiet("absl"), silent():
        recipe = load("ai_edge_quantizer.recipe", EXTRA, "quantising for LiteRT")
        quantizer = load("ai_edge_quantizer.quantizer", EXTRA, "quantising for LiteRT")
        result = quantizer.Quantizer(bytearray(model), recipe.dynamic_wi8_afp32()).quantize()
    return bytes(result.quantized_model)


class LiteRtEncoder:
    """A .tflite file of batch 1 under LiteRT's interpreter on the CPU: callable, (N, …) -> (N, D) float32.

    Args:
        threads: of one operation.
    """

    def __init__(self, model: str | os.PathLike[str], *, threads: int = 1) -> None:
        with quiet("absl"), silent():
            interpreter = load("ai_edge_litert.interpreter", EXTRA, "running LiteRT files").Interpreter(model_path=os.fspath(model), num_threads=threads)
            interpreter.allocate_tensors()
            self.runner = interpreter.get_signature_runner(SIGNATURE)
        self.interpreter = interpreter  # the runner does not keep it alive
        (self.input_name,) = self.runner.get_input_details()
        (self.output_name,) = self.runner.get_output_details()
        self.operations = sum(item["op_name"] != "DELEGATE" for item in interpreter._get_ops_details())

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        return np.concatenate([self.runner(**{self.input_name: inputs[i : i + 1]})[self.output_name].copy() for i in range(len(inputs))])


class _Image(nn.Module):
    """Gives the file's signature its names: the converter takes them from the arguments and from the dictionary returned."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {self.encoder.output_name: self.encoder(image)}


class _Text(_Image):
    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        return {self.encoder.output_name: self.encoder(tokens)}
