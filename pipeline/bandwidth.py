"""Bytes of weights that a model reads to decode one token, and bytes a second that this machine can read.

The first times the speed over the second is the model bandwidth utilisation: decoding one token at a time
reads every weight once, so that memory, not arithmetic, is its limit.
"""

import json
import threading
import time
from pathlib import Path

import numpy as np

LARGE = 32 << 20
"""Numbers of one array: 128 MiB, far more than any processor's cache."""


def bytes_read_per_token(file: Path) -> int | None:
    """Bytes of the weights that every decoded token reads; the cache of keys and values is not counted.

    An embedding that is not also the head is left out, because one row of it is read.

    Args:
        file: as of ``export.runtime.open_runtime``.

    Returns:
        None for a Hugging Face folder, which torch runs in a type of its own.
    """
    file = Path(file)
    if file.suffix == ".gguf":
        from gguf import GGUFReader

        sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(file).tensors}
        return sum(sizes.values()) - (sizes["token_embd.weight"] if "output.weight" in sizes else 0)
    if file.suffix == ".onnx":
        return _onnx_bytes(file)
    if (file / "tensor-cache.json").is_file():
        shards = json.loads((file / "tensor-cache.json").read_text(encoding="utf-8"))["records"]
        sizes = {record["name"]: int(record["nbytes"]) for shard in shards for record in shard["records"]}
        untied = any("lm_head" in name for name in sizes)
        return sum(size for name, size in sizes.items() if not (untied and "embed_tokens" in name))
    return None


def _onnx_bytes(file: Path) -> int:
    """Bytes of the initializers that some node other than a look-up reads."""
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    looked_up = {name for node in graph.node if node.op_type == "Gather" for name in node.input}
    read = {name for node in graph.node if node.op_type != "Gather" for name in node.input}
    total = 0
    for tensor in graph.initializer:
        if tensor.name in looked_up - read:
            continue
        width = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        total += int(np.prod(tensor.dims)) * width
    return total


def read_bandwidth(threads: int, passes: int = 5) -> float:
    """Bytes a second that so many threads read from memory together: the best of some passes in which each
    takes the dot product of two arrays of its own (a BLAS without threads of its own is assumed).

    Memory: 256 MiB a thread.
    """
    pairs = [(np.ones(LARGE, np.float32), np.ones(LARGE, np.float32)) for _ in range(threads)]
    best = 0.0
    for _ in range(passes):
        workers = [threading.Thread(target=np.dot, args=pair) for pair in pairs]
        started = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, threads * 2 * LARGE * 4 / (time.perf_counter() - started))
    return best
