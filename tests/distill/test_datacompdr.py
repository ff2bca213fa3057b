"""The import of DataCompDR: values, captions, views, what is left out, going on after a kill, the same bytes again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill import datacompdr_index
from distill.augment import OPERATIONS, describe
from distill.datacompdr import PUBLISHED, ImportConfig, import_datacompdr, main, parse_teachers
from distill.store import Store, open_store
from distill.views import view
from mobileclip.checkpoint import build_tokenizer
from runtime.errors import PairsError, RecipeError, StoreError
from runtime.pairs import open_pairs

from .datacompdr_world import DIMS, TEACHERS, Sample, downloaded, make_samples, published, write_downloaded, write_published, write_tar


@pytest.fixture
def samples() -> list[Sample]:
    return make_samples(20)


def run(root: Path, store: str = "store", **changes) -> Store:
    base = ImportConfig(shards=str(root / "published"), pairs=str(root / "pairs"), store=str(root / store), teachers=TEACHERS, workers=0, part_rows=3)
    import_datacompdr(dataclasses.replace(base, **changes))
    return open_store(root / store, verify=True)


def hashes(store: Path) -> dict[str, str]:
    """sha256 of everything but the index, whose figures are seconds."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in store.iterdir() if path.is_file() and path.name not in (".lock", "index.json")}


def check(store: Store, row: int, sample: Sample) -> None:
    """One row holds what was published, within an int8 step."""
    views, texts = len(sample.boxes), 1 + len(sample.synthetic)
    assert store.n_augmentations[row] == views
    assert store.caption_counts[row] == texts
    start = 0
    for teacher, dim in enumerate(DIMS):
        for found, given in (
            (store.image_embeddings(teacher, np.full(views, row), np.arange(views)), sample.image_emb),
            (store.text_embeddings(teacher, np.full(texts, row), np.arange(texts)), sample.text_emb),
        ):
            given = given[:, start : start + dim]
            step = np.abs(given).max(axis=1, keepdims=True) / 127
            assert (np.abs(found - given) <= step * 0.51 + 0.005).all()  # 0.005: bfloat16, and the norm that changes with the rounding
        start += dim
    captions = [store.caption(row, j) for j in range(texts)]
    assert (captions[0].text, captions[0].type, captions[0].source) == (sample.caption, "raw", "pairs")
    assert [caption.text for caption in captions[1:]] == sample.synthetic
    assert {(caption.type, caption.source, caption.parent) for caption in captions[1:]} == {("synthetic", "coca_ViT-L-14", -1)}
    height, width = sample.size
    for n, packed in enumerate(store.augmentation(np.full(views, row), np.arange(views))):
        told = describe(packed)
        box = [told["crop"][side] * whole for side, whole in (("top", height), ("left", width), ("height", height), ("width", width))]
        assert np.allclose(box, sample.boxes[n], atol=0.01)
        assert [operation["name"] for operation in told["operations"]] == [OPERATIONS[int(index)] for index, _ in sample.operations[n]]


@pytest.mark.parametrize(("kind", "parameters", "layout"), [("npz", "string", "old"), ("pth.gz", "list", "old"), ("npz", "list", "new"), ("pth.gz", "string", "new")])
def test_published_layouts_are_imported(tmp_path, samples, kind, parameters, layout):
    write_published(tmp_path / "published", samples[:14], kind=kind, parameters=parameters, layout=layout)
    write_downloaded(tmp_path / "pairs", samples[4:][::-1])  # another order, six pictures without and four reinforcements without a picture
    store = run(tmp_path)
    there = samples[4:14][::-1]
    assert store.keys == [f"{shard * 10000 + n:09d}" for shard, n in [(0, 6), *((1, n) for n in range(7)), (2, 0), (2, 1)]]
    for row, sample in enumerate(there):
        check(store, row, sample)
    coverage = store.index["coverage"]
    assert (coverage["pairs"], coverage["rows"], coverage["skipped"], coverage["reasons"]) == (16, 10, 6, {"no reinforcement": 6})
    assert (coverage["reinforcements"], coverage["reinforcements_without_picture"]) == (14, 4)
    assert [entry["key"] for entry in store.index["skipped"]] == [f"{n:09d}" for n in range(6)]
    pairs = open_pairs(tmp_path / "pairs")
    assert [pairs.keys[row] for row in store.pair_rows] == store.keys
    assert [(fact.name, fact.dim, fact.logit_scale) for fact in store.teachers] == [("first", 8, 100.0), ("second", 12, 70.0)]
    cosine = [
        np.mean([unit_mean(sample.image_emb[:, part]) @ sample.text_emb[0, part] for part in (slice(0, 8), slice(8, 20))]) for sample in there
    ]
    assert np.allclose(store.column("similarity"), cosine, atol=0.01)


def unit_mean(vectors: np.ndarray) -> np.ndarray:
    mean = vectors.mean(axis=0)
    return mean / np.linalg.norm(mean)


def test_fewer_views_and_captions_can_be_kept(tmp_path, samples):
    write_published(tmp_path / "published", samples)
    write_downloaded(tmp_path / "pairs", samples)
    store = run(tmp_path, augmentations=2, captions=1, dtype="float32")
    assert set(store.n_augmentations) == set(store.caption_counts) == {2}
    first = samples[0]
    assert np.allclose(store.image_embeddings(1, np.zeros(2, int), np.arange(2)), first.image_emb[:2, 8:], atol=1e-6)
    assert np.allclose(store.text_embeddings(0, np.zeros(2, int), np.arange(2)), first.text_emb[:2, :8], atol=1e-6)
    assert store.caption(0, 1).text == first.synthetic[0]


def test_the_key_is_the_uid_where_no_json_tells_it_and_shards_may_hold_everything(tmp_path, samples):
    """What the publisher's own join script makes: published members, picture and caption in one tar, in sub-folders."""
    joined = [(sample.uid, {**published(sample), "jpg": sample.picture, "txt": sample.caption.encode()}) for sample in samples]
    write_tar(tmp_path / "published" / "00" / "00000000.tar", joined[:12])
    write_tar(tmp_path / "published" / "01" / "00000000.tar", joined[12:])
    write_tar(tmp_path / "pairs" / "00000.tar", [(sample.uid, {"jpg": sample.picture, "txt": sample.caption.encode()}) for sample in samples])
    assert run(tmp_path).keys == [sample.uid for sample in samples]


def test_what_cannot_be_joined_is_counted_and_told(tmp_path, samples):
    published_as = [published(sample) for sample in samples]
    pairs = [downloaded(n, sample) for n, sample in enumerate(samples)]
    spoil = {
        1: ("changed image", {"sha256": "0" * 64}), 2: ("does not fit", {"original_height": 50, "original_width": 500}),
        3: ("does not fit", {"original_height": samples[3].size[0] // 2, "original_width": samples[3].size[1] // 2}),
    }  # fmt: skip
    for n, (_, facts) in spoil.items():
        pairs[n] = downloaded(n, samples[n], **facts)
    pairs[4][1]["jpg"] = turned(samples[4])
    pairs[5][1]["jpg"] = b"no picture"
    pairs[6][1]["txt"] = b"\xff\xfe"
    del pairs[7][1]["txt"]
    published_as[8]["npz"] = b"PK" + bytes(40)
    del published_as[9]["syn.json"]
    pairs[10][1]["json"] = b"[not an object]"  # then the key would be the uid
    write_tar(tmp_path / "published" / "0.tar", zip([sample.uid for sample in samples], published_as, strict=True))
    write_tar(tmp_path / "pairs" / "0.tar", pairs)
    store = run(tmp_path)
    coverage = store.index["coverage"]
    assert coverage["reasons"] == {
        "no reinforcement": 1, "damaged reinforcement": 2, "changed image": 1, "does not fit": 2, "turned by EXIF": 1, "unreadable picture": 1, "no usable caption": 2,
    }  # fmt: skip
    assert coverage["rows"] == 10
    assert coverage["skipped"] == sum(coverage["reasons"].values())
    reasons = {entry["key"]: entry["reason"] for entry in store.index["skipped"]}
    assert "no even scaling" in reasons["000000002"]
    assert "the published boxes reach" in reasons["000000003"]
    assert "it has no .syn.json" in reasons["000000009"]
    assert coverage["reinforcements_without_picture"] == 1
    kept = run(tmp_path, store="kept", changed="keep").index["coverage"]
    assert (kept["rows"], kept["changed_image_kept"]) == (11, 1)


def turned(sample: Sample) -> bytes:
    import io

    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.open(io.BytesIO(sample.picture)).save(out, "JPEG", exif=exif)
    return out.getvalue()


def test_a_resized_picture_takes_the_boxes_of_the_original(tmp_path, samples):
    import io

    sample = samples[0]
    height, width = sample.size
    out = io.BytesIO()
    Image.open(io.BytesIO(sample.picture)).resize((round(width / 2), round(height / 2))).save(out, "JPEG")
    key, members = downloaded(0, sample)
    write_published(tmp_path / "published", samples[:1])
    write_tar(tmp_path / "pairs" / "0.tar", [(key, {**members, "jpg": out.getvalue()})])
    store = run(tmp_path)
    check(store, 0, sample)  # fractions of the picture, whatever its size


def test_pictures_of_a_size_nobody_tells_are_suspected(tmp_path, samples, capsys):
    """Larger copies without original_width: the boxes fit, but only into a corner."""
    import io

    pairs = []
    for n, sample in enumerate(samples):
        out = io.BytesIO()
        Image.open(io.BytesIO(sample.picture)).resize((3 * sample.size[1], 3 * sample.size[0])).save(out, "JPEG")
        key, members = downloaded(n, sample)
        facts = json.loads(members["json"])
        pairs.append((key, {**members, "jpg": out.getvalue(), "json": json.dumps({"uid": facts["uid"], "sha256": facts["sha256"]}).encode()}))
    write_published(tmp_path / "published", samples)
    write_tar(tmp_path / "pairs" / "0.tar", pairs)
    argv = [str(tmp_path / name) for name in ("published", "pairs", "store")]
    assert main([*argv, "--teachers", *TEACHERS, "--workers", "0"]) == 0
    said = capsys.readouterr()
    assert "reach over 33 % of the pictures" in said.err
    assert "20 of 20 pairs x 4 views" in said.out


def test_a_uid_that_comes_twice_is_taken_from_the_first_shard(tmp_path, samples):
    other = dataclasses.replace(samples[0], synthetic=["another"] * 5)
    write_tar(tmp_path / "published" / "0.tar", [(samples[1].uid, published(samples[1])), (samples[0].uid, published(samples[0]))])
    write_tar(tmp_path / "published" / "1.tar", [(other.uid, published(other))])
    write_downloaded(tmp_path / "pairs", samples[:3])
    store = run(tmp_path)
    assert store.caption(0, 1).text == samples[0].synthetic[0]
    assert (store.index["coverage"]["reinforcements"], store.index["coverage"]["reinforcements_without_picture"]) == (2, 0)


def test_a_published_shard_that_ends_early_gives_what_it_has(tmp_path, samples):
    write_published(tmp_path / "published", samples, per_shard=10)
    write_downloaded(tmp_path / "pairs", samples)
    cut = tmp_path / "published" / "00000001.tar"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (tmp_path / "published" / "00000002.tar").write_bytes(b"")
    store = run(tmp_path)
    assert 12 <= len(store) <= 16
    assert len(store.index["import"]["warnings"]) == 2
    assert "truncated" in store.index["import"]["warnings"][0]


# ---------------------------------------------------------------- going on


def test_the_same_command_again_touches_nothing(tmp_path, samples):
    write_published(tmp_path / "published", samples)
    write_downloaded(tmp_path / "pairs", samples)
    run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("[!.]*")}
    run(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("[!.]*")} == before
    assert not (tmp_path / "store" / ".work").exists()


def test_the_bytes_depend_neither_on_workers_nor_on_what_was_there(tmp_path, samples):
    write_published(tmp_path / "published", samples)
    write_downloaded(tmp_path / "pairs", samples[2:][::-1])
    run(tmp_path)
    whole = hashes(tmp_path / "store")
    run(tmp_path, store="two", workers=2)
    assert hashes(tmp_path / "two") == whole
    parts = sorted(path for path in (tmp_path / "two").glob("*.safetensors"))
    (tmp_path / "two" / "index.json").unlink()
    parts[0].unlink()
    parts[1].write_bytes(parts[1].read_bytes()[:-7])  # cut
    damaged = bytearray(parts[2].read_bytes())
    damaged[-3] ^= 1
    parts[2].write_bytes(damaged)
    (tmp_path / "two" / f".{parts[0].name}.99.part").write_bytes(b"half")
    kept = parts[3].stat().st_mtime_ns
    store = run(tmp_path, store="two")
    assert hashes(tmp_path / "two") == whole
    assert parts[3].stat().st_mtime_ns == kept
    assert store.index["figures"]["pairs_found_done"] > 0


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_bytes(tmp_path, samples):
    pytest.importorskip("ray")
    write_published(tmp_path / "published", samples, kind="pth.gz")
    write_downloaded(tmp_path / "pairs", samples)
    run(tmp_path)
    run(tmp_path, store="ray", engine="ray", workers=2)
    assert hashes(tmp_path / "ray") == hashes(tmp_path / "store")


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path, kills):
    samples = make_samples(40 * kills + 80)
    write_published(tmp_path / "published", samples, per_shard=40)
    write_downloaded(tmp_path / "pairs", samples, per_shard=50)
    run(tmp_path, store="straight", part_rows=4)
    argv = [sys.executable, "-m", "distill.datacompdr", *(str(tmp_path / name) for name in ("published", "pairs", "store"))]
    argv += ["--teachers", *TEACHERS, "--workers", "0", "--part-rows", "4"]
    rng, killed = np.random.default_rng(5), 0
    for _ in range(kills):
        process = subprocess.Popen(argv, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL, env={**os.environ, "MCLIP_PROGRESS": "0"})
        deadline = time.monotonic() + 60
        have = len(list((tmp_path / "store").glob("*.safetensors")))
        while process.poll() is None and time.monotonic() < deadline and len(list((tmp_path / "store").glob("*.safetensors"))) <= have:
            time.sleep(0.002)
        time.sleep(float(rng.uniform(0, 0.05)))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= kills / 2
    store = run(tmp_path, part_rows=4)
    assert hashes(tmp_path / "store") == hashes(tmp_path / "straight")
    assert store.index["figures"]["pairs_found_done"] > 0


def test_other_settings_or_strangers_in_the_folder_are_refused(tmp_path, samples):
    write_published(tmp_path / "published", samples)
    write_downloaded(tmp_path / "pairs", samples)
    run(tmp_path)
    with pytest.raises(StoreError, match="begun with other captions"):
        run(tmp_path, captions=2)
    with pytest.raises(StoreError, match="no store but holds 0"):
        run(tmp_path, store="pairs")
    (tmp_path / "store" / "stray.0000.safetensors").write_bytes(b"")
    (tmp_path / "store" / "index.json").unlink()
    with pytest.raises(StoreError, match=r"stray\.0000"):
        run(tmp_path)


def test_a_full_disk_is_one_sentence_and_the_import_goes_on_later(tmp_path, samples):
    write_published(tmp_path / "published", samples)
    write_downloaded(tmp_path / "pairs", samples)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises(StoreError, match="stopped .*run the same command again"):
            run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert len(run(tmp_path)) == 20


def test_nothing_to_import_says_why(tmp_path, samples):
    write_downloaded(tmp_path / "pairs", samples[:4])
    (tmp_path / "published").mkdir()
    with pytest.raises(StoreError, match=r"holds no \*\.tar"):
        run(tmp_path)
    write_published(tmp_path / "published", samples[10:])
    with pytest.raises(PairsError, match="none of the 4 pairs.*not in the published shards"):
        run(tmp_path)
    write_tar(tmp_path / "pairs" / "00000.tar", [downloaded(n, samples[n], sha256="0" * 64) for n in range(10, 14)])
    with pytest.raises(PairsError, match="changed image: .*import with --changed keep"):
        run(tmp_path, store="changed")
    with pytest.raises(StoreError, match="20 values a vector, the teachers 512"):
        run(tmp_path, store="other", teachers=("one:512:100:x",))


def test_a_key_in_two_shards_is_refused(tmp_path, samples):
    write_published(tmp_path / "published", samples)
    write_tar(tmp_path / "pairs" / "0.tar", [downloaded(0, samples[0])])
    write_tar(tmp_path / "pairs" / "1.tar", [downloaded(0, samples[1])])
    with pytest.raises(PairsError, match=r"0\.tar and 1\.tar hold a sample of the same key"):
        run(tmp_path)


@pytest.mark.parametrize("bad", [("x",), ("x:0:1:l",), ("x:8:zero:l",), ("a:8:1:l", "a:8:1:l"), ()])
def test_teachers_that_make_no_sense_are_refused(bad):
    with pytest.raises(RecipeError):
        parse_teachers(bad)


def test_the_published_teachers_are_the_default():
    assert [(fact.name, fact.dim, fact.logit_scale, fact.licence) for fact in parse_teachers(PUBLISHED)] == [
        ("ViT-L-14/openai", 768, 100.0, "CC-BY-NC-ND-4.0"), ("ViT-L-14/datacomp_xl_s13b_b90k", 768, 100.0, "CC-BY-NC-ND-4.0"),
    ]  # fmt: skip
    assert parse_teachers(("open_clip:ViT-B-32/laion:512:50.5:MIT",))[0].name == "open_clip:ViT-B-32/laion"


# ---------------------------------------------------------------- uids


def test_uids_are_found_in_many_buckets(tmp_path, monkeypatch):
    monkeypatch.setattr(datacompdr_index, "BUCKET", 16)  # as if a bucket of a million were full many times over
    uids = [f"uid-{n}" for n in range(300)]
    spans = [range(0, 120), range(100, 220), range(200, 300)]  # the shards overlap: the first place counts
    home = {uids[n]: shard for shard in reversed(range(3)) for n in spans[shard]}
    paths = [write_tar(tmp_path / f"{shard}.tar", [(uids[n], {"npz": f"{shard} {uids[n]}".encode()}) for n in spans[shard]]) for shard in range(3)]
    indices = [datacompdr_index.index_shard(path, tmp_path) for path in paths]
    found, fingerprint = datacompdr_index.join_indices(paths, indices, tmp_path)
    assert len(list(next(tmp_path.glob("uids-*")).glob("*.high.npy"))) > 8
    assert (len(found), found.different) == (340, 300)
    asked = [*uids[::-1], "nobody", ""]
    numbers = found.find(asked)
    assert list(numbers[-2:]) == [-1, -1]
    for uid, number in zip(asked[:-2], numbers[:-2].tolist(), strict=True):
        assert found.members(number) == {"npz": f"{home[uid]} {uid}".encode()}
    again, same = datacompdr_index.join_indices(paths, indices, tmp_path)
    assert same == fingerprint
    assert np.array_equal(again.find(asked), numbers)


# ---------------------------------------------------------------- training


def test_a_further_teacher_sees_the_published_views(tmp_path, samples):
    """Knowledge that was published for two teachers is extended by one of one's own, on the same views and captions."""
    from distill.reinforce import ReinforceConfig, reinforce

    from .tiny_teachers import red

    write_published(tmp_path / "published", samples)
    write_downloaded(tmp_path / "pairs", samples)
    before = run(tmp_path)
    where = {"pairs": str(tmp_path / "pairs"), "store": str(tmp_path / "store"), "workers": 1}
    reinforce(ReinforceConfig(**where, add_teachers=("tests.distill.tiny_teachers:red",)))
    store = open_store(tmp_path / "store", verify=True)
    assert [fact.name for fact in store.teachers] == ["first", "second", "red"]
    teacher, row = red(), 3
    views = np.stack([view(samples[row].picture, packed, teacher.image_size) for packed in store.augmentation(np.full(4, row), np.arange(4))])
    assert np.allclose(store.image_embeddings("red", np.full(4, row), np.arange(4)), teacher.encode_image(views), atol=0.01)
    assert np.allclose(store.text_embeddings("red", np.full(6, row), np.arange(6)), teacher.encode_text([samples[row].caption, *samples[row].synthetic]), atol=0.01)
    assert np.array_equal(store.image_embeddings(0, np.arange(20), np.zeros(20, int)), before.image_embeddings(0, np.arange(20), np.zeros(20, int)))
    with pytest.raises(StoreError, match="drawn by torchvision"):
        reinforce(ReinforceConfig(**where, teachers=("tests.distill.tiny_teachers:red",), add_augmentations=2))


def test_a_student_trains_on_the_imported_store(tmp_path):
    from distill.recipes import RECIPES
    from distill.train import TrainConfig, train

    samples = make_samples(24)
    write_published(tmp_path / "published", samples, per_shard=10)
    write_downloaded(tmp_path / "pairs", samples)
    run(tmp_path)
    build_tokenizer(4096, tmp_path / "tokenizer.json")
    recipe = dataclasses.asdict(dataclasses.replace(RECIPES["reinforced"](), batch_size=8, text_samples=8))
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    train(TrainConfig(pairs=str(tmp_path / "pairs"), store=str(tmp_path / "store"), out=str(tmp_path / "out"), recipe=str(tmp_path / "recipe.json"), samples=48))
    assert (tmp_path / "out" / "model.safetensors").is_file()
