"""Scaled rotary embeddings: each format computes them as transformers does, or refuses the model."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from export.errors import ExportError
from export.gguf import export_gguf
from export.mlc import export_mlc
from export.onnx import export_onnx
from export.runtime import Runtime, open_runtime
from export.torch_runtime import TorchRuntime
from pipeline import preflight

KINDS: dict[str, dict[str, Any]] = {
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "linear": {"factor": 2.7},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}
FAMILIES: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}
IDS = np.random.default_rng(0).integers(3, 2000, 200).tolist()


def save(folder: Path, tokenizer: PreTrainedTokenizerFast, family: str, rope: dict[str, Any]) -> Path:
    """The same weights whatever the scaling."""
    torch.manual_seed(0)
    configuration, model = FAMILIES[family]
    config = configuration(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": 10000.0, **rope},
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def mean_kl(expected: np.ndarray, runtime: Runtime) -> float:
    found = runtime.forward(IDS)[:, : expected.shape[1]]
    runtime.close()
    log_p, log_q = (
        torch.from_numpy(logits).double().log_softmax(-1) for logits in (expected, np.array(found))
    )
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


EXPORTS = {
    "gguf": lambda model, out: export_gguf(model, out, "t", ["f16"], pre_tokenizer="smollm")[0],
    "onnx": lambda model, out: export_onnx(model, out, "t", ["fp32"], threads=1)[0],
    "mlc": lambda model, out: export_mlc(model, out, "t", "q0f32"),
}


@pytest.mark.parametrize(
    ("family", "kind", "format"),
    [
        *(("llama", kind, "gguf") for kind in KINDS),
        ("llama", "llama3", "onnx"),
        ("qwen2", "linear", "gguf"),
        ("qwen2", "yarn", "gguf"),
        ("qwen2", "linear", "onnx"),
    ],
)
def test_logits_are_the_models(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, family: str, kind: str, format: str
) -> None:
    model = save(tmp_path / "model", tiny_tokenizer, family, {"rope_type": kind, **KINDS[kind]})
    expected = TorchRuntime(model).forward(IDS)
    plain = TorchRuntime(save(tmp_path / "plain", tiny_tokenizer, family, {"rope_type": "default"}))
    assert mean_kl(expected, plain) > 0.05, "without the scaling the model would be another one"
    assert mean_kl(expected, open_runtime(EXPORTS[format](model, tmp_path / "out"))) < 1e-4
    if family == "llama":  # a Qwen2 reads SmolLM2's tokenizer otherwise, which preflight tells, too
        assert preflight.problems(model, [format], pre_tokenizer="smollm") == []


@pytest.mark.parametrize(
    ("family", "kind", "format", "sentence"),
    [
        ("llama", "linear", "onnx", "does not rotate as config.json says"),
        ("llama", "yarn", "onnx", "does not rotate as config.json says"),
        ("qwen2", "llama3", "gguf", "rope_type llama3 of the model's configuration is not in the file"),
        ("llama", "linear", "mlc", "rope"),
    ],
)
def test_a_scaling_that_a_format_passes_over_is_refused(
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    family: str,
    kind: str,
    format: str,
    sentence: str,
) -> None:
    model = save(tmp_path / "model", tiny_tokenizer, family, {"rope_type": kind, **KINDS[kind]})
    with pytest.raises(ExportError, match=sentence):
        EXPORTS[format](model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (problem,) = preflight.problems(model, [format], pre_tokenizer="smollm")
    assert problem.startswith(f"export.{format}: ")
    assert re.search(sentence, problem)
