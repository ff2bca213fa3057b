"""Hostile pairs, stores, photo indexes, adapters, results, other tools' outputs and devices' names."""

from __future__ import annotations

import io
import json
import sqlite3
import struct
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from tests.attacks.bundles import tensors
from tests.attacks.harness import Case, GoesOn, Victim, cli
from tests.attacks.pictures import encoded

# ------------------------------------------------------------------ pairs


def tar_of(*members: tuple[str, bytes, dict[str, Any]], after: Callable[[bytes], bytes] = lambda data: data, name: str = "a.tar", mode: str = "w") -> Case:
    def case(folder: Path) -> Victim:
        place = folder / "pairs"
        place.mkdir()
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode=mode) as archive:
            for member, data, change in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                for key, value in change.items():
                    setattr(info, key, value)
                archive.addfile(info, io.BytesIO(data))
        (place / name).write_bytes(after(out.getvalue()))
        return open_it(place)

    return case


def open_it(place: Path) -> Victim:
    def victim() -> object:
        from runtime.pairs import open_pairs

        pairs = open_pairs(place)
        pairs.image(0)
        return len(pairs)

    return victim


def good_pair(key: str = "k") -> tuple[tuple[str, bytes, dict[str, Any]], ...]:
    return (f"{key}.png", encoded(), {}), (f"{key}.txt", b"a caption", {})


def resized(size: bytes) -> Callable[[bytes], bytes]:
    """The first header's size field replaced, and its checksum made right."""

    def change(data: bytes) -> bytes:
        header = bytearray(data[:512])
        header[124:136] = size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return bytes(header) + data[512:]

    return change


def long_name(data: bytes) -> bytes:
    """A GNU long name of ten gigabytes on paper."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = b"L", 10**10
    return info.tobuf(tarfile.GNU_FORMAT) + data


def pax(records: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        info = tarfile.TarInfo("x")
        info.type, info.size = b"x", len(records)
        return info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(-(-len(records) // 512) * 512, b"\0") + data

    return change


def alone(data: bytes, name: str = "a.tar") -> Case:
    def case(folder: Path) -> Victim:
        place = folder / "pairs"
        place.mkdir()
        (place / name).write_bytes(data)
        return open_it(place)

    return case


PAIRS: dict[str, Case] = {
    "member that leaves: ../x": tar_of(("../../x.png", encoded(), {}), ("../../x.txt", b"x", {})),
    "member that leaves: absolute": tar_of(("/tmp/x.png", encoded(), {}), ("/tmp/x.txt", b"x", {})),
    "member that is a link": tar_of(("k.png", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}), ("k.txt", b"x", {})),
    "member that is a hard link": tar_of(("k.png", b"", {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"})),
    "member that is a device": tar_of(("k.png", b"", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5})),
    "member that is a pipe": tar_of(("k.png", b"", {"type": tarfile.FIFOTYPE})),
    "member of 8 gigabytes on paper": tar_of(*good_pair(), after=resized(b"77777777777\0")),
    "member of 2^88 bytes on paper": tar_of(*good_pair(), after=resized(b"\x80" + b"\xff" * 11)),
    "member of negative size": tar_of(*good_pair(), after=resized(b"\xff" * 12)),
    "long name of ten gigabytes": tar_of(*good_pair(), after=long_name),
    "extended header that lies about its length": tar_of(*good_pair(), after=pax(b"99999999 path=../../x.png\n")),
    "extended header with a size that lies": tar_of(*good_pair(), after=pax(b"25 size=99999999999999999\n")),
    "extended header with a name that leaves": tar_of(*good_pair(), after=pax(b"21 path=../../x.png\n\n")),
    "compressed archive": tar_of(*good_pair(), name="a.tar.gz", mode="w:gz"),
    "compressed archive under another name": tar_of(*good_pair(), mode="w:gz"),
    "the same key twice": tar_of(*good_pair(), *good_pair()),
    "picture that is a bomb": tar_of(("k.png", __import__("tests.attacks.pictures", fromlist=["png"]).png(50_000, 50_000), {}), ("k.txt", b"x", {})),
    "cut in half": tar_of(*good_pair(), after=lambda data: data[:700]),
    "bytes of chance": alone(bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8))),
    "zeros": alone(bytes(10240)),
}

# ------------------------------------------------------------------ stores


def store(change: Callable[[dict[str, Any]], object]) -> Case:
    """A store whose index was changed."""

    def case(folder: Path) -> Victim:
        place = made_store(folder)
        index = json.loads((place / "index.json").read_bytes())
        change(index)
        (place / "index.json").write_text(json.dumps(index))
        return read_store(place)

    return case


def made_store(folder: Path) -> Path:
    from tests.distill.stores import make_store

    make_store(folder / "store", counts=(5,), dims=(8,))
    return folder / "store"


def read_store(place: Path) -> Victim:
    def victim() -> object:
        from distill.store import open_store

        opened = open_store(place, verify=True)
        return opened.image_embeddings(0, [0], [0]).shape

    return victim


def part(data: Callable[[bytes], bytes]) -> Case:
    def case(folder: Path) -> Victim:
        place = made_store(folder)
        path = next(place.glob("*.safetensors"))
        path.write_bytes(data(path.read_bytes()))
        return read_store(place)

    return case


def index_bytes(raw: bytes) -> Case:
    def case(folder: Path) -> Victim:
        place = made_store(folder)
        (place / "index.json").write_bytes(raw)
        return read_store(place)

    return case


STORES: dict[str, Case] = {
    "10^15 rows": store(lambda d: d.update(rows=10**15)),
    "10^15 rows in its part too": store(lambda d: (d.update(rows=10**15), d["parts"][0].update(rows=10**15))),
    "part that leaves": store(lambda d: d["parts"][0].update(path="../../x.safetensors", file="../../x.safetensors", name="../../x.safetensors")),
    "shard with the name of a path": store(lambda d: d["parts"][0].update(shard="../../x")),
    "teacher of 10^12 values": store(lambda d: d["teachers"][0].update(dim=10**12)),
    "negative views": store(lambda d: d["layers"][0].update(views=-1, augmentations=-1)),
    "10^12 layers on paper": store(lambda d: d.update(layers=10**12)),
    "dtype with the name of a class": store(lambda d: d.update(dtype="object")),
    "schema of the future": store(lambda d: d.update(schema=99, version=99)),
    "index of 100,000 brackets": index_bytes(b"[" * 100_000),
    "index that is a list": index_bytes(b"[]"),
    "index in UTF-16": index_bytes("{}".encode("utf-16")),
    "index with a number of a million digits": index_bytes(b'{"rows": ' + b"9" * 1_000_000 + b"}"),
    "part: header of 2^60 bytes": part(lambda raw: struct.pack("<Q", 2**60) + raw[8:]),
    "part: 2^40 values on paper": part(lambda raw: tensors({"image.0.embeddings": {"dtype": "I8", "shape": [2**40], "data_offsets": [0, 2**40]}})),
    "part: a pickle": part(lambda raw: b"\x80\x04cos\nsystem\n(S'touch mark'\ntR."),
    "part: cut in half": part(lambda raw: raw[: len(raw) // 2]),
    "part: one bit": part(lambda raw: raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:]),
}

# ------------------------------------------------------------------ photo indexes

MODEL = {"name": "m", "checkpoint": "1" * 64, "embed_dim": 48}


def photo_index(change: Callable[[Path], object]) -> Case:
    def case(folder: Path) -> Victim:
        from runtime.index import Index
        from tests.runtime.test_index import cloud

        place = folder / "p.idx"
        with Index.create(place, MODEL) as index:
            index.add_vectors([f"/v/{n}" for n in range(50)], cloud(50))
        change(place)

        def victim() -> object:
            with Index.open(place, create=False) as opened:
                return opened.search_vector(cloud(1, seed=1)[0], k=50)

        return victim

    return case


def sql(*statements: str) -> Case:
    def change(place: Path) -> None:
        with closing(sqlite3.connect(place / "index.sqlite", isolation_level=None)) as db:
            db.execute("PRAGMA writable_schema=ON")
            for statement in statements:
                db.execute(statement)

    return photo_index(change)


def segment(data: Callable[[bytes], bytes]) -> Case:
    def change(place: Path) -> None:
        path = next((place / "segments").iterdir())
        path.write_bytes(data(path.read_bytes()))

    return photo_index(change)


ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x AS id, x AS rows, '' AS files, 0 AS crc FROM n"


def read_it(data: bytes) -> Case:
    def case(folder: Path) -> Victim:
        (folder / "a.safetensors").write_bytes(data)

        def victim() -> object:
            from runtime.index_adapter import read_adapter

            return read_adapter(folder / "a.safetensors")

        return victim

    return case


INDEXES: dict[str, Case] = {
    "table that never ends": sql("DROP TABLE segments", f"CREATE VIEW segments AS {ENDLESS}"),
    "trigger of a stranger": sql("CREATE TRIGGER evil AFTER INSERT ON files BEGIN DELETE FROM contents; END"),
    "table more": sql("CREATE TABLE more(x)"),
    "vectors of 10^12 values": sql("""UPDATE meta SET value = '{"width": 1000000000000}' WHERE key = 'settings'"""),
    "10^15 rows": sql("UPDATE segments SET rows = 1000000000000000"),
    "files of a segment that are paths": sql("""UPDATE segments SET files = '{"vectors": {"path": "../../../etc/passwd"}}'"""),
    "paths changed": sql("UPDATE files SET path = X'2F6574632F706173737764' WHERE path = (SELECT path FROM files LIMIT 1)"),
    "schema of the future": sql("PRAGMA user_version=99"),
    "database of chance": photo_index(lambda place: (place / "index.sqlite").write_bytes(bytes(np.random.default_rng(0).integers(0, 256, 20000, dtype=np.uint8)))),
    "database that is a text": photo_index(lambda place: (place / "index.sqlite").write_bytes(b"SELECT 1;" * 1000)),
    "segment: header of 2^60 bytes": segment(lambda raw: struct.pack("<Q", 2**60) + raw[8:]),
    "segment: cut in half": segment(lambda raw: raw[: len(raw) // 2]),
    "segment: one bit": segment(lambda raw: raw[:-40] + bytes([raw[-40] ^ 1]) + raw[-39:]),
    "segment that is a link": photo_index(lambda place: (lambda path: (path.unlink(), path.symlink_to("/dev/zero")))(next((place / "segments").iterdir()))),
    "adapter: header of 2^60 bytes": read_it(tensors({}, size=2**60)),
    "adapter: 2^40 values on paper": read_it(tensors({"text.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})),
    "adapter: a pickle": read_it(b"\x80\x04cos\nsystem\n(S'touch mark'\ntR."),
}

# ------------------------------------------------------------------ results, other tools, devices


def result(raw: bytes, *words: str) -> Case:
    def case(folder: Path) -> Victim:
        (folder / "r.jsonl").write_bytes(raw)
        return cli(*(words or ("report",)), folder / "r.jsonl", *(() if words else ("-o", folder / "r.html")))

    return case


def line(**change: object) -> bytes:
    made = {
        "schema": 1, "kind": "latency", "phase": "image_tower", "artefact": "a", "bundle": {"name": "b", "sha256": "0" * 64}, "settings": {"threads": 1}, "unit": "ns",
        "summary": {"p50": 1.0, "p90": 1.0, "p99": 1.0, "n": 1, "valid": True, "reason": None}, "figures": {}, "samples": [1], "environment": None, "device": None,
        "created": "2026-01-01T00:00:00Z", "tool": {"name": "x", "version": "0"},
    }  # fmt: skip
    return json.dumps({**made, **change}).encode() + b"\n"


MARKUP = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def markup(folder: Path) -> Victim:
    """Markup in every text of a results file: the page shows it and has none of it."""
    from benchmarks.measure import summarise

    samples = [1_000_000 + n for n in range(100)]
    summary = summarise(np.array(samples)).as_dict()
    names = {"bundle": {"name": MARKUP, "sha256": "0" * 64}, "artefact": MARKUP, "device": {"kind": MARKUP, "label": MARKUP}, "samples": samples, "summary": summary}
    figures = {"tower": "image", "target": MARKUP, "precision": MARKUP, "accuracy": {"cosine_min": 1.0}}
    (folder / "r.jsonl").write_bytes(line(**names, figures=figures, environment={"processor": {"model": MARKUP}, "packages": {MARKUP: MARKUP}, "system": {"name": MARKUP}}))

    def victim() -> object:
        inner = cli("report", folder / "r.jsonl", "-o", folder / "r.html", "--title", MARKUP)
        found = inner()
        page = (folder / "r.html").read_text(encoding="utf-8")
        assert "<script>alert" not in page
        assert "<img src=x" not in page
        return GoesOn(found)

    return victim


def imported(format: str, raw: bytes) -> Case:
    def case(folder: Path) -> Victim:
        (folder / "t").write_bytes(raw)
        return cli("import-results", format, folder / "t", "--tower", "image", "--tool-version", "10.3", "--out", folder / "r.jsonl")

    return case


def device(spec: str, **settings: object) -> Case:
    def case(folder: Path) -> Victim:
        def victim() -> object:
            from benchmarks.devices import DeviceSettings, open_device

            if "runner" in settings:
                (folder / "benchmark_model").write_bytes(b"")
            given = {name: folder / "benchmark_model" if name == "runner" else value for name, value in settings.items()}
            return open_device(spec, DeviceSettings(**given))  # type: ignore[arg-type]

        return victim

    return case


RESULTS: dict[str, Case] = {
    "markup in every text": markup,
    "100,000 brackets": result(b"[" * 100_000),
    "samples that are texts": result(line(samples=["<b>"])),
    "samples that are not finite": result(b'{"schema": 1, "kind": "latency", "samples": [NaN]}\n'),
    "samples of negative time": result(line(samples=[-5])),
    "a number of a million digits": result(b'{"schema": ' + b"9" * 1_000_000 + b"}\n"),
    "schema of the future": result(line(schema=99)),
    "bytes of chance": result(bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8))),
    "cut in half": result(line()[:100]),
    "texts where numbers belong": result(line(summary={"p50": "x", "p90": {}, "p99": [], "n": "y"})),
    "compared, cut in half": result(line()[:100], "compare"),
    "inspected, 100,000 brackets": result(b"[" * 100_000, "inspect"),
    "trtexec: 100,000 brackets": imported("trtexec", b"[" * 100_000),
    "trtexec: times that are not finite": imported("trtexec", b'[{"latencyMs": Infinity, "computeMs": 1, "h2dMs": 0, "d2hMs": 0}]'),
    "trtexec: an object in place of a list": imported("trtexec", b'{"latencyMs": 1}'),
    "litert: bytes of chance": imported("litert", bytes(np.random.default_rng(1).integers(0, 256, 5000, dtype=np.uint8))),
    "litert: a line without an end": imported("litert", b"Inference timings in us: " + b"9" * 1_000_000),
    "onnxruntime: numbers of a million digits": imported("onnxruntime", b"model,ms\n" + b"9" * 1_000_000),
    "ai-hub: 100,000 brackets": imported("ai-hub", b'{"a":' * 100_000),
    "ai-hub: times that are texts": imported("ai-hub", b'{"execution_summary": {"all_inference_times": ["x"], "estimated_inference_time": "y"}}'),
}
DEVICES: dict[str, Case] = {
    "ssh: an option in place of a host": device("ssh:-oProxyCommand=touch mark"),
    "ssh: a host with a command": device("ssh:host; touch mark"),
    "adb: a serial with a command": device("adb:x; touch mark", runner=True),
    "adb: an option in place of a serial": device("adb:-s$(touch mark)", runner=True),
    "a kind that is a module": device("os.system:touch mark"),
}
