"""The release's page in Chromium as a phone: typed, tapped, offline, against the native runtimes."""

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import playwright.sync_api
import pytest
from chromium import CONTRAST
from static_server import Server

from export.runtime import open_runtime
from pipeline import web

QUESTIONS = ("What is a list?", "And a tuple?")
# What rounding between WebAssembly and this machine's instructions may turn round, in logits.
NEAR_TIE = 0.1
"""Logits of q8_0 that a browser's and a processor's kernels may differ by; 0.076 was seen on AVX2."""
LONGEST_SEEN = 64


def open_page(phone: Any, origin: str) -> tuple[Any, list[str], list[str]]:
    """The page, ready to load a model; what it said on the console; where it sent requests."""
    tab = phone.pages[0]
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    tab.on("pageerror", lambda error: said.append(str(error)))
    phone.on("request", lambda request: asked.append(request.url))
    tab.goto(f"{origin}/web/?record")
    tab.wait_for_selector("#load:not([disabled])")
    return tab, said, asked


def load(tab: Any, label: str) -> None:
    tab.locator("label.model", has_text=label).tap()
    tab.tap("#load")
    tab.wait_for_selector("#talk:visible, #problem:visible")
    assert tab.is_visible("#talk"), tab.inner_text("#problem")


def ask(tab: Any, question: str) -> dict[str, Any]:
    """Types and taps; the answer is stopped when it is long enough (a random model seldom ends)."""
    answers = tab.locator(".assistant").count()
    tab.locator("#message").tap()
    tab.keyboard.type(question)
    tab.tap("#send")
    tab.wait_for_selector(f".assistant >> nth={answers}")
    tab.wait_for_function(
        "n => { const a = document.querySelectorAll('.assistant')[n];"
        " return a.getAttribute('aria-busy') === 'false' ||"
        " a.querySelector('.text').textContent.length > 60 }",
        arg=answers,
    )
    # The button goes when the answer ends by itself, perhaps just now.
    with contextlib.suppress(playwright.sync_api.TimeoutError):
        tab.tap("#stop", timeout=2000)
    tab.wait_for_selector(f".assistant[aria-busy=false] >> nth={answers}")
    result: dict[str, Any] = json.loads(tab.locator(".assistant").last.get_attribute("data-numbers"))
    return result


def assert_native_agrees(file: Path, turns: list[tuple[str, dict[str, Any]]]) -> None:
    """Teacher forcing: the native runtime, given the page's own words, ranks each of the page's tokens first,
    or so near the first that rounding decides."""
    runtime = open_runtime(file)
    messages = []
    for question, result in turns:
        messages.append({"role": "user", "content": question})
        prompt = runtime.chat_ids(messages, add_generation_prompt=True)
        if turns[0][0] == question:
            assert result["promptTokens"] + result["cachedTokens"] == len(prompt)
        answer = result["tokenIds"][:LONGEST_SEEN]
        assert len(answer) >= 4
        runtime.reset()
        logits = runtime.forward([*prompt, *answer])[len(prompt) - 1 : -1]
        given = logits[np.arange(len(answer)), answer]
        behind = logits.max(axis=1) - given
        assert behind.max() < NEAR_TIE, f"token {behind.argmax()} of the answer is {behind.max()} behind"
        messages.append({"role": "assistant", "content": result["text"]})
    runtime.close()


@pytest.mark.parametrize(("label", "format"), [("GGUF q8_0", "gguf"), ("ONNX fp32", "onnx")])
def test_two_turns_then_offline(phone: Any, server: Any, release: Path, label: str, format: str) -> None:
    tab, said, asked = open_page(phone, server.origin)
    # The page's own worker brings the headers that this server does not send.
    assert tab.evaluate("crossOriginIsolated") is True
    load(tab, label)
    assert "works offline" in tab.inner_text("#state")
    first = ask(tab, QUESTIONS[0])
    second = ask(tab, QUESTIONS[1])
    assert first["cachedTokens"] == 0
    assert first["ttft"] > 0
    assert first["decodeSeconds"] > 0
    # The whole first turn stays in the cache but for what the template adds after it.
    assert second["cachedTokens"] >= first["promptTokens"]
    assert tab.locator(".numbers").last.inner_text().count("from cache") == 1
    model = next(
        model
        for model in json.loads((release / "web" / "models.json").read_text())["models"]
        if model["format"] == format
    )
    file = release / model["files"][-1]["path"]
    assert_native_agrees(file, [(QUESTIONS[0], first), (QUESTIONS[1], second)])

    tab.tap("#new-chat")
    assert tab.locator(".turn").count() == 0
    again = ask(tab, QUESTIONS[0])
    shared = min(len(again["tokenIds"]), len(first["tokenIds"]))
    assert again["tokenIds"][:shared] == first["tokenIds"][:shared]

    server.lost()
    phone.set_offline(True)
    tab.reload()
    tab.wait_for_selector("#load:not([disabled])")
    assert "kept on this device" in tab.locator("label.model", has_text=label).inner_text()
    load(tab, label)
    offline = ask(tab, QUESTIONS[0])
    shared = min(len(offline["tokenIds"]), len(first["tokenIds"]))
    assert offline["tokenIds"][:shared] == first["tokenIds"][:shared]
    outside = [url for url in asked if not url.startswith((server.origin, "blob:", "data:"))]
    assert outside == []
    assert [line for line in said if not re.search("ERR_INTERNET_DISCONNECTED|ERR_CONNECTION", line)] == []


def test_loading_shows_how_far_it_is(phone: Any, release: Path) -> None:
    running = Server(release, seconds=4)
    tab, _, _ = open_page(phone, running.origin)
    tab.locator("label.model", has_text="GGUF q8_0").tap()
    tab.tap("#load")
    tab.wait_for_selector("#progress:visible")
    while tab.evaluate("document.querySelector('#progress').value") <= 0.3:
        tab.wait_for_timeout(50)
    value = tab.evaluate("document.querySelector('#progress').value")
    assert value < 1
    bar = tab.locator("#progress")
    assert bar.bounding_box()["y"] < tab.viewport_size["height"], "the progress is below the screen"
    done, total = re.findall(r"([\d.]+) [kM]B", tab.inner_text("label[for=progress]"))
    assert 0 < float(done) < float(total)
    tab.wait_for_selector("#talk:visible")
    running.lost()


def test_a_damaged_file_is_said_and_another_can_be_loaded(phone: Any, release: Path, tmp_path: Path) -> None:
    shutil.copytree(release, tmp_path / "release")
    (file,) = (tmp_path / "release").glob("*-GGUF/*.gguf")
    file.write_bytes(file.read_bytes()[:-100])
    running = Server(tmp_path / "release")
    tab, _, _ = open_page(phone, running.origin)
    tab.locator("label.model", has_text="GGUF q8_0").tap()
    tab.tap("#load")
    tab.wait_for_selector("#problem:visible")
    assert "bytes instead of" in tab.inner_text("#problem")
    load(tab, "ONNX fp32")
    running.lost()


def test_a_page_whose_worker_cannot_be_installed_works_while_it_is_open(
    phone: Any, release: Path, tmp_path: Path
) -> None:
    shutil.copytree(release, tmp_path / "release")
    (tmp_path / "release" / "web" / "icon.svg").unlink()  # one of the files that the worker keeps
    running = Server(tmp_path / "release")
    phone.set_default_timeout(40_000)
    tab, _, _ = open_page(phone, running.origin)
    load(tab, "GGUF q8_0")
    assert "needs network" in tab.inner_text("#state")
    assert ask(tab, QUESTIONS[0])["text"]
    running.lost()


def test_a_page_opened_from_a_folder_says_what_to_do(phone: Any, release: Path) -> None:
    tab = phone.pages[0]
    tab.emulate_media(reduced_motion="reduce")
    tab.goto((release / "web" / "index.html").as_uri())
    tab.wait_for_selector("#late:visible", timeout=20_000)
    assert "from a web server" in tab.inner_text("#late")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_first_screen(phone: Any, server: Any, tmp_path: Path, scheme: str) -> None:
    tab, said, _ = open_page(phone, server.origin)
    tab.emulate_media(color_scheme=scheme)
    assert len(tab.screenshot(path=tmp_path / "page.png")) > 15_000
    width = tab.viewport_size["width"]
    assert tab.evaluate("document.documentElement.scrollWidth") == width, "the page scrolls sideways"
    box = tab.locator("#load").bounding_box()
    assert box["y"] + box["height"] <= tab.viewport_size["height"], "Load is below the first screen"
    assert box["height"] >= 44
    assert said == []
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", ground)[:3])) / 765
    assert brightness < 0.2 if scheme == "dark" else brightness > 0.8
    assert tab.evaluate(CONTRAST) == [], "text without enough contrast"


def test_keyboard_alone(phone: Any, server: Any) -> None:
    tab, _, _ = open_page(phone, server.origin)
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.name") == "model"
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.id") == "load"
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#talk:visible")
    tab.focus("#message")
    tab.keyboard.type("Say something long")
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".assistant[aria-busy=true]")
    assert tab.locator("#log").get_attribute("aria-live") == "polite"
    tab.keyboard.press("Escape")
    tab.wait_for_selector(".assistant[aria-busy=false]")
    assert "stopped" in tab.locator(".numbers").inner_text()
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        assert tab.evaluate(CONTRAST) == [], f"text without enough contrast ({scheme})"


def test_models_json_lists_every_file_with_its_digest(release: Path) -> None:
    listed = json.loads((release / "web" / "models.json").read_text())
    assert listed["schema"] == web.SCHEMA
    assert listed["default"] == "gguf-q8_0"
    assert [model["id"] for model in listed["models"]] == ["gguf-q8_0", "onnx-fp32"]
    for model in listed["models"]:
        assert model["bytes"] == sum((release / file["path"]).stat().st_size for file in model["files"])
        assert all(re.fullmatch("[0-9a-f]{64}", file["sha256"]) for file in model["files"])
