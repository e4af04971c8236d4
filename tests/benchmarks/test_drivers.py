"""The benchmarks' drivers on a tiny model: they run, and all of a library's generate the same tokens."""

from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import harness_overhead, tinyswallow_shape
from export.gguf import export_gguf
from export.mlc import export_mlc
from export.onnx import export_onnx

PROMPT = list(range(5, 29))
GENERATED = 12


def export(format: str, model: Path, folder: Path) -> Path:
    if format == "mlc":
        return export_mlc(model, folder, "tiny", "q4f32_1")
    if format == "onnx":
        return export_onnx(model, folder, "tiny", ["int4"], threads=1)[0]
    return export_gguf(model, folder, "tiny", ["q4_0"], pre_tokenizer="smollm", threads=1)[0]


@pytest.mark.parametrize(
    ("format", "others"),
    [("gguf", ["C program"]), ("onnx", ["bound once", "GenAI"]), ("mlc", ["saved call"])],
)
def test_the_least_driver_gives_the_harness_tokens(
    tiny_model_dir: Path, tmp_path: Path, format: str, others: list[str]
) -> None:
    file = export(format, tiny_model_dir, tmp_path / "files")
    with harness_overhead.decoders_of(file, 1, len(PROMPT) + GENERATED + 2) as decoders:
        assert list(decoders) == ["harness", *others]
        found = harness_overhead.compare(format, decoders, PROMPT, Namespace(generated=GENERATED, rounds=2))
    assert found["same_tokens"] == dict.fromkeys(["harness", *others], True)
    assert all(len(samples) == 2 for samples in found["samples"].values())
    assert all(sample["work"] == GENERATED for sample in found["samples"]["harness"])
    assert all(speed["mean"] > 0 for speed in found["tokens_per_s"].values())


def test_a_file_of_the_shape_benchmark_is_measured(tiny_model_dir: Path, tmp_path: Path) -> None:
    file = export("gguf", tiny_model_dir, tmp_path / "files")
    found = tinyswallow_shape.measured(file, PROMPT, Namespace(generated=4, rounds=2, threads=1), tmp_path)
    assert found["repetitions"] == 2
    assert found["decode_tokens_per_s"] > 0
    # Everything in the file but its tokenizer is read for each token: its head is its embedding.
    assert 0.5 < found["bytes_read_per_token"] / file.stat().st_size < 1
    assert found["bandwidth_utilisation"] > 0
