"""Evaluation by lm-evaluation-harness: its numbers on our files against torch's own, in float64."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, AutoTokenizer

from export.gguf import export_gguf
from export.runtime import open_runtime
from pipeline import evaluate
from pipeline.errors import UserError

SENTENCE = "The martlet is a small swallow that never lands; number {} of them crossed the sea in spring."
TEXTS = [" ".join(SENTENCE.format(number + sentence) for sentence in range(4)) for number in (3, 40)]
CHATS = [
    [
        {"role": "user", "content": "What is a martlet?"},
        {"role": "assistant", "content": "A swallow that never lands."},
    ],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Where does it fly?"},
        {"role": "assistant", "content": "Over the sea, in spring."},
    ],
]


def silent(line: str) -> None:
    """For progress that no test looks at."""


@pytest.fixture(scope="module")
def reference(tiny_model_dir: Path) -> tuple[Any, Any]:
    return (
        AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64).eval(),
        AutoTokenizer.from_pretrained(tiny_model_dir),
    )


@torch.no_grad()
def log_likelihoods(reference: tuple[Any, Any], ids: list[int]) -> torch.Tensor:
    """log p of each token but the first, float64."""
    logits = reference[0](torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def instance(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def model_of(folder: Path, context_length: int | None = None) -> evaluate.RuntimeModel:
    return evaluate.RuntimeModel(open_runtime(folder, 1, context_length), silent)


def test_likelihoods_are_torchs(tiny_model_dir: Path, reference: tuple[Any, Any]) -> None:
    tokenizer = reference[1]
    pairs = [("The martlet is a small", " swallow that never lands"), ("in spring. ", "The sea"), ("", "The")]
    found = model_of(tiny_model_dir).loglikelihood([instance("loglikelihood", *pair) for pair in pairs])
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        ids = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        # A space at the end of the context belongs to the token behind it.
        start = len(tokenizer(context.rstrip(), add_special_tokens=False)["input_ids"])
        if not context:
            ids, start = [tokenizer.eos_token_id, *ids], 1
        each = log_likelihoods(reference, ids)[start - 1 :]
        assert score == pytest.approx(float(each.sum()), abs=1e-3)
        assert not greedy  # a random model does not guess these words


def test_what_the_model_says_itself_is_greedy(tiny_model_dir: Path, reference: tuple[Any, Any]) -> None:
    model, tokenizer = reference
    prompt = "The martlet is a small swallow"
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    generated = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    generated = generated[: generated.index(2)] if 2 in generated else generated
    whole = tokenizer.decode(generated)
    ours = model_of(tiny_model_dir)
    asked = {"until": [], "max_gen_toks": 12}
    assert ours.generate_until([instance("generate_until", prompt, asked)]) == [whole]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    asked = {"until": ["never said", stop], "max_gen_toks": 12}
    assert ours.generate_until([instance("generate_until", prompt, asked)]) == [whole.split(stop)[0]]
    with pytest.raises(UserError, match="greedy ones only"):
        ours.generate_until([instance("generate_until", prompt, {"do_sample": True, "temperature": 0.7})])


def test_long_texts_are_read_in_windows(tiny_model_dir: Path, reference: tuple[Any, Any]) -> None:
    """Each token once; the last window is whole again, so its context is what fits before its tokens."""
    width = 32
    ids = reference[1](TEXTS[0], add_special_tokens=False)["input_ids"]
    assert 2 * width < len(ids)
    expected = 0.0
    for start in range(0, len(ids), width):
        part = ids[start : start + width]
        before = [reference[1].eos_token_id, *ids][: start + 1][-(width - len(part) + 1) :]
        expected += float(log_likelihoods(reference, [*before, *part])[-len(part) :].sum())
    found = model_of(tiny_model_dir, width).loglikelihood_rolling(
        [instance("loglikelihood_rolling", TEXTS[0])]
    )
    assert found[0] == pytest.approx(expected, abs=1e-3)


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "files"
    return export_gguf(tiny_model_dir, folder, "tiny", ["f16"], pre_tokenizer="smollm")[0]


def values(facts: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(row["task"], row["metric"]): row["value"] for row in facts["results"]}


def test_held_out_tasks_of_two_formats(
    tiny_model_dir: Path, tiny_gguf: Path, reference: tuple[Any, Any]
) -> None:
    tokenizer = reference[1]
    nats = size = 0.0
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        nats -= float(log_likelihoods(reference, [tokenizer.eos_token_id, *ids]).sum())
        size += len(text.encode())
    text_bits = nats / size / math.log(2)
    nats = size = 0.0
    for chat in CHATS:
        asked = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
        answered = chat[-1]["content"] + "<|im_end|>"
        before = len(tokenizer(asked.rstrip(), add_special_tokens=False)["input_ids"])
        ids = tokenizer(asked + answered, add_special_tokens=False)["input_ids"]
        nats -= float(log_likelihoods(reference, ids)[before - 1 :].sum())
        size += len(answered.encode())
    chat_bits = nats / size / math.log(2)
    for path in (tiny_model_dir, tiny_gguf):
        runtime = open_runtime(path, 1)
        facts = evaluate.run(runtime, [evaluate.TEXT, evaluate.CHATS], TEXTS, CHATS, None, None, silent)
        runtime.close()
        found = values(facts)
        assert found["held_out_text", "bits_per_byte"] == pytest.approx(text_bits, rel=2e-3)
        assert found["held_out_text", "byte_perplexity"] == pytest.approx(2**text_bits, rel=5e-3)
        assert found["held_out_chats", "bits_per_byte"] == pytest.approx(chat_bits, rel=2e-3)
        assert {row["documents"] for row in facts["results"]} == {2}
    limited = evaluate.run(open_runtime(tiny_gguf, 1), [evaluate.TEXT], TEXTS, [], 1, None, silent)
    assert {row["documents"] for row in limited["results"]} == {1}
    assert limited["limit"] == 1


def test_what_cannot_be_evaluated_is_said(tiny_gguf: Path, tmp_path: Path) -> None:
    runtime = open_runtime(tiny_gguf, 1)
    with pytest.raises(UserError, match="nothing for held_out_chats; give its data by --text or --chats"):
        evaluate.run(runtime, [evaluate.CHATS], TEXTS, [], None, None, silent)
    with pytest.raises(UserError, match="has no task 'no_such_task'"):
        evaluate.run(runtime, ["no_such_task"], [], [], None, None, silent)
    assert evaluate.release_of(tiny_gguf) is None
