"""Reinforcement: equal bytes, replay, skipping, refusals, and going on after a kill."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from distill import augment
from distill.augment import AugmentSpec
from distill.reinforce import ReinforceConfig, reinforce
from distill.reinforce_worker import view_parameters
from distill.store import open_store
from runtime.errors import ClipError, PairsError, RecipeError, StoreError
from runtime.files import file_sha256
from runtime.pairs import open_pairs, write_shard
from tests.distill import tiny_teachers

RED, BLUE = "tests.distill.tiny_teachers:red", "tests.distill.tiny_teachers:blue"
ROOT = Path(__file__).parents[2]


def picture(n: int, width: int = 40, height: int = 40) -> bytes:
    image = Image.new("RGB", (width, height), ((n * 37) % 256, 200, (n * 91) % 256))
    ImageDraw.Draw(image).ellipse((5, 5, 10 + n % 25, 30), fill=((n * 61) % 256, (n * 13) % 256, 40))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def make_pairs(folder: Path, counts: tuple[int, ...] = (9, 5), damage: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    n = 0
    for shard, count in enumerate(counts):
        samples = []
        for _ in range(count):
            facts = {"label": "the clean label", "concept": "1f600"}
            image = b"no picture" if damage and n == 2 else picture(n, width=40 + 13 * (n % 3))
            caption = b"\xff\xfe broken" if damage and n == 7 else f"thing number {n % 6}".encode()
            samples.append((f"pic-{n:03d}", {"png": image, "txt": caption, "json": json.dumps(facts).encode()}))
            n += 1
        write_shard(folder / f"shard-{shard}.tar", samples)
    return folder


def config(pairs: Path | str, store: Path | str, **changes) -> ReinforceConfig:
    known = {"teachers": (RED, BLUE), "augmentations": 3, "workers": 1, "part_rows": 4, "augment": AugmentSpec()}
    return ReinforceConfig(pairs=str(pairs), store=str(store), **{**known, **changes})


def part_hashes(store: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(store.glob("*.safetensors"))}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCLIP_PROGRESS", "0")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Pairs and their store, made once by one worker."""
    os.environ["MCLIP_PROGRESS"] = "0"
    folder = tmp_path_factory.mktemp("made")
    reinforce(config(make_pairs(folder / "pairs"), folder / "store"))
    return folder / "pairs", folder / "store"


def test_rows_hold_what_the_teachers_say_of_the_replayed_views(made: tuple[Path, Path]) -> None:
    pairs, store = open_pairs(made[0]), open_store(made[1], verify=True)
    assert store.keys == pairs.keys
    assert store.pair_rows.tolist() == list(range(14))
    assert store.n_augmentations.tolist() == [3] * 14
    assert [(facts.name, facts.dim, facts.licence) for facts in store.teachers] == [("red", 8, "MIT"), ("blue", 12, "MIT")]
    assert [part["rows"] for part in store.index["parts"]] == [4, 4, 1, 4, 1]
    assert store.index["coverage"] == {"pairs": 14, "rows": 14, "skipped": 0}
    for t, teacher in enumerate((tiny_teachers.red(), tiny_teachers.blue())):
        for row in (0, 8, 13):
            views = np.stack([
                np.asarray(augment.apply(pairs.image(row), packed, teacher.image_size)) for packed in store.augmentation(np.full(3, row), np.arange(3))
            ])  # fmt: skip
            found = store.image_embeddings(t, np.full(3, row), np.arange(3))
            assert (found * teacher.encode_image(views)).sum(1).min() > 0.999
            texts = [store.caption(row, j).text for j in range(3)]
            assert texts[0] == pairs.caption(row)
            assert (store.text_embeddings(t, np.full(3, row), np.arange(3)) * teacher.encode_text(texts)).sum(1).min() > 0.999
    assert not (made[1] / ".work").exists()
    assert store.index["figures"]["bytes"] == sum(path.stat().st_size for path in made[1].glob("*.safetensors"))


def test_mismatched_views_would_be_noticed(made: tuple[Path, Path]) -> None:
    """The negative control of the test above: another view's parameters do not give the stored embedding."""
    pairs, store, teacher = open_pairs(made[0]), open_store(made[1]), tiny_teachers.red()
    view = np.asarray(augment.apply(pairs.image(3), store.augmentation([3], [1])[0], teacher.image_size))
    assert float((store.image_embeddings(0, [3], [0]) * teacher.encode_image([view])).sum()) < 0.999


def test_similarity_column_is_the_cosine_of_picture_and_caption(made: tuple[Path, Path]) -> None:
    store = open_store(made[1])
    rows = np.arange(len(store))
    expected = 0.0
    for t in (0, 1):
        mean = np.mean([store.image_embeddings(t, rows, np.full(14, a)) for a in range(3)], axis=0)
        mean /= np.linalg.norm(mean, axis=1, keepdims=True)
        expected = expected + (mean * store.text_embeddings(t, rows, np.zeros(14, int))).sum(1) / 2
    assert np.abs(store.column("similarity") - expected).max() < 0.02


def test_the_same_seed_gives_the_same_bytes_with_any_number_of_workers(made: tuple[Path, Path], tmp_path: Path) -> None:
    reinforce(config(made[0], tmp_path / "again", workers=3))
    assert part_hashes(tmp_path / "again") == part_hashes(made[1])
    assert len(part_hashes(made[1])) == 5


def test_another_seed_gives_other_views(made: tuple[Path, Path]) -> None:
    drawn = {view_parameters(seed, key, view, AugmentSpec(), (40, 40)) for seed in (0, 1) for key in ("a", "b") for view in range(3)}
    assert len(drawn) == 12
    stored = open_store(made[1]).augmentation([0], [2])[0].tobytes()
    image = open_pairs(made[0]).image(0)
    assert stored == view_parameters(0, "pic-000", 2, AugmentSpec(), (image.height, image.width))


def test_clean_labels_never_enter_the_store(made: tuple[Path, Path]) -> None:
    """KEY.json of web-like pairs may know better than the caption: no byte of it is stored."""
    assert open_pairs(made[0]).meta(0)["label"] == "the clean label"
    blobs = [path.read_bytes() for path in made[1].iterdir() if path.is_file()]
    assert len(blobs) >= 7
    assert not any(b"clean label" in blob or b"1f600" in blob for blob in blobs)
    own = {open_pairs(made[0]).caption(row) for row in range(14)}
    store = open_store(made[1])
    assert {store.caption(row, 0).text for row in range(14)} == own
    assert all(any(text in store.caption(row, j).text for text in own) for row in range(14) for j in range(3))


def test_a_finished_store_is_left_alone(made: tuple[Path, Path]) -> None:
    before = (made[1] / "index.json").stat().st_mtime_ns
    index = reinforce(config(made[0], made[1]))
    assert index["rows"] == 14
    assert (made[1] / "index.json").stat().st_mtime_ns == before


def test_a_finished_store_is_recognised_without_loading_its_teachers(tmp_path: Path) -> None:
    """A checkpoint folder's receipt is enough: here there is nothing behind it that could be loaded."""
    pairs = make_pairs(tmp_path / "pairs", (3,))
    made = reinforce(config(pairs, tmp_path / "store", teachers=(RED,)))
    (_folder(tmp_path / "red") / "receipt.json").write_text(json.dumps({"files": {"model.safetensors": {"sha256": "seed 1"}}}))
    assert reinforce(config(pairs, tmp_path / "store", teachers=(str(tmp_path / "red"),))) == made
    with pytest.raises(ClipError):
        reinforce(config(pairs, tmp_path / "store", teachers=(str(tmp_path / "red"),), seed=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"seed": 7}, r"seed \(0 there, 7 now\)"), ({"augmentations": 2}, "augmentations"), ({"dtype": "float16"}, "dtype"), ({"teachers": (RED,)}, "teachers"),
     ({"augment": AugmentSpec(rotate=5.0)}, "augmentation ")],
)  # fmt: skip
def test_other_settings_are_refused_and_nothing_is_lost(made: tuple[Path, Path], changes: dict, message: str) -> None:
    before = part_hashes(made[1])
    with pytest.raises(StoreError, match=f"begun with other .*{message}"):
        reinforce(config(made[0], made[1], **changes))
    assert part_hashes(made[1]) == before
    assert len(open_store(made[1])) == 14


def test_other_pairs_are_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="begun with other pairs"):
        reinforce(config(make_pairs(tmp_path / "other", (3,)), made[1]))


def test_a_folder_with_other_things_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(StoreError, match="is no store but holds letters.txt"):
        reinforce(config(made[0], tmp_path))


def test_pairs_without_a_usable_picture_or_caption_are_skipped_and_listed(tmp_path: Path) -> None:
    index = reinforce(config(make_pairs(tmp_path / "pairs", damage=True), tmp_path / "store"))
    assert index["coverage"] == {"pairs": 14, "rows": 12, "skipped": 2}
    reasons = {entry["key"]: entry["reason"] for entry in index["skipped"]}
    assert set(reasons) == {"pic-002", "pic-007"}
    assert "does not decode" in reasons["pic-002"]
    assert "UTF-8" in reasons["pic-007"]
    store = open_store(tmp_path / "store", verify=True)
    assert "pic-002" not in store.keys
    assert store.pair_rows.tolist() == [0, 1, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13]
    view = augment.apply(open_pairs(tmp_path / "pairs").image(3), store.augmentation([2], [0])[0], 32)
    assert float((store.image_embeddings(0, [2], [0]) * tiny_teachers.red().encode_image([view])).sum()) > 0.999


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    write_shard(_folder(tmp_path / "pairs") / "a.tar", [("x", {"png": b"no", "txt": b"caption"})])
    with pytest.raises(PairsError, match="none of the 1 pairs"):
        reinforce(config(tmp_path / "pairs", tmp_path / "store"))
    assert not (tmp_path / "store" / "index.json").exists()


def test_missing_and_empty_pairs(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", _folder(tmp_path / "empty")):
        with pytest.raises(PairsError):
            reinforce(config(folder, tmp_path / "store"))


def test_a_damaged_part_is_made_again(made: tuple[Path, Path], tmp_path: Path) -> None:
    reinforce(config(made[0], tmp_path))
    good = part_hashes(tmp_path)
    path = tmp_path / "shard-0.0001.safetensors"
    blob = bytearray(path.read_bytes())
    blob[-5] ^= 4
    path.write_bytes(bytes(blob))
    (tmp_path / "shard-1.0000.safetensors").unlink()
    index = reinforce(config(made[0], tmp_path))
    assert part_hashes(tmp_path) == good
    assert index["figures"]["pairs_embedded"] == 8
    assert index["figures"]["pairs_found_done"] == 6


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("tests.distill.tiny_teachers:broken", StoreError, "finite: False"),
        ("tests.distill.tiny_teachers:misshapen", StoreError, r"returned \(\d+, 7\)"),
        ("tests.distill.tiny_teachers:not_a_teacher", RecipeError, "returned str"),
        ("tests.distill.tiny_teachers:nobody", RecipeError, "cannot be imported"),
        ("no such thing", RecipeError, "no checkpoint folder"),
    ],
)
def test_bad_teachers_leave_no_store(made: tuple[Path, Path], tmp_path: Path, spec: str, error: type[ClipError], message: str) -> None:
    with pytest.raises(error, match=message):
        reinforce(config(made[0], tmp_path / "store", teachers=(spec,)))
    assert not (tmp_path / "store" / "index.json").exists()


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    for changes in ({"teachers": ()}, {"augmentations": 0}, {"workers": -1}, {"seed": -1}, {"templates": ("poem",)}):
        with pytest.raises(RecipeError):
            config(tmp_path, tmp_path, **changes)


# ---------------------------------------------------------------- kill, interrupt, go on

PROGRAM = """
import sys
from runtime.errors import ClipError
from distill.reinforce import main
if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except ClipError as error:
        sys.exit(f"error: {error}")
"""


def start(pairs: Path, store: Path, delay: float) -> subprocess.Popen[str]:
    script = store.parent / "run.py"
    script.write_text(PROGRAM)
    arguments = [str(pairs), str(store), "--teachers", "tests.distill.tiny_teachers:slow", "--augmentations", "2", "--workers", "2", "--part-rows", "3", "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TINY_DELAY": str(delay)}
    return subprocess.Popen([sys.executable, str(script), *arguments], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_parts(store: Path, count: int, process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 60
    while len(list(store.glob("*.safetensors"))) < count:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_or_interrupted_it_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, number: signal.Signals) -> None:
    pairs = make_pairs(tmp_path / "pairs", (15, 12))
    process = start(pairs, tmp_path / "store", delay=0.2)
    wait_for_parts(tmp_path / "store", 3, process)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    assert not (tmp_path / "store" / "index.json").exists()
    with pytest.raises(StoreError, match="not a finished store"):
        open_store(tmp_path / "store")
    done = len(list((tmp_path / "store").glob("*.safetensors")))
    again = start(pairs, tmp_path / "store", delay=0.0)
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    figures = json.loads(out)
    assert figures["pairs_found_done"] >= 3 * min(done, 3)
    assert figures["pairs_embedded"] + figures["pairs_found_done"] == 27
    whole = start(pairs, tmp_path / "whole", delay=0.0)
    assert whole.communicate(timeout=60)
    assert whole.returncode == 0
    assert part_hashes(tmp_path / "store") == part_hashes(tmp_path / "whole")
    assert len(open_store(tmp_path / "store", verify=True)) == 27
    assert not [path.name for path in (tmp_path / "store").iterdir() if path.name.startswith(".") and path.name != ".lock"]


def test_workers_leave_with_a_killed_parent(tmp_path: Path) -> None:
    process = start(make_pairs(tmp_path / "pairs", (12,)), tmp_path / "store", delay=0.3)
    wait_for_parts(tmp_path / "store", 1, process)
    children = _children(process.pid)
    assert children
    process.kill()
    process.communicate(timeout=30)
    limit = time.monotonic() + 15
    while any(_alive(pid) for pid in children) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not [pid for pid in children if _alive(pid)]


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path / "pairs", (2,))
    with open(_folder(tmp_path / "store") / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="another process is writing the store"):
            reinforce(config(pairs, tmp_path / "store"))
    assert reinforce(config(pairs, tmp_path / "store"))["rows"] == 2


def test_half_written_files_of_a_killed_worker_are_removed(tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path / "pairs", (2,))
    stray = _folder(tmp_path / "store") / ".shard-0.0000.safetensors.4711"
    stray.write_bytes(b"half")
    reinforce(config(pairs, tmp_path / "store"))
    assert not stray.exists()


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def _children(pid: int) -> list[int]:
    """All descendants, read from /proc."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    found, frontier = [], [pid]
    while frontier:
        frontier = [child for child, parent in parents.items() if parent in frontier]
        found += frontier
    return found


def _alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
