"""What the benchmarks compare with computes the same thing: else a ratio of times would say nothing."""

import numpy as np
import torch

from benchmarks import common, step
from benchmarks.baselines import full_logit_taid, trl_forward_kl
from taid import fused, objectives


def heads():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    return random(2, 7, 6), random(19, 6), random(2, 7, 8), random(19, 8)


def test_full_logits_equal_the_reference_and_the_fused_objective() -> None:
    student, student_head, teacher, teacher_head = heads()
    mask = torch.ones(2, 7)
    mask[1, 4:] = 0
    logits = (student @ student_head.T, teacher @ teacher_head.T)
    found = full_logit_taid(*logits, mask, 0.3)
    torch.testing.assert_close(found, objectives.taid(*logits, mask, 0.3))
    torch.testing.assert_close(
        found, fused.fused_taid(student, student_head, teacher, teacher_head, 0.3, mask=mask)
    )


def test_trl_has_the_gradient_of_our_forward_kl() -> None:
    gradients = []
    for loss_of in (trl_forward_kl, lambda s, sw, t, tw, m: fused.fused_forward_kl(s, sw, t, tw, mask=m)):
        student, student_head, teacher, teacher_head = heads()
        mask = torch.ones(2, 7)
        mask[0, 5:] = 0
        student.requires_grad_()
        student_head.requires_grad_()
        loss_of(student, student_head, teacher, teacher_head, mask).backward()
        gradients.append((student.grad, student_head.grad))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_packing_keeps_every_token_and_restarts_positions() -> None:
    conversations = [list(range(10, 10 + length)) for length in (500, 300, 200, 12, 7)]
    data = step.pack(conversations, pad=0)
    assert data.mask.sum() == sum(map(len, conversations))
    assert len(data.blocks) == 2
    assert sorted(data.blocks[data.mask == 1]) == sorted(token for c in conversations for token in c)
    starts = data.blocks[(data.positions == 0) & (data.mask == 1)]
    assert (starts == 10).all()
    assert len(starts) == len(conversations)
    for row in range(2):
        learned = data.positions[row][data.mask[row] == 1]
        assert (np.diff(learned)[np.diff(learned) != 1] < 0).all()


def test_rounds_rotate_and_ratios_are_paired() -> None:
    order: list[str] = []

    def variant(name: str, seconds: float):
        def run(number: int) -> common.Sample:
            order.append(name)
            return common.Sample(10, seconds * (number + 2), seconds)

        return run

    samples = common.in_turns({"a": variant("a", 1.0), "b": variant("b", 2.0)}, rounds=3)
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    # Each round is slower than the last, for both alike: the ratio does not see it.
    assert common.speed_up(samples["a"], samples["b"]) == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert common.rate(samples["a"], "cpu") == {"mean": 10.0, "std": 0.0}
