"""``martlet compare`` and ``martlet plan`` as a user calls them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., tuple[int, str, str]]
Write = Callable[[dict[str, Any]], Path]


@pytest.mark.parametrize(
    ("command", "options", "in_sentence"),
    [
        ("compare", ("--objectives", "magic"), "no 'magic'"),
        ("compare", ("--objectives", ""), "name at least one"),
        (
            "compare",
            ("--objectives", "taid", "--seeds", "0,0"),
            "'0,0' is no list of different whole numbers",
        ),
        ("compare", ("--objectives", "taid", "--seeds", "-1"), "'-1' is no list"),
        ("compare", ("--objectives", "taid", "--tokens", "1", "--schedule", "alpha=1/N"), "less than one"),
        ("compare", ("--schedule", "beta=2"), "beta"),
        ("plan", ("--precision", "int4"), "choose bf16 or fp32"),
        ("plan", ("--tflops", "0"), "--tflops: 0.0 is no throughput"),
        ("plan", ("--devices", "0"), "--devices"),
    ],
)
def test_wrong_options_end_in_one_sentence(
    martlet: Call,
    tiny_recipe: dict[str, Any],
    write_recipe: Write,
    tmp_path: Path,
    command: str,
    options: tuple[str, ...],
    in_sentence: str,
) -> None:
    recipe = write_recipe(tiny_recipe)
    if command == "compare":
        options += ("--store", str(tmp_path / "store"), "--output", str(tmp_path / "comparison"))
    code, out, err = martlet(command, recipe, *options)
    assert code == 2
    assert out == ""
    assert in_sentence in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "comparison").exists()


def test_compare(martlet: Call, tiny_recipe: dict[str, Any], write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe(tiny_recipe)
    arguments = ("--objectives", "forward_kl", "--schedule", "t_start=0.2", "--tokens", "128")
    folders = ("--store", tmp_path / "store", "--output", tmp_path / "comparison")
    code, out, err = martlet("compare", recipe, *arguments, *folders, "--json")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert {entry["label"] for entry in result["contenders"]} == {"forward_kl", "taid: t_start 0.2"}
    assert all(Path(file).is_file() for file in result["files"])
    code, out, err = martlet("compare", recipe, *arguments, *folders)
    assert code == 0, err
    assert "student before" in out
    assert "forward_kl" in out


def test_plan(martlet: Call, tiny_recipe: dict[str, Any], write_recipe: Write, tmp_path: Path) -> None:
    code, out, err = martlet(
        "plan", write_recipe(tiny_recipe), "--tokens-per-second", "64", "--device-memory", "1"
    )
    assert code == 0, err
    assert "parameters" in out
    assert "fits in 1 GB" in out
    assert not (tmp_path / "store").exists()
