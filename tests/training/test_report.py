from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

from rich.console import Console

from meshpeft.training.report import MetricsLog, TrainingProgress


def shown(steps: int, console: Console, seconds: float = 0.5) -> None:
    with TrainingProgress(steps, console) as progress:
        for step in range(steps):
            progress.advance(loss=4.0 - step / steps, tokens=300, seconds=seconds)
        progress.note("held-out loss [after]: 3.5")


def test_without_a_terminal_there_are_few_lines_with_the_speed_and_the_time_left() -> None:
    out = io.StringIO()
    shown(100, Console(file=out))
    lines = out.getvalue().splitlines()
    assert len(lines) == 21
    # 300 tokens in half a second; 95 steps of half a second are left.
    assert lines[0] == "step 5/100  loss 3.9600  600 tokens/s  0:48 left"
    assert lines[-2:] == ["step 100/100  loss 3.0100  600 tokens/s  0:00 left", "held-out loss [after]: 3.5"]


def test_on_a_terminal_there_is_one_bar() -> None:
    out = io.StringIO()
    shown(100, Console(file=out, force_terminal=True, width=100, color_system=None))
    bar = [line for line in out.getvalue().splitlines() if "training" in line][-1]
    assert "100/100" in bar and "loss 3.0100" in bar and "600 tokens/s" in bar


def test_a_run_of_a_hundred_hours_shows_soon_that_it_goes_on() -> None:
    out = io.StringIO()
    shown(36000, Console(file=out), seconds=10.0)
    lines = [line for line in out.getvalue().splitlines() if line.startswith("step")]
    assert lines[0] == "step 6/36000  loss 3.9999  30 tokens/s  99:59:00 left"
    steps = [int(line.split()[1].partition("/")[0]) for line in lines]
    silences = [10 * (later - earlier) for earlier, later in itertools.pairwise(steps)]
    assert max(silences) == 1800 and len(lines) < 300


def test_the_bar_knows_the_time_left_of_steps_that_take_a_minute() -> None:
    out = io.StringIO()
    with TrainingProgress(100, Console(file=out, force_terminal=True, width=100, color_system=None)) as progress:
        for _ in range(2):
            progress.advance(loss=4.0, tokens=300, seconds=60.0)
    assert "1:38:00 left" in [line for line in out.getvalue().splitlines() if "training" in line][-1]


def test_metrics_are_written_line_by_line_and_kept(tmp_path: Path) -> None:
    log, silent = MetricsLog(), MetricsLog()
    log.write_to(tmp_path / "metrics.jsonl")
    for one in (log, silent):
        one.add(step=0, held_out_loss=5.0)
        one.add(step=1, loss=4.5)
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == log.rows == silent.rows
    assert log.series("loss") == ([1], [4.5])
    log.close()
