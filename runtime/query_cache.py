"""Embeddings of texts that were asked before: people type the same words again, and each keystroke asks."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

ENTRIES = 2048
LONGEST = 512
"""Characters; longer texts are not remembered."""


class QueryCache:
    """The last texts and their embeddings, the least recently asked forgotten first. Threads may share one.

    Args:
        entries: texts remembered at most; 0: none. A full cache of 2,048 at 512 values a text holds 4 MB.
    """

    def __init__(self, entries: int = ENTRIES) -> None:
        self.entries = entries
        self._rows: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, texts: Sequence[str]) -> np.ndarray | None:
        """(B, D) when every text is known; None otherwise. The array is the caller's."""
        if not texts or len(texts) > self.entries:
            return None
        with self._lock:
            rows = [self._rows.get(text) if type(text) is str else None for text in texts]
            found = [row for row in rows if row is not None]
            if len(found) < len(rows):
                return None
            for text in texts:
                self._rows.move_to_end(text)
        return np.stack(found)

    def put(self, texts: Sequence[str], embeddings: np.ndarray) -> None:
        """Remember (B, D)."""
        if len(texts) > self.entries:
            return
        with self._lock:
            for text, row in zip(texts, embeddings, strict=True):
                if len(text) <= LONGEST:
                    self._rows[text] = row.copy()
                    self._rows.move_to_end(text)
            while len(self._rows) > self.entries:
                self._rows.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._rows.clear()

    def __len__(self) -> int:
        return len(self._rows)
