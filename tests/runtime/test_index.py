"""The photo index: what is found, what an update costs, what it recognises. Brute force in numpy is the peer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import runtime
from runtime import index_adding, index_vectors, index_writing
from runtime.errors import SearchError
from runtime.index import Index
from runtime.index_coding import DTYPES
from runtime.index_models import identity
from tests.runtime import toy

MODEL = {"name": "m", "checkpoint": "c" * 64, "embed_dim": 48, "space": None}


@pytest.fixture(scope="module")
def clip(toy_bundle: Path) -> runtime.Clip:
    return runtime.load(toy_bundle, threads=1, measure=False)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve different pictures: four colours in three folders, all old enough to be trusted by their time."""
    folder = tmp_path / "photos"
    for n, name in enumerate(("a", "b", "b/c")):
        (folder / name).mkdir(parents=True)
        for m, colour in enumerate(toy.COLOURS):
            path = folder / name / f"{colour}.png"
            toy.picture(colour, 10 * n + m).save(path)
            os.utime(path, (1_000_000_000 + 86_400 * 366 * n,) * 2)
    return folder


def cloud(n: int, dims: int = 48, seed: int = 0) -> np.ndarray:
    """Unit vectors in clusters, as embeddings are."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(12, dims))
    found = centres[generator.integers(12, size=n)] + 0.5 * generator.normal(size=(n, dims)) * np.linspace(2, 0.2, dims)
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def names(hits: list) -> list[str]:
    return [Path(hit.path).name for hit in hits]


def test_words_find_pictures(clip: runtime.Clip, photos: Path, tmp_path: Path) -> None:
    with Index.open(tmp_path / "i", clip) as index:
        report = index.add(photos)
        assert (report.added, report.known, report.failed, report.deleted) == (12, 0, [], 0)
        assert len(index) == 12
        hits = index.search("green", k=4)
        assert names(hits)[:3] == ["green.png"] * 3
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        every = [photos / "a" / f"{colour}.png" for colour in toy.COLOURS]
        expected = clip.encode_image(every) @ clip.encode_text(["green"])[0]
        scores = {hit.path: hit.score for hit in index.search("green", k=100)}
        np.testing.assert_allclose([scores[str(path)] for path in every], expected, atol=2e-3)
        assert names(index.search(image=photos / "a" / "blue.png", k=3)) == ["blue.png"] * 3
        assert names(index.search("red", image=photos / "a" / "blue.png", weight=0.95, k=1)) == ["blue.png"]
        assert names(index.search("red", image=photos / "a" / "blue.png", weight=0.05, k=1)) == ["red.png"]


def test_filters(clip: runtime.Clip, photos: Path, tmp_path: Path) -> None:
    with Index.open(tmp_path / "i", clip) as index:
        index.add(photos)
        below = index.search("red", folder=photos / "b", k=100)
        assert len(below) == 8
        assert all(str(photos / "b") + os.sep in hit.path for hit in below)
        assert len(index.search("red", folder=photos / "b" / "c", k=100)) == 4
        assert index.search("red", folder=str(photos)[:-1]) == []
        assert len(index.search("red", since="2001", until="2001", k=100)) == 4
        assert len(index.search("red", since="2002-09-10", k=100)) == 8
        assert len(index.search("red", until="2002-09-10", k=100)) == 8
        assert index.search("red", since="2100") == []
        with pytest.raises(SearchError, match="is no date"):
            index.search("red", since="yesterday")


def test_the_camera_s_date_counts(clip: runtime.Clip, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    exif = Image.Exif()
    exif.get_ifd(0x8769)[36867] = "1999:12:31 23:59:58"
    toy.picture("red").save(folder / "dated.jpg", exif=exif)
    exif = Image.Exif()
    exif[306] = "not a date at all"
    toy.picture("blue").save(folder / "odd.jpg", exif=exif)
    with Index.open(tmp_path / "i", clip) as index:
        index.add(folder)
        (hit,) = index.search("blue", until="1999-12-31")
        assert (Path(hit.path).name, hit.taken) == ("dated.jpg", "1999-12-31T23:59:58")
        assert len(index.search("blue", since="2020")) == 1


def test_an_update_reads_only_what_changed(clip: runtime.Clip, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = index_adding.read_picture
    monkeypatch.setattr(index_adding, "read_picture", lambda file, *rest: read.append(file.path) or real(file, *rest))
    encoded = []
    monkeypatch.setattr(clip, "encode_pixels", lambda pixels, run=clip.encode_pixels: encoded.append(len(pixels)) or run(pixels))
    with Index.open(tmp_path / "i", clip) as index:
        index.add(photos)
        assert (len(read), sum(encoded)) == (12, 12)
        read.clear()
        encoded.clear()
        assert index.add(photos).unchanged == 12
        assert (read, encoded) == ([], [])

        shutil.move(photos / "a", photos / "moved")
        (photos / "b" / "red.png").unlink()
        shutil.copy(photos / "b" / "blue.png", photos / "copy.png")
        toy.picture("white", 77).save(photos / "b" / "green.png")
        report = index.add(photos)
        assert (report.added, report.known, report.moved, report.deleted, report.updated, report.unchanged) == (1, 5, 4, 5, 1, 6)
        assert sum(encoded) == 1
        assert names(index.search("green", k=2)) == ["green.png"] * 2
        assert {Path(hit.path).parent.name for hit in index.search("green", k=2)} == {"moved", "c"}
        (hit,) = [hit for hit in index.search("blue", k=9) if hit.copies]
        assert {Path(path).name for path in (hit.path, *hit.copies)} == {"blue.png", "copy.png"}
        assert len(index) == 12


def test_folders_are_updated_one_by_one(clip: runtime.Clip, photos: Path, tmp_path: Path) -> None:
    with Index.open(tmp_path / "i", clip) as index:
        index.add(photos / "a")
        index.add(photos / "b", photos / "b" / "c" / "red.png")
        assert len(index) == 12
        shutil.rmtree(photos / "a")
        assert index.add(photos / "b").deleted == 0
        with pytest.raises(SearchError, match="does not exist"):
            index.add(photos / "a")
        assert len(index) == 12
        assert index.remove(photos / "a") == 4
        assert len(index) == 8
        index.verify()


def test_a_picture_that_comes_back_is_known(clip: runtime.Clip, photos: Path, tmp_path: Path) -> None:
    with Index.open(tmp_path / "i", clip) as index:
        index.add(photos)
        shutil.move(photos / "a" / "red.png", tmp_path / "red.png")
        assert index.add(photos).deleted == 1
        assert len(index.search("red", k=100)) == 11
        shutil.move(tmp_path / "red.png", photos / "a" / "red.png")
        report = index.add(photos)
        assert (report.added, report.known) == (0, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rescore", [None, "float16", "int8"])
def test_vectors_against_brute_force(tmp_path: Path, dtype: str, rescore: str | None) -> None:
    vectors, queries = cloud(3000), cloud(40, seed=1)
    with Index.create(tmp_path / "i", MODEL, dtype=dtype, rescore=rescore) as index:
        for start in range(0, 3000, 700):
            index.add_vectors([f"/v/{n}" for n in range(start, min(start + 700, 3000))], vectors[start : start + 700])
        index.settle()
        assert index.facts()["segments"] == 1
        truth = queries @ vectors.T
        hit, error = [], []
        for query, row in zip(queries, truth, strict=True):
            found = index.search_vector(query, k=10)
            rows = [int(Path(entry.path).name) for entry in found]
            hit.append(len(set(rows) & set(np.argsort(-row)[:10].tolist())) / 10)
            error.append(np.abs(row[rows] - [entry.score for entry in found]).max())
        exact = rescore or (dtype if dtype != "binary" else None)
        assert np.mean(hit) >= (0.97 if exact else 0.1)  # 48 bits alone tell little; by chance it would be 0.003
        if exact:
            assert max(error) < {"float16": 1e-3, "int8": 2e-2}[exact]
        facts = index.facts()
        assert facts["vector_bytes"] < {"float16": 105, "int8": 60, "binary": 16}[dtype] * 3000 + 4096
        assert (facts["rescoring_bytes"] > 0) == (rescore is not None)


def test_a_nested_prefix_is_scanned_and_the_whole_rescores(tmp_path: Path) -> None:
    vectors, queries = cloud(2000), cloud(30, seed=1)
    recall = {}
    for name, settings in {"prefix": {"dims": 16}, "rescored": {"dims": 16, "rescore": "float16"}}.items():
        with Index.create(tmp_path / name, MODEL, dtype="int8", **settings) as index:
            index.add_vectors([f"/v/{n}" for n in range(2000)], vectors)
            found = [{int(Path(hit.path).name) for hit in index.search_vector(query, k=5)} for query in queries]
            best = [set(np.argsort(-row)[:5].tolist()) for row in queries @ vectors.T]
            recall[name] = np.mean([len(a & b) / 5 for a, b in zip(found, best, strict=True)])
    assert recall["rescored"] > max(recall["prefix"], 0.9)


def test_lists_find_what_a_full_scan_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_vectors, "LISTS_FROM", 5000)
    monkeypatch.setattr(index_writing, "LISTS_FROM", 5000)
    vectors, queries = cloud(20_000), cloud(60, seed=1)
    with Index.create(tmp_path / "i", MODEL, dtype="int8") as index:
        index.add_vectors([f"/{'even' if n % 2 == 0 else 'odd'}/{n}" for n in range(20_000)], vectors)
        plain = [index.search_vector(query) for query in queries]
        index.settle()
        (segment,) = index.vectors.segments.values()
        assert segment.lists is not None
        quick = [index.search_vector(query) for query in queries]
        assert np.mean([len({hit.path for hit in a} & {hit.path for hit in b}) / 10 for a, b in zip(plain, quick, strict=True)]) >= 0.95
        rows, _ = segment.lists.candidates(queries[0], 16)
        assert len(rows) < 5000
        assert len(set(rows.tolist())) == len(rows)
        # Filters and dead rows widen the search instead of shortening the answer.
        assert len(index.search_vector(queries[0], k=50, folder="/odd")) == 50
        (rare,) = index.search_vector(-queries[0], k=3, folder=f"/even/{np.argmax(queries[0] @ vectors[::2].T) * 2}")
        assert rare.score < -0.5
        index.remove("/even")
        assert len(index.search_vector(queries[0], k=100)) == 100
        assert all("/odd/" in hit.path for hit in index.search_vector(queries[0], k=100))
        index.verify()


def test_segments_are_merged_and_the_dead_leave(tmp_path: Path) -> None:
    vectors = cloud(2000)
    with Index.create(tmp_path / "i", MODEL, dtype="float16") as index:
        for start in range(0, 2000, 100):
            index.add_vectors([f"/{n % 2}/{n}" for n in range(start, start + 100)], vectors[start : start + 100])
        assert len(index.files.segments()) == 20
        before = [hit.path for hit in index.search_vector(vectors[7], k=20)]
        index.settle()
        assert len(index.files.segments()) <= 5
        assert [hit.path for hit in index.search_vector(vectors[7], k=20)] == before
        index.remove("/0")
        assert sum(rows for rows, _ in index.files.segments().values()) == 1000
        assert index.facts()["pictures"] == 1000
        assert len(list((tmp_path / "i" / "segments").iterdir())) == len(index.files.segments())
        index.verify()


@pytest.mark.parametrize("rows", [{}, {1: 10}, {1: 10, 2: 10}, {1: 1000, 2: 10}, {1: 1000, 2: 600}, dict.fromkeys(range(50), 7), {n: 2**n for n in range(12)}])
def test_what_is_merged(rows: dict[int, int]) -> None:
    while chosen := index_vectors.to_merge(rows):
        assert len(chosen) > 1
        total = sum(rows.pop(number) for number in chosen)
        rows = {**rows, max([0, *rows, *chosen]) + 1: total}
    ordered = sorted(rows.values(), reverse=True)
    assert all(size >= 2 * sum(ordered[place + 1 :]) for place, size in enumerate(ordered[:-1]))


def test_near_duplicates(tmp_path: Path, clip: runtime.Clip) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    toy.picture("red", 1).save(folder / "one.png")
    toy.picture("red", 1).resize((48, 40)).save(folder / "larger.png")
    shutil.copy(folder / "one.png", folder / "same.png")
    toy.picture("blue", 2).save(folder / "other.png")
    with Index.open(tmp_path / "i", clip) as index:
        index.add(folder)
        (group,) = index.duplicates(0.99)
        assert [Path(path).name for path in group] == ["larger.png", "one.png", "same.png"]
        assert sum(map(len, index.duplicates(0.01))) >= 3
        with pytest.raises(SearchError, match="threshold"):
            index.duplicates(0)


def test_near_duplicates_through_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime import index_duplicates

    vectors = cloud(300)
    vectors[100:110] = vectors[:10] + 0.003 * cloud(10, seed=5)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    with Index.create(tmp_path / "i", MODEL) as index:
        index.add_vectors([f"/v/{n}" for n in range(300)], vectors)
        every = index.duplicates(0.999)
        monkeypatch.setattr(index_duplicates, "EXACT_TO", 0)
        assert index.duplicates(0.999) == every
        assert len(every) == 10


def test_only_the_model_that_made_an_index_may_ask(clip: runtime.Clip, toy_bundle: Path, tmp_path: Path, photos: Path) -> None:
    from dataclasses import replace

    from runtime.manifest import read_manifest, write_manifest

    with Index.open(tmp_path / "i", clip) as index:
        index.add(photos)
    exact = runtime.load(toy_bundle, prefer={"text": "fp32"}, measure=False)
    assert exact.choice["text"].id != clip.choice["text"].id
    with Index.open(tmp_path / "i", exact) as index:  # another artefact of the same checkpoint
        assert names(index.search("red", k=1)) == ["red.png"]
    others = {}
    for name, provenance in {"other": {"checkpoint_sha256": "1" * 64}, "space": {"checkpoint_sha256": "2" * 64, "space": "s"}, "silent": {}}.items():
        shutil.copytree(toy_bundle, tmp_path / name)
        write_manifest(tmp_path / name, replace(read_manifest(tmp_path / name), provenance=provenance))
        others[name] = runtime.load(tmp_path / name, threads=1, measure=False)
    for name in others:
        with pytest.raises(SearchError, match="cannot be compared"):
            Index.open(tmp_path / "i", others[name])
    with Index.open(tmp_path / "i", others["other"], same_space=True) as index:
        assert names(index.search("red", k=1)) == ["red.png"]
        with pytest.raises(SearchError, match="only that model can add"):
            index.add(photos)
    assert identity(others["silent"].manifest)["checkpoint"].startswith("golden:")
    with Index.open(tmp_path / "j", others["space"]) as index:
        index.add(photos)
    shutil.copytree(tmp_path / "space", tmp_path / "student")
    write_manifest(tmp_path / "student", replace(read_manifest(tmp_path / "student"), provenance={"checkpoint_sha256": "3" * 64, "space": "s"}))
    with Index.open(tmp_path / "j", runtime.load(tmp_path / "student", measure=False)) as index:  # the manifests name one space
        assert names(index.search("red", k=1)) == ["red.png"]


def test_wrong_use_is_said(clip: runtime.Clip, tmp_path: Path) -> None:
    with pytest.raises(SearchError, match="is no photo index"):
        Index.open(tmp_path / "none", clip, create=False)
    with pytest.raises(SearchError, match="expected one of float16, int8, binary"):
        Index.create(tmp_path / "i", clip, dtype="float8")
    with pytest.raises(SearchError, match="dims is 13, expected 1 to 12"):
        Index.create(tmp_path / "i", clip, dims=13)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(SearchError, match="not empty"):
        Index.create(tmp_path / "full", clip)
    with Index.create(tmp_path / "i", clip) as index:
        assert index.search("red") == []
        for wrong in ({"text": ""}, {"text": "  "}, {}):
            with pytest.raises(SearchError, match="empty|nothing to look for"):
                index.search(**wrong)
        assert index.search("red " * 2500) == []
        with pytest.raises(SearchError, match="k is 0"):
            index.search("red", k=0)
        with pytest.raises(SearchError, match="shape"):
            index.search_vector(np.zeros(5, np.float32))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
