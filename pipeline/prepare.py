"""Text to packed tokens: deduplicated and split by document, no padding, hashed."""

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifacts import Artifact, Store, sha256_of_file, write_json
from pipeline.errors import UserError
from pipeline.models import load_tokenizer
from pipeline.recipe import Recipe
from pipeline.sources import TEXT_SUFFIXES, documents

STAGE = "prepare"
VERSION = 1
SPLITS = ("calibration", "held_out", "train")
"""The small ones first: they are complete before training takes what remains."""


def run(store: Store, recipe: Recipe, teacher: Artifact) -> Artifact:
    """Reads, deduplicates, shuffles, tokenizes and packs the text.

    Returns:
        For each of train, held_out and calibration ``SPLIT.npy`` (int32 ``[N, sequence_length]``) and
        ``documents_SPLIT.npy`` (the document's number of each token); ``statistics.json``. No document is
        in two splits.

    Raises:
        UserError: a source is missing or broken, or holds too little text.
    """
    section = recipe.data.text

    def make(output: Path, work: Path) -> None:
        tokenizer = load_tokenizer(teacher.path / "model")
        texts: list[str] = []
        seen: set[bytes] = set()
        duplicates = 0
        for source in section.sources:
            for text in documents(source, section.text_field):
                digest = hashlib.sha256(" ".join(text.split()).encode()).digest()
                if not text.strip() or digest in seen:
                    duplicates += 1
                    continue
                seen.add(digest)
                texts.append(text)
        if not texts:
            raise UserError(f"data.text.sources: {', '.join(section.sources)} hold no text.")
        random.Random(recipe.seed).shuffle(texts)
        store.report(f"prepare: {len(texts):,} documents, {duplicates:,} duplicates or empty ones left out")
        wanted = {
            "calibration": section.calibration_tokens,
            "held_out": section.held_out_tokens,
            "train": section.train_tokens,
        }
        statistics: dict[str, Any] = {"documents": len(texts), "left_out": duplicates, "splits": {}}
        remaining = enumerate(texts)
        for split in SPLITS:
            blocks = -(-wanted[split] // section.sequence_length)
            tokens, numbers, used = _pack(remaining, tokenizer, blocks * section.sequence_length)
            if len(tokens) < blocks * section.sequence_length:
                raise UserError(
                    f"data.text.{split}_tokens: {wanted[split]:,} tokens are asked for, but only "
                    f"{len(tokens):,} are left after the other splits; give more text or lower it."
                )
            shape = (blocks, section.sequence_length)
            np.save(output / f"{split}.npy", np.array(tokens, np.int32).reshape(shape))
            np.save(output / f"documents_{split}.npy", np.array(numbers, np.int32).reshape(shape))
            statistics["splits"][split] = {"documents": used, "tokens": len(tokens)}
        write_json(output / "statistics.json", statistics)

    return store.get_or_make(
        STAGE,
        VERSION,
        {"text": recipe.slice("data")["data"]["text"], "sources": source_digests(section.sources)},
        {"teacher": teacher},
        make,
        recipe.seed,
    )


def source_digests(sources: list[str]) -> dict[str, str]:
    """SHA-256 of every local file that the sources name, so that changed data is never mistaken for old."""
    digests = {}
    for source in sources:
        path = Path(source)
        if ":" not in source or path.exists():
            files = [path] if path.is_file() else sorted(path.rglob("*"))
            for file in files:
                if file.is_file() and file.suffix in TEXT_SUFFIXES:
                    digests[file.name if file == path else file.relative_to(path).as_posix()] = (
                        sha256_of_file(file)
                    )
    return digests


def _pack(
    remaining: Iterator[tuple[int, str]], tokenizer: Any, wanted: int
) -> tuple[list[int], list[int], int]:
    """Tokens of whole documents, each followed by an end-of-text token, cut at ``wanted``; the cut-off rest
    of the last document is dropped, so that it is in no other split."""
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    if end is None or end == tokenizer.unk_token_id != tokenizer.eos_token_id:
        end = tokenizer.eos_token_id if end is None else end
    tokens: list[int] = []
    numbers: list[int] = []
    used = 0
    while len(tokens) < wanted:
        number, text = next(remaining, (None, None))
        if number is None or text is None:
            break
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], end]
        tokens += ids
        numbers += [number] * len(ids)
        used += 1
    return tokens[:wanted], numbers[:wanted], used
