"""The command ``martlet evaluate`` on a file of one's own."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from export.gguf import export_gguf


def test_the_command_on_a_file_with_data_of_ones_own(
    martlet: Callable[..., tuple[int, str, str]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    (file,) = export_gguf(tiny_model_dir, tmp_path / "files", "tiny", ["q8_0"], pre_tokenizer="smollm")
    text = tmp_path / "mine.txt"
    text.write_text("The martlet is a small swallow that never lands.", encoding="utf-8")
    output = tmp_path / "evaluation.json"
    arguments = ("evaluate", file, "--tasks", "held_out_text", "--text", text, "--output", output)
    code, out, err = martlet(*arguments, "--threads", "1", "--json")
    assert code == 0, err
    said = json.loads(out.splitlines()[-1])
    assert said["results"] == json.loads(output.read_text(encoding="utf-8"))["results"]
    code, out, _ = martlet(*arguments, "--threads", "1", "--quiet")
    assert code == 0
    assert "bits_per_byte" in out


def test_without_the_harness_the_command_says_what_to_install(
    martlet: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # how Python marks a module that cannot be imported
    code, out, err = martlet("evaluate", tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("martlet: martlet evaluate needs lm-evaluation-harness")
