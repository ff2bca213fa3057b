"""Ours beside every runtime that a user could have taken instead: the same towers, the same weights, the same inputs, in the same rounds.

    python -m benchmarks.suites.peers --run out/demo --out out/bench-peers        (make bench-peers)

The towers are MobileCLIP2-S0's, from seeded random weights whose BatchNorm statistics are calibrated (open_clip 3.3 knows this model; it has no
MobileCLIP-S0, whose text tower is another). Ours is what `mclip export` makes of them and `runtime.load` picks. Each peer is given what its own
documentation tells a user to do: folded branches in eager torch and torch.compile, a plain `torch.onnx.export` for ONNX Runtime and for onnxruntime-web
(in Chromium, by the clock of its page), OpenVINO by its own converter at its default precision and held to float32, ExecuTorch on XNNPACK, LiteRT. Whoever takes one
input at a time runs a batch one by one.
Parity is the least cosine to eager float32 torch, over all inputs that are timed, of raw embeddings and of embeddings without their mean.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import nn

from benchmarks.environment import environment
from benchmarks.inputs import draw_inputs
from benchmarks.measure import Plan, summarise, take
from benchmarks.ratios import compare
from benchmarks.results import append_results, line
from benchmarks.suites.peer_browser import browser_peer
from benchmarks.suites.runtime_inputs import settled
from benchmarks.suites.stages import Stages
from export.draft import Job
from export.to_onnx import plain_attention, quiet
from export.towers import TOWERS, Samples, Tower, encoder_of
from export.verify import centred_cosines
from mobileclip.checkpoint import load_checkpoint, open_tokenizer, preprocess_config, save_checkpoint
from mobileclip.conversion import convert
from mobileclip.folding import reparameterize, structured_images
from mobileclip.model import ImageTextModel
from mobileclip.presets import preset
from runtime.files import file_sha256, write_json
from runtime.preprocess import preprocess

MODEL, OPEN_CLIP = "mobileclip2_s0", "MobileCLIP2-S0"
OURS = "ours"
SAME = 1e-4
"""Cosine that a peer may be below ours and still count as equally accurate."""

Run = Callable[[np.ndarray], np.ndarray]
Opener = Callable[[int], Run]
"""Threads -> inputs of a batch to embeddings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeersConfig:
    run: str = "out/demo"
    """A finished demo run: its validation pictures are the golden ones of the bundle, and nothing else of it is used."""
    out: str = "out/bench-peers"
    rounds: int = 60
    """Of each combination of tower, batch and threads."""
    batches: tuple[int, ...] = (1, 8)
    threads: tuple[int, ...] = (1, 2)
    target: str = "onnx,openvino"
    """Of our export; runtime.load then picks among what it can run."""
    precision: str = "fp32,fp16,int8"
    peers: tuple[str, ...] = ()
    """Only these; all when empty."""
    seed: int = 0


def run_peers(config: PeersConfig) -> dict[str, Any]:
    """Export once, then time what is not timed yet. Returns the figures (also in OUT/summary.json; lines in OUT/results.jsonl)."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = _checkpoint(out / "checkpoint", config.seed)
    stages = Stages(out, _say)
    pairs = Path(config.run) / "pairs" / "validation"
    stages.run(
        "export",
        [["mobileclip.cli", "export", str(checkpoint), str(out / "bundle"), "--pairs", str(pairs), "--target", config.target, "--precision", config.precision, "--force"]],
        inputs=[checkpoint / "receipt.json"], outputs=[out / "bundle" / "manifest.json"],
    )  # fmt: skip
    model = load_checkpoint(checkpoint, verify=False).eval()
    rows = _inputs(model, checkpoint)
    tables: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    for tower in TOWERS:
        with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
            openers = dict(_openers(tower, model, checkpoint, out, rows, Path(scratch), config, absent, stack))
            truth = encoder_of(reparameterize(model)[0], tower)
            with torch.no_grad():
                wanted = truth(torch.from_numpy(rows[tower])).numpy()
            for threads in config.threads:
                for batch in config.batches:
                    kept = out / f"{tower}-{threads}-{batch}.json"
                    if not kept.is_file():
                        write_json(kept, _table(tower, threads, batch, openers, rows[tower], wanted, config, out))
                    tables.append(json.loads(kept.read_text(encoding="utf-8")))
                    _say(_sentence(tables[-1]))
    figures = {f"{tower}_best_peer_ratio": _best(tables, tower) for tower in TOWERS}
    figures |= {f"{tower}_best_peer_ratio_{count}": _best([t for t in tables if t["threads"] == count], tower) for tower in TOWERS for count in config.threads}
    made: dict[str, Any] = {name: found["value"] if found else None for name, found in figures.items()}
    made |= {"best_peers": figures, "tables": tables, "not_measured": absent, "environment": environment()}
    write_json(out / "summary.json", made)
    return made


def _checkpoint(folder: Path, seed: int) -> Path:
    """Seeded random weights whose embeddings differ between inputs: fresh BatchNorm statistics would make all of them equal."""
    if not (folder / "receipt.json").is_file():
        config = preset(MODEL)
        model = settled(config, structured_images(32, config.image.image_size, seed=5), seed)
        with torch.no_grad():
            for parameter in model.text.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(1.5)
        save_checkpoint(model, folder)
    return folder


def _inputs(model: ImageTextModel, checkpoint: Path) -> dict[Tower, np.ndarray]:
    """Eight pictures and eight texts, as the towers take them."""
    drawn = draw_inputs(8)
    pixels = np.ascontiguousarray(preprocess(list(drawn.jpegs), preprocess_config(model.config)))
    return {"image": pixels, "text": np.ascontiguousarray(open_tokenizer(checkpoint, model.config)(list(drawn.texts)))}


def _openers(
    tower: Tower, model: ImageTextModel, checkpoint: Path, out: Path, rows: dict[Tower, np.ndarray], scratch: Path, config: PeersConfig, absent: dict[str, str],
    stack: contextlib.ExitStack,
) -> Iterator[tuple[str, Opener]]:  # fmt: skip
    """Whoever is installed and takes the tower; the others go into `absent` with the reason."""
    samples = Samples(keys=("0",) * 8, captions=("",) * 8, pixels=rows["image"], tokens=rows["text"])
    job = Job(model=reparameterize(model)[0], tower=tower, calibration=samples, folder=scratch)
    makers: dict[str, Callable[[], Opener]] = {
        OURS: lambda: _ours(out / "bundle", tower),
        "open_clip eager": lambda: _eager(_open_clip(checkpoint, tower, out)),
        "torch eager": lambda: _eager(job.encoder()),
        "torch.compile": lambda: _compiled(job.encoder()),
        "ONNX Runtime": lambda: _onnx(job, scratch),
        "onnxruntime-web": lambda: stack.enter_context(browser_peer())(_plain_graph(job, scratch), rows[tower]),
        "OpenVINO": lambda: _openvino(job, None),
        "OpenVINO float32": lambda: _openvino(job, "f32"),
        "ExecuTorch": lambda: _executorch(job, scratch),
        "LiteRT": lambda: _litert(job, scratch),
    }
    for name, make in makers.items():
        if config.peers and name not in (*config.peers, OURS):
            continue
        try:
            yield name, make()
        except Exception as error:  # a converter that fails is a finding about that peer, not the end of the table
            if name == OURS:
                raise
            absent[f"{name}, {tower}"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            _say(f"{name} is left out: {absent[f'{name}, {tower}']}")


def _ours(bundle: Path, tower: Tower) -> Opener:
    def opened(threads: int) -> Run:
        import runtime

        clip = runtime.load(bundle, threads=threads)
        return clip.encode_pixels if tower == "image" else clip.encode_tokens

    return opened


def _open_clip(checkpoint: Path, tower: Tower, out: Path) -> nn.Module:
    """open_clip's own model with our weights, through the files that it reads itself, its branches folded as its documentation asks."""
    import open_clip
    from timm.utils import reparameterize_model

    folder = out / "open-clip"
    if not (folder / "open_clip_config.json").is_file():
        convert(checkpoint, folder, to="open_clip")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model = reparameterize_model(model.eval())

    class Side(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.model.encode_image(inputs, normalize=True) if tower == "image" else self.model.encode_text(inputs.long(), normalize=True)

    return Side()


def _eager(module: nn.Module) -> Opener:
    def opened(threads: int) -> Run:
        def run(inputs: np.ndarray) -> np.ndarray:
            torch.set_num_threads(threads)
            with torch.inference_mode():
                return module(torch.from_numpy(inputs)).numpy()

        return run

    return opened


def _compiled(module: nn.Module) -> Opener:
    def opened(threads: int) -> Run:
        torch.set_num_threads(threads)
        torch._dynamo.reset()
        return _eager(torch.compile(module, dynamic=False))(threads)

    return opened


def _plain_graph(job: Job, scratch: Path) -> Path:
    """What `torch.onnx.export` gives with nothing but the batch left open."""
    path = scratch / f"{job.tower}.onnx"
    if not path.is_file():
        example = torch.from_numpy(job.rows[:2].copy())
        with plain_attention(), quiet("torch.onnx", "onnxscript"), contextlib.redirect_stdout(sys.stderr), torch.no_grad():
            batch = {0: torch.export.Dim("batch", min=1, max=64)}
            torch.onnx.export(job.encoder(), (example,), str(path), dynamic_shapes=(batch,), verbose=False, external_data=False)
    return path


def _onnx(job: Job, scratch: Path) -> Opener:
    """The plain graph in a session with nothing but the threads set."""
    path = _plain_graph(job, scratch)

    def opened(threads: int) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda inputs: session.run(None, {name: inputs})[0]

    return opened


def _openvino(job: Job, precision: str | None) -> Opener:
    """OpenVINO's own converter from torch; without `precision` it computes in what it finds best (bfloat16 where the processor has it)."""
    from export.to_openvino import import_openvino, nothing_said

    ov = import_openvino("the peer benchmark")
    with plain_attention(), nothing_said(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        rows = torch.from_numpy(job.rows[:2].copy())
        model = ov.convert_model(job.encoder(), example_input=rows, input=[(-1, *rows.shape[1:])])

    def opened(threads: int) -> Run:
        hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, **({"INFERENCE_PRECISION_HINT": precision} if precision else {})}
        request = ov.Core().compile_model(model, "CPU", hints).create_infer_request()
        return lambda inputs: request.infer([inputs])[0].copy()

    return opened


def _executorch(job: Job, scratch: Path) -> Opener:
    from export import to_executorch

    path = scratch / f"{job.tower}.pte"
    path.write_bytes(to_executorch.convert(job, "fp32")[0])

    def opened(threads: int) -> Run:
        encoder = to_executorch.ExecutorchEncoder(path)
        runtime = to_executorch._runtime()
        resize = getattr(runtime, "_unsafe_reset_threadpool", None)
        if resize is None and threads != 1:
            raise RuntimeError("this version of ExecuTorch does not take a number of threads")
        if resize is not None:
            resize(threads)  # the pool belongs to the process; tables have one number of threads each
        return encoder

    return opened


def _litert(job: Job, scratch: Path) -> Opener:
    from export import to_litert

    path = scratch / f"{job.tower}.tflite"
    path.write_bytes(to_litert.convert(job))
    return lambda threads: to_litert.LiteRtEncoder(path, threads=threads)


def _table(
    tower: Tower, threads: int, batch: int, openers: dict[str, Opener], rows: np.ndarray, wanted: np.ndarray, config: PeersConfig, out: Path
) -> dict[str, Any]:
    """All in the same rounds: times, parity on the rows that are timed, ratio of ours to each."""
    runs: dict[str, Run] = {}
    failed: dict[str, str] = {}
    for name, opener in openers.items():
        try:
            runs[name] = opener(threads)
            runs[name](rows[:batch])
        except Exception as error:
            if name == OURS:
                raise
            runs.pop(name, None)
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    found = {name: np.concatenate([run(rows[start : start + batch]) for start in range(0, len(rows), batch)]) for name, run in runs.items()}
    places = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    calls = {name: functools.partial(lambda turn, run: run(places[turn % len(places)]), run=getattr(run, "timed", run)) for name, run in runs.items()}
    plan = Plan(warmup=3, settle=20, own=1, min_samples=config.rounds, max_samples=config.rounds, few_samples=10, seconds=0.0, max_seconds=3600.0, seed=config.seed)
    taken = take(calls, plan)
    gc.collect()
    table: dict[str, Any] = {"tower": tower, "threads": threads, "batch": batch, "rounds": config.rounds, "rows": [], "failed": failed}
    lines = []
    for name, samples in taken.samples.items():
        parity = {"cosine_min": float(_cosines(found[name], wanted).min()), "centred_min": float(centred_cosines(found[name], wanted).min())}
        ratio = compare(samples, taken.samples[OURS], seed=config.seed) if name != OURS else None
        summary = summarise(samples).as_dict()
        table["rows"].append({"peer": name, "p50_ms": summary["p50"] / 1e6, "p90_ms": summary["p90"] / 1e6, **parity, "ours_over_it": ratio.as_dict() if ratio else None})
        settings = {"threads": threads, "batch": batch, "tool": name, "warmup": taken.warmup, "interleaved_with": [other for other in runs if other != name]}
        lines.append(
            line("latency", f"{tower}_tower", bundle={"name": f"{OPEN_CLIP}, random weights", "sha256": file_sha256(out / "bundle" / "manifest.json")}, artefact=name,
                 settings=settings, samples=samples.tolist(), summary=summary, environment=_facts(threads),
                 figures={"tower": tower, "batch": batch, "accuracy": parity, "cpu_ns": round(taken.cpu_ns[name] / len(samples))})
        )  # fmt: skip
        if ratio is not None:
            figures = {"candidate": OURS, "reference": name, **ratio.as_dict(), "sentence": f"{tower}, batch {batch}, {threads} thread(s): {ratio.sentence(OURS, name)}"}
            lines.append(
                line("comparison", f"{tower}_tower", bundle=lines[0]["bundle"], artefact=name, settings=settings, figures=figures, environment=lines[0]["environment"])
            )
    append_results(out / "results.jsonl", lines)
    return table


def _best(tables: list[dict[str, Any]], tower: Tower) -> dict[str, Any] | None:
    """Ours over the fastest peer that is as accurate, one input at a time; of the numbers of threads the one that suits ours worst."""
    worst: dict[str, Any] | None = None
    for table in tables:
        if table["tower"] != tower or table["batch"] != 1:
            continue
        ours = next(row for row in table["rows"] if row["peer"] == OURS)
        equal = [row for row in table["rows"] if row["peer"] != OURS and row["centred_min"] >= ours["centred_min"] - SAME]
        if equal:
            best = min(equal, key=lambda row: row["p50_ms"])
            found = {"peer": best["peer"], "threads": table["threads"], **best["ours_over_it"]}
            if worst is None or found["value"] > worst["value"]:
                worst = found
    return worst


def _cosines(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    left, right = (rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True) for rows in (found, wanted))
    return (left * right).sum(axis=1)


def _facts(threads: int) -> dict[str, Any]:
    facts = environment(threads)
    for name in ("open_clip_torch", "openvino", "executorch", "ai-edge-litert", "playwright"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts["packages"][name] = metadata.version(name)
    return facts


def _sentence(table: dict[str, Any]) -> str:
    rows = sorted(table["rows"], key=lambda row: row["p50_ms"])
    times = ", ".join(f"{row['peer']} {row['p50_ms']:.2f} ms ({row['centred_min']:.5f})" for row in rows)
    return f"{table['tower']}, {table['threads']} thread(s), batch {table['batch']}: {times}"


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def main(argv: list[str] | None = None) -> int:
    """Command line of the suite."""
    found = run_peers(tyro.cli(PeersConfig, args=argv))
    sys.stdout.write(json.dumps({name: found[name] for name in ("image_best_peer_ratio", "text_best_peer_ratio", "best_peers", "not_measured")}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
