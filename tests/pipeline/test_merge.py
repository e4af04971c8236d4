"""The first hop of fidelity: an adapter merged into its model against adapter and model apart."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pipeline.errors import GateFailed
from pipeline.instruct import logits_of, loss_of_merging, require_merged

ROWS = [np.random.default_rng(seed).integers(3, 2000, 40).tolist() for seed in range(3)]


@pytest.fixture
def adapted(tiny_model_dir: Path) -> Any:
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.05)
    return adapted.eval()


def test_a_true_merge_loses_nothing(adapted: Any) -> None:
    unmerged = [logits_of(adapted, row) for row in ROWS]
    statistics = loss_of_merging(adapted.merge_and_unload(), ROWS, unmerged)
    assert 0 <= statistics["mean_kl"] < 1e-8
    assert statistics["same_top"] == 1
    assert statistics["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
    require_merged(statistics)


@pytest.mark.parametrize("mistake", ["left out", "half of its scale", "rounded to bfloat16"])
def test_a_wrong_merge_shows(adapted: Any, mistake: str) -> None:
    unmerged = [logits_of(adapted, row) for row in ROWS]
    if mistake == "half of its scale":
        for module in adapted.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(0.5)
    merged = adapted.unload() if mistake == "left out" else adapted.merge_and_unload()
    if mistake == "rounded to bfloat16":
        merged = merged.to(torch.bfloat16).to(torch.float32)
    statistics = loss_of_merging(merged, ROWS, unmerged)
    assert statistics["mean_kl"] > 1e-6
    if mistake != "rounded to bfloat16":
        with pytest.raises(GateFailed, match=r"^instruct: gate merge: mean KL"):
            require_merged(statistics)
