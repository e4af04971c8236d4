"""Gates bite: each way to break an exported file is caught by the gate that its row names."""

import json
import pydoc_data.topics
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
import torch
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata
from transformers import Qwen2Config, Qwen2ForCausalLM

from export.errors import ExportError
from export.gguf import export_gguf
from export.gptq import round_linear_layers
from export.mlc import export_mlc
from export.onnx import export_onnx
from export.runtime import open_runtime
from pipeline.recipe import Thresholds
from pipeline.validate import missed_gates
from pipeline.validate_worker import judge, read_reference, reference_answers

# Those of the recipes for f16 and fp32, files that are the model up to rounding.
THRESHOLDS = Thresholds(mean_kl=0.001, same_top=0.98, perplexity_ratio=1.01)
# The undamaged file in four bits keeps these. Random weights know no top token that four bits would leave.
INT4_THRESHOLDS = Thresholds(mean_kl=0.1, perplexity_ratio=1.3)
TEXT = (
    "The import statement binds a name to a module. If it cannot be found, an exception is raised, and the "
    "statement ends; 1234 modules are searched for in the order of the path, which a program may change."
)

Mutation = Callable[[Path], None]


GENERATION = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with generation defaults of its own."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(tiny_model_dir, folder)
    json_file("generation_config.json", lambda content: content.update(GENERATION))(folder)
    return folder


@pytest.fixture(scope="module")
def reference(model_dir: Path, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("reference")
    # Random ids as well: on them the tiny random model's predictions lean on every part of it.
    random_ids = np.random.default_rng(0).integers(3, len(tiny_tokenizer), 96).tolist()
    reference_answers(model_dir, [tiny_tokenizer(TEXT)["input_ids"], random_ids], 1, folder)
    return read_reference(folder)


@pytest.fixture(scope="module")
def good(model_dir: Path, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An undamaged export of each format."""
    folder = tmp_path_factory.mktemp("good")
    gguf_file = export_gguf(model_dir, folder / "gguf", "tiny", ["f16"], pre_tokenizer="smollm")[0]
    onnx_file = export_onnx(model_dir, folder / "onnx-folder", "tiny", ["fp32"], threads=1)[0]
    mlc_folder = export_mlc(model_dir, folder / "mlc" / "tiny", "tiny", "q0f32")
    text = tiny_tokenizer("\n\n".join(pydoc_data.topics.topics.values())[:16_000])["input_ids"][:2048]
    rounded = round_linear_layers(model_dir, np.array(text).reshape(8, 256), threads=1)
    int4_file = export_onnx(model_dir, folder / "int4", "tiny", ["int4"], rounded=rounded, threads=1)[0]
    return {"gguf": gguf_file, "onnx": onnx_file, "int4": int4_file, "mlc": mlc_folder}


def copy_of(path: Path, folder: Path) -> Path:
    """A copy of an export that a mutation may break; returns what ``open_runtime`` opens."""
    if path.suffix == ".gguf":
        return Path(shutil.copy(path, folder / path.name))
    exported = path.parent.parent if path.suffix == ".onnx" else path
    shutil.copytree(exported, folder / "export")
    return folder / "export" / path.relative_to(exported)


def gates_missed(path: Path, reference: Any) -> list[str]:
    """Names of the gates that a file misses; ``runs`` when its runtime refuses it."""
    try:
        runtime = open_runtime(path, 1, 128)
        measured = judge(runtime, *reference)
        runtime.close()
    except ExportError:
        return ["runs"]
    thresholds = INT4_THRESHOLDS if path.name == "model_q4.onnx" else THRESHOLDS
    failures = missed_gates(path.name, measured, thresholds)
    assert all(failure.startswith(f"{path.name}: gate ") for failure in failures)
    return [failure.split(": gate ", 1)[1].split(":", 1)[0] for failure in failures]


# GGUF


def gguf_metadata(key: str, change: Callable[[Any], Any], kind: gguf.GGUFValueType | None = None) -> Mutation:
    """Changes (or with ``kind`` adds) one metadata value."""

    def mutate(path: Path) -> None:
        reader = gguf.GGUFReader(path)
        field = reader.get_field(key)
        if field is None:
            assert kind is not None, f"{key} is not in the file"
            details = MetadataDetails(kind, change(None))
        else:
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            details = MetadataDetails(field.types[0], change(field.contents()), sub_type=sub_type)
        architecture = reader.get_field("general.architecture").contents()
        writer = gguf.GGUFWriter(path.with_suffix(".new"), arch=architecture, endianess=reader.endianess)
        copy_with_new_metadata(reader, writer, {key: details}, [])  # writes the file
        path.with_suffix(".new").replace(path)

    return mutate


def gguf_tensors(change: Callable[[dict[str, np.ndarray]], None]) -> Mutation:
    """Changes tensors in place."""

    def mutate(path: Path) -> None:
        reader = gguf.GGUFReader(path, "r+")
        change({tensor.name: tensor.data for tensor in reader.tensors})
        reader.data.flush()

    return mutate


def swap(first: str, second: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        kept = tensors[first].copy()
        tensors[first][:] = tensors[second]
        tensors[second][:] = kept

    return change


def transform(name: str, function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name][:] = function(tensors[name].copy())

    return change


def swap_heads(matrix: np.ndarray) -> np.ndarray:
    """Exchanges the first two heads of 32 rows."""
    return np.concatenate([matrix[32:64], matrix[:32], matrix[64:]])


def flip_bit(array: np.ndarray) -> np.ndarray:
    """The highest bit of the first number's exponent, turned over."""
    words = array.reshape(-1).view({2: np.uint16, 4: np.uint32}[array.itemsize])
    words[0] ^= 1 << (8 * array.itemsize - 2)
    return array


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size * 3 // 4)


def swap_tokens(tokens: list[str]) -> list[str]:
    tokens[300], tokens[301] = tokens[301], tokens[300]
    return tokens


GGUF: dict[str, tuple[Mutation, str]] = {
    "rope theta 10000": (gguf_metadata("llama.rope.freq_base", lambda theta: 10000.0), "mean_kl"),
    "rope half the dimensions": (
        gguf_metadata("llama.rope.dimension_count", lambda count: count // 2),
        "runs",
    ),
    "norm epsilon": (gguf_metadata("llama.attention.layer_norm_rms_epsilon", lambda e: 0.1), "mean_kl"),
    "context length": (gguf_metadata("llama.context_length", lambda length: 2 * length), "context_length"),
    "one layer fewer": (gguf_metadata("llama.block_count", lambda count: count - 1), "runs"),
    "temperature": (gguf_metadata("general.sampling.temp", lambda temperature: 0.8), "generation"),
    "repetition penalty": (gguf_metadata("general.sampling.penalty_repeat", lambda p: 1.0), "generation"),
    "eos is the start of a turn": (gguf_metadata("tokenizer.ggml.eos_token_id", lambda eos: 1), "eos"),
    "eos off by one": (gguf_metadata("tokenizer.ggml.eos_token_id", lambda eos: eos + 1), "end_of_turn"),
    "eos is a full stop": (gguf_metadata("tokenizer.ggml.eos_token_id", lambda eos: 17), "end_of_turn"),
    "doubled BOS": (
        gguf_metadata("tokenizer.chat_template", lambda template: "{{ bos_token }}" + template),
        "bos",
    ),
    "BOS before plain text": (
        gguf_metadata("tokenizer.ggml.add_bos_token", lambda add: True, gguf.GGUFValueType.BOOL),
        "completion",
    ),
    "EOS after plain text": (
        gguf_metadata("tokenizer.ggml.add_eos_token", lambda add: True, gguf.GGUFValueType.BOOL),
        "completion",
    ),
    "template without its last line break": (
        gguf_metadata("tokenizer.chat_template", lambda t: t.replace("'<|im_end|>' + '\n'", "'<|im_end|>'")),
        "token_ids",
    ),
    "template adds a space": (
        gguf_metadata("tokenizer.chat_template", lambda t: t.replace("assistant\n", "assistant \n")),
        "token_ids",
    ),
    "template with another system message": (
        gguf_metadata("tokenizer.chat_template", lambda t: t.replace("You are a helpful", "You are an")),
        "token_ids",
    ),
    "another pre-tokenizer": (gguf_metadata("tokenizer.ggml.pre", lambda pre: "falcon"), "token_ids"),
    "two tokens swapped": (gguf_metadata("tokenizer.ggml.tokens", swap_tokens), "token_ids"),
    "merges in another order": (gguf_metadata("tokenizer.ggml.merges", lambda m: m[::-1]), "token_ids"),
    "swapped gate and up": (
        gguf_tensors(swap("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight")),
        "mean_kl",
    ),
    "swapped layers": (gguf_tensors(swap("blk.0.ffn_down.weight", "blk.1.ffn_down.weight")), "mean_kl"),
    "swapped key and value": (gguf_tensors(swap("blk.0.attn_k.weight", "blk.0.attn_v.weight")), "mean_kl"),
    "head order": (gguf_tensors(transform("blk.0.attn_q.weight", swap_heads)), "mean_kl"),
    "transposed matrix": (gguf_tensors(transform("blk.0.attn_output.weight", np.transpose)), "mean_kl"),
    "norm off by one": (gguf_tensors(transform("blk.0.attn_norm.weight", lambda w: w + 1)), "mean_kl"),
    "one bit": (gguf_tensors(transform("blk.0.attn_q.weight", flip_bit)), "mean_kl"),
    "zeroed matrix": (gguf_tensors(transform("blk.3.ffn_down.weight", np.zeros_like)), "mean_kl"),
    "not a number": (gguf_tensors(transform("output_norm.weight", lambda w: w * np.nan)), "mean_kl"),
    "truncated": (truncate, "runs"),
}


# ONNX


def json_file(name: str, change: Callable[[dict[str, Any]], Any]) -> Mutation:
    """Changes a configuration file of an export's folder."""

    def mutate(path: Path) -> None:
        folder = path.parent.parent if path.suffix == ".onnx" else path
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        change(content)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")

    return mutate


def onnx_weights(change: Callable[[dict[str, np.ndarray]], None]) -> Mutation:
    """Changes initializers."""

    def mutate(path: Path) -> None:
        model = onnx.load(path)
        arrays = {
            tensor.name: onnx.numpy_helper.to_array(tensor).copy() for tensor in model.graph.initializer
        }
        change(arrays)
        for tensor in model.graph.initializer:
            tensor.CopyFrom(onnx.numpy_helper.from_array(arrays[tensor.name], tensor.name))
        onnx.save_model(model, path)

    return mutate


def _both(first: Mutation, second: Mutation) -> Mutation:
    def mutate(path: Path) -> None:
        first(path)
        second(path)

    return mutate


def rope_table_of_theta(theta: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        positions, half = arrays["cos_cache"].shape
        angles = np.outer(np.arange(positions), theta ** (-np.arange(half) / half))
        arrays["cos_cache"][:], arrays["sin_cache"][:] = np.cos(angles), np.sin(angles)

    return change


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content.pop(key)


def set_to(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content.update({key: value})


def set_model(key: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], Any]:
    """Changes a value below ``model`` in ``genai_config.json``."""
    return lambda content: content["model"].update({key: change(content["model"][key])})


def edit_template(old: str, new: str) -> Callable[[dict[str, Any]], Any]:
    def change(content: dict[str, Any]) -> None:
        assert old in content["chat_template"]
        content["chat_template"] = content["chat_template"].replace(old, new)

    return change


def swap_tokenizer_tokens(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    names = {token_id: token for token, token_id in vocabulary.items()}
    vocabulary[names[300]], vocabulary[names[301]] = 301, 300


def begin_with_bos(content: dict[str, Any]) -> None:
    bos = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }


DIGITS_AND_BYTES = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
"""The tiny model's own pre-tokenizer, equal to the exported one for every reader but one."""
LAYER = "model.layers.0."
ONNX: dict[str, tuple[Mutation, str]] = {
    "rope theta 10000": (onnx_weights(rope_table_of_theta(10000.0)), "mean_kl"),
    "swapped sine and cosine": (onnx_weights(swap("cos_cache", "sin_cache")), "mean_kl"),
    "swapped gate and up": (
        onnx_weights(swap(f"{LAYER}mlp.gate_proj.MatMul.weight", f"{LAYER}mlp.up_proj.MatMul.weight")),
        "mean_kl",
    ),
    "swapped layers": (
        onnx_weights(
            swap(f"{LAYER}attn.qkv_proj.MatMul.weight", "model.layers.1.attn.qkv_proj.MatMul.weight")
        ),
        "mean_kl",
    ),
    "swapped norms": (
        onnx_weights(transform(f"{LAYER}input_layernorm.weight", lambda w: w + 1)),
        "mean_kl",
    ),
    "transposed matrix": (
        onnx_weights(transform(f"{LAYER}attn.o_proj.MatMul.weight", np.transpose)),
        "mean_kl",
    ),
    "perturbed matrix": (
        onnx_weights(transform(f"{LAYER}mlp.down_proj.MatMul.weight", lambda w: 1.25 * w)),
        "mean_kl",
    ),
    "one bit": (onnx_weights(transform(f"{LAYER}mlp.down_proj.MatMul.weight", flip_bit)), "mean_kl"),
    "vocabulary shifted by one": (
        onnx_weights(transform("lm_head.MatMul.weight", lambda w: np.roll(w, 1, axis=1))),
        "same_top",
    ),
    "eos of GenAI off by one": (
        json_file("genai_config.json", set_model("eos_token_id", lambda eos: eos + 1)),
        "end_of_turn",
    ),
    "eos of transformers.js off by one": (
        json_file("generation_config.json", set_to("eos_token_id", 1)),
        "end_of_turn",
    ),
    "generation also ends at a full stop": (
        _both(
            json_file("generation_config.json", set_to("eos_token_id", [2, 17])),
            json_file("genai_config.json", set_model("eos_token_id", lambda eos: [2, 17])),
        ),
        "end_of_turn",
    ),
    "eos of the tokenizer": (json_file("tokenizer_config.json", set_to("eos_token", "<|im_start|>")), "eos"),
    "context length": (
        json_file("genai_config.json", set_model("context_length", lambda length: length // 2)),
        "context_length",
    ),
    "temperature of GenAI": (
        json_file("genai_config.json", lambda c: set_to("temperature", 1.0)(c["search"])),
        "generation",
    ),
    "temperature of transformers.js": (
        json_file("generation_config.json", without("temperature")),
        "generation",
    ),
    "longest answer of GenAI": (
        json_file("genai_config.json", lambda c: set_to("max_length", 20)(c["search"])),
        "generation",
    ),
    "context length of transformers.js": (
        json_file("config.json", set_to("max_position_embeddings", 4096)),
        "generation",
    ),
    "template without its last line break": (
        json_file("tokenizer_config.json", edit_template("'<|im_end|>' + '\n'", "'<|im_end|>'")),
        "token_ids",
    ),
    "template with a doubled BOS": (
        json_file(
            "tokenizer_config.json", lambda c: set_to("chat_template", "<|im_start|>" + c["chat_template"])(c)
        ),
        "bos",
    ),
    "no template": (json_file("tokenizer_config.json", without("chat_template")), "runs"),
    "two tokens swapped": (json_file("tokenizer.json", swap_tokenizer_tokens), "token_ids"),
    "BOS before plain text": (json_file("tokenizer.json", begin_with_bos), "completion"),
    "lower-cased text": (
        json_file("tokenizer.json", set_to("normalizer", {"type": "Lowercase"})),
        "token_ids",
    ),
    "digits split as GenAI misreads them": (
        json_file("tokenizer.json", set_to("pre_tokenizer", DIGITS_AND_BYTES)),
        "token_ids",
    ),
    "truncated": (truncate, "runs"),
}


# MLC


def mlc_records(change: Callable[[dict[str, dict[str, Any]]], None]) -> Mutation:
    """Changes where the cache's index says that tensors lie: {name: record}."""

    def mutate_index(content: dict[str, Any]) -> None:
        change({record["name"]: record for shard in content["records"] for record in shard["records"]})

    return json_file("tensor-cache.json", mutate_index)


def exchange_names(first: str, second: str) -> Callable[[dict[str, dict[str, Any]]], None]:
    """What is stored under one name is read under the other; both have the same shape."""

    def change(records: dict[str, dict[str, Any]]) -> None:
        assert records[first]["shape"] == records[second]["shape"]
        records[first]["name"], records[second]["name"] = second, first

    return change


def mlc_bytes(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Mutation:
    """Changes the stored bytes of a tensor in its shard."""

    def mutate(path: Path) -> None:
        index = json.loads((path / "tensor-cache.json").read_text())
        (shard, record) = next(
            (shard, record)
            for shard in index["records"]
            for record in shard["records"]
            if record["name"] == name
        )
        data = np.memmap(path / shard["dataPath"], dtype=np.uint8, mode="r+")
        part = slice(record["byteOffset"], record["byteOffset"] + record["nbytes"])
        data[part] = change(data[part].copy())
        data.flush()

    return mutate


def truncate_shard(path: Path) -> None:
    truncate(path / "params_shard_0.bin")


def set_template(key: str, value: Any) -> Mutation:
    """Changes a value of ``conv_template``."""

    def change(content: dict[str, Any]) -> None:
        assert content["conv_template"][key] != value
        content["conv_template"][key] = value

    return json_file("mlc-chat-config.json", change)


def scaled(data: np.ndarray) -> np.ndarray:
    """Twice the value of each bfloat16: one step in the exponent, bits 7 to 14."""
    words = data.view(np.uint16)
    return (words + 0x80).view(np.uint8)


MLC_LAYER = "model.layers.0."
MLC: dict[str, tuple[Mutation, str]] = {
    "swapped layers": (
        mlc_records(
            exchange_names(f"{MLC_LAYER}mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight")
        ),
        "mean_kl",
    ),
    "swapped attention of layers": (
        mlc_records(
            exchange_names(
                f"{MLC_LAYER}self_attn.qkv_proj.weight", "model.layers.3.self_attn.qkv_proj.weight"
            )
        ),
        "mean_kl",
    ),
    "swapped gate and up": (
        mlc_bytes(
            f"{MLC_LAYER}mlp.gate_up_proj.weight", lambda data: np.concatenate(np.split(data, 2)[::-1])
        ),
        "mean_kl",
    ),
    "doubled weights": (mlc_bytes(f"{MLC_LAYER}self_attn.o_proj.weight", scaled), "mean_kl"),
    "one bit": (
        mlc_bytes(
            f"{MLC_LAYER}self_attn.o_proj.weight", lambda data: flip_bit(data.view(np.uint16)).view(np.uint8)
        ),
        "mean_kl",
    ),
    "doubled norm": (mlc_bytes("model.norm.weight", scaled), "mean_kl"),
    "zeroed tensor": (mlc_bytes("model.layers.3.mlp.down_proj.weight", np.zeros_like), "mean_kl"),
    "truncated shard": (truncate_shard, "runs"),
    "rope theta of the configuration alone": (
        json_file(
            "mlc-chat-config.json", lambda c: set_to("position_embedding_base", 10000)(c["model_config"])
        ),
        "runs",
    ),
    "no stop token": (set_template("stop_token_ids", []), "end_of_turn"),
    "stop token off by one": (set_template("stop_token_ids", [3]), "end_of_turn"),
    "also stops at a full stop": (set_template("stop_token_ids", [2, 17]), "end_of_turn"),
    "eos is the start of a turn": (json_file("mlc-chat-config.json", set_to("eos_token_id", 1)), "eos"),
    "context length": (
        json_file("mlc-chat-config.json", set_to("context_window_size", 256)),
        "context_length",
    ),
    "top_p": (json_file("mlc-chat-config.json", set_to("top_p", 0.95)), "generation"),
    "eos that does not stop": (
        json_file("mlc-chat-config.json", set_to("eos_token_id", [2, 0])),
        "generation",
    ),
    "context length of the model's part": (
        json_file("mlc-chat-config.json", lambda c: set_to("context_window_size", 64)(c["model_config"])),
        "generation",
    ),
    "fewer tokens": (json_file("mlc-chat-config.json", set_to("active_vocab_size", 2047)), "vocabulary_size"),
    "template without line breaks": (set_template("seps", ["<|im_end|>"]), "token_ids"),
    "template with stock system message": (
        set_template("system_message", "A conversation between a user and an LLM-based AI assistant."),
        "token_ids",
    ),
    "template with a doubled BOS": (
        set_template("system_template", "<|im_start|><|im_start|>system\n{system_message}<|im_end|>\n"),
        "bos",
    ),
    "two tokens swapped": (json_file("tokenizer.json", swap_tokenizer_tokens), "token_ids"),
}


def as_bfloat16(scales: np.ndarray) -> np.ndarray:
    """What the bytes of float16 numbers are in the other format of two bytes."""
    return (scales.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


CODES, ZERO_POINTS = f"{LAYER}mlp.down_proj.MatMul.weight_Q4G32", f"{LAYER}mlp.down_proj.MatMul.weight_zp"
SCALES = f"{LAYER}mlp.down_proj.MatMul.weight_scale_f16"
INT4: dict[str, tuple[Mutation, str]] = {
    "two codes of a byte swapped": (onnx_weights(transform(CODES, lambda w: w << 4 | w >> 4)), "mean_kl"),
    "codes read as signed": (onnx_weights(transform(CODES, lambda w: w ^ 0x88)), "mean_kl"),
    "zero points swapped": (onnx_weights(transform(ZERO_POINTS, lambda w: w << 4 | w >> 4)), "mean_kl"),
    "zero points of a file without any": (
        onnx_weights(transform(ZERO_POINTS, lambda w: np.full_like(w, 0x88))),
        "mean_kl",
    ),
    "scales read as bfloat16": (onnx_weights(transform(SCALES, as_bfloat16)), "mean_kl"),
}


def _cases(table: dict[str, tuple[Mutation, str]], format: str) -> list[Any]:
    return [
        pytest.param(format, mutate, gate, id=f"{format}: {what}") for what, (mutate, gate) in table.items()
    ]


@pytest.mark.parametrize("format", ["gguf", "onnx", "int4", "mlc"])
def test_the_undamaged_file_passes(good: dict[str, Path], reference: Any, format: str) -> None:
    assert gates_missed(good[format], reference) == []


@pytest.mark.parametrize(
    ("format", "mutate", "gate"),
    [*_cases(GGUF, "gguf"), *_cases(ONNX, "onnx"), *_cases(INT4, "int4"), *_cases(MLC, "mlc")],
)
def test_broken_file_misses_its_gate(
    good: dict[str, Path], reference: Any, tmp_path: Path, format: str, mutate: Mutation, gate: str
) -> None:
    path = copy_of(good[format], tmp_path)
    mutate(path)
    assert gate in gates_missed(path, reference)


# A model with biases and with rows that no token has


PADDING = 48
NOT_ASKED = {"token_ids", "end_of_turn"}
"""transformers takes any tokenizer of a Qwen2 for Qwen2's own, which this one is not."""
BIASED: dict[str, tuple[str, Mutation, str]] = {
    "gguf: dropped bias": (
        "gguf",
        gguf_tensors(transform("blk.0.attn_q.bias", np.zeros_like)),
        "mean_kl",
    ),
    "gguf: a row of padding fewer than tokens": (
        "gguf",
        gguf_metadata("tokenizer.ggml.tokens", lambda tokens: tokens[:-1]),
        "runs",
    ),
    "onnx: dropped bias": (
        "onnx",
        onnx_weights(transform(f"{LAYER}attn.qkv_proj.Add.bias", np.zeros_like)),
        "mean_kl",
    ),
    "mlc: dropped bias": ("mlc", mlc_bytes(f"{MLC_LAYER}self_attn.c_attn.bias", np.zeros_like), "mean_kl"),
    "mlc: padding read as tokens": (
        "mlc",
        json_file("mlc-chat-config.json", lambda c: set_to("active_vocab_size", c["vocab_size"])(c)),
        "vocabulary_size",
    ),
    "mlc: swapped queries and keys of a fused matrix": (
        "mlc",
        mlc_bytes(
            f"{MLC_LAYER}self_attn.c_attn.weight", lambda data: np.roll(data, data.size * 2 // 3).copy()
        ),
        "mean_kl",
    ),
}


@pytest.fixture(scope="module")
def biased(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Any]:
    """Exports of a Qwen2, and what the model itself says."""
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=len(tiny_tokenizer) + PADDING,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=False,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.5)
    folder = tmp_path_factory.mktemp("biased")
    model.save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    random_ids = np.random.default_rng(0).integers(3, len(tiny_tokenizer), 96).tolist()
    (folder / "reference").mkdir()
    reference_answers(
        folder / "model", [tiny_tokenizer(TEXT)["input_ids"], random_ids], 1, folder / "reference"
    )
    files = {
        "gguf": export_gguf(folder / "model", folder / "gguf", "t", ["f16"], pre_tokenizer="smollm")[0],
        "onnx": export_onnx(folder / "model", folder / "onnx-folder", "t", ["fp32"], threads=1)[0],
        "mlc": export_mlc(folder / "model", folder / "mlc" / "t", "t", "q0f32"),
    }
    return files, read_reference(folder / "reference")


@pytest.mark.parametrize("format", ["gguf", "onnx", "mlc"])
def test_the_undamaged_file_with_biases_passes(biased: Any, format: str) -> None:
    files, reference = biased
    assert set(gates_missed(files[format], reference)) <= NOT_ASKED


@pytest.mark.parametrize(("format", "mutate", "gate"), BIASED.values(), ids=list(BIASED))
def test_broken_file_with_biases_misses_its_gate(
    biased: Any, tmp_path: Path, format: str, mutate: Mutation, gate: str
) -> None:
    files, reference = biased
    path = copy_of(files[format], tmp_path)
    mutate(path)
    assert gate in gates_missed(path, reference)


def test_mlc_scales_of_another_type_miss_their_gate(model_dir: Path, reference: Any, tmp_path: Path) -> None:
    """Sixteen bits are sixteen bits, whatever they mean."""
    path = export_mlc(model_dir, tmp_path / "export", "tiny", "q4f16_1")
    assert "runs" not in gates_missed(path, reference)

    def change(records: dict[str, dict[str, Any]]) -> None:
        for name, record in records.items():
            if name.endswith("q_scale"):
                assert record["dtype"] == "float16"
                record["dtype"] = "bfloat16"

    mlc_records(change)(path)
    assert gates_missed(path, reference) == ["runs"]


def test_mlc_compiled_for_another_rope_theta_misses_its_gate(
    model_dir: Path, reference: Any, tmp_path: Path
) -> None:
    """Library and configuration agree with each other, but not with the model."""
    other = tmp_path / "model"
    shutil.copytree(model_dir, other)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    json_file("config.json", set_to("rope_parameters", rope))(other)
    path = export_mlc(other, tmp_path / "export", "tiny", "q0f32")
    assert "mean_kl" in gates_missed(path, reference)
