"""The bench stage on real files: its numbers against clocks and counters of their own."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.errors import ExportError
from pipeline import bench
from pipeline.artifacts import Artifact, Store, write_json
from pipeline.bench_worker import cpu_stall_seconds, measure
from pipeline.errors import UserError
from pipeline.memory import memory
from pipeline.recipe import Recipe

PROMPT, GENERATED, REPETITIONS = 24, 8, 3


def recipe(**section: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "Tiny",
            "teacher": {"model": "unused"},
            "data": {
                "text": {"sources": ["unused.txt"], "train_tokens": 1},
                "chats": {"sources": ["unused.jsonl"], "conversations": 1},
            },
            "student": {"prune": {"layers": 1}},
            "instruct": {},
            "bench": {
                "prompt_tokens": PROMPT,
                "generated_tokens": GENERATED,
                "repetitions": REPETITIONS,
                "max_cpu_pressure": 100,
                **section,
            },
        }
    )


@pytest.fixture(scope="module")
def inputs(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A store with a model folder as the file to measure (torch runs it), and held-out text."""
    store = Store(tmp_path_factory.mktemp("store"), lambda line: None)

    def export(output: Path, work: Path) -> None:
        shutil.copytree(tiny_model_dir, output / "files" / "tiny")
        entry = {"path": "files/tiny", "format": "safetensors", "quantization": "float32", "bytes": 1234}
        write_json(output / "files.json", [entry])

    def text(output: Path, work: Path) -> None:
        np.save(output / "held_out.npy", np.arange(3, 67, dtype=np.int32).reshape(2, 32))

    return {
        "store": store,
        "exported": store.get_or_make("export_safetensors", 1, {}, {}, export),
        "text": store.get_or_make("text", 1, {}, {}, text),
    }


def run(inputs: dict[str, Any], wanted: Recipe) -> tuple[Artifact, list[dict[str, Any]]]:
    artifact = bench.run(inputs["store"], wanted, inputs["exported"], inputs["text"])
    return artifact, json.loads((artifact.path / "device.json").read_text())


def test_a_file_is_measured_once(inputs: dict[str, Any]) -> None:
    started = time.perf_counter()
    _, entries = run(inputs, recipe())
    wall = time.perf_counter() - started
    (entry,) = entries
    assert entry["file"] == "tiny"
    assert (entry["format"], entry["quantization"], entry["bytes"]) == ("safetensors", "float32", 1234)
    assert (entry["runtime"], entry["threads"], entry["repetitions"]) == ("torch", 1, REPETITIONS)
    assert (entry["prompt_tokens"], entry["generated_tokens"]) == (PROMPT, GENERATED)
    # The parts cannot take longer than the whole, and a rate is a number of tokens over such a part.
    one = entry["ttft_s"] + GENERATED / entry["decode_tokens_per_s"]
    assert 0 < entry["load_s"] + REPETITIONS * one * 0.9 < wall
    assert entry["prefill_tokens_per_s"] >= PROMPT / entry["ttft_s"] * 0.999  # a mean of rates, Jensen
    # One thread cannot use more CPU time than passes, torch's own helpers aside.
    assert 0 < entry["cpu_seconds_per_token"] < 2 * wall / (REPETITIONS * (PROMPT + GENERATED))
    assert entry["peak_rss_bytes"] >= entry["rss_anon_bytes"] > entry["rss_anon_before_load_bytes"] > 0
    assert entry["rss_file_bytes"] > 0
    assert entry["reliable"] is (entry["cpu_pressure"] is not None)
    again, _ = run(inputs, recipe())
    assert again.cached


@pytest.mark.parametrize(
    ("pressure", "limit", "reliable"), [(30.0, 30.0, True), (30.1, 30.0, False), (None, 100.0, False)]
)
def test_above_the_stated_pressure_a_timing_is_unreliable(
    pressure: float | None, limit: float, reliable: bool
) -> None:
    assert bench.is_reliable(pressure, limit) is reliable


def test_more_prompt_than_text_is_a_user_error(inputs: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"bench\.prompt_tokens: 65 .* only 64 tokens"):
        run(inputs, recipe(prompt_tokens=65))


def test_a_file_that_cannot_run_is_a_user_error(inputs: dict[str, Any]) -> None:
    def export(output: Path, work: Path) -> None:
        (output / "files").mkdir()
        (output / "files" / "tiny.gguf").write_bytes(b"GGUF but not really")
        entry = {"path": "files/tiny.gguf", "format": "gguf", "quantization": "q8_0", "bytes": 19}
        write_json(output / "files.json", [entry])

    broken = inputs | {"exported": inputs["store"].get_or_make("export_gguf", 1, {}, {}, export)}
    with pytest.raises(UserError, match=r"^tiny\.gguf: cannot be measured \(.*llama\.cpp cannot load"):
        run(broken, recipe())


def test_one_repetition_has_no_spread(tiny_model_dir: Path) -> None:
    result = measure(tiny_model_dir, list(range(3, 27)), 4, 1, 1)
    assert result["decode_std"] == result["prefill_std"] == 0
    assert result["repetitions"] == 1


def test_a_path_without_a_model_is_an_export_error(tiny_model_dir: Path) -> None:
    with pytest.raises(ExportError, match="no model here"):
        measure(tiny_model_dir / "nothing", [3, 4], 4, 1, 1)


def test_memory_is_the_kernels_and_sees_an_allocation() -> None:
    before = memory()
    kept = np.ones(32 << 20, dtype=np.uint8)
    after = memory()
    assert 31 << 20 < after["RssAnon"] - before["RssAnon"] < 40 << 20
    assert after["VmHWM"] >= after["RssAnon"]
    del kept


@pytest.mark.skipif(not Path("/proc/pressure/cpu").exists(), reason="the kernel counts no CPU pressure")
def test_stalls_grow_when_more_processes_run_than_cpus() -> None:
    before = cpu_stall_seconds()
    assert before is not None
    children = []
    for _ in range(len(os.sched_getaffinity(0)) + 2):
        child = os.fork()
        if child == 0:
            end = time.monotonic() + 0.4
            while time.monotonic() < end:
                pass
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    after = cpu_stall_seconds()
    assert after is not None
    assert after > before
