"""GGUF: what llama.cpp loads is the model that transformers has."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from export.errors import ExportError
from export.gguf import (
    QUANTIZATIONS,
    check_gguf,
    export_gguf,
    quantize_gguf,
    stage_model,
    tensor_type_of_each,
)
from export.llama_cpp_runtime import LlamaCppRuntime
from export.runtime import generate_greedily
from export.tensors import tensor_kinds, tensor_types
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
    [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "a\r\nb\n\n\n c  d\t"}],
    [{"role": "user", "content": "<|endoftext|><|im_start|>assistant\nI am not<|im_end|> < |im_end|>"}],
    [{"role": "user", "content": "{{ messages }} {% raw %} \\n & <b>'\"</b>"}],
    [{"role": "user", "content": "1234567890 ½ e\u0301 \u200b \u2028 👩‍👩‍👧 क्षि"}],
    [
        {"role": "system", "content": "Antworte auf Deutsch."},
        {"role": "user", "content": "Grüße!"},
        {"role": "assistant", "content": "Hallo 👋"},
        {"role": "user", "content": "你好，世界"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "עברית"},
    ],
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
    kinds = tensor_kinds(gguf_files["q4_k_m"])
    assert kinds["attn_q"] == {"Q5_0": 4}
    assert kinds["output_norm"] == {"F32": 1}
    assert sum(sum(types.values()) for types in kinds.values()) == len(each)


def test_every_quantization_is_made_and_runs(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Of a model whose rows 256 divides, as quantizations with blocks of 256 want: smaller files, then, lose
    more. The largest bound is q2_k's, which keeps a third of the bits of q8_0."""
    torch.manual_seed(2)
    config = Qwen2Config(
        vocab_size=len(tiny_tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    names = list(QUANTIZATIONS)
    paths = export_gguf(tmp_path / "model", tmp_path / "files", "t", names, pre_tokenizer=PRE_TOKENIZER)
    reference = TorchRuntime(tmp_path / "model")
    ids = reference.tokenize(TEXT)
    expected = reference.forward(ids)
    losses, sizes, types = {}, {}, {}
    for name, path in zip(names, paths, strict=True):
        runtime = LlamaCppRuntime(path)
        losses[name] = mean_kl(expected, runtime.forward(ids))
        runtime.close()
        sizes[name], types[name] = path.stat().st_size, set(tensor_types(path))
    assert losses["f16"] < 1e-5
    assert losses["bf16"] < 1e-3
    assert losses["q8_0"] < losses["q6_k"] < losses["q4_k_m"] < losses["q2_k"] < 0.5
    assert sizes["q2_k"] < sizes["q3_k_m"] < sizes["q4_k_s"] < sizes["q5_k_s"] < sizes["q6_k"] < sizes["q8_0"]
    for name, kind in {
        "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q6_k": "Q6_K", "q5_k_m": "Q5_K", "q5_k_s": "Q5_K",
        "q4_k_m": "Q4_K", "q4_k_s": "Q4_K", "q4_0": "Q4_0", "iq4_xs": "IQ4_XS", "q3_k_m": "Q3_K",
        "q2_k": "Q2_K",
    }.items():  # fmt: skip
        assert kind in types[name], name


def test_unknown_quantization(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no GGUF quantization 'q4_k_x'; choose from f16"):
        export_gguf(tiny_model_dir, tmp_path / "out", "tiny", ["q4_k_x"])
    assert list(tmp_path.iterdir()) == []


def test_folder_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ExportError, match=r"no \.safetensors file"):
        export_gguf(tmp_path / "model", tmp_path / "out", "tiny", ["f16"])


def test_unknown_pre_tokenizer_is_one_sentence_and_no_code_of_the_folder_runs(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    # Of this architecture the converter opens the tokenizer with trust_remote_code, then looks for its
    # pre-tokenizer: unstaged, the file below runs.
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    ran = tmp_path / "ran"
    (folder / "own_tokenizer.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as OwnTokenizer\n"
    )
    change_config(folder, "config.json", architectures=["DreamModel"], mask_token_id=0)
    auto_map = {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]}
    change_config(folder, "tokenizer_config.json", auto_map=auto_map, tokenizer_class="OwnTokenizer")
    with pytest.raises(ExportError, match="does not recognise this pre-tokenizer; name the one"):
        export_gguf(folder, tmp_path / "out", "tiny", ["f16"])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_damaged_safetensors(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ExportError, match=r"model\.safetensors: is no complete safetensors file"):
        export_gguf(folder, tmp_path / "out", "tiny", ["f16"], pre_tokenizer=PRE_TOKENIZER)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_name_with_a_slash_and_full_folder(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="without slashes"):
        export_gguf(tiny_model_dir, tmp_path / "out", "a/tiny", ["f16"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(ExportError, match="is not an empty folder"):
        export_gguf(tiny_model_dir, tmp_path / "out", "tiny", ["f16"])
    assert (tmp_path / "out" / "mine").read_text() == "keep"


def test_damaged_gguf_is_refused(gguf_files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "half.gguf"
    path.write_bytes(gguf_files["q8_0"].read_bytes()[:5000])
    with pytest.raises(ExportError, match=r"llama\.cpp cannot load this file"):
        LlamaCppRuntime(path)


def test_greedy_text_is_the_models_outside_near_ties(
    gguf_files: dict[str, Path], reference: TorchRuntime
) -> None:
    runtime = LlamaCppRuntime(gguf_files["f16"])
    prompt = reference.tokenize(TEXT)
    ours = generate_greedily(runtime, prompt, 40)
    runtime.close()
    theirs = generate_greedily(reference, prompt, 40)
    for place, (our, their) in enumerate(zip(ours, theirs, strict=False)):
        if our != their:
            reference.reset()
            best = np.sort(reference.prefill([*prompt, *theirs[:place]]))
            assert best[-1] - best[-2] < 0.02, f"token {place}"
            break


def test_forward_beyond_one_batch(gguf_files: dict[str, Path], reference: TorchRuntime) -> None:
    """More tokens than llama.cpp takes at once, and more than the model was trained for."""
    runtime = LlamaCppRuntime(gguf_files["f16"], context_length=2304)
    ids = reference.tokenize(TEXT * 100)[:2100]
    whole = runtime.forward(ids)
    assert whole.shape == (2100, 2048)
    assert whole.dtype == np.float32
    runtime.reset()
    # The cache is float16 and batches differ in order of summation, so compare distributions.
    assert abs(mean_kl(whole[-1:], runtime.prefill(ids)[None])) < 1e-4
    runtime.close()


def change_config(folder: Path, file: str, **values: Any) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **values}))


@pytest.mark.parametrize(
    ("file", "values", "sentence"),
    [
        (
            "config.json",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
            "llama.rope.freq_base is 100000.0, but the model's configuration says 10000.0",
        ),
        ("config.json", {"max_position_embeddings": 1024}, "llama.context_length is 512"),
        ("config.json", {"rms_norm_eps": 1e-6}, "layer_norm_rms_epsilon is"),
        ("config.json", {"vocab_size": 2047}, "has 2048 tokens and 2048 rows of embeddings"),
        ("config.json", {"tie_word_embeddings": False}, r"has no output\.weight"),
        ("tokenizer_config.json", {"eot_token": "<|im_start|>"}, None),
        ("tokenizer_config.json", {"eos_token": None}, None),
    ],
)
def test_file_that_says_otherwise_than_the_folder(
    gguf_files: dict[str, Path],
    tiny_model_dir: Path,
    tmp_path: Path,
    file: str,
    values: dict[str, Any],
    sentence: str | None,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    change_config(folder, file, **values)
    config = stage_model(folder, tmp_path / "staged")
    if sentence is None:  # nothing that the file could contradict
        check_gguf(gguf_files["f16"], folder, config, {"lm_head.weight"})
        return
    with pytest.raises(ExportError, match=sentence):
        check_gguf(gguf_files["f16"], folder, config, {"lm_head.weight"})


def test_file_with_another_eos_or_template(
    gguf_files: dict[str, Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    config = stage_model(folder, tmp_path / "staged")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(ExportError, match=r"chat_template is not the model's own"):
        check_gguf(gguf_files["f16"], folder, config, set())
    shutil.copyfile(tiny_model_dir / template.name, template)
    change_config(folder, "tokenizer_config.json", eos_token="<|endoftext|>")
    change_config(folder, "config.json", eos_token_id=0)
    change_config(folder, "generation_config.json", eos_token_id=0)
    with pytest.raises(ExportError, match=r"eos_token_id is 2, but the model's eos_token is '<\|endoftext"):
        check_gguf(gguf_files["f16"], folder, config, set())


def test_rope_theta_of_transformers_5_reaches_the_top_level(tiny_model_dir: Path, tmp_path: Path) -> None:
    # The trap that this guards against: transformers 5 writes no top-level key.
    config = json.loads((tiny_model_dir / "config.json").read_text())
    assert "rope_theta" not in config
    stage_model(tiny_model_dir, tmp_path / "staged")
    assert json.loads((tmp_path / "staged" / "config.json").read_text())["rope_theta"] == 100000.0


def test_qwen2_with_biases_own_head_and_padded_rows(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Another family, whose embedding has more rows than its tokenizer has tokens."""
    torch.manual_seed(1)
    rows = len(tiny_tokenizer) + 64
    config = Qwen2Config(
        vocab_size=rows,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=False,
        initializer_range=0.08,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Qwen2ForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith("_proj.bias"):
            torch.nn.init.normal_(weight)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    reference = TorchRuntime(folder)
    ids = reference.tokenize(TEXT)
    expected = reference.forward(ids)
    (path,) = export_gguf(folder, tmp_path / "out", "qwen", ["f16"], pre_tokenizer=PRE_TOKENIZER)
    field = GGUFReader(path).get_field("qwen2.rope.freq_base")
    assert field is not None
    assert field.contents() == 1000000.0
    assert {"blk.0.attn_q.bias", "output.weight"} <= set(tensor_type_of_each(path))
    runtime = LlamaCppRuntime(path)
    assert runtime.vocabulary_size == reference.vocabulary_size == rows - 64
    assert runtime.tokenize(TEXT) == ids
    assert 0 <= mean_kl(expected, runtime.forward(ids)) < 1e-4
    runtime.close()


def test_importance_matrix_moves_the_error_away_from_what_matters(
    gguf_files: dict[str, Path], tmp_path: Path
) -> None:
    tensor = "blk.1.ffn_up.weight"
    importance = np.random.default_rng(0).lognormal(0, 2, size=128).astype(np.float32)

    def values(path: Path) -> np.ndarray:
        found = next(each for each in GGUFReader(path).tensors if each.name == tensor)
        return dequantize(found.data, found.tensor_type).astype(np.float64)

    exact = values(gguf_files["f16"])
    errors = []
    for matrix in (None, {tensor: importance}):
        path = tmp_path / f"{len(errors)}.gguf"
        quantize_gguf(gguf_files["f16"], path, "q4_0", importance_matrix=matrix, threads=1)
        errors.append(float((importance * (values(path) - exact) ** 2).mean()))
    assert tensor_type_of_each(path)[tensor] == "Q4_0"
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize(
    ("matrix", "sentence"),
    [
        ({"blk.9.ffn_up.weight": np.ones(128)}, "'blk.9.ffn_up.weight' is no tensor"),
        ({"blk.0.ffn_up.weight": np.ones(64)}, r"has shape \[64\], but the tensor has 128 columns"),
        ({"blk.0.ffn_up.weight": np.full(128, np.nan)}, "must be finite"),
        ({"blk.0.ffn_up.weight": np.zeros(128)}, "not zero everywhere"),
    ],
)
def test_importance_matrix_that_does_not_fit(
    gguf_files: dict[str, Path], tmp_path: Path, matrix: dict[str, np.ndarray], sentence: str
) -> None:
    with pytest.raises(ExportError, match=sentence):
        quantize_gguf(gguf_files["f16"], tmp_path / "x.gguf", "q4_0", importance_matrix=matrix)
    assert list(tmp_path.iterdir()) == []


def test_llama_cpp_that_refuses_to_quantize_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ExportError, match=r"x\.gguf: llama\.cpp cannot quantize to q4_0"):
        quantize_gguf(tmp_path / "broken.gguf", tmp_path / "x.gguf", "q4_0")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]


TEMPLATES = [
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}\n{% endfor %}",
    "{%- set ns = namespace(n=0) -%}\n {% for m in messages %}\n{% set ns.n = ns.n+1 %}{{ns.n}}{% endfor %}",
    "{{ bos_token }}{{ messages[0].content | trim }}{% if tools is not none %}tools{% endif %}\n",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_render_as_in_transformers(
    gguf_files: dict[str, Path], tiny_tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    runtime = LlamaCppRuntime(gguf_files["q8_0"])
    runtime.chat_template = template
    for messages in CONVERSATIONS:
        text = tiny_tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template)
        assert runtime.chat_ids(messages, False) == runtime.tokenize(str(text))
    runtime.close()


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('no') }}",
        "{{ 1 + messages }}",
        "{% for %}",
    ],
)
def test_hostile_or_broken_template_is_one_sentence(gguf_files: dict[str, Path], template: str) -> None:
    runtime = LlamaCppRuntime(gguf_files["q8_0"])
    runtime.chat_template = template
    with pytest.raises(ExportError, match="its chat template cannot be rendered"):
        runtime.chat_ids(CONVERSATIONS[0], True)
    runtime.close()
    runtime.close()  # a second time does nothing


def test_every_quantization_names_a_constant_of_llama_cpp() -> None:
    import llama_cpp

    assert all(hasattr(llama_cpp, constant) for constant in QUANTIZATIONS.values())
