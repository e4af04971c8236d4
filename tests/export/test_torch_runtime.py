"""The reference runtime against transformers itself, called without cache and without our code."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from export.errors import ExportError
from export.runtime import generate_greedily, open_runtime
from export.torch_runtime import TorchRuntime

TEXT = "A class definition binds a name, 42 times.\n\n    class C: pass"
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " 日本語 😀 <|im_end|> "},
    {"role": "assistant", "content": "ok"},
    {"role": "user", "content": "def f():\n\treturn 1"},
]


@pytest.fixture(scope="module")
def runtime(tiny_model_dir: Path) -> TorchRuntime:
    opened = open_runtime(tiny_model_dir)
    assert isinstance(opened, TorchRuntime)
    return opened


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def test_logits_are_those_of_transformers(runtime: TorchRuntime, tiny_model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    ids = runtime.tokenize(TEXT)
    with torch.no_grad():
        expected = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    runtime.reset()
    whole = runtime.forward(ids)
    assert whole.dtype == np.float32
    assert np.allclose(whole, expected, atol=1e-5)
    runtime.reset()
    assert np.allclose(runtime.prefill(ids[:6]), expected[5], atol=1e-5)
    for place in range(6, len(ids)):
        assert np.allclose(runtime.decode(ids[place]), expected[place], atol=1e-5)


def test_greedy_text_is_that_of_generate(runtime: TorchRuntime, tiny_model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    ids = runtime.tokenize(TEXT)
    prompt = torch.tensor([ids])
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False
    )
    assert generate_greedily(runtime, ids, 20) == expected[0, len(ids) :].tolist()


@pytest.mark.parametrize("prompt", [True, False])
def test_chat_ids_are_those_of_the_tokenizer(
    runtime: TorchRuntime, tiny_tokenizer: PreTrainedTokenizerFast, prompt: bool
) -> None:
    expected = tiny_tokenizer.apply_chat_template(
        CONVERSATION, tokenize=True, add_generation_prompt=prompt, return_dict=False
    )
    assert runtime.chat_ids(CONVERSATION, prompt) == expected


def test_every_end_of_turn_of_the_generation_config_stops(folder: Path) -> None:
    assert TorchRuntime(folder).end_of_turn_ids == (2,)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [2, 0]}))
    runtime = TorchRuntime(folder)
    assert runtime.end_of_turn_ids == (0, 2)
    first = generate_greedily(runtime, runtime.tokenize(TEXT), 5)
    runtime.end_of_turn_ids = (first[0],)
    assert generate_greedily(runtime, runtime.tokenize(TEXT), 5) == first[:1]


def test_context_is_bounded(tiny_model_dir: Path) -> None:
    runtime = TorchRuntime(tiny_model_dir, context_length=8)
    runtime.forward([1] * 8)
    with pytest.raises(ExportError, match="9 tokens do not fit into a context of 8"):
        runtime.decode(1)
    with pytest.raises(ExportError, match="no token to run"):
        runtime.forward([])


def test_pickles_are_not_loaded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ExportError, match="only safetensors are loaded"):
        TorchRuntime(folder)


def test_damaged_safetensors_is_one_sentence(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ExportError, match=r"cannot be loaded in transformers") as caught:
        TorchRuntime(folder)
    assert "\n" not in str(caught.value)


def test_code_of_the_folder_is_never_run(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    for file, value in (
        ("config.json", {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "own.Own"]}),
    ):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, "auto_map": value}))
    TorchRuntime(folder).forward([1, 2])
    assert not ran.exists()
