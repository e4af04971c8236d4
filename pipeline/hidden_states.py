"""What the teacher says of training and held-out text, computed once and read by every training run and
evaluation: its final hidden states, which are the exact distributions for the price of the head, or for
training text a few sampled tokens of each distribution."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifacts import Artifact, Store
from pipeline.models import load_model, position_ids, throttled
from pipeline.progress import Progress
from pipeline.recipe import Recipe
from pipeline.student import load_config_vocabulary_size
from taid import write_hidden_state_cache, write_sampled_cache

STAGE = "hidden_states"
VERSION = 2
SPLITS = ("train", "held_out")


def run(
    store: Store, recipe: Recipe, teacher: Artifact, text: Artifact, student: Artifact | None = None
) -> Artifact:
    """Writes one cache for each split.

    Args:
        store: where the result goes.
        recipe: its ``teacher`` section says what is kept.
        teacher: the teacher's folder.
        text: packed tokens.
        student: the initial student, whose head may have fewer rows than the teacher's; samples are drawn
            from the rows that both have.

    Returns:
        ``train/`` and ``held_out/``, folders that ``taid.CachedTeacher`` opens; with ``teacher.cache:
        sampled``, ``train/`` is one for ``taid.SampledTeacher``. A killed run goes on after its last complete
        shard.
    """
    sampled: dict[str, Any] = {}
    if recipe.teacher.cache == "sampled":
        heads = [load_config_vocabulary_size(teacher.path / "model", recipe.teacher.trust_remote_code)]
        if student is not None:
            heads.append(load_config_vocabulary_size(student.path / "model"))
        sampled = {
            "samples": recipe.teacher.cache_samples,
            "vocabulary_size": min(heads),
            "seed": recipe.seed,
        }

    def make(output: Path, work: Path) -> None:
        model = load_model(teacher.path / "model", recipe.teacher.trust_remote_code)
        report = throttled(store.report)
        for split in SPLITS:
            blocks = np.load(text.path / f"{split}.npy")
            documents = np.load(text.path / f"documents_{split}.npy")
            keep: Callable[..., None] = partial(write_hidden_state_cache, dtype=recipe.teacher.cache_dtype)
            if sampled and split == "train":
                keep = partial(write_sampled_cache, **sampled)
            keep(
                model,
                blocks,
                work / split,
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
        {"cache_dtype": recipe.teacher.cache_dtype, **sampled},
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
