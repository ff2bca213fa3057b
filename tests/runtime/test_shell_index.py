"""`mclip index`, `mclip search --index` and `mclip adapt`: what they print, write, open and exit with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import webbrowser
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mobileclip.cli import main
from runtime import shell, shell_index
from runtime.errors import SearchError, shown
from runtime.index_page import contact_sheet, file_url
from runtime.pairs import write_shard
from tests.runtime import toy
from tests.runtime.test_evaluation import facts, sample

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for n, colour in enumerate(toy.COLOURS):
        toy.picture(colour, n).save(folder / "deep" / f"{colour}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8")
    return folder


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setenv("MCLIP_PROGRESS", "0")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)

    def run(verb: Callable[[list[str]], int], *argv: object) -> tuple[int, str, str]:
        code = verb([str(value) for value in argv])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


def test_index_and_search(call: Callable[..., Any], toy_bundle: Path, photos: Path, tmp_path: Path) -> None:
    place = tmp_path / "photos.idx"
    code, out, err = call(shell_index.index, photos, "--out", place, "--bundle", toy_bundle)
    assert code == 0
    assert out.splitlines()[0].startswith("4 embedded (")
    assert re.search(r"photos.idx: 4 files, 4 different pictures; 0\.\d\d MB of vectors$", out.strip())
    assert "1 pictures are not usable" in err
    assert "broken.jpg: " in err
    code, out, err = call(shell_index.index, photos, "--out", place, "--bundle", toy_bundle, "--verify")
    assert "every byte matches" in out
    code, out, err = call(shell.search, "green", "--index", place, "--bundle", toy_bundle, "-k", 2)
    assert (code, err) == (0, "")
    assert [line.split()[1].endswith("green.png") for line in out.splitlines()] == [True, False]
    found = json.loads(call(shell.search, "--image", photos / "deep" / "blue.png", "--index", place, "--bundle", toy_bundle, "--json")[1])
    assert Path(found["results"][0]["path"]).name == "blue.png"
    assert found["results"][0]["score"] == pytest.approx(1, abs=1e-2)
    assert found["searched"] == 4
    code, out, err = call(shell.search, "red", "--index", place, "--bundle", toy_bundle, "--since", "2100")
    assert (code, out) == (0, "")
    assert "no picture found: " in err
    found = json.loads(call(shell_index.index, "--forget", photos, "--out", place, "--json")[1])
    assert (found["forgotten"], found["files"]) == (5, 0)


def test_settings_and_their_sizes(call: Callable[..., Any], toy_bundle: Path, photos: Path, tmp_path: Path) -> None:
    place = tmp_path / "i"
    code, out, _ = call(shell_index.index, photos, "--out", place, "--bundle", toy_bundle, "--dtype", "int8", "--dims", 8, "--rescore", "float16", "--json")
    found = json.loads(out)
    assert (found["dtype"], found["dims"], found["rescore"], found["added"]) == ("int8", 8, "float16", 4)
    assert found["rescoring_bytes"] > 0
    assert found["failed"][0]["path"].endswith("broken.jpg")
    assert "MB of rescoring vectors" in call(shell_index.index, photos, "--out", place, "--bundle", toy_bundle)[1]
    with pytest.raises(SearchError, match="made with dtype int8, not binary"):
        call(shell_index.index, photos, "--out", place, "--bundle", toy_bundle, "--dtype", "binary")


def test_wrong_use(call: Callable[..., Any], toy_bundle: Path, photos: Path, tmp_path: Path) -> None:
    place = tmp_path / "i"
    for verb, argv, message in (
        (shell.search, ("red", "--index", place, "--bundle", toy_bundle), "no photo index"),
        (shell_index.index, (tmp_path / "none", "--out", place, "--bundle", toy_bundle), "does not exist"),
        (shell_index.index, ("--verify", "--out", place), "no photo index"),
    ):
        with pytest.raises(SearchError, match=message):
            call(verb, *argv)
        assert not place.exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(SearchError, match="no picture was found"):
        call(shell_index.index, tmp_path / "empty", "--out", place, "--bundle", toy_bundle)
    for query in ("", "   "):
        with pytest.raises(SearchError, match="query is empty"):
            call(shell.search, query, "--index", place, "--bundle", toy_bundle)
    for argv in (("--index", place), ("--since", "2020", "red"), (), ("red", "--index", place, "--weight", "2")):
        with pytest.raises(SystemExit) as stopped:
            call(shell.search, *argv, "--bundle", toy_bundle)
        assert stopped.value.code == 2
    assert call(shell.search, "red " * 2500, "--index", place, "--bundle", toy_bundle)[0] == 0


def test_duplicates(call: Callable[..., Any], toy_bundle: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "twin.png").write_bytes((photos / "deep" / "red.png").read_bytes())
    call(shell_index.index, photos, "--out", tmp_path / "i", "--bundle", toy_bundle)
    code, out, err = call(shell.search, "--duplicates", "0.999", "--index", tmp_path / "i")
    assert [Path(line).name for line in out.split()] == ["red.png", "twin.png"]
    assert err.startswith("1 groups, 1 files more")
    assert json.loads(call(shell.search, "--duplicates", "--index", tmp_path / "i", "--json")[1])["threshold"] == 0.95


def test_a_name_that_is_no_text_survives(toy_bundle: Path, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/p"
    os.mkdir(folder)
    odd = folder + b"/\xff\x1b[31m.png"
    toy.picture("red").save(tmp_path / "x.png")
    os.rename(tmp_path / "x.png", odd)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MCLIP_PROGRESS": "0", "LC_ALL": "C.UTF-8"}
    command = [sys.executable, "-m", "mobileclip.cli"]
    for argv in ([b"index", folder, b"--out", tmp_path / "i"], [b"search", b"red", b"--index", tmp_path / "i"], [b"search", b"red", b"--json", b"--index", tmp_path / "i"]):
        done = subprocess.run([*command, *argv, "--bundle", toy_bundle], capture_output=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
    assert os.fsencode(json.loads(done.stdout)["results"][0]["path"]) == odd
    done = subprocess.run([*command, "search", "red", "--index", tmp_path / "i", "--bundle", toy_bundle], capture_output=True, env=environment, timeout=120)
    assert b"\xff\\x1b[31m.png\n" in done.stdout  # its bytes, but nothing that a terminal obeys
    assert b"\x1b" not in done.stdout


class Seen(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page(call: Callable[..., Any], toy_bundle: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = photos / "<img src=x onerror=alert(1)>&\"'.png"
    toy.picture("red", 9, (900, 700)).save(evil)
    call(shell_index.index, photos, "--out", tmp_path / "i", "--bundle", toy_bundle)
    (photos / "deep" / "white.png").unlink()  # gone since: keeps its place without a picture
    page = tmp_path / "page.html"
    code, out, err = call(shell.search, "red <script>", "--index", tmp_path / "i", "--bundle", toy_bundle, "--html", page, "--open")
    assert (code, err) == (0, f"the page is {page}\n")  # no display here
    text = page.read_text(encoding="utf-8")
    seen = Seen(text)
    assert "prefers-color-scheme:dark" in text
    assert not [tag for tag, _ in seen.tags if tag in ("script", "link", "iframe")]
    pictures = [attributes for tag, attributes in seen.tags if tag == "img"]
    assert len(pictures) == 4
    assert all(str(attributes["src"]).startswith("data:image/jpeg;base64,") and "onerror" not in attributes for attributes in pictures)
    assert [attributes["href"] for tag, attributes in seen.tags if tag == "a"][0] in (file_url(str(evil)), file_url(str(photos / "deep" / "red.png")))
    assert "<img src=x onerror=alert(1)>&\"'.png" in seen.words
    assert "red <script>" in seen.words
    assert "no picture" in seen.words
    assert len(text) < 100_000
    opened: list[str] = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or True)
    code, _, err = call(shell.search, "red", "--index", tmp_path / "i", "--bundle", toy_bundle, "--open")
    assert err == ""
    assert opened[0].startswith("file://")
    Path(opened[0].removeprefix("file://")).unlink()


def test_odd_names_on_the_page() -> None:
    name = os.fsdecode(b"/p/\xff\n100%.jpg")
    assert file_url(name) == "file:///p/%FF%0A100%25.jpg"
    assert shown(name) == "/p/\\xff\\n100%.jpg"
    contact_sheet(name, name, [(name, 0.5, "2020-01-01T00:00:00")]).encode("utf-8")


def test_adapt(call: Callable[..., Any], toy_bundle: Path, tmp_path: Path) -> None:
    from tests.runtime.test_index_adapter import WORDS

    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"{text} {n}" for n in range(3) for text in WORDS))
    import shutil
    from dataclasses import replace

    from runtime.manifest import read_manifest, write_manifest

    shutil.copytree(toy_bundle, tmp_path / "new")
    write_manifest(tmp_path / "new", replace(read_manifest(tmp_path / "new"), provenance={"checkpoint_sha256": "4" * 64}))
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    write_shard(pairs / "0.tar", [sample(f"k{n}-{colour}", colour, f"{colour} {n}", facts(colour, "g")) for n in range(40) for colour in ("red", "green", "blue")])
    code, out, err = call(shell_index.adapt, toy_bundle, tmp_path / "new", "--texts", texts, "--out", tmp_path / "a.safetensors")
    assert (code, err) == (0, "")
    assert "old queries, old gallery" in out
    assert (tmp_path / "a.safetensors").stat().st_size < 1_000_000
    code, out, _ = call(shell_index.adapt, toy_bundle, tmp_path / "new", "--pairs", pairs, "--check", pairs, "--pictures", "--json", "--out", tmp_path / "b.safetensors")
    found = json.loads(out)
    assert code == 0
    assert (found["pairs"], found["ok"], found["n"]) == (120, True, 120)
    folder = tmp_path / "photos"
    folder.mkdir()
    for n, colour in enumerate(toy.COLOURS):
        toy.picture(colour, n).save(folder / f"{colour}.png")
    call(shell_index.index, folder, "--out", tmp_path / "i", "--bundle", toy_bundle)
    new = ("--index", tmp_path / "i", "--bundle", tmp_path / "new")
    with pytest.raises(SearchError, match="mclip adapt"):
        call(shell.search, "red", *new)
    assert call(shell.search, "red", *new, "--adapter", tmp_path / "a.safetensors", "-k", 1)[1].strip().endswith("red.png")
    assert call(shell.search, "--image", folder / "blue.png", *new, "--adapter", tmp_path / "b.safetensors", "-k", 1)[1].strip().endswith("blue.png")
    assert call(shell.search, "red", *new, "--same-space", "-k", 1)[1].strip().endswith("red.png")
    with pytest.raises(SystemExit):
        call(shell_index.adapt, toy_bundle, tmp_path / "new", "--out", tmp_path / "c")


def test_errors_end_in_one_sentence(call: Callable[..., Any], tmp_path: Path, toy_bundle: Path) -> None:
    code, out, err = call(main, "search", "red", "--index", tmp_path / "none", "--bundle", toy_bundle)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_search_in_a_small_index_imports_little(toy_bundle: Path, photos: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
    call(shell_index.index, photos, "--out", tmp_path / "i", "--bundle", toy_bundle)
    code = (
        "import sys, json; from mobileclip.cli import main\n"
        f"assert main(['search', 'red', '--index', {str(tmp_path / 'i')!r}, '--bundle', {str(toy_bundle)!r}]) == 0\n"
        "sys.stderr.write(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, env={**os.environ, "MCLIP_PROGRESS": "0"})
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stderr.splitlines()[-1]))
    assert "sqlite3" in loaded
    assert not loaded & {"torch", "webbrowser", "usearch", "html", "multiprocessing", "tyro", "rich"}
