"""The importance matrix as a stage: its sources, its way into the exports, and what it gains."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import exports, importance_matrix, validate
from pipeline.artifacts import Artifact, Store, sha256_of_file
from pipeline.check import check_recipe
from pipeline.errors import UserError
from pipeline.recipe import Recipe, load_recipe


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Artifact, tiny_tokenizer: Any) -> Any:
    """Store, held-out and calibration text, chats; the tiny teacher stands for the tuned student."""
    store = Store(tmp_path_factory.mktemp("store"), report=lambda line: None)
    text = "\n".join(f"Names are bound by the import statement, said number {n}." for n in range(60))
    ids = np.array(tiny_tokenizer(text)["input_ids"][:512], np.int32).reshape(8, 64)

    def fill_text(output: Path, work: Path) -> None:
        np.save(output / "held_out.npy", ids[:2])
        np.save(output / "calibration.npy", ids[2:])
        np.save(output / "documents_calibration.npy", np.repeat(np.arange(6), 64).reshape(6, 64))

    def fill_chats(output: Path, work: Path) -> None:
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
        (output / "held_out.jsonl").write_text(json.dumps({"messages": turns}) + "\n")

    return {
        "store": store,
        "instruct": tiny_teacher,
        "text": store.get_or_make("text", 1, {}, {}, fill_text),
        "chats": store.get_or_make("chats", 1, {}, {}, fill_chats),
    }


def wanting(make_recipe: Callable[..., Recipe], source: Any, gguf: list[str]) -> Recipe:
    wanted = {"gguf": gguf, "mlc": [], "onnx": [], "importance_matrix": source, "pre_tokenizer": "smollm"}
    return make_recipe(export=wanted, validate={"tokens": 128, "default": {"mean_kl": 5.0}})


def test_it_weighs_what_is_below_q8_0_and_its_gain_is_measured(
    stages: Any, make_recipe: Callable[..., Recipe]
) -> None:
    store, instruct, text = stages["store"], stages["instruct"], stages["text"]
    recipe = wanting(make_recipe, "calibration", ["q8_0", "q4_0"])
    matrix = importance_matrix.run(store, recipe, instruct, text)
    facts = json.loads((matrix.path / "importance.json").read_text())
    assert facts == {"source": "calibration", "sha256": None, "tokens": 384, "rows": 6, "layers": 29}
    plain = exports.run(store, recipe, instruct, "gguf")
    weighed = exports.run(store, recipe, instruct, "gguf", matrix)
    assert weighed.manifest()["inputs"]["importance_matrix"] == matrix.digest
    files = [artifact.manifest()["files"] for artifact in (plain, weighed)]
    changed = [name for name in files[0] if files[0][name] != files[1][name]]
    assert sorted(changed) == ["files.json", "files/tiny-instruct-q4_0.gguf"]

    entries = {}
    for artifact in (plain, weighed):
        judged = validate.run(store, recipe, instruct, artifact, text, stages["chats"])
        entries[artifact] = json.loads((judged.path / "fidelity.json").read_text())
    without = entries[weighed][1]["without_importance_matrix"]
    assert entries[weighed][0]["without_importance_matrix"] is None
    assert entries[plain][1]["without_importance_matrix"] is None
    # The very file that the export without a matrix makes.
    assert without == {key: entries[plain][1][key] for key in without}
    assert without["mean_kl"] != entries[weighed][1]["mean_kl"]


def test_a_text_file_is_known_by_its_hash(
    stages: Any, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    file = tmp_path / "calibration.txt"
    file.write_text("An import binds a name. " * 40)
    recipe = wanting(make_recipe, str(file), ["q4_0"])
    matrix = importance_matrix.run(stages["store"], recipe, stages["instruct"], stages["text"])
    assert matrix.manifest()["inputs"]["text"] == sha256_of_file(file)
    assert json.loads((matrix.path / "importance.json").read_text())["sha256"] == sha256_of_file(file)
    again = importance_matrix.run(stages["store"], recipe, stages["instruct"], stages["text"])
    assert again.cached
    file.write_text("A loop repeats. " * 40)
    other = importance_matrix.run(stages["store"], recipe, stages["instruct"], stages["text"])
    assert other.digest != matrix.digest
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"export\.importance_matrix: .*calibration\.txt"):
        importance_matrix.run(stages["store"], recipe, stages["instruct"], stages["text"])


@pytest.mark.parametrize(
    ("source", "gguf", "expected"),
    [
        (None, ["q4_0"], False),
        ("calibration", ["f16", "q8_0"], False),
        ("calibration", ["q8_0", "q2_k"], True),
    ],
)
def test_it_is_made_only_where_it_changes_something(
    make_recipe: Callable[..., Recipe], source: Any, gguf: list[str], expected: bool
) -> None:
    assert importance_matrix.wanted(wanting(make_recipe, source, gguf)) is expected


def test_a_missing_file_is_found_before_anything_runs(tmp_path: Path) -> None:
    recipe = (
        Path("recipes/smoke.yaml").read_text().replace("export:\n", "export:\n  importance_matrix: no.txt\n")
    )
    (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(
        UserError, match=r"export\.importance_matrix: .*no\.txt: no such file; give calibration"
    ):
        check_recipe(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "recipe.yaml")
