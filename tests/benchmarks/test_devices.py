"""Devices that are here: the local one, plans that are carried away and come back, boards that tell of themselves; and what is said when they fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from benchmarks.board import board_facts, read_nvpmodel, read_tegrastats
from benchmarks.device_plan import import_plan, write_plan
from benchmarks.devices import DeviceSettings, Stream, blame, lines_of, measure_on, open_device
from benchmarks.latency import main
from benchmarks.results import ResultsError, read_results
from runtime.errors import BundleError, DeviceError
from runtime.manifest import read_manifest
from tests.runtime import toy

QUICK = ("--seconds=0.02", "--starts=1", "--phases=decode,tokenise,text_tower")


def test_local_pins_cores_and_keeps_lines_apart_from_those_that_are_not_pinned(toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.jsonl"
    core = min(os.sched_getaffinity(0))
    assert main([str(toy_bundle), "--device", "local", "--cores", str(core), "--priority", "5", "--out", str(out), *QUICK, "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)["devices"][0]["lines"]
    rows = read_results([out])
    assert len(rows) == lines > 5
    for row in rows:
        assert row["device"]["cores"] == [core]
        assert row["device"]["priority"] == 5
        assert row["environment"]["processor"]["usable_cores"] == 1
    assert main([str(toy_bundle), "--device", "local", "--out", str(out), *QUICK, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"][0]["lines"] == lines  # measured anew: another circumstance
    assert main([str(toy_bundle), "--device", "local", "--cores", "4096", "--out", str(out), *QUICK]) == 1
    assert "--cores names [4096]" in capsys.readouterr().err


def test_wrong_devices_and_settings_are_one_sentence(toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for spec, match in (("fridge", "of no kind that is known"), ("ssh", "needs a name"), ("local:x", "takes no name")):
        with pytest.raises(DeviceError, match=match):
            open_device(spec, DeviceSettings())
    for wrong, match in (({"timeout": 0}, "--device-timeout"), ({"cores": (0, 0)}, "--cores"), ({"priority": 40}, "--priority")):
        with pytest.raises(DeviceError, match=match):
            DeviceSettings(**wrong)  # type: ignore[arg-type]
    with pytest.raises(BundleError):  # before any device is touched
        main([str(tmp_path / "nowhere"), "--device", "ssh:nobody.invalid"])
    assert main([str(toy_bundle), "--device", "fridge", "--device", "local", "--out", str(tmp_path / "r.jsonl"), *QUICK]) == 1
    said = capsys.readouterr()
    assert "of no kind" in said.err
    assert "local:" in said.out  # the next device is measured all the same
    assert len(read_results([tmp_path / "r.jsonl"])) > 3
    assert main([str(toy_bundle), "--phases", "nonsense", "--device", "local", "--out", str(tmp_path / "s.jsonl")]) == 1
    assert "--phases names nonsense" in capsys.readouterr().err


def carry(plan: Path, python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the plan as on a device: its folder alone, none of our packages on the path."""
    environment = {"PATH": os.environ["PATH"], "MCLIP_PYTHON": python}
    return subprocess.run(["sh", str(plan / "run.sh"), *arguments], capture_output=True, text=True, env=environment, cwd="/", timeout=120, check=False)


def test_a_plan_goes_and_comes_back(toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, away, out = tmp_path / "plan", tmp_path / "away" / "on a device", tmp_path / "r.jsonl"
    command = [str(toy_bundle), "--device", f"plan:{plan}", "--label", "a board", "--seconds", "0.05", "--out", str(out)]
    assert main(command) == 0
    assert "carry that folder to the device" in capsys.readouterr().out
    assert not out.exists()
    source = (plan / "measure.py").read_text(encoding="utf-8")
    assert not [name for name in ("import runtime", "import benchmarks", "import mobileclip", "from runtime", "import torch") if name in source]
    shutil.copytree(plan, away)
    done = carry(away, sys.executable)
    assert done.returncode == 0, done.stderr
    shutil.copyfile(away / "results.jsonl", plan / "results.jsonl")
    assert main(command) == 0
    rows = read_results([out])
    timed = {row["artefact"]: row for row in rows if row["kind"] == "latency"}
    assert set(timed) == {"image-onnx-fp32", "text-onnx-fp32", "text-onnx-int8"}
    for row in timed.values():
        assert row["summary"]["n"] == len(row["samples"]) >= 50
        assert row["figures"]["golden_cosine_min"] > 0.99
        assert row["figures"]["accuracy"]["cosine_min"] == read_manifest(toy_bundle).artefact(row["artefact"]).parity["cosine_min"]  # type: ignore[index]
        assert (row["device"]["kind"], row["device"]["label"]) == ("plan", "a board")
    assert {row["kind"] for row in rows} == {"latency", "load", "memory"}
    capsys.readouterr()
    assert main([*command, "--json"]) == 0  # imported once, not twice
    assert json.loads(capsys.readouterr().out)["devices"][0]["lines"] == 0


def test_a_plan_that_was_interrupted_goes_on_and_a_torn_line_is_passed_over(toy_bundle: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    write_plan(toy_bundle, plan, DeviceSettings(seconds=0.02))
    assert carry(plan, sys.executable).returncode == 0
    whole = (plan / "results.jsonl").read_text(encoding="utf-8")
    rows = whole.splitlines()
    (plan / "results.jsonl").write_text("\n".join(rows[:3]) + "\n" + rows[3][: len(rows[3]) // 2], encoding="utf-8")
    assert len(import_plan(plan, toy_bundle)) == 3
    again = carry(plan, sys.executable, "--stream")
    assert again.returncode == 0
    assert "image-onnx-fp32" not in again.stderr  # done before
    assert json.loads(again.stdout.splitlines()[0])["artefact"] == "text-onnx-fp32"


def test_plans_that_do_not_fit_are_refused(toy_bundle: Path, tmp_path: Path) -> None:
    plan, other = tmp_path / "plan", tmp_path / "other"
    write_plan(toy_bundle, plan, DeviceSettings(seconds=0.02))
    (plan / "results.jsonl").write_text("", encoding="utf-8")
    toy.build(other, name="other")
    with pytest.raises(DeviceError, match="written for another bundle"):
        import_plan(plan, other)
    with pytest.raises(DeviceError, match="is not empty"):
        write_plan(toy_bundle, plan, DeviceSettings())
    (plan / "results.jsonl").write_text('{"schema": 1}\n{"schema": 1}\n', encoding="utf-8")
    with pytest.raises(ResultsError, match="line 1 of plan/results.jsonl"):
        import_plan(plan, toy_bundle)
    (plan / "plan.json").write_text('{"schema": 7, "bundle": {"sha256": ""}, "steps": []}', encoding="utf-8")
    with pytest.raises(ResultsError, match="schema 7"):
        import_plan(plan, toy_bundle)


def test_a_file_that_changed_on_the_way_or_answers_wrongly_is_not_timed(toy_bundle: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    write_plan(toy_bundle, plan, DeviceSettings(seconds=0.02))
    (plan / "towers" / "image-onnx-fp32.onnx").write_bytes(b"half a file")
    facts = json.loads((plan / "plan.json").read_text(encoding="utf-8"))
    facts["steps"][-1]["cosine_min"] = 1.1
    (plan / "plan.json").write_text(json.dumps(facts), encoding="utf-8")
    done = carry(plan, sys.executable)
    assert done.returncode == 1
    assert "is not the file that was written" in done.stderr
    assert "gives wrong answers here" in done.stderr
    assert {json.loads(row)["artefact"] for row in (plan / "results.jsonl").read_text(encoding="utf-8").splitlines()} == {"text-onnx-fp32"}
    (tmp_path / "none").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    bare = subprocess.run(["/bin/sh", str(plan / "run.sh")], capture_output=True, text=True, env={"PATH": str(tmp_path / "empty")}, timeout=60, check=False)
    assert bare.returncode == 1
    assert "no python here has numpy and onnxruntime" in bare.stderr or "dirname" in bare.stderr


def test_streams_pass_lines_over_that_are_cut_and_end_when_nothing_comes() -> None:
    line_ = {"schema": 1, "kind": "peak", "phase": "machine", "bundle": None, "settings": {}, "summary": {}, "figures": {}}
    code = f"print({json.dumps(json.dumps(line_))}); print('{{\"schema\": 1, \"ki'); print('{{\"board\": {{\"model\": \"X\"}}}}')"
    facts: dict[str, object] = {}
    assert [row["phase"] for row in lines_of(Stream([sys.executable, "-c", code], 20), "x", facts)] == ["machine"]
    assert facts == {"board": {"model": "X"}}
    started = time.monotonic()
    with pytest.raises(DeviceError, match="counts as hanging"):
        list(lines_of(Stream([sys.executable, "-c", "import time; time.sleep(60)"], 1), "x", {}))
    assert time.monotonic() - started < 20
    with pytest.raises(DeviceError, match="x: the command there ended with exit code 3: last words"):
        list(lines_of(Stream([sys.executable, "-c", "import sys; sys.stderr.write('last words\\n'); sys.exit(3)"], 20), "x", {}))
    with pytest.raises(DeviceError, match="x: a reason"):
        list(lines_of(Stream([sys.executable, "-c", "print('{\"error\": \"a reason\"}')"], 20), "x", {}))


def test_lines_that_came_before_a_break_are_kept(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import device_local

    real = sys.executable
    assert str(tmp_path) not in real
    monkeypatch.setattr(device_local, "sys", types.SimpleNamespace(executable=str(tmp_path / "python")))  # the name in that module alone
    broken = f"""#!/bin/sh
{real} "$@" | {real} -c '
import os, sys
for number, row in enumerate(sys.stdin):
    if number == 3:
        print(row[: len(row) // 2])
        sys.stdout.flush()
        sys.stderr.write("No space left on device\\n")
        os._exit(9)
    sys.stdout.write(row)
'
"""
    (tmp_path / "python").write_text(broken, encoding="utf-8")
    (tmp_path / "python").chmod(0o755)
    found = measure_on("local", toy_bundle, tmp_path / "r.jsonl", DeviceSettings(arguments=QUICK, timeout=60))
    assert "no space left" in found["error"]
    assert found["lines"] == len(read_results([tmp_path / "r.jsonl"])) == 2


def test_what_went_wrong_is_told_from_what_was_printed() -> None:
    assert "another processor" in blame("x", 126, ["sh: ./runner: cannot execute binary file: Exec format error"])
    assert "unplugged" in blame("x", 255, [])
    assert "exit code 7: no message" in blame("x", 7, [])


ORIN = (
    "11-23-2026 10:00:00 RAM 3000/7620MB (lfb 5x4MB) SWAP 0/3810MB (cached 0MB) CPU [12%@1510,0%@1510,off,3%@729] EMC_FREQ 0%@2133 GR3D_FREQ 64%@[624] NVDEC off "
    "cpu@48.2C soc2@46.1C gpu@47.7C tj@48.2C cv0@-256C VDD_IN 5120mW/4980mW VDD_CPU_GPU_CV 1200mW/1100mW VDD_SOC 1500mW/1490mW"
)
NANO = (
    "RAM 1500/3964MB (lfb 4x2MB) CPU [10%@102,5%@102,off,off] EMC_FREQ 4%@1600 GR3D_FREQ 0%@76 PLL@35C CPU@38.5C PMIC@100C GPU@36C "
    "POM_5V_IN 2100/2050 POM_5V_GPU 0/0 POM_5V_CPU 300/290"
)


def test_boards_tell_of_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orin = read_tegrastats(ORIN)
    assert (orin["ram_mb"], orin["ram_total_mb"], orin["gpu_percent"], orin["gpu_mhz"]) == (3000, 7620, 64, 624)
    assert orin["cpu"] == [{"percent": 12, "mhz": 1510}, {"percent": 0, "mhz": 1510}, None, {"percent": 3, "mhz": 729}]
    assert orin["temperatures_c"] == {"cpu": 48.2, "soc2": 46.1, "gpu": 47.7, "tj": 48.2}
    assert orin["rails_mw"]["VDD_IN"] == {"now": 5120, "mean": 4980}
    nano = read_tegrastats(NANO)
    assert nano["rails_mw"]["POM_5V_IN"] == {"now": 2100, "mean": 2050}
    assert nano["gpu_mhz"] == 76
    assert read_tegrastats("garbage") == {}
    assert read_nvpmodel("NV Power Mode: 15W\n0\n") == {"power_mode": "15W", "power_mode_id": 0}
    for path, text in (
        ("proc/device-tree/model", "NVIDIA Jetson Orin Nano Developer Kit\0"), ("etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 1"),
        ("sys/class/thermal/thermal_zone0/type", "cpu-thermal"), ("sys/class/thermal/thermal_zone0/temp", "48218"), ("sys/class/thermal/thermal_zone1/type", "broken"),
        ("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "schedutil"), ("sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "1510400"),
    ):  # fmt: skip
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "nvpmodel").write_text("#!/bin/sh\necho 'NV Power Mode: MAXN'\necho 0\n", encoding="utf-8")
    (tools / "tegrastats").write_text(f"#!/bin/sh\nwhile true; do echo '{ORIN}'; sleep 1; done\n", encoding="utf-8")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    facts = board_facts(tmp_path)
    assert facts["model"] == "NVIDIA Jetson Orin Nano Developer Kit"
    assert facts["power_mode"] == "MAXN"
    assert facts["tegrastats"]["gpu_mhz"] == 624
    assert facts["temperatures_c"] == {"cpu-thermal": 48.218}
    assert (facts["clocks_mhz"], facts["governors"]) == ([1510], ["schedutil"])
