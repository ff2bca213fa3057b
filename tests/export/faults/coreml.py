"""Faults of Core ML packages, which nobody sees without a Mac: the interpreter reads them back from disk."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.draft import Job
from export.mil_interpreter import MilProgram
from export.to_coreml import drafts, evaluate
from export.towers import Encoder, encoder_of
from export.verify import Reference, failure, measure
from runtime.errors import ParityError
from tests.export.faults import Fault, named

ROWS = 12


def gate(job: Job, reference: Reference, precision: str, on_disk: Callable[[Path], None] = lambda package: None) -> str:
    """What the gate says about a package: the converter's own refusal, or the figure below its threshold."""
    try:
        (draft,) = drafts(job, (precision,))
    except ParityError as error:
        return str(error)
    on_disk(job.folder / draft.path)
    program = MilProgram.open(job.folder / draft.path)
    return failure(draft.id, measure(job.tower, evaluate(program, job.rows[:ROWS]), reference), precision) or "passes"


def threshold_overflows(job: Job, reference: Reference, monkeypatch: Any) -> str:
    """Sparsification takes its threshold from a percentile that overflows in half precision, and leaves large tensors as they were."""
    real = np.percentile
    monkeypatch.setattr(np, "percentile", lambda values, *args, **more: values.dtype.type(0) if values.size > 60_000 else real(values, *args, **more))
    return gate(job, reference, "sparse")


def palette_reversed(job: Job, reference: Reference, monkeypatch: Any) -> str:
    """The values of a palette are stored in the opposite order of what the indices mean."""
    return gate(job, reference, "palette8", lambda package: change_palettes(package, lambda values: values[::-1]))


def palette_unsigned(job: Job, reference: Reference, monkeypatch: Any) -> str:
    """The values of a palette have lost their sign."""
    return gate(job, reference, "palette8", lambda package: change_palettes(package, np.abs))


def squares_overflow(job: Job, reference: Reference, monkeypatch: Any) -> str:
    """The L2 norm of large features is taken in half precision, where it overflows, instead of dividing by the largest first."""

    class Large(torch.nn.Module):
        def __init__(self, tower: torch.nn.Module, factor: float) -> None:
            super().__init__()
            self.tower, self.factor = tower, factor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.tower(x) * self.factor

    def encoder(self: Job, rescale: bool = False) -> Encoder:
        plain = encoder_of(self.model, self.tower)
        with torch.no_grad():
            largest = float(plain.tower(torch.from_numpy(self.rows)).abs().max())
        return Encoder(Large(plain.tower, 30_000 / largest), plain.kind)

    monkeypatch.setattr(Job, "encoder", encoder)
    return gate(job, reference, "fp16")


def change_palettes(package: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Rewrite the float16 values of every palette in the weight file; a blob's header holds its length and place (coremltools' MIL storage format)."""
    from coremltools.proto import Model_pb2

    (model_path,), (weights,) = package.rglob("*.mlmodel"), package.rglob("weight.bin")
    specification = Model_pb2.Model()
    specification.ParseFromString(model_path.read_bytes())
    data, changed = bytearray(weights.read_bytes()), 0
    for function in specification.mlProgram.functions.values():
        for block in function.block_specializations.values():
            for operation in block.operations:
                if operation.type != "constexpr_lut_to_dense":
                    continue
                offset = operation.attributes["lut"].blobFileValue.offset
                _, _, length, start = struct.unpack_from("<IIQQ", data, offset)
                values = np.frombuffer(bytes(data[start : start + length]), np.float16)
                data[start : start + length] = change(values).astype(np.float16).tobytes()
                changed += 1
    assert changed
    weights.write_bytes(bytes(data))


MISSED = r"is below 0\.98, the least for palette8"

FAULTS = named(
    [
        Fault(plant=threshold_overflows, says="coremltools did not prune it", tower="text"),
        Fault(plant=palette_reversed, says=MISSED, tower="image"),
        Fault(plant=palette_unsigned, says=MISSED, tower="image", slow=True),
        Fault(plant=squares_overflow, says="the norm of an embedding differs from 1 by", tower="text"),
    ]
)
