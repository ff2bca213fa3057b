"""Faults of a bundle whose hashes are right: somebody changed it, or wrote it with another tool, and signed it anew."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image

from mobileclip.config import OPENAI_MEAN, OPENAI_STD
from runtime.manifest import Manifest, read_manifest, write_manifest
from tests.export.faults import Fault, named

PIXELS = r"FAIL  preprocessing"
TOKENS = r"FAIL  tokenizer"
LOGITS = r"FAIL  logits .* logit_scale or logit_bias is wrong"


def edit(folder: Path, change: Callable[[Manifest], Manifest] = lambda manifest: manifest) -> None:
    """Change the manifest and sign the whole folder as it lies there."""
    write_manifest(folder, change(read_manifest(folder, verify=False)))


def edit_image(folder: Path, **fields: Any) -> None:
    edit(folder, lambda manifest: replace(manifest, image=replace(manifest.image, **fields)))


def mean_of_another_model(folder: Path) -> None:
    """The manifest has another model's mean."""
    edit_image(folder, mean=OPENAI_MEAN)


def deviation_of_another_model(folder: Path) -> None:
    """The manifest has another model's standard deviation."""
    edit_image(folder, std=OPENAI_STD)


def another_filter(folder: Path) -> None:
    """Pictures are resized by bicubic instead of bilinear interpolation."""
    edit_image(folder, interpolation="bicubic")


def another_crop(folder: Path) -> None:
    """A margin is cropped away that training did not crop."""
    edit_image(folder, crop_pct=0.875)


def golden_in_bgr(folder: Path) -> None:
    """Whoever wrote the golden pictures swapped red and blue."""
    for path in sorted((folder / "golden").glob("*.png")):
        with Image.open(path) as picture:
            swapped = Image.fromarray(np.asarray(picture.convert("RGB"))[:, :, ::-1].copy())
        swapped.save(path)
    edit(folder)


def merges_cut(folder: Path) -> None:
    """The tokenizer has the first half of its merges."""
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["model"]["merges"] = document["model"]["merges"][: len(document["model"]["merges"]) // 2]
    path.write_text(json.dumps(document), encoding="utf-8")
    edit(folder)


def cleaning_left_out(folder: Path) -> None:
    """Texts are neither put in lower case nor repaired."""
    edit(folder, lambda manifest: replace(manifest, text=replace(manifest.text, cleaning="none")))


def padded_with_another_id(folder: Path) -> None:
    """Rows are filled up with another token."""
    edit(folder, lambda manifest: replace(manifest, text=replace(manifest.text, pad_id=1)))


def logarithm_of_the_scale(folder: Path) -> None:
    """The logit scale is the checkpoint's parameter, whose exponential nobody took."""
    edit(folder, lambda manifest: replace(manifest, logit_scale=math.log(manifest.logit_scale)))


def bias_invented(folder: Path) -> None:
    """A logit bias is added that the model does not have."""
    edit(folder, lambda manifest: replace(manifest, logit_bias=-10.0))


def int8_under_a_float_name(folder: Path) -> None:
    """The file that is called fp32 is the int8 one."""
    shutil.copyfile(folder / "onnx/image.int8.onnx", folder / "onnx/image.fp32.onnx")
    edit(folder)


def norm_cut_off(folder: Path) -> None:
    """A tool that simplified the graph took its last operation, the L2 norm, away."""
    path = folder / "onnx/text.fp32.onnx"
    model = onnx.load(path)
    last = next(node for node in model.graph.node if model.graph.output[0].name in node.output)
    last.CopyFrom(onnx.helper.make_node("Identity", [last.input[0]], list(last.output)))
    onnx.save(model, path)
    edit(folder)


def weights_changed(folder: Path) -> None:
    """One kernel of the image tower has other weights."""
    path = folder / "onnx/image.fp32.static.onnx"
    model = onnx.load(path)
    kernel = max((item for item in model.graph.initializer if len(item.dims) == 4), key=lambda item: np.prod(item.dims))
    kernel.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(kernel)[::-1].copy(), kernel.name))
    onnx.save(model, path)
    edit(folder)


FAULTS = named(
    [
        *(
            Fault(plant=plant, says=PIXELS, slow=plant not in (mean_of_another_model, another_filter))
            for plant in (mean_of_another_model, deviation_of_another_model, another_filter, another_crop, golden_in_bgr)
        ),
        *(Fault(plant=plant, says=TOKENS, slow=plant is not cleaning_left_out) for plant in (merges_cut, cleaning_left_out, padded_with_another_id)),
        *(Fault(plant=plant, says=LOGITS, slow=plant is bias_invented) for plant in (logarithm_of_the_scale, bias_invented)),
        Fault(plant=int8_under_a_float_name, says=r"FAIL  image-onnx-fp32 .* its least cosine to the checkpoint is"),
        Fault(plant=norm_cut_off, says=r"FAIL  text-onnx-fp32 .* norms that differ from 1"),
        Fault(plant=weights_changed, says=r"FAIL  image-onnx-fp32-static .* its least cosine to the checkpoint is"),
    ]
)
