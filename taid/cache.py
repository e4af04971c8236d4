"""What the teachers' caches have in common: folders of checked shards, written once, resumed after a kill.

A cache folder holds, besides what its kind needs::

    plan.json                 what it is being made from; an unfinished cache goes on only from the same
    cache.json                what it was made from; present only when everything else is complete
    tokens.npy                [N, T] int32, the token blocks in the order of their indices
    positions.npy             [N, T] int32, only when position ids were given
    NAME-00000.npy, ...       [rows, T, ...], the blocks' contents
    NAME-00000.json, ...      rows and SHA-256 of the shard

Every file appears by a rename when its bytes are on the disk. Shards are opened memory-mapped, so reading
costs no more memory than the batch.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from taid.errors import TaidError

SHARD_BYTES = 64 * 1024**2
"""About how large a shard is: what a killed run loses at most."""
LONGEST_NAME = 64
"""Characters of a file's name in a cache."""


class BlockCache:
    """A finished cache, opened for reading.

    Attributes:
        folder: where it lies.
        meta: what ``cache.json`` says.
        shape: ``[N, T, ...]`` of all shards together.
    """

    def __init__(self, folder: Path | str, format_name: str, version: int, kind: str, verify: bool):
        """
        Args:
            folder: the cache.
            format_name: the ``format`` that ``cache.json`` must name.
            version: its ``version``.
            kind: what to call it in an error.
            verify: read every shard once and compare its SHA-256.

        Raises:
            TaidError: the folder is no finished cache of this format, or a file of it is missing or damaged.
        """
        self.folder = Path(folder)
        self.meta = read_json(
            self.folder / "cache.json", f"finish it with write_{kind.replace('-', '_')}_cache"
        )
        if self.meta.get("format") != format_name or self.meta.get("version") != version:
            raise TaidError(f"{self.folder / 'cache.json'}: not a {kind} cache of version {version}.")
        try:
            self.shape = tuple(int(size) for size in self.meta["shape"])
            files = [(str(file["name"]), int(file["rows"]), file["sha256"]) for file in self.meta["shards"]]
            digests: dict[str, str] = dict(self.meta["files_sha256"])
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise self.incomplete(error) from None
        for name in [*digests, *(name for name, _, _ in files)]:
            if (
                not isinstance(name, str)
                or Path(name).name != name
                or "\0" in name
                or len(name) > LONGEST_NAME
            ):
                raise TaidError(
                    f"{self.folder / 'cache.json'}: names {str(name)!r:.80}, no file of its folder."
                )
        if verify:
            for name, digest in digests.items():
                _check_digest(self.folder / name, digest)
            for name, _, digest in files:
                _check_digest(self.folder / name, digest)
        self._tokens = _open(self.folder / "tokens.npy", self.shape[:2])
        self._shards = [_open(self.folder / name, (rows, *self.shape[1:])) for name, rows, _ in files]
        self._first_rows = np.cumsum([0] + [rows for _, rows, _ in files])
        if self._first_rows[-1] != self.shape[0]:
            raise TaidError(
                f"{self.folder}: the shards hold {self._first_rows[-1]} of {self.shape[0]} blocks."
            )

    def require_type(self, dtype: np.dtype) -> None:
        """
        Raises:
            TaidError: a shard holds elements of another type.
        """
        if any(shard.dtype != dtype for shard in self._shards):
            raise TaidError(f"{self.folder}: a shard's type is not {dtype}; write the cache anew.")

    def incomplete(self, error: Exception) -> TaidError:
        """The error of a ``cache.json`` that lacks something."""
        return TaidError(f"{self.folder / 'cache.json'}: incomplete ({error!r:.80}); write the cache anew.")

    def rows(self, input_ids: Tensor, index: Tensor | None) -> np.ndarray:
        """The blocks' contents ``[B, T, ...]``, a copy.

        Args:
            input_ids: ``[B, T]``, which must be the blocks' tokens.
            index: ``[B]``, the blocks' numbers.

        Raises:
            TaidError: no index is given, one is outside the cache, or the cached block of that index is
                not ``input_ids``.
        """
        if index is None:
            raise TaidError(
                f"{self.folder}: a cached teacher looks blocks up by number; give each example an `index`."
            )
        wanted = input_ids.cpu().numpy()
        found = []
        for place, row in enumerate(index.flatten().tolist()):
            if not 0 <= row < self.shape[0]:
                raise TaidError(f"{self.folder}: there is no block {row}, the cache holds {self.shape[0]}.")
            if not np.array_equal(self._tokens[row], wanted[place]):
                raise TaidError(
                    f"{self.folder}: block {row} of the cache holds other tokens than the training data's; "
                    "the cache was made from other data."
                )
            shard = int(np.searchsorted(self._first_rows, row, side="right")) - 1
            found.append(self._shards[shard][row - self._first_rows[shard]])
        return np.stack(found)


def index_arrays(
    token_blocks: np.ndarray, position_ids: np.ndarray | None, vocabulary_size: int
) -> dict[str, np.ndarray]:
    """The arrays that say which blocks a cache is of, by file name.

    Args:
        token_blocks: ``[N, T]`` integers.
        position_ids: ``[N, T]``, where several documents share a block.
        vocabulary_size: ids that the teacher knows.

    Raises:
        TaidError: there is no block, an id is unknown, or the shapes differ.
    """
    tokens = np.ascontiguousarray(token_blocks, dtype=np.int32)
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise TaidError(f"Token blocks have shape {list(tokens.shape)}; give at least one block, [N, T].")
    if tokens.min() < 0 or tokens.max() >= vocabulary_size:
        raise TaidError(
            f"Token ids run from {tokens.min()} to {tokens.max()}, "
            f"the teacher knows 0 to {vocabulary_size - 1}."
        )
    arrays = {"tokens.npy": tokens}
    if position_ids is not None:
        arrays["positions.npy"] = np.ascontiguousarray(position_ids, dtype=np.int32)
        if arrays["positions.npy"].shape != tokens.shape:
            raise TaidError(f"Position ids have shape {list(position_ids.shape)}, not {list(tokens.shape)}.")
    return arrays


def rows_per_shard(bytes_of_a_block: int, batch_size: int, shard_bytes: int) -> int:
    """Blocks in a shard: a whole number of batches, so a resumed run forms the same batches and the same
    numbers.

    Raises:
        TaidError: the batch size is not positive.
    """
    if batch_size < 1:
        raise TaidError(f"batch_size is {batch_size}; it must be at least 1.")
    return -(-max(1, shard_bytes // bytes_of_a_block) // batch_size) * batch_size


def begin_cache(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether a finished cache of this identity is there; begins a new one when nothing is.

    Raises:
        TaidError: the folder holds a cache of something else, or no cache.
    """
    for name in ("cache.json", "plan.json"):
        path = folder / name
        if not path.exists():
            continue
        stored = read_json(path, "remove the folder and write the cache anew")
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
    write_json(folder / "plan.json", identity)
    return False


def write_cache(
    model: Any,
    folder: Path,
    identity: dict[str, Any],
    arrays: dict[str, np.ndarray],
    name: str,
    compute: Callable[[slice], np.ndarray],
    progress: Callable[[int, int], None] | None,
    write_others: Callable[[], dict[str, str]] = dict,
    facts: dict[str, Any] | None = None,
) -> None:
    """Writes a cache, or what a killed run left to write of it; a finished one is left as it is.

    Args:
        model: what ``compute`` runs; in evaluation mode meanwhile.
        folder: the cache, made when missing.
        identity: what it is made from, with its ``rows_per_shard`` and ``batch_size``.
        arrays: of ``index_arrays``.
        name: what the shards are called.
        compute: contents ``[B, T, ...]`` of a slice of the blocks.
        progress: called with (blocks done, blocks in all) after every batch.
        write_others: writes the files that only this kind of cache has; their SHA-256 by name.
        facts: what ``cache.json`` says besides.

    Raises:
        TaidError: the folder holds a cache of something else, or no cache.
    """
    blocks = len(arrays["tokens.npy"])
    if begin_cache(folder, identity):
        if progress:
            progress(blocks, blocks)
        return
    digests = write_others()
    digests |= {file: write_array(folder / file, array) for file, array in arrays.items()}
    was_training = model.training
    model.eval()
    try:
        rows, batch_size = identity["rows_per_shard"], identity["batch_size"]
        shards = write_shards(folder, name, blocks, rows, batch_size, compute, progress)
    finally:
        model.train(was_training)
    write_json(
        folder / "cache.json", {**identity, **(facts or {}), "files_sha256": digests, "shards": shards}
    )


def write_shards(
    folder: Path,
    name: str,
    blocks: int,
    rows: int,
    batch_size: int,
    compute: Callable[[slice], np.ndarray],
    progress: Callable[[int, int], None] | None,
) -> list[dict[str, Any]]:
    """Writes the shards that are not there yet.

    Args:
        folder: a cache that ``begin_cache`` began.
        name: what the shards are called.
        blocks: blocks in all.
        rows: blocks of a shard, a multiple of ``batch_size``.
        batch_size: blocks that ``compute`` is asked for at a time.
        compute: contents ``[B, T, ...]`` of a slice of the blocks.
        progress: called with (blocks done, blocks in all) after every batch.

    Returns:
        Name, rows and SHA-256 of every shard.
    """
    shards = []
    for number, first in enumerate(range(0, blocks, rows)):
        last = min(first + rows, blocks)
        path = folder / f"{name}-{number:05d}.npy"
        shard = _complete_shard(path, last - first)
        if shard is None:
            parts = []
            for start in range(first, last, batch_size):
                stop = min(start + batch_size, last)
                parts.append(compute(slice(start, stop)))
                if progress:
                    progress(stop, blocks)
            digest = write_array(path, np.concatenate(parts))
            shard = {"name": path.name, "rows": last - first, "sha256": digest}
            write_json(path.with_suffix(".json"), shard)
        elif progress:
            progress(last, blocks)
        shards.append(shard)
    return shards


def write_array(path: Path, array: np.ndarray) -> str:
    """Writes an array as .npy and returns the file's SHA-256."""
    unfinished = path.with_name(path.name + ".partial")
    with unfinished.open("wb") as file:
        _write_npy(file, array)
    digest = sha256(unfinished)
    publish(unfinished, path)
    return digest


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON value."""
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    publish(unfinished, path)


def publish(unfinished: Path, path: Path) -> None:
    """Gives a file its name once its bytes are on the disk."""
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON mapping.

    Raises:
        TaidError: the file is missing, cannot be read or holds something else; ``remedy`` says what to do.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TaidError(f"{path}: is missing; {remedy}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise TaidError(f"{path}: cannot be read ({error}); {remedy}.") from None
    if not isinstance(value, dict):
        raise TaidError(f"{path}: holds no mapping; {remedy}.")
    return value


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_digest(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes and values of arrays."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _complete_shard(path: Path, rows: int) -> dict[str, Any] | None:
    """What the sidecar says of a shard that is whole, else None."""
    sidecar = path.with_suffix(".json")
    if not (path.exists() and sidecar.exists()):
        return None
    shard = read_json(sidecar, "remove it; the shard is written anew")
    intact = shard.get("rows") == rows and shard.get("sha256") == sha256(path)
    return shard if intact else None


def _write_npy(file: BinaryIO, array: np.ndarray) -> None:
    """What np.save writes; np.save itself reports a full disk without the error's number."""
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(np.ascontiguousarray(array).view(np.uint8).data.cast("B"))


def _open(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python, which fails in ways of its own
        raise TaidError(f"{path}: cannot be read ({error}); write the cache anew.") from None
    if array.shape != tuple(shape):
        raise TaidError(f"{path}: has shape {list(array.shape)}, not {list(shape)}; write the cache anew.")
    return array


def _check_digest(path: Path, digest: str) -> None:
    if not path.exists():
        raise TaidError(f"{path}: is missing; write the cache anew.")
    if sha256(path) != digest:
        raise TaidError(f"{path}: is damaged (its SHA-256 is not the recorded one); write the cache anew.")
