"""Hostile weights, checkpoints and names of checkpoints."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.attacks.bundles import tensors
from tests.attacks.harness import Case, Victim, cli


class Mark:
    """Leaves a mark where it is unpickled by whoever runs what a pickle says."""

    def __init__(self, call: tuple[Callable[..., Any], tuple[Any, ...]]) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def read(path: Path) -> Victim:
    def victim() -> object:
        from mobileclip.weights import read_weights

        return list(read_weights(path))

    return victim


def file(name: str, data: bytes | Callable[[Path], bytes], victim: Callable[[Path], Victim] = read) -> Case:
    def case(folder: Path) -> Victim:
        path = folder / name
        path.write_bytes(data if isinstance(data, bytes) else data(folder))
        return victim(path)

    return case


def torch_file(content: Callable[[Path], object], legacy: bool = False) -> Case:
    def data(folder: Path) -> bytes:
        import torch

        out = io.BytesIO()
        torch.save(content(folder), out, _use_new_zipfile_serialization=not legacy)
        return out.getvalue()

    return file("x.pt", data)


def system(folder: Path) -> Mark:
    return Mark((os.system, (f"touch {folder.parent / 'mark'}",)))


def opened(folder: Path) -> Mark:
    return Mark((open, (str(folder.parent / "mark"), "w")))


def evaluated(folder: Path) -> Mark:
    return Mark((eval, ("__import__('os').mkdir('mark')",)))


def zipped(names: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in names.items():
            archive.writestr(name, data)
    return out.getvalue()


def shared(folder: Path) -> object:
    """A billion values that share one."""
    import torch

    return {"a": torch.zeros(1).expand(10**9)}


def npz(folder: Path) -> bytes:
    out = io.BytesIO()
    np.savez(out, a=np.array([Mark((os.mkdir, ("mark",)))], dtype=object))
    return out.getvalue()


def checkpoint(change: Callable[[dict[str, Any]], object]) -> Case:
    """A folder with a config that asks for the impossible, read as a checkpoint."""

    def case(folder: Path) -> Victim:
        from mobileclip.config import config_to_dict
        from mobileclip.presets import preset

        place = folder / "ckpt"
        place.mkdir()
        config = json.loads(json.dumps(config_to_dict(preset("pocket_s"))))
        change(config)
        (place / "config.json").write_text(json.dumps(config))
        (place / "model.safetensors").write_bytes(tensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)))
        (place / "receipt.json").write_text("{}")

        def victim() -> object:
            from mobileclip.checkpoint import load_checkpoint

            return type(load_checkpoint(place, verify=False))

        return victim

    return case


def config_bytes(raw: bytes) -> Case:
    def case(folder: Path) -> Victim:
        inner = checkpoint(lambda config: None)(folder)
        (folder / "ckpt/config.json").write_bytes(raw)
        return inner

    return case


def hub(name: str) -> Case:
    def case(folder: Path) -> Victim:
        def victim() -> object:
            from mobileclip.hub import resolve

            return resolve(name)

        return victim

    return case


HEADER = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
WEIGHTS: dict[str, Case] = {
    "pickle that runs a command": file("x.pt", lambda folder: pickle.dumps({"x": system(folder)})),
    "pickle of protocol 0": file("x.pkl", lambda folder: pickle.dumps({"x": system(folder)}, protocol=0)),
    "torch file that runs a command": torch_file(lambda folder: {"x": system(folder)}),
    "torch file that opens a file": torch_file(lambda folder: {"state_dict": {"x": opened(folder)}}),
    "torch file that evaluates": torch_file(lambda folder: {"x": evaluated(folder)}),
    "old torch file that runs a command": torch_file(lambda folder: {"x": system(folder)}, legacy=True),
    "pickle named .safetensors": file("x.safetensors", lambda folder: pickle.dumps({"x": system(folder)})),
    "a billion values that share one": torch_file(shared),
    "torch zip that is compressed a thousand times": file("x.pt", lambda folder: zipped({"x/data.pkl": b"\x80\x02}q\0.", "x/data/0": bytes(2**26)}, zipfile.ZIP_DEFLATED)),
    "torch zip whose entries leave": file("x.pt", lambda folder: zipped({"../../x/data.pkl": b"\x80\x02}q\0."})),
    "archive of NumPy with objects": file("x.npz", npz),
    "safetensors: header of 2^60 bytes": file("x.safetensors", tensors(HEADER, size=2**60)),
    "safetensors: header of 100 MB on paper": file("x.safetensors", tensors(HEADER, bytes(4), size=10**8)),
    "safetensors: 2^40 values on paper": file("x.safetensors", tensors({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})),
    "safetensors: tensors over one another": file("x.safetensors", tensors({**HEADER, "b": HEADER["a"]}, bytes(4))),
    "safetensors: negative offsets": file("x.safetensors", tensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, bytes(4))),
    "safetensors: shape that overflows": file("x.safetensors", tensors({"a": {"dtype": "F32", "shape": [2**33, 2**33], "data_offsets": [0, 4]}}, bytes(4))),
    "safetensors: 100,000 brackets": file("x.safetensors", tensors(b'{"a":' + b"[" * 100_000)),
    "safetensors: not finite": file("x.safetensors", tensors(HEADER, b"\x00\x00\xc0\x7f")),
    "convert a pickle": file("x.pt", lambda folder: pickle.dumps({"x": system(folder)}), lambda path: cli("convert", path, path.parent / "out")),
    "inspect a pickle": file("x.pt", lambda folder: pickle.dumps({"x": system(folder)}), lambda path: cli("inspect", path)),
}
CHECKPOINTS: dict[str, Case] = {
    "config of 100,000 brackets": config_bytes(b"[" * 100_000),
    "embeddings of 10^12 values": checkpoint(lambda c: c.update(embed_dim=10**12)),
    "text tower 10^7 wide": checkpoint(lambda c: c["text"].update(width=10**7)),
    "10^8 layers": checkpoint(lambda c: c["text"].update(layers=10**8)),
    "vocabulary of 10^12": checkpoint(lambda c: c["text"].update(vocab_size=10**12)),
    "pictures of 10^9 pixels a side": checkpoint(lambda c: c["image"].update(image_size=10**9)),
    "negative sizes": checkpoint(lambda c: c["text"].update(width=-512)),
    "sizes that are texts": checkpoint(lambda c: c["text"].update(width="512; touch mark")),
    "backbone whose arguments name a file": checkpoint(lambda c: c["image"].update(backbone="mobilenetv3_small_050", backbone_args={"checkpoint_path": "/etc/passwd"})),
    "backbone that is a path": checkpoint(lambda c: c["image"].update(backbone="../../evil")),
    "hub id that leaves the cache": hub("hf-hub:../../x"),
    "hub revision that leaves the cache": hub("hf-hub:a/b@../../x"),
    "address in place of a name": hub("http://127.0.0.1:1/x.pt"),
}
