"""Checks of model files that came from elsewhere, before any library opens them.

Code and pickles of a model folder are never run (safetensors only, no ``trust_remote_code``). What is left to
guard against is data that lies: lengths, counts and offsets beyond the file, sizes beyond memory, nesting
beyond the stack, names that lead out of the folder, templates that never end.
"""

import json
import math
import re
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from export.errors import ExportError
from export.quantizations import stored_dtype

LARGEST_CONFIG = 4 * 2**20
LARGEST_TOKENIZER = 256 * 2**20
"""Bytes; the largest vocabularies of 2026 take about 40 million."""
DEEPEST_JSON = 64
LARGEST_COUNT = 2**20
"""Of a GGUF file's tensors and metadata: far beyond any model, far below what exhausts memory."""
STRING = 8
GGUF_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of each type of metadata value; besides there are strings, and arrays (9)."""
CHAT_TEMPLATE = b"tokenizer.chat_template"
"""Metadata of a GGUF file that hold a template begin so."""
DTYPE_BITS = re.compile(r"(?:u?int|b?float)(8|16|32|64)")
ONNX_BITS = {
    **dict.fromkeys(("FLOAT", "INT32", "UINT32"), 32),
    **dict.fromkeys(("DOUBLE", "INT64", "UINT64", "COMPLEX64"), 64),
    **dict.fromkeys(("FLOAT16", "BFLOAT16", "INT16", "UINT16"), 16),
    **dict.fromkeys(("UINT8", "INT8", "BOOL"), 8),
    **dict.fromkeys(("UINT4", "INT4"), 4),
}
"""Bits of an element by the type's name in ONNX: those that exports use, and their neighbours."""
LARGEST_ONNX = 2**31
"""Bytes of a protocol buffer; larger weights lie in a file beside it."""
LARGEST_CACHE = 2**20
"""Numbers of a token in one layer's cache: of heads and their width, far beyond any model."""
TEMPLATE_SECONDS = 5
TEMPLATE_CHARACTERS = 1_000_000


def check_model_folder(folder: Path) -> None:
    """Checks a Hugging Face folder.

    Raises:
        ExportError: a link or a name in it leads out of it; config or tokenizer is no JSON, too large or
            nested too deeply; a safetensors file's header or MLC's tensor cache does not fit the files; the
            configuration asks for more memory than the weights explain; or ``check_chat_template`` refuses a
            chat template.
    """
    folder = Path(folder)
    # The hub's cache keeps files beside the snapshots that link to them.
    allowed = (folder.resolve(), (folder.parent.parent / "blobs").resolve())
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            target = path.resolve()
            if not target.exists() or not any(target.is_relative_to(place) for place in allowed):
                raise ExportError(f"{path}: links to nothing inside the model's folder; copy the file there.")
    for path in sorted(folder.glob("*.json")):
        limit = LARGEST_TOKENIZER if path.name in ("tokenizer.json", "vocab.json") else LARGEST_CONFIG
        value = read_json(path, max(limit, LARGEST_TOKENIZER if path.name.endswith("index.json") else 0))
        if path.name.endswith(".safetensors.index.json"):
            _check_index(path, value)
    sizes = 0
    for path in sorted(folder.glob("*.safetensors")):
        sizes += path.stat().st_size
        try:
            # The library checks header length, types, shapes and that offsets cover the file exactly.
            with safe_open(path, "numpy") as file:
                file.keys()
        except (SafetensorError, OSError, ValueError) as error:
            raise ExportError(f"{path}: is no whole safetensors file ({_line(error)}).") from None
    config = folder / "config.json"
    if sizes and config.is_file():
        _check_sizes(config, read_json(config, LARGEST_CONFIG), sizes)
    for path in (folder / "tensor-cache.json", folder / "ndarray-cache.json"):
        if path.is_file():
            check_tensor_cache(path)
    for where, template in _chat_templates(folder):
        check_chat_template(template, where)


def check_gguf(path: Path) -> None:
    """Checks a GGUF file's header and the chat templates in it.

    Raises:
        ExportError: as ``check_gguf_header`` and ``check_chat_template``.
    """
    for template in check_gguf_header(path):
        check_chat_template(template, str(path))


def check_gguf_header(path: Path) -> list[str]:
    """Checks a GGUF file's header against its size: magic, version, counts, lengths, nesting, offsets.

    Returns:
        The chat templates that it holds.

    Raises:
        ExportError: it does not fit; the sentence says which part.
    """
    size = path.stat().st_size
    templates = []
    with path.open("rb") as file:
        reader = _GgufHeader(file, size, path)
        if file.read(4) != b"GGUF":
            raise ExportError(f"{path}: is no GGUF file (it does not begin with GGUF).")
        version = reader.number("<I")
        if version not in (2, 3):
            raise ExportError(f"{path}: GGUF version {version} is not known; 2 and 3 are.")
        tensors, pairs = reader.number("<Q"), reader.number("<Q")
        for what, count in (("tensors", tensors), ("metadata", pairs)):
            if count > LARGEST_COUNT:
                raise ExportError(f"{path}: says that it holds {count} {what}, which no model does.")
        for _ in range(pairs):
            name, kind = reader.string(), reader.number("<I")
            if kind == STRING and name.startswith(CHAT_TEMPLATE):
                templates.append(reader.string().decode("utf-8", "replace"))
            else:
                reader.skip_value(kind, 0)
        for _ in range(tensors):
            reader.skip_string()
            dimensions = reader.number("<I")
            if dimensions > 4:
                raise ExportError(f"{path}: a tensor has {dimensions} dimensions; at most 4 are possible.")
            elements = 1
            for _ in range(dimensions):
                elements *= reader.number("<Q")
            reader.number("<I")
            offset = reader.number("<Q")
            # No type takes less than a bit an element.
            if offset > size or elements // 8 > size:
                raise ExportError(f"{path}: a tensor lies outside the file; it is truncated or damaged.")
    return templates


def check_tensor_cache(path: Path) -> None:
    """Checks the index of MLC's weights against the files beside it, which TVM takes its word for.

    Args:
        path: ``tensor-cache.json``, or ``ndarray-cache.json`` of older versions.

    Raises:
        ExportError: it is no such index, names a file outside its folder, or a tensor's shape, type, size and
            place do not fit together or go beyond the file.
    """
    value = read_json(path, LARGEST_CONFIG)
    try:
        for shard in value["records"]:
            name = shard["dataPath"]
            if Path(name).name != name or not (path.parent / name).is_file():
                raise ExportError(f"{path}: names {name!r:.80}, which is no file of this folder.")
            size = (path.parent / name).stat().st_size
            for record in shard["records"]:
                element = _element_bytes(stored_dtype(record))
                shape, start, count = record["shape"], record["byteOffset"], record["nbytes"]
                numbers = [*shape, start, count]
                sound = all(isinstance(number, int) and 0 <= number < 2**62 for number in numbers)
                if not sound or math.prod(shape) * (element or 0) != count or start + count > size:
                    raise ExportError(
                        f"{path}: the tensor {str(record['name'])!r:.80} does not fit its shape or {name}; "
                        "the folder is damaged."
                    )
    except (KeyError, TypeError, AttributeError, OSError) as error:
        raise ExportError(f"{path}: is no index of MLC's weights ({_line(error)}).") from None


def check_onnx(path: Path) -> None:
    """Checks the graph of an ONNX file, and against the files beside it what lies outside of it.

    Raises:
        ExportError: it is no ONNX file; a tensor's shape, type, size and place do not fit together or go
            beyond the file, or lie in a file outside its folder; a tensor is sparse; or an input is larger
            than any model's.
    """
    # Here, because it loads more than those who check another format should wait for.
    import onnx
    from google.protobuf.message import DecodeError

    if path.stat().st_size >= LARGEST_ONNX:
        raise ExportError(f"{path}: has {path.stat().st_size} bytes, more than a protocol buffer can have.")
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except (DecodeError, ValueError, RecursionError) as error:
        raise ExportError(f"{path}: is no ONNX file ({_line(error)}).") from None
    if not model.graph.node:
        raise ExportError(f"{path}: is no ONNX file (its graph computes nothing).")
    # Protocol buffers allow a hundred messages in each other, so some thirty graphs.
    level = [model.graph]
    while level:
        tensors = [tensor for graph in level for tensor in graph.initializer]
        nodes = [node for graph in level for node in graph.node]
        if level[0] is model.graph:
            nodes += [node for function in model.functions for node in function.node]
        attributes = [attribute for node in nodes for attribute in node.attribute]
        sparse = any(each.sparse_tensors or each.HasField("sparse_tensor") for each in attributes)
        if sparse or any(graph.sparse_initializer for graph in level):
            raise ExportError(f"{path}: holds sparse tensors, which no export writes.")
        tensors += [tensor for each in attributes for tensor in (each.t, *each.tensors) if tensor.dims]
        for tensor in tensors:
            _check_onnx_tensor(path, tensor)
        level = [graph for each in attributes for graph in (each.g, *each.graphs) if graph.node]
    for value in model.graph.input:
        sizes = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        if any(size < 0 for size in sizes) or math.prod(filter(None, sizes)) > LARGEST_CACHE:
            raise ExportError(f"{path}: the input {value.name[:80]!r} is larger than any model's.")


def _check_onnx_tensor(path: Path, tensor: Any) -> None:
    """A tensor of a graph: its elements are there, in the file or beside it."""
    import onnx

    known = {number: name for name, number in onnx.TensorProto.DataType.items()}
    bits = ONNX_BITS.get(known.get(tensor.data_type, ""))
    count = math.prod(tensor.dims) if all(0 <= size < 2**62 for size in tensor.dims) else -1
    misfit = ExportError(
        f"{path}: the tensor {tensor.name[:80]!r} does not fit its shape or type; the file is damaged."
    )
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        stated = {entry.key: entry.value for entry in tensor.external_data}
        # Text that is no UTF-8 comes as bytes.
        name = str(stated.get("location", ""))
        if Path(name).name != name or not name.isprintable() or not (path.parent / name).is_file():
            raise ExportError(f"{path}: names {name!r:.80}, which is no file of this folder.")
        try:
            start, length = int(stated.get("offset", 0)), int(stated.get("length", -1))
        except ValueError:
            raise misfit from None
        size = (path.parent / name).stat().st_size
        length = size - start if length == -1 else length
        if bits is None or -(-count * bits // 8) != length or not 0 <= start <= size - length:
            raise misfit
    elif tensor.HasField("raw_data"):
        if bits is None or -(-count * bits // 8) != len(tensor.raw_data):
            raise misfit
    elif count < 0 or count > path.stat().st_size * 2:
        # One element of the lists that hold the others takes half a byte or more.
        raise misfit


def check_chat_template(template: str, where: str) -> None:
    """Renders a chat template in a process of its own, in Jinja's sandbox and with limits.

    transformers renders templates in a sandbox, too, but lets them run and write for ever. A template that
    behaves here and not there is still possible; it can waste time, no more.

    Args:
        template: the template.
        where: file or key, for the sentence.

    Raises:
        ExportError: it is no template, tries what the sandbox forbids, or goes beyond
            ``TEMPLATE_SECONDS`` of CPU, ``TEMPLATE_CHARACTERS`` of output or half a gigabyte of memory.
    """
    limits = [str(TEMPLATE_SECONDS), str(TEMPLATE_CHARACTERS)]
    script = Path(__file__).with_name("template_check_process.py")
    try:
        finished = subprocess.run(
            [sys.executable, "-I", str(script), *limits],
            input=template.encode("utf-8", "replace"),
            capture_output=True,
            env={"PYTHONUTF8": "1"},
            timeout=12 * TEMPLATE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise ExportError(f"{where}: the chat template does not end; choose another model.") from None
    if finished.returncode == 0:
        return
    said = finished.stderr.decode("utf-8", "replace").strip().splitlines()
    if finished.returncode < 0 or not said:
        reason = f"it does not end within {TEMPLATE_SECONDS} s"
    else:
        reason = said[-1].rstrip(".")
    raise ExportError(f"{where}: the chat template is refused ({reason}); choose another model.")


def read_json(path: Path, largest: int) -> Any:
    """The value of a JSON file of at most ``largest`` bytes and ``DEEPEST_JSON`` levels.

    Raises:
        ExportError: it is larger, deeper or no JSON.
    """
    if path.stat().st_size > largest:
        raise ExportError(f"{path}: has {path.stat().st_size} bytes; more than {largest} are not read.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path}: is no readable JSON ({_line(error)}).") from None
    level: list[Any] = [value]
    for _ in range(DEEPEST_JSON):
        containers = [item for item in level if isinstance(item, (dict, list))]
        level = [
            inner for item in containers for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return value
    if any(isinstance(item, (dict, list)) for item in level):
        raise ExportError(f"{path}: is nested more than {DEEPEST_JSON} levels deep.")
    return value


def _chat_templates(folder: Path) -> Iterator[tuple[str, str]]:
    """Where each chat template of a folder stands, and the template: all places that transformers reads."""
    for path in [folder / "chat_template.jinja", *sorted(folder.glob("additional_chat_templates/*.jinja"))]:
        if path.is_file():
            if path.stat().st_size > LARGEST_CONFIG:
                raise ExportError(f"{path}: more than {LARGEST_CONFIG} bytes are not read.")
            yield str(path), path.read_text(encoding="utf-8", errors="replace")
    for path in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        value = read_json(path, LARGEST_CONFIG) if path.is_file() else None
        found = value.get("chat_template") if isinstance(value, dict) else None
        for each in found if isinstance(found, list) else [found]:
            template = each.get("template") if isinstance(each, dict) else each
            if isinstance(template, str):
                yield str(path), template


def _element_bytes(dtype: str) -> int | None:
    found = DTYPE_BITS.fullmatch(dtype)
    return int(found[1]) // 8 if found else None


def _check_index(path: Path, value: Any) -> None:
    names = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(names, dict):
        raise ExportError(f"{path}: has no weight_map; save the model anew.")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ExportError(f"{path}: names {name!r:.80}, which is no .safetensors file of this folder.")
        if not (path.parent / name).is_file():
            raise ExportError(f"{path}: names {name}, which is missing.")


def _check_sizes(path: Path, config: Any, weight_bytes: int) -> None:
    """Layers are allocated as the configuration says before weights are read."""
    if not isinstance(config, dict):
        raise ExportError(f"{path}: is no mapping of settings.")
    inner_config = config.get("text_config")
    text: Mapping[str, Any] = inner_config if isinstance(inner_config, dict) else config
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"):
        number = text.get(key)
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
            raise ExportError(f"{path}: {key} is {number!r:.80}; it must be a positive integer.")
    rows, width = text.get("vocab_size") or 1, text.get("hidden_size") or 1
    layers, inner = text.get("num_hidden_layers") or 1, text.get("intermediate_size") or 1
    # Every weight takes at least half a byte, and every layer has a matrix of these two widths.
    if rows * width // 2 > weight_bytes or layers * inner // 2 > weight_bytes:
        raise ExportError(
            f"{path}: describes a far larger model than the {weight_bytes} bytes of weights beside it."
        )


class _GgufHeader:
    """Reads the parts of a GGUF header, none beyond the end of the file."""

    def __init__(self, file: BinaryIO, size: int, path: Path):
        self.file, self.size, self.path = file, size, path

    def number(self, kind: str) -> int:
        data = self.file.read(struct.calcsize(kind))
        if len(data) < struct.calcsize(kind):
            raise self._truncated()
        return int(struct.unpack(kind, data)[0])

    def string(self) -> bytes:
        length = self.number("<Q")
        if length > min(self.size - self.file.tell(), LARGEST_CONFIG):
            raise self._truncated()
        return self.file.read(length)

    def skip_string(self) -> None:
        self._skip(self.number("<Q"))

    def skip_value(self, kind: int, depth: int) -> None:
        if kind == STRING:
            self.skip_string()
        elif kind in GGUF_SCALARS:
            self._skip(GGUF_SCALARS[kind])
        elif kind == 9 and depth < 2:
            inner, count = self.number("<I"), self.number("<Q")
            if inner in GGUF_SCALARS:
                self._skip(GGUF_SCALARS[inner] * count)
                return
            if count > self.size // 8:
                raise self._truncated()
            for _ in range(count):
                self.skip_value(inner, depth + 1)
        else:
            raise ExportError(f"{self.path}: a metadata value has an unknown type or is nested too deeply.")

    def _skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise self._truncated()
        self.file.seek(count, 1)

    def _truncated(self) -> ExportError:
        return ExportError(f"{self.path}: its header goes beyond its end; it is truncated or damaged.")


def _line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")
