"""The tuned student's layers rounded to four bits by GPTQ, on text that the recipe names, for ONNX's int4."""

from pathlib import Path

from export.errors import ExportError
from export.gptq import as_tensors, round_linear_layers
from pipeline import calibration
from pipeline.artifacts import Artifact, Store, write_json
from pipeline.errors import UserError
from pipeline.models import throttled
from pipeline.recipe import CALIBRATION, Recipe

STAGE = "gptq"
VERSION = 1
KEY = "export.gptq"


def wanted(recipe: Recipe) -> bool:
    """Whether the recipe names a text and lists int4."""
    return recipe.export.gptq is not None and "int4" in recipe.export.onnx


def run(store: Store, recipe: Recipe, instruct: Artifact, text: Artifact) -> Artifact:
    """Rounds the layers on the text that ``export.gptq`` names.

    Returns:
        ``gptq.safetensors`` (of ``export.gptq.as_tensors``) and ``gptq.json`` {source, sha256 of a file or
        null, tokens, rows, layers}.

    Raises:
        UserError: the recipe names no text, its file cannot be read or is empty, or the model cannot be run.
    """
    source = recipe.export.gptq
    if source is None:
        raise UserError(f"{KEY}: names no text; give calibration or a text file.")
    digest = calibration.digest_of(KEY, source)
    model_dir = instruct.path / "model"

    def make(output: Path, work: Path) -> None:
        from safetensors.numpy import save_file

        rows, positions = calibration.rows_of(KEY, source, text, model_dir)
        tokens = sum(len(row) for row in rows)
        store.report(f"GPTQ: running the model over {tokens:,} tokens of {source}")
        try:
            rounded = round_linear_layers(
                model_dir, rows, positions, threads=recipe.threads, progress=throttled(store.report)
            )
        except ExportError as error:
            raise UserError(f"{KEY}: {source}: {error}") from error
        save_file(as_tensors(rounded), output / "gptq.safetensors")
        write_json(
            output / "gptq.json",
            {
                "source": source if digest is None else Path(source).name,
                "sha256": digest,
                "tokens": tokens,
                "rows": len(rows),
                "layers": len(rounded),
            },
        )

    inputs: dict[str, Artifact | str] = {"instruct": instruct, "text": text if digest is None else digest}
    parameters = {"source": CALIBRATION if digest is None else "file"}
    return store.get_or_make(STAGE, VERSION, parameters, inputs, make)
