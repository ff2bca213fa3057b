"""MobileCLIP2-S0's architecture through the exporter, at full size with random weights."""

from __future__ import annotations

import numpy as np
import pytest

from export.prune import prune_ffn
from export.to_onnx import OnnxEncoder, export_onnx, operation_counts, write_onnx
from export.towers import TOWERS, Samples, encoder_of
from export.verify import check, measure, reference_of
from mobileclip.folding import reparameterize, structured_images
from mobileclip.presets import preset
from tests.export.conftest import calibrated


@pytest.mark.slow
def test_mobileclip2_s0_exports_with_parity_and_prunes(tmp_path):
    config = preset("mobileclip2_s0")
    model = calibrated(config)
    rng = np.random.default_rng(0)
    tokens = np.zeros((8, config.text.context_length), np.int32)
    for row in tokens:
        length = int(rng.integers(3, 20))
        row[:length] = rng.integers(1, config.text.vocab_size - 2, length)
        row[0], row[length] = config.text.vocab_size - 2, config.text.vocab_size - 1
    pixels = structured_images(8, config.image.image_size, seed=9).numpy()
    samples = Samples(keys=tuple("abcdefgh"), captions=tuple("abcdefgh"), pixels=pixels, tokens=tokens)
    reference = reference_of(model, samples)
    folded, report = reparameterize(model)
    assert report.parameters_after < report.parameters_before
    for tower in TOWERS:
        exported = export_onnx(encoder_of(folded, tower), samples.inputs(tower))
        assert operation_counts(exported)["Gelu"] >= 12
        path = write_onnx(exported, tmp_path / f"{tower}.onnx")
        check(f"{tower}-onnx-fp32", measure(tower, OnnxEncoder(path)(samples.inputs(tower)), reference), "fp32")
    pruned, facts = prune_ffn(model, 0.25, samples)
    assert facts.parameters_after < 0.9 * facts.parameters_before
    assert pruned.config.ffn_widths["text.blocks.0.mlp"] == 1536
