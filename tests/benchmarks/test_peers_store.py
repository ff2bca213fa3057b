"""The published formats beside ours: the same vectors on both sides, figures under the names that the suite prints."""

from __future__ import annotations

import numpy as np

from benchmarks.suites import peers_store


def test_both_sides_give_the_same_row(tmp_path):
    samples = peers_store.make_samples(3, 4, 2)
    store = peers_store.write_store(tmp_path / "store", samples, "int8")
    parameters = peers_store.parameters_json(samples, 1)
    ours, _ = store.read_view_float(1, 2)
    for made, read in ((peers_store.as_npz, peers_store.read_npz), (peers_store.as_bf16_gzip, peers_store.read_bf16_gzip)):
        image, text, drawn = read(made(samples, 1), parameters, 2)
        assert np.allclose(np.concatenate(ours), image, atol=0.01)
        assert np.allclose(text, samples.text[1, 0], atol=0.01)
        assert drawn == [samples.boxes[1, 2].tolist(), [list(operation) for operation in samples.operations[1][2]]]
    assert np.array_equal(peers_store.read_npz_image_only(peers_store.as_npz(samples, 1), parameters, 2)[0], samples.image[1, 2])


def test_format_figures_are_flat_and_ours_is_the_smaller_and_faster_one():
    figures = peers_store.format_figures(rows=64, peers=2, rounds=3)
    assert all(isinstance(value, float) for value in figures.values())
    for suffix in ("", "_5_5"):
        sizes = [figures[f"bytes_per_sample_{name}{suffix}"] for name in ("int4", "int8", "bf16_gzip", "npz")]
        assert sizes == sorted(sizes)
    assert figures["row_read_microseconds"] < figures["row_read_microseconds_npz"] / 10
    assert figures["row_read_microseconds"] < figures["row_read_microseconds_bf16_gzip"] / 10
    assert figures["row_read_dequantised_microseconds"] < figures["row_read_microseconds_npz_image_only"]


def test_import_figures_come_from_an_import():
    figures = peers_store.import_figures(count=5, kinds=("bf16_gzip",))
    assert figures["import_samples_per_second_bf16_gzip"] > 0
    assert 50_000 < figures["import_bytes_after_bf16_gzip"] < figures["import_bytes_before_bf16_gzip"]
