"""The device SDK: embeds pictures and texts from a proven bundle. Imports neither torch nor anything heavy by itself.

import runtime
clip = runtime.load("bundle/")
clip.encode_text(["a red heart"])
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "load": "encoder",
    "Clip": "encoder",
    "Choice": "choice",
    "Manifest": "manifest",
    "Artefact": "manifest",
    "read_manifest": "manifest",
    "write_manifest": "manifest",
    "PreprocessConfig": "preprocess",
    "Tokenizer": "tokenizer",
    "ClassTable": "classes",
    "open_pairs": "pairs",
    "Index": "index",
    **dict.fromkeys(
        (
            "ClipError",
            "PairsError",
            "ImageError",
            "StoreError",
            "CheckpointError",
            "BundleError",
            "ParityError",
            "RecipeError",
            "TrainingError",
            "SampleError",
            "SearchError",
            "DeviceError",
            "MissingExtraError",
        ),
        "errors",
    ),
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'runtime' has no attribute '{name}'")
    return getattr(importlib.import_module(f"runtime.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
