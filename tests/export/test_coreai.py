"""Core AI assets: what Apple's runtime computes with them, what they are called, and that two saves are the same bytes."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("coreai")
pytest.importorskip("coreai_torch")
pytest.importorskip("coreai_opt")

from export import to_coreai  # noqa: E402
from export.converters import silent  # noqa: E402
from export.draft import Draft, Job  # noqa: E402
from export.to_onnx import quiet  # noqa: E402
from export.towers import TOWERS  # noqa: E402
from export.verify import measure  # noqa: E402
from mobileclip.folding import reparameterize  # noqa: E402
from runtime.errors import MissingExtraError, ParityError  # noqa: E402
from tests.export.conftest import qr_model  # noqa: E402

ROWS = 4
LIMITS = {"fp32": 0.99999, "fp16": 0.9995}
LEAST_MEAN = {"palette6": 0.98, "palette4": 0.9, "int8": 0.999}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("coreai")


@pytest.fixture(scope="module")
def folded(pocket):
    return reparameterize(pocket)[0]


@pytest.fixture(scope="module")
def made(folded, samples, folder) -> dict[str, Draft]:
    """Every draft of both towers."""
    jobs = [Job(model=folded, tower=tower, calibration=samples.tail(12), folder=folder) for tower in TOWERS]
    return {draft.id: draft for job in jobs for draft in to_coreai.drafts(job, to_coreai.PRECISIONS)}


@pytest.mark.parametrize("precision", to_coreai.PRECISIONS)
@pytest.mark.parametrize("tower", TOWERS)
def test_saved_asset_computes_what_the_checkpoint_does(tower, precision, made, samples, reference):
    draft = made[f"{tower}-coreai-{precision}"]
    assert (draft.timed, draft.batch) == (False, "1")
    parity = measure(tower, draft.run(samples.inputs(tower)[:ROWS]), reference)
    if precision in LIMITS:
        assert parity.cosine_min >= LIMITS[precision]
    else:
        assert LEAST_MEAN[precision] <= parity.cosine_mean < 0.999999  # it did round
        assert draft.facts["compressed_tensors"] > 4


@pytest.mark.parametrize("tower", TOWERS)
def test_each_precision_is_smaller_than_the_last(tower, made, folder):
    sizes = [sum(path.stat().st_size for path in (folder / made[f"{tower}-coreai-{name}"].path).iterdir()) for name in ("fp32", "fp16", "int8", "palette6", "palette4")]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[1] < 0.55 * sizes[0]


@pytest.mark.parametrize(("tower", "given", "kind"), [("image", "image", "Float32"), ("text", "tokens", "Int32")])
def test_function_has_names_and_types(tower, given, kind, made, folder):
    from coreai.authoring import AIModelAsset

    for precision in to_coreai.PRECISIONS:
        summary = AIModelAsset.load(folder / made[f"{tower}-coreai-{precision}"].path).summary(include_statistics=False)
        ((name, described),) = summary.function_inputs("main")
        assert name == given
        assert kind.lower() in described.lower()
        ((name, described),) = summary.function_outputs("main")
        assert name == f"{tower}_embedding"
        assert "float32" in described.lower()


def test_products_taken_in_float32_change_only_the_rounding(made, samples, folder):
    """What parity is measured with against the asset as it is, which Apple's runtime multiplies very slowly on Linux."""
    from coreai.authoring import AIModelAsset

    path, row = folder / made["text-coreai-fp16"].path, samples.tokens[:1]
    with quiet("coreai"), silent():
        plain = asyncio.run(to_coreai._run(AIModelAsset.load(path), row))
    widened = to_coreai.evaluate(path, row)
    assert (plain * widened).sum() > 0.9999
    assert np.abs(plain - widened).max() > 0


def test_second_conversion_gives_the_same_bytes_and_tells_nothing_of_the_machine(made, folded, samples, folder, tmp_path, capfd):
    capfd.readouterr()
    job = Job(model=folded, tower="text", calibration=samples, folder=tmp_path)
    again = list(to_coreai.drafts(job, ["palette4", "fp32", "palette4"]))  # neither the order nor what was made before shows
    again[1].run(samples.tokens[:1])
    assert capfd.readouterr() == ("", "")
    assert sorted(path.name for path in (tmp_path / "coreai").iterdir()) == ["text.fp32.aimodel", "text.palette4.aimodel"]
    for draft in again:
        files = {path.name: path.read_bytes() for path in (tmp_path / draft.path).iterdir()}
        assert files == {path.name: path.read_bytes() for path in (folder / draft.path).iterdir()}
        assert set(files) == {"main.hash", "main.mlirb", "metadata.json"}
        assert set(json.loads(files["metadata.json"])) == {"assetVersion", "producer"}
    for draft in made.values():
        content = b"".join(path.read_bytes() for path in (folder / draft.path).iterdir())
        for word in (str(Path(to_coreai.__file__).parents[1]), str(Path.home()), str(folder), sys.prefix, "site-packages"):
            assert word.encode() not in content, (draft.path, word)


@pytest.mark.parametrize("bits", [4, 6])
def test_palette_is_near_the_best(bits):
    """Lloyd and Max's limit for normal values at 4 and 6 bits, as signal over noise in dB (Max 1960; Panter and Dite's formula for 64 levels)."""
    weight = np.random.default_rng(0).normal(0, 0.02, (256, 128)).astype(np.float16)
    table, indices = to_coreai.palette(bits, weight)
    assert len(table) == 1 << bits
    assert (np.diff(table) > 0).all()
    noise = np.mean((table[indices] - weight.astype(float).ravel()) ** 2) / np.var(weight.astype(float))
    assert -10 * np.log10(noise) > {4: 20.1, 6: 31.6}[bits]


def test_palette_of_few_values_is_exact():
    weight = np.array([[3, 1], [1, 2], [1, 3]], np.float16)
    table, indices = to_coreai.palette(4, weight)
    assert len(table) == 16
    assert table[indices].tolist() == [3, 1, 1, 2, 1, 3]
    table, indices = to_coreai.palette(4, np.full((8, 2), 7, np.float16))
    assert set(table[indices]) == {7}


def test_operation_that_core_ai_lacks_is_named(samples, tmp_path):
    job = Job(model=qr_model(), tower="image", calibration=samples, folder=tmp_path)
    with pytest.raises(ParityError, match="linalg_qr.*module 'tower.odd'"):
        list(to_coreai.drafts(job, ["fp32"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("module", "package"), to_coreai.PACKAGES.items())
def test_missing_package_names_the_extra(module, package, monkeypatch, samples, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"'{package}'.*\[coreai\]"):
        to_coreai.require()
    with pytest.raises(MissingExtraError):
        next(to_coreai.drafts(Job(model=None, tower="image", calibration=samples, folder=tmp_path), ["fp32"]))
    assert list(tmp_path.iterdir()) == []
