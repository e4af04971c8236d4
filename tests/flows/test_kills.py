"""SIGKILL at thirty random points of all stages: the same command goes on each time, makes nothing twice
that was complete, and ends in the release of a run that nobody disturbed."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shipping import (
    Run,
    assert_gone_within,
    assert_store_is_whole,
    descendants,
    finished_artifacts,
    is_server,
    is_worker,
    seconds_of_stages,
    what_it_is,
)

from flows.distill_and_ship import stage_names
from pipeline import release as release_stage
from pipeline.recipe import load_recipe

KILLS = int(os.environ.get("MARTLET_KILLS", "30"))
A_ROUND = 10
"""Kills after which a run is left alone, and its release compared."""
START = "start"
"""Before the first stage: libraries are loaded, Prefect's server makes its database."""
VICTIMS = ("group", "group", "group", "flow", "worker", "server")
"""What is killed: the whole process group, exporter, measuring process and Prefect's server included; the
flow alone; one of its child processes alone; Prefect's server alone."""


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_thirty_kills_leave_no_trace(
    tiny_recipe: dict[str, Any],
    write_recipe: Callable[[dict[str, Any]], Path],
    start: Callable[..., Run],
    tmp_path: Path,
) -> None:
    """Each round has a store of its own, goes through the stages, and ends with a run that is left alone."""
    tiny_recipe["export"]["onnx"] = ["int4"]
    tiny_recipe["pretrain"] = {"tokens": 64, "checkpoint_every": 1}
    tiny_recipe["instruct"] |= {"lora": {"rank": 2, "alpha": 4}, "checkpoint_every": 1}
    recipe = write_recipe(tiny_recipe)
    began = time.monotonic()
    undisturbed = start(recipe, tmp_path / "other-store", tmp_path / "other-release")
    assert undisturbed.wait_for("teacher ..."), undisturbed.lines
    starting = time.monotonic() - began
    assert undisturbed.end(1200) == 0, undisturbed.lines
    took = seconds_of_stages(undisturbed.lines)
    seconds = {START: starting, **{name: took[name] for name in stage_names(load_recipe(recipe))}}
    print(f"undisturbed: {time.monotonic() - began:.0f} s, by stage {seconds}")
    truth = what_it_is(tmp_path / "other-release")

    seed = int(os.environ.get("MARTLET_KILL_SEED", "0"))
    chance = random.Random(seed)
    print(f"seed {seed}")
    struck: list[tuple[str, str]] = []
    round_ = 0
    while len(struck) < KILLS:
        round_ += 1
        assert round_ <= KILLS, struck
        place = tmp_path / f"round-{round_}"
        count = min(A_ROUND, KILLS - len(struck))
        chosen = chance.sample(list(seconds), count)
        stages = sorted(chosen, key=list(seconds).index)
        for stage in stages:
            before = finished_artifacts(place / "store")
            run = start(recipe, place / "store", place / "release")
            victim = chance.choice(VICTIMS)
            if stage != START and not run.wait_for(f"{stage} ..."):
                assert run.end() == 0, run.lines
                break
            delay = chance.uniform(0, seconds[stage])
            time.sleep(delay)
            if run.process.poll() is not None:
                assert run.end() == 0, run.lines
                break
            victim, code = strike(run, victim, chance)
            assert not any("Traceback" in line for line in run.lines), run.lines
            now = finished_artifacts(place / "store")
            assert {name: now.get(name) for name in before} == before, "something complete was made again"
            running = next(
                (
                    line.split("  ")[1].removesuffix(" ...")
                    for line in reversed(run.lines)
                    if line.endswith(" ...")
                ),
                START,
            )
            struck.append((running, victim))
            sentence = next((line for line in run.lines if line.startswith("martlet: ")), "")
            print(
                f"{len(struck):2}  round {round_}  {running:20} {delay:5.1f} s  {victim:7} exit {code:4}  "
                f"{len(before):2} complete before, {len(now):2} after  {sentence}"
            )
        before = finished_artifacts(place / "store")
        run = start(recipe, place / "store", place / "release")
        assert run.end(1200) == 0, run.lines
        now = finished_artifacts(place / "store")
        assert {name: now.get(name) for name in before} == before, "something complete was made again"
        assert set(now) == set(finished_artifacts(tmp_path / "other-store"))
        assert_store_is_whole(place / "store")
        assert sorted(path.name for path in place.iterdir()) == ["release", "store"], (
            "something else was left"
        )
        assert release_stage.verify(place / "release") == []
        assert release_stage.verify_inputs(place / "release") == []
        assert what_it_is(place / "release") == truth
    kinds = Counter(victim for _, victim in struck)
    print(
        f"seed {seed}: {len(struck)} kills ({dict(kinds)}) in {len({stage for stage, _ in struck})} of "
        f"{len(seconds)} stages, {round_} releases equal to the undisturbed one, "
        f"{time.monotonic() - began:.0f} s"
    )
    # Most stages of a tiny run take less than a second, so a kill aimed at one may strike the next.
    assert KILLS < 30 or len({stage for stage, _ in struck}) >= 10


def strike(run: Run, victim: str, chance: random.Random) -> tuple[str, int]:
    """Kills and waits until all of the run is gone; what was killed, and the run's exit code. Where there is
    no such child process the whole group is killed."""
    children = descendants(run)
    kinds = {"worker": is_worker, "server": is_server}
    chosen = [child for child in children if victim in kinds and kinds[victim](child)]
    if chosen:
        chance.choice(chosen).kill()
        code = run.end(600)
        # A worker may have done its work.
        assert code == 2 or (victim == "worker" and code == 0), run.lines
    elif victim == "flow":
        run.process.kill()
        code = run.end()
    else:
        victim = "group"
        os.killpg(run.process.pid, signal.SIGKILL)
        code = run.end()
    assert_gone_within(children, 20)
    return victim, code
