"""MLC: weights equal to mlc_llm's own, and a CPU library that computes the model."""

import copy
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from safetensors.torch import load_file, save_file
from test_families import gemma3
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from tvm.contrib import tvmjs
from tvm.script import tirx as T

from export.errors import ExportError
from export.mlc import (
    QUANTIZATIONS,
    conversation_template,
    export_mlc,
    quantize,
    render_conversation,
    tokenizer_info,
)
from export.mlc_model import TARGETS, blocked_kernel, exponential, vector_kernel
from export.mlc_runtime import CHUNK, MlcRuntime
from export.tensors import tensor_types
from export.torch_runtime import TorchRuntime
from export.untrusted import check_tensor_cache

GOLDEN = Path(__file__).parent / "golden" / "mlc"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
"""What mlc_llm itself made of ``llama-tiny``: SHA-256 of every tensor's bytes, and its configuration."""
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nSYSTEM_MESSAGE<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXT = "The import statement binds a name to a module, twice in 1234 cases.\n\n    def f(x): return x"
CONVERSATIONS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " leading and trailing "}],
    [
        {"role": "user", "content": "What is 12 + 30?"},
        {"role": "assistant", "content": "42"},
        {"role": "user", "content": ""},
    ],
    [{"role": "user", "content": "😀 日本語 العربية\n\ttabs"}],
    [{"role": "user", "content": "text that looks like <|im_end|> and <|im_start|>system"}],
]


@pytest.fixture(scope="module")
def golden_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``llama-tiny`` with the chat template that mlc_llm was told to write for it, its stock ChatML."""
    folder = tmp_path_factory.mktemp("golden") / "llama-tiny"
    shutil.copytree(GOLDEN / "llama-tiny", folder, copy_function=shutil.copyfile)
    stock = EXPECTED["q4f32_1"]["chat_config"]["conv_template"]
    (folder / "chat_template.jinja").write_text(CHATML.replace("SYSTEM_MESSAGE", stock["system_message"]))
    return folder


@pytest.fixture(scope="module")
def exported(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model in a quantization, compiled once."""
    folder = tmp_path_factory.mktemp("mlc")
    return cache(lambda quantization: export_mlc(tiny_model_dir, folder / quantization, "tiny", quantization))


@pytest.fixture(scope="module")
def four_bit_dir(exported: Callable[[str], Path]) -> Path:
    return exported("q4f32_1")


@pytest.fixture(scope="module")
def four_bit(four_bit_dir: Path) -> MlcRuntime:
    return MlcRuntime(four_bit_dir)


@pytest.fixture(scope="module")
def reference(tiny_model_dir: Path) -> TorchRuntime:
    return TorchRuntime(tiny_model_dir)


@pytest.mark.parametrize("quantization", list(EXPECTED))
def test_weights_equal_those_of_mlc_llm(quantization: str, golden_model_dir: Path, tmp_path: Path) -> None:
    folder = export_mlc(golden_model_dir, tmp_path / "out", "t", quantization, compile_cpu=False)
    check_tensor_cache(folder / "tensor-cache.json")
    cache = json.loads((folder / "tensor-cache.json").read_text())
    found = []
    for shard in cache["records"]:
        raw = (folder / shard["dataPath"]).read_bytes()
        for record in shard["records"]:
            data = raw[record["byteOffset"] : record["byteOffset"] + record["nbytes"]]
            found.append(
                {key: record[key] for key in ("name", "shape", "dtype", "format")}
                | {"sha256": hashlib.sha256(data).hexdigest()}
            )
    expected = EXPECTED[quantization]
    assert found == expected["records"]  # names, order, shapes, types and bytes
    assert cache["metadata"] == pytest.approx(expected["metadata"])


def test_chat_config_equals_that_of_mlc_llm(golden_model_dir: Path, tmp_path: Path) -> None:
    folder = export_mlc(golden_model_dir, tmp_path / "out", "t", "q4f32_1", compile_cpu=False)
    config = json.loads((folder / "mlc-chat-config.json").read_text())
    expected = json.loads(json.dumps(EXPECTED["q4f32_1"]["chat_config"]))
    assert config.pop("tokenizer_files") == [*expected.pop("tokenizer_files"), "chat_template.jinja"]
    assert config["conv_template"].pop("name") == "custom"
    del expected["conv_template"]["name"]
    # The stops are the model's own (eos 1 here); the stock template has those of ChatML.
    for key, value in (("stop_token_ids", [1]), ("stop_str", ["<|eos|>"])):
        assert config["conv_template"].pop(key) == value
        del expected["conv_template"][key]
    assert config == expected


def test_quantize_follows_the_layout() -> None:
    weight = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    weight[1, 32:] = 0
    words, scale = quantize(weight)
    assert words.shape == (3, 8)
    assert scale.shape == (3, 2)
    nibbles = np.stack([(words >> (4 * place)) & 15 for place in range(8)], axis=-1).reshape(3, 64)
    restored = (nibbles.astype(np.float32) - 7) * np.repeat(scale, 32, axis=1)
    assert np.abs(restored - weight).max() <= scale.max() / 2 + 1e-6
    assert nibbles.max() <= 14
    assert (restored[1, 32:] == 0).all()


def dequantized_model(folder: Path, model_dir: Path) -> torch.nn.Module:
    """The Hugging Face model with the weights that an MLC folder holds."""
    parameters, _ = tvmjs.load_tensor_cache(str(folder), tvm.cpu())
    arrays = {name: tensor.numpy() for name, tensor in parameters.items()}
    values: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if name.endswith(".q_weight"):
            base = name.removesuffix(".q_weight")
            nibbles = np.stack([(array >> (4 * place)) & 15 for place in range(8)], axis=-1)
            nibbles = nibbles.reshape(array.shape[0], -1).astype(np.float32) - 7
            values[base + ".weight"] = nibbles * np.repeat(arrays[base + ".q_scale"], 32, axis=1)
        elif not name.endswith(".q_scale"):
            values[name] = array
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    config = model.config
    if config.model_type == "gemma3_text":  # one is already added to its norms
        values = {
            name.removeprefix("language_model."): value - 1 if name.endswith("norm.weight") else value
            for name, value in values.items()
        }
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    state = {}
    for name, value in values.items():
        tensor = torch.from_numpy(np.array(value, dtype=np.float32))
        for fused in ("qkv_proj", "c_attn"):
            if fused in name:
                for part, piece in zip("qkv", tensor.split([queries, keys, keys]), strict=True):
                    state[name.replace(fused, f"{part}_proj")] = piece
        if "gate_up_proj" in name:
            for part, piece in zip(("gate", "up"), tensor.chunk(2), strict=True):
                state[name.replace("gate_up", part)] = piece
        elif "qkv_proj" not in name and "c_attn" not in name:
            state[name] = tensor
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model.eval()


def logits_of(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


@pytest.fixture(scope="module")
def gemma_dir(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(6)
    return gemma3(tiny_tokenizer, tmp_path_factory.mktemp("gemma") / "model")


def test_gemma3_has_the_names_and_the_order_of_mlc_llm(gemma_dir: Path, tmp_path: Path) -> None:
    """``mlc_llm`` gives its text model a prefix, keeps queries, keys and values apart, adds one to the norms,
    and reads a file's tensors by name: layer 10 before layer 2."""
    folder = tmp_path / "model"
    shutil.copytree(gemma_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    layers = 11
    config |= {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    first = {name: value for name, value in tensors.items() if ".layers.0." in name}
    for number in range(7, layers):
        tensors |= {
            name.replace("layers.0", f"layers.{number}"): value.clone() for name, value in first.items()
        }
    tensors = {name: value.to(torch.bfloat16) for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    out = export_mlc(folder, tmp_path / "out", "t", "q0f16", compile_cpu=False)
    cache = json.loads((out / "tensor-cache.json").read_text())
    records = [record for shard in cache["records"] for record in shard["records"]]
    layer = [
        "input_layernorm",
        "mlp.down_proj",
        "mlp.gate_up_proj",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "pre_feedforward_layernorm",
        *(f"self_attn.{part}" for part in ("k_norm", "k_proj", "o_proj", "q_norm", "q_proj", "v_proj")),
    ]
    numbers = sorted(range(layers), key=str)
    assert numbers[:3] == [0, 1, 10]
    assert [record["name"] for record in records] == [
        "language_model.model.embed_tokens.weight",
        *(f"language_model.model.layers.{number}.{part}.weight" for number in numbers for part in layer),
        "language_model.model.norm.weight",
    ]
    parameters, _ = tvmjs.load_tensor_cache(str(out), tvm.cpu())
    for name, parameter in parameters.items():
        source = name.removeprefix("language_model.")
        if "gate_up_proj" in name:
            parts = [tensors[source.replace("gate_up", part)] for part in ("gate", "up")]
            expected = torch.cat(parts)
        else:
            # In bfloat16, as numpy adds a whole number to it there.
            expected = tensors[source] + (1 if "norm" in name else 0)
        np.testing.assert_array_equal(parameter.numpy(), expected.to(torch.float16).numpy(), err_msg=name)


def test_gemma3_in_four_bits_is_its_dequantized_model(gemma_dir: Path, tmp_path: Path) -> None:
    """Over more tokens than its window, in one pass, in two, and one by one."""
    runtime = MlcRuntime(export_mlc(gemma_dir, tmp_path / "out", "t", "q4f32_1"))
    ids = runtime.tokenize(TEXT * 4)
    assert len(ids) > 64
    expected = logits_of(dequantized_model(tmp_path / "out", gemma_dir), ids)[:, : runtime.vocabulary_size]
    assert np.abs(runtime.forward(ids) - expected).max() < 1e-4
    runtime.reset()
    assert np.abs(runtime.prefill(ids[:40]) - expected[39]).max() < 1e-4
    assert np.abs(runtime.prefill(ids[40:60]) - expected[59]).max() < 1e-4
    for place in range(60, 70):
        assert np.abs(runtime.decode(ids[place]) - expected[place]).max() < 1e-4
    config = json.loads((tmp_path / "out" / "mlc-chat-config.json").read_text())
    assert config["prefill_chunk_size"] == runtime.metadata["prefill_chunk_size"] == 16  # the window
    assert config["sliding_window_size"] == -1  # of all layers; those with a window are the library's matter
    assert config["model_config"]["text_config"]["sliding_window_size"] == 16


@pytest.mark.parametrize("quantization", list(QUANTIZATIONS))
def test_library_computes_the_dequantized_model(
    quantization: str, exported: Callable[[str], Path], reference: TorchRuntime, tiny_model_dir: Path
) -> None:
    ids = reference.tokenize(TEXT)
    runtime = MlcRuntime(exported(quantization))
    assert runtime.tokenize(TEXT) == ids
    expected = logits_of(dequantized_model(exported(quantization), tiny_model_dir), ids)
    assert np.abs(runtime.forward(ids) - expected).max() < 1e-4


def test_prompt_longer_than_one_chunk(four_bit: MlcRuntime, four_bit_dir: Path, tiny_model_dir: Path) -> None:
    ids = (four_bit.tokenize(TEXT) * 20)[:500]
    assert len(ids) > CHUNK
    expected = logits_of(dequantized_model(four_bit_dir, tiny_model_dir), ids)
    four_bit.reset()
    assert np.abs(four_bit.forward(ids) - expected).max() < 1e-4
    four_bit.reset()
    assert np.abs(four_bit.prefill(ids) - expected[-1]).max() < 1e-4


def test_unquantized_file_is_the_model(exported: Callable[[str], Path], reference: TorchRuntime) -> None:
    """The file stores bfloat16, so against the float32 model only closeness can be asked."""
    ids = reference.tokenize(TEXT)
    found = torch.from_numpy(MlcRuntime(exported("q0f32")).forward(ids)).log_softmax(-1)
    reference.reset()
    expected = torch.from_numpy(reference.forward(ids)).log_softmax(-1)
    assert (expected.exp() * (expected - found)).sum(-1).mean() < 1e-3


def test_types_of_tensors(exported: Callable[[str], Path]) -> None:
    # Four matrices of each of four layers (queries, keys and values in one, gate and up in one) and the
    # embedding; two norms a layer and the last one.
    assert tensor_types(exported("q4f32_1")) == {"q4f32_1": 4 * 4 + 1, "bfloat16": 2 * 4 + 1}
    assert tensor_types(exported("q0f32")) == {"bfloat16": 4 * 6 + 2}


def test_qwen2_with_biases_and_padded_vocabulary(tiny_tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=len(tiny_tokenizer) + 48,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=2,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.bias.normal_(0, 0.5)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    runtime = MlcRuntime(export_mlc(tmp_path / "model", tmp_path / "q0f16", "tiny", "q0f16"))
    ids = runtime.tokenize(TEXT)
    logits = runtime.forward(ids)
    assert logits.shape == (len(ids), len(tiny_tokenizer))
    expected = logits_of(dequantized_model(tmp_path / "q0f16", tmp_path / "model"), ids)
    assert np.abs(logits - expected[:, : len(tiny_tokenizer)]).max() < 1e-4


def test_exponential() -> None:
    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((4096,), "float32"), y: T.Buffer((4096,), "float32")):
        T.func_attr({"global_symbol": "kernel"})
        for i in range(4096):
            y[i] = exponential(x[i])

    compiled = tvm.compile(kernel, target="llvm")
    values = np.concatenate([np.linspace(-87, 88, 4094), [0, -200]]).astype(np.float32)
    result = tvm.runtime.tensor(np.zeros_like(values))
    compiled(tvm.runtime.tensor(values), result)
    found, expected = result.numpy(), np.exp(values.astype(np.float64))
    assert np.abs(found[:-1] / expected[:-1] - 1).max() < 4e-7
    assert 0 < found[-1] < 2e-38


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize(("rows", "columns"), [(33, 32), (40, 96), (16, 128)])
def test_four_bit_kernels_multiply(tokens: int, rows: int, columns: int) -> None:
    """Odd and even numbers of groups, rows that fill no panel; a group of zeros and one of large numbers."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(tokens, columns)).astype(np.float32)
    x[0, :32] = 0
    x[-1, -32:] *= 1e4
    words = rng.integers(0, 2**32, size=(rows, columns // 8), dtype=np.uint32)
    scale = rng.uniform(0.01, 0.1, size=(rows, columns // 32)).astype(np.float32)
    kernel = (vector_kernel if tokens == 1 else blocked_kernel)(rows, columns, True, "float32")
    module = tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")})
    result = tvm.runtime.empty((tokens, rows), "float32")
    compiled = tvm.compile(module, target=tvm.target.Target(TARGETS["x86_64-cpu"]))
    compiled["main"](*[tvm.runtime.tensor(array) for array in (x, words, scale)], result)
    nibbles = np.stack([(words >> (4 * place)) & 15 for place in range(8)], axis=-1).reshape(rows, columns)
    weight = (nibbles.astype(np.float64) - 7) * np.repeat(scale, 32, axis=1)
    expected = x.astype(np.float64) @ weight.T
    # Ten roundings of float32, of the sum of magnitudes.
    assert (np.abs(result.numpy() - expected) <= 6e-7 * (np.abs(x) @ np.abs(weight).T)).all()


def test_incremental_decoding_equals_one_pass(four_bit: MlcRuntime) -> None:
    ids = four_bit.tokenize(TEXT)
    four_bit.reset()
    whole = four_bit.forward(ids)
    four_bit.reset()
    assert np.allclose(four_bit.prefill(ids[:7]), whole[6], atol=1e-4)
    for place in range(7, len(ids)):
        assert np.allclose(four_bit.decode(ids[place]), whole[place], atol=1e-4)
    with pytest.raises(ExportError, match="do not fit into a context of 512"):
        four_bit.forward([1] * 600)


@pytest.mark.parametrize("prompt", [True, False])
def test_chat_ids_are_the_models(four_bit: MlcRuntime, reference: TorchRuntime, prompt: bool) -> None:
    for messages in CONVERSATIONS:
        assert four_bit.chat_ids(messages, prompt) == reference.chat_ids(messages, prompt)
    assert four_bit.end_of_turn_ids == reference.end_of_turn_ids == (2,)


def test_rope_theta_is_the_true_one(four_bit: MlcRuntime) -> None:
    assert four_bit.config["model_config"]["position_embedding_base"] == 100000.0
    assert four_bit.metadata["architecture"]["rope_theta"] == 100000.0


@pytest.fixture
def damaged(four_bit_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(four_bit_dir, tmp_path / "copy"))


def test_library_and_config_must_agree(damaged: Path) -> None:
    config = json.loads((damaged / "mlc-chat-config.json").read_text())
    config["model_config"]["position_embedding_base"] = 10000.0
    (damaged / "mlc-chat-config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"position_embedding_base is 10000\.0, but the library"):
        MlcRuntime(damaged)


def test_weights_that_do_not_fit_the_library(damaged: Path) -> None:
    cache = json.loads((damaged / "tensor-cache.json").read_text())
    records = {record["name"]: record for shard in cache["records"] for record in shard["records"]}
    first, second = (records[f"model.layers.0.mlp.{name}.q_weight"] for name in ("gate_up_proj", "down_proj"))
    first["name"], second["name"] = second["name"], first["name"]
    (damaged / "tensor-cache.json").write_text(json.dumps(cache))
    with pytest.raises(ExportError, match="the weights do not fit the library"):
        MlcRuntime(damaged)


@pytest.mark.parametrize(
    "missing", ["mlc-chat-config.json", "tensor-cache.json", "params_shard_0.bin", "libs"]
)
def test_incomplete_folder_is_one_sentence(damaged: Path, missing: str) -> None:
    path = damaged / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ExportError, match=str(damaged)):
        MlcRuntime(damaged)


def test_threads_are_those_asked_for(four_bit: MlcRuntime, four_bit_dir: Path, tmp_path: Path) -> None:
    """Whatever the environment says of OpenMP. In a process of its own, since TVM's pool never grows."""
    ids = four_bit.tokenize(TEXT)
    program = (
        "import sys, numpy, tvm; from pathlib import Path; from export.mlc_runtime import MlcRuntime\n"
        "runtime = MlcRuntime(Path(sys.argv[1]), 2)\n"
        f"numpy.save(sys.argv[2], runtime.forward({ids}))\n"
        "print(tvm.get_global_func('runtime.NumThreads')())\n"
        "print(MlcRuntime(Path(sys.argv[1]), 3).backend.fallbacks())"
    )
    command = [sys.executable, "-c", program, str(four_bit_dir), str(tmp_path / "logits.npy")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *_, counted, fallbacks = done.stdout.splitlines()
    assert counted == "2"
    assert fallbacks == "['threads: 3 asked for, 2 in use']"
    assert four_bit.backend.fallbacks() == []
    assert four_bit.backend.effective["target"] == "llvm x86-64-v3"
    four_bit.reset()
    assert np.array_equal(np.load(tmp_path / "logits.npy"), four_bit.forward(ids))


def test_token_ids_outside_the_vocabulary(four_bit: MlcRuntime) -> None:
    for ids in ([], [-1], [2048]):
        with pytest.raises(ExportError, match="between 0 and 2047"):
            four_bit.forward(ids)


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_template_that_refuses_system_messages(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(
        tiny_tokenizer,
        "start{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "[{{ m['role'] }}]{{ m['content'] }}{{ ']]' if m['role'] == 'user' else '}}' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
    )
    template = conversation_template(tokenizer, [2])
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert render_conversation(template, messages, True) == "start[user]a]][assistant]b}}[assistant]"


def test_template_without_default_system_message_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """MLC's engine writes the system part always: an empty one would go where the model expects none."""
    tokenizer = with_template(tiny_tokenizer, (GOLDEN / "llama-tiny" / "chat_template.jinja").read_text())
    with pytest.raises(ExportError, match="give the chat template a default system message"):
        conversation_template(tokenizer, [2])


def test_empty_default_system_message_is_written() -> None:
    template = {"system_template": "<s>{system_message}</s>", "system_message": "", "roles": {}, "seps": [""]}
    assert render_conversation(template, [], False) == "<s></s>"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"decoder": {"type": "ByteLevel"}}, ("byte_level", False, False)),
        ({"decoder": None}, ("byte_fallback", False, False)),
        (  # Llama 2's
            {
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": [
                        {"type": "Prepend", "prepend": "▁"},
                        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                    ],
                },
                "decoder": {
                    "type": "Sequence",
                    "decoders": [
                        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                        {"type": "ByteFallback"},
                        {"type": "Fuse"},
                        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                    ],
                },
            },
            ("byte_fallback", True, True),
        ),
    ],
)
def test_tokenizer_info(changes: dict, expected: tuple[str, bool, bool], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(changes))
    assert tuple(tokenizer_info(tmp_path / "tokenizer.json").values()) == expected


def test_context_length(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = export_mlc(tiny_model_dir, tmp_path / "a", "t", "q0f32", context_length=64, compile_cpu=False)
    config = json.loads((folder / "mlc-chat-config.json").read_text())
    assert config["context_window_size"] == config["model_config"]["context_window_size"] == 64
    assert config["prefill_chunk_size"] == 64
    for length in (0, 513):
        with pytest.raises(ExportError, match=f"context_length {length} must lie between 1 and the 512"):
            export_mlc(tiny_model_dir, tmp_path / "b", "t", "q0f32", context_length=length)


def test_template_that_strips_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(
        tiny_tokenizer, "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}"
    )
    with pytest.raises(ExportError, match="cannot be said in MLC's conv_template"):
        conversation_template(tokenizer, [2])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' cannot be exported to MLC; supported are llama, qwen2"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope scaling 'yarn'"),
        ({"hidden_size": 100}, "hidden_size 100 is not divisible by 32"),
        ({"head_dim": 8, "num_attention_heads": 2}, "num_attention_heads times head_dim 16 is not divisible"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "sliding-window attention"),
    ],
)
def test_unsupported_model_is_one_sentence(
    changes: dict, sentence: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=sentence):
        export_mlc(folder, tmp_path / "out", "t", "q4f32_1")
    assert not (tmp_path / "out").exists()


def test_unknown_quantization(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no MLC quantization 'q9'"):
        export_mlc(tiny_model_dir, tmp_path / "out", "t", "q9")


def elf_symbols(data: bytes) -> tuple[int, int, set[str]]:
    """Machine, type and the names of defined global symbols of a 64-bit little-endian ELF file."""
    assert data[:6] == b"\x7fELF\x02\x01"
    kind, machine = struct.unpack_from("<HH", data, 16)
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, table + number * size) for number in range(count)]
    names = set()
    for section in sections:
        if section[1] != 2:  # SHT_SYMTAB
            continue
        strings = sections[section[6]][4]
        for place in range(section[4], section[4] + section[5], 24):
            name, info, _, defined = struct.unpack_from("<IBBH", data, place)
            if info >> 4 and defined:
                names.add(data[strings + name : data.index(b"\0", strings + name)].decode())
    return machine, kind, names


def test_objects_for_arm_hold_the_same_functions(tiny_model_dir: Path, tmp_path: Path) -> None:
    libraries = ["x86_64-cpu", "aarch64-cpu"]
    folder = export_mlc(tiny_model_dir, tmp_path / "out", "t", "q4f16_1", libraries=libraries)
    with tarfile.open(folder / "libs" / "t-q4f16_1-aarch64-cpu.tar") as archive:
        objects = [archive.extractfile(member).read() for member in archive if member.isfile()]  # type: ignore
    assert len(objects) == 2  # kernels, and the virtual machine's code
    symbols: set[str] = set()
    for data in objects:
        machine, kind, names = elf_symbols(data)
        assert (machine, kind) == (183, 1)  # EM_AARCH64, ET_REL
        symbols |= names
    # NEON in the kernels: a vectorized multiply-add of four floats (fmla v.4s) is there.
    words = np.frombuffer(max(objects, key=len)[: len(max(objects, key=len)) // 4 * 4], np.uint32)
    assert ((words & 0xFFA0FC00) == 0x4E20CC00).any()
    native = subprocess.run(
        ["nm", "-D", "--defined-only", folder / "libs" / "t-q4f16_1-x86_64-cpu.so"],
        capture_output=True,
        text=True,
        check=True,
    )
    kernels = {name for name in native.stdout.split() if name.startswith("__tvm_ffi_") and "multiply" in name}
    assert kernels
    assert kernels <= symbols
    assert any("library_bin" in name for name in symbols)


def test_the_same_model_gives_the_same_bytes(tiny_model_dir: Path, tmp_path: Path) -> None:
    """In another process, whose addresses and hashes are others, and at another time."""
    program = (
        "import sys; from pathlib import Path; from export.mlc import export_mlc;"
        "export_mlc(Path(sys.argv[1]), Path(sys.argv[2]), 't', 'q4f32_1', libraries=sys.argv[3:])"
    )
    libraries = ["x86_64-cpu", "aarch64-cpu"]
    export_mlc(tiny_model_dir, tmp_path / "here", "t", "q4f32_1", libraries=libraries)
    subprocess.run(
        [sys.executable, "-c", program, tiny_model_dir, tmp_path / "there", *libraries],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    here, there = (
        {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for folder in (tmp_path / "here", tmp_path / "there")
    )
    assert {"t-q4f32_1-x86_64-cpu.so", "t-q4f32_1-aarch64-cpu.tar"} <= set(here)
    assert here == there


def test_a_library_that_does_not_exist(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no MLC library 'riscv'; choose from x86_64-cpu, aarch64-cpu"):
        export_mlc(tiny_model_dir, tmp_path / "out", "t", "q4f32_1", libraries=["riscv"])


def test_a_library_for_browsers_that_cannot_be_made(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No Emscripten, half precision, an Emscripten that fails: a sentence each, and nothing is left."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExportError, match=r"needs Emscripten's emcc .* apt-get install emscripten"):
        export_mlc(tiny_model_dir, tmp_path / "out", "t", "q4f32_1", libraries=["wasm32-webgpu"])
    with pytest.raises(ExportError, match=r"no wasm32-webgpu library of q4f16_1: .* take q4f32_1 or q0f32"):
        export_mlc(tiny_model_dir, tmp_path / "out", "t", "q4f16_1", libraries=["wasm32-webgpu"])
    (tmp_path / "emcc").write_text("#!/bin/sh\necho working\necho wasm-ld: no room >&2\nexit 1\n")
    (tmp_path / "emcc").chmod(0o755)
    with pytest.raises(ExportError, match=r"emcc: cannot make .* \(wasm-ld: no room\)"):
        export_mlc(tiny_model_dir, tmp_path / "out", "t", "q4f32_1", libraries=["wasm32-webgpu"])
    assert [path.name for path in tmp_path.iterdir()] == ["emcc"]


@pytest.mark.parametrize("damage", ["", "bit", "missing", "fails"])
def test_an_mlc_llm_on_the_path_must_make_the_same_weights(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """A stand-in that answers like ``mlc_llm convert_weight``, with what was made before it was there."""
    made = export_mlc(tiny_model_dir, tmp_path / "made", "t", "q4f16_1", compile_cpu=False)
    cache = json.loads((made / "tensor-cache.json").read_text())
    if damage == "bit":
        path = made / cache["records"][-1]["dataPath"]
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    if damage == "missing":
        cache["records"][0]["records"].pop(0)
        (made / "tensor-cache.json").write_text(json.dumps(cache))
    stand_in = tmp_path / "bin" / "mlc_llm"
    stand_in.parent.mkdir()
    stand_in.write_text(
        f"#!/bin/sh\n[ '{damage}' = fails ] && echo 'no such model type' >&2 && exit 3\n"
        f'[ "$1 $3 $4 $5" = \'convert_weight --quantization q4f16_1 -o\' ] && cp -r {made} "$6"\n'
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(stand_in.parent), prepend=os.pathsep)
    lines: list[str] = []

    def export() -> Path:
        return export_mlc(
            tiny_model_dir, tmp_path / "out", "t", "q4f16_1", compile_cpu=False, progress=lines.append
        )

    if not damage:
        assert (export() / "tensor-cache.json").read_bytes() == (made / "tensor-cache.json").read_bytes()
        assert any("comparing with" in line for line in lines)
        return
    sentence = {
        "bit": r"the tensor \S+ in q4f16_1 is .* here and .* by .*mlc_llm",
        "missing": r"the tensor model.embed_tokens.q_weight in q4f16_1 is .* and missing by",
        "fails": r"mlc_llm convert_weight fails \(no such model type\)",
    }[damage]
    with pytest.raises(ExportError, match=sentence):
        export()
    assert not (tmp_path / "out").exists()
