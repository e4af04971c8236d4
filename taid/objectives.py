"""Distillation objectives, written plainly: the reference that everything faster is proven against.

Every function takes the student's and the teacher's logits ``[B, T, V]`` (or ``[N, V]``), where position t
holds the logits of the token that is predicted there, and a mask ``[B, T]`` of the positions that count. It
returns a scalar: the mean over the positions whose mask is not zero, in nats per token. No position: zero,
with zero gradients. Softmax runs in float32; float64 logits stay float64. The teacher gets no gradient.

p is the teacher's distribution and q the student's. ``forward_kl``, ``skew_forward_kl`` and ``taid`` are
cross-entropies against their target, as in the paper's code: they differ from the divergence by the
target's entropy, their gradient is the divergence's.

A vocabulary entry whose logit is infinite in either model is taken out of both distributions.
"""

import math

import torch
from torch import Tensor

from taid.errors import TaidError

LARGE = 1e30
"""Stands for infinity where infinity times zero would be undefined."""


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of p against q; its gradient is that of KL(p‖q) (Hinton et al. 2015)."""
    student, teacher = select_positions(mask, student_logits, teacher_logits)
    return mean(-(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1))


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> Tensor:
    """KL(q‖p) (MiniLLM, Gu et al. 2024)."""
    student, teacher = select_positions(mask, student_logits, teacher_logits)
    return mean(divergence(student.log_softmax(-1), teacher.log_softmax(-1)))


def jensen_shannon(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, teacher_weight: float = 0.1
) -> Tensor:
    """w KL(p‖m) + (1-w) KL(q‖m) with m = w p + (1-w) q (GKD, Agarwal et al. 2024).

    Args:
        teacher_weight: w, between 0 and 1.
    """
    check_share("teacher_weight", teacher_weight)
    student, teacher = select_positions(mask, student_logits, teacher_logits)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    log_m = log_mixture(log_p, log_q, teacher_weight)
    return mean(teacher_weight * divergence(log_p, log_m) + (1 - teacher_weight) * divergence(log_q, log_m))


def total_variation(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> Tensor:
    """Half the sum of |p - q| (Wen et al. 2023)."""
    student, teacher = select_positions(mask, student_logits, teacher_logits)
    return mean(0.5 * (teacher.softmax(-1) - student.softmax(-1)).abs().sum(-1))


def skew_forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, skew: float = 0.1
) -> Tensor:
    """Cross-entropy of p against s p + (1-s) q; its gradient is the skew KL's (DistiLLM, Ko et al. 2024).

    Args:
        skew: s, between 0 and 1.
    """
    check_share("skew", skew)
    student, teacher = select_positions(mask, student_logits, teacher_logits)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    return mean(-(log_p.exp() * log_mixture(log_p, log_q, skew)).sum(-1))


def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, skew: float = 0.1
) -> Tensor:
    """KL(q ‖ (1-s) p + s q) (DistiLLM, Ko et al. 2024).

    Args:
        skew: s, between 0 and 1.
    """
    check_share("skew", skew)
    student, teacher = select_positions(mask, student_logits, teacher_logits)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    return mean(divergence(log_q, log_mixture(log_q, log_p, skew)))


def adaptive_kl(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, head_mass: float = 0.5
) -> Tensor:
    """KL(p‖q) and KL(q‖p), weighted token by token with where the student errs (Wu et al. 2025).

    The teacher's most likely tokens whose probabilities before them sum to less than ``head_mass`` are the
    head, the others the tail. KL(p‖q) is weighted with the head's share of the sum of |p - q|, KL(q‖p)
    with the tail's. The weights are constants to the gradient.

    Args:
        head_mass: the probability, between 0 and 1, that the head holds.
    """
    check_share("head_mass", head_mass)
    student, teacher = select_positions(mask, student_logits, teacher_logits)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    with torch.no_grad():
        probabilities, order = log_p.exp().sort(dim=-1, descending=True, stable=True)
        gap = (log_p.exp() - log_q.exp()).abs().gather(-1, order)
        in_head = probabilities.cumsum(-1) - probabilities < head_mass
        total = gap.sum(-1)
        # Equal distributions have no gap to share out; both divergences and their gradients are zero then.
        head_weight = (gap * in_head).sum(-1) / torch.where(total > 0, total, 1.0)
    return mean(head_weight * divergence(log_p, log_q) + (1 - head_weight) * divergence(log_q, log_p))


def decoupled_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 0.5,
) -> Tensor:
    """alpha times target-class KL plus beta times non-target-class KL (DKD, Zhao et al. 2022).

    The first compares the two-way distributions (label, anything else), the second the distributions over
    everything but the label.

    Args:
        labels: ``[B, T]`` ids of the true tokens; read only where the mask is not zero.
        alpha: weight of the target-class part.
        beta: weight of the non-target-class part.
    """
    student, teacher = select_positions(mask, student_logits, teacher_logits)
    target = select_labels(labels, mask, student.shape[-1])

    def split(logits: Tensor) -> tuple[Tensor, Tensor]:
        others = logits.scatter(-1, target, -LARGE)
        binary = torch.cat([logits.gather(-1, target), others.logsumexp(-1, keepdim=True)], dim=-1)
        return binary.log_softmax(-1), others.log_softmax(-1)

    student_binary, student_others = split(student)
    teacher_binary, teacher_others = split(teacher)
    target_class = divergence(teacher_binary, student_binary)
    non_target_class = divergence(teacher_others, student_others)
    return mean(alpha * target_class + beta * non_target_class)


def curriculum_temperature(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    temperature: Tensor,
    reversal: float = 1.0,
) -> Tensor:
    """T² KL(p‖q) at temperature T, where T learns to make the task harder (CTKD, Li et al. 2023).

    The student descends; the gradient that reaches ``temperature`` is reversed and scaled, so the same
    optimizer ascends in it. Give ``temperature`` to that optimizer.

    Args:
        temperature: positive scalar, usually ``1 + 20 * sigmoid(parameter)``.
        reversal: strength of the reversed gradient, risen from 0 to 1 in the paper
            (``curriculum_reversal``).
    """
    student, teacher = select_positions(mask, student_logits, teacher_logits)
    # The value is T; the gradient is -reversal times the plain one.
    reversed_temperature = temperature.detach() * (1 + reversal) - temperature * reversal
    log_q = (student / reversed_temperature).log_softmax(-1)
    log_p = (teacher / reversed_temperature).log_softmax(-1)
    return mean(divergence(log_p, log_q)) * reversed_temperature.square()


def curriculum_reversal(step: int, total_steps: int, maximum: float = 1.0) -> float:
    """CTKD's cosine rise of the reversal strength from 0 at step 0 to ``maximum`` at ``total_steps``."""
    progress = min(max(step / max(total_steps, 1), 0.0), 1.0)
    return 0.5 * maximum * (1 - math.cos(math.pi * progress))


def cross_entropy(student_logits: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the true tokens against q: plain training, no teacher.

    Args:
        labels: ``[B, T]`` ids of the true tokens; read only where the mask is not zero.
    """
    (student,) = select_positions(mask, student_logits)
    return mean(
        -student.log_softmax(-1).gather(-1, select_labels(labels, mask, student.shape[-1])).squeeze(-1)
    )


def taid(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, t: float) -> Tensor:
    """Cross-entropy of p_t against q, p_t = softmax((1-t) stopgrad(student) + t teacher).

    The logits are mixed, not the probabilities (Shing et al. 2025, arXiv 2501.16937, equations 2 and 3).

    Args:
        t: how far the target has moved from the student (0) to the teacher (1).
    """
    check_share("t", t)
    student, teacher = select_positions(mask, student_logits, teacher_logits)
    target = ((1 - t) * student.detach() + t * teacher).softmax(-1)
    return mean(-(target * student.log_softmax(-1)).sum(-1))


def select_positions(mask: Tensor, student_logits: Tensor, *teacher_logits: Tensor) -> list[Tensor]:
    """The logits ``[N, V]`` of the positions that count, in float32 or float64, free of infinities.

    Raises:
        TaidError: the shapes do not fit together.
    """
    for teacher in teacher_logits:
        if teacher.shape != student_logits.shape:
            raise TaidError(
                f"Student logits {list(student_logits.shape)} and teacher logits {list(teacher.shape)} "
                "differ in shape; trim both to the shared vocabulary."
            )
    if mask.shape != student_logits.shape[:-1]:
        raise TaidError(
            f"The mask's shape {list(mask.shape)} is not the logits' without the vocabulary, "
            f"{list(student_logits.shape[:-1])}."
        )
    # Selecting first keeps whatever stands at the other positions, even NaN, out of value and gradient.
    chosen = mask != 0
    selected = [working_precision(student_logits[chosen])]
    selected += [working_precision(teacher.detach()[chosen]) for teacher in teacher_logits]
    infinite = torch.stack([logits.detach().isinf() for logits in selected]).any(0)
    return [logits.masked_fill(infinite, -LARGE) for logits in selected]


def select_labels(labels: Tensor, mask: Tensor, vocabulary_size: int) -> Tensor:
    """The labels ``[N, 1]`` of the positions that count.

    Raises:
        TaidError: one of them is outside the vocabulary.
    """
    chosen = labels[mask != 0]
    if chosen.numel() and (int(chosen.min()) < 0 or int(chosen.max()) >= vocabulary_size):
        raise TaidError(
            f"A label where the mask is set is outside the vocabulary of {vocabulary_size} tokens "
            f"(labels there run from {int(chosen.min())} to {int(chosen.max())})."
        )
    return chosen.long().unsqueeze(-1)


def working_precision(logits: Tensor) -> Tensor:
    """float64 as it is, anything else as float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def mean(losses: Tensor) -> Tensor:
    """Mean of the tokens' losses ``[N]``; zero, connected to the graph, when there are none."""
    return losses.sum() / max(losses.numel(), 1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) of each position from log-probabilities ``[N, V]``."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q); never log 0, however small both are."""
    if share in (0.0, 1.0):
        # What has no share stays in the graph: a loss that does not depend on the student has zero gradients.
        return log_p + 0 * log_q if share else log_q + 0 * log_p
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def check_share(name: str, value: float) -> None:
    """
    Raises:
        TaidError: the value is not between 0 and 1.
    """
    if not 0 <= value <= 1:
        raise TaidError(f"{name} is {value}; it must lie between 0 and 1.")
