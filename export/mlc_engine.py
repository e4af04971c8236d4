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
NOTHING = -5.0e4
"""Logarithm of a sum of exponentials that has no summand, as TVM's kernels of the cache have it."""


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
        arguments = [ids, *self.weights(f"{a.prefix}.embed_tokens")]
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

    def scale(self, x: relax.Var, count: Any) -> relax.Var:
        """x * embedding_scale."""
        width = self.a.hidden_size
        kernel = kernels.scale_kernel(width, self.a.embedding_scale)
        return self.call(kernel, "scale", [x], [count, width])

    def join(self, parts: list[relax.Var], width: int, count: Any) -> relax.Var:
        """Queries, keys and values side by side."""
        return self.call(kernels.join_kernel(self.a), "join", parts, [count, width])

    def turns(self, positions: relax.Var, theta: float, count: Any) -> relax.Var:
        """Cosine and sine of every rotary angle of the tokens at int32 positions [T], [T, 2, D / 2]."""
        kernel = turns_at_kernel(self.a.head_dim, theta)
        return self.call(kernel, "turns_at", [positions], [count, 2, self.a.head_dim // 2])

    def rotate(self, x: relax.Var, turns: relax.Var, width: int, count: Any) -> relax.Var:
        """Queries and keys turned; values as they are."""
        return self.call(rotate_kernel(self.a), "rotate", [x, turns], [count, width])

    def gate(self, x: relax.Var, count: Any) -> relax.Var:
        """activation(gate) * up, of x = [gate, up]."""
        width, activation = self.a.intermediate_size, self.a.activation
        return self.call(kernels.gate_kernel(width, activation), f"{activation}_gate", [x], [count, width])

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
        if a.embedding_scale != 1:
            x = caller.scale(x, tokens)
        turns: dict[float, relax.Var] = {}
        if a.windowed:  # the cache knows one base of the rotary embedding for all layers
            places = builder.emit(
                relax.call_pure_packed(
                    "vm.builtin.attention_kv_cache_get_query_positions",
                    paged,
                    ty_args=_tensor([tokens], "int32"),
                )
            )
            turns = {theta: caller.turns(places, theta, tokens) for theta in a.thetas()}
        for number in range(a.layers):
            prefix = f"{a.prefix}.layers.{number}"
            attention = f"{prefix}.self_attn.{a.attention_name}"
            y = caller.norm(x, f"{prefix}.input_layernorm.weight", tokens)
            parts = [
                caller.multiply(y, f"{prefix}.self_attn.{part}", rows, a.hidden_size, tokens)
                for part, rows in a.attention_parts()
            ]
            y = parts[0] if len(parts) == 1 else caller.join(parts, width, tokens)
            if a.attention_bias:
                y = caller.bias(y, f"{attention}.bias", width, tokens)
            if a.head_norms:
                y = caller.head_norm(y, f"{prefix}.self_attn", width, tokens)
            if turns:
                y = caller.rotate(y, turns[a.theta_of(number)], width, tokens)
            y = builder.emit(
                relax.call_dps_packed(
                    "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
                    [
                        paged,
                        relax.prim_value(number),
                        relax.prim_value(T.float32(a.attention_scale)),
                        caller.reshape(y, [tokens, heads + 2 * groups, dim]),
                    ],
                    out_ty=_tensor([tokens, heads, dim]),
                )
            )
            y = caller.reshape(y, [tokens, heads * dim])
            y = caller.multiply(y, f"{prefix}.self_attn.o_proj", a.hidden_size, heads * dim, tokens)
            if a.output_norms:
                y = caller.norm(y, f"{prefix}.post_attention_layernorm.weight", tokens)
            x = caller.add(x, y, tokens)
            before = "pre_feedforward_layernorm" if a.output_norms else "post_attention_layernorm"
            y = caller.norm(x, f"{prefix}.{before}.weight", tokens)
            gate = f"{prefix}.mlp.gate_up_proj"
            y = caller.multiply(y, gate, 2 * a.intermediate_size, a.hidden_size, tokens)
            y = caller.gate(y, tokens)
            y = caller.multiply(y, f"{prefix}.mlp.down_proj", a.hidden_size, a.intermediate_size, tokens)
            if a.output_norms:
                y = caller.norm(y, f"{prefix}.post_feedforward_layernorm.weight", tokens)
            x = caller.add(x, y, tokens)
        rows: Any = tokens
        if positions == "given":
            x, rows = builder.emit(relax.op.take(x, where[0], axis=0, mode="clip")), asked
        elif positions == "last":
            x, rows = caller.last(x), 1
        x = caller.norm(x, f"{a.prefix}.norm.weight", rows)
        head = f"{a.prefix}.embed_tokens" if a.tied else "lm_head"
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
    kinds = ["mha_sliding" if a.window_of(number) else "mha" for number in range(a.layers)]
    with builder.function("create_tir_paged_kv_cache", arguments):
        made = TIRPagedKVCache(
            kinds,
            *sizes,
            layer_partition=relax.ShapeExpr([0, a.layers]),
            num_hidden_layers=a.layers,
            num_attention_heads=a.heads,
            num_key_value_heads=a.key_value_heads,
            qk_head_dim=a.head_dim,
            v_head_dim=a.head_dim,
            mla_original_qk_head_dim=0,
            mla_original_v_head_dim=0,
            # Layers with bases of their own are rotated before they reach the cache.
            rope_mode=RopeMode.NONE if a.windowed else RopeMode.NORMAL,
            rope_scale=1,
            rope_theta=a.rope_theta,
            rope_scaling={},
            rope_ext_factors=relax.prim_value(0),
            rotary_dim=a.head_dim,
            enable_disaggregation=False,
            dtype="float32",
            target=described,
            **({"layer_sliding_window_size": a.window} if a.windowed else {}),
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
def turns_at_kernel(dim: int, theta: float) -> tirx.PrimFunc:
    """Cosine and sine of every rotary angle, [T, 2, D / 2], of tokens at the positions given."""
    half = dim // 2

    @T.prim_func(private=True, s_tir=True)
    def kernel(positions_handle: T.handle, y_handle: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
        tokens = T.int64()
        # The cache's own array, which begins anywhere in its memory.
        begin = T.int32()
        positions = T.match_buffer(positions_handle, (tokens,), "int32", elem_offset=begin)
        y = T.match_buffer(y_handle, (tokens, 2, half), "float32")
        for k in range(half):
            with T.sblock("pair"):
                T.reads()
                T.writes()
                frequency = T.alloc_buffer((1,), "float64")
                frequency[0] = T.pow(T.float64(theta), T.Cast("float64", k) * T.float64(-2.0 / dim))
                for i in range(tokens):
                    y[i, 0, k] = T.Cast("float32", T.cos(T.Cast("float64", positions[i]) * frequency[0]))
                    y[i, 1, k] = T.Cast("float32", T.sin(T.Cast("float64", positions[i]) * frequency[0]))

    return kernel


@cache
def rotate_kernel(a: "kernels.Architecture") -> tirx.PrimFunc:
    """Rotates queries and keys; halves of a head are the pairs."""
    turned, groups, dim = a.heads + a.key_value_heads, a.key_value_heads, a.head_dim
    half, width = dim // 2, (a.heads + 2 * a.key_value_heads) * a.head_dim

    @T.prim_func(private=True, s_tir=True)
    def kernel(x_handle: T.handle, turns_handle: T.handle, y_handle: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8, "tirx.noalias": True})
        tokens = T.int64()
        x = T.match_buffer(x_handle, (tokens, width), "float32")
        turns = T.match_buffer(turns_handle, (tokens, 2, half), "float32")
        y = T.match_buffer(y_handle, (tokens, width), "float32")
        for i in range(tokens):
            for h, k in T.grid(turned, half):
                y[i, h * dim + k] = (
                    x[i, h * dim + k] * turns[i, 0, k] - x[i, h * dim + half + k] * turns[i, 1, k]
                )
                y[i, h * dim + half + k] = (
                    x[i, h * dim + half + k] * turns[i, 0, k] + x[i, h * dim + k] * turns[i, 1, k]
                )
            for k in range(groups * dim):
                y[i, turned * dim + k] = x[i, turned * dim + k]

    return kernel


def replace_kernel(module: Any, name: str, kernel: tirx.PrimFunc) -> None:
    """Puts a kernel in the place of one that TVM's cache brought.

    Args:
        module: a finished module with ``create_tir_paged_kv_cache``; changed in place.
        name: of the kernel in the module.
        kernel: with the same interface.
    """
    module[name] = kernel.with_attr("global_symbol", module[name].attrs["global_symbol"])


@cache
def window_kernel(a: "kernels.Architecture") -> tirx.PrimFunc:
    """Attention of new tokens over what the paged cache held before, for layers with a window.

    TVM's own kernel for CPUs begins with a maximum that nothing has set where the first key lies outside of
    the window, and divides by zero where all keys do.

    The interface is that of TVM's kernels. Query i of a sequence sees the last ``window`` - 1 - i tokens of
    its pages. ``lse`` is the logarithm of the sum of exponentials, to base 2; ``NOTHING`` where a query sees
    none, which TVM's kernel that joins two attentions then gives no weight.
    """
    heads, groups, dim, window = a.heads, a.key_value_heads, a.head_dim, a.window
    repeat = heads // groups

    @T.prim_func(s_tir=True)
    def kernel(
        q_handle: T.handle,
        q_begins_handle: T.handle,
        pages_handle: T.handle,
        page_begins_handle: T.handle,
        page_numbers_handle: T.handle,
        lengths_handle: T.handle,
        k_positions_handle: T.handle,
        q_positions_handle: T.handle,
        y_handle: T.handle,
        lse_handle: T.handle,
        causal: T.int32,
        rotary_mode: T.int32,
        rope_scale: T.float32,
        rope_theta: T.float32,
        scale: T.float32,
    ):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8})
        batch, tokens, numbers, count = T.int32(), T.int32(), T.int32(), T.int32()
        # The cache's own arrays, which begin anywhere in its memory.
        begin_0, begin_1, begin_2, begin_3 = T.int32(), T.int32(), T.int32(), T.int32()
        begin_4, begin_5 = T.int32(), T.int32()
        q = T.match_buffer(q_handle, (tokens, heads, dim), "float32")
        q_begins = T.match_buffer(q_begins_handle, (batch + 1,), "int32", elem_offset=begin_0)
        pages = T.match_buffer(pages_handle, (count, 2, groups, 16, dim), "float32")
        page_begins = T.match_buffer(page_begins_handle, (batch + 1,), "int32", elem_offset=begin_1)
        page_numbers = T.match_buffer(page_numbers_handle, (numbers,), "int32", elem_offset=begin_2)
        # Tokens in the last page, where the first page begins to count, and tokens that never leave.
        lengths = T.match_buffer(lengths_handle, (3, batch), "int32", elem_offset=begin_3)
        T.match_buffer(k_positions_handle, (batch,), "int32", elem_offset=begin_4)
        T.match_buffer(q_positions_handle, (tokens,), "int32", elem_offset=begin_5)
        y = T.match_buffer(y_handle, (tokens, heads, dim), "float32")
        lse = T.match_buffer(lse_handle, (tokens, heads), "float32")
        for h, b in T.grid(heads, batch):
            for i in range(q_begins[b + 1] - q_begins[b]):
                with T.sblock("query"):
                    T.reads()
                    T.writes()
                    total = T.alloc_buffer((dim,), "float32")
                    state = T.alloc_buffer((4,), "float32")  # maximum, sum, score, factor of what was
                    place = T.alloc_buffer((2,), "int32")  # tokens in the pages, first that is seen
                    place[0] = T.if_then_else(
                        page_begins[b + 1] > page_begins[b],
                        (page_begins[b + 1] - page_begins[b] - 1) * 16 + lengths[0, b] - lengths[1, b],
                        0,
                    )
                    place[1] = T.if_then_else(causal > 0, T.max(place[0] - T.max(window - 1 - i, 0), 0), 0)
                    state[0] = T.float32(NOTHING)
                    state[1] = T.float32(0)
                    for k in range(dim):
                        total[k] = T.float32(0)
                    for j in range(place[0] - place[1]):
                        state[2] = T.float32(0)
                        for k in range(dim):
                            state[2] = (
                                state[2]
                                + q[q_begins[b] + i, h, k]
                                * pages[
                                    page_numbers[page_begins[b] + (lengths[1, b] + place[1] + j) // 16],
                                    0,
                                    h // repeat,
                                    (lengths[1, b] + place[1] + j) % 16,
                                    k,
                                ]
                            )
                        state[2] = state[2] * scale * T.float32(1.4426950408889634)
                        state[3] = T.exp2(state[0] - T.max(state[0], state[2]))
                        state[0] = T.max(state[0], state[2])
                        state[2] = T.exp2(state[2] - state[0])
                        state[1] = state[1] * state[3] + state[2]
                        for k in range(dim):
                            total[k] = (
                                total[k] * state[3]
                                + state[2]
                                * pages[
                                    page_numbers[page_begins[b] + (lengths[1, b] + place[1] + j) // 16],
                                    1,
                                    h // repeat,
                                    (lengths[1, b] + place[1] + j) % 16,
                                    k,
                                ]
                            )
                    for k in range(dim):
                        y[q_begins[b] + i, h, k] = T.if_then_else(
                            place[0] > place[1], total[k] / state[1], T.float32(0)
                        )
                    lse[q_begins[b] + i, h] = T.if_then_else(
                        place[0] > place[1], state[0] + T.log2(state[1]), T.float32(NOTHING)
                    )

    return kernel


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
