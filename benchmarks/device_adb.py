"""Android devices over adb, with the vendors' own benchmark programs: LiteRT's benchmark_model for .tflite artefacts, onnxruntime_perf_test for ONNX.

Heat, battery, governors and free memory are read before and after, without which a number from a phone means little. Exercised against a real adb server and
with a stand-in for the phone's shell; not run on hardware.
"""

from __future__ import annotations

import re
import shlex
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from runtime.errors import DeviceError
from runtime.manifest import Artefact, read_manifest

from .devices import DeviceSettings, blame
from .importers import lines_of_tool, read_litert, read_perf_test
from .results import Line

PLACE = "/data/local/tmp/mclip-bench"
TOOLS = {"benchmark_model": ("litert", read_litert), "onnxruntime_perf_test": ("onnx", read_perf_test)}
"""Start of the program's name -> (target that it runs, what reads its output)."""
MACHINES = {"arm64-v8a": 183, "armeabi-v7a": 40, "x86_64": 62, "x86": 3}
"""Android's names of processors, and those of ELF files."""
THERMAL = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")


class AdbDevice:
    """One Android device."""

    def __init__(self, serial: str, settings: DeviceSettings) -> None:
        if not re.fullmatch(r"[\w.:-]+", serial):
            raise DeviceError(f"'{serial}' is no serial number; see the first column of: adb devices")
        if settings.runner is None:
            raise DeviceError(f"--device adb needs --runner FILE: {' or '.join(TOOLS)}, built for Android")
        self._tool = next((name for name in TOOLS if settings.runner.name.startswith(name)), None)
        if self._tool is None or not settings.runner.is_file():
            raise DeviceError(f"--runner {settings.runner.name} is {'no file' if self._tool else 'no program that is known'}; expected {' or '.join(TOOLS)}")
        self._serial, self._settings, self._what = serial, settings, f"adb:{serial}"
        self._bundle, self._artefacts, self._pushed = Path(), list[Artefact](), False
        state = self._adb(["get-state"], timeout=20).strip()
        if state != "device":
            raise DeviceError(f"{self._what}: its state is '{state}', expected 'device'; unlock it and allow USB debugging")
        self._abi = self._shell("getprop ro.product.cpu.abi").strip()
        self.facts: dict[str, Any] = {"kind": "adb", "label": settings.label or self._shell("getprop ro.product.model").strip()}
        self.note: str | None = None

    def push(self, bundle: Path, known: Sequence[Line]) -> None:
        """Program and artefacts. Raises DeviceError: another processor, no space, nothing that the program runs."""
        assert self._settings.runner is not None
        found = elf_machine(self._settings.runner)
        if self._abi in MACHINES and found is not None and found != MACHINES[self._abi]:
            built = next((name for name, number in MACHINES.items() if number == found), f"machine {found}")
            raise DeviceError(f"{self._what}: {self._settings.runner.name} was built for {built}, the device is {self._abi}; bring one that was built for it")
        target = TOOLS[str(self._tool)][0]
        manifest = read_manifest(bundle)
        done = {row["artefact"] for row in known if row["kind"] in ("latency", "latency_summary")}
        every = [artefact for artefact in manifest.artefacts if artefact.target == target and artefact.status == "proven" and artefact.path]
        # a fixed batch of 1 where there is one: the programs fill open dimensions with 1 at best
        fixed = {(artefact.tower, artefact.precision) for artefact in every if artefact.batch == "1"}
        self._artefacts = [a for a in every if a.id not in done and (a.batch == "1" or (a.tower, a.precision) not in fixed)]
        if not every:
            raise DeviceError(f"bundle '{manifest.name}' has no proven artefact for {self._tool}; export one with --target {target}")
        paths = [self._settings.runner, *(bundle / str(artefact.path) for artefact in self._artefacts)]
        size = sum(path.stat().st_size for path in paths)
        free = read_df(self._shell("df -k /data/local/tmp"))
        if free is not None and free < size + 16 * 2**20:
            raise DeviceError(f"{self._what}: {free / 2**20:.0f} MB are free there, {size / 2**20 + 16:.0f} are needed; make room")
        self._bundle, self._pushed = bundle, True
        self._shell(f"mkdir -p {PLACE}")
        for path, name in zip(paths, ["runner", *(artefact.id for artefact in self._artefacts)], strict=True):
            self._adb(["push", str(path), f"{PLACE}/{name}"], timeout=max(120.0, self._settings.timeout))
        self._shell(f"chmod 755 {PLACE}/runner")

    def run(self) -> Iterator[Line]:
        """One artefact after the other, with the state of the device around it."""
        read = TOOLS[str(self._tool)][1]
        for artefact in self._artefacts:
            before = self.state()
            printed = self._shell(self.command(artefact), timeout=self._settings.timeout)
            text = printed if self._tool == "benchmark_model" else self._shell(f"cat {PLACE}/result.csv")
            found = read(text, f"the output of {self._tool}", printed, "")
            peak = re.search(r"mclip VmHWM:\s+(\d+) kB", printed)
            if peak:
                found.memory = int(peak.group(1)) * 1024
            found.figures |= {"before": before, "after": self.state()}
            for row in lines_of_tool(found, tower=artefact.tower, artefact=artefact.id, bundle=self._bundle, threads=self._settings.threads):
                processor = {"model": before.get("soc"), "governor": before.get("governor")}
                row["environment"] = {"processor": processor, "system": {"name": "Android", "release": before.get("android")}}
                yield row

    def command(self, artefact: Artefact) -> str:
        """The line for the device's shell: the program in the background, its largest memory read from /proc while it runs."""
        settings = self._settings
        if self._tool == "benchmark_model":
            options = [f"--graph={PLACE}/{artefact.id}", f"--num_threads={settings.threads}", "--num_runs=64", f"--min_secs={settings.seconds:g}"]
            options += ["--warmup_min_secs=0.5", "--use_xnnpack=true"]
        else:
            options = ["-e", "cpu", "-m", "duration", "-t", f"{max(1, round(settings.seconds))}", "-x", str(settings.threads), "-y", "1", "-I"]
            options += [f"{PLACE}/{artefact.id}", "result.csv"]
        pinned = f"taskset {sum(1 << core for core in settings.cores):x} " if settings.cores else ""
        watch = 'while grep VmHWM /proc/$pid/status >peak.now 2>/dev/null && [ -s peak.now ]; do cp peak.now peak; sleep 0.1; done; wait $pid; code=$?'
        return f"cd {PLACE} && rm -f result.csv peak && {{ {pinned}./runner {shlex.join(options)} 2>&1 & pid=$!; {watch}; echo mclip $(cat peak 2>/dev/null); exit $code; }}"

    def state(self) -> dict[str, Any]:
        """Chip, system, heat, battery, governors, free memory, as far as the device tells."""
        found: dict[str, Any] = {name: self._shell(f"getprop {key}").strip() for name, key in (("soc", "ro.soc.model"), ("android", "ro.build.version.release"))}
        found |= read_thermal(self._shell("dumpsys thermalservice"))
        found |= read_battery(self._shell("dumpsys battery"))
        found |= read_meminfo(self._shell("cat /proc/meminfo"))
        governors = self._shell("cat /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor 2>/dev/null || true").split()
        found["governor"] = ", ".join(sorted(set(governors))) or None
        return {name: value for name, value in found.items() if value not in (None, "", {})}

    def pull(self) -> list[Line]:
        """Everything came by `run`."""
        return []

    def close(self) -> None:
        """Remove the folder there."""
        if self._pushed:
            self._shell(f"rm -rf {PLACE}")

    def _shell(self, command: str, timeout: float = 30) -> str:
        return self._adb(["shell", command], timeout=timeout)

    def _adb(self, arguments: Sequence[str], timeout: float) -> str:
        try:
            done = subprocess.run(["adb", "-s", self._serial, *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False)
        except FileNotFoundError:
            raise DeviceError("there is no adb on this machine; install it (Debian: adb)") from None
        except subprocess.TimeoutExpired:
            raise DeviceError(f"{self._what}: no answer to '{arguments[0]}' within {timeout:.0f} s; plug it in again, or raise --device-timeout") from None
        out, errors = done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
        if done.returncode:
            said = errors.splitlines() + out.splitlines()[-5:]
            if re.search(r"device '.*' not found", errors):
                raise DeviceError(f"{self._what}: adb knows no such device; see: adb devices")
            raise DeviceError(blame(self._what, done.returncode, said))
        return out


def elf_machine(path: Path) -> int | None:
    """The processor that a program was built for, as a number of the ELF header; None for other files."""
    with path.open("rb") as file:
        head = file.read(20)
    return struct.unpack_from("<H", head, 18)[0] if head[:4] == b"\x7fELF" and len(head) == 20 else None


def read_thermal(text: str) -> dict[str, Any]:
    """`dumpsys thermalservice`: {"thermal_status": "none"…"shutdown", "temperatures_c": {sensor: degrees}}, of the current temperatures."""
    found: dict[str, Any] = {}
    if status := re.search(r"Thermal Status:\s*(\d+)", text):
        number = int(status.group(1))
        found["thermal_status"] = THERMAL[number] if number < len(THERMAL) else str(number)
    current = text.split("Current temperatures from HAL:")[-1].split("Current cooling devices")[0]
    heat = {name: float(value) for value, name in re.findall(r"Temperature\{mValue=(-?[\d.]+), mType=-?\d+, mName=([^,}]+)", current)}
    if heat:
        found["temperatures_c"] = heat
    return found


def read_battery(text: str) -> dict[str, Any]:
    """`dumpsys battery`: {"battery_percent", "battery_c", "charging"}."""
    values = dict(re.findall(r"^\s*([A-Za-z ]+):\s*(\S+)\s*$", text, re.MULTILINE))
    found: dict[str, Any] = {}
    if values.get("level", "").isdigit():
        found["battery_percent"] = int(values["level"])
    if re.fullmatch(r"-?\d+", values.get("temperature", "")):
        found["battery_c"] = int(values["temperature"]) / 10
    powered = [values[name] == "true" for name in ("AC powered", "USB powered", "Wireless powered", "Dock powered") if name in values]
    if powered:
        found["charging"] = any(powered)
    return found


def read_meminfo(text: str) -> dict[str, Any]:
    """/proc/meminfo: {"memory_bytes", "memory_free_bytes"}."""
    values = {name: int(number) * 1024 for name, number in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    return {ours: values[theirs] for ours, theirs in (("memory_bytes", "MemTotal"), ("memory_free_bytes", "MemAvailable")) if theirs in values}


def read_df(text: str) -> int | None:
    """Free bytes of the last line of `df -k`; None when it cannot be read."""
    words = text.strip().splitlines()[-1].split() if text.strip() else []
    return int(words[3]) * 1024 if len(words) >= 4 and words[3].isdigit() else None


def open_adb(name: str, settings: DeviceSettings) -> AdbDevice:
    """Ask the device for its state. Raises DeviceError in one sentence."""
    return AdbDevice(name, settings)
