"""Checkpoints of our own layout: model.safetensors + config.json + tokenizer.json, and receipt.json written last.

A folder without a valid receipt was not finished; it is never half-loaded.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mobileclip.config import ModelConfig, config_from_dict, config_to_dict
from mobileclip.model import ImageTextModel
from mobileclip.safetensors_header import read_header
from runtime.errors import CheckpointError
from runtime.files import file_sha256, write_json
from runtime.preprocess import PreprocessConfig

FILES = ("model.safetensors", "config.json", "tokenizer.json")


def save_checkpoint(
    model: ImageTextModel,
    folder: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint folder; what stood there stays intact until every new file is complete.

    Args:
        tokenizer: a tokenizer.json to carry along. Left out, it is taken from `folder` if there is one, else built from
            the CLIP merges inside open_clip's wheel at the model's vocabulary size.
        extra: JSON-ready facts for the receipt (stage config, figures).

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    pending = {name: folder / f".{name}.{os.getpid()}" for name in FILES}
    save_file(state, pending["model.safetensors"], metadata={"format": "pt"})
    pending["config.json"].write_text(json.dumps(config_to_dict(model.config), indent=1) + "\n", encoding="utf-8")
    _place_tokenizer(model.config, folder, pending["tokenizer.json"], tokenizer)
    receipt = {
        "schema": 1,
        "kind": "checkpoint",
        "files": {name: {"sha256": file_sha256(path), "bytes": path.stat().st_size} for name, path in pending.items()},
        "tools": {package: importlib.metadata.version(package) for package in ("torch", "timm", "safetensors")},
        **(extra or {}),
    }
    (folder / "receipt.json").unlink(missing_ok=True)
    for name, path in pending.items():
        os.replace(path, folder / name)
    write_json(folder / "receipt.json", receipt)
    return folder


def _place_tokenizer(config: ModelConfig, folder: Path, out: Path, given: str | os.PathLike[str] | None) -> None:
    source = Path(given) if given is not None else folder / "tokenizer.json"
    if source.exists():
        shutil.copyfile(source, out)
    elif given is not None:
        raise CheckpointError(f"tokenizer '{given}' does not exist; give the path of a tokenizer.json")
    elif config.text.tokenizer == "clip":
        build_tokenizer(config.text.vocab_size, out)
    else:
        raise CheckpointError(f"model '{config.name}' uses a {config.text.tokenizer} tokenizer, which cannot be built here; pass tokenizer=PATH of its tokenizer.json")


def build_tokenizer(vocab_size: int, out: str | os.PathLike[str]) -> Path:
    """tokenizer.json of CLIP's BPE with the first merges up to `vocab_size` ids, from the merges in open_clip's wheel."""
    import importlib.util

    from runtime.errors import MissingExtraError
    from runtime.tokenizer import build_clip_tokenizer

    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise MissingExtraError("open_clip_torch", "train", "building CLIP's tokenizer")
    build_clip_tokenizer(Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz", vocab_size=vocab_size, out=out)
    return Path(out)


def read_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The config of a checkpoint folder, without loading its weights."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"'{folder}' is not a checkpoint: it has no config.json; expected a folder with {', '.join(FILES)}")
    try:
        return config_from_dict(json.loads(path.read_text(encoding="utf-8")), where=str(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is not JSON ({error}); restore it or write the checkpoint again") from None


def load_checkpoint(folder: str | os.PathLike[str], *, verify: bool = True) -> ImageTextModel:
    """The model of a checkpoint folder, in eval mode.

    Raises:
        CheckpointError: a file is missing, damaged or of another model; every missing, unexpected or misshapen key is listed.
    """
    folder = Path(folder)
    config = read_config(folder)
    receipt_path = folder / "receipt.json"
    if not receipt_path.is_file():
        raise CheckpointError(f"'{folder}' has no receipt.json: writing it was interrupted; run the stage that makes it again")
    if verify:
        verify_receipt(folder)
    try:
        found = read_header(folder / "model.safetensors")
        _compare({name: tuple(tensor.shape) for name, tensor in outline(config).state_dict().items()}, {name: entry.shape for name, entry in found.items()}, str(folder))
        model = build(config)
        state = load_file(folder / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"'{folder / 'model.safetensors'}' cannot be read ({error}); write the checkpoint again") from None
    load_state(model, state, where=str(folder))
    return model.eval()


def build(config: ModelConfig) -> ImageTextModel:
    """The model of a config with memory for its weights but no values in it, to be filled by `load_state`; folded where the config says so.

    Random initialisation takes most of the time of making a large model, and loading overwrites it.
    """
    shape = outline(config)
    # Buffers that no checkpoint holds must be computed again; a module that cannot is built with its values at once.
    computed = [path for path, module in shape.named_modules() if module._non_persistent_buffers_set & {name for name, value in module._buffers.items() if value is not None}]
    if all(hasattr(shape.get_submodule(path), "init_non_persistent_buffers") for path in computed):
        model = copy.deepcopy(shape).to_empty(device="cpu")
        for path in computed:
            model.get_submodule(path).init_non_persistent_buffers()
    else:
        model = _make(config)
    model.config = config
    return model


def outline(config: ModelConfig) -> ImageTextModel:
    """The model of a config on the meta device: names and shapes, no memory. Shared: copy it before changing it."""
    return _outline(json.dumps(config_to_dict(dataclasses.replace(config, name="outline", licence="", sources=()))))


@lru_cache(maxsize=4)
def _outline(config: str) -> ImageTextModel:
    with torch.device("meta"):
        return _make(config_from_dict(json.loads(config)))


def _make(config: ModelConfig) -> ImageTextModel:
    from mobileclip.folding import fold

    try:
        model = ImageTextModel(dataclasses.replace(config, folded=False))
        if config.folded:
            fold(model)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError, AssertionError, RuntimeError) as error:
        raise CheckpointError(f"no model can be built of the config of '{config.name}' ({type(error).__name__}: {str(error)[:200]}); was it written by hand?") from error
    return model


def load_state(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Compare all keys and shapes, then copy; the model is untouched when anything differs."""
    expected = model.state_dict()
    _compare({name: tuple(tensor.shape) for name, tensor in expected.items()}, {name: tuple(tensor.shape) for name, tensor in state.items()}, where)
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(state[name])


def _compare(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Names and shapes of a model and of a file; CheckpointError lists every difference."""
    problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in found]
    problems += [f"unexpected {name} {shape}" for name, shape in found.items() if name not in expected]
    problems += [f"shape of {name} is {found[name]}, expected {shape}" for name, shape in expected.items() if name in found and found[name] != shape]
    if problems:
        raise CheckpointError(f"{where}: {len(problems)} of {len(expected)} tensors do not fit the model: {'; '.join(sorted(problems))}")


def verify_receipt(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Check every file of a checkpoint against its receipt and return the receipt."""
    folder = Path(folder)
    try:
        receipt = json.loads((folder / "receipt.json").read_text(encoding="utf-8"))
        files = receipt["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"'{folder / 'receipt.json'}' cannot be read ({error!r}); write the checkpoint again") from None
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"'{folder}' lacks {name}, which its receipt lists; write the checkpoint again")
        found = file_sha256(path)
        if found != facts["sha256"]:
            raise CheckpointError(f"'{path}' has changed since it was written: sha256 is {found[:16]}…, the receipt says {facts['sha256'][:16]}…; write the checkpoint again")
    return receipt


def preprocess_config(config: ModelConfig) -> PreprocessConfig:
    """What the runtime needs to know to turn a picture into this model's pixels."""
    image = config.image
    return PreprocessConfig(
        image_size=image.image_size, mean=tuple(image.mean), std=tuple(image.std), interpolation=image.interpolation, crop_pct=image.crop_pct
    )


def open_tokenizer(folder: str | os.PathLike[str], config: ModelConfig | None = None) -> Any:
    """The runtime's tokenizer of a checkpoint folder: callable, list of strings -> int32 (B, context_length)."""
    from runtime.tokenizer import Tokenizer

    text = (config or read_config(folder)).text
    return Tokenizer.open(Path(folder) / "tokenizer.json", context_length=text.context_length, cleaning=text.cleaning, pad_id=text.pad_id)
