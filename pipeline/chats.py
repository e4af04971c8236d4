"""Conversations for instruction tuning: read from files, or prompts that the teacher answers."""

import json
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from export.llama_cpp_runtime import LlamaCppRuntime
from export.runtime import Runtime
from export.torch_runtime import TorchRuntime
from pipeline.artifacts import Artifact, Store, write_json
from pipeline.chat_template import render_with_mask
from pipeline.errors import UserError
from pipeline.models import load_tokenizer, throttled
from pipeline.prepare import source_digests
from pipeline.recipe import Recipe
from pipeline.sources import conversations, everyday_prompts, reasoning_prompts
from pipeline.teacher import packaged_gguf

STAGE = "chats"
VERSION = 1
TEMPERATURE = 0.7
TOP_P = 0.9
PROMPTS: dict[str, Callable[[int], Iterator[str]]] = {
    "everyday": lambda seed: everyday_prompts(),
    "reasoning-gym": reasoning_prompts,
}

Messages = list[dict[str, str]]


def run(store: Store, recipe: Recipe, teacher: Artifact) -> Artifact:
    """Collects the conversations, or lets the teacher write them (seeded; a killed run goes on).

    Returns:
        ``train.jsonl`` and ``held_out.jsonl`` ({"messages": [...]} a line) and ``statistics.json``. No
        first user turn is in both.

    Raises:
        UserError: a source is missing or broken, or there are too few conversations.
    """
    section = recipe.data.chats
    for source in section.sources:
        kind, _, name = source.partition(":")
        if kind == "prompts" and name not in PROMPTS:
            raise UserError(
                f"data.chats.sources: there are no prompts named {name!r}; choose from {', '.join(PROMPTS)}."
            )

    def make(output: Path, work: Path) -> None:
        tokenizer = load_tokenizer(teacher.path / "model")
        ready: list[Messages] = []
        prompts: list[str] = []
        for source in section.sources:
            kind, _, name = source.partition(":")
            if kind == "prompts":
                prompts += PROMPTS[name](recipe.seed)
            else:
                ready += conversations(source)
        wanted = section.conversations + section.held_out_conversations
        generator = random.Random(recipe.seed)
        ready = _fitting(_distinct(ready), tokenizer, section.max_tokens)
        generator.shuffle(ready)
        prompts = list(dict.fromkeys(prompts))
        generator.shuffle(prompts)
        chats = ready[:wanted]
        written = 0
        if len(chats) < wanted and prompts:
            asked = {messages[0]["content"] for messages in chats}
            for messages in _answered(
                recipe, teacher, [p for p in prompts if p not in asked], work, wanted - len(chats), store
            ):
                chats += _fitting([messages], tokenizer, section.max_tokens)
                written += 1
                if len(chats) == wanted:
                    break
        if len(chats) < wanted:
            raise UserError(
                f"data.chats.conversations: {section.conversations} for training and "
                f"{section.held_out_conversations} held out are asked for, but the sources give only "
                f"{len(chats)} of at most {section.max_tokens} tokens; lower these or give more sources."
            )
        generator.shuffle(chats)
        splits = {
            "held_out": chats[: section.held_out_conversations],
            "train": chats[section.held_out_conversations :],
        }
        statistics: dict[str, Any] = {"written_by_teacher": written, "splits": {}}
        for split, members in splits.items():
            with (output / f"{split}.jsonl").open("w", encoding="utf-8") as file:
                for messages in members:
                    file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            masks = [render_with_mask(tokenizer, messages)[1] for messages in members]
            statistics["splits"][split] = {
                "conversations": len(members),
                "tokens": sum(len(mask) for mask in masks),
                "assistant_tokens": sum(sum(mask) for mask in masks),
            }
        write_json(output / "statistics.json", statistics)

    return store.get_or_make(
        STAGE,
        VERSION,
        {"chats": recipe.slice("data")["data"]["chats"], "sources": source_digests(section.sources)},
        {"teacher": teacher},
        make,
        recipe.seed,
    )


def _distinct(chats: list[Messages]) -> list[Messages]:
    """Conversations whose first user turn no earlier one has."""
    first = {}
    for messages in chats:
        opening = next((m["content"] for m in messages if m["role"] == "user"), "")
        first.setdefault(" ".join(opening.split()).lower(), messages)
    return list(first.values())


def _fitting(chats: list[Messages], tokenizer: Any, max_tokens: int) -> list[Messages]:
    fitting = []
    for messages in chats:
        input_ids, mask = render_with_mask(tokenizer, messages)
        if len(input_ids) <= max_tokens and any(mask):
            fitting.append(messages)
    return fitting


def _answered(
    recipe: Recipe, teacher: Artifact, prompts: list[str], work: Path, wanted: int, store: Store
) -> Iterator[Messages]:
    """Conversations of one prompt and the teacher's answer, in the order of the prompts.

    Answers are appended to a file in ``work`` and not asked for again after a kill. Each prompt has its own
    seed, so an answer does not depend on those before it.
    """
    section = recipe.data.chats
    path = work / "answers.jsonl"
    answers: dict[str, str] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the line that a kill cut short
                continue
            answers[entry["prompt"]] = entry["answer"]
    runtime = _open_teacher(recipe, teacher)
    report = throttled(store.report)
    started, asked, tokens = time.monotonic(), 0, 0
    try:
        with path.open("a", encoding="utf-8") as file:
            if path.stat().st_size:
                file.write("\n")
            for number, prompt in enumerate(prompts):
                if prompt not in answers:
                    seed = [recipe.seed, number]
                    answers[prompt], count = _answer(runtime, prompt, section.max_answer_tokens, seed)
                    file.write(json.dumps({"prompt": prompt, "answer": answers[prompt]}) + "\n")
                    file.flush()
                    asked, tokens = asked + 1, tokens + count
                    elapsed = time.monotonic() - started
                    left = max(0, wanted - number - 1) * elapsed / asked
                    report(
                        f"chats: the teacher has answered {number + 1} of {wanted} prompts, "
                        f"{tokens / elapsed:.0f} tok/s, {left:.0f} s left"
                    )
                if answers[prompt]:
                    yield [
                        {"role": "user", "content": prompt},
                        {"role": "assistant", "content": answers[prompt]},
                    ]
    finally:
        runtime.close()


def _open_teacher(recipe: Recipe, teacher: Artifact) -> Runtime:
    gguf = packaged_gguf(recipe.teacher.model)
    length = recipe.data.chats.max_tokens + recipe.data.chats.max_answer_tokens
    if gguf is not None:
        return LlamaCppRuntime(gguf, recipe.threads, max(512, length))
    return TorchRuntime(teacher.path / "model", recipe.threads)


def _answer(runtime: Runtime, prompt: str, max_tokens: int, seed: list[int]) -> tuple[str, int]:
    """A sampled answer (temperature, nucleus); one cut short ends at its last whole sentence."""
    generator = np.random.default_rng(seed)
    runtime.reset()
    ids = runtime.chat_ids([{"role": "user", "content": prompt}], add_generation_prompt=True)
    logits = runtime.prefill(ids)
    new_ids: list[int] = []
    ended = False
    while len(new_ids) < max_tokens:
        token_id = _sample(logits, generator)
        if token_id in runtime.end_of_turn_ids:
            ended = True
            break
        new_ids.append(token_id)
        if len(new_ids) < max_tokens:
            logits = runtime.decode(token_id)
    text = runtime.decode_text(new_ids).strip()
    if not ended:
        whole = re.match(r"(?s).*[.!?](?=\s|$)", text)
        text = whole.group(0).strip() if whole else ""
    return text, len(new_ids)


def _sample(logits: np.ndarray, generator: np.random.Generator) -> int:
    """Nucleus sampling (Holtzman et al. 2020) at ``TEMPERATURE``."""
    scaled = logits.astype(np.float64) / TEMPERATURE
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    cumulative = np.cumsum(probabilities[order])
    kept = order[: int(np.searchsorted(cumulative, TOP_P)) + 1]
    nucleus = probabilities[kept] / probabilities[kept].sum()
    return int(generator.choice(kept, p=nucleus))
