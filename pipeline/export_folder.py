"""Exports of any Hugging Face folder, without a recipe: several formats at once, all or none."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from export import quantizations
from export.adapters import is_adapter, merge_adapter
from export.errors import ExportError
from export.untrusted import check_model_folder
from pipeline.errors import UserError

KNOWN: dict[str, Mapping[str, Any]] = {
    "gguf": quantizations.GGUF,
    "mlc": quantizations.MLC,
    "onnx": quantizations.ONNX,
}
DEFAULTS = {"gguf": "q4_k_m", "mlc": "q4f32_1", "onnx": "int4"}


def wanted_of(formats: str, names: str | None) -> dict[str, list[str]]:
    """The quantizations of each format.

    Args:
        formats: formats, separated by commas.
        names: quantizations of any of these, separated by commas; each format's default where None.

    Raises:
        UserError: a format or a quantization does not exist, or one of several formats is left without.
    """
    chosen = [part.strip() for part in formats.split(",") if part.strip()]
    for format in chosen or [formats]:
        if format not in KNOWN:
            raise UserError(f"--format: there is no format {format!r}; choose gguf, mlc or onnx.")
    if names is None:
        return {format: [DEFAULTS[format]] for format in chosen}
    wanted: dict[str, list[str]] = {format: [] for format in chosen}
    for name in dict.fromkeys(part.strip() for part in names.split(",") if part.strip()):
        owners = [format for format in chosen if name in KNOWN[format]]
        if not owners:
            known = ", ".join(each for format in chosen for each in KNOWN[format])
            raise UserError(
                f"--quantization: {' and '.join(chosen)} know no {name!r}; choose from {known}."
                if len(chosen) > 1
                else f"--quantization: {chosen[0]} knows no {name!r}; choose from {known}."
            )
        for format in owners:
            wanted[format].append(name)
    for format, listed in wanted.items():
        if not listed:
            raise UserError(
                f"--quantization: names none for {format}; add one of {', '.join(KNOWN[format])}."
            )
    return wanted


def run(
    model: Path,
    output: Path,
    wanted: Mapping[str, Sequence[str]],
    name: str,
    *,
    pre_tokenizer: str | None = None,
    importance_text: Path | None = None,
    gptq_text: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Exports a model, or an adapter merged into its model.

    Args:
        model: Hugging Face folder with safetensors, or a folder of peft with an adapter.
        output: new folder. One format lies in it directly, several in folders named as in a release
            (``NAME-GGUF``, ``NAME-q4f32_1-MLC``, ``NAME-ONNX``).
        wanted: of ``wanted_of``.
        name: first part of the names.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer.
        importance_text: text file that weighs the rounding errors of GGUF below q8_0.
        gptq_text: text file on which GPTQ rounds the layers of ONNX's int4.
        progress: receives one line at the start of each step.

    Returns:
        What ``export.runtime.open_runtime`` opens, format by format.

    Raises:
        UserError, ExportError: the folder is no model, or a format cannot hold it; then nothing is left.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ExportError(f"{output}: is not an empty folder; give a new one.")
    if gptq_text is not None and "int4" not in wanted.get("onnx", ()):
        raise UserError("--gptq: rounds ONNX's int4, which is not among what is exported; leave it out.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as temporary:
        if model.is_dir() and is_adapter(model):
            progress(f"merging the adapter {model}")
            merge_adapter(model, Path(temporary) / "merged")
            model = Path(temporary) / "merged"
        elif model.is_dir():
            check_model_folder(model)
        if list(model.glob("*.safetensors")) and (model / "config.json").is_file():
            from pipeline import preflight

            progress(f"checking that {', '.join(wanted)} can hold the model")
            preflight.require_none(
                preflight.problems(model, wanted.keys(), pre_tokenizer=pre_tokenizer, chats=False)
            )
        files = Path(temporary) / "files"
        made: list[Path] = []
        for format, listed in wanted.items():
            made += _export(
                format,
                model,
                files,
                listed,
                name,
                len(wanted) > 1,
                pre_tokenizer,
                importance_text,
                gptq_text,
                progress,
            )
        if output.exists():
            output.rmdir()
        files.rename(output)
    return [output / path.relative_to(files) for path in made]


def _export(
    format: str,
    model: Path,
    files: Path,
    listed: Sequence[str],
    name: str,
    apart: bool,
    pre_tokenizer: str | None,
    importance_text: Path | None,
    gptq_text: Path | None,
    progress: Callable[[str], None],
) -> list[Path]:
    """Exports to one format; ``apart`` in a folder with the format's name."""
    if format == "gguf":
        from export.gguf import export_gguf

        matrix = None
        if importance_text is not None:
            matrix = importance_of_file(model, importance_text, progress)
        return export_gguf(
            model,
            files / f"{name}-GGUF" if apart else files,
            name.lower(),
            listed,
            importance_matrix=matrix,
            pre_tokenizer=pre_tokenizer,
            progress=progress,
        )
    if format == "onnx":
        from export.onnx import export_onnx

        rounded = None
        if gptq_text is not None:
            from export.gptq import round_linear_layers

            rounded = round_linear_layers(model, rows_of_file("--gptq", model, gptq_text), progress=progress)
        folder = files / f"{name}-ONNX" if apart else files
        return export_onnx(model, folder, name, listed, rounded=rounded, progress=progress)
    from export.mlc import export_mlc

    return [
        export_mlc(
            model,
            files / (f"{name}-{quantization}-MLC" if apart else quantization),
            name,
            quantization,
            progress=progress,
        )
        for quantization in listed
    ]


def importance_of_file(model: Path, file: Path, report: Callable[[str], None]) -> Any:
    """The importance matrix of a model on a text file, under the names of GGUF tensors.

    Raises:
        UserError: the file cannot be read.
        ExportError: the model cannot be run.
    """
    from export.importance import gguf_importance, measure_importance

    rows = rows_of_file("--importance-matrix", model, file)
    return gguf_importance(measure_importance(model, rows, progress=report), model)


def rows_of_file(option: str, model: Path, file: Path) -> list[Any]:
    """Rows of token ids of a text file, see ``export.importance.rows_of_text``.

    Raises:
        UserError: the file cannot be read.
        ExportError: the model's tokenizer cannot be loaded.
    """
    from export.importance import rows_of_text

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: {file}: cannot be read as text ({error}).") from None
    return list(rows_of_text(model, text))
