"""A run that is started again on fewer ranks, or on more, is the unbroken run to 1e-12 (fp64)."""

import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from _pytest.mark import ParameterSet

from megatron.core.errors import ConfigError
from megatron.training.arguments import parse_args
from tests.helpers.dying_runs import LAYERS, PAUSE, Death, DyingRun, steps, tensors
from tests.helpers.forked_training import train
from tests.helpers.ranks import run_ranks

ITERATIONS, STOP = 8, 4
FLAGS = (
    f"{LAYERS} --fp64 --train-iters {ITERATIONS} --save-interval {STOP} --allow-fresh-start "
    "--save {0} --load {0}"
)
COMPARED = ("lm_loss", "grad_norm", "learning_rate", "consumed_samples", "updated")
TOLERANCE = 1e-12


class World(NamedTuple):
    """How a run is spread."""

    ranks: int
    flags: str


TWO = World(2, "--expert-model-parallel-size 2")
ONE = World(1, "")
FOUR = World(4, "--expert-model-parallel-size 2")


def go_on(folder: Path, world: World, flags: str = "") -> None:
    words = f"{FLAGS.format(folder)} {world.flags} {flags}".split()
    run_ranks(train, world.ranks, words, world.ranks)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    go_on(folder, TWO)
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    go_on(folder, TWO, f"--exit-interval {STOP}")
    return folder


def assert_same_end(folder: Path, unbroken: Path) -> None:
    found, expected = steps(folder), steps(unbroken)
    assert [line["iteration"] for line in found] == list(range(1, ITERATIONS + 1))
    for line, other in zip(found, expected, strict=True):
        for name in COMPARED:
            same = pytest.approx(other[name], rel=TOLERANCE, abs=0)
            assert line[name] == same, (line["iteration"], name)
    weights, others = tensors(folder), tensors(unbroken)
    assert weights.keys() == others.keys()
    assert any(key.startswith("optimizer.exp_avg_sq.") for key in weights)
    for key, tensor in weights.items():
        off = (tensor.double() - others[key].double()).abs().max()
        assert off <= 100 * TOLERANCE * others[key].double().abs().max(), (key, off)


def slow(name: str) -> ParameterSet:
    return pytest.param(name, marks=pytest.mark.slow)


WORLDS = {
    "1 rank": ONE,
    "4 ranks, EP 2": FOUR,
    "4 ranks, EP 4": World(4, "--expert-model-parallel-size 4"),
    "4 ranks, TP 2": World(4, "--tensor-model-parallel-size 2 --expert-model-parallel-size 2"),
    "4 ranks, PP 2": World(4, "--pipeline-model-parallel-size 2"),
    "2 ranks, no EP": World(2, ""),
    "2 ranks, sharded": World(2, "--use-distributed-optimizer"),
}


@pytest.mark.parametrize("name", [*list(WORLDS)[:2], *(slow(name) for name in list(WORLDS)[2:])])
def test_a_run_of_2_ranks_goes_on_in_another_world(
    name: str, stopped: Path, unbroken: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    go_on(folder, WORLDS[name])
    assert_same_end(folder, unbroken)


DEATHS_ON_THE_WAY = (
    (World(2, TWO.flags), (Death(0, 0, "microbatch", 2 * 3 + 1),)),
    (World(1, ""), (Death(0, 0, "microbatch", 4 * 2 + 1),)),
    (World(4, "--expert-model-parallel-size 4"), (Death(0, 3, "microbatch", 3),)),
    (World(2, ""), ()),
)
"""Each start of one run, and which rank is killed in it: in step 4, 5, 7."""


@pytest.mark.slow
def test_the_world_halves_and_doubles_as_ranks_are_killed(unbroken: Path, tmp_path: Path) -> None:
    command = FLAGS.format(tmp_path).replace(f"--save-interval {STOP}", "--save-interval 2")
    for world, deaths in DEATHS_ON_THE_WAY:
        flags = f"{command} {world.flags}"
        ended = DyingRun(flags, deaths, ranks=world.ranks, torchrun="--standalone").end()
        assert (ended.code == 0) == (not deaths), ended.out + ended.err
    assert_same_end(tmp_path, unbroken)


def test_a_batch_that_the_new_ranks_cannot_share_is_one_error_with_what_fits() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(FLAGS.format("none").split(), world_size=3)
    assert str(caught.value).splitlines() == [
        "invalid configuration:",
        "  - --global-batch-size 8 must be a multiple of --micro-batch-size 2 x 3 data-parallel "
        "ranks (= 6); nearest: 6 or 12",
        "no sizes on 3 ranks are legal with the other flags; legal: as asked on 4 ranks",
    ]


LONG = 100
LONG_RUN = (
    FLAGS.replace(f"--train-iters {ITERATIONS}", f"--train-iters {LONG}")
    .replace(f"--save-interval {STOP}", "--save-interval 20")
    .replace("--eval-iters 1", "--eval-iters 0")
    .replace("--eval-interval 3", "")
)
LATE_TOLERANCE = 1e-6
"""What a rounding at the first step may become in a hundred steps of Adam."""
PATIENCE_SECONDS = 120


def node(folder: Path, port: int) -> DyingRun:
    """Start torchrun on one of at most two nodes; it has one rank."""
    torchrun = (
        f"--nnodes 1:2 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port} "
        "--rdzv-id a --rdzv-conf last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
    )
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", PAUSE: "0.1"}
    return DyingRun(LONG_RUN.format(folder), ranks=1, torchrun=torchrun, variables=variables)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never happens"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_node_joins_and_is_lost_again(tmp_path: Path) -> None:
    """1 rank, then 2, then 1: torchrun with --nnodes 1:2, and the flags never change."""
    folder, reference = tmp_path / "run", tmp_path / "reference"
    run_ranks(train, 2, LONG_RUN.format(reference).split(), 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first = node(folder, port)
    wait_for(lambda: len(steps(folder)) > 2)
    second = node(folder, port)
    wait_for(lambda: bool(second.ranks()))
    alone = len(steps(folder))
    wait_for(lambda: len(steps(folder)) > alone + 3)
    for pid in (second.process.pid, *second.ranks()):
        os.kill(pid, signal.SIGKILL)
    second.process.communicate()
    ended = first.end()
    assert ended.code == 0, ended.out + ended.err
    assert re.findall(r" > (\d) ranks? on cpu", ended.out) == ["1", "2", "1"]
    assert "stopped after iteration" in ended.out, "the first world saved when the node came"
    found, expected = steps(folder), steps(reference)
    assert [line["iteration"] for line in found] == list(range(1, LONG + 1))
    for line, other in zip(found, expected, strict=True):
        assert line["lm_loss"] == pytest.approx(other["lm_loss"], rel=LATE_TOLERANCE)
