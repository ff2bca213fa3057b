"""Perceptual hashes of pictures, and the search for hashes that differ in few bits.

The hash is the DCT hash (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010), 64 bits, as the package
ImageHash computes its `phash`: grey, 32 x 32, two-dimensional DCT, the 8 x 8 lowest frequencies, a bit each for being above their median.
Grey forgets colour: a red heart and a blue one have the same hash. So a thumbnail of 4 x 4 colours goes with it.

The search is multi-index hashing (Norouzi, Punjani and Fleet, "Fast Search in Hamming Space with Multi-Index Hashing", 2012): of m bands of
bits that differ in at most k bits together, one band differs in at most k // m (pigeonhole), so it finds every one within k bits.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from PIL import Image

BITS = 64
SIDE, LOW = 32, 8
THUMBNAIL = 4

_FREQUENCY, _PIXEL = np.arange(LOW)[:, None], np.arange(SIDE)[None, :]
_DCT = 2 * np.cos(np.pi * _FREQUENCY * (2 * _PIXEL + 1) / (2 * SIDE))  # type 2, not normalised; only the rows that are read
_FLAT = 1e-6  # coefficients of a picture without content are rounding noise, which must not decide bits


def perceptual_hash(image: Image.Image) -> int:
    """64-bit DCT hash of an RGB picture. Equal to ImageHash's `phash`, but for pictures without content, which all get one hash."""
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float64)
    low = _DCT @ grey @ _DCT.T
    low[np.abs(low) < _FLAT] = 0.0
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def colour_thumbnail(image: Image.Image) -> np.ndarray:
    """(48,) uint8: mean colours of a 4 x 4 grid of an RGB picture."""
    return np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), np.uint8).reshape(-1)


class HammingIndex:
    """Hashes, found again by any hash within `distance` bits. Grows by `add`; exact."""

    def __init__(self, distance: int, expected: int) -> None:
        """distance: at most so many of 64 bits differ. expected: about how many hashes will be added; decides the number of bands.

        Raises:
            ValueError: a distance outside 0 to 31 (beyond, unrelated pictures match).
        """
        if not 0 <= distance < BITS // 2:
            raise ValueError(f"distance is {distance}, expected 0 to {BITS // 2 - 1} of {BITS} bits")
        self.distance = distance
        bands = min(range(1, distance + 2), key=lambda m: _cost(m, distance, expected))
        edges = [round(BITS * n / bands) for n in range(bands + 1)]
        self._bands = [(start, stop - start) for start, stop in itertools.pairwise(edges)]
        self._masks = [_masks(width, distance // bands) for _, width in self._bands]
        self._tables: list[dict[int, list[int]]] = [{} for _ in self._bands]
        self._hashes: list[int] = []

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, value: int) -> int:
        """Adds a hash; returns its number, counted from 0."""
        number = len(self._hashes)
        self._hashes.append(value)
        for (start, width), table in zip(self._bands, self._tables, strict=True):
            table.setdefault((value >> start) & ((1 << width) - 1), []).append(number)
        return number

    def within(self, value: int) -> list[tuple[int, int]]:
        """(distance, number) of every added hash within the distance, nearest first, then in the order of adding."""
        found = {}
        for (start, width), masks, table in zip(self._bands, self._masks, self._tables, strict=True):
            band = (value >> start) & ((1 << width) - 1)
            for mask in masks:
                for number in table.get(band ^ mask, ()):
                    if number not in found and (apart := (value ^ self._hashes[number]).bit_count()) <= self.distance:
                        found[number] = apart
        return sorted((apart, number) for number, apart in found.items())


def _masks(width: int, flips: int) -> list[int]:
    """Every number of `width` bits with at most `flips` of them set."""
    return [sum(1 << bit for bit in bits) for count in range(flips + 1) for bits in itertools.combinations(range(width), count)]


def _cost(bands: int, distance: int, expected: int) -> float:
    """Table look-ups and hashes compared a query, for hashes spread evenly."""
    width = BITS / bands
    probes = bands * sum(math.comb(math.ceil(width), flips) for flips in range(distance // bands + 1))
    return probes + probes * expected / 2**width
