"""Captions made elsewhere: what was written is read by key; every unusable line is named; memory does not grow with the captions."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.caption_files import MAX_CHARACTERS, renumbered
from distill.captions import TYPES, Caption, open_captions
from runtime.errors import PairsError
from runtime.files import file_sha256


def write(path: Path, *lines: object) -> Path:
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return path


def line(key: str, *texts: str, **fields: object) -> dict[str, object]:
    return {"key": key, "captions": [{"text": text, **fields} for text in texts]}


def test_captions_by_key_with_defaults(tmp_path: Path) -> None:
    path = write(tmp_path / "vlm.jsonl", line("a", "a  red\tdisc "), b"\n", line("b", "x", "y", type="rewritten", language="de", source="llm", parent=0, sentence=2), line("c"))
    found = open_captions(path)
    assert found.get("a") == [Caption(text="a red disc", type="synthetic", source="captions")]
    assert found.get("b")[1] == Caption(text="y", type="rewritten", language="de", source="llm", parent=0, sentence=2)
    assert found.get("c") == found.get("nobody") == []
    assert ("c" in found, "nobody" in found, len(found)) == (True, False, 3)
    assert found.facts == {
        "captioner": "vlm.jsonl", "licence": "unknown", "captioner_sha256": "", "sha256": file_sha256(path), "samples": 3, "captions": 3, "left_out": {},
    }  # fmt: skip


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(lambda text: text.split())
samples = st.dictionaries(st.text(min_size=1, max_size=12), st.lists(st.tuples(texts, st.sampled_from(TYPES), st.integers(-1, 0)), max_size=4), max_size=12)


@settings(max_examples=60, deadline=None)
@given(samples)
def test_what_was_written_is_read(tmp_path_factory: pytest.TempPathFactory, given: dict[str, list[tuple[str, str, int]]]) -> None:
    lines = [{"key": key, "captions": [{"text": text, "type": kind, "parent": parent} for text, kind, parent in made]} for key, made in given.items()]
    found = open_captions(write(tmp_path_factory.mktemp("c") / "c.jsonl", *lines))
    assert len(found) == len(given)
    again = pickle.loads(pickle.dumps(found))
    for key, made in given.items():
        expected = [Caption(text=" ".join(text.split()), type=kind, source="captions", parent=parent) for text, kind, parent in made]
        assert found.get(key) == again.get(key) == expected


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"key": "b", "captions": [{"text": "\xff"}]}\n', r"c\.jsonl:3: the line is not UTF-8 \(byte 36 is 0xff\); convert it"),
        (b"[1, 2]\n", r"c\.jsonl:3: the line holds list; expected \{\"key\""),
        (b"{\n", r"c\.jsonl:3: the line is not JSON \(.*\); expected one object"),
        (b"[" * 100_000 + b"\n", r"c\.jsonl:3: the line is not JSON \(maximum recursion.*\)"),
        ({"key": 7, "captions": []}, r"c\.jsonl:3: the line holds an object with key, captions; expected"),
        ({"key": "", "captions": []}, r"c\.jsonl:3: the line holds an object with key, captions; expected"),
        ({"captions": []}, r"c\.jsonl:3: the line holds an object with captions; expected"),
        ({"key": "b", "captions": "a dog"}, r"c\.jsonl:3: the line holds an object"),
        ({"key": "b", "captions": [7]}, r"c\.jsonl:3: caption 1 is 7; expected an object with a text"),
        (line("b", "x", type="poem"), r"c\.jsonl:3: caption 1 has the unknown type 'poem'; known are raw, template, synthetic, rewritten, fused"),
        (line("b", "x", type=None), r"c\.jsonl:3: caption 1 has the type null; expected a string"),
        ({"key": "b", "captions": [{"text": ["x"]}]}, r"c\.jsonl:3: caption 1 has the text \[\"x\"\]; expected a string"),
        (line("b", "x", parent=1), r"c\.jsonl:3: caption 1 has the parent 1, which is not there; expected -1 \(the picture\), 0 \(the pair's own caption\)"),
        (line("b", "x", "y", parent=-2), r"c\.jsonl:3: caption 1 has the parent -2; expected a whole number from -1"),
        (line("b", "x", sentence=True), r"c\.jsonl:3: caption 1 has the sentence true; expected a whole number from -1"),
        (line("b", "x", sentence=1 << 40), r"c\.jsonl:3: caption 1 has the sentence 1099511627776; expected a whole number"),
        (line("a", "again"), r"c\.jsonl:3: the key 'a' stands already in .*c\.jsonl:1; expected one line a sample, join or remove one"),
        ({"key": "b", "captions": ["x"] * 5000}, r"c\.jsonl:3: the sample has 5000 captions; expected at most 4096"),
    ],
)
def test_an_unusable_line_is_named(tmp_path: Path, bad: object, message: str) -> None:
    path = write(tmp_path / "c.jsonl", line("a", "x"), b"\n", bad, line("z", "y"))
    with pytest.raises(PairsError, match=message) as caught:
        open_captions(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_captions_that_no_store_can_use_are_left_out_and_told(tmp_path: Path) -> None:
    texts = ["first", "  ", "x" * 10_000, "\ud800 half", "from the first", "from the empty one"]
    captions = [{"text": text, "parent": parent} for text, parent in zip(texts, (-1, -1, -1, -1, 1, 2), strict=True)]
    found = open_captions(write(tmp_path / "c.jsonl", {"key": "a", "captions": captions}, line("b", "x" * MAX_CHARACTERS)))
    assert [(caption.text, caption.parent) for caption in found.get("a")] == [("first", -1), ("from the first", 1), ("from the empty one", -1)]
    assert found.facts["left_out"] == {"empty": 1, "not encodable": 1, "too long": 1}
    assert len(found.get("b")) == 1
    assert found.notes[1].endswith(f"c.jsonl:1: caption 3 has 10000 characters, more than {MAX_CHARACTERS}; it is left out")


def test_parents_get_the_numbers_of_a_store() -> None:
    made = [Caption(text="a", parent=-1), Caption(text="b", parent=0), Caption(text="c", parent=1), Caption(text="d", parent=3)]
    assert [caption.parent for caption in renumbered(made, 3)] == [-1, 0, 3, 5]
    assert [caption.parent for caption in renumbered(made, 1)] == [-1, 0, 1, 3]


def folder(path: Path) -> Path:
    path.mkdir()
    files = {name: write(path / name, line(name[0], f"of {name}")) for name in ("a.jsonl", "b.jsonl")}
    captioner = {"name": "toy", "licence": "MIT", "sha256": "77", "top_p": 0.9}
    receipt = {"kind": "captions", "captioner": captioner, "files": {name: {"sha256": file_sha256(file)} for name, file in files.items()}}
    (path / "receipt.json").write_text(json.dumps(receipt))
    return path


def test_a_folder_has_its_captioners_facts(tmp_path: Path) -> None:
    found = open_captions(folder(tmp_path / "caps"))
    assert [caption.text for caption in found.get("b")] == ["of b.jsonl"]
    assert {name: found.facts[name] for name in ("captioner", "licence", "captioner_sha256", "top_p", "samples")} == {
        "captioner": "toy", "licence": "MIT", "captioner_sha256": "77", "top_p": 0.9, "samples": 2,
    }  # fmt: skip


def test_a_folder_that_is_unfinished_changed_or_strange_is_refused(tmp_path: Path) -> None:
    caps = folder(tmp_path / "caps")
    write(caps / "b.jsonl", line("b", "of b.json!"))
    with pytest.raises(PairsError, match=r"b\.jsonl has changed since it was written"):
        open_captions(caps)
    (caps / "b.jsonl").unlink()
    with pytest.raises(PairsError, match=r"lacks b\.jsonl, which its receipt lists"):
        open_captions(caps)
    for text in ("[]", '{"kind": "captions", "files": {"../a.jsonl": {}}}', '{"kind": "captions"}', "\0"):
        (caps / "receipt.json").write_text(text)
        with pytest.raises(PairsError, match=r"receipt\.json' (cannot be read|is not the receipt)"):
            open_captions(caps)
    (caps / "receipt.json").unlink()
    with pytest.raises(PairsError, match=r"has no receipt\.json: mclip caption did not finish"):
        open_captions(caps)
    with pytest.raises(PairsError, match="do not exist"):
        open_captions(tmp_path / "none.jsonl")
    with pytest.raises(PairsError, match="end in '.csv'"):
        open_captions(write(tmp_path / "c.csv", b"a,b\n"))


def test_a_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    caps = folder(tmp_path / "caps")
    receipt = json.loads((caps / "receipt.json").read_text())
    write(caps / "b.jsonl", line("x", "y"), line("a", "of b"))
    receipt["files"]["b.jsonl"]["sha256"] = file_sha256(caps / "b.jsonl")
    (caps / "receipt.json").write_text(json.dumps(receipt))
    with pytest.raises(PairsError, match=r"b\.jsonl:2: the key 'a' stands already in .*a\.jsonl:1"):
        open_captions(caps)


def test_memory_does_not_hold_the_captions(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    with path.open("w") as stream:
        stream.writelines(json.dumps(line(f"{n:06}", f"{n} " + "word " * 200)) + "\n" for n in range(4000))
    assert path.stat().st_size > 4_000_000
    tracemalloc.start()
    found = open_captions(path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 400_000
    assert found.get("003999")[0].text.startswith("3999 word")


# ---------------------------------------------------------------- Parquet


def parquet(path: Path, rows: int = 2, **columns: list[object]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    writer.write_table(pyarrow.table(columns), path, row_group_size=rows)
    return path


def test_parquet_with_lists(tmp_path: Path) -> None:
    found = open_captions(parquet(tmp_path / "c.parquet", key=["a", "b", "c"], captions=[["x", " "], [], ["y", "z"]]))
    assert [caption.text for caption in found.get("c")] == ["y", "z"]
    assert found.get("b") == []
    assert (len(found), found.facts["captions"], found.facts["left_out"]) == (3, 3, {"empty": 1})
    assert found.notes[0].endswith("c.parquet: row 1: caption 2 is empty; it is left out")
    assert pickle.loads(pickle.dumps(found)).get("a")[0] == Caption(text="x", type="synthetic", source="captions")


def test_parquet_with_a_caption_a_row(tmp_path: Path) -> None:
    columns = {"key": ["a", "b", "a"], "caption": ["x", "y", "z"], "type": ["fused", None, "raw"], "source": ["llm", "llm", None]}
    found = open_captions(parquet(tmp_path / "c.parquet", **columns))
    assert found.get("a") == [Caption(text="x", type="fused", source="llm"), Caption(text="z", type="raw", source="captions")]
    assert (len(found), found.facts["captions"]) == (2, 3)


def test_unusable_parquet_is_named(tmp_path: Path) -> None:
    for columns, message in (
        ({"key": ["a"], "text": ["x"]}, "has the columns key, text; expected key and captions"),
        ({"key": [1], "captions": [["x"]]}, r"row 1: the key is 1 and the captions are \['x'\]"),
        ({"key": ["a", "b"], "caption": ["x", None]}, r"row 2: the key is 'b' and the captions are \[None\]"),
        ({"key": ["a", "a"], "captions": [["x"], ["y"]]}, r"row 2: the key 'a' stands already in .*row 1"),
        ({"key": ["a"], "caption": ["x"], "type": ["poem"]}, "row 1: caption 1 has the unknown type 'poem'"),
    ):
        with pytest.raises(PairsError, match=message):
            open_captions(parquet(tmp_path / "c.parquet", **columns))
    with pytest.raises(PairsError, match="is not a Parquet file"):
        open_captions(write(tmp_path / "d.parquet", b"PAR1 no"))


def test_pyarrow_is_named_where_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = write(tmp_path / "d.parquet", b"PAR1")
    with pytest.raises(Exception, match=r"reading 'd\.parquet' needs the package 'pyarrow'.*\[captions\]"):
        open_captions(path)
