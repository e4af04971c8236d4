"""What no format can hold is told before anything is trained, with the format's name and the reason."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedTokenizerFast,
)

from pipeline import preflight, prepare, student
from pipeline.artifacts import Artifact, Store
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


@pytest.fixture
def granite_dir(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A student that MLC cannot hold, with the tiny teacher's tokenizer."""
    config = GraniteConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    folder = tmp_path / "granite"
    GraniteForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def on_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path, str], Path]:
    """Puts a folder where huggingface_hub keeps ``someone/student`` of a commit, with no hub to ask."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(folder: Path, commit: str) -> Path:
        return Path(
            shutil.copytree(folder, tmp_path / "hub" / "models--someone--student" / "snapshots" / commit)
        )

    return put


def test_a_student_of_the_hub_is_checked_as_a_local_one(
    make_recipe: Callable[..., Recipe],
    store: Store,
    tiny_teacher: Artifact,
    tiny_model_dir: Path,
    granite_dir: Path,
    on_hub: Callable[[Path, str], Path],
) -> None:
    """The commit that the recipe names decides: of two, MLC can hold one."""
    held, other = "1" * 40, "2" * 40
    on_hub(tiny_model_dir, held)
    on_hub(granite_dir, other)
    text = prepare.run(store, make_recipe(), tiny_teacher)

    def check(model: str, revision: str | None = None) -> Artifact:
        recipe = make_recipe(
            student={"model": model, "revision": revision},
            export={"gguf": [], "mlc": ["q4f32_1"], "onnx": []},
        )
        return preflight.run(store, recipe, student.run(store, recipe, tiny_teacher, text))

    check("someone/student", held)
    sentences = []
    for model, revision in ((str(granite_dir), None), ("someone/student", other)):
        with pytest.raises(UserError) as refused:
            check(model, revision)
        # They name the student's folder in the store, whose key the origin is a part of.
        sentences.append(re.sub("[0-9a-f]{64}", "KEY", str(refused.value)))
    assert "model_type 'granite' cannot be exported to MLC" in sentences[0]
    assert sentences[0] == sentences[1]
    with pytest.raises(UserError, match="someone/student is neither a local folder nor to be had from"):
        check("someone/student", "3" * 40)


def test_a_configuration_of_the_hub_is_read_with_the_same_care(
    make_recipe: Callable[..., Recipe],
    store: Store,
    tiny_teacher: Artifact,
    model_dir: Path,
    on_hub: Callable[[Path, str], Path],
) -> None:
    set_config(model_dir, vocab_size=10**12)
    snapshot = on_hub(model_dir, "1" * 40)
    text = prepare.run(store, make_recipe(), tiny_teacher)
    sentences = []
    for model, revision in ((str(model_dir), None), ("someone/student", "1" * 40)):
        with pytest.raises(UserError) as refused:
            student.run(
                store, make_recipe(student={"model": model, "revision": revision}), tiny_teacher, text
            )
        sentences.append(str(refused.value))
    assert sentences[0].startswith(f"student.model: {model_dir / 'config.json'}: ")
    assert sentences[1] == sentences[0].replace(str(model_dir), str(snapshot))
