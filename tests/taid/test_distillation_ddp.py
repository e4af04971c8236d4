"""Two processes under DistributedDataParallel train as one does: same losses, same t, same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import numpy as np, torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from taid import AdaptiveInterpolation, DistillationTrainer, LiveTeacher, TokenBlockDataset

torch.set_num_threads(1)
folder, batch_size = sys.argv[1], int(sys.argv[2])

def model(seed, hidden_size):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=96, hidden_size=hidden_size, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, initializer_range=0.3,
    ))

blocks = np.random.default_rng(0).integers(0, 96, (24, 16), dtype=np.int32)
mask = np.zeros_like(blocks)
for row in range(24):
    mask[row, 1 : 2 + row % 15] = 1
trainer = DistillationTrainer(
    model(0, 32),
    TrainingArguments(
        output_dir=folder, per_device_train_batch_size=batch_size, max_steps=6, learning_rate=1e-2,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, seed=3,
        ddp_find_unused_parameters=False,
    ),
    TokenBlockDataset(blocks, loss_mask=mask),
    LiveTeacher(model(1, 48)),
    interpolation=AdaptiveInterpolation(t_start=0.2, alpha=0.8, beta=0.5),
)
trainer.train()
rank = trainer.args.process_index
history = [entry for entry in trainer.state.log_history if "t" in entry]
student = trainer.accelerator.unwrap_model(trainer.model)
weights = [float(p.detach().double().square().sum()) for p in student.parameters()]
with open(f"{folder}/rank-{rank}.json", "w") as file:
    json.dump({
        "t": [entry["t"] for entry in history] + [trainer.interpolation.t],
        "loss": [entry["loss"] for entry in history] if history else [],
        "tokens": [entry["tokens"] for entry in history],
        "weights": weights,
    }, file)
"""


def run(folder: Path, processes: int) -> list[dict]:
    folder.mkdir()
    script = folder / "train.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), script, folder, str(4 // processes)],
        check=True,
        timeout=120,
        capture_output=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


def test_two_ranks_are_one_run(tmp_path):
    (alone,) = run(tmp_path / "one", 1)
    first, second = run(tmp_path / "two", 2)
    assert first == second, "ranks must agree exactly"
    assert first["tokens"] == alone["tokens"]
    for name in ("t", "loss", "weights"):
        assert first[name] == pytest.approx(alone[name], rel=1e-3), name
