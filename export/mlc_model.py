"""The CPU library of an MLC folder: a decoder-only transformer as TensorIR kernels, called from Relax.

Shapes: T tokens of a call, C capacity of the cache, H hidden width, Q and G query and key-value heads, D
width of a head, N and K output and input width of a matrix.

``decode`` is called with one token and uses matrix-vector kernels, which take the nibbles of eight bytes at a
time. ``prefill`` and ``forward`` take any number of tokens and use a blocked kernel that dequantizes a
panel of sixteen rows once and multiplies four tokens at a time. Kernels are cached: reading TVMScript is the
slowest part of building a module, and all layers call the same ones.
"""

import json
import math
import tarfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tvm
from tvm import ir, relax, tirx
from tvm.script import tirx as T

from export.mlc_shapes import shapes_in_order

GROUP = 32
"""Weights that share a scale."""
PANEL = 16
"""Rows of a matrix that the blocked kernel holds dequantized."""
TOKENS = 4
"""Tokens that the blocked kernel multiplies at a time."""
TARGETS: dict[str, dict[str, Any]] = {
    # AVX2 and FMA: every x86-64 of the last ten years, whatever machine compiles.
    "x86_64-cpu": {"kind": "llvm", "mcpu": "x86-64-v3"},
    # NEON is part of every 64-bit ARM.
    "aarch64-cpu": {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]},
}
"""LLVM's targets of the libraries."""


@dataclass(frozen=True)
class Architecture:
    """What the kernels need to know of a model. ``rope_theta`` is the true base of the rotary embedding."""

    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary_size: int
    norm_epsilon: float
    rope_theta: float
    tied: bool
    attention_bias: bool
    attention_name: str  # "qkv_proj" (Llama), "c_attn" (Qwen), "" where queries, keys and values are apart
    head_norms: bool  # each head's queries and keys are normalized before they are rotated (Qwen3, Gemma 3)
    quantized: bool
    weight_dtype: str  # "float32" or "float16": of scales, norms and unquantized matrices
    context_length: int
    attention_scale: float  # of the products of queries and keys
    prefix: str = "model"  # of the tensors' names
    output_norms: bool = False  # what attention and feed-forward layers return is normalized (Gemma 3)
    activation: str = "silu"  # of the gate; or "gelu_tanh"
    embedding_scale: float = 1.0  # of the embeddings that enter the first layer
    window: int = 0  # tokens that layers with a window see, the last one included
    windowed: tuple[bool, ...] = ()  # of each layer; empty where none has a window
    window_rope_theta: float = 0.0  # of layers with a window

    def thetas(self) -> list[float]:
        """Bases of the rotary embedding that layers have, each once."""
        return [self.rope_theta, self.window_rope_theta] if self.windowed else [self.rope_theta]

    def theta_of(self, layer: int) -> float:
        """The layer's base of the rotary embedding."""
        return self.window_rope_theta if self.window_of(layer) else self.rope_theta

    def window_of(self, layer: int) -> int:
        """Tokens that the layer sees, the last one included; 0 where it sees all."""
        return self.window if self.windowed and self.windowed[layer] else 0

    def attention_parts(self) -> list[tuple[str, int]]:
        """Names below ``self_attn`` of the matrices that make queries, keys and values, and their rows."""
        queries, keys = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        if self.attention_name:
            return [(self.attention_name, queries + 2 * keys)]
        return [("q_proj", queries), ("k_proj", keys), ("v_proj", keys)]


def compile_library(
    architecture: Architecture, path: Path, metadata: dict[str, Any], target: str = "x86_64-cpu"
) -> None:
    """Compiles the model for a CPU and writes its library.

    Args:
        architecture: the model's.
        path: the file to write: ``.so``, which this machine's linker makes, or ``.tar``, an archive of the
            objects for another system's.
        metadata: returned by the library's ``_metadata`` function as JSON, between architecture and target.
        target: a key of ``TARGETS``.
    """
    described = tvm.target.Target(TARGETS[target])
    module = build_module(
        architecture, {**metadata, "target": " ".join(map(str, TARGETS[target].values()))}, described
    )
    executable = relax.build(module, target=described, relax_pipeline=_pipeline(described))
    executable.export_library(str(path), fcompile=_archive if path.suffix == ".tar" else None)


def _archive(output: str, objects: list[str], **_: Any) -> None:
    """Like TVM's own archive, but without times and owners, so that the same model gives the same bytes."""
    with tarfile.open(output, "w") as archive:
        for file in sorted(map(Path, objects)):
            member = tarfile.TarInfo(file.name)
            member.size = file.stat().st_size
            with file.open("rb") as data:
                archive.addfile(member, data)


def parameter_names(architecture: Architecture) -> list[str]:
    """Names of the parameters in the order in which the library's functions take them: head first, then
    embedding, layers and final norm."""
    return [name for name, _, _ in parameters_of(architecture)]


def _pipeline(target: Any) -> Any:
    # Every kernel is scheduled by hand, so only what turns Relax into VM code is left to do.
    from tvm.relax.backend.cpu_generic.pipeline import dataflow_lower_passes, finalize_passes

    legalize = [relax.backend.DispatchSortScan(), relax.transform.LegalizeOps()]
    return tvm.ir.transform.Sequential(
        [*legalize, *dataflow_lower_passes(target), *finalize_passes(target), shapes_in_order]
    )


def parameters_of(a: Architecture) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of each parameter, in the order of ``parameter_names``."""

    def matrix(name: str, rows: int, columns: int) -> list[tuple[str, tuple[int, ...], str]]:
        if not a.quantized:
            return [(f"{name}.weight", (rows, columns), a.weight_dtype)]
        return [
            (f"{name}.q_weight", (rows, columns // 8), "uint32"),
            (f"{name}.q_scale", (rows, columns // GROUP), a.weight_dtype),
        ]

    found = [] if a.tied else matrix("lm_head", a.vocabulary_size, a.hidden_size)
    found += matrix(f"{a.prefix}.embed_tokens", a.vocabulary_size, a.hidden_size)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if a.output_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for number in range(a.layers):
        prefix = f"{a.prefix}.layers.{number}"
        found += [(f"{prefix}.{norm}.weight", (a.hidden_size,), a.weight_dtype) for norm in norms]
        found += matrix(f"{prefix}.mlp.down_proj", a.hidden_size, a.intermediate_size)
        found += matrix(f"{prefix}.mlp.gate_up_proj", 2 * a.intermediate_size, a.hidden_size)
        for part, rows in a.attention_parts():
            if a.attention_bias:
                found.append((f"{prefix}.self_attn.{part}.bias", (rows,), a.weight_dtype))
            found += matrix(f"{prefix}.self_attn.{part}", rows, a.hidden_size)
        found += matrix(f"{prefix}.self_attn.o_proj", a.hidden_size, a.heads * a.head_dim)
        if a.head_norms:
            found += [
                (f"{prefix}.self_attn.{part}_norm.weight", (a.head_dim,), a.weight_dtype) for part in "qk"
            ]
    found.append((f"{a.prefix}.norm.weight", (a.hidden_size,), a.weight_dtype))
    return found


def build_module(
    a: Architecture, metadata: dict[str, Any], described: tvm.target.Target | None = None
) -> tvm.IRModule:
    """The Relax module with ``forward`` (logits of all positions), ``forward_last`` (of the last),
    ``forward_one`` (of the only one) and ``_metadata``; with a target also what MLC's engine calls.

    Each takes input_ids int32 [T], position int64 [1] (tokens already in the cache), the key and value
    caches float32 [C, G, D] of every layer (written in place), then the parameters.
    """
    builder = relax.BlockBuilder()
    for name, single, every in (
        ("forward", False, True),
        ("forward_last", False, False),
        ("forward_one", True, False),
    ):
        _emit_function(builder, a, name, single, every)
    if described is not None:
        from export.mlc_engine import Operators, add_engine_functions, replace_kernel, window_kernel

        add_engine_functions(builder, a, described, Operators)
    add_metadata(builder, a, metadata)
    module = builder.finalize()
    if described is not None and a.windowed:
        replace_kernel(module, "batch_prefill_paged_kv_cpu_sliding_window", window_kernel(a))
    return module


def add_metadata(builder: relax.BlockBuilder, a: Architecture, metadata: dict[str, Any]) -> None:
    """Adds ``_metadata``, which returns what ``engine_metadata`` says and ``metadata`` as JSON."""
    with builder.function("_metadata", []):
        chunk = int(metadata.get("prefill_chunk_size", a.context_length))
        text = json.dumps({**engine_metadata(a, chunk), **metadata})
        builder.emit_func_output(builder.emit(ir.StringImm(text)))


def engine_metadata(a: Architecture, chunk: int) -> dict[str, Any]:
    """What the library says of itself: what MLC's engine reads, then the ``architecture`` and the names of
    the ``parameters`` in the order in which functions take them.

    Args:
        a: the model's architecture.
        chunk: most tokens of one prefill.
    """
    weights = [
        {"name": name, "shape": list(shape), "dtype": dtype, "preprocs": [], "pipeline_stages": [0]}
        for name, shape, dtype in parameters_of(a)
    ]
    return {
        "context_window_size": a.context_length,
        "sliding_window_size": -1,
        "attention_sink_size": -1,
        "prefill_chunk_size": chunk,
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "disaggregation": False,
        "kv_state_kind": "kv_cache",
        "max_batch_size": 128,
        "model_task": "chat",
        "vocab_size": a.vocabulary_size,
        "params": weights,
        # What the largest prefill needs beside weights and cache: embeddings, queries, gates and logits.
        "memory_usage": {
            name: 4 * count * (6 * a.hidden_size + 3 * a.intermediate_size) + 4 * rows * a.vocabulary_size
            for name, count, rows in (
                ("embed", chunk, 0),
                ("prefill", chunk, 1),
                ("decode", 1, 1),
                ("batch_prefill", chunk, 128),
                ("batch_decode", 128, 128),
                ("batch_verify", chunk, chunk),
            )
        },
        "kv_cache": {
            "num_hidden_layers": a.layers,
            "num_attention_heads": a.heads,
            "num_key_value_heads": a.key_value_heads,
            "head_dim": a.head_dim,
        },
        "architecture": asdict(a),
        "parameters": parameter_names(a),
    }


def _emit_function(
    builder: relax.BlockBuilder, a: Architecture, name: str, single: bool, every_position: bool
) -> None:
    tokens: Any = 1 if single else tirx.Var("tokens", "int64")
    capacity = tirx.Var("capacity", "int64")

    def tensor(shape: list[Any], dtype: str) -> relax.TensorType:
        return relax.TensorType([T.int64(s) if isinstance(s, int) else s for s in shape], dtype)

    input_ids = relax.Var("input_ids", tensor([tokens], "int32"))
    position = relax.Var("position", tensor([1], "int64"))
    cache_type = tensor([capacity, a.key_value_heads, a.head_dim], "float32")
    caches = [
        relax.Var(f"{kind}_cache_{number}", cache_type)
        for number in range(a.layers)
        for kind in ("key", "value")
    ]
    parameters = [
        relax.Var(name.replace(".", "_"), tensor(list(shape), dtype))
        for name, shape, dtype in parameters_of(a)
    ]
    by_name = dict(zip(parameter_names(a), parameters, strict=True))

    def call(kernel: tirx.PrimFunc, kernel_name: str, arguments: list[Any], shape: list[Any]) -> relax.Var:
        function = builder.add_func(kernel, kernel_name)
        return builder.emit(relax.call_tir(function, arguments, tensor(shape, "float32")))

    def multiply(x: relax.Var, name: str, rows: int, columns: int, count: Any) -> relax.Var:
        kernel = (vector_kernel if isinstance(count, int) else blocked_kernel)(
            rows, columns, a.quantized, a.weight_dtype
        )
        weights = ["q_weight", "q_scale"] if a.quantized else ["weight"]
        return call(kernel, "multiply", [x, *(by_name[f"{name}.{w}"] for w in weights)], [count, rows])

    def norm(x: relax.Var, name: str, count: Any) -> relax.Var:
        kernel = norm_kernel(a.hidden_size, a.norm_epsilon, a.weight_dtype)
        return call(kernel, "rms_norm", [x, by_name[name]], [count, a.hidden_size])

    qkv_width = (a.heads + 2 * a.key_value_heads) * a.head_dim
    head = f"{a.prefix}.embed_tokens" if a.tied else "lm_head"
    with builder.function(name, [input_ids, position, *caches, *parameters]):
        embedding = [
            by_name[f"{a.prefix}.embed_tokens.{w}"]
            for w in (["q_weight", "q_scale"] if a.quantized else ["weight"])
        ]
        x = call(
            embedding_kernel(a.vocabulary_size, a.hidden_size, a.quantized, a.weight_dtype),
            "embed",
            [input_ids, *embedding],
            [tokens, a.hidden_size],
        )
        if a.embedding_scale != 1:
            x = call(scale_kernel(a.hidden_size, a.embedding_scale), "scale", [x], [tokens, a.hidden_size])
        turns = {
            theta: call(
                turn_kernel(a.head_dim, theta), "turns", [input_ids, position], [tokens, 2, a.head_dim // 2]
            )
            for theta in a.thetas()
        }
        for number in range(a.layers):
            prefix = f"{a.prefix}.layers.{number}"
            y = norm(x, f"{prefix}.input_layernorm.weight", tokens)
            attention = f"{prefix}.self_attn.{a.attention_name}"
            parts = [
                multiply(y, f"{prefix}.self_attn.{part}", rows, a.hidden_size, tokens)
                for part, rows in a.attention_parts()
            ]
            qkv = parts[0] if len(parts) == 1 else call(join_kernel(a), "join", parts, [tokens, qkv_width])
            if a.attention_bias:
                kernel = bias_kernel(qkv_width, a.weight_dtype)
                qkv = call(kernel, "add_bias", [qkv, by_name[f"{attention}.bias"]], [tokens, qkv_width])
            if a.head_norms:
                norms = [by_name[f"{prefix}.self_attn.{part}_norm.weight"] for part in "qk"]
                qkv = call(head_norm_kernel(a), "head_norm", [qkv, *norms], [tokens, qkv_width])
            keys, values = caches[2 * number], caches[2 * number + 1]
            q = call(
                rope_kernel(a),
                "rope_and_store",
                [qkv, turns[a.theta_of(number)], position, keys, values],
                [tokens, a.heads, a.head_dim],
            )
            y = call(
                attention_kernel(a, a.window_of(number)),
                "attention",
                [q, position, keys, values],
                [tokens, a.heads * a.head_dim],
            )
            y = multiply(y, f"{prefix}.self_attn.o_proj", a.hidden_size, a.heads * a.head_dim, tokens)
            if a.output_norms:
                y = norm(y, f"{prefix}.post_attention_layernorm.weight", tokens)
            x = call(add_kernel(a.hidden_size), "add", [x, y], [tokens, a.hidden_size])
            before = "pre_feedforward_layernorm" if a.output_norms else "post_attention_layernorm"
            y = norm(x, f"{prefix}.{before}.weight", tokens)
            y = multiply(y, f"{prefix}.mlp.gate_up_proj", 2 * a.intermediate_size, a.hidden_size, tokens)
            y = call(
                gate_kernel(a.intermediate_size, a.activation),
                f"{a.activation}_gate",
                [y],
                [tokens, a.intermediate_size],
            )
            y = multiply(y, f"{prefix}.mlp.down_proj", a.hidden_size, a.intermediate_size, tokens)
            if a.output_norms:
                y = norm(y, f"{prefix}.post_feedforward_layernorm.weight", tokens)
            x = call(add_kernel(a.hidden_size), "add", [x, y], [tokens, a.hidden_size])
        count = tokens
        if not every_position:
            count = 1
            if not single:
                x = call(last_kernel(a.hidden_size), "last", [x], [1, a.hidden_size])
        x = norm(x, f"{a.prefix}.norm.weight", count)
        builder.emit_func_output(multiply(x, head, a.vocabulary_size, a.hidden_size, count))


def exponential(x: Any) -> Any:
    """e^x in float32 as arithmetic that vectorizes: 2^n times the series of the rest, relative error 3e-7.

    Args:
        x: float32 expression; below -87 the result is that of -87, above 88 that of 88.
    """
    x = T.max(T.min(x, T.float32(88)), T.float32(-87))
    n = T.floor(x * T.float32(1.4426950408889634) + T.float32(0.5))
    # log(2) in two parts, the first of few enough bits that its product with n is exact.
    rest = x - n * T.float32(0.693359375) - n * T.float32(-2.12194440e-4)
    series = T.float32(1 / 720)
    for factorial in (120, 24, 6, 2, 1, 1):
        series = series * rest + T.float32(1 / factorial)
    return series * T.reinterpret("float32", T.shift_left(T.Cast("int32", n) + 127, 23))


@cache
def vector_kernel(rows: int, columns: int, quantized: bool, dtype: str) -> tirx.PrimFunc:
    """y[1, N] = x[1, K] W[N, K]^T."""
    if not quantized:

        @T.prim_func(private=True, s_tir=True)
        def plain(
            x: T.Buffer((1, columns), "float32"),
            weight: T.Buffer((rows, columns), dtype),
            y: T.Buffer((1, rows), "float32"),
        ):
            T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
            for row in T.parallel(rows):
                with T.sblock("row"):
                    T.reads()
                    T.writes()
                    total = T.alloc_buffer((8,), "float32")
                    for lane in T.vectorized(8):
                        total[lane] = T.float32(0)
                    for k in range(columns // 8):
                        for lane in T.vectorized(8):
                            total[lane] = total[lane] + x[0, k * 8 + lane] * T.Cast(
                                "float32", weight[row, k * 8 + lane]
                            )
                    y[0, row] = sum_of_lanes(total)

        return plain

    @T.prim_func(private=True, s_tir=True)
    def four_bit(
        x: T.Buffer((1, columns), "float32"),
        weight: T.Buffer((rows, columns // 8), "uint32"),
        scale: T.Buffer((rows, columns // 32), dtype),
        y: T.Buffer((1, rows), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
        # A byte holds an even nibble e and an odd one o, and is e + 16 o itself. So that the odd one need not
        # be shifted out, x_e e + x_o o is taken as (e + 16 o) x_o / 16 + e (x_e - x_o / 16).
        whole = T.alloc_buffer((columns // 2,), "float32")
        lower = T.alloc_buffer((columns // 2,), "float32")
        # The sum of x (q - 7) over a group is the sum of x q, less seven times the sum of x, the same for
        # all rows.
        offset = T.alloc_buffer((columns // 32, 8), "float32")
        for g in range(columns // 32):
            with T.sblock("offset"):
                T.reads()
                T.writes()
                for byte in range(16):
                    whole[g * 16 + byte] = x[0, g * 32 + byte * 2 + 1] * T.float32(1 / 16)
                    lower[g * 16 + byte] = x[0, g * 32 + byte * 2] - whole[g * 16 + byte]
                for lane in T.vectorized(8):
                    offset[g, lane] = T.float32(-7) * (
                        x[0, g * 32 + lane]
                        + x[0, g * 32 + 8 + lane]
                        + x[0, g * 32 + 16 + lane]
                        + x[0, g * 32 + 24 + lane]
                    )
        for row in T.parallel(rows):
            with T.sblock("row"):
                T.reads()
                T.writes()
                total = T.alloc_buffer((8,), "float32")
                group = T.alloc_buffer((8,), "float32")
                for lane in T.vectorized(8):
                    total[lane] = T.float32(0)
                for g in range(columns // 32):
                    for lane in T.vectorized(8):
                        group[lane] = offset[g, lane]
                    for half in T.unroll(2):
                        group[T.Ramp(0, 1, 8)] = (
                            load(group, 0, 8)
                            + load(whole, g * 16 + half * 8, 8)
                            * bytes_of_words(weight, row, g * 4 + half * 2, 255)
                            + load(lower, g * 16 + half * 8, 8)
                            * bytes_of_words(weight, row, g * 4 + half * 2, 15)
                        )
                    for lane in T.vectorized(8):
                        total[lane] = total[lane] + group[lane] * T.Cast("float32", scale[row, g])
                y[0, row] = sum_of_lanes(total)

    return four_bit


def load(buffer: Any, start: Any, lanes: int) -> Any:
    """A vector of neighbours in a buffer of one dimension."""
    return buffer.vload([start], f"{buffer.dtype}x{lanes}")


def bytes_of_words(weight: Any, row: Any, word: Any, mask: int) -> Any:
    """The eight bytes of two words of a row, masked, as float32 [8]."""
    values = T.Cast("int32x8", T.reinterpret("uint8x8", weight.vload([row, word], "uint32x2")))
    if mask != 255:
        values = T.bitwise_and(values, T.Broadcast(T.int32(mask), 8))
    return T.Cast("float32x8", values)


def value_of_nibble(word: Any, place: Any) -> Any:
    """One of the eight numbers of a word, from -7 to 7, float32; to be multiplied with its group's scale."""
    bits = T.bitwise_and(T.shift_right(word, T.Cast("uint32", place * 4)), T.uint32(15))
    return T.Cast("float32", T.Cast("int32", bits) - 7)


def sum_of_lanes(buffer: Any) -> Any:
    """The sum of a buffer of eight."""
    total = buffer[0]
    for lane in range(1, 8):
        total = total + buffer[lane]
    return total


@cache
def blocked_kernel(rows: int, columns: int, quantized: bool, dtype: str) -> tirx.PrimFunc:
    """y[T, N] = x[T, K] W[N, K]^T, panels of 16 rows by 4 tokens."""
    panels = -(-rows // PANEL)
    if not quantized:

        @T.prim_func(private=True, s_tir=True)
        def plain(x_handle: T.handle, weight: T.Buffer((rows, columns), dtype), y_handle: T.handle):
            T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
            tokens = T.int64()
            x = T.match_buffer(x_handle, (tokens, columns), "float32")
            y = T.match_buffer(y_handle, (tokens, rows), "float32")
            for panel in T.parallel(panels):
                with T.sblock("panel"):
                    T.reads()
                    T.writes()
                    w = T.alloc_buffer((columns, 16), "float32")
                    total = T.alloc_buffer((4, 16), "float32")
                    for column, k in T.grid(16, columns):
                        w[k, column] = T.Cast("float32", weight[T.min(panel * 16 + column, rows - 1), k])
                    for block in range((tokens + 3) // 4):
                        for r in T.unroll(4):
                            for c in T.vectorized(16):
                                total[r, c] = T.float32(0)
                        for k in range(columns):
                            for r in T.unroll(4):
                                for c in T.vectorized(16):
                                    total[r, c] = (
                                        total[r, c] + x[T.min(block * 4 + r, tokens - 1), k] * w[k, c]
                                    )
                        for r, c in T.grid(4, 16):
                            if block * 4 + r < tokens and panel * 16 + c < rows:
                                y[block * 4 + r, panel * 16 + c] = total[r, c]

        return plain

    @T.prim_func(private=True, s_tir=True)
    def four_bit(
        x_handle: T.handle,
        weight: T.Buffer((rows, columns // 8), "uint32"),
        scale: T.Buffer((rows, columns // 32), dtype),
        y_handle: T.handle,
    ):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
        tokens = T.int64()
        x = T.match_buffer(x_handle, (tokens, columns), "float32")
        y = T.match_buffer(y_handle, (tokens, rows), "float32")
        for panel in T.parallel(panels):
            with T.sblock("panel"):
                T.reads()
                T.writes()
                w = T.alloc_buffer((columns, 16), "float32")
                total = T.alloc_buffer((4, 16), "float32")
                scales = T.alloc_buffer((16,), "float32")
                words = T.alloc_buffer((16,), "uint32")
                # The sixteen rows' words side by side, so that the lanes of a vector are rows.
                for g in range(columns // 32):
                    for column in T.unroll(16):
                        scales[column] = T.Cast("float32", scale[T.min(panel * 16 + column, rows - 1), g])
                    for word in range(4):
                        for column in T.unroll(16):
                            words[column] = weight[T.min(panel * 16 + column, rows - 1), g * 4 + word]
                        for nibble in T.unroll(8):
                            for column in T.vectorized(16):
                                w[g * 32 + word * 8 + nibble, column] = (
                                    value_of_nibble(words[column], nibble) * scales[column]
                                )
                for block in range((tokens + 3) // 4):
                    for r in T.unroll(4):
                        for c in T.vectorized(16):
                            total[r, c] = T.float32(0)
                    for k in range(columns):
                        for r in T.unroll(4):
                            for c in T.vectorized(16):
                                total[r, c] = total[r, c] + x[T.min(block * 4 + r, tokens - 1), k] * w[k, c]
                    for r, c in T.grid(4, 16):
                        if block * 4 + r < tokens and panel * 16 + c < rows:
                            y[block * 4 + r, panel * 16 + c] = total[r, c]

    return four_bit


@cache
def embedding_kernel(rows: int, columns: int, quantized: bool, dtype: str) -> tirx.PrimFunc:
    """y[T, H] = rows of the embedding."""
    if not quantized:

        @T.prim_func(private=True, s_tir=True)
        def plain(ids_handle: T.handle, weight: T.Buffer((rows, columns), dtype), y_handle: T.handle):
            T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
            tokens = T.int64()
            ids = T.match_buffer(ids_handle, (tokens,), "int32")
            y = T.match_buffer(y_handle, (tokens, columns), "float32")
            for i, k in T.grid(tokens, columns):
                y[i, k] = T.Cast("float32", weight[T.Cast("int64", ids[i]), k])

        return plain

    @T.prim_func(private=True, s_tir=True)
    def four_bit(
        ids_handle: T.handle,
        weight: T.Buffer((rows, columns // 8), "uint32"),
        scale: T.Buffer((rows, columns // 32), dtype),
        y_handle: T.handle,
    ):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
        tokens = T.int64()
        ids = T.match_buffer(ids_handle, (tokens,), "int32")
        y = T.match_buffer(y_handle, (tokens, columns), "float32")
        for i, word, lane in T.grid(tokens, columns // 8, 8):
            y[i, word * 8 + lane] = value_of_nibble(weight[T.Cast("int64", ids[i]), word], lane) * T.Cast(
                "float32", scale[T.Cast("int64", ids[i]), word // 4]
            )

    return four_bit


@cache
def norm_kernel(columns: int, epsilon: float, dtype: str) -> tirx.PrimFunc:
    """y = x / sqrt(mean(x^2) + epsilon) * weight, row by row."""

    @T.prim_func(private=True, s_tir=True)
    def kernel(x_handle: T.handle, weight: T.Buffer((columns,), dtype), y_handle: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
        tokens = T.int64()
        x = T.match_buffer(x_handle, (tokens, columns), "float32")
        y = T.match_buffer(y_handle, (tokens, columns), "float32")
        for i in range(tokens):
            with T.sblock("row"):
                T.reads()
                T.writes()
                total = T.alloc_buffer((8,), "float32")
                for lane in T.vectorized(8):
                    total[lane] = T.float32(0)
                for k in range(columns // 8):
                    for lane in T.vectorized(8):
                        total[lane] = total[lane] + x[i, k * 8 + lane] * x[i, k * 8 + lane]
                total[0] = T.float32(1) / T.sqrt(
                    sum_of_lanes(total) / T.float32(columns) + T.float32(epsilon)
                )
                for k in range(columns):
                    y[i, k] = x[i, k] * total[0] * T.Cast("float32", weight[k])

    return kernel


@cache
def head_norm_kernel(a: Architecture) -> tirx.PrimFunc:
    """Each head's queries and keys over the root of their mean square, times a weight; values as they are."""
    heads, groups, dim, dtype = a.heads, a.key_value_heads, a.head_dim, a.weight_dtype
    width = (heads + 2 * groups) * dim

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        x_handle: T.handle,
        q_weight: T.Buffer((dim,), dtype),
        k_weight: T.Buffer((dim,), dtype),
        y_handle: T.handle,
    ):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
        tokens = T.int64()
        x = T.match_buffer(x_handle, (tokens, width), "float32")
        y = T.match_buffer(y_handle, (tokens, width), "float32")
        for i, h in T.grid(tokens, heads + groups):
            with T.sblock("head"):
                T.reads()
                T.writes()
                total = T.alloc_buffer((8,), "float32")
                for lane in T.vectorized(8):
                    total[lane] = T.float32(0)
                for k in range(dim // 8):
                    for lane in T.vectorized(8):
                        total[lane] = (
                            total[lane] + x[i, h * dim + k * 8 + lane] * x[i, h * dim + k * 8 + lane]
                        )
                total[0] = T.float32(1) / T.sqrt(
                    sum_of_lanes(total) / T.float32(dim) + T.float32(a.norm_epsilon)
                )
                for k in range(dim):
                    y[i, h * dim + k] = (
                        x[i, h * dim + k]
                        * total[0]
                        * T.Cast("float32", T.if_then_else(h < heads, q_weight[k], k_weight[k]))
                    )
        for i, k in T.grid(tokens, groups * dim):
            y[i, (heads + groups) * dim + k] = x[i, (heads + groups) * dim + k]

    return kernel


@cache
def bias_kernel(columns: int, dtype: str) -> tirx.PrimFunc:
    """y = x + bias."""

    @T.prim_func(private=True, s_tir=True)
    def kernel(x_handle: T.handle, bias: T.Buffer((columns,), dtype), y_handle: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
        tokens = T.int64()
        x = T.match_buffer(x_handle, (tokens, columns), "float32")
        y = T.match_buffer(y_handle, (tokens, columns), "float32")
        for i, k in T.grid(tokens, columns):
            y[i, k] = x[i, k] + T.Cast("float32", bias[k])

    return kernel


@cache
def add_kernel(columns: int) -> tirx.PrimFunc:
    """z = x + y."""

    @T.prim_func(private=True, s_tir=True)
    def kernel(x_handle: T.handle, y_handle: T.handle, z_handle: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
        tokens = T.int64()
        x = T.match_buffer(x_handle, (tokens, columns), "float32")
        y = T.match_buffer(y_handle, (tokens, columns), "float32")
        z = T.match_buffer(z_handle, (tokens, columns), "float32")
        for i, k in T.grid(tokens, columns):
            z[i, k] = x[i, k] + y[i, k]

    return kernel


def activated(x: Any, activation: str) -> Any:
    """silu, or gelu as its approximation with tanh, where (1 + tanh(u)) / 2 is 1 / (1 + e^-2u); float32."""
    u = x
    if activation == "gelu_tanh":
        u = (x + T.float32(0.044715) * x * x * x) * T.float32(2 * (2 / math.pi) ** 0.5)
    return x / (T.float32(1) + exponential(T.float32(0) - u))


@cache
def gate_kernel(columns: int, activation: str) -> tirx.PrimFunc:
    """z = activation(gate) * up, of x = [gate, up]."""

    @T.prim_func(private=True, s_tir=True)
    def kernel(x_handle: T.handle, z_handle: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
        tokens = T.int64()
        x = T.match_buffer(x_handle, (tokens, columns * 2), "float32")
        z = T.match_buffer(z_handle, (tokens, columns), "float32")
        for i, k in T.grid(tokens, columns // 8):
            for lane in T.vectorized(8):
                z[i, k * 8 + lane] = activated(x[i, k * 8 + lane], activation) * x[i, columns + k * 8 + lane]

    return kernel


@cache
def scale_kernel(columns: int, factor: float) -> tirx.PrimFunc:
    """y = x * factor."""

    @T.prim_func(private=True, s_tir=True)
    def kernel(x_handle: T.handle, y_handle: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
        tokens = T.int64()
        x = T.match_buffer(x_handle, (tokens, columns), "float32")
        y = T.match_buffer(y_handle, (tokens, columns), "float32")
        for i, k in T.grid(tokens, columns):
            y[i, k] = x[i, k] * T.float32(factor)

    return kernel


@cache
def join_kernel(a: Architecture) -> tirx.PrimFunc:
    """Queries, keys and values side by side."""
    queries, keys = a.heads * a.head_dim, a.key_value_heads * a.head_dim

    @T.prim_func(private=True, s_tir=True)
    def kernel(q_handle: T.handle, k_handle: T.handle, v_handle: T.handle, y_handle: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
        tokens = T.int64()
        q = T.match_buffer(q_handle, (tokens, queries), "float32")
        k = T.match_buffer(k_handle, (tokens, keys), "float32")
        v = T.match_buffer(v_handle, (tokens, keys), "float32")
        y = T.match_buffer(y_handle, (tokens, queries + 2 * keys), "float32")
        for i in range(tokens):
            for n in range(queries):
                y[i, n] = q[i, n]
            for n in range(keys):
                y[i, queries + n] = k[i, n]
                y[i, queries + keys + n] = v[i, n]

    return kernel


@cache
def last_kernel(columns: int) -> tirx.PrimFunc:
    """The last row."""

    @T.prim_func(private=True, s_tir=True)
    def kernel(x_handle: T.handle, y: T.Buffer((1, columns), "float32")):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
        tokens = T.int64()
        x = T.match_buffer(x_handle, (tokens, columns), "float32")
        for k in range(columns):
            y[0, k] = x[tokens - 1, k]

    return kernel


@cache
def turn_kernel(dim: int, theta: float) -> tirx.PrimFunc:
    """Cosine and sine of every rotary angle, [T, 2, D / 2]: the same in all layers of one base."""
    half = dim // 2

    @T.prim_func(private=True, s_tir=True)
    def kernel(ids_handle: T.handle, position: T.Buffer((1,), "int64"), y_handle: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
        tokens = T.int64()
        T.match_buffer(ids_handle, (tokens,), "int32")
        y = T.match_buffer(y_handle, (tokens, 2, half), "float32")
        for k in range(half):
            with T.sblock("pair"):
                T.reads()
                T.writes()
                frequency = T.alloc_buffer((1,), "float64")
                frequency[0] = T.pow(T.float64(theta), T.Cast("float64", k) * T.float64(-2.0 / dim))
                for i in range(tokens):
                    y[i, 0, k] = T.Cast("float32", T.cos(T.Cast("float64", position[0] + i) * frequency[0]))
                    y[i, 1, k] = T.Cast("float32", T.sin(T.Cast("float64", position[0] + i) * frequency[0]))

    return kernel


@cache
def rope_kernel(a: Architecture) -> tirx.PrimFunc:
    """Rotates queries and keys by their positions (halves of a head are the pairs, as in Hugging Face's
    models), writes keys and values into the caches, returns the queries."""
    heads, groups, dim = a.heads, a.key_value_heads, a.head_dim
    half = dim // 2
    width = (heads + 2 * groups) * dim

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        qkv_handle: T.handle,
        turns_handle: T.handle,
        position: T.Buffer((1,), "int64"),
        key_handle: T.handle,
        value_handle: T.handle,
        q_handle: T.handle,
    ):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
        tokens, capacity = T.int64(), T.int64()
        qkv = T.match_buffer(qkv_handle, (tokens, width), "float32")
        turns = T.match_buffer(turns_handle, (tokens, 2, half), "float32")
        keys = T.match_buffer(key_handle, (capacity, groups, dim), "float32")
        values = T.match_buffer(value_handle, (capacity, groups, dim), "float32")
        q = T.match_buffer(q_handle, (tokens, heads, dim), "float32")
        for i in range(tokens):
            for h, k in T.grid(heads, half):
                q[i, h, k] = (
                    qkv[i, h * dim + k] * turns[i, 0, k] - qkv[i, h * dim + half + k] * turns[i, 1, k]
                )
                q[i, h, half + k] = (
                    qkv[i, h * dim + half + k] * turns[i, 0, k] + qkv[i, h * dim + k] * turns[i, 1, k]
                )
            for h, k in T.grid(groups, half):
                keys[position[0] + i, h, k] = (
                    qkv[i, (heads + h) * dim + k] * turns[i, 0, k]
                    - qkv[i, (heads + h) * dim + half + k] * turns[i, 1, k]
                )
                keys[position[0] + i, h, half + k] = (
                    qkv[i, (heads + h) * dim + half + k] * turns[i, 0, k]
                    + qkv[i, (heads + h) * dim + k] * turns[i, 1, k]
                )
            for h, k in T.grid(groups, dim):
                values[position[0] + i, h, k] = qkv[i, (heads + groups + h) * dim + k]

    return kernel


@cache
def attention_kernel(a: Architecture, window: int) -> tirx.PrimFunc:
    """Causal attention of T queries over the cache, or over the last ``window`` tokens of it where that is
    not 0; softmax in float32."""
    heads, groups, dim = a.heads, a.key_value_heads, a.head_dim
    repeat = heads // groups
    scale = a.attention_scale

    def first(last: Any) -> Any:
        """The first token that the query of the token ``last`` sees."""
        return T.max(last - (window - 1), T.int64(0)) if window else T.int64(0)

    def seen(last: Any) -> Any:
        """How many tokens it sees."""
        return last + 1 - first(last) if window else last + 1

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        q_handle: T.handle,
        position: T.Buffer((1,), "int64"),
        key_handle: T.handle,
        value_handle: T.handle,
        y_handle: T.handle,
    ):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
        tokens, capacity = T.int64(), T.int64()
        q = T.match_buffer(q_handle, (tokens, heads, dim), "float32")
        keys = T.match_buffer(key_handle, (capacity, groups, dim), "float32")
        values = T.match_buffer(value_handle, (capacity, groups, dim), "float32")
        y = T.match_buffer(y_handle, (tokens, heads * dim), "float32")
        for ih in T.parallel(tokens * heads):
            with T.sblock("query"):
                T.reads()
                T.writes()
                score = T.alloc_buffer((capacity + 8,), "float32")
                lanes = T.alloc_buffer((8,), "float32")
                state = T.alloc_buffer((2,), "float32")  # largest score, sum of exponentials
                total = T.alloc_buffer((dim,), "float32")
                state[0] = T.float32(-3.0e38)
                for j in range(seen(position[0] + ih // heads)):
                    for lane in T.vectorized(8):
                        lanes[lane] = T.float32(0)
                    for k in T.unroll(dim // 8):
                        for lane in T.vectorized(8):
                            lanes[lane] = (
                                lanes[lane]
                                + q[ih // heads, ih % heads, k * 8 + lane]
                                * keys[
                                    first(position[0] + ih // heads) + j, ih % heads // repeat, k * 8 + lane
                                ]
                            )
                    score[j] = sum_of_lanes(lanes) * T.float32(scale)
                    state[0] = T.max(state[0], score[j])
                # Exponentials apart from the sum of values, and eight at a time; what fills the last eight
                # is never read.
                for lane in T.vectorized(8):
                    score[seen(position[0] + ih // heads) + lane] = state[0]
                for block in range((seen(position[0] + ih // heads) + 7) // 8):
                    for lane in T.vectorized(8):
                        score[block * 8 + lane] = exponential(score[block * 8 + lane] - state[0])
                state[1] = T.float32(0)
                for k in T.vectorized(dim):
                    total[k] = T.float32(0)
                for j in range(seen(position[0] + ih // heads)):
                    state[1] = state[1] + score[j]
                    for k in T.vectorized(dim):
                        total[k] = (
                            total[k]
                            + score[j] * values[first(position[0] + ih // heads) + j, ih % heads // repeat, k]
                        )
                for k in T.vectorized(dim):
                    y[ih // heads, ih % heads * dim + k] = total[k] / state[1]

    return kernel
