"""Any file of a release or of a store with a bit flipped, cut short or removed: it is named, the next run
makes it anew, and no release holds it.

The quick tests harm every file of small example artifacts in one way; the slow ones in every way, and those
of a real run. MARTLET_DAMAGE_SEED draws other places.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from release_artifacts import example_artifacts, example_recipe, example_stage_times
from shipping import Run, assert_store_is_whole, finished_artifacts, what_it_is

from flows.prefect_database import put_damaged_aside
from pipeline import release as release_stage
from pipeline import web
from pipeline.artifacts import Artifact, Store, damage, is_as_written, read_manifest
from pipeline.errors import UserError
from pipeline.inventory import prunable

Call = Callable[..., tuple[int, str, str]]
Write = Callable[[dict[str, Any]], Path]
SEED = int(os.environ.get("MARTLET_DAMAGE_SEED", "0"))


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data or b"x")


def cut(path: Path, chance: random.Random) -> None:
    """Cuts something off; of JSON more than the line's end, without which it says the same."""
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(max(1, len(data.rstrip())))] if data else b"x")


def remove(path: Path, chance: random.Random) -> None:
    path.unlink()


HARMS = (flip, cut, remove)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files_of(folder)
    }


class Example:
    """Small artifacts of all stages in a store, and the release that is laid out from them."""

    def __init__(self, folder: Path) -> None:
        self.lines: list[str] = []
        self.store = Store(folder / "store", report=self.lines.append)
        self.recipe = example_recipe()
        self.root = folder / "place" / "release"

    def make(self) -> dict[str, Artifact]:
        return example_artifacts(self.store, self.recipe)

    def ship(self) -> None:
        artifacts = self.make()
        release_stage.run(
            self.recipe, artifacts, self.root, self.store, example_stage_times(artifacts, cached=True)
        )


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Example:
    # Where the page was built a release would have 40 MB more to hash, hundreds of times.
    monkeypatch.setattr(web, "BUILT", tmp_path / "no-page")
    return Example(tmp_path)


thoroughly = pytest.mark.parametrize(
    "thorough", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)


def harmed_files(files: list[Path], chance: random.Random, thorough: bool) -> Iterator[tuple[Path, Any]]:
    """Harms one file after the other, each in every way or in one of them, and yields it with the way. It is
    put back afterwards, unless somebody else has done so."""
    for number, path in enumerate(files):
        for harm in HARMS if thorough else [HARMS[number % 3]]:
            sound = path.read_bytes()
            harm(path, chance)
            yield path, harm
            if not path.exists() or path.read_bytes() != sound:
                path.write_bytes(sound)


@thoroughly
def test_every_file_of_a_release(example: Example, martlet: Call, thorough: bool) -> None:
    """Each is named by ``validate`` and ``verify``, nothing else is, and the next run lays the release out as
    it was."""
    example.ship()
    good, chance = contents(example.root), random.Random(SEED)
    assert martlet("verify", example.root)[0] == 0
    kept = 0
    for number, (path, harm) in enumerate(harmed_files(files_of(example.root), chance, thorough)):
        for command in ("validate", "verify"):
            code, out, err = martlet(command, example.root)
            # Without its manifest a folder is no release.
            assert code in ((1, 2) if path.name == "manifest.json" else (1,)), (command, path, err)
            assert out == ""
            assert len(err.splitlines()) == 1, (command, path, err)
            assert err.startswith(f"martlet: {path}: "), (command, path, err)
        readable = release_stage.read_manifest(example.root) is not None
        if not readable:
            assert path.name == "manifest.json"
            with pytest.raises(UserError, match=r"is no release of martlet \(manifest\.json is missing, dam"):
                example.ship()
            continue
        # Of a manifest's lines, one may say something wrong of another file.
        assert path.name == "manifest.json" or len(release_stage.verify(example.root)) == 1, path
        if thorough or number % 8 == 0:
            example.ship()
            assert contents(example.root) == good, path
            kept += harm is not remove
    # What was changed may be somebody's work and is kept under another name; what is missing is not.
    others = [path.name for path in example.root.parent.iterdir() if path != example.root]
    assert sorted(others) == sorted(f"release.previous-{number + 1}" for number in range(kept))
    assert kept


@thoroughly
def test_every_file_of_a_store(example: Example, thorough: bool) -> None:
    """Each is named, put aside and made anew, what needs it is not, and the release stays what it is."""
    example.ship()
    good, chance = contents(example.root), random.Random(SEED)
    every = finished_artifacts(example.store.root)
    held = [path for name in every for path in files_of(example.store.root / name)]
    digests = {name: artifact.digest for name, artifact in example.make().items()}
    count = 0
    for path, _ in harmed_files(held, chance, thorough):
        count += 1
        folder = example.store.root / Path(*path.relative_to(example.store.root).parts[:2])
        before = finished_artifacts(example.store.root)
        problem = damage(folder)
        assert problem is not None, path
        assert problem.startswith(f"{path} is "), (path, problem)
        example.lines.clear()
        assert {name: artifact.digest for name, artifact in example.make().items()} == digests
        (warning,) = example.lines
        assert warning.startswith(f"warning: {folder.parent.name}: {path} is ")
        after = finished_artifacts(example.store.root)
        changed = {name for name in after if after[name] != before.get(name)}
        assert changed == {folder.relative_to(example.store.root).as_posix()}
        assert damage(folder) is None
    assert len(list((example.store.root / "quarantine").iterdir())) == count
    example.ship()
    assert contents(example.root) == good
    assert [path.name for path in example.root.parent.iterdir()] == ["release"]


@thoroughly
def test_every_bit_of_a_manifest(example: Example, thorough: bool) -> None:
    """Bits of an ``artifact.json`` and of a ``manifest.json`` flipped one at a time, and both cut to every
    length: each is found, or the values are the same, as without the line's end. Thoroughly means all bits of
    the first and one in 31 of the second."""
    example.ship()
    smallest = min((artifact.path for artifact in example.make().values()), key=manifest_size)
    place = example.root / release_stage.MANIFEST
    sound = place.read_bytes()

    def in_store(data: bytes) -> bool:
        (smallest / "artifact.json").write_bytes(data)
        return read_manifest(smallest) is not None

    def in_release(data: bytes) -> bool:
        place.write_bytes(data)
        manifest = release_stage.read_manifest(example.root)
        return manifest is not None and is_as_written(manifest, release_stage.KEYS)

    for accepted, data, step in (
        (in_store, (smallest / "artifact.json").read_bytes(), 1 if thorough else 37),
        (in_release, sound, 31 if thorough else 1009),
    ):
        truth, unnoticed = json.loads(data), []
        for bit in range(0, 8 * len(data), step):
            harmed = bytearray(data)
            harmed[bit // 8] ^= 1 << bit % 8
            if accepted(bytes(harmed)):
                unnoticed.append(bytes(harmed))
        for length in range(0, len(data), step):
            if accepted(data[:length]):
                unnoticed.append(data[:length])
        assert [each for each in unnoticed if json.loads(each) != truth] == []
        assert len(unnoticed) <= 1, "nothing but the line's end may be missing"
        assert accepted(data)


def manifest_size(folder: Path) -> int:
    return (folder / "artifact.json").stat().st_size


def test_what_a_release_needs_is_not_pruned_when_its_record_is_damaged(example: Example) -> None:
    """The next run writes the record anew."""
    example.ship()
    (record,) = (example.store.root / "releases").iterdir()
    sound = record.read_bytes()
    # The line's end alone may be missing.
    lengths = [sound[:length] for length in range(len(sound) - 1)]
    flips = [bytearray(sound) for _ in range(0, 8 * len(sound), 7)]
    for number, data in enumerate(flips):
        data[7 * number // 8] ^= 1 << 7 * number % 8
    for harmed in (*lengths[::29], *flips[::5]):
        record.write_bytes(harmed)
        with pytest.raises(UserError) as refusal:
            prunable(example.store.root, keep_bytes=0)
        assert str(refusal.value).startswith(f"{record}: is damaged"), harmed
    example.ship()
    assert record.read_bytes() == sound
    assert prunable(example.store.root, keep_bytes=0) == []


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed")
def test_a_manifest_written_anew_by_somebody_else(example: Example, martlet: Call, tmp_path: Path) -> None:
    """It fits the files that it lists, so that only a signature tells."""
    example.ship()
    key, allowed = tmp_path / "key", tmp_path / "allowed"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    allowed.write_text(f"me@example.org {key.with_suffix('.pub').read_text()}")
    code, _, err = martlet("verify", example.root, "--signed-by", allowed)
    assert (code, "the release is not signed." in err) == (1, True), err
    assert martlet("sign", example.root, "--key", key)[0] == 0
    code, out, err = martlet("verify", example.root, "--signed-by", allowed)
    assert code == 0, err
    assert "signed by me@example.org" in out

    def edit(facts: dict[str, Any]) -> None:
        facts["fidelity"][0]["mean_kl"] = 0.0

    release_stage.change_report(example.root, edit)
    assert martlet("verify", example.root)[0] == 0
    code, _, err = martlet("verify", example.root, "--signed-by", allowed)
    assert code == 1
    assert "is not the signature of this manifest.json" in err


def empty(path: Path, chance: random.Random) -> None:
    path.write_bytes(b"")


def scribble(path: Path, chance: random.Random) -> None:
    """Overwrites a quarter of a database, its header aside."""
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 2, len(data) * 3 // 4):
        data[place] = chance.randrange(256)
    path.write_bytes(data)


def behead(path: Path, chance: random.Random) -> None:
    path.write_bytes(b"\0" * 100 + path.read_bytes()[100:])


def halve(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DATABASE_HARMS = {scribble: True, behead: True, halve: True, empty: False, remove: False}
"""Whether there is anything to name: an empty file is a new database to SQLite."""


@pytest.mark.parametrize("harm", DATABASE_HARMS)
def test_a_damaged_database_is_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: Any) -> None:
    file = tmp_path / "prefect" / "prefect.db"
    file.parent.mkdir()
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE runs (name TEXT)")
        database.executemany("INSERT INTO runs VALUES (?)", [(f"run {n}" * 20,) for n in range(2000)])
        database.commit()
    put_damaged_aside(tmp_path)
    assert caplog.messages == []
    harm(file, random.Random(SEED))
    left = file.read_bytes() if file.exists() else None
    put_damaged_aside(tmp_path)
    if DATABASE_HARMS[harm]:
        (aside,) = (tmp_path / "quarantine").iterdir()
        assert (aside / "prefect.db").read_bytes() == left
        assert not file.exists()
        (line,) = caplog.messages
        assert line.startswith(f"warning: {file} is damaged (")
    else:
        assert caplog.messages == []
        assert not (tmp_path / "quarantine").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_runs_go_on_with_another_database(
    tiny_recipe: dict[str, Any], write_recipe: Write, start: Callable[..., Run], tmp_path: Path
) -> None:
    """The database of Prefect's own server, in the command that a user starts."""
    recipe, file = write_recipe(tiny_recipe), tmp_path / "store" / "prefect" / "prefect.db"
    run = start(recipe)
    assert run.end() == 0, run.lines
    for harm, named in DATABASE_HARMS.items():
        # What the server has not yet taken into the file itself would mend it.
        for path in file.parent.glob("prefect.db-*"):
            path.unlink()
        harm(file, random.Random(SEED))
        run = start(recipe)
        assert run.end() == 0, (harm, run.lines)
        warnings = [line for line in run.lines if "warning: " in line]
        assert len(warnings) == named, (harm, run.lines)
        assert all(f"{file} is damaged" in line for line in warnings)
        assert not any("Traceback" in line for line in run.lines), run.lines


READ_LATER = {"distill_initial": "distill", "reference_logits": "fidelity_gguf"}
"""Artifacts that a run looks at only when it makes what needs them."""


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_a_real_run(
    martlet: Call, prefect_server: None, tiny_recipe: dict[str, Any], write_recipe: Write, tmp_path: Path
) -> None:
    """Every file of a real release and of its store harmed in every way is named; every artifact, harmed, is
    made anew by the same command, and the release stays what it is."""
    tiny_recipe["export"] |= {"mlc": ["q4f32_1"], "onnx": ["fp32"]}
    recipe, store, release = write_recipe(tiny_recipe), tmp_path / "store", tmp_path / "release"

    def ship() -> str:
        code, _, err = martlet("ship", recipe, "--store", store, "--release", release)
        assert code == 0, err
        assert "Traceback" not in err
        return err

    ship()
    truth = what_it_is(release)
    chance = random.Random(SEED)
    shipped = files_of(release)
    for path in shipped:
        for harm in HARMS:
            sound = path.read_bytes()
            harm(path, chance)
            for command in ("validate", "verify"):
                code, _, err = martlet(command, release)
                assert code in ((1, 2) if path.name == "manifest.json" else (1,)), (command, harm, path)
                assert err.startswith(f"martlet: {path}: "), (command, harm, path, err)
            path.write_bytes(sound)
    assert martlet("verify", release)[0] == 0
    weights = [path for path in shipped if path.name != "manifest.json"]
    for path, harm in zip(chance.sample(weights, 6), HARMS * 2, strict=True):
        harm(path, chance)
        said = ship()
        assert harm is remove or f"was changed by hand ({path}: " in said
        assert what_it_is(release) == truth
        assert martlet("verify", release)[0] == 0

    every = finished_artifacts(store)
    held = [path for name in every for path in files_of(store / name)]
    for path in held:
        for harm in HARMS:
            sound = path.read_bytes()
            harm(path, chance)
            folder = store / Path(*path.relative_to(store).parts[:2])
            problem = damage(folder)
            assert problem is not None, (harm, path)
            assert problem.startswith(f"{path} is "), (harm, path, problem)
            path.write_bytes(sound)
            assert damage(folder) is None

    stages = {name.split("/")[0] for name in every}
    assert set(READ_LATER) <= stages
    for number, name in enumerate(sorted(every)):
        stage = name.split("/")[0]
        harmed = [name]
        if stage in READ_LATER:
            harmed += [other for other in every if other.split("/")[0] == READ_LATER[stage]][:1]
        before = finished_artifacts(store)
        places = [chance.choice(files_of(store / each)) for each in harmed]
        for path in places:
            HARMS[number % 3](path, chance)
        said = ship()
        for path in places:
            assert f"{path} is " in said, (path, said)
        assert said.count("put aside in") == len(harmed), said
        after = finished_artifacts(store)
        assert set(after) == set(every)
        assert {each for each in after if after[each] != before[each]} == set(harmed)
        assert what_it_is(release) == truth, places
    print(
        f"seed {SEED}: {len(shipped)} files of the release and {len(held)} of the store, each harmed in "
        f"{len(HARMS)} ways, are named; {len(every)} artifacts are made anew"
    )
    for path in (store / "quarantine").iterdir():
        path.rename(tmp_path / path.name)
    (store / "quarantine").rmdir()
    assert_store_is_whole(store)
    assert martlet("verify", release)[0] == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_damage_while_a_run_goes_on(
    tiny_recipe: dict[str, Any], write_recipe: Write, start: Callable[..., Run], tmp_path: Path
) -> None:
    """An exported file is damaged after it was made and before it is judged: that is no missed gate, and the
    next run judges the file that it makes anew."""
    recipe = write_recipe(tiny_recipe)
    undisturbed = start(recipe, tmp_path / "other-store", tmp_path / "other-release")
    assert undisturbed.end() == 0, undisturbed.lines
    run = start(recipe)
    assert run.wait_for("validate gguf ..."), run.lines
    (exported,) = (tmp_path / "store" / "export_gguf").glob("*/files/*.gguf")
    weights = bytearray(exported.read_bytes())
    for place in range(len(weights) // 2, len(weights), 97):
        weights[place] ^= 0x55
    exported.write_bytes(weights)
    assert run.end() == 2, run.lines
    assert run.lines[-1].startswith(f"martlet: {exported} is damaged"), run.lines
    assert not any("Traceback" in line for line in run.lines), run.lines
    run = start(recipe)
    assert run.end() == 0, run.lines
    assert any(f"warning: export_gguf: {exported} is damaged" in line for line in run.lines), run.lines
    assert what_it_is(tmp_path / "release") == what_it_is(tmp_path / "other-release")
