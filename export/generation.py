"""Defaults of generation: what a model's ``generation_config.json`` states and each format says its way."""

import math
from collections.abc import Mapping
from typing import Any

NEUTRAL: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
    "do_sample": False,
}
"""The defaults that formats can hold, and what transformers takes where a model does not state them."""

Stated = dict[str, dict[str, Any]]
"""By the name of a file: what it says under the keys of ``NEUTRAL``, ``max_length``, ``eos_token_id`` (a
list) and ``context_length``, of these the ones for which its format has a place; None where it is silent."""


def stated(content: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``NEUTRAL`` and ``max_length`` in the content of a ``generation_config.json``."""
    return {key: content.get(key) for key in (*NEUTRAL, "max_length")}


def differences(found: Stated, expected: Mapping[str, Any]) -> list[str]:
    """What a file says otherwise than the model, in words.

    Args:
        found: a runtime's ``generation_defaults``.
        expected: what the model's own files say, under all keys; None where they are silent, which then
            means the neutral value, and for ``max_length`` the context length.
    """
    neutral = NEUTRAL | {"max_length": expected["context_length"]}
    sentences = []
    for file, values in found.items():
        for key, value in values.items():
            given = neutral.get(key) if value is None else value
            wanted = neutral.get(key) if expected[key] is None else expected[key]
            if not _equal(given, wanted):
                sentences.append(
                    f"{file} says {key} {'nothing' if value is None else value}, the model {wanted}"
                )
    return sentences


def _equal(given: Any, wanted: Any) -> bool:
    if isinstance(given, list) and isinstance(wanted, list):
        return sorted(given) == sorted(wanted)
    if given is None or wanted is None or isinstance(given, list) or isinstance(wanted, list):
        return given is wanted
    # GGUF holds float32, and llama.cpp tells six decimals of it.
    return math.isclose(given, wanted, rel_tol=1e-5)
