"""Android: the real adb client and server as far as they go without a phone, then a stand-in that passes what the phone's shell would get to a shell here."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.device_adb import elf_machine, open_adb, read_battery, read_df, read_meminfo, read_thermal
from benchmarks.devices import DeviceSettings, measure_on
from benchmarks.results import read_results
from runtime.errors import DeviceError
from runtime.manifest import read_manifest, write_manifest
from tests.runtime import toy


@pytest.fixture
def runner(tmp_path: Path) -> Path:
    path = tmp_path / "benchmark_model"
    path.write_text("#!/bin/sh\nexit 0\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A real adb server on a port of its own."""
    if shutil.which("adb") is None:
        pytest.skip("adb is not installed (Debian: adb)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(probe.getsockname()[1]))
    subprocess.run(["adb", "start-server"], capture_output=True, check=True, timeout=30)
    yield
    subprocess.run(["adb", "kill-server"], capture_output=True, check=False, timeout=30)


@pytest.mark.usefixtures("server")
def test_a_real_adb_server_without_a_phone_is_one_sentence(runner: Path) -> None:
    with pytest.raises(DeviceError, match="adb:emulator-5554: adb knows no such device") as caught:
        open_adb("emulator-5554", DeviceSettings(runner=runner))
    assert "\n" not in str(caught.value)


def test_wrong_use_is_one_sentence(runner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="no serial number"):
        open_adb("a b; reboot", DeviceSettings(runner=runner))
    with pytest.raises(DeviceError, match="needs --runner"):
        open_adb("x", DeviceSettings())
    with pytest.raises(DeviceError, match="no program that is known"):
        open_adb("x", DeviceSettings(runner=Path("other")))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(DeviceError, match="there is no adb"):
        open_adb("x", DeviceSettings(runner=runner))


THERMALSERVICE = """IsStatusOverride: false
ThermalEventListeners:
\tcallbacks: 2
Thermal Status: 2
Cached temperatures:
\tTemperature{mValue=99.0, mType=0, mName=OLD, mStatus=0}
HAL Ready: true
Current temperatures from HAL:
\tTemperature{mValue=41.3, mType=0, mName=CPU0, mStatus=0}
\tTemperature{mValue=33.9, mType=2, mName=battery, mStatus=0}
Current cooling devices from HAL:
\tCoolingDevice{mValue=0, mType=2, mName=thermal-cpufreq-0}
"""
BATTERY = "Current Battery Service state:\n  AC powered: false\n  USB powered: true\n  Wireless powered: false\n  level: 83\n  scale: 100\n  voltage: 4211\n  temperature: 287\n"


def test_what_a_phone_says_of_itself() -> None:
    assert read_thermal(THERMALSERVICE) == {"thermal_status": "moderate", "temperatures_c": {"CPU0": 41.3, "battery": 33.9}}
    assert read_battery(BATTERY) == {"battery_percent": 83, "battery_c": 28.7, "charging": True}
    assert read_meminfo("MemTotal:  7649000 kB\nMemFree: 1 kB\nMemAvailable:  3120000 kB\n") == {"memory_bytes": 7649000 * 1024, "memory_free_bytes": 3120000 * 1024}
    assert read_df("Filesystem 1K-blocks Used Available Use% Mounted on\n/dev/block/dm-9 112000000 60000000 51000000 55% /data\n") == 51000000 * 1024
    assert (read_thermal(""), read_battery("garbage"), read_meminfo("?"), read_df("")) == ({}, {}, {}, None)


PRINTS = """#!/bin/sh
head -c 40000000 /dev/zero | tail -c 1 >/dev/null
sleep 0.3
for word in "$@"; do case $word in --num_threads=*) echo "INFO: Num threads: [${word#*=}]";; esac; done
echo "INFO: count=69 first=14575 curr=14575 min=14301 max=15920 avg=14575.2 std=210 p5=14320 median=14550 p95=15010"
echo "INFO: Inference timings in us: Init: 5685, First inference: 18535, Warmup (avg): 14975.1, Inference (avg): 14575.2"
"""


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`adb` that has one phone, whose shell is this machine's, with its folder under a name of its own."""
    bin_, place = tmp_path / "bin", tmp_path / "data"
    bin_.mkdir()
    place.mkdir()
    (tmp_path / "abi").write_text("arm64-v8a", encoding="utf-8")
    (bin_ / "adb").write_text(
        f"""#!/bin/sh
[ "$1" = -s ] && [ "$2" = PHONE1 ] || {{ echo "error: device '$2' not found" >&2; exit 1; }}
shift 2
[ -e {tmp_path}/unplugged ] && {{ echo "error: device offline" >&2; exit 1; }}
case $1 in
get-state) echo device;;
push) cp "$2" "$(echo "$3" | sed 's,/data/local/tmp,{place},')" && echo "1 file pushed";;
shell) PATH={bin_}:$PATH sh -c "$(echo "$2" | sed 's,/data/local/tmp,{place},g')";;
esac
""",
        encoding="utf-8",
    )
    (bin_ / "getprop").write_text(f'#!/bin/sh\ncase $1 in *abi) cat {tmp_path}/abi;; *soc*) echo SM8550;; *product.model) echo "A Phone";; *) echo 15;; esac\n', encoding="utf-8")
    (bin_ / "dumpsys").write_text(f"#!/bin/sh\ncase $1 in battery) cat <<'E'\n{BATTERY}E\n;; *) cat <<'E'\n{THERMALSERVICE}E\n;; esac\n", encoding="utf-8")
    for path in bin_.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The toy bundle with two LiteRT artefacts (their content does not matter here)."""
    folder = tmp_path / "bundle"
    toy.build(folder)
    manifest = read_manifest(folder)
    (folder / "litert").mkdir()
    extra = []
    for tower in ("image", "text"):
        (folder / "litert" / f"{tower}.tflite").write_bytes(b"flat buffer")
        extra.append(dataclasses.replace(manifest.artefact(f"{tower}-onnx-fp32"), id=f"{tower}-litert-fp32", target="litert", batch="1", path=f"litert/{tower}.tflite"))
    write_manifest(folder, dataclasses.replace(manifest, artefacts=(*manifest.artefacts, *extra)))
    return folder


def test_a_measurement_passes_through_the_phone_s_shell(phone: Path, bundle: Path, runner: Path) -> None:
    runner.write_text(PRINTS, encoding="utf-8")
    out = phone / "r.jsonl"
    found = measure_on("adb:PHONE1", bundle, out, DeviceSettings(runner=runner, threads=2, cores=(0,), timeout=60))
    assert found["error"] is None
    rows = read_results([out])
    timed = [row for row in rows if row["kind"] == "latency_summary"]
    assert {row["artefact"] for row in timed} == {"image-litert-fp32", "text-litert-fp32"}
    for row in timed:
        assert row["summary"]["p50"] == 14_550_000
        assert row["settings"]["threads"] == 2
        assert row["figures"]["before"]["thermal_status"] == "moderate"
        assert row["figures"]["after"]["battery_percent"] == 83
        assert row["environment"]["processor"]["model"] == "SM8550"
        assert (row["device"]["kind"], row["device"]["label"]) == ("adb", "A Phone")
        assert "PHONE1" not in str(row)
        assert row["figures"]["accuracy"]["cosine_min"] > 0.99
    assert all(row["samples"][0] > 100_000 for row in rows if row["kind"] == "memory")
    assert not (phone / "data" / "mclip-bench").exists()  # nothing is left behind
    assert measure_on("adb:PHONE1", bundle, out, DeviceSettings(runner=runner, threads=2, cores=(0,), timeout=60))["lines"] == 0


def test_a_phone_that_is_unplugged_hangs_or_is_of_another_kind(phone: Path, bundle: Path, runner: Path) -> None:
    settings = DeviceSettings(runner=runner, timeout=3)
    runner.write_text(f"#!/bin/sh\ncase $1 in *image*) :;; *) touch {phone}/unplugged;; esac\n" + PRINTS.partition("\n")[2], encoding="utf-8")
    found = measure_on("adb:PHONE1", bundle, phone / "a.jsonl", settings)
    assert "connected but does not answer" in found["error"]
    assert {row["artefact"] for row in read_results([phone / "a.jsonl"])} == {"image-litert-fp32"}  # what was finished stays
    (phone / "unplugged").unlink()
    runner.write_text("#!/bin/sh\nsleep 30\n", encoding="utf-8")
    assert "no answer to 'shell' within 3 s" in measure_on("adb:PHONE1", bundle, phone / "b.jsonl", settings)["error"]
    runner.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 2, 62))
    assert elf_machine(runner) == 62
    assert "was built for x86_64, the device is arm64-v8a" in measure_on("adb:PHONE1", bundle, phone / "c.jsonl", settings)["error"]
    runner.write_text("#!/bin/sh\necho 'write failed: No space left on device' >&2\nexit 1\n", encoding="utf-8")
    assert "no space left" in measure_on("adb:PHONE1", bundle, phone / "d.jsonl", settings)["error"]
    onnx_only = phone / "onnx-only"
    toy.build(onnx_only)
    assert "no proven artefact for benchmark_model" in measure_on("adb:PHONE1", onnx_only, phone / "e.jsonl", settings)["error"]
