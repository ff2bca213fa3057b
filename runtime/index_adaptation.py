"""mclip adapt OLD NEW --out FILE: fit an adapter, and refuse it where new queries would find less in an old gallery than old ones do."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.errors import ImageError, SearchError
from runtime.index_adapter import MOST_BYTES, Adapter, fit, tensors
from runtime.index_models import identity, same_model
from runtime.metrics import paired_recall_test, ranks, recall_at_k
from runtime.pairs import Pairs

if TYPE_CHECKING:
    from runtime.encoder import Clip

KS = (1, 5, 10)
HELD_OUT = 5
"""One caption in so many is held out, where the texts that are fitted on are also the ones that are checked on."""
_BATCH = 64


def adapt(
    old: Clip, new: Clip, *, texts: Sequence[str] = (), pairs: Pairs | None = None, check: Pairs | None = None, pictures: bool = False, seed: int = 0
) -> tuple[Adapter, dict[str, Any]]:
    """Fit on texts alone or with pairs, check on what was held out.

    Args:
        texts: to fit on: the new model's text is led to the old model's.
        pairs: to fit on: the new model's caption is led to between the old model's caption and picture.
        check: pairs to check with; None: a fifth of the captions of `pairs`; without any pairs, shortened texts among whole ones.
        pictures: fit a map for picture queries too, on the pictures of `pairs`.

    Returns:
        The adapter and its figures: `new_on_old` and `old_on_old` {recall1, recall5, recall10}, `difference` of recall@5 with its paired
        95 % interval `low`, `high`, `checked_on`, `n`, `ok` (False when the interval lies below zero).

    Raises:
        SearchError: too few texts, one model twice, or pictures asked for without pairs.
    """
    sides = {"old": identity(old.manifest), "new": identity(new.manifest)}
    if same_model(sides["old"], sides["new"]):
        raise SearchError(f"both bundles hold checkpoint {sides['old']['checkpoint'][:12]}: one model needs no adapter")
    if pictures and pairs is None:
        raise SearchError("a map for picture queries is fitted on pictures; give --pairs")
    every = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    inside = [text for text in every if check is not None or pairs is not None or not held_out(text)]
    new_text, target = new.encode_text(inside), old.encode_text(inside)
    facts: dict[str, Any] = {"texts": len(inside), "pairs": 0}
    most = (MOST_BYTES - 20_000) // (2 if pictures else 1)
    found: dict[str, np.ndarray] = {}
    if pairs is not None:
        rows = _captioned(pairs, lambda caption: check is not None or not held_out(caption))
        sides_seen, kept = _pictures(pairs, rows, (old, new) if pictures else (old,))
        captions = [pairs.caption(row).strip() for row in kept]
        # Between the old model's text and its picture: that is where a query finds the picture best.
        middle = old.encode_text(captions) + sides_seen[0]
        new_text = np.concatenate([new_text, new.encode_text(captions)])
        target = np.concatenate([target, middle / np.maximum(np.linalg.norm(middle, axis=1, keepdims=True), 1e-12)])
        facts["pairs"] = len(kept)
        if pictures:
            weight, bias, facts["picture_cosine"] = fit(sides_seen[1], sides_seen[0], seed)
            found |= tensors("image", weight, bias, most)
    weight, bias, facts["text_cosine"] = fit(new_text, target, seed)
    found |= tensors("text", weight, bias, most)
    adapter = Adapter(old=sides["old"], new=sides["new"], tensors=found)
    if check is not None or pairs is not None:
        facts |= _check_pairs(adapter, old, new, check or pairs, check is None, seed)  # type: ignore[arg-type]
    else:
        facts |= _check_texts(adapter, old, new, [text for text in every if held_out(text)], seed)
    return Adapter(old=sides["old"], new=sides["new"], tensors=found, figures=facts), facts


def held_out(text: str) -> bool:
    """Whether a caption is held out: by the hash of its letters, so that the same words never stand on both sides."""
    return hashlib.sha256(" ".join(text.lower().split()).encode("utf-8", "replace")).digest()[0] % HELD_OUT == 0


def _check_pairs(adapter: Adapter, old: Clip, new: Clip, pairs: Pairs, only_held_out: bool, seed: int) -> dict[str, Any]:
    rows = _captioned(pairs, lambda caption: not only_held_out or held_out(caption))
    (gallery,), kept = _pictures(pairs, rows, (old,))
    texts = [pairs.caption(n).strip() for n in kept]
    return _compared(adapter.text(new.encode_text(texts)), old.encode_text(texts), gallery, texts, seed) | {"checked_on": f"{len(kept)} pairs"}


def _captioned(pairs: Pairs, wanted: Callable[[str], bool]) -> list[int]:
    return [row for row in range(len(pairs)) if pairs.has_caption(row) and (caption := pairs.caption(row).strip()) and wanted(caption)]


def _check_texts(adapter: Adapter, old: Clip, new: Clip, texts: Sequence[str], seed: int) -> dict[str, Any]:
    queries = [shortened(text) for text in texts]
    gallery = old.encode_text(texts)
    return _compared(adapter.text(new.encode_text(queries)), old.encode_text(queries), gallery, texts, seed) | {"checked_on": f"{len(texts)} shortened texts among whole ones"}


def shortened(text: str) -> str:
    """Every other word of a text of three words or more, from the first on; a shorter one in a phrase."""
    words = text.split()
    return " ".join(words[::2]) if len(words) > 2 else f"a picture of {text}"


def _pictures(pairs: Pairs, rows: Sequence[int], clips: Sequence[Clip]) -> tuple[list[np.ndarray], list[int]]:
    """Embeddings (n, width) of the pictures of these rows by each model, and the rows that decode."""
    found: list[list[np.ndarray]] = [[] for _ in clips]
    kept: list[int] = []
    for start in range(0, len(rows), _BATCH):
        batch = []
        for row in rows[start : start + _BATCH]:
            with contextlib.suppress(ImageError):
                batch.append(pairs.image(row))
                kept.append(row)
        for part, clip in zip(found, clips, strict=True):
            part.append(clip.encode_image(batch))
    return [np.concatenate(part) if part else np.zeros((0, clip.embed_dim), np.float32) for part, clip in zip(found, clips, strict=True)], kept


def _compared(new: np.ndarray, old: np.ndarray, gallery: np.ndarray, texts: Sequence[str], seed: int) -> dict[str, Any]:
    """Recall of both sides among the old model's vectors; what stands for the same text is right for each of its queries."""
    if len(texts) < 2 * max(KS):
        raise SearchError(f"only {len(texts)} held-out texts are there to check the adapter with; give more texts, or pairs with --check")
    rows: dict[str, list[int]] = {}
    for n, text in enumerate(texts):
        rows.setdefault(text.lower(), []).append(n)
    targets = [rows[text.lower()] for text in texts]
    ranked = {"new_on_old": ranks(new, gallery, targets), "old_on_old": ranks(old, gallery, targets)}
    verdict = paired_recall_test(ranked["new_on_old"], ranked["old_on_old"], 5, seed)
    recalls = {name: {f"recall{k}": recall_at_k(found, k) for k in KS} for name, found in ranked.items()}
    return {**recalls, "n": len(texts), "difference": verdict.difference, "low": verdict.interval[0], "high": verdict.interval[1], "ok": verdict.interval[1] >= 0}


def read_texts(path: Path) -> list[str]:
    """A text a line; of a .jsonl file the strings under "text", "caption" or "label" of each line. Raises SearchError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        if path.suffix != ".jsonl":
            return [line.strip() for line in lines if line.strip()]
        entries = [json.loads(line) for line in lines if line.strip()]
        return [entry[name] for entry in entries for name in ("text", "caption", "label") if isinstance(entry.get(name), str)]
    except OSError as error:
        raise SearchError(f"{path} cannot be read ({error.strerror or error}); give a file with one text a line") from error
    except (UnicodeDecodeError, ValueError, AttributeError) as error:
        raise SearchError(f"{path} is no file of texts ({error}); expected UTF-8, one text (or, in .jsonl, one object) a line") from error
