"""A tiny recipe on real stages, a Prefect server, and the command line called as a user calls it."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.command_line import main

# What the command line sets for its own process; here Prefect is imported before that.
os.environ.update(
    DO_NOT_TRACK="1",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    PREFECT_LOGGING_LEVEL="CRITICAL",
    PREFECT_LOGGING_TO_API_ENABLED="false",
)

SENTENCE = "The martlet is a small swallow that never lands; number {} of them crossed the sea in spring."


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """Prefect's own test server, so that flows run in this process and leave the user's profile alone."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def clean_environment() -> Iterator[None]:
    """The command line sets environment variables for its process; here they are put back."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def martlet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, clean_environment: None
) -> Callable[..., tuple[int, str, str]]:
    """Calls ``martlet ARGUMENTS`` in this process: (exit code, standard output, standard error)."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["martlet", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def tiny_recipe(tmp_path: Path, tiny_model_dir: Path) -> dict[str, Any]:
    """Values of a recipe that takes seconds: a tiny random teacher, its own text and chats, GGUF only."""
    text = tmp_path / "text.jsonl"
    with text.open("w", encoding="utf-8") as file:
        for document in range(120):
            words = " ".join(SENTENCE.format(document * 7 + sentence) for sentence in range(3))
            file.write(json.dumps({"text": words}) + "\n")
    chats = tmp_path / "chats.jsonl"
    with chats.open("w", encoding="utf-8") as file:
        for number in range(12):
            messages = [
                {"role": "user", "content": f"What is bird number {number}?"},
                {"role": "assistant", "content": SENTENCE.format(number)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return {
        "name": "Tiny",
        "threads": 1,
        "teacher": {"model": str(tiny_model_dir), "licence": "CC0-1.0"},
        "data": {
            "text": {
                "sources": [str(text)],
                "sequence_length": 32,
                "train_tokens": 256,
                "held_out_tokens": 128,
                "calibration_tokens": 64,
            },
            "chats": {
                "sources": [str(chats)],
                "conversations": 8,
                "held_out_conversations": 2,
                "max_tokens": 128,
            },
        },
        "student": {"prune": {"layers": 3}},
        "distill": {"evaluate_every": 2, "evaluate_tokens": 64, "checkpoint_every": 2, "control": True},
        "instruct": {"learning_rate": 1e-4, "batch_size": 4},
        "export": {"gguf": ["q8_0"], "mlc": [], "onnx": [], "pre_tokenizer": "smollm"},
        "validate": {"tokens": 64, "default": {"mean_kl": 1.0, "perplexity_ratio": 2.0}},
        "bench": {"prompt_tokens": 16, "generated_tokens": 4, "repetitions": 2},
    }


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Writes recipe values to a file."""

    def write(values: dict[str, Any]) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write
