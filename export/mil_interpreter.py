"""Evaluate a saved Core ML package on any machine, so that its numbers can be checked without a Mac.

`coremltools` converts and compresses on Linux but predicts only on macOS. `MilProgram.open` reads the specification and the
weight file of a saved `.mlpackage` back into a MIL program (what is on disk, not what the converter held in memory) and
evaluates it operation by operation in torch. Every result is rounded to the type that the program declares for it, so
a float16 program overflows and loses digits here where it would on a device that stores float16 and accumulates in
float32. What a device's own kernels add to that (float16 accumulation, fused operations) is not shown.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import export.mil_shapes  # noqa: F401  (registers its operations)
from export.mil_operations import OPERATIONS
from runtime.errors import BundleError, MissingExtraError, ParityError


class UnknownOperationError(ParityError):
    """A MIL program uses an operation that the interpreter cannot evaluate."""


class MilProgram:
    """A MIL program with its weights.

    Args:
        program: a `coremltools` MIL program (`coremltools.converters.mil.Program`).
        name: what messages call it.
        half: round every result that the program declares float16 to float16; False evaluates in float32 throughout,
            which separates the effect of stored weights from that of arithmetic.
        function: which one of a program of several.

    Raises:
        UnknownOperationError: the program holds an operation that is not in `OPERATIONS`.
    """

    def __init__(self, program: Any, *, name: str = "program", half: bool = True, function: str = "main") -> None:
        self.name = name
        self.half = half
        self.specification_version: int | None = None
        """Of the file that it was read from: 7 is iOS 16, 8 iOS 17, 9 iOS 18."""
        if function not in program.functions:
            raise BundleError(f"the Core ML program {name} has no function '{function}'; it has {', '.join(sorted(program.functions))}")
        self._function = program.functions[function]
        self.inputs: list[str] = list(self._function.inputs)
        self.outputs: list[str] = [v.name for v in self._function.outputs]
        unknown = [kind for kind in self.operation_counts() if kind not in OPERATIONS]
        if unknown:
            raise UnknownOperationError(
                f"the Core ML program {name} uses the operation {', '.join(sorted(unknown))}, which the interpreter does not know, "
                "so its parity cannot be shown here; add it to export/mil_operations.py with a test against torch"
            )
        self._constants: dict[str, Any] = {}
        for operation in self._function.operations:
            if operation.op_type == "const" or operation.op_type.startswith("constexpr_"):
                self._constants[operation.outputs[0].name] = _constant(operation)

    @classmethod
    def open(cls, path: str | Path, *, half: bool = True, function: str = "main") -> MilProgram:
        """Read a saved `.mlpackage` folder (an ML program; neural networks of the old kind are refused).

        Raises:
            BundleError: the path is no package, holds no ML program, or is damaged.
            MissingExtraError: coremltools is not installed.
        """
        path = Path(path)
        if not (path / "Manifest.json").is_file():
            raise BundleError(f"{path.name} is not a Core ML package: Manifest.json is missing; expected a folder written by `mclip export --target coreml`")
        ct = import_coremltools("reading a Core ML package")
        from coremltools.converters.mil.frontend.milproto import load as milproto

        model = ct.models.MLModel(str(path), skip_model_load=True)
        specification = model.get_spec()
        if specification.WhichOneof("Type") != "mlProgram":
            raise BundleError(
                f"{path.name} holds a {specification.WhichOneof('Type')}, expected an ML program; convert it again with a deployment target of iOS 15 or later"
            )
        try:
            program = milproto.load(specification, specification.specificationVersion, model.weights_dir)
        except (RuntimeError, ValueError, IndexError) as error:  # coremltools raises what its readers raise
            raise BundleError(f"{path.name}: the program or its weights cannot be read ({error}); the package is damaged, export it again") from None
        opened = cls(program, name=path.name, half=half, function=function)
        opened.specification_version = specification.specificationVersion
        return opened

    def operation_counts(self) -> Counter[str]:
        """How often each operation occurs; constants (plain and compressed) are left out."""
        kinds = (operation.op_type for operation in self._function.operations)
        return Counter(kind for kind in kinds if kind != "const" and not kind.startswith("constexpr_"))

    def integer_operations(self) -> list[str]:
        """Names of the operations that compute with integers (places of tokens, indices)."""
        computed = (operation for operation in self._function.operations if operation.op_type != "const" and not operation.op_type.startswith("constexpr_"))
        return [operation.name for operation in computed if any(_is_integer(value) for value in operation.inputs.values())]

    def joined_by(self, kind: str) -> Iterator[list[str]]:
        """Names of the inputs and the output of each operation of a kind."""
        for operation in self._function.operations:
            if operation.op_type == kind:
                given = [value for entry in operation.inputs.values() if isinstance(entry, list | tuple) for value in entry]
                yield [value.name for value in (*given, *operation.outputs)]

    def weights(self) -> Iterator[tuple[str, str, np.ndarray]]:
        """(name, form, values) of every float constant of two or more dimensions; form: "const" where it is stored as it is, else the operation
        that expands it ("constexpr_lut_to_dense" …)."""
        for operation in self._function.operations:
            kind, name = operation.op_type, operation.outputs[0].name
            value = self._constants.get(name) if kind == "const" or kind.startswith("constexpr_") else None
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
                yield name, kind, value.numpy()

    def constants(self) -> dict[str, np.ndarray]:
        """Every constant tensor by name, decompressed, in its stored type."""
        return {name: value.numpy() for name, value in self._constants.items() if isinstance(value, Tensor)}

    def ranges(self, rows: np.ndarray) -> dict[str, tuple[float, float]]:
        """Least and largest value of every float tensor over the rows (N, …) of the only input, by name."""
        found: dict[str, tuple[float, float]] = {}

        def see(name: str, value: Tensor) -> None:
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                low, high = float(value.min()), float(value.max())
                before = found.get(name, (low, high))
                found[name] = min(low, before[0]), max(high, before[1])

        for row in rows:
            self._evaluate({self.inputs[0]: row[None]}, see)
        return found

    def __call__(self, **inputs: np.ndarray | Tensor) -> dict[str, np.ndarray]:
        """Evaluate the program.

        Args:
            inputs: one array per program input, by its name, of the declared shape.

        Returns:
            The outputs by name: float32 or int32 arrays; of a classifier also the label and its dictionary of probabilities.
        """
        values = self._evaluate(inputs)
        return {name: _plain(values[name]) for name in self.outputs}

    @torch.no_grad()
    def _evaluate(self, inputs: Mapping[str, np.ndarray | Tensor], see: Callable[[str, Tensor], None] = lambda name, value: None) -> dict[str, Any]:
        """All values of the program by name; `see` is shown each as it is made."""
        missing = sorted(set(self.inputs) ^ set(inputs))
        if missing:
            raise ParityError(f"{self.name} takes the inputs {self.inputs}, got {sorted(inputs)}")
        values: dict[str, Any] = dict(self._constants)
        for name, given in inputs.items():
            tensor = torch.as_tensor(given)
            declared = tuple(self._function.inputs[name].shape)
            if all(isinstance(s, int | np.integer) for s in declared) and tuple(tensor.shape) != declared:
                raise ParityError(f"{self.name}: input {name} has shape {tuple(tensor.shape)}, the program declares {declared}")
            values[name] = self._rounded(tensor, self._function.inputs[name])
            see(name, values[name])
        for operation in self._function.operations:
            kind = operation.op_type
            if kind == "const" or kind.startswith("constexpr_"):
                continue
            arguments = {key: _argument(value, values) for key, value in operation.inputs.items() if value is not None}
            try:
                result = OPERATIONS[kind](**arguments)
            except (TypeError, RuntimeError, ValueError, IndexError, KeyError) as error:
                raise ParityError(f"{self.name}: the interpreter could not evaluate operation {operation.name} ({kind}): {error}") from error
            results = result if isinstance(result, tuple) else (result,)
            for variable, value in zip(operation.outputs, results, strict=True):
                values[variable.name] = self._rounded(value, variable)
                see(variable.name, values[variable.name])
        return values

    def _rounded(self, value: Any, variable: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if self.half and variable.dtype.__name__ == "fp16":
            return value.to(torch.float16).to(torch.float32)
        return value.to(torch.float32)


def import_coremltools(purpose: str) -> Any:
    """The coremltools module, without the list of what it cannot do on this machine that its import logs.

    Raises:
        MissingExtraError: it is not installed.
    """
    log = logging.getLogger("coremltools")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        import coremltools
    except ImportError as error:
        raise MissingExtraError("coremltools", "coreml", purpose) from error
    finally:
        log.setLevel(level)
    return coremltools


def _is_integer(value: Any) -> bool:
    """Whether an input is an integer tensor that another operation computes."""
    return getattr(value, "op", None) is not None and value.op.op_type != "const" and getattr(value.dtype, "__name__", "").startswith(("int", "uint"))


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | dict) else torch.as_tensor(value).numpy()


def _constant(operation: Any) -> Any:
    """A constant as torch (float32 for floats: float16 values are kept exactly) or as a Python string, boolean or list of strings."""
    value = operation.outputs[0].val
    if value is None:  # compressed constants are expanded by their own definition
        value = operation.materialized_val_inference()
    if isinstance(value, list):
        return [str(entry) for entry in value]
    if isinstance(value, str | bool | np.bool_):
        return value if isinstance(value, str) else bool(value)
    array = np.asarray(value)
    if array.dtype.kind in "US":
        return str(array)
    if array.dtype.kind == "f":
        return torch.from_numpy(np.array(array, dtype=np.float32))
    if array.dtype == np.uint32 or array.dtype.itemsize == 8:
        return torch.from_numpy(array.astype(np.int32))
    return torch.from_numpy(np.array(array))


def _argument(value: Any, values: dict[str, Any]) -> Any:
    if isinstance(value, list | tuple):
        return [_argument(item, values) for item in value]
    if value.name in values:
        return values[value.name]
    raise ParityError(f"the value {value.name} is used before it is computed: the program is damaged")
