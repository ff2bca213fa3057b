"""The pilot: real, very small students on a tiny world; what it chooses, that it goes on, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil

import numpy as np
import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import pilot_arms, pilot_costs
from distill import train as train_module
from distill.pilot import PilotConfig, main, pilot
from distill.pilot_arms import Arm, distillation_of, weigh
from distill.pilot_costs import Setting, cost
from distill.pilot_decisions import Candidate, behind, crossed_interval, decide
from distill.pilot_report import table
from distill.pilot_subset import choose, subset_size, write_subset
from distill.recipes import RECIPES, load_recipe
from distill.reinforce import ReinforceConfig, reinforce
from distill.store import open_store
from distill.train import TrainConfig
from mobileclip.presets import PRESETS
from runtime.errors import PairsError, RecipeError, StoreError
from runtime.pairs import open_pairs, write_shard

from .pilot_world import make_split

HERE = "tests.distill.pilot_world"


# ---------------------------------------------------------------- which pairs


@settings(max_examples=30, deadline=None)
@given(st.sets(st.text(min_size=1, max_size=8), min_size=1, max_size=60), st.data())
def test_a_larger_share_contains_the_smaller_whatever_the_order(keys, data):
    keys = list(keys)
    small, large = sorted(data.draw(st.tuples(*[st.integers(0, len(keys))] * 2)))
    few, many = choose(keys, small), choose(keys, large)
    assert len(few) == small
    assert set(few) <= set(many)
    assert few == sorted(few)
    turned = data.draw(st.permutations(keys))
    assert {turned[row] for row in choose(turned, small)} == {keys[row] for row in few}


def test_the_share_is_spread_evenly():
    chosen = np.array(choose([f"{n:08}" for n in range(20_000)], 2_000))
    assert abs((chosen < 10_000).mean() - 0.5) < 0.04


@pytest.mark.parametrize(("total", "fraction", "count", "size"), [(1000, 0.1, None, 100), (1001, 0.1, None, 101), (1000, 0.01, 300, 300), (100, 1.0, None, 100)])
def test_sizes_of_the_share(total, fraction, count, size):
    assert subset_size(total, fraction, count, 10) == size


# ---------------------------------------------------------------- how it decides


def test_the_interval_of_one_seed_is_the_bootstrap_over_queries():
    values = np.random.default_rng(0).random(400) < 0.3
    low, high = crossed_interval(values[None].astype(float))
    assert high - low == pytest.approx(2 * 1.96 * (0.3 * 0.7 / 400) ** 0.5, rel=0.15)


def test_the_interval_covers_what_seeds_and_queries_vary():
    """Differences with a part that belongs to the query, one that belongs to the seed, and one of both; the truth is 0."""
    rng, covered = np.random.default_rng(1), {3: 0, 8: 0}
    for seeds in covered:
        for _ in range(150):
            values = 0.02 * rng.standard_normal((seeds, 1)) + 0.5 * rng.standard_normal((1, 200)) + 0.3 * rng.standard_normal((seeds, 200))
            low, high = crossed_interval(values, 0.95, draws=300)
            covered[seeds] += low <= 0 <= high
    assert covered[3] / 150 > 0.85
    assert covered[8] / 150 > 0.9


def test_seeds_that_disagree_widen_the_interval():
    calm = np.tile(np.arange(100) % 4 == 0, (3, 1)).astype(float)
    wild = np.stack([np.zeros(100), np.full(100, 0.25), np.full(100, 0.5)])
    assert np.ptp(crossed_interval(wild)) > 2 * np.ptp(crossed_interval(calm))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 30))
def test_the_interval_holds_the_mean_and_is_the_same_every_time(seed, seeds, queries):
    values = np.random.default_rng(seed).random((seeds, queries))
    low, high = crossed_interval(values, 0.95, draws=200)
    assert low - 0.05 <= values.mean() <= high + 0.05
    assert (low, high) == crossed_interval(values, 0.95, draws=200)


@pytest.mark.parametrize(("values", "level"), [(np.zeros((0, 3)), 0.9), (np.zeros(3), 0.9), (np.zeros((1, 3)), 1.0)])
def test_an_interval_of_nothing_is_refused(values, level):
    with pytest.raises(ValueError, match="values have shape|level is"):
        crossed_interval(values, level)


def answers(*shares: float, queries: int = 400, seeds: int = 3) -> dict[str, np.ndarray]:
    """Candidates "0", "1", … that answer the first share of the same queries."""
    return {str(n): np.tile(np.arange(queries) < share * queries, (seeds, 1)) for n, share in enumerate(shares)}


def test_no_difference_keeps_the_cheaper():
    candidates = [Candidate(name="0", cost=3, kept=True), Candidate(name="1", cost=2), Candidate(name="2", cost=1)]
    verdict = decide(candidates, answers(0.5, 0.4975, 0.3))
    assert (verdict.chosen, verdict.best) == ("1", "0")
    assert "no difference from the best (0) seen" in verdict.reason
    assert [row["behind"] for row in verdict.rows] == [False, False, True]


def test_a_dearer_choice_must_be_better():
    candidates = [Candidate(name="0", cost=1, kept=True), Candidate(name="1", cost=2)]
    assert decide(candidates, answers(0.5, 0.51, queries=100)).chosen == "0"
    verdict = decide(candidates, answers(0.5, 0.6, queries=100))
    assert verdict.chosen == "1"
    assert "the highest recall; the nearest (0) is behind by +0.1" in verdict.reason


def test_a_wide_interval_is_no_permission():
    """Two seeds that disagree: nothing is shown, and still half of the recall is not given away for a lower cost."""
    queries = np.arange(60)
    hits = {"dear": np.stack([queries < 30, queries < 30]), "cheap": np.stack([queries < 30, queries < 2])}
    candidates = [Candidate(name="dear", cost=2), Candidate(name="cheap", cost=1)]
    verdict = decide(candidates, hits)
    assert verdict.chosen == "dear"
    assert [(row["behind"], row["open"]) for row in verdict.rows] == [(False, False), (False, True)]
    assert "open, for want of seeds or pairs: cheap" in verdict.reason
    assert decide(candidates, hits, tolerance=0.5).chosen == "cheap"


def test_at_equal_cost_what_was_set_stays_unless_it_is_behind():
    candidates = [Candidate(name="0"), Candidate(name="1", kept=True), Candidate(name="2")]
    assert decide(candidates, answers(0.502, 0.5, 0.4)).chosen == "1"
    assert decide(candidates, answers(0.6, 0.5, 0.4)).chosen == "0"


def test_candidates_of_fewer_seeds_are_compared_on_the_seeds_of_both():
    hits = answers(0.5, 0.3)
    hits["1"] = hits["1"][:2]
    verdict = decide([Candidate(name="0"), Candidate(name="1")], hits)
    assert [row["seeds"] for row in verdict.rows] == [3, 2]
    assert behind(hits["0"], hits["1"], 0.95)


# ---------------------------------------------------------------- what an arm is


def test_lambda_keeps_the_sum_of_the_weights_and_the_proportions_of_the_distillation():
    base = RECIPES["reinforced"]()
    own = distillation_of(base)
    assert weigh(base, own) is base
    for value in (0.25, 1.0):
        made = weigh(base, value)
        assert made.contrastive + made.affinity + made.feature == pytest.approx(base.contrastive + base.affinity + base.feature)
        assert distillation_of(made) == value
        assert made.feature / made.affinity == pytest.approx(base.feature / base.affinity)
    plain = weigh(base, 0.0)
    assert not plain.reinforced
    with pytest.raises(RecipeError, match="follows no teacher"):
        distillation_of(RECIPES["plain"]())


def test_an_arm_becomes_a_recipe_and_a_name():
    arm = Arm(teachers=("a",), logit_scales=(20.0,), distillation=0.5, augmentations=2, captions=(("raw", 1.0),))
    recipe = arm.recipe(RECIPES["reinforced"]())
    assert (recipe.teachers, recipe.logit_scales, recipe.max_augmentations, recipe.caption_mix) == (("a",), (20.0,), 2, {"raw": 1.0})
    others = [dataclasses.replace(arm, **change) for change in ({"teachers": ("b",)}, {"distillation": 0.75}, {"captions": ()}, {"augmentations": 1})]
    assert len({one.identity for one in [arm, *others]}) == 5
    assert arm.identity == dataclasses.replace(arm).identity


# ---------------------------------------------------------------- whole pilots


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """A student of a few thousand weights, and no progress lines."""
    with pytest.MonkeyPatch.context() as patch:
        base = PRESETS["pocket_s"]
        patch.setitem(PRESETS, "tiny", dataclasses.replace(
            base, name="tiny", image=dataclasses.replace(base.image, image_size=32, backbone_args={"dims": [16, 32, 64], "depths": [0, 1, 1], "mlp_ratio": 2.0}),
            text=dataclasses.replace(base.text, width=64, heads=2, layers=1, vocab_size=514), embed_dim=32,
        ))  # fmt: skip
        patch.setenv("MCLIP_PROGRESS", "0")
        patch.setattr(pilot_costs, "MEASURED_SECONDS", 0.01)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("pilot")
    make_split(root / "pairs", "t", copies=8, seed=0)
    make_split(root / "validation", "v", copies=6, seed=1)
    recipe = dataclasses.replace(RECIPES["reinforced"](), batch_size=16, text_samples=32, learning_rate=5e-3, contrastive=0.02)
    (root / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe)))
    return root


def config(world, out, **changes) -> PilotConfig:
    base = PilotConfig(
        source=str(world / "pairs"), out=str(out), teachers=(f"{HERE}:colours", f"{HERE}:noise"), validation=str(world / "validation"), fraction=0.75,
        model="tiny", recipe=str(world / "recipe.json"), samples=480, seeds=2, augmentations=(1, 2), scales=(), distillation=(), templates=(),
        direction="image_to_text", k=3, workers=1,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def done(world):
    return pilot(config(world, world / "out"))


def without_times(found):
    """What two pilots of the same settings have in common."""
    timed = ("seconds", "core_seconds", "train_seconds", "evaluate_seconds", "costs", "commands")
    if isinstance(found, dict):
        return {name: without_times(value) for name, value in found.items() if name not in timed}
    return [without_times(value) for value in found] if isinstance(found, (list, tuple)) else found


def decision(found, factor):
    return next(one for one in found["decisions"] if one["factor"] == factor)


def test_a_useless_teacher_is_dropped_and_a_good_one_kept(done):
    teachers = decision(done, "teachers")
    rows = {row["name"]: row for row in teachers["candidates"]}
    assert set(rows) == {"colours", "noise", "colours+noise"}
    assert teachers["chosen"] == "colours"
    assert rows["noise"]["behind"]
    assert rows["noise"]["recall"]["value"] < 0.5 < rows["colours"]["recall"]["value"]  # 1 in 4 by chance, all who knows the colour
    assert done["setting"]["teachers"] == ("colours",)
    gain = decision(done, "no teacher")["gain"]
    assert gain["low"] <= gain["value"] <= gain["high"]


def test_every_arm_of_a_seed_sees_the_same_and_is_on_record(world, done):
    assert done["subset"]["pairs"] == 72
    assert set(open_store(world / "out" / "store").keys) == {open_pairs(world / "pairs").keys[row] for row in choose(open_pairs(world / "pairs").keys, 72)}
    for name, arm in done["arms"].items():
        folders = sorted((world / "out" / "arms" / name).glob("seed-*"))
        assert [folder.name for folder in folders] == [f"seed-{run['seed']}" for run in arm["seeds"]]
        for folder, run in zip(folders, arm["seeds"], strict=True):
            receipt = json.loads((folder / "receipt.json").read_text())
            assert (receipt["config"]["seed"], receipt["config"]["samples"]) == (run["seed"], 480)
            assert receipt["recipe"]["teachers"] == list(arm["teachers"])
            ranks = json.loads((folder / "result.json").read_text())["ranks"]["image_to_text"]["all"]
            assert np.mean(np.array(ranks) <= 3) == run["recall"]
            assert not (folder / "model.safetensors").exists()


def test_what_it_writes_is_what_the_other_commands_read(world, done, capsys):
    recipe = load_recipe(str(world / "out" / "recipe.json"))
    assert dataclasses.asdict(recipe) == json.loads(json.dumps(done["recipe"]), object_hook=lambda o: {k: tuple(v) if isinstance(v, list) else v for k, v in o.items()})
    assert (recipe.teachers, recipe.max_augmentations) == (("colours",), done["setting"]["augmentations"])
    words = shlex.split(done["commands"]["reinforce"])
    parsed = tyro.cli(ReinforceConfig, args=words[2:])
    assert words[:2] == ["mclip", "reinforce"]
    assert (parsed.teachers, parsed.augmentations, parsed.templates, parsed.dtype) == ((f"{HERE}:colours",), done["setting"]["augmentations"], (), "int8")
    words = shlex.split(done["commands"]["train"])
    assert tyro.cli(TrainConfig, args=words[2:]).resolved_recipe() == recipe
    assert main([str(world / "pairs"), str(world / "out"), *flags(world)]) == 0  # nothing is left to do
    shown = capsys.readouterr().out
    assert "72 of 96 pairs, student tiny, 480 samples a run, 2 seeds; image_to_text recall@3, split all of 72 queries, by chance 0.2500" in shown
    assert done["commands"]["reinforce"] in shown
    assert main([str(world / "pairs"), str(world / "out"), *flags(world), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["setting"]["teachers"] == ["colours"]


def flags(world) -> list[str]:
    made = config(world, "")
    return [
        "--teachers", *made.teachers, "--validation", made.validation, "--fraction", "0.75", "--model", "tiny", "--recipe", made.recipe, "--samples", "480", "--seeds", "2",
        "--augmentations", "1", "2", "--scales", "--distillation", "--templates", "--direction", "image_to_text", "--k", "3", "--workers", "1",
    ]  # fmt: skip


def test_an_interrupted_pilot_goes_on_to_the_same_decisions(world, done, tmp_path, monkeypatch):
    """The last arm is taken away and made again, with an interruption in the middle of its second run."""
    out = tmp_path / "out"
    shutil.copytree(world / "out", out)
    shutil.rmtree(out / "arms" / list(done["arms"])[-1])
    (out / "pilot.json").unlink()
    real, steps = train_module._step, []

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 40:  # of about 30 a run
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train_module, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pilot(config(world, out))
    assert not (out / "pilot.json").exists()
    monkeypatch.setattr(train_module, "_step", real)
    again = pilot(config(world, out))
    assert without_times(again) == without_times(done)
    assert json.loads((out / "pilot.json").read_text()) == json.loads(json.dumps(again))


def test_a_finished_pilot_trains_nothing(world, done, monkeypatch):
    monkeypatch.setattr(pilot_arms, "train", lambda settings: pytest.fail("trained again"))
    assert without_times(pilot(config(world, world / "out"))) == without_times(done)


def test_the_budget_ends_a_pilot_between_runs(world, done, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(world / "out", out)
    shutil.rmtree(out / "arms" / list(done["arms"])[-2])
    found = pilot(config(world, out, budget_minutes=0.001))
    assert not found["complete"]
    assert decision(found, "teachers") == decision(done, "teachers")
    assert decision(found, "augmentations")["reason"] == "not decided: the budget ended; what was set is kept"
    assert found["setting"]["augmentations"] == 2
    assert "the budget ended before all was decided" in table(found)


@pytest.mark.slow
def test_the_highest_cosine_can_belong_to_a_teacher_that_says_little(world, tmp_path):
    found = pilot(config(world, tmp_path / "out", teachers=(f"{HERE}:colours", f"{HERE}:warm"), augmentations=(1,)))
    teachers = decision(found, "teachers")
    rows = {row["name"]: row for row in teachers["candidates"]}
    assert "colours" in teachers["chosen"]
    assert teachers["highest_cosine"] == "warm"
    assert rows["warm"]["behind"]
    assert "cosine to the teacher would have chosen warm: recall" in table(found)


@pytest.mark.slow
def test_every_factor_is_tried_and_more_seeds_go_on(world, tmp_path):
    """Scales, λ and captions made elsewhere; then the same pilot with a second seed."""
    with open(tmp_path / "made.jsonl", "w") as file:
        for key in open_pairs(world / "pairs").keys:
            file.write(json.dumps({"key": key, "captions": [{"text": f"something like {key[:2]}"}]}) + "\n")
    wide = config(
        world, tmp_path / "out", captions=str(tmp_path / "made.jsonl"), templates=("drawing",), scales=(2.0,), distillation=(0.5,), seeds=1, augmentations=(1, 2), samples=160,
    )  # fmt: skip
    first = pilot(wide)
    tried = {one["factor"]: {row["name"] for row in one["candidates"]} for one in first["decisions"]}
    assert tried["captions"] == {"any stored", "raw", "half raw, half template", "half raw, half synthetic"}
    assert tried["λ"] == {"0.5", f"{distillation_of(load_recipe(wide.recipe)):g}"}
    assert {"10", "20"} in [names for factor, names in tried.items() if factor.startswith("logit scale of")]
    assert first["costs"]["largest"]["captions"] == 3
    hits = {name: [run["recall"] for run in arm["seeds"]] for name, arm in first["arms"].items()}
    second = pilot(dataclasses.replace(wide, seeds=2))
    start = second["arms"][first["start"]]
    assert [run["seed"] for run in start["seeds"]] == [0, 1]
    assert start["seeds"][0]["recall"] == hits[first["start"]][0]
    words = shlex.split(second["commands"]["reinforce"])
    assert ("--captions" in words) == (not second["setting"]["captions"] or "synthetic" in second["setting"]["captions"])


def test_costs_foretell_the_size_of_the_store_that_is_chosen(world, done, tmp_path):
    chosen = done["costs"]["chosen"]
    index = reinforce(ReinforceConfig(
        pairs=str(world / "out" / "pairs"), store=str(tmp_path / "store"), teachers=(f"{HERE}:colours",), augmentations=chosen["augmentations"], templates=(), workers=1,
    ))  # fmt: skip
    made = sum(part["bytes"] for part in index["parts"]) / index["rows"]
    assert chosen["bytes_per_pair"] == pytest.approx(made, rel=0.35)  # headers weigh much in a store of 72 rows
    largest = done["costs"]["largest"]
    assert largest["bytes_per_pair"] * 72 == pytest.approx(sum(part["bytes"] for part in open_store(world / "out" / "store").index["parts"]), rel=1e-6)
    assert done["costs"]["saved"]["bytes"] == largest["bytes"] - chosen["bytes"]
    assert (largest["pairs"], largest["augmentations"]) == (96, 2)


def test_the_formula_of_the_costs():
    seconds = {
        "decode": 1.0, "draw": {"24": 0.5, "32": 0.25},
        "teachers": {"a": {"view": 2.0, "text": 3.0, "trunk": "t", "image_size": 24}, "b": {"view": 4.0, "text": 3.0, "trunk": "t", "image_size": 24}},
    }  # fmt: skip
    sizes = {"row": 10.0, "parameters": 16.0, "caption": 60.0, "image": {"a": 8.0, "b": 4.0}, "text": {"a": 8.0, "b": 4.0}}
    both = cost(Setting(teachers=("a", "b"), augmentations=5, captions=2), seconds, sizes, 1000)
    assert both["seconds_per_pair"] == 1 + 5 * (0.5 + 2 + 4) + 2 * 3  # one size is drawn once, one text trunk runs once
    assert both["bytes_per_pair"] == 10 + 5 * (16 + 12) + 2 * (60 + 12)
    one = cost(Setting(teachers=("b",), augmentations=1, captions=1), seconds, sizes, 1000)
    assert (one["seconds"], one["bytes"]) == (1000 * (1 + 4.5 + 3), 1000 * (10 + 20 + 64))


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teachers": ()}, RecipeError, "a pilot needs at least one teacher"),
        ({"teachers": (f"{HERE}:noise", f"{HERE}:noise")}, RecipeError, "twice"),
        ({"fraction": 0.01}, PairsError, r"1 % of 96 pairs are 1, too few for a pilot, which needs 64 \(four batches\); give --pairs 64 or more"),
        ({"pairs": 97}, PairsError, "asks for 97 pairs and the folder holds 96"),
        ({"fraction": 0.0}, RecipeError, "must be above 0"),
        ({"split": "keycap"}, RecipeError, "no split 'keycap'; they have held_out, trained, all"),
        ({"distillation": (0.0,)}, RecipeError, "distillation"),
        ({"augmentations": ()}, RecipeError, "at least one number"),
        ({"recipe": "plain"}, RecipeError, "follows no teacher"),
        ({"samples": 8}, RecipeError, "less than one batch"),
        ({"validation": "no/such"}, PairsError, "does not exist"),
        ({"teachers": ("no-teacher",)}, RecipeError, "no checkpoint folder"),
    ],
)
def test_bad_settings_are_one_sentence(world, tmp_path, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        pilot(config(world, tmp_path / "out", **changes))
    assert "\n" not in str(caught.value)


def test_validation_pairs_that_were_trained_on_are_refused(world, tmp_path):
    make_split(tmp_path / "mixed", "x", copies=1, seed=5)
    shutil.copy(world / "pairs" / "t-00003.tar", tmp_path / "mixed" / "t-00003.tar")
    with pytest.raises(PairsError, match="the validation pairs share 12 of their 24 keys with the training pairs, the first 't3-00'"):
        pilot(config(world, tmp_path / "out", validation=str(tmp_path / "mixed")))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(world, done, tmp_path):
    with pytest.raises(StoreError, match="holds a pilot with other samples; give another folder"):
        pilot(config(world, world / "out", samples=960))
    (tmp_path / "diary.txt").write_text("dear diary")
    with pytest.raises(StoreError, match="is no pilot but holds diary.txt"):
        pilot(config(world, tmp_path))
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.name != ".lock") == ["diary.txt"]


def test_pairs_without_a_caption_are_left_out_and_told(tmp_path):
    make_split(tmp_path / "pairs", "t", copies=1, seed=0)
    pairs = open_pairs(tmp_path / "pairs")
    write_shard(tmp_path / "pairs" / "u.tar", [("mute", {"png": pairs.image_bytes(0)}), ("odd", {"png": pairs.image_bytes(0), "txt": b"\xff\xfe"})])
    pairs = open_pairs(tmp_path / "pairs")
    facts = write_subset(pairs, range(len(pairs)), tmp_path / "subset")
    assert facts["pairs"] == 12
    assert [entry["key"] for entry in facts["left_out"]] == ["mute", "odd"]
    made = open_pairs(tmp_path / "subset")
    assert [(made.caption(row), made.image_bytes(row), made.meta(row)) for row in range(12)] == [(pairs.caption(row), pairs.image_bytes(row), pairs.meta(row)) for row in range(12)]
    assert write_subset(pairs, range(len(pairs)), tmp_path / "subset") == facts
