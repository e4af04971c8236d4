"""Control groups against what a process under them can really do."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import cgroups

JOIN = "import os, sys\nfor path in sys.argv[1:]: open(path, 'w').write(str(os.getpid()))\n"


def run(limits: tuple[int, float], program: str) -> tuple[int, float]:
    """Runs a program inside a group; its exit status and its seconds."""
    try:
        with cgroups.limited(*limits) as joined:
            started = time.monotonic()
            status = subprocess.run([sys.executable, "-c", JOIN + program, *map(str, joined)]).returncode
            seconds = time.monotonic() - started
            groups = [path.parent for path in joined]
    except cgroups.Unavailable as problem:
        pytest.skip(f"no control groups here: {problem}")
    assert not any(group.exists() for group in groups)
    return status, seconds


def test_beyond_its_memory_a_process_is_killed_and_within_it_is_not() -> None:
    take = "b = bytearray({}); b[::4096] = b'x' * len(b[::4096])"
    assert run((256 << 20, 2.0), take.format(32 << 20))[0] == 0
    assert run((64 << 20, 2.0), take.format(256 << 20))[0] == -9


def test_a_process_gets_its_share_of_processor_time() -> None:
    spin = "import time\nwhile time.process_time() < 0.6: pass"
    status, seconds = run((256 << 20, 0.2), spin)
    assert status == 0
    assert seconds > 2.0  # 0.6 s of work at a fifth of a processor


def test_where_groups_cannot_be_made_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mounts").write_text("proc /proc proc rw 0 0\n")
    (tmp_path / "cgroup").write_text("0::/\n")
    monkeypatch.setattr(cgroups, "MOUNTS", tmp_path / "mounts")
    monkeypatch.setattr(cgroups, "MEMBERSHIP", tmp_path / "cgroup")
    with pytest.raises(cgroups.Unavailable, match="no memory and cpu controllers"), cgroups.limited(1, 1):
        pass


@pytest.fixture
def version_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the kernel's file system, and this process in the group app/run of it."""
    root = tmp_path / "groups"
    for group in (root, root / "app", root / "app" / "run"):
        group.mkdir()
        (group / "cgroup.subtree_control").write_text("")
    (tmp_path / "mounts").write_text(f"cgroup2 {root} cgroup2 rw 0 0\n")
    (tmp_path / "cgroup").write_text("0::/app/run\n")
    monkeypatch.setattr(cgroups, "MOUNTS", tmp_path / "mounts")
    monkeypatch.setattr(cgroups, "MEMBERSHIP", tmp_path / "cgroup")
    return root


def test_version_2_writes_its_own_files(version_2: Path) -> None:
    """Which files a group needs, and what is said without them."""
    with pytest.raises(cgroups.Unavailable, match=r"has no memory\.max"), cgroups.limited(1, 1):
        pass
    ((parent, settings),) = cgroups._parents(1 << 30, 1.5)
    assert parent == version_2 / "app" / "run"
    assert settings == {"memory.max": 1 << 30, "memory.swap.max": 0, "cpu.max": "150000 100000"}


def test_version_2_asks_for_its_controllers_where_the_kernel_gives_them(version_2: Path) -> None:
    """A folder in place of the file refuses to be written, as the kernel does for groups with processes."""
    own = version_2 / "app" / "run" / "cgroup.subtree_control"
    own.unlink()
    own.mkdir()
    ((parent, _),) = cgroups._parents(1 << 30, 1.0)
    assert parent == version_2 / "app"
    assert (parent / "cgroup.subtree_control").read_text() == "+memory +cpu"
    # Where they are given already, nothing is written.
    (parent / "cgroup.subtree_control").write_text("cpu io memory pids\n")
    ((parent, _),) = cgroups._parents(1 << 30, 1.0)
    assert (parent / "cgroup.subtree_control").read_text() == "cpu io memory pids\n"
    for group in (version_2, version_2 / "app"):
        (group / "cgroup.subtree_control").unlink()
    with pytest.raises(cgroups.Unavailable, match="lets its children have the controllers memory and cpu"):
        cgroups._parents(1 << 30, 1.0)
