"""Layers: whatever was appended, the store reads as one; what was there is not touched; layers that do not fit are refused."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.store import open_store
from distill.store_writing import PartRows, entry_of, next_layer, write_index, write_part
from mobileclip.inspection import facts_of
from runtime.errors import ClipError, StoreError
from runtime.files import file_sha256
from runtime.store_verification import find_damage
from tests.distill.stores import FLOOR, TABLES, Truth, append_layer, cut, edit_index, flip, make_rows, make_store

ROOT = Path(__file__).parents[2]
KINDS = ("augmentations", "captions", "teachers")


def check(folder: Path, truth: Truth, floor: float) -> None:
    """Everything that the store returns is what was written."""
    store = open_store(folder, verify=True)
    n, views = truth.parameters.shape[:2]
    assert store.keys == truth.keys
    assert store.n_augmentations.tolist() == [views] * n
    assert store.caption_counts.tolist() == [len(own) for own in truth.captions]
    rows, augs = np.divmod(np.random.default_rng(0).permutation(n * views), views)
    assert np.array_equal(store.augmentation(rows, augs), truth.parameters[rows, augs])
    places = [(row, j) for row in range(n) for j in range(len(truth.captions[row]))]
    assert all(store.caption(row, j) == truth.captions[row][j] for row, j in places)
    for t in range(len(store.teachers)):
        assert (store.image_embeddings(t, rows, augs) * truth.images[t][rows, augs]).sum(1).min() > floor
        expected = np.stack([truth.texts[t][row][j] for row, j in places])
        assert (store.text_embeddings(t, *np.array(places).T) * expected).sum(1).min() > floor
    for row, aug in [(0, 0), (n - 1, views - 1), (n // 2, views // 2)]:
        found, parameters = store.read_view_float(row, aug)
        assert np.array_equal(parameters, truth.parameters[row, aug])
        for t, vector in enumerate(found):
            assert np.abs(vector - store.image_embeddings(t, [row], [aug])[0]).max() < 1e-6
    for name, column in truth.columns.items():
        assert np.array_equal(store.column(name), column)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.lists(st.sampled_from(KINDS), max_size=4), st.sampled_from(["int8", "float32", "int4"]))
def test_any_stack_of_layers_reads_as_one_store(tmp_path_factory: pytest.TempPathFactory, kinds: list[str], dtype: str) -> None:
    folder = tmp_path_factory.mktemp("stack")
    truth = make_store(folder, dtype, counts=(3, 0, 4))
    for n, kind in enumerate(kinds):
        before = {path.name: file_sha256(path) for path in folder.glob("*.safetensors")}
        append_layer(folder, truth, kind, seed=10 + n)
        assert before.items() <= {path.name: file_sha256(path) for path in folder.glob("*.safetensors")}.items()
    check(folder, truth, FLOOR[dtype])


def test_a_view_that_came_after_a_teacher_and_a_teacher_that_came_after_a_view(tmp_path: Path) -> None:
    """The two places where a vector can lie: in the layer of the view, or in that of the later teacher. The files say which."""
    truth = make_store(tmp_path)
    for n, kind in enumerate(("augmentations", "teachers", "augmentations", "captions", "teachers")):
        append_layer(tmp_path, truth, kind, seed=n)
    check(tmp_path, truth, FLOOR["int8"])
    index = json.loads((tmp_path / "index.json").read_text())
    assert [layer["views"] for layer in index["layers"]] == [[0, 3], [3, 5], [0, 5], [5, 7], None, [0, 7]]
    assert [layer["teachers"] for layer in index["layers"]] == [[0, 1], [0, 1], [2], [0, 1, 2], [0, 1, 2], [3]]
    assert (index["augmentations"], len(index["parts"])) == (7, 18)
    from safetensors.numpy import load_file

    assert load_file(tmp_path / "s.0000.2.safetensors")["image.2.embeddings"].shape == (5, 5, 16)
    assert {name for name in load_file(tmp_path / "s.0000.3.safetensors") if name.endswith("embeddings")} == {f"image.{t}.embeddings" for t in range(3)}


def test_an_entry_can_be_read_back_from_its_part(tmp_path: Path) -> None:
    truth = make_store(tmp_path)
    append_layer(tmp_path, truth, "captions", seed=1)
    for entry in json.loads((tmp_path / "index.json").read_text())["parts"]:
        assert entry_of(tmp_path / entry["path"]) == {name: value for name, value in entry.items() if name not in ("shard", "part")}


# ---------------------------------------------------------------- what does not fit


def _layered(folder: Path) -> Truth:
    truth = make_store(folder)
    for n, kind in enumerate(KINDS):
        append_layer(folder, truth, kind, seed=n)
    return truth


def _set_layer(place: int, **fields):
    return lambda folder: edit_index(folder, lambda index: index["layers"][place].update(fields))


def _set_part(name: str, **fields):
    return lambda folder: edit_index(folder, lambda index: next(part for part in index["parts"] if part["path"] == name).update(fields))


def _drop(path: str):
    return lambda folder: edit_index(folder, lambda index: index.update(parts=[part for part in index["parts"] if part["path"] != path]))


def _swap_keys(folder: Path) -> None:
    """The part of a layer made for other keys, entered with its own hash."""
    index = json.loads((folder / "index.json").read_text())
    rows = PartRows(
        keys=[f"other-{n}" for n in range(5)], pair_rows=[], captions=[], augmentations=np.zeros((5, 2, 16), np.uint8),
        image_embeddings=[np.ones((5, 2, dim), np.float32) for dim in (24, 40)], text_embeddings=[], columns={"from-1": np.zeros(5, np.float32)},
    )  # fmt: skip
    entry = write_part(folder / "s.0000.1.safetensors", rows, dtype="int8", tables=TABLES, metadata={"layer": "1"}, kind="augmentations")
    for part in index["parts"]:
        if part["path"] == entry["path"]:
            part.update(entry)
    (folder / "index.json").write_text(json.dumps(index))


def _swap_keys_and_lie(folder: Path) -> None:
    _swap_keys(folder)
    index = json.loads((folder / "index.json").read_text())
    _set_part("s.0000.1.safetensors", keys_sha256=index["parts"][0]["keys_sha256"])(folder)


HOSTILE = {
    "overlapping views": (_set_layer(1, views=[2, 5]), r"layer 1 \(augmentations\) says number 1, views \[2, 5\]"),
    "a gap between views": (_set_layer(1, views=[4, 5]), "must neither overlap nor leave a gap"),
    "views that run backwards": (_set_layer(1, views=[3, 3]), "must neither overlap nor leave a gap"),
    "more views than are counted": (_set_layer(1, views=[3, 6]), "which do not follow|6 views"),
    "a teacher of two layers": (_set_layer(3, teachers=[1]), r"layer 3 \(teachers\) says number 3, views \[0, 5\] and teachers \[1\]"),
    "a layer without teachers": (_set_layer(3, teachers=[]), "must neither overlap"),
    "views for some teachers only": (_set_layer(1, teachers=[0]), "must neither overlap"),
    "captions with views": (_set_layer(2, views=[0, 5]), "must neither overlap"),
    "layers out of order": (_set_layer(2, number=1), "layer 2"),
    "two base layers": (_set_layer(1, kind="rows"), "layer 1 is of kind 'rows'"),
    "an unknown kind of layer": (_set_layer(2, kind="audio"), "layer 2 is of kind 'audio'"),
    "no layers": (lambda folder: edit_index(folder, lambda index: index.update(layers=[])), "0 layers"),
    "layers are numbers": (lambda folder: edit_index(folder, lambda index: index.update(layers=[1, 2])), "kind None"),
    "an unknown kind of part": (_set_part("s.0000.1.safetensors", kind="audio"), "kind 'audio'"),
    "a part in another layer": (_set_part("s.0000.1.safetensors", layer=2), "does not belong"),
    "a part in a layer that is not": (_set_part("s.0000.1.safetensors", layer=9), "does not belong"),
    "a missing part of a layer": (_drop("s.0002.2.safetensors"), "lacks the part 's.0002.2.safetensors' of layer 2"),
    "a part without its base": (_drop("s.0000.safetensors"), "belongs to no base part"),
    "a part twice": (lambda folder: edit_index(folder, lambda index: index["parts"].append(index["parts"][-1])), "does not belong"),
    "a file of a layer that is gone": (lambda folder: (folder / "s.0002.2.safetensors").unlink(), "cannot be opened"),
    "a file of a layer that is cut": (lambda folder: cut(folder / "s.0002.2.safetensors", 900), "truncated"),
    "a layer for other keys": (_swap_keys, "has other keys than its base part 's.0000.safetensors'"),
    "a layer for other keys, denied": (_swap_keys_and_lie, "holds other keys than the index says"),
    "a path upwards": (_set_part("s.0000.1.safetensors", path="../s.0000.1.safetensors"), "outside the store"),
    "a path to elsewhere": (_set_part("s.0000.1.safetensors", path="/etc/passwd"), "outside the store"),
    "a path of dots": (_set_part("s.0000.1.safetensors", path=".."), "outside the store"),
    "a path with a backslash": (_set_part("s.0000.1.safetensors", path="..\\s.0000.1.safetensors"), "outside the store"),
    "an empty path": (_set_part("s.0000.1.safetensors", path=""), "outside the store"),
    "a column of no layer": (lambda folder: edit_index(folder, lambda index: index["columns"]["from-1"].update(layer=7)), "without a layer that exists"),
    "a column in another layer": (lambda folder: edit_index(folder, lambda index: index["columns"]["from-1"].update(layer=2)), "lacks the array 'column.from-1'"),
    "negative rows": (_set_part("s.0000.safetensors", rows=-5), "unusable fields"),
    "a hash that is none": (_set_part("s.0000.safetensors", sha256="abc"), "unusable fields"),
}


@pytest.fixture(scope="module")
def layered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layered")
    _layered(folder)
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_layers_that_do_not_fit_are_refused_in_one_sentence(layered: Path, tmp_path: Path, name: str) -> None:
    for path in layered.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage, message = HOSTILE[name]
    open_store(tmp_path)
    damage(tmp_path)
    with pytest.raises(StoreError, match=message) as caught:
        open_store(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_later_teacher_that_lacks_a_caption_is_refused(tmp_path: Path) -> None:
    truth = make_store(tmp_path)
    truth.captions = [own[:1] for own in truth.captions]  # a writer that knew of one caption a row
    append_layer(tmp_path, truth, "teachers", seed=0)
    with pytest.raises(StoreError, match="fewer text embeddings than its rows have captions"):
        open_store(tmp_path)


def test_an_index_that_no_reader_would_accept_is_not_written(tmp_path: Path) -> None:
    make_store(tmp_path)
    before = (tmp_path / "index.json").read_bytes()
    index = json.loads(before)
    index["layers"].append(next_layer(index, "captions"))
    with pytest.raises(StoreError, match="lacks the part 's.0000.1.safetensors' of layer 1"):
        write_index(tmp_path, index)
    assert (tmp_path / "index.json").read_bytes() == before


def _rows(**changes) -> PartRows:
    rows = make_rows(np.random.default_rng(0), 0, 3, (8,))
    for name, value in changes.items():
        setattr(rows, name, value)
    return rows


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (_rows(), {"kind": "audio"}, "kind 'audio'"),
        (_rows(), {"kind": "captions"}, "kind 'captions' in layer 0"),
        (_rows(), {"metadata": {"layer": "1"}}, "kind 'rows' in layer 1"),
        (_rows(), {"kind": "captions", "metadata": {"layer": "2"}}, r"expected SHARD\.PPPP\.2\.safetensors"),
        (_rows(keys=["a", "b"]), {}, "with 2 keys was given 3 pair rows"),
        (_rows(image_embeddings=[]), {}, "0 of vectors"),
        (_rows(text_embeddings=[]), {}, "texts of 0"),
        (_rows(), {"teachers": [0, 1]}, "for 2 teachers was given images of 1"),
        (_rows(augmentations=np.zeros((3, 3, 12), np.uint8)), {}, r"expected \(rows, views, 16\)"),
        (_rows(augmentations=np.zeros((3, 2, 16), np.uint8)), {}, r"image embeddings of teacher 0 have the shape \(3, 3, 8\)"),
        (_rows(text_embeddings=[np.ones((3, 1, 8), np.float32)]), {}, r"text embeddings of teacher 0"),
        (_rows(captions=[[], [], []]), {}, "sample 'key-0' has no caption"),
    ],
)
def test_rows_that_do_not_fit_are_not_written(tmp_path: Path, rows: PartRows, arguments: dict, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        write_part(tmp_path / "s.0000.1.safetensors", rows, dtype="int8", tables=TABLES, **{"metadata": {}, **arguments})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- many parts


SHORT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
import numpy as np
from distill.store import open_store
store = open_store(sys.argv[1])
rows = np.random.default_rng(0).permutation(len(store))
first = store.image_embeddings(0, rows, np.zeros(len(rows), int))
kept = [store.read_view(int(row), 1) for row in rows[:20]]
assert np.array_equal(first, np.concatenate([store.image_embeddings(0, [row], [0]) for row in rows]))
assert len(store._open) * len(store.layers) <= 32
print(len(store.index["parts"]), float(first.sum()), sum(int(values[0][0].sum()) for values, _ in kept))
"""


def test_a_store_of_more_parts_than_files_may_be_open(tmp_path: Path) -> None:
    truth = make_store(tmp_path, counts=(1,) * 90)
    append_layer(tmp_path, truth, "augmentations", seed=0)
    done = subprocess.run([sys.executable, "-c", SHORT, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "180"


@pytest.mark.parametrize(("limit", "expected"), [(resource.RLIM_INFINITY, 4096), (1 << 20, 4096), (1024, 512), (1, 1)])
def test_files_at_a_time_follow_the_process_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: int, expected: int) -> None:
    make_store(tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    assert open_store(tmp_path)._most_stacks == expected


def test_views_stay_valid_after_their_file_is_let_go(tmp_path: Path) -> None:
    make_store(tmp_path, counts=(2,) * 6)
    store = open_store(tmp_path, max_open=1)
    (values, _), _ = store.read_view(0, 0)[0][0], None
    copy = values.copy()
    store.image_embeddings(0, np.arange(12), np.zeros(12, int))
    assert len(store._open) == 1
    assert np.array_equal(values, copy)


def test_threads_share_a_store(tmp_path: Path) -> None:
    truth = make_store(tmp_path, "float32", counts=(4,) * 8)
    store = open_store(tmp_path, max_open=2)
    wrong: list[int] = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(40):
            rows = rng.integers(0, 32, 8)
            if np.abs(store.image_embeddings(0, rows, rows % 3) - truth.images[0][rows, rows % 3]).max() > 1e-6:
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pickle.loads(pickle.dumps(store)).keys == truth.keys


def test_a_batch_does_not_depend_on_its_order_or_company(tmp_path: Path) -> None:
    """Rows copied one by one and rows copied by the list give the same bits."""
    make_store(tmp_path, counts=(9, 9))
    store = open_store(tmp_path)
    rows, augs = np.repeat(np.arange(18), 3), np.tile(np.arange(3), 18)
    whole = store.image_embeddings(1, rows, augs)
    order = np.random.default_rng(0).permutation(54)
    assert np.array_equal(store.image_embeddings(1, rows[order], augs[order]), whole[order])
    assert all(np.array_equal(store.image_embeddings(1, [row], [aug])[0], whole[n]) for n, (row, aug) in enumerate(zip(rows, augs, strict=True)))


def test_one_flipped_byte_of_a_layer_is_found(tmp_path: Path) -> None:
    _layered(tmp_path)
    flip(tmp_path / "s.0002.2.safetensors", (tmp_path / "s.0002.2.safetensors").stat().st_size - 1)
    with pytest.raises(StoreError, match=r"s\.0002\.2\.safetensors' has changed: shard s, row \d \(key 'key-"):
        open_store(tmp_path, verify=True)


# ---------------------------------------------------------------- an index that lies anywhere


def places(value, path=()) -> list[tuple]:
    """Every path into a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in inner for found in places(item, (*path, key)))]


LIES = st.sampled_from([None, -1, 0, 1, 2, 10**30, 1.5, float("inf"), True, "", "x", "../x", "\0", [], [1], [None], {}, {"x": 1}, [0, 10**9]])


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.data())
def test_an_index_that_lies_anywhere_raises_nothing_else(layered: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("lies")
    for path in layered.glob("*.safetensors"):
        os.link(path, folder / path.name)
    index = json.loads((layered / "index.json").read_text())
    path = data.draw(st.sampled_from([path for path in places(index) if path]))
    target = index
    for key in path[:-1]:
        target = target[key]
    if data.draw(st.booleans()):
        target[path[-1]] = data.draw(LIES)
    else:
        del target[path[-1]]
    (folder / "index.json").write_text(json.dumps(index))
    for use in (_use, find_damage, lambda folder: facts_of(str(folder))):
        with contextlib.suppress(ClipError):
            use(folder)


def _use(folder: Path) -> None:
    store = open_store(folder)
    store.image_embeddings(0, [0], [0])
    store.read_view_float(len(store) - 1, store.n_augmentations[0] - 1)
    [store.caption(0, j) for j in range(store.caption_counts[0])]
    [store.column(name) for name in store.index["columns"]]
