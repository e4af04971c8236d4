"""Distillation: the student learns the teacher's next-token distributions on plain text."""

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch.distributed import is_initialized
from transformers import TrainingArguments

from pipeline.artifacts import Artifact, Store, write_json
from pipeline.errors import EXIT_BAD_INPUT, UserError
from pipeline.hidden_states import SPLITS
from pipeline.launch import end_with_parent, launch_training, tell
from pipeline.memory import freed_memory_kept
from pipeline.models import load_model, load_tokenizer, position_ids, save_model
from pipeline.recipe import WITHOUT_TEMPERATURE, Launch, Recipe
from pipeline.training import (
    ProgressLines,
    curve_of,
    deciding_values,
    peak_memory,
    reporting,
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
    StudentGenerations,
    TaidError,
    TokenBlockDataset,
    evaluate_distillation,
    freeze_embeddings,
    shard_teacher,
)
from taid.heads import decoder_layers

STAGE = "distill"
VERSION = 2
IRRELEVANT = ("objective", "control")
"""Keys of the section that do not change this result: the objective is an argument of its own."""
ADDED = {"temperature": 1.0}
"""Keys that came later, with the values that change nothing: what was trained before them stays good."""


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
        UserError: training diverges, or a process of ``launch`` fails.
    """
    section = recipe.distill
    inputs = {"teacher": teacher, "student": student, "text": text}
    if hidden_states is not None:
        inputs["hidden_states"] = hidden_states

    def make(output: Path, work: Path) -> None:
        model, tokenizer = load_model(student.path / "model"), load_tokenizer(student.path / "model")
        generation_config = model.generation_config
        blocks, positions = text_blocks(text.path)
        train_teacher, held_out_teacher = teachers(
            recipe, teacher.path, None if hidden_states is None else hidden_states.path
        )

        def evaluate() -> dict[str, float]:
            with freed_memory_kept():
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
        if recipe.launch is None:
            trained = train_student(
                recipe,
                objective,
                model,
                tokenizer,
                blocks,
                positions,
                train_teacher,
                held_out_teacher,
                work,
                store.root / "logs",
                store.report,
            )
        else:
            trained = train_launched(
                recipe, recipe.launch, objective, teacher, student, text, hidden_states, work, store
            )
            model = load_model(work / "trained")
        store.report(f"distill ({objective}): evaluating the trained student")
        after = evaluate()
        model.requires_grad_(True)
        save_model(model, tokenizer, output / "model", generation_config)
        curve = curve_of(trained["log_history"])
        length = blocks["train"].shape[1]
        processes = 1 if recipe.launch is None else recipe.launch.processes * recipe.launch.nodes
        tokens_a_step = section.batch_size * section.gradient_accumulation * processes * length
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
                "steps": trained["steps"],
                "seconds": trained["seconds"],
                "tokens_per_second": float(np.median(rates)) if rates else 0.0,
                "peak_memory_bytes": trained["peak_memory_bytes"],
                "held_out_tokens": before["tokens"],
                "teacher_cross_entropy": before["teacher_cross_entropy"],
                "before": {key: before[key] for key in ("cross_entropy", "kl", "reverse_kl", "same_top")},
                "after": {key: after[key] for key in ("cross_entropy", "kl", "reverse_kl", "same_top")},
            },
        )

    parameters = {
        key: value
        for key, value in deciding_values(recipe, "distill").items()
        if key not in IRRELEVANT and (key not in ADDED or value != ADDED[key])
    }
    if recipe.launch is not None:
        # More processes make larger batches; where the machines meet changes nothing.
        launch = recipe.slice("launch")["launch"]
        parameters |= {"launch": {key: launch[key] for key in ("processes", "nodes", "strategy")}}
    return store.get_or_make(
        STAGE, VERSION, {"objective": objective, **parameters}, inputs, make, recipe.seed
    )


def text_blocks(text: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Token blocks and position ids ``[N, T]`` of both splits."""
    blocks = {split: np.load(text / f"{split}.npy") for split in SPLITS}
    positions = {split: position_ids(np.load(text / f"documents_{split}.npy")) for split in SPLITS}
    return blocks, positions


def teachers(
    recipe: Recipe, teacher: Path, hidden_states: Path | None
) -> tuple[LiveTeacher | CachedTeacher | SampledTeacher, LiveTeacher | CachedTeacher]:
    """The teachers of training and of held-out text."""
    if hidden_states is None:
        model = load_model(teacher / "model", recipe.teacher.trust_remote_code)
        sharded = recipe.launch is not None and recipe.launch.shard_teacher and is_initialized()
        live = shard_teacher(model) if sharded else LiveTeacher(model)
        return live, live
    # The store has verified the digests of these files a moment ago.
    kind = SampledTeacher if recipe.teacher.cache == "sampled" else CachedTeacher
    train_teacher = kind(hidden_states / "train", verify=False)
    return train_teacher, CachedTeacher(hidden_states / "held_out", verify=False)


def train_student(
    recipe: Recipe,
    objective: str,
    model: Any,
    tokenizer: Any,
    blocks: dict[str, np.ndarray],
    positions: dict[str, np.ndarray],
    train_teacher: LiveTeacher | CachedTeacher | SampledTeacher,
    held_out_teacher: LiveTeacher | CachedTeacher,
    work: Path,
    logs: Path,
    report: Callable[[str], None],
    save_to: Path | None = None,
    **distribution: Any,
) -> dict[str, Any]:
    """Trains the model, from the last checkpoint in ``work`` when there is one.

    Args:
        logs: see ``reporting``.
        save_to: folder for the trained weights; None leaves them in ``model``.
        distribution: arguments of ``TrainingArguments`` that say how processes share the work.

    Returns:
        ``log_history``, ``steps``, ``seconds`` and ``peak_memory_bytes`` of this process.

    Raises:
        UserError: training diverges, or objective and teacher do not fit together.
    """
    section, run_name = recipe.distill, f"{STAGE} {objective}"
    if section.freeze_embeddings:
        freeze_embeddings(model)
    length = blocks["train"].shape[1]
    evaluation_blocks = max(1, min(len(blocks["held_out"]), section.evaluate_tokens // length))
    interpolation = None
    if objective == "taid":
        interpolation = AdaptiveInterpolation(
            section.t_start, section.t_end, section.alpha, section.beta, section.adaptive, section.signal
        )
    generations = None
    if section.generations is not None and objective != "cross_entropy":
        generations = StudentGenerations(**section.generations.model_dump())
    try:
        trainer = DistillationTrainer(
            model=model,
            args=TrainingArguments(
                **training_values(section, work, recipe.seed, run_name),
                eval_strategy="steps",
                eval_steps=section.evaluate_every,
                eval_on_start=generations is not None and generations.adaptive,
                **distribution,
            ),
            train_dataset=TokenBlockDataset(blocks["train"], position_ids=positions["train"]),
            eval_dataset=TokenBlockDataset(
                blocks["held_out"][:evaluation_blocks],
                position_ids=positions["held_out"][:evaluation_blocks],
            ),
            teacher=None if objective == "cross_entropy" else train_teacher,
            evaluation_teacher=held_out_teacher,
            objective=objective,
            objective_arguments=(
                {} if objective in WITHOUT_TEMPERATURE else {"temperature": section.temperature}
            ),
            interpolation=interpolation,
            generations=generations,
            processing_class=tokenizer,
            callbacks=[
                ProgressLines(f"distill ({objective})", report),
                *reporting(recipe, run_name, work, logs, report),
            ],
        )
    except TaidError as error:
        raise UserError(f"distill: {error}") from None
    start_counting_memory()
    started = time.monotonic()
    train(trainer, work, "distill", report, section.timeout_s if recipe.launch is None else None)
    if save_to is not None:
        trainer.save_model(str(save_to))
    return {
        "log_history": trainer.state.log_history,
        "steps": trainer.state.global_step,
        "seconds": time.monotonic() - started,
        "peak_memory_bytes": peak_memory(),
    }


def train_launched(
    recipe: Recipe,
    launch: Launch,
    objective: str,
    teacher: Artifact,
    student: Artifact,
    text: Artifact,
    hidden_states: Artifact | None,
    work: Path,
    store: Store,
) -> dict[str, Any]:
    """``train_student`` in processes of their own, which leave the weights in ``work / "trained"``.

    Raises:
        UserError: as ``train_student``, a process failed, or FSDP was asked for without a GPU.
    """
    if launch.strategy == "fsdp" and not torch.cuda.is_available():
        raise UserError(
            "launch.strategy: fsdp shards among GPUs and there is none; use ddp, or leave `launch` out."
        )
    result = work / "trained" / "trained.json"
    if not result.exists():
        request = {
            "recipe": recipe.model_dump(mode="json", by_alias=True),
            "objective": objective,
            "teacher": str(teacher.path),
            "student": str(student.path),
            "text": str(text.path),
            "hidden_states": None if hidden_states is None else str(hidden_states.path),
            "work": str(work),
            "logs": str(store.root / "logs"),
        }
        launch_training(
            launch,
            "pipeline.distill",
            request,
            work,
            store.log_file(f"distill {objective}"),
            store.report,
            recipe.distill.timeout_s,
        )
    return json.loads(result.read_text(encoding="utf-8"))


def work_on(request: dict[str, Any]) -> None:
    """What each process that ``train_launched`` starts does.

    Raises:
        UserError: as ``train_student``.
    """
    recipe = Recipe.model_validate(request["recipe"])
    assert recipe.launch is not None
    torch.set_num_threads(max(1, recipe.threads // recipe.launch.processes))
    state = PartialState(cpu=not torch.cuda.is_available())
    paths = {role: Path(request[role]) for role in ("teacher", "student", "text", "work", "logs")}
    hidden_states = request["hidden_states"] and Path(request["hidden_states"])
    blocks, positions = text_blocks(paths["text"])
    model = load_model(paths["student"] / "model")
    distribution: dict[str, Any] = {"ddp_find_unused_parameters": False}
    if recipe.launch.strategy == "fsdp":
        layers = type(decoder_layers(model)[0]).__name__
        distribution = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": layers}}
    unfinished = paths["work"] / "trained.partial"
    trained = train_student(
        recipe,
        request["objective"],
        model,
        load_tokenizer(paths["student"] / "model"),
        blocks,
        positions,
        *teachers(recipe, paths["teacher"], hidden_states),
        paths["work"],
        paths["logs"],
        tell if state.is_main_process else lambda line: None,
        unfinished,
        **distribution,
    )
    if state.is_main_process:
        write_json(unfinished / "trained.json", trained)
        unfinished.rename(paths["work"] / "trained")
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    end_with_parent(signal.SIGKILL)
    requested = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        work_on(requested)
    except UserError as problem:
        (Path(requested["work"]) / "error.txt").write_text(str(problem), encoding="utf-8")
        sys.exit(EXIT_BAD_INPUT)
