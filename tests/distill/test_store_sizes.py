"""What the format promises in numbers: bytes a sample, microseconds a view, and the very bytes of a small store."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from distill.captions import Caption
from distill.store import Store, open_store
from distill.store_writing import PartRows, base_layer, next_layer, write_index, write_part

GOLDEN = Path(__file__).parents[1] / "golden" / "store.json"


def write_wide(folder: Path, dtype: str, rows: int, views: int, captions: int, dims: tuple[int, ...] = (768, 768)) -> Store:
    """One part with keys of 32 letters and captions of 60 bytes; random vectors."""
    rng, texts = np.random.default_rng(0), [f"{'a photograph of a wooden chair beside the window'} {n:03}" for n in range(1000)]
    made = [
        [Caption(text=f"{texts[(row + j) % 1000]} {j:07}"[:60].ljust(60, "."), type="synthetic" if j else "raw", source="coca" if j else "pairs") for j in range(captions)]
        for row in range(rows)
    ]
    assert all(len(caption.text.encode()) == 60 for own in made for caption in own)
    part = PartRows(
        keys=[hashlib.md5(str(row).encode()).hexdigest() for row in range(rows)], pair_rows=list(range(rows)), captions=made,
        augmentations=rng.integers(0, 255, (rows, views, 16), dtype=np.uint8),
        image_embeddings=[rng.standard_normal((rows, views, dim), dtype=np.float32) for dim in dims],
        text_embeddings=[rng.standard_normal((rows, captions, dim), dtype=np.float32) for dim in dims], columns={"similarity": np.zeros(rows, np.float32)},
    )  # fmt: skip
    metadata = {"format": "mclip-store", "settings_sha256": "0" * 64, "shard": "00000000", "part": "0", "input_sha256": "0" * 64, "skipped": "[]"}
    tables = {"sources": ["pairs", "coca"], "languages": ["en"]}
    entry = write_part(folder / "00000000.0000.safetensors", part, dtype=dtype, tables=tables, metadata=metadata)
    write_index(folder, {
        "rows": rows, "dtype": dtype, "seed": 0, "augmentations": views, "layers": [base_layer(views, len(dims))], **tables,
        "teachers": [{"name": f"t{n}", "dim": dim, "logit_scale": 100.0} for n, dim in enumerate(dims)],
        "parts": [{**entry, "shard": "00000000", "part": 0, "input_sha256": "0" * 64}], "columns": {"similarity": {"version": 1, "dtype": "float32"}},
    })  # fmt: skip
    return open_store(folder)


@pytest.mark.parametrize(
    ("dtype", "views", "captions", "most"), [("int8", 30, 6, 56_500), ("int4", 30, 6, 30_500), ("int8", 5, 5, 16_200), ("int4", 5, 5, 8_800)]
)
def test_bytes_a_sample(tmp_path: Path, dtype: str, views: int, captions: int, most: int) -> None:
    """Everything counts: the part's file and the index, over its rows."""
    write_wide(tmp_path, dtype, 1000, views, captions)
    size = sum(path.stat().st_size for path in tmp_path.iterdir()) / 1000
    assert most * 0.9 < size <= most


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_wide(tmp_path_factory.mktemp("wide"), "int8", 200, 30, 6)


def test_a_view_is_read_without_copying_or_decoding(wide: Store) -> None:
    values, parameters = wide.read_view(170, 2)
    again, _ = wide.read_view(170, 2)
    assert all(np.shares_memory(array, other) for (array, _), (other, _) in zip(values, again, strict=True))
    assert not any(array.flags.owndata or array.flags.writeable for array, _ in values)
    assert not parameters.flags.owndata
    decoded, _ = wide.read_view_float(170, 2)
    for t, ((array, scale), vector) in enumerate(zip(values, decoded, strict=True)):
        np.testing.assert_allclose(vector, array * np.float32(scale) / np.linalg.norm(array * np.float32(scale)), atol=1e-6)
        np.testing.assert_allclose(vector, wide.image_embeddings(t, np.array([170]), np.array([2]))[0], atol=1e-6)


def golden_store(folder: Path, dtype: str) -> dict[str, str]:
    """sha256 of every file of a store of four layers whose values are spelled out here: exact in float32, so the same everywhere."""
    tables = {"sources": ["pairs", "emoji", "coca"], "languages": ["en", "cs"]}
    steps = (np.arange(2 * 3 * 64) * 7919 % 255 - 127).astype(np.float32) / 128

    def block(*shape: int) -> np.ndarray:
        return np.resize(steps, shape).astype(np.float32)

    nothing = {"pair_rows": [], "captions": [], "augmentations": np.zeros((0, 0, 16), np.uint8), "image_embeddings": [], "text_embeddings": []}
    keys = ["0a", "ž/1"]
    captions = [[Caption(text="kočka")], [Caption(text="a dog"), Caption(text="an emoji of a dog", type="template", source="emoji", parent=0)]]
    made = [[], [Caption(text="pes", type="synthetic", source="coca", language="cs", parent=1, sentence=0)]]
    parameters = (np.arange(2 * 2 * 16) % 251).astype(np.uint8).reshape(2, 2, 16)
    layers = [
        ("rows", [0], PartRows(keys=keys, pair_rows=[0, 5], captions=captions, augmentations=parameters, image_embeddings=[block(2, 2, 64)],
                               text_embeddings=[block(2, 2, 64)], columns={"similarity": np.array([0.25, -1], np.float32), "flag": np.array([1, -2], np.int32)})),
        ("augmentations", [0], PartRows(keys=keys, **{**nothing, "augmentations": parameters[:, :1], "image_embeddings": [block(2, 1, 64)]})),
        ("captions", [0], PartRows(keys=keys, **{**nothing, "captions": made, "text_embeddings": [block(2, 1, 64)]})),
        ("teachers", [1], PartRows(keys=keys, **{**nothing, "image_embeddings": [block(2, 3, 3)], "text_embeddings": [block(2, 3, 3)]})),
    ]  # fmt: skip
    index = {
        "rows": 2, "dtype": dtype, "seed": 7, "augmentations": 2, "teachers": [{"name": "a", "dim": 64, "logit_scale": 50.0}], "layers": [base_layer(2, 1)], "parts": [],
        "columns": {"similarity": {"version": 1, "dtype": "float32"}, "flag": {"version": 1, "dtype": "int32"}}, **tables,
    }  # fmt: skip
    for number, (kind, teachers, rows) in enumerate(layers):
        if number:
            index["layers"].append(next_layer(index, kind, {"augmentations": 1, "captions": 0, "teachers": 1}[kind]))
        index["augmentations"] += kind == "augmentations"
        index["teachers"] += [{"name": "b", "dim": 3, "logit_scale": 20.0}] if kind == "teachers" else []
        path = folder / ("x.0000.safetensors" if number == 0 else f"x.0000.{number}.safetensors")
        metadata = {"format": "mclip-store", "layer": str(number)}
        index["parts"].append(write_part(path, rows, dtype=dtype, tables=tables, metadata=metadata, kind=kind, teachers=teachers))
    write_index(folder, index)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype", ["int8", "int4", "float32", "float16", "bfloat16"])
def test_golden_bytes(tmp_path: Path, dtype: str) -> None:
    """These hashes are the format. Another byte is another schema: change docs/store-format.md, SCHEMA and tests/golden/store.json together."""
    found = golden_store(tmp_path, dtype)
    assert found == json.loads(GOLDEN.read_text())[dtype]
    store = open_store(tmp_path, verify=True)
    assert [store.caption(1, j).text for j in range(3)] == ["a dog", "an emoji of a dog", "pes"]
    assert store.caption_counts.tolist() == [1, 3]
    assert store.image_embeddings("b", [1], [2]).shape == (1, 3)
