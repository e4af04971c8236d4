"""How far the TAID target moves from student to teacher (Shing et al. 2025, algorithm 1)."""

import math
from dataclasses import dataclass, field
from typing import Any

from taid.errors import TaidError

SETTINGS = ("t_start", "t_end", "alpha", "beta", "adaptive", "signal")
SIGNALS = ("loss", "divergence")
"""What may move t: the cross-entropy against p_t (the published code's loss), or KL(p_t‖q), which is that
less the entropy of p_t (the paper's objective)."""


@dataclass
class AdaptiveInterpolation:
    """The interpolation parameter t, moved once per optimizer step.

    With loss_n the mean of step n of the loss, or of the divergence where ``signal`` says so::

        delta = (loss_{n-1} - loss_n) / (loss_{n-1} + 1e-15)
        momentum = beta * momentum + (1 - beta) * delta
        floor = t_start + (t_end - t_start) * n / total
        t = min(t_end, max(floor, t + alpha * sigmoid(momentum) * (1 - t)))

    The first update only stores the loss. With the paper's defaults the floor decides nearly every step of
    runs shorter than some 4,000 steps: adaptive then means linear unless ``alpha`` grows.

    Attributes:
        t_start: t of the first step, between 0 and ``t_end``.
        t_end: the largest t, at most 1.
        alpha: step size of the adaptive part, not negative.
        beta: decay of the momentum, at least 0 and below 1.
        adaptive: False moves t on the linear floor alone.
        signal: one of ``SIGNALS``: whose relative change moves t. The entropy of p_t makes up most of the
            loss, so the divergence changes by more of itself.
        t: the present value.

    Raises:
        TaidError: a setting is impossible.
    """

    t_start: float = 0.4
    t_end: float = 1.0
    alpha: float = 5e-4
    beta: float = 0.99
    adaptive: bool = True
    signal: str = "loss"
    t: float = field(init=False)
    momentum: float = field(init=False, default=0.0)
    previous_loss: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if not 0 <= self.t_start <= 1:
            raise TaidError(f"t_start is {self.t_start}; it must lie between 0 and 1.")
        if not 0 <= self.t_end <= 1:
            raise TaidError(f"t_end is {self.t_end}; it must lie between 0 and 1.")
        if self.t_start > self.t_end:
            raise TaidError(
                f"t_start {self.t_start} is above t_end {self.t_end}; t rises from t_start to t_end."
            )
        if not (self.alpha >= 0 and math.isfinite(self.alpha)):
            raise TaidError(f"alpha is {self.alpha}; it must be a number that is not negative.")
        if not 0 <= self.beta < 1:
            raise TaidError(f"beta is {self.beta}; it must be at least 0 and below 1.")
        if self.signal not in SIGNALS:
            raise TaidError(f"signal is {self.signal!r}; choose {' or '.join(SIGNALS)}.")
        if self.signal == "divergence" and self.t_start == 0:
            raise TaidError(
                "t_start is 0, where the target is the student itself and the divergence zero, so it has no "
                "relative change; start above 0 or choose the signal loss."
            )
        self.t = self.t_start

    def update(self, loss: float, step: int, total_steps: int) -> float:
        """Takes the mean loss (or divergence) of an optimizer step in and moves t.

        Args:
            loss: mean over the tokens of all micro-batches and ranks, in nats.
            step: optimizer steps taken, this one included, so from 1 to ``total_steps``.
            total_steps: optimizer steps of the whole run.

        Returns:
            The new t, for the next step.

        Raises:
            TaidError: the loss is no finite number, or ``total_steps`` is not positive.
        """
        if not math.isfinite(loss):
            raise TaidError(f"The loss of step {step} is {loss}; lower the learning rate or clip gradients.")
        if total_steps < 1:
            raise TaidError(f"total_steps is {total_steps}; a run has at least one step.")
        if self.previous_loss is None:
            self.previous_loss = loss
            return self.t
        delta = (self.previous_loss - loss) / (self.previous_loss + 1e-15)
        self.momentum = self.beta * self.momentum + (1 - self.beta) * delta
        self.previous_loss = loss
        floor = self.t_start + (self.t_end - self.t_start) * step / total_steps
        proposed = self.t + self.alpha * _sigmoid(self.momentum) * (1 - self.t) if self.adaptive else floor
        self.t = min(self.t_end, max(floor, proposed))
        return self.t

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as JSON values."""
        return {
            **{name: getattr(self, name) for name in SETTINGS},
            "t": self.t,
            "momentum": self.momentum,
            "previous_loss": self.previous_loss,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state that ``state_dict`` gave.

        Raises:
            TaidError: the state is incomplete or belongs to other settings.
        """
        missing = set(self.state_dict()) - set(state)
        if missing:
            raise TaidError(f"The stored interpolation lacks {', '.join(sorted(missing))}.")
        for name in SETTINGS:
            if state[name] != getattr(self, name):
                raise TaidError(
                    f"The stored interpolation was made with {name} {state[name]}, this run has "
                    f"{getattr(self, name)}; resume with the same settings or start anew."
                )
        self.t = float(state["t"])
        self.momentum = float(state["momentum"])
        self.previous_loss = None if state["previous_loss"] is None else float(state["previous_loss"])


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
