"""Structured pruning of whole towers to a share of their measured time: narrower stages and residual streams, fewer heads, layers and hidden units.

Every candidate is a model config of the same family as the source, so what comes out is an ordinary checkpoint: nothing has to remember which channels went.
Which candidate is taken is asked of the clock of the runtime that will run it (`measure_times`, kept in a file), not of multiply-adds, and of how much of the
source's importance it has room for. Which channels, heads and blocks it gets is decided by `mobileclip.inherit` along the wiring of the towers (all tensors that
share a space are cut by one choice; FastViT's depthwise convolutions with a multiplier follow their inputs), before branches are folded: recovery trains them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from timm.models.fastvit import FastVit

from export.importance import importance
from export.latency_gate import interleaved, ratio
from export.search import SETTLE
from export.to_onnx import OnnxEncoder, export_onnx, serialize
from export.towers import Samples, Tower, encoder_of
from mobileclip.config import ModelConfig
from mobileclip.folding import reparameterize
from mobileclip.inherit import inherit
from mobileclip.model import ImageTextModel, count_parameters
from mobileclip.pocket import PocketTrunk
from runtime.errors import RecipeError
from runtime.files import write_json

WIDTHS = (1.0, 0.875, 0.75, 0.625, 0.5)
DEPTHS = (1.0, 0.5)
HIDDEN = (1.0, 0.5)
HEAD_DIM = 32  # of FastViT's attention, pocket's too
TOGETHER = 6  # candidates that are timed in turns with the source


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One form of one tower."""

    tower: Tower
    config: ModelConfig
    """The source's, this tower alone changed."""
    change: str
    """In words: "width 0.75, depth 0.5"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What was chosen, and among what."""

    image: str
    text: str
    time_share: float
    """Of both towers together, beside the source's, on the runtime that timed them."""
    kept: dict[str, float]
    """Tower to the share of its importance that the narrow model has."""
    parameters_before: int
    parameters_after: int
    method: str
    tried: list[dict[str, Any]]
    """Every candidate with its time beside the source's tower and the importance that it keeps."""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def candidates(source: ImageTextModel, tower: Tower) -> list[Candidate]:
    """Narrower, shallower and thinner forms of a tower, the source's own first.

    Raises:
        RecipeError: the image trunk is of a family whose parts nobody has wired.
    """
    make = _image_configs if tower == "image" else _text_configs
    found: dict[str, Candidate] = {}
    for config, change in make(source):
        found.setdefault(json.dumps(dataclasses.asdict(config), sort_keys=True, default=str), Candidate(tower=tower, config=config, change=change))
    return list(found.values())


def _image_configs(source: ImageTextModel) -> Iterator[tuple[ModelConfig, str]]:
    trunk, config = source.image.trunk, source.config
    if isinstance(trunk, PocketTrunk):
        given = dict(config.image.backbone_args)
        dims = [int(dim) for dim in given.get("dims", (32, 64, 160))]
        depths, ratios, names = [len(stage.blocks) for stage in trunk.stages], float(given.get("mlp_ratio", 3.0)), ("dims", "depths", "mlp_ratio")
        mixers = list(given.get("mixers", ["repmixer", "repmixer", "attention"]))
    elif isinstance(trunk, FastVit):
        dims = [int(stage.blocks[0].mlp.fc1.in_channels) for stage in trunk.stages]
        depths, names = [len(stage.blocks) for stage in trunk.stages], ("embed_dims", "layers", "mlp_ratios")
        ratios = float(trunk.stages[0].blocks[0].mlp.fc1.out_channels / dims[0])
        mixers = ["attention" if "Attention" in type(stage.blocks[-1]).__name__ else "repmixer" for stage in trunk.stages]
    else:
        raise RecipeError(f"the image trunk '{config.image.backbone}' ({type(trunk).__name__}) is of a family that structured pruning does not know; expected pocket or FastViT")
    multiplied = isinstance(trunk, FastVit)
    for width, depth, hidden in itertools.product(WIDTHS, DEPTHS, HIDDEN):
        if multiplied:  # stages are tied: each is twice the one before it
            step = HEAD_DIM * dims[0] // np.gcd(dims[0] * HEAD_DIM, dims[-1]) if "attention" in mixers else 8
            first = max(step, int(round(dims[0] * width / step)) * step)
            narrow = [first * dim // dims[0] for dim in dims]
        else:
            narrow = [_multiple(dim * width, HEAD_DIM if mixer == "attention" and count else 8) for dim, mixer, count in zip(dims, mixers, depths, strict=True)]
        shallow = [max(min(count, 1), round(count * depth)) for count in depths]
        ratio_ = ratios * hidden
        args = {**config.image.backbone_args, names[0]: narrow, names[1]: shallow, names[2]: [ratio_] * len(dims) if multiplied else ratio_}
        if (width, depth, hidden) == (1.0, 1.0, 1.0):
            yield config, "as it is"
        else:
            yield dataclasses.replace(config, image=dataclasses.replace(config.image, backbone_args=args)), _words(width, depth, hidden)


def _text_configs(source: ImageTextModel) -> Iterator[tuple[ModelConfig, str]]:
    config = source.config.text
    head = config.width // config.heads
    for width, depth, hidden in itertools.product(WIDTHS, DEPTHS, HIDDEN):
        heads = max(1, round(config.heads * width))
        layers = max(1, round(config.layers * depth))
        text = dataclasses.replace(config, width=heads * head, heads=heads, layers=layers, mlp_ratio=config.mlp_ratio * hidden)
        if (width, depth, hidden) == (1.0, 1.0, 1.0):
            yield source.config, "as it is"
        else:
            yield dataclasses.replace(source.config, text=text), _words(width, depth, hidden)


def _multiple(value: float, of: int) -> int:
    return max(of, round(value / of) * of)


def _words(width: float, depth: float, hidden: float) -> str:
    named = zip(("width", "depth", "hidden units"), (width, depth, hidden), strict=True)
    return ", ".join(f"{name} {share:g}" for name, share in named if share != 1.0) or "as it is"


def measure_times(found: list[Candidate], cache: Path, say: Callable[[str], None] = lambda line: None) -> list[float]:
    """Time of each candidate beside the first, under ONNX Runtime, one input, one thread. What was measured before with this version stays in `cache`."""
    import onnxruntime

    try:
        known: dict[str, float] = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    keys = [_key(one, found[0], onnxruntime.__version__) for one in found]
    base: tuple[Callable[[np.ndarray], np.ndarray], np.ndarray] | None = None
    missing = [place for place, key in enumerate(keys) if key not in known]
    for start in range(0, len(missing), TOGETHER):
        part = missing[start : start + TOGETHER]
        base = base or _opened(found[0])
        opened = {str(place): _opened(found[place])[0] for place in part}
        runs = {"base": functools.partial(base[0], base[1]), **{name: functools.partial(run, base[1]) for name, run in opened.items()}}
        times = interleaved(runs, pairs=60, settle=SETTLE)
        known |= {keys[place]: ratio(times[str(place)], times["base"]).median for place in part}
        write_json(cache, known)
        say(f"{found[0].tower}: timed {min(start + TOGETHER, len(missing))} of {len(missing)} candidates")
    return [known[key] for key in keys]


def _key(one: Candidate, base: Candidate, version: str) -> str:
    part = {tower: dataclasses.asdict(getattr(config, one.tower)) for tower, config in (("is", one.config), ("base", base.config))}
    return f"{one.tower}-{hashlib.sha256(json.dumps([part, one.config.embed_dim, version], sort_keys=True, default=str).encode()).hexdigest()[:20]}"


def _opened(one: Candidate) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]:
    """A tower of this shape at random weights; its time does not depend on them."""
    model, rng = reparameterize(ImageTextModel(one.config).eval())[0], np.random.default_rng(0)
    size, text = one.config.image.image_size, one.config.text
    if one.tower == "image":
        rows = rng.normal(size=(2, 3, size, size)).astype(np.float32)
    else:
        rows = rng.integers(1, text.vocab_size - 2, size=(2, text.context_length)).astype(np.int32)
    return OnnxEncoder(serialize(export_onnx(encoder_of(model, one.tower), rows))), rows[:1]


def narrow(
    source: ImageTextModel, share: float, samples: Samples, *, cache: Path, method: str = "fisher", seed: int = 0, say: Callable[[str], None] = lambda line: None
) -> tuple[ImageTextModel, Report]:
    """The model with the most of the source's importance among those whose two towers together take at most `share` of its time.

    Args:
        source: not folded, its feed-forward layers not cut; left alone.
        share: of one picture and one text through both towers, above 0 and below 1.
        samples: calibration pairs for importance.
        cache: file of measured times.
        method: of `export.importance`.

    Raises:
        RecipeError: a share out of range, a source that cannot be narrowed, or no candidate that is fast enough; the message says the fastest.
    """
    if not 0 < share < 1:
        raise RecipeError(f"the share of time is {share:g}, expected above 0 and below 1")
    if source.config.folded or source.config.ffn_widths:
        raise RecipeError(f"'{source.config.name}' is {'folded' if source.config.folded else 'pruned in its feed-forward layers'} already; narrow the checkpoint from before that")
    weights = importance(source, samples, method, seed=seed)
    towers: dict[Tower, list[tuple[Candidate, float, float]]] = {}
    for tower in ("image", "text"):
        found = candidates(source, tower)
        times = measure_times(found, cache, say)
        kept = [inherit(ImageTextModel(one.config), source, importance=weights)[1].kept[tower] for one in found]
        towers[tower] = list(zip(found, times, kept, strict=True))
    parts = _shares(towers["image"][0][0], towers["text"][0][0])
    pairs = [(image, text, parts["image"] * image[1] + parts["text"] * text[1]) for image in towers["image"] for text in towers["text"]]
    allowed = [pair for pair in pairs if pair[2] <= share]
    if not allowed:
        fastest = min(pairs, key=lambda pair: pair[2])
        raise RecipeError(
            f"no narrower form takes {share:g} of the time of '{source.config.name}'; the fastest takes {fastest[2]:.2f} "
            f"(image: {fastest[0][0].change}; text: {fastest[1][0].change})"
        )
    image, text, taken = max(allowed, key=lambda pair: pair[0][2] * pair[1][2])
    config = dataclasses.replace(image[0].config, text=text[0].config.text, name=f"{source.config.name}-narrow")
    made, report = inherit(ImageTextModel(config), source, importance=weights)
    return made.eval(), Report(
        image=image[0].change, text=text[0].change, time_share=taken, kept=report.kept, parameters_before=count_parameters(source)["total"],
        parameters_after=count_parameters(made)["total"], method=method,
        tried=[{"tower": one.tower, "change": one.change, "time": time, "kept": kept} for found in towers.values() for one, time, kept in found],
    )  # fmt: skip


def _shares(image: Candidate, text: Candidate) -> dict[str, float]:
    """What each tower of the source takes of their common time."""
    opened = {"image": _opened(image), "text": _opened(text)}
    times = interleaved({name: functools.partial(run, rows) for name, (run, rows) in opened.items()}, settle=SETTLE)
    medians = {name: float(np.median(values)) for name, values in times.items()}
    return {name: value / sum(medians.values()) for name, value in medians.items()}
