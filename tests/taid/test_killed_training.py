"""A training process killed without warning at three random steps ends in the weights of one left alone."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = 24

SCRIPT = """
import os, signal, sys
import numpy as np, torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments
from taid import (
    AdaptiveInterpolation, DistillationTrainer, LiveTeacher, TokenBlockDataset, last_complete_checkpoint,
)

torch.set_num_threads(1)

def model(seed, dropout):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, attention_dropout=dropout,
    ))

class Tell(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        os.write(pipe, b"s")

def train(folder):
    trainer = DistillationTrainer(
        model(0, 0.2),
        TrainingArguments(
            output_dir=folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=STEPS,
            learning_rate=1e-2, save_strategy="steps", save_steps=2, save_total_limit=2, logging_steps=1,
            report_to="none", disable_tqdm=True, use_cpu=True, seed=3,
        ),
        TokenBlockDataset(np.random.default_rng(0).integers(0, 96, (40, 12), dtype=np.int32)),
        LiveTeacher(model(1, 0.0)),
        interpolation=AdaptiveInterpolation(t_start=0.2, alpha=0.1, beta=0.5),
        callbacks=[Tell()],
    )
    checkpoint = last_complete_checkpoint(folder)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    trainer.save_model(f"{folder}/final")
    trainer.state.save_to_json(f"{folder}/final/state.json")

# One process imports everything; each run of the training is a process of its own.
folder, kills = sys.argv[1], [int(step) for step in sys.argv[2:]]
for number, steps in enumerate([STEPS, *kills, STEPS]):
    read, pipe = os.pipe()
    child = os.fork()
    if child == 0:
        train(f"{folder}/{'alone' if number == 0 else 'killed'}")
        os._exit(0)
    os.close(pipe)
    seen = 0
    while os.read(read, 1):
        seen += 1
        if seen == steps and 0 < number <= len(kills):
            os.kill(child, signal.SIGKILL)
    os.close(read)
    _, status = os.waitpid(child, 0)
    print("killed" if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status), seen)
""".replace("STEPS", str(STEPS))


@pytest.fixture(scope="module")
def seed() -> int:
    return random.SystemRandom().randrange(2**32)


def test_three_kills_leave_no_trace(tmp_path, seed):
    """Each number is how many steps that process may begin before it is killed, wherever it then is."""
    kills = [random.Random(seed + number).randint(1, 6) for number in range(3)]
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path, *map(str, kills)],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    said = f"seed {seed}, kills {kills}: {result.stdout}"
    outcomes = [line.split()[0] for line in result.stdout.splitlines() if line.split()[-1].isdigit()]
    assert outcomes == ["0", "killed", "killed", "killed", "0"], said
    alone, killed = tmp_path / "alone" / "final", tmp_path / "killed" / "final"
    assert (alone / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes(), said
    states = [json.loads((folder / "state.json").read_text()) for folder in (alone, killed)]
    left, right = (state["stateful_callbacks"]["InterpolationCallback"] for state in states)
    assert left == right, said
    curves = [[(e["loss"], e["t"]) for e in state["log_history"] if "t" in e] for state in states]
    assert curves[0] == curves[1], said
    assert len(curves[0]) == STEPS
