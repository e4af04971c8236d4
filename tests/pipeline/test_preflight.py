"""What no format can hold is told before anything is trained, with the format's name and the reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from pipeline import preflight
from pipeline.artifacts import Store
from pipeline.errors import UserError
from pipeline.recipe import Recipe

ALL = ("gguf", "mlc", "onnx")


@pytest.fixture
def model_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def set_config(model_dir: Path, **values: Any) -> None:
    content = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(content | values))


def test_a_model_that_every_format_can_hold(tiny_model_dir: Path) -> None:
    assert preflight.problems(tiny_model_dir, ALL, pre_tokenizer="smollm") == []


def test_a_library_for_browsers_needs_emscripten(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert preflight.problems(tiny_model_dir, ["mlc"], libraries=["x86_64-cpu"]) == []
    (problem,) = preflight.problems(tiny_model_dir, ["mlc"], libraries=["x86_64-cpu", "wasm32-webgpu"])
    assert problem.startswith("export.mlc: ")
    assert "apt-get install emscripten" in problem


def test_added_tokens_of_both_kinds_and_padded_rows(model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_tokens([AddedToken("<tool_call>"), AddedToken("<|user|>", special=True)])
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>assistant", "<|user|>assistant")
    tokenizer.save_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    model.save_pretrained(model_dir)
    assert preflight.problems(model_dir, ("gguf", "onnx"), pre_tokenizer="smollm") == []


def test_a_pre_tokenizer_that_the_converter_does_not_know(tiny_model_dir: Path) -> None:
    (problem,) = preflight.problems(tiny_model_dir, ALL)
    assert problem.startswith("export.gguf: ")
    assert "does not recognise this pre-tokenizer" in problem


def test_the_wrong_name_for_a_pre_tokenizer(tiny_model_dir: Path) -> None:
    (problem,) = preflight.problems(tiny_model_dir, ["gguf"], pre_tokenizer="falcon")
    assert problem.startswith("export.gguf: llama.cpp makes other token ids")
    assert problem.endswith("pre_tokenizer falcon is not the model's, name another.")


def test_architectures_that_no_runtime_or_only_some_know(model_dir: Path) -> None:
    set_config(model_dir, model_type="cohere", architectures=["CohereForCausalLM"], layer_norm_eps=1e-5)
    mlc, onnx = preflight.problems(model_dir, ALL, pre_tokenizer="smollm")
    assert mlc.startswith("export.mlc: ")
    assert "model_type 'cohere' cannot be exported to MLC" in mlc
    assert onnx.startswith("export.onnx: ")
    assert "the architecture CohereForCausalLM is not known" in onnx
    set_config(model_dir, model_type="cohere", architectures=["SwallowForCausalLM"])
    (gguf,) = preflight.problems(model_dir, ["gguf"], pre_tokenizer="smollm")
    assert "SwallowForCausalLM is not supported" in gguf


def test_a_model_without_a_template_is_for_no_chat(model_dir: Path) -> None:
    (model_dir / "chat_template.jinja").unlink()
    (problem,) = preflight.problems(model_dir, ALL, pre_tokenizer="smollm")
    assert problem.startswith("export: no format can hold the model: ")
    assert preflight.problems(model_dir, ["gguf", "onnx"], pre_tokenizer="smollm", chats=False) == []


def test_a_template_that_mlc_cannot_say(model_dir: Path) -> None:
    template = (model_dir / "chat_template.jinja").read_text()
    (model_dir / "chat_template.jinja").write_text(
        template.replace("message['content']", "message['content'] | trim")
    )
    (problem,) = preflight.problems(model_dir, ["mlc"])
    assert problem.startswith("export.mlc: The chat template cannot be said in MLC's conv_template")


def test_token_ids_beyond_the_embedding(model_dir: Path) -> None:
    set_config(model_dir, vocab_size=2000)
    (problem,) = preflight.problems(model_dir, ALL, pre_tokenizer="smollm")
    assert "token ids up to 2047, but config.json a vocab_size of 2000" in problem


def test_the_stage_passes_once_and_fails_with_a_sentence(
    store: Store, make_recipe: Callable[..., Recipe], tiny_model_dir: Path
) -> None:
    student = store.get_or_make(
        "student", 1, {}, {}, lambda output, work: shutil.copytree(tiny_model_dir, output / "model")
    )
    recipe = make_recipe(export={"gguf": ["q8_0"], "mlc": [], "onnx": [], "pre_tokenizer": "smollm"})
    assert not preflight.run(store, recipe, student).cached
    assert preflight.run(store, recipe, student).cached
    with pytest.raises(UserError, match=r"^export\.gguf: .*does not recognise this pre-tokenizer"):
        preflight.run(store, make_recipe(export={"gguf": ["q8_0"], "mlc": [], "onnx": []}), student)
