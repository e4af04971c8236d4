"""GGUF: converted by llama.cpp's own converter, quantized by llama.cpp, read back by the ``gguf`` package."""

import json
import logging
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.errors import ExportError
from export.processes import Finished, run_logged
from export.quantizations import GGUF as QUANTIZATIONS
from export.quantizations import GGUF_UNWEIGHTED

CONVERTED = ("f16", "bf16")
"""Those that the converter writes itself."""

DATA_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".md")
"""What the converter gets to see of a model folder: data. It opens tokenizers with ``trust_remote_code``, so
Python files stay behind, and so do pickles."""


def export_gguf(
    model_dir: Path,
    output_dir: Path,
    name: str,
    quantizations: Sequence[str],
    *,
    importance_matrix: Mapping[str, np.ndarray] | None = None,
    pre_tokenizer: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    threads: int = 2,
    progress: Callable[[str], None] | None = None,
    log: Path | None = None,
) -> list[Path]:
    """Exports a Hugging Face folder to GGUF files ``NAME-QUANTIZATION.gguf``.

    Args:
        model_dir: folder with safetensors, configuration and tokenizer.
        output_dir: receives the files, all or none; must not exist or be empty.
        name: first part of the file names.
        quantizations: keys of ``QUANTIZATIONS``.
        importance_matrix: for each GGUF tensor name (``blk.0.attn_q.weight``) the mean square of what each of
            its columns is multiplied with, float32 [columns] (``export.importance`` measures it); weighs the
            rounding errors of every quantization below q8_0.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer, for one that the converter does not recognise.
        metadata: keys of a hub model card that belong into the file (``license``, ``license_name``,
            ``base_model``, ``datasets``, ``language``, ``tags``, ``pipeline_tag``), in place of those of the
            folder's own README.md.
        threads: CPU threads of quantization.
        progress: receives one line at the start of each step.
        log: file that keeps what llama.cpp's converter and quantizer write.

    Returns:
        The files, in the order of ``quantizations``.

    Raises:
        ExportError: a quantization does not exist, the folder holds no readable safetensors, the converter
            refuses the model, the importance matrix does not fit it, or a file does not say the same as the
            folder's configuration.
    """
    from export.converter import converter_script

    model_dir, output_dir = Path(model_dir), Path(output_dir)
    for quantization in quantizations:
        if quantization not in QUANTIZATIONS:
            raise ExportError(
                f"There is no GGUF quantization {quantization!r}; choose from {', '.join(QUANTIZATIONS)}."
            )
    if Path(name).name != name:
        raise ExportError(f"{name!r} cannot begin a file name; give a name without slashes.")
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ExportError(f"{output_dir}: is not an empty folder; give a new one.")
    weights = _weight_names(model_dir)
    script = converter_script()
    report = progress or (lambda line: None)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=".gguf-") as temporary:
        staging, files = Path(temporary) / "model", Path(temporary) / "files"
        files.mkdir()
        config = stage_model(model_dir, staging)
        if metadata:
            _write_card(staging / "README.md", metadata)
        converted: dict[str, Path] = {}

        def convert(file_type: str) -> Path:
            if file_type not in converted:
                report(f"gguf: converting to {file_type}")
                folder = files if file_type in quantizations else Path(temporary)
                path = folder / f"{name}-{file_type}.gguf"
                _convert(script, staging, path, file_type, pre_tokenizer, name, model_dir, log)
                check_gguf(path, model_dir, config, weights)
                converted[file_type] = path
            return converted[file_type]

        for quantization in dict.fromkeys(quantizations):
            if quantization in CONVERTED:
                convert(quantization)
                continue
            source = convert("f16")
            report(f"gguf: quantizing to {quantization}")
            path = files / f"{name}-{quantization}.gguf"
            matrix = None if quantization in GGUF_UNWEIGHTED else importance_matrix
            quantize_gguf(source, path, quantization, importance_matrix=matrix, threads=threads, log=log)
            check_gguf(path, model_dir, config, weights)
        if output_dir.exists():
            output_dir.rmdir()
        files.rename(output_dir)
    return [output_dir / f"{name}-{quantization}.gguf" for quantization in quantizations]


def export_vocabulary(
    model_dir: Path, path: Path, *, pre_tokenizer: str | None = None, log: Path | None = None
) -> None:
    """Writes a GGUF file without weights: the converter's answer, in seconds, to whether it knows the
    architecture and the tokenizer, which llama.cpp can then load.

    Args:
        model_dir: as of ``export_gguf``.
        path: the file to write.
        pre_tokenizer: as of ``export_gguf``.
        log: as of ``export_gguf``.

    Raises:
        ExportError: the converter refuses the model.
    """
    from export.converter import converter_script

    script = converter_script()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".gguf-") as temporary:
        staging = Path(temporary) / "model"
        config = stage_model(model_dir, staging)
        try:
            _convert_vocabulary_here(script.parent, staging, path, config, pre_tokenizer)
        except (Exception, SystemExit):
            # In a process of its own, whose refusal is told.
            path.unlink(missing_ok=True)
            _convert(
                script, staging, path, "f16", pre_tokenizer, path.stem, model_dir, log, vocabulary_only=True
            )


def _convert_vocabulary_here(
    converter: Path, staging: Path, path: Path, config: Mapping[str, Any], pre_tokenizer: str | None
) -> None:
    """Calls the converter in this process, which has its libraries loaded: 1.5 s of CPU instead of 10. With
    the installed ``gguf``, which does not know every architecture that the converter's own does."""
    import gguf
    import torch

    sys.path.insert(0, str(converter))
    os.environ["NO_LOCAL_GGUF"] = "1"
    try:
        from conversion import get_model_class  # type: ignore[import-not-found]

        logging.getLogger("hf-to-gguf").setLevel(logging.CRITICAL)
        with torch.inference_mode():
            model = get_model_class(config["architectures"][0])(staging, gguf.LlamaFileType.MOSTLY_F16, path)
            if pre_tokenizer:
                model.get_vocab_base_pre = lambda tokenizer: pre_tokenizer
            model.write_vocab()
    finally:
        sys.path.remove(str(converter))
        del os.environ["NO_LOCAL_GGUF"]


def quantize_gguf(
    source: Path,
    path: Path,
    quantization: str,
    *,
    importance_matrix: Mapping[str, np.ndarray] | None = None,
    threads: int = 2,
    log: Path | None = None,
) -> None:
    """Quantizes a 16-bit GGUF file with llama.cpp.

    Args:
        source: the 16-bit GGUF file.
        path: the file to write.
        quantization: key of ``QUANTIZATIONS``.
        importance_matrix: as of ``export_gguf``; tensors that it does not name are quantized without.
        threads: CPU threads.
        log: file that keeps what llama.cpp writes.

    Raises:
        ExportError: the importance matrix does not fit the file, or llama.cpp refuses it.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".quantize-") as temporary:
        arguments = [str(source), f"{temporary}/quantized.gguf", QUANTIZATIONS[quantization], str(threads)]
        if importance_matrix:
            matrix_file = Path(temporary) / "importance.safetensors"
            _write_importance_matrix(matrix_file, importance_matrix, source)
            arguments.append(str(matrix_file))
        finished = _run_beside(log, "gguf_quantize_process.py", *arguments)
        if finished.returncode != 0:
            raise _failed(
                finished, f"{path.name}: llama.cpp cannot quantize to {quantization} ({finished.reason()})."
            )
        Path(arguments[1]).rename(path)


def stage_model(model_dir: Path, staging: Path) -> dict[str, Any]:
    """Links a model folder's data into a new folder, with a configuration that older readers understand.

    transformers 5 writes ``rope_parameters`` only; readers of the top-level ``rope_theta`` would silently
    take 10000. It writes no ``added_tokens_decoder`` either, without which control tokens of a SentencePiece
    model would be text. Python files and ``auto_map`` are left out: nothing of the folder may run as code.

    Returns:
        The completed configuration.

    Raises:
        ExportError: config.json or tokenizer_config.json cannot be read, or llama.cpp computes such a model
            otherwise.
    """
    staging.mkdir()
    config = _read_json(model_dir / "config.json")
    _check_gemma3({**config, **config.get("text_config", {})}, model_dir / "config.json")
    config.pop("auto_map", None)
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and "rope_theta" in parameters:
        config.setdefault("rope_theta", parameters["rope_theta"])
    tokenizer = _read_json(model_dir / "tokenizer.json")
    if not (model_dir / "tokenizer.model").is_file():
        _write_sentencepiece(tokenizer, staging / "tokenizer.model")
    rewritten = {"config.json": config}
    generation = _read_json(model_dir / "generation_config.json")
    if generation.get("repetition_penalty") is not None:
        # The name under which the converter looks for it.
        rewritten["generation_config.json"] = generation | {
            "penalty_repeat": generation["repetition_penalty"]
        }
    if (model_dir / "tokenizer_config.json").is_file():
        rewritten["tokenizer_config.json"] = _read_json(model_dir / "tokenizer_config.json")
        rewritten["tokenizer_config.json"].pop("auto_map", None)
        rewritten["tokenizer_config.json"].setdefault(
            "added_tokens_decoder",
            {
                str(token["id"]): {key: token[key] for key in token if key != "id"}
                for token in tokenizer.get("added_tokens") or []
            },
        )
    for path in model_dir.iterdir():
        if path.is_file() and path.suffix in DATA_SUFFIXES and path.name not in rewritten:
            (staging / path.name).symlink_to(path.resolve())
    for file_name, content in rewritten.items():
        (staging / file_name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    return config


def _write_sentencepiece(tokenizer: Mapping[str, Any], path: Path) -> None:
    """Writes the SentencePiece model that llama.cpp's converter wants of Gemma and of early Llama models, and
    which transformers 5 no longer saves, from the same in tokenizer.json: BPE with bytes to fall back on.
    Writes nothing for another kind of tokenizer.

    SentencePiece merges the pair whose piece has the highest score, BPE the pair of the lowest rank: a
    piece's score is its rank, negated. The token-id gate proves the result.
    """
    model = tokenizer.get("model") or {}
    vocabulary = model.get("vocab") or {}
    if (
        model.get("type") != "BPE"
        or not model.get("byte_fallback")
        or model.get("unk_token") not in vocabulary
    ):
        return
    from sentencepiece import sentencepiece_model_pb2

    scores: dict[str, float] = {}
    for rank, pair in enumerate(model["merges"]):
        scores.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), -float(rank))
    special = {token["content"] for token in tokenizer.get("added_tokens") or [] if token["special"]}
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.unk_id = vocabulary[model["unk_token"]]
    names = {token_id: token for token, token_id in vocabulary.items()}
    for token_id in range(max(names) + 1):
        # SentencePiece wants every piece's name once, and an id is a place.
        name = names.get(token_id, f"<unused id {token_id}>")
        piece = proto.pieces.add(piece=name, score=scores.get(name, 0.0), type=1)
        if token_id not in names:
            piece.type = piece.UNUSED
        elif name == model["unk_token"]:
            piece.type = piece.UNKNOWN
        elif name in special:
            piece.type = piece.CONTROL
        elif re.fullmatch("<0x[0-9A-F]{2}>", name):
            piece.type = piece.BYTE
    path.write_bytes(proto.SerializeToString())


def _check_gemma3(text: Mapping[str, Any], file: Path) -> None:
    """What llama.cpp does not read from a file but takes for granted in every Gemma 3."""
    if text.get("model_type") not in ("gemma3", "gemma3_text"):
        return
    layers, head_dim = text["num_hidden_layers"], text.get("head_dim", 256)
    # It knows the largest model by its number of layers.
    expected = text["hidden_size"] // text["num_attention_heads"] if layers == 62 else head_dim
    scale = text.get("query_pre_attn_scalar", 256)
    if scale != expected:
        raise ExportError(
            f"{file}: query_pre_attn_scalar is {scale}, but llama.cpp scales the attention of such a Gemma 3 "
            f"by {expected}, so GGUF cannot hold this model."
        )
    kinds = text.get("layer_types")
    pattern = ["full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(layers)]
    if kinds is not None and list(kinds) != pattern:
        raise ExportError(
            f"{file}: layer_types differ from Gemma 3's pattern of five sliding layers and a full one, which "
            "llama.cpp takes for granted, so GGUF cannot hold this model."
        )


def tensor_type_of_each(path: Path) -> dict[str, str]:
    """The type in which each tensor of a GGUF file is stored, such as ``{"output_norm.weight": "F32"}``."""
    from gguf import GGUFReader

    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


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
    log: Path | None,
    vocabulary_only: bool = False,
) -> None:
    named = ["--martlet-pre-tokenizer", pre_tokenizer] if pre_tokenizer else []
    finished = _run_beside(
        log,
        "gguf_conversion_driver.py",
        *(str(script), *named, str(staging), "--outfile", str(path)),
        *("--outtype", file_type, "--model-name", name),
        *(["--vocab-only"] if vocabulary_only else []),
    )
    if finished.returncode == 0 and path.is_file():
        return
    if "pre-tokenizer was not recognized" in finished.output:
        raise ExportError(
            f"{model_dir / 'tokenizer.json'}: llama.cpp's converter does not recognise this pre-tokenizer; "
            "name the one it is like (pre_tokenizer, such as gpt-2, qwen2 or smollm), which the token-id "
            "gate then proves."
        )
    raise _failed(finished, f"{model_dir}: llama.cpp's converter refuses this model ({finished.reason()}).")


def _run_beside(log: Path | None, file_name: str, *arguments: str) -> Finished:
    """Runs a script of this folder in its own process, without the network.

    ``-P`` keeps this folder off the script's import path, where ``onnx.py`` would pass for the library.
    """
    script = Path(__file__).with_name(file_name)
    command = [sys.executable, "-P", str(script), *arguments]
    return run_logged(command, log, {**os.environ, "HF_HUB_OFFLINE": "1"})


def _failed(finished: Finished, sentence: str) -> ExportError:
    error = ExportError(sentence)
    error.add_note(finished.shown())
    return error


def _write_importance_matrix(path: Path, matrix: Mapping[str, np.ndarray], source: Path) -> None:
    """Checks an importance matrix against a GGUF file, since llama.cpp aborts on one that does not fit."""
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    columns = {tensor.name: int(tensor.shape[0]) for tensor in GGUFReader(source).tensors}
    for tensor, importance in matrix.items():
        if tensor not in columns:
            raise ExportError(f"importance matrix: {tensor!r} is no tensor of {source.name}.")
        if importance.shape != (columns[tensor],):
            raise ExportError(
                f"importance matrix: {tensor} has shape {list(importance.shape)}, but the tensor has "
                f"{columns[tensor]} columns."
            )
        if not np.isfinite(importance).all() or importance.min() < 0 or importance.max() == 0:
            raise ExportError(
                f"importance matrix: {tensor} must be finite, not negative and not zero everywhere."
            )
    save_file({name: np.ascontiguousarray(values, dtype=np.float32) for name, values in matrix.items()}, path)


def check_gguf(path: Path, model_dir: Path, config: Mapping[str, Any], weights: set[str]) -> None:
    """Compares what a GGUF file says of the model with the folder, by the format's own reader.

    Args:
        path: the GGUF file.
        model_dir: the folder it was made of.
        config: the folder's configuration, as of ``stage_model``.
        weights: names of the folder's tensors.

    Raises:
        ExportError: rope theta, context length, norm epsilon, chat template, special tokens, vocabulary size
            or tied head is not the model's.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise ExportError(f"{path.name}: is no readable GGUF file ({error}).") from error
    text = {**config, **config.get("text_config", {})}
    architecture = _field(reader, "general.architecture")
    rope = text.get("rope_parameters") or {}
    theta = rope.get("full_attention", rope).get("rope_theta", text.get("rope_theta"))
    expected = {
        "rope.freq_base": theta,
        "rope.freq_base_swa": rope.get("sliding_attention", {}).get("rope_theta"),
        "context_length": text.get("max_position_embeddings"),
        "attention.layer_norm_rms_epsilon": text.get("rms_norm_eps"),
    }
    # llama.cpp takes these where the file says nothing.
    defaults = {"rope.freq_base": 10000.0, "rope.freq_base_swa": 10000.0}
    for key, wanted in expected.items():
        found = _field(reader, f"{architecture}.{key}")
        found = defaults.get(key) if found is None else found
        if wanted is None or found is None:
            continue
        # The file holds float32.
        if abs(float(found) - float(wanted)) > 1e-6 * abs(float(wanted)):
            raise ExportError(
                f"{path.name}: {architecture}.{key} is {found}, but the model's configuration says {wanted}."
            )
    _check_rope_scaling(reader, path, architecture, rope or text.get("rope_scaling") or {})
    template = _chat_template(model_dir)
    if template is not None and _field(reader, "tokenizer.chat_template") != template:
        raise ExportError(f"{path.name}: tokenizer.chat_template is not the model's own template.")
    _check_tokens(reader, path, model_dir, text)
    _check_head(reader, path, text, weights)


def _check_rope_scaling(reader: Any, path: Path, architecture: str, rope: Mapping[str, Any]) -> None:
    """The converter passes over kinds of scaling that it does not know for an architecture."""
    rope = rope.get("full_attention", rope)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", "dynamic"):  # a dynamic one changes nothing up to max_position_embeddings
        return
    tensors = {tensor.name for tensor in reader.tensors}
    scaling = f"{architecture}.rope.scaling"
    factor = float(_field(reader, f"{scaling}.factor") or 1.0)
    # The file holds float32.
    scaled = _field(reader, f"{scaling}.type") == kind and math.isclose(
        factor, float(rope.get("factor", 1.0)), rel_tol=1e-6
    )
    written = {
        "linear": scaled,
        "yarn": scaled,
        "llama3": "rope_freqs.weight" in tensors,
        "longrope": {"rope_factors_long.weight", "rope_factors_short.weight"} <= tensors,
    }
    if not written.get(kind, False):
        raise ExportError(
            f"{path.name}: rope_type {kind} of the model's configuration is not in the file; llama.cpp's "
            f"converter does not write it for {architecture}, so leave the GGUF formats out."
        )


def _check_tokens(reader: Any, path: Path, model_dir: Path, text: Mapping[str, Any]) -> None:
    field = reader.get_field("tokenizer.ggml.tokens")
    count = 0 if field is None else len(field.data)
    rows = next((int(each.shape[1]) for each in reader.tensors if each.name == "token_embd.weight"), count)
    if count != rows or count > text.get("vocab_size", count):
        raise ExportError(
            f"{path.name}: has {count} tokens and {rows} rows of embeddings, but the model's configuration "
            f"says {text.get('vocab_size')}."
        )
    if not (model_dir / "tokenizer.json").is_file():
        return
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    needed = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if count < needed:
        raise ExportError(f"{path.name}: has {count} tokens, but the model's tokenizer has {needed}.")
    settings = _read_json(model_dir / "tokenizer_config.json")
    for kind in ("bos", "eos", "eot"):
        named = settings.get(f"{kind}_token")
        named = named.get("content") if isinstance(named, dict) else named
        # Where the folder's files name several, as base and chat model do, any of them is the model's.
        wanted = {tokenizer.token_to_id(named)} if named else set()
        for source in ("config.json", "generation_config.json"):
            ids = _read_json(model_dir / source).get(f"{kind}_token_id") if wanted else None
            wanted.update(ids if isinstance(ids, list) else [ids])
        found = _field(reader, f"tokenizer.ggml.{kind}_token_id")
        if named and found is not None and found not in wanted:
            raise ExportError(
                f"{path.name}: tokenizer.ggml.{kind}_token_id is {found}, but the model's {kind}_token is "
                f"{named!r}, id {tokenizer.token_to_id(named)}."
            )
        if named and found is None and kind == "eos":
            raise ExportError(f"{path.name}: names no eos, but the model's eos_token is {named!r}.")


def _check_head(reader: Any, path: Path, text: Mapping[str, Any], weights: set[str]) -> None:
    has_head = any(tensor.name == "output.weight" for tensor in reader.tensors)
    tied = text.get("tie_word_embeddings")
    if tied and has_head:
        raise ExportError(f"{path.name}: has an output.weight, but the model's head is its embedding.")
    if not tied and not has_head and "lm_head.weight" in weights:
        raise ExportError(f"{path.name}: has no output.weight, but the model's head is not its embedding.")


def _weight_names(model_dir: Path) -> set[str]:
    """Names of a folder's tensors; opening the files finds the truncated ones before the converter does."""
    from safetensors import SafetensorError, safe_open

    paths = sorted(model_dir.glob("*.safetensors"))
    if not paths:
        raise ExportError(f"{model_dir}: no .safetensors file; export a folder with safetensors.")
    names: set[str] = set()
    for path in paths:
        try:
            with safe_open(path, framework="np") as file:
                names.update(file.keys())
        except (SafetensorError, OSError) as error:
            raise ExportError(f"{path}: is no complete safetensors file ({error}).") from error
    return names


def _read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file; empty where an optional file is missing."""
    if not path.is_file() and path.name != "config.json":
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: cannot be read ({error}).") from None
    if not isinstance(content, dict):
        raise ExportError(f"{path}: must hold a JSON object.")
    return content


def _field(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _chat_template(model_dir: Path) -> str | None:
    file = model_dir / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = _read_json(model_dir / "tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else None
