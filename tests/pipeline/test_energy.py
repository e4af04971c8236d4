"""The energy counter on folders like the kernel's, and the model's arithmetic."""

from pathlib import Path

import pytest

from pipeline import energy


def zone(folder: Path, name: str, microjoules: int | None, full: int = 1_000_000_000) -> Path:
    made = folder / name
    made.mkdir(parents=True)
    (made / "max_energy_range_uj").write_text(f"{full}\n")
    if microjoules is not None:
        (made / "energy_uj").write_text(f"{microjoules}\n")
    return made


@pytest.fixture
def counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(energy, "COUNTERS", tmp_path)
    return tmp_path


def test_packages_are_added_and_their_parts_are_not(counters: Path) -> None:
    packages = [zone(counters, f"intel-rapl:{number}", 1_000_000) for number in range(2)]
    part = zone(counters, "intel-rapl:0:0", 500)
    counter = energy.EnergyCounter()
    (packages[0] / "energy_uj").write_text("3500000")
    (packages[1] / "energy_uj").write_text("1250000")
    (part / "energy_uj").write_text("900000000")
    assert counter.joules() == pytest.approx(2.75)


def test_a_counter_that_began_anew_is_allowed_for(counters: Path) -> None:
    package = zone(counters, "intel-rapl:0", 999_000_000)
    counter = energy.EnergyCounter()
    (package / "energy_uj").write_text("2000000")
    assert counter.joules() == pytest.approx(3.0)


def test_without_a_counter_that_can_be_read_there_are_no_joules(counters: Path) -> None:
    assert energy.EnergyCounter().joules() is None
    zone(counters, "intel-rapl:0", None)
    assert energy.EnergyCounter().joules() is None


def test_a_counter_that_goes_away_gives_none(counters: Path) -> None:
    package = zone(counters, "intel-rapl:0", 5)
    counter = energy.EnergyCounter()
    (package / "energy_uj").unlink()
    assert counter.joules() is None


def test_measured_and_modelled_energy_are_told_apart() -> None:
    assert energy.energy_per_token(30.0, 8.0, 60) == {
        "source": "counter",
        "joules_per_token_low": 0.5,
        "joules_per_token_high": 0.5,
    }
    modelled = energy.energy_per_token(None, 8.0, 60)
    assert modelled["source"] == "model"
    assert modelled["joules_per_token_low"] == pytest.approx(8 * 2 / 60)
    assert modelled["joules_per_token_high"] == pytest.approx(8 * 15 / 60)
