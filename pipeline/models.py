"""Loading and saving of Hugging Face folders, the same way in every stage."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from pipeline.errors import UserError, hub_error

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
logging.getLogger("accelerate").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*pin_memory.*")


def load_model(folder: Path | str, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """A causal language model in float32 and evaluation mode, from safetensors only.

    Raises:
        UserError: there is no such model, it has no safetensors, or they are damaged.
    """
    if Path(folder).is_dir() and not list(Path(folder).glob("*.safetensors")):
        raise UserError(
            f"{folder}: no .safetensors file; martlet reads no pickled weights, so convert the model first."
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            revision=revision or "main",
        )
    except Exception as error:
        raise hub_error(f"{folder}: the model cannot be loaded ({_first_line(error)}).", error) from error
    return model.eval()


def load_tokenizer(folder: Path | str, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The tokenizer of a folder.

    Raises:
        UserError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, revision=revision or "main"
        )
    except Exception as error:
        raise hub_error(f"{folder}: the tokenizer cannot be loaded ({_first_line(error)}).", error) from error


def save_model(model: Any, tokenizer: Any, folder: Path, generation_config: GenerationConfig | None) -> None:
    """Writes a complete folder: configuration, safetensors, tokenizer with template, generation defaults."""
    folder.mkdir(parents=True, exist_ok=True)
    if generation_config is not None:
        model.generation_config = generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def count_parameters(model: Any) -> int:
    """Number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def position_ids(documents: np.ndarray) -> np.ndarray:
    """Positions that start at 0 with each document of a packed block, so that attention stays within it.

    Args:
        documents: ``[N, T]``, the document's number of each token.

    Returns:
        ``[N, T]`` int32.
    """
    blocks, length = documents.shape
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (blocks, length))
    starts = np.zeros((blocks, length), dtype=np.int32)
    changed = documents[:, 1:] != documents[:, :-1]
    starts[:, 1:] = np.where(changed, positions[:, 1:], 0)
    return positions - np.maximum.accumulate(starts, axis=1)


def throttled(report: Callable[[str], None], every: float = 5.0) -> Callable[[str], None]:
    """Passes at most one line in ``every`` seconds on."""
    import time

    last = 0.0

    def report_sometimes(line: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= every:
            last = now
            report(line)

    return report_sometimes


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(".")
