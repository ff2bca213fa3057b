"""The MIL operations that move, cut, join and look up values; registered beside the arithmetic of `mil_operations`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from export.mil_operations import _integers, _operation


@_operation("reshape")
def reshape(x: Tensor, shape: Any) -> Tensor:
    sizes = _integers(shape)
    return x.reshape([x.shape[i] if s == 0 else s for i, s in enumerate(sizes)])


@_operation("transpose")
def transpose(x: Tensor, perm: Any) -> Tensor:
    return x.permute(_integers(perm))


@_operation("squeeze")
def squeeze(x: Tensor, axes: Any = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(_integers(axes)))


@_operation("expand_dims")
def expand_dims(x: Tensor, axes: Any) -> Tensor:
    x = torch.as_tensor(x)
    places = _integers(axes)
    rank = x.ndim + len(places)
    for place in sorted(p % rank for p in places):
        x = x.unsqueeze(place)
    return x


@_operation("tile")
def tile(x: Tensor, reps: Any) -> Tensor:
    return x.repeat(_integers(reps))


@_operation("stack")
def stack(values: Sequence[Any], axis: int = 0) -> Tensor:
    return torch.stack([torch.as_tensor(v) for v in values], int(axis))


@_operation("concat")
def concat(values: Sequence[Any], axis: int = 0, interleave: bool = False) -> Tensor:
    tensors = [torch.atleast_1d(torch.as_tensor(v)) for v in values]  # shape arithmetic joins single numbers
    if not interleave:
        return torch.cat(tensors, int(axis))
    dim = int(axis) % tensors[0].ndim
    return torch.stack(tensors, dim + 1).flatten(dim, dim + 1)


@_operation("split")
def split(x: Tensor, axis: int = 0, num_splits: int | None = None, split_sizes: Any = None) -> tuple[Tensor, ...]:
    dim = int(axis)
    sizes = _integers(split_sizes) if split_sizes is not None else [x.shape[dim] // int(num_splits or 1)] * int(num_splits or 1)
    return tuple(torch.split(x, sizes, dim))


@_operation("slice_by_size")
def slice_by_size(x: Tensor, begin: Any, size: Any) -> Tensor:
    for dim, (start, length) in enumerate(zip(_integers(begin), _integers(size), strict=True)):
        x = x.narrow(dim, start, x.shape[dim] - start if length == -1 else length)
    return x


@_operation("slice_by_index")
def slice_by_index(x: Tensor, begin: Any, end: Any, stride: Any = None, begin_mask: Any = None, end_mask: Any = None, squeeze_mask: Any = None) -> Tensor:
    rank = x.ndim
    steps = _integers(stride) if stride is not None else [1] * rank
    open_begin, open_end, drop = ([bool(v) for v in _integers(m)] if m is not None else [False] * rank for m in (begin_mask, end_mask, squeeze_mask))
    starts, ends = _integers(begin), _integers(end)
    for dim in range(rank):
        size = x.shape[dim]
        if drop[dim]:
            x = x.narrow(dim, starts[dim] % size, 1)
            continue
        cut = slice(None if open_begin[dim] else starts[dim], None if open_end[dim] else ends[dim], steps[dim])
        picked = torch.arange(size)[torch.tensor(range(*cut.indices(size)), dtype=torch.long)]
        x = x.index_select(dim, picked)
    return x.squeeze(tuple(d for d in range(rank) if drop[d])) if any(drop) else x


@_operation("gather")
def gather(x: Tensor, indices: Any, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    x, index = torch.as_tensor(x), torch.as_tensor(indices).long()
    dim, batch = int(axis) % x.ndim, int(batch_dims)
    if batch:
        rows = [gather(x[i], index[i], dim - 1, batch - 1) for i in range(x.shape[0])]
        return torch.stack(rows)
    picked = x.index_select(dim, index.reshape(-1))
    return picked.reshape([*x.shape[:dim], *index.shape, *x.shape[dim + 1 :]])


@_operation("gather_along_axis")
def gather_along_axis(x: Tensor, indices: Any, axis: int = 0, validate_indices: bool = False) -> Tensor:
    return torch.gather(x, int(axis), torch.as_tensor(indices).long())


@_operation("gather_nd")
def gather_nd(x: Tensor, indices: Any, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    index, batch = torch.as_tensor(indices).long(), int(batch_dims)
    if batch:
        return torch.stack([gather_nd(x[i], index[i], batch - 1) for i in range(x.shape[0])])
    return x[tuple(index.unbind(-1))]


@_operation("fill")
def fill(shape: Any, value: Any = 0.0) -> Tensor:
    value = torch.as_tensor(value)
    return value.expand(_integers(shape)).clone()


@_operation("fill_like")
def fill_like(ref_tensor: Tensor, value: Any = 0.0) -> Tensor:
    return torch.as_tensor(value).expand(ref_tensor.shape).clone()


@_operation("shape")
def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


@_operation("range_1d")
def range_1d(start: Any, end: Any, step: Any) -> Tensor:
    start, end, step = torch.as_tensor(start), torch.as_tensor(end), torch.as_tensor(step)
    return torch.arange(start.item(), end.item(), step.item()).to(start.dtype)


@_operation("one_hot")
def one_hot(indices: Any, one_hot_vector_size: int, axis: int = -1, on_value: Any = 1, off_value: Any = 0) -> Tensor:
    index = torch.as_tensor(indices)
    hot = (index.unsqueeze(-1) == torch.arange(int(one_hot_vector_size))).movedim(-1, int(axis))
    return torch.where(hot, torch.as_tensor(on_value), torch.as_tensor(off_value))


@_operation("band_part")
def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    rows, columns = torch.arange(x.shape[-2])[:, None], torch.arange(x.shape[-1])[None]
    keep = ((int(lower) < 0) | (rows - columns <= int(lower))) & ((int(upper) < 0) | (columns - rows <= int(upper)))
    return torch.where(keep, x, torch.zeros_like(x))


@_operation("reverse")
def reverse(x: Tensor, axes: Any = None) -> Tensor:
    return x.flip(tuple(range(x.ndim)) if axes is None else tuple(_integers(axes)))
