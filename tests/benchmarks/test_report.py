"""The report: self-contained, complete, escaped, accessible, and graceful about what is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks import charts, markup
from benchmarks.report import main, write_report
from benchmarks.results import ResultsError, append_results, line

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Checks nesting while it collects what the tests look at."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "text"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def html(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report([], path, run_folder)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_every_section_is_there(page: Page) -> None:
    assert [section["id"] for section in page.all("section")] == [
        "pictures", "retrieval", "accuracy", "training", "cost", "latency", "devices", "comparisons", "parity", "time", "method", "unmeasured",
    ]  # fmt: skip
    linked = [a["href"] for a in page.all("a") if str(a.get("href")).startswith("#")]
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert {str(href)[1:] for href in linked} <= ids
    named = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(named) == len(set(named))
    for words in ("wrong caption", "bare tag", "held out", "found at place 1", "not among the five", "Example CPU 3000", "text-onnx-int8", "slower than fp32"):
        assert words in page.text


def test_nothing_is_fetched(html: str, page: Page) -> None:
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), value
    assert not re.search(r"url\((?!#)|@import|<script|<iframe|<object", html)
    outside = set(re.findall(r"https?://[^\s\"'<>]+", html)) - {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not outside
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv"))
    assert "default-src 'none'" in str(policy)


def test_accessible(page: Page) -> None:
    assert page.all("html")[0]["lang"] == "en"
    assert all(image.get("alt") for image in page.all("img"))
    drawings = page.all("svg")
    assert len(drawings) >= 8
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in drawings)
    assert all(th.get("scope") in ("row", "col") for th in page.all("th"))
    assert len(page.all("table")) == len(page.all("caption"))
    assert len(page.all("h1")) == 1
    # right and wrong are told by more than colour
    assert "✓ 1" in page.text
    assert "✗ 2" in page.text


def test_light_and_dark_and_narrow(html: str) -> None:
    assert "prefers-color-scheme:dark" in html
    assert "max-width:560px" in html
    assert 'name="viewport"' in html
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    colours = set(re.findall(r'(?:fill|stroke)="([^"]+)"', drawn))
    assert all(colour in ("none", "currentColor", "transparent") or colour.startswith("var(--") for colour in colours), colours
    declared = set(re.findall(r"(--[a-z0-9-]+):", html))
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", html)) <= declared


def test_small_enough_to_mail(html: str) -> None:
    assert len(html.encode()) < 2_000_000


def test_hostile_texts_are_shown_not_run(run_folder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_folder, tmp_path / "run"))
    evil = '<script>alert(1)</script>"><img src=x onerror=alert(2)>&amp;'
    tables = json.loads((run / "tables.json").read_text(encoding="utf-8"))
    tables["title"] = evil
    tables["headline"][evil] = evil
    tables["timings"][evil] = 3
    for row in tables["rows"]:
        row["model"] = evil + row["model"]
    for example in tables["examples"]:
        example["query"] = example["split"] = evil
        example["results"][0]["key"] = evil
    tables["zero_shot"][0]["model"] = evil
    (run / "tables.json").write_text(json.dumps(tables), encoding="utf-8")
    manifest = json.loads((run / "bundle/manifest.json").read_text(encoding="utf-8"))
    manifest["name"] = evil
    manifest["artefacts"][0]["id"] = manifest["artefacts"][0]["reason"] = evil
    (run / "bundle/manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (run / "pairs/CREDITS.md").write_text(evil, encoding="utf-8")
    append_results(run / "results.jsonl", [line("not_measured", evil, bundle=None, artefact=evil, figures={"reason": evil})])
    write_report([], tmp_path / "r.html", run)
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert not page.all("script")
    assert not [1 for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert "<script>alert(1)</script>" in page.text


def test_captions_of_pictures_are_escaped(run_folder: Path, html: str) -> None:
    assert markup.text("<b>\"'&") == "&lt;b&gt;&quot;&#x27;&amp;"


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("tables.json", "Accuracy tables (tables.json) are not in the run"),
        ("ckpt", "no training metrics"),
        ("bundle", "no bundle in the run"),
        ("pairs", "pairs of the run are not there"),
        ("results.jsonl", "No latency was measured"),
    ],
)
def test_a_missing_part_is_a_sentence(run_folder: Path, tmp_path: Path, part: str, words: str) -> None:
    run = Path(shutil.copytree(run_folder, tmp_path / "run"))
    path = run / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    made = write_report([], tmp_path / "r.html", run)
    assert any(words in str(sentence) for sentence in made["missing"])  # type: ignore[attr-defined]
    assert words in Page((tmp_path / "r.html").read_text(encoding="utf-8")).text


def test_results_alone_make_a_report(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "deep" / "r.html"
    assert main([str(run_folder / "results.jsonl"), "-o", str(output), "--title", "Only times", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["sections"] == ["latency", "devices", "comparisons", "method", "unmeasured"]
    assert "Only times" in Page(output.read_text(encoding="utf-8")).text
    assert os.listdir(output.parent) == ["r.html"]
    assert main([str(run_folder / "results.jsonl"), "--run", str(run_folder), "-o", str(output)]) == 0
    assert "12 sections" in capsys.readouterr().out


def test_training_curves(page: Page) -> None:
    names = [str(svg["aria-label"]) for svg in page.all("svg")]
    assert any(name.startswith("Validation recall at 5") for name in names)
    assert any("Training loss of student" in name and "248,320 samples" in name for name in names)
    assert "before it, the text tower alone on texts" in page.text


def test_a_killed_trainings_torn_line_is_left_out(run_folder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_folder, tmp_path / "run"))
    with (run / "ckpt/student/metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 9999, "sam')
    write_report([], tmp_path / "r.html", run)
    assert "248,320 samples" in Page((tmp_path / "r.html").read_text(encoding="utf-8")).text


def test_bad_input_leaves_the_old_page(run_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "r.html"
    output.write_text("the old page", encoding="utf-8")
    with pytest.raises(ResultsError, match="nothing to report on"):
        write_report([], output)
    with pytest.raises(ResultsError, match="no results file"):
        write_report([tmp_path / "none.jsonl"], output)
    with pytest.raises(ResultsError, match="run folder none does not exist"):
        write_report([], output, tmp_path / "none")
    run = Path(shutil.copytree(run_folder, tmp_path / "run"))
    for text in ("[1]", '{"rows": ', "\x00"):
        (run / "tables.json").write_text(text, encoding="utf-8")
        with pytest.raises(ResultsError, match=r"tables\.json"):
            write_report([], output, run)
    assert output.read_text(encoding="utf-8") == "the old page"


def test_numbers_as_people_read_them() -> None:
    assert [markup.number(value) for value in (0.4204, 1.926, 118.0, 1234.5, 0.0, None, float("nan"))] == ["0.420", "1.93", "118", "1,234", "0", "–", "–"]
    assert [markup.cosine(value) for value in (0.999997, 0.9987, None)] == ["0.999997", "0.9987", "–"]
    assert [markup.seconds(value) for value in (0.414, 41.2, 412, 4120)] == ["0.41 s", "41 s", "6 min 52 s", "1 h 8 min"]
    assert "0.27 to 0.31" in markup.recall({"value": 0.29, "low": 0.27, "high": 0.31})
    assert "no answer" in markup.recall(None)


def test_labels_cover_neither_each_other_nor_the_points() -> None:
    points = [(100.0 + 4 * n, 100.0 + n, f"a model called {n}") for n in range(8)]
    boxes = []
    for label in charts.place_labels(points, 380, 260):
        wide = 0.56 * charts.LABEL * len(label["text"])
        boxes.append((label["x"], label["y"] - 6, label["x"] + wide, label["y"] + 6))
    for index, first in enumerate(boxes):
        assert first[0] >= 0
        assert not any(first[0] < other[2] and other[0] < first[2] and first[1] < other[3] and other[1] < first[3] for other in boxes[index + 1 :])
        assert not any(first[0] < x < first[2] and first[1] < y < first[3] for x, y, _ in points)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser on this machine; apt-get install chromium to look at the page in one")
def test_a_browser_shows_it(run_folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    write_report([], tmp_path / "r.html", run_folder)
    quiet = ["--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run", "--disable-component-update", "--hide-scrollbars"]
    command = ["chromium", "--headless", "--no-sandbox", *quiet, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,900"]
    subprocess.run([*command, f"--screenshot={tmp_path / 'r.png'}", (tmp_path / "r.html").as_uri()], capture_output=True, timeout=120, check=True)
    with Image.open(tmp_path / "r.png") as shown:
        assert shown.size == (1000, 900)
        assert len(shown.convert("RGB").getcolors(2**20) or []) > 300  # drawn, not blank
