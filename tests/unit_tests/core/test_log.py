import logging

import pytest

from megatron.core.log import banner, log_once, print_rank_0, setup_logging

log = logging.getLogger("megatron.some.module")


@pytest.fixture(autouse=True)
def _own_handlers():
    logger = logging.getLogger("megatron")
    before = logger.handlers[:], logger.level
    yield
    logger.handlers[:], logger.level = before


def test_rank_0_shows_information_as_it_stands(capsys: pytest.CaptureFixture) -> None:
    setup_logging(rank=0, world_size=2)
    log.info(" [date] iteration %d |", 3)
    print_rank_0("hello")
    assert capsys.readouterr().out == " [date] iteration 3 |\nhello\n"


def test_other_ranks_show_warnings_only_with_their_rank(capsys: pytest.CaptureFixture) -> None:
    setup_logging(rank=3, world_size=4)
    log.info("not shown")
    log.warning("careful")
    assert capsys.readouterr().out == "warning [rank 3]: careful\n"


def test_setting_up_twice_does_not_show_lines_twice(capsys: pytest.CaptureFixture) -> None:
    setup_logging()
    setup_logging()
    log.info("once")
    assert capsys.readouterr().out == "once\n"


def test_a_repeated_message_is_logged_once(capsys: pytest.CaptureFixture) -> None:
    setup_logging()
    for _ in range(3):
        log_once(log, "fallback in force (test_log)")
    assert capsys.readouterr().out == "warning: fallback in force (test_log)\n"


def test_a_banner_sorts_its_rows() -> None:
    lines = banner("arguments", [("b_option", 2), ("a_option", None)]).splitlines()
    assert lines[0] == "------------------------ arguments ------------------------"
    assert [line.split()[0] for line in lines[1:3]] == ["a_option", "b_option"]
    assert lines[1].endswith(" None")
