"""Any file of a release or of a store with a bit flipped, cut short or removed: it is named, the next run
makes it anew, and no release holds it.

The quick tests harm every file of small example artifacts in every way; the slow one harms a real run's.
MARTLET_DAMAGE_SEED draws other places.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from release_artifacts import example_artifacts, example_recipe, example_stage_times
from shipping import Run, assert_store_is_whole, finished_artifacts, what_it_is

from pipeline import release as release_stage
from pipeline import web
from pipeline.artifacts import Artifact, Store, damage, is_as_written, read_manifest
from pipeline.errors import UserError
from pipeline.inventory import prunable

Call = Callable[..., tuple[int, str, str]]
Write = Callable[[dict[str, Any]], Path]
SEED = int(os.environ.get("MARTLET_DAMAGE_SEED", "0"))
BITS = 31
"""Of how many bits of a release's manifest one is flipped: all would take minutes."""


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


@pytest.mark.parametrize("harm", HARMS)
def test_every_file_of_a_release(example: Example, martlet: Call, harm: Any) -> None:
    """Each is named by ``validate`` and ``verify``, nothing else is, and the next run lays the release out as
    it was."""
    example.ship()
    good, chance = contents(example.root), random.Random(SEED)
    assert martlet("verify", example.root)[0] == 0
    for path in files_of(example.root):
        sound = path.read_bytes()
        harm(path, chance)
        for command in ("validate", "verify"):
            code, out, err = martlet(command, example.root)
            # Without its manifest a folder is no release.
            assert code in ((1, 2) if path.name == "manifest.json" else (1,)), (command, path, err)
            assert out == ""
            assert len(err.splitlines()) == 1, (command, path, err)
            assert err.startswith(f"martlet: {path}: "), (command, path, err)
        if release_stage.read_manifest(example.root) is not None:
            # Of a manifest's lines, one may say something wrong of another file.
            assert path.name == "manifest.json" or len(release_stage.verify(example.root)) == 1, path
            example.ship()
        else:
            assert path.name == "manifest.json"
            with pytest.raises(UserError, match=r"is no release of martlet \(manifest\.json is missing, dam"):
                example.ship()
            path.write_bytes(sound)
        assert contents(example.root) == good, path
    kept = [path for path in example.root.parent.iterdir() if path != example.root]
    # What was changed may be somebody's work and is kept under another name; what is missing is not.
    assert (kept == []) == (harm is remove)
    assert all(path.name.startswith("release.previous-") for path in kept)


@pytest.mark.parametrize("harm", HARMS)
def test_every_file_of_a_store(example: Example, harm: Any) -> None:
    """Each is named, put aside and made anew, what needs it is not, and the release stays what it is."""
    example.ship()
    good, chance = contents(example.root), random.Random(SEED)
    every = finished_artifacts(example.store.root)
    held = [path for name in every for path in files_of(example.store.root / name)]
    digests = {name: artifact.digest for name, artifact in example.make().items()}
    for path in held:
        folder = example.store.root / Path(*path.relative_to(example.store.root).parts[:2])
        before = finished_artifacts(example.store.root)
        harm(path, chance)
        problem = damage(folder)
        assert problem is not None, path
        assert problem.startswith(f"{path} is "), (path, problem)
        example.lines.clear()
        example.ship()
        warnings = [line for line in example.lines if line.startswith("warning")]
        assert len(warnings) == 1, warnings
        assert warnings[0].startswith(f"warning: {folder.parent.name}: {path} is ")
        after = finished_artifacts(example.store.root)
        changed = {name for name in after if after[name] != before.get(name)}
        assert changed == {folder.relative_to(example.store.root).as_posix()}
        assert {name: artifact.digest for name, artifact in example.make().items()} == digests
        assert contents(example.root) == good
    assert [path.name for path in example.root.parent.iterdir()] == ["release"]
    assert len(list((example.store.root / "quarantine").iterdir())) == len(held)


def test_every_bit_of_a_manifest(example: Example) -> None:
    """Every bit of an ``artifact.json`` and one in 31 of a ``manifest.json`` flipped, and both cut to every
    length: each is found, or the values are the same, as without the line's end."""
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
        (in_store, (smallest / "artifact.json").read_bytes(), 1),
        (in_release, sound, BITS),
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
    """Every bit, every length; the next run writes the record anew."""
    example.ship()
    (record,) = (example.store.root / "releases").iterdir()
    sound = record.read_bytes()
    # The line's end alone may be missing.
    lengths = [sound[:length] for length in range(len(sound) - 1)]
    flips = [bytearray(sound) for _ in range(0, 8 * len(sound), 7)]
    for number, data in enumerate(flips):
        data[7 * number // 8] ^= 1 << 7 * number % 8
    for harmed in (*lengths[::7], *flips):
        record.write_bytes(harmed)
        with pytest.raises(UserError) as refusal:
            prunable(example.store.root, keep_bytes=0)
        assert str(refusal.value).startswith(f"{record}: is damaged"), harmed
    example.ship()
    assert record.read_bytes() == sound
    assert prunable(example.store.root, keep_bytes=0) == []


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
