"""The report on devices, modes and comparisons: every point and verdict is there, hollow where accuracy is not known, and nothing breaks on foreign lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gather import Material
from benchmarks.measure import summarise
from benchmarks.ratios import compare
from benchmarks.report import write_report
from benchmarks.report_devices import accuracy_of, comparisons, devices, points
from benchmarks.results import Line, append_results, line
from tests.benchmarks.test_report import Page

ENVIRONMENT = {"processor": {"model": "Cortex <A78>", "governor": "schedutil"}, "packages": {"onnxruntime": "1.32.0"}}


def timed(artefact: str, milliseconds: float, *, cosine: float | None = 0.99999, device: dict[str, Any] | None = None, kind: str = "latency", **settings: Any) -> Line:
    samples = (milliseconds * 1e6 * (1 + 0.02 * np.random.default_rng(0).random(200))).astype(np.int64)
    figures: dict[str, Any] = {"accuracy": {"cosine_min": cosine}} if cosine is not None else {"accuracy": None}
    figures |= settings.pop("figures", {})
    summary = summarise(samples).as_dict() if kind == "latency" else {"mean": milliseconds * 1e6, "n": 50}
    return line(
        kind, "image_tower", bundle={"name": "b", "sha256": "00"}, artefact=artefact, settings={"threads": 1, "batch": 1, **settings}, figures=figures, device=device,
        samples=samples.tolist() if kind == "latency" else None, summary=summary, environment=ENVIRONMENT,
    )  # fmt: skip


def compared(scale: float, **more: Any) -> Line:
    rng = np.random.default_rng(1)
    first, second = ((5e6 * factor * np.exp(0.02 * rng.standard_normal(200))).astype(np.int64) for factor in (1.0, scale))
    figures = {"candidate": f"new {scale}", "reference": "old", **compare(first, second, resamples=300).as_dict(), "sentence": "", **more}
    return line("comparison", "image_tower", bundle={"name": "b", "sha256": "00"}, artefact=f"x{scale}", settings={"threads": 1}, figures=figures)


def test_a_point_without_accuracy_is_hollow() -> None:
    drawn = points(Material(lines=[timed("known", 5), timed("also known", 9, cosine=0.97), timed("unknown", 3, cosine=None)]))
    filled = drawn.count('fill="var(--k3)"')
    hollow = drawn.count('stroke="var(--k1)"')
    assert (filled, hollow) == (2, 1)
    assert "hollow: accuracy not measured" in drawn
    assert accuracy_of(timed("x", 5, cosine=None, figures={"golden_cosine_min": 0.5})) == 0.5
    assert accuracy_of(timed("x", 5, cosine=None)) is None
    assert points(Material(lines=[timed("alone", 5)])) == ""


def test_devices_modes_and_summaries_have_rows() -> None:
    board = {"kind": "ssh", "label": "the <board>", "cores": [0], "board": {"model": "Orin", "power_mode": "15W", "temperatures_c": {"cpu": 48.2}}}
    operation = {"op": "Conv", "nodes": 3, "us": 900.0, "share": 0.9}
    lines = [
        timed("a", 5, device=board),
        timed("b", 7, kind="latency_summary", device={"kind": "imported", "label": "phone"}, tool="benchmark_model"),
        timed("a", 6, mode="sustained", figures={"last_over_first_tenth": 1.21, "energy": {"joules_per_1000": None, "reason": "no counter"}}),
        timed("a", 8, mode="burst", figures={"first_over_later": 2.5}),
        timed("a", 8, mode="duty", figures={"period_seconds": 1.0}),
        timed("a", 30, mode="offline", batch=8, figures={"per_second": 266.0}),
        line("load", "load_cold", bundle=None, artefact="a", samples=[10**8], summary={"p50": 1e8}),
        line("profile", "image_tower", bundle=None, artefact="a", figures={"operations": [operation], "placement": {"CPUExecutionProvider": 1.0}}),
    ]
    page = Page(f"<main>{devices(Material(lines=lines))}</main>").text
    told = ("the <board>: a", "Orin; governor schedutil; power mode 15W; cores [0]", "7.00 (mean)", "none kept")
    for said in (*told, "last tenth takes 1.21", "no counter", "266.0 a second", "Conv", "every 1 s"):
        assert said in page, said
    assert devices(Material(lines=[timed("a", 5)])) == ""


def test_comparisons_say_how_they_were_made() -> None:
    html = comparisons(Material(lines=[compared(1.0), compared(1.2), compared(0.8, paired=False, comparable=False, differences=["processor A and B"])]))
    page = Page(f"<main>{html}</main>").text
    for said in ("side by side", "not comparable", "slower", "faster", "no significant difference", "processor A and B"):
        assert said in page, said
    assert html.count("<svg") == 1


def test_the_whole_page_holds_them(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    append_results(out, [timed("a", 5), timed("b", 6), timed("a", 9, device={"kind": "ssh", "label": "board"}), compared(1.1)])
    made = write_report([out], tmp_path / "report.html")
    assert {"latency", "devices", "comparisons"} <= set(made["sections"])  # type: ignore[call-overload]
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "board: a" in page.text
    assert not [tag for tag, attributes in page.tags if tag in ("script", "link") and attributes.get("src")]
