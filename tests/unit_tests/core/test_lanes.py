"""Two lanes: one order of turns, one that runs at a time, and no thread that outlives a failure."""

import contextvars
import signal
import threading
import traceback
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.lanes import Lanes, LaneStopped


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def _steps(lanes: Lanes, name: str, changes: int, seen: list[str]) -> Callable[[], str]:
    """Return work of ``changes`` + 1 parts with a change behind each but the last."""

    def work() -> str:
        for part in range(changes + 1):
            seen.append(f"{name}{part}")
            if part < changes:
                lanes.change()
        return name

    return work


def _expected(first: int, second: int) -> list[str]:
    """Parts in turn; what is left of the longer lane follows at once."""
    order = []
    for part in range(max(first, second) + 1):
        order += [f"B{part}"] * (part <= second) + [f"F{part}"] * (part <= first)
    return order


@settings(deadline=None, max_examples=50)
@given(first=st.integers(0, 6), second=st.integers(0, 6))
def test_lanes_take_turns_by_their_calls_alone(first, second):
    lanes, seen = Lanes(), []
    got = lanes.run_pair(_steps(lanes, "F", first, seen), _steps(lanes, "B", second, seen))
    assert got == ("F", "B")
    assert seen == _expected(first, second)


def test_a_change_outside_a_pair_does_nothing():
    lanes, seen = Lanes(), []
    _steps(lanes, "F", 3, seen)()
    lanes.run_pair(lambda: None, lambda: None)
    _steps(lanes, "B", 0, seen)()
    assert seen == ["F0", "F1", "F2", "F3", "B0"]


def test_only_one_lane_runs_at_a_time():
    lanes, inside, most = Lanes(), [], []

    def work() -> None:
        for _ in range(200):
            inside.append(None)
            most.append(len(inside))
            sum(range(2000))  # long enough for another thread to come in
            inside.pop()
            lanes.change()

    lanes.run_pair(work, work)
    assert len(most) == 400
    assert max(most) == 1


def test_a_lane_is_found_from_a_thread_that_works_for_it():
    """As on CUDA, where autograd runs backward in a thread of the device."""
    lanes, seen = Lanes(), []

    def elsewhere() -> None:
        device = threading.Thread(target=_steps(lanes, "B", 2, seen))
        device.start()
        device.join()

    lanes.run_pair(_steps(lanes, "F", 2, seen), elsewhere)
    assert seen == _expected(2, 2)


def _fails(lanes: Lanes, changes: int, error: BaseException) -> Callable[[], None]:
    def fall_over() -> None:
        for _ in range(changes):
            lanes.change()
        raise error

    return fall_over


@pytest.mark.parametrize("changes", [0, 1, 3])
@pytest.mark.parametrize("is_forward", [True, False])
def test_a_failing_lane_ends_both_and_its_own_error_comes_out(is_forward, changes):
    lanes, ended, error = Lanes(), [], ValueError("too hot")

    def other() -> None:
        try:
            while True:
                lanes.change()
        except Exception:  # noqa: BLE001  what a script may do with its own errors
            ended.append("swallowed")
        except LaneStopped:
            ended.append("stopped")
            raise

    failing = _fails(lanes, changes, error)
    pair = (failing, other) if is_forward else (other, failing)
    with pytest.raises(ValueError, match="too hot") as caught:
        lanes.run_pair(*pair)
    assert caught.value is error
    assert "fall_over" in {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    never_began = not is_forward and changes == 0
    assert ended == ([] if never_began else ["stopped"])
    assert lanes.run_pair(lambda: 1, lambda: 2) == (1, 2)  # usable again


def test_the_first_of_two_errors_comes_out():
    lanes = Lanes()

    def worse() -> None:
        try:
            lanes.change()
        finally:
            raise RuntimeError("the rows did not land")

    with pytest.raises(ValueError, match="first"):
        lanes.run_pair(_fails(lanes, 0, ValueError("first")), worse)


def test_an_error_in_the_last_part_of_the_second_lane_comes_out():
    lanes = Lanes()
    with pytest.raises(ValueError, match="late"):
        lanes.run_pair(lambda: None, _fails(lanes, 2, ValueError("late")))


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let SIGINT raise; a shell that starts the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _interrupt() -> None:
    """Press Ctrl-C; the main thread wakes up, whatever it waits for."""
    ident = threading.main_thread().ident
    assert ident is not None
    signal.pthread_kill(ident, signal.SIGINT)


@pytest.mark.parametrize("began", [False, True])
@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_while_the_other_lane_computes_ends_both(began):
    lanes, parts = Lanes(), []

    def forward() -> None:
        lanes.change()
        raise AssertionError("the interrupt came before")

    def backward() -> None:
        if began:
            lanes.change()  # the forward then waits in its own change
        _interrupt()
        for part in range(1000):
            parts.append(part)
            threading.Event().wait(0.001)
            if part > 20:
                lanes.change()

    with pytest.raises(KeyboardInterrupt):
        lanes.run_pair(forward, backward)
    assert len(parts) < 1000


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_behind_the_first_lane_waits_for_the_second():
    lanes = Lanes()

    def backward() -> None:
        lanes.change()
        _interrupt()
        for _ in range(1000):  # an end, should the main thread be about to wait just now
            threading.Event().wait(0.001)
            lanes.change()

    with pytest.raises(KeyboardInterrupt):
        lanes.run_pair(lambda: None, backward)


def test_no_thread_to_be_had_is_an_error_and_no_hang(monkeypatch):
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            Lanes().run_pair(lambda: 1, lambda: 2)


def test_a_lane_has_no_lanes_of_its_own():
    lanes = Lanes()
    with pytest.raises(AssertionError, match="of its own"):
        lanes.run_pair(lambda: lanes.run_pair(lambda: 1, lambda: 2), lambda: None)


_VARIABLE = contextvars.ContextVar("_VARIABLE", default="unset")


def test_the_second_lane_has_the_state_of_the_calling_thread():
    def state() -> tuple[object, ...]:
        return (
            _VARIABLE.get(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
            torch.empty(0).device.type,
            torch.get_num_threads(),
        )

    plain = state()
    before = _VARIABLE.set("set")
    try:
        cast = torch.autocast("cpu", dtype=torch.float16, cache_enabled=False)
        with torch.no_grad(), cast, torch.device("meta"):
            here = state()
            assert Lanes().run_pair(state, state) == (here, here)
    finally:
        _VARIABLE.reset(before)
    assert not set(zip(range(6), plain, strict=False)) & set(zip(range(6), here, strict=False))
    assert Lanes().run_pair(state, state) == (plain, plain)
