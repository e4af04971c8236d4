"""Emscripten: TVM's runtime compiled to WebAssembly, and linking with it.

The packages apache-tvm and apache-tvm-ffi carry the runtime's sources; its JavaScript half comes with what
loads the library (WebLLM bundles it). Debian has Emscripten as the package ``emscripten``.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from export.errors import ExportError
from export.processes import run_logged

SUPPORT = Path(__file__).with_name("tvm_support")
"""Headers that the runtime includes and its package leaves out, and what JavaScript calls beside it."""
SOURCES = ("web/emcc/wasm_runtime.cc", "web/emcc/webgpu_runtime.cc")
"""The runtime's translation units, by their places in the package."""
LEFT_OUT = (
    *(
        f"rpc/rpc_{name}.cc"
        for name in ("channel", "endpoint", "event_impl", "local_session", "module", "session")
    ),
    "extra/contrib/sort/sort.cc",
)
"""Of its sources those for remote calls and for sorting on processors; shaders sort here."""
COMPILING = ("-O3", "-std=c++17", "-Wno-ignored-attributes")
LINKING = (
    "-O3",
    "--no-entry",
    *("-s", "WASM_BIGINT=1"),  # 64-bit integers pass to JavaScript as such
    *("-s", "STANDALONE_WASM=1"),
    *("-s", "ALLOW_MEMORY_GROWTH=1"),
    *("-s", "ERROR_ON_UNDEFINED_SYMBOLS=0"),  # JavaScript defines what is left
)


def compiler() -> str:
    """Path of ``emcc``.

    Raises:
        ExportError: it is not on PATH.
    """
    found = shutil.which("emcc")
    if found is None:
        raise ExportError(
            "A library for WebGPU needs Emscripten's emcc on PATH: install it (Debian: apt-get install "
            "emscripten), or leave wasm32-webgpu out."
        )
    return found


def compile_runtime(folder: Path) -> list[Path]:
    """Compiles TVM's runtime.

    Args:
        folder: an empty folder to work in.

    Returns:
        The objects.

    Raises:
        ExportError: ``emcc`` is missing or fails.
    """
    import tvm
    import tvm_ffi

    core, ffi = Path(tvm.__file__).parent, Path(tvm_ffi.__file__).parent
    # The sources include each other by their places in TVM's repository; empty files are what is left out.
    shutil.copytree(SUPPORT, folder, copy_function=shutil.copyfile, dirs_exist_ok=True)
    for name in LEFT_OUT:
        (folder / "src" / "runtime" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "src" / "runtime" / name).touch()
    (folder / "src" / "runtime" / "vm").mkdir()
    (folder / "3rdparty").mkdir()
    (folder / "3rdparty" / "tvm-ffi").symlink_to(ffi)
    # From the last two, paths that begin with ../ lead to the headers of ours.
    runtime = folder / "src" / "runtime"
    included = (folder, core, core / "include", ffi / "include", runtime, runtime / "vm")
    command = [compiler(), *COMPILING, *(f"-I{each}" for each in included)]
    # Messages name source files; where this machine keeps them is nobody's business and changes the bytes.
    command += [f"-ffile-prefix-map={place}=tvm" for place in (folder, core, ffi)]
    objects = []
    for source in (*(core / source for source in SOURCES), folder / "browser.cc"):
        objects.append(folder / f"{source.stem}.o")
        _run([*command, "-c", "-o", str(objects[-1]), str(source)])
    return objects


def link(objects: Sequence[Path], output: Path) -> None:
    """Links objects to the library that a browser loads.

    Args:
        objects: of the runtime, then of the model.
        output: the ``.wasm`` to write.

    Raises:
        ExportError: ``emcc`` is missing or fails.
    """
    _run([compiler(), *LINKING, "-o", str(output), *map(str, objects)])


def _run(command: Sequence[str]) -> None:
    finished = run_logged(command)
    if finished.returncode != 0:
        # The last line only repeats the command.
        errors = [line.strip() for line in finished.output.splitlines() if "error:" in line]
        reason = errors[0] if errors else finished.reason()
        raise ExportError(f"{command[0]}: cannot make the library for WebGPU ({reason}).")
