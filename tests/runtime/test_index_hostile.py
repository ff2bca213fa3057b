"""What goes wrong with folders, files, processes and disks: a sentence, the rest goes on, and nothing that was done is lost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import runtime
from runtime import index_adding, index_lists, index_vectors, index_writing
from runtime.errors import SearchError
from runtime.index import Index
from tests.runtime import toy
from tests.runtime.test_index import MODEL, cloud

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def clip(toy_bundle: Path) -> runtime.Clip:
    return runtime.load(toy_bundle, threads=1, measure=False)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for n, colour in enumerate(toy.COLOURS):
        toy.picture(colour, n).save(folder / f"{colour}.png")
    return folder


def test_broken_pictures_are_recorded_and_skipped(clip: runtime.Clip, photos: Path, tmp_path: Path) -> None:
    whole = (photos / "red.png").read_bytes()
    (photos / "half.png").write_bytes(whole[: len(whole) // 2])
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "noise.webp").write_bytes(os.urandom(500))
    (photos / "words.jpg").write_text("this is no picture")
    (photos / "folder.jpg").mkdir()
    os.mkfifo(photos / "pipe.png")
    for path in photos.iterdir():
        os.utime(path, (1_000_000_000,) * 2)
    with Index.open(tmp_path / "i", clip) as index:
        report = index.add(photos)
        assert report.added == 4
        assert sorted(Path(path).name for path, _ in report.failed) == ["empty.jpg", "half.png", "noise.webp", "words.jpg"]
        assert all(reason for _, reason in report.failed)
        assert index.facts()["unusable"] == 4
        again = index.add(photos)
        assert (again.unchanged, again.failed) == (8, [])  # not read again while they stay as they are
        (photos / "half.png").write_bytes(whole[:-1] + whole[-1:])  # the download is finished
        (photos / "words.jpg").unlink()
        last = index.add(photos)
        assert (last.known, last.deleted, last.failed) == (1, 1, [])
        (photos / "red.png").write_bytes(b"broken now")
        assert len(index.add(photos).failed) == 1
        assert index.search("red", k=1)[0].path.endswith("half.png")
        index.verify()


def test_files_that_vanish_while_indexing(clip: runtime.Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    data = []
    for n in range(8):
        toy.picture("red", n).save(folder / "x.png")
        data.append((folder / "x.png").read_bytes())
    (folder / "x.png").unlink()
    for n in range(3000):
        (folder / f"{n:04d}.png").write_bytes(data[n % 8])
    real = index_adding.read_picture

    def read(file, *rest):
        number = int(Path(os.fsdecode(file.path)).stem)
        if number % 3 == 0:
            Path(os.fsdecode(file.path)).unlink()
        return real(file, *rest)

    monkeypatch.setattr(index_adding, "read_picture", read)
    with Index.open(tmp_path / "i", clip) as index:
        report = index.add(folder)
        assert (report.added, report.known, report.vanished, report.failed) == (8, 1992, 1000, [])
        assert len(index) == 2000
        monkeypatch.undo()
        shutil.rmtree(folder)
        folder.mkdir()
        assert index.add(folder).deleted == 2000
        assert index.search("red") == []
        index.verify()


def test_links(clip: runtime.Clip, photos: Path, tmp_path: Path) -> None:
    (photos / "loop").symlink_to(photos)
    (photos / "up").symlink_to(tmp_path)
    (photos / "self.png").symlink_to(photos / "self.png")
    (photos / "nowhere.png").symlink_to(photos / "gone.png")
    (photos / "other.png").symlink_to(photos / "red.png")
    with Index.open(tmp_path / "index" / "i", clip) as index:
        report = index.add(photos)
        assert (report.added, report.known) == (4, 1)
        assert [Path(path).name for path, _ in report.unreadable] in ([], ["self.png"])
        assert len(index) == 5


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything; the same is tested as another user below")
def test_unreadable_places(clip: runtime.Clip, photos: Path, tmp_path: Path) -> None:
    unreadable_places(clip, photos, tmp_path)


def unreadable_places(clip: runtime.Clip, photos: Path, tmp_path: Path) -> None:
    (photos / "locked").mkdir()
    shutil.copy(photos / "red.png", photos / "locked" / "in.png")
    with Index.open(tmp_path / "i", clip) as index:
        assert index.add(photos).known == 1
        (photos / "locked").chmod(0)
        (photos / "blue.png").chmod(0)
        os.utime(photos / "blue.png")
        try:
            report = index.add(photos)
            assert [Path(path).name for path, _ in report.unreadable] == ["locked"]
            assert [(Path(path).name, reason) for path, reason in report.failed] == [("blue.png", "Permission denied")]
            assert report.deleted == 0  # what cannot be looked at is not taken for gone
            assert len(index.search("red", folder=photos / "locked")) == 1
            assert len(index.add(photos).failed) == 1  # tried again each time: nothing in the file is wrong
        finally:
            (photos / "locked").chmod(0o755)
            (photos / "blue.png").chmod(0o644)
        assert index.add(photos).failed == []
        assert len(index) == 5


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root to become somebody else")
def test_unreadable_places_as_nobody(toy_bundle: Path) -> None:
    """The test above in a child process that has given its rights away."""
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        shutil.copytree(toy_bundle, Path(place) / "bundle")
        (Path(place) / "photos").mkdir()
        for n, colour in enumerate(toy.COLOURS):
            toy.picture(colour, n).save(Path(place) / "photos" / f"{colour}.png")
        for path in (Path(place), *Path(place).rglob("*")):
            os.chown(path, 65534, 65534)
        code = (
            "import os, sys; from pathlib import Path; import runtime, numpy, onnxruntime; from PIL import Image; Image.init()\n"
            "from tests.runtime.test_index_hostile import unreadable_places; from runtime import encoder, index_adding, index_duplicates, machine\n"
            f"place = Path({place!r}); os.setgid(65534); os.setuid(65534)\n"
            "unreadable_places(runtime.load(place / 'bundle', threads=1, measure=False), place / 'photos', place)\nprint('passed')"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": place}, timeout=120)
        assert done.stdout.strip() == "passed", done.stderr[-2000:]


def test_names_that_are_no_text(clip: runtime.Clip, photos: Path, tmp_path: Path) -> None:
    odd = os.fsencode(photos) + b"/caf\xe9 \xff\n.png"
    os.rename(photos / "red.png", odd)
    with Index.open(tmp_path / "i", clip) as index:
        index.add(photos)
        (hit,) = index.search("red", k=1)
        assert os.fsencode(hit.path) == odd
        assert index.add(photos).unchanged + index.add(photos).known >= 4
        os.unlink(odd)
        assert index.add(photos).deleted == 1


def test_a_second_writer_is_told_and_readers_go_on(clip: runtime.Clip, photos: Path, tmp_path: Path) -> None:
    with Index.open(tmp_path / "i", clip) as index, Index.open(tmp_path / "i", clip) as reader:
        index.add(photos)
        with index_writing.writing(index):
            with pytest.raises(SearchError, match=f"is being written by process {os.getpid()}; wait"):
                reader.add(photos)
            assert len(reader.search("red")) == 4  # and sees what was added since it was opened
        for n in range(6):
            toy.picture("green", 50 + n).save(photos / f"new{n}.png")
            index.add(photos)
            assert len(reader.search("red", k=100)) == 5 + n
        assert len(reader.vectors.segments) <= 3


SLOW = """
import sys, time
from pathlib import Path
import runtime
from runtime import index_adding
from runtime.index import Index
index_adding.COMMIT_ROWS = 8
clip = runtime.load(sys.argv[1], threads=1, measure=False)
run = clip.encode_pixels
def slowly(pixels):
    time.sleep(0.05)
    return run(pixels)
clip.encode_pixels = slowly
report = Index.open(sys.argv[2], clip).add(sys.argv[3], batch=8, threads=2)
print(report.added, report.unchanged + report.known)
"""


def start(toy_bundle: Path, index: Path, photos: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MCLIP_PROGRESS": "0"}
    return subprocess.Popen([sys.executable, "-c", SLOW, str(toy_bundle), str(index), str(photos)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kept(index: Path) -> int:
    try:
        with sqlite3.connect(f"file:{index / 'index.sqlite'}?mode=ro", uri=True) as db:
            return db.execute("SELECT count(*) FROM contents").fetchone()[0]
    except sqlite3.Error:
        return 0


def test_kill_9_while_indexing_loses_nothing(toy_bundle: Path, clip: runtime.Clip, tmp_path: Path) -> None:
    folder, place = tmp_path / "p", tmp_path / "i"
    folder.mkdir()
    for n in range(160):
        toy.picture(list(toy.COLOURS)[n % 4], n).save(folder / f"{n}.png")
        os.utime(folder / f"{n}.png", (1_000_000_000,) * 2)
    before = 0
    for wanted in (8, 40, 90):
        process = start(toy_bundle, place, folder)
        until = time.monotonic() + 60
        while kept(place) < wanted and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert wanted <= kept(place) < 160
        assert kept(place) >= before
        before = kept(place)
        with Index.open(place, clip) as index:
            index.verify()
            assert len(index.search("red", k=500)) == before
    (place / "segments" / ".000099.vectors.1.part").write_bytes(b"left over")
    (place / "segments" / "000099.vectors").write_bytes(b"left over")
    process = start(toy_bundle, place, folder)
    assert process.communicate(timeout=60)[0].split() == [str(160 - before), str(before)]
    with Index.open(place, clip) as index:
        index.verify()
        assert len(index) == 160
        assert {path.name for path in (place / "segments").iterdir()} == index_writing.named(index)
        every = sorted(folder.iterdir())
        found = {hit.path: hit.score for hit in index.search("blue", k=500)}
        np.testing.assert_allclose([found[str(path)] for path in every], clip.encode_image(every) @ clip.encode_text(["blue"])[0], atol=2e-3)


def test_ctrl_c_keeps_what_was_done(clip: runtime.Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    for n in range(64):
        toy.picture("red", n).save(folder / f"{n:03d}.png")
    real, calls = clip.encode_pixels, []

    def encode(pixels):
        calls.append(len(pixels))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(pixels)

    monkeypatch.setattr(clip, "encode_pixels", encode)
    with Index.open(tmp_path / "i", clip) as index:
        with pytest.raises(KeyboardInterrupt):
            index.add(folder, batch=8)
        assert len(index) == 24
        assert index.add(folder, batch=8).added == 40
        assert len(index) == 64
        index.verify()


# ---------------------------------------------------------------- flipped bytes


def every_flip(place: Path, look) -> None:
    """Flip bytes all over the files of an index: each time it must either still give the right answer or refuse with a sentence."""
    expected = look(place)
    generator = np.random.default_rng(0)
    refused = 0
    files = [path for path in place.rglob("*") if path.is_file() and path.name != "lock"]
    for path in files:
        data = path.read_bytes()
        spots = [0, 9, 20, len(data) // 2, len(data) - 1, *generator.integers(0, len(data), 25).tolist()]
        for spot in spots:
            changed = bytearray(data)
            changed[spot] ^= 1 << int(generator.integers(8))
            path.write_bytes(changed)
            found, message = None, "nothing"
            with contextlib.suppress(SearchError):
                try:
                    found = look(place)
                except SearchError as error:
                    message = str(error)
                    raise
            for stray in place.glob("index.sqlite-*"):
                stray.unlink()
            path.write_bytes(data)
            if found is None:
                refused += 1
                assert any(word in message for word in ("damaged", "schema", "cannot be used")), message
                assert "make" in message
            else:
                assert found == expected, (path.name, spot)
    assert look(place) == expected
    assert refused > 20


@pytest.mark.parametrize("settings", [{}, {"dtype": "int8"}, {"dtype": "binary", "rescore": "int8"}, {"dtype": "int8", "dims": 16, "rescore": "float16"}])
def test_a_flipped_byte_is_refused(tmp_path: Path, settings: dict) -> None:
    vectors, queries = cloud(150), cloud(3, seed=1)
    with Index.create(tmp_path / "i", MODEL, **settings) as index:
        index.add_vectors([f"/v/{n}" for n in range(150)], vectors)

    def look(place: Path) -> list:
        with Index.open(place, create=False) as index:
            return [(hit.path, round(hit.score, 5)) for query in queries for hit in index.search_vector(query, k=150)]

    every_flip(tmp_path / "i", look)


def test_a_flipped_byte_in_lists_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_writing, "LISTS_FROM", 500)
    monkeypatch.setattr(index_lists, "FIRST_SHARE", 1.0)
    vectors, queries = cloud(700), cloud(3, seed=1)
    with Index.create(tmp_path / "i", MODEL, dtype="int8") as index:
        index.add_vectors([f"/v/{n}" for n in range(700)], vectors)
        index.settle()
        assert next(iter(index.vectors.segments.values())).lists is not None

    def look(place: Path) -> list:
        with Index.open(place, create=False) as index:
            return [(hit.path, round(hit.score, 5)) for query in queries for hit in index.search_vector(query, k=15)]

    every_flip(tmp_path / "i", look)


def test_verify_reads_every_byte(tmp_path: Path) -> None:
    vectors = cloud(200)
    with Index.create(tmp_path / "i", MODEL, dtype="int8", rescore="float16") as index:
        index.add_vectors([f"/v/{n}" for n in range(200)], vectors)
    for path in (tmp_path / "i" / "segments").iterdir():
        data = path.read_bytes()
        for spot in np.random.default_rng(1).integers(0, len(data), 20).tolist():
            changed = bytearray(data)
            changed[spot] ^= 4
            path.write_bytes(changed)
            with pytest.raises(SearchError, match="damaged"):
                with Index.open(tmp_path / "i", create=False) as index:
                    index.verify()
            path.write_bytes(data)


@pytest.mark.parametrize("harm", ["truncated", "missing", "empty", "swapped"])
def test_segments_that_are_not_those_that_were_written(tmp_path: Path, harm: str) -> None:
    with Index.create(tmp_path / "i", MODEL, dtype="int8") as index:
        index.add_vectors([f"/v/{n}" for n in range(100)], cloud(100))
        index.add_vectors([f"/w/{n}" for n in range(100)], cloud(100, seed=7))
    one, other = sorted((tmp_path / "i" / "segments").iterdir())
    if harm == "truncated":
        one.write_bytes(one.read_bytes()[:-1])
    elif harm == "missing":
        one.unlink()
    elif harm == "empty":
        one.write_bytes(b"")
    else:
        data = one.read_bytes()
        size = 52
        one.write_bytes(data[: -2 * size] + data[-size:] + data[-2 * size : -size])  # two rows change places
    with pytest.raises(SearchError, match=r"is damaged .* make it again with 'mclip index'"):
        with Index.open(tmp_path / "i", create=False) as index:
            index.search_vector(cloud(1)[0], k=200)
    assert other.exists()


@pytest.mark.parametrize("content", [b"", b"not a database at all, but longer than a header" * 10, b"SQLite format 3\0" + b"\0" * 4000])
def test_a_database_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "index.sqlite").write_bytes(content)
    with pytest.raises(SearchError):
        Index.open(tmp_path / "i", create=False)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    Index.create(tmp_path / "i", MODEL).close()
    with sqlite3.connect(tmp_path / "i" / "index.sqlite") as db:
        db.execute("PRAGMA user_version=2")
    db.close()
    with pytest.raises(SearchError, match="schema 2, this version reads schema 1"):
        Index.open(tmp_path / "i", create=False)


def test_a_read_only_index_is_searched(tmp_path: Path) -> None:
    """On a medium that cannot be written, SQLite's shared file cannot be made."""
    with Index.create(tmp_path / "i", MODEL, dtype="int8") as index:
        index.add_vectors([f"/v/{n}" for n in range(100)], cloud(100))
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[2]); from runtime import index_files\n"
        "index_files.os.access = lambda *_: False\n"  # root may write everywhere: what the system would answer to somebody else
        "from runtime.index import Index; import numpy, json; index = Index.open(sys.argv[1], create=False)\n"
        "print(json.dumps([hit.path for hit in index.search_vector(numpy.ones(48, numpy.float32), k=5)]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "i"), str(ROOT)], capture_output=True, text=True, timeout=60)
    assert len(json.loads(done.stdout)) == 5, done.stderr
    assert sorted(path.name for path in (tmp_path / "i").iterdir()) == ["index.sqlite", "lock", "segments"]


def test_lists_threshold_is_one_number() -> None:
    assert index_writing.LISTS_FROM == index_vectors.LISTS_FROM == 50_000
