"""What converters share beside their contract: optional packages, silence while third parties work, the places of operations that they lack."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from export.towers import Encoder
from runtime.errors import MissingExtraError

UNKNOWN = "which module it comes from is not known"


def require_packages(packages: Mapping[str, str], extra: str, purpose: str) -> None:
    """Raises MissingExtraError for the first package that is not installed. packages: what is imported to what is installed."""
    for module, package in packages.items():
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(package, extra, purpose)


def load(module: str, extra: str, purpose: str) -> Any:
    """Import a module of an optional package; MissingExtraError where that fails."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(module.split(".")[0].replace("_", "-"), extra, purpose) from error


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Nothing on the process's stdout and stderr: native libraries write there past Python's logging and sys.stdout."""
    with open(os.devnull, "w") as nowhere:
        kept = [os.dup(1), os.dup(2)]
        try:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                yield
        finally:
            for number, descriptor in zip((1, 2), kept, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)


def first_line(error: Exception) -> str:
    """What an error says, without the pages of graph that compilers print after it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def place(program: Any, message: str) -> str:
    """Which module of an exported program an operation named in `message` comes from, as half a sentence."""
    for node in program.graph_module.graph.nodes:
        name = str(node.target).split(".")
        if node.op == "call_function" and len(name) > 1 and name[1] in message:
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            if stack:
                return f"it comes from the module '{stack[-1][0].removeprefix('L[self].')}'"
    return UNKNOWN


def origin(encoder: Encoder, row: Tensor, message: str) -> str:
    """`place` for an encoder that is not exported yet."""
    try:
        return place(torch.export.export(encoder, (row,)).run_decompositions({}), message)
    except Exception:  # the export itself may be what failed; then torch's message says why
        return UNKNOWN
