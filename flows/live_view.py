"""What a person watches while the line runs: every stage, what it is doing, how far, and how long still."""

import logging
import re
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.control import Control
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from pipeline.progress import Progress, readable_seconds

BAR_WIDTH, NARROW_BAR_WIDTH = 18, 8
NARROW = 100
"""Columns of a screen below which words get the room and not bars."""
FEW = 2
"""Rows of a screen that stages leave to the title and the line below; the foot takes some, too."""
GAP = "   "
"""Between pieces of the foot."""
LABEL = re.compile(r"(?P<name>[^:()]+?)(?: \([^()]*\))?: (?P<rest>.+)", re.DOTALL)
"""What a line begins with where nothing else says which stage it is of."""


@dataclass
class Row:
    """A stage as it is shown."""

    state: str = "waiting"  # then "running", then "done", "cached", "failed" or "stopped"
    line: str = ""
    started: float = 0.0
    ended: float = 0.0


class LiveView(logging.Handler):
    """Draws the records of the flow's logger as one table that changes in place.

    A record's ``stage`` is the stage it speaks of ("" for none); its ``state``, where it has one, the stage's
    new state. Its message may be a ``Progress``, whose numbers become a bar.
    """

    def __init__(self, console: Console, title: str, stages: list[str], foot: list[str]):
        """
        Args:
            console: where to draw; a terminal.
            title: what is run.
            stages: names of all stages, in order.
            foot: where results land, a piece each; a piece that fits no longer begins a new line.
        """
        super().__init__()
        self.console, self.title, self.foot = console, title, foot
        self.rows = {stage: Row() for stage in stages}
        self.started = time.monotonic()
        self.spinner = Spinner("dots", style="cyan")
        self.said: list[Text] = []
        self.width = console.width
        self.live = Live(get_renderable=self._drawn, console=console, refresh_per_second=8)

    def __enter__(self) -> Self:
        self.started = time.monotonic()
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._end_running("failed")
        self.live.stop()

    def interrupted(self) -> None:
        """Draws a last time what was running when the run was stopped from outside."""
        self._end_running("stopped")
        self.live.stop()

    def _end_running(self, state: str) -> None:
        for row in self.rows.values():
            if row.state == "running":
                row.state, row.ended = state, time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a record of the flow's logger up."""
        stage, state = getattr(record, "stage", ""), getattr(record, "state", None)
        if stage not in self.rows:
            self._keep(str(record.msg))
            return
        row = self.rows[stage]
        if state is not None:
            if state == "running":
                row.started = time.monotonic()
            elif row.state == "running":
                row.ended = time.monotonic()
            row.state, row.line = state, ""
        elif str(record.msg).startswith("warning") or "\n" in str(record.msg):
            # Too much for a row, and worth keeping on the screen.
            self._keep(str(record.msg))
        else:
            row.line = record.msg if isinstance(record.msg, Progress) else self._unlabelled(str(record.msg))

    def _keep(self, line: str) -> None:
        """Prints a line above the view."""
        self.said.append(Text(line, style="yellow" if line.startswith("warning") else ""))
        self.live.console.print(self.said[-1])

    def _drawn(self) -> Self:
        """What is drawn, on a clean screen when that has become narrower.

        A terminal breaks lines that fit no longer, and the next drawing would leave a part of them behind.
        """
        narrower, self.width = self.console.width < self.width, self.console.width
        if narrower and self.live.is_started:
            self.console.control(Control.home(), Control.clear())
            for line in self.said:
                self.console.print(line)
        return self

    def _unlabelled(self, line: str) -> str:
        """A line without the name of a stage, which stands before it already."""
        found = LABEL.fullmatch(line)
        words = {part for name in self.rows for part in (name, *name.split())}
        return found["rest"] if found and found["name"] in words else line

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        elapsed = readable_seconds(time.monotonic() - self.started)
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        head.add_column(justify="right")
        if all(row.state == "waiting" for row in self.rows.values()):
            elapsed = f"starting, {elapsed}"  # Prefect's server takes its time before the first stage begins
        head.add_row(Text(self.title, style="bold"), Text(elapsed, style="dim"))
        yield head
        table = Table.grid(expand=True, padding=(0, 1))
        table.add_column(width=1)
        table.add_column(no_wrap=True)
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        foot = self._foot(options.max_width)
        names, done, waiting = self._fitting(console.height - len(foot))
        if done:
            table.add_row(Text("✓", style="green"), Text(f"{done} stages"), Text("done", style="dim"))
        for name in names:
            table.add_row(*self._row(name, self.rows[name]))
        if waiting:
            table.add_row(Text("·", style="dim"), Text(f"{waiting} more", style="dim"), Text(""))
        yield table
        for line in foot:
            yield Text(line, style="dim", no_wrap=True, overflow="ellipsis")

    def _foot(self, width: int) -> list[str]:
        """The foot's pieces in as few lines as hold them."""
        lines: list[str] = []
        for piece in self.foot:
            if lines and len(lines[-1]) + len(GAP) + len(piece) <= width:
                lines[-1] += GAP + piece
            else:
                lines.append(piece)
        return lines

    def _fitting(self, height: int) -> tuple[list[str], int, int]:
        """Stages that have a row of their own, how many done ones and how many later ones are only counted.

        While it runs, all must fit on the screen; in the end it may be longer.
        """
        names, room = list(self.rows), height - FEW
        if not self.live.is_started or len(names) <= room:
            return names, 0, 0
        finished = [name for name, row in self.rows.items() if row.state in ("done", "cached")]
        hidden = set(finished[: len(names) - room + 1])
        room -= bool(hidden)
        left = [name for name in names if name not in hidden]
        waiting = [name for name in left if self.rows[name].state == "waiting"]
        later = set(waiting[-(len(left) - room + 1) :]) if len(left) > room else set()
        return [name for name in left if name not in later], len(hidden), len(later)

    def _row(self, name: str, row: Row) -> tuple[Text | Spinner, Text, Table | Text]:
        seconds = readable_seconds(row.ended - row.started)
        if row.state == "waiting":
            return Text("·", style="dim"), Text(name, style="dim"), Text("")
        if row.state == "cached":
            return Text("✓", style="green"), Text(name), Text("from the store", style="dim")
        if row.state == "done":
            return Text("✓", style="green"), Text(name), Text(seconds, style="dim")
        if row.state == "failed":
            return Text("✗", style="bold red"), Text(name, style="bold red"), Text(f"failed after {seconds}")
        if row.state == "stopped":
            return Text("■", style="yellow"), Text(name, style="yellow"), Text(f"stopped after {seconds}")
        return self.spinner, Text(name, style="bold"), self._doing(row)

    def _doing(self, row: Row) -> Table | Text:
        running = readable_seconds(time.monotonic() - row.started)
        if not isinstance(row.line, Progress):
            return Text(" · ".join(part for part in (row.line, running) if part))
        left = row.line.seconds_left
        told = [f"{row.line.done:,}/{row.line.total:,} {row.line.unit}"]
        told += [] if left is None else [f"{readable_seconds(left)} left"]
        told += [row.line.figures] if row.line.figures else []
        told += [running] if left is None else []
        width = BAR_WIDTH if self.console.width >= NARROW else NARROW_BAR_WIDTH
        doing = Table.grid(padding=(0, 1), expand=True)
        doing.add_column(width=width)
        doing.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        bar = ProgressBar(total=row.line.total, completed=row.line.done, width=width)
        doing.add_row(bar, Text(" · ".join(told)))
        return doing
