"""Parity figures, thresholds, and the refusal to judge where nothing can be seen."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export.to_onnx import OnnxEncoder, serialize
from export.towers import choose_rows
from export.verify import THRESHOLDS, Parity, Reference, check, failure, measure, reference_of, require_spread, spread
from mobileclip.model import ImageTextModel
from mobileclip.presets import preset
from runtime.errors import ParityError


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


RNG = np.random.default_rng(3)
REFERENCE = Reference(image=unit(RNG.standard_normal((20, 16))), text=unit(RNG.standard_normal((20, 16))))


def test_equal_embeddings_have_perfect_figures():
    parity = measure("text", REFERENCE.text, REFERENCE)
    assert parity.cosine_min == pytest.approx(1, abs=1e-6)
    assert parity.max_abs == 0
    assert parity.rank_agreement == 1
    assert parity.recall1_change == 0
    assert parity.n == 20


def test_figures_of_one_changed_row():
    changed = REFERENCE.text.copy()
    changed[4] = -changed[4]
    parity = measure("text", changed, REFERENCE)
    assert parity.cosine_min == pytest.approx(-1, abs=1e-6)
    assert parity.cosine_mean == pytest.approx(1 - 2 / 20, abs=1e-6)
    assert parity.rank_agreement == pytest.approx(19 / 20)


def test_recall_change_counts_lost_matches():
    aligned = Reference(image=REFERENCE.image, text=REFERENCE.image.copy())
    swapped = aligned.text[[1, 0, *range(2, 20)]]
    assert measure("text", swapped, aligned).recall1_change == pytest.approx(-2 / 20)


def test_values_that_are_not_finite_fail_every_precision():
    broken = REFERENCE.image.copy()
    broken[0, 0] = np.nan
    for precision in THRESHOLDS:
        assert failure("a", measure("image", broken, REFERENCE), precision)


def test_message_names_artefact_figure_and_threshold():
    parity = Parity(cosine_min=0.99, cosine_p1=0.99, cosine_mean=0.995, max_abs=0.1, rank_agreement=1, recall1_change=0, n=7)
    with pytest.raises(ParityError, match=r"artefact image-onnx-fp32: cosine_min 0\.990000 is below 0\.99999, the least for fp32 \(over 7 samples\)"):
        check("image-onnx-fp32", parity, "fp32")
    check("image-onnx-int8", parity, "int8")


def test_wrong_width_is_refused():
    with pytest.raises(ParityError, match="shape"):
        measure("image", REFERENCE.image[:, :8], REFERENCE)


def test_spread_of_known_sets():
    assert spread(np.ones((5, 3))) == pytest.approx(1)
    assert spread(np.eye(6)) == pytest.approx(0)


def test_collapsed_or_few_embeddings_prove_nothing():
    near = unit(np.ones((8, 4)) + 1e-4 * RNG.standard_normal((8, 4)))
    with pytest.raises(ParityError, match="proves nothing"):
        require_spread(near, "the model")
    with pytest.raises(ParityError, match="at least 4 pairs"):
        require_spread(np.eye(3), "the model")
    with pytest.raises(ParityError, match="not finite"):
        require_spread(np.full((8, 4), np.nan), "the model")


def test_fresh_random_model_is_refused(samples):
    """Its batch norm statistics make all picture embeddings equal; parity on it would be empty."""
    with pytest.raises(ParityError, match="proves nothing"):
        reference_of(ImageTextModel(preset("pocket_s")).eval(), samples)


def test_perturbed_weight_is_found(pocket_bundle, samples, reference):
    model = onnx.load(pocket_bundle / "onnx/image.fp32.onnx")
    assert failure("image", measure("image", OnnxEncoder(serialize(model))(samples.pixels), reference), "fp32") is None
    kernel = max((i for i in model.graph.initializer if len(i.dims) == 4), key=lambda i: np.prod(i.dims))
    values = numpy_helper.to_array(kernel).copy()
    values.reshape(-1)[:8] += 0.5
    kernel.CopyFrom(numpy_helper.from_array(values, kernel.name))
    parity = measure("image", OnnxEncoder(serialize(model))(samples.pixels), reference)
    with pytest.raises(ParityError, match="artefact image-onnx-fp32: cosine_min"):
        check("image-onnx-fp32", parity, "fp32")


def test_chosen_rows_are_disjoint_ordered_and_reproducible():
    first, second = choose_rows(50, (20, 10), seed=1)
    assert len(set(first) | set(second)) == 30
    assert list(first) == sorted(first)
    assert all((a == b).all() for a, b in zip((first, second), choose_rows(50, (20, 10), seed=1), strict=True))
    short = choose_rows(10, (8, 4, 3), seed=0)
    assert [len(rows) for rows in short] == [8, 2, 3]
