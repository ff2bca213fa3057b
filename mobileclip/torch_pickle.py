"""State dicts inside files that torch.save wrote, opened without running anything that they hold.

Unpickling can call any function, so only torch's restricted unpickler (weights_only=True) is used. The zip format of torch 1.6
and later is memory mapped: tensors are read from the disk when they are first touched.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import CheckpointError, MissingExtraError

if TYPE_CHECKING:
    from torch import Tensor

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training programs keep the weights, beside optimisers and counters."""

_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
"""The number that torch before 1.6 pickled first, after the two bytes of the protocol."""

_SAFE = "ask its author for a .safetensors file or a plain state dict"


def open_pickle(path: Path) -> dict[str, Tensor]:
    """The state dict of a torch file, unwrapped. Tensors may still lie on the disk.

    Raises:
        CheckpointError: not a torch file, damaged, would run code, or holds something else than named tensors.
        MissingExtraError: torch is not installed.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise MissingExtraError("torch", "train", f"reading '{path}', a torch pickle,") from None
    if path.suffix == ".safetensors":  # torch.load goes by the name
        raise CheckpointError(f"'{path}' is a torch pickle under the name of another format, so nobody would expect one; rename it to {path.stem}.pt")
    with path.open("rb") as file:
        head = file.read(14)
    zipped = head.startswith(b"PK")
    if zipped:
        _check_archive(path)
    elif not _LEGACY_MAGIC.startswith(head[2:]):
        raise CheckpointError(
            f"'{path}' is a plain pickle that torch.save did not write, and opening one runs whatever code it holds, so it is refused; {_SAFE}"
        )
    try:
        with warnings.catch_warnings():  # about old formats and slow checks: nothing that the reader of a refusal needs beside it
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch and pickle raise a dozen types for a damaged file
        raise CheckpointError(_refusal(path, str(error) or type(error).__name__)) from None
    return _state(path, _unwrapped(path, found))


def _check_archive(path: Path) -> None:
    """A zip that torch.save could have written: whole, uncompressed, with one pickle of tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # zipfile raises half a dozen types for a damaged directory
        raise CheckpointError(
            f"'{path}' is cut off or damaged: it starts like a torch file (zip), but its directory at the end cannot be read ({error}); download it again"
        ) from None
    names = [member.filename for member in members]
    if any(name.endswith(".npy") for name in names):
        raise CheckpointError(f"'{path}' is a NumPy archive (as JAX programs write), expected PyTorch weights; convert it to .safetensors first")
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(f"'{path}' is a TorchScript program, not weights; save the state_dict of the model that it was made from, or {_SAFE}")
    if not any(name.endswith("/data.pkl") for name in names):
        raise CheckpointError(f"'{path}' is a zip of {', '.join(names[:3]) or 'nothing'}, not a file that torch.save wrote; unpack it, or {_SAFE}")
    squeezed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
    if squeezed:
        raise CheckpointError(f"'{path}' holds compressed entries ({squeezed[0]}), which torch.save never writes; {_SAFE}")


def _refusal(path: Path, message: str) -> str:
    """One sentence for what torch raised."""
    unknown = re.search(r"GLOBAL ([\w.]+)", message) or re.search(r"but got <class '([\w.]+)'>", message)
    if unknown or "nsupported" in message:
        named = f"'{unknown[1]}'" if unknown else "something"
        return (
            f"'{path}' is refused: beside tensors it names {named}, which only a full unpickler can make, and that would run code from the file "
            f"(weights_only=True does not); {_SAFE}"
        )
    if re.search(r"unexpected EOF|Ran out of input|pickle data was truncated|failed finding central|EOFError|index out of range|requires a buffer", message):
        return f"'{path}' is cut off: it ends before the tensors that it announces; download it again"
    reason = next((line.split("error:")[-1].strip() for line in message.splitlines() if "error:" in line), (message.splitlines() or ["?"])[0])
    return f"'{path}' cannot be read as a file that torch.save wrote, with weights_only=True ({reason[:200]}); download it again, or {_SAFE}"


def _unwrapped(path: Path, found: Any) -> dict[Any, Any]:
    """The dict of tensors itself, out of {"state_dict": {…}, "epoch": 3, …}."""
    import torch

    if not isinstance(found, dict):
        raise CheckpointError(f"'{path}' holds a {type(found).__name__}, expected a dict of named tensors; {_SAFE}")
    wrapped = [key for key in WRAPPERS if isinstance(found.get(key), dict) and any(isinstance(value, torch.Tensor) for value in found[key].values())]
    if not wrapped:
        return found
    loose = [str(key) for key, value in found.items() if isinstance(value, torch.Tensor)]
    if len(wrapped) > 1 or loose:
        raise CheckpointError(
            f"'{path}' holds tensors in several places ({', '.join((wrapped + loose)[:5])}), so which are the weights is not sure; "
            "save the dict that you mean as a file of its own"
        )
    return found[wrapped[0]]


def _state(path: Path, found: dict[Any, Any]) -> dict[str, Tensor]:
    """Only plain tensors under string names; lone numbers and words (an epoch, a name) are left out."""
    import torch

    state, odd = {}, []
    for name, value in found.items():
        if isinstance(value, torch.Tensor) and isinstance(name, str):
            state[name] = _plain(path, name, value)
        elif not isinstance(name, str) or not isinstance(value, int | float | str | type(None)):
            odd.append(f"{name} ({type(value).__name__})")
    if odd:
        raise CheckpointError(
            f"'{path}' holds {len(odd)} entries that are not tensors: {', '.join(odd[:5])}{' …' if len(odd) > 5 else ''}; "
            f"expected a dict of named tensors, alone or under {', '.join(map(repr, WRAPPERS))}; save that dict as a file of its own"
        )
    return state


def _plain(path: Path, name: str, tensor: Tensor) -> Tensor:
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        what = "quantised" if tensor.is_quantized else f"{type(tensor).__name__} on {tensor.device.type}, {tensor.layout}"
        raise CheckpointError(f"'{path}' holds '{name}' as a special tensor ({what}), expected plain dense ones with their values; {_SAFE}")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"'{path}' holds '{name}' {tuple(tensor.shape)} over fewer stored values than it shows; {_SAFE}")
    return tensor.detach()
