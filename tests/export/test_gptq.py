"""GPTQ: judged by the paper's formulas in float64, by ONNX Runtime's own operator, and by what it gains."""

import hashlib
import pydoc_data.topics
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from export.errors import ExportError
from export.gptq import (
    DAMPING,
    FourBits,
    as_tensors,
    best_grid,
    from_tensors,
    join,
    moments_of,
    round_columns,
    round_linear_layers,
    round_matrix,
)
from export.onnx import BUILDER_OPTIONS, ROUNDED_OPTIONS, export_onnx
from export.onnx_runtime import OnnxRuntime, genai_greedy
from export.runtime import generate_greedily
from pipeline.fidelity import Fidelity


def inputs_of_layer(columns: int, tokens: int = 600) -> torch.Tensor:
    """Inputs whose columns are not alike and go together, as those of a trained layer do."""
    generator = torch.Generator().manual_seed(3)
    mixed = torch.randn(tokens, 8, generator=generator) @ torch.randn(8, columns, generator=generator)
    own = torch.randn(tokens, columns, generator=generator)
    return (mixed + own) * torch.rand(columns, generator=generator).mul(2).exp()


def weights(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(4)) * 0.1


def of_node(matrix: FourBits, columns: int) -> np.ndarray:
    """What ONNX Runtime's MatMulNBits multiplies with, float32 [N, K]."""
    rows = len(matrix.codes)
    initializers = [
        numpy_helper.from_array(values.astype(np.float32) if name == "scales" else values, name)
        for name, values in matrix._asdict().items()
    ]
    node = helper.make_node(
        "MatMulNBits",
        ["x", *FourBits._fields],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=4,
        block_size=32,
    )
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [columns, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [columns, rows])],
        initializers,
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.eye(columns, dtype=np.float32)})[0].T


def test_columns_are_rounded_as_the_paper_says() -> None:
    """Formulas (2) and (3) of the paper column by column in float64, the inverse updated each time."""
    x, weight = inputs_of_layer(96), weights(8, 96)
    moments = moments_of(x)
    codes, grid = round_columns(weight, moments)

    hessian = (x.T.double() @ x.double() / len(x)).numpy()
    inverse = np.linalg.inv(hessian + DAMPING * hessian.diagonal().mean() * np.eye(96))
    left = weight.double().numpy().copy()
    for column in range(96):
        if column % 32 == 0:
            block = torch.from_numpy(left[:, None, column : column + 32]).float()
            own = best_grid(block, moments.diagonal[None, column : column + 32])
            assert (own.zero_points[:, 0] == grid.zero_points[:, column // 32]).all()
            torch.testing.assert_close(own.scales[:, 0], grid.scales[:, column // 32], rtol=2e-3, atol=0)
        scale, zero = (part[:, column // 32].double().numpy() for part in (grid.scales, grid.zero_points))
        code = np.clip(np.round(left[:, column] / scale) + zero, 0, 15)
        assert (codes[:, column].numpy() == code).all(), column
        error = (left[:, column] - (code - zero) * scale) / inverse[column, column]
        left -= np.outer(error, inverse[column])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]


def test_what_the_layer_answers_is_nearer_than_by_rounding_to_the_nearest() -> None:
    x, weight = inputs_of_layer(128), weights(64, 128)
    moments = moments_of(x)
    grid = best_grid(weight.unflatten(1, (4, 32)), moments.diagonal.unflatten(0, (4, 32)))
    scales, zeros = (part.repeat_interleave(32, 1) for part in (grid.scales, grid.zero_points))
    nearest = (((weight / scales).round() + zeros).clamp(0, 15) - zeros) * scales
    _, rounded = round_matrix(weight, moments)

    def lost(other: torch.Tensor) -> float:
        return float((x @ (other - weight).T).square().mean())

    assert lost(rounded) < 0.6 * lost(nearest)


def test_the_grid_is_as_good_as_any_range_with_the_best_scale() -> None:
    """Weighed squared errors in float64 of a plain grid over the whole range, which it must not exceed."""
    weight, importance = weights(5, 64), torch.rand(64).mul(3).exp()
    grid = best_grid(weight.unflatten(1, (2, 32)), importance.unflatten(0, (2, 32)))
    assert grid.zero_points.frac().abs().max() == 0
    assert 0 <= grid.zero_points.min() <= grid.zero_points.max() <= 15
    assert (grid.scales.half().float() == grid.scales).all()

    def error(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        blocks = weight.unflatten(1, (2, 32)).double()
        codes = ((blocks / scales[..., None]).round() + zeros[..., None]).clamp(0, 15)
        lost = (codes - zeros[..., None]) * scales[..., None] - blocks
        return (lost.square() * importance.unflatten(0, (2, 32))).sum(-1)

    blocks = weight.unflatten(1, (2, 32)).double()
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    plain = (high - low) / 15
    assert (
        error(grid.scales.double(), grid.zero_points.double()) <= 1.001 * error(plain, (-low / plain).round())
    ).all()


@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (7, 96), (5, 80)])
def test_onnx_runtime_reads_the_numbers_that_were_meant(rows: int, columns: int) -> None:
    """Also with an odd number of blocks, and with a last block that is not full."""
    packed, values = round_matrix(weights(rows, columns), moments_of(inputs_of_layer(columns)))
    assert np.abs(of_node(packed, columns) - values.numpy()).max() < 1e-6
    other, more = round_matrix(weights(3, columns) * 2, moments_of(inputs_of_layer(columns)))
    both = of_node(join([packed, other]), columns)
    assert np.abs(both - torch.cat([values, more]).numpy()).max() < 1e-6


def test_columns_that_are_never_used_and_blocks_of_zeros() -> None:
    x, weight = inputs_of_layer(64), weights(4, 64)
    x[:, 5] = 0
    weight[1, :32] = 0
    weight[2, 32:] = weight[2, 32:].abs() + 0.05
    packed, values = round_matrix(weight, moments_of(x))
    assert np.isfinite(packed.scales).all()
    assert (values[1, :32] == 0).all()
    assert (values - weight).abs().max() < 0.06
    assert np.abs(of_node(packed, 64) - values.numpy()).max() < 1e-6


@pytest.fixture(scope="module")
def text_ids(tiny_tokenizer: Any) -> np.ndarray:
    """Rows of English: eight to calibrate on, four to judge by."""
    ids = tiny_tokenizer("\n\n".join(pydoc_data.topics.topics.values())[:40_000])["input_ids"][: 12 * 128]
    return np.array(ids, np.int32).reshape(12, 128)


@pytest.fixture(scope="module")
def rounded(tiny_model_dir: Path, text_ids: np.ndarray) -> dict[str, FourBits]:
    return round_linear_layers(tiny_model_dir, list(text_ids[:8]), threads=1)


@pytest.fixture(scope="module")
def exported(
    tiny_model_dir: Path, rounded: dict[str, FourBits], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("gptq") / "tiny-ONNX"
    return export_onnx(tiny_model_dir, folder, "tiny", ["int4"], rounded=rounded, threads=1)[0]


def test_every_layer_but_the_head_is_rounded(
    tiny_model_dir: Path, text_ids: np.ndarray, rounded: dict[str, FourBits]
) -> None:
    assert len(rounded) == 4 * 7
    assert rounded["model.layers.3.mlp.down_proj"].codes.shape == (128, 8, 16)
    assert "lm_head" not in rounded
    again = round_linear_layers(tiny_model_dir, list(text_ids[:8]), threads=1)
    tensors = as_tensors(rounded)
    for name, values in as_tensors(again).items():
        assert values.tobytes() == tensors[name].tobytes(), name
    kept = as_tensors(from_tensors(tensors))
    assert all(kept[name] is values for name, values in tensors.items())


def test_later_layers_make_up_for_earlier_ones(
    tiny_model_dir: Path, text_ids: np.ndarray, rounded: dict[str, FourBits]
) -> None:
    """The second layer's moments are those behind a first layer that is rounded already."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    first, second = model.model.layers[:2]
    for name, module in first.named_modules():
        if isinstance(module, torch.nn.Linear):
            values = of_node(rounded[f"model.layers.0.{name}"], module.in_features)
            module.weight.data = torch.from_numpy(values.copy())
    seen: list[torch.Tensor] = []
    second.self_attn.q_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(torch.from_numpy(text_ids[:8].astype(np.int64)))
    # Without the first token of each row.
    x = seen[0][:, 1:].flatten(0, 1)
    expected, _ = round_matrix(second.self_attn.q_proj.weight.data, moments_of(x))
    codes = rounded["model.layers.1.self_attn.q_proj"].codes
    assert (codes == expected.codes).mean() > 0.99


def test_first_tokens_of_documents_are_not_counted(tiny_model_dir: Path, text_ids: np.ndarray) -> None:
    """Of a first layer's queries, whose input is the normalized embedding of the token alone."""
    rows, name = [row.copy() for row in text_ids[:4]], "model.layers.0.self_attn.q_proj"
    positions = [np.concatenate([np.arange(50), np.arange(78)])] * 4

    def queries() -> bytes:
        return round_linear_layers(tiny_model_dir, rows, positions, threads=1)[name].codes.tobytes()

    before = queries()
    for row in rows:
        row[[0, 50]] = 7
    assert queries() == before
    for row in rows:
        row[1:20] = 7
    assert queries() != before


def mean_kl(model_dir: Path, path: Path, rows: np.ndarray) -> float:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    runtime, fidelity = OnnxRuntime(path), Fidelity()
    for row in rows:
        with torch.no_grad():
            expected = model(torch.from_numpy(row.astype(np.int64))[None]).logits[0].numpy()
        runtime.reset()
        fidelity.add(expected, runtime.forward(row.tolist()), np.zeros(len(row), dtype=int))
    runtime.close()
    return fidelity.statistics()["mean_kl"]


def test_int4_is_nearer_to_the_model_than_rounding_to_the_nearest(
    tiny_model_dir: Path,
    text_ids: np.ndarray,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BUILDER_OPTIONS, "int4", ROUNDED_OPTIONS)
    nearest = export_onnx(tiny_model_dir, tmp_path / "nearest", "tiny", ["int4"], threads=1)[0]
    assert exported.stat().st_size < 1.01 * nearest.stat().st_size
    lost = mean_kl(tiny_model_dir, exported, text_ids[8:])
    assert lost < 0.85 * mean_kl(tiny_model_dir, nearest, text_ids[8:])


def test_the_graph_holds_the_rounded_layers_and_is_the_same_each_time(
    tiny_model_dir: Path, rounded: dict[str, FourBits], exported: Path, tmp_path: Path
) -> None:
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(exported).graph.initializer}
    prefix = "model.layers.2.attn.qkv_proj.MatMul.weight"
    parts = [rounded[f"model.layers.2.self_attn.{part}_proj"] for part in "qkv"]
    assert (tensors[f"{prefix}_Q4G32"] == np.concatenate([part.codes for part in parts])).all()
    assert (tensors[f"{prefix}_scale_f16"] == np.concatenate([part.scales for part in parts])).all()
    assert (tensors[f"{prefix}_zp"] == np.concatenate([part.zero_points for part in parts])).all()
    again = export_onnx(tiny_model_dir, tmp_path / "again", "tiny", ["int4"], rounded=rounded, threads=1)[0]
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (exported, again)]
    assert hashes[0] == hashes[1]


def test_genai_runs_it_as_plain_onnxruntime_does(exported: Path, text_ids: np.ndarray) -> None:
    prompt = text_ids[9, :30].tolist()
    runtime = OnnxRuntime(exported)
    ours, theirs = generate_greedily(runtime, prompt, 16), genai_greedy(exported.parent.parent, prompt, 16)
    same = next((n for n, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other), None)
    if same is not None:
        runtime.reset()
        logits = runtime.forward([*prompt, *ours[:same]])[-1]
        assert abs(logits[ours[same]] - logits[theirs[same]]) < 0.1  # a near tie


def qwen3(vocabulary: int) -> Any:
    """Projections that the builder does not pack into one, for the norms between; a head of its own."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            initializer_range=0.1,
            eos_token_id=2,
        )
    )


def gemma3(vocabulary: int) -> Any:
    """Four norms a layer, other names around the same projections."""
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=7,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=16,
            max_position_embeddings=256,
            initializer_range=0.1,
            eos_token_id=2,
            pad_token_id=0,
            bos_token_id=1,
        )
    )


@pytest.mark.parametrize("family", [qwen3, gemma3])
def test_other_families(family: Any, tiny_tokenizer: Any, text_ids: np.ndarray, tmp_path: Path) -> None:
    torch.manual_seed(2)
    family(len(tiny_tokenizer)).eval().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    rounded = round_linear_layers(tmp_path / "model", list(text_ids[:8]), threads=1)
    path = export_onnx(tmp_path / "model", tmp_path / "out", "x", ["int4"], rounded=rounded, threads=1)[0]
    assert mean_kl(tmp_path / "model", path, text_ids[8:9]) < 0.1


def test_what_does_not_fit_is_told(
    tiny_model_dir: Path, rounded: dict[str, FourBits], tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="GPTQ: there is no text"):
        round_linear_layers(tiny_model_dir, [], threads=1)
    with pytest.raises(ExportError, match="cannot be loaded in transformers"):
        round_linear_layers(tmp_path, [np.arange(8)], threads=1)
    fewer = {name: matrix for name, matrix in rounded.items() if not name.endswith("layers.1.mlp.up_proj")}
    with pytest.raises(ExportError, match=r"layers\.1/mlp/up_proj.* was not rounded by GPTQ"):
        export_onnx(tiny_model_dir, tmp_path / "out", "x", ["int4"], rounded=fewer, threads=1)
    more = rounded | {"model.layers.4.mlp.up_proj": rounded["model.layers.3.mlp.up_proj"]}
    with pytest.raises(ExportError, match=r"has no layer model\.layers\.4\.mlp\.up_proj"):
        export_onnx(tiny_model_dir, tmp_path / "out", "x", ["int4"], rounded=more, threads=1)
    assert not list(tmp_path.iterdir())
