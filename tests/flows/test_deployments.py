"""The deployments that ship with the project: parameters as the server's form shows them, and what a work
pool makes of their settings."""

import importlib
import json
from pathlib import Path
from typing import Any

import anyio
import prefect
import pytest
import yaml
from prefect.blocks.system import Secret
from prefect.client.schemas.schedules import CronSchedule
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import validate
from prefect.utilities.templating import apply_values
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker

ROOT = Path(__file__).parents[2]
FILES = ("prefect.yaml", "deploy/docker.yaml", "deploy/kubernetes.yaml")


def deployments(file: str) -> list[dict[str, Any]]:
    found = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))["deployments"]
    assert isinstance(found, list)
    return found


def template(kind: str) -> dict[str, Any]:
    """The base job template of a type of work pool: ours, or the one that Prefect carries."""
    if kind == "kubernetes":
        found = json.loads((ROOT / "deploy" / "kubernetes-job.json").read_text(encoding="utf-8"))
    elif kind == "docker":
        views = Path(prefect.__file__).parent / "server" / "api" / "collections_data" / "views"
        known = json.loads((views / "aggregate-worker-metadata.json").read_text(encoding="utf-8"))
        found = known["prefect-docker"]["docker"]["default_base_job_configuration"]
    else:
        found = ProcessWorker.get_default_base_job_template()
    assert isinstance(found, dict)
    return found


def job(kind: str, variables: dict[str, Any]) -> dict[str, Any]:
    """What a worker of that type starts, with these settings of a deployment."""
    schema = template(kind)["variables"]
    assert set(variables) <= set(schema["properties"]), "a setting that this type of pool does not know"
    validate(variables, schema, raise_on_error=True)
    defaults = {key: value["default"] for key, value in schema["properties"].items() if "default" in value}
    values = {"command": "prefect flow-run execute", "name": "run", **defaults, **variables}
    made = apply_values(template(kind)["job_configuration"], values)
    assert isinstance(made, dict)
    return made


@pytest.mark.parametrize("file", FILES)
def test_every_parameter_has_a_type_and_is_described(file: str) -> None:
    for deployment in deployments(file):
        path, _, name = deployment["entrypoint"].partition(":")
        flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
        schema = parameter_schema(flow).model_dump()
        for parameter in schema["properties"].values():
            assert "type" in parameter or "anyOf" in parameter
            assert len(parameter["description"]) > 10
        assert set(deployment["parameters"]) <= set(schema["properties"])
        validate(deployment["parameters"], schema, raise_on_error=True)
        if (recipe := deployment["parameters"].get("recipe")) is not None:
            assert (ROOT / recipe).is_file()
        assert deployment["description"].endswith(".")
        assert deployment["concurrency_limit"] == 1


def test_what_is_deployed() -> None:
    named = {file: [deployment["name"] for deployment in deployments(file)] for file in FILES}
    assert named == {
        "prefect.yaml": ["local", "smoke", "nightly"],
        "deploy/docker.yaml": ["docker"],
        "deploy/kubernetes.yaml": ["kubernetes"],
    }
    (schedule,) = next(entry for entry in deployments("prefect.yaml") if "schedules" in entry)["schedules"]
    CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
    assert schedule["active"] is False


def test_a_container_has_image_volume_and_limit() -> None:
    (deployment,) = deployments("deploy/docker.yaml")
    assert deployment["work_pool"]["name"] == "martlet-docker"
    made = job("docker", deployment["work_pool"]["job_variables"])
    assert made["image"] == "martlet"
    assert made["mem_limit"] == "8g"
    (volume,) = made["volumes"]
    mounted = volume.partition(":")[2]
    assert all(deployment["parameters"][key].startswith(f"{mounted}/") for key in ("store", "release"))


def test_a_job_has_image_volume_secret_and_limits() -> None:
    (deployment,) = deployments("deploy/kubernetes.yaml")
    assert deployment["work_pool"]["name"] == "martlet-kubernetes"
    made = job("kubernetes", deployment["work_pool"]["job_variables"])
    assert "{{" not in json.dumps(made)
    pod = made["job_manifest"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == deployment["work_pool"]["job_variables"]["image"]
    assert container["args"] == "prefect flow-run execute"
    assert container["resources"]["requests"] == {"cpu": "2", "memory": "8Gi"}
    assert container["resources"]["limits"] == {"memory": "8Gi"}
    assert container["envFrom"] == [{"secretRef": {"name": "martlet", "optional": True}}]
    (volume,), (mount,) = pod["volumes"], container["volumeMounts"]
    assert volume == {"name": mount["name"], "persistentVolumeClaim": {"claimName": "martlet-data"}}
    for key in ("store", "release"):
        assert deployment["parameters"][key].startswith(f"{mount['mountPath']}/")
    assert pod["restartPolicy"] == "Never"
    assert made["job_manifest"]["spec"]["backoffLimit"] == 0


def test_a_secret_block_in_a_pools_template_reaches_the_run(prefect_server: None) -> None:
    """As docs/guides/machines.md says."""
    Secret(value="hf_fromABlock").save("hf-token", overwrite=True)
    ours = template("process")
    ours["variables"]["properties"]["env"]["default"] = {"HF_TOKEN": "{{ prefect.blocks.secret.hf-token }}"}
    made = anyio.run(ProcessJobConfiguration.from_template_and_values, ours, {})
    assert made.env["HF_TOKEN"] == "hf_fromABlock"


def test_the_image_holds_what_the_deployments_name() -> None:
    lines = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    (folder,) = [line.split()[1] for line in lines if line.startswith("WORKDIR")]
    for file in FILES[1:]:
        (step,) = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))["pull"]
        assert step["prefect.deployments.steps.set_working_directory"]["directory"] == folder
