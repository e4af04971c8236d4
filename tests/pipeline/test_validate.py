"""The validate stage on real files: what passes, what fails, and that a crash is only a failed gate."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from export.errors import ExportError
from export.gguf import export_gguf
from export.torch_runtime import TorchRuntime
from pipeline import validate
from pipeline.artifacts import Artifact, Store, write_json
from pipeline.conversations import fixed_conversations
from pipeline.errors import GateFailed, UserError
from pipeline.recipe import Recipe, Thresholds
from pipeline.validate_worker import judge, read_reference, reference_answers

TOKENS = 128


def recipe(**thresholds: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "Tiny",
            "threads": 1,
            "teacher": {"model": "unused"},
            "data": {
                "text": {"sources": ["unused.txt"], "train_tokens": 1},
                "chats": {"sources": ["unused.jsonl"], "conversations": 1},
            },
            "student": {"prune": {"layers": 1}},
            "instruct": {},
            "validate": {"tokens": TOKENS, "thresholds": thresholds},
        }
    )


def stored(store: Store, stage: str, fill: Any, key: str = "") -> Artifact:
    return store.get_or_make(stage, 1, {"key": key}, {}, lambda output, work: fill(output))


@pytest.fixture(scope="module")
def inputs(tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Store, the model, its GGUF files, held-out text and chats, as the stages before would leave them."""
    lines: list[str] = []
    store = Store(tmp_path_factory.mktemp("store"), lines.append)

    def text(output: Path) -> None:
        ids = np.random.default_rng(0).integers(3, len(tiny_tokenizer), (6, 64))
        np.save(output / "held_out.npy", ids.astype(np.int32))

    def chats(output: Path) -> None:
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi, what is it?"}]
        (output / "held_out.jsonl").write_text(json.dumps({"messages": turns}) + "\n")

    def export(output: Path) -> None:
        paths = export_gguf(tiny_model_dir, output / "files", "tiny", ["f16", "q8_0"], pre_tokenizer="smollm")
        write_entries(output, paths)

    return {
        "store": store,
        "lines": lines,
        "instruct": stored(store, "instruct", lambda out: shutil.copytree(tiny_model_dir, out / "model")),
        "exported": stored(store, "export_gguf", export),
        "text": stored(store, "text", text),
        "chats": stored(store, "chats", chats),
    }


def write_entries(output: Path, paths: list[Path]) -> None:
    entries = [
        {
            "path": path.relative_to(output).as_posix(),
            "format": "gguf",
            "quantization": path.stem.removeprefix("tiny-"),
            "bytes": path.stat().st_size,
        }
        for path in paths
    ]
    write_json(output / "files.json", entries)


def run(inputs: Any, wanted: Recipe, exported: Artifact | None = None) -> tuple[Artifact, list[Any]]:
    artifact = validate.run(
        inputs["store"],
        wanted,
        inputs["instruct"],
        exported or inputs["exported"],
        inputs["text"],
        inputs["chats"],
    )
    return artifact, json.loads((artifact.path / "fidelity.json").read_text())


def test_good_files_pass_and_the_reference_is_made_once(inputs: Any) -> None:
    wanted = recipe(f16={"mean_kl": 0.001, "same_top": 0.98, "perplexity_ratio": 1.01})
    artifact, entries = run(inputs, wanted)
    assert [entry["quantization"] for entry in entries] == ["f16", "q8_0"]
    for entry in entries:
        assert entry["passed"]
        assert entry["failures"] == []
        assert entry["token_ids_equal"]
        assert entry["stops_at_end_of_turn"]
        assert entry["runtime"] == "llama.cpp"
        # Two rows of 64 tokens and a chat, the last token of each has no successor.
        assert entry["tokens"] > TOKENS - 2
        worst = [position["kl"] for position in entry["worst"]]
        assert worst == sorted(worst, reverse=True)
        assert worst[0] == entry["max_kl"]
        assert all(position["text"] for position in entry["worst"])
        assert len(entry["said"]) == 1
        assert entry["answers"] > len(entry["said"])  # how many fixed answers the gate of ends looks at
    assert 0 < entries[0]["mean_kl"] < entries[1]["mean_kl"] < 0.01
    # The f16 file is its own first step, measured on every second row; what q8_0 loses, it loses after it.
    first, (same, second) = entries[0]["hops"], entries[1]["hops"]
    assert first == [same]
    assert same["hop"] == "model to f16"
    assert same["mean_kl"] == pytest.approx(entries[0]["mean_kl"], rel=0.5)
    assert second["hop"] == "f16 to q8_0"
    assert second["mean_kl"] == pytest.approx(entries[1]["mean_kl"], rel=0.5)
    assert 0 <= entries[0]["floor_kl"] < 1e-4
    weights = sum(
        array.size for array in load_file(inputs["instruct"].path / "model/model.safetensors").values()
    )
    assert entries[1]["bits_per_weight"] == pytest.approx(8 * entries[1]["bytes"] / weights)
    validate.require_passed([artifact])
    # Another threshold judges anew, but does not run the model in torch again.
    before = len(inputs["lines"])
    run(inputs, recipe(f16={"mean_kl": 0.002}))
    assert not [line for line in inputs["lines"][before:] if "torch" in line]
    again, _ = run(inputs, wanted)
    assert again.cached


def test_a_missed_threshold_names_file_gate_value_and_threshold(inputs: Any) -> None:
    artifact, entries = run(inputs, recipe(q8_0={"mean_kl": 1e-7}))
    assert entries[0]["passed"]
    assert not entries[1]["passed"]
    with pytest.raises(
        GateFailed,
        match=r"^tiny-q8_0\.gguf: gate mean_kl: [\d.e-]+, the threshold is at most 1e-07 "
        r"\(most is lost from f16 to q8_0\)\.",
    ):
        validate.require_passed([artifact])


def test_files_that_do_not_load_or_crash_their_runtime_are_failures_of_theirs_alone(inputs: Any) -> None:
    def damaged(output: Path) -> None:
        shutil.copytree(inputs["exported"].path / "files", output / "files")
        good, crashing = output / "files" / "tiny-q8_0.gguf", output / "files" / "tiny-crash.gguf"
        shutil.copy(good, crashing)
        # A model without a tokenizer: llama.cpp aborts the process when it is asked to tokenize.
        field = gguf.GGUFReader(crashing, "r+").get_field("tokenizer.ggml.model")
        assert field is not None
        field.parts[field.data[0]][:] = np.frombuffer(b"none", dtype=np.uint8)
        with (output / "files" / "tiny-f16.gguf").open("r+b") as file:
            file.truncate(1000)
        write_entries(output, [output / "files" / "tiny-f16.gguf", crashing, good])

    broken = stored(inputs["store"], "export_gguf", damaged, "damaged")
    artifact, entries = run(inputs, recipe(), broken)
    assert [entry["passed"] for entry in entries] == [False, False, True]
    for entry in entries[:2]:
        assert len(entry["failures"]) == 1
        assert entry["failures"][0].startswith(f"{entry['file']}: gate runs: the runtime fails")
        assert entry["mean_kl"] is None
        assert entry.keys() >= validate.NOT_MEASURED.keys()
    assert "the process was ended by SIGABRT" in entries[1]["failures"][0]
    with pytest.raises(GateFailed, match=r"tiny-f16.*\(1 more gates failed\.\)"):
        validate.require_passed([artifact])


def test_a_reference_that_cannot_be_run_is_a_user_error(inputs: Any) -> None:
    def empty(output: Path) -> None:
        shutil.copytree(inputs["instruct"].path / "model", output / "model")
        (output / "model" / "model.safetensors").write_bytes(b"no tensors")

    broken = inputs | {"instruct": stored(inputs["store"], "instruct", empty, "damaged")}
    with pytest.raises(UserError, match="cannot be run in torch"):
        run(broken, recipe())


def test_a_time_limit_is_told_and_judges_nothing(inputs: Any) -> None:
    wanted = recipe(q8_0={"mean_kl": 0.2})
    hurried = wanted.model_copy(update={"validate_": wanted.validate_.model_copy(update={"timeout_s": 0.01})})
    with pytest.raises(UserError, match=r"its gates took longer than validate\.timeout_s, 0\.01 s; raise it"):
        run(inputs, hurried)
    artifact, entries = run(inputs, wanted)
    assert not artifact.cached
    assert all(entry["passed"] for entry in entries)
    assert run(inputs, hurried)[0].cached, "the limit is no part of the result"


@pytest.fixture(scope="module")
def itself(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The model judged by itself."""
    folder = tmp_path_factory.mktemp("reference")
    rows = np.random.default_rng(1).integers(3, 2000, (2, 40)).tolist()
    reference_answers(tiny_model_dir, rows, 1, folder)
    return judge(TorchRuntime(tiny_model_dir), *read_reference(folder))


def test_the_model_against_itself_is_the_floor(itself: dict[str, Any]) -> None:
    assert validate.missed_gates("itself", itself, Thresholds(mean_kl=1e-9, same_top=1)) == []
    assert itself["max_kl"] == 0
    assert itself["decode_kl"] < 1e-9
    assert itself["conversations"] == 2 * len(fixed_conversations())


def test_conversations_that_the_models_template_refuses_are_not_asked_of_files(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    model_dir = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model_dir)
    template = (model_dir / "chat_template.jinja").read_text()
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (model_dir / "chat_template.jinja").write_text(refusing + template)
    reference_answers(model_dir, [[3, 4, 5, 6]], 1, tmp_path)
    with_system = sum(messages[0]["role"] == "system" for messages in fixed_conversations())
    # The file, here the model before, knows system messages.
    measured = judge(TorchRuntime(tiny_model_dir), *read_reference(tmp_path))
    assert measured["conversations"] == 2 * (len(fixed_conversations()) - with_system)
    assert measured["token_ids_equal"]
    (model_dir / "chat_template.jinja").unlink()
    with pytest.raises(ExportError, match="its chat template cannot be rendered"):
        reference_answers(model_dir, [[3, 4, 5, 6]], 1, tmp_path)


@pytest.mark.parametrize(
    ("change", "gate"),
    [
        (
            {"token_ids_equal": False, "token_ids_differ": 3, "token_ids_differ_in": ["conversation 1"]},
            "token_ids",
        ),
        ({"bos_equal": False, "leading_bos": 2, "reference_leading_bos": 1}, "bos"),
        ({"completion_ids": [1, 2, 3]}, "completion"),
        ({"stops_at_end_of_turn": False}, "end_of_turn"),
        ({"eos_equal": False}, "eos"),
        ({"vocabulary_size": 7}, "vocabulary_size"),
        ({"context_length": 7}, "context_length"),
        ({"generation_differs": ["x.json says top_p 0.5, the model 1.0"]}, "generation"),
        ({"mean_kl": 0.3}, "mean_kl"),
        ({"mean_kl": float("nan")}, "mean_kl"),
        ({"p99_kl": 3.0}, "p99_kl"),
        ({"same_top": 0.5}, "same_top"),
        ({"perplexity_ratio": float("inf")}, "perplexity_ratio"),
        ({"decode_kl": float("nan")}, "decode_kl"),
    ],
)
def test_each_gate_alone(itself: dict[str, Any], change: dict[str, Any], gate: str) -> None:
    thresholds = Thresholds(mean_kl=0.25, p99_kl=2, same_top=0.9, perplexity_ratio=1.3)
    failures = validate.missed_gates("x.gguf", itself | change, thresholds)
    assert len(failures) == 1
    assert failures[0].startswith(f"x.gguf: gate {gate}: ")
    assert failures[0].endswith(".")
