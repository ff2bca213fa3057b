"""Modes on functions whose behaviour is known, energy counters on files as the kernel lays them out, profiles as ONNX Runtime writes them."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.energy import open_meter
from benchmarks.measure import MeasureError
from benchmarks.modes import ModePlan, run_mode
from benchmarks.op_profile import read_profile


def busy(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_a_throttling_device_shows_in_a_sustained_run() -> None:
    calls = 0

    def throttling(turn: int) -> None:
        nonlocal calls
        calls += 1
        busy(0.001 if calls < 150 else 0.002)  # by the count, not by the clock: a machine that stalls at first would see the slow half alone

    run = run_mode("sustained", throttling, ModePlan(sustained=0.8))
    assert run.figures["last_over_first_tenth"] > 1.4  # 2 on an idle machine
    assert run.figures["per_second"] == pytest.approx(len(run.samples) / run.figures["seconds"])
    assert 0 < run.figures["cores_busy"] <= 1.1


def test_a_device_that_wakes_slowly_shows_in_a_burst() -> None:
    calls: list[float] = []

    def waking(turn: int) -> None:
        idle = not calls or time.perf_counter() - calls[-1] > 0.05
        busy(0.004 if idle else 0.001)
        calls.append(time.perf_counter())

    run = run_mode("burst", waking, ModePlan(rest=0.1))
    assert len(run.samples) == 50
    assert run.figures["first_over_later"] > 1.5  # 4 on an idle machine
    assert run.figures["first_ns"] == run.samples[0] >= 3_900_000


def test_duty_cycled_queries_start_a_period_apart() -> None:
    starts: list[float] = []

    def query(turn: int) -> None:
        starts.append(time.perf_counter())
        busy(0.001)

    run = run_mode("duty", query, ModePlan(period=0.02, queries=20))
    assert len(run.samples) == 20
    assert np.median(np.diff(starts[1:])) == pytest.approx(0.02, rel=0.25)


def test_unknown_modes_and_impossible_plans_are_refused() -> None:
    with pytest.raises(MeasureError, match="'fast' is not a mode"):
        run_mode("fast", lambda turn: None, ModePlan())
    for wrong in ({"rest": -1}, {"sustained": 0}, {"period": 0}, {"queries": 3}, {"period": float("nan")}):
        with pytest.raises(MeasureError):
            ModePlan(**wrong)


def package(root: Path, name: str, energy: int, most: int) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "energy_uj").write_text(f"{energy}\n", encoding="ascii")
    (folder / "max_energy_range_uj").write_text(f"{most}\n", encoding="ascii")
    return folder / "energy_uj"


def test_packages_are_summed_and_a_counter_may_start_over(tmp_path: Path) -> None:
    first, second = package(tmp_path, "intel-rapl:0", 262_000_000_000, 262_143_328_850), package(tmp_path, "intel-rapl:1", 5_000_000, 262_143_328_850)
    package(tmp_path, "intel-rapl:0:0", 7, 10)  # the cores of package 0: counted there already
    meter = open_meter(tmp_path, tmp_path / "none")
    assert meter.name == "RAPL, 2 packages"
    before = meter.read()
    first.write_text("1_000_000".replace("_", ""), encoding="ascii")
    second.write_text("9000000", encoding="ascii")
    assert meter.since(before) == pytest.approx((143_328_850 + 1_000_000 + 4_000_000) / 1e6)


def test_the_rail_of_a_board_is_added_up(tmp_path: Path) -> None:
    rail = tmp_path / "hwmon3"
    rail.mkdir()
    for number, (label, volts, amperes) in enumerate((("VDD_IN", 5000, 2000), ("VDD_CPU_GPU_CV", 5000, 700)), 1):
        for name, value in ((f"in{number}_label", label), (f"in{number}_input", volts), (f"curr{number}_input", amperes)):
            (rail / name).write_text(f"{value}\n", encoding="ascii")
    meter = open_meter(tmp_path / "none", tmp_path)
    assert meter.name == "power rail of the board"
    before = meter.read()
    time.sleep(0.4)
    assert meter.since(before) == pytest.approx(10 * 0.4, rel=0.4)


def test_without_a_counter_it_says_so(tmp_path: Path) -> None:
    meter = open_meter(tmp_path, tmp_path)
    assert meter.since(meter.read()) is None
    assert "no energy counter" in str(meter.reason)
    run = run_mode("sustained", lambda turn: busy(0.001), ModePlan(sustained=0.05), meter=meter)
    assert run.figures["energy"] == {"source": None, "joules": None, "joules_per_1000": None, "reason": meter.reason}


def test_profile_events_are_summed_by_operation_and_unit() -> None:
    events = []
    for run in range(4):
        at = 1000 * run
        for node, op, taken, provider in (("a", "Conv", 60, "CPUExecutionProvider"), ("b", "Conv", 20, "CPUExecutionProvider"), ("c", "Gelu", 20, "QNNExecutionProvider")):
            events.append({"cat": "Node", "name": f"{node}_kernel_time", "ts": at + 5, "dur": taken * (10 if run == 0 else 1), "args": {"op_name": op, "provider": provider}})
        events.append({"cat": "Session", "name": "model_run", "ts": at, "dur": 125})
    found = read_profile(events, skip=1)
    assert (found["runs"], found["nodes"]) == (3, 3)
    assert [(row["op"], row["nodes"], row["us"], row["share"]) for row in found["operations"]] == [("Conv", 2, 80, 0.8), ("Gelu", 1, 20, pytest.approx(0.2))]
    assert found["placement"] == {"CPUExecutionProvider": 0.8, "QNNExecutionProvider": pytest.approx(0.2)}
    assert found["outside_share"] == pytest.approx(0.2)
    assert found["slowest_nodes"][0] == {"node": "a", "op": "Conv", "us": 60, "share": pytest.approx(0.6)}
