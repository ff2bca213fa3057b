"""An ONNX graph with its values looked up by name: who makes a value, who reads it, what a constant holds."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper


class Graph:
    """Look-ups over a model's main graph. Constants are kept up to date by `replace_constant`; who adds or removes nodes makes a new one."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self._initializers = {item.name: item for item in model.graph.initializer}
        self._producers = {name: node for node in model.graph.node for name in node.output if name}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in dict.fromkeys(node.input):
                if name:
                    self._readers.setdefault(name, []).append(node)
        self._outputs = {item.name for item in model.graph.output}
        self._arrays: dict[str, np.ndarray] = {}
        self._made = 0

    def producer(self, name: str) -> onnx.NodeProto | None:
        """The node that makes a value; None for inputs and constants."""
        return self._producers.get(name)

    def readers(self, name: str) -> list[onnx.NodeProto]:
        """The nodes that read a value, each once."""
        return self._readers.get(name, [])

    def is_output(self, name: str) -> bool:
        return name in self._outputs

    def constant(self, name: str) -> np.ndarray | None:
        """A constant's values; None where the value is computed."""
        if name not in self._initializers:
            return None
        if name not in self._arrays:
            self._arrays[name] = numpy_helper.to_array(self._initializers[name])
        return self._arrays[name]

    def replace_constant(self, node: onnx.NodeProto, index: int, array: np.ndarray) -> None:
        """Give one input of one node other values, of the same type; other readers of the old constant keep it."""
        old = self._initializers[node.input[index]]
        name = old.name
        if [list(reader.input).count(name) for reader in self.readers(name)] == [1]:
            old.CopyFrom(numpy_helper.from_array(array.astype(numpy_helper.to_array(old).dtype), name))
        else:
            self._made += 1
            name = f"{name}_{self._made}"
            self.model.graph.initializer.append(numpy_helper.from_array(array.astype(numpy_helper.to_array(old).dtype), name))
            self._initializers[name] = self.model.graph.initializer[-1]
            self._readers[old.name] = [reader for reader in self.readers(old.name) if reader is not node]
            self._readers[name] = [node]
            node.input[index] = name
        self._arrays.pop(name, None)
