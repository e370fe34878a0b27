"""Steps where stderr is no terminal: a line every half a minute, and one at the end, however it comes."""

import pytest

from flux_core.training.loop import Progress
from flux_core.training.progress import Steps


def lines(capsys, total, done, seconds, last, error=None):
    """What a run says that begins behind `done` steps, each of so many seconds and with its number as its loss."""
    now = [100.0]
    try:
        with Steps(total, done, lambda: now[0]) as steps:
            for step in range(done + 1, last + 1):
                now[0] += seconds
                steps.add(Progress(step, float(step), 1e-4, 1.0, []))
            if error:
                raise error
    except type(error or ValueError):
        pass
    return capsys.readouterr().err.splitlines()


def test_a_line_every_half_a_minute(capsys):
    assert lines(capsys, 1000, 0, 10.0, 7) == [
        "step 3 of 1000: loss 2.0000, 10.00 s a step, 2.8 h left",
        "step 6 of 1000: loss 5.0000, 10.00 s a step, 2.8 h left",
        "step 7 of 1000: loss 7.0000, 10.00 s a step, 2.8 h left",
    ]


def test_what_is_left_is_told_by_this_process(capsys):
    assert lines(capsys, 140, 100, 0.5, 140) == ["step 140 of 140: loss 120.5000, 0.50 s a step, 0 s left"]
    assert lines(capsys, 200, 100, 40.0, 101) == ["step 101 of 200: loss 101.0000, 40.00 s a step, 66 min left"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError()])
def test_how_far_a_run_came_that_ended_early(capsys, error):
    assert lines(capsys, 9, 0, 1.0, 2, error) == ["step 2 of 9: loss 1.5000, 1.00 s a step, 7 s left"]
    assert lines(capsys, 9, 9, 1.0, 9) == []
