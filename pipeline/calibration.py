"""Text that quantization weighs its errors on: the recipe's own calibration split, or a text file."""

from pathlib import Path

import numpy as np

from export.errors import ExportError
from export.importance import rows_of_text
from pipeline.artifacts import Artifact, sha256_of_file
from pipeline.errors import UserError
from pipeline.models import position_ids
from pipeline.recipe import CALIBRATION


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
