"""A real server, a real worker, and the command of the README, typed exactly so."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PREFECT = Path(sys.executable).with_name("prefect")
LITERAL_COMMAND = ["deployment", "run", "distill-and-ship"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def client_environment(home: Path, port: int) -> dict[str, str]:
    """Of Prefect's commands against a server of the test's own on this machine."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "NO_COLOR": "1",
        "COLUMNS": "200",
    }


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in its own group, ended with everything that it started."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            for signal_number in (signal.SIGINT, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal_number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=20)


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text(encoding="utf-8", errors="replace")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"no answer from {url}: {log.read_text(encoding='utf-8', errors='replace')[-2000:]}")


@pytest.mark.end_to_end
@pytest.mark.timeout(1800)
def test_the_literal_command_ships_a_release(tmp_path: Path) -> None:
    port = free_port()
    environment = client_environment(tmp_path / "prefect", port)
    # The same environment with the interpreter's folder first, as an activated one has it.
    environment["PATH"] = f"{PREFECT.parent}{os.pathsep}{environment.get('PATH', '')}"

    def prefect(*arguments: str, timeout: float = 180) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(PREFECT), *arguments],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    server_log, worker_log = tmp_path / "server.log", tmp_path / "worker.log"
    server_command = [str(PREFECT), "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with running(server_command, environment, server_log) as server:
        wait_for(f"http://127.0.0.1:{port}/api/health", server, server_log)
        pool = prefect("work-pool", "create", "martlet", "--type", "process")
        assert pool.returncode == 0, pool.stdout + pool.stderr
        deployed = prefect("--no-prompt", "deploy", "--all")
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr
        with running([str(PREFECT), "worker", "start", "--pool", "martlet"], environment, worker_log):
            release = tmp_path / "release"
            ran = prefect(
                *LITERAL_COMMAND,
                "--param", "recipe=recipes/smoke.yaml",
                "--param", f"store={tmp_path / 'store'}",
                "--param", f"release={release}",
                "--watch",
                timeout=1500,
            )  # fmt: skip
            worker_said = worker_log.read_text(encoding="utf-8", errors="replace")[-4000:]
            assert ran.returncode == 0, ran.stdout + ran.stderr + worker_said
            assert "Completed" in ran.stdout
        query = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/artifacts/latest/filter",
            data=b"{}",
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(query, timeout=30) as answer:
            keys = {artifact["key"] for artifact in json.load(answer)}
    assert {"fidelity", "device", "release"} <= keys
    report = json.loads((release / "report.json").read_text(encoding="utf-8"))
    assert report["stages"]
    assert (release / "report.html").is_file()
