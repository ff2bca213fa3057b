"""Frozen image towers, made fast: BatchNorms folded into convolutions, and the graph handed to ONNX Runtime.

A teacher's pictures cost more than everything else in `mclip reinforce`. On one core ONNX Runtime takes about two thirds of
eager torch's time for an EfficientNet-lite. Where the exporter or the runtime cannot do a tower, torch runs it as it is.

Shapes: B = batch, S = image size, D = width of what the tower gives.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from distill.ensemble import MICRO_BATCH as MICRO_BATCH

logger = logging.getLogger(__name__)

GPU_MICRO_BATCH = 128
"""Rows a call on a GPU."""

Tower = Callable[[Tensor], Tensor]


@torch.inference_mode()
def frozen(module: nn.Module, image_size: int, device: str = "cpu") -> Tower:
    """A function pixels (B, 3, S, S) float32 -> (B, D) float32, both on the CPU, that gives what `module` gives in eval mode.

    On a GPU the module runs as it is under bfloat16 autocast. On a CPU:

    Single-threaded in ONNX Runtime (a worker is one core of many). Equal to the module within 1e-4 of its largest output, or
    the module itself is returned.
    """
    if device != "cpu":
        return autocast(module, device)
    noise = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    expected = module.eval()(noise)
    for make in (_onnx, _torch):
        try:
            fast = make(fold_norms(module), noise)
            found = fast(noise)
        except Exception as error:
            logger.info("%s cannot run this tower (%s)", make.__name__.strip("_"), error)
            continue
        if torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
            return fast
        logger.info("%s is not used for this tower: it changed the output by %.2g", make.__name__.strip("_"), float((found - expected).abs().max()))
    return _torch(module, noise)


def fold_norms(module: nn.Module) -> nn.Module:
    """A copy in eval mode with every BatchNorm folded into the convolution that stands before it.

    Siblings in a module are taken to be called one after the other, which a caller must check on the output.
    """
    fast = copy.deepcopy(module).eval()
    for parent in list(fast.modules()):
        names = list(parent._modules)
        for first, second in zip(names, names[1:], strict=False):
            conv, norm = parent._modules[first], parent._modules[second]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and norm.num_features == conv.out_channels:
                parent._modules[first] = fuse_conv_bn_eval(conv, norm)
                parent._modules[second] = getattr(norm, "act", nn.Identity())
    return fast


def autocast(module: nn.Module, device: str) -> Tower:
    """The module on a GPU, its products in bfloat16; inputs come from and answers go back to the CPU's memory."""
    there = module.eval().to(device)

    @torch.inference_mode()
    def run(rows: Tensor) -> Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            return there(rows.to(device, non_blocking=True)).float().cpu()

    return run


def _torch(module: nn.Module, noise: Tensor) -> Tower:
    last = module.eval().to(memory_format=torch.channels_last)
    return lambda pixels: last(pixels.contiguous(memory_format=torch.channels_last))


def _onnx(module: nn.Module, noise: Tensor) -> Tower:
    import onnxruntime

    graph = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's advice on its successor, which takes ten times as long
        # Tensors made under inference mode cannot be traced.
        with torch.inference_mode(False), torch.no_grad():
            torch.onnx.export(
                module, (noise.clone(),), graph, dynamo=False, opset_version=17, input_names=["pixels"], output_names=["features"],
                dynamic_axes={"pixels": {0: "batch"}, "features": {0: "batch"}},
            )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session: Any = onnxruntime.InferenceSession(graph.getvalue(), options, providers=["CPUExecutionProvider"])

    def run(pixels: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(session.run(None, {"pixels": pixels.contiguous().numpy()})[0]))

    return run
