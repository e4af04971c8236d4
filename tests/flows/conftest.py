"""A Prefect server, and the command line called as a user calls it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from shipping import Run

from flows.command_line import main

ROOT = Path(__file__).parents[2]

# What the command line sets for its own process; here Prefect is imported before that.
os.environ.update(
    DO_NOT_TRACK="1",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    PREFECT_LOGGING_LEVEL="CRITICAL",
    PREFECT_LOGGING_TO_API_ENABLED="false",
)


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """Prefect's own test server, so that flows run in this process and leave the user's profile alone."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def clean_environment() -> Iterator[None]:
    """The command line sets environment variables for its process; here they are put back."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def martlet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, clean_environment: None
) -> Callable[..., tuple[int, str, str]]:
    """Calls ``martlet ARGUMENTS`` in this process: (exit code, standard output, standard error)."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["martlet", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts ``martlet ship RECIPE`` with store and release in the test's folder."""
    started: list[Run] = []

    def go(
        recipe: Path,
        store: Path = tmp_path / "store",
        release: Path = tmp_path / "release",
        **environment: str,
    ) -> Run:
        alone = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "flows.command_line", "ship", str(recipe)]
        process = subprocess.Popen(
            [*command, "--store", str(store), "--release", str(release), "--json"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **alone, **environment},
        )
        started.append(Run(process))
        return started[-1]

    yield go
    for run in started:
        run.process.kill()
        run.process.wait()
