"""What each MIL operation computes, in torch on the CPU.

One function per operation of Core ML's intermediate language (MIL) that the image and text towers of this project use,
registered in `OPERATIONS` under the operation's MIL name. A function receives the operation's inputs by their MIL names
(tensors as torch tensors, other constants as Python values, absent optional inputs left out) and returns a tensor, or a
tuple of tensors for an operation with several outputs. Floating point values are float32 here; `mil_interpreter` rounds
the results to the type that the program declares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Result = Tensor | tuple[Any, ...]
OPERATIONS: dict[str, Callable[..., Result]] = {}

_CASTS = {
    "fp16": torch.float32,  # rounding to float16 is the interpreter's job
    "fp32": torch.float32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "uint16": torch.int32,
    "int32": torch.int32,
    "int64": torch.int32,  # MIL's int64 is saved as int32
    "bool": torch.bool,
}


def _operation(*names: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    def register(function: Callable[..., Result]) -> Callable[..., Result]:
        for name in names:
            OPERATIONS[name] = function
        return function

    return register


def _integers(value: Any) -> list[int]:
    """A Python list of integers from a tensor, array, list or single integer."""
    flat = torch.as_tensor(value).reshape(-1)
    return [int(v) for v in flat.tolist()]


def _axes(axes: Any, rank: int) -> tuple[int, ...]:
    return tuple(range(rank)) if axes is None else tuple(a % rank for a in _integers(axes))


# ---------------------------------------------------------------------------------------------- elementwise

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "erf": torch.erf,
    "exp": torch.exp,
    "floor": torch.floor,
    "identity": lambda x: x,
    "logical_not": torch.logical_not,
    "relu": torch.relu,
    "relu6": F.relu6,
    "round": torch.round,
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "silu": F.silu,
    "sin": torch.sin,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tanh": torch.tanh,
}
for _name, _function in _UNARY.items():
    OPERATIONS[_name] = lambda x, _function=_function: _function(x)

_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mod": torch.remainder,
    "pow": torch.pow,
    "equal": torch.eq,
    "not_equal": torch.ne,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
}
for _name, _pair in _BINARY.items():
    OPERATIONS[_name] = lambda x, y, _pair=_pair: _pair(torch.as_tensor(x), torch.as_tensor(y))


@_operation("real_div")
def real_div(x: Tensor, y: Tensor) -> Tensor:
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    return torch.div(x, y) if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


@_operation("floor_div")
def floor_div(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(torch.as_tensor(x), torch.as_tensor(y), rounding_mode="floor")


@_operation("inverse")
def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return 1.0 / (x + float(epsilon))


@_operation("rsqrt")
def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return torch.rsqrt(x + float(epsilon))


@_operation("log")
def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return torch.log(x + float(epsilon))


@_operation("clip")
def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.clamp(x, float(alpha), float(beta))


@_operation("gelu")
def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


@_operation("leaky_relu")
def leaky_relu(x: Tensor, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, float(alpha))


@_operation("prelu")
def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    return F.prelu(x, torch.as_tensor(alpha))


@_operation("elu")
def elu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return F.elu(x, float(alpha))


@_operation("sigmoid_hard")
def sigmoid_hard(x: Tensor, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return torch.clamp(float(alpha) * x + float(beta), 0.0, 1.0)


@_operation("linear_activation")
def linear_activation(x: Tensor, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    return float(alpha) * x + float(beta)


@_operation("thresholded_relu")
def thresholded_relu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return torch.where(x >= float(alpha), x, torch.zeros_like(x))


@_operation("quantize")
def quantize(input: Tensor, scale: Tensor, output_dtype: str, zero_point: Any = None, axis: Any = None) -> Tensor:
    """Affine, to int8 or uint8, halves to even."""
    low, high = (-128, 127) if output_dtype == "int8" else (0, 255)
    shape = _along(input, axis)
    zero = 0 if zero_point is None else torch.as_tensor(zero_point).float().reshape(shape)
    return (torch.round(input / torch.as_tensor(scale).reshape(shape)) + zero).clamp(low, high).to(_CASTS[output_dtype])


@_operation("dequantize")
def dequantize(input: Tensor, scale: Tensor, zero_point: Any = None, axis: Any = None) -> Tensor:
    shape = _along(input, axis)
    zero = 0 if zero_point is None else torch.as_tensor(zero_point).float().reshape(shape)
    return (input.float() - zero) * torch.as_tensor(scale).reshape(shape)


def _along(x: Tensor, axis: Any) -> list[int]:
    """The shape that lines numbers of one axis up with x; of a single number when there is no axis."""
    if axis is None:
        return []
    place = _integers(axis)[0] % x.ndim
    return [-1 if n == place else 1 for n in range(x.ndim)]


@_operation("cast")
def cast(x: Tensor, dtype: str) -> Tensor:
    return torch.as_tensor(x).to(_CASTS[dtype])


@_operation("select")
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(torch.as_tensor(cond).bool(), torch.as_tensor(a), torch.as_tensor(b))


# ------------------------------------------------------------------------------- linear, convolution, pooling


@_operation("linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


@_operation("matmul")
def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    return torch.matmul(x.mT if transpose_x else x, y.mT if transpose_y else y)


@_operation("einsum")
def einsum(values: Sequence[Tensor], equation: str) -> Tensor:
    return torch.einsum(equation, *values)


def _padded(x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], pad_type: str, pad: Any, value: float) -> Tensor:
    """Apply MIL's padding rule of a convolution or pooling window to the trailing dimensions."""
    spatial = len(kernel)
    if pad_type == "valid":
        return x
    if pad_type == "custom":
        amounts = _integers(pad)
    else:
        amounts = []
        for size, k, s, d in zip(x.shape[-spatial:], kernel, strides, dilations, strict=True):
            total = max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
            small, large = total // 2, total - total // 2
            amounts += [large, small] if pad_type == "same_lower" else [small, large]
    pairs = [(amounts[2 * i], amounts[2 * i + 1]) for i in range(spatial)]
    return F.pad(x, [a for pair in reversed(pairs) for a in pair], value=value) if any(amounts) else x


@_operation("conv")
def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, strides: Any = None, pad_type: str = "valid", pad: Any = None, dilations: Any = None, groups: int = 1
) -> Tensor:
    spatial = weight.ndim - 2
    steps = _integers(strides) if strides is not None else [1] * spatial
    spread = _integers(dilations) if dilations is not None else [1] * spatial
    x = _padded(x, weight.shape[2:], steps, spread, pad_type, pad, 0.0)
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[spatial]
    return function(x, weight, bias, stride=steps, dilation=spread, groups=int(groups))


def _pool_arguments(x: Tensor, kernel_sizes: Any, strides: Any, pad_type: str, pad: Any, value: float) -> tuple[Tensor, list[int], list[int]]:
    kernel = _integers(kernel_sizes)
    steps = _integers(strides) if strides is not None else [1] * len(kernel)
    return _padded(x, kernel, steps, [1] * len(kernel), pad_type, pad, value), kernel, steps


@_operation("avg_pool")
def avg_pool(
    x: Tensor,
    kernel_sizes: Any,
    strides: Any = None,
    pad_type: str = "valid",
    pad: Any = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    padded, kernel, steps = _pool_arguments(x, kernel_sizes, strides, pad_type, pad, 0.0)
    function = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(kernel)]
    mean = function(padded, kernel, steps, ceil_mode=bool(ceil_mode))
    if not exclude_padding_from_average:
        return mean
    inside, _, _ = _pool_arguments(torch.ones_like(x), kernel_sizes, strides, pad_type, pad, 0.0)
    return mean / function(inside, kernel, steps, ceil_mode=bool(ceil_mode))


@_operation("max_pool")
def max_pool(x: Tensor, kernel_sizes: Any, strides: Any = None, pad_type: str = "valid", pad: Any = None, ceil_mode: bool = False) -> Tensor:
    padded, kernel, steps = _pool_arguments(x, kernel_sizes, strides, pad_type, pad, -math.inf)
    function = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(kernel)]
    return function(padded, kernel, steps, ceil_mode=bool(ceil_mode))


@_operation("pad")
def pad(x: Tensor, pad: Any, mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    amounts = _integers(pad)
    pairs = [(amounts[i], amounts[i + 1]) for i in range(0, len(amounts), 2)]
    if mode == "constant":
        return F.pad(x, [a for pair in reversed(pairs) for a in pair], value=float(constant_val))
    while pairs and pairs[0] == (0, 0):  # torch reflects at most the last three dimensions
        pairs.pop(0)
    return F.pad(x, [a for pair in reversed(pairs) for a in pair], mode=mode)


# ------------------------------------------------------------------------------------ normalisation, attention


@_operation("batch_norm")
def batch_norm(x: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, training=False, eps=float(epsilon))


@_operation("layer_norm")
def layer_norm(x: Tensor, axes: Any = None, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5) -> Tensor:
    dims = _axes(axes, x.ndim)
    centred = x - x.mean(dims, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + float(epsilon))
    shape = [x.shape[d] if d in dims else 1 for d in range(x.ndim)]
    y = y if gamma is None else y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


@_operation("l2_norm")
def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    dims = tuple(range(max(x.ndim - 3, 0), x.ndim))
    return x * torch.rsqrt(x.square().sum(dims, keepdim=True) + float(epsilon))


@_operation("softmax")
def softmax(x: Tensor, axis: int = -1) -> Tensor:
    return torch.softmax(x, int(axis))


@_operation("scaled_dot_product_attention")
def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)


# --------------------------------------------------------------------------------------------------- reductions

_REDUCTIONS: dict[str, Callable[[Tensor, tuple[int, ...], bool], Tensor]] = {
    "reduce_mean": lambda x, d, k: x.mean(d, keepdim=k),
    "reduce_sum": lambda x, d, k: x.sum(d, keepdim=k),
    "reduce_max": lambda x, d, k: x.amax(d, keepdim=k),
    "reduce_min": lambda x, d, k: x.amin(d, keepdim=k),
    "reduce_l1_norm": lambda x, d, k: x.abs().sum(d, keepdim=k),
    "reduce_l2_norm": lambda x, d, k: x.square().sum(d, keepdim=k).sqrt(),
    "reduce_sum_square": lambda x, d, k: x.square().sum(d, keepdim=k),
    "reduce_log_sum_exp": lambda x, d, k: torch.logsumexp(x, d, keepdim=k),
}
for _name, _reduce in _REDUCTIONS.items():
    OPERATIONS[_name] = lambda x, axes=None, keep_dims=False, _reduce=_reduce: _reduce(x, _axes(axes, x.ndim), bool(keep_dims)).to(x.dtype)


@_operation("reduce_argmax", "reduce_argmin")
def reduce_arg(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32", *, smallest: bool = False) -> Tensor:
    found = torch.argmin(x, int(axis), keepdim=bool(keep_dims)) if smallest else torch.argmax(x, int(axis), keepdim=bool(keep_dims))
    return found.to(torch.int32)


OPERATIONS["reduce_argmin"] = lambda **inputs: reduce_arg(**inputs, smallest=True)


@_operation("classify")
def classify(probabilities: Tensor, classes: list[str]) -> tuple[str, dict[str, float]]:
    values = probabilities.reshape(-1)
    return classes[int(values.argmax())], dict(zip(classes, values.tolist(), strict=True))


@_operation("cumsum")
def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    dim = int(axis)
    y = x.flip(dim) if reverse else x
    total = y.cumsum(dim).to(x.dtype)
    total = total - y if exclusive else total
    return total.flip(dim) if reverse else total
