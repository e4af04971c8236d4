"""Whatever a user gets wrong ends in one sentence, the right exit code, and nothing half-written."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pipeline.artifacts import damage

Call = Callable[..., tuple[int, str, str]]
Write = Callable[[dict[str, Any]], Path]


def assert_one_sentence(stderr: str, *parts: str) -> None:
    """The last line is martlet's sentence with all parts, the only one of its kind, and no traceback."""
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.startswith("martlet: ")]
    assert len(lines) == 1, stderr
    assert stderr.rstrip().splitlines()[-1] == lines[0]
    assert lines[0].endswith((".", ".)"))
    for part in parts:
        assert part in lines[0]


def assert_nothing_half_written(tmp_path: Path) -> None:
    """No release; in the store only whole artifacts, and what a stage needs to go on later."""
    assert not (tmp_path / "release").exists()
    for path in (tmp_path / "store").glob("*/*"):
        if path.parent.name in ("prefect", "quarantine", "logs") or path.suffix in (".lock", ".work"):
            continue
        assert path.suffix != ".partial"
        assert damage(path) is None


def change(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[last] = value


@pytest.mark.parametrize(
    ("key", "value", "in_sentence"),
    [
        ("distill.learning_rats", 1.0, "distill.learning_rats"),
        ("distill.learning_rate", "fast", "distill.learning_rate"),
        ("seed", "three", "seed"),
        ("data.text.sources", ["nowhere.txt"], "nowhere.txt"),
        ("data.chats.sources", ["nowhere.jsonl"], "nowhere.jsonl"),
        ("distill.t_start", 1.5, "distill.t_start"),
        ("distill", {"t_start": 0.9, "t_end": 0.4}, "t_start 0.9 is above t_end 0.4"),
        ("distill.epochs", 0, "distill.epochs"),
        ("data.text.train_tokens", 0, "data.text.train_tokens"),
        ("export.gguf", ["q9_9"], "q9_9"),
        ("export.onnx", ["int3"], "int3"),
        ("export.mlc", ["q1f1"], "q1f1"),
        ("student", {}, "student"),
        ("name", "../elsewhere", "name"),
        ("teacher.model", "package:no-such-package-here", "no-such-package-here"),
        ("teacher.model", "./no-such-folder", "no-such-folder"),
    ],
)
def test_check_refuses(
    martlet: Call,
    tiny_recipe: dict[str, Any],
    write_recipe: Write,
    tmp_path: Path,
    key: str,
    value: Any,
    in_sentence: str,
) -> None:
    change(tiny_recipe, key, value)
    recipe = write_recipe(tiny_recipe)
    code, out, err = martlet("check", recipe)
    assert code == 2
    assert out == ""
    assert_one_sentence(err, in_sentence, str(recipe))
    code, _, err = martlet("ship", recipe, "--store", tmp_path / "store", "--release", tmp_path / "release")
    assert code == 2
    assert_one_sentence(err, in_sentence)
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "release").exists()


def test_check_accepts(martlet: Call, tiny_recipe: dict[str, Any], write_recipe: Write) -> None:
    code, out, err = martlet("check", write_recipe(tiny_recipe))
    assert code == 0, err
    assert "Tiny" in out


@pytest.mark.parametrize(
    ("content", "in_sentence"),
    [("name: [", "YAML"), ("- a\n- b\n", "mapping"), ("", "mapping"), ("\x00", "YAML")],
)
def test_no_recipe_at_all(martlet: Call, tmp_path: Path, content: str, in_sentence: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content, encoding="utf-8")
    code, _, err = martlet("check", recipe)
    assert code == 2
    assert_one_sentence(err, in_sentence, str(recipe))


def test_missing_recipe(martlet: Call, tmp_path: Path) -> None:
    code, _, err = martlet("check", tmp_path / "nowhere.yaml")
    assert code == 2
    assert_one_sentence(err, "nowhere.yaml")


@pytest.mark.parametrize(
    "arguments", [("fly",), ("check", "--fast"), ("export", "model"), ("ship", "a", "b")]
)
def test_usage_errors(martlet: Call, arguments: tuple[str, ...]) -> None:
    code, _, err = martlet(*arguments)
    assert code == 2
    assert_one_sentence(err)


def test_teacher_without_safetensors(
    martlet: Call, tiny_recipe: dict[str, Any], write_recipe: Write, tiny_model_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    change(tiny_recipe, "teacher.model", "./pickled")
    code, _, err = martlet("check", write_recipe(tiny_recipe))
    assert code == 2
    assert_one_sentence(err, "pickled", "safetensors", "teacher.model")


def ship(martlet: Call, recipe: Path, folder: Path) -> tuple[int, str, str]:
    return martlet("ship", recipe, "--store", folder / "store", "--release", folder / "release")


@pytest.mark.parametrize(
    ("name", "content", "in_sentence"),
    [
        ("empty.txt", b"", "is empty"),
        ("empty.jsonl", b"\n\n", "is empty"),
        ("broken.jsonl", b'{"text": "one"}\n{"text": "two\n', "line 2"),
        ("no_field.jsonl", b'{"body": "one"}\n', "'text'"),
        ("latin.txt", b"caf\xe9", "UTF-8"),
        ("broken.parquet", b"PAR1 and nothing behind", "Parquet"),
        ("short.txt", b"Hardly a word.", "token"),
        ("text.docx", b"PK", "unknown kind"),
    ],
)
def test_bad_text(
    martlet: Call,
    prefect_server: None,
    tiny_recipe: dict[str, Any],
    write_recipe: Write,
    tmp_path: Path,
    name: str,
    content: bytes,
    in_sentence: str,
) -> None:
    (tmp_path / name).write_bytes(content)
    change(tiny_recipe, "data.text.sources", [str(tmp_path / name)])
    code, _, err = ship(martlet, write_recipe(tiny_recipe), tmp_path)
    assert code == 2, err
    assert_one_sentence(err, in_sentence)
    assert_nothing_half_written(tmp_path)


@pytest.mark.parametrize(
    ("content", "in_sentence"),
    [
        ("", "empty"),
        ('{"messages": []}\n', "line 1"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}\n', "assistant"),
        ('{"messages": [{"role": "parrot", "content": "Hi"}]}\n', "role"),
    ],
)
def test_bad_chats(
    martlet: Call,
    prefect_server: None,
    tiny_recipe: dict[str, Any],
    write_recipe: Write,
    tmp_path: Path,
    content: str,
    in_sentence: str,
) -> None:
    (tmp_path / "talk.jsonl").write_text(content, encoding="utf-8")
    change(tiny_recipe, "data.chats.sources", [str(tmp_path / "talk.jsonl")])
    code, _, err = ship(martlet, write_recipe(tiny_recipe), tmp_path)
    assert code == 2, err
    assert_one_sentence(err, in_sentence, "talk.jsonl")
    assert_nothing_half_written(tmp_path)


def test_teacher_and_student_with_different_tokenizers(
    martlet: Call,
    prefect_server: None,
    tiny_recipe: dict[str, Any],
    write_recipe: Write,
    tiny_model_dir: Path,
    tmp_path: Path,
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    first, second = (tokenizer.convert_ids_to_tokens(index) for index in (1000, 1001))
    swapped = text.replace(f'"{first}": 1000', f'"{first}": 1001').replace(
        f'"{second}": 1001', f'"{second}": 1000'
    )
    assert swapped != text
    (other / "tokenizer.json").write_text(swapped, encoding="utf-8")
    tiny_recipe["student"] = {"model": "./other"}
    code, _, err = ship(martlet, write_recipe(tiny_recipe), tmp_path)
    assert code == 2, err
    assert_one_sentence(err, "student.model", "tokenizer")
    assert_nothing_half_written(tmp_path)


def test_a_format_that_cannot_hold_the_student_is_told_before_training(
    martlet: Call, prefect_server: None, tiny_recipe: dict[str, Any], write_recipe: Write, tmp_path: Path
) -> None:
    del tiny_recipe["export"]["pre_tokenizer"]
    code, _, err = ship(martlet, write_recipe(tiny_recipe), tmp_path)
    assert code == 2, err
    assert_one_sentence(err, "export.gguf", "does not recognise this pre-tokenizer")
    assert not (tmp_path / "store" / "distill").exists()
    assert_nothing_half_written(tmp_path)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB, smaller than the tiny teacher."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("a small file system can be mounted only as root, where mounting is allowed")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_no_disk_space(
    martlet: Call, prefect_server: None, tiny_recipe: dict[str, Any], write_recipe: Write, full_disk: Path
) -> None:
    code, _, err = ship(martlet, write_recipe(tiny_recipe), full_disk)
    assert code == 2, err
    assert_one_sentence(err, "no space is left")
    assert_nothing_half_written(full_disk)


@pytest.mark.parametrize(
    ("arguments", "in_sentence"),
    [
        (("--format", "gguf", "--quantization", "q9_9"), "q9_9"),
        (("--format", "onnx", "--quantization", "int3"), "int3"),
        (("--format", "mlc", "--quantization", "q1f1"), "q1f1"),
        (("--format", "tflite"), "tflite"),
    ],
)
def test_export_refuses(
    martlet: Call, tiny_model_dir: Path, tmp_path: Path, arguments: tuple[str, ...], in_sentence: str
) -> None:
    code, _, err = martlet("export", tiny_model_dir, "--output", tmp_path / "out", *arguments)
    assert code == 2
    assert_one_sentence(err, in_sentence)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["gguf", "onnx", "mlc"])
def test_export_of_a_folder_without_a_model(martlet: Call, tmp_path: Path, format: str) -> None:
    (tmp_path / "empty").mkdir()
    quantization = {"gguf": "q8_0", "onnx": "fp32", "mlc": "q4f32_1"}[format]
    code, _, err = martlet(
        "export", tmp_path / "empty", "--output", tmp_path / "out", "--format", format,
        "--quantization", quantization,
    )  # fmt: skip
    assert code == 2
    assert_one_sentence(err, "empty")
    assert not (tmp_path / "out").exists()


def test_the_process_itself(tmp_path: Path) -> None:
    """What the shell sees, once: exit code and streams of the real process."""
    finished = subprocess.run(
        [sys.executable, "-m", "flows.command_line", "check", str(tmp_path / "nowhere.yaml")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert_one_sentence(finished.stderr, "nowhere.yaml")
    assert finished.stderr.count("\n") == 1
