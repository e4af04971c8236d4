"""The reference runtime: the Hugging Face folder itself in torch, float32."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from export.backend import Backend
from export.errors import ExportError
from export.generation import Stated, stated
from export.runtime import Message


def load_in_torch(folder: Path, trust_remote_code: bool = False) -> Any:
    """A folder's model in float32, to be run and not to be trained; safetensors only.

    Raises:
        ExportError: it cannot be loaded.
    """
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ExportError(f"{folder}: cannot be loaded in transformers ({reason}).") from error
    return model.eval().requires_grad_(False)


class TransformersReader:
    """See ``export.runtime.ChatReader``: a Hugging Face folder's own tokenizer and chat template."""

    name = "transformers"

    def __init__(self, path: Path, trust_remote_code: bool = False):
        """
        Args:
            path: a Hugging Face folder with a tokenizer.
            trust_remote_code: run tokenizer code that the folder carries.

        Raises:
            ExportError: the tokenizer cannot be loaded.
        """
        self._path = Path(path)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(
                path, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ExportError(f"{path}: cannot be loaded in transformers ({reason}).") from error

    def tokenize(self, text: str) -> list[int]:
        """See ``Runtime.tokenize``."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def completion_ids(self, text: str) -> list[int]:
        """See ``ChatReader.completion_ids``."""
        return self.tokenizer(text)["input_ids"]

    def chat_text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """See ``Runtime.chat_text``.

        Raises:
            ExportError: the model has no chat template, or it refuses the conversation.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise ExportError(f"{self._path}: its chat template cannot be rendered ({error}).") from error
        return str(text)

    def chat_ids(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        """See ``Runtime.chat_ids``."""
        return self.tokenize(self.chat_text(messages, add_generation_prompt))


class TorchRuntime(TransformersReader):
    """See ``export.runtime.Runtime``. Safetensors only; the folder's own code runs only when asked for."""

    name = "torch"

    def __init__(
        self,
        path: Path,
        threads: int = 1,
        context_length: int | None = None,
        trust_remote_code: bool = False,
    ):
        """
        Args:
            path: a Hugging Face folder with safetensors and a tokenizer.
            threads: CPU threads of torch, for the whole process.
            context_length: tokens of cache; the model's own maximum by default.
            trust_remote_code: run the model code that the folder carries.

        Raises:
            ExportError: the folder holds no safetensors, or they or the tokenizer cannot be loaded.
        """
        path = Path(path)
        if not list(path.glob("*.safetensors")):
            raise ExportError(f"{path}: no .safetensors file; only safetensors are loaded.")
        torch.set_num_threads(threads)
        super().__init__(path, trust_remote_code)
        self.model = load_in_torch(path, trust_remote_code)
        config = self.model.config.get_text_config()
        self.backend = Backend(
            requested={"device": "cpu", "threads": threads},
            effective={
                "device": str(self.model.device),
                "threads": torch.get_num_threads(),
                "instruction_sets": torch.backends.cpu.get_cpu_capability(),
                "version": str(torch.__version__),
            },
        )
        self.trained_context_length = int(config.max_position_embeddings)
        self.context_length = context_length or self.trained_context_length
        self.eos_token_id: int | None = self.tokenizer.eos_token_id
        self.vocabulary_size = min(int(config.vocab_size), max(self.tokenizer.get_vocab().values()) + 1)
        ends = self.model.generation_config.eos_token_id
        ends = self.eos_token_id if ends is None else ends
        ends = ends if isinstance(ends, list) else [ends]
        self.end_of_turn_ids = tuple(sorted({int(end) for end in ends if end is not None}))
        file = path / "generation_config.json"
        generation = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self.generation_defaults: Stated = {
            "generation_config.json": stated(generation) | {"eos_token_id": list(self.end_of_turn_ids)},
            "config.json": {"context_length": self.trained_context_length},
        }
        self.reset()

    def other_reader(self) -> None:
        """See ``Runtime.other_reader``: there is none."""

    def decode_text(self, token_ids: Sequence[int]) -> str:
        """See ``Runtime.decode_text``."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def reset(self) -> None:
        """See ``Runtime.reset``."""
        self.cache = DynamicCache(config=self.model.config)

    @torch.no_grad()
    def _run(self, token_ids: Sequence[int], keep: int) -> np.ndarray:
        if not len(token_ids):
            raise ExportError("There is no token to run; give at least one.")
        used = self.cache.get_seq_length()
        if used + len(token_ids) > self.context_length:
            raise ExportError(
                f"{used + len(token_ids)} tokens do not fit into a context of {self.context_length}."
            )
        output = self.model(
            input_ids=torch.tensor([list(token_ids)]),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        return output.logits[0, :, : self.vocabulary_size].float().numpy()

    def forward(self, token_ids: Sequence[int]) -> np.ndarray:
        """See ``Runtime.forward``."""
        return self._run(token_ids, 0)

    def prefill(self, token_ids: Sequence[int]) -> np.ndarray:
        """See ``Runtime.prefill``."""
        return self._run(token_ids, 1)[-1]

    def decode(self, token_id: int) -> np.ndarray:
        """See ``Runtime.decode``."""
        return self._run([token_id], 1)[-1]

    def close(self) -> None:
        """See ``Runtime.close``."""
        del self.model, self.cache
