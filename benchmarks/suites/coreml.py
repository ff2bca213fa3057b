"""A bundle's Core ML packages as an encoder, evaluated by the MIL interpreter: what the phone computes, on any CPU, slowly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.mil_interpreter import MilProgram
from runtime.errors import BundleError
from runtime.manifest import Manifest, read_manifest
from runtime.preprocess import preprocess
from runtime.tokenizer import Tokenizer


class CoreMLEncoder:
    """encode_image and encode_text as `runtime.evaluation` wants them. Packages have a static batch of one."""

    def __init__(self, bundle: Path) -> None:
        self.manifest: Manifest = read_manifest(bundle, verify=False)
        paths = {artefact.tower: artefact.path for artefact in self.manifest.artefacts if artefact.target == "coreml" and artefact.path}
        if set(paths) != {"image", "text"}:
            raise BundleError(f"'{bundle}' has Core ML packages for {sorted(paths) or 'no tower'}, expected image and text; export with --target coreml")
        self.programs = {tower: MilProgram.open(bundle / str(path)) for tower, path in paths.items()}
        text = self.manifest.text
        self.tokenizer = Tokenizer.open(bundle / "tokenizer.json", context_length=text.context_length, cleaning=text.cleaning, pad_id=text.pad_id)

    def encode_image(self, images: Sequence[Any]) -> np.ndarray:
        return self._run("image", "image", preprocess(list(images), self.manifest.image.preprocess_config()))

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        return self._run("text", "tokens", self.tokenizer(list(texts)))

    def _run(self, tower: str, name: str, inputs: np.ndarray) -> np.ndarray:
        program = self.programs[tower]
        return np.concatenate([next(iter(program(**{name: inputs[n : n + 1]}).values())) for n in range(len(inputs))])
