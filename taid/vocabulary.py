"""Teacher and student must speak of the same tokens: what they share is checked, not assumed."""

from typing import Any

from taid.errors import TaidError

SHOWN = 3
"""How many differing tokens an error names."""


def shared_vocabulary_size(
    teacher_tokenizer: Any, student_tokenizer: Any, teacher_vocab_size: int, student_vocab_size: int
) -> int:
    """How many rows of both models' heads stand for the same tokens.

    The tokenizers' vocabulary maps are compared, not their names. Models often pad the embedding beyond
    the tokenizer's tokens (Qwen2.5: 151,936 rows in one size, 152,064 in another); rows that only one of
    the models has are trimmed.

    Args:
        teacher_tokenizer: a `transformers` tokenizer.
        student_tokenizer: a `transformers` tokenizer.
        teacher_vocab_size: rows of the teacher's head (``config.vocab_size``).
        student_vocab_size: rows of the student's head.

    Returns:
        The number of rows, from the first, that objectives compare.

    Raises:
        TaidError: the tokenizers differ, or a model has fewer rows than the tokenizer has tokens.
    """
    teacher_map = teacher_tokenizer.get_vocab()
    student_map = student_tokenizer.get_vocab()
    if teacher_map != student_map:
        differing = [
            token
            for token in {**teacher_map, **student_map}
            if teacher_map.get(token) != student_map.get(token)
        ]
        differing.sort(key=lambda token: min(teacher_map.get(token, 2**63), student_map.get(token, 2**63)))
        shown = "; ".join(
            f"{token!r} is {_described(teacher_map.get(token))} in the teacher's and "
            f"{_described(student_map.get(token))} in the student's"
            for token in differing[:SHOWN]
        )
        raise TaidError(
            f"Teacher and student have different tokenizers, {len(differing)} tokens differ: {shown}; "
            "choose a student with the teacher's tokenizer."
        )
    size = min(teacher_vocab_size, student_vocab_size)
    needed = max(teacher_map.values(), default=-1) + 1
    for role, rows in (("teacher", teacher_vocab_size), ("student", student_vocab_size)):
        if rows < needed:
            raise TaidError(
                f"The {role} model has {rows} rows for a tokenizer whose ids reach {needed - 1}; "
                "the tokenizer does not belong to this model."
            )
    return size


def _described(token_id: int | None) -> str:
    return "missing" if token_id is None else f"id {token_id}"
