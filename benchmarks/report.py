"""`mclip report`: one self-contained HTML page from results files and a demo run folder."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime
from pathlib import Path

from runtime.files import write_whole

from . import markup, report_devices, report_efficiency, report_figures, report_front, report_method, report_pictures
from .gather import Material, gather
from .page import page
from .results import ResultsError


def write_report(
    results: list[Path], output: Path, run: Path | None = None, title: str | None = None, efficiency: Path | None = None, front: Path | None = None
) -> dict[str, object]:
    """Write the page and return {"report", "bytes", "sections", "missing"}.

    Args:
        results: results files; each must exist. With none, the run's own results.jsonl is used when it is there.
        output: the HTML file; it is replaced only when the new page is complete.
        run: a demo run folder; every part of it may be absent, the page then says so.
        title: overrides the run's title.
        efficiency: folder of the learning-efficiency experiment (its summary.json).
        front: a compressed checkpoint (its front.json), or that file.

    Raises:
        ResultsError: nothing to report on, or a file that cannot be read.
        MissingExtraError: the charts' packages are not installed.
    """
    if not results and run is not None and (run / "results.jsonl").is_file():
        results = [run / "results.jsonl"]
    if not results and run is None and efficiency is None and front is None:
        raise ResultsError("there is nothing to report on; name results files, or a run folder with --run")
    try:
        material = gather(results, run, efficiency=efficiency, front=front)
        html, names = render(material, title)
    except (TypeError, KeyError, AttributeError, ValueError, IndexError) as error:  # members that are allowed to be anything were something else
        what = f"{type(error).__name__}: {error}"
        raise ResultsError(f"the results hold something that the report cannot show ({what}); measure again, or use the version that wrote them") from error
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, html.encode())
    return {"report": output.name, "bytes": len(html.encode()), "sections": names, "missing": material.missing}


def render(material: Material, title: str | None = None) -> tuple[str, list[str]]:
    """The page and the names of the sections that it has."""
    built = [
        ("pictures", "The data", report_pictures.samples(material)),
        ("retrieval", "Retrieval in pictures", report_pictures.retrieval(material)),
        ("accuracy", "Accuracy", report_figures.accuracy(material)),
        ("training", "Training", report_pictures.training(material)),
        ("efficiency", "What each sample buys", report_efficiency.efficiency(material)),
        ("front", "What compression costs", report_front.front(material)),
        ("cost", "Accuracy against cost", report_figures.cost(material)),
        ("latency", "Latency", report_figures.latency(material)),
        ("devices", "Devices and modes", report_devices.points(material) + report_devices.devices(material)),
        ("comparisons", "Comparisons", report_devices.comparisons(material)),
        ("parity", "Parity", report_figures.parity(material)),
        ("time", "Time of the run", report_method.timings(material)),
        ("method", "How it was measured", report_method.method(material)),
        ("unmeasured", "What was not measured here", report_method.unmeasured(material)),
    ]
    sections = [section for section in built if section[2]]
    found = report_pictures.headline(material)
    name = title or str(material.tables.get("title") or "") or "Results"
    html = page(
        title=markup.text(name),
        lead=_lead(material),
        tiles=report_pictures.tiles(found) + report_pictures.figures(found),
        sections=sections,
        footer=_footer(material),
    )
    return html, [section[0] for section in sections]


def _lead(material: Material) -> str:
    parts = []
    if material.tables:
        parts.append("Distilled, compressed, exported, proven and timed on one machine.")
    created = str(material.tables.get("created") or (material.lines[-1]["created"] if material.lines else ""))
    if created:
        try:
            day = datetime.fromisoformat(created.replace("Z", "+00:00"))
            parts.append(f"Made on {day.day} {day:%B %Y}.")
        except ValueError:
            parts.append(f"Made {created}.")
    return markup.text(" ".join(parts))


def _footer(material: Material) -> str:
    parts = []
    if material.credits:
        parts.append(f"<details><summary>Credits and licences of the pictures</summary><pre>{markup.text(material.credits)}</pre></details>")
    licences = sorted({str(licence) for manifest in material.manifests.values() for licence in manifest.get("licences", [])})
    if licences:
        parts.append(f"<p>Licences of the bundles: {markup.text('; '.join(licences))}</p>")
    parts.append("<p>Written by <code>mclip report</code>. This page is whole: it loads nothing from anywhere.</p>")
    return "".join(parts)


def main(argv: list[str]) -> int:
    """Command line of `mclip report`."""
    parser = argparse.ArgumentParser(prog="mclip report", description="Write one self-contained HTML page from measured results.")
    parser.add_argument("results", nargs="*", type=Path, help="results files (JSON lines) of mclip bench; default: RUN/results.jsonl")
    parser.add_argument("--run", type=Path, help="a demo run folder (tables, pictures, training curves, bundle)")
    parser.add_argument("--efficiency", type=Path, help="folder of the learning-efficiency experiment (make efficiency)")
    parser.add_argument("--front", type=Path, help="a compressed checkpoint with front.json (mclip compress --front)")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="the page to write (default: report.html)")
    parser.add_argument("--title", help="the page's heading")
    parser.add_argument("--json", action="store_true", help="print one JSON object about the page")
    options = parser.parse_args(argv)
    made = write_report(options.results, options.output, options.run, options.title, options.efficiency, options.front)
    if options.json:
        sys.stdout.write(json.dumps(made) + "\n")
    else:
        sys.stdout.write(f"{options.output}: {int(str(made['bytes'])) / 1e3:,.0f} kB, {len(list(made['sections']))} sections\n")  # type: ignore[call-overload]
        for sentence in material_notes(made):
            sys.stdout.write(f"  note: {sentence}\n")
    return 0


def material_notes(made: dict[str, object]) -> list[str]:
    """The sentences about what is missing."""
    return [str(sentence) for sentence in made["missing"]]  # type: ignore[attr-defined]
