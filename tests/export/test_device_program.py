"""The program for 64-bit ARM, cross-compiled and run under qemu, against llama.cpp on this machine."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from export import device_program
from export.errors import ExportError
from export.gguf import export_gguf
from export.llama_cpp_runtime import LlamaCppRuntime

EMULATOR = "qemu-aarch64"
NEAR_TIES = {"f16": 0.03, "q8_0": 0.1, "q4_0": 0.1, "q4_k_m": 0.1}
"""Logits that rounding between two instruction sets may turn round, of each quantization: 0.014 was seen at
f16, 0.067 where the runtime rounds activations to 8 bits, too."""
QUANTIZATIONS = list(NEAR_TIES)


@pytest.fixture(scope="module")
def program() -> Path:
    missing = device_program.missing_tools()
    if missing and not device_program.program_path().is_file():
        pytest.skip(f"not installed: {', '.join(missing)}")
    if shutil.which(EMULATOR) is None:
        pytest.skip(f"{EMULATOR} is not installed (apt-get install qemu-user)")
    return device_program.build(print)


@pytest.fixture(scope="module")
def files(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf") / "files"
    paths = export_gguf(tiny_model_dir, folder, "tiny", QUANTIZATIONS, pre_tokenizer="smollm")
    return dict(zip(QUANTIZATIONS, paths, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_it_is_a_static_program_for_64_bit_arm(program: Path) -> None:
    head = program.read_bytes()[:64]
    assert head[:5] == b"\x7fELF\x02"
    assert int.from_bytes(head[18:20], "little") == 183  # EM_AARCH64
    # Static: no interpreter is named.
    assert b"ld-linux-aarch64.so" not in program.read_bytes()[:4096]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_given_the_same_tokens_both_processors_rank_the_same_token_first(
    program: Path, files: dict[str, Path], tmp_path: Path, quantization: str
) -> None:
    """Teacher forcing, so that one near-tie does not change what follows."""
    runtime = LlamaCppRuntime(files[quantization], 1, 256)
    ids = np.random.default_rng(0).integers(3, runtime.vocabulary_size, 160).tolist()
    native = runtime.forward(ids)
    runtime.close()
    (tmp_path / "ids.txt").write_text(" ".join(map(str, ids)))
    done = subprocess.run(
        [EMULATOR, "-cpu", "max", program, "rank", files[quantization], tmp_path / "ids.txt", "1"],
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout)
    assert "NEON = 1" in answer["system"]
    assert "DOTPROD = 1" in answer["system"]
    top = np.array(answer["top"])
    assert len(top) == len(ids)
    behind = native.max(axis=1) - native[np.arange(len(ids)), top]
    off = np.abs(native.max(axis=1) - answer["top_logit"])
    print(
        f"{quantization}: {(behind == 0).sum()} of {len(ids)} the same, the others at most "
        f"{behind.max():.3f} behind; logits of the first {off.mean():.3f} apart, at most {off.max():.3f}"
    )
    near_tie = NEAR_TIES[quantization]
    assert behind.max() < near_tie, f"after token {behind.argmax()} it is {behind.max()} behind"
    assert (behind == 0).mean() > 0.9
    assert off.mean() < near_tie


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_it_cannot_do_is_one_sentence_and_a_status(
    program: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    broken, text = tmp_path / "broken.gguf", tmp_path / "text.txt"
    broken.write_bytes(files["q8_0"].read_bytes()[:20_000])
    text.write_text("A swallow.")

    def run(*arguments: str | Path) -> tuple[int, str]:
        done = subprocess.run([EMULATOR, program, *arguments], capture_output=True, text=True)
        assert done.stdout == ""
        return done.returncode, done.stderr.splitlines()[-1]

    assert run("benchmark", broken, text, "1", "2", "1") == (3, "llama.cpp cannot load the file.")
    assert run("benchmark", files["q8_0"], tmp_path / "none", "1", "2", "1") == (
        2,
        f"{tmp_path / 'none'}: cannot be read.",
    )
    assert run("benchmark", files["q8_0"], text, "0", "2", "1") == (2, "0: is no whole number above 0.")
    (tmp_path / "ids.txt").write_text("1 99999999")
    assert run("rank", files["q8_0"], tmp_path / "ids.txt", "1") == (2, "99999999: is no token of the model.")
    assert run("dance")[1].startswith("usage: ")


def test_without_a_cross_compiler_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ExportError, match=r"apt-get install cmake g\+\+-aarch64-linux-gnu gcc-aarch64-linux-gnu\)"
    ):
        device_program.build(print)
    assert list(tmp_path.iterdir()) == []
