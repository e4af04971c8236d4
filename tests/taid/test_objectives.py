"""Every objective against its paper's formula, written here a second time: numpy, float64, token by token."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taid import objectives
from taid.errors import TaidError

BATCH, LENGTH, VOCABULARY = 2, 5, 7


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))


def crossed(p: np.ndarray, q: np.ndarray) -> float:
    return float(-sum(a * math.log(b) for a, b in zip(p, q, strict=True)))


def paper_adaptive_kl(s, t, label, head_mass=0.5):
    p, q = softmax(t), softmax(s)
    head, mass = set(), 0.0
    for token in np.argsort(-p, kind="stable"):
        if mass >= head_mass:
            break
        head.add(int(token))
        mass += p[token]
    gap_head = sum(abs(p[i] - q[i]) for i in head)
    gap_tail = sum(abs(p[i] - q[i]) for i in range(len(p)) if i not in head)
    share = gap_head / (gap_head + gap_tail)
    return share * kl(p, q) + (1 - share) * kl(q, p)


def paper_decoupled_kd(s, t, label, alpha=1.0, beta=0.5):
    p, q = softmax(t), softmax(s)
    target = kl(np.array([p[label], 1 - p[label]]), np.array([q[label], 1 - q[label]]))
    others = [i for i in range(len(p)) if i != label]
    non_target = kl(p[others] / (1 - p[label]), q[others] / (1 - q[label]))
    return alpha * target + beta * non_target


def paper_jensen_shannon(s, t, label, w=0.1):
    p, q = softmax(t), softmax(s)
    return w * kl(p, w * p + (1 - w) * q) + (1 - w) * kl(q, w * p + (1 - w) * q)


FORMULAS = {
    "forward_kl": lambda s, t, y: crossed(softmax(t), softmax(s)),
    "reverse_kl": lambda s, t, y: kl(softmax(s), softmax(t)),
    "jensen_shannon": paper_jensen_shannon,
    "total_variation": lambda s, t, y: 0.5 * np.abs(softmax(t) - softmax(s)).sum(),
    "skew_forward_kl": lambda s, t, y: crossed(softmax(t), 0.1 * softmax(t) + 0.9 * softmax(s)),
    "skew_reverse_kl": lambda s, t, y: kl(softmax(s), 0.9 * softmax(t) + 0.1 * softmax(s)),
    "adaptive_kl": paper_adaptive_kl,
    "decoupled_kd": paper_decoupled_kd,
    "cross_entropy": lambda s, t, y: -math.log(softmax(s)[y]),
    "taid": lambda s, t, y: crossed(softmax(0.3 * s + 0.7 * t), softmax(s)),
    "curriculum_temperature": lambda s, t, y: 9 * kl(softmax(t / 3), softmax(s / 3)),
}


def call(name: str, student, teacher, mask, labels) -> torch.Tensor:
    if name == "cross_entropy":
        return objectives.cross_entropy(student, mask, labels)
    extra = {
        "taid": {"t": 0.7},
        "decoupled_kd": {"labels": labels},
        "curriculum_temperature": {"temperature": torch.tensor(3.0, dtype=torch.float64)},
    }.get(name, {})
    return getattr(objectives, name)(student, teacher, mask, **extra)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, LENGTH, VOCABULARY)
    student = 3 * torch.randn(shape, dtype=torch.float64, generator=generator)
    teacher = 3 * torch.randn(shape, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, VOCABULARY, shape[:2], generator=generator)
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 1, 1]])
    return student, teacher, mask, labels


@pytest.mark.parametrize("name", FORMULAS)
def test_value_is_the_papers(name, inputs):
    student, teacher, mask, labels = inputs
    expected = np.mean(
        [
            FORMULAS[name](student[b, i].numpy(), teacher[b, i].numpy(), int(labels[b, i]))
            for b, i in mask.nonzero().tolist()
        ]
    )
    assert float(call(name, student, teacher, mask, labels)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in FORMULAS if name not in ("taid", "adaptive_kl")])
def test_gradient_is_the_slope(name, inputs):
    """Against finite differences; taid and adaptive_kl hold parts constant and are checked below."""
    student, teacher, mask, labels = inputs
    assert torch.autograd.gradcheck(
        lambda logits: call(name, logits, teacher, mask, labels), student.requires_grad_()
    )


def test_gradient_of_taid_is_student_minus_target(inputs):
    student, teacher, mask, _ = inputs
    student.requires_grad_()
    objectives.taid(student, teacher, mask, t=0.7).backward()
    for b in range(BATCH):
        for i in range(LENGTH):
            s, t = student[b, i].detach().numpy(), teacher[b, i].numpy()
            expected = (softmax(s) - softmax(0.3 * s + 0.7 * t)) / 7 * float(mask[b, i])
            np.testing.assert_allclose(student.grad[b, i].numpy(), expected, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(
    ("loss_name", "divergence_of"),
    [
        ("forward_kl", lambda p, q: (p * (p / q).log()).sum(-1)),
        ("skew_forward_kl", lambda p, q: (p * (p / (0.1 * p + 0.9 * q)).log()).sum(-1)),
    ],
)
def test_cross_entropies_have_the_divergences_gradient(loss_name, divergence_of, inputs):
    student, teacher, mask, labels = inputs
    first, second = student.clone().requires_grad_(), student.clone().requires_grad_()
    call(loss_name, first, teacher, mask, labels).backward()
    per_token = divergence_of(teacher.softmax(-1), second.softmax(-1))
    (per_token * mask).sum().div(7).backward()
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", FORMULAS)
def test_no_token_gives_zero_and_zero_gradients(name, inputs):
    student, teacher, mask, labels = inputs
    student.requires_grad_()
    loss = call(name, student, teacher, torch.zeros_like(mask), labels)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("name", FORMULAS)
def test_what_is_masked_out_has_no_influence(name, inputs):
    student, teacher, mask, labels = inputs
    expected = call(name, student, teacher, mask, labels)
    spoiled = student.masked_fill((mask == 0).unsqueeze(-1), math.nan).requires_grad_()
    loss = call(
        name,
        spoiled,
        teacher.masked_fill((mask == 0).unsqueeze(-1), math.inf),
        mask,
        labels.masked_fill(mask == 0, -100),
    )
    loss.backward()
    assert torch.equal(loss.detach(), expected)
    assert torch.equal(spoiled.grad[mask == 0], torch.zeros_like(spoiled.grad[mask == 0]))


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("value", [-math.inf, math.inf])
def test_infinite_logits_are_taken_out(name, value, inputs):
    """The same as a vocabulary without that entry, with a zero gradient there."""
    student, teacher, mask, labels = inputs
    labels = labels % (VOCABULARY - 1)
    student.requires_grad_()
    blocked = torch.cat([teacher[..., :-1], torch.full_like(teacher[..., -1:], value)], dim=-1)
    loss = call(name, student, blocked, mask, labels)
    loss.backward()
    expected = call(name, student[..., :-1], teacher[..., :-1], mask, labels)
    if name == "cross_entropy":
        return  # has no teacher
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert torch.isfinite(student.grad).all()
    assert torch.equal(student.grad[..., -1], torch.zeros(BATCH, LENGTH, dtype=torch.float64))


@pytest.mark.parametrize("name", FORMULAS)
def test_precision(name, inputs):
    """Half precision is lifted to float32 first; extreme logits stay finite."""
    student, teacher, mask, labels = inputs
    low = call(name, student.bfloat16(), teacher.bfloat16(), mask, labels)
    lifted = call(name, student.bfloat16().float(), teacher.bfloat16().float(), mask, labels)
    assert torch.equal(low, lifted)
    extreme = (1e4 * student).float().requires_grad_()
    loss = call(name, extreme, (-1e4 * teacher).float(), mask, labels)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(extreme.grad).all()


def test_the_teacher_gets_no_gradient(inputs):
    student, teacher, mask, _ = inputs
    teacher.requires_grad_()
    assert not objectives.reverse_kl(student, teacher, mask).requires_grad


def test_taid_at_one_is_forward_kl_and_at_zero_teaches_nothing(inputs):
    student, teacher, mask, _ = inputs
    student.requires_grad_()
    assert torch.equal(
        objectives.taid(student, teacher, mask, 1.0), objectives.forward_kl(student, teacher, mask)
    )
    objectives.taid(student, teacher, mask, 0.0).backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-15)


def test_curriculum_reverses_the_temperatures_gradient(inputs):
    student, teacher, mask, _ = inputs

    def gradient(reversal: float) -> float:
        temperature = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        objectives.curriculum_temperature(student, teacher, mask, temperature, reversal).backward()
        return float(temperature.grad)

    def value(temperature: float) -> float:
        fixed = torch.tensor(temperature, dtype=torch.float64)
        return float(objectives.curriculum_temperature(student, teacher, mask, fixed))

    slope = (value(3 + 1e-5) - value(3 - 1e-5)) / 2e-5
    assert gradient(1.0) == pytest.approx(-slope, rel=1e-6)
    assert gradient(0.25) == pytest.approx(-slope / 4, rel=1e-6)
    assert [objectives.curriculum_reversal(step, 10) for step in (0, 5, 10, 20)] == pytest.approx(
        [0, 0.5, 1, 1]
    )


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(2, 40),
    scale=st.floats(0.01, 30),
    share=st.floats(0, 1),
)
def test_divergences_are_never_negative_and_vanish_between_equals(seed, size, scale, share):
    generator = torch.Generator().manual_seed(seed)
    student = scale * torch.randn(1, 4, size, dtype=torch.float64, generator=generator)
    teacher = scale * torch.randn(1, 4, size, dtype=torch.float64, generator=generator)
    mask = torch.ones(1, 4)
    for name, extra in (
        ("reverse_kl", {}),
        ("jensen_shannon", {"teacher_weight": share}),
        ("total_variation", {}),
        ("skew_reverse_kl", {"skew": share}),
        ("adaptive_kl", {"head_mass": share}),
    ):
        function = getattr(objectives, name)
        assert float(function(student, teacher, mask, **extra)) >= -1e-12, name
        assert abs(float(function(student, student, mask, **extra))) < 1e-12, name
    assert float(objectives.total_variation(student, teacher, mask)) <= 1 + 1e-12


@pytest.mark.parametrize(
    ("call_it", "message"),
    [
        (lambda s, t, m, y: objectives.taid(s, t, m, 1.5), "t is 1.5"),
        (lambda s, t, m, y: objectives.jensen_shannon(s, t, m, -0.1), "teacher_weight is -0.1"),
        (lambda s, t, m, y: objectives.forward_kl(s, t[..., :-1], m), "shared vocabulary"),
        (lambda s, t, m, y: objectives.forward_kl(s, t, m[:, :-1]), "mask's shape"),
        (lambda s, t, m, y: objectives.cross_entropy(s, m, y + 100), "outside the vocabulary"),
    ],
)
def test_bad_input_is_named(call_it, message, inputs):
    with pytest.raises(TaidError, match=message):
        call_it(*inputs)
