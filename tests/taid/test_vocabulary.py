"""Vocabulary maps are compared, padding is trimmed, anything else is refused by name."""

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from taid import TaidError, shared_vocabulary_size


def tokenizer(words: list[str], **arguments) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(words)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=words[0])), **arguments
    )


def test_padded_rows_are_trimmed(tiny_tokenizer):
    size = len(tiny_tokenizer)
    assert shared_vocabulary_size(tiny_tokenizer, tiny_tokenizer, size + 128, size) == size
    assert shared_vocabulary_size(tiny_tokenizer, tiny_tokenizer, size + 128, size + 64) == size + 64


def test_names_do_not_matter():
    first = tokenizer(["a", "b", "c"], name_or_path="one")
    second = tokenizer(["a", "b", "c"], name_or_path="two")
    assert shared_vocabulary_size(first, second, 3, 3) == 3


def test_differing_tokens_are_named():
    with pytest.raises(TaidError) as caught:
        shared_vocabulary_size(tokenizer(["a", "b", "c", "d"]), tokenizer(["a", "c", "b"]), 4, 3)
    message = str(caught.value)
    assert "3 tokens differ" in message
    assert "'b' is id 1 in the teacher's and id 2 in the student's" in message
    assert "'d' is id 3 in the teacher's and missing in the student's" in message


def test_added_tokens_count():
    extended = tokenizer(["a", "b"])
    extended.add_tokens([AddedToken("<|new|>")])
    with pytest.raises(TaidError, match="new"):
        shared_vocabulary_size(tokenizer(["a", "b"]), extended, 3, 3)


def test_a_model_smaller_than_its_tokenizer_is_refused(tiny_tokenizer):
    size = len(tiny_tokenizer)
    with pytest.raises(TaidError, match="student model has"):
        shared_vocabulary_size(tiny_tokenizer, tiny_tokenizer, size, size - 1)
