"""Text that quantization weighs its errors on: the recipe's own calibration split, or a text file; and what
the two stages have in common that run the tuned student over it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from export.errors import ExportError
from export.importance import rows_of_text
from pipeline.artifacts import Artifact, Store, sha256_of_file, write_json
from pipeline.errors import UserError
from pipeline.models import position_ids, throttled
from pipeline.recipe import CALIBRATION, Recipe


def kept(
    store: Store,
    recipe: Recipe,
    instruct: Artifact,
    text: Artifact,
    source: str | None,
    *,
    stage: str,
    version: int,
    key: str,
    label: str,
    file: str,
    measure: Callable[..., tuple[dict[str, np.ndarray], int]],
) -> Artifact:
    """Runs the tuned student over the text that a key of the recipe names, and keeps what comes of it.

    Args:
        store, recipe, instruct, text: as of the stages.
        source: what the key names.
        stage, version: of the stage whose result it is.
        key: the recipe's.
        label: what progress lines begin with.
        file: name of the result's files, without ending.
        measure: called with folder, rows, positions, ``threads`` and ``progress``; gives tensors by name and
            how many layers they are of.

    Returns:
        ``FILE.safetensors`` and ``FILE.json`` {source, sha256 of a file or null, tokens, rows, layers}.

    Raises:
        UserError: the recipe names no text, its file cannot be read or is empty, or the model cannot be run.
    """
    if source is None:
        raise UserError(f"{key}: names no text; give calibration or a text file.")
    digest = digest_of(key, source)
    model_dir = instruct.path / "model"

    def make(output: Path, work: Path) -> None:
        from safetensors.numpy import save_file

        rows, positions = rows_of(key, source, text, model_dir)
        tokens = sum(len(row) for row in rows)
        store.report(f"{label}: running the model over {tokens:,} tokens of {source}")
        try:
            tensors, layers = measure(
                model_dir, rows, positions, threads=recipe.threads, progress=throttled(store.report)
            )
        except ExportError as error:
            raise UserError(f"{key}: {source}: {error}") from error
        save_file(tensors, output / f"{file}.safetensors")
        write_json(
            output / f"{file}.json",
            {
                "source": source if digest is None else Path(source).name,
                "sha256": digest,
                "tokens": tokens,
                "rows": len(rows),
                "layers": layers,
            },
        )

    inputs: dict[str, Artifact | str] = {"instruct": instruct, "text": text if digest is None else digest}
    parameters = {"source": CALIBRATION if digest is None else "file"}
    return store.get_or_make(stage, version, parameters, inputs, make)


def digest_of(key: str, source: str) -> str | None:
    """SHA-256 of the file that a key of the recipe names, None for the recipe's own split.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return None if source == CALIBRATION else sha256_of_file(Path(source))
    except OSError as error:
        raise UserError(f"{key}: {source}: cannot be read ({error.strerror}).") from None


def rows_of(
    key: str, source: str, text: Artifact, model_dir: Path
) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    """Token ids of each row of the text, and their positions, where documents are packed.

    Raises:
        UserError: the file is no text, or the model's tokenizer cannot be loaded.
    """
    if source == CALIBRATION:
        rows = list(np.load(text.path / "calibration.npy"))
        return rows, list(position_ids(np.load(text.path / "documents_calibration.npy")))
    try:
        return list(rows_of_text(model_dir, Path(source).read_text(encoding="utf-8"))), None
    except (ExportError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {source}: {error}") from error
