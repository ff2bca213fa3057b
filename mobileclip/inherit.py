"""Weights of a larger model as the start of a smaller one.

TinyCLIP (Wu et al. 2023, section 3.3): a student made of a part of its source's layers and channels starts far ahead of
random weights. Here layers are spread evenly over the source's, and channels are chosen by the size of the weights that
write and read them, once for all tensors that share them (`mobileclip.inherit_links`). No data is looked at.

The shared space of both towers is cut by a rotation, not by a choice: the projections of both are seen along the directions
that carry most of their weight, turned to lie as close as they can to the first coordinates. Inner products do not notice
the turn; a source whose first coordinates matter most (principal axes, nested dimensions) keeps them.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mobileclip.inherit_links import EMBED, Heads, Layers, Pick, Wiring, image_wiring, text_wiring, token_rows
from mobileclip.model import ImageTextModel
from mobileclip.projection import MlpProjection
from runtime.errors import CheckpointError

Channels = Literal["norm", "first"]
EPSILON = 1e-5  # of BatchNorm
TABLE = "text.token_embedding.weight"
NARROW = "text.embedding_projection.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerReport:
    """What one tower took over. Shares count the student's parameters, BatchNorm statistics not among them."""

    tensors: int
    tensors_inherited: int
    """At least in part."""
    parameters: int
    parameters_inherited: int
    blocks: dict[str, str] = field(default_factory=dict)
    """Path of a block of the student to the source's."""
    channels: dict[str, str] = field(default_factory=dict)
    """Space to the source's channels in it, "0-31, 40 of 64"; of hidden layers how many."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What `inherit` did."""

    source: str
    licence: str
    image: TowerReport
    text: TowerReport
    shared_space: str
    kept: dict[str, float]
    """Tower to the share of its importance (squared weights, or what was given) that the student has."""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def inherit(
    student: ImageTextModel, source: ImageTextModel, *, layers: Layers = "even", channels: Channels = "norm", importance: Mapping[str, Tensor] | None = None
) -> tuple[ImageTextModel, Report]:
    """A copy of `student` with weights of `source` wherever the two are of one kind; both are left alone.

    Where the student has the source's dimensions it gets the source's weights, bit for bit. What the source does not have
    (a longer context, more merges, another family of image towers) keeps the student's own weights, and the report says so.

    Args:
        student: with its own initialisation, not folded.
        source: usually larger; not folded; pruned ones will do.
        layers: which blocks: "even" spreads them from the source's first to its last, "first" takes the first ones; a list
            names the source's attention blocks for the text tower, and the image tower's stages then take "even".
        channels: "norm" keeps those with the largest weights, "first" those with the smallest numbers.
        importance: of the source's parameters, by name and of their shapes: what "norm" goes by in place of squared weights (export/importance.py).

    Returns:
        The student, whose config carries the source's licence and name, and the report.

    Raises:
        CheckpointError: one of them is folded, a setting is unknown, or nothing at all can be inherited.
    """
    if channels not in ("norm", "first"):
        raise CheckpointError(f"channels is '{channels}', expected 'norm' or 'first'")
    for role, model in (("student", student), ("source", source)):
        if model.config.folded:
            raise CheckpointError(f"the {role} '{model.config.name}' is folded: the branches that training needs are gone; take the checkpoint from before folding")
    result = copy.deepcopy(student)
    wirings = {"image": image_wiring(student, source, layers), "text": text_wiring(student, source, layers)}
    transfer = _Transfer(result, source, wirings, channels, importance)
    transfer.copy()
    if not wirings["text"].note:
        transfer.copy_table()
    if not transfer.taken:
        raise CheckpointError(
            f"nothing of '{source.config.name}' fits '{student.config.name}': {'; '.join(wiring.note for wiring in wirings.values())}; take another source"
        )
    with torch.no_grad():
        result.logit_scale.copy_(source.logit_scale)
        if result.logit_bias is not None and source.logit_bias is not None:
            result.logit_bias.copy_(source.logit_bias)
    if source.config.licence != student.config.licence:
        result.config = dataclasses.replace(student.config, licence=source.config.licence)
    result.config = dataclasses.replace(result.config, sources=(*source.config.sources, f"weights inherited from {source.config.name} ({source.config.licence})"))
    report = Report(
        source=source.config.name, licence=source.config.licence, image=transfer.report("image", wirings["image"]), text=transfer.report("text", wirings["text"]),
        shared_space=transfer.space, kept=transfer.kept(),
    )  # fmt: skip
    return result, report


class _Transfer:
    """One choice of channels, and the copies that follow from it."""

    def __init__(
        self, result: ImageTextModel, source: ImageTextModel, wirings: dict[str, Wiring], channels: Channels, importance: Mapping[str, Tensor] | None = None
    ) -> None:
        self.importance, self.kept_of = importance or {}, {"image": 0.0, "text": 0.0}
        self.result, self.source_model, self.channels = result, source, channels
        self.student, self.source = result.state_dict(), source.state_dict()
        self.parameters = {name for name, _ in source.named_parameters()} - {TABLE, NARROW}
        self.links = [link for wiring in wirings.values() for link in wiring.links]
        self.ties = {name: tie for wiring in wirings.values() for name, tie in wiring.ties.items()}
        self.heads = {name: heads for wiring in wirings.values() for name, heads in wiring.heads.items()}
        self.taken: dict[str, int] = {}
        self.notes: dict[str, list[str]] = {"image": [], "text": []}
        self.token_rows = token_rows(result, source) if not wirings["text"].note else None
        self.table = _table(self.source) if self.token_rows is not None else None
        self.picks = self._choose()
        self.rotation, self.space = self._shared_space()

    def _choose(self) -> dict[str, Pick]:
        votes: dict[str, Tensor] = {}
        sizes: dict[str, tuple[int, int]] = {}
        for link in self.links:
            weight = effective_weight(self.source, link.source)
            for axis, space in enumerate(link.axes):
                if space is None or space == EMBED:
                    continue
                sizes[space] = (self.student[link.student].shape[axis], weight.shape[axis])
                if weight.ndim > 1 and not link.source.endswith("gamma"):
                    self._vote(votes, space, self._worth(link.source, axis))
        if self.token_rows is not None and self.table is not None:
            self._vote(votes, "text.width", _energy(self.table[self.token_rows.source], 1))
        picks: dict[str, Pick] = {}
        for name, heads in self.heads.items():
            picks |= self._choose_heads(name, heads)
        for space, (size, of) in sizes.items():
            if space not in picks and space not in self.ties:
                first = self.channels == "first" or space == "text.positions"
                picks[space] = Pick.leading(_best(None if first else votes.get(space), of, size), size, of)
        for space in [name for name in self.ties if name in sizes]:
            below, times = self.ties[space]
            chosen = picks[below].source[:, None] * times + torch.arange(times)
            picks[space] = Pick.leading(chosen.flatten(), *sizes[space])
        return picks

    def _worth(self, name: str, axis: int) -> Tensor:
        """(C,) what the slices of a source's tensor along an axis are worth."""
        if name in self.importance:
            return self.importance[name].double().movedim(axis, 0).flatten(1).sum(1)
        return _energy(effective_weight(self.source, name), axis)

    def _all(self, name: str) -> Tensor:
        """The worth of every element of a source's tensor."""
        return self.importance[name].double() if name in self.importance else effective_weight(self.source, name).detach().double().square()

    def kept(self) -> dict[str, float]:
        """Share of each tower's importance that was copied; what is seen through a rotation counts as copied whole along it."""
        total = {"image": 0.0, "text": 0.0}
        for name, parameter in self.source_model.named_parameters():
            tower = name.split(".")[0]
            if tower in total and parameter.ndim > 1 and name not in (TABLE, NARROW):
                total[tower] += float(self._all(name).sum())
        return {tower: self.kept_of[tower] / total[tower] if total[tower] else 0.0 for tower in total}

    def _vote(self, votes: dict[str, Tensor], space: str, energy: Tensor) -> None:
        """Every tensor has as much to say as any other, whatever its scale; a tied space votes for the one that it is made of."""
        while space in self.ties:
            space, times = self.ties[space]
            energy = energy.reshape(-1, times).sum(1)
        norms = energy.sqrt()
        share = norms / norms.mean().clamp_min(1e-30)
        votes[space] = votes[space] + share if space in votes else share

    def _choose_heads(self, name: str, heads: Heads) -> dict[str, Pick]:
        """Whole heads first, then dimensions within each: queries and keys of one dimension go together, values and what reads them as well."""
        (few, narrow), (many, wide) = heads.student, heads.source
        q, k, v = self._worth(heads.qkv, 0).reshape(3, many, wide)
        match = (q * k).sqrt()  # what a dimension adds to the attention logits
        carry = (v * self._worth(heads.out, 1).reshape(many, wide)).sqrt()
        first = self.channels == "first"
        worth = sum((part.sum(1) / part.sum().clamp_min(1e-30) for part in (match, carry)), torch.zeros(many, dtype=match.dtype))
        chosen = _best(None if first else worth, many, few)
        picked: list[list[Tensor]] = [[], [], [], []]
        for place, head in enumerate(chosen.tolist()):
            for kind, score in enumerate((match, carry)):
                inside = _best(None if first else score[head], wide, narrow)
                picked[2 * kind].append(place * narrow + torch.arange(len(inside)))
                picked[2 * kind + 1].append(head * wide + inside)
        to_qk, of_qk, to_v, of_v = (torch.cat(part) for part in picked)
        size, of = few * narrow, many * wide
        return {
            name: Pick(student=torch.cat([to_qk, size + to_qk, 2 * size + to_v]), source=torch.cat([of_qk, of + of_qk, 2 * of + of_v]), size=3 * size, of=3 * of),
            f"{name}.out": Pick(student=to_v, source=of_v, size=size, of=of),
        }

    def _shared_space(self) -> tuple[Tensor | None, str]:
        """(source's D, student's D) with orthonormal columns, and what it is in words; None where nothing changes or the student's space is larger."""
        size, of = self.result.config.embed_dim, self.source_model.config.embed_dim
        if size >= of:
            return None, f"{of} dimensions, as they are" if size == of else f"the source's {of} dimensions come first, the student's other {size - of} are its own"
        if self.channels == "first":
            return torch.eye(of)[:, :size], f"the first {size} of {of} coordinates"
        total = torch.zeros(of, of, dtype=torch.float64)
        for weight in _output_weights(self.source_model):
            outer = weight.double() @ weight.double().T
            total += outer / outer.trace()
        values, vectors = torch.linalg.eigh(total)
        basis = vectors[:, -size:]
        left, _, right = torch.linalg.svd(basis[:size].T)  # the orthogonal Procrustes problem: the turn that brings the basis closest to the first axes
        return (basis @ left @ right).float(), f"{size} principal directions of both towers' projections, {float(values[-size:].sum() / values.sum()):.1%} of their weight"

    @torch.no_grad()
    def copy(self) -> None:
        for link in self.links:
            ours, theirs = self.student[link.student], self.source[link.source]
            worth = self._all(link.source) if link.source in self.parameters and theirs.ndim > 1 else None
            places = []
            for axis, space in enumerate(link.axes):
                size, of = ours.shape[axis], theirs.shape[axis]
                if space == EMBED:
                    if self.rotation is not None:
                        theirs = torch.tensordot(self.rotation.to(theirs.dtype), theirs, dims=([0], [axis])).movedim(0, axis)
                    pick = Pick.leading(torch.arange(min(size, theirs.shape[axis])), size, theirs.shape[axis])
                elif space is None:
                    pick = Pick.leading(torch.arange(size), size, of) if size == of else None
                else:
                    pick = self.picks[space]
                if pick is None:
                    break
                theirs = theirs.index_select(axis, pick.source)
                if worth is not None and space != EMBED:
                    worth = worth.index_select(axis, pick.source)
                places.append(pick.student)
            else:
                if worth is not None:
                    self.kept_of[link.source.split(".")[0]] += float(worth.sum())
                self._put(link.student, ours, theirs, places)
                continue
            shapes = f"{tuple(ours.shape)} does not fit the source's {tuple(self.source[link.source].shape)}"
            self.notes[link.student.split(".")[0]].append(f"{link.student} keeps its own weights: {shapes}")
        for name, heads in self.heads.items():
            self._rescale(name, heads)

    def _put(self, name: str, ours: Tensor, theirs: Tensor, places: list[Tensor]) -> None:
        if theirs.shape == ours.shape:
            ours.copy_(theirs)
        else:
            ours[torch.meshgrid(*places, indexing="ij")] = theirs.to(ours.dtype)
        self.taken[name] = theirs.numel()

    def _rescale(self, name: str, heads: Heads) -> None:
        """Attention divides its logits by the root of a head's width: queries make up for the width that is gone."""
        narrow, wide = heads.student[1], heads.source[1]
        queries = self.picks[name].student[: len(self.picks[name].student) // 3]
        for link in self.links:
            if narrow != wide and link.axes and link.axes[0] == name:
                self.student[link.student][queries] *= math.sqrt(narrow / wide)

    @torch.no_grad()
    def copy_table(self) -> None:
        """The token table: rows by token, columns by channel, and the narrow form where one of the two has it."""
        if self.token_rows is None or self.table is None:
            self.notes["text"].append("the token table keeps its own weights: the two have different tokenizers")
            return
        rows, columns = self.token_rows, self.picks["text.width"]
        ours, narrow = self.student[TABLE], self.student.get(NARROW)
        if narrow is None:
            self._put(TABLE, ours, self.table.index_select(0, rows.source).index_select(1, columns.source), [rows.student, columns.student])
            return
        if NARROW in self.source and self.source[TABLE].shape[1] == ours.shape[1]:
            table, up = self.source[TABLE].index_select(0, rows.source), self.source[NARROW].index_select(0, columns.source)
        else:
            # The best table of this rank: the rows seen along their principal directions (Eckart-Young).
            full = self.table.index_select(0, rows.source).index_select(1, columns.source).double()
            up = torch.linalg.eigh(full.T @ full).eigenvectors.flip(1)[:, : ours.shape[1]]
            table, up = (full @ up).to(ours.dtype), up.to(ours.dtype)
            kept = float(table.double().square().sum() / full.square().sum().clamp_min(1e-30))
            self.notes["text"].append(f"the token table is factorised at {ours.shape[1]} dimensions, {kept:.1%} of its energy")
        inner = torch.arange(table.shape[1])
        self._put(TABLE, ours, table, [rows.student, inner])
        self._put(NARROW, narrow, up, [columns.student, inner])

    def report(self, tower: str, wiring: Wiring) -> TowerReport:
        parameters = {name: tensor for name, tensor in self.result.named_parameters() if name.startswith(f"{tower}.")}
        spaces = {name: pick for name, pick in self.picks.items() if name.startswith(f"{tower}.") and not name.endswith((".heads", ".out"))}
        described = {name: f"{len(pick.source)} of {pick.of}" if name.endswith("hidden") else str(pick) for name, pick in spaces.items()}
        for name, heads in self.heads.items():
            if name.startswith(f"{tower}."):
                inside = self.picks[f"{name}.out"].source.div(heads.source[1], rounding_mode="floor").unique()
                described[name] = str(Pick.leading(inside, heads.student[0], heads.source[0]))
        if tower == "text" and self.token_rows is not None:
            described["text.tokens"] = f"{len(self.token_rows.source)} of {self.token_rows.of}"
        if tower == "text" and self.source_model.config.text.mask != self.result.config.text.mask:
            self.notes[tower].append(f"the source's mask is '{self.source_model.config.text.mask}', the student's '{self.result.config.text.mask}'")
        image = self.source_model.config.image
        if tower == "image" and not wiring.note and (image.mean, image.std) != (self.result.config.image.mean, self.result.config.image.std):
            self.notes[tower].append("the source's pixels are normalised by other means and deviations; its first convolutions are taken as they are")
        return TowerReport(
            tensors=len(parameters), tensors_inherited=sum(name in self.taken for name in parameters),
            parameters=sum(tensor.numel() for tensor in parameters.values()), parameters_inherited=sum(self.taken.get(name, 0) for name in parameters),
            blocks=wiring.blocks, channels=described, notes=tuple(filter(None, [wiring.note, *self.notes[tower]])),
        )  # fmt: skip


def effective_weight(state: dict[str, Tensor], name: str) -> Tensor:
    """A weight as it acts: the BatchNorm behind a convolution undoes its scale and sets another."""
    weight, norm = state[name], name.removesuffix("conv.weight") + "bn"
    if not name.endswith("conv.weight") or f"{norm}.running_var" not in state:
        return weight
    scale = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + EPSILON)
    return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))


def _energy(weight: Tensor, axis: int) -> Tensor:
    """Sum of squares of each slice along `axis`, float64."""
    return weight.detach().double().square().movedim(axis, 0).flatten(1).sum(1)


def _best(worth: Tensor | None, of: int, size: int) -> Tensor:
    """Indices of the `size` largest in rising order, all of them where there are not more; the first ones without any worth."""
    if worth is None or size >= of:
        return torch.arange(min(size, of))
    return worth.sort(descending=True, stable=True).indices[:size].sort().values


def _table(state: dict[str, Tensor]) -> Tensor:
    """(V, W): the token table as the blocks see it."""
    return state[TABLE] @ state[NARROW].T if NARROW in state else state[TABLE]


def _output_weights(model: ImageTextModel) -> Iterable[Tensor]:
    """The matrix (D, features) that ends each tower: its projection's linear path, or the trunk's own classifier."""
    for tower in (model.image, model.text):
        inside = tower.trunk if isinstance(tower.projection, nn.Identity) else tower.projection
        linear = [module for module in inside.modules() if isinstance(module, nn.Linear) and module.out_features == model.config.embed_dim]
        if linear:
            yield (inside.linear if isinstance(inside, MlpProjection) else linear[-1]).weight.detach()
