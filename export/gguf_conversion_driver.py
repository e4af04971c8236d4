"""Runs llama.cpp's converter in its own process, with the pre-tokenizer's name given from outside, and with
large matrices converted some rows at a time.

The converter tells pre-tokenizers apart by a hash of what they make of one text, and refuses those that it
has not seen. ``--martlet-pre-tokenizer NAME`` answers that question in its place; the token-id gate then
proves or refuses the answer. All other arguments are the converter's own.

It holds a matrix in the checkpoint's type, in float32 and in the file's type at once: of an embedding of
152,000 rows that is 1.7 GiB. What it writes in rows is the same, byte for byte.
"""

import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

BUFFER = 32 * 2**20
"""Bytes of a checkpoint's matrix that are converted at a time."""


def main() -> None:
    """Arguments: the converter's script, optionally ``--martlet-pre-tokenizer NAME``, its arguments."""
    script, *arguments = sys.argv[1:]
    sys.path.insert(0, str(Path(script).parent))
    sys.path.insert(0, str(Path(script).parent / "gguf-py"))
    # Both come from the converter's folder, which is not on the path of a type checker.
    import conversion.base  # type: ignore[import-not-found]

    if arguments[:1] == ["--martlet-pre-tokenizer"]:
        pre_tokenizer = arguments[1]
        arguments = arguments[2:]
        conversion.base.TextModel.get_vocab_base_pre = lambda model, tokenizer: pre_tokenizer
    convert_in_rows(conversion.base)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def convert_in_rows(base: Any) -> None:
    """Has the converter take large matrices in rows, where all that it does to them is to cast them and to
    leave out their last rows.

    Args:
        base: the converter's module of that name; changed in place.
    """
    lazy_tensor = base.LazyTorchTensor
    of_file, cut, whole = lazy_tensor.from_local_tensor, lazy_tensor.__getitem__, lazy_tensor.numpy

    def kept(source: Any, result: Any, same_rows: bool) -> Any:
        """Remembers of which matrix of a file a lazy tensor holds the first rows."""
        if same_rows and source is not None:
            result.__dict__["in_file"] = source
        return result

    def from_local_tensor(source: Any) -> Any:
        return kept(source, of_file(source), len(source.shape) == 2)

    def to(tensor: Any, *arguments: Any, **named: Any) -> Any:
        result = lazy_tensor.__getattr__(tensor, "to")(*arguments, **named)
        alone = len(arguments) == 1 and isinstance(arguments[0], base.torch.dtype) and not named
        return kept(tensor.__dict__.get("in_file"), result, alone)

    def get_item(tensor: Any, key: Any) -> Any:
        first = isinstance(key, slice) and key.start in (None, 0) and key.step in (None, 1)
        return kept(tensor.__dict__.get("in_file"), cut(tensor, key), first)

    def numpy(tensor: Any) -> Any:
        source = tensor.__dict__.get("in_file")
        if source is None or source.data_range.size <= BUFFER:
            return whole(tensor)
        rows, columns = tensor.shape
        step = max(1, BUFFER * source.shape[0] // source.data_range.size)
        chunks = [
            partial(_read_rows, source, begin, min(step, rows - begin), tensor.dtype, base)
            for begin in range(0, rows, step)
        ]
        return base.gguf.LazyChunkedTensor(chunks, (rows, columns), lazy_tensor._dtype_map[tensor.dtype])

    lazy_tensor.from_local_tensor = staticmethod(from_local_tensor)
    lazy_tensor.to, lazy_tensor.__getitem__, lazy_tensor.numpy = to, get_item, numpy


def _read_rows(source: Any, begin: int, count: int, dtype: Any, base: Any) -> Any:
    """Rows of a matrix in a file, cast; read and not mapped, so that they leave memory when they are done."""
    row_bytes = source.data_range.size // source.shape[0]
    with Path(source.data_range.filename).open("rb") as file:
        file.seek(source.data_range.offset + begin * row_bytes)
        data = bytearray(file.read(count * row_bytes))
    stored = base.LazyTorchTensor._dtype_str_map[source.dtype]
    return base.torch.frombuffer(data, dtype=stored).reshape(count, -1).to(dtype).numpy()


if __name__ == "__main__":
    main()
