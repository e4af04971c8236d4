"""A store is listed, explained and pruned, and keeps what a release needs."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.command_line import app, run
from pipeline.artifacts import Artifact, Store, damage, in_use
from pipeline.errors import UserError
from pipeline.inventory import (
    entries,
    explain,
    find,
    forget_release,
    leftovers,
    problems,
    prunable,
    prune,
    unused,
)

NOW = 1_700_000_000.0
DAY = 86_400.0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", report=lambda line: None)


def add(
    store: Store, stage: str, size: int = 10, days: float = 0, inputs: Any = None, **parameters: Any
) -> Artifact:
    """An artifact of so many bytes that was last used so many days before ``NOW``."""

    def make(output: Path, work: Path) -> None:
        (output / "data.bin").write_bytes(f"{stage}{parameters}".encode().ljust(size, b"\0"))

    artifact = store.get_or_make(stage, 1, parameters, inputs or {}, make)
    used = NOW - days * DAY
    os.utime(artifact.path / "artifact.json", (used, used))
    os.utime(artifact.path, (used, used))
    return artifact


def flip(path: Path) -> None:
    """Flips the lowest bit of a file's middle byte."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_listing(store: Store) -> None:
    old = add(store, "distill", days=9, learning_rate=1)
    new = add(store, "distill", days=1, learning_rate=2)
    text = add(store, "prepare", size=500)
    (store.root / "prefect").mkdir()
    found = entries(store.root)
    assert [entry.path for entry in found] == [old.path, new.path, text.path]
    assert 500 <= found[-1].bytes < 3_000
    assert found[0].made == NOW - 9 * DAY
    store.get_or_make("distill", 1, {"learning_rate": 1}, {}, lambda output, work: pytest.fail("made twice"))
    assert entries(store.root)[0].used > NOW - 9 * DAY, "a hit is a use"


def test_finding(store: Store) -> None:
    old = add(store, "distill", days=9, learning_rate=1)
    new = add(store, "distill", learning_rate=2)
    assert find(store.root, "distill").key == new.key
    assert find(store.root, old.key[:12]).key == old.key
    assert find(store.root, f"distill/{old.key}").key == old.key
    with pytest.raises(UserError, match=r"holds no artifact 'teleport'; martlet store list shows"):
        find(store.root, "teleport")
    with pytest.raises(UserError, match=r"nowhere: no such store"):
        entries(store.root / "nowhere")


def test_why_something_was_made_again_is_followed_to_what_changed(store: Store) -> None:
    for days, tokens in ((5, 1000), (3, 2000)):
        text = add(store, "prepare", days=days, text={"train_tokens": tokens})
        add(store, "distill", days=days - 1, inputs={"text": text}, learning_rate=0.1)
    again = find(store.root, "distill")
    lines = explain(store.root, again)
    first = entries(store.root)[0].key[:12]
    assert lines[0].startswith(
        f"distill {again.key[:12]}: its input text is another one than that of {first}"
    )
    assert "parameters.text.train_tokens is 2000, was 1000" in lines[1]
    assert len(lines) == 2
    oldest = entries(store.root)[0]
    assert explain(store.root, oldest) == [
        f"distill {oldest.key[:12]} is the first of its stage in this store"
    ]


def test_a_healed_artifact_explains_itself(store: Store) -> None:
    artifact = add(store, "distill", learning_rate=1)
    (artifact.path / "data.bin").write_bytes(b"x")
    assert [problem for problem in problems(store.root) if "data.bin" in problem]
    add(store, "distill", learning_rate=1)
    assert problems(store.root) == []
    assert "had been damaged" in explain(store.root, find(store.root, "distill"))[0]


def test_pruning_by_age_and_size_keeps_what_a_release_needs(store: Store, tmp_path: Path) -> None:
    teacher = add(store, "teacher", size=4000, days=90)
    student = add(store, "student", size=4000, days=90, inputs={"teacher": teacher})
    old = add(store, "distill", size=4000, days=40, learning_rate=1)
    recent = add(store, "distill", size=4000, days=2, learning_rate=2)
    store.keep_for(tmp_path / "release", [student])

    def paths(chosen: list) -> list[Path]:
        return [entry.path for entry in chosen]

    assert paths(prunable(store.root, older_than=30 * DAY, now=NOW)) == [old.path]
    assert paths(prunable(store.root, older_than=1 * DAY, now=NOW)) == [old.path, recent.path]
    assert paths(prunable(store.root, keep_bytes=15_000, now=NOW)) == [old.path]
    assert paths(prunable(store.root, keep_bytes=0, now=NOW)) == [old.path, recent.path]
    assert paths(prunable(store.root, keep_bytes=10**9, now=NOW)) == []
    total = sum(entry.bytes for entry in entries(store.root))
    freed = prune(store.root, prunable(store.root, keep_bytes=0, now=NOW))
    assert freed == total - sum(entry.bytes for entry in entries(store.root))
    assert {entry.path for entry in entries(store.root)} == {teacher.path, student.path}
    assert damage(teacher.path) is None
    assert not list(store.root.glob("*/*.partial"))

    with pytest.raises(UserError, match=r"knows no release .*elsewhere; it knows .*release"):
        forget_release(store.root, tmp_path / "elsewhere")
    forget_release(store.root, tmp_path / "release")
    assert len(prunable(store.root, keep_bytes=0, now=NOW)) == 2


def test_leftovers_are_listed_and_pruned(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    kept = add(store, "teacher", size=4000)

    def interrupted(output: Path, work: Path) -> None:
        (work / "checkpoint").mkdir()
        (work / "checkpoint" / "weights.bin").write_bytes(b"x" * 3000)
        raise KeyboardInterrupt

    seen: set[Path] = set()
    for days, rate in ((9, 1), (1, 2)):
        with pytest.raises(KeyboardInterrupt):
            store.get_or_make("distill", 1, {"learning_rate": rate}, {}, interrupted)
        (work,) = set(store.root.glob("distill/*.work")) - seen
        seen.add(work)
        for path in (work, *work.rglob("*")):
            os.utime(path, (NOW - days * DAY, NOW - days * DAY))
    damaged = add(store, "prepare", size=2000)
    flip(damaged.path / "data.bin")
    add(store, "prepare", size=2000)  # made anew
    old, recent, aside = leftovers(store.root)
    assert (old.state, recent.state, aside.state) == ("unfinished", "unfinished", "damaged")
    assert (old.used, recent.used) == (NOW - 9 * DAY, NOW - DAY)
    assert 3000 < old.bytes < 3100
    assert aside.shown == f"prepare-{damaged.key[:12]}"

    assert run(lambda: app(["store", "list", "--store", str(store.root), "--json"])) == 0
    states = [row["state"] for row in json.loads(capsys.readouterr().out)]
    assert states == ["finished", "finished", "unfinished", "unfinished", "damaged"]
    assert run(lambda: app(["store", "list", "--store", str(store.root)])) == 0
    assert "2 artifacts and 3 leftovers" in capsys.readouterr().out

    assert prunable(store.root, older_than=5 * DAY, now=NOW) == [old]
    with store._only_one(old.path.with_suffix("")):  # as a run that goes on from it holds it
        assert prune(store.root, [old]) == 0
    assert prune(store.root, [old, aside]) == old.bytes + aside.bytes
    assert leftovers(store.root) == [recent]
    assert {entry.stage for entry in entries(store.root)} == {"teacher", "prepare"}
    assert damage(kept.path) is None


def test_listing_beside_a_run_whose_checkpoints_come_and_go(store: Store) -> None:
    done = threading.Event()

    def run_on(output: Path, work: Path) -> None:
        while not done.is_set():
            folder = work / f"checkpoint-{time.monotonic_ns()}"
            folder.mkdir()
            for number in range(20):
                (folder / f"{number}.bin").write_bytes(b"x" * 100)
            shutil.rmtree(folder)
        (output / "model.bin").write_bytes(b"x")

    thread = threading.Thread(target=store.get_or_make, args=("distill", 1, {}, {}, run_on))
    thread.start()
    try:
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            assert all(entry.stage == "distill" for entry in leftovers(store.root))
    finally:
        done.set()
        thread.join()
    assert leftovers(store.root) == []
    assert len(entries(store.root)) == 1


def test_what_a_run_holds_locked_stays(store: Store) -> None:
    artifact = add(store, "distill", days=9)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with store._only_one(artifact.path):
            held.set()
            done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    chosen = prunable(store.root, older_than=DAY, now=NOW)
    assert prune(store.root, chosen) == 0
    assert artifact.path.exists()
    done.set()
    thread.join()
    assert prune(store.root, chosen) > 0
    assert not artifact.path.exists()


def test_a_store_is_validated_by_the_command(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (add(store, "distill", learning_rate=rate) for rate in (1, 2))
    store.keep_for(tmp_path / "release", [first])
    command = ["validate", "--store", str(store.root)]

    def validate(*options: str) -> tuple[int, str, str]:
        code = run(lambda: app([*command, *options], standalone_mode=False))
        said = capsys.readouterr()
        return code, said.out, said.err

    assert validate() == (0, f"{store.root}: every file is as it was written.\n", "")
    assert json.loads(validate("--json")[1]) == {"store": str(store.root), "problems": []}

    flip(first.path / "data.bin")
    (second.path / "artifact.json").unlink()
    (record,) = (store.root / "releases").iterdir()
    flip(record)
    code, out, err = validate()
    assert code == 1
    assert err == f"martlet: {store.root}: 3 damaged; the next run makes what it needs of it anew.\n"
    assert set(out.splitlines()) == {
        f"{first.path / 'data.bin'} is damaged (its SHA-256 is not the recorded one).",
        f"{second.path / 'artifact.json'} is missing or damaged.",
        f"{record} is damaged.",
    }
    code, out, _ = validate("--json")
    assert (code, len(json.loads(out)["problems"])) == (1, 3)


def test_nothing_is_pruned_while_a_run_uses_the_store(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """A first run makes one artifact from another before any release needs either."""
    command = ["store", "prune", "--store", str(store.root), "--keep", "0"]
    seen: list[tuple[int, str]] = []

    def prune_with(*options: str) -> int:
        return run(lambda: app([*command, *options], standalone_mode=False))

    def make(output: Path, work: Path) -> None:
        for options in ([], ["--yes"]):
            seen.append((prune_with(*options), capsys.readouterr().err))
        (output / "data.bin").write_bytes((teacher.path / "data.bin").read_bytes())

    with in_use(store.root), in_use(store.root):
        teacher = add(store, "teacher", days=90)
        store.get_or_make("distill", 1, {}, {"teacher": teacher}, make)
    refusal = f"martlet: {store.root}: a run is using this store; prune when it has ended, or end it.\n"
    assert seen == [(0, ""), (2, refusal)]
    assert prune_with("--yes") == 0
    assert entries(store.root) == []


def test_a_run_waits_for_pruning(store: Store) -> None:
    add(store, "teacher")
    entered = threading.Event()

    def use() -> None:
        with in_use(store.root):
            entered.set()

    thread = threading.Thread(target=use)
    with unused(store.root):
        thread.start()
        assert not entered.wait(0.3)
    thread.join(10)
    assert entered.is_set()


@pytest.mark.parametrize("harm", [flip, Path.unlink])
def test_inputs_behind_a_damaged_manifest_are_not_pruned(
    store: Store, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    teacher = add(store, "teacher", days=90)
    student = add(store, "student", days=90, inputs={"teacher": teacher})
    store.keep_for(tmp_path / "release", [student])
    harm(student.path / "artifact.json")
    with pytest.raises(
        UserError, match=r"student/\w+/artifact\.json: is missing or damaged, so what .*release"
    ):
        prunable(store.root, keep_bytes=0)
    add(store, "student", days=90, inputs={"teacher": teacher})
    assert [entry.state for entry in prunable(store.root, keep_bytes=0)] == ["damaged"]
