"""One sample of DataCompDR as it is published, decoded and checked. Nothing in it is trusted: it came from the network.

    <uid>.npz        float32: image_emb (A, D), text_emb (1 + S, D), or text_emb (1, D) and syn_text_emb (S, D)
    <uid>.pth.gz     the same in bfloat16: gzip of what torch.save wrote
    <uid>.syn.json   {"syn_text": [S captions]}; further captioners as syn_text_NAME
    <uid>.paug.json  {"param_aug": [[[top, left, height, width], [[operation, magnitude], ...]], ...]}, A entries, or that list as a string
    <uid>.json       {"uid", "sha256" of the picture}

Layouts: apple/DataCompDR-12M (npz), apple/DataCompDR-12M-bf16 (pth.gz) and what apple/ml-mobileclip-dr writes (text_emb + syn_text_emb);
the loader that reads them is `preprocess_dr` in apple/ml-mobileclip, training/open_clip_v2.patch. A = views, S = synthetic captions,
D = sum of the teachers' dimensions: their vectors lie one after the other, each of unit norm.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.errors import StoreError

MEMBERS = ("npz", "pth.gz", "syn.json", "paug.json", "json")
"""What is read of a sample; its vectors lie in one of the first two, the first is preferred (it is exact)."""
MAX_VECTORS = 32 << 20
"""Bytes that a sample's vectors may unpack to: 30 views and 6 captions of 1536 values are 0.2 MB."""
MAX_JSON = 1 << 20
NORM_TOLERANCE = 0.02
"""How far a teacher's vector may be from unit norm; bfloat16 moves it by 0.002."""

Operation = tuple[int, float]


class DamagedSampleError(StoreError):
    """One published sample cannot be used; it is counted, the import goes on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedSample:
    """A decoded sample. boxes: (A, 4) int64, top, left, height, width in pixels of the picture that the teachers saw; operations: A lists
    of (index, magnitude) in torchvision's units; image: per teacher (A, D) float32, texts: per teacher (1 + S, D) float32, unit norm,
    row 0 is the pair's own caption; captions: S (text, name in syn.json); sha256 of the picture, "" where it is not told."""

    boxes: np.ndarray
    operations: list[list[Operation]]
    image: list[np.ndarray]
    texts: list[np.ndarray]
    captions: list[tuple[str, str]]
    sha256: str


def read_sample(members: Mapping[str, bytes], dims: Sequence[int], names: Sequence[str]) -> PublishedSample:
    """Decode a sample.

    Args:
        members: extension (one of MEMBERS) to content.
        dims, names: dimension and name of each teacher, in the order of the vectors.

    Raises:
        DamagedSampleError: a member is missing, does not decode, asks to run code, unpacks to too much, or disagrees with another.
    """
    if "npz" not in members and "pth.gz" not in members:
        raise DamagedSampleError("it has neither .npz nor .pth.gz, so no vectors")
    captions = _captions(_json(members, "syn.json"))
    boxes, operations = _parameters(_json(members, "paug.json").get("param_aug"))
    vectors = read_npz(members["npz"]) if "npz" in members else read_pth_gz(members["pth.gz"])
    image, texts = _image_and_texts(vectors, captions)
    if len(image) != len(boxes):
        raise DamagedSampleError(f"it has vectors of {len(image)} views but parameters of {len(boxes)}")
    facts = _json(members, "json") if "json" in members else {}
    sha256 = facts.get("sha256")
    kept = [n for n, (text, _) in enumerate(captions) if text]  # a caption cut at its first full stop may be empty
    texts = texts[[0, *(n + 1 for n in kept)]]
    return PublishedSample(
        boxes=boxes, operations=operations, image=split_teachers(image, dims, names, "image_emb"), texts=split_teachers(texts, dims, names, "text_emb"),
        captions=[captions[n] for n in kept], sha256=sha256.lower() if isinstance(sha256, str) else "",
    )  # fmt: skip


def read_npz(data: bytes) -> dict[str, np.ndarray]:
    """Arrays of an .npz, float32. Raises DamagedSampleError: no zip, a wrong checksum, pickled objects, too large."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > MAX_VECTORS or len(entries) > 64:
                raise DamagedSampleError(f"its .npz unpacks to more than {MAX_VECTORS >> 20} MB")
            return {entry.filename.removesuffix(".npy"): _npy(entry.filename, archive.read(entry)) for entry in entries}
    except DamagedSampleError:
        raise
    except Exception as error:  # zipfile and what it unpacks with raise a dozen types
        raise DamagedSampleError(f"its .npz does not unpack ({_short(error)})") from None


def _npy(name: str, data: bytes) -> np.ndarray:
    # numpy.load makes room for the shape that a header claims before it looks for the values; here the length is compared first
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read_header is None:
        raise ValueError(f"'{name}' has the format version {version}")
    shape, fortran, dtype = read_header(stream)
    if dtype.hasobject:
        raise DamagedSampleError(f"its .npz holds Python objects in '{name}', which are pickled and can run code; they are refused")
    if dtype.kind != "f" or fortran or len(shape) != 2 or len(data) - stream.tell() != dtype.itemsize * shape[0] * shape[1]:
        raise DamagedSampleError(f"its .npz holds '{name}' as {dtype} {shape} in {len(data)} bytes, expected rows of floats")
    return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape).astype(np.float32)


def read_pth_gz(data: bytes) -> dict[str, np.ndarray]:
    """Tensors of a .pth.gz, float32. Raises DamagedSampleError: no gzip, a wrong checksum, a pickle that runs code, too large."""
    unpack = zlib.decompressobj(wbits=31)  # gzip only, its CRC is checked
    try:
        plain = unpack.decompress(data, MAX_VECTORS + 1)
        if len(plain) > MAX_VECTORS:
            raise DamagedSampleError(f"its .pth.gz unpacks to more than {MAX_VECTORS >> 20} MB")
        if not unpack.eof:
            raise DamagedSampleError("its .pth.gz is truncated")
        with zipfile.ZipFile(io.BytesIO(plain)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_VECTORS:
                raise DamagedSampleError(f"its .pth.gz unpacks to more than {MAX_VECTORS >> 20} MB")
    except DamagedSampleError:
        raise
    except Exception as error:  # as above
        raise DamagedSampleError(f"its .pth.gz does not unpack ({_short(error)})") from None
    found = _load_tensors(plain)
    if not isinstance(found, dict):
        raise DamagedSampleError(f"its .pth.gz holds a {type(found).__name__}, expected a dict of tensors")
    return found


def _load_tensors(plain: bytes) -> Any:
    import torch  # only these shards need it

    try:
        found = torch.load(io.BytesIO(plain), map_location="cpu", weights_only=True)
        if isinstance(found, dict):
            return {str(name): _tensor_values(str(name), value, torch) for name, value in found.items()}
        return found
    except DamagedSampleError:
        raise
    except Exception as error:  # the unpickler raises nearly anything on damaged bytes
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise DamagedSampleError(f"its .pth.gz wants to run '{asked[1]}' when it is loaded, which is refused") from None
        raise DamagedSampleError(f"its .pth.gz does not load ({_short(error)})") from None


def _tensor_values(name: str, value: Any, torch: Any) -> np.ndarray:
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or not value.is_floating_point() or value.dim() != 2:
        raise DamagedSampleError(f"its .pth.gz holds '{name}' as {type(value).__name__}, expected rows of floats")
    if value.numel() * 4 > MAX_VECTORS:  # a stride of 0 makes a small storage large
        raise DamagedSampleError(f"its .pth.gz unpacks to more than {MAX_VECTORS >> 20} MB")
    return value.float().numpy()


def _json(members: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in members:
        raise DamagedSampleError(f"it has no .{name}")
    if len(members[name]) > MAX_JSON:
        raise DamagedSampleError(f"its .{name} has {len(members[name])} bytes, more than {MAX_JSON}")
    try:
        found = json.loads(members[name])
    except (ValueError, RecursionError) as error:
        raise DamagedSampleError(f"its .{name} is not JSON ({_short(error)})") from None
    if not isinstance(found, dict):
        raise DamagedSampleError(f"its .{name} holds a {type(found).__name__}, expected one object")
    return found


def _captions(syn: dict[str, Any]) -> list[tuple[str, str]]:
    """(text, name) in the order of the vectors; a text that UTF-8 cannot hold becomes "" (half of a surrogate pair)."""
    out = []
    for name, texts in syn.items():
        if name.startswith("syn_text"):
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise DamagedSampleError(f"its .syn.json holds '{name}' as {type(texts).__name__}, expected a list of strings")
            out += [(" ".join(text.split()) if _encodable(text) else "", name) for text in texts]
    return out


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parameters(given: Any) -> tuple[np.ndarray, list[list[Operation]]]:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise DamagedSampleError(f"its .paug.json holds a string that is not JSON ({_short(error)})") from None
    if not isinstance(given, list) or not given:
        raise DamagedSampleError(f"its .paug.json holds {type(given).__name__}, expected a list of views")
    boxes, operations = [], []
    for n, view in enumerate(given):
        try:
            box, applied = view
            top, left, height, width = (int(value) for value in box)
            chosen = [(int(index), float(magnitude)) for index, magnitude in applied or ()]  # null: RandAugment was skipped
        except (TypeError, ValueError, OverflowError):
            raise DamagedSampleError(f"view {n} of its .paug.json is {_short(ValueError(view))}, expected [[top, left, height, width], [[operation, magnitude], …]]") from None
        if min(top, left) < 0 or min(height, width) < 1 or max(top + height, left + width) > 1 << 20:
            raise DamagedSampleError(f"view {n} of its .paug.json has the box {[top, left, height, width]}, which no picture has")
        boxes.append((top, left, height, width))
        operations.append(chosen)
    return np.array(boxes, np.int64), operations


def _image_and_texts(vectors: dict[str, np.ndarray], captions: list[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """(A, D) and (1 + S, D): the pair's own caption, then the synthetic ones in the order of `captions`."""
    if "image_emb" not in vectors or "text_emb" not in vectors:
        raise DamagedSampleError(f"its vectors are named {', '.join(sorted(vectors)) or 'nothing'}, expected image_emb and text_emb")
    texts = vectors["text_emb"]
    names = list(dict.fromkeys(name for _, name in captions))
    if captions and len(texts) == 1 and all(f"{name}_emb" in vectors for name in names):
        texts = np.concatenate([texts, *(vectors[f"{name}_emb"] for name in names)])
    if len(texts) != 1 + len(captions):
        raise DamagedSampleError(f"it has {len(captions)} synthetic captions and vectors of {len(texts)} texts, expected {1 + len(captions)}")
    return vectors["image_emb"], texts


def split_teachers(vectors: np.ndarray, dims: Sequence[int], names: Sequence[str], what: str) -> list[np.ndarray]:
    """(n, sum of dims) -> per teacher (n, dim) of exactly unit norm. Raises DamagedSampleError for another width, or other norms."""
    if vectors.shape[1] != sum(dims):
        raise DamagedSampleError(f"its {what} has {vectors.shape[1]} values a vector, the teachers {' + '.join(map(str, dims))}; give --teachers with the right dimensions")
    out, start = [], 0
    for dim, name in zip(dims, names, strict=True):
        part = vectors[:, start : start + dim]
        norms = np.sqrt((part * part).sum(axis=1, keepdims=True, dtype=np.float32))
        far = ~(np.abs(norms - 1) <= NORM_TOLERANCE)  # also true for values that are not finite
        if far.any():
            raise DamagedSampleError(f"its {what} has a vector of norm {float(norms[far][0]):.3g} for teacher '{name}', expected 1")
        out.append(part / norms)
        start += dim
    return out


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:120]
