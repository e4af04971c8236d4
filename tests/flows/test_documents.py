"""The documents name what is there: every recipe key, every command, and only files that exist."""

import re
import shlex
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel

import taid
from export.converter import SOURCE_SHA256
from flows.command_line import app
from pipeline.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")


def sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    yield prefix, model
    for name, field in model.model_fields.items():
        for candidate in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                yield from sections(candidate, f"{prefix}{field.alias or name}.")


def recipe_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        candidates = [field.annotation]
        if typing.get_origin(field.annotation) is not dict:
            candidates += typing.get_args(field.annotation)
        sections = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if sections:
            yield from recipe_keys(sections[0], key + ".")
        else:
            yield key


def test_the_guide_lists_exactly_the_keys_of_a_recipe() -> None:
    listed = re.findall(r"^\| `([a-z0-9_.]+)` \|", GUIDE, flags=re.MULTILINE)
    assert listed == list(recipe_keys(Recipe))


def test_every_key_has_a_meaning_and_the_guide_says_the_same() -> None:
    cells = [line.strip("| ").split(" | ") for line in GUIDE.splitlines() if line.startswith("| `")]
    told = {row[0].strip("` "): row[-1].strip() for row in cells}
    for path, section in sections(Recipe):
        for name, field in section.model_fields.items():
            key = f"{path}{field.alias or name}"
            assert field.description, f"{key} has no description"
            if key in told:
                assert told[key] == field.description.replace("||", "//").replace("``", "`")


def test_the_guide_lists_every_command() -> None:
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"^\| `martlet ([a-z-]+)", GUIDE, flags=re.MULTILINE)) == commands


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid(recipe: Path) -> None:
    load_recipe(recipe)


def test_deployments_name_recipes_and_parameters_that_exist() -> None:
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    assert {deployment["name"] for deployment in deployments} == {"local", "smoke", "nightly"}
    for deployment in deployments:
        assert (ROOT / deployment["parameters"]["recipe"]).is_file()
        assert set(deployment["parameters"]) <= {"recipe", "store", "release"}
        assert deployment["work_pool"]["name"] == "martlet"


def test_the_readme_shows_the_literal_command() -> None:
    assert "\nprefect deployment run distill-and-ship\n" in README


@pytest.mark.parametrize("target", ["ship", "test", "bench", "check", "clean"])
def test_make_has_the_verbs(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_every_package_is_pinned_exactly() -> None:
    first, *pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert first.startswith("#")
    assert all(len(shlex.split(pin)) == 1 and re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)


PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


def blocks(language: str) -> list[Any]:
    """The fenced blocks of a language on all pages, those in lists too, each named by its page and place."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for number, block in enumerate(
            re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
        ):
            found.append(pytest.param(textwrap.dedent(block), id=f"{page.relative_to(ROOT)}-{number}"))
    return found


@pytest.mark.parametrize("block", blocks("python"))
def test_python_of_the_pages_runs(block: str) -> None:
    exec(compile(block, "page", "exec"), {"__name__": "page"})


@pytest.mark.parametrize("block", blocks("yaml"))
def test_yaml_of_the_pages_is_a_recipe_or_a_part_of_one(block: str, tmp_path: Path) -> None:
    values = yaml.safe_load(block)
    if "name" in values:
        (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
        load_recipe(tmp_path / "recipe.yaml")
        return
    keys = set(recipe_keys(Recipe))

    def named(value: Any, prefix: str) -> set[str]:
        if not isinstance(value, dict):
            return {prefix}
        return {key for name, inner in value.items() for key in named(inner, f"{prefix}.{name}".lstrip("."))}

    assert named(values, "") <= keys


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_the_pages_exist(page: Path) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^ *```(?:sh)?\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL):
        for line in textwrap.dedent(block).replace("\\\n", " ").splitlines():
            if line.startswith("martlet "):
                name, *arguments = shlex.split(line, comments=True)[1:]
                commands[name].make_context(name, arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_the_pages_lead_somewhere(page: Path) -> None:
    generated = {"reference", "examples"}
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve()
        assert path.exists() or path.parent.name in generated, target


def test_the_reference_has_every_public_name_of_taid() -> None:
    modules = (ROOT / "docs" / "generate.py").read_text(encoding="utf-8").partition("}\n")[0]
    listed = re.findall(r'"(\w+)"', modules.partition('"taid": (')[2].partition('"export"')[0])
    sources = "".join((ROOT / "taid" / f"{name}.py").read_text(encoding="utf-8") for name in listed)
    defined = set(re.findall(r"^(?:def|class) (\w+)|^(\w+)(?:: .*)? = ", sources, flags=re.MULTILINE))
    assert set(taid.__all__) - {name for pair in defined for name in pair} == set()


def test_the_lock_names_no_other_version_and_the_source_that_the_converter_checks() -> None:
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:]
    )
    lock = (ROOT / "constraints.lock").read_text(encoding="utf-8")
    locked = re.findall(r"^([\w.-]+)==(\S+) \\\n    --hash=sha256:([0-9a-f]{64})", lock, flags=re.MULTILINE)
    assert {name: version for name, version, _ in locked} == pins, (
        "each package of the one has hashes in the other"
    )
    assert {name: digest for name, _, digest in locked}["llama-cpp-python"] == SOURCE_SHA256
