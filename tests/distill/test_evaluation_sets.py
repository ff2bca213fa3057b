"""Evaluation on class folders, CLIP_benchmark's webdatasets, and with texts and pictures by different models."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.asymmetric import Mixed, Projected
from distill.basis_file import BASIS, read_basis, write_basis
from distill.evaluate import main
from distill.evaluation_sets import Captioned, classify, open_captioned, open_labelled, retrieve
from distill.losses import ensemble_basis
from mobileclip import create_model, save_checkpoint
from runtime.errors import CheckpointError, ImageError, PairsError, RecipeError

from .world import make_pairs

COLOURS = {"red": (220, 30, 30), "dark_green": (20, 110, 40), "blue": (30, 40, 220)}


def picture(colour: str, shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (24, 24), tuple(min(255, value + shade) for value in COLOURS[colour])).save(out, "PNG")
    return out.getvalue()


class Knows:
    """Sees the mean colour, and reads the first colour word of a text."""

    def encode_image(self, images: list[Image.Image]) -> np.ndarray:
        return np.stack([np.asarray(image, np.float64).mean(axis=(0, 1)) / 255 - 0.3 for image in images])

    def encode_text(self, texts: list[str]) -> np.ndarray:
        words = {name.replace("_", " "): np.array(value) / 255 - 0.3 for name, value in COLOURS.items()}
        return np.stack([next((vector for word, vector in words.items() if word in text), np.full(3, 0.1)) for text in texts])


def write_folders(root: Path, count: int = 4) -> Path:
    for colour in COLOURS:
        (root / colour).mkdir(parents=True)
        for n in range(count):
            (root / colour / f"{n}.png").write_bytes(picture(colour, 4 * n))
    (root / "notes.txt").write_text("not a class")
    return root


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_webdataset(root: Path, count: int = 4) -> Path:
    order = sorted(COLOURS)
    for shard in range(2):
        members = {}
        for n in range(shard, count, 2):
            for label, colour in enumerate(order):
                members |= {f"{n}{label}.png": picture(colour, 4 * n), f"{n}{label}.cls": str(label).encode()}
        write_tar(root / f"test/{shard}.tar", members)
    (root / "test/nshards.txt").write_text("2\n")
    (root / "classnames.txt").write_text("\n".join(name.replace("_", " ") for name in order) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of something {c}.\nthe colour {c}.\n")
    return root


def test_a_class_folder_and_the_same_pictures_as_a_webdataset_say_the_same(tmp_path: Path) -> None:
    folders, tars = open_labelled(write_folders(tmp_path / "a")), open_labelled(write_webdataset(tmp_path / "b"))
    assert folders.classes == tars.classes == ("blue", "dark green", "red")
    assert tars.templates == ("a photo of something {}.", "the colour {}.")
    one, other = classify(Knows(), folders), classify(Knows(), tars)
    assert one["accuracy@1"] == other["accuracy@1"]
    assert one["accuracy@1"]["value"] == 1.0
    assert (one["n"], one["classes"], one["majority"]) == (12, 3, pytest.approx(1 / 3))


def test_accuracy_counts_what_is_right_and_ties_are_wrong(tmp_path: Path) -> None:
    data = open_labelled(write_folders(tmp_path))

    class Constant(Knows):
        def encode_image(self, images: list[Image.Image]) -> np.ndarray:
            return np.ones((len(images), 3))

        def encode_text(self, texts: list[str]) -> np.ndarray:
            return np.ones((len(texts), 3))

    assert classify(Constant(), data)["accuracy@1"]["value"] == 0

    class Blind(Knows):
        def encode_text(self, texts: list[str]) -> np.ndarray:
            return super().encode_text([text.replace("red", "blue").replace("dark green", "red") for text in texts])

    found = classify(Blind(), data)
    assert found["accuracy@1"]["value"] == pytest.approx(np.mean([rank == 1 for rank in found["ranks"]]))
    assert found["accuracy@5"]["value"] == 1.0


def test_a_picture_that_does_not_decode_is_named(tmp_path: Path) -> None:
    root = write_folders(tmp_path)
    (root / "red/9.png").write_bytes(b"\x89PNG nonsense")
    found = classify(Knows(), open_labelled(root))
    assert found["skipped"] == ["red/9.png"]
    assert found["n"] == 12
    for path in root.glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(ImageError, match="none of the 13 pictures decodes"):
        classify(Knows(), open_labelled(root))


def test_several_captions_a_picture_against_brute_force(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    captions = [[f"{n} {m}" for m in range(1 + n % 3)] for n in range(9)]
    flat = [text for own in captions for text in own]
    vectors = dict(zip(flat, generator.standard_normal((len(flat), 6)), strict=True))
    pictures = generator.standard_normal((9, 6))

    class Random:
        def encode_image(self, images: list[Image.Image]) -> np.ndarray:
            return pictures[[image.width - 1 for image in images]]

        def encode_text(self, texts: list[str]) -> np.ndarray:
            return np.stack([vectors[text] for text in texts])

    def read(n: int) -> bytes:
        out = io.BytesIO()
        Image.new("RGB", (n + 1, 1)).save(out, "PNG")
        return out.getvalue()

    found = retrieve(Random(), Captioned(names=[str(n) for n in range(9)], captions=captions, read=read), ks=(1, 3))
    unit = {text: vector / np.linalg.norm(vector) for text, vector in vectors.items()}
    seen = pictures / np.linalg.norm(pictures, axis=1, keepdims=True)
    for k in (1, 3):
        right = [n in np.argsort(-(seen @ unit[text]))[:k] for n, own in enumerate(captions) for text in own]
        assert found["text_to_image"][f"recall@{k}"]["value"] == pytest.approx(np.mean(right))
        back = [any(text in captions[n] for text in sorted(flat, key=lambda text: -float(seen[n] @ unit[text]))[:k]) for n in range(9)]  # noqa: B023
        assert found["image_to_text"][f"recall@{k}"]["value"] == pytest.approx(np.mean(back))
    assert (found["pictures"], found["captions"]) == (9, len(flat))


def test_a_retrieval_set_has_a_caption_a_line(tmp_path: Path) -> None:
    write_tar(tmp_path / "test/0.tar", {"0.png": picture("red", 0), "0.txt": b"a red thing\n\nsomething red\n", "1.png": picture("blue", 0), "1.txt": b"blue"})
    (tmp_path / "test/nshards.txt").write_text("1")
    data = open_captioned(tmp_path)
    assert data.captions == [["a red thing", "something red"], ["blue"]]
    assert retrieve(Knows(), data, ks=(1,))["image_to_text"]["recall@1"]["value"] == 1.0
    (tmp_path / "classnames.txt").write_text("a\nb\n")
    with pytest.raises(PairsError, match="have no .cls; this is a set for retrieval"):
        open_labelled(tmp_path)


def broken(root: Path, what: str) -> None:
    if what == "label":
        write_tar(root / "test/0.tar", {"0.png": picture("red", 0), "0.cls": b"3"})
    elif what == "word":
        write_tar(root / "test/0.tar", {"0.png": picture("red", 0), "0.cls": b"red"})
    elif what == "shards":
        (root / "test/nshards.txt").write_text("3")
    elif what == "number":
        (root / "test/nshards.txt").write_text("many")
    elif what == "names":
        (root / "classnames.txt").unlink()
    elif what == "templates":
        (root / "zeroshot_classification_templates.txt").write_text("a photo\n")
    elif what == "kind":
        (root / "dataset_type.txt").write_text("retrieval\n")
    elif what == "damaged":
        (root / "test/1.tar").write_bytes(b"\x1f\x8b" + b"x" * 600)


@pytest.mark.parametrize(
    ("what", "message"),
    [("label", r"'0.cls' of .* holds '3'; expected the number of one of the 3 classes"), ("word", "holds 'red'"), ("shards", r"2.tar' cannot be read .* promises 3"),
     ("number", "expected the number of shards"), ("names", "classnames.txt' cannot be read"), ("templates", "has no place for the class's name"),
     ("kind", "is a retrieval set"), ("damaged", r"1.tar' cannot be read")],
)  # fmt: skip
def test_damaged_sets_are_one_sentence(tmp_path: Path, what: str, message: str) -> None:
    root = write_webdataset(tmp_path)
    broken(root, what)
    with pytest.raises(PairsError, match=message):
        open_labelled(root)


def test_class_names_and_templates_of_ones_own(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "a")
    (tmp_path / "names.txt").write_text("blue\ndark green\nred\n")
    (tmp_path / "templates.txt").write_text("{} it is\n")
    data = open_labelled(root, classnames=tmp_path / "names.txt", templates=tmp_path / "templates.txt")
    assert data.templates == ("{} it is",)
    (tmp_path / "names.txt").write_text("blue\n")
    with pytest.raises(PairsError, match="names 1 classes and .* has 3 class folders"):
        open_labelled(root, classnames=tmp_path / "names.txt")
    with pytest.raises(PairsError, match="at least two classes"):
        open_labelled(tmp_path)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    make_pairs(root / "pairs", copies=1)
    for name in ("student", "one", "two"):
        torch.manual_seed(len(name))
        save_checkpoint(create_model("pocket_s"), root / name)
    generator = torch.Generator().manual_seed(0)
    basis = ensemble_basis([torch.nn.functional.normalize(torch.randn(400, 256, generator=generator), dim=1) for _ in range(2)], 256)
    write_basis(root / "student", basis, ["one", "two"])
    return root


def test_the_command_on_foreign_sets(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders, tars = write_folders(tmp_path / "a"), write_webdataset(tmp_path / "b")
    assert main([str(made / "student"), "--data", str(folders), "--task", "zero-shot"]) == 0
    assert "12 pictures of 3 classes, 3 templates" in capsys.readouterr().out
    assert main([str(made / "student"), "--data", str(tars), "--task", "zero-shot", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 12
    with pytest.raises(RecipeError, match="no captions to retrieve by"):
        main([str(made / "student"), "--data", str(folders)])
    with pytest.raises(RecipeError, match="is neither; leave them out"):
        main([str(made / "student"), "--data", str(made / "pairs"), "--templates", "t.txt"])


def test_a_student_asks_in_its_teachers_gallery(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--query", str(made / "student"), "--gallery", str(made / "one"), str(made / "two"), "--data", str(made / "pairs"), "--k", "1"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(cell["query"], cell["gallery"]) for cell in found["cells"]] == [("A", "A"), ("A", "B"), ("B", "A"), ("B", "B")]
    assert all(cell["splits"]["all"]["n"] == 12 for cell in found["cells"])
    main([str(made / "student"), "--data", str(made / "pairs"), "--json"])
    alone = json.loads(capsys.readouterr().out)
    assert found["cells"][0]["splits"]["all"]["value"] == alone["text_to_image"]["all"]["recall@1"]["value"]
    assert main(arguments) == 0
    assert "texts by A, pictures by B:" in capsys.readouterr().out


def test_sides_that_share_no_space_are_refused(made: Path, tmp_path: Path) -> None:
    data = ["--data", str(made / "pairs")]
    with pytest.raises(CheckpointError, match="have 256 dimensions together, the student's basis was made of 512"):
        main(["--query", str(made / "student"), "--gallery", str(made / "one"), *data])
    with pytest.raises(CheckpointError, match="has no ensemble_basis"):
        main(["--query", str(made / "one"), "--gallery", str(made / "one"), str(made / "two"), *data])
    with pytest.raises(RecipeError, match="belong together"):
        main(["--query", str(made / "one"), *data])
    with pytest.raises(RecipeError, match="one of the three"):
        main([str(made / "one"), "--query", str(made / "one"), "--gallery", str(made / "two"), *data])
    (tmp_path / BASIS).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_basis(tmp_path)


def test_teachers_along_a_whole_basis_have_the_mean_of_their_cosines() -> None:
    generator = np.random.default_rng(0)
    basis = np.linalg.qr(generator.standard_normal((6, 6)))[0]
    projected = Projected([Knows(), Knows()], basis)
    images = [Image.new("RGB", (4, 4), colour) for colour in COLOURS.values()]
    seen, texts = projected.encode_image(images), projected.encode_text(["red", "blue"])
    own = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (Knows().encode_image(images), Knows().encode_text(["red", "blue"]))]
    np.testing.assert_allclose(texts @ seen.T, own[1] @ own[0].T, atol=1e-12)
    mixed = Mixed(Knows(), projected)
    assert mixed.encode_text(["red"]).shape == (1, 3)
    assert mixed.encode_image(images).shape == (3, 6)
