"""Exports without a recipe: several formats at once, adapters merged first, all or none."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from export.adapters import merge_adapter
from export.errors import ExportError
from export.runtime import open_runtime
from pipeline import export_folder
from pipeline.errors import UserError


@pytest.mark.parametrize(
    ("formats", "names", "expected"),
    [
        ("gguf", None, {"gguf": ["q4_k_m"]}),
        ("gguf,mlc,onnx", None, {"gguf": ["q4_k_m"], "mlc": ["q4f32_1"], "onnx": ["int4"]}),
        (
            "onnx, gguf",
            "q8_0,int4,f16,fp32,q8_0",
            {"onnx": ["int4", "fp32"], "gguf": ["q8_0", "f16"]},
        ),
    ],
)
def test_each_quantization_goes_to_the_format_that_knows_it(
    formats: str, names: str | None, expected: dict[str, list[str]]
) -> None:
    assert export_folder.wanted_of(formats, names) == expected


@pytest.mark.parametrize(
    ("formats", "names", "sentence"),
    [
        ("gguf,tflite", None, "there is no format 'tflite'"),
        ("", None, "there is no format ''"),
        ("gguf", "int4", "gguf knows no 'int4'"),
        ("gguf,mlc", "q8_0", "names none for mlc"),
    ],
)
def test_wishes_that_cannot_be_met(formats: str, names: str | None, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        export_folder.wanted_of(formats, names)


@pytest.fixture(scope="module")
def adapter(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny model that changes a lot."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.2)
    folder = tmp_path_factory.mktemp("adapter") / "tiny-adapter"
    adapted.save_pretrained(folder)
    return folder


def test_an_adapter_goes_to_several_formats_and_is_the_adapted_model(
    adapter: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "exported"
    wanted = {"gguf": ["f16"], "mlc": ["q0f32"], "onnx": ["fp32"]}
    paths = export_folder.run(adapter, output, wanted, "Tiny", pre_tokenizer="smollm")
    assert [path.relative_to(output).as_posix() for path in paths] == [
        "Tiny-GGUF/tiny-f16.gguf",
        "Tiny-q0f32-MLC",
        "Tiny-ONNX/onnx/model.onnx",
    ]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["exported"]
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tiny_model_dir)("The import statement binds a name.")["input_ids"]
    with torch.no_grad():
        before = model(torch.tensor([ids])).logits[0].numpy()
        expected = PeftModel.from_pretrained(model, adapter)(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(before - expected).max() > 0.1
    for path, tolerance in zip(paths, (0.05, 0.05, 1e-3), strict=True):
        runtime = open_runtime(path)
        assert np.abs(runtime.forward(ids) - expected).max() < tolerance, path
        runtime.close()


def test_mlc_folders_have_the_names_of_a_release(tiny_model_dir: Path, tmp_path: Path) -> None:
    paths = export_folder.run(tiny_model_dir, tmp_path / "out", {"mlc": ["q0f32"]}, "Tiny")
    assert paths == [tmp_path / "out" / "q0f32"]
    assert (paths[0] / "mlc-chat-config.json").is_file()


def test_a_format_that_cannot_hold_the_model_is_told_before_any_is_made(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    lines: list[str] = []
    with pytest.raises(UserError, match=r"^export\.mlc: .*only silu"):
        export_folder.run(
            model,
            tmp_path / "out",
            {"gguf": ["q8_0"], "mlc": ["q4f32_1"]},
            "Tiny",
            pre_tokenizer="smollm",
            progress=lines.append,
        )
    assert lines == ["checking that gguf, mlc can hold the model"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_adapters_that_cannot_be_merged(adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())

    def write(**values: object) -> None:
        (folder / "adapter_config.json").write_text(json.dumps(config | values))

    write(base_model_name_or_path=None)
    with pytest.raises(ExportError, match="names no base_model_name_or_path"):
        merge_adapter(folder, tmp_path / "merged")
    (tmp_path / "empty").mkdir()
    write(base_model_name_or_path=str(tmp_path / "empty"))
    with pytest.raises(ExportError, match="the adapter's model needs safetensors"):
        merge_adapter(folder, tmp_path / "merged")
    write(r=8)
    with pytest.raises(ExportError, match="the adapter cannot be merged into"):
        merge_adapter(folder, tmp_path / "merged")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ExportError, match="pickled adapters are not read"):
        merge_adapter(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_a_shared_head_cannot_be_merged(tiny_model_dir: Path, tmp_path: Path) -> None:
    """peft adds its change to the weights of head and embedding, which are one, and saves with a warning."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert model.config.tie_word_embeddings
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"]))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ExportError, match=r"another model than the adapter apart .*without lm_head"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
