"""Parity figures, thresholds, and the refusal to judge where nothing can be seen."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export.to_onnx import OnnxEncoder, serialize
from export.towers import choose_rows
from export.verify import THRESHOLDS, Parity, Reference, at_chance, check, failure, measure, reference_of, require_spread, spread
from mobileclip.model import ImageTextModel
from mobileclip.presets import preset
from runtime.errors import ParityError


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


RNG = np.random.default_rng(3)
REFERENCE = Reference(image=unit(RNG.standard_normal((20, 16))), text=unit(RNG.standard_normal((20, 16))))


def figures(**changes: float) -> Parity:
    best = {"cosine_min": 1.0, "cosine_p1": 1.0, "cosine_mean": 1.0, "centred_p1": 1.0, "centred_mean": 1.0, "max_abs": 0.0, "rank_agreement": 1.0}
    return Parity(**{**best, "recall1_change": 0.0, "recall1_low": 0.0, "recall1_high": 0.0, "recall1_clear": 0.0, "logit_drift": 0.0, "norm_error": 0.0, "n": 7, **changes})  # type: ignore[arg-type]


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


def test_pictures_that_the_checkpoint_scores_alike_may_change_places():
    picture = unit(RNG.standard_normal((1, 16)))
    near = unit(picture + 5e-3 * RNG.standard_normal((1, 16)))
    reference = Reference(image=np.concatenate([picture, near, REFERENCE.image[2:]]), text=np.concatenate([picture, near, REFERENCE.text[2:]]))
    swapped = reference.text[[1, 0, *range(2, 20)]]
    parity = measure("text", swapped, reference)
    assert parity.rank_agreement == 1
    assert parity.recall1_change == pytest.approx(-2 / 20)  # what is seen is said, and not held against it
    assert parity.recall1_clear == 0
    check("text-onnx-fp16", figures(recall1_change=-0.1), "fp16")
    assert measure("text", reference.text[[2, 3, *range(2, 20)]], reference).rank_agreement < 1


def test_recall_change_counts_lost_matches():
    aligned = Reference(image=REFERENCE.image, text=REFERENCE.image.copy())
    swapped = aligned.text[[1, 0, *range(2, 20)]]
    parity = measure("text", swapped, aligned)
    assert parity.recall1_change == parity.recall1_clear == pytest.approx(-2 / 20)
    with pytest.raises(ParityError, match="recall1_clear -0.100000 is below -0.02"):
        check("text-onnx-fp16", figures(recall1_clear=-0.1), "fp16")


def test_values_that_are_not_finite_fail_every_precision():
    broken = REFERENCE.image.copy()
    broken[0, 0] = np.nan
    for precision in THRESHOLDS:
        assert failure("a", measure("image", broken, REFERENCE), precision)


def test_message_names_artefact_figure_and_threshold():
    parity = figures(cosine_min=0.99, centred_p1=0.985)
    with pytest.raises(ParityError, match=r"artefact image-onnx-fp32: cosine_min 0\.990000 is below 0\.99999, the least for fp32 \(over 7 samples\)"):
        check("image-onnx-fp32", parity, "fp32")
    check("image-onnx-int8", parity, "int8")
    for worse in ({"centred_p1": 0.97}, {"recall1_change": -0.006}):
        with pytest.raises(ParityError, match=r"is below (0\.98|-0\.005), the least for palette6"):
            check("image-coreml-palette6", figures(**worse), "palette6")
    check("image-onnx-int8", figures(recall1_change=-0.005), "int8")


def test_a_narrow_cone_hides_nothing_from_the_centred_cosine():
    """Embeddings that share one large direction: the plain cosine stays high while what tells them apart is lost."""
    shared, own = unit(RNG.standard_normal((1, 16))), unit(RNG.standard_normal((20, 16)))
    cone = Reference(image=unit(4 * shared + own), text=unit(4 * shared + own))
    lost = unit(4 * shared + unit(RNG.standard_normal((20, 16))))
    parity = measure("text", lost, cone)
    assert parity.cosine_min > 0.85
    assert parity.centred_mean < 0.5
    assert parity.centred_p1 < 0


def test_interval_of_the_change_is_paired():
    """Two artefacts with the same recall: one changed nothing, the other as many hits either way."""
    aligned = Reference(image=REFERENCE.image, text=REFERENCE.image.copy())
    same = measure("text", aligned.text, aligned)
    assert (same.recall1_low, same.recall1_high) == (0, 0)
    half = Reference(image=aligned.image, text=np.concatenate([aligned.text[:10], aligned.text[[11, 10, 13, 12, 15, 14, 17, 16, 19, 18]]]))
    other = measure("text", half.image[[1, 0, 3, 2, 5, 4, 7, 6, 9, 8, *range(10, 20)]], half)
    assert other.recall1_change == 0
    assert other.recall1_low < -0.2 < 0.2 < other.recall1_high


def test_embeddings_of_another_length_fail_although_their_cosines_are_right():
    parity = measure("text", 1.05 * REFERENCE.text, REFERENCE)
    assert parity.cosine_min == pytest.approx(1, abs=1e-6)
    for precision in THRESHOLDS:
        assert "differs from 1 by 0.05" in (failure("a", parity, precision) or "")


def test_logit_drift_is_in_logits():
    turned = REFERENCE.text.copy()
    turned[:, 0] *= -1
    small, large = (measure("text", turned, dataclasses.replace(REFERENCE, logit_scale=scale)).logit_drift for scale in (1.0, 50.0))
    assert large == pytest.approx(50 * small)
    assert small == pytest.approx(np.abs(2 * np.outer(REFERENCE.text[:, 0], REFERENCE.image[:, 0])).mean(), rel=1e-5)


def test_a_checkpoint_at_chance_is_known():
    assert "1 of 20" in (at_chance(dataclasses.replace(REFERENCE, text=REFERENCE.image[[0, *range(2, 20), 1]])) or "")
    assert at_chance(Reference(image=REFERENCE.image, text=REFERENCE.image)) is None


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
