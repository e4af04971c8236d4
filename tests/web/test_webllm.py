"""The library for browsers in WebLLM's own engine, in Chromium with a GPU made of software (SwiftShader)."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from release_artifacts import example_artifacts, example_recipe, example_stage_times
from static_server import Server
from test_families import gemma3
from test_page import QUESTIONS, ask, assert_native_agrees, load, open_page
from transformers import PreTrainedTokenizerFast

from export import mlc_webgpu
from export.mlc import export_mlc, read_architecture
from export.mlc_runtime import MlcRuntime
from export.runtime import generate_greedily
from pipeline import cards, report, web
from pipeline.artifacts import Store

# Emscripten takes minutes, most of them its optimizer.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
CHROMIUM = Path("/usr/bin/chromium")
NAME = "Tiny-Instruct"
FLAGS = (
    "--no-sandbox --enable-unsafe-webgpu --use-webgpu-adapter=swiftshader --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)
WEBLLM = Path(__file__).parents[2] / "web" / "node_modules" / "@mlc-ai" / "web-llm" / "lib" / "index.js"
PAGE = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><script type="module">
import { MLCEngine } from "./web-llm.js";
const logits = [];
let ids = [];
const record = {
  processLogits(all) { logits.push(Array.from(all)); return all; },
  processSampledToken(id) { ids.push(id); },
  resetState() {},
};
// The part "resolve" tells WebLLM not to look for files as a hub has them.
const address = `${location.origin}/FOLDER`;
const model = { model_id: "m", model: `${address}/resolve/../`, model_lib: `${address}/libs/LIBRARY` };
const engine = new MLCEngine({
  appConfig: { model_list: [model] },
  logitProcessorRegistry: new Map([["m", record]]),
});
window.load = () => engine.reload("m");
window.forced = async (parts) => {
  await engine.resetChat();
  logits.length = 0;
  for (const [index, ids] of parts.entries()) {
    await engine.forwardTokensAndSample(ids, index === 0 || ids.length > 1);
  }
  return logits;
};
window.chat = async (messages, options) => {
  logits.length = 0;
  ids = [];
  const answer = await engine.chat.completions.create({ messages, ...options });
  return { ids, text: answer.choices[0].message.content, usage: answer.usage };
};
window.ready = true;
</script>"""
NEAR_TIE = 0.02
"""Logits that two orders of summation may differ by."""


@pytest.fixture
def flags() -> str:
    """Command line of the phone's browser, for the fixture ``phone``."""
    return FLAGS


@pytest.fixture(scope="module")
def folder(page_built: None, writing_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as an MLC folder, with a library for this machine and one for browsers."""
    if shutil.which("emcc") is None:
        pytest.skip("emcc is not installed (apt-get install emscripten)")
    output = tmp_path_factory.mktemp("webllm") / f"{NAME}-q4f32_1-MLC"
    libraries = ["x86_64-cpu", "wasm32-webgpu"]
    return export_mlc(writing_model_dir, output, NAME, "q4f32_1", libraries=libraries)


@pytest.fixture(scope="module")
def tab(playwright_here: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with loaded(playwright_here, folder, tmp_path_factory.mktemp("site")) as page:
        yield page


@contextmanager
def loaded(playwright_here: Any, folder: Path, site: Path) -> Iterator[Any]:
    """A page of Chromium in which WebLLM has loaded the folder."""
    (site / folder.name).symlink_to(folder)
    (site / "web-llm.js").symlink_to(WEBLLM)
    (library,) = folder.glob("libs/*.wasm")
    page_text = PAGE.replace("FOLDER", folder.name).replace("LIBRARY", library.name)
    (site / "index.html").write_text(page_text)
    server = Server(site)
    browser = playwright_here.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(server.origin)
    page.wait_for_function("window.ready === true")
    try:
        page.evaluate("load()")
    except Exception as error:
        raise AssertionError("\n".join([str(error), *said])) from error
    yield page
    browser.close()
    server.lost()


def check_logits(tab: Any, runtime: MlcRuntime, ids: list[int], first: int, second: int = 1) -> None:
    """Those of WebLLM, prefill of the first and of the second part and then one token after the other,
    against this machine's."""
    ends = [first, *range(first + second, len(ids) + 1)]
    parts = [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    found = np.array(tab.evaluate("forced", parts))
    runtime.reset()
    expected = runtime.forward(ids)[[end - 1 for end in ends]]
    assert found.shape == (len(ends), runtime.metadata["vocab_size"])
    found = found[:, : expected.shape[1]]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3 * np.abs(expected).max())


@pytest.fixture(scope="module")
def runtime(folder: Path) -> Iterator[MlcRuntime]:
    opened = MlcRuntime(folder)
    yield opened
    opened.close()


def assert_first(runtime: MlcRuntime, prompt: list[int], answer: list[int]) -> None:
    """After the prompt the runtime ranks each token of the answer first, or nearly: rounding may decide."""
    runtime.reset()
    logits = runtime.forward([*prompt, *answer])[len(prompt) - 1 : -1]
    behind = logits.max(axis=1) - logits[np.arange(len(answer)), answer]
    assert behind.max() < NEAR_TIE, f"token {behind.argmax()} of the answer is {behind.max()} behind"


def test_logits_are_those_of_this_machines_library(tab: Any, runtime: MlcRuntime) -> None:
    """Prefill of a prompt, then one token after the other."""
    ids = runtime.tokenize(
        "The import statement binds a name, twice in 1234 cases.\n\n    def f(x): return x"
    )
    check_logits(tab, runtime, ids, 17)


@pytest.mark.parametrize("second", [2, 9, 40])
def test_logits_of_a_prefill_after_another(tab: Any, runtime: MlcRuntime, second: int) -> None:
    """As when a conversation goes on from the cache; up to several pages of it."""
    text = "The import statement binds a name, twice in 1234 cases.\n\n    def f(x): return x\n"
    check_logits(tab, runtime, runtime.tokenize(text * 3)[: 37 + second + 2], 37, second)


def test_gemma3_within_two_pages(
    playwright_here: Any, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Norms of heads, two rotary bases and windows in shaders. Beyond two pages of 16 tokens TVM's cache
    gives layers the pages of others, for which ``check_windows`` refuses such an export; within, all is
    right."""
    if shutil.which("emcc") is None:
        pytest.skip("emcc is not installed (apt-get install emscripten)")
    torch.manual_seed(6)
    model_dir = gemma3(tiny_tokenizer, tmp_path / "model")
    folder = export_mlc(model_dir, tmp_path / "gemma", "t", "q4f32_1")
    runtime = MlcRuntime(folder)
    path = folder / "libs" / "t-q4f32_1-wasm32-webgpu.wasm"
    mlc_webgpu.compile_library(read_architecture(model_dir, "q4f32_1"), path, {})
    ids = np.random.default_rng(0).integers(3, 1700, 28).tolist()
    (tmp_path / "site").mkdir()
    with loaded(playwright_here, folder, tmp_path / "site") as tab:
        check_logits(tab, runtime, ids, 16, 9)
    runtime.close()


def test_webllm_chats_as_the_native_runtime_does(tab: Any, runtime: MlcRuntime) -> None:
    """Greedy answers to conversations with and without history and system message."""
    for messages in (
        [{"role": "user", "content": "What is a list?"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is 12 + 30? 😀"},
            {"role": "assistant", "content": "42"},
            {"role": "user", "content": "And  a tuple?\n"},
        ],
    ):
        options = {"temperature": 0, "max_tokens": 24}
        result = tab.evaluate("([messages, options]) => chat(messages, options)", [messages, options])
        prompt = runtime.chat_ids(messages, add_generation_prompt=True)
        assert result["usage"]["prompt_tokens"] == len(prompt)
        assert 0 < len(result["ids"]) <= 24
        assert_first(runtime, prompt, result["ids"])


def test_bias_and_penalties_are_those_of_the_formula(tab: Any, runtime: MlcRuntime) -> None:
    messages = [{"role": "user", "content": "What is a list?"}]
    options = {"temperature": 0, "max_tokens": 6, "logit_bias": {"77": 100}, "repetition_penalty": 100}
    options |= {"frequency_penalty": 0.5, "presence_penalty": 0.25}
    found = tab.evaluate("([m, o]) => chat(m, o)", [messages, options])["ids"]
    assert found[0] == 77
    assert len(set(found)) > 1
    prompt = runtime.chat_ids(messages, add_generation_prompt=True)
    runtime.reset()
    logits = runtime.forward([*prompt, *found])[len(prompt) - 1 : -1]
    logits[:, 77] += 100
    for place, (row, token) in enumerate(zip(logits, found, strict=True)):
        for seen in set(found[:place]):
            value = row[seen] - 0.25 - 0.5 * found[:place].count(seen)
            row[seen] = value * 100 if value < 0 else value / 100
        assert row.max() - row[token] < NEAR_TIE


def test_a_seed_samples_the_same_tokens_again(tab: Any) -> None:
    messages = [{"role": "user", "content": "What is a list?"}]
    options = {"temperature": 1.5, "top_p": 0.9, "max_tokens": 12, "seed": 3}
    first, again = (tab.evaluate("([m, o]) => chat(m, o)", [messages, options])["ids"] for _ in range(2))
    other = tab.evaluate("([m, o]) => chat(m, o)", [messages, {**options, "seed": 4}])["ids"]
    assert first == again
    assert first != other


def test_answers_can_be_held_to_a_grammar(tab: Any) -> None:
    """The bitmask's kernel: only what the grammar allows is left."""
    messages = [{"role": "user", "content": "Yes?"}]
    form = {"type": "grammar", "grammar": 'root ::= "yes" | "no"'}
    options = {"temperature": 0, "max_tokens": 20, "response_format": form}
    assert tab.evaluate("([m, o]) => chat(m, o)", [messages, options])["text"] in ("yes", "no")


def test_the_lines_of_the_model_card(tab: Any, folder: Path, tmp_path: Path) -> None:
    libraries = ["x86_64-cpu", "wasm32-webgpu"]
    recipe = example_recipe(name="Tiny", export={"mlc": ["q4f32_1"], "mlc_libraries": libraries})
    artifacts = example_artifacts(Store(tmp_path / "store", report=lambda line: None), recipe)
    facts = report.collect(recipe, artifacts, example_stage_times(artifacts))
    (block,) = re.findall(r"```js\n(.*?)```", cards.model_cards(recipe, facts)[folder.name], flags=re.DOTALL)
    for given, here in (
        ("@mlc-ai/web-llm", "./web-llm.js"),
        ("https://example.org", tab.evaluate("location.origin")),
        ("{ messages:", "{ max_tokens: 4, messages:"),
        ("console.log(", "window.told = ("),
    ):
        assert given in block
        block = block.replace(given, here)
    tab.add_script_tag(type="module", content=block)
    tab.wait_for_function("window.told")
    assert tab.evaluate("window.told").strip()


def lay_out(folder: Path, release: Path) -> None:
    """A release of the page and a copy of the folder."""
    shutil.copytree(folder, release / folder.name)
    listed = {"path": str(folder), "format": "mlc", "quantization": "q4f32_1"}
    assert web.lay_out(release, NAME, {"mlc": [listed]})


def test_a_second_turn_reads_only_what_is_new(
    phone: Any, folder: Path, runtime: MlcRuntime, tmp_path: Path
) -> None:
    """After an answer that ended by itself the cache is used, after one that was stopped all is read again;
    both times the model has seen what the template writes."""
    asked = [{"role": "user", "content": QUESTIONS[0]}]
    prompt = runtime.chat_ids(asked, add_generation_prompt=True)
    expected = generate_greedily(runtime, prompt, 24)
    length = next(place for place in range(4, 24) if expected[place] not in expected[:place])
    ending = Path(shutil.copytree(folder, tmp_path / folder.name))
    settings = json.loads((ending / "mlc-chat-config.json").read_text())
    (end_of_turn,) = ends = settings["conv_template"]["stop_token_ids"]
    # The random model never ends a turn; one of the tokens that it writes will do it.
    ends.append(expected[length])
    (ending / "mlc-chat-config.json").write_text(json.dumps(settings))
    release = tmp_path / "release"
    lay_out(ending, release)
    server = Server(release)
    tab, _, _ = open_page(phone, server.origin)
    load(tab, "MLC q4f32_1")

    first = ask(tab, QUESTIONS[0])
    assert first["tokenIds"] == expected[:length]
    assert (first["stopped"], first["cachedTokens"], first["promptTokens"]) == (False, 0, len(prompt))

    second = ask(tab, QUESTIONS[1])
    asked += [{"role": "assistant", "content": first["text"]}, {"role": "user", "content": QUESTIONS[1]}]
    two_turns = runtime.chat_ids(asked, add_generation_prompt=True)
    new = two_turns[two_turns.index(end_of_turn, len(prompt)) :]
    assert second["cachedTokens"] == len(prompt) + length
    assert second["promptTokens"] == len(new)
    assert tab.locator(".numbers").last.inner_text().count("from cache") == 1
    assert_first(runtime, [*prompt, *first["tokenIds"], *new], second["tokenIds"])

    assert second["stopped"]
    third = ask(tab, QUESTIONS[0])
    asked += [{"role": "assistant", "content": second["text"]}, {"role": "user", "content": QUESTIONS[0]}]
    whole = runtime.chat_ids(asked, add_generation_prompt=True)
    assert (third["cachedTokens"], third["promptTokens"]) == (0, len(whole))
    assert_first(runtime, whole, third["tokenIds"])

    # Measuring takes the cache for itself.
    tab.tap("#new-chat")
    ask(tab, QUESTIONS[0])
    tab.locator("#check summary").tap()
    tab.tap("#run-check")
    tab.wait_for_selector("#check-state:text-matches('^Done|^Not')")
    assert tab.inner_text("#check-state") == "Done"
    again = ask(tab, QUESTIONS[1])
    assert (again["cachedTokens"], again["promptTokens"]) == (0, len(two_turns))
    assert_first(runtime, two_turns, again["tokenIds"])
    server.lost()


def test_the_page_chats_with_the_mlc_folder_and_offline(phone: Any, folder: Path, tmp_path: Path) -> None:
    release = tmp_path / "release"
    lay_out(folder, release)
    server = Server(release)
    tab, said, asked = open_page(phone, server.origin)
    load(tab, "MLC q4f32_1")
    assert "works offline" in tab.inner_text("#state")
    turns = [(question, ask(tab, question)) for question in QUESTIONS]
    assert_native_agrees(folder, turns)

    server.lost()
    phone.set_offline(True)
    tab.reload()
    tab.wait_for_selector("#load:not([disabled])")
    assert "kept on this device" in tab.locator("label.model", has_text="MLC").inner_text()
    load(tab, "MLC q4f32_1")
    again = ask(tab, QUESTIONS[0])
    shared = min(len(again["tokenIds"]), len(turns[0][1]["tokenIds"]))
    assert again["tokenIds"][:shared] == turns[0][1]["tokenIds"][:shared]
    assert [url for url in asked if not url.startswith((server.origin, "blob:", "data:"))] == []
    expected = "ERR_INTERNET_DISCONNECTED|ERR_CONNECTION|^log: Falling back to maxCompute"
    assert [line for line in said if not re.search(expected, line)] == []
