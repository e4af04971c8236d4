"""Quantizes one GGUF file with llama.cpp, in its own process since llama.cpp aborts on bad input."""

import ctypes
import sys
from typing import Any

import llama_cpp
from safetensors.numpy import load_file

BUFFER = 64 * 2**20
"""Bytes of rows that llama.cpp holds at a time; by default it takes a whole tensor in float32, 0.9 GB of a
vocabulary of 152,000. The file is the same."""


def main() -> int:
    """Arguments: source, destination, ``LLAMA_FTYPE`` constant's name, threads, and optionally the importance
    matrix: a safetensors file of float32 [columns] under the names of GGUF tensors."""
    source, destination, file_type, threads, *matrix_file = sys.argv[1:]
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, file_type)
    parameters.nthread = int(threads)
    parameters.max_buf_size = BUFFER
    matrix = load_file(matrix_file[0]) if matrix_file else {}
    if matrix:
        parameters.imatrix = _entries(matrix)
    return llama_cpp.llama_model_quantize(source.encode(), destination.encode(), ctypes.byref(parameters))


def _entries(matrix: dict[str, Any]) -> Any:
    """llama.cpp's array of entries, which ends at the first without a name; it points into ``matrix``."""
    entries = (llama_cpp.llama_model_imatrix_data * (len(matrix) + 1))()
    for entry, (name, values) in zip(entries, matrix.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    return entries


if __name__ == "__main__":
    sys.exit(main())
