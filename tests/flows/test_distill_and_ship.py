"""The whole flow on a tiny model: every stage real, a gate that bites, and nothing computed twice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio

from flows.distill_and_ship import stage_names
from pipeline.recipe import load_recipe


def test_ship_fails_at_a_gate_then_goes_on_and_computes_nothing_twice(
    martlet: Callable[..., tuple[int, str, str]],
    prefect_server: None,
    tiny_recipe: dict[str, Any],
    write_recipe: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
) -> None:
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

    states, artifacts = anyio.run(what_prefect_knows)
    assert states["Completed"] >= 2
    assert any("mean_kl" in message for message in states["Failed"])
    assert {"fidelity", "device", "release"} <= artifacts


def test_an_importance_matrix_is_a_stage_of_its_own(
    tiny_recipe: dict[str, Any], write_recipe: Callable[[dict[str, Any]], Path]
) -> None:
    without = stage_names(load_recipe(write_recipe(tiny_recipe)))
    tiny_recipe["export"] |= {"importance_matrix": "calibration", "gguf": ["q8_0", "q4_0"]}
    with_matrix = stage_names(load_recipe(write_recipe(tiny_recipe)))
    place = without.index("export gguf")
    assert with_matrix == [*without[:place], "importance matrix", *without[place:]]


async def what_prefect_knows() -> tuple[dict[str, Any], set[str | None]]:
    """Flow runs' states (completed: how many, failed: messages) and the keys of all artifacts."""
    from prefect import get_client

    async with get_client() as client:
        runs = await client.read_flow_runs()
        artifacts = await client.read_artifacts()
    messages = [run.state.message or "" for run in runs if run.state and run.state.name == "Failed"]
    completed = sum(run.state is not None and run.state.name == "Completed" for run in runs)
    return {"Completed": completed, "Failed": messages}, {artifact.key for artifact in artifacts}
