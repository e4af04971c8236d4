"""What a store holds: listed, explained, pruned."""

import contextlib
import fcntl
import json
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.artifacts import (
    IN_USE,
    MANIFEST,
    QUARANTINE,
    RELEASE_KEYS,
    RELEASES,
    damage,
    is_as_written,
    read_manifest,
)
from pipeline.errors import UserError

KEY_LENGTH = 64
UNFINISHED = (".work", ".partial")
"""What follows a key in the names of folders of a stage that is not finished."""

SHOWN = 12
"""Digits of a key that are shown; as many or more name an artifact."""

State = Literal["finished", "unfinished", "damaged"]


@dataclass(frozen=True)
class Entry:
    """A finished artifact, or what is left of one.

    Attributes:
        path: its folder.
        state: "finished"; "unfinished", what an interrupted stage goes on from; "damaged", put aside.
        manifest: what its ``artifact.json`` says; empty where that cannot be read, or it is not finished.
        bytes: size of all its files.
        made: when it was made, seconds since the epoch.
        used: when a run last took it, likewise.
        needed_by: the releases that were laid out from it.
    """

    path: Path
    state: State
    manifest: Mapping[str, Any]
    bytes: int
    made: float
    used: float
    needed_by: tuple[str, ...]

    @property
    def stage(self) -> str:
        return self.path.parent.name

    @property
    def key(self) -> str:
        return self.path.name

    @property
    def shown(self) -> str:
        """The key as lists show it, short; of what was put aside after its stage."""
        stage, _, key = self.key.rpartition("-")[0].rpartition("-")
        return f"{stage}-{key[:SHOWN]}" if stage else self.key[:SHOWN]


def entries(store: Path) -> list[Entry]:
    """All finished artifacts of a store, by stage and then the oldest first.

    Raises:
        UserError: there is no store.
    """
    _require(store)
    manifests = {
        path: read_manifest(path) or {} for path in store.glob("*/*") if len(path.name) == KEY_LENGTH
    }
    needed = _needed(store, manifests)
    found = []
    for path, manifest in manifests.items():
        mark = path / MANIFEST if (path / MANIFEST).exists() else path
        found.append(
            Entry(
                path,
                "finished",
                manifest,
                _size(_statuses(path)),
                mark.stat().st_mtime,
                max(mark.stat().st_mtime, path.stat().st_mtime),
                tuple(sorted(needed.get(path, ()))),
            )
        )
    return sorted(found, key=lambda entry: (entry.stage, entry.made, entry.key))


def leftovers(store: Path) -> list[Entry]:
    """What a store holds beside finished artifacts, the oldest first: work of stages that were interrupted or
    failed, and folders that were put aside because they were damaged."""
    folders: list[tuple[Path, State]] = [
        *((path, "unfinished") for ending in UNFINISHED for path in store.glob(f"*/*{ending}")),
        *((path, "damaged") for path in store.glob(f"{QUARANTINE}/*")),
    ]
    found = []
    for path, state in folders:
        statuses = _statuses(path)
        times = [status.st_mtime for status in statuses]
        if times:  # a run that goes on may have taken it away meanwhile
            found.append(Entry(path, state, {}, _size(statuses), min(times), max(times), ()))
    return sorted(found, key=lambda entry: (entry.used, entry.key))


def find(store: Path, name: str) -> Entry:
    """The artifact that ``STAGE``, ``KEY`` or ``STAGE/KEY`` names; of a stage the newest. The beginning of a
    key will do.

    Raises:
        UserError: none or several are named so.
    """
    stage, _, key = name.rpartition("/")
    found = [
        entry
        for entry in entries(store)
        if (entry.stage == stage or not stage) and entry.key.startswith(key) and len(key) >= 4
    ]
    if not found:
        found = [entry for entry in entries(store) if entry.stage == name][-1:]
    if not found:
        raise UserError(f"{store}: holds no artifact {name!r}; martlet store list shows what it holds.")
    if len(found) > 1:
        shown = ", ".join(f"{entry.stage}/{entry.key[:SHOWN]}" for entry in found)
        raise UserError(f"{store}: {name!r} could be {shown}; give more of the key.")
    return found[0]


def explain(store: Path, entry: Entry) -> list[str]:
    """Why an artifact was made though the store held others of its stage: what differs from the one made
    before it, followed through its inputs to what changed first.

    Returns:
        One line a difference.
    """
    everything = entries(store)
    lines = []
    damaged = sorted((store / QUARANTINE).glob(f"{entry.stage}-{entry.key}-*"))
    if damaged:
        lines.append(f"{_name(entry)} had been damaged; what was found is in {damaged[-1]}")
    lines += list(_differences(entry, everything, set()))
    return lines or [f"{_name(entry)} is the first of its stage in this store"]


def prunable(
    store: Path, older_than: float | None = None, keep_bytes: int | None = None, now: float | None = None
) -> list[Entry]:
    """What may go, artifacts and leftovers: unused for longer than an age, and of the rest the longest unused
    until the store is small enough. What a release was laid out from, directly or through inputs, never goes.

    Args:
        store: the store.
        older_than: seconds since the last use.
        keep_bytes: size that all of it together should not exceed.
        now: seconds since the epoch; the present by default.

    Raises:
        UserError: there is no store, or what one of its releases needs is not known.
    """
    now = time.time() if now is None else now
    for path, record in _records(store):
        if not record:
            raise UserError(
                f"{path}: is damaged, so what that release needs is not known; ship the release again, which "
                "writes the file anew, or remove the file."
            )
    everything = entries(store)
    for entry in everything:
        if entry.needed_by and not entry.manifest:
            raise UserError(
                f"{entry.path / MANIFEST}: is missing or damaged, so what {entry.needed_by[0]} needs is not "
                "known; ship that release again, which makes it anew, or give --forget."
            )
    everything += leftovers(store)
    free = sorted((e for e in everything if not e.needed_by), key=lambda entry: entry.used)
    chosen = [e for e in free if older_than is not None and now - e.used > older_than]
    if keep_bytes is not None:
        total = sum(e.bytes for e in everything) - sum(e.bytes for e in chosen)
        for entry in free:
            if total <= keep_bytes:
                break
            if entry not in chosen:
                chosen.append(entry)
                total -= entry.bytes
    return chosen


@contextlib.contextmanager
def unused(store: Path) -> Iterator[None]:
    """Keeps runs from a store while it lasts, so that what was found to be free stays so until it is removed.

    Raises:
        UserError: there is no store, or a run uses it.
    """
    _require(store)
    with (store / IN_USE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{store}: a run is using this store; prune when it has ended, or end it."
            ) from None
        yield


def prune(store: Path, chosen: Iterable[Entry]) -> int:
    """Removes what was chosen, except artifacts that are being made this moment. Call it within ``unused``.

    Returns:
        Bytes that were freed.
    """
    freed = 0
    for entry in chosen:
        if entry.state == "damaged":  # nothing is ever made under its name
            shutil.rmtree(entry.path)
            freed += entry.bytes
            continue
        key = entry.key[:KEY_LENGTH]
        with entry.path.with_name(f"{key}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if not entry.path.exists():  # it went with the artifact of its key
                continue
            doomed = entry.path
            if entry.state == "finished":
                # Under its final name an artifact is whole or absent, so it loses the name first.
                doomed = entry.path.with_name(f"{key}.partial")
                shutil.rmtree(doomed, ignore_errors=True)
                entry.path.rename(doomed)
            shutil.rmtree(doomed)
            freed += entry.bytes
    return freed


def forget_release(store: Path, release: Path) -> None:
    """Lets go of what a release was laid out from; the release itself is left alone.

    Raises:
        UserError: the store knows no such release.
    """
    records = [path for path, record in _records(store) if record.get("release") == str(release.resolve())]
    if not records:
        known = ", ".join(sorted({record["release"] for _, record in _records(store) if record})) or "none"
        raise UserError(f"{store}: knows no release {release.resolve()}; it knows {known}.")
    for path in records:
        path.unlink()


def problems(store: Path) -> list[str]:
    """A sentence for each artifact that is damaged, which the next run that needs it makes anew, and for each
    damaged record of a release.

    Raises:
        UserError: there is no store.
    """
    found = [problem for entry in entries(store) if (problem := damage(entry.path)) is not None]
    return found + [f"{path} is damaged" for path, record in _records(store) if not record]


def _statuses(folder: Path) -> list[os.stat_result]:
    """Of a folder and all in it; what goes away meanwhile is left out, as a run's checkpoints do."""
    found = []
    for parent, _, names in os.walk(folder):
        for path in (Path(parent), *(Path(parent) / name for name in names)):
            with contextlib.suppress(FileNotFoundError):
                found.append(path.lstat())
    return found


def _size(statuses: Iterable[os.stat_result]) -> int:
    return sum(status.st_size for status in statuses if stat.S_ISREG(status.st_mode))


def _require(store: Path) -> None:
    """Says so where there is no store."""
    if not store.is_dir():
        raise UserError(f"{store}: no such store; give the folder that `martlet ship --store` wrote.")


def _records(store: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """What each release was laid out from, by file; nothing where the file is damaged."""
    for path in sorted((store / RELEASES).glob("*.json")):
        record = _read(path)
        kinds = isinstance(record.get("release"), str) and isinstance(record.get("artifacts"), list)
        yield path, record if kinds and is_as_written(record, RELEASE_KEYS) else {}


def _needed(store: Path, manifests: Mapping[Path, Mapping[str, Any]]) -> dict[Path, set[str]]:
    """Which releases each artifact is needed by, through inputs of inputs."""
    needed: dict[Path, set[str]] = {}
    for _, record in _records(store):
        waiting = [store / str(name) for name in record.get("artifacts", [])]
        while waiting:
            path = waiting.pop()
            if record["release"] in needed.get(path, ()):
                continue
            needed.setdefault(path, set()).add(record["release"])
            inputs = manifests.get(path, {}).get("input_artifacts", {})
            waiting += [store / value["stage"] / value["key"] for value in inputs.values()]
    return needed


def _differences(entry: Entry, everything: list[Entry], seen: set[Path]) -> Iterator[str]:
    if entry.path in seen:
        return
    seen.add(entry.path)
    earlier = [e for e in everything if e.stage == entry.stage and e.made < entry.made and e.manifest]
    if not earlier or not entry.manifest:
        return
    # Of those made before it the one that differs least: a store may serve several recipes in turn.
    closest = min(reversed(earlier), key=lambda other: len(_changed(other.manifest, entry.manifest)))
    for key, before, after in _changed(closest.manifest, entry.manifest):
        if not key.startswith("inputs."):
            yield f"{_name(entry)}: {key} is {_short(after)}, was {_short(before)} in {closest.key[:SHOWN]}"
            continue
        role = key.removeprefix("inputs.")
        yield f"{_name(entry)}: its input {role} is another one than that of {closest.key[:SHOWN]}"
        made_from = entry.manifest.get("input_artifacts", {}).get(role)
        for other in everything:
            if made_from == {"stage": other.stage, "key": other.key}:
                yield from _differences(other, everything, seen)


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, earlier value, later value) of everything that makes the key of an artifact."""
    flat = [
        dict(_flat({key: manifest.get(key) for key in ("version", "seed", "parameters", "inputs")}))
        for manifest in (before, after)
    ]
    keys = sorted(set(flat[0]) | set(flat[1]))
    return [(key, flat[0].get(key), flat[1].get(key)) for key in keys if flat[0].get(key) != flat[1].get(key)]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _name(entry: Entry) -> str:
    return f"{entry.stage} {entry.key[:SHOWN]}"


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    return {}
