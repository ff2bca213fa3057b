"""What the report shows, collected from results files and a demo run folder; what is absent becomes a sentence, not an error."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from runtime.errors import PairsError
from runtime.pairs import Pairs, open_pairs

from .results import Line, ResultsError, newest, read_results

logger = logging.getLogger(__name__)
THUMBNAIL = 96


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One inlined picture. `noise` is none, swapped or generic; `missing` pictures have an empty uri."""

    key: str
    uri: str
    caption: str
    style: str = ""
    noise: str = "none"
    held_out: bool = False


@dataclass(kw_only=True, slots=True)
class Material:
    """All that the page is made of."""

    tables: dict[str, Any] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)
    train_samples: list[Picture] = field(default_factory=list)
    test_samples: list[Picture] = field(default_factory=list)
    pictures: dict[str, Picture] = field(default_factory=dict)
    noise_share: dict[str, float] = field(default_factory=dict)
    efficiency: dict[str, Any] = field(default_factory=dict)
    """summary.json of the learning-efficiency experiment."""
    front: dict[str, Any] = field(default_factory=dict)
    """front.json of a compression."""
    credits: str = ""
    missing: list[str] = field(default_factory=list)


def gather(results: Sequence[Path], run: Path | None, samples: int = 18, efficiency: Path | None = None, front: Path | None = None) -> Material:
    """Read the results files (each must exist) and, where given, the run folder (each part may be absent)."""
    material = Material(lines=newest(read_results(results)))
    if efficiency is not None:
        material.efficiency = _json(efficiency / "summary.json", "The learning-efficiency experiment", material.missing)
    if front is not None:
        material.front = _json(front / "front.json" if front.is_dir() else front, "The front of compression (mclip compress --front)", material.missing)
    if not results and run is None and (efficiency is not None or front is not None):
        return material
    if not any(row["kind"] == "latency" for row in material.lines):
        material.missing.append("No latency was measured: no such results line was given.")
    if run is None:
        material.tables = {"rows": accuracy_rows(material.lines)}
        material.missing.append("No run folder was given, so training curves, pictures and parity are left out.")
        return material
    if not run.is_dir():
        raise ResultsError(f"the run folder {run.name} does not exist; make one with: mclip demo --out {run.name}, or leave --run out")
    material.tables = _json(run / "tables.json", "Accuracy tables", material.missing) or {"rows": accuracy_rows(material.lines)}
    _curves(run, material)
    for path in sorted(run.glob("*/manifest.json")):
        material.manifests[path.parent.name] = _json(path, "A bundle's manifest", material.missing)
    if not material.manifests:
        material.missing.append("There is no bundle in the run, so parity is left out.")
    _pictures(run, material, samples)
    return material


def accuracy_rows(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Rows of tables.json made from `accuracy` lines, for results without a demo run."""
    rows = []
    for found in lines:
        if found["kind"] != "accuracy":
            continue
        figures, bundle = found["figures"], (found["bundle"] or {}).get("name", "")
        for direction in ("text_to_image", "image_to_text"):
            for split, row in figures[direction].items():
                common = {"model": f"{bundle}: {found['artefact']}", "kind": "artefact", "split": split, "direction": direction, "gallery": figures["gallery"]["count"]}
                rows.append({**common, **row})
    return rows


def _curves(run: Path, material: Material) -> None:
    for path in sorted(run.glob("ckpt/*/metrics.jsonl")):
        rows = []
        for row in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found = json.loads(row)
            except (ValueError, RecursionError):  # the last line of a run that was killed
                continue
            if isinstance(found, dict) and isinstance(found.get("samples"), int | float) and isinstance(found.get("loss"), int | float):
                rows.append(found)
        if rows:
            material.curves[path.parent.name] = sorted(rows, key=lambda row: row["samples"])
    if not material.curves:
        material.missing.append("There are no training metrics in the run, so the training curves are left out.")


def _pictures(run: Path, material: Material, samples: int) -> None:
    train, test = _open(run / "pairs" / "train"), _open(run / "pairs" / "test")
    if train is None or test is None:
        material.missing.append("The pairs of the run are not there, so sample pictures and retrieval pictures are left out.")
    if train is not None:
        _train_samples(train, material, samples)
    if test is not None:
        wanted = {example.get("target_key") for example in material.tables.get("examples", [])}
        wanted |= {result.get("key") for example in material.tables.get("examples", []) for result in example.get("results", [])}
        rows = {key: row for row, key in enumerate(test.keys)}
        for key in sorted(filter(None, wanted)):
            if key in rows:
                material.pictures[key] = _picture(test, rows[key])
        # steps of the golden ratio are spread evenly without following the order in which concepts come
        chosen = dict.fromkeys(int(len(test) * ((index + 1) * 0.6180339887 % 1)) for index in range(samples // 2))
        material.test_samples = [_picture(test, row) for row in chosen]
    for name in ("CREDITS.md", "sample.json"):
        path = run / "pairs" / name
        if path.is_file() and name == "CREDITS.md":
            material.credits = path.read_text(encoding="utf-8", errors="replace")[:6000]


def _train_samples(train: Pairs, material: Material, samples: int) -> None:
    """Right, swapped and generic captions in the share that they have, spread over the styles."""
    kinds: dict[str, list[int]] = {}
    for row in range(len(train)):
        kinds.setdefault(str(train.meta(row).get("noise", "none")), []).append(row)
    material.noise_share = {name: len(rows) / len(train) for name, rows in kinds.items()}
    chosen: list[int] = []
    for name, rows in sorted(kinds.items()):
        count = max(1, round(samples * material.noise_share[name]))
        chosen += list(dict.fromkeys(rows[int(len(rows) * ((index + 1) * 0.6180339887 % 1))] for index in range(min(count, len(rows)))))
    # a fixed stride through the choice mixes right and wrong captions without a random order
    order = sorted(range(len(chosen)), key=lambda index: (index * 7) % max(1, len(chosen)))
    material.train_samples = [_picture(train, chosen[index]) for index in order][:samples]


def _open(folder: Path) -> Pairs | None:
    try:
        return open_pairs(folder)
    except PairsError as error:
        logger.info("left out: %s", error)
        return None


def _picture(pairs: Pairs, row: int) -> Picture:
    meta = pairs.meta(row)
    try:
        uri = data_uri(pairs.image(row))
    except PairsError as error:
        logger.warning("a picture is left out: %s", error)
        uri = ""
    caption = pairs.caption(row) if pairs.has_caption(row) else ""
    noise = str(meta.get("noise", "none"))
    return Picture(key=pairs.keys[row], uri=uri, caption=caption, style=str(meta.get("style", "")), noise=noise, held_out=bool(meta.get("held_out", False)))


def data_uri(image: Image.Image, size: int = THUMBNAIL) -> str:
    """A small WebP as a data URI: about 2 kB, so that a page with a hundred pictures stays small."""
    image = image.convert("RGB")
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "WEBP", quality=82, method=4)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def _json(path: Path, what: str, missing: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        missing.append(f"{what} ({path.name}) are not in the run and are left out.")
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path.name} is not valid JSON ({error}); run the step that writes it again") from error
    if not isinstance(found, dict):
        raise ResultsError(f"{path.name} holds a {type(found).__name__}, expected an object; run the step that writes it again")
    return found
