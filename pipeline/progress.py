"""How far a stage is."""

from typing import Self


class Progress(str):
    """A line of text that also carries its numbers, for those who draw bars; for all others it is the line.

    Attributes:
        done, total, unit: how much of how much is done, and of what.
        figures: what else there is to show beside the bar: loss, rate, ...
        seconds_left: estimate; None when there is none yet.
    """

    done: int
    total: int
    unit: str
    figures: str
    seconds_left: float | None

    def __new__(
        cls, what: str, done: int, total: int, unit: str, figures: str = "", seconds_left: float | None = None
    ) -> Self:
        """
        Args:
            what: what is going on, such as "hidden states: train".
            done, total: in ``unit``.
            unit: of done and total, plural.
            figures: as in the attributes.
            seconds_left: as in the attributes.
        """
        parts = [f"{what}: {done:,} of {total:,} {unit}"]
        parts += [figures] if figures else []
        parts += [f"{readable_seconds(seconds_left)} left"] if seconds_left is not None else []
        line = super().__new__(cls, ", ".join(parts))
        line.done, line.total, line.unit = done, total, unit
        line.figures, line.seconds_left = figures, seconds_left
        return line


def readable_seconds(seconds: float) -> str:
    """Seconds as people say them: 41 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
