"""Conversations as token ids, rendered by the model's own chat template."""

from typing import Any

from jinja2 import TemplateError

from pipeline.errors import UserError


def render_with_mask(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and which of them the assistant said.

    The template renders ever longer prefixes of the conversation. What an assistant message adds to the
    rendering that already asks for it (content and end of turn, not the role header) is the assistant's.

    Args:
        tokenizer: a `transformers` tokenizer with a chat template.
        messages: [{"role": ..., "content": ...}], ending with the assistant.

    Returns:
        Ids ``[T]`` and mask ``[T]``: 1 where the assistant's content or its end-of-turn token stands.

    Raises:
        UserError: the template rewrites earlier turns, so that prefixes do not tell the turns apart, or it
            refuses the conversation (some know no system message, or want the roles to alternate).
    """

    def render(count: int, add_generation_prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"data.chats.sources: the model's chat template refuses a conversation of {roles} ({error}); "
                "leave such conversations out or choose another model."
            ) from None

    text = render(len(messages), False)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(number, True), render(number + 1, False)
        if not after.startswith(before) or not text.startswith(after):
            raise UserError(
                "The chat template changes earlier turns when a conversation goes on, so the assistant's "
                "turns cannot be told apart; give a template that only appends."
            )
        # White space that the template puts behind the end of turn is not the assistant's.
        spans.append((len(before), len(before) + len(after[len(before) :].rstrip())))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [
        int(any(start < end and first <= start and end <= last for first, last in spans))
        for start, end in encoded["offset_mapping"]
    ]
    return list(encoded["input_ids"]), mask
