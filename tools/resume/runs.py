"""Runs as the operating system sees them: ranks in new processes, waited for or killed.

Ranks are forked from a server process that has imported what all of them import and done nothing
else: it saves several seconds a rank. Each is a session, so that SIGKILL takes its data workers
along, and logs into a file.
"""

import functools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from megatron.core.dist_checkpointing import folders
from megatron.core.errors import MegatronError
from tools.resume.record import run_rank
from tools.resume.records import steps_done
from tools.resume.settings import RecordPlan

ROOT = Path(__file__).resolve().parents[2]
_LOOK_S = 0.002
_HOST = "127.0.0.1"
_SHOWN_LINES = 12
_OF_ONE_RUN = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE",
)
_IMPORTED_BEFORE = [
    "torch._dynamo",  # the optimizers of torch.optim import it, and so does the next
    "torch.distributed.checkpoint",  # every save
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.moe_module_specs",
    "megatron.training.training",
    "matplotlib.backends.backend_agg",  # if it is there: runs draw a picture when they end
    "tools.resume.record",
    "tools.resume.recorder",
]


class RunFailed(MegatronError):  # noqa: N818 (it says what happened)
    """A run of the user's flags ended by itself, and not well."""


class Killed(NamedTuple):
    """How a run was killed."""

    step: int
    """The last step that rank 0 had made."""
    after_ms: float
    """Time between the step that was drawn and the signal."""
    checkpoint: int
    """Iteration of the newest whole checkpoint then on the disk."""


class Moment(NamedTuple):
    """When to kill, drawn before: not a time, for a machine is now faster and now slower."""

    step: int
    """After this step,"""
    share: float
    """and this share of the mean time of a step, saves included."""


def finish(plan: RecordPlan, world_size: int, title: str) -> float:
    """Run to the end; return how long it took in seconds.

    Raises:
        RunFailed: A rank ended with an error; its last words are in the message.
    """
    began = time.monotonic()
    with _started(plan, world_size) as ranks:
        while any(rank.is_alive() for rank in ranks):
            if any(rank.exitcode for rank in ranks):
                _wait_for_others(ranks)
                break
            time.sleep(0.02)
        codes = [rank.exitcode or 0 for rank in ranks]
    if any(codes):
        raise RunFailed(failure_text(plan, codes, title))
    return time.monotonic() - began


def kill(plan: RecordPlan, world_size: int, moment: Moment, saves: Path) -> Killed:
    """Run, and send SIGKILL to all ranks at ``moment``, once there is a whole checkpoint.

    Raises:
        RunFailed: The run ended before.
    """
    folder = Path(plan.record)
    began = time.monotonic()
    with _started(plan, world_size) as ranks:
        _wait_until(lambda: steps_done(folder) > 0, ranks, plan)
        first = time.monotonic()
        _wait_until(lambda: steps_done(folder) >= moment.step, ranks, plan)
        _wait_until(lambda: folders.latest_iteration(saves) is not None, ranks, plan)
        mean = (time.monotonic() - first) / max(steps_done(folder) - 1, 1)
        reached = time.monotonic()
        time.sleep(moment.share * min(mean, max(time.monotonic() - began, 0.0)))
        for rank in ranks:
            _kill(rank)
        after = 1e3 * (time.monotonic() - reached)
    checkpoint = folders.latest_iteration(saves)
    assert checkpoint is not None, f"{saves} had a checkpoint before the kill"
    return Killed(steps_done(folder), after, checkpoint)


def _wait_until(
    is_so: Callable[[], bool], ranks: list[ForkServerProcess], plan: RecordPlan
) -> None:
    while not is_so():
        if not all(rank.is_alive() for rank in ranks):
            _wait_for_others(ranks)
            codes = [rank.exitcode or 0 for rank in ranks]
            raise RunFailed(failure_text(plan, codes, "the run that was to be killed"))
        time.sleep(_LOOK_S)


def _wait_for_others(ranks: list[ForkServerProcess], most_s: float = 20.0) -> None:
    """Give the other ranks of a failed run time to say why they end."""
    until = time.monotonic() + most_s
    while time.monotonic() < until and any(rank.is_alive() for rank in ranks):
        time.sleep(0.05)


@contextmanager
def _started(plan: RecordPlan, world_size: int) -> Iterator[list[ForkServerProcess]]:
    """Start all ranks; none outlives the context."""
    folder = Path(plan.record)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plan.json"
    path.write_text(json.dumps(asdict(plan), indent=1))
    ranks: list[ForkServerProcess] = []
    # the ranks meet at a store of this process: it takes a port that is free, they do not look
    store = dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    try:
        for rank in range(world_size):
            ranks.append(_start(path, rank, world_size, store.port))
        yield ranks
    finally:
        for process in ranks:
            _kill(process)
            process.join()


def _start(plan: Path, rank: int, world_size: int, port: int) -> ForkServerProcess:
    told = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,  # as torchrun says it: the store is there already
    }
    environment = {name: str(value) for name, value in told.items()} if world_size > 1 else {}
    process = _server().Process(
        target=run_rank, args=(str(plan), environment, str(log_of(plan.parent, rank)))
    )
    process.start()
    return process


@functools.cache
def _server() -> multiprocessing.context.ForkServerContext:
    """Return what starts processes; the server begins with the first one, in this environment."""
    for name in _OF_ONE_RUN:
        os.environ.pop(name, None)
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does; read when torch is imported
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(_IMPORTED_BEFORE)
    return server


def log_of(record: Path, rank: int) -> Path:
    """Return the file of what a rank prints."""
    return record / f"rank{rank}.log"


def failure_text(plan: RecordPlan, codes: list[int], title: str) -> str:
    """Say how a run ended and show the last words of the first rank that failed."""
    if not any(codes):
        return f"{title} came to its end first: ask for more --iterations"
    rank = next(number for number, code in enumerate(codes) if code)
    spoke = log_of(Path(plan.record), 0 if codes[0] else rank)
    lines = spoke.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
    said = "".join(f"\n    {line}" for line in lines)
    return f"{title} failed: rank {rank} ended with exit code {codes[rank]}:{said}"


def _kill(process: ForkServerProcess) -> None:
    if process.is_alive() and process.pid is not None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it is no session yet
            process.kill()
