"""MLC model libraries for browsers, as WebLLM loads them: WebGPU shaders, and WebAssembly that calls them.

The functions are those of ``export.mlc_engine``. What the model is made of are tensor expressions here, bound
to threads by TVM's own rules for GPUs; sampling has kernels of its own.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import tvm
from tvm import relax, te, tirx
from tvm.script import tirx as T

from export import emscripten, mlc_engine
from export import mlc_model as kernels
from export.mlc_shapes import shapes_in_order

TARGET = {"kind": "webgpu", "max_num_threads": 256}
HOST = {"kind": "llvm", "mtriple": "wasm32-unknown-unknown-wasm"}
MASKED = mlc_engine.MASKED


def compile_library(architecture: kernels.Architecture, path: Path, metadata: dict[str, Any]) -> None:
    """Compiles the model for browsers and writes its library.

    Args:
        architecture: the model's; ``weight_dtype`` must be "float32".
        path: the ``.wasm`` to write.
        metadata: see ``export.mlc_model.compile_library``.

    Raises:
        ExportError: Emscripten is missing or fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        runtime = emscripten.compile_runtime(Path(folder))
        described = tvm.target.Target(TARGET, host=HOST)
        builder = relax.BlockBuilder()
        mlc_engine.add_engine_functions(builder, architecture, described, GpuOperators)
        kernels.add_metadata(builder, architecture, {**metadata, "target": "webgpu wasm32"})
        module = builder.finalize()
        mlc_engine.replace_kernel(module, "tir_attention_merge_state", merge_kernel(architecture))
        executable = relax.build(module, target=described, relax_pipeline=_pipeline(described))

        def link(output: str, objects: Sequence[str], **_: Any) -> None:
            emscripten.link([*runtime, *map(Path, objects)], Path(output))

        # Object files: the bitcode of TVM's LLVM is newer than what Emscripten's can read.
        link.object_format = "o"  # type: ignore[attr-defined]
        executable.export_library(str(path), fcompile=link)


def _pipeline(described: tvm.target.Target) -> Any:
    from tvm.relax.backend.gpu_generic.pipeline import dataflow_lower_passes, finalize_passes
    from tvm.s_tir import dlight
    from tvm.s_tir.dlight import gpu

    rules = [gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback()]
    passes = [
        relax.transform.LegalizeOps(),
        dlight.ApplyDefaultSchedule(*rules),
        # Shaders have no 64-bit integers.
        tirx.transform.ForceNarrowIndexToInt32(),
        *dataflow_lower_passes(described),
        *finalize_passes(described),
        shapes_in_order,
    ]

    @tvm.transform.module_pass(opt_level=0)
    def pipeline(module: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        with described:
            return tvm.ir.transform.Sequential(passes)(module)

    return pipeline


class GpuOperators(mlc_engine.Operators):
    """The operators as tensor expressions, and sampling as kernels for GPUs."""

    def emit(self, compute: Callable[..., te.Tensor], arguments: Sequence[relax.Var], name: str) -> relax.Var:
        """Calls the kernel of a tensor expression."""
        return self.builder.emit_te(compute, *arguments, primfunc_name_hint=name)

    def multiply(self, x: relax.Var, name: str, rows: int, columns: int, count: Any) -> relax.Var:
        """y[T, N] = x[T, K] W[N, K]^T."""

        def compute(x: te.Tensor, *weights: te.Tensor) -> te.Tensor:
            # A stage of its own, which the rules for products know how to take in.
            w = te.compute((rows, columns), lambda n, k: weight_at(weights, n, k), name="weight")
            k = te.reduce_axis((0, columns), "k")
            return te.compute((x.shape[0], rows), lambda i, n: te.sum(x[i, k] * w[n, k], axis=k))

        return self.emit(compute, [x, *self.weights(name)], "multiply")

    def norm(self, x: relax.Var, name: str, count: Any) -> relax.Var:
        """y = x / sqrt(mean(x^2) + epsilon) * weight, row by row."""

        def compute(x: te.Tensor, weight: te.Tensor) -> te.Tensor:
            scale = root_mean_square(x, self.a.norm_epsilon)
            return te.compute(x.shape, lambda i, k: x[i, k] * scale[i] * weight[k].astype("float32"))

        return self.emit(compute, [x, self.parameters[name]], "rms_norm")

    def head_norm(self, x: relax.Var, prefix: str, width: int, count: Any) -> relax.Var:
        """Queries and keys normalized head by head, values as they are.

        Two kernels: TVM's rule for reductions takes what follows a sum to have the sum's own axes, but there
        are more heads here than sums.
        """
        a = self.a
        normalized = a.heads + a.key_value_heads

        def scale(x: te.Tensor) -> te.Tensor:
            shape = (x.shape[0], normalized, a.head_dim)
            heads = te.compute(shape, lambda i, h, k: x[i, h * a.head_dim + k], name="heads")
            return root_mean_square(heads, a.norm_epsilon)

        def compute(x: te.Tensor, scale: te.Tensor, q_weight: te.Tensor, k_weight: te.Tensor) -> te.Tensor:
            def element(i: Any, n: Any) -> Any:
                head, k = n // a.head_dim, n % a.head_dim
                weight = tirx.if_then_else(head < a.heads, q_weight[k], k_weight[k]).astype("float32")
                return tirx.if_then_else(head < normalized, x[i, n] * scale[i, head] * weight, x[i, n])

            return te.compute(x.shape, element)

        norms = [self.parameters[f"{prefix}.{part}_norm.weight"] for part in "qk"]
        return self.emit(compute, [x, self.emit(scale, [x], "head_scale"), *norms], "head_norm")

    def embed(self, ids: relax.Var, tokens: Any) -> relax.Var:
        """Rows of the embedding."""
        width = self.a.hidden_size

        def compute(ids: te.Tensor, *weights: te.Tensor) -> te.Tensor:
            return te.compute((ids.shape[0], width), lambda i, k: weight_at(weights, ids[i], k))

        return self.emit(compute, [ids, *self.weights(f"{self.a.prefix}.embed_tokens")], "embed")

    def bias(self, x: relax.Var, name: str, width: int, count: Any) -> relax.Var:
        """x + bias."""

        def compute(x: te.Tensor, bias: te.Tensor) -> te.Tensor:
            return te.compute(x.shape, lambda i, k: x[i, k] + bias[k].astype("float32"))

        return self.emit(compute, [x, self.parameters[name]], "add_bias")

    def add(self, x: relax.Var, y: relax.Var, count: Any) -> relax.Var:
        """x + y."""

        def compute(x: te.Tensor, y: te.Tensor) -> te.Tensor:
            return te.compute(x.shape, lambda i, k: x[i, k] + y[i, k])

        return self.emit(compute, [x, y], "add")

    def scale(self, x: relax.Var, count: Any) -> relax.Var:
        """x * embedding_scale."""
        factor = self.a.embedding_scale

        def compute(x: te.Tensor) -> te.Tensor:
            return te.compute(x.shape, lambda i, k: x[i, k] * tirx.const(factor, "float32"))

        return self.emit(compute, [x], "scale")

    def join(self, parts: list[relax.Var], width: int, count: Any) -> relax.Var:
        """Queries, keys and values side by side."""

        def compute(q: te.Tensor, k: te.Tensor, v: te.Tensor) -> te.Tensor:
            queries, keys = q.shape[1], k.shape[1]

            def element(i: Any, n: Any) -> Any:
                rest = tirx.if_then_else(n < queries + keys, k[i, n - queries], v[i, n - queries - keys])
                return tirx.if_then_else(n < queries, q[i, n], rest)

            return te.compute((q.shape[0], width), element)

        return self.emit(compute, parts, "join")

    def turns(self, positions: relax.Var, theta: float, count: Any) -> relax.Var:
        """Cosine and sine of every rotary angle, in float32: shaders have no double precision."""
        dim = self.a.head_dim

        def compute(positions: te.Tensor) -> te.Tensor:
            def element(i: Any, part: Any, k: Any) -> Any:
                exponent = tirx.Cast("float32", k) * tirx.const(-2.0 / dim, "float32")
                angle = positions[i].astype("float32") * te.power(tirx.const(theta, "float32"), exponent)
                return tirx.if_then_else(part == 0, te.cos(angle), te.sin(angle))

            return te.compute((positions.shape[0], 2, dim // 2), element)

        return self.emit(compute, [positions], "turns_at")

    def rotate(self, x: relax.Var, turns: relax.Var, width: int, count: Any) -> relax.Var:
        """Queries and keys turned; values as they are."""
        dim, half = self.a.head_dim, self.a.head_dim // 2
        turned = (self.a.heads + self.a.key_value_heads) * dim

        def compute(x: te.Tensor, turns: te.Tensor) -> te.Tensor:
            def element(i: Any, n: Any) -> Any:
                k = n % dim
                other = tirx.if_then_else(k < half, -x[i, n + half], x[i, n - half])
                rotated = x[i, n] * turns[i, 0, k % half] + other * turns[i, 1, k % half]
                return tirx.if_then_else(n < turned, rotated, x[i, n])

            return te.compute(x.shape, element)

        return self.emit(compute, [x, turns], "rotate")

    def gate(self, x: relax.Var, count: Any) -> relax.Var:
        """activation(gate) * up, of x = [gate, up]."""
        width, activation = self.a.intermediate_size, self.a.activation

        def activated(x: Any) -> Any:
            u = x
            if activation == "gelu_tanh":
                u = (x + 0.044715 * x * x * x) * (2 * (2 / math.pi) ** 0.5)
            return x / (1.0 + te.exp(-u))

        def compute(x: te.Tensor) -> te.Tensor:
            return te.compute((x.shape[0], width), lambda i, k: activated(x[i, k]) * x[i, width + k])

        return self.emit(compute, [x], f"{activation}_gate")

    def last(self, x: relax.Var) -> relax.Var:
        """The last row."""

        def compute(x: te.Tensor) -> te.Tensor:
            return te.compute((1, x.shape[1]), lambda i, k: x[x.shape[0] - 1, k])

        return self.emit(compute, [x], "last")

    @staticmethod
    def sampling_kernels() -> dict[str, tirx.PrimFunc]:
        """See ``export.mlc_engine.Operators.sampling_kernels``."""
        return {
            "apply_logit_bias_inplace": logit_bias_kernel(),
            "apply_penalty_inplace": penalty_kernel(),
            "apply_bitmask_inplace": bitmask_kernel(),
            "softmax_with_temperature": softmax_kernel(),
            "argsort_probs": argsort_kernel(),
            "sample_with_top_p": top_p_kernel(),
        }


def weight_at(weights: Sequence[te.Tensor], row: Any, column: Any) -> Any:
    """One element of a matrix in float32: a plain one, or four bits with a scale for each group of 32."""
    if len(weights) == 1:
        return weights[0][row, column].astype("float32")
    words, scales = weights
    shift = (column % 8 * 4).astype("uint32")
    nibble = tirx.bitwise_and(tirx.shift_right(words[row, column // 8], shift), tirx.const(15, "uint32"))
    return (nibble.astype("float32") - 7.0) * scales[row, column // 32].astype("float32")


def root_mean_square(x: te.Tensor, epsilon: float) -> te.Tensor:
    """1 / sqrt(mean(x^2) + epsilon) over the last axis."""
    *outer, columns = x.shape
    k = te.reduce_axis((0, columns), "k")
    squares = te.compute(outer, lambda *i: te.sum(x[(*i, k)] * x[(*i, k)], axis=k), name="squares")
    return te.compute(
        outer,
        lambda *i: te.rsqrt(squares[i] / tirx.Cast("float32", columns) + tirx.const(epsilon, "float32")),
        name="scale",
    )


@cache
def merge_kernel(a: kernels.Architecture) -> tirx.PrimFunc:
    """Joins the attention over new tokens with that over what the cache held before, in place.

    y = (2^l y + 2^m z) / (2^l + 2^m) for outputs y, z with base-2 logarithms l, m of their sums of
    exponentials; l becomes the logarithm of the joint sum. One thread for each head of each token: in
    TVM's own kernel one may overwrite what others of its workgroup have not read yet, for no barrier is
    between, and not all of them go in step.
    """
    heads, dim = a.heads, a.head_dim

    @T.prim_func(s_tir=True)
    def kernel(y_handle: T.handle, l_handle: T.handle, z_handle: T.handle, m_handle: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8})
        tokens = T.int32()
        y = T.match_buffer(y_handle, (tokens, heads, dim), "float32")
        l = T.match_buffer(l_handle, (tokens, heads), "float32")  # noqa: E741
        z = T.match_buffer(z_handle, (tokens, heads, dim), "float32")
        m = T.match_buffer(m_handle, (tokens, heads), "float32")
        for block in T.thread_binding((tokens * heads + 63) // 64, thread="blockIdx.x"):
            for thread in T.thread_binding(64, thread="threadIdx.x"):
                with T.sblock("merge"):
                    T.reads()
                    T.writes()
                    place = T.alloc_buffer((2,), "int32", scope="local")  # token, head
                    share = T.alloc_buffer((3,), "float32", scope="local")  # of y, of z, larger logarithm
                    place[0] = (block * 64 + thread) // heads
                    place[1] = (block * 64 + thread) % heads
                    if place[0] < tokens:
                        share[0] = l[place[0], place[1]]
                        share[1] = m[place[0], place[1]]
                        share[2] = T.max(share[0], share[1])
                        share[0] = T.exp2(share[0] - share[2])
                        share[1] = T.exp2(share[1] - share[2])
                        for k in range(dim):
                            y[place[0], place[1], k] = (
                                share[0] * y[place[0], place[1], k] + share[1] * z[place[0], place[1], k]
                            ) / (share[0] + share[1])
                        l[place[0], place[1]] = T.log2(share[0] + share[1]) + share[2]

    return kernel


@cache
def logit_bias_kernel() -> tirx.PrimFunc:
    """See ``export.mlc_engine.logit_bias_kernel``; one thread, since a token may come twice."""

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        logits_handle: T.handle, rows_handle: T.handle, tokens_handle: T.handle, bias_handle: T.handle
    ):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
        batch, vocabulary, count = T.int32(), T.int32(), T.int32()
        logits = T.match_buffer(logits_handle, (batch, vocabulary), "float32")
        rows = T.match_buffer(rows_handle, (count,), "int32")
        tokens = T.match_buffer(tokens_handle, (count,), "int32")
        bias = T.match_buffer(bias_handle, (count,), "float32")
        for _block in T.thread_binding(1, thread="blockIdx.x"):
            for _thread in T.thread_binding(1, thread="threadIdx.x"):
                for i in range(count):
                    logits[rows[i], tokens[i]] = logits[rows[i], tokens[i]] + bias[i]

    return kernel


@cache
def penalty_kernel() -> tirx.PrimFunc:
    """See ``export.mlc_engine.penalty_kernel``; one thread, since a token may come twice."""

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        logits_handle: T.handle,
        sequences_handle: T.handle,
        rows_handle: T.handle,
        tokens_handle: T.handle,
        counts_handle: T.handle,
        penalties_handle: T.handle,
    ):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
        batch, vocabulary, count, number = T.int32(), T.int32(), T.int32(), T.int32()
        logits = T.match_buffer(logits_handle, (batch, vocabulary), "float32")
        sequences = T.match_buffer(sequences_handle, (number,), "int32")
        rows = T.match_buffer(rows_handle, (count,), "int32")
        tokens = T.match_buffer(tokens_handle, (count,), "int32")
        counts = T.match_buffer(counts_handle, (count,), "int32")
        penalties = T.match_buffer(penalties_handle, (number, 3), "float32")
        for _block in T.thread_binding(1, thread="blockIdx.x"):
            for _thread in T.thread_binding(1, thread="threadIdx.x"):
                for i in range(count):
                    logits[sequences[rows[i]], tokens[i]] = logits[sequences[rows[i]], tokens[i]] - (
                        penalties[rows[i], 0] + T.Cast("float32", counts[i]) * penalties[rows[i], 1]
                    )
                    logits[sequences[rows[i]], tokens[i]] = T.if_then_else(
                        logits[sequences[rows[i]], tokens[i]] < T.float32(0),
                        logits[sequences[rows[i]], tokens[i]] * penalties[rows[i], 2],
                        logits[sequences[rows[i]], tokens[i]] / penalties[rows[i], 2],
                    )

    return kernel


@cache
def bitmask_kernel() -> tirx.PrimFunc:
    """See ``export.mlc_engine.bitmask_kernel``; a thread for each token of the vocabulary."""

    @T.prim_func(private=True, s_tir=True)
    def kernel(logits_handle: T.handle, sequences_handle: T.handle, bitmask_handle: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
        batch, vocabulary, number, words = T.int32(), T.int32(), T.int32(), T.int32()
        logits = T.match_buffer(logits_handle, (batch, vocabulary), "float32")
        sequences = T.match_buffer(sequences_handle, (number,), "int32")
        bitmask = T.match_buffer(bitmask_handle, (batch, words), "int32")
        for block in T.thread_binding((vocabulary + 255) // 256, thread="blockIdx.x"):
            for thread in T.thread_binding(256, thread="threadIdx.x"):
                for i in range(number):
                    if block * 256 + thread < vocabulary:
                        logits[sequences[i], block * 256 + thread] = T.if_then_else(
                            T.bitwise_and(
                                T.shift_right(
                                    bitmask[sequences[i], (block * 256 + thread) // 32],
                                    (block * 256 + thread) % 32,
                                ),
                                T.int32(1),
                            )
                            == T.int32(1),
                            logits[sequences[i], block * 256 + thread],
                            T.float32(MASKED),
                        )

    return kernel


@cache
def softmax_kernel() -> tirx.PrimFunc:
    """softmax(logits / temperature), temperatures below 1e-6 taken as that: all goes to the largest logits.

    256 threads a row; each has every 256th token, and reads what the others found from shared memory.
    """

    @T.prim_func(private=True, s_tir=True)
    def kernel(logits_handle: T.handle, temperature_handle: T.handle, y_handle: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
        batch, vocabulary = T.int32(), T.int32()
        logits = T.match_buffer(logits_handle, (batch, 1, vocabulary), "float32")
        temperature = T.match_buffer(temperature_handle, (batch,), "float32")
        y = T.match_buffer(y_handle, (batch, 1, vocabulary), "float32")
        for i in T.thread_binding(batch, thread="blockIdx.x"):
            for thread in T.thread_binding(256, thread="threadIdx.x"):
                with T.sblock("row"):
                    T.reads()
                    T.writes()
                    largest = T.alloc_buffer((256,), "float32", scope="shared")
                    sums = T.alloc_buffer((256,), "float32", scope="shared")
                    state = T.alloc_buffer((2,), "float32", scope="local")  # largest logit, sum
                    state[0] = T.float32(-3.4e38)
                    for block in range((vocabulary + 255) // 256):
                        if block * 256 + thread < vocabulary:
                            state[0] = T.max(state[0], logits[i, 0, block * 256 + thread])
                    largest[thread] = state[0]
                    T.tvm_storage_sync("shared")
                    for other in range(256):
                        state[0] = T.max(state[0], largest[other])
                    state[1] = T.float32(0)
                    for block in range((vocabulary + 255) // 256):
                        if block * 256 + thread < vocabulary:
                            y[i, 0, block * 256 + thread] = T.exp(
                                (logits[i, 0, block * 256 + thread] - state[0])
                                / T.max(temperature[i], T.float32(1e-6))
                            )
                            state[1] = state[1] + y[i, 0, block * 256 + thread]
                    sums[thread] = state[1]
                    T.tvm_storage_sync("shared")
                    state[1] = T.float32(0)
                    for other in range(256):
                        state[1] = state[1] + sums[other]
                    for block in range((vocabulary + 255) // 256):
                        if block * 256 + thread < vocabulary:
                            y[i, 0, block * 256 + thread] = y[i, 0, block * 256 + thread] / state[1]

    return kernel


@cache
def argsort_kernel() -> tirx.PrimFunc:
    """Probabilities in descending order and their tokens, equal ones in the order of their tokens.

    A bitonic network; each step is a launch of its own. (TVM's sort needs a third dimension of blocks, which
    its runtime for WebGPU keeps for itself.) All comparisons put the larger one in front, so that positions
    beyond the vocabulary, up to the next power of two, would never be exchanged and need not exist.
    """

    @T.prim_func(private=True, s_tir=True)
    def kernel(probs_handle: T.handle, ordered_handle: T.handle, indices_handle: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
        batch, vocabulary = T.int32(), T.int32()
        probs = T.match_buffer(probs_handle, (batch, vocabulary), "float32")
        ordered = T.match_buffer(ordered_handle, (batch, vocabulary), "float32")
        indices = T.match_buffer(indices_handle, (batch, vocabulary), "int32")
        for i in T.thread_binding(batch, thread="blockIdx.y"):
            for block in T.thread_binding((vocabulary + 255) // 256, thread="blockIdx.x"):
                for thread in T.thread_binding(256, thread="threadIdx.x"):
                    if block * 256 + thread < vocabulary:
                        ordered[i, block * 256 + thread] = probs[i, block * 256 + thread]
                        indices[i, block * 256 + thread] = block * 256 + thread
        for stage in range(24):
            if T.shift_left(T.int32(1), stage) < vocabulary:
                for step in range(stage + 1):
                    for i in T.thread_binding(batch, thread="blockIdx.y"):
                        for block in T.thread_binding((vocabulary + 255) // 256, thread="blockIdx.x"):
                            for thread in T.thread_binding(256, thread="threadIdx.x"):
                                with T.sblock("exchange"):
                                    T.reads()
                                    T.writes()
                                    place = T.alloc_buffer((2,), "int32", scope="local")
                                    token = T.alloc_buffer((1,), "int32", scope="local")
                                    value = T.alloc_buffer((1,), "float32", scope="local")
                                    place[0] = block * 256 + thread
                                    # The first step of a stage pairs a run with the mirrored other one.
                                    place[1] = T.bitwise_xor(
                                        place[0],
                                        T.if_then_else(
                                            step == 0,
                                            T.shift_left(T.int32(2), stage) - 1,
                                            T.shift_left(T.int32(1), stage - step),
                                        ),
                                    )
                                    # Two conditions: a shader reads what both sides of an "and" name.
                                    if place[0] < place[1] and place[1] < vocabulary:  # noqa: SIM102
                                        if ordered[i, place[0]] < ordered[i, place[1]] or (
                                            ordered[i, place[0]] == ordered[i, place[1]]
                                            and indices[i, place[0]] > indices[i, place[1]]
                                        ):
                                            value[0] = ordered[i, place[0]]
                                            ordered[i, place[0]] = ordered[i, place[1]]
                                            ordered[i, place[1]] = value[0]
                                            token[0] = indices[i, place[0]]
                                            indices[i, place[0]] = indices[i, place[1]]
                                            indices[i, place[1]] = token[0]

    return kernel


@cache
def top_p_kernel() -> tirx.PrimFunc:
    """See ``export.mlc_engine.top_p_kernel``; one thread for each uniform number, which stops reading where
    its nucleus ends."""

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        probs_handle: T.handle,
        indices_handle: T.handle,
        uniform_handle: T.handle,
        rows_handle: T.handle,
        top_p_handle: T.handle,
        y_handle: T.handle,
    ):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
        batch, vocabulary, count = T.int32(), T.int32(), T.int32()
        probs = T.match_buffer(probs_handle, (batch, vocabulary), "float32")
        indices = T.match_buffer(indices_handle, (batch, vocabulary), "int32")
        uniform = T.match_buffer(uniform_handle, (count,), "float32")
        rows = T.match_buffer(rows_handle, (count,), "int32")
        top_p = T.match_buffer(top_p_handle, (batch,), "float32")
        y = T.match_buffer(y_handle, (count,), "int32")
        for i in T.thread_binding(count, thread="blockIdx.x"):
            for _thread in T.thread_binding(1, thread="threadIdx.x"):
                with T.sblock("sample"):
                    T.reads()
                    T.writes()
                    mass = T.alloc_buffer((2,), "float32", scope="local")  # of the nucleus, and so far
                    k = T.alloc_buffer((1,), "int32", scope="local")
                    mass[0] = T.float32(0)
                    k[0] = T.int32(0)
                    while k[0] < vocabulary and mass[0] < top_p[rows[i]]:
                        mass[0] = mass[0] + probs[rows[i], k[0]]
                        k[0] = k[0] + T.int32(1)
                    mass[1] = T.float32(0)
                    k[0] = T.int32(0)
                    while k[0] < vocabulary and mass[1] <= uniform[i] * mass[0] and mass[1] < top_p[rows[i]]:
                        y[i] = indices[rows[i], k[0]]
                        mass[1] = mass[1] + probs[rows[i], k[0]]
                        k[0] = k[0] + T.int32(1)

    return kernel
