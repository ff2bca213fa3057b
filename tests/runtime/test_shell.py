"""The SDK's verbs: what they print, what they exit with, and that none of them needs torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from runtime import shell
from runtime.errors import BundleError, CheckpointError, ClipError, PairsError, StoreError
from runtime.manifest import read_manifest, write_manifest
from runtime.pairs import write_shard
from tests.runtime import toy
from tests.runtime.test_evaluation import facts, sample

Verb = Callable[[list[str]], int]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    for name in toy.COLOURS:
        toy.picture(name).save(folder / "deeper" / f"{name}.png")
    (folder / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    folder = tmp_path / "set" / "test"
    folder.mkdir(parents=True)
    write_shard(folder / "0.tar", [sample(f"k-{name}", name, f"the {name} one", facts(name, "g")) for name in ("red", "green")])
    write_shard(folder / "1.tar", [sample("k-blue", "blue", None, None), sample("k-bad", b"broken", "broken", None)])
    return folder


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(verb: Verb, *argv: object) -> tuple[int, str, str]:
        code = verb([str(value) for value in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def one_object(out: str) -> dict[str, Any]:
    assert out.count("\n") == 1
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def test_search_a_folder(call: Callable[..., Any], toy_bundle: Path, pictures: Path) -> None:
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8")
    code, out, err = call(shell.search, "green", "--bundle", toy_bundle, "--images", pictures, "-k", 2)
    assert code == 0
    assert len(out.splitlines()) == 2
    assert out.splitlines()[0].endswith("green.png")
    assert float(out.split()[0]) > 0.9
    assert "1 pictures skipped" in err
    assert "broken.jpg" in err
    code, out, _ = call(shell.search, "green", "--bundle", toy_bundle, "--images", pictures, "--json")
    found = one_object(out)
    assert found["searched"] == 4
    assert Path(found["results"][0]["path"]).name == "green.png"
    assert [row["score"] for row in found["results"]] == sorted((row["score"] for row in found["results"]), reverse=True)
    assert len(found["skipped"]) == 1
    assert found["choice"]["text"]["id"] == "text-onnx-int8"


def test_search_pairs(call: Callable[..., Any], toy_bundle: Path, pairs: Path) -> None:
    code, out, err = call(shell.search, "red", "--bundle", toy_bundle, "--images", pairs)
    assert code == 0
    assert out.splitlines()[0].split(maxsplit=1)[1] == "k-red  the red one"
    assert "k-bad" in err
    found = one_object(call(shell.search, "blue", "--bundle", toy_bundle, "--images", pairs, "--json")[1])
    assert found["results"][0]["key"] == "k-blue"
    assert found["results"][0]["caption"] is None
    assert found["results"][-1]["meta"].get("concept") in ("red", "green")


def test_search_finds_nothing_to_search(call: Callable[..., Any], toy_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place, message in ((tmp_path / "none", "does not exist"), (tmp_path / "empty", "holds no pictures")):
        with pytest.raises(PairsError, match=message):
            call(shell.search, "red", "--bundle", toy_bundle, "--images", place)
    (tmp_path / "empty" / "a.png").write_bytes(b"x")
    with pytest.raises(PairsError, match="none of the 1 pictures"):
        call(shell.search, "red", "--bundle", toy_bundle, "--images", tmp_path / "empty")


def test_no_bundle_says_how_to_get_one(call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MCLIP_BUNDLE", raising=False)
    with pytest.raises(BundleError, match="make it with 'mclip demo'"):
        call(shell.search, "red")
    with pytest.raises(BundleError, match="no such folder"):
        call(shell.embed, "red", "--bundle", tmp_path / "none")


def test_classify(call: Callable[..., Any], toy_bundle: Path, pictures: Path) -> None:
    picture = pictures / "deeper" / "blue.png"
    code, out, _ = call(shell.classify, picture, "red", "blue", "green", "--bundle", toy_bundle)
    assert code == 0
    assert out.splitlines()[0].split()[1] == "blue"
    found = one_object(call(shell.classify, picture, "red", "blue", "--bundle", toy_bundle, "--template", "a {}", "--prefer", "fp32", "--json")[1])
    assert [row["label"] for row in found["labels"]] == ["blue", "red"]
    assert sum(row["probability"] for row in found["labels"]) == pytest.approx(1)
    assert found["choice"]["text"]["id"] == "text-onnx-fp32"


def test_embed(call: Callable[..., Any], toy_bundle: Path, pictures: Path, tmp_path: Path) -> None:
    code, out, _ = call(shell.embed, "red", pictures / "deeper" / "red.png", "--bundle", toy_bundle)
    assert code == 0
    kinds = [line.split("\t")[0] for line in out.splitlines()]
    assert kinds == ["image", "text"]
    image, text = (np.array(line.split("\t")[2].split(), float) for line in out.splitlines())
    assert image @ text > 0.9
    found = one_object(call(shell.embed, "--image", pictures, "--text", "red", "blue", "--bundle", toy_bundle, "--json")[1])
    assert (len(found["image"]), len(found["text"]), len(found["text"][0]["embedding"])) == (4, 2, toy.DIM)
    target = tmp_path / "out.safetensors"
    code, out, _ = call(shell.embed, "red", "blue", "--bundle", toy_bundle, "--out", target)
    arrays = load_file(target)
    assert (arrays["image"].shape, arrays["text"].shape) == ((0, toy.DIM), (2, toy.DIM))
    np.testing.assert_allclose(arrays["text"][1], found["text"][1]["embedding"], atol=1e-6)
    with pytest.raises(ClipError, match="cannot be written"):
        call(shell.embed, "red", "--bundle", toy_bundle, "--out", tmp_path / "none" / "x")


def test_verify(call: Callable[..., Any], own_bundle: Path) -> None:
    code, out, err = call(shell.verify, own_bundle)
    assert (code, err) == (0, "")
    assert "12 files match" in out
    assert "refused: " in out
    manifest = read_manifest(own_bundle)
    strict = tuple(replace(a, threshold=0.999999) if a.id == "text-onnx-int8" else a for a in manifest.artefacts)
    write_manifest(own_bundle, replace(manifest, artefacts=strict))
    code, out, err = call(shell.verify, own_bundle)
    assert code == 1
    assert [line for line in out.splitlines() if line.startswith("FAIL")][0].split()[1] == "text-onnx-int8"
    assert "does not pass" in err
    code, out, _ = call(shell.verify, own_bundle, "--json")
    assert code == 1
    assert one_object(out)["ok"] is False
    (own_bundle / "golden/00.png").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"00\.png"):
        call(shell.verify, own_bundle)


def test_inspect_a_bundle(call: Callable[..., Any], own_bundle: Path) -> None:
    code, out, _ = call(shell.inspect, own_bundle)
    assert code == 0
    assert "12 files match their hashes" in out
    assert "refused  image-onnx-int8" in out
    found = one_object(call(shell.inspect, own_bundle, "--json")[1])
    assert (found["kind"], found["verified"]) == ("bundle", 12)
    assert found["artefacts"][0]["parity"]["cosine_min"] == 1.0
    assert found["artefacts"][0]["sha256"] == found["files"]["onnx/image.fp32.onnx"]["sha256"]
    (own_bundle / "onnx/text.fp32.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match=r"text\.fp32\.onnx has 0 bytes"):
        call(shell.inspect, own_bundle)


def digest(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def test_inspect_pairs_and_sample(call: Callable[..., Any], pairs: Path) -> None:
    found = one_object(call(shell.inspect, pairs, "--json")[1])
    assert (found["kind"], found["pairs"], found["shards"]) == ("pairs", 4, {"0": 2, "1": 2})
    assert found["verified"] == 0
    assert found["counts"]["without caption"] == 1
    assert "no hashes are recorded" in call(shell.inspect, pairs)[1]
    shards = {f"test/{name}": {"sha256": digest((pairs / name).read_bytes()), "bytes": 1} for name in ("0.tar", "1.tar")}
    (pairs.parent / "sample.json").write_text(json.dumps({"kind": "emoji", "shards": shards, "files": {}, "gallery": {"count": 4}}))
    assert one_object(call(shell.inspect, pairs, "--json")[1])["verified"] == 2
    found = one_object(call(shell.inspect, pairs.parent, "--json")[1])
    assert (found["kind"], found["sample"], found["verified"], found["gallery"]) == ("sample", "emoji", 2, {"count": 4})
    write_shard(pairs / "1.tar", [sample("k-other", "blue", None, None)])
    for place in (pairs, pairs.parent):
        with pytest.raises(PairsError, match=r"1\.tar was changed"):
            call(shell.inspect, place)


def test_inspect_refuses_what_is_no_store_of_ours(call: Callable[..., Any], tmp_path: Path) -> None:
    """What a good one says stands in tests/distill/test_store_verification.py."""
    index = {"schema": 1, "kind": "store", "rows": 3, "dtype": "int8", "teachers": [{"name": "t", "dim": 8}], "parts": []}
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(StoreError, match="has schema 1, this release reads store schema 2"):
        call(shell.inspect, tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(StoreError, match="is not JSON"):
        call(shell.inspect, tmp_path)


def test_inspect_a_checkpoint(call: Callable[..., Any], tmp_path: Path) -> None:
    from safetensors.numpy import save

    weights = save({"image.w": np.zeros((2, 3), np.float32), "text.w": np.zeros(5, np.float32), "logit_scale": np.zeros((), np.float32)})
    config = json.dumps({"name": "pocket", "embed_dim": 12}).encode()
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(CheckpointError, match="interrupted"):
        call(shell.inspect, tmp_path)
    files = {"model.safetensors": {"sha256": digest(weights)}, "config.json": {"sha256": digest(config)}}
    (tmp_path / "receipt.json").write_text(json.dumps({"schema": 1, "kind": "checkpoint", "files": files, "steps": 7}))
    found = one_object(call(shell.inspect, tmp_path, "--json")[1])
    assert (found["kind"], found["name"], found["verified"], found["receipt"]) == ("checkpoint", "pocket", 2, {"steps": 7})
    assert found["parameters"] == {"total": 12, "image": 6, "text": 5, "logit_scale": 1}
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        call(shell.inspect, tmp_path)


def test_inspect_results(call: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    line = {"schema": 1, "kind": "latency", "bundle": {"name": "toy", "sha256": "a" * 64}}
    path.write_text(json.dumps(line) + "\n\n" + json.dumps({"schema": 1, "kind": "memory"}) + "\n")
    found = one_object(call(shell.inspect, path, "--json")[1])
    assert (found["kind"], found["lines"], found["kinds"], found["bundles"]) == ("results", 2, {"latency": 1, "memory": 1}, ["toy aaaaaaaaaaaa"])
    path.write_text("{}\n")
    with pytest.raises(ClipError, match="line 1 .* no kind"):
        call(shell.inspect, path)
    path.write_text('{"schema": 1, "kind"')
    with pytest.raises(ClipError, match="line 1 .* not JSON"):
        call(shell.inspect, path)


def test_inspect_something_else(call: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ClipError, match="does not exist"):
        call(shell.inspect, tmp_path / "none")
    with pytest.raises(ClipError, match="it is empty"):
        call(shell.inspect, tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ClipError, match="it holds notes.txt"):
        call(shell.inspect, tmp_path)
    with pytest.raises(ClipError, match="no known kind"):
        call(shell.inspect, tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("verb", "argv"),
    [
        (shell.embed, []),
        (shell.search, []),
        (shell.search, ["red", "-k", "0"]),
        (shell.classify, ["a.png"]),
        (shell.classify, ["a.png", "red", "--template", "no place"]),
        (shell.verify, []),
        (shell.inspect, []),
        (shell.search, ["red", "--threads", "many"]),
    ],
)
def test_wrong_use_exits_2(verb: Verb, argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        verb(argv)
    assert caught.value.code == 2


def test_no_verb_imports_torch(toy_bundle: Path, pictures: Path, pairs: Path) -> None:
    picture = str(pictures / "deeper" / "red.png")
    bundle = ["--bundle", str(toy_bundle)]
    calls = [
        ["embed", "red", picture, *bundle],
        ["classify", picture, "red", "blue", *bundle],
        ["search", "red", "--images", str(pairs), *bundle],
        ["verify", str(toy_bundle)],
        ["inspect", str(toy_bundle)],
        ["inspect", str(pairs)],
    ]
    code = f"""
import sys
from runtime import shell
for verb, *argv in {calls!r}:
    assert getattr(shell, verb)(argv) == 0
    heavy = {{"torch", "timm", "open_clip", "transformers", "tyro", "mobileclip", "distill", "export", "benchmarks"}} & set(sys.modules)
    assert not heavy, (verb, heavy)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert ran.returncode == 0, ran.stderr
