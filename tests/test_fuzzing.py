"""Readers of what users bring or disks damage, fed with what no writer wrote: each refuses or reads, in
words, and never crashes or hangs.

Hypothesis draws each input from random bytes: a sound file with a few of its bytes or values replaced. How
many it gets through in MARTLET_FUZZ_SECONDS (20 for each reader by default) is printed; MARTLET_FUZZ_SEED
begins elsewhere.
"""

import contextlib
import copy
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from export.errors import ExportError
from export.untrusted import check_gguf_header, check_model_folder, check_tensor_cache
from pipeline import release
from pipeline.artifacts import MANIFEST, Store, damage
from pipeline.check import check_recipe
from pipeline.errors import UserError
from pipeline.inventory import entries, explain
from pipeline.recipe import load_recipe, recipe_of
from pipeline.sources import conversations, documents
from taid import CachedTeacher, SampledTeacher, TaidError, write_hidden_state_cache, write_sampled_cache

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
SECONDS = float(os.environ.get("MARTLET_FUZZ_SECONDS", "20"))
SEED = int(os.environ.get("MARTLET_FUZZ_SEED", "0"))
TOO_LONG = 10.0
"""Seconds after which an input has made its reader hang."""
REFUSED = (UserError, ExportError, TaidError)


class Hang(BaseException):
    """A reader does not come back; no handler of its may catch this."""


def fuzz(read: Callable[[Any], Any], inputs: st.SearchStrategy[Any], what: str, refuses: bool = True) -> None:
    """Reads one input after the other until the time is over. An exception that is no refusal fails the
    test."""

    @settings(database=None, deadline=None)
    @given(inputs)
    def one(value: Any) -> None:
        count["inputs"] += 1
        signal.setitimer(signal.ITIMER_REAL, TOO_LONG)
        try:
            with contextlib.suppress(*REFUSED):
                read(value)
                count["read"] += 1
        except Exception as error:
            raise AssertionError(f"{what}: {value!r:.2000}") from error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def hang(number: int, frame: Any) -> None:
        raise Hang(f"longer than {TOO_LONG} s")

    count = {"inputs": 0, "read": 0}
    chance, deadline = random.Random(SEED), time.monotonic() + SECONDS
    before = signal.signal(signal.SIGALRM, hang)
    try:
        while time.monotonic() < deadline:
            one.hypothesis.fuzz_one_input(chance.randbytes(256))  # type: ignore[attr-defined]
    finally:
        signal.signal(signal.SIGALRM, before)
    refused = count["inputs"] - count["read"]
    print(f"{what}: {count['inputs']:,} inputs in {SECONDS:.0f} s, {refused:,} of them refused")
    assert count["inputs"] > SECONDS, "hardly anything was tried"
    assert refused or not refuses, "nothing was damaged"


@st.composite
def damaged_bytes(draw: st.DrawFn, sound: bytes, within: int = 4096) -> bytes:
    """Sound bytes of which a few are replaced, doubled or cut off."""
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, min(within, len(data)) - 1)))
        kind = draw(st.integers(0, 9))
        if kind < 5:
            data[place : place + 1] = bytes([draw(st.integers(0, 255))])
        elif kind < 7:
            data[place : place + 8] = draw(st.sampled_from(TELLING))
        elif kind == 7:
            data[place:place] = data[place : place + draw(st.integers(1, 64))]
        elif kind == 8:
            del data[place : place + draw(st.integers(1, 16))]
        else:
            del data[place:]
    return bytes(data)


TELLING = [
    *(number.to_bytes(8, "little") for number in (0, 1, 2**16, 2**31, 2**32, 2**60, 2**63, 2**64 - 1)),
    *(
        b'{}[]",:',
        b"\\ud800\\u",
        b"\xff\xfe\xfd\xfc",
        b"\n\n\r\n- ? ",
        b"&a *a <<",
        b"!!int x ",
        b"1e999999",
        b"../../x",
    ),
]
"""Eight bytes that readers trip over: sizes, halves of code points, syntax, tags, paths."""
ODD_VALUES = st.sampled_from(
    [
        *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 10**400, 1.5, -0.0, 1e308),
        *(float("nan"), float("inf"), "", "x", "\x00", "a" * 300, "a" * 5000, "../x", "/", "~nobody-here/x"),
        *("\ud800", "é", "dataset:", "package:", "prompts:x", "0", "1e3", "null", "{}"),
        *([], {}, [[]], [{}], {"": {}}, [None], [1, "x"], {"sha256": 0, "bytes": ""}, ["sha256", "bytes"]),
        *({"stage": 1, "key": []}, {"model": "x"}, [[["x"] * 3] * 3] * 3),
        *("package:", "dataset:", ":"),
    ]
).map(copy.deepcopy)
ODD_KEYS = st.sampled_from(
    ["", "x", "name", "../x", "/etc/x", "\x00", "a" * 300, "\ud800", "files", "sha256"]
)


@st.composite
def damaged_value(draw: st.DrawFn, sound: str) -> Any:
    """A sound JSON value in which a few values are replaced, removed, renamed or added."""
    value = json.loads(sound)
    for _ in range(draw(st.integers(1, 3))):
        parent, key = value, None
        while isinstance(parent, (dict, list)) and parent:
            keys = list(parent) if isinstance(parent, dict) else range(len(parent))
            key = keys[draw(st.integers(0, len(keys) - 1))]
            if not isinstance(parent[key], (dict, list)) or not parent[key] or draw(st.integers(0, 3)) == 0:
                break
            parent = parent[key]
        if key is None:
            return draw(ODD_VALUES)
        kind = draw(st.integers(0, 5))
        if kind < 3:
            parent[key] = draw(ODD_VALUES)
        elif kind == 3:
            del parent[key]
        elif isinstance(parent, dict):
            parent[draw(ODD_KEYS)] = parent[key] if kind == 4 else draw(ODD_VALUES)
        else:
            parent.append(draw(ODD_VALUES))
    return value


def as_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in memory where there is one: a million files are written into it."""
    import tempfile

    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def sound_recipe(tiny_recipe: dict[str, Any]) -> dict[str, Any]:
    return tiny_recipe | {
        "accept_licence_conflict": "a test",
        "launch": {"processes": 1, "rendezvous": "localhost:1"},
        "pretrain": {"tokens": 64},
        "instruct": {"learning_rate": 1e-4, "lora": {"rank": 4}},
    }


def test_recipes_as_text(sound_recipe: dict[str, Any], place: Path) -> None:
    sound = yaml.safe_dump(sound_recipe).encode()
    path = place / "recipe.yaml"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        check_recipe(load_recipe(path), path)

    read(sound)
    fuzz(read, damaged_bytes(sound), "recipe, text")


def test_recipes_as_values(sound_recipe: dict[str, Any], place: Path) -> None:
    sound = json.dumps(sound_recipe)
    path = place / "recipe.yaml"

    def read(value: Any) -> None:
        recipe = recipe_of(value, path)
        check_recipe(recipe, path)
        json.dumps(recipe.model_dump(mode="json", by_alias=True), allow_nan=False).encode()

    read(json.loads(sound))
    fuzz(read, damaged_value(sound), "recipe, values")


def test_manifests_of_releases(place: Path) -> None:
    """Small, but with everything that verify looks at."""
    digest = "00" * 32
    (place / "data.txt").write_text("one")
    inputs = {
        **{part: {"sha256": digest} for part in ("recipe", "code")},
        "teacher": {"sha256": digest, "model": str(place), "files": {"data.txt": digest}},
        "data": {
            role: {"sha256": digest, "sources": [str(place / "data.txt")], "files": {"0/data.txt": digest}}
            for role in ("text", "chats")
        },
        "packages": {"torch": {"sha256": digest, "version": "1"}},
    }
    files = {name: {"sha256": digest, "bytes": 3} for name in ("data.txt", "a/b.txt")}
    sound = json.dumps({"schema": release.SCHEMA, "files": files, "recipe": {}, "inputs": inputs})
    (place / release.BILL_OF_MATERIALS).write_text('{"components": []}')

    def read(value: Any) -> None:
        (place / release.MANIFEST).write_bytes(as_bytes(value))
        release.verify(place)
        release.verify_inputs(place)

    read(json.loads(sound))
    fuzz(read, damaged_value(sound), "manifest.json, values")
    fuzz(
        lambda data: ((place / release.MANIFEST).write_bytes(data), release.verify(place)),
        damaged_bytes(sound.encode()),
        "manifest.json, bytes",
    )


def test_manifests_of_artifacts(place: Path) -> None:
    """The store puts a damaged artifact aside, and listing and explaining never fail."""
    store = Store(place / "store", report=lambda line: None)
    first = store.get_or_make("greet", 1, {"a": 1}, {}, lambda output, work: (output / "x").touch())
    made = store.get_or_make("answer", 1, {}, {"in": first}, lambda output, work: (output / "x").touch())
    manifest = made.path / MANIFEST
    sound = manifest.read_text()

    def read(data: bytes) -> None:
        manifest.write_bytes(data)
        if damage(made.path) is None:
            found = store.get_or_make("answer", 1, {}, {"in": first}, must_not_run)
            assert (found.key, found.digest) == (made.key, made.digest)
        for entry in entries(store.root):
            explain(store.root, entry)

    read(sound.encode())
    fuzz(read, damaged_value(sound).map(as_bytes), "artifact.json, values", refuses=False)
    fuzz(read, damaged_bytes(sound.encode()), "artifact.json, bytes", refuses=False)


def must_not_run(output: Path, work: Path) -> None:
    raise AssertionError("damage was overlooked, or found twice")


@pytest.mark.parametrize("kind", ["hidden", "sampled"])
def test_teachers_caches(tiny_model_dir: Path, place: Path, kind: str) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    blocks = np.arange(64, dtype=np.int32).reshape(4, 16)
    folder = place / "cache"
    if kind == "hidden":
        write_hidden_state_cache(model, blocks, folder)
    else:
        write_sampled_cache(model, blocks, folder, samples=4, vocabulary_size=64, seed=0)
    index, first = folder / "cache.json", next(folder.glob("*-00000.npy"))
    # What is fuzzed are the index and the shards; the head is safetensors and large.
    sound = index.read_text()
    shard = first.read_bytes()
    ids = torch.from_numpy(blocks[:1]).long()

    def read() -> None:
        if kind == "hidden":
            CachedTeacher(folder, verify=False).hidden_states(ids, torch.tensor([0]))
        else:
            SampledTeacher(folder, verify=False).sampled_probabilities(ids, torch.tensor([0]))

    def read_index(data: bytes) -> None:
        index.write_bytes(data)
        read()

    def read_shard(data: bytes) -> None:
        first.write_bytes(data)
        read()

    read()
    fuzz(read_index, damaged_value(sound).map(as_bytes), f"{kind} cache, cache.json, values")
    fuzz(read_index, damaged_bytes(sound.encode()), f"{kind} cache, cache.json, bytes")
    index.write_text(sound)
    fuzz(read_shard, damaged_bytes(shard, within=160), f"{kind} cache, a shard's header")


CHATS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    {"messages": [{"role": "system", "content": "é"}, {"role": "assistant", "content": "\u2028"}]},
]


def test_chats_as_json_lines(place: Path) -> None:
    path = place / "chats.jsonl"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        for messages in conversations(str(path)):
            json.dumps(messages, ensure_ascii=False).encode()

    sound = b"".join(as_bytes(chat) + b"\n" for chat in CHATS)
    read(sound)
    fuzz(read, damaged_bytes(sound), "chats, JSON Lines, bytes")
    lines = damaged_value(json.dumps(CHATS[0])).map(as_bytes)
    fuzz(read, lines, "chats, JSON Lines, values")


def test_text_as_json_lines(place: Path) -> None:
    path = place / "text.jsonl"
    sound = b'{"text": "One.", "other": [1, {}]}\n{"text": "\\u00e9\\n"}\n'

    def read(data: bytes) -> None:
        path.write_bytes(data)
        for text in documents(str(path), "text"):
            text.encode()

    fuzz(read, damaged_bytes(sound), "text, JSON Lines, bytes")


def test_chats_as_parquet(place: Path) -> None:
    path = place / "chats.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(CHATS), path)
    sound = path.read_bytes()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        for messages in conversations(str(path)):
            json.dumps(messages, ensure_ascii=False).encode()

    read(sound)
    fuzz(read, damaged_bytes(sound), "chats, Parquet")


def test_gguf_headers(place: Path) -> None:
    path = place / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_token_list(["a", "b", "c"])
    writer.add_token_scores([0.1, 0.2, 0.3])
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("token_embd.weight", np.ones((3, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    sound = path.read_bytes()
    assert check_gguf_header(path) == ["{{ messages }}"]

    def read(data: bytes) -> None:
        path.write_bytes(data)
        check_gguf_header(path)

    fuzz(read, damaged_bytes(sound, within=700), "GGUF header")


def test_model_folders(place: Path) -> None:
    """Header of safetensors, its index, configuration and tokenizer."""
    weights = place / "model.safetensors"
    save_file({"a": torch.ones(4, 4), "b": torch.ones(2, dtype=torch.bfloat16)}, weights)
    sound = {
        "model.safetensors": weights.read_bytes(),
        "config.json": as_bytes(
            {"vocab_size": 4, "hidden_size": 4, "num_hidden_layers": 1, "text_config": {"hidden_size": 4}}
        ),
        "model.safetensors.index.json": as_bytes({"weight_map": {"a": "model.safetensors"}}),
        "tokenizer_config.json": as_bytes({"extra": [{"name": "x"}], "chat_template": None}),
    }
    for name, data in sound.items():
        (place / name).write_bytes(data)
    check_model_folder(place)
    for name, data in sound.items():
        path = place / name

        def read(value: bytes, path: Path = path) -> None:
            path.write_bytes(value)
            check_model_folder(place)

        fuzz(read, damaged_bytes(data, within=300), f"model folder, {name}, bytes")
        if name.endswith(".json"):
            # Any value will do in a tokenizer's settings, as far as these checks go.
            values, refuses = damaged_value(data.decode()).map(as_bytes), name != "tokenizer_config.json"
            fuzz(read, values, f"model folder, {name}, values", refuses)
        path.write_bytes(data)


def test_mlc_tensor_caches(place: Path) -> None:
    (place / "params_shard_0.bin").write_bytes(bytes(96))
    record = {"name": "a", "shape": [4, 4], "dtype": "float32", "format": "f32-to-bf16", "nbytes": 32}
    records = [
        record | {"byteOffset": 0},
        record | {"name": "b", "format": "raw", "nbytes": 64, "byteOffset": 32},
    ]
    shard = {"dataPath": "params_shard_0.bin", "format": "raw-shard", "nbytes": 96, "records": records}
    sound = json.dumps({"metadata": {"ParamSize": 2}, "records": [shard]})
    path = place / "tensor-cache.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        check_tensor_cache(path)

    read(sound.encode())
    fuzz(read, damaged_value(sound).map(as_bytes), "MLC tensor cache, values")
    fuzz(read, damaged_bytes(sound.encode()), "MLC tensor cache, bytes")
