"""A photo index and a store under any order of what people do to them, beside plain dictionaries that say what must be found."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from PIL import Image

import runtime
from distill.store import open_store
from runtime.errors import StoreError
from runtime.index import Index
from tests.distill.stores import FLOOR, append_layer, flip, make_store
from tests.runtime import toy

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (250, 250, 250), (200, 30, 90), (10, 120, 140)]
NAMES = st.sampled_from(["a.png", "b.png", "deep/a.png", "deep/er/c.png", "é.png", "with space.png"])
QUIET = settings(max_examples=30, stateful_step_count=16, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


class Photos(RuleBasedStateMachine):
    """Files come, go, move and change; now and then the folder is indexed, the index forgets, is opened again or finds what a killed process left."""

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp(prefix="mclip-machine-"))
        self.photos, self.at = self.place / "photos", self.place / "p.idx"
        self.photos.mkdir()
        self.files: dict[str, int] = {}
        self.known: dict[str, int] = {}
        self.ticks = 0

    @initialize()
    def start(self) -> None:
        toy.build(self.place / "bundle")
        self.clip = runtime.load(self.place / "bundle", threads=1, measure=False)
        self.vectors = np.stack([self.clip.encode_image(np.full((20, 20, 3), colour, np.uint8))[0] for colour in COLOURS])
        self.index = Index.open(self.at, self.clip)

    def teardown(self) -> None:
        if hasattr(self, "index"):
            self.index.close()
        shutil.rmtree(self.place, ignore_errors=True)

    @rule(name=NAMES, colour=st.integers(0, len(COLOURS) - 1))
    def photograph(self, name: str, colour: int) -> None:
        path = self.photos / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), COLOURS[colour]).save(path)
        self.ticks += 1
        os.utime(path, ns=(10**18 + self.ticks * 10**9,) * 2)
        self.files[name] = colour

    @precondition(lambda self: self.files)
    @rule(data=st.data(), to=NAMES)
    def move(self, data: st.DataObject, to: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.files)))
        (self.photos / to).parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.photos / name, self.photos / to)
        self.files[to] = self.files.pop(name)

    @precondition(lambda self: self.files)
    @rule(data=st.data())
    def throw_away(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.files)))
        (self.photos / name).unlink()
        del self.files[name]

    @rule()
    def bring_up_to_date(self) -> None:
        self.index.add(self.photos)
        self.known = dict(self.files)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.known)))
        assert self.index.remove(self.photos / name) == 1
        del self.known[name]

    @rule()
    def open_again(self) -> None:
        self.index.close()
        self.index = Index.open(self.at, self.clip)

    @rule()
    def a_process_was_killed(self) -> None:
        """It leaves a half-written segment that nothing names."""
        (self.at / "segments").mkdir(parents=True, exist_ok=True)
        (self.at / "segments" / f".99.vectors.{os.getpid()}.part").write_bytes(b"half")

    @rule()
    def another_looks(self) -> None:
        with Index.open(self.at, create=False) as other:
            assert len(other) == len(self.index)

    @invariant()
    def what_is_found_is_what_is_known(self) -> None:
        if not hasattr(self, "index"):
            return
        for number, vector in enumerate(self.vectors):
            hits = self.index.search_vector(vector, k=50)
            found = {path: hit.score for hit in hits for path in (hit.path, *hit.copies)}
            wanted = {str(self.photos / name): float(self.vectors[colour] @ vector) for name, colour in self.known.items()}
            assert found.keys() == wanted.keys()
            assert all(abs(found[path] - wanted[path]) < 2e-3 for path in wanted)
            if number in self.known.values():
                assert self.known[str(Path(hits[0].path).relative_to(self.photos))] == number


class Layers(RuleBasedStateMachine):
    """Layers of all kinds grow on a store; whatever is read of any layer is what was written, and a bit that flips is found."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="mclip-machine-")) / "store"

    @initialize(dtype=st.sampled_from(["int8", "int4", "float16", "float32"]))
    def start(self, dtype: str) -> None:
        self.dtype = dtype
        self.truth = make_store(self.folder, dtype=dtype, dims=(8, 24), counts=(3, 0, 4))
        self.layers = 1

    def teardown(self) -> None:
        shutil.rmtree(self.folder.parent, ignore_errors=True)

    @precondition(lambda self: hasattr(self, "truth") and self.layers < 5)
    @rule(kind=st.sampled_from(["augmentations", "captions", "teachers"]), seed=st.integers(0, 99))
    def grow(self, kind: str, seed: int) -> None:
        append_layer(self.folder, self.truth, kind, seed)
        self.layers += 1

    @precondition(lambda self: hasattr(self, "truth"))
    @rule(data=st.data())
    def a_bit_flips_and_is_found(self, data: st.DataObject) -> None:
        parts = sorted(self.folder.glob("*.safetensors"))
        path = data.draw(st.sampled_from(parts))
        at = data.draw(st.integers(0, path.stat().st_size - 1))
        flip(path, at)
        try:
            with pytest.raises(StoreError, match=re.escape(path.name)):
                open_store(self.folder, verify=True)
        finally:
            flip(path, at)

    @precondition(lambda self: hasattr(self, "truth"))
    @rule(seed=st.integers(0, 2**31))
    def read(self, seed: int) -> None:
        rng, store, truth = np.random.default_rng(seed), open_store(self.folder, verify=bool(seed % 2)), self.truth
        n, views = truth.parameters.shape[:2]
        assert len(store) == n
        rows, augs = rng.integers(0, n, 9), rng.integers(0, views, 9)
        np.testing.assert_array_equal(store.augmentation(rows, augs), truth.parameters[rows, augs])
        for t, images in enumerate(truth.images):
            cosine = (store.image_embeddings(t, rows, augs) * images[rows, augs]).sum(-1)
            assert cosine.min() > FLOOR[self.dtype] - 0.02 * (self.dtype == "int4")
            chosen = np.array([rng.integers(0, len(truth.captions[row])) for row in rows])
            wanted = np.stack([truth.texts[t][row][j] for row, j in zip(rows, chosen, strict=True)])
            assert (store.text_embeddings(t, rows, chosen) * wanted).sum(-1).min() > FLOOR[self.dtype] - 0.02 * (self.dtype == "int4")
            assert [store.caption(int(row), int(j)).text for row, j in zip(rows, chosen, strict=True)] == [truth.captions[row][j].text for row, j in zip(rows, chosen, strict=True)]
        for name, column in truth.columns.items():
            np.testing.assert_array_equal(store.column(name), column)


Photos.TestCase.settings = QUIET
Layers.TestCase.settings = QUIET
TestPhotos = Photos.TestCase
TestLayers = Layers.TestCase
