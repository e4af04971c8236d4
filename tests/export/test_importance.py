"""Importance matrices against the formula in float64, and their names against GGUF's own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.numpy import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from export.errors import ExportError
from export.gguf import export_gguf
from export.importance import ROW, gguf_importance, measure_importance, rows_of_text

ROWS = [np.random.default_rng(seed).integers(3, 2000, length) for seed, length in ((0, 40), (1, 24))]


@pytest.fixture(scope="module")
def importance(tiny_model_dir: Path) -> dict[str, np.ndarray]:
    return measure_importance(tiny_model_dir, ROWS, threads=1)


def test_the_first_layer_sees_normalized_embeddings(
    tiny_model_dir: Path, importance: dict[str, np.ndarray]
) -> None:
    weights = load_file(tiny_model_dir / "model.safetensors")
    x = weights["model.embed_tokens.weight"][np.concatenate(ROWS)].astype(np.float64)
    norm = weights["model.layers.0.input_layernorm.weight"].astype(np.float64)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * norm
    for part in "qkv":
        np.testing.assert_allclose(
            importance[f"model.layers.0.self_attn.{part}_proj"], (x**2).mean(0), rtol=1e-5
        )
    assert importance["model.layers.3.mlp.down_proj"].shape == (256,)
    assert importance["lm_head"].shape == (128,)


def test_positions_that_restart_keep_documents_apart(
    tiny_model_dir: Path, importance: dict[str, np.ndarray]
) -> None:
    packed = measure_importance(
        tiny_model_dir,
        [np.concatenate(ROWS)],
        [np.concatenate([np.arange(len(row)) for row in ROWS])],
        threads=1,
    )
    for name, values in importance.items():
        np.testing.assert_allclose(packed[name], values, rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_every_matrix_of_the_file_has_its_importance(
    tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path, tied: bool
) -> None:
    folder = tmp_path / "qwen"
    config = Qwen2Config(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        eos_token_id=2,
        use_sliding_window=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    (file,) = export_gguf(folder, tmp_path / "out", "q", ["f16"], pre_tokenizer="smollm", threads=1)
    found = gguf_importance(measure_importance(folder, ROWS, threads=1), folder)
    matrices = {each.name: int(each.shape[0]) for each in GGUFReader(file).tensors if len(each.shape) == 2}
    if not tied:
        del matrices["token_embd.weight"]  # looked up, never multiplied
    assert {name: len(values) for name, values in found.items()} == matrices


def test_rows_of_text_are_the_tokenizers_and_look_alikes_are_text(
    tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    text = "The import statement <|im_end|> binds names. " * 60
    rows = list(rows_of_text(tiny_model_dir, text))
    assert all(len(row) == ROW for row in rows[:-1])
    assert 0 < len(rows[-1]) <= ROW
    assert 2 not in np.concatenate(rows)
    assert tiny_tokenizer.decode(np.concatenate(rows)) == text


def test_what_cannot_be_measured_or_named_is_one_sentence(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there is no text"):
        measure_importance(tiny_model_dir, [])
    with pytest.raises(ExportError, match="cannot be loaded in transformers"):
        measure_importance(tmp_path, ROWS)
    config = json.loads((tiny_model_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "ctrl"}))
    with pytest.raises(ExportError, match="'ctrl' tensors in GGUF are not known"):
        gguf_importance({}, tmp_path)
