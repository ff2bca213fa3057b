"""The image tower from the decoded picture on: uint8 (1, height, width, 3) of any size in, embedding out. Resize, crop and normalisation are in the graph.

For apps that would write preprocessing anew. The resize is ONNX's antialiased one, which rounds as Pillow does when it works on bytes: pixels are those of
`runtime.preprocess` but for a few that differ by one of 255 steps, and the gate measures what that does to embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper
from PIL import Image

import export.to_onnx
from export.draft import Draft, Job
from export.to_onnx import OnnxEncoder, serialize, strip, with_batch_1, write_onnx
from runtime.errors import ParityError, RecipeError
from runtime.preprocess import PreprocessConfig, preprocess

PRECISIONS = ("fp32", "int8")
EXTRA = "export"
INPUT = "picture"
LEAST_RESIZED = 0.999
_PREFIX = "pixels_"


def require() -> None:
    """Raises MissingExtraError where the ONNX exporter is not installed."""
    export.to_onnx.require()


def drafts(job: Job, precisions: Sequence[str]) -> Iterator[Draft]:
    """The image tower; the text tower takes tokens as everywhere, so it has nothing here."""
    import onnxruntime

    if job.tower != "image":
        return
    for precision in precisions:
        graph = with_batch_1(job.onnx if precision == "fp32" else job.onnx_int8, fold=precision == "fp32")
        model = with_preprocessing(graph, job.preprocessing)
        path = f"onnx-pixels/image.{precision}.onnx"
        encoder = OnnxEncoder(write_onnx(model, job.folder / path))
        resized = resized_cosine(encoder, OnnxEncoder(serialize(graph)), job.preprocessing)
        if resized < LEAST_RESIZED:
            raise ParityError(
                f"artefact image-onnx-pixels-{precision}: after its own resize, embeddings agree with those of runtime.preprocess to a cosine of {resized:.6f}, "
                f"expected at least {LEAST_RESIZED}"
            )
        yield Draft(
            tower="image", target="onnx-pixels", precision=precision, path=path, run=lambda rows, encoder=encoder: encoder(to_bytes(rows, job.preprocessing)),
            how=f"onnxruntime {onnxruntime.__version__}", facts={"input": "picture: uint8 (1, height, width, 3), RGB, upright", "resized_cosine_min": resized},
        )  # fmt: skip


def resized_cosine(encoder: OnnxEncoder, plain: OnnxEncoder, config: PreprocessConfig) -> float:
    """Least cosine between what the graph makes of pictures of other sizes and what it makes without its own preprocessing, after `runtime.preprocess`."""
    rng = np.random.default_rng(0)
    cosines = []
    for height, width in ((1.0, 1.7), (2.3, 1.6), (3.1, 4.4), (0.6, 0.9)):
        sides = [max(1, round(factor * config.image_size)) for factor in (width, height)]
        picture = Image.fromarray(rng.integers(0, 256, (9, 13, 3), np.uint8)).resize((sides[0], sides[1]), Image.Resampling.BICUBIC)
        a, b = encoder(np.asarray(picture)[None])[0], plain(preprocess([picture], config))[0]
        cosines.append(float(a.astype(np.float64) @ b))
    return round(min(cosines), 6)


def with_preprocessing(model: onnx.ModelProto, config: PreprocessConfig) -> onnx.ModelProto:
    """A graph of batch 1 with the work of `runtime.preprocess.preprocess` before it.

    Raises:
        RecipeError: an interpolation that ONNX has no antialiased form of.
    """
    modes = {"bilinear": "linear", "bicubic": "cubic"}
    if config.interpolation not in modes:
        raise RecipeError(f"ONNX resizes {' and '.join(modes)}, the model needs {config.interpolation}; leave onnx-pixels out")
    short = int(np.floor(config.image_size / config.crop_pct))
    constants = {
        "short": np.array([short], np.int64), "size": np.array([config.image_size], np.int64),
        "one": np.array([1], np.int64), "three": np.array([3], np.int64), "axes": np.array([1, 2], np.int64), "half": np.array(0.5, np.float64),
        "scale": (1 / (255 * np.asarray(config.std, np.float64))).astype(np.float32).reshape(1, 3, 1, 1),
        "shift": (np.asarray(config.mean, np.float64) / np.asarray(config.std, np.float64)).astype(np.float32).reshape(1, 3, 1, 1),
    }  # fmt: skip
    node = helper.make_node
    form = {"mode": modes[config.interpolation], "antialias": 1, "coordinate_transformation_mode": "half_pixel", "exclude_outside": 1}
    form |= {"cubic_coeff_a": -0.5} if config.interpolation == "bicubic" else {}
    nodes = [
        node("Shape", [INPUT], ["shape"]),
        node("Slice", ["shape", "one", "three"], ["sides"]),  # (height, width)
        node("ReduceMin", ["sides"], ["shortest"], keepdims=1),
        # The longer side is floor(short * long / shortest); of the shorter one this gives short itself.
        node("Mul", ["sides", "short"], ["product"]),
        node("Div", ["product", "shortest"], ["resized_sides"]),
        node("Concat", ["one", "resized_sides", "three"], ["sizes"], axis=0),
        node("Resize", [INPUT, "", "", "sizes"], ["resized"], **form),
        # Offsets are half of what is too much, rounded to the nearest integer, halves to even.
        node("Sub", ["resized_sides", "size"], ["excess"]),
        node("Cast", ["excess"], ["excess_float"], to=TensorProto.DOUBLE),
        node("Mul", ["excess_float", "half"], ["middle"]),
        node("Round", ["middle"], ["rounded"]),
        node("Cast", ["rounded"], ["starts"], to=TensorProto.INT64),
        node("Add", ["starts", "size"], ["ends"]),
        node("Slice", ["resized", "starts", "ends", "axes"], ["cropped"]),
        node("Transpose", ["cropped"], ["planes"], perm=[0, 3, 1, 2]),
        node("Cast", ["planes"], ["floats"], to=TensorProto.FLOAT),
        node("Mul", ["floats", "scale"], ["scaled"]),
        node("Sub", ["scaled", "shift"], ["normalised"]),
    ]
    size = config.image_size
    graph = helper.make_graph(
        nodes, "preprocessing",
        [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, [1, "height", "width", 3])],
        [helper.make_tensor_value_info("normalised", TensorProto.FLOAT, [1, 3, size, size])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    before = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _opset(model))], ir_version=model.ir_version)
    before = compose.add_prefix(before, _PREFIX, rename_inputs=False)
    joined = compose.merge_models(before, _same_opsets(model, before), io_map=[(f"{_PREFIX}normalised", model.graph.input[0].name)])
    joined.producer_name, joined.producer_version = model.producer_name, model.producer_version
    strip(joined)
    onnx.checker.check_model(joined)
    return joined


def to_bytes(pixels: np.ndarray, config: PreprocessConfig) -> np.ndarray:
    """Normalised pixels float32 (N, 3, S, S) back to the bytes that they were: uint8 (N, S, S, 3). The graph neither resizes nor crops these."""
    mean, std = (np.asarray(values, np.float64).reshape(1, 3, 1, 1) for values in (config.mean, config.std))
    return np.rint((pixels * std + mean) * 255).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def _opset(model: onnx.ModelProto) -> int:
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def _same_opsets(model: onnx.ModelProto, other: onnx.ModelProto) -> onnx.ModelProto:
    """`compose` wants the default domain spelled the same in both."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    for entry in copied.opset_import:
        if entry.domain == "ai.onnx":
            entry.domain = other.opset_import[0].domain
    return copied


