"""A Modelfile for Ollama: which GGUF file, how a conversation is written, where an answer stops."""

from collections.abc import Mapping
from typing import Any

LONGEST_CONTEXT = 8192
"""Ollama allocates the whole context when it loads a model."""

PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "repeat_penalty",
}
"""Keys of ``generation_config.json``, and Ollama's names for them."""


def modelfile(
    gguf: str,
    conversation: Mapping[str, Any] | None,
    context_length: int,
    generation: Mapping[str, Any] | None = None,
) -> str:
    """The text of a Modelfile.

    Args:
        gguf: name of the GGUF file beside it.
        conversation: the model's template as ``export.mlc.conversation_template`` says it; None leaves the
            choice of a template to Ollama, which compares the file's own with those that it knows.
        context_length: tokens that the model was trained for.
        generation: content of the model's ``generation_config.json``; Ollama has defaults of its own for what
            it does not state.
    """
    generation = generation or {}
    lines = [f"FROM ./{gguf}", f"PARAMETER num_ctx {min(context_length, LONGEST_CONTEXT)}"]
    for key, name in PARAMETERS.items():
        if generation.get(key) is not None:
            lines.append(f"PARAMETER {name} {generation[key]}")
    template = None if conversation is None else go_template(conversation)
    if conversation is not None and template is not None:
        lines.append(f'TEMPLATE """{template}"""')
        if conversation["system_message"]:
            lines.append(f'SYSTEM """{conversation["system_message"]}"""')
        lines += [f'PARAMETER stop "{end}"' for end in conversation["stop_str"]]
    return "\n".join(lines) + "\n"


def go_template(conversation: Mapping[str, Any]) -> str | None:
    """A conversation template in Go's template language, as Ollama renders it.

    Args:
        conversation: as of ``modelfile``.

    Returns:
        The template, or None where a Modelfile cannot hold it.
    """
    roles, separators = conversation["roles"], conversation["seps"]
    content = conversation["role_content_sep"]
    head, mark, tail = conversation["system_template"].partition("{system_message}")
    texts = {
        "head": head,
        "tail": tail,
        "user": roles["user"] + content,
        "user end": separators[0],
        "assistant": roles["assistant"] + content,
        "assistant end": separators[-1],
        "answer": roles["assistant"] + conversation["role_empty_sep"],
    }
    if any('"""' in text for text in (*texts.values(), conversation["system_message"])):
        return None
    literal = {name: text.replace("{{", '{{ "{{" }}') for name, text in texts.items()}
    return "".join(
        (
            literal["head"],
            "{{ .System }}" if mark else "",
            literal["tail"],
            '{{ range .Messages }}{{ if eq .Role "user" }}',
            literal["user"],
            "{{ .Content }}",
            literal["user end"],
            '{{ else if eq .Role "assistant" }}',
            literal["assistant"],
            "{{ .Content }}",
            literal["assistant end"],
            "{{ end }}{{ end }}",
            literal["answer"],
        )
    )
