"""Text that the student writes as training data: GKD's mix (Agarwal et al., ICLR 2024, arXiv 2306.13649) and
DistiLLM's adaptive, replayed one (Ko et al., ICML 2024, arXiv 2402.03898).

A student that has only ever read other people's text is lost once its own words stand before it. So some
batches are replaced by the student's own continuations of their beginnings, and the teacher judges those.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from taid.errors import TaidError

Source = Literal["data", "written", "replayed"]


@dataclass(frozen=True)
class Continuation:
    """A beginning that the student went on from.

    Attributes:
        ids: token ids of both, up to and with an end of sequence.
        prompt_tokens: how many of them were given.
    """

    ids: tuple[int, ...]
    prompt_tokens: int


@dataclass
class StudentGenerations:
    """Which batches the student writes itself.

    For each batch a number u is drawn from [0, 1). At or above ``share`` the batch stays what it is. Below:

    - GKD (``adaptive`` False): the student continues the batch's beginnings, each time anew.
    - DistiLLM (``adaptive`` True): ``share`` grows by ``share_step``, up to 1, after each held-out evaluation
      whose cross-entropy is at least ``tolerance`` above the reference: the first evaluation's, then that of
      the last one that made it grow. Of the batches below it the student writes those with
      u < share (1 - n/N) at step n of N, and all as long as fewer than ``capacity`` continuations are kept;
      the others are drawn from the last ``capacity``. Schedule and constants are the published code's.

    Sampling is from the whole distribution at temperature 1, as in both papers.

    Attributes:
        share: of the batches; with ``adaptive`` the one it starts from (0 in the published code).
        prompt_tokens: how much of a block the student is given; less where its first document ends before.
        adaptive: DistiLLM instead of GKD.
        share_step, tolerance, capacity: DistiLLM's.
        reference: cross-entropy that an evaluation is compared with; None before the first.
        replay: continuations kept, oldest first.

    Raises:
        TaidError: a setting is impossible.
    """

    share: float = 0.5
    prompt_tokens: int = 32
    adaptive: bool = False
    share_step: float = 0.1
    tolerance: float = 0.1
    capacity: int = 1000
    reference: float | None = field(init=False, default=None)
    replay: list[Continuation] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        for name in ("share", "share_step"):
            if not 0 <= getattr(self, name) <= 1:
                raise TaidError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1.")
        for name in ("prompt_tokens", "capacity"):
            if getattr(self, name) < 1:
                raise TaidError(f"{name} is {getattr(self, name)}; it must be at least 1.")

    def source(self, draw: float, progress: float) -> Source:
        """Where a batch comes from.

        Args:
            draw: u of the class's description.
            progress: n / N, the share of optimizer steps taken.
        """
        if draw >= self.share:
            return "data"
        if self.adaptive and draw >= self.share * (1 - progress) and len(self.replay) >= self.capacity:
            return "replayed"
        return "written"

    def keep(self, written: list[Continuation]) -> None:
        """Takes continuations into the replay, in place of the oldest."""
        if self.adaptive:
            self.replay = (self.replay + written)[-self.capacity :]

    def observe(self, cross_entropy: float) -> None:
        """Takes the cross-entropy of a held-out evaluation in, in nats, and moves ``share``."""
        if not self.adaptive:
            return
        if self.reference is None:
            self.reference = cross_entropy
        elif cross_entropy >= self.reference + self.tolerance:
            self.share = min(1.0, self.share + self.share_step)
            self.reference = cross_entropy

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as JSON values."""
        return {
            "share": self.share,
            "reference": self.reference,
            "replay": [[entry.prompt_tokens, *entry.ids] for entry in self.replay],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state that ``state_dict`` gave."""
        self.share, self.reference = state["share"], state["reference"]
        self.replay = [Continuation(tuple(ids), prompt_tokens) for prompt_tokens, *ids in state["replay"]]


@torch.no_grad()
def continue_beginnings(
    student: Any, input_ids: Tensor, position_ids: Tensor | None, prompt_tokens: int, seed: int
) -> list[Continuation]:
    """The student's continuations of a batch's beginnings, as long as the blocks or up to an end of sequence.

    Args:
        student: a `transformers` causal language model.
        input_ids: blocks ``[B, T]``.
        position_ids: ``[B, T]``, starting at 0 with each document; None: a block is one document.
        prompt_tokens: tokens given, at most; all rows get as many as fit in every row's first document.
        seed: of the sampling; the state of torch's own generator is left as it was.
    """
    length = min(prompt_tokens, input_ids.shape[1] - 1)
    if position_ids is not None:
        starts = (position_ids[:, 1:] == 0).nonzero()
        length = min([length, *(int(column) + 1 for _, column in starts)])
    prompts = input_ids[:, :length]
    ends = student.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    was_training = student.training
    student.eval()
    try:
        with torch.random.fork_rng([prompts.device] if prompts.is_cuda else []):
            torch.manual_seed(seed)
            texts = student.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                generation_config=GenerationConfig(
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    repetition_penalty=1.0,
                    max_new_tokens=input_ids.shape[1] - length,
                    eos_token_id=ends or None,
                    pad_token_id=ends[0] if ends else 0,
                ),
            )
    finally:
        student.train(was_training)
    continuations = []
    for row in texts.tolist():
        end = next((place + 1 for place in range(length, len(row)) if row[place] in ends), len(row))
        continuations.append(Continuation(tuple(row[:end]), length))
    return continuations


def as_batch(continuations: list[Continuation], device: torch.device) -> dict[str, Tensor]:
    """Continuations as a batch for ``DistillationTrainer``: fields ``[B, longest]``, padded at the end, with
    a loss on what the student wrote alone."""
    longest = max(len(entry.ids) for entry in continuations)
    input_ids, loss_mask, attention_mask = torch.zeros(3, len(continuations), longest, dtype=torch.long)
    for row, entry in enumerate(continuations):
        input_ids[row, : len(entry.ids)] = torch.tensor(entry.ids)
        loss_mask[row, entry.prompt_tokens : len(entry.ids)] = 1
        attention_mask[row, : len(entry.ids)] = 1
    batch = {"input_ids": input_ids, "loss_mask": loss_mask, "attention_mask": attention_mask}
    return {name: values.to(device) for name, values in batch.items()}


def draw_replayed(replay: list[Continuation], count: int, seed: list[int]) -> list[Continuation]:
    """Some of the replay, none twice while it has enough."""
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(replay), count, replace=len(replay) < count)
    return [replay[number] for number in chosen]
