"""The functions that MLC's engine calls in a model library, beside those of ``export.mlc_model``: a paged
key-value cache shared by many sequences, prefill, decode and verification in batches, and sampling.

Shapes: B sequences, N tokens of all sequences together, V vocabulary, H hidden width. Every function that
runs the model takes the parameters as one tuple, last; those with the cache return (logits, cache). The
sampling functions change logits where their name says inplace.
"""

from functools import cache
from typing import Any

from tvm import relax, target, tirx
from tvm.relax.frontend.nn.llm.kv_cache import RopeMode, TIRPagedKVCache
from tvm.script import tirx as T

from export import mlc_model as kernels

MASKED = -3.0e38
"""Logit of a token that the bitmask forbids."""


def add_engine_functions(
    builder: relax.BlockBuilder,
    a: "kernels.Architecture",
    described: target.Target,
    operators: "type[Operators]",
) -> None:
    """Adds embed, prefill, decode, batch_prefill, batch_decode, batch_verify, create_tir_paged_kv_cache and
    the sampling functions to a module.

    Args:
        builder: the module being built, outside of any function.
        a: the model's architecture.
        described: what the module will be compiled for; the cache has kernels of its own for CPUs.
        operators: what the model is made of.
    """
    _add_embed(builder, a, operators)
    for name, batch, count, positions in (
        ("batch_prefill", 1, "tokens", "given"),
        ("batch_decode", "batch", 1, "every"),
        ("batch_verify", 1, "tokens", "every"),
        ("prefill", 1, "tokens", "last"),
        ("decode", 1, 1, "every"),
    ):
        _add_model_function(builder, a, operators, name, batch, count, positions)
    _add_cache(builder, a, described)
    _add_sampling(builder, operators.sampling_kernels())


def _tensor(shape: list[Any], dtype: str = "float32") -> relax.TensorType:
    return relax.TensorType([T.int64(s) if isinstance(s, int) else s for s in shape], dtype)


class Operators:
    """Emits a model's operators, as kernels for CPUs, into the function that is being built.

    Activations are [T, width]; T may be symbolic. Weights go by their tensors' names without ``.weight``.
    """

    def __init__(self, builder: relax.BlockBuilder, a: "kernels.Architecture", packed: relax.Var):
        self.builder, self.a = builder, a
        names = kernels.parameter_names(a)
        self.parameters = {
            name: builder.emit(relax.TupleGetItem(packed, number)) for number, name in enumerate(names)
        }

    def call(self, kernel: Any, name: str, arguments: list[Any], shape: list[Any]) -> relax.Var:
        function = self.builder.add_func(kernel, name)
        return self.builder.emit(relax.call_tir(function, arguments, _tensor(shape)))

    def weights(self, name: str) -> list[relax.Var]:
        parts = ["q_weight", "q_scale"] if self.a.quantized else ["weight"]
        return [self.parameters[f"{name}.{part}"] for part in parts]

    def multiply(self, x: relax.Var, name: str, rows: int, columns: int, count: Any) -> relax.Var:
        make = kernels.vector_kernel if isinstance(count, int) and count == 1 else kernels.blocked_kernel
        kernel = make(rows, columns, self.a.quantized, self.a.weight_dtype)
        return self.call(kernel, "multiply", [x, *self.weights(name)], [count, rows])

    def norm(self, x: relax.Var, name: str, count: Any) -> relax.Var:
        kernel = kernels.norm_kernel(self.a.hidden_size, self.a.norm_epsilon, self.a.weight_dtype)
        return self.call(kernel, "rms_norm", [x, self.parameters[name]], [count, self.a.hidden_size])

    def embed(self, ids: relax.Var, tokens: Any) -> relax.Var:
        """Rows of the embedding."""
        a = self.a
        kernel = kernels.embedding_kernel(a.vocabulary_size, a.hidden_size, a.quantized, a.weight_dtype)
        arguments = [ids, *self.weights("model.embed_tokens")]
        return self.call(kernel, "embed", arguments, [tokens, a.hidden_size])

    def bias(self, x: relax.Var, name: str, width: int, count: Any) -> relax.Var:
        """x + bias."""
        kernel = kernels.bias_kernel(width, self.a.weight_dtype)
        return self.call(kernel, "add_bias", [x, self.parameters[name]], [count, width])

    def head_norm(self, x: relax.Var, prefix: str, width: int, count: Any) -> relax.Var:
        """Queries and keys normalized head by head."""
        norms = [self.parameters[f"{prefix}.{part}_norm.weight"] for part in "qk"]
        return self.call(kernels.head_norm_kernel(self.a), "head_norm", [x, *norms], [count, width])

    def add(self, x: relax.Var, y: relax.Var, count: Any) -> relax.Var:
        """x + y."""
        width = self.a.hidden_size
        return self.call(kernels.add_kernel(width), "add", [x, y], [count, width])

    def gate(self, x: relax.Var, count: Any) -> relax.Var:
        """silu(gate) * up, of x = [gate, up]."""
        width = self.a.intermediate_size
        return self.call(kernels.gate_kernel(width), "silu_gate", [x], [count, width])

    def last(self, x: relax.Var) -> relax.Var:
        """The last row."""
        width = self.a.hidden_size
        return self.call(kernels.last_kernel(width), "last", [x], [1, width])

    @staticmethod
    def sampling_kernels() -> dict[str, tirx.PrimFunc]:
        """Kernels of the sampling functions, by the functions' names; ``argsort_probs`` is TVM's own where
        there is none."""
        return {
            "apply_logit_bias_inplace": logit_bias_kernel(),
            "apply_penalty_inplace": penalty_kernel(),
            "apply_bitmask_inplace": bitmask_kernel(),
            "softmax_with_temperature": softmax_kernel(),
            "sample_with_top_p": top_p_kernel(),
        }

    def reshape(self, x: relax.Expr, shape: list[Any]) -> relax.Var:
        return self.builder.emit(
            relax.op.reshape(x, [T.int64(s) if isinstance(s, int) else s for s in shape])
        )


def _packed(a: "kernels.Architecture") -> relax.Var:
    types = [_tensor(list(shape), dtype) for _, shape, dtype in kernels.parameters_of(a)]
    return relax.Var("packed_params", relax.TupleType(types))


def _add_embed(builder: relax.BlockBuilder, a: "kernels.Architecture", operators: type[Operators]) -> None:
    tokens = tirx.Var("tokens", "int64")
    input_ids = relax.Var("input_ids", _tensor([tokens], "int32"))
    packed = _packed(a)
    with builder.function("embed", [input_ids, packed]):
        builder.emit_func_output(operators(builder, a, packed).embed(input_ids, tokens))


def _add_model_function(
    builder: relax.BlockBuilder,
    a: "kernels.Architecture",
    operators: type[Operators],
    name: str,
    batch: Any,
    count: Any,
    positions: str,
) -> None:
    """One function that runs the model on embeddings [batch, count, H].

    Args:
        batch, count: numbers, or names of symbolic ones.
        positions: whose logits are returned: "every", the "last", or those "given" as int32 [B].
    """
    batch, count = (tirx.Var(s, "int64") if isinstance(s, str) else s for s in (batch, count))
    tokens = count if batch == 1 else batch
    embeddings = relax.Var("input_embeds", _tensor([batch, count, a.hidden_size]))
    paged = relax.Var("paged_kv_cache", relax.ObjectType())
    packed = _packed(a)
    asked = tirx.Var("asked", "int64")
    where = [relax.Var("logit_positions", _tensor([asked], "int32"))] if positions == "given" else []
    heads, groups, dim = a.heads, a.key_value_heads, a.head_dim
    width = (heads + 2 * groups) * dim
    with builder.function(name, [embeddings, *where, paged, packed]):
        caller = operators(builder, a, packed)
        x = caller.reshape(embeddings, [tokens, a.hidden_size])
        for number in range(a.layers):
            prefix = f"model.layers.{number}"
            attention = f"{prefix}.self_attn.{a.attention_name}"
            y = caller.norm(x, f"{prefix}.input_layernorm.weight", tokens)
            y = caller.multiply(y, attention, width, a.hidden_size, tokens)
            if a.attention_bias:
                y = caller.bias(y, f"{attention}.bias", width, tokens)
            if a.head_norms:
                y = caller.head_norm(y, f"{prefix}.self_attn", width, tokens)
            y = builder.emit(
                relax.call_dps_packed(
                    "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
                    [
                        paged,
                        relax.prim_value(number),
                        relax.prim_value(T.float32(dim**-0.5)),
                        caller.reshape(y, [tokens, heads + 2 * groups, dim]),
                    ],
                    out_ty=_tensor([tokens, heads, dim]),
                )
            )
            y = caller.reshape(y, [tokens, heads * dim])
            y = caller.multiply(y, f"{prefix}.self_attn.o_proj", a.hidden_size, heads * dim, tokens)
            x = caller.add(x, y, tokens)
            y = caller.norm(x, f"{prefix}.post_attention_layernorm.weight", tokens)
            gate = f"{prefix}.mlp.gate_up_proj"
            y = caller.multiply(y, gate, 2 * a.intermediate_size, a.hidden_size, tokens)
            y = caller.gate(y, tokens)
            y = caller.multiply(y, f"{prefix}.mlp.down_proj", a.hidden_size, a.intermediate_size, tokens)
            x = caller.add(x, y, tokens)
        rows: Any = tokens
        if positions == "given":
            x, rows = builder.emit(relax.op.take(x, where[0], axis=0, mode="clip")), asked
        elif positions == "last":
            x, rows = caller.last(x), 1
        x = caller.norm(x, "model.norm.weight", rows)
        head = "model.embed_tokens" if a.tied else "lm_head"
        logits = caller.multiply(x, head, a.vocabulary_size, a.hidden_size, rows)
        shape = [batch, count] if positions == "every" else [1, rows]
        logits = caller.reshape(logits, [*shape, a.vocabulary_size])
        builder.emit_func_output(relax.Tuple([logits, paged]))


def _add_cache(builder: relax.BlockBuilder, a: "kernels.Architecture", described: target.Target) -> None:
    names = (
        "max_batch_size",
        "max_total_seq_len",
        "prefill_chunk_size",
        "page_size",
        "support_sliding_window",
    )
    sizes = [tirx.Var(name, "int64") for name in names]
    arguments = [
        relax.Var(f"{name}_", relax.ShapeType([size])) for name, size in zip(names, sizes, strict=True)
    ]
    with builder.function("create_tir_paged_kv_cache", arguments):
        made = TIRPagedKVCache(
            "mha",
            *sizes,
            layer_partition=relax.ShapeExpr([0, a.layers]),
            num_hidden_layers=a.layers,
            num_attention_heads=a.heads,
            num_key_value_heads=a.key_value_heads,
            qk_head_dim=a.head_dim,
            v_head_dim=a.head_dim,
            mla_original_qk_head_dim=0,
            mla_original_v_head_dim=0,
            rope_mode=RopeMode.NORMAL,
            rope_scale=1,
            rope_theta=a.rope_theta,
            rope_scaling={},
            rope_ext_factors=relax.prim_value(0),
            rotary_dim=a.head_dim,
            enable_disaggregation=False,
            dtype="float32",
            target=described,
        )
        builder.emit_func_output(made._expr)


def _add_sampling(builder: relax.BlockBuilder, sampling: dict[str, tirx.PrimFunc]) -> None:
    """Sampling functions; all symbolic, so that one library serves any number of sequences."""
    batch, vocabulary, count, sequences = (
        tirx.Var(name, "int64") for name in ("batch", "vocabulary", "count", "sequences")
    )
    logits = relax.Var("logits", _tensor([batch, vocabulary]))

    def vector(name: str, dtype: str, size: Any) -> relax.Var:
        return relax.Var(name, _tensor([size], dtype))

    in_place = (
        (
            "apply_logit_bias_inplace",
            [
                vector("pos2seq_id", "int32", count),
                vector("token_ids", "int32", count),
                vector("logit_bias", "float32", count),
            ],
        ),
        (
            "apply_penalty_inplace",
            [
                vector("seq_ids", "int32", sequences),
                vector("pos2seq_id", "int32", count),
                vector("token_ids", "int32", count),
                vector("token_cnt", "int32", count),
                relax.Var("penalties", _tensor([sequences, 3])),
            ],
        ),
        (
            "apply_bitmask_inplace",
            [
                vector("seq_ids", "int32", sequences),
                relax.Var("bitmask", _tensor([batch, (vocabulary + 31) // 32], "int32")),
            ],
        ),
    )
    for name, others in in_place:
        with builder.function(name, [logits, *others]):
            function = builder.add_func(sampling[name], name.replace("_inplace", "_kernel"))
            done = relax.op.call_tir_inplace(function, [logits, *others], [0], _tensor([batch, vocabulary]))
            builder.emit_func_output(builder.emit(done))

    rows = relax.Var("logits", _tensor([batch, 1, vocabulary]))
    temperature = vector("temperature", "float32", batch)
    with builder.function("softmax_with_temperature", [rows, temperature]):
        function = builder.add_func(sampling["softmax_with_temperature"], "softmax_kernel")
        probabilities = relax.call_tir(function, [rows, temperature], _tensor([batch, 1, vocabulary]))
        builder.emit_func_output(builder.emit(probabilities))

    probs = relax.Var("probs", _tensor([batch, vocabulary]))
    with builder.function("argsort_probs", [probs]):
        if "argsort_probs" in sampling:
            function = builder.add_func(sampling["argsort_probs"], "argsort_kernel")
            types = [_tensor([batch, vocabulary]), _tensor([batch, vocabulary], "int32")]
            builder.emit_func_output(builder.emit(relax.call_tir(function, [probs], types)))
        else:
            indices = builder.emit(relax.op.argsort(probs, axis=1, descending=True, dtype="int32"))
            ordered = builder.emit(relax.op.gather_elements(probs, indices, axis=1))
            builder.emit_func_output(relax.Tuple([ordered, indices]))

    ordered = relax.Var("sorted_probs", _tensor([batch, vocabulary]))
    indices = relax.Var("sorted_indices", _tensor([batch, vocabulary], "int32"))
    others = [
        vector("uniform_samples", "float32", count),
        vector("sample_indices", "int32", count),
        vector("top_p", "float32", batch),
    ]
    with builder.function("sample_with_top_p", [ordered, indices, *others]):
        function = builder.add_func(sampling["sample_with_top_p"], "top_p_kernel")
        sampled = relax.call_tir(function, [ordered, indices, *others], _tensor([count], "int32"))
        builder.emit_func_output(builder.emit(sampled))


@cache
def logit_bias_kernel() -> tirx.PrimFunc:
    """logits[row, token] += bias, for each (row, token, bias)."""

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        logits_handle: T.handle, rows_handle: T.handle, tokens_handle: T.handle, bias_handle: T.handle
    ):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
        batch, vocabulary, count = T.int64(), T.int64(), T.int64()
        logits = T.match_buffer(logits_handle, (batch, vocabulary), "float32")
        rows = T.match_buffer(rows_handle, (count,), "int32")
        tokens = T.match_buffer(tokens_handle, (count,), "int32")
        bias = T.match_buffer(bias_handle, (count,), "float32")
        for i in range(count):
            logits[rows[i], tokens[i]] = logits[rows[i], tokens[i]] + bias[i]

    return kernel


@cache
def penalty_kernel() -> tirx.PrimFunc:
    """Presence, frequency (times how often the token came) and repetition penalties [sequence, 3] of tokens
    that a sequence has."""

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
        batch, vocabulary, count, number = T.int64(), T.int64(), T.int64(), T.int64()
        logits = T.match_buffer(logits_handle, (batch, vocabulary), "float32")
        sequences = T.match_buffer(sequences_handle, (number,), "int32")
        rows = T.match_buffer(rows_handle, (count,), "int32")
        tokens = T.match_buffer(tokens_handle, (count,), "int32")
        counts = T.match_buffer(counts_handle, (count,), "int32")
        penalties = T.match_buffer(penalties_handle, (number, 3), "float32")
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
    """Logits of tokens whose bit is 0 become ``MASKED``; 32 tokens a word, lowest bit first."""

    @T.prim_func(private=True, s_tir=True)
    def kernel(logits_handle: T.handle, sequences_handle: T.handle, bitmask_handle: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
        batch, vocabulary, number, words = T.int64(), T.int64(), T.int64(), T.int64()
        logits = T.match_buffer(logits_handle, (batch, vocabulary), "float32")
        sequences = T.match_buffer(sequences_handle, (number,), "int32")
        bitmask = T.match_buffer(bitmask_handle, (batch, words), "int32")
        for i, token in T.grid(number, vocabulary):
            logits[sequences[i], token] = T.if_then_else(
                T.bitwise_and(
                    T.shift_right(bitmask[sequences[i], token // 32], T.Cast("int32", token % 32)), T.int32(1)
                )
                == T.int32(1),
                logits[sequences[i], token],
                T.float32(MASKED),
            )

    return kernel


@cache
def softmax_kernel() -> tirx.PrimFunc:
    """softmax(logits / temperature); at temperature 0 all of it goes to the first of the largest logits."""

    @T.prim_func(private=True, s_tir=True)
    def kernel(logits_handle: T.handle, temperature_handle: T.handle, y_handle: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
        batch, vocabulary = T.int64(), T.int64()
        logits = T.match_buffer(logits_handle, (batch, 1, vocabulary), "float32")
        temperature = T.match_buffer(temperature_handle, (batch,), "float32")
        y = T.match_buffer(y_handle, (batch, 1, vocabulary), "float32")
        for i in T.parallel(batch):
            with T.sblock("row"):
                T.reads()
                T.writes()
                state = T.alloc_buffer((2,), "float32")  # largest logit, sum of exponentials
                state[0] = T.float32(-3.4e38)
                state[1] = T.float32(0)
                for k in range(vocabulary):
                    state[0] = T.max(state[0], logits[i, 0, k])
                for k in range(vocabulary):
                    y[i, 0, k] = T.if_then_else(
                        temperature[i] < T.float32(1e-6),
                        T.Cast("float32", logits[i, 0, k] == state[0] and state[1] == T.float32(0)),
                        T.exp((logits[i, 0, k] - state[0]) / T.max(temperature[i], T.float32(1e-6))),
                    )
                    state[1] = state[1] + y[i, 0, k]
                for k in range(vocabulary):
                    y[i, 0, k] = y[i, 0, k] / state[1]

    return kernel


@cache
def top_p_kernel() -> tirx.PrimFunc:
    """One token for each uniform number in [0, 1), from the fewest most likely tokens of its row that
    together reach ``top_p``."""

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
        batch, vocabulary, count = T.int64(), T.int64(), T.int64()
        probs = T.match_buffer(probs_handle, (batch, vocabulary), "float32")
        indices = T.match_buffer(indices_handle, (batch, vocabulary), "int32")
        uniform = T.match_buffer(uniform_handle, (count,), "float32")
        rows = T.match_buffer(rows_handle, (count,), "int32")
        top_p = T.match_buffer(top_p_handle, (batch,), "float32")
        y = T.match_buffer(y_handle, (count,), "int32")
        for i in range(count):
            with T.sblock("sample"):
                T.reads()
                T.writes()
                mass = T.alloc_buffer((2,), "float32")  # of the nucleus, and so far
                mass[0] = T.float32(0)
                for k in range(vocabulary):
                    if mass[0] < top_p[rows[i]]:
                        mass[0] = mass[0] + probs[rows[i], k]
                mass[1] = T.float32(0)
                for k in range(vocabulary):
                    if mass[1] <= uniform[i] * mass[0] and mass[1] < top_p[rows[i]]:
                        y[i] = indices[rows[i], k]
                        mass[1] = mass[1] + probs[rows[i], k]

    return kernel
