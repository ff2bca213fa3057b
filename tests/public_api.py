"""What programs outside may rely on, as text: `python -m tests.public_api > tests/golden/public_api.txt` after a change that is meant."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys

PACKAGES = ("runtime", "mobileclip")
BESIDE = {"runtime.index": ("Index", "Hit"), "runtime.errors": None, "distill.store": ("open_store", "Store"), "mobileclip.config": ("ModelConfig", "ImageConfig", "TextConfig")}
"""Modules whose names the documentation uses besides; None: all classes of its own."""


def public_api() -> str:
    """One line a name: its signature; fields of dataclasses and public methods below it; then the verbs of the command line."""
    from mobileclip.cli import VERBS

    rows: list[str] = []
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in sorted(module.__all__):
            rows += _described(f"{package}.{name}", getattr(module, name))
    for place, names in BESIDE.items():
        module = importlib.import_module(place)
        own = names or sorted(name for name, found in vars(module).items() if inspect.isclass(found) and found.__module__ == place)
        for name in own:
            rows += _described(f"{place}.{name}", getattr(module, name))
    return "\n".join([*rows, *(f"mclip {verb}" for verb in VERBS)]) + "\n"


def _described(name: str, found: object) -> list[str]:
    if inspect.isclass(found):
        rows = [f"class {name}({', '.join(base.__name__ for base in found.__bases__ if base is not object)})"]
        if dataclasses.is_dataclass(found):
            rows += [f"  {field.name}: {field.type}" for field in dataclasses.fields(found)]
        for method, value in sorted(vars(found).items()):
            kind = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            if method.startswith("_"):
                continue
            if inspect.isfunction(kind):
                rows.append(f"  {method}{_signature(kind)}")
            elif isinstance(value, property) or type(value).__name__ == "cached_property":
                rows.append(f"  {method} (property)")
        return rows
    if callable(found):
        return [f"{name}{_signature(found)}"]
    return [f"{name}: {type(found).__name__}"]


def _signature(found: object) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(found)))  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.stdout.write(public_api())
