"""Families beside Llama: what each runtime computes and reads is what transformers does."""

import json
import pydoc_data.topics
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaTokenizer,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from export.errors import ExportError
from export.gguf import export_gguf
from export.mlc import check_windows, export_mlc, read_architecture
from export.onnx import export_onnx
from export.runtime import Runtime, open_runtime
from export.torch_runtime import TorchRuntime
from pipeline import preflight
from pipeline.conversations import chat_ids_of, reference_chat_ids
from pipeline.fidelity import Fidelity

TEXT = (
    "The import statement binds a name to a module. If it cannot be found, an exception is raised, and the "
    "statement ends; 1234 modules are searched for in the order of the path, which a program may change."
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System messages are not known') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n'"
    " + message['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def save(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Saves a model whose norms and biases are not those of a fresh one."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(torch.randn_like(weight), alpha=0.3)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def qwen2(tokenizer: PreTrainedTokenizerFast, folder: Path, tied: bool = True) -> Path:
    """Biases of queries, keys and values; padded rows; Qwen2's own kind of tokenizer, trained here."""
    letters = {letter: number for number, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    untrained = Qwen2Tokenizer(vocab={"<|endoftext|>": len(letters), **letters}, merges=[])
    own = untrained.train_new_from_iterator(TOPICS.splitlines(), 1500)
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    own.eos_token, own.chat_template = "<|im_end|>", tokenizer.chat_template
    config = Qwen2Config(
        **SMALL | {"eos_token_id": own.eos_token_id},
        vocab_size=len(own) + 32,
        num_hidden_layers=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=tied,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.5)
    return save(model, own, folder)


def qwen3(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Norms of queries and keys; heads that together are wider than the model; padded rows."""
    config = Qwen3Config(
        **SMALL,
        vocab_size=len(tokenizer) + 32,
        num_hidden_layers=2,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=False,
    )
    return save(Qwen3ForCausalLM(config), tokenizer, folder)


def granite(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Embeddings, attention, residuals and logits, each multiplied with a number of its own."""
    config = GraniteConfig(
        **SMALL,
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        embedding_multiplier=6.0,
        attention_multiplier=0.1,
        residual_multiplier=0.4,
        logits_scaling=3.0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
    )
    return save(GraniteForCausalLM(config), tokenizer, folder)


def gemma_tokenizer(text: str, pieces: str = r"\p{N}|▁*[^▁\p{N}]+|▁+", size: int = 0) -> GemmaTokenizer:
    """A tokenizer built like Gemma's (spaces as ▁, bytes to fall back on), trained here.

    ``pieces``: where no token goes across; as SentencePiece has it, a word with the spaces before it.
    ``size``: tokens with those that are never used, of which Gemma has some, too.
    """
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "isolated")
    trained.decoder = decoders.ByteFallback()
    trained.train_from_iterator(
        text.splitlines(), trainers.BpeTrainer(vocab_size=1500, show_progress=False, max_token_length=16)
    )
    model = json.loads(trained.to_str())["model"]
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    names += [f"<0x{byte:02X}>" for byte in range(256)]
    names += sorted(model["vocab"], key=model["vocab"].get)
    names += [f"<unused{number}>" for number in range(size - len(names))]
    tokenizer = GemmaTokenizer(
        vocab={name: number for number, name in enumerate(names)},
        merges=[tuple(pair) for pair in model["merges"]],
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
    )
    tokenizer.chat_template = GEMMA_TEMPLATE
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", names.index("<bos>"))]
    )
    return tokenizer


TOPICS = "\n".join(pydoc_data.topics.topics.values())[:400_000]


def gemma3(tokenizer: PreTrainedTokenizerFast, folder: Path, **changes: Any) -> Path:
    """Norms that add one, scaled embeddings, layers with a window and a theta of their own."""
    own = gemma_tokenizer(TOPICS, size=changes.get("vocab_size", 0))
    values = SMALL | {
        "vocab_size": len(own) + 16,
        "num_hidden_layers": 7,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "eos_token_id": [1, 6],
        "bos_token_id": 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }
    return save(Gemma3ForCausalLM(Gemma3TextConfig(**{**values, **changes})), own, folder)


FAMILIES: dict[str, Callable[..., Path]] = {
    "qwen2": qwen2,
    "qwen2_untied": partial(qwen2, tied=False),
    "qwen3": qwen3,
    "gemma3": gemma3,
    "granite": granite,
}
PRE_TOKENIZERS = {"qwen2": "qwen2", "qwen2_untied": "qwen2", "gemma3": None}
"""Where it is not SmolLM2's."""


@pytest.fixture(scope="module")
def model_dirs(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("families")
    return {name: make(tiny_tokenizer, folder / name) for name, make in FAMILIES.items()}


def mean_kl(reference: Runtime, runtime: Runtime) -> float:
    """Over a text of more tokens than Gemma's window, in one pass and then one by one."""
    ids = reference.tokenize(TEXT)
    size = min(reference.vocabulary_size, runtime.vocabulary_size)
    assert size == reference.vocabulary_size
    expected = reference.forward(ids)
    fidelity = Fidelity()
    fidelity.add(expected, runtime.forward(ids)[:, :size], np.zeros(len(ids), dtype=int))
    runtime.reset()
    runtime.prefill(ids[:20])
    one_by_one = np.stack([runtime.decode(token_id)[:size] for token_id in ids[20:]])
    fidelity.add(expected[20:], one_by_one, np.zeros(len(ids) - 20, dtype=int))
    return fidelity.statistics()["mean_kl"]


EXPORTS: dict[str, Callable[[Path, Path, str | None], Path]] = {
    "gguf": lambda model, out, pre: export_gguf(model, out, "t", ["f16"], pre_tokenizer=pre)[0],
    "onnx": lambda model, out, pre: export_onnx(model, out, "t", ["fp32"], threads=1)[0],
    "mlc": lambda model, out, pre: export_mlc(model, out, "t", "q0f32"),
}
LIMITS = {"gguf": 1e-4, "onnx": 1e-8, "mlc": 1e-3}
"""Of mean KL: float16 weights, float32 throughout, bfloat16 weights."""


@pytest.mark.parametrize(
    ("family", "format"),
    [
        *((family, format) for family in ("qwen2", "qwen2_untied") for format in EXPORTS),
        ("qwen3", "gguf"),
        ("qwen3", "onnx"),
        ("qwen3", "mlc"),
        ("gemma3", "gguf"),
        ("gemma3", "onnx"),
        ("gemma3", "mlc"),
        ("granite", "gguf"),
        ("granite", "onnx"),
    ],
)
def test_the_runtime_computes_and_reads_what_transformers_does(
    model_dirs: dict[str, Path], tmp_path: Path, family: str, format: str
) -> None:
    pre_tokenizer = PRE_TOKENIZERS.get(family, "smollm")
    reference = TorchRuntime(model_dirs[family])
    runtime = open_runtime(EXPORTS[format](model_dirs[family], tmp_path / "out", pre_tokenizer))
    assert mean_kl(reference, runtime) < LIMITS[format]
    expected = reference_chat_ids(reference)
    for reader in (runtime, runtime.other_reader()):
        assert reader is None or chat_ids_of(reader, expected) == expected
    assert set(reference.end_of_turn_ids) <= set(runtime.end_of_turn_ids)
    runtime.close()


@pytest.mark.parametrize("format", EXPORTS)
def test_a_vocabulary_as_large_as_gemmas(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, format: str
) -> None:
    """262,144 tokens, most of which no text is made of; they are no less part of the softmax."""
    torch.manual_seed(6)
    model = gemma3(tiny_tokenizer, tmp_path / "model", vocab_size=262_144)
    reference = TorchRuntime(model)
    runtime = open_runtime(EXPORTS[format](model, tmp_path / "out", None))
    assert runtime.vocabulary_size == reference.vocabulary_size == 262_144
    assert mean_kl(reference, runtime) < LIMITS[format]
    runtime.close()


def test_what_mlc_cannot_hold_is_told_before(model_dirs: dict[str, Path]) -> None:
    (problem,) = preflight.problems(model_dirs["granite"], ["mlc"])
    assert problem.startswith("export.mlc: ")
    assert "model_type 'granite' cannot be exported to MLC" in problem
    assert preflight.problems(model_dirs["gemma3"], ["mlc"]) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping of a Gemma 3 cannot be exported"),
        ({"tie_word_embeddings": False}, "MLC takes the head of a Gemma 3 from its embedding"),
        ({"hidden_activation": "gelu"}, "only gelu_pytorch_tanh feed-forward layers"),
        ({"layer_types": ["sliding_attention"] * 7}, "without a layer that sees all tokens"),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                }
            },
            "rope scaling 'linear'",
        ),
    ],
)
def test_a_gemma_that_mlc_cannot_hold_is_told_before(
    model_dirs: dict[str, Path], tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    model_dir = Path(shutil.copytree(model_dirs["gemma3"], tmp_path / "model"))
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | changes))
    (problem,) = preflight.problems(model_dir, ["mlc"])
    assert problem.startswith("export.mlc: ")
    assert sentence in problem


def test_a_scaled_gemma_is_tried_before_with_its_own_pattern_of_layers(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """As Gemma 3 of 4B and more has it: only layers of full attention are scaled. llama.cpp knows that."""
    scaled = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}
    local = {"rope_type": "default", "rope_theta": 10000.0}
    ropes = {"full_attention": scaled, "sliding_attention": local}
    model = gemma3(tiny_tokenizer, tmp_path / "model", rope_parameters=ropes)
    assert preflight.problems(model, ["gguf"]) == []


def test_windows_are_refused_where_the_browsers_cache_mixes_them_up(model_dirs: dict[str, Path]) -> None:
    for family in ("qwen2", "qwen3"):
        check_windows(read_architecture(model_dirs[family], "q4f32_1"), ["wasm32-webgpu"])
    architecture = read_architecture(model_dirs["gemma3"], "q4f32_1")
    check_windows(architecture, ["x86_64-cpu"])
    with pytest.raises(ExportError, match="whose layers have windows"):
        check_windows(architecture, ["x86_64-cpu", "wasm32-webgpu"])


def test_what_every_format_can_hold_is_no_problem(model_dirs: dict[str, Path]) -> None:
    assert preflight.problems(model_dirs["gemma3"], ["gguf", "onnx"]) == []


def test_a_tokenizer_that_genai_reads_otherwise_is_told_before(
    model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    """With tokens across words: GenAI cuts text at the next space once eleven letters are waiting."""
    shutil.copytree(model_dirs["gemma3"], tmp_path / "model")
    gemma_tokenizer(TOPICS, pieces=".+").save_pretrained(tmp_path / "model")
    (problem,) = preflight.problems(tmp_path / "model", ["onnx"])
    assert problem.startswith("export.onnx: onnxruntime-genai makes other token ids")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64, but llama.cpp scales .* by 32"),
        ({"layer_types": ["sliding_attention", "full_attention"] * 3 + ["full_attention"]}, "layer_types"),
    ],
)
def test_a_gemma_that_llama_cpp_would_compute_otherwise_is_refused(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    model_dir = gemma3(tiny_tokenizer, tmp_path / "model", **changes)
    with pytest.raises(ExportError, match=sentence):
        export_gguf(model_dir, tmp_path / "out", "t", ["f16"])
    (problem,) = preflight.problems(model_dir, ["gguf"])
    assert problem.startswith("export.gguf: ")
