"""Weights files of every form that is read, and of every form that is refused, each in one sentence that names the file."""

from __future__ import annotations

import json
import os
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mobileclip.safetensors_header import DTYPES, read_header
from mobileclip.weights import find_weights, read_weights, weight_entries, weight_shapes, weights_candidates
from runtime.errors import CheckpointError


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "image.conv.weight": torch.randn(4, 3, 2, 2, generator=generator),
        "image.bn.num_batches_tracked": torch.tensor(7),
        "text.table": torch.randn(9, 4, generator=generator),
        "logit_scale": torch.tensor(2.5),
    }


def write(path: Path, tensors: dict[str, torch.Tensor], form: str = "zip") -> Path:
    if form == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")
    return path


def refusal(path: Path, **options: bool) -> str:
    """The sentence that reading ends in; it names the file and stands on one line."""
    with pytest.raises(CheckpointError) as caught:
        read_weights(path, **options)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_every_form_gives_the_same_tensors_without_the_prefix_of_training(form, prefix, tmp_path):
    path = write(tmp_path / "weights.any", {prefix + name: tensor for name, tensor in state().items()}, form)
    assert equal(read_weights(path), state())
    assert weight_shapes(path) == {name: tuple(tensor.shape) for name, tensor in state().items()}
    assert {name: entry.dtype for name, entry in weight_entries(path).items()}["image.bn.num_batches_tracked"] == "int64"


def test_a_prefix_that_only_some_names_have_stays(tmp_path):
    path = write(tmp_path / "some.pt", {"module.a": torch.zeros(1), "b": torch.zeros(1)})
    assert set(read_weights(path)) == {"module.a", "b"}
    path = write(tmp_path / "bare.pt", {"module.": torch.zeros(1)})
    assert set(read_weights(path)) == {"module."}


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_training_checkpoints_are_unwrapped(key, tmp_path):
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    path = tmp_path / "epoch_3.pt"
    torch.save({"epoch": 3, "name": "run", "optimizer": optimizer, key: {"module." + name: tensor for name, tensor in state().items()}}, path)
    assert equal(read_weights(path), state())


def test_lone_numbers_and_words_beside_the_tensors_are_left_out(tmp_path):
    torch.save({**state(), "epoch": 3, "arch": "x", "best": None, "loss": 0.5, "done": True}, tmp_path / "a.pt")
    assert equal(read_weights(tmp_path / "a.pt"), state())


def test_parameters_come_back_as_plain_tensors(tmp_path):
    torch.save({"w": torch.nn.Parameter(torch.ones(2))}, tmp_path / "a.pt")
    found = read_weights(tmp_path / "a.pt")["w"]
    assert type(found) is torch.Tensor
    assert not found.requires_grad


@pytest.mark.parametrize("form", ["zip", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_exactly(form, dtype, tmp_path):
    half = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state().items()}
    path = write(tmp_path / "half.pt", half, form)
    assert equal(read_weights(path), {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in half.items()})
    assert weight_entries(path)["text.table"].dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("form", ["zip", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_dtypes_that_would_be_rounded_or_misread_are_refused(form, dtype, tmp_path):
    path = write(tmp_path / "odd.pt", {**state(), "text.odd": torch.zeros(3).to(dtype)}, form)
    message = refusal(path)
    assert f"1 tensors as {str(dtype).removeprefix('torch.')} (text.odd), expected float32" in message


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_values_that_are_not_finite_are_refused_unless_told(form, tmp_path):
    tensors = state() | {f"bad{n}": torch.tensor([0.0, value]) for n, value in enumerate([float("nan"), float("inf"), -float("inf")] * 2)}
    tensors |= {"huge": torch.full((4,), 3e38), "none": torch.zeros(0, 3)}
    path = write(tmp_path / "nan.pt", tensors, form)
    message = refusal(path)
    assert "not finite in 6 of 12 tensors (bad0, bad1, bad2, bad3, bad4 …)" in message
    assert "allow_nonfinite=True" in message
    assert torch.isnan(read_weights(path, allow_nonfinite=True)["bad0"][1])


def test_nan_in_half_precision_is_seen_too(tmp_path):
    assert "not finite in 1 of 1" in refusal(write(tmp_path / "a.pt", {"w": torch.tensor([1.0, float("nan")]).half()}))


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_cut_off_file_is_refused_wherever_it_ends(form, tmp_path):
    whole = write(tmp_path / "whole.bin", state(), form).read_bytes()
    path = tmp_path / "cut.safetensors" if form == "safetensors" else tmp_path / "cut.pt"
    ends = sorted({0, 1, 7, 8, 9, *range(2, len(whole), len(whole) // 40), len(whole) - 1})
    said = 0
    for end in ends:
        path.write_bytes(whole[:end])
        said += "cut off" in refusal(path)
    # A few bytes are no format yet, and in the old format half of a name looks like another name.
    assert said >= len(ends) * (0.7 if form == "legacy" else 0.85)
    assert "cut off" in refusal(path)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_damage_anywhere_ends_in_a_refusal_or_in_other_values(form, tmp_path):
    whole = write(tmp_path / "whole.bin", state(), form).read_bytes()
    rng = random.Random(form)
    path = tmp_path / "damaged.pt"
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 4])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_weights(path)
        except CheckpointError as error:
            refused += str(path) in str(error)
    assert refused > 10  # anything else than a CheckpointError fails the test by itself


class Evil:
    """Unpickled by an unrestricted unpickler, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "nested"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(form, tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "evil.pt"
    evil = {**state(), "x": Evil(mark)}
    if form == "pickle":
        path.write_bytes(pickle.dumps({"x": Evil(mark)}))
    else:
        torch.save({"state_dict": evil} if form == "nested" else evil, path, _use_new_zipfile_serialization=form != "legacy")
    message = refusal(path)
    assert "refused" in message
    assert "run code" in message or "runs whatever code" in message
    assert form == "pickle" or "mkdir" in message
    assert "safetensors" in message
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(mark)))  # the same object does run where nobody forbids it
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (lambda: [torch.zeros(1)], "holds a list, expected a dict of named tensors"),
        (lambda: torch.zeros(3), "holds a Tensor, expected a dict"),
        (lambda: torch.nn.Linear(2, 2), "names 'torch.nn.modules.linear.Linear'"),
        (lambda: {**state(), "acc": np.float64(3)}, "names 'numpy._core.multiarray.scalar'"),
        (lambda: {}, "holds no tensors"),
        (lambda: {"state_dict": {}}, "1 entries that are not tensors: state_dict (dict)"),
        (lambda: {"epoch": 3}, "holds no tensors"),
        (lambda: {**state(), "shape": (1, 2), "cfg": {"a": 1}}, "2 entries that are not tensors: shape (tuple), cfg (dict)"),
        (lambda: {3: torch.zeros(1)}, "entries that are not tensors: 3 (Tensor)"),
        (lambda: {"state_dict": state(), "model": state()}, "tensors in several places (state_dict, model)"),
        (lambda: {"model": state(), "mean": torch.zeros(3)}, "tensors in several places (model, mean)"),
        (lambda: {"a": torch.eye(3).to_sparse()}, "'a' as a special tensor"),
        (lambda: {"a": torch.empty(3, device="meta")}, "'a' as a special tensor"),
        (lambda: {"a": torch.zeros(1).expand(10**9)}, "over fewer stored values than it shows"),
    ],
)
def test_torch_files_that_hold_something_else(content, expected, tmp_path):
    torch.save(content(), tmp_path / "odd.pt")
    assert expected in refusal(tmp_path / "odd.pt")


def archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as out:
        for name, content in members.items():
            out.writestr(name, content)
    return path


def test_zip_files_that_torch_did_not_write(tmp_path):
    assert "NumPy archive" in refusal(archive(tmp_path / "x.npz", {"a.npy": b"x"}))
    assert "TorchScript program" in refusal(archive(tmp_path / "x.pt", {"x/constants.pkl": b"", "x/data.pkl": b""}))
    assert "a zip of a.txt, not a file that torch.save wrote" in refusal(archive(tmp_path / "x.zip", {"a.txt": b"x"}))
    assert "cannot be read as a file that torch.save wrote" in refusal(archive(tmp_path / "y.pt", {"y/data.pkl": b"\x80\x02}q\0X.", "y/version": b"x"}))
    write(tmp_path / "good.pt", state())
    with zipfile.ZipFile(tmp_path / "good.pt") as good:
        members = {info.filename: good.read(info) for info in good.infolist()}
    assert "compressed entries" in refusal(archive(tmp_path / "bomb.pt", members, zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.pt", b"", "is empty (0 bytes)"),
        ("a.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer, not the file itself, expected PyTorch weights"),
        ("a.bin", b"<!DOCTYPE html><html>", "a web page"),
        ("a.pt", b'{"error": "no"}', "is JSON text"),
        ("a.h5", b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file (TensorFlow, Keras)"),
        ("a.npy", b"\x93NUMPY" + bytes(99), "a NumPy array"),
        ("a.msgpack", b"\xdf\0\0\0\1" + bytes(99), "a Flax (JAX) file by its name"),
        ("model.ckpt.index", b"\0\0\1\2" + bytes(99), "part of a TensorFlow checkpoint by its name"),
        ("model.ckpt.data-00000-of-00001", bytes(99), "part of a TensorFlow checkpoint by its name"),
        ("a.onnx", b"\x08\x08\x12\x07" + bytes(99), "an ONNX model by its name"),
        ("a.dat", b"what is this", "of no known kind (it starts with b'what is "),
    ],
)
def test_files_of_other_programs_are_named(name, content, expected, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert expected in refusal(tmp_path / name)


def test_paths_that_are_no_files(tmp_path):
    assert "is a folder, expected a weights file" in refusal(tmp_path)
    assert "does not exist" in refusal(tmp_path / "missing.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    assert "is no regular file" in refusal(tmp_path / "pipe.pt")


def raw(path: Path, header: object, data: bytes = bytes(16), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (4,), offsets: object = (0, 16)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LIES = {
    "length beyond the file": (dict(header={"a": entry()}, length=10**6), "should take 1,000,000 bytes"),
    "length beyond all memory": (dict(header={"a": entry()}, length=2**63), "cut off or no safetensors file"),
    "header not JSON": (dict(header=b'{"a": '), "header that is not JSON"),
    "header not text": (dict(header=b'{"\xff": 1}'), "header that is not JSON"),
    "header too deep": (dict(header=b'{"a": ' + b"[" * 100_000), "header that is not JSON"),
    "a number of many digits": (dict(header=b'{"a": ' + b"9" * 10_000 + b"}"), "header that is not JSON"),
    "one name twice": (dict(header=b'{"a": 1, "a": 2}'), "a name stands in it twice"),
    "entry not an object": (dict(header={"a": 3}), "without dtype, shape and two data_offsets for 'a'"),
    "offsets missing": (dict(header={"a": {"dtype": "F32", "shape": [4]}}), "without dtype, shape and two data_offsets"),
    "three offsets": (dict(header={"a": entry(offsets=[0, 8, 16])}), "two data_offsets"),
    "negative offset": (dict(header={"a": entry(offsets=[-16, 0])}), "two data_offsets"),
    "fractional offset": (dict(header={"a": entry(offsets=[0, 16.0])}), "two data_offsets"),
    "shape of truth values": (dict(header={"a": entry(shape=[True, 4])}), "without dtype, shape"),
    "offsets beyond the file": (dict(header={"a": entry(shape=[400], offsets=[0, 1600])}), "its tensors take 1,600 bytes after the header, 16 are there"),
    "offsets against each other": (dict(header={"a": entry(offsets=[16, 0])}), "contradicts itself"),
    "shape against offsets": (dict(header={"a": entry(shape=[5])}), "'a' is F32 (5,), which takes 20 bytes, and its data_offsets span 16"),
    "dtype against offsets": (dict(header={"a": entry(dtype="F16")}), "'a' is F16 (4,), which takes 8 bytes"),
    "a product that overflows": (dict(header={"a": entry(shape=[2**40, 2**40])}), "contradicts itself"),
    "unknown dtype": (dict(header={"a": entry(dtype="F4")}), "as F4, a dtype that is not read here"),
    "overlap": (dict(header={"a": entry(), "b": entry(shape=[2], offsets=[8, 16])}), "'b' overlaps 'a'"),
    "the same bytes twice": (dict(header={"a": entry(), "b": entry()}), "'b' overlaps 'a'"),
    "gap before": (dict(header={"a": entry(shape=[2], offsets=[8, 16])}), "a gap of 8 bytes before 'a'"),
    "bytes behind": (dict(header={"a": entry(shape=[2], offsets=[0, 8])}), "8 bytes behind its last tensor"),
    "metadata of numbers": (dict(header={"__metadata__": {"a": 1}, "a": entry()}), "__metadata__ is not an object of strings"),
    "no tensors": (dict(header={}, data=b""), "holds no tensors"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_safetensors_header_that_lies_is_refused(lie, tmp_path):
    arguments, expected = LIES[lie]
    path = raw(tmp_path / "lie.safetensors", **arguments)
    assert expected in refusal(path)
    with pytest.raises(CheckpointError, match="lie"):
        weight_shapes(path)


@given(
    entries=st.dictionaries(
        st.sampled_from(["a", "b", "c"]),
        st.fixed_dictionaries({
            "dtype": st.sampled_from(["F32", "F16", "I64", "BOOL"]),
            "shape": st.lists(st.integers(0, 4), max_size=2),
            "data_offsets": st.tuples(st.sampled_from([0, 4, 8, 16, 32]), st.sampled_from([0, 4, 8, 16, 32, 48])),
        }),
        min_size=1,
    ),
    available=st.sampled_from([0, 8, 16, 32, 48]),
)
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_headers_are_judged_as_the_library_judges_them(entries, available, tmp_path):
    path = raw(tmp_path / "any.safetensors", entries, bytes(available))
    try:
        theirs = {name: tuple(tensor.shape) for name, tensor in load_file(path).items()}
    except SafetensorError:
        theirs = None
    try:
        mine = {name: entry.shape for name, entry in read_header(path).items()}
    except CheckpointError:
        mine = None
    assert mine == theirs


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_called_what_torch_calls_it(name, tmp_path):
    dtype = getattr(torch, DTYPES[name][0])
    save_file({"a": torch.zeros(3, dtype=torch.float32).to(dtype)}, tmp_path / "a.safetensors")
    assert read_header(tmp_path / "a.safetensors")["a"].dtype == str(dtype).removeprefix("torch.")
    assert torch.empty(0, dtype=dtype).element_size() == DTYPES[name][1]


def test_content_counts_and_not_the_name(tmp_path):
    assert equal(read_weights(write(tmp_path / "weights.bin", state(), "safetensors")), state())
    assert "is a torch pickle under the name of another format" in refusal(write(tmp_path / "pickle.safetensors", state(), "zip"))


@pytest.mark.parametrize("form", ["zip", "safetensors"])
def test_weights_are_mapped_not_copied(form, tmp_path):
    if not Path("/proc/self/maps").exists():
        pytest.skip("mappings are listed in /proc on Linux only")
    path = write(tmp_path / "mapped.pt", {"w": torch.ones(300_000)}, form)
    found = read_weights(path)
    assert str(path) in Path("/proc/self/maps").read_text(encoding="utf-8")
    found["w"].add_(1)  # private: the file keeps its values
    assert torch.equal(read_weights(path)["w"], torch.ones(300_000))


def test_only_the_restricted_unpickler_is_used(tmp_path, monkeypatch):
    asked = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: asked.append(options) or load(*args, **options))
    for form in ("zip", "legacy"):
        read_weights(write(tmp_path / form, state(), form))
    assert [(options["weights_only"], options["map_location"]) for options in asked] == [(True, "cpu")] * 2


def test_the_weights_of_a_folder(tmp_path):
    def folder(name: str, *files: str) -> Path:
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_bytes(b"x")
        return tmp_path / name

    assert find_weights(folder("apple", "mobileclip_s0.pt", "README.md", "config.json")).name == "mobileclip_s0.pt"
    assert find_weights(folder("clip", "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_config.json")).name == "open_clip_model.safetensors"
    assert find_weights(folder("timm", "model.safetensors", "pytorch_model.bin", "config.json")).name == "model.safetensors"
    assert find_weights(folder("old", "pytorch_model.bin", "optimizer.pt", ".model.safetensors.1")).name == "pytorch_model.bin"
    assert find_weights(folder("ours", "model.safetensors", "config.json", "receipt.json", "old.pt")).name == "model.safetensors"
    with pytest.raises(CheckpointError, match=r"many' has 2 files that may be the weights: a\.pt, b\.safetensors; give the path"):
        find_weights(folder("many", "a.pt", "b.safetensors"))
    with pytest.raises(CheckpointError, match=r"none' has no weights: it holds README\.md; expected a file \*\.safetensors"):
        find_weights(folder("none", "README.md"))
    with pytest.raises(CheckpointError, match="empty' has no weights: it holds no files"):
        find_weights(folder("empty"))
    with pytest.raises(CheckpointError, match="does not exist"):
        find_weights(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="is no folder"):
        find_weights(tmp_path / "none" / "README.md")


def test_of_two_formats_the_safer_one_is_taken():
    assert weights_candidates(["a.pt", "a.safetensors", "a.bin", "sub/b.pt", "training_args.bin", "notes.txt"]) == ["a.safetensors"]
