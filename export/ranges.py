"""What values the tensors inside a graph take over calibration rows, and which range of them int8 should cover.

Methods of `tensor_ranges`: "minmax" covers everything; "percentile" all but one value in ten thousand on each side; "entropy" the range whose rounded
histogram keeps the most of the distribution (least Kullback-Leibler divergence, as TensorRT calibrates; Migacz 2017); "mse" the one with the least squared error,
clipping and rounding together (Banner et al. 2019, section 4, without their assumption of a form).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import onnx

from export.to_onnx import OnnxEncoder, serialize
from runtime.errors import ParityError

ROWS_AT_ONCE = 4
BINS = 2048
LEVELS = 255
SHRINKS = np.linspace(1.0, 0.3, 36)
PERCENTILE = 1e-4

Range = tuple[float, float]


def activations(model: onnx.ModelProto, names: Sequence[str], rows: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """Values of the named tensors, a few rows at a time; an input of the model may be among them.

    Raises:
        ParityError: there are no rows.
    """
    if len(rows) == 0:
        raise ParityError("ranges of activations need calibration inputs and there are none; give pairs with pictures and captions")
    inputs = {value.name for value in model.graph.input}
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    there = {value.name for value in opened.graph.output}
    opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in inputs and name not in there)
    session = OnnxEncoder(serialize(opened)).session
    asked = [name for name in names if name not in inputs]
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        found = dict(zip(asked, session.run(asked, {model.graph.input[0].name: part}), strict=True)) if asked else {}
        yield found | {name: part for name in names if name in inputs}


def channel_maxima(model: onnx.ModelProto, names: Iterable[str], rows: np.ndarray, *, axis: int) -> dict[str, np.ndarray]:
    """Largest magnitude by channel over the rows: name to (C,) float32, the channels on `axis`."""
    names = list(names)
    most: dict[str, np.ndarray] = {}
    if not names:
        return most
    for values in activations(model, names, rows):
        for name, value in values.items():
            found = np.abs(np.moveaxis(value, axis, -1)).reshape(-1, value.shape[axis]).max(axis=0).astype(np.float32)
            most[name] = np.maximum(most[name], found) if name in most else found
    return most


def channel_means(model: onnx.ModelProto, names: Sequence[str], rows: np.ndarray, axes: dict[str, int]) -> dict[str, np.ndarray]:
    """Mean by channel over the rows: name to (C,) float64, the channels of a tensor on `axes[name]`."""
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for values in activations(model, names, rows):
        for name, value in values.items():
            flat = np.moveaxis(value, axes[name], -1).reshape(-1, value.shape[axes[name]])
            sums[name] = sums.get(name, 0.0) + flat.sum(axis=0, dtype=np.float64)
            counts[name] = counts.get(name, 0) + len(flat)
    return {name: sums[name] / counts[name] for name in sums}


def tensor_ranges(model: onnx.ModelProto, names: Sequence[str], rows: np.ndarray, methods: Sequence[str]) -> dict[str, dict[str, Range]]:
    """Ranges for int8, by method and tensor. Two passes over the rows for all methods together; zero is always inside."""
    low, high = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for values in activations(model, names, rows):
        for name, value in values.items():
            low[name], high[name] = min(low[name], float(value.min())), max(high[name], float(value.max()))
    found: dict[str, dict[str, Range]] = {}
    if "minmax" in methods:
        found["minmax"] = {name: (low[name], high[name]) for name in names}
    others = [method for method in methods if method != "minmax"]
    if not others:
        return found
    counts = {name: np.zeros(BINS, np.int64) for name in names}
    for values in activations(model, names, rows):
        for name, value in values.items():
            if high[name] > low[name]:
                counts[name] += np.histogram(value, bins=BINS, range=(low[name], high[name]))[0]
    for method in others:
        pick = METHODS[method]
        found[method] = {name: pick(counts[name], low[name], high[name]) if high[name] > low[name] else (0.0, 0.0) for name in names}
    return found


def _percentile(counts: np.ndarray, low: float, high: float) -> Range:
    edges = np.linspace(low, high, len(counts) + 1)
    below = np.cumsum(counts) / max(1, counts.sum())
    first = int(np.searchsorted(below, PERCENTILE, side="right"))
    last = int(np.searchsorted(below, 1 - PERCENTILE, side="left"))
    return min(0.0, float(edges[first])), max(0.0, float(edges[min(last, len(counts) - 1) + 1]))


def _candidates(low: float, high: float) -> list[Range]:
    """Both ends drawn in together, and each alone."""
    both = [(low * shrink, high * shrink) for shrink in SHRINKS]
    return both + [(low, high * shrink) for shrink in SHRINKS[1:]] + [(low * shrink, high) for shrink in SHRINKS[1:]]


def _mse(counts: np.ndarray, low: float, high: float) -> Range:
    centres = (np.arange(len(counts)) + 0.5) * ((high - low) / len(counts)) + low
    return min(_candidates(low, high), key=lambda found: float((counts * np.square(_rounded(centres, *found) - centres)).sum()))


def _rounded(values: np.ndarray, low: float, high: float) -> np.ndarray:
    scale = (high - low) / LEVELS
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(values / scale) + zero, 0, LEVELS) - zero) * scale


def _entropy(counts: np.ndarray, low: float, high: float) -> Range:
    centres = (np.arange(len(counts)) + 0.5) * ((high - low) / len(counts)) + low
    return min(_candidates(low, high), key=lambda found: _divergence(counts, centres, *found))


def _divergence(counts: np.ndarray, centres: np.ndarray, low: float, high: float) -> float:
    """Of the histogram from itself clipped to a range and spread evenly over each of the 256 levels."""
    scale = (high - low) / LEVELS
    inside = (centres >= low) & (centres <= high)
    true = counts.astype(np.float64).copy()
    true[~inside] = 0
    if not true.any():
        return np.inf
    true[np.flatnonzero(inside)[0]] += counts[centres < low].sum()
    true[np.flatnonzero(inside)[-1]] += counts[centres > high].sum()
    level = np.rint((centres - low) / scale).astype(int).clip(0, LEVELS)
    filled = inside & (counts > 0)
    totals = np.bincount(level[inside], weights=counts[inside], minlength=LEVELS + 1)
    bins = np.bincount(level[filled], minlength=LEVELS + 1)
    spread = np.zeros(len(counts))
    spread[filled] = (totals / np.maximum(bins, 1))[level[filled]]
    p, q = true / true.sum(), spread / max(spread.sum(), 1e-12)
    some = p > 0
    return float((p[some] * np.log(p[some] / np.maximum(q[some], 1e-10))).sum())


METHODS: dict[str, Callable[[np.ndarray, float, float], Range]] = {"percentile": _percentile, "entropy": _entropy, "mse": _mse}
RANGE_METHODS = ("minmax", *METHODS)
