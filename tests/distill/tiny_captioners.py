"""Captioners for tests: callables, and tiny models with random weights saved as published ones are."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distill.captioners import CaptionerFacts, Draft, Request

WORDS = ("red", "green", "blue", "yellow", "disc", "square", "stripe", "a", "the", "of")


class Colours:
    """Says the mean colour, and a word drawn by the caption's first uniform."""

    facts = CaptionerFacts(name="colours", licence="MIT", sha256="c0")
    most_uniforms = 2

    def caption(self, requests: Sequence[Request]) -> list[list[Draft]]:
        time.sleep(float(os.environ.get("TINY_DELAY", "0")))
        out = []
        for request in requests:
            level = int(np.asarray(request.picture).mean())
            words = [[WORDS[int(random * len(WORDS))] for random in row] for row in request.uniforms]
            out.append([Draft(text=f"{level} {words[n][0]}. And {words[n][1]}") for n in range(request.count)])
        return out


def colours() -> Colours:
    return Colours()


class Fragile(Colours):
    """Breaks on one picture, as a model does whose activations overflow."""

    def caption(self, requests: Sequence[Request]) -> list[list[Draft]]:
        if any(request.key == "s0-03" for request in requests):
            raise FloatingPointError("the captioner's logits are not finite")
        return super().caption(requests)


def fragile() -> Fragile:
    return Fragile()


class Deaf(Colours):
    def caption(self, requests: Sequence[Request]) -> Any:
        return [["no drafts"] for _ in requests]


def deaf() -> Deaf:
    return Deaf()


def sizes(pictures: list[Image.Image]) -> list[str]:
    """A plain function, one caption a picture."""
    return [f"{picture.width} by {picture.height}" for picture in pictures]


def not_a_captioner() -> str:
    return "no"


COCA = {
    "embed_dim": 32, "custom_text": True,
    "multimodal_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1, "attn_pooler_heads": 2},
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16, "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4,
                   "output_tokens": True},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1, "embed_cls": True, "output_tokens": True},
}  # fmt: skip


def register_coca(folder: Path) -> str:
    """A small CoCa under a name that open_clip knows from now on."""
    import open_clip

    (folder / "coca_tiny.json").write_text(json.dumps(COCA))
    open_clip.add_model_config(folder / "coca_tiny.json")
    return "coca_tiny"


def tokenizer(folder: Path, *extra: str) -> Any:
    """A word tokenizer of twenty words, as transformers save one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", *extra, *WORDS, "caption", "rewrite", "picture", "Describe", "in", "one", ":", "."]
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace() if not extra else pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "sep_token": "[EOS]", "additional_special_tokens": list(extra)}
    made = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=64, **names)
    made.save_pretrained(folder)
    return made


def image_processor(folder: Path) -> Any:
    from transformers import CLIPImageProcessor

    made = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    made.save_pretrained(folder)
    return made


def save_blip(folder: Path) -> Path:
    """BLIP: an image-to-text model without instructions."""
    import torch
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor

    words = tokenizer(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "projection_dim": 16}
    text = {**sizes, "vocab_size": len(words), "encoder_hidden_size": 16, "max_position_embeddings": 32, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    BlipProcessor(image_processor(folder), words).save_pretrained(folder)
    return folder


def save_encoder_decoder(folder: Path) -> Path:
    """A vision encoder with a GPT-2 decoder, saved without a processor."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, VisionEncoderDecoderModel, ViTConfig, ViTModel

    words = tokenizer(folder)
    image_processor(folder)
    torch.manual_seed(0)
    encoder = ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16))
    decoder = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, vocab_size=len(words), add_cross_attention=True, bos_token_id=2, eos_token_id=3))
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 2
    model.config.pad_token_id = model.generation_config.pad_token_id = 0
    model.config.eos_token_id = model.generation_config.eos_token_id = 3
    model.save_pretrained(folder)
    return folder


def save_llava(folder: Path) -> Path:
    """LLaVA: an image-text-to-text model whose prompt holds the place of the picture."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    words = tokenizer(folder, "<image>")
    vision = CLIPVisionConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16, projection_dim=16)
    text = LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32, vocab_size=len(words), max_position_embeddings=128,
                       bos_token_id=2, eos_token_id=3, pad_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=words.convert_tokens_to_ids("<image>"), vision_feature_layer=-1)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(image_processor(folder), words, patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1).save_pretrained(folder)
    return folder


def save_language_model(folder: Path, encoder_decoder: bool = False) -> Path:
    """GPT-2 or T5 with a few words."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    words = tokenizer(folder)
    torch.manual_seed(0)
    if encoder_decoder:
        config = T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=len(words), decoder_start_token_id=0, eos_token_id=3, pad_token_id=0)
        T5ForConditionalGeneration(config).save_pretrained(folder)
    else:
        GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=128, vocab_size=len(words), bos_token_id=2, eos_token_id=3)).save_pretrained(folder)
    return folder


class Echo:
    """Reads the text alone."""

    facts = CaptionerFacts(name="echo", type="rewritten", reads="text")
    most_uniforms = 1

    def caption(self, requests: Sequence[Request]) -> list[list[Draft]]:
        return [[Draft(text=f"again {request.text}"), Draft(text=str(request.text).upper())] for request in requests]


def echo() -> Echo:
    return Echo()
