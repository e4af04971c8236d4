"""What an exported file really holds: the type of each tensor, whatever its quantization is called."""

import json
import re
from collections import Counter
from pathlib import Path

from export.gguf import tensor_type_of_each
from export.quantizations import stored_dtype

LAYER = re.compile(r"\b(?:blk|layers|h)\.\d+\.")
"""The part of a tensor's name that says which layer it is of."""


def tensor_types(path: Path) -> dict[str, int]:
    """How many tensors of a file are stored in each type, the most frequent first.

    Args:
        path: a GGUF file, an ONNX file or an MLC folder.
    """
    return dict(Counter(type_of_each(path).values()).most_common())


def tensor_kinds(path: Path) -> dict[str, dict[str, int]]:
    """Of each kind of tensor (``attn_q``, ``token_embd``, ...), how many are stored in which type.

    Args:
        path: as of ``tensor_types``.
    """
    kinds: dict[str, Counter[str]] = {}
    for name, tensor_type in type_of_each(path).items():
        kind = LAYER.sub("", name.removeprefix("language_model.")).removeprefix("model.")
        kind = kind.removesuffix("_f16").removesuffix(".weight")
        kinds.setdefault(kind, Counter())[tensor_type] += 1
    return {kind: dict(counts.most_common()) for kind, counts in kinds.items()}


def type_of_each(path: Path) -> dict[str, str]:
    """The type of every tensor of weights, by its name in the file. Scales and zero points of quantized
    tensors belong to those.

    Args:
        path: as of ``tensor_types``.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return tensor_type_of_each(path)
    return _of_onnx(path) if path.suffix == ".onnx" else _of_mlc(path)


def _of_mlc(folder: Path) -> dict[str, str]:
    quantization = json.loads((folder / "mlc-chat-config.json").read_text(encoding="utf-8"))["quantization"]
    cache = json.loads((folder / "tensor-cache.json").read_text(encoding="utf-8"))
    types = {}
    for record in (record for shard in cache["records"] for record in shard["records"]):
        name = record["name"]
        if name.endswith(".q_weight"):
            types[name.removesuffix(".q_weight")] = quantization
        elif not name.endswith(".q_scale"):
            types[name] = stored_dtype(record)
    return types


def _of_onnx(path: Path) -> dict[str, str]:
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    stored = {tensor.name for tensor in graph.initializer}
    made_from = {output: node.input[0] for node in graph.node for output in node.output if node.input}

    def source(name: str) -> str:
        """The stored tensor that a value is a cast or another shape of."""
        while name not in stored and name in made_from:
            name = made_from[name]
        return name

    types, others = {}, set()
    for node in graph.node:
        if node.op_type != "MatMulNBits":
            continue
        _, weights, *scales_and_zero_points = node.input
        numbers = {attribute.name: attribute.i for attribute in node.attribute}
        types[source(weights)] = f"int{numbers.get('bits', 4)}, blocks of {numbers['block_size']}"
        others |= {source(name) for name in scales_and_zero_points}
    names = {
        onnx.TensorProto.FLOAT: "float32",
        onnx.TensorProto.FLOAT16: "float16",
        onnx.TensorProto.BFLOAT16: "bfloat16",
    }
    for tensor in graph.initializer:
        computed = tensor.name in ("cos_cache", "sin_cache")
        if tensor.data_type in names and tensor.dims and tensor.name not in others and not computed:
            types[tensor.name] = names[tensor.data_type]
    return types
