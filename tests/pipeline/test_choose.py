"""Choosing a file: fronts and budgets against a brute-force search, the picture, and the command."""

import json
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.choose import bytes_of, choose, picture
from pipeline.errors import UserError

# The default release of November 2026: bytes, mean KL, decode tokens/s.
FILES = {
    "q8_0": (107_200_000, 0.0035, 134.5),
    "q5_k_m": (85_500_000, 0.0827, 114.2),
    "q4_k_m": (81_100_000, 0.0496, 129.1),
    "q4f32_1": (59_400_000, 0.3804, 118.6),
    "fp32": (398_700_000, 1e-9, 40.3),
    "int4": (87_800_000, 0.1310, 111.8),
}


def release(folder: Path, files: dict[str, Any], **changes: Any) -> Path:
    fidelity, device = [], []
    for name, (size, kl, speed) in files.items():
        shared = {"file": name, "format": "gguf", "quantization": name, "bytes": size}
        fidelity.append({**shared, "mean_kl": kl, "passed": name != changes.get("failed")})
        if name != changes.get("not_measured"):
            memory = size + 40_000_000
            device.append(
                {
                    **shared,
                    "decode_tokens_per_s": speed,
                    "peak_rss_bytes": memory,
                    "reliable": True,
                    "threads": 1,
                }
            )
    report = {"fidelity": fidelity, "device": device, "machine": "x86_64"}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


@pytest.mark.parametrize(
    ("budget", "ship"),
    [
        # As faithful as float32 for every purpose, three times as fast and a quarter of the size.
        ({}, "q8_0"),
        ({"max_size": 100_000_000}, "q4_k_m"),
        ({"max_size": 80_000_000}, "q4f32_1"),
        ({"max_memory": 110_000_000}, "q4f32_1"),
        ({"min_speed": 130.0}, "q8_0"),
        ({"max_size": 100_000_000, "min_speed": 130.0}, None),
        ({"max_size": 50_000_000}, None),
    ],
)
def test_the_default_release(tmp_path: Path, budget: dict[str, Any], ship: str | None) -> None:
    choice = choose(release(tmp_path, FILES), **budget)
    assert choice["ship"] == ship
    # A front is of the release, whatever the budget; the others are larger, further away and slower.
    front = {file["file"] for file in choice["files"] if file["on_front"]}
    assert front == {"fp32", "q8_0", "q4_k_m", "q4f32_1"}
    sizes = [file["bytes"] for file in choice["files"]]
    assert sizes == sorted(sizes)


points = st.tuples(st.integers(1, 9), st.sampled_from([0.001, 0.005, 0.02, 0.1, 0.5]), st.integers(1, 9))


@settings(max_examples=60, deadline=None)
@given(st.lists(points, min_size=1, max_size=8), st.integers(0, 10), st.integers(0, 10))
def test_front_and_choice_against_every_pair(
    tmp_path_factory: pytest.TempPathFactory, found: list[Any], size: int, speed: int
) -> None:
    files = {f"f{number}": point for number, point in enumerate(found)}
    folder = release(tmp_path_factory.mktemp("release"), files)
    choice = choose(folder, max_size=size, min_speed=speed)
    for file in choice["files"]:
        b, kl, s = files[file["file"]]
        beaten = any(
            x <= b and y <= kl and z >= s and (x < b or y < kl or z > s) for x, y, z in files.values()
        )
        assert file["on_front"] is not beaten
        assert file["fits"] is (b <= size and s >= speed)
    fitting = [files[file["file"]] for file in choice["files"] if file["fits"]]
    assert (choice["ship"] is None) is (not fitting)
    if fitting:
        b, kl, s = files[choice["ship"]]
        faithful = [point for point in fitting if point[1] <= max(0.01, min(y for _, y, _ in fitting))]
        assert (b, kl, s) in faithful
        assert s >= 0.95 * max(z for _, _, z in faithful)
        assert all(x >= b for x, _, z in faithful if z >= s)


def test_what_missed_a_gate_or_was_not_measured_is_not_shipped(tmp_path: Path) -> None:
    choice = choose(release(tmp_path, FILES, failed="q8_0", not_measured="q4_k_m"), min_speed=1.0)
    why = {file["file"]: file["why_not"] for file in choice["files"]}
    assert why["q8_0"] == "missed a gate"
    assert why["q4_k_m"] == "was not measured"
    assert choice["ship"] == "fp32"
    assert not next(file for file in choice["files"] if file["file"] == "q8_0")["on_front"]


def test_the_picture_names_every_file_and_rings_one(tmp_path: Path) -> None:
    choice = choose(release(tmp_path, FILES), max_size=100_000_000)
    svg = picture(choice)
    texts = [element.text or "" for element in xml.etree.ElementTree.fromstring(svg).iter() if element.text]
    for name, (_, _, speed) in FILES.items():
        assert any(text.startswith(f"{name}, {speed:.0f} tok/s") for text in texts)
    assert picture({**choice, "ship": None}) != svg


@pytest.mark.parametrize(
    ("text", "count"),
    [("80MB", 80_000_000), ("1.5 gb", 1_500_000_000), ("64MiB", 67_108_864), ("900kB", 900_000), ("12", 12)],
)
def test_sizes(text: str, count: int) -> None:
    assert bytes_of(text, "--max-size") == count


def test_what_is_no_size_and_no_release(tmp_path: Path) -> None:
    for wrong in ("", "80 elephants", "-3MB", "MB"):
        with pytest.raises(UserError, match=r"--max-size: .* is no size"):
            bytes_of(wrong, "--max-size")
    with pytest.raises(UserError, match=r"report\.json: is missing or no report"):
        choose(tmp_path)
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(UserError, match="give a release folder"):
        choose(tmp_path)
