"""Adapters: what they recover in synthetic spaces and with bundles, and when they are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import runtime
from runtime.errors import SearchError
from runtime.index import Index
from runtime.index_adaptation import adapt, held_out, read_texts, shortened
from runtime.index_adapter import MOST_BYTES, Adapter, fit, read_adapter, tensors, write_adapter
from runtime.manifest import read_manifest, write_manifest
from runtime.tokenizer import Tokenizer
from tests.runtime import toy
from tests.runtime.test_index import cloud

SIDES = {"old": {"name": "o", "checkpoint": "1" * 64, "embed_dim": 48}, "new": {"name": "n", "checkpoint": "2" * 64, "embed_dim": 64}}
WORDS = [f"{one} {other}" for one in (*toy.COLOURS, "a", "the", "big", "small") for other in ("heart", "dog", "house", "tree", "cat", "sun", "car", *toy.COLOURS)]


def test_a_linear_relation_is_recovered() -> None:
    old = cloud(800)
    mix = np.random.default_rng(1).normal(size=(48, 64))
    new = old @ mix + 0.3
    new = (new / np.linalg.norm(new, axis=1, keepdims=True)).astype(np.float32)
    weight, bias, cosine = fit(new[:600], old[:600])
    adapter = Adapter(**SIDES, tensors=tensors("text", weight, bias, MOST_BYTES))
    found = adapter.text(new[600:])
    assert cosine > 0.98
    assert (np.argmax(found @ old.T, axis=1) == np.arange(600, 800)).mean() > 0.95
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(adapter.text(new[600]), found[0], atol=1e-6)
    with pytest.raises(SearchError, match="fitted on texts alone"):
        adapter.image(new[0])
    with pytest.raises(SearchError, match="too few"):
        fit(new[:19], old[:19])


@pytest.mark.parametrize(("new", "old"), [(768, 1024), (1280, 512), (512, 512)])
def test_a_file_stays_below_a_megabyte(tmp_path: Path, new: int, old: int) -> None:
    generator = np.random.default_rng(0)
    weight = (generator.normal(size=(new, 40)) @ generator.normal(size=(40, old))).astype(np.float32)
    found = {**tensors("text", weight, np.zeros(old, np.float32), 480_000), **tensors("image", weight, np.zeros(old, np.float32), 480_000)}
    sides = {"old": {**SIDES["old"], "embed_dim": old}, "new": {**SIDES["new"], "embed_dim": new}}
    assert write_adapter(tmp_path / "a", Adapter(**sides, tensors=found)) <= MOST_BYTES
    adapter = read_adapter(tmp_path / "a")
    query = generator.normal(size=new).astype(np.float32)
    expected = query @ weight
    assert adapter.image(query) @ expected / np.linalg.norm(expected) > 0.999  # of rank 40, which its factors can hold


def test_damaged_adapters_are_refused(tmp_path: Path) -> None:
    found = tensors("text", np.eye(64, 48, dtype=np.float32), np.zeros(48, np.float32), MOST_BYTES)
    write_adapter(tmp_path / "a", Adapter(**SIDES, tensors=found, figures={"ok": True}))
    whole = (tmp_path / "a").read_bytes()
    assert read_adapter(tmp_path / "a").figures == {"ok": True}
    for spot in (0, 5, 40, 200, len(whole) // 2, len(whole) - 1):
        changed = bytearray(whole)
        changed[spot] ^= 16
        (tmp_path / "b").write_bytes(changed)
        with pytest.raises(SearchError, match="mclip adapt"):
            read_adapter(tmp_path / "b")
    for content in (b"", whole[:-3], b"{}" * 50):
        (tmp_path / "b").write_bytes(content)
        with pytest.raises(SearchError):
            read_adapter(tmp_path / "b")
    with pytest.raises(SearchError, match="cannot be read"):
        read_adapter(tmp_path / "none")


@pytest.fixture(scope="module")
def successor(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new model: the toy's space turned and squeezed, by a checkpoint of its own."""
    import shutil

    folder = tmp_path_factory.mktemp("new") / "bundle"
    shutil.copytree(toy_bundle, folder)
    tokenizer = Tokenizer.open(folder / "tokenizer.json", toy.CONTEXT)
    turn = np.random.default_rng(5).normal(size=(toy.DIM, toy.DIM)).astype(np.float32)
    for tower, weight in zip(("image", "text"), toy.weights(tokenizer), strict=True):
        for precision in ("fp32", "int8"):
            path = folder / "onnx" / f"{tower}.{precision}.onnx"
            if path.exists():
                onnx.save(toy.graph(tower, weight @ turn), path)
    write_manifest(folder, replace(read_manifest(folder, verify=False), provenance={"checkpoint_sha256": "9" * 64}, name="new"))
    return folder


def test_new_queries_search_an_old_index(toy_bundle: Path, successor: Path, tmp_path: Path) -> None:
    old, new = (runtime.load(path, threads=1, prefer="fp32", measure=False) for path in (toy_bundle, successor))
    photos = tmp_path / "p"
    photos.mkdir()
    for n, colour in enumerate(toy.COLOURS):
        toy.picture(colour, n).save(photos / f"{colour}.png")
    with Index.open(tmp_path / "i", old) as index:
        index.add(photos)
    with pytest.raises(SearchError, match="mclip adapt"):
        Index.open(tmp_path / "i", new)
    adapter, facts = adapt(old, new, texts=[f"{text} {n}" for n in range(3) for text in WORDS])
    assert facts["ok"], facts
    assert facts["new_on_old"]["recall5"] > 0.9 * facts["old_on_old"]["recall5"]
    write_adapter(tmp_path / "a", adapter)
    with Index.open(tmp_path / "i", new, adapter=read_adapter(tmp_path / "a")) as index:
        for colour in ("red", "green", "blue"):
            assert Path(index.search(colour, k=1)[0].path).stem == colour
        with pytest.raises(SearchError, match="texts alone"):
            index.search(image=photos / "red.png")
        with pytest.raises(SearchError, match="only that model can add"):
            index.add(photos)
    with pytest.raises(SearchError, match="the adapter leads from"):
        Index.open(tmp_path / "i", old, adapter=adapter)
    with pytest.raises(SearchError, match="needs no adapter"):
        adapt(old, old, texts=WORDS)


def test_an_adapter_that_finds_less_is_refused(toy_bundle: Path, tmp_path: Path, successor: Path) -> None:
    old, new = (runtime.load(path, threads=1, prefer="fp32", measure=False) for path in (toy_bundle, successor))
    real, calls = new.encode_text, []

    def confused(texts):  # a new model that knows nothing: its embeddings have no relation to the texts
        calls.append(len(texts))
        found = np.random.default_rng(len(calls)).normal(size=(len(texts), toy.DIM)).astype(np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True) + 0 * real(texts)

    new.encode_text = confused  # type: ignore[method-assign]
    _, facts = adapt(old, new, texts=[f"{text} {n}" for n in range(4) for text in WORDS])
    assert not facts["ok"]
    assert facts["high"] < 0
    assert facts["difference"] < -0.2


def test_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"label": "four", "other": 5}\n')
    assert read_texts(tmp_path / "a.txt") == ["one", "two"]
    assert read_texts(tmp_path / "b.jsonl") == ["three", "four"]
    (tmp_path / "c.jsonl").write_text("[1")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe")
    for name in ("c.jsonl", "d.txt", "none"):
        with pytest.raises(SearchError):
            read_texts(tmp_path / name)
    assert shortened("a red heart on white") == "a heart white"
    assert shortened("heart") == "a picture of heart"
    assert 0.1 < np.mean([held_out(f"text {n}") for n in range(1000)]) < 0.3
    assert held_out("Two  Hearts") == held_out("two hearts")
