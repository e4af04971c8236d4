"""The objectives from final hidden states and heads, without ever holding ``[B, T, V]`` logits.

Only the positions whose mask is set are projected, a chunk of them at a time, and the gradient is formed
in the forward pass while the chunk's logits are at hand: backward only scales it. A chunk costs one
projection by each head, one log-softmax of the student's and one softmax of the target's logits, one dot
product and the two products of the gradient; nothing else of the vocabulary's size is kept.

Every function equals its namesake in ``taid.objectives`` on
``softcap(scale * (hidden @ weight.T + bias)) / T``, times T squared, in value and gradient, also where logits
are infinite.

Common arguments:

- ``student_hidden`` ``[N, Hs]`` or ``[B, T, Hs]`` after the final norm, ``student_head_weight`` ``[V, Hs]``;
  ``teacher_hidden``, ``teacher_head_weight`` the same with the teacher's width. Heads are trimmed to the
  shared vocabulary beforehand (a slice ``weight[:V]``).
- ``mask`` ``[N]`` or ``[B, T]``: positions that count; None: all.
- ``student_head``, ``teacher_head``: ``HeadOptions`` with bias, scale and soft-capping.
- ``temperature``: T divides the finished logits of both models, and the loss is multiplied by T squared, so
  that its gradients keep their size (Hinton et al. 2015, arXiv 1503.02531, section 2.1).
- ``chunk_size``: positions at a time; memory is about ``2 * chunk_size * V * 4`` bytes for ``fused_taid``.
- ``compiled``: the softmaxes and sums of a chunk through ``torch.compile``, which needs a C++ compiler or a
  GPU: fewer passes over memory, of which a CPU gains nothing (docs/log.md).

Softmax runs in float32 (float64 inputs stay float64); projections run in the hidden states' type, or in
autocast's where that is on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taid import objectives
from taid.errors import TaidError

CHUNK_SIZE = 256
TILE = 768
"""Rows of a head that are multiplied at a time on a CPU."""


@dataclass(frozen=True)
class HeadOptions:
    """What a model does to its logits besides the matrix product.

    Attributes:
        bias: ``[V]``, added first.
        logit_scale: factor applied next (Cohere's ``logit_scale``, Granite's ``1 / logits_scaling``).
        softcap: c of ``c * tanh(logits / c)``, applied last (Gemma 2).
    """

    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def apply_(self, logits: Tensor) -> Tensor:
        """Finishes raw products ``[N, V]`` in place."""
        if self.bias is not None:
            logits.add_(self.bias.detach())
        if self.logit_scale != 1.0:
            logits.mul_(self.logit_scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def gradient_(self, gradient: Tensor, logits: Tensor | None) -> Tensor:
        """Carries the gradient of finished logits back to the raw products, in place."""
        if self.softcap is not None:
            assert logits is not None
            gradient.mul_(1 - (logits / self.softcap).square_())
        if self.logit_scale != 1.0:
            gradient.mul_(self.logit_scale)
        return gradient


PLAIN_HEAD = HeadOptions()
"""A head that is nothing but a matrix product."""

ChunkObjective = Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
"""(student logits [n, V], teacher logits, labels [n]) -> (summed loss, its gradient by the student logits).

It may overwrite both logits.
"""


def fused_taid(
    student_hidden: Tensor,
    student_head_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_head_weight: Tensor,
    t: float,
    *,
    target_entropy: Tensor | None = None,
    mask: Tensor | None = None,
    student_head: HeadOptions = HeadOptions(),
    teacher_head: HeadOptions = HeadOptions(),
    temperature: float = 1.0,
    chunk_size: int = CHUNK_SIZE,
    compiled: bool = False,
) -> Tensor:
    """``objectives.taid`` in chunks; see the module for the arguments.

    Args:
        target_entropy: a scalar that the sum of p_t's entropy over the positions, times T squared, is added
            to; the loss less the mean of that is T² KL(p_t‖q). None: it is not computed, which saves a pass
            over the logits.
    """
    objectives.check_share("t", t)
    # A number would be compiled in, and each step's t anew.
    share = torch.tensor(t, dtype=torch.float64, device=student_hidden.device) if compiled else t

    def chunk_taid(student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        weight = share.to(student.dtype) if isinstance(share, Tensor) else share
        target = torch.lerp(student, teacher, weight, out=teacher)
        if target_entropy is None:
            return _cross_entropy_with(torch.softmax(target, -1, out=target), student)
        log_target = torch.log_softmax(target, -1, out=target)
        target = log_target.exp()
        target_entropy.sub_(temperature**2 * row_dot(target, log_target).sum())
        return _cross_entropy_with(target, student)

    return fused_objective(
        chunk_taid,
        student_hidden,
        student_head_weight,
        teacher_hidden,
        teacher_head_weight,
        mask=mask,
        student_head=student_head,
        teacher_head=teacher_head,
        temperature=temperature,
        chunk_size=chunk_size,
        compiled=compiled,
    )


def fused_forward_kl(
    student_hidden: Tensor,
    student_head_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_head_weight: Tensor,
    **options: Any,
) -> Tensor:
    """``objectives.forward_kl`` in chunks; see the module for the arguments."""

    def chunk_forward_kl(
        student: Tensor, teacher: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        return _cross_entropy_with(torch.softmax(teacher, -1, out=teacher), student)

    return fused_objective(
        chunk_forward_kl, student_hidden, student_head_weight, teacher_hidden, teacher_head_weight, **options
    )


def fused_reverse_kl(
    student_hidden: Tensor,
    student_head_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_head_weight: Tensor,
    **options: Any,
) -> Tensor:
    """``objectives.reverse_kl`` in chunks; see the module for the arguments."""

    def chunk_reverse_kl(
        student: Tensor, teacher: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        log_q = student.log_softmax(-1)
        slope = log_q - teacher.log_softmax(-1)
        q = log_q.exp_()
        return row_dot(q, slope).sum(), _through_softmax(q, slope)

    return fused_objective(
        chunk_reverse_kl, student_hidden, student_head_weight, teacher_hidden, teacher_head_weight, **options
    )


def fused_jensen_shannon(
    student_hidden: Tensor,
    student_head_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_head_weight: Tensor,
    teacher_weight: float = 0.1,
    **options: Any,
) -> Tensor:
    """``objectives.jensen_shannon`` in chunks; see the module for the arguments."""
    objectives.check_share("teacher_weight", teacher_weight)

    def chunk_jensen_shannon(
        student: Tensor, teacher: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        log_m = _mixture(p, q, teacher_weight).log_()
        slope = log_q.sub_(log_m).mul_(1 - teacher_weight)
        loss = teacher_weight * row_dot(p, log_p.sub_(log_m)).sum() + row_dot(q, slope).sum()
        return loss, _through_softmax(q, slope)

    return fused_objective(
        chunk_jensen_shannon,
        student_hidden,
        student_head_weight,
        teacher_hidden,
        teacher_head_weight,
        **options,
    )


def fused_total_variation(
    student_hidden: Tensor,
    student_head_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_head_weight: Tensor,
    **options: Any,
) -> Tensor:
    """``objectives.total_variation`` in chunks; see the module for the arguments."""

    def chunk_total_variation(
        student: Tensor, teacher: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        q = torch.softmax(student, -1, out=student)
        difference = q - torch.softmax(teacher, -1, out=teacher)
        loss = 0.5 * difference.abs().sum()
        return loss, _through_softmax(q, difference.sign_().mul_(0.5))

    return fused_objective(
        chunk_total_variation,
        student_hidden,
        student_head_weight,
        teacher_hidden,
        teacher_head_weight,
        **options,
    )


def fused_skew_forward_kl(
    student_hidden: Tensor,
    student_head_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_head_weight: Tensor,
    skew: float = 0.1,
    **options: Any,
) -> Tensor:
    """``objectives.skew_forward_kl`` in chunks; see the module for the arguments."""
    objectives.check_share("skew", skew)

    def chunk_skew_forward_kl(
        student: Tensor, teacher: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        # Through logarithms, since PyTorch 2.13 compiles no softmax in place that goes into a product.
        q = torch.log_softmax(student, -1, out=student).exp_()
        p = torch.log_softmax(teacher, -1, out=teacher).exp_()
        mixture = _mixture(p, q, skew)
        slope = (p / mixture).mul_(skew - 1)
        loss = -row_dot(p, mixture.log_()).sum()
        return loss, _through_softmax(q, slope)

    return fused_objective(
        chunk_skew_forward_kl,
        student_hidden,
        student_head_weight,
        teacher_hidden,
        teacher_head_weight,
        **options,
    )


def fused_skew_reverse_kl(
    student_hidden: Tensor,
    student_head_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_head_weight: Tensor,
    skew: float = 0.1,
    **options: Any,
) -> Tensor:
    """``objectives.skew_reverse_kl`` in chunks; see the module for the arguments."""
    objectives.check_share("skew", skew)

    def chunk_skew_reverse_kl(
        student: Tensor, teacher: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
        q = log_q.exp()
        mixture = _mixture(q, log_p.exp_(), skew)
        ratio = q / mixture
        log_ratio = log_q.sub_(mixture.log_())
        loss = row_dot(q, log_ratio).sum()
        return loss, _through_softmax(q, log_ratio.sub_(ratio, alpha=skew))

    return fused_objective(
        chunk_skew_reverse_kl,
        student_hidden,
        student_head_weight,
        teacher_hidden,
        teacher_head_weight,
        **options,
    )


def fused_adaptive_kl(
    student_hidden: Tensor,
    student_head_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_head_weight: Tensor,
    head_mass: float = 0.5,
    **options: Any,
) -> Tensor:
    """``objectives.adaptive_kl`` in chunks; see the module for the arguments."""

    def chunk_adaptive_kl(
        student: Tensor, teacher: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        return _by_autograd(
            lambda logits, mask: objectives.adaptive_kl(logits, teacher, mask, head_mass), student
        )

    return fused_objective(
        chunk_adaptive_kl, student_hidden, student_head_weight, teacher_hidden, teacher_head_weight, **options
    )


def fused_decoupled_kd(
    student_hidden: Tensor,
    student_head_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_head_weight: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 0.5,
    **options: Any,
) -> Tensor:
    """``objectives.decoupled_kd`` in chunks; ``labels`` ``[N]`` or ``[B, T]``, the rest see the module."""

    def chunk_decoupled_kd(
        student: Tensor, teacher: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        assert labels is not None
        return _by_autograd(
            lambda logits, mask: objectives.decoupled_kd(logits, teacher, mask, labels, alpha, beta), student
        )

    return fused_objective(
        chunk_decoupled_kd,
        student_hidden,
        student_head_weight,
        teacher_hidden,
        teacher_head_weight,
        labels=labels,
        **options,
    )


def fused_curriculum_temperature(
    student_hidden: Tensor,
    student_head_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_head_weight: Tensor,
    temperature: Tensor,
    reversal: float = 1.0,
    **options: Any,
) -> Tensor:
    """``objectives.curriculum_temperature`` in chunks; see the module for the other arguments.

    Args:
        temperature: positive scalar tensor; its gradient is the reversed one.
        reversal: strength of the reversed gradient.
    """
    value = float(temperature.detach())
    slopes = []

    def chunk_curriculum_temperature(
        student: Tensor, teacher: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        log_q = student.div_(value).log_softmax(-1)
        log_p = teacher.div_(value).log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        difference = log_p - log_q
        kl = row_dot(p, difference)
        # The derivative of a log-probability by the temperature is minus its distance from its mean, over it.
        covariance = row_dot(p, log_p * difference) - row_dot(p, log_p) * kl
        shift = row_dot(p, log_q) - row_dot(q, log_q)
        slopes.append((value * (2 * kl - covariance + shift)).sum())
        return value**2 * kl.sum(), q.sub_(p).mul_(value)

    loss = fused_objective(
        chunk_curriculum_temperature,
        student_hidden,
        student_head_weight,
        teacher_hidden,
        teacher_head_weight,
        **options,
    )
    mask = options.get("mask")
    count = int((mask != 0).sum()) if mask is not None else student_hidden.shape[:-1].numel()
    slope = sum(slopes, start=loss.new_zeros(())) / max(count, 1)
    # Adds nothing to the value, and the reversed slope to the gradient.
    return loss - (temperature - temperature.detach()) * reversal * slope


def fused_cross_entropy(
    student_hidden: Tensor,
    student_head_weight: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    student_head: HeadOptions = HeadOptions(),
    chunk_size: int = CHUNK_SIZE,
    compiled: bool = False,
) -> Tensor:
    """``objectives.cross_entropy`` in chunks; ``labels`` ``[N]`` or ``[B, T]``, the rest see the module."""

    def chunk_cross_entropy(
        student: Tensor, teacher: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert labels is not None
        log_q = torch.log_softmax(student, -1, out=student)
        target = labels.unsqueeze(-1)
        loss = -log_q.gather(-1, target).sum()
        gradient = log_q.exp_()
        gradient.scatter_add_(-1, target, gradient.new_full((), -1.0).expand_as(target))
        return loss, gradient

    return fused_objective(
        chunk_cross_entropy,
        student_hidden,
        student_head_weight,
        None,
        None,
        labels=labels,
        mask=mask,
        student_head=student_head,
        chunk_size=chunk_size,
        compiled=compiled,
    )


def fused_objective(
    chunk_objective: ChunkObjective,
    student_hidden: Tensor,
    student_head_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head_weight: Tensor | None,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    student_head: HeadOptions = HeadOptions(),
    teacher_head: HeadOptions = HeadOptions(),
    temperature: float = 1.0,
    chunk_size: int = CHUNK_SIZE,
    compiled: bool = False,
) -> Tensor:
    """Mean over the masked positions of an objective that is given chunk by chunk.

    Args:
        chunk_objective: the summed loss of a chunk and its gradient by the student's logits.
        teacher_head_weight: None hands the rows of ``teacher_hidden`` to the objective as they are; these
            have no other temperature than their own.
        labels: ``[N]`` or ``[B, T]``, one token or, ``[..., S]``, several of each position, for objectives
            that read them.

    Raises:
        TaidError: shapes do not fit together, a label is outside the vocabulary, or ``chunk_size`` or
            ``temperature`` is not positive.
    """
    if chunk_size < 1:
        raise TaidError(f"chunk_size is {chunk_size}; it must be at least 1.")
    if not 0 < temperature < float("inf"):
        raise TaidError(f"temperature is {temperature}; it must be a positive number.")
    positions = student_hidden.shape[:-1]
    for name, tensor in (("mask", mask), ("labels", labels)):
        if tensor is not None and tensor.shape[: len(positions)] != positions:
            raise TaidError(f"The {name} has shape {list(tensor.shape)}, the positions {list(positions)}.")
    if teacher_hidden is not None:
        if teacher_hidden.shape[:-1] != positions:
            raise TaidError(
                f"The teacher's hidden states have positions {list(teacher_hidden.shape[:-1])}, "
                f"the student's {list(positions)}."
            )
        if teacher_head_weight is not None and teacher_head_weight.shape[0] != student_head_weight.shape[0]:
            raise TaidError(
                f"The teacher's head has {teacher_head_weight.shape[0]} rows, the student's "
                f"{student_head_weight.shape[0]}; trim both to the shared vocabulary."
            )
    student_hidden = student_hidden.flatten(0, -2)
    chosen = None if mask is None else (mask.flatten() != 0).nonzero().squeeze(-1)

    def choose(tensor: Tensor) -> Tensor:
        return tensor if chosen is None or len(chosen) == len(tensor) else tensor.index_select(0, chosen)

    if labels is not None:
        labels = choose(labels.flatten(0, len(positions) - 1)).long()
        rows = student_head_weight.shape[0]
        if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= rows):
            raise TaidError(
                f"A label where the mask is set is outside the vocabulary of {rows} tokens "
                f"(labels there run from {int(labels.min())} to {int(labels.max())})."
            )
    return _Fused.apply(
        choose(student_hidden),
        student_head_weight,
        student_head.bias,
        None if teacher_hidden is None else choose(teacher_hidden.detach().flatten(0, -2)),
        None if teacher_head_weight is None else teacher_head_weight.detach(),
        labels,
        torch.compile(chunk_objective, dynamic=True) if compiled else chunk_objective,
        student_head,
        teacher_head,
        temperature,
        chunk_size,
    )


class _Fused(torch.autograd.Function):
    """Mean of a chunked objective whose gradient is ready when the forward pass ends."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        labels: Tensor | None,
        chunk_objective: ChunkObjective,
        student_head: HeadOptions,
        teacher_head: HeadOptions,
        temperature: float,
        chunk_size: int,
    ) -> Tensor:
        device = student_hidden.device.type
        compute_type = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student_hidden.dtype
        )
        softmax_type = torch.float64 if compute_type == torch.float64 else torch.float32
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        needs_gradient = needs_hidden or needs_weight or needs_bias
        count = student_hidden.shape[0]
        weight = student_weight.to(compute_type)
        if teacher_weight is not None:
            teacher_weight = teacher_weight.to(compute_type)
        # Sums over chunks are kept in float32 even where the weights are bfloat16.
        hidden_gradient = torch.zeros_like(student_hidden) if needs_hidden else None
        weight_gradient = torch.zeros_like(student_weight, dtype=softmax_type) if needs_weight else None
        bias_gradient = (
            torch.zeros_like(student_bias, dtype=softmax_type)
            if needs_bias and student_bias is not None
            else None
        )
        total = torch.zeros((), dtype=softmax_type, device=student_hidden.device)
        # One buffer for the logits of every chunk: fresh memory would be cleared by the system each time.
        shape = (min(count, chunk_size), weight.shape[0])
        buffer = torch.empty(shape, dtype=softmax_type, device=student_hidden.device)
        teacher_buffer = None if teacher_weight is None else torch.empty_like(buffer)
        with torch.autocast(device, enabled=False):
            for start in range(0, count, chunk_size):
                chunk = slice(start, start + chunk_size)
                hidden = student_hidden[chunk].to(compute_type)
                logits = student_head.apply_(project(hidden, weight, buffer))
                teacher_logits = None if teacher_hidden is None else teacher_hidden[chunk]
                if teacher_logits is not None and teacher_weight is not None and teacher_buffer is not None:
                    products = project(teacher_logits.to(compute_type), teacher_weight, teacher_buffer)
                    teacher_logits = teacher_head.apply_(products)
                    _take_infinite_out_(logits, teacher_logits)
                else:
                    _take_infinite_out_(logits)
                capped = logits.clone() if student_head.softcap is not None and needs_gradient else None
                if temperature != 1.0:
                    logits.div_(temperature)
                    if teacher_logits is not None and teacher_weight is not None:
                        teacher_logits.div_(temperature)
                loss, gradient = chunk_objective(
                    logits, teacher_logits, None if labels is None else labels[chunk]
                )
                total += loss * temperature**2
                if not needs_gradient:
                    continue
                if temperature != 1.0:
                    # T squared of the loss, over the T that the logits were divided by.
                    gradient.mul_(temperature)
                gradient = student_head.gradient_(gradient, capped)
                if bias_gradient is not None:
                    # The bias is added before scale and cap, so its gradient is the raw products'.
                    bias_gradient += gradient.sum(0)
                gradient = gradient.to(compute_type)
                if hidden_gradient is not None:
                    hidden_gradient[chunk] = (gradient @ weight).div_(count)
                if weight_gradient is not None:
                    if compute_type == softmax_type:
                        weight_gradient.addmm_(gradient.T, hidden)
                    else:
                        weight_gradient += gradient.T @ hidden
        divisor = max(count, 1)
        # Not saved for backward: autograd would keep its own reference and copy what it could hand over.
        ctx.gradients = (
            hidden_gradient,
            None if weight_gradient is None else weight_gradient.div_(divisor).to(student_weight.dtype),
            None if bias_gradient is None else bias_gradient.div_(divisor).to(student_bias.dtype),  # type: ignore[union-attr]
        )
        return total / divisor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = outputs
        if ctx.gradients is None:
            raise TaidError("The gradient of a fused objective can be taken once; compute the loss anew.")
        # Scaled in place: a head's gradient is as large as the head, and nobody else holds it.
        gradients = [
            None if gradient is None else gradient.mul_(scale.to(gradient.dtype))
            for gradient in ctx.gradients
        ]
        ctx.gradients = None
        return (*gradients, *[None] * 8)


def project(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """``hidden @ weight.T`` in the first rows of a buffer, in the buffer's type.

    On a CPU in tiles of the vocabulary, each of which stays in the cache until it is copied: rows of the
    whole vocabulary lie so far apart that writing them slows the product (docs/log.md).
    """
    rows = buffer[: len(hidden)]
    if hidden.dtype != buffer.dtype:
        return rows.copy_(hidden @ weight.T)
    if hidden.is_cuda or len(weight) <= TILE:
        return torch.mm(hidden, weight.T, out=rows)
    product = rows.new_empty(len(rows), TILE)
    for columns, tile in zip(rows.split(TILE, dim=1), weight.split(TILE), strict=True):
        columns.copy_(torch.mm(hidden, tile.T, out=product if len(tile) == TILE else None))
    return rows


def _take_infinite_out_(*logits: Tensor) -> None:
    """Takes entries that are infinite in any of the logits ``[n, V]`` out of all, in place.

    A sum tells most chunks to be finite for much less than looking at every entry.
    """
    if all(bool(each.sum().isfinite()) for each in logits):
        return
    infinite = torch.stack([each.isinf() for each in logits]).any(0)
    for each in logits:
        each.masked_fill_(infinite, -objectives.LARGE)


def _cross_entropy_with(target: Tensor, student_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of target probabilities against the student, and softmax(student) - target."""
    log_q = torch.log_softmax(student_logits, -1, out=student_logits)
    loss = -row_dot(target, log_q).sum()
    return loss, log_q.exp_().sub_(target)


def _through_softmax(q: Tensor, slope: Tensor) -> Tensor:
    """Gradient by the logits from the derivative by q's entries, in place: q (slope - <q, slope>)."""
    return slope.sub_(row_dot(q, slope).unsqueeze(-1)).mul_(q)


def _mixture(p: Tensor, q: Tensor, share: float) -> Tensor:
    """share p + (1 - share) q, kept off zero: where both underflow, every term is multiplied by one of them.

    Much faster than adding in logarithms, which the reference does.
    """
    return torch.lerp(q, p, share).clamp_(min=torch.finfo(q.dtype).tiny)


def row_dot(left: Tensor, right: Tensor) -> Tensor:
    """Row-wise dot product ``[n]`` of ``[n, V]`` and ``[n, V]`` without a temporary of their size."""
    return torch.bmm(left.unsqueeze(1), right.unsqueeze(2)).flatten()


def _by_autograd(
    objective: Callable[[Tensor, Tensor], Tensor], student_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Summed loss and gradient of a chunk through the reference objective."""
    count = student_logits.shape[0]
    everything = torch.ones(count, dtype=torch.bool, device=student_logits.device)
    with torch.enable_grad():
        leaf = student_logits.detach().requires_grad_()
        loss = objective(leaf, everything) * count
        (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient.clone()
