"""Logging beside the report: TensorBoard's own reader against the curves; W&B offline, where installed."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline import chats, distill, instruct, prepare, pretrain, student
from pipeline.artifacts import Artifact, Store
from pipeline.check import check_recipe
from pipeline.errors import UserError
from pipeline.recipe import Recipe

TRAINING = {"batch_size": 4, "checkpoint_every": 100}


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    return make_recipe(
        report_to=["tensorboard"],
        distill={**TRAINING, "evaluate_every": 4, "evaluate_tokens": 128},
        pretrain={**TRAINING, "tokens": 512},
        instruct=TRAINING,
    )


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """{tag: {step: value}} of an event folder."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]
    }


def test_tensorboard_has_the_curves(store: Store, recipe: Recipe, tiny_teacher: Artifact) -> None:
    text = prepare.run(store, recipe, tiny_teacher)
    initial = student.run(store, recipe, tiny_teacher, text)
    talks = chats.run(store, recipe, tiny_teacher)
    distilled = distill.run(store, recipe, tiny_teacher, initial, text, None, "taid")
    further = pretrain.run(store, recipe, distilled, text)
    tuned = instruct.run(store, recipe, tiny_teacher, further, talks)
    names = {"train/loss": "loss", "train/t": "t", "eval/kl_teacher_student": "held_out_kl"}
    for run, artifact in (("distill-taid", distilled), ("pretrain", further), ("instruct", tuned)):
        logged = scalars(store.root / "logs" / "tensorboard" / f"{run}-{artifact.key[:8]}")
        curve = json.loads((artifact.path / "curve.json").read_text(encoding="utf-8"))
        for tag, name in names.items():
            expected = {point["step"]: point[name] for point in curve if name in point}
            assert logged.get(tag, {}) == pytest.approx(expected, rel=1e-6)
        assert len(logged["train/loss"]) == len(curve) > 0


def test_where_training_logs_changes_no_result(recipe: Recipe) -> None:
    silent = recipe.model_copy(update={"report_to": []})
    sections = ("distill", "pretrain", "instruct", "data", "student")
    assert recipe.slice(*sections) == silent.slice(*sections)


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_said_before_anything_runs(
    package: str, make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # how Python marks a module that cannot be imported
    recipe = make_recipe(report_to=[package])
    with pytest.raises(UserError, match=f"mine.yaml: report_to: the package {package} is not installed; pip"):
        check_recipe(recipe, Path("mine.yaml"))


def test_wandb_offline_keeps_one_run_a_training(
    store: Store, recipe: Recipe, tiny_teacher: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not part of the lock")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(store.root / "logs"))
    recipe = recipe.model_copy(update={"report_to": ["wandb"]})
    text = prepare.run(store, recipe, tiny_teacher)
    initial = student.run(store, recipe, tiny_teacher, text)
    distilled = distill.run(store, recipe, tiny_teacher, initial, text, None, "taid")
    pretrain.run(store, recipe, distilled, text)
    assert len(list((store.root / "logs").glob("wandb/offline-run-*/*.wandb"))) == 2
