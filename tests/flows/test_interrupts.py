"""Killed, interrupted and cancelled runs: nothing of them stays behind, and the same command ends in the same
release as a run that nobody disturbed."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.interrupts import INTERRUPTED
from pipeline import release as release_stage
from pipeline.artifacts import damage

ROOT = Path(__file__).parents[2]
TIMED_STAGES = ("device_gguf", "device_mlc", "device_onnx")
TIMED_FILES = ("report.json", "report.html", "README.md")
"""Files of a release that hold timings."""


@dataclass
class Run:
    """A ``martlet ship`` in its own process group, as a terminal starts it, and what it says."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def wait_for(self, text: str, timeout: float = 500) -> bool:
        """Whether a line with the text came before the process ended."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if any(text in line for line in self.lines):
                return True
            if self.process.poll() is not None:
                self.reader.join()
                return any(text in line for line in self.lines)
            time.sleep(0.02)
        pytest.fail(f"no line with {text!r}: {self.lines[-20:]}")

    def end(self, timeout: float = 500) -> int:
        code = self.process.wait(timeout)
        self.reader.join()
        return code


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[Path], Run]]:
    """Starts ``martlet ship RECIPE`` with store and release in the test's folder."""
    started: list[Run] = []

    def go(recipe: Path, store: Path = tmp_path / "store", release: Path = tmp_path / "release") -> Run:
        command = [sys.executable, "-m", "flows.command_line", "ship", str(recipe)]
        process = subprocess.Popen(
            [*command, "--store", str(store), "--release", str(release), "--json"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        started.append(Run(process))
        return started[-1]

    yield go
    for run in started:
        run.process.kill()
        run.process.wait()


def descendants(run: Run) -> list[psutil.Process]:
    return psutil.Process(run.process.pid).children(recursive=True)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def assert_gone_within(processes: list[psutil.Process], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left := alive(processes):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def what_it_is(release: Path) -> dict[str, Any]:
    """A manifest without what timings change: the release's lineage and every file's SHA-256."""
    manifest = json.loads((release / "manifest.json").read_text(encoding="utf-8"))
    files = {
        name: entry["sha256"]
        for name, entry in manifest["files"].items()
        if Path(name).name not in TIMED_FILES
    }
    lineage = {
        role: {key: entry[key] for key in ("key", "digest", "inputs", "parameters")}
        for role, entry in manifest["lineage"].items()
        if role not in TIMED_STAGES
    }
    return {"files": files, "lineage": lineage, "recipe": manifest["recipe"]}


def assert_store_is_whole(store: Path) -> None:
    """Every finished artifact is undamaged, and nothing half-written has stayed."""
    finished = [path for path in store.glob("*/*") if len(path.name) == 64]
    assert finished
    assert [damage(path) for path in finished] == [None] * len(finished)
    assert not list(store.glob("*/*.partial"))
    assert not (store / "quarantine").exists()


@pytest.mark.timeout(1800)
def test_interrupted_and_killed_runs_go_on_to_the_same_release(
    tiny_recipe: dict[str, Any],
    write_recipe: Callable[[dict[str, Any]], Path],
    start: Callable[..., Run],
    tmp_path: Path,
) -> None:
    """Ctrl-C in training, SIGTERM in an exporter, SIGKILL in the measuring process: one after the other."""
    recipe = write_recipe(tiny_recipe)
    disturbances = (("distill ...", signal.SIGINT), ("export gguf ...", signal.SIGTERM))
    for line, number in disturbances:
        run = start(recipe)
        assert run.wait_for(line), run.lines
        time.sleep(0.5)
        children = descendants(run)
        assert children
        if number == signal.SIGINT:
            os.killpg(run.process.pid, number)  # as a terminal does
        else:
            os.kill(run.process.pid, number)
        assert run.end(timeout=10) == 130
        said = [each for each in run.lines if "Traceback" in each or each.startswith("martlet: ")]
        assert said == [INTERRUPTED], run.lines
        assert run.lines[-1] == INTERRUPTED
        assert_gone_within(children, 5)

    run = start(recipe)
    assert run.wait_for("validate gguf ..."), run.lines
    children = descendants(run)
    run.process.kill()
    run.end(timeout=10)
    assert_gone_within(children, 10)

    run = start(recipe)
    assert run.end() == 0, run.lines
    assert any("distill: done, from the store" in line for line in run.lines)
    assert_store_is_whole(tmp_path / "store")
    assert release_stage.verify(tmp_path / "release") == []
    undisturbed = start(recipe, tmp_path / "other-store", tmp_path / "other-release")
    assert undisturbed.end() == 0, undisturbed.lines
    assert what_it_is(tmp_path / "release") == what_it_is(tmp_path / "other-release")


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_thirty_kills_at_random_points_of_all_stages(
    tiny_recipe: dict[str, Any],
    write_recipe: Callable[[dict[str, Any]], Path],
    start: Callable[..., Run],
    tmp_path: Path,
) -> None:
    """SIGKILL to the flow, or to one of its child processes, at random points of every stage, in turn."""
    tiny_recipe["export"] |= {"mlc": ["q4f32_1"], "onnx": ["fp32", "int4"]}
    tiny_recipe["pretrain"] = {"tokens": 64, "checkpoint_every": 1}
    tiny_recipe["instruct"] |= {"lora": {"rank": 2, "alpha": 4}, "checkpoint_every": 1}
    recipe = write_recipe(tiny_recipe)
    undisturbed = start(recipe, tmp_path / "other-store", tmp_path / "other-release")
    assert undisturbed.end(1200) == 0, undisturbed.lines
    seconds = seconds_of_stages(undisturbed.lines)
    assert len(seconds) == 20, seconds

    seed = int(os.environ.get("MARTLET_KILL_SEED", "0"))
    chance = random.Random(seed)
    kills = {"flow": 0, "child": 0}
    struck: set[str] = set()
    stages = [name for name in seconds for _ in range(2)]
    for name in stages:
        if sum(kills.values()) == 30:
            break
        run = start(recipe)
        if not run.wait_for(f"{name} ..."):
            assert run.end() == 0, run.lines
            break
        if any(f"{name}: done" in line for line in run.lines):
            run.process.kill()
            run.end()
            continue
        time.sleep(chance.uniform(0, seconds[name]))
        if run.process.poll() is None:
            children = descendants(run)
            workers = [child for child in children if is_worker(child)]
            if workers and chance.random() < 0.3:
                chance.choice(workers).kill()
                kills["child"] += 1
                code = run.end(600)
                assert code in (0, 2), run.lines
                assert not any("Traceback" in line for line in run.lines)
            else:
                run.process.kill()
                kills["flow"] += 1
                run.end()
            struck.add(name)
            assert_gone_within(children, 20)
    run = start(recipe)
    assert run.end(1200) == 0, run.lines
    print(f"seed {seed}: {kills} kills in {len(struck)} of {len(seconds)} stages: {sorted(struck)}")
    assert sum(kills.values()) >= 20
    assert len(struck) >= 15
    assert_store_is_whole(tmp_path / "store")
    assert release_stage.verify(tmp_path / "release") == []
    assert what_it_is(tmp_path / "release") == what_it_is(tmp_path / "other-release")


def seconds_of_stages(lines: list[str]) -> dict[str, float]:
    """How long each stage took, from the lines that say when it starts and what it took."""
    found = (re.search(r"  (.+): done, ([\d.]+) s$", line) for line in lines)
    return {match[1]: float(match[2]) for match in found if match}


def is_worker(process: psutil.Process) -> bool:
    """An exporter or a measuring process, not Prefect's server and not the leash."""
    with contextlib.suppress(psutil.Error):
        command = " ".join(process.cmdline())
        return "uvicorn" not in command and "leash_process" not in command
    return False


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_runs_at_once_share(
    tiny_recipe: dict[str, Any],
    write_recipe: Callable[[dict[str, Any]], Path],
    start: Callable[..., Run],
    tmp_path: Path,
) -> None:
    """One store, one recipe, two commands: what one makes the other takes."""
    recipe = write_recipe(tiny_recipe)
    runs = [start(recipe, release=tmp_path / name) for name in ("one", "two")]
    assert [run.end() for run in runs] == [0, 0], [run.lines[-5:] for run in runs]
    taken = sum("from the store" in line for run in runs for line in run.lines)
    assert taken == len(seconds_of_stages(runs[0].lines + runs[1].lines)) - 1, "but each lays its release out"
    assert what_it_is(tmp_path / "one") == what_it_is(tmp_path / "two")
    assert_store_is_whole(tmp_path / "store")
