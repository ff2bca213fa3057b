"""What is fuzzed: every reader of a file that may come from a stranger. A target gets bytes; ClipError (one sentence) or a value are well, all else is a find."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sqlite3
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz import mutation

Reader = Callable[[bytes], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """`prepare(folder)` makes what the reader needs in an empty folder and returns the reader and sound inputs to start from."""

    prepare: Callable[[Path], tuple[Reader, list[bytes]]]
    change: Callable[[bytes, int, int, mutation.Mutate], bytes] = mutation.of_bytes
    most: int = 16_384
    """Bytes of an input."""
    bounded: bool = True
    """Whether the process gets little address space, so that memory that a file merely claims is a find. (An engine for scripts reserves more than that.)"""


def _bundle(folder: Path) -> Path:
    from tests.runtime import toy

    toy.build(folder / "bundle")
    return folder / "bundle"


def manifest(folder: Path) -> tuple[Reader, list[bytes]]:
    bundle = _bundle(folder)
    from runtime.manifest import read_manifest
    from tests.attacks.bundles import seal

    sound = json.loads((bundle / "manifest.json").read_bytes())

    def read(data: bytes) -> object:
        with contextlib.suppress(ValueError, RecursionError):
            document = json.loads(data)
            if isinstance(document, dict):
                data = json.dumps({**document, "manifest_sha256": "0" * 64}).encode()
        seal(bundle, data)
        return read_manifest(bundle, verify=False)

    return read, [json.dumps(sound).encode()]


def bundle_zip(folder: Path) -> tuple[Reader, list[bytes]]:
    import shutil

    from runtime.bundle_zip import folder_of, pack
    from runtime.files import cache_root
    from runtime.manifest import read_manifest, write_manifest

    bundle = _bundle(folder)
    made = read_manifest(bundle)
    for path in bundle.rglob("*"):  # the archive is the matter, not what is in it
        if path.is_file() and path.name != "manifest.json":
            path.write_bytes(path.read_bytes()[:300])
    write_manifest(bundle, made)
    sound = pack(bundle).read_bytes()
    place = folder / "fuzzed.zip"

    def read(data: bytes) -> object:
        shutil.rmtree(cache_root() / "bundles", ignore_errors=True)
        place.write_bytes(data)
        return folder_of(place)

    return read, [sound]


def graph(folder: Path) -> tuple[Reader, list[bytes]]:
    from runtime.graph_check import check_graph
    from tests.runtime import toy

    place = folder / "graph.onnx"

    def read(data: bytes) -> object:
        place.write_bytes(data)
        return check_graph(place)

    return read, [toy.graph("text", np.zeros((8, 4), np.float32)).SerializeToString(), toy.graph("image", np.zeros((48, 4), np.float32)).SerializeToString()]


def tokenizer_file(folder: Path) -> tuple[Reader, list[bytes]]:
    from runtime.tokenizer import Tokenizer

    bundle = _bundle(folder)
    document = json.loads((bundle / "tokenizer.json").read_bytes())
    merges = document["model"]["merges"][:12]  # a vocabulary that a change can reach
    bytes_only = {token: n for n, token in enumerate(list(document["model"]["vocab"])[:512])}
    both = {**bytes_only}
    for pair in merges:
        both.setdefault("".join(pair if isinstance(pair, list) else pair.split(" ")), len(both))
    specials = [{**token, "id": len(both) + n} for n, token in enumerate(document["added_tokens"])]
    both |= {token["content"]: token["id"] for token in specials}
    model = {**document["model"], "vocab": both, "merges": merges}
    small = {**document, "model": model, "added_tokens": specials}
    place = folder / "tokenizer.json"

    def read(data: bytes) -> object:
        place.write_bytes(data)
        return [refusal_or(lambda cleaning=cleaning: Tokenizer.open(place, 8, cleaning)(["a red heart"]).shape) for cleaning in ("clip", "none")]

    return read, [json.dumps(small).encode()]


def texts(folder: Path) -> tuple[Reader, list[bytes]]:
    """The tokenizer's input: any text gives a row of the context's length, the same alone and among others, and decoding gives a text."""
    from runtime.tokenizer import Tokenizer

    bundle = _bundle(folder)
    tokenizer = Tokenizer.open(bundle / "tokenizer.json", 77)

    def read(data: bytes) -> object:
        text = data.decode("utf-8", "surrogatepass" if len(data) % 2 else "replace") if data[:1] != b"\xff" else data.decode("utf-16", "replace")
        row = tokenizer([text])
        assert row.shape == (1, 77)
        assert row.min() >= 0
        assert row.max() < 2048
        both = tokenizer(["x", text])
        assert np.array_equal(both[1], row[0])
        return tokenizer.decode(row[0])

    def forgiving(data: bytes) -> object:
        with contextlib.suppress(UnicodeDecodeError):
            return read(data)
        return None

    odd = ["a photo of a dog", "Caf\u00e9 &amp;amp; <|endoftext|>", "\u6f22\u5b57\u202e \U0001f600\u200d", "\u00c3\u00a9 it's", "x" * 300]
    return forgiving, [text.encode() for text in odd]


def picture(folder: Path) -> tuple[Reader, list[bytes]]:
    from runtime.preprocess import PreprocessConfig, preprocess
    from tests.attacks.pictures import encoded

    config = PreprocessConfig(image_size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic")

    def read(data: bytes) -> object:
        pixels = preprocess([data], config)
        assert pixels.shape == (1, 3, 16, 16)
        assert np.isfinite(pixels).all()
        return pixels.shape

    return read, [encoded(form, (12, 9)) for form in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")]


def pairs(folder: Path) -> tuple[Reader, list[bytes]]:
    from runtime.pairs import open_pairs
    from tests.attacks.data import good_pair

    place = folder / "pairs"
    place.mkdir()

    def read(data: bytes) -> object:
        (place / "a.tar").write_bytes(data)
        found = open_pairs(place, strict=False)
        return [(found.keys[row], found.image(row).size, found.caption(row) if found.has_caption(row) else "", found.meta(row)) for row in range(min(len(found), 3))]

    sound = []
    for form in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=form) as archive:
            for name, data, _ in (*good_pair("k"), *good_pair("d/" + "é" * 40)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        used = out.getvalue().rstrip(b"\0")
        sound.append(used + bytes(-len(used) % 512 + 1024))
    return read, sound


def store_index(folder: Path) -> tuple[Reader, list[bytes]]:
    from distill.store import open_store
    from tests.attacks.data import made_store

    place = made_store(folder)
    sound = (place / "index.json").read_bytes()

    def read(data: bytes) -> object:
        (place / "index.json").write_bytes(data)
        return open_store(place).image_embeddings(0, [0], [0]).shape

    return read, [sound]


def store_part(folder: Path) -> tuple[Reader, list[bytes]]:
    """A part whose index knows its digest: what a stranger's store can say of itself."""
    from distill.store import open_store
    from tests.attacks.data import made_store

    place = made_store(folder)
    path = next(place.glob("*.safetensors"))
    sound, index = path.read_bytes(), json.loads((place / "index.json").read_bytes())

    def read(data: bytes) -> object:
        path.write_bytes(data)
        entry = index["parts"][0]
        for key, value in (("bytes", len(data)), ("sha256", hashlib.sha256(data).hexdigest())):
            if key in entry:
                entry[key] = value
        (place / "index.json").write_text(json.dumps(index))
        return open_store(place).image_embeddings(0, [0, 1], [0, 1]).shape

    return read, [sound]


def results(folder: Path) -> tuple[Reader, list[bytes]]:
    """A results file into the report's page."""
    from benchmarks.measure import summarise
    from benchmarks.report import write_report
    from tests.attacks.data import line

    place = folder / "r.jsonl"
    samples = [1_000_000 + 1000 * n for n in range(40)]
    summary = summarise(np.array(samples)).as_dict()
    sound = line(samples=samples, summary=summary, figures={"tower": "image", "target": "onnx", "precision": "fp32", "accuracy": {"cosine_min": 1.0}})

    def read(data: bytes) -> object:
        place.write_bytes(data)
        (folder / "r.html").unlink(missing_ok=True)
        write_report([place], folder / "r.html")
        assert "<script>alert" not in (folder / "r.html").read_text(encoding="utf-8")
        return True

    return read, [sound, sound + line(phase="text_tower", samples=samples, summary=summary)]


def importers(folder: Path) -> tuple[Reader, list[bytes]]:
    from benchmarks.importers import FORMATS, lines_of_tool, read_output
    from benchmarks.results import append_results

    names = sorted(FORMATS)
    trt = b'[{"startMs": 1, "endMs": 2, "latencyMs": 1.5, "computeMs": 1, "h2dMs": 0.1, "d2hMs": 0.1}]'
    litert = b"INFO: Inference timings in us: Init: 1000, First inference: 500, Warmup (avg): 400, Inference (avg): 300\ncount=50 first=1 curr=2 min=1 max=3 avg=2 std=0"
    ort = b"model,0.0012,1000,50,0\nmodel,0.0013,1000,50,1\n"
    hub = b'{"execution_summary": {"estimated_inference_time": 1200, "all_inference_times": [1, 2, 3], "estimated_inference_peak_memory": 5}}'
    of = {"ai-hub": hub, "litert": litert, "perf-test": ort, "trtexec": trt}

    def read(data: bytes) -> object:
        text = data[1:].decode("utf-8", "replace")
        if not data:
            return None
        rows = lines_of_tool(read_output(names[data[0] % len(names)], text, "t", "", "10.3"), tower="image")
        append_results(folder / "r.jsonl", rows)
        (folder / "r.jsonl").unlink()
        return len(rows)

    return read, [bytes([n]) + of[name] for n, name in enumerate(names)]


def published_sample(folder: Path) -> tuple[Reader, list[bytes]]:
    """A published reinforced sample: one archive of its members in, decoded vectors and captions out."""
    from distill.datacompdr_samples import read_sample

    out = io.BytesIO()
    ones = np.repeat(np.array([[8**-0.5] * 8 + [0.5] * 4], np.float32), 2, axis=0)
    np.savez(out, image_emb=ones, text_emb=ones)
    members = {
        "npz": out.getvalue(),
        "syn.json": json.dumps({"syn_text": ["a dog"]}).encode(),
        "paug.json": json.dumps({"param_aug": [[[0, 0, 5, 5], []], [[1, 1, 5, 5], [[6, 0.5]]]]}).encode(),
        "json": json.dumps({"sha256": "0" * 64}).encode(),
    }

    def packed(given: dict[str, bytes]) -> bytes:
        return b"".join(len(data).to_bytes(2, "little") + data for data in given.values())

    def read(data: bytes) -> object:
        given, at = {}, 0
        for name in members:
            size = int.from_bytes(data[at : at + 2], "little")
            given[name] = data[at + 2 : at + 2 + size]
            at += 2 + size
        return len(read_sample(given, (8, 4), ("a", "b")).captions)

    return read, [packed(members)]


def captions(folder: Path) -> tuple[Reader, list[bytes]]:
    from distill.caption_files import open_captions

    place = folder / "c.jsonl"

    def read(data: bytes) -> object:
        place.write_bytes(data)
        return open_captions(place)

    full = b'{"key": "a", "captions": [{"text": "a dog", "type": "synthetic", "language": "en", "source": "m", "parent": -1, "sentence": -1}, {"text": "x"}]}'
    return read, [full + b'\n{"key": "b", "captions": []}\n']


def keep_list(folder: Path) -> tuple[Reader, list[bytes]]:
    from distill.keep_list import read_keep_list, write_keep_list

    place = folder / "keep.txt"
    sound = write_keep_list(place, ["a", "b", "é"], {"why": "x"}).read_bytes()

    def read(data: bytes) -> object:
        place.write_bytes(data)
        return read_keep_list(place)

    return read, [sound]


def weights(folder: Path) -> tuple[Reader, list[bytes]]:
    import torch
    from safetensors.torch import save

    from mobileclip.weights import read_weights, weight_shapes

    place = folder / "w.safetensors"

    def read(data: bytes) -> object:
        place.write_bytes(data)
        return weight_shapes(place), list(read_weights(place))

    return read, [save({"a": torch.zeros(2, 3), "b.weight": torch.ones(4, dtype=torch.float16)})]


def checkpoint_config(folder: Path) -> tuple[Reader, list[bytes]]:
    """Down to the model that a configuration describes, outlined without memory."""
    from mobileclip.checkpoint import outline, read_config
    from mobileclip.config import config_to_dict
    from mobileclip.presets import PRESETS

    place = folder / "checkpoint"
    place.mkdir()

    def read(data: bytes) -> object:
        (place / "config.json").write_bytes(data)
        return len(list(outline(read_config(place)).parameters()))

    return read, [json.dumps(config_to_dict(PRESETS[name])).encode() for name in ("pocket_s", "mobileclip2_s0")]


def class_table(folder: Path) -> tuple[Reader, list[bytes]]:
    import runtime
    from runtime.classes import from_bytes, make_table

    clip = runtime.load(_bundle(folder), threads=1)
    make_table(clip, ["red", "green"]).save(folder / "c.safetensors")
    return (lambda data: from_bytes(data, "c", clip).names), [(folder / "c.safetensors").read_bytes()]


def adapter(folder: Path) -> tuple[Reader, list[bytes]]:
    from runtime.index_adapter import Adapter, read_adapter, tensors, write_adapter

    place = folder / "a.safetensors"
    weight, bias = np.eye(6, 4, dtype=np.float32), np.zeros(4, np.float32)
    model = {"name": "m", "checkpoint": "1" * 64}
    write_adapter(
        place, Adapter(tensors=tensors("text", weight, bias, 1 << 20), old={**model, "embed_dim": 4}, new={**model, "checkpoint": "2" * 64, "embed_dim": 6}, figures={"r": 1.0})
    )
    sound = place.read_bytes()

    def read(data: bytes) -> object:
        place.write_bytes(data)
        return read_adapter(place)

    return read, [sound]


def photo_index(folder: Path) -> tuple[Reader, list[bytes]]:
    """A folder's database as bytes: opened, searched."""
    from runtime.index import Index
    from tests.attacks.data import MODEL
    from tests.runtime.test_index import cloud

    place = folder / "p.idx"
    with Index.create(place, MODEL) as index:
        index.add_vectors([f"/v/{n}" for n in range(12)], cloud(12))
    with contextlib.closing(sqlite3.connect(place / "index.sqlite", isolation_level=None)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.execute("VACUUM")
        db.execute("PRAGMA journal_mode=DELETE")
    sound = (place / "index.sqlite").read_bytes()
    asked = cloud(1, seed=1)[0]

    def read(data: bytes) -> object:
        for left in place.glob("index.sqlite?*"):
            left.unlink()
        (place / "index.sqlite").write_bytes(data)
        with Index.open(place, create=False) as opened:
            return opened.search_vector(asked, k=3)

    return read, [sound]


def photo_segment(folder: Path) -> tuple[Reader, list[bytes]]:
    """A file of vectors whose index knows its digest."""
    from runtime.index import Index
    from runtime.index_segments import Records
    from tests.attacks.data import MODEL
    from tests.runtime.test_index import cloud

    place = folder / "p.idx"
    with Index.create(place, MODEL) as index:
        index.add_vectors([f"/v/{n}" for n in range(12)], cloud(12))
        coding = index._main_coding()
    sound = max((path for path in (place / "segments").iterdir() if path.is_file()), key=lambda path: path.stat().st_size).read_bytes()
    fuzzed = folder / "s.vectors"

    def read(data: bytes) -> object:
        fuzzed.write_bytes(data)
        length = int.from_bytes(data[:8], "little")
        head = hashlib.sha256(data[: 8 + length] if length < len(data) else data).hexdigest()
        records = Records(fuzzed, coding, {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "head": head})
        if not records.n:  # the index never asks a segment without rows
            return 0
        return records.take(np.arange(min(records.n, 3))).shape, records.vectors(0, min(records.n, 3)).shape

    return read, [sound]


JSON, LINES, TENSORS = mutation.of_json, mutation.of_lines, mutation.of_tensors
TARGETS: dict[str, Target] = {
    "manifest": Target(prepare=manifest, change=JSON),
    "bundle-zip": Target(prepare=bundle_zip, most=65_536),
    "graph": Target(prepare=graph, most=4096),
    "tokenizer-file": Target(prepare=tokenizer_file, change=JSON, most=65_536),
    "texts": Target(prepare=texts, most=512),
    "picture": Target(prepare=picture, most=4096),
    "pairs": Target(prepare=pairs, change=mutation.of_tar, most=32_768),
    "store-index": Target(prepare=store_index, change=JSON),
    "store-part": Target(prepare=store_part, change=TENSORS),
    "results": Target(prepare=results, change=LINES, bounded=False),
    "importers": Target(prepare=importers, most=4096),
    "published-sample": Target(prepare=published_sample, most=8192),
    "captions": Target(prepare=captions, change=LINES, most=4096),
    "keep-list": Target(prepare=keep_list, most=4096),
    "weights": Target(prepare=weights, change=TENSORS, most=4096),
    "checkpoint-config": Target(prepare=checkpoint_config, change=JSON),
    "class-table": Target(prepare=class_table, change=TENSORS, most=4096),
    "adapter": Target(prepare=adapter, change=TENSORS, most=65_536),
    "photo-index": Target(prepare=photo_index, most=262_144),
    "photo-segment": Target(prepare=photo_segment, change=TENSORS),
}


def refusal_or(read: Callable[[], object]) -> object:
    """What a reader gives, or what it says."""
    from runtime.errors import ClipError

    try:
        return read()
    except ClipError as error:
        return str(error)


def well(reader: Reader, data: bytes) -> Any:
    """What a reader made of bytes; a refusal in one sentence counts as well. Raises what else the reader raises."""
    from runtime.errors import ClipError

    try:
        return reader(data)
    except ClipError as error:
        said = str(error)
        assert said.strip(), "a refusal without a word"
        assert "\n" not in said, f"a refusal of several lines: {said[:200]!r}"
        return error
