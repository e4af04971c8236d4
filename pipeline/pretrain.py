"""Continued pre-training on plain text after distillation: next-token cross-entropy, no teacher."""

from pathlib import Path

import numpy as np
from transformers import TrainingArguments

from pipeline.artifacts import Artifact, Store, write_json
from pipeline.errors import UserError
from pipeline.models import load_model, load_tokenizer, position_ids, save_model
from pipeline.recipe import Recipe
from pipeline.training import ProgressLines, curve_of, deciding_values, reporting, train, training_values
from taid import DistillationTrainer, TokenBlockDataset, freeze_embeddings

STAGE = "pretrain"
VERSION = 1


def run(store: Store, recipe: Recipe, student: Artifact, text: Artifact) -> Artifact:
    """Trains the distilled student on ``pretrain.tokens`` tokens of the training text.

    Returns:
        ``model/`` and ``curve.json``. A killed run goes on from its last checkpoint.

    Raises:
        UserError: the text holds fewer tokens than asked for, or training diverges.
    """
    section = recipe.pretrain
    if section is None:
        raise UserError("pretrain: the recipe has no such section; add it or leave the stage out.")

    def make(output: Path, work: Path) -> None:
        model, tokenizer = load_model(student.path / "model"), load_tokenizer(student.path / "model")
        generation_config = model.generation_config
        blocks = np.load(text.path / "train.npy")
        wanted = -(-section.tokens // blocks.shape[1])
        if wanted > len(blocks):
            raise UserError(
                f"pretrain.tokens: {section.tokens} is more than the {blocks.size} tokens of "
                "data.text.train_tokens; lower it or give more text."
            )
        positions = position_ids(np.load(text.path / "documents_train.npy"))
        if section.freeze_embeddings:
            freeze_embeddings(model)
        trainer = DistillationTrainer(
            model=model,
            args=TrainingArguments(**training_values(section, work, recipe.seed, STAGE)),
            train_dataset=TokenBlockDataset(blocks[:wanted], position_ids=positions[:wanted]),
            objective="cross_entropy",
            processing_class=tokenizer,
            callbacks=[
                ProgressLines(STAGE, store.report),
                *reporting(recipe, STAGE, work, store.root / "logs", store.report),
            ],
        )
        train(trainer, work, "pretrain", store.report, section.timeout_s)
        model.requires_grad_(True)
        save_model(model, tokenizer, output / "model", generation_config)
        write_json(output / "curve.json", curve_of(trainer.state.log_history))

    parameters = {"pretrain": deciding_values(recipe, "pretrain")}
    return store.get_or_make(
        STAGE, VERSION, parameters, {"student": student, "text": text}, make, recipe.seed
    )
