"""More languages: translations land where the original lies, the original stays, pictures are not touched; and interrupted runs go on exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distill import languages
from distill.evaluate import main as evaluate
from distill.languages import LanguagesConfig, read_texts, train_languages, widen
from distill.weight_average import average
from distill.weight_average import main as average_main
from mobileclip.checkpoint import load_checkpoint, open_tokenizer, save_checkpoint
from mobileclip.models import create_model
from mobileclip.students import student_config
from runtime.errors import CheckpointError, PairsError, RecipeError, TrainingError

from .world import COLOURS, SHAPES, make_pairs

GERMAN = {"red": "rot", "green": "grün", "blue": "blau", "yellow": "gelb", "disc": "Scheibe", "square": "Quadrat", "stripe": "Streifen"}
CONCEPTS = [(colour, shape) for colour in COLOURS for shape in SHAPES]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("languages")
    make_pairs(root / "pairs", copies=1)
    write(root / "en.jsonl", {f"{c}-{s}": f"a {c} {s}" for c, s in CONCEPTS})
    write(root / "de.jsonl", {f"{c}-{s}": f"{GERMAN[s]}, {GERMAN[c]} сам" for c, s in CONCEPTS})
    torch.manual_seed(0)
    save_checkpoint(create_model(student_config("pocket_s")), root / "student")
    train_languages(settings(root, root / "out"))
    return root


def write(path: Path, texts: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps({"concept": concept, "label": label}, ensure_ascii=False) + "\n" for concept, label in texts.items()), encoding="utf-8")
    return path


def settings(world: Path, out: Path, **changes: object) -> LanguagesConfig:
    base = LanguagesConfig(
        checkpoint=str(world / "student"), out=str(out), texts={"de": str(world / "de.jsonl")}, pivot=str(world / "en.jsonl"), steps=60, batch_size=16, context_length=32
    )  # fmt: skip
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def embed(folder: Path, texts: list[str]) -> torch.Tensor:
    model = load_checkpoint(folder)
    with torch.no_grad():
        return model.encode_text(torch.from_numpy(open_tokenizer(folder)(texts)))


def test_translations_land_where_the_originals_lie_and_those_stay(world: Path) -> None:
    english, german = list(read_texts(world / "en.jsonl").values()), list(read_texts(world / "de.jsonl").values())
    before, after = embed(world / "student", english), embed(world / "out", english)
    translated = embed(world / "out", german)
    assert float((translated @ before.T).argmax(1).eq(torch.arange(12)).float().mean()) > 0.9
    assert float((embed(world / "student", german) @ before.T).argmax(1).eq(torch.arange(12)).float().mean()) < 0.5
    assert float((after * before).sum(1).mean()) > 0.9


def test_pictures_and_temperature_are_not_touched(world: Path) -> None:
    one, other = load_checkpoint(world / "student").state_dict(), load_checkpoint(world / "out").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one if not name.startswith("text."))
    assert load_checkpoint(world / "out").config.text.context_length == 32


def test_a_wider_tower_reads_what_fitted_as_before(world: Path) -> None:
    source = load_checkpoint(world / "student")
    wide = widen(source, 40).eval()
    tokens = open_tokenizer(world / "student")(["a red disc", "green", ""])
    longer = np.pad(tokens, ((0, 0), (0, 20)))
    with torch.no_grad():
        torch.testing.assert_close(wide.encode_text(torch.from_numpy(longer)), source.encode_text(torch.from_numpy(tokens)))
    with pytest.raises(RecipeError, match="reads 20 tokens"):
        widen(source, 8)


def test_an_interrupted_run_goes_on_to_the_same_weights(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(languages, "stop_asked", lambda: contextlib.nullcontext(lambda: asked.append(1) or len(asked) == 7))
    with pytest.raises(KeyboardInterrupt):
        train_languages(settings(world, tmp_path / "out"))
    monkeypatch.undo()
    train_languages(settings(world, tmp_path / "out"))
    one, other = load_checkpoint(world / "out").state_dict(), load_checkpoint(tmp_path / "out").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(TrainingError, match="other settings"):
        train_languages(settings(world, tmp_path / "out", steps=61))


def test_retrieval_in_another_language(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def hits(folder: str, *more: str) -> dict[str, object]:
        evaluate([str(world / folder), "--data", str(world / "pairs"), "--json", *more])
        return json.loads(capsys.readouterr().out)

    own, german = hits("student"), hits("out", "--labels", str(world / "de.jsonl"))
    assert german["queries"]["text_to_image"]["all"][0].startswith("Scheibe")  # type: ignore[index]
    assert german["text_to_image"]["all"]["n"] == own["text_to_image"]["all"]["n"] == 12  # type: ignore[index]
    write(tmp_path / "few.jsonl", {"red-disc": "rot"})
    with pytest.raises(PairsError, match="has no text for 11 of the pairs' concepts"):
        evaluate([str(world / "out"), "--data", str(world / "pairs"), "--labels", str(tmp_path / "few.jsonl")])


@pytest.mark.parametrize(("text", "message"), [("", "holds no texts"), ("{", "line 1 of"), ('{"concept": "a"}', "line 1 of"), ('{"concept": "a", "label": " "}', "holds no texts")])
def test_bad_files_of_texts(world: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(PairsError, match=message):
        train_languages(settings(world, tmp_path / "out", texts={"x": str(tmp_path / "x.jsonl")}))
    assert not (tmp_path / "out").exists()


def test_files_of_other_concepts_and_bad_settings(world: Path, tmp_path: Path) -> None:
    write(tmp_path / "other.jsonl", {"x": "y"})
    with pytest.raises(PairsError, match="share no concept"):
        train_languages(settings(world, tmp_path / "out", texts={"x": str(tmp_path / "other.jsonl")}))
    with pytest.raises(PairsError, match="cannot be read"):
        train_languages(settings(world, tmp_path / "out", pivot=str(tmp_path / "none.jsonl")))
    with pytest.raises(RecipeError, match="expected at least one language"):
        settings(world, tmp_path / "out", texts={})


def test_only_the_pairs_concepts_are_learned_from(world: Path, tmp_path: Path) -> None:
    write(tmp_path / "en.jsonl", {**read_texts(world / "en.jsonl"), "unseen": "a thing"})
    write(tmp_path / "de.jsonl", {**read_texts(world / "de.jsonl"), "unseen": "ein Ding"})
    changes = {"pivot": str(tmp_path / "en.jsonl"), "texts": {"de": str(tmp_path / "de.jsonl")}, "steps": 1}
    for concepts, count in (("", 13), (str(world / "pairs"), 12)):
        out = train_languages(settings(world, tmp_path / f"out{count}", concepts=concepts, **changes))
        assert json.loads((out / "receipt.json").read_text())["figures"]["concepts"] == count


# ---------------------------------------------------------------- a model between two


def test_the_line_between_two_models(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = load_checkpoint(world / "student")
    torch.manual_seed(1)
    tuned = create_model(student_config("pocket_s"))
    ends = [average(base, tuned, share).state_dict() for share in (0.0, 1.0)]
    for end, model in zip(ends, (base, tuned), strict=True):
        assert all(torch.equal(end[name], tensor) for name, tensor in model.state_dict().items())
    middle = average(base, tuned, 0.25).state_dict()["text.projection.weight"]
    torch.testing.assert_close(middle, 0.75 * ends[0]["text.projection.weight"] + 0.25 * ends[1]["text.projection.weight"])
    save_checkpoint(tuned, tmp_path / "tuned")
    assert average_main([str(world / "student"), str(tmp_path / "tuned"), str(tmp_path / "half"), "--share", "0.5"]) == 0
    assert "50%" in capsys.readouterr().out
    found = load_checkpoint(tmp_path / "half").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in average(base, tuned, 0.5).state_dict().items())
    assert average_main([str(world / "student"), str(tmp_path / "tuned"), "--sweep", "0", "1", "--data", str(world / "pairs"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["share"] for row in rows] == [0, 1]
    assert all(0 <= row["recall@5"][str(world / "pairs")] <= 1 for row in rows)


def test_what_does_not_lie_on_a_line_is_refused(world: Path, tmp_path: Path) -> None:
    base = load_checkpoint(world / "student")
    with pytest.raises(CheckpointError, match="differ in text"):
        average(base, load_checkpoint(world / "out"), 0.5)
    with pytest.raises(RecipeError, match="share of the tuned model is 1.5"):
        average(base, base, 1.5)
    with pytest.raises(RecipeError, match="give one of the two"):
        average_main([str(world / "student"), str(world / "out")])
    with pytest.raises(RecipeError, match="is one of the two models"):
        average_main([str(world / "student"), str(world / "student"), str(world / "student")])
