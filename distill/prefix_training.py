"""mclip train-captioner: a small captioner for these pairs, from their own captions and frozen teachers, in minutes on one core.

    mclip train-captioner PAIRS OUT --teacher CHECKPOINT [CHECKPOINT …]
    mclip caption PAIRS CAPTIONS --captioner prefix:OUT

The idea is ClipCap's (Mokady et al. 2021, arXiv 2111.09734): the teacher's embedding is the prefix of a language model. Pairs of the web
have wrong captions, and a decoder that learns picture -> caption learns them by heart. So the decoder learns text embedding -> text, which
is right for every caption, with noise on the embedding (CapDec, Nukrai et al. 2022, arXiv 2211.00575); a picture comes in through the
captions that the teachers find near it (distill/prefix_writing.py). Which captions lie near it the teachers know from all pairs together.
No picture is read here.

Shapes: U = different captions, M = remembered ones, B = batch, T = tokens, D = sum of the teachers' dimensions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from distill.ensemble import encode_texts, open_teacher
from distill.prefix_captioner import DecoderConfig, PrefixDecoder
from distill.prefix_writing import Conditioning, TeacherNote, save_prefix_captioner
from distill.progress import progress
from distill.store_writing import hash_shards
from distill.training_state import STATE, read_state, write_state
from mobileclip.checkpoint import build_tokenizer
from runtime.errors import PairsError, RecipeError, TrainingError
from runtime.pairs import open_pairs
from runtime.tokenizer import Tokenizer

VERSION = 1
"""Of the recipe: raised when training changes, so that an older captioner is made again."""
GROUPS = 4
"""Groups of like length a batch is cut into."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionerConfig:
    """Train a prefix captioner on the captions of PAIRS."""

    pairs: tyro.conf.Positional[str]
    """Folder of tar shards."""
    out: tyro.conf.Positional[str]
    """Checkpoint folder to write; one that was interrupted is continued."""
    teacher: tuple[str, ...]
    """One or several teachers: checkpoint folders, open_clip:NAME[/PRETRAINED], or module:function."""
    steps: int = 800
    batch_size: int = 256
    learning_rate: float = 2e-3
    noise: float = 1.2
    """Length of the noise that is added to an embedding of length 1."""
    scale: float = 60.0
    """Sharpness with which a picture's embedding picks captions, as a multiple of the cosine."""
    remembered: int = 8192
    """Different captions that are kept to be picked from, the most frequent first."""
    vocab_size: int = 2048
    width: int = 128
    heads: int = 4
    layers: int = 2
    prefix: int = 4
    context_length: int = 24
    dropout: float = 0.0
    seed: int = 0
    threads: int = 1
    save_seconds: float = 30.0
    """At most this much work is lost to a kill."""
    json: bool = False
    """Print one JSON object at the end."""

    def __post_init__(self) -> None:
        if not self.teacher:
            raise RecipeError("a prefix captioner needs a teacher: --teacher CHECKPOINT, open_clip:NAME/PRETRAINED or module:function")
        if min(self.steps, self.batch_size, self.remembered, self.threads) < 1 or not 0 < self.learning_rate < 1 or min(self.noise, self.scale, self.seed) < 0:
            raise RecipeError(
                f"steps {self.steps}, batch_size {self.batch_size}, remembered {self.remembered} and threads {self.threads} must be at least 1, learning_rate "
                f"{self.learning_rate} between 0 and 1, noise {self.noise}, scale {self.scale} and seed {self.seed} not negative"
            )


def main(argv: list[str]) -> int:
    """Entry point of `mclip train-captioner`; returns the exit code."""
    config = tyro.cli(CaptionerConfig, args=argv, prog="mclip train-captioner", description=__doc__)
    out = train_captioner(config)
    figures = json.loads((out / "receipt.json").read_text(encoding="utf-8"))["figures"]
    if config.json:
        sys.stdout.write(json.dumps({"out": str(out), **figures}) + "\n")
    else:
        sys.stdout.write(f"{out}: {figures['parameters']:,} parameters, {figures['captions']:,} different captions, loss {figures['loss']:.3f} after {figures['seconds']:.0f} s\n")
    return 0


def train_captioner(config: CaptionerConfig) -> Path:
    """Train to the end, from where an earlier run of the same settings stopped. Returns the checkpoint folder.

    Raises:
        PairsError: the pairs hold no usable caption.
        TrainingError: the folder holds another run, or the loss is no longer finite.
    """
    started = time.monotonic()
    torch.set_num_threads(config.threads)
    pairs, out = open_pairs(config.pairs), Path(config.out)
    teachers = [open_teacher(spec) for spec in config.teacher]
    notes = [TeacherNote(spec=spec, name=t.facts.name, dim=t.facts.dim, sha256=t.facts.sha256, licence=t.facts.licence) for spec, t in zip(config.teacher, teachers, strict=True)]
    fingerprint = _fingerprint(config, notes, hash_shards(pairs))
    if _finished(out, fingerprint):
        return out
    texts, counts = _captions(pairs)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer_path = out / "tokenizer.json"
    os.replace(build_tokenizer(config.vocab_size, out / f".tokenizer.{os.getpid()}.json"), tokenizer_path)
    tokens = torch.from_numpy(Tokenizer.open(tokenizer_path, context_length=config.context_length)(texts)).long()
    with progress("captions", len(texts)) as advance:
        vectors = []
        for start in range(0, len(texts), 256):
            vectors.append(np.concatenate(encode_texts(teachers, texts[start : start + 256]), axis=1))
            advance(min(start + 256, len(texts)), "embedded")
    embedded = torch.from_numpy(np.concatenate(vectors))
    conditioning = _conditioning(config, embedded, counts, [note.dim for note in notes])
    torch.manual_seed(config.seed)
    model = PrefixDecoder(DecoderConfig(
        dims=tuple(note.dim for note in notes), vocab_size=config.vocab_size, width=config.width, heads=config.heads, layers=config.layers, prefix=config.prefix,
        context_length=config.context_length, dropout=config.dropout,
    ))  # fmt: skip
    loss, before = _loop(config, model, conditioning.of_texts(embedded), tokens, torch.from_numpy(counts), out, fingerprint)
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()), "captions": len(texts), "loss": round(loss, 4), "seconds": round(before + time.monotonic() - started, 1)
    }  # fmt: skip
    save_prefix_captioner(
        out, model.eval(), conditioning, notes, tokenizer_path, {"stage": "train-captioner", "config": dataclasses.asdict(config), "fingerprint": fingerprint, "figures": figures}
    )
    (out / STATE).unlink(missing_ok=True)
    return out


def _captions(pairs: Any) -> tuple[list[str], np.ndarray]:
    """Different captions in the order of their text, and how often each occurs. Pairs without a usable one are passed over."""
    counts: dict[str, int] = {}
    for row in range(len(pairs)):
        try:
            text = " ".join(pairs.caption(row).split())
        except PairsError:
            continue
        if text:
            counts[text] = counts.get(text, 0) + 1
    if not counts:
        raise PairsError(f"none of the {len(pairs)} pairs of '{pairs.folder}' has a usable caption; a captioner learns from them")
    texts = sorted(counts)
    return texts, np.array([counts[text] for text in texts], np.float64)


def _conditioning(config: CaptionerConfig, embedded: Tensor, counts: np.ndarray, dims: list[int]) -> Conditioning:
    kept = np.sort(np.argsort(-counts, kind="stable")[: config.remembered])
    conditioning = Conditioning(len(kept), dims, config.scale)
    conditioning.memory.copy_(embedded[kept])
    conditioning.mean.copy_(embedded.mean(dim=0))
    return conditioning.eval()


def _loop(
    config: CaptionerConfig, model: PrefixDecoder, embedded: Tensor, tokens: Tensor, counts: Tensor, out: Path, fingerprint: str
) -> tuple[float, float]:
    """Steps until the plan is done. Returns the mean loss of the last tenth and the seconds of former runs."""
    decayed, others = [p for p in model.parameters() if p.ndim >= 2], [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], lr=config.learning_rate, betas=(0.9, 0.98))
    done, before = read_state(out, {"model": model}, optimizer, fingerprint) or (0, 0.0)
    saved = began = time.monotonic()
    losses: list[float] = []
    with progress("train captioner", config.steps, done) as advance:
        for step in range(done, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step, config)
            losses.append(_step(config, model, optimizer, embedded, tokens, counts, step))
            advance(step + 1, f"loss {losses[-1]:.3f}")
            if time.monotonic() - saved > config.save_seconds:
                saved = time.monotonic()
                write_state(out, {"model": model}, optimizer, fingerprint, step + 1, before + saved - began)
    return float(np.mean(losses[-max(1, config.steps // 10) :] or [math.nan])), before


def _step(
    config: CaptionerConfig, model: PrefixDecoder, optimizer: torch.optim.Optimizer, embedded: Tensor, tokens: Tensor, counts: Tensor, step: int
) -> float:
    """One step; what it draws is a function of (seed, step)."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    # Frequent captions are junk more often than not: half as often as they occur on the logarithmic scale.
    rows = torch.multinomial(counts.sqrt(), config.batch_size, replacement=True, generator=generator)
    noise = torch.randn(config.batch_size, embedded.shape[1], generator=generator) * config.noise / embedded.shape[1] ** 0.5
    condition = F.normalize(embedded[rows] + noise, dim=1)
    torch.manual_seed(config.seed * 1_000_003 + step)  # of the dropout
    ends = tokens[rows].argmax(dim=1)  # the end is the largest id
    total, weight = torch.zeros(()), 0
    model.train()
    for part in torch.argsort(ends, stable=True).tensor_split(GROUPS):
        if len(part):
            longest = int(ends[part].max()) + 1
            seen = tokens[rows[part], :longest]
            target = seen[:, 1:].masked_fill(torch.arange(longest - 1)[None] >= ends[part][:, None], -100)
            total = total + F.cross_entropy(model(condition[part], seen[:, :-1]).flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum")
            weight += int(ends[part].sum())
    loss = total / weight
    if not torch.isfinite(loss):
        raise TrainingError(f"the loss is {loss.item()} at step {step + 1}; lower learning_rate (now {config.learning_rate})")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def _learning_rate(step: int, config: CaptionerConfig) -> float:
    """Linear warm-up over a twentieth, then a cosine to zero."""
    warmup = max(1, config.steps // 20)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


# ---------------------------------------------------------------- state


def _fingerprint(config: CaptionerConfig, notes: list[TeacherNote], shards: dict[str, str]) -> str:
    free = {"pairs", "out", "teacher", "threads", "save_seconds", "json"}
    chosen = {name: value for name, value in dataclasses.asdict(config).items() if name not in free}
    facts = {"version": VERSION, **chosen, "teachers": [[note.sha256, note.dim] for note in notes], "pairs": shards}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _finished(out: Path, fingerprint: str) -> bool:
    receipt = out / "receipt.json"
    if not receipt.is_file():
        return False
    try:
        found = json.loads(receipt.read_text(encoding="utf-8")).get("fingerprint")
    except (ValueError, AttributeError):
        found = None
    if found != fingerprint:
        raise TrainingError(f"'{out}' holds something that was made with other settings or data; choose another folder, or remove it to train again")
    return True
