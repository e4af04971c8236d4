"""What every runtime of an exported model offers, so that gates and benchmarks treat all formats alike."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from export.backend import Backend
from export.generation import Stated

Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": str}


class ChatReader(Protocol):
    """A program that turns conversations into token ids by a file's own template and tokenizer."""

    name: str

    def completion_ids(self, text: str) -> list[int] | None:
        """Token ids of plain text to be continued, with the special tokens that the file asks its runtime to
        add (a BOS before it, say); None where the program adds none, whatever the file says."""
        ...

    def chat_ids(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        """Token ids of a conversation, rendered by the file's own chat template."""
        ...


class Runtime(Protocol):
    """A loaded model file with its own tokenizer, its own chat template and a key-value cache.

    Everything comes from the file under test, nothing from the model it was made of: that is what the
    gates judge. T: number of tokens, V: vocabulary size of the file (padding rows removed).
    """

    name: str  # "torch", "llama.cpp", "onnxruntime-genai", "onnxruntime", "tvm"
    backend: Backend  # what it was asked to run on, and what it runs on
    vocabulary_size: int
    context_length: int  # tokens that the cache holds now
    trained_context_length: int  # tokens that the file says the model can hold
    eos_token_id: int | None  # the end of sequence that the file's tokenizer names
    end_of_turn_ids: tuple[int, ...]  # the ids at which the file itself says that generation ends
    generation_defaults: Stated  # what it says of sampling, ends and lengths, by the name of the file inside

    def tokenize(self, text: str) -> list[int]:
        """Token ids of plain text as the file's tokenizer makes them, control-token text included
        (``<|im_start|>`` in the text becomes the control token), and no BOS added beyond the text."""
        ...

    def completion_ids(self, text: str) -> list[int] | None:
        """See ``ChatReader.completion_ids``."""
        ...

    def chat_text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """A conversation as text, rendered by the file's own chat template."""
        ...

    def chat_ids(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        """Token ids of a conversation, rendered by the file's own chat template."""
        ...

    def other_reader(self) -> ChatReader | None:
        """Another program that reads the same file with a template engine and a tokenizer of its own."""
        ...

    def decode_text(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        ...

    def reset(self) -> None:
        """Empties the key-value cache."""
        ...

    def forward(self, token_ids: Sequence[int]) -> np.ndarray:
        """Appends tokens to the cache; logits of every position, float32 [T, V]."""
        ...

    def prefill(self, token_ids: Sequence[int]) -> np.ndarray:
        """Appends tokens to the cache; logits of the last position only, float32 [V]."""
        ...

    def decode(self, token_id: int) -> np.ndarray:
        """Appends one token to the cache; logits that follow it, float32 [V]."""
        ...

    def close(self) -> None:
        """Frees the model. The runtime is not used afterwards."""
        ...


def runtime_class(path: Path) -> Callable[[Path, int, int | None], Runtime]:
    """The runtime of a model's format, its libraries imported but nothing loaded.

    Args:
        path: as of ``open_runtime``.

    Raises:
        ExportError: the path is no exported model.
    """
    from export.errors import ExportError

    path = Path(path)
    if path.suffix == ".gguf":
        from export.llama_cpp_runtime import LlamaCppRuntime

        return LlamaCppRuntime
    if path.suffix == ".onnx":
        from export.onnx_runtime import OnnxRuntime

        return OnnxRuntime
    if (path / "mlc-chat-config.json").is_file():
        from export.mlc_runtime import MlcRuntime

        return MlcRuntime
    if (path / "config.json").is_file():
        from export.torch_runtime import TorchRuntime

        return TorchRuntime
    raise ExportError(
        f"{path}: no model here; give a .gguf file, an .onnx file, an MLC folder or a Hugging Face folder."
    )


def open_runtime(path: Path, threads: int = 1, context_length: int | None = None) -> Runtime:
    """Opens an exported model in the runtime of its format.

    Args:
        path: a ``.gguf`` file; an ``.onnx`` file inside an exported ONNX folder; a folder with
            ``mlc-chat-config.json``; or a Hugging Face folder (safetensors), which torch runs in float32.
        threads: CPU threads the runtime may use.
        context_length: tokens of cache to allocate; the file's own maximum (at most 4096) by default.

    Raises:
        ExportError: the path is none of these, or the runtime refuses it.
    """
    return runtime_class(path)(Path(path), threads, context_length)


def generate_greedily(runtime: Runtime, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
    """Greedy continuation of a prompt; an end-of-turn token ends it and is the last id returned then."""
    runtime.reset()
    logits = runtime.prefill(prompt_ids)
    new_ids: list[int] = []
    while len(new_ids) < max_new_tokens:
        token_id = int(logits.argmax())
        new_ids.append(token_id)
        if token_id in runtime.end_of_turn_ids or len(new_ids) == max_new_tokens:
            break
        logits = runtime.decode(token_id)
    return new_ids


def sample(
    logits: np.ndarray, generator: np.random.Generator, temperature: float, top_p: float = 0.95
) -> int:
    """Nucleus sampling (Holtzman et al. 2020).

    Args:
        logits: of the next token ``[V]``.
        generator: source of randomness.
        temperature: divides the logits; above 0.
        top_p: the most likely tokens that together have this probability are drawn from.
    """
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    # Tokens below this share add up to less than what the nucleus leaves out: they need no sorting.
    candidates = np.flatnonzero(probabilities > (1 - top_p) / len(probabilities))
    order = candidates[np.argsort(-probabilities[candidates], kind="stable")]
    cumulative = np.cumsum(probabilities[order])
    kept = order[: int(np.searchsorted(cumulative, top_p)) + 1]
    nucleus = probabilities[kept] / probabilities[kept].sum()
    return int(generator.choice(kept, p=nucleus))
