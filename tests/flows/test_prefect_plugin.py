"""Bare deployment names: resolved where that is clear, left alone where it is not, and never in the way."""

import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest
from prefect.client.orchestration._deployments import client as deployments_client

from flows.prefect_plugin import CANONICAL_NAME, complete_name, install

ROOT = Path(__file__).parents[2]


@dataclass
class Named:
    """A flow or deployment as the client returns it."""

    id: int
    name: str
    flow_id: int = 0


class Known:
    """The two questions that ``complete_name`` asks a client, answered from a list of FLOW/DEPLOYMENT."""

    def __init__(self, *full_names: str):
        flows = sorted({name.partition("/")[0] for name in full_names})
        self.flows = [Named(number, name) for number, name in enumerate(flows)]
        self.deployments = [
            Named(number, name.partition("/")[2], flows.index(name.partition("/")[0]))
            for number, name in enumerate(full_names)
        ]

    async def read_flows(self) -> list[Named]:
        return self.flows

    async def read_deployments(self) -> list[Named]:
        return self.deployments


@pytest.mark.parametrize(
    ("known", "name", "completed"),
    [
        (["distill-and-ship/local", "distill-and-ship/smoke"], "distill-and-ship", "distill-and-ship/local"),
        (["distill-and-ship/gpu"], "distill-and-ship", "distill-and-ship/gpu"),
        (["distill-and-ship/local", "distill-and-ship/smoke"], "smoke", "distill-and-ship/smoke"),
        (["one/gpu", "two/gpu"], "gpu", "gpu"),
        (["distill-and-ship/a", "distill-and-ship/b"], "distill-and-ship", "distill-and-ship"),
        ([], "distill-and-ship", "distill-and-ship"),
    ],
)
def test_completion(known: list[str], name: str, completed: str) -> None:
    assert anyio.run(complete_name, Known(*known), name) == completed


def test_another_prefect_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(deployments_client.DeploymentAsyncClient, "read_deployment_by_name")
    assert install(logging.getLogger("martlet.plugin")) is False
    assert CANONICAL_NAME in caplog.text


@pytest.mark.parametrize("question", ["read_flows", "read_deployments"])
@pytest.mark.parametrize("absent", [True, False])
def test_a_name_that_cannot_be_completed_is_left_as_it_is(
    question: str, absent: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another Prefect may have no such question, or ask for an argument more."""

    class Other(Known):
        async def read_deployment_by_name(self, name: str) -> str:
            return name

    monkeypatch.setattr(deployments_client, "DeploymentAsyncClient", Other)
    assert install(logging.getLogger("martlet.plugin")) is True
    client = Other("distill-and-ship/gpu")
    assert anyio.run(client.read_deployment_by_name, "distill-and-ship") == "distill-and-ship/gpu"
    assert caplog.text == ""
    if absent:
        monkeypatch.delattr(Known, question)
    else:
        monkeypatch.setattr(Known, question, lambda self, page: [])
    assert anyio.run(client.read_deployment_by_name, "distill-and-ship") == "distill-and-ship"
    (record,) = caplog.records
    sentence = "The bare name 'distill-and-ship' could not be completed; use `prefect deployment run "
    assert record.getMessage() == f"{sentence}{CANONICAL_NAME}`."


@pytest.mark.parametrize("switched_on", [True, False])
def test_prefect_loads_it_where_pyproject_says_so(tmp_path: Path, switched_on: bool) -> None:
    program = (
        "import prefect\n"
        "from prefect.client.orchestration import PrefectClient as client\n"
        "print(getattr(client.read_deployment_by_name, 'completes_bare_names', False))\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT if switched_on else tmp_path,
        check=True,
    )
    assert finished.stdout.strip() == str(switched_on)
    assert finished.stderr == ""
