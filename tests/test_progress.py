"""Progress: the estimate, and what a terminal, a log and a quiet run get to see."""

import io

import pytest
from rich.console import Console

from convert.progress import LayerProgress, progress
from torq_jax.duration import format_seconds


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0:00"), (6.6, "0:07"), (59.7, "1:00"), (754, "12:34"), (3723, "1:02:03")]
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_estimate_forgets_the_slow_first_layer() -> None:
    clock = Clock()
    state = LayerProgress(10, clock=clock)
    assert state.remaining() is None
    for seconds in (60.0, 5.0, 5.0, 5.0, 5.0):
        clock.now += seconds
        state.advance()
    assert state.elapsed() == 80.0
    assert state.remaining() == 25.0  # five layers of 5 s
    clock.now += 2.0
    assert state.remaining() == 23.0
    clock.now += 1000.0
    assert state.remaining() == 0.0  # never negative


def test_several_layers_at_once_and_the_end() -> None:
    clock = Clock()
    state = LayerProgress(3, clock=clock)
    clock.now += 8.0
    state.advance(2)
    assert (state.done, state.remaining()) == (2, 4.0)
    state.advance(5)
    assert (state.done, state.remaining()) == (3, 0.0)


def test_log_gets_one_plain_line_a_layer() -> None:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=40, force_terminal=False)  # narrower than a line
    with progress(12, "Converting", console=console, clock=clock) as p:
        p.stage("statistics")
        clock.now += 10.0
        p.advance()
        p.message("layer 0: [o_proj] is odd")
        p.stage("rotation")
        clock.now += 20.0
        p.advance()
    assert out.getvalue().splitlines() == [
        "Converting: layer  1/12, 0:10 elapsed, about 1:50 left",
        "layer 0: [o_proj] is odd",  # brackets are text, not markup
        "Converting: layer  2/12, 0:30 elapsed, about 2:30 left",
    ]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_terminal_gets_a_bar_in_one_line(width: int) -> None:
    out, clock = io.StringIO(), Clock()
    console = Console(
        file=out, width=width, force_terminal=True, legacy_windows=False, _environ={"TERM": "xterm"}
    )
    with progress(30, "Converting", console=console, clock=clock) as p:
        clock.now += 10.0
        p.advance()
        p.stage("mlp_out: rounding weights")
        p.message("kept")
    shown = out.getvalue()
    assert "Converting  1/30" in shown
    assert "0:10 elapsed, about 4:50 left" in shown
    assert "mlp" in shown or width == 60
    assert "kept" in shown
    # One line: the live display never moves the cursor up past its own line.
    assert "\x1b[1A\x1b[2K\x1b[1A" not in shown


def test_quiet_prints_nothing() -> None:
    out = io.StringIO()
    with progress(2, "Converting", quiet=True, console=Console(file=out, force_terminal=True)) as p:
        p.stage("statistics")
        p.advance()
        p.message("unseen")
    assert (out.getvalue(), p.done) == ("", 1)


@pytest.mark.parametrize("terminal", [False, True])
def test_errors_pass_through(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal)
    with pytest.raises(RuntimeError, match="broken"), progress(2, "Converting", console=console) as p:
        p.advance()
        raise RuntimeError("broken")
