"""What a recipe asks of embeddings: sets of captions, gates, nested lengths, the sigmoid form; and that a step in pieces is the whole step."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.captions import Caption
from distill.dataset import ReinforcedPairs
from distill.losses import affinity_loss, clip_loss, ensemble_basis, sigmoid_loss
from distill.objective import Taught, pair_terms, text_terms, typical_similarities
from distill.recipes import RECIPES, Recipe, load_recipe
from distill.schedule import Plan
from distill.store import open_store
from distill.train import TrainConfig, train
from distill.training_state import start
from distill.training_step import Followed, Guide, training_step
from mobileclip.checkpoint import build_tokenizer, load_checkpoint
from mobileclip.models import create_model
from mobileclip.students import student_config
from runtime.errors import RecipeError, TrainingError
from runtime.pairs import open_pairs
from runtime.preprocess import PreprocessConfig
from runtime.tokenizer import Tokenizer

from .world import make_pairs, make_store

SIZE, DIM, TEACHERS = 6, 16, (5, 9)
ALL = Recipe(contrastive=0.5, affinity=1.0, feature=2.0)


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def taught(sets: int = 1) -> Taught:
    return Taught(
        images=[unit(SIZE, dim, seed=dim) for dim in TEACHERS], texts=[unit(sets * SIZE, dim, seed=10 + dim) for dim in TEACHERS], logit_scales=(20.0, 7.0), typical=(0.1, 0.2)
    )  # fmt: skip


def basis() -> Tensor:
    return ensemble_basis([unit(50, dim, seed=20 + dim) for dim in TEACHERS], DIM).double()


def terms(recipe: Recipe, sets: int = 1, bias: Tensor | None = None, said: Taught | None = None, columns: Tensor | None = None) -> dict[str, Tensor]:
    image, text = unit(SIZE, DIM, seed=1), unit(sets * SIZE, DIM, seed=2)
    return pair_terms(image, text, torch.tensor(12.0), bias, torch.arange(sets * SIZE), said or taught(sets), recipe, basis() if columns is None else columns)


def test_two_sets_of_captions_are_the_mean_of_each_alone() -> None:
    both = terms(dataclasses.replace(ALL, caption_sets=("raw", "synthetic")), sets=2)
    image, text = unit(SIZE, DIM, seed=1), unit(2 * SIZE, DIM, seed=2)
    for name in both:
        alone = [
            pair_terms(image, text[n * SIZE :][:SIZE], torch.tensor(12.0), None, torch.arange(SIZE), taught(2).of_set(n, SIZE), ALL, basis())[name] for n in range(2)
        ]
        torch.testing.assert_close(both[name], torch.stack(alone).mean(), rtol=1e-12, atol=0)


def test_captions_together_are_matches_of_one_picture() -> None:
    recipe = dataclasses.replace(ALL, caption_sets=("raw", "synthetic"), multi_positive=True)
    together, apart = terms(recipe, sets=2), terms(dataclasses.replace(recipe, multi_positive=False), sets=2)
    assert together["contrastive"] != apart["contrastive"]
    torch.testing.assert_close(together["affinity"], apart["affinity"])
    logits = 12.0 * unit(SIZE, DIM, seed=1) @ unit(2 * SIZE, DIM, seed=2).T
    rows = -torch.stack([F.log_softmax(logits, 1)[n, [n, n + SIZE]].mean() for n in range(SIZE)]).mean()
    columns = -torch.stack([F.log_softmax(logits, 0)[m % SIZE, m] for m in range(2 * SIZE)]).mean()
    torch.testing.assert_close(together["contrastive"], (rows + columns) / 2)


def test_the_order_of_teachers_does_not_matter() -> None:
    said = taught()
    turned = Taught(images=said.images[::-1], texts=said.texts[::-1], logit_scales=said.logit_scales[::-1], typical=said.typical[::-1])
    whole = ensemble_basis([unit(50, dim, seed=20 + dim) for dim in TEACHERS], 14)  # as many as there are: only its span counts for cosines
    other = torch.cat([whole[TEACHERS[0] :], whole[: TEACHERS[0]]])
    recipe = dataclasses.replace(ALL, gate="teacher")
    for form, bias in (("softmax", None), ("sigmoid", torch.tensor(-2.0))):
        one, two = (
            pair_terms(unit(SIZE, 14, seed=1), unit(SIZE, 14, seed=2), torch.tensor(12.0), bias, torch.arange(SIZE), taught_so, dataclasses.replace(recipe, form=form), columns)
            for taught_so, columns in ((said, whole.double()), (turned, other.double()))
        )
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-9)


def test_nested_lengths_are_the_mean_of_the_cut_losses() -> None:
    found = terms(dataclasses.replace(ALL, nested_dims=(4, 16)))
    image, text = unit(SIZE, DIM, seed=1), unit(SIZE, DIM, seed=2)
    cut = [(F.normalize(image[:, :dim], dim=1), F.normalize(text[:, :dim], dim=1)) for dim in (4, 16)]
    said = taught()
    expected = torch.stack([affinity_loss(i, t, 12.0, said.images, said.texts, said.logit_scales) for i, t in cut]).mean()
    torch.testing.assert_close(found["affinity"], expected)
    torch.testing.assert_close(found["contrastive"], torch.stack([clip_loss(i, t, torch.tensor(12.0), torch.arange(SIZE)) for i, t in cut]).mean())
    target = F.normalize(torch.cat(list(said.images), 1) @ basis(), dim=1)
    assert terms(dataclasses.replace(ALL, nested_dims=(4,)))["feature"] != terms(ALL)["feature"]
    assert F.cosine_similarity(target[:, :4], F.normalize(target[:, :4], dim=1)).min() > 0.999


@pytest.mark.parametrize("who", ["own", "teacher"])
def test_a_gate_takes_weight_from_pairs_that_do_not_fit(who: str) -> None:
    recipe = dataclasses.replace(ALL, gate=who, gate_sharpness=10.0, affinity=0.0, feature=0.0)
    said = taught()
    good, bad = unit(SIZE, DIM, seed=1), unit(SIZE, DIM, seed=1).clone()
    bad[0] = -bad[0]  # this caption says the opposite
    wrong = [image.clone() for image in said.images]
    for text in wrong:
        text[0] = -text[0]
    said = dataclasses.replace(said, texts=wrong)
    gated, open_ = (
        pair_terms(good, bad, torch.tensor(12.0), None, torch.arange(SIZE), said, one, None)["contrastive"] for one in (recipe, dataclasses.replace(recipe, gate="none"))
    )
    assert gated < 0.6 * open_


def test_the_sigmoid_form_takes_the_models_bias() -> None:
    bias = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    found = terms(dataclasses.replace(ALL, form="sigmoid"), bias=bias)
    expected = sigmoid_loss(unit(SIZE, DIM, seed=1), unit(SIZE, DIM, seed=2), 12.0, bias, torch.arange(SIZE))
    torch.testing.assert_close(found["contrastive"], expected)
    (found["contrastive"] + found["affinity"]).backward()
    assert bias.grad is not None
    assert float(bias.grad) != 0


def test_texts_alone_follow_the_ensemble() -> None:
    target = F.normalize(torch.cat(list(taught().texts), 1) @ basis(), dim=1)
    assert float(text_terms(target, taught(), ALL, basis())["feature"]) == pytest.approx(0, abs=1e-12)


# ---------------------------------------------------------------- in a run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("objective")
    make_pairs(root / "pairs")
    make_store(root / "store", root / "pairs", more=lambda row, caption: [Caption(text=f"so {caption}", type="synthetic", source="captioner")])
    build_tokenizer(8192, root / "tokenizer.json")
    return root


def dataset(world: Path, **changes: object) -> ReinforcedPairs:
    tokenizer = Tokenizer.open(world / "tokenizer.json", context_length=20, cleaning="clip", pad_id=0)
    config = PreprocessConfig(image_size=64, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bilinear")
    return ReinforcedPairs(open_pairs(world / "pairs"), open_store(world / "store"), config, tokenizer, seed=0, teachers=(0, 1), **changes)  # type: ignore[arg-type]


def test_a_batch_of_two_sets_holds_both_captions_of_the_same_pictures(world: Path) -> None:
    data = dataset(world, caption_sets=("raw", "synthetic"))
    batch = data.batch(0, 8)
    assert batch.tokens.shape[0] == 16
    assert batch.teacher_texts[0].shape[0] == 16
    assert batch.captions.shape == (8, 2)
    np.testing.assert_array_equal(batch.captions, [[0, 2]] * 8)
    one = dataset(world, caption_sets=("synthetic",)).batch(0, 8)
    width = one.tokens.shape[1]
    np.testing.assert_array_equal(batch.tokens[8:, :width], one.tokens)
    np.testing.assert_array_equal(batch.pixels, one.pixels)
    with pytest.raises(TrainingError, match="no caption of type fused"):
        dataset(world, caption_sets=("raw", "fused"))


def test_unmatched_views_are_another_stored_view(world: Path) -> None:
    data, other = dataset(world), dataset(world, matched_views=False)
    one, two = data.batch(0, 8), other.batch(0, 8)
    np.testing.assert_array_equal(one.pixels, two.pixels)
    expected = data.store.image_embeddings(0, one.rows, (one.augs + 1) % 2)
    np.testing.assert_array_equal(two.teacher_images[0], expected)


@pytest.mark.parametrize(
    "changes", [{"caption_sets": ("raw", "synthetic")}, {"caption_sets": ("raw", "synthetic"), "multi_positive": True}, {"form": "sigmoid"}, {"gate": "teacher"}]
)
@pytest.mark.parametrize("text_only", [False, True])
def test_a_step_in_ghost_batches_has_the_gradient_of_the_whole(world: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], text_only: bool) -> None:
    """Without BatchNorm's statistics of the batch (the model stays in eval mode), pieces are the whole."""
    recipe = dataclasses.replace(ALL, batch_size=8, text_samples=16 if text_only else 0, **changes)  # type: ignore[arg-type]
    config = student_config("pocket_s")
    if recipe.form == "sigmoid":
        config = dataclasses.replace(config, logit_bias=-10.0, logit_scale=10.0)
    data = dataset(world, caption_sets=recipe.caption_sets)
    batch = data.batch(0, 8, pictures=not text_only)
    gradients = []
    for ghost in (0, 2):
        torch.manual_seed(0)
        model = create_model(config).eval()
        monkeypatch.setattr(model, "train", lambda mode=True: None)
        run = start(model, recipe)
        typical = typical_similarities(data.store, data.rows, (0, 1))
        columns = ensemble_basis([torch.from_numpy(data.store.image_embeddings(k, data.rows, np.zeros_like(data.rows))) for k in (0, 1)], 256)
        guide = Guide(followed=Followed(numbers=(0, 1), logit_scales=(20.0, 20.0)), basis=columns, typical=typical)
        found = training_step(run, Plan.of(320, recipe), dataclasses.replace(recipe, ghost_batch=ghost), batch, guide)
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None} | {f"loss.{k}": v for k, v in found.items()})
    whole, pieces = gradients
    assert whole.keys() == pieces.keys()
    assert any("text" in name for name in whole)
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name], rtol=1e-3, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("changes", [{"caption_sets": ["raw", "synthetic"], "multi_positive": True, "nested_dims": [64, 256]}, {"form": "sigmoid", "gate": "own"}])
def test_recipes_of_these_train(world: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    recipe = {**dataclasses.asdict(RECIPES["reinforced"]()), "batch_size": 8, "text_samples": 16, "learning_rate": 3e-3, **changes}
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    out = train(TrainConfig(pairs=str(world / "pairs"), store=str(world / "store"), out=str(tmp_path / "out"), recipe=str(tmp_path / "r.json"), samples=640))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    pairs = [line for line in lines if line["phase"] == "pairs"]
    assert pairs[-1]["loss_terms"]["feature"] < 0.7 * pairs[0]["loss_terms"]["feature"]
    model = load_checkpoint(out)
    assert (model.logit_bias is not None) == ("form" in changes)
    if "form" in changes:
        assert float(model.logit_bias.detach()) != -10.0
        with pytest.raises(RecipeError, match="was trained with the sigmoid loss and the recipe's form is softmax"):
            train(TrainConfig(pairs=str(world / "pairs"), store=str(world / "store"), out=str(tmp_path / "on"), recipe="plain", init=str(out), samples=128))


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"form": "hinge"}', "one of softmax, sigmoid"), ('{"caption_sets": ["raw", "raw"]}', "different types"), ('{"caption_sets": ["none"]}', "different types"),
     ('{"multi_positive": true}', "at least two caption_sets"), ('{"gate": "me"}', "one of none, teacher, own"), ('{"gate_sharpness": 0}', "above 0"),
     ('{"nested_dims": [64, 32]}', "rising order"), ('{"nested_dims": [0]}', "rising order")],
)  # fmt: skip
def test_bad_recipes(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(tmp_path / "r.json"))
