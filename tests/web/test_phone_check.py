"""martlet phone end to end: a phone opens the address, loads a file, measures it, and it is in the report."""

import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from phone_site import Site
from release_artifacts import example_artifacts, example_recipe, example_stage_times

from pipeline import browser_check, report, web
from pipeline import release as release_stage
from pipeline.artifacts import Store, file_digests, with_own_digest, write_json
from pipeline.errors import UserError


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


def drive_page(release: Path, *options: str) -> subprocess.CompletedProcess[str]:
    # A process of its own: these tests have a Playwright running, and there can be one in a thread.
    command = [sys.executable, "-m", "flows.command_line", "phone", str(release), "--browser", "chromium"]
    return subprocess.run([*command, *options], capture_output=True, text=True, cwd=Path(__file__).parents[2])


def test_the_page_is_driven_here_and_its_screenshot_is_in_the_report(
    page_built: None, whole_release: Path
) -> None:
    done = drive_page(whole_release)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr.count("native runtime's first")) == ("", 2)
    facts = json.loads((whole_release / "report.json").read_text())
    schema = json.loads((Path(report.__file__).parent / "schemas" / "report.schema.json").read_text())
    assert [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(facts)] == []
    checks = {check["file"]: check for check in facts["browser_checks"]}
    assert (
        set(checks)
        == {entry["file"] for entry in facts["phones"]}
        == {"tiny-instruct-q8_0.gguf", "model.onnx"}
    )
    page = (whole_release / "report.html").read_text()
    for name, check in checks.items():
        picture = base64.b64decode(check["screenshot"].partition(",")[2])
        assert picture[:3] == b"\xff\xd8\xff"
        assert 5_000 < len(picture) < 200_000
        assert check["screenshot"] in page
        assert check["asked_elsewhere"] == []
        assert check["native"]["agrees"], (name, check["native"])
        assert check["native"]["tokens"] == len(check["token_ids"]) >= 4
        # Near ties of a random model: the longer the answer, the more of them.
        allowed = max(2, check["native"]["tokens"] // 20)
        assert check["native"]["same_top"] >= check["native"]["tokens"] - allowed
    # The screen is a phone's, the machine is not, and the table says so.
    for entry in facts["phones"]:
        assert "with a phone's screen, on this computer" in entry["device"]["model"]
        assert entry["device"]["mobile"] is False
    assert "Android" not in page
    assert release_stage.verify(whole_release) == []


def test_a_page_that_asks_another_server_is_told(page_built: None, whole_release: Path) -> None:
    page = whole_release / "web" / "index.html"
    picture = '<img src="http://127.0.0.1:9/counted.png" alt="">'
    told = re.sub("<meta http-equiv[^>]*>", "", page.read_text()).replace("<main", f"{picture}<main")
    page.write_text(told)
    done = drive_page(whole_release, "--file", "q8_0")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "tiny-instruct-q8_0.gguf: the page asks for http://127.0.0.1:9/counted.png." in last
    (check,) = json.loads((whole_release / "report.json").read_text())["browser_checks"]
    assert set(check["asked_elsewhere"]) == {"http://127.0.0.1:9/counted.png"}


def test_an_answer_that_is_not_the_native_runtimes_is_told(page_built: None, release: Path) -> None:
    model = json.loads((release / "web" / "models.json").read_text())["models"][0]
    check = {"file": model["file"], "question": "What is a list?", "token_ids": [5, 9, 1200, 7, 44]}
    native = browser_check.agreement(release, model, check)
    assert native["tokens"] == 5
    assert native["largest_gap"] > browser_check.NEAR_TIE
    assert native["agrees"] is False
    assert "does not answer as it does natively" in browser_check.readable_agreement(
        check | {"native": native}
    )


def test_a_missing_browser_and_a_missing_file_are_user_errors(page_built: None, whole_release: Path) -> None:
    with pytest.raises(UserError, match="--browser: no-such-browser is not installed"):
        browser_check.run(whole_release, browser="no-such-browser", wanted=None, say=print)
    with pytest.raises(UserError, match=r"--file: 'q9' fits none of tiny-instruct-q8_0\.gguf, model\.onnx"):
        browser_check.run(whole_release, browser="chromium", wanted="q9", say=print)
    with pytest.raises(UserError, match=r"does not say its version|does not start"):
        browser_check.run(whole_release, browser="false", wanted=None, say=print)
