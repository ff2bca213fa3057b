"""Image-text models for the edge: presets, towers, checkpoints.

The names below are loaded on first use, so that `import mobileclip` and the command line cost no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "ModelConfig": "mobileclip.config",
    "ImageConfig": "mobileclip.config",
    "TextConfig": "mobileclip.config",
    "PRESETS": "mobileclip.presets",
    "ImageTextModel": "mobileclip.model",
    "create_model": "mobileclip.models",
    "create_model_and_transforms": "mobileclip.models",
    "get_tokenizer": "mobileclip.models",
    "reparameterize": "mobileclip.folding",
    "save_checkpoint": "mobileclip.checkpoint",
    "load_checkpoint": "mobileclip.checkpoint",
}

__all__ = ["__version__", *_NAMES]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'mobileclip' has no attribute '{name}'")
    return getattr(importlib.import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
