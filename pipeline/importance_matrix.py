"""What each column of the tuned student's matrices is multiplied with, on text that the recipe names: GGUF
quantizations below q8_0 weigh their rounding errors by it."""

from pathlib import Path

import numpy as np

from export.errors import ExportError
from export.importance import measure_importance, rows_of_text
from export.quantizations import GGUF_UNWEIGHTED
from pipeline.artifacts import Artifact, Store, sha256_of_file, write_json
from pipeline.errors import UserError
from pipeline.models import position_ids, throttled
from pipeline.recipe import CALIBRATION, Recipe

STAGE = "importance_matrix"
VERSION = 1


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
        raise UserError("export.importance_matrix: names no text; give calibration or a text file.")
    file = None if source == CALIBRATION else Path(source)
    try:
        digest = None if file is None else sha256_of_file(file)
    except OSError as error:
        raise UserError(f"export.importance_matrix: {file}: cannot be read ({error.strerror}).") from None
    model_dir = instruct.path / "model"

    def make(output: Path, work: Path) -> None:
        from safetensors.numpy import save_file

        positions = None
        try:
            if file is None:
                rows = list(np.load(text.path / "calibration.npy"))
                positions = list(position_ids(np.load(text.path / "documents_calibration.npy")))
            else:
                rows = list(rows_of_text(model_dir, file.read_text(encoding="utf-8")))
            tokens = sum(len(row) for row in rows)
            store.report(f"importance matrix: running the model over {tokens:,} tokens of {source}")
            importance = measure_importance(
                model_dir, rows, positions, threads=recipe.threads, progress=throttled(store.report)
            )
        except (ExportError, UnicodeDecodeError) as error:
            raise UserError(f"export.importance_matrix: {source}: {error}") from error
        save_file(importance, output / "importance.safetensors")
        write_json(
            output / "importance.json",
            {
                "source": source if file is None else file.name,
                "sha256": digest,
                "tokens": tokens,
                "rows": len(rows),
                "layers": len(importance),
            },
        )

    inputs: dict[str, Artifact | str] = {"instruct": instruct}
    inputs["text"] = text if digest is None else digest
    return store.get_or_make(
        STAGE, VERSION, {"source": CALIBRATION if file is None else "file"}, inputs, make
    )
