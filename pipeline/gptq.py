"""The tuned student's layers rounded to four bits by GPTQ, on text that the recipe names, for ONNX's int4."""

from typing import Any

import numpy as np

from export.gptq import as_tensors, round_linear_layers
from pipeline import calibration
from pipeline.artifacts import Artifact, Store
from pipeline.recipe import Recipe

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
    return calibration.kept(
        store,
        recipe,
        instruct,
        text,
        recipe.export.gptq,
        stage=STAGE,
        version=VERSION,
        key=KEY,
        label="GPTQ",
        file="gptq",
        measure=_rounded,
    )


def _rounded(*arguments: Any, **keywords: Any) -> tuple[dict[str, np.ndarray], int]:
    layers = round_linear_layers(*arguments, **keywords)
    return as_tensors(layers), len(layers)
