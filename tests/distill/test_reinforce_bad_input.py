"""Bad input: every pair that cannot be used is left out with its reason and counted, everything else is stored as if it were alone."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill import views
from distill.augment import AugmentSpec
from distill.reinforce import reinforce
from distill.store import open_store
from runtime.errors import PairsError, StoreError
from runtime.pairs import open_pairs, write_shard
from tests.distill import tiny_teachers
from tests.distill.test_reinforce import BLUE, RED, ROOT, config, make_pairs, part_hashes, picture

PLAIN = AugmentSpec(operations=0, scale=(0.9, 1.0))
MOODY = "tests.distill.tiny_teachers:moody"


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCLIP_PROGRESS", "0")


def raw_shard(path: Path, members: list[tuple[str, bytes]], links: list[tuple[str, bytes]] = ()) -> Path:
    """A tar as any program may write it: names as given, nothing checked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, kind in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    return path


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def test_samples_that_cannot_be_used_are_counted_and_the_others_are_stored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs = tmp_path / "pairs"
    good = [(f"good-{n}.png", picture(n)) for n in range(3)] + [(f"good-{n}.txt", b"fine") for n in range(3)]
    raw_shard(
        pairs / "a.tar",
        [*good, ("twice.png", picture(7)), ("twice.txt", b"the first"), ("twice.png", picture(8)), ("twice.txt", b"the second"), ("empty.png", b""),
         ("empty.txt", b"0 bytes"), ("mute.png", picture(9)), ("blank.png", picture(3)), ("blank.txt", b" \n"), ("../../outside.png", picture(1)), ("/etc/cron.png", picture(1)),
         ("alone.txt", b"no picture")],
        [("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)],
    )  # fmt: skip
    raw_shard(pairs / "b.tar", [("good-1.png", picture(5)), ("good-1.txt", b"again"), ("last.png", picture(6)), ("last.txt", b"fine too")])
    index = reinforce(config(pairs, tmp_path / "store", workers=0))
    reasons = {(entry["shard"], entry["key"]): entry["reason"] for entry in index["skipped"]}
    assert index["coverage"] == {"pairs": 15, "rows": 5, "skipped": 10}
    assert len(reasons) == 10
    expected = {
        ("a", "twice"): "second picture for the sample 'twice', expected one; the first is kept", ("a", "empty"): "the picture (0 bytes) does not decode",
        ("a", "mute"): "it has no caption (mute.txt), and none is given for it", ("a", "blank"): "its caption is empty", ("a", "../../outside.png"): "leaves the folder",
        ("a", "/etc/cron.png"): "leaves the folder", ("a", "alone"): "no picture for the sample 'alone'", ("a", "link.png"): "link or special file",
        ("a", "hard.png"): "link or special file", ("b", "good-1"): "the key 'good-1' is in a.tar already",
    }  # fmt: skip
    assert all(sentence in reasons[place] for place, sentence in expected.items()), reasons
    store, lenient = open_store(tmp_path / "store", verify=True), open_pairs(pairs, strict=False)
    assert store.keys == ["good-0", "good-1", "good-2", "twice", "last"]
    assert [lenient.keys[row] for row in store.pair_rows] == store.keys  # rows mean the same in store and pairs
    assert store.caption(3, 0).text == "the first"
    assert store.caption(1, 0).text == "fine"
    with pytest.raises(PairsError):
        open_pairs(pairs)  # a strict reader says the first of them
    assert "skipped 'empty' of shard a" in caplog.text


def test_shards_that_are_no_sound_tar_are_refused(tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path / "pairs", (3,))
    blob = (pairs / "shard-0.tar").read_bytes()
    (pairs / "shard-1.tar").write_bytes(blob[:1500])
    with pytest.raises(PairsError, match="shard-1.tar is truncated"):
        reinforce(config(pairs, tmp_path / "store", workers=0))


def pictures() -> dict[str, bytes]:
    """Pictures that are no plain RGB."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize((54, 36), Image.Resampling.BICUBIC)
    alpha = colours.copy()
    alpha.putalpha(Image.fromarray((np.arange(54, dtype=np.uint8) * 4)[None].repeat(36, 0)))
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray((rng.integers(0, 65536, (36, 54))).astype(np.uint16))
    frames = [colours, colours.rotate(90), colours.rotate(180)]
    return {
        "animated.webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], duration=80, lossless=True),
        "animated-png.png": encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]), "cmyk.jpg": encoded(colours.convert("CMYK"), "JPEG"),
        "deep.png": encoded(deep, "PNG"), "grey.jpg": encoded(colours.convert("L"), "JPEG"), "palette.png": encoded(colours.convert("P"), "PNG"),
        "rotated.jpg": encoded(colours, "JPEG", exif=exif), "transparent.png": encoded(alpha, "PNG"), "transparent.webp": encoded(alpha, "WEBP", lossless=True),
    }  # fmt: skip


def test_unusual_pictures_are_embedded_as_the_pairs_show_them(tmp_path: Path) -> None:
    members = [(name, data) for name, data in pictures().items()]
    members = [(name.replace(".", "-", 1) + "." + name.rpartition(".")[2], data) for name, data in members]
    raw_shard(tmp_path / "pairs/a.tar", [*members, *((f"{name.partition('.')[0]}.txt", b"x") for name, _ in members)])
    index = reinforce(config(tmp_path / "pairs", tmp_path / "store", workers=0))
    assert index["coverage"] == {"pairs": 9, "rows": 9, "skipped": 0}
    store, pairs, teacher = open_store(tmp_path / "store"), open_pairs(tmp_path / "pairs"), tiny_teachers.red()
    for row, key in enumerate(store.keys):
        view = views.view(pairs.image_bytes(row), store.augmentation([row], [1])[0], 32)
        assert (store.image_embeddings(0, [row], [1]) * teacher.encode_image(view[None])).sum() > 0.999, key
    row = store.keys.index("rotated-jpg")
    assert pairs.image(row).size == (36, 54)  # turned upright


MEMORY = """
import io, resource, sys
from PIL import Image
from distill import views
from distill.reinforce_worker import draw_views
from distill.augment import AugmentSpec
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
picture = views.open_picture(open(sys.argv[1], "rb").read())
for packed in draw_views(0, "k", range(4), AugmentSpec(), picture.size):
    assert picture.view(packed, 64).shape == (64, 64, 3)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) // 1024)
"""


def test_large_pictures_are_embedded_in_bounded_memory_and_huge_ones_are_skipped(tmp_path: Path) -> None:
    large, huge = Image.new("RGB", (8000, 6250), (10, 200, 90)), Image.new("L", (10_100, 10_000), 90)
    samples = [("a-large", {"jpg": encoded(large, "JPEG"), "txt": b"50 megapixels"}), ("b-huge", {"png": encoded(huge, "PNG", compress_level=1), "txt": b"101 megapixels"}),
               ("c-png", {"png": encoded(large, "PNG", compress_level=1), "txt": b"50 megapixels"})]  # fmt: skip
    write_shard(_folder(tmp_path / "pairs") / "a.tar", samples)
    index = reinforce(config(tmp_path / "pairs", tmp_path / "store", workers=0, augmentations=1, teachers=(RED,)))
    assert index["coverage"] == {"pairs": 3, "rows": 2, "skipped": 1}
    assert "10100 x 10000 pixels, expected at most 100 megapixels" in index["skipped"][0]["reason"]
    for name, member, limit in (("large.jpg", 0, 80), ("large.png", 2, 420)):  # MiB: a reduced JPEG; a whole picture as RGB, once or twice
        (tmp_path / name).write_bytes(next(iter(samples[member][1].values())))
        done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path / name)], cwd=ROOT, capture_output=True, text=True, check=True)
        assert int(done.stdout) < limit, name


def test_captions_of_ten_thousand_characters_are_stored_whole(tmp_path: Path) -> None:
    text = "lang ✓ " * 1430
    write_shard(_folder(tmp_path / "pairs") / "a.tar", [("x", {"png": picture(1), "txt": text.encode()}), ("y", {"png": picture(2), "txt": b"short"})])
    reinforce(config(tmp_path / "pairs", tmp_path / "store", workers=0))
    store = open_store(tmp_path / "store", verify=True)
    assert store.caption(0, 0).text == " ".join(text.split())
    assert len(store.caption(0, 0).text) > 10_000
    assert (store.text_embeddings(1, [0], [0]) * tiny_teachers.blue().encode_text([store.caption(0, 0).text])).sum() > 0.999


@pytest.mark.parametrize("texts", ["pooled", "part"])
def test_a_teacher_that_gives_no_number_for_one_pair_costs_that_pair_alone(tmp_path: Path, texts: str) -> None:
    bad = encoded(Image.new("RGB", (40, 40), (255, 0, 255)), "PNG")
    samples = [(f"k{n}", {"png": bad if n == 3 else picture(n), "txt": b"some magenta" if n == 6 else f"text {n}".encode()}) for n in range(9)]
    write_shard(_folder(tmp_path / "pairs") / "a.tar", samples)
    index = reinforce(config(tmp_path / "pairs", tmp_path / "store", workers=0, teachers=(BLUE, MOODY), texts=texts, augment=PLAIN))
    assert index["coverage"] == {"pairs": 9, "rows": 7, "skipped": 2}
    assert {entry["key"]: entry["reason"] for entry in index["skipped"]} == {
        "k3": "teacher 'moody' gave no finite embedding for a view of this picture", "k6": "teacher 'moody' gave no finite embedding for a caption of this pair",
    }  # fmt: skip
    store = open_store(tmp_path / "store", verify=True)
    assert store.keys == ["k0", "k1", "k2", "k4", "k5", "k7", "k8"]
    view = views.view(open_pairs(tmp_path / "pairs").image_bytes(4), store.augmentation([3], [2])[0], 32)
    assert (store.image_embeddings("moody", [3], [2]) * tiny_teachers.red().encode_image(view[None])).sum() > 0.999


def test_a_teacher_that_gives_no_number_for_any_pair_is_refused(tmp_path: Path) -> None:
    samples = [(f"k{n}", {"png": encoded(Image.new("RGB", (40, 40), (255, 0, 255)), "PNG"), "txt": b"x"}) for n in range(3)]
    write_shard(_folder(tmp_path / "pairs") / "a.tar", samples)
    with pytest.raises(PairsError, match="none of the 3 pairs .* is usable; the first: teacher 'moody' gave no finite embedding"):
        reinforce(config(tmp_path / "pairs", tmp_path / "store", workers=0, teachers=(MOODY,), augment=PLAIN))
    with pytest.raises(StoreError, match="finite: False"):
        reinforce(config(tmp_path / "pairs", tmp_path / "other", workers=0, teachers=("tests.distill.tiny_teachers:broken",)))


# ---------------------------------------------------------------- a disk that fills up

PROGRAM = """
import os, resource, sys
from runtime.errors import ClipError
from distill.reinforce import main
if sys.argv[1] != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
try:
    sys.exit(main(sys.argv[2:]))
except ClipError as error:
    sys.exit(f"error: {error}")
"""


def command(limit: int, pairs: Path, store: Path, *more: str) -> subprocess.CompletedProcess[str]:
    arguments = [str(limit), str(pairs), str(store), "--teachers", RED, BLUE, "--part-rows", "4", "--workers", "0", *more]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def whole(tmp_path: Path, pairs: Path) -> dict[str, str]:
    assert command(0, pairs, tmp_path / "whole", "--augmentations", "60").returncode == 0
    return part_hashes(tmp_path / "whole")


def test_a_disk_that_fills_up_loses_nothing(tmp_path: Path) -> None:
    """The limit on a file's size stands for the disk: any part of the store is larger, its settings are not."""
    pairs = make_pairs(tmp_path / "pairs", (9, 5))
    expected, store = whole(tmp_path, pairs), tmp_path / "store"
    smallest = min(path.stat().st_size for path in (tmp_path / "whole").glob("*.safetensors"))
    done = command(smallest - 1, pairs, store, "--augmentations", "60")
    assert done.returncode == 1
    assert "cannot be written to" in done.stderr
    assert "nothing stored is lost: make room" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not list(store.glob("*.safetensors"))
    assert not list(store.glob(".*part"))
    assert command(0, pairs, store, "--augmentations", "60").returncode == 0
    assert part_hashes(store) == expected
    before = {path.name: path.read_bytes() for path in store.iterdir() if path.is_file()}
    assert command(2000, pairs, store, "--add-augmentations", "60").returncode == 1
    assert {name: (store / name).read_bytes() for name in before} == before
    assert len(open_store(store, verify=True)) == 14
    assert command(0, pairs, store, "--add-augmentations", "60").returncode == 0
    assert open_store(store, verify=True).n_augmentations.tolist() == [120] * 14


def test_a_small_file_system_that_fills_up(tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path / "pairs", (9, 5))
    disk = _folder(tmp_path / "disk")
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        expected = whole(tmp_path, pairs)
        done = command(0, pairs, disk / "store", "--augmentations", "60")
        assert done.returncode == 1
        assert "No space left on device" in done.stderr
        assert not (disk / "store/index.json").exists()
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert command(0, pairs, disk / "store", "--augmentations", "60").returncode == 0
        assert part_hashes(disk / "store") == expected
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path
