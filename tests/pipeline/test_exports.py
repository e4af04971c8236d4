"""What the exports' files say of themselves, read back by the gguf package, and what they are known by."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from pipeline import exports
from pipeline.artifacts import Artifact, Store
from pipeline.recipe import Recipe


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"), report=lambda line: None)


def fields(store: Store, recipe: Recipe, instruct: Artifact) -> dict[str, Any]:
    """What the file of a recipe says under ``general``; the tiny teacher stands for the tuned student."""
    made = exports.run(store, recipe, instruct, "gguf")
    found = GGUFReader(made.path / "files" / "tiny-instruct-q8_0.gguf").fields
    return {name.removeprefix("general."): field.contents() for name, field in found.items()}


GGUF = {"gguf": ["q8_0"], "mlc": [], "onnx": [], "pre_tokenizer": "smollm"}
TAGS = ["distillation", "taid", "martlet", "on-device", "conversational", "text-generation"]


def test_gguf_of_a_given_student_names_it_and_the_teacher(
    shared_store: Store, make_recipe: Callable[..., Recipe], tiny_teacher: Artifact
) -> None:
    recipe = make_recipe(
        "someone/big-7B",
        export=GGUF,
        language=["no", "ja"],
        teacher__licence="MIT",
        data__text__licence="CC-BY-SA-4.0",
        data__chats__sources=["dataset:someone/chats", "dataset:someone/more:part"],
        student={"model": "someone/small-1B", "revision": "abc123", "licence": "Apache-2.0"},
    )
    said = fields(shared_store, recipe, tiny_teacher)
    assert said["name"] == "tiny-instruct"
    assert said["license"] == "cc-by-sa-4.0"
    assert "license.name" not in said
    assert said["languages"] == ["no", "ja"]
    assert said["tags"] == TAGS
    assert said["base_model.count"] == 2
    assert {name: value for name, value in said.items() if name.startswith("base_model.0.")} == {
        "base_model.0.name": "small-1B",
        "base_model.0.organization": "someone",
        "base_model.0.version": "abc123",
        "base_model.0.repo_url": "https://huggingface.co/someone/small-1B",
        "base_model.0.description": "The student whose changed version this is.",
    }
    assert said["base_model.1.repo_url"] == "https://huggingface.co/someone/big-7B"
    assert said["base_model.1.description"] == "The teacher that the student learned from."
    assert said["dataset.count"] == 2
    assert said["dataset.1.repo_url"] == "https://huggingface.co/someone/more"


def test_gguf_of_a_local_teacher_leaks_no_path(
    shared_store: Store, make_recipe: Callable[..., Recipe], tiny_teacher: Artifact, tiny_model_dir: Path
) -> None:
    recipe = make_recipe(export=GGUF, teacher__licence="LicenseRef-mine", distill={"objective": "forward_kl"})
    said = fields(shared_store, recipe, tiny_teacher)
    assert said["base_model.count"] == 1
    assert said["base_model.0.name"] == tiny_model_dir.name
    assert "base_model.0.repo_url" not in said
    assert str(tiny_model_dir.parent) not in str(said)
    assert (said["license"], said["license.name"]) == ("other", "LicenseRef-mine")
    assert said["languages"] == ["en"]  # of the packaged text
    assert said["tags"] == [tag for tag in TAGS if tag != "taid"]


def test_gguf_depends_on_what_it_says_and_other_formats_do_not(
    shared_store: Store,
    make_recipe: Callable[..., Recipe],
    tiny_teacher: Artifact,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known: list[dict[str, Any]] = []

    def keep(stage: str, version: int, parameters: dict[str, Any], *rest: Any) -> None:
        known.append(parameters)

    monkeypatch.setattr(shared_store, "get_or_make", keep)
    for language in (["en"], ["ja"]):
        recipe = make_recipe(language=language)
        for format in exports.FORMATS:
            exports.run(shared_store, recipe, tiny_teacher, format)
    assert [known[place] == known[place + 3] for place in range(3)] == [False, True, True]
    assert known[1] == {"name": "Tiny-Instruct", "quantizations": ["q4f32_1"], "libraries": ["x86_64-cpu"]}
    assert known[2] == {"name": "Tiny-Instruct", "quantizations": ["fp32", "int4"]}
