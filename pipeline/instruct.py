"""Instruction tuning: TRL's SFTTrainer on chats, with loss on the assistant's turns only."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from export.adapters import MERGED_KL
from export.runtime import generate_greedily
from export.torch_runtime import TorchRuntime, load_in_torch
from pipeline.artifacts import Artifact, Store, write_json
from pipeline.chat_template import render_with_mask
from pipeline.conversations import SAMPLE_TOKENS, held_out_prompts
from pipeline.errors import GateFailed
from pipeline.fidelity import Fidelity
from pipeline.models import load_model, load_tokenizer, save_model
from pipeline.recipe import Recipe
from pipeline.training import ProgressLines, curve_of, deciding_values, reporting, train, training_values
from taid import LiveTeacher, TaidError, evaluate_distillation, freeze_embeddings

STAGE = "instruct"
VERSION = 2
MERGE_ROWS = 4
"""Held-out chats over which a merged adapter is compared with the adapter itself."""


def run(store: Store, recipe: Recipe, teacher: Artifact, student: Artifact, chats: Artifact) -> Artifact:
    """Tunes the student on the chats' assistant turns.

    Returns:
        ``model/``, ``curve.json``, ``evaluation.json`` {before, after: {assistant_cross_entropy,
        kl_to_teacher, tokens} on held-out chats; merge: ``loss_of_merging``, null without adapters}, and
        ``conversations.json``: greedy answers of teacher, student before and student after to held-out
        prompts, as they are.

    Raises:
        UserError: training diverges.
        GateFailed: the saved model is not the tuned model with its adapter apart.
    """
    section = recipe.instruct

    def make(output: Path, work: Path) -> None:
        model, tokenizer = load_model(student.path / "model"), load_tokenizer(student.path / "model")
        generation_config = model.generation_config
        train_examples = rendered(chats.path / "train.jsonl", tokenizer)
        held_out = rendered(chats.path / "held_out.jsonl", tokenizer)
        reference = LiveTeacher(load_model(teacher.path / "model", recipe.teacher.trust_remote_code))
        store.report("instruct: evaluating on held-out chats before")
        before = evaluate(model, reference, held_out)
        lora = None
        if section.lora is not None:
            lora = LoraConfig(
                r=section.lora.rank,
                lora_alpha=section.lora.alpha,
                lora_dropout=section.lora.dropout,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            )
        elif section.freeze_embeddings:
            freeze_embeddings(model)
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                **training_values(section, work, recipe.seed, STAGE),
                max_length=None,
                packing=False,
                completion_only_loss=False,
                dataset_kwargs={"skip_prepare_dataset": True},
                activation_checkpointing=False,
                average_tokens_across_devices=True,
            ),
            train_dataset=Dataset.from_list(
                [
                    {
                        "input_ids": input_ids,
                        "labels": [
                            token if kept else -100 for token, kept in zip(input_ids, mask, strict=True)
                        ],
                    }
                    for input_ids, mask in train_examples
                ]
            ),
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[
                ProgressLines(STAGE, store.report),
                *reporting(recipe, STAGE, work, store.root / "logs", store.report),
            ],
        )
        train(trainer, work, "instruct", store.report, section.timeout_s)
        adapted: Any = trainer.model
        rows = [input_ids for input_ids, _ in held_out[:MERGE_ROWS]] if lora is not None else []
        unmerged = [logits_of(adapted, row) for row in rows]
        tuned = adapted.merge_and_unload() if lora is not None else model
        tuned.requires_grad_(True)
        store.report("instruct: evaluating on held-out chats after")
        after = evaluate(tuned, reference, held_out)
        save_model(tuned, tokenizer, output / "model", generation_config)
        write_json(output / "curve.json", curve_of(trainer.state.log_history))
        del trainer, model, adapted, tuned, reference
        merge = None
        if lora is not None:
            merge = loss_of_merging(load_in_torch(output / "model"), rows, unmerged)
            require_merged(merge)
        write_json(output / "evaluation.json", {"before": before, "after": after, "merge": merge})
        prompts = held_out_prompts(chats.path / "held_out.jsonl")
        folders = {
            "teacher": teacher.path / "model",
            "before": student.path / "model",
            "after": output / "model",
        }
        answers = {
            who: greedy_answers(
                folder, prompts, recipe.threads, who == "teacher" and recipe.teacher.trust_remote_code
            )
            for who, folder in folders.items()
        }
        write_json(
            output / "conversations.json",
            [
                {"prompt": prompt[-1]["content"], **{who: answers[who][number] for who in folders}}
                for number, prompt in enumerate(prompts)
            ],
        )

    return store.get_or_make(
        STAGE,
        VERSION,
        {"instruct": deciding_values(recipe, "instruct")},
        {"teacher": teacher, "student": student, "chats": chats},
        make,
        recipe.seed,
    )


def rendered(path: Path, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Token ids and assistant mask of each conversation of a JSON Lines file."""
    with path.open(encoding="utf-8") as lines:
        return [render_with_mask(tokenizer, json.loads(line)["messages"]) for line in lines]


def evaluate(
    model: Any, teacher: LiveTeacher, examples: list[tuple[list[int], list[int]]]
) -> dict[str, float]:
    """Means over the assistant tokens of all examples, in nats.

    Returns:
        ``assistant_cross_entropy``, ``kl_to_teacher`` (KL(teacher || student)), ``teacher_cross_entropy``
        and ``tokens``, how many were counted.
    """
    sums = {"student_cross_entropy": 0.0, "kl_teacher_student": 0.0, "teacher_cross_entropy": 0.0}
    count = 0
    for input_ids, mask in examples:
        try:
            measured = evaluate_distillation(
                model, teacher, torch.tensor([input_ids]), loss_mask=torch.tensor([mask])
            )
        except TaidError:  # a conversation without a learned token
            continue
        tokens = int(measured["tokens"])
        count += tokens
        for name in sums:
            sums[name] += measured[name] * tokens
    return {
        "assistant_cross_entropy": sums["student_cross_entropy"] / max(count, 1),
        "kl_to_teacher": sums["kl_teacher_student"] / max(count, 1),
        "teacher_cross_entropy": sums["teacher_cross_entropy"] / max(count, 1),
        "tokens": count,
    }


@torch.no_grad()
def logits_of(model: Any, input_ids: list[int]) -> np.ndarray:
    """Logits ``[T, V]`` of a row, float32."""
    model.eval()
    return model(torch.tensor([input_ids]), use_cache=False).logits[0].float().numpy()


def loss_of_merging(merged: Any, rows: list[list[int]], unmerged: list[np.ndarray]) -> dict[str, float]:
    """``Fidelity.statistics`` of a model with its adapter merged against the model and adapter apart.

    Args:
        merged: the model after merging.
        rows: token ids of texts.
        unmerged: ``logits_of`` those before merging.
    """
    fidelity = Fidelity()
    for row, expected in zip(rows, unmerged, strict=True):
        fidelity.add(expected[:-1], logits_of(merged, row)[:-1], np.array(row[1:]))
    return fidelity.statistics()


def require_merged(merge: dict[str, float]) -> None:
    """The gate of the first hop.

    Raises:
        GateFailed: by ``loss_of_merging`` the saved model is another one.
    """
    if not merge["mean_kl"] <= MERGED_KL:
        raise GateFailed(
            f"instruct: gate merge: mean KL {merge['mean_kl']:.4g} between the model with its adapter apart "
            f"and the merged one as saved, the threshold is at most {MERGED_KL:g}."
        )


def greedy_answers(
    folder: Path, prompts: list[list[dict[str, str]]], threads: int, trust_remote_code: bool = False
) -> list[str]:
    """A model's greedy answer to each prompt."""
    runtime = TorchRuntime(folder, threads, trust_remote_code=trust_remote_code)
    try:
        return [
            runtime.decode_text(
                generate_greedily(
                    runtime, runtime.chat_ids(prompt, add_generation_prompt=True), SAMPLE_TOKENS
                )
            ).strip()
            for prompt in prompts
        ]
    finally:
        runtime.close()
