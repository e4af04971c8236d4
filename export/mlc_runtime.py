"""MLC folders on the CPU: the compiled library in TVM's Relax virtual machine."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tokenizers import Tokenizer
from tvm import relax
from tvm.contrib import tvmjs

from export.backend import Backend
from export.errors import ExportError
from export.generation import Stated
from export.mlc import render_conversation
from export.runtime import Message

MAXIMUM_CONTEXT = 4096
CHUNK = 256
"""Tokens of one call of the library."""


class MlcReader:
    """See ``export.runtime.ChatReader``. Conversations are rendered from ``conv_template``, as MLC's engine
    does, not from the Jinja template beside it."""

    name = "MLC"

    def __init__(self, conversation_template: Mapping[str, Any], tokenizer_file: Path):
        """
        Args:
            conversation_template: ``conv_template`` of a mlc-chat-config.json.
            tokenizer_file: the tokenizer.json beside it.

        Raises:
            ExportError: the tokenizer cannot be read.
        """
        self._template = dict(conversation_template)
        try:
            self._tokenizer = Tokenizer.from_file(str(tokenizer_file))
        except Exception as error:  # tokenizers raises plain Exception
            raise ExportError(f"{tokenizer_file}: cannot be read ({error}).") from error

    def tokenize(self, text: str) -> list[int]:
        """See ``Runtime.tokenize``."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def completion_ids(self, text: str) -> None:
        """See ``ChatReader.completion_ids``: MLC's engine adds none."""

    def chat_text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """See ``Runtime.chat_text``."""
        return render_conversation(self._template, messages, add_generation_prompt)

    def chat_ids(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        """See ``Runtime.chat_ids``."""
        return self.tokenize(self.chat_text(messages, add_generation_prompt))


class MlcRuntime(MlcReader):
    """See ``export.runtime.Runtime``."""

    name = "tvm"

    def __init__(self, path: Path, threads: int = 1, context_length: int | None = None):
        """
        Args:
            path: a folder with mlc-chat-config.json, tensor-cache.json and ``libs/*-x86_64-cpu.so``.
            threads: CPU threads of TVM's pool, for the whole process; the pool never grows, so no later
                runtime of the process gets more than the first.
            context_length: tokens of cache; the folder's own maximum, at most 4096, by default.

        Raises:
            ExportError: a file is missing, damaged, or does not fit the library.
        """
        path = Path(path)
        try:
            self.config = json.loads((path / "mlc-chat-config.json").read_text(encoding="utf-8"))
            super().__init__(self.config["conv_template"], path / "tokenizer.json")
            self.trained_context_length = int(self.config["context_window_size"])
            model = self.config["model_config"]
            model = {**model, **model.get("text_config", {})}
            self.vocabulary_size = int(self.config["active_vocab_size"])
            self.end_of_turn_ids = tuple(sorted(int(end) for end in self._template["stop_token_ids"]))
            eos = self.config["eos_token_id"]  # one id or a list
            self.eos_token_id: int | None = int(eos[0] if isinstance(eos, list) else eos)
            (library,) = sorted((path / "libs").glob("*-x86_64-cpu.so"))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ExportError(f"{path}: is no complete MLC folder ({error}).") from error
        # The pool never grows beyond this variable, OMP_NUM_THREADS, or half of the processors.
        os.environ["TVM_NUM_THREADS"] = str(threads)
        tvm.get_global_func("runtime.config_threadpool")(1, threads)
        self._tvm, self._device = tvm, tvm.cpu()
        try:
            self._machine = relax.VirtualMachine(tvm.runtime.load_module(str(library)), self._device)
            self.metadata = json.loads(str(self._machine["_metadata"]()))
            parameters, _ = tvmjs.load_tensor_cache(str(path), self._device)
            names = self.metadata["parameters"]
            self._parameters = [parameters[name] for name in names]
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ExportError(f"{path}: library or weights cannot be loaded ({reason}).") from error
        self.backend = Backend(
            requested={"device": "cpu", "threads": threads},
            effective={
                "device": str(self._device).partition(":")[0],
                "threads": int(tvm.get_global_func("runtime.NumThreads")()),
                "library": library.name,
                "target": str(self.metadata.get("target", "not recorded")),
                "version": tvm.__version__,
            },
        )
        self.generation_defaults: Stated = {
            "mlc-chat-config.json": {
                **{key: self.config.get(key) for key in ("temperature", "top_p", "repetition_penalty")},
                "eos_token_id": eos if isinstance(eos, list) else [eos],
                "context_length": self.trained_context_length,
            },
            "mlc-chat-config.json's conv_template": {"eos_token_id": list(self.end_of_turn_ids)},
            "mlc-chat-config.json's model_config": {"context_length": model.get("context_window_size")},
            library.name: {"context_length": self.metadata["context_window_size"]},
        }
        architecture = self.metadata["architecture"]
        self._embedding_rows = int(architecture["vocabulary_size"])
        for key, compiled in (
            ("position_embedding_base", architecture["rope_theta"]),
            ("vocab_size", architecture["vocabulary_size"]),
            ("num_hidden_layers", architecture["layers"]),
            ("rms_norm_eps", architecture["norm_epsilon"]),
        ):
            if model[key] != compiled:
                raise ExportError(
                    f"{path / 'mlc-chat-config.json'}: {key} is {model[key]}, but the library was compiled "
                    f"with {compiled}."
                )
        self.context_length = context_length or min(self.trained_context_length, MAXIMUM_CONTEXT)
        shape = (self.context_length, architecture["key_value_heads"], architecture["head_dim"])
        # Not filled: only positions already written are read, and memory is taken up as the cache fills.
        self._caches = [
            tvm.runtime.empty(shape, "float32", self._device) for _ in range(2 * architecture["layers"])
        ]
        self._used = 0
        try:
            self._call("forward_one", [0])
        except Exception as error:  # the library checks the shape and type of every parameter
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ExportError(f"{path}: the weights do not fit the library ({reason}).") from error
        self.reset()

    def other_reader(self) -> None:
        """See ``Runtime.other_reader``: there is none."""

    def decode_text(self, token_ids: Sequence[int]) -> str:
        """See ``Runtime.decode_text``."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def reset(self) -> None:
        """See ``Runtime.reset``."""
        self._used = 0

    def _call(self, function: str, token_ids: Sequence[int]) -> np.ndarray:
        if self._used + len(token_ids) > self.context_length:
            raise ExportError(
                f"{self._used + len(token_ids)} tokens do not fit into a context of {self.context_length}."
            )
        ids = np.array(token_ids, np.int32)
        if not (ids.size > 0 and ids.min() >= 0 and ids.max() < self._embedding_rows):
            raise ExportError(
                f"Token ids must lie between 0 and {self._embedding_rows - 1}, and at least one is needed."
            )
        tensor = self._tvm.runtime.tensor
        logits = self._machine[function](
            tensor(ids, self._device),
            tensor(np.array([self._used], np.int64), self._device),
            *self._caches,
            *self._parameters,
        )
        self._used += len(token_ids)
        return logits.numpy()[:, : self.vocabulary_size]

    def forward(self, token_ids: Sequence[int]) -> np.ndarray:
        """See ``Runtime.forward``."""
        return np.concatenate([self._call("forward", part) for part in _chunks(token_ids)])

    def prefill(self, token_ids: Sequence[int]) -> np.ndarray:
        """See ``Runtime.prefill``."""
        return [self._call("forward_last", part) for part in _chunks(token_ids)][-1][-1]

    def decode(self, token_id: int) -> np.ndarray:
        """See ``Runtime.decode``."""
        return self._call("forward_one", [token_id])[-1]

    def close(self) -> None:
        """See ``Runtime.close``."""
        del self._machine, self._parameters, self._caches


def _chunks(token_ids: Sequence[int]) -> list[Sequence[int]]:
    return [token_ids[start : start + CHUNK] for start in range(0, max(len(token_ids), 1), CHUNK)]
