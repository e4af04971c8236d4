"""What each column of the tuned student's matrices is multiplied with, on text that the recipe names: GGUF
quantizations below q8_0 weigh their rounding errors by it."""

from typing import Any

import numpy as np

from export.importance import measure_importance
from export.quantizations import GGUF_UNWEIGHTED
from pipeline import calibration
from pipeline.artifacts import Artifact, Store
from pipeline.recipe import Recipe

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
    return calibration.kept(
        store,
        recipe,
        instruct,
        text,
        recipe.export.importance_matrix,
        stage=STAGE,
        version=VERSION,
        key=KEY,
        label="importance matrix",
        file="importance",
        measure=_measured,
    )


def _measured(*arguments: Any, **keywords: Any) -> tuple[dict[str, np.ndarray], int]:
    layers = measure_importance(*arguments, **keywords)
    return layers, len(layers)
