"""Runs one exported file in a process of its own: a runtime that crashes ends this process, not the run.

Usage: python -m pipeline.validate_worker REQUEST.json RESULT.json
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from export.errors import ExportError
from export.runtime import Runtime, open_runtime
from pipeline.artifacts import write_json
from pipeline.conversations import fixed_conversations
from pipeline.fidelity import Fidelity

CHUNK = 256
"""Positions compared at a time."""


def reference_answers(model_dir: Path, rows: list[list[int]], threads: int, folder: Path) -> None:
    """Writes what the gates compare with: logits of every row and facts of tokenizer and generation."""
    runtime = open_runtime(model_dir, threads)
    for number, row in enumerate(rows):
        runtime.reset()
        np.save(folder / f"logits-{number:04d}.npy", runtime.forward(row).astype(np.float32))
    write_json(folder / "facts.json", {"rows": rows, **facts(runtime, with_text=True)})
    runtime.close()


def facts(runtime: Runtime, with_text: bool = False) -> dict[str, Any]:
    """What a file says of itself: token ids of the fixed conversations, ends of turn, sizes."""
    chats = {
        str(prompt): [runtime.chat_ids(messages, prompt) for messages in fixed_conversations()]
        for prompt in (False, True)
    }
    return {
        "chat_ids": chats,
        "end_of_turn_ids": list(runtime.end_of_turn_ids),
        "vocabulary_size": runtime.vocabulary_size,
        "context_length": runtime.context_length,
        **({"template_end": chats["False"][0][-4:]} if with_text else {}),
    }


def judge(
    runtime: Runtime, reference: dict[str, Any], logits_of: Callable[[int], np.ndarray]
) -> dict[str, Any]:
    """Everything that the gates of one file look at.

    Args:
        runtime: the file, loaded.
        reference: ``facts`` of the model with its ``rows``.
        logits_of: the model's logits ``[T, V]`` of a row.
    """
    found = facts(runtime)
    differing = [
        f"conversation {number}, {'with' if prompt == 'True' else 'without'} generation prompt"
        for prompt, expected in reference["chat_ids"].items()
        for number, ids in enumerate(expected)
        if found["chat_ids"][prompt][number] != ids
    ]
    size = min(runtime.vocabulary_size, reference["vocabulary_size"])
    fidelity = Fidelity()
    for number, row in enumerate(reference["rows"]):
        runtime.reset()
        logits, expected = runtime.forward(row), logits_of(number)
        following = np.array(row[1:])
        for start in range(0, len(following), CHUNK):
            chunk = slice(start, min(start + CHUNK, len(following)))
            fidelity.add(expected[chunk, :size], logits[chunk, :size], following[chunk])
    return {
        "token_ids_equal": not differing,
        "token_ids_differ_in": differing[:3],
        "token_ids_differ": len(differing),
        "conversations": sum(len(ids) for ids in reference["chat_ids"].values()),
        "stops_at_end_of_turn": set(reference["end_of_turn_ids"]) <= set(found["end_of_turn_ids"]),
        "end_of_turn_ids": found["end_of_turn_ids"],
        "reference_end_of_turn_ids": reference["end_of_turn_ids"],
        "vocabulary_size": found["vocabulary_size"],
        "vocabulary_size_equal": found["vocabulary_size"] == reference["vocabulary_size"],
        "context_length": found["context_length"],
        **fidelity.statistics(),
    }


def main() -> int:
    """Reads the request, writes the result; exit code 2 and a sentence on stderr if the file fails to run."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder = Path(request["reference"])
    try:
        if request["file"] is None:
            reference_answers(Path(request["model"]), request["rows"], request["threads"], folder)
            return 0
        reference = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        runtime = open_runtime(Path(request["file"]), request["threads"])
        result = judge(runtime, reference, lambda number: np.load(folder / f"logits-{number:04d}.npy"))
        write_json(Path(sys.argv[2]), result)
    except ExportError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
