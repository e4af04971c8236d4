"""A ``martlet ship`` in a process group of its own, what it says, and what its release is apart from time."""

import json
import re
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.artifacts import MANIFEST, OWN_DIGEST, damage, sha256_of_file

TIMED_FILES = ("manifest.json", "report.json", "report.html", "README.md")
"""Files of a release that tell how fast making or running it went. The manifest tells it by the SHA-256 and
the size of the other three and by the digests of the measurements, nowhere else."""
TIMED_STAGES = ("device_gguf", "device_mlc", "device_onnx")
TIMED_KEYS = frozenset({"stages", "device", "seconds", "tokens_per_second", "peak_memory_bytes"})
"""Keys of report.json that hold timings, wherever they stand."""


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


def descendants(run: Run) -> list[psutil.Process]:
    return psutil.Process(run.process.pid).children(recursive=True)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def assert_gone_within(processes: list[psutil.Process], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left := alive(processes):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def is_server(process: psutil.Process) -> bool:
    """Prefect's embedded server."""
    return "prefect.server.api.server" in command_of(process)


def is_worker(process: psutil.Process) -> bool:
    """An exporter or a measuring process, not Prefect's server and not the leash."""
    command = command_of(process)
    return bool(command) and not is_server(process) and "leash_process" not in command


def what_it_is(release: Path) -> dict[str, Any]:
    """A release without what time changes; two releases for which this is the same are the same.

    Returns:
        ``files``: the SHA-256 of every file on disk but ``TIMED_FILES``; ``manifest``: the whole manifest
        without the identity and its own digest (hashes over everything), the digests of ``TIMED_STAGES``, and
        SHA-256 and size of ``TIMED_FILES``; ``report``: the whole report without ``TIMED_KEYS`` and these
        digests.
    """
    files = {
        path.relative_to(release).as_posix(): sha256_of_file(path)
        for path in sorted(release.rglob("*"))
        if path.is_file() and path.name not in TIMED_FILES
    }
    manifest = json.loads((release / "manifest.json").read_text(encoding="utf-8"))
    report = json.loads((release / "report.json").read_text(encoding="utf-8"))
    del manifest["identity"], manifest[OWN_DIGEST]
    for name, entry in manifest["files"].items():
        if Path(name).name in TIMED_FILES:
            del entry["sha256"], entry["bytes"]
    for lineage in (manifest["lineage"], report["lineage"]):
        for role in set(lineage) & set(TIMED_STAGES):
            del lineage[role]["digest"]
    return {"files": files, "manifest": manifest, "report": without_timings(report)}


def without_timings(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_timings(item) for key, item in value.items() if key not in TIMED_KEYS}
    return [without_timings(item) for item in value] if isinstance(value, list) else value


def finished_artifacts(store: Path) -> dict[str, tuple[int, int]]:
    """Every finished artifact of a store by name, with what changes when it is made anew: the inode of its
    manifest and when that was written."""
    marks = {
        path.parent: path.stat() for path in store.glob(f"*/*/{MANIFEST}") if len(path.parent.name) == 64
    }
    return {
        path.relative_to(store).as_posix(): (mark.st_ino, mark.st_mtime_ns) for path, mark in marks.items()
    }


def assert_store_is_whole(store: Path) -> None:
    """Every finished artifact is undamaged, and nothing half-written has stayed."""
    finished = [path for path in store.glob("*/*") if len(path.name) == 64]
    assert finished
    assert [damage(path) for path in finished] == [None] * len(finished)
    assert not list(store.glob("*/*.partial"))
    assert not (store / "quarantine").exists()


def seconds_of_stages(lines: list[str]) -> dict[str, float]:
    """How long each stage took, from the lines that say when it starts and what it took."""
    found = (re.search(r"  (.+): done, ([\d.]+) s$", line) for line in lines)
    return {match[1]: float(match[2]) for match in found if match}
