"""All fourteen MobileCLIP variants and the students, at full size with random weights, through ONNX and Core ML and the gate. Minutes and gigabytes each."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from export.artefacts import Maker
from export.towers import TOWERS, Samples
from export.verify import reference_of
from mobileclip.config import ModelConfig
from mobileclip.folding import reparameterize, structured_images
from mobileclip.presets import PRESETS
from tests.export.conftest import calibrated

pytest.importorskip("coremltools")

ROWS = 6


def samples_of(config: ModelConfig) -> Samples:
    """Structured pictures and random token rows with their special tokens."""
    rng = np.random.default_rng(0)
    tokens = np.full((ROWS, config.text.context_length), config.text.pad_id, np.int32)
    for row in tokens:
        length = int(rng.integers(4, 16))
        row[: length + 1] = [config.text.vocab_size - 2, *rng.integers(1, config.text.vocab_size - 2, length - 1), config.text.vocab_size - 1]
    names = tuple("abcdef")
    return Samples(keys=names, captions=names, pixels=structured_images(ROWS, config.image.image_size, seed=9).numpy(), tokens=tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_variant(name, tmp_path):
    config = PRESETS[name]
    samples = samples_of(config)
    model = calibrated(config)
    reference = reference_of(model, samples)
    folded, _ = reparameterize(model, images=2)
    maker = Maker(
        model=folded, samples=samples, reference=reference, calibration=samples, folder=tmp_path, targets={"onnx": ("fp32", "fp16"), "coreml": ("fp16",)}, say=lambda line: None
    )
    del model
    for tower in TOWERS:
        found = {artefact.id: artefact for artefact in maker.make(tower)}
        assert set(found) == {f"{tower}-onnx-fp32", f"{tower}-onnx-fp32-static", f"{tower}-onnx-fp16", f"{tower}-coreml-fp16"}
        assert {id: artefact.reason for id, artefact in found.items() if artefact.status != "proven"} == {}
        assert found[f"{tower}-coreml-fp16"].parity["cosine_min"] >= 0.9999
        gc.collect()
