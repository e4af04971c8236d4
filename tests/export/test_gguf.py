"""GGUF: what llama.cpp loads is the model that transformers has."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from export.errors import ExportError
from export.gguf import QUANTIZATIONS, export_gguf, tensor_type_of_each, tensor_types
from export.llama_cpp_runtime import LlamaCppRuntime
from export.runtime import generate_greedily
from export.torch_runtime import TorchRuntime

PRE_TOKENIZER = "smollm"
TEXT = "The import statement binds a name to a module, twice in 1234 cases.\n\n    def f(x): return x"
CONVERSATIONS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " leading and trailing "}],
    [
        {"role": "user", "content": "What is 12 + 30?"},
        {"role": "assistant", "content": "42"},
        {"role": "user", "content": "Sure?"},
    ],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": "😀 日本語 العربية\n\ttabs"}],
    [{"role": "user", "content": "text that looks like <|im_end|> and <|im_start|>system"}],
    [{"role": "user", "content": "```python\nfor i in range(10):\n    print(i)\n```"}],
]


@pytest.fixture(scope="module")
def gguf_files(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf") / "files"
    wanted = ["f16", "q8_0", "q4_k_m"]
    metadata = {"license": "apache-2.0", "language": ["en"], "base_model": "someone/teacher"}
    paths = export_gguf(
        tiny_model_dir, folder, "tiny", wanted, pre_tokenizer=PRE_TOKENIZER, metadata=metadata
    )
    assert [path.name for path in paths] == [f"tiny-{quantization}.gguf" for quantization in wanted]
    return dict(zip(wanted, paths, strict=True))


@pytest.fixture(scope="module")
def reference(tiny_model_dir: Path) -> TorchRuntime:
    return TorchRuntime(tiny_model_dir)


def mean_kl(reference_logits: np.ndarray, logits: np.ndarray) -> float:
    def log_softmax(values: np.ndarray) -> np.ndarray:
        values = values.astype(np.float64)
        values -= values.max(-1, keepdims=True)
        return values - np.log(np.exp(values).sum(-1, keepdims=True))

    p, q = log_softmax(reference_logits), log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(("quantization", "limit"), [("f16", 1e-4), ("q8_0", 0.005), ("q4_k_m", 0.1)])
def test_logits_are_the_models(
    gguf_files: dict[str, Path], reference: TorchRuntime, quantization: str, limit: float
) -> None:
    runtime = LlamaCppRuntime(gguf_files[quantization])
    ids = reference.tokenize(TEXT)
    assert runtime.tokenize(TEXT) == ids
    reference.reset()
    assert 0 <= mean_kl(reference.forward(ids), runtime.forward(ids)) < limit
    runtime.close()


def test_incremental_decoding_equals_one_pass(gguf_files: dict[str, Path]) -> None:
    runtime = LlamaCppRuntime(gguf_files["f16"])
    ids = runtime.tokenize(TEXT)
    whole = runtime.forward(ids)
    runtime.reset()
    # The cache holds keys and values in float16, so the tolerance is not float32's.
    assert np.allclose(runtime.prefill(ids[:5]), whole[4], atol=1e-2)
    for place in range(5, len(ids)):
        assert np.allclose(runtime.decode(ids[place]), whole[place], atol=1e-2)
    with pytest.raises(ExportError, match="do not fit into a context of 512"):
        runtime.forward([1] * 600)
    runtime.close()


@pytest.mark.parametrize("prompt", [True, False])
def test_chat_ids_are_the_models(gguf_files: dict[str, Path], reference: TorchRuntime, prompt: bool) -> None:
    runtime = LlamaCppRuntime(gguf_files["q8_0"])
    for messages in CONVERSATIONS:
        ids = runtime.chat_ids(messages, prompt)
        assert ids == reference.chat_ids(messages, prompt)
        assert runtime.decode_text(ids) == reference.decode_text(ids)
    runtime.close()


def test_generation_ends_at_an_end_of_turn(gguf_files: dict[str, Path]) -> None:
    runtime = LlamaCppRuntime(gguf_files["f16"])
    assert 2 in runtime.end_of_turn_ids
    prompt = runtime.tokenize(TEXT)
    new_ids = generate_greedily(runtime, prompt, 8)
    assert len(new_ids) == 8 or new_ids[-1] in runtime.end_of_turn_ids
    runtime.end_of_turn_ids = (new_ids[0],)
    assert generate_greedily(runtime, prompt, 8) == new_ids[:1]
    runtime.close()


def test_metadata_says_what_the_model_is(gguf_files: dict[str, Path], tiny_model_dir: Path) -> None:
    reader = GGUFReader(gguf_files["q8_0"])

    def field(key: str) -> object:
        found = reader.get_field(key)
        assert found is not None, key
        return found.contents()

    assert field("llama.rope.freq_base") == 100000.0
    assert field("llama.context_length") == 512
    assert field("tokenizer.ggml.eos_token_id") == 2
    assert field("tokenizer.ggml.pre") == PRE_TOKENIZER
    assert field("general.license") == "apache-2.0"
    assert field("general.base_model.0.name") == "Teacher"
    assert field("general.languages") == ["en"]
    assert field("tokenizer.chat_template") == (tiny_model_dir / "chat_template.jinja").read_text()
    assert not any(tensor.name == "output.weight" for tensor in reader.tensors)  # the head is tied


def test_types_of_tensors_are_what_the_file_holds(gguf_files: dict[str, Path]) -> None:
    each = tensor_type_of_each(gguf_files["q4_k_m"])
    counts = tensor_types(gguf_files["q4_k_m"])
    assert sum(counts.values()) == len(each)
    # Rows of 128 are not divisible by 256, so the k-quant in the name falls back for most tensors.
    assert each["blk.0.attn_q.weight"] == "Q5_0"
    assert each["blk.0.ffn_down.weight"].endswith("_K")


def test_unknown_quantization(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no GGUF quantization 'q4_k_x'; choose from f16"):
        export_gguf(tiny_model_dir, tmp_path / "out", "tiny", ["q4_k_x"])
    assert list(tmp_path.iterdir()) == []


def test_folder_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ExportError, match=r"no \.safetensors file"):
        export_gguf(tmp_path / "model", tmp_path / "out", "tiny", ["f16"])


def test_unknown_pre_tokenizer_is_one_sentence_and_leaves_nothing(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="does not recognise this pre-tokenizer; name the one"):
        export_gguf(tiny_model_dir, tmp_path / "out", "tiny", ["f16"])
    assert list(tmp_path.iterdir()) == []


def test_damaged_safetensors(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ExportError, match="converter refuses this model"):
        export_gguf(folder, tmp_path / "out", "tiny", ["f16"], pre_tokenizer=PRE_TOKENIZER)
    assert not (tmp_path / "out").exists()


def test_damaged_gguf_is_refused(gguf_files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "half.gguf"
    path.write_bytes(gguf_files["q8_0"].read_bytes()[:5000])
    with pytest.raises(ExportError, match=r"llama\.cpp cannot load this file"):
        LlamaCppRuntime(path)


def test_rope_theta_is_read_from_rope_parameters(tiny_model_dir: Path) -> None:
    # The trap that this guards against: transformers 5 writes no top-level key.
    config = json.loads((tiny_model_dir / "config.json").read_text())
    assert "rope_theta" not in config
    assert config["rope_parameters"]["rope_theta"] == 100000.0


def test_every_quantization_names_a_constant_of_llama_cpp() -> None:
    import llama_cpp

    assert all(hasattr(llama_cpp, constant) for constant in QUANTIZATIONS.values())
