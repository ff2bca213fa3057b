"""Training samples: the same batches however they are made, resumed or shared; mixtures, subsets, missing pictures, no thread left behind."""

from __future__ import annotations

import dataclasses
import gc
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from distill import dataset as dataset_module
from distill.augment import apply
from distill.caption_sampling import CaptionTokens
from distill.captions import TYPES, Caption
from distill.dataset import Batch, ReinforcedPairs
from distill.keep_list import read_keep_list, write_keep_list
from distill.loader import Request, load
from distill.store import open_store
from mobileclip.checkpoint import build_tokenizer
from runtime.errors import RecipeError, StoreError, TrainingError
from runtime.pairs import open_pairs, write_shard
from runtime.preprocess import PreprocessConfig, normalise
from runtime.tokenizer import Tokenizer

from .world import make_pairs, make_store

PIXELS = PreprocessConfig(image_size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
N = 48


def synthetic(row: int, caption: str) -> list[Caption]:
    """Two synthetic captions in even rows, a rewritten one in every third."""
    made = [Caption(text=f"{words} {caption}", type="synthetic", source="captioner") for words in ("picture of", "drawn is")] if row % 2 == 0 else []
    return made + ([Caption(text=f"{caption}, again", type="rewritten", source="captioner", parent=0)] if row % 3 == 0 else [])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("loader")
    make_pairs(root / "pairs")
    make_store(root / "store", root / "pairs", views=5, more=synthetic)
    build_tokenizer(8192, root / "tokenizer.json")
    return root


def make(root: Path, *, pairs: str = "pairs", **changes) -> ReinforcedPairs:
    tokenizer = Tokenizer.open(root / "tokenizer.json", context_length=20, cleaning="clip", pad_id=0)
    return ReinforcedPairs(open_pairs(root / pairs), open_store(root / "store"), PIXELS, tokenizer, **{"seed": 0, "teachers": (0, 1), **changes})


def requests(first: int, count: int, size: int = 10) -> list[Request]:
    return [Request(first=first + n * size, size=size, pictures=n % 4 != 3) for n in range(count)]


def assert_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for field in dataclasses.fields(Batch):
            x, y = getattr(a, field.name), getattr(b, field.name)
            for left, right in zip(x, y, strict=True) if isinstance(x, tuple) else [(x, y)]:
                assert left.dtype == right.dtype, field.name
                np.testing.assert_array_equal(left, right, err_msg=field.name)


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.fixture(scope="module")
def straight(world) -> list[Batch]:
    return list(load(make(world), requests(0, 12)))


def test_a_batch_holds_what_its_place_in_the_order_says(world, straight):
    store, pairs = open_store(world / "store"), open_pairs(world / "pairs")
    for batch in straight[:2]:
        for n, (row, aug, caption) in enumerate(zip(batch.rows, batch.augs, batch.captions, strict=True)):
            view = np.asarray(apply(pairs.image(int(row)), store.augmentation(row, aug)[0], 32))
            np.testing.assert_array_equal(batch.pixels[n], normalise(view[None], PIXELS)[0])
            for k in range(2):
                np.testing.assert_array_equal(batch.teacher_images[k][n], store.image_embeddings(k, row, aug)[0])
                np.testing.assert_array_equal(batch.teacher_texts[k][n], store.text_embeddings(k, row, caption)[0])
        texts = [store.caption(int(row), int(j)).text for row, j in zip(batch.rows, batch.captions, strict=True)]
        assert batch.same.tolist() == [texts.index(text) for text in texts]
        whole = Tokenizer.open(world / "tokenizer.json", context_length=20, cleaning="clip", pad_id=0)(texts)
        longest = int((whole == 8191).argmax(axis=1).max()) + 1
        np.testing.assert_array_equal(batch.tokens, whole[:, :longest])


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("cache", [0, 1 << 30])
def test_threads_and_cache_change_no_batch(world, straight, threads, cache):
    data = make(world, cache_bytes=cache)
    assert_equal(list(load(data, requests(0, 12), threads)), straight)
    assert_equal(list(load(data, requests(0, 12), threads)), straight)  # now from the cache
    assert not loader_threads()


@pytest.mark.parametrize("first", [1, 3, 7])
def test_going_on_in_the_middle_of_an_epoch_gives_the_same_batches(world, straight, first):
    wanted = requests(0, 12)[first:]
    assert_equal(list(load(make(world), wanted, threads=2)), straight[first:])


@pytest.mark.parametrize("world_size", [2, 5])
def test_processes_share_each_batch_and_another_number_of_them_goes_on_alike(world, straight, world_size):
    shards = [list(load(make(world, rank=rank, world=world_size), requests(0, 12))) for rank in range(world_size)]
    for n, batch in enumerate(straight):
        for name in ("rows", "augs", "captions", "pixels"):
            np.testing.assert_array_equal(np.concatenate([getattr(shard[n], name) for shard in shards]), getattr(batch, name))
    with pytest.raises(TrainingError, match="a batch of 10 cannot be shared by 4 processes"):
        make(world, world=4).samples(0, 10)


@pytest.mark.parametrize("window", [1, 2])
def test_windows_of_shards_keep_neighbours_together(world, window):
    data = make(world, shuffle_shards=window)
    for epoch in range(3):
        rows = data.samples(epoch * N, N).rows
        assert sorted(rows.tolist()) == list(range(N))
        for start in range(0, N, 12 * window):
            assert len(set((rows[start : start + 12 * window] // 12).tolist())) == window


def test_views_and_captions_are_drawn_evenly_and_anew_each_epoch(world):
    data = make(world)
    samples = data.samples(0, 200 * N)
    counts = np.bincount(samples.augs, minlength=5) / (200 * N / 5)
    assert counts.min() > 0.9
    assert counts.max() < 1.1
    first = samples.augs[np.argsort(samples.rows[:N])]
    second = samples.augs[N : 2 * N][np.argsort(samples.rows[N : 2 * N])]
    assert 20 < (first != second).sum() < N  # four of five differ by chance
    assert (samples.captions < data.store.caption_counts[samples.rows]).all()
    assert make(world, max_augmentations=2).samples(0, 4 * N).augs.max() == 1
    assert make(world, max_augmentations=99).samples(0, 4 * N).augs.max() == 4


def test_a_mix_gives_every_type_its_share(world):
    mix = {"raw": 3, "synthetic": 6.0, "rewritten": 1.0, "template": 0.0}
    data = make(world, caption_mix=mix)
    samples = data.samples(0, 200 * N)
    drawn = [TYPES[data.store.caption_types([row])[0, j]] for row, j in zip(samples.rows.tolist(), samples.captions.tolist(), strict=True)]
    for kind, share in (((0, 0), {"raw": 0.3, "synthetic": 0.6, "rewritten": 0.1}), ((0, 1), {"raw": 1 / 3, "synthetic": 2 / 3}),
                        ((1, 0), {"raw": 0.75, "rewritten": 0.25}), ((1, 1), {"raw": 1.0})):  # fmt: skip
        here = [name for row, name in zip(samples.rows.tolist(), drawn, strict=True) if (row % 2, min(row % 3, 1)) == kind]
        counts = Counter(here)
        assert set(counts) == set(share)
        for name, expected in share.items():
            assert abs(counts[name] / len(here) - expected) < 0.04, (kind, name)
    both = samples.captions[[n for n, (row, name) in enumerate(zip(samples.rows.tolist(), drawn, strict=True)) if name == "synthetic"]]
    assert set(both.tolist()) == {2, 3}
    assert 0.45 < (both == 2).mean() < 0.55


@pytest.mark.parametrize(
    ("mix", "error", "message"),
    [
        ({"synthetic": 1.0}, TrainingError, r"sample 's0-01' has no caption of type synthetic"),
        ({"fused": 1.0, "rewritten": 0.5}, TrainingError, "no caption of type fused or rewritten"),
        ({"invented": 1.0}, RecipeError, "caption_mix names the type invented; known are raw"),
        ({"raw": -1.0}, RecipeError, "caption_mix has raw -1.0"),
        ({"raw": 0.0}, RecipeError, "no share above 0"),
        ({"raw": float("nan")}, RecipeError, "raw nan"),
    ],
)
def test_mixes_that_cannot_be_drawn_are_refused(world, mix, error, message):
    with pytest.raises(error, match=message):
        make(world, caption_mix=mix)


def test_only_kept_keys_are_trained_on(world, tmp_path):
    keys = [key for n, key in enumerate(open_store(world / "store").keys) if n % 3]
    write_keep_list(tmp_path / "keep.txt", [*keys, "another-folder's"], {})
    data = make(world, keep=read_keep_list(tmp_path / "keep.txt"))
    assert (len(data), data.dropped, data.missing) == (32, 16, 0)
    rows = data.samples(0, 64).rows
    assert sorted(rows[:32].tolist()) == sorted(rows[32:].tolist()) == [n for n in range(N) if n % 3]
    assert_equal(list(load(data, requests(0, 4), threads=2)), list(load(make(world, keep=read_keep_list(tmp_path / "keep.txt"), cache_bytes=0), requests(0, 4))))
    write_keep_list(tmp_path / "none.txt", ["elsewhere"], {})
    with pytest.raises(TrainingError, match="keeps none of the store's 48 samples"):
        make(world, keep=read_keep_list(tmp_path / "none.txt"))


def test_pictures_that_are_gone_are_left_out_and_counted(world, straight, caplog):
    folder = world / "fewer"
    folder.mkdir()
    for shard in sorted((world / "pairs").glob("*.tar"))[1:]:
        shutil.copy(shard, folder)
    data = make(world, pairs="fewer")
    assert (len(data), data.missing) == (36, 12)
    assert "12 of the store's 48 samples have no picture" in caplog.text
    batch, whole = data.batch(0, 36), make(world)
    assert sorted(batch.rows.tolist()) == list(range(12, 48))
    for n in range(36):  # joined by key: pair rows have moved
        np.testing.assert_array_equal(batch.pixels[n], normalise(whole.view(int(batch.rows[n]), int(batch.augs[n]))[None], PIXELS)[0])
    for shard in list(folder.glob("*.tar"))[1:]:
        shard.unlink()
    with pytest.raises(TrainingError, match="36 of its 48 samples, the first 's"):
        make(world, pairs="fewer")


def test_a_picture_that_no_longer_decodes_is_grey_and_counted(world, tmp_path, caplog):
    pairs = open_pairs(world / "pairs")
    shutil.copytree(world / "store", tmp_path / "store")
    shutil.copy(world / "tokenizer.json", tmp_path)
    for shard in pairs.shards:
        rows = range(shard.start, shard.stop)
        samples = [(pairs.keys[row], {"png": b"gone" if row in (3, 40) else pairs.image_bytes(row), "txt": pairs.caption(row).encode()}) for row in rows]
        (tmp_path / "pairs").mkdir(exist_ok=True)
        write_shard(tmp_path / "pairs" / f"{shard.name}.tar", samples)
    data = make(tmp_path)
    batches = list(load(data, [Request(first=n, size=12) for n in range(0, 96, 12)], threads=3))
    for batch in batches:
        for n, row in enumerate(batch.rows):
            assert (np.ptp(batch.pixels[n], axis=(1, 2)).max() == 0) == (row in (3, 40))
    assert data.unreadable_count == 4
    assert sorted(data.unreadable) == sorted(pairs.keys[row] for row in (3, 40))
    assert "the picture (4 bytes) does not decode" in data.unreadable[pairs.keys[3]]
    assert caplog.text.count("does not decode") == 2


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_an_error_comes_at_its_batch_and_ends_the_threads(world, straight, monkeypatch, threads):
    data, bad = make(world, cache_bytes=0), straight[2].rows[7]
    real = dataset_module.ReinforcedPairs._replay

    def failing(self, rows, augs, places=None):
        if bad in rows:
            raise StoreError("this row is damaged")
        time.sleep(0.01)
        yield from real(self, rows, augs, places)

    monkeypatch.setattr(dataset_module.ReinforcedPairs, "_replay", failing)
    batches = load(data, requests(0, 12), threads)
    assert_equal([next(batches), next(batches)], straight[:2])
    with pytest.raises(StoreError, match="this row is damaged"):
        next(batches)
    assert not loader_threads()


def test_an_error_in_the_draw_comes_at_its_batch(world, straight):
    broken = [*requests(0, 2), Request(first=20, size=7), *requests(30, 2)]
    batches = load(make(world), broken, threads=2)
    assert_equal([next(batches), next(batches)], straight[:2])
    assert len(next(batches).rows) == 7
    batches.close()
    shared = load(make(world, world=5), broken, threads=2)
    assert [len(next(shared).rows) for _ in range(2)] == [2, 2]
    with pytest.raises(TrainingError, match="a batch of 7 cannot be shared by 5"):
        next(shared)


@pytest.mark.parametrize("how", ["close", "drop", "unused"])
def test_an_abandoned_loader_leaves_no_thread(world, how):
    batches = load(make(world), requests(0, 200), threads=4)
    if how != "unused":
        next(batches)
        assert loader_threads()
    if how == "close":
        batches.close()
    del batches
    gc.collect()
    assert not loader_threads()


def test_no_more_than_asked_for_is_made_ahead(world, monkeypatch):
    data, started = make(world, cache_bytes=0), []
    real = ReinforcedPairs.samples
    monkeypatch.setattr(ReinforcedPairs, "samples", lambda self, first, size: started.append(first) or real(self, first, size))
    batches = load(data, (Request(first=n * 8, size=8) for n in range(10**9)), threads=2, ahead=3)
    for n in range(6):
        next(batches)
        time.sleep(0.05)
        assert len(started) == n + 4
    batches.close()


@pytest.mark.parametrize("threads", [0, 2])
def test_memory_is_used_again_but_never_while_anybody_holds_it(world, straight, threads):
    batches, kept, blocks = load(make(world), requests(0, 400, size=10), threads), [], set()
    for n, batch in enumerate(batches):
        if batch.pixels.size:  # an empty array lies anywhere
            blocks.add(batch.pixels.ctypes.data)
        if n in (0, 5, 9):  # held as an array, as a slice of it, as a tensor
            kept.append({0: batch.pixels, 5: batch.pixels[3:7, 1], 9: torch.from_numpy(batch.pixels)}[n])
    assert len(blocks) < 20
    np.testing.assert_array_equal(kept[0], straight[0].pixels)
    np.testing.assert_array_equal(kept[1], straight[5].pixels[3:7, 1])
    np.testing.assert_array_equal(kept[2].numpy(), straight[9].pixels)


def test_tokens_are_forgotten_when_there_are_too_many_and_stay_the_same(world):
    data = make(world)
    few = CaptionTokens(data.store, data.tokens._tokenizer, remembered=30)
    for start in range(0, 960, 12):
        samples = data.samples(start, 12)
        tokens, same = few(samples.rows, samples.captions)
        wanted, wanted_same = data.tokens(samples.rows, samples.captions)
        np.testing.assert_array_equal(tokens, wanted)
        np.testing.assert_array_equal(same, wanted_same)
        assert len(few._numbers) <= 30
        assert len(few._rows) <= 30
