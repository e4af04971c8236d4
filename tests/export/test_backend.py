"""What a runtime was asked to run on against what it runs on, by accounts that are not ours."""

from pathlib import Path

import pytest
import torch

from export.backend import Backend, instruction_sets_of_processor
from export.gguf import export_gguf
from export.llama_cpp_runtime import LlamaCppRuntime
from export.onnx import export_onnx
from export.onnx_runtime import OnnxRuntime


def test_what_was_asked_for_and_is_not_in_use_shows() -> None:
    backend = Backend(
        {"device": "GPU", "threads": 4, "instruction_sets": ["AVX", "AVX2", "FMA"], "unknown": 1},
        {"device": "CPU", "threads": 4, "instruction_sets": ["FMA", "AVX", "OPENMP"], "version": "1"},
    )
    assert backend.fallbacks() == ["device: GPU asked for, CPU in use", "instruction sets: AVX2 not in use"]
    same = Backend({"providers": ["CPU"]}, {"providers": ["CPU", "other"]})
    assert same.as_dictionary()["fallbacks"] == []


@pytest.mark.parametrize(
    ("line", "sets"),
    [
        ("flags\t\t: fpu pni avx avx2 fma avx512f", ["SSE3", "AVX", "AVX2", "FMA"]),
        ("Features\t: fp asimd asimddp i8mm", ["NEON", "DOTPROD", "MATMUL_INT8"]),
        ("model name\t: a processor", []),
    ],
)
def test_instruction_sets_by_the_kernel(tmp_path: Path, line: str, sets: list[str]) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    assert instruction_sets_of_processor(tmp_path / "cpuinfo") == sets
    assert instruction_sets_of_processor(tmp_path / "none") == []


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="torch names no x86 set here"
)
def test_instruction_sets_of_this_machine_are_those_that_torch_sees() -> None:
    # torch asks the processor, not the kernel.
    assert torch.backends.cpu.get_cpu_capability() in instruction_sets_of_processor()


def test_llama_cpp_says_threads_sets_and_where_the_weights_are(tiny_model_dir: Path, tmp_path: Path) -> None:
    files = export_gguf(tiny_model_dir, tmp_path / "gguf", "tiny", ["f16", "q4_0"], pre_tokenizer="smollm")
    plain, repacked = (LlamaCppRuntime(file, 2, 64) for file in files)
    assert plain.backend.requested["threads"] == plain.backend.effective["threads"] == 2
    assert plain.backend.effective["repacked"] == "none"
    if "AVX2" in instruction_sets_of_processor():
        # llama.cpp keeps q4_0 in an order of its own where the processor has AVX2.
        assert str(repacked.backend.effective["repacked"]).startswith("CPU_REPACK ")
    # It is compiled on the machine that it runs on; a build for less than its processor would show here.
    assert plain.backend.fallbacks() == []
    plain.close()
    repacked.close()


def test_onnx_runtime_says_which_providers_got_the_graph(tiny_model_dir: Path, tmp_path: Path) -> None:
    (file,) = export_onnx(tiny_model_dir, tmp_path / "onnx", "tiny", ["fp32"], threads=1)
    runtime = OnnxRuntime(file, 2, 64)
    assert runtime.backend.requested == {"providers": ["CPUExecutionProvider"], "threads": 2}
    assert runtime.backend.effective["providers"] == ["CPUExecutionProvider"]
    assert runtime.backend.fallbacks() == []
    runtime.close()
