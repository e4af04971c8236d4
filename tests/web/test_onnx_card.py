"""An ONNX folder in transformers.js as its package has it for browsers: the card's lines, token ids."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from release_artifacts import example_artifacts, example_recipe, example_stage_times
from static_server import Server

from export.onnx import export_onnx, export_tokenizer
from export.torch_runtime import TransformersReader
from pipeline import cards, report
from pipeline.artifacts import Store
from pipeline.conversations import fixed_conversations, reference_chat_ids

CHROMIUM = Path("/usr/bin/chromium")
MODULES = Path(__file__).parents[2] / "web" / "node_modules"
PLACES = {
    "@huggingface/transformers": "/node_modules/@huggingface/transformers/dist/transformers.web.js",
    "onnxruntime-web/webgpu": "/node_modules/onnxruntime-web/dist/ort.webgpu.bundle.min.mjs",
    "onnxruntime-common": "/node_modules/onnxruntime-common/dist/esm/index.js",
}
PAGE = f"""<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">
<script type="importmap">{json.dumps({"imports": PLACES})}</script>"""


@pytest.fixture
def tab(playwright_here: Any, flags: str, tmp_path: Path) -> Iterator[Any]:
    """An empty page at a server of ``tmp_path``, where the packages can be imported by name."""
    (tmp_path / "index.html").write_text(PAGE)
    (tmp_path / "node_modules").symlink_to(MODULES)
    server = Server(tmp_path)
    browser = playwright_here.chromium.launch(executable_path=CHROMIUM, args=flags.split())
    page = browser.new_page()
    page.goto(server.origin)
    yield page
    browser.close()
    server.lost()


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_the_lines_of_the_model_card(
    tab: Any, writing_model_dir: Path, tmp_path: Path, precision: str
) -> None:
    recipe = example_recipe(name="Tiny", export={"onnx": [precision]})
    artifacts = example_artifacts(Store(tmp_path / "store", report=lambda line: None), recipe)
    facts = report.collect(recipe, artifacts, example_stage_times(artifacts))
    name = "Tiny-Instruct-ONNX"
    export_onnx(writing_model_dir, tmp_path / "models" / name, name, [precision], threads=1)
    (block,) = re.findall(r"```js\n(.*?)```", cards.model_cards(recipe, facts)[name], flags=re.DOTALL)
    for given, here in (("max_new_tokens: 64", "max_new_tokens: 4"), ("console.log(", "window.told = (")):
        assert given in block
        block = block.replace(given, here)
    # By itself the package gets its WebAssembly from a public server.
    near = 'env.backends.onnx.wasm.wasmPaths = "/node_modules/onnxruntime-web/dist/";'
    block = block.replace("env.allowRemoteModels", f"{near}\nenv.allowRemoteModels")
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(f"failed: {error}"))
    tab.on("request", lambda request: asked.append(request.url))
    tab.add_script_tag(type="module", content=block)
    try:
        tab.wait_for_function("window.told !== undefined", timeout=60_000)
    except Exception as error:
        raise AssertionError("\n".join([str(error), *said, *asked])) from error
    assert tab.evaluate("window.told").strip(), said
    assert all(address.startswith((tab.url, "blob:")) for address in asked), asked


READ = """async ([folder, conversations, prompts]) => {
  const { AutoTokenizer, env } = await import("@huggingface/transformers");
  env.allowLocalModels = true;
  env.allowRemoteModels = false;
  env.localModelPath = "models/";
  const tokenizer = await AutoTokenizer.from_pretrained(folder);
  const settings = { return_tensor: false, return_dict: false };
  return prompts.map((add_generation_prompt) => conversations.map((messages) => {
    try {
      return tokenizer.apply_chat_template(messages, { ...settings, add_generation_prompt });
    } catch (error) {
      return String(error);
    }
  }));
}"""


def test_conversations_have_the_token_ids_of_transformers(
    tab: Any, writing_model_dir: Path, tmp_path: Path
) -> None:
    """The 300 fixed ones, rendered and tokenized by transformers.js from the exported folder alone."""
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    export_tokenizer(writing_model_dir, tmp_path / "models" / "tiny")
    expected = reference_chat_ids(TransformersReader(writing_model_dir))
    found = tab.evaluate(READ, ["tiny", fixed_conversations(), [False, True]])
    for prompt, read in zip((False, True), found, strict=True):
        for number, (ours, theirs) in enumerate(zip(expected[str(prompt)], read, strict=True)):
            assert ours is None or ours == theirs, f"conversation {number}"
