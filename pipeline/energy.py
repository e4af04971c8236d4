"""Energy that work takes: from the machine's own counter where it has one, else a modelled range.

The kernel's powercap interface counts whole processor packages (RAPL): what else runs meanwhile counts, too.
"""

from pathlib import Path
from typing import Any

COUNTERS = Path("/sys/class/powercap")
WATTS_LOW, WATTS_HIGH = 2.0, 15.0
"""What a busy processor of a computer takes by the model: package powers that makers publish, over cores, are
about 4 W for large servers and 9 to 15 W for desktops and laptops; clocked down it is less."""


class EnergyCounter:
    """Joules of all processor packages since this was made."""

    def __init__(self) -> None:
        self._zones = readable_zones()
        self._last = [_number(zone / "energy_uj") for zone in self._zones]

    def joules(self) -> float | None:
        """None where no counter can be read (often only root may); one that began anew is allowed for."""
        now = [_number(zone / "energy_uj") for zone in self._zones]
        total = 0.0
        for zone, before, after in zip(self._zones, self._last, now, strict=True):
            if before is None or after is None:
                return None
            round_trip = 0 if after >= before else (_number(zone / "max_energy_range_uj") or 0)
            total += (after - before + round_trip) / 1e6
        return total if self._zones else None


def readable_zones() -> list[Path]:
    """The powercap zones of whole packages, not of their parts, that this process may read."""
    zones = sorted(COUNTERS.glob("intel-rapl:*")) if COUNTERS.is_dir() else []
    return [zone for zone in zones if zone.name.count(":") == 1 and _number(zone / "energy_uj") is not None]


def energy_per_token(joules: float | None, processor_seconds: float, tokens: int) -> dict[str, Any]:
    """What ``report.json`` says of energy.

    Args:
        joules: of ``EnergyCounter``, None where there is no counter.
        processor_seconds: processor time of the same work, all threads.
        tokens: of the same work.

    Returns:
        {source, joules_per_token_low, joules_per_token_high}: source is "counter" (low and high are equal),
        or "model", processor time times WATTS_LOW and WATTS_HIGH.
    """
    low, high = (processor_seconds * watts for watts in (WATTS_LOW, WATTS_HIGH))
    if joules is not None:
        low = high = joules
    return {
        "source": "model" if joules is None else "counter",
        "joules_per_token_low": low / tokens,
        "joules_per_token_high": high / tokens,
    }


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
