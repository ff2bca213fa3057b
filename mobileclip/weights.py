"""Reading weights that somebody else wrote: safetensors or torch pickles, recognised by their content, never by trust.

Nothing is executed and nothing is half-read: every damage, lie or surprise ends in one sentence that names the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mobileclip.safetensors_header import Entry, read_header
from runtime.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
"""File names that may hold weights, the preferred first."""

PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""

_WIDENED = ("float16", "bfloat16")
_KEPT = ("float32", "int64", "int32", "bool")

# Resuming needs these beside the weights; they are never the weights.
_NOT_WEIGHTS = ("optimizer", "optimiser", "scheduler", "scaler", "training_args", "rng_state", "random_states")

_FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "run 'git lfs pull' where it comes from, or download the file"),
    (b"\x89HDF", "an HDF5 file (TensorFlow, Keras)", "convert it to .safetensors first"),
    (b"\x93NUMPY", "a NumPy array (as JAX programs write)", "convert it to .safetensors first"),
    (b"GGUF", "a GGUF file", "take the PyTorch weights that it was made from"),
    (b"<", "a web page or XML, as servers send instead of a file", "download it again, logged in if that is needed"),
    (b"{", "JSON text", "give the weights file beside it"),
)
_FOREIGN_NAMES = (
    (".msgpack", "a Flax (JAX) file"),
    (".h5", "a Keras file"),
    (".index", "part of a TensorFlow checkpoint"),
    (".data-00000-of-00001", "part of a TensorFlow checkpoint"),
    (".pb", "a TensorFlow graph"),
    (".tflite", "a LiteRT model"),
    (".onnx", "an ONNX model"),
    (".gguf", "a GGUF file"),
)

T = TypeVar("T")


def read_weights(path: str | os.PathLike[str], *, allow_nonfinite: bool = False) -> dict[str, Tensor]:
    """Named tensors of a weights file, float32 (float16 and bfloat16 are widened, which is exact) or integer.

    Unchanged tensors stay memory mapped where the format allows: they are views of the file, to be copied into a model.
    A state dict under "state_dict", "model_state_dict" or "model" is unwrapped; prefixes that all names share and that
    training puts there ("module.", "_orig_mod.") are removed. float64 is refused, because rounding it would be silent; int8
    and smaller are refused, because quantised values mean nothing without their scales.

    Args:
        allow_nonfinite: accept NaN and infinite values.

    Raises:
        CheckpointError: missing, damaged, of another format, would run code, other things than tensors, no tensors, values
            that are not finite.
        MissingExtraError: torch is not installed.
    """
    path = Path(path)
    state = _tensors(path)
    odd = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()} - {*_WIDENED, *_KEPT})
    if odd:
        names = [name for name, tensor in state.items() if str(tensor.dtype).removeprefix("torch.") in odd]
        raise CheckpointError(
            f"'{path}' holds {len(names)} tensors as {', '.join(odd)} ({_some(names)}), expected float32, float16 or bfloat16; "
            "save it again with each tensor turned to float32 (dequantised, if it was quantised)"
        )
    if not allow_nonfinite:
        _check_finite(path, state)
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def weight_entries(path: str | os.PathLike[str]) -> dict[str, Entry]:
    """dtype (as stored) and shape of every tensor, named as `read_weights` names them; a safetensors file needs no torch for it.

    Raises:
        CheckpointError, MissingExtraError: as `read_weights`, but values are not looked at.
    """
    path = Path(path)
    if container(path) == "safetensors":
        return _named(path, read_header(path))
    return {name: Entry(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in _tensors(path).items()}


def weight_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor; see `weight_entries`."""
    return {name: entry.shape for name, entry in weight_entries(path).items()}


def container(path: Path) -> str:
    """ "safetensors" or "pickle": what the first bytes of a file are, whatever its name.

    Raises:
        CheckpointError: no such file, not readable, or neither of the two.
    """
    if path.is_dir():
        raise CheckpointError(f"'{path}' is a folder, expected a weights file; give the file in it")
    if not path.is_file():
        raise CheckpointError(f"'{path}' {'is no regular file' if path.exists() else 'does not exist'}; give the path of a .safetensors or .pt file")
    try:
        with path.open("rb") as file:
            head = file.read(64)
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read ({error.strerror or error}); check its permissions") from None
    if not head:
        raise CheckpointError(f"'{path}' is empty (0 bytes): writing or downloading it failed; fetch it again")
    json_follows = head[8:9] == b"{"
    if json_follows and int.from_bytes(head[:8], "little") <= size - 8:
        return "safetensors"
    if head[:4] == b"PK\x03\x04" or (head[0] == 0x80 and head[1:2] in (b"\2", b"\3", b"\4", b"\5") and not json_follows):
        return "pickle"
    for magic, what, do in _FOREIGN:
        if head.lstrip().startswith(magic):
            raise CheckpointError(f"'{path}' is {what}, expected PyTorch weights (.safetensors or .pt); {do}")
    for suffix, what in _FOREIGN_NAMES:
        if path.name.lower().endswith(suffix):
            raise CheckpointError(f"'{path}' is {what} by its name, expected PyTorch weights (.safetensors or .pt); convert it first, or take those")
    if path.suffix.lower() == ".safetensors" or json_follows:
        return "safetensors"  # its header tells what is wrong
    raise CheckpointError(f"'{path}' is of no known kind (it starts with {head[:8]!r}); expected weights: safetensors, or a file that torch.save wrote")


def _tensors(path: Path) -> dict[str, Tensor]:
    """All tensors as stored, prefixes removed, at least one."""
    if container(path) == "pickle":
        from mobileclip.torch_pickle import open_pickle

        return _named(path, open_pickle(path))
    read_header(path)  # says what is wrong in words of its own, where the library gives a code
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        from runtime.errors import MissingExtraError

        raise MissingExtraError(error.name or "torch", "train", f"reading the tensors of '{path}'") from None
    try:
        return _named(path, load_file(path))
    except (SafetensorError, OSError, AttributeError) as error:
        raise CheckpointError(f"'{path}' cannot be read as safetensors ({error}); download it again") from None


def _named(path: Path, found: dict[str, T]) -> dict[str, T]:
    if not found:
        raise CheckpointError(f"'{path}' holds no tensors; give the file that holds the weights")
    while prefix := next((prefix for prefix in PREFIXES if all(name.startswith(prefix) and name != prefix for name in found)), None):
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _check_finite(path: Path, state: dict[str, Tensor]) -> None:
    """Refuse NaN and infinities. The extremes of a tensor show them in one pass without a copy."""
    import torch

    bad = []
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                bad.append(name)
    if bad:
        raise CheckpointError(
            f"'{path}' holds values that are not finite in {len(bad)} of {len(state)} tensors ({_some(bad)}): training diverged or the file is damaged; "
            "take another checkpoint, or pass allow_nonfinite=True to read it all the same"
        )


def weights_candidates(names: Iterable[str]) -> list[str]:
    """Which of a folder's file names may hold its weights; of the same weights in two formats only the better one."""
    best: dict[str, str] = {}
    for name in sorted(names):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() not in SUFFIXES or name.startswith((".", *_NOT_WEIGHTS)) or "/" in name:
            continue
        stem = stem.replace("pytorch_model", "model")  # pytorch_model.bin is model.safetensors, open_clip_pytorch_model.bin likewise
        if stem not in best or SUFFIXES.index(suffix.lower()) < SUFFIXES.index(os.path.splitext(best[stem])[1].lower()):
            best[stem] = name
    return sorted(best.values())


def find_weights(folder: str | os.PathLike[str]) -> Path:
    """The weights file of a folder: `model.safetensors` of a folder of ours, else the only candidate.

    Raises:
        CheckpointError: no folder, no candidate, or several.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"'{folder}' {'is no folder' if folder.exists() else 'does not exist'}; give a folder that holds weights")
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    if {"model.safetensors", "config.json", "receipt.json"} <= set(names):
        return folder / "model.safetensors"
    return folder / the_weights(names, f"'{folder}'")


def the_weights(names: Iterable[str], where: str) -> str:
    """The only weights file among names. Raises CheckpointError, which begins with `where`, when there is none or a choice."""
    names = sorted(names)
    found = weights_candidates(names)
    if not found:
        holds = f"it holds {_some(names)}" if names else "it holds no files"
        raise CheckpointError(f"{where} has no weights: {holds}; expected a file *{', *'.join(SUFFIXES)}; give the folder or file that has them")
    if len(found) > 1:
        raise CheckpointError(f"{where} has {len(found)} files that may be the weights: {_some(found)}; give the path of the one that you mean")
    return found[0]


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
