"""Which model a state dict holds, and in whose layout: told from the names and shapes of its tensors alone. Needs no torch.

Layouts: "ours"; "apple" (the `.pt` files of Apple's package); "open_clip"; "timm" (the image tower alone).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mobileclip.config import ModelConfig, TextConfig
from mobileclip.key_maps import our_name
from mobileclip.presets import FAMILY, PRESETS, canonical_name
from runtime.errors import CheckpointError

LAYOUTS = ("ours", "apple", "open_clip", "timm")
TITLES = {"ours": "our own layout", "apple": "Apple's layout", "open_clip": "open_clip's layout", "timm": "timm's layout"}
MARKS: dict[str, tuple[str, ...]] = {
    "ours": ("image.trunk.", "text.blocks."),
    "apple": ("image_encoder.model.", "text_encoder."),
    "open_clip": ("visual.trunk.", "text.transformer.resblocks."),
    "timm": ("stem.", "stages.", "final_conv.", "patch_embed.", "blocks.", "head."),
}
"""Beginnings of names that most tensors of a layout have."""
OURS_ALONE = ("image.projection.", "text.projection.fc", "text.projection.linear.", "text.ln_embedding.")
"""Beginnings of names that no preset has."""

Tower = tuple[str, tuple[tuple[int, int, int], ...]]
"""Kind of tower, and per stage: blocks, channels, hidden width of the feed-forward layers."""
Value = TypeVar("Value")


def _fastvit(depths: tuple[int, ...], dims: tuple[int, ...], ratio: int) -> Tower:
    return "FastViT", tuple((depth, dim, dim * ratio) for depth, dim in zip(depths, dims, strict=True))


TRUNKS: dict[str, Tower] = {
    "fastvit_mci0": _fastvit((2, 6, 10, 2), (64, 128, 256, 512), 3),
    "fastvit_mci1": _fastvit((4, 12, 20, 4), (64, 128, 256, 512), 3),
    "fastvit_mci2": _fastvit((4, 12, 24, 4), (80, 160, 320, 640), 3),
    "fastvit_mci3": _fastvit((2, 12, 24, 4, 2), (96, 192, 384, 768, 1536), 4),
    "fastvit_mci4": _fastvit((2, 12, 24, 4, 4), (128, 256, 512, 1024, 2048), 4),
    "vit_base_mci_224": ("ViT behind a convolutional stem", ((12, 768, 3072),)),
    "vit_large_patch14_clip_224": ("CLIP's ViT", ((24, 1024, 4096),)),
}
"""The image towers of Apple's variants, by their name in timm."""


APPLE_TRUNKS = {"fastvit_mci0": "none", "fastvit_mci1": "none", "fastvit_mci2": "none", "vit_base_mci_224": "causal"}
"""The image towers that Apple's package has, and the text mask that goes with each there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a state dict is."""

    layout: str
    names: tuple[str, ...]
    """Every preset of this architecture (B, B-LT and MobileCLIP2-B share one); () for a model of ours without a preset."""
    folded: bool
    """True when training-time branches have been folded into plain convolutions."""


def strip_prefix(state: Mapping[str, Value]) -> dict[str, Value]:
    """The same tensors without the prefix that a training wrapper put before every name."""
    for prefix in ("module.", "_orig_mod."):
        if state and all(name.startswith(prefix) for name in state):
            return {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


def recognise(shapes: Mapping[str, tuple[int, ...]], where: str, *, loose: bool = False) -> Found:
    """The layout and the architecture of a state dict.

    Args:
        shapes: name -> shape of each tensor.
        where: the file, for messages.
        loose: judge by the blocks alone, and leave vocabulary, context length and embedding width to a later comparison
            of every tensor, which lists all that differs.

    Raises:
        CheckpointError: another kind of model, or a variant that nobody has named; the message says what was found.
    """
    shapes = {name: tuple(shape) for name, shape in strip_prefix(shapes).items()}
    layout = _layout(shapes, where)
    ours = {pair[0]: pair[1].shape_of_ours(shape) for name, shape in shapes.items() if (pair := our_name(name, layout)) and pair[0]}
    folded = any(".reparam_conv." in name for name in ours)
    facts = _facts(ours, exact=layout == "ours")
    own = layout == "ours" and any(name.startswith(OURS_ALONE) for name in ours)
    # Only models of ours are in no other layout than ours.
    known = {name: _expected(config) for name, config in (PRESETS if layout == "ours" else FAMILY).items()} if not own else {}
    differing = {name: [fact for fact, value in facts.items() if value != expected[fact]] for name, expected in known.items()}
    towers = ("image tower", "text tower")
    names = tuple(name for name, facts_off in differing.items() if not (set(facts_off) & set(towers) if loose else facts_off))
    if layout != "ours" and not names:
        if not any(tower in facts for tower in towers):
            raise CheckpointError(_foreign(shapes, where))
        nearest = min(differing, key=lambda name: len(differing[name]))
        raise CheckpointError(
            f"{where} looks like {TITLES[layout]} but is no variant that is known: "
            + ", ".join(f"its {fact} is {_show(facts[fact])} ({_show(known[nearest][fact])} in {nearest})" for fact in differing[nearest])
            + f"; known are {', '.join(known)}"
        )
    return Found(layout=layout, names=names, folded=folded)


def _layout(shapes: Mapping[str, tuple[int, ...]], where: str) -> str:
    counts = {layout: sum(name.startswith(marks) for name in shapes) for layout, marks in MARKS.items()}
    layout = max(counts, key=lambda name: counts[name])
    if 2 * counts[layout] <= len(shapes):
        raise CheckpointError(_foreign(shapes, where))
    return layout


def _foreign(shapes: Mapping[str, tuple[int, ...]], where: str) -> str:
    some = ", ".join(list(shapes)[:3]) or "none"
    expected = ", ".join(f"{TITLES[layout]} has {marks[0]}…" for layout, marks in MARKS.items())
    return f"{where} is no MobileCLIP: it has {len(shapes)} tensors such as {some}; of the names expected, {expected}; give the weights of a MobileCLIP model"


def _facts(shapes: Mapping[str, tuple[int, ...]], *, exact: bool) -> dict[str, Any]:
    """What our names and shapes say; a fact whose tensors are all missing is left out. `exact`: feed-forward widths must agree everywhere."""
    trunk = {name.removeprefix("image.trunk."): shape for name, shape in shapes.items() if name.startswith("image.trunk.")}
    text = {name.removeprefix("text."): shape for name, shape in shapes.items() if name.startswith("text.")}
    facts: dict[str, Any] = {}
    staged = any(name.startswith("stages.") for name in trunk)
    if stages := _stages(trunk, r"stages\.(\d+)\.blocks\.(\d+)\." if staged else r"()blocks\.(\d+)\.", r"mlp\.fc2\.bias", exact):
        facts["image tower"] = (_kind(trunk, staged), stages)
    if stages := _stages(text, r"()blocks\.(\d+)\.", r"ln_1\.bias|mlp\.fc2\.bias", exact):
        facts["text tower"] = ("mct" if any(".token_mixer." in name for name in text) else "transformer", stages)
    heads = [trunk[name][0] for name in ("head.fc.weight", "head.weight", "fc.weight") if trunk.get(name)]
    heads += [shape[0] for name, shape in text.items() if name == "projection.weight" and shape]
    if heads:
        facts["embedding width"] = _common(heads, exact=False)
    for fact, name, axis in (("vocabulary", "token_embedding.weight", 0), ("token width", "token_embedding.weight", 1), ("context length", "positional_embedding", 0)):
        if len(text.get(name, ())) == 2:
            facts[fact] = text[name][axis]
    return facts


def _kind(trunk: Mapping[str, tuple[int, ...]], staged: bool) -> str:
    marks = {"final_conv.": "FastViT", "patch_embed.backbone.": "ViT behind a convolutional stem", "norm_pre.": "CLIP's ViT"}
    for mark, kind in marks.items():
        if any(name.startswith(mark) for name in trunk):
            return kind
    return "network in stages" if staged else "ViT"


def _stages(shapes: Mapping[str, tuple[int, ...]], block: str, wide: str, exact: bool) -> tuple[tuple[int, int, int], ...]:
    """(blocks, width, hidden width) of every stage that has blocks."""
    depths: Counter[str] = Counter()
    widths: dict[str, list[int]] = {}
    hidden: dict[str, list[int]] = {}
    for name, shape in shapes.items():
        match = re.match(block, name)
        if not match:
            continue
        stage, rest = match[1], name[match.end() :]
        depths[stage] = max(depths[stage], int(match[2]) + 1)
        if re.fullmatch(wide, rest) and shape:
            widths.setdefault(stage, []).append(shape[0])
        if rest == "mlp.fc1.bias" and shape:
            hidden.setdefault(stage, []).append(shape[0])
    order = sorted(depths, key=lambda stage: int(stage or 0))
    return tuple((depths[stage], _common(widths.get(stage, []), exact=False), _common(hidden.get(stage, []), exact=exact)) for stage in order)


def _common(values: list[int], *, exact: bool) -> int:
    """The commonest value, so that one damaged tensor does not hide what a file is; -1 where there is none, or with `exact` more than one."""
    if not values or (exact and len(set(values)) > 1):
        return -1
    return Counter(values).most_common(1)[0][0]


def _expected(config: ModelConfig) -> dict[str, Any]:
    """The facts of a preset."""
    image, text = config.image, config.text
    if image.backbone in TRUNKS:
        trunk = TRUNKS[image.backbone]
    else:
        args = image.backbone_args
        sizes = zip(args["depths"], args["dims"], strict=True)
        trunk = ("network in stages", tuple((depth, dim, int(dim * args["mlp_ratio"])) for depth, dim in sizes if depth))
    blocks = text.layers + (2 if text.kind == "mct" else 0)
    return {
        "image tower": trunk,
        "text tower": (text.kind, ((blocks, text.width, int(text.width * text.mlp_ratio)),)),
        "embedding width": config.embed_dim,
        "vocabulary": text.vocab_size,
        "token width": text.embedding_dim or text.width,
        "context length": text.context_length,
    }


def _show(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return f"{value[0]} " + " + ".join(f"{depth}x{width}" for depth, width, _ in value[1]) + " with hidden " + " + ".join(str(hidden) for *_, hidden in value[1])


def best_name(found: Found, hints: Iterable[str]) -> str:
    """The preset among `found.names` that a hint (file name, folder, hub id, timm's tag) points to, first hint first; else the first.

    >>> best_name(Found(layout="apple", names=("mobileclip_b", "mobileclip_b_lt"), folded=False), ["mobileclip_blt.pt"])
    'mobileclip_b_lt'

    Raises:
        CheckpointError: there is none to choose from.
    """
    if not found.names:
        raise CheckpointError("a model of our own without a preset has no name to choose; its config.json names it")
    for hint in hints:
        bare = Path(hint).name
        for spelling in (hint, bare, bare.rpartition(".")[0]):
            if canonical_name(spelling) in found.names:
                return canonical_name(spelling)
        if inside := [name for name in found.names if _mentions(hint, name)]:
            return max(inside, key=len)
        # timm's tags name the generation alone: "apple_mclip", "apple_mclip2_dfndr2b".
        if generation := re.search(r"mclip(2?)(?![a-z0-9])", hint.lower()):
            for name in found.names:
                if name.startswith(f"mobileclip{generation[1]}_"):
                    return name
    return found.names[0]


def _mentions(hint: str, name: str) -> bool:
    """Whether a name stands in a longer one, as in "models--apple--MobileCLIP-B-LT-OpenCLIP" or "mobileclip_blt_tuned.pt"."""
    words = re.sub(r"[^a-z0-9]+", "_", hint.lower())
    spellings = {name, name.replace("_b_lt", "_blt"), name.replace("_l_14", "_l14")}
    return any(re.search(rf"(?<![a-z0-9]){spelling}(?![a-z0-9])", words) for spelling in spellings)


def check_layout(layout: str, config: ModelConfig) -> None:
    """Refuse a model that a layout has no names for, and say why.

    Raises:
        CheckpointError: unknown layout, or the layout cannot hold this model.
    """
    if layout not in LAYOUTS:
        raise CheckpointError(f"unknown layout '{layout}'; known are {', '.join(LAYOUTS)}")
    if layout == "ours":
        return
    image, text, title = config.image, config.text, f"{TITLES[layout]} cannot hold model '{config.name}'"
    if image.backbone not in TRUNKS or image.projection != "head" or (image.backbone_args.keys() - {"global_pool"}):
        raise CheckpointError(f"{title}: its image tower '{image.backbone}' is not one of MobileCLIP's ({', '.join(TRUNKS)}); keep it in ours")
    if config.ffn_widths:
        raise CheckpointError(f"{title}: {len(config.ffn_widths)} of its feed-forward layers have been pruned; keep it in ours, or convert the model before pruning")
    if layout == "timm":
        return
    if layout == "apple" and image.backbone not in APPLE_TRUNKS:
        raise CheckpointError(
            f"{title}: Apple's package has no image tower '{image.backbone}', and Apple gives S3, S4 and L-14 away in open_clip's layout; convert to open_clip"
        )
    if layout == "open_clip" and text.kind == "mct":
        raise CheckpointError(f"{title}: open_clip has no convolutional text tower (kind 'mct'), which only MobileCLIP-S0 has; convert to apple or ours")
    if text.kind == "mct" and text.layers != 4:
        raise CheckpointError(f"{title}: its convolutional text tower has {text.layers} attention blocks, Apple's has 4; keep it in ours")
    odd = {name: value for name, value in _clip_settings(text).items() if value != _clip_settings(TextConfig())[name]}
    if layout == "apple" and text.mask != APPLE_TRUNKS[image.backbone]:
        odd["mask"] = f"{text.mask} (Apple's has {APPLE_TRUNKS[image.backbone]} beside this image tower)"
    elif text.mask == "pad":
        odd["mask"] = "pad"
    if odd:
        raise CheckpointError(f"{title}: its text tower is no CLIP encoder ({', '.join(f'{name} {value}' for name, value in odd.items())}); keep it in ours")


def _clip_settings(text: TextConfig) -> dict[str, object]:
    """The settings of a text tower that the other layouts take for granted."""
    return {
        "norm": text.norm, "pool": text.pool, "embedding_norm": text.embedding_norm, "projection": text.projection,
        "embedding_dim": 0 if text.embedding_dim == text.width else text.embedding_dim, "layer_norm_eps": text.layer_norm_eps,
        "tokenizer": text.tokenizer,
    }  # fmt: skip
