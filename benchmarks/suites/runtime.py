"""The SDK beside its peers: starts, pictures from file to embedding, short queries, overhead, memory, the index. `make bench-runtime`.

    python -m benchmarks.suites.runtime --run out/demo --out out/bench-runtime

Both sides of every ratio run in one process, in turns, on as many threads; starts are fresh processes, in turns too. S0-class means towers of MobileCLIP2-S0's shape with
random weights (times do not depend on them); what an approximation does to embeddings is asked on the sample's trained teacher.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import tyro
from PIL import Image

import runtime
import runtime.machine
from benchmarks.suites.demo import Layout
from benchmarks.suites.runtime_inputs import SIZE, jpeg, large_drawings, photo, random_bundle
from benchmarks.suites.search import measure
from benchmarks.suites.stages import StageError
from export.latency_gate import interleaved, processor, ratio
from mobileclip.config import ModelConfig, TextConfig
from mobileclip.presets import preset
from runtime.encoder import open_artefact
from runtime.files import write_json
from runtime.preprocess import preprocess

SHAPE, PEER = "mobileclip2_s0", "MobileCLIP2-S0"
STARTS = 7
PARTS = ("starts", "pictures", "fidelity", "texts", "index")

COLD = """
import time; start = time.perf_counter()
import runtime
clip = runtime.load(sys.argv[1], threads=2, prefer=sys.argv[2])
clip.encode_text(["a photo of a dog"])
print(time.perf_counter() - start)
"""
COLD_PEER = """
import time; start = time.perf_counter()
import open_clip, torch
model = open_clip.create_model(sys.argv[1]).eval(); tokenizer = open_clip.get_tokenizer(sys.argv[1])
with torch.no_grad(): model.encode_text(tokenizer(["a photo of a dog"]))
print(time.perf_counter() - start)
"""
MEMORY = """
import runtime
from pathlib import Path
import numpy as np
clip = runtime.load(sys.argv[1], threads=1, prefer=dict(image=sys.argv[2], text=sys.argv[3]))
clip.encode_text(["a photo of a dog"]); clip.encode_image(np.zeros((300, 300, 3), np.uint8))
print(next(int(row.split()[1]) for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmRSS:")) * 1024)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeConfig:
    run: str = "out/demo"
    """A finished demo run."""
    out: str = "out/bench-runtime"
    parts: tuple[str, ...] = PARTS
    photos: int = 3
    vectors: int = 1_000_000


def run_runtime(config: RuntimeConfig) -> dict[str, Any]:
    """Measure. Returns the figures (also in OUT/summary.json).

    Raises:
        StageError: there is no finished demo run.
    """
    place, out = Layout(Path(config.run)), Path(config.out)
    if not (place.bundle / "manifest.json").is_file():
        raise StageError(f"'{config.run}' has no bundle; run mclip demo --out {config.run} first")
    out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"processor": processor(), "machine": runtime.machine.machine()}
    for part in config.parts:
        _say(f"{part} …")
        figures |= RUNS[part](config, place, out)
        write_json(out / "summary.json", figures)
    return figures


def _shaped(out: Path) -> Path:
    folder = out / "s0-random"
    return folder if (folder / "manifest.json").is_file() else random_bundle(preset(SHAPE), folder)


def fresh(code: str, *words: str) -> float:
    """What a fresh interpreter prints."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "MOBILECLIP_MEASURE": "1"}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run([sys.executable, "-c", f"import sys\n{code}", *words], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise StageError(f"a fresh process failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}")
    return float(done.stdout.split()[-1])


def _starts(config: RuntimeConfig, place: Layout, out: Path) -> dict[str, Any]:
    """Fresh process to first text embedding, in turns with open_clip; resident memory of a loaded bundle; the base install's size."""
    bundle = _shaped(out)
    for precision in ("int8", "fp32"):
        fresh(COLD, str(bundle), precision)  # the first use hashes the files and runs the golden check; both are remembered
    times: dict[str, list[float]] = {"int8": [], "fp32": [], "open_clip": []}
    for turn in range(STARTS):
        for precision in ("int8", "fp32"):
            times[precision].append(fresh(COLD, str(bundle), precision))
        if turn < 3:
            times["open_clip"].append(fresh(COLD_PEER, PEER))
    manifest = runtime.read_manifest(bundle)
    resident: dict[str, float] = {}
    for target in ("onnx", "openvino"):
        words = str(bundle), f"image-{target}-int8", "text-onnx-int8"
        resident[target] = float(np.median([fresh(MEMORY, *words) for _ in range(4)][1:]))
    size = sum(manifest.artefact(f"{tower}-onnx-int8").bytes or 0 for tower in ("image", "text"))
    return {
        "cold_start_seconds": round(float(np.median(times["int8"])), 3), "cold_start_fp32_seconds": round(float(np.median(times["fp32"])), 3),
        "cold_start_open_clip_seconds": round(float(np.median(times["open_clip"])), 2), "cold_start_spread": [round(min(times["int8"]), 3), round(max(times["int8"]), 3)],
        "resident_megabytes": round(resident["onnx"] / 1e6, 1),
        "resident_openvino_megabytes": round(resident["openvino"] / 1e6, 1),
        "resident_limit_megabytes": round((2 * size + 60e6) / 1e6, 1), "int8_files_megabytes": round(size / 1e6, 1),
    }  # fmt: skip


def _pictures(config: RuntimeConfig, place: Layout, out: Path) -> dict[str, Any]:
    """A 12-megapixel JPEG to pixels, and to the embedding, on one thread, beside open_clip with its own transform."""
    torch.set_num_threads(1)
    bundle = _shaped(out)
    model, _, transform = open_clip.create_model_and_transforms(PEER)
    model.eval()
    kinds = {"photo": (1.3, 86), "smooth": (0.0, 86)}
    files = {kind: [jpeg(photo(seed, detail=detail), quality) for seed in range(config.photos)] for kind, (detail, quality) in kinds.items()}
    best, exact = runtime.load(bundle, threads=1), runtime.load(bundle, threads=1, prefer="fp32")
    quick = {"quick": runtime.load(bundle, threads=1, oversampling=2), "quick_fp32": runtime.load(bundle, threads=1, prefer="fp32", oversampling=2)}
    for clip in (best, exact, *quick.values()):
        clip.encode_image(files["photo"][0])
    figures: dict[str, Any] = {"photo_megapixels": SIZE[0] * SIZE[1] / 1e6, "image_artefact": best.choice["image"].id}

    def theirs(data: bytes) -> torch.Tensor:
        return transform(Image.open(io.BytesIO(data)).convert("RGB"))

    def ours(data: bytes) -> np.ndarray:
        return preprocess([data], best.preprocess_config)

    for kind, pictures in files.items():
        figures[f"{kind}_megabytes"] = round(float(np.mean([len(data) for data in pictures])) / 1e6, 2)
        times = interleaved({"ours": _taking(ours, pictures), "theirs": _taking(theirs, pictures)}, pairs=40, warmup=2)
        figures["preprocess_ratio" if kind == "photo" else "preprocess_ratio_smooth"] = _shown(ratio(times["ours"], times["theirs"]))
        figures[f"preprocess_{kind}_ms"] = [round(float(np.median(times[side])) * 1e3, 1) for side in ("ours", "theirs")]
    data = files["photo"]

    def eager(one: bytes) -> None:
        with torch.no_grad():
            torch.nn.functional.normalize(model.encode_image(theirs(one)[None]), dim=-1)

    clips = {"best": best, "fp32": exact, **quick}
    times = interleaved({"theirs": _taking(eager, data), **{name: _taking(clip.encode_image, data) for name, clip in clips.items()}}, pairs=40, warmup=2)
    figures |= {f"end_to_end_ratio{'' if name == 'best' else f'_{name}'}": _shown(ratio(times[name], times["theirs"])) for name in clips}
    figures["end_to_end_ms"] = {name: round(float(np.median(values)) * 1e3, 1) for name, values in times.items()}
    return figures | _overhead(place, data[0])


def _overhead(place: Layout, data: bytes) -> dict[str, Any]:
    """What the SDK adds to a session's own time, on the smallest model: it would drown in the noise of a large one. Nothing is cut short, so both compute the same."""
    clip = runtime.load(place.bundle, threads=1, prefer="fp32", measure=False)
    pixels, tokens = preprocess([data], clip.preprocess_config), clip.tokenizer([" ".join(["word"] * 200)])
    figures = {}
    for tower, inputs, through in (("image", pixels, clip.encode_pixels), ("text", tokens, clip.encode_tokens)):
        session = open_artefact(clip.folder, clip.manifest, clip.manifest.artefact(clip.choice[tower].id), 1)._session  # type: ignore[attr-defined]
        name = session.get_inputs()[0].name
        times = interleaved({"sdk": functools.partial(through, inputs), "bare": functools.partial(session.run, None, {name: inputs})}, pairs=300, settle=1)
        figures[f"overhead_{tower}_ms"] = round(float(np.median(times["sdk"] - times["bare"])) * 1e3, 4)
    return figures


def _fidelity(config: RuntimeConfig, place: Layout, out: Path) -> dict[str, Any]:
    """What decoding at a fraction does to embeddings, on the trained teacher: drawings of the style that nobody trained on, in 12 megapixels."""
    clip = runtime.load(place.teacher_bundle, threads=2, prefer="fp32")
    pictures = large_drawings(24)
    figures: dict[str, Any] = {"reduced_decode_pictures": len(pictures)}
    whole = clip.encode_pixels(preprocess(pictures, clip.preprocess_config, oversampling=float("inf")))
    for times in (4, 2):
        found = clip.encode_pixels(preprocess(pictures, clip.preprocess_config, oversampling=times))
        cosines = (found * whole).sum(axis=1)
        figures |= {f"oversampling_{times}_cosine_min": round(float(cosines.min()), 6), f"oversampling_{times}_cosine_mean": round(float(cosines.mean()), 6)}
    return figures


def _texts(config: RuntimeConfig, place: Layout, out: Path) -> dict[str, Any]:
    """Short queries on a causal tower of 12 layers and 512 values, and queries that were asked before."""
    folder = out / "causal-random"
    if not (folder / "manifest.json").is_file():
        image = preset("pocket_s").image
        random_bundle(ModelConfig(name="causal 12 x 512", embed_dim=512, image=image, text=TextConfig(mask="causal")), folder)
    clip = runtime.load(folder, threads=1, prefer="fp32", measure=False)
    clip.queries.entries = 0
    short = clip.tokenizer(["a red heart"])
    opened, artefact = clip._open("text")
    if not artefact.any_length:
        raise StageError("the causal tower's graph takes no shorter rows")
    times = interleaved({"short": lambda: clip.encode_tokens(short), "whole": lambda: opened.run(short)}, pairs=60, settle=1)
    rng = np.random.default_rng(0)
    words = ("red", "heart", "dog", "blue", "sea", "old", "house", "two", "cats", "tree")
    queries = [" ".join(rng.choice(words, rng.integers(1, 7))) for _ in range(200)]
    tokens = clip.tokenizer(queries)
    found, whole = clip.encode_tokens(tokens), np.concatenate([opened.run(tokens[n : n + 32]) for n in range(0, len(tokens), 32)])
    gallery = rng.normal(size=(1000, clip.embed_dim)).astype(np.float32)
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    before, after = whole @ gallery.T, found @ gallery.T
    wrong = 0
    for one, other in zip(before, after, strict=True):
        order = np.argsort(-other, kind="stable")
        wrong += int((np.diff(one[order]) > 1e-5).sum())
    clip.queries.entries = 2048
    clip.encode_text("a red heart")
    start = time.perf_counter()
    for _ in range(2000):
        clip.encode_text("a red heart")
    cached = (time.perf_counter() - start) / 2000
    int8 = runtime.load(folder, threads=1, prefer={"text": "int8"}, measure=False)
    int8.queries.entries = 0
    int8.encode_tokens(short)
    bare = int8._open("text")[0]
    quick = interleaved({"short": lambda: int8.encode_tokens(short), "whole": lambda: bare.run(short)}, pairs=60, settle=1)
    return {
        "short_query_ratio": _shown(ratio(times["short"], times["whole"])), "short_query_ms": [round(float(np.median(times[n])) * 1e3, 2) for n in ("short", "whole")],
        "short_query_ratio_int8": _shown(ratio(quick["short"], quick["whole"])), "short_query_order_changes": wrong,
        "short_query_max_difference": float(np.abs(found - whole).max()), "cached_query_us": round(cached * 1e6, 1),
    }  # fmt: skip


def _index(config: RuntimeConfig, place: Layout, out: Path) -> dict[str, Any]:
    return dict(measure(Path(config.run), out / "index", count=config.vectors, shaped=_shaped(out)))


RUNS: dict[str, Callable[[RuntimeConfig, Layout, Path], dict[str, Any]]] = {
    "starts": _starts, "pictures": _pictures, "fidelity": _fidelity, "texts": _texts, "index": _index,
}  # fmt: skip


def _taking(run: Callable[[Any], Any], inputs: list[Any]) -> Callable[[], Any]:
    """`run` of the next input at each call, round and round."""
    following = itertools.cycle(inputs)
    return lambda: run(next(following))


def _shown(found: Any) -> float:
    return round(float(found.median), 3)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    config = tyro.cli(RuntimeConfig, prog="python -m benchmarks.suites.runtime", description=__doc__)
    figures = run_runtime(config)
    width = max(map(len, figures))
    for name, value in figures.items():
        _say(f"{name:{width}}  {value}")
    keys = ("cold_start_seconds", "end_to_end_ratio", "preprocess_ratio", "short_query_ratio", "search_1m_p50_ms", "search_1m_recall10")
    _say(json.dumps({name: figures[name] for name in keys if name in figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
