"""What a reinforcement costs at 12 million and 1.28 billion pairs, multiplied out from costs that are measured here.

    python -m benchmarks.suites.scale --out out/bench-scale        (make bench-scale)

Measured: bytes a sample of stores that are written (captions of CoCa's length), operations a view and a text of the two towers of ViT-L/14
(counted by torch), seconds of decoding and drawing a view of a 512-pixel JPEG on one core, and of the teacher on one core. Assumed, and
printed as such: the share of a GPU's peak that the teacher reaches, and the size of a picture on the way.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distill.augment import photographs, sample_parameters
from distill.captions import Caption
from distill.pilot_costs import processor
from distill.store_codecs import unit
from distill.store_writing import PartRows, write_part
from distill.views import open_picture
from runtime.files import write_json

FORMULA = """bytes       = pairs x bytes a sample
GPU seconds = pairs x teachers x (views x operations a view + captions x operations a text) / (peak operations a second x share of it)
CPU seconds = pairs x (decode + views x draw)          (per size of a teacher; must keep up with the GPU)
network     = pairs x (bytes a picture + bytes a sample)"""
CAPTION = "a photograph of two people on bicycles in front of an old house "
PEAKS = {"A100 (bf16, dense)": 312e12, "H100 (bf16, dense)": 989e12}
"""Operations a second as the vendor states them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleConfig:
    """What is multiplied out."""

    out: str = "out/bench-scale"
    pairs: tuple[int, ...] = (12_800_000, 1_280_000_000)
    settings: tuple[tuple[int, int], ...] = ((30, 6), (10, 6), (5, 5), (2, 2))
    """Views and captions (the pair's own among them)."""
    teachers: int = 2
    dim: int = 768
    model: str = "ViT-L-14"
    """The teachers' architecture, an open_clip name; random weights do."""
    picture_bytes: int = 70_000
    """Assumed size of a picture on the way: 0.9 TB for 12.8 million pairs (MobileCLIP, arXiv 2311.17049, on DataComp-12M)."""
    share_of_peak: float = 0.4
    """Assumed share of a GPU's peak that a ViT reaches in bf16."""
    seconds: float = 20.0
    """Of timing a view on one core."""


def sample_bytes(views: int, captions: int, dim: int, teachers: int, dtype: str, rows: int = 512) -> float:
    """Bytes a sample of a store part that is written: embeddings, parameters, captions, keys, checksums and header."""
    rng = np.random.default_rng(0)
    part = PartRows(
        keys=[f"{n:012x}{n:012x}"[:24] for n in range(rows)], pair_rows=list(range(rows)),
        augmentations=np.stack([[np.frombuffer(sample_parameters(rng, photographs(), (512, 512)), np.uint8) for _ in range(views)] for _ in range(rows)]),
        captions=[[Caption(text=CAPTION.strip(), type="synthetic" if j else "raw", source="pairs") for j in range(captions)] for _ in range(rows)],
        image_embeddings=[unit(rng.standard_normal((rows, views, dim)).astype(np.float32)) for _ in range(teachers)],
        text_embeddings=[unit(rng.standard_normal((rows, captions, dim)).astype(np.float32)) for _ in range(teachers)],
        columns={"similarity": np.zeros(rows, np.float32)},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        entry = write_part(Path(folder) / "00000.0000.safetensors", part, dtype=dtype, tables={"sources": ["pairs"], "languages": ["en"]}, metadata={"format": "mclip-store"})
    return entry["bytes"] / rows


def tower_operations(name: str, views: int = 1) -> dict[str, float]:
    """Floating-point operations of one view and of one text (two a multiply-add), counted while an open_clip model of random weights runs."""
    import open_clip
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_num_threads(1)
    model = open_clip.create_model(name).eval()
    size = model.visual.image_size if isinstance(model.visual.image_size, int) else model.visual.image_size[0]
    pixels, tokens = torch.zeros(views, 3, size, size), open_clip.get_tokenizer(name)(["a picture"])
    counts = {}
    torch.backends.mha.set_fastpath_enabled(False)  # the fused kernel is not counted
    with torch.inference_mode():
        for what, call in (("view", lambda: model.encode_image(pixels)), ("text", lambda: model.encode_text(tokens))):
            with FlopCounterMode(display=False) as counter:
                call()
            counts[what] = float(counter.get_total_flops())
        started = time.perf_counter()
        model.encode_image(pixels)
        counts["view_seconds_one_core"] = time.perf_counter() - started
    return counts | {"image_size": float(size)}


def picture_seconds(size: int, seconds: float) -> dict[str, float]:
    """Median seconds, one core, of decoding a 512-pixel JPEG with its first view, and of a further view of it."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).resize((512, 512), Image.Resampling.BICUBIC)
    noisy = np.clip(np.asarray(coarse, np.int16) + rng.normal(0, 12, (512, 512, 3)), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noisy).save(stream, "JPEG", quality=90)
    data, first, further = stream.getvalue(), list[float](), list[float]()
    ended = time.perf_counter() + seconds
    while time.perf_counter() < ended:
        parameters = [sample_parameters(rng, photographs(), (512, 512)) for _ in range(2)]
        picture = open_picture(data)
        first.append(_timed(lambda: picture.view(parameters[0], size)))  # noqa: B023 (called at once)
        further.append(_timed(lambda: picture.view(parameters[1], size)))  # noqa: B023
    return {"decode_and_first_view": float(np.median(first)), "further_view": float(np.median(further))}


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def run_scale(config: ScaleConfig) -> dict[str, Any]:
    """Measure, multiply out, write OUT/summary.json. Returns it."""
    costs = tower_operations(config.model)
    drawn = picture_seconds(int(costs["image_size"]), config.seconds)
    rows = []
    for views, captions in config.settings:
        operations = config.teachers * (views * costs["view"] + captions * costs["text"])
        for dtype in ("int8", "int4"):
            size = sample_bytes(views, captions, config.dim, config.teachers, dtype)
            for pairs in config.pairs:
                rows.append({
                    "pairs": pairs, "views": views, "captions": captions, "dtype": dtype, "bytes_per_sample": round(size, 1), "store_terabytes": round(pairs * size / 1e12, 3),
                    "network_terabytes": round(pairs * (size + config.picture_bytes) / 1e12, 2),
                    "cpu_core_hours_drawing": round(pairs * (drawn["decode_and_first_view"] + (views - 1) * drawn["further_view"]) / 3600),
                    **{f"gpu_hours {name}": round(pairs * operations / (peak * config.share_of_peak) / 3600) for name, peak in PEAKS.items()},
                })  # fmt: skip
    summary = {
        "teacher": config.model, "teachers": config.teachers, "operations_per_view": costs["view"], "operations_per_text": costs["text"],
        "teacher_view_seconds_one_core": round(costs["view_seconds_one_core"], 4), "decode_and_first_view_seconds": round(drawn["decode_and_first_view"], 6),
        "further_view_seconds": round(drawn["further_view"], 6), "processor": processor(), "assumed_share_of_peak": config.share_of_peak,
        "assumed_picture_bytes": config.picture_bytes, "rows": rows,
    }  # fmt: skip
    write_json(Path(config.out) / "summary.json", summary)
    return summary


def as_text(summary: dict[str, Any]) -> str:
    """The table for a person."""
    lines = [FORMULA, ""]
    lines += [
        f"{summary['teachers']} teachers {summary['teacher']}: {summary['operations_per_view'] / 1e9:.1f} G operations a view, {summary['operations_per_text'] / 1e9:.1f} G a text",
        f"on one core of {summary['processor']}: {summary['teacher_view_seconds_one_core']:.2f} s a view; decoding and first view "
        f"{1e3 * summary['decode_and_first_view_seconds']:.2f} ms, a further view {1e3 * summary['further_view_seconds']:.2f} ms",
    ]
    lines.append(f"assumed: {summary['assumed_share_of_peak']:.0%} of the GPU's stated peak, {summary['assumed_picture_bytes'] / 1e3:.0f} kB a picture")
    lines.append("")
    head = ["pairs", "views+captions", "dtype", "bytes/sample", "store TB", "network TB", "core hours drawing", *(f"{name} hours" for name in PEAKS)]
    lines.append("  ".join(f"{cell:>14}" for cell in head))
    for row in summary["rows"]:
        cells = [f"{row['pairs']:,}", f"{row['views']}+{row['captions']}", row["dtype"], f"{row['bytes_per_sample']:,.0f}", f"{row['store_terabytes']:,.2f}",
                 f"{row['network_terabytes']:,.1f}", f"{row['cpu_core_hours_drawing']:,}", *(f"{row[f'gpu_hours {name}']:,}" for name in PEAKS)]  # fmt: skip
        lines.append("  ".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    import tyro

    config = tyro.cli(ScaleConfig, args=argv, prog="python -m benchmarks.suites.scale", description=__doc__)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    summary = run_scale(config)
    sys.stdout.write(as_text(summary))
    sys.stdout.write(json.dumps({key: value for key, value in summary.items() if key != "rows"}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
