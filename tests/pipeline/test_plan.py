"""The plan against numbers that others published, formulas of its own, and a training step that is real."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from pipeline import plan
from pipeline.errors import UserError
from pipeline.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
PARAMETERS = {
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2-72B-Instruct": 72_706_203_648,
    "Qwen/Qwen2-1.5B-Instruct": 1_543_714_304,
}
"""As their model pages count the numbers in the safetensors files."""


@pytest.mark.parametrize("model", sorted(PARAMETERS))
def test_published_configurations_have_the_published_number_of_parameters(model: str) -> None:
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(plan.configuration(model, None, "teacher.model"))
    assert sum(parameter.numel() for parameter in built.parameters()) == PARAMETERS[model]


@pytest.mark.parametrize("recipe", ["tinyswallow-1.5b", "taid-llm-1.5b"])
def test_big_recipes_take_64_sequences_a_step_on_8_devices(recipe: str) -> None:
    loaded = load_recipe(ROOT / "recipes" / f"{recipe}.yaml")
    section = loaded.distill
    assert section.batch_size * section.gradient_accumulation * 8 == 64
    assert loaded.teacher.model in PARAMETERS
    assert loaded.student.model in PARAMETERS
    assert (section.learning_rate, section.alpha, section.beta) == (1e-4, 5e-4, 0.99)


@pytest.fixture(scope="module")
def facts(make_recipe: Callable[..., Recipe]) -> dict[str, Any]:
    return plan.run(make_recipe(distill={"epochs": 2.0, "batch_size": 2}), tokens_per_second=128.0)


def test_tokens_cache_and_hours(facts: dict[str, Any]) -> None:
    # 2,048 training tokens, two epochs, two blocks of 64 a step; 1,024 held out; width 128 in float32.
    assert facts["tokens"] == {
        "train": 2048,
        "epochs": 2.0,
        "trained": 4096,
        "held_out": 1024,
        "step": 128,
        "steps": 32,
    }
    assert facts["cache"]["bytes_per_token"] == 4 * 128
    assert facts["cache"]["bytes"] == facts["disk"]["cache"] == 512 * 3072
    assert facts["hours"] == pytest.approx(32 / 3600)
    assert facts["disk"]["total"] == sum(size for kind, size in facts["disk"].items() if kind != "total")
    assert facts["disk"]["teacher"] == 4 * facts["teacher"]["parameters"]


def test_flops_against_a_formula(facts: dict[str, Any], tiny_model_dir: Path) -> None:
    """Matrix products counted by hand: two FLOPs for a multiply-add, twice the forward pass in backward."""
    config = AutoConfig.from_pretrained(tiny_model_dir)
    assert isinstance(config, LlamaConfig)
    width, inner, length = config.hidden_size, config.intermediate_size, 64
    key_value = width // config.num_attention_heads * config.num_key_value_heads
    layer = 2 * (2 * width * width + 2 * width * key_value + 3 * width * inner) + 2 * 2 * length * width
    head = 2 * width * config.vocab_size
    teacher = facts["teacher"]
    assert teacher["forward_flops"] == pytest.approx(4 * layer, rel=1e-3)
    assert teacher["head_flops"] == head
    # Two layers are left. The last position of a block predicts nothing.
    assert facts["student"]["step_flops"] == pytest.approx(3 * (2 * layer + head * 63 / 64), rel=0.01)
    flops = facts["flops"]
    assert flops["teacher_once"] == teacher["forward_flops"]
    assert flops["total"] == pytest.approx(
        teacher["forward_flops"] * 3072 + (head + facts["student"]["step_flops"]) * 4096
    )


def test_hours_of_a_stated_compute_rate(make_recipe: Callable[..., Recipe], facts: dict[str, Any]) -> None:
    recipe = make_recipe(distill={"epochs": 2.0, "batch_size": 2})
    other = plan.run(recipe, tflops=1e-6, device_memory=1e-6)
    assert other["hours"] == pytest.approx(facts["flops"]["total"] / 1e6 / 3600)
    assert other["memory"]["fits"] is False
    assert other["memory"]["bytes"] == facts["memory"]["bytes"]


def test_memory_against_the_allocator(facts: dict[str, Any], tiny_model_dir: Path) -> None:
    """The simulated peak against what a real step's tensors take, counted by torch's CPU profiler."""
    parts = facts["memory"]["parts"]
    trainable = facts["student"]["trainable_parameters"]
    assert parts["parameter"] == 4 * trainable
    assert parts["optstate"] == pytest.approx(8 * trainable, rel=0.01)
    measured = peak_of_a_real_step(tiny_model_dir)
    simulated = facts["memory"]["bytes"] - parts["parameter"] - parts["buffer"] - parts["optstate"]
    assert simulated == pytest.approx(measured, rel=0.15)


def peak_of_a_real_step(folder: Path) -> int:
    """Bytes above weights and optimizer states at the peak of forward, backward and step."""
    program = """
import sys, torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM
from taid import drop_layers
from pipeline.plan_worker import TrainingStep

teacher = AutoModelForCausalLM.from_pretrained(sys.argv[1])
student = drop_layers(AutoModelForCausalLM.from_pretrained(sys.argv[1]), [0, 1])
step = TrainingStep(student, None, teacher.lm_head.weight.detach().clone(), student.config.vocab_size)
ids = torch.randint(0, 2000, (2, 64))
hidden = torch.randn(2, 64, teacher.config.hidden_size)
optimizer = torch.optim.AdamW(student.parameters(), foreach=False)
def train():
    step(ids, hidden).backward()
    optimizer.step()
    optimizer.zero_grad()
train()
with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
    train()
held = peak = 0
for event in profiler.profiler.kineto_results.events():
    if event.name() == "[memory]":
        held += event.nbytes()
        peak = max(peak, held)
print(peak)
"""
    finished = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    return int(finished.stdout.split()[-1])


def test_sharding_divides_what_is_sharded(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(teacher={"model": str(make_recipe().teacher.model), "cache": "none"})
    parts = {devices: plan.run(recipe, devices, "bf16")["memory"]["parts"] for devices in (2, 4)}
    assert parts[4]["sharded param"] == pytest.approx(parts[2]["sharded param"] / 2, rel=0.02)
    assert parts[4]["optstate"] == pytest.approx(parts[2]["optstate"] / 2, rel=0.02)


def test_a_configuration_that_cannot_be_had(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"teacher\.model: no configuration of "):
        plan.run(make_recipe(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"student\.prune\.layers: 9 layers cannot remain"):
        plan.run(make_recipe(student={"prune": {"layers": 9}}))
