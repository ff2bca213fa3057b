"""What travels with a bundle so that every reader can check itself: pictures, texts, their tensors, the checkpoint's embeddings and logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from export.towers import embed, image_encoder, read_samples, text_encoder
from runtime.pairs import Pairs
from runtime.preprocess import PreprocessConfig, preprocess
from runtime.selfcheck import VECTORS, write_golden

HARD_TEXTS = (
    "", "!", "A Photo of a CAT", "  two   spaces\tand\na line ", "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m", "cafe\u0301", "fish &amp; chips &lt;3",
    "don't, can't, it's", "1234567890 3.14 20%", "\u200bzero\u00a0width\u3000wide", "\u201cquoted\u201d \u2014 \u2026",
    "\U0001f469\u200d\U0001f680 \U0001f1eb\U0001f1f7 \u2764\ufe0f", "\u732b\u3068\u72ac \uace0\uc591\uc774", "\u043a\u043e\u0448\u043a\u0430 \u0642\u0637\u0629",
    "\u0130stanbul STRASSE \u1e9e", "<end_of_text> in the middle", "sch\u00c3\u00b6n", "word " * 200,
)  # fmt: skip
"""Texts that tokenizers written anew get wrong: case, white space, entities, accents in two forms, emoji, other scripts, special tokens, mojibake, length."""


def write_golden_inputs(work: Path, model: Any, pairs: Pairs, rows: np.ndarray, config: PreprocessConfig, tokenizer: Any) -> dict[str, Any]:
    """Write `golden/` of the bundle under construction from rows of a pairs folder, with what the checkpoint (float32, torch) makes of them.

    Returns:
        The manifest's `golden` entry.
    """
    samples, _ = read_samples(pairs, rows, config, tokenizer)
    order = {key: i for i, key in enumerate(pairs.keys)}
    pictures = [_at_most(pairs.image(order[key]), 2 * config.image_size) for key in samples.keys]
    pixels = preprocess(pictures, config)
    image_embedding, text_embedding = embed(image_encoder(model), pixels), embed(text_encoder(model), samples.tokens)
    bias = 0.0 if model.logit_bias is None else float(model.logit_bias.detach())
    return write_golden(
        work,
        images=pictures,
        texts=samples.captions,
        pixels=pixels,
        tokens=samples.tokens,
        image_embedding=image_embedding,
        text_embedding=text_embedding,
        hard_texts=HARD_TEXTS,
        hard_tokens=tokenizer(HARD_TEXTS),
        logits=image_embedding @ text_embedding.T * float(model.logit_scale.detach().exp()) + bias,
    )


def _at_most(picture: Image.Image, short_side: int) -> Image.Image:
    """The picture, shrunk when it is much larger than the model's input: golden files are for numbers, not for looking at."""
    shortest = min(picture.size)
    if shortest <= short_side:
        return picture
    return picture.resize(tuple(max(1, round(side * short_side / shortest)) for side in picture.size), Image.Resampling.BICUBIC)


def read_arrays(bundle: Path) -> dict[str, np.ndarray]:
    """The golden tensors of a bundle under construction, by name."""
    return load_file(bundle / VECTORS)
