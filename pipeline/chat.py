"""A conversation in the terminal with any released file."""

import contextlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from export.runtime import Message, Runtime, sample
from pipeline.errors import UserError

HELP = "/new starts over, /quit or Ctrl-D ends, Ctrl-C stops an answer."


def find_model(path: Path, wanted: str | None = None) -> tuple[Path, list[Path]]:
    """The model to talk with, and the others that were there to choose from.

    Args:
        path: a model as ``export.runtime.open_runtime`` takes it, or a folder with some below it, such as a
            whole release.
        wanted: a part of the path of the one that is meant, such as ``q4_k_m`` or ``ONNX``; by default the
            smallest GGUF file, which is what a device would run, else the first of the others.

    Raises:
        UserError: there is none, or ``wanted`` fits none or several.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a model file or a release folder.")
    models = [path] if path.is_file() else models_below(path)
    if not models:
        raise UserError(
            f"{path}: no model here; give a .gguf or .onnx file, an MLC or Hugging Face folder, or a release."
        )
    if wanted is None:
        return models[0], models[1:]
    shown = ", ".join(str(model) for model in models)
    fitting = [model for model in models if wanted.lower() in str(model.relative_to(path)).lower()]
    # An exact name is no part of a longer one: model.onnx is not model_q4.onnx, Name is not Name-Instruct.
    fitting = [model for model in fitting if model.name.lower() == wanted.lower()] or fitting
    if len(fitting) != 1:
        problem = "fits none" if not fitting else f"fits {len(fitting)}"
        raise UserError(f"--file: {wanted!r} {problem} of {shown}; give a part of one path.")
    return fitting[0], [model for model in models if model != fitting[0]]


def models_below(folder: Path) -> list[Path]:
    """All models in a folder and below: GGUF files, then ONNX files, each the smallest first; then MLC
    folders; then Hugging Face folders, tuned ones first."""

    def by_size(pattern: str) -> list[Path]:
        return sorted(folder.rglob(pattern), key=lambda file: (file.stat().st_size, file.name))

    mlc = sorted(file.parent for file in folder.rglob("mlc-chat-config.json"))
    torch = {file.parent for file in folder.rglob("*.safetensors") if (file.parent / "config.json").is_file()}
    instruct_first = sorted(torch, key=lambda model: (not model.name.endswith("Instruct"), model.name))
    return [*by_size("*.gguf"), *by_size("*.onnx"), *mlc, *instruct_first]


def converse(
    runtime: Runtime,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    read: Callable[[str], str] = input,
) -> None:
    """Reads turns until the input ends; answers stream to standard output, speed to standard error.

    The whole conversation is rendered by the model's own template in every turn, and what the cache holds of
    it already is not run again. Turns that no longer fit are forgotten, oldest first, and that is said.

    Args:
        runtime: the model.
        max_tokens: longest answer.
        temperature: 0 takes the most likely token; above, tokens are sampled.
        seed: of the sampling.
        read: asks for a line with a prompt; raises EOFError when there is no more.

    Raises:
        ExportError: the model cannot render or run the conversation.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then has line editing and a history)
        tell(f"{runtime.name}, {runtime.context_length:,} tokens of context. {HELP}")
    generator = np.random.default_rng(seed)
    messages: list[Message] = []
    cached: list[int] = []
    while True:
        try:
            content = read("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            print(flush=True)
            return
        if content in ("/quit", "/exit"):
            return
        if content == "/new":
            messages = []
            tell("A new conversation.")
        elif re.fullmatch("/[a-z]+", content):
            tell(HELP if content == "/help" else f"There is no {content}: {HELP}")
            continue
        if not content or content == "/new":
            continue
        messages.append({"role": "user", "content": content})
        ids = runtime.chat_ids(messages, add_generation_prompt=True)
        while len(ids) >= runtime.context_length and len(messages) > 1:
            messages = messages[2:]
            ids = runtime.chat_ids(messages, add_generation_prompt=True)
            tell("The conversation is longer than the context: its oldest turn is forgotten.")
        if len(ids) >= runtime.context_length:
            tell(f"Too long: {len(ids):,} tokens, the model takes {runtime.context_length - 1:,} in a turn.")
            messages.pop()
            continue
        started = time.perf_counter()
        new = len(ids) - len(cached)
        if not cached or new <= 0 or ids[: len(cached)] != cached:
            runtime.reset()
            new, cached = len(ids), []
        logits = runtime.prefill(ids[len(cached) :])
        cached = list(ids)
        first = time.perf_counter()
        new_ids: list[int] = []
        shown = ""
        try:
            while len(new_ids) < max_tokens:
                token_id = sample(logits, generator, temperature) if temperature else int(logits.argmax())
                if token_id in runtime.end_of_turn_ids:
                    break
                new_ids.append(token_id)
                shown = show(runtime, new_ids, shown)
                if len(cached) + 1 >= runtime.context_length:
                    break
                logits = runtime.decode(token_id)
                cached.append(token_id)
        except KeyboardInterrupt:
            # It ends this answer, not the conversation; whether the last token was run nobody knows.
            cached = []
        seconds = time.perf_counter() - first
        answer = runtime.decode_text(new_ids)
        print(answer[len(shown) :], flush=True)
        tell(
            f"[{new} tokens read, {first - started:.2f} s to the first; {len(new_ids)} written, "
            f"{len(new_ids) / max(seconds, 1e-9):.1f} tok/s]"
        )
        messages.append({"role": "assistant", "content": answer})


def show(runtime: Runtime, token_ids: Sequence[int], shown: str) -> str:
    """Prints what an answer has more than ``shown``; returns what is shown then. A character may be spread
    over several tokens: it is shown when it is whole."""
    text = runtime.decode_text(token_ids)
    if text.endswith("\ufffd"):
        return shown
    print(text[len(shown) :], end="", flush=True)
    return text


def tell(line: str) -> None:
    """A line that is not the model's, on standard error, pale where that is a terminal."""
    print(f"\033[2m{line}\033[0m" if sys.stderr.isatty() else line, file=sys.stderr, flush=True)
