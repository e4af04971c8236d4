"""Modelfiles: rendered by Go's own template engine, as Ollama does, and compared with transformers."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from export.mlc import conversation_template
from export.ollama import go_template, modelfile

CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  {{ .System }}\n"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two\n\nthree"},
        {"role": "user", "content": "日本語 😀"},
    ],
]

# What Ollama does with a template: system messages joined into .System, the Modelfile's where there is none.
RENDER = """
package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
type Chat struct { System string; Messages []Message }
func main() {
    text, _ := os.ReadFile(os.Args[1])
    var chats []Chat
    if err := json.NewDecoder(os.Stdin).Decode(&chats); err != nil { panic(err) }
    parsed := template.Must(template.New("").Option("missingkey=zero").Parse(string(text)))
    for _, chat := range chats {
        if err := parsed.Execute(os.Stdout, chat); err != nil { panic(err) }
        os.Stdout.WriteString("\\x00")
    }
}
"""


@pytest.fixture(scope="module")
def said(tiny_tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return conversation_template(tiny_tokenizer, [2])


def test_a_modelfile_says_everything(said: dict[str, Any]) -> None:
    text = modelfile("name-q4_k_m.gguf", said, 512)
    assert text.startswith("FROM ./name-q4_k_m.gguf\nPARAMETER num_ctx 512\n")
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert re.search(r'^SYSTEM """You are .*"""$', text, flags=re.MULTILINE)
    assert len(re.findall('"""', text)) == 4


def test_a_modelfile_without_a_template_leaves_the_choice_to_ollama() -> None:
    assert modelfile("a.gguf", None, 100_000) == "FROM ./a.gguf\nPARAMETER num_ctx 8192\n"


def test_generation_defaults_that_the_model_states_are_parameters() -> None:
    generation = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1, "eos_token_id": [1, 2]}
    parameters = modelfile("a.gguf", None, 512, generation).splitlines()[2:]
    assert parameters == ["PARAMETER temperature 0.6", "PARAMETER top_k 20", "PARAMETER repeat_penalty 1.1"]


def test_a_template_that_a_modelfile_cannot_hold_is_left_out(said: dict[str, Any]) -> None:
    broken = said | {"seps": ['"""']}
    assert go_template(broken) is None
    assert "TEMPLATE" not in modelfile("a.gguf", broken, 512)


def test_go_renders_what_transformers_renders(
    said: dict[str, Any], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    if not shutil.which("go"):
        pytest.skip("go is not installed (apt-get install golang-go)")
    template = go_template(said)
    assert template is not None
    (tmp_path / "template").write_text(template, encoding="utf-8")
    (tmp_path / "main.go").write_text(RENDER, encoding="utf-8")
    chats = []
    for messages in CONVERSATIONS:
        system = [m["content"] for m in messages if m["role"] == "system"] or [said["system_message"]]
        chats.append(
            {"System": system[0], "Messages": [{k.title(): v for k, v in m.items()} for m in messages]}
        )
    finished = subprocess.run(
        ["go", "run", str(tmp_path / "main.go"), str(tmp_path / "template")],
        input=json.dumps(chats),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "GOCACHE": str(tmp_path / "cache"), "GO111MODULE": "off"},
    )
    rendered = finished.stdout.split("\x00")[:-1]
    assert rendered == [
        tiny_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in CONVERSATIONS
    ]
