"""Keep-lists: what is written is read, anything else is refused in one sentence."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.keep_list import KeepList, read_keep_list, write_keep_list
from runtime.errors import PairsError

KEYS = st.sets(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), min_size=1, max_size=12), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(keys=KEYS, others=KEYS)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, keys: set[str], others: set[str]) -> None:
    path = tmp_path_factory.mktemp("keep") / "some.keep"
    write_keep_list(path, keys, {"settings": {"a": 1}})
    keep = read_keep_list(path)
    assert list(keep) == sorted(keys, key=lambda key: key.encode())
    assert len(keep) == keep.facts["keys"] == len(keys)
    assert keep.facts["settings"] == {"a": 1}
    probes = sorted(keys | others)
    assert keep.mask(probes).tolist() == [key in keys for key in probes] == [key in keep.keys for key in probes]
    assert pickle.loads(pickle.dumps(keep)).mask(probes).tolist() == [key in keys for key in probes]


def test_the_order_of_keys_does_not_matter(tmp_path: Path) -> None:
    first = write_keep_list(tmp_path / "a", ["b", "a", "ü", "c/d"], {}).read_bytes()
    assert write_keep_list(tmp_path / "b", iter(["c/d", "ü", "a", "b"]), {}).read_bytes() == first


def test_equal_hashes_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.hash", lambda value: 7)
    keep = KeepList(b"a\nb\nc\n", {})
    monkeypatch.undo()
    keep._hashes[:] = hash("d")
    assert keep.mask(["d"]).tolist() == [False]
    keep._hashes[:] = hash("b")
    assert keep.mask(["b", "z"]).tolist() == [True, False]


def test_other_processes_agree(tmp_path: Path) -> None:
    """Python salts the hashes of strings per process: a pickled list must be sorted anew."""
    path = tmp_path / "keep.pickle"
    path.write_bytes(pickle.dumps(KeepList("".join(f"k{n:05}\n" for n in range(1000)).encode(), {})))
    code = "import pickle, sys; k = pickle.load(open(sys.argv[1], 'rb')); print(int(k.mask([f'k{n:05}' for n in range(2000)]).sum()))"
    found = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "5", "PYTHONPATH": "."})
    assert found.stdout.split() == ["1000"]


def test_a_list_made_by_hand_is_read(tmp_path: Path) -> None:
    (tmp_path / "hand.keep").write_text("# {}\nalpha\nbeta\n", encoding="utf-8")
    assert list(read_keep_list(tmp_path / "hand.keep")) == ["alpha", "beta"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "must begin with '# ' and one JSON object"),
        (b"a\nb\n", "must begin with '# ' and one JSON object"),
        (b"# {\na\n", "cannot be read"),
        (b"# " + b"[" * 100_000 + b"\na\n", "cannot be read"),
        (b"# [1]\na\n", "with the format"),
        (b'# {"format": "other"}\na\n', "with the format"),
        (b'# {"version": 2}\na\n', "version 2"),
        (b"# {}\n", "holds no key"),
        (b"# {}", "holds no key"),
        (b"# {}\na\nb", "is cut off"),
        (b'# {"keys": 3}\na\nb\n', "holds 2 keys, its first line says 3"),
        (b'# {"sha256": "0"}\na\nb\n', "was changed or cut"),
        (b"# {}\nb\na\n", "'a' on line 3 comes after 'b'"),
        (b"# {}\na\na\n", "'a' on line 3 comes twice"),
        (b"# {}\na\n\nb\n", "'' on line 3 is empty"),
        (b"# {}\n\xff\n", "is not UTF-8"),
    ],
)
def test_damaged_lists_are_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "bad.keep"
    path.write_bytes(content)
    with pytest.raises(PairsError, match=expected) as caught:
        read_keep_list(path)
    assert "\n" not in str(caught.value)


def test_a_cut_list_is_noticed_at_every_byte(tmp_path: Path) -> None:
    whole = write_keep_list(tmp_path / "whole", [f"key-{n}" for n in range(20)], {}).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(PairsError):
            read_keep_list(tmp_path / "cut")


@pytest.mark.parametrize(("keys", "expected"), [([], "would keep nothing"), (["a", "a"], "twice"), (["a\nb"], "cannot stand on a line"), ([""], "cannot stand on a line")])
def test_what_cannot_be_written_is_refused(tmp_path: Path, keys: list[str], expected: str) -> None:
    with pytest.raises(PairsError, match=expected):
        write_keep_list(tmp_path / "x", keys, {})
    assert list(tmp_path.iterdir()) == []


def test_missing_and_unreadable(tmp_path: Path) -> None:
    with pytest.raises(PairsError, match="cannot be read"):
        read_keep_list(tmp_path / "none")
    with pytest.raises(PairsError, match="cannot be read"):
        read_keep_list(tmp_path)


def test_the_header_is_one_json_line(tmp_path: Path) -> None:
    path = write_keep_list(tmp_path / "x", ["a"], {"note": "line\nbreak\u2028é"})
    assert json.loads(path.read_bytes().split(b"\n")[0][2:])["note"] == "line\nbreak\u2028é"
