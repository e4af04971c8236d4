"""A program for 64-bit ARM that runs GGUF files without Python: what an Android device is measured with.

``device_program.cpp`` on the llama.cpp of the runtime, from the pinned source package that also carries the
converter, cross-compiled and linked statically: it needs nothing of the system that it runs on.
"""

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from export.converter import SOURCE_VERSION, unpack_llama_cpp
from export.errors import ExportError
from export.processes import run_logged

COMPILER, C_COMPILER = "aarch64-linux-gnu-g++", "aarch64-linux-gnu-gcc"
TOOLS = {"cmake": "cmake", COMPILER: "g++-aarch64-linux-gnu", C_COMPILER: "gcc-aarch64-linux-gnu"}
"""Programs that building needs, and Debian's packages of them."""
ARCHITECTURE = "armv8.2-a+dotprod+fp16"
"""Phones from about 2018 on. Without dot products, quantized models would run several times slower."""
SOURCES = ("CMakeLists.txt", "LICENSE", "app/", "cmake/", "ggml/", "include/", "src/", "vendor/")
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    f"-DCMAKE_C_COMPILER={C_COMPILER}",
    f"-DCMAKE_CXX_COMPILER={COMPILER}",
    f"-DGGML_CPU_ARM_ARCH={ARCHITECTURE}",
    "-DGGML_NATIVE=OFF",
    "-DGGML_OPENMP=OFF",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_DOWNLOAD=OFF",
    *(f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")),
)
SOURCE = Path(__file__).with_suffix(".cpp")


def program_path() -> Path:
    """Where the program lies in this environment once it is built; another path for another source."""
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(OPTIONS).encode()).hexdigest()[:12]
    folder = f"device-program-{SOURCE_VERSION}-{digest}"
    return Path(sys.prefix) / "share" / "martlet" / folder / "device_program"


def missing_tools() -> list[str]:
    """Debian's packages of the programs that building needs and that are not on PATH."""
    return [package for program, package in TOOLS.items() if shutil.which(program) is None]


def build(say: Callable[[str], None], source_package: Path | None = None) -> Path:
    """The program, built when it is not there yet: ten minutes or more of processor time.

    Args:
        say: told that it will take a while.
        source_package: as of ``export.converter.install``.

    Raises:
        ExportError: a compiler is missing, the package cannot be had, or compiling fails.
    """
    destination = program_path()
    if destination.is_file():
        return destination
    missing = missing_tools()
    if missing:
        raise ExportError(
            "The program for 64-bit ARM cannot be built; install a cross compiler (apt-get install "
            f"{' '.join(missing)})."
        )
    say("Building llama.cpp for 64-bit ARM, once: ten minutes or more of processor time.")
    destination.parent.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent.parent) as temporary:
        sources, built, made = (Path(temporary) / name for name in ("llama.cpp", "build", "made"))
        unpack_llama_cpp(source_package, sources, SOURCES)
        made.mkdir()
        _run("cmake", "-S", str(sources), "-B", str(built), *OPTIONS)
        _run("cmake", "--build", str(built), "--target", "llama")
        libraries = sorted(str(path) for path in built.rglob("*.a"))
        includes = [f"-I{sources / folder}" for folder in ("include", "ggml/include")]
        _run(
            *(COMPILER, "-O2", "-std=c++17", "-static", f"-march={ARCHITECTURE}", *includes, str(SOURCE)),
            *("-Wl,--start-group", *libraries, "-Wl,--end-group", "-o", str(made / destination.name)),
        )
        try:
            made.rename(destination.parent)
        except OSError:
            # Another process built it in the meantime, from the same source.
            if not destination.is_file():
                raise
    return destination


def _run(*command: str) -> None:
    processors = str(len(os.sched_getaffinity(0)))
    environment = {"CMAKE_BUILD_PARALLEL_LEVEL": processors, **os.environ}
    finished = run_logged(command, environment=environment)
    if finished.returncode:
        error = ExportError(f"The program for 64-bit ARM cannot be built: {finished.reason()}.")
        error.add_note(finished.shown())
        raise error
