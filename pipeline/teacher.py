"""The teacher as a local folder of safetensors, whatever it came as."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from export.errors import ExportError
from export.llama_cpp_runtime import LlamaCppRuntime
from export.untrusted import check_chat_template, check_gguf, check_model_folder
from pipeline.artifacts import Artifact, Store, sha256_of_file, write_json
from pipeline.conversations import fixed_conversations
from pipeline.errors import UserError, hub_error
from pipeline.models import load_model, load_tokenizer, save_model
from pipeline.recipe import Recipe, Teacher
from pipeline.sources import packaged_file

STAGE = "teacher"
VERSION = 2
DIGITS_APART = ("smollm", "starcoder", "refact", "command-r")
"""llama.cpp's names of the pre-tokenizers that cut every digit off, then cut as GPT-2's does."""

WANTED_FILES = (
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "LICENSE*",
)


def run(store: Store, recipe: Recipe) -> Artifact:
    """Brings the teacher into the store.

    Returns:
        ``model/`` (safetensors, tokenizer with chat template, generation defaults) and ``source.json``.

    Raises:
        UserError: there is no such model, it has no safetensors, or no chat template.
    """
    section = recipe.teacher
    source: dict[str, Any] = {
        "model": section.model,
        "revision": section.revision,
        "licence": section.licence,
    }
    gguf = packaged_gguf(section.model)
    if gguf is not None:
        trusted_data("teacher.model", check_gguf, gguf)
        source["files"] = {gguf.name: sha256_of_file(gguf)}
    else:
        folder = local_folder("teacher.model", section.model, section.revision, wanted_files(section))
        if not list(folder.glob("*.safetensors")):
            raise UserError(
                f"teacher.model: {folder} holds no .safetensors file; martlet reads no pickled weights."
            )
        source["files"] = model_digests(folder, wanted_files(section))
        _check_files(source["files"], section.model)
        trusted_data("teacher.model", check_model_folder, folder)

    def make(output: Path, work: Path) -> None:
        if gguf is not None:
            store.report(f"teacher: dequantizing {gguf.name}")
            _import_gguf(gguf, output / "model")
        else:
            (output / "model").mkdir()
            for name in source["files"]:
                shutil.copy(folder / name, output / "model" / name)
        _check(output / "model", section)
        write_json(output / "source.json", source)

    return store.get_or_make(
        STAGE, VERSION, {"trust_remote_code": section.trust_remote_code, **source}, {}, make
    )


def wanted_files(section: Teacher) -> list[str]:
    """Patterns of the files that make a teacher; its repository's code only where the recipe trusts it."""
    return [*WANTED_FILES, "*.py"] if section.trust_remote_code else list(WANTED_FILES)


def trusted_data(key: str, check: Callable[..., None], *arguments: Any) -> None:
    """Runs a check of ``export.untrusted``.

    Args:
        key: of the recipe, for the sentence.
        check: the function.
        arguments: what it is called with.

    Raises:
        UserError: the check fails.
    """
    try:
        check(*arguments)
    except ExportError as error:
        raise UserError(f"{key}: {error}") from None


def packaged_gguf(model: str) -> Path | None:
    """The GGUF file of ``package:NAME``; None for models of other kinds.

    Raises:
        UserError: the package is not installed or carries no GGUF.
    """
    kind, _, package = model.partition(":")
    if kind != "package" or not package:
        return None
    path = packaged_file(package, ".gguf")
    if path is None:
        raise UserError(f"teacher.model: the package {package} carries no .gguf file.")
    return path


def model_digests(folder: Path, patterns: Iterable[str]) -> dict[str, str]:
    """SHA-256 of a model folder's files that fit the patterns, by name."""
    return {
        path.name: sha256_of_file(path)
        for pattern in patterns
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }


def local_folder(key: str, model: str, revision: str | None, patterns: list[str]) -> Path:
    """A model's folder on this machine; what the hub has is brought here.

    Args:
        key: of the recipe, for sentences.
        model: a folder, or a name on the hub.
        revision: commit or tag of a name.
        patterns: of the files that are brought.

    Raises:
        UserError: there is no such model.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.is_absolute():
        raise UserError(f"{key}: {folder} is no folder.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        sentence = f"{model} is neither a local folder nor to be had from the hub ({reason})."
        raise hub_error(f"{key}: {sentence}", error) from error


def _check_files(names: Iterable[str], model: str) -> None:
    """Weights alone make no teacher. transformers would build an empty tokenizer without complaint."""
    if "config.json" not in names:
        raise UserError(f"teacher.model: {model} holds no config.json; give a whole Hugging Face folder.")
    if not {"tokenizer.json", "tokenizer.model", "vocab.json"} & set(names):
        raise UserError(
            f"teacher.model: {model} holds no tokenizer (tokenizer.json, tokenizer.model or vocab.json); "
            "save the tokenizer into the same folder."
        )


def _check(folder: Path, section: Teacher) -> None:
    """The stored teacher loads, has a chat template, and a row of its embedding for every token."""
    tokenizer = load_tokenizer(folder, section.trust_remote_code)
    if not tokenizer.chat_template:
        raise UserError(
            f"teacher.model: {section.model} has no chat template; choose an instruction-tuned model."
        )
    templates = tokenizer.chat_template
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        trusted_data("teacher.model", check_chat_template, template, section.model)
    rows = load_model(folder, section.trust_remote_code).get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise UserError(
            f"teacher.model: the tokenizer of {section.model} has token ids up to {highest}, but the model "
            f"has {rows} embedding rows; this tokenizer belongs to another model."
        )


def _import_gguf(path: Path, folder: Path) -> None:
    """Dequantizes a GGUF and mends what that import gets wrong.

    The end-of-turn token comes from the chat template's own use, since in some files the declared one is
    the start-of-turn token; the configuration is no longer a quantized model's; and the tokenizer is
    saved without the GGUF that transformers would store beside it.
    """
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"teacher.model: transformers cannot load {path.name} ({reason}).") from error
    if not tokenizer.chat_template:
        raise UserError(f"teacher.model: {path.name} holds no chat template.")
    _mend_pre_tokenizer(tokenizer, path)
    end = end_of_turn(tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.config.eos_token_id = end
    if model.config.pad_token_id is None:
        model.config.pad_token_id = end
    # A note on where the weights were read from, different on every machine.
    model.config._name_or_path = ""
    generation = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=model.config.pad_token_id
    )
    save_model(model, tokenizer, folder, generation)
    for name in ("tokenizer.model", path.name):
        (folder / name).unlink(missing_ok=True)


def _mend_pre_tokenizer(tokenizer: Any, path: Path) -> None:
    """Gives an imported tokenizer the pre-tokenizer that its GGUF names, and proves it.

    transformers takes GPT-2's for all byte-level tokenizers, which cuts white space before digits otherwise
    than the model was trained with.

    Raises:
        UserError: token ids of the fixed conversations are not those of llama.cpp.
    """
    runtime = LlamaCppRuntime(path, context_length=64)
    try:
        name = runtime.metadata("tokenizer.ggml.pre")
        if name in DIGITS_APART:
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            )
        for messages in fixed_conversations():
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            if runtime.tokenize(text) != tokenizer(text, add_special_tokens=False)["input_ids"]:
                raise UserError(
                    f"teacher.model: transformers reads the tokenizer of {path.name} (pre-tokenizer {name}) "
                    f"otherwise than llama.cpp, for example in {text[-80:]!r}; give the model as a Hugging "
                    "Face folder instead."
                )
    finally:
        runtime.close()


def end_of_turn(tokenizer: Any) -> int:
    """The special token that the chat template puts behind an assistant's message.

    Raises:
        UserError: it puts none.
    """
    marker = "zzz"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": marker}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    behind = tokenizer(text[text.rindex(marker) + len(marker) :], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | {
        token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    for token_id in behind:
        if token_id in special:
            return int(token_id)
    raise UserError("The chat template ends no turn with a special token, so nothing could stop generation.")
