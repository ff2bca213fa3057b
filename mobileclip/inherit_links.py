"""Which tensor of a small model corresponds to which of a larger one, and which of their axes are wired to each other.

Two axes are in one space when keeping a channel of one means keeping it of the other: all that reads or writes a residual
stream, the two sides of a hidden layer, the rows of queries, keys and values and the columns that read them. A choice of
indices is then made once a space, and every tensor is cut by it (`mobileclip.inherit`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from timm.models.fastvit import FastVit
from torch import Tensor, nn

from mobileclip.model import ImageTextModel
from mobileclip.pocket import PocketTrunk
from runtime.errors import CheckpointError

Layers = Literal["even", "first"] | list[int]
Axes = Callable[[str, Tensor], tuple[str | None, ...]]
"""(name, tensor of the student) -> the space of each dimension."""
EMBED = "embed"
"""The shared space of both towers."""
KEEPS = "the image tower keeps its own weights"


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """One tensor of the student and its counterpart. `axes`: the space of each dimension; None is copied whole and must be of one size."""

    student: str
    source: str
    axes: tuple[str | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """The heads of one attention layer: (heads, dimensions of a head) on both sides, and the source's weights."""

    student: tuple[int, int]
    source: tuple[int, int]
    qkv: str
    out: str


@dataclass(kw_only=True, slots=True)
class Pick:
    """Channels of the source (`source`) and the places in the student (`student`) that they take, of `size` and `of` altogether."""

    student: Tensor
    source: Tensor
    size: int
    of: int

    @classmethod
    def leading(cls, source: Tensor, size: int, of: int) -> Pick:
        return cls(student=torch.arange(len(source)), source=source, size=size, of=of)

    def __str__(self) -> str:
        runs: list[list[int]] = []
        for n in self.source.tolist():
            if runs and n == runs[-1][1] + 1:
                runs[-1][1] = n
            else:
                runs.append([n, n])
        return f"{', '.join(str(a) if a == b else f'{a}-{b}' for a, b in runs)} of {self.of}" + (f", for {self.size}" if self.size > len(self.source) else "")


@dataclass(kw_only=True, slots=True)
class Wiring:
    """One tower's links. A tower that cannot inherit has none, and `note` says why."""

    links: list[Link] = field(default_factory=list)
    blocks: dict[str, str] = field(default_factory=dict)
    """Path of a block of the student to the source's."""
    heads: dict[str, Heads] = field(default_factory=dict)
    """By the name of the space of the rows of queries, keys and values; the columns that read them are NAME.out."""
    ties: dict[str, tuple[str, int]] = field(default_factory=dict)
    """A space whose channels are each `n` in a row made from one channel of another: name to (other, n)."""
    note: str = ""


def pair_layers(students: int, sources: int, layers: Layers) -> list[tuple[int, int]]:
    """(student's block, source's block), increasing in both. "even": spread from the first to the last.

    A student that is deeper than its source gets the source's blocks spread over its own; those between keep their weights,
    which at initialisation add little to the residual stream.

    >>> pair_layers(3, 9, "even")
    [(0, 0), (1, 4), (2, 8)]
    """
    if isinstance(layers, list):
        if len(layers) != students or layers != sorted(set(layers)) or (layers and not 0 <= layers[0] <= layers[-1] < sources):
            raise CheckpointError(
                f"layers is {layers}; the student's text tower has {students} attention blocks and the source's {sources}: "
                f"give {students} different numbers from 0 to {sources - 1} in rising order, or 'even' or 'first'"
            )
        return list(enumerate(layers))
    if layers not in ("even", "first"):
        raise CheckpointError(f"layers is '{layers}', expected 'even', 'first' or a list of block numbers")
    few, many = sorted((students, sources))
    spread = range(few) if layers == "first" or few < 2 else [int(n * (many - 1) / (few - 1) + 0.5) for n in range(few)]
    return list(enumerate(spread)) if students <= sources else [(many_, few_) for few_, many_ in enumerate(spread)]


def text_wiring(student: ImageTextModel, source: ImageTextModel, layers: Layers) -> Wiring:
    """The text towers' links, without the token table (which is not cut along two axes only)."""
    ours, theirs = student.text, source.text
    if ours.config.norm != theirs.config.norm:
        return Wiring(note=f"the source's blocks are {theirs.config.norm}-norm, the student's {ours.config.norm}-norm: the text tower keeps its own weights")
    wiring, names = Wiring(), _Names(student, source)
    wiring.links += names.same("text.positional_embedding", lambda _, tensor: ("text.positions", "text.width"))
    for norm in ("text.ln_embedding", "text.ln_final"):
        wiring.links += names.same(norm, lambda _, tensor: ("text.width",))
    attention = [[n for n, block in enumerate(tower.blocks) if hasattr(block, "attn")] for tower in (ours, theirs)]
    pairs = [(attention[0][a], attention[1][b]) for a, b in pair_layers(len(attention[0]), len(attention[1]), layers)]
    if ours.config.kind == theirs.config.kind == "mct":
        pairs += [(0, 0), (len(ours.blocks) - 1, len(theirs.blocks) - 1)]
    for a, b in pairs:
        _link_block(wiring, names, f"text.blocks.{a}", f"text.blocks.{b}", "text.width")
        if hasattr(ours.blocks[a], "attn"):
            wiring.heads[f"text.blocks.{a}.heads"] = Heads(
                student=(ours.config.heads, ours.config.width // ours.config.heads), source=(theirs.config.heads, theirs.config.width // theirs.config.heads),
                qkv=f"text.blocks.{b}.attn.qkv.weight", out=f"text.blocks.{b}.attn.out.weight",
            )  # fmt: skip
    _link_projection(wiring, names, "text", "text.width")
    return wiring


def token_rows(student: ImageTextModel, source: ImageTextModel) -> Pick | None:
    """CLIP vocabularies agree in bytes, word-final bytes and merges as far as the smaller goes; the two specials come last in each."""
    ours, theirs = student.config.text, source.config.text
    if ours.tokenizer != theirs.tokenizer or (ours.tokenizer != "clip" and ours.vocab_size != theirs.vocab_size):
        return None
    if ours.tokenizer != "clip":
        return Pick.leading(torch.arange(ours.vocab_size), ours.vocab_size, theirs.vocab_size)
    plain = torch.arange(min(ours.vocab_size, theirs.vocab_size) - 2)
    specials = torch.tensor([-2, -1])
    return Pick(
        student=torch.cat([plain, ours.vocab_size + specials]), source=torch.cat([plain, theirs.vocab_size + specials]), size=ours.vocab_size, of=theirs.vocab_size
    )


def image_wiring(student: ImageTextModel, source: ImageTextModel, layers: Layers) -> Wiring:
    """The image towers' links. `layers` as a list is the text tower's business: stages then take "even"."""
    ours, theirs = student.image.trunk, source.image.trunk
    names = _Names(student, source)
    family = next((kind for kind in (PocketTrunk, FastVit) if isinstance(ours, kind) and isinstance(theirs, kind)), None)
    if family is None:
        if {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}:
            wiring = Wiring(links=list(names.same("image.trunk", lambda _, tensor: (None,) * tensor.ndim)))
            _link_projection(wiring, names, "image", None)
            return wiring
        return Wiring(note=f"'{source.config.image.backbone}' and '{student.config.image.backbone}' are of different families: {KEEPS}")
    wiring = Wiring()
    pairs = _stage_pairs(*([{type(block).__name__ for block in stage.blocks} for stage in trunk.stages] for trunk in (ours, theirs)))
    if family is PocketTrunk:
        _link_pocket(wiring, names, pairs)
    else:
        _link_fastvit(wiring, names, ours, theirs, pairs)
    for to_stage, of_stage in pairs if not wiring.note else ():
        a, b, space = ours.stages[to_stage], theirs.stages[of_stage], f"image.stage{to_stage}"
        to_path, of_path = f"image.trunk.stages.{to_stage}", f"image.trunk.stages.{of_stage}"
        wiring.links += names.between(f"{to_path}.pos_emb", f"{of_path}.pos_emb", lambda name, tensor, space=space: _axes(tensor, space, None))
        for to, of in pair_layers(len(a.blocks), len(b.blocks), layers if isinstance(layers, str) else "even"):
            _link_block(wiring, names, f"{to_path}.blocks.{to}", f"{of_path}.blocks.{of}", space)
            mixer, its = a.blocks[to].token_mixer, b.blocks[of].token_mixer
            if hasattr(mixer, "qkv"):
                wiring.heads[f"{to_path}.blocks.{to}.heads"] = Heads(
                    student=(mixer.num_heads, mixer.head_dim), source=(its.num_heads, its.head_dim),
                    qkv=f"{of_path}.blocks.{of}.token_mixer.qkv.weight", out=f"{of_path}.blocks.{of}.token_mixer.proj.weight",
                )  # fmt: skip
    return wiring


def _stage_pairs(ours: list[set[str]], theirs: list[set[str]]) -> list[tuple[int, int]]:
    """(student's stage, source's stage) of the same kinds of blocks: from the front as far as they agree, and the last with the last.

    >>> _stage_pairs([{"conv"}, {"attention"}], [{"conv"}, {"conv"}, {"attention"}])
    [(0, 0), (1, 2)]
    """

    def agree(a: int, b: int) -> bool:
        return not ours[a] or not theirs[b] or ours[a] == theirs[b]

    last = (len(ours) - 1, len(theirs) - 1)
    pairs: list[tuple[int, int]] = []
    for number in range(min(last)):
        if not agree(number, number):
            break
        pairs.append((number, number))
    return [*pairs, last] if agree(*last) else pairs


def _link_pocket(wiring: Wiring, names: _Names, pairs: list[tuple[int, int]]) -> None:
    """Where the stage before has another partner than the source's stage before, the step between the two keeps its own weights."""
    if (0, 0) not in pairs:
        wiring.note = f"the image trunks have other blocks from their first stage on: {KEEPS}"
        return
    wiring.links += names.same("image.trunk.stem.0", lambda name, tensor: _axes(tensor, "image.stem", None))
    wiring.links += names.same("image.trunk.stem.1", lambda name, tensor: _axes(tensor, "image.stage0", "image.stem"))
    for to, of in pairs:
        if (to - 1, of - 1) in pairs:
            spaces = f"image.stage{to}", f"image.stage{to - 1}"
            wiring.links += names.same(f"image.trunk.stages.{to}.downsample", lambda name, tensor, spaces=spaces: _axes(tensor, *spaces))
    if pairs[-1] == names.last_stages():
        last = f"image.stage{pairs[-1][0]}"
        wiring.links += names.same("image.trunk.norm", lambda name, tensor: _axes(tensor, last, None))
        wiring.links += names.same("image.trunk.fc", lambda name, tensor: (EMBED, last)[: tensor.ndim])
        _link_projection(wiring, names, "image", last)


def _link_fastvit(wiring: Wiring, names: _Names, ours: FastVit, theirs: FastVit, pairs: list[tuple[int, int]]) -> None:
    """Stages are joined by depthwise convolutions with a channel multiplier, so one choice of channels decides all stages."""
    if len(pairs) != len(ours.stages) or len(ours.stages) != len(theirs.stages):
        wiring.note = f"the image trunks differ in their stages ({len(theirs.stages)} in the source, {len(ours.stages)} in the student, or other blocks): {KEEPS}"
        return
    widths = [[trunk.stem[-1].out_chs, *(_width(stage) for stage in trunk.stages), trunk.num_features] for trunk in (ours, theirs)]
    steps = [[b / a for a, b in zip(row, row[1:], strict=False)] for row in widths]
    if steps[0] != steps[1] or any(step != int(step) for step in steps[0]):
        wiring.note = f"the stages' widths grow by {steps[1]} in the source and {steps[0]} in the student: {KEEPS}"
        return
    count = len(ours.stages)
    spaces = ["image.stem", *(f"image.stage{number}" for number in range(count)), "image.final"]
    wiring.ties = {space: (below, int(step)) for below, space, step in zip(spaces, spaces[1:], steps[0], strict=False)}
    wiring.links += names.same("image.trunk.stem.0", lambda name, tensor: _axes(tensor, spaces[0], None))
    for part in range(1, len(ours.stem)):
        wiring.links += names.same(f"image.trunk.stem.{part}", lambda name, tensor: _axes(tensor, spaces[0], spaces[0]))
    joins = [(f"image.trunk.stages.{number}.downsample", spaces[number + 1]) for number in range(count)] + [("image.trunk.final_conv", spaces[-1])]
    for path, space in joins:

        def axes(name: str, tensor: Tensor, path: str = path, space: str = space) -> tuple[str | None, ...]:
            squeeze = {"se.fc1": (f"{path}.se", space), "se.fc2": (space, f"{path}.se")}
            return next(((*pair, None, None)[: tensor.ndim] for part, pair in squeeze.items() if f"{part}." in name), _axes(tensor, space, space))

        wiring.links += names.same(path, axes)
    wiring.links += names.same("image.trunk.head.fc", lambda name, tensor: (EMBED, spaces[-1])[: tensor.ndim])
    _link_projection(wiring, names, "image", spaces[-1])


def _link_projection(wiring: Wiring, names: _Names, tower: str, features: str | None) -> None:
    """A projection of ours: one matrix, or a matrix and a hidden layer beside it. Of two kinds nothing is linked."""
    hidden = f"{tower}.projection.hidden"
    spaces = {"fc1.weight": (hidden, features), "fc1.bias": (hidden,), "fc2.weight": (EMBED, hidden), "fc2.bias": (EMBED,)}
    wiring.links += names.same(f"{tower}.projection", lambda name, tensor: spaces.get(name.split("projection.")[1], (EMBED, features)))


def _link_block(wiring: Wiring, names: _Names, student: str, source: str, residual: str) -> None:
    """A transformer or RepMixer block over a residual stream; whatever is neither hidden layer nor attention is a vector or depthwise."""
    hidden, heads = f"{student}.hidden", f"{student}.heads"
    spaces: dict[str, tuple[str | None, ...]] = {
        "mlp.fc1.weight": (hidden, residual), "mlp.fc1.bias": (hidden,), "mlp.fc2.weight": (residual, hidden),
        "attn.qkv.weight": (heads, residual), "attn.qkv.bias": (heads,), "attn.out.weight": (residual, f"{heads}.out"),
        "token_mixer.qkv.weight": (heads, residual), "token_mixer.qkv.bias": (heads,), "token_mixer.proj.weight": (residual, f"{heads}.out"),
    }  # fmt: skip

    def axes(name: str, tensor: Tensor) -> tuple[str | None, ...]:
        found = spaces.get(name.removeprefix(f"{student}."))
        return _axes(tensor, residual, None) if found is None else (*found, None, None)[: tensor.ndim]

    wiring.links += names.between(student, source, axes)
    wiring.blocks[student] = source


def _axes(tensor: Tensor, out: str, inside: str | None) -> tuple[str | None, ...]:
    """(out, in, kernel …) of a dense convolution, (out, 1, kernel …) of a depthwise one, (out,) of a vector, () of a counter."""
    return (out, inside if tensor.ndim == 4 and tensor.shape[1] > 1 else None, None, None)[: tensor.ndim]


def _width(stage: nn.Module) -> int:
    last = stage.blocks[-1] if len(stage.blocks) else None
    return last.mlp.fc2.out_channels if last is not None else stage.downsample.proj[-1].out_chs


class _Names:
    """Pairs tensors of the two models by name."""

    def __init__(self, student: ImageTextModel, source: ImageTextModel) -> None:
        self.models = student, source
        self.student, self.source = student.state_dict(), source.state_dict()

    def between(self, student: str, source: str, axes: Axes) -> Iterator[Link]:
        """Links of everything at or under the two paths that both models have."""
        for name, tensor in self.student.items():
            other = source + name.removeprefix(student)
            if (name == student or name.startswith(f"{student}.")) and other in self.source and self.source[other].ndim == tensor.ndim:
                yield Link(student=name, source=other, axes=axes(name, tensor))

    def same(self, path: str, axes: Axes) -> Iterator[Link]:
        return self.between(path, path, axes)

    def last_stages(self) -> tuple[int, int]:
        student, source = self.models
        return len(student.image.trunk.stages) - 1, len(source.image.trunk.stages) - 1
