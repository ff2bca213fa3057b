"""Core ML classifiers: the probabilities are those of the embeddings, Xcode and Vision know what they are, nothing is judged by looks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

coremltools = pytest.importorskip("coremltools")

from export.mil_interpreter import MilProgram  # noqa: E402
from export.to_coreml import as_picture  # noqa: E402
from export.to_coreml_classifier import check_probabilities, drafts, read_classes  # noqa: E402
from export.verify import failure, measure  # noqa: E402
from mobileclip import cli  # noqa: E402
from mobileclip.folding import reparameterize  # noqa: E402
from runtime.errors import ParityError, RecipeError  # noqa: E402
from tests.export.conftest import job_of  # noqa: E402


class Named:
    """Texts to vectors that tell which class they name and how."""

    def encode_text(self, texts):
        return np.stack([np.random.default_rng(list(text.encode())).standard_normal(256) for text in texts])


@pytest.fixture
def classes(tmp_path):
    (tmp_path / "names.txt").write_text("a cat\n\nUnïcode hat\nclock\nred heart\n")
    (tmp_path / "templates.txt").write_text("a photo of {}\na drawing of {c}\n")
    return read_classes(tmp_path / "names.txt", tmp_path / "templates.txt", Named())


def test_vectors_are_means_over_templates(classes):
    assert classes.names == ("a cat", "Unïcode hat", "clock", "red heart")
    assert classes.templates == ("a photo of {}", "a drawing of {}")
    one, other = (values / np.linalg.norm(values) for values in Named().encode_text(["a photo of clock", "a drawing of clock"]))
    np.testing.assert_allclose(classes.vectors[2], (one + other) / np.linalg.norm(one + other), rtol=1e-6)


def test_packages_are_classifiers_with_the_checkpoints_probabilities(classes, pocket, samples, reference, tmp_path):
    model, _ = reparameterize(pocket)
    job = job_of(model, "image", samples, tmp_path, classes=classes)
    scale = float(model.logit_scale.detach().exp())
    logits = scale * reference.image.astype(np.float64) @ classes.vectors.T
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for draft in drafts(job, ("fp32", "fp16")):
        path = tmp_path / draft.path
        specification = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec()
        description = specification.description
        assert (description.predictedFeatureName, description.predictedProbabilitiesName) == ("label", "label_probs")
        assert description.input[0].type.WhichOneof("Type") == "imageType"
        assert dict(description.metadata.userDefined) == {"com.apple.coreml.model.preview.type": "imageClassifier"}
        parity = measure("image", draft.run(samples.pixels[:8]), reference)
        assert failure(draft.id, parity, draft.precision) is None
        found = MilProgram.open(path)(image=as_picture(samples.pixels[:1], job.preprocessing))
        assert list(found["label_probs"]) == list(classes.names)
        np.testing.assert_allclose(list(found["label_probs"].values()), expected[0], atol={"fp32": 1e-4, "fp16": 0.03}[draft.precision])
        assert draft.facts["classes"] == list(classes.names)
    assert list(drafts(job_of(model, "text", samples, tmp_path, classes=classes), ("fp16",))) == []


def test_class_vectors_that_are_not_those_of_the_package_are_found(classes, pocket, samples, tmp_path):
    model, _ = reparameterize(pocket)
    job = job_of(model, "image", samples, tmp_path, classes=classes)
    (draft,) = drafts(job, ("fp16",))
    swapped = dataclasses.replace(classes, vectors=classes.vectors[[1, 0, 2, 3]])
    with pytest.raises(ParityError, match=r"a probability is off by [01]\.\d+, more than 0\.05, the most for fp16"):
        check_probabilities(MilProgram.open(tmp_path / draft.path), job, swapped, float(model.logit_scale.detach().exp()), draft)


def test_classes_that_cannot_be_told_apart(tmp_path):
    for text, message in (("cat\n", "has only 'cat'; expected at least two"), ("cat\ndog\ncat\n", "has 'cat' twice")):
        (tmp_path / "names.txt").write_text(text)
        with pytest.raises(RecipeError, match=message):
            read_classes(tmp_path / "names.txt", None, Named())


def test_target_and_classes_need_each_other(pocket_checkpoint, pairs_folder, tmp_path, capsys):
    for arguments in (["--target", "onnx,coreml-classifier"], ["--classnames", str(tmp_path / "names.txt")]):
        assert cli.main(["export", str(pocket_checkpoint), str(tmp_path / "bundle"), "--pairs", str(pairs_folder), *arguments]) == 1
        assert "need each other" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()
