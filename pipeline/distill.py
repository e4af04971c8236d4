"""Distillation: the student learns the teacher's next-token distributions on plain text."""

import json
import time
from pathlib import Path

import numpy as np
from transformers import TrainingArguments

from pipeline.artifacts import Artifact, Store, write_json
from pipeline.hidden_states import SPLITS
from pipeline.models import load_model, load_tokenizer, position_ids, save_model
from pipeline.recipe import Recipe
from pipeline.training import (
    ProgressLines,
    curve_of,
    peak_memory,
    start_counting_memory,
    train,
    training_values,
)
from taid import (
    AdaptiveInterpolation,
    CachedTeacher,
    DistillationTrainer,
    LiveTeacher,
    SampledTeacher,
    TokenBlockDataset,
    evaluate_distillation,
    freeze_embeddings,
)

STAGE = "distill"
VERSION = 2
IRRELEVANT = ("objective", "control")
"""Keys of the section that do not change this result: the objective is an argument of its own."""


def run(
    store: Store,
    recipe: Recipe,
    teacher: Artifact,
    student: Artifact,
    text: Artifact,
    hidden_states: Artifact | None,
    objective: str,
) -> Artifact:
    """Trains the student with one objective.

    Args:
        store: where the result goes.
        recipe: its ``distill`` section says how.
        teacher: the teacher's folder.
        student: the initial student.
        text: packed tokens.
        hidden_states: what ``hidden_states.run`` kept of the teacher; None: the teacher runs alongside.
        objective: ``taid``, or another of the recipe's objectives, such as a ``cross_entropy`` control.

    Returns:
        ``model/``, ``curve.json`` and ``evaluation.json``. A killed run goes on from its last checkpoint.

    Raises:
        UserError: training diverges.
    """
    section = recipe.distill
    inputs = {"teacher": teacher, "student": student, "text": text}
    if hidden_states is not None:
        inputs["hidden_states"] = hidden_states

    def make(output: Path, work: Path) -> None:
        model, tokenizer = load_model(student.path / "model"), load_tokenizer(student.path / "model")
        generation_config = model.generation_config
        if section.freeze_embeddings:
            freeze_embeddings(model)
        blocks = {split: np.load(text.path / f"{split}.npy") for split in SPLITS}
        positions = {split: position_ids(np.load(text.path / f"documents_{split}.npy")) for split in SPLITS}
        if hidden_states is None:
            live = LiveTeacher(load_model(teacher.path / "model", recipe.teacher.trust_remote_code))
            train_teacher: LiveTeacher | CachedTeacher | SampledTeacher = live
            held_out_teacher: LiveTeacher | CachedTeacher = live
        else:
            # The store has verified the digests of these files a moment ago.
            kind = SampledTeacher if recipe.teacher.cache == "sampled" else CachedTeacher
            train_teacher = kind(hidden_states.path / "train", verify=False)
            held_out_teacher = CachedTeacher(hidden_states.path / "held_out", verify=False)

        def evaluate() -> dict[str, float]:
            measured = evaluate_distillation(
                model, held_out_teacher, blocks["held_out"], position_ids=positions["held_out"]
            )
            return {
                "cross_entropy": measured["student_cross_entropy"],
                "kl": measured["kl_teacher_student"],
                "reverse_kl": measured["kl_student_teacher"],
                "same_top": measured["same_top"],
                "teacher_cross_entropy": measured["teacher_cross_entropy"],
                "tokens": measured["tokens"],
            }

        def evaluate_initial(output: Path, work: Path) -> None:
            store.report("distill: evaluating the initial student")
            write_json(output / "evaluation.json", evaluate())

        # Every objective starts from the same student, so what that is worth is measured once.
        initial = store.get_or_make(f"{STAGE}_initial", VERSION, {}, inputs, evaluate_initial)
        before = json.loads((initial.path / "evaluation.json").read_text(encoding="utf-8"))
        length = blocks["train"].shape[1]
        evaluation_blocks = max(1, min(len(blocks["held_out"]), section.evaluate_tokens // length))
        interpolation = None
        if objective == "taid":
            interpolation = AdaptiveInterpolation(
                section.t_start,
                section.t_end,
                section.alpha,
                section.beta,
                section.adaptive,
                section.signal,
            )
        trainer = DistillationTrainer(
            model=model,
            args=TrainingArguments(
                **training_values(section, work, recipe.seed),
                eval_strategy="steps",
                eval_steps=section.evaluate_every,
            ),
            train_dataset=TokenBlockDataset(blocks["train"], position_ids=positions["train"]),
            eval_dataset=TokenBlockDataset(
                blocks["held_out"][:evaluation_blocks],
                position_ids=positions["held_out"][:evaluation_blocks],
            ),
            teacher=None if objective == "cross_entropy" else train_teacher,
            evaluation_teacher=held_out_teacher,
            objective=objective,
            interpolation=interpolation,
            processing_class=tokenizer,
            callbacks=[ProgressLines(f"distill ({objective})", store.report)],
        )
        start_counting_memory()
        started = time.monotonic()
        train(trainer, work, "distill")
        seconds_here = time.monotonic() - started
        peak_memory_bytes = peak_memory()
        store.report(f"distill ({objective}): evaluating the trained student")
        after = evaluate()
        model.requires_grad_(True)
        save_model(model, tokenizer, output / "model", generation_config)
        curve = curve_of(trainer.state.log_history)
        tokens_a_step = section.batch_size * section.gradient_accumulation * length
        total = int(blocks["train"].size * section.epochs)
        for point in curve:
            point["tokens"] = min(point["step"] * tokens_a_step, total)
        rates = [point["tokens_per_second"] for point in curve if "tokens_per_second" in point]
        write_json(output / "curve.json", curve)
        write_json(
            output / "evaluation.json",
            {
                "objective": objective,
                "tokens": total,
                "steps": trainer.state.global_step,
                "seconds": seconds_here,
                "tokens_per_second": float(np.median(rates)) if rates else 0.0,
                "peak_memory_bytes": peak_memory_bytes,
                "held_out_tokens": before["tokens"],
                "teacher_cross_entropy": before["teacher_cross_entropy"],
                "before": {key: before[key] for key in ("cross_entropy", "kl", "reverse_kl", "same_top")},
                "after": {key: after[key] for key in ("cross_entropy", "kl", "reverse_kl", "same_top")},
            },
        )

    parameters = {
        key: value for key, value in recipe.slice("distill")["distill"].items() if key not in IRRELEVANT
    }
    return store.get_or_make(
        STAGE, VERSION, {"objective": objective, **parameters}, inputs, make, recipe.seed
    )
