"""Checkpoints whose files a crash cut short, left out or left unwritten, or of which a bit has flipped, are
passed over."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from taid import CheckpointDigests, DistillationTrainer, TokenBlockDataset, last_complete_checkpoint

STEPS, EVERY = 6, 2


def trainer(folder: Path) -> DistillationTrainer:
    """A model whose files are longer than what is read at a time."""
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2048, attention_dropout=0.2, **shape))
    return DistillationTrainer(
        model,
        TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            max_steps=STEPS,
            learning_rate=1e-2,
            save_strategy="steps",
            save_steps=EVERY,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        TokenBlockDataset(np.random.default_rng(0).integers(0, 2048, (12, 8), dtype=np.int32)),
        objective="cross_entropy",
        callbacks=[CheckpointDigests()],
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    whole = trainer(folder)
    whole.train()
    whole.save_model(str(folder / "final"))
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def never_written(path: Path) -> None:
    """64 KiB in the middle, or what there is, reads as zeros."""
    data = bytearray(path.read_bytes())
    start = max(0, len(data) // 2 - 32_768)
    data[start : start + 65_536] = bytes(len(data[start : start + 65_536]))
    path.write_bytes(data)


def flipped(path: Path) -> None:
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


HARMS = (cut, never_written, flipped, Path.unlink)


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, trained: Path, harm: Callable[[Path], None]
) -> None:
    folder = shutil.copytree(trained, tmp_path / "copy")
    newest, before = (folder / f"checkpoint-{step}" for step in (STEPS, STEPS - EVERY))
    recorded = json.loads((newest / "checksums.json").read_text(encoding="utf-8"))
    files = {path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file()}
    assert set(recorded) == files - {"checksums.json"}
    assert max(size for size, _ in recorded.values()) > 1 << 20, "no file is longer than a piece"
    for name in sorted(files):
        lines: list[str] = []
        sound = (newest / name).read_bytes()
        harm(newest / name)
        found = last_complete_checkpoint(folder, lines.append)
        (newest / name).write_bytes(sound)
        if name == "checksums.json" and harm is Path.unlink:
            # As an earlier version left it.
            assert (found, lines) == (newest, []), name
            continue
        assert found == before, name
        # A checksum that is another number is that of a file which then seems damaged.
        blamed = files if name == "checksums.json" else {name}
        told = [
            [f"warning: {newest / each} is damaged; training goes on from before that checkpoint"]
            for each in blamed
        ]
        # Without a readable state it was never finished, which is nothing to tell.
        assert lines in told or (name == "trainer_state.json" and lines == [])
    assert last_complete_checkpoint(folder) == newest
    for step in range(EVERY, STEPS + 1, EVERY):
        harm(folder / f"checkpoint-{step}" / "optimizer.pt")
    assert last_complete_checkpoint(folder) is None


def test_every_flipped_bit_is_found(tmp_path: Path, trained: Path) -> None:
    """CRC-32 promises it; bits all over the longest file and all of the shortest one bear it out."""
    folder = shutil.copytree(trained / f"checkpoint-{STEPS}", tmp_path / f"checkpoint-{STEPS}")
    files = sorted((path for path in folder.iterdir()), key=lambda path: path.stat().st_size)
    chance = random.Random(0)
    for path, bits in ((files[-1], None), (files[0], range(8 * files[0].stat().st_size))):
        sound = path.read_bytes()
        for bit in bits or [chance.randrange(8 * len(sound)) for _ in range(200)]:
            data = bytearray(sound)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            assert last_complete_checkpoint(tmp_path) is None, (path, bit)
        path.write_bytes(sound)
    assert last_complete_checkpoint(tmp_path) == folder


def test_going_on_from_the_one_before_ends_in_the_same_weights(tmp_path: Path, trained: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "copy")
    never_written(folder / f"checkpoint-{STEPS}" / "model.safetensors")
    going_on = last_complete_checkpoint(folder)
    assert going_on is not None
    again = trainer(folder)
    again.train(resume_from_checkpoint=str(going_on))
    again.save_model(str(tmp_path / "final"))
    weights = [(place / "final" / "model.safetensors").read_bytes() for place in (trained, tmp_path)]
    assert weights[0] == weights[1]
    assert last_complete_checkpoint(folder) == folder / f"checkpoint-{STEPS}", "it was written anew"
