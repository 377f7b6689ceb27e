import signal
import threading
import time

import pytest
import torch.distributed as dist

from megatron.core.errors import DataError
from megatron.training.failure import FailureReport


@pytest.fixture(autouse=True)
def _no_alarm():
    yield
    signal.alarm(0)


def _rank(number: int, store: dist.Store) -> FailureReport:
    report = FailureReport(store)
    report.rank, report.where, report.iteration = number, f"rank {number}", 5
    return report


def test_a_bug_passes_on_with_a_note_of_its_place() -> None:
    report = FailureReport()
    report.iteration = 3
    with pytest.raises(ValueError, match="oops") as caught, report:
        raise ValueError("oops")
    assert caught.value.__notes__ == ["First failure of the run: rank 0, iteration 3"]


def test_an_error_of_the_user_is_one_message_and_exit_code_2(capsys) -> None:
    with pytest.raises(SystemExit) as caught, FailureReport():
        raise DataError("x.bin is damaged")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "x.bin is damaged\n"


def test_the_first_of_two_failing_ranks_tells_the_other_one_points_to_it(caplog) -> None:
    store = dist.HashStore()
    with pytest.raises(ValueError, match="first"), _rank(1, store):
        raise ValueError("first")
    with pytest.raises(SystemExit) as caught, _rank(0, store):
        raise KeyError("second")
    assert caught.value.code == 1
    assert caplog.messages == ["rank 0 stops because rank 1, iteration 5 failed: ValueError: first"]


def test_what_every_rank_finds_is_told_once_and_all_end_with_exit_code_2(caplog, capsys) -> None:
    store = dist.HashStore()
    for rank in (1, 0, 2):
        with pytest.raises(SystemExit) as caught, _rank(rank, store):
            raise DataError("x.bin is damaged")
        assert caught.value.code == 2
    assert capsys.readouterr().err == "x.bin is damaged\n"
    with pytest.raises(SystemExit) as caught, _rank(3, store):
        raise DataError("y.bin is damaged")
    assert caught.value.code == 1
    assert caplog.messages == [
        "rank 3 stops because rank 1, iteration 5 failed: DataError: x.bin is damaged"
    ]


@pytest.mark.parametrize(
    "text", ["Connection closed by peer [127.0.0.1]:6019", "connectFullMesh failed"]
)
def test_a_lost_connection_is_one_line_and_never_the_first_failure(text: str, caplog) -> None:
    store = dist.HashStore()
    with pytest.raises(SystemExit) as caught, _rank(0, store):
        raise RuntimeError(f"[pair.cc:553] {text}")
    assert caught.value.code == 1
    assert caplog.messages[0].startswith("rank 0, iteration 5: lost the connection to another")
    assert text in caplog.messages[0]
    with pytest.raises(ValueError, match="cause"), _rank(1, store):
        raise ValueError("cause")


def test_a_run_without_errors_says_nothing(capsys) -> None:
    with FailureReport():
        pass
    assert capsys.readouterr() == ("", "")


class _SlowStore(dist.HashStore):
    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()
        self.answers = 0

    def check(self, keys: list[str]) -> bool:
        self.asked.set()
        time.sleep(0.3)
        self.answers += 1
        return False


def test_no_thread_is_left_inside_the_store_when_a_run_ends() -> None:
    store = _SlowStore()
    with FailureReport(store) as report:
        report.watch()
        assert store.asked.wait(20)
    assert store.answers > 0
    assert "failure watch" not in [thread.name for thread in threading.enumerate()]


def test_a_failure_before_a_restart_is_none_of_the_ranks_after_it() -> None:
    store = dist.HashStore()
    failing, beside, after = _rank(1, store), _rank(0, store), _rank(0, store)
    for report, start in ((failing, "first"), (beside, "first"), (after, "second")):
        report.watch(start)
    with pytest.raises(ValueError, match="oops"), failing:
        raise ValueError("oops")
    with after, beside:
        assert after._noted() is None
        assert beside._noted() is not None
