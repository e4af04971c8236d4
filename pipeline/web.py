"""The page of a release: chat and measurement in a browser, laid beside the files that it loads.

``web/`` is built by ``npm run build`` when the environment is set up; here its result is copied into the
release with ``models.json``, which tells the page what there is to load.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.quantizations import WEBGPU
from pipeline.artifacts import sha256_of_file, sha256_of_json, write_json

FOLDER = "web"
SCHEMA = "martlet-web-1"
BUILT = Path(__file__).parents[1] / "web" / "dist"
ONNX_DTYPES = {
    "model.onnx": "fp32",
    "model_fp16.onnx": "fp16",
    "model_quantized.onnx": "q8",
    "model_q4.onnx": "q4",
}
"""What transformers.js calls each graph of an ONNX folder."""
MLC_FILES = ("mlc-chat-config.json", "tensor-cache.json", "params_shard_*.bin", "tokenizer.json")
"""What WebLLM reads of an MLC folder, beside the library."""
ONNX_SHARED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
LARGEST_FILE = 2**31 - 1
"""What a browser holds in one buffer; larger files are not offered."""


def built_page() -> Path | None:
    """The built page, or None where ``web/`` was not built (no Node.js when the environment was set up)."""
    return BUILT if (BUILT / "index.html").is_file() else None


def digest() -> str | None:
    """SHA-256 over the built page's files, None where there is none: a new page makes a new release."""
    page = built_page()
    if page is None:
        return None
    return sha256_of_json({path.name: sha256_of_file(path) for path in sorted(page.iterdir())})


def lay_out(release: Path, name: str, listings: Mapping[str, list[dict[str, Any]]]) -> bool:
    """Puts the page into a release folder whose models are already there.

    Args:
        release: the folder; the page becomes ``release/web``.
        name: shown as the page's title.
        listings: ``files.json`` of the exports by format (``gguf``, ``mlc``, ``onnx``).

    Returns:
        False, and nothing is written, where the page was not built.
    """
    page = built_page()
    if page is None:
        return False
    shutil.copytree(page, release / FOLDER, copy_function=shutil.copyfile)
    write_json(release / FOLDER / "models.json", models(release, name, listings))
    return True


def models(release: Path, name: str, listings: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """``models.json``: ``{schema, name, default, models: [{id, format, quantization, file, folder, dtype,
    bytes, files: [{path, bytes, sha256}]}]}``, paths from the release's root, smallest first in each format;
    ``default`` is the id of the first one that every browser can run."""

    def entry(path: Path) -> dict[str, Any]:
        return {
            "path": path.relative_to(release).as_posix(),
            "bytes": path.stat().st_size,
            "sha256": sha256_of_file(path),
        }

    found: list[tuple[dict[str, Any], Path, Path, str | None, list[dict[str, Any]]]] = []
    for listed in listings.get("gguf", []):
        path = next(release.glob(f"*-GGUF/{Path(listed['path']).name}"))
        found.append((listed, path, path.parent, None, [entry(path)]))
    for listed in listings.get("mlc", []):
        folder = next(release.glob(f"*-{listed['quantization']}-MLC"))
        for library in folder.glob(f"libs/*-{WEBGPU}.wasm"):
            read = [library, *(path for name in MLC_FILES for path in sorted(folder.glob(name)))]
            found.append((listed, library, folder, None, [entry(path) for path in read]))
    for listed in listings.get("onnx", []):
        path = next(release.glob(f"*-ONNX/onnx/{Path(listed['path']).name}"))
        shared = [path.parents[1] / file for file in ONNX_SHARED]
        graphs = [path, *path.parent.glob(f"{path.name}_data*")]
        files = [entry(file) for file in (*shared, *graphs) if file.is_file()]
        found.append((listed, path, path.parents[1], ONNX_DTYPES[path.name], files))
    offered = [
        {
            "id": f"{listed['format']}-{listed['quantization']}",
            "format": listed["format"],
            "quantization": listed["quantization"],
            "file": path.name,
            "folder": folder.name,
            "dtype": dtype,
            "bytes": sum(file["bytes"] for file in files),
            "files": files,
        }
        for listed, path, folder, dtype, files in found
        if all(file["bytes"] <= LARGEST_FILE for file in files)
    ]
    offered.sort(key=lambda model: (model["format"], model["bytes"]))
    anywhere = [model for model in offered if model["format"] != "mlc"]
    return {
        "schema": SCHEMA,
        "name": name,
        "default": anywhere[0]["id"] if anywhere else None,
        "models": offered,
    }
