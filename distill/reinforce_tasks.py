"""What the driver of `mclip reinforce` tells its workers, and what they answer. Plain data, small, sent between processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from distill.augment import AugmentSpec
from distill.reinforce_captions import CaptionPlan
from distill.remote import ShardPlace


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanTask:
    """Index and hash one shard. stash: file that keeps the answer for a rerun, "" for none; given: captions file whose names are wanted too."""

    place: ShardPlace
    stash: str = ""
    given: str = ""


@dataclass(kw_only=True, slots=True)
class ShardScan:
    """key_hashes: (n,) uint64 in the order of the rows; rejected: {key, shard, reason}; sources, languages: of the given captions."""

    name: str
    sha256: str
    key_hashes: np.ndarray
    rejected: list[dict[str, str]]
    sources: list[str]
    languages: list[str]
    drop: tuple[int, ...] = ()
    """Rows whose key stands in an earlier shard already; the driver fills this in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTask:
    """Embed these texts into this file."""

    path: str
    texts: list[str]
    metadata: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class PartTask:
    """Embed `count` rows of a shard, from its usable row `first` on, into the part at `path`.

    drop: rows of the shard that are not usable; base: number of row `first` in the pairs folder; texts: per row the numbers of its
    captions' texts in the files of folder `work`, None where the worker embeds them itself; remote: address that the part goes to.
    """

    place: ShardPlace
    path: str
    first: int
    count: int
    base: int
    drop: tuple[int, ...]
    captions: CaptionPlan
    texts: list[list[int]] | None
    work: str
    augmentations: int
    spec: AugmentSpec
    seed: int
    dtype: str
    tables: dict[str, list[str]]
    metadata: dict[str, str]
    remote: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTask:
    """Make the part of a later layer that belongs to one base part.

    index: the store's index cut to that part and the layers that stand; kind: what the layer adds; views: run-on numbers of its views, from
    and before; teachers: the store's numbers of the teachers whose vectors it holds; loaded: which of the worker's teachers these are;
    count: rows of the base part.
    """

    store: str
    index: dict[str, Any]
    path: str
    place: ShardPlace
    count: int
    kind: str
    views: tuple[int, int]
    teachers: tuple[int, ...]
    loaded: tuple[int, ...]
    given: str
    spec: AugmentSpec
    seed: int
    dtype: str
    tables: dict[str, list[str]]
    metadata: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class PartDone:
    """A part's entry for the index, what it left out, and the processor seconds of each phase (empty for a part found done)."""

    entry: dict[str, Any]
    skipped: list[dict[str, str]]
    seconds: dict[str, float]
