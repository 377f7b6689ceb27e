"""A run that loses ranks goes on by itself under torchrun, and ends as if nothing had happened."""

import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.helpers.dying_runs import LAYERS, Death, DyingRun, Ended, steps, tensors
from tests.helpers.forked_training import train
from tests.helpers.ranks import run_ranks

ITERATIONS = 8
EVERY = 3
RUN = (
    f"{LAYERS} --expert-model-parallel-size 2 --train-iters {ITERATIONS} --save-interval {EVERY} "
    "--save {0} --load {0} --allow-fresh-start"
)
"""Every start has these flags: the first, and those that torchrun makes."""
A_STEP = 2
"""Microbatches of a rank in a step; an evaluation has as many."""


class Unbroken(NamedTuple):
    """What every run here must end with."""

    steps: list[dict]
    tensors: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    folder = tmp_path_factory.mktemp("unbroken")
    run_ranks(train, 2, RUN.format(folder).split())
    return Unbroken(steps(folder), tensors(folder))


def starts(out: str) -> list[str]:
    """Return the first line of each start."""
    return re.findall(r"^(?:starting a fresh run|resuming at iteration) .*", out, re.MULTILINE)


def assert_same_end(folder: Path, ended: Ended, unbroken: Unbroken) -> None:
    assert ended.code == 0, ended.out + ended.err
    assert [line["iteration"] for line in steps(folder)] == list(range(1, ITERATIONS + 1))
    assert steps(folder) == unbroken.steps
    found = tensors(folder)
    assert found.keys() == unbroken.tensors.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, unbroken.tensors[key]), key
    left = {name for name in os.listdir(folder) if name.startswith(".")}
    assert left == set(), "a killed run's half checkpoint goes at the next save"


def test_a_run_that_loses_a_rank_goes_on_and_ends_bit_for_bit_alike(
    unbroken: Unbroken, tmp_path: Path
) -> None:
    in_step_5 = Death(0, rank=1, moment="microbatch", call=A_STEP * (4 + 1) + 1)
    ended = DyingRun(RUN.format(tmp_path), (in_step_5,)).end()
    assert_same_end(tmp_path, ended, unbroken)
    assert starts(ended.out) == [
        f"starting a fresh run at iteration 0 ({tmp_path} holds no checkpoint yet)",
        f"resuming at iteration 3 from {tmp_path}/iter_0000003; restart 1 of at most 3 by torchrun",
    ]
    assert f"resumed at iteration 3 (24 samples) from {tmp_path}/iter_0000003" in ended.out
    for line in re.findall(r"^error .*", ended.out, re.MULTILINE):  # none where torchrun was faster
        assert re.match(r"error \[rank 0\]: rank 0 \(.*\), .*: lost the connection to", line), line
    assert "Traceback" not in ended.out + ended.err


MISFORTUNES = {
    "a rank each in two starts": (Death(0, 0, "microbatch", 9), Death(1, 1, "microbatch", 7)),
    "both at once": (Death(0, 0, "microbatch", 10), Death(0, 1, "microbatch", 10)),
    "before the first save": (Death(0, 1, "microbatch", 3),),
    "twice before the first save": (Death(0, 1, "microbatch", 3), Death(1, 0, "microbatch", 1)),
    "in an evaluation": (Death(0, 1, "microbatch", A_STEP * 3 + 1),),
    "writing the first checkpoint": (Death(0, 1, "fsync", 1),),
    "writing the second one": (Death(0, 1, "fsync", 2),),
    "rank 0 writing, again and again": tuple(Death(n, 0, "fsync", 2 * n + 1) for n in range(3)),
    "giving the first one its name": (Death(0, 0, "rename", 1),),
    "giving the second one its name": (Death(0, 0, "rename", 2),),
    "after the last step": (Death(0, 1, "fsync", 3),),
}
"""Three restarts are allowed, and so many rank deaths at most are in each."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flag"),
    [(name, "") for name in MISFORTUNES] + [(name, "--async-save") for name in MISFORTUNES],
)
def test_no_misfortune_changes_the_end(
    name: str, flag: str, unbroken: Unbroken, tmp_path: Path
) -> None:
    deaths = MISFORTUNES[name]
    ended = DyingRun(f"{RUN.format(tmp_path)} {flag}", deaths).end()
    assert_same_end(tmp_path, ended, unbroken)
    restarts = len({death.restart for death in deaths})
    assert len(starts(ended.out)) == 1 + restarts, "every planned death happened"
    assert starts(ended.out)[-1].endswith(f"; restart {restarts} of at most 3 by torchrun")


@pytest.mark.slow
def test_a_run_that_is_out_of_restarts_goes_on_by_the_same_command(
    unbroken: Unbroken, tmp_path: Path
) -> None:
    command = RUN.format(tmp_path)
    deaths = tuple(Death(restart, 1, "microbatch", 5) for restart in range(2))
    ended = DyingRun(command, deaths, torchrun="--standalone --max-restarts 1").end()
    assert ended.code != 0
    assert "Signal 9 (SIGKILL) received" in ended.err
    assert_same_end(tmp_path, DyingRun(command).end(), unbroken)
