"""Fixtures shared by all tests: tiny checkpoints with a real tokenizer, trained here on real text."""

import json
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SENTENCE = "The martlet is a small swallow that never lands; number {} of them crossed the sea in spring."
CHATML_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def english_text() -> str:
    """Python's own language reference: real English text that needs no download."""
    return "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


def train_tokenizer(vocabulary_size: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer built like SmolLM2's (digits apart, three control tokens first)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(english_text()[:400_000].splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        chat_template=CHATML_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random Llama of SmolLM2's kind: tied head, grouped-query attention, rope theta 100000."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_recipe(tmp_path: Path, tiny_model_dir: Path) -> dict[str, Any]:
    """Values of a recipe that takes seconds: a tiny random teacher, its own text and chats, GGUF only."""
    text = tmp_path / "text.jsonl"
    with text.open("w", encoding="utf-8") as file:
        for document in range(120):
            words = " ".join(SENTENCE.format(document * 7 + sentence) for sentence in range(3))
            file.write(json.dumps({"text": words}) + "\n")
    chats = tmp_path / "chats.jsonl"
    with chats.open("w", encoding="utf-8") as file:
        for number in range(12):
            messages = [
                {"role": "user", "content": f"What is bird number {number}?"},
                {"role": "assistant", "content": SENTENCE.format(number)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return {
        "name": "Tiny",
        "threads": 1,
        "teacher": {"model": str(tiny_model_dir), "licence": "CC0-1.0"},
        "data": {
            "text": {
                "sources": [str(text)],
                "licence": "CC0-1.0",
                "sequence_length": 32,
                "train_tokens": 256,
                "held_out_tokens": 128,
                "calibration_tokens": 64,
            },
            "chats": {
                "sources": [str(chats)],
                "licence": "CC0-1.0",
                "conversations": 8,
                "held_out_conversations": 2,
                "max_tokens": 128,
            },
        },
        "student": {"prune": {"layers": 3}},
        "distill": {"evaluate_every": 2, "evaluate_tokens": 64, "checkpoint_every": 2, "control": True},
        "instruct": {"learning_rate": 1e-4, "batch_size": 4},
        "export": {"gguf": ["q8_0"], "mlc": [], "onnx": [], "pre_tokenizer": "smollm"},
        "validate": {"tokens": 64, "default": {"mean_kl": 1.0, "perplexity_ratio": 2.0}},
        "bench": {"prompt_tokens": 16, "generated_tokens": 4, "repetitions": 2},
    }


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Writes recipe values to a file."""

    def write(values: dict[str, Any]) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write
