"""Importance matrices: what each column of a matrix is multiplied with, so that quantization errs where it
matters least. Measured in torch on text that the caller names."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer

from export.errors import ExportError
from export.torch_runtime import load_in_torch

ROW = 512
"""Tokens of a row of ``rows_of_text``, llama.cpp's own choice."""
MOST_TOKENS = 32_768
"""Of a text file; more change a matrix hardly."""
GGUF_ARCHITECTURES = {"gemma3_text": "gemma3", "smollm": "llama", "mistral": "llama"}
"""llama.cpp's name of an architecture where it is not ``model_type``."""


def measure_importance(
    model_dir: Path,
    rows: Sequence[np.ndarray],
    position_ids: Sequence[np.ndarray] | None = None,
    *,
    threads: int = 2,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, np.ndarray]:
    """Runs a model over text and squares what goes into each of its linear layers.

    Args:
        model_dir: folder with safetensors and configuration.
        rows: token ids ``[T]`` of each row; every row begins with an empty cache.
        position_ids: positions ``[T]`` of each row, which begin at 0 with each document; 0 to T - 1 if left
            out.
        threads: CPU threads.
        progress: receives a line now and then.

    Returns:
        For each linear layer (``model.layers.0.self_attn.q_proj``) the mean square of each of its inputs,
        float32 [columns]. Layers that were never reached are left out.

    Raises:
        ExportError: there is no text, or the model cannot be loaded.
    """
    if not sum(len(row) for row in rows):
        raise ExportError("importance matrix: there is no text to measure it on.")
    torch.set_num_threads(threads)
    model = load_in_torch(model_dir)
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[[Any, Any], None]:
        def before_forward(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            squares = x.double().square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares
            counts[name] = counts.get(name, 0) + len(x)

        return before_forward

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        for number, row in enumerate(rows):
            if number % 8 == 0:
                progress(f"importance matrix: row {number + 1} of {len(rows)}")
            positions = {}
            if position_ids is not None:
                positions["position_ids"] = torch.from_numpy(np.asarray(position_ids[number], np.int64))[None]
            model(torch.from_numpy(np.asarray(row, np.int64))[None], use_cache=False, **positions)
    measured = {name: (total / counts[name]).float().numpy() for name, total in sums.items()}
    return {name: values for name, values in measured.items() if values.max() > 0}


def rows_of_text(model_dir: Path, text: str) -> Iterator[np.ndarray]:
    """Token ids of a text in rows of ``ROW``, its first ``MOST_TOKENS`` tokens. Text that looks like a
    control token is text.

    Raises:
        ExportError: the tokenizer cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except Exception as error:
        raise ExportError(f"{model_dir}: the tokenizer cannot be loaded ({error}).") from error
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"][:MOST_TOKENS]
    for start in range(0, len(ids), ROW):
        yield np.array(ids[start : start + ROW], np.int32)


def gguf_importance(importance: Mapping[str, np.ndarray], model_dir: Path) -> dict[str, np.ndarray]:
    """The same matrix under the names of GGUF tensors (``blk.0.attn_q.weight``), for ``export_gguf``.

    The head's values go to the embedding where that is the head. Layers that GGUF has no tensor for are
    left out, and then quantized without.

    Raises:
        ExportError: the ``gguf`` package does not know the model's architecture.
    """
    import gguf

    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    text = config.get_text_config()
    wanted = GGUF_ARCHITECTURES.get(text.model_type, text.model_type)
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if wanted not in known:
        raise ExportError(
            f"{model_dir / 'config.json'}: the names of {text.model_type!r} tensors in GGUF are not known, "
            "so its importance matrix cannot be used; export without one."
        )
    names = gguf.get_tensor_name_map(known[wanted], text.num_hidden_layers)
    found = {}
    for module, values in importance.items():
        name = names.get_name(module)
        if name == "output" and text.tie_word_embeddings:
            name = "token_embd"
        if name is not None:
            found[f"{name}.weight"] = values
    return found
