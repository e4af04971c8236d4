"""The teacher's final hidden states, computed live or read from disk.

The full distribution follows from the final hidden state and the head, so caching that state keeps the
distribution exact for the price of the head alone: ``H`` numbers a token instead of ``V``.

A cache folder holds::

    plan.json                 what it is being made from; an unfinished cache goes on only from the same
    cache.json                what it was made from; present only when everything else is complete
    head.safetensors          the teacher's head: weight, bias if any
    tokens.npy                [N, T] int32, the token blocks in the order of their indices
    positions.npy             [N, T] int32, only when position ids were given
    hidden-00000.npy, ...     [rows, T, H] float32, float16, or bfloat16 as uint16
    hidden-00000.json, ...    rows and SHA-256 of the shard

Shards are opened memory-mapped, so reading costs no more memory than the batch.
"""

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from taid.errors import TaidError
from taid.fused import HeadOptions
from taid.heads import final_hidden_states, head_options, head_weight

FORMAT = "taid-hidden-states"
VERSION = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHARD_BYTES = 64 * 1024**2
"""About how large a shard is: what a killed run loses at most."""


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
        self.folder = Path(folder)
        self.meta = _read_json(self.folder / "cache.json", "finish it with write_hidden_state_cache")
        if self.meta.get("format") != FORMAT or self.meta.get("version") != VERSION:
            raise TaidError(f"{self.folder / 'cache.json'}: not a hidden-state cache of version {VERSION}.")
        try:
            self.dtype = DTYPES[self.meta["dtype"]]
            blocks, length, width = self.meta["shape"]
            files: list[dict[str, Any]] = self.meta["shards"]
            head_digest, options = self.meta["head_sha256"], self.meta["head"]
        except (KeyError, ValueError, TypeError) as error:
            raise TaidError(
                f"{self.folder / 'cache.json'}: incomplete ({error!r}); write the cache anew."
            ) from None
        self.shape = (int(blocks), int(length), int(width))
        if verify:
            _check_digest(self.folder / "head.safetensors", head_digest)
            for name, digest in self.meta["index_sha256"].items():
                _check_digest(self.folder / name, digest)
            for file in files:
                _check_digest(self.folder / file["name"], file["sha256"])
        self._tokens = _open(self.folder / "tokens.npy", self.shape[:2])
        self._shards = [_open(self.folder / file["name"], (file["rows"], *self.shape[1:])) for file in files]
        self._first_rows = np.cumsum([0] + [file["rows"] for file in files])
        if self._first_rows[-1] != self.shape[0]:
            raise TaidError(
                f"{self.folder}: the shards hold {self._first_rows[-1]} of {self.shape[0]} blocks."
            )
        try:
            head = load_file(self.folder / "head.safetensors")
        except (OSError, SafetensorError) as error:
            raise TaidError(f"{self.folder / 'head.safetensors'}: cannot be read ({error}).") from None
        self.head_weight = head["weight"]
        self.head_options = HeadOptions(head.get("bias"), options["logit_scale"], options["softcap"])
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
        if index is None:
            raise TaidError(
                f"{self.folder}: a cached teacher looks blocks up by number; give each example an `index`."
            )
        rows = index.flatten().tolist()
        wanted = input_ids.cpu().numpy()
        result = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        for place, row in enumerate(rows):
            if not 0 <= row < self.shape[0]:
                raise TaidError(f"{self.folder}: there is no block {row}, the cache holds {self.shape[0]}.")
            if not np.array_equal(self._tokens[row], wanted[place]):
                raise TaidError(
                    f"{self.folder}: block {row} of the cache holds other tokens than the training data's; "
                    "the cache was made from other data."
                )
            shard = int(np.searchsorted(self._first_rows, row, side="right")) - 1
            result[place] = _to_tensor(self._shards[shard][row - self._first_rows[shard]], self.dtype)
        return result.to(input_ids.device)


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
    if batch_size < 1:
        raise TaidError(f"batch_size is {batch_size}; it must be at least 1.")
    tokens = np.ascontiguousarray(token_blocks, dtype=np.int32)
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise TaidError(f"Token blocks have shape {list(tokens.shape)}; give at least one block, [N, T].")
    rows_of_head = head_weight(model).shape[0]
    if tokens.min() < 0 or tokens.max() >= rows_of_head:
        raise TaidError(
            f"Token ids run from {tokens.min()} to {tokens.max()}, the teacher knows 0 to {rows_of_head - 1}."
        )
    index_arrays = {"tokens.npy": tokens}
    if position_ids is not None:
        index_arrays["positions.npy"] = np.ascontiguousarray(position_ids, dtype=np.int32)
        if index_arrays["positions.npy"].shape != tokens.shape:
            raise TaidError(f"Position ids have shape {list(position_ids.shape)}, not {list(tokens.shape)}.")
    width = head_weight(model).shape[1]
    element_bytes = torch.empty((), dtype=DTYPES[dtype]).element_size()
    rows = max(1, shard_bytes // (tokens.shape[1] * width * element_bytes))
    # A shard is a whole number of batches, so a resumed run forms the same batches and the same numbers.
    rows = -(-rows // batch_size) * batch_size
    identity = {
        "format": FORMAT,
        "version": VERSION,
        "teacher_digest": teacher_digest or model_digest(model),
        "data_digest": _data_digest(index_arrays),
        "dtype": dtype,
        "shape": [*tokens.shape, width],
        "rows_per_shard": rows,
        "batch_size": batch_size,
    }
    if _already_complete(folder, identity):
        if progress:
            progress(len(tokens), len(tokens))
        return
    _write_head(model, folder)
    for name, array in index_arrays.items():
        _write_array(folder / name, array)
    shards = []
    was_training = model.training
    model.eval()
    try:
        for number, first in enumerate(range(0, len(tokens), rows)):
            last = min(first + rows, len(tokens))
            path = folder / f"hidden-{number:05d}.npy"
            shard = _complete_shard(path, last - first)
            if shard is None:
                positions = index_arrays.get("positions.npy")
                hidden = _compute(
                    model,
                    tokens[first:last],
                    None if positions is None else positions[first:last],
                    DTYPES[dtype],
                    batch_size,
                    None if progress is None else partial(_report, progress, first, len(tokens)),
                )
                digest = _write_array(path, hidden)
                shard = {"name": path.name, "rows": last - first, "sha256": digest}
                _write_json(path.with_suffix(".json"), shard)
            elif progress:
                progress(last, len(tokens))
            shards.append(shard)
    finally:
        model.train(was_training)
    options = head_options(model)
    _write_json(
        folder / "cache.json",
        {
            **identity,
            "head": {"logit_scale": options.logit_scale, "softcap": options.softcap},
            "head_sha256": _sha256(folder / "head.safetensors"),
            "index_sha256": {name: _sha256(folder / name) for name in index_arrays},
            "shards": shards,
        },
    )


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


def _report(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    progress(before + done, total)


@torch.no_grad()
def _compute(
    model: Any,
    tokens: np.ndarray,
    positions: np.ndarray | None,
    dtype: torch.dtype,
    batch_size: int,
    progress: Callable[[int], None] | None,
) -> np.ndarray:
    device = head_weight(model).device
    parts = []
    for start in range(0, len(tokens), batch_size):
        batch = slice(start, start + batch_size)
        inputs = {}
        if positions is not None:
            inputs["position_ids"] = torch.from_numpy(positions[batch]).long().to(device)
        input_ids = torch.from_numpy(tokens[batch]).long().to(device)
        parts.append(_to_array(final_hidden_states(model, input_ids, **inputs).to(dtype).cpu()))
        if progress:
            progress(min(start + batch_size, len(tokens)))
    return np.concatenate(parts)


def _already_complete(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether a finished cache of this identity is there; begins a new one when nothing is."""
    for name in ("cache.json", "plan.json"):
        path = folder / name
        if not path.exists():
            continue
        stored = _read_json(path, "remove the folder and write the cache anew")
        for key, value in identity.items():
            # How a finished cache was divided does not matter; shards of an unfinished one must go together.
            if name == "cache.json" and key in ("rows_per_shard", "batch_size"):
                continue
            if stored.get(key) != value:
                raise TaidError(
                    f"{folder}: holds a cache with {key} {stored.get(key)}, not {value}; "
                    "remove it or choose another folder."
                )
        return name == "cache.json"
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        leftovers = [path for path in folder.iterdir() if not path.name.endswith(".partial")]
        if leftovers:
            raise TaidError(f"{folder}: is not empty and holds no cache; choose another folder.")
    _write_json(folder / "plan.json", identity)
    return False


def _complete_shard(path: Path, rows: int) -> dict[str, Any] | None:
    """What the sidecar says of a shard that is whole, else None."""
    sidecar = path.with_suffix(".json")
    if not (path.exists() and sidecar.exists()):
        return None
    shard = _read_json(sidecar, "remove it; the shard is written anew")
    intact = shard.get("rows") == rows and shard.get("sha256") == _sha256(path)
    return shard if intact else None


def _write_head(model: Any, folder: Path) -> None:
    tensors = {"weight": head_weight(model).detach().cpu().contiguous()}
    bias = head_options(model).bias
    if bias is not None:
        tensors["bias"] = bias.detach().cpu().contiguous()
    unfinished = folder / "head.safetensors.partial"
    save_file(tensors, unfinished)
    _publish(unfinished, folder / "head.safetensors")


def _write_array(path: Path, array: np.ndarray) -> str:
    unfinished = path.with_name(path.name + ".partial")
    with unfinished.open("wb") as file:
        _write_npy(file, array)
    digest = _sha256(unfinished)
    _publish(unfinished, path)
    return digest


def _write_npy(file: BinaryIO, array: np.ndarray) -> None:
    """What np.save writes; np.save itself reports a full disk without the error's number."""
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(np.ascontiguousarray(array).data.cast("B"))


def _write_json(path: Path, value: Any) -> None:
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    _publish(unfinished, path)


def _publish(unfinished: Path, path: Path) -> None:
    """Gives a file its name once its bytes are on the disk."""
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TaidError(f"{path}: is missing; {remedy}.") from None
    except (OSError, ValueError) as error:
        raise TaidError(f"{path}: cannot be read ({error}); {remedy}.") from None
    if not isinstance(value, dict):
        raise TaidError(f"{path}: holds no mapping; {remedy}.")
    return value


def _open(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise TaidError(f"{path}: cannot be read ({error}); write the cache anew.") from None
    if array.shape != tuple(shape):
        raise TaidError(f"{path}: has shape {list(array.shape)}, not {list(shape)}; write the cache anew.")
    return array


def _check_digest(path: Path, digest: str) -> None:
    if not path.exists():
        raise TaidError(f"{path}: is missing; write the cache anew.")
    if _sha256(path) != digest:
        raise TaidError(f"{path}: is damaged (its SHA-256 is not the recorded one); write the cache anew.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _data_digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _to_array(tensor: Tensor) -> np.ndarray:
    """numpy has no bfloat16: its bits are kept as uint16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def _to_tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    array = np.array(array)  # a copy: the memory map is read-only
    if dtype == torch.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
