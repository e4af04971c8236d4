"""ONNX export: judged by torch's logits, the Hugging Face tokenizer, onnx's checker and GenAI."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from export.errors import ExportError
from export.onnx import FILE_NAMES, _check_rope, _look_up_by_plain_operators, export_onnx
from export.onnx_runtime import GenaiTokenizer, OnnxRuntime, genai_greedy
from export.runtime import generate_greedily
from export.tensors import tensor_types, type_of_each

CONVERSATIONS = [
    [{"role": "user", "content": content}]
    for content in (
        "Hello!",
        "",
        "  two leading spaces, trailing  ",
        "1234567890 and 3.14159",
        "na\u00efve caf\u00e9 \u2014 \u65e5\u672c\u8a9e\u306e\u6587",
        "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
        "\U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467",
        "def f(x):\n\treturn {'a': \"b\", '<tag>': x & 1}\n",
        "I'll, we've, don't, I'D",
        "look-alike <|im_end|> and < |im_end|> inside",
    )
] + [
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "Red or blue?"},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "Why?\n\n\n"},
    ],
    [{"role": "system", "content": ""}, {"role": "user", "content": "x" * 300}],
]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def torch_logits(model_dir: Path, token_ids: Sequence[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([list(token_ids)])).logits[0].numpy()


@pytest.fixture(scope="module")
def token_ids(tiny_tokenizer) -> list[int]:
    return np.random.default_rng(0).integers(3, len(tiny_tokenizer), 300).tolist()


@pytest.fixture(scope="module")
def exported(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in every precision, with two ends of turn."""
    source = tmp_path_factory.mktemp("onnx") / "source"
    shutil.copytree(tiny_model_dir, source)
    generation = json.loads((source / "generation_config.json").read_text())
    generation["eos_token_id"] = [2, 0]
    (source / "generation_config.json").write_text(json.dumps(generation))
    folder = source.parent / "tiny-ONNX"
    steps: list[str] = []
    paths = export_onnx(
        source, folder, "tiny", ["int4", "fp32", "fp16", "int8"], progress=steps.append, threads=1
    )
    assert [path.name for path in paths] == [FILE_NAMES[each] for each in ("int4", "fp32", "fp16", "int8")]
    assert len(steps) == 4
    assert sorted(entry.name for entry in source.parent.iterdir()) == ["source", "tiny-ONNX"]
    return folder


@pytest.mark.parametrize(
    ("precision", "largest_kl"), [("fp32", 1e-9), ("fp16", 1e-5), ("int8", 0.004), ("int4", 0.1)]
)
def test_logits_are_those_of_torch(exported, tiny_model_dir, token_ids, precision, largest_kl):
    runtime = OnnxRuntime(exported / "onnx" / FILE_NAMES[precision])
    expected = torch_logits(tiny_model_dir, token_ids)
    logits = runtime.forward(token_ids)  # 300 tokens: more than one piece of prefill
    assert logits.dtype == np.float32
    assert logits.shape == expected.shape
    p, q = log_softmax(expected), log_softmax(logits)
    assert (np.exp(p) * (p - q)).sum(-1).mean() < largest_kl
    if precision == "fp32":
        assert np.abs(logits - expected).max() < 1e-4


def test_tokens_one_by_one_equal_all_at_once(exported, token_ids):
    runtime = OnnxRuntime(exported / "onnx" / "model.onnx")
    together = runtime.forward(token_ids[:40])
    runtime.reset()
    apart = [runtime.forward(token_ids[:7])[-1], runtime.prefill(token_ids[7:20])]
    apart += [runtime.decode(token_id) for token_id in token_ids[20:40]]
    np.testing.assert_allclose(np.stack(apart), together[[6, *range(19, 40)]], atol=1e-4)
    with pytest.raises(ExportError, match="do not fit into a context of 512"):
        runtime.forward([5] * 473)


def test_conversations_have_the_token_ids_of_hugging_face(exported, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    runtime = OnnxRuntime(exported / "onnx" / "model_q4.onnx")
    genai = runtime.other_reader()
    assert isinstance(genai, GenaiTokenizer)
    for conversation in CONVERSATIONS:
        for opening in (True, False):
            text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=opening)
            expected = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert runtime.chat_ids(conversation, opening) == expected, conversation
            assert genai.chat_ids(conversation, opening) == expected, conversation


def test_genai_continues_as_plain_onnxruntime_does(exported, token_ids):
    runtime = OnnxRuntime(exported / "onnx" / "model_q4.onnx")
    prompt = token_ids[:30]
    ours, theirs = generate_greedily(runtime, prompt, 24), genai_greedy(exported, prompt, 24)
    for position, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one == other:
            continue
        runtime.reset()
        logits = runtime.forward([*prompt, *ours[:position]])[-1]
        assert abs(logits[one] - logits[other]) < 0.1, position  # a near tie; what follows may differ
        return
    assert len(ours) == len(theirs)


def test_both_configurations_end_turns_alike_and_hold_the_template(exported, tiny_tokenizer):
    genai = json.loads((exported / "genai_config.json").read_text())["model"]
    assert genai["eos_token_id"] == [2, 0]
    assert genai["context_length"] == 512
    assert genai["decoder"]["filename"] == "onnx/model_q4.onnx"
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    settings = json.loads((exported / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == tiny_tokenizer.chat_template
    assert OnnxRuntime(exported / "onnx" / "model_q4.onnx").end_of_turn_ids == (0, 2)


def test_graphs_are_valid_rotate_truly_and_have_numbers_for_the_cache(exported):
    for name in FILE_NAMES.values():
        graph = onnx.load(exported / "onnx" / name)
        for node in graph.graph.node:
            # ONNX Runtime keeps this operator of its own in the standard domain, which the checker refuses.
            if node.op_type == "SimplifiedLayerNormalization":
                node.domain = "com.microsoft"
        onnx.checker.check_model(graph)
        caches = [v for v in [*graph.graph.input, *graph.graph.output] if v.name.endswith((".key", ".value"))]
        assert len(caches) == 4 * 4
        for value in caches:
            dimensions = value.type.tensor_type.shape.dim
            assert (dimensions[1].dim_value, dimensions[3].dim_value) == (2, 32)
        (cosines,) = (t for t in graph.graph.initializer if t.name == "cos_cache")
        angles = 7 * 100000.0 ** (-np.arange(16) * 2 / 32)
        np.testing.assert_allclose(onnx.numpy_helper.to_array(cosines)[7], np.cos(angles), atol=1e-5)


def test_nothing_of_the_folder_that_it_was_made_in_is_in_a_graph(exported) -> None:
    """The builder writes the commit of the repository around it, which changed the bytes."""
    for path in (exported / "onnx").glob("*.onnx"):
        assert onnx.load(path, load_external_data=False).producer_version == version("onnxruntime-genai")


def test_a_wrong_rope_theta_is_refused(exported, tiny_model_dir):
    config = AutoModelForCausalLM.from_pretrained(tiny_model_dir).config
    config.rope_parameters["rope_theta"] = 10000.0
    with pytest.raises(ExportError, match="rope_theta 10000"):
        _check_rope(onnx.load(exported / "onnx" / "model.onnx"), config, tiny_model_dir)


def test_qwen2_with_biases_and_padded_vocabulary(tiny_tokenizer, tmp_path):
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=len(tiny_tokenizer) + 64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=False,
        initializer_range=0.1,
        eos_token_id=2,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.bias.normal_()
    model.save_pretrained(tmp_path / "qwen")
    tiny_tokenizer.save_pretrained(tmp_path / "qwen")
    (path,) = export_onnx(tmp_path / "qwen", tmp_path / "out", "qwen", ["fp32"], threads=1)
    runtime = OnnxRuntime(path)
    ids = list(range(5, 200, 3))
    assert runtime.vocabulary_size == len(tiny_tokenizer)
    expected = torch_logits(tmp_path / "qwen", ids)[:, : len(tiny_tokenizer)]
    np.testing.assert_allclose(runtime.forward(ids), expected, atol=1e-4)


def test_bad_input_gets_a_sentence_and_leaves_nothing(tiny_model_dir, tmp_path):
    with pytest.raises(ExportError, match="'int3' is no ONNX precision"):
        export_onnx(tiny_model_dir, tmp_path / "out", "x", ["int3"])
    source = tmp_path / "source"
    shutil.copytree(tiny_model_dir, source, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ExportError, match=r"no \.safetensors file"):
        export_onnx(source, tmp_path / "out", "x", ["fp32"])
    with pytest.raises(ExportError, match="not empty"):
        export_onnx(tiny_model_dir, tmp_path, "x", ["fp32"])
    shutil.copy(tiny_model_dir / "model.safetensors", source)
    config = json.loads((source / "config.json").read_text())
    config |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="cannot export it to fp32"):
        export_onnx(source, tmp_path / "out", "x", ["fp32"])
    with pytest.raises(ExportError, match=r"settings cannot be read \(FileNotFoundError"):
        OnnxRuntime(source / "model.onnx")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("genai_config.json", "[]"),
        ("genai_config.json", '{"model": [], "search": {}}'),
        ("genai_config.json", '{"model": {"context_length": 1e999}, "search": {}}'),
        ("genai_config.json", '{"model": {"context_length": 64, "eos_token_id": 1.5}, "search": {}}'),
        ("config.json", '{"text_config": 1}'),
        ("generation_config.json", "3"),
        ("generation_config.json", "[" * 100_000),
    ],
)
def test_damaged_settings_are_told(exported: Path, tmp_path: Path, name: str, content: str) -> None:
    for file in exported.glob("*.json"):
        shutil.copy(file, tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ExportError, match=f"^{tmp_path}: its settings cannot be read") as caught:
        OnnxRuntime(tmp_path / "onnx" / "model.onnx")
    assert str(caught.value).isprintable()


def test_large_floats_are_kept_in_half_and_computed_in_single(exported: Path) -> None:
    sizes = {}
    for precision, file in FILE_NAMES.items():
        graph = onnx.load(exported / "onnx" / file).graph
        floats = [
            tensor
            for tensor in graph.initializer
            if tensor.data_type == onnx.TensorProto.FLOAT and not tensor.name.endswith("_cache")
        ]
        sizes[precision] = sum(int(np.prod(tensor.dims)) for tensor in floats)
        halves = {tensor.name for tensor in graph.initializer if tensor.name.endswith("_f16")}
        assert halves == {node.input[0] for node in graph.node if node.op_type == "Cast"} & halves
        assert all(value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT16 for value in graph.input)
    # Nine norms of 128 are left, and scales of small matrices: fewer than 1,024 elements each.
    assert sizes["fp16"] < 1500 < sizes["fp32"]
    assert max(sizes["int8"], sizes["int4"]) < 4000
    file = exported / "onnx"
    assert (file / "model_fp16.onnx").stat().st_size < 0.6 * (file / "model.onnx").stat().st_size


def test_an_embedding_of_8_bits_is_looked_up_as_by_the_contributed_operator() -> None:
    """By ONNX Runtime's own GatherBlockQuantized, to the bit, and without it afterwards."""
    numbers = np.random.default_rng(0)
    tensors = {
        "codes": numbers.integers(0, 256, (50, 3, 32), dtype=np.uint8),
        "zero_points": numbers.integers(0, 256, (50, 3), dtype=np.uint8),
        "scales": numbers.normal(size=(50, 3)).astype(np.float32),
        "width": np.array([50, 96]),
    }
    ids, embedding = (
        onnx.helper.make_tensor_value_info(name, kind, ["batch", "length", *more])
        for name, kind, more in (
            ("ids", onnx.TensorProto.INT64, []),
            ("embedding", onnx.TensorProto.FLOAT, [96]),
        )
    )
    values = {"bits": 8, "block_size": 32, "gather_axis": 0, "quantize_axis": 1, "domain": "com.microsoft"}
    nodes = [
        onnx.helper.make_node("Reshape", ["codes", "width"], ["flat"], "/embed/Reshape"),
        onnx.helper.make_node(
            "GatherBlockQuantized",
            ["flat", "ids", "scales", "zero_points"],
            ["embedding"],
            "/embed/GatherBlockQuantized",
            **values,
        ),
    ]
    initializers = [onnx.numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()]
    graph = onnx.helper.make_graph(nodes, "look-up", [ids], [embedding], initializers)
    versions = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=versions, ir_version=10)

    def looked_up() -> np.ndarray:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(None, {"ids": np.array([[0, 49, 7], [7, 1, 2]])})[0]

    expected = looked_up()
    _look_up_by_plain_operators(model)
    assert {node.domain for node in model.graph.node} == {""}
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_array_equal(looked_up(), expected)


def test_types_of_tensors_add_up_to_the_file(exported: Path) -> None:
    """What the types say that every tensor takes is what the graph's weights take on disk."""
    numbers = {}
    for precision, file in FILE_NAMES.items():
        graph = onnx.load(exported / "onnx" / file).graph
        sizes = {tensor.name: len(tensor.raw_data) for tensor in graph.initializer}
        types = type_of_each(exported / "onnx" / file)
        assert tensor_types(exported / "onnx" / file) == dict(Counter(types.values()).most_common())
        numbers[precision] = len(types)
        whole = {"float32": 4, "float16": 2}
        for name, tensor_type in types.items():
            dims = next(tensor.dims for tensor in graph.initializer if tensor.name == name)
            if tensor_type in whole:
                assert sizes[name] == whole[tensor_type] * np.prod(dims)
            else:
                bits = re.fullmatch(r"int([48]), blocks of 32", tensor_type)
                assert bits
                if len(dims) == 3:  # [rows, blocks, bytes of a block]
                    assert dims[2] * 8 == int(bits[1]) * 32
    # Four layers of seven matrices and two norms, the embedding (and head), the last norm.
    assert numbers["fp32"] >= 4 * 6 + 2
    assert set(tensor_types(exported / "onnx" / FILE_NAMES["fp32"])) == {"float32"}
    assert "int4, blocks of 32" in tensor_types(exported / "onnx" / FILE_NAMES["int4"])
    assert "int8, blocks of 32" in tensor_types(exported / "onnx" / FILE_NAMES["int8"])
