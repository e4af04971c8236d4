"""MLC folders: quantized weights as ``mlc_llm convert_weight`` writes them, the chat configuration of
``mlc_llm gen_config``, and libraries compiled by the same compiler (apache-tvm).

Weight layout of ``*_1``: a matrix is [N, K], its groups 32 weights along K. In the model's dtype,
scale = max|w| / 7 and q = clip(round_half_even(w / scale + 7), 0, 14); eight q fill a uint32, lowest first.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from export import emscripten
from export.errors import ExportError
from export.processes import run_logged
from export.quantizations import MLC as QUANTIZATIONS
from export.quantizations import MLC_LIBRARIES, WEBGPU

ATTENTION_NAMES = {"llama": "qkv_proj", "qwen2": "c_attn", "qwen3": "c_attn", "gemma3_text": ""}
"""Model types that can be exported, and MLC's name of their fused attention input; empty where queries, keys
and values are apart."""

PREFILL_CHUNK = 2048
PROBES = ("Hello", " a b ", "", "\n", "x\n\ny", "1 + 2 = 3", "日本語 😀", "<|im_end|>", "{{ x }}", "it's")
"""Contents of the conversations that prove a chat configuration."""


def export_mlc(
    model_dir: Path,
    output_dir: Path,
    name: str,
    quantization: str = "q4f32_1",
    *,
    context_length: int | None = None,
    compile_cpu: bool = True,
    libraries: Sequence[str] = ("x86_64-cpu",),
    progress: Callable[[str], None] = lambda line: None,
) -> Path:
    """Exports a Hugging Face folder to an MLC folder.

    Args:
        model_dir: folder with safetensors, configuration and tokenizer.
        output_dir: the folder to make; must not exist or be empty.
        name: first part of the library's name.
        quantization: a key of ``QUANTIZATIONS``.
        context_length: ``context_window_size`` in tokens, at most the model's own, which is the default.
        compile_cpu: also compile ``libs/NAME-QUANTIZATION-LIBRARY``.
        libraries: keys of ``MLC_LIBRARIES``; those for ARM are an archive of objects, as MLC's own for
            phones, which a toolchain for that system links; those for WebGPU need Emscripten.
        progress: receives one line at the start of each step.

    Returns:
        ``output_dir`` with params_shard_*.bin, tensor-cache.json, mlc-chat-config.json, the tokenizer's
        files and ``libs/``.

    Raises:
        ExportError: the quantization or the model family is not supported, widths are not divisible by 32,
            the context is longer than the model's, the chat template cannot be said in MLC's terms, a
            library cannot be compiled, or an ``mlc_llm`` on PATH, which is then run too, makes other weights.
    """
    model_dir, output_dir = Path(model_dir), Path(output_dir)
    if quantization not in QUANTIZATIONS:
        raise ExportError(
            f"There is no MLC quantization {quantization!r}; choose from {', '.join(QUANTIZATIONS)}."
        )
    check_libraries(libraries, quantization)
    if not list(model_dir.glob("*.safetensors")):
        raise ExportError(f"{model_dir}: no .safetensors file; export a folder with safetensors.")
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ExportError(f"{output_dir}: is not empty; give a new folder.")
    architecture = read_architecture(model_dir, quantization)
    check_windows(architecture, libraries)
    if context_length is not None:
        if not 0 < context_length <= architecture.context_length:
            raise ExportError(
                f"context_length {context_length} must lie between 1 and the {architecture.context_length} "
                f"tokens of {model_dir / 'config.json'}."
            )
        architecture = replace(architecture, context_length=context_length)
    config = chat_config(model_dir, architecture, quantization)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=".mlc-") as temporary:
        folder = Path(temporary) / "files"
        folder.mkdir()
        progress(f"mlc: writing weights as {quantization}")
        write_weights(model_dir, folder, architecture)
        real = shutil.which("mlc_llm")
        if real is not None:
            progress(f"mlc: comparing with {real} convert_weight")
            compare_with_mlc_llm(real, model_dir, folder, quantization, Path(temporary) / "mlc_llm")
        (folder / "mlc-chat-config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        for file in config["tokenizer_files"]:
            shutil.copy(model_dir / file, folder / file)
        if compile_cpu:
            (folder / "libs").mkdir()
            facts = {key: config[key] for key in ("model_type", "quantization", "prefill_chunk_size")}
            for target in libraries:
                progress(f"mlc: compiling the {quantization} library for {target}")
                library = folder / "libs" / f"{name}-{quantization}-{target}{MLC_LIBRARIES[target]}"
                _compile_library(architecture, library, facts, target)
        if output_dir.exists():
            output_dir.rmdir()
        folder.rename(output_dir)
    return output_dir


def check_libraries(libraries: Sequence[str], quantization: str) -> None:
    """Whether the libraries of a quantization can be compiled here.

    Args:
        libraries: keys of ``MLC_LIBRARIES``.
        quantization: a key of ``QUANTIZATIONS``.

    Raises:
        ExportError: there is no such library, none of this quantization, or Emscripten is missing.
    """
    for target in libraries:
        if target not in MLC_LIBRARIES:
            raise ExportError(f"There is no MLC library {target!r}; choose from {', '.join(MLC_LIBRARIES)}.")
    if WEBGPU in libraries:
        if QUANTIZATIONS[quantization][0] != "float32":
            whole = [name for name, (dtype, _) in QUANTIZATIONS.items() if dtype == "float32"]
            raise ExportError(
                f"There is no {WEBGPU} library of {quantization}: not every browser has half precision; "
                f"take {' or '.join(whole)}, or leave {WEBGPU} out."
            )
        emscripten.compiler()


def check_windows(architecture: Any, libraries: Sequence[str]) -> None:
    """Whether the libraries keep the windows of a model's layers.

    On WebGPU TVM's cache has one place for the pages of layers with a window and for those of the others, so
    that beyond two pages one kind reads the other's. (``PlainPagedKVCacheAuxDataManager`` of its runtime
    copies both lists to the same array; on CPUs it has another class.)

    Raises:
        ExportError: the model has windows and a library for browsers is wanted.
    """
    if WEBGPU in libraries and any(architecture.windowed):
        raise ExportError(
            f"A {WEBGPU} library of a model whose layers have windows would be another model: TVM's cache "
            f"mixes up their pages in browsers; leave {WEBGPU} out."
        )


def _compile_library(architecture: Any, path: Path, facts: dict[str, Any], target: str) -> None:
    if target == WEBGPU:
        from export.mlc_webgpu import compile_library

        compile_library(architecture, path, facts)
    else:
        from export import mlc_model

        mlc_model.compile_library(architecture, path, facts, target)


def read_architecture(model_dir: Path, quantization: str) -> Any:
    """The model's shape as the libraries need it, with the true rope theta.

    Raises:
        ExportError: the family, the rope scaling or a width is not supported.
    """
    from export.mlc_model import GROUP, Architecture

    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{model_dir / 'config.json'}: cannot be read ({error}).") from None
    model_type = config.get("model_type")
    if model_type not in ATTENTION_NAMES:
        raise ExportError(
            f"{model_dir / 'config.json'}: model_type {model_type!r} cannot be exported to MLC; "
            f"supported are {', '.join(ATTENTION_NAMES)}."
        )
    gemma = model_type == "gemma3_text"
    if gemma:
        config = _complete_gemma3(config)
    needed = ("num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    for key in (*needed, "rms_norm_eps", "max_position_embeddings"):
        if key not in config:
            raise ExportError(f"{model_dir / 'config.json'}: holds no {key}, which a {model_type} model has.")
    if config.get("use_sliding_window"):
        raise ExportError(f"{model_dir / 'config.json'}: sliding-window attention cannot be exported to MLC.")
    # transformers 5 writes rope_parameters, earlier ones rope_theta and rope_scaling.
    rope = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", 10000.0),
        **(config.get("rope_scaling") or {}),
    }
    ropes = {"full_attention": rope, **(rope if gemma else {})}
    for each in ropes.values():
        kind = each.get("rope_type", each.get("type", "default"))
        if kind != "default":
            raise ExportError(
                f"{model_dir / 'config.json'}: rope scaling {kind!r} cannot be exported to MLC."
            )
    activation, wanted = config.get("hidden_act", "silu"), "silu"
    if gemma:
        activation, wanted = config["hidden_activation"], "gelu_pytorch_tanh"
    if activation != wanted or config.get("mlp_bias"):
        raise ExportError(
            f"{model_dir / 'config.json'}: of a {model_type} model only {wanted} feed-forward layers without "
            "bias go to MLC."
        )
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    architecture = Architecture(
        layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        heads=heads,
        key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        vocabulary_size=config["vocab_size"],
        norm_epsilon=config["rms_norm_eps"],
        rope_theta=float(ropes["full_attention"].get("rope_theta", 10000.0)),
        tied=bool(config.get("tie_word_embeddings")),
        attention_bias=model_type == "qwen2" or bool(config.get("attention_bias")),
        attention_name=ATTENTION_NAMES[model_type],
        head_norms=model_type in ("qwen3", "gemma3_text"),
        quantized=QUANTIZATIONS[quantization][1],
        weight_dtype=QUANTIZATIONS[quantization][0],
        context_length=config["max_position_embeddings"],
        attention_scale=head_dim**-0.5,
    )
    if gemma:
        windowed = tuple(kind == "sliding_attention" for kind in config["layer_types"])
        architecture = replace(
            architecture,
            attention_scale=config["query_pre_attn_scalar"] ** -0.5,
            prefix="language_model.model",
            output_norms=True,
            activation="gelu_tanh",
            embedding_scale=config["hidden_size"] ** 0.5,
            window=config["sliding_window"] if any(windowed) else 0,
            windowed=windowed if any(windowed) else (),
            window_rope_theta=float(ropes["sliding_attention"]["rope_theta"]) if any(windowed) else 0.0,
        )
        _check_gemma3(config, architecture, model_dir / "config.json")
    for key, width in (
        ("hidden_size", architecture.hidden_size),
        ("intermediate_size", architecture.intermediate_size),
        ("num_attention_heads times head_dim", architecture.heads * architecture.head_dim),
    ):
        if width % GROUP:
            raise ExportError(f"{model_dir / 'config.json'}: {key} {width} is not divisible by {GROUP}.")
    if architecture.head_dim % 8:
        raise ExportError(f"{model_dir / 'config.json'}: head_dim must be divisible by 8.")
    if model_type != "qwen2" and architecture.attention_bias:
        raise ExportError(
            f"{model_dir / 'config.json'}: attention_bias of a {model_type} model cannot be exported to MLC."
        )
    return architecture


def _complete_gemma3(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with what it leaves to its defaults: Google's own files leave much."""
    from transformers import Gemma3TextConfig

    return {**config, **Gemma3TextConfig.from_dict(config).to_dict()}


def _check_gemma3(config: dict[str, Any], architecture: Any, file: Path) -> None:
    """What a Gemma 3 may be in transformers and not in MLC."""
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if config.get(key):
            raise ExportError(f"{file}: {key} of a Gemma 3 cannot be exported to MLC.")
    if not architecture.tied:
        raise ExportError(
            f"{file}: MLC takes the head of a Gemma 3 from its embedding, this one has its own."
        )
    if all(architecture.windowed) and architecture.windowed:
        raise ExportError(
            f"{file}: a Gemma 3 without a layer that sees all tokens cannot be exported to MLC."
        )


def quantize(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Four-bit groups of 32.

    Args:
        weight: [N, K] in the model's dtype.

    Returns:
        Words uint32 [N, K / 8] and scales [N, K / 32] in the model's dtype.
    """
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // 32, 32)
    scale = np.abs(groups).max(axis=-1) / weight.dtype.type(7)
    divisor = np.where(scale == 0, weight.dtype.type(1), scale)[..., None]
    seven = weight.dtype.type(7)
    q = np.clip(np.rint(groups / divisor + seven), 0, 14).astype(np.uint32)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    words = (q.reshape(rows, columns // 8, 8) << shifts).sum(axis=-1, dtype=np.uint32)
    return words, scale


def write_weights(model_dir: Path, folder: Path, architecture: Any) -> None:
    """Writes params_shard_*.bin and tensor-cache.json, record for record as ``mlc_llm convert_weight``."""
    from tvm.contrib import tvmjs

    total = {"tensors": 0, "bytes": 0.0, "numbers": 0}

    def records() -> Iterator[tuple[str, np.ndarray]]:
        for name, array in _weights(model_dir, architecture, total):
            total["tensors"] += 1
            total["bytes"] += array.nbytes
            yield name, array

    def metadata() -> dict[str, float]:
        return {
            "ParamSize": total["tensors"],
            "ParamBytes": total["bytes"],
            "BitsPerParam": total["bytes"] * 8.0 / total["numbers"],
        }

    # It prints where it stores what, which is of no interest here.
    with contextlib.redirect_stdout(io.StringIO()):
        tvmjs.dump_tensor_cache(
            records(), str(folder), encode_format="f32-to-bf16", meta_data=metadata, show_progress=False
        )
    for name in ("ndarray-cache.json", "tensor-cache-b16.json", "ndarray-cache-b16.json"):
        (folder / name).unlink(missing_ok=True)


def compare_with_mlc_llm(
    command: str, model_dir: Path, folder: Path, quantization: str, workplace: Path
) -> None:
    """Has the real ``mlc_llm`` convert the same weights, and compares tensor for tensor.

    Args:
        command: path of ``mlc_llm``.
        model_dir: the Hugging Face folder.
        folder: what ``write_weights`` wrote.
        quantization: the quantization of both.
        workplace: folder to make for the other weights.

    Raises:
        ExportError: it fails, or a tensor has another name, shape, type or value.
    """
    finished = run_logged(
        [command, "convert_weight", str(model_dir), "--quantization", quantization, "-o", str(workplace)],
        environment={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if finished.returncode != 0:
        raise ExportError(f"{model_dir}: {command} convert_weight fails ({finished.reason()}).")
    ours, theirs = _tensor_digests(folder), _tensor_digests(workplace)
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise ExportError(
                f"{model_dir}: the tensor {name} in {quantization} is {ours.get(name, 'missing')} here and "
                f"{theirs.get(name, 'missing')} by {command}; the versions of both do not fit together."
            )
    shutil.rmtree(workplace)


def _tensor_digests(folder: Path) -> dict[str, str]:
    """What each tensor of an MLC folder is, in words: shape, type and the begin of its SHA-256."""
    files = [folder / name for name in ("tensor-cache.json", "ndarray-cache.json")]
    try:
        cache = json.loads(next(file for file in files if file.is_file()).read_text(encoding="utf-8"))
        found = {}
        for shard in cache["records"]:
            with (folder / shard["dataPath"]).open("rb") as file:
                for record in shard["records"]:
                    file.seek(record["byteOffset"])
                    digest = hashlib.sha256(file.read(record["nbytes"])).hexdigest()[:16]
                    found[record["name"]] = f"{record['shape']} {record['dtype']} {digest}"
        return found
    except (StopIteration, OSError, ValueError, KeyError) as error:
        raise ExportError(f"{folder}: holds no readable tensor cache ({error}).") from None


def _weights(model_dir: Path, architecture: Any, total: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    import torch
    from safetensors import safe_open

    files: dict[str, Path] = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                files.update(dict.fromkeys(file.keys(), path))
        except Exception as error:
            raise ExportError(f"{path}: cannot be read ({error}).") from error
    dtype = np.dtype(architecture.weight_dtype)
    # Norms of Gemma 3 add one to their weights, which mlc_llm does beforehand, in the checkpoint's own type.
    offset = 1 if architecture.output_norms else 0

    def read(name: str) -> np.ndarray:
        if name not in files:
            raise ExportError(f"{model_dir}: holds no tensor {name}.")
        with safe_open(files[name], "pt") as file:
            tensor = file.get_tensor(name)
        if offset and name.endswith("norm.weight"):
            tensor = tensor + offset
        return tensor.to(torch.float32).numpy().astype(dtype)

    sources = _sources(architecture)
    owners = {source: name for name, parts in sources.items() for source in parts}
    order = [owners[source] for source in _reading_order(model_dir, files) if source in owners]
    for name in dict.fromkeys([*order, *sources]):
        parts = [read(source) for source in sources[name]]
        value = parts[0] if len(parts) == 1 else np.concatenate(parts)
        del parts
        total["numbers"] += value.size
        if value.ndim == 1 or not architecture.quantized:
            yield name, value
            continue
        words, scale = quantize(value)
        yield name.removesuffix(".weight") + ".q_weight", words
        yield name.removesuffix(".weight") + ".q_scale", scale


def _sources(architecture: Any) -> dict[str, list[str]]:
    """MLC's weights before quantization, and the checkpoint's tensors that each is made of, one below the
    other."""
    from export.mlc_model import parameters_of

    fused: dict[str, tuple[str, ...]] = {"gate_up_proj": ("gate_proj", "up_proj")}
    if architecture.attention_name:
        fused[architecture.attention_name] = ("q_proj", "k_proj", "v_proj")
    found = {}
    for name, _, _ in parameters_of(replace(architecture, quantized=False)):
        source = name.replace(architecture.prefix, "model", 1)
        *_, module, _ = source.split(".")
        parts = fused.get(module, (module,))
        found[name] = [source.replace(f".{module}.", f".{part}.") for part in parts]
    return found


def _reading_order(model_dir: Path, files: dict[str, Path]) -> list[str]:
    """A checkpoint's tensors in the order in which ``mlc_llm`` reads them: as the index lists them, file by
    file; a single file's by name.

    Args:
        model_dir: the checkpoint's folder.
        files: file of each tensor.
    """
    try:
        index = json.loads((model_dir / "model.safetensors.index.json").read_text(encoding="utf-8"))
        listed = [name for name in index["weight_map"] if name in files]
    except (OSError, ValueError, KeyError, TypeError):
        listed = []  # the tensors themselves are there, or it will be told
    names = list(dict.fromkeys([*listed, *files]))
    places = {path: place for place, path in enumerate(dict.fromkeys(files[name] for name in names))}
    return sorted(names, key=lambda name: places[files[name]])


def chat_config(model_dir: Path, architecture: Any, quantization: str) -> dict[str, Any]:
    """``mlc-chat-config.json``: what MLC's engine and WebLLM read beside the weights."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    generation_file = model_dir / "generation_config.json"
    generation = json.loads(generation_file.read_text(encoding="utf-8")) if generation_file.is_file() else {}
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    ends = [int(end) for end in (sorted(ends) if isinstance(ends, list) else [ends]) if end is not None]
    if not ends:
        raise ExportError(f"{model_dir}: neither generation_config.json nor config.json has an eos_token_id.")
    # Within one prefill MLC's cache has no windows, so that none may be longer than one.
    chunk = min(PREFILL_CHUNK, architecture.context_length, architecture.window or PREFILL_CHUNK)
    files = [
        file
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        if (model_dir / file).is_file()
    ]
    if "tokenizer.json" not in files:
        raise ExportError(f"{model_dir}: holds no tokenizer.json, which MLC needs.")
    template = conversation_template(tokenizer, ends)
    _prove_token_ids(template, tokenizer, model_dir / "tokenizer.json")
    return {
        "version": "0.1.0",
        "model_type": config["model_type"],
        "quantization": quantization,
        "model_config": _model_config(config["model_type"], architecture, chunk),
        "vocab_size": architecture.vocabulary_size,
        "context_window_size": architecture.context_length,
        "sliding_window_size": -1,
        "prefill_chunk_size": chunk,
        "attention_sink_size": -1,
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "active_vocab_size": len(tokenizer),
        "temperature": generation.get("temperature", 1.0),
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": generation.get("repetition_penalty", 1.0),
        "top_p": generation.get("top_p", 1.0),
        "tokenizer_files": files,
        "tokenizer_info": tokenizer_info(model_dir / "tokenizer.json"),
        "conv_template": template,
        "pad_token_id": _first(config.get("pad_token_id"), generation.get("pad_token_id"), 0),
        "bos_token_id": _first(config.get("bos_token_id"), tokenizer.bos_token_id, 0),
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "model_task": "chat",
        "embedding_metadata": None,
    }


def _model_config(model_type: str, architecture: Any, chunk: int) -> dict[str, Any]:
    """``model_config``: what ``mlc_llm`` makes of a family's configuration."""
    shape = {
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.intermediate_size,
        "num_attention_heads": architecture.heads,
        "num_hidden_layers": architecture.layers,
        "rms_norm_eps": architecture.norm_epsilon,
        "position_embedding_base": architecture.rope_theta,
        "context_window_size": architecture.context_length,
        "prefill_chunk_size": chunk,
        "num_key_value_heads": architecture.key_value_heads,
        "head_dim": architecture.head_dim,
    }
    common = {
        "vocab_size": architecture.vocabulary_size,
        "tensor_parallel_shards": 1,
        "max_batch_size": 128,
    }
    if model_type == "gemma3_text":
        return {
            "text_config": {
                **shape,
                "attention_bias": False,
                "hidden_activation": "gelu_pytorch_tanh",
                "rope_scaling": 0,
                "query_pre_attn_scalar": round(architecture.attention_scale**-2),
                "sliding_window_size": architecture.window or -1,
            },
            **common,
            "context_window_size": architecture.context_length,
            "sliding_window_size": architecture.window or -1,
            "prefill_chunk_size": chunk,
            "is_text_model": True,
        }
    settings = {
        **shape,
        **common,
        "tie_word_embeddings": architecture.tied,
        "rope_scaling": None,
        "pipeline_parallel_stages": 1,
        "disaggregation": False,
    }
    if model_type == "llama":
        return settings
    settings |= {"hidden_act": "silu", "rope_theta": architecture.rope_theta}
    return settings if model_type == "qwen2" else {**settings, "attention_bias": False}


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def tokenizer_info(file: Path) -> dict[str, Any]:
    """``tokenizer_info`` as MLC detects it from ``tokenizer.json``.

    Args:
        file: the tokenizer.json.

    Returns:
        ``token_postproc_method`` ("byte_level", or "byte_fallback", which is also MLC's answer where neither
        decoder is found), ``prepend_space_in_encode`` and ``strip_space_in_decode``.
    """
    content = json.loads(file.read_text(encoding="utf-8"))

    def steps(kind: str) -> list[dict[str, Any]]:
        step = content.get(kind) or {}
        return step.get(f"{kind}s", []) if step.get("type") == "Sequence" else [step]

    decoders = steps("decoder")
    methods = {"ByteLevel": "byte_level", "ByteFallback": "byte_fallback"}
    found = [methods[step["type"]] for step in decoders if step.get("type") in methods]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "token_postproc_method": found[-1] if found else "byte_fallback",
        "prepend_space_in_encode": {"type": "Prepend", "prepend": "▁"} in steps("normalizer"),
        "strip_space_in_decode": strip in decoders,
    }


def conversation_template(tokenizer: Any, end_of_turn_ids: Sequence[int]) -> dict[str, Any]:
    """MLC's ``conv_template`` for a model's own chat template.

    The template is probed with marked messages, and what stands between the marks becomes MLC's headers and
    separators. The result is then proven: it must render a set of conversations to the same text.

    MLC always writes the system part, with the template's default message where the conversation has none. A
    template that marks a system message but writes nothing without one can therefore not be said.

    Args:
        tokenizer: a `transformers` tokenizer with a chat template.
        end_of_turn_ids: tokens that end a turn.

    Raises:
        ExportError: the template cannot be said in MLC's terms.
    """
    if not tokenizer.chat_template:
        raise ExportError("The tokenizer has no chat template, so the model cannot chat in MLC.")

    def render(messages: list[tuple[str, str]], prompt: bool = False) -> str:
        turns = [{"role": role, "content": content} for role, content in messages]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)

    s, u, a, v = "zsystemz", "zfirstz", "zanswerz", "zsecondz"
    try:
        user_separator = render([("user", u)]).split(u)[1]
        assistant_prompt = render([("user", u)], True).split(u)[1].removeprefix(user_separator)
        talk = render([("user", u), ("assistant", a), ("user", v)])
        assistant_header = talk.split(u)[1].split(a)[0].removeprefix(user_separator)
        assistant_separator = render([("user", u), ("assistant", a)]).split(a)[1]
        user_header = talk.split(a)[1].split(v)[0].removeprefix(assistant_separator)
        prefix = render([("user", u)]).split(u)[0].removesuffix(user_header)
    except Exception as error:  # templates raise what they like; a lost mark is an IndexError
        raise ExportError(
            f"The chat template cannot be said in MLC's conv_template: it refuses or loses plain turns "
            f"({error})."
        ) from None
    system_template, system_message, system_allowed = _system_part(render, s, u, user_header, prefix)
    content_separator = "\n" if user_header.endswith("\n") and assistant_header.endswith("\n") else ""
    assistant_role = assistant_header.removesuffix(content_separator)
    if not assistant_prompt.startswith(assistant_role):
        raise ExportError(
            "The chat template cannot be said in MLC's conv_template: it opens an answer with "
            f"{assistant_prompt!r} but writes answers after {assistant_header!r}."
        )
    one = user_separator == assistant_separator
    template = {
        "name": "custom",
        "system_template": system_template,
        "system_message": system_message,
        "system_prefix_token_ids": None,
        "add_role_after_system_message": True,
        "roles": {"user": user_header.removesuffix(content_separator), "assistant": assistant_role},
        "role_templates": {
            "user": "{user_message}",
            "assistant": "{assistant_message}",
            "tool": "{tool_message}",
        },
        "messages": [],
        "seps": [user_separator] if one else [user_separator, assistant_separator],
        "role_content_sep": content_separator,
        "role_empty_sep": assistant_prompt.removeprefix(assistant_role),
        "stop_str": [tokenizer.convert_ids_to_tokens(end) for end in end_of_turn_ids],
        "stop_token_ids": list(end_of_turn_ids),
        "strip_reasoning_in_history": False,
        "function_string": "",
        "use_function_calling": False,
    }
    for messages, prompt in _proving_conversations(system_allowed):
        expected = render([(message["role"], message["content"]) for message in messages], prompt)
        found = render_conversation(template, messages, prompt)
        if found != expected:
            raise ExportError(
                "The chat template cannot be said in MLC's conv_template: of the conversation "
                f"{json.dumps(messages, ensure_ascii=False)} it makes {expected!r}, MLC would make {found!r}."
            )
    return template


def _system_part(
    render: Callable[[list[tuple[str, str]]], str], s: str, u: str, user_header: str, prefix: str
) -> tuple[str, str, bool]:
    """MLC's system_template and system_message, and whether conversations may have a system message.

    Args:
        render: the model's template.
        s, u: marks for the system's and the user's message.
        user_header: what stands before a user's message.
        prefix: what the template writes before the first user turn without a system message.
    """
    try:
        parts = render([("system", s), ("user", u)]).split(u)[0].removesuffix(user_header).split(s)
    except Exception:  # a template may refuse system messages in its own way
        return f"{prefix}{{system_message}}", "", False
    if len(parts) != 2:
        raise ExportError(
            "The chat template cannot be said in MLC's conv_template: it does not write a system message "
            "exactly once, before the first turn."
        )
    before, after = parts
    if len(prefix) < len(before + after) or not (prefix.startswith(before) and prefix.endswith(after)):
        raise ExportError(
            "The chat template cannot be said in MLC's conv_template: MLC writes a system part into every "
            f"conversation, but without a system message the template starts with {prefix!r} instead of "
            f"{before!r}, a message and {after!r}; give the chat template a default system message."
        )
    return f"{before}{{system_message}}{after}", prefix[len(before) : len(prefix) - len(after)], True


def _proving_conversations(system_allowed: bool) -> Iterator[tuple[list[dict[str, str]], bool]]:
    """Conversations of one and three turns, with and without system message and generation prompt."""
    for content, other in zip(PROBES, (*PROBES[1:], PROBES[0]), strict=True):
        for turns in ([content], [content, other, content]):
            roles = ("user", "assistant", "user")
            messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
            for prompt in (False, True):
                yield messages, prompt
                if system_allowed:
                    yield [{"role": "system", "content": other}, *messages], prompt


def _prove_token_ids(template: dict[str, Any], tokenizer: Any, file: Path) -> None:
    """MLC reads tokenizer.json itself; on the proving conversations it must give the model's token ids."""
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(file))
    for messages, prompt in _proving_conversations(system_allowed=True):
        text = render_conversation(template, messages, prompt)
        if (
            own.encode(text, add_special_tokens=False).ids
            != tokenizer(text, add_special_tokens=False).input_ids
        ):
            raise ExportError(
                f"{file}: gives other token ids than the model's tokenizer in transformers, for {text!r}."
            )


def render_conversation(template: dict[str, Any], messages: Sequence[dict[str, Any]], prompt: bool) -> str:
    """Text of a conversation as MLC's engine makes it of ``conv_template``.

    Args:
        template: ``conv_template`` of a mlc-chat-config.json.
        messages: the conversation; a system message may only come first.
        prompt: whether to end with the header of the assistant's next answer.

    Raises:
        ExportError: a message has a role that the template has not.
    """
    system_message = template["system_message"]
    turns = list(messages)
    if turns and turns[0]["role"] == "system":
        system_message = turns.pop(0)["content"]
    # The engine writes the system part even where the message is empty.
    text = template["system_template"].replace("{system_message}", system_message)
    separators = template["seps"]
    for turn in turns:
        role = turn["role"]
        if role not in template["roles"]:
            raise ExportError(f"MLC's conv_template has no role {role!r} after the first message.")
        content = template["role_templates"][role].replace(f"{{{role}_message}}", turn["content"])
        separator = separators[-1] if role == "assistant" else separators[0]
        text += template["roles"][role] + template["role_content_sep"] + content + separator
    if prompt:
        text += template["roles"]["assistant"] + template["role_empty_sep"]
    return text
