"""The lines are parsed as users' dashboards do it."""

import re
from datetime import datetime

import pytest

from megatron.training.log_line import (
    IterationLine,
    format_duration,
    format_evaluation,
    format_iteration,
    format_memory,
    format_speed,
)

NOW = datetime(2025, 3, 1, 12, 34, 56, 789)
PLAIN = {
    "iteration": 10,
    "train_iters": 500,
    "consumed_samples": 320,
    "step_ms": 123.456,
    "learning_rate": 3e-4,
    "global_batch_size": 32,
    "losses": {"lm loss": 9.0123456},
}
# the fields that log parsers for Megatron look for, each ended by a bar
PARSER = re.compile(
    r"^ \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}\] iteration +(?P<iteration>\d+)/ +(?P<total>\d+) \|"
    r" consumed samples: +(?P<samples>\d+) \|"
    r" elapsed time per iteration \(ms\): (?P<ms>\d+\.\d) \|"
    r"(?: throughput per GPU \(TFLOP/s/GPU\): (?P<tflops>\d+\.\d) \|)?"
    r" learning rate: (?P<lr>\d\.\d{6}E[+-]\d\d) \|"
    r" global batch size: +(?P<gbs>\d+) \|"
    r" lm loss: (?P<loss>\d\.\d{6}E[+-]\d\d|NAN) \|"
    r"(?: load_balancing_loss: (?P<aux>\d\.\d{6}E[+-]\d\d) \|)?"
    r"(?: z_loss: (?P<z>\d\.\d{6}E[+-]\d\d) \|)?"
    r" loss scale: (?P<scale>\d+\.\d) \|"
    r"(?: grad norm: (?P<norm>\d+\.\d{3}) \|)?"
    r" number of skipped iterations: +(?P<skipped>\d+) \|"
    r" number of nan iterations: +(?P<nan>\d+) \|$"
)


def test_the_plain_line_is_megatrons_to_the_letter() -> None:
    assert format_iteration(IterationLine(**PLAIN), NOW) == (
        " [2025-03-01 12:34:56.000789] iteration       10/     500 | consumed samples:          320"
        " | elapsed time per iteration (ms): 123.5 | learning rate: 3.000000E-04 | "
        "global batch size:    32 | lm loss: 9.012346E+00 | loss scale: 1.0 | "
        "number of skipped iterations:   0 | number of nan iterations:   0 |"
    )


def test_a_parser_finds_every_field_of_a_full_line() -> None:
    full = PLAIN | {
        "losses": {"lm loss": 2.5, "load_balancing_loss": 1.25, "z_loss": 0.125},
        "throughput_tflops": 45.67,
        "grad_norm": 1.23456,
        "skipped_iterations": 2,
        "nan_iterations": 1,
    }
    found = PARSER.match(format_iteration(IterationLine(**full), NOW))
    assert found is not None
    assert found.groupdict() == {
        "iteration": "10",
        "total": "500",
        "samples": "320",
        "ms": "123.5",
        "tflops": "45.7",
        "lr": "3.000000E-04",
        "gbs": "32",
        "loss": "2.500000E+00",
        "aux": "1.250000E+00",
        "z": "1.250000E-01",
        "scale": "1.0",
        "norm": "1.235",
        "skipped": "2",
        "nan": "1",
    }


def test_a_loss_that_is_not_finite_is_shown() -> None:
    line = format_iteration(IterationLine(**PLAIN | {"losses": {"lm loss": float("nan")}}), NOW)
    assert " | lm loss: NAN | " in line
    assert PARSER.match(line)


def test_an_evaluation_stands_between_dashes_of_its_length() -> None:
    top, text, bottom = format_evaluation("iteration 7", "validation", 2.0).splitlines()
    assert text == (
        " validation loss at iteration 7 on validation set | lm loss value: 2.000000E+00 "
        "| lm loss PPL: 7.389056E+00 | "
    )
    assert top == bottom == "-" * len(text)


def test_a_huge_loss_has_a_bounded_perplexity() -> None:
    assert "lm loss PPL: 4.851652E+08" in format_evaluation("iteration 1", "test", 1e4)


@pytest.mark.parametrize(("seconds", "text"), [(7, "0:00:07"), (93784, "1 day, 2:03:04")])
def test_durations_read_as_clocks(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_the_speed_line_names_units() -> None:
    line = format_speed(tokens_per_s=1234.56, remaining_s=60, peak_memory_gib=1.5, loss_drop=3.5)
    assert line == (
        "   tokens per second: 1234.6 | ETA: 0:01:00 | peak memory (GiB): 1.50 | "
        "nats below ln(vocabulary): 3.500 |"
    )


def test_the_memory_line_is_megatrons() -> None:
    assert format_memory(0, 1, {"allocated": 1.5, "max allocated": 2.0}) == (
        "[Rank 0] (after 1 iterations) memory (MB) | allocated: 1.5 | max allocated: 2.0"
    )
