"""Conversations for instruction tuning: read from files, or prompts that the teacher answers."""

import itertools
import json
import random
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from export.llama_cpp_runtime import LlamaCppRuntime
from export.runtime import Runtime, sample
from export.torch_runtime import TorchRuntime
from pipeline.artifacts import OWN_DIGEST, Artifact, Store, is_as_written, with_own_digest, write_json
from pipeline.chat_template import render_with_mask
from pipeline.errors import UserError
from pipeline.models import load_tokenizer, throttled
from pipeline.progress import Progress
from pipeline.recipe import Recipe
from pipeline.sources import conversations, everyday_prompts, reasoning_prompts, source_digests
from pipeline.teacher import packaged_gguf

STAGE = "chats"
VERSION = 3
ANSWER_KEYS = ("prompt", "answer")
"""Of a line of the teacher's answers."""
TEMPERATURE = 0.3
TOP_P = 0.9
REPEATED_WORDS = 5
REPETITIONS = 3
"""An answer that says the same ``REPEATED_WORDS`` words this often is caught in a loop and left out."""
PROMPTS: dict[str, Callable[[int], Iterator[str]]] = {
    "everyday": lambda seed: everyday_prompts(),
    "reasoning-gym": reasoning_prompts,
}

ROWS_PER_CONVERSATION = 16
"""Rows of a data set that are looked at for each conversation wanted."""

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
        tokenizer = load_tokenizer(teacher.path / "model", recipe.teacher.trust_remote_code)
        wanted = section.conversations + section.held_out_conversations
        ready: list[Messages] = []
        prompts: list[str] = []
        for source in section.sources:
            kind, _, name = source.partition(":")
            if kind == "prompts":
                prompts += PROMPTS[name](recipe.seed)
            else:
                # A data set may be endless; it comes shuffled, so its first part is as good as any.
                limit = ROWS_PER_CONVERSATION * wanted if kind == "dataset" else None
                ready += itertools.islice(conversations(source, recipe.seed), limit)
        generator = random.Random(recipe.seed)
        generator.shuffle(ready)
        prompts = list({_normalised(prompt): prompt for prompt in reversed(prompts)}.values())
        generator.shuffle(prompts)
        chats: list[Messages] = []
        openings: set[str] = set()
        counts = {"written_by_teacher": 0, "duplicates": 0, "too_long": 0, "without_answer": 0}

        def take(messages: Messages) -> bool:
            """Whether the conversation is a new one that fits."""
            opening = _normalised(next((m["content"] for m in messages if m["role"] == "user"), ""))
            input_ids, mask = render_with_mask(tokenizer, messages)
            if opening in openings:
                counts["duplicates"] += 1
            elif len(input_ids) > section.max_tokens:
                counts["too_long"] += 1
            elif not any(mask):
                counts["without_answer"] += 1
            else:
                openings.add(opening)
                chats.append(messages)
                return True
            return False

        for messages in ready:
            if len(chats) == wanted:
                break
            take(messages)
        if len(chats) < wanted and prompts:
            asking = [prompt for prompt in prompts if _normalised(prompt) not in openings]
            answered = _answered(recipe, teacher, asking, work, wanted - len(chats), store)
            with closing(answered):
                for prompt, answer in answered:
                    if not answer:
                        counts["without_answer"] += 1
                        continue
                    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                    counts["written_by_teacher"] += take(messages)
                    if len(chats) == wanted:
                        break
        if len(chats) < wanted:
            raise UserError(
                f"data.chats.conversations: {section.conversations} for training and "
                f"{section.held_out_conversations} held out are asked for, but the sources give only "
                f"{len(chats)} of at most {section.max_tokens} tokens (data.chats.max_tokens); lower these "
                "or give more data.chats.sources."
            )
        generator.shuffle(chats)
        splits = {
            "held_out": chats[: section.held_out_conversations],
            "train": chats[section.held_out_conversations :],
        }
        statistics: dict[str, Any] = {**counts, "licence": section.licence, "splits": {}}
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


def _normalised(text: str) -> str:
    """Texts that differ only in case, white space or the punctuation at their end are the same prompt."""
    return " ".join(text.lower().split()).rstrip(" .?!")


def _answered(
    recipe: Recipe, teacher: Artifact, prompts: list[str], work: Path, wanted: int, store: Store
) -> Generator[tuple[str, str], None, None]:
    """Each prompt and the teacher's answer, in the order of the prompts; no answer is an empty one.

    Answers are appended to a file in ``work`` and not asked for again after a kill. Each line has its own
    SHA-256, and one that a kill or a crash damaged is passed over. Each prompt has its own seed, so an answer
    does not depend on those before it.
    """
    section = recipe.data.chats
    path = work / "answers.jsonl"
    answers: dict[str, str] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and OWN_DIGEST in entry and is_as_written(entry, ANSWER_KEYS):
                answers[entry["prompt"]] = entry["answer"]
    runtimes = _open_teachers(recipe, teacher)
    free: SimpleQueue[Runtime] = SimpleQueue()
    for runtime in runtimes:
        free.put(runtime)

    def ask(number: int, prompt: str) -> tuple[str, int]:
        runtime = free.get()
        try:
            return _answer(runtime, prompt, section.max_answer_tokens, [recipe.seed, number])
        finally:
            free.put(runtime)

    report = throttled(store.report)
    started, asked, tokens = time.monotonic(), 0, 0
    upcoming = enumerate(prompts)
    pending: deque[tuple[int, str, Future[tuple[str, int]] | None]] = deque()
    pool = ThreadPoolExecutor(len(runtimes))
    try:
        with path.open("a", encoding="utf-8") as file:
            if path.stat().st_size:
                file.write("\n")
            while True:
                for number, prompt in itertools.islice(upcoming, len(runtimes) + 1 - len(pending)):
                    known = prompt in answers
                    pending.append((number, prompt, None if known else pool.submit(ask, number, prompt)))
                if not pending:
                    return
                number, prompt, future = pending.popleft()
                if future is not None:
                    answers[prompt], count = future.result()
                    kept = with_own_digest({"prompt": prompt, "answer": answers[prompt]})
                    file.write(json.dumps(kept) + "\n")
                    file.flush()
                    asked, tokens = asked + 1, tokens + count
                    elapsed = time.monotonic() - started
                    left = max(0, wanted - number - 1) * elapsed / asked
                    rate = f"{tokens / elapsed:.0f} tok/s"
                    # Prompts that got no answer are made up for with others.
                    total = max(wanted, number + 1)
                    report(Progress("chats: the teacher answers", number + 1, total, "prompts", rate, left))
                yield prompt, answers[prompt]
    finally:
        pool.shutdown(cancel_futures=True)
        for runtime in runtimes:
            runtime.close()


def _open_teachers(recipe: Recipe, teacher: Artifact) -> list[Runtime]:
    """A packaged GGUF is opened once a thread, each copy answering its own prompts: several threads on one
    token wait for each other at every layer, and on a busy machine they mostly wait."""
    gguf = packaged_gguf(recipe.teacher.model)
    length = max(512, recipe.data.chats.max_tokens + recipe.data.chats.max_answer_tokens)
    if gguf is not None:
        return [LlamaCppRuntime(gguf, 1, length) for _ in range(recipe.threads)]
    trusted = recipe.teacher.trust_remote_code
    return [TorchRuntime(teacher.path / "model", recipe.threads, trust_remote_code=trusted)]


def _answer(runtime: Runtime, prompt: str, max_tokens: int, seed: list[int]) -> tuple[str, int]:
    """A sampled answer (temperature, nucleus) and the number of its tokens."""
    generator = np.random.default_rng(seed)
    runtime.reset()
    ids = runtime.chat_ids([{"role": "user", "content": prompt}], add_generation_prompt=True)
    if len(ids) + max_tokens > runtime.context_length:
        return "", 0
    logits = runtime.prefill(ids)
    new_ids: list[int] = []
    ended = False
    while len(new_ids) < max_tokens:
        token_id = sample(logits, generator, TEMPERATURE, TOP_P)
        if token_id in runtime.end_of_turn_ids:
            ended = True
            break
        new_ids.append(token_id)
        if len(new_ids) < max_tokens:
            logits = runtime.decode(token_id)
    return tidy_answer(runtime.decode_text(new_ids), ended), len(new_ids)


def tidy_answer(text: str, ended: bool) -> str:
    """An answer fit to learn from: one that was cut short ends at its last whole sentence; one caught in a
    loop, or without any whole sentence, is empty.

    Args:
        text: what was generated.
        ended: the model ended its turn itself.
    """
    text = text.strip()
    if not ended:
        # A sentence ends at punctuation that white space follows, but not at that of a list's "2.".
        ends = [match.end() for match in re.finditer(r"(?<![\d\s])[.!?][\"')\]]*(?=\s|$)", text)]
        text = text[: ends[-1]] if ends else ""
    words = text.lower().split()
    runs = Counter(zip(*(words[start:] for start in range(REPEATED_WORDS)), strict=False))
    return "" if max(runs.values(), default=0) >= REPETITIONS else text
