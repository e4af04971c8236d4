"""The stage of distillation: what its keys do to the loss, and which of them make a result another one."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import distill, prepare, student
from pipeline.artifacts import Artifact, Store
from pipeline.errors import UserError
from pipeline.models import load_model, position_ids
from pipeline.recipe import Recipe


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_first_loss_is_that_of_softened_distributions(
    make_recipe: Callable[..., Recipe], store: Store, tiny_teacher: Artifact, temperature: float
) -> None:
    """One batch of the whole text, so that its order does not matter, against logits of both models."""
    recipe = make_recipe(
        data__text__train_tokens=512,
        distill={"objective": "forward_kl", "batch_size": 8, "temperature": temperature},
    )
    text = prepare.run(store, recipe, tiny_teacher)
    initial = student.run(store, recipe, tiny_teacher, text)
    trained = distill.run(store, recipe, tiny_teacher, initial, text, None, "forward_kl")
    blocks = torch.from_numpy(np.load(text.path / "train.npy").astype(np.int64))
    positions = torch.from_numpy(position_ids(np.load(text.path / "documents_train.npy"))).long()
    with torch.no_grad():
        log_p, log_q = (
            (
                load_model(folder / "model").eval()(blocks, position_ids=positions).logits.double()
                / temperature
            )
            .log_softmax(-1)[:, :-1]
            .cpu()
            for folder in (tiny_teacher.path, initial.path)
        )
    learned = positions[:, 1:] != 0
    expected = -(temperature**2) * (log_p.exp() * log_q).sum(-1)[learned].mean()
    curve = json.loads((trained.path / "curve.json").read_text(encoding="utf-8"))
    losses = [point["loss"] for point in curve if "loss" in point]
    assert len(blocks) == 8
    assert losses[0] == pytest.approx(float(expected), rel=1e-4)


def test_a_temperature_of_one_leaves_older_results_good(
    make_recipe: Callable[..., Recipe], store: Store, tiny_teacher: Artifact
) -> None:
    keys = {}
    for temperature in (1.0, 2.0):
        recipe = make_recipe(distill={"batch_size": 8, "temperature": temperature})
        text = prepare.run(store, recipe, tiny_teacher)
        initial = student.run(store, recipe, tiny_teacher, text)
        trained = distill.run(store, recipe, tiny_teacher, initial, text, None, "taid")
        keys[temperature] = trained.manifest()["parameters"]
    assert "temperature" not in keys[1.0]
    assert keys[2.0]["temperature"] == 2.0


def test_a_training_that_takes_too_long_stops_and_goes_on(
    make_recipe: Callable[..., Recipe], tmp_path: Path, tiny_teacher: Artifact
) -> None:
    """With a checkpoint that no multiple of checkpoint_every asked for; then as if it had never stopped."""
    digests = {}
    for hurried in (False, True):
        lines: list[str] = []
        store = Store(tmp_path / f"store-{hurried}", report=lines.append)
        recipe = make_recipe(distill={"batch_size": 4})
        text = prepare.run(store, recipe, tiny_teacher)
        initial = student.run(store, recipe, tiny_teacher, text)
        if hurried:
            short = make_recipe(distill={"batch_size": 4, "timeout_s": 1e-3})
            told = r"^distill\.timeout_s: the training was not done after 0\.001 s and stopped at step 1 of "
            with pytest.raises(UserError, match=told):
                distill.run(store, short, tiny_teacher, initial, text, None, "taid")
        digests[hurried] = distill.run(store, recipe, tiny_teacher, initial, text, None, "taid").digest
        assert any("going on from step 1 of" in line for line in lines) is hurried
    assert digests[True] == digests[False]
