"""What the benchmarks compare with: TAID as its paper states it, and TRL's chunked divergence."""

import torch
from torch import Tensor


def full_logit_taid(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, t: float) -> Tensor:
    """TAID over whole logits in float32, as the paper's formulas read (Shing et al. 2025, section 3).

    Args:
        student_logits, teacher_logits: ``[B, T, V]``.
        mask: ``[B, T]``, 0 for padding, whose loss is computed and then left out of the mean.
        t: share of the teacher.
    """
    mixed = (1 - t) * student_logits.detach() + t * teacher_logits
    target = torch.softmax(mixed, dim=-1, dtype=torch.float32)
    log_q = torch.log_softmax(student_logits, dim=-1, dtype=torch.float32)
    per_token = -(target * log_q).sum(-1)
    return (per_token * mask).sum() / mask.sum()


def trl_forward_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor,
) -> Tensor:
    """TRL's chunked divergence at beta 0, the forward KL, called as its ``DistillationTrainer`` calls it.

    Args:
        student_hidden, teacher_hidden: ``[B, T, H]``.
        student_weight, teacher_weight: ``[V, H]``.
        mask: ``[B, T]``.
    """
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    loss, _, _ = _chunked_divergence_loss(
        student_hidden, teacher_hidden, student_weight, teacher_weight, mask, beta=0.0
    )
    return loss
