"""What a board tells of itself: model, chip, power mode, temperatures, clocks. Jetsons by nvpmodel and tegrastats, others by what Linux shows.

Nothing that identifies one specimen (serial numbers, addresses, host names) is read.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any


def board_facts(root: Path = Path("/")) -> dict[str, Any]:
    """Facts of this machine; what it does not tell is left out."""
    found: dict[str, Any] = {}
    model = _read(root / "proc/device-tree/model")
    if model:
        found["model"] = model.replace("\0", "").strip()
    release = _read(root / "etc/nv_tegra_release")
    if release:
        found["l4t"] = " ".join(re.findall(r"R\d+|REVISION: [\d.]+", release))
    if shutil.which("nvpmodel"):
        found |= read_nvpmodel(_output(["nvpmodel", "-q"]))
    if shutil.which("tegrastats"):
        line = _output(["tegrastats", "--interval", "200"], lines=1)
        if line:
            found["tegrastats"] = read_tegrastats(line)
    found["temperatures_c"] = temperatures(root)
    found["clocks_mhz"] = clocks(root)
    found["governors"] = sorted({text for path in sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")) if (text := _read(path))})
    return {name: value for name, value in found.items() if value}


def read_nvpmodel(text: str) -> dict[str, Any]:
    """Output of `nvpmodel -q`: {"power_mode": "MAXN", "power_mode_id": 0}; empty when it says nothing."""
    name, number = re.search(r"NV Power Mode\s*:\s*(\S+)", text), re.search(r"^\s*(\d+)\s*$", text, re.MULTILINE)
    return ({"power_mode": name.group(1)} if name else {}) | ({"power_mode_id": int(number.group(1))} if number else {})


def read_tegrastats(line: str) -> dict[str, Any]:
    """One line of tegrastats, of JetPack 4 to 6.

    Returns:
        {"ram_mb", "ram_total_mb", "gpu_percent", "gpu_mhz", "cpu": [{"percent", "mhz"} or None for a core that is off], "temperatures_c": {…},
        "rails_mw": {name: {"now", "mean"}}}, as far as the line has them.
    """
    found: dict[str, Any] = {}
    if ram := re.search(r"RAM (\d+)/(\d+)MB", line):
        found["ram_mb"], found["ram_total_mb"] = int(ram.group(1)), int(ram.group(2))
    if gpu := re.search(r"GR3D_FREQ (\d+)%(?:@\[?(\d+))?", line):
        found["gpu_percent"] = int(gpu.group(1))
        if gpu.group(2):
            found["gpu_mhz"] = int(gpu.group(2))
    if cpu := re.search(r"CPU \[([^\]]*)\]", line):
        cores = [re.fullmatch(r"(\d+)%@(\d+)", core.strip()) for core in cpu.group(1).split(",")]
        found["cpu"] = [{"percent": int(core.group(1)), "mhz": int(core.group(2))} if core else None for core in cores]
    heat = {name: float(value) for name, value in re.findall(r"\b([A-Za-z][\w]*)@(-?\d+(?:\.\d+)?)C", line) if float(value) > -200}
    if heat:
        found["temperatures_c"] = heat
    rails = {name: {"now": int(now), "mean": int(mean)} for name, now, mean in re.findall(r"\b((?:VDD|VIN|POM|NC)_?\w*|CV|SOC) (\d+)(?:mW)?/(\d+)(?:mW)?", line)}
    if rails:
        found["rails_mw"] = rails
    return found


def temperatures(root: Path = Path("/")) -> dict[str, float]:
    """Degrees Celsius by zone."""
    found = {}
    for zone in sorted(root.glob("sys/class/thermal/thermal_zone*")):
        name, value = _read(zone / "type"), _read(zone / "temp")
        if name and value and re.fullmatch(r"-?\d+", value) and -100_000 < int(value) < 200_000:
            found[name] = int(value) / 1000
    return found


def clocks(root: Path = Path("/")) -> list[int]:
    """Present clock of each core, MHz."""
    found = [_read(path) for path in sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"))]
    return [int(value) // 1000 for value in found if value and value.isdecimal()]


def _output(command: list[str], lines: int | None = None) -> str:
    """What a command prints within five seconds; with `lines`, it is ended after so many (tegrastats never ends by itself)."""
    try:
        if lines is None:
            return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout
        with subprocess.Popen(["timeout", "5", *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            found = "".join(process.stdout.readline() for _ in range(lines))
            process.kill()
            return found
    except (OSError, subprocess.SubprocessError):
        return ""


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
