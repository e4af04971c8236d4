"""The lines of the model cards, run as they stand, on a tiny release of real files."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from release_artifacts import example_artifacts, example_recipe, example_stage_times

from export.gguf import export_gguf
from export.mlc import export_mlc
from export.onnx import export_onnx
from pipeline import cards, report
from pipeline.artifacts import Store

ROOT = Path(__file__).parents[2]
KINDS = ("Tiny", "Tiny-Instruct", "Tiny-Instruct-GGUF", "Tiny-Instruct-ONNX", "Tiny-Instruct-q4f32_1-MLC")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """Folders of a release with real files of the tiny model, and the cards that martlet writes for it."""
    folder = tmp_path_factory.mktemp("cards")
    recipe = example_recipe(name="Tiny", export={"gguf": ["q8_0"], "mlc": ["q4f32_1"], "onnx": ["int4"]})
    artifacts = example_artifacts(Store(folder / "store", report=lambda line: None), recipe)
    facts = report.collect(recipe, artifacts, example_stage_times(artifacts))
    for entry in facts["fidelity"]:
        if entry["format"] == "gguf":
            entry["file"] = "tiny-instruct-q8_0.gguf"
    root = folder / "release"
    for name in KINDS[:2]:
        shutil.copytree(tiny_model_dir, root / name)
    export_gguf(tiny_model_dir, root / KINDS[2], "tiny-instruct", ["q8_0"], pre_tokenizer="smollm")
    export_onnx(tiny_model_dir, root / KINDS[3], "Tiny-Instruct", ["int4"], threads=1)
    export_mlc(tiny_model_dir, root / KINDS[4], "Tiny-Instruct", "q4f32_1")
    for name, text in cards.model_cards(recipe, facts).items():
        (root / name / "README.md").write_text(text, encoding="utf-8")
    return root


def run(release: Path, *command: str, stdin: str = "") -> str:
    finished = subprocess.run(
        command,
        cwd=release,
        input=stdin,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HOME": str(release)},
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.slow
@pytest.mark.parametrize("folder", KINDS[:4])
def test_python_of_each_card_runs(release: Path, folder: str) -> None:
    text = (release / folder / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert run(release, sys.executable, "-c", block).strip()


@pytest.mark.slow
@pytest.mark.parametrize("folder", [KINDS[2], KINDS[4]])
def test_martlet_talks_with_what_the_card_names(release: Path, folder: str) -> None:
    text = (release / folder / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^martlet (chat .*)$", text, flags=re.MULTILINE)
    arguments = [*line.split(), "--max-tokens", "4"]
    assert run(release, sys.executable, "-m", "flows.command_line", *arguments, stdin="What is rain?\n")


@pytest.mark.slow
def test_transformers_js_is_told_what_is_there(release: Path) -> None:
    """What the library looks for with the card's dtype, checked against the folder; node itself runs it where
    the web page is tested."""
    text = (release / KINDS[3] / "README.md").read_text(encoding="utf-8")
    (dtype,) = re.findall(r'dtype: "(\w+)"', text)
    file = {"fp32": "model.onnx", "q8": "model_quantized.onnx", "q4": "model_q4.onnx"}[dtype]
    assert (release / KINDS[3] / "onnx" / file).is_file()
    settings = json.loads((release / KINDS[3] / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["chat_template"]
