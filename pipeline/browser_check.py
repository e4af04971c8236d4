"""The page of a release driven here, in Chromium with a phone's screen: a chat, a measurement, a screenshot.

What a person would do with the page on a phone, done by Playwright before anyone takes one out: each file
loads, loads again when server and network are gone, answers as it does natively, and is measured. It is this
machine's processor, never a phone's.
"""

import base64
import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from export.runtime import open_runtime
from export.untrusted import check_gguf, check_model_folder
from pipeline import phone, web
from pipeline import release as release_stage
from pipeline.errors import GateFailed, UserError

PHONE = "Pixel 7"
"""Playwright's name of the screen, the touch and the user agent that the page gets to see."""
FLAGS = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
QUESTION = "What is a swallow?"
LONG_ENOUGH = 80
"""Letters after which an answer is stopped."""
SECONDS = 900
"""What loading, answering or measuring may take."""
NEAR_TIE = 0.25
"""Logits by which a token may be behind the native runtime's first one: two runtimes round differently."""
QUALITY = 75


def run(release: Path, *, browser: str, wanted: str | None, say: Callable[[str], None]) -> None:
    """Checks each file that a release's page offers; results enter ``report.json`` (keys ``phones`` and
    ``browser_checks``) and ``report.html``.

    Args:
        release: release folder with a page.
        browser: a Chromium: name of a program on PATH, or its path.
        wanted: a part of the names of the files that are meant; all by default.
        say: told what happens.

    Raises:
        UserError: no release or page, no such file or browser, or the page fails with a file.
        GateFailed: a file does not answer as it does natively, or the page asked for something of another
            server; told when all files have been checked.
    """
    root = Path(release).resolve()
    listed = phone.released_files(root)
    offered = json.loads((root / web.FOLDER / "models.json").read_text(encoding="utf-8"))["models"]
    # This browser has no WebGPU; one in software would tell nothing of a phone's.
    known = [place for place, model in enumerate(offered) if model["format"] != "mlc"]
    places = [place for place in known if (wanted or "").lower() in offered[place]["file"].lower()]
    if not places:
        names = ", ".join(offered[place]["file"] for place in known)
        raise UserError(f"--file: {wanted!r} fits none of {names}.")
    executable = shutil.which(browser)
    if executable is None:
        raise UserError(
            f"--browser: {browser} is not installed; install Chromium (apt-get install chromium)."
        )
    name = version(executable)
    failures = []
    for place in places:
        model = offered[place]
        say(f"{name}: {model['file']}")
        with opened(executable) as context:
            posted, check = checked(context, root, listed, place, model)
        say(phone.add_result(root, as_of_this_machine(posted, name)))
        check |= {"browser": name, "native": agreement(root, model, check)}
        release_stage.change_report(root, functools.partial(keep, check))
        say(readable_agreement(check))
        if check["asked_elsewhere"]:
            failures.append(f"{model['file']}: the page asks for {check['asked_elsewhere'][0]}.")
        if not check["native"]["agrees"]:
            failures.append(readable_agreement(check))
    if failures:
        raise GateFailed(" ".join(failures))


def keep(check: dict[str, Any], facts: dict[str, Any]) -> None:
    """Puts a check into ``report.json``'s values, in place of an earlier one of the same file."""
    earlier = [entry for entry in facts.get("browser_checks", []) if entry["file"] != check["file"]]
    facts["browser_checks"] = [*earlier, check]


def version(executable: str) -> str:
    """A browser's name and version, such as "Chromium 142.0.7444.59".

    Raises:
        UserError: it does not start.
    """
    try:
        done = subprocess.run([executable, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        raise UserError(f"--browser: {executable} does not start; give a Chromium.") from None
    words = done.stdout.split()
    if done.returncode or len(words) < 2:
        raise UserError(f"--browser: {executable} does not say its version; give a Chromium.")
    return " ".join(words[:2])


@contextlib.contextmanager
def served(root: Path, listed: set[str]) -> Iterator[str]:
    """The release on this machine alone, while the block runs; yields scheme, host and port."""
    with socket.create_server((phone.LOOPBACK, 0)) as listening:
        origin = f"http://{phone.LOOPBACK}:{listening.getsockname()[1]}"
        application = phone.make_application(root, listed, origin=origin, token=None, say=lambda line: None)
        server = phone.make_server(application)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        try:
            yield origin
        finally:
            server.should_exit = True
            thread.join(10)


@contextlib.contextmanager
def opened(executable: str) -> Iterator[Any]:
    """A browser context of a phone with a profile of its own, which is removed afterwards.

    Raises:
        UserError: Playwright is not installed, or the browser does not start.
    """
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        raise UserError("--browser: Playwright is not installed; run make, which sets it up.") from None
    # Chromium refuses to run as root with its sandbox.
    flags = [*FLAGS, "--no-sandbox"] if os.geteuid() == 0 else list(FLAGS)
    with tempfile.TemporaryDirectory(prefix="martlet-browser-") as profile, sync_playwright() as playwright:
        descriptor = {
            key: value for key, value in playwright.devices[PHONE].items() if key != "default_browser_type"
        }
        try:
            context = playwright.chromium.launch_persistent_context(
                profile, executable_path=executable, args=flags, headless=True, **descriptor
            )
        except Error as error:
            raise UserError(f"--browser: {executable} does not start ({first_line(error)}).") from None
        context.set_default_timeout(SECONDS * 1000)
        try:
            yield context
        except Error as error:
            raise UserError(f"The page fails in {executable}: {first_line(error)}") from None
        finally:
            context.close()


def first_line(error: Exception) -> str:
    """The first line of what Playwright says."""
    return (str(error).splitlines() or ["it said nothing"])[0].rstrip(".")


def checked(
    context: Any, root: Path, listed: set[str], place: int, model: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Loads one file in the page, then again without server and network, asks it, and has the page measure.

    Args:
        context: of ``opened``.
        root: release folder.
        listed: files of it that may be served.
        place: of the file in ``models.json``.
        model: its entry there.

    Returns:
        What the page posts, and {file, format, quantization, question, answer, token_ids, asked_elsewhere,
        screenshot, measured_at}: addresses of other servers that were asked for, and the screenshot as a
        ``data:`` address.

    Raises:
        UserError: the page cannot load, run or measure the file.
    """
    tab = context.pages[0]
    posted: list[str] = []
    asked: list[str] = []

    def take(route: Any) -> None:
        # Not to the server: it would take the screen's name for the device's.
        posted.append(route.request.post_data)
        route.fulfill(status=200, content_type="application/json", body='{"taken": true}')

    context.on("request", lambda request: asked.append(request.url))
    context.route("**/results", take)
    with served(root, listed) as origin:
        tab.goto(f"{origin}{phone.START}&record")
        load(tab, place, model, "the page cannot load it")
    context.set_offline(True)
    tab.reload()
    load(tab, place, model, "once loaded, the page cannot load it without a network")
    numbers = ask(tab, model)
    picture = tab.screenshot(type="jpeg", quality=QUALITY, scale="css")
    tab.tap("#run-check")
    tab.wait_for_selector("#check-state:text-matches('^Done|^Not')")
    if not posted:
        raise UserError(f"{model['file']}: {tab.inner_text('#check-state')}")
    check = {
        **{key: model[key] for key in ("file", "format", "quantization")},
        "question": QUESTION,
        "answer": numbers["text"],
        "token_ids": numbers["tokenIds"],
        "asked_elsewhere": [url for url in asked if not url.startswith((f"{origin}/", "blob:", "data:"))],
        "screenshot": f"data:image/jpeg;base64,{base64.b64encode(picture).decode('ascii')}",
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return json.loads(posted[-1]), check


def load(tab: Any, place: int, model: dict[str, Any], failed: str) -> None:
    """Chooses a file in the page and loads it.

    Raises:
        UserError: that fails, which ``failed`` says in words.
    """
    tab.wait_for_selector("#load:not([disabled]), #problem:visible")
    if not tab.is_visible("#problem"):
        tab.locator(f"input[name=model][value='{place}']").check(force=True)
        tab.tap("#load")
        tab.wait_for_selector("#talk:visible, #problem:visible")
    if not tab.is_visible("#talk"):
        raise UserError(f"{model['file']}: {failed} ({tab.inner_text('#problem').rstrip('.')}).")


def ask(tab: Any, model: dict[str, Any]) -> dict[str, Any]:
    """Types the question, taps, and stops the answer when it is long enough.

    Returns:
        What the page knows of its answer: {text, tokenIds, ...} as ``web/src/gguf-engine.js`` says.

    Raises:
        UserError: there is no answer, or an empty one.
    """
    tab.locator("#message").tap()
    tab.keyboard.type(QUESTION)
    tab.tap("#send")
    tab.wait_for_selector(".assistant, #log .problem")
    tab.wait_for_function(
        "length => { const turn = document.querySelector('.assistant');"
        " return !turn || turn.getAttribute('aria-busy') === 'false' ||"
        " turn.querySelector('.text').textContent.length > length }",
        arg=LONG_ENOUGH,
    )
    # Not by tapping Stop: the button goes when the answer ends by itself, and a tap would wait for it.
    tab.keyboard.press("Escape")
    tab.wait_for_selector(".assistant[aria-busy=false], #log .problem")
    if tab.locator("#log .problem").count():
        said = tab.locator("#log .problem").first.inner_text()
        raise UserError(f"{model['file']}: the page gives no answer ({said.rstrip('.')}).")
    numbers: dict[str, Any] = json.loads(tab.locator(".assistant").get_attribute("data-numbers"))
    if not numbers["tokenIds"]:
        raise UserError(f"{model['file']}: its answer in the page is empty.")
    return numbers


def as_of_this_machine(posted: dict[str, Any], browser: str) -> phone.Result:
    """What the page measured, under this machine's name instead of that of the screen.

    Raises:
        UserError: the page posts what is no result.
    """
    posted["device"] |= {
        "user_agent": f"{browser}, posing as {PHONE}",
        "model": f"{browser} with a phone's screen, on this computer",
        "platform": os.uname().sysname,
        "platform_version": None,
        "architecture": os.uname().machine,
        "mobile": False,
    }
    try:
        return phone.Result.model_validate(posted)
    except ValidationError as error:
        raise UserError(f"The page measured what cannot be ({error.errors()[0]['msg']}).") from None


def agreement(root: Path, model: dict[str, Any], check: dict[str, Any]) -> dict[str, Any]:
    """Teacher forcing: the native runtime reads the page's own answer and ranks each of its tokens.

    It reads the answer in one pass and once more token by token, as the page wrote it. The two round
    differently, by a logit and more where eight bits go into each layer, so the nearer one counts.

    Returns:
        {tokens, same_top, largest_gap, agrees}: how many there were, how many of them it ranks first, how
        many logits the worst of the others is behind, and whether that is a near-tie.
    """
    path = next(root / file["path"] for file in model["files"] if Path(file["path"]).name == model["file"])
    if path.suffix == ".gguf":
        check_gguf(path)
    else:
        check_model_folder(path.parent.parent)
    answer = check["token_ids"]
    runtime = open_runtime(path, threads=len(os.sched_getaffinity(0)))
    try:
        prompt = runtime.chat_ids(
            [{"role": "user", "content": check["question"]}], add_generation_prompt=True
        )
        at_once = runtime.forward([*prompt, *answer])[len(prompt) - 1 : -1].copy()
        runtime.reset()
        in_turn = [runtime.prefill(prompt).copy(), *(runtime.decode(each).copy() for each in answer[:-1])]
    finally:
        runtime.close()
    behind = np.min(
        [
            logits.max(axis=1) - logits[np.arange(len(answer)), answer]
            for logits in (at_once, np.stack(in_turn))
        ],
        axis=0,
    )
    gap = float(behind.max())
    return {
        "tokens": len(answer),
        "same_top": int((behind == 0).sum()),
        "largest_gap": gap,
        "agrees": gap < NEAR_TIE,
    }


def readable_agreement(check: dict[str, Any]) -> str:
    """One line on how the page's answer compares with the native runtime's."""
    native = check["native"]
    line = (
        f"{check['file']}: {native['same_top']} of {native['tokens']} tokens are the native runtime's first"
    )
    if native["same_top"] < native["tokens"]:
        line += f", the others at most {native['largest_gap']:.2g} logits behind"
    return line + ("." if native["agrees"] else ": it does not answer as it does natively.")
