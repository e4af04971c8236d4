"""Readers of what users bring or disks damage, fed with what no writer wrote: each refuses in one sentence or
reads, and never crashes or hangs.

An input is a sound file with a few of its bytes or values replaced, or one that came of it so: those that
were read, or were refused in words not heard before, are damaged further. The same MARTLET_FUZZ_SEED draws
the same inputs. Each test goes on for MARTLET_FUZZ_SECONDS (20 by default), or until MARTLET_FUZZ_INPUTS are
through:

    MARTLET_FUZZ_INPUTS=1000000 pytest -rP tests/test_fuzzing.py --numprocesses 2

feeds each kind of file a million. How many they were and how many of them were refused is printed.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from gguf import GGUFWriter
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from export import untrusted
from export.errors import ExportError
from export.untrusted import check_gguf_header, check_model_folder, check_onnx, check_tensor_cache
from pipeline import release
from pipeline.artifacts import MANIFEST, Store, damage
from pipeline.check import check_recipe
from pipeline.errors import UserError
from pipeline.hub import gguf_metadata
from pipeline.inventory import entries, explain
from pipeline.licences import unjudged, unjudged_sentence
from pipeline.recipe import load_recipe, recipe_of
from pipeline.sources import conversations, documents
from taid import CachedTeacher, SampledTeacher, TaidError, write_hidden_state_cache, write_sampled_cache

pytestmark = [pytest.mark.slow, pytest.mark.timeout(86_400)]
SECONDS = float(os.environ.get("MARTLET_FUZZ_SECONDS", "20"))
INPUTS = int(os.environ.get("MARTLET_FUZZ_INPUTS", "0"))
SEED = os.environ.get("MARTLET_FUZZ_SEED", "0")
TOO_LONG, TOO_STILL = 10.0, 600.0
"""Seconds of processor time, and by the clock, after which an input has made its reader hang."""
TOO_MUCH = 4 * 2**30
"""Bytes of address space that no reader of a few hundred bytes may take."""
LONGEST_SENTENCE = 1000
MOST_KEPT = 64
"""Inputs of one reader from which others are made, of each kind."""
REFUSED = (UserError, ExportError, TaidError)
Damage = Callable[[random.Random, bytes], bytes]


class Hang(BaseException):
    """A reader does not come back; no handler of its may catch this."""


class Reader:
    """Something that reads a file, and what it is fed with."""

    def __init__(
        self, name: str, read: Callable[[bytes], Any], sound: Sequence[bytes], damage: Damage, turns: int = 1
    ):
        """
        Args:
            name: what it reads.
            read: puts the bytes where the reader finds them and has them read.
            sound: files that it reads.
            damage: makes another file of one.
            turns: how many inputs in a row it is fed with when it is its turn.
        """
        self.name, self.read, self.sound, self.damage = name, read, list(sound), damage
        self.turns = turns
        self.were_read: list[bytes] = []
        self.were_new: list[bytes] = []
        self.heard: set[str] = set()
        self.inputs = self.refused = 0
        self.longest = 4 * max(len(data) for data in sound)
        for data in sound:
            read(data)

    def draw(self, chance: random.Random) -> bytes:
        """The next input."""
        pool = (self.sound, self.sound, self.sound, self.were_read, self.were_read, self.were_new)
        parents = pool[int(chance.random() * 6)] or self.sound
        return self.damage(chance, parents[int(chance.random() * len(parents))])

    def take(self, data: bytes, refusal: Exception | None, chance: random.Random) -> None:
        """Counts an input, and keeps it where it led somewhere new."""
        self.inputs += 1
        keep = self.were_read
        if refusal is not None:
            self.refused += 1
            sentence = str(refusal)
            assert sentence.isprintable(), sentence
            assert 0 < len(sentence) <= LONGEST_SENTENCE, sentence
            words = re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "", sentence)[:200]
            if words in self.heard:
                return
            self.heard.add(words)
            keep = self.were_new
        elif chance.random() > 0.05:
            return
        if len(data) <= self.longest:
            if len(keep) < MOST_KEPT:
                keep.append(data)
            else:
                keep[int(chance.random() * MOST_KEPT)] = data


def fuzz(kind: str, *readers: Reader) -> None:
    """Feeds the readers of a kind of file in turn. An exception that is no refusal, a refusal that is no
    sentence, a reader that hangs or wants more memory than there is to be had for so little: each fails the
    test and tells the input."""

    def hang(number: int, frame: Any) -> None:
        raise Hang(f"longer than {TOO_LONG} s of processor time, or {TOO_STILL} s by the clock")

    chance = random.Random(f"{kind} {SEED}")
    turns = [reader for reader in readers for _ in range(reader.turns)]
    count, began = 0, time.monotonic()
    told = began
    limits = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = {number: signal.signal(number, hang) for number in (signal.SIGPROF, signal.SIGALRM)}
    resource.setrlimit(resource.RLIMIT_AS, (taken + TOO_MUCH, limits[1]))
    try:
        while count < INPUTS if INPUTS else time.monotonic() < began + SECONDS:
            reader = turns[count % len(turns)]
            data = reader.draw(chance)
            signal.setitimer(signal.ITIMER_PROF, TOO_LONG)
            signal.setitimer(signal.ITIMER_REAL, TOO_STILL)
            try:
                refusal = None
                try:
                    reader.read(data)
                except REFUSED as error:
                    refusal = error
                reader.take(data, refusal, chance)
            except (Exception, Hang) as error:
                shown = data if len(data) <= 4000 else data[:4000] + b"..."
                raise AssertionError(f"{reader.name}, seed {SEED}, input {count}: {shown!r}") from error
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.setitimer(signal.ITIMER_REAL, 0)
            count += 1
            if count % 1000 == 0 and time.monotonic() > told + 60:
                told = time.monotonic()
                print(f"{kind}: {count:,} inputs in {told - began:.0f} s", flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    took = time.monotonic() - began
    print(f"{kind}: {count:,} inputs in {took:.0f} s, {count / took:,.0f} a second, seed {SEED}")
    for reader in readers:
        print(
            f"  {reader.name}: {reader.inputs:,}, {reader.refused:,} of them refused in "
            f"{len(reader.heard)} ways"
        )
        assert reader.refused, f"{reader.name}: nothing was damaged"
        assert reader.refused < reader.inputs, f"{reader.name}: nothing was read"
    assert INPUTS or count > SECONDS, "hardly anything was tried"


def damaged_bytes(within: int = 4096) -> Damage:
    """Of the first ``within`` bytes a few replaced, doubled or cut off."""

    def damaged(chance: random.Random, sound: bytes) -> bytes:
        data = bytearray(sound)
        while True:
            place = int(chance.random() * min(within, len(data)))
            kind = int(chance.random() * 20)
            if kind < 6:
                data[place : place + 1] = bytes([int(chance.random() * 256)])
            elif kind < 10:
                data[place : place + 1] = sound[int(chance.random() * len(sound)) :][:1]
            elif kind < 14:
                telling = chance.choice(TELLING)
                data[place : place + len(telling)] = telling
            elif kind < 16:
                data[place:place] = data[place : place + 1 + int(chance.random() * 64)]
            elif kind < 18:
                del data[place : place + 1 + int(chance.random() * 16)]
            elif kind < 19:
                other = int(chance.random() * min(within, len(data)))
                length = 1 + int(chance.random() * 32)
                data[place : place + length] = data[other : other + length]
            else:
                del data[place:]
            if chance.random() < 0.6:
                return bytes(data)

    return damaged


TELLING = [
    *(number.to_bytes(8, "little") for number in (0, 1, 2**16, 2**31, 2**32, 2**60, 2**63, 2**64 - 1)),
    *(number.to_bytes(4, "little") for number in (0, 1, 2**16, 2**31, 2**32 - 1)),
    *(
        b'{}[]",:',
        b"\\ud800\\u",
        b"\xff\xfe\xfd\xfc",
        b"\n\n\r\n- ? ",
        b"&a *a <<",
        b"!!int x ",
        b"1e999999",
        b"../../x",
        b"[" * 64,
        b'{"a":' * 16,
    ),
]
"""Bytes that readers trip over: sizes, halves of code points, syntax, tags, paths, nesting."""
ODD_VALUES = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 10**400, 1.5, -0.0, 1e308),
    *(float("nan"), float("inf"), "", "x", "\x00", "a" * 300, "a" * 5000, "../x", "/", "~nobody-here/x"),
    *("\ud800", "é", "a\nb", "dataset:", "package:", "prompts:x", "0", "1e3", "null", "{}", ":"),
    *([], {}, [[]], [{}], {"": {}}, [None], [1, "x"], {"sha256": 0, "bytes": ""}, ["sha256", "bytes"]),
    *({"stage": 1, "key": []}, {"model": "x"}, [[["x"] * 3] * 3] * 3),
]
ODD_KEYS = ["", "x", "name", "../x", "/etc/x", "\x00", "a\nb", "a" * 300, "\ud800", "files", "sha256"]


def damaged_values(chance: random.Random, sound: bytes) -> bytes:
    """JSON in which a few values are replaced, removed, renamed or added."""
    value = json.loads(sound)
    for _ in range(1 + int(chance.random() * 3)):
        parent, key = value, None
        while isinstance(parent, (dict, list)) and parent:
            keys = list(parent) if isinstance(parent, dict) else range(len(parent))
            key = keys[int(chance.random() * len(keys))]
            if not isinstance(parent[key], (dict, list)) or not parent[key] or chance.random() < 0.25:
                break
            parent = parent[key]
        odd = ODD_VALUES[int(chance.random() * len(ODD_VALUES))]
        if key is None:
            return as_bytes(odd)
        kind = int(chance.random() * 6)
        if kind < 3:
            parent[key] = odd
        elif kind == 3:
            del parent[key]
        elif isinstance(parent, dict):
            parent[ODD_KEYS[int(chance.random() * len(ODD_KEYS))]] = parent[key] if kind == 4 else odd
        else:
            parent.append(odd)
        # The same list or mapping may stand in two places now, and the odd ones stay as they are.
        value = json.loads(as_bytes(value))
    return as_bytes(value)


def as_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in memory where there is one: a million files are written into it."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


BASE = {
    "name": "A",
    "teacher": {"model": "./m", "licence": "MIT"},
    "data": {
        "text": {"sources": ["t.jsonl"], "train_tokens": 64},
        "chats": {"sources": ["c.jsonl"], "conversations": 2},
    },
    "student": {"prune": {"layers": 2}},
    "instruct": {},
}
"""What no recipe can do without."""
SECTIONS: list[dict[str, Any]] = [
    {},
    {
        "distill": {"t_start": 0.5, "generations": {"share": 0.5}},
        "teacher": {"model": "./m", "cache": "none"},
    },
    {"launch": {"nodes": 2, "rendezvous": "a:1"}, "pretrain": {"tokens": 64}, "report_to": []},
    {"instruct": {"learning_rate": 1e-4, "lora": {"rank": 4}}, "accept_licence_conflict": "a test"},
    {"export": {"gguf": ["q8_0"], "mlc_libraries": ["x86_64-cpu"], "importance_matrix": "calibration"}},
    {"validate": {"default": {"mean_kl": 1.0}, "thresholds": {"q8_0": {"mean_kl": 2, "p99_kl": 3}}}},
    {"bench": {"threads": 1, "depths": [0, 64], "profiles": ["p.yaml"]}, "student": {"model": "./m"}},
    {"language": ["en", "no"], "student": {"model": "./m", "licence": "MIT OR (Apache-2.0 AND CC-BY-4.0)"}},
]


def test_recipes(place: Path) -> None:
    for name in ("t.jsonl", "c.jsonl", "m/model.safetensors"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).touch()
    shutil.copy(Path(__file__).parents[1] / "profiles" / "small-phone.yaml", place / "p.yaml")
    path = place / "recipe.yaml"
    recipes = [BASE | section for section in SECTIONS]

    def read(values: Any) -> None:
        recipe = recipe_of(values, path)
        check_recipe(recipe, path)
        assert unjudged_sentence(unjudged(recipe)).isprintable()
        gguf_metadata(recipe)
        json.dumps(recipe.model_dump(mode="json", by_alias=True), allow_nan=False).encode()

    def read_text(data: bytes) -> None:
        path.write_bytes(data)
        check_recipe(load_recipe(path), path)

    values = [as_bytes(recipe) for recipe in recipes]
    texts = [yaml.safe_dump(recipe, default_flow_style=None).encode() for recipe in recipes]
    fuzz(
        "recipe",
        Reader("recipe, values", lambda data: read(json.loads(data)), values, damaged_values, turns=4),
        Reader("recipe, text", read_text, texts, damaged_bytes()),
    )


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
    sound = [as_bytes({"schema": release.SCHEMA, "files": files, "recipe": {}, "inputs": inputs})]
    (place / release.BILL_OF_MATERIALS).write_text('{"components": []}')

    def read(data: bytes) -> None:
        (place / release.MANIFEST).write_bytes(data)
        for sentence in (*release.verify(place), *release.verify_inputs(place)):
            assert sentence.isprintable(), sentence

    fuzz(
        "manifest.json",
        Reader("manifest.json, values", read, sound, damaged_values),
        Reader("manifest.json, bytes", read, sound, damaged_bytes()),
    )


def test_manifests_of_artifacts(place: Path) -> None:
    """The store finds every damage but a missing line's end, and listing and explaining never fail."""
    store = Store(place / "store", report=lambda line: None)
    first = store.get_or_make("greet", 1, {"a": 1}, {}, lambda output, work: (output / "x").touch())
    made = store.get_or_make("answer", 1, {}, {"in": first}, lambda output, work: (output / "x").touch())
    manifest = made.path / MANIFEST
    sound = manifest.read_bytes()
    # An earlier version's says nothing of itself.
    earlier = {key: value for key, value in json.loads(sound).items() if key != "manifest_sha256"}

    def read(data: bytes) -> None:
        manifest.write_bytes(data)
        problem = damage(made.path)
        # What cannot be read is the same to these, whatever it is.
        for entry in entries(store.root) if problem is None or len(data) % 16 == 0 else ():
            if entry.key == made.key:
                explain(store.root, entry)
        if problem is not None:
            raise UserError(problem)
        found = store.get_or_make("answer", 1, {}, {"in": first}, must_not_run)
        assert (found.key, found.digest) == (made.key, made.digest)

    fuzz(
        "artifact.json",
        Reader("artifact.json, values", read, [sound, as_bytes(earlier)], damaged_values),
        Reader("artifact.json, bytes", read, [sound, as_bytes(earlier)], damaged_bytes()),
    )


def must_not_run(output: Path, work: Path) -> None:
    raise AssertionError("damage was overlooked, or found twice")


def teachers_cache(place: Path, kind: str) -> list[Reader]:
    """The index and the shards of a cache; the head is safetensors, which another test feeds."""
    shape = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=1))
    blocks = np.arange(16, dtype=np.int32).reshape(2, 8)
    folder = place / kind
    if kind == "hidden":
        write_hidden_state_cache(model, blocks, folder)
    else:
        write_sampled_cache(model, blocks, folder, samples=4, vocabulary_size=32, seed=0)
    index, shard = folder / "cache.json", next(folder.glob("*-00000.npy"))
    sound = {path: path.read_bytes() for path in (index, shard)}
    ids = torch.from_numpy(blocks[:1]).long()

    def read(path: Path, data: bytes) -> None:
        path.write_bytes(data)
        try:
            if kind == "hidden":
                CachedTeacher(folder, verify=False).hidden_states(ids, torch.tensor([0]))
            else:
                SampledTeacher(folder, verify=False).sampled_probabilities(ids, torch.tensor([0]))
        finally:
            path.write_bytes(sound[path])

    def read_index(data: bytes) -> None:
        read(index, data)

    return [
        Reader(f"{kind} cache, cache.json, values", read_index, [sound[index]], damaged_values),
        Reader(f"{kind} cache, cache.json, bytes", read_index, [sound[index]], damaged_bytes()),
        Reader(f"{kind} cache, a shard", lambda data: read(shard, data), [sound[shard]], damaged_bytes(160)),
    ]


def test_tensor_caches(place: Path) -> None:
    """Those of a teacher, and the index of MLC's weights."""
    (place / "params_shard_0.bin").write_bytes(bytes(96))
    record = {"name": "a", "shape": [4, 4], "dtype": "float32", "format": "f32-to-bf16", "nbytes": 32}
    records = [
        record | {"byteOffset": 0},
        record | {"name": "b", "format": "raw", "nbytes": 64, "byteOffset": 32},
    ]
    shard = {"dataPath": "params_shard_0.bin", "format": "raw-shard", "nbytes": 96, "records": records}
    sound = [as_bytes({"metadata": {"ParamSize": 2}, "records": [shard]})]
    path = place / "tensor-cache.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        check_tensor_cache(path)

    fuzz(
        "tensor cache",
        *teachers_cache(place, "hidden"),
        *teachers_cache(place, "sampled"),
        Reader("MLC tensor cache, values", read, sound, damaged_values, turns=6),
        Reader("MLC tensor cache, bytes", read, sound, damaged_bytes(), turns=6),
    )


CHATS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    {"messages": [{"role": "system", "content": "é"}, {"role": "assistant", "content": "\u2028"}]},
]


def test_chats(place: Path) -> None:
    path, table = place / "chats.jsonl", place / "chats.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(CHATS), table)

    def read(path: Path, data: bytes) -> None:
        path.write_bytes(data)
        for messages in conversations(str(path)):
            json.dumps(messages, ensure_ascii=False).encode()

    def read_lines(data: bytes) -> None:
        read(path, data)

    lines = b"".join(as_bytes(chat) + b"\n" for chat in CHATS)
    fuzz(
        "chats",
        Reader("chats, JSON Lines, values", read_lines, [as_bytes(chat) for chat in CHATS], damaged_values),
        Reader("chats, JSON Lines, bytes", read_lines, [lines], damaged_bytes()),
        Reader("chats, Parquet", lambda data: read(table, data), [table.read_bytes()], damaged_bytes()),
    )


def test_text(place: Path) -> None:
    def reading(path: Path) -> Callable[[bytes], None]:
        def read(data: bytes) -> None:
            path.write_bytes(data)
            for text in documents(str(path), "text"):
                text.encode()

        return read

    lines = b'{"text": "One.", "other": [1, {}]}\n{"text": "\\u00e9\\n"}\n'
    prose = "One.\r\n\n\u2028Two; \u00e9.\n".encode("utf-8-sig")
    fuzz(
        "text",
        Reader("text, JSON Lines", reading(place / "text.jsonl"), [lines], damaged_bytes()),
        Reader("text, plain", reading(place / "text.txt"), [prose], damaged_bytes()),
    )


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

    fuzz("GGUF header", Reader("GGUF header", read, [sound], damaged_bytes(700)))


def test_onnx_graphs(place: Path) -> None:
    path = place / "tiny.onnx"
    (place / "w.bin").write_bytes(bytes(32))
    outside = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4])
    outside.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "w.bin"), ("offset", "16"), ("length", "16")):
        outside.external_data.add(key=key, value=value)
    inside = onnx.numpy_helper.from_array(np.ones(4, dtype=np.float16), "v")
    nodes = [onnx.helper.make_node("Sum", ["x", "w", "v"], ["y"], extra=inside)]
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]) for name in "xy")
    graph = onnx.helper.make_graph(nodes, "tiny", [x], [y], [outside, inside])
    sound = onnx.helper.make_model(graph).SerializeToString()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        check_onnx(path)

    fuzz("ONNX graph", Reader("ONNX graph", read, [sound], damaged_bytes()))


def test_model_folders(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Header of safetensors, its index, configuration and tokenizer. What a template does when it is rendered
    is tests/export/test_untrusted.py's."""
    monkeypatch.setattr(
        untrusted, "check_chat_template", lambda template, where: template.encode("utf-8", "replace")
    )
    weights = place / "model.safetensors"
    save_file({"a": torch.ones(4, 4), "b": torch.ones(2, dtype=torch.bfloat16)}, weights)
    templates = [{"name": "x", "template": "{{ messages }}"}]
    sound = {
        "model.safetensors": weights.read_bytes(),
        "config.json": as_bytes(
            {"vocab_size": 4, "hidden_size": 4, "num_hidden_layers": 1, "text_config": {"hidden_size": 4}}
        ),
        "model.safetensors.index.json": as_bytes({"weight_map": {"a": "model.safetensors"}}),
        "tokenizer_config.json": as_bytes({"extra": [{"name": "x"}], "chat_template": templates}),
    }
    for name, data in sound.items():
        (place / name).write_bytes(data)

    def reading(name: str) -> Callable[[bytes], None]:
        def read(data: bytes) -> None:
            (place / name).write_bytes(data)
            try:
                check_model_folder(place)
            finally:
                (place / name).write_bytes(sound[name])

        return read

    readers = []
    for name, data in sound.items():
        readers.append(Reader(f"model folder, {name}, bytes", reading(name), [data], damaged_bytes(300)))
        # Any value will do in a tokenizer's settings, as far as these checks go.
        if name.endswith(".json") and name != "tokenizer_config.json":
            readers.append(Reader(f"model folder, {name}, values", reading(name), [data], damaged_values))
    fuzz("model folder", *readers)
