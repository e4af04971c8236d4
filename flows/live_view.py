"""What a person watches while the line runs: every stage, what it is doing, how far, and how long still."""

import logging
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from pipeline.progress import Progress, readable_seconds

BAR_WIDTH = 18
FEW = 3
"""Rows of a screen that stages leave to the title, the foot and the line below."""


@dataclass
class Row:
    """A stage as it is shown."""

    state: str = "waiting"  # then "running", then "done", "cached" or "failed"
    line: str = ""
    started: float = 0.0
    ended: float = 0.0


class LiveView(logging.Handler):
    """Draws the records of the flow's logger as one table that changes in place.

    A record's ``stage`` is the stage it speaks of ("" for none); its ``state``, where it has one, the stage's
    new state. Its message may be a ``Progress``, whose numbers become a bar.
    """

    def __init__(self, console: Console, title: str, stages: list[str], foot: str):
        """
        Args:
            console: where to draw; a terminal.
            title: what is run.
            stages: names of all stages, in order.
            foot: where results land.
        """
        super().__init__()
        self.console, self.title, self.foot = console, title, foot
        self.rows = {stage: Row() for stage in stages}
        self.started = time.monotonic()
        self.spinner = Spinner("dots", style="cyan")
        self.live = Live(get_renderable=lambda: self, console=console, refresh_per_second=8)

    def __enter__(self) -> Self:
        self.started = time.monotonic()
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for row in self.rows.values():
                if row.state == "running":
                    row.state, row.ended = "failed", time.monotonic()
        self.live.stop()

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a record of the flow's logger up."""
        stage, state = getattr(record, "stage", ""), getattr(record, "state", None)
        if stage not in self.rows:
            self.live.console.print(Text(str(record.msg)))
            return
        row = self.rows[stage]
        if state is not None:
            row.state, row.line = state, ""
            if state == "running":
                row.started = time.monotonic()
            else:
                row.ended = time.monotonic()
        elif str(record.msg).startswith(("warning", "waiting")) or "\n" in str(record.msg):
            # Too much for a row, and worth keeping on the screen.
            self.live.console.print(Text(str(record.msg)))
        else:
            row.line = record.msg

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        elapsed = readable_seconds(time.monotonic() - self.started)
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        head.add_column(justify="right")
        head.add_row(Text(self.title, style="bold"), Text(elapsed, style="dim"))
        yield head
        table = Table.grid(expand=True, padding=(0, 1))
        table.add_column(width=1)
        table.add_column(no_wrap=True)
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        finished = [name for name, row in self.rows.items() if row.state in ("done", "cached")]
        # While it runs all must fit on the screen: what is long done is only counted.
        hidden = set(finished[: max(0, len(self.rows) + FEW + 1 - console.height)])
        if hidden and self.live.is_started:
            table.add_row(Text("✓", style="green"), Text(f"{len(hidden)} stages"), Text("done", style="dim"))
        for name, row in self.rows.items():
            if name not in hidden or not self.live.is_started:
                table.add_row(*self._row(name, row))
        yield table
        yield Text(self.foot, style="dim", no_wrap=True, overflow="ellipsis")

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
        return self.spinner, Text(name, style="bold"), self._doing(row)

    def _doing(self, row: Row) -> Table | Text:
        running = readable_seconds(time.monotonic() - row.started)
        if not isinstance(row.line, Progress):
            return Text(" · ".join(part for part in (row.line, running) if part))
        told = [f"{row.line.done:,}/{row.line.total:,}"]
        told += [row.line.figures] if row.line.figures else []
        left = row.line.seconds_left
        told.append(running if left is None else f"{readable_seconds(left)} left")
        doing = Table.grid(padding=(0, 1), expand=True)
        doing.add_column(width=BAR_WIDTH)
        doing.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        bar = ProgressBar(total=row.line.total, completed=row.line.done, width=BAR_WIDTH)
        doing.add_row(bar, Text(" · ".join(told)))
        return doing
