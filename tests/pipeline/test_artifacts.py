"""The stage contract: complete or absent, never computed twice, damage found and healed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from export.errors import ExportError
from pipeline.artifacts import MANIFEST, Store, damage
from pipeline.errors import UserError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    lines: list[str] = []
    store = Store(tmp_path / "store", report=lines.append)
    store.lines = lines  # type: ignore[attr-defined]
    return store


def write_greeting(output: Path, work: Path) -> None:
    (output / "deep").mkdir()
    (output / "deep" / "greeting.txt").write_text("hello")


def must_not_run(output: Path, work: Path) -> None:
    raise AssertionError("computed twice")


def test_same_inputs_are_computed_once(store: Store) -> None:
    first = store.get_or_make("greet", 1, {"a": 1}, {"input": "abc"}, write_greeting)
    second = store.get_or_make("greet", 1, {"a": 1}, {"input": "abc"}, must_not_run)
    assert not first.cached
    assert second.cached
    assert (first.key, first.digest, first.path) == (second.key, second.digest, second.path)


@pytest.mark.parametrize(
    ("version", "parameters", "inputs", "seed"),
    [
        (2, {"a": 1}, {"input": "abc"}, 0),
        (1, {"a": 2}, {"input": "abc"}, 0),
        (1, {"a": 1}, {"input": "abd"}, 0),
        (1, {"a": 1}, {"other": "abc"}, 0),
        (1, {"a": 1}, {"input": "abc"}, 1),
    ],
)
def test_any_difference_makes_another_artifact(
    store: Store, version: int, parameters: dict, inputs: dict, seed: int
) -> None:
    first = store.get_or_make("greet", 1, {"a": 1}, {"input": "abc"}, write_greeting)
    other = store.get_or_make("greet", version, parameters, inputs, write_greeting, seed)
    assert other.key != first.key
    assert other.digest == first.digest  # the content is the same, only what it depends on is not


def test_key_order_of_parameters_does_not_matter(store: Store) -> None:
    store.get_or_make("greet", 1, {"a": 1, "b": 2}, {}, write_greeting)
    assert store.get_or_make("greet", 1, {"b": 2, "a": 1}, {}, must_not_run).cached


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "add", "manifest"])
def test_damage_is_named_put_aside_and_healed(store: Store, harm: str) -> None:
    artifact = store.get_or_make("greet", 1, {}, {}, write_greeting)
    file = artifact.path / "deep" / "greeting.txt"
    if harm == "flip":
        file.write_text("hellp")
    elif harm == "truncate":
        file.write_text("hell")
    elif harm == "delete":
        file.unlink()
    elif harm == "add":
        file = artifact.path / "stray.txt"
        file.write_text("x")
    else:
        file = artifact.path / MANIFEST
        file.write_text("{")
    problem = damage(artifact.path)
    assert problem is not None
    assert str(file) in problem
    healed = store.get_or_make("greet", 1, {}, {}, write_greeting)
    assert not healed.cached
    assert healed.digest == artifact.digest
    assert damage(healed.path) is None
    assert any(str(file) in line for line in store.lines)  # type: ignore[attr-defined]
    assert len(list((store.root / "quarantine").iterdir())) == 1


@pytest.mark.parametrize("ends", ["as if nothing had happened", "with an error"])
def test_an_input_that_is_damaged_while_it_is_used(store: Store, ends: str) -> None:
    """What was made of it is not kept, nor are the checkpoints; the next run makes both anew."""
    first = store.get_or_make("greet", 1, {}, {}, write_greeting)
    file = first.path / "deep" / "greeting.txt"

    def make(output: Path, work: Path) -> None:
        (work / "checkpoint").write_text("7")
        file.write_text("hellp")
        write_greeting(output, work)
        if ends == "with an error":
            raise ValueError("what is this?")

    with pytest.raises(UserError, match=r"greeting\.txt is damaged .*; that happened while it was in use"):
        store.get_or_make("answer", 1, {}, {"greeting": first}, make)
    assert [path.suffix for path in (store.root / "answer").iterdir()] == [".lock"]
    healed = store.get_or_make("greet", 1, {}, {}, write_greeting)
    assert (healed.cached, healed.digest) == (False, first.digest)
    assert not store.get_or_make("answer", 1, {}, {"greeting": healed}, write_greeting).cached


def test_an_input_that_was_only_touched_is_read_again(store: Store) -> None:
    first = store.get_or_make("greet", 1, {}, {}, write_greeting)

    def make(output: Path, work: Path) -> None:
        os.utime(first.path / "deep" / "greeting.txt")
        write_greeting(output, work)

    store.get_or_make("answer", 1, {}, {"greeting": first}, make)


@pytest.mark.parametrize("name", ["a" * 256, "a/" * 600 + "a", "a\nb", "\ud800", "../x", "/etc/hostname", ""])
def test_names_that_no_stage_gives_its_files(store: Store, name: str) -> None:
    """In a manifest that says nothing of itself, as earlier versions wrote them."""
    made = store.get_or_make("greet", 1, {}, {}, write_greeting)
    manifest = made.manifest()
    del manifest["manifest_sha256"]
    manifest["files"][name] = {"sha256": "0" * 64, "bytes": 5}
    (made.path / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    assert damage(made.path) == f"{made.path / MANIFEST} is missing or damaged"
    assert not store.get_or_make("greet", 1, {}, {}, write_greeting).cached


def test_failed_stage_leaves_nothing_but_its_work(store: Store) -> None:
    def fail(output: Path, work: Path) -> None:
        (output / "half.bin").write_text("half")
        (work / "checkpoint").write_text("7")
        raise UserError("no")

    with pytest.raises(UserError):
        store.get_or_make("greet", 1, {}, {}, fail)
    folders = {path.name.split(".", 1)[1] for path in (store.root / "greet").iterdir()}
    assert folders == {"work", "lock"}

    def go_on(output: Path, work: Path) -> None:
        assert (work / "checkpoint").read_text() == "7"
        write_greeting(output, work)

    artifact = store.get_or_make("greet", 1, {}, {}, go_on)
    assert not artifact.path.with_name(artifact.path.name + ".work").exists()


SLOW_STAGE = """
import sys, time
from pathlib import Path
from pipeline.artifacts import Store
def make(output, work):
    with open({log!r}, "a") as log: log.write("made\\n")
    (output / "half.txt").write_text("half")
    time.sleep({sleep})
    (output / "half.txt").write_text("whole")
Store(Path({root!r})).get_or_make("slow", 1, {{}}, {{}}, make)
"""


def start(tmp_path: Path, sleep: float) -> subprocess.Popen:
    code = SLOW_STAGE.format(log=str(tmp_path / "log"), root=str(tmp_path / "store"), sleep=sleep)
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_stage_is_made_anew_and_whole(tmp_path: Path) -> None:
    process = start(tmp_path, 60)
    wait_for(tmp_path / "log")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert start(tmp_path, 0).wait(timeout=60) == 0
    (folder,) = [path for path in (tmp_path / "store" / "slow").iterdir() if "." not in path.name]
    assert (folder / "half.txt").read_text() == "whole"
    assert damage(folder) is None


def test_two_runs_at_once_compute_once(tmp_path: Path) -> None:
    processes = [start(tmp_path, 1.0) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert (tmp_path / "log").read_text() == "made\n"


def test_manifest_says_what_it_was_made_from(store: Store) -> None:
    first = store.get_or_make("greet", 1, {"a": 1}, {}, write_greeting, seed=3)
    second = store.get_or_make("answer", 1, {}, {"greeting": first}, write_greeting)
    manifest = json.loads((second.path / MANIFEST).read_text())
    assert manifest["inputs"] == {"greeting": first.digest}
    assert manifest["input_artifacts"]["greeting"] == {"stage": "greet", "key": first.key}
    assert manifest["files"]["deep/greeting.txt"]["bytes"] == 5
    assert manifest["packages"]["torch"]
    assert first.manifest()["seed"] == 3


def test_full_disk_is_one_sentence_and_nothing_half_written(store: Store) -> None:
    def fill(output: Path, work: Path) -> None:
        (output / "half.bin").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="no space is left on the disk while greet wrote its result"):
        store.get_or_make("greet", 1, {}, {}, fill)
    assert not list((store.root / "greet").glob("*.partial"))


def numpy_says(output: Path) -> None:
    np.save(output / "x.npy", np.zeros(1 << 20))


def safetensors_says(output: Path) -> None:
    save_file({"x": torch.zeros(1 << 20)}, output / "x.safetensors")


def torch_says(output: Path) -> None:
    torch.save(torch.zeros(1 << 20), output / "x.pt")


def tokenizers_says(output: Path) -> None:
    Tokenizer(models.BPE({f"{n:09}": n for n in range(100_000)}, [])).save(str(output / "tokenizer.json"))


def a_process_says(output: Path) -> None:
    raise ExportError("x.gguf: cannot be written (OSError: [Errno 28] No space left on device).")


def nobody_says(output: Path) -> None:
    """As a process that could not even write its log."""
    try:
        (output / "x").write_bytes(bytes(1 << 23))
    except OSError:
        raise RuntimeError("failed") from None


@pytest.mark.parametrize(
    "write",
    [numpy_says, safetensors_says, torch_says, tokenizers_says, a_process_says, nobody_says],
    ids=lambda write: write.__name__,
)
def test_a_full_disk_is_told_whatever_a_library_makes_of_it(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    """A real file system of 1 MiB; each library wraps the system's error in its own way."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("a small file system can be mounted only as root, where mounting is allowed")
    try:
        store = Store(tmp_path / "store", report=lambda line: None)
        with pytest.raises(UserError, match="no space is left on the disk while greet wrote its result"):
            store.get_or_make("greet", 1, {}, {}, lambda output, work: write(output))
        assert not list((store.root / "greet").glob("*.partial"))
        assert store.get_or_make("greet", 1, {}, {}, write_greeting).path.is_dir()
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**45), lambda: np.empty(2**45)])
def test_memory_that_is_not_there_is_told(store: Store, allocate: Callable[[], Any]) -> None:
    def make(output: Path, work: Path) -> None:
        allocate()

    with pytest.raises(UserError, match=r"greet: there is not enough memory; free some"):
        store.get_or_make("greet", 1, {}, {}, make)
