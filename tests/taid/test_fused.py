"""The fused objectives equal the reference in value and in every gradient, in float64."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from taid import HeadOptions, TaidError, fused, objectives

NAMES = (
    "taid",
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "total_variation",
    "skew_forward_kl",
    "skew_reverse_kl",
    "adaptive_kl",
    "decoupled_kd",
    "cross_entropy",
)


def finish(products, options: HeadOptions):
    """Written apart from HeadOptions.apply_, and differentiable."""
    logits = products if options.bias is None else products + options.bias
    logits = logits * options.logit_scale
    return logits if options.softcap is None else options.softcap * torch.tanh(logits / options.softcap)


def problem(seed, count, vocabulary, student_width, teacher_width, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    return {
        "hidden": random(count, student_width),
        "weight": random(vocabulary, student_width),
        "bias": random(vocabulary),
        "teacher_hidden": random(count, teacher_width),
        "teacher_weight": random(vocabulary, teacher_width),
        "teacher_bias": random(vocabulary),
        "labels": torch.randint(0, vocabulary, (count,), generator=generator),
        "mask": torch.rand(count, generator=generator) < 0.7,
    }


def both(name, parts, extra, bias, scale, softcap, chunk_size, temperature=1.0):
    """Loss and gradients by (fused, reference)."""
    results = []
    extra = {**extra, "labels": parts["labels"]} if name in ("decoupled_kd", "cross_entropy") else dict(extra)
    compiled = extra.pop("compiled", False)
    for is_fused in (True, False):
        hidden, weight = (parts[key].clone().requires_grad_() for key in ("hidden", "weight"))
        student_bias = parts["bias"].clone().requires_grad_() if bias else None
        student = HeadOptions(student_bias, scale, softcap)
        teacher = HeadOptions(parts["teacher_bias"] if bias else None, 0.8, softcap)
        if is_fused:
            models = [hidden, weight]
            options = {"mask": parts["mask"], "student_head": student, "chunk_size": chunk_size, **extra}
            options["compiled"] = compiled
            if name != "cross_entropy":
                models += [parts["teacher_hidden"], parts["teacher_weight"]]
                options |= {"teacher_head": teacher, "temperature": temperature}
            loss = getattr(fused, f"fused_{name}")(*models, **options)
        else:
            logits = [finish(hidden @ weight.T, student)]
            if name != "cross_entropy":
                logits.append(finish(parts["teacher_hidden"] @ parts["teacher_weight"].T, teacher))
            softened = [each / temperature for each in logits]
            loss = temperature**2 * getattr(objectives, name)(*softened, parts["mask"], **extra)
        (2.5 * loss).backward()
        gradients = [hidden.grad, weight.grad] + ([student_bias.grad] if student_bias is not None else [])
        results.append([loss.detach(), *gradients])
    return results


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    seed=st.integers(0, 2**31),
    count=st.integers(1, 20),
    vocabulary=st.integers(2, 50),
    widths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.3]),
    softcap=st.sampled_from([None, 4.0]),
    chunk_size=st.integers(1, 25),
    share=st.floats(0, 1),
    temperature=st.sampled_from([1.0, 0.5, 3.0]),
)
@example("skew_forward_kl", 0, 3, 5, (2, 2), False, 1.0, None, 2, 1.0, 1.0)
def test_equal_to_the_reference(
    name, seed, count, vocabulary, widths, bias, scale, softcap, chunk_size, share, temperature
):
    extra = {
        "taid": {"t": share},
        "jensen_shannon": {"teacher_weight": share},
        "skew_forward_kl": {"skew": share},
        "skew_reverse_kl": {"skew": share},
        "adaptive_kl": {"head_mass": share},
        "decoupled_kd": {"alpha": share, "beta": 1 - share},
    }.get(name, {})
    if name == "cross_entropy":
        temperature = 1.0
    parts = problem(seed, count, vocabulary, *widths)
    results = both(name, parts, extra, bias, scale, softcap, chunk_size, temperature)
    for ours, reference in zip(*results, strict=True):
        largest = max(float(reference.abs().max()), 1e-3)
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10 * largest)


@pytest.mark.parametrize(
    "name",
    [
        "taid",
        *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:]),
    ],
)
def test_compiled_equals_the_reference(name):
    torch.compiler.reset()
    graphs = []
    for seed, t in enumerate((0.25, 0.5, 1.0)):
        parts = problem(seed, 12, 37, 4, 5)
        parts["mask"].fill_(True)
        extra = {"taid": {"t": t}}.get(name, {})
        compiled, reference = both(name, parts, {**extra, "compiled": True}, True, 1.0, None, 12)
        for one, other in zip(compiled, reference, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10 * float(other.abs().max()))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[-1] == graphs[0], "another t compiles nothing again"


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.5, 20),
    reversal=st.floats(0, 1),
    chunk_size=st.integers(1, 12),
    masked=st.booleans(),
)
def test_curriculum_temperature_equals_the_reference(seed, temperature, reversal, chunk_size, masked):
    parts = problem(seed, 9, 21, 4, 5)
    mask = parts["mask"] if masked else torch.ones(9, dtype=torch.bool)
    results = []
    for is_fused in (True, False):
        hidden, weight = (parts[name].clone().requires_grad_() for name in ("hidden", "weight"))
        degree = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
        if is_fused:
            loss = fused.fused_curriculum_temperature(
                hidden,
                weight,
                parts["teacher_hidden"],
                parts["teacher_weight"],
                degree,
                reversal,
                mask=mask if masked else None,
                chunk_size=chunk_size,
            )
        else:
            teacher = parts["teacher_hidden"] @ parts["teacher_weight"].T
            loss = objectives.curriculum_temperature(hidden @ weight.T, teacher, mask, degree, reversal)
        (2.5 * loss).backward()
        results.append([loss.detach(), hidden.grad, weight.grad, degree.grad])
    for ours, reference in zip(*results, strict=True):
        largest = max(float(reference.abs().max()), 1e-3)
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10 * largest)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_entropy_of_the_target_makes_the_loss_a_divergence(temperature):
    parts = problem(5, 9, 21, 4, 5)
    entropy = torch.zeros((), dtype=torch.float64)
    arguments = [parts[name] for name in ("hidden", "weight", "teacher_hidden", "teacher_weight")]
    options = {"mask": parts["mask"], "temperature": temperature, "chunk_size": 4}
    plain = fused.fused_taid(*arguments, 0.3, **options)
    loss = fused.fused_taid(*arguments, 0.3, target_entropy=entropy, **options)
    student = (arguments[0] @ arguments[1].T)[parts["mask"]] / temperature
    teacher = (arguments[2] @ arguments[3].T)[parts["mask"]] / temperature
    target = (0.7 * student + 0.3 * teacher).log_softmax(-1)
    divergence = temperature**2 * (target.exp() * (target - student.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss - entropy / parts["mask"].sum(), divergence, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_no_token_gives_zero(name):
    parts = problem(0, 5, 11, 3, 4)
    parts["mask"] = torch.zeros(5, dtype=torch.bool)
    extra = {"t": 0.5} if name == "taid" else {}
    ours, _ = both(name, parts, extra, True, 1.0, None, 2)
    assert all(torch.equal(value, torch.zeros_like(value)) for value in ours)


def test_batches_keep_their_shape_and_frozen_heads_get_no_gradient():
    parts = problem(1, 12, 11, 3, 4)
    hidden = parts["hidden"].reshape(3, 4, 3).requires_grad_()
    loss = fused.fused_taid(
        hidden,
        parts["weight"],
        parts["teacher_hidden"].reshape(3, 4, 4),
        parts["teacher_weight"].requires_grad_(),
        0.5,
        mask=parts["mask"].reshape(3, 4),
    )
    loss.backward()
    assert hidden.grad.shape == hidden.shape
    assert parts["weight"].grad is None
    assert parts["teacher_weight"].grad is None
    assert torch.equal(hidden.grad.flatten(0, 1)[~parts["mask"]], torch.zeros(int((~parts["mask"]).sum()), 3))
    with torch.no_grad():
        assert torch.equal(
            fused.fused_taid(
                hidden,
                parts["weight"],
                parts["teacher_hidden"].reshape(3, 4, 4),
                parts["teacher_weight"],
                0.5,
                mask=parts["mask"].reshape(3, 4),
            ),
            loss,
        )


def test_only_masked_in_tokens_are_projected():
    """What is masked out may be NaN: it is never read."""
    parts = problem(2, 8, 11, 3, 4)
    parts["hidden"][~parts["mask"]] = torch.nan
    parts["teacher_hidden"][~parts["mask"]] = torch.nan
    loss = fused.fused_forward_kl(
        parts["hidden"].requires_grad_(),
        parts["weight"],
        parts["teacher_hidden"],
        parts["teacher_weight"],
        mask=parts["mask"],
    )
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(parts["hidden"].grad).all()


def test_bfloat16_keeps_its_type_and_softmax_runs_in_float32():
    parts = problem(3, 64, 200, 16, 16)
    hidden = parts["hidden"].bfloat16().requires_grad_()
    weight = parts["weight"].bfloat16().requires_grad_()
    arguments = (parts["teacher_hidden"].bfloat16(), parts["teacher_weight"].bfloat16(), 0.5)
    loss = fused.fused_taid(hidden, weight, *arguments, chunk_size=7)
    loss.backward()
    assert loss.dtype == torch.float32
    assert weight.grad.dtype == torch.bfloat16
    exact = weight.detach().double().requires_grad_()
    fused.fused_taid(
        hidden.detach().double(), exact, *(value.double() for value in arguments[:2]), 0.5
    ).backward()
    error = (weight.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert float(error) < 0.02


def test_autocast_projects_in_half_precision():
    parts = problem(4, 16, 50, 8, 8, torch.float32)
    weight = parts["weight"].requires_grad_()
    arguments = (parts["hidden"], weight, parts["teacher_hidden"], parts["teacher_weight"], 0.5)
    plain = fused.fused_taid(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = fused.fused_taid(*arguments)
    low.backward()
    assert weight.grad.dtype == torch.float32
    assert low.item() != plain.item()
    assert low.item() == pytest.approx(plain.item(), rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": torch.ones(3)}, "mask has shape"),
        ({"teacher_hidden": torch.zeros(4, 4)}, "positions"),
        ({"teacher_head_weight": torch.zeros(9, 4)}, "shared vocabulary"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"t": 2.0}, "t is 2.0"),
    ],
)
def test_bad_input_is_named(changes, message):
    arguments = {
        "student_hidden": torch.zeros(5, 3),
        "student_head_weight": torch.zeros(11, 3),
        "teacher_hidden": torch.zeros(5, 4),
        "teacher_head_weight": torch.zeros(11, 4),
        "t": 0.5,
    }
    with pytest.raises(TaidError, match=message):
        fused.fused_taid(**{**arguments, **changes})
    with pytest.raises(TaidError, match="outside the vocabulary"):
        fused.fused_cross_entropy(torch.zeros(5, 3), torch.zeros(11, 3), torch.full((5,), 11))


def test_a_second_backward_says_so():
    parts = problem(3, 4, 7, 3, 4)
    hidden = parts["hidden"].requires_grad_()
    loss = fused.fused_forward_kl(
        hidden, parts["weight"], parts["teacher_hidden"], parts["teacher_weight"], mask=parts["mask"]
    )
    loss.backward(retain_graph=True)
    with pytest.raises(TaidError, match="once"):
        loss.backward()


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    seed=st.integers(0, 2**31),
    vocabulary=st.integers(4, 30),
    softcap=st.sampled_from([None, 4.0]),
    student_sign=st.sampled_from([-1, 1]),
    teacher_sign=st.sampled_from([-1, 1]),
)
def test_infinite_logits(name, seed, vocabulary, softcap, student_sign, teacher_sign):
    """A bias of infinity, as for forbidden tokens, in either model: as the reference, and never NaN."""
    parts = problem(seed, 9, vocabulary, 3, 4)
    parts["bias"][1] = student_sign * torch.inf
    parts["teacher_bias"][2] = teacher_sign * torch.inf
    parts["labels"].clamp_(min=3)
    parts["mask"][0] = True
    extra = {"t": 0.3} if name == "taid" else {}
    for ours, reference in zip(*both(name, parts, extra, True, 0.7, softcap, 4), strict=True):
        assert torch.isfinite(ours).all()
        largest = max(float(reference.abs().max()), 1e-3)
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10 * largest)


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(NAMES), seed=st.integers(0, 2**31), padding=st.tuples(*[st.integers(0, 5)] * 2))
def test_padded_vocabulary_and_tied_head(name, seed, padding):
    """Heads with rows of their own, trimmed to the shared ones; the student's head is its embedding."""
    vocabulary = 12
    parts = problem(seed, 10, vocabulary, 3, 4)
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(vocabulary + padding[0], 3, dtype=torch.float64, generator=generator)
    teacher_weight = torch.randn(vocabulary + padding[1], 4, dtype=torch.float64, generator=generator)
    extra = {"t": 0.6} if name == "taid" else {}
    if name in ("decoupled_kd", "cross_entropy"):
        extra["labels"] = parts["labels"]
    results = []
    for is_fused in (True, False):
        tied = embedding.clone().requires_grad_()
        hidden, head = torch.tanh(tied[parts["labels"]]), tied[:vocabulary]
        if is_fused:
            models = [hidden, head]
            if name != "cross_entropy":
                models += [parts["teacher_hidden"], teacher_weight[:vocabulary]]
            loss = getattr(fused, f"fused_{name}")(*models, mask=parts["mask"], chunk_size=4, **extra)
        else:
            logits = [hidden @ head.T]
            if name != "cross_entropy":
                logits.append(parts["teacher_hidden"] @ teacher_weight[:vocabulary].T)
            loss = getattr(objectives, name)(*logits, parts["mask"], **extra)
        results.append([loss.detach(), *torch.autograd.grad(loss, tied)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)
