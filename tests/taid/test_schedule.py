"""The interpolation against a trajectory computed by hand from the paper's update."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taid import AdaptiveInterpolation, TaidError


def test_hand_computed_trajectory():
    """beta 0.5, alpha 0.2, t from 0.4 to 1, losses 4, 3, 3.3, 1.1 over 10 steps."""
    interpolation = AdaptiveInterpolation(t_start=0.4, t_end=1.0, alpha=0.2, beta=0.5)
    assert interpolation.t == 0.4
    # The first update only stores the loss, although the floor is at 0.46 already.
    assert interpolation.update(4.0, 1, 10) == 0.4
    # delta 0.25, momentum 0.125, sigmoid 0.53120937: 0.4 + 0.2 * 0.53120937 * 0.6 = 0.46374512 < 0.52
    assert interpolation.update(3.0, 2, 10) == pytest.approx(0.52, abs=1e-12)
    assert interpolation.momentum == pytest.approx(0.125, abs=1e-12)
    # delta -0.1, momentum 0.0125, sigmoid 0.50312496: 0.52 + 0.2 * 0.50312496 * 0.48 = 0.5683 < 0.58
    assert interpolation.update(3.3, 3, 10) == pytest.approx(0.58, abs=1e-12)
    assert interpolation.momentum == pytest.approx(0.0125, abs=1e-12)
    # delta 0.66667, momentum 0.33958, sigmoid 0.58408909: 0.58 + 0.2 * 0.58408909 * 0.42 = 0.62906 < 0.64
    assert interpolation.update(1.1, 4, 10) == pytest.approx(0.64, abs=1e-12)
    # With the floor far below, the adaptive part decides: step 5 of 1000 has floor 0.403.
    # delta 0, momentum 0.169792, sigmoid 0.54234628: 0.64 + 0.2 * 0.54234628 * 0.36 = 0.67904893
    assert interpolation.update(1.1, 5, 1000) == pytest.approx(0.67904893, abs=1e-7)


def test_published_defaults_follow_the_floor_in_short_runs():
    interpolation = AdaptiveInterpolation()
    assert (interpolation.t_start, interpolation.t_end) == (0.4, 1.0)
    assert (interpolation.alpha, interpolation.beta) == (5e-4, 0.99)
    values = [interpolation.update(4.0 - 0.01 * step, step, 100) for step in range(1, 101)]
    assert values[1:] == pytest.approx([0.4 + 0.6 * step / 100 for step in range(2, 101)], abs=1e-9)
    assert values[-1] == 1.0


def test_without_adaptation_t_is_linear():
    interpolation = AdaptiveInterpolation(t_start=0.2, t_end=0.8, alpha=10.0, adaptive=False)
    values = [interpolation.update(5.0 / step, step, 4) for step in range(1, 5)]
    assert values == pytest.approx([0.2, 0.5, 0.65, 0.8])


@given(
    losses=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40),
    t_start=st.floats(0, 1),
    span=st.floats(0, 1),
    alpha=st.floats(0, 2),
    beta=st.floats(0, 0.999),
)
def test_t_rises_within_its_bounds(losses, t_start, span, alpha, beta):
    t_end = min(1.0, t_start + span)
    interpolation = AdaptiveInterpolation(t_start, t_end, alpha, beta)
    before = interpolation.t
    for step, loss in enumerate(losses, start=1):
        after = interpolation.update(loss, step, len(losses))
        assert before <= after + 1e-12
        assert t_start <= after <= t_end
        before = after
    if len(losses) > 1:
        assert interpolation.t == pytest.approx(t_end)


@given(losses=st.lists(st.floats(0.1, 10), min_size=2, max_size=20), cut=st.integers(0, 19))
def test_state_goes_on_exactly_through_json(losses, cut):
    cut = min(cut, len(losses))
    whole = AdaptiveInterpolation(alpha=0.1)
    first = AdaptiveInterpolation(alpha=0.1)
    second = AdaptiveInterpolation(alpha=0.1)
    for step, loss in enumerate(losses, start=1):
        whole.update(loss, step, 1000)
    for step, loss in enumerate(losses[:cut], start=1):
        first.update(loss, step, 1000)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step, loss in enumerate(losses[cut:], start=cut + 1):
        second.update(loss, step, 1000)
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"t_start": 0.9, "t_end": 0.5}, "t_start 0.9 is above t_end 0.5"),
        ({"t_start": -0.1}, "t_start is -0.1"),
        ({"t_end": 1.1}, "t_end is 1.1"),
        ({"alpha": -1}, "alpha is -1"),
        ({"alpha": math.inf}, "alpha is inf"),
        ({"beta": 1.0}, "beta is 1.0"),
        ({"t_start": math.nan}, "t_start is nan"),
        ({"signal": "kl"}, "signal is 'kl'"),
        ({"signal": "divergence", "t_start": 0.0}, "t_start is 0"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(TaidError, match=message):
        AdaptiveInterpolation(**settings)


def test_bad_updates_and_states():
    interpolation = AdaptiveInterpolation()
    with pytest.raises(TaidError, match="loss of step 7 is nan"):
        interpolation.update(math.nan, 7, 10)
    with pytest.raises(TaidError, match="total_steps"):
        interpolation.update(1.0, 1, 0)
    state = interpolation.state_dict()
    del state["momentum"]
    with pytest.raises(TaidError, match="lacks momentum"):
        interpolation.load_state_dict(state)
    with pytest.raises(TaidError, match="made with beta"):
        interpolation.load_state_dict(AdaptiveInterpolation(beta=0.5).state_dict())
