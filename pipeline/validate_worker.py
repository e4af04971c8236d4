"""Runs one exported file in a process of its own: a runtime that crashes ends this process, not the run.

Usage: python -m pipeline.validate_worker REQUEST.json RESULT.json
"""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from export.errors import ExportError
from export.generation import differences
from export.runtime import ChatReader, Message, Runtime, generate_greedily, open_runtime
from pipeline.artifacts import write_json
from pipeline.bench_worker import without_torch
from pipeline.conversations import (
    COMPLETED,
    SAMPLE_TOKENS,
    answered_conversations,
    chat_ids_of,
    reference_chat_ids,
)
from pipeline.fidelity import Fidelity

CHUNK = 256
"""Positions compared at a time."""

WORST = 5
"""Positions that are shown with their text."""

CONTEXT = 24
"""Tokens of that text."""

HOP_STRIDE = 2
"""One row of so many is run through the unquantized file, too: enough to see which step loses most."""

FLOOR_ROWS = 2
"""Rows of which an unquantized file is compared with itself."""

STEPS = 16
"""Tokens decoded one by one, to compare with the same tokens in one pass."""


def facts(runtime: Runtime) -> dict[str, Any]:
    """What a file says of itself, without running the model.

    Returns:
        stops: after how many tokens of each answered conversation's answer generation would end (None:
        never); end_of_turn_ids; those of them that are text (``text_end_of_turn_ids``), which would cut
        answers short; eos_token_id; vocabulary_size; context_length; generation
        (``export.generation.Stated``); completion_ids of ``COMPLETED``.
    """
    ends = [int(token_id) for token_id in runtime.end_of_turn_ids]
    stops: list[int | None] = []
    for messages in answered_conversations():
        asked, answered = runtime.chat_ids(messages[:-1], True), runtime.chat_ids(messages, False)
        answer = answered[len(asked) :]
        stops.append(next((place for place, token_id in enumerate(answer) if token_id in ends), None))
    return {
        "stops": stops,
        "end_of_turn_ids": ends,
        "text_end_of_turn_ids": [token_id for token_id in ends if runtime.decode_text([token_id])],
        "eos_token_id": runtime.eos_token_id,
        "vocabulary_size": runtime.vocabulary_size,
        "context_length": runtime.trained_context_length,
        "generation": runtime.generation_defaults,
        "completion_ids": runtime.completion_ids(COMPLETED),
    }


def reference_answers(model_dir: Path, rows: list[list[int]], threads: int, folder: Path) -> None:
    """Writes what files are judged by: ``logits-NNNN.npy`` (float32 ``[T, V]``) of every row, each from an
    empty cache, and ``facts.json`` of the model with ``bos_token_id`` and the rows.

    Raises:
        ExportError: the model cannot be run.
    """
    from export.torch_runtime import TorchRuntime

    runtime = TorchRuntime(model_dir, threads)
    for number, row in enumerate(rows):
        runtime.reset()
        np.save(folder / f"logits-{number:04d}.npy", runtime.forward(row).astype(np.float32, copy=False))
    write_json(
        folder / "facts.json",
        {
            "rows": rows,
            "bos_token_id": runtime.tokenizer.bos_token_id,
            "chat_ids": reference_chat_ids(runtime),
            **facts(runtime),
        },
    )
    runtime.close()


def read_reference(folder: Path) -> tuple[dict[str, Any], Callable[[int], np.ndarray]]:
    """What ``reference_answers`` wrote: facts, and a function from a row's number to its logits."""
    reference = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    return reference, logits_in(folder)


def logits_in(folder: Path) -> Callable[[int], np.ndarray]:
    """A function from a row's number to its logits ``[T, V]`` in a folder."""
    return lambda number: np.load(folder / f"logits-{number:04d}.npy", mmap_mode="r")


def unquantized_answers(
    runtime: Runtime, reference: dict[str, Any], logits_of: Callable[[int], np.ndarray], folder: Path
) -> dict[str, Any]:
    """Writes ``logits-NNNN.npy`` of an unquantized file for every ``HOP_STRIDE``-th row, by which the loss of
    quantization alone is told.

    Args:
        runtime, reference, logits_of: as of ``judge``.
        folder: receives the logits.

    Returns:
        ``hop``: ``Fidelity.statistics`` against the model in torch. ``floor_kl``: mean KL of the file with
        itself, each row in one pass against the same row in two: what rounding alone amounts to.

    Raises:
        ExportError: the file cannot be run.
    """
    size = min(runtime.vocabulary_size, reference["vocabulary_size"])
    hop, floor = Fidelity(), Fidelity()
    for number, row in list(enumerate(reference["rows"]))[::HOP_STRIDE]:
        runtime.reset()
        logits = runtime.forward(row)[:, :size]
        np.save(folder / f"logits-{number:04d}.npy", logits)
        following = np.array(row[1:])
        hop.add(logits_of(number)[:-1, :size], logits[:-1], following)
        if number < FLOOR_ROWS * HOP_STRIDE:
            half = len(row) // 2
            runtime.reset()
            runtime.forward(row[:half])
            floor.add(logits[half:-1], runtime.forward(row[half:])[:-1, :size], following[half:])
    return {"hop": hop.statistics(), "floor_kl": floor.statistics()["mean_kl"]}


def judge(
    runtime: Runtime,
    reference: dict[str, Any],
    logits_of: Callable[[int], np.ndarray],
    unquantized_logits_of: Callable[[int], np.ndarray] | None = None,
) -> dict[str, Any]:
    """Everything that the gates of one file look at; plain JSON values.

    Args:
        runtime: the file, loaded.
        reference: ``facts`` of the model with its ``rows`` and ``bos_token_id``.
        logits_of: the model's logits ``[T, V]`` of a row.
        unquantized_logits_of: those of the unquantized file of the format; ``quantization`` then holds the
            statistics against it.

    Raises:
        ExportError: the file cannot be run.
    """
    found = facts(runtime)
    differing, bos_differs, compared = [], [], 0
    readers: list[ChatReader | None] = [runtime, runtime.other_reader()]
    for reader in readers:
        if reader is None:
            continue
        read = chat_ids_of(reader, reference["chat_ids"])
        for prompt, expected in reference["chat_ids"].items():
            for number, ids in enumerate(expected):
                other = read[prompt][number]
                compared += ids is not None
                if ids is None or other is None or other == ids:
                    continue
                differing.append(
                    f"conversation {number}, {'with' if prompt == 'True' else 'without'} generation prompt, "
                    f"in {reader.name}"
                )
                counts = [_leading(some, reference["bos_token_id"]) for some in (ids, other)]
                if counts[0] != counts[1]:
                    bos_differs.append(counts)
    return {
        "runtime": runtime.name,
        "conversations": compared,
        "token_ids_equal": not differing,
        "token_ids_differ": len(differing),
        "token_ids_differ_in": differing[:3],
        "leading_bos": bos_differs[0][1] if bos_differs else None,
        "reference_leading_bos": bos_differs[0][0] if bos_differs else None,
        "bos_equal": not bos_differs,
        "completion_ids": found["completion_ids"],
        "reference_completion_ids": reference["completion_ids"],
        "stops_at_end_of_turn": (
            set(reference["end_of_turn_ids"]) <= set(found["end_of_turn_ids"])
            and set(found["text_end_of_turn_ids"]) <= set(reference["end_of_turn_ids"])
            and found["stops"] == reference["stops"]
        ),
        "stops_differ": sum(a != b for a, b in zip(found["stops"], reference["stops"], strict=True)),
        "answers": len(reference["stops"]),
        "end_of_turn_ids": found["end_of_turn_ids"],
        "reference_end_of_turn_ids": reference["end_of_turn_ids"],
        "eos_token_id": found["eos_token_id"],
        # A file may name any end of the model as its eos; none at all only if the model has none either.
        "eos_equal": found["eos_token_id"] in {*reference["end_of_turn_ids"], reference["eos_token_id"]},
        "vocabulary_size": found["vocabulary_size"],
        "reference_vocabulary_size": reference["vocabulary_size"],
        "context_length": found["context_length"],
        "reference_context_length": reference["context_length"],
        "generation_differs": differences(
            found["generation"],
            {key: value for said in reference["generation"].values() for key, value in said.items()},
        ),
        "decode_kl": decode_divergence(runtime, reference["rows"][0]),
        **compare_logits(runtime, reference, logits_of, unquantized_logits_of),
    }


def compare_logits(
    runtime: Runtime,
    reference: dict[str, Any],
    logits_of: Callable[[int], np.ndarray],
    unquantized_logits_of: Callable[[int], np.ndarray] | None = None,
) -> dict[str, Any]:
    """``Fidelity.statistics`` over all rows, each from an empty cache, as far as both vocabularies go;
    ``worst``, the positions of the largest KL with the text before them; and in ``quantization``, if the
    unquantized file's logits are given, the statistics against it over the rows that it was run over."""
    size = min(runtime.vocabulary_size, reference["vocabulary_size"])
    fidelity, quantization = Fidelity(), Fidelity()
    for number, row in enumerate(reference["rows"]):
        runtime.reset()
        logits, expected = runtime.forward(row), logits_of(number)
        following = np.array(row[1:])
        for start in range(0, len(following), CHUNK):
            chunk = slice(start, min(start + CHUNK, len(following)))
            fidelity.add(expected[chunk, :size], logits[chunk, :size], following[chunk])
            if unquantized_logits_of is not None and number % HOP_STRIDE == 0:
                before = unquantized_logits_of(number)[chunk]
                width = min(size, before.shape[1])
                quantization.add(before[:, :width], logits[chunk, :width], following[chunk])
    places = [(row, place) for row in reference["rows"] for place in range(len(row) - 1)]
    worst = []
    for found in fidelity.worst(WORST):
        row, place = places[int(found["position"])]
        texts = {
            "text": row[max(0, place + 1 - CONTEXT) : place + 1],
            "next": [row[place + 1]],
            "model_top": [int(found["model_top"])],
            "file_top": [int(found["file_top"])],
        }
        decoded = {name: runtime.decode_text(ids) for name, ids in texts.items()}
        worst.append({"kl": found["kl"], **decoded, **{k: found[k] for k in found if "probability" in k}})
    result = {**fidelity.statistics(), "worst": worst}
    return result if unquantized_logits_of is None else {**result, "quantization": quantization.statistics()}


def decode_divergence(runtime: Runtime, row: list[int]) -> float:
    """Mean KL, in nats, between a row's last tokens run in one pass and run one by one: runtimes have other
    kernels for decoding, and the statistics see only those of one pass."""
    steps = min(STEPS, len(row) - 1)
    runtime.reset()
    at_once = runtime.forward(row)[-steps:].copy()
    runtime.reset()
    runtime.prefill(row[:-steps])
    one_by_one = np.stack([runtime.decode(token_id) for token_id in row[-steps:]])
    fidelity = Fidelity()
    fidelity.add(at_once, one_by_one, np.zeros(steps, dtype=int))
    return fidelity.statistics()["mean_kl"]


def answers(runtime: Runtime, prompts: list[list[Message]]) -> list[str]:
    """The file's greedy answer to each prompt, as the report shows them beside the model's."""
    said = []
    for prompt in prompts:
        ids = runtime.chat_ids(prompt, add_generation_prompt=True)
        room = min(SAMPLE_TOKENS, runtime.context_length - len(ids))
        said.append(runtime.decode_text(generate_greedily(runtime, ids, room)).strip() if room > 0 else "")
    return said


def _leading(ids: list[int], bos_token_id: int | None) -> int:
    """How many BOS tokens a conversation begins with."""
    return next((place for place, token_id in enumerate(ids) if token_id != bos_token_id), len(ids))


def main() -> int:
    """Reads the request {reference, threads, timeout_s} and one of {model, rows}, {file, answers} (an
    unquantized file, which writes its logits to that folder), {file, logits_only: true}, or {file, prompts,
    unquantized} (a folder of such logits, or null); writes the result of ``judge`` and, as ``said``, the
    file's ``answers``. Exit code 2 and a sentence on stderr if the file fails to run."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder = Path(request["reference"])
    # A library that hangs hears no exception; the signal's default ends the process.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, request["timeout_s"])
    try:
        if "model" in request:
            reference_answers(Path(request["model"]), request["rows"], request["threads"], folder)
            return 0
        without_torch(Path(request["file"]))
        reference, logits_of = read_reference(folder)
        # No more cache than the rows need.
        longest = max(len(row) for row in reference["rows"])
        context_length = max(longest, min(longest + SAMPLE_TOKENS, reference["context_length"]))
        runtime = open_runtime(Path(request["file"]), request["threads"], context_length)
        before = request.get("unquantized")
        if "answers" in request:
            result = unquantized_answers(runtime, reference, logits_of, Path(request["answers"]))
        elif request.get("logits_only"):
            result = compare_logits(runtime, reference, logits_of)
        else:
            result = judge(runtime, reference, logits_of, None if before is None else logits_in(Path(before)))
            result["said"] = answers(runtime, request["prompts"])
        write_json(Path(sys.argv[2]), result)
    except ExportError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
