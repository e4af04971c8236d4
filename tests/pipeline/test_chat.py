"""Conversations in the terminal: which model, what is remembered, what is forgotten."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from export.runtime import Message, generate_greedily
from export.torch_runtime import TorchRuntime
from pipeline.chat import converse, find_model
from pipeline.errors import UserError


@pytest.fixture
def release(tmp_path: Path) -> Path:
    for name, size in (
        ("Name/config.json", 2),
        ("Name/model.safetensors", 9),
        ("Name-Instruct/config.json", 2),
        ("Name-Instruct/model.safetensors", 9),
        ("Name-Instruct-GGUF/name-q8_0.gguf", 8),
        ("Name-Instruct-GGUF/name-q4_k_m.gguf", 4),
        ("Name-Instruct-ONNX/config.json", 2),
        ("Name-Instruct-ONNX/onnx/model.onnx", 9),
        ("Name-Instruct-ONNX/onnx/model_q4.onnx", 3),
        ("Name-Instruct-q4f32_1-MLC/mlc-chat-config.json", 2),
    ):
        path = tmp_path / "release" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    return tmp_path / "release"


@pytest.mark.parametrize(
    ("below", "wanted", "found"),
    [
        ("", None, "Name-Instruct-GGUF/name-q4_k_m.gguf"),
        ("", "q8_0", "Name-Instruct-GGUF/name-q8_0.gguf"),
        ("", "model.onnx", "Name-Instruct-ONNX/onnx/model.onnx"),
        ("", "model_q4", "Name-Instruct-ONNX/onnx/model_q4.onnx"),
        ("", "MLC", "Name-Instruct-q4f32_1-MLC"),
        ("", "Name-Instruct", "Name-Instruct"),
        ("", "Name", "Name"),
        ("Name-Instruct-ONNX", None, "Name-Instruct-ONNX/onnx/model_q4.onnx"),
        ("Name-Instruct-q4f32_1-MLC", None, "Name-Instruct-q4f32_1-MLC"),
        ("Name", None, "Name"),
        ("Name-Instruct-GGUF/name-q8_0.gguf", None, "Name-Instruct-GGUF/name-q8_0.gguf"),
    ],
)
def test_any_part_of_a_release_leads_to_a_model(
    release: Path, below: str, wanted: str | None, found: str
) -> None:
    assert find_model(release / below, wanted)[0] == release / found


def test_the_others_are_named(release: Path) -> None:
    _, others = find_model(release)
    assert len(others) == 6
    assert others[-1].name == "Name"


@pytest.mark.parametrize(("wanted", "said"), [("onnx", "fits 2"), ("q3", "fits none")])
def test_what_fits_none_or_several_is_refused(release: Path, wanted: str, said: str) -> None:
    with pytest.raises(UserError, match=f"{said} of .*name-q8_0.gguf"):
        find_model(release, wanted)


def test_a_folder_without_models_and_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model here"):
        find_model(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        find_model(tmp_path / "nowhere")


def lines(*turns: str) -> Iterator[str]:
    yield from turns


def talk(runtime: TorchRuntime, max_tokens: int, *turns: str) -> None:
    source = lines(*turns)

    def read(prompt: str) -> str:
        try:
            return next(source)
        except StopIteration:
            raise EOFError from None

    converse(runtime, max_tokens, read=read)


def test_answers_are_those_of_the_whole_conversation(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What stays in the cache between turns changes nothing: every answer is the greedy one of its prompt."""
    talk(TorchRuntime(tiny_model_dir), 8, "What is rain?", "", "And snow?", "/new", "And snow?")
    captured = capsys.readouterr()
    reference = TorchRuntime(tiny_model_dir)
    messages: list[Message] = []
    expected = []
    for turn in ("What is rain?", "And snow?", None, "And snow?"):
        if turn is None:
            messages = []
            continue
        messages.append({"role": "user", "content": turn})
        ids = generate_greedily(reference, reference.chat_ids(messages, True), 8)
        ids = [token_id for token_id in ids if token_id not in reference.end_of_turn_ids]
        expected.append(reference.decode_text(ids))
        messages.append({"role": "assistant", "content": expected[-1]})
    assert captured.out == "\n".join(expected) + "\n\n"
    assert captured.err.count("tok/s]") == 3


def test_what_looks_like_a_command_is_not_said_to_the_model(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(TorchRuntime(tiny_model_dir), 1, "/help", "/stop")
    captured = capsys.readouterr()
    assert captured.out == "\n"
    assert captured.err.count("/new starts over") == 2
    assert "There is no /stop" in captured.err


def test_a_turn_reads_only_what_is_new(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk(TorchRuntime(tiny_model_dir), 1, "What is rain and where does it come from?", "And snow?")
    first, second = (int(count) for count in re.findall(r"\[(\d+) tokens read", capsys.readouterr().err))
    assert second < first


def test_a_long_conversation_forgets_its_oldest_turns(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime = TorchRuntime(tiny_model_dir, context_length=96)
    talk(runtime, 30, "One two three four.", "Five six seven eight.", "x " * 200, "Nine.")
    said = capsys.readouterr().err
    assert "its oldest turn is forgotten" in said
    assert "Too long: " in said
    assert "the model takes 95 in a turn" in said
    assert said.count("tok/s]") == 3
