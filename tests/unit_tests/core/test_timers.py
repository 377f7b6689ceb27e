import pytest

from megatron.core.timers import Timers


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("megatron.core.timers.time.perf_counter", lambda: now[0])
    return now


def test_a_timer_adds_up_its_stretches(clock: list[float]) -> None:
    timer = Timers()("forward")
    for seconds in (2.0, 3.0):
        timer.start()
        clock[0] += seconds
        timer.stop()
        clock[0] += 100.0
    assert timer.elapsed(reset=False) == 5.0
    assert timer.elapsed() == 5.0
    assert timer.elapsed() == 0.0


def test_a_running_timer_can_be_read_and_goes_on(clock: list[float]) -> None:
    timer = Timers()("forward")
    timer.start()
    clock[0] += 2.0
    assert timer.elapsed() == 2.0
    clock[0] += 3.0
    timer.stop()
    assert timer.elapsed() == 3.0


def test_names_keep_their_timer(clock: list[float]) -> None:
    timers = Timers()
    timers("a").start()
    clock[0] += 0.25
    assert timers("a").elapsed() == 0.25


def test_starting_twice_is_a_bug() -> None:
    timer = Timers()("a")
    timer.start()
    with pytest.raises(AssertionError, match="twice"):
        timer.start()
