"""Runs an exported ONNX graph in plain ONNX Runtime; and asks ONNX Runtime GenAI about the same folder."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import onnxruntime_genai
from transformers import AutoTokenizer

from export.backend import Backend
from export.errors import ExportError
from export.generation import Stated, stated
from export.runtime import Message

# The graph computes logits at every position: longer prompts go in pieces, or [T, V] floats pile up.
PREFILL_CHUNK = 256
DEFAULT_CONTEXT = 4096
PROVIDERS = ["CPUExecutionProvider"]

NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxRuntime:
    """See ``export.runtime.Runtime``. A GroupQueryAttention graph with a preallocated key-value cache, which
    the graph reads and extends in place (past and present are the same memory)."""

    name = "onnxruntime"

    def __init__(self, path: Path, threads: int = 1, context_length: int | None = None):
        """
        Args:
            path: an ``.onnx`` file of a folder made by ``export.onnx.export_onnx``.
            threads: CPU threads, which sleep instead of spinning while they wait.
            context_length: tokens of cache; the file's own maximum, at most 4096, by default.

        Raises:
            ExportError: the file, its tokenizer or its configuration is missing or cannot be loaded.
        """
        path = Path(path)
        folder = path.parent.parent if path.parent.name == "onnx" else path.parent
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        try:
            genai, config, generation = (
                json.loads((folder / name).read_text(encoding="utf-8"))
                for name in ("genai_config.json", "config.json", "generation_config.json")
            )
            settings, search = genai["model"], genai["search"]
            own_maximum = int(settings["context_length"])
            genai_ends, own_ends = (_as_ids(part.get("eos_token_id")) for part in (settings, generation))
            self.generation_defaults: Stated = {
                "genai_config.json": {
                    **stated(search),
                    "eos_token_id": sorted(genai_ends),
                    "context_length": own_maximum,
                },
                "generation_config.json": {**stated(generation), "eos_token_id": sorted(own_ends)},
                "config.json": {
                    "context_length": config.get("text_config", config).get("max_position_embeddings")
                },
            }
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise ExportError(
                f"{folder}: its settings cannot be read ({error!r:.80}); export the model anew."
            ) from error
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self.session = onnxruntime.InferenceSession(str(path), options, providers=PROVIDERS)
        except Exception as error:  # ONNX Runtime raises many types of its own
            raise ExportError(f"{path}: cannot be loaded in ONNX Runtime ({error}).") from error
        self.backend = Backend(
            requested={"providers": PROVIDERS, "threads": threads},
            effective={
                # Those that got nodes of the graph; get_providers() also lists those that got none.
                "providers": sorted(
                    {part.ep_name for part in self.session.get_provider_graph_assignment_info()}
                ),
                "threads": self.session.get_session_options().intra_op_num_threads,
                "version": onnxruntime.__version__,
            },
        )
        inputs = {value.name: value for value in self.session.get_inputs()}
        if "past_key_values.0.key" not in inputs or "input_ids" not in inputs:
            raise ExportError(f"{path}: is no decoder with a key-value cache; export it with export.onnx.")
        self.trained_context_length = own_maximum
        self.eos_token_id: int | None = self.tokenizer.eos_token_id
        self.context_length = context_length or min(own_maximum, DEFAULT_CONTEXT)
        if self.context_length > own_maximum:
            raise ExportError(
                f"{path}: a context of {context_length} is asked for, but the model ends at {own_maximum}."
            )
        logits = next(value for value in self.session.get_outputs() if value.name == "logits")
        self.vocabulary_size = min(int(logits.shape[-1]), max(self.tokenizer.get_vocab().values()) + 1)
        # ONNX Runtime GenAI reads one file and transformers.js the other: an end is what ends both.
        self.end_of_turn_ids = tuple(sorted(genai_ends & own_ends))
        self._folder = folder
        self._inputs = inputs
        self._binding = self.session.io_binding()
        for name, value in inputs.items():
            if name.startswith("past_key_values."):
                shape = [1, int(value.shape[1]), self.context_length, int(value.shape[3])]
                cache = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, NUMPY_TYPES[value.type])
                self._binding.bind_ortvalue_input(name, cache)
                self._binding.bind_ortvalue_output(name.replace("past_key_values.", "present."), cache)
        self._bound_tokens = 0
        self.reset()

    def tokenize(self, text: str) -> list[int]:
        """See ``Runtime.tokenize``."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def completion_ids(self, text: str) -> list[int]:
        """See ``ChatReader.completion_ids``: what transformers.js adds."""
        return self.tokenizer(text)["input_ids"]

    def chat_text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """See ``Runtime.chat_text``.

        Raises:
            ExportError: the folder has no chat template.
        """
        if self.tokenizer.chat_template is None:
            raise ExportError("tokenizer_config.json holds no chat template, so there is no way to chat.")
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def chat_ids(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        """See ``Runtime.chat_ids``."""
        return self.tokenize(self.chat_text(messages, add_generation_prompt))

    def other_reader(self) -> "GenaiTokenizer":
        """See ``Runtime.other_reader``."""
        return GenaiTokenizer(self._folder)

    def decode_text(self, token_ids: Sequence[int]) -> str:
        """See ``Runtime.decode_text``."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def reset(self) -> None:
        """See ``Runtime.reset``."""
        self._used = 0

    def _run(self, token_ids: Sequence[int]) -> np.ndarray:
        """Appends tokens to the cache; logits [T, V of the graph], until the next run writes over them."""
        total = self._used + len(token_ids)
        if not token_ids:
            raise ExportError("no tokens were given to run.")
        if total > self.context_length:
            raise ExportError(f"{total} tokens do not fit into a context of {self.context_length}.")
        binding = self._binding
        binding.bind_cpu_input("input_ids", np.array([token_ids], dtype=np.int64))
        if "attention_mask" in self._inputs:
            binding.bind_cpu_input("attention_mask", np.ones((1, total), dtype=np.int64))
        if "position_ids" in self._inputs:
            binding.bind_cpu_input("position_ids", np.arange(self._used, total, dtype=np.int64)[None])
        if len(token_ids) != self._bound_tokens:  # as long as their shape stays, logits stay in one place
            binding.bind_output("logits")
            self._bound_tokens = len(token_ids)
        self.session.run_with_iobinding(binding)
        self._used = total
        return binding.get_outputs()[-1].numpy()[0]

    def forward(self, token_ids: Sequence[int]) -> np.ndarray:
        """See ``Runtime.forward``."""
        pieces = [
            self._run(token_ids[start : start + PREFILL_CHUNK])[:, : self.vocabulary_size].astype(np.float32)
            for start in range(0, len(token_ids), PREFILL_CHUNK)
        ]
        return np.concatenate(pieces)

    def prefill(self, token_ids: Sequence[int]) -> np.ndarray:
        """See ``Runtime.prefill``."""
        for start in range(0, len(token_ids), PREFILL_CHUNK):
            logits = self._run(token_ids[start : start + PREFILL_CHUNK])
        return logits[-1, : self.vocabulary_size].astype(np.float32)

    def decode(self, token_id: int) -> np.ndarray:
        """See ``Runtime.decode``."""
        return self._run([token_id])[-1, : self.vocabulary_size].astype(np.float32)

    def close(self) -> None:
        """See ``Runtime.close``."""
        del self.session, self._binding


def _as_ids(value: int | list[int] | None) -> set[int]:
    if value is None:
        return set()
    return {value} if isinstance(value, int) else {int(token_id) for token_id in value}


class GenaiTokenizer:
    """See ``export.runtime.ChatReader``: ONNX Runtime GenAI's own template engine and tokenizer."""

    name = "onnxruntime-genai"

    def __init__(self, folder: Path):
        """
        Args:
            folder: an exported folder, with ``genai_config.json``.

        Raises:
            ExportError: ONNX Runtime GenAI cannot load its tokenizer.
        """
        self._folder = folder
        try:
            self._tokenizer = onnxruntime_genai.Tokenizer(str(folder))
        except Exception as error:  # its errors are of many types
            raise ExportError(f"{folder}: fails in ONNX Runtime GenAI ({error}).") from error

    def completion_ids(self, text: str) -> None:
        """See ``ChatReader.completion_ids``: ONNX Runtime GenAI adds none."""

    def chat_ids(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        """See ``ChatReader.chat_ids``.

        Raises:
            ExportError: ONNX Runtime GenAI cannot render the conversation.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                json.dumps(list(messages)), add_generation_prompt=add_generation_prompt
            )
            return [int(token_id) for token_id in self._tokenizer.encode(text)]
        except Exception as error:
            raise ExportError(f"{self._folder}: fails in ONNX Runtime GenAI ({error}).") from error


def genai_greedy(folder: Path, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
    """Greedy continuation by ONNX Runtime GenAI of the graph that ``genai_config.json`` names.

    Args:
        folder: an exported folder.
        prompt_ids: token ids of the prompt.
        max_new_tokens: most tokens to add; an end-of-turn token, which is returned too, ends earlier.

    Raises:
        ExportError: ONNX Runtime GenAI cannot load or run the folder.
    """
    try:
        model = onnxruntime_genai.Model(str(folder))
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt_ids) + max_new_tokens, do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(np.array([list(prompt_ids)], dtype=np.int32))
        new_ids: list[int] = []
        while len(new_ids) < max_new_tokens and not generator.is_done():
            generator.generate_next_token()
            new_ids.append(int(generator.get_next_tokens()[0]))
        return new_ids
    except Exception as error:
        raise ExportError(f"{folder}: fails in ONNX Runtime GenAI ({error}).") from error
