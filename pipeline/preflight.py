"""Before any training: can every requested format hold the student? Told by its configuration and tokenizer
alone, in seconds, where an export would tell it after hours."""

import contextlib
import json
import math
import tempfile
from collections.abc import Callable, Collection, Sequence
from functools import cache
from pathlib import Path

from export.errors import ExportError
from export.gguf import export_gguf, export_vocabulary
from export.mlc import chat_config, check_libraries, check_windows, read_architecture
from export.onnx import export_onnx, export_tokenizer
from export.quantizations import MLC
from export.runtime import ChatReader
from export.torch_runtime import TransformersReader
from pipeline.artifacts import Artifact, Store, write_json
from pipeline.conversations import COMPLETED, ChatIds, chat_ids_of, reference_chat_ids
from pipeline.errors import UserError
from pipeline.exports import FORMATS
from pipeline.recipe import Recipe

STAGE = "preflight"
VERSION = 3


def run(store: Store, recipe: Recipe, student: Artifact) -> Artifact:
    """Proves that the recipe's formats can hold the student.

    Returns:
        ``preflight.json``: {"formats": [...]}, those that were proven.

    Raises:
        UserError: one cannot; the sentence names the format and the reason.
    """
    formats = [name for name in FORMATS if getattr(recipe.export, name)]

    def make(output: Path, work: Path) -> None:
        found = problems(
            student.path / "model",
            formats,
            pre_tokenizer=recipe.export.pre_tokenizer,
            libraries=recipe.export.mlc_libraries,
            log=store.log_file("preflight"),
        )
        require_none(found)
        write_json(output / "preflight.json", {"formats": formats})

    parameters = {
        "formats": formats,
        "pre_tokenizer": recipe.export.pre_tokenizer,
        "libraries": recipe.export.mlc_libraries,
    }
    return store.get_or_make(STAGE, VERSION, parameters, {"student": student}, make)


def require_none(found: list[str]) -> None:
    """Ends the command where there are problems.

    Raises:
        UserError: with the first one and the number of the others.
    """
    if found:
        more = f" ({len(found) - 1} more formats cannot hold it.)" if len(found) > 1 else ""
        raise UserError(found[0] + more)


def problems(
    model_dir: Path,
    formats: Collection[str],
    *,
    pre_tokenizer: str | None = None,
    libraries: Sequence[str] = (),
    chats: bool = True,
    log: Path | None = None,
) -> list[str]:
    """What keeps formats from holding a model.

    The exporters check architecture, configuration and chat template, and write what there is to write
    without weights; the runtimes' own tokenizers then read the fixed conversations from that. Where the
    rotary embedding is scaled, a small random model is exported, too.

    Args:
        model_dir: Hugging Face folder.
        formats: of ``pipeline.exports.FORMATS``.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer, for one that its converter does not recognise.
        libraries: what MLC libraries are compiled for.
        chats: a model without a chat template is a problem of every format; else only of MLC.
        log: file that keeps what llama.cpp's converter writes.

    Returns:
        A sentence for each format that cannot, with its name.
    """
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as opened:
        folder = Path(temporary)

        @cache
        def small_model() -> Path | None:
            return _with_few_small_layers(model_dir, folder / "small")

        def open_gguf() -> ChatReader:
            from export.llama_cpp_runtime import LlamaCppReader

            vocabulary = folder / "vocabulary.gguf"
            export_vocabulary(model_dir, vocabulary, pre_tokenizer=pre_tokenizer, log=log)
            if (small := small_model()) is not None:
                export_gguf(small, folder / "gguf", "small", ["f16"], pre_tokenizer=pre_tokenizer, log=log)
            reader = LlamaCppReader(vocabulary)
            opened.callback(reader.close)
            return reader

        def open_mlc() -> ChatReader:
            from export.mlc_runtime import MlcReader

            quantization = next(iter(MLC))
            check_libraries(libraries, quantization)
            architecture = read_architecture(model_dir, quantization)
            check_windows(architecture, libraries)
            config = chat_config(model_dir, architecture, quantization)
            return MlcReader(config["conv_template"], model_dir / "tokenizer.json")

        def open_onnx() -> ChatReader:
            from export.onnx_runtime import GenaiTokenizer

            export_tokenizer(model_dir, folder)
            if (small := small_model()) is not None:
                export_onnx(small, folder / "onnx", "small", ["fp32"], log=log)
            return GenaiTokenizer(folder)

        try:
            expected, completed = _expected_ids(model_dir, chats)
        except ExportError as error:
            return [f"export: no format can hold the model: {error}"]
        found = []
        openers: dict[str, Callable[[], ChatReader]] = {
            "mlc": open_mlc,
            "onnx": open_onnx,
            "gguf": open_gguf,
        }
        for name in [name for name in openers if name in formats]:
            try:
                reader = openers[name]()
                differing = _first_difference(reader, expected)
                continued = reader.completion_ids(COMPLETED)
            except ExportError as error:
                found.append(f"export.{name}: {error}")
                continue
            if differing is not None:
                remedy = "leave the format out or mend the tokenizer"
                if name == "gguf" and pre_tokenizer:
                    remedy = f"pre_tokenizer {pre_tokenizer} is not the model's, name another"
                found.append(
                    f"export.{name}: {reader.name} makes other token ids of the fixed conversations than "
                    f"transformers, first of number {differing}; {remedy}."
                )
            elif continued not in (None, completed):
                found.append(
                    f"export.{name}: {reader.name} makes the token ids {continued} of plain text to be "
                    f"continued, transformers {completed}; let add_bos_token and add_eos_token of the "
                    "model's tokenizer_config.json say what its tokenizer.json does."
                )
        return found


def _with_few_small_layers(model_dir: Path, folder: Path) -> Path | None:
    """A random checkpoint of the model's kind up to its first layer of full attention, with one head, for
    what only an export of weights tells: converters that pass a scaling of the rotary embedding over. None
    where there is no scaling."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(model_dir)
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("full_attention", rope).get("rope_type", "default") == "default":
        return None
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    small = {"hidden_size": head_dim, "intermediate_size": 2 * head_dim, "head_dim": head_dim}
    kinds = list(getattr(text, "layer_types", None) or ["full_attention"])
    kinds = kinds[: kinds.index("full_attention") + 1]  # converters may ask for the family's own pattern
    text.update(small | {"num_hidden_layers": len(kinds), "num_attention_heads": 1, "num_key_value_heads": 1})
    if getattr(text, "layer_types", None):
        text.layer_types = kinds
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
    return folder


def _expected_ids(model_dir: Path, chats: bool) -> tuple[ChatIds, list[int]]:
    """What transformers makes of the fixed conversations and of ``COMPLETED``."""
    reader = TransformersReader(model_dir)
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    rows = config.get("text_config", config).get("vocab_size", math.inf)
    highest = max(reader.tokenizer.get_vocab().values())
    if highest >= rows:
        raise ExportError(
            f"{model_dir / 'tokenizer.json'}: has token ids up to {highest}, but config.json a vocab_size of "
            f"{rows}; add rows to the embedding."
        )
    completed = reader.completion_ids(COMPLETED)
    if not chats and not reader.tokenizer.chat_template:
        return {}, completed
    return reference_chat_ids(reader), completed


def _first_difference(reader: ChatReader, expected: ChatIds) -> int | None:
    """The number of the first conversation that a reader reads otherwise."""
    read = chat_ids_of(reader, expected)
    for prompt, ids in expected.items():
        for number, (one, other) in enumerate(zip(ids, read[prompt], strict=True)):
            if one != other:
                return number
    return None
