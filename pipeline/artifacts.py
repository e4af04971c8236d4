"""The stage contract: a content-addressed store whose finished artifacts are complete and true.

An artifact is a folder ``store/STAGE/KEY``. KEY is the SHA-256 of what its content depends on: the
stage's name and code version, its slice of the recipe, its inputs' digests and its seed. A stage writes
into a folder beside it and renames that only when everything is on disk, so what has its final name is
whole. ``artifact.json`` inside says what it was made from and the SHA-256 of each of its files.
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

MANIFEST = "artifact.json"
IDENTITY = ("stage", "version", "parameters", "inputs", "seed")
"""Keys of a manifest that make an artifact's key."""
KEYS = (*IDENTITY, "input_artifacts", "key", "digest", "files", "packages", "seconds")
OWN_DIGEST = "manifest_sha256"
"""Key of a manifest that holds the SHA-256 of the others."""
RELEASES = "releases"
"""Folder of a store that says which artifacts releases were laid out from."""
RELEASE_KEYS = ("release", "artifacts")
"""Keys of such a record."""
QUARANTINE = "quarantine"
"""Folder of a store for what was found damaged."""
IN_USE = "in-use.lock"
"""File of a store that runs hold locked together, and pruning alone."""
LONGEST_NAME, LONGEST_PATH = 255, 1024
"""Bytes of a file's name and characters of its path in an artifact or a release."""
RECORDED_PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "tokenizers",
    "safetensors",
    "llama-cpp-python",
    "gguf",
    "apache-tvm",
    "onnxruntime",
    "onnxruntime-genai",
)

FULL = 64 * 1024
"""A disk with fewer bytes left than this is full: what failed on it failed for that."""
NO_SPACE = ("no space left on device", "disk quota exceeded", "os error 28", "os error 122")
NO_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "bad_alloc",
    "memoryerror",
)
"""How libraries say it, in lower case, in exceptions of their own and from their processes."""

MEASURED_FILES = frozenset({"evaluation.json", "curve.json"})
MEASURED = frozenset({"seconds", "tokens_per_second", "peak_memory_bytes"})
"""Keys of these files that tell how making went, not what was made: they are no part of an artifact's digest,
so that a result which is made anew is the same result and nothing after it is made anew."""


@dataclass(frozen=True)
class Artifact:
    """A finished result of a stage.

    Attributes:
        stage: the stage that made it.
        key: what it depends on, as SHA-256 (its folder's name).
        digest: SHA-256 over the content of all its files, timings of training aside: what it is.
        path: its folder.
        seconds: how long it took to make.
        cached: it was there already.
    """

    stage: str
    key: str
    digest: str
    path: Path
    seconds: float
    cached: bool

    def manifest(self) -> dict[str, Any]:
        """What ``artifact.json`` says."""
        return json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """SHA-256 of a JSON value in its canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def with_own_digest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the SHA-256 of the rest of it, so that damage to it is found like damage to a file."""
    rest = {key: value for key, value in manifest.items() if key != OWN_DIGEST}
    return {**rest, OWN_DIGEST: sha256_of_json(rest)}


def is_as_written(manifest: Mapping[str, Any], keys: Iterable[str]) -> bool:
    """Whether a manifest has these keys alone and the SHA-256 that it says. One that says nothing of itself
    comes from an earlier version."""
    known = set(manifest) <= {*keys, OWN_DIGEST}
    return known and (OWN_DIGEST not in manifest or manifest == with_own_digest(manifest))


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file appears only when it is complete."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text so that the file appears only when it is complete."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def file_digests(folder: Path) -> dict[str, dict[str, Any]]:
    """SHA-256 and size of every file below a folder, by relative path; ``artifact.json`` is left out."""
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256_of_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() != MANIFEST
    }


@contextlib.contextmanager
def locked(path: Path, waiting: str, report: Callable[[str], None]) -> Iterator[None]:
    """Holds a lock file, and says ``waiting`` where another process holds it until now.

    The file stays: removing it would let two later runs lock two different files of that name.
    """
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(waiting)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def in_use(store: Path) -> Iterator[None]:
    """While it lasts, a run uses a store: nothing is pruned from it. Several runs may use one.

    Raises:
        UserError: the store cannot be written.
    """
    try:
        store.mkdir(parents=True, exist_ok=True)
        lock = (store / IN_USE).open("w")
    except OSError as error:
        raise UserError(f"{store.resolve()}: the store cannot be written ({error.strerror}).") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


class Store:
    """Where artifacts live. Several processes may use one store; a key is computed by one at a time."""

    def __init__(self, root: Path, report: Callable[[str], None] = lambda line: print(line, file=sys.stderr)):
        """
        Args:
            root: the folder, made when missing.
            report: receives one line for each thing worth telling (a damaged artifact, a stage's start).
        """
        self.root = Path(root).resolve()
        self.report = report
        self._sound: dict[Path, dict[str, tuple[int, ...]]] = {}

    def log_file(self, name: str) -> Path:
        """Where the output of a child process is kept: ``logs/NAME.log`` in the store."""
        return self.root / "logs" / f"{name.replace(' ', '-')}.log"

    def get_or_make(
        self,
        stage: str,
        version: int,
        parameters: Mapping[str, Any],
        inputs: Mapping[str, "Artifact | str"],
        make: Callable[[Path, Path], None],
        seed: int = 0,
    ) -> Artifact:
        """The artifact of these inputs: the stored one when it is undamaged, else made now.

        Args:
            stage: name of the stage, a folder name.
            version: the stage's code version, raised when the same inputs would give another result.
            parameters: the slice of the recipe that the result depends on, plain JSON values.
            inputs: artifacts, or digests of things outside the store, by role.
            make: called with (output, work). It fills ``output``, which is empty. ``work`` survives a kill
                and is handed to the next attempt at the same key: checkpoints belong there.
            seed: seed of every random choice of the stage.

        Raises:
            UserError: no space is left, or the store cannot be written.
        """
        input_digests = {
            role: value.digest if isinstance(value, Artifact) else value for role, value in inputs.items()
        }
        identity = {
            "stage": stage,
            "version": version,
            "parameters": dict(parameters),
            "inputs": input_digests,
            "seed": seed,
        }
        key = sha256_of_json(identity)
        final = self.root / stage / key
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with self._only_one(final):
                stored = self._verified(final, stage)
                if stored is not None:
                    return stored
                return self._make(final, identity, inputs, make)
        except OSError as error:
            if space_ran_out(self.root, error):
                raise self._no_space(stage) from error
            if error.errno in (errno.EACCES, errno.EROFS):
                raise UserError(f"{self.root}: the store cannot be written ({error.strerror}).") from error
            raise

    def _make(
        self,
        final: Path,
        identity: dict[str, Any],
        inputs: Mapping[str, Artifact | str],
        make: Callable[[Path, Path], None],
    ) -> Artifact:
        stage = identity["stage"]
        output = final.with_name(final.name + ".partial")
        work = final.with_name(final.name + ".work")
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        work.mkdir(exist_ok=True)
        started = time.monotonic()
        earlier_seconds = _seconds_so_far(work)
        used = [value for value in inputs.values() if isinstance(value, Artifact)]
        try:
            make(output, work)
            self.require_undamaged(used)
        except BaseException as error:
            # Looked at before removing what was written makes room again.
            full = isinstance(error, Exception) and space_ran_out(self.root, error)
            shutil.rmtree(output, ignore_errors=True)
            with contextlib.suppress(OSError):
                write_json(work / "seconds.json", earlier_seconds + time.monotonic() - started)
            if full:
                raise self._no_space(stage) from error
            if isinstance(error, Exception):
                try:
                    self.require_undamaged(used)
                except UserError:
                    # Its checkpoints were made from what was damaged.
                    shutil.rmtree(work, ignore_errors=True)
                    raise
            if memory_ran_out(error):
                raise UserError(
                    f"{stage}: there is not enough memory; free some, or lower batch_size or "
                    "sequence_length, and start the same command again."
                ) from error
            raise
        seconds = earlier_seconds + time.monotonic() - started
        marks = _marks(output)
        files = file_digests(output)
        if not files:
            raise RuntimeError(f"stage {stage} wrote nothing")
        digest = _digest_of(output, files)
        for path in output.rglob("*"):
            _fsync(path)
        manifest = {
            **identity,
            "input_artifacts": {
                role: {"stage": value.stage, "key": value.key}
                for role, value in inputs.items()
                if isinstance(value, Artifact)
            },
            "key": final.name,
            "digest": digest,
            "files": files,
            "packages": _package_versions(),
            "seconds": round(seconds, 3),
        }
        write_json(output / MANIFEST, with_own_digest(manifest))
        _fsync(output)
        output.rename(final)
        self._sound[final] = marks
        _fsync(final.parent)
        shutil.rmtree(work, ignore_errors=True)
        return Artifact(stage, final.name, digest, final, seconds, cached=False)

    def _no_space(self, stage: str) -> UserError:
        return UserError(
            f"{self.root}: no space is left on the disk while {stage} wrote its result; "
            "free space and start the same command again."
        )

    def _verified(self, final: Path, stage: str) -> Artifact | None:
        """The stored artifact if every file has its recorded SHA-256; a damaged one is put aside."""
        if not final.exists():
            return None
        marks = _marks(final)
        problem = damage(final)
        if problem is None:
            self._sound[final] = marks
            manifest = read_manifest(final)
            assert manifest is not None, "damage() has just read it"
            with contextlib.suppress(OSError):
                os.utime(final)  # the folder's time says when it was last used
            return Artifact(stage, final.name, manifest["digest"], final, manifest["seconds"], cached=True)
        quarantine = self.root / QUARANTINE / f"{stage}-{final.name}-{time.time_ns()}"
        quarantine.parent.mkdir(parents=True, exist_ok=True)
        final.rename(quarantine)
        self.report(f"warning: {stage}: {problem}; put aside in {quarantine} and made anew")
        return None

    def require_undamaged(self, artifacts: Iterable[Artifact]) -> None:
        """Says so when an artifact is no longer what it was when this store verified or made it: what is made
        from it now is not what its key says. Files that nobody wrote to since are not read again.

        Raises:
            UserError: one is damaged.
        """
        for artifact in artifacts:
            if _marks(artifact.path) == self._sound.get(artifact.path):
                continue
            if (problem := damage(artifact.path)) is not None:
                raise UserError(
                    f"{problem}; that happened while it was in use. Start the same command again, the store "
                    "makes it anew."
                )

    def keep_for(self, release: Path, artifacts: Iterable["Artifact"]) -> None:
        """Notes what a release was laid out from, so that pruning leaves it alone."""
        folder = self.root / RELEASES
        folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(str(release).encode()).hexdigest()[:16]
        needed = sorted({f"{artifact.stage}/{artifact.key}" for artifact in artifacts})
        record = {"release": str(release), "artifacts": needed}
        write_json(folder / f"{name}.json", with_own_digest(record))

    @contextlib.contextmanager
    def _only_one(self, final: Path) -> Iterator[None]:
        waiting = f"waiting: {final.parent.name} {final.name[:12]} is being made by another stage or run"
        with locked(final.with_name(final.name + ".lock"), waiting, self.report):
            yield


def space_ran_out(place: Path, failure: BaseException | str) -> bool:
    """Whether something failed because the disk is full. Libraries wrap the system's error in their own, some
    without a word of it, and what a process wanted to say may not have fitted on the disk either.

    Args:
        place: where it wrote.
        failure: the exception, or what a process said.
    """
    if _says(failure, NO_SPACE, (errno.ENOSPC, errno.EDQUOT)):
        return True
    with contextlib.suppress(OSError):
        return shutil.disk_usage(place).free < FULL
    return False


def memory_ran_out(failure: BaseException | str) -> bool:
    """Whether something failed for lack of memory."""
    return _says(failure, NO_MEMORY, (errno.ENOMEM,)) or isinstance(failure, MemoryError)


def _says(failure: BaseException | str | None, phrases: Iterable[str], numbers: Iterable[int]) -> bool:
    if isinstance(failure, str):
        return any(phrase in failure.lower() for phrase in phrases)
    while failure is not None:
        said = "\n".join([str(failure), *getattr(failure, "__notes__", [])])
        number = failure.errno if isinstance(failure, OSError) else None
        if (number is not None and number in numbers) or _says(said, phrases, ()):
            return True
        failure = failure.__cause__ or failure.__context__
    return False


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What an artifact's ``artifact.json`` says; None where it is missing, damaged or of another artifact."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        identity = {key: manifest[key] for key in IDENTITY}
        content = {name: (entry["sha256"], entry["bytes"]) for name, entry in manifest["files"].items()}
        sound = (
            is_as_written(manifest, KEYS)
            and manifest["key"] == sha256_of_json(identity)
            and isinstance(manifest["digest"], str)
            and isinstance(manifest["seconds"], (int, float))
            and isinstance(manifest["packages"], dict)
            and all(isinstance(size, int) and isinstance(digest, str) for digest, size in content.values())
            and all(is_file_name(name) and not {"", ".."} & set(name.split("/")) for name in content)
            and all(
                isinstance(made["stage"], str) and isinstance(made["key"], str)
                for made in manifest["input_artifacts"].values()
            )
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return manifest if sound else None


def is_file_name(name: str) -> bool:
    """Whether a manifest may list a file by this name: one that a system takes and a terminal shows."""
    return (
        name.isprintable()
        and all(len(part.encode()) <= LONGEST_NAME for part in name.split("/"))
        and len(name) <= LONGEST_PATH
    )


def damage(folder: Path) -> str | None:
    """What is wrong with a stored artifact, in words; None when every file is as it was recorded."""
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{folder / MANIFEST} is missing or damaged"
    recorded = {name: (entry["sha256"], entry["bytes"]) for name, entry in manifest["files"].items()}
    for name, (sha256, size) in recorded.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size or sha256_of_file(path) != sha256:
            return f"{path} is damaged (its SHA-256 is not the recorded one)"
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    for name in sorted(present - set(recorded)):
        return f"{folder / name} was added later"
    if manifest["digest"] != _digest_of(folder, manifest["files"]):
        return f"{folder / MANIFEST} is damaged (its digest is not that of the files)"
    return None


def _digest_of(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> str:
    """SHA-256 of an artifact: over its files' names and contents, measurements aside."""
    return sha256_of_json({name: _content(folder / name, entry) for name, entry in files.items()})


def _content(path: Path, entry: Mapping[str, Any]) -> str:
    """SHA-256 of a file, of one that holds measurements without these."""
    if path.name not in MEASURED_FILES:
        return str(entry["sha256"])
    return sha256_of_json(_without_measured(json.loads(path.read_text(encoding="utf-8"))))


def _without_measured(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_measured(item) for key, item in value.items() if key not in MEASURED}
    return [_without_measured(item) for item in value] if isinstance(value, list) else value


def _marks(folder: Path) -> dict[str, tuple[int, ...]]:
    """What changes of an artifact's files when somebody writes to them; of the manifest, which is written
    last, nothing."""
    marks: dict[str, tuple[int, ...]] = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            if path.is_file() and path != folder / MANIFEST:
                times = (status.st_mtime_ns, status.st_ctime_ns)
                marks[path.relative_to(folder).as_posix()] = (status.st_ino, status.st_size, *times)
    return marks


def _seconds_so_far(work: Path) -> float:
    try:
        return float(json.loads((work / "seconds.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return 0.0


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _package_versions() -> dict[str, str]:
    versions = {"python": ".".join(str(part) for part in sys.version_info[:3])}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
