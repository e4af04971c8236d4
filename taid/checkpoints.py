"""Checkpoints that can be gone on from: written to their end, and still what was written.

The Trainer writes ``trainer_state.json`` last, so a process that is killed leaves a checkpoint without it. A
machine that goes down leaves more: files cut short, or stretches of them that never reached the disk and read
as zeros; and a disk or memory may flip a bit. So each file's size and CRC-32 are kept beside it: that finds
every change of up to 32 bits in a row, of others all but one in four thousand million, and takes a third of a
second for a gigabyte.
"""

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

DIGESTS = "checksums.json"
PIECE = 2**20
"""Bytes that are read at a time."""


class CheckpointDigests(TrainerCallback):
    """Writes ``checksums.json`` into each checkpoint: of every file its size and CRC-32.

    With several processes it writes nothing: each of them writes files of its own, at a time of its own.
    """

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Digests the checkpoint that was just written."""
        if args.world_size > 1:
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        unfinished = folder / f"{DIGESTS}.partial"
        unfinished.write_text(json.dumps(_digests(folder)), encoding="utf-8")
        unfinished.rename(folder / DIGESTS)


def last_complete_checkpoint(
    folder: Path | str, report: Callable[[str], None] = lambda line: None
) -> Path | None:
    """The newest checkpoint that was written to its end and is as it was written, or None.

    Args:
        folder: where the Trainer writes them.
        report: receives a line for each that was written to its end and is damaged. One without
            ``checksums.json`` is believed.
    """
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit():
            found.append((int(number), path))
    for step, path in sorted(found, reverse=True):
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if state.get("global_step") != step or not math.isfinite(state.get("max_steps", math.nan)):
            continue
        harmed = _harmed(path)
        if harmed is None:
            return path
        report(f"warning: {path / harmed} is damaged; training goes on from before that checkpoint")
    return None


def _harmed(checkpoint: Path) -> str | None:
    """Name of a file that is not as it was written; None where all are."""
    recorded: Any = {}
    if (checkpoint / DIGESTS).exists():
        try:
            recorded = json.loads((checkpoint / DIGESTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return DIGESTS
    if not isinstance(recorded, dict):
        return DIGESTS
    present = _digests(checkpoint) if recorded else {}
    return next((name for name in recorded if present.get(name) != recorded[name]), None)


def _digests(checkpoint: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of each file of a checkpoint."""
    digests = {}
    for path in sorted(checkpoint.rglob("*")):
        if not path.is_file() or path.name.removesuffix(".partial") == DIGESTS:
            continue
        size = digest = 0
        with path.open("rb", buffering=0) as file:
            while piece := file.read(PIECE):
                size, digest = size + len(piece), zlib.crc32(piece, digest)
        digests[path.relative_to(checkpoint).as_posix()] = [size, digest]
    return digests
