"""The Hugging Face layout: names that transformers.js looks for, ids as it makes them, the checkpoint's embeddings."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from export import to_hf  # noqa: E402
from export.towers import embed, encoder_of  # noqa: E402
from export.verify import measure  # noqa: E402
from mobileclip.checkpoint import open_tokenizer, preprocess_config  # noqa: E402
from mobileclip.folding import reparameterize  # noqa: E402
from runtime.errors import CheckpointError, MissingExtraError  # noqa: E402
from runtime.tokenizer import Tokenizer  # noqa: E402
from tests.export.conftest import job_of  # noqa: E402

FILES = [
    "config.json", "onnx/text_model.onnx", "onnx/text_model_quantized.onnx", "onnx/vision_model.onnx", "onnx/vision_model_quantized.onnx",
    "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
]  # fmt: skip


def convert(pocket, checkpoint, samples, folder):
    folded, _ = reparameterize(pocket)
    found = [draft for tower in ("image", "text") for draft in to_hf.drafts(job_of(folded, tower, samples.head(16), folder), to_hf.PRECISIONS)]
    to_hf.write_hf_files(folder / "hf", pocket.config, preprocess_config(pocket.config), checkpoint / "tokenizer.json")
    return {draft.id: draft for draft in found}


@pytest.fixture(scope="module")
def made(pocket, pocket_checkpoint, samples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    return convert(pocket, pocket_checkpoint, samples, folder), folder / "hf"


def session(path):
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def signature(entry):
    return entry.name, entry.type, entry.shape


def test_layout_and_names(made, pocket):
    drafts, folder = made
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == FILES
    assert [draft.path for draft in drafts.values()] == [f"hf/onnx/{name}.onnx" for name in ("vision_model", "vision_model_quantized", "text_model", "text_model_quantized")]
    dim = pocket.config.embed_dim
    for suffix in ("", "_quantized"):
        vision, text = (session(folder / f"onnx/{stem}{suffix}.onnx") for stem in ("vision_model", "text_model"))
        assert [signature(entry) for entry in vision.get_inputs()] == [("pixel_values", "tensor(float)", ["batch", 3, 64, 64])]
        assert [signature(entry) for entry in vision.get_outputs()] == [("image_embeds", "tensor(float)", ["batch", dim])]
        assert [signature(entry) for entry in text.get_inputs()] == [("input_ids", "tensor(int64)", ["batch", "sequence"])]
        assert [signature(entry) for entry in text.get_outputs()] == [("text_embeds", "tensor(float)", ["batch", dim])]
    for path in (folder / "onnx").iterdir():
        onnx.checker.check_model(onnx.load(path), full_check=True)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_embeddings_are_the_checkpoints(tower, made, samples, reference):
    drafts, _ = made
    exact, quantised = (measure(tower, drafts[f"{tower}-hf-{precision}"].run(samples.inputs(tower)), reference) for precision in to_hf.PRECISIONS)
    assert exact.cosine_min > 0.999999
    assert 0.9 < quantised.centred_mean < 0.9999999


@pytest.mark.parametrize("suffix", ["", "_quantized"])
def test_shorter_and_longer_ids_mean_the_same_text(suffix, made, pocket, pocket_checkpoint):
    """transformers.js pads a batch to its longest text and cuts at the end."""
    tokenizer = open_tokenizer(pocket_checkpoint, pocket.config)
    text = session(made[1] / f"onnx/text_model{suffix}.onnx")
    run = lambda ids: text.run(None, {"input_ids": ids.astype(np.int64)})[0]  # noqa: E731
    tokens = tokenizer(["a red cat", "two small boats"])
    longest = int((tokens.argmax(1) + 1).max())
    assert longest < tokens.shape[1]
    np.testing.assert_allclose(run(tokens[:, :longest]), run(tokens), atol=1e-6)
    np.testing.assert_allclose(run(np.pad(tokens, ((0, 0), (0, 9)))), run(tokens), atol=1e-6)
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty twenty-one"
    whole = Tokenizer.open(pocket_checkpoint / "tokenizer.json", context_length=60)([long])
    whole, length = whole[:, : int(whole.argmax(1)[0]) + 1], tokens.shape[1]
    assert whole.shape[1] > length
    assert (whole[:, :length] != tokenizer([long])).sum() == 1  # the final special token is lost
    for ids in (whole, whole[:, :length]):
        np.testing.assert_allclose(run(ids), run(tokenizer([long])), atol=1e-6)


def test_common_files_say_what_the_model_needs(made, pocket, pocket_checkpoint):
    _, folder = made
    config, preprocessor, tokenizer = (json.loads((folder / name).read_text()) for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"))
    settings = pocket.config
    assert config["model_type"] == "clip"
    assert config["projection_dim"] == settings.embed_dim
    assert config["text_config"]["eos_token_id"] == settings.text.vocab_size - 1
    assert config["transformers.js_config"] == {"dtype": {"vision_model": "auto", "text_model": "auto"}}
    assert math.exp(config["logit_scale_init_value"]) == pytest.approx(settings.logit_scale)
    assert preprocessor["image_processor_type"] == "CLIPImageProcessor"
    assert preprocessor["size"] == {"shortest_edge": math.floor(settings.image.image_size / settings.image.crop_pct)}
    assert preprocessor["crop_size"] == {"height": settings.image.image_size, "width": settings.image.image_size}
    assert preprocessor["image_mean"] == list(settings.image.mean)
    assert tokenizer["model_max_length"] == settings.text.context_length
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert vocabulary[tokenizer["pad_token"]] == settings.text.pad_id
    assert (folder / "tokenizer.json").read_bytes() == (pocket_checkpoint / "tokenizer.json").read_bytes()


def test_only_the_files_that_are_there_are_asked_for(made, pocket, pocket_checkpoint, tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/text_model_quantized.onnx").touch()
    (tmp_path / "onnx/vision_model.onnx").touch()
    to_hf.write_hf_files(tmp_path, pocket.config, preprocess_config(pocket.config), pocket_checkpoint / "tokenizer.json", logit_scale=50.0)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["transformers.js_config"] == {"dtype": {"vision_model": "fp32", "text_model": "q8"}}
    assert config["logit_scale_init_value"] == pytest.approx(math.log(50))


@pytest.mark.slow
def test_second_conversion_gives_the_same_bytes(made, pocket, pocket_checkpoint, samples, tmp_path):
    convert(pocket, pocket_checkpoint, samples, tmp_path)
    for name in FILES:
        assert (tmp_path / "hf" / name).read_bytes() == (made[1] / name).read_bytes(), name


def test_nothing_of_the_machine_inside(made):
    here = Path(__file__).resolve().parents[2]
    for name in FILES:
        data = (made[1] / name).read_bytes()
        for word in (str(here), str(Path.home()) + "/", "site-packages", str(made[1])):
            assert word.encode() not in data, (name, word)


def test_job_graph_is_left_as_it_was(pocket, samples, tmp_path):
    job = job_of(reparameterize(pocket)[0], "text", samples.head(4), tmp_path)
    before = job.onnx.SerializeToString(deterministic=True)
    (draft,) = to_hf.drafts(job, ("fp32",))
    assert job.onnx.SerializeToString(deterministic=True) == before
    np.testing.assert_allclose(draft.run(samples.tokens[:4]), embed(encoder_of(pocket, "text"), samples.tokens[:4]), atol=1e-5)


def test_tokenizers_that_do_not_fit_are_refused(pocket, pocket_checkpoint, tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    for name in ("bad.json", "none.json"):
        with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
            to_hf.write_hf_files(tmp_path / "hf", pocket.config, preprocess_config(pocket.config), tmp_path / name)
    (tmp_path / "small.json").write_text(json.dumps({"model": {"vocab": {"a": 7}}}))
    with pytest.raises(CheckpointError, match="no token of the id 0"):
        to_hf.write_hf_files(tmp_path / "hf", pocket.config, preprocess_config(pocket.config), tmp_path / "small.json")


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"onnxscript.*\[export\]"):
        to_hf.require()
