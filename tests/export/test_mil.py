"""The MIL interpreter: every operation against torch or numpy, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ct = pytest.importorskip("coremltools")

from coremltools.converters.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.mil import types  # noqa: E402

from export.mil_interpreter import MilProgram, UnknownOperationError  # noqa: E402
from export.mil_operations import OPERATIONS  # noqa: E402
from runtime.errors import BundleError, ParityError  # noqa: E402

rng = np.random.default_rng(7)
X = rng.standard_normal((2, 4, 6, 6)).astype(np.float32)  # picture-like
S = rng.standard_normal((2, 5, 8)).astype(np.float32)  # sequence-like
W = rng.standard_normal((6, 2, 3, 3)).astype(np.float32)
B = rng.standard_normal(6).astype(np.float32)
I = rng.integers(0, 5, (2, 3)).astype(np.int32)  # noqa: E741
T = {"x": torch.from_numpy(X), "s": torch.from_numpy(S), "w": torch.from_numpy(W), "b": torch.from_numpy(B), "i": torch.from_numpy(I)}


def run(build, *inputs: np.ndarray, dtype=types.fp32) -> list[np.ndarray]:
    """Build a program of one function over `inputs` and evaluate it."""
    specs = [mb.TensorSpec(shape=a.shape, dtype=types.int32 if a.dtype == np.int32 else dtype) for a in inputs]
    names = ["a", "b"][: len(inputs)]
    # coremltools reads the inputs' names off the signature
    function = (lambda a: build(a)) if len(inputs) == 1 else (lambda a, b: build(a, b))
    program = mb.program(input_specs=specs, opset_version=ct.target.iOS17)(function)
    found = MilProgram(program, half=True)
    outputs = found(**dict(zip(names, inputs, strict=True)))
    return [outputs[name] for name in found.outputs]


FLOAT_CASES = {
    "conv": (lambda x: mb.conv(x=x, weight=W, bias=B, strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 1], groups=2), F.conv2d(T["x"], T["w"], T["b"], 2, 1, groups=2)),
    "conv same": (lambda x: mb.conv(x=x, weight=W, strides=[2, 2], pad_type="same", groups=2), F.conv2d(F.pad(T["x"], (0, 1, 0, 1)), T["w"], None, 2, groups=2)),
    "conv valid dilated": (lambda x: mb.conv(x=x, weight=W, dilations=[2, 2], pad_type="valid", groups=2), F.conv2d(T["x"], T["w"], None, dilation=2, groups=2)),
    "batch_norm": (
        lambda x: mb.batch_norm(x=x, mean=B[:4], variance=np.abs(B[:4]) + 1, gamma=B[1:5], beta=B[2:6], epsilon=1e-3),
        F.batch_norm(T["x"], T["b"][:4], T["b"][:4].abs() + 1, T["b"][1:5], T["b"][2:6], eps=1e-3),
    ),
    "avg_pool": (lambda x: mb.avg_pool(x=x, kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid"), F.avg_pool2d(T["x"], 2)),
    "avg_pool without padding": (
        lambda x: mb.avg_pool(x=x, kernel_sizes=[3, 3], strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 1], exclude_padding_from_average=True),
        F.avg_pool2d(T["x"], 3, 2, 1, count_include_pad=False),
    ),
    "max_pool": (lambda x: mb.max_pool(x=x, kernel_sizes=[3, 3], strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 1]), F.max_pool2d(T["x"], 3, 2, 1)),
    "pad constant": (lambda x: mb.pad(x=x, pad=[0, 0, 0, 0, 1, 2, 0, 1], mode="constant", constant_val=0.5), F.pad(T["x"], (0, 1, 1, 2), value=0.5)),
    "pad reflect": (lambda x: mb.pad(x=x, pad=[1, 1, 2, 2], mode="reflect"), F.pad(T["x"], (2, 2, 1, 1), mode="reflect")),
    "clip": (lambda x: mb.clip(x=x, alpha=-0.5, beta=1.0), T["x"].clamp(-0.5, 1)),
    "relu": (lambda x: mb.relu(x=x), T["x"].relu()),
    "relu6": (lambda x: mb.relu6(x=x), F.relu6(T["x"])),
    "silu": (lambda x: mb.silu(x=x), F.silu(T["x"])),
    "sigmoid": (lambda x: mb.sigmoid(x=x), T["x"].sigmoid()),
    "sigmoid_hard": (lambda x: mb.sigmoid_hard(x=x, alpha=1 / 6, beta=0.5), F.hardsigmoid(T["x"])),
    "gelu": (lambda x: mb.gelu(x=x, mode="EXACT"), F.gelu(T["x"])),
    "gelu tanh": (lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"), F.gelu(T["x"], approximate="tanh")),
    "gelu sigmoid": (lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"), T["x"] * torch.sigmoid(1.702 * T["x"])),
    "leaky_relu": (lambda x: mb.leaky_relu(x=x, alpha=0.2), F.leaky_relu(T["x"], 0.2)),
    "elu": (lambda x: mb.elu(x=x, alpha=1.0), F.elu(T["x"])),
    "tanh": (lambda x: mb.tanh(x=x), T["x"].tanh()),
    "erf": (lambda x: mb.erf(x=x), T["x"].erf()),
    "exp": (lambda x: mb.exp(x=x), T["x"].exp()),
    "abs sqrt": (lambda x: mb.sqrt(x=mb.abs(x=x)), T["x"].abs().sqrt()),
    "rsqrt": (lambda x: mb.rsqrt(x=mb.square(x=x), epsilon=0.1), (T["x"].square() + 0.1).rsqrt()),
    "inverse": (lambda x: mb.inverse(x=mb.square(x=x), epsilon=0.1), 1 / (T["x"].square() + 0.1)),
    "log": (lambda x: mb.log(x=mb.square(x=x), epsilon=0.1), (T["x"].square() + 0.1).log()),
    "softmax": (lambda x: mb.softmax(x=x, axis=1), T["x"].softmax(1)),
    "layer_norm": (lambda x: mb.layer_norm(x=x, axes=[-1], gamma=B, beta=B, epsilon=1e-5), F.layer_norm(T["x"], (6,), T["b"], T["b"])),
    "reduce_mean": (lambda x: mb.reduce_mean(x=x, axes=[2, 3], keep_dims=False), T["x"].mean((2, 3))),
    "reduce_sum": (lambda x: mb.reduce_sum(x=x, axes=[-1], keep_dims=True), T["x"].sum(-1, keepdim=True)),
    "reduce_max": (lambda x: mb.reduce_max(x=x, axes=[1], keep_dims=False), T["x"].amax(1)),
    "reduce_min": (lambda x: mb.reduce_min(x=x, axes=[1], keep_dims=False), T["x"].amin(1)),
    "reduce_l1_norm": (lambda x: mb.reduce_l1_norm(x=x, axes=[-1], keep_dims=True), T["x"].abs().sum(-1, keepdim=True)),
    "reduce_l2_norm": (lambda x: mb.reduce_l2_norm(x=x, axes=[-1], keep_dims=True), T["x"].norm(dim=-1, keepdim=True)),
    "reduce_sum_square": (lambda x: mb.reduce_sum_square(x=x, axes=[-1], keep_dims=False), T["x"].square().sum(-1)),
    "reduce_log_sum_exp": (lambda x: mb.reduce_log_sum_exp(x=x, axes=[-1], keep_dims=False), T["x"].logsumexp(-1)),
    "reshape": (lambda x: mb.reshape(x=x, shape=[2, -1, 6]), T["x"].reshape(2, -1, 6)),
    "transpose": (lambda x: mb.transpose(x=x, perm=[0, 2, 3, 1]), T["x"].permute(0, 2, 3, 1)),
    "expand_dims squeeze": (lambda x: mb.squeeze(x=mb.expand_dims(x=x, axes=[0, -1]), axes=[0]), T["x"].unsqueeze(-1)),
    "tile": (lambda x: mb.tile(x=x, reps=[1, 2, 1, 1]), T["x"].repeat(1, 2, 1, 1)),
    "split": (lambda x: mb.split(x=x, split_sizes=[1, 3], axis=1)[1], T["x"][:, 1:]),
    "split even": (lambda x: mb.split(x=x, num_splits=2, axis=1)[0], T["x"][:, :2]),
    "slice_by_index": (
        lambda x: mb.slice_by_index(x=x, begin=[0, 1, 5, 0], end=[2, 4, 0, 6], stride=[1, 2, -2, 1], squeeze_mask=[False] * 4, end_mask=[True, False, False, True]),
        T["x"][:, 1:4:2].flip(2)[:, :, :5:2],
    ),
    "slice_by_index squeezed": (lambda x: mb.slice_by_index(x=x, begin=[0, -1, 0, 0], end=[2, 0, 6, 6], squeeze_mask=[False, True, False, False]), T["x"][:, -1]),
    "slice_by_size": (lambda x: mb.slice_by_size(x=x, begin=[0, 1, 0, 2], size=[2, 2, -1, 3]), T["x"][:, 1:3, :, 2:5]),
    "reverse": (lambda x: mb.reverse(x=x, axes=[2]), T["x"].flip(2)),
    "band_part": (lambda x: mb.band_part(x=x, lower=-1, upper=0), T["x"].tril()),
    "cumsum": (lambda x: mb.cumsum(x=x, axis=2, exclusive=True, reverse=True), T["x"].flip(2).cumsum(2).flip(2) - T["x"]),
    "select": (lambda x: mb.select(cond=mb.greater(x=x, y=0.0), a=x, b=mb.mul(x=x, y=-2.0)), torch.where(T["x"] > 0, T["x"], -2 * T["x"])),
    "maximum": (lambda x: mb.maximum(x=x, y=0.25), T["x"].clamp(min=0.25)),
    "minimum": (lambda x: mb.minimum(x=x, y=0.25), T["x"].clamp(max=0.25)),
    "pow": (lambda x: mb.pow(x=mb.abs(x=x), y=1.5), T["x"].abs() ** 1.5),
    "real_div": (lambda x: mb.real_div(x=x, y=3.0), T["x"] / 3),
    "stack concat": (lambda x: mb.concat(values=[mb.stack(values=[x, x], axis=1), mb.expand_dims(x=x, axes=[1])], axis=1), torch.stack([T["x"]] * 3, 1)),
    "concat interleaved": (lambda x: mb.concat(values=[x, mb.mul(x=x, y=2.0)], axis=1, interleave=True), torch.stack([T["x"], 2 * T["x"]], 2).flatten(1, 2)),
    "l2_norm": (lambda x: mb.l2_norm(x=x, epsilon=1e-6), T["x"] / (T["x"].square().sum((1, 2, 3), keepdim=True) + 1e-6).sqrt()),
}


@pytest.mark.parametrize("name", FLOAT_CASES)
def test_operation_on_pictures(name):
    build, expected = FLOAT_CASES[name]
    (found,) = run(build, X)
    assert found.shape == tuple(expected.shape)
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-5, atol=2e-5)


def test_linear_and_matmul():
    weight = rng.standard_normal((3, 8)).astype(np.float32)
    (found,) = run(lambda s: mb.linear(x=s, weight=weight, bias=B[:3]), S)
    np.testing.assert_allclose(found, F.linear(T["s"], torch.from_numpy(weight), T["b"][:3]), atol=1e-5)
    (found,) = run(lambda a, b: mb.matmul(x=a, y=b, transpose_y=True), S, S[:, :2])
    np.testing.assert_allclose(found, S @ S[:, :2].transpose(0, 2, 1), atol=1e-5)
    turned = np.ascontiguousarray(X.transpose(0, 3, 2, 1))
    (found,) = run(lambda a, b: mb.einsum(values=(a, b), equation="nchw,nwhu->nchu"), X, turned)
    np.testing.assert_allclose(found, np.einsum("nchw,nwhu->nchu", X, turned), rtol=1e-4, atol=1e-4)


def test_lookups():
    table = rng.standard_normal((5, 8)).astype(np.float32)
    (found,) = run(lambda i: mb.gather(x=table, indices=i, axis=0), I)
    np.testing.assert_array_equal(found, table[I])
    (found,) = run(lambda s, i: mb.gather(x=s, indices=i, axis=1, batch_dims=1), S, I)
    np.testing.assert_array_equal(found, np.stack([S[n, I[n]] for n in range(2)]))
    pairs = np.stack([np.arange(2), [3, 1]], 1).astype(np.int32)
    (found,) = run(lambda s, i: mb.gather_nd(x=s, indices=i), S, pairs)
    np.testing.assert_array_equal(found, S[[0, 1], [3, 1]])
    index = np.argsort(S, axis=1).astype(np.int32)
    (found,) = run(lambda s, i: mb.gather_along_axis(x=s, indices=i, axis=1), S, index)
    np.testing.assert_array_equal(found, np.sort(S, axis=1))
    (found,) = run(lambda i: mb.reduce_argmax(x=i, axis=1, keep_dims=False), I)
    np.testing.assert_array_equal(found, I.argmax(1))
    (found,) = run(lambda s: mb.reduce_argmin(x=s, axis=-1, keep_dims=True), S)
    np.testing.assert_array_equal(found, S.argmin(-1)[..., None])
    (found,) = run(lambda i: mb.one_hot(indices=i, one_hot_vector_size=5, on_value=1.0, off_value=0.0), I)
    np.testing.assert_array_equal(found, np.eye(5)[I])


def test_integers_and_shapes():
    (found,) = run(lambda i: mb.cast(x=mb.logical_and(x=mb.greater_equal(x=i, y=1), y=mb.not_equal(x=i, y=3)), dtype="int32"), I)
    np.testing.assert_array_equal(found, ((I >= 1) & (I != 3)).astype(np.int32))
    (found,) = run(lambda i: mb.floor_div(x=i, y=2), I)
    np.testing.assert_array_equal(found, I // 2)
    (found,) = run(lambda i: mb.mod(x=i, y=3), I)
    np.testing.assert_array_equal(found, I % 3)
    (found,) = run(lambda s: mb.add(x=mb.shape(x=s), y=0), S)
    np.testing.assert_array_equal(found, S.shape)
    assert OPERATIONS["range_1d"](torch.tensor(1), torch.tensor(7), torch.tensor(2)).tolist() == [1, 3, 5]
    assert OPERATIONS["fill"](shape=torch.tensor([2, 2]), value=torch.tensor(3.0)).tolist() == [[3.0, 3.0]] * 2


def test_attention():
    q = rng.standard_normal((1, 2, 4, 8)).astype(np.float32)
    found = OPERATIONS["scaled_dot_product_attention"](query=torch.from_numpy(q), key=torch.from_numpy(q), value=torch.from_numpy(q))
    scores = q @ q.transpose(0, 1, 3, 2) / np.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(found, weights / weights.sum(-1, keepdims=True) @ q, atol=1e-5)


def test_float16_results_are_rounded_and_overflow():
    (found,) = run(lambda x: mb.cast(x=mb.mul(x=x, y=np.float16(1.0)), dtype="fp32"), X, dtype=types.fp16)
    np.testing.assert_array_equal(found, X.astype(np.float16).astype(np.float32))
    (found,) = run(lambda x: mb.cast(x=mb.mul(x=mb.abs(x=x), y=np.float16(60000.0)), dtype="fp32"), X + 5, dtype=types.fp16)
    assert np.isinf(found).any()


def test_unknown_operation_is_named():
    with pytest.raises(UnknownOperationError, match="operation atanh, which the interpreter does not know"):
        run(lambda x: mb.atanh(x=x), X)


def test_wrong_inputs_are_refused():
    program = mb.program(input_specs=[mb.TensorSpec(shape=(1, 3))], opset_version=ct.target.iOS17)(lambda x: mb.relu(x=x))
    found = MilProgram(program, name="tiny")
    with pytest.raises(ParityError, match=r"takes the inputs \['x'\], got \['y'\]"):
        found(y=np.zeros((1, 3), np.float32))
    with pytest.raises(ParityError, match=r"shape \(2, 3\), the program declares \(1, 3\)"):
        found(x=np.zeros((2, 3), np.float32))


def test_no_package(tmp_path):
    with pytest.raises(BundleError, match="is not a Core ML package"):
        MilProgram.open(tmp_path)
