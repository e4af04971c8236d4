"""Everything that a user gets wrong, in one table: what was typed, the whole sentence, the exit code."""

# Sentences stay whole, so that they can be searched for.
# ruff: noqa: E501

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

Call = Callable[..., tuple[int, str, str]]
NOTHING = object()
"""In place of a value: the key is taken out."""


@dataclass(frozen=True)
class Case:
    """A mistake.

    Attributes:
        sentence: what standard error says after ``martlet: ``, with {here} for the test's folder and ... for any
            text.
        set: recipe keys with other values; the recipe is then checked.
        recipe: the recipe's text instead.
        arguments: what follows ``martlet``; {here} is the test's folder. By default ``check {here}/recipe.yaml``.
        files: files to write first, by name.
        code: the exit code.
    """

    sentence: str
    set: tuple[tuple[str, Any], ...] = ()
    recipe: str | None = None
    arguments: str = "check {here}/recipe.yaml"
    files: tuple[tuple[str, str], ...] = ()
    code: int = 2


def key(name: str, value: Any, sentence: str) -> Case:
    """A recipe in which one key is wrong."""
    return Case("{here}/recipe.yaml: " + sentence, ((name, value),))


def line(arguments: str, sentence: str, **rest: Any) -> Case:
    """A command line that is wrong."""
    return Case(sentence, arguments=arguments, **rest)


HELP = "; martlet --help lists the commands and their options."
TABLE = (
    key("name", NOTHING, "key name is missing; add it (docs/guide.md lists all keys)."),
    key("name", "", "name: string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$', not ''."),
    key(
        "name",
        "../elsewhere",
        "name: string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$', not '../elsewhere'.",
    ),
    key(
        "name",
        "/absolute",
        "name: string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$', not '/absolute'.",
    ),
    key("name", "a..b", "name: a name may not contain '..'."),
    key(
        "name",
        "with space",
        "name: string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$', not 'with space'.",
    ),
    key(
        "name",
        "x" * 97,
        "name: string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$', not 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx....",
    ),
    key("name", ["list"], "name: input should be a valid string, not ['list']."),
    key(
        "seed",
        "three",
        "seed: input should be a valid integer, unable to parse string as an integer, not 'three'.",
    ),
    key("seed", -1, "seed: input should be greater than or equal to 0, not -1."),
    key("seed", 2**32, "seed: input should be less than 4294967296, not 4294967296."),
    key("seed", 1.5, "seed: input should be a valid integer, got a number with a fractional part, not 1.5."),
    key("threads", 0, "threads: input should be greater than or equal to 1, not 0."),
    key(
        "nonsense",
        1,
        "unknown key nonsense; remove it or correct its spelling (docs/guide.md lists all keys).",
    ),
    key(
        "two\nlines \u2028",
        1,
        "unknown key two\\nlines \\u2028; remove it or correct its spelling (docs/guide.md lists all keys).",
    ),
    key(
        "long" * 100,
        1,
        f"unknown key {('long' * 50)[:197]}...; remove it or correct its spelling (docs/guide.md lists all keys).",
    ),
    key(
        "language",
        ["english"],
        "language: there is no ISO 639-1 code 'english'; give two small letters, such as en.",
    ),
    key("language", [False], 'language: YAML reads no as false; write "no" in quotes for Norwegian.'),
    key(
        "accept_licence_conflict",
        "",
        "accept_licence_conflict: string should have at least 1 character, not ''.",
    ),
    key("teacher", NOTHING, "key teacher is missing; add it (docs/guide.md lists all keys)."),
    key(
        "teacher",
        "smollm2",
        "teacher: input should be a valid dictionary or instance of Teacher, not 'smollm2'.",
    ),
    key("teacher.model", NOTHING, "key teacher.model is missing; add it (docs/guide.md lists all keys)."),
    key("teacher.model", 7, "teacher.model: input should be a valid string, not 7."),
    key("teacher.model", "./no-such-folder", "teacher.model: {here}/no-such-folder is no folder."),
    key("teacher.model", "/no/such/folder", "teacher.model: /no/such/folder is no folder."),
    key(
        "teacher.model",
        "package:no-such-package-here",
        "teacher.model: the package no-such-package-here is not installed (pip install no-such-package-here).",
    ),
    key("teacher.cache", "logits", "teacher.cache: input should be ..., not 'logits'."),
    key(
        "teacher.cache_dtype",
        "int8",
        "teacher.cache_dtype: input should be 'float32' or 'bfloat16', not 'int8'.",
    ),
    key(
        "teacher.trust_remote_code",
        "maybe",
        "teacher.trust_remote_code: input should be a valid boolean, unable to interpret input, not 'maybe'.",
    ),
    key(
        "teacher.licence",
        "CC-BY-ND-4.0",
        "teacher.licence: CC-BY-ND-4.0 forbids changed versions, which a model made from it would be; choose other sources, or say in accept_licence_conflict why it may be done (the model cards will show it).",
    ),
    key(
        "teacher.licence",
        "llama3.2",
        "teacher.licence: llama3.2 asks that the result's name begin with 'Llama'; name is 'Tiny'; choose other sources, or say in accept_licence_conflict why it may be done (the model cards will show it).",
    ),
    key("data", NOTHING, "key data is missing; add it (docs/guide.md lists all keys)."),
    key("data.text.sources", [], "data.text.sources: list should have at least 1 item, not []."),
    key("data.text.sources", "text.txt", "data.text.sources: input should be a valid list, not 'text.txt'."),
    key("data.text.sources", ["nowhere.txt"], "data.text.sources: {here}/nowhere.txt: no such file."),
    key(
        "data.text.sources",
        ["x" * 300 + ".txt"],
        "data.text.sources: 'xxx...xxx.txt' is no path (File name too long).",
    ),
    key("data.text.sources", ["a\0b"], "data.text.sources: 'a\\x00b' is no path (...embedded null ...)."),
    key(
        "teacher.model",
        "~nobody-of-this-name/model",
        "teacher.model: '~nobody-of-this-name/model' is no path (Could not determine home directory).",
    ),
    key("data.text.sources", [1], "data.text.sources.0: input should be a valid string, not 1."),
    key(
        "data.text.train_tokens",
        0,
        "data.text.train_tokens: input should be greater than or equal to 1, not 0.",
    ),
    key(
        "data.text.train_tokens",
        "many",
        "data.text.train_tokens: input should be a valid integer, unable to parse string as an integer, not 'many'.",
    ),
    key(
        "data.text.train_tokens",
        NOTHING,
        "key data.text.train_tokens is missing; add it (docs/guide.md lists all keys).",
    ),
    key(
        "data.text.held_out_tokens",
        0,
        "data.text.held_out_tokens: input should be greater than or equal to 1, not 0.",
    ),
    key(
        "data.text.calibration_tokens",
        -5,
        "data.text.calibration_tokens: input should be greater than or equal to 1, not -5.",
    ),
    key(
        "data.text.sequence_length",
        7,
        "data.text.sequence_length: input should be greater than or equal to 8, not 7.",
    ),
    key("data.text.text_field", 3, "data.text.text_field: input should be a valid string, not 3."),
    key(
        "data.text.tokens",
        64,
        "unknown key data.text.tokens; remove it or correct its spelling (docs/guide.md lists all keys).",
    ),
    key("data.chats.sources", ["nowhere.jsonl"], "data.chats.sources: {here}/nowhere.jsonl: no such file."),
    key(
        "data.chats.conversations",
        0,
        "data.chats.conversations: input should be greater than or equal to 1, not 0.",
    ),
    key(
        "data.chats.held_out_conversations",
        0,
        "data.chats.held_out_conversations: input should be greater than or equal to 1, not 0.",
    ),
    key(
        "data.chats.max_tokens",
        15,
        "data.chats.max_tokens: input should be greater than or equal to 16, not 15.",
    ),
    key(
        "data.chats.max_answer_tokens",
        0,
        "data.chats.max_answer_tokens: input should be greater than or equal to 1, not 0.",
    ),
    key(
        "student.model", "./no-such-folder", "student: give either model or prune, not both and not neither."
    ),
    key("student.licence", 7, "student.licence: input should be a valid string, not 7."),
    key(
        "student",
        {"model": "someone/student", "licence": "CC-BY-ND-4.0"},
        "student.licence: CC-BY-ND-4.0 forbids changed versions, which a model made from it would be; choose other sources, or say in accept_licence_conflict why it may be done (the model cards will show it).",
    ),
    key("student", {"model": "./no-such-folder"}, "student.model: {here}/no-such-folder is no folder."),
    key(
        "student.prune.layers", 0, "student.prune.layers: input should be greater than or equal to 1, not 0."
    ),
    key(
        "student.prune.width",
        3,
        "unknown key student.prune.width; remove it or correct its spelling (docs/guide.md lists all keys).",
    ),
    key(
        "distill.learning_rats",
        1.0,
        "unknown key distill.learning_rats; remove it or correct its spelling (docs/guide.md lists all keys).",
    ),
    key(
        "distill.learning_rate",
        "fast",
        "distill.learning_rate: input should be a valid number, unable to parse string as a number, not 'fast'.",
    ),
    key("distill.learning_rate", 0, "distill.learning_rate: input should be greater than 0, not 0."),
    key("distill.learning_rate", 2, "distill.learning_rate: input should be less than or equal to 1, not 2."),
    key(
        "distill.learning_rate",
        float("nan"),
        "distill.learning_rate: input should be a finite number, not nan.",
    ),
    key(
        "validate.default.mean_kl",
        float("inf"),
        "validate.default.mean_kl: input should be a finite number, not inf.",
    ),
    key("bench.timeout_s", float("inf"), "bench.timeout_s: input should be a finite number, not inf."),
    key(
        "distill.objective",
        "hope",
        "distill.objective: input should be 'taid', 'cross_entropy', 'forward_kl', 'reverse_kl', 'jensen_shannon', 'total_variation', 'skew_forward_kl', 'skew_reverse_kl', 'adaptive_kl', 'decoupled_kd' or 'curriculum_temperature', not 'hope'.",
    ),
    key("distill.t_start", 1.5, "distill.t_start: input should be less than or equal to 1, not 1.5."),
    key(
        "distill",
        {"t_start": 0.9, "t_end": 0.4},
        "distill: t_start 0.9 is above t_end 0.4; t rises from t_start to t_end.",
    ),
    key("distill.epochs", 0, "distill.epochs: input should be greater than 0, not 0."),
    key("distill.warmup_ratio", 1, "distill.warmup_ratio: input should be less than 1, not 1."),
    key("distill.batch_size", 0, "distill.batch_size: input should be greater than or equal to 1, not 0."),
    key(
        "distill.gradient_accumulation",
        0,
        "distill.gradient_accumulation: input should be greater than or equal to 1, not 0.",
    ),
    key(
        "distill.checkpoint_every",
        0,
        "distill.checkpoint_every: input should be greater than or equal to 1, not 0.",
    ),
    key("distill.max_grad_norm", 0, "distill.max_grad_norm: input should be greater than 0, not 0."),
    key("distill.beta", 1.0, "distill.beta: input should be less than 1, not 1.0."),
    key("distill.batch_size", True, "distill.batch_size: input should be a number, not true."),
    key("bench.settle_s", False, "bench.settle_s: input should be a number, not false."),
    key("distill.temperature", 0, "distill.temperature: input should be greater than 0, not 0."),
    key("pretrain", {"tokens": 0}, "pretrain.tokens: input should be greater than or equal to 1, not 0."),
    key("pretrain", {}, "key pretrain.tokens is missing; add it (docs/guide.md lists all keys)."),
    key("instruct", NOTHING, "key instruct is missing; add it (docs/guide.md lists all keys)."),
    key(
        "instruct.lora", {"rank": 0}, "instruct.lora.rank: input should be greater than or equal to 1, not 0."
    ),
    key("instruct.lora", {"dropout": 1.0}, "instruct.lora.dropout: input should be less than 1, not 1.0."),
    key(
        "instruct.lora",
        {"ranks": 4},
        "unknown key instruct.lora.ranks; remove it or correct its spelling (docs/guide.md lists all keys).",
    ),
    key(
        "export.gguf",
        ["q9_9"],
        "export: gguf: there is no 'q9_9'; choose from ....",
    ),
    key(
        "export.mlc_libraries",
        ["x" * 5000],
        f"export: mlc_libraries: there is no '{'x' * 59}; choose from ....",
    ),
    key("export.gguf", ["q8_0", "q8_0"], "export: gguf: a quantization is listed twice."),
    key(
        "export",
        {"mlc": ["q4f16_1"], "mlc_libraries": ["x86_64-cpu", "wasm32-webgpu"]},
        "export: mlc_libraries: there is no wasm32-webgpu library of q4f16_1; leave one of them out, or take "
        "q4f32_1 or q0f32.",
    ),
    key("export.gguf", "q8_0", "export.gguf: input should be a valid list, not 'q8_0'."),
    key("export.onnx", ["int3"], "export: onnx: there is no 'int3'; choose from ...."),
    key("export.mlc", ["q1f1"], "export: mlc: there is no 'q1f1'; choose from ...."),
    key(
        "export",
        {"gguf": [], "mlc": [], "onnx": []},
        "export: nothing to export: list at least one quantization under gguf, mlc or onnx.",
    ),
    key("validate.tokens", 63, "validate.tokens: input should be greater than or equal to 64, not 63."),
    key(
        "validate.default", {"mean_kl": 0}, "validate.default.mean_kl: input should be greater than 0, not 0."
    ),
    key(
        "validate.default",
        {"mean_kl": 0.1, "perplexity_ratio": 1},
        "validate.default.perplexity_ratio: input should be greater than 1, not 1.",
    ),
    key(
        "validate.default",
        {"mean_kl": 0.1, "same_top": 2},
        "validate.default.same_top: input should be less than or equal to 1, not 2.",
    ),
    key(
        "validate.thresholds",
        {"q8_0": {}},
        "key validate.thresholds.q8_0.mean_kl is missing; add it (docs/guide.md lists all keys).",
    ),
    key("bench.threads", 0, "bench.threads: input should be greater than or equal to 1, not 0."),
    key(
        "bench.max_cpu_pressure",
        101,
        "bench.max_cpu_pressure: input should be less than or equal to 100, not 101.",
    ),
    key(
        "bench.profiles",
        ["none.yaml"],
        "bench.profiles: {here}/none.yaml: cannot be read ([Errno 2] No such file or directory: '{here}/none.yaml'); give the path of a device profile.",
    ),
    Case(
        "{here}/recipe.yaml: bench.profiles: {here}/small.yaml: memory_mb: Input should be greater than or equal to 16; profiles/ has examples.",
        set=(("bench.profiles", ["small.yaml"]),),
        files=(
            (
                "small.yaml",
                "name: small\nmemory_mb: 1\nprocessors: 1\nthreads: 1\nmin_decode_tokens_per_s: 1\n",
            ),
        ),
    ),
    Case("{here}/recipe.yaml: a recipe is a mapping of keys to values; this file holds none.", recipe=""),
    Case(
        "{here}/recipe.yaml: a recipe is a mapping of keys to values; this file holds none.",
        recipe="- a\n- b\n",
    ),
    Case(
        "{here}/recipe.yaml: a recipe is a mapping of keys to values; this file holds none.",
        recipe="just text",
    ),
    Case(
        "{here}/recipe.yaml, line 1: not valid YAML (expected the node content, but found '<stream end>'); mend the syntax.",
        recipe="name: [",
    ),
    Case(
        "{here}/recipe.yaml, line 2: not valid YAML (mapping values are not allowed here); mend the syntax.",
        recipe="a: 1\na: :\n",
    ),
    Case(
        "{here}/recipe.yaml, line 1: not valid YAML (could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system'); mend the syntax.",
        recipe="name: !!python/object/apply:os.system ['true']",
    ),
    Case(
        "{here}/recipe.yaml, line 1: not valid YAML (expected ',' or ']', but got '<stream end>'); mend the syntax.",
        recipe="&a [*a",
    ),
    Case(
        "{here}/recipe.yaml, line 1: not valid YAML (found undefined alias 'missing'); mend the syntax.",
        recipe="name: *missing",
    ),
    Case("{here}/recipe.yaml: not valid YAML (nested too deeply); mend the syntax.", recipe="[" * 5000),
    *(
        Case(
            "{here}/recipe.yaml: not valid YAML (a value is none of its type); mend the syntax.", recipe=text
        )
        for text in ("seed: !!int x", "seed: " + "1" * 5000, "name: 2020-13-45", "name: !!bool x")
    ),
    # Each merges or names the one before it twice: sixty steps that no memory holds written out.
    Case(
        "{here}/recipe.yaml, line 1: not valid YAML (a mapping has more than 10000 keys); mend the syntax.",
        recipe="name: [&a0 {k: 1}"
        + "".join(f", &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 60))
        + "]",
    ),
    Case(
        "{here}/recipe.yaml: name: input should be a valid string, not [['x'], ....",
        recipe="name: [&a0 [x]" + "".join(f", &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)) + "]",
    ),
    Case(
        "{here}/recipe.yaml: is longer than 1048576 characters; a recipe has some thousand.",
        recipe="#" * 2**20 + "\n",
    ),
    Case(
        "{here}/recipe.yaml: not valid YAML (special characters are not allowed); mend the syntax.",
        recipe="name: \x00",
    ),
    Case("{here}/recipe.yaml: key name is missing; add it (docs/guide.md lists all keys).", recipe="1: 2"),
    line("check {here}/nowhere.yaml", "{here}/nowhere.yaml: no such recipe; give the path of a YAML file."),
    line(
        "check {here}",
        "{here}: cannot be read as text ([Errno 21] Is a directory: '{here}'); give the path of a YAML file.",
    ),
    line(
        "ship {here}/nowhere.yaml --store {here}/s --release {here}/r",
        "{here}/nowhere.yaml: no such recipe; give the path of a YAML file.",
    ),
    line("fly", "No such command 'fly'" + HELP),
    line("check --fast", "No such option: --fast" + HELP),
    line("ship a b", "a: no such recipe; give the path of a YAML file."),
    line("compare-releases {here}", "There is nothing to compare; give two releases or more."),
    line("ship --store", "Option '--store' requires an argument" + HELP),
    line("export", "Missing argument 'model'" + HELP),
    line("export model", "Missing option '--output'" + HELP),
    line(
        "export {here}/nowhere --output {here}/out",
        "{here}/nowhere: no .safetensors file; export a folder with safetensors.",
    ),
    line(
        "export {here} --output {here}/out --format tflite",
        "--format: there is no format 'tflite'; choose gguf, mlc or onnx.",
    ),
    line(
        "export {here} --output {here}/out --quantization q9_9",
        "--quantization: gguf knows no 'q9_9'; choose from ....",
    ),
    line(
        "export {here} --output {here}/out --format onnx --quantization int3",
        "--quantization: onnx knows no 'int3'; choose from ....",
    ),
    line(
        "export {here} --output {here}/out --format mlc --quantization q1f1",
        "--quantization: mlc knows no 'q1f1'; choose from ....",
    ),
    line(
        "export {here} --output {here}/out --format gguf,mlc --quantization q8_0",
        "--quantization: names none for mlc; add one of ....",
    ),
    line(
        "export {here} --output {here}/out --format gguf,mlc --quantization q8_0,int4",
        "--quantization: gguf and mlc know no 'int4'; choose from ....",
    ),
    line(
        "export {here} --output {here}/out --format onnx --quantization fp32",
        "{here}: config.json is missing; give a Hugging Face folder.",
    ),
    line(
        "export {here} --output {here}/out --quantization f16",
        "{here}: no .safetensors file; export a folder with safetensors.",
    ),
    line(
        "validate {here}",
        "{here}/manifest.json: is missing or no manifest of martlet; give a release folder.",
    ),
    line(
        "validate {here}/nowhere",
        "{here}/nowhere/manifest.json: is missing or no manifest of martlet; give a release folder.",
    ),
    line(
        "verify {here}", "{here}/manifest.json: is missing or no manifest of martlet; give a release folder."
    ),
    line(
        "verify {here}/r",
        "{here}/r/manifest.json: is missing or no manifest of martlet; give a release folder.",
        files=(("r/manifest.json", "[]"),),
    ),
    line("sign {here}/r", "--key is missing; give an SSH key (ssh-keygen -t ed25519 makes one)."),
    line(
        "sign {here}/r --key {here}/text.txt",
        "{here}/r/manifest.json: is missing or no manifest of martlet; give a release folder.",
    ),
    line(
        "verify {here}/r --signed-by {here}/nobody",
        "manifest.json: does not say what the release was made from (no `inputs`). (2 more.)",
        files=(("r/manifest.json", '{"schema": "martlet-manifest-1", "files": {}}'),),
        code=1,
    ),
    line(
        "verify {here}/r",
        "{here}/r/../../x: lies outside the release. (2 more.)",
        files=(
            (
                "r/manifest.json",
                '{"schema": "martlet-manifest-1", "files": {"../../x": {"sha256": "", "bytes": 0}}}',
            ),
        ),
        code=1,
    ),
    line(
        "verify {here}/r",
        "manifest.json: inputs.packages.\\ud800: has no SHA-256. (1 more.)",
        files=(
            (
                "r/manifest.json",
                '{"schema": "martlet-manifest-1", "files": {}, "inputs": {'
                + "".join(f'"{part}": {{"sha256": "{"0" * 64}"}}, ' for part in ("recipe", "teacher", "code"))
                + f'"data": {{"text": {{"sha256": "{"0" * 64}"}}, "chats": {{"sha256": "{"0" * 64}"}}}}, '
                + r'"packages": {"\ud800": {}}}}',
            ),
        ),
        code=1,
    ),
    line(
        "validate {here}/r",
        "{here}/r/a: is missing.",
        files=(
            (
                "r/manifest.json",
                '{"schema": "martlet-manifest-1", "files": {"a": {"sha256": "", "bytes": 0}}}',
            ),
        ),
        code=1,
    ),
    line(
        "validate {here}/r",
        "{here}/r/manifest.json: is missing or no manifest of martlet; give a release folder.",
        files=(("r/manifest.json", '{"schema": "martlet-manifest-9", "files": {}}'),),
    ),
    line(
        "store list --store {here}/nowhere",
        "{here}/nowhere: no such store; give the folder that `martlet ship --store` wrote.",
    ),
    line(
        "store explain distill --store {here}",
        "{here}: holds no artifact 'distill'; martlet store list shows what it holds.",
    ),
    line(
        "store explain distill --store {here}/nowhere",
        "{here}/nowhere: no such store; give the folder that `martlet ship --store` wrote.",
    ),
    line(
        "store prune --store {here}",
        "martlet store prune: say what may go: --older-than DAYS, --keep GIGABYTES, or both.",
    ),
    line(
        "store prune --store {here} --older-than -1",
        "Invalid value for '--older-than': ...nput should be greater than or equal to 0" + HELP,
    ),
    line(
        "store prune --store {here} --older-than soon",
        "Invalid value for '--older-than': ...nput should be a valid number, unable to parse string as a number"
        + HELP,
    ),
    line(
        "store prune --store {here} --keep 1 --forget {here}/release",
        "{here}: knows no release {here}/release; it knows none.",
    ),
    line("store shrink", "No such command 'shrink'" + HELP),
    line(
        "chat {here}/nowhere.gguf",
        "{here}/nowhere.gguf: no such file or folder; give a model file or a release folder.",
    ),
    line(
        "chat {here}/text.txt",
        "{here}/text.txt: no model here; give a .gguf file, an .onnx file, an MLC folder or a Hugging Face folder.",
    ),
    line(
        "chat {here}/x.gguf",
        "{here}/x.gguf: is no GGUF file (it does not begin with GGUF).",
        files=(("x.gguf", "not a model"),),
    ),
    line(
        "chat {here}/x.gguf --threads 0",
        "Invalid value for '--threads': ...nput should be greater than or equal to 1" + HELP,
        files=(("x.gguf", "GGUF"),),
    ),
    line(
        "chat {here}/x.gguf",
        "{here}/x.gguf: its header goes beyond its end; it is truncated or damaged.",
        files=(("x.gguf", "GGUF\x03\x00\x00\x00"),),
    ),
    line(
        "publish {here}", "{here}/manifest.json: is missing or no manifest of martlet; give a release folder."
    ),
    line("publish {here} --to ftp", "--to: there is no 'ftp'; choose hub or folder."),
    line("publish {here} --yes", "--namespace is missing; give your name or an organization's on the hub."),
    line("publish {here} --to folder", "--folder is missing; say where the repositories go."),
    line(
        "choose {here}",
        "{here}/report.json: is missing or no report of martlet (...); give a release folder.",
    ),
    line(
        "choose {here} --max-size big",
        "--max-size: 'big' is no size; write bytes, or a number with kB, MB, GB, MiB or GiB.",
    ),
    line("phone {here}", "{here}: is no release of martlet; give a release folder."),
    line(
        "phone {here} --lan --adb",
        "--lan, --browser, --adb: are three ways to run the files; give one of them.",
    ),
    line("phone {here} --file x", "--file: is for --browser and --adb; the page itself offers every file."),
    line(
        "phone {here} --adb",
        "{here}/manifest.json: is missing or no manifest of martlet; give a release folder.",
    ),
    line(
        "evaluate {here}/nowhere.gguf",
        "{here}/nowhere.gguf: no such file or folder; give a model file or a release folder.",
    ),
    line(
        "evaluate {here}/text.txt",
        "{here}/text.txt: no model here; give a .gguf file, an .onnx file, an MLC folder or a Hugging Face folder.",
    ),
    line("compare {here}/nowhere.yaml", "{here}/nowhere.yaml: no such recipe; give the path of a YAML file."),
    line(
        "compare recipes/smoke.yaml --objectives hope", "--objectives: there is no 'hope'; choose from ...."
    ),
    line(
        "compare recipes/smoke.yaml --objectives taid,taid",
        "--objectives, --schedule: an entry is listed twice.",
    ),
    line("compare recipes/smoke.yaml --objectives ,", "--objectives: name at least one."),
    line(
        "compare recipes/smoke.yaml --seeds a",
        "--seeds: 'a' is no list of different whole numbers such as 0,1,2.",
    ),
    line("compare recipes/smoke.yaml --schedule x", "--schedule x: 'x' is not KEY=VALUE with a key of ...."),
    line("plan {here}/nowhere.yaml", "{here}/nowhere.yaml: no such recipe; give the path of a YAML file."),
    line("plan --devices 0", "--devices: 0 devices run nothing; give 1 or more."),
    line("plan --precision fp8", "--precision: there is no 'fp8'; choose bf16 or fp32."),
    line("plan --tflops 0", "--tflops: 0.0 is no throughput; give a number above 0."),
    line(
        "validate {here} --store {here}",
        "--store: is checked alone; leave the release out, or check it by itself.",
    ),
    line(
        "validate --store {here}/nowhere",
        "{here}/nowhere: no such store; give the folder that `martlet ship --store` wrote.",
    ),
)


@pytest.fixture
def recipe_values(tiny_model_dir: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "text.txt").write_text("One sentence. " * 50)
    (tmp_path / "talk.jsonl").write_text("{}\n")
    return {
        "name": "Tiny",
        "teacher": {"model": str(tiny_model_dir)},
        "data": {
            "text": {"sources": ["text.txt"], "train_tokens": 64},
            "chats": {"sources": ["talk.jsonl"], "conversations": 2},
        },
        "student": {"prune": {"layers": 2}},
        "instruct": {},
    }


def fits(sentence: str, said: str) -> bool:
    return re.fullmatch(re.escape(sentence).replace(r"\.\.\.", ".*"), said) is not None


@pytest.mark.parametrize("case", TABLE, ids=range(len(TABLE)))
def test_one_sentence_and_the_exit_code(
    case: Case, martlet: Call, recipe_values: dict[str, Any], tmp_path: Path
) -> None:
    for name, value in case.set:
        *sections, last = name.split(".")
        section = recipe_values
        for each in sections:
            section = section.setdefault(each, {})
        if value is NOTHING:
            del section[last]
        else:
            section[last] = value
    text = yaml.safe_dump(recipe_values) if case.recipe is None else case.recipe
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    for name, content in case.files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    before = set(tmp_path.rglob("*"))
    code, out, err = martlet(*case.arguments.format(here=tmp_path).split(" "))
    said = [each.removeprefix("martlet: ") for each in err.splitlines() if each.startswith("martlet: ")]
    assert "Traceback" not in err
    assert len(said) == 1, err
    assert fits(case.sentence.replace("{here}", str(tmp_path)), said[0]), said[0]
    assert code == case.code
    assert out == ""
    assert set(tmp_path.rglob("*")) == before, "something was written"


def test_the_table_has_at_least_eighty_cases_and_none_twice() -> None:
    assert len(TABLE) >= 80
    assert len(set(map(repr, TABLE))) == len(TABLE)
