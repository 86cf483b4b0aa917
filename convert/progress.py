"""Progress over layers: a live bar on a terminal, one line a layer in a log, both with the time left."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from torq_jax.duration import format_seconds

# Steps the estimate looks back on. The first layer compiles and the next ones do not, so that a mean over
# everything would promise too long a wait for most of the run.
_WINDOW = 4


class LayerProgress:
    """What :func:`progress` hands out: counts steps, estimates the time left and tells a display."""

    def __init__(
        self,
        total: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[LayerProgress], None] | None = None,
        on_message: Callable[[str], None] | None = None,
    ):
        """``on_change(self)`` follows every stage and step, ``on_message(text)`` every message."""
        self.total = total
        self.done = 0
        self.current_stage = ""
        self._clock = clock
        self._start = clock()
        self._ends = collections.deque([self._start], maxlen=_WINDOW + 1)  # times at which steps ended
        self._on_change = on_change
        self._on_message = on_message

    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    def remaining(self) -> float | None:
        """Estimated seconds left, from the pace of the last few steps; None before the first step ends."""
        steps = len(self._ends) - 1
        if not steps:
            return None
        pace = (self._ends[-1] - self._ends[0]) / steps
        under_way = self._clock() - self._ends[-1]
        return max(pace * (self.total - self.done) - under_way, 0.0)

    def stage(self, text: str) -> None:
        """Say what is being done now, e.g. ``"statistics"``. Logs do not show it."""
        self.current_stage = text
        if self._on_change:
            self._on_change(self)

    def advance(self, steps: int = 1) -> None:
        """Count finished layers, never beyond the total; several at once count as equally long."""
        before, now = self._ends[-1], self._clock()
        self._ends.extend(before + (now - before) * (i + 1) / steps for i in range(steps))
        self.done = min(self.done + steps, self.total)
        if self._on_change:
            self._on_change(self)

    def message(self, text: str) -> None:
        """Print a line that stays, above the bar where there is one. Not shown when quiet."""
        if self._on_message:
            self._on_message(text)


class _TimeColumn(ProgressColumn):
    """Elapsed and remaining time, by the same estimate as the plain lines."""

    def __init__(self, state: LayerProgress):
        super().__init__(table_column=Column(no_wrap=True))
        self._state = state

    def render(self, task: Task) -> Text:
        return Text(_times(self._state), style="dim")


class _StageColumn(ProgressColumn):
    """The current stage; the only column that gives way on a narrow terminal."""

    def __init__(self, state: LayerProgress):
        super().__init__(table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
        self._state = state

    def render(self, task: Task) -> Text:
        return Text(self._state.current_stage, overflow="ellipsis", no_wrap=True)


class _CountColumn(ProgressColumn):
    def __init__(self, state: LayerProgress, description: str):
        super().__init__(table_column=Column(no_wrap=True))
        self._state = state
        self._description = description

    def render(self, task: Task) -> Text:
        return Text(f"{self._description} {_count(self._state)}")


def _count(state: LayerProgress) -> str:
    return f"{state.done:{len(str(state.total))}d}/{state.total}"


def _times(state: LayerProgress) -> str:
    remaining = state.remaining()
    left = "" if remaining is None else f", about {format_seconds(remaining)} left"
    return f"{format_seconds(state.elapsed())} elapsed{left}"


@contextlib.contextmanager
def progress(
    total: int,
    description: str,
    quiet: bool = False,
    *,
    unit: str = "layer",
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[LayerProgress]:
    """Show progress over ``total`` layers, or other units, while the block runs.

    On a terminal: a bar with count, elapsed and estimated time left and the current stage. Elsewhere: one
    plain line for every :meth:`LayerProgress.advance`. When quiet: nothing.

    Args:
      total: number of units, as counted by :meth:`LayerProgress.advance`.
      description: what is being done to them, e.g. ``"Converting"``.
      quiet: print nothing at all.
      unit: what is counted, for the plain lines.
      console: where to; standard error if None.
      clock: seconds from an arbitrary start; tests give their own.

    Yields:
      The :class:`LayerProgress` to report to.
    """
    if quiet:
        yield LayerProgress(total, clock=clock)
        return
    console = console or Console(stderr=True)

    def say(text: str) -> None:
        # soft_wrap: a log is read by programs too, which want one line a layer whatever the width.
        console.print(Text(text), soft_wrap=True)

    if not console.is_terminal or console.is_dumb_terminal:
        shown = 0

        def line(state: LayerProgress) -> None:
            nonlocal shown
            if state.done != shown:
                shown = state.done
                say(f"{description}: {unit} {_count(state)}, {_times(state)}")

        yield LayerProgress(total, clock=clock, on_change=line, on_message=say)
        return

    state = LayerProgress(total, clock=clock, on_message=say)
    columns = (
        _CountColumn(state, description),
        BarColumn(bar_width=12),
        _TimeColumn(state),
        _StageColumn(state),
    )
    # Two redraws a second: the machine has better things to do.
    with Progress(*columns, console=console, refresh_per_second=2, expand=True) as bar:
        task = bar.add_task(description, total=total)
        state._on_change = lambda s: bar.update(task, completed=s.done, refresh=True)
        yield state
