"""What the training stages share: the Trainer's arguments, progress lines, resuming, learning curves."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback, WandbCallback

from pipeline.errors import UserError
from pipeline.memory import forget_peak, freed_memory_kept, memory
from pipeline.models import throttled
from pipeline.progress import Progress
from pipeline.recipe import Recipe, Training
from taid import CheckpointDigests, TaidError, last_complete_checkpoint


def training_values(section: Training, work: Path, seed: int, run_name: str) -> dict[str, Any]:
    """Keyword arguments of ``TrainingArguments`` (and of TRL's ``SFTConfig``) for a training section."""
    return {
        "output_dir": str(work),
        "run_name": run_name,
        "learning_rate": section.learning_rate,
        "per_device_train_batch_size": section.batch_size,
        "per_device_eval_batch_size": section.batch_size,
        "gradient_accumulation_steps": section.gradient_accumulation,
        "num_train_epochs": section.epochs,
        "lr_scheduler_type": "cosine",
        "warmup_steps": section.warmup_ratio,  # a fraction of all steps when below 1
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": section.checkpoint_every,
        "save_total_limit": 2,
        "seed": seed,
        "data_seed": seed,
        "report_to": [],  # see reporting()
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available(),
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }


def deciding_values(recipe: Recipe, section: str) -> dict[str, Any]:
    """The values of a training section that its result depends on, as plain JSON values."""
    values = recipe.slice(section)[section]
    return {key: value for key, value in values.items() if key != "timeout_s"}


def reporting(
    recipe: Recipe, run_name: str, work: Path, logs: Path, report: Callable[[str], None]
) -> list[TrainerCallback]:
    """The Trainer's own integrations that the recipe's ``report_to`` names.

    Args:
        recipe: the recipe.
        run_name: names the training among others.
        work: where its checkpoints are; a run that goes on from there goes on in the same event folder.
        logs: folder of logs. TensorBoard's event files go into ``tensorboard/RUN-KEY`` below it, W&B's local
            files, unless its own variables say otherwise, into ``wandb``.
        report: receives a line that says where W&B has the run.
    """
    callbacks: list[TrainerCallback] = []
    if "tensorboard" in recipe.report_to:
        tensorboard = TensorBoardCallback()
        tensorboard.logging_dir = str(logs / "tensorboard" / f"{run_name.replace(' ', '-')}-{work.name[:8]}")
        callbacks.append(tensorboard)
    if "wandb" in recipe.report_to:
        logs.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("WANDB_DIR", str(logs))
        os.environ.setdefault("WANDB_PROJECT", "martlet")
        # Its summaries are screens long and would break the live view, which it would record, too; what fails
        # here is no business of its developers, unless somebody wants that.
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_CONSOLE", "off")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        callbacks.append(OneRunATraining(run_name, report))
    return callbacks


class OneRunATraining(WandbCallback):
    """W&B's run ends with the training, or the next stage in this process would go on in it."""

    def __init__(self, label: str, report: Callable[[str], None]):
        super().__init__()
        self.label, self.report = label, report

    def on_train_begin(self, *arguments: Any, **keywords: Any) -> None:
        """Begins the run and says where it is."""
        import wandb

        super().on_train_begin(*arguments, **keywords)
        if wandb.run is not None:
            self.report(f"{self.label}: W&B run {wandb.run.url or Path(wandb.run.dir).parent}")

    def on_train_end(self, *arguments: Any, **keywords: Any) -> None:
        """Ends the run."""
        import wandb

        super().on_train_end(*arguments, **keywords)
        wandb.finish()


class ProgressLines(TrainerCallback):
    """One line every few seconds: what, how far, how fast, how long still."""

    def __init__(self, label: str, report: Callable[[str], None]):
        self.label = label
        self.report = throttled(report)
        self.started = 0.0
        self.first_step = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Starts the clock; a resumed run's earlier steps do not count for the rate."""
        self.started, self.first_step = time.monotonic(), state.global_step
        if state.global_step:
            self.report(f"{self.label}: going on from step {state.global_step} of {state.max_steps}")

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Reports a logged step."""
        if not logs or "loss" not in logs:
            return
        done = state.global_step - self.first_step
        left = (time.monotonic() - self.started) / max(done, 1) * (state.max_steps - state.global_step)
        # The rate first: the end of a line is what a narrow terminal cuts.
        figures = [f"{logs['tokens_per_second']:.0f} tok/s"] if "tokens_per_second" in logs else []
        figures.append(f"loss {logs['loss']:.3f}")
        if "t" in logs:
            figures.append(f"t {logs['t']:.2f}")
        self.report(
            Progress(self.label, state.global_step, state.max_steps, "steps", ", ".join(figures), left)
        )


class TimeLimit(TrainerCallback):
    """Ends a training that takes too long, with a checkpoint.

    Attributes:
        passed: whether it did.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.started = 0.0
        self.passed = False

    def on_train_begin(self, *arguments: Any, **keywords: Any) -> None:
        """Starts the clock."""
        self.started = time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **keywords: Any) -> None:
        """Looks at the clock; the last step ends by itself."""
        if state.global_step < state.max_steps and time.monotonic() - self.started > self.seconds:
            self.passed = control.should_save = control.should_training_stop = True


def train(
    trainer: Any, work: Path, section: str, report: Callable[[str], None], seconds: float | None = None
) -> float:
    """Trains to the end, from the last complete checkpoint when there is one.

    Args:
        trainer: a ``transformers.Trainer``.
        work: folder of its checkpoints.
        section: the recipe's, for sentences.
        report: receives a line for a damaged checkpoint.
        seconds: how long it may take; None for any time. Not for several processes, whose clocks may
            disagree in which step that is.

    Returns:
        Seconds of this process's training.

    Raises:
        UserError: the loss is no longer a number, the settings do not fit together, or time is up.
    """
    trainer.remove_callback(PrinterCallback)
    started = time.monotonic()
    trainer.add_callback(CheckpointDigests())
    limit = None if seconds is None else TimeLimit(seconds)
    if limit is not None:
        trainer.add_callback(limit)
    checkpoint = last_complete_checkpoint(work, report)
    try:
        with freed_memory_kept():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except TaidError as error:
        raise UserError(f"{section}: {error}") from None
    if any(entry["loss"] != entry["loss"] for entry in trainer.state.log_history if "loss" in entry):
        raise UserError(f"{section}.learning_rate: the loss became NaN; choose a smaller learning rate.")
    if limit is not None and limit.passed:
        raise UserError(
            f"{section}.timeout_s: the training was not done after {seconds:g} s and stopped at step "
            f"{trainer.state.global_step} of {trainer.state.max_steps}; the same command goes on from there."
        )
    return time.monotonic() - started


def start_counting_memory() -> None:
    """``peak_memory`` counts from here."""
    forget_peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int | None:
    """Most bytes held since ``start_counting_memory``: on the accelerator where there is one, else resident
    in this process. None where the system keeps no such count."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        return memory()["VmHWM"]
    except (OSError, KeyError):
        return None


def curve_of(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Learning curve, one point a step: the Trainer's log with evaluation merged into its step."""
    names = {
        "loss": "loss",
        "t": "t",
        "temperature": "temperature",
        "learning_rate": "learning_rate",
        "tokens_per_second": "tokens_per_second",
        "grad_norm": "grad_norm",
        "eval_kl_teacher_student": "held_out_kl",
        "eval_student_cross_entropy": "held_out_cross_entropy",
        "eval_loss": "held_out_loss",
    }
    points: dict[int, dict[str, Any]] = {}
    for entry in log_history:
        if "train_runtime" in entry:
            continue
        point = points.setdefault(entry["step"], {"step": entry["step"]})
        point.update({name: entry[key] for key, name in names.items() if key in entry})
    return [points[step] for step in sorted(points)]
