"""Exports of the tuned student, one artifact a format."""

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from export.errors import ExportError
from export.gguf import export_gguf
from export.gptq import from_tensors
from export.importance import gguf_importance
from export.mlc import export_mlc
from export.onnx import export_onnx
from export.processes import at_most
from export.quantizations import GGUF_UNWEIGHTED
from export.tensors import tensor_kinds, tensor_types
from pipeline.artifacts import Artifact, Store, write_json
from pipeline.errors import UserError
from pipeline.hub import gguf_metadata
from pipeline.recipe import Recipe

VERSION = 9
FORMATS = ("gguf", "mlc", "onnx")
UNQUANTIZED = {"gguf": "f16", "mlc": "q0f32", "onnx": "fp32"}
"""What a format's quantized files are made from, or would be if each were made in two steps."""
UNLISTED = "unlisted"


def run(
    store: Store,
    recipe: Recipe,
    instruct: Artifact,
    format: str,
    importance: Artifact | None = None,
    rounded: Artifact | None = None,
) -> Artifact:
    """Exports to one format, in every quantization that the recipe lists for it.

    Args:
        importance: artifact of ``pipeline.importance_matrix``; of the formats only GGUF uses it.
        rounded: artifact of ``pipeline.gptq``; of the formats only ONNX uses it.

    Returns:
        ``files/`` (for MLC one folder a quantization below it), ``unlisted/`` (of GGUF: the f16 that the
        others were made from, where the recipe does not list it) and ``files.json``: [{path, format,
        quantization, bytes, tensor_types, tensor_kinds, importance_matrix}], where path, relative to the
        artifact, is what ``export.runtime.open_runtime`` opens, and importance_matrix whether one weighed
        the quantization.

    Raises:
        UserError: the format cannot hold this model; the sentence says why.
    """
    name = f"{recipe.name}-Instruct"
    model_dir = instruct.path / "model"
    importance = importance if format == "gguf" else None
    rounded = rounded if format == "onnx" else None

    @at_most(recipe.export.timeout_s, "export.timeout_s")
    def make(output: Path, work: Path) -> None:
        files = output / "files"
        try:
            if format == "gguf":
                matrix = None if importance is None else read_importance(importance, model_dir)
                quantizations = recipe.export.gguf
                paths = export_gguf(
                    model_dir,
                    files,
                    name.lower(),
                    list(dict.fromkeys([*quantizations, UNQUANTIZED[format]])),
                    importance_matrix=matrix,
                    pre_tokenizer=recipe.export.pre_tokenizer,
                    metadata=gguf_metadata(recipe),
                    threads=recipe.threads,
                    progress=store.report,
                    log=store.log_file("export gguf"),
                )[: len(quantizations)]
                keep_unlisted(files, paths, output / UNLISTED)
            elif format == "onnx":
                paths = export_onnx(
                    model_dir,
                    files,
                    name,
                    recipe.export.onnx,
                    rounded=None
                    if rounded is None
                    else from_tensors(load_file(rounded.path / "gptq.safetensors")),
                    threads=recipe.threads,
                    progress=store.report,
                    log=store.log_file("export onnx"),
                )
                quantizations = recipe.export.onnx
            else:
                quantizations = recipe.export.mlc
                paths = [
                    export_mlc(
                        model_dir,
                        files / quantization,
                        name,
                        quantization,
                        libraries=recipe.export.mlc_libraries,
                        progress=store.report,
                    )
                    for quantization in quantizations
                ]
        except ExportError as error:
            raise UserError(f"export.{format}: {error}") from error
        write_json(
            output / "files.json",
            [
                {
                    "path": path.relative_to(output).as_posix(),
                    "format": format,
                    "quantization": quantization,
                    "bytes": size_of(path),
                    "tensor_types": tensor_types(path),
                    "tensor_kinds": tensor_kinds(path),
                    "importance_matrix": importance is not None and quantization not in GGUF_UNWEIGHTED,
                }
                for path, quantization in zip(paths, quantizations, strict=True)
            ],
        )

    parameters = {
        "name": name,
        "quantizations": getattr(recipe.export, format),
        **({"pre_tokenizer": recipe.export.pre_tokenizer} if format == "gguf" else {}),
        **({"libraries": recipe.export.mlc_libraries} if format == "mlc" else {}),
        **({"metadata": gguf_metadata(recipe)} if format == "gguf" else {}),
    }
    inputs: dict[str, Artifact | str] = {"instruct": instruct}
    if importance is not None:
        inputs["importance_matrix"] = importance
    if rounded is not None:
        inputs["gptq"] = rounded
    return store.get_or_make(f"export_{format}", VERSION, parameters, inputs, make)


def keep_unlisted(folder: Path, listed: list[Path], elsewhere: Path) -> None:
    """Moves what was made on the way out of the folder of a format's files: it is no part of a release."""
    for path in set(folder.iterdir()) - set(listed):
        elsewhere.mkdir(exist_ok=True)
        path.rename(elsewhere / path.name)


def read_importance(importance: Artifact, model_dir: Path) -> dict[str, Any]:
    """The importance matrix under the names of GGUF tensors.

    Raises:
        ExportError: the model's tensors have no known names there.
    """
    return gguf_importance(load_file(importance.path / "importance.safetensors"), model_dir)


def unquantized(
    store: Store, recipe: Recipe, instruct: Artifact, exported: Artifact, format: str, folder: Path
) -> Path:
    """What a format's files would be without quantization: the exported one, the one that was
    made on the way, or else one that is made now.

    Args:
        folder: receives it, where it must be made; must not exist.

    Raises:
        ExportError: it cannot be made.
    """
    for entry in json.loads((exported.path / "files.json").read_text(encoding="utf-8")):
        if entry["quantization"] == UNQUANTIZED[format]:
            return exported.path / entry["path"]
    for path in (exported.path / UNLISTED).glob("*"):
        return path
    store.report(
        f"validate: exporting to {UNQUANTIZED[format]}, to tell the format's loss from quantization's"
    )
    model_dir, name, threads = instruct.path / "model", recipe.name, recipe.threads
    if format == "gguf":
        named = recipe.export.pre_tokenizer
        return export_gguf(model_dir, folder, name, ["f16"], pre_tokenizer=named, threads=threads)[0]
    if format == "onnx":
        return export_onnx(model_dir, folder, name, ["fp32"], threads=threads)[0]
    return export_mlc(model_dir, folder, name, "q0f32")


def size_of(path: Path) -> int:
    """Bytes on disk that a device needs: the file, its external data beside it, or the folder's files."""
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file() and file.parent.name != "libs"]
        return sum(file.stat().st_size for file in files)
    return sum(file.stat().st_size for file in path.parent.glob(path.name + "*"))
