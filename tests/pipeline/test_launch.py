"""Training in processes of its own gives one process's result, and nothing outlives who started it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline import distill, hidden_states, prepare, student
from pipeline.artifacts import Artifact, Store
from pipeline.errors import UserError
from pipeline.launch import forward, launch_training, tell, torchrun_arguments
from pipeline.progress import Progress
from pipeline.recipe import Launch, Recipe

ROOT = Path(__file__).parents[2]
WORKER = """
import json, os, pathlib, signal, sys, time
from pipeline.launch import end_with_parent, tell

end_with_parent(signal.SIGKILL)
request = json.loads(pathlib.Path(sys.argv[1]).read_text())
folder = pathlib.Path(request["folder"])
(folder / f"worker-{os.environ['RANK']}").write_text(str(os.getpid()))
if request["do"] == "sleep":
    time.sleep(300)
if request["do"] == "refuse":
    (folder / "error.txt").write_text("distill.learning_rate: too large.")
    sys.exit(2)
if request["do"] == "fail":
    sys.exit("no more memory")
print("not JSON, so no progress")
if os.environ["RANK"] == "0":
    tell("all is well")
"""
PARENT = """
import pathlib, sys
from pipeline.launch import launch_training
from pipeline.recipe import Launch

folder = pathlib.Path(sys.argv[1])
launch_training(
    Launch(processes=2), "worker", {"folder": str(folder), "do": "sleep"}, folder, folder / "log", print
)
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    return tmp_path


def is_running(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def test_arguments_of_torchrun() -> None:
    alone = torchrun_arguments(Launch(processes=2), "pipeline.distill", Path("r.json"))
    assert alone == ["--nnodes=1", "--nproc-per-node=2", "--standalone", "-m", "pipeline.distill", "r.json"]
    several = torchrun_arguments(
        Launch(processes=8, nodes=3, rendezvous="first:29400"), "pipeline.distill", Path("r.json")
    )
    assert "--rdzv-endpoint=first:29400" in several
    assert "--standalone" not in several
    with pytest.raises(ValidationError, match="several nodes need a rendezvous"):
        Launch(nodes=2)


def test_progress_keeps_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    line = Progress("distill (taid)", 3, 8, "steps", "loss 2.100", 90.0)
    tell(line)
    tell("a plain line")
    got: list[str] = []
    for said in [*capsys.readouterr().out.splitlines(), "no JSON", "[1]"]:
        forward(said, got.append)
    assert got == [line, "a plain line"]
    assert isinstance(got[0], Progress)
    assert (got[0].done, got[0].total, got[0].seconds_left) == (3, 8, 90.0)


@pytest.mark.parametrize(
    ("do", "message"), [("refuse", "learning_rate: too large"), ("fail", "a training process failed")]
)
def test_failures_are_told(worker: Path, do: str, message: str) -> None:
    request = {"folder": str(worker), "do": do}
    with pytest.raises(UserError, match=message) as caught:
        launch_training(Launch(), "worker", request, worker, worker / "log", lambda line: None)
    if do == "fail":
        assert "no more memory" in "".join(caught.value.__notes__)


def test_what_takes_too_long_is_ended(worker: Path) -> None:
    request = {"folder": str(worker), "do": "sleep"}
    told = r"distill\.timeout_s: the training was not done after 20 s and was ended; the same command goes on"
    with pytest.raises(UserError, match=told):
        launch_training(Launch(), "worker", request, worker, worker / "log", lambda line: None, 20)
    assert not is_running(int((worker / "worker-0").read_text()))


def test_workers_end_with_the_process_that_started_them(worker: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, worker], stdout=subprocess.DEVNULL)
    files = [worker / "worker-0", worker / "worker-1"]
    assert wait_for(lambda: all(file.exists() and file.read_text() for file in files), 120)
    workers = [int(file.read_text()) for file in files]
    assert all(map(is_running, workers))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert wait_for(lambda: not any(map(is_running, workers)), 60)


def test_two_processes_are_one_run(
    tiny_teacher: Artifact, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    lines: list[str] = []
    store = Store(tmp_path / "store", report=lines.append)
    recipe = make_recipe(distill={"batch_size": 4, "evaluate_tokens": 128, "alpha": 0.3})
    text = prepare.run(store, recipe, tiny_teacher)
    initial = student.run(store, recipe, tiny_teacher, text)
    cache = hidden_states.run(store, recipe, tiny_teacher, text)
    launched = make_recipe(
        distill={**recipe.distill.model_dump(), "batch_size": 2}, launch={"processes": 2, "nodes": 1}
    )
    results = []
    for plan in (recipe, launched):
        trained = distill.run(store, plan, tiny_teacher, initial, text, cache, "taid")
        results.append(
            [
                json.loads((trained.path / name).read_text(encoding="utf-8"))
                for name in ("curve.json", "evaluation.json")
            ]
        )
    (curve, evaluation), (curve_of_two, evaluation_of_two) = results
    assert len(curve) == len(curve_of_two) == evaluation_of_two["steps"]
    for name in ("loss", "t", "tokens"):
        assert [point[name] for point in curve_of_two] == pytest.approx(
            [point[name] for point in curve], rel=1e-5
        ), name
    assert evaluation_of_two["after"] == pytest.approx(evaluation["after"], rel=1e-3)
    assert any(isinstance(line, Progress) and line.startswith("distill (taid)") for line in lines)
