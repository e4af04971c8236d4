"""martlet phone end to end: a phone opens the address, loads a file, measures it, and it is in the report."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from phone_site import Site
from release_artifacts import example_artifacts, example_recipe, example_stage_times

from pipeline import release as release_stage
from pipeline import web
from pipeline.artifacts import Store, file_digests, with_own_digest, write_json


@pytest.fixture
def whole_release(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A release with report and manifest, whose models and page are those of the small real one."""
    monkeypatch.setattr(web, "BUILT", tmp_path / "none")
    store = Store(tmp_path / "store", report=lambda line: None)
    recipe = example_recipe()
    artifacts = example_artifacts(store, recipe)
    root = release_stage.run(recipe, artifacts, tmp_path / "release", store, example_stage_times(artifacts))
    for folder in release.iterdir():
        shutil.copytree(folder, root / folder.name)
    manifest = json.loads((root / "manifest.json").read_text())
    for name, entry in file_digests(root).items():
        if name != "manifest.json":
            manifest["files"].setdefault(name, entry | {"made_from": {"stage": "release"}})
    write_json(root / "manifest.json", with_own_digest(manifest))
    assert release_stage.verify(root) == []
    return root


def test_a_phone_measures_and_it_is_in_the_report(phone: Any, whole_release: Path, tmp_path: Path) -> None:
    site = Site(whole_release, "the-token", tmp_path)
    tab = phone.pages[0]
    tab.goto(f"{site.origin}/?token=the-token")
    assert tab.url == f"{site.origin}/web/?phone"
    tab.wait_for_selector("#load:not([disabled])")
    # The server's own headers and its encryption allow threads.
    assert tab.evaluate("crossOriginIsolated") is True
    tab.tap("#load")
    tab.wait_for_selector("#talk:visible")
    tab.tap("#run-check")
    tab.wait_for_selector("#check-state:text-matches('^Done|^Not')", timeout=300_000)
    assert tab.inner_text("#check-state") == "Done, and sent to the computer: it is in the report."
    shown = tab.inner_text("#check-result")
    site.close()
    (entry,) = json.loads((whole_release / "report.json").read_text())["phones"]
    assert entry["file"] == "tiny-instruct-q8_0.gguf"
    assert "Pixel 7" in entry["device"]["user_agent"]
    assert entry["device"]["threads_allowed"] is True
    assert entry["generated_tokens"] == 32
    assert entry["prompt_tokens"] > 100
    assert entry["prefill_tokens_per_s"] >= entry["prompt_tokens"] / entry["ttft_s"] * 0.999  # Jensen
    assert format(entry["decode_tokens_per_s"], ".3g").rstrip(".") in shown
    assert release_stage.verify(whole_release) == []
