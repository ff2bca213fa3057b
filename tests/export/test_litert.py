"""LiteRT files: what they compute, what they are called, and that two conversions are the same bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("litert_torch")
pytest.importorskip("ai_edge_litert")
pytest.importorskip("ai_edge_quantizer")

from export import to_litert  # noqa: E402
from export.draft import Draft, Job  # noqa: E402
from export.to_litert import LiteRtEncoder  # noqa: E402
from export.towers import TOWERS, embed, text_encoder  # noqa: E402
from export.verify import measure  # noqa: E402
from mobileclip.folding import reparameterize  # noqa: E402
from runtime.errors import MissingExtraError, ParityError  # noqa: E402
from tests.export.conftest import qr_model  # noqa: E402

ROWS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("litert")


@pytest.fixture(scope="module")
def folded(pocket):
    return reparameterize(pocket)[0]


@pytest.fixture(scope="module")
def made(folded, samples, folder) -> dict[str, Draft]:
    """Every draft of both towers."""
    jobs = [Job(model=folded, tower=tower, calibration=samples.tail(12), folder=folder) for tower in TOWERS]
    return {draft.id: draft for job in jobs for draft in to_litert.drafts(job, to_litert.PRECISIONS)}


@pytest.mark.parametrize("tower", TOWERS)
def test_file_computes_what_the_checkpoint_does(tower, made, samples, reference):
    draft = made[f"{tower}-litert-fp32"]
    assert (draft.timed, draft.batch) == (True, "1")
    assert measure(tower, draft.run(samples.inputs(tower)[:ROWS]), reference).cosine_min >= 0.99999


@pytest.mark.parametrize("tower", TOWERS)
def test_int8_is_smaller_and_near(tower, made, samples, reference, folder):
    draft = made[f"{tower}-litert-int8"]
    parity = measure(tower, draft.run(samples.inputs(tower)[:ROWS]), reference)
    assert 0.99 < parity.cosine_mean < 0.999999  # it did round
    assert (folder / draft.path).stat().st_size < 0.4 * (folder / made[f"{tower}-litert-fp32"].path).stat().st_size


@pytest.mark.parametrize(("tower", "given", "kind"), [("image", "image", np.float32), ("text", "tokens", np.int32)])
def test_signature_has_names_and_types(tower, given, kind, made, samples, folder):
    for precision in to_litert.PRECISIONS:
        encoder = LiteRtEncoder(folder / made[f"{tower}-litert-{precision}"].path)
        (detail,) = encoder.runner.get_input_details().values()
        assert (encoder.input_name, encoder.output_name) == (given, f"{tower}_embedding")
        assert detail["dtype"] is kind
        assert tuple(detail["shape"]) == (1, *samples.inputs(tower).shape[1:])


def test_end_of_text_is_found_wherever_it_stands(made, folded, samples):
    """The argmax in the graph: texts of every length, and one that fills the context to its last place."""
    tokens = samples.tokens[:1].copy()
    end = tokens.max()
    rows = np.repeat(tokens, tokens.shape[1] - 1, axis=0)
    for n, row in enumerate(rows, start=1):
        row[n:] = 0
        row[n] = end
    assert (made["text-litert-fp32"].run(rows) * embed(text_encoder(folded), rows)).sum(1).min() >= 0.99999


def test_second_conversion_gives_the_same_bytes_and_tells_nothing_of_the_machine(made, folded, samples, folder, tmp_path, capfd):
    capfd.readouterr()
    for draft in to_litert.drafts(Job(model=folded, tower="image", calibration=samples, folder=tmp_path), to_litert.PRECISIONS):
        assert (tmp_path / draft.path).read_bytes() == (folder / draft.path).read_bytes(), draft.path
    assert capfd.readouterr() == ("", "")
    assert sorted(path.name for path in (tmp_path / "litert").iterdir()) == ["image.fp32.tflite", "image.int8.tflite"]
    for draft in made.values():
        content = (folder / draft.path).read_bytes()
        for word in (str(Path(to_litert.__file__).parents[1]), str(Path.home()), str(folder), sys.prefix, "site-packages"):
            assert word.encode() not in content, (draft.path, word)


def test_operation_that_litert_lacks_is_named(samples, tmp_path):
    job = Job(model=qr_model(), tower="image", calibration=samples, folder=tmp_path)
    with pytest.raises(ParityError, match="linalg_qr.*module 'tower.odd'"):
        list(to_litert.drafts(job, ["fp32"]))
    assert list(tmp_path.rglob("*.tflite")) == []


@pytest.mark.parametrize("package", to_litert.PACKAGES)
def test_missing_package_names_the_extra(package, monkeypatch, samples, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"'{package.replace('_', '-')}'.*\[litert\]"):
        to_litert.require()
    with pytest.raises(MissingExtraError):
        next(to_litert.drafts(Job(model=None, tower="image", calibration=samples, folder=tmp_path), ["fp32"]))
    assert list(tmp_path.iterdir()) == []
