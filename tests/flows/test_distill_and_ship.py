"""The whole flow on a tiny model: every stage real, a gate that bites, and nothing computed twice."""

import base64
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import anyio
import pytest
import yaml
from prefect import flow, task
from prefect.client.schemas.sorting import ArtifactSort

from export.errors import ExportError
from export.processes import run_logged
from flows import distill_and_ship
from flows.distill_and_ship import logging_children, stage_names
from pipeline.errors import GateFailed, Unreachable, UserError
from pipeline.inventory import unused
from pipeline.recipe import load_recipe
from taid import TaidError

SECRET = "hf_notToBeSeenAnywhere"


def test_ship_fails_at_a_gate_then_goes_on_and_computes_nothing_twice(
    martlet: Callable[..., tuple[int, str, str]],
    prefect_server: None,
    tiny_recipe: dict[str, Any],
    write_recipe: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)

    def ship() -> tuple[int, str, str]:
        recipe = write_recipe(tiny_recipe)
        return martlet(
            "ship", recipe, "--store", tmp_path / "store", "--release", tmp_path / "release", "--json"
        )

    thresholds = tiny_recipe["validate"]["default"]
    tiny_recipe["validate"]["default"] = {**thresholds, "mean_kl": 1e-12}
    code, out, err = ship()
    assert code == 1, err
    sentence = err.rstrip().splitlines()[-1]
    assert sentence.startswith("martlet: ")
    assert "q8_0" in sentence
    assert "mean_kl" in sentence
    assert "1e-12" in sentence
    assert "validate gguf: a gate was missed" in err
    assert out == ""
    assert not (tmp_path / "release").exists()

    tiny_recipe["validate"]["default"] = thresholds
    code, out, err = ship()
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    cached = {stage["name"]: stage["cached"] for stage in result["stages"]}
    assert {name for name, hit in cached.items() if not hit} == {"fidelity_gguf", "device_gguf"}
    report = json.loads((Path(result["release"]) / "report.json").read_text(encoding="utf-8"))
    assert {stage["name"] for stage in report["stages"]} >= set(cached)

    code, out, err = ship()
    assert code == 0, err
    assert all(stage["cached"] for stage in json.loads(out.splitlines()[-1])["stages"])
    begun = [
        line.split("  ", 1)[1].removesuffix(" ...") for line in err.splitlines() if line.endswith(" ...")
    ]
    assert begun == stage_names(load_recipe(write_recipe(tiny_recipe)))
    logs = tmp_path / "store" / "logs"
    assert {path.stem for path in logs.iterdir()} == {
        "export-gguf",
        "validate-reference",
        "validate-gguf-f16",
        "validate-gguf-q8_0",
        "bench-gguf-q8_0",
    }

    evaluate_both(martlet, Path(result["release"]), tmp_path)

    states, artifacts = anyio.run(what_prefect_knows)
    assert states["Completed"] >= 2
    assert any("mean_kl" in message for message in states["Failed"])
    assert {"fidelity", "device", "release", "progress", "files"} <= set(artifacts)
    assert artifacts["progress"] == 100
    kind, _, picture = artifacts["files"].partition(",")
    assert kind == "data:image/svg+xml;base64"
    assert ElementTree.fromstring(base64.b64decode(picture)).tag == "{http://www.w3.org/2000/svg}svg"

    assert SECRET not in out + err
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert logs / "export-gguf.log" in kept
    for path in kept:
        assert SECRET.encode() not in path.read_bytes(), path


def evaluate_both(martlet: Callable[..., tuple[int, str, str]], release: Path, tmp_path: Path) -> None:
    """The released model and its GGUF file on what their own run held out: nearly the same, in the report."""
    said = {}
    for file in ("Tiny-Instruct", "q8_0"):
        where = ("--store", tmp_path / "store", "--output", tmp_path / "evaluation.json")
        code, out, err = martlet("evaluate", release, "--file", file, *where, "--threads", "1", "--json")
        assert code == 0, err
        rows = json.loads(out.splitlines()[-1])["results"]
        said[file] = {(row["task"], row["metric"]): row["value"] for row in rows}
    tasks = {("held_out_text", "bits_per_byte"), ("held_out_chats", "bits_per_byte")}
    for each in tasks:
        assert said["q8_0"][each] == pytest.approx(said["Tiny-Instruct"][each], rel=0.02)
    report = json.loads((release / "report.json").read_text(encoding="utf-8"))
    shown = {(row["file"].rsplit("/", 1)[-1], row["task"], row["metric"]) for row in report["evaluations"]}
    assert {(name, *task) for name in ("Tiny-Instruct", "tiny-instruct-q8_0.gguf") for task in tasks} <= shown
    assert "What can it do?" in (release / "report.html").read_text(encoding="utf-8")
    assert martlet("validate", release)[0] == 0


def test_an_importance_matrix_is_a_stage_of_its_own(
    tiny_recipe: dict[str, Any], write_recipe: Callable[[dict[str, Any]], Path]
) -> None:
    without = stage_names(load_recipe(write_recipe(tiny_recipe)))
    tiny_recipe["export"] |= {"importance_matrix": "calibration", "gguf": ["q8_0", "q4_0"]}
    with_matrix = stage_names(load_recipe(write_recipe(tiny_recipe)))
    place = without.index("export gguf")
    assert with_matrix == [*without[:place], "importance matrix", *without[place:]]


def test_gptq_is_a_stage_of_its_own(
    tiny_recipe: dict[str, Any], write_recipe: Callable[[dict[str, Any]], Path]
) -> None:
    tiny_recipe["export"]["onnx"] = ["int4"]
    without = stage_names(load_recipe(write_recipe(tiny_recipe)))
    tiny_recipe["export"]["gptq"] = "calibration"
    place = without.index("export gguf")
    assert stage_names(load_recipe(write_recipe(tiny_recipe))) == [*without[:place], "GPTQ", *without[place:]]


@pytest.mark.slow
def test_several_recipes_share_a_store_and_end_in_one_comparison(
    martlet: Callable[..., tuple[int, str, str]],
    prefect_server: None,
    tiny_recipe: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Of three recipes one fails at a gate; the others are shipped and compared all the same."""
    gates = tiny_recipe["validate"]["default"]
    recipes = {
        "first": tiny_recipe,
        "second": tiny_recipe | {"name": "Other", "instruct": {"learning_rate": 5e-4, "batch_size": 4}},
        "third": tiny_recipe | {"name": "Strict", "validate": {"default": {**gates, "mean_kl": 1e-12}}},
    }
    paths = []
    for name, values in recipes.items():
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(values), encoding="utf-8")
    places = ("--store", tmp_path / "store", "--release", tmp_path / "releases")
    code, out, err = martlet("ship", paths[0], paths[2], paths[1], *places, "--json")
    assert code == 1, err
    sentence = err.rstrip().splitlines()[-1]
    assert "gate mean_kl" in sentence
    assert sentence.endswith("(1 of 3 recipes failed.)")
    assert sorted(path.name for path in (tmp_path / "releases").iterdir()) == ["Other", "Tiny", "comparison"]

    code, out, err = martlet("ship", *paths[:2], *places, "--json")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert [Path(each["release"]).name for each in result["releases"]] == ["Tiny", "Other"]
    assert all(stage["cached"] for each in result["releases"] for stage in each["stages"])
    facts = json.loads((tmp_path / "releases" / "comparison" / "comparison.json").read_text(encoding="utf-8"))
    assert facts["recipe"]["instruct.learning_rate"] == [1e-4, 5e-4]
    assert facts["results"]["distill"] == "same"
    assert facts["results"]["instruct"] == "differs"
    assert Path(result["comparison"]).is_file()

    code, _, err = martlet(
        "ship", *paths[:2], "--store", tmp_path / "store", "--release", tmp_path / "releases/Tiny"
    )
    assert code == 2
    assert "is the release of one recipe" in err
    code, _, err = martlet("ship", paths[0], paths[0], *places)
    assert code == 2
    assert "two of the recipes have the same name" in err


@pytest.mark.parametrize("kind", [UserError, ExportError, TaidError, GateFailed])
def test_a_recipe_that_fails_does_not_stop_the_next(
    kind: type[Exception], tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped: list[str] = []

    def ship(recipe: Path, store: Path, release: Path) -> dict[str, Any]:
        if release.name == "Tiny":
            raise kind("This one cannot be.")
        shipped.append(release.name)
        return {"release": str(release)}

    monkeypatch.setattr(distill_and_ship, "ship", ship)
    paths = [str(tmp_path / "first.yaml"), str(tmp_path / "second.yaml")]
    for path, name in zip(paths, ("Tiny", "Other"), strict=True):
        Path(path).write_text(yaml.safe_dump(tiny_recipe | {"name": name}), encoding="utf-8")
    with pytest.raises(kind, match=r"^This one cannot be\. \(1 of 2 recipes failed\.\)$"):
        distill_and_ship.distill_and_ship.fn(paths[0], str(tmp_path / "store"), str(tmp_path / "r"), paths)
    assert shipped == ["Other"]


def test_a_run_keeps_its_store_from_being_pruned(
    tiny_recipe: dict[str, Any],
    write_recipe: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, release = tmp_path / "store", tmp_path / "release"

    def ship(*_: Any) -> dict[str, Any]:
        with pytest.raises(UserError, match="a run is using this store"), unused(store):
            pass
        return {"release": str(release)}

    monkeypatch.setattr(distill_and_ship, "ship", ship)
    recipe = str(write_recipe(tiny_recipe))
    for several in (None, [recipe]):
        distill_and_ship.distill_and_ship.fn(recipe, str(store), str(release), several)
    with unused(store):
        pass


def test_licences_that_the_table_does_not_know_are_told_once_at_the_start(
    martlet: Callable[..., tuple[int, str, str]],
    prefect_server: None,
    tiny_recipe: dict[str, Any],
    write_recipe: Callable[[dict[str, Any]], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def fail(*arguments: Any) -> None:
        raise UserError("Far enough.")

    monkeypatch.setattr(distill_and_ship.teacher, "run", fail)
    places = ("--store", tmp_path / "store", "--release", tmp_path / "release")

    def warnings(*arguments: str | Path) -> list[str]:
        return [line for line in martlet(*arguments)[2].splitlines() if "warning: " in line]

    recipe = write_recipe(tiny_recipe)
    assert warnings("check", recipe) == warnings("ship", recipe, *places) == []
    tiny_recipe["teacher"]["licence"] = "Tongyi Qianwen"
    del tiny_recipe["data"]["chats"]["licence"]
    recipe = write_recipe(tiny_recipe)
    sentence = (
        f"warning: {recipe}: martlet's table of licences does not know teacher.licence: Tongyi Qianwen; data."
        "chats.licence: unknown, so nothing was judged of them; read them before you give the model away."
    )
    assert warnings("check", recipe) == [sentence]
    (told,) = warnings("ship", recipe, *places)
    assert told.endswith(f"  {sentence}")
    assert warnings("ship", recipe, *places, "--quiet") == []


def test_a_hub_that_does_not_answer_is_asked_again(
    prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What may be mended by trying again is tried again, what may not is not."""
    monkeypatch.setattr(distill_and_ship, "RETRY_SECONDS", (0, 0))
    calls: list[str] = []
    said: list[str] = []

    def fetch(answers: list[Exception | int]) -> int:
        calls.append("fetch")
        answer = answers[len(calls) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def ask(*answers: Exception | int) -> int:
        calls.clear()

        @flow
        def one_stage() -> int:
            report = lambda line, state=None: said.append(line)  # noqa: E731
            return int(distill_and_ship.stage(fetch, "teacher", report)(list(answers)))

        return one_stage()

    assert ask(Unreachable("no answer."), Unreachable("none yet."), 7) == 7
    assert len(calls) == 3
    assert [line for line in said if "tried again" in line] == [
        "warning: no answer. It is tried again in 0 s.",
        "warning: none yet. It is tried again in 0 s.",
    ]
    with pytest.raises(Unreachable, match="third"):
        ask(Unreachable("first."), Unreachable("second."), Unreachable("third."), 7)
    for error in (UserError("wrong."), GateFailed("missed."), RuntimeError("broken")):
        with pytest.raises(type(error)):
            ask(error, 7)
        assert len(calls) == 1


def test_what_child_processes_say_is_in_the_log_of_their_task(
    prefect_server: None, caplog: pytest.LogCaptureFixture
) -> None:
    @task
    def convert() -> None:
        run_logged([sys.executable, "-c", "print('two tensors of three')"])

    @flow
    @logging_children()
    def one_stage() -> None:
        convert()

    with caplog.at_level(logging.INFO, "prefect.task_runs"):
        one_stage()
        run_logged([sys.executable, "-c", "print('afterwards')"])
    (record,) = [record for record in caplog.records if "two tensors of three" in record.getMessage()]
    assert record.task_run_name.startswith("convert")
    assert "afterwards" not in caplog.text


HUB_SCRIPT = """
import sys
from pathlib import Path
from pipeline.errors import Unreachable, UserError
from pipeline.models import load_tokenizer
from pipeline.teacher import local_folder
from pipeline.sources import documents
for ask in (
    lambda: local_folder("teacher.model", "nobody/nothing", None, ["*"]),
    lambda: load_tokenizer("nobody/nothing"),
    lambda: list(documents("dataset:nobody/nothing", "text")),
):
    try:
        ask()
    except UserError as error:
        print(type(error).__name__)
"""


@pytest.mark.parametrize(
    ("answer", "offline", "kind"),
    [
        (None, "0", "Unreachable"),
        (503, "0", "Unreachable"),
        (404, "0", "UserError"),
        (None, "1", "UserError"),
    ],
)
def test_which_failures_of_a_hub_may_be_mended(
    tmp_path: Path, answer: int | None, offline: str, kind: str
) -> None:
    """A real server that answers so, or none at all (the port is closed)."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer or 500)
            if answer == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    if answer is None:
        server.server_close()
    else:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        finished = subprocess.run(
            [sys.executable, "-c", HUB_SCRIPT],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={
                **os.environ,
                "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                "HF_HOME": str(tmp_path / "hub"),
                "HF_HUB_OFFLINE": offline,
                "PYTHONPATH": str(Path(__file__).parents[2]),
            },
        )
    finally:
        if answer is not None:
            server.shutdown()
            server.server_close()
    assert finished.stdout.split() == [kind] * 3, finished.stderr


async def what_prefect_knows() -> tuple[dict[str, Any], dict[str | None, Any]]:
    """Flow runs' states (completed: how many, failed: messages) and what the latest artifact of each key
    holds."""
    from prefect import get_client

    async with get_client() as client:
        runs = await client.read_flow_runs()
        artifacts = await client.read_artifacts(sort=ArtifactSort.CREATED_DESC)
    messages = [run.state.message or "" for run in runs if run.state and run.state.name == "Failed"]
    completed = sum(run.state is not None and run.state.name == "Completed" for run in runs)
    latest = {artifact.key: artifact.data for artifact in reversed(artifacts)}
    return {"Completed": completed, "Failed": messages}, latest
