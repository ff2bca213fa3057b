"""The environment facts: complete, plain JSON, and without anything that names a machine or a person."""

from __future__ import annotations

import getpass
import json
import os
import platform
import socket
from pathlib import Path

import numpy as np
import pytest

from benchmarks import environment as module
from benchmarks.environment import environment, packages
from benchmarks.peak import measure_peak


def test_the_facts_are_there() -> None:
    facts = environment(threads=3)
    assert facts["threads"] == 3
    assert facts["packages"]["numpy"] == np.__version__
    assert facts["python"].endswith(platform.python_version())
    assert facts["processor"]["logical_cores"] == os.cpu_count()
    assert len(facts["load_average"]) == 3


def test_no_path_and_no_host_name() -> None:
    text = json.dumps(environment())
    assert socket.gethostname() not in text
    assert str(Path.home()) not in text or str(Path.home()) == "/"
    assert str(Path.cwd()) not in text
    if len(getpass.getuser()) > 4:
        assert getpass.getuser() not in text


def test_a_builders_kernel_suffix_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "6.1.55-build.internal-host")
    assert environment()["system"]["release"] == "6.1.55"


def test_unreadable_files_give_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_read", lambda path: None)
    facts = environment()
    assert facts["memory_bytes"] is None
    assert facts["processor"]["quota_cores"] is None
    assert facts["processor"]["virtual"] is None
    assert facts["system"]["distribution"] is None


@pytest.mark.parametrize(("text", "cores"), [("max 100000", None), ("150000 100000", 1.5)])
def test_quota(monkeypatch: pytest.MonkeyPatch, text: str, cores: float | None) -> None:
    monkeypatch.setattr(module, "_read", lambda path: text if path.endswith("cpu.max") else None)
    assert environment()["processor"]["quota_cores"] == cores


def test_absent_packages_are_left_out() -> None:
    assert packages(("numpy", "no-such-distribution-here")) == {"numpy": np.__version__}


def test_peak_is_plausible() -> None:
    peak = measure_peak(seconds=0.1, size=256, megabytes=16)
    assert 0.1 < peak.gemm_gflops_median <= peak.gemm_gflops < 5000
    assert 0.1 < peak.copy_gbytes_median <= peak.copy_gbytes < 2000
    assert peak.as_dict()["threads"] == 1
