"""From a command line to connected ranks: device, backend, process groups, threads, seeds.

Without torchrun the world is one rank that needs no network. Every automatic choice is announced
with its reason; everything a user can get wrong is refused before the first collective.
"""

import logging
import os
import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from megatron.core import parallel_state
from megatron.core.cpu_kernels import choice
from megatron.core.distributed.collective_log import CollectiveChecks, checked_collectives
from megatron.core.errors import ConfigError
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.config.distributed import DistributedConfig
from megatron.training.config.run_config import RunConfig
from megatron.training.fused_kernels import check_asked
from megatron.training.machine.core_binding import unbind
from megatron.training.machine.settings import set_up_cpu
from megatron.training.rendezvous import (
    agree_on_start,
    launcher_keeps_store,
    launcher_store,
    store_of_start,
)
from megatron.training.start_clock import start_clock

log = logging.getLogger(__name__)


class Launch(NamedTuple):
    """What torchrun told this process; a world of one without it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    restarts: int = 0
    """How often this machine's launcher has started its ranks again after a failure."""
    max_restarts: int = 0
    """How often it may."""

    @classmethod
    def from_environment(cls) -> "Launch":
        """Read torchrun's variables."""
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        rank = int(os.environ.get("RANK", 0))
        return cls(
            rank,
            world_size,
            local_rank=int(os.environ.get("LOCAL_RANK", rank)),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
            restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
            max_restarts=int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)),
        )


@dataclass(frozen=True, kw_only=True)
class World:
    """This rank among the others."""

    rank: int
    world_size: int
    device: torch.device
    pg_collection: ProcessGroupCollection
    start: str = ""
    """Name of this start of all ranks, no other's; empty where no launcher keeps a store."""

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the files and shows the log of the run."""
        return self.rank == 0

    def place(self) -> str:
        """Name this rank and its place in the groups, for messages."""
        groups = self.pg_collection
        slices = f", etp {groups.expt_tp.rank()}" if groups.expt_tp.size() > 1 else ""
        slices += f", pp {groups.pp.rank()}" if groups.pp.size() > 1 else ""
        slices += f", cp {groups.cp.rank()}" if groups.cp.size() > 1 else ""
        return f"rank {self.rank} (dp {groups.dp.rank()}, ep {groups.ep.rank()}{slices})"


def initialize(config: RunConfig) -> World:
    """Connect the ranks, make the groups, seed the generators. Every rank calls this once."""
    launch = Launch.from_environment()
    device, why = choose_device(config.distributed, launch)
    check_asked(config, device)
    backend = choose_backend(config.distributed, device)
    threads = set_threads(launch, device)
    if device.type == "cpu":
        choice.use(config.distributed.cpu_kernels)
        threads += f", {choice.describe()}"
    timeout = timedelta(minutes=config.distributed.distributed_timeout_minutes)
    start = connect(launch, backend, device, timeout)
    groups = ProcessGroupCollection.create(config.model.layout(launch.world_size), timeout)
    parallel_state.set_process_groups(groups)
    seed_everything(config.training.seed)
    log.info(
        " > %d rank%s on %s (%s) over %s, %s",
        launch.world_size,
        "s" if launch.world_size > 1 else "",
        device.type,
        why,
        backend,
        threads,
    )
    if device.type == "cpu":
        set_up_cpu(
            config.distributed,
            local_rank=launch.local_rank,
            local_world_size=launch.local_world_size,
            threads=torch.get_num_threads(),
        )
    start_clock.mark("process groups")
    return World(
        rank=launch.rank,
        world_size=launch.world_size,
        device=device,
        pg_collection=groups,
        start=start,
    )


def choose_device(config: DistributedConfig, launch: Launch) -> tuple[torch.device, str]:
    """Return the device of this rank and why it was chosen.

    Raises:
        ConfigError: ``--device cuda`` without a CUDA device, or more local ranks than devices.
    """
    available = torch.cuda.is_available()
    wanted = config.device or ("cuda" if available else "cpu")
    why = "--device" if config.device else ("found" if available else "no CUDA device found")
    if wanted == "cpu":
        return torch.device("cpu"), why
    count = torch.cuda.device_count() if available else 0
    if launch.local_rank >= count:
        raise ConfigError(
            f"{launch.local_world_size} ranks on this machine need as many CUDA devices, found "
            f"{count}; start fewer ranks with --nproc-per-node, or add --device cpu"
        )
    name = torch.cuda.get_device_name(launch.local_rank)
    return torch.device("cuda", launch.local_rank), f"{why}: {name}"


def choose_backend(config: DistributedConfig, device: torch.device) -> str:
    """Return the communication library for ``device``.

    Raises:
        ConfigError: nccl was asked for on CPU.
    """
    backend = config.distributed_backend or ("nccl" if device.type == "cuda" else "gloo")
    if backend == "nccl" and device.type == "cpu":
        raise ConfigError(
            "--distributed-backend nccl needs CUDA devices and this run is on CPU; leave it out, "
            "or say --distributed-backend gloo"
        )
    return backend


def set_threads(launch: Launch, device: torch.device) -> str:
    """Share this machine's cores among its ranks on CPU; return a sentence for the log.

    OMP_NUM_THREADS is obeyed when set. torchrun sets it to 1 for several ranks unless the user has.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = max(1, (cores or 1) // launch.local_world_size)
    if device.type == "cuda":
        return f"{torch.get_num_threads()} CPU threads"
    asked = os.environ.get("OMP_NUM_THREADS")
    if asked is None:
        torch.set_num_threads(share)
    threads = torch.get_num_threads()
    text = f"{threads} thread{'s' if threads > 1 else ''} a rank"
    if asked is not None and threads != share:
        text += f" (OMP_NUM_THREADS={asked}; {share} would use all {cores} cores)"
    return text


def connect(launch: Launch, backend: str, device: torch.device, timeout: timedelta) -> str:
    """Join the default process group, unless the caller's script has done it.

    Returns:
        The name of this start of all ranks; empty where no launcher keeps a store.

    Raises:
        ConfigError: The ranks were not told where to meet, or some did not come.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return ""
    device_id, start = device if backend == "nccl" else None, ""
    store: Store | None = None
    if launch.world_size == 1:
        # in this process's memory: no port to be taken, no file to be left behind
        store = dist.HashStore()  # type: ignore[attr-defined]
    else:
        _refuse_unknown_meeting_place(launch)
        if launcher_keeps_store():
            kept = launcher_store(timeout)
            start = agree_on_start(kept, launch.rank, launch.world_size, timeout)
            store = store_of_start(kept, start)
    dist.init_process_group(
        backend,
        store=store,
        rank=-1 if store is None else launch.rank,  # else torch asks the environment itself
        world_size=-1 if store is None else launch.world_size,
        timeout=timeout,
        device_id=device_id,
    )
    return start


def _refuse_unknown_meeting_place(launch: Launch) -> None:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {launch.world_size}, but {' and '.join(missing)} are not set "
            "in the environment: start the ranks with torchrun, or unset WORLD_SIZE and RANK "
            "for a run of one process"
        )


def collective_checks(config: RunConfig) -> AbstractContextManager[None]:
    """Return what compares collectives with ``--check-collectives``, and nothing without."""
    if not config.distributed.check_collectives:
        return nullcontext()
    log.info(" > collectives are compared before they begin: slow, and nothing overlaps")
    timeout = timedelta(minutes=config.distributed.distributed_timeout_minutes)
    return checked_collectives(CollectiveChecks.of_world(timeout))


def seed_everything(seed: int) -> None:
    """Seed the global generators, for users' code: no step of ours draws from them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def shut_down() -> None:
    """Leave the process groups, and the cores of this rank."""
    unbind()
    parallel_state.set_process_groups(None)
    if dist.is_initialized():
        dist.destroy_process_group()
