"""Exports of the tuned student, one artifact a format."""

from pathlib import Path

from export.errors import ExportError
from export.gguf import export_gguf, tensor_kinds, tensor_types
from export.mlc import export_mlc
from export.onnx import export_onnx
from pipeline.artifacts import Artifact, Store, write_json
from pipeline.errors import UserError
from pipeline.recipe import Recipe

VERSION = 4
FORMATS = ("gguf", "mlc", "onnx")


def run(store: Store, recipe: Recipe, instruct: Artifact, format: str) -> Artifact:
    """Exports to one format, in every quantization that the recipe lists for it.

    Returns:
        ``files/`` (for MLC one folder a quantization below it) and ``files.json``: [{path, format,
        quantization, bytes, tensor_types, tensor_kinds}], where path, relative to the artifact, is what
        ``export.runtime.open_runtime`` opens.

    Raises:
        UserError: the format cannot hold this model; the sentence says why.
    """
    name = f"{recipe.name}-Instruct"
    model_dir = instruct.path / "model"

    def make(output: Path, work: Path) -> None:
        files = output / "files"
        try:
            if format == "gguf":
                metadata = {
                    "license": recipe.teacher.licence.lower(),
                    "base_model": recipe.teacher.model,
                    "language": ["en"],
                }
                paths = export_gguf(
                    model_dir,
                    files,
                    name.lower(),
                    recipe.export.gguf,
                    pre_tokenizer=recipe.export.pre_tokenizer,
                    metadata=metadata,
                    threads=recipe.threads,
                    progress=store.report,
                    log=store.log_file("export gguf"),
                )
                quantizations = recipe.export.gguf
            elif format == "onnx":
                paths = export_onnx(
                    model_dir,
                    files,
                    name,
                    recipe.export.onnx,
                    threads=recipe.threads,
                    progress=store.report,
                    log=store.log_file("export onnx"),
                )
                quantizations = recipe.export.onnx
            else:
                quantizations = recipe.export.mlc
                paths = [
                    export_mlc(model_dir, files / quantization, name, quantization, progress=store.report)
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
                    "tensor_types": tensor_types(path) if format == "gguf" else None,
                    "tensor_kinds": tensor_kinds(path) if format == "gguf" else None,
                }
                for path, quantization in zip(paths, quantizations, strict=True)
            ],
        )

    parameters = {
        "name": name,
        "quantizations": getattr(recipe.export, format),
        **({"pre_tokenizer": recipe.export.pre_tokenizer} if format == "gguf" else {}),
        **({"licence": recipe.teacher.licence, "base": recipe.teacher.model} if format == "gguf" else {}),
    }
    return store.get_or_make(f"export_{format}", VERSION, parameters, {"instruct": instruct}, make)


def size_of(path: Path) -> int:
    """Bytes on disk that a device needs: the file, its external data beside it, or the folder's files."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and file.suffix != ".so")
    return sum(file.stat().st_size for file in path.parent.glob(path.name + "*"))
