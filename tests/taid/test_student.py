"""Pruned students: influence against its formula, models that still save, load and generate."""

import math

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from taid import TaidError, block_influence, drop_layers, freeze_embeddings, prune_by_influence


@pytest.fixture
def model(tiny_model_dir) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def token_blocks() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 1000, (5, 12))


def test_influence_is_one_minus_the_mean_cosine(model, token_blocks):
    """transformers hands out each layer's input; its last state is behind the norm and left out here."""
    measured = block_influence(model, token_blocks, batch_size=2)
    with torch.no_grad():
        states = model(torch.from_numpy(token_blocks), output_hidden_states=True).hidden_states
    for number in range(model.config.num_hidden_layers - 1):
        before, after = (states[number + offset].double().numpy() for offset in (0, 1))
        cosine = (before * after).sum(-1) / np.sqrt((before**2).sum(-1) * (after**2).sum(-1))
        assert measured[number] == pytest.approx(1 - cosine.mean(), abs=1e-6)
    assert len(measured) == 4
    assert 0 < measured[-1] < 1


def test_a_layer_that_does_nothing_is_dropped_first(model, token_blocks):
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
        input_ids = torch.from_numpy(token_blocks)
        before = model(input_ids).logits
        pruned, influences, dropped = prune_by_influence(model, token_blocks, layers=3)
        assert dropped == [2]
        assert influences[2] == pytest.approx(0, abs=1e-6)
        assert min(influences[:2] + influences[3:]) > 1e-4
        assert torch.equal(pruned(input_ids).logits, before)


def test_pruned_model_saves_loads_and_generates_with_its_cache(model, token_blocks, tmp_path):
    drop_layers(model, [0, 3])
    assert model.config.num_hidden_layers == 2
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    input_ids = torch.from_numpy(token_blocks[:1])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
        arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        mask = torch.ones_like(input_ids)
        with_cache = model.generate(input_ids, attention_mask=mask, use_cache=True, **arguments)
        without = model.generate(input_ids, attention_mask=mask, use_cache=False, **arguments)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (Qwen3ForCausalLM, Qwen3Config(use_sliding_window=True, sliding_window=4, max_window_layers=2)),
        (Gemma2ForCausalLM, Gemma2Config(sliding_window=4, query_pre_attn_scalar=8)),
    ],
)
def test_layer_types_follow_their_layers(model_class, config, tmp_path):
    settings = config.to_dict()
    settings |= {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
    }
    torch.manual_seed(0)
    model = model_class(type(config)(**settings)).eval()
    drop_layers(model, [0, 3])
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.layer_types == ["full_attention", "sliding_attention"]
    input_ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits)


def test_frozen_embeddings(model):
    freeze_embeddings(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"model.embed_tokens.weight"}
    assert not model.get_output_embeddings().weight.requires_grad


@pytest.mark.parametrize("keep", [[], [1, 0], [0, 0], [0, 9], [-1, 2]])
def test_impossible_layers(model, keep):
    with pytest.raises(TaidError, match="rising numbers"):
        drop_layers(model, keep)


def test_impossible_counts_and_data(model, token_blocks):
    for layers in (0, 5):
        with pytest.raises(TaidError, match="cannot remain"):
            prune_by_influence(model, token_blocks, layers)
    with pytest.raises(TaidError, match="at least one block"):
        block_influence(model, np.zeros((0, 4), dtype=np.int64))
    assert all(math.isfinite(value) for value in block_influence(model, token_blocks))
