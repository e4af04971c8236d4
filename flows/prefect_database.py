"""The database of the server that ``martlet ship`` starts: it tells of runs, and no result needs it."""

import contextlib
import logging
import sqlite3
import time
from pathlib import Path

from pipeline.artifacts import QUARANTINE

logger = logging.getLogger("martlet")


def put_damaged_aside(store: Path) -> None:
    """Puts a database that SQLite cannot read into the store's quarantine; the server makes another.

    Args:
        store: the store, whose ``prefect/prefect.db`` it is.
    """
    file = store.resolve() / "prefect" / "prefect.db"
    problem = _damage(file) if file.is_file() else None
    if problem is None:
        return
    aside = store.resolve() / QUARANTINE / f"prefect-{time.time_ns()}"
    aside.mkdir(parents=True)
    for path in file.parent.glob("prefect.db*"):
        path.rename(aside / path.name)
    logger.warning(
        f"warning: {file} is damaged ({problem}); put aside in {aside}, and another is begun",
        extra={"stage": "", "state": None},
    )


def _damage(file: Path) -> str | None:
    """What SQLite says of a database that is damaged."""
    try:
        with contextlib.closing(sqlite3.connect(file)) as database:
            (said,) = database.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError:
        # In use, or not to be opened: the server will say so.
        return None
    except sqlite3.DatabaseError as error:
        return str(error)
    return None if said == "ok" else " ".join(str(said).split())
