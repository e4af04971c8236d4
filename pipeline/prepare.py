"""Text to packed tokens: deduplicated and split by document, no padding, hashed."""

import hashlib
import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.artifacts import Artifact, Store, write_json
from pipeline.errors import UserError
from pipeline.models import load_tokenizer
from pipeline.recipe import Recipe, Text
from pipeline.sources import documents, source_digests

STAGE = "prepare"
VERSION = 2
SPLITS = ("calibration", "held_out", "train")
"""The small ones first: they are complete before training takes what remains."""
DOCUMENTS_AT_LEAST = 8
"""Of a measuring split: no document gives more than this fraction of it, or one would decide the result."""
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")
"""What models of the GPT-2, SmolLM, Qwen and Llama 3 kinds saw between documents when they were trained;
an instruction-tuned model's EOS is its end of turn."""
BYTES_PER_TOKEN = 32
"""A streamed data set is read until this many bytes a wanted token are there; English has 4 to 5."""


@dataclass
class Documents:
    """The distinct documents, kept on disk, and where they came from."""

    file: BinaryIO
    spans: list[tuple[int, int]]
    by_source: dict[str, int]
    left_out: int

    def text(self, number: int) -> str:
        """The text of a document."""
        start, length = self.spans[number]
        self.file.seek(start)
        return self.file.read(length).decode()


def run(store: Store, recipe: Recipe, teacher: Artifact) -> Artifact:
    """Reads, deduplicates, shuffles, tokenizes and packs the text.

    Returns:
        For each of train, held_out and calibration ``SPLIT.npy`` (int32 ``[N, sequence_length]``) and
        ``documents_SPLIT.npy`` (the document's number of each token); ``statistics.json``. No document is
        in two splits. An end-of-text token follows each document.

    Raises:
        UserError: a source is missing or broken, or holds too little text.
    """
    section = recipe.data.text

    def make(output: Path, work: Path) -> None:
        tokenizer = load_tokenizer(teacher.path / "model", recipe.teacher.trust_remote_code)
        end = end_of_text(tokenizer)
        with (work / "documents.txt").open("w+b") as file:
            kept = _gather(section, recipe.seed, file)
            store.report(
                f"prepare: {len(kept.spans):,} documents, {kept.left_out:,} duplicates or empty ones left out"
            )
            order = list(range(len(kept.spans)))
            random.Random(recipe.seed).shuffle(order)
            remaining = iter(order)
            statistics: dict[str, Any] = {
                "documents": len(kept.spans),
                "left_out": kept.left_out,
                "sources": kept.by_source,
                "licence": section.licence,
                "splits": {},
            }
            found = 0
            for split in SPLITS:
                asked = getattr(section, f"{split}_tokens")
                blocks = -(-asked // section.sequence_length)
                wanted = blocks * section.sequence_length
                most = (
                    None if split == "train" else max(section.sequence_length, wanted // DOCUMENTS_AT_LEAST)
                )
                tokens, numbers = _pack(kept, remaining, tokenizer, end, wanted, most)
                found += len(tokens)
                if len(tokens) < wanted:
                    raise UserError(_too_few(section, split, wanted, len(tokens), found))
                shape = (blocks, section.sequence_length)
                np.save(output / f"{split}.npy", np.frombuffer(tokens, np.int32)[:wanted].reshape(shape))
                numbered = np.frombuffer(numbers, np.int32)[:wanted].reshape(shape)
                np.save(output / f"documents_{split}.npy", numbered)
                used = len(np.unique(numbered))
                statistics["splits"][split] = {"documents": used, "tokens": wanted}
        write_json(output / "statistics.json", statistics)

    return store.get_or_make(
        STAGE,
        VERSION,
        {"text": recipe.slice("data")["data"]["text"], "sources": source_digests(section.sources)},
        {"teacher": teacher},
        make,
        recipe.seed,
    )


def end_of_text(tokenizer: Any) -> int:
    """The token between documents: the model's end of text, or else its EOS.

    Raises:
        UserError: the tokenizer has neither.
    """
    vocabulary = tokenizer.get_vocab()
    for token in END_OF_TEXT:
        if token in vocabulary:
            return int(vocabulary[token])
    if tokenizer.eos_token_id is None:
        raise UserError(
            "teacher.model: its tokenizer names no end-of-sequence token to put between documents."
        )
    return int(tokenizer.eos_token_id)


def _gather(section: Text, seed: int, file: BinaryIO) -> Documents:
    """Writes each distinct document of the sources to a file, so that memory holds hashes and places only.

    Documents are the same when they differ in white space alone.
    """
    kept = Documents(file, [], {}, 0)
    seen: set[bytes] = set()
    position = 0
    tokens = section.train_tokens + section.held_out_tokens + section.calibration_tokens
    for source in section.sources:
        started, before = position, len(kept.spans)
        for text in documents(source, section.text_field, seed):
            digest = hashlib.sha256(" ".join(text.split()).encode()).digest()
            if not text.strip() or digest in seen:
                kept.left_out += 1
                continue
            seen.add(digest)
            length = file.write(text.encode())
            kept.spans.append((position, length))
            position += length
            if source.startswith("dataset:") and position - started >= tokens * BYTES_PER_TOKEN:
                break
        kept.by_source[source] = len(kept.spans) - before
    if not kept.spans:
        raise UserError(f"data.text.sources: {', '.join(section.sources)} hold no text.")
    return kept


def _pack(
    kept: Documents, remaining: Iterator[int], tokenizer: Any, end: int, wanted: int, most: int | None
) -> tuple[array, array]:
    """Tokens of whole documents, an end-of-text token after each, and each token's document.

    At most ``most`` tokens are taken of a document. What exceeds ``wanted`` or ``most`` is in no other split.
    """
    tokens, numbers = array("i"), array("i")
    while len(tokens) < wanted:
        number = next(remaining, None)
        if number is None:
            break
        # Text that looks like a control token is text here.
        ids = tokenizer(kept.text(number), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = [*ids, end][:most]
        tokens.extend(ids)
        numbers.extend([number] * len(ids))
    return tokens, numbers


def _too_few(section: Text, split: str, wanted: int, left: int, found: int) -> str:
    asked = section.calibration_tokens + section.held_out_tokens + section.train_tokens
    return (
        f"data.text.{split}_tokens: {wanted:,} tokens are needed, but only {left:,} are left after the "
        f"splits before it (the sources give {found:,} usable tokens, {asked:,} are asked for); give more "
        "text in data.text.sources, or lower train_tokens, held_out_tokens or calibration_tokens."
    )
