"""Distillation in a `transformers.Trainer`: checkpoints, resume, DDP and logging come from the library.

A training example is a dictionary:

- ``input_ids`` ``[T]``;
- ``index``: the block's number, needed by a cached teacher;
- ``labels`` ``[T]`` (-100: not learned) or ``loss_mask`` ``[T]`` (0: not learned), both optional and both
  at the token's own place; the shift by one happens here;
- ``position_ids`` ``[T]``, optional, starting at 0 with each document of the block: `transformers` then
  keeps attention within documents, and no document's first token is predicted from another;
- ``attention_mask`` ``[T]``, optional, for blocks padded at their end.

The hidden state of position i predicts token i + 1.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState

from taid import fused
from taid.errors import TaidError
from taid.generated import (
    Continuation,
    StudentGenerations,
    as_batch,
    continue_beginnings,
    draw_replayed,
)
from taid.heads import at_head, head_options, head_weight, trim
from taid.objectives import curriculum_reversal
from taid.sampled import SampledTeacher, check_sampled_objective, fused_sampled_objective
from taid.schedule import AdaptiveInterpolation
from taid.teacher import LiveTeacher, Teacher

OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "taid": fused.fused_taid,
    "cross_entropy": fused.fused_cross_entropy,
    "forward_kl": fused.fused_forward_kl,
    "reverse_kl": fused.fused_reverse_kl,
    "jensen_shannon": fused.fused_jensen_shannon,
    "total_variation": fused.fused_total_variation,
    "skew_forward_kl": fused.fused_skew_forward_kl,
    "skew_reverse_kl": fused.fused_skew_reverse_kl,
    "adaptive_kl": fused.fused_adaptive_kl,
    "decoupled_kd": fused.fused_decoupled_kd,
    "curriculum_temperature": fused.fused_curriculum_temperature,
}
"""Objective names and their fused functions."""

FIELDS = ("input_ids", "labels", "loss_mask", "position_ids", "attention_mask", "index")


class TokenBlockDataset(Dataset):
    """Packed token blocks as training examples, each with its index."""

    def __init__(
        self,
        token_blocks: np.ndarray,
        *,
        loss_mask: np.ndarray | None = None,
        position_ids: np.ndarray | None = None,
    ):
        """
        Args:
            token_blocks: ``[N, T]`` token ids; may be memory-mapped.
            loss_mask: ``[N, T]``, 0 where a token is not learned.
            position_ids: ``[N, T]``, starting at 0 with each document.

        Raises:
            TaidError: shapes differ, or there is no block.
        """
        self.arrays = {"input_ids": token_blocks, "loss_mask": loss_mask, "position_ids": position_ids}
        if token_blocks.ndim != 2 or 0 in token_blocks.shape:
            raise TaidError(
                f"Token blocks have shape {list(token_blocks.shape)}; give at least one block, [N, T]."
            )
        for name, array in self.arrays.items():
            if array is not None and array.shape != token_blocks.shape:
                raise TaidError(
                    f"{name} has shape {list(array.shape)}, the token blocks {list(token_blocks.shape)}."
                )

    def __len__(self) -> int:
        return len(self.arrays["input_ids"])  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        example: dict[str, Any] = {
            name: torch.from_numpy(np.array(array[index], dtype=np.int64))
            for name, array in self.arrays.items()
            if array is not None
        }
        return {**example, "index": int(index)}


def collate_blocks(examples: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stacks examples of equal length into a batch.

    Raises:
        TaidError: the lengths differ or a field is missing in some.
    """
    batch = {}
    for name in FIELDS:
        if name not in examples[0]:
            continue
        try:
            batch[name] = torch.stack([torch.as_tensor(example[name]).long() for example in examples])
        except KeyError:
            raise TaidError(f"Some examples of a batch have {name} and some have not.") from None
        except RuntimeError:
            raise TaidError(
                f"The {name} of a batch differ in length; pack the data into blocks of one length."
            ) from None
    return batch


def prediction_targets(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What each position but the last is to predict.

    Args:
        batch: fields ``[B, T]`` as the module's head says.

    Returns:
        Labels ``[B, T-1]`` (the next token; 0 where not learned) and mask ``[B, T-1]`` (bool).
    """
    following = batch["input_ids"][:, 1:]
    mask = torch.ones_like(following, dtype=torch.bool)
    if batch.get("labels") is not None:
        mask &= batch["labels"][:, 1:] != -100
    if batch.get("loss_mask") is not None:
        mask &= batch["loss_mask"][:, 1:] != 0
    if batch.get("position_ids") is not None:
        mask &= batch["position_ids"][:, 1:] != 0
    if batch.get("attention_mask") is not None:
        mask &= (batch["attention_mask"][:, 1:] != 0) & (batch["attention_mask"][:, :-1] != 0)
    return following.masked_fill(~mask, 0), mask


class InterpolationCallback(TrainerCallback, ExportableState):
    """Moves t once after each optimizer step, and carries it through checkpoints.

    Its state is part of ``trainer_state.json``, the file a checkpoint ends with.
    """

    def __init__(self, trainer: "DistillationTrainer | None" = None):
        self.trainer = trainer

    def state(self) -> dict[str, Any]:
        """The interpolation as JSON values."""
        interpolation = self.trainer.interpolation if self.trainer else None
        temperature = self.trainer.temperature_parameter if self.trainer else None
        generations = None
        if self.trainer and self.trainer.generations is not None:
            generations = self.trainer.generations.state_dict()
        return {
            "args": {},
            "attributes": {},
            "interpolation": None if interpolation is None else interpolation.state_dict(),
            "temperature": None if temperature is None else temperature.item(),
            "generations": generations,
            "learned_tokens": self.trainer.learned_tokens if self.trainer else 0,
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the interpolation of the checkpoint over."""
        assert self.trainer is not None
        callbacks: Any = state.stateful_callbacks
        stored: Any = callbacks.get(type(self).__name__)
        if isinstance(stored, list):
            stored = stored[-1] if stored else None
        if state.global_step == 0:
            return
        self.trainer.learned_tokens = int((stored or {}).get("learned_tokens", 0))
        temperature = (stored or {}).get("temperature")
        if self.trainer.temperature_parameter is not None:
            if temperature is None:
                raise TaidError(
                    f"The checkpoint of step {state.global_step} holds no temperature; "
                    "it was not made by this objective, so start anew."
                )
            self.trainer.temperature_parameter.data.fill_(temperature)
        if self.trainer.generations is not None:
            generations = (stored or {}).get("generations")
            if generations is None:
                raise TaidError(
                    f"The checkpoint of step {state.global_step} knows no generations; "
                    "it was made without them, so start anew."
                )
            self.trainer.generations.load_state_dict(generations)
        if self.trainer.interpolation is None:
            return
        if not stored or not stored.get("interpolation"):
            raise TaidError(
                f"The checkpoint of step {state.global_step} holds no interpolation; "
                "it was not made by this objective, so start anew."
            )
        self.trainer.interpolation.load_state_dict(stored["interpolation"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Averages the temperature's gradient over the ranks: it is no part of the model that DDP wraps."""
        assert self.trainer is not None
        parameter = self.trainer.temperature_parameter
        if parameter is not None and parameter.grad is not None:
            parameter.grad = self.trainer.accelerator.reduce(parameter.grad, reduction="mean")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives the step's mean loss to the interpolation."""
        assert self.trainer is not None
        self.trainer.finish_step(state.global_step, state.max_steps)


class DistillationTrainer(Trainer):
    """Trains a student towards a teacher's next-token distributions.

    The loss is the mean over the learned tokens of all micro-batches and ranks of an optimizer step, so
    accumulating k micro-batches is the same as one batch k times as large, for the weights and for t.

    ``curriculum_temperature`` has one parameter more, whose sigmoid gives a temperature between 1 and 21. It
    shares the optimizer and its learning rate, starts at the CTKD code's 1 (a temperature of 15.6), and the
    strength of its reversed gradient rises over the run.

    Its logs carry, besides the Trainer's loss and learning rate, ``t`` (the one the step was taken with),
    ``tokens_per_second`` (all tokens of the blocks, on all ranks, since the last log; evaluation and
    checkpoints not counted) and ``tokens`` (learned tokens so far, on all ranks).
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        train_dataset: Any,
        teacher: Teacher | SampledTeacher | None = None,
        objective: str = "taid",
        interpolation: AdaptiveInterpolation | None = None,
        objective_arguments: Mapping[str, Any] | None = None,
        generations: StudentGenerations | None = None,
        vocabulary_size: int | None = None,
        chunk_size: int = fused.CHUNK_SIZE,
        evaluation_teacher: Teacher | None = None,
        eval_dataset: Any = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] = collate_blocks,
        **trainer_arguments: Any,
    ):
        """
        Args:
            model: the student, a `transformers` causal language model.
            args: the Trainer's arguments; ``logging_steps=1`` logs every step.
            train_dataset: examples as the module's head says.
            teacher: ``LiveTeacher``, ``CachedTeacher`` or, for the objectives of ``SAMPLED_OBJECTIVES``,
                ``SampledTeacher``; not needed by ``cross_entropy``.
            objective: a key of ``OBJECTIVES``.
            interpolation: the schedule of t, for ``taid`` alone; None: ``AdaptiveInterpolation()``.
            objective_arguments: keyword arguments of the objective, such as ``{"skew": 0.1}`` or
                ``{"temperature": 2.0}``.
            generations: which batches the student writes itself, for a ``LiveTeacher`` alone; None: none.
            vocabulary_size: shared rows of the heads (``shared_vocabulary_size``); None: the fewer rows.
            chunk_size: positions that are projected at a time.
            evaluation_teacher: the teacher of ``eval_dataset``; None: ``teacher``, unless that is sampled:
                then cross-entropy alone is evaluated.
            eval_dataset: held-out examples, evaluated with ``evaluate_distillation``.
            data_collator: makes a batch of examples.
            trainer_arguments: anything else that the Trainer takes.

        Raises:
            TaidError: the objective is unknown, lacks its teacher, or the heads do not fit together.
        """
        if objective not in OBJECTIVES:
            raise TaidError(f"There is no objective {objective!r}; choose from {', '.join(OBJECTIVES)}.")
        if objective != "cross_entropy" and teacher is None:
            raise TaidError(f"The objective {objective} needs a teacher.")
        if interpolation is not None and objective != "taid":
            raise TaidError(f"The objective {objective} has no interpolation; leave it out.")
        if isinstance(teacher, SampledTeacher) and objective != "cross_entropy":
            check_sampled_objective(objective)
            if (objective_arguments or {}).get("temperature", 1.0) != 1.0:
                raise TaidError("Sampled probabilities are those of temperature 1; leave `temperature` out.")
        if generations is not None and not isinstance(teacher, LiveTeacher):
            raise TaidError("Text that the student writes is judged by a LiveTeacher; no cache knows it.")
        if generations is not None and args.fsdp:
            raise TaidError("A student that is sharded (FSDP) cannot write text; use DDP or one process.")
        # The dataset's columns are this class's, not the model's forward arguments.
        args.remove_unused_columns = False
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            **trainer_arguments,
        )
        # compute_loss divides by all learned tokens of the optimizer step itself.
        self.loss_is_scaled_for_ga = True
        self.objective: str = objective
        self.objective_arguments = dict(objective_arguments or {})
        self.generations = generations
        self.interpolation = (interpolation or AdaptiveInterpolation()) if objective == "taid" else None
        self.chunk_size = chunk_size
        self.teacher = teacher.to(args.device) if hasattr(teacher, "to") else teacher  # type: ignore[union-attr]
        if evaluation_teacher is None and not isinstance(teacher, SampledTeacher):
            evaluation_teacher = teacher
        self.evaluation_teacher = evaluation_teacher
        rows = model.get_output_embeddings().weight.shape[0]
        if teacher is not None:
            rows = min(rows, teacher.vocabulary_size)
        self.vocabulary_size = vocabulary_size or rows
        if self.vocabulary_size > rows:
            raise TaidError(
                f"vocabulary_size {self.vocabulary_size} is more than the {rows} rows that both heads have."
            )
        if isinstance(teacher, SampledTeacher) and self.vocabulary_size != teacher.vocabulary_size:
            raise TaidError(
                f"{teacher.folder}: was sampled over {teacher.vocabulary_size} tokens, teacher and student "
                f"share {self.vocabulary_size}; write the cache anew with vocabulary_size "
                f"{self.vocabulary_size}."
            )
        self._student: Any = model
        self.temperature_parameter = (
            nn.Parameter(torch.ones((), device=args.device))
            if objective == "curriculum_temperature"
            else None
        )
        self._step_loss = 0.0
        self._step_entropy = 0.0
        self._t_of_step: float | None = None
        self._temperature_of_step: float | None = None
        self.learned_tokens = 0
        self._block_tokens = 0
        self._seconds = 0.0
        self._step_began: float | None = None
        self.add_callback(InterpolationCallback(self))

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """The micro-batches of one optimizer step and the number of learned tokens on all ranks."""
        if self.state.global_step >= self.state.max_steps:
            # Resumed from the checkpoint of the last step: the Trainer would take one more.
            self.control.should_training_stop = True
            return [], 0
        self._step_began = time.perf_counter()
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        if self.generations is not None:
            batches = [self.replaced_batch(batch, number) for number, batch in enumerate(batches)]
        counts = torch.tensor(
            [
                sum(int(prediction_targets(batch)[1].sum()) for batch in batches),
                sum(batch["input_ids"].numel() for batch in batches),
            ],
            device=device,
        )
        learned, seen = self.accelerator.reduce(counts, reduction="sum").tolist()
        self.learned_tokens += learned
        self._block_tokens += seen
        self._step_loss = self._step_entropy = 0.0
        temperature = self.temperature()
        self._temperature_of_step = None if temperature is None else float(temperature.detach())
        self._t_of_step = None if self.interpolation is None else self.interpolation.t
        return batches, learned

    def replaced_batch(self, batch: dict[str, Tensor], number: int) -> dict[str, Tensor]:
        """A micro-batch, or in its place one that the student has written, as ``generations`` decides.

        All ranks decide alike and keep all ranks' continuations. Every draw depends on seed, step and
        micro-batch alone, so that a resumed run draws what an undisturbed one would.

        Args:
            batch: the micro-batch.
            number: its place in the optimizer step.
        """
        generations = self.generations
        assert generations is not None
        step, seed = self.state.global_step, [self.args.seed, self.state.global_step, number]
        rank = self.accelerator.process_index
        source = generations.source(np.random.default_rng(seed).random(), step / self.state.max_steps)
        if source == "data":
            return batch
        input_ids = batch["input_ids"]
        if source == "replayed":
            return as_batch(
                draw_replayed(generations.replay, len(input_ids), [*seed, rank]), input_ids.device
            )
        written = continue_beginnings(
            self._student,
            input_ids,
            batch.get("position_ids"),
            generations.prompt_tokens,
            int(np.random.default_rng([*seed, rank]).integers(2**31)),
        )
        generations.keep(self._of_all_ranks(written, input_ids.shape[1]))
        return as_batch(written, input_ids.device)

    def _of_all_ranks(self, written: list[Continuation], length: int) -> list[Continuation]:
        rows = torch.zeros(len(written), 2 + length, dtype=torch.long, device=self.args.device)
        for row, entry in zip(rows, written, strict=True):
            row[0], row[1] = entry.prompt_tokens, len(entry.ids)
            row[2 : 2 + len(entry.ids)] = torch.tensor(entry.ids)
        gathered = self.accelerator.gather(rows).tolist()
        return [Continuation(tuple(row[2 : 2 + row[1]]), row[0]) for row in gathered]

    def create_optimizer(self, *arguments: Any, **keywords: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer; ``curriculum_temperature`` adds its temperature as one more parameter."""
        made = self.optimizer is not None
        optimizer = super().create_optimizer(*arguments, **keywords)
        if self.temperature_parameter is not None and not made:
            optimizer.add_param_group({"params": [self.temperature_parameter], "weight_decay": 0.0})
        return optimizer

    def temperature(self) -> Tensor | None:
        """The temperature of ``curriculum_temperature``, differentiable; None for other objectives."""
        return None if self.temperature_parameter is None else 1 + 20 * self.temperature_parameter.sigmoid()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective on one micro-batch: its summed loss over the learned tokens of the whole step.

        Args:
            model: the student as the Trainer has wrapped it.
            inputs: a batch.
            return_outputs: also return the (empty) outputs, as the Trainer's contract asks.
            num_items_in_batch: learned tokens of the step; None: those of this batch.
        """
        labels, mask = prediction_targets(inputs)
        arguments: dict[str, Any] = {**self.objective_arguments, "mask": mask, "chunk_size": self.chunk_size}
        entropy: Tensor | None = None
        if self.interpolation is not None:
            arguments["t"] = self.interpolation.t
            if self.interpolation.signal == "divergence":
                double = self._student.get_output_embeddings().weight.dtype == torch.float64
                precise = torch.float64 if double else torch.float32
                entropy = arguments["target_entropy"] = torch.zeros((), dtype=precise, device=mask.device)
        if self.temperature_parameter is not None:
            arguments["temperature"] = self.temperature()
            arguments["reversal"] = curriculum_reversal(self.state.global_step, self.state.max_steps)
        if self.objective in ("cross_entropy", "decoupled_kd"):
            arguments["labels"] = labels
        objective: Callable[..., Tensor] = OBJECTIVES[self.objective]
        positions = model_inputs(inputs)
        teacher = None if self.objective == "cross_entropy" else self.teacher
        if isinstance(teacher, SampledTeacher):
            objective = partial(fused_sampled_objective, self.objective)
            sampled = teacher.sampled_probabilities(inputs["input_ids"], inputs.get("index"))
            arguments["sampled"] = sampled[:, :-1]
        elif teacher is not None:
            arguments["teacher_hidden"] = teacher.hidden_states(
                inputs["input_ids"], index=inputs.get("index"), **positions
            )[:, :-1]
            arguments["teacher_head_weight"], arguments["teacher_head"] = trim(
                teacher.head_weight, teacher.head_options, self.vocabulary_size
            )

        def loss_at_head(hidden: Tensor) -> Tensor:
            weight, options = trim(
                head_weight(self._student), head_options(self._student), self.vocabulary_size
            )
            return objective(
                student_hidden=hidden[:, :-1],
                student_head_weight=weight,
                student_head=options,
                **arguments,
            )

        with self.accelerator.autocast():
            loss = at_head(model, self._student, loss_at_head, input_ids=inputs["input_ids"], **positions)
        assert loss is not None
        if num_items_in_batch is not None:
            # DDP and FSDP average gradients over ranks, so each rank's share is scaled up by their number.
            share = self.accelerator.num_processes / max(int(num_items_in_batch), 1)
            loss = loss * (mask.sum() * share)
        else:
            share = 1.0 / max(int(mask.sum()), 1)
        if self.is_in_train and model.training:
            self._step_loss += float(loss.detach())
            self._step_entropy += 0.0 if entropy is None else float(entropy) * share
        return (loss, {}) if return_outputs else loss

    def finish_step(self, step: int, total_steps: int) -> None:
        """Called once after each optimizer step: moves t with the step's mean loss over all ranks, or with
        that less the mean entropy of the target where the interpolation's signal is the divergence.

        Raises:
            TaidError: that loss is no finite number.
        """
        if self._step_began is not None:
            self._seconds += time.perf_counter() - self._step_began
            self._step_began = None
        if self.temperature_parameter is not None:
            # The Trainer empties the gradients of the model alone.
            self.temperature_parameter.grad = None
        signal = self._step_loss - self._step_entropy
        sums = torch.tensor([self._step_loss, signal], dtype=torch.float64, device=self.args.device)
        mean, signal = self.accelerator.reduce(sums, reduction="mean").tolist()
        if not math.isfinite(mean):
            # The Trainer would replace such a loss in its logs and go on with spoilt weights.
            raise TaidError(f"The loss of step {step} is {mean}; lower the learning rate or clip gradients.")
        if self.interpolation is not None and not self.accelerator.optimizer_step_was_skipped:
            self.interpolation.update(max(signal, 0.0), step, total_steps)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds t, tokens and tokens per second to the logs of training steps."""
        if "loss" in logs and "learning_rate" in logs:
            if self._t_of_step is not None:
                logs["t"] = self._t_of_step
            if self._temperature_of_step is not None:
                logs["temperature"] = self._temperature_of_step
            logs["tokens"] = self.learned_tokens
            if self._seconds > 0:
                logs["tokens_per_second"] = self._block_tokens / self._seconds
            self._block_tokens, self._seconds = 0, 0.0
        super().log(logs, start_time)

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """``evaluate_distillation`` on the held-out examples; moves neither t nor any weight, but in training
        the share of adaptive ``generations``.

        The evaluation teacher is asked by the examples' own index. It runs whole on every rank.

        Raises:
            TaidError: there is no held-out data.
        """
        dataset: Any = eval_dataset if eval_dataset is not None else self.eval_dataset
        if dataset is None:
            raise TaidError("There is no eval_dataset to evaluate on.")
        batch = self.data_collator([dataset[number] for number in range(len(dataset))])
        teacher = self.evaluation_teacher
        measured = evaluate_distillation(
            self._student,
            teacher.to(self.args.device) if hasattr(teacher, "to") else teacher,  # type: ignore[union-attr]
            batch["input_ids"],
            loss_mask=prediction_mask(batch),
            position_ids=batch.get("position_ids"),
            index=batch.get("index"),
            vocabulary_size=self.vocabulary_size,
            batch_size=self.args.per_device_eval_batch_size,
            chunk_size=self.chunk_size,
        )
        if self.generations is not None and self.is_in_train:
            self.generations.observe(measured["student_cross_entropy"])
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _load_callback_state(self) -> None:
        """The Trainer may make callbacks anew from a checkpoint; ours must know its trainer."""
        super()._load_callback_state()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, InterpolationCallback):
                callback.trainer = self


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a batch says of its positions, as far as it does: ``position_ids`` and ``attention_mask``."""
    return {name: batch[name] for name in ("position_ids", "attention_mask") if batch.get(name) is not None}


def prediction_mask(batch: Mapping[str, Tensor]) -> Tensor:
    """The mask of ``prediction_targets`` at the tokens' own places ``[B, T]``, 0 for the first."""
    mask = prediction_targets(batch)[1].long()
    return torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1)


@torch.no_grad()
def evaluate_distillation(
    student: Any,
    teacher: Teacher | None,
    token_blocks: np.ndarray | Tensor,
    *,
    loss_mask: np.ndarray | Tensor | None = None,
    position_ids: np.ndarray | Tensor | None = None,
    index: np.ndarray | Tensor | None = None,
    vocabulary_size: int | None = None,
    batch_size: int = 4,
    chunk_size: int = fused.CHUNK_SIZE,
) -> dict[str, float]:
    """How close a student is to its teacher on held-out text.

    Args:
        student: a `transformers` causal language model.
        teacher: ``LiveTeacher``, or a ``CachedTeacher`` of these blocks; None: cross-entropy alone.
        token_blocks: ``[N, T]`` token ids.
        loss_mask: ``[N, T]``, 0 where a token does not count.
        position_ids: ``[N, T]``, starting at 0 with each document.
        index: ``[N]``, numbers of the blocks in the cache; None: 0 to N - 1.
        vocabulary_size: shared rows of the heads; None: the fewer rows.
        batch_size: blocks at a time.
        chunk_size: positions that are projected at a time.

    Returns:
        Means over the counted tokens, in nats: ``student_cross_entropy``, and with a teacher
        ``teacher_cross_entropy``, ``kl_teacher_student`` (KL(p‖q)), ``kl_student_teacher`` (KL(q‖p)) and
        ``same_top`` (share of tokens whose most likely token is the same); ``tokens``, how many counted.

    Raises:
        TaidError: no token counts.
    """

    def as_blocks(values: Any) -> Tensor | None:
        return None if values is None else torch.as_tensor(np.asarray(values)).long()

    fields = {
        "input_ids": as_blocks(token_blocks),
        "loss_mask": as_blocks(loss_mask),
        "position_ids": as_blocks(position_ids),
        "index": torch.arange(len(token_blocks)) if index is None else as_blocks(index),
    }
    student_rows = student.get_output_embeddings().weight
    rows = min([student_rows.shape[0]] + ([] if teacher is None else [teacher.vocabulary_size]))
    vocabulary_size = vocabulary_size or rows
    if teacher is not None:
        teacher_weight, teacher_options = trim(teacher.head_weight, teacher.head_options, vocabulary_size)
    names = ["student_cross_entropy"]
    if teacher is not None:
        names += ["teacher_cross_entropy", "kl_teacher_student", "kl_student_teacher", "same_top"]
    sums: dict[str, float] = dict.fromkeys(names, 0.0)
    count = 0

    def measure(batch: dict[str, Tensor], hidden: Tensor) -> None:
        nonlocal count
        labels, mask = prediction_targets(batch)
        count += int(mask.sum())
        weight, options = trim(head_weight(student), head_options(student), vocabulary_size)
        student_hidden, chosen_labels = hidden[:, :-1][mask], labels[mask].unsqueeze(-1)
        teacher_hidden = None
        if teacher is not None:
            states = teacher.hidden_states(batch["input_ids"], index=batch["index"], **model_inputs(batch))
            teacher_hidden = states[:, :-1][mask].to(teacher_weight.dtype)
        buffers = torch.empty(2, min(chunk_size, len(student_hidden)), vocabulary_size, device=weight.device)
        for first in range(0, len(student_hidden), chunk_size):
            chunk = slice(first, first + chunk_size)
            logits = options.apply_(fused.project(student_hidden[chunk], weight, buffers[0]))
            log_q = torch.log_softmax(logits, -1, out=logits)
            target = chosen_labels[chunk]
            sums["student_cross_entropy"] -= float(log_q.gather(-1, target).double().sum())
            if teacher_hidden is None:
                continue
            logits = teacher_options.apply_(fused.project(teacher_hidden[chunk], teacher_weight, buffers[1]))
            log_p = torch.log_softmax(logits, -1, out=logits)
            sums["teacher_cross_entropy"] -= float(log_p.gather(-1, target).double().sum())
            sums["same_top"] += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            difference = log_p - log_q
            sums["kl_teacher_student"] += float(fused.row_dot(log_p.exp_(), difference).double().sum())
            sums["kl_student_teacher"] -= float(fused.row_dot(log_q.exp_(), difference).double().sum())

    was_training = student.training
    student.eval()
    try:
        for start in range(0, len(token_blocks), batch_size):
            batch = {
                name: values[start : start + batch_size].to(student_rows.device)
                for name, values in fields.items()
                if values is not None
            }
            at_head(
                student,
                student,
                partial(measure, batch),
                input_ids=batch["input_ids"],
                **model_inputs(batch),
            )
    finally:
        student.train(was_training)
    if count == 0:
        raise TaidError("No token of the held-out blocks counts; there is nothing to evaluate.")
    means = {name: total / count for name, total in sums.items()}
    means["tokens"] = count
    return means
