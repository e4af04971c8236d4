"""The teacher's final hidden states on training and held-out text, computed once and read by every
training run and evaluation: the exact distribution for the price of the head."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.artifacts import Artifact, Store
from pipeline.models import load_model, position_ids, throttled
from pipeline.progress import Progress
from pipeline.recipe import Recipe
from taid import write_hidden_state_cache

STAGE = "hidden_states"
VERSION = 1
SPLITS = ("train", "held_out")


def run(store: Store, recipe: Recipe, teacher: Artifact, text: Artifact) -> Artifact:
    """Writes one cache for each split.

    Returns:
        ``train/`` and ``held_out/``, folders that ``taid.CachedTeacher`` opens. A killed run goes on after
        its last complete shard.
    """

    def make(output: Path, work: Path) -> None:
        model = load_model(teacher.path / "model", recipe.teacher.trust_remote_code)
        report = throttled(store.report)
        for split in SPLITS:
            blocks = np.load(text.path / f"{split}.npy")
            documents = np.load(text.path / f"documents_{split}.npy")
            write_hidden_state_cache(
                model,
                blocks,
                work / split,
                dtype=recipe.teacher.cache_dtype,
                batch_size=4,
                progress=progress_lines(report, split, blocks.shape[1]),
                position_ids=position_ids(documents),
                teacher_digest=teacher.digest,
            )
        for split in SPLITS:
            (work / split).rename(output / split)

    return store.get_or_make(
        STAGE,
        VERSION,
        {"cache_dtype": recipe.teacher.cache_dtype},
        {"teacher": teacher, "text": text},
        make,
    )


def progress_lines(report: Callable[[str], None], split: str, length: int) -> Callable[[int, int], None]:
    """Turns (blocks done, blocks in all) into lines that say how far, how fast and how long still."""
    started = time.monotonic()
    first: int | None = None

    def progress(done: int, total: int) -> None:
        nonlocal first
        # What an earlier, killed run had finished does not count for the rate.
        first = done if first is None else first
        rate = (done - first) * length / max(time.monotonic() - started, 1e-9)
        left = (total - done) * length / rate if rate else None
        what = f"hidden states: {split}"
        report(Progress(what, done * length, total * length, "tokens", f"{rate:.0f} tok/s", left))

    return progress
