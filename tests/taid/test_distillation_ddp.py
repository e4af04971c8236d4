"""Two processes train as one does, under DistributedDataParallel and FSDP2: same losses, t and weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = """
import json, sys
import numpy as np, torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from taid import (
    AdaptiveInterpolation, DistillationTrainer, LiveTeacher, StudentGenerations, TokenBlockDataset,
    shard_teacher,
)

torch.set_num_threads(1)
folder, batch_size, strategy = sys.argv[1], int(sys.argv[2]), sys.argv[3]

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
arguments = TrainingArguments(
    output_dir=folder, per_device_train_batch_size=batch_size, max_steps=6, learning_rate=1e-2,
    logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, seed=3,
    ddp_find_unused_parameters=False, eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=4,
    **({"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}}
       if strategy.startswith("fsdp") else {}),
)
arguments.device  # makes the process group
if strategy.startswith("fsdp"):
    # accelerate passes FSDP over on CPUs; the state's name of the devices is all that it goes by.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
teacher = LiveTeacher(model(1, 48))
if strategy == "fsdp-teacher":
    teacher = shard_teacher(model(1, 48))
trainer = DistillationTrainer(
    model(0, 32),
    arguments,
    TokenBlockDataset(blocks, loss_mask=mask),
    teacher,
    eval_dataset=TokenBlockDataset(blocks[:6]),
    interpolation=AdaptiveInterpolation(t_start=0.2, alpha=0.8, beta=0.5),
    generations=StudentGenerations(share=1.0, prompt_tokens=4, adaptive=True)
    if strategy == "ddp-generations" else None,
)
trainer.train()
rank = trainer.args.process_index
history = [entry for entry in trainer.state.log_history if "t" in entry]
state = trainer.accelerator.get_state_dict(trainer.model)
weights = [float(state[name].double().square().sum()) for name in sorted(state)]
trainer.save_model(f"{folder}/student")
if strategy != "one":
    shards = {type(p).__name__ for p in trainer.model.parameters()}
    assert ("DTensor" in shards) == strategy.startswith("fsdp"), shards
    sharded_teacher = {type(p).__name__ for p in teacher.model.parameters()}
    assert ("DTensor" in sharded_teacher) == (strategy == "fsdp-teacher"), sharded_teacher
with open(f"{folder}/rank-{rank}.json", "w") as file:
    json.dump({
        "t": [entry["t"] for entry in history] + [trainer.interpolation.t],
        "loss": [entry["loss"] for entry in history] if history else [],
        "tokens": [entry["tokens"] for entry in history],
        "held_out": [entry["eval_kl_teacher_student"] for entry in trainer.state.log_history
                     if "eval_kl_teacher_student" in entry],
        "weights": weights,
        "generations": trainer.generations and trainer.generations.state_dict(),
    }, file)
"""


def run(folder: Path, processes: int, strategy: str) -> list[dict]:
    folder.mkdir()
    script = folder / "train.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    result = subprocess.run(
        [
            sys.executable,
            *(launcher if processes > 1 else []),
            script,
            folder,
            str(4 // processes),
            strategy,
        ],
        timeout=240,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    (result,) = run(tmp_path_factory.mktemp("alone") / "one", 1, "one")
    return result


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp-teacher"])
def test_two_ranks_are_one_run(tmp_path, alone, strategy):
    first, second = run(tmp_path / "two", 2, strategy)
    for name in ("t", "loss", "tokens", "held_out"):
        assert first[name] == second[name], "ranks must agree exactly"
    assert first["tokens"] == alone["tokens"]
    assert len(first["loss"]) == 6
    assert len(first["held_out"]) == 2
    for name in ("t", "loss"):
        assert first[name] == pytest.approx(alone[name], rel=1e-5), name
    for name in ("weights", "held_out"):
        assert first[name] == pytest.approx(alone[name], rel=1e-4), name
    student = load_file(tmp_path / "two" / "student" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in student.values())
    assert student["model.embed_tokens.weight"].shape == (96, 32), "the saved student is whole"


def test_ranks_share_what_the_student_wrote(tmp_path):
    first, second = run(tmp_path / "two", 2, "ddp-generations")
    assert first["generations"] == second["generations"]
    assert first["weights"] == second["weights"]
    replay = first["generations"]["replay"]
    # Six steps of two sequences on each of two ranks, all written anew: the replay is not full.
    assert len(replay) == 24
    assert len({tuple(row) for row in replay}) == 24, "ranks draw differently"
