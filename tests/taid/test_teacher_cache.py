"""The hidden-state cache: exact, resumable after a kill, and never trusted when it does not fit."""

import errno
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
)

from taid import CachedTeacher, LiveTeacher, TaidError, Teacher, write_hidden_state_cache
from taid.cache import _write_npy
from taid.heads import head_options, head_weight

BLOCKS, LENGTH, WIDTH = 10, 8, 128
SHARD_BYTES = 4 * LENGTH * WIDTH * 4  # four blocks a shard in float32


@pytest.fixture(scope="module")
def finished(model, token_blocks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "finished"
    write_hidden_state_cache(model, token_blocks, folder, batch_size=2, shard_bytes=SHARD_BYTES)
    return folder


@pytest.fixture
def cache(finished, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(finished, tmp_path / "cache")


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def reference(model, token_blocks) -> torch.Tensor:
    """The head applied to these gives the model's logits: they are final and after the norm."""
    with torch.no_grad():
        output = model(torch.from_numpy(token_blocks).long(), output_hidden_states=True)
        torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    return output.hidden_states[-1]


def test_cached_states_are_the_models(model, token_blocks, finished):
    teacher = CachedTeacher(finished)
    assert isinstance(teacher, Teacher)
    assert len(list(finished.glob("hidden-*.npy"))) == 3
    index = torch.tensor([9, 0, 4, 3])
    hidden = teacher.hidden_states(torch.from_numpy(token_blocks[index]).long(), index)
    assert hidden.dtype == torch.float32
    torch.testing.assert_close(hidden, reference(model, token_blocks)[index], rtol=1e-5, atol=1e-5)
    assert torch.equal(teacher.head_weight, model.lm_head.weight)
    assert teacher.vocabulary_size == model.config.vocab_size
    assert teacher.head_bias is None


def test_live_and_cached_have_one_interface(model, token_blocks, finished):
    live = LiveTeacher(model)
    assert isinstance(live, Teacher)
    input_ids = torch.from_numpy(token_blocks[:2]).long()
    index = torch.arange(2)
    states = live.hidden_states(input_ids, index)
    assert torch.equal(states, CachedTeacher(finished).hidden_states(input_ids, index))
    assert not states.requires_grad
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_half_precision_is_rounded_once(model, token_blocks, tmp_path, dtype, tolerance):
    write_hidden_state_cache(model, token_blocks, tmp_path / "cache", dtype=dtype, batch_size=2)
    teacher = CachedTeacher(tmp_path / "cache")
    index = torch.arange(BLOCKS)
    hidden = teacher.hidden_states(torch.from_numpy(token_blocks).long(), index)
    assert hidden.dtype == getattr(torch, dtype)
    torch.testing.assert_close(
        hidden.float(), reference(model, token_blocks), rtol=1.01 * tolerance, atol=1e-4
    )
    stored = np.load(tmp_path / "cache" / "hidden-00000.npy", allow_pickle=False)
    assert stored.itemsize == 2


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_an_interrupted_pass_goes_on_at_the_shard(model, token_blocks, finished, tmp_path, after):
    calls = []

    def stop(done, total):
        calls.append(done)
        if len(calls) == after:
            raise Killed

    arguments = {"batch_size": 2, "shard_bytes": SHARD_BYTES}
    with pytest.raises(Killed):
        write_hidden_state_cache(model, token_blocks, tmp_path / "cache", progress=stop, **arguments)
    with pytest.raises(TaidError, match="is missing; finish it"):
        CachedTeacher(tmp_path / "cache")
    complete = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("hidden-*.npy")}
    computed = []
    handle = model.model.register_forward_hook(lambda *_: computed.append(1))
    write_hidden_state_cache(model, token_blocks, tmp_path / "cache", **arguments)
    handle.remove()
    assert len(computed) == 5 - 2 * len(complete)
    assert {path: path.stat().st_mtime_ns for path in complete} == complete
    assert contents(tmp_path / "cache") == contents(finished)


def _write_and_die(model_folder, token_blocks, folder) -> None:
    def die(done, total):
        if done == 6:
            os._exit(9)

    torch.set_num_threads(1)
    loaded = AutoModelForCausalLM.from_pretrained(model_folder)
    write_hidden_state_cache(
        loaded, token_blocks, folder, batch_size=2, progress=die, shard_bytes=SHARD_BYTES
    )


def test_a_killed_process_is_gone_on_from(model, tiny_model_dir, token_blocks, finished, tmp_path):
    process = multiprocessing.get_context("spawn").Process(
        target=_write_and_die, args=(tiny_model_dir, token_blocks, tmp_path / "cache")
    )
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert len(list((tmp_path / "cache").glob("hidden-*.npy"))) == 1
    write_hidden_state_cache(model, token_blocks, tmp_path / "cache", batch_size=2, shard_bytes=SHARD_BYTES)
    assert contents(tmp_path / "cache") == contents(finished)


def test_a_shard_damaged_before_the_end_is_written_anew(model, token_blocks, cache, finished):
    (cache / "cache.json").unlink()
    shard = cache / "hidden-00001.npy"
    shard.write_bytes(shard.read_bytes()[:-40])
    (cache / "hidden-00002.npy.partial").write_bytes(b"half")
    (cache / "hidden-00002.npy").unlink()
    write_hidden_state_cache(model, token_blocks, cache, batch_size=2, shard_bytes=SHARD_BYTES)
    assert contents(cache) == contents(finished)


def test_a_finished_cache_is_left_alone(model, token_blocks, cache):
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    progress = []
    handle = model.model.register_forward_hook(lambda *_: pytest.fail("the teacher ran again"))
    write_hidden_state_cache(
        model,
        token_blocks,
        cache,
        batch_size=2,
        shard_bytes=SHARD_BYTES,
        progress=lambda done, total: progress.append((done, total)),
    )
    handle.remove()
    assert progress == [(BLOCKS, BLOCKS)]
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before


@pytest.mark.parametrize("ready", [True, False])
def test_other_data_teacher_or_type_is_refused(model, token_blocks, cache, ready):
    if not ready:
        (cache / "cache.json").unlink()
    arguments = {"batch_size": 2, "shard_bytes": SHARD_BYTES}
    with pytest.raises(TaidError, match="data_digest"):
        write_hidden_state_cache(model, token_blocks + 1, cache, **arguments)
    with pytest.raises(TaidError, match="dtype float32, not bfloat16"):
        write_hidden_state_cache(model, token_blocks, cache, dtype="bfloat16", **arguments)
    with pytest.raises(TaidError, match="data_digest"):
        write_hidden_state_cache(model, token_blocks[:4], cache, **arguments)
    weight = model.model.norm.weight
    with torch.no_grad():
        weight[0] += 0.5
        try:
            with pytest.raises(TaidError, match="teacher_digest"):
                write_hidden_state_cache(model, token_blocks, cache, **arguments)
        finally:
            weight[0] -= 0.5


def test_somebody_elses_folder_is_not_touched(model, token_blocks, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(TaidError, match="holds no cache"):
        write_hidden_state_cache(model, token_blocks, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["hidden-00001.npy", "head.safetensors", "tokens.npy"])
def test_damage_is_named(cache, name):
    path = cache / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(TaidError, match=f"{name}: is damaged"):
        CachedTeacher(cache)
    path.unlink()
    with pytest.raises(TaidError, match=f"{name}: is missing"):
        CachedTeacher(cache)
    with pytest.raises(TaidError, match=name):
        CachedTeacher(cache, verify=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "no mapping"),
        ("{}", "not a hidden-state cache"),
        (json.dumps({"format": "taid-hidden-states", "version": 2}), "incomplete"),
    ],
)
def test_a_broken_description_is_named(cache, content, message):
    (cache / "cache.json").write_text(content)
    with pytest.raises(TaidError, match=message):
        CachedTeacher(cache)


def test_a_shard_of_another_type_is_named(cache):
    shard = next(cache.glob("hidden-*.npy"))
    np.save(shard, np.load(shard).astype("S4"))
    with pytest.raises(TaidError, match="a shard's type is not float32"):
        CachedTeacher(cache, verify=False)


def test_look_ups_that_do_not_fit(token_blocks, finished):
    teacher = CachedTeacher(finished)
    input_ids = torch.from_numpy(token_blocks[:2]).long()
    with pytest.raises(TaidError, match="index"):
        teacher.hidden_states(input_ids)
    with pytest.raises(TaidError, match="no block 10"):
        teacher.hidden_states(input_ids, torch.tensor([0, 10]))
    with pytest.raises(TaidError, match="block 5 of the cache holds other tokens"):
        teacher.hidden_states(input_ids, torch.tensor([0, 5]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"token_blocks": np.zeros((0, 4), dtype=np.int32)}, "at least one block"),
        ({"token_blocks": np.full((1, 4), 99_999)}, "the teacher knows 0 to"),
        ({"position_ids": np.zeros((1, 1))}, "Position ids have shape"),
    ],
)
def test_impossible_arguments(model, token_blocks, tmp_path, changes, message):
    with pytest.raises(TaidError, match=message):
        write_hidden_state_cache(
            **{"model": model, "token_blocks": token_blocks, "folder": tmp_path / "cache", **changes}
        )
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_a_full_disk_is_told_apart():
    with pytest.raises(OSError) as caught, Path("/dev/full").open("wb") as file:
        _write_npy(file, np.zeros(100_000, dtype=np.float32))
    assert caught.value.errno == errno.ENOSPC


def test_documents_apart(model, token_blocks, tmp_path):
    position_ids = np.tile(np.r_[0:5, 0:3], (BLOCKS, 1))
    write_hidden_state_cache(model, token_blocks, tmp_path / "cache", position_ids=position_ids, batch_size=2)
    hidden = CachedTeacher(tmp_path / "cache").hidden_states(
        torch.from_numpy(token_blocks).long(), torch.arange(BLOCKS)
    )
    expected = reference(model, token_blocks[:, 5:])
    torch.testing.assert_close(hidden[:, 5:], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (Gemma2ForCausalLM, Gemma2Config(final_logit_softcapping=3.0, head_dim=8)),
        (CohereForCausalLM, CohereConfig(logit_scale=0.25)),
    ],
)
def test_caps_and_scales_are_part_of_the_head(model_class, config, tmp_path):
    settings = config.to_dict()
    settings |= {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.5,
    }
    settings.pop("layer_types", None)
    torch.manual_seed(0)
    model = model_class(type(config)(**settings)).eval()
    token_blocks = np.arange(3, 15, dtype=np.int32).reshape(2, 6)
    write_hidden_state_cache(model, token_blocks, tmp_path / "cache")
    teacher = CachedTeacher(tmp_path / "cache")
    input_ids = torch.from_numpy(token_blocks).long()
    with torch.no_grad():
        hidden = teacher.hidden_states(input_ids, torch.arange(2))
        logits = teacher.head_options.apply_(hidden @ teacher.head_weight.T)
        torch.testing.assert_close(logits, model(input_ids).logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(hidden @ teacher.head_weight.T, logits)
    assert head_weight(model).shape == (64, 32)
    assert head_options(model) == teacher.head_options
