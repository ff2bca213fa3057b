"""A realistic demo run folder, drawn and computed by code: for the report's tests, and to look at the page before a real run exists.

python -m tests.benchmarks.fixture_run FOLDER      # then: mclip report FOLDER/results.jsonl --run FOLDER -o report.html
"""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.measure import summarise
from benchmarks.ratios import compare
from benchmarks.results import append_results, line
from runtime.pairs import write_shard

SHAPES = ("disc", "square", "triangle", "ring", "cross", "star")
COLOURS = {"red": (214, 48, 49), "green": (39, 150, 80), "blue": (52, 110, 219), "yellow": (241, 196, 15), "violet": (125, 80, 190), "orange": (235, 130, 40)}
STYLES = {"noto": 1.0, "openmoji": 0.8, "fluent": 0.9, "twemoji": 0.72}
ENVIRONMENT: dict[str, Any] = {
    "processor": {
        "model": "Example CPU 3000",
        "physical_cores": 2,
        "logical_cores": 2,
        "usable_cores": 2,
        "quota_cores": None,
        "governor": "performance",
        "features": ["avx2", "fma"],
        "virtual": True,
    },
    "memory_bytes": 8 * 2**30,
    "system": {"name": "Linux", "release": "6.1", "distribution": "Debian GNU/Linux 12 (bookworm)", "machine": "x86_64"},
    "python": "CPython 3.11.7",
    "packages": {"mobileclip-edge": "0.1.0", "numpy": "2.4.6", "onnxruntime": "1.31.1"},
    "threads": 1,
    "load_average": [0.2, 0.3, 0.2],
}
BUNDLE = {"name": "pocket_s", "sha256": "ab" * 32}


def draw(shape: str, colour: str, style: str, size: int = 128) -> bytes:
    """A PNG of one shape in one drawing style."""
    picture = Image.new("RGB", (size, size), {"noto": "#eef2f7", "openmoji": "#fff8e6", "fluent": "#e8f7ee", "twemoji": "#f5eefc"}[style])
    pen = ImageDraw.Draw(picture)
    middle, radius = size / 2, size / 2 * STYLES[style] * 0.85
    fill, outline = COLOURS[colour], "#333333" if style == "openmoji" else None
    box = (middle - radius, middle - radius, middle + radius, middle + radius)
    if shape == "disc":
        pen.ellipse(box, fill=fill, outline=outline, width=4)
    elif shape == "square":
        pen.rounded_rectangle(box, radius=size // 10, fill=fill, outline=outline, width=4)
    elif shape == "ring":
        pen.ellipse(box, outline=fill, width=size // 7)
    elif shape == "cross":
        pen.line((box[0], box[1], box[2], box[3]), fill=fill, width=size // 6)
        pen.line((box[0], box[3], box[2], box[1]), fill=fill, width=size // 6)
    else:
        corners = 3 if shape == "triangle" else 10
        points = []
        for corner in range(corners):
            reach = radius * (0.45 if corners == 10 and corner % 2 else 1)
            angle = -math.pi / 2 + corner * 2 * math.pi / corners
            points.append((middle + reach * math.cos(angle), middle + reach * math.sin(angle)))
        pen.polygon(points, fill=fill, outline=outline)
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def concepts() -> list[tuple[str, str, str]]:
    """(hexcode, colour, shape) of the 36 concepts."""
    return [(f"1f{6 * i + j:03x}", colour, shape) for i, colour in enumerate(COLOURS) for j, shape in enumerate(SHAPES)]


def write_pairs(folder: Path, seed: int = 0) -> None:
    """pairs/train with web-like captions and pairs/test without noise."""
    rng = np.random.default_rng(seed)
    labels = [f"{colour} {shape}" for _, colour, shape in concepts()]
    for style in ("noto", "openmoji", "fluent"):
        samples = []
        for row, (code, colour, shape) in enumerate(concepts()):
            noise = str(rng.choice(["none", "swapped", "generic"], p=[0.5, 0.35, 0.15]))
            text = {"none": labels[row], "swapped": labels[int(rng.integers(len(labels)))], "generic": "image"}[noise]
            meta = {"concept": code, "style": style, "family": code, "held_out": False, "slice": "main", "group": "symbols", "noise": noise}
            samples.append((f"{style}-{code}", {"png": draw(shape, colour, style), "txt": text.encode(), "json": json.dumps(meta).encode()}))
        (folder / "train").mkdir(parents=True, exist_ok=True)
        write_shard(folder / "train" / f"{style}.tar", samples)
    samples = []
    for row, (code, colour, shape) in enumerate(concepts()):
        meta = {
            "concept": code,
            "style": "twemoji",
            "family": code,
            "held_out": row % 5 == 0,
            "slice": "main",
            "group": "symbols",
            "label": labels[row],
            "tags": [],
        }
        samples.append((f"twemoji-{code}", {"png": draw(shape, colour, "twemoji"), "txt": labels[row].encode(), "json": json.dumps(meta).encode()}))
    (folder / "test").mkdir(parents=True, exist_ok=True)
    write_shard(folder / "test" / "twemoji.tar", samples)
    (folder / "CREDITS.md").write_text("# Credits\n\n- Drawn by `tests/benchmarks/fixture_run.py`, MIT.\n", encoding="utf-8")


def recall(value: float | None, n: int) -> dict[str, float] | None:
    """A recall with a plausible interval."""
    if value is None:
        return None
    half = 1.96 * math.sqrt(max(value * (1 - value), 1e-4) / n)
    return {"value": round(value, 4), "low": round(max(0.0, value - half), 4), "high": round(min(1.0, value + half), 4)}


def tables() -> dict[str, Any]:
    """tables.json as the demo writes it."""
    models = [
        ("thumbnail lookup", "baseline", (None, 0.20), None, None, None, None),
        ("lite0 feature lookup", "baseline", (None, 0.34), None, None, None, None),
        ("lite0 + lite1 ensemble", "teacher", (0.17, 0.49), None, 31.0, 16.0, 118.0),
        ("lite0 at 224 px", "teacher", (0.15, 0.44), None, 27.1, 8.2, 61.0),
        ("reinforced student", "student", (0.09, 0.29), None, None, None, 6.1),
        ("plain student", "student", (0.02, 0.05), None, None, None, 6.1),
        ("pruned student", "student", (0.085, 0.28), None, None, None, 5.2),
        ("onnx fp32", "artefact", (0.085, 0.28), 0.999997, 1.9, 0.42, 5.2),
        ("onnx int8 text", "artefact", (0.084, 0.279), 0.9987, 1.9, 0.21, 3.4),
        ("Core ML fp16", "artefact", (0.085, 0.281), 0.99995, None, None, 2.6),
    ]
    rows = []
    for model, kind, (held, trained), parity, image_ms, text_ms, megabytes in models:
        for split, at5, n in (("held_out", held, 158), ("trained", trained, 1436)):
            for direction, factor in (("text_to_image", 1.0), ("image_to_text", 0.93)):
                value = None if at5 is None else at5 * factor
                rows.append(
                    {
                        "model": model,
                        "kind": kind,
                        "split": split,
                        "direction": direction,
                        "recall@1": recall(value and value * 0.5, n),
                        "recall@5": recall(value, n),
                        "recall@10": recall(value and min(1, value * 1.35), n),
                        "n": n,
                        "gallery": 1871,
                        "parity_cosine_min": parity,
                        "image_ms": image_ms,
                        "text_ms": text_ms,
                        "megabytes": megabytes,
                    }
                )
        if kind in ("teacher", "student"):
            rows.append(
                {
                    "model": model,
                    "kind": kind,
                    "split": "stamps",
                    "direction": "text_to_image",
                    "recall@1": recall(0.04, 270),
                    "recall@5": recall(0.11, 270),
                    "recall@10": recall(0.17, 270),
                    "n": 270,
                    "gallery": 270,
                    "parity_cosine_min": None,
                    "image_ms": image_ms,
                    "text_ms": text_ms,
                    "megabytes": megabytes,
                }
            )
    keys = [(f"twemoji-{code}", f"{colour} {shape}") for code, colour, shape in concepts()]
    examples = []
    for index, target in enumerate((0, 7, 15, 22, 28, 35)):
        others = [(target + step * 5 + 1) % 36 for step in range(5)]
        if index != 3:
            others[index % 4] = target
        results = [{"key": keys[row][0], "score": 0.41 - 0.03 * place, "right": row == target} for place, row in enumerate(others)]
        examples.append({"query": keys[target][1], "split": "held_out" if target % 5 == 0 else "trained", "target_key": keys[target][0], "results": results})
    return {
        "title": "A pocket student, reinforced",
        "created": "2026-01-02T03:04:05Z",
        "rows": rows,
        "headline": {
            "recall5_student_trained": 0.29,
            "recall5_student_trained_low": 0.267,
            "recall5_student_trained_high": 0.313,
            "recall5_plain_trained": recall(0.05, 1436),
            "recall5_ensemble_trained": recall(0.49, 1436),
            "recall5_student_minus_plain_trained_p": 3.1e-64,
            "search_hits_of_20": 14,
            "gallery_sha256": "cd" * 32,
        },
        "examples": examples,
        "zero_shot": [{"model": "reinforced student", "accuracy": recall(0.41, 1871)}, {"model": "plain student", "accuracy": recall(0.22, 1871)}],
        "timings": {
            "sample": 41,
            "projectors": 35,
            "reinforce": 310,
            "train student": 420,
            "train plain": 400,
            "compress": 61,
            "export": 58,
            "bench": 66,
            "report": 9,
        },
    }


def metrics(seed: int, final: float, terms: tuple[str, ...]) -> str:
    """metrics.jsonl of a training."""
    rng = np.random.default_rng(seed)
    rows = []
    if len(terms) > 1:
        rows += [json.dumps({"step": step, "phase": "text", "samples": 0, "loss": 9.0 - step / 10, "loss_terms": {"feature_text": 9.0}}) for step in (10, 20)]
    for step in range(20, 1954, 20):
        progress = step / 1954
        loss = final + 3.2 * math.exp(-4 * progress) + 0.05 * rng.standard_normal()
        parts = {name: loss * share for name, share in zip(terms, (0.55, 0.3, 0.15), strict=False)}
        rate = 1e-3 * min(1, progress / 0.05) * 0.5 * (1 + math.cos(math.pi * progress))
        row = {
            "step": step,
            "samples": step * 128,
            "loss": loss,
            "loss_terms": parts,
            "samples_per_second": 600 + 20 * rng.standard_normal(),
            "lr": rate,
            "seconds": step * 0.21,
        }
        if step % 240 == 0:
            row["validation"] = {"recall@5_all": round(0.3 * progress / final**0.5, 4), "recall@5_trained": round(0.32 * progress / final**0.5, 4)}
        rows.append(json.dumps(row))
    return "\n".join(rows) + "\n"


def manifest() -> dict[str, Any]:
    """manifest.json of the student's bundle, as far as the report reads it."""

    def artefact(name: str, tower: str, target: str, precision: str, cosine: float, size: int, *, reason: str | None = None) -> dict[str, Any]:
        suffix = {"onnx": "onnx", "coreml": "mlpackage", "tensorrt": "onnx"}[target]
        return {
            "id": name,
            "tower": tower,
            "target": target,
            "precision": precision,
            "batch": "dynamic",
            "path": None if reason else f"{target}/{tower}.{precision}.{suffix}",
            "status": "refused" if reason else "proven",
            "reason": reason,
            "parity": {
                "cosine_min": cosine,
                "cosine_p1": cosine + (1 - cosine) / 3,
                "cosine_mean": cosine + (1 - cosine) / 2,
                "max_abs": (1 - cosine) ** 0.5 / 9,
                "rank_agreement": 1 - (1 - cosine) * 3,
                "recall1_change": round((cosine - 1) / 2, 4),
                "n": 64,
            },
            "bytes": size,
            "latency": {"p50_ms": 3.1, "reference_p50_ms": 1.9} if reason else None,
        }

    return {
        "schema": 1,
        "name": "pocket_s",
        "embed_dim": 256,
        "image": {"image_size": 64},
        "text": {"context_length": 24, "vocab_size": 49408},
        "artefacts": [
            artefact("image-onnx-fp32", "image", "onnx", "fp32", 0.999998, 3_100_000),
            artefact("text-onnx-fp32", "text", "onnx", "fp32", 0.999997, 2_100_000),
            artefact("text-onnx-int8", "text", "onnx", "int8", 0.9987, 700_000),
            artefact(
                "image-onnx-int8",
                "image",
                "onnx",
                "int8",
                0.987,
                900_000,
                reason="slower than fp32: 3.1 ms against 1.9 ms (ratio 1.63, 99 % interval 1.58 to 1.69)",
            ),
            artefact("image-coreml-fp16", "image", "coreml", "fp16", 0.99995, 1_600_000),
            artefact("text-coreml-fp16", "text", "coreml", "fp16", 0.99996, 1_050_000),
            artefact("image-tensorrt-fp16", "image", "tensorrt", "fp16", 0.99998, 1_600_000),
        ],
        "licences": ["MIT (weights trained on the sample)"],
    }


def results() -> list[dict[str, Any]]:
    """Lines as `mclip bench` writes them, from simulated samples."""
    rng = np.random.default_rng(1)
    settings = {"threads": 1, "seconds": 5.0, "warmup": 5, "interleaved_with": []}
    lines = []
    base: dict[tuple[str, str], np.ndarray] = {}
    for phase, artefact, milliseconds in (
        ("decode", None, 1.15),
        ("preprocess", None, 0.62),
        ("tokenise", None, 0.031),
        ("image_tower", "image-onnx-fp32", 1.92),
        ("text_tower", "text-onnx-fp32", 0.42),
        ("text_tower", "text-onnx-int8", 0.21),
        ("end_to_end_image", "image-onnx-fp32", 3.75),
        ("end_to_end_text", "text-onnx-fp32", 0.47),
        ("end_to_end_text", "text-onnx-int8", 0.26),
    ):
        times = milliseconds * 1e6 * np.exp(0.04 * rng.standard_normal(400)) * np.where(rng.random(400) < 0.04, 1.6, 1)
        samples = times.astype(np.int64)
        base[phase, artefact or ""] = samples
        figures = {"gflop": 0.061, "gemm_share": 0.35} if phase == "image_tower" else {}
        lines.append(
            line(
                "latency",
                phase,
                bundle=BUNDLE,
                artefact=artefact,
                settings=settings,
                samples=samples.tolist(),
                summary=summarise(samples).as_dict(),
                figures=figures,
                environment=ENVIRONMENT,
            )
        )
    ratio = compare(base["text_tower", "text-onnx-fp32"], base["text_tower", "text-onnx-int8"])
    figures = {"reference": "text-onnx-fp32", **ratio.as_dict(), "sentence": ratio.sentence("text-onnx-int8", "text-onnx-fp32")}
    lines.append(line("comparison", "text_tower", bundle=BUNDLE, artefact="text-onnx-int8", settings=settings, figures=figures, environment=ENVIRONMENT))
    starts = (np.array([0.43, 0.41, 0.41, 0.40, 0.42]) * 1e9).astype(np.int64)
    lines.append(
        line(
            "cold_start",
            "cold_start_image",
            bundle=BUNDLE,
            settings=settings,
            samples=starts.tolist(),
            summary=summarise(starts).as_dict(),
            figures={"torch_imported": False},
            environment=ENVIRONMENT,
        )
    )
    for phase, artefact, megabytes in (("image_tower", "image-onnx-fp32", 118), ("text_tower", "text-onnx-fp32", 121), ("text_tower", "text-onnx-int8", 112)):
        peak = megabytes * 10**6
        lines.append(
            line("memory", phase, bundle=BUNDLE, artefact=artefact, settings=settings, samples=[peak], summary={"maximum": peak}, environment=ENVIRONMENT)
        )
    peak_figures = {"threads": 1, "gemm_gflops": 91.2, "gemm_gflops_median": 84.0, "copy_gbytes": 17.6, "copy_gbytes_median": 15.1}
    lines.append(line("peak", "machine", bundle=None, settings=settings, figures=peak_figures, environment=ENVIRONMENT))
    why = "Core ML runs on Apple devices only; its numerics were checked with an interpreter, its speed was not measured"
    lines.append(
        line("not_measured", "latency", bundle=BUNDLE, artefact="image-coreml-fp16", settings=settings, figures={"reason": why}, environment=ENVIRONMENT)
    )
    return lines


def write_run(folder: Path) -> Path:
    """The whole run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_pairs(folder / "pairs")
    (folder / "tables.json").write_text(json.dumps(tables(), indent=1), encoding="utf-8")
    for name, seed, final, terms in (("student", 1, 0.35, ("feature_image", "feature_text", "contrastive")), ("plain", 2, 1.6, ("contrastive",))):
        (folder / "ckpt" / name).mkdir(parents=True, exist_ok=True)
        (folder / "ckpt" / name / "metrics.jsonl").write_text(metrics(seed, final, terms), encoding="utf-8")
    (folder / "bundle").mkdir(exist_ok=True)
    (folder / "bundle" / "manifest.json").write_text(json.dumps(manifest()), encoding="utf-8")
    (folder / "results.jsonl").unlink(missing_ok=True)
    append_results(folder / "results.jsonl", results())
    return folder


if __name__ == "__main__":
    write_run(Path(sys.argv[1]))
