"""Captioners made of published models: open_clip's CoCa, and what transformers' Auto classes open. `distill.captioners` calls these.

Tokens are drawn by distill/nucleus.py, whose randomness belongs to the caption; prompts, caches and stopping are the libraries'.

Shapes: B = requests, N = captions a request, T = tokens, L = uniforms a caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.captioners import CaptionerFacts, CaptionerOptions, Draft, Request
from distill.nucleus import DrawnTokens, Sampling, generate
from distill.teachers import state_hash
from runtime.errors import CheckpointError, MissingExtraError
from runtime.preprocess import PreprocessConfig, preprocess

DESCRIBE = "Describe the picture in one sentence."
REWRITE = "Rewrite this image caption in other words and keep what it says.\nCaption: {caption}\nRewritten caption:"
PUBLISHED = "as published with the weights"


def _randoms(requests: Sequence[Request]) -> tuple[int, np.ndarray]:
    """N and (B * N, L) float64, the captions of a request side by side."""
    count = max(request.count for request in requests)
    return count, np.concatenate([request.uniforms[:count] for request in requests])


# ---------------------------------------------------------------- CoCa


class CocaCaptioner:
    """CoCa (Yu et al. 2022, arXiv 2205.01917) of open_clip: the picture is encoded once, its captions are written side by side."""

    def __init__(self, facts: CaptionerFacts, model: Any, config: PreprocessConfig, tokenizer: Any, sampling: Sampling) -> None:
        self.facts, self.most_uniforms = facts, sampling.max_tokens
        self._model, self._config, self._tokenizer, self._sampling = model, config, tokenizer, sampling
        known = len(tokenizer.decoder)
        vocabulary = int(model.text_decoder.text_projection.shape[-1])
        self._end = int(tokenizer.eot_token_id)
        # The start, padding ("!" is id 0 and stays) and ids that the tokenizer cannot spell are never drawn.
        self._banned = tuple(sorted({int(tokenizer.sot_token_id), *range(known, vocabulary)} - {self._end}))

    @torch.inference_mode()
    def caption(self, requests: Sequence[Request]) -> list[list[Draft]]:
        count, randoms = _randoms(requests)
        pixels = torch.from_numpy(preprocess([request.picture for request in requests if request.picture is not None], self._config))
        latent, embeddings = self._model._encode_image(pixels)
        latent, embeddings = latent.repeat_interleave(count, 0), embeddings.repeat_interleave(count, 0)
        tokens = torch.zeros(len(latent), 0, dtype=torch.int64)
        place = torch.arange(len(latent))

        def step(last: Tensor, rows: Tensor) -> Tensor:
            nonlocal tokens, place
            kept = torch.isin(place, rows)
            tokens, place = torch.cat([tokens[kept], last[:, None]], dim=1), rows
            return self._model(None, tokens, image_latent=latent[rows], image_embs=embeddings[rows], output_labels=False)["logits"][:, -1]

        first = torch.full((len(latent),), int(self._tokenizer.sot_token_id))
        ids = generate(step, first, randoms, self._sampling, self._end, self._banned)
        texts = [self._tokenizer.decode(row) for row in ids]
        return [[Draft(text=text) for text in texts[n * count : (n + 1) * count][: request.count]] for n, request in enumerate(requests)]


def open_coca(name: str, options: CaptionerOptions) -> CocaCaptioner:
    """`NAME[/PRETRAINED]`. Raises CheckpointError, MissingExtraError."""
    try:
        import open_clip
    except ImportError:
        raise MissingExtraError("open_clip_torch", "teachers", f"captioner 'coca:{name}'") from None
    model_name, _, pretrained = name.partition("/")
    if model_name not in open_clip.list_models():
        raise CheckpointError(f"open_clip {open_clip.__version__} has no model '{model_name}'; its captioners are {', '.join(n for n in open_clip.list_models() if 'coca' in n)}")
    if "multimodal_cfg" not in (open_clip.get_model_config(model_name) or {}):
        raise CheckpointError(f"open_clip's model '{model_name}' has no text decoder and cannot caption; take a CoCa, such as coca_ViT-L-14")
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, _, _ = open_clip.create_model_and_transforms(model_name, pretrained=pretrained or None)
            if not pretrained:
                _draw_decoder(model)
    except (RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(f"open_clip cannot load '{model_name}' with weights '{pretrained}' ({_line(error)}); check the tag, the path and the network") from error
    room = int(model.context_length) - 1
    if options.sampling.max_tokens > room:
        raise CheckpointError(f"--max-tokens is {options.sampling.max_tokens}, but '{model_name}' reads {room} tokens after the start; ask for fewer")
    known = open_clip.get_model_preprocess_cfg(model)
    size = known["size"] if isinstance(known["size"], int) else known["size"][0]
    config = PreprocessConfig(image_size=size, mean=tuple(known["mean"]), std=tuple(known["std"]), interpolation=known["interpolation"])
    facts = CaptionerFacts(
        name=f"coca:{name}", source=f"open_clip {open_clip.__version__}", sha256=state_hash(model),
        licence=PUBLISHED if pretrained else "none (random weights)", settings={"image_size": size},
    )  # fmt: skip
    return CocaCaptioner(facts, model.eval(), config, open_clip.get_tokenizer(model_name), options.sampling)


def _draw_decoder(model: Any) -> None:
    """Random weights for the text decoder: open_clip leaves its output projection as the memory was."""
    with torch.no_grad():
        for parameter in model.text_decoder.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.02)


# ---------------------------------------------------------------- transformers


class _Generator:
    """generate() of a transformers model, with tokens drawn by their own uniforms."""

    def __init__(self, model: Any, tokenizer: Any, sampling: Sampling) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.ends = tuple(sorted(_ids(model.generation_config.eos_token_id) | _ids(getattr(tokenizer, "eos_token_id", None)) | _ids(getattr(tokenizer, "sep_token_id", None))))

    def __call__(self, inputs: Any, count: int, randoms: np.ndarray) -> list[str]:
        """Texts of B * N captions, what was given left out."""
        given = inputs.get("input_ids")
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):  # its own draw has one token to choose from
            tokens = self.model.generate(
                **inputs, max_new_tokens=self.sampling.max_tokens, min_new_tokens=0, do_sample=True, num_beams=1, num_return_sequences=count, top_k=0, top_p=1.0, temperature=1.0,
                logits_processor=[DrawnTokens(randoms, self.sampling, self.ends)],
            )  # fmt: skip
        if given is not None and tokens.shape[1] >= given.shape[1] and bool((tokens[:, : given.shape[1]] == given.repeat_interleave(count, 0)).all()):
            tokens = tokens[:, given.shape[1] :]
        return [str(text) for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def _ids(value: Any) -> set[int]:
    return set() if value is None else {int(value)} if isinstance(value, int) else {int(n) for n in value}


class ImageToText:
    """An image-to-text model (BLIP, GIT, encoder-decoder) or an image-text-to-text model (LLaVA and its like) with a prompt."""

    def __init__(self, facts: CaptionerFacts, processor: Any, write: _Generator, prompt: str | None, device: str) -> None:
        self.facts, self.most_uniforms = facts, write.sampling.max_tokens
        self._processor, self._write, self._prompt, self._device = processor, write, prompt, device

    def caption(self, requests: Sequence[Request]) -> list[list[Draft]]:
        count, randoms = _randoms(requests)
        pictures = [request.picture for request in requests]
        if self._prompt is None:
            inputs = self._processor(images=pictures, return_tensors="pt")
        else:
            inputs = self._processor(images=pictures, text=[self._prompt] * len(pictures), return_tensors="pt", padding=True)
        texts = self._write(inputs.to(self._device), count, randoms)
        return [[Draft(text=text) for text in texts[n * count : (n + 1) * count][: request.count]] for n, request in enumerate(requests)]


def open_image_to_text(name: str, options: CaptionerOptions) -> ImageToText:
    """A model by hub name or folder. Raises CheckpointError, MissingExtraError."""
    transformers = _library(f"captioner 'transformers:{name}'")
    model = _load(transformers.AutoModelForImageTextToText, name, options.device)
    try:
        processor = transformers.AutoProcessor.from_pretrained(name)
        if not hasattr(processor, "tokenizer"):
            raise ValueError("no processor of pictures and texts")
    except (OSError, ValueError, KeyError):
        processor = _Pair(_load(transformers.AutoImageProcessor, name), _load(transformers.AutoTokenizer, name))
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    prompt = _picture_prompt(processor, options.prompt)
    facts = _facts(f"transformers:{name}", transformers, model, {"prompt": prompt or "", "model_type": model.config.model_type})
    return ImageToText(facts, processor, _Generator(model, tokenizer, options.sampling), prompt, options.device)


class _Pair:
    """An image processor and a tokenizer side by side, for models that were saved without a processor."""

    def __init__(self, images: Any, tokenizer: Any) -> None:
        self.images, self.tokenizer = images, tokenizer

    def __call__(self, images: Any, text: Any = None, **options: Any) -> Any:
        found = self.images(images=images, return_tensors="pt")
        if text is not None:
            found.update(self.tokenizer(text, **options))
        return found


def _picture_prompt(processor: Any, asked: str | None) -> str | None:
    """The text that stands beside the picture: through the chat template or the image token of a model that has one."""
    token = getattr(processor, "image_token", None)
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": asked or DESCRIBE}]
        return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False))
    return f"{token}\n{asked or DESCRIBE}" if token else asked


class Rewriter:
    """A language model that says the pair's own caption in other words (LaCLIP, Fan et al. 2023, arXiv 2305.20088)."""

    def __init__(self, facts: CaptionerFacts, write: _Generator, prompt: str, device: str) -> None:
        self.facts, self.most_uniforms = facts, write.sampling.max_tokens
        self._write, self._prompt, self._device = write, prompt, device

    def caption(self, requests: Sequence[Request]) -> list[list[Draft]]:
        count, randoms = _randoms(requests)
        tokenizer = self._write.tokenizer
        prompts = [self._prompt.replace("{caption}", request.text or "") for request in requests]
        if getattr(tokenizer, "chat_template", None):
            prompts = [tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False) for prompt in prompts]
        room = min(int(getattr(self._write.model.config, "max_position_embeddings", 0) or 1 << 20), int(tokenizer.model_max_length)) - self._write.sampling.max_tokens
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, truncation=True, max_length=max(room, 8)).to(self._device)
        inputs.pop("token_type_ids", None)
        texts = self._write(inputs, count, randoms)
        drafts = [Draft(text=next((line for line in text.splitlines() if line.strip()), "").strip(" \"'")) for text in texts]  # what follows is talk
        return [drafts[n * count : (n + 1) * count][: request.count] for n, request in enumerate(requests)]


def open_rewriter(name: str, options: CaptionerOptions) -> Rewriter:
    """A causal or sequence-to-sequence model by hub name or folder. Raises CheckpointError, MissingExtraError."""
    prompt = options.prompt or REWRITE
    if "{caption}" not in prompt:
        raise CheckpointError(f"the prompt {prompt!r} has no place for the caption; write {{caption}} where it belongs")
    transformers = _library(f"captioner 'rewrite:{name}'")
    config = _load(transformers.AutoConfig, name)
    model = _load(transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM, name, options.device)
    tokenizer = _load(transformers.AutoTokenizer, name)
    tokenizer.padding_side, tokenizer.truncation_side = "left", "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    facts = _facts(f"rewrite:{name}", transformers, model, {"prompt": prompt, "model_type": model.config.model_type}, type="rewritten", reads="text")
    return Rewriter(facts, _Generator(model, tokenizer, options.sampling), prompt, options.device)


def _library(purpose: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("transformers", "captions", purpose) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _load(auto: Any, name: str, device: str | None = None) -> Any:
    try:
        found = auto.from_pretrained(name)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise CheckpointError(f"transformers' {auto.__name__} cannot open '{name}' ({_line(error)}); give a folder or a hub name of such a model, and check the network") from error
    return found if device is None else found.eval().to(device)


def _facts(name: str, transformers: Any, model: Any, settings: dict[str, Any], **kind: Any) -> CaptionerFacts:
    return CaptionerFacts(name=name, source=f"transformers {transformers.__version__}", sha256=state_hash(model), licence=PUBLISHED, settings=settings, **kind)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:199] + "…"
