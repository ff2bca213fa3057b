"""Published samples from the network: what is sound decodes, what is not is one sentence and never runs."""

from __future__ import annotations

import gzip
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.datacompdr_samples import MAX_VECTORS, DamagedSampleError, read_npz, read_pth_gz, read_sample

from .datacompdr_world import DIMS, make_samples, npz, pth_gz, published

NAMES = ("first", "second")
SAMPLE = make_samples(1)[0]


def read(members: dict[str, bytes]) -> Any:
    return read_sample({name: data for name, data in members.items() if name != "url.txt"}, DIMS, NAMES)


def with_vectors(**changes: np.ndarray) -> dict[str, bytes]:
    return {**published(SAMPLE), "npz": npz({"image_emb": SAMPLE.image_emb, "text_emb": SAMPLE.text_emb, **changes})}


def with_json(name: str, value: Any) -> dict[str, bytes]:
    return {**published(SAMPLE), name: json.dumps(value).encode()}


@pytest.mark.parametrize("kind", ["npz", "pth.gz"])
@pytest.mark.parametrize("parameters", ["string", "list"])
@pytest.mark.parametrize("layout", ["old", "new"])
def test_every_published_layout_decodes_alike(kind, parameters, layout):
    found = read(published(SAMPLE, kind=kind, parameters=parameters, layout=layout))
    tolerance = 1e-6 if kind == "npz" else 2**-8
    assert np.allclose(np.concatenate(found.image, axis=1), SAMPLE.image_emb, atol=tolerance)
    assert np.allclose(np.concatenate(found.texts, axis=1), SAMPLE.text_emb, atol=tolerance)
    assert all(np.allclose((part * part).sum(axis=1), 1, atol=1e-6) for part in (*found.image, *found.texts))
    assert found.boxes.tolist() == SAMPLE.boxes
    assert [[list(operation) for operation in view] for view in found.operations] == SAMPLE.operations
    assert (found.captions, found.sha256) == ([(text, "syn_text") for text in SAMPLE.synthetic], SAMPLE.sha256)


def test_fp32_is_preferred_where_both_are_there():
    both = {**published(SAMPLE, kind="pth.gz"), **published(SAMPLE)}
    assert np.allclose(np.concatenate(read(both).image, axis=1), SAMPLE.image_emb, atol=1e-6)


def test_several_captioners_are_read_in_order():
    members = with_json("syn.json", {"syn_text_b": SAMPLE.synthetic[:2], "other": 1, "syn_text_a": SAMPLE.synthetic[2:]})
    assert [name for _, name in read(members).captions] == ["syn_text_b"] * 2 + ["syn_text_a"] * 3
    members["npz"] = npz({
        "image_emb": SAMPLE.image_emb, "text_emb": SAMPLE.text_emb[:1], "syn_text_a_emb": SAMPLE.text_emb[3:], "syn_text_b_emb": SAMPLE.text_emb[1:3],
    })  # fmt: skip
    assert np.allclose(np.concatenate(read(members).texts, axis=1), SAMPLE.text_emb, atol=1e-6)


def test_captions_without_a_text_are_left_out_with_their_vectors():
    texts = ["", "one\n two", "\ud800", "four", " "]
    found = read(with_json("syn.json", {"syn_text": texts}))
    assert found.captions == [("one two", "syn_text"), ("four", "syn_text")]
    assert np.allclose(np.concatenate(found.texts, axis=1), SAMPLE.text_emb[[0, 2, 4]], atol=1e-6)


def test_a_view_without_operations_is_a_crop():
    given = [[box, None] for box in SAMPLE.boxes]
    assert read(with_json("paug.json", {"param_aug": given})).operations == [[]] * len(SAMPLE.boxes)


def bomb_npz() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image_emb.npy", bytes(MAX_VECTORS + 1))
    return out.getvalue()


def lying_npz() -> bytes:
    """A header that claims a terabyte, and 64 bytes of values."""
    out = io.BytesIO()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 18, 1 << 20)})
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("image_emb.npy", header.getvalue() + bytes(64))
    return out.getvalue()


def bomb_in_torch() -> bytes:
    """A zip inside the gzip, whose own member is deflated zeros."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(MAX_VECTORS + 1))
    return gzip.compress(out.getvalue())


class Evil:
    """What unpickling would call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


VECTORS = [
    ("neither", "npz", None),
    ("does not unpack", "npz", b""),
    ("does not unpack", "npz", b"PK" + bytes(100)),
    ("more than 32 MB", "npz", bomb_npz()),
    ("rows of floats", "npz", lying_npz()),
    ("rows of floats", "npz", npz({"image_emb": np.zeros(3, np.float32)})),
    ("rows of floats", "npz", npz({"image_emb": np.zeros((3, 3), np.int64)})),
    ("named nothing", "npz", npz({})),
    ("does not unpack", "pth.gz", b"no gzip"),
    ("is truncated", "pth.gz", gzip.compress(bytes(100000), mtime=0)[:-9]),
    ("does not unpack", "pth.gz", gzip.compress(b"no zip", mtime=0)),
    ("more than 32 MB", "pth.gz", gzip.compress(bytes(MAX_VECTORS + 1), mtime=0)),
    ("more than 32 MB", "pth.gz", bomb_in_torch()),
    ("more than 32 MB", "pth.gz", pth_gz({"image_emb": torch.zeros(1).expand(1 << 20, 1 << 20)})),
    ("does not load", "pth.gz", gzip.compress(npz({"image_emb": SAMPLE.image_emb}), mtime=0)),
    ("a list, expected a dict", "pth.gz", pth_gz([1, 2])),
    ("as int, expected rows", "pth.gz", pth_gz({"image_emb": 3})),
    ("as Tensor, expected rows", "pth.gz", pth_gz({"image_emb": torch.zeros(3, 3, dtype=torch.int64)})),
]


@pytest.mark.parametrize(("message", "kind", "data"), VECTORS)
def test_damaged_vectors_are_one_sentence(message, kind, data):
    members = {name: value for name, value in published(SAMPLE).items() if name != "npz"} | ({kind: data} if data is not None else {})
    with pytest.raises(DamagedSampleError, match=message):
        read(members)


def test_a_flipped_byte_of_the_vectors_is_found():
    for kind in ("npz", "pth.gz"):
        members = published(SAMPLE, kind=kind)
        damaged = bytearray(members[kind])
        damaged[len(damaged) // 2] ^= 4
        with pytest.raises(DamagedSampleError):
            read({**members, kind: bytes(damaged)})


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path):
    touched = tmp_path / "touched"
    with pytest.raises(DamagedSampleError, match=r"wants to run 'posix\.system' when it is loaded, which is refused") as caught:
        read_pth_gz(pth_gz({"image_emb": Evil(touched)}))
    assert "\n" not in str(caught.value)
    out = io.BytesIO()
    np.savez(out, image_emb=np.array([Evil(touched)], dtype=object))
    with pytest.raises(DamagedSampleError, match="pickled and can run code"):
        read_npz(out.getvalue())
    assert not touched.exists()


@pytest.mark.parametrize(
    ("message", "members"),
    [
        ("vectors of 3 views but parameters of 4", with_vectors(image_emb=SAMPLE.image_emb[:3])),
        ("5 synthetic captions and vectors of 5 texts", with_vectors(text_emb=SAMPLE.text_emb[:5])),
        ("norm 2 for teacher 'second'", with_vectors(image_emb=SAMPLE.image_emb * np.repeat([1, 2], DIMS).astype(np.float32))),
        ("norm nan for teacher 'first'", with_vectors(text_emb=np.full_like(SAMPLE.text_emb, np.nan))),
        ("19 values a vector, the teachers 8", with_vectors(image_emb=SAMPLE.image_emb[:, :19])),
        ("it has no .syn.json", {name: data for name, data in published(SAMPLE).items() if name != "syn.json"}),
        ("it has no .paug.json", {name: data for name, data in published(SAMPLE).items() if name != "paug.json"}),
        ("'syn_text' as str", with_json("syn.json", {"syn_text": "one"})),
        ("'syn_text' as list", with_json("syn.json", {"syn_text": ["one", 2]})),
        ("holds a list, expected one object", with_json("syn.json", [])),
        ("expected a list of views", with_json("paug.json", {})),
        ("string that is not JSON", with_json("paug.json", {"param_aug": "[[["})),
        ("view 0 of its .paug.json is", with_json("paug.json", {"param_aug": [[1, 2, 3]]})),
        ("view 0 of its .paug.json is", with_json("paug.json", {"param_aug": [[[0, 0, 1, float("inf")], None]]})),
        ("which no picture has", with_json("paug.json", {"param_aug": [[[0, 0, 0, 4], None]]})),
        ("not JSON", {**published(SAMPLE), "syn.json": b"[" * 100000}),
        ("more than", {**published(SAMPLE), "syn.json": b" " * (1 << 21)}),
    ],
)
def test_samples_that_disagree_with_themselves_are_one_sentence(message, members):
    with pytest.raises(DamagedSampleError, match=message):
        read(members)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.sampled_from(["npz", "pth.gz", "syn.json", "paug.json", "json"]), st.data())
def test_any_damage_is_told_as_damage(name, data):
    """Cut, overwritten or exchanged bytes never raise anything else."""
    members = published(SAMPLE, kind="pth.gz" if name == "pth.gz" else "npz")
    content = bytearray(members[name])
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        found, told = read({**members, name: bytes(content)}), ""
    except DamagedSampleError as error:
        told = str(error)
    else:
        assert all(np.isfinite(part).all() for part in (*found.image, *found.texts))
    assert "\n" not in told
