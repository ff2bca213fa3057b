"""Engines: the same answers and the same store wherever tasks run, errors as they were raised, and workers that are lost."""

from __future__ import annotations

import builtins
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill import engines
from distill.engines import open_engine, run
from distill.ray_engine import RayEngine
from distill.reinforce import reinforce
from distill.store import open_store
from runtime.errors import MissingExtraError, StoreError
from tests.distill.test_reinforce import config, make_pairs, part_hashes

FICKLE = "tests.distill.tiny_teachers:fickle"


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCLIP_PROGRESS", "0")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray of two processors that these tests share; the engine uses one that runs."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


def start(offset: int) -> None:
    os.environ["ENGINE_TEST"] = str(offset)


def shifted(n: int) -> int:
    if n == 13:
        raise StoreError("thirteen is refused; give another number")
    return n + int(os.environ["ENGINE_TEST"])


def dies_once(folder: str) -> int:
    """Kills its own process the first time it is called."""
    mark = Path(folder) / "died"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return shifted(1)


def dies(folder: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("name", "workers"), [("local", 0), ("local", 2), ("ray", 1), ("ray", 2)])
def test_every_task_is_answered_and_errors_arrive_as_they_were_raised(name: engines.EngineName, workers: int, request: pytest.FixtureRequest) -> None:
    if name == "ray":
        request.getfixturevalue("cluster")
    with open_engine(name, workers, start, 100) as engine:
        assert sorted(run(engine, shifted, iter(range(7)))) == [(n, n + 100) for n in range(7)]
        with pytest.raises(StoreError, match=r"^thirteen is refused; give another number$"):
            list(run(engine, shifted, [1, 13]))


def test_tasks_are_drawn_as_workers_become_free() -> None:
    drawn = []

    def tasks() -> Iterator[int]:
        for n in range(10):
            drawn.append(n)
            yield n

    with open_engine("local", 0, start, 0) as engine:
        answers = run(engine, shifted, tasks())
        next(answers)
        assert len(drawn) <= 3


def test_relative_paths_mean_on_a_running_cluster_what_they_mean_here(tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the cluster was started somewhere else
    with open_engine("ray", 1, start, 0) as engine:
        assert engine.submit(os.getcwd).result() == str(tmp_path)


def test_a_lost_ray_worker_is_replaced_and_its_task_repeated(tmp_path: Path, cluster: Any) -> None:
    with open_engine("ray", 1, start, 5) as engine:
        assert list(run(engine, dies_once, [str(tmp_path)])) == [(str(tmp_path), 6)]
    assert (tmp_path / "died").exists()


def test_a_local_worker_that_dies_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="a worker process died"), open_engine("local", 1, start, 5) as engine:
        list(run(engine, dies, [str(tmp_path)]))


def test_a_ray_worker_that_dies_again_and_again_is_one_sentence(tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.ray_engine.RESTARTS", 1)
    with pytest.raises(StoreError, match="a Ray worker was lost 2 times"), open_engine("ray", 1, start, 5) as engine:
        list(run(engine, dies, [str(tmp_path)]))


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def absent(name: str, *args: object, **kwargs: object) -> object:
        if name == "ray":
            raise ImportError(name)
        return original(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingExtraError, match=r"mobileclip-edge\[ray\]"), open_engine("ray", 1, start, 0):
        pass


# ---------------------------------------------------------------- the same store everywhere


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("reference")
    pairs = make_pairs(folder / "pairs", (7, 5, 3), damage=True)
    reinforce(config(pairs, folder / "store", teachers=(FICKLE,), workers=0))
    return pairs, part_hashes(folder / "store")


@pytest.mark.parametrize(
    "changes",
    [{"workers": 2}, {"workers": 4}, {"workers": 1, "decode_threads": 3}, {"workers": 0, "texts": "part"}, {"workers": 0, "decode_threads": 2}],
    ids=str,
)
def test_parts_do_not_depend_on_workers_threads_or_where_texts_are_embedded(reference: tuple[Path, dict[str, str]], tmp_path: Path, changes: dict) -> None:
    reinforce(config(reference[0], tmp_path, teachers=(FICKLE,), **changes))
    assert part_hashes(tmp_path) == reference[1]


def test_parts_do_not_depend_on_where_pairs_and_store_lie(reference: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    pairs = shutil.copytree(reference[0], tmp_path / "moved")
    reinforce(config(Path(pairs), tmp_path / "elsewhere", teachers=(FICKLE,), workers=0))
    assert part_hashes(tmp_path / "elsewhere") == reference[1]


def test_parts_do_not_depend_on_the_engine(reference: tuple[Path, dict[str, str]], tmp_path: Path, cluster: Any) -> None:
    index = reinforce(config(reference[0], tmp_path, teachers=(FICKLE,), engine="ray", workers=2))
    assert part_hashes(tmp_path) == reference[1]
    assert index["figures"]["engine"] == "ray"


def test_a_killed_ray_worker_costs_nothing(reference: tuple[Path, dict[str, str]], tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One actor's process is killed while it works on a part."""
    original, killed = RayEngine.submit, []

    def submit(self: RayEngine, function: object, *arguments: object) -> object:
        future = original(self, function, *arguments)  # type: ignore[arg-type]
        if getattr(function, "__name__", "") == "embed_part" and not killed:
            pids = cluster.get([actor.call.remote(os.getpid, ()) for actor in self._actors])
            killed.append(pids[0])
            os.kill(pids[0], signal.SIGKILL)
            time.sleep(0.1)
        return future

    monkeypatch.setattr(RayEngine, "submit", submit)
    reinforce(config(reference[0], tmp_path, teachers=(FICKLE,), engine="ray", workers=2))
    assert killed
    assert part_hashes(tmp_path) == reference[1]
    assert len(open_store(tmp_path, verify=True)) == 13


def test_a_cluster_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    if ray.is_initialized():
        ray.shutdown()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(ray, "init", lambda address, **_: (_ for _ in ()).throw(ConnectionError(f"nobody at {address}")))
    with pytest.raises(StoreError, match="no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1"), open_engine("ray", 1, start, 0) as engine:
        engine.submit(shifted, 1)
