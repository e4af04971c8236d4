"""Killed, interrupted and cancelled runs: nothing of them stays behind, and the same command ends in the same
release as a run that nobody disturbed."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shipping import (
    Run,
    assert_gone_within,
    assert_store_is_whole,
    descendants,
    seconds_of_stages,
    what_it_is,
)

from flows.interrupts import INTERRUPTED, leashed_children
from pipeline import release as release_stage


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
@pytest.mark.timeout(1800)
def test_two_runs_at_once_share(
    tiny_recipe: dict[str, Any],
    write_recipe: Callable[[dict[str, Any]], Path],
    start: Callable[..., Run],
    tmp_path: Path,
) -> None:
    """One store, one recipe, two commands and a third that lays out the same release as the first: what one
    makes the others take."""
    recipe = write_recipe(tiny_recipe)
    runs = [start(recipe, release=tmp_path / name) for name in ("one", "two", "one")]
    assert [run.end(900) for run in runs] == [0, 0, 0], [run.lines[-5:] for run in runs]
    taken = sum("from the store" in line for run in runs for line in run.lines)
    stages = len(seconds_of_stages([line for run in runs for line in run.lines]))
    assert taken == 2 * (stages - 1), "but each looks after its release"
    assert what_it_is(tmp_path / "one") == what_it_is(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["one", "store", "two"]
    assert_store_is_whole(tmp_path / "store")


def test_a_leash_within_a_leash_is_the_same() -> None:
    """The command holds one, and the flow that it runs would."""
    with leashed_children():
        name = os.environ["MARTLET_RUN"]
        with leashed_children():
            assert os.environ["MARTLET_RUN"] == name
        assert os.environ["MARTLET_RUN"] == name
    assert "MARTLET_RUN" not in os.environ
