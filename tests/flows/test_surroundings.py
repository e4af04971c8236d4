"""What a run's surroundings do to it: a full disk, no memory, a clock that jumps, a store that was moved,
inputs and places that cannot be written."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from release_artifacts import example_artifacts, example_recipe, example_stage_times
from shipping import (
    Run,
    assert_gone_within,
    assert_store_is_whole,
    command_of,
    descendants,
    finished_artifacts,
    what_it_is,
)

from flows import distill_and_ship
from pipeline import cgroups
from pipeline import release as release_stage
from pipeline.artifacts import Store
from pipeline.errors import UserError

Call = Callable[..., tuple[int, str, str]]
Write = Callable[[dict[str, Any]], Path]
DISK = 256 << 20
MADE_WITHIN = {"distill_initial": "distill", "reference_logits": "fidelity_gguf"}
"""Artifacts that are made while another is, whose name the sentence says."""


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a small file system in memory; where that is not allowed, the test is skipped."""
    mounted: list[Path] = []

    def go(name: str, size: int = DISK) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("a small file system can be mounted only as root, where mounting is allowed")
        mounted.append(folder)
        return folder

    yield go
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def read_only(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


def the_sentence(err: str) -> str:
    """Martlet's sentence, which is the last line and the only one of its kind."""
    assert "Traceback" not in err, err
    lines = [line for line in err.splitlines() if line.startswith("martlet: ")]
    assert len(lines) == 1, err
    assert err.rstrip().splitlines()[-1] == lines[0]
    return lines[0]


def test_places_and_stores(mount: Callable[..., Path], tmp_path: Path) -> None:
    """On small example artifacts: a store and a release where nothing can be written are refused in words; a
    store that is moved and dated into the future is taken as it is, and its release is the same."""
    recipe = example_recipe()
    first, moved = mount("first"), tmp_path / "deeper" / "store"

    def ship(place: Path, release: Path) -> list[str]:
        lines: list[str] = []
        store = Store(place, report=lines.append)
        artifacts = example_artifacts(store, recipe)
        times = example_stage_times(artifacts, cached=True)
        release_stage.run(recipe, artifacts, release, store, times)
        return [role for role, artifact in artifacts.items() if not artifact.cached]

    made = ship(first / "store", tmp_path / "release")
    assert len(made) > 10
    read_only(first)
    with pytest.raises(
        UserError, match=r"first/store: the store cannot be written \(Read-only file system\)"
    ):
        ship(first / "store", tmp_path / "other")
    shutil.copytree(first / "store", moved)
    future = time.time() + 10 * 365 * 86_400
    for path in moved.rglob("*"):
        os.utime(path, (future, future))
    with pytest.raises(UserError, match=r"first/release: the release cannot be written there \(Read-only"):
        ship(moved, first / "release")
    assert ship(moved, tmp_path / "other") == []
    assert what_it_is(tmp_path / "other") == what_it_is(tmp_path / "release")
    assert_store_is_whole(moved)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("left", [0], ids=["nothing left"])
def test_a_full_disk_at_every_stage(
    martlet: Call,
    prefect_server: None,
    tiny_recipe: dict[str, Any],
    write_recipe: Write,
    mount: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    left: int,
) -> None:
    """Every stage once meets a disk that is full, or has too little left for what it writes; then there is
    room again, and it is made. All formats and LoRA, so that every library writes its own files."""
    tiny_recipe["export"] |= {"mlc": ["q4f32_1"], "onnx": ["fp32", "int4"]}
    tiny_recipe["pretrain"] = {"tokens": 64, "checkpoint_every": 1}
    tiny_recipe["instruct"] |= {"lora": {"rank": 2, "alpha": 4}, "checkpoint_every": 1}
    recipe = write_recipe(tiny_recipe)
    whole = tmp_path / "whole"
    # One at a time, so that it is known whose turn it is.
    monkeypatch.setattr(distill_and_ship, "fits_beside", lambda instruct: False)
    code, _, err = martlet("ship", recipe, "--store", whole, "--release", tmp_path / "release")
    assert code == 0, err
    made = finished_artifacts(whole)
    in_order = sorted(made, key=lambda name: made[name][1])
    disk = mount("disk")
    store, release = disk / "store", disk / "release"
    struck = []
    for count in range(len(in_order) + 1):
        there = set(in_order[:count])
        for name in set(finished_artifacts(store)) - there:
            shutil.rmtree(store / name)
        for name in there - set(finished_artifacts(store)):
            shutil.copytree(whole / name, store / name)
        fill(disk / "ballast", left)
        code, out, err = martlet("ship", recipe, "--store", store, "--release", release, "--json")
        (disk / "ballast").unlink()
        assert code == 2, err
        sentence = the_sentence(err)
        found = re.search(
            r"no space is left on the disk (?:while (\w+) wrote its result|for the release)", sentence
        )
        assert found, err
        struck.append(found[1] or "release")
        assert out == ""
        assert sorted(path.name for path in disk.iterdir()) == ["store"], "something of the release stayed"
        assert there <= set(finished_artifacts(store)), "something complete was lost"
        if there:
            assert_store_is_whole(store)
    print(f"{left} bytes left: {len(struck)} runs ended with the sentence, in {sorted(set(struck))}")
    if not left:
        turn = [*(name.split("/")[0] for name in in_order), "release"]
        assert struck == [MADE_WITHIN.get(stage, stage) for stage in turn]
    code, _, err = martlet("ship", recipe, "--store", store, "--release", release)
    assert code == 0, err
    assert what_it_is(release) == what_it_is(tmp_path / "release")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_disk_that_fills_up_under_the_whole_command(
    tiny_recipe: dict[str, Any],
    write_recipe: Write,
    start: Callable[..., Run],
    mount: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """As above, once in training, in the process that a user starts: Prefect's database is on that disk,
    too."""
    recipe = write_recipe(tiny_recipe)
    disk = mount("disk")
    run = start(recipe, disk / "store", disk / "release")
    assert run.wait_for("distill ..."), run.lines
    fill(disk / "ballast", 0)
    children = descendants(run)
    assert run.end() == 2, run.lines
    assert_gone_within(children, 20)
    assert not any("Traceback" in line for line in run.lines), run.lines
    assert "no space is left" in run.lines[-1] or "lack of memory or disk space" in run.lines[-1], run.lines
    (disk / "ballast").unlink()
    run = start(recipe, disk / "store", disk / "release")
    assert run.end() == 0, run.lines
    assert_store_is_whole(disk / "store")


def fill(ballast: Path, left: int) -> None:
    """Makes a file that leaves so many bytes free."""
    size = 0
    with ballast.open("wb") as file:
        while (more := shutil.disk_usage(ballast.parent).free - left) > 0:
            # A run that writes beside this may be quicker.
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), size, more)
                size += more


@contextlib.contextmanager
def group(memory: int) -> Iterator[Callable[[int], None]]:
    """A control group with so many bytes; yields what moves a process into it."""

    def into(pid: int) -> None:
        for file in files:
            file.write_text(str(pid), encoding="ascii")

    try:
        with cgroups.limited(memory, 2.0) as files:
            yield into
    except cgroups.Unavailable as problem:
        pytest.skip(f"this machine makes no control groups ({problem})")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_that_runs_out(
    tiny_recipe: dict[str, Any], write_recipe: Write, start: Callable[..., Run], tmp_path: Path
) -> None:
    """The kernel kills for lack of memory in a control group: the command while it starts, while it trains,
    the process that measures. Nothing stays behind, and with memory the same command goes on."""
    recipe = write_recipe(tiny_recipe)
    undisturbed = start(recipe, tmp_path / "other-store", tmp_path / "other-release")
    assert undisturbed.end() == 0, undisturbed.lines
    for stage, megabytes, whom in OUT_OF_MEMORY:
        with group(megabytes << 20) as into:
            run = start(recipe)
            if stage is not None:
                assert run.wait_for(f"{stage} ..."), run.lines
            into(run.process.pid if whom is None else a_worker(run, whom).pid)
            children = descendants(run)
            code = run.end(600)
            assert_gone_within(children, 20)
        print(f"{megabytes} MB from {stage or 'the start'} on: exit {code}, {run.lines[-1:]}")
        assert not any("Traceback" in line for line in run.lines), run.lines
        if whom is None:
            assert code in (-signal.SIGKILL, 2), (code, run.lines)
        else:
            assert code == 2, run.lines
            assert "SIGKILL (by the kernel, where memory is short)" in run.lines[-1], run.lines
    run = start(recipe)
    assert run.end() == 0, run.lines
    assert_store_is_whole(tmp_path / "store")
    assert what_it_is(tmp_path / "release") == what_it_is(tmp_path / "other-release")


OUT_OF_MEMORY = (
    (None, 300, None),
    ("distill", 16, None),
    ("validate gguf", 64, "validate_worker"),
)
"""From which stage on, how many MB, and which child process; the command itself where that is None."""


def a_worker(run: Run, module: str) -> psutil.Process:
    """The child process that runs a module, as soon as it is there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for child in descendants(run):
            if module in command_of(child):
                return child
        time.sleep(0.02)
    pytest.fail(f"no process of {module}: {run.lines}")


JUMPING_CLOCK = """
import time
real, real_ns = time.time, time.time_ns
# Every other fifth of a second it is a year later, and then a day earlier.
jump = lambda: 31_536_000 if int(time.monotonic() * 5) % 2 else -86_400
time.time = lambda: real() + jump()
time.time_ns = lambda: real_ns() + jump() * 10**9
"""
"""Found by every Python process of the run, children and Prefect's server included, before its own code. The
system's clock is not touched: other programs live by it."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_clock_that_jumps_and_a_store_that_moves(
    tiny_recipe: dict[str, Any], write_recipe: Write, start: Callable[..., Run], tmp_path: Path
) -> None:
    """A run under a clock that jumps is killed, its store moved, its files dated into the future, and another
    run ends it: the release is that of a run that nothing happened to, and nothing complete is made again."""
    recipe = write_recipe(tiny_recipe)
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(JUMPING_CLOCK)
    clock = {"PYTHONPATH": f"{tmp_path / 'clock'}{os.pathsep}{Path(__file__).parents[2]}"}
    first, moved = tmp_path / "first" / "store", tmp_path / "second" / "place" / "store"
    run = start(recipe, first, tmp_path / "release", **clock)
    assert run.wait_for("instruct ..."), run.lines
    children = descendants(run)
    os.killpg(run.process.pid, signal.SIGKILL)
    run.end()
    assert_gone_within(children, 20)
    moved.parent.mkdir(parents=True)
    first.rename(moved)
    future = time.time() + 10 * 365 * 86_400
    for path in moved.rglob("*"):
        if path.is_file():
            os.utime(path, (future, future))
    before = finished_artifacts(moved)
    assert any(name.startswith("distill/") for name in before)
    run = start(recipe, moved, tmp_path / "release", **clock)
    assert run.end() == 0, run.lines
    now = finished_artifacts(moved)
    assert {name: now.get(name) for name in before} == before
    assert not first.exists()
    assert_store_is_whole(moved)
    undisturbed = start(recipe, tmp_path / "other-store", tmp_path / "other-release")
    assert undisturbed.end() == 0, undisturbed.lines
    assert what_it_is(tmp_path / "release") == what_it_is(tmp_path / "other-release")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_read_only_places(
    martlet: Call,
    prefect_server: None,
    tiny_recipe: dict[str, Any],
    tiny_model_dir: Path,
    mount: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Inputs may lie where nothing can be written; a store or a release there is refused with a sentence."""
    inputs = mount("inputs")
    shutil.copytree(tiny_model_dir, inputs / "teacher")
    tiny_recipe["teacher"]["model"] = "./teacher"
    for section in ("text", "chats"):
        (source,) = tiny_recipe["data"][section]["sources"]
        shutil.copy(source, inputs)
        tiny_recipe["data"][section]["sources"] = [f"./{Path(source).name}"]
    recipe = inputs / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe), encoding="utf-8")
    read_only(inputs)
    code, _, err = martlet("ship", recipe, "--store", inputs / "store", "--release", tmp_path / "release")
    assert code == 2, err
    assert f"{inputs / 'store'}: the store cannot be written" in the_sentence(err)
    store = tmp_path / "store"
    code, _, err = martlet("ship", recipe, "--store", store, "--release", inputs / "release")
    assert code == 2, err
    assert "the release cannot be written there" in the_sentence(err)
    code, _, err = martlet("ship", recipe, "--store", store, "--release", tmp_path / "release")
    assert code == 0, err
    assert_store_is_whole(store)
    assert release_stage.verify(tmp_path / "release") == []
