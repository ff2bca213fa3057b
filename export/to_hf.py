"""A folder as Hugging Face's libraries lay it out: transformers.js (Node, browsers) loads its towers, tokenizer and preprocessing by name.

    hf/config.json  preprocessor_config.json  tokenizer.json  tokenizer_config.json
    hf/onnx/vision_model.onnx   pixel_values float32 (batch, 3, H, W)  ->  image_embeds float32 (batch, D), unit norm
    hf/onnx/text_model.onnx     input_ids int64 (batch, any length)    ->  text_embeds float32 (batch, D), unit norm
    hf/onnx/*_quantized.onnx    the same in int8 ("q8" there, the default in browsers)

The towers load as `CLIPVisionModelWithProjection` and `CLIPTextModelWithProjection`. There is no `model.onnx` of both in one,
which is what the ready-made pipeline for zero-shot classification asks for.

transformers.js pads a batch to its longest text and cuts long texts at the end, the final special token included. The text graph
makes good both: it pads to the tower's own length, and puts the end back on rows that lost it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.draft import Draft, Job
from export.to_onnx import OnnxEncoder, write_onnx
from export.to_onnx import require as require  # the same exporter
from export.towers import INPUT_NAMES, OUTPUT_NAMES
from runtime.errors import CheckpointError
from runtime.files import write_json, write_whole
from runtime.manifest import Artefact, Manifest

PRECISIONS = ("fp32", "int8")
EXTRA = "export"
STEMS = {"image": "vision_model", "text": "text_model"}
_NAMES = {"image": ("pixel_values", "image_embeds"), "text": ("input_ids", "text_embeds")}
_SUFFIXES = {"fp32": "", "int8": "_quantized"}
_DTYPES = {"fp32": "fp32", "int8": "q8"}  # as transformers.js calls them
_SPECIALS = {"bos_token": ("<start_of_text>", "[CLS]"), "eos_token": ("<end_of_text>", "[SEP]"), "unk_token": ("[UNK]", "<end_of_text>")}


def drafts(job: Job, precisions: Sequence[str]) -> Iterator[Draft]:
    """`hf/onnx/vision_model.onnx` or `text_model.onnx` of the job's tower, dynamic batch, and its int8 form."""
    import onnxruntime

    for precision in precisions:
        path = f"hf/onnx/{STEMS[job.tower]}{_SUFFIXES[precision]}.onnx"
        graph = renamed(job.onnx if precision == "fp32" else job.onnx_int8, job.tower)
        if job.tower == "text":
            text = job.model.config.text
            take_ids(graph, pad_id=text.pad_id, end_id=text.vocab_size - 1 if text.tokenizer == "clip" else None)
        encoder = OnnxEncoder(write_onnx(graph, job.folder / path))
        yield Draft(
            tower=job.tower, target="hf", precision=precision, path=path, run=_Int64(encoder) if job.tower == "text" else encoder, batch="dynamic",
            how=f"onnxruntime {onnxruntime.__version__}, not transformers.js", facts={"transformers_js_dtype": _DTYPES[precision]},
        )  # fmt: skip


class _Int64:
    """Tokens int32 (N, T) as JavaScript hands them over."""

    def __init__(self, encoder: OnnxEncoder) -> None:
        self.encoder = encoder

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        return self.encoder(tokens.astype(np.int64))


def renamed(model: onnx.ModelProto, tower: str) -> onnx.ModelProto:
    """A copy whose input and output have the names that the libraries look for."""
    names = dict(zip((INPUT_NAMES[tower], OUTPUT_NAMES[tower]), _NAMES[tower], strict=True))
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    for value in (*copied.graph.input, *copied.graph.output):
        value.name = names.get(value.name, value.name)
    for node in copied.graph.node:
        for place in (node.input, node.output):
            for n, name in enumerate(place):
                place[n] = names.get(name, name)
    return copied


def take_ids(model: onnx.ModelProto, *, pad_id: int, end_id: int | None) -> None:
    """Let a text graph take int64 ids of any length, in place: cut or padded to the tower's own length T.

    Args:
        pad_id: fills a row's rest.
        end_id: the largest id of the vocabulary, with which every text ends; a row without it was cut, and gets it at its last place.
            None: rows stay as they come.
    """
    (entry,) = (value for value in model.graph.input if value.name == "input_ids")
    length = entry.type.tensor_type.shape.dim[1].dim_value
    constants = {"zero": [0], "one": [1], "before_last": [length - 1], "length": [length], "room": [0, 0, 0, length]}
    model.graph.initializer.extend(numpy_helper.from_array(np.array(value, np.int64), f"ids_{name}") for name, value in constants.items())
    model.graph.initializer.append(numpy_helper.from_array(np.array(pad_id, np.int32), "ids_pad"))
    for node in model.graph.node:
        for n, name in enumerate(node.input):
            node.input[n] = "ids_whole" if name == "input_ids" else name
    cut = "ids_cut" if end_id is not None else "ids_whole"
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["ids_int32"], to=TensorProto.INT32),
        helper.make_node("Pad", ["ids_int32", "ids_room", "ids_pad"], ["ids_padded"]),
        helper.make_node("Slice", ["ids_padded", "ids_zero", "ids_length", "ids_one"], [cut]),
    ]
    if end_id is not None:
        model.graph.initializer.append(numpy_helper.from_array(np.array(end_id, np.int32), "ids_end"))
        nodes += [
            helper.make_node("ReduceMax", [cut, "ids_one"], ["ids_largest"], keepdims=1),
            helper.make_node("Less", ["ids_largest", "ids_end"], ["ids_was_cut"]),
            helper.make_node("Slice", [cut, "ids_zero", "ids_before_last", "ids_one"], ["ids_head"]),
            helper.make_node("Slice", [cut, "ids_before_last", "ids_length", "ids_one"], ["ids_last"]),
            helper.make_node("Where", ["ids_was_cut", "ids_end", "ids_last"], ["ids_tail"]),
            helper.make_node("Concat", ["ids_head", "ids_tail"], ["ids_whole"], axis=1),
        ]
    for place, node in enumerate(nodes):
        node.name = node.output[0]
        model.graph.node.insert(place, node)
    entry.type.tensor_type.elem_type = TensorProto.INT64
    entry.type.tensor_type.shape.dim[1].dim_param = "sequence"
    onnx.checker.check_model(model)


def finish(bundle: Path, manifest: Manifest, model: Any, settings: dict[str, Any]) -> tuple[Artefact, ...]:
    """Write the files that both towers share."""
    write_hf_files(bundle / "hf", model.config, manifest.image.preprocess_config(), bundle / "tokenizer.json", logit_scale=manifest.logit_scale)
    return ()


def write_hf_files(
    folder: str | os.PathLike[str], model_config: Any, preprocess_config: Any, tokenizer_path: str | os.PathLike[str], *, logit_scale: float | None = None
) -> list[Path]:
    """Write what the towers share; call it once, after the towers that are to stay lie in `folder / "onnx"`.

    Args:
        folder: the `hf` folder.
        model_config: a `ModelConfig`.
        preprocess_config: a `PreprocessConfig`. JavaScript resizes with other code than PIL, so pixels differ a little there.
        tokenizer_path: the checkpoint's tokenizer.json, copied as it is. Readers in other languages apply the file's own normaliser (white space,
            lower case), not ftfy and HTML unescaping.
        logit_scale: multiplicative; None takes the config's initial value.

    Returns:
        The files written, in order of their names.

    Raises:
        CheckpointError: the tokenizer file is missing or is not one, or has no token of the config's padding id.
    """
    folder, tokenizer_path = Path(folder), Path(tokenizer_path)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        data = tokenizer_path.read_bytes()
        described = json.loads(data)
        vocabulary = {**described["model"]["vocab"], **{token["content"]: token["id"] for token in described.get("added_tokens", [])}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{tokenizer_path.name} cannot be read as a tokenizer ({type(error).__name__}); expected the JSON that `tokenizers` saves") from error
    text, image = model_config.text, model_config.image
    padding = next((token for token, n in vocabulary.items() if n == text.pad_id), None)
    if padding is None:
        raise CheckpointError(f"{tokenizer_path.name} has no token of the id {text.pad_id}, with which the config pads; use the tokenizer that the model was trained with")
    specials = {key: next((token for token in tokens if token in vocabulary), padding) for key, tokens in _SPECIALS.items()}
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model_config.embed_dim,
        "logit_scale_init_value": math.log(logit_scale or model_config.logit_scale),
        "text_config": {
            "model_type": "clip_text_model", "vocab_size": text.vocab_size, "hidden_size": text.width, "intermediate_size": round(text.width * text.mlp_ratio),
            "num_hidden_layers": text.layers, "num_attention_heads": text.heads, "max_position_embeddings": text.context_length,
            "projection_dim": model_config.embed_dim, "pad_token_id": text.pad_id,
            "bos_token_id": vocabulary[specials["bos_token"]], "eos_token_id": vocabulary[specials["eos_token"]],
        },
        "vision_config": {"model_type": "clip_vision_model", "image_size": image.image_size, "projection_dim": model_config.embed_dim},
        "transformers.js_config": {"dtype": _dtypes(folder / "onnx")},
    }  # fmt: skip
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor", "processor_class": "CLIPProcessor", "do_convert_rgb": True,
        "do_resize": True, "size": {"shortest_edge": math.floor(preprocess_config.image_size / preprocess_config.crop_pct)},
        "resample": {"bilinear": 2, "bicubic": 3}[preprocess_config.interpolation],
        "do_center_crop": True, "crop_size": {"height": preprocess_config.image_size, "width": preprocess_config.image_size},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(preprocess_config.mean), "image_std": list(preprocess_config.std),
    }  # fmt: skip
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": text.context_length, "pad_token": padding, "padding_side": "right", **specials}
    return [
        write_json(folder / "config.json", config),
        write_json(folder / "preprocessor_config.json", preprocessor),
        write_whole(folder / "tokenizer.json", data),
        write_json(folder / "tokenizer_config.json", {**tokenizer, "clean_up_tokenization_spaces": False}),
    ]


def _dtypes(folder: Path) -> dict[str, str]:
    """Which file a reader takes unasked: the only one there is; where both lie there, the reader's own choice ("auto": q8 in browsers, fp32 in Node)."""
    found = {stem: [dtype for precision, dtype in _DTYPES.items() if (folder / f"{stem}{_SUFFIXES[precision]}.onnx").is_file()] for stem in STEMS.values()}
    return {stem: dtypes[0] if len(dtypes) == 1 else "auto" for stem, dtypes in found.items()}
