"""Hostile bundles: manifests, graphs, tokenizers, golden inputs and class tables that are consistent with their own hashes, and archives of them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import stat
import struct
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from runtime.manifest import read_manifest, write_manifest
from tests.attacks.harness import Case, Victim, cli

ZEROS = "0" * 64


@functools.cache
def _bundle() -> Path:
    from tests.runtime import toy

    place = Path(tempfile.mkdtemp(prefix="mclip-toy-")) / "bundle"
    toy.build(place)
    return place


def toy_bundle(folder: Path) -> Path:
    """A sound bundle of two real graphs, to be damaged."""
    return Path(shutil.copytree(_bundle(), folder / "bundle"))


def load(bundle: Path) -> Victim:
    """What an application does with it."""

    def victim() -> object:
        import runtime

        clip = runtime.load(bundle, threads=1)
        return clip.encode_image(np.zeros((20, 20, 3), np.uint8)).shape, clip.encode_text(["red"]).shape

    return victim


def seal(bundle: Path, document: dict[str, Any] | bytes) -> None:
    """Write a manifest with a right hash of itself, whatever it says."""
    raw = document if isinstance(document, bytes) else json.dumps({**document, "manifest_sha256": ZEROS}).encode()
    digest = hashlib.sha256(raw).hexdigest().encode()
    (bundle / "manifest.json").write_bytes(raw.replace(b'"' + ZEROS.encode() + b'"', b'"' + digest + b'"', 1))


def manifest(change: Callable[[dict[str, Any]], object]) -> Case:
    """A toy bundle whose manifest was changed and sealed again."""
    def case(folder: Path) -> Victim:
        bundle = toy_bundle(folder)
        document = json.loads((bundle / "manifest.json").read_bytes())
        change(document)
        seal(bundle, document)
        return load(bundle)

    return case


def raw_manifest(raw: bytes) -> Case:
    def case(folder: Path) -> Victim:
        bundle = toy_bundle(folder)
        seal(bundle, raw)
        return load(bundle)

    return case


def listed(name: str) -> Case:
    """A path that leaves the bundle, listed with the right hash of what lies there."""
    return manifest(lambda d: d["files"].update({name: {"sha256": hashlib.sha256(b"").hexdigest(), "bytes": 0}}))


def graph(change: Callable[[onnx.ModelProto, Path], onnx.ModelProto | bytes]) -> Case:
    """The image tower's graph changed, and everything hashed again."""
    def case(folder: Path) -> Victim:
        bundle = toy_bundle(folder)
        path = bundle / "onnx/image.fp32.onnx"
        made = change(onnx.load(path), path)
        path.write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
        write_manifest(bundle, read_manifest(bundle, verify=False))
        return load(bundle)

    return case


def external(location: str, offset: int = 0, length: int | None = None, link: str = "") -> Case:
    def change(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
        weight = next(tensor for tensor in model.graph.initializer if tensor.name == "weight")
        size = len(weight.raw_data)
        if link:
            (path.parent / location).symlink_to(link)
        elif "/" not in location:
            (path.parent / location).write_bytes(weight.raw_data)
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", size if length is None else length)):
            weight.external_data.add(key=key, value=str(value))
        return model

    return graph(change)


def hidden(location: str) -> Case:
    """External weights inside of a branch that is never taken."""

    def change(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
        tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=location)
        branch = helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor)], "b", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, [1])])
        model.graph.initializer.append(numpy_helper.from_array(np.array(True), "no"))
        model.graph.node.insert(0, helper.make_node("If", ["no"], ["never"], then_branch=branch, else_branch=branch))
        return model

    return graph(change)


def node(domain: str, kind: str = "Steal") -> Case:
    def change(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
        model.graph.node.insert(0, helper.make_node(kind, ["image"], ["stolen"], domain=domain, path="/etc/passwd"))
        model.opset_import.append(helper.make_opsetid(domain, 1))
        return model

    return graph(change)


def function(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    model.functions.append(helper.make_function("mine", "F", ["x"], ["y"], [helper.make_node("Identity", ["x"], ["y"])], [helper.make_opsetid("", 20)]))
    return model


def deep(model: onnx.ModelProto, path: Path) -> bytes:
    """Graphs in graphs in graphs."""
    body = b""
    for _ in range(3000):
        body = _field(1, _field(5, _field(6, body)))  # graph <- node <- attribute <- graph
    return _field(7, body)


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def huge_constant(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """2^40 values on paper, none in the file."""
    next(t for t in model.graph.initializer if t.name == "weight").dims[0] = 2**40
    return model


def huge_shape(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """A terabyte, asked for while it runs."""
    model.graph.initializer.append(numpy_helper.from_array(np.array([2**38], np.int64), "size"))
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["size"], ["zeros"]))
    model.graph.node.insert(1, helper.make_node("ReduceSum", ["zeros"], ["total"], keepdims=0))
    next(n for n in model.graph.node if n.op_type == "MatMul").output[0] = "before"
    at = next(i for i, n in enumerate(model.graph.node) if n.op_type == "MatMul")
    model.graph.node.insert(at + 1, helper.make_node("Add", ["before", "total"], ["raw"]))
    return model


def file_of_bundle(name: str, data: Callable[[bytes], bytes], victim: Callable[[Path], Victim] = load) -> Case:
    """One file replaced, and everything hashed again."""
    def case(folder: Path) -> Victim:
        bundle = toy_bundle(folder)
        path = bundle / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data(path.read_bytes() if path.is_file() else b""))
        write_manifest(bundle, read_manifest(bundle, verify=False))
        return victim(bundle)

    return case


def verify(bundle: Path) -> Victim:
    return cli("verify", bundle)


def golden(change: Callable[[dict[str, Any]], object]) -> Case:
    def data(raw: bytes) -> bytes:
        document = json.loads(raw)
        change(document)
        return json.dumps(document).encode()

    return file_of_bundle("golden/golden.json", data, verify)


def tensors(header: dict[str, Any] | bytes, body: bytes = b"", size: int | None = None) -> bytes:
    """A safetensors file that says what it likes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if size is None else size) + raw + body


def table(data: Callable[[Path], bytes]) -> Case:
    def case(folder: Path) -> Victim:
        bundle = toy_bundle(folder)
        (bundle / "classes").mkdir()
        (bundle / "classes/c.safetensors").write_bytes(data(bundle))
        kept = read_manifest(bundle, verify=False)
        write_manifest(bundle, replace(kept, classes=({"name": "c", "path": "classes/c.safetensors", "n": 2},)))

        def victim() -> object:
            import runtime

            return runtime.load(bundle, threads=1).stored_classes().names

        return victim

    return case


def table_elsewhere(folder: Path) -> Victim:
    bundle = toy_bundle(folder)
    document = json.loads((bundle / "manifest.json").read_bytes())
    seal(bundle, {**document, "classes": [{"name": "c", "path": "/etc/passwd", "n": 1}]})

    def victim() -> object:
        import runtime

        return runtime.load(bundle, threads=1).stored_classes()

    return victim


def archive(change: Callable[[zipfile.ZipFile, Path], object], keep: Callable[[str], bool] = lambda name: True) -> Case:
    """A bundle in one file, with more in it."""
    def case(folder: Path) -> Victim:
        bundle = toy_bundle(folder)
        place = folder / "b.zip"
        with zipfile.ZipFile(place, "w") as out:
            for path in [bundle / "manifest.json", *sorted(path for path in bundle.rglob("*") if path.is_file() and path.name != "manifest.json")]:
                name = path.relative_to(bundle).as_posix()
                if keep(name):
                    out.writestr(zipfile.ZipInfo(name), path.read_bytes())
            change(out, bundle)
        return load(place)

    return case


def entry(name: str, data: bytes = b"x", mode: int = stat.S_IFREG | 0o644, flag: int = 0) -> Case:
    def change(out: zipfile.ZipFile, bundle: Path) -> None:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        out.writestr(info, data)

    return archive(change)


def bomb(folder: Path) -> Victim:
    """A quarter of a gigabyte of zeros in as many kilobytes, listed in the manifest with its right hash."""
    bundle = toy_bundle(folder)
    size, digest, zeros = 2**28, hashlib.sha256(), bytes(2**20)
    for _ in range(256):
        digest.update(zeros)
    document = json.loads((bundle / "manifest.json").read_bytes())
    document["files"]["zeros.bin"] = {"sha256": digest.hexdigest(), "bytes": size}
    seal(bundle, document)
    place = folder / "b.zip"
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as out:
        for path in [bundle / "manifest.json", *sorted(path for path in bundle.rglob("*") if path.is_file() and path.name != "manifest.json")]:
            out.write(path, path.relative_to(bundle).as_posix())
        with out.open("zeros.bin", "w", force_zip64=True) as target:
            for _ in range(256):
                target.write(zeros)
    return load(place)


def linked(folder: Path) -> Victim:
    """A file of the bundle is a link to a secret, not listed as what it is."""
    bundle = toy_bundle(folder)
    (folder / "secret").write_bytes(b"secret")
    (bundle / "more").symlink_to(folder)
    return cli("verify", bundle)


def many_entries(out: zipfile.ZipFile, bundle: Path) -> None:
    for number in range(10_001):
        out.writestr(zipfile.ZipInfo(f"{number}"), b"")


def not_zip(folder: Path) -> Victim:
    (folder / "b.zip").write_bytes(b"PK\x03\x04" + os.urandom(3000))
    return load(folder / "b.zip")


def safetensors_of(arrays: dict[str, np.ndarray], facts: dict[str, str]) -> bytes:
    from safetensors.numpy import save

    return save(arrays, metadata=facts)


def class_facts(bundle: Path, names: list[str] | None = None) -> dict[str, str]:
    return {"schema": "1", "names": json.dumps(names or ["a", "b"]), "model": "0" * 64}


BUNDLES: dict[str, Case] = {
    "path that leaves: ../x": listed("../x"),
    "path that leaves: absolute": listed("/etc/passwd"),
    "path that leaves: a/../../x": listed("a/../../x"),
    "path with a backslash": listed("..\\x"),
    "path with NUL": listed("a\0b"),
    "artefact that leaves": manifest(lambda d: d["artefacts"][0].update(path="../../x.onnx")),
    "link to a folder outside": linked,
    "a name twice in one object": raw_manifest(b'{"schema": 1, "schema": 1, "manifest_sha256": "' + ZEROS.encode() + b'"}'),
    "100,000 brackets": raw_manifest(b'{"a": ' + b"[" * 100_000 + b'"' + ZEROS.encode() + b'"'),
    "a number of a million digits": raw_manifest(b'{"schema": ' + b"9" * 1_000_000 + b', "manifest_sha256": "' + ZEROS.encode() + b'"}'),
    "manifest of 40 MB": raw_manifest(b'{"a": "' + b"x" * 40_000_000 + b'"}'),
    "not a number": raw_manifest(b'{"schema": 1, "logit_scale": NaN, "manifest_sha256": "' + ZEROS.encode() + b'"}'),
    "schema of the future": manifest(lambda d: d.update(schema=99)),
    "embeddings of 10^12 values": manifest(lambda d: d.update(embed_dim=10**12)),
    "pictures of 10^9 pixels a side": manifest(lambda d: d["image"].update(image_size=10**9)),
    "pictures of 100,000 pixels a side": manifest(lambda d: d["image"].update(image_size=100_000)),
    "texts of 10^12 tokens": manifest(lambda d: d["text"].update(context_length=10**12)),
    "texts of 10^8 tokens": manifest(lambda d: d["text"].update(context_length=10**8)),
    "crop of 10^-9": manifest(lambda d: d["image"].update(crop_pct=1e-9)),
    "name with escapes of a terminal": manifest(lambda d: d.update(name="\x1b[2J\x1b]0;x\x07", schema=1, embed_dim=0)),
    "UTF-16": raw_manifest("{}".encode("utf-16")),
    "file larger than listed": manifest(lambda d: d["files"]["tokenizer.json"].update(bytes=1)),
}

GRAPHS: dict[str, Case] = {
    "weights in /etc/passwd": external("/etc/passwd", 0, 100),
    "weights in ../../x": external("../../x", 0, 100),
    "weights beyond the end of a file": external("weights.bin", 10**12, 10),
    "weights at a negative place": external("weights.bin", -8, 8),
    "weights behind a link": external("weights.bin", link="/etc/passwd"),
    "weights outside, in a branch never taken": hidden("/etc/passwd"),
    "operator of a foreign domain": node("evil"),
    "operator of a foreign domain that looks familiar": node("com.microsoft.evil"),
    "operator that opens a file of its own": node("com.microsoft", "EPContext"),
    "function of its own": graph(function),
    "3,000 graphs in graphs": graph(deep),
    "constant of 2^40 values on paper": graph(huge_constant),
    "a terabyte asked for while it runs": graph(huge_shape),
    "field that is longer than the file": graph(lambda model, path: b"\x3a" + _varint(2**50) + b"x"),
    "number without an end": graph(lambda model, path: b"\xff" * 1000),
    "two graphs": graph(lambda model, path: model.SerializeToString() * 2),
    "nothing": graph(lambda model, path: b""),
    "text in place of a graph": graph(lambda model, path: b"#!/bin/sh\ntouch mark\n"),
    "half a million empty fields": graph(lambda model, path: _field(7, b"\x0a\x00" * 500_001)),
}

TOKENIZERS: dict[str, Case] = {
    "100,000 brackets": file_of_bundle("tokenizer.json", lambda raw: b"[" * 100_000),
    "no JSON": file_of_bundle("tokenizer.json", lambda raw: b"\xff\xfe"),
    "merges that are numbers": file_of_bundle("tokenizer.json", lambda raw: json.dumps({**json.loads(raw), "model": {**json.loads(raw)["model"], "merges": [1, 2]}}).encode()),
    "ids beyond the tower": file_of_bundle("tokenizer.json", lambda raw: raw.replace(b'"!": 0', b'"!": 60000').replace(b'"!":0', b'"!":60000')),
    "negative ids": file_of_bundle("tokenizer.json", lambda raw: raw.replace(b'"!": 0', b'"!": -7').replace(b'"!":0', b'"!":-7')),
    "another kind of model": file_of_bundle("tokenizer.json", lambda raw: json.dumps({**json.loads(raw), "model": {"type": "Evil"}}).encode()),
}

GOLDEN: dict[str, Case] = {
    "golden picture outside": golden(lambda d: d.update(images=["../../../etc/passwd"] * len(d["images"]))),
    "golden picture that is not listed": golden(lambda d: d.update(images=["golden/none.png"] * len(d["images"]))),
    "golden vectors: header of 2^60 bytes": file_of_bundle("golden/golden.safetensors", lambda raw: tensors({}, size=2**60), verify),
    "golden vectors: 2^40 values on paper": file_of_bundle(
        "golden/golden.safetensors", lambda raw: tensors({"pixels": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}), verify
    ),
    "golden picture is a bomb": file_of_bundle("golden/00.png", lambda raw: __import__("tests.attacks.pictures", fromlist=["png"]).png(50_000, 50_000), verify),
}

TABLES: dict[str, Case] = {
    "path that leaves": table_elsewhere,
    "header of 2^60 bytes": table(lambda bundle: tensors({}, size=2**60)),
    "names that are no list": table(lambda bundle: safetensors_of({"vectors": np.zeros((2, 12), np.float32)}, {**class_facts(bundle), "names": "7"})),
    "vectors of 2^40 rows on paper": table(
        lambda bundle: tensors({"__metadata__": class_facts(bundle), "vectors": {"dtype": "F32", "shape": [2**40, 12], "data_offsets": [0, 2**42 * 12]}})
    ),
    "vectors that are not finite": table(lambda bundle: safetensors_of({"vectors": np.full((2, 12), np.nan, np.float32)}, class_facts(bundle))),
    "of another model": table(lambda bundle: safetensors_of({"vectors": np.ones((2, 12), np.float32)}, {**class_facts(bundle), "model": "1" * 64})),
    "one name twice": table(lambda bundle: safetensors_of({"vectors": np.ones((2, 12), np.float32)}, class_facts(bundle, ["a", "a"]))),
    "a pickle": table(lambda bundle: b"\x80\x04cos\nsystem\n(S'touch mark'\ntR."),
}

ARCHIVES: dict[str, Case] = {
    "entry that leaves: ../x": entry("../../x"),
    "entry that leaves: absolute": entry("/tmp/mclip-attack"),
    "entry that is a link": entry("more", b"/etc/passwd", stat.S_IFLNK | 0o777),
    "entry that nobody listed": entry("more"),
    "the manifest twice": entry("manifest.json", b"{}"),
    "a quarter of a gigabyte in as many kilobytes": bomb,
    "10,001 entries": archive(many_entries),
    "no manifest": archive(lambda out, bundle: None, keep=lambda name: name != "manifest.json"),
    "a file missing": archive(lambda out, bundle: None, keep=lambda name: name != "tokenizer.json"),
    "bytes of chance behind a zip's first four": not_zip,
}
