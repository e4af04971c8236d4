"""Logging beside the report: TensorBoard's and W&B's own readers against the curves."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2
from wandb.sdk.internal.datastore import DataStore

from pipeline import chats, distill, instruct, prepare, pretrain, student
from pipeline.artifacts import Artifact, Store
from pipeline.check import check_recipe
from pipeline.errors import UserError
from pipeline.recipe import Recipe

ROOT = Path(__file__).parents[2]
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


def runs_of(logs: Path) -> dict[str, list[dict[str, float]]]:
    """The history of each offline run of W&B by its name, read from its files by W&B's own reader."""
    found = {}
    for file in logs.glob("wandb/offline-run-*/*.wandb"):
        reader, name, history = DataStore(), "", []
        reader.open_for_scan(str(file))
        while (data := reader.scan_data()) is not None:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                name = record.run.display_name
            elif record.WhichOneof("record_type") == "history":
                history.append(
                    {
                        item.key or item.nested_key[0]: json.loads(item.value_json)
                        for item in record.history.item
                    }
                )
        assert name not in found
        found[name] = history
    return found


def test_wandb_offline_keeps_one_run_a_training(
    tmp_path: Path,
    recipe: Recipe,
    tiny_teacher: Artifact,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    lines: list[str] = []
    store = Store(tmp_path / "store", report=lines.append)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(store.root / "logs"))
    recipe = recipe.model_copy(update={"report_to": ["wandb"]})
    text = prepare.run(store, recipe, tiny_teacher)
    initial = student.run(store, recipe, tiny_teacher, text)
    distilled = distill.run(store, recipe, tiny_teacher, initial, text, None, "taid")
    further = pretrain.run(store, recipe, distilled, text)
    runs = runs_of(store.root / "logs")
    assert set(runs) == {"distill taid", "pretrain"}
    names = {"train/loss": "loss", "train/t": "t", "eval/kl_teacher_student": "held_out_kl"}
    for run, artifact in (("distill taid", distilled), ("pretrain", further)):
        curve = json.loads((artifact.path / "curve.json").read_text(encoding="utf-8"))
        for key, name in names.items():
            logged = {entry["train/global_step"]: entry[key] for entry in runs[run] if key in entry}
            expected = {point["step"]: point[name] for point in curve if name in point}
            assert logged == pytest.approx(expected, rel=1e-6)
        assert any(line.startswith(f"{run}: W&B run {store.root}") for line in lines)
    assert "wandb" not in "".join(capfd.readouterr()), "W&B speaks where the live view is"


@pytest.mark.parametrize(
    ("variables", "code"), [({}, 2), ({"WANDB_MODE": "offline"}, 0), ({"WANDB_API_KEY": "0" * 40}, 0)]
)
def test_an_account_is_asked_for_before_anything_runs(
    variables: dict[str, str], code: int, tmp_path: Path
) -> None:
    text = (ROOT / "recipes" / "smoke.yaml").read_text(encoding="utf-8") + "\nreport_to: [wandb]\n"
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    finished = subprocess.run(
        [sys.executable, "-m", "flows.command_line", "check", str(tmp_path / "mine.yaml")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**environment, "HOME": str(tmp_path), **variables},
        stdin=subprocess.DEVNULL,
    )
    assert finished.returncode == code, finished.stderr
    if code:
        assert finished.stderr.startswith("martlet: ")
        assert "report_to: Weights & Biases knows no account here; wandb login" in finished.stderr
