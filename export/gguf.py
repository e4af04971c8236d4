"""GGUF: converted by llama.cpp's own converter, quantized by llama.cpp, read back by the ``gguf`` package."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from export.errors import ExportError

QUANTIZATIONS: dict[str, str] = {
    "f16": "LLAMA_FTYPE_MOSTLY_F16",
    "bf16": "LLAMA_FTYPE_MOSTLY_BF16",
    "q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0",
    "q6_k": "LLAMA_FTYPE_MOSTLY_Q6_K",
    "q5_k_m": "LLAMA_FTYPE_MOSTLY_Q5_K_M",
    "q5_k_s": "LLAMA_FTYPE_MOSTLY_Q5_K_S",
    "q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M",
    "q4_k_s": "LLAMA_FTYPE_MOSTLY_Q4_K_S",
    "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0",
    "iq4_xs": "LLAMA_FTYPE_MOSTLY_IQ4_XS",
    "q3_k_m": "LLAMA_FTYPE_MOSTLY_Q3_K_M",
    "q2_k": "LLAMA_FTYPE_MOSTLY_Q2_K",
}
"""Names of quantizations and llama.cpp's constants for them."""

CONVERTED = ("f16", "bf16")
"""Those that the converter writes itself."""


def export_gguf(
    model_dir: Path,
    output_dir: Path,
    name: str,
    quantizations: Sequence[str],
    *,
    pre_tokenizer: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    threads: int = 2,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Exports a Hugging Face folder to GGUF files ``NAME-QUANTIZATION.gguf``.

    Args:
        model_dir: folder with safetensors, configuration and tokenizer.
        output_dir: receives the files, all or none; must not exist or be empty.
        name: first part of the file names.
        quantizations: keys of ``QUANTIZATIONS``.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer, for one that the converter does not recognise.
        metadata: keys of a hub model card that belong into the file (``license``, ``base_model``,
            ``language``, ``tags``), in place of those of the folder's own README.md.
        threads: CPU threads of quantization.
        progress: receives one line at the start of each step.

    Returns:
        The files, in the order of ``quantizations``.

    Raises:
        ExportError: a quantization does not exist, the folder holds no safetensors, the converter refuses
            the model, or the file does not say the same as the folder's configuration.
    """
    from export.converter import converter_script

    model_dir, output_dir = Path(model_dir), Path(output_dir)
    for quantization in quantizations:
        if quantization not in QUANTIZATIONS:
            raise ExportError(
                f"There is no GGUF quantization {quantization!r}; choose from {', '.join(QUANTIZATIONS)}."
            )
    if not list(model_dir.glob("*.safetensors")):
        raise ExportError(f"{model_dir}: no .safetensors file; export a folder with safetensors.")
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ExportError(f"{output_dir}: is not empty; give a new folder.")
    script = converter_script()
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=".gguf-") as temporary:
        staging, files = Path(temporary) / "model", Path(temporary) / "files"
        files.mkdir()
        config = stage_model(model_dir, staging)
        if metadata:
            _write_card(staging / "README.md", metadata)
        paths = []
        base: dict[str, Path] = {}

        def converted(file_type: str) -> Path:
            if file_type not in base:
                progress(f"gguf: converting to {file_type}")
                path = Path(temporary) / f"{name}-{file_type}.gguf"
                _convert(script, staging, path, file_type, pre_tokenizer, name, model_dir)
                _check(path, model_dir, config)
                base[file_type] = path
            return base[file_type]

        for quantization in quantizations:
            path = files / f"{name}-{quantization}.gguf"
            if quantization in CONVERTED:
                shutil.copyfile(converted(quantization), path)
            else:
                source = converted("f16")
                progress(f"gguf: quantizing to {quantization}")
                _quantize(source, path, QUANTIZATIONS[quantization], threads)
                _check(path, model_dir, config)
            paths.append(output_dir / path.name)
        if output_dir.exists():
            output_dir.rmdir()
        files.rename(output_dir)
    return paths


def stage_model(model_dir: Path, staging: Path) -> dict[str, Any]:
    """Copies a model folder by links, with ``rope_theta`` at the top level of its configuration.

    transformers 5 writes ``rope_parameters`` only; readers of the older key would silently take 10000.

    Returns:
        The completed configuration.
    """
    staging.mkdir()
    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{model_dir / 'config.json'}: cannot be read ({error}).") from None
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and "rope_theta" in parameters:
        config.setdefault("rope_theta", parameters["rope_theta"])
    for path in model_dir.iterdir():
        if path.is_file() and path.name != "config.json":
            (staging / path.name).symlink_to(path.resolve())
    (staging / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return config


def tensor_type_of_each(path: Path) -> dict[str, str]:
    """The type in which each tensor of a GGUF file is stored, such as ``{"output_norm.weight": "F32"}``."""
    from gguf import GGUFReader

    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


def tensor_types(path: Path) -> dict[str, int]:
    """How many tensors of a GGUF file are stored in each type: what a quantization's name really means here,
    since rows that are not divisible by 256 fall back to other types."""
    return dict(Counter(tensor_type_of_each(path).values()).most_common())


def _write_card(path: Path, metadata: Mapping[str, Any]) -> None:
    """The converter takes licence, base models, languages and tags from a model card's front matter."""
    path.unlink(missing_ok=True)
    # JSON is YAML, and needs no quoting rules of its own.
    lines = [f"{key}: {json.dumps(value)}" for key, value in metadata.items()]
    path.write_text("\n".join(["---", *lines, "---", ""]), encoding="utf-8")


def _convert(
    script: Path,
    staging: Path,
    path: Path,
    file_type: str,
    pre_tokenizer: str | None,
    name: str,
    model_dir: Path,
) -> None:
    named = ["--martlet-pre-tokenizer", pre_tokenizer] if pre_tokenizer else []
    driver = Path(__file__).with_name("gguf_conversion_driver.py")
    finished = subprocess.run(
        [
            *(sys.executable, str(driver), str(script), *named, str(staging)),
            *("--outfile", str(path), "--outtype", file_type, "--model-name", name),
        ],
        capture_output=True,
        text=True,
    )
    if finished.returncode == 0 and path.is_file():
        return
    lines = [line.strip() for line in finished.stderr.splitlines() if line.strip()]
    reason = lines[-1] if lines else f"exit status {finished.returncode}"
    if "pre-tokenizer was not recognized" in finished.stderr:
        raise ExportError(
            f"{model_dir / 'tokenizer.json'}: llama.cpp's converter does not recognise this pre-tokenizer; "
            "name the one it is like (pre_tokenizer, such as gpt-2, qwen2 or smollm), which the token-id "
            "gate then proves."
        )
    raise ExportError(f"{model_dir}: llama.cpp's converter refuses this model ({reason}).")


def _quantize(source: Path, path: Path, file_type: str, threads: int) -> None:
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "export.gguf_quantize_process"),
            *(str(source), str(path), file_type, str(threads)),
        ],
        capture_output=True,
        text=True,
    )
    if finished.returncode != 0 or not path.is_file():
        lines = [line.strip() for line in finished.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit status {finished.returncode}"
        raise ExportError(f"{path.name}: llama.cpp cannot quantize to this type ({reason}).")


def _check(path: Path, model_dir: Path, config: Mapping[str, Any]) -> None:
    """What a GGUF file says of the model against the folder's configuration, by the format's own reader."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    text = config.get("text_config", config)
    architecture = _field(reader, "general.architecture")
    expected = {
        f"{architecture}.rope.freq_base": config.get("rope_theta", text.get("rope_theta")),
        f"{architecture}.context_length": text.get("max_position_embeddings"),
        f"{architecture}.block_count": text.get("num_hidden_layers"),
        f"{architecture}.embedding_length": text.get("hidden_size"),
    }
    for key, wanted in expected.items():
        found = _field(reader, key)
        if (
            wanted is not None
            and found is not None
            and abs(float(found) - float(wanted)) > 1e-6 * abs(wanted)
        ):
            raise ExportError(f"{path.name}: {key} is {found}, but the model's configuration says {wanted}.")
    template = _field(reader, "tokenizer.chat_template")
    wanted_template = _chat_template(model_dir)
    if wanted_template is not None and template != wanted_template:
        raise ExportError(f"{path.name}: tokenizer.chat_template is not the model's own template.")


def _field(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _chat_template(model_dir: Path) -> str | None:
    file = model_dir / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    configuration = model_dir / "tokenizer_config.json"
    if not configuration.is_file():
        return None
    template = json.loads(configuration.read_text(encoding="utf-8")).get("chat_template")
    return template if isinstance(template, str) else None
