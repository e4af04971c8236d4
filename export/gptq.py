"""GPTQ: matrices rounded to four bits one column after the other, where the columns that are left make up for
the error of those that are done (Frantar et al. 2022, arXiv:2210.17323). What an error is worth is measured
in torch on text that the caller names."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from export.errors import ExportError
from export.torch_runtime import load_in_torch

BLOCK = 32
"""Columns of a row that share a scale and a zero point."""
HIGHEST = 15
"""The largest code; the smallest is 0."""
DAMPING = 0.05
"""Part of the moments' mean diagonal that is added to the diagonal."""
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Parts of a block's range that its codes may span, of which the best is taken."""


class FourBits(NamedTuple):
    """A matrix of N rows and K columns in four bits, as ONNX Runtime's MatMulNBits stores it: the value of a
    weight is (code - zero point) * scale. K is padded to whole blocks, B of them."""

    codes: np.ndarray
    """uint8 [N, B, 16]: two codes a byte, the first in the low bits."""
    scales: np.ndarray
    """float16 [N, B]."""
    zero_points: np.ndarray
    """uint8 [N, ceil(B / 2)], packed likewise."""


@dataclass(frozen=True)
class Grid:
    """Where codes lie: ``scales`` (numbers of float16) and ``zero_points`` of each block, float32 [N, B]."""

    scales: Tensor
    zero_points: Tensor


@dataclass(frozen=True)
class Moments:
    """Second moments of what a matrix is multiplied with.

    ``diagonal`` [K] is the mean square of each column; ``factor`` [K, K] the upper triangular Cholesky factor
    of the inverse of the damped moments. Both float32.
    """

    diagonal: Tensor
    factor: Tensor


def round_linear_layers(
    model_dir: Path,
    rows: Sequence[np.ndarray],
    position_ids: Sequence[np.ndarray] | None = None,
    *,
    threads: int = 2,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, FourBits]:
    """Runs a model over text, all rows at once, and rounds each linear layer but the head when the text
    reaches it. What comes after it sees the rounded layer, and makes up for it as well.

    The first token of a document is not counted: attention uses it as a place to rest, and what is in it
    there, which is larger than anything else by orders of magnitude, says nothing about text.

    Args:
        model_dir: folder with safetensors and configuration.
        rows: token ids ``[T]`` of each row; those that are not as long as the first one are left out.
        position_ids: positions ``[T]`` of each row, which begin at 0 with each document; 0 to T - 1 if left
            out.
        threads: CPU threads. The result depends on their number in the last digit of sums.
        progress: receives a line at each layer.

    Returns:
        The rounded layers by their names in transformers (``model.layers.0.self_attn.q_proj``).

    Raises:
        ExportError: there is no text, or the model cannot be loaded.
    """
    even = [number for number, row in enumerate(rows) if len(row) == len(rows[0])]
    ids = torch.from_numpy(np.array([rows[number] for number in even], np.int64))
    if ids.numel() == 0:
        raise ExportError("GPTQ: there is no text to measure errors on.")
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    if position_ids is not None:
        positions = torch.from_numpy(np.array([position_ids[number] for number in even], np.int64))
    torch.set_num_threads(threads)
    model = load_in_torch(model_dir)
    counted = positions.flatten() > 0
    rounded: dict[str, FourBits] = {}
    # Projections beside each other have one input.
    latest: dict[str, Any] = {"input": None}

    def round_before(name: str) -> Callable[[Any, Any], None]:
        def before_forward(module: torch.nn.Linear, inputs: tuple[Tensor, ...]) -> None:
            if latest["input"] is not inputs[0]:
                progress(f"GPTQ: {name}")
                x = inputs[0].flatten(0, -2)[counted]
                latest.update(input=inputs[0], moments=moments_of(x))
            rounded[name], module.weight.data = round_matrix(module.weight, latest["moments"])

        return before_forward

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            module.register_forward_pre_hook(round_before(name))
    with torch.no_grad():
        model.base_model(ids, position_ids=positions, use_cache=False)
    return rounded


def moments_of(x: Tensor) -> Moments:
    """Second moments of inputs ``[T, K]``.

    A column that is always zero gets the moment 1, and is then rounded by itself.
    """
    moments = x.T @ x / max(len(x), 1)
    diagonal = moments.diagonal()
    diagonal[diagonal == 0] = 1
    damped = moments + DAMPING * diagonal.mean() * torch.eye(len(moments))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return Moments(diagonal.clone(), torch.linalg.cholesky(inverse, upper=True))


def round_matrix(weight: Tensor, moments: Moments) -> tuple[FourBits, Tensor]:
    """Rounds a matrix ``[N, K]``; returns it packed, and as float32 numbers ``[N, K]``."""
    size = weight.shape[1]
    blocks = -(-size // BLOCK)
    found, grid = round_columns(weight, moments)
    codes = grid.zero_points.repeat_interleave(BLOCK, 1)
    codes[:, :size] = found
    values = (codes.unflatten(1, (blocks, BLOCK)) - grid.zero_points[..., None]) * grid.scales[..., None]
    packed = FourBits(
        codes=_pairs(codes).reshape(len(weight), blocks, BLOCK // 2),
        scales=grid.scales.half().numpy(),
        zero_points=_pairs(torch.nn.functional.pad(grid.zero_points, (0, blocks % 2))),
    )
    return packed, values.flatten(1)[:, :size].contiguous()


def best_grid(blocks: Tensor, importance: Tensor) -> Grid:
    """Scale and zero point of each block with the least squared error, weighed by importance, of those tried.

    Each range that is tried gives a zero point and codes; the scale is then the best one for these codes.

    Args:
        blocks: weights ``[N, B, C]``, of C columns a block.
        importance: mean squares of the columns ``[B, C]``.
    """
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    smallest = torch.finfo(torch.float16).tiny
    least = torch.full(low.shape, torch.inf)
    scales, zero_points = torch.full_like(low, smallest), torch.zeros_like(low)
    for shrink in SHRINKS:
        scale = ((high - low) * shrink / HIGHEST).clamp(min=smallest)
        zero = (-low * shrink / scale).round()
        steps = ((blocks / scale[..., None]).round() + zero[..., None]).clamp(0, HIGHEST) - zero[..., None]
        weighed = steps * importance
        along, square = (weighed * blocks).sum(-1), (weighed * steps).sum(-1)
        # The error of the best scale, less what no scale changes.
        error = torch.where(square > 0, -(along**2) / square, 0)
        better = error < least
        least = torch.where(better, error, least)
        scales = torch.where(better & (square > 0), along / square, scales)
        zero_points = torch.where(better, zero, zero_points)
    return Grid(scales.clamp(min=smallest).half().float(), zero_points)


def round_columns(weight: Tensor, moments: Moments) -> tuple[Tensor, Grid]:
    """Codes ``[N, K]`` of a matrix by GPTQ, and the grid, which is chosen for each block when its turn comes,
    for the weights as they are by then."""
    left = weight.T.clone(memory_format=torch.contiguous_format)
    codes = torch.empty_like(left)
    grids = []
    for start in range(0, len(left), BLOCK):
        end = min(start + BLOCK, len(left))
        grid = best_grid(left[start:end].T[:, None], moments.diagonal[None, start:end])
        grids.append(grid)
        scale, zero = grid.scales[:, 0].contiguous(), grid.zero_points[:, 0].contiguous()
        factor = moments.factor[start:end, start:]
        errors = torch.empty(end - start, left.shape[1])
        for column in range(end - start):
            now = left[start + column]
            code = (now / scale).round_().add_(zero).clamp_(0, HIGHEST)
            codes[start + column] = code
            errors[column] = (now - (code - zero) * scale) / factor[column, column]
            rest = slice(column + 1, end - start)
            left[start:end][rest].addr_(factor[column, rest], errors[column], alpha=-1)
        left[end:].addmm_(factor[:, end - start :].T, errors, alpha=-1)
    scales, zero_points = (
        torch.cat([getattr(grid, part) for grid in grids], 1) for part in ("scales", "zero_points")
    )
    return codes.T, Grid(scales, zero_points)


def join(matrices: Sequence[FourBits]) -> FourBits:
    """Matrices of equally many columns as one, the rows of the first on top."""
    return FourBits(*(np.concatenate(parts) for parts in zip(*matrices, strict=True)))


def as_tensors(rounded: Mapping[str, FourBits]) -> dict[str, np.ndarray]:
    """For a safetensors file: ``NAME.codes``, ``NAME.scales`` and ``NAME.zero_points`` of each layer."""
    return {
        f"{name}.{part}": values
        for name, matrix in rounded.items()
        for part, values in matrix._asdict().items()
    }


def from_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, FourBits]:
    """What ``as_tensors`` made tensors of."""
    names = {name.rpartition(".")[0] for name in tensors}
    return {
        name: FourBits(*(tensors[f"{name}.{part}"] for part in FourBits._fields)) for name in sorted(names)
    }


def _pairs(codes: Tensor) -> np.ndarray:
    """Packs codes ``[N, K]``, K even, two a byte."""
    numbers = codes.to(torch.uint8).numpy()
    return numbers[:, ::2] | numbers[:, 1::2] << 4
