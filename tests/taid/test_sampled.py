"""Sampled probabilities: unbiased where they say so, exact when nothing is left out, and a cache to trust."""

import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from taid import (
    SAMPLED_OBJECTIVES,
    AdaptiveInterpolation,
    DistillationTrainer,
    HeadOptions,
    SampledProbabilities,
    SampledTeacher,
    TaidError,
    TokenBlockDataset,
    fused_sampled_objective,
    objectives,
    sample_probabilities,
    write_sampled_cache,
)

UNBIASED = ("forward_kl", "skew_forward_kl", "skew_reverse_kl", "jensen_shannon", "total_variation")
BLOCKS, LENGTH, SAMPLES = 10, 8, 12
SHARD_BYTES = 4 * LENGTH * (SAMPLES * 6 + 4)  # four blocks a shard


def distributions(seed: int, count: int, vocabulary: int, spread: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(count, vocabulary, dtype=torch.float64, generator=generator)
    return logits.log_softmax(-1)


def kept_probability(sampled: SampledProbabilities) -> torch.Tensor:
    return (sampled.log_p.exp() / sampled.threshold.unsqueeze(-1)).clamp(max=1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    vocabulary=st.integers(2, 60),
    samples=st.integers(1, 70),
    spread=st.sampled_from([0.0, 0.5, 3.0, 30.0]),
)
def test_the_draw(seed, vocabulary, samples, spread):
    """S different tokens that stand for everything; the surely kept are the most likely."""
    log_p = distributions(seed, 5, vocabulary, spread)
    offsets = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    sampled = sample_probabilities(log_p, samples, offsets)
    expected = min(samples, vocabulary)
    assert sampled.ids.shape == (5, expected)
    assert torch.equal(sampled.log_p, log_p.gather(-1, sampled.ids))
    estimated = (sampled.log_p.exp() / kept_probability(sampled)).nan_to_num(0)
    torch.testing.assert_close(estimated.sum(-1), torch.ones(5, dtype=torch.float64))
    for row in range(5):
        if spread < 30:  # there, some probabilities are too small to be drawn and the rest may repeat
            assert len(set(sampled.ids[row].tolist())) == expected
        sure = log_p[row] > sampled.threshold[row].log()
        assert set(sure.nonzero().flatten().tolist()) <= set(sampled.ids[row].tolist())


def test_the_draw_is_unbiased_and_beats_independent_draws():
    """Over a fine grid of offsets, each token is kept as often as it says; with less spread than counting
    independent draws, whose variance is p (1 - p) / S."""
    log_p = distributions(3, 1, 40, 2.0)
    p, grid, samples = log_p.exp().squeeze(0), 20_000, 8
    offsets = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    sampled = sample_probabilities(log_p.expand(grid, -1), samples, offsets)
    weights = sampled.log_p.exp() / kept_probability(sampled)
    estimates = torch.zeros(grid, 40, dtype=torch.float64).scatter_add_(-1, sampled.ids, weights)
    torch.testing.assert_close(estimates.mean(0), p, rtol=0, atol=2e-4)
    variance = ((estimates - p) ** 2).mean(0)
    assert float(variance.sum()) < 0.5 * float((p * (1 - p) / samples).sum())


def student_parts(vocabulary: int, count: int):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(count, 6, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, 6, dtype=torch.float64, generator=generator).requires_grad_()
    bias = torch.randn(vocabulary, dtype=torch.float64, generator=generator).requires_grad_()
    return hidden, weight, bias


def loss_and_gradients(name, sampled, parts, mask=None, **arguments):
    hidden, weight, bias = parts
    loss = fused_sampled_objective(
        name, hidden, weight, sampled, mask=mask, student_head=HeadOptions(bias), chunk_size=7, **arguments
    )
    return [loss, *torch.autograd.grad(loss, parts)]


def reference(name, log_p, parts, mask, **arguments):
    hidden, weight, bias = parts
    loss = getattr(objectives, name)(hidden @ weight.T + bias, log_p, mask, **arguments)
    return [loss, *torch.autograd.grad(loss, parts)]


@pytest.mark.parametrize("share", [0.3, 0.9])
@pytest.mark.parametrize("name", SAMPLED_OBJECTIVES)
def test_nothing_left_out_is_the_objective(name, share):
    arguments = {
        "taid": {"t": share},
        "skew_forward_kl": {"skew": share},
        "skew_reverse_kl": {"skew": share},
        "jensen_shannon": {"teacher_weight": share},
    }.get(name, {})
    log_p, parts = distributions(1, 20, 30, 1.5), student_parts(30, 20)
    mask = torch.arange(20) % 3 != 0
    sampled = sample_probabilities(log_p, 30, torch.full((20,), 0.4))
    ours = loss_and_gradients(name, sampled, parts, mask, **arguments)
    for mine, exact in zip(ours, reference(name, log_p, parts, mask, **arguments), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-12)


def averaged(name, samples, grid=4000, **arguments):
    """Loss and gradients over a grid of offsets at one position, and the exact ones."""
    log_p, parts = distributions(8, 1, 30, 1.5), student_parts(30, 1)
    hidden, weight, bias = parts
    sampled = sample_probabilities(
        log_p.expand(grid, -1), samples, (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    )
    loss = fused_sampled_objective(
        name,
        hidden.expand(grid, -1),
        weight,
        sampled,
        student_head=HeadOptions(bias),
        **arguments,
    )
    ours = [loss, *torch.autograd.grad(loss, parts)]
    return ours, reference(name, log_p, parts, torch.ones(1), **arguments)


@pytest.mark.parametrize("name", UNBIASED)
def test_loss_and_gradient_are_unbiased(name):
    ours, exact = averaged(name, 6)
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, truth, rtol=2e-3, atol=2e-3 * float(truth.detach().abs().max()))


def test_the_bias_of_taid_falls_with_the_samples():
    def bias(samples):
        ours, exact = averaged("taid", samples, t=0.5)
        return float((ours[1] - exact[1]).norm() / exact[1].norm())

    assert bias(24) < 0.3 * bias(6)
    assert bias(6) > 5e-3, "if there were none, the documentation would be wrong"


def test_no_token_gives_zero():
    parts = student_parts(30, 4)
    sampled = sample_probabilities(distributions(1, 4, 30, 1.5), 5, torch.full((4,), 0.4))
    for value in loss_and_gradients("forward_kl", sampled, parts, torch.zeros(4)):
        assert torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize("name", ["reverse_kl", "adaptive_kl", "decoupled_kd", "nothing"])
def test_what_cannot_be_estimated_is_refused(name):
    sampled = sample_probabilities(distributions(1, 4, 30, 1.5), 5, torch.full((4,), 0.4))
    with pytest.raises(TaidError, match=f"objective {name} needs more of the teacher"):
        loss_and_gradients(name, sampled, student_parts(30, 4))
    with pytest.raises(TaidError, match="skew is 0"):
        loss_and_gradients("skew_reverse_kl", sampled, student_parts(30, 4), skew=0.0)
    with pytest.raises(TaidError, match=r"positions \[4\]"):
        loss_and_gradients("forward_kl", sampled, student_parts(30, 3))


@pytest.fixture(scope="module")
def finished(model, token_blocks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampled") / "finished"
    write_sampled_cache(model, token_blocks, folder, SAMPLES, batch_size=2, shard_bytes=SHARD_BYTES)
    return folder


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_cached_probabilities_are_the_models(model, token_blocks, finished):
    teacher = SampledTeacher(finished)
    assert len(list(finished.glob("sampled-*.npy"))) == 3
    index = torch.tensor([9, 0, 4])
    input_ids = torch.from_numpy(token_blocks[index]).long()
    sampled = teacher.sampled_probabilities(input_ids, index)
    assert sampled.ids.shape == (3, LENGTH, SAMPLES)
    with torch.no_grad():
        log_p = model(input_ids).logits.log_softmax(-1)
    torch.testing.assert_close(sampled.log_p, log_p.gather(-1, sampled.ids), rtol=1e-4, atol=1e-4)
    estimated = sampled.log_p.exp() / kept_probability(sampled)
    torch.testing.assert_close(estimated.sum(-1), torch.ones(3, LENGTH), rtol=1e-5, atol=1e-5)
    assert np.load(finished / "sampled-00000.npy", allow_pickle=False).itemsize == SAMPLES * 6 + 4


KILLED = """
import os, signal, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM
from taid import write_sampled_cache

torch.set_num_threads(1)
model_folder, blocks, folder, samples, shard_bytes = sys.argv[1:]
write_sampled_cache(
    AutoModelForCausalLM.from_pretrained(model_folder), np.load(blocks), folder, int(samples), batch_size=2,
    shard_bytes=int(shard_bytes),
    progress=lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done == 6 else None,
)
"""


def test_a_killed_process_is_gone_on_from(model, tiny_model_dir, token_blocks, finished, tmp_path):
    np.save(tmp_path / "blocks.npy", token_blocks)
    arguments = [tiny_model_dir, tmp_path / "blocks.npy", tmp_path / "cache", SAMPLES, SHARD_BYTES]
    root = Path(__file__).parents[2]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "cache").glob("sampled-*.npy"))) == 1
    with pytest.raises(TaidError, match="is missing; finish it"):
        SampledTeacher(tmp_path / "cache")
    write_sampled_cache(
        model, token_blocks, tmp_path / "cache", SAMPLES, batch_size=2, shard_bytes=SHARD_BYTES
    )
    assert contents(tmp_path / "cache") == contents(finished)


def test_the_draw_does_not_depend_on_batches_or_shards(model, token_blocks, finished, tmp_path):
    write_sampled_cache(model, token_blocks, tmp_path / "cache", SAMPLES, batch_size=5, chunk_size=3)
    index = torch.arange(BLOCKS)
    input_ids = torch.from_numpy(token_blocks).long()
    one, other = (
        SampledTeacher(folder).sampled_probabilities(input_ids, index)
        for folder in (finished, tmp_path / "cache")
    )
    assert float((one.ids == other.ids).double().mean()) > 0.98, "rounding may move a draw, not more"


def test_mismatch_and_damage_are_named(model, token_blocks, finished, tmp_path):
    cache = shutil.copytree(finished, tmp_path / "cache")
    for changes, message in (
        ({"samples": 5}, "samples 12, not 5"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"vocabulary_size": 2000}, "vocabulary_size"),
        ({"teacher_digest": "other"}, "teacher_digest"),
        ({"token_blocks": token_blocks + 1}, "data_digest"),
    ):
        arguments = {"model": model, "token_blocks": token_blocks, "samples": SAMPLES, **changes}
        with pytest.raises(TaidError, match=message):
            write_sampled_cache(folder=cache, batch_size=2, shard_bytes=SHARD_BYTES, **arguments)
    with pytest.raises(TaidError, match="other tokens"):
        SampledTeacher(cache).sampled_probabilities(
            torch.from_numpy(token_blocks[:1]).long(), torch.tensor([1])
        )
    shard = cache / "sampled-00001.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    with pytest.raises(TaidError, match=r"sampled-00001.npy: is damaged"):
        SampledTeacher(cache)
    (cache / "cache.json").write_text('{"format": "taid-hidden-states", "version": 2}')
    with pytest.raises(TaidError, match="not a sampled cache"):
        SampledTeacher(cache)
    with pytest.raises(TaidError, match="samples is 0"):
        write_sampled_cache(model, token_blocks, tmp_path / "other", 0)


def small_model(vocabulary: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
    )


@pytest.mark.parametrize("objective", ["taid", "forward_kl"])
def test_training_comes_closer_to_the_teacher(tmp_path, objective):
    teacher, blocks = small_model(64, seed=1).eval(), np.random.default_rng(1).integers(0, 64, (60, 10))
    write_sampled_cache(teacher, blocks, tmp_path / "cache", 16)
    trainer = DistillationTrainer(
        small_model(64),
        TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=5,
            num_train_epochs=3,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        TokenBlockDataset(blocks),
        SampledTeacher(tmp_path / "cache"),
        objective,
        interpolation=AdaptiveInterpolation(t_start=0.5) if objective == "taid" else None,
    )

    def divergence() -> float:
        input_ids = torch.from_numpy(blocks).long()
        with torch.no_grad():
            log_p = teacher(input_ids).logits[:, :-1].log_softmax(-1)
            log_q = trainer.model.eval()(input_ids).logits[:, :-1].log_softmax(-1)
        return float(objectives.divergence(log_p, log_q).mean())

    before = divergence()
    trainer.train()
    assert divergence() < 0.5 * before
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_the_trainer_refuses_what_does_not_fit(model, token_blocks, finished, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    dataset, teacher = TokenBlockDataset(token_blocks), SampledTeacher(finished)
    with pytest.raises(TaidError, match="reverse_kl needs more of the teacher"):
        DistillationTrainer(small_model(2048), arguments, dataset, teacher, "reverse_kl")
    softened = {"objective_arguments": {"temperature": 2.0}}
    with pytest.raises(TaidError, match="those of temperature 1"):
        DistillationTrainer(small_model(2048), arguments, dataset, teacher, **softened)
    with pytest.raises(TaidError, match="write the cache anew with vocabulary_size 100"):
        DistillationTrainer(small_model(100), arguments, dataset, teacher)
