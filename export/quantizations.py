"""What each format can be quantized to. Apart from the exporters, so that a recipe is checked without loading
their libraries."""

from collections.abc import Mapping
from typing import Any

GGUF: dict[str, str] = {
    "f16": "LLAMA_FTYPE_MOSTLY_F16",
    "bf16": "LLAMA_FTYPE_MOSTLY_BF16",
    "q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0",
    "q6_k": "LLAMA_FTYPE_MOSTLY_Q6_K",
    "q5_k_m": "LLAMA_FTYPE_MOSTLY_Q5_K_M",
    "q5_k_s": "LLAMA_FTYPE_MOSTLY_Q5_K_S",
    "q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M",
    "q4_k_s": "LLAMA_FTYPE_MOSTLY_Q4_K_S",
    "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0",
    "iq4_xs": "LLAMA_FTYPE_MOSTLY_IQ4_XS",
    "q3_k_m": "LLAMA_FTYPE_MOSTLY_Q3_K_M",
    "q2_k": "LLAMA_FTYPE_MOSTLY_Q2_K",
}
"""Names of quantizations and llama.cpp's constants for them."""

GGUF_UNWEIGHTED = ("f16", "bf16", "q8_0")
"""Those that an importance matrix does not change."""

MLC: dict[str, tuple[str, bool]] = {
    "q4f32_1": ("float32", True),
    "q4f16_1": ("float16", True),
    "q0f32": ("float32", False),
    "q0f16": ("float16", False),
}
"""Names, the model's dtype, and whether matrices are quantized to four bits."""

WEBGPU = "wasm32-webgpu"

MLC_LIBRARIES = {
    "x86_64-cpu": ".so",
    "aarch64-cpu": ".tar",
    WEBGPU: ".wasm",
}
"""What MLC model libraries are compiled for, and their files' suffixes: one that this machine can load, the
objects that a toolchain for that system links, and what WebLLM loads in a browser."""

ONNX = {
    "fp32": "model.onnx",
    "fp16": "model_fp16.onnx",
    "int8": "model_quantized.onnx",
    "int4": "model_q4.onnx",
}
"""Precisions and their file names, from the largest to the smallest file."""


def stored_dtype(record: Mapping[str, Any]) -> str:
    """The type in which an MLC tensor cache keeps a tensor. Its records all have the same format, which makes
    bfloat16 of float32 and leaves others, such as the words of quantized weights, as they are."""
    shortened = record["format"] == "f32-to-bf16" and record["dtype"] == "float32"
    return "bfloat16" if shortened else str(record["dtype"])
