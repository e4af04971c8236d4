"""The student before any training: an existing model, or the teacher without its least influential layers."""

from pathlib import Path
from typing import Any

import numpy as np

from export.untrusted import check_model_folder
from pipeline.artifacts import Artifact, Store, write_json
from pipeline.errors import UserError
from pipeline.models import count_parameters, load_model, load_tokenizer, save_model
from pipeline.recipe import Recipe
from pipeline.teacher import WANTED_FILES, local_folder, model_digests, trusted_data
from taid import TaidError, prune_by_influence, shared_vocabulary_size

STAGE = "student"
VERSION = 1


def run(store: Store, recipe: Recipe, teacher: Artifact, text: Artifact) -> Artifact:
    """Makes the initial student.

    Returns:
        ``model/`` and ``student.json`` {parameters, layers, influences, dropped}.

    Raises:
        UserError: the student cannot be loaded, has another tokenizer than the teacher, or cannot keep as
            many layers as the recipe asks.
    """
    section = recipe.student
    # A licence changes no weight.
    parameters: dict[str, Any] = {"student": section.model_dump(mode="json", exclude={"licence"})}
    if section.model is not None:
        folder = local_folder("student.model", section.model, section.revision, list(WANTED_FILES))
        parameters["files"] = model_digests(folder, WANTED_FILES)
        trusted_data("student.model", check_model_folder, folder)

    def make(output: Path, work: Path) -> None:
        teacher_tokenizer = load_tokenizer(teacher.path / "model", recipe.teacher.trust_remote_code)
        facts: dict[str, object]
        if recipe.student.prune is not None:
            model, tokenizer = load_model(teacher.path / "model"), teacher_tokenizer
            layers = recipe.student.prune.layers
            store.report(f"student: measuring the influence of the teacher's layers, {layers} will remain")
            calibration = np.load(text.path / "calibration.npy")
            try:
                model, influences, dropped = prune_by_influence(model, calibration, layers)
            except TaidError as error:
                raise UserError(f"student.prune.layers: {error}") from None
            facts = {"influences": influences, "dropped": dropped}
        else:
            model, tokenizer = load_model(folder), load_tokenizer(folder)
            facts = {"influences": None, "dropped": None}
        teacher_rows = load_config_vocabulary_size(teacher.path / "model", recipe.teacher.trust_remote_code)
        try:
            shared_vocabulary_size(teacher_tokenizer, tokenizer, teacher_rows, model.config.vocab_size)
        except TaidError as error:
            raise UserError(f"student.model: {error}") from None
        save_model(model, teacher_tokenizer, output / "model", model.generation_config)
        layers_left = model.config.get_text_config().num_hidden_layers
        write_json(
            output / "student.json", {"parameters": count_parameters(model), "layers": layers_left, **facts}
        )

    return store.get_or_make(
        STAGE, VERSION, parameters, {"teacher": teacher, "text": text}, make, recipe.seed
    )


def load_config_vocabulary_size(folder: Path, trust_remote_code: bool = False) -> int:
    """Rows of the embedding, as the folder's configuration says."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return int(config.get_text_config().vocab_size)
