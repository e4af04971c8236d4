"""Runs ONNX Runtime GenAI's model builder in its own process; all arguments are the builder's.

The builder looks for the rotary settings of Gemma 3 where transformers 4 had them: for both bases, of which
it silently takes 10000 for the one that it does not find, and for the kind.
"""

import importlib.util
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Gemma3TextConfig


def main() -> None:
    """Shows the bases under the old names, sees to the kind, and runs the builder."""
    for name, kind in (("rope_theta", "full_attention"), ("rope_local_base_freq", "sliding_attention")):
        setattr(Gemma3TextConfig, name, property(partial(base_of, kind=kind)))
    package = importlib.util.find_spec("onnxruntime_genai")
    assert package is not None
    assert package.origin is not None
    # The builder finds its parts beside itself.
    sys.path.insert(0, str(Path(package.origin).parent / "models"))
    from builders.gemma import Gemma3Model  # type: ignore[import-not-found]

    Gemma3Model.make_rope_init = check_rope
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)


def base_of(config: Any, kind: str) -> float:
    """The rotary base of a kind of layers."""
    return float(config.rope_parameters[kind]["rope_theta"])


def check_rope(model: Any, config: Any) -> None:
    """In place of the builder's own, which knows one kind for all layers."""
    kinds = {rope["rope_type"] for rope in config.rope_parameters.values()}
    if kinds != {"default"}:
        raise NotImplementedError(f"rope_type {' and '.join(sorted(kinds))} of Gemma 3")


if __name__ == "__main__":
    main()
