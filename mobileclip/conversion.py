"""`mclip convert`: weights from one layout to another, recognised without being told, checked whole before a byte is written.

Each result is a folder: ours (a checkpoint), Apple's (one `.pt`), open_clip's or timm's (`.safetensors` and the config file
that their loaders read), and `receipt.json`, written last.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobileclip.config import ModelConfig
from mobileclip.layouts import LAYOUTS, TITLES, best_name, recognise
from mobileclip.presets import preset
from runtime.errors import CheckpointError
from runtime.files import file_sha256, write_json

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1
APPLE_FILES = {"mobileclip_b_lt": "mobileclip_blt.pt"}
"""Where Apple's file has another name than ours."""
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Endings of tensors that are no parameters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Weights that have been read and recognised."""

    file: Path
    layout: str
    config: ModelConfig
    names: tuple[str, ...]
    """Every preset of this architecture."""
    state: dict[str, Tensor]

    @property
    def where(self) -> str:
        return f"'{self.file}'"


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: str,
    name: str | None = None,
    text_from: str | os.PathLike[str] | None = None,
    allow_nonfinite: bool = False,
) -> dict[str, Any]:
    """Write the weights of `source` to the folder `out` in another layout, and say what they are.

    Args:
        source: a weights file, a folder in any layout, or "hf-hub:owner/name".
        to: one of `LAYOUTS`. "timm" takes the image tower alone.
        name: the model, where several share an architecture; left out, the names of file and folder tell.
        text_from: weights whose text tower goes with a `source` in timm's layout, which has none.
        allow_nonfinite: accept NaN and infinite values.

    Returns:
        The receipt (JSON-ready) and, as "out", the folder.

    Raises:
        CheckpointError: not readable, not a MobileCLIP, tensors that do not fit (all are listed), a layout that cannot hold
            the model, or an `out` that holds something else.
    """
    from safetensors import SafetensorError

    from mobileclip.convert import check_layout, from_ours, to_ours

    if to not in LAYOUTS:
        raise CheckpointError(f"unknown layout '{to}'; known are {', '.join(LAYOUTS)}")
    out = Path(out)
    earlier = _earlier(out)
    given = read_source(source, name=name, allow_nonfinite=allow_nonfinite)
    if out.resolve() == given.file.parent.resolve():
        raise CheckpointError(f"'{out}' is the folder that {given.where} lies in; give another one, the source stays as it is")
    config, state = given.config, to_ours(given.state, given.layout, given.config, given.where)
    facts: dict[str, Any] = {"source": _origin(given)}
    if text_from is not None or (given.layout == "timm" and to != "timm"):
        text = _text_tower(given, to, text_from, allow_nonfinite)
        facts["text_source"] = _origin(text)
        config = text.config
        ours = to_ours(text.state, text.layout, text.config, text.where)
        state = {key: state.get(key, tensor) for key, tensor in ours.items()}
    check_layout(to, config)
    if config.folded and to in ("open_clip", "timm"):
        raise CheckpointError(
            f"{given.where} has folded branches, which {to} builds for training and cannot load folded; convert the checkpoint that it was folded from, and fold there"
        )
    theirs = from_ours(state, to, config, given.where)
    parameters = sum(tensor.numel() for key, tensor in theirs.items() if not key.endswith(STATISTICS))
    facts |= {
        "model": config.name, "architecture": list(given.names), "layout": to, "folded": config.folded,
        "tensors": len(theirs), "parameters": parameters, "licence": config.licence,
    }  # fmt: skip
    if to == "timm" and (left := len(state) - len(theirs)):
        facts["left_out"] = f"the text tower and logit_scale ({left} tensors)"
    try:
        receipt = _write_ours(out, config, theirs, given, facts) if to == "ours" else _write(out, _files(to, config, theirs), facts)
        for old in set(earlier) - receipt["files"].keys():
            (out / old).unlink(missing_ok=True)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors tell of a full disk with types of their own
        raise CheckpointError(f"'{out}' cannot be written ({str(error) or type(error).__name__}); make room there, or give another folder") from None
    return {**receipt, "out": str(out)}


def read_source(source: str | os.PathLike[str], *, name: str | None = None, allow_nonfinite: bool = False) -> Source:
    """Read weights in any layout and tell which model they are.

    Raises:
        CheckpointError: not readable, no MobileCLIP, or another one than `name`.
    """
    from mobileclip.hub import resolve
    from mobileclip.weights import find_weights, read_weights

    path = resolve(source)
    file = find_weights(path) if path.is_dir() else path
    own = _own_config(file)
    state = read_weights(file, allow_nonfinite=allow_nonfinite)
    where = f"'{file}'"
    found = recognise({key: tuple(tensor.shape) for key, tensor in state.items()}, where, loose=True)
    if own is not None:
        names = tuple(known for known in found.names if own.name == known) or found.names
        if name is not None and preset(name).name != own.name:
            raise CheckpointError(f"{where} is '{own.name}' by its config.json, not '{name}'; leave the name out")
        return Source(file=file, layout="ours", config=own, names=names, state=state)
    if not found.names:
        raise CheckpointError(f"{where} is in our own layout, and of no preset; its config.json must stand beside it")
    if name is not None and preset(name).name not in found.names:
        raise CheckpointError(f"{where} is {' or '.join(found.names)}, not '{name}'; leave the name out, or give the file that you mean")
    chosen = preset(name if name is not None else best_name(found, _hints(source, file)))
    return Source(file=file, layout=found.layout, config=dataclasses.replace(chosen, folded=found.folded), names=found.names, state=state)


def _own_config(file: Path) -> ModelConfig | None:
    """The config beside `model.safetensors` of a checkpoint of ours, its hashes checked; None when the file is something else."""
    from mobileclip.checkpoint import read_config, verify_receipt

    data = _json(file.with_name("config.json"))
    if file.name != "model.safetensors" or not ({"schema", "image", "text"} <= data.keys()):
        return None
    verify_receipt(file.parent)
    return read_config(file.parent)


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, empty when there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _hints(source: str | os.PathLike[str], file: Path) -> list[str]:
    """What may name the model, the most telling first."""
    timm, receipt = _json(file.with_name("config.json")), _json(file.with_name("receipt.json"))
    tag = timm.get("pretrained_cfg")
    hints = [receipt.get("model"), file.name, tag.get("tag") if isinstance(tag, dict) else None, Path(source).name]
    return [str(hint) for hint in hints if hint] + [part for part in reversed(file.absolute().parts[:-1])]


def _text_tower(given: Source, to: str, text_from: str | os.PathLike[str] | None, allow_nonfinite: bool) -> Source:
    """The weights that lend their text tower to an image tower from timm."""
    if text_from is None:
        raise CheckpointError(
            f"{given.where} holds an image tower alone ({' or '.join(given.names)}), and {TITLES[to]} wants a text tower too; "
            "name weights that have one with --text-from SOURCE, or convert to timm"
        )
    if given.layout != "timm" or to == "timm":
        raise CheckpointError(f"--text-from goes with an image tower in timm's layout that is to become a whole model; {given.where} is in {TITLES[given.layout]}")
    text = read_source(text_from, allow_nonfinite=allow_nonfinite)
    if text.layout == "timm" or text.config.image.backbone != given.config.image.backbone or text.config.folded != given.config.folded:
        raise CheckpointError(
            f"{text.where} ({text.config.name}, {text.config.image.backbone}, folded: {text.config.folded}) has no text tower for {given.where} "
            f"({given.config.image.backbone}, folded: {given.config.folded}); give a whole model with the same image tower"
        )
    return text


def _origin(source: Source) -> dict[str, Any]:
    return {"file": source.file.name, "sha256": file_sha256(source.file), "layout": source.layout}


def _earlier(out: Path) -> list[str]:
    """The files of an earlier result in `out`. Raises CheckpointError when there is something else."""
    if not out.exists():
        return []
    if not out.is_dir():
        raise CheckpointError(f"'{out}' is a file; give a folder, new or from an earlier 'mclip convert'")
    there = sorted(entry.name for entry in out.iterdir() if not entry.name.endswith(".part"))
    if not there:
        return []
    receipt = _json(out / "receipt.json")
    if receipt.get("kind") != "weights" and "conversion" not in receipt:
        raise CheckpointError(f"'{out}' holds {', '.join(there[:3])} and is no result of 'mclip convert'; give a new folder, nothing there is touched")
    return [name for name in receipt.get("files", {}) if Path(name).name == name]


def _files(to: str, config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Callable[[Path], object]]:
    """File name -> how to write it, for the layouts of others."""
    import torch
    from safetensors.torch import save_file

    from mobileclip.foreign_configs import open_clip_config, timm_config

    # Views of a larger storage would be written with all of it.
    state = {name: tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone() for name, tensor in state.items()}
    if to == "apple":
        return {APPLE_FILES.get(config.name, re.sub(r"[^\w.-]", "_", config.name) + ".pt"): lambda path: torch.save(state, path)}
    weights, settings, data = {
        "open_clip": ("open_clip_model.safetensors", "open_clip_config.json", open_clip_config),
        "timm": ("model.safetensors", "config.json", timm_config),
    }[to]
    text = json.dumps(data(config), indent=1) + "\n"
    return {weights: lambda path: save_file(state, path, metadata={"format": "pt"}), settings: lambda path: path.write_text(text, encoding="utf-8")}


def _write(out: Path, files: dict[str, Callable[[Path], object]], facts: dict[str, Any]) -> dict[str, Any]:
    """Write under temporary names, rename, and end with the receipt, which is returned."""
    out.mkdir(parents=True, exist_ok=True)
    pending = {name: out / f".{name}.{os.getpid()}.part" for name in files}
    try:
        for name, write in files.items():
            write(pending[name])
        receipt = {
            "schema": SCHEMA, "kind": "weights", **facts,
            "files": {name: {"sha256": file_sha256(path), "bytes": path.stat().st_size} for name, path in pending.items()},
            "tools": {package: importlib.metadata.version(package) for package in ("mobileclip-edge", "torch", "timm", "safetensors")},
        }  # fmt: skip
        (out / "receipt.json").unlink(missing_ok=True)
        for name, path in pending.items():
            os.replace(path, out / name)
        write_json(out / "receipt.json", receipt)
    finally:
        for path in pending.values():
            path.unlink(missing_ok=True)
    return receipt


def _write_ours(out: Path, config: ModelConfig, state: dict[str, Tensor], given: Source, facts: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of ours, its receipt with the facts as "conversion"; returns them in the form of `_write`'s receipt."""
    import torch

    from mobileclip.checkpoint import build, build_tokenizer, save_checkpoint

    with torch.device("meta"):
        model = build(config)
    model.load_state_dict(state, strict=True, assign=True)
    origin = facts["source"]
    model.config = dataclasses.replace(config, sources=(*config.sources, f"{origin['file']} in {TITLES[origin['layout']]}, sha256 {origin['sha256']}"))
    carried = given.file.with_name("tokenizer.json")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = carried if given.layout == "ours" and carried.is_file() else build_tokenizer(config.text.vocab_size, Path(folder) / "tokenizer.json")
        save_checkpoint(model, out, tokenizer=tokenizer, extra={"conversion": facts})
    receipt = _json(out / "receipt.json")
    return {"schema": SCHEMA, "kind": "weights", **facts, "files": receipt["files"], "tools": receipt["tools"]}


def main(argv: list[str]) -> int:
    """`mclip convert SOURCE OUT --to LAYOUT`."""
    parser = argparse.ArgumentParser(prog="mclip convert", description="Rewrite weights in Apple's, open_clip's, timm's or our own layout.")
    parser.add_argument("source", metavar="SOURCE", help="a weights file, a folder in any layout, or hf-hub:owner/name; what it is is found out")
    parser.add_argument("out", metavar="OUT", help="a new folder, or one with an earlier result")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="timm takes the image tower alone")
    parser.add_argument("--model", metavar="NAME", help="the model, where several share an architecture (default: as file and folder are named)")
    parser.add_argument("--text-from", metavar="SOURCE", help="whole weights that lend their text tower to an image tower from timm")
    parser.add_argument("--allow-nonfinite", action="store_true", help="accept NaN and infinite values")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    report = convert(args.source, args.out, to=args.to, name=args.model, text_from=args.text_from, allow_nonfinite=args.allow_nonfinite)
    sys.stdout.write((json.dumps(report) if args.json else summary(report)) + "\n")
    return 0


def summary(report: dict[str, Any]) -> str:
    """One line about a report of `convert`."""
    source, also = report["source"], [name for name in report["architecture"] if name != report["model"]]
    return (
        f"{source['file']} is {report['model']} in {TITLES[source['layout']]}"
        + (f" (the same architecture as {', '.join(also)})" if also else "")
        + (", folded" if report["folded"] else "")
        + f"; wrote {report['tensors']} tensors, {report['parameters'] / 1e6:.1f} M parameters, in {TITLES[report['layout']]} to {report['out']}"
        + (f", without {report['left_out']}" if "left_out" in report else "")
        + f"; licence of the weights: {report['licence']}"
    )
