"""Runs of a Prefect worker that are killed, or cancelled through the server: their child processes end, and
the next run goes on."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_prefect_deployment import ROOT, client_environment, free_port, running, wait_for

PREFECT = [sys.executable, "-m", "prefect"]
DEPLOYMENT = "distill-and-ship/local"


def wait_until(what: Callable[[], Any], seconds: float, log: Path) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.2)
    pytest.fail(f"not within {seconds} s: {log.read_text(encoding='utf-8', errors='replace')[-3000:]}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killing_and_cancelling_end_child_processes_and_lose_nothing(
    tiny_recipe: dict[str, Any], write_recipe: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    port = free_port()
    environment = client_environment(tmp_path / "prefect", port) | {"PYTHONPATH": str(ROOT)}

    def prefect(*arguments: str) -> str:
        command = [*PREFECT, *arguments]
        ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    tiny_recipe["bench"]["repetitions"] = 100_000  # long enough to be cancelled
    path = write_recipe(tiny_recipe)
    store, server_log, worker_log = tmp_path / "store", tmp_path / "server.log", tmp_path / "worker.log"
    server_command = [*PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    worker_command = [*PREFECT, "worker", "start", "--pool", "martlet"]
    with running(server_command, environment, server_log) as server:
        wait_for(f"http://127.0.0.1:{port}/api/health", server, server_log)
        prefect("work-pool", "create", "martlet", "--type", "process")
        prefect("--no-prompt", "deploy", "--all")
        with running(worker_command, environment, worker_log) as worker:

            def measuring() -> list[psutil.Process]:
                found = psutil.Process(worker.pid).children(recursive=True)
                return [each for each in found if "pipeline.bench_worker" in command_of(each)]

            def start() -> psutil.Process:
                prefect(
                    *("deployment", "run", DEPLOYMENT, "--param", f"recipe={path}"),
                    *("--param", f"store={store}", "--param", f"release={tmp_path / 'release'}"),
                )
                (process,) = wait_until(measuring, 900, worker_log)
                return process

            process = start()
            flow = process.parent()
            assert flow is not None
            flow.kill()
            wait_until(lambda: not lives(process), 15, worker_log)
            process = start()
            (run,) = json.loads(prefect("flow-run", "ls", "--state", "Running", "--output", "json"))
            prefect("flow-run", "cancel", run["id"])
            wait_until(lambda: not lives(process), 30, worker_log)
            state = wait_until(
                lambda: "CANCELLED" in prefect("flow-run", "inspect", run["id"], "--output", "json"),
                90,
                worker_log,
            )
            assert state
    kept = {folder.parent.name for folder in store.glob("*/*") if len(folder.name) == 64}
    assert {"teacher", "distill", "instruct", "export_gguf", "fidelity_gguf"} <= kept
    assert "device_gguf" not in kept
    assert not (tmp_path / "release").exists()


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
