"""The functions that MLC's engine calls: the paged cache against torch, sampling against numpy."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from test_families import gemma3, qwen3
from test_mlc import dequantized_model, logits_of
from transformers import PreTrainedTokenizerFast
from tvm import relax
from tvm.contrib import tvmjs

from export.mlc import export_mlc

IDS = np.random.default_rng(0).integers(3, 1700, 48).astype(np.int32)
VOCABULARY = 100


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The library of the tiny model in float32, its parameters as one tuple, its metadata, its folder."""
    return engine_of(tiny_model_dir, tmp_path_factory.mktemp("engine") / "out")


def engine_of(model_dir: Path, output_dir: Path) -> tuple[Any, list[Any], Any, Path]:
    folder = export_mlc(model_dir, output_dir, "t", "q0f32")
    (library,) = (folder / "libs").glob("*.so")
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu())
    metadata = json.loads(str(machine["_metadata"]()))
    arrays, _ = tvmjs.load_tensor_cache(str(folder), tvm.cpu())
    return machine, [arrays[each["name"]] for each in metadata["params"]], metadata, folder


def tensor(values: Any, dtype: str = "float32") -> Any:
    return tvm.runtime.tensor(np.asarray(values, dtype))


def run(engine: Any, cache: Any, name: str, lengths: dict[int, int], ids: Any, shape: Any, *more: Any) -> Any:
    """One call of a model function for some sequences, as the engine makes it."""
    machine, parameters, *_ = engine
    numbers = tvm.runtime.ShapeTuple(list(lengths))
    function = tvm.get_global_func
    function("vm.builtin.kv_state_begin_forward")(
        cache, numbers, tvm.runtime.ShapeTuple(list(lengths.values()))
    )
    embeddings = machine["embed"](tensor(ids, "int32"), parameters).numpy()
    logits, cache_again = machine[name](tensor(embeddings.reshape(*shape, -1)), *more, cache, parameters)
    assert cache_again.same_as(cache)
    function("vm.builtin.kv_state_end_forward")(cache)
    return logits.numpy()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_sequences_in_batches_are_what_torch_makes_of_each_alone(
    engine: Any,
    tiny_model_dir: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    family: str,
) -> None:
    """Over more tokens than Gemma's window of 16, a whole window at a time."""
    model_dir = tiny_model_dir
    if family != "llama":
        torch.manual_seed(7)
        model_dir = {"qwen3": qwen3, "gemma3": gemma3}[family](tiny_tokenizer, tmp_path / "model")
        engine = engine_of(model_dir, tmp_path / "out")
    machine, _, metadata, folder = engine
    rows = metadata["vocab_size"]
    one, other = IDS, IDS[::-1]
    model = dequantized_model(folder, model_dir)
    first, second = logits_of(model, one.tolist()), logits_of(model, other.tolist())
    close = partial(np.testing.assert_allclose, rtol=0, atol=1e-5 * np.abs(first).max())
    sizes = [tvm.runtime.ShapeTuple([size]) for size in (4, 256, 64, 16, 0)]
    cache = machine["create_tir_paged_kv_cache"](*sizes)
    for number in (0, 1):
        tvm.get_global_func("vm.builtin.kv_state_add_sequence")(cache, number)

    def prefill(lengths: dict[int, int], *begins: int) -> Any:
        parts = [
            ids[begin : begin + length]
            for ids, begin, length in zip((one, other), begins, lengths.values(), strict=True)
        ]
        last = np.cumsum(list(lengths.values())) - 1
        ids = np.concatenate(parts)
        return run(
            engine, cache, "batch_prefill", lengths, ids, (1, ids.size), tensor(last.tolist(), "int32")
        )

    logits = prefill({0: 16, 1: 5}, 0, 0)
    assert logits.shape == (1, 2, rows)
    close(logits[0], [first[15], second[4]])
    close(prefill({0: 3, 1: 16}, 16, 5)[0], [first[18], second[20]])
    close(prefill({0: 16, 1: 2}, 19, 21)[0], [first[34], second[22]])
    logits = run(engine, cache, "batch_decode", {0: 1, 1: 1}, [one[35], other[23]], (2, 1))
    assert logits.shape == (2, 1, rows)
    close(logits[:, 0], [first[35], second[23]])
    close(run(engine, cache, "batch_verify", {1: 4}, other[24:28], (1, 4))[0], second[24:28])
    close(run(engine, cache, "prefill", {0: 3}, one[36:39], (1, 3))[0, 0], first[38])
    for place in range(39, 47):
        close(run(engine, cache, "decode", {0: 1}, one[place : place + 1], (1, 1))[0, 0], first[place])


def test_metadata_is_what_the_engine_reads(engine: Any) -> None:
    machine, parameters, metadata, _ = engine
    assert metadata["kv_state_kind"] == "kv_cache"
    assert metadata["context_window_size"] == 512
    assert metadata["prefill_chunk_size"] == 512
    assert metadata["kv_cache"] == {
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
    for each, array in zip(metadata["params"], parameters, strict=True):
        assert (list(array.shape), str(array.dtype)) == (each["shape"], each["dtype"])
    for name in metadata["memory_usage"]:
        assert machine[name]


def test_logit_bias_penalties_and_bitmask(engine: Any) -> None:
    machine = engine[0]
    random = np.random.default_rng(1)
    start = random.normal(0, 2, (3, VOCABULARY)).astype(np.float32)

    logits = tensor(start)
    machine["apply_logit_bias_inplace"](
        logits, tensor([0, 2, 2], "int32"), tensor([5, 5, 9], "int32"), tensor([1.5, -2.0, 100.0])
    )
    wanted = start.copy()
    wanted[0, 5] += 1.5
    wanted[2, 5] -= 2.0
    wanted[2, 9] += 100.0
    np.testing.assert_allclose(logits.numpy(), wanted, rtol=1e-6)

    logits = tensor(start)
    sequences, rows, tokens, counts = [2, 0], [0, 0, 1], [7, 8, 7], [3, 1, 2]
    penalties = np.array([[0.5, 0.25, 1.3], [0.0, 0.1, 2.0]], np.float32)
    machine["apply_penalty_inplace"](
        logits, *(tensor(each, "int32") for each in (sequences, rows, tokens, counts)), tensor(penalties)
    )
    wanted = start.copy()
    for row, token, times in zip(rows, tokens, counts, strict=True):
        presence, frequency, repetition = penalties[row]
        value = wanted[sequences[row], token] - presence - times * frequency
        wanted[sequences[row], token] = value * repetition if value < 0 else value / repetition
    np.testing.assert_allclose(logits.numpy(), wanted, rtol=1e-5)

    logits = tensor(start)
    allowed = random.random((3, 128)) < 0.5
    words = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
    machine["apply_bitmask_inplace"](logits, tensor([0, 2], "int32"), tensor(words, "int32"))
    found = logits.numpy()
    np.testing.assert_array_equal(found[1], start[1])
    for row in (0, 2):
        keep = allowed[row, :VOCABULARY]
        np.testing.assert_array_equal(found[row, keep], start[row, keep])
        assert (found[row, ~keep] < -1e38).all()


def test_softmax_and_sampling_from_the_nucleus(engine: Any) -> None:
    machine = engine[0]
    random = np.random.default_rng(2)
    logits = random.normal(0, 3, (3, 1, VOCABULARY)).astype(np.float32)
    temperature = np.array([1.0, 0.5, 0.0], np.float32)
    probs = machine["softmax_with_temperature"](tensor(logits), tensor(temperature)).numpy()
    for row in (0, 1):
        scaled = logits[row, 0].astype(np.float64) / temperature[row]
        wanted = np.exp(scaled - scaled.max())
        np.testing.assert_allclose(probs[row, 0], wanted / wanted.sum(), rtol=1e-4, atol=1e-9)
    assert probs[2, 0].argmax() == logits[2, 0].argmax()
    assert probs[2, 0].max() == pytest.approx(1.0)
    assert probs[2, 0].sum() == pytest.approx(1.0)

    ordered, indices = (each.numpy() for each in machine["argsort_probs"](tensor(probs[:, 0])))
    np.testing.assert_array_equal(ordered, -np.sort(-probs[:, 0], axis=1))
    np.testing.assert_array_equal(np.take_along_axis(probs[:, 0], indices, 1), ordered)

    top_p = np.array([0.9, 0.3, 1.0], np.float32)
    rows = random.integers(0, 3, 500).astype(np.int32)
    uniform = random.random(500).astype(np.float32)
    found = machine["sample_with_top_p"](
        tensor(ordered), tensor(indices, "int32"), tensor(uniform), tensor(rows, "int32"), tensor(top_p)
    ).numpy()
    for token, row, u in zip(found, rows, uniform, strict=True):
        cumulative = np.cumsum(ordered[row].astype(np.float64))
        nucleus = int(np.searchsorted(cumulative, top_p[row] - 1e-6)) + 1
        place = int(np.flatnonzero(indices[row] == token)[0])
        assert place < nucleus
        mass = cumulative[nucleus - 1]
        before = cumulative[place - 1] if place else 0.0
        assert before - 1e-5 <= u * mass <= cumulative[place] + 1e-5
