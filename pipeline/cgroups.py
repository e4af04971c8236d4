"""Memory and processor limits for a process, by Linux control groups of version 1 or 2."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

PERIOD_US = 100_000
MOUNTS = Path("/proc/self/mounts")
MEMBERSHIP = Path("/proc/self/cgroup")


class Unavailable(RuntimeError):
    """This machine lets no control group be made; the message says why."""


@contextlib.contextmanager
def limited(memory_bytes: int, processors: float) -> Iterator[list[Path]]:
    """Makes a group below this process's own; it is removed at the end.

    Args:
        memory_bytes: what its processes may hold, page cache that they read included; beyond it the kernel
            takes pages back and, where none can be, kills.
        processors: processor seconds that they may use a second.

    Yields:
        Files: a process that writes its id into each of them is in the group.

    Raises:
        Unavailable: no groups, no permission, or no such controllers.
    """
    made: list[Path] = []
    try:
        try:
            for parent, settings in _parents(memory_bytes, processors):
                group = parent / f"martlet-{os.getpid()}-{time.monotonic_ns()}"
                group.mkdir()
                made.append(group)
                for name, value in settings.items():
                    if not (group / name).exists():
                        raise Unavailable(f"{group} has no {name}")
                    (group / name).write_text(str(value), encoding="ascii")
        except OSError as error:
            raise Unavailable(f"{error.filename}: {error.strerror}") from None
        yield [group / "cgroup.procs" for group in made]
    finally:
        for group in made:
            _remove(group)


def _parents(memory_bytes: int, processors: float) -> list[tuple[Path, dict[str, int | str]]]:
    """Where groups go and what is written into them: one place in version 2, two in version 1."""
    quota = max(1000, round(processors * PERIOD_US))
    memberships = {}
    for line in MEMBERSHIP.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            memberships[controller] = path
    mounts: dict[str, Path] = {}
    for line in MOUNTS.read_text(encoding="utf-8").splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup2":
            mounts.setdefault("", Path(place))
        elif kind == "cgroup":
            for option in options.split(","):
                mounts.setdefault(option, Path(place))
    version_1: dict[str, dict[str, int | str]] = {
        "memory": {"memory.limit_in_bytes": memory_bytes},
        "cpu": {"cpu.cfs_period_us": PERIOD_US, "cpu.cfs_quota_us": quota},
    }
    if all(controller in mounts and controller in memberships for controller in version_1):
        return [
            (_below(mounts[controller], memberships[controller]), settings)
            for controller, settings in version_1.items()
        ]
    if "" in mounts and "" in memberships:
        both: dict[str, int | str] = {
            "memory.max": memory_bytes,
            "memory.swap.max": 0,
            "cpu.max": f"{quota} {PERIOD_US}",
        }
        return [(_delegating(_below(mounts[""], memberships[""]), mounts[""]), both)]
    raise Unavailable("no memory and cpu controllers are mounted")


def _below(mount: Path, path: str) -> Path:
    """A membership's folder; in a container the path may begin above what is mounted."""
    folder = mount / path.lstrip("/")
    return folder if folder.is_dir() else mount


def _delegating(group: Path, mount: Path) -> Path:
    """The nearest group of version 2, this process's own or one above, whose children may have both
    controllers. The kernel gives a group with processes in it no controllers for children, so that it mostly
    is the one above.

    Raises:
        Unavailable: there is none, and none can be made so.
    """
    for candidate in [group, *group.parents]:
        control = candidate / "cgroup.subtree_control"
        try:
            if not {"memory", "cpu"} <= set(control.read_text(encoding="ascii").split()):
                control.write_text("+memory +cpu", encoding="ascii")
            return candidate
        except OSError:
            if candidate == mount:
                break
    raise Unavailable(
        f"no group from {group} upwards lets its children have the controllers memory and cpu; with systemd, "
        "start it by systemd-run --user --scope --property Delegate=yes"
    )


def _remove(group: Path) -> None:
    # A process that was killed leaves the group a moment later.
    for _ in range(50):
        try:
            group.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.1)
