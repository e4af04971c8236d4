"""Set-up of llama.cpp's converter: only the pinned package, only what is wanted, all or nothing."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import gemma3
from transformers import PreTrainedTokenizerFast

from export import converter
from export.errors import ExportError
from export.gguf import stage_model

WANTED = {
    "vendor/llama.cpp/convert_hf_to_gguf.py": "print()",
    "vendor/llama.cpp/conversion/base.py": "",
    "vendor/llama.cpp/gguf-py/gguf/__init__.py": "",
    "vendor/llama.cpp/LICENSE": "MIT",
}
UNWANTED = {"vendor/llama.cpp/src/llama.cpp": "", "llama_cpp/__init__.py": "", "LICENSE.md": ""}


def make_package(path: Path, files: dict[str, str]) -> str:
    """A source package of the given files; its SHA-256."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"llama_cpp_python-{converter.SOURCE_VERSION}/{name}")
            member.size = len(content.encode())
            archive.addfile(member, io.BytesIO(content.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment in which nothing is set up."""
    folder = tmp_path / "environment"
    monkeypatch.setattr(sys, "prefix", str(folder))
    return folder


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_only_what_is_wanted_is_unpacked_once(
    prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "source.tar.gz"
    monkeypatch.setattr(converter, "SOURCE_SHA256", make_package(package, {**WANTED, **UNWANTED}))
    folder = converter.install(package)
    assert folder.is_relative_to(prefix)
    assert files_below(prefix) == {
        f"{folder.relative_to(prefix).as_posix()}/{name.removeprefix('vendor/llama.cpp/')}" for name in WANTED
    }
    assert converter.converter_script() == folder / "convert_hf_to_gguf.py"
    package.unlink()
    assert converter.install(package) == folder  # nothing left to do, so the package is not even opened


def test_package_with_another_hash_is_not_used(prefix: Path, tmp_path: Path) -> None:
    package = tmp_path / "source.tar.gz"
    digest = make_package(package, WANTED)
    with pytest.raises(ExportError, match=f"SHA-256 is {digest}, not the pinned {converter.SOURCE_SHA256}"):
        converter.install(package)
    assert files_below(prefix) == set()


def test_path_that_leaves_the_folder_is_refused(
    prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "source.tar.gz"
    escaping = {**WANTED, "vendor/llama.cpp/conversion/../../../../../escaped.py": ""}
    monkeypatch.setattr(converter, "SOURCE_SHA256", make_package(package, escaping))
    with pytest.raises((tarfile.OutsideDestinationError, ExportError)):
        converter.install(package)
    assert files_below(tmp_path) == {"source.tar.gz"}


def test_missing_package_and_missing_set_up(prefix: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"none\.tar\.gz: cannot be read \(No such file"):
        converter.install(tmp_path / "none.tar.gz")
    with pytest.raises(ExportError, match=r"is not set up; run `python -m export\.converter` once"):
        converter.converter_script()


def test_converter_and_runtime_must_be_of_one_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter, "SOURCE_VERSION", "0.0.1")
    with pytest.raises(ExportError, match=r"pinned to 0\.0\.1; install the versions of constraints\.txt"):
        converter.converter_script()


def test_pinned_version_is_the_runtimes() -> None:
    import llama_cpp

    assert llama_cpp.__version__ == converter.SOURCE_VERSION


@pytest.mark.parametrize("file_type", ["f16", "bf16"])
def test_matrices_in_rows_are_the_same_bytes(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, file_type: str
) -> None:
    """Of a checkpoint in bfloat16, and an embedding of which the converter takes as many rows as tokens."""
    model = gemma3(tiny_tokenizer, tmp_path / "model")
    tensors = {
        name: value.to(torch.bfloat16) for name, value in load_file(model / "model.safetensors").items()
    }
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    stage_model(model, tmp_path / "staged")
    program = (
        "import sys; from export import gguf_conversion_driver as driver\n"
        "driver.BUFFER = int(sys.argv.pop(1)); read, counts = driver._read_rows, []\n"
        "driver._read_rows = lambda *arguments: counts.append(arguments[2]) or read(*arguments)\n"
        "driver.main(); print(len(counts), sum(counts))"
    )

    def convert(buffer: int) -> tuple[bytes, str]:
        path = tmp_path / f"{buffer}.gguf"
        arguments = [str(converter.converter_script()), str(tmp_path / "staged"), "--outtype", file_type]
        finished = subprocess.run(
            [sys.executable, "-c", program, str(buffer), *arguments, "--outfile", str(path)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        return path.read_bytes(), finished.stdout.splitlines()[-1]

    whole, none_read = convert(2**30)
    in_rows, read = convert(10_000)
    assert whole == in_rows
    assert none_read == "0 0"
    rows = sum(value.shape[0] for value in tensors.values() if value.nbytes > 10_000)
    reads, rows_read = map(int, read.split())
    assert rows_read == rows
    assert reads > rows * 128 / 10_000
