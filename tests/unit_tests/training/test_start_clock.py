import logging
import re
import subprocess
import sys
import time

import pytest

from megatron.training.start_clock import StartClock


def test_phases_add_up_and_a_phase_may_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = StartClock(launched=9.0)
    for phase, seconds in (("imports", 1.0), ("data", 0.5), ("imports", 2.0), ("model", 0.001)):
        now[0] += seconds
        clock.mark(phase)
    line = clock.line()
    assert line.startswith("first step done 4.50 s after the launch of this rank, ")
    assert line.endswith(": imports 4.00, data 0.50")


def test_the_line_is_told_once_and_marks_after_it_change_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = StartClock()
    with caplog.at_level(logging.INFO):
        clock.first_step_done()
        before = clock.line().partition(" s after")[0]
        clock.mark("later")
        clock.first_step_done()
    assert len(caplog.records) == 1
    assert "first step" in caplog.text
    assert clock.line().partition(" s after")[0] == before


def test_the_launch_of_the_process_is_counted_not_the_import() -> None:
    code = (
        "import time; time.sleep(0.3)\n"
        "from megatron.training.start_clock import start_clock\n"
        "start_clock.mark('asleep'); print(start_clock.line())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    found = re.search(r"asleep (\d+\.\d+)", done.stdout)
    assert found is not None, done.stdout
    assert 0.29 < float(found[1]) < 60  # at least the sleep: the machine may be slow, never fast
