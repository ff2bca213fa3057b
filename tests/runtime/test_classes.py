"""Class tables, calibrated matches and remembered queries, on the toy bundle whose towers measure colour."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

import runtime
from export.score_calibration import NULL_TEXTS, calibrate_scores, fit, pairs_of
from export.verify import Reference
from mobileclip.cli import main
from runtime.classes import ClassTable
from runtime.errors import BundleError, RecipeError
from runtime.manifest import read_manifest, write_manifest
from runtime.query_cache import QueryCache
from runtime.shell_classes import store_classes
from tests.runtime import toy

NAMES = list(toy.COLOURS)


@pytest.fixture(scope="module")
def clip(toy_bundle: Path) -> runtime.Clip:
    return runtime.load(toy_bundle, threads=1)


def world(clip: runtime.Clip, count: int = 96) -> Reference:
    """Pictures of mixed colours, and texts that name what was mixed: there is something to find."""
    rng = np.random.default_rng(0)
    mixed = [sorted(NAMES[n] for n in rng.integers(0, 4, rng.integers(1, 6))) for _ in range(count)]
    pictures = [np.tile(np.mean([toy.COLOURS[name] for name in names], axis=0).astype(np.uint8), (24, 24, 1)) for names in mixed]
    texts = [" ".join(names) for names in mixed]
    return Reference(image=clip.encode_image(pictures), text=clip.encode_text(texts), logit_scale=clip.manifest.logit_scale)


@pytest.fixture
def calibrated(own_bundle: Path) -> runtime.Clip:
    """A bundle with a score calibration, fitted as the exporter fits it."""
    plain = runtime.load(own_bundle, threads=1)
    found = calibrate_scores(world(plain), lambda texts: plain.encode_text(list(texts)), own_bundle)
    assert found is not None
    write_manifest(own_bundle, dataclasses.replace(read_manifest(own_bundle, verify=False), calibration=found))
    return runtime.load(own_bundle, threads=1)


# --------------------------------------------------------------------------------------------------- tables


def test_a_table_says_what_classify_says(clip: runtime.Clip) -> None:
    table = clip.classes(NAMES)
    pictures = [toy.picture(name, 7) for name in NAMES]
    np.testing.assert_allclose(table.probabilities(pictures), clip.classify(pictures, NAMES), atol=1e-6)
    assert [name for name, _ in table.best(pictures)] == NAMES
    several = clip.classes(NAMES, ["a {}", "{} thing"])
    expected = clip.encode_text(["a red", "red thing"]).mean(axis=0)
    np.testing.assert_allclose(several.vectors[0], expected / np.linalg.norm(expected), atol=1e-6)
    own = clip.classes({"warm": ["red", "a red heart"], "cold": ["blue"]})
    assert own.best([toy.picture("red", 1), toy.picture("blue", 1)])[0][0] == "warm"


def test_wrong_names(clip: runtime.Clip) -> None:
    cases = (([], ["{}"], "at least one"), ("red", ["{}"], "at least one"), (["red", "red"], ["{}"], "twice"), (["red"], ["a"], "needs {}"), ({"a": []}, ["{}"], "no texts"))
    for names, templates, message in cases:
        with pytest.raises(ValueError, match=message):
            clip.classes(names, templates)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs texts or images"):
        clip.classes(["red"]).add("blue")


def test_adding_gives_a_new_table(clip: runtime.Clip) -> None:
    table = clip.classes(["red", "green"])
    more = table.add("blue", texts="blue")
    assert (table.names, more.names) == (("red", "green"), ("red", "green", "blue"))
    again = more.add("red", texts=["white"])
    assert again.names == ("green", "blue", "red")
    assert len(again.vectors) == 3
    with pytest.raises(BundleError, match="carries no score calibration"):
        table.add("mug", images=[toy.picture("blue", 3)])


def test_three_photographs_make_a_class(calibrated: runtime.Clip) -> None:
    """A colour that no text of the table names, shown three times."""
    table = calibrated.classes(["red", "green"]).add("mine", images=[toy.picture("blue", n) for n in range(3)])
    assert [name for name, _ in table.best([toy.picture(name, 30) for name in ("red", "green", "blue")])] == ["red", "green", "mine"]
    both = calibrated.classes(["red"]).add("mine", texts=["blue"], images=[toy.picture("blue", n) for n in range(2)])
    alone = calibrated.encode_text("blue")[0]
    assert float(both.vectors[1] @ alone) > float(table.vectors[2] @ alone)


def test_saved_tables_come_back(clip: runtime.Clip, tmp_path: Path) -> None:
    table = clip.classes(NAMES)
    table.save(tmp_path / "colours.classes")
    found = ClassTable.open(tmp_path / "colours.classes", clip)
    assert found.names == table.names
    np.testing.assert_array_equal(found.vectors, table.vectors)


def test_files_that_are_no_tables(clip: runtime.Clip, tmp_path: Path) -> None:
    path = tmp_path / "table"
    with pytest.raises(BundleError, match="cannot be read"):
        ClassTable.open(path, clip)
    good = clip.classes(["red", "blue"])
    good.save(path)
    data = path.read_bytes()
    vectors = np.ones((2, toy.DIM), np.float32)
    facts = {"schema": "1", "names": '["a", "b"]', "model": json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["model"]}
    for damaged, message in (
        (b"", "not a class table"), (data[:-3], "not a class table"), (b"\xff" * 8 + data, "not a class table"), (save({"vectors": vectors}), "not a class table"),
        (save({"vectors": vectors}, {**facts, "model": "other"}), "made with another model"), (save({"vectors": vectors}, {**facts, "names": '["a"]'}), "has 1 names"),
        (save({"vectors": vectors}, {**facts, "names": '["a", "a"]'}), "has 2 names"), (save({"vectors": vectors * np.float32(np.nan)}, facts), "finite"),
        (save({"vectors": vectors[:, :3]}, facts), "expected as many rows"),
    ):  # fmt: skip
        path.write_bytes(damaged)
        with pytest.raises(BundleError, match=message):
            ClassTable.open(path, clip)


def test_a_bundle_for_pictures_alone(toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "labels").write_text("red\ngreen\nblue\twhat is blue\tblue\n")
    (tmp_path / "templates").write_text("a {}\n{}\n")
    out = tmp_path / "small"
    assert main(["classes", str(toy_bundle), str(out), "--labels", str(tmp_path / "labels"), "--templates", str(tmp_path / "templates"), "--image-only"]) == 0
    assert "class table 'classes' of 3 classes, pictures only" in capsys.readouterr().out
    assert not (out / "tokenizer.json").exists()
    assert not list(out.glob("onnx/text*"))
    read_manifest(out)
    clip = runtime.load(out, threads=1)
    texts = {"red": ["red"], "green": ["green"], "blue": ["what is blue", "blue"]}
    whole = runtime.load(toy_bundle, threads=1, prefer={"text": "text-onnx-int8"}).classes(texts, ["a {}", "{}"])
    table = clip.stored_classes()
    assert table.names == ("red", "green", "blue")
    pictures = [toy.picture(name, 9) for name in ("blue", "red")]
    np.testing.assert_allclose(table.probabilities(pictures), whole.probabilities(pictures), atol=1e-5)
    assert clip.selfcheck()["ok"]
    assert "text" not in clip.choice
    with pytest.raises(BundleError, match="for pictures alone"):
        clip.encode_text("red")
    with pytest.raises(BundleError, match="no text tower"):
        clip.encode_tokens(np.zeros((1, toy.CONTEXT), np.int32))
    with pytest.raises(BundleError, match="the class tables classes; name one"):
        clip.stored_classes("none")
    assert main(["classes", str(out), str(tmp_path / "other"), "--labels", str(tmp_path / "labels")]) == 1


def test_labels_that_cannot_be_used(toy_bundle: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    for content, name, message in ((None, "a", "cannot be read"), ("\n\n", "a", "no lines"), ("red\n", "../a", "expected letters"), ("\xff\n", "", "expected letters")):
        if content is not None:
            labels.write_text(content)
        with pytest.raises(RecipeError, match=message):
            store_classes(toy_bundle, tmp_path / "out", labels, None, name)
    labels.write_text("red\n")
    (tmp_path / "templates").write_text("no place\n")
    with pytest.raises(RecipeError, match="needs {}"):
        store_classes(toy_bundle, tmp_path / "out", labels, tmp_path / "templates", "a")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(BundleError, match="exists"):
        store_classes(toy_bundle, tmp_path / "out", labels, None, "a")


# --------------------------------------------------------------------------------------------------- matches


def test_a_match_is_probable_and_a_stranger_is_not(calibrated: runtime.Clip) -> None:
    found = calibrated.match([toy.picture(name, 77) for name in NAMES], NAMES)
    assert found.shape == (4, 4)
    assert (found.argmax(axis=1) == np.arange(4)).all()
    assert found.diagonal().min() > 5 * (found.sum(axis=1) - found.diagonal()).max() / 3
    table = calibrated.classes(["red", "green"])
    assert table.best([toy.picture("red", 5)], least=0.01)[0][0] == "red"
    assert table.best([toy.picture("blue", 5)], least=float(table.match([toy.picture("red", 5)]).max()) / 2)[0][0] is None


def test_nothing_is_fitted_from_too_little(clip: runtime.Clip, tmp_path: Path) -> None:
    full = world(clip)
    few = Reference(image=full.image[:16], text=full.text[:16], logit_scale=1.0)
    chance = Reference(image=full.image, text=np.roll(full.text, 7, axis=0), logit_scale=1.0)
    for reference in (few, chance):
        assert calibrate_scores(reference, lambda texts: clip.encode_text(list(texts)), tmp_path) is None
    assert not list(tmp_path.iterdir())
    with pytest.raises(BundleError, match="carries no score calibration"):
        clip.match(toy.picture("red"), "red")


def test_counts_are_of_pairs_that_the_fit_did_not_see(calibrated: runtime.Clip) -> None:
    facts = calibrated.manifest.calibration
    assert facts is not None
    assert facts["fitted_on"] + facts["counted_on"] == 96
    shares = [facts["at"][least]["false_accept"] for least in ("0.5", "0.1", "0.01")]
    assert shares == sorted(shares)
    assert facts["null_texts"] == list(NULL_TEXTS)


def test_the_fit_finds_the_weights_that_made_the_labels() -> None:
    """Labels drawn from a logistic model at the prior's balance: Newton's method gets back near what drew them."""
    rng = np.random.default_rng(1)
    features = np.concatenate([rng.normal(size=(200_000, 3)), np.ones((200_000, 1))], axis=1)
    true = np.array([3.0, -1.0, 0.5, -6.0])
    labels = rng.random(200_000) < 1 / (1 + np.exp(-features @ true))
    found = fit(features, labels)
    share = labels.mean()
    moved = true[3] + np.log(0.01 / 0.99) - np.log(share / (1 - share))
    np.testing.assert_allclose(found, [*true[:3], moved], atol=0.35)


def test_captions_that_say_the_same_are_no_negatives() -> None:
    image = np.eye(3, dtype=np.float32)
    text = np.array([[1, 0, 0], [1, 0, 0], [0, 0, 1]], np.float32)
    _, labels = pairs_of(image, text, image[:1], image.mean(axis=0))
    assert (len(labels), labels.sum()) == (7, 3)


@pytest.mark.parametrize("change", [{"weights": [1.0, 2.0]}, {"weights": "x"}, {"gain": None}])
def test_damaged_calibrations(calibrated: runtime.Clip, change: dict[str, object]) -> None:
    manifest = read_manifest(calibrated.folder)
    write_manifest(calibrated.folder, dataclasses.replace(manifest, calibration={**(manifest.calibration or {}), **change}))
    with pytest.raises(BundleError, match="score calibration"):
        runtime.load(calibrated.folder).match(toy.picture("red"), "red")


# --------------------------------------------------------------------------------------------------- queries


def test_texts_are_computed_once(clip: runtime.Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    clip.queries.clear()
    first = clip.encode_text(["red", "blue"])
    monkeypatch.setattr(clip, "encode_tokens", lambda tokens: pytest.fail("computed again"))
    np.testing.assert_array_equal(clip.encode_text("blue"), first[1:])
    found = clip.encode_text(["blue", "red", "blue"])
    np.testing.assert_array_equal(found, first[[1, 0, 1]])
    found[:] = 0
    np.testing.assert_array_equal(clip.encode_text("blue"), first[1:])


def test_the_oldest_text_goes_first() -> None:
    cache = QueryCache(3)
    row = np.ones((1, 4), np.float32)
    for name in "abc":
        cache.put([name], row)
    assert cache.get(["a"]) is not None
    cache.put(["d"], row)
    assert cache.get(["b"]) is None
    assert cache.get(["a", "c", "d"]) is not None
    cache.put(["x" * 10_000], row)
    assert len(cache) == 3
    none = QueryCache(0)
    none.put(["a"], row)
    assert none.get(["a"]) is None
    assert cache.get([]) is None


def test_threads_share_the_cache() -> None:
    cache = QueryCache(16)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(500):
                names = [str(n) for n in rng.integers(0, 40, 3)]
                found = cache.get(names)
                if found is not None:
                    assert found[:, 0].tolist() == [float(name) for name in names]
                cache.put(names, np.array([[float(name)] for name in names], np.float32))
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert errors == []
    assert len(cache) <= 16
