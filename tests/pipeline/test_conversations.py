"""The fixed conversations hold what they are there for."""

import unicodedata

from pipeline.conversations import answered_conversations, fixed_conversations


def test_at_least_two_hundred_different_conversations_even_without_system_messages() -> None:
    conversations = fixed_conversations()
    assert len({str(messages) for messages in conversations}) == len(conversations)
    assert sum(messages[0]["role"] != "system" for messages in conversations) >= 200
    assert sum(messages[0]["role"] == "system" for messages in conversations) >= 50
    assert sum(len(messages) >= 5 for messages in conversations) >= 50
    for messages in conversations:
        turns = messages[1:] if messages[0]["role"] == "system" else messages
        assert [turn["role"] for turn in turns] == (["user", "assistant"] * len(turns))[: len(turns)]


def test_every_kind_of_difficult_text_is_there() -> None:
    texts = [messages[0]["content"] for messages in fixed_conversations() if len(messages) == 1]
    assert "" in texts
    for wanted in ("\n\n", "\r\n", "\t", "  ", "```", "<|im_end|>", "<|im_start|>", "</s>", "\u200d"):
        assert any(wanted in text for text in texts), wanted
    assert any(text.startswith(" ") for text in texts)
    assert any(text.endswith(" ") for text in texts)
    directions = {unicodedata.bidirectional(character) for text in texts for character in text}
    assert {"R", "AL", "AN"} <= directions
    names = {unicodedata.name(character, " ").split(" ")[0] for text in texts for character in text}
    assert {"CJK", "HIRAGANA", "HANGUL", "THAI", "DEVANAGARI", "CYRILLIC", "REGIONAL"} <= names
    assert any(unicodedata.category(character) == "No" for text in texts for character in text)


def test_answers_hold_no_control_tokens() -> None:
    assert len(answered_conversations()) >= 40
    assert not [messages for messages in answered_conversations() if "<" in messages[-1]["content"]]
