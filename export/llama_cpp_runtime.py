"""GGUF files in llama.cpp, through llama-cpp-python."""

import ctypes
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from export.backend import Backend, instruction_sets_of_processor
from export.errors import ExportError
from export.generation import Stated
from export.runtime import Message

MAXIMUM_CONTEXT = 4096
BATCH = 512
SAMPLING = {
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "penalty_repeat",
}
"""Names of sampling defaults in GGUF's metadata."""


@llama_cpp.llama_log_callback
def _only_errors(level: int, text: bytes, user_data: Any) -> None:
    line = text.decode(errors="replace").strip()
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        _errors.append(line)
    elif "model buffer size" in line:  # "load_tensors:   CPU_REPACK model buffer size =    60.20 MiB"
        _buffers.append(line.partition(":")[2].replace("model buffer size =", "").strip())


_errors: list[str] = []
_buffers: list[str] = []


class LlamaCppReader:
    """See ``export.runtime.ChatReader``: llama.cpp's tokenizer and the template of a GGUF file, whose
    weights, if it holds any, stay on disk."""

    name = "llama.cpp"

    def __init__(self, path: Path, vocabulary_only: bool = True):
        """
        Args:
            path: a GGUF file.
            vocabulary_only: load no weights.

        Raises:
            ExportError: llama.cpp refuses the file.
        """
        self._path = Path(path)
        llama_cpp.llama_log_set(_only_errors, ctypes.c_void_p(0))
        _errors.clear()
        _buffers.clear()
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.vocab_only = vocabulary_only
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            reason = _errors[0] if _errors else "no reason given"
            raise ExportError(f"{path}: llama.cpp cannot load this file ({reason}).")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        template = llama_cpp.llama_model_chat_template(self._model, None)
        self.chat_template = None if template is None else template.decode()
        self._compiled_template: Template | None = None

    def metadata(self, key: str) -> str | None:
        """A value of the file's metadata as text, cut off at 255 bytes; None where the file has none."""
        buffer = ctypes.create_string_buffer(256)
        size = llama_cpp.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace") if size >= 0 else None

    def tokenize(self, text: str) -> list[int]:
        """See ``Runtime.tokenize``."""
        return self._tokenize(text, add_special=False)

    def completion_ids(self, text: str) -> list[int]:
        """See ``ChatReader.completion_ids``."""
        return self._tokenize(text, add_special=True)

    def _tokenize(self, text: str, add_special: bool) -> list[int]:
        data = text.encode()
        size = len(data) + 8
        buffer = (llama_cpp.llama_token * size)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), buffer, size, add_special, True)
        if count < 0:
            raise ExportError(f"llama.cpp needs {-count} tokens for {len(data)} bytes of text.")
        return list(buffer[:count])

    def chat_text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """See ``Runtime.chat_text``."""
        try:
            return self._template().render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special_tokens(),
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise ExportError(f"{self._path}: its chat template cannot be rendered ({error}).") from error

    def chat_ids(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        """See ``Runtime.chat_ids``. Where llama.cpp adds a BOS by itself, the template's own is taken away,
        as in llama.cpp's chat; what is left, even a second one, counts."""
        text, special = self.chat_text(messages, add_generation_prompt), self._special_tokens()
        if llama_cpp.llama_vocab_get_add_bos(self._vocab) and "bos_token" in special:
            text = text.removeprefix(special["bos_token"])
        return self._tokenize(text, add_special=True)

    def _template(self) -> Template:
        if self._compiled_template is None:
            if self.chat_template is None:
                raise ExportError(f"{self._path}: holds no chat template.")
            # As transformers sets it up, whose renderings are the reference.
            environment = ImmutableSandboxedEnvironment(
                trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
            )
            environment.filters["tojson"] = _to_json
            environment.globals["raise_exception"] = _raise_exception
            environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
            self._compiled_template = environment.from_string(self.chat_template)
        return self._compiled_template

    def _special_tokens(self) -> dict[str, str]:
        """Names that templates use, for those special tokens that the file names."""
        ids = {
            "bos_token": llama_cpp.llama_vocab_bos(self._vocab),
            "eos_token": llama_cpp.llama_vocab_eos(self._vocab),
            "pad_token": llama_cpp.llama_vocab_pad(self._vocab),
        }
        return {
            name: llama_cpp.llama_vocab_get_text(self._vocab, token_id).decode(errors="replace")
            for name, token_id in ids.items()
            if token_id >= 0
        }

    def close(self) -> None:
        """Frees what was loaded. The reader is not used afterwards."""
        if self._model is not None:
            llama_cpp.llama_model_free(self._model)
            self._model = None


class LlamaCppRuntime(LlamaCppReader):
    """See ``export.runtime.Runtime``."""

    def __init__(self, path: Path, threads: int = 1, context_length: int | None = None):
        """
        Args:
            path: a GGUF file.
            threads: CPU threads.
            context_length: tokens of cache; the file's own maximum, at most 4096, by default.

        Raises:
            ExportError: llama.cpp refuses the file.
        """
        super().__init__(path, vocabulary_only=False)
        self.trained_context_length = llama_cpp.llama_model_n_ctx_train(self._model)
        self.context_length = context_length or min(self.trained_context_length, MAXIMUM_CONTEXT)
        self._rows = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self.vocabulary_size = self._rows
        # The converter fills the vocabulary up to the embedding's rows with tokens that it marks as unused.
        while self.vocabulary_size and (
            llama_cpp.llama_vocab_get_attr(self._vocab, self.vocabulary_size - 1)
            & llama_cpp.LLAMA_TOKEN_ATTR_UNUSED
        ):
            self.vocabulary_size -= 1
        eos = llama_cpp.llama_vocab_eos(self._vocab)
        self.eos_token_id: int | None = eos if eos >= 0 else None
        self.end_of_turn_ids = tuple(
            token_id for token_id in range(self._rows) if llama_cpp.llama_vocab_is_eog(self._vocab, token_id)
        )
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = self.context_length
        context.n_batch = min(BATCH, self.context_length)
        context.n_ubatch = context.n_batch
        context.n_threads = context.n_threads_batch = threads
        self._batch_size = context.n_batch
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        if not self._context:
            reason = _errors[0] if _errors else "no reason given"
            llama_cpp.llama_model_free(self._model)
            raise ExportError(f"{path}: llama.cpp cannot make a context of {self.context_length} ({reason}).")
        self.backend = _backend(threads, llama_cpp.llama_n_threads(self._context))
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(self._batch_size, 0, 1)
        self._used = 0
        said = {key: self.metadata(f"general.sampling.{name}") for key, name in SAMPLING.items()}
        numbers = {key: None if text is None else float(text) for key, text in said.items()}
        self.generation_defaults: Stated = {
            self._path.name: {**numbers, "context_length": self.trained_context_length}
        }

    def other_reader(self) -> None:
        """See ``Runtime.other_reader``: there is none."""

    def decode_text(self, token_ids: Sequence[int]) -> str:
        """See ``Runtime.decode_text``."""
        pieces = []
        buffer = ctypes.create_string_buffer(512)
        for token_id in token_ids:
            size = llama_cpp.llama_token_to_piece(self._vocab, token_id, buffer, 512, 0, False)
            pieces.append(buffer.raw[: max(size, 0)])
        return b"".join(pieces).decode(errors="replace")

    def reset(self) -> None:
        """See ``Runtime.reset``."""
        llama_cpp.llama_memory_clear(self._memory, True)
        self._used = 0

    def _run(self, token_ids: Sequence[int], every_position: bool) -> np.ndarray:
        if not len(token_ids):
            raise ExportError("There is no token to run; give at least one.")
        if self._used + len(token_ids) > self.context_length:
            raise ExportError(
                f"{self._used + len(token_ids)} tokens do not fit into a context of {self.context_length}."
            )
        # Written into place: the logits of 2048 tokens take a gigabyte at large vocabularies.
        logits = np.empty((len(token_ids) if every_position else 1, self.vocabulary_size), dtype=np.float32)
        row = 0
        batch = self._batch
        for start in range(0, len(token_ids), self._batch_size):
            part = token_ids[start : start + self._batch_size]
            last = start + len(part) == len(token_ids)
            for place, token_id in enumerate(part):
                batch.token[place] = token_id
                batch.pos[place] = self._used + place
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = 0
                batch.logits[place] = every_position or (last and place == len(part) - 1)
            batch.n_tokens = len(part)
            status = llama_cpp.llama_decode(self._context, batch)
            if status != 0:
                raise ExportError(f"llama.cpp failed to run {len(part)} tokens (status {status}).")
            self._used += len(part)
            places = range(len(part)) if every_position else ([len(part) - 1] if last else [])
            for place in places:
                pointer = llama_cpp.llama_get_logits_ith(self._context, place)
                logits[row] = np.ctypeslib.as_array(pointer, shape=(self.vocabulary_size,))
                row += 1
        return logits

    def forward(self, token_ids: Sequence[int]) -> np.ndarray:
        """See ``Runtime.forward``."""
        return self._run(token_ids, every_position=True)

    def prefill(self, token_ids: Sequence[int]) -> np.ndarray:
        """See ``Runtime.prefill``."""
        return self._run(token_ids, every_position=False)[-1]

    def decode(self, token_id: int) -> np.ndarray:
        """See ``Runtime.decode``."""
        return self._run([token_id], every_position=False)[-1]

    def close(self) -> None:
        """See ``Runtime.close``."""
        if self._model is not None:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self._context)
        super().close()


def _backend(requested_threads: int, threads: int) -> Backend:
    """llama.cpp's own account of the model loaded last. Instruction sets are chosen when it is compiled: one
    that the processor has and the library lacks is a slow build that nobody would notice otherwise."""
    flags = llama_cpp.llama_print_system_info().decode().removeprefix("CPU :").split("|")
    built_with = [flag.split("=")[0].strip() for flag in flags if flag.strip().endswith("= 1")]
    weights = [" ".join(buffer.split()) for buffer in _buffers]
    return Backend(
        requested={
            "device": "CPU",
            "threads": requested_threads,
            "instruction_sets": instruction_sets_of_processor(),
        },
        effective={
            "device": "CPU" if all(place.startswith("CPU") for place in weights) else ", ".join(weights),
            "threads": threads,
            "instruction_sets": built_with,
            "weights_in": weights,
            "repacked": next((place for place in weights if place.startswith("CPU_REPACK")), "none"),
        },
    )


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant says, for training; rendering passes it through."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        """The nodes between the two tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
