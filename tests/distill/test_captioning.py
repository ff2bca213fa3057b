"""mclip caption: the same bytes however often it was killed; nothing is lost, and what is left out is told."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.captioning import CaptionConfig, caption, main
from distill.captions import open_captions
from runtime.errors import ClipError, PairsError, RecipeError
from runtime.pairs import open_pairs, write_shard
from tests.distill.world import draw, make_pairs

MODULE = "tests.distill.tiny_captioners"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("pairs"), copies=3)


def config(pairs: Path, out: Path, **more: object) -> CaptionConfig:
    return CaptionConfig(**{"pairs": str(pairs), "out": str(out), "captioner": f"{MODULE}:colours", "batch": 5, "part_rows": 5, **more})  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}


def test_a_captions_folder(pairs: Path, tmp_path: Path) -> None:
    receipt = caption(config(pairs, tmp_path / "c", first_sentence=True))
    found = open_captions(tmp_path / "c")
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [".lock", "00000.jsonl", "00001.jsonl", "00002.jsonl", "receipt.json", "settings.json"]
    assert len(found) == receipt["counts"]["samples"] == len(open_pairs(pairs))
    made = found.get("s1-04")
    assert 1 <= len(made) <= 5
    assert all(one.text.endswith(".") and one.sentence == 0 and (one.type, one.source, one.parent) == ("synthetic", "colours", -1) for one in made)
    assert len({one.text for one in made}) == len(made)
    assert receipt["counts"]["captions"] + receipt["counts"]["duplicate"] == 5 * len(found)
    assert receipt["counts"]["duplicate"] > 0
    assert {name: found.facts[name] for name in ("captioner", "licence", "captioner_sha256", "top_p", "seed")} == {
        "captioner": "colours", "licence": "MIT", "captioner_sha256": "c0", "top_p": 0.9, "seed": 0,
    }  # fmt: skip
    lines = (tmp_path / "c" / "00001.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == [f"s1-{n:02}" for n in range(12)]


def test_parts_and_repetition_change_nothing_seed_does(pairs: Path, tmp_path: Path) -> None:
    first = caption(config(pairs, tmp_path / "a"))
    caption(config(pairs, tmp_path / "b", part_rows=1000))
    caption(config(pairs, tmp_path / "c", seed=1))
    assert files(tmp_path / "a") == files(tmp_path / "b") != files(tmp_path / "c")
    stamp = (tmp_path / "a" / "receipt.json").stat().st_mtime_ns
    assert caption(config(pairs, tmp_path / "a")) == first
    assert (tmp_path / "a" / "receipt.json").stat().st_mtime_ns == stamp


def test_a_changed_shard_is_captioned_again_alone(pairs: Path, tmp_path: Path) -> None:
    caption(config(pairs, tmp_path / "c"))
    before, kept = files(tmp_path / "c"), (tmp_path / "c" / "00000.jsonl").stat().st_mtime_ns
    (tmp_path / "c" / "00001.jsonl").write_bytes(before["00001.jsonl"][:-9] + b"x" + before["00001.jsonl"][-8:])
    caption(config(pairs, tmp_path / "c"))
    assert files(tmp_path / "c") == before
    assert (tmp_path / "c" / "00000.jsonl").stat().st_mtime_ns == kept


def test_other_settings_strangers_and_a_second_writer_are_refused(pairs: Path, tmp_path: Path) -> None:
    import fcntl

    caption(config(pairs, tmp_path / "c"))
    with pytest.raises(PairsError, match="begun with other top_p, seed; give another folder"):
        caption(config(pairs, tmp_path / "c", seed=1, top_p=0.5))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "diary.txt").write_text("x")
    with pytest.raises(PairsError, match=r"is no captions folder but holds diary\.txt"):
        caption(config(pairs, tmp_path / "d"))
    with open(tmp_path / "c" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(PairsError, match="another process is writing the captions"):
            caption(config(pairs, tmp_path / "c"))
    (tmp_path / "c" / "settings.json").write_text("{")
    with pytest.raises(PairsError, match="cannot be read"):
        caption(config(pairs, tmp_path / "c"))
    with pytest.raises(RecipeError, match="captions_per_image is 0"):
        config(pairs, tmp_path, captions_per_image=0)


def test_unusable_pairs_are_skipped_with_their_reason(tmp_path: Path) -> None:
    import numpy as np

    good = draw("red", "disc", np.random.default_rng(0))
    (tmp_path / "p").mkdir()
    texts = {"a": None, "b": b"x", "c": b"\xff", "d": b" ", "e": b"fine"}
    samples = [(key, {"png": good if key != "b" else b"no picture", **({} if text is None else {"txt": text})}) for key, text in texts.items()]
    write_shard(tmp_path / "p" / "0.tar", samples)
    seen = caption(config(tmp_path / "p", tmp_path / "c"))
    assert (seen["counts"]["samples"], seen["counts"]["skipped"]) == (4, 1)
    assert seen["shards"]["0"]["skipped"][0]["key"] == "b"
    assert "does not decode" in seen["shards"]["0"]["skipped"][0]["reason"]
    read = caption(config(tmp_path / "p", tmp_path / "r", captioner=f"{MODULE}:echo"))
    assert {entry["key"]: entry["reason"][:60] for entry in read["shards"]["0"]["skipped"]}.keys() == {"a", "b", "c", "d"} - {"b"}
    assert open_captions(tmp_path / "r").get("e")[0].parent == 0
    write_shard(tmp_path / "p" / "0.tar", samples[1:2])
    with pytest.raises(PairsError, match="none of the 1 pairs of .* could be captioned; the first: sample 'b'"):
        caption(config(tmp_path / "p", tmp_path / "n"))


def test_a_picture_that_breaks_the_captioner_does_not_take_its_neighbours_along(pairs: Path, tmp_path: Path) -> None:
    receipt = caption(config(pairs, tmp_path / "c", captioner=f"{MODULE}:fragile"))
    assert receipt["counts"]["skipped"] == 1
    assert receipt["shards"]["00000"]["skipped"] == [{"shard": "00000", "key": "s0-03", "reason": "sample 's0-03': the captioner's logits are not finite"}]
    assert len(open_captions(tmp_path / "c")) == len(open_pairs(pairs)) - 1


def test_a_captioner_that_returns_something_else_is_named(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(ClipError, match="captioner 'colours' returned 5 lists for 5 pairs; expected one list of drafts"):
        caption(config(pairs, tmp_path / "c", captioner=f"{MODULE}:deaf"))
    assert not (tmp_path / "c" / "receipt.json").exists()


def test_killed_anywhere_and_run_again_the_bytes_are_the_same(pairs: Path, tmp_path: Path) -> None:
    caption(config(pairs, tmp_path / "whole"))
    command = [sys.executable, "-c", "import sys; from distill.captioning import main; sys.exit(main(sys.argv[1:]))", str(pairs), str(tmp_path / "killed"),
               "--captioner", f"{MODULE}:colours", "--batch", "5", "--part-rows", "5"]  # fmt: skip
    environment = {**os.environ, "TINY_DELAY": "0.05", "MCLIP_PROGRESS": "0"}
    draw_delay = random.Random(0)
    for _ in range(5):
        child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not (tmp_path / "killed" / "settings.json").exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(draw_delay.uniform(0, 0.3))
        child.send_signal(signal.SIGKILL)
        child.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*.part"))


def test_the_command_line(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(pairs), str(tmp_path / "c"), "--captioner", f"{MODULE}:sizes", "--captions-per-image", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["samples"], told["captions"], told["skipped"]) == (36, 36, 0)
    assert open_captions(tmp_path / "c").get("s0-00")[0].text == "48 by 48"
