"""The examples run, learn something, and the notebook's stored outputs are what its cells print."""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return runpy.run_path(str(EXAMPLES / name), run_name="example")["main"]()


def test_plain_loop_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = run("plain_loop.py", monkeypatch, "--steps", "12")
    assert len(losses) == 12
    assert losses[-1] < losses[0]


def test_trainer_brings_the_student_nearer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before, after = run("with_trainer.py", monkeypatch, "--output", str(tmp_path / "out"))
    assert after < 0.9 * before
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_notebook_prints_what_it_shows() -> None:
    notebook = json.loads((EXAMPLES / "taid_by_hand.ipynb").read_text(encoding="utf-8"))
    scope: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec("".join(cell["source"]), scope)
        shown = "".join(line for output in cell["outputs"] for line in output["text"])
        assert printed.getvalue() == shown
