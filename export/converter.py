"""llama.cpp's own converter, at the very commit of the runtime that loads what it writes.

The source package of llama-cpp-python carries it. ``python -m export.converter`` fetches that package once,
checks its SHA-256 and unpacks the converter into the environment.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

from export.errors import ExportError

SOURCE_VERSION = "0.3.36"
SOURCE_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
SCRIPT = "convert_hf_to_gguf.py"
WANTED = (SCRIPT, "LICENSE", "conversion/", "gguf-py/gguf/", "gguf-py/LICENSE")


def converter_folder() -> Path:
    """Where the converter lives in this environment."""
    return Path(sys.prefix) / "share" / "martlet" / f"llama.cpp-{SOURCE_VERSION}"


def converter_script() -> Path:
    """The converter's script.

    Raises:
        ExportError: it has not been set up, or belongs to another version than the runtime.
    """
    _check_version()
    script = converter_folder() / SCRIPT
    if not script.is_file():
        raise ExportError(
            f"{script}: llama.cpp's converter is not set up; run `python -m export.converter` once."
        )
    return script


def install(source_package: Path | None = None) -> Path:
    """Sets the converter up; does nothing when it is there already.

    Args:
        source_package: the source package of llama-cpp-python; fetched with pip when None.

    Returns:
        The folder it is in.

    Raises:
        ExportError: the package cannot be fetched or read, its SHA-256 is not the pinned one, or the
            installed runtime is of another version.
    """
    _check_version()
    destination = converter_folder()
    if (destination / SCRIPT).is_file():
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent) as temporary:
        unpacked = Path(temporary) / "unpacked"
        unpack_llama_cpp(source_package, unpacked, WANTED)
        if destination.exists():  # without its script, so what somebody left half removed
            shutil.rmtree(destination)
        try:
            unpacked.rename(destination)
        except OSError:
            # Another process set it up in the meantime; what it unpacked has the same SHA-256.
            if not (destination / SCRIPT).is_file():
                raise
    return destination


def unpack_llama_cpp(source_package: Path | None, folder: Path, wanted: tuple[str, ...]) -> None:
    """Unpacks parts of llama.cpp from the source package of llama-cpp-python.

    Args:
        source_package: the package; fetched with pip, beside ``folder``, when None.
        folder: new folder that becomes llama.cpp's.
        wanted: what its files' paths in llama.cpp begin with.

    Raises:
        ExportError: the package cannot be fetched or read, its SHA-256 is not the pinned one, the installed
            runtime is of another version, or the first of ``wanted`` is not in it.
    """
    _check_version()
    if source_package is None:
        source_package = _fetch(folder.with_name("source"))
    _check(source_package)
    _unpack(source_package, folder, wanted)


def _check_version() -> None:
    """The converter and the runtime must be of one commit: each knows what the other writes or reads."""
    installed = version("llama-cpp-python")
    if installed != SOURCE_VERSION:
        raise ExportError(
            f"llama-cpp-python is {installed}, but the converter is pinned to {SOURCE_VERSION}; "
            "install the versions of constraints.txt."
        )


def _fetch(folder: Path) -> Path:
    requirement = f"llama-cpp-python=={SOURCE_VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    finished = subprocess.run(
        [*command, "--no-binary", "llama-cpp-python", requirement], capture_output=True, text=True
    )
    packages = sorted(folder.glob("*.tar.gz")) if finished.returncode == 0 else []
    if not packages:
        lines = finished.stderr.strip().splitlines() or ["pip gave no reason"]
        raise ExportError(f"The source package {requirement} cannot be fetched: {lines[-1]}")
    return packages[0]


def _check(source_package: Path) -> None:
    try:
        with source_package.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ExportError(f"{source_package}: cannot be read ({error.strerror}).") from error
    if digest != SOURCE_SHA256:
        raise ExportError(
            f"{source_package}: SHA-256 is {digest}, not the pinned {SOURCE_SHA256}; it is not used."
        )


def _unpack(source_package: Path, folder: Path, wanted: tuple[str, ...]) -> None:
    prefix = "vendor/llama.cpp/"
    folder.mkdir()
    with tarfile.open(source_package) as archive:
        for member in archive:
            inside = member.name.partition("/")[2]
            if not member.isfile() or not inside.startswith(prefix):
                continue
            name = inside.removeprefix(prefix)
            if name.startswith(wanted):
                member.name = name
                archive.extract(member, folder, filter="data")
    if not (folder / wanted[0]).is_file():
        raise ExportError(f"{source_package}: holds no {prefix}{wanted[0]}.")


def main() -> int:
    """Command line of ``python -m export.converter``."""
    parser = argparse.ArgumentParser(prog="python -m export.converter", description=__doc__)
    parser.add_argument("--source-package", type=Path, help="an already fetched source package")
    try:
        print(install(parser.parse_args().source_package))
    except (ExportError, OSError) as error:
        print(f"martlet: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
