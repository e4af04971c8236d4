"""``martlet compare`` and ``martlet plan`` as a user calls them."""

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
