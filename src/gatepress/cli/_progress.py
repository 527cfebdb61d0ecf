"""How progress looks: a live bar on a terminal, sparse lines in a log. Both write to stderr only.

This module imports rich, so it is imported only once a command is really running.
"""

import time
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

LINES_PER_TASK = 10  # one line every 10 %: enough to see life in a log, too few to drown it
SECONDS_PER_LINE = 2.0  # at least, except before the last line: short work needs no progress lines


def figures_text(figures: dict[str, float | str]) -> str:
    """Return the live figures as one phrase, e.g. `loss 0.413, gates closed 120`."""
    shown = {name.replace("_", " "): value for name, value in figures.items()}
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
    )


def rate_text(units_per_second: float | None) -> str:
    """Return a speed that is readable from hours per step to thousands per second."""
    if not units_per_second:
        return ""
    if units_per_second < 1:
        return f"{1 / units_per_second:.1f} s each"
    return f"{units_per_second:,.1f}/s"


def clock_text(seconds: float) -> str:
    """Return seconds as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class SpeedColumn(ProgressColumn):
    """Units done per second, over the last half minute."""

    def render(self, task: Task) -> Text:
        """Return the speed of `task`, over all of it once it is done."""
        return Text(rate_text(task.finished_speed or task.speed), style="progress.data.speed")


class BarProgress:
    """Draw nested pieces of work as live bars; each stays on the screen when it is done."""

    def __init__(self, stream: TextIO) -> None:
        """Draw on `stream`, which must be a terminal."""
        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            SpeedColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}", style="cyan", markup=False),
            console=Console(file=stream),
        )
        self._open: list[TaskID] = []

    def start(self, total: int, description: str) -> None:
        """Add a bar of `total` units."""
        if not self._open:
            self._bars.start()
        self._open.append(self._bars.add_task(description, total=total, figures=""))

    def advance(self, steps: int = 1, **figures: float | str) -> None:
        """Move the innermost bar and update its figures."""
        if not self._open:
            return
        if figures:
            self._bars.update(self._open[-1], advance=steps, figures=figures_text(figures))
        else:
            self._bars.update(self._open[-1], advance=steps)

    def finish(self) -> None:
        """End the innermost bar; the last one releases the terminal."""
        if not self._open:
            return
        self._bars.stop_task(self._open.pop())
        if not self._open:
            self.close()

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Release the terminal, even in the middle of work: an error line must not meet a live bar."""
        self._open.clear()
        self._bars.stop()
        for task in self._bars.task_ids:
            self._bars.remove_task(task)


class LineProgress:
    """Print a plain line at the start and at each tenth of the work, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        """Print to `stream`."""
        self._stream = stream
        self._open: list[_Lines] = []

    def start(self, total: int, description: str) -> None:
        """Announce a piece of work of `total` units."""
        self._open.append(_Lines(total, description))
        self.say(f"{description}: {total:,} to do")

    def advance(self, steps: int = 1, **figures: float | str) -> None:
        """Print a line when another tenth of the innermost work is done, and some time has passed."""
        if self._open and (line := self._open[-1].advance(steps, figures)):
            self.say(line)

    def finish(self) -> None:
        """Forget the innermost piece of work; its last line was printed when it was done."""
        if self._open:
            self._open.pop()

    def say(self, line: str) -> None:
        """Print a line between the others."""
        print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Forget everything."""
        self._open.clear()


class _Lines:
    """One piece of work of `LineProgress`."""

    def __init__(self, total: int, description: str) -> None:
        self.total = max(total, 1)
        self.description = description
        self.done = 0
        self.shown = 0  # tenths of the work that have had their line
        self.figures: dict[str, float | str] = {}
        self.begun = self.last = time.monotonic()

    def advance(self, steps: int, figures: dict[str, float | str]) -> str | None:
        self.done += steps
        self.figures |= figures
        tenths = min(LINES_PER_TASK, self.done * LINES_PER_TASK // self.total)
        now = time.monotonic()
        early = now - self.last < SECONDS_PER_LINE and tenths < LINES_PER_TASK
        if tenths <= self.shown or early:
            return None
        self.shown, self.last = tenths, now
        spent = max(now - self.begun, 1e-9)
        parts = [f"{self.done:,}/{self.total:,}", rate_text(self.done / spent)]
        if self.done < self.total:
            parts.append(f"{clock_text(spent * (self.total - self.done) / self.done)} left")
        parts.append(figures_text(self.figures))
        return f"{self.description}: {min(100, self.done * 100 // self.total)} % ({', '.join(p for p in parts if p)})"
