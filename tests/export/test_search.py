"""The search for int8: what it measures, what it keeps between runs, what `mclip compress` makes of it and the exporter obeys."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import export.search
import export.search_towers
from export.bundle import ExportConfig, export_bundle
from export.compress import CompressConfig, compress
from export.int8_recipe import Int8Recipe
from export.latency_gate import Ratio
from export.precision_file import read_precisions
from export.qdq import layers
from export.quality import Limits, Quality, judge, rare_rows, sudden_drop
from export.search import RUNGS, Point, Search, best, table
from export.to_onnx import export_onnx
from export.towers import encoder_of, read_samples
from export.verify import Reference, reference_of
from mobileclip.checkpoint import load_checkpoint, open_tokenizer, preprocess_config, save_checkpoint, verify_receipt
from mobileclip.folding import reparameterize
from mobileclip.presets import preset
from runtime.errors import ParityError, RecipeError
from runtime.manifest import read_manifest
from runtime.pairs import open_pairs
from tests.export.conftest import calibrated, once, write_pairs

PAIRS = 128


@pytest.fixture(scope="module")
def many_pairs(shared) -> Path:
    return once(shared, "many-pairs", lambda folder: write_pairs(folder, count=PAIRS))


@pytest.fixture(scope="module")
def taught_checkpoint(shared, many_pairs) -> Path:
    """A pocket model that finds most of these pairs: the last linear map of its image tower, solved for the captions' embeddings."""

    def make(folder: Path) -> None:
        model = calibrated(preset("pocket_s"))
        save_checkpoint(model, folder.with_name("untaught"))
        tokenizer = open_tokenizer(folder.with_name("untaught"), model.config)
        samples, _ = read_samples(open_pairs(many_pairs), range(PAIRS), preprocess_config(model.config), tokenizer)
        last = [module for module in model.image.modules() if isinstance(module, nn.Linear)][-1]
        seen: list[torch.Tensor] = []
        hook = last.register_forward_hook(lambda module, args, output: seen.append(args[0]))
        with torch.no_grad():
            wanted = nn.functional.normalize(model.text(torch.from_numpy(samples.tokens)), dim=-1)
            wanted = wanted - wanted.mean(0)
            model.image(torch.from_numpy(samples.pixels))
            features = seen[0]
            centred = features - features.mean(0)
            gram = centred.T @ centred
            last.weight.copy_(torch.linalg.solve(gram + 1e-3 * gram.diagonal().mean() * torch.eye(len(gram)), centred.T @ wanted).T)
            if last.bias is not None:
                last.bias.copy_(-last.weight @ features.mean(0))
        hook.remove()
        save_checkpoint(model, folder)

    return once(shared, "taught", make)


@pytest.fixture
def settings(taught_checkpoint, many_pairs, tmp_path) -> CompressConfig:
    return CompressConfig(checkpoint=taught_checkpoint, out=tmp_path / "small", calibrate=many_pairs, max_recall_loss=2.0, judge=64)


def search_of(tower, taught_checkpoint, many_pairs, notes: Path, **limits: float) -> Search:
    model = load_checkpoint(taught_checkpoint)
    tokenizer = open_tokenizer(taught_checkpoint, model.config)
    rows, probe, judged = (
        read_samples(open_pairs(many_pairs), part, preprocess_config(model.config), tokenizer)[0] for part in (range(16), range(16, 32), range(32, 96))
    )
    graph = export_onnx(encoder_of(reparameterize(model)[0], tower), rows.inputs(tower))
    return Search(
        tower=tower, model=graph, rows=rows.inputs(tower), probe=probe.inputs(tower), judge=judged, reference=reference_of(model, judged), limits=Limits(**limits), notes=notes
    )


@pytest.fixture
def short_ladder(monkeypatch):
    monkeypatch.setattr(export.search, "RUNGS", (0, 2))
    monkeypatch.setattr(export.search, "ALPHAS", (None, 0.5))


def point(time: float, problem: str | None = None, tower: str = "image") -> Point:
    quality = Quality(
        centred_p1=0.99, centred_mean=0.999, overlap10=0.95, recall1_loss=0.001, recall1_loss_low=-0.002, recall1_loss_high=0.004, rare_loss=0.001, rare_loss_low=-0.01,
        rare_n=25, n=100,
    )  # fmt: skip
    ratio = Ratio(median=time, low=time - 0.01, high=time + 0.01)
    return Point(tower=tower, runtime="onnx", recipe=Int8Recipe(form="static"), quality=quality, ratio=ratio, bytes_ratio=0.26, problem=problem)


# --------------------------------------------------------------------------------------------------- judging


def test_exact_embeddings_lose_nothing_and_shuffled_ones_all(taught_checkpoint, many_pairs, tmp_path):
    search = search_of("image", taught_checkpoint, many_pairs, tmp_path / "notes.json")
    exact = judge(search.reference, image=search.reference.image)
    assert (exact.overlap10, exact.recall1_loss) == (1.0, 0.0)
    assert exact.misses(Limits()) is None
    shuffled = judge(search.reference, image=np.roll(search.reference.image, 1, axis=0))
    assert shuffled.recall1_loss > 0.3
    assert "below" in (shuffled.misses(Limits()) or "")


def test_top_ten_is_by_query_over_pictures():
    """Two pictures far apart change places for one query only."""
    rng = np.random.default_rng(0)
    text, image = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in rng.normal(size=(2, 40, 16)).astype(np.float32))
    reference = Reference(image=image, text=text, logit_scale=100.0)
    noisy = image + 0.05 * rng.normal(size=image.shape).astype(np.float32)
    noisy /= np.linalg.norm(noisy, axis=1, keepdims=True)
    expected = np.mean([len(set(np.argsort(-(image @ q))[:10]) & set(np.argsort(-(noisy @ q))[:10])) / 10 for q in text])
    assert judge(reference, image=noisy).overlap10 == pytest.approx(expected)
    assert 0.5 < expected < 1


def test_limits_are_named_by_the_first_that_does_not_hold():
    quality = point(0.5).quality
    assert quality.misses(Limits()) is None
    assert quality.misses(Limits(centred_p1=0.995)) == "centred cosine p1 0.9900 below 0.995"
    assert quality.misses(Limits(overlap10=0.97)) == "top-10 overlap 0.9500 below 0.97"
    assert quality.misses(Limits(recall1_loss=0.0)) == "0.10 points of recall@1 lost, more than 0"


def test_a_loss_on_rare_captions_alone_is_seen():
    """A twentieth of the captions have words of their own, and only those go wrong: the mean hardly moves, the guard does."""
    rng = np.random.default_rng(0)
    n = 200
    image = rng.normal(size=(n, 64)).astype(np.float32)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    captions = [f"a common thing number {row % 5}" for row in range(n - 10)] + [f"axolotl{row}" for row in range(10)]
    rare = rare_rows(captions)
    assert rare.tolist() == [False] * (n - 10) + [True] * 10
    text = image.copy()
    text[-10:] = np.roll(text[-10:], 1, axis=0)
    quality = judge(Reference(image=image, text=image.copy(), logit_scale=100.0), text=text, rare=rare)
    assert quality.recall1_loss == pytest.approx(0.05)
    assert quality.rare_loss == 1.0
    problem = quality.misses(Limits(recall1_loss=0.06, centred_p1=-1, overlap10=0))
    assert problem == "100.00 points of recall@1 lost on the 10 captions with the rarest words, surely more than 6"


@pytest.mark.parametrize(
    ("losses", "place"), [([0.001, 0.002, 0.004, 0.2], 3), ([0.01, 0.02, 0.03, 0.04], None), ([0.001, 0.4], 1), ([0.0, 0.0], None), ([0.3], None), ([], None)]
)
def test_sudden_drops(losses, place):
    assert sudden_drop(losses) == place


def test_both_towers_are_judged_together():
    rng = np.random.default_rng(0)
    image, text = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in rng.normal(size=(2, 60, 16)).astype(np.float32))
    reference = Reference(image=image, text=text, logit_scale=100.0)
    turn = np.linalg.qr(rng.normal(size=(16, 16)))[0].astype(np.float32)
    turned = judge(reference, image=image @ turn, text=text @ turn)  # turned together they find the same
    assert turned.overlap10 > 0.99
    assert abs(turned.recall1_loss) < 1e-9
    assert judge(reference, image=image @ turn).overlap10 < 0.5
    with pytest.raises(ParityError, match="no embeddings to judge"):
        judge(reference)
    with pytest.raises(ParityError, match="cannot be judged"):
        judge(reference, image=np.full_like(image, np.nan))


def test_the_fastest_point_that_keeps_all_limits_is_chosen():
    points = [point(0.3, "centred cosine p1 0.9 below 0.98"), point(0.6), point(0.5), point(0.7, tower="text")]
    assert best(points[:3]) is points[2]
    assert best(points[:1]) is None
    lines = table(points).splitlines()
    assert [line.endswith("chosen") for line in lines[1:]] == [False, False, True, True]
    assert lines[2].endswith("good, slower")


# -------------------------------------------------------------------------------------------------- searching


@pytest.mark.parametrize("tower", ["text", pytest.param("image", marks=pytest.mark.slow)])
def test_a_search_ends_with_measured_points_and_goes_on_where_it_stopped(tower, taught_checkpoint, many_pairs, tmp_path, short_ladder, monkeypatch):
    notes = tmp_path / "notes.json"
    search = search_of(tower, taught_checkpoint, many_pairs, notes, centred_p1=0.999999)  # which no form keeps: the whole ladder is climbed
    measured = []
    real = Search._loss

    def interrupted(self, made):
        if len(measured) == 4:
            raise KeyboardInterrupt
        measured.append(made)
        return real(self, made)

    with monkeypatch.context() as patch:
        patch.setattr(Search, "_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            search.run()
    assert len(json.loads(notes.read_text())) == 4

    again: list[object] = []
    monkeypatch.setattr(Search, "_loss", lambda self, made: again.append(made) or real(self, made))
    points = search_of(tower, taught_checkpoint, many_pairs, notes, centred_p1=0.999999).run()
    kept = json.loads(notes.read_text())
    assert len(kept) == 4 + len(again) + 2  # two rungs
    assert {len(found.recipe.float_layers) for found in points} == {0, 2}
    assert all(found.problem and found.ratio.median > 0 for found in points)
    assert all(0.1 < found.bytes_ratio < 0.9 for found in points)
    again.clear()
    rerun = search_of(tower, taught_checkpoint, many_pairs, notes, centred_p1=0.999999).run()
    assert again == []
    assert [found.quality for found in rerun if found.runtime == "onnx"] == [found.quality for found in points if found.runtime == "onnx"]


@pytest.mark.slow
def test_notes_of_other_inputs_are_not_used(taught_checkpoint, many_pairs, tmp_path, short_ladder):
    notes = tmp_path / "notes.json"
    search_of("text", taught_checkpoint, many_pairs, notes).run()
    count = len(json.loads(notes.read_text()))
    other = search_of("text", taught_checkpoint, many_pairs, notes)
    dataclasses.replace(other, rows=other.rows[:12]).run()
    assert len(json.loads(notes.read_text())) == 2 * count


def test_damaged_notes_are_measured_again(taught_checkpoint, many_pairs, tmp_path, short_ladder):
    (tmp_path / "notes.json").write_text('{"half')
    assert search_of("text", taught_checkpoint, many_pairs, tmp_path / "notes.json").run()


def test_the_worst_layer_is_left_float_first(taught_checkpoint, many_pairs, tmp_path):
    search = search_of("text", taught_checkpoint, many_pairs, tmp_path / "notes.json")
    order = search._order(Int8Recipe(form="dynamic"))
    assert [loss for loss, _ in order] == sorted((loss for loss, _ in order), reverse=True)
    assert {name for _, name in order} == set(layers(search.model))
    assert order[0][0] > 0


def test_rungs_begin_with_nothing_float():
    assert RUNGS[0] == 0
    assert list(RUNGS) == sorted(set(RUNGS))


# --------------------------------------------------------------------------------------------------- the command


def fast(self, rungs):
    """The points of a search whose every graph takes a third of float32's time: what timing would say on a model large enough to gain."""
    return [
        Point(
            tower=self.tower, runtime="onnx", recipe=recipe, quality=quality, ratio=Ratio(median=0.33, low=0.3, high=0.35), bytes_ratio=0.27,
            problem=quality.misses(self.limits),
        )
        for recipe, quality in rungs
    ]  # fmt: skip


def test_what_was_found_is_exported(settings, short_ladder, monkeypatch, tmp_path):
    monkeypatch.setattr(Search, "_timed", fast)
    monkeypatch.setattr(export.search_towers, "limits_of", lambda config: Limits(recall1_loss=0.5, centred_p1=0.2, overlap10=0.2))
    lines: list[str] = []
    report = compress(settings, lines.append)
    assert any(line.endswith("chosen") for line in lines)
    assert {found["tower"] for found in report["int8"]} == {"image", "text"}
    kept = read_precisions(settings.out)
    assert set(kept.int8) == {"image", "text"}
    assert kept.refused == {}
    assert verify_receipt(settings.out)["compress"]["int8"] == json.loads(json.dumps(report["int8"]))
    assert (settings.out / "model.safetensors").read_bytes() == (settings.checkpoint / "model.safetensors").read_bytes()
    bundle = tmp_path / "bundle"
    config = ExportConfig(checkpoint=settings.out, bundle=bundle, pairs=settings.calibrate, target="onnx", samples=64, calibration=12, golden=4)
    export_bundle(config)
    made = {artefact.tower: artefact for artefact in read_manifest(bundle).artefacts if artefact.precision == "int8"}
    assert set(made) == {"image", "text"}
    assert not any("the search" in str(artefact.reason) for artefact in made.values())
    with pytest.raises(RecipeError, match="is compressed already"):
        compress(dataclasses.replace(settings, checkpoint=settings.out, out=tmp_path / "twice"))
    lines.clear()
    assert compress(settings, lines.append)["int8"] == json.loads(json.dumps(report["int8"]))
    assert lines == [f"{settings.out} is complete"]


def test_each_runtime_gets_the_form_that_is_its_own(settings, short_ladder, monkeypatch, tmp_path):
    """Text towers: where only OpenVINO's form keeps the limits, ONNX gets none and says so; the other way round likewise."""

    def timed(self, rungs):
        points = fast(self, rungs)
        if self.tower == "image":
            return points
        grouped = dataclasses.replace(points[0], runtime="openvino", recipe=Int8Recipe(form="grouped"), problem=problems["grouped"])
        return [*(dataclasses.replace(point, problem=problems["dynamic"]) for point in points), grouped]

    monkeypatch.setattr(Search, "_timed", timed)
    monkeypatch.setattr(export.search_towers, "limits_of", lambda config: Limits(recall1_loss=0.5, centred_p1=0.2, overlap10=0.2))
    problems = {"grouped": None, "dynamic": "top-10 overlap 0.1 below 0.2"}
    compress(settings)
    kept = read_precisions(settings.out)
    assert set(kept.int8) == {"image"}
    assert set(kept.refused["text"]) == {"onnx"}
    bundle = tmp_path / "bundle"
    export_bundle(ExportConfig(checkpoint=settings.out, bundle=bundle, pairs=settings.calibrate, target="onnx", samples=64, calibration=12, golden=4))
    (refused,) = [artefact for artefact in read_manifest(bundle).artefacts if (artefact.tower, artefact.precision) == ("text", "int8")]
    assert (refused.status, refused.path) == ("refused", None)
    assert "the search found no int8 form worth having" in str(refused.reason)
    problems = {"grouped": "not faster than float32", "dynamic": None}
    other = dataclasses.replace(settings, out=tmp_path / "other")
    compress(other)
    kept = read_precisions(other.out)
    assert kept.int8["text"].form == "dynamic"
    assert kept.refused["text"] == {"openvino": "the search tried it: not faster than float32"}


def test_a_scale_for_each_group_loses_less_than_one_for_the_tensor(taught_checkpoint, many_pairs, tmp_path, short_ladder):
    """What OpenVINO's form of a text tower is for."""
    pytest.importorskip("nncf")
    points = search_of("text", taught_checkpoint, many_pairs, tmp_path / "notes.json").run()
    (grouped,) = [point for point in points if point.recipe.form == "grouped"]
    dynamic = [point for point in points if point.recipe.form == "dynamic"]
    assert grouped.runtime == "openvino"
    assert grouped.quality.centred_mean > max(point.quality.centred_mean for point in dynamic if not point.recipe.float_layers)
    assert grouped.bytes_ratio < 0.5


def test_a_student_too_small_to_gain_is_refused_with_the_reason(settings, short_ladder, tmp_path):
    """The real clock: eight bits make a pocket tower of this size slower or lose too much."""
    compress(settings)
    kept = read_precisions(settings.out)
    assert set(kept.int8) | set(kept.refused) == {"image", "text"}
    for reasons in kept.refused.values():
        assert set(reasons) <= {"onnx", "openvino"}
        assert all("the search found no int8 form worth having" in reason or "the search tried it" in reason for reason in reasons.values())
    if "image" in kept.refused:
        bundle = tmp_path / "bundle"
        export_bundle(ExportConfig(checkpoint=settings.out, bundle=bundle, pairs=settings.calibrate, target="onnx", samples=64, calibration=12, golden=4))
        (refused,) = [artefact for artefact in read_manifest(bundle).artefacts if (artefact.tower, artefact.precision) == ("image", "int8")]
        assert refused.status == "refused"
        assert "no int8 form worth having" in str(refused.reason)


def test_a_budget_that_cannot_be_met_says_the_best_and_writes_nothing(settings, short_ladder):
    with pytest.raises(RecipeError, match=r"no int8 form of the (image|text) tower keeps to the budget; the (fastest|nearest)"):
        compress(dataclasses.replace(settings, latency=0.01))
    assert not settings.out.exists()


def test_bad_input(settings, pocket_checkpoint, pairs_folder, tmp_path):
    for wrong, message in (
        ({"latency": 0.0}, "--latency is 0, expected"),
        ({"latency": 1.5}, "--latency is 1.5, expected"),
        ({"max_recall_loss": -1.0}, "--max-recall-loss is -1 points"),
        ({"judge": 5}, "--judge is 5, expected at least 64"),
        ({"calibrate": pairs_folder}, "has 48 pairs, and a search for int8 needs at least 64"),
        ({"checkpoint": pocket_checkpoint}, "untrained"),
        ({"calibrate": write_pairs(tmp_path / "one", count=1)}, "has 1 pairs"),
    ):
        with pytest.raises(RecipeError, match=message):
            compress(dataclasses.replace(settings, **wrong))
        assert not settings.out.exists()
