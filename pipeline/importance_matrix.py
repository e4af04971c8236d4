"""What each column of the tuned student's matrices is multiplied with, on text that the recipe names: GGUF
quantizations below q8_0 weigh their rounding errors by it."""

from pathlib import Path

from export.errors import ExportError
from export.importance import measure_importance
from export.quantizations import GGUF_UNWEIGHTED
from pipeline import calibration
from pipeline.artifacts import Artifact, Store, write_json
from pipeline.errors import UserError
from pipeline.models import throttled
from pipeline.recipe import CALIBRATION, Recipe

STAGE = "importance_matrix"
VERSION = 1
KEY = "export.importance_matrix"


def wanted(recipe: Recipe) -> bool:
    """Whether the recipe names a text and has a quantization that the matrix would change."""
    below = [name for name in recipe.export.gguf if name not in GGUF_UNWEIGHTED]
    return recipe.export.importance_matrix is not None and bool(below)


def run(store: Store, recipe: Recipe, instruct: Artifact, text: Artifact) -> Artifact:
    """Measures the importance matrix that ``export.importance_matrix`` asks for.

    Returns:
        ``importance.safetensors`` (float32 [columns] of each linear layer, by its name in transformers) and
        ``importance.json`` {source, sha256 of a file or null, tokens, rows, layers}.

    Raises:
        UserError: the recipe asks for none, its file cannot be read or is empty, or the model cannot be run.
    """
    source = recipe.export.importance_matrix
    if source is None:
        raise UserError(f"{KEY}: names no text; give calibration or a text file.")
    digest = calibration.digest_of(KEY, source)
    model_dir = instruct.path / "model"

    def make(output: Path, work: Path) -> None:
        from safetensors.numpy import save_file

        rows, positions = calibration.rows_of(KEY, source, text, model_dir)
        tokens = sum(len(row) for row in rows)
        store.report(f"importance matrix: running the model over {tokens:,} tokens of {source}")
        try:
            importance = measure_importance(
                model_dir, rows, positions, threads=recipe.threads, progress=throttled(store.report)
            )
        except ExportError as error:
            raise UserError(f"{KEY}: {source}: {error}") from error
        save_file(importance, output / "importance.safetensors")
        write_json(
            output / "importance.json",
            {
                "source": source if digest is None else Path(source).name,
                "sha256": digest,
                "tokens": tokens,
                "rows": len(rows),
                "layers": len(importance),
            },
        )

    inputs: dict[str, Artifact | str] = {"instruct": instruct, "text": text if digest is None else digest}
    parameters = {"source": CALIBRATION if digest is None else "file"}
    return store.get_or_make(STAGE, VERSION, parameters, inputs, make)
