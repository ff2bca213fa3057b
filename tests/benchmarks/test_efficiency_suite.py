"""The learning-efficiency experiment's bookkeeping: which students are trained, and what their ranks are made into."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.suites import efficiency_worlds
from benchmarks.suites.efficiency import EfficiencyConfig, Experiment, chosen, plan
from benchmarks.suites.efficiency_arms import ARMS, FAMILIES, GRID, LADDER
from benchmarks.suites.efficiency_report import AGAINST, RATIOS, as_text, figures_of, write_pages
from benchmarks.suites.efficiency_worlds import World, copy_pairs, in_first_half
from runtime.pairs import open_pairs, write_shard
from tests.distill.world import draw

QUERIES = 40
TUNED = {family: {40_000: GRID[n], 160_000: GRID[n + 1]} for n, family in enumerate(FAMILIES)}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """All students' ranks: recall grows with samples, faster for the reinforced family, and harm costs some."""
    root = tmp_path_factory.mktemp("efficiency")
    generator = np.random.default_rng(0)
    samples = []
    for n in range(QUERIES + 8):
        meta = {"concept": f"c{n}", "style": "s", "held_out": n >= QUERIES, "slice": "main", "label": f"thing {n}", "group": "g"}
        samples.append((f"p{n:03}", {"png": draw("red", "disc", generator), "json": json.dumps(meta).encode()}))
    (root / "run/pairs/test").mkdir(parents=True)
    write_shard(root / "run/pairs/test/00000.tar", samples)
    made = Experiment(EfficiencyConfig(run=str(root / "run"), out=str(root / "out")))
    made.worlds["apart"] = World(pairs=root, stores={}, keeps={}, concepts=frozenset(f"c{n}" for n in range(0, QUERIES, 2)))
    for job in all_jobs(made.config):
        share = 0.05 * np.log2(job.samples / 5_000) * (1.5 if ARMS[job.arm].family == "reinforced" else 0.5) * (0.2 if job.arm == "shuffled_50" else 1)
        ranks = {split: np.where(generator.random(count) < share, 1, 99).tolist() for split, count in (("trained", QUERIES), ("held_out", 8))}
        folder = made.out / "runs" / job.name
        folder.mkdir(parents=True)
        (folder / "ranks.json").write_text(json.dumps({"test": ranks, "validation": ranks, "seconds": 1.0, "cuts": {"128": ranks, "512": ranks}}))
    return made


def all_jobs(config: EfficiencyConfig):
    return list(dict.fromkeys(job for jobs in plan(config, TUNED).values() for job in jobs))


def test_the_plan_asks_for_what_the_experiment_promises() -> None:
    config = EfficiencyConfig()
    jobs = all_jobs(config)
    for arm in ("plain", "reinforced"):
        for samples in config.budgets:
            assert len({job.seed for job in jobs if (job.arm, job.samples) == (arm, samples)}) >= 5
    for arm in ARMS:
        assert len({job.seed for job in jobs if job.arm == arm}) >= 3, arm
    assert {job.setting for job in jobs if job.arm == "plain" and job.samples <= 40_000} == {GRID[0]}
    assert {job.setting for job in jobs if job.arm == "reinforced" and job.samples > 40_000} == {GRID[2]}
    assert all(job.seed < 100 for job in jobs)  # the seed that settings are chosen with gives no result


def test_arms_differ_from_their_reference_in_what_their_title_says() -> None:
    setting = (64, 1e-3)
    recipes = {name: arm.recipe(setting) for name, arm in ARMS.items()}
    assert dataclasses.replace(recipes["unmatched"], matched_views=True) == recipes["reinforced"]
    assert dataclasses.replace(recipes["gated"], gate="none", gate_sharpness=2.0) == recipes["plain"]
    assert recipes["right_half"] == recipes["clean"] == recipes["plain"]
    assert recipes["augmentation"] == recipes["distillation"]
    assert (ARMS["augmentation"].store, ARMS["distillation"].store) == ("strong", "weak")
    assert dataclasses.replace(recipes["augmentation"], teachers=()) == recipes["reinforced"]
    assert dataclasses.replace(recipes["captions"], caption_mix={"raw": 1.0}) == recipes["plain_weak"] == recipes["plain"]
    assert [AGAINST[arm][0] for arm in LADDER[1:]] == list(LADDER[:-1])


def test_figures_say_what_the_ranks_say(experiment: Experiment) -> None:
    figures = figures_of(experiment, all_jobs(experiment.config), TUNED)
    rows = {(row["arm"], row["samples"]): row for row in figures["arms"]}
    row = rows["plain", 320_000]
    ranks = [json.loads((experiment.out / "runs" / job.name / "ranks.json").read_text()) for job in all_jobs(experiment.config) if (job.arm, job.samples) == ("plain", 320_000)]
    assert row["recall5_trained"] == pytest.approx(np.mean([rank <= 5 for found in ranks for rank in found["test"]["trained"]]), abs=1e-4)
    assert row["seeds"] == 5
    assert row["text_only_samples"] == 0
    assert rows["reinforced", 320_000]["text_only_samples"] > 0
    assert set(figures["ratios"]) == set(RATIOS)
    assert figures["samples_ratio_plain_over_reinforced"] == figures["ratios"]["web50"]["trained"]["median"] > 1
    assert {row["arm"] for row in figures["steps"]} == set(AGAINST)
    assert next(row for row in figures["steps"] if row["arm"] == "shuffled_50")["difference"] < 0
    assert figures["nested"]["kept_128_of_512"] == 1.0
    assert figures["same_twice"]["verdict"] == "no significant difference"


def test_half_of_the_queries_are_asked_in_the_world_apart(experiment: Experiment) -> None:
    from benchmarks.suites.efficiency_report import _asked

    hits = np.arange(QUERIES)[None] % 2 == 0
    assert _asked(experiment, hits).shape == (1, QUERIES // 2)
    assert _asked(experiment, hits).all()


def test_the_page_and_the_table(experiment: Experiment) -> None:
    figures = figures_of(experiment, all_jobs(experiment.config), TUNED)
    write_pages(experiment.out, figures, as_text(figures))
    page = (experiment.out / "report.html").read_text()
    assert "What each sample buys" in page
    assert page.count("<svg") >= 2
    assert "Every budget is a training of its own" in page
    assert "Warm-up rounds" not in page  # those are rules of latencies, and there are none here
    assert f"{figures['recall5_reinforced']:.3f}" in as_text(figures)


def test_an_experiment_that_has_only_begun_has_a_page_too(experiment: Experiment) -> None:
    some = [job for job in all_jobs(experiment.config) if job.arm in ("plain", "reinforced") and job.samples <= 40_000 and job.seed < 3]
    figures = figures_of(experiment, some, TUNED)
    assert "same_twice" not in figures
    assert not figures["steps"]
    assert as_text(figures)


def test_shuffling_deals_captions_to_other_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    facts = [json.dumps({"style": "ab"[n % 2], "concept": str(n)}).encode() for n in range(40)]
    samples = [(f"p{n:03}", {"jpg": draw("red", "disc", generator), "txt": f"caption {n}".encode(), "json": facts[n]}) for n in range(40)]
    (tmp_path / "w/pairs/train").mkdir(parents=True)
    write_shard(tmp_path / "w/pairs/train/00000.tar", samples)
    clean = World(pairs=tmp_path / "w/pairs/train", stores={}, keeps={})
    monkeypatch.setattr(efficiency_worlds, "_reinforce", lambda stages, pairs, store, teachers, seed: store)
    made = efficiency_worlds._shuffled("shuffled50", clean, tmp_path / "out", lambda line: None, 0)
    before, after = open_pairs(clean.pairs), open_pairs(made.pairs)
    assert list(after.keys) == list(before.keys)
    moved = [row for row in range(40) if after.caption(row) != before.caption(row)]
    assert len(moved) == 20
    assert sorted(after.caption(row) for row in range(40)) == sorted(before.caption(row) for row in range(40))
    assert all(after.meta(row) == before.meta(row) and after.image_bytes(row) == before.image_bytes(row) for row in range(40))


def test_the_halves_of_the_world_apart_are_halves(tmp_path: Path) -> None:
    assert 400 < sum(in_first_half(f"{n:04x}") for n in range(1000)) < 600
    generator = np.random.default_rng(2)
    (tmp_path / "a").mkdir()
    write_shard(tmp_path / "a/0.tar", [(f"p{n}", {"jpg": draw("blue", "disc", generator), "txt": b"x", "json": b'{"concept": "c"}'}) for n in range(4)])
    copy_pairs(open_pairs(tmp_path / "a"), [1, 3], tmp_path / "b")
    assert list(open_pairs(tmp_path / "b").keys) == ["p1", "p3"]


def test_a_tie_is_settled_by_the_other_budget() -> None:
    def row(samples: int, setting: tuple[int, float], recall: float) -> dict[str, object]:
        return {"family": "plain", "samples": samples, "batch_size": setting[0], "learning_rate": setting[1], "recall5_validation": recall}

    table = [row(1, setting, 0.3 if n in (1, 2) else 0.1) for n, setting in enumerate(GRID)] + [row(2, setting, 0.1 * n) for n, setting in enumerate(GRID)]
    table += [{**one, "family": "reinforced"} for one in table]
    assert chosen(table, (1, 2)) == {family: {1: GRID[2], 2: GRID[3]} for family in FAMILIES}
