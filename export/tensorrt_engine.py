"""Build and run a TensorRT engine where a GPU and the package `tensorrt` are present: then the gate judges the engine itself, not the ONNX that it comes from.

Not run so far: written against the documentation of TensorRT 10 and 11, on machines without a GPU.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import onnx
import torch

from export.to_onnx import serialize
from runtime.errors import ParityError


def available() -> bool:
    """Whether engines can be built and run here."""
    return importlib.util.find_spec("tensorrt") is not None and torch.cuda.is_available()


class Engine:
    """An engine of a strongly typed ONNX: callable, (N, …) -> (N, D) float32.

    Raises:
        ParityError: the parser or the builder refuses the file; its own words are quoted.
    """

    def __init__(self, model: onnx.ModelProto, *, max_batch: int = 8) -> None:
        import tensorrt as trt

        self.max_batch = max_batch
        self.version = str(trt.__version__)
        self.device = torch.cuda.get_device_name()
        log = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(log)
        # 11 types every network by its file and may no longer have the flag.
        flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if flag is None else 1 << int(flag))
        parser = trt.OnnxParser(network, log)
        if not parser.parse(serialize(model)):
            raise ParityError("TensorRT's parser refuses the file: " + "; ".join(parser.get_error(n).desc() for n in range(parser.num_errors)))
        self.input, self.output = network.get_input(0).name, network.get_output(0).name
        rest = list(network.get_input(0).shape)[1:]
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        profile.set_shape(self.input, [1, *rest], [1, *rest], [max_batch, *rest])
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise ParityError(f"TensorRT {self.version} could not build an engine of the file on {self.device}")
        self.bytes = int(plan.nbytes)
        self._runtime = trt.Runtime(log)  # outlives the engine
        self._engine: Any = self._runtime.deserialize_cuda_engine(plan)
        self._context: Any = self._engine.create_execution_context()

    @torch.no_grad()
    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        stream = torch.cuda.Stream()
        parts = []
        for start in range(0, len(inputs), self.max_batch):
            given = torch.from_numpy(np.ascontiguousarray(inputs[start : start + self.max_batch])).cuda()
            self._context.set_input_shape(self.input, tuple(given.shape))
            made = torch.empty(tuple(self._context.get_tensor_shape(self.output)), dtype=torch.float32, device="cuda")
            self._context.set_tensor_address(self.input, given.data_ptr())
            self._context.set_tensor_address(self.output, made.data_ptr())
            torch.cuda.synchronize()  # the copy above ran on another stream
            if not self._context.execute_async_v3(stream.cuda_stream):
                raise ParityError(f"the TensorRT engine failed on a batch of {len(given)}")
            stream.synchronize()
            parts.append(made.cpu().numpy())
        return np.concatenate(parts)
