"""GPTQ as a stage: its text, its way into the ONNX export, and what the manifest says of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import export_folder, exports, gptq
from pipeline.artifacts import Artifact, Store, sha256_of_file
from pipeline.check import check_recipe
from pipeline.errors import UserError
from pipeline.recipe import Recipe, load_recipe


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Artifact, tiny_tokenizer: Any) -> Any:
    """Store and calibration text; the tiny teacher stands for the tuned student."""
    store = Store(tmp_path_factory.mktemp("store"), report=lambda line: None)
    text = "\n".join(f"Names are bound by the import statement, said number {n}." for n in range(60))
    ids = np.array(tiny_tokenizer(text)["input_ids"][:512], np.int32).reshape(8, 64)

    def fill_text(output: Path, work: Path) -> None:
        np.save(output / "calibration.npy", ids)
        np.save(output / "documents_calibration.npy", np.repeat(np.arange(16), 32).reshape(8, 64))

    return {
        "store": store,
        "instruct": tiny_teacher,
        "text": store.get_or_make("text", 1, {}, {}, fill_text),
    }


def wanting(make_recipe: Callable[..., Recipe], source: Any, onnx: list[str]) -> Recipe:
    return make_recipe(export={"gguf": [], "mlc": [], "onnx": onnx, "gptq": source})


def test_int4_is_made_of_the_rounded_layers(stages: Any, make_recipe: Callable[..., Recipe]) -> None:
    store, instruct, text = stages["store"], stages["instruct"], stages["text"]
    recipe = wanting(make_recipe, "calibration", ["int8", "int4"])
    rounded = gptq.run(store, recipe, instruct, text)
    facts = json.loads((rounded.path / "gptq.json").read_text())
    assert facts == {"source": "calibration", "sha256": None, "tokens": 512, "rows": 8, "layers": 28}
    assert rounded.manifest()["inputs"] == {"instruct": instruct.digest, "text": text.digest}
    plain = exports.run(store, recipe, instruct, "onnx")
    made = exports.run(store, recipe, instruct, "onnx", None, rounded)
    assert made.manifest()["inputs"]["gptq"] == rounded.digest
    files = [artifact.manifest()["files"] for artifact in (plain, made)]
    changed = [name for name in files[0] if files[0][name] != files[1][name]]
    assert sorted(changed) == ["files.json", "files/onnx/model_q4.onnx"]
    # The file of k-quant holds some layers in eight bits.
    sizes = [(artifact.path / "files/onnx/model_q4.onnx").stat().st_size for artifact in (plain, made)]
    assert sizes[1] < sizes[0]


def test_other_formats_do_not_depend_on_it(stages: Any, make_recipe: Callable[..., Recipe]) -> None:
    store, instruct = stages["store"], stages["instruct"]
    recipe = make_recipe(export={"gguf": [], "mlc": ["q0f32"], "onnx": ["int4"], "gptq": "calibration"})
    rounded = gptq.run(store, recipe, instruct, stages["text"])
    assert rounded.cached
    assert "gptq" not in exports.run(store, recipe, instruct, "mlc", None, rounded).manifest()["inputs"]


def test_a_text_file_is_known_by_its_hash(
    stages: Any, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    file = tmp_path / "calibration.txt"
    file.write_text("An import binds a name. " * 40)
    recipe = wanting(make_recipe, str(file), ["int4"])
    rounded = gptq.run(stages["store"], recipe, stages["instruct"], stages["text"])
    assert rounded.manifest()["inputs"]["text"] == sha256_of_file(file)
    facts = json.loads((rounded.path / "gptq.json").read_text())
    assert (facts["source"], facts["sha256"]) == ("calibration.txt", sha256_of_file(file))
    assert gptq.run(stages["store"], recipe, stages["instruct"], stages["text"]).cached
    file.write_text("A loop repeats. " * 40)
    other = gptq.run(stages["store"], recipe, stages["instruct"], stages["text"])
    assert other.digest != rounded.digest
    file.write_text("")
    with pytest.raises(UserError, match=r"export\.gptq: .*calibration\.txt: GPTQ: there is no text"):
        gptq.run(stages["store"], recipe, stages["instruct"], stages["text"])
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"export\.gptq: .*calibration\.txt"):
        gptq.run(stages["store"], recipe, stages["instruct"], stages["text"])
    file.unlink()
    with pytest.raises(UserError, match=r"export\.gptq: .*calibration\.txt: cannot be read"):
        gptq.run(stages["store"], recipe, stages["instruct"], stages["text"])


@pytest.mark.parametrize(
    ("source", "onnx", "expected"),
    [(None, ["int4"], False), ("calibration", ["fp32", "int8"], False), ("calibration", ["int4"], True)],
)
def test_it_is_made_only_where_it_changes_something(
    make_recipe: Callable[..., Recipe], source: Any, onnx: list[str], expected: bool
) -> None:
    recipe = make_recipe(export={"gguf": ["q8_0"], "mlc": [], "onnx": onnx, "gptq": source})
    assert gptq.wanted(recipe) is expected


def test_a_missing_file_is_found_before_anything_runs(tmp_path: Path) -> None:
    recipe = Path("recipes/smoke.yaml").read_text().replace("export:\n", "export:\n  gptq: no.txt\n")
    (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(UserError, match=r"export\.gptq: .*no\.txt: no such file; give calibration"):
        check_recipe(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "recipe.yaml")


def test_an_export_of_any_folder_rounds_on_a_text_file(tiny_model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "calibration.txt"
    file.write_text("An import binds a name. " * 40)
    wanted = {"onnx": ["int4"]}
    lines: list[str] = []
    (path,) = export_folder.run(
        tiny_model_dir, tmp_path / "out", wanted, "Tiny", gptq_text=file, progress=lines.append
    )
    assert path == tmp_path / "out" / "onnx" / "model_q4.onnx"
    assert "GPTQ: model.layers.3.mlp.down_proj" in lines
    with pytest.raises(UserError, match=r"--gptq: .*cannot be read as text"):
        export_folder.run(tiny_model_dir, tmp_path / "x", wanted, "Tiny", gptq_text=tmp_path / "no.txt")
    with pytest.raises(UserError, match=r"--gptq: rounds ONNX's int4, which is not among"):
        export_folder.run(tiny_model_dir, tmp_path / "x", {"gguf": ["q8_0"]}, "Tiny", gptq_text=file)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["calibration.txt", "out"]
