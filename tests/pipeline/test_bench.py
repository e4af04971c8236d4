"""The bench stage on real files: its numbers against clocks and counters of their own."""

import json
import os
import queue
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.errors import ExportError
from pipeline import bench, cgroups
from pipeline.artifacts import Artifact, Store, write_json
from pipeline.bandwidth import bytes_read_per_token, read_bandwidth
from pipeline.bench_worker import cpu_stall_seconds, disk_bytes, evict, files_of, measure, measure_depths
from pipeline.errors import UserError
from pipeline.memory import memory
from pipeline.profiles import load_profile
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
    # One thread keeps at most one processor busy, its interpreter's helpers aside.
    assert 0 < entry["processors_busy"] < 1.6
    assert entry["pss_bytes"] > entry["rss_anon_bytes"] / 2
    assert (entry["bytes_read_per_token"], entry["bandwidth_utilisation"]) == (None, None)
    assert 1e8 < entry["memory_bytes_per_s"] < 1e12
    assert entry["backend"]["requested"] == {"device": "cpu", "threads": 1}
    assert entry["backend"]["effective"]["version"] == torch.__version__
    assert entry["backend"]["fallbacks"] == []
    assert (entry["cpu_pressure_before"] is None) is (entry["cpu_pressure"] is None)
    if entry["energy"]["source"] == "model":
        low, high = (entry["energy"][f"joules_per_token_{end}"] for end in ("low", "high"))
        assert [low, high] == pytest.approx([watts * entry["cpu_seconds_per_token"] for watts in (2, 15)])
    assert entry["reliable"] is (entry["cpu_pressure"] is not None)
    again, _ = run(inputs, recipe())
    assert again.cached


def test_a_second_run_on_this_machine_waits_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs with different stores, too: two would measure each other."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    said: queue.Queue[str] = queue.Queue()
    entered = threading.Event()

    def second() -> None:
        with bench.alone_on_this_machine(Store(tmp_path / "other", said.put)):
            entered.set()

    waiting = threading.Thread(target=second)
    with bench.alone_on_this_machine(Store(tmp_path / "store", pytest.fail)):
        waiting.start()
        assert said.get(timeout=20) == "waiting: another run is measuring on this machine"
        assert not entered.is_set()
    waiting.join(20)
    assert entered.is_set()


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


def test_sweep_depths_and_cold_start_are_measured_when_asked_for(inputs: dict[str, Any]) -> None:
    _, (entry,) = run(inputs, recipe(thread_sweep=[2], depths=[0, 200], repetitions=1, cold_start=True))
    (two,) = entry["thread_sweep"]
    assert two["threads"] == 2
    assert two["decode_tokens_per_s"] > 0
    assert [point["depth"] for point in entry["depths"]] == [0, 200]  # deeper than the held-out text is long
    assert all(point["decode_tokens_per_s"] > 0 for point in entry["depths"])
    cold = entry["cold_start"]
    assert 0 < cold["load_s"] < cold["first_token_s"]
    if cold["cold"]:
        assert cold["read_bytes"] > 1_000_000
    for timed in [cold, *entry["depths"]]:
        assert timed["reliable"] is (timed["cpu_pressure"] is not None)


@pytest.fixture
def control_groups() -> None:
    try:
        with cgroups.limited(64 << 20, 1.0):
            pass
    except cgroups.Unavailable as problem:
        pytest.skip(f"no control groups here: {problem}")


def test_profiles_decide_by_what_a_file_does_within_them(
    inputs: dict[str, Any], control_groups: None, tmp_path: Path
) -> None:
    budget = "processors: 1.5\nthreads: 1\nprompt_tokens: 4\ngenerated_tokens: 2\n"
    profiles = {
        "enough": "memory_mb: 4096\nmin_decode_tokens_per_s: 0.001\n",
        "slow": "memory_mb: 4096\nmin_decode_tokens_per_s: 1.0e+9\n",
        "tight": "memory_mb: 24\nmin_decode_tokens_per_s: 0.001\n",
    }
    paths = []
    for name, lines in profiles.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"name: {name}\n{lines}{budget}")
        paths.append(str(path))
    _, (entry,) = run(inputs, recipe(profiles=paths, repetitions=1, cold_start=False))
    found = {result["profile"]: result for result in entry["profiles"]}
    assert found["enough"]["status"] == "passed"
    for result in found.values():
        assert result["reliable"] is (result["cpu_pressure_before"] is not None)
    assert found["enough"]["first_token_s"] > 0
    assert found["slow"]["status"] == "failed"
    assert "at least 1e+09 are asked for" in found["slow"]["reason"]
    assert (found["tight"]["status"], found["tight"]["decode_tokens_per_s"]) == ("failed", None)
    assert "more than 24 MB and was killed" in found["tight"]["reason"]


def test_a_file_that_is_not_done_in_time_fails_its_profile_and_not_the_run(
    tiny_model_dir: Path, control_groups: None, tmp_path: Path
) -> None:
    path = tmp_path / "crawling.yaml"
    path.write_text(
        "name: crawling\nmemory_mb: 4096\nprocessors: 0.01\nthreads: 1\nprompt_tokens: 4\n"
        "generated_tokens: 2\nmin_decode_tokens_per_s: 0.001\n"
    )
    request = {"file": str(tiny_model_dir), "timeout_s": 3}
    found = bench._under_profile(load_profile(path), request, [3, 4, 5, 6], tmp_path, tmp_path / "log")
    assert (found["status"], found["reason"]) == ("failed", "It was not done after 3 s (bench.timeout_s).")
    assert found["decode_tokens_per_s"] is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: x\nmemory_mb: 8\n", "memory_mb"),
        ("name: x\nsurprise: 1\n", "memory_mb|surprise"),
        ("- a list", "mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_wrong_profile_is_a_user_error(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "profile.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        load_profile(tmp_path / "profile.yaml")


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "profiles").glob("*.yaml")))
def test_profiles_of_the_project_are_valid(path: Path) -> None:
    load_profile(path)


def test_a_measurement_that_takes_too_long_ends(inputs: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"tiny: took longer than bench\.timeout_s, 0\.01 s"):
        run(inputs, recipe(timeout_s=0.01))


def test_a_depth_fills_the_cache_before_decoding(tiny_model_dir: Path) -> None:
    shallow, deep = measure_depths(tiny_model_dir, list(range(3, 67)), [1, 450], 4, 3, 1)
    assert shallow["depth"] == 1
    assert deep["depth"] == 450
    assert min(shallow["decode_tokens_per_s"], deep["decode_tokens_per_s"]) > 0


def test_weights_read_per_token_leave_out_an_embedding_that_is_only_looked_up(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")

    def write(name: str, tensors: dict[str, np.ndarray]) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        for key, value in tensors.items():
            writer.add_tensor(key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    embedding, block = np.ones((64, 32), np.float32), np.ones((32, 32), np.float16)
    tied = write("tied.gguf", {"token_embd.weight": embedding, "blk.0.attn_q.weight": block})
    assert bytes_read_per_token(tied) == embedding.nbytes + block.nbytes
    untied = write(
        "untied.gguf", {"token_embd.weight": embedding, "output.weight": embedding, "blk.0.ffn.weight": block}
    )
    assert bytes_read_per_token(untied) == embedding.nbytes + block.nbytes


def test_weights_read_per_token_of_an_onnx_graph(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    embedding = numpy_helper.from_array(np.ones((64, 32), np.float32), "embedding")
    head = numpy_helper.from_array(np.ones((32, 64), np.float32), "head")
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["embedding", "ids"], ["hidden"]),
            helper.make_node("MatMul", ["hidden", "head"], ["logits"]),
        ],
        "decoder",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 64])],
        [embedding, head],
    )
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    assert bytes_read_per_token(tmp_path / "model.onnx") == 32 * 64 * 4


def test_bandwidth_is_that_of_memory() -> None:
    # No processor that runs this reads less than 0.1 or more than 1000 GB/s.
    assert 1e8 < read_bandwidth(1, passes=2) < 1e12


def test_an_evicted_file_is_read_from_disk_again(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(os.urandom(8 << 20))
    (tmp_path / "model.onnx_data").write_bytes(b"more")
    assert files_of(file) == [file, tmp_path / "model.onnx_data"]
    evict(file)
    before = disk_bytes()
    if before is None:
        pytest.skip("the kernel does not count what a process reads from disk")
    file.read_bytes()
    read = disk_bytes() - before  # type: ignore[operator]
    if read == 0:
        pytest.skip("this file system keeps its pages in memory")
    assert read >= 4 << 20


def test_the_rest_after_the_warm_up_is_taken_and_not_timed(tiny_model_dir: Path) -> None:
    settle = 2.0
    started = time.perf_counter()
    result = measure(tiny_model_dir, list(range(3, 27)), 4, 1, 1, settle_s=settle)
    wall = time.perf_counter() - started
    timed = result["load_s"] + result["ttft_s"] + 4 / result["decode_tokens_per_s"]
    assert wall - timed >= settle
    started = time.perf_counter()
    (depth,) = measure_depths(tiny_model_dir, list(range(3, 27)), [8], 4, 1, 1, settle_s=settle)
    assert time.perf_counter() - started >= settle + 4 / depth["decode_tokens_per_s"]


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
