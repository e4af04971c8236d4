"""Quantizes one GGUF file with llama.cpp, in its own process since llama.cpp aborts on bad input."""

import ctypes
import sys

import llama_cpp


def main() -> int:
    """Arguments: source, destination, ``LLAMA_FTYPE`` constant's name, threads."""
    source, destination, file_type, threads = sys.argv[1:5]
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, file_type)
    parameters.nthread = int(threads)
    return llama_cpp.llama_model_quantize(source.encode(), destination.encode(), ctypes.byref(parameters))


if __name__ == "__main__":
    sys.exit(main())
