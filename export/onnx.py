"""ONNX: a Hugging Face folder in, one folder out that ONNX Runtime GenAI and transformers.js both load.

The graphs (GroupQueryAttention with a key-value cache) come from the model builder of onnxruntime-genai,
run as its own process, once per precision. This module gives them the file names that transformers.js asks
for, writes fixed numbers where the builder leaves symbols, and completes the configuration files.

Layout::

    config.json, generation_config.json, tokenizer.json, tokenizer_config.json (chat template inside)
    genai_config.json            names the smallest of the graphs, which ONNX Runtime GenAI then runs
    onnx/model.onnx              fp32
    onnx/model_fp16.onnx         fp16: half the bytes, computes in float32 (transformers.js: dtype "fp16")
    onnx/model_quantized.onnx    int8 (transformers.js: dtype "q8")
    onnx/model_q4.onnx           int4 (transformers.js: dtype "q4")
"""

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from export.errors import ExportError
from export.generation import NEUTRAL, stated
from export.gptq import FourBits, join
from export.processes import run_logged
from export.quantizations import ONNX as FILE_NAMES

# k_quant searches scale and zero point of each block for the least weighted error, as llama.cpp's k-quants
# do; "mixed" keeps the head (shared with the embedding, where tied) and some layers' projections in 8 bits.
# Measured on SmolLM2-135M-Instruct from its Q4_1 file, with noise added to the weights so that their grid
# does not flatter 4 bits (512 tokens, mean KL from float32): int4 in blocks of 32, 0.315 at 114 MB; of 16,
# 0.229 at 133 MB; int8, 0.007 at 267 MB, of which 113 MB are the embedding, which the builder leaves in
# float32 beside an 8-bit head. The builder's is_symmetric changes nothing for k_quant.
# Blocks of 32 because the file is a seventh smaller.
BUILDER_OPTIONS: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "fp16": (),
    "int8": ("block_size=32",),
    "int4": ("algo_config=k_quant_mixed", "block_size=32"),
}

ROUNDED_OPTIONS = ("algo_config=rtn_last", "block_size=32", "is_symmetric=false")
"""Those of int4 whose layers come rounded: a head in 8 bits, and four bits with zero points to write over."""

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies depend on the text's length: the logits gate judges those."""
BUILT_AS = {"fp16": "fp32"}
"""The builder's precision where it is not ours: its own float16 graphs are for GPUs alone."""

HALVED_FROM = 1024
"""Elements of a float32 tensor that is stored in float16, in all but the fp32 graph: embeddings, matrices and
the scales of blocks (a bit per weight of blocks of 32). Norms, which are smaller, stay as they are."""

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What a pre-tokenizer of type ByteLevel splits by."""

# A protocol buffer ends at 2 GiB; larger graphs keep their weights in a second file.
LARGEST_SINGLE_FILE = 1_900_000_000


def export_onnx(
    model_dir: Path,
    output_dir: Path,
    name: str,
    precisions: Sequence[str],
    *,
    rounded: Mapping[str, FourBits] | None = None,
    progress: Callable[[str], None] | None = None,
    threads: int = 2,
    log: Path | None = None,
) -> list[Path]:
    """Writes the ONNX folder of a model.

    Args:
        model_dir: Hugging Face folder with config, safetensors and tokenizer.
        output_dir: the folder to make; it appears only when it is complete. Must not exist or be empty.
        name: the model's name, recorded as ``_name_or_path`` of ``config.json``.
        precisions: any of ``fp32``, ``fp16``, ``int8``, ``int4``, in any order.
        rounded: the layers of int4, of ``export.gptq.round_linear_layers``; the builder rounds them by
            k-quant if left out.
        progress: told one sentence at each step.
        threads: CPU threads of the builder.
        log: file that keeps what the builder writes.

    Returns:
        Paths of the ``.onnx`` files, in the order of ``precisions``.

    Raises:
        ExportError: an unknown precision, no safetensors, an output folder that holds something already, an
            architecture that the builder does not know, a builder that fails, or rounded layers that are not
            those of the graph.
    """
    model_dir, output_dir = Path(model_dir), Path(output_dir)
    _check_arguments(model_dir, output_dir, precisions)
    tell = progress or (lambda sentence: None)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.", dir=output_dir.parent))
    try:
        folder = workplace / "folder"
        (folder / "onnx").mkdir(parents=True)
        config = AutoConfig.from_pretrained(model_dir)
        built = {}
        for precision in dict.fromkeys(precisions):
            tell(f"{name}: building the {precision} ONNX graph")
            built[precision] = workplace / precision
            given = rounded if precision == "int4" else None
            options = BUILDER_OPTIONS[precision] if given is None else ROUNDED_OPTIONS
            _run_builder(model_dir, built[precision], precision, options, threads, log)
            graph = onnx.load(built[precision] / "model.onnx")
            # The builder adds the commit of whatever repository it is installed in.
            graph.producer_version = version("onnxruntime-genai")
            genai_config = json.loads((built[precision] / "genai_config.json").read_text(encoding="utf-8"))
            _check_rope(graph, config, model_dir)
            _fix_cache_dimensions(graph, int(genai_config["model"]["decoder"]["head_size"]))
            if given is not None:
                _write_rounded(graph, given, model_dir)
            _look_up_by_plain_operators(graph)
            if precision != "fp32":
                _store_as_half(graph)
            _save_graph(graph, folder / "onnx" / FILE_NAMES[precision])
            (built[precision] / "model.onnx.data").unlink(missing_ok=True)  # free the disk early
        default = [precision for precision in FILE_NAMES if precision in built][-1]
        _write_tokenizer(model_dir, folder)
        _write_configs(model_dir, folder, name, built[default] / "genai_config.json", FILE_NAMES[default])
        if output_dir.exists():
            output_dir.rmdir()
        folder.rename(output_dir)
    except OSError as error:
        raise ExportError(f"{output_dir}: the ONNX folder cannot be written ({error}).") from error
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    return [output_dir / "onnx" / FILE_NAMES[precision] for precision in dict.fromkeys(precisions)]


def export_tokenizer(model_dir: Path, folder: Path) -> None:
    """Writes the part of an ONNX folder that turns conversations into token ids, for ONNX Runtime GenAI to
    read before any weights exist.

    Args:
        model_dir: Hugging Face folder with config and tokenizer.
        folder: an empty folder.

    Raises:
        ExportError: the builder does not know the architecture.
    """
    _check_architecture(model_dir)
    _write_tokenizer(model_dir, folder)
    # As little as it takes for the tokenizer alone.
    _write_json(folder / "genai_config.json", {"model": {"type": "llama", "context_length": 1}, "search": {}})


def _check_architecture(model_dir: Path) -> None:
    """The builder is a long chain of comparisons with names of architectures, and nothing else lists them."""
    names = json.loads((model_dir / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    spec = importlib.util.find_spec("onnxruntime_genai")
    assert spec is not None
    assert spec.origin is not None
    builder = Path(spec.origin).parent / "models" / "builder.py"
    if f'"{names[0]}"' not in builder.read_text(encoding="utf-8"):
        raise ExportError(
            f"{model_dir / 'config.json'}: the architecture {names[0] or 'is not named and'} is not known to "
            "ONNX Runtime GenAI's builder."
        )


def _check_arguments(model_dir: Path, output_dir: Path, precisions: Sequence[str]) -> None:
    if isinstance(precisions, str) or not precisions:
        raise ExportError(f"ONNX precisions must be a list of {', '.join(FILE_NAMES)}; got {precisions!r}.")
    for precision in precisions:
        if precision not in FILE_NAMES:
            raise ExportError(
                f"'{precision}' is no ONNX precision of ours; choose from {', '.join(FILE_NAMES)}."
            )
    for needed in ("config.json", "tokenizer.json"):
        if not (model_dir / needed).is_file():
            raise ExportError(f"{model_dir}: {needed} is missing; give a Hugging Face folder.")
    if not list(model_dir.glob("*.safetensors")):
        raise ExportError(f"{model_dir}: no .safetensors file; only safetensors are exported.")
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ExportError(f"{output_dir}: exists and is not empty; remove it or choose another folder.")


def _run_builder(
    model_dir: Path, output_dir: Path, precision: str, options: Sequence[str], threads: int, log: Path | None
) -> None:
    # -P keeps this folder off the import path, where this file would pass for the library.
    command = [sys.executable, "-P", str(Path(__file__).with_name("onnx_builder_driver.py"))]
    command += [
        "-i",
        str(model_dir),
        "-o",
        str(output_dir),
        "-p",
        BUILT_AS.get(precision, precision),
        "-e",
        "cpu",
    ]
    command += ["-c", str(output_dir.parent / "cache")]
    command += ["--extra_options", "hf_token=false", *options]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    finished = run_logged(command, log, environment)
    if finished.returncode == 0 and (output_dir / "model.onnx").is_file():
        return
    error = ExportError(
        f"{model_dir}: ONNX Runtime GenAI's builder cannot export it to {precision} ({finished.reason()})."
    )
    error.add_note(finished.shown())
    raise error


def _check_rope(graph: onnx.ModelProto, config: PretrainedConfig, model_dir: Path) -> None:
    """Compares the graph's cosine tables with the frequencies that transformers computes.

    A builder that reads ``rope_theta`` only from the top level of the configuration, where transformers 5 no
    longer writes it, takes 10000 in silence; and ONNX Runtime GenAI's passes linear and YaRN scaling over for
    some architectures.
    """
    config = config.get_text_config()
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    of_layers = {"cos_cache_global": "full_attention", "cos_cache_local": "sliding_attention"}
    for tensor in graph.graph.initializer:
        if not tensor.name.startswith("cos_cache"):
            continue
        layers = of_layers.get(tensor.name)
        layers = layers if layers in rope else None
        said = rope if layers is None else rope[layers]
        kind = said.get("rope_type", "default")
        if "rope_theta" not in said or kind in LENGTH_DEPENDENT:
            continue
        table = onnx.numpy_helper.to_array(tensor).astype(np.float64)
        width = table.shape[1]  # half of the rotated dimensions
        frequencies, scale = said["rope_theta"] ** (-np.arange(width) / width), 1.0
        if kind in ROPE_INIT_FUNCTIONS:
            computed, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), layer_type=layers)
            frequencies = computed.double().numpy()
        # Each frequency where it has turned by about one: there another one is told best.
        rows = np.clip(np.round(1 / frequencies), 1, len(table) - 1).astype(int)
        expected = scale * np.cos(rows * frequencies)
        if len(frequencies) != width or np.abs(table[rows, np.arange(width)] - expected).max() > 1e-3:
            raise ExportError(
                f"{model_dir}: the exported graph does not rotate as config.json says (rope_type {kind}, "
                f"rope_theta {said['rope_theta']}); ONNX Runtime GenAI's builder does not do that for such a "
                "model, so leave the ONNX formats out."
            )


def _fix_cache_dimensions(graph: onnx.ModelProto, head_size: int) -> None:
    """transformers.js allocates the empty cache from the graph's inputs and needs numbers there."""
    for value in [*graph.graph.input, *graph.graph.output, *graph.graph.value_info]:
        if value.name.startswith(("past_key_values.", "present.")):
            dimension = value.type.tensor_type.shape.dim[3]
            dimension.Clear()
            dimension.dim_value = head_size


def _look_up_by_plain_operators(graph: onnx.ModelProto) -> None:
    """Says GatherBlockQuantized, the look-up in a head of 8 bits that is the embedding, too, by operators of
    ONNX itself, with the same result: but for the smallest, ONNX Runtime's builds for browsers lack it.

    Of codes [V, blocks, 32], zero points and scales [V, blocks] the tokens' rows are taken;
    (code - zero point) * scale is the embedding.
    """
    nodes = list(graph.graph.node)
    look_up = next((node for node in nodes if node.op_type == "GatherBlockQuantized"), None)
    if look_up is None:
        return
    flat, ids, scales, zero_points = look_up.input
    reshape = next(node for node in nodes if flat in node.output)
    codes = reshape.input[0]
    _, blocks, size = next(tensor.dims for tensor in graph.graph.initializer if tensor.name == codes)
    prefix, written = look_up.name.removesuffix(look_up.op_type), []

    def add(operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        node = onnx.helper.make_node(operator, inputs, [prefix + name], prefix + name, **attributes)
        written.append(node)
        return prefix + name

    axis, shape = f"{prefix}last_axis", f"{prefix}shape"
    for name, values in ((axis, [-1]), (shape, [0, 0, blocks * size])):
        graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array(values), name))
    code = add("Cast", [add("Gather", [codes, ids], "codes", axis=0)], "code", to=onnx.TensorProto.FLOAT)
    zero = add("Unsqueeze", [add("Gather", [zero_points, ids], "zero_points", axis=0), axis], "zero_bytes")
    zero = add("Cast", [zero], "zero_point", to=onnx.TensorProto.FLOAT)
    scale = add("Unsqueeze", [add("Gather", [scales, ids], "scales", axis=0), axis], "scale")
    value = add("Mul", [add("Sub", [code, zero], "difference"), scale], "value")
    written.append(onnx.helper.make_node("Reshape", [value, shape], list(look_up.output), f"{prefix}rows"))
    place = nodes.index(look_up)
    kept = [node for node in [*nodes[:place], *written, *nodes[place + 1 :]] if node != reshape]
    del graph.graph.node[:]
    graph.graph.node.extend(kept)


def _write_rounded(graph: onnx.ModelProto, rounded: Mapping[str, FourBits], model_dir: Path) -> None:
    """Replaces what the four-bit nodes of a graph hold."""
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    missing = set(rounded)
    for node in graph.graph.node:
        bits = {attribute.name: attribute.i for attribute in node.attribute}.get("bits")
        if node.op_type != "MatMulNBits" or bits != 4:
            continue
        names = _layers_of_node(node.name)
        if not rounded.keys() >= set(names):
            raise ExportError(
                f"{model_dir}: the layer {node.name} of the ONNX graph was not rounded by GPTQ."
            )
        missing -= set(names)
        matrix = join([rounded[name] for name in names])
        for tensor_name, values in zip(node.input[1:4], matrix, strict=True):
            tensor = tensors[tensor_name]
            own_type = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            if values.size != np.prod(tensor.dims):
                raise ExportError(
                    f"{model_dir}: {tensor_name} of the ONNX graph has another size than GPTQ's."
                )
            written = values.astype(own_type).reshape(tensor.dims)
            tensor.CopyFrom(onnx.numpy_helper.from_array(written, tensor_name))
    if missing:
        raise ExportError(f"{model_dir}: the ONNX graph has no layer {min(missing)}, which GPTQ rounded.")


def _layers_of_node(name: str) -> list[str]:
    """The layers in transformers of a node such as ``/model/layers.0/attn/qkv_proj/MatMul_Q4``."""
    layer = name.strip("/").removesuffix("/MatMul_Q4").replace("/", ".").replace(".attn.", ".self_attn.")
    return [layer.replace("qkv_proj", f"{part}_proj") for part in "qkv"] if "qkv_proj" in layer else [layer]


def _store_as_half(graph: onnx.ModelProto) -> None:
    """Keeps large float32 tensors in float16, each with a Cast behind it, which a runtime folds away when it
    loads the file: the same arithmetic, in float32, on rounded numbers."""
    casts = []
    for tensor in graph.graph.initializer:
        rotation = tensor.name.startswith(("cos_cache", "sin_cache"))
        if tensor.data_type != onnx.TensorProto.FLOAT or rotation or np.prod(tensor.dims) < HALVED_FROM:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        if np.abs(values).max() > np.finfo(np.float16).max:
            continue
        name, half = tensor.name, f"{tensor.name}_f16"
        tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), half))
        casts.append(onnx.helper.make_node("Cast", [half], [name], f"{name}_cast", to=onnx.TensorProto.FLOAT))
    nodes = list(graph.graph.node)
    del graph.graph.node[:]
    graph.graph.node.extend([*casts, *nodes])


def _save_graph(graph: onnx.ModelProto, path: Path) -> None:
    if graph.ByteSize() < LARGEST_SINGLE_FILE:
        onnx.save_model(graph, path)
        return
    # The name under which transformers.js looks for the weights.
    onnx.save_model(
        graph, path, save_as_external_data=True, location=f"{path.name}_data", size_threshold=1024
    )


def _write_tokenizer(model_dir: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    template = tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    # Not every reader knows the separate file of transformers 5: the template goes where all look.
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    _write_digits_as_splits(content.get("pre_tokenizer"))
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    if template is not None:
        settings["chat_template"] = template
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that all versions know
    for private in ("is_local", "local_files_only"):
        settings.pop(private, None)
    _write_json(path, settings)


def _write_digits_as_splits(pre_tokenizer: dict[str, Any] | None) -> None:
    """ONNX Runtime GenAI reads of a sequence only the steps of type Split, and where there is none it splits
    as GPT-2 does, digits too. Says steps of type Digits, and the splitting of a ByteLevel behind them, as
    equal steps of type Split, in place."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [])
    if not any(step["type"] == "Digits" for step in steps):
        return
    written = []
    for step in steps:
        if step["type"] == "Digits":
            # Digits of Rust's is_numeric, which are Unicode's category N.
            written.append(_split(r"\p{N}" if step["individual_digits"] else r"\p{N}+"))
        elif step["type"] == "ByteLevel" and step.get("use_regex", True) and not step["add_prefix_space"]:
            written += [_split(GPT2_SPLIT), step | {"use_regex": False}]
        else:
            written.append(step)
    steps[:] = written


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _write_configs(model_dir: Path, folder: Path, name: str, genai_path: Path, default_file: str) -> None:
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    config["_name_or_path"] = name
    external = {
        path.name: 1
        for path in (folder / "onnx").glob("*.onnx")
        if path.with_name(path.name + "_data").exists()
    }
    if external:
        config["transformers.js_config"] = {"use_external_data_format": external}
    text_config = AutoConfig.from_pretrained(model_dir).get_text_config()
    rope = getattr(text_config, "rope_parameters", None) or {}
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])  # where readers older than transformers 5 look
    _write_json(folder / "config.json", config)

    if (model_dir / "generation_config.json").is_file():
        generation = json.loads((model_dir / "generation_config.json").read_text(encoding="utf-8"))
    else:
        generation = GenerationConfig.from_model_config(text_config).to_diff_dict()
    _write_json(folder / "generation_config.json", generation)

    genai = json.loads(genai_path.read_text(encoding="utf-8"))
    genai["model"]["decoder"]["filename"] = f"onnx/{default_file}"
    if generation.get("eos_token_id") is not None:
        genai["model"]["eos_token_id"] = generation["eos_token_id"]
    # The builder leaves some of them out.
    said = {key: value for key, value in stated(generation).items() if value is not None}
    genai["search"] |= NEUTRAL | {"max_length": genai["model"]["context_length"]} | said
    _write_json(folder / "genai_config.json", genai)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
