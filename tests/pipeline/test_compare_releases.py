"""Releases side by side: differences found, the page, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from chromium import CONTRAST, LETTERS
from release_artifacts import example_artifacts, example_recipe, example_stage_times

from pipeline import compare_releases, release
from pipeline.artifacts import Store
from pipeline.errors import UserError


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    store = Store(folder / "store", report=lambda line: None)
    roots = []
    for number, changes in enumerate(
        ({}, {"seed": 8, "export": {"gguf": ["q8_0"], "mlc": [], "onnx": ["int4"]}})
    ):
        recipe = example_recipe(**{**changes, "name": "Martlet-99M" if number == 0 else "Other"})
        artifacts = example_artifacts(store, recipe)
        times = example_stage_times(artifacts)
        roots.append(release.run(recipe, artifacts, folder / f"release-{number}", store, times))
    return roots[0], roots[1]


@pytest.fixture(scope="module")
def facts(pair: tuple[Path, Path]) -> dict[str, Any]:
    return compare_releases.run(*pair)


def test_differences_are_found_and_nothing_else(facts: dict[str, Any]) -> None:
    assert facts["recipe"] == {
        "name": ["Martlet-99M", "Other"],
        "seed": [7, 8],
        "export.gguf": [["f16", "q8_0", "q5_k_m", "q4_k_m"], ["q8_0"]],
        "export.mlc": [["q4f32_1"], []],
        "export.onnx": [["fp32", "int4"], ["int4"]],
    }
    assert facts["measures"]["kl_after"] == [0.80, 0.80]
    files = {(file["format"], file["quantization"]): file for file in facts["files"]}
    assert files["gguf", "q8_0"]["bytes"] == [107_000_000, 107_000_000]
    assert files["mlc", "q4f32_1"]["mean_kl"] == [0.312, None]
    assert facts["results"]["mlc"] == "only in Martlet-99M"
    assert facts["packages"] == {}
    assert [talk["prompt"] for talk in facts["conversations"]] == ["What is rain?", "Name a colour."]


def test_a_release_is_the_same_as_itself(pair: tuple[Path, Path]) -> None:
    facts = compare_releases.run(pair[0], pair[0])
    assert facts["recipe"] == {}
    assert set(facts["results"].values()) == {"same"}
    page = compare_releases.render(facts)
    assert "The recipes are the same." in page
    assert "Martlet-99M (1)" in page


def test_three_releases_beside_each_other(pair: tuple[Path, Path]) -> None:
    facts = compare_releases.run(*pair, pair[0])
    assert facts["recipe"]["seed"] == [7, 8, 7]
    assert "threads" not in facts["recipe"]
    assert facts["results"]["mlc"] == "only in Martlet-99M (1), Martlet-99M (3)"
    assert [file["mean_kl"] for file in facts["files"] if file["format"] == "mlc"] == [[0.312, None, 0.312]]
    page = compare_releases.render(facts)
    assert "<title>Martlet-99M (1) and Other (2) and Martlet-99M (3): 3 releases</title>" in page
    assert page.count('<th scope="col">Other (2)</th>') == 6
    with pytest.raises(UserError, match="give two releases or more"):
        compare_releases.run(pair[0])


def test_page_needs_nothing_but_itself(facts: dict[str, Any], tmp_path: Path) -> None:
    names, page_file = compare_releases.write(facts, tmp_path / "new" / "folder")
    assert json.loads(names.read_text(encoding="utf-8")) == facts
    page = page_file.read_text(encoding="utf-8")
    assert "<script" not in page
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page.replace("xlink:href", "href"))
    assert page.count("<th scope=") == len(re.findall(r"<th\b", page))
    assert page.count('role="img"') == 2  # one of them for phones
    assert "<code>export.gguf</code>" in page
    assert "<b>cloud" not in page
    assert [path.name for path in page_file.parent.iterdir() if path.suffix == ".partial"] == []


@pytest.mark.parametrize("width", [390, 1280])
def test_in_chromium(browser: Any, facts: dict[str, Any], tmp_path: Path, width: int) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 844})
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.goto(compare_releases.write(facts, tmp_path)[1].as_uri())
    try:
        assert said == []
        assert tab.evaluate("document.documentElement.scrollWidth") == width, "the page scrolls sideways"
        assert len([chart for chart in tab.locator("svg").all() if chart.is_visible()]) == 1
        assert tab.evaluate(LETTERS) >= 9.5, "words of a picture are too small to read"
        assert tab.evaluate(CONTRAST) == []
    finally:
        tab.close()


def test_what_is_no_release_is_refused(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="give the folder of a release"):
        compare_releases.run(pair[0], tmp_path)
    (tmp_path / "report.json").write_text('{"schema": "other"}', encoding="utf-8")
    with pytest.raises(UserError, match="is no report"):
        compare_releases.run(tmp_path, pair[0])
