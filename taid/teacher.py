"""The teacher's final hidden states, computed live or read from disk.

The full distribution follows from the final hidden state and the head, so caching that state keeps the
distribution exact for the price of the head alone: ``H`` numbers a token instead of ``V``.

Besides what every cache holds (``taid.cache``), its folder has::

    head.safetensors          the teacher's head: weight, bias if any
    hidden-00000.npy, ...     [rows, T, H] float32, float16, or bfloat16 as uint16
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from taid.cache import (
    SHARD_BYTES,
    BlockCache,
    data_digest,
    index_arrays,
    publish,
    rows_per_shard,
    sha256,
    write_cache,
)
from taid.errors import TaidError
from taid.fused import HeadOptions
from taid.heads import decoder_layers, final_hidden_states, head_options, head_weight

FORMAT = "taid-hidden-states"
VERSION = 2
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@runtime_checkable
class Teacher(Protocol):
    """What distillation asks of a teacher.

    Attributes:
        head_weight: ``[V, H]``.
        head_options: bias, scale and soft-capping of the logits.
        head_bias: ``[V]`` or None, the same bias.
        vocabulary_size: V, rows of the head.
    """

    head_weight: Tensor
    head_options: HeadOptions
    vocabulary_size: int

    @property
    def head_bias(self) -> Tensor | None: ...

    def hidden_states(
        self,
        input_ids: Tensor,
        index: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states ``[B, T, H]`` after the final norm, without gradient, on ``input_ids``' device.

        Args:
            input_ids: ``[B, T]``.
            index: ``[B]``, each block's number in the training data; only a cache reads it.
            position_ids: ``[B, T]``, where several documents share a block.
            attention_mask: ``[B, T]``, where blocks are padded.
        """
        ...


class LiveTeacher:
    """A model that computes its hidden states when asked."""

    def __init__(self, model: Any):
        """
        Args:
            model: a `transformers` causal language model. It is put into evaluation mode and frozen.
        """
        self._take(model.eval().requires_grad_(False))

    def _take(self, model: Any) -> None:
        self.model = model
        self.head_weight = head_weight(model)
        self.head_options = head_options(model)
        self.vocabulary_size = self.head_weight.shape[0]

    @property
    def head_bias(self) -> Tensor | None:
        """``[V]`` or None."""
        return self.head_options.bias

    def to(self, device: torch.device | str) -> "LiveTeacher":
        """Moves the model to a device."""
        if self.head_weight.device != torch.device(device):
            self._take(self.model.to(device))
        return self

    @torch.no_grad()
    def hidden_states(
        self,
        input_ids: Tensor,
        index: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """See ``Teacher.hidden_states``."""
        return final_hidden_states(
            self.model, input_ids, position_ids=position_ids, attention_mask=attention_mask
        )


def shard_teacher(model: Any) -> LiveTeacher:
    """A live teacher whose weights are divided among the ranks of the process group (FSDP2).

    Each layer is whole only while it computes. Every rank must ask for hidden states at the same time, as
    data-parallel training does. The head, which the loss reads, stays whole on every rank.

    Args:
        model: a `transformers` causal language model, the same on every rank, on its device.

    Raises:
        TaidError: there is no process group, or the model keeps no list of layers.
    """
    if not torch.distributed.is_initialized():
        raise TaidError("A teacher is sharded among the ranks of a process group; start under torchrun.")
    decoder = model.eval().requires_grad_(False).get_decoder()
    for layer in decoder_layers(model):
        fully_shard(layer)
    fully_shard(decoder, reshard_after_forward=True)
    return LiveTeacher(model)


class CachedTeacher:
    """Hidden states that ``write_hidden_state_cache`` left on disk, looked up by block index."""

    def __init__(self, folder: Path | str, verify: bool = True):
        """
        Args:
            folder: a finished cache.
            verify: read every shard once and compare its SHA-256.

        Raises:
            TaidError: the folder is no finished cache, or a file of it is missing or damaged.
        """
        self._cache = BlockCache(folder, FORMAT, VERSION, "hidden-state", verify)
        self.folder, self.meta = self._cache.folder, self._cache.meta
        try:
            self.dtype = DTYPES[self.meta["dtype"]]
            logit_scale, softcap = self.meta["head"]["logit_scale"], self.meta["head"]["softcap"]
        except (KeyError, TypeError) as error:
            raise self._cache.incomplete(error) from None
        self._cache.require_type(_to_array(torch.empty(0, dtype=self.dtype)).dtype)
        try:
            head = load_file(self.folder / "head.safetensors")
        except (OSError, SafetensorError) as error:
            raise TaidError(f"{self.folder / 'head.safetensors'}: cannot be read ({error}).") from None
        self.head_weight = head["weight"]
        self.head_options = HeadOptions(head.get("bias"), logit_scale, softcap)
        self.vocabulary_size = self.head_weight.shape[0]

    @property
    def head_bias(self) -> Tensor | None:
        """``[V]`` or None."""
        return self.head_options.bias

    def to(self, device: torch.device | str) -> "CachedTeacher":
        """Moves the head to a device; the hidden states stay on disk."""
        self.head_weight = self.head_weight.to(device)
        bias = self.head_options.bias
        self.head_options = HeadOptions(
            None if bias is None else bias.to(device),
            self.head_options.logit_scale,
            self.head_options.softcap,
        )
        return self

    def hidden_states(
        self,
        input_ids: Tensor,
        index: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """See ``Teacher.hidden_states``; in the cache's dtype.

        Raises:
            TaidError: no index is given, one is outside the cache, or the cached block of that index is
                not ``input_ids``.
        """
        return _to_tensor(self._cache.rows(input_ids, index), self.dtype).to(input_ids.device)


def write_hidden_state_cache(
    model: Any,
    token_blocks: np.ndarray,
    folder: Path | str,
    dtype: str = "float32",
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
    *,
    position_ids: np.ndarray | None = None,
    teacher_digest: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Runs the teacher over all blocks once and writes its final hidden states.

    A killed run goes on after its last complete shard when called again with the same arguments; a
    finished cache is left as it is.

    Args:
        model: a `transformers` causal language model, on the device where it is to run.
        token_blocks: ``[N, T]`` integers; block i is looked up as index i.
        folder: the cache, made when missing.
        dtype: float32 (exact), float16 or bfloat16.
        batch_size: blocks that the model sees at a time.
        progress: called with (blocks done, blocks in all) after every batch.
        position_ids: ``[N, T]``, where several documents share a block.
        teacher_digest: identifies the teacher; None: SHA-256 over its weights (``model_digest``).
        shard_bytes: about how large a shard is.

    Raises:
        TaidError: the arguments are impossible, or the folder holds a cache of another teacher, other data
            or another dtype.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise TaidError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    weight = head_weight(model)
    arrays = index_arrays(token_blocks, position_ids, weight.shape[0])
    tokens, width = arrays["tokens.npy"], weight.shape[1]
    element_bytes = torch.empty((), dtype=DTYPES[dtype]).element_size()
    rows = rows_per_shard(tokens.shape[1] * width * element_bytes, batch_size, shard_bytes)
    identity = {
        "format": FORMAT,
        "version": VERSION,
        "teacher_digest": teacher_digest or model_digest(model),
        "data_digest": data_digest(arrays),
        "dtype": dtype,
        "shape": [*tokens.shape, width],
        "rows_per_shard": rows,
        "batch_size": batch_size,
    }

    def compute(blocks: slice) -> np.ndarray:
        return _to_array(teacher_hidden_states(model, arrays, blocks).to(DTYPES[dtype]).cpu())

    options = head_options(model)
    write_cache(
        model,
        folder,
        identity,
        arrays,
        "hidden",
        compute,
        progress,
        lambda: _write_head(model, folder),
        {"head": {"logit_scale": options.logit_scale, "softcap": options.softcap}},
    )


@torch.no_grad()
def teacher_hidden_states(model: Any, arrays: dict[str, np.ndarray], blocks: slice) -> Tensor:
    """Final hidden states ``[B, T, H]`` of some of the blocks that ``index_arrays`` describes."""
    device = head_weight(model).device
    inputs = {}
    if "positions.npy" in arrays:
        inputs["position_ids"] = torch.from_numpy(arrays["positions.npy"][blocks]).long().to(device)
    input_ids = torch.from_numpy(arrays["tokens.npy"][blocks]).long().to(device)
    return final_hidden_states(model, input_ids, **inputs)


def model_digest(model: Any) -> str:
    """SHA-256 over the names, types, shapes and values of a model's weights, and its configuration."""
    digest = hashlib.sha256()
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
    config.pop("transformers_version", None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write_head(model: Any, folder: Path) -> dict[str, str]:
    tensors = {"weight": head_weight(model).detach().cpu().contiguous()}
    bias = head_options(model).bias
    if bias is not None:
        tensors["bias"] = bias.detach().cpu().contiguous()
    unfinished = folder / "head.safetensors.partial"
    save_file(tensors, unfinished)
    publish(unfinished, folder / "head.safetensors")
    return {"head.safetensors": sha256(folder / "head.safetensors")}


def _to_array(tensor: Tensor) -> np.ndarray:
    """numpy has no bfloat16: its bits are kept as uint16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def _to_tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    if dtype == torch.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
