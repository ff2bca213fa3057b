"""kill -9 at random moments, by the function that the benchmark calls, with fewer kills."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.suites.kills import KillsConfig, kill_runs
from distill.store import open_store
from tests.distill.test_reinforce import ROOT, make_pairs

SLOW = "tests.distill.tiny_teachers:slow"


def run(tmp_path: Path, engine: str, workers: int, kills: int, monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setenv("TINY_DELAY", "0.05")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pairs = make_pairs(tmp_path / "pairs", (15, 12), damage=True)
    found = kill_runs(KillsConfig(pairs=str(pairs), out=str(tmp_path / "out"), teachers=(SLOW,), kills=kills, engine=engine, workers=workers, part_rows=3))
    assert found["kills"] == kills
    assert len(open_store(tmp_path / "out/killed", verify=True)) == 25
    assert not [path.name for path in (tmp_path / "out/killed").iterdir() if path.name.startswith(".") and path.name != ".lock"]
    return found


def test_killed_at_random_it_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(tmp_path, "local", 2, 3, monkeypatch)
    assert found["equal"], (found["expected"], found["found"])


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "workers"), [("local", 1), ("local", 4), ("ray", 1), ("ray", 2), ("ray", 4)])
def test_killed_at_random_with_any_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, workers: int) -> None:
    if engine == "ray":
        pytest.importorskip("ray")
    assert run(tmp_path, engine, workers, 5, monkeypatch)["equal"]
