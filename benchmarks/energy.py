"""Joules, where the machine counts them: Intel and AMD packages (RAPL), power rails of boards (INA sensors, as on Jetsons).

Where it counts none, the answer is "not measured" with the reason, never an estimate from a data sheet.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
HWMON = Path("/sys/class/hwmon")
RAILS = ("VDD_IN", "VIN_SYS_5V0", "POM_5V_IN")
"""Names of the rail that feeds a whole board."""
INTERVAL = 0.05


@dataclass(slots=True)
class Meter:
    """A counter of joules. `name` is what is counted, None when nothing is; `reason` then says why.

    RAPL counts by itself and is read at both ends. Rails show watts, which a thread adds up twenty times a second between `read` and `since`.
    """

    name: str | None = None
    reason: str | None = None
    counters: Mapping[Path, int] = field(default_factory=dict)
    """energy_uj of each package -> where it starts over."""
    rails: tuple[tuple[Path, Path], ...] = ()
    """Files of millivolts and milliamperes."""
    _stop: threading.Event | None = None
    _joules: float = 0.0

    def read(self) -> dict[Path, int]:
        """The start of a measurement."""
        if self.rails:
            self._joules, self._stop = 0.0, threading.Event()
            threading.Thread(target=self._add_up, args=(self._stop,), daemon=True).start()
        return {path: int(path.read_text(encoding="ascii")) for path in self.counters}

    def since(self, before: Mapping[Path, int]) -> float | None:
        """Joules since `read` gave `before`; None when nothing is counted. A counter may have started over once."""
        if self._stop is not None:
            self._stop.set()
            self._stop = None
            return self._joules
        if not self.counters:
            return None
        total = 0
        for path, start in before.items():
            now = int(path.read_text(encoding="ascii"))
            total += now - start if now >= start else now + self.counters[path] - start
        return total / 1e6

    def _add_up(self, stop: threading.Event) -> None:
        last = time.perf_counter()
        while not stop.wait(INTERVAL):
            now = time.perf_counter()
            watts = sum(int(volts.read_text(encoding="ascii")) * int(amperes.read_text(encoding="ascii")) / 1e6 for volts, amperes in self.rails)
            self._joules += watts * (now - last)
            last = now


def open_meter(powercap: Path = POWERCAP, hwmon: Path = HWMON) -> Meter:
    """The best counter of this machine. Only whole packages are counted (a core's counter is part of its package's)."""
    counters, locked = {}, False
    for folder in sorted(powercap.glob("intel-rapl:*")) if powercap.is_dir() else []:
        if folder.name.count(":") != 1:
            continue
        try:
            int((folder / "energy_uj").read_text(encoding="ascii"))
            counters[folder / "energy_uj"] = int((folder / "max_energy_range_uj").read_text(encoding="ascii"))
        except PermissionError:
            locked = True
        except (OSError, ValueError):
            continue
    if counters:
        return Meter(name=f"RAPL, {len(counters)} package{'s' if len(counters) > 1 else ''}", counters=counters)
    rails = []
    for label in sorted(hwmon.glob("hwmon*/in*_label")) if hwmon.is_dir() else []:
        try:
            if label.read_text(encoding="utf-8").strip() in RAILS:
                volts = label.with_name(label.name.replace("_label", "_input"))
                amperes = label.with_name(volts.name.replace("in", "curr", 1))
                int(volts.read_text(encoding="ascii")), int(amperes.read_text(encoding="ascii"))
                rails.append((volts, amperes))
        except (OSError, ValueError):
            continue
    if rails:
        return Meter(name="power rail of the board", rails=tuple(rails))
    why = "the energy counters of this machine are readable by its administrator only" if locked else "this machine has no energy counter that can be read"
    return Meter(reason=why)
