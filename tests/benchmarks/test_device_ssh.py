"""The ssh device against real ssh servers on loopback, with the system's ssh: whole measurements, and everything that goes wrong with machines far away."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.device_ssh import SshDevice
from benchmarks.devices import DeviceSettings, measure_on
from benchmarks.latency import main
from benchmarks.results import read_results
from runtime.errors import DeviceError
from tests.benchmarks.ssh_server import serving, sshd

QUICK = ("--seconds=0.02", "--starts=1", "--phases=decode,tokenise,image_tower,text_tower,cold_start_text")
SERVERS = [kind for kind, there in (("sshd", sshd()), ("asyncssh", importlib.util.find_spec("asyncssh"))) if there][:1]


def test_a_server_is_there_to_test_against() -> None:
    assert SERVERS, "neither sshd nor the package asyncssh is installed (extra dev)"


@pytest.fixture(scope="module", params=SERVERS)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with serving(request.param, tmp_path_factory.mktemp("ssh") / request.param) as found:
        yield found


def settings(config: Path, **more: object) -> DeviceSettings:
    return DeviceSettings(**{"arguments": QUICK, "seconds": 0.02, "ssh_config": config, "remote_python": sys.executable, "timeout": 60.0, **more})  # type: ignore[arg-type]


def test_the_sdk_travels_measures_and_leaves_nothing(config: Path, toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.jsonl"
    command = ["--device", "ssh:board", "--ssh-config", str(config), "--remote-python", sys.executable, "--label", "loopback", "--out", str(out), *QUICK, "--json"]
    assert main([str(toy_bundle), *command]) == 0
    (found,) = json.loads(capsys.readouterr().out)["devices"]
    rows = read_results([out])
    assert found == {"device": "ssh:board", "lines": len(rows), "error": None, "note": None}
    assert {("image_tower", "image-onnx-fp32"), ("text_tower", "text-onnx-int8")} <= {(row["phase"], row["artefact"]) for row in rows if row["kind"] == "latency"}
    for row in rows:
        assert (row["device"]["kind"], row["device"]["label"]) == ("ssh", "loopback")
        assert "board" not in json.dumps(row["environment"])
        assert "127.0.0.1" not in json.dumps(row)
    assert main([str(toy_bundle), *command]) == 0  # what is there already travels along and is not measured again
    assert json.loads(capsys.readouterr().out)["devices"][0]["lines"] == 0
    assert not [path for path in Path("/tmp").glob("mclip-bench-*") if path.stat().st_mtime > time.time() - 30]


def test_cores_and_priority_arrive(config: Path, toy_bundle: Path, tmp_path: Path) -> None:
    device = SshDevice("board", settings(config, cores=(0,), priority=5))
    try:
        device.push(toy_bundle, [])
        row = next(iter(device.run()))
        assert row["environment"]["processor"]["usable_cores"] == 1
        assert (device.facts["cores"], device.facts["priority"]) == ([0], 5)
    finally:
        device.close()


def test_without_the_sdk_s_packages_the_script_of_plans_measures(config: Path, toy_bundle: Path, tmp_path: Path) -> None:
    """A Python that has numpy and onnxruntime only: -S -E and a path of its own hide the rest."""
    only = tmp_path / "only"
    only.mkdir()
    for name in ("numpy", "onnxruntime"):
        origin = importlib.util.find_spec(name).origin  # type: ignore[union-attr]
        (only / name).symlink_to(Path(origin).parent)  # type: ignore[arg-type]
    for path in Path(importlib.util.find_spec("numpy").origin).parents[1].glob("numpy.libs"):  # type: ignore[union-attr,arg-type]
        (only / path.name).symlink_to(path)
    needs = [name for name in ("flatbuffers", "google", "packaging", "sympy", "mpmath", "coloredlogs", "humanfriendly") if importlib.util.find_spec(name)]
    for name in needs:
        spec = importlib.util.find_spec(name)
        (only / name).symlink_to(next(iter(spec.submodule_search_locations)))  # type: ignore[union-attr,arg-type]
    python = tmp_path / "python-bare"
    python.write_text(f'#!/bin/sh\nexec env PYTHONPATH={only} MCLIP_BARE=1 {sys.base_prefix}/bin/python3 -s "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    if subprocess.run([str(python), "-c", "import numpy, onnxruntime"], capture_output=True, check=False).returncode:
        pytest.fail("the bare Python of this test does not start")
    out = tmp_path / "r.jsonl"
    found = measure_on("ssh:board", toy_bundle, out, settings(config, remote_python=str(python)))
    assert found["error"] is None
    rows = read_results([out])
    assert {row["artefact"] for row in rows if row["kind"] == "latency"} == {"image-onnx-fp32", "text-onnx-fp32", "text-onnx-int8"}
    for row in rows:
        assert row["tool"]["name"] == "plan"
        if row["kind"] == "latency":
            assert row["summary"]["n"] == len(row["samples"]) >= 50
            assert row["figures"]["golden_cosine_min"] > 0.99


def test_a_python_that_has_nothing_is_told_what_to_install(config: Path, tmp_path: Path) -> None:
    for name, text in (("greets", "echo hello"), ("bare", f'exec {sys.base_prefix}/bin/python3 -I -S "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(DeviceError, match="no-such-python there; name another"):
        SshDevice("board", settings(config, remote_python="no-such-python"))
    with pytest.raises(DeviceError, match="answered 'hello'"):
        SshDevice("board", settings(config, remote_python=str(tmp_path / "greets")))
    with pytest.raises(DeviceError, match="lacks .*numpy.*pip install numpy onnxruntime"):
        SshDevice("board", settings(config, remote_python=str(tmp_path / "bare")))


def test_names_are_quoted_for_the_shell_there(config: Path, toy_bundle: Path, tmp_path: Path) -> None:
    device = SshDevice("board", settings(config))
    try:
        odd = f"{tmp_path}/a b;touch {tmp_path}/broken"
        with pytest.raises(DeviceError):
            device._call(["cat", odd], timeout=30)
        assert not (tmp_path / "broken").exists()
    finally:
        device.close()
    for wrong in ("-oProxyCommand=touch x", "a b"):
        with pytest.raises(DeviceError, match="is no host"):
            SshDevice(wrong, settings(config))


def test_a_bundle_that_does_not_fit_is_not_sent(config: Path, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SshDevice("board", settings(config))
    try:
        device._free = 2**20
        with pytest.raises(DeviceError, match="1 MB are free"):
            device.push(toy_bundle, [])
    finally:
        device.close()


def test_nobody_there_no_key_and_no_name(config: Path, tmp_path: Path) -> None:
    text = config.read_text(encoding="utf-8")
    port = next(word for line in text.splitlines() for word in line.split() if word.isdigit())
    (tmp_path / "closed").write_text(text.replace(f"Port {port}", "Port 9"), encoding="utf-8")
    with pytest.raises(DeviceError, match="refuses connections"):
        SshDevice("board", settings(tmp_path / "closed"))
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True)
    (tmp_path / "stranger").write_text(text.replace("/user\n", "/nothing\n").replace(f"{config.parent}/nothing", str(tmp_path / "other")), encoding="utf-8")
    with pytest.raises(DeviceError, match="lets nobody in"):
        SshDevice("board", settings(tmp_path / "stranger"))
    with pytest.raises(DeviceError, match="nobody knows that name"):
        SshDevice("no-such-board.invalid", settings(config))


def test_what_was_finished_stays_when_the_machine_goes_away(toy_bundle: Path, tmp_path: Path) -> None:
    """The server and all its children are killed in the middle, as when a cable is pulled."""
    out = tmp_path / "r.jsonl"
    with serving(SERVERS[0], tmp_path / "server") as found:
        before = _children()

        def pull_the_plug(row: dict[str, object]) -> None:
            if row["phase"] == "tokenise":
                threading.Thread(target=_kill, args=(_children() - before,)).start()

        made = measure_on("ssh:board", toy_bundle, out, settings(found), pull_the_plug)
    assert made["error"] is not None
    assert "\n" not in made["error"]
    kept = read_results([out])
    assert {"decode", "tokenise"} <= {row["phase"] for row in kept}
    assert len(kept) == made["lines"] < 20


def test_a_machine_that_hangs_is_given_up(config: Path, toy_bundle: Path, tmp_path: Path) -> None:
    hanging = tmp_path / "python-hanging"
    hanging.write_text(f'#!/bin/sh\ncase "$1" in -m) echo \'{{"board": {{}}}}\'; exec sleep 60;; esac\nexec {sys.executable} "$@"\n', encoding="utf-8")
    hanging.chmod(0o755)
    started = time.monotonic()
    made = measure_on("ssh:board", toy_bundle, tmp_path / "r.jsonl", settings(config, remote_python=str(hanging), timeout=2.0))
    assert "counts as hanging" in made["error"]
    assert time.monotonic() - started < 30


def _children() -> set[int]:
    """Every process below this one."""
    rows = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split()
    parents = dict(zip(map(int, rows[::2]), map(int, rows[1::2]), strict=True))
    return {pid for pid in parents if _below(pid, parents)}


def _below(pid: int, parents: dict[int, int]) -> bool:
    while pid in parents and pid != os.getpid():
        pid = parents[pid]
    return pid == os.getpid()


def _kill(processes: set[int]) -> None:
    for process in sorted(processes - {os.getpid()}):
        try:
            command = Path(f"/proc/{process}/cmdline").read_bytes()
            if b"sshd" in command or b"device_run" in command or b"ssh_server" in command:
                os.kill(process, signal.SIGKILL)
        except (OSError, ProcessLookupError):
            continue
