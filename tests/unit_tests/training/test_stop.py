import os
import signal

import pytest
import torch
import torch.distributed as dist

from megatron.training.config.training import TrainingConfig
from megatron.training.stop import StopRequest
from tests.helpers.ranks import run_ranks


def test_nothing_stops_a_run_by_default() -> None:
    with StopRequest(TrainingConfig()) as stop:
        assert stop.notes() == (0.0, 0.0)
        assert stop.reason(stop.notes(), 5) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_nothing_else_happens(number: signal.Signals) -> None:
    with StopRequest(TrainingConfig()) as stop:
        os.kill(os.getpid(), number)
        assert stop.notes() == (1.0, 0.0)
        assert number.name in stop.reason(stop.notes(), 1).text


def test_a_later_second_sigint_interrupts_but_an_echo_of_the_first_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr("megatron.training.stop.time.monotonic", lambda: now[0])
    with StopRequest(TrainingConfig()) as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.notes() == (1.0, 0.0)
        now[0] += 1.5
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_second_sigterm_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("megatron.training.stop.time.monotonic", lambda: now[0])
    with StopRequest(TrainingConfig()) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        now[0] += 60
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.notes() == (1.0, 0.0)


def test_the_handlers_of_before_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(TrainingConfig()):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_exit_interval_stops_at_its_multiples() -> None:
    stop = StopRequest(TrainingConfig(exit_interval=3))
    stopped = [i for i in range(1, 8) if stop.reason((0.0, 0.0), i)]
    assert stopped == [3, 6]


def test_the_time_limit_is_noted_when_it_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("megatron.training.stop.time.monotonic", lambda: now[0])
    stop = StopRequest(TrainingConfig(exit_duration_in_mins=2))
    assert stop.notes() == (0.0, 0.0)
    now[0] += 121
    assert stop.notes() == (0.0, 1.0)
    assert stop.reason(stop.notes(), 1) == ("--exit-duration-in-mins 2", True)


def _one_rank_is_told() -> None:
    stopped_after = None
    with StopRequest(TrainingConfig()) as stop:
        for iteration in range(1, 6):
            if dist.get_rank() == 1 and iteration == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            notes = torch.tensor(stop.notes())
            dist.all_reduce(notes)
            if stop.reason(notes.tolist(), iteration):
                stopped_after = iteration
                break
    assert stopped_after == 3, f"{dist.get_rank()=} {stopped_after=}"


def test_all_ranks_stop_at_the_step_in_which_one_was_told() -> None:
    run_ranks(_one_rank_is_told, 2)
