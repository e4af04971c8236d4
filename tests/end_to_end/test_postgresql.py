"""Prefect's server on a real PostgreSQL, as docs/guides/machines.md says, and a run through it."""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_prefect_deployment import ROOT, client_environment, free_port, running, wait_for

PREFECT = [sys.executable, "-m", "prefect"]
PASSWORD = "only-for-this-test"


@pytest.fixture
def postgresql() -> Iterator[tuple[int, Callable[[str], str]]]:
    """A server of Debian's package on loopback, with a password: its port, and a function that asks it."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    bin_, port = programs[-1].parent, free_port()
    folder = Path(tempfile.mkdtemp(prefix="martlet-postgresql-"))
    # PostgreSQL refuses to run as root; Debian's package brings a user for it.
    as_user: list[str] = []
    if os.geteuid() == 0:
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        as_user = ["runuser", "-u", "postgres", "--"]
    (folder / "password").write_text(PASSWORD)
    for path in (folder, folder / "password"):
        if as_user:
            shutil.chown(path, "postgres", "postgres")

    def call(program: str, *arguments: str) -> str:
        command = [*as_user, str(bin_ / program), *arguments]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    data = str(folder / "data")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
    try:
        secret = ("--auth=scram-sha-256", "--pwfile", str(folder / "password"))
        call("initdb", "--pgdata", data, "--username=prefect", "--encoding=UTF8", *secret)
        call(
            "pg_ctl", "--pgdata", data, "--wait", "--log", str(folder / "log"), "--options", options, "start"
        )
        where = f"postgresql://prefect:{PASSWORD}@127.0.0.1:{port}"
        call("psql", f"{where}/postgres", "--command", "CREATE DATABASE prefect")
        yield port, lambda query: call("psql", f"{where}/prefect", "-At", "--command", query)
    finally:
        stop = [*as_user, str(bin_ / "pg_ctl"), "--pgdata", data, "--mode=immediate", "stop"]
        subprocess.run(stop, cwd=folder, capture_output=True)
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_through_a_server_on_postgresql(
    postgresql: tuple[int, Callable[[str], str]],
    tiny_recipe: dict[str, Any],
    write_recipe: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
) -> None:
    database, ask = postgresql
    port = free_port()
    url = f"postgresql+asyncpg://prefect:{PASSWORD}@127.0.0.1:{database}/prefect"
    environment = client_environment(tmp_path / "prefect", port) | {"PYTHONPATH": str(ROOT)}

    def prefect(*arguments: str) -> str:
        command = [*PREFECT, *arguments]
        ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1200)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    recipe = write_recipe(tiny_recipe)
    server_log, worker_log = tmp_path / "server.log", tmp_path / "worker.log"
    server_command = [*PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    server_environment = environment | {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url}
    with running(server_command, server_environment, server_log) as server:
        wait_for(f"http://127.0.0.1:{port}/api/health", server, server_log)
        prefect("work-pool", "create", "martlet", "--type", "process")
        # Measurements alone, over all workers of this server.
        prefect("concurrency-limit", "create", "benchmark", "1")
        prefect("--no-prompt", "deploy", "--all")
        with running([*PREFECT, "worker", "start", "--pool", "martlet"], environment, worker_log):
            said = prefect(
                *("deployment", "run", "distill-and-ship/local", "--watch"),
                *("--param", f"recipe={recipe}", "--param", f"store={tmp_path / 'store'}"),
                *("--param", f"release={tmp_path / 'release'}"),
            )
            assert "Completed" in said, worker_log.read_text(encoding="utf-8", errors="replace")[-3000:]
        assert ask("SELECT name, state_type FROM flow_run").splitlines() == ["recipe: Tiny|COMPLETED"]
        states = ask("SELECT name, state_type FROM task_run WHERE name LIKE 'bench%'")
        assert "COMPLETED" in states
        assert ask("SELECT count(*) FROM artifact WHERE key = 'fidelity'").strip() == "1"
    assert not list((tmp_path / "prefect").glob("*.db")), "something went into SQLite"
    assert (tmp_path / "release" / "manifest.json").is_file()
