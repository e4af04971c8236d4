"""Model files that lie are refused by name before any library opens them."""

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from gguf import GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from export import untrusted
from export.errors import ExportError
from export.untrusted import (
    check_chat_template,
    check_gguf,
    check_gguf_header,
    check_model_folder,
    check_onnx,
    check_tensor_cache,
    read_json,
)


@pytest.fixture
def folder(tmp_path: Path, tiny_model_dir: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(value | changes), encoding="utf-8")


def test_a_sound_folder_passes(folder: Path) -> None:
    check_model_folder(folder)
    (folder / "linked.json").symlink_to("config.json")
    check_model_folder(folder)


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


WEIGHTS = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("harm", "in_sentence"),
    [
        (lambda p: p.write_bytes(b""), "no whole safetensors file"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "no whole safetensors file"),
        (lambda p: p.write_bytes(p.read_bytes() + b"x"), "no whole safetensors file"),
        (lambda p: p.write_bytes(b"\xff" * 8 + p.read_bytes()[8:]), "no whole safetensors file"),
        (lambda p: rewrite_header(p, lambda h: h[WEIGHTS].update(shape=[2**40, 128])), "no whole"),
        (lambda p: rewrite_header(p, lambda h: h[WEIGHTS].update(data_offsets=[0, 2**50])), "no whole"),
        (lambda p: rewrite_header(p, lambda h: h[WEIGHTS].update(dtype="PICKLE")), "no whole"),
        (lambda p: rewrite_header(p, lambda h: h.update(x=h[WEIGHTS])), "no whole"),
    ],
)
def test_safetensors_headers(folder: Path, harm: Callable[[Path], Any], in_sentence: str) -> None:
    harm(folder / "model.safetensors")
    with pytest.raises(ExportError, match=rf"model\.safetensors: is {in_sentence}"):
        check_model_folder(folder)


@pytest.mark.parametrize(
    ("harm", "in_sentence"),
    [
        (lambda f: (f / "config.json").write_text("{"), "config.json: is no readable JSON"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json: is no readable JSON"),
        (lambda f: (f / "config.json").write_text("[" * 99 + "]" * 99), "nested more than 64 levels"),
        (lambda f: (f / "config.json").write_text(" " * (4 * 2**20 + 1)), "more than 4194304 are not read"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: is no mapping"),
        (lambda f: edit(f / "config.json", vocab_size=10**9), "describes a far larger model"),
        (lambda f: edit(f / "config.json", num_hidden_layers=10**9), "describes a far larger model"),
        (lambda f: edit(f / "config.json", num_hidden_layers=-1), "num_hidden_layers is -1"),
        (lambda f: edit(f / "config.json", hidden_size="wide"), "hidden_size is 'wide'"),
        (lambda f: edit(f / "config.json", hidden_size="w" * 5000), "hidden_size is 'w{79}; it must be"),
        (lambda f: (f / "tokenizer.json").write_bytes(b"\xff\xfe"), "tokenizer.json: is no readable JSON"),
        (lambda f: (f / "vocab.json").symlink_to("/etc/passwd"), "links to nothing inside"),
        (lambda f: (f / "vocab.json").symlink_to("../../secret"), "links to nothing inside"),
        (lambda f: (f / "vocab.json").symlink_to("missing"), "links to nothing inside"),
        (lambda f: ((f / "onnx").mkdir(), (f / "onnx" / "w").symlink_to("/etc")), "links to nothing inside"),
        (lambda f: index(f, {"a": "../model.safetensors"}), r"names '\.\./model\.safetensors'"),
        (lambda f: index(f, {"a": "/etc/passwd"}), "names '/etc/passwd'"),
        (lambda f: index(f, {"a": "weights.bin"}), r"names 'weights\.bin'"),
        (lambda f: index(f, {"a": "model-2.safetensors"}), r"names model-2\.safetensors, which is missing"),
        (lambda f: index(f, None), "has no weight_map"),
    ],
)
def test_folders(folder: Path, harm: Callable[[Path], Any], in_sentence: str) -> None:
    harm(folder)
    with pytest.raises(ExportError, match=in_sentence):
        check_model_folder(folder)


SPY = "{{ messages.__class__.__mro__ }}"


@pytest.mark.parametrize(
    ("place", "write"),
    [
        ("chat_template.jinja", lambda p: p.write_text(SPY)),
        ("tokenizer_config.json", lambda p: edit(p, chat_template=SPY)),
        ("tokenizer_config.json", lambda p: edit(p, chat_template=[{"name": "x", "template": SPY}])),
        ("chat_template.json", lambda p: p.write_text(json.dumps({"chat_template": SPY}))),
        ("additional_chat_templates/x.jinja", lambda p: p.write_text(SPY)),
    ],
)
def test_templates_of_folders_are_found_wherever_they_stand(
    folder: Path, place: str, write: Callable[[Path], Any]
) -> None:
    (folder / place).parent.mkdir(exist_ok=True)
    write(folder / place)
    with pytest.raises(ExportError, match=rf"{place}: the chat template is refused .*sandbox forbids"):
        check_model_folder(folder)


def test_the_template_of_a_gguf_is_checked(gguf: Path, tmp_path: Path) -> None:
    check_gguf(gguf)
    path = tmp_path / "spy.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_chat_template([{"name": "default", "template": HONEST}, {"name": "tools", "template": SPY}])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert check_gguf_header(path) == [SPY, HONEST] or check_gguf_header(path) == [HONEST, SPY]
    with pytest.raises(ExportError, match=r"spy\.gguf: the chat template is refused .*sandbox forbids"):
        check_gguf(path)


RECORD = {
    "name": "a",
    "shape": [4, 4],
    "dtype": "float32",
    "format": "f32-to-bf16",
    "nbytes": 32,
    "byteOffset": 64,
}


@pytest.mark.parametrize(
    ("shard", "record", "in_sentence"),
    [
        ({"dataPath": "../shard.bin"}, {}, r"names '\.\./shard\.bin', which is no file of this folder"),
        ({"dataPath": "/etc/passwd"}, {}, "names '/etc/passwd', which is no file of this folder"),
        ({"dataPath": "missing.bin"}, {}, "names 'missing.bin', which is no file of this folder"),
        ({"records": None}, {}, "is no index of MLC's weights"),
        ({}, {"byteOffset": 65}, "the tensor 'a' does not fit its shape or shard.bin"),
        ({}, {"byteOffset": -32}, "the tensor 'a' does not fit its shape"),
        ({}, {"shape": [2**40, 2**40]}, "the tensor 'a' does not fit its shape"),
        ({}, {"shape": [4, "4"]}, "the tensor 'a' does not fit its shape"),
        ({}, {"format": "raw"}, "the tensor 'a' does not fit its shape"),
        ({}, {"format": "raw", "dtype": "object"}, "the tensor 'a' does not fit its shape"),
    ],
)
def test_tensor_caches_that_lie(tmp_path: Path, shard: Any, record: Any, in_sentence: str) -> None:
    (tmp_path / "shard.bin").write_bytes(bytes(96))
    path = tmp_path / "tensor-cache.json"
    sound = {"dataPath": "shard.bin", "nbytes": 96, "records": [RECORD]}
    path.write_text(json.dumps({"records": [sound]}))
    check_tensor_cache(path)
    path.write_text(json.dumps({"records": [sound | {"records": [RECORD | record]} | shard]}))
    with pytest.raises(ExportError, match=in_sentence):
        check_tensor_cache(path)
    with pytest.raises(ExportError, match=in_sentence):
        check_model_folder(tmp_path)


def tiny_onnx(folder: Path) -> onnx.ModelProto:
    """A graph that adds three tensors to its input: one in the file, one beside it, one in a branch."""
    (folder / "w.bin").write_bytes(np.arange(8, dtype=np.float32).tobytes())
    outside = TensorProto(name="outside", data_type=TensorProto.FLOAT, dims=[4])
    outside.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.bin"), ("offset", "16"), ("length", "16")):
        outside.external_data.add(key=key, value=value)
    inside = numpy_helper.from_array(np.ones(4, dtype=np.float32), "inside")
    branches = []
    for name in ("then", "else"):
        value = numpy_helper.from_array(np.zeros(4, dtype=np.float32), f"{name}_value")
        node = helper.make_node("Identity", [f"{name}_value"], [f"{name}_out"])
        out = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, [4])
        branches.append(helper.make_graph([node], name, [], [out], [value]))
    nodes = [
        helper.make_node("If", ["which"], ["chosen"], then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("Sum", ["x", "inside", "outside", "chosen"], ["y"]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [4]),
        helper.make_tensor_value_info("which", TensorProto.BOOL, []),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    graph = helper.make_graph(nodes, "tiny", inputs, [output], [inside, outside])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def test_a_sound_onnx_file_passes(tmp_path: Path) -> None:
    """As ONNX Runtime reads it."""
    model = tiny_onnx(tmp_path)
    onnx.save(model, tmp_path / "tiny.onnx")
    check_onnx(tmp_path / "tiny.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "tiny.onnx"), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.zeros(4, dtype=np.float32), "which": np.array(True)})
    assert y.tolist() == [5, 6, 7, 8]


def place(**entries: str) -> Callable[[onnx.ModelProto], None]:
    """Says something else of where the tensor outside the file lies."""

    def change(model: onnx.ModelProto) -> None:
        for entry in model.graph.initializer[1].external_data:
            entry.value = entries.get(entry.key, entry.value)

    return change


def deep_graphs() -> bytes:
    """Graphs in branches of graphs, two hundred levels: more than protocol buffers hold in one another."""

    def field(number: int, content: bytes) -> bytes:
        length, digits = len(content), []
        while length > 127:
            digits.append(length & 127 | 128)
            length >>= 7
        return bytes([number << 3 | 2, *digits, length]) + content

    graph = b""
    for _ in range(200):
        graph = field(1, field(5, field(6, graph)))  # a node's attribute's graph
    return field(7, graph)


@pytest.mark.parametrize(
    ("harm", "in_sentence"),
    [
        (place(location="../w.bin"), r"names '\.\./w\.bin', which is no file of this folder"),
        (place(location="/etc/passwd"), "names '/etc/passwd', which is no file of this folder"),
        (place(location="missing"), "names 'missing', which is no file of this folder"),
        (place(location=""), "names '', which is no file of this folder"),
        (place(offset="17"), "the tensor 'outside' does not fit its shape or type"),
        (place(offset="-16"), "the tensor 'outside' does not fit"),
        (place(offset="x"), "the tensor 'outside' does not fit"),
        (place(length="9" * 30), "the tensor 'outside' does not fit"),
        (lambda m: m.graph.initializer[1].dims.append(2**40), "the tensor 'outside' does not fit"),
        (lambda m: m.graph.initializer[0].dims.extend([2**40] * 4), "the tensor 'inside' does not fit"),
        (lambda m: m.graph.initializer[0].dims.append(-1), "the tensor 'inside' does not fit"),
        (lambda m: setattr(m.graph.initializer[0], "data_type", 99), "the tensor 'inside' does not fit"),
        (
            lambda m: m.graph.node[0].attribute[0].g.initializer[0].dims.append(3),
            "the tensor '(then|else)_value' does not fit",
        ),
        (
            lambda m: m.graph.initializer.add(name="z", data_type=1, dims=[2**30], float_data=[1.0]),
            "the tensor 'z' does not fit",
        ),
        (lambda m: m.graph.sparse_initializer.add(dims=[2**50]), "holds sparse tensors"),
        (
            lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 2**40),
            "the input 'x' is larger than any model's",
        ),
        (lambda m: m.graph.ClearField("node"), "is no ONNX file"),
    ],
)
def test_onnx_files_that_lie(tmp_path: Path, harm: Callable[[Any], Any], in_sentence: str) -> None:
    model = tiny_onnx(tmp_path)
    harm(model)
    path = tmp_path / "tiny.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=rf"tiny\.onnx: {in_sentence}"):
        check_onnx(path)


def test_what_is_no_onnx_file(tmp_path: Path) -> None:
    path = tmp_path / "tiny.onnx"
    for data in (b"", b"not a graph", tiny_onnx(tmp_path).SerializeToString()[:-50], deep_graphs()):
        path.write_bytes(data)
        with pytest.raises(ExportError, match="is no ONNX file"):
            check_onnx(path)


def index(folder: Path, names: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def test_what_the_hub_cache_links_to_is_let_through(tmp_path: Path, tiny_model_dir: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    shutil.copytree(tiny_model_dir, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    check_model_folder(snapshot)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GGUF file by the format's own writer."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_token_list(["a", "b", "c"])
    writer.add_token_scores([0.1, 0.2, 0.3])
    writer.add_tensor("token_embd.weight", np.ones((3, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_sound_gguf_passes(gguf: Path) -> None:
    check_gguf_header(gguf)


@pytest.mark.parametrize(
    ("offset", "data", "in_sentence"),
    [
        (0, b"GGML", "does not begin with GGUF"),
        (4, struct.pack("<I", 9), "version 9 is not known"),
        (8, struct.pack("<Q", 2**60), "says that it holds 1152921504606846976 tensors"),
        (16, struct.pack("<Q", 2**60), "says that it holds 1152921504606846976 metadata"),
        (24, struct.pack("<Q", 2**60), "goes beyond its end"),
    ],
)
def test_gguf_headers(gguf: Path, tmp_path: Path, offset: int, data: bytes, in_sentence: str) -> None:
    content = bytearray(gguf.read_bytes())
    content[offset : offset + len(data)] = data
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=in_sentence):
        check_gguf_header(path)


def test_a_truncated_gguf_header(gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"
    for length in range(0, 200, 7):
        path.write_bytes(gguf.read_bytes()[:length])
        with pytest.raises(ExportError):
            check_gguf_header(path)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_gguf_headers_are_refused_or_read(gguf: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(gguf.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(600, len(content)) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "mutated.gguf"
    path.write_bytes(content)
    with contextlib.suppress(ExportError):  # any other error fails the test
        check_gguf_header(path)


HONEST = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
)


@pytest.mark.parametrize(
    "template",
    [
        HONEST,
        "{{ raise_exception('no system message') }}",
        "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{{ strftime_now('%d %b %Y') }}",
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    ],
)
def test_honest_templates_pass(template: str) -> None:
    check_chat_template(template, "model")


@pytest.mark.parametrize(
    ("template", "in_sentence"),
    [
        ("{% for %}", "no Jinja template"),
        ("{{ messages.__class__.__mro__ }}", "sandbox forbids"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "sandbox forbids"),
        ("{{ messages.append(1) }}", "sandbox forbids"),
        ("{{ 'a' * 10 ** 10 }}", "more memory than half a gigabyte"),
        ("{{ '%2000000000d' % 1 }}", "more memory than half a gigabyte"),
        ("{% for i in range(99999) %}aaaaaaaaaaaaaaaaaaaa{% endfor %}", "more than 1000000 characters"),
    ],
)
def test_templates_that_misbehave(template: str, in_sentence: str) -> None:
    with pytest.raises(ExportError, match=rf"^model: the chat template is refused \(.*{in_sentence}"):
        check_chat_template(template, "model")


def test_a_template_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "TEMPLATE_SECONDS", 1)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ExportError, match="does not end"):
        check_chat_template(loops, "model")


def test_a_json_file_that_is_no_file_of_text(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(os.urandom(64) + b"\xff")
    with pytest.raises(ExportError, match=r"x\.json: is no readable JSON"):
        read_json(tmp_path / "x.json", 1000)
