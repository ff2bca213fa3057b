"""More languages for a text tower, with texts alone: `mclip train-languages CKPT OUT --texts de=DE.jsonl fr=FR.jsonl --pivot EN.jsonl`.

A translation should lie where its English original lies. The targets are the checkpoint's own embeddings of the English texts, computed once; the text
tower learns to send every translation there, and to leave the English where it is (Reimers and Gurevych 2020, "Making monolingual sentence embeddings
multilingual", arXiv 2004.09813). The image tower is not touched: galleries that were embedded before stay valid.

A file of texts has a JSON object a line, {"concept": "…", "label": "…"}; texts of one concept are translations of each other. CLIP's merges are English:
other scripts take up to a token a byte, so the tower gets a longer context.

Shapes: B = batch, T = tokens, D = embed_dim.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from distill.interruption import stop_asked
from distill.losses import feature_loss
from distill.objective import encode_texts
from distill.progress import progress
from distill.training_state import STATE, finished, read_state, write_state
from mobileclip.checkpoint import load_checkpoint, open_tokenizer, save_checkpoint, verify_receipt
from mobileclip.model import ImageTextModel
from mobileclip.models import create_model
from runtime.errors import PairsError, RecipeError
from runtime.files import file_sha256
from runtime.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguagesConfig:
    """What is learned from what."""

    checkpoint: tyro.conf.Positional[str]
    """The student; its image tower stays as it is."""
    out: tyro.conf.Positional[str]
    """Checkpoint folder to write."""
    texts: dict[str, str]
    """Language to file, for instance `de captions/de.jsonl fr captions/fr.jsonl`."""
    pivot: str
    """File of the language that the checkpoint knows: its embeddings of these texts are the targets."""
    concepts: str = ""
    """Pairs folder: only concepts that its samples' facts name are learned from; empty: all. Give the training pairs to keep test concepts unseen."""
    context_length: int = 48
    """Tokens of a text; at least the checkpoint's."""
    steps: int = 2000
    batch_size: int = 128
    learning_rate: float = 1e-3
    pivot_share: float = 0.25
    """Of a batch: texts of the known language, which are to stay where they are."""
    seed: int = 0
    threads: int = 1
    save_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not self.texts or self.steps < 1 or self.batch_size < 2 or not 0 < self.learning_rate < 1 or not 0 <= self.pivot_share < 1:
            raise RecipeError(
                f"texts are {sorted(self.texts)}, steps {self.steps}, batch_size {self.batch_size}, learning_rate {self.learning_rate}, pivot_share {self.pivot_share}; "
                "expected at least one language, at least 1 step, batches of at least 2, a learning rate within (0, 1) and a share within [0, 1)"
            )


def read_texts(path: str | os.PathLike[str]) -> dict[str, str]:
    """Concept to text of a .jsonl file.

    Raises:
        PairsError: it cannot be read, a line is no such object, or there is none.
    """
    found: dict[str, str] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PairsError(f"'{path}' cannot be read ({error}); expected a .jsonl file of texts") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            facts = json.loads(line)
            concept, label = facts["concept"], facts["label"]
        except (ValueError, KeyError, TypeError):
            raise PairsError(f"line {number} of '{path}' is not an object with \"concept\" and \"label\"; correct or remove it") from None
        if isinstance(concept, str) and isinstance(label, str) and label.strip():
            found[concept] = label.strip()
    if not found:
        raise PairsError(f"'{path}' holds no texts; expected a line like {{\"concept\": \"1f34c\", \"label\": \"banana\"}} for each")
    return found


def widen(model: ImageTextModel, context_length: int) -> ImageTextModel:
    """A new model that reads longer texts: positions that it had are kept, the others begin at random. Its embeddings of texts that fitted are the same.

    Raises:
        RecipeError: a shorter context, or a tower that sees its padding.
    """
    text = model.config.text
    if context_length < text.context_length:
        raise RecipeError(f"context_length is {context_length}, and the checkpoint reads {text.context_length} tokens; choose at least that")
    if text.mask == "none":
        raise RecipeError(f"model '{model.config.name}' lets padding take part in attention (mask 'none'); with a longer context its embeddings would change")
    config = dataclasses.replace(model.config, text=dataclasses.replace(text, context_length=context_length))
    result, state = create_model(config), model.state_dict()
    with torch.no_grad():
        for name, tensor in result.state_dict().items():
            if name == "text.positional_embedding":
                tensor[: text.context_length] = state[name]
            else:
                tensor.copy_(state[name])
    return result


def train_languages(config: LanguagesConfig) -> Path:
    """Run to the end, from where an earlier run of the same settings stopped. Returns the checkpoint folder.

    Raises:
        CheckpointError, PairsError, RecipeError: the inputs do not fit (before anything is written). TrainingError: the folder holds another run.
    """
    torch.set_num_threads(config.threads)
    texts = {language: read_texts(path) for language, path in sorted(config.texts.items())}
    pivot = read_texts(config.pivot)
    known = _concepts(config.concepts)
    concepts = sorted(concept for concept in pivot if known is None or concept in known)
    places = [(language, concept) for language, own in texts.items() for concept in concepts if concept in own]
    if not places:
        raise PairsError(f"'{config.pivot}' and the texts of {', '.join(texts)} share no concept; give files of the same concepts")
    source = load_checkpoint(config.checkpoint)
    fingerprint = _fingerprint(config)
    out = Path(config.out)
    if finished(out, fingerprint):
        return out
    torch.manual_seed(config.seed)
    model = widen(source, config.context_length)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = open_tokenizer(config.checkpoint, model.config)
    targets = _embed(source, open_tokenizer(config.checkpoint, source.config), [pivot[concept] for concept in concepts])
    rows = {concept: n for n, concept in enumerate(concepts)}
    seconds = _learn(config, model, tokenizer, out, fingerprint, [texts[language][concept] for language, concept in places], [pivot[c] for c in concepts],
                     targets[[rows[concept] for _, concept in places]], targets)  # fmt: skip
    figures = {"languages": sorted(texts), "concepts": len(concepts), "translations": len(places), "steps": config.steps, "seconds": round(seconds, 1)}
    save_checkpoint(
        model.eval(), out, tokenizer=Path(config.checkpoint) / "tokenizer.json",
        extra={"stage": "train-languages", "config": dataclasses.asdict(config), "fingerprint": fingerprint, "figures": figures},
    )  # fmt: skip
    (out / STATE).unlink(missing_ok=True)
    return out


def _learn(
    config: LanguagesConfig, model: ImageTextModel, tokenizer: Tokenizer, out: Path, fingerprint: str, others: Sequence[str], own: Sequence[str],
    other_targets: Tensor, own_targets: Tensor,
) -> float:  # fmt: skip
    for parameter in (*model.image.parameters(), model.logit_scale):
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.text.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    other_tokens, own_tokens = tokenizer(list(others)), tokenizer(list(own))
    found = read_state(out, {"text": model.text}, optimizer, fingerprint)
    step, before = found if found is not None else (0, 0.0)
    began = saved = time.monotonic()
    model.text.train()
    with progress(f"languages {out.name}", config.steps, step) as advance, stop_asked() as asked:
        while step < config.steps:
            picked_own, picked = _picked(config, step, len(own), len(others))
            tokens = np.concatenate([own_tokens[picked_own], other_tokens[picked]])
            target = torch.cat([own_targets[picked_own], other_targets[picked]])
            loss = feature_loss(encode_texts(model, tokens), target)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.text.parameters(), 1.0)
            optimizer.step()
            step += 1
            advance(step, f"loss {float(loss.detach()):.3f}")
            stop = asked()
            if stop or time.monotonic() - saved > config.save_seconds:
                write_state(out, {"text": model.text}, optimizer, fingerprint, step, before + time.monotonic() - began)
                saved = time.monotonic()
            if stop:
                raise KeyboardInterrupt
    return before + time.monotonic() - began


def _picked(config: LanguagesConfig, step: int, own: int, others: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the step's batch: a function of seed and step."""
    generator = np.random.default_rng([config.seed, step])
    count = round(config.pivot_share * config.batch_size)
    return generator.integers(0, own, count), generator.integers(0, others, config.batch_size - count)


@torch.no_grad()
def _embed(model: ImageTextModel, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """(len(texts), D), unit norm."""
    return torch.cat([encode_texts(model.eval(), tokenizer(list(texts[n : n + 256]))) for n in range(0, len(texts), 256)])


def _concepts(folder: str) -> set[str] | None:
    if not folder:
        return None
    from runtime.pairs import open_pairs

    pairs = open_pairs(folder)
    return {str(pairs.meta(row).get("concept")) for row in range(len(pairs))}


def _fingerprint(config: LanguagesConfig) -> str:
    facts = {
        **{name: getattr(config, name) for name in ("context_length", "steps", "batch_size", "learning_rate", "pivot_share", "seed", "concepts")},
        "texts": {language: file_sha256(Path(path)) for language, path in sorted(config.texts.items())}, "pivot": file_sha256(Path(config.pivot)),
        "checkpoint": verify_receipt(config.checkpoint)["files"]["model.safetensors"]["sha256"],
    }  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def main(argv: list[str]) -> int:
    """`mclip train-languages`."""
    config = tyro.cli(LanguagesConfig, args=argv, prog="mclip train-languages", description=__doc__)
    out = train_languages(config)
    figures: dict[str, Any] = json.loads((out / "receipt.json").read_text(encoding="utf-8"))["figures"]
    sys.stdout.write(f"{out}: {len(figures['languages'])} languages, {figures['translations']:,} translations of {figures['concepts']:,} texts, {figures['seconds']:.0f} s\n")
    return 0
