"""Faults that exports of such models really have had, each planted into a real export or a real bundle; README.md is their list.

A fault's docstring is its line in that list. `says` is what the gate has to answer, as a regular expression: being refused for another reason is no catch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault.

    Attributes:
        plant: in a tower, changes the model in place; in a graph, takes the `Job` and gives the faulty ONNX; in a bundle, changes the folder.
        says: what the gate answers.
        tower, precision: of the artefact that must not be shipped; precision of tower faults is fp32, because they are in all.
        model: which of the test models it is planted in.
        slow: one of several that the gate meets in the same way; planted by `make test-all` only.
    """

    plant: Callable[..., Any]
    says: str
    tower: str = ""
    precision: str = "fp32"
    model: str = "pocket"
    slow: bool = False

    @property
    def line(self) -> str:
        return " ".join((self.plant.__doc__ or "").split())


def parameters(faults: dict[str, Fault]) -> list[Any]:
    """Names for `pytest.mark.parametrize`."""
    return [pytest.param(name, marks=pytest.mark.slow) if fault.slow else name for name, fault in faults.items()]


def named(faults: list[Fault]) -> dict[str, Fault]:
    """By the names of their functions."""
    return {fault.plant.__name__: fault for fault in faults}
