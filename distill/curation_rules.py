"""The rules of `mclip curate`, and the state that they share. Each follows a paper, which its report names.

Positions are rows of the pairs folder, 0 to N - 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from distill import duplicates
from distill.duplicates import Kept
from distill.keep_list import KeepList
from distill.perceptual_hash import HammingIndex
from distill.picture_facts import PictureFacts, read_pictures
from distill.remote import local_pairs
from distill.store import Store
from distill.stored_similarity import caption_similarities, picture_vectors
from runtime.errors import PairsError, StoreError
from runtime.pairs import Pairs

if TYPE_CHECKING:
    from distill.curate import CurateConfig

CAP = 1000
"""Keys and groups that a report lists for a rule; its counts are always complete."""


class Selection:
    """Which pairs are left, and what every rule dropped."""

    def __init__(self, pairs: Pairs, store: Store | None, shards: dict[str, str], config: CurateConfig) -> None:
        self.pairs, self.store, self.config = pairs, store, config
        self.alive = np.ones(len(pairs), bool)
        self.steps: list[dict[str, Any]] = []
        self.similarity = np.full(len(pairs), np.nan, np.float32)
        """Of picture and caption by the store; NaN where there is no row."""
        self.store_row = np.full(len(pairs), -1, np.int64)
        self.pictures: PictureFacts | None = None
        self._place = np.full(len(pairs), -1, np.int64)
        if store is not None:
            self._join(store, shards)

    def _join(self, store: Store, shards: dict[str, str]) -> None:
        place = {key: row for row, key in enumerate(self.pairs.keys)}
        strangers = [key for key in store.keys if key not in place]
        if 2 * len(strangers) >= len(store):  # a few pictures may have gone since, as training allows too
            first = f", the first '{strangers[0]}'," if strangers else ""
            raise StoreError(f"the store '{store.path}' does not belong to these pairs: {len(strangers)} of its {len(store)} keys{first} are not among them; give their own")
        changed = [name for name, digest in store.index.get("shards", {}).items() if shards.get(name, digest) != digest]
        if changed:
            raise StoreError(f"the store '{store.path}' was made from another version of the shard '{changed[0]}'; reinforce these pairs again")
        for row, key in enumerate(store.keys):
            if key in place:
                self.store_row[place[key]] = row
        has = self.store_row >= 0
        if self.config.similarity_of == "best":
            best = np.concatenate([np.nanmax(caption_similarities(store, rows), axis=1) for rows in _blocks(self.store_row[has])])
            self.similarity[has] = best
        elif "similarity" in store.index.get("columns", {}) or self.config.min_similarity is not None or self.config.keep_fraction is not None:
            self.similarity[has] = store.column("similarity")[self.store_row[has]]

    def begin_with(self, keep: KeepList, name: str) -> None:
        """Leave out what a former keep-list left out."""
        kept = keep.mask(self.pairs.keys)
        if int(kept.sum()) != len(keep):
            missing = len(keep) - int(kept.sum())
            raise PairsError(f"the keep-list '{name}' was made for other pairs: {missing} of its {len(keep)} keys are not in {self.pairs.folder}; give the list of these pairs")
        self.drop("former list", "the keep-list that was given with --within", np.flatnonzero(~kept))

    @property
    def rows(self) -> np.ndarray:
        """Rows that are left, rising."""
        return np.flatnonzero(self.alive)

    def drop(self, rule: str, follows: str, rows: np.ndarray | list[int], why: dict[str, int] | None = None, **facts: Any) -> None:
        """Take rows out and note it. `why` counts reasons."""
        before = int(self.alive.sum())
        self.alive[rows] = False
        left = int(self.alive.sum())
        keys = sorted(self.pairs.keys[row] for row in rows)
        self.steps.append({"rule": rule, "follows": follows, "in": before, "dropped": before - left, "left": left, "why": why or {}, **facts, "dropped_keys": keys[:CAP]})

    def facts(self) -> tuple[PictureFacts, np.ndarray]:
        """Facts of the pictures (read at the first call), and the place in them of every row that is left."""
        if self.pictures is None:
            rows = self.rows
            self.pictures = read_pictures(self.pairs, rows, self.config.workers)
            self._place[rows] = np.arange(len(rows))
            broken = rows[~self.pictures.readable]
            self.drop("unreadable", "a picture that does not decode trains nothing", broken, {"do not decode": len(broken)} if len(broken) else None)
        return self.pictures, self._place[self.rows]

    def preference(self, rows: np.ndarray) -> np.ndarray:
        """Positions in `rows` from the best to the worst: higher similarity, larger picture, larger file, smaller key."""
        columns = [np.array([self.pairs.keys[row].encode() for row in rows], object)]
        if self.pictures is not None:
            place = self._place[rows]
            columns += [-self.pictures.file_bytes[place], -self.pictures.sizes[place].prod(axis=1)]
        columns.append(-np.nan_to_num(self.similarity[rows], nan=-2.0))
        columns[0] = np.unique(columns[0], return_inverse=True)[1]
        return np.lexsort(columns)

    def drop_duplicates(self, rule: str, follows: str, rows: np.ndarray, kept: Kept, describe: Callable[[int], dict[str, Any]], **facts: Any) -> None:
        """`kept` and `describe` speak of positions in `rows`."""
        groups, keys = kept.groups(), self.pairs.keys
        shown = []
        for best, others in sorted(groups.items(), key=lambda group: keys[rows[group[0]]])[:CAP]:
            dropped = [{"key": keys[rows[n]], **describe(n)} for n in sorted(others, key=lambda n: keys[rows[n]])]
            shown.append({"kept": keys[rows[best]], "why": self._why(int(rows[best]), [int(rows[n]) for n in others]), "dropped": dropped})
        self.drop(rule, follows, rows[kept.dropped], **facts, groups=len(groups), examples=shown)

    def _why(self, best: int, others: list[int]) -> str:
        others_similarity = np.nan_to_num(self.similarity[others], nan=-2.0)
        if np.isfinite(self.similarity[best]) and self.similarity[best] > others_similarity.max():
            return f"highest similarity, {self.similarity[best]:.3f} over {self.similarity[others][others_similarity.argmax()]:.3f}"
        if self.pictures is not None:
            sizes, lengths = self.pictures.sizes.prod(axis=1), self.pictures.file_bytes
            place, rest = self._place[best], self._place[others]
            if sizes[place] > sizes[rest].max():
                return f"largest picture, {self.pictures.sizes[place][0]} x {self.pictures.sizes[place][1]}"
            if lengths[place] > lengths[rest].max():
                return f"largest file, {lengths[place]} bytes"
        return "first key"


def apply_rules(selection: Selection) -> None:
    """Every rule that the config asks for, in order."""
    config = selection.config
    if not (config.min_caption_chars is config.min_caption_words is config.max_caption_words is None):
        caption_length(selection)
    if config.min_side is not None or config.max_aspect is not None:
        picture_size(selection)
    if config.exact:
        exact_duplicates(selection)
    if config.near:
        near_duplicates(selection)
    if config.apart_from is not None:
        apart_from(selection)
    if config.max_shared_caption is not None:
        shared_caption(selection)
    if config.embedding_duplicates is not None or config.min_similarity is not None or config.keep_fraction is not None:
        not_in_store(selection)
    if config.embedding_duplicates is not None:
        embedding_duplicates(selection)
    if config.min_similarity is not None or config.keep_fraction is not None:
        similarity(selection)


def caption_length(selection: Selection) -> None:
    config, why, dropped = selection.config, Counter[str](), []
    for row in selection.rows.tolist():
        text = _caption(selection.pairs, row)
        words = len((text or "").split())
        if text is None:
            reason = "not UTF-8"
        elif not text and (config.min_caption_chars or config.min_caption_words):
            reason = "empty"
        elif len(text) < (config.min_caption_chars or 0):
            reason = "too few characters"
        elif words < (config.min_caption_words or 0):
            reason = "too few words"
        elif words > (config.max_caption_words or math.inf):
            reason = "too many words"
        else:
            continue
        why[reason] += 1
        dropped.append(row)
    selection.drop("caption length", "ALIGN (Jia et al. 2021) and DataComp's basic filter (Gadre et al. 2023), which choose the limits", dropped, dict(why))


def picture_size(selection: Selection) -> None:
    facts, place = selection.facts()
    short, long = facts.sizes[place].min(axis=1), facts.sizes[place].max(axis=1)
    small = short < (selection.config.min_side or 0)
    thin = ~small & (long > short * (selection.config.max_aspect or math.inf))
    why = {name: int(which.sum()) for name, which in (("too small", small), ("too long for their width", thin)) if which.any()}
    selection.drop("picture size", "ALIGN (Jia et al. 2021) and DataComp's basic filter (Gadre et al. 2023), which choose the limits", selection.rows[small | thin], why)


def exact_duplicates(selection: Selection) -> None:
    facts, place = selection.facts()
    rows = selection.rows
    kept = duplicates.exact([value.tobytes() for value in facts.pixel_sha256[place]], selection.preference(rows))
    same_file = facts.file_sha256[place] == facts.file_sha256[place][kept.by]
    files = int((kept.dropped & same_file).sum())
    why = {name: count for name, count in (("the same file", files), ("the same pixels in another file", int(kept.dropped.sum()) - files)) if count}
    follows = "common practice; how many duplicates web data hold: Webster et al. 2023, on LAION-2B"
    selection.drop_duplicates("exact duplicates", follows, rows, kept, lambda n: {"same": "file" if same_file[n] else "pixels"}, why=why)


def near_duplicates(selection: Selection) -> None:
    facts, place = selection.facts()
    rows, config = selection.rows, selection.config
    kept, spared = duplicates.near(facts.hashes[place], facts.thumbnails[place], selection.preference(rows), distance=config.near_distance, colour=config.near_colour)
    follows = "DCT hash (Zauner 2010), multi-index hashing (Norouzi et al. 2012)"
    selection.drop_duplicates("near duplicates", follows, rows, kept, lambda n: {"bits": int(kept.apart[n])}, spared_for_their_colours=spared)


def apart_from(selection: Selection) -> None:
    facts, place = selection.facts()
    config, folder = selection.config, str(selection.config.apart_from)
    others = local_pairs(folder, strict=False)
    theirs = read_pictures(others, np.arange(len(others)), config.workers)
    index, readable = HammingIndex(config.near_distance, len(others)), np.flatnonzero(theirs.readable)
    for value in theirs.hashes[readable].tolist():
        index.add(value)
    dropped, examples = [], []
    for row, n in zip(selection.rows.tolist(), place.tolist(), strict=True):
        for bits, number in index.within(int(facts.hashes[n])):
            other = readable[number]
            if np.abs(theirs.thumbnails[other].astype(int) - facts.thumbnails[n]).max() <= config.near_colour:
                dropped.append(row)
                examples.append({"key": selection.pairs.keys[row], "like": others.keys[other], "bits": bits})
                break
    follows = "ALIGN (Jia et al. 2021) and DataComp (Gadre et al. 2023), which take evaluation pictures out; here by the hash of near duplicates"
    selection.drop("apart from", follows, dropped, examples=examples[:CAP])


def shared_caption(selection: Selection) -> None:
    rows, limit = selection.rows.tolist(), selection.config.max_shared_caption or 0
    texts = [" ".join((_caption(selection.pairs, row) or "").split()).casefold() for row in rows]
    counts = Counter(text for text in texts if text)
    dropped = [row for row, text in zip(rows, texts, strict=True) if counts[text] > limit]
    many = [{"caption": text[:200], "pictures": count} for text, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count > limit]
    selection.drop("shared caption", "ALIGN (Jia et al. 2021): captions of more than 10 pictures say little of each", dropped, captions=len(many), examples=many[:CAP])


def not_in_store(selection: Selection) -> None:
    missing = selection.rows[selection.store_row[selection.rows] < 0]
    if len(missing):
        selection.drop("not in the store", "a pair that was not reinforced cannot be judged, nor trained on", missing)


def embedding_duplicates(selection: Selection) -> None:
    rows, config, store = selection.rows, selection.config, selection.store
    assert store is not None
    where = selection.store_row[rows]
    kept, cells = duplicates.embedded(
        lambda some: picture_vectors(store, where[some]), selection.preference(rows), threshold=config.embedding_duplicates or 0.0, cells=config.cells, seed=config.seed
    )
    selection.drop_duplicates("embedding duplicates", "SemDeDup (Abbas et al. 2023)", rows, kept, lambda n: {"cosine": round(float(kept.apart[n]), 4)}, cells=cells)


def similarity(selection: Selection) -> None:
    rows, config = selection.rows, selection.config
    values = selection.similarity[rows]
    unknown = ~np.isfinite(values)
    if config.min_similarity is not None:
        dropped, follows = unknown | ~(values >= config.min_similarity), "CLIP-score threshold of LAION-400M (Schuhmann et al. 2021)"
    else:
        order = np.lexsort([np.unique([selection.pairs.keys[row].encode() for row in rows], return_inverse=True)[1], -np.nan_to_num(values, nan=-2.0)])
        dropped, follows = unknown.copy(), "CLIP-score top fraction of DataComp (Gadre et al. 2023); with a better teacher, Data Filtering Networks (Fang et al. 2023)"
        dropped[order[math.ceil(len(rows) * (config.keep_fraction or 1.0)) :]] = True
    finite, kept = values[~unknown], values[~dropped]
    facts = {
        "similarity_of": config.similarity_of, "not_finite": int(unknown.sum()), "threshold": round(float(kept.min()), 6) if len(kept) else None,
        "percentiles": {str(p): round(float(np.percentile(finite, p)), 4) for p in (1, 5, 10, 25, 50, 75, 90, 95, 99)} if len(finite) else {},
    }  # fmt: skip
    selection.drop("similarity", follows, rows[dropped], {"not finite": int(unknown.sum())} if unknown.any() else None, **facts)


def _caption(pairs: Pairs, row: int) -> str | None:
    """The caption, "" when there is none, None when it is not UTF-8."""
    if not pairs.has_caption(row):
        return ""
    try:
        return pairs.caption(row)
    except PairsError:
        return None


def _blocks(rows: np.ndarray, size: int = 4096) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)] or [rows]
